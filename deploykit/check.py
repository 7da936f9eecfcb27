"""Check: does a candidate still answer like the model that was trained?

    reference    the original model evaluated in float64
    original     the same model as it runs, in its own precision: its error against the reference is the
                 yardstick (the laws are in `deploykit.verify`)
    candidate    a file on a runtime; it must have the original's names, shapes and dtypes, too

An opaque model (`deploykit.opaque`) cannot be evaluated in float64: there the reference is its own float32 answer, and
the yardstick is what errors of float32's size, put into its weights and inputs, make of that answer.

Each candidate answers the first sample alone and the rest in slices, so that a file whose batch size is
frozen fails here and not in production. Nothing compared is a failure, never a pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deploykit import runtimes
from deploykit.compare import OutputComparison, Policy, Tolerance, all_passed, compare_outputs
from deploykit.data import Samples
from deploykit.errors import DeploykitError
from deploykit.fuse.proof import slice_of
from deploykit.graph import float32_only, replay, run, trace
from deploykit.load import load
from deploykit.opaque import graph_of, nudge, nudged
from deploykit.signature import Signature

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Candidate:
    """What is compared with the reference: a file, or a Keras model in memory, on a runtime."""

    name: str
    model: Any
    runtime: str


@dataclass(frozen=True, eq=False)
class Reference:
    """What right means: outputs in float64, the original's own answers, and on which samples.

    Where ``precision`` is "float32" the outputs are the original's own, and ``original`` are those of its nudged copy.
    """

    model: str
    signature: Signature
    samples: Samples
    outputs: dict[str, npt.NDArray[Any]]
    original: dict[str, npt.NDArray[Any]]
    notices: tuple[str, ...]
    precision: str = "float64"


@dataclass(frozen=True)
class Comparison:
    """One candidate judged: the outputs' comparisons, or the reason why there are none."""

    candidate: str
    runtime: str
    samples: int
    outputs: tuple[OutputComparison, ...]
    reason: str | None = None
    accuracy: float | None = None  # share of right answers, where the samples carry labels

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
            "accuracy": self.accuracy,
            "outputs": [output.to_json() for output in self.outputs],
        }


def make_reference(name: str, model: Any, samples: Samples) -> Reference:
    """Evaluate a Keras model in float64 and as it is; the float64 copy is gone when this returns."""
    found = trace(model)
    if graph_of(model) is not None:
        return _opaque_reference(name, model, found.signature, samples)
    batch = slice_of(found)
    double = replay(found, dtype="float64")
    names = [spec.name for spec in found.signature.outputs]
    outputs = dict(zip(names, run(double, samples.arrays, batch=batch), strict=True))
    del double
    original = dict(zip(names, run(model, samples.arrays, batch=batch), strict=True))
    single = float32_only(found)
    notices = (f"TensorFlow evaluates {', '.join(single[:3])} in float32, in the reference too",) if single else ()
    return Reference(name, found.signature, samples, outputs, original, notices)


def _opaque_reference(name: str, model: Any, signature: Signature, samples: Samples, seed: int = 0) -> Reference:
    names = [spec.name for spec in signature.outputs]
    outputs = dict(zip(names, run(model, samples.arrays, batch=32), strict=True))
    rng = np.random.default_rng(seed)
    off = {key: nudge(array, rng) for key, array in samples.arrays.items()}
    yardstick = dict(zip(names, run(nudged(model, seed), off, batch=32), strict=True))
    return Reference(name, signature, samples, outputs, yardstick, (), precision="float32")


def _answers(session: runtimes.Session, samples: Samples, fixed: int | None, batch: int = 32) -> dict[str, Any]:
    """The candidate's outputs: the first sample alone, the rest in slices (or slices of a fixed batch)."""
    edges = [0, 1, *range(1 + batch, samples.count, batch)] if fixed is None else [*range(0, samples.count, fixed)]
    pieces = []
    for start, end in zip(edges, [*edges[1:], samples.count], strict=True):
        if start < end:
            pieces.append(session.run({name: array[start:end] for name, array in samples.arrays.items()}))
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _judge(reference: Reference, candidate: Candidate, policy: Policy | Tolerance) -> Comparison:
    nothing = Comparison(candidate.name, candidate.runtime, 0, ())
    session = runtimes.open(candidate.runtime, candidate.model)
    try:
        drift = reference.signature.differences(session.signature)
        if drift:
            return replace(nothing, reason=f"the signature drifted: {'; '.join(drift)}")
        fixed = reference.signature.inputs[0].shape[0]
        try:
            answers = _answers(session, reference.samples, fixed)
        except DeploykitError as error:
            return replace(nothing, reason=f"it does not run on the reference's inputs: {error}")
    finally:
        session.close()
    outputs = compare_outputs(reference.outputs, reference.original, answers, policy)
    right = accuracy(answers, reference.samples)
    return Comparison(candidate.name, candidate.runtime, reference.samples.count, outputs, accuracy=right)


def accuracy(outputs: Arrays, samples: Samples) -> float | None:
    """Share of samples whose label is the largest output; None unless one output is a class per column."""
    if samples.labels is None or len(outputs) != 1:
        return None
    (scores,) = outputs.values()
    labels = np.asarray(samples.labels)
    if scores.ndim != 2 or scores.shape[1] < 2 or labels.shape != (len(scores),) or labels.dtype.kind not in "iu":
        return None
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        return None
    return float(np.mean(scores.argmax(axis=1) == labels))


def check(reference: Reference, candidates: Sequence[Candidate], policy: Policy | Tolerance) -> tuple[Comparison, ...]:
    """Judge every candidate against the reference, in order."""
    return tuple(_judge(reference, candidate, policy) for candidate in candidates)


def body(reference: Reference, comparisons: Sequence[Comparison], policy: Policy | Tolerance) -> dict[str, Any]:
    """The keys of ``deploykit.check/1``."""
    judged = [output for comparison in comparisons for output in comparison.outputs]
    return {
        "passed": bool(comparisons) and all(comparison.passed for comparison in comparisons),
        "reference": {"model": reference.model, "precision": reference.precision},
        "data": f"{reference.samples.count} samples: {reference.samples.source}",
        "policy": policy.name if isinstance(policy, Policy) else {"rtol": policy.rtol, "atol": policy.atol},
        "reference_accuracy": accuracy(reference.outputs, reference.samples),
        "insensitive": sorted({output.name for output in judged if output.insensitive}),
        "comparisons": [comparison.to_json() for comparison in comparisons],
    }


def candidate_for(path: str | Path, runtime: str | None = None, **options: Any) -> Candidate:
    """A candidate for a file or a bundle folder; the runtime follows from the file where none is named.

    ``options`` are those of `deploykit.load` and serve where the candidate is a Keras file.
    """
    path = Path(path)
    model = path / "model.onnx" if (path / "deploykit.json").is_file() else path
    runtime = runtime or runtimes.runtime_for(model)
    given = load(model, **options).model if runtime == "keras" and any(options.values()) else model
    return Candidate(str(path), given, runtime)
