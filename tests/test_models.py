"""The trained models are what their recipes and `models/README.md` say they are.

The README table is the only place that records figures; everything here compares the files with it. Nothing
is downloaded: the quick tests use the shipped sample, the slow one a Fashion-MNIST test set already there.
"""

from __future__ import annotations

import gzip
import importlib
import math
import os
from pathlib import Path

import keras
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
NAMES = ("mlp_bn_after", "mlp_bn_before", "fashion_cnn", "fashion_cnn_8")
MAX_BYTES = 1_500_000
LINEAR = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D, keras.layers.Dense)

Row = dict[str, str]


def readme_table() -> dict[str, Row]:
    """Rows of the README's table of models, by model name; the table ends at the first blank line."""
    text = (MODELS / "README.md").read_text(encoding="utf-8")
    lines = text[text.index("| File |") :].split("\n\n")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = [dict(zip(header, row, strict=True)) for row in rows]
    return {row["File"].strip("`").removesuffix(".keras"): row for row in table}


def recorded_accuracy(name: str) -> float:
    return float(readme_table()[name]["Test accuracy"].removesuffix("%")) / 100


def batch_norms(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    return [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]


def accuracy(model: keras.Model, images: np.ndarray, labels: np.ndarray) -> tuple[float, int]:
    """Accuracy of `model` on the images (n, 28, 28) of its classes, and how many those are.

    Labels are the original ones; an 8-class model numbers the classes it knows in their original order.
    """
    classes = [1, 3, 4, 5, 6, 7, 8, 9] if model.output_shape[-1] == 8 else list(range(10))
    known = np.isin(labels, classes)
    x = images[known].reshape(-1, *model.input_shape[1:])
    predicted = np.array(classes)[model.predict(x, batch_size=500, verbose=0).argmax(axis=1)]
    return float(np.mean(predicted == labels[known])), int(known.sum())


@pytest.fixture(scope="module")
def models() -> dict[str, keras.Model]:
    return {name: keras.saving.load_model(MODELS / f"{name}.keras", safe_mode=True) for name in NAMES}


@pytest.fixture
def recipe_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes import each other by plain name, as they do when run as scripts."""
    monkeypatch.syspath_prepend(str(MODELS))


def test_every_model_file_has_a_recipe_and_a_row() -> None:
    files = {path.stem for path in MODELS.glob("*.keras")}
    assert files == set(NAMES) == set(readme_table())
    assert all((MODELS / f"{name}.py").is_file() for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_readme_row_describes_the_file(name: str, models: dict[str, keras.Model]) -> None:
    row, model, size = readme_table()[name], models[name], (MODELS / f"{name}.keras").stat().st_size
    assert size <= MAX_BYTES
    assert float(row["Size"].removesuffix("MB")) == pytest.approx(size / 1e6, abs=0.006)
    assert int(row["Parameters"].replace(",", "")) == model.count_params()
    assert int(row["BN"]) == len(batch_norms(model))
    assert int(row["Classes"].split()[0]) == model.output_shape[-1]


@pytest.mark.usefixtures("recipe_path")
@pytest.mark.parametrize("name", NAMES)
def test_architecture_is_that_of_the_recipe(name: str, models: dict[str, keras.Model]) -> None:
    def description(model: keras.Model) -> list[tuple[str, str, list[tuple[int, ...]]]]:
        layers = model.layers
        return [(type(layer).__name__, layer.name, [w.shape for w in layer.weights]) for layer in layers]

    built = importlib.import_module(name).build()
    assert description(models[name]) == description(built)
    assert built.name == models[name].name == name
    assert (built.layers[0].name, built.layers[-1].name) == ("image", "class")


@pytest.mark.parametrize("name", NAMES)
def test_batch_norms_are_trained(name: str, models: dict[str, keras.Model]) -> None:
    """A BN left at its initial values would make every fold trivially exact."""
    for bn in batch_norms(models[name]):
        initial = {"gamma": 1.0, "beta": 0.0, "moving_mean": 0.0, "moving_variance": 1.0}
        for weight, value in initial.items():
            distance = np.abs(keras.ops.convert_to_numpy(getattr(bn, weight)) - value)
            assert distance.mean() > 0.01, f"{bn.name}/{weight}"
        assert np.all(keras.ops.convert_to_numpy(bn.moving_variance) >= 0), bn.name


@pytest.mark.parametrize("name", NAMES)
def test_every_batch_norm_can_be_folded(name: str, models: dict[str, keras.Model]) -> None:
    """Backward into a linear layer feeding only the BN; in `mlp_bn_after`, forward into its one reader."""
    readers: dict[str, list[keras.Layer]] = {layer.name: [] for layer in models[name].layers}
    producer = {}
    for layer in models[name].layers[1:]:
        for tensor in keras.tree.flatten(layer.input):
            producer[layer.name] = tensor._keras_history.operation
            readers[producer[layer.name].name].append(layer)
    for bn in batch_norms(models[name]):
        before = producer[bn.name]
        linear = isinstance(before, LINEAR) and before.activation is keras.activations.linear
        backward = linear and readers[before.name] == [bn]
        forward = [type(reader) for reader in readers[bn.name]] == [keras.layers.Dense]
        assert (forward and not backward) if name == "mlp_bn_after" else backward, bn.name


def test_sample_is_in_the_documented_format() -> None:
    with np.load(MODELS / "fashion_sample.npz") as sample:
        x, y = sample["x"], sample["y"]
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((256, 28, 28, 1), np.float32, (256,), np.int64)
    assert (x.min(), x.max()) == (0.0, 1.0)
    assert set(y.tolist()) == set(range(10))


@pytest.mark.parametrize("name", NAMES)
def test_accuracy_on_the_sample(name: str, models: dict[str, keras.Model]) -> None:
    """At least the recorded accuracy p less three standard errors, 3 * sqrt(p (1 - p) / n)."""
    with np.load(MODELS / "fashion_sample.npz") as sample:
        measured, n = accuracy(models[name], sample["x"][..., 0], sample["y"])
    p = recorded_accuracy(name)
    assert measured >= p - 3 * math.sqrt(p * (1 - p) / n)


def fashion_mnist_test_set() -> tuple[np.ndarray, np.ndarray] | None:
    """The test set from where Keras keeps it, or None; read directly, as Keras's loader might download."""
    homes = [Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser(), ROOT.parent / "shared/data/keras"]
    for folder in (home / "datasets" / "fashion-mnist" for home in homes):
        images, labels = folder / "t10k-images-idx3-ubyte.gz", folder / "t10k-labels-idx1-ubyte.gz"
        if images.is_file() and labels.is_file():
            # IDX format: a header of 16 (images) or 8 (labels) bytes, then one byte per value.
            x = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=16)
            y = np.frombuffer(gzip.decompress(labels.read_bytes()), np.uint8, offset=8)
            return x.reshape(-1, 28, 28).astype("float32") / 255, y
    return None


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_accuracy_on_the_full_test_set(name: str, models: dict[str, keras.Model]) -> None:
    data = fashion_mnist_test_set()
    if data is None:
        pytest.skip("no Fashion-MNIST test set under KERAS_HOME")
    measured, n = accuracy(models[name], *data)
    assert n == (8_000 if name == "fashion_cnn_8" else 10_000)
    assert measured == pytest.approx(recorded_accuracy(name), abs=0.001)
