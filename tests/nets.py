"""Nets for tests: small, and alive.

Fresh BatchNormalization is nearly the identity and hides bugs, so `enliven` draws every statistic:
gammas of both signs (unless ``positive``), means, variances over two decades, betas, biases.
`calibrate` gives a deep net statistics that fit its own activations; without that the output of a deep
random net hardly depends on its input and proves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np

from deploykit import graph
from deploykit.data import synthesize

L = keras.layers


def enliven(model: keras.Model, seed: int = 0, *, positive: bool = False) -> keras.Model:
    """Draw all BatchNormalization parameters, biases and adapted statistics at random, in place."""
    rng = np.random.default_rng(seed)
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, L.BatchNormalization):
            draws = {
                "gamma": rng.uniform(0.5, 1.5, layer.moving_mean.shape)
                * (1 if positive else rng.choice([-1, 1], layer.moving_mean.shape)),
                "beta": rng.normal(0, 0.5, layer.moving_mean.shape),
                "moving_mean": rng.normal(0, 0.5, layer.moving_mean.shape),
                "moving_variance": 10 ** rng.uniform(-1, 1, layer.moving_mean.shape),
            }
            for name, value in draws.items():
                if getattr(layer, name) is not None:
                    getattr(layer, name).assign(value)
        elif getattr(layer, "bias", None) is not None and not isinstance(layer.bias, bool):
            layer.bias.assign(rng.normal(0, 0.3, layer.bias.shape))
    return model


def calibrate(model: keras.Model, seed: int = 0, samples: int = 32) -> keras.Model:
    """Live gammas and betas, then the statistics that fit them: one training pass over what `synthesize` draws.

    Gammas that change after that pass, statistics that are moved, and inputs of another kind all shift what every later
    layer sees, in a deep net by many times its deviation: its outputs grow a thousandfold and float32 means nothing.
    """
    rng = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if isinstance(layer, L.Normalization) and layer.input_mean is None:  # as if adapted to images
            layer.adapt_mean.assign(rng.uniform(0.4, 0.5, layer.adapt_mean.shape))
            layer.adapt_variance.assign(rng.uniform(0.04, 0.08, layer.adapt_variance.shape))
            layer.finalize_state()
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, L.BatchNormalization)]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 0.0
        if layer.gamma is not None:
            layer.gamma.assign(rng.uniform(0.5, 1.5, layer.gamma.shape))
        if layer.beta is not None:
            layer.beta.assign(rng.normal(0, 0.1, layer.beta.shape))
    (drawn,) = synthesize(graph.signature(model), count=samples, seed=seed + 1).arrays.values()
    model(drawn, training=True)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
    return model


def chain(
    shape: Sequence[int | None], *layers: keras.Layer, seed: int = 0, positive: bool = False, name: str = "x"
) -> keras.Model:
    """A live functional model of layers called one after the other on one input called ``name``."""
    tensor = start = keras.Input(shape, name=name)
    for layer in layers:
        tensor = layer(tensor)
    return enliven(keras.Model(start, tensor), seed, positive=positive)


def inputs_for(model: keras.Model, count: int = 6, seed: int = 0, free: int = 9) -> dict[str, np.ndarray]:
    """Random inputs keyed by input name, with values well beyond 6 and on both sides of zero."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for symbol in model.inputs:
        shape = (count, *[free if size is None else size for size in symbol.shape[1:]])
        if "int" in symbol.dtype:
            arrays[symbol.name] = rng.integers(0, 5, shape).astype(symbol.dtype)
        else:
            arrays[symbol.name] = (rng.normal(0, 3, shape)).astype(np.float32)
    return arrays
