"""Change: a tensor of the model in new units, and the Site where a rule meets one.

A fold is a change of units on some tensors. The fused model holds ``new`` where the original holds ``old``,

    new = forth(old)        old = back(new)        forth and back are affines along one axis

and every layer that touches such a tensor is asked to keep up: a sink by its weights, a conduit by passing the
change on. Both directions of folding are the same thing seen from two ends: the layer in front of a changed
tensor applies ``forth`` after itself, every layer behind it applies ``back`` before itself.

A channel of scale 0 has no way back. Such a change is kept with the one direction that exists: a layer in front
can still apply ``forth``, and a layer behind ``back``, but none can undo the other's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np

from deploykit.affine import Affine
from deploykit.fuse.reasons import Refusal
from deploykit.graph import Node, Shape, Trace

Travelled = tuple[int, Affine] | Refusal


@dataclass(frozen=True, eq=False)
class Change:
    """New units of a tensor along ``axis`` (counted from the front, batch included)."""

    axis: int
    forth: Affine | None
    back: Affine | None

    @staticmethod
    def to(axis: int, forth: Affine) -> Change:
        """The change after which ``new = forth(old)``."""
        return Change(axis, forth, forth.inverse())

    @staticmethod
    def undone_by(axis: int, back: Affine) -> Change:
        """The change that ``old = back(new)`` undoes."""
        return Change(axis, back.inverse(), back)

    @property
    def affine(self) -> Affine:
        """Whichever direction exists: what is asked of both holds for either."""
        found = self.forth or self.back
        assert found is not None
        return found

    @property
    def is_identity(self) -> bool:
        return self.affine.is_identity

    @property
    def is_scaling(self) -> bool:
        return self.affine.is_scaling

    @property
    def keeps_order(self) -> bool:
        return self.affine.keeps_order

    def on(self, axis: int) -> Change:
        return replace(self, axis=axis)

    def onto(self, axis: int, channels: int | None) -> Change | None:
        """The same change along another axis: only a uniform one has that."""
        if axis == self.axis:
            return self
        if not self.affine.is_uniform or channels is None:
            return None
        forth, back = (side and side.of_size(channels) for side in (self.forth, self.back))
        return Change(axis, forth, back)

    def carried(self, law: Callable[[int, Affine], Travelled]) -> Change | Refusal:
        """The change behind a layer that turns an affine into another one, the same way for both directions."""
        moved: list[Affine | None] = []
        axis = self.axis
        for side in (self.forth, self.back):
            found = None if side is None else law(self.axis, side)
            if isinstance(found, Refusal):
                return found
            if found is not None:
                axis = found[0]
            moved.append(found and found[1])
        return Change(axis, moved[0], moved[1])

    def agrees(self, other: Change) -> bool:
        """Whether both say the same, up to rounding."""
        a, b = (self.forth, other.forth) if self.forth and other.forth else (self.back, other.back)
        return self.axis == other.axis and a is not None and b is not None and a.is_close(b)


@dataclass(frozen=True, eq=False)
class Site:
    """One call as the rules see it: the layer that computes, and shapes as that layer sees them.

    Inside a TimeDistributed the axis of the steps is taken out (``steps``), so that a rule for Dense is a rule for
    TimeDistributed(Dense) too.
    """

    node: Node
    layer: Any
    name: str
    inputs: tuple[Shape, ...]
    output: Shape
    masked: bool
    steps: bool
    pad: float | None = None  # what an earlier fold made of the padding's value
    edits: tuple[Any, ...] = ()  # what the layer has absorbed already

    @property
    def rank(self) -> int:
        return len(self.inputs[0])

    @property
    def channel_axis(self) -> int:
        """Where the layer's own data format puts the channels of its input."""
        return 1 if getattr(self.layer, "data_format", None) == "channels_first" else self.rank - 1


def site(found: Trace, node: Node) -> Site:
    """The site of a node that has tensors going in and out."""
    layer, steps = node.layer, type(node.layer) is keras.layers.TimeDistributed
    shapes = [found.tensors[index].shape for index in (*node.inputs, node.outputs[0])]
    if steps:
        layer = layer.layer
        shapes = [(shape[0], *shape[2:]) for shape in shapes]
    masked = any(found.tensors[index].masked for index in node.inputs)
    return Site(node, layer, node.name, tuple(shapes[:-1]), shapes[-1], masked, steps)


def inward(at: Site, change: Change, shape: Shape) -> Change | Refusal:
    """A change of a tensor of the model as the layer at ``at`` sees it; ``shape`` is what that layer sees."""
    if not at.steps:
        return change
    if change.axis > 1:
        return change.on(change.axis - 1)
    moved = change.onto(len(shape), shape[-1])
    if moved is None:
        return Refusal("axis_mismatch", f"{at.name} runs along the affine's axis {change.axis}")
    return moved.on(moved.axis - 1)


def outward(at: Site, change: Change) -> Change:
    return change.on(change.axis + 1) if at.steps else change


def unit(channels: int) -> Affine:
    return Affine(np.ones(channels), np.zeros(channels))
