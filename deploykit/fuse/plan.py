"""The plan: a decision for every source, made before any weight moves.

For each source, in running order, two questions are asked of the trace:

    backward   can what makes my input absorb me *after* itself, through conduits?
               (nobody else may read the tensors on the way, and none may be an output)
    forward    can everything that reads my output absorb me *before* itself, through conduits?
               (none of the tensors on the way may be an output)

Backward is preferred: one layer changes instead of several. A source that goes becomes transparent for
the others, so the round is repeated for those that stayed until nothing changes; every fold is exact on
the model as it stands then, and edits are applied in the order they were decided. A demand is checked
all along its path before it is promised.

Pure: reads the trace and the source layers' parameters, changes nothing, same input same plan.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from deploykit.affine import Affine
from deploykit.errors import InputError
from deploykit.fuse import conduits, sinks, sources
from deploykit.fuse.reasons import Refusal
from deploykit.fuse.sinks import Edit
from deploykit.graph import Node, Trace

# Where one direction says no more than that nothing is there, the other one's code is the interesting one.
UNINFORMATIVE = ("no_sink", "model_input")


@dataclass(frozen=True)
class Decision:
    """What happens to one source."""

    layer: str
    kind: str  # class of the source
    outcome: Literal["fused", "reduced", "kept"]
    direction: Literal["backward", "forward"] | None
    into: tuple[str, ...]
    through: tuple[str, ...]
    code: str
    reason: str


@dataclass(frozen=True, eq=False)
class Plan:
    decisions: tuple[Decision, ...]  # in running order
    edits: tuple[Edit, ...]  # in the order they are to be applied

    @property
    def dropped(self) -> frozenset[str]:
        return frozenset(decision.layer for decision in self.decisions if decision.outcome == "fused")

    def edits_of(self, layer: str) -> tuple[Edit, ...]:
        return tuple(edit for edit in self.edits if edit.layer == layer)

    @property
    def edited(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(edit.layer for edit in self.edits))

    def sources_of(self, layer: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(edit.source for edit in self.edits if edit.layer == layer))


@dataclass(frozen=True, eq=False)
class _Route:
    """A way that is open: the edits at its ends and the names of the conduits passed."""

    edits: tuple[Edit, ...]
    through: tuple[str, ...]


class _Planner:
    def __init__(self, found: Trace, barriers: Collection[str]) -> None:
        self.found = found
        self.barriers = frozenset(barriers)
        self.gone: set[str] = set()  # fused sources: their calls return their input

    def blocked(self, node: Node) -> Refusal | None:
        """What stands against touching a layer at all."""
        if node.name in self.barriers:
            return Refusal("barrier", f"{node.name} is a barrier")
        if len(node.inputs) > 1 and (sinks.is_sink(node) or conduits.is_conduit(node)):
            return Refusal("mask", f"{node.name} is called with a second tensor besides its input")
        return None

    def backward(self, source: str, tensor: int, axis: int, affine: Affine) -> _Route | Refusal:
        """Ask what makes ``tensor`` to apply ``affine`` to it."""
        found = self.found
        readers = found.consumers(tensor)
        if found.is_output(tensor):
            maker = found.producer(tensor)
            return Refusal("model_output", f"{maker.name if maker else 'the input'} is an output of the model")
        node = found.producer(tensor)
        if node is None:
            return Refusal("model_input", "it follows an input of the model")
        if len(readers) > 1:
            others = ", ".join(reader.name for reader in readers[:4])
            return Refusal("fan_out", f"{node.name} feeds {len(readers)} layers ({others})")
        if node.name in self.gone:
            return self.backward(source, node.inputs[0], axis, affine)
        if (barrier := self.blocked(node)) is not None:
            return barrier
        if sinks.is_sink(node):
            refusal = sinks.demand(found, node, axis, affine, "after")
            return refusal or _Route((Edit(node.name, "after", affine, source),), ())
        if conduits.is_conduit(node):
            step = conduits.travel(found, node, axis, affine, forward=False)
            if isinstance(step, Refusal):
                return step
            return _via(node, self.backward(source, node.inputs[0], *step))
        return Refusal("no_sink", f"{node.name} ({type(node.layer).__name__}) cannot take an affine behind it")

    def forward(self, source: str, tensor: int, axis: int, affine: Affine) -> _Route | Refusal:
        """Ask everything that reads ``tensor`` to apply ``affine`` to it first."""
        found = self.found
        if found.is_output(tensor):
            maker = found.producer(tensor)
            return Refusal("model_output", f"{maker.name if maker else 'the input'} is an output of the model")
        edits: list[Edit] = []
        through: list[str] = []
        for node in found.consumers(tensor):
            route = self.into(source, node, axis, affine)
            if isinstance(route, Refusal):
                return route
            edits += route.edits
            through += route.through
        if not edits:
            return Refusal("no_sink", "nothing reads it")
        return _Route(tuple(edits), tuple(dict.fromkeys(through)))

    def into(self, source: str, node: Node, axis: int, affine: Affine) -> _Route | Refusal:
        found = self.found
        if node.name in self.gone:
            return self.forward(source, node.outputs[0], axis, affine)
        if (barrier := self.blocked(node)) is not None:
            return barrier
        if sinks.is_sink(node):
            refusal = sinks.demand(found, node, axis, affine, "before")
            return refusal or _Route((Edit(node.name, "before", affine, source),), ())
        if conduits.is_conduit(node):
            step = conduits.travel(found, node, axis, affine, forward=True)
            if isinstance(step, Refusal):
                return step
            return _via(node, self.forward(source, node.outputs[0], *step))
        return Refusal("no_sink", f"{node.name} ({type(node.layer).__name__}) cannot take an affine in front of it")


def _via(node: Node, route: _Route | Refusal) -> _Route | Refusal:
    return route if isinstance(route, Refusal) else _Route(route.edits, (node.name, *route.through))


def check_names(found: Trace, names: Collection[str], flag: str) -> None:
    """InputError for a name that is no layer of the model, with the nearest ones that are."""
    known = {node.name for node in found.nodes}
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; `deploykit inspect` lists the layers"
            raise InputError(f"{flag} {name}: the model has no layer of that name{hint}")


def plan(
    found: Trace,
    *,
    keep: Collection[str] = (),
    barrier: Collection[str] = (),
    refused: Mapping[str, Refusal] | None = None,
) -> Plan:
    """Decide for every source of a trace.

    ``keep``: sources that must stay. ``barrier``: layers that no affine may enter or cross.
    ``refused``: sources that an earlier round found unfit (conditioning, a failed proof), with the reason.
    """
    check_names(found, keep, "--keep")
    check_names(found, barrier, "--barrier")
    standing = dict(refused or {})
    standing |= {name: Refusal("kept_by_user", f"--keep {name}") for name in keep}
    planner = _Planner(found, barrier)
    decided: dict[str, Decision] = {}
    edits: list[Edit] = []
    nodes = {node.name: node for node in found.nodes if sources.is_source(node)}
    open_sources: dict[str, sources.Source] = {}
    for name, node in nodes.items():
        source = standing.get(name) or planner.blocked(node) or sources.read(found, node)
        if isinstance(source, Refusal):
            decided[name] = _kept(node, source.code, source.reason)
        else:
            open_sources[name] = source

    progress = True
    while progress:
        progress = False
        for name, source in list(open_sources.items()):
            node = source.node
            back = planner.backward(name, node.inputs[0], source.axis, source.affine)
            route = back
            if isinstance(back, Refusal):
                route = planner.forward(name, node.outputs[0], source.axis, source.affine)
            if isinstance(route, Refusal):
                assert isinstance(back, Refusal)
                code = next((c for c in (back.code, route.code) if c not in UNINFORMATIVE), "no_sink")
                decided[name] = _kept(node, code, f"backward: {back.reason}; forward: {route.reason}")
                continue
            into = tuple(edit.layer for edit in route.edits)
            direction: Literal["backward", "forward"] = "forward" if isinstance(back, Refusal) else "backward"
            decided[name] = Decision(
                name, type(node.layer).__name__, "fused", direction, into, route.through, "folded", "exact"
            )
            edits += route.edits
            planner.gone.add(name)
            del open_sources[name]
            progress = True
    return Plan(tuple(decided[name] for name in nodes), tuple(edits))


def _kept(node: Node, code: str, reason: str) -> Decision:
    return Decision(node.name, type(node.layer).__name__, "kept", None, (), (), code, reason)
