"""Sources: the layers that *are* an affine at inference. One row per class: layer -> (axis, Affine).

    BatchNormalization   s = gamma/sqrt(variance + epsilon),  t = beta - mean·s
    Normalization        s = 1/max(sqrt(variance), 1e-7),     t = -mean·s        (Keras clamps the deviation)
      inverted           s = max(sqrt(variance), 1e-7),       t = mean
    Rescaling            s = scale,                           t = offset
    x + c, c + x, x - c, c - x, x·c, c·x, x/c, -x             constant arithmetic in the graph

Parameters are read as stored and computed with in float64. Classes are matched exactly: a subclass may
compute something else. A source inside a TimeDistributed is one too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from deploykit.affine import Affine, Vector
from deploykit.fuse.change import Site, site
from deploykit.fuse.reasons import Refusal
from deploykit.graph import Node, Ref, Trace, inner_layers, key, numpy

L = keras.layers
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Source:
    """A node that is an affine along ``axis`` (counted from the front, batch included)."""

    node: Node
    axis: int
    affine: Affine


Found = tuple[int, Affine] | Refusal
Law = Callable[[Site], Found]


def _vector(value: Any, channels: int) -> Vector:
    value = np.asarray(value, np.float64).ravel()
    return np.broadcast_to(value, (channels,)).copy() if value.size == 1 else value


def _as_keras_reads(value: Any) -> Any:
    """A mean or variance given as numbers: Keras keeps a list of them, and reads it in its default precision."""
    return numpy(keras.ops.convert_to_tensor(np.asarray(value).tolist()))


def _batch_normalization(at: Site) -> Found:
    layer = at.layer
    if layer.renorm:
        return Refusal("unsupported_option", f"{at.name} uses renorm=True")
    mean, variance = numpy(layer.moving_mean).astype(np.float64), numpy(layer.moving_variance).astype(np.float64)
    gamma = numpy(layer.gamma).astype(np.float64) if layer.scale else np.ones_like(mean)
    beta = numpy(layer.beta).astype(np.float64) if layer.center else np.zeros_like(mean)
    if not (variance + layer.epsilon > 0).all():
        return Refusal("bad_statistics", f"the smallest moving variance of {at.name} is {variance.min():.3g}")
    scale = gamma / np.sqrt(variance + layer.epsilon)
    return layer.axis % at.rank, Affine(scale, beta - mean * scale)


def _normalization(at: Site) -> Found:
    layer, shape = at.layer, at.inputs[0]
    axes = tuple(axis % at.rank for axis in layer.axis)
    if len(axes) > 1:
        return Refusal("unsupported_option", f"{at.name} normalises along several axes {axes}")
    axis = axes[0] if axes else at.rank - 1
    channels = shape[axis]
    if channels is None:
        return Refusal("unknown_size", f"{at.name} normalises along an axis of unknown size")
    given = layer.input_mean is not None
    mean = _vector(_as_keras_reads(layer.input_mean) if given else numpy(layer.adapt_mean), channels)
    variance = _vector(_as_keras_reads(layer.input_variance) if given else numpy(layer.adapt_variance), channels)
    deviation = np.maximum(np.sqrt(variance), keras.config.epsilon())
    if layer.invert:
        return axis, Affine(deviation, mean)
    return axis, Affine(1 / deviation, -mean / deviation)


def _per_channel(at: Site, scale: Float64, shift: Float64) -> Found:
    """Constants that broadcast over the input, as an affine along the one axis on which they vary."""
    shape = at.inputs[0]
    if at.output != shape or max(scale.ndim, shift.ndim) > at.rank:
        return Refusal("unsupported_option", f"{at.name} also changes the shape")
    sizes = [(1,) * (at.rank - value.ndim) + value.shape for value in (scale, shift)]
    varied = {axis for size in sizes for axis, length in enumerate(size) if length > 1}
    if len(varied) > 1:
        return Refusal("unsupported_option", f"{at.name} has a constant that varies along several axes")
    axis = varied.pop() if varied else at.rank - 1
    channels = shape[axis]
    if channels is None:
        return Refusal("unknown_size", f"{at.name} has an axis {axis} of unknown size")
    return axis, Affine(_vector(scale, channels), _vector(shift, channels))


def _rescaling(at: Site) -> Found:
    # cast as the layer's own call does: TensorFlow reads a Python number in float32 first
    scale, offset = (numpy(keras.ops.cast(value, "float64")) for value in (at.layer.scale, at.layer.offset))
    if scale.ndim and keras.config.image_data_format() == "channels_first":
        scale = scale.reshape(scale.shape + (1,) * (3 - scale.ndim))  # as the layer does
    return _per_channel(at, scale, offset)


def _constant(at: Site) -> Float64 | Refusal:
    """The constant beside the tensor in ``x + c`` and its like."""
    (other,) = (value for value in at.node.args if not isinstance(value, Ref))
    try:
        return np.asarray(other if isinstance(other, (int, float)) else numpy(other), np.float64)
    except (TypeError, ValueError):
        return Refusal("unsupported_option", f"{at.name} has a constant that is no array of numbers")


def _arithmetic(law: Callable[[Float64, bool], tuple[Float64, Float64] | None]) -> Law:
    """``law(c, tensor first)`` gives (scale, shift), or None for what is no affine (c/x)."""

    def rule(at: Site) -> Found:
        constant = _constant(at)
        if isinstance(constant, Refusal):
            return constant
        with np.errstate(divide="ignore"):
            found = law(constant, isinstance(at.node.args[0], Ref))
        if found is None:
            return Refusal("unsupported_option", f"{at.name} divides by its input")
        return _per_channel(at, *found)

    return rule


SOURCES: Mapping[type | str, Law] = {
    L.BatchNormalization: _batch_normalization,
    L.Normalization: _normalization,
    L.Rescaling: _rescaling,
    "Add": _arithmetic(lambda c, first: (np.ones(()), c)),
    "Subtract": _arithmetic(lambda c, first: (np.ones(()), -c) if first else (-np.ones(()), c)),
    "Multiply": _arithmetic(lambda c, first: (c, np.zeros(()))),
    "TrueDivide": _arithmetic(lambda c, first: (1 / c, np.zeros(())) if first else None),
    "Divide": _arithmetic(lambda c, first: (1 / c, np.zeros(())) if first else None),
    "Negative": lambda at: _per_channel(at, -np.ones(()), np.zeros(())),
}


def kind_of(node: Node) -> str:
    """What a source is counted under: its class, that of the layer in a wrapper, or the operation's name."""
    return type(node.layer.layer if type(node.layer) is L.TimeDistributed else node.layer).__name__


