"""Sinks: the layers that take an affine into their weights, and the weights they then have.

With the kernel as a block K (see `deploykit.channels`), bias b, input x and * the layer's product:

    the affine follows     s·(K*x + b) + t   =  (K·s_out) * x  +  (s·b + t)         absorb "after"
    the affine precedes    K*(s·x + t) + b   =  (K·s_in) * x   +  (b + response(K, t))   absorb "before"

"After" needs the layer to be linear up to there (no activation). "Before" needs every window to see the
whole shift: with padding the border sees zeros instead of t, so the shift must be zero; a transposed
convolution's border windows see fewer inputs, with the same consequence. A layer that has no bias gets
one when a shift needs it.

`demand` judges without touching weights; `rewritten` computes them in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from deploykit.affine import Affine
from deploykit.channels import CHANNELS, from_block, response, scale_inputs, scale_outputs, to_block
from deploykit.fuse.reasons import Refusal
from deploykit.graph import Node, Trace, numpy

Side = Literal["after", "before"]


@dataclass(frozen=True, eq=False)
class Edit:
    """One affine that a layer absorbs on one side; ``source`` names the layer it came from."""

    layer: str
    side: Side
    affine: Affine
    source: str


def is_sink(node: Node) -> bool:
    return type(node.layer) in CHANNELS


def _channel_axis(layer: Any, rank: int) -> int:
    return 1 if getattr(layer, "data_format", "channels_last") == "channels_first" else rank - 1


def is_padded(layer: Any, shape: tuple[int | None, ...]) -> bool:
    """Whether some window of a convolution on an input of ``shape`` sees padding."""
    if layer.padding == "valid":
        return False
    first = 2 if layer.data_format == "channels_first" else 1
    sizes = shape[first : first + len(layer.kernel_size)]
    windows = zip(sizes, layer.kernel_size, layer.strides, layer.dilation_rate, strict=True)
    for size, kernel, stride, dilation in windows:
        reach = (kernel - 1) * dilation + 1
        if reach == 1:
            continue
        if layer.padding == "causal" or size is None:
            return True
        if (math.ceil(size / stride) - 1) * stride + reach > size:  # "same" pads what is missing
            return True
    return False


def demand(found: Trace, node: Node, axis: int, affine: Affine, side: Side) -> Refusal | None:
    """None when the layer of ``node`` can absorb the affine exactly on that side, else why not."""
    layer, channels = node.layer, CHANNELS[type(node.layer)]
    tensor = found.tensors[node.outputs[0] if side == "after" else node.inputs[0]]
    if found.calls(node) > 1:
        return Refusal("shared_layer", f"{node.name} is called {found.calls(node)} times")
    if axis != _channel_axis(layer, len(tensor.shape)):
        return Refusal("axis_mismatch", f"the affine acts along axis {axis}, the channels of {node.name} along another")
    activation = getattr(layer.activation, "__name__", str(layer.activation))
    if side == "after" and activation != "linear":
        return Refusal("fused_activation", f"{node.name} has activation='{activation}'")
    if side == "before" and not affine.is_scaling:
        if channels.transposed:
            return Refusal(
                "padded_shift", f"border windows of {node.name} would miss a shift of up to {affine.largest_shift:.3g}"
            )
        if channels.windowed and is_padded(layer, tensor.shape):
            return Refusal(
                "padded_shift",
                f"padding='{layer.padding}' on {node.name} would see a shift of up to {affine.largest_shift:.3g}",
            )
    return None


def needs_bias(layer: Any, edits: Sequence[Edit]) -> bool:
    return bool(layer.use_bias) or any(not edit.affine.is_scaling for edit in edits)


def rewritten(layer: Any, edits: Sequence[Edit]) -> Mapping[str, npt.NDArray[np.float64]]:
    """The layer's weights, in float64, after it has absorbed ``edits`` in their order.

    Keys are attributes of the layer: its kernels and, where there is one, ``bias`` of shape (out,).
    """
    kernels = CHANNELS[type(layer)].kernels
    stored = [numpy(getattr(layer, kernel.name)) for kernel in kernels]
    groups = [getattr(layer, "groups", 1) if kernel.name == "kernel" else 1 for kernel in kernels]
    blocks = [to_block(s, kernel.order, g) for s, kernel, g in zip(stored, kernels, groups, strict=True)]
    outputs = blocks[-1].shape[1] * blocks[-1].shape[3]
    bias = numpy(layer.bias).astype(np.float64) if layer.use_bias else np.zeros(outputs)
    for edit in edits:
        scale, shift = edit.affine.scale, edit.affine.shift
        if edit.side == "after":
            blocks[-1] = scale_outputs(blocks[-1], scale)
            bias = scale * bias + shift
        else:
            seen = shift
            for block in blocks:
                seen = response(block, seen)
            bias = bias + seen
            blocks[0] = scale_inputs(blocks[0], scale)
    weights = {
        kernel.name: from_block(block, kernel.order, s.shape)
        for kernel, block, s in zip(kernels, blocks, stored, strict=True)
    }
    if needs_bias(layer, edits):
        weights["bias"] = bias
    return weights
