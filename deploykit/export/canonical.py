"""The same model gives the same ONNX graph: order, names and signature made canonical.

tf2onnx numbers what it makes with a counter of the process, and walks Python sets, so names and order
differ from run to run. Here only the graph's structure decides:

- *Order*: nodes in post-order of a depth-first walk from the outputs, inputs first to last.
- *Nodes* are named ``layer path/operation``: the scope of the TensorFlow operation they came from, as a
  path of Keras layer names (`tracing.Frozen.path`), and their ONNX operation (``block_1/conv/Conv``);
  what tf2onnx inserted gets the path of its weights, or else of its producer or consumer. A repeated name gets
  ``_1``, ``_2``, ... in order.
- *Tensors* are named after the node that makes them (``block_1/conv/Conv:0``), constants after the node
  that reads them first and the place they have there in ONNX's own words (``block_1/conv/Conv/W``).
- *Inputs and outputs* have the names, shapes and dtypes of the Keras signature, letter by letter. The
  free batch size is called ``batch``, any other free size ``<tensor>_dim<axis>``.

The walk leaves behind nodes that no output needs. Nothing here changes what is computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import onnx
from onnx import TensorShapeProto, ValueInfoProto, helper

from deploykit.errors import UnsupportedModelError
from deploykit.export.tracing import subgraphs
from deploykit.signature import Signature, TensorSpec

_CALL = re.compile(r"(Stateful)?PartitionedCall(_\d+)?/")  # inlined calls leave their name behind
_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


class _Names:
    """Hands out every name once."""

    def __init__(self, taken: Sequence[str] = ()) -> None:
        self._next: dict[str, int] = dict.fromkeys(taken, 1)

    def fresh(self, wanted: str) -> str:
        name, count = wanted, self._next.get(wanted, 0)
        while name in self._next:
            name, count = f"{wanted}_{count}", count + 1
        self._next[wanted] = max(count, 1)
        self._next.setdefault(name, 1)
        return name


def _inner(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.type in _GRAPHS:
            yield from ([attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs)


def _reads(node: Any) -> list[str]:
    """Every tensor a node reads, those that its loop body or branch takes from outside included."""
    names = [name for name in node.input if name]
    for graph in _inner(node):
        made = {value.name for value in (*graph.input, *graph.initializer)}
        made.update(name for inner in graph.node for name in inner.output)
        read = [name for inner in graph.node for name in _reads(inner)] + [value.name for value in graph.output]
        names += [name for name in read if name not in made]
    return names


def _replace_reads(node: Any, new: Mapping[str, str]) -> None:
    """Let a node, and the graphs inside of it, read other tensors."""
    node.input[:] = [new.get(name, name) for name in node.input]
    for graph in _inner(node):
        for inner in graph.node:
            _replace_reads(inner, new)
        for value in graph.output:
            value.name = new.get(value.name, value.name)


def _without_identities(graph: Any) -> None:
    """Remove every Identity that only gives a second name to a tensor, in place.

    Where several outputs are one tensor, the first one is that tensor and the others are Identities of
    it; an output that is an input or a constant stays an Identity.
    """
    alias = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity" and not node.domain}

    def root(name: str) -> str:
        while name in alias:
            name = alias[name]
        return name

    kept = [node for node in graph.node if node.op_type != "Identity" or node.domain]
    made = {name for node in kept for name in node.output if name}
    final: dict[str, str] = {}  # root -> the output that it is
    identities = []
    for output in graph.output:
        source = root(output.name)
        if source in made and source not in final:
            final[source] = output.name
        elif source in made or source != output.name:  # else a loop body hands on what it was given
            identities.append((source, output.name))
    outputs = {output.name for output in graph.output}
    # a tensor that has the name of an output without being it makes room
    final |= {name: f"{name}#" for name in made if name in outputs and name not in final}
    new = {name: final.get(root(name), root(name)) for name in (*alias, *final)}
    copies = [onnx.NodeProto() for _ in kept]
    for copy, node in zip(copies, kept, strict=True):
        copy.CopyFrom(node)
        _replace_reads(copy, new)
        copy.output[:] = [final.get(name, name) for name in copy.output]
    copies += [helper.make_node("Identity", [final.get(source, source)], [name]) for source, name in identities]
    del graph.node[:]
    graph.node.extend(copies)


def _ordered(graph: Any) -> list[Any]:
    """The nodes that the outputs need, producers first; the outputs' own order decides ties."""
    producer = {name: node for node in graph.node for name in node.output if name}
    order: list[Any] = []
    seen: set[int] = set()
    for output in graph.output:
        stack = [(producer.get(output.name), False)]
        while stack:
            node, entered = stack.pop()
            if node is None:
                continue
            if entered:
                order.append(node)
            elif id(node) not in seen:
                seen.add(id(node))
                stack.append((node, True))
                stack += [(producer.get(name), False) for name in reversed(_reads(node))]
    return order


