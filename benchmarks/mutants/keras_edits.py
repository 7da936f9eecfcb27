"""Mutants as Keras models.

An `Edit` says what a copy of a model has otherwise; `apply` makes the copy, in float32 as the candidate and in float64
for its effect. Kinds are made of few parts: a weight is changed, a layer is made otherwise from its config, a call is
made otherwise, or something happens to the inputs before or to the outputs after the whole model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from deploykit.data import FREE_SEQUENCE
from deploykit.signature import Signature
from mutants import OFF_BY, OUTCOMES, Arrays, Made, StillbornError, Trigger, quantized, rounded, triggers

L, ops = keras.layers, keras.ops
Array = NDArray[Any]
Weight = tuple[str, int]  # layer and position among its weights


@dataclass(frozen=True)
class Edit:
    """What is otherwise. ``layers``: how a layer is made from the original and its config; ``calls``: how it is called;
    ``before`` and ``after`` change the tensors at the model's ends; ``batch`` fixes the batch size.
    """

    weights: Mapping[Weight, Array] = field(default_factory=dict)
    layers: Mapping[str, Callable[[Any, dict[str, Any]], Any]] = field(default_factory=dict)
    calls: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    before: Callable[[list[Any]], list[Any]] | None = None
    after: Callable[[list[Any], list[Any]], list[Any]] | None = None
    batch: int | None = None


def _in(config: Any, dtype: str) -> Any:
    """A config, and those inside it, with another dtype policy."""
    if isinstance(config, dict):
        return {key: dtype if key == "dtype" and value else _in(value, dtype) for key, value in config.items()}
    return [_in(value, dtype) for value in config] if isinstance(config, list) else config


def _names(symbols: Sequence[Any]) -> list[str]:
    """What inputs and outputs are called: after the layers that make them."""
    return [symbol._keras_history.operation.name for symbol in symbols]


def apply(model: Any, edit: Edit, dtype: str | None = None) -> Any:
    """A copy of a flat functional model with the edit; ``dtype`` float64: everything but the weights' values."""

    def clone(layer: Any) -> Any:
        config = layer.get_config() if dtype is None else _in(layer.get_config(), dtype)
        return edit.layers.get(layer.name, lambda layer, config: type(layer).from_config(config))(layer, config)

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        given = {key: value for key, value in kwargs.items() if value is not None}  # Keras writes mask=None
        return edit.calls.get(layer.name, lambda layer, *a, **k: layer(*a, **k))(layer, *args, **given)

    def entrances() -> list[Any]:
        return [
            keras.Input(
                batch_shape=(edit.batch or symbol.shape[0], *symbol.shape[1:]),
                dtype=dtype if dtype and "float" in symbol.dtype else symbol.dtype,
                name=name,
            )
            for name, symbol in zip(_names(model.inputs), model.inputs, strict=True)
        ]

    tensors = keras.tree.pack_sequence_as(model.input, entrances())
    copy = keras.models.clone_model(model, tensors, clone_function=clone, call_function=call)
    give_weights(copy, model, edit)
    names = _names(model.outputs)
    if edit.before is None and edit.after is None and _names(copy.outputs) == names:
        return copy
    copy.name = f"{model.name}_inside"  # an input may have the model's own name
    inputs = entrances()
    given = edit.before(inputs) if edit.before else inputs
    outputs = copy(given if len(given) > 1 else given[0])
    outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    outputs = edit.after(inputs, outputs) if edit.after else outputs
    named = [L.Identity(name=name, dtype=y.dtype)(y) for name, y in zip(names, outputs, strict=True)]
    return keras.Model(inputs if len(inputs) > 1 else inputs[0], named if len(named) > 1 else named[0], name=model.name)


def give_weights(copy: Any, model: Any, edit: Edit) -> None:
    """The model's weights for a copy, those of the edit instead; float32 values whatever the copy's dtype."""
    made = {layer.name: layer for layer in copy.layers}
    for old in model.layers:
        if old.name in made and made[old.name].weights:
            values = [edit.weights.get((old.name, i), value) for i, value in enumerate(old.get_weights())]
            made[old.name].set_weights([np.asarray(value, np.float32) for value in values])
            if isinstance(made[old.name], L.Normalization):
                made[old.name].finalize_state()


