"""The job of `deploykit swap-head`: a trained model and labelled data in, a trained model with a new head out.

    base -> surgery -> sanity checks -> phase 1 -> phase 2 -> OUT.keras and its report

The file that is written is judged as it was written: it is loaded back, and has to answer like the model in memory. It
carries the class names and the recipe beside its layers (in the archive's metadata.json, which Keras does not read
for anything else), so that `deploykit deploy` can put them into the bundle.

``proven`` is about the body. While it is frozen its weights must be those of the base, bit for bit; what phase 2
changed is listed by name. That a head has learned its task is a measurement, not a proof.

A loss that is no longer finite ends the training. What was best until then is written beside the output, as
OUT.last-good.keras, and the error says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

import deploykit
from deploykit import graph
from deploykit.archive import write_keras
from deploykit.data.labelled import Labelled
from deploykit.environment import environment
from deploykit.errors import ProofError, TrainingError
from deploykit.files import claim
from deploykit.load import Loaded
from deploykit.report import Report
from deploykit.transfer.recipe import Recipe
from deploykit.transfer.surgery import Head, swap
from deploykit.transfer.training import Progress, Trained, train


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be done. ``names``: of the classes; ``augment``: names of `augmentation`."""

    head: Head
    recipe: Recipe
    data: Labelled
    test: Labelled | None = None
    at: str | None = None
    drop: int = 0
    augmentation: Any = None
    folder: Path | None = None


def swap_and_train(
    loaded: Loaded,
    out: Path,
    job: Job,
    *,
    force: bool = False,
    seconds: Mapping[str, float],
    progress: Progress = lambda message: None,
) -> Report:
    """Do it and write ``out``; returns the ``deploykit.swap_head/1`` report. ``seconds``: what loading took.

    Raises InputError for what cannot be trained (TrainingError after a checkpoint was written), OutputError where
    ``out`` cannot be, ProofError when the written file is not the trained model.
    """
    claim(out, force=force, inputs=(loaded.path,))
    progress("replacing the head")
    swapped = swap(loaded.model, job.head, at=job.at, drop=job.drop, seed=job.recipe.seed)
    try:
        trained = train(
            swapped,
            job.data,
            job.recipe,
            test=job.test,
            augmentation=job.augmentation,
            folder=job.folder,
            progress=progress,
        )
    except TrainingError as error:
        if not error.usable:
            raise
        kept = out.with_suffix(".last-good.keras")
        write_keras(swapped.model, kept, force=True, about=_about(job, None))
        raise TrainingError(f"{error}; the best weights before that are in {kept}", usable=True) from error
    write_keras(trained.model, out, force=force, about=_about(job, trained))
    _same(trained.model, out, job.data)
    return _report(loaded, out, job, swapped, trained, seconds)


def _about(job: Job, trained: Trained | None) -> dict[str, Any]:
    """What the file says of itself."""
    return {
        "classes": list(job.data.classes),
        "task": job.data.task,
        "recipe": _recipe(job.recipe),
        "accuracy": None if trained is None else dict(trained.accuracy),
    }


def _recipe(recipe: Recipe) -> dict[str, Any]:
    record = asdict(recipe)
    record["unfreeze"] = "all" if recipe.unfreeze is None else recipe.unfreeze
    return record


def _same(model: Any, path: Path, data: Labelled) -> None:
    """The file must answer as the model does, to the last bit: it holds the same weights."""
    arrays = data.samples.head(8).arrays
    written = keras.saving.load_model(path, compile=False, safe_mode=True)
    for mine, theirs in zip(graph.run(model, arrays), graph.run(written, arrays), strict=True):
        if not np.array_equal(mine, theirs, equal_nan=True):
            path.unlink()
            raise ProofError(f"{path} does not answer like the trained model, so it was removed; please report it")


def _report(
    loaded: Loaded, out: Path, job: Job, swapped: Any, trained: Trained, seconds: Mapping[str, float]
) -> Report:
    counts = np.bincount(job.data.targets, minlength=len(job.data.classes)) if job.data.task == "classes" else None
    body = {
        "classes": [
            {"name": name, "samples": None if counts is None else int(counts[number])}
            for number, name in enumerate(job.data.classes)
        ],
        "task": swapped.task,
        "body": {"model": str(loaded.path), "sha256": loaded.sha256, "layers": len(swapped.body_layers)},
        "feature_point": swapped.feature_point,
        "features": int(swapped.head.input.shape[-1]),
        "head": list(swapped.head_layers),
        "gone": list(swapped.gone),
        "data": {"train": job.data.source, "test": None if job.test is None else job.test.source},
        "samples": dict(trained.samples),
        "phases": [phase.to_json() for phase in trained.phases],
        "sanity": [finding.to_json() for finding in trained.sanity],
        "accuracy": dict(trained.accuracy),
        "loss": dict(trained.loss),
        "body_unchanged": not trained.changed,
        "body_changed": list(trained.changed),
        "recipe": _recipe(job.recipe),
        "size_bytes": out.stat().st_size,
    }
    spent = {**seconds, **trained.seconds}
    return Report(
        verb="swap-head",
        version=deploykit.__version__,
        model=str(loaded.path),
        proven=True,
        body=body,
        environment=environment(),
        seconds={**spent, "total": sum(value for name, value in spent.items() if name != "total")},
        notices=[*loaded.notices, *trained.notices],
        outputs_written=[str(out)],
    )
