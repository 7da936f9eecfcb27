"""Per-channel arithmetic with constants, ``y = s x + t``: folded into a neighbour, or one BatchNormalization.

A chain of Mul, Add, Sub and Div by constants that vary along one axis at most composes to one `Affine`. With the
operations that multiply by constant weights it commutes in two ways:

    after      s (W x + b) + t = (s W) x + (s b + t)        Conv, ConvTranspose, Gemm; MatMul, with the t kept behind
    before     W (s x + t) + b = (W s) x + (W t + b)        Conv, Gemm; where t is not 0, no padding may see it

In front of the Transpose of an image its channels are the innermost axis, and a kernel that broadcasts three numbers
over it makes a step for every pixel. ``T(s x + t) = s T(x) + t`` with s and t along the axis where T puts them: the
arithmetic goes behind a Transpose that takes its axis away from the innermost place.

What stays becomes ``BatchNormalization(x; s, t, mean=0, variance=1, epsilon=0)`` where it shifts along axis 1. That is
the operation that every runtime knows in this place. ONNX Runtime turns it into a depthwise 1x1 Conv of its blocked
layout exactly where its input already is in that layout, and the ReLU behind it into a part of that Conv; an Add of
constants would leave the layout and enter it again. Elsewhere its kernel passes over the tensor once, not twice. Such a
Conv written into the file is as fast inside of the blocked layout, and slower than Mul and Add outside of it; which
tensors are inside, only the runtime knows.

Guards. Folding *after*: the producer's result has no other reader and is no output. Folding *before*: the affine's
result has no other. Weights that another node reads too stay (a copy would make the file larger). A shift above
``SHIFT_LIMIT`` that a scale follows is not multiplied out: ``(x - m) / d`` is exact where x is near m, ``x/d - m/d``
cancels, and loses log2 |m/d| bits. A product that overflows or gets denormal is not taken.

Limits: float32 and float64. A Mul that finds no neighbour stays (ONNX Runtime itself makes a blocked Conv of it), and
so does an Add of other ranks than an image's. Only the main graph, not loop bodies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deploykit.affine import Affine
from deploykit.export.lowering.patterns import (
    FLOATS,
    Array,
    attribute,
    become,
    bypass,
    constant,
    drop,
    is_op,
    new_constant,
    reader,
    rounded,
    sizes,
)

IMAGE_RANK = 4  # of the tensors that ONNX Runtime's blocked layout knows
SHIFT_LIMIT = 16.0  # multiplying out a larger shift would lose more than 4 bits of a result near 1

Vector = npt.NDArray[np.float64]

# operation -> scale and shift from the constant, by the place of the data: data first, constant first
_ARITHMETIC: dict[str, tuple[Callable[[Vector], tuple[Vector, Vector]] | None, ...]] = {
    "Mul": (lambda c: (c, 0 * c), lambda c: (c, 0 * c)),
    "Add": (lambda c: (0 * c + 1, c), lambda c: (0 * c + 1, c)),
    "Sub": (lambda c: (0 * c + 1, -c), lambda c: (0 * c - 1, c)),
    "Div": (lambda c: (1 / c, 0 * c), None),
}


@dataclass(frozen=True)
class _Step:
    """One node of a chain: what it reads, and its affine along ``axis`` (None: the same everywhere)."""

    node: ir.Node
    data: ir.Value
    affine: Affine
    axis: int | None


@dataclass(frozen=True)
class _Chain:
    """Steps that are only read by one another, and what they do together."""

    steps: tuple[_Step, ...]
    affine: Affine
    axis: int | None

    @property
    def source(self) -> ir.Value:
        return self.steps[0].data

    @property
    def last(self) -> ir.Node:
        return self.steps[-1].node

    @property
    def result(self) -> ir.Value:
        return self.last.outputs[0]

    def along(self, axis: int, channels: int) -> Affine | None:
        """The affine for an axis of so many channels, None where it runs along another one."""
        if self.axis is None:
            return self.affine.of_size(channels)
        return self.affine if self.axis == axis and self.affine.channels == channels else None


def apply(model: ir.Model) -> int:
    """Move, fold or merge every chain; returns how many were rewritten."""
    count = sum(_move_behind(node) for node in list(model.graph) if is_op(node, "Transpose"))
    for node in list(model.graph):
        if node.graph is not None and (chain := _chain(node)) is not None:
            count += any(rewriting(chain) for rewriting in (_fold_after, _fold_before, _merge))
    return count


# ---------------------------------------------------------------------------------------------------- reading


def _step(node: ir.Node | None) -> _Step | None:
    """A node as an affine of one of its inputs."""
    if node is None or not is_op(node, *_ARITHMETIC) or node.outputs[0].dtype not in FLOATS:
        return None
    for place, law in enumerate(_ARITHMETIC[node.op_type]):
        data, content = node.inputs[place], constant(node.inputs[1 - place])
        shape = sizes(data)
        if law is None or data is None or shape is None or content is None or constant(data) is not None:
            continue
        axes = [axis - content.ndim for axis, size in enumerate(content.shape) if size != 1]
        if content.ndim > len(shape) or len(axes) > 1 or any(shape[axis] != content.shape[axis] for axis in axes):
            continue
        with np.errstate(all="ignore"):
            affine = Affine(*law(content.astype(np.float64).ravel()))
        if affine.channels:
            return _Step(node, data, affine, axes[0] + len(shape) if axes else None)
    return None


def _then(first: _Chain, step: _Step) -> _Chain | None:
    """A chain and one more step; None where they cannot be one affine, or should not."""
    if None not in (first.axis, step.axis) and first.axis != step.axis:
        return None
    a, b = first.affine, step.affine
    channels = max(a.channels, b.channels)
    a, b = (one if one.channels == channels else one.of_size(channels) for one in (a, b))
    if (b.scale != 1).any() and np.abs(a.shift * b.scale).max() > SHIFT_LIMIT:
        return None
    axis = step.axis if first.axis is None else first.axis
    return _Chain((*first.steps, step), a.then(b), axis)


def _chain(node: ir.Node) -> _Chain | None:
    """The longest chain that begins with a node."""
    step = _step(node)
    if step is None:
        return None
    chain = _Chain((step,), step.affine, step.axis)
    while (following := _step(reader(chain.result))) is not None and following.data is chain.result:
        longer = _then(chain, following)
        if longer is None:
            break
        chain = longer
    return chain


# ----------------------------------------------------------------------------------------------------- moving


def _move_behind(transpose: ir.Node) -> bool:
    """Let a Transpose come before the arithmetic on the innermost axis that it reads, step by step."""
    moved = False
    while (made := transpose.inputs[0]) is not None and reader(made) is transpose:
        step = _step(made.producer())
        rank = len(made.shape or ())
        perm = attribute(transpose, "perm", tuple(range(rank))[::-1])
        if step is None or step.axis not in (None, rank - 1) or perm[-1] == rank - 1:
            break
        transpose, moved = _exchange(step, transpose, perm), True
    return moved


def _exchange(step: _Step, transpose: ir.Node, perm: tuple[int, ...]) -> ir.Node:
    """Exchange what two nodes do and how they are called; returns the node that transposes now."""
    first, data = step.node, step.data
    assert data.shape is not None  # or there were no step
    kind, name, place = first.op_type, first.name, list(first.inputs).index(data)
    content = constant(first.inputs[1 - place])
    assert content is not None
    turned = content.reshape((1,) * (len(perm) - content.ndim) + content.shape).transpose(perm)
    become(first, "Transpose", [data], {"perm": list(perm)}, name=transpose.name)
    first.outputs[0].shape = ir.Shape([data.shape[axis] for axis in perm])
    inputs = [first.outputs[0], new_constant(transpose, "B", turned)]
    become(transpose, kind, inputs if place == 0 else inputs[::-1], name=name)
    return first


# ---------------------------------------------------------------------------------------------------- folding


@dataclass(frozen=True)
class _Kernel:
    """How an operation keeps its weights: the number of output channels, and what shapes a vector of one number for
    each output or input channel so that it multiplies the weights. ``axis`` is that of the channels in the data."""

    outputs: Callable[[ir.Node, Array], int]
    along_outputs: Callable[[ir.Node, Array, Vector], Vector]
    along_inputs: Callable[[ir.Node, Array, Vector], Vector] | None
    axis: int = 1


def _by_group(node: ir.Node, weights: Array, vector: Vector) -> Vector:
    """For the second axis of a kernel, which has the channels of one group: a row of the first axis has its group's.

    The second axis is Conv's input channels, and ConvTranspose's output channels.
    """
    groups = attribute(node, "group", 1)
    rows = np.repeat(vector.reshape(groups, -1), weights.shape[0] // groups, axis=0)
    return rows.reshape(*rows.shape, *[1] * (weights.ndim - 2))


def _gemm_side(side: int) -> Callable[[ir.Node, Array, Vector], Vector]:
    def shaped(node: ir.Node, weights: Array, vector: Vector) -> Vector:
        first = (attribute(node, "transB", 0) == 1) == (side == 1)
        return vector[:, None] if first else vector[None, :]

    return shaped


_KERNELS = {
    "Conv": _Kernel(
        lambda node, w: int(w.shape[0]),
        lambda node, w, v: v.reshape(-1, *[1] * (w.ndim - 1)),
        _by_group,
    ),
    "ConvTranspose": _Kernel(
        lambda node, w: int(w.shape[1]) * int(attribute(node, "group", 1)),
        _by_group,
        None,  # how many kernel elements meet at an output differs between its positions
    ),
    "Gemm": _Kernel(
        lambda node, w: int(w.shape[0 if attribute(node, "transB", 0) else 1]),
        _gemm_side(1),
        _gemm_side(0),
    ),
    "MatMul": _Kernel(
        lambda node, w: int(w.shape[-1]),
        lambda node, w, v: v,
        lambda node, w, v: v[:, None],
        axis=-1,
    ),
}


def _kernel(node: ir.Node | None) -> tuple[_Kernel, Array] | None:
    """How a node keeps its weights, and the weights, if they are constant and its own."""
    if node is None or not is_op(node, *_KERNELS):
        return None
    weights = constant(node.inputs[1])
    if weights is None or reader(node.inputs[1]) is not node:  # type: ignore[arg-type]  # a constant is a value
        return None
    if (node.op_type == "MatMul" and weights.ndim != 2) or attribute(node, "transA", 0):
        return None
    return _KERNELS[node.op_type], weights


def _bias(node: ir.Node, weights: Array, channels: int) -> Vector | None:
    """The bias of each output channel, without a factor; None where it is not constant, or not per channel."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return np.zeros(channels)
    found = constant(value)
    if found is None or found.size != (found.shape[-1] if found.ndim else 1):
        return None
    return np.broadcast_to(found.ravel().astype(np.float64) * attribute(node, "beta", 1.0), channels)


