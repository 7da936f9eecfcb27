"""A Keras model as an ONNX graph: trace, freeze, convert with tf2onnx.

Three steps, each with its own trap:

*Trace.* The model is called once with ``training=False`` under a `tf.function`, inputs and outputs in
the flat order of its signature. TensorFlow makes scope names unique by appending numbers (layer
``conv`` becomes ``conv_1/``, layer ``conv_1`` then ``conv_1_2/``), so the way back from an operation
to its layer is lost. The traced graph therefore records for every name what was asked for: `Frozen.paths`
maps ``net_1/conv_1_2/convolution`` to ``conv_1/convolution``.

*Freeze.* Variables and captured eager tensors (the statistics of an adapted Normalization) become
constants, so the graph's inputs are the model's inputs and nothing else. Keras compiles grouped
convolutions with XLA, because TensorFlow's CPU kernels lack them, and a compiled call cannot be
exported; its compile flag is taken off the frozen graph, the call is inlined, and what is left is a
plain convolution whose kernel has fewer input channels, which is ONNX's ``group``.

*Convert.* tf2onnx maps operations and optimises. Its transpose optimizer reads the largest axis of a
scalar and raises (a hard-swish after a convolution does it), losing every transpose it had removed;
ours sends scalars the general way. tf2onnx logs instead of raising; the log is read and what matters
becomes an error or a notice.

Large models: nothing above 2 GB fits into a protobuf message, so large constants leave the graph before
TensorFlow optimises it and stay outside to the end. For TensorFlow and tf2onnx they are inputs; in the
ONNX graph they become constants again, whose content is written beside the model. What would have been
folded into them stays in the graph: a transposed kernel as a Transpose (which ONNX Runtime folds when it
loads the file), a recurrent layer with such large kernels as a Loop.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import tensorflow as tf
import tf2onnx
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2
from tf2onnx import optimizer as tf2onnx_optimizer
from tf2onnx import tf_loader, tfonnx
from tf2onnx.optimizer.transpose_optimizer import TransposeOptimizer

from deploykit.errors import InputError, UnsupportedModelError
from deploykit.graph import flat_call, functional_form, runnable
from deploykit.signature import Signature

SMALL_CONSTANT_BYTES = 1024  # constants up to this size may hold shapes and axes, and always stay in the graph
OPSETS = range(13, max(tf2onnx.constants.OPSET_TO_IR_VERSION) + 1)

COUNTER_START = 1_000_000  # of as many digits as any later number, so that names sort as numbers do
LOGGERS = ("tf2onnx", "tensorflow", "absl")
PACKAGE = os.path.dirname(tf2onnx.__file__)
_LAST_RESORT = logging.lastResort or logging.NullHandler()  # where Python prints without any handler


@dataclass(frozen=True)
class Frozen:
    """A TensorFlow graph without variables. ``paths`` maps its names to paths made of layer names."""

    graph_def: Any  # tf.GraphDef
    inputs: tuple[str, ...]  # tensor names, in the order of the signature
    outputs: tuple[str, ...]
    paths: Mapping[str, str]
    constants: Mapping[str, bytes] = field(default_factory=dict)  # content of the placeholders that were constants

    def path(self, name: str) -> str:
        """The path of an operation, or of one that was made from it (longest known beginning)."""
        known, rest = name, ""
        while known not in self.paths:
            known, _, last = known.rpartition("/")
            rest = f"/{last}{rest}"
            if not known:
                return rest[1:]
        return (self.paths[known] + rest).removeprefix("/")


# ------------------------------------------------------------------------------------------------ silence


class _Collector(logging.Handler):
    """Keeps records; ``passing`` are the handlers that get what others log meanwhile to the root logger."""

    def __init__(self, records: list[logging.LogRecord], passing: Sequence[logging.Handler] = ()) -> None:
        super().__init__()
        self.records = records
        self.passing = passing

    def emit(self, record: logging.LogRecord) -> None:
        if not self.passing or PACKAGE in record.pathname:
            self.records.append(record)
            return
        for handler in self.passing:
            if record.levelno >= handler.level:
                handler.handle(record)


@contextlib.contextmanager
def recorded() -> Iterator[list[logging.LogRecord]]:
    """Collect what the libraries log from WARNING on, instead of letting them print; then put everything back.

    tf2onnx logs a few lines to the root logger, which Python would give a handler for good on that
    occasion; so the root logger has a handler of ours meanwhile, which passes on what is not tf2onnx's.
    """
    records: list[logging.LogRecord] = []
    root = logging.getLogger()
    loggers = [root, *(logging.getLogger(name) for name in LOGGERS)]
    before = [(logger.handlers, logger.propagate, logger.level, logger.disabled) for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            root.handlers = [_Collector(records, root.handlers or [_LAST_RESORT])]
            for logger in loggers[1:]:
                logger.handlers, logger.propagate, logger.disabled = [_Collector(records)], False, False
                logger.setLevel(logging.WARNING)
            yield records
        finally:
            for logger, (handlers, propagate, level, disabled) in zip(loggers, before, strict=True):
                logger.handlers, logger.propagate, logger.disabled = handlers, propagate, disabled
                logger.setLevel(level)


# -------------------------------------------------------------------------------------------------- trace


_ILLEGAL = re.compile(r"[^A-Za-z0-9_.\\/>-]")  # what TensorFlow refuses in a scope's name


def _record_names(graph: Any, paths: dict[str, str]) -> None:
    """Make one graph (a traced function's own, nobody else's) note which name each of its names was asked for as.

    Layers may be called what TensorFlow's scopes may not ("conv 1", "größe"): such a name is replaced in
    the graph, and noted as it was.
    """
    unique_name: Callable[..., str] = graph.unique_name
    name_scope: Callable[..., Any] = graph.name_scope
    asked: dict[str, str] = {}

    def noted(name: str, mark_as_used: bool = True) -> str:
        given = unique_name(name, mark_as_used)
        scope, name = graph.get_name_scope(), asked.get(name, name)
        paths[given] = f"{paths.get(scope, scope)}/{name}" if scope else name
        return given

    def legal(name: Any) -> Any:
        if not isinstance(name, str):
            return name_scope(name)
        replaced = _ILLEGAL.sub("_", name)
        if not graph.get_name_scope() and replaced[:1] in ("_", "-", "\\", "/", ">"):
            replaced = f"x{replaced}"
        if replaced != name:
            asked[replaced] = name
        return name_scope(replaced)

    graph.unique_name, graph.name_scope = noted, legal


def concrete(model: Any, signature: Signature, paths: dict[str, str]) -> Any:
    """Trace the model for a signature; ``paths`` is filled with the layer paths of TensorFlow's names."""
    model = runnable(model)
    call = flat_call(model)

    def traced(*tensors: Any) -> list[Any]:
        _record_names(tf.compat.v1.get_default_graph(), paths)
        return [tf.identity(output) for output in call(*tensors)]

    specs = [tf.TensorSpec(spec.shape, spec.dtype, f"input_{i}") for i, spec in enumerate(signature.inputs)]
    try:
        function = tf.function(traced, autograph=False).get_concrete_function(*specs)
    except Exception as error:  # whatever the model's layers raise
        raise UnsupportedModelError(f"model {model.name} cannot be traced: {first_line(error)}") from error
    paths.update(
        (name, f"{path}/".removeprefix(f"{functional_form(model).name}/")[:-1]) for name, path in paths.items()
    )
    return function


