"""Training a new head, and then the top of its body.

    split      validation samples come out of the training data, by seed and by class
    phase 1    the head alone, on features that are computed once (`features`)
    phase 2    head and the top of the body, on the samples themselves, augmented if asked

Features are standardised for phase 1: the head's first Dense sees ``z = (f - m) / s`` with the mean and the deviation
that the training samples have, so that one learning rate suits every body. Afterwards ``K z + b`` is written as
``(K / s) f + (b - K m / s)``, computed in float64, and the affine is gone. Penalties act on K, whatever s is.

Of all epochs of both phases the weights with the smallest validation loss are kept; a phase that never improves on the
one before leaves nothing behind. BN computes in inference mode in phase 2 and keeps its statistics, unless the recipe
says otherwise (`keras.layers.BatchNormalization`: ``trainable = False`` means both).

A loss that is not finite stops the training: TrainingError says where, and carries the weights that were best.

Global state (seeds, dtype policy) is left alone: shuffling and augmentation draw from generators of their own, layers
from seeds of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from deploykit import graph
from deploykit.data.labelled import Labelled, class_weights, digest, split
from deploykit.errors import InputError, ProofError, TrainingError
from deploykit.transfer import features as cache
from deploykit.transfer.recipe import PLATEAU, PLATEAU_PATIENCE, Phase, Recipe
from deploykit.transfer.sanity import Finding, sanity, update_ratio
from deploykit.transfer.surgery import TASKS, Swapped, Task

Array = npt.NDArray[Any]
Progress = Callable[[str], None]
Weights = list[Array]
CONSTANT = 1e-6  # a feature whose deviation is smaller than this share of its mean is not standardised


@dataclass(frozen=True)
class Record:
    """What one phase did. ``history``: one number per epoch under each name; ``best``: epoch from 0, None: not better
    than what was there before. ``update_ratio``, per epoch: |step| / |weights| of the last step's kernels."""

    phase: str
    layers: tuple[str, ...]
    parameters: int
    best: int | None
    stopped: str
    seconds: float
    history: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def epochs(self) -> int:
        return len(self.history["loss"])

    def to_json(self) -> dict[str, Any]:
        return {
            "phase": self.phase,
            "epochs": self.epochs,
            "best_epoch": self.best,
            "stopped": self.stopped,
            "layers": list(self.layers),
            "parameters": self.parameters,
            "seconds": self.seconds,
            "history": {name: list(values) for name, values in self.history.items()},
        }


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model. ``accuracy``: share of right answers by split, None where the task has none (regression has
    ``loss``). ``changed``: layers of the body whose weights are no longer those of the base."""

    model: Any
    phases: tuple[Record, ...]
    accuracy: Mapping[str, float | None]
    loss: Mapping[str, float]
    samples: Mapping[str, int]
    changed: tuple[str, ...]
    sanity: tuple[Finding, ...]
    notices: tuple[str, ...]
    seconds: Mapping[str, float]


class _Batches(keras.utils.PyDataset):  # type: ignore[misc]
    """Batches of rows, in a new order each epoch where a generator is given."""

    def __init__(
        self,
        fetch: Callable[[Array], Any],
        rows: Array,
        targets: Array,
        batch: int,
        rng: np.random.Generator | None = None,
        weights: Array | None = None,
    ) -> None:
        super().__init__()
        self.fetch, self.rows, self.targets, self.batch = fetch, rows, targets, batch
        self.rng, self.weights = rng, weights
        self.order = np.arange(len(rows)) if rng is None else rng.permutation(len(rows))

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        picked = self.order[index * self.batch : (index + 1) * self.batch]
        found = (self.fetch(self.rows[picked]), self.targets[picked])
        return found if self.weights is None else (*found, self.weights[picked])

    def on_epoch_end(self) -> None:
        if self.rng is not None:
            self.order = self.rng.permutation(len(self.rows))


class _Watch(keras.callbacks.Callback):  # type: ignore[misc]
    """Sets the rate of every step, keeps the best weights, stops when nothing gets better or nothing is finite."""

    def __init__(self, phase: Phase, steps: int, best: float, weights: Weights, tell: Progress) -> None:
        super().__init__()
        self.phase, self.steps, self.tell = phase, steps * phase.epochs, tell
        self.best_loss, self.best_weights = best, weights
        self.best_epoch: int | None = None
        self.step = self.waited = self.stood = 0
        self.plateau = 1.0
        self.history: dict[str, list[float]] = {}
        self.diverged: str | None = None
        self.stopped = "all epochs"
        self.before: Weights = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.model.optimizer.learning_rate = self.plateau * self.phase.rate(self.step, self.steps)
        if (self.step + 1) % (self.steps // self.phase.epochs) == 0:  # the last of an epoch
            self.before = [graph.numpy(v) for v in self._kernels()]

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.step += 1
        if not np.isfinite(logs["loss"]):
            self.diverged = f"the loss is {logs['loss']:g} in epoch {self.epoch + 1}, step {batch + 1}"
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.diverged or not np.isfinite(logs["val_loss"]):
            self.diverged = self.diverged or f"the validation loss is {logs['val_loss']:g} in epoch {epoch + 1}"
            self.model.stop_training = True
            return
        rate = self.plateau * self.phase.rate(self.step - 1, self.steps)
        for name, value in {
            **logs,
            "update_ratio": update_ratio(self.before, self._kernels()),
            "learning_rate": rate,
        }.items():
            self.history.setdefault(name, []).append(float(value))
        if logs["val_loss"] < self.best_loss:
            self.best_loss, self.best_epoch = logs["val_loss"], epoch
            self.best_weights = self.model.get_weights()
            self.waited = self.stood = 0
        else:
            self.waited, self.stood = self.waited + 1, self.stood + 1
        if self.phase.schedule == "plateau" and self.stood >= PLATEAU_PATIENCE:
            self.plateau, self.stood = self.plateau * PLATEAU, 0
        if self.phase.patience is not None and self.waited >= self.phase.patience:
            self.stopped = f"{self.waited} epochs without a better validation loss"
            self.model.stop_training = True
        self.tell(f"epoch {epoch + 1} of {self.phase.epochs}, validation loss {logs['val_loss']:.4g}")

    def _kernels(self) -> list[Any]:
        return [variable for variable in self.model.trainable_variables if len(variable.shape) > 1]


def train(
    swapped: Swapped,
    data: Labelled,
    recipe: Recipe,
    *,
    test: Labelled | None = None,
    augmentation: Any = None,
    folder: Path | None = None,
    progress: Progress = lambda message: None,
) -> Trained:
    """Train the head of ``swapped`` and, if the recipe says so, the top of its body; its model is changed.

    ``test`` is read once, at the end. ``augmentation``: a Keras model of the input, called in training mode only.
    ``folder``: where features are kept; by default `features.cache_folder`.

    Raises TrainingError where the loss is not finite, DataError for what is wrong with the data, ProofError where the
    frozen body is no longer the base's.
    """
    clock, task = _Clock(), swapped.task
    train_rows, valid_rows = split(data, recipe.validation, recipe.seed)
    weights = _weights(data, train_rows, recipe)
    before = _body_weights(swapped)
    notices = [*swapped.notices, *data.notices]

    stored, notice = _features(swapped, data, recipe, augmentation, folder or cache.cache_folder(), progress)
    notices += [notice] if notice else []
    clock.lap("features")
    rows = train_rows, valid_rows
    mean, deviation = standard(stored, train_rows)

    def fetch(picked: Array) -> Array:
        return (np.asarray(stored[picked], np.float32) - mean) / deviation

    found: tuple[Finding, ...] = ()
    if recipe.sanity:
        found = sanity(swapped.head, fetch, train_rows, data.targets[train_rows], recipe.head, task, recipe.seed)
        notices += [f"{f.check}: {f.value:.3g}, expected {f.expected}: {f.advice}" for f in found if not f.passed]
        clock.lap("sanity")
    head = _train_head(swapped, data, recipe, fetch, rows, weights, progress)
    _absorb(next(layer for layer in swapped.head.layers if isinstance(layer, keras.layers.Dense)), mean, deviation)
    clock.lap("head")
    phases = [head]
    moved = _changed(swapped, before)
    if moved:
        raise ProofError(f"the frozen body changed in phase 1 ({', '.join(moved[:3])}); please report it")
    if recipe.tune is not None and recipe.unfreeze != 0:
        phases.append(_tune(swapped, data, recipe, augmentation, rows, weights, progress))
        clock.lap("tune")
    parts = {"train": data.take(train_rows), "validation": data.take(valid_rows)}
    if test is not None:
        parts["test"] = test
    judged = {name: evaluate(swapped.model, part, task) for name, part in parts.items()}
    clock.lap("evaluate")
    plain = keras.Model(swapped.model.input, swapped.model.output, name=swapped.model.name)  # without an optimizer
    return Trained(
        model=plain,
        phases=tuple(phases),
        accuracy={"train": None, "validation": None, "test": None, **{name: acc for name, (_, acc) in judged.items()}},
        loss={name: loss for name, (loss, _) in judged.items()},
        samples={name: part.count for name, part in parts.items()},
        changed=_changed(swapped, before),
        sanity=found,
        notices=tuple(notices),
        seconds=clock.laps,
    )


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now


# ---------------------------------------------------------------------------------------------- phase 1


def _features(
    swapped: Swapped, data: Labelled, recipe: Recipe, augmentation: Any, folder: Path, progress: Progress
) -> tuple[Array, str | None]:
    name = cache.key(swapped.body, digest(data), recipe.views, augmentation if recipe.views else None)
    path = folder / f"{name}.npy"
    if path.exists():
        return cache.mapped(path), None
    body, notice = cache.fused_body(swapped.body, data.samples)
    cache.compute(
        body,
        data.samples,
        path,
        views=recipe.views,
        augmentation=augmentation,
        progress=lambda done, total: progress(f"features of {done:,} of {total:,} samples"),
    )
    return cache.mapped(path), notice


def _train_head(
    swapped: Swapped,
    data: Labelled,
    recipe: Recipe,
    fetch: Callable[[Array], Array],
    rows: tuple[Array, Array],
    weights: Array | None,
    progress: Progress,
) -> Record:
    train_rows, valid_rows = rows
    views = [train_rows + view * data.count for view in range(1 + recipe.views)]
    training = _Batches(
        fetch,
        np.concatenate(views),
        np.concatenate([data.targets[train_rows]] * len(views)),
        recipe.head.batch,
        np.random.default_rng([recipe.seed, 1]),
        None if weights is None else np.concatenate([weights] * len(views)),
    )
    validation = _Batches(fetch, valid_rows, data.targets[valid_rows], 256)
    return _fit("head", swapped.head, recipe.head, swapped.task, training, validation, np.inf, progress)


def standard(stored: Array, rows: Array) -> tuple[Array, Array]:
    """Mean and deviation of features over these rows, in float64 by Chan's formula, cast to float32."""
    count, mean, square = 0, 0.0, 0.0
    for start in range(0, len(rows), 4096):
        part = np.asarray(stored[rows[start : start + 4096]], np.float64)
        delta = part.mean(axis=0) - mean
        total = count + len(part)
        square = square + part.var(axis=0) * len(part) + delta**2 * (count * len(part) / total)
        mean, count = mean + delta * (len(part) / total), total
    deviation = np.sqrt(square / count)
    constant = deviation <= CONSTANT * np.maximum(np.abs(mean), np.abs(mean).max(initial=0.0) * CONSTANT)
    return np.asarray(mean, np.float32), np.where(constant, 1.0, deviation).astype(np.float32)


