"""All that the mutation score knows about deploykit's check: what it compares, on which inputs, by which policy.

The score is that of the product: nothing here chooses inputs, factors or floors of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploykit import runtimes
from deploykit.check import Candidate, Reference, check, make_reference
from deploykit.compare import OutputComparison, all_passed, compare_outputs, policy_from
from deploykit.deploy import DataOptions, samples_for
from deploykit.errors import DeploykitError


def reference_for(name: str, model: Any, seed: int) -> Reference:
    """What `deploykit check` compares with when it is given no data."""
    return make_reference(name, model, samples_for(model, DataOptions(seed=seed)))


def objection(reference: Reference, artefact: Any) -> str | None:
    """Why `deploykit check` does not pass a keras.Model or an .onnx file; None where it passes."""
    runtime = "onnxruntime-cpu" if isinstance(artefact, Path) else "keras"
    try:
        (judged,) = check(reference, [Candidate("candidate", artefact, runtime)], policy_from())
    except DeploykitError as error:  # exit 2: it cannot be opened
        return str(error)
    return None if judged.passed else judged.reason or _first(judged.outputs)


def objection_to_answers(reference: Reference, answers: dict[str, Any]) -> str | None:
    """The same of outputs that a runtime gave which the check cannot be asked for."""
    outputs = compare_outputs(reference.outputs, reference.original, answers, policy_from())
    return None if all_passed(outputs) else _first(outputs)


def answers_of(path: Path, reference: Reference, threads: int) -> dict[str, Any]:
    """What ONNX Runtime answers with so many threads."""
    session = runtimes.open("onnxruntime-cpu", path, threads=threads)
    try:
        return session.run(reference.samples.arrays)
    finally:
        session.close()


def _first(outputs: tuple[OutputComparison, ...]) -> str:
    return next((f"{o.name}: {o.reason}" for o in outputs if not o.passed), "nothing was compared")
