"""Worst case: the input, within the range of the data, on which a candidate differs most from the original.

Random data miss what is wrong for few inputs only: an activation that is cut off above a value the data hardly reach,
one row of an Embedding, a branch that a threshold switches on. The search looks for such inputs with a budget of
evaluations of the candidate. What it maximises is the ratio of the error to what the law in force allows a sample
(`deploykit.verify`); above 1 the candidate fails. q and the median of S are taken from the data.

    policy      ratio(x) = max over outputs, norms of   ‖c−r‖ / (f·max(N(x), q·S(x)) + 4·eps·S(x))
                S(x) = max(‖r‖, median), f = 8 in L2 and 16 in the maximum norm
    fidelity    ratio(x) = max over outputs of   ‖c−r‖ / (10^(−dB/20)·S(x)),  dB that of each sample
    tolerance   ratio(x) = max over elements of   |c−r| / (atol + rtol·|r|)

Of whole numbers it counts how many differ where the original itself does not, against how many of a sample may. Under
fidelity they do not count: it allows a share of all answers to change, and a search looks for just these. The law of
the channels is one over all samples: a search cannot ask it of a point.

Where it looks, in turns
------------------------
    data        the samples themselves: what the search must beat
    corners     every channel at one end of its range, or at a random level; the whole sample or blocks of it; two
                samples joined; numbers that count something (tokens) each at least once, as far as the budget goes
    gradient    ascent in the box, by the sign of the gradient in float64: of the difference between original and
                fused Keras model where there is one, and of single outputs and random mixtures of them, up and
                down, which drives hidden units to where data do not; the points on the way are evaluated
    evolution   (μ, λ) with self-adapting steps (Schwefel; Beyer & Schwefel, *Evolution strategies*, 2002): the best
                points so far, crossed and moved, in all elements, in a block or in one

Opaque models, integer inputs and candidates without a Keras twin go without the gradient.

Being fair
----------
A search for the largest ratio also finds inputs on which the *original* happens to be lucky: N(x) is one draw. So the
points found are judged with N(x) as the largest own error at x and at `NEIGHBOURS` points within one unit in the last
place of it; for a candidate that must not fail where the original does not know its own answer, these points count as
x itself. Of whole numbers as many may differ as the original's own do at one of these points.

The box is the data's own range: per feature for inputs of rank 2, else per channel; what does not vary in the data does
not vary here. Inside of it inputs need not look like data; a failure outside of what can occur is for people to
judge, which is why the sample is kept. The same seed gives the same sample.

Limits: no proof. A fault that shows on a fraction p of the box is found with chance 1 − (1−p)ⁿ where no slope leads to
it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deploykit.compare import Law
from deploykit.errors import DataError, InputError
from deploykit.files import whole_file
from deploykit.fuse.proof import slice_of
from deploykit.graph import Trace, flat_call, functional_form, replay, run, runnable, trace
from deploykit.opaque import graph_of, nudged
from deploykit.runtimes import Session
from deploykit.verify import FLOAT32, Fidelity, Policy, Scale, Tolerance, archive, norms, number, ratios

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Points = dict[str, Array]

NEIGHBOURS = 6
FINALISTS = 4  # points that are judged with their neighbours
PARENTS = 4
CHILDREN = 12
SHARES = {"corners": 0.35, "gradient": 0.25}  # of the budget; evolution takes the rest
STEPS = 6  # of one ascent


@dataclass(frozen=True, eq=False)
class WorstCase:
    """What was found. ``ratio``: the error over what is allowed; None where one of them is not finite.

    ``sample``: the inputs by name, a batch of one (or of the model's own size). ``among_data``: the largest ratio of
    the samples given. ``way``: which part of the search found it. ``evaluations``: of the candidate.
    """

    passed: bool
    ratio: float | None
    among_data: float | None
    output: str
    error: float | None
    allowed: float | None
    way: str
    evaluations: int
    seed: int
    sample: Mapping[str, Array] = field(repr=False)
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        names = [name for name in self.__dataclass_fields__ if name != "sample"]
        return {name: getattr(self, name) for name in names}

    def text(self) -> str:
        found = "-" if self.ratio is None else f"{self.ratio:.3g}"
        known = "-" if self.among_data is None else f"{self.among_data:.3g}"
        verdict = "no input was found that fails" if self.passed else f"FAILS: {self.reason}"
        return (
            f"worst case: {verdict} (error / allowed {found} on output {self.output}, found by {self.way}; "
            f"{known} among the data; {self.evaluations} evaluations)"
        )

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the sample as an .npz by input name, which ``--data`` replays."""
        with whole_file(path, force=force) as target:
            target.write_bytes(archive(self.sample))
        return Path(path)


def search(
    original: Any,
    candidate: Session,
    samples: Mapping[str, Array],
    *,
    budget: int = 400,
    seed: int = 0,
    fused: Any = None,
    law: Law = FLOAT32,
    boxes: Mapping[str, Box] | None = None,
) -> WorstCase:
    """Find the input on which ``candidate`` is furthest beyond what ``law`` allows, with ``budget`` evaluations of it.

    ``samples``: of the data, by input name; the search starts from them, and they set the scale. ``boxes``: the range
    of each input (`boxes_of`), by default that of ``samples``. ``fused``: the candidate as a Keras model, or one that
    computes what it should, for the gradient. Raises DataError without samples and for a candidate whose outputs have
    other shapes, InputError for a budget that is none.
    """
    if budget < 1:
        raise InputError(f"a search with {budget} evaluations finds nothing; give at least 1")
    if not samples or not len(next(iter(samples.values()))):
        raise DataError("a search needs samples to start from; give at least one")
    return _Search(original, candidate, samples, boxes or boxes_of([samples]), law, seed, fused).found(budget)


# -------------------------------------------------------------------------------------------------- the box


@dataclass(frozen=True, eq=False)
class Box:
    """The range of one input: ``low`` and ``high`` broadcast over samples."""

    low: Array
    high: Array
    dtype: np.dtype[Any]

    @classmethod
    def around(cls, array: Array) -> Box:
        if array.dtype.kind not in "fiub":
            raise DataError(f"a search cannot vary inputs of dtype {array.dtype}; compare them with data instead")
        if not np.isfinite(array).all():
            raise DataError("a search has no range to look in where the data hold infinity; give finite data")
        channel = array.ndim - 1
        if array.ndim >= 4 and array.shape[1] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4):
            channel = 1
        others = tuple(axis for axis in range(array.ndim) if axis != channel or axis == 0)
        low, high = (find(array, axis=others, keepdims=True).astype(np.float64) for find in (np.min, np.max))
        return cls(low, high, array.dtype)

    def with_box(self, other: Box) -> Box:
        """The range of both."""
        return Box(np.minimum(self.low, other.low), np.maximum(self.high, other.high), self.dtype)

    @property
    def whole(self) -> bool:
        return self.dtype.kind != "f"

    def inside(self, values: Floats) -> Array:
        """Values of the input's dtype within the range."""
        fitted = np.clip(values, self.low, self.high)
        fitted = np.rint(fitted) if self.whole else fitted
        return np.asarray(fitted.astype(self.dtype))

    def at(self, levels: Floats) -> Array:
        """Points from levels between 0 and 1."""
        return self.inside(self.low + levels * (self.high - self.low))