def _set_weights(node: ir.Node, weights: Array, bias: Array | None) -> None:
    """Give a node new weights, and a bias if there is one; a Gemm's factor of the bias is in it already."""
    before = [node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None]
    node.replace_input_with(1, new_constant(node, "W", weights))
    if bias is not None:
        node.resize_inputs(3)
        node.replace_input_with(2, new_constant(node, "B", bias))
        node.attributes.pop("beta", None)
    for value in before:
        drop(value)


def _fold_after(chain: _Chain) -> bool:
    """Into the operation in front of the chain."""
    node = chain.source.producer()
    found = _kernel(node)
    shape = sizes(chain.source)
    if node is None or found is None or shape is None or reader(chain.source) is not chain.steps[0].node:
        return False
    kernel, weights = found
    channels = kernel.outputs(node, weights)
    affine = chain.along(kernel.axis % len(shape), channels)
    if affine is None:
        return False
    keeps_shift = node.op_type == "MatMul"
    if keeps_shift and (affine.scale == 1).all() and len(chain.steps) == 1:
        return False  # the Add that is there already
    new = rounded(weights.astype(np.float64) * kernel.along_outputs(node, weights, affine.scale), weights.dtype)
    bias = _bias(node, weights, channels)
    if new is None or bias is None:
        return False
    shift = rounded(affine.shift if keeps_shift else affine.scale * bias + affine.shift, weights.dtype)
    if shift is None:
        return False
    if keeps_shift:
        if affine.is_scaling and chain.result.is_graph_output():
            return False
        _set_weights(node, new, None)
        if affine.is_scaling:
            bypass(chain.result, chain.source)
        else:
            become(chain.last, "Add", [chain.source, new_constant(chain.last, "B", shift)])
    else:
        _set_weights(node, new, shift if shift.any() or len(node.inputs) > 2 else None)
        become(chain.last, node.op_type, list(node.inputs), node.attributes, name=node.name)
    return True


