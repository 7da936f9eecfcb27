"""SavedModel folders without Keras layers: their graph, judged and cut out without running it.

``tf.saved_model.load`` runs what a graph says it needs to start, and hands out functions that do whatever their
operations do: read files, write files. Here the graph of one signature is taken out of ``saved_model.pb`` instead:

    signature     "serving_default", or the only one that has outputs
    pruning       the nodes that its outputs need, and the functions that these call, at any depth
    judgement     every one of them must be in `OPERATIONS`: arithmetic, shapes, control flow. Whatever touches a file,
                  a table, the network or Python is not in it, so that it is refused by name before anything is built
    variables     a handle is cut off and its value read from the checkpoint (``load.checkpoint``)

Which value belongs to a handle: TensorFlow 2 hands the handles to the signature's function behind its inputs, in the
order of ``bound_inputs`` in the tree of objects, and the checkpoint's own tree, walked beside it, names the value.
Names decide nothing, as two variables may have one. TensorFlow 1 has no objects: there a variable's name is its key.

Assertions and prints, on which no output depends, become nothing. Importing a graph, TensorFlow infers shapes, for
which it may work out what is constant: sizes that a constant gives are bounded (``SIZED``) before that.

Functions are renamed by their content's hash, since TensorFlow keeps one function of a name for the whole process.

Limits: a signature that takes strings, sparse or ragged tensors, scalars, or a tensor of unknown rank is refused, as is
a variable that is stored in slices, and a graph whose calls, written out, exceed `MAX_NODES`. Sizes that are computed
from constants are not bounded, and what runs a graph runs it for as long as it takes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from deploykit.errors import LoadError, UnsafeModelError, UnsupportedModelError
from deploykit.load.checkpoint import Checkpoint, reading
from deploykit.load.contents import printable
from deploykit.opaque import CALLS, Array, Graph, Specs, functions_of
from deploykit.signature import TensorSpec

SERVE, DEFAULT = "serve", "serving_default"

MAX_NODES = 1_000_000  # all calls written out
MAX_REPEATED_BYTES = 64 << 20  # of constants beyond what the file holds of them: one value repeated is short there
MAX_FUNCTION_DEPTH = 100

# What a graph may consist of: everything here computes its outputs from its inputs, and does nothing else.
_NAMES = """
    Abs Acos Acosh Add AddN AddV2 All Any ArgMax ArgMin Asin Asinh Atan Atan2 Atanh AvgPool AvgPool3D BatchMatMul
    BatchMatMulV2 BatchMatMulV3 BatchToSpaceND BiasAdd BiasAddV1 Bincount BitwiseAnd BitwiseOr BitwiseXor BroadcastArgs
    BroadcastGradientArgs BroadcastTo Cast Ceil CheckNumerics ClipByValue CombinedNonMaxSuppression Concat ConcatOffset
    ConcatV2 Const Conv2D Conv2DBackpropInput Conv3D Conv3DBackpropInputV2 Cos Cosh CropAndResize Cumprod Cumsum
    DenseBincount DepthToSpace DepthwiseConv2dNative Div DivNoNan DynamicPartition DynamicStitch Einsum Elu
    EnsureShape Equal Erf Erfc Exp ExpandDims Expm1 ExtractImagePatches FakeQuantWithMinMaxArgs FakeQuantWithMinMaxVars
    FakeQuantWithMinMaxVarsPerChannel Fill Floor FloorDiv FloorMod FusedBatchNorm FusedBatchNormV2 FusedBatchNormV3
    Gather GatherNd GatherV2 Greater GreaterEqual Identity IdentityN Invert InvertPermutation IsFinite IsInf IsNan
    L2Loss LRN LeakyRelu LeftShift Less LessEqual LinSpace Log Log1p LogSoftmax LogicalAnd LogicalNot LogicalOr
    MatMul MatrixBandPart MatrixDiag MatrixDiagPart MatrixDiagPartV2 MatrixDiagPartV3 MatrixDiagV2 MatrixDiagV3
    MatrixSetDiag MatrixSetDiagV2 MatrixSetDiagV3 Max MaxPool MaxPool3D MaxPoolV2 MaxPoolWithArgmax Maximum Mean Min
    Minimum MirrorPad Mod Mul MulNoNan Neg NoOp NonMaxSuppressionV2 NonMaxSuppressionV3 NonMaxSuppressionV4
    NonMaxSuppressionV5 NotEqual OneHot OnesLike Pack Pad PadV2 ParallelDynamicStitch Placeholder PlaceholderWithDefault
    Pow PreventGradient Prod Range Rank RealDiv Reciprocal Relu Relu6 Reshape ResizeArea ResizeBicubic ResizeBilinear
    ResizeNearestNeighbor ReverseSequence ReverseV2 RightShift Rint Roll Round Rsqrt ScatterNd SegmentMax SegmentMean
    SegmentMin SegmentProd SegmentSum Select SelectV2 Selu Shape ShapeN Sigmoid Sign Sin Sinh Size Slice Softmax
    Softplus Softsign SpaceToBatchND SpaceToDepth Split SplitV Sqrt Square SquaredDifference Squeeze StopGradient
    StridedSlice Sub Sum Tan Tanh TensorListFromTensor TensorListGetItem TensorListLength TensorListReserve
    TensorListSetItem TensorListStack TensorScatterAdd TensorScatterMax TensorScatterMin TensorScatterSub
    TensorScatterUpdate Tile TopK TopKV2 Transpose TruncateDiv TruncateMod Unique Unpack UnsortedSegmentMax
    UnsortedSegmentMin UnsortedSegmentProd UnsortedSegmentSum Where Xdivy Xlogy ZerosLike
    Complex ComplexAbs EmptyTensorList FFT IRFFT Imag RFFT RFFT2D Real StringFormat TensorListConcatV2
    TensorListElementShape TensorListGather TensorListPopBack TensorListPushBack TensorListResize TensorArrayGatherV3
    TensorArrayReadV3 TensorArrayScatterV3 TensorArraySizeV3 TensorArrayV3 TensorArrayWriteV3
    Enter Exit LoopCond Merge NextIteration Switch
    If StatelessIf While StatelessWhile Case StatelessCase PartitionedCall StatefulPartitionedCall
    ReadVariableOp ResourceGather VarHandleOp Variable VariableV2