def boxes_of(batches: Iterable[Mapping[str, Array]]) -> dict[str, Box]:
    """The range of each input over all batches of samples; one batch is looked at at a time."""
    boxes: dict[str, Box] = {}
    for arrays in batches:
        for name, array in arrays.items():
            box = Box.around(np.asarray(array))
            boxes[name] = boxes[name].with_box(box) if name in boxes else box
    return boxes


# -------------------------------------------------------------------------------------------------- judging


@dataclass(frozen=True, eq=False)
class _Errors:
    """Per output and norm (a column), of each point: the error, the original's own and the size of the reference.

    The first column of whole numbers: how many differ, how many of the original's own do, how many there are.
    """

    error: Floats
    own: Floats
    size: Floats

    def with_own(self, own: Floats) -> _Errors:
        return _Errors(self.error, own, self.size)


def _measured(r: Array, o: Array, c: Array | None, law: Law) -> tuple[Floats, Floats, Floats]:
    """Errors of c and o and the size of r in L2 and in the maximum norm, one row for each point.

    An original that disagrees about what is finite is no judge: its own error is infinite. Under a tolerance the second
    column is the element furthest beyond (or nearest to) what it may be off by.
    """
    if r.dtype.kind != "f":
        return _flips(r, o, r if c is None else c)
    r, o, c = (np.asarray(x, dtype=np.float64).reshape(len(r), -1) for x in (r, o, r if c is None else c))
    with np.errstate(all="ignore"):
        finite = np.isfinite(r)
        doubt, broken = ((finite != np.isfinite(x)).any(axis=1) for x in (o, c))
        error, own, size = (np.abs(np.where(np.isfinite(x), x, 0.0)) for x in (c - r, o - r, r))
        found = [np.stack([norms(x), x.max(axis=1, initial=0.0)], axis=1) for x in (error, own, size)]
        if isinstance(law, Tolerance) and error.size:
            here, place = np.arange(len(r)), np.argmax(ratios(error, law.allowed(size)), axis=1)
            found[0][:, 1], found[2][:, 1] = error[here, place], size[here, place]
    found[0][broken], found[1][doubt] = math.inf, math.inf
    return found[0], found[1], found[2]


