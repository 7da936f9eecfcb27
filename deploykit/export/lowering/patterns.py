"""What lowerings ask of a graph, and how they change it: constants, single readers, nodes that become other nodes.

A node is rewritten *in place*: the last node of a pattern becomes the new operation and keeps its output, whose name
may be an output of the graph; nodes of the pattern that nothing reads any more are removed. So order, names of outputs
and what subgraphs read stay as they are, whatever is rewritten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]

FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


def is_op(node: ir.Node | None, *kinds: str) -> bool:
    """Whether a node is one of these operations of ONNX itself."""
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in kinds


_CONTENTS = ("raw_data", "float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


def constant(value: ir.Value | None) -> Array | None:
    """The content of a constant; None where there is none, or where it is kept outside of the graph.

    onnx_ir reads sizes without content as zeros.
    """
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or isinstance(tensor, ir.ExternalTensor):
        return None
    if isinstance(tensor, ir.TensorProtoTensor) and not any(len(getattr(tensor.raw, part)) for part in _CONTENTS):
        return tensor.numpy() if tensor.size == 0 else None
    return tensor.numpy()


def reader(value: ir.Value) -> ir.Node | None:
    """The node that alone reads a value, once; None where there are others, a subgraph, or an output of the graph."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    producer, node = value.producer(), uses[0].node
    return node if producer is None or node.graph is producer.graph else None


def sizes(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """The shape, None for a size that is not known; None where not even the rank is."""
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute, lists as tuples."""
    found = node.attributes.get(name)
    if found is None:
        return default
    return tuple(found.value) if isinstance(found.value, Sequence) and not isinstance(found.value, str) else found.value


def own_graph(node: ir.Node) -> ir.Graph:
    """The graph that a node is in: the main one, a loop's body or a branch."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return graph


def fresh_name(node: ir.Node, kind: str) -> str:
    """A name for a new node that does a part of this one's work, in the same layer."""
    taken = {other.name for other in own_graph(node)}
    return next(name for i in count() if (name := f"{node.name}_{kind}_{i}") not in taken)


def new_constant(node: ir.Node, place: str, content: Array) -> ir.Value:
    """A constant for one place of a node, in the node's graph, under a name that is free there."""
    graph = own_graph(node)
    wanted = name = f"{node.name}/{place}"
    count = 0
    while name in graph.initializers:
        count += 1
        name = f"{wanted}_{count}"
    tensor = ir.tensor(np.array(content, order="C"), name=name)  # ascontiguousarray makes a scalar a vector
    value = ir.Value(name=name, shape=ir.Shape(content.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def become(
    node: ir.Node,
    kind: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
) -> None:
    """Turn a node into another operation of ONNX with the same first output; what only it read is removed.

    ``name``: that of another node, where this one takes its place.
    """
    before = list(node.inputs)
    node.op_type, node.domain, node.name = kind, "", name or node.name
    node.resize_inputs(len(inputs))
    for place, value in enumerate(inputs):
        node.replace_input_with(place, value)
    new = ir.convenience.convert_attributes(attributes or {})
    node.attributes.clear()
    for attr in new:
        node.attributes.add(attr)
    for value in before:
        drop(value)


def bypass(value: ir.Value, source: ir.Value) -> None:
    """Let everything that reads ``value`` read ``source``; ``value`` is no output of a graph."""
    ir.convenience.replace_all_uses_with(value, source)
    drop(value)


def drop(value: ir.Value | None) -> None:
    """Remove what makes a value that nothing reads, and what only that needed."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if value is None or value.uses() or value.is_graph_output():
            continue
        node = value.producer()
        if node is not None and node.graph is not None:
            if not any(output.uses() or output.is_graph_output() for output in node.outputs):
                waiting += node.inputs
                own_graph(node).remove(node, safe=True)
        elif value.is_initializer() and not value.is_graph_input() and value.graph is not None:
            del value.graph.initializers[str(value.name)]


def graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph and every loop body and branch."""
    yield model.graph
    yield from model.graph.subgraphs()


def rounded(content: npt.NDArray[np.float64], dtype: npt.DTypeLike) -> Array | None:
    """Rounded once; None where a number overflows, or loses digits because it is too small."""
    info = np.finfo(dtype)
    with np.errstate(over="ignore", under="ignore"):
        found = content.astype(dtype)
    small = (np.abs(found) < info.tiny) & (content != 0)
    return None if not np.isfinite(found).all() or small.any() else found
