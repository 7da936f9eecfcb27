"""Sources: the layers that *are* an affine at inference. One row per class: layer -> (axis, Affine).

    BatchNormalization   s = gamma/sqrt(variance + epsilon),  t = beta - mean·s
    Normalization        s = 1/max(sqrt(variance), 1e-7),     t = -mean·s        (Keras clamps the deviation)
      inverted           s = max(sqrt(variance), 1e-7),       t = mean
    Rescaling            s = scale,                           t = offset

Parameters are read as stored and computed with in float64. Classes are matched exactly: a subclass may
compute something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from deploykit.affine import Affine, Vector
from deploykit.fuse.reasons import Refusal
from deploykit.graph import Node, Trace, numpy

L = keras.layers
Shape = tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Source:
    """A node that is an affine along ``axis`` (counted from the front, batch included)."""

    node: Node
    axis: int
    affine: Affine


Law = Callable[[Any, Shape], tuple[int, Affine] | Refusal]


def _vector(value: Any, channels: int) -> Vector:
    value = np.asarray(value, np.float64).ravel()
    return np.broadcast_to(value, (channels,)).copy() if value.size == 1 else value


def _as_keras_reads(value: Any) -> Any:
    """A mean or variance given as numbers: Keras keeps a list of them, and reads it in its default precision."""
    return numpy(keras.ops.convert_to_tensor(np.asarray(value).tolist()))


def _batch_normalization(layer: Any, shape: Shape) -> tuple[int, Affine] | Refusal:
    if layer.renorm:
        return Refusal("unsupported_option", f"{layer.name} uses renorm=True")
    mean, variance = numpy(layer.moving_mean).astype(np.float64), numpy(layer.moving_variance).astype(np.float64)
    gamma = numpy(layer.gamma).astype(np.float64) if layer.scale else np.ones_like(mean)
    beta = numpy(layer.beta).astype(np.float64) if layer.center else np.zeros_like(mean)
    if not (variance + layer.epsilon > 0).all():
        return Refusal("bad_statistics", f"the smallest moving variance of {layer.name} is {variance.min():.3g}")
    scale = gamma / np.sqrt(variance + layer.epsilon)
    return layer.axis % len(shape), Affine(scale, beta - mean * scale)


def _normalization(layer: Any, shape: Shape) -> tuple[int, Affine] | Refusal:
    axes = tuple(axis % len(shape) for axis in layer.axis)
    if len(axes) > 1:
        return Refusal("unsupported_option", f"{layer.name} normalises along several axes {axes}")
    axis = axes[0] if axes else len(shape) - 1
    channels = shape[axis]
    if channels is None:
        return Refusal("unknown_size", f"{layer.name} normalises along an axis of unknown size")
    given = layer.input_mean is not None
    mean = _vector(_as_keras_reads(layer.input_mean) if given else numpy(layer.adapt_mean), channels)
    variance = _vector(_as_keras_reads(layer.input_variance) if given else numpy(layer.adapt_variance), channels)
    deviation = np.maximum(np.sqrt(variance), keras.config.epsilon())
    if layer.invert:
        return axis, Affine(deviation, mean)
    return axis, Affine(1 / deviation, -mean / deviation)


def _rescaling(layer: Any, shape: Shape) -> tuple[int, Affine] | Refusal:
    axis, channels = len(shape) - 1, shape[-1]
    if channels is None:
        return Refusal("unknown_size", f"{layer.name} has a last axis of unknown size")
    if max(np.ndim(layer.scale), np.ndim(layer.offset)) > 1 or (
        max(np.ndim(layer.scale), np.ndim(layer.offset)) == 1 and keras.config.image_data_format() != "channels_last"
    ):
        return Refusal("unsupported_option", f"{layer.name} scales along more than the last axis")
    # cast as the layer's own call does: TensorFlow reads a Python number in float32 first
    scale, offset = (numpy(keras.ops.cast(value, "float64")) for value in (layer.scale, layer.offset))
    return axis, Affine(_vector(scale, channels), _vector(offset, channels))


SOURCES: Mapping[type, Law] = {
    L.BatchNormalization: _batch_normalization,
    L.Normalization: _normalization,
    L.Rescaling: _rescaling,
}


def is_source(node: Node) -> bool:
    return type(node.layer) in SOURCES


def read(found: Trace, node: Node) -> Source | Refusal:
    """The affine of a source node, or why it cannot be taken as one."""
    name = node.name
    before, after = found.tensors[node.inputs[0]], found.tensors[node.outputs[0]]
    if found.calls(node) > 1:
        return Refusal("shared_layer", f"{name} is called {found.calls(node)} times")
    if node.training and isinstance(node.layer, L.BatchNormalization):
        return Refusal("training_mode", f"{name} is called with training=True and normalises by the batch")
    if before.dtype != after.dtype:
        return Refusal("dtype_change", f"{name} turns {before.dtype} into {after.dtype}")
    law = SOURCES[type(node.layer)](node.layer, before.shape)
    if isinstance(law, Refusal):
        return law
    axis, affine = law
    if axis == 0:
        return Refusal("axis_mismatch", f"{name} acts along the batch axis")
    if not affine.is_finite:
        return Refusal("bad_statistics", f"{name} has a scale or shift that is not finite")
    return Source(node, axis, affine)
