"""Sanity checks before a long run: seconds on cached features, each for one way in which training quietly fails.

    initial loss    an untrained head gives every class the same chance, so its loss is log(k) for k classes and log(2)
                    for yes or no; far from it, targets or the head are not what they seem
    overfit         a handful of samples, a few of each class, must be learned to 100 % by a copy of the head without
                    dropout and penalties; where not, labels contradict one another or the features say nothing
    update ratio    |step| / |weights| of the kernels after some steps with the real optimizer: outside 1e-4..1e-2 the
                    learning rate is too small to move anything or too large to settle

The head itself is not changed: all three work on copies. What fails is said, and training goes on.

Limits: regression has no theoretical loss, and is overfitted when 1 % of the targets' variance is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from deploykit import graph
from deploykit.transfer.recipe import Phase
from deploykit.transfer.surgery import TASKS, Task

Array = npt.NDArray[Any]
Fetch = Callable[[Array], Array]

LOSS_FACTOR = 1.5  # the initial loss may be so many times the theoretical one, or its inverse
HANDFUL, PER_CLASS = 20, 5
STEPS = 300  # at most, to learn a handful
OVERFIT_RATE = 1e-2  # of Adam, for the handful
RATIOS = 1e-4, 1e-2
RATIO_STEPS = 100  # before the ratio is taken: a kernel that starts at zero has none at first


@dataclass(frozen=True)
class Finding:
    """One check: what was seen, what was expected, and what it means where they differ."""

    check: str
    value: float
    expected: str
    passed: bool
    advice: str

    def to_json(self) -> dict[str, Any]:
        return {"check": self.check, "value": self.value, "expected": self.expected, "passed": self.passed}


def sanity(
    head: Any, fetch: Fetch, rows: Array, targets: Array, phase: Phase, task: Task, seed: int = 0
) -> tuple[Finding, ...]:
    """Check a head before it is trained. ``fetch``: row numbers -> features; ``targets``: one for each of ``rows``."""
    rng = np.random.default_rng([seed, 3])
    some = rng.permutation(len(rows))[:512]
    found = [] if task == "regression" else [_initial(head, fetch(rows[some]), targets[some], task)]
    few = _handful(targets, task, rng)
    found.append(_overfit(head, fetch(rows[few]), targets[few], task))
    found.append(_ratio(head, fetch, rows, targets, phase, task, rng))
    return tuple(found)


def _initial(head: Any, features: Array, targets: Array, task: Task) -> Finding:
    classes = int(head.output.shape[-1]) if task == "softmax" else 2
    theory = math.log(classes)
    loss = _loss(head, features, targets, task)
    return Finding(
        "initial loss",
        loss,
        f"{theory:.3g} (log {classes}), within a factor of {LOSS_FACTOR:g}",
        bool(theory / LOSS_FACTOR <= loss <= theory * LOSS_FACTOR),
        "the head prefers some answers before it has learned anything; look at its hidden layers and at the targets",
    )


def _handful(targets: Array, task: Task, rng: np.random.Generator) -> Array:
    order = rng.permutation(len(targets))
    if task in ("multi-label", "regression"):
        return order[:HANDFUL]
    picked: dict[Any, list[int]] = {}
    for row in order:
        picked.setdefault(float(np.ravel(targets[row])[0]), []).append(int(row))
    each = max(1, min(PER_CLASS, HANDFUL // len(picked)))
    return np.array([row for rows in list(picked.values())[:HANDFUL] for row in rows[:each]])


def _overfit(head: Any, features: Array, targets: Array, task: Task) -> Finding:
    model = _bare(head)
    model.compile(keras.optimizers.Adam(OVERFIT_RATE), loss=TASKS[task][1])
    scale = float(np.var(targets)) or 1.0
    share = 0.0
    for step in range(STEPS):
        model.train_on_batch(features, targets)
        if step % 20 == 19:
            share = _learned(model, features, targets, task, scale)
            if share == 1.0:
                break
    return Finding(
        "overfit a handful",
        share,
        f"1 of {len(features)} samples after {STEPS} steps at most",
        share == 1.0,
        "some of these samples look alike to the body and have different labels; look at the labels, or cut lower "
        "with --at",
    )


def _learned(model: Any, features: Array, targets: Array, task: Task, scale: float) -> float:
    answers = graph.numpy(model(features, training=False))
    if task == "softmax":
        return float(np.mean(answers.argmax(axis=1) == targets))
    shaped = np.reshape(targets, answers.shape)
    if task == "regression":
        return float(np.mean((answers - shaped) ** 2 <= 0.01 * scale))
    return float(np.mean(((answers > 0.5) == (shaped > 0.5)).all(axis=1)))


def _ratio(
    head: Any, fetch: Fetch, rows: Array, targets: Array, phase: Phase, task: Task, rng: np.random.Generator
) -> Finding:
    model = keras.models.clone_model(head)
    model.set_weights(head.get_weights())
    layers = {variable.path: layer.name for layer in model.layers for variable in layer.trainable_variables}
    model.compile(phase.build(phase.stages()[0][0], layers), loss=TASKS[task][1])
    kernels = [variable for variable in model.trainable_variables if len(variable.shape) > 1]
    before = []
    for step in range(RATIO_STEPS):
        if step == RATIO_STEPS - 1:
            before = [graph.numpy(kernel) for kernel in kernels]
        some = rng.integers(0, len(rows), phase.batch)
        model.train_on_batch(fetch(rows[some]), targets[some])
    ratio = update_ratio(before, kernels)
    low, high = RATIOS
    return Finding(
        "update ratio",
        ratio,
        f"{low:g} to {high:g}",
        bool(low <= ratio <= high),
        f"the learning rate {phase.learning_rate:g} is too {'small' if ratio < low else 'large'} for this head",
    )


def update_ratio(before: Sequence[Array], kernels: Sequence[Any]) -> float:
    """|step| / |weights| of a step: the median over the kernels that were not zero ``before``; 0 where all were."""
    pairs = [(graph.numpy(kernel) - old, old) for kernel, old in zip(kernels, before, strict=True)]
    ratios = [float(np.linalg.norm(step) / np.linalg.norm(old)) for step, old in pairs if old.any()]
    return float(np.median(ratios)) if ratios else 0.0


def _loss(model: Any, features: Array, targets: Array, task: Task) -> float:
    answers = model(features, training=False)
    shaped = targets if task == "softmax" else np.reshape(targets, answers.shape)
    return float(np.mean(graph.numpy(keras.losses.get(TASKS[task][1])(shaped, answers))))


def _bare(head: Any) -> Any:
    """A copy without what keeps it from learning by heart."""

    def plain(layer: Any) -> Any:
        config = layer.get_config()
        if isinstance(layer, keras.layers.Dropout):
            config["rate"] = 0.0
        if "kernel_regularizer" in config:
            config["kernel_regularizer"] = None
        return type(layer).from_config(config)

    model = keras.models.clone_model(head, clone_function=plain)
    model.set_weights(head.get_weights())
    return model
