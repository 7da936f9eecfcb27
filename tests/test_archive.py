"""Written .keras files: whole, loadable by plain Keras, the same bytes twice."""

from __future__ import annotations

import subprocess
import sys
import time

import keras
import pytest
from nets import chain, enliven

from deploykit import graph
from deploykit.archive import write_keras
from deploykit.errors import OutputError
from deploykit.fuse import fuse

L = keras.layers


def net():
    x = keras.Input((8, 8, 3), name="x")
    y = L.ReLU()(L.BatchNormalization()(L.Conv2D(4, 3, dtype="mixed_float16")(x)))
    return enliven(keras.Model(x, L.Dense(2)(L.Flatten()(y))))


def test_the_same_model_gives_the_same_bytes(tmp_path):
    model = net()
    first = write_keras(fuse(model).model, tmp_path / "a.keras").read_bytes()
    time.sleep(1.1)  # a zip keeps times to two seconds, metadata.json to one
    assert write_keras(fuse(model).model, tmp_path / "b.keras").read_bytes() == first


@pytest.mark.slow
def test_the_same_file_gives_the_same_bytes_in_another_process(tmp_path):
    source = write_keras(net(), tmp_path / "net.keras")
    for name in ("a", "b"):
        command = [sys.executable, "-m", "deploykit.cli", "fuse", str(source), "-o", str(tmp_path / f"{name}.keras")]
        subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "a.keras").read_bytes() == (tmp_path / "b.keras").read_bytes()


def test_plain_keras_reads_it_and_gets_the_same_answers(tmp_path):
    model = graph.canonical(net())
    copy = keras.models.load_model(write_keras(model, tmp_path / "a.keras"), compile=False, safe_mode=True)
    assert [w.path for w in copy.weights] == [w.path for w in model.weights]
    assert all((graph.numpy(a) == graph.numpy(b)).all() for a, b in zip(copy.weights, model.weights, strict=True))


def test_an_existing_file_needs_force(tmp_path):
    path = tmp_path / "a.keras"
    path.write_text("mine")
    with pytest.raises(OutputError, match="--force"):
        write_keras(chain((2,), L.Dense(2)), path)
    assert path.read_text() == "mine"
    write_keras(chain((2,), L.Dense(2)), path, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.keras"]