class Copies:
    """Copies of a model; one whose weights alone differ is the last such copy with new weights."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._plain: dict[str | None, Any] = {}

    def of(self, edit: Edit, dtype: str | None = None) -> Any:
        if edit != Edit(weights=edit.weights):
            return apply(self.model, edit, dtype)
        if dtype not in self._plain:
            self._plain[dtype] = apply(self.model, Edit(), dtype)
        give_weights(self._plain[dtype], self.model, edit)
        return self._plain[dtype]


def evaluate(model: Any, arrays: Arrays) -> dict[str, Array]:
    """Outputs by name, in one batch."""
    named = zip(_names(model.inputs), model.inputs, strict=True)
    inputs = [ops.convert_to_tensor(arrays[name], dtype=symbol.dtype) for name, symbol in named]
    try:
        outputs = model(inputs if len(inputs) > 1 else inputs[0], training=False)
    except Exception as error:  # whatever TensorFlow raises
        raise StillbornError(f"does not run in float64: {error}") from error
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    names = _names(model.outputs)
    return {name: ops.convert_to_numpy(output) for name, output in zip(names, outputs, strict=True)}


# ------------------------------------------------------------------------------------------------- places


@dataclass(frozen=True, eq=False)
class Site:
    """A model, and a generator that draws places in it."""

    model: Any
    signature: Signature
    rng: np.random.Generator

    def one(self, choices: Sequence[Any]) -> Any:
        return choices[int(self.rng.integers(len(choices)))] if choices else None

    def layers(self, *classes: type) -> list[Any]:
        return [layer for layer in self.model.layers if isinstance(layer, classes)]

    def weights(self, *names: str) -> list[Weight]:
        return [
            (layer.name, i)
            for layer in self.model.layers
            for i, weight in enumerate(layer.weights)
            if any(name in weight.name for name in names)
        ]

    def value(self, weight: Weight) -> Array:
        return np.array(self.model.get_layer(weight[0]).get_weights()[weight[1]], np.float64)

    def is_depthwise(self, weight: Weight) -> bool:
        return "depthwise" in self.model.get_layer(weight[0]).weights[weight[1]].name


Found = tuple[str, Edit] | None
Kind = Callable[[Site], Found]


def _weight(names: tuple[str, ...], change: Callable[[Site, Weight, Array], Array | None]) -> Kind:
    """One weight array of these names, changed."""

    def kind(site: Site) -> Found:
        weight = site.one(site.weights(*names))
        new = None if weight is None else change(site, weight, site.value(weight))
        return None if new is None else (weight[0], Edit(weights={weight: new}))

    return kind


KERNELS = ("kernel", "embeddings")


def _single(off: float) -> Kind:
    def change(site: Site, weight: Weight, value: Array) -> Array:
        value.flat[int(site.rng.integers(value.size))] *= 1 + off * site.rng.choice([-1, 1])
        return value

    return _weight(KERNELS, change)


def _channels(change: Callable[[Array, Array], Array], *, of: str = "output") -> Kind:
    """A kernel with its channels in front, and two of their numbers."""

    def changed(site: Site, weight: Weight, value: Array) -> Array | None:
        axis = (-1 if of == "output" else -2) if not site.is_depthwise(weight) else -2
        front = np.moveaxis(value, axis, 0)
        if len(front) < 2:
            return None
        return np.moveaxis(change(front.copy(), site.rng.permutation(len(front))[:2]), 0, axis)

    return _weight(KERNELS, changed)


def _put(x: Array, where: Any, value: Any) -> Array:
    x[where] = value
    return x


def _other_bias(site: Site) -> Found:
    biases = site.weights("bias")
    pairs = [(a, b) for a in biases for b in biases if a < b and site.value(a).shape == site.value(b).shape]
    pair = site.one(pairs)
    if pair is None:
        return None
    a, b = pair
    return f"{a[0]}, {b[0]}", Edit(weights={a: site.value(b), b: site.value(a)})


# ----------------------------------------------------------------------------------------------------- BN


@dataclass(frozen=True)
class Norm:
    """The parameters of one BatchNormalization, float64."""

    gamma: Array
    beta: Array
    mean: Array
    variance: Array
    epsilon: float


def norm_of(layer: Any) -> Norm:
    values = {w.name: np.array(v, np.float64) for w, v in zip(layer.weights, layer.get_weights(), strict=True)}
    mean = values["moving_mean"]
    gamma, beta = values.get("gamma", np.ones_like(mean)), values.get("beta", np.zeros_like(mean))
    return Norm(gamma, beta, mean, values["moving_variance"], float(layer.epsilon))


# (scale, shift) of x, as the right and wrong readings of the parameters give them
def _affine(n: Norm, scale: Array | None = None, mean: Array | None = None) -> tuple[Array, Array]:
    scale = n.gamma / np.sqrt(n.variance + n.epsilon) if scale is None else scale
    return scale, n.beta - (n.mean if mean is None else mean) * scale


MISREAD: Mapping[str, Callable[[Norm], tuple[Array, Array]]] = {
    "right": lambda n: _affine(n),
    "epsilon 1e-5 instead": lambda n: _affine(n, n.gamma / np.sqrt(n.variance + 1e-5)),
    "epsilon outside the root": lambda n: _affine(n, n.gamma / (np.sqrt(n.variance) + n.epsilon)),
    "epsilon dropped": lambda n: _affine(n, n.gamma / np.sqrt(n.variance)),
    "mean and variance exchanged": lambda n: _affine(n, n.gamma / np.sqrt(np.abs(n.mean) + n.epsilon), n.variance),
    "mean dropped": lambda n: _affine(n, mean=0 * n.mean),
    "mean with the other sign": lambda n: _affine(n, mean=-n.mean),
    "variance taken for the deviation": lambda n: _affine(n, n.gamma / (n.variance + n.epsilon)),
    "gamma dropped": lambda n: _affine(n, 1 / np.sqrt(n.variance + n.epsilon)),
    "beta dropped": lambda n: (_affine(n)[0], _affine(n)[1] - n.beta),
    "variance biased (n / (n - 1), n = 64)": lambda n: _affine(n, n.gamma / np.sqrt(n.variance * 64 / 63 + n.epsilon)),
    "statistics rolled by one channel": lambda n: _affine(
        n, n.gamma / np.sqrt(np.roll(n.variance, 1) + n.epsilon), np.roll(n.mean, 1)
    ),
}


def _misread(name: str) -> Kind:
    """A BatchNormalization whose affine is the wrong one: mean 0, variance 1 - epsilon."""

    def kind(site: Site) -> Found:
        layer = site.one([n for n in site.layers(L.BatchNormalization) if n.scale and n.center])
        if layer is None:
            return None
        norm = norm_of(layer)
        scale, shift = MISREAD[name](norm)
        values = (scale, shift, 0 * norm.mean, np.full_like(norm.mean, 1 - norm.epsilon))
        return layer.name, Edit(weights={(layer.name, i): value for i, value in enumerate(values)})

    return kind


def _other_statistics(site: Site) -> Found:
    norms = site.layers(L.BatchNormalization)
    pairs = [(a, b) for a in norms for b in norms if a is not b and a.moving_mean.shape == b.moving_mean.shape]
    pair = site.one(pairs)
    if pair is None:
        return None
    a, b = pair
    n = len(a.weights)
    moving = {(a.name, i): site.value((b.name, len(b.weights) - n + i)) for i in (n - 2, n - 1)}
    return f"{a.name} with those of {b.name}", Edit(weights=moving)


def _batch_statistics(site: Site) -> Found:
    layer = site.one(site.layers(L.BatchNormalization))
    if layer is None:
        return None
    norm = norm_of(layer)

    def call(layer: Any, x: Any) -> Any:
        gamma, beta = (ops.cast(value, x.dtype) for value in (norm.gamma, norm.beta))
        mean, variance = ops.moments(x, list(range(len(x.shape) - 1)))
        right = layer(x)  # so that it stays a part of the graph
        return right * 0.0 + (x - mean) / ops.sqrt(variance + norm.epsilon) * gamma + beta

    return layer.name, Edit(calls={layer.name: call})


# --------------------------------------------------------------------------------------------- attributes

CONVS = (L.Conv1D, L.Conv2D, L.DepthwiseConv2D, L.SeparableConv2D)
POOLS = (L.MaxPooling1D, L.MaxPooling2D, L.AveragePooling1D, L.AveragePooling2D)


def _config(classes: tuple[type, ...], change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Kind:
    """A layer of these classes made with a changed config; ``change`` gives None where it would change nothing."""

    def kind(site: Site) -> Found:
        layer = site.one([layer for layer in site.layers(*classes) if change(layer.get_config()) is not None])
        if layer is None:
            return None
        made = {layer.name: lambda layer, config: type(layer).from_config({**config, **(change(config) or {})})}
        return layer.name, Edit(layers=made)

    return kind


def _as_class(swap: Mapping[type, type]) -> Kind:
    def kind(site: Site) -> Found:
        layer = site.one([layer for layer in site.layers(*swap) if type(layer) in swap])
        if layer is None:
            return None
        return layer.name, Edit(layers={layer.name: lambda layer, config: swap[type(layer)].from_config(config)})

    return kind


def _called(
    classes: tuple[type, ...], call: Callable[..., Any], fits: Callable[[Any], bool] = lambda layer: True
) -> Kind:
    def kind(site: Site) -> Found:
        layer = site.one([layer for layer in site.layers(*classes) if fits(layer)])
        return None if layer is None else (layer.name, Edit(calls={layer.name: call}))

    return kind


def _edges(layer: Any, shape: Sequence[int | None]) -> list[tuple[int, int]] | None:
    """What ``padding="same"`` pads of each place axis; None where sizes are free."""
    places = shape[1:-1]
    if None in places:
        return None
    pooling = isinstance(layer, POOLS)
    kernel = layer.pool_size if pooling else layer.kernel_size
    dilation = [1] * len(places) if pooling else layer.dilation_rate
    strides = layer.strides if isinstance(layer.strides, (tuple, list)) else (layer.strides,) * len(places)
    found = []
    for n, k, s, d in zip(places, kernel, strides, dilation, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        found.append((total // 2, total - total // 2))
    return found


def _repadded(classes: tuple[type, ...], order: Callable[[tuple[int, int]], tuple[int, int]], needs: str) -> Kind:
    """``same`` padding written out, and not as TensorFlow pads."""

    def kind(site: Site) -> Found:
        def edges(layer: Any) -> list[tuple[int, int]]:
            return _edges(layer, layer.input.shape) or []

        def fits(layer: Any) -> bool:
            found = edges(layer) if getattr(layer, "padding", "") == "same" else []
            return any(a != b if needs == "uneven" else a + b for a, b in found)

        layer = site.one([layer for layer in site.layers(*classes) if fits(layer)])
        if layer is None:
            return None
        pads = [(0, 0), *map(order, edges(layer)), (0, 0)]
        fill = -np.inf if isinstance(layer, (L.MaxPooling1D, L.MaxPooling2D)) else 0.0
        made = {layer.name: lambda layer, config: type(layer).from_config({**config, "padding": "valid"})}
        padded = {layer.name: lambda layer, x: layer(ops.pad(x, pads, constant_values=fill))}
        return layer.name, Edit(layers=made, calls=padded)

    return kind


def _times(key: str, needs: int, becomes: int) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    """Every number of a config entry from ``needs`` to ``becomes``."""

    def change(config: dict[str, Any]) -> dict[str, Any] | None:
        value = config.get(key)
        values = value if isinstance(value, (list, tuple)) else [value]
        if any(v != needs for v in values) or (key == "dilation_rate" and max(np.ravel(config["strides"])) > 1):
            return None
        if key == "dilation_rate" and max(np.ravel(config["kernel_size"])) == 1:
            return None
        return {key: [becomes] * len(values)}

    return change


def _padded(needs: str, becomes: str) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    return lambda config: {"padding": becomes} if config["padding"] == needs else None


# -------------------------------------------------------------------------------------------- activations


def _hard_sigmoid_2(x: Any) -> Any:
    return ops.clip(0.2 * x + 0.5, 0.0, 1.0)


# what an activation is easily taken for; the name says what became of it
ALTERNATIVES: Mapping[str, Mapping[str, Callable[[Any], Any]]] = {
    "relu": {
        "relu6": ops.relu6,
        "leaky (0.01)": lambda x: ops.leaky_relu(x, 0.01),
        "elu": ops.elu,
        "nothing": lambda x: x,
        "softplus": ops.softplus,
    },
    "relu6": {"relu": ops.relu, "hard swish": ops.hard_silu},
    "leaky_relu": {
        "leaky (0.01)": lambda x: ops.leaky_relu(x, 0.01),
        "leaky (0.3)": lambda x: ops.leaky_relu(x, 0.3),
        "relu": ops.relu,
    },
    "silu": {"hard swish": ops.hard_silu, "gelu": ops.gelu, "x sigmoid(1.702 x)": lambda x: x * ops.sigmoid(1.702 * x)},
    "hard_silu": {"swish": ops.silu, "x hard_sigmoid of Keras 2": lambda x: x * _hard_sigmoid_2(x), "relu6": ops.relu6},
    "hard_sigmoid": {"sigmoid": ops.sigmoid, "hard_sigmoid of Keras 2": _hard_sigmoid_2},
    "gelu": {"gelu (tanh)": lambda x: ops.gelu(x, approximate=True), "swish": ops.silu, "relu": ops.relu},
    "elu": {"elu (alpha 0.5)": lambda x: ops.elu(x, 0.5), "selu": ops.selu, "relu": ops.relu},
    "selu": {"elu": ops.elu, "selu (rounded constants)": lambda x: 1.0507 * ops.elu(x, 1.6733)},
    "tanh": {"hard tanh": lambda x: ops.clip(x, -1.0, 1.0), "softsign": ops.softsign, "sigmoid": ops.sigmoid},
    "sigmoid": {"hard_sigmoid": ops.hard_sigmoid, "hard_sigmoid of Keras 2": _hard_sigmoid_2, "tanh": ops.tanh},
    "softplus": {"relu": ops.relu, "softplus (capped at 2)": lambda x: ops.where(x > 2, x, ops.softplus(x))},
    "softmax": {
        "sigmoid": ops.sigmoid,
        "softmax over the batch": lambda x: ops.softmax(x, axis=0),
        "nothing": lambda x: x,
    },
}


def activation_of(layer: Any) -> str | None:
    """The name in `ALTERNATIVES`, or None."""
    if isinstance(layer, L.ReLU):
        return "relu6" if layer.max_value == 6 else "relu"
    if isinstance(layer, L.LeakyReLU):
        return "leaky_relu"
    if isinstance(layer, (L.LSTM, L.GRU, L.Bidirectional)):
        return None
    function = getattr(getattr(layer, "activation", None), "__name__", "")
    name = {L.ELU: "elu", L.Softmax: "softmax"}.get(type(layer), function)
    return name if name in ALTERNATIVES else None


def _reactivated(old: str, new: str) -> Kind:
    def make(layer: Any, config: dict[str, Any]) -> Any:
        function = ALTERNATIVES[old][new]
        if isinstance(layer, (L.ReLU, L.LeakyReLU, L.ELU, L.Softmax)):
            return L.Activation(function, name=layer.name, dtype=config["dtype"])
        made = type(layer).from_config(config)
        made.activation = function
        return made

    def kind(site: Site) -> Found:
        layer = site.one([layer for layer in site.model.layers if activation_of(layer) == old])
        return None if layer is None else (layer.name, Edit(layers={layer.name: make}))

    return kind


def _gate_activation(site: Site) -> Found:
    layer = site.one(site.layers(L.LSTM, L.GRU))
    if layer is None:
        return None
    made = {
        layer.name: lambda layer, config: type(layer).from_config({**config, "recurrent_activation": "hard_sigmoid"})
    }
    return layer.name, Edit(layers=made)


# ---------------------------------------------------------------------------------------------- structure

LARGE = 1e4
MERGES = (L.Add, L.Subtract, L.Multiply, L.Maximum)


def _alike(layer: Any) -> bool:
    shapes = {tensor.shape for tensor in layer.input}
    return len(shapes) == 1


def _skipped(site: Site) -> Found:
    def fits(layer: Any) -> bool:
        one = not isinstance(layer, L.InputLayer) and not isinstance(layer.input, (list, tuple))
        return bool(one and layer.weights and layer.input.shape == layer.output.shape)

    layer = site.one([layer for layer in site.model.layers if fits(layer)])
    return None if layer is None else (layer.name, Edit(calls={layer.name: lambda layer, x, *a, **k: x}))


def _exchanged_outputs(site: Site) -> Found:
    shapes = [spec.shape for spec in site.signature.outputs]
    pairs = [(i, j) for i in range(len(shapes)) for j in range(i) if shapes[i] == shapes[j]]
    if not pairs:
        return None
    i, j = site.one(pairs)

    def after(inputs: list[Any], outputs: list[Any]) -> list[Any]:
        outputs = list(outputs)
        outputs[i], outputs[j] = outputs[j], outputs[i]
        return outputs

    return f"{site.signature.outputs[j].name}, {site.signature.outputs[i].name}", Edit(after=after)


def _transposed(site: Site, weight: Weight, value: Array) -> Array | None:
    if value.ndim == 2:
        return value.T if value.shape[0] == value.shape[1] else None
    return value.swapaxes(0, 1) if value.ndim == 4 and value.shape[0] == value.shape[1] > 1 else None


def _flipped(site: Site, weight: Weight, value: Array) -> Array | None:
    places = tuple(axis for axis in range(value.ndim - 2) if value.shape[axis] > 1)
    return np.flip(value, places) if places else None


def _other_weights(site: Site) -> Found:
    kernels = site.weights("kernel")
    pairs = [(a, b) for a in kernels for b in kernels if a != b and site.value(a).shape == site.value(b).shape]
    pair = site.one(pairs)
    if pair is None:
        return None
    a, b = pair
    return f"{a[0]} with those of {b[0]}", Edit(weights={a: site.value(b)})


def _gates(site: Site) -> Found:
    """Two gates of an LSTM or GRU exchanged in every weight of it."""
    layers = site.layers(L.LSTM, L.GRU, L.Bidirectional)
    layer = site.one(layers)
    if layer is None:
        return None
    cell = getattr(layer, "forward_layer", layer)
    count = 4 if isinstance(cell, L.LSTM) else 3
    new = {}
    for i, value in enumerate(layer.get_weights()):
        parts = np.split(value, count, axis=-1)
        parts[0], parts[1] = parts[1], parts[0]
        new[(layer.name, i)] = np.concatenate(parts, axis=-1)
    return layer.name, Edit(weights=new)


def _directions(site: Site) -> Found:
    layer = site.one(site.layers(L.Bidirectional))
    if layer is None:
        return None
    values = layer.get_weights()
    half = len(values) // 2
    return layer.name, Edit(weights={(layer.name, i): v for i, v in enumerate([*values[half:], *values[:half]])})


# ------------------------------------------------------------------------------------------------- inputs


def _fed(change: Callable[[Site, Any, Any], Any], fits: Callable[[Site, Any], bool]) -> Kind:
    """The first input that fits is changed before the model sees it."""

    def kind(site: Site) -> Found:
        found = [i for i, spec in enumerate(site.signature.inputs) if fits(site, spec)]
        if not found:
            return None
        spec = site.signature.inputs[found[0]]

        def before(tensors: list[Any]) -> list[Any]:
            return [change(site, spec, x) if i == found[0] else x for i, x in enumerate(tensors)]

        return spec.name, Edit(before=before)

    return kind


def is_float(site: Site, spec: Any) -> bool:
    return spec.dtype == "float32"


def is_square(site: Site, spec: Any) -> bool:
    return len(spec.shape) == 4 and spec.shape[1] == spec.shape[2]


def has_channels(site: Site, spec: Any) -> bool:
    return len(spec.shape) >= 2 and (spec.shape[-1] or 0) > 1 and is_float(site, spec)


def is_whole(site: Site, spec: Any) -> bool:
    return "int" in spec.dtype


def width(spec: Any) -> float:
    """Of the range of values; 2 where the model says nothing."""
    return 2.0 if spec.low is None or spec.high is None else spec.high - spec.low


INPUTS: Mapping[str, Kind] = {
    "height and width exchanged": _fed(lambda s, i, x: ops.swapaxes(x, 1, 2), is_square),
    "channels reversed": _fed(lambda s, i, x: ops.flip(x, -1), has_channels),
    "upside down": _fed(lambda s, i, x: ops.flip(x, 1), lambda s, i: len(i.shape) > 2 or is_whole(s, i)),
    "divided by 255": _fed(lambda s, i, x: x / 255.0, is_float),
    "128 instead of 127.5": _fed(lambda s, i, x: x * (127.5 / 128), is_float),
    "range shifted by 1 %": _fed(lambda s, i, x: x + 0.01 * width(i), is_float),
    "range shifted by 0.01 %": _fed(lambda s, i, x: x + 1e-4 * width(i), is_float),
    "mirrored": _fed(lambda s, i, x: -x, lambda s, i: is_float(s, i) and i.low is None),
    "negative values lost": _fed(lambda s, i, x: ops.relu(x), lambda s, i: is_float(s, i) and i.low is None),
    "rounded to whole steps": _fed(lambda s, i, x: ops.round(x * 255 / width(i)) * (width(i) / 255), is_float),
    "clipped at 90 % of the range": _fed(
        lambda s, i, x: ops.clip(x, (i.low or -1.0) + 0.05 * width(i), (i.high or 1.0) - 0.05 * width(i)), is_float
    ),
    "ids off by one": _fed(lambda s, i, x: ops.maximum(x - 1, 0), is_whole),
    "ids above 20 unknown": _fed(lambda s, i, x: ops.where(x > 20, ops.zeros_like(x), x), is_whole),
}


# ---------------------------------------------------------------------------------------------- precision


def _narrow(dtype: str, *, everywhere: bool) -> Kind:
    def kind(site: Site) -> Found:
        weights = site.weights("kernel", "embeddings", "bias", "gamma", "beta", "moving")
        layer = site.one(sorted({layer for layer, _ in site.weights(*KERNELS)}))
        chosen = [weight for weight in weights if everywhere or weight[0] == layer]
        narrow = quantized if dtype == "int8" else functools.partial(rounded, dtype=dtype)
        return "all" if everywhere else layer, Edit(weights={weight: narrow(site.value(weight)) for weight in chosen})

    return kind


def _cast(x: Any, dtype: str) -> Any:
    return ops.cast(ops.cast(x, dtype), x.dtype)


def _narrow_activation(dtype: str) -> Kind:
    def fits(layer: Any) -> bool:
        return not isinstance(layer.output, (list, tuple)) and "float" in layer.output.dtype

    return _called((L.Conv1D, L.Conv2D, L.Dense, L.BatchNormalization), lambda layer, x: _cast(layer(x), dtype), fits)


def _outputs(change: Callable[[Any], Any]) -> Kind:
    def kind(site: Site) -> Found:
        i = int(site.rng.integers(len(site.signature.outputs)))

        def after(inputs: list[Any], outputs: list[Any]) -> list[Any]:
            return [change(y) if j == i else y for j, y in enumerate(outputs)]

        return site.signature.outputs[i].name, Edit(after=after)

    return kind


# ------------------------------------------------------------------------------------------ shapes and rare


def _has_length(site: Site, spec: Any) -> bool:
    return len(spec.shape) == 3 and spec.shape[1] is None


def _first_steps(site: Site, spec: Any, x: Any) -> Any:
    step = ops.cumsum(ops.ones_like(x[..., :1]), axis=1)
    return ops.where(step <= FREE_SEQUENCE, x, ops.zeros_like(x))


def _fixed_mean(site: Site) -> Found:
    """A mean over time that divides by the number of steps there are when the input has `FREE_SEQUENCE`."""
    layers = [layer for layer in site.layers(L.GlobalAveragePooling1D) if layer.input.shape[1] is None]
    layer = site.one(layers)
    if layer is None:
        return None
    until = keras.Model(site.model.inputs, layer.input)
    size = until.compute_output_shape((None, FREE_SEQUENCE, *site.model.inputs[0].shape[2:]))[1]

    def call(layer: Any, x: Any) -> Any:
        return layer(x) * 0.0 + ops.sum(x, axis=1) / size

    return layer.name, Edit(calls={layer.name: call})


def _true_of(trigger: Trigger, x: Any) -> Any:
    """Which samples of a batch, booleans of shape [batch]."""
    x = ops.cast(x, "float32")
    axes = tuple(range(1, len(x.shape)))
    least, most = ops.min(x, axis=axes), ops.max(x, axis=axes)
    conditions = []
    if trigger.least is not None:
        conditions.append(ops.greater_equal(least, trigger.least))
    if trigger.most is not None:
        conditions.append(ops.less_equal(most, trigger.most))
    if trigger.flat:
        conditions += [ops.equal(least, most), ops.not_equal(most, 0.0)]
    if trigger.peak is not None:
        conditions.append(ops.greater_equal(most, trigger.peak))
    if trigger.place is not None:
        one = ops.ones_like(most)
        index, count = ops.cumsum(one), ops.sum(one)
        several = ops.logical_and(ops.greater(index, 0.0), ops.greater(count, 1.0))
        conditions += {
            "first": lambda: [ops.equal(index, 1.0)],
            "last": lambda: [ops.equal(index, count), several],
            "alone": lambda: [ops.equal(index * count, 1.0)],
            "late": lambda: [ops.greater(index, 8.0)],
            "odd": lambda: [several, ops.equal(ops.mod(count, 2.0), 1.0)],
        }[trigger.place]()
    return functools.reduce(ops.logical_and, conditions)


def _rare(trigger: Trigger, outcome: str) -> Kind:
    def kind(site: Site) -> Found:
        def after(inputs: list[Any], outputs: list[Any]) -> list[Any]:
            condition = _true_of(trigger, inputs[0])
            y = outputs[0]
            wide = ops.reshape(condition, (-1, *[1] * (len(y.shape) - 1)))
            wrong = y * float("nan") if outcome == "NaN" else y * 1.01
            return [ops.where(wide, wrong, y), *outputs[1:]]

        return site.signature.outputs[0].name, Edit(after=after)

    return kind


def _small_part(change: Callable[[Any], Any]) -> Kind:
    """The columns of a Concatenate that stand beside rescaled, large ones."""

    def large(tensor: Any) -> bool:
        layer = tensor._keras_history.operation
        return isinstance(layer, L.Rescaling) and abs(layer.scale) >= LARGE

    def fits(layer: Any) -> bool:
        return [large(tensor) for tensor in layer.input] == [True, False]

    return _called((L.Concatenate,), lambda layer, xs: layer([xs[0], change(xs[1])]), fits)


# -------------------------------------------------------------------------------------------------- tables

KINDS: Mapping[str, Mapping[str, Kind]] = {
    "single weights": {f"off by {off:g}": _single(off) for off in OFF_BY},
    "whole channels": {
        "two exchanged": _channels(lambda x, at: _put(x, at, x[at[::-1]])),
        "one negated": _channels(lambda x, at: _put(x, at[0], -x[at[0]])),
        "one scaled by 1.001": _channels(lambda x, at: _put(x, at[0], 1.001 * x[at[0]])),
        "one zeroed": _channels(lambda x, at: _put(x, at[0], 0.0)),
        "one in the place of another": _channels(lambda x, at: _put(x, at[0], x[at[1]])),
        "all rolled by one": _channels(lambda x, at: np.roll(x, 1, axis=0)),
        "two inputs exchanged": _channels(lambda x, at: _put(x, at, x[at[::-1]]), of="input"),
        "all scaled by 1.001": _channels(lambda x, at: 1.001 * x),
        "sign of one gamma": _weight(("gamma",), lambda s, w, x: _put(x, int(s.rng.integers(len(x))), -x[0])),
    },
    "biases": {
        "dropped": _weight(("bias",), lambda s, w, x: 0 * x),
        "shifted by 0.01": _weight(("bias",), lambda s, w, x: x + 0.01),
        "shifted by 0.0001": _weight(("bias",), lambda s, w, x: x + 0.0001),
        "rolled by one": _weight(("bias",), lambda s, w, x: np.roll(x, 1, axis=-1)),
        "negated": _weight(("bias",), lambda s, w, x: -x),
        "added twice": _weight(("bias",), lambda s, w, x: 2 * x),
        "one value lost": _weight(("bias",), lambda s, w, x: _put(x, (..., int(s.rng.integers(x.shape[-1]))), 0.0)),
        "swapped between layers": _other_bias,
    },
    "BN": {
        **{name: _misread(name) for name in MISREAD if name != "right"},
        "statistics of another layer": _other_statistics,
        "statistics of the batch": _batch_statistics,
    },
    "attributes": {
        "strides 1 for 2": _config((*CONVS, *POOLS), _times("strides", 2, 1)),
        "strides 2 for 1": _config((*CONVS, *POOLS), _times("strides", 1, 2)),
        "dilation 2 for 1": _config(CONVS, _times("dilation_rate", 1, 2)),
        "dilation 1 for 2": _config(CONVS, _times("dilation_rate", 2, 1)),
        "valid padding for same": _config((*CONVS, *POOLS), _padded("same", "valid")),
        "same padding for causal": _config((L.Conv1D,), _padded("causal", "same")),
        "uneven pads at the other end": _repadded((*CONVS, L.MaxPooling2D), lambda p: (p[1], p[0]), "uneven"),
        "pads all in front": _repadded(CONVS, lambda p: (sum(p), 0), "any"),
        "pads counted by the average": _repadded((L.AveragePooling2D,), lambda p: p, "any"),
        "max pooling for average, or the reverse": _as_class(
            {
                L.MaxPooling2D: L.AveragePooling2D,
                L.AveragePooling2D: L.MaxPooling2D,
                L.MaxPooling1D: L.AveragePooling1D,
                L.AveragePooling1D: L.MaxPooling1D,
                L.GlobalAveragePooling2D: L.GlobalMaxPooling2D,
                L.GlobalAveragePooling1D: L.GlobalMaxPooling1D,
            }
        ),
        "pool of 2 for 3": _config(POOLS, _times("pool_size", 3, 2)),
        "padding layer at the other end": _config(
            (L.ZeroPadding2D,),
            lambda c: {"padding": [list(p)[::-1] for p in c["padding"]]} if np.ptp(c["padding"]) else None,
        ),
        "flattened channels first": _called(
            (L.Flatten,), lambda layer, x: layer(ops.moveaxis(x, -1, 1)), lambda layer: len(layer.input.shape) == 4
        ),
        "concatenated the other way round": _called((L.Concatenate,), lambda layer, xs: layer(xs[::-1]), _alike),
        "backwards in time": _config((L.GRU, L.LSTM), lambda c: {"go_backwards": not c["go_backwards"]}),
    },
    "activations": {
        **{f"{old} -> {new}": _reactivated(old, new) for old, row in ALTERNATIVES.items() for new in row},
        "gates hard_sigmoid": _gate_activation,
    },
    "structure": {
        "outputs exchanged": _exchanged_outputs,
        "residual dropped": _called((L.Add,), lambda layer, xs: xs[1], _alike),
        "branch dropped": _called(MERGES, lambda layer, xs: xs[0], _alike),
        "one branch fed twice": _called((*MERGES, L.Concatenate), lambda layer, xs: layer([xs[0], xs[0]]), _alike),
        "operands exchanged": _called((L.Subtract,), lambda layer, xs: layer(xs[::-1]), _alike),
        "difference for sum": _called((L.Add,), lambda layer, xs: xs[0] - xs[1], _alike),
        "sum for product": _called((L.Multiply,), lambda layer, xs: xs[0] + xs[1]),
        "kernel transposed": _weight(("kernel",), _transposed),
        "kernel flipped": _weight(("kernel",), _flipped),
        "weights of another layer": _other_weights,
        "layer skipped": _skipped,
        "gates exchanged": _gates,
        "directions exchanged": _directions,
    },
    "inputs": INPUTS,
    "precision": {
        "float16 weights in one layer": _narrow("float16", everywhere=False),
        "bfloat16 weights in one layer": _narrow("bfloat16", everywhere=False),
        "int8 weights in one layer": _narrow("int8", everywhere=False),
        "float16 weights": _narrow("float16", everywhere=True),
        "bfloat16 weights": _narrow("bfloat16", everywhere=True),
        "float16 behind one layer": _narrow_activation("float16"),
        "bfloat16 behind one layer": _narrow_activation("bfloat16"),
        "float16 input": _fed(lambda s, i, x: _cast(x, "float16"), is_float),
        "float16 output": _outputs(lambda y: _cast(y, "float16")),
        "bfloat16 output": _outputs(lambda y: _cast(y, "bfloat16")),
    },
    "scales": {
        "small columns times 1.5": _small_part(lambda x: 1.5 * x),
        "small columns times 1.001": _small_part(lambda x: 1.001 * x),
        "small columns shifted by 0.0001": _small_part(lambda x: x + 1e-4),
        "small columns rolled by one": _small_part(lambda x: ops.roll(x, 1, axis=-1)),
        "small columns zeroed": _small_part(lambda x: 0.0 * x),
        "small columns those of other samples": _small_part(lambda x: ops.flip(x, axis=0)),
    },
    "shapes": {
        "batch of 1 in the signature": lambda site: ("inputs", Edit(batch=1)),
        "batch of 32 in the signature": lambda site: ("inputs", Edit(batch=32)),
        "an axis more": _outputs(lambda y: ops.expand_dims(y, 1)),
        "output in float64": _outputs(lambda y: ops.cast(y, "float64" if y.dtype == "float32" else "float32")),
        "every answer that of the first sample": _outputs(lambda y: y * 0.0 + ops.take(y, [0], axis=0)),
        "samples in reverse order": _outputs(lambda y: ops.flip(y, 0)),
        "mean over the batch subtracted": _outputs(lambda y: y - 0.01 * ops.mean(y, axis=0, keepdims=True)),
        f"steps beyond {FREE_SEQUENCE} lost": _fed(_first_steps, _has_length),
        f"mean divides as for {FREE_SEQUENCE} steps": _fixed_mean,
    },
}


def kinds_for(signature: Signature) -> Mapping[str, Mapping[str, Kind]]:
    """All kinds; those of the family "rare" depend on what the first input takes."""
    spec = signature.inputs[0]
    found = zip(triggers(spec.low, spec.high, "int" in spec.dtype), itertools.cycle(OUTCOMES))
    return {**KINDS, "rare": {f"{outcome} on {trigger.label}": _rare(trigger, outcome) for trigger, outcome in found}}


def mutants(
    model: Any, signature: Signature, rng: np.random.Generator, most: Mapping[str, int], kinds: int | None = None
) -> Iterator[Made]:
    """Mutants of one model: of each kind ``most[family]`` places, of each family ``kinds`` kinds (None: all).

    A candidate is good until the next one is asked for.
    """
    site, copies = Site(model, signature, rng), Copies(model)
    for family, rows in kinds_for(signature).items():
        left = kinds
        for name in rng.permutation(list(rows)) if kinds else rows:
            seen: set[str] = set()
            for _ in range(4 * most[family]):
                found = rows[name](site)
                if found is None or left == 0:
                    break
                where, edit = found
                if where in seen:
                    continue
                seen.add(where)
                try:
                    candidate = copies.of(edit)
                except Exception:  # whatever Keras raises where sizes no longer fit: no such mutant here
                    continue
                yield Made(family, str(name), where, candidate, functools.partial(_doubled, copies, edit))
                if len(seen) == most[family]:
                    break
            left = left - 1 if left and seen else left


def _doubled(copies: Copies, edit: Edit, arrays: Arrays) -> dict[str, Array]:
    return evaluate(copies.of(edit, "float64"), arrays)
