"""The independent proof: plain Keras agrees with deploykit, and disagrees when a weight is wrong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import keras
import pytest
from nets import enliven

from deploykit import graph
from deploykit.archive import write_keras
from deploykit.fuse import fuse

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "reprove.py"
L = keras.layers


def reproved(original: Path, other: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, original, other], capture_output=True, text=True, check=False)


def test_it_takes_nobodys_word():
    names = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse(SCRIPT.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert names <= {"__future__", "argparse", "os", "sys", "keras", "numpy"}


@pytest.mark.slow
def test_plain_keras_agrees_with_a_fold_and_not_with_a_wrong_weight(tmp_path):
    a, b = keras.Input((8, 8, 3), name="a"), keras.Input((5,), name="b")
    body = keras.Sequential([keras.Input((8, 8, 3)), L.Conv2D(4, 3), L.BatchNormalization(), L.ReLU()], name="body")
    y = L.Concatenate()([L.GlobalAveragePooling2D()(body(a / 127.5 - 1)), L.BatchNormalization()(L.Dense(3)(b))])
    model = enliven(keras.Model([a, b], L.Dense(2)(y)))
    original = write_keras(model, tmp_path / "original.keras")
    fused = fuse(model).model
    right = reproved(original, write_keras(fused, tmp_path / "fused.keras"))
    assert right.returncode == 0, right.stderr
    assert "BatchNormalization: 2 -> " in right.stdout
    layer = next(layer for layer in fused.layers if isinstance(layer, L.Conv2D))
    layer.bias.assign(graph.numpy(layer.bias) * 1.001)
    assert reproved(original, write_keras(fused, tmp_path / "wrong.keras")).returncode == 1
