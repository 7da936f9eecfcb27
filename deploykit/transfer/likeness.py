"""Likeness: what of a model is still its base, layer by layer.

Layers that have weights are paired: by name, where class and shapes agree, too; then by position, in the order in which
they run, among those whose names found no partner. A name can lie (every model has a ``dense``), so that shapes must
agree; a position can lie more easily, so that values must, too:

    d = |w - w0| / |w0|,     d^2 = 1 + r^2 - 2 r cos,     r = |w| / |w0|

All zeros lie at a distance of 1 from the base's weights, and weights that were drawn anew (cos about 0) at 1 and more.
A pair by position therefore needs d <= `AKIN`; otherwise both are what they seem, one new and one missing.

`equal` is bitwise: the same dtype and the same bytes in every weight, and the same settings. `changed` comes with the
distance of each weight, in float64. The **body** is what both models have, less a last layer with weights that changed:
that is a head, trained anew.

Limits: layers without weights, and how layers are connected, are not compared. A layer of which the base has no weight
that is not zero has no distance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from deploykit.graph import Node, Trace, numpy

AKIN = 0.5  # of a pair by position: half way from the base's weights to none at all

STATISTICS = ("moving_mean", "moving_variance")  # of BatchNormalization: what an optimizer never trains

# Settings that say how a layer was made or is trained, not what it computes.
_TRAINING = ("_initializer", "_regularizer", "_constraint")
_OURS = ("name", "trainable", "momentum", "synchronized", "seed", "batch_shape", "batch_input_shape", "input_dim")

FEW = 4

State = Literal["equal", "changed", "missing", "new"]


@dataclass(frozen=True)
class WeightChange:
    """``distance``: relative to the base's, None where that is all zero or either is not finite."""

    name: str
    equal: bool
    distance: float | None

    @property
    def is_statistic(self) -> bool:
        return self.name.rpartition("/")[2] in STATISTICS


@dataclass(frozen=True)
class LayerChange:
    """``layer``: its name in the model, or in the base where it is missing. ``settings``: those that differ."""

    layer: str
    kind: str
    state: State
    base_layer: str | None = None
    matched_by: Literal["name", "position"] | None = None
    head: bool = False
    weights: tuple[WeightChange, ...] = ()
    settings: tuple[str, ...] = ()

    @property
    def statistics_equal(self) -> bool:
        return all(weight.equal for weight in self.weights if weight.is_statistic)

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "class": self.kind,
            "state": self.state,
            "base_layer": self.base_layer,
            "matched_by": self.matched_by,
            "head": self.head,
            "weights": [{"name": w.name, "equal": w.equal, "distance": w.distance} for w in self.weights],
            "settings": list(self.settings),
        }


@dataclass(frozen=True)
class Likeness:
    """The layers in the model's order, then those that are missing."""

    layers: tuple[LayerChange, ...]

    def of(self, *states: State) -> list[LayerChange]:
        return [change for change in self.layers if change.state in states]

    @property
    def body(self) -> list[LayerChange]:
        return [change for change in self.of("equal", "changed") if change.state == "equal" or not change.head]

    @property
    def body_equal(self) -> bool:
        """Whether there is a body, and it is bit for bit that of the base."""
        return bool(self.body) and all(change.state == "equal" for change in self.body)

    @property
    def summary(self) -> str:
        """One line: the body first, then what else differs."""
        rest = [
            f"{state}: {_some([change.layer for change in changes])}"
            for state, changes in (("new", self.of("new")), ("missing", self.of("missing")))
            if changes
        ]
        heads = [change.layer for change in self.of("changed") if change.head]
        rest += [f"head changed: {_some(heads)}"] if heads else []
        differ = [change for change in self.body if change.state == "changed"]
        if not self.body:
            said = "no layer of the base's body is in the model"
        elif not differ:
            said = f"the body is bit for bit that of the base ({_count(len(self.body), 'layer')})"
        else:
            said = f"{len(differ)} of {_count(len(self.body), 'layer')} of the body differ from the base"
            said += f" ({_some([change.layer for change in differ])})"
        return "; ".join([said, *rest])

    def to_json(self) -> dict[str, Any]:
        return {
            "body_equal": self.body_equal,
            "summary": self.summary,
            "counts": {state: len(self.of(state)) for state in ("equal", "changed", "missing", "new")},
            "layers": [change.to_json() for change in self.layers],
        }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:FEW]) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")


# ------------------------------------------------------------------------------------------------- layers


def layers_of(found: Trace) -> list[Node]:
    """The first call of every layer, in running order."""
    first: dict[int, Node] = {}
    for node in found.nodes:
        first.setdefault(id(node.layer), node)
    return list(first.values())


def weights_of(layer: Any) -> list[Any]:
    """Keras variables; a plain operation has none."""
    return list(getattr(layer, "weights", ()))


def weight_name(layer: Any, variable: Any) -> str:
    """The path of a variable below its layer."""
    return str(variable.path.rpartition(f"{layer.name}/")[2])


