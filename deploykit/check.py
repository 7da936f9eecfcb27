"""Check: does a candidate still answer like the model that was trained?

    reference    the original model evaluated in float64
    original     the same model as it runs, in its own precision: its error against the reference is the
                 yardstick (the laws are in `deploykit.verify`)
    candidate    a file on a runtime; it must have the original's names, shapes and dtypes, too

Samples pass in batches, through the reference, the original and every candidate in turn, and leave a few numbers each
behind: memory does not grow with their number. Of fewer than `FEW` samples the original's error is drawn several times,
because one draw may be lucky. The first `KEPT` samples' answers are kept, for golden data and for whoever wants to look
at them. Each candidate answers the first sample alone and then whole batches, so that a file
whose batch size is frozen fails here and not in production. A model with open sizes (steps of a sequence, height and
width) is compared at two other sizes as well. Nothing compared is a failure, never a pass.

An opaque model (`deploykit.opaque`) cannot be evaluated in float64: there the reference is its own float32 answer, and
the yardstick is what errors of float32's size, put into its weights and inputs, make of that answer.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deploykit import runtimes, verify
from deploykit.compare import (
    Law,
    OutputComparison,
    Tolerance,
    all_passed,
    noise_between,
)
from deploykit.data import Samples, Stream, other_sizes
from deploykit.errors import DataError, DeploykitError, InputError, ProofError, UnsupportedModelError
from deploykit.fuse.proof import slice_of
from deploykit.graph import float32_only, replay, run, runnable, trace
from deploykit.load import load
from deploykit.opaque import graph_of, nudge, nudged
from deploykit.runtimes import trained
from deploykit.signature import Signature
from deploykit.verify import Judge, norms

Arrays = Mapping[str, npt.NDArray[Any]]
Answers = dict[str, npt.NDArray[Any]]
Evaluate = Callable[[Arrays], tuple[Answers, Answers]]  # what is right, and what the original says

KEPT = 256  # samples whose answers stay in memory
FEW = 8  # draws of the original's error below which luck decides; a sample is one
SUSPECTS, DRAWS = 0.1, 8  # the share of samples that luck may hit, and how often it is tried again
BATCH = 32  # samples that a candidate answers at once


@dataclass(frozen=True)
class Candidate:
    """What is compared with the reference: a file, or a Keras model in memory, on a runtime.

    ``error``: what is wrong with the file, where that is known; its comparison then says so, and the others go on.
    """

    name: str
    model: Any
    runtime: str
    error: DeploykitError | None = None  # why it cannot be judged


@dataclass(frozen=True, eq=False)
class Reference:
    """What right means: outputs in float64, the original's own answers, and on which samples.

    ``outputs`` and ``original`` are of the first samples (`KEPT`), ``evaluate`` gives both for further ones. Where
    ``precision`` is "float32" the outputs are the original's own, and ``original`` are those of its nudged copy.
    ``others`` are the same at other sizes; ``again`` makes what evaluates anew, for samples that are doubtful.
    """

    model: str
    signature: Signature
    samples: Samples | Stream
    outputs: Answers
    original: Answers
    notices: tuple[str, ...]
    precision: str = "float64"
    evaluate: Evaluate | None = None
    others: tuple[Reference, ...] = ()
    again: Callable[[], Evaluate] | None = None

    @property
    def kept(self) -> int:
        return len(next(iter(self.outputs.values())))

    @property
    def fixed(self) -> int | None:
        """The batch size, where it is fixed."""
        return self.signature.inputs[0].shape[0]

    def pieces(self) -> Iterator[tuple[Arrays, Answers, Answers]]:
        """Batches of inputs, right answers, and the original's own."""
        start = 0
        for inputs in self.samples.batches(self.fixed or BATCH):
            stop = start + len(next(iter(inputs.values())))
            if stop <= self.kept:
                rows = slice(start, stop)
                yield inputs, _cut(self.outputs, rows), _cut(self.original, rows)
            elif self.evaluate is not None:
                yield (inputs, *self.evaluate(inputs))
            else:
                raise DataError(f"{self.model}: {self.samples.count} samples, but answers to {self.kept} only")
            start = stop


def _cut(arrays: Arrays, rows: slice) -> Answers:
    return {name: array[rows] for name, array in arrays.items()}


