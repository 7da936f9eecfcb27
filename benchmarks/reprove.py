"""The proof that does not take deploykit's word: plain Keras, no deploykit import.

    python benchmarks/reprove.py ORIGINAL.keras FUSED.keras [--samples 16] [--seed 0] [--data FILE.npz]

Loads both files with `keras.models.load_model` (safe mode on), rebuilds each from its config with dtype
policy float64, runs both on the same inputs, in float64 and in float32, and prints the relative L2
differences. Exit code 1 when the fused file, evaluated in float64, differs by more than rounding its weights
explains: four times the original's own float32 error, or four units in the last place of float32.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np


def in_float64(model: keras.Model) -> keras.Model:
    """A copy of the model that computes in float64."""

    def config_in_float64(value):
        if isinstance(value, dict):
            return {k: "float64" if k == "dtype" and is_float(v) else config_in_float64(v) for k, v in value.items()}
        return [config_in_float64(v) for v in value] if isinstance(value, list) else value

    def is_float(dtype) -> bool:
        name = dtype.get("config", {}).get("name", "") if isinstance(dtype, dict) else dtype
        return isinstance(name, str) and "float" in name

    config = config_in_float64(keras.saving.serialize_keras_object(model))
    copy = keras.saving.deserialize_keras_object(config)
    copy.set_weights(model.get_weights())
    for layer in copy._flatten_layers():
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()
    return copy


def inputs_of(model: keras.Model, count: int, seed: int, data: str | None) -> list[np.ndarray]:
    """Random inputs at several scales, or the arrays of an .npz (`x`, or one per input)."""
    if data is not None:
        with np.load(data, allow_pickle=False) as archive:
            names = [t._keras_history.operation.name for t in model.inputs]
            arrays = [archive[n] if n in archive.files else archive["x"] for n in names]
        shapes = [tuple(t.shape[1:]) for t in model.inputs]
        arrays = [a[:count] for a in arrays]
        return [
            a[..., 0] if a.ndim == len(s) + 2 and a.shape[-1] == 1 else a for a, s in zip(arrays, shapes, strict=True)
        ]
    rng = np.random.default_rng(seed)
    found = []
    for tensor in model.inputs:
        shape = (count, *[32 if size is None else size for size in tensor.shape[1:]])
        if "int" in tensor.dtype:
            found.append(rng.integers(0, 2, shape).astype(tensor.dtype))
        else:
            scale = np.geomspace(0.3, 30, count).reshape(-1, *[1] * (len(shape) - 1))
            found.append((rng.normal(0, 1, shape) * scale).astype(tensor.dtype))
    return found


def run(model: keras.Model, arrays: list[np.ndarray], batch: int = 1) -> list[np.ndarray]:
    """Outputs of a model, ``batch`` samples at a time: one, unless told otherwise, to bound memory."""
    pieces = []
    for i in range(0, len(arrays[0]), batch):
        parts = zip(arrays, model.inputs, strict=True)
        flat = [keras.ops.convert_to_tensor(a[i : i + batch], dtype=t.dtype) for a, t in parts]
        given = keras.tree.pack_sequence_as(model.input, flat) if hasattr(model, "input") else flat
        outputs = keras.tree.flatten(model(given, training=False))
        pieces.append([np.asarray(keras.ops.convert_to_numpy(o), np.float64) for o in outputs])
    return [np.concatenate(part) for part in zip(*pieces, strict=True)]


def distance(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """Largest relative L2 distance over the outputs; infinite where one is not finite alone."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape or not np.array_equal(np.isfinite(x), np.isfinite(y)):
            return float("inf")
        finite = np.isfinite(y)
        size = np.linalg.norm(y[finite])
        worst = max(worst, float(np.linalg.norm((x - y)[finite]) / size) if size else float(np.abs(x - y).max()))
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("original")
    parser.add_argument("fused")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data")
    options = parser.parse_args()
    models = [keras.models.load_model(path, compile=False) for path in (options.original, options.fused)]
    arrays = inputs_of(models[0], options.samples, options.seed, options.data)
    norms = [sum(isinstance(x, keras.layers.BatchNormalization) for x in m._flatten_layers()) for m in models]
    print(f"BatchNormalization: {norms[0]} -> {norms[1]}")
    reference = run(in_float64(models[0]), arrays)
    stored = distance(run(in_float64(models[1]), arrays), reference)
    original, fused = (distance(run(model, arrays), reference) for model in models)
    print(f"float64, weights as stored:   fused differs by {stored:.3g}")
    print(f"float32 against that float64: original {original:.3g}, fused {fused:.3g}")
    return 0 if stored <= 4 * max(original, 2.0**-23) else 1


if __name__ == "__main__":
    sys.exit(main())