def _absorb(dense: Any, mean: Array, deviation: Array) -> None:
    """Write ``K (f - m) / s + b`` as a Dense of f."""
    kernel, bias = (graph.numpy(variable).astype(np.float64) for variable in (dense.kernel, dense.bias))
    kernel = kernel / deviation.astype(np.float64)[:, None]
    dense.kernel.assign(kernel)
    dense.bias.assign(bias - mean.astype(np.float64) @ kernel)


# ---------------------------------------------------------------------------------------------- phase 2


def _tune(
    swapped: Swapped,
    data: Labelled,
    recipe: Recipe,
    augmentation: Any,
    rows: tuple[Array, Array],
    weights: Array | None,
    progress: Progress,
) -> Record:
    assert recipe.tune is not None
    train_rows, valid_rows = rows
    _unfreeze(swapped, recipe)

    def fetch(picked: Array, augmented: bool = False) -> Any:
        arrays = dict(data.samples.take(picked).arrays)
        if augmented and augmentation is not None:
            name = next(iter(arrays))
            arrays[name] = graph.numpy(augmentation(arrays[name], training=True))
        return _packed(swapped.model, arrays)

    validation = _Batches(fetch, valid_rows, data.targets[valid_rows], 256)
    training = _Batches(
        lambda picked: fetch(picked, True),
        train_rows,
        data.targets[train_rows],
        recipe.tune.batch,
        np.random.default_rng([recipe.seed, 2]),
        weights,
    )
    best, _ = evaluate(swapped.model, data.take(valid_rows), swapped.task)
    return _fit("tune", swapped.model, recipe.tune, swapped.task, training, validation, best, progress)