_NOISE = (
    "<stack traces",
    "•",
    "Exception encountered",
    "Arguments received",
    "Graph execution error",
    "Detected at node",
    "File ",
    "[[",
)


def first_line(error: BaseException) -> str:
    """The class of an error and the first line of its message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = next((line for line in lines if line and not line.startswith(_NOISE)), "")
    return f"{type(error).__name__}: {telling}" if telling else type(error).__name__


# ------------------------------------------------------------------------------------------------- freeze


def frozen_bytes(function: Any) -> int:
    """Bytes of everything that freezing turns into constants, and of the constants already there."""
    captured = [tensor for tensor in function.captured_inputs if tensor.dtype != tf.resource]
    variables = function.graph.variables
    total = sum(int(variable.dtype.size) * int(variable.shape.num_elements() or 0) for variable in variables)
    return total + sum(int(tensor.dtype.size) * int(tensor.shape.num_elements() or 0) for tensor in captured)


def _uncompile(graph_def: Any) -> None:
    """Let every XLA-compiled call be inlined like any other."""
    compiled = {function.signature.name for function in graph_def.library.function if _is_compiled(function)}
    for function in graph_def.library.function:
        if function.signature.name in compiled:
            for flag in ("_XlaMustCompile", "_noinline"):
                function.attr.pop(flag, None)
    bodies = [graph_def.node, *(function.node_def for function in graph_def.library.function)]
    for node in (node for body in bodies for node in body):
        node.attr.pop("_XlaMustCompile", None)


def _is_compiled(function: Any) -> bool:
    return "_XlaMustCompile" in function.attr and bool(function.attr["_XlaMustCompile"].b)


def freeze(function: Any, paths: Mapping[str, str], *, outside_bytes: int | None = None) -> Frozen:
    """Turn captures into constants and let TensorFlow inline, fold and prune the graph.

    Constants larger than ``outside_bytes`` become placeholders (None: no constant does).
    """
    own = len(function.inputs) - len(function.captured_inputs)
    inputs = tuple(tensor.name for tensor in function.inputs[:own])
    outputs = tuple(tensor.name for tensor in function.outputs)
    try:
        if outside_bytes is not None:
            graph_def = tf_loader.convert_variables_to_constants_large_model(function)
        else:
            try:
                frozen = convert_variables_to_constants_v2(function, lower_control_flow=False, aggressive_inlining=True)
                graph_def = frozen.graph.as_graph_def(add_shapes=True)
            except ValueError:  # a variable is written (BatchNormalization called with training=True)
                graph_def = tf_loader.convert_variables_to_constants_large_model(function)
        graph_def = tf_loader.fix_freezing_errors_part2(tf_loader.fix_freezing_errors(graph_def))
        _uncompile(graph_def)
        constants = {} if outside_bytes is None else _take_out(graph_def, outside_bytes)
        with tf.Graph().as_default():  # the optimizer imports the graph into the current one
            graph_def = tf_loader.tf_optimize(list(inputs), list(outputs), graph_def)
        _lower(graph_def)
    except UnsupportedModelError:
        raise
    except Exception as error:  # TensorFlow raises ValueError, RuntimeError and its own classes here
        raise UnsupportedModelError(f"TensorFlow cannot freeze the model: {first_line(error)}") from error
    return Frozen(graph_def, inputs, outputs, paths, constants)


def _take_out(graph_def: Any, outside_bytes: int) -> dict[str, bytes]:
    """Replace large constants by placeholders of their shape; return their content by name."""
    taken: dict[str, bytes] = {}
    for node in graph_def.node:
        if node.op == "Const" and len(node.attr["value"].tensor.tensor_content) > outside_bytes:
            taken[node.name] = node.attr["value"].tensor.tensor_content
            node.op = "Placeholder"
            node.attr["shape"].shape.CopyFrom(node.attr["value"].tensor.tensor_shape)
            del node.attr["value"]
    return taken


# -------------------------------------------------------------------------------------------------- lower


def _constant(graph_def: Any, name: str, value: Any, dtype: Any) -> str:
    node = graph_def.node.add(op="Const", name=name)
    node.attr["dtype"].type = dtype
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value, dtype=dtype))
    return name


def _lower_erfc(graph_def: Any, node: Any, _producers: Mapping[str, Any]) -> None:
    """erfc(x) = 1 - erf(x). The one use that matters is the exact GELU, whose factor x bounds the cancellation."""
    dtype = node.attr["T"].type
    erf = graph_def.node.add(op="Erf", name=f"{node.name}/Erf")
    erf.input.append(node.input[0])
    erf.attr["T"].type = dtype
    node.op = "Sub"
    node.input[0] = _constant(graph_def, f"{node.name}/one", 1, dtype)
    node.input.insert(1, erf.name)


def _lower_bias_add(graph_def: Any, node: Any, producers: Mapping[str, Any]) -> None:
    """A bias along another axis than the channels of its convolution is a plain addition.

    Keras' `add` guesses the axis from sizes, and tf2onnx merges the bias into the convolution without
    looking at the axis; the exported file must do what the model does.
    """
    before, bias = producers.get(_source(node.input[0])), producers.get(_source(node.input[1]))
    layout = node.attr["data_format"].s or b"NHWC"
    theirs = before.attr["data_format"].s if before is not None and "data_format" in before.attr else layout
    if (layout[1:2] == b"C") == (theirs[1:2] == b"C"):
        return
    if layout[1:2] == b"C":
        if bias is None or bias.op != "Const":
            raise UnsupportedModelError(f"operation {node.name} adds along the first axis what is not a constant")
        value = tf.make_ndarray(bias.attr["value"].tensor)
        rank = len(theirs)
        shaped = value.reshape(-1, *[1] * (rank - 2))
        node.input[1] = _constant(graph_def, f"{node.name}/bias", shaped, node.attr["T"].type)
    node.op = "AddV2"
    del node.attr["data_format"]


def _source(name: str) -> str:
    return name.removeprefix("^").partition(":")[0]


# TensorFlow operation that tf2onnx lacks or gets wrong -> its exact rewriting into operations that it has
LOWERINGS: dict[str, Callable[[Any, Any, Mapping[str, Any]], None]] = {
    "Erfc": _lower_erfc,
    "BiasAdd": _lower_bias_add,
}


def _lower(graph_def: Any) -> None:
    producers = {node.name: node for node in graph_def.node}
    for node in list(producers.values()):
        if node.op in LOWERINGS:
            LOWERINGS[node.op](graph_def, node, producers)


# ------------------------------------------------------------------------------------------------ convert


class _Transposes(TransposeOptimizer):  # type: ignore[misc]  # tf2onnx has no types
    """tf2onnx's transpose optimizer, with scalar constants kept out of its bias merger."""

    def _add_handler(self, trans: Any, node: Any) -> Any:
        if node.inputs[1].is_const() and not node.inputs[1].get_tensor_value(as_list=False).shape:
            return self._handle_node_having_branches(trans, node)
        return super()._add_handler(trans, node)