def last_layers(found: Trace) -> set[str]:
    """The layers with weights from which an output is made without further weights."""
    last: set[str] = set()
    waiting, seen = list(found.outputs), set[int]()
    while waiting:
        tensor = waiting.pop()
        maker = found.producer(tensor)
        if maker is None or tensor in seen:
            continue
        seen.add(tensor)
        if weights_of(maker.layer):
            last.add(maker.name)
        else:
            waiting += maker.inputs
    return last


def _form(node: Node) -> tuple[str, tuple[tuple[int, ...], ...]]:
    """What two layers must share to be compared: their class and the shapes of their weights."""
    return type(node.layer).__name__, tuple(tuple(variable.shape) for variable in weights_of(node.layer))


def _settings(layer: Any) -> Mapping[str, Any]:
    config = layer.get_config()
    return {k: v for k, v in config.items() if k not in _OURS and not k.endswith(_TRAINING)}


# ------------------------------------------------------------------------------------------------ comparing


def _norm(value: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(value.astype(np.float64).ravel()))


def _change(name: str, value: npt.NDArray[Any], base: npt.NDArray[Any]) -> WeightChange:
    if value.dtype == base.dtype and value.tobytes() == base.tobytes():
        return WeightChange(name, True, 0.0)
    try:
        size = _norm(base)
        distance = _norm(value.astype(np.float64) - base.astype(np.float64)) / size if size else None
    except (TypeError, ValueError):  # a table of strings
        distance = None
    return WeightChange(name, False, distance if distance is not None and np.isfinite(distance) else None)


def _compared(node: Node, base: Node, matched_by: Literal["name", "position"], head: bool) -> LayerChange:
    pairs = zip(weights_of(node.layer), weights_of(base.layer), strict=True)
    weights = tuple(_change(weight_name(node.layer, v), numpy(v), numpy(w)) for v, w in pairs)
    ours, theirs = _settings(node.layer), _settings(base.layer)
    settings = tuple(sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)))
    equal = not settings and all(weight.equal for weight in weights)
    state: State = "equal" if equal else "changed"
    return LayerChange(node.name, type(node.layer).__name__, state, base.name, matched_by, head, weights, settings)


def _akin(node: Node, base: Node) -> bool:
    pairs = [(numpy(v), numpy(w)) for v, w in zip(weights_of(node.layer), weights_of(base.layer), strict=True)]
    try:
        apart = sum(_norm(v.astype(np.float64) - w.astype(np.float64)) ** 2 for v, w in pairs)
        return bool(apart <= AKIN**2 * sum(_norm(w) ** 2 for _, w in pairs))
    except (TypeError, ValueError):
        return False


def _by(name: Callable[[Node], str], nodes: Sequence[Node], bases: Sequence[Node]) -> Iterator[tuple[Node, Node]]:
    theirs = {name(base): base for base in bases}
    for node in nodes:
        base = theirs.get(name(node))
        if base is not None and _form(base) == _form(node):
            yield node, theirs.pop(name(node))


def _by_position(nodes: Sequence[Node], bases: Sequence[Node]) -> Iterator[tuple[Node, Node]]:
    matcher = SequenceMatcher(None, [_form(node) for node in nodes], [_form(base) for base in bases], autojunk=False)
    for block in matcher.get_matching_blocks():
        pairs = zip(nodes[block.a : block.a + block.size], bases[block.b : block.b + block.size], strict=True)
        yield from (pair for pair in pairs if _akin(*pair))


def likeness(found: Trace, base: Trace) -> Likeness:
    """Compare a traced model with a traced base. Neither is changed."""
    nodes = [node for node in layers_of(found) if weights_of(node.layer)]
    bases = [node for node in layers_of(base) if weights_of(node.layer)]
    pairs: dict[int, tuple[Node, Literal["name", "position"]]] = {}
    passes: tuple[tuple[Literal["name", "position"], Callable[..., Iterator[tuple[Node, Node]]]], ...] = (
        ("name", lambda a, b: _by(lambda node: node.name, a, b)),
        ("name", lambda a, b: _by(lambda node: node.layer.name, a, b)),  # inside a nested model, where names collide
        ("position", _by_position),
    )
    for how, matched in passes:
        taken = {id(partner) for partner, _ in pairs.values()}
        left = [node for node in nodes if id(node) not in pairs], [node for node in bases if id(node) not in taken]
        pairs.update((id(node), (partner, how)) for node, partner in matched(*left))
    heads = last_layers(found)
    changes = [
        _compared(node, *pairs[id(node)], node.name in heads)
        if id(node) in pairs
        else LayerChange(node.name, type(node.layer).__name__, "new", head=node.name in heads)
        for node in nodes
    ]
    taken = {id(partner) for partner, _ in pairs.values()}
    missing = [
        LayerChange(node.name, type(node.layer).__name__, "missing", node.name)
        for node in bases
        if id(node) not in taken
    ]
    return Likeness((*changes, *missing))