def _unfreeze(swapped: Swapped, recipe: Recipe) -> None:
    known = {layer.name: layer for layer in swapped.model.layers}
    weighted = [name for name in swapped.body_layers if name in known and known[name].weights]
    norms = keras.layers.BatchNormalization
    learning = [name for name in weighted if recipe.train_norms or not isinstance(known[name], norms)]
    for name in learning if recipe.unfreeze is None else learning[max(0, len(learning) - recipe.unfreeze) :]:
        known[name].trainable = True


def _packed(model: Any, arrays: Mapping[str, Array]) -> Any:
    names = [symbol._keras_history.operation.name for symbol in model.inputs]
    return keras.tree.pack_sequence_as(model.input, [arrays[name] for name in names])


# ----------------------------------------------------------------------------------------------- common


def _fit(
    name: str,
    model: Any,
    phase: Phase,
    task: Task,
    training: _Batches,
    validation: _Batches,
    best: float,
    progress: Progress,
) -> Record:
    """Run one phase and leave the best weights behind; ``best``: the validation loss to be beaten."""
    begin = time.perf_counter()
    layers = {variable.path: layer.name for layer in model.layers for variable in layer.trainable_variables}
    unknown = set(phase.multipliers) - set(layers.values())
    if unknown:
        raise InputError(f"{name} trains no layer '{min(unknown)}', so it has no rate; it trains {_some(layers)}")
    watch = _Watch(phase, len(training), best, model.get_weights(), lambda text: progress(f"{name}: {text}"))
    for optimizer, first, last in phase.stages():
        if watch.diverged or watch.stopped != "all epochs":
            break
        model.compile(phase.build(optimizer, layers), loss=TASKS[task][1], metrics=_metrics(task))
        model.fit(
            training,
            initial_epoch=first,
            epochs=last,
            validation_data=validation,
            callbacks=[watch],
            shuffle=False,
            verbose=0,
        )
    model.set_weights(watch.best_weights)
    if watch.diverged:
        raise TrainingError(
            f"{name}: {watch.diverged}; lower the learning rate (now {phase.learning_rate:g}), set --clipnorm, or look "
            "for odd values in the data",
            usable=np.isfinite(watch.best_loss),
        )
    return Record(
        phase=name,
        layers=tuple(dict.fromkeys(layers.values())),
        parameters=sum(int(np.prod(variable.shape)) for variable in model.trainable_variables),
        best=watch.best_epoch,
        stopped=watch.stopped,
        seconds=time.perf_counter() - begin,
        history={key: tuple(values) for key, values in watch.history.items()},
    )


