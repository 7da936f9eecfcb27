"""Affine: the per-channel map ``y = s·x + t`` along one axis, in float64.

Everything that fusing moves is one of these. They form a monoid under ``then``:

    (s1, t1).then(s2, t2)  =  (s2·s1, s2·t1 + t2)        first this one, then the other

and a BatchNormalization at inference is one of them (Ioffe & Szegedy 2015, eq. for inference):

    s = gamma / sqrt(variance + epsilon)         t = beta - mean · s

The axis is not part of the value: it changes as the affine travels (Flatten moves it), and the
traveller carries it. No framework is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Affine:
    """``y = scale·x + shift``; both vectors have one float64 entry per channel, shape ``(C,)``."""

    scale: Vector
    shift: Vector

    def __post_init__(self) -> None:
        scale = np.asarray(self.scale, np.float64)
        shift = np.asarray(self.shift, np.float64)
        if scale.ndim != 1 or scale.shape != shift.shape:
            raise ValueError(f"scale and shift must be vectors of one length, not {scale.shape} and {shift.shape}")
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "shift", shift)

    @property
    def channels(self) -> int:
        return int(self.scale.size)

    def then(self, other: Affine) -> Affine:
        """This map followed by ``other``."""
        return Affine(other.scale * self.scale, other.scale * self.shift + other.shift)

    def __call__(self, x: npt.ArrayLike, axis: int = -1) -> npt.NDArray[np.float64]:
        """Apply to an array whose ``axis`` has length ``channels``."""
        x = np.asarray(x, np.float64)
        shape = [1] * x.ndim
        shape[axis] = -1
        return x * self.scale.reshape(shape) + self.shift.reshape(shape)

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.scale).all() and np.isfinite(self.shift).all())

    @cached_property
    def is_scaling(self) -> bool:
        """No channel is shifted."""
        return not self.shift.any()

    @cached_property
    def is_identity(self) -> bool:
        return self.is_scaling and bool((self.scale == 1).all())

    @cached_property
    def is_uniform(self) -> bool:
        """The same for all channels, and so an affine along any axis."""
        return bool((self.scale == self.scale[:1]).all() and (self.shift == self.shift[:1]).all())

    @property
    def keeps_order(self) -> bool:
        """No channel is turned round: what a maximum or a ReLU needs of a scale; 0 is allowed."""
        return bool((self.scale >= 0).all())

    def inverse(self) -> Affine | None:
        """The map back, None where some channel is collapsed to a constant (or next to it)."""
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            back = 1 / self.scale
            found = Affine(back, -self.shift * back)
        return found if found.is_finite else None

    @property
    def inverse_is_missing(self) -> npt.NDArray[np.bool_]:
        """Per channel, whether it has no way back: its scale is 0, or so small that 1/scale is not finite."""
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            return ~(np.isfinite(1 / self.scale) & np.isfinite(self.shift / self.scale))

    def of_size(self, channels: int) -> Affine:
        """A uniform affine for another number of channels."""
        return Affine(np.full(channels, self.scale[0]), np.full(channels, self.shift[0]))

    def is_close(self, other: Affine, rtol: float = 1e-13) -> bool:
        """Equal up to the rounding of a few float64 operations."""
        if self.channels != other.channels:
            return False
        pairs = ((self.scale, other.scale), (self.shift, other.shift))
        return all(bool((np.abs(a - b) <= rtol * np.maximum(np.abs(a), np.abs(b))).all()) for a, b in pairs)

    @property
    def largest_shift(self) -> float:
        return float(np.abs(self.shift).max(initial=0.0))

    def spread(self, sizes: tuple[int, ...], axis: int) -> Affine:
        """The affine of every element of a block of shape ``sizes``, in C order.

        ``axis`` of the block is the channel axis. This is what flattening does to an affine.
        """
        shape = [1] * len(sizes)
        shape[axis] = -1
        scale = np.broadcast_to(self.scale.reshape(shape), sizes)
        shift = np.broadcast_to(self.shift.reshape(shape), sizes)
        return Affine(scale.ravel(), shift.ravel())

    def gathered(self, sizes: tuple[int, ...], axis: int) -> Affine | None:
        """The inverse of ``spread``: None where the entries differ along another axis than ``axis``."""
        ends = tuple(slice(None) if i == axis else slice(0, 1) for i in range(len(sizes)))
        one = Affine(self.scale.reshape(sizes)[ends].ravel(), self.shift.reshape(sizes)[ends].ravel())
        back = one.spread(sizes, axis)
        same = np.array_equal(back.scale, self.scale) and np.array_equal(back.shift, self.shift)
        return one if same else None
