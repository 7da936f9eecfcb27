"""What changed between Keras 2 and Keras 3, as tables: a legacy description in, its normal form out. JSON to JSON.

The normal form has the classes and arguments of Keras 3 in the serialised form of Keras 3 (``module``, ``class_name``,
``config``, ``registered_name``), but keeps the graph as it was recorded: a model is

    {"model": "Functional", "name", "trainable", "layers": [entry, ...], "input_layers", "output_layers"}
    {"model": "Sequential", "name", "trainable", "layers": [entry, ...], "input": entry of the input or None}

and an entry of a layer list is ``{"name": ..., "inbound_nodes": [...]}`` with one of

    "layer"        the serialised layer; "before": serialised layers that are called in front of it
    "input"        {"batch_shape", "dtype", "sparse"}
    "nested"       a model
    "operation"    {"class_name", "config"}: a TensorFlow operation in the graph (`operations`)

Rules are rows: ``RENAMED`` classes, arguments that ``MEANT_NOTHING``, ``DEFAULTS`` that an absent argument stood for,
``ARGUMENTS`` with another name, ``REFUSED`` classes. An argument that is left over, which the class of Keras 3 does
not take, is refused by name: it would change the answer, or nobody knows.

One function changed its meaning. Keras 2's hard_sigmoid is ``clip(0.2·x + 0.5, 0, 1)``, Keras 3's is
``clip(y/6 + 0.5, 0, 1)``, and they are equal for ``y = 1.2·x``. Where the activation follows weights, those are
multiplied by 1.2 when they are filled in (``STEEPER``, see `weights`); a lone Activation gets a Rescaling in front.

Some layers become a few in turn (``chain``), the last of which has the name. A causal SeparableConv1D pads zeros,
``(k - 1)·dilation``, in front and convolves what is there. The bilinear upsampling of TensorFlow 1 put
``(1 - j/s)·x[i] + (j/s)·x[i + 1]`` at ``s·i + j``, with the last sample also behind the end. For ``s = 2`` that is x
repeated twice and the mean of each two neighbours, where the last has none; and twice that is ``s = 4``, because in
between it is linear.

Limits: what is registered under a package's name ("Addons>GELU") is a class of that package and must be given.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import keras

from deploykit.errors import LoadError, UnsupportedModelError
from deploykit.load.contents import printable
from deploykit.load.legacy import operations
from deploykit.load.safety import CODE_CLASSES

Config = dict[str, Any]

MODELS = dict.fromkeys(("Functional", "Model", "Network", "Container"), "Functional") | {"Sequential": "Sequential"}

RENAMED = {
    "BatchNormalizationV1": "BatchNormalization",
    "BatchNormalizationV2": "BatchNormalization",
    "SyncBatchNormalization": "BatchNormalization",  # differs in training only
    "LayerNormalizationV2": "LayerNormalization",
    "CuDNNLSTM": "LSTM",  # its weights are laid out otherwise: see `weights`
    "CuDNNGRU": "GRU",
    "ThresholdedReLU": "ReLU",  # x where x > theta, else 0: ReLU(threshold=theta)
    "DenseV1": "Dense",
    "RandomCrop": "Resizing",  # of the largest window of that shape in the middle, which it does at inference
}

# Random layers that Keras 3 has not; at inference they hand their input on.
IDENTITIES = ("RandomHeight", "RandomWidth")

# Classes that cannot become a Keras 3 layer: what they are, and what to do.
REFUSED = {
    "QuantizeWrapper": "wraps a layer for quantization-aware training; export it with TensorFlow Lite instead",
    "QuantizeWrapperV2": "wraps a layer for quantization-aware training; export it with TensorFlow Lite instead",
    "QuantizeLayer": "quantizes for quantization-aware training; export it with TensorFlow Lite instead",
    "ClusterWeights": "clusters weights; apply tfmot's strip_clustering and save the model again",
    "LocallyConnected1D": "has no equivalent in Keras 3; build the model without it",
    "LocallyConnected2D": "has no equivalent in Keras 3; build the model without it",
    "KerasLayer": "loads a module of TensorFlow Hub from elsewhere; build the model from layers",
    "DenseFeatures": "reads TensorFlow feature columns; build the model on plain inputs",
}

# (class or None for all, argument) -> the values with which it changes nothing; None: any value.
MEANT_NOTHING: Mapping[tuple[str | None, str], Collection[Any] | None] = {
    (None, "batch_input_shape"): None,  # of a Sequential's first layer, read there
    (None, "input_dtype"): None,
    (None, "implementation"): None,  # the same sums in another order
    (None, "ragged"): (False, None),
    (None, "type_spec"): (None,),
    (None, "time_major"): (False,),
    (None, "trainable"): None,  # of layers that take no such argument, having no weights
    (None, "noise_shape"): None,  # of dropout, which does nothing at inference
    (None, "experimental_autocast"): None,
    (None, "rng_type"): None,  # of random layers, which do nothing at inference
    ("MultiHeadAttention", "softmax_robust_masking"): None,  # another large number for what a mask hides
    ("BatchNormalization", "fused"): None,
    ("BatchNormalization", "virtual_batch_size"): (None,),
    ("BatchNormalization", "adjustment"): (None,),
    ("DepthwiseConv1D", "groups"): None,  # always one per channel
    ("DepthwiseConv2D", "groups"): None,
    ("Conv1DTranspose", "groups"): (1,),
    ("Conv2DTranspose", "groups"): (1,),
    ("Conv3DTranspose", "groups"): (1,),
    ("SeparableConv1D", "groups"): (1,),
    ("SeparableConv2D", "groups"): (1,),
    ("DepthwiseConv1D", "filters"): (None,),
    ("DepthwiseConv2D", "filters"): (None,),
    ("Embedding", "input_length"): None,  # a promise about the input, kept by `_input_of`
    ("Embedding", "sparse"): None,  # of its gradients
    ("Resizing", "seed"): None,  # of a RandomCrop
    (None, "vocabulary_size"): None,  # counted from the vocabulary
    ("Attention", "causal"): (False,),
    ("AdditiveAttention", "causal"): (False,),
    ("MultiHeadAttention", "query_shape"): None,
    ("MultiHeadAttention", "key_shape"): None,
    ("MultiHeadAttention", "value_shape"): None,
}

# What an argument stood for in files that do not mention it, where Keras 3 thinks otherwise.
DEFAULTS: Mapping[str, Config] = {
    "GRU": {"reset_after": False},
    "GRUCell": {"reset_after": False},
    "LSTM": {"recurrent_activation": "hard_sigmoid"},
    "LSTMCell": {"recurrent_activation": "hard_sigmoid"},
    **{f"ConvLSTM{rank}D": {"recurrent_activation": "hard_sigmoid"} for rank in (1, 2, 3)},
    **{
        name: {"data_format": "channels_last"}
        for name in ("Conv1D", "SeparableConv1D", "MaxPooling1D", "AveragePooling1D")
    },
}

# Arguments with another name or another form: (class, argument) -> (argument, change of value).
ARGUMENTS: Mapping[tuple[str, str], tuple[str, Callable[[Any], Any]]] = {
    ("LeakyReLU", "alpha"): ("negative_slope", float),
    ("ThresholdedReLU", "theta"): ("threshold", float),
    ("Dropout", "p"): ("rate", float),
}

# What the classes without a switch of their own always did.
FIXED: Mapping[str, Config] = {
    "CuDNNLSTM": {"activation": "tanh", "recurrent_activation": "sigmoid"},
    "CuDNNGRU": {"activation": "tanh", "recurrent_activation": "sigmoid", "reset_after": True},
    "RandomCrop": {"interpolation": "bilinear", "crop_to_aspect_ratio": True, "data_format": "channels_last"},
}

ACTIVATIONS = {"softmax_v2": "softmax", "swish": "silu", "log_softmax_v2": "log_softmax", "relu_v2": "relu"}

# Layers whose weights take the factor of a hard_sigmoid: the factor of each gate, along the last axis of all weights.
STEEPNESS = 1.2
STEEPER: Mapping[tuple[str, str], tuple[float, ...]] = {
    ("LSTM", "recurrent_activation"): (STEEPNESS, STEEPNESS, 1.0, STEEPNESS),  # i, f, c, o
    ("LSTMCell", "recurrent_activation"): (STEEPNESS, STEEPNESS, 1.0, STEEPNESS),
    ("ConvLSTM1D", "recurrent_activation"): (STEEPNESS, STEEPNESS, 1.0, STEEPNESS),
    ("ConvLSTM2D", "recurrent_activation"): (STEEPNESS, STEEPNESS, 1.0, STEEPNESS),
    ("ConvLSTM3D", "recurrent_activation"): (STEEPNESS, STEEPNESS, 1.0, STEEPNESS),
    ("GRU", "recurrent_activation"): (STEEPNESS, STEEPNESS, 1.0),  # z, r, h
    ("GRUCell", "recurrent_activation"): (STEEPNESS, STEEPNESS, 1.0),
    **{
        (name, "activation"): (STEEPNESS,)
        for name in (
            *("Dense", "EinsumDense", "SimpleRNN", "SimpleRNNCell", "DepthwiseConv1D", "DepthwiseConv2D"),
            *("SeparableConv1D", "SeparableConv2D"),  # the pointwise kernel and the bias
            *(f"Conv{rank}D{kind}" for rank in (1, 2, 3) for kind in ("", "Transpose")),
        )
    },
}

CONSTANT = "_CONSTANT_VALUE"  # stands where the name of a layer would
# Layers whose state is no weight: class -> the argument that holds it when it was given and not learnt by adapt(). A
# learnt one is a constant in a graph (a vocabulary) or a summary that only the layer's own code can finish.
LEARNT = {
    "IndexLookup": "vocabulary",
    "StringLookup": "vocabulary",
    "IntegerLookup": "vocabulary",
    "TextVectorization": "vocabulary",
    "Discretization": "bin_boundaries",
}
UNKNOWN_INTERPOLATIONS = ("gaussian", "mitchellcubic")
PRUNED = "PruneLowMagnitude"  # tfmot's wrapper: kernel·mask is what it applies
SPECTRAL = "SpectralNormalization"  # divides the kernel itself in training, so that inference takes it as it is stored
STRIPPED = {  # wrappers that are not there at inference -> what is told
    PRUNED: "the pruning wrapper is stripped, its mask applied",
    SPECTRAL: "the wrapper of spectral normalization is stripped: the kernel is stored normalised",
}
# Classes that do something else in training and of whose translation that cannot be seen.
UNTRAINED = frozenset((*IDENTITIES, "RandomCrop", SPECTRAL))
WRAPPED = ("layer", "backward_layer", "forward_layer", "cell")  # arguments that hold a layer
FREE = {  # arguments that training alone reads -> where their classes live
    "initializer": keras.initializers,
    "regularizer": keras.regularizers,
    "constraint": keras.constraints,
}


@dataclass(frozen=True)
class Translated:
    """``model``: the normal form. ``notices``: what was dropped on the way."""

    model: Config
    notices: tuple[str, ...]


def translate(
    config: Mapping[str, Any],
    *,
    what: str,
    given: Collection[str] = (),
    backend: str | None = None,
    saved_by: str | None = None,
) -> Translated:
    """The normal form of a legacy description; ``given`` are the names of the user's own classes.

    Raises UnsupportedModelError for what has no exact equivalent, LoadError for a description that is no model.
    """
    job = _Translation(what, frozenset(given), backend == "theano", saved_by or "")
    try:
        model = job.model(plain(config), None)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
        raise LoadError(f"{what} is damaged: its description is not that of a model; copy or save it again") from error
    return Translated(model, tuple(dict.fromkeys(job.notices)))


def plain(value: Any) -> Any:
    """JSON in which tuples, shapes and arrays, which older generations mark, are lists or numbers.

    Nothing here needs to know the difference.
    """
    if isinstance(value, Mapping):
        if set(value) == {"type", "value"} and value["type"] == "ndarray":
            return value["value"]
        if value.get("class_name") in ("__tuple__", "TensorShape") and isinstance(value.get("items"), list):
            return [plain(item) for item in value["items"]]
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def is_reference(value: Any) -> bool:
    """``["conv", 0, 0]``, with or without further arguments behind: a tensor, or a constant in its place."""
    return (
        isinstance(value, (list, tuple))
        and len(value) in (3, 4)
        and isinstance(value[0], str)
        and type(value[1]) is int
        and (value[0] == CONSTANT or type(value[2]) is int)
        and (len(value) == 3 or isinstance(value[3], Mapping))
    )


def references(nest: Any) -> Iterator[Sequence[Any]]:
    """All references in a nest, those in further arguments too."""
    if is_reference(nest):
        yield nest
        nest = nest[3] if len(nest) == 4 else ()
    for value in nest.values() if isinstance(nest, Mapping) else nest if isinstance(nest, (list, tuple)) else ():
        yield from references(value)


def unused(entry: Mapping[str, Any]) -> frozenset[str]:
    """Layers of a functional model on which no output depends: what made its losses and metrics."""
    config = entry["config"]
    if MODELS.get(entry["class_name"]) != "Functional":
        return frozenset()
    feeds = {layer["name"]: {r[0] for r in references(layer["inbound_nodes"])} for layer in config["layers"]}
    inputs = {r[0] for r in references(config["input_layers"])}
    waiting, needed = [r[0] for r in references(config["output_layers"])], set(inputs)
    while waiting:
        if (name := waiting.pop()) not in needed:
            needed.add(name)
            waiting += feeds.get(name, ())
    return frozenset(feeds) - needed


@cache
def accepted(name: str) -> frozenset[str]:
    """The arguments that a layer class of Keras 3 takes."""
    found: set[str] = set()
    for parent in getattr(keras.layers, name).__mro__:
        if "__init__" in vars(parent):
            parameters = inspect.signature(parent.__init__).parameters
            found |= set(parameters)
            if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
                break  # hands nothing on to its parent
    return frozenset(found - {"self", "args", "kwargs", "weights"})


def version(text: str) -> tuple[int, ...]:
    """``2.2.4-tf`` -> (2, 2, 4); empty where there is none."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def modern_name(name: str) -> str:
    """A layer's name today: Keras 3 forbids the slash."""
    return name.replace("/", "_")