def _paths(nodes: Sequence[Any], constants: Collection[str], path: Callable[[str], str | None]) -> list[str]:
    """``layer path/ONNX operation`` for every node, not yet unique."""
    layers: list[str | None] = []
    maker: dict[str, int] = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    for node in nodes:
        weights = (path(read.partition(":")[0]) for read in node.input if read in constants)
        known = path(node.name) or next((found for found in weights if found), None)
        known = known if known is None else _CALL.sub("", known)
        folder = (known or "").rpartition("/")[0]
        before = (layers[maker[read]] for read in _reads(node) if read in maker)
        layers.append(folder if known is not None else next((layer for layer in before if layer), None))
    after: dict[str, str | None] = {}
    for i in range(len(nodes) - 1, -1, -1):  # inserted nodes that read inputs and constants alone
        if layers[i] is None:
            layers[i] = next((after[name] for name in nodes[i].output if after.get(name)), None)
        for read in _reads(nodes[i]):
            after[read] = layers[i]
    return [
        f"{layer}/{node.op_type}" if layer else str(node.op_type) for layer, node in zip(layers, nodes, strict=True)
    ]


def _places(node: Any, opset: int) -> list[str]:
    """What ONNX calls the inputs of a node, one name per input."""
    if node.domain or not onnx.defs.has(node.op_type):
        return [f"input_{i}" for i in range(len(node.input))]
    formal = [place.name for place in onnx.defs.get_schema(node.op_type, opset).inputs]
    return [formal[i] if i < len(formal) else f"{formal[-1]}_{i}" for i in range(len(node.input))]


def _rename(graph: Any, outer: Mapping[str, str], names: _Names, nodes: Sequence[str], opset: int) -> dict[str, str]:
    """New tensor names of one graph, whose nodes are in order; constants are listed in the order of their use."""
    new = dict(outer)
    constants = {constant.name for constant in graph.initializer}
    for node, name in zip(graph.node, nodes, strict=True):
        for place, read in zip(_places(node, opset), node.input, strict=True):
            if read in constants and read not in new:
                new[read] = names.fresh(f"{name}/{place}")
        for read in _reads(node):  # what is left is read by a loop body or branch, from outside of it
            if read in constants and read not in new:
                new[read] = names.fresh(f"{name}/captured")
        for i, made in enumerate(node.output):
            if made and made not in new:
                new[made] = names.fresh(f"{name}:{i}")
    return new


def _canonical_graph(
    graph: Any, outer: Mapping[str, str], names: _Names, path: Callable[[str], str | None], opset: int
) -> dict[str, str]:
    """Order and rename a graph and the graphs inside of it, in place; returns the new names of its tensors."""
    _without_identities(graph)
    nodes = _ordered(graph)
    kept = [onnx.NodeProto() for _ in nodes]
    for copy, node in zip(kept, nodes, strict=True):
        copy.CopyFrom(node)
    del graph.node[:]
    graph.node.extend(kept)
    own = [names.fresh(name) for name in _paths(kept, {constant.name for constant in graph.initializer}, path)]
    new = _rename(graph, outer, names, own, opset)
    for node, name in zip(graph.node, own, strict=True):
        for inner in _inner(node):
            inner.name = f"{name}/body"
            inner_names = {value.name: names.fresh(f"{name}/body/input_{i}") for i, value in enumerate(inner.input)}
            _canonical_graph(inner, {**new, **inner_names}, names, path, opset)
        reads, makes = [new.get(read, read) for read in node.input], [new.get(made, made) for made in node.output]
        del node.input[:], node.output[:]
        node.input.extend(reads)
        node.output.extend(makes)
        node.name = name
        node.doc_string = ""
        attributes = sorted(node.attribute, key=lambda attribute: str(attribute.name))
        copies = [onnx.AttributeProto() for _ in attributes]
        for copy, attribute in zip(copies, attributes, strict=True):
            copy.CopyFrom(attribute)
        del node.attribute[:]
        node.attribute.extend(copies)
    _canonical_constants(graph, new)
    for value in (*graph.input, *graph.output):
        value.name = new.get(value.name, value.name)
        for dim in value.type.tensor_type.shape.dim:
            dim.ClearField("dim_param")  # numbered by tf2onnx; `_declare` names those of the model itself
    del graph.value_info[:]
    return new