"""
OPERATIONS = frozenset(_NAMES.split())
SINKS = frozenset(("Assert", "Print", "PrintV2"))  # on which outputs wait, but do not depend
SIZED = {  # operation -> the operand that says how much it makes
    "Fill": 0,
    "Range": 1,
    "Tile": 1,
    "BroadcastTo": 1,
    "OneHot": 1,
    "ScatterNd": 2,
    "LinSpace": 2,
    "TensorListReserve": 1,
    **dict.fromkeys(("ResizeArea", "ResizeBicubic", "ResizeBilinear", "ResizeNearestNeighbor"), 1),
}
MAX_ELEMENTS = 1 << 27  # that a constant may ask one operation for
REFERENCES = frozenset(("Variable", "VariableV2"))  # of TensorFlow 1: the value itself, not a handle


def read(path: Path, described: bool) -> Graph:
    """The graph of a SavedModel folder, whose files were looked through before (`savedmodel.peek`).

    ``described``: the folder's tree of objects says which value belongs to a handle (TensorFlow 2).
    Raises UnsafeModelError for an operation that does more than compute, UnsupportedModelError for a signature that
    is not for arrays, LoadError for what is damaged.
    """
    with reading("saved_model.pb", path):
        saved = SavedModel.FromString((path / "saved_model.pb").read_bytes())
    meta = _meta_graph(saved, path)
    name, signature = _signature(meta, path)
    inputs, outputs = _specs(signature.inputs, "input", path), _specs(signature.outputs, "output", path)
    with reading("the graph in saved_model.pb", path):
        definition = _pruned(meta.graph_def, inputs, outputs)
    _judge(definition, path)
    fed = {_producer(name) for name, _ in inputs}
    if loose := [node.name for node in definition.node if node.op == "Placeholder" and node.name not in fed]:
        raise LoadError(f"{path}: its outputs need {printable(loose[0])!r}, which is no input of the signature")
    variables = _values(definition, meta.object_graph_def if described else None, path)
    made = meta.meta_info_def.tensorflow_version
    return Graph(_renamed(definition), inputs, outputs, variables, f"signature {name!r}, TensorFlow {printable(made)}")


def _meta_graph(saved: Any, path: Path) -> Any:
    """The graph for serving on a CPU, of those that the file holds for different uses."""
    found = [meta for meta in saved.meta_graphs if SERVE in meta.meta_info_def.tags]
    if not found:
        tags = sorted({tag for meta in saved.meta_graphs for tag in meta.meta_info_def.tags})
        raise UnsupportedModelError(
            f"{path} holds no graph for serving (its tags: {printable(', '.join(tags)) or 'none'}); "
            "export it with tf.saved_model.save"
        )
    return min(found, key=lambda meta: len(meta.meta_info_def.tags))  # others are for accelerators


def _signature(meta: Any, path: Path) -> tuple[str, Any]:
    known = {name: one for name, one in meta.signature_def.items() if one.outputs and not name.startswith("__")}
    names = [DEFAULT] if DEFAULT in known else sorted(known)
    if len(names) != 1:
        said = f"none of its signatures ({printable(', '.join(names))}) is {DEFAULT!r}" if names else "has no signature"
        raise UnsupportedModelError(
            f"{path}: {said}, so that its inputs and outputs are unknown; save it with "
            f"signatures={{{DEFAULT!r}: function.get_concrete_function(...)}}"
        )
    return names[0], known[names[0]]


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which output_2 comes before output_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _specs(entries: Mapping[str, Any], kind: str, path: Path) -> Specs:
    """Each tensor's name in the graph and its specification, in the natural order of the signature's names."""
    found: list[tuple[str, TensorSpec]] = []
    for name in sorted(entries, key=_natural):
        info, label = entries[name], f"{kind} {printable(name)!r}"
        if info.WhichOneof("encoding") != "name":
            raise UnsupportedModelError(f"{path}: {label} is no plain tensor; only arrays can be checked and timed")
        if "/" in name:
            raise UnsupportedModelError(
                f"{path}: {label} has a '/' in its name; give the signature another name for it"
            )
        try:
            dtype = tf.dtypes.as_dtype(info.dtype)
        except TypeError:
            dtype = tf.variant
        if not (dtype.is_floating or dtype.is_integer or dtype.is_bool) or dtype.is_quantized or dtype == tf.bfloat16:
            raise UnsupportedModelError(f"{path}: {label} holds {dtype.name}, which is no array of numbers")
        shape = info.tensor_shape
        if shape.unknown_rank or (kind == "input" and not shape.dim):
            what = "is of unknown rank" if shape.unknown_rank else "is a scalar"
            raise UnsupportedModelError(f"{path}: {label} {what}; save the signature with a tf.TensorSpec of its shape")
        sizes = tuple(None if dim.size < 0 else int(dim.size) for dim in shape.dim)
        found.append((info.name, TensorSpec(name, sizes, dtype.name)))
    if not found:
        raise UnsupportedModelError(f"{path}: its signature has no {kind}s, so that there is nothing to compare")
    return tuple(found)


# ------------------------------------------------------------------------------------------------- the graph


def _producer(reference: str) -> str:
    return reference.removeprefix("^").partition(":")[0]


def _called(node: Any) -> Iterator[str]:
    """The functions that a node names."""
    for attribute in node.attr.values():
        yield from (function.name for function in functions_of(attribute))


def _pruned(graph: Any, inputs: Specs, outputs: Specs) -> Any:
    """What the outputs need of a graph, ending at the inputs; ValueError where something is missing."""
    by_name = {node.name: node for node in graph.node}
    functions = {function.signature.name: function for function in graph.library.function}
    kept = tf.compat.v1.GraphDef(versions=graph.versions)
    ends = {_producer(name): spec for name, spec in inputs}
    if len(ends) < len(inputs) or any(name.partition(":")[2] not in ("", "0") for name, _ in inputs):
        raise ValueError("inputs that are several results of one node")
    waiting, seen = [_producer(name) for name, _ in (*inputs, *outputs)], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name not in by_name:
            raise ValueError(f"no node {name}")
        node = kept.node.add()
        node.CopyFrom(by_name[name])
        node.device = ""
        if node.op == "PlaceholderWithDefault" and name not in ends:  # nobody feeds it
            dtype = node.attr["dtype"].type
            node.op = "Identity"
            node.attr.clear()
            node.attr["T"].type = dtype
        if name in ends:
            _become(node, "Placeholder", tf.dtypes.as_dtype(ends[name].dtype), shape=ends[name].shape)
        else:
            waiting += map(_producer, node.input)
    _silence(kept.node)
    called = [name for node in kept.node for name in (*_called(node), node.op) if name in functions]
    taken: set[str] = set()
    while called:
        name = called.pop()
        if name in taken:
            continue
        taken.add(name)
        body = kept.library.function.add()
        body.CopyFrom(functions[name])
        _silence(body.node_def)
        for node in body.node_def:
            node.device = ""
            called += [one for one in (*_called(node), node.op) if one in functions]
    return kept


def _silence(nodes: Any) -> None:
    """Assertions and prints become nothing, which waits for what they waited for."""
    for node in nodes:
        if node.op in SINKS:
            waited = [name for name in node.input if name.startswith("^")]
            node.op = "NoOp"
            node.attr.clear()
            del node.input[:]
            node.input.extend(waited)


def _judge(graph: Any, path: Path) -> None:
    """Refuse what does more than compute, and what would grow without bound."""
    bodies: dict[str, Any] = {function.signature.name: function.node_def for function in graph.library.function}
    found = sorted({node.op for nodes in (graph.node, *bodies.values()) for node in nodes} - OPERATIONS - set(bodies))
    if found:
        raise UnsafeModelError(
            f"{path}: its graph has operations that deploykit does not run: {printable(', '.join(found))}; "
            "only operations that compute are, none that reads files, tables or strings, or draws random numbers"
        )
    constants = 0
    sizes: dict[str, int] = {}

    def size(name: str, depth: int) -> int:
        """Nodes of a function with all its calls written out."""
        if depth > MAX_FUNCTION_DEPTH:
            raise UnsafeModelError(f"{path}: its functions call one another {depth} deep, or in a circle; refusing it")
        if name not in sizes:
            sizes[name] = total(bodies[name], depth + 1)
        return sizes[name]

    def total(nodes: Any, depth: int) -> int:
        inner = (size(name, depth) for node in nodes for name in (*_called(node), node.op) if name in bodies)
        return len(nodes) + sum(inner)

    if total(graph.node, 0) > MAX_NODES:
        raise UnsafeModelError(f"{path}: its calls, written out, have more than {MAX_NODES} operations; refusing it")
    for nodes in (graph.node, *bodies.values()):
        for node in nodes:
            if any(name not in bodies for name in _called(node)):
                raise LoadError(f"{path}: {printable(node.name)} calls a function that is not there; save it again")
            if any(attribute.WhichOneof("value") == "placeholder" for attribute in node.attr.values()):
                raise LoadError(f"{path}: {printable(node.name)} is not the whole of an operation; save it again")
            if node.op == "Const":
                constants += _constant_bytes(node, path)
        _refuse_sizes(nodes, path)
    if constants > MAX_REPEATED_BYTES:
        raise UnsafeModelError(
            f"{path}: its constants fill {constants >> 20} MiB more than the file holds of them; refusing to build them"
        )


def _refuse_sizes(nodes: Any, path: Path) -> None:
    """Refuse an operation that a constant asks for more than `MAX_ELEMENTS`."""
    by_name = {node.name: node for node in nodes}
    for node in nodes:
        place = SIZED.get(node.op)
        if place is None or place >= len(node.input):
            continue
        asked = by_name.get(_producer(node.input[place]))
        while asked is not None and asked.op in ("Identity", "Cast") and asked.input:
            asked = by_name.get(_producer(asked.input[0]))
        if asked is None or asked.op != "Const":
            continue
        with reading(f"constant {printable(asked.name)!r}", path):
            sizes = tf.make_ndarray(asked.attr["value"].tensor)
            count = float(np.abs(sizes.astype(np.float64)).clip(1.0).prod())
        if count > MAX_ELEMENTS:
            raise UnsafeModelError(f"{path}: {printable(node.name)} makes {count:.3g} numbers; refusing to build it")


def _constant_bytes(node: Any, path: Path) -> int:
    shape = tf.TensorShape(node.attr["value"].tensor.tensor_shape)
    with reading(f"constant {printable(node.name)!r}", path):
        dtype = tf.dtypes.as_dtype(node.attr["dtype"].type) if node.attr["dtype"].type else tf.variant
        if dtype in (tf.resource, tf.variant):
            raise ValueError("no value")
        stored = len(node.attr["value"].tensor.tensor_content)
        return max(0, int(shape.num_elements() or 0) * (dtype.size or 1) - stored)


def _renamed(graph: Any) -> Any:
    """The graph with its functions' names made its own."""
    own = hashlib.sha256(graph.SerializeToString(deterministic=True)).hexdigest()[:12]
    new = {function.signature.name: f"{function.signature.name}_{own}" for function in graph.library.function}
    for function in graph.library.function:
        function.signature.name = new[function.signature.name]
        function.attr.pop("_implements", None)
    for node in (*graph.node, *(node for function in graph.library.function for node in function.node_def)):
        node.op = new.get(node.op, node.op)
        for attribute in node.attr.values():
            for function in functions_of(attribute):
                function.name = new[function.name]
    return graph


