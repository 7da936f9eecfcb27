"""The right models that mutants are made from: small, real, alive.

Each recipe holds what one family of mutants needs: padding at borders that carry values, pooling that pads, dilation,
two outputs of one shape, two layers of one size, a free length, recurrences, an epsilon that matters. `alive` gives
every BatchNormalization statistics that fit its own activations, then jitters them and draws gammas of both signs:
fresh ones are nearly the identity and would hide what mutants do to them.

Files that other people trained join where their folder stands beside the checkout, as in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from deploykit import graph
from deploykit.data import synthesize
from deploykit.load import load

L = keras.layers
TRAINED = Path(__file__).resolve().parents[3] / "shared" / "models"


def alive(model: Any, seed: int) -> Any:
    """Live statistics and biases, in place: one training pass over varied inputs, then jitter."""
    rng = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        bias = getattr(layer, "bias", None)
        if isinstance(bias, keras.Variable):
            bias.assign(rng.normal(0, 0.3, bias.shape))
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, L.BatchNormalization)]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 0.0
    samples = synthesize(graph.signature(model), count=29, edges=0, seed=seed + 1)  # without the edge cases
    inputs = [samples.arrays[symbol.name] for symbol in model.inputs]
    model(inputs if len(inputs) > 1 else inputs[0], training=True)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
        mean, variance = graph.numpy(layer.moving_mean), graph.numpy(layer.moving_variance)
        layer.moving_variance.assign(variance * rng.uniform(0.7, 1.5, variance.shape))
        layer.moving_mean.assign(mean + 0.2 * np.sqrt(variance) * rng.uniform(-1, 1, mean.shape))
        layer.gamma.assign(rng.uniform(0.5, 1.5, mean.shape) * rng.choice([1, 1, 1, -1], mean.shape))
        layer.beta.assign(rng.normal(0, 0.2, mean.shape))
    return model


def residual() -> Any:
    """Images 0..255, Rescaling inside; residual blocks, both kinds of padded pooling, softmax."""
    x = image = keras.Input((16, 16, 3), name="image")
    x = L.Rescaling(1 / 127.5, offset=-1.0, name="scale")(x)
    x = L.Conv2D(8, 3, padding="same", use_bias=False, name="stem")(x)
    x = L.ReLU(name="stem_relu")(L.BatchNormalization(name="stem_bn")(x))
    x = L.MaxPooling2D(3, 2, padding="same", name="max_pool")(x)
    y = L.Conv2D(8, 3, padding="same", name="block_conv")(x)
    y = L.ReLU(name="block_relu")(L.BatchNormalization(name="block_bn")(y))
    y = L.Conv2D(8, 3, padding="same", dilation_rate=2, name="block_conv2")(y)
    y = L.BatchNormalization(epsilon=1e-2, name="block_bn2")(y)
    x = L.ReLU(name="added_relu")(L.Add(name="added")([x, y]))
    x = L.AveragePooling2D(3, 2, padding="same", name="mean_pool")(x)
    x = L.ZeroPadding2D(((1, 0), (0, 1)), name="pad")(x)
    x = L.Conv2D(12, 3, strides=2, activation="relu", name="down")(x)
    x = L.Flatten(name="flat")(x)
    return keras.Model(image, L.Dense(6, activation="softmax", name="classes")(x), name="residual")


def mobile() -> Any:
    """Depthwise and separable convolutions, swish, hard swish, squeeze and excite, linear output."""
    x = image = keras.Input((12, 12, 3), name="image")
    x = L.Conv2D(8, 3, strides=2, padding="same", use_bias=False, name="stem")(x)
    x = L.Activation("hard_silu", name="stem_act")(L.BatchNormalization(epsilon=1e-2, name="stem_bn")(x))
    y = L.DepthwiseConv2D(3, padding="same", use_bias=False, name="depthwise")(x)
    y = L.Activation("silu", name="depthwise_act")(L.BatchNormalization(name="depthwise_bn")(y))
    z = L.GlobalAveragePooling2D(keepdims=True, name="squeeze")(y)
    z = L.Conv2D(4, 1, activation="relu", name="reduce")(z)
    z = L.Conv2D(8, 1, activation="hard_sigmoid", name="expand")(z)
    y = L.Multiply(name="excite")([y, z])
    y = L.BatchNormalization(name="project_bn")(L.Conv2D(8, 1, use_bias=False, name="project")(y))
    x = L.Add(name="added")([x, y])
    x = L.SeparableConv2D(10, 3, padding="same", name="separable")(x)
    x = L.LeakyReLU(0.1, name="leaky")(L.BatchNormalization(name="separable_bn")(x))
    x = L.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(image, L.Dense(5, name="logits")(x), name="mobile")


def signal() -> Any:
    """A signal of free length: causal and dilated Conv1D, strided pooling, an output per step and one per sample."""
    x = signal = keras.Input((None, 4), name="signal")
    x = L.Conv1D(8, 5, padding="causal", name="causal")(x)
    x = L.Activation("elu", name="causal_act")(L.BatchNormalization(name="causal_bn")(x))
    y = L.Conv1D(8, 3, padding="same", dilation_rate=2, use_bias=False, name="dilated")(x)
    y = L.ReLU(max_value=6.0, name="dilated_act")(L.BatchNormalization(epsilon=1e-2, name="dilated_bn")(y))
    x = L.Add(name="added")([x, y])
    steps = L.Conv1D(2, 1, activation="tanh", name="steps")(x)
    x = L.MaxPooling1D(2, padding="same", name="max_pool")(x)
    x = L.Conv1D(8, 3, strides=2, padding="same", activation="gelu", name="down")(x)
    x = L.AveragePooling1D(2, 1, padding="same", name="mean_pool")(x)
    x = L.GlobalAveragePooling1D(name="pool")(x)
    return keras.Model(signal, [steps, L.Dense(3, activation="sigmoid", name="events")(x)], name="signal")


def tokens() -> Any:
    """Whole numbers of a vocabulary through an Embedding, a bidirectional LSTM and a GRU."""
    x = text = keras.Input((10,), dtype="int32", name="text")
    x = L.Embedding(40, 8, embeddings_initializer="random_normal", name="embedding")(x)
    x = L.Rescaling(20.0, name="louder")(x)
    x = L.Bidirectional(L.LSTM(6, return_sequences=True), name="lstm")(x)
    x = L.BatchNormalization(name="bn")(x)
    x = L.GRU(8, name="gru")(x)
    x = L.Dense(8, activation="tanh", name="hidden")(x)
    return keras.Model(text, L.Dense(4, activation="softmax", name="topic")(x), name="tokens")


def table() -> Any:
    """Two inputs, four outputs, two of them of one shape, one with columns of several scales; Dense layers of one size,
    BN, several activations.
    """
    a, b = keras.Input((12,), name="customer"), keras.Input((6,), name="order")
    x = L.Dense(8, use_bias=False, name="left1")(a)
    x = L.ReLU(name="left_relu")(L.BatchNormalization(name="left_bn")(x))
    x = L.Dense(8, name="left2")(x)
    x = L.Activation("gelu", name="left_act")(L.BatchNormalization(epsilon=1e-2, name="left_bn2")(x))
    y = L.Dense(8, activation="elu", name="right1")(b)
    y = L.Dense(8, activation="selu", name="right2")(y)
    z = L.Subtract(name="difference")([x, y])
    z = L.Concatenate(name="join")([z, L.Maximum(name="larger")([x, y])])
    z = L.Dense(8, activation="softplus", name="trunk")(z)
    outputs = [
        L.Dense(4, name="buys")(z),
        L.Dense(4, name="returns")(z),
        L.Dense(5, activation="softmax", name="kind")(z),
    ]
    price = L.Rescaling(1e6, name="price")(L.Dense(1, activation="sigmoid", name="amount")(z))
    outputs.append(L.Concatenate(name="offer")([price, L.Dense(3, activation="softmax", name="odds")(z)]))
    return keras.Model([a, b], outputs, name="table")


BUILT: Mapping[str, Callable[[], Any]] = {f.__name__: f for f in (residual, mobile, signal, tokens, table)}
FILES = ("mlperf_tiny_kws_savedmodel", "rapidtide_cnn_tfkeras219.keras")


def names() -> tuple[str, ...]:
    """All subjects there are here."""
    return (*BUILT, *(name for name in FILES if (TRAINED / name).exists()))


def subject(name: str, seed: int = 0) -> Any:
    """The model of that name, as a flat functional one; the same for the same seed."""
    if name not in BUILT:
        return graph.canonical(load(TRAINED / name).model)
    keras.utils.set_random_seed(seed)
    return alive(BUILT[name](), seed)
