"""The picture of a fuse: two traces and the decisions between them as the two sides of a drawing.

A box is a call, so a layer that is called twice has two. The sides are matched by the names of layers, which
survive fusing: a name that only `before` has is gone, one that only `after` has is new. A source is coloured on
both sides as long as it is there; what a sink took shows where it holds it, in `after`.

Limits: what stays one opaque call in a trace (a bidirectional or time-distributed layer, a nested model that
cannot be inlined) is one box.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from deploykit.fuse import Decision
from deploykit.graph import Trace
from deploykit.report.drawing import Arrow, Box, Side


def picture(found_before: Trace, decisions: Sequence[Decision], found_after: Trace) -> tuple[Side, Side]:
    """The sides ``(before, after)`` of a fuse, for `deploykit.report.drawing.dot`."""
    names_before = {node.name for node in found_before.nodes}
    names_after = {node.name for node in found_after.nodes}
    decided = {decision.layer: decision for decision in decisions}
    # a fused output leaves an Identity of its name, which is nobody's affine any more
    gone = (names_before - names_after) | {d.layer for d in decisions if d.outcome == "fused"}
    left = {name: decision for name, decision in decided.items() if name not in gone}
    took: dict[str, tuple[str, ...]] = {}
    for decision in decisions:
        for sink in decision.into:
            took[sink] = (*took.get(sink, ()), decision.layer)
    before = _side(found_before, decided, {}, "gone", gone)
    return before, _side(found_after, left, took, "new", names_after - names_before)


def _side(
    found: Trace,
    decided: Mapping[str, Decision],
    took: Mapping[str, tuple[str, ...]],
    state: Literal["gone", "new"],
    only_here: Collection[str],
) -> Side:
    """One trace as boxes: its inputs, its calls in running order, its outputs. ``only_here`` have this ``state``."""
    boxes = [Box(spec.name, "Input", _shape(spec.shape), end=True) for spec in found.signature.inputs]
    made = {tensor: position for position, tensor in enumerate(found.inputs)}  # tensor -> the box it comes from
    arrows: list[Arrow] = []
    for node in found.nodes:
        decision = decided.get(node.name)
        arrows += [Arrow(made[tensor], len(boxes)) for tensor in dict.fromkeys(node.inputs)]
        made.update(dict.fromkeys(node.outputs, len(boxes)))
        boxes.append(
            Box(
                node.name,
                type(node.layer).__name__,
                ", ".join(_shape(found.tensors[tensor].shape) for tensor in node.outputs),
                outcome=decision.outcome if decision else None,
                code=decision.code if decision else "",
                reason=decision.reason if decision else "",
                into=tuple(dict.fromkeys(decision.into)) if decision else (),
                took=took.get(node.name, ()),
                state=state if node.name in only_here else "stays",
            )
        )
    for spec, tensor in zip(found.signature.outputs, found.outputs, strict=True):
        arrows.append(Arrow(made[tensor], len(boxes)))
        boxes.append(Box(spec.name, "Output", _shape(spec.shape), end=True))
    return Side(tuple(boxes), tuple(arrows))


def _shape(shape: Sequence[int | None]) -> str:
    """The shape of one sample: 28×28×8, and ? for a size that is not fixed."""
    return "×".join("?" if size is None else str(size) for size in shape[1:])