# --------------------------------------------------------------------------------------------- the variables


def _values(graph: Any, objects: Any | None, path: Path) -> dict[str, Array]:
    """The value of each handle in the graph, by the handle's node; plain variables become constants in place."""
    handles = [node for node in graph.node if node.op in ("VarHandleOp", *REFERENCES)]
    inner = [
        n.name for function in graph.library.function for n in function.node_def if n.op in ("VarHandleOp", *REFERENCES)
    ]
    if inner:
        raise UnsupportedModelError(f"{path}: variable {printable(inner[0])!r} is made inside of a function")
    if not handles:
        return {}
    checkpoint = Checkpoint(path)
    keys = _keys_by_object(graph, objects, checkpoint, path) if objects is not None else {}
    values: dict[str, Array] = {}
    for node in handles:
        label = f"variable {printable(node.name)!r}"
        key = _key_by_name(node, checkpoint) if objects is None else keys.get(node.name)
        if key is None:
            raise LoadError(f"{path}: {label} has no value in the checkpoint; save the model again")
        value = checkpoint.array(key, label)
        declared, dtype = tf.TensorShape(node.attr["shape"].shape), tf.dtypes.as_dtype(node.attr["dtype"].type)
        if not declared.is_compatible_with(value.shape) or dtype != value.dtype:
            raise LoadError(
                f"{path}: {label} is {dtype.name} {declared} in the graph and {value.dtype} {value.shape} in the "
                "checkpoint; save the model again"
            )
        if node.op in REFERENCES:
            _become(node, "Const", dtype, value=tf.make_tensor_proto(value))
        else:
            values[node.name] = value
            _become(node, "Placeholder", tf.resource)
    return values