def _canonical_constants(graph: Any, new: dict[str, str]) -> None:
    """Rename the constants, in the order of their names' first use; drop those that nothing reads."""
    rank = {name: position for position, name in enumerate(new)}
    outputs = {value.name for value in graph.output}
    used = [constant for constant in graph.initializer if constant.name in new or constant.name in outputs]
    used.sort(key=lambda constant: rank.get(constant.name, -1))
    positions = {id(constant): i for i, constant in enumerate(graph.initializer)}
    order = [positions[id(constant)] for constant in used]
    constants = list(graph.initializer)
    for constant in used:
        constant.name = new.get(constant.name, constant.name)
        constant.doc_string = ""
    if order != list(range(len(constants))):
        kept = [constants[i] for i in order]
        copies = [onnx.TensorProto() for _ in kept]
        for copy, constant in zip(copies, kept, strict=True):
            copy.CopyFrom(constant)
        del graph.initializer[:]
        graph.initializer.extend(copies)


# ---------------------------------------------------------------------------------------------- signature


def _dimension(spec: TensorSpec, axis: int) -> int | str:
    size = spec.shape[axis]
    if size is not None:
        return size
    return "batch" if axis == 0 else f"{spec.name}_dim{axis}"


def _declare(kind: str, value: Any, spec: TensorSpec) -> None:
    """Give an input or output the signature's shape; refuse what contradicts it."""
    found = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(found.elem_type)
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in found.shape.dim]
    unknown = not found.HasField("shape")
    fits = unknown or (
        len(sizes) == len(spec.shape)
        and all(have is None or want is None or have == want for have, want in zip(sizes, spec.shape, strict=True))
    )
    if str(dtype) != spec.dtype or not fits:
        shown = "?" if unknown else ", ".join("?" if size is None else str(size) for size in sizes)
        raise UnsupportedModelError(
            f"{kind} {spec} of the model would become {dtype} [{shown}] in ONNX; please report this model"
        )
    wanted = TensorShapeProto()
    for axis in range(len(spec.shape)):
        size = _dimension(spec, axis)
        wanted.dim.add(**({"dim_value": size} if isinstance(size, int) else {"dim_param": size}))
    declared = ValueInfoProto(name=spec.name)
    declared.type.tensor_type.elem_type = found.elem_type
    declared.type.tensor_type.shape.CopyFrom(wanted)
    value.CopyFrom(declared)


def _declare_all(graph: Any, signature: Signature) -> None:
    for kind, values, specs in (("input", graph.input, signature.inputs), ("output", graph.output, signature.outputs)):
        if len(values) != len(specs):
            raise UnsupportedModelError(
                f"the model has {len(specs)} {kind}s but its ONNX graph has {len(values)}:"
                f" {', '.join(value.name for value in values)}; please report this model"
            )
        for value, spec in zip(values, specs, strict=True):
            _declare(kind, value, spec)


def canonicalise(
    proto: Any, signature: Signature, path: Callable[[str], str | None], model_name: str, opset: int
) -> dict[str, str]:
    """Make a model converted by tf2onnx canonical, in place; returns old tensor name -> new name.

    Inputs and outputs of ``proto`` must be in the signature's order. ``path`` maps the name of a
    TensorFlow operation to its layer path, or to None where it has none.
    """
    graph = proto.graph
    io = {value.name: spec.name for value, spec in zip(graph.input, signature.inputs, strict=False)}
    io |= {value.name: spec.name for value, spec in zip(graph.output, signature.outputs, strict=False)}
    names = _Names([spec.name for spec in signature])
    new = _canonical_graph(graph, io, names, path, opset)
    graph.name = model_name
    graph.doc_string = proto.doc_string = ""
    _declare_all(graph, signature)
    used = {node.domain for inner in subgraphs(graph) for node in inner.node}
    imports = sorted((entry.domain, entry.version) for entry in proto.opset_import if entry.domain in used | {""})
    del proto.opset_import[:]
    proto.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in imports)
    return new


def rename_io(proto: Any, signature: Signature) -> None:
    """Give the inputs and outputs the signature's names and nothing else; what had such a name before gives way."""
    graph = proto.graph
    new = {value.name: spec.name for value, spec in zip(graph.input, signature.inputs, strict=True)}
    new |= {value.name: spec.name for value, spec in zip(graph.output, signature.outputs, strict=True)}
    for spec in signature:
        if spec.name not in new:
            new[spec.name] = f"{spec.name}/inside"
    for inner in subgraphs(graph):
        for node in inner.node:
            for names in (node.input, node.output):
                names[:] = [new.get(name, name) for name in names]
        for value in (*inner.input, *inner.output, *inner.initializer, *inner.value_info):
            value.name = new.get(value.name, value.name)
