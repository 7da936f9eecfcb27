"""An explicit Pad merged into the convolution or pooling that reads it, and one that must not be.

Conv, AveragePool and MaxPool pad by themselves, without a copy of the tensor. What they pad with decides:

    Conv         0                                                  Pad(0): pads add up
    AveragePool  0, if the elements count (count_include_pad = 1);  Pad(0): pads add up, if its own counted or were none
                 else nothing, and the divisor shrinks
    MaxPool      minus infinity                                     Pad(-inf): pads add up
                 max(0, x) = max x, for x >= 0                      Pad(0): pads add up, if x is never negative

The last law needs an element of x in every window, or 0 would become minus infinity; so pads must stay smaller than
the window, which ONNX Runtime demands of every pooling anyway. A Pad that several nodes read is merged into those that
can and stays for the others.

Zeros that stay in front of a pooling are *shielded*. When it loads a file, ONNX Runtime (1.31 was measured) merges them
whatever the law: into a MaxPool of negative numbers, so that maxima along the border become negative where they were 0
(ResNet50V2 has this pattern), and beyond the window, so that the file does not load. Three ways to say the same are
left alone. Behind a Conv, whose result is in ONNX Runtime's blocked layout: a depthwise 1x1 Conv of ones that pads, and
keeps the layout. Else ``auto_pad=VALID`` for the pooling, which means no padding; where it does pad, a Pad that names
its axes (from opset 18 on; below, nothing is done, and `check` is the judge).

Limits: only constant pads, along image axes, that add; windows rounded down; poolings without dilation or indices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from deploykit.export.lowering.patterns import attribute, become, constant, drop, is_op, new_constant, reader, sizes

# never negative, whatever is read
_RISEN = ("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Softplus", "Exp", "Abs", "Sqrt")
# never negative if nothing is that they read
_KEEP = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Concat", "Add", "Mul", "Max", "Transpose")
_KEEP_FIRST = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Identity")
IMAGE_RANK, BLOCK = 4, 16  # ONNX Runtime's blocked layout: of images, in blocks of 8 or 16 channels
AXES_SINCE = 18  # opset from which a Pad may name its axes


@dataclass(frozen=True)
class _Zone:
    """What a Pad adds to an image: sizes per spatial axis, begins then ends as ONNX has them, and the value."""

    pads: tuple[int, ...]
    value: float

    @property
    def rank(self) -> int:
        return len(self.pads) // 2


def apply(model: ir.Model) -> int:
    """Merge and shield; returns the number of nodes that took over a Pad, and of poolings that were shielded."""
    count = 0
    for node in list(model.graph):
        if node.graph is None or not is_op(node, "Pad"):
            continue
        zone = _zone(node)
        if zone is None:
            continue
        for following in [use.node for use in node.outputs[0].uses() if use.idx == 0 and use.node.graph is node.graph]:
            rule = _RULES.get(following.op_type) if is_op(following, *_RULES) else None
            if rule is not None and rule(node, zone, following):
                _merge(node, zone, following)
                count += 1
        only = reader(node.outputs[0])
        if only is not None and zone.value == 0 and is_op(only, "MaxPool", "AveragePool"):
            count += _shield(node, zone, only, model.graph.opset_imports.get("", 1))
        drop(node.outputs[0])
    return count


def _zone(node: ir.Node) -> _Zone | None:
    """The image border of a Pad with constants; None where it does anything else."""
    shape, pads = sizes(node.outputs[0]), constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if shape is None or pads is None or attribute(node, "mode", "constant") != "constant":
        return None
    rest = [*node.inputs[2:], None, None]
    value, axes = (constant(given) if given is not None else None for given in rest[:2])
    if any(given is not None and found is None for given, found in zip(rest, (value, axes), strict=False)):
        return None
    rank = len(shape)
    whole = np.zeros((2, rank), np.int64)
    whole[:, range(rank) if axes is None else axes.ravel() % rank] = pads.reshape(2, -1)
    if rank < 3 or whole[:, :2].any() or (whole < 0).any():
        return None
    return _Zone(tuple(map(int, whole[:, 2:].ravel())), 0.0 if value is None else float(value.ravel()[0]))


def _own_pads(node: ir.Node, rank: int) -> tuple[int, ...] | None:
    """What a node pads itself; None where that depends on the size of its input."""
    if attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    return tuple(attribute(node, "pads", (0,) * (2 * rank)))


def _conv(pad: ir.Node, zone: _Zone, node: ir.Node) -> bool:
    return zone.value == 0 and _own_pads(node, zone.rank) is not None


def _window_holds(zone: _Zone, node: ir.Node) -> bool:
    """Whether a pooling may have the pads of both: each window has an element of the image."""
    own = _own_pads(node, zone.rank)
    kernel = attribute(node, "kernel_shape", ())
    plain = not attribute(node, "ceil_mode", 0) and set(attribute(node, "dilations", (1,))) == {1}
    if own is None or not plain or len(node.outputs) > 1:
        return False
    return all(a + b < size for a, b, size in zip(zone.pads, own, 2 * kernel, strict=True))


def _average(pad: ir.Node, zone: _Zone, node: ir.Node) -> bool:
    counted = attribute(node, "count_include_pad", 0) == 1 or not any(_own_pads(node, zone.rank) or ())
    return zone.value == 0 and counted and _window_holds(zone, node)


def _max(pad: ir.Node, zone: _Zone, node: ir.Node) -> bool:
    dtype = pad.outputs[0].dtype
    if dtype is None or not dtype.is_floating_point() or not _window_holds(zone, node):
        return False
    lowest = zone.value <= float(np.finfo(dtype.numpy()).min)
    return lowest or (zone.value == 0 and _never_negative(pad.inputs[0]))


# operation -> whether it may do itself what the Pad in front of it does
_RULES: dict[str, Callable[[ir.Node, _Zone, ir.Node], bool]] = {"Conv": _conv, "AveragePool": _average, "MaxPool": _max}


def _never_negative(value: ir.Value | None) -> bool:
    """Whether the operations that made a value exclude numbers below 0."""
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        if value is None or id(value) in seen:
            continue
        seen.add(id(value))
        node, content = value.producer(), constant(value)
        if content is not None:
            if not (content >= 0).all():
                return False
        elif is_op(node, *_RISEN) or (is_op(node, "Clip") and _clips_at_zero(node)):
            continue
        elif node is not None and is_op(node, *_KEEP):
            waiting += node.inputs
        elif node is not None and is_op(node, *_KEEP_FIRST):
            waiting.append(node.inputs[0])
        else:
            return False
    return True


def _clips_at_zero(node: ir.Node | None) -> bool:
    least = constant(node.inputs[1]) if node is not None and len(node.inputs) > 1 else None
    return least is not None and bool((least >= 0).all())


def _merge(pad: ir.Node, zone: _Zone, node: ir.Node) -> None:
    own = _own_pads(node, zone.rank)
    assert own is not None  # every rule asks
    node.replace_input_with(0, pad.inputs[0])
    node.attributes.pop("auto_pad", None)
    node.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(zone.pads, own, strict=True)])
    if node.op_type == "AveragePool":
        node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 1)


def _blocked_channels(pad: ir.Node) -> int | None:
    """The channels of what a Pad reads, if that surely is in the blocked layout of a CPU that has one."""
    shape, value = sizes(pad.inputs[0]), pad.inputs[0]
    if value is None or shape is None or len(shape) != IMAGE_RANK or value.dtype != ir.DataType.FLOAT:
        return None
    return shape[1] if shape[1] and shape[1] % BLOCK == 0 and is_op(value.producer(), "Conv") else None


def _shield(pad: ir.Node, zone: _Zone, node: ir.Node, opset: int) -> bool:
    """Say the same in words that ONNX Runtime does not merge."""
    channels = _blocked_channels(pad)
    if channels is not None:
        ones = new_constant(pad, "W", np.ones((channels, 1, 1, 1), np.float32))
        become(pad, "Conv", [pad.inputs[0], ones], {"group": channels, "kernel_shape": [1, 1], "pads": zone.pads})
        return True
    if not any(attribute(node, "pads", ())) and not attribute(node, "ceil_mode", 0):
        if attribute(node, "auto_pad", "NOTSET") != "NOTSET":
            return False
        node.attributes.pop("pads", None)
        node.attributes["auto_pad"] = ir.AttrString("auto_pad", "VALID")
        return True
    if opset < AXES_SINCE or len(pad.inputs) > 3:
        return False
    pads = constant(pad.inputs[1])
    assert pads is not None  # a Pad with a zone has constants
    axes = new_constant(pad, "axes", np.arange(pads.size // 2))
    become(pad, "Pad", [*pad.inputs, *[None] * (3 - len(pad.inputs)), axes])
    return True
