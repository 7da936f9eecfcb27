"""Conduits: the layers an affine may travel through to reach a sink. One row per class, with its law.

    f(s·x + t) = s'·f(x) + t'

Forward, the affine in front of the layer is given and the one behind it wanted; backward the other
way round. A law gives the travelled (axis, Affine), or the Refusal of its condition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import keras

from deploykit.affine import Affine
from deploykit.fuse.reasons import Refusal
from deploykit.graph import Node, Trace

L = keras.layers
Travelled = tuple[int, Affine] | Refusal
Shape = tuple[int | None, ...]
Law = Callable[[Any, Shape, int, Affine], Travelled]  # layer, shape in front of it, axis, affine


@dataclass(frozen=True)
class Conduit:
    forward: Law
    backward: Law
    condition: Callable[[Any], Refusal | None] = lambda layer: None


def _same(layer: Any, shape: Shape, axis: int, affine: Affine) -> Travelled:
    return axis, affine


def _sizes(layer: Any, shape: Shape) -> tuple[int, ...] | Refusal:
    sizes = tuple(size for size in shape[1:] if size is not None)
    if len(sizes) < len(shape) - 1:
        return Refusal("unknown_size", f"{layer.name} flattens a size that is not known")
    return sizes


def _flatten_forward(layer: Any, shape: Shape, axis: int, affine: Affine) -> Travelled:
    sizes = _sizes(layer, shape)
    if isinstance(sizes, Refusal):
        return sizes
    if layer.data_format == "channels_first" and len(sizes) > 1:  # Keras moves the channels behind first
        sizes, axis = (*sizes[1:], sizes[0]), (axis - 2) % len(sizes) + 1
    return 1, affine.spread(sizes, axis - 1)


def _flatten_backward(layer: Any, shape: Shape, axis: int, affine: Affine) -> Travelled:
    sizes = _sizes(layer, shape)
    if isinstance(sizes, Refusal):
        return sizes
    channels_first = layer.data_format == "channels_first" and len(sizes) > 1
    flat = (*sizes[1:], sizes[0]) if channels_first else sizes
    # the channel axis of what was flattened: the last of what Keras flattens
    gathered = affine.gathered(flat, len(flat) - 1)
    if gathered is None:
        return Refusal("axis_mismatch", f"the affine differs by position in front of {layer.name}")
    return (1 if channels_first else len(sizes)), gathered


def _pooled_axis(layer: Any, rank: int) -> int:
    return 1 if layer.data_format == "channels_first" else rank - 1


def _mean_forward(layer: Any, shape: Shape, axis: int, affine: Affine) -> Travelled:
    channel = _pooled_axis(layer, len(shape))
    if axis != channel:
        return Refusal("axis_mismatch", f"{layer.name} averages along the affine's axis {axis}")
    return (channel if layer.keepdims else 1), affine


def _mean_backward(layer: Any, shape: Shape, axis: int, affine: Affine) -> Travelled:
    channel = _pooled_axis(layer, len(shape))
    if axis != (channel if layer.keepdims else 1):
        return Refusal("axis_mismatch", f"{layer.name} has averaged along the affine's axis {axis}")
    return channel, affine


def _is_linear(layer: Any) -> Refusal | None:
    name = getattr(layer.activation, "__name__", str(layer.activation))
    return None if name == "linear" else Refusal("no_sink", f"{layer.name} is a {name}, which an affine cannot pass")


_IDENTITY = Conduit(_same, _same)  # f(x) = x at inference
_MEAN = Conduit(_mean_forward, _mean_backward)  # mean(s·x + t) = s·mean(x) + t

CONDUITS: Mapping[type, Conduit] = {
    L.Dropout: _IDENTITY,
    L.SpatialDropout1D: _IDENTITY,
    L.SpatialDropout2D: _IDENTITY,
    L.SpatialDropout3D: _IDENTITY,
    L.AlphaDropout: _IDENTITY,
    L.GaussianDropout: _IDENTITY,
    L.GaussianNoise: _IDENTITY,
    L.ActivityRegularization: _IDENTITY,
    L.Identity: _IDENTITY,
    L.Activation: Conduit(_same, _same, _is_linear),  # only the linear one
    L.Flatten: Conduit(_flatten_forward, _flatten_backward),  # a permutation: the affine of each element
    L.GlobalAveragePooling1D: _MEAN,
    L.GlobalAveragePooling2D: _MEAN,
    L.GlobalAveragePooling3D: _MEAN,
}


def is_conduit(node: Node) -> bool:
    return type(node.layer) in CONDUITS


def travel(found: Trace, node: Node, axis: int, affine: Affine, *, forward: bool) -> Travelled:
    """Carry an affine over a conduit. ``axis`` belongs to the side it comes from."""
    layer, conduit = node.layer, CONDUITS[type(node.layer)]
    before = found.tensors[node.inputs[0]]
    if node.training:
        return Refusal("training_mode", f"{node.name} is called with training=True")
    if before.masked and isinstance(layer, (L.GlobalAveragePooling1D, L.Flatten)):
        return Refusal("mask", f"{node.name} sees a mask")
    refusal = conduit.condition(layer)
    if refusal is not None:
        return refusal
    return (conduit.forward if forward else conduit.backward)(layer, before.shape, axis, affine)