def _fold_before(chain: _Chain) -> bool:
    """Into the operation behind the chain."""
    node = reader(chain.result)
    found = _kernel(node)
    shape = sizes(chain.source)
    if node is None or found is None or shape is None or node.inputs[0] is not chain.result:
        return False
    kernel, weights = found
    axis = kernel.axis % len(shape)
    channels = shape[axis]
    affine = chain.along(axis, channels) if channels else None
    if kernel.along_inputs is None or affine is None:
        return False
    wide = weights.astype(np.float64)
    new = rounded(wide * kernel.along_inputs(node, weights, affine.scale), weights.dtype)
    if new is None:
        return False
    if affine.is_scaling:
        _set_weights(node, new, None)
    else:
        bias = _bias(node, weights, kernel.outputs(node, weights))
        if bias is None or not _admits_shift(node, affine):
            return False
        moved = wide * kernel.along_inputs(node, weights, affine.shift)
        outputs_axis = 0 if node.op_type == "Conv" or attribute(node, "transB", 0) else 1
        total = moved.sum(axis=tuple(axis for axis in range(moved.ndim) if axis != outputs_axis))
        whole = rounded(bias + attribute(node, "alpha", 1.0) * total, weights.dtype)
        if whole is None:
            return False
        _set_weights(node, new, whole)
    node.replace_input_with(0, chain.source)
    drop(chain.result)
    return True


