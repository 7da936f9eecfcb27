"""Where each layer's kernel keeps its input and output channels: one table, one normal form.

Every kernel that deploykit rewrites is, after a reshape, a block

    K[k, g, i, o]     k: position in the window, g: group, i: input channel in g, o: output channel in g

and with it the three things that an affine needs are one line each:

    an affine follows     K · s[g, o]                     scale_outputs
    an affine precedes    K · s[g, i]                     scale_inputs
    its shift, seen       sum over k, i of K · t[g, i]    response: what a constant input t gives

The last one is exact only where every window sees the whole constant, that is without padding.
The table says how each class's stored kernel maps to the block and back: the order string lists the
stored axes after the window's ("i go": input, then groups times outputs). Input channels are stored
in the order (g, i) and output channels in the order (g, o) in all of Keras' layers.

Limits: weights only; padding, activation and data format are judged in `deploykit.fuse.sinks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import keras
import numpy as np
import numpy.typing as npt

L = keras.layers
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Kernel:
    """One stored kernel: its attribute on the layer and the order of its axes behind the window."""

    name: str
    order: str  # "io", "i go", "g o", "o i": one word per stored axis


@dataclass(frozen=True)
class Channels:
    """A layer class that has kernels: ``kernels`` are applied one after the other."""

    kernels: tuple[Kernel, ...]
    windowed: bool = True  # has kernel_size, strides, padding, dilation_rate, data_format
    transposed: bool = False  # a window *writes*: borders of the output see fewer inputs


_CONV = Channels((Kernel("kernel", "i go"),))
_DEPTHWISE = Channels((Kernel("kernel", "g o"),))
_SEPARABLE = Channels((Kernel("depthwise_kernel", "g o"), Kernel("pointwise_kernel", "i go")))
_TRANSPOSE = Channels((Kernel("kernel", "o i"),), transposed=True)

CHANNELS: Mapping[type, Channels] = {
    L.Dense: Channels((Kernel("kernel", "i go"),), windowed=False),  # (in, out)
    L.Conv1D: _CONV,  # (k, in/groups, out)
    L.Conv2D: _CONV,
    L.Conv3D: _CONV,
    L.DepthwiseConv1D: _DEPTHWISE,  # (k, in, multiplier): every input channel is a group
    L.DepthwiseConv2D: _DEPTHWISE,
    L.SeparableConv1D: _SEPARABLE,  # depthwise, then a 1x1 convolution
    L.SeparableConv2D: _SEPARABLE,
    L.Conv1DTranspose: _TRANSPOSE,  # (k, out, in)
    L.Conv2DTranspose: _TRANSPOSE,
    L.Conv3DTranspose: _TRANSPOSE,
}


def to_block(kernel: npt.NDArray[np.generic], order: str, groups: int = 1) -> Array:
    """A stored kernel as a float64 block ``(k, g, i, o)``."""
    axes = order.split()
    stored = np.asarray(kernel, np.float64)
    sizes = stored.shape[stored.ndim - len(axes) :]
    if axes == ["i", "go"]:
        inputs, outputs = sizes
        return np.moveaxis(stored.reshape(-1, inputs, groups, outputs // groups), 1, 2)
    if axes == ["g", "o"]:
        return stored.reshape(-1, sizes[0], 1, sizes[1])
    if axes == ["o", "i"]:
        return np.swapaxes(stored.reshape(-1, *sizes), 1, 2)[:, None]
    raise ValueError(f"unknown kernel order {order!r}")


def from_block(block: Array, order: str, shape: tuple[int, ...]) -> Array:
    """The inverse of `to_block`: a block as a kernel of the stored ``shape``."""
    if order == "i go":
        block = np.moveaxis(block, 2, 1)
    elif order == "o i":
        block = np.swapaxes(block[:, 0], 1, 2)
    return np.ascontiguousarray(block).reshape(shape)


def scale_outputs(block: Array, scale: Array) -> Array:
    """Multiply every output channel; ``scale`` has one entry per output channel."""
    _, g, _, o = block.shape
    return block * scale.reshape(1, g, 1, o)


def scale_inputs(block: Array, scale: Array) -> Array:
    """Multiply every input channel; ``scale`` has one entry per input channel."""
    _, g, i, _ = block.shape
    return block * scale.reshape(1, g, i, 1)


def response(block: Array, constant: Array) -> Array:
    """What the kernel answers to a constant input, one entry per output channel."""
    _, g, i, _ = block.shape
    answer: Array = np.einsum("kgio,gi->go", block, constant.reshape(g, i)).ravel()
    return answer