@dataclass(frozen=True)
class Comparison:
    """One candidate judged: the outputs' comparisons, or the reason why there are none.

    ``sizes``: what was found at other sizes, one entry for each: what they are, and why it failed there, or None.
    ``error``: the candidate could not be judged, which is no verdict about it; ``reason`` says why.
    ``notes``: what is to know about how the runtime computed. Accuracies are shares of right answers, where the
    samples carry labels.
    """

    candidate: str
    runtime: str
    samples: int
    outputs: tuple[OutputComparison, ...]
    reason: str | None = None
    accuracy: float | None = None
    reference_accuracy: float | None = None
    sizes: tuple[tuple[str, str | None], ...] = ()
    notes: tuple[str, ...] = ()
    error: DeploykitError | None = None

    @property
    def passed(self) -> bool:
        return self.reason is None and all_passed(self.outputs)

    def to_json(self) -> dict[str, Any]:
        return {
            "candidate": self.candidate,
            "runtime": self.runtime,
            "passed": self.passed,
            "samples": self.samples,
            "reason": self.reason,
            "error": self.error is not None,
            "accuracy": self.accuracy,
            "sizes": [{"data": data, "passed": reason is None, "reason": reason} for data, reason in self.sizes],
            "notes": list(self.notes),
            "outputs": [output.to_json() for output in self.outputs],
        }


# ------------------------------------------------------------------------------------------------- the reference


def make_reference(name: str, model: Any, samples: Samples | Stream, *, sizes: bool = True, seed: int = 0) -> Reference:
    """Evaluate a Keras model in float64 and as it is; ``sizes``: at other sizes too, where it has open ones."""
    found = trace(model)
    again: Callable[[], Evaluate]
    if graph_of(model) is None:
        again, precision = partial(_in_float64, model), "float64"
        single = float32_only(found)
        notices = [f"TensorFlow evaluates {', '.join(single[:3])} in float32, in the reference too"] if single else []
    else:
        again, precision, notices = partial(_as_it_is, model, seed), "float32", []
    evaluate = again()
    others = []
    for other in other_sizes(found.signature, seed=seed) if sizes else ():
        try:
            right, own = _settled(evaluate, other.arrays, seed)
        except UnsupportedModelError as error:
            notices.append(f"not compared on {other.source}: {error}")
        else:
            others.append(Reference(name, found.signature, other, right, own, (), precision, again=again))
    right, own = _settled(evaluate, samples.head(KEPT).arrays, seed)
    further = evaluate if samples.count > KEPT else None  # else the copies are let go
    return Reference(
        name, found.signature, samples, right, own, tuple(notices), precision, further, tuple(others), again
    )


