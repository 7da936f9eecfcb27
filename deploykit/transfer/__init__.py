"""Transfer learning: swap the head, train it, prove the body.

surgery      feature point, cut, new head
features     what a frozen body makes of every sample, computed once and kept in a file
recipe       both phases of training, every number in one place
sanity       what goes wrong quietly, looked for before a long run
training     the two phases
job          `deploykit swap-head` from file to file

model = deploykit.swap_head(base, classes=2)                       # surgery alone
trained = deploykit.train_head(base, "fashion_mnist", only=("0", "2"))   # .model, .accuracy, .phases
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploykit import graph
from deploykit.data.labelled import Labelled, open_labelled
from deploykit.errors import DataError
from deploykit.transfer.recipe import Phase, Recipe
from deploykit.transfer.surgery import Head, Swapped, Task, swap
from deploykit.transfer.training import Progress, Trained, train

__all__ = ["Head", "Phase", "Recipe", "Swapped", "Trained", "swap", "swap_head", "train", "train_head"]


def swap_head(
    base: Any,
    classes: int = 2,
    at: str | None = None,
    *,
    drop: int = 0,
    task: Task = "softmax",
    hidden: Sequence[int] = (),
    dropout: float = 0.0,
    l1: float = 0.0,
    l2: float = 0.0,
    seed: int = 0,
) -> Any:
    """A copy of ``base`` (keras.Model) with a new, untrained head for ``classes`` classes and a frozen body.

    ``at`` names the layer whose output the head reads; without it the head that is there is found and replaced.
    ``drop``: how many layers with a kernel go below it, too. The other arguments are those of `Head`. ``base`` is not
    changed, and shares nothing with the result.

    Raises InputError where there is no head to be found or the arguments make no sense.
    """
    head = Head(classes, task, tuple(hidden), dropout, l1, l2)
    return swap(base, head, at=at, drop=drop, seed=seed).model


def head_for(data: Labelled, **options: Any) -> Head:
    """The head that labelled data asks for: softmax, multi-label or regression, as many outputs as the data has."""
    if data.task == "classes":
        return Head(1 if options.get("task") == "sigmoid" else len(data.classes), **{"task": "softmax", **options})
    return Head(data.targets.shape[1], **{**options, "task": data.task})


def train_head(
    base: Any,
    data: str | Labelled,
    *,
    test: str | Labelled | None = None,
    only: Sequence[str] = (),
    at: str | None = None,
    drop: int = 0,
    head: Head | None = None,
    recipe: Recipe | None = None,
    augmentation: Any = None,
    folder: str | Path | None = None,
    progress: Progress = lambda message: None,
) -> Trained:
    """Swap the head of ``base`` (keras.Model, not changed) and train it; ``.model`` of the result is the new model.

    ``data`` and ``test``: `Labelled`, or a place that `open_labelled` reads (``only``: those classes). ``test`` is read
    once, after training. ``head``: by default what the data asks for, without hidden layers. ``folder``: where features
    are kept.

    Raises InputError (DataError, TrainingError) in one line for whatever cannot be trained on.
    """
    recipe = recipe or Recipe()
    signature = graph.signature(base)
    given = open_labelled(data, signature, only=only, seed=recipe.seed) if isinstance(data, str) else data
    if isinstance(test, str):
        test = open_labelled(
            test, signature, only=only, half="test", task=given.task, classes=given.classes if not only else ()
        )
    if test is not None and test.task != given.task:
        raise DataError(f"{test.source} is for {test.task}, {given.source} for {given.task}; give two of one kind")
    swapped = swap(base, head or head_for(given), at=at, drop=drop, seed=recipe.seed)
    return train(
        swapped,
        given,
        recipe,
        test=test,
        augmentation=augmentation,
        folder=None if folder is None else Path(folder),
        progress=progress,
    )