def _optimizers() -> dict[str, Any]:
    known = dict(tf2onnx_optimizer._get_optimizers())
    return {name: _Transposes if rule is TransposeOptimizer else rule for name, rule in known.items()}


def _group(graph: Any) -> None:
    """Set ``group`` where tf2onnx does not derive it (3D convolutions) from the input channels of the kernel."""
    for node in graph.get_nodes():
        if node.type == "Conv":
            image, kernel = graph.get_shape(node.input[0]), graph.get_shape(node.input[1])
            if image and kernel and image[1] > 0 and kernel[1] > 0 and image[1] != kernel[1]:
                node.set_attr("group", image[1] // kernel[1])


@contextlib.contextmanager
def _fixed_counter() -> Iterator[None]:
    """Number tf2onnx's names from the same start every time: it sorts by name."""
    before = tf2onnx.utils.INTERNAL_NAME
    tf2onnx.utils.INTERNAL_NAME = COUNTER_START
    try:
        yield
    finally:
        tf2onnx.utils.INTERNAL_NAME = before


def _without_chance(graph: Any) -> None:
    """Make one tf2onnx graph, and the graphs inside of it, list nodes by name where tf2onnx walks a set."""

    def by_name(find: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        return lambda *args, **kwargs: sorted(find(*args, **kwargs), key=lambda node: str(node.name))

    graph.find_output_consumers = by_name(graph.find_output_consumers)
    graph.extract_sub_graph_nodes = by_name(graph.extract_sub_graph_nodes)
    for inner in (inner for inners in graph.contained_graphs.values() for inner in inners.values()):
        _without_chance(inner)


def _convert(frozen: Frozen, opset: int, *, tolerant: bool) -> tuple[Any, dict[str, bytes]]:
    outside = [f"{name}:0" for name in frozen.constants]
    try:
        with tf.Graph().as_default() as graph, tf.device("/cpu:0"), _fixed_counter():
            tf.import_graph_def(frozen.graph_def, name="")
            parsed = tfonnx.process_tf_graph(
                graph,
                continue_on_error=True,  # what failed is read from the log, operation by operation
                opset=opset,
                input_names=[*frozen.inputs, *outside],
                output_names=list(frozen.outputs),
            )
            if not tolerant:  # which works on copies
                _without_chance(parsed)
            optimised = tf2onnx_optimizer.optimize_graph(parsed, catch_errors=tolerant, optimizers=_optimizers())
            _group(optimised)
            proto = optimised.make_model("")
    finally:
        tf_loader.clear_functions()
    for value in proto.graph.input[len(frozen.inputs) :]:
        kind = value.type.tensor_type
        proto.graph.initializer.add(
            name=value.name, data_type=kind.elem_type, dims=[dim.dim_value for dim in kind.shape.dim]
        )
    del proto.graph.input[len(frozen.inputs) :]
    return proto, dict(zip(outside, frozen.constants.values(), strict=True))


def convert(frozen: Frozen, opset: int, records: list[logging.LogRecord]) -> tuple[Any, dict[str, bytes], list[str]]:
    """The ONNX model, the content of constants that are kept outside of it (by name), and notices.

    ``records`` is what `recorded` collects. Raises UnsupportedModelError that names an operation and
    its layer where tf2onnx cannot convert it.
    """
    if opset not in OPSETS:
        raise InputError(f"opset {opset} cannot be written; choose one from {OPSETS[0]} to {OPSETS[-1]}")
    start = len(records)
    try:
        proto, contents = _convert(frozen, opset, tolerant=False)
    except Exception:  # an optimizer failed: convert again and leave that optimizer out
        _raise_failures(frozen, records[start:])
        del records[start:]
        try:
            proto, contents = _convert(frozen, opset, tolerant=True)
        except Exception as error:
            _raise_failures(frozen, records[start:])
            raise UnsupportedModelError(f"tf2onnx cannot convert the model: {first_line(error)}") from error
    _raise_failures(frozen, records[start:])
    _raise_unknown(frozen, proto, records[start:])
    return proto, contents, _notices(records[start:])


def _raise_failures(frozen: Frozen, records: Sequence[logging.LogRecord]) -> None:
    for record in records:
        if str(record.msg).startswith("Failed to convert node"):
            assert isinstance(record.args, tuple)
            reason = record.exc_info[1] if record.exc_info else None
            raise UnsupportedModelError(
                f"operation {frozen.path(str(record.args[0]))} cannot be exported to ONNX"
                f" ({first_line(reason) if reason else 'no reason given'}); replace it, or try another --opset"
            )


def _raise_unknown(frozen: Frozen, proto: Any, records: Sequence[logging.LogRecord]) -> None:
    logged = {
        record.args[0] for record in records if isinstance(record.args, tuple) and "is not supported" in record.msg
    }
    for graph in subgraphs(proto.graph):
        for node in graph.node:
            if not node.domain and (node.name in logged or not onnx.defs.has(node.op_type)):
                path = frozen.path(node.name)
                raise UnsupportedModelError(
                    f"operation {node.op_type} of layer {path.rpartition('/')[0] or path} has no ONNX form"
                    " in tf2onnx; replace that layer, or cut the model before it"
                )


def subgraphs(graph: Any) -> Iterator[Any]:
    """A graph and the graphs inside of its nodes (loop bodies, branches)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.type in _GRAPHS else ():
                yield from subgraphs(inner)


_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)

# Beginnings of tf2onnx's messages that say something about the result -> what they mean
_MEANINGS = {
    "Failed to apply": "an optimizer of tf2onnx failed and was skipped; the file is correct but may be slower",
    "rewriter": "a rewriter of tf2onnx failed and was skipped; the file may be slower",
    "Failed topological_sort": "tf2onnx could not order the graph",
}


def _notices(records: Sequence[logging.LogRecord]) -> list[str]:
    found = []
    for record in records:
        meaning = next((text for start, text in _MEANINGS.items() if str(record.msg).startswith(start)), None)
        if meaning is not None:
            found.append(f"{meaning} ({' '.join(record.getMessage().split())[:120]})")
    return list(dict.fromkeys(found))
