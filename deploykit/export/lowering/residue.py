"""What a translation leaves behind and nobody needs: operations that do nothing, or that another one does already.

    no-ops       Identity; Cast to the same type; Transpose, Reshape, Slice, Pad, Expand, Tile, Concat that change
                 nothing; Squeeze behind an Unsqueeze of the same axes, and the other way round
    sizes        Shape of a tensor whose sizes are known is a constant, and so is integer arithmetic on it; the target
                 of a Reshape is one as soon as at most one size of the result is unknown: that one is written as -1,
                 because the number of elements does not change
    reshapes     Reshape(Reshape(x)) = Reshape(x), since elements keep their order; a Squeeze, Unsqueeze or Flatten in
                 front is a Reshape, too
    twins        two nodes of the same operation, attributes and inputs give the same, unless they draw at random;
                 constants are the same if all their bits are (-0 is not 0)
    dead ends    nodes and constants that no output needs

A no-op that makes an output of the graph becomes an Identity: `export.canonical` decides which name that tensor has.

`onnx_ir.passes.common` has some of these. Removal of unused nodes and of equal constants are taken from there. Its
identity elimination gives two outputs of a graph one name where one is an Identity of the other, and its elimination of
common subexpressions merges draws of Bernoulli, and nodes of which one leaves out an optional output that the other
has; so these two are ours.

Limits: only the main graph; what a loop body or branch computes stays as it is, what it reads from outside may change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import DeduplicateInitializersPass, RemoveUnusedNodesPass

from deploykit.export.lowering.patterns import (
    Array,
    attribute,
    become,
    bypass,
    constant,
    drop,
    is_op,
    new_constant,
    sizes,
)

SMALL_ELEMENTS = 128  # what is folded or compared: sizes and axes, not weights; their content is always in the graph
RANDOM = (
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
    "Dropout",
)


def apply(model: ir.Model) -> int:
    """Remove it; returns at how many places."""
    DeduplicateInitializersPass(SMALL_ELEMENTS)(model)
    count = 0
    for node in list(model.graph):
        if node.graph is not None and node.domain in ("", "ai.onnx"):
            count += _without_effect(node) or any(rule(node) for rule in _SIMPLER)
    count += _merge_twins(model.graph)
    before = len(model.graph)
    RemoveUnusedNodesPass()(model)
    return count + before - len(model.graph)


# ----------------------------------------------------------------------------------------------------- no-ops


def _same_sizes(node: ir.Node) -> bool:
    """Whether a Reshape or Expand with a constant target gives the shape that there is."""
    before, target = sizes(node.inputs[0]), constant(node.inputs[1])
    if before is None or target is None or target.size != len(before):
        return False
    wanted = [int(size) for size in target.ravel()]
    copies = node.op_type == "Reshape" and not attribute(node, "allowzero", 0)
    same = [have == want or (want == 0 and copies) for have, want in zip(before, wanted, strict=True)]
    if node.op_type == "Expand":
        return all(one or want == 1 for one, want in zip(same, wanted, strict=True))
    left = [want for one, want in zip(same, wanted, strict=True) if not one]
    return left in ([], [-1])


def _whole_slice(node: ir.Node) -> bool:
    """Whether a Slice begins at 0, ends at the end or beyond, and leaves nothing out."""
    shape, given = sizes(node.inputs[0]), [*node.inputs[1:], None, None][:4]
    starts, ends, axes, steps = map(constant, given)
    unknown = any(value is not None and constant(value) is None for value in given)
    if shape is None or unknown or starts is None or ends is None:
        return False
    if (starts != 0).any() or (steps is not None and (steps != 1).any()):
        return False
    along = np.arange(starts.size) if axes is None else axes.ravel()
    known = [(shape[int(axis)], int(end)) for axis, end in zip(along, ends.ravel(), strict=True)]
    return all(end >= np.iinfo(np.int32).max or (size is not None and end >= size) for size, end in known)


def _all(node: ir.Node, number: int) -> bool:
    found = constant(node.inputs[1])
    return found is not None and bool((found == number).all())


# operation -> whether a node of it hands on what it reads
_NO_OPS: dict[str, Callable[[ir.Node], bool]] = {
    "Identity": lambda node: True,
    "Cast": lambda node: node.inputs[0] is not None and node.inputs[0].dtype == attribute(node, "to"),
    "Transpose": lambda node: (perm := attribute(node, "perm")) is not None and perm == tuple(range(len(perm))),
    "Reshape": _same_sizes,
    "Expand": _same_sizes,
    "Slice": _whole_slice,
    "Pad": lambda node: _all(node, 0),
    "Tile": lambda node: _all(node, 1),
    "Concat": lambda node: len(node.inputs) == 1,
}
_PAIRS = {"Squeeze": "Unsqueeze", "Unsqueeze": "Squeeze"}


def _undone(node: ir.Node) -> ir.Value | None:
    """What there was before the node in front did the opposite; None where it did not."""
    middle = node.inputs[0]
    before = None if middle is None else middle.producer()
    if before is None or middle is None or len(node.inputs) < 2 or not is_op(before, _PAIRS.get(node.op_type, "")):
        return None
    if len(before.inputs) < 2 or middle.shape is None or before.inputs[0] is None or before.inputs[0].shape is None:
        return None
    rank = max(middle.shape.rank(), before.inputs[0].shape.rank())  # negative axes count in the longer shape
    axes = [constant(one.inputs[1]) for one in (before, node)]
    sets = [None if found is None else {int(axis) % rank for axis in found.ravel()} for found in axes]
    return before.inputs[0] if sets[0] is not None and sets[0] == sets[1] else None


def _without_effect(node: ir.Node) -> bool:
    source = node.inputs[0] if node.op_type in _NO_OPS and _NO_OPS[node.op_type](node) else None
    source = source or _undone(node)
    made = node.outputs[0] if node.outputs else None
    if source is None or made is None:
        return False
    if not made.is_graph_output():
        bypass(made, source)
        return True
    if node.op_type == "Identity":
        return False
    become(node, "Identity", [source])
    return True


# ------------------------------------------------------------------------------------------------------ sizes

_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
_FOLDABLE = ("Add", "Cast", "Concat", "Div", "Gather", "Mul", "ReduceProd", "Reshape", "Slice", "Squeeze", "Sub")


def _replace(node: ir.Node, content: Array) -> bool:
    made = node.outputs[0]
    if made.is_graph_output():
        return False
    bypass(made, new_constant(node, "value", content))
    return True


def _known_shape(node: ir.Node) -> bool:
    """Shape of a tensor without free sizes."""
    shape = sizes(node.inputs[0]) if node.op_type == "Shape" else None
    if shape is None:
        return False
    part = shape[attribute(node, "start", 0) : attribute(node, "end", None)]
    return None not in part and _replace(node, np.array(part, np.int64))


def _known_numbers(node: ir.Node) -> bool:
    """Arithmetic on sizes: integers from constants."""
    if node.op_type not in _FOLDABLE or node.outputs[0].dtype not in _INTEGERS:
        return False
    given = {f"i{place}": constant(value) for place, value in enumerate(node.inputs) if value is not None}
    if not given or any(content is None or content.size > SMALL_ELEMENTS for content in given.values()):
        return False
    proto = ir.to_proto(node)
    proto.input[:] = [f"i{place}" if value is not None else "" for place, value in enumerate(node.inputs)]
    proto.output[:] = ["o"]
    kinds = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(content.dtype), content.shape)
        for name, content in given.items()
        if content is not None
    ]
    result = onnx.helper.make_tensor_value_info("o", int(node.outputs[0].dtype), None)
    graph = onnx.helper.make_graph([proto], "fold", kinds, [result])
    assert isinstance(node.graph, ir.Graph)
    opset = onnx.helper.make_opsetid("", node.graph.opset_imports.get("", 18))
    found: Any = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[opset])).run(None, given)[0]
    return np.size(found) <= SMALL_ELEMENTS and _replace(node, np.asarray(found))


def _known_target(node: ir.Node) -> bool:
    """A Reshape to computed sizes of which at most one is unknown."""
    if node.op_type != "Reshape" or constant(node.inputs[1]) is not None:
        return False
    shape = sizes(node.outputs[0])
    if shape is None or shape.count(None) > 1 or 0 in shape:
        return False
    target = np.array([-1 if size is None else size for size in shape], np.int64)
    become(node, "Reshape", [node.inputs[0], new_constant(node, "shape", target)])
    return True


def _reshape_of_reshape(node: ir.Node) -> bool:
    """A Reshape reads what the Reshape in front of it reads; a 0 in its target would then mean another size."""
    middle = node.inputs[0]
    before = None if node.op_type != "Reshape" or middle is None else middle.producer()
    target = constant(node.inputs[1]) if before is not None else None
    if target is None or not is_op(before, "Reshape", "Squeeze", "Unsqueeze", "Flatten") or 0 in target:
        return False
    assert before is not None
    node.replace_input_with(0, before.inputs[0])
    drop(middle)
    return True


_SIMPLER = (_known_shape, _known_numbers, _known_target, _reshape_of_reshape)


# ------------------------------------------------------------------------------------------------------ twins


def _fingerprint(node: ir.Node) -> tuple[Any, ...] | None:
    """What makes a node compute what it does; None for nodes that are never merged."""
    if node.op_type in RANDOM or any(attr.type in _GRAPHS for attr in node.attributes.values()):
        return None
    settings = tuple(sorted((name, ir.to_proto(attr).SerializeToString()) for name, attr in node.attributes.items()))
    made = tuple(bool(output.name) for output in node.outputs)
    return (
        node.op_identifier(),
        tuple(id(value) if value is not None else None for value in node.inputs),
        settings,
        made,
    )


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _merge_twins(graph: ir.Graph) -> int:
    """Let the first of equal nodes serve all; one that makes an output of the graph stays."""
    first: dict[tuple[Any, ...], ir.Node] = {}
    count = 0
    for node in list(graph):
        key = _fingerprint(node)
        twin = None if key is None else first.setdefault(key, node)
        if twin is None or twin is node or any(output.is_graph_output() for output in node.outputs):
            continue
        for output, same in zip(node.outputs, twin.outputs, strict=True):
            ir.convenience.replace_all_uses_with(output, same)
        graph.remove(node, safe=True)
        count += 1
    return count