def _admits_shift(node: ir.Node, affine: Affine) -> bool:
    """Whether every output element sees the whole shift, and it is small enough."""
    padded = any(attribute(node, "pads", ())) or attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return node.op_type != "MatMul" and not padded and affine.largest_shift <= SHIFT_LIMIT


# ---------------------------------------------------------------------------------------------------- merging


def _merge(chain: _Chain) -> bool:
    """Into one node: Mul, Add or BatchNormalization; into Mul and Add where the axis allows no more."""
    affine, node, shape = chain.affine, chain.last, sizes(chain.source)
    content = constant(next(value for value in node.inputs if constant(value) is not None))
    assert shape is not None  # or there were no chain
    assert content is not None
    scale, shift = rounded(affine.scale, content.dtype), rounded(affine.shift, content.dtype)
    if scale is None or shift is None:
        return False
    shifts_only = bool((affine.scale == 1).all())
    several = len(chain.steps) > 1
    along = [1] * len(shape)
    along[chain.axis or 0] = affine.channels
    if affine.is_scaling and several:
        become(node, "Mul", [chain.source, new_constant(node, "B", scale.reshape(along))])
    elif chain.axis == 1 and not affine.is_scaling and (several or len(shape) == IMAGE_RANK):
        unit = np.ones_like(scale)
        parts = {"scale": scale, "B": shift, "input_mean": 0 * unit, "input_var": unit}
        inputs = [chain.source, *(new_constant(node, place, part) for place, part in parts.items())]
        become(node, "BatchNormalization", inputs, {"epsilon": 0.0})
    elif shifts_only and several:
        become(node, "Add", [chain.source, new_constant(node, "B", shift.reshape(along))])
    elif len(chain.steps) > 2:
        first = chain.steps[0].node
        become(first, "Mul", [chain.source, new_constant(first, "B", scale.reshape(along))])
        become(node, "Add", [first.outputs[0], new_constant(node, "B", shift.reshape(along))])
    else:
        return False
    return True
