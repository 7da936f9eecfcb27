"""Which way of measuring the statistics of BatchNormalization is better: layer after layer, or all at once?

    python benchmarks/recalibration.py [--cases scratch moved] [--seeds 5]

Two cases, both with Fashion-MNIST (as `keras.datasets` has it), and for each: the test accuracy (mean over the seeds
and its standard deviation) before and after; the largest distance that is left between what is stored and what enters a
layer, in units of its sigma (the worst channel of the worst layer of the worst seed; 0 is right); and passes.

    scratch   `models/fashion_cnn.py` for two classes, T-shirt/top and pullover, trained for 28 steps on 200 images;
              its statistics still hold what they began with. Recalibrated on those 200 images, tested on 2,000.
    moved     `models/fashion_cnn.keras`, which is trained, where images come paler and brighter, 0.3 + 0.4·x.
              Recalibrated on 1,000 such training images drawn by seed, tested on 2,000 such test images.

Joint is measured with several sizes of batches.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "models"))

import keras
import numpy as np
from fashion_cnn import build

from deploykit.data import Samples
from deploykit.load import load
from deploykit.transfer.recalibration import recalibrate

MODELS = Path(__file__).resolve().parent.parent / "models"
WAYS: dict[str, dict[str, Any]] = {
    "sequential": {"method": "sequential"},
    "joint, all in one batch": {"method": "joint", "batch": 100_000},
    "joint, batches of 100": {"method": "joint", "batch": 100},
    "joint, batches of 32": {"method": "joint", "batch": 32},
    "joint, batches of 8": {"method": "joint", "batch": 8},
}
Half = tuple[np.ndarray, np.ndarray]


def samples(half: Half, rows: np.ndarray, what: str) -> Samples:
    x, y = half
    return Samples({"image": x[rows][..., None].astype("float32") / 255}, what, y[rows].astype("int64"))


def scratch(train: Half, test: Half, seed: int) -> tuple[Any, Samples, Samples]:
    """A net that was trained for 28 steps, the images it was trained on, and those of the test."""
    two = [(x, np.where(y == 2, 1, np.where(y == 0, 0, -1))) for x, y in (train, test)]
    rows = [np.flatnonzero(y >= 0) for _, y in two]
    given = samples(two[0], np.random.default_rng(seed).permutation(rows[0])[:200], "train")
    keras.utils.set_random_seed(seed)
    model = build(2, "scratch")
    model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy")
    model.fit(given.arrays["image"], given.labels, batch_size=32, epochs=4, verbose=0)
    return model, given, samples(two[1], rows[1], "test")


def moved(train: Half, test: Half, seed: int) -> tuple[Any, Samples, Samples]:
    """A trained net, and images unlike those of its training."""
    rows = np.random.default_rng(seed).permutation(len(train[0]))[:1000]
    both = samples(train, rows, "train"), samples(test, np.arange(2000), "test")
    given, judged = (Samples({"image": 0.3 + 0.4 * part.arrays["image"]}, part.source, part.labels) for part in both)
    return load(MODELS / "fashion_cnn.keras").model, given, judged


def measured(case: Any, seeds: int) -> Iterator[tuple[str, str, str, str]]:
    halves = keras.datasets.fashion_mnist.load_data()
    found: dict[str, list[tuple[float, float, int]]] = {}
    for seed in range(seeds):
        model, given, judged = case(*halves, seed)
        for way, options in WAYS.items():
            done = recalibrate(model, given, test=judged, seed=seed, **options)
            before, after = done.accuracy or sys.exit("no accuracy")
            left = max(row.after.worst_shift_sigma for row in done.layers)
            found.setdefault("before", []).append(
                (before.accuracy, max(r.before.worst_shift_sigma for r in done.layers), 0)
            )
            found.setdefault(way, []).append((after.accuracy, left, done.passes))
    for way, rows in found.items():
        accuracy = 100 * np.array([row[0] for row in rows])
        off = max(row[1] for row in rows)
        yield way, f"{accuracy.mean():.2f} +- {accuracy.std():.2f} %", f"{off:.2g}", str(rows[0][2] or "-")


CASES = {"scratch": scratch, "moved": moved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    asked = parser.parse_args()
    for name in asked.cases:
        print(f"{name}, {asked.seeds} seeds\n| way | test accuracy | sigma left | passes |\n|---|---|---|---|")
        for row in measured(CASES[name], asked.seeds):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