def _key_by_name(node: Any, checkpoint: Checkpoint) -> str | None:
    """TensorFlow 1: a variable is saved by its name."""
    return next((key for key in (node.attr["shared_name"].s.decode(), node.name) if key in checkpoint.entries), None)


def _become(node: Any, operation: str, dtype: Any, *, value: Any = None, shape: Any = None) -> None:
    """Make a node another one of the same name, without inputs."""
    node.op = operation
    del node.input[:]
    node.attr.clear()
    node.attr["dtype"].type = dtype.as_datatype_enum
    if value is not None:
        node.attr["value"].tensor.CopyFrom(value)
    if shape is not None:
        node.attr["shape"].shape.CopyFrom(tf.TensorShape(shape).as_proto())


def _keys_by_object(graph: Any, objects: Any, checkpoint: Checkpoint, path: Path) -> dict[str, str | None]:
    """Handle's node -> key in the checkpoint: handles are given in the order of the function's ``bound_inputs``."""
    stored = checkpoint.objects()
    pairs = {0: 0}  # an object's number in the description's tree -> in the checkpoint's
    waiting = [0]
    while waiting:
        number = waiting.pop()
        theirs = {child.local_name: child.node_id for child in stored[pairs[number]].children}
        for child in objects.nodes[number].children:
            if child.local_name in theirs and child.node_id not in pairs:
                pairs[child.node_id] = theirs[child.local_name]
                waiting.append(child.node_id)
    keys: dict[str, str | None] = {}
    for node in graph.node:
        if node.op not in CALLS:
            continue
        bound = list(objects.concrete_functions[node.attr["f"].func.name].bound_inputs)
        given = [name for name in node.input if not name.startswith("^")]
        for number, reference in zip(bound, given[len(given) - len(bound) :], strict=True):
            if number in pairs:
                attributes = stored[pairs[number]].attributes
                keys[_producer(reference)] = next(
                    (a.checkpoint_key for a in attributes if a.name == "VARIABLE_VALUE"), None
                )
    return keys