def _flips(r: Array, o: Array, c: Array) -> tuple[Floats, Floats, Floats]:
    """Whole numbers: how many of c differ where o does not, how many of o do, and how many there are."""
    r, o, c = (x.reshape(len(x), -1) for x in (r, o, c))
    excused = r != o
    wrong = ((r != c) & ~excused).sum(axis=1)
    own = np.where(excused.all(axis=1), math.inf, excused.sum(axis=1))
    counts = (wrong, own, np.full(len(r), r.shape[1]))
    error, own, size = (np.repeat(np.asarray(x, np.float64)[:, None], 2, axis=1) for x in counts)
    return error, own, size


class _Judge:
    """The reference, the original and the candidate on points; q and the median from the data."""

    def __init__(self, original: Any, candidate: Session, found: Trace, law: Law) -> None:
        self.found, self.original, self.candidate, self.law = found, original, candidate, law
        opaque = graph_of(original) is not None
        self.exact = original if opaque else replay(found, dtype="float64")
        self.plain = nudged(original, 0) if opaque else original
        self.batch = slice_of(found)
        self.names = [spec.name for spec in found.signature.outputs]
        self.whole = ["float" not in spec.dtype for spec in found.signature.outputs]
        self.fixed = found.signature.inputs[0].shape[0]
        self.spent = 0
        self.scales = [Scale()] * (2 * len(self.names))  # of each column

    def scale_by(self, errors: _Errors) -> None:
        """Take q and the median size of each output from the data."""
        self.scales = [Scale.of(own, size) for own, size in zip(errors.own.T, errors.size.T, strict=True)]

    def own(self, points: Points) -> list[tuple[Array, Array]]:
        pairs = (run(model, points, batch=self.batch) for model in (self.exact, self.plain))
        return list(zip(*pairs, strict=True))

    def errors(self, points: Points) -> _Errors:
        """One evaluation of the candidate for each point."""
        count = len(next(iter(points.values())))
        self.spent += count
        answers = self.answers(points, count)
        parts = []
        for name, (r, o) in zip(self.names, self.own(points), strict=True):
            if answers[name].shape != r.shape:
                raise DataError(f"output {name} has shape {list(answers[name].shape)} instead of {list(r.shape)}")
            parts.append(_measured(r, o, answers[name], self.law))
        return _Errors(*(np.concatenate(columns, axis=1) for columns in zip(*parts, strict=True)))

    def answers(self, points: Points, count: int) -> dict[str, Array]:
        size = self.fixed or self.batch
        pieces = []
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1) if self.fixed else slice(start, start + size)
            outputs = self.candidate.run({name: array[rows] for name, array in points.items()})
            pieces.append({name: output[: count - start] for name, output in outputs.items()})
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in self.names}

    def columns(self, errors: _Errors) -> tuple[Floats, Floats]:
        """Each error over what is allowed, and what is allowed; 0 where the original is no judge."""
        allowed = np.stack([self.allowed(i, errors) for i in range(len(self.scales))], axis=1)
        held = np.isfinite(errors.own) & np.isfinite(allowed)
        return np.where(held, ratios(errors.error, allowed), 0.0), allowed

    def allowed(self, column: int, errors: _Errors) -> Floats:
        """What each point's error may be in one column; infinite where no law holds it."""
        own, size, scale = errors.own[:, column], errors.size[:, column], self.scales[column]
        anything, element = np.full(len(size), math.inf), bool(column % 2)
        if self.whole[column // 2]:
            if element or isinstance(self.law, Fidelity):
                return anything
            return np.maximum(self.law.allowed_sample_flips(own, size), own) if isinstance(self.law, Policy) else own
        if isinstance(self.law, Tolerance):
            return self.law.allowed(size) if element else anything
        return (self.law.allowed_element if element else self.law.allowed_sample)(own, size, scale)

    def fairly(self, point: Points, errors: _Errors, rng: np.random.Generator) -> _Errors:
        """The errors of one point, its own error the largest among its neighbours."""
        near = {name: _neighbours(array, rng) for name, array in point.items()}
        parts = [_measured(r, o, None, self.law)[1] for r, o in self.own(near)]
        return errors.with_own(np.maximum(errors.own, np.concatenate(parts, axis=1).max(axis=0, keepdims=True)))


def _neighbours(array: Array, rng: np.random.Generator) -> Array:
    """`NEIGHBOURS` points whose numbers are at most one unit in the last place away; whole numbers stay."""
    many = np.repeat(array, NEIGHBOURS, axis=0)
    if array.dtype.kind != "f":
        return many
    away = rng.integers(-1, 2, many.shape)
    return np.asarray(
        np.where(away == 0, many, np.nextafter(many, np.where(away > 0, np.inf, -np.inf).astype(many.dtype)))
    )


# ------------------------------------------------------------------------------------------------ searching


class _Search:
    def __init__(
        self,
        original: Any,
        candidate: Session,
        samples: Mapping[str, Array],
        boxes: Mapping[str, Box],
        law: Law,
        seed: int,
        fused: Any,
    ) -> None:
        self.found_in = trace(original)
        self.judge = _Judge(original, candidate, self.found_in, law)
        self.samples = {spec.name: np.asarray(samples[spec.name]) for spec in self.found_in.signature.inputs}
        self.boxes = {name: boxes[name] for name in self.samples}
        self.seed, self.rng = seed, np.random.default_rng(seed)
        self.climber = _Climber.of(self.judge.exact, fused, self.found_in, self.boxes)
        self.best: list[tuple[float, int, str, Points, _Errors]] = []  # the best first
        self.count = 0

    def found(self, budget: int) -> WorstCase:
        errors = self.judge.errors(self.samples)
        self.judge.scale_by(errors)
        self.keep("data", self.samples, errors)
        known = self.best[0][0]
        self.judge.spent = 0
        corners = int(SHARES["corners"] * budget)
        self.spend(corners, "corners", self.corners())
        if self.climber is not None:
            self.spend(corners + int(SHARES["gradient"] * budget), "gradient", self.ascents())
        self.spend(budget, "evolution", self.evolution())
        return self.concluded(known)

    def spend(self, until: int, way: str, batches: Iterator[Points]) -> None:
        """Evaluate what a part of the search proposes until its share of the budget is spent."""
        for points in batches:
            left = until - self.judge.spent
            if left <= 0:
                return
            points = {name: array[:left] for name, array in points.items()}
            self.keep(way, points, self.judge.errors(points))

    def keep(self, way: str, points: Points, errors: _Errors) -> None:
        over = self.judge.columns(errors)[0].max(axis=1, initial=0.0)
        for row in np.argsort(-over, kind="stable")[: 2 * PARENTS]:
            one = {name: array[row : row + 1] for name, array in points.items()}
            own = _Errors(*(part[row : row + 1] for part in (errors.error, errors.own, errors.size)))
            self.best.append((float(over[row]), self.count, way, one, own))
            self.count += 1
        self.best.sort(key=lambda entry: (-entry[0], entry[1]))
        del self.best[2 * PARENTS :]

    # ------------------------------------------------------------------------------------------------ corners

    def drawn(self, count: int) -> Points:
        """Samples of the data, drawn."""
        rows = self.rng.integers(len(next(iter(self.samples.values()))), size=count)
        return {name: array[rows] for name, array in self.samples.items()}

    def corners(self) -> Iterator[Points]:
        ends = np.array([0.0, 1.0])
        yield {name: box.at(self.levels(name, ends)) for name, box in self.boxes.items()}
        if any(box.whole for box in self.boxes.values()):
            yield from self.counted()
        while True:
            yield self.mixed(CHILDREN)

    def levels(self, name: str, levels: Floats) -> Floats:
        """Whole samples at one level each."""
        shape = self.samples[name].shape[1:]
        return np.broadcast_to(levels.reshape(-1, *(1 for _ in shape)), (len(levels), *shape))

    def counted(self) -> Iterator[Points]:
        """Samples in which every whole number of the range occurs, each sample with as many as it has places."""
        taken = dict.fromkeys(self.boxes, 0)
        for _ in range(64):
            points = self.drawn(CHILDREN)
            for name, box in self.boxes.items():
                if box.whole:
                    span = (box.high - box.low + 1).astype(np.int64)
                    places = points[name].size
                    order = (taken[name] + np.arange(places)).reshape(points[name].shape)
                    points[name] = box.inside(box.low + order % span)
                    taken[name] += places
            yield points
            if all(taken[name] >= int((box.high - box.low).max()) + 1 for name, box in self.boxes.items() if box.whole):
                return

    def mixed(self, count: int) -> Points:
        """Points whose channels, blocks or elements are at an end or at a random level, on a sample of the data."""
        points = self.drawn(count)
        for name, box in self.boxes.items():
            array = points[name].astype(np.float64)
            for row in range(count):
                array[row] = self.struck(box, array[row : row + 1])[0]
            points[name] = box.inside(array)
        return points

    def struck(self, box: Box, array: Floats) -> Floats:
        shape = array.shape
        channels = (1, *(1 for _ in shape[1:-1]), shape[-1]) if len(shape) > 1 else shape
        form = self.rng.choice(["channels", "elements", "uniform"])
        size = {"channels": channels, "elements": shape, "uniform": tuple(1 for _ in shape)}[form]
        levels = self.rng.random(size)
        if self.rng.random() < 0.6:
            levels = np.rint(levels)
        values = box.low + np.broadcast_to(levels, shape) * (box.high - box.low)
        return np.where(self.mask(shape), values, array)

    def mask(self, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        """Which elements of a sample are touched: all, a block, some, or one."""
        form = self.rng.choice(["all", "block", "some", "one"])
        if form == "all" or len(shape) == 1:
            return np.ones(shape, bool)
        if form == "some":
            return np.asarray(self.rng.random(shape) < self.rng.random())
        chosen = np.zeros(shape, bool)
        starts = [int(self.rng.integers(size)) for size in shape[1:]]
        sizes = [1 if form == "one" else int(self.rng.integers(1, size + 1)) for size in shape[1:]]
        chosen[(slice(None), *(slice(a, a + n) for a, n in zip(starts, sizes, strict=True)))] = True
        return chosen

    # ----------------------------------------------------------------------------------------------- gradient

    def ascents(self) -> Iterator[Points]:
        assert self.climber is not None
        turn = 0
        while True:
            start = self.drawn(max(1, CHILDREN // 2))
            best = [entry[3] for entry in self.best[: CHILDREN - CHILDREN // 2]]
            start = {name: np.concatenate([start[name], *(point[name] for point in best)]) for name in start}
            yield from self.climber.climb(start, turn, self.rng)
            turn += 1

    # ---------------------------------------------------------------------------------------------- evolution

    def evolution(self) -> Iterator[Points]:
        """Parents are the best so far; each child has a step of its own, which it inherits if it becomes a parent."""
        steps = {entry[1]: 0.2 for entry in self.best}
        while True:
            parents = self.best[:PARENTS]
            rows: list[Points] = []
            born = []
            for _ in range(CHILDREN):
                mother, father = (parents[int(self.rng.integers(len(parents)))] for _ in range(2))
                step = steps.get(mother[1], 0.2) * math.exp(0.5 * self.rng.standard_normal())
                born.append(float(np.clip(step, 1e-3, 1.0)))
                rows.append(self.child(mother[3], father[3], born[-1]))
            before = self.count
            yield {name: np.concatenate([row[name] for row in rows]) for name in self.boxes}
            # children are kept in the order of their ratio; the step of a survivor is the typical one of its brood
            steps.update((born_as, float(np.median(born))) for born_as in range(before, self.count))

    def child(self, mother: Points, father: Points, step: float) -> Points:
        point = {}
        for name, box in self.boxes.items():
            array = mother[name].astype(np.float64)
            if self.rng.random() < 0.3:
                array = np.where(self.mask(array.shape), father[name].astype(np.float64), array)
            if self.rng.random() < 0.2:
                array = self.struck(box, array)
            else:
                moved = array + step * (box.high - box.low) * self.rng.standard_normal(array.shape)
                array = np.where(self.mask(array.shape), moved, array)
            point[name] = box.inside(array)
        return point

    # -------------------------------------------------------------------------------------------- conclusion

    def concluded(self, known: float) -> WorstCase:
        """The worst of the finalists, each judged with its neighbours."""
        finals = []
        for _, place, way, point, errors in self.best[:FINALISTS]:
            fair = self.judge.fairly(point, errors, np.random.default_rng(self.seed))
            over, allowed = self.judge.columns(fair)
            column = int(np.argmax(over[0]))
            finals.append(
                (float(over[0, column]), -place, way, point, column, fair.error[0, column], allowed[0, column])
            )
        ratio, _, way, point, column, error, allowed = max(finals, key=lambda entry: entry[:2])
        norm = "differing values" if self.judge.whole[column // 2] else ("L2 error", "largest error")[column % 2]
        output = self.judge.names[column // 2]
        reason = None
        if ratio > 1:
            none = "where none is allowed" if math.isfinite(error) else "NaN or infinity on one side alone"
            told = f"{ratio:.3g} times what is allowed" if math.isfinite(ratio) else none
            reason = f"output {output}: {norm} {error:.3g}, {told}, on an input within the data's range"
        return WorstCase(
            passed=ratio <= 1,
            ratio=number(ratio),
            among_data=number(known),
            output=output,
            error=number(error),
            allowed=number(allowed),
            way=way,
            evaluations=self.judge.spent,
            seed=self.seed,
            sample={name: np.repeat(array, self.judge.fixed or 1, axis=0) for name, array in point.items()},
            reason=reason,
        )


# ------------------------------------------------------------------------------------------------- the gradient


class _Climber:
    """Ascent by the sign of the gradient, within the box, in float64."""

    def __init__(self, exact: Any, fused: Any, boxes: Mapping[str, Box]) -> None:
        self.exact, self.fused = exact, fused
        self.boxes = boxes
        self.moving = [name for name, box in boxes.items() if not box.whole]

    @classmethod
    def of(cls, exact: Any, fused: Any, found: Trace, boxes: Mapping[str, Box]) -> _Climber | None:
        """None where nothing can be differentiated: opaque models, and inputs of whole numbers only."""
        outputs = [spec for spec in found.signature.outputs if "float" in spec.dtype]
        if graph_of(exact) is not None or all(box.whole for box in boxes.values()) or not outputs:
            return None
        if found.signature.inputs[0].shape[0] is not None:
            return None  # of a fixed batch: the points on the way do not fill it
        double = None if fused is None else functional_form(runnable(replay(trace(fused), dtype="float64")))
        return cls(functional_form(runnable(exact)), double, boxes)

    def climb(self, start: Points, turn: int, rng: np.random.Generator) -> Iterator[Points]:
        """The points of one ascent, step by step; even turns climb the difference, where there is one."""
        points = dict(start)
        apart = self.fused is not None and turn % 2 == 0
        weights: list[Floats] = []
        step = 0.4
        for _ in range(STEPS):
            slopes = self.slopes(points, apart, weights, rng)
            if apart and not any(slope.any() for slope in slopes.values()):  # no difference at all: nothing to climb
                apart = False
                slopes = self.slopes(points, apart, weights, rng)
            for name in self.moving:
                box = self.boxes[name]
                reach = step * (box.high - box.low)
                points[name] = box.inside(points[name].astype(np.float64) + reach * np.sign(slopes[name]))
            yield dict(points)
            step *= 0.7

    def slopes(self, points: Points, apart: bool, weights: list[Floats], rng: np.random.Generator) -> dict[str, Floats]:
        import tensorflow as tf

        tensors = {
            name: tf.convert_to_tensor(points[name].astype(symbol.dtype))
            for name, symbol in zip(self.boxes, self.exact.inputs, strict=True)
        }
        watched = [tensors[name] for name in self.moving]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(watched)
            ours = [y for y in flat_call(self.exact)(*tensors.values()) if y.dtype.is_floating]
            goal = tf.zeros([], tf.float64)
            if apart:
                theirs = [y for y in flat_call(self.fused)(*tensors.values()) if y.dtype.is_floating]
                for y, z in zip(ours, theirs, strict=True):
                    squares = tf.reduce_sum(tf.square(tf.cast(y - z, tf.float64)), list(range(1, len(y.shape))))
                    goal += tf.reduce_sum(tf.math.log(squares + 1e-300))
            else:
                if not weights:
                    weights += [_direction(y, rng) for y in ours]
                for y, weight in zip(ours, weights, strict=True):
                    goal += tf.reduce_sum(tf.cast(y, tf.float64) * weight)
        found = tape.gradient(goal, watched, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return {name: np.nan_to_num(np.asarray(g, np.float64)) for name, g in zip(self.moving, found, strict=True)}


def _direction(y: Any, rng: np.random.Generator) -> Floats:
    """For each sample one element of the output, up or down, or a mixture of all."""
    shape = tuple(int(size) for size in y.shape)
    flat = np.zeros((shape[0], math.prod(shape[1:])))
    for row in flat:
        if rng.random() < 0.5 and len(row) > 1:
            row[:] = rng.standard_normal(len(row))
        else:
            row[rng.integers(len(row))] = rng.choice([-1.0, 1.0])
    return flat.reshape(shape)
