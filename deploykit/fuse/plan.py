"""The plan: a decision for every source, made before any weight moves.

A source y = s·x + t leaves in two moves, each a change of x or of y (`deploykit.fuse.change`):

    the scale    backward  x' = s·x          forward  y = s·y', and x + t/s stays
    the shift    backward  x' = x + t        forward  y = y' + t

Both backward is what Conv -> BN wants, both forward what BN -> Dense wants; the scale forward and the shift backward is
the law relu(s·x + t) = s·relu(x + t/s) of pre-activation nets. A move is possible when everything that touches a
changed tensor can follow: sinks by their weights, conduits and merges by changing their other tensors in turn. So each
move is a search: assign the first change, then settle the calls around it until nothing is left to settle or one
refuses. Where a merge leaves a choice (which branch takes a shift) the options are tried in order, and a refusal goes
back to the last choice that led to it. A tensor that several layers read is no obstacle as long as the others can undo
its change; an input or an output of the model never changes.

Sources are asked in turns until nothing changes, in three stages:

    1  both moves, into sinks alone
    2  both moves, into other affines too: two become one, which may make the rest of a path free
    3  the scale alone: one per-channel addition stays ("reduced")

After a success the turn goes back to stage 1. Each fold is exact on the model as it stands then: a source that
left is transparent, one that took something in has its new affine, padding that was changed has its new value.
Of the ways that are open the one that changes the fewest layers is taken; ties prefer backward.

Cost: a move settles at most `SEARCH_LIMIT` calls, and is repeated only when something that it met has changed; so
planning is linear in the number of layers. The factor is largest in dense blocks, where every move meets the whole
block. Pure: reads the trace and the sources' parameters, changes nothing,
same input same plan.

Limits: not a global optimum. Stages are greedy, and a net can be made where another order removes one more.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Literal

import keras
import numpy as np

from deploykit.affine import Affine
from deploykit.errors import InputError
from deploykit.fuse import conduits, sinks, sources
from deploykit.fuse.change import Change, Site, inward, outward, site, unit
from deploykit.fuse.conduits import Option, Ports
from deploykit.fuse.reasons import Refusal
from deploykit.fuse.sinks import Edit
from deploykit.graph import Node, Trace, deep_recursion, key

Outcome = Literal["fused", "reduced", "kept"]
Part = Literal["scale", "shift"]
Way = Literal["backward", "forward"]
Direction = Literal["backward", "forward", "both"]

SEARCH_LIMIT = 500  # calls that one move may settle
NEAR = 50  # of them when a shorter way may yet be found

# How much a refusal says: that nothing is there; that an activation is in the way, as one nearly always is; that the
# affine cannot be taken apart; or more.
LITTLE: Mapping[str, int] = {
    "no_sink": 0,
    "model_input": 1,
    "nonlinear": 2,
    "negative_scale": 3,
    "not_invertible": 3,
}
MUCH = 4

# Refusals after which a source must stay as it is; after any other it may still take in what others give.
UNTOUCHABLE = ("kept_by_user", "proof_failed")


@dataclass(frozen=True)
class Decision:
    """What happens to one source."""

    layer: str
    kind: str  # class of the source, or the name of a plain operation
    outcome: Outcome
    direction: Direction | None
    into: tuple[str, ...]
    through: tuple[str, ...]
    code: str
    reason: str


@dataclass(frozen=True, eq=False)
class Plan:
    """``affines``: what a source that stays has become, where that changed; ``pads``: new values of padding."""

    decisions: tuple[Decision, ...]  # in running order
    edits: tuple[Edit, ...]  # in the order they are to be applied
    affines: Mapping[str, tuple[int, Affine]] = field(default_factory=dict)
    pads: Mapping[str, float] = field(default_factory=dict)

    @property
    def dropped(self) -> frozenset[str]:
        return frozenset(decision.layer for decision in self.decisions if decision.outcome == "fused")

    @property
    def changed(self) -> frozenset[str]:
        """Sources that left, or left in part."""
        return frozenset(decision.layer for decision in self.decisions if decision.outcome != "kept")

    @property
    def edited(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(edit.layer for edit in self.edits))

    def sources_of(self, layer: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(edit.source for edit in self.edits if edit.layer == layer))


@dataclass(frozen=True, eq=False)
class _Move:
    """Part of a source that leaves: what becomes of x or of y, and what is left between them."""

    way: Way
    change: Affine  # x' = change(x) backward, y = change(y') forward
    rest: Affine


def _move(affine: Affine, part: Part, way: Way) -> _Move | None:
    """Take the scale or the shift out of an affine on one side; None where a scale of 0 stands against it."""
    ones, zeros = np.ones(affine.channels), np.zeros(affine.channels)
    scale, shift = Affine(affine.scale, zeros), Affine(ones, affine.shift)
    if part == "scale" and way == "backward":
        return _Move(way, scale, shift)
    if part == "shift" and way == "forward":
        return _Move(way, shift, scale)
    if affine.is_scaling:
        return _Move(way, scale, shift) if part == "scale" else _Move(way, shift, scale)
    divided = affine.inverse()  # s·x + t = s·(x + t/s)
    if divided is None:
        return None
    before = Affine(ones, -divided.shift)
    return _Move(way, scale, before) if part == "scale" else _Move(way, before, scale)


@dataclass(frozen=True, eq=False)
class _Fold:
    """A move that succeeded: what it changes, ready to be taken over."""

    way: Way
    edits: tuple[Edit, ...]
    affines: Mapping[str, tuple[int, Affine]]  # other sources
    pads: Mapping[str, float]
    through: tuple[str, ...]
    rest: Affine


Choices = frozenset[int]  # calls at which a choice led here


@dataclass(frozen=True)
class _Failure:
    """A refusal, and the choices without which it might not have come."""

    refusal: Refusal
    choices: Choices


@dataclass(eq=False)
class _Search:
    """The tensors changed so far and the calls that still have to follow."""

    source: Node
    changes: dict[int, Change]
    choices: dict[int, Choices]  # tensor -> the choices that led to its change
    pending: list[tuple[bool, int]]  # heap of (passes changes on, node index)
    causes: dict[int, str]  # node index -> the layer whose output it also reads, where that is why it is asked

    def copy(self) -> _Search:
        return _Search(self.source, dict(self.changes), dict(self.choices), list(self.pending), dict(self.causes))

    def led_to(self, node: Node) -> Choices:
        tensors = (*node.inputs, *node.outputs)
        return frozenset().union(*(self.choices.get(tensor, frozenset()) for tensor in tensors))


class _Planner:
    def __init__(self, found: Trace, barriers: Collection[str]) -> None:
        self.found = found
        self.barriers = frozenset(barriers)
        self.sources = {node.name for node in found.nodes if sources.is_source(node)}
        self.gone: set[str] = set()  # fused sources: their calls return their input
        self.open: dict[str, sources.Source] = {}  # sources that stay so far, with their affine as it is now
        self.closed: set[str] = set()  # sources that may not even take in what others give
        self.pads: dict[str, float] = {}
        self.edits: dict[str, list[Edit]] = {}
        self.sites: dict[int, Site] = {}
        self.limit = SEARCH_LIMIT
        self.left = 0  # of the limit
        self.met: set[str] = set()
        self.merging = False  # stage 2: other affines are sinks too

    def site(self, node: Node) -> Site:
        """A call as the rules see it, with its padding and its weights as they are now."""
        if node.index not in self.sites:
            self.sites[node.index] = site(self.found, node)
        at = self.sites[node.index]
        if node.name not in self.pads and node.name not in self.edits:
            return at
        return replace(at, pad=self.pads.get(node.name), edits=tuple(self.edits.get(node.name, ())))

    # ------------------------------------------------------------------------------------------ one move

    def attempt(self, source: sources.Source, move: _Move) -> _Fold | Refusal:
        """Make one move of a source, if everything around can follow."""
        node = source.node
        same = Change.to(source.axis, unit(source.affine.channels))
        back = move.way == "backward"
        changed = (Change.to if back else Change.undone_by)(source.axis, move.change)
        search = _Search(node, {}, {}, [], {})
        self.left = self.limit
        self.met.add(node.name)
        # both ends are set, changed or not: nothing that follows may change them otherwise
        for tensor, change in (
            (node.inputs[0], changed if back else same),
            (node.outputs[0], same if back else changed),
        ):
            failure = self.change(search, tensor, change, node, frozenset())
            if failure is not None:
                return failure.refusal
        solved = self.solve(search)
        return solved.refusal if isinstance(solved, _Failure) else self.harvest(source, move, solved)

    def change(self, search: _Search, tensor: int, change: Change, asker: Node, choices: Choices) -> _Failure | None:
        """Set the change of a tensor and ask the calls around it, but for the asker, to follow."""
        found = self.found
        known = search.changes.get(tensor)
        if known is not None:
            if known.agrees(change) or (known.is_identity and change.is_identity):
                return None
            refusal = Refusal("conflict", f"{asker.name} would need its neighbours in two ways at once")
            return _Failure(refusal, choices | search.choices[tensor])
        search.changes[tensor], search.choices[tensor] = change, choices
        if change.is_identity:
            return None
        maker = found.producer(tensor)
        if found.is_output(tensor):
            end = Refusal("model_output", f"{maker.name if maker else 'the input'} is an output of the model")
            return _Failure(end, choices)
        if maker is None:
            return _Failure(Refusal("model_input", "it follows an input of the model"), choices)
        behind = maker is not asker  # asked from behind: the other readers of the tensor must undo it
        cause = search.causes.get(asker.index)
        if behind:
            self.ask(search, maker, cause)
        for reader in found.consumers(tensor):
            if reader is not asker:
                self.ask(search, reader, cause or (maker.name if behind else None))
        return None

    def ask(self, search: _Search, node: Node, cause: str | None) -> None:
        # calls that pass nothing on come first, since they may end the search; the others in running order, so that
        # all that reaches a merge from its branches is known when it is settled
        heapq.heappush(search.pending, (self.passes_on(node), node.index))
        if cause is not None:
            search.causes.setdefault(node.index, cause)

    def passes_on(self, node: Node) -> bool:
        if node.name in self.sources:
            return node.name in self.gone
        at = self.site(node)
        return conduits.is_conduit(at) or conduits.is_merge(at)

    def solve(self, search: _Search) -> _Search | _Failure:
        """Settle every pending call; at a choice, the first option that leads to an end."""
        while search.pending:
            node = self.found.nodes[heapq.heappop(search.pending)[1]]
            self.left -= 1
            self.met.add(node.name)
            led = search.led_to(node)
            if self.left < 0:  # no other choice is worth trying
                return _Failure(Refusal("search_limit", f"no end within {self.limit} layers"), frozenset())
            options = self.settle(search, node)
            if isinstance(options, Refusal):
                return _Failure(self.explained(search, node, options), led)
            if len(options) > 1:
                return self.choose(search, node, options, led)
            failure = self.follow(search, node, options[0], led)
            if failure is not None:
                return failure
        return search

    def choose(
        self, search: _Search, node: Node, options: Sequence[Mapping[int, Change]], led: Choices
    ) -> _Search | _Failure:
        """Try options in order; back to an earlier choice as soon as this one has nothing to do with a failure."""
        first: Refusal | None = None
        blamed = led
        for option in options:
            trial = search.copy()
            failure = self.follow(trial, node, option, led | {node.index})
            if failure is None:
                solved = self.solve(trial)
                if isinstance(solved, _Search):
                    return solved
                failure = solved
            if node.index not in failure.choices:
                return failure
            first = first or failure.refusal
            blamed |= failure.choices - {node.index}
        assert first is not None
        return _Failure(first, blamed)

    def follow(self, search: _Search, node: Node, option: Mapping[int, Change], choices: Choices) -> _Failure | None:
        for tensor, change in option.items():
            failure = self.change(search, tensor, change, node, choices)
            if failure is not None:
                return _Failure(self.explained(search, node, failure.refusal), failure.choices)
        return None

    def explained(self, search: _Search, node: Node, refusal: Refusal) -> Refusal:
        """Where a layer was asked only because it shares a tensor, that is the reason to tell."""
        maker = search.causes.get(node.index)
        if maker is None or refusal.code in ("fan_out", "search_limit"):
            return refusal
        return Refusal("fan_out", f"{maker} also feeds {node.name}, which cannot undo the change: {refusal.reason}")

    # ------------------------------------------------------------------------------------------ one call

    def settle(self, search: _Search, node: Node) -> Sequence[Mapping[int, Change]] | Refusal:
        """The ways in which a call can follow the changes around it: changes that its other tensors must take."""
        if node.name in self.gone:
            return self.wire(search, node)
        if node.name in self.barriers:
            return Refusal("barrier", f"{node.name} is a barrier")
        if node.name in self.sources:
            return self.take_in(search, node)
        at = self.site(node)
        sink = sinks.is_sink(at)
        if conduits.is_merge(at):
            return self.merge(search, at)
        if len(node.inputs) > 1 and (conduits.is_conduit(at) or (sink and not sinks.takes_several(at))):
            return Refusal("mask", f"{node.name} is called with a second tensor besides its input")
        if sink:
            return self.absorb(search, at)
        if conduits.is_conduit(at):
            return self.pass_on(search, at)
        if isinstance(at.layer, keras.layers.Masking):
            return Refusal("mask", f"{node.name} makes a mask of the values themselves")
        where = "behind it" if node.outputs[0] in search.changes else "in front of it"
        return Refusal("no_sink", f"{node.name} ({type(at.layer).__name__}) cannot take an affine {where}")

    def wire(self, search: _Search, node: Node) -> Sequence[Mapping[int, Change]] | Refusal:
        ends = node.inputs[0], node.outputs[0]
        known = [search.changes.get(tensor) for tensor in ends]
        change = known[0] or known[1]
        assert change is not None
        return [dict.fromkeys(ends, change)]

    def take_in(self, search: _Search, node: Node) -> Sequence[Mapping[int, Change]] | Refusal:
        """Another source: from stage 2 on it can become whatever is asked of it."""
        stays = Refusal("no_sink", f"{node.name} ({type(node.layer).__name__}) cannot take an affine itself")
        if not self.merging or node.name in self.closed or node.name not in self.open:
            return stays
        source = self.open[node.name]
        before, after = search.changes.get(node.inputs[0]), search.changes.get(node.outputs[0])
        if (before is not None and before.back is None) or (after is not None and after.forth is None):
            return Refusal("not_invertible", f"{node.name} cannot undo a scale of 0")
        for change in (before, after):
            if change is not None and change.onto(source.axis, source.affine.channels) is None:
                return Refusal("axis_mismatch", f"{node.name} acts along another axis")
        return [{}]

    def absorb(self, search: _Search, at: Site) -> Sequence[Mapping[int, Change]] | Refusal:
        for taken in self.taken(search, at):
            if isinstance(taken, Refusal):
                return taken
        return [{}]

    def taken(self, search: _Search, at: Site) -> Iterator[tuple[sinks.Side, Change, int] | Refusal]:
        """Every change around a sink as its weights would take it: (side, change, port)."""
        node = at.node
        if self.found.calls(node) > 1:
            yield Refusal("shared_layer", f"{node.name} is called {self.found.calls(node)} times")
            return
        ports = [(node.inputs.index(tensor), tensor) for tensor in dict.fromkeys(node.inputs)]
        sides: list[tuple[sinks.Side, int, int]] = [("before", port, tensor) for port, tensor in ports]
        sides += [("after", port, tensor) for port, tensor in enumerate(node.outputs)]
        for side, port, tensor in sides:
            change = search.changes.get(tensor)
            if change is None or change.is_identity:
                continue
            shape = at.inputs[port] if side == "before" else at.output
            seen = inward(at, change, shape)
            if not isinstance(seen, Refusal) and side == "after" and port:
                seen = Refusal("no_sink", f"{node.name} cannot take an affine behind its states")
            if not isinstance(seen, Refusal):
                seen = sinks.demand(at, side, seen, port)
            yield seen if isinstance(seen, Refusal) else (side, seen, port)

    def pass_on(self, search: _Search, at: Site) -> Sequence[Mapping[int, Change]] | Refusal:
        ends = at.node.inputs[0], at.node.outputs[0]
        forward = search.changes.get(ends[0])
        change = forward or search.changes[ends[1]]
        seen = inward(at, change, at.inputs[0] if forward else at.output)
        if isinstance(seen, Refusal):
            return seen
        moved = conduits.travel(at, seen, forward=forward is not None)
        if isinstance(moved, Refusal):
            return moved
        if conduits.pads_constant(at):
            value = self.new_padding(at, moved if forward is None else seen)
            if isinstance(value, Refusal):
                return value
        return [{ends[1 if forward else 0]: outward(at, moved)}]

    def new_padding(self, at: Site, change: Change) -> float | Refusal:
        """The constant that a padding layer must put around its input when that has changed."""
        value = conduits.new_padding(at, change)
        if isinstance(value, Refusal) or value == conduits.pad_value(at):
            return value
        if at.steps or self.found.calls(at.node) > 1:
            return Refusal("padded_shift", f"{at.name} would have to pad with {value:.3g} in one place only")
        return value

    def merge(self, search: _Search, at: Site) -> Sequence[Mapping[int, Change]] | Refusal:
        node = at.node
        if len(set(node.inputs)) < len(node.inputs):
            return Refusal("fan_out", f"{node.name} reads one tensor twice")
        ins = tuple(search.changes.get(tensor) for tensor in node.inputs)
        makers = [self.found.producer(tensor) for tensor in node.inputs]
        made = [-1 if maker is None else maker.index for maker in makers]
        nearest = sorted(range(len(made)), key=made.__getitem__, reverse=True)
        ports = Ports(ins, search.changes.get(node.outputs[0]), tuple(nearest))
        options = conduits.MERGES[key(at.layer)](at, ports)
        if isinstance(options, Refusal):
            return options
        return [self.tensors_of(node, option) for option in options]

    @staticmethod
    def tensors_of(node: Node, option: Option) -> dict[int, Change]:
        changes = {node.inputs[port]: change for port, change in option.inputs.items()}
        return changes if option.output is None else {**changes, node.outputs[0]: option.output}

    # ------------------------------------------------------------------------------------------ taking over

    def harvest(self, source: sources.Source, move: _Move, search: _Search) -> _Fold:
        """What a solved search asks of every layer it touched."""
        name = source.node.name
        edits: list[Edit] = []
        affines: dict[str, tuple[int, Affine]] = {}
        pads: dict[str, float] = {}
        through: list[str] = []
        touched = {node.index: node for tensor in search.changes for node in self.around(search, tensor)}
        for _, node in sorted(touched.items()):
            if node is source.node or node.name in self.gone:
                continue
            at = self.site(node)
            if node.name in self.sources:
                affines[node.name] = self.took(search, node)
            elif sinks.is_sink(at):
                for taken in self.taken(search, at):
                    assert not isinstance(taken, Refusal)
                    side, change, port = taken
                    affine = change.back if side == "before" else change.forth
                    assert affine is not None
                    roles = sinks.roles(at, port) if side == "before" else ()
                    edits.append(Edit(node.name, side, change.axis, affine, name, roles))
                    if side == "before" and sinks.pads_anew(at, change):
                        pads[node.name] = self.padded_with(at, change)
            else:
                through.append(node.name)
                if conduits.is_conduit(at) and conduits.pads_constant(at):
                    value = self.padded_with(at, search.changes[node.inputs[0]])
                    if value != conduits.pad_value(at):
                        pads[node.name] = value
        return _Fold(move.way, tuple(edits), affines, pads, tuple(through), move.rest)

    @staticmethod
    def padded_with(at: Site, change: Change) -> float:
        value = conduits.new_padding(at, change)
        assert not isinstance(value, Refusal)  # settled
        return value

    def around(self, search: _Search, tensor: int) -> Iterator[Node]:
        if search.changes[tensor].is_identity:
            return
        maker = self.found.producer(tensor)
        if maker is not None:
            yield maker
        yield from self.found.consumers(tensor)

    def took(self, search: _Search, node: Node) -> tuple[int, Affine]:
        """What another source becomes: its own affine between what it must undo and what it must do."""
        source = self.open[node.name]
        affine = source.affine
        before, after = search.changes.get(node.inputs[0]), search.changes.get(node.outputs[0])
        if before is not None and before.back is not None:
            affine = self.along(source, before.back, before).then(affine)
        if after is not None and after.forth is not None:
            affine = affine.then(self.along(source, after.forth, after))
        return source.axis, affine

    def apply(self, name: str, fold: _Fold) -> Callable[[], None]:
        """Make a fold of the source ``name`` part of the model as it stands; the answer takes it back."""
        affines = {name: (self.open[name].axis, fold.rest), **fold.affines}
        open_before = {layer: self.open[layer] for layer in affines}
        pads_before = {layer: self.pads[layer] for layer in fold.pads if layer in self.pads}
        for layer, (axis, affine) in affines.items():
            self.open[layer] = replace(self.open[layer], axis=axis, affine=affine)
        self.pads.update(fold.pads)
        for edit in fold.edits:
            self.edits.setdefault(edit.layer, []).append(edit)

        def undo() -> None:
            self.open.update(open_before)
            for layer in fold.pads:
                del self.pads[layer]
            self.pads.update(pads_before)
            for edit in reversed(fold.edits):
                self.edits[edit.layer].pop()

        return undo

    @staticmethod
    def along(source: sources.Source, affine: Affine, change: Change) -> Affine:
        return affine if change.axis == source.axis else affine.of_size(source.affine.channels)


@dataclass(eq=False)
class _Record:
    """What is known of one source while the plan is made."""

    node: Node
    refusals: dict[str, Refusal] = field(default_factory=dict)  # by what was tried
    asked: dict[int, int] = field(default_factory=dict)  # stage -> clock of the last attempt that failed
    met: dict[int, frozenset[str]] = field(default_factory=dict)  # stage -> what that attempt met
    folds: list[_Fold] = field(default_factory=list)

    @property
    def into(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(n for fold in self.folds for n in (*(e.layer for e in fold.edits), *fold.affines)))

    @property
    def through(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for fold in self.folds for name in fold.through))

    @property
    def direction(self) -> Direction | None:
        ways = {fold.way for fold in self.folds}
        return None if not ways else ways.pop() if len(ways) == 1 else "both"

    def decision(self, outcome: Outcome, code: str, reason: str) -> Decision:
        kind = sources.kind_of(self.node)
        return Decision(self.node.name, kind, outcome, self.direction, self.into, self.through, code, reason)

    def blocked_by(self) -> Refusal:
        """The refusal that says most: of what stands behind and in front, then of taking the affine apart."""
        told = [self.refusals[way] for way in ("backward", "forward", "both", "in part") if way in self.refusals]
        ends = [refusal for refusal in told[:2] if _says(refusal) == MUCH]
        found = max(ends or [refusal for refusal in told if _says(refusal) < MUCH], key=_says, default=None)
        return found or Refusal("no_sink", "nothing was asked")

    def told(self) -> str:
        """What stood in each way; a reason that comes again is told once."""
        ways: dict[str, str] = {}
        for way, refusal in self.refusals.items():
            ways.setdefault(refusal.reason, way)
        return "; ".join(f"{way}: {reason}" for reason, way in ways.items())


def _says(refusal: Refusal) -> int:
    return LITTLE.get(refusal.code, MUCH)


def check_names(found: Trace, names: Collection[str], flag: str) -> None:
    """InputError for a name that is no layer of the model, with the nearest ones that are."""
    known = {node.name for node in found.nodes}
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; `deploykit inspect` lists the layers"
            raise InputError(f"{flag} {name}: the model has no layer of that name{hint}")


class _Turns:
    """Asks the sources in turns, stage by stage, until nothing changes."""

    def __init__(
        self, planner: _Planner, records: Mapping[str, _Record], whole: Collection[str], part: Collection[str]
    ):
        self.planner, self.records = planner, records
        self.whole, self.part = frozenset(whole), frozenset(part)  # what may leave wholly; what at least in part
        self.edits: list[Edit] = []
        self.clock = 0
        self.passable_at: dict[str, int] = {}  # layer -> when it last became another one to pass

    def run(self) -> None:
        while any(self.sweeps(stage) for stage in (1, 2, 3)):
            pass

    def sweeps(self, stage: int) -> bool:
        """Ask every open source in one stage, back and forth; whether anything changed."""
        self.planner.merging = stage == 2
        names = [name for name in self.planner.open if name in (self.whole if stage < 3 else self.part)]
        any_progress = progress = False
        while True:
            progress = False
            for name in names:
                if name in self.planner.open and self.worth_asking(name, stage):
                    progress |= self.ask(name, stage)
            any_progress |= progress
            if not progress or stage == 3:
                return any_progress
            names.reverse()

    def worth_asking(self, name: str, stage: int) -> bool:
        record = self.records[name]
        if stage not in record.asked:
            return True
        return any(self.passable_at.get(met, -1) >= record.asked[stage] for met in record.met[stage])

    def ask(self, name: str, stage: int) -> bool:
        """Let a source leave in one of the ways of a stage; whether it did."""
        record, planner = self.records[name], self.planner
        affine = planner.open[name].affine
        planner.met = {name}
        refusals: dict[str, Refusal] = {}
        ways: Sequence[_Way] = _WAYS
        if stage == 3:
            ways = _PARTS if not affine.is_scaling and not (affine.scale == 1).all() else ()
        for planner.limit in (NEAR, SEARCH_LIMIT):  # a short way is better than a long one
            best: list[_Fold] | None = None
            further = []
            tried: dict[tuple[Part, Way], _Fold | Refusal] = {}
            for way in ways:
                found = self.folds(name, way, tried)
                if not isinstance(found, Refusal):
                    if best is None or _touched(found) < _touched(best):
                        best = found
                    if _touched(best) <= 1:
                        break
                    continue
                if found.code == "search_limit" and planner.limit < SEARCH_LIMIT:
                    further.append(way)
                    continue
                told = "in part" if stage == 3 else way.name
                if told not in refusals or _says(found) > _says(refusals[told]):
                    refusals[told] = found
            if best is not None:
                self.take_over(name, best)
                return True
            ways = further
        if stage != 2:  # what other affines refuse is not what stands in the way
            of_other_stage = {way: r for way, r in record.refusals.items() if (way == "in part") != (stage == 3)}
            record.refusals = {**of_other_stage, **refusals}
        record.asked[stage], record.met[stage] = self.clock, frozenset(planner.met)
        return False

    def folds(self, name: str, way: _Way, tried: dict[tuple[Part, Way], _Fold | Refusal]) -> list[_Fold] | Refusal:
        """The folds of all moves of one way, or why one of them is not possible; nothing is changed.

        ``tried``: first moves that other ways began with, and what became of them.
        """
        planner = self.planner
        folds: list[_Fold] = []
        undo: list[Callable[[], None]] = []
        refusal: Refusal | None = None
        for part, side in way.moves:
            source = planner.open[name]
            first = not folds
            if source.affine.is_scaling if part == "shift" else bool((source.affine.scale == 1).all()):
                continue  # nothing of that kind to move
            found = tried.get((part, side)) if first else None
            if found is None:
                move = _move(source.affine, part, side)
                found = _zeros(source.affine) if move is None else planner.attempt(source, move)
            if first:
                tried[part, side] = found
            if isinstance(found, Refusal):
                refusal = found
                break
            folds.append(found)
            undo.append(planner.apply(name, found))
        for back in reversed(undo):
            back()
        return refusal or folds

    def take_over(self, name: str, folds: Sequence[_Fold]) -> None:
        """Make folds part of the model as it stands; a source of which nothing is left is gone."""
        planner = self.planner
        self.clock += 1
        for fold in folds:
            planner.apply(name, fold)
            self.edits += fold.edits
            self.passable_at.update(dict.fromkeys(fold.pads, self.clock))
            for layer in fold.affines:
                self.records[layer].asked.clear()
        self.records[name].folds += folds
        if planner.open[name].affine.is_identity:
            planner.gone.add(name)
            del planner.open[name]
            self.passable_at[name] = self.clock


def _touched(folds: Sequence[_Fold]) -> int:
    """How many layers a way changes: fewer is shorter, and costs less rounding."""
    return len({name for fold in folds for name in (*(edit.layer for edit in fold.edits), *fold.affines)})


@dataclass(frozen=True)
class _Way:
    name: str
    moves: tuple[tuple[Part, Way], ...]


_WAYS = (
    _Way("backward", (("scale", "backward"), ("shift", "backward"))),
    _Way("forward", (("scale", "forward"), ("shift", "forward"))),
    _Way("forward", (("shift", "forward"), ("scale", "forward"))),  # a scale of 0 lets no shift pass it
    _Way("both", (("scale", "forward"), ("shift", "backward"))),
    _Way("both", (("scale", "backward"), ("shift", "forward"))),
)
_PARTS = (_Way("in part", (("scale", "backward"),)), _Way("in part", (("scale", "forward"),)))


def _zeros(affine: Affine) -> Refusal:
    zero = np.flatnonzero(affine.inverse_is_missing)
    channels = ", ".join(map(str, zero[:4])) + (", ..." if len(zero) > 4 else "")
    return Refusal("not_invertible", f"the scale of {len(zero)} channels is 0 (channel {channels})")


def plan(
    found: Trace,
    *,
    keep: Collection[str] = (),
    barrier: Collection[str] = (),
    refused: Mapping[str, Refusal] | None = None,
    reducible: Collection[str] = (),
    only: Collection[str] | None = None,
) -> Plan:
    """Decide for every source of a trace.

    ``keep``: sources that must stay. ``barrier``: layers that no affine may enter or cross.
    ``refused``: sources that an earlier round found unfit (conditioning, a failed proof), with the reason; of these
    the ``reducible`` ones may still leave in part.
    ``only``: the sources that may leave in a trial; the others stay, but may take in what these give.
    """
    check_names(found, keep, "--keep")
    check_names(found, barrier, "--barrier")
    standing = dict(refused or {})
    standing |= {name: Refusal("kept_by_user", f"--keep {name}") for name in keep}
    planner = _Planner(found, barrier)
    records = {node.name: _Record(node) for node in found.nodes if sources.is_source(node)}
    final: dict[str, Refusal] = {}
    with deep_recursion(len(found.nodes)):
        for name, record in records.items():
            source = _readable(planner, record.node)
            if isinstance(source, Refusal):
                final[name] = source
                continue
            planner.open[name] = source
            if name in standing:
                final[name] = standing[name]
                if standing[name].code in UNTOUCHABLE:
                    planner.closed.add(name)
        free = [name for name in records if name not in final and (only is None or name in only)]
        partly = [name for name in reducible if name in final and (only is None or name in only)]
        turns = _Turns(planner, records, free, [*free, *partly])
        turns.run()
    decisions = tuple(_decided(record, planner, final.get(name)) for name, record in records.items())
    for name, (node, layer) in sources.enclosed(found).items():
        reason = f"{node.name} ({type(node.layer).__name__}) is called as a whole"
        decisions += (Decision(name, type(layer).__name__, "kept", None, (), (), "enclosed", reason),)
    changed = {name for record in records.values() for fold in record.folds for name in fold.affines}
    changed |= {name for name, record in records.items() if record.folds}
    affines = {name: (s.axis, s.affine) for name, s in planner.open.items() if name in changed}
    return Plan(decisions, tuple(turns.edits), affines, dict(planner.pads))


def _readable(planner: _Planner, node: Node) -> sources.Source | Refusal:
    if node.name in planner.barriers:
        return Refusal("barrier", f"{node.name} is a barrier")
    return sources.read(planner.found, node)


def _decided(record: _Record, planner: _Planner, standing: Refusal | None) -> Decision:
    if record.node.name in planner.gone:
        return record.decision("fused", "folded", "exact" if record.folds else "it is the identity")
    if record.folds:
        why = standing or record.blocked_by()
        return record.decision(
            "reduced", why.code, f"the shift stays: {standing.reason if standing else record.told()}"
        )
    why = standing or record.blocked_by()
    return record.decision("kept", why.code, standing.reason if standing else record.told())
