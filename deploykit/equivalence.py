"""One check from files to verdict, whoever asks for it: the command, `deploykit ci`, the pytest fixture.

The candidates are opened by name, the reference is evaluated, all are judged (`deploykit.check`), what failed is looked
at closer (`deploykit.diagnosis`), and what that proves is said once (`deploykit.report.evidence`).

The caller says by which policy; float32's is the default. A file that says that it was exported in float16 is judged by
float32 as well, and fails, until somebody writes ``--policy float16``: a file must not choose its judge. A notice says
how.

A candidate that cannot be judged at all (a file that is missing, damaged, or of a runtime that is not installed) stays
in the report with ``error``, and the others go on. What is known to be wrong is told first: the check fails if a
candidate fails, and is an error only if none does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.check import Candidate, Comparison, body, candidate_for, check, make_reference
from deploykit.compare import Law, policy_from
from deploykit.data import Samples, Stream
from deploykit.deploy import Clock, DataOptions, Progress, samples_for, silent
from deploykit.diagnosis import Wishes, diagnosed
from deploykit.errors import DeploykitError
from deploykit.export.precision import FP16, POLICY, PROPERTY
from deploykit.load import Loaded
from deploykit.report import evidence
from deploykit.runtimes import known
from deploykit.runtimes.files import stated

HALF = POLICY[FP16]


@dataclass(frozen=True)
class Equivalence:
    """The keys of ``deploykit.check/1``, and what they amount to.

    ``error``: what kept a candidate from being judged, where nothing worse was found; then ``passed`` is False.
    ``explained``: where the error of each candidate begins, and by what it was judged if it says that it is less.
    """

    body: dict[str, Any]
    proven: bool
    reason: str | None
    notices: tuple[str, ...]
    written: tuple[str, ...] = ()
    error: DeploykitError | None = None
    explained: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return bool(self.body["passed"])


def equivalence(
    reference: Any,
    candidates: Sequence[Any],
    *,
    data: DataOptions | Callable[[Any], Samples | Stream],
    policy: Law | None,
    runtime: str | None = None,
    wishes: Wishes | None = None,
    progress: Progress = silent,
    clock: Clock | None = None,
    **trust: Any,
) -> Equivalence:
    """Compare candidates (paths or keras.Models) with a `Loaded` or keras.Model.

    ``policy`` None: float32's. ``data``: options, or a function that gives the samples of a model; all of them
    are used. ``trust``: the options of `deploykit.load` for candidates that are Keras files. ``passed`` says what the
    exit code of `deploykit check` says. Raises what the reference and the samples raise.
    """
    clock, wishes = clock or Clock(), wishes or Wishes()
    if runtime is not None:
        known(runtime)
    chosen = [_candidate(candidate, runtime, trust) for candidate in candidates]
    policy = policy or policy_from()
    words = _half(chosen, policy)
    loaded = reference if isinstance(reference, Loaded) else None
    model = loaded.model if loaded else reference
    samples = data(model) if callable(data) else samples_for(model, data)
    with loaded.scope() if loaded else nullcontext():
        progress("evaluating the reference in float64")
        right = make_reference(str(loaded.path) if loaded else model.name, model, samples)
        clock.lap("reference")
        progress("running the candidates")
        compared = check(right, chosen, policy, progress=progress)
        found = body(right, compared, policy)
        clock.lap("candidates")
        progress("looking closer")
        closer = diagnosed(model, right, chosen, compared, policy, wishes)
        clock.lap("diagnosis")
    found |= closer.body
    error = _error(compared) if not closer.failures else None
    failed = next(iter(closer.failures), None)
    proven, reason = (False, failed) if failed is not None and found["passed"] else evidence.verdict(found)
    objection = failed or evidence.objection(found)
    found["passed"] = objection is None
    notices = [*words, *(loaded.notices if loaded else ()), *right.notices, *evidence.excluded(found), *closer.notices]
    return Equivalence(found, proven, reason, tuple(notices), closer.written, error, (*closer.explained, *words))


def _half(chosen: Sequence[Candidate], policy: Law) -> list[str]:
    """What there is to say about files that say of themselves that they are less than they are judged as."""
    if policy != policy_from():
        return []
    half = [candidate.name for candidate in chosen if stated(candidate.model).get(PROPERTY) == HALF]
    return [f"{name} says that it was exported in {HALF}; to judge it so, give the policy {HALF}" for name in half]


def _candidate(given: Any, runtime: str | None, trust: dict[str, Any]) -> Candidate:
    if not isinstance(given, str | Path):
        return Candidate(given.name, given, "keras")
    try:
        return candidate_for(given, runtime, **trust)
    except DeploykitError as error:
        return Candidate(str(given), given, runtime or "?", error)


def _error(compared: Sequence[Comparison]) -> DeploykitError | None:
    """The first error, where every candidate that was judged passed."""
    if any(not comparison.passed and comparison.error is None for comparison in compared):
        return None
    return next((comparison.error for comparison in compared if comparison.error is not None), None)
