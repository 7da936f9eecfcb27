"""Shared by the recipes: load Fashion-MNIST, train, evaluate once, save.

A recipe is then only its architecture and its settings. Three rules keep the recorded accuracies honest:
the validation images come out of the training set, the test set is touched once, after the last epoch, and
what is evaluated is the very file that was written, loaded back.

Pixels are scaled to 0..1 here, outside the models, so a deployed model expects float32 images in that range.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

MODELS = Path(__file__).resolve().parent
VALIDATION_IMAGES = 5_000

Split = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Settings:
    """What a recipe may choose; the seed covers initial weights, dropout, shuffling and augmentation."""

    epochs: int
    batch_size: int = 128
    learning_rate: float = 2e-3
    mirror: bool = False
    seed: int = 42


class Batches(keras.utils.PyDataset):
    """Shuffled training batches, each image mirrored at random on request.

    Augmentation lives here and not in the model, which must hold nothing that inference does not need.
    """

    def __init__(self, data: Split, settings: Settings) -> None:
        super().__init__()
        self.x, self.y = data
        self.batch_size, self.mirror = settings.batch_size, settings.mirror
        self.rng = np.random.default_rng(settings.seed)
        self.order = self.rng.permutation(len(self.x))

    def __len__(self) -> int:
        return len(self.x) // self.batch_size  # a short last batch would only disturb the BN statistics

    def __getitem__(self, index: int) -> Split:
        rows = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        x = self.x[rows]
        if self.mirror:
            mirrored = self.rng.random(len(x)) < 0.5
            x[mirrored] = x[mirrored, :, ::-1]
        return x, self.y[rows]

    def on_epoch_end(self) -> None:
        self.order = self.rng.permutation(len(self.x))


def load_data(classes: Sequence[int] = range(10), channel: bool = False) -> tuple[Split, Split, Split]:
    """Training, validation and test split in 0..1, limited to `classes`, whose labels become 0, 1, 2, ...

    The validation split is the end of the training set, which Fashion-MNIST ships already shuffled.
    """
    new_label = np.full(10, -1, dtype="int64")
    new_label[list(classes)] = np.arange(len(classes))

    def prepare(images: np.ndarray, labels: np.ndarray) -> Split:
        kept = new_label[labels] >= 0
        x = images[kept].astype("float32") / 255
        return (x[..., np.newaxis] if channel else x), new_label[labels[kept]]

    train_and_validation, test = keras.datasets.fashion_mnist.load_data()
    x, y = prepare(*train_and_validation)
    n = VALIDATION_IMAGES
    return (x[:-n], y[:-n]), (x[-n:], y[-n:]), prepare(*test)


def accuracy(model: keras.Model, data: Split) -> float:
    """Share of images whose highest-scored class is the label."""
    x, y = data
    return float(np.mean(model.predict(x, batch_size=500, verbose=0).argmax(axis=1) == y))


def train_and_save(
    name: str, build: Callable[[], keras.Model], settings: Settings, classes: Sequence[int] = range(10)
) -> float:
    """Train `build()`, write models/<name>.keras, print and return the test accuracy of that file."""
    keras.utils.set_random_seed(settings.seed)
    model = build()
    train, validation, test = load_data(classes, channel=len(model.input_shape) == 4)
    batches = Batches(train, settings)
    rate = keras.optimizers.schedules.CosineDecay(settings.learning_rate, settings.epochs * len(batches))
    model.compile(
        optimizer=keras.optimizers.Adam(rate),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    started = time.perf_counter()
    model.fit(batches, epochs=settings.epochs, validation_data=validation, verbose=2)
    seconds = time.perf_counter() - started

    # A fresh, never compiled copy carries no optimizer state, which would triple the file.
    path = MODELS / f"{name}.keras"
    bare = build()
    bare.set_weights(model.get_weights())
    bare.save(path)

    result = accuracy(keras.saving.load_model(path, safe_mode=True), test)
    size = path.stat().st_size
    print(f"{name}: {bare.count_params()} parameters, {size} bytes, trained in {seconds:.0f} s")
    print(f"{name}: test accuracy {100 * result:.2f} %")
    return result
