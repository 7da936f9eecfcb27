"""Transposes that cancel, move no data, or can be had once instead of often.

A *view* is what a chain of Transpose, Squeeze, Unsqueeze, and Reshapes that only insert or remove axes of size 1 does
to a tensor. It is written as one entry per axis of the result: the axis of the source that stands there, or None for a
new axis of size 1; axes of the source that are not listed have size 1. Laws:

- *Composition*: ``(first then second)[i] = first[second[i]]``. A chain is one view. The identity is nothing, a view
  that keeps the order of all axes longer than 1 is a Reshape, any other is one Transpose (and perhaps a Squeeze or an
  Unsqueeze, which cost nothing).
- *Commutation*: ``f(V(x), V(y)) = V(f'(x, y))``. For elementwise f, f' is f with its constants brought to the order of
  the source; for a reduction, Softmax, Concat, Pad or Slice it is f with its axes mapped.

*Regions.* For one view V, the operations that commute with it and read nothing but V(...), constants, and one another
are a region. All of it is computed in the order of the source; V remains where something outside reads a result. That
is done where it costs less: first fewer Transposes, then fewer nodes, counting that V may cancel against the views
that read it. What it removes: the Transposes around squeeze-and-excite and global pooling (a mean over height and
width is one in any order), around the additions and activations between 1D convolutions, and before Reshapes.

A reduction that drops its axes is one that keeps them and a Squeeze, so it is taken apart before and put together
after. Means stay ReduceMean: ONNX Runtime's GlobalAveragePool adds one after the other, and its error was up to
9 times larger (112x112) at the same speed, since the product that follows wants plain layout anyway.

Limits: a region is all or nothing; costs count Transposes, not their bytes; Split, Resize and operations with several
outputs are no part of a region; a Reshape is a view only if at most one size is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from deploykit.export.lowering.patterns import (
    Array,
    attribute,
    become,
    bypass,
    constant,
    drop,
    fresh_name,
    graphs,
    is_op,
    new_constant,
    own_graph,
    reader,
    sizes,
)

View = tuple[int | None, ...]
Sizes = tuple[int | None, ...]
Cost = tuple[int, int]  # Transposes, nodes

# ------------------------------------------------------------------------------------------------------- views


def compose(first: View, second: View) -> View:
    """The view that shows ``second`` of what ``first`` shows."""
    return tuple(None if axis is None else first[axis] for axis in second)


def _axes(node: ir.Node, rank: int) -> tuple[int, ...] | None:
    """The axes a node works on, in its second input (as of opset 13 or 18) or its attribute; None if not known."""
    given = attribute(node, "axes")
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        found = constant(node.inputs[1])
        given = None if found is None else tuple(found.ravel().tolist())
    return None if given is None else tuple(int(axis) % rank for axis in given)


def _transposed(node: ir.Node, rank: int) -> View:
    perm: View = attribute(node, "perm", tuple(range(rank))[::-1])
    return perm


def _squeezed(node: ir.Node, rank: int) -> View | None:
    axes = _axes(node, rank)
    return None if axes is None else tuple(axis for axis in range(rank) if axis not in axes)


def _unsqueezed(node: ir.Node, rank: int) -> View | None:
    given = constant(node.inputs[1])
    if given is None:
        return None
    axes = _axes(node, rank + given.size)
    rest = iter(range(rank))
    return None if axes is None else tuple(None if i in axes else next(rest) for i in range(rank + len(axes)))


def _reshaped(node: ir.Node, _rank: int) -> View | None:
    """Only unit axes come and go. One unknown size on both sides is the same size, since the products are equal."""
    before, after = sizes(node.inputs[0]), sizes(node.outputs[0])
    if before is None or after is None:
        return None
    kept = [axis for axis, size in enumerate(before) if size != 1]
    shown = [size for size in after if size != 1]
    if [before[axis] for axis in kept] != shown or shown.count(None) > 1 or 0 in shown:
        return None
    rest = iter(kept)
    return _closest(before, tuple(None if size == 1 else next(rest) for size in after))


_VIEWS: dict[str, Callable[[ir.Node, int], View | None]] = {
    "Transpose": _transposed,
    "Squeeze": _squeezed,
    "Unsqueeze": _unsqueezed,
    "Reshape": _reshaped,
}


def _closest(source: Sizes, view: View) -> View:
    """The same view with new axes taken from unit axes of the source where that keeps them in place."""
    listed = set(view)
    return tuple(
        i if axis is None and i < len(source) and source[i] == 1 and i not in listed else axis
        for i, axis in enumerate(view)
    )


def view_of(node: ir.Node | None) -> View | None:
    """The view that a node is; None for any other node."""
    if node is None or not is_op(node, *_VIEWS):
        return None
    source = sizes(node.inputs[0])
    return None if source is None else _VIEWS[node.op_type](node, len(source))


def _stays(view: View, source: Sizes) -> bool:
    """Whether the axes longer than 1 keep their order, so that no number moves."""
    order = [axis for axis in view if axis is not None and source[axis] != 1]
    return order == sorted(order)


def _steps(view: View, source: Sizes) -> list[tuple[str, tuple[int, ...]]]:
    """The nodes that make a view: operation, and its shape, axes or permutation."""
    view = _closest(source, view)
    if view == tuple(range(len(source))):
        return []
    if _stays(view, source):
        shape = [1 if axis is None else source[axis] or (0 if axis == i else None) for i, axis in enumerate(view)]
        known = tuple(size for size in shape if size is not None)
        if len(known) == len(shape):  # 0 stands for the size that the source has at that place
            return [("Reshape", known)]
    spare = iter(axis for axis in range(len(source)) if axis not in view)
    filled: View = tuple(next(spare, None) if axis is None else axis for axis in view)  # unit axes serve as new ones
    dropped = tuple(spare)
    kept = [axis for axis in range(len(source)) if axis not in dropped]
    perm = tuple(kept.index(axis) for axis in filled if axis is not None)
    new = tuple(i for i, axis in enumerate(filled) if axis is None)
    steps = [("Squeeze", dropped), ("Transpose", perm if perm != tuple(sorted(perm)) else ()), ("Unsqueeze", new)]
    return [step for step in steps if step[1]]


def _cost(view: View, source: Sizes) -> Cost:
    steps = _steps(view, source)
    return sum(kind == "Transpose" for kind, _ in steps), len(steps)


def _node_cost(node: ir.Node) -> Cost:
    return int(node.op_type == "Transpose"), 1


def _sum(costs: Iterable[Cost]) -> Cost:
    listed = list(costs)
    return sum(cost[0] for cost in listed), sum(cost[1] for cost in listed)


def _typed(value: ir.Value, shape: Sequence[Any], like: ir.Value) -> ir.Value:
    value.shape, value.type = ir.Shape(list(shape)), like.type
    return value


def _known(value: ir.Value) -> Sizes:
    found = sizes(value)
    assert found is not None  # a view is one only of a source whose shape is known
    return found


def _show(node: ir.Node, view: View, source: ir.Value) -> None:
    """Let ``node`` become this view of ``source``; its output keeps its name."""
    *before, (last, numbers) = _steps(view, _known(source)) or [("Identity", ())]
    for kind, axes in before:
        step = ir.Node("", kind, [source], num_outputs=1, name=fresh_name(node, kind))
        own_graph(node).insert_before(node, step)
        _set(step, kind, axes, source)
        shown = view_of(step)
        dims = source.shape
        assert shown is not None
        assert dims is not None
        source = _typed(step.outputs[0], [1 if axis is None else dims[axis] for axis in shown], source)
    _set(node, last, numbers, source)


def _set(node: ir.Node, kind: str, numbers: tuple[int, ...], source: ir.Value) -> None:
    if kind in ("Transpose", "Identity"):
        become(node, kind, [source], {"perm": list(numbers)} if numbers else {})
    else:
        place = "shape" if kind == "Reshape" else "axes"
        become(node, kind, [source, new_constant(node, place, np.array(numbers, np.int64))])


# ------------------------------------------------------------------------------------------------------ chains


def _chain(value: ir.Value, graph: ir.Graph) -> list[ir.Node]:
    """The views that lead to a value, the last one first."""
    nodes: list[ir.Node] = []
    node = value.producer()
    while node is not None and node.graph is graph and view_of(node) is not None:
        nodes.append(node)
        source = node.inputs[0]
        assert source is not None
        node = source.producer()
    return nodes


def _composed(nodes: Sequence[ir.Node]) -> tuple[View, ir.Value]:
    """What a chain (the last node first) does, and to which value."""
    source = nodes[-1].inputs[0]
    assert source is not None
    view: View = tuple(range(len(_known(source))))
    for node in reversed(nodes):
        shown = view_of(node)
        assert shown is not None
        view = compose(view, shown)
    return view, source


def _gone(nodes: Sequence[ir.Node], readers: Container[ir.Node]) -> list[ir.Node]:
    """Which nodes of a chain (the last one first) nothing needs once ``readers`` do not read it any more."""
    gone: list[ir.Node] = []
    for node in nodes:
        made = node.outputs[0]
        if made.is_graph_output() or any(use.node not in readers and use.node not in gone for use in made.uses()):
            break
        gone.append(node)
    return gone


def _merge(graph: ir.Graph) -> int:
    """Replace chains by the view that they are, where that costs less."""
    merged = 0
    for node in list(graph):
        if node.graph is not graph or view_of(node) is None:
            continue
        whole = _chain(node.outputs[0], graph)
        for length in range(len(whole), 0, -1):
            view, source = _composed(whole[:length])
            gone = _gone(whole[1:length], (node,))
            if _cost(view, _known(source)) < _sum(map(_node_cost, [node, *gone])):
                if _steps(view, _known(source)) or node.outputs[0].is_graph_output():
                    _show(node, view, source)
                else:
                    bypass(node.outputs[0], source)
                merged += 1
                break
    return merged


# --------------------------------------------------------------------------------------------------- operations


@dataclass(frozen=True)
class _Inner:
    """What changes in an operation that works in the order of the source: constants by place, and attributes."""

    constants: dict[int, Array] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)


def _to_source(content: Array, view: View, rank: int) -> Array | None:
    """A constant as it broadcasts against the source instead of the view; None where it has no place there."""
    if content.ndim > len(view):
        return None
    if content.size == 1:
        return content.reshape(1)
    shown = content.reshape((1,) * (len(view) - content.ndim) + content.shape)
    if any(axis is None and size != 1 for axis, size in zip(view, shown.shape, strict=True)):
        return None
    listed = [i for i, axis in enumerate(view) if axis is not None]
    listed.sort(key=lambda i: view[i] or 0)
    shape = [1] * rank
    for i in listed:
        shape[view[i] or 0] = shown.shape[i]
    return shown.transpose(*listed, *(i for i in range(len(view)) if i not in listed)).reshape(shape)


def _broadcast(node: ir.Node, view: View, rank: int) -> _Inner | None:
    constants = {}
    for place, value in enumerate(node.inputs):
        content = constant(value)
        if content is not None:
            moved = _to_source(content, view, rank)
            if moved is None:
                return None
            constants[place] = moved
    return _Inner(constants)


def _first_alone(node: ir.Node, _view: View, _rank: int) -> _Inner | None:
    """Elementwise in the first input; the others are constant parameters."""
    return _Inner() if all(value is None or constant(value) is not None for value in node.inputs[1:]) else None


def _along_axis(node: ir.Node, view: View, _rank: int) -> _Inner | None:
    axis = view[attribute(node, "axis", -1)]
    if axis is None or any(constant(value) is not None for value in node.inputs):
        return None
    return _Inner(attributes={"axis": axis})


def _mapped(axes: Sequence[int], view: View) -> list[int] | None:
    found = [view[axis] for axis in axes]
    return [axis for axis in found if axis is not None] if None not in found else None


def _reduced(node: ir.Node, view: View, _rank: int) -> _Inner | None:
    axes = _axes(node, len(view))
    found = _mapped(axes, view) if axes and attribute(node, "keepdims", 1) else None
    if found is None:
        return None
    return _Inner({1: np.array(found, np.int64)}) if len(node.inputs) > 1 else _Inner(attributes={"axes": found})


def _padded(node: ir.Node, view: View, rank: int) -> _Inner | None:
    pads = constant(node.inputs[1])
    if pads is None or len(node.inputs) > 3 or _first_alone(node, view, rank) is None:
        return None
    found = np.zeros((2, rank), pads.dtype)
    for i, axis in enumerate(view):
        given = pads.reshape(2, -1)[:, i]
        if axis is not None:
            found[:, axis] = given
        elif given.any():
            return None
    return _Inner({1: found.ravel()})


def _sliced(node: ir.Node, view: View, rank: int) -> _Inner | None:
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    found = _mapped(axes.tolist(), view) if axes is not None and _first_alone(node, view, rank) else None
    return None if found is None else _Inner({3: np.array(found, np.int64)})


_FIRST_ALONE = [
    "Relu",
    "Sigmoid",
    "Tanh",
    "Clip",
    "Erf",
    "Exp",
    "Log",
    "Sqrt",
    "Neg",
    "Abs",
    "HardSigmoid",
    "HardSwish",
    "LeakyRelu",
    "Elu",
    "Selu",
    "Celu",
    "ThresholdedRelu",
    "Softplus",
    "Softsign",
    "Mish",
    "Reciprocal",
    "Floor",
    "Ceil",
    "Round",
    "Sign",
    "Sin",
    "Cos",
    "Not",
    "Cast",
    "IsNaN",
    "IsInf",
]
_BROADCAST = [
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Min",
    "Max",
    "Sum",
    "Mean",
    "PRelu",
    "Where",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "And",
    "Or",
    "Xor",
]
_REDUCTIONS = [f"Reduce{kind}" for kind in ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "LogSumExp", "SumSquare")]
# Operation that commutes with every view -> what it is in the order of the source, or None where it is not
_COMMUTE: dict[str, Callable[[ir.Node, View, int], _Inner | None]] = {
    **dict.fromkeys(_FIRST_ALONE, _first_alone),
    **dict.fromkeys(_BROADCAST, _broadcast),
    **dict.fromkeys(_REDUCTIONS, _reduced),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Concat"), _along_axis),
    "Pad": _padded,
    "Slice": _sliced,
}

# ----------------------------------------------------------------------------------------------------- regions


def _beginnings(value: ir.Value, graph: ir.Graph) -> Iterator[tuple[View, ir.Value, list[ir.Node]]]:
    """Every way to see a value as a view: the view, of what, and by which nodes (the last one first)."""
    nodes = _chain(value, graph)
    for length in range(len(nodes), 0, -1):
        yield *_composed(nodes[:length]), nodes[:length]


@dataclass
class _Region:
    """Operations that can be computed in the order of the sources of one view; ``inner`` says what each becomes."""

    graph: ir.Graph
    view: View
    rank: int
    inner: dict[ir.Node, _Inner] = field(default_factory=dict)

    def shown(self, value: ir.Value) -> tuple[ir.Value, list[ir.Node]] | None:
        """The source that a value is this view of, and the nodes that make it that."""
        for view, source, nodes in _beginnings(value, self.graph):
            if (view, len(_known(source))) == (self.view, self.rank):
                return source, nodes
        return None

    def entries(self) -> dict[ir.Value, tuple[ir.Value, list[ir.Node]]]:
        """What comes in from outside: the values, their sources, and the nodes between."""
        values = dict.fromkeys(value for node in self.inner for value in self.data(node))
        found = {value: self.shown(value) for value in values if value.producer() not in self.inner}
        return {value: entry for value, entry in found.items() if entry is not None}

    def takes(self, node: ir.Node) -> _Inner | None:
        """What the node becomes if it belongs here, given the members so far."""
        rule = _COMMUTE.get(node.op_type) if is_op(node, node.op_type) and len(node.outputs) == 1 else None
        data = self.data(node)
        if rule is None or not data or sizes(node.outputs[0]) is None:
            return None
        fits = all(value.producer() in self.inner or self.shown(value) is not None for value in data)
        return rule(node, self.view, self.rank) if fits else None

    def data(self, node: ir.Node) -> list[ir.Value]:
        return [value for value in node.inputs if value is not None and constant(value) is None]

    def parts(self) -> list[_Region]:
        """The connected parts, each to be decided for itself."""
        part: dict[Any, _Region] = {}
        for node, inner in self.inner.items():
            values = [*self.data(node), node.outputs[0]]
            joined = {id(part[value]): part[value] for value in values if value in part}
            new = _Region(self.graph, self.view, self.rank)
            for old in joined.values():
                new.inner |= old.inner
            new.inner[node] = inner
            for member in new.inner:
                part |= dict.fromkeys([*self.data(member), member.outputs[0]], new)
        return list({id(region): region for region in part.values()}.values())

    def source_sizes(self, value: ir.Value) -> list[Any]:
        """The sizes of a value of the region in the order of the source."""
        found: list[Any] = [1] * self.rank
        assert value.shape is not None
        for axis, size in zip(self.view, value.shape, strict=True):
            if axis is not None:
                found[axis] = size
        return found

    def boundary(self) -> dict[ir.Node, list[ir.Node]]:
        """The members that something outside reads, and who does."""
        found = {}
        for node in self.inner:
            outside = [use.node for use in node.outputs[0].uses() if use.node not in self.inner]
            if outside or node.outputs[0].is_graph_output():
                found[node] = outside
        return found

    def pays(self) -> bool:
        """Whether the views that go cost more than those that come."""
        gone: dict[ir.Node, None] = {}
        for _, nodes in self.entries().values():
            gone |= dict.fromkeys(_gone(nodes, self.inner))
        before, after = [_node_cost(node) for node in gone], []
        for node, readers in self.boundary().items():
            made = node.outputs[0]
            source = tuple(size if isinstance(size, int) else None for size in self.source_sizes(made))
            views = [after_ for after_ in readers if view_of(after_) is not None and after_.graph is self.graph]
            if len(views) < len(readers) or made.is_graph_output():
                after.append(_cost(self.view, source))
            for first in views:
                nodes = _onward(first)
                before += map(_node_cost, nodes)
                after.append(_cost(compose(self.view, _composed(nodes[::-1])[0]), source))
        return _sum(after) < _sum(before)

    def rewrite(self) -> None:
        """Compute the region in the order of the sources."""
        new = {value: source for value, (source, _) in self.entries().items()}
        boundary = self.boundary()
        for node, inner in self.inner.items():
            step = ir.Node("", node.op_type, [], num_outputs=1, name=fresh_name(node, node.op_type))
            self.graph.insert_before(node, step)
            inputs = [None if value is None else new.get(value, value) for value in node.inputs]
            for place, content in inner.constants.items():
                inputs[place] = new_constant(node, f"input_{place}", content)
            attributes = {name: attr.value for name, attr in node.attributes.items()} | inner.attributes
            become(step, node.op_type, inputs, attributes)
            made = node.outputs[0]
            new[made] = _typed(step.outputs[0], self.source_sizes(made), made)
        for node in reversed(list(self.inner)):
            if node in boundary:
                _show(node, self.view, new[node.outputs[0]])
            else:
                drop(node.outputs[0])


def _onward(node: ir.Node) -> list[ir.Node]:
    """A view and the views that alone read it and one another."""
    nodes = [node]
    while (after := reader(nodes[-1].outputs[0])) is not None and view_of(after) is not None:
        nodes.append(after)
    return nodes


def _sink(graph: ir.Graph) -> bool:
    """Compute one region in the order of its sources, if there is one that pays."""
    read = dict.fromkeys(
        value for node in graph if node.op_type in _COMMUTE for value in node.inputs if value is not None
    )
    found = ((view, len(_known(source))) for value in read for view, source, _ in _beginnings(value, graph))
    found = (kind for kind in found if kind[1])  # beside a source of rank 0 a constant would need rank 0, too
    for view, rank in dict.fromkeys(found):
        region = _Region(graph, view, rank)
        for node in graph:
            if (inner := region.takes(node)) is not None:
                region.inner[node] = inner
        for part in region.parts():
            if part.pays():
                part.rewrite()
                return True
    return False


# ------------------------------------------------------------------------------------------------- reductions


def _take_apart(graph: ir.Graph) -> None:
    """A reduction that drops its axes is one that keeps them, and a Squeeze."""
    for node in list(graph):
        value = node.inputs[0] if node.inputs else None
        known = sizes(value)
        if not is_op(node, *_REDUCTIONS) or attribute(node, "keepdims", 1) or value is None or known is None:
            continue
        axes = _axes(node, len(known))
        if not axes or value.shape is None:
            continue
        step = ir.Node("", node.op_type, [], num_outputs=1, name=fresh_name(node, node.op_type))
        graph.insert_before(node, step)
        become(step, node.op_type, node.inputs, {name: attr.value for name, attr in node.attributes.items()})
        step.attributes.add(ir.AttrInt64("keepdims", 1))
        shape = [1 if axis in axes else size for axis, size in enumerate(value.shape)]
        kept = _typed(step.outputs[0], shape, node.outputs[0])
        become(node, "Squeeze", [kept, new_constant(node, "axes", np.array(axes, np.int64))])


def _put_together(graph: ir.Graph) -> None:
    """A reduction whose kept axes (and others of size 1) are dropped by what alone reads it drops them itself."""
    for node in list(graph):
        view = view_of(node)
        before = node.inputs[0].producer() if view is not None and node.inputs[0] is not None else None
        if before is None or not is_op(before, *_REDUCTIONS) or reader(before.outputs[0]) is not node:
            continue
        rank = len(_known(before.outputs[0]))
        dropped = tuple(axis for axis in range(rank) if view is not None and axis not in view)
        axes = _axes(before, rank)
        if axes and set(axes) <= set(dropped) and view == tuple(axis for axis in range(rank) if axis not in dropped):
            attributes = {name: attr.value for name, attr in before.attributes.items()} | {"keepdims": 0}
            inputs = list(before.inputs)
            if len(inputs) > 1:
                inputs[1] = new_constant(node, "axes", np.array(dropped, np.int64))
            else:
                attributes["axes"] = list(dropped)
            become(node, before.op_type, inputs, attributes, name=before.name)


def apply(model: ir.Model) -> int:
    """Remove what Transposes and Reshapes can be removed; returns the number of chains and regions rewritten."""
    done = 0
    for graph in graphs(model):
        graph.sort()
        _take_apart(graph)
        done += _merge(graph)
        while _sink(graph):
            done += 1 + _merge(graph)
        _put_together(graph)
    return done