def is_source(node: Node) -> bool:
    """Whether a node is an affine by its kind. An operation on two tensors is none."""
    layer = node.layer.layer if type(node.layer) is L.TimeDistributed else node.layer
    return key(layer) in SOURCES and (isinstance(key(layer), type) or len(node.inputs) == 1)


def enclosed(found: Trace) -> dict[str, tuple[Node, Any]]:
    """Sources inside layers that are called as a whole: path -> (the call around it, the layer itself)."""
    layers = {}
    for node in found.nodes:
        if not is_source(node):
            inside = [layer for layer in inner_layers(node.layer) if type(layer) in SOURCES]
            layers.update({f"{node.name}/{layer.name}": (node, layer) for layer in inside})
    return layers


def kinds(found: Trace) -> list[str]:
    """The kind of every source of a model."""
    own = [kind_of(node) for node in found.nodes if is_source(node)]
    return own + [type(layer).__name__ for _, layer in enclosed(found).values()]


def read(found: Trace, node: Node) -> Source | Refusal:
    """The affine of a source node, or why it cannot be taken as one."""
    at = site(found, node)
    before, after = found.tensors[node.inputs[0]], found.tensors[node.outputs[0]]
    if found.calls(node) > 1:
        return Refusal("shared_layer", f"{at.name} is called {found.calls(node)} times")
    if node.training and isinstance(at.layer, L.BatchNormalization) and at.layer.trainable:  # frozen: inference
        return Refusal("training_mode", f"{at.name} is called with training=True and normalises by the batch")
    if len(node.inputs) > 1 and not isinstance(at.layer, L.BatchNormalization):  # whose mask counts in training only
        return Refusal("mask", f"{at.name} is called with a second tensor besides its input")
    if before.masked and not after.masked:
        return Refusal("mask", f"{at.name} takes away a mask that would travel on without it")
    if "float" not in before.dtype:
        return Refusal("unsupported_option", f"{at.name} computes in {before.dtype}, which wraps and truncates")
    if before.dtype != after.dtype:
        return Refusal("dtype_change", f"{at.name} turns {before.dtype} into {after.dtype}")
    law = SOURCES[key(at.layer)](at)
    if isinstance(law, Refusal):
        return law
    axis, affine = law
    if axis == 0:
        return Refusal("axis_mismatch", f"{at.name} acts along the batch axis")
    if not affine.is_finite:
        return Refusal("bad_statistics", f"{at.name} has a scale or shift that is not finite")
    return Source(node, axis + at.steps, affine)