def _settled(evaluate: Evaluate, arrays: Arrays, seed: int) -> tuple[Answers, Answers]:
    """The right answers and the original's own, whose error, where samples are few, is the largest of several draws.

    The laws pool the own error over the samples, because the original may hit one by luck. Few have nothing to pool:
    two draws of one size differ by more than the whole output's factor in one case of six. Further draws are the
    errors at the same inputs moved by one unit in the last place, as far as they are floating.
    """
    right, own = evaluate(arrays)
    count = len(next(iter(arrays.values())))
    if count >= FEW or not any(array.dtype.kind == "f" for array in arrays.values()):
        return right, own
    rng = np.random.default_rng(seed)
    for _ in range(-(-FEW // max(1, count))):
        beside = evaluate({name: nudge(array, rng) for name, array in arrays.items()})
        own = {name: _worse(right[name], own[name], beside[0][name], beside[1][name]) for name in own}
    return right, own


def _worse(right: npt.NDArray[Any], own: npt.NDArray[Any], near: npt.NDArray[Any], drawn: npt.NDArray[Any]) -> Any:
    """The original's answers, with the error ``drawn`` - ``near`` in the samples where that is the larger one.

    Where that cannot be told (NaN, infinity) its own answers stay. Whole numbers that turn next to the input are taken
    for such as the original gets wrong.
    """
    if right.dtype.kind != "f":
        for other in (drawn, near):
            own = np.where(own == right, other, own).astype(own.dtype)
        return own
    with np.errstate(all="ignore"):
        error, known = np.asarray(drawn, np.float64) - near, np.asarray(own, np.float64) - right
        moved = (right + error).astype(own.dtype)
        sizes = [norms(np.nan_to_num(e, nan=0.0, posinf=0.0, neginf=0.0).reshape(len(e), -1)) for e in (error, known)]
        usable = np.isfinite(moved) | ~np.isfinite(right)
    larger = (sizes[0] > sizes[1]) & usable.reshape(len(usable), -1).all(axis=1)
    chosen = larger.reshape(-1, *[1] * (right.ndim - 1)) & np.isfinite(right) & np.isfinite(own)
    return np.where(chosen, moved, own)


def _named(model: Any, found: Any, arrays: Arrays, batch: int) -> Answers:
    names = [spec.name for spec in found.signature.outputs]
    return dict(zip(names, run(model, arrays, batch=batch), strict=True))


def _in_float64(model: Any) -> Evaluate:
    found = trace(model)
    batch, double, original = slice_of(found), replay(found, dtype="float64"), runnable(model)
    return lambda arrays: (_named(double, found, arrays, batch), _named(original, found, arrays, batch))


def _as_it_is(model: Any, seed: int) -> Evaluate:
    found, moved = trace(model), nudged(model, seed)
    rng = np.random.default_rng(seed)

    def evaluate(arrays: Arrays) -> tuple[Answers, Answers]:
        off = {name: nudge(array, rng) for name, array in arrays.items()}
        return _named(model, found, arrays, BATCH), _named(moved, found, off, BATCH)

    return evaluate


# -------------------------------------------------------------------------------------------------- the candidates


@dataclass
class _Trial:
    """A candidate while samples pass: its session, its judge, why it is out."""

    candidate: Candidate
    session: Any
    judge: Judge
    order: tuple[str, ...] = ()  # of its outputs
    reason: str | None = None
    hits: int | None = 0
    seen: int = 0
    error: DeploykitError | None = None

    def hear(self, inputs: Arrays, right: Answers, own: Answers, labels: Any, fixed: int | None) -> None:
        if self.reason is not None:
            return
        count = len(next(iter(inputs.values())))
        edges = [0, 1, count] if self.seen == 0 and fixed is None and count > 1 else [0, count]
        try:
            parts = [self.session.run(_cut(inputs, slice(*edges[i : i + 2]))) for i in range(len(edges) - 1)]
        except DeploykitError as error:
            self.reason = f"it does not run on the reference's inputs: {error}"
            return
        try:
            answers = {name: np.concatenate([part[name] for part in parts]) for name in self.order}
        except ValueError:
            shapes = {name: [np.shape(part[name]) for part in parts] for name in self.order}
            name, found = next((n, s) for n, s in shapes.items() if not all(s) or len({p[1:] for p in s}) > 1)
            sizes = " and ".join(str(list(shape)) for shape in found)
            self.reason = f"output {name}: answers of shape {sizes}, which are not one row for each sample"
            return
        noises = {name: noise_between(right[name], own[name]) for name in right}
        self.judge.add(right, answers, noises, {name: array.dtype for name, array in own.items()})
        self.seen += count
        self.hits = _sum(self.hits, hits(answers, labels))


def _sum(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


def check(
    reference: Reference,
    candidates: Sequence[Candidate],
    policy: Law,
    *,
    progress: Callable[[str], None] = lambda message: None,
) -> tuple[Comparison, ...]:
    """Judge every candidate against the reference, in order, all on one pass over the samples."""
    for candidate in candidates:
        if candidate.error is None:
            runtimes.known(candidate.runtime)
    with contextlib.ExitStack() as stack:
        trials = []
        for candidate in candidates:
            trials.append(_opened(reference, candidate, policy, stack))
        own_hits: int | None = 0
        done, start = 0, time.perf_counter()
        for inputs, right, own in reference.pieces():
            count = len(next(iter(inputs.values())))
            labels = None if reference.samples.labels is None else reference.samples.labels[done : done + count]
            for trial in trials:
                trial.hear(inputs, right, own, labels, reference.fixed)
            own_hits = _sum(own_hits, hits(right, labels))
            done += count
            left = (time.perf_counter() - start) / done * (reference.samples.count - done)
            progress(f"checked {done} of {reference.samples.count} samples, about {left:.0f} s left")
        total = None if own_hits is None else own_hits / done
        return tuple(_verdict(reference, trial, policy, total) for trial in trials)


def _opened(reference: Reference, candidate: Candidate, policy: Law, stack: contextlib.ExitStack) -> _Trial:
    """A candidate ready to run; one that cannot be opened, or does not run as it should, is out; the others go on."""
    try:
        if candidate.error is not None:
            raise candidate.error
        session = trained.open(candidate.runtime, candidate.model)
    except DeploykitError as error:
        wrong = isinstance(error, ProofError)  # else nothing is known of the model
        return _Trial(candidate, None, Judge(policy), reason=str(error), error=None if wrong else error)
    stack.callback(session.close)
    signature = runtimes.signature_like(session, reference.signature)
    drift = reference.signature.differences(signature)
    reason = f"the signature drifted: {'; '.join(drift)}" if drift else None
    return _Trial(candidate, session, Judge(policy), tuple(spec.name for spec in signature.outputs), reason)


def _heard_again(reference: Reference, judge: Judge) -> None:
    """Measure the original's own error again in the samples that fail, where they are few.

    One draw of the original may hit a sample by luck, and then a right candidate fails there. So it is drawn
    again, at the same inputs moved by one unit in the last place, before the verdict. A wrong candidate is wrong by far
    more than draws differ; where many samples fail, it is no luck.
    """
    suspects = judge.suspects()
    if reference.again is None or not 0 < len(suspects) <= max(1, int(SUSPECTS * reference.samples.count)):
        return
    suspects += suspects[-1:] * (-len(suspects) % (reference.fixed or 1))
    arrays = reference.samples.take(suspects).arrays
    if not any(array.dtype.kind == "f" for array in arrays.values()):
        return
    evaluate, rng = reference.again(), np.random.default_rng(0)
    for _ in range(DRAWS):
        right, own = evaluate({name: nudge(array, rng) for name, array in arrays.items()})
        judge.remeasured(suspects, {name: noise_between(right[name], own[name]) for name in right})


def _verdict(reference: Reference, trial: _Trial, policy: Law, reference_accuracy: float | None) -> Comparison:
    candidate, notes = trial.candidate, tuple(getattr(trial.session, "notes", ()))
    if trial.reason is not None:
        return Comparison(candidate.name, candidate.runtime, 0, (), trial.reason, notes=notes, error=trial.error)
    _heard_again(reference, trial.judge)
    found = Comparison(
        candidate.name,
        candidate.runtime,
        trial.seen,
        trial.judge.conclude(),
        accuracy=None if trial.hits is None else trial.hits / trial.seen,
        reference_accuracy=reference_accuracy,
        sizes=tuple((other.samples.source, _at(other, trial, policy)) for other in reference.others),
        notes=notes,
    )
    wrong = [f"on {data}: {reason}" for data, reason in found.sizes if reason is not None]
    return replace(found, reason=wrong[0]) if wrong else found


def _at(other: Reference, trial: _Trial, policy: Law) -> str | None:
    """Why a candidate fails at another size, or None."""
    again = _Trial(trial.candidate, trial.session, Judge(policy), trial.order)
    for inputs, right, own in other.pieces():
        again.hear(inputs, right, own, None, other.fixed)
    if again.reason is not None:
        return again.reason
    _heard_again(other, again.judge)
    return next((f"output {o.name}: {o.reason}" for o in again.judge.conclude() if not o.passed), None)


def hits(outputs: Arrays, labels: Any) -> int | None:
    """How many labels are the largest output; None unless one output is a class per column."""
    if labels is None or len(outputs) != 1:
        return None
    (scores,) = outputs.values()
    labels = np.asarray(labels)
    if scores.ndim != 2 or scores.shape[1] < 2 or labels.shape != (len(scores),) or labels.dtype.kind not in "iu":
        return None
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        return None
    return int(np.sum(scores.argmax(axis=1) == labels))


def accuracy(outputs: Arrays, samples: Samples | Stream) -> float | None:
    """Share of samples whose label is the largest output; None unless one output is a class per column."""
    found = hits(outputs, samples.labels)
    return None if found is None else found / samples.count


def body(reference: Reference, comparisons: Sequence[Comparison], policy: Law) -> dict[str, Any]:
    """The keys of ``deploykit.check/1``."""
    judged = [output for comparison in comparisons for output in comparison.outputs]
    return {
        "passed": bool(comparisons) and all(comparison.passed for comparison in comparisons),
        "reference": {"model": reference.model, "precision": reference.precision},
        "data": f"{reference.samples.count} sample{'s'[: reference.samples.count > 1]}: {reference.samples.source}",
        "other_sizes": [other.samples.source for other in reference.others],
        "policy": {"rtol": policy.rtol, "atol": policy.atol} if isinstance(policy, Tolerance) else policy.name,
        "reference_accuracy": next(
            (c.reference_accuracy for c in comparisons if c.reference_accuracy is not None), None
        ),
        "insensitive": sorted({output.name for output in judged if output.insensitive}),
        "comparisons": [comparison.to_json() for comparison in comparisons],
    }


def candidate_for(path: str | Path, runtime: str | None = None, **options: Any) -> Candidate:
    """A candidate for a file or a bundle folder; the runtime follows from the file where none is named.

    Raises InputError for a bundle whose files are not those that were sealed.
    ``options`` are those of `deploykit.load` and serve where the candidate is a Keras file.
    """
    path = model = Path(path)
    if os.path.isfile(path / verify.MANIFEST):  # False for a name that is too long, where Path raises
        try:
            bundle = verify.open_bundle(path)
        except verify.RefusedError as error:
            raise InputError(str(error)) from error
        model = path / bundle.model
    runtime = runtime or runtimes.runtime_for(model)
    given = load(model, **options).model if runtime == "keras" and any(options.values()) else model
    return Candidate(str(path), given, runtime)