def is_keras_layer(name: str) -> bool:
    found = vars(keras.layers).get(name)
    return isinstance(found, type) and issubclass(found, keras.layers.Layer)


class _Translation:
    """One file; collects what is to be told."""

    def __init__(self, what: str, given: frozenset[str], theano: bool, saved_by: str) -> None:
        self.what = what
        # Keras beside TensorFlow 1, which took other points for bilinear resizing
        self.old_bilinear = "-tf" not in saved_by and (1,) <= version(saved_by) < (2, 4)
        self.given = given
        self.theano = theano
        self.notices: list[str] = []

    # ------------------------------------------------------------------------------------------------ models

    def model(self, entry: Mapping[str, Any], name: str | None) -> Config:
        kind = MODELS.get(entry["class_name"])
        config = entry["config"]
        if kind is None:
            raise self.unknown_model(entry["class_name"])
        if isinstance(config, list):  # a Sequential of Keras before 2.2.3
            config = {"layers": config}
        model: Config = {
            "model": kind,
            "name": modern_name(name or config.get("name") or "model"),
            "trainable": config.get("trainable", True),
        }
        if kind == "Functional":
            idle = unused(entry)
            layers = [self.entry(layer) for layer in config["layers"] if layer["name"] not in idle]
            graph = {key: config[key] for key in ("input_layers", "output_layers")}
            return {**model, "layers": layers, **graph}
        layers = [layer for layer in config["layers"] if layer["class_name"] != "InputLayer"]
        return {**model, "input": self.input_of(config), "layers": [self.entry(layer) for layer in layers]}

    def unknown_model(self, name: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.what} holds a {printable(name)}, a model with code of its own, of which the file has no graph; "
            "build it as a functional model and load the weights there"
        )

    def input_of(self, config: Mapping[str, Any]) -> Config | None:
        """The input of a Sequential: that of its InputLayer, or what its first layer was told."""
        layers = config["layers"]
        first = layers[0]["config"] if layers and isinstance(layers[0]["config"], dict) else {}
        if layers and layers[0]["class_name"] == "InputLayer":
            return self.entry(layers[0])
        shape = first.get("batch_input_shape") or config.get("build_input_shape")
        if shape is None or not _is_shape(shape):
            return None
        length = first.get("input_length")
        if layers[0]["class_name"] == "Embedding" and isinstance(length, int) and list(shape[1:]) == [None]:
            shape = [shape[0], length]
        return {
            "name": modern_name(f"{first['name']}_input" if "name" in first else "input"),
            "input": {"batch_shape": shape, "dtype": _input_dtype(first.get("dtype")), "sparse": False},
        }

    # ------------------------------------------------------------------------------------------------ layers

    def entry(self, entry: Mapping[str, Any]) -> Config:
        kind, config = entry["class_name"], entry["config"]
        name = entry.get("name") or (config.get("name") if isinstance(config, dict) else None)
        placed: Config = {"name": name, "inbound_nodes": entry.get("inbound_nodes", [])}
        if kind == "InputLayer":
            shape = config.get("batch_input_shape", config.get("batch_shape"))
            if not _is_shape(shape):
                raise LoadError(f"{self.what} is damaged: input {printable(str(name))} has no shape; save it again")
            self.refuse_ragged(name, config)
            return {
                **placed,
                "input": {
                    "batch_shape": shape,
                    "dtype": _input_dtype(config.get("dtype")),
                    "sparse": bool(config.get("sparse", False)),
                },
            }
        if kind in MODELS:
            return {**placed, "nested": self.model(entry, name)}
        if kind in operations.CLASSES:
            try:
                operations.operation(kind, config, str(name))
            except UnsupportedModelError as error:  # outside its table
                raise UnsupportedModelError(f"{self.what}: {error}") from error
            return {**placed, "operation": {"kind": kind, "config": config}}
        *before, layer = self.chain(self.layer(kind, config, name, wrapped=False), str(name))
        placed |= {"before": before} if before else {}
        placed |= {"untrained": True} if UNTRAINED.intersection(_classes(entry)) else {}
        return {**placed, "layer": layer}

    def chain(self, layer: Config, name: str) -> list[Config]:
        """What does in turn what a layer did; the layer itself where it does so alone."""
        kind, arguments = layer["class_name"], layer["config"]
        common = {key: arguments[key] for key in ("dtype",) if key in arguments}

        def further(kind: str, what: str, **given: Any) -> Config:
            return serialised("layers", kind, {"name": modern_name(f"{name}.{what}"), **common, **given})

        if kind == "Activation" and arguments.get("activation") == "hard_sigmoid":
            return [further("Rescaling", "steeper", scale=STEEPNESS, offset=0.0), layer]
        common |= {"data_format": arguments.get("data_format", "channels_last")}
        if kind == "SeparableConv1D" and arguments.get("padding") == "causal":
            (size,), (dilation,) = _sizes(arguments["kernel_size"]), _sizes(arguments.get("dilation_rate", 1))
            padding = further("ZeroPadding1D", "causal", padding=[(size - 1) * dilation, 0])
            return [padding, serialised("layers", kind, {**arguments, "padding": "valid"})]
        if kind == "UpSampling2D" and arguments.get("interpolation") == "bilinear" and self.old_bilinear:
            self.notices.append(f"{name}: upsamples as TensorFlow 1 did, from other points than the layer of today")
            found: list[Config] = []
            rest = _pair(arguments["size"])
            while rest != [1, 1]:
                now = [min(2, size) for size in rest]
                rest = [size // step for size, step in zip(rest, now, strict=True)]
                found += [
                    further("UpSampling2D", f"repeated.{len(found)}", size=now, interpolation="nearest"),
                    further("AveragePooling2D", f"mean.{len(found)}", pool_size=now, strides=1, padding="same"),
                ]
            found = found or [further("UpSampling2D", "repeated", size=rest, interpolation="nearest")]
            found[-1]["config"]["name"] = modern_name(name)
            return found
        return [layer]

    def refuse_ragged(self, name: str | None, config: Mapping[str, Any]) -> None:
        if config.get("ragged"):
            raise UnsupportedModelError(
                f"{self.what}: input {printable(str(name))} takes ragged tensors, which Keras 3 has not; "
                "build the model on padded inputs"
            )

    def layer(self, kind: str, config: Mapping[str, Any], name: str | None, *, wrapped: bool = True) -> Config:
        """A layer as Keras 3 serialises it, at any depth of wrapping."""
        kind = kind.removeprefix("Custom>") if kind.startswith("Custom>") and kind[7:] in self.given else kind
        if isinstance(config.get("name"), str) and "/" in config["name"]:
            config = {**config, "name": modern_name(config["name"])}
            self.notices.append("a slash in the name of a layer became an underscore: Keras 3 forbids it")
        if kind in self.given:
            return {"module": None, "class_name": kind, "config": dict(config), "registered_name": kind}
        if kind in STRIPPED:
            inner = config["layer"]
            self.notices.append(f"{name}: {STRIPPED[kind]}")
            return self.layer(inner["class_name"], {**inner["config"], "name": name}, name, wrapped=wrapped)
        label = f"{self.what}: layer {printable(str(name))} ({printable(kind)})"
        if kind in CODE_CLASSES:  # for the scan to judge
            return serialised("layers", kind, config)
        if kind in REFUSED:
            raise UnsupportedModelError(f"{label} {REFUSED[kind]}")
        if kind in IDENTITIES:
            return serialised("layers", "Identity", {"name": modern_name(str(name))})
        modern = RENAMED.get(kind, kind)
        if not is_keras_layer(modern):
            return {"module": None, "class_name": kind, "config": dict(config), "registered_name": kind}
        arguments = {**DEFAULTS.get(kind, {}), **config, **FIXED.get(kind, {})}
        arguments = self.renamed(kind, modern, arguments, label)
        if kind == "Bidirectional" and (backward := _counterpart(arguments)) is not None:
            arguments["backward_layer"] = backward
        if kind == "Discretization" and arguments.get("output_mode", "int") == "int":
            self.notices.append(f"{name}: counts its bins in int32, where it may have done so in int64")
        arguments = {key: self.value(key, value, name) for key, value in arguments.items()}
        dtype = self.layer_dtype(arguments.pop("dtype", None))
        arguments |= {} if dtype is None else {"dtype": dtype}
        self.refuse_meaning(modern, arguments, label, wrapped)
        arguments = self.untrained(arguments, str(name))
        return serialised("layers", modern, arguments)

    def renamed(self, kind: str, modern: str, arguments: Mapping[str, Any], label: str) -> Config:
        """Arguments under their names of today; those that meant nothing are left out, others refused."""
        found: Config = {}
        for key, value in arguments.items():
            key, change = ARGUMENTS.get((kind, key), (key, None))
            if change is not None:
                value = change(value)
            if key in accepted(modern):
                found[key] = value
                continue
            for who in (modern, None):
                if (who, key) in MEANT_NOTHING:
                    harmless = MEANT_NOTHING[who, key]
                    if harmless is None or value in harmless:
                        break
            else:
                if key.rpartition("_")[2] not in FREE:
                    raise UnsupportedModelError(
                        f"{label} was saved with {printable(key)}={printable(str(value))}, "
                        "for which Keras 3 has no equivalent; build the model without it"
                    )
        return found

    def value(self, key: str, value: Any, name: str | None) -> Any:
        if key in WRAPPED and isinstance(value, Mapping) and "class_name" in value:
            inner = value["config"]
            if value["class_name"] in MODELS:
                return {"nested": self.model(value, None)}
            return self.layer(value["class_name"], inner, inner.get("name") or name)
        if key == "cells" and isinstance(value, list):
            return [self.layer(cell["class_name"], cell["config"], cell["config"].get("name")) for cell in value]
        if key.rpartition("_")[2] == "activation":
            return self.activation(value, name)
        return value

    def activation(self, value: Any, name: str | None) -> Any:
        if isinstance(value, Mapping) and isinstance(value.get("config"), str):  # a function by its name
            value = value["config"]
        if isinstance(value, Mapping) and isinstance(value.get("config"), Mapping):  # a layer as activation
            return self.layer(value["class_name"], value["config"], value["config"].get("name") or f"{name}.activation")
        return ACTIVATIONS.get(value, value) if isinstance(value, str) else value

    def layer_dtype(self, dtype: Any) -> str | None:
        """The dtype policy: of Keras 2 the argument was also the input's dtype, so that an Embedding's may be int32."""
        plain = _plain_dtype(dtype)
        return plain if plain is not None and "float" in plain else None

    def refuse_meaning(self, kind: str, arguments: Config, label: str, wrapped: bool) -> None:
        if (learnt := LEARNT.get(kind)) is not None and not arguments.get(learnt):
            raise UnsupportedModelError(
                f"{label} was saved without its {learnt}; load it where it was made and give it the {learnt} in full"
            )
        interpolation = arguments.get("interpolation")
        if interpolation in UNKNOWN_INTERPOLATIONS:
            raise UnsupportedModelError(f"{label} uses {interpolation} interpolation, for which Keras 3 has nothing")
        if kind == "UpSampling2D" and interpolation == "bilinear" and self.old_bilinear:
            doubles = all(size > 0 and size & (size - 1) == 0 for size in _pair(arguments["size"]))
            if wrapped or not doubles or self.theano:
                raise UnsupportedModelError(
                    f"{label} was saved by a Keras beside TensorFlow 1, whose bilinear upsampling takes other points "
                    "than any layer of today; but for factors of 2, 4, 8, ... build the model with another upsampling"
                )
        if kind == "SeparableConv1D" and arguments.get("padding") == "causal" and wrapped:
            raise UnsupportedModelError(
                f"{label} pads causally inside another layer, which Keras 3's does not; build the model with Conv1D"
            )
        if kind == "BatchNormalization" and isinstance(arguments.get("axis"), (list, tuple)):
            if len(arguments["axis"]) != 1:
                raise UnsupportedModelError(
                    f"{label} normalises along the axes {arguments['axis']}; Keras 3 knows one axis, "
                    "build the model without it"
                )
            (arguments["axis"],) = arguments["axis"]
        if self.theano and arguments.get("padding") == "same" and not _pads_alike(arguments):
            raise UnsupportedModelError(
                f"{label} pads as Theano does, with half of its window in front whatever its stride, which no layer of "
                "Keras 3 does; build the model with explicit padding"
            )
        for key in ("activation", "recurrent_activation"):
            alone = kind == "Activation" and not wrapped  # gets a Rescaling in front
            if arguments.get(key) == "hard_sigmoid" and not alone and (kind, key) not in STEEPER:
                raise UnsupportedModelError(
                    f"{label} applies the hard_sigmoid of Keras 2 as its {key}, which Keras 3 has not; "
                    "build the model without it"
                )

    def untrained(self, arguments: Config, name: str) -> Config:
        """Initializers, regularizers and constraints in today's form; unknown ones go with a notice."""
        found: Config = {}
        for key, value in arguments.items():
            space = FREE.get(key.rpartition("_")[2])
            if space is None or value is None:
                found[key] = value
                continue
            kind = value.get("class_name") if isinstance(value, Mapping) else value
            if isinstance(kind, str) and isinstance(vars(space).get(_camel(kind)), type):
                inner = value.get("config") if isinstance(value, Mapping) else {}
                found[key] = serialised(space.__name__.rpartition(".")[2], _camel(kind), _known(space, kind, inner))
            else:
                self.notices.append(f"{name}: {key} {printable(str(kind))} is unknown and left out; it serves training")
        return found


def _counterpart(arguments: Mapping[str, Any]) -> Config | None:
    """The backward layer of a Bidirectional of which the forward one runs backwards; it was always the other way."""
    layer = arguments["layer"]
    if arguments.get("backward_layer") is not None or not layer["config"].get("go_backwards"):
        return None
    turned = {"go_backwards": False, "name": f"backward_{layer['config'].get('name', 'layer')}"}
    return {**layer, "config": {**layer["config"], **turned}}


def serialised(module: str, kind: str, config: Mapping[str, Any]) -> Config:
    """An object of Keras as Keras 3 writes it."""
    return {"module": f"keras.{module}", "class_name": kind, "config": dict(config), "registered_name": None}


def _known(space: Any, kind: str, config: Any) -> Config:
    """The arguments of an initializer and the like that its class takes today."""
    parameters = inspect.signature(vars(space)[_camel(kind)].__init__).parameters
    return {key: value for key, value in (config or {}).items() if key in parameters}


def _camel(name: str) -> str:
    """``glorot_uniform`` -> ``GlorotUniform``; names of classes stay. Keras 2 also said "normal", "zero", ..."""
    short = {"normal": "RandomNormal", "uniform": "RandomUniform", "zero": "Zeros", "one": "Ones", "l1_l2": "L1L2"}
    if name in short:
        return short[name]
    return name if re.match("[A-Z]", name) else "".join(part.capitalize() for part in name.split("_"))


def _pads_alike(arguments: Mapping[str, Any]) -> bool:
    """Whether Theano's "same" is TensorFlow's: windows of odd reach that move by one; its poolings count borders."""
    if "pool_size" in arguments:
        return set(_sizes(arguments["pool_size"])) == {1}
    kernel, dilation = _sizes(arguments.get("kernel_size", 1)), _sizes(arguments.get("dilation_rate", 1))
    odd = all((size - 1) * max(dilation) % 2 == 0 for size in kernel)
    return odd and set(_sizes(arguments.get("strides") or 1)) == {1}


def _sizes(value: Any) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [int(value)]


def _pair(value: Any) -> list[int]:
    """Sizes along two axes, of which one stands for both."""
    return list(value) if isinstance(value, (list, tuple)) else [int(value)] * 2


def _classes(value: Any) -> Iterator[str]:
    """The classes that a description names, at any depth."""
    if isinstance(value, Mapping):
        yield from (value[key] for key in ("class_name",) if isinstance(value.get(key), str))
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _classes(inner)


def _plain_dtype(dtype: Any) -> str | None:
    """The name of a dtype or policy; None where a layer follows its input."""
    if isinstance(dtype, Mapping):
        dtype = (dtype.get("config") or {}).get("name")
    return dtype if isinstance(dtype, str) and dtype not in ("infer", "_infer") else None


def _input_dtype(dtype: Any) -> str:
    """Of a policy, what its variables have."""
    plain_dtype = _plain_dtype(dtype) or "float32"
    return "float32" if plain_dtype.startswith("mixed_") else plain_dtype


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, Sequence) and all(size is None or type(size) is int for size in shape)
