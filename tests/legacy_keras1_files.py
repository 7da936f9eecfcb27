"""Files as Keras 1 wrote them, and what their layers compute: both from its sources, in numpy and h5py alone.

A layer is ``(entry, arrays)``: its description as ``get_config`` had it, and its arrays by name in the order of
``layer.weights``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

Entry = dict[str, Any]
Arrays = dict[str, np.ndarray]
Layer = tuple[Entry, Arrays]

random = np.random.default_rng(1)


def rand(*shape: int) -> np.ndarray:
    return random.normal(0, 0.5, shape).astype(np.float32)


def write(
    path: Path,
    model: Entry,
    groups: Mapping[str, Arrays],
    *,
    backend: str = "tensorflow",
    version: str | None = "1.2.2",
) -> Path:
    """``keras.models.save_model`` of Keras 1: no backend; variables of TensorFlow end in ``:0``."""
    with h5py.File(path, "w") as file:
        if version is not None:
            file.attrs["keras_version"] = version.encode()
        file.attrs["model_config"] = json.dumps(model).encode()
        _write_groups(file.create_group("model_weights"), groups, backend)
    return path


def write_apart(
    folder: Path,
    model: Entry,
    groups: Mapping[str, Arrays],
    *,
    backend: str = "tensorflow",
    version: str | None = "1.2.2",
) -> tuple[Path, Path]:
    """``model.to_json`` and ``model.save_weights`` of Keras 1: neither names the backend, weights no version either."""
    described, weights = folder / "model.json", folder / "weights.h5"
    described.write_text(json.dumps({**model, "keras_version": version} if version else model))
    with h5py.File(weights, "w") as file:
        _write_groups(file, groups, backend)
    return described, weights


def _write_groups(weights: h5py.Group, groups: Mapping[str, Arrays], backend: str) -> None:
    suffix = ":0" if backend == "tensorflow" else ""
    weights.attrs["layer_names"] = [name.encode() for name in groups]
    for name, arrays in groups.items():
        group = weights.create_group(name)
        group.attrs["weight_names"] = [f"{weight}{suffix}".encode() for weight in arrays]
        for weight, value in arrays.items():
            group.create_dataset(f"{weight}{suffix}", data=value)


# -------------------------------------------------------------------------------------------------- descriptions

TRAINING = dict.fromkeys(
    ("W_regularizer", "b_regularizer", "activity_regularizer", "W_constraint", "b_constraint"), None
)


def layer(kind: str, name: str, shape: Sequence[int | None] | None = None, arrays: Arrays | None = None, **config):
    """``shape``: what the first layer of a Sequential was told, without the batch."""
    base: Entry = {"name": name, "trainable": True}
    if shape is not None:
        base |= {"batch_input_shape": [None, *shape], "input_dtype": "float32"}
    return {"class_name": kind, "config": {**base, **config}}, arrays or {}


def dense(name, inputs, units, activation="linear", shape=None, bias=True, kind="Dense", **more) -> Layer:
    arrays = {f"{name}_W": rand(inputs, units)} | ({f"{name}_b": rand(units)} if bias else {})
    more = {"init": "glorot_uniform", "input_dim": inputs if shape else None, **TRAINING, **more}
    return layer(kind, name, shape, arrays, output_dim=units, activation=activation, bias=bias, **more)


def conv1d(name, inputs, filters, length, shape=None, border_mode="valid", subsample_length=1, old=False, **more):
    kernel = rand(filters, inputs, length, 1) if old else rand(length, 1, inputs, filters)
    config = {
        "nb_filter": filters,
        "filter_length": length,
        "init": "glorot_uniform",
        "activation": "linear",
        "border_mode": border_mode,
        "subsample_length": subsample_length,
        "bias": True,
        "input_dim": None,
        "input_length": None,
        **TRAINING,
        **more,
    }
    kind = "AtrousConvolution1D" if "atrous_rate" in more else "Convolution1D"
    return layer(kind, name, shape, {f"{name}_W": kernel, f"{name}_b": rand(filters)}, **config)


def conv2d(name, inputs, filters, rows, cols, shape=None, order="tf", kind="Convolution2D", **more) -> Layer:
    kernel = rand(filters, inputs, rows, cols) if order == "th" else rand(rows, cols, inputs, filters)
    config = {
        "nb_filter": filters,
        "nb_row": rows,
        "nb_col": cols,
        "init": "glorot_uniform",
        "activation": "linear",
        "border_mode": "valid",
        "subsample": [1, 1],
        "dim_ordering": order,
        "bias": True,
        **TRAINING,
        **more,
    }
    return layer(kind, name, shape, {f"{name}_W": kernel, f"{name}_b": rand(filters)}, **config)


def conv3d(name, inputs, filters, sizes, shape=None, order="tf", **more) -> Layer:
    kernel = rand(filters, inputs, *sizes) if order == "th" else rand(*sizes, inputs, filters)
    config = {f"kernel_dim{n + 1}": size for n, size in enumerate(sizes)} | {
        "nb_filter": filters,
        "dim_ordering": order,
        "init": "glorot_uniform",
        "activation": "linear",
        "border_mode": "valid",
        "subsample": [1, 1, 1],
        "bias": True,
        **TRAINING,
        **more,
    }
    return layer("Convolution3D", name, shape, {f"{name}_W": kernel, f"{name}_b": rand(filters)}, **config)


def batchnorm(name, size, axis=-1, mode=0, epsilon=1e-3, shape=None, **more) -> Layer:
    kinds = {"gamma": rand(size), "beta": rand(size), "running_mean": rand(size), "running_std": rand(size) ** 2 + 0.1}
    arrays = {f"{name}_{kind}": value for kind, value in kinds.items()}
    config = {"epsilon": epsilon, "mode": mode, "axis": axis, "momentum": 0.99}
    config |= {"gamma_regularizer": None, "beta_regularizer": None}
    return layer("BatchNormalization", name, shape, arrays, **config, **more)


GATES = {"LSTM": "icfo", "GRU": "zrh"}


def recurrent(kind, name, inputs, units, shape=None, consume_less="cpu", prefix="", **more) -> Layer:
    full = f"{prefix}{name}"
    if kind == "SimpleRNN" or consume_less == "gpu":
        many = len(GATES.get(kind, "h")) * units
        kinds = {"W": rand(inputs, many), "U": rand(units, many), "b": rand(many)}
    else:
        kinds = {}
        for gate in GATES[kind]:
            kinds |= {f"W_{gate}": rand(inputs, units), f"U_{gate}": rand(units, units), f"b_{gate}": rand(units)}
    config = {
        "return_sequences": False,
        "go_backwards": False,
        "stateful": False,
        "unroll": False,
        "consume_less": consume_less,
        "input_dim": inputs,
        "input_length": None,
        "output_dim": units,
        "init": "glorot_uniform",
        "inner_init": "orthogonal",
        "activation": "tanh",
        "W_regularizer": None,
        "U_regularizer": None,
        "b_regularizer": None,
        "dropout_W": 0.2,
        "dropout_U": 0.1,
    }
    config |= {"inner_activation": "hard_sigmoid"} if kind != "SimpleRNN" else {}
    config |= {"forget_bias_init": "one"} if kind == "LSTM" else {}
    return layer(kind, name, shape, {f"{full}_{key}": value for key, value in kinds.items()}, **config | more)


def embedding(name, words, size, length=None, mask_zero=False) -> Layer:
    entry, arrays = layer(
        "Embedding",
        name,
        None,
        {f"{name}_W": rand(words, size)},
        batch_input_shape=[None, length],
        input_dtype="int32",
        input_dim=words,
        output_dim=size,
        init="uniform",
        input_length=length,
        mask_zero=mask_zero,
        activity_regularizer=None,
        W_regularizer=None,
        W_constraint=None,
        dropout=0.2,
    )
    return entry, arrays


def pool(kind, name, size, stride=None, border_mode="valid", order="tf", shape=None) -> Layer:
    if kind.endswith("1D"):
        return layer(kind, name, shape, pool_length=size, stride=stride or size, border_mode=border_mode)
    config = {"pool_size": size, "strides": stride or size, "border_mode": border_mode, "dim_ordering": order}
    return layer(kind, name, shape, **config)


def merge(name, mode, branches: Sequence[Entry] | None = None, **more) -> Layer:
    config = {
        "name": name,
        "mode": mode,
        "mode_type": "raw",
        "concat_axis": -1,
        "dot_axes": -1,
        "output_shape": None,
        "output_shape_type": "raw",
        "output_mask": None,
        "output_mask_type": "raw",
        "arguments": {},
        **more,
    }
    return {"class_name": "Merge", "config": config | ({"layers": list(branches)} if branches else {})}, {}


def sequential(*layers: Layer) -> tuple[Entry, dict[str, Arrays]]:
    """The description of a Sequential, and its layer groups."""
    return (
        {"class_name": "Sequential", "config": [entry for entry, _ in layers]},
        {entry["config"]["name"]: arrays for entry, arrays in layers},
    )


def source(name, *shape, dtype="float32") -> Layer:
    config = {"batch_input_shape": [None, *shape], "input_dtype": dtype, "sparse": False, "name": name}
    return {"class_name": "InputLayer", "config": config}, {}


def functional(
    name: str, layers: Sequence[tuple[Layer, Sequence[Sequence[Any]]]], outputs: Sequence[Any]
) -> tuple[Entry, dict[str, Arrays]]:
    """``layers``: each with the references of its one call."""
    entries, groups, inputs = [], {}, []
    for (entry, arrays), feeds in layers:
        own = entry["config"]["name"] if isinstance(entry["config"], dict) else entry["name"]
        entries.append({**entry, "name": own, "inbound_nodes": [[list(feed) for feed in feeds]] if feeds else []})
        groups[own] = arrays
        if entry["class_name"] == "InputLayer":
            inputs.append([own, 0, 0])
    config = {"name": name, "layers": entries, "input_layers": inputs, "output_layers": [list(out) for out in outputs]}
    return {"class_name": "Model", "config": config}, groups


# ----------------------------------------------------------------------------------------------------- references


def hard_sigmoid(x):
    return np.clip(0.2 * x + 0.5, 0, 1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def of(arrays: Arrays) -> list[np.ndarray]:
    return [value.astype(np.float64) for value in arrays.values()]


def correlate(x, kernel, margins=None, strides=None, dilations=None):
    """x: (batch, sizes..., channels), kernel: (sizes..., channels, filters)."""
    rank = kernel.ndim - 2
    margins, strides, dilations = margins or [(0, 0)] * rank, strides or [1] * rank, dilations or [1] * rank
    x = np.pad(x.astype(np.float64), [(0, 0), *margins, (0, 0)])
    sizes = [
        (n - (k - 1) * d - 1) // s + 1
        for n, k, s, d in zip(x.shape[1:], kernel.shape, strides, dilations, strict=False)
    ]
    out = np.zeros((len(x), *sizes, kernel.shape[-1]))
    for place in np.ndindex(*kernel.shape[:rank]):
        window = tuple(
            slice(p * d, p * d + (size - 1) * s + 1, s)
            for p, d, s, size in zip(place, dilations, strides, sizes, strict=True)
        )
        out += x[(slice(None), *window)] @ kernel[place]
    return out


def rotated(kernel):
    return np.flip(kernel, axis=tuple(range(kernel.ndim - 2)))


def same_of_tensorflow(sizes, kernel, strides):
    totals = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(sizes, kernel, strides, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


def convolve_of_theano(x, kernel, border_mode, strides):
    """As Theano: kernels rotated, "same" is "half" padding cut to ceil(n/s)."""
    rank = kernel.ndim - 2
    margin = {"valid": lambda k: 0, "same": lambda k: k // 2, "full": lambda k: k - 1}[border_mode]
    out = correlate(x, rotated(kernel), [(margin(k), margin(k)) for k in kernel.shape[:rank]], strides)
    if border_mode == "same":
        cut = [slice(0, -(-n // s)) for n, s in zip(x.shape[1 : rank + 1], strides, strict=True)]
        out = out[(slice(None), *cut)]
    return out


def last(x):
    """(batch, channels, sizes...) -> (batch, sizes..., channels)"""
    return np.moveaxis(x, 1, -1)


def first(x):
    return np.moveaxis(x, -1, 1)


def th_kernel(kernel):
    """(filters, channels, sizes...) -> (sizes..., channels, filters)"""
    return np.transpose(kernel, (*range(2, kernel.ndim), 1, 0))


def deconvolve(x, kernel, shape, strides, before=(0, 0)):
    """The gradient of a correlation: kernel (rows, cols, channels, filters), ``before``: its padding in front."""
    b, rows, cols, _ = x.shape
    k = kernel.shape
    full = np.zeros((b, max((rows - 1) * strides[0] + k[0], shape[0] + before[0]),
                     max((cols - 1) * strides[1] + k[1], shape[1] + before[1]), k[3]))  # fmt: skip
    for i in range(rows):
        for j in range(cols):
            patch = np.einsum("bc,rsco->brso", x[:, i, j].astype(np.float64), kernel)
            full[:, i * strides[0] : i * strides[0] + k[0], j * strides[1] : j * strides[1] + k[1]] += patch
    return full[:, before[0] : before[0] + shape[0], before[1] : before[1] + shape[1]]


def normalise(x, arrays, axis, epsilon):
    gamma, beta, mean, variance = of(arrays)
    shape = [1] * x.ndim
    shape[axis] = -1
    gamma, beta, mean, variance = (v.reshape(shape) for v in (gamma, beta, mean, variance))
    return (x - mean) / np.sqrt(variance + epsilon) * gamma + beta


def run(kind, x, arrays, mask=None, sequences=False, backwards=False, apart=True):
    """A recurrent layer over (batch, time, features); masked steps keep the state."""
    values = of(arrays)
    by = {}
    if kind == "SimpleRNN":
        by = dict(zip(("W", "U", "b"), values, strict=True))
    elif apart:
        names = [f"{part}_{gate}" for gate in GATES[kind] for part in "WUb"]
        by = dict(zip(names, values, strict=True))
    else:
        order = {"LSTM": "ifco", "GRU": "zrh"}[kind]
        for part, value in zip("WUb", values, strict=True):
            by |= {f"{part}_{gate}": piece for gate, piece in zip(order, np.split(value, len(order), -1), strict=True)}
    units = by["U" if kind == "SimpleRNN" else f"U_{GATES[kind][0]}"].shape[0]
    h = c = np.zeros((len(x), units))
    outputs = []
    steps = range(x.shape[1])
    for t in reversed(steps) if backwards else steps:
        now = x[:, t].astype(np.float64)

        def gate(name, state, now=now):
            return now @ by[f"W_{name}"] + state @ by[f"U_{name}"] + by[f"b_{name}"]

        if kind == "SimpleRNN":
            new, cell = np.tanh(now @ by["W"] + h @ by["U"] + by["b"]), c
        elif kind == "GRU":
            z, r = hard_sigmoid(gate("z", h)), hard_sigmoid(gate("r", h))
            new, cell = z * h + (1 - z) * np.tanh(gate("h", r * h)), c
        else:
            i, f, o = (hard_sigmoid(gate(name, h)) for name in "ifo")
            cell = f * c + i * np.tanh(gate("c", h))
            new = o * np.tanh(cell)
        keep = np.ones((len(x), 1), bool) if mask is None else mask[:, t : t + 1]
        h, c = np.where(keep, new, h), np.where(keep, cell, c)
        outputs.append(h)
    return np.stack(outputs, 1) if sequences else h


def pooled(x, sizes, strides, margins=None, reduce=np.nanmax):
    """(batch, rows, cols, channels); margins count for nothing."""
    margins = margins or [(0, 0), (0, 0)]
    x = np.pad(x.astype(np.float64), [(0, 0), *margins, (0, 0)], constant_values=np.nan)
    shape = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:3], sizes, strides, strict=True)]
    out = np.zeros((len(x), *shape, x.shape[-1]))
    for i, j in np.ndindex(*shape):
        window = x[:, i * strides[0] : i * strides[0] + sizes[0], j * strides[1] : j * strides[1] + sizes[1]]
        out[:, i, j] = reduce(window, axis=(1, 2))
    return out
