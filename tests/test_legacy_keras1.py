"""Models of Keras 1 answer in Keras 3 as they did: compared with what its sources compute, written out in numpy."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import legacy_keras1_files as k1
import numpy as np
import pytest
from legacy_keras1_files import (
    batchnorm,
    conv1d,
    conv2d,
    conv3d,
    convolve_of_theano,
    correlate,
    deconvolve,
    dense,
    embedding,
    first,
    functional,
    last,
    layer,
    merge,
    normalise,
    of,
    pool,
    pooled,
    rand,
    recurrent,
    same_of_tensorflow,
    sequential,
    source,
    th_kernel,
)

import deploykit
from deploykit import graph
from deploykit.errors import DeploykitError, LoadError, UnsupportedModelError
from deploykit.load.legacy import translate
from deploykit.load.legacy.keras1 import backend_of, modernise, rearranged, rearranged_file


def load(path: Path) -> keras.Model:
    return deploykit.load(path).model


# Keras 3 adds a bias along the last axis where that is as long as the channels in front: sizes below differ from them.

Case = tuple[Any, dict[str, k1.Arrays], list[np.ndarray], list[np.ndarray]]
CASES: dict[str, tuple[Callable[[], Case], str]] = {}


def case(backend: str = "tensorflow", name: str | None = None):
    def keep(make: Callable[[], Case]) -> Callable[[], Case]:
        CASES[name or make.__name__] = make, backend
        return make

    return keep


def single(one: k1.Layer, x: np.ndarray, y: np.ndarray) -> Case:
    return *sequential(one), [x], [y]


# ---------------------------------------------------------------------------------------------- dense and the like


@case()
def dense_relu():
    one = dense("dense_1", 6, 4, "relu", shape=[6])
    w, b = of(one[1])
    x = rand(3, 6)
    return single(one, x, np.maximum(x @ w + b, 0))


@case()
def dense_without_bias_on_sequences():
    one = dense("dense_1", 6, 4, shape=[5, 6], bias=False)
    x = rand(3, 5, 6)
    return single(one, x, x @ of(one[1])[0])


@case()
def time_distributed_dense():
    one = dense("td", 6, 4, "hard_sigmoid", shape=[5, 6], kind="TimeDistributedDense", input_length=5)
    w, b = of(one[1])
    x = rand(3, 5, 6)
    return single(one, x, k1.hard_sigmoid(x @ w + b))


@case()
def maxout():
    arrays = {"m_W": rand(4, 6, 3), "m_b": rand(4, 3)}
    config = {"output_dim": 3, "init": "glorot_uniform", "nb_feature": 4, "bias": True, "input_dim": 6, **k1.TRAINING}
    x = rand(5, 6)
    y = (np.einsum("bi,fio->bfo", x, arrays["m_W"]) + arrays["m_b"]).max(axis=1)
    two = dense("d", 3, 2)
    w, b = of(two[1])
    return *sequential(layer("MaxoutDense", "m", [6], arrays, **config), two), [x], [y @ w + b]


@case()
def embedding_and_masked_lstm():
    """The IMDB example, with a mask."""
    words, lstm = embedding("embedding_1", 9, 4, length=6, mask_zero=True), recurrent("LSTM", "lstm_1", 4, 5)
    out = [dense("dense_1", 5, 1), layer("Activation", "activation_1", activation="sigmoid")]
    x = np.array([[1, 2, 3, 4, 5, 6], [0, 0, 3, 8, 0, 2], [7, 0, 0, 0, 0, 0]], np.int32)
    h = k1.run("LSTM", of(words[1])[0][x], lstm[1], mask=x != 0)
    w, b = of(out[0][1])
    dropout = layer("Dropout", "dropout_1", p=0.5)
    return *sequential(words, dropout, lstm, *out), [x], [k1.sigmoid(h @ w + b)]


@case()
def activations_with_weights_and_without():
    """PReLU, LeakyReLU, ELU, ThresholdedReLU, noise."""
    alphas = rand(6)
    layers = [
        layer("PReLU", "p", [6], {"p_alphas": alphas}, init="zero"),
        layer("LeakyReLU", "l", alpha=0.2),
        layer("ELU", "e", alpha=0.7),
        layer("GaussianNoise", "n", sigma=0.3),
        layer("GaussianDropout", "g", p=0.3),
        layer("ThresholdedReLU", "t", theta=0.1),
    ]
    x = rand(8, 6)
    y = np.where(x > 0, x, alphas * x)
    y = np.where(y > 0, y, 0.2 * y)
    y = np.where(y > 0, y, 0.7 * (np.exp(y) - 1))
    return *sequential(*layers), [x], [np.where(y > 0.1, y, 0)]


# ----------------------------------------------------------------------------------------------------- convolutions


def conv1d_of(old: bool, backend: str, **more: Any) -> Callable[[], Case]:
    def make() -> Case:
        one = conv1d("c", 3, 4, 3, shape=[7, 3], old=old, **more)
        x = rand(2, 7, 3)
        kernel, b = of(one[1])
        kernel = np.transpose(kernel, (2, 3, 1, 0))[:, 0] if old else kernel[:, 0]
        mode, s, d = more.get("border_mode", "valid"), more.get("subsample_length", 1), more.get("atrous_rate", 1)
        if backend == "theano":
            return single(one, x, convolve_of_theano(x, kernel, mode, [s]) + b)
        margins = same_of_tensorflow([7], [2 * d + 1], [s]) if mode == "same" else None
        return single(one, x, correlate(x, kernel, margins, [s], [d]) + b)

    return make


for backend in ("tensorflow", "theano"):
    for old in (False, True):
        for mode in ("valid", "same"):
            more = {"border_mode": mode, "subsample_length": 2}
            case(backend, f"conv1d old={old} {mode} {backend}")(conv1d_of(old, backend, **more))
case("tensorflow", "conv1d atrous")(conv1d_of(False, "tensorflow", atrous_rate=2, border_mode="same"))
case("theano", "conv1d full theano")(conv1d_of(False, "theano", border_mode="full"))


def conv2d_of(order: str, backend: str, size=(3, 2), n=(6, 5), **more: Any) -> Callable[[], Case]:
    def make() -> Case:
        shape = [*n, 3] if order == "tf" else [3, *n]
        one = conv2d("c", 3, 7, *size, shape=shape, order=order, **more)
        x = rand(2, *shape)
        kernel, b = of(one[1])
        kernel, z = (kernel, x) if order == "tf" else (th_kernel(kernel), last(x))
        mode, strides = more.get("border_mode", "valid"), more.get("subsample", [1, 1])
        if backend == "theano":
            y = convolve_of_theano(z, kernel, mode, strides) + b
        else:
            rates = more.get("atrous_rate", [1, 1])
            sizes = [(k - 1) * d + 1 for k, d in zip(size, rates, strict=True)]
            margins = same_of_tensorflow(n, sizes, strides) if mode == "same" else None
            y = correlate(z, kernel, margins, strides, rates) + b
        return single(one, x, y if order == "tf" else first(y))

    return make


for backend in ("tensorflow", "theano"):
    for order in ("tf", "th"):
        for mode in ("valid", "same"):
            for step in (1, 2):
                more = {"border_mode": mode, "subsample": [step, step]}
                case(backend, f"conv2d {order} {mode} {step} {backend}")(conv2d_of(order, backend, **more))
case("theano", "conv2d full theano")(conv2d_of("th", "theano", border_mode="full"))
case("theano", "conv2d odd theano")(conv2d_of("th", "theano", size=(3, 5), border_mode="same"))
case("theano", "conv2d full strided")(conv2d_of("tf", "theano", size=(2, 4), border_mode="full", subsample=[2, 1]))
atrous = {"kind": "AtrousConvolution2D", "atrous_rate": [2, 2], "border_mode": "same"}
case("tensorflow", "conv2d atrous")(conv2d_of("th", "tensorflow", **atrous))


def conv3d_of(order: str, backend: str) -> Callable[[], Case]:
    def make() -> Case:
        shape = [4, 5, 4, 2] if order == "tf" else [2, 4, 5, 4]
        one = conv3d("c", 2, 5, (3, 2, 2), shape=shape, order=order, subsample=[1, 2, 1])
        x = rand(2, *shape)
        kernel, b = of(one[1])
        kernel, z = (kernel, x) if order == "tf" else (th_kernel(kernel), last(x))
        kernel = k1.rotated(kernel) if backend == "theano" else kernel
        y = correlate(z, kernel, None, [1, 2, 1]) + b
        return single(one, x, y if order == "tf" else first(y))

    return make


for backend in ("tensorflow", "theano"):
    for order in ("tf", "th"):
        case(backend, f"conv3d {order} {backend}")(conv3d_of(order, backend))


def deconv_of(order: str, backend: str, mode: str, size, steps, shape) -> Callable[[], Case]:
    """``shape`` of the output; the input's follows."""

    def make() -> Case:
        n = [(o - k) // s + 1 if mode == "valid" else -(-o // s) for o, k, s in zip(shape, size, steps, strict=True)]
        full = [*n, 3] if order == "tf" else [3, *n]
        wanted = [None, *shape, 4] if order == "tf" else [None, 4, *shape]
        more = {"kind": "Deconvolution2D", "output_shape": wanted, "subsample": list(steps), "border_mode": mode}
        one = conv2d("c", 3, 4, *size, shape=full, order=order, **more)
        x = rand(2, *full)
        kernel, b = of(one[1])
        kernel, z = (kernel, x) if order == "tf" else (th_kernel(kernel), last(x))
        before = [margin for margin, _ in same_of_tensorflow(shape, size, steps)] if mode == "same" else (0, 0)
        if backend == "theano":  # the gradient of a convolution
            kernel, before = k1.rotated(kernel), [k // 2 for k in size] if mode == "same" else (0, 0)
        y = deconvolve(z, kernel, shape, steps, before) + b
        return single(one, x, y if order == "tf" else first(y))

    return make


for title, arguments in {
    "valid": ("tf", "tensorflow", "valid", (3, 3), (2, 2), (9, 7)),
    "valid and more": ("tf", "tensorflow", "valid", (3, 2), (2, 2), (10, 7)),
    "valid, steps beyond the kernel": ("tf", "tensorflow", "valid", (2, 1), (3, 2), (8, 6)),
    "same": ("tf", "tensorflow", "same", (3, 4), (2, 2), (8, 6)),
    "same and less": ("tf", "tensorflow", "same", (3, 4), (2, 3), (7, 8)),
    "th": ("th", "tensorflow", "valid", (3, 2), (1, 1), (6, 5)),
    "valid on Theano": ("tf", "theano", "valid", (3, 2), (2, 2), (10, 7)),
    "same on Theano": ("tf", "theano", "same", (3, 5), (1, 1), (6, 5)),
}.items():
    case(arguments[1], f"deconv {title}")(deconv_of(*arguments))


def separable_of(order: str) -> Callable[[], Case]:
    def make() -> Case:
        depth, point = (rand(2, 3, 3, 2), rand(7, 6, 1, 1)) if order == "th" else (rand(3, 2, 3, 2), rand(1, 1, 6, 7))
        arrays = {"s_depthwise_kernel": depth, "s_pointwise_kernel": point, "s_b": rand(7)}
        shape = [3, 6, 5] if order == "th" else [6, 5, 3]
        entry, _ = conv2d("s", 3, 7, 3, 2, shape=shape, order=order, kind="SeparableConvolution2D", depth_multiplier=2)
        for key in ("W_regularizer", "W_constraint"):
            del entry["config"][key]
        entry["config"].update(dict.fromkeys(("depthwise_regularizer", "pointwise_constraint")))
        x = rand(2, *shape)
        z, depth, point = (last(x), th_kernel(depth), th_kernel(point)) if order == "th" else (x, depth, point)
        mapped = np.concatenate([correlate(z[..., [c]], depth[:, :, [c]]) for c in range(3)], axis=-1)
        y = mapped @ point[0, 0] + arrays["s_b"]
        return single((entry, arrays), x, first(y) if order == "th" else y)

    return make


case(name="separable th")(separable_of("th"))
case(name="separable tf")(separable_of("tf"))


# ------------------------------------------------------------------------------- normalisation, pooling, geometry


@case()
def batchnorm_of_the_last_axis():
    one = batchnorm("bn", 4, shape=[5, 4], epsilon=1e-2)
    x = rand(3, 5, 4)
    return single(one, x, normalise(x, one[1], -1, 1e-2))


@case()
def batchnorm_of_channels_first():
    one = batchnorm("bn", 3, axis=1, shape=[3, 4, 5], epsilon=1e-5)
    x = rand(2, 3, 4, 5)
    return single(one, x, normalise(x, one[1], 1, 1e-5))


def pool_of(kind: str, size, stride, mode: str, order: str, backend: str) -> Callable[[], Case]:
    def make() -> Case:
        shape = [6, 7, 2] if order == "tf" else [2, 6, 7]
        x = rand(3, *shape)
        z = x if order == "tf" else last(x)
        margins = same_of_tensorflow([6, 7], size, stride) if mode == "same" else None
        y = pooled(z, size, stride, margins, np.nanmax if kind.startswith("Max") else np.nanmean)
        one = pool(kind, "p", list(size), list(stride), mode, order, shape)
        return single(one, x, y if order == "tf" else first(y))

    return make


for kind in ("MaxPooling2D", "AveragePooling2D"):
    for order in ("tf", "th"):
        for mode in ("valid", "same"):
            case(name=f"{kind} {order} {mode}")(pool_of(kind, (3, 2), (2, 1), mode, order, "tensorflow"))
    case("theano", f"{kind} of Theano")(pool_of(kind, (3, 3), (1, 1), "same", "th", "theano"))


@case()
def pool1d():
    x = rand(2, 7, 3)
    y = pooled(x[:, :, None], (2, 1), (2, 1))[:, :, 0]
    return *sequential(pool("MaxPooling1D", "p", 2, shape=[7, 3])), [x], [y]


def global_of(kind: str, order: str, reduce: Any) -> Callable[[], Case]:
    def make() -> Case:
        x = rand(2, 4, 5, 6)
        return single(
            layer(kind, "g", [4, 5, 6], dim_ordering=order), x, reduce(x, (1, 2) if order == "tf" else (2, 3))
        )

    return make


for order in ("tf", "th"):
    case(name=f"global average {order}")(global_of("GlobalAveragePooling2D", order, np.mean))
    case(name=f"global max {order}")(global_of("GlobalMaxPooling2D", order, np.max))


def silent_of(order: str, padding: Any, sides: tuple) -> Callable[[], Case]:
    """Layers that do not record their dim_ordering, in front of one that does."""

    def make() -> Case:
        shape = [4, 5, 2] if order == "tf" else [2, 4, 5]
        x = rand(3, *shape)
        z = np.pad(x if order == "tf" else last(x), [(0, 0), *sides, (0, 0)])
        z = z.repeat(2, axis=1).repeat(3, axis=2)[:, 1:-2, 0:-1]
        y = z.max(axis=(1, 2))
        layers = [
            layer("ZeroPadding2D", "z", shape, padding=padding),
            layer("UpSampling2D", "u", size=[2, 3]),
            layer("Cropping2D", "c", cropping=[[1, 2], [0, 1]]),
            layer("GlobalMaxPooling2D", "g", dim_ordering=order),
        ]
        return *sequential(*layers), [x], [y]

    return make


for order in ("tf", "th"):
    case(name=f"silent {order}")(silent_of(order, [1, 2], ((1, 1), (2, 2))))
case(name="silent four")(silent_of("th", [1, 0, 2, 3], ((1, 0), (2, 3))))
case(name="silent sides")(silent_of("tf", {"top_pad": 2, "right_pad": 1}, ((2, 0), (0, 1))))


@case()
def shapes():
    layers = [
        layer("ZeroPadding1D", "z", [4, 3], padding=1),
        layer("UpSampling1D", "u", length=2),
        layer("Cropping1D", "c", cropping=[1, 2]),
        layer("Permute", "p", dims=[2, 1]),
        layer("Reshape", "r", target_shape=[9, 3]),
        layer("Flatten", "f"),
        layer("RepeatVector", "v", n=2),
        layer("GlobalMaxPooling1D", "g"),
        layer("ActivityRegularization", "a", l1=0.1, l2=0.0),
    ]
    layers.insert(3, layer("SpatialDropout1D", "s", p=0.3))
    x = rand(2, 4, 3)
    z = np.pad(x, [(0, 0), (1, 1), (0, 0)]).repeat(2, axis=1)[:, 1:-2]
    return *sequential(*layers), [x], [z.transpose(0, 2, 1).reshape(2, -1)]


# ------------------------------------------------------------------------------------------------------- recurrence


def recurrent_of(kind: str, consume_less: str, **more: Any) -> Callable[[], Case]:
    def make() -> Case:
        one = recurrent(kind, "r", 3, 4, shape=[5, 3], consume_less=consume_less, **more)
        x = 3 * rand(2, 5, 3)
        given = {"sequences": more.get("return_sequences", False), "backwards": more.get("go_backwards", False)}
        return single(one, x, k1.run(kind, x, one[1], apart=consume_less != "gpu", **given))

    return make


for kind in ("LSTM", "GRU", "SimpleRNN"):
    for less in ("cpu", "mem", "gpu"):
        case(name=f"{kind} {less}")(
            recurrent_of(kind, less, return_sequences=less == "mem", go_backwards=less == "gpu")
        )


def bidirectional(
    name: str, kind: str, inputs: int, units: int, shape=None, **more
) -> tuple[k1.Layer, list[k1.Arrays]]:
    inner, ahead = recurrent(kind, f"{name}_in", inputs, units, prefix="forward_", return_sequences=True)
    _, behind = recurrent(kind, f"{name}_in", inputs, units, prefix="backward_")
    return layer("Bidirectional", name, shape, ahead | behind, layer=inner, merge_mode="concat", **more), [
        ahead,
        behind,
    ]


def both(kind: str, x: np.ndarray, arrays: list[k1.Arrays]) -> np.ndarray:
    ahead = k1.run(kind, x, arrays[0], sequences=True)
    behind = k1.run(kind, x, arrays[1], sequences=True, backwards=True)
    return np.concatenate([ahead, behind[:, ::-1]], axis=-1)


@case()
def bidirectional_lstm_and_gru():
    one, arrays = bidirectional("b", "LSTM", 3, 4, shape=[5, 3])
    two, others = bidirectional("c", "GRU", 8, 2)
    x = rand(2, 5, 3)
    return *sequential(one, two), [x], [both("GRU", both("LSTM", x, arrays), others)]


@case("theano")
def time_distributed_convolution():
    """In a wrapper too, a strided "same" of Theano is a padding and a convolution."""
    inner, arrays = conv2d("c", 2, 4, 3, 3, order="th", border_mode="same", subsample=[2, 2])
    one = layer("TimeDistributed", "t", [4, 2, 6, 5], arrays, layer=inner)
    x = rand(2, 4, 2, 6, 5)
    kernel, b = of(arrays)
    y = convolve_of_theano(last(x.reshape(8, 2, 6, 5)), th_kernel(kernel), "same", [2, 2]) + b
    return *sequential(one), [x], [first(y).reshape(2, 4, 4, 3, 3)]


def conv_lstm_of(order: str, backend: str = "tensorflow") -> Callable[[], Case]:
    def make() -> Case:
        shape = [3, 4, 5, 2] if order == "tf" else [3, 2, 4, 5]
        arrays = {}
        for gate in "icfo":
            for part, inputs in (("W", 2), ("U", 3)):
                kernel = rand(3, 3, inputs, 3)
                arrays[f"l_{part}_{gate}"] = kernel if order == "tf" else np.transpose(kernel, (3, 2, 0, 1))
            arrays[f"l_b_{gate}"] = rand(3)
        config = {
            "nb_filter": 3,
            "nb_row": 3,
            "nb_col": 3,
            "init": "glorot_uniform",
            "inner_init": "orthogonal",
            "forget_bias_init": "one",
            "activation": "tanh",
            "dim_ordering": order,
            "border_mode": "same",
            "inner_activation": "hard_sigmoid",
            "return_sequences": False,
            "go_backwards": False,
            "stateful": False,
        }
        x = rand(2, *shape)
        z = x if order == "tf" else np.moveaxis(x, 2, -1)
        laid = {key: v if v.ndim == 1 or order == "tf" else th_kernel(v) for key, v in arrays.items()}
        if backend == "theano":
            laid = {key: v if v.ndim == 1 else k1.rotated(v) for key, v in laid.items()}
        h = c = np.zeros((2, 4, 5, 3))
        around = [(1, 1), (1, 1)]
        for t in range(3):
            parts = {
                g: correlate(z[:, t], laid[f"l_W_{g}"], around)
                + correlate(h, laid[f"l_U_{g}"], around)
                + laid[f"l_b_{g}"]
                for g in "icfo"
            }
            i, f, o = (k1.hard_sigmoid(parts[g]) for g in "ifo")
            c = f * c + i * np.tanh(parts["c"])
            h = o * np.tanh(c)
        one = layer("ConvLSTM2D", "l", shape, arrays, **config)
        return single(one, x, h if order == "tf" else first(h))

    return make


case(name="conv_lstm tf")(conv_lstm_of("tf"))
case(name="conv_lstm th")(conv_lstm_of("th"))


# ---------------------------------------------------------------------------------------------------------- models


def merge_of(mode: str, law: Callable[[list[np.ndarray]], np.ndarray], **more: Any) -> Callable[[], Case]:
    def make() -> Case:
        ends = [source("a", 3, 4), source("b", 3, 4), merge("m", mode, **more)]
        feeds = [(ends[0], []), (ends[1], []), (ends[2], [("a", 0, 0), ("b", 0, 0)])]
        x = [rand(2, 3, 4), rand(2, 3, 4)]
        return *functional("model_1", feeds, [("m", 0, 0)]), x, [law(x)]

    return make


for mode, law, options in (
    ("sum", lambda x: x[0] + x[1], {}),
    ("mul", lambda x: x[0] * x[1], {}),
    ("ave", lambda x: (x[0] + x[1]) / 2, {}),
    ("max", lambda x: np.maximum(x[0], x[1]), {}),
    ("concat", lambda x: np.concatenate(x, axis=1), {"concat_axis": 1}),
    ("dot", lambda x: np.einsum("bik,bjk->bij", *x), {"dot_axes": [2, 2]}),
    ("dot", lambda x: np.einsum("bki,bkj->bij", *x), {"dot_axes": 1}),
):
    case(name=f"merge {mode} {options}")(merge_of(mode, law, **options))


@case()
def two_branches():
    """A Sequential that begins with a Merge of Sequentials: two inputs, and layers of the branches in the file."""
    left = [dense("dense_1", 4, 5, "tanh", shape=[4]), dense("dense_2", 5, 3)]
    right = [embedding("embedding_1", 7, 3, length=4), layer("Flatten", "flatten_1"), dense("dense_3", 12, 3, "relu")]
    branches = [sequential(*part)[0] for part in (left, right)]
    top = [dense("dense_4", 6, 2), layer("Activation", "activation_1", activation="softmax")]
    model, _ = sequential(merge("merge_1", "concat", branches), *top)
    groups = {one["config"]["name"]: arrays for one, arrays in [*left, *right, *top]}  # without the Merge
    x = [rand(5, 4), np.arange(20).reshape(5, 4).astype(np.int32) % 7]
    (w1, b1), (w2, b2), (w3, b3), (w4, b4) = (of(one[1]) for one in (*left, right[2], top[0]))
    a = np.tanh(x[0] @ w1 + b1) @ w2 + b2
    b = np.maximum(right[0][1]["embedding_1_W"][x[1]].reshape(5, -1) @ w3 + b3, 0)
    return model, groups, x, [k1.softmax(np.concatenate([a, b], 1) @ w4 + b4)]


@case()
def branches_of_branches_that_share_a_layer():
    """In order of depth, the shared layer once; one branch is a functional model."""
    shared = dense("shared", 3, 3, "tanh")
    one = sequential(layer("Dropout", "drop_1", [3], p=0.5), shared)[0]
    two = sequential(layer("Dropout", "drop_2", [3], p=0.5), shared)[0]
    inner = sequential(merge("inner", "mul", [one, two]), dense_2 := dense("after", 3, 2))[0]
    side = dense("side", 4, 2)
    body, body_groups = functional("body", [(source("in", 4), []), (side, [("in", 0, 0)])], [("side", 0, 0)])
    model, _ = sequential(merge("outer", "sum", [inner, body]), last_one := dense("last", 2, 2))
    groups = {"drop_1": {}, "shared": shared[1], "drop_2": {}, "after": dense_2[1], **body_groups, "last": last_one[1]}
    x = [rand(5, 3), rand(5, 3), rand(5, 4)]
    (w, b), (w2, b2), (w3, b3), (w4, b4) = (of(arrays[1]) for arrays in (shared, dense_2, side, last_one))
    a = (np.tanh(x[0] @ w + b) * np.tanh(x[1] @ w + b)) @ w2 + b2
    return model, groups, x, [(a + x[2] @ w3 + b3) @ w4 + b4]


@case()
def nested_models():
    """Arrays of a nested model: all trained ones of all its layers, then the others; frozen ones are others."""
    norm, lstm = batchnorm("bn", 3, shape=[5, 3]), recurrent("LSTM", "lstm", 3, 4)
    frozen, out = dense("frozen", 4, 4), dense("out", 4, 2)
    frozen[0]["config"]["trainable"] = False
    body, parts = sequential(norm, lstm, frozen, out)
    names = [list(arrays) for arrays in parts.values()]
    order = [*names[0][:2], *names[1], *names[3], *names[0][2:], *names[2]]
    together = {key: value for arrays in parts.values() for key, value in arrays.items()}
    groups = {"a": {}, "body": {name: together[name] for name in order}}
    feeds = [(source("a", 5, 3), []), (({**body, "name": "body"}, groups["body"]), [("a", 0, 0)])]
    model, _ = functional("model_1", feeds, [("body", 1, 0)])
    x = rand(2, 5, 3)
    h = k1.run("LSTM", normalise(x, norm[1], -1, 1e-3), lstm[1])
    for one in (frozen, out):
        w, b = of(one[1])
        h = h @ w + b
    return model, groups, [x], [h]


@case()
def nested_wrappers_that_are_frozen():
    """Keras 1 lists the arrays of a frozen TimeDistributed last, those of a frozen Bidirectional among the trained."""
    one, arrays = bidirectional("b", "GRU", 3, 2, shape=[4, 3])
    one[0]["config"]["trainable"] = False
    frozen, top = dense("frozen", 4, 4), dense("top", 4, 3)
    inner = layer("TimeDistributed", "t", None, {}, layer=frozen[0])
    inner[0]["config"]["trainable"] = False
    body, _ = sequential(one, inner, top)
    together = one[1] | top[1] | frozen[1]
    end = layer("Activation", "end", activation="tanh")
    feeds = [(source("a", 4, 3), []), (({**body, "name": "body"}, together), [("a", 0, 0)]), (end, [("body", 1, 0)])]
    model, groups = functional("model_1", feeds, [("end", 0, 0)])
    x = rand(2, 4, 3)
    h = both("GRU", x, arrays)
    for part in (frozen, top):
        w, b = of(part[1])
        h = h @ w + b
    return model, groups, [x], [np.tanh(h)]


@case()
def frozen_time_distributed_model():
    """Of a frozen wrapper around a model with a BatchNormalization, too, what was trained comes first."""
    norm, top = batchnorm("bn", 3, shape=[3]), dense("top", 3, 2)
    body, _ = sequential(norm, top)
    gamma_beta, moments = dict(list(norm[1].items())[:2]), dict(list(norm[1].items())[2:])
    one = layer("TimeDistributed", "t", [4, 3], gamma_beta | top[1] | moments, layer=body)
    one[0]["config"]["trainable"] = False
    x = rand(2, 4, 3)
    w, b = of(top[1])
    return single(one, x, normalise(x, norm[1], -1, 1e-3) @ w + b)


@case()
def branch_that_begins_with_a_model():
    """A functional model inside a branch or behind the Merge keeps its arrays together, under its name."""
    inner = dense("inner", 4, 3, "tanh")
    body, _ = functional("body", [(source("in", 4), []), (inner, [("in", 0, 0)])], [("inner", 0, 0)])
    side, last_one = dense("side", 2, 3, shape=[2]), dense("last", 3, 2)
    top, _ = functional("top", [(source("into", 3), []), (last_one, [("into", 0, 0)])], [("last", 0, 0)])
    left = {"class_name": "Sequential", "config": [body]}
    model, _ = sequential(merge("m", "max", [left, sequential(side)[0]]), (top, {}))
    x = [rand(5, 4), rand(5, 2)]
    (w1, b1), (w2, b2), (w3, b3) = (of(part[1]) for part in (inner, side, last_one))
    y = np.maximum(np.tanh(x[0] @ w1 + b1), x[1] @ w2 + b2) @ w3 + b3
    return model, {"body": inner[1], "side": side[1], "top": last_one[1]}, x, [y]


@case("theano")
def nested_without_names():
    """Sequentials in a Sequential: Keras 1 keeps their weights under names that their descriptions lack."""
    one, two = conv2d("conv_1", 2, 3, 3, 3, shape=[2, 6, 6], order="th"), layer("Flatten", "f")
    three, four = dense("dense_1", 48, 4, "relu", shape=[48]), dense("dense_2", 4, 2)
    model = {"class_name": "Sequential", "config": [sequential(one, two)[0], sequential(three, four)[0]]}
    groups = {"sequential_7": one[1], "sequential_9": three[1] | four[1]}
    x = rand(2, 2, 6, 6)
    (k, b0), (w1, b1), (w2, b2) = (of(part[1]) for part in (one, three, four))
    z = first(convolve_of_theano(last(x), th_kernel(k), "valid", [1, 1]) + b0).reshape(2, -1)
    return model, groups, [x], [np.maximum(z @ w1 + b1, 0) @ w2 + b2]


@case("theano")
def vgg():
    """As VGG16 was written down in 2015: th, paddings that do not say so, Theano."""
    one, two = conv2d("conv1_1", 3, 4, 3, 3, order="th", activation="relu"), conv2d("conv1_2", 4, 4, 3, 3, order="th")
    fc = [dense("dense_1", 64, 6, "relu"), dense("dense_2", 6, 3, "softmax")]
    layers = [
        layer("ZeroPadding2D", "zeropadding2d_1", [3, 8, 8], padding=[1, 1]),
        one,
        layer("ZeroPadding2D", "zeropadding2d_2", padding=[1, 1]),
        two,
        pool("MaxPooling2D", "maxpooling2d_1", [2, 2], [2, 2], order="th"),
        layer("Flatten", "flatten_1"),
        fc[0],
        layer("Dropout", "dropout_1", p=0.5),
        fc[1],
    ]
    x = rand(2, 3, 8, 8)
    z = last(x)
    for part, relu in ((one, True), (two, False)):
        kernel, b = of(part[1])
        z = convolve_of_theano(np.pad(z, [(0, 0), (1, 1), (1, 1), (0, 0)]), th_kernel(kernel), "valid", [1, 1]) + b
        z = np.maximum(z, 0) if relu else z
    z = first(pooled(z, (2, 2), (2, 2))).reshape(2, -1)
    (w1, b1), (w2, b2) = (of(part[1]) for part in fc)
    return *sequential(*layers), [x], [k1.softmax(np.maximum(z @ w1 + b1, 0) @ w2 + b2)]


@case()
def a_layer_called_twice():
    """In a graph, calls are counted from 0; a shared strided convolution too."""
    shared, top = conv1d("c", 2, 3, 3, border_mode="same", subsample_length=2), merge("m", "sum")
    ends = [source("a", 7, 2), source("b", 7, 2)]
    feeds = [(ends[0], []), (ends[1], []), (shared, []), (top, [("c", 0, 0), ("c", 1, 0)])]
    model, groups = functional("model_1", feeds, [("m", 0, 0)])
    model["config"]["layers"][2]["inbound_nodes"] = [[["a", 0, 0]], [["b", 0, 0]]]
    x = [rand(2, 7, 2), rand(2, 7, 2)]
    kernel, b = of(shared[1])
    y = [correlate(z, kernel[:, 0], same_of_tensorflow([7], [3], [2]), [2]) + b for z in x]
    return model, groups, x, [y[0] + y[1]]


@case("theano")
def a_shared_layer_of_several():
    """Of Theano the same layer is two, called twice."""
    model, groups, x, _ = a_layer_called_twice()
    kernel, b = of(groups["c"])
    y = [convolve_of_theano(z, kernel[:, 0], "same", [2]) + b for z in x]
    return model, groups, x, [y[0] + y[1]]


@pytest.mark.parametrize("name", CASES)
def test_a_model_answers_as_in_keras_1(name, tmp_path):
    make, backend = CASES[name]
    model, groups, inputs, wanted = make()
    answers_as(load(k1.write(tmp_path / "model.h5", model, groups, backend=backend)), inputs, wanted)


def answers_as(model: keras.Model, inputs: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    found = [graph.numpy(y) for y in graph.flat_call(model)(*map(keras.ops.convert_to_tensor, inputs))]
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert np.linalg.norm(one - other) / np.linalg.norm(other) < 1e-5


# ------------------------------------------------------------------------------ description and weights apart

APART = (
    *("conv1d old=True same tensorflow", "conv1d old=True same theano", "conv2d th same 2 tensorflow"),
    *(
        "conv2d th same 2 theano",
        "conv2d tf same 1 theano",
        "conv_lstm th",
        "LSTM cpu",
        "GRU gpu",
        "conv2d full theano",
    ),
    *("maxout", "two_branches", "nested_models", "nested_without_names", "branch_that_begins_with_a_model", "vgg"),
)


@pytest.mark.parametrize("name", APART)
def test_a_description_answers_with_the_weights_beside_it(name, tmp_path):
    """The same net in two files: how Theano pads and rotates is told by the names of the weights alone."""
    make, backend = CASES[name]
    model, groups, inputs, wanted = make()
    described, weights = k1.write_apart(tmp_path, model, groups, backend=backend)
    loaded = deploykit.load(described, weights=weights)
    assert (loaded.format, loaded.generation, loaded.backend) == ("json", 1, backend)
    answers_as(loaded.model, inputs, wanted)


@pytest.mark.parametrize("version", ["1.0.3", None])
def test_a_description_of_keras_1_is_known_without_its_version(version, tmp_path):
    model, groups, inputs, wanted = CASES["dense_relu"][0]()
    described, weights = k1.write_apart(tmp_path, model, groups, version=version)
    loaded = deploykit.load(described, weights=weights)
    assert (loaded.generation, loaded.saved_by) == (1, version)
    answers_as(loaded.model, inputs, wanted)


@pytest.mark.parametrize("whole", ["description", "weights", "both"])
def test_whole_files_serve_as_description_and_as_weights(whole, tmp_path):
    make, backend = CASES["conv2d th same 2 theano"]
    model, groups, inputs, wanted = make()
    described, weights = k1.write_apart(tmp_path, model, groups, backend=backend)
    other = {name: {key: rand(*value.shape) for key, value in arrays.items()} for name, arrays in groups.items()}
    if whole in ("description", "both"):
        described = k1.write(tmp_path / "other.h5", model, other, backend=backend)
    if whole in ("weights", "both"):
        weights = k1.write(tmp_path / "whole.h5", model, groups, backend=backend)
    answers_as(deploykit.load(described, weights=weights).model, inputs, wanted)


def test_weights_that_keras_2_saved_fill_a_description_of_keras_1(tmp_path):
    """A net that Keras 2 built from the old description: its arrays are laid out, and called, as Keras 2 does."""
    model, groups, inputs, wanted = CASES["conv2d th same 2 tensorflow"][0]()
    described, weights = k1.write_apart(tmp_path, model, groups)
    with h5py.File(weights, "w") as file:
        file.attrs.update({"layer_names": [b"c"], "backend": b"tensorflow", "keras_version": b"2.0.8"})
        group = file.create_group("c")
        group.attrs["weight_names"] = [b"c/kernel:0", b"c/bias:0"]
        group["c/kernel:0"], group["c/bias:0"] = np.transpose(groups["c"]["c_W"], (2, 3, 1, 0)), groups["c"]["c_b"]
    answers_as(deploykit.load(described, weights=weights).model, inputs, wanted)


def _edited(change: Callable[[h5py.File], Any]) -> Callable[[Path], None]:
    def edit(weights: Path) -> None:
        with h5py.File(weights, "r+") as file:
            change(file)

    return edit


NOT_ITS_WEIGHTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (lambda path: path.unlink(), "there is no file"),
    "another format": (lambda path: path.write_text('{"class_name": "Model", "config": {}}'), "is of Keras 1"),
    "groups that are named and absent": (_edited(lambda f: f.__delitem__("c")), "is damaged"),
    "names that are no list": (_edited(lambda f: f.attrs.__setitem__("layer_names", 3)), "is damaged"),
    "no names": (_edited(lambda f: f.attrs.__delitem__("layer_names")), "holds no weights"),
    "a link": (_edited(lambda f: f.__setitem__("x", h5py.ExternalLink("/etc/hostname", "/"))), "ExternalLink"),
    "fewer arrays": (_edited(lambda f: f["c"].attrs.__setitem__("weight_names", [b"c_W:0"])), "do not fit"),
}


@pytest.mark.parametrize("name", NOT_ITS_WEIGHTS)
def test_weights_that_are_not_its_own_are_one_line(name, tmp_path):
    change, words = NOT_ITS_WEIGHTS[name]
    model, groups, *_ = CASES["conv2d th same 2 tensorflow"][0]()
    described, weights = k1.write_apart(tmp_path, model, groups)
    change(weights)
    with pytest.raises(DeploykitError) as raised:
        deploykit.load(described, weights=weights)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_weights_of_the_other_backend_do_not_fill_a_whole_file(tmp_path):
    """Its paddings, and its layers, follow from the backend that saved it."""
    model, groups, *_ = CASES["conv2d th same 2 tensorflow"][0]()
    path = k1.write(tmp_path / "model.h5", model, groups)
    _, weights = k1.write_apart(tmp_path, model, groups, backend="theano")
    with pytest.raises(LoadError, match="saved on theano, the model on tensorflow"):
        deploykit.load(path, weights=weights)


# ------------------------------------------------------------------------------------------------ descriptions


def test_migrating_is_unproven_for_no_package_reads_it(cli, tmp_path):
    model, groups, *_ = CASES["dense_relu"][0]()
    path, target = k1.write(tmp_path / "old.h5", model, groups), tmp_path / "new.keras"
    code, _, err = cli("migrate", path, "-o", target)
    assert (code, "no maintained package" in err, target.exists()) == (2, True, False)
    assert cli("migrate", path, "-o", target, "--unproven")[0] == 0
    assert deploykit.load(target).generation == 3


def test_arguments_have_the_names_of_keras_2():
    one, _ = conv2d("c", 3, 4, 3, 2, shape=[3, 6, 5], order="th")
    one["config"] |= {
        "W_regularizer": {"name": "WeightRegularizer", "l1": 0.1, "l2": 0.2},
        "b_regularizer": {"name": "EigenvalueRegularizer", "k": 3},
        "W_constraint": {"name": "MaxNorm", "m": 2, "axis": 0},
        "b_constraint": {"name": "MinMaxNorm", "low": 0.1, "high": 2, "rate": 1.0, "axis": 0},
    }
    first, found = modernise(sequential((one, {}))[0], what="m.h5")["config"]["layers"]
    assert first == {
        "class_name": "InputLayer",
        "config": {"name": "c_input", "batch_input_shape": [None, 3, 6, 5], "dtype": "float32", "sparse": False},
    }
    assert found == {
        "class_name": "Conv2D",
        "config": {
            "name": "c",
            "trainable": True,
            "filters": 4,
            "kernel_size": [3, 2],
            "kernel_initializer": "glorot_uniform",
            "activation": "linear",
            "padding": "valid",
            "strides": [1, 1],
            "data_format": "channels_first",
            "use_bias": True,
            "kernel_regularizer": {"class_name": "L1L2", "config": {"l1": 0.1, "l2": 0.2}},
            "bias_regularizer": {"class_name": "EigenvalueRegularizer", "config": {}},
            "activity_regularizer": None,
            "kernel_constraint": {"class_name": "MaxNorm", "config": {"max_value": 2, "axis": 0}},
            "bias_constraint": {
                "class_name": "MinMaxNorm",
                "config": {"min_value": 0.1, "max_value": 2, "rate": 1.0, "axis": 0},
            },
        },
    }


def test_the_description_given_stays_as_it_is():
    model, *_ = two_branches()
    before = copy.deepcopy(model)
    modernise(model, what="m.h5")
    assert model == before


def test_a_class_of_the_users_keeps_its_arguments():
    model, _ = sequential(layer("Mine", "mine", [4], p=3, length=2))
    assert modernise(model, what="m.h5")["config"]["layers"][1] == model["config"][0]


@pytest.mark.parametrize(
    ("names", "backend"),
    [(["dense_1_W:0", "dense_1_b:0"], "tensorflow"), (["dense_1_W", "param_1"], "theano"), ([], None)],
)
def test_the_backend_is_told_by_the_names_of_weights(names, backend):
    assert backend_of(iter(names)) == backend


def test_inputs_of_branches_stand_in_the_order_of_the_branches():
    model, *_ = branches_of_branches_that_share_a_layer()
    found = modernise(model, what="m.h5")["config"]
    assert found["input_layers"] == [["drop_1_input", 0, 0], ["drop_2_input", 0, 0], ["in", 0, 0]]
    assert [entry["name"] for entry in found["layers"]].count("shared") == 1


def test_a_branch_that_is_merged_with_itself_is_called_once():
    branch, _ = sequential(dense("a", 2, 2, shape=[2]), dense("b", 2, 2))
    found = modernise(sequential(merge("m", "sum", [branch, branch]))[0], what="m.h5")["config"]
    calls = {entry["name"]: entry["inbound_nodes"] for entry in found["layers"]}
    assert calls == {
        "a_input": [],
        "a": [[["a_input", 0, 0, {}]]],
        "b": [[["a", 0, 0, {}]]],
        "m": [[["b", 0, 0, {}], ["b", 0, 0, {}]]],
    }


def test_convolutions_that_theano_pads_as_all_do_stay_one_layer():
    model, *_ = conv2d_of("th", "theano", size=(3, 5), border_mode="same")()
    assert modernise(model, what="m.h5", backend="theano") == modernise(model, what="m.h5", backend="tensorflow")


# ---------------------------------------------------------------------------------------------- what is refused


def _with(kind: str, backend: str = "tensorflow", **config: Any):
    return lambda: sequential(layer(kind, "odd_one", [6, 6, 3], **config))[0], backend


def _changed(make: Callable[[], k1.Layer], backend: str = "tensorflow", **config: Any):
    def apply() -> k1.Entry:
        entry, _ = make()
        entry["config"] |= config
        return sequential((entry, {}))[0]

    return apply, backend


def _deconv(**config: Any) -> k1.Layer:
    return conv2d(
        "odd_one", 3, 4, 3, 3, shape=[6, 6, 3], kind="Deconvolution2D", output_shape=[None, 12, 12, 4], **config
    )


def _nested_merge() -> k1.Entry:
    inner, _ = sequential(merge("m", "sum", [sequential(dense(name, 2, 2, shape=[2]))[0] for name in ("a", "b")]))
    return functional("model", [(({**inner, "name": "odd_one"}, {}), [])], [("odd_one", 1, 0)])[0]


def _unnamed_branch() -> k1.Entry:
    body, _ = sequential(dense("a", 2, 2, shape=[2]))
    branch = {"class_name": "Sequential", "config": [body, dense("b", 2, 2)[0]]}
    return sequential(merge("m", "sum", [branch, branch]))[0]


def _same(**config: Any) -> Callable[[], k1.Layer]:
    return lambda: pool(
        "MaxPooling2D", "odd_one", config.get("size", [2, 2]), config.get("stride"), "same", "th", [3, 6, 6]
    )


REFUSALS: dict[str, tuple[tuple[Callable[[], Any], str], type[DeploykitError], str]] = {
    "highway": (_with("Highway"), UnsupportedModelError, "odd_one (Highway) has no equivalent"),
    "srelu": (_with("SReLU"), UnsupportedModelError, "odd_one (SReLU)"),
    "softplus": (_with("ParametricSoftplus"), UnsupportedModelError, "odd_one (ParametricSoftplus)"),
    "bn 1": (_changed(lambda: batchnorm("odd_one", 3, mode=1, shape=[3])), UnsupportedModelError, "mode=1"),
    "bn 2": (_changed(lambda: batchnorm("odd_one", 3, mode=2, shape=[3])), UnsupportedModelError, "mode=2"),
    "bn 3": (_changed(lambda: batchnorm("odd_one", 3, mode=3, shape=[3])), UnsupportedModelError, "unknown mode"),
    "lambda": (
        (lambda: sequential(merge("odd_one", "4wEAAAB=", [], mode_type="lambda", layers=[]))[0], "theano"),
        UnsupportedModelError,
        "odd_one (Merge) merges with code of its own",
    ),
    "cos": (
        (lambda: sequential(merge("odd_one", "cos", [dense("d", 2, 2, shape=[2])[0]] * 2))[0], "theano"),
        UnsupportedModelError,
        "odd_one (Merge) merges with mode 'cos'",
    ),
    "a Merge inside": ((_nested_merge, "theano"), UnsupportedModelError, "odd_one (Sequential) begins with a Merge"),
    "a branch without a name": ((_unnamed_branch, "theano"), UnsupportedModelError, "a Sequential inside"),
    "silent alone": (_with("ZeroPadding2D", padding=[1, 1]), UnsupportedModelError, "does not say its dim_ordering"),
    "pool of Theano": (_changed(_same(), "theano"), UnsupportedModelError, "pools with border_mode='same'"),
    "pool of three": (_changed(_same(size=[3, 3], stride=[2, 2]), "theano"), UnsupportedModelError, "as only Theano"),
    "deconv of Theano": (
        _changed(lambda: _deconv(border_mode="same", subsample=[2, 2]), "theano"),
        UnsupportedModelError,
        "pads with border_mode='same'",
    ),
    "deconv full": (_changed(lambda: _deconv(border_mode="full")), UnsupportedModelError, "border_mode='full'"),
    "deconv of any size": (
        _changed(_deconv, output_shape=[None, None, None, 4]),
        UnsupportedModelError,
        "without a fixed size",
    ),
    "conv lstm of Theano": (
        _with("ConvLSTM2D", "theano", nb_row=2, nb_col=3),
        UnsupportedModelError,
        "a kernel of even size",
    ),
    "Keras 0.3": (
        (lambda: {"class_name": "Sequential", "layers": [{"name": "Dense", "output_dim": 4}]}, "theano"),
        UnsupportedModelError,
        "was saved by Keras 0.3 or older",
    ),
    "layers of Keras 0.3": (
        (lambda: {"class_name": "Sequential", "config": [{"name": "Dense", "output_dim": 4}]}, "theano"),
        UnsupportedModelError,
        "was saved by Keras 0.3 or older",
    ),
    "Graph": ((lambda: {"class_name": "Graph", "config": {}}, "theano"), UnsupportedModelError, "holds a Graph"),
    "no layers": ((lambda: {"class_name": "Sequential", "config": []}, "theano"), LoadError, "m.h5 is damaged"),
    "no shape": ((lambda: sequential(dense("d", 2, 2))[0], "theano"), LoadError, "first layer d has no shape"),
    "no model": ((lambda: {"class_name": "Model", "config": 3}, "theano"), LoadError, "m.h5 is damaged"),
    "an ordering": (
        _changed(lambda: conv2d("c", 3, 4, 3, 3, shape=[6, 6, 3]), dim_ordering=["tf"]),
        LoadError,
        "m.h5 is damaged",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_has_no_equivalent_is_refused_in_one_line(name):
    (make, backend), error, words = REFUSALS[name]
    with pytest.raises(DeploykitError, match=re.escape(words)) as caught:
        modernise(make(), what="m.h5", backend=backend)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert "m.h5" in str(caught.value)


def test_what_theano_pools_otherwise_tensorflow_does_not():
    entry = _changed(_same())[0]()
    assert modernise(entry, what="m.h5", backend="tensorflow")["config"]["layers"][1]["class_name"] == "MaxPooling2D"


@pytest.mark.parametrize("kind", ["LocallyConnected1D", "LocallyConnected2D"])
def test_what_keras_2_still_had_is_refused_when_it_is_translated(kind):
    model, _ = sequential(layer(kind, "odd_one", [6, 6, 3], nb_filter=3, border_mode="valid"))
    with pytest.raises(UnsupportedModelError, match="has no equivalent in Keras 3"):
        translate(modernise(model, what="m.h5"), what="m.h5")


# ------------------------------------------------------------------------------------------------------- arrays


LSTM_NAMES = [f"lstm_1_{part}_{gate}" for gate in "icfo" for part in "WUb"]
LSTM_SHAPES = [(3, 4), (4, 4), (4,)] * 4


@pytest.mark.parametrize(
    "names",
    [
        LSTM_NAMES,
        [f"{name}:0" for name in LSTM_NAMES],
        [f"{name}_2:0" for name in LSTM_NAMES],  # the graph had that name already
        [f"param_{number}" for number in range(12)],
    ],
)
def test_weights_are_known_by_any_of_their_names(names):
    arrays = [np.full(shape, number, np.float32) for number, shape in enumerate(LSTM_SHAPES)]
    kernel, recurrent_kernel, bias = rearranged("LSTM", arrays, names, {"name": "lstm_1", "implementation": 0})
    assert kernel.shape == (3, 16)
    assert bias[::4].tolist() == [2, 8, 5, 11]  # i, f, c, o
    assert recurrent_kernel[0, ::4].tolist() == [1, 7, 4, 10]


@pytest.mark.parametrize(
    ("names", "shapes", "words"),
    [
        (["d_b:0", "d_W:0"], [(4,), (3, 4)], "d_b:0 stands where its W is expected"),
        (["d_W:0"], [(3, 4)], "1 arrays for 2"),
        (["d_W:0", "d_b:0", "d_c:0"], [(3, 4), (4,), (4,)], "3 arrays for 2"),
    ],
)
def test_arrays_that_are_not_a_layers_are_refused(names, shapes, words):
    with pytest.raises(LoadError, match=re.escape(words)) as caught:
        rearranged("Dense", [rand(*shape) for shape in shapes], names, {"name": "d", "use_bias": True}, what="m.h5")
    assert str(caught.value).startswith("m.h5: the weights of layer d do not fit")


def test_a_kernel_of_another_rank_is_refused():
    config = {"name": "c", "kernel_size": 3, "filters": 4}
    with pytest.raises(LoadError, match="their shapes"):
        rearranged("Conv1D", [rand(3, 2), rand(4)], ["c_W", "c_b"], config)


def test_a_file_of_another_number_of_layers_is_refused():
    model, groups = sequential(dense("a", 2, 2, shape=[2]), dense("b", 2, 2))
    stored = {"c": list(groups["a"].items())}
    with pytest.raises(LoadError, match="has weights for 1 layers, its model has 2"):
        rearranged_file(modernise(model, what="m.h5"), stored, what="m.h5")
