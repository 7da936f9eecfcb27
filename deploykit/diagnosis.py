"""What a check can be asked for beyond its verdict: where it fails, on what it would fail most, whether slopes agree.

    layers       errors layer by layer (`deploykit.bisect`), of the first candidate that failed, or of the first
    worst case   the input on which each candidate differs most (`deploykit.worst_case`)
    gradients    input gradients of each candidate that is a Keras model (`deploykit.gradients`)

A worst case that fails, and gradients that differ, fail the check. Where layers cannot be told apart (an opaque graph,
a file that names none) the check stands without them, and a notice says why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit import runtimes
from deploykit.bisect import layer_errors
from deploykit.check import Candidate, Comparison, Reference
from deploykit.compare import Fidelity, Law, Policy
from deploykit.errors import DeploykitError, InputError, UnsupportedModelError
from deploykit.gradients import input_gradients
from deploykit.load import load
from deploykit.verify import FLOAT32
from deploykit.worst_case import search

SAMPLES = 32  # that layers, searches and gradients start from


@dataclass(frozen=True)
class Wishes:
    """What was asked for. ``layers``: also where nothing failed; ``budget``: evaluations of a search, 0 for none."""

    layers: bool = False
    budget: int = 0
    save: Path | None = None
    gradients: bool = False
    seed: int = 0
    force: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """Further keys of a check report, what failed, and notices."""

    body: dict[str, Any]
    failures: tuple[str, ...]
    notices: tuple[str, ...]
    written: tuple[str, ...]


def diagnosed(
    original: Any,
    reference: Reference,
    candidates: Sequence[Candidate],
    comparisons: Sequence[Comparison],
    policy: Law,
    wishes: Wishes,
) -> Diagnosis:
    """Do what was asked for, for candidates that were compared: in the order of ``comparisons``."""
    arrays = reference.samples.head(SAMPLES).arrays
    body: dict[str, Any] = {}
    failures, notices, written = list[str](), list[str](), list[str]()
    judged = list(zip(candidates, comparisons, strict=True))
    wrong = [pair for pair in judged if not pair[1].passed and pair[1].outputs]
    for candidate, _ in (wrong or judged)[:1] if wrong or wishes.layers else ():
        law = policy if isinstance(policy, Policy | Fidelity) else FLOAT32
        try:
            found = layer_errors(original, candidate.model, arrays, policy=law)
        except DeploykitError as error:
            if wishes.layers and not isinstance(error, UnsupportedModelError | InputError):
                raise
            notices.append(f"{candidate.name} is not compared layer by layer: {error}")
        else:
            record = found.to_json()
            body["layers"] = {**record, "candidate": candidate.name, "text": found.text()}
            body["layers"]["rows"] = body["layers"].pop("layers")
    if wishes.budget:
        body["worst_case"] = []
        for candidate, _ in judged:
            with contextlib.closing(runtimes.open(candidate.runtime, candidate.model)) as session:
                worst = search(original, session, arrays, budget=wishes.budget, seed=wishes.seed)
            told = worst.text().removeprefix("worst case: ")
            body["worst_case"].append({"candidate": candidate.name, **worst.to_json(), "text": told})
            if not worst.passed:
                failures.append(f"{candidate.name} on {candidate.runtime} is not equivalent: {worst.reason}")
            if wishes.save is not None and not written:
                written.append(str(worst.save(wishes.save, force=wishes.force)))
    if wishes.gradients:
        body["gradients"] = []
        for candidate, _ in judged:
            if candidate.runtime != "keras":
                notices.append(f"{candidate.name} on {candidate.runtime} has no gradients to compare")
                continue
            model = load(candidate.model).model if isinstance(candidate.model, str | Path) else candidate.model
            slopes = input_gradients(original, model, arrays, seed=wishes.seed)
            body["gradients"].append({"candidate": candidate.name, **slopes.to_json(), "text": slopes.text()})
            if not slopes.passed:
                failures.append(
                    f"{candidate.name}: {next(line for line in slopes.text().splitlines() if ': D' in line)}"
                )
        if not body["gradients"]:
            raise InputError("--gradients compares Keras models; give a .keras file as candidate")
    return Diagnosis(body, tuple(failures), tuple(notices), tuple(written))