def _some(layers: Mapping[str, str]) -> str:
    names = list(dict.fromkeys(layers.values()))
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _metrics(task: Task) -> list[str]:
    return {"softmax": ["accuracy"], "sigmoid": ["accuracy"], "multi-label": ["accuracy"]}.get(task, [])


def _weights(data: Labelled, rows: Array, recipe: Recipe) -> Array | None:
    """A weight for each of these samples, or None where all weigh the same."""
    if recipe.class_weight is None or data.task != "classes":
        return None
    return class_weights(data.targets[rows], len(data.classes))[data.targets[rows]]


def _body_weights(swapped: Swapped) -> dict[str, Weights]:
    known = {layer.name: layer for layer in swapped.model.layers}
    return {name: known[name].get_weights() for name in swapped.body_layers if name in known}


def _changed(swapped: Swapped, before: Mapping[str, Sequence[Array]]) -> tuple[str, ...]:
    now = _body_weights(swapped)
    same = {
        name: all(np.array_equal(a, b, equal_nan=True) for a, b in zip(now[name], before[name], strict=True))
        for name in before
    }
    return tuple(name for name, equal in same.items() if not equal)


def evaluate(model: Any, data: Labelled, task: Task) -> tuple[float, float | None]:
    """Mean loss and share of right answers (None for regression), in inference mode, batch by batch."""
    loss, right, values = 0.0, 0.0, keras.losses.get(TASKS[task][1])
    start = 0
    for batch in data.samples.batches(256):
        answers = graph.numpy(model(_packed(model, batch), training=False))
        targets = data.targets[start : start + len(answers)]
        start += len(answers)
        shaped = targets.reshape(answers.shape) if task == "sigmoid" else targets
        loss += float(np.sum(graph.numpy(values(shaped, answers))))
        if task == "softmax":
            right += float(np.sum(answers.argmax(axis=1) == targets))
        elif task != "regression":
            right += float(np.sum(np.mean((answers > 0.5) == (shaped > 0.5), axis=1)))
    return loss / start, None if task == "regression" else right / start
