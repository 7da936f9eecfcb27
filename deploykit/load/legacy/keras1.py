"""What changed between Keras 1 and Keras 2, as tables: descriptions and arrays of Keras 1 as Keras 2.2 had them.

`modernise` rewrites the description, `rearranged` the arrays of one layer, `rearranged_file` those of a whole file.
What comes out goes through `config` and `weights` like any model of Keras 2. Rows: ``RENAMED`` classes, ``ARGUMENTS``
with another name, ``CLASS_ARGUMENTS`` where a class disagrees, ``VALUES`` said otherwise, ``LAWS`` of the arrays.

What is no matter of names:

    backend          is not recorded. TensorFlow's variables are called ``dense_1_W:0``, Theano's ``dense_1_W``
                     (`backend_of`). Theano convolves where others correlate: `weights` rotates kernels by 180 degrees
                     along their leading axes, so after they are rearranged here
    dim_ordering     paddings, croppings and upsamplings do not say theirs: they took the one of the installation, so
                     that of the file's other layers. With "th", kernels are stored (filters, channels, rows, columns)
    "same"           Theano pads k//2 in front whatever the stride, TensorFlow as the input's size demands: equal for
                     odd kernels and stride 1, else the layer is a padding by (k//2, (k-1)//2) and a "valid" convolution
    "full"           a padding by k-1 on both sides and a "valid" convolution; k counts the dilation in, here and above
    Deconvolution    was told its output's shape o. With "valid" o = (n-1)·s + k + r, with "same" n = ceil(o/s), so that
                     Keras 2's output_padding follows from o alone
    gates            12 arrays of an LSTM in the order i, c, f, o (9 of a GRU: z, r, h) are 3, in the order i, f, c, o
    running_std      of a BatchNormalization always held the variance
    MaxoutDense      max_j(W_j·x + b_j) is a Dense, a Reshape and a maximum along one axis
    Merge            in front of a Sequential joins models: the whole is a graph, its branches are inlined

A layer that takes several is a nested Sequential of the layer's name. In a graph, calls of a nested model are counted
from 1, as Keras 2 does.

Limits: files of Keras 0.3 and older (layers without ``class_name``) are refused, as is what has no equivalent: see
``REFUSED`` and the messages below.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deploykit.errors import LoadError, UnsupportedModelError
from deploykit.load.contents import printable
from deploykit.load.legacy.config import is_keras_layer

Config = dict[str, Any]
Array = npt.NDArray[Any]
Named = tuple[str, Array]  # an array of a file, under the name it has there

RENAMED = {
    "Convolution1D": "Conv1D",
    "Convolution2D": "Conv2D",
    "Convolution3D": "Conv3D",
    "AtrousConvolution1D": "Conv1D",
    "AtrousConvolution2D": "Conv2D",
    "AtrousConv1D": "Conv1D",
    "AtrousConv2D": "Conv2D",
    "Deconvolution2D": "Conv2DTranspose",
    "Deconv2D": "Conv2DTranspose",
    "SeparableConvolution2D": "SeparableConv2D",
    "TimeDistributedDense": "Dense",  # of three dimensions: Keras 2's Dense maps the last
}

REFUSED = {
    "Highway": "has no equivalent in Keras 3",
    "ParametricSoftplus": "has no equivalent in Keras 3",
    "SReLU": "has no equivalent in Keras 3",
    "Graph": "is a model of Keras 0",
}

MERGES = {  # mode of a Merge -> class of Keras 2
    "sum": "Add",
    "mul": "Multiply",
    "ave": "Average",
    "max": "Maximum",
    "concat": "Concatenate",
    "dot": "Dot",
}

# Arguments under their new names; None: dropped, as training or the first layer's input alone read it.
ARGUMENTS: Mapping[str, str | None] = {
    "input_dtype": None,
    "batch_input_shape": None,  # read by `_Modernisation.input_of`
    "input_dim": None,
    "input_length": None,
    "output_dim": "units",
    "nb_filter": "filters",
    "filter_length": "kernel_size",
    "subsample": "strides",
    "subsample_length": "strides",
    "border_mode": "padding",
    "dim_ordering": "data_format",
    "atrous_rate": "dilation_rate",
    "pool_length": "pool_size",
    "stride": "strides",
    "length": "size",
    "bias": "use_bias",
    "p": "rate",
    "sigma": "stddev",
    "init": "kernel_initializer",
    "inner_init": "recurrent_initializer",
    "forget_bias_init": "unit_forget_bias",
    "inner_activation": "recurrent_activation",
    "dropout_W": "dropout",
    "dropout_U": "recurrent_dropout",
    "consume_less": "implementation",
    "W_regularizer": "kernel_regularizer",
    "U_regularizer": "recurrent_regularizer",
    "b_regularizer": "bias_regularizer",
    "W_constraint": "kernel_constraint",
    "U_constraint": "recurrent_constraint",
    "b_constraint": "bias_constraint",
}

CLASS_ARGUMENTS: Mapping[str, Mapping[str, str | None]] = {
    "Embedding": {
        "input_dim": "input_dim",
        "input_length": "input_length",
        "output_dim": "output_dim",
        "init": "embeddings_initializer",
        "W_regularizer": "embeddings_regularizer",
        "W_constraint": "embeddings_constraint",
        "dropout": None,
    },
    "PReLU": {"init": "alpha_initializer"},
    "BatchNormalization": {"mode": None},  # judged by `_Modernisation.refuse_modes`
    "MaxoutDense": {"nb_feature": None},
    "Deconvolution2D": {"output_shape": None},
    "Deconv2D": {"output_shape": None},
}

SIZES = (("nb_row", "nb_col"), ("kernel_dim1", "kernel_dim2", "kernel_dim3"))  # together kernel_size

ORDERINGS = {"th": "channels_first", "tf": "channels_last"}
IMPLEMENTATIONS = {"cpu": 0, "mem": 1, "gpu": 2}
ONE_ARRAY_PER_GATE = (0, 1)  # the implementations that kept the gates apart

VALUES: Mapping[str, Callable[[Any], Any]] = {
    "data_format": ORDERINGS.__getitem__,
    "implementation": IMPLEMENTATIONS.__getitem__,
    "unit_forget_bias": lambda init: init == "one",
}

# Layers that do not record their dim_ordering.
SILENT = ("ZeroPadding2D", "ZeroPadding3D", "Cropping2D", "Cropping3D", "UpSampling2D", "UpSampling3D")

REGULARIZERS = ("WeightRegularizer", "ActivityRegularizer", "L1L2Regularizer")
CONSTRAINTS: Mapping[str, Mapping[str, str]] = {  # class -> its arguments' names today
    "MaxNorm": {"m": "max_value"},
    "MinMaxNorm": {"low": "min_value", "high": "max_value"},
}

CONTAINERS = ("Model", "Container", "Sequential")
PADDINGS = {"Conv1D": "ZeroPadding1D", "Conv2D": "ZeroPadding2D", "Conv3D": "ZeroPadding3D"}
POOLINGS = tuple(f"{kind}Pooling{rank}D" for kind in ("Max", "Average") for rank in (1, 2, 3))
DAMAGE = (KeyError, TypeError, AttributeError, IndexError, ValueError, ZeroDivisionError)


def backend_of(names: Iterable[str]) -> str | None:
    """The backend that saved a file of Keras 1, by what its weights are called; None for a file without weights."""
    found = list(names)
    numbered = any(re.search(r":\d+$", name) for name in found)
    return ("tensorflow" if numbered else "theano") if found else None


# ------------------------------------------------------------------------------------------------ descriptions


def modernise(config: Mapping[str, Any], *, what: str, backend: str | None = None) -> Config:
    """The description of a model of Keras 1 as Keras 2.2 would have written it; ``backend`` is that of `backend_of`.

    Raises UnsupportedModelError for what has no exact equivalent, LoadError for a description that is no model.
    """
    try:
        return _Modernisation(config, what, backend).model(config, None)
    except DAMAGE as error:
        raise LoadError(
            f"{what} is damaged: its description is not that of a model of Keras 1; copy or save it again"
        ) from error


class _Modernisation:
    def __init__(self, config: Mapping[str, Any], what: str, backend: str | None) -> None:
        self.what = what
        self.theano = backend == "theano"
        parts = list(_walk(config))
        self.names = {part["name"] for part in parts if isinstance(part.get("name"), str)}
        self.orderings = {part["dim_ordering"] for part in parts if part.get("dim_ordering") in ORDERINGS}

    def refused(self, name: Any, kind: str, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.what}: layer {printable(str(name))} ({printable(kind)}) {why}; build the model without it"
        )

    def fresh(self, stem: str) -> str:
        """A name that nothing in the file has: Keras 1 does not record that of a Sequential."""
        number = next(n for n in range(1, len(self.names) + 2) if f"{stem}_{n}" not in self.names)
        self.names.add(f"{stem}_{number}")
        return f"{stem}_{number}"

    # -------------------------------------------------------------------------------------------- models

    def model(self, entry: Mapping[str, Any], name: str | None) -> Config:
        self.refuse_old(entry)
        kind, config = entry["class_name"], entry["config"]
        if kind == "Sequential":
            return self.sequential(config, name or self.fresh("sequential"), nested=name is not None)
        if kind not in CONTAINERS:
            raise UnsupportedModelError(
                f"{self.what} holds a {printable(kind)}, a model with code of its own, of which the file has no graph; "
                "build it as a functional model and load the weights there"
            )
        layers = [self.placed(layer, _called(layer["inbound_nodes"])) for layer in config["layers"]]
        ends = {key: config[key] for key in ("input_layers", "output_layers")}
        return _entry("Model", {"name": name or config["name"], "layers": layers, **ends})

    def refuse_old(self, entry: Mapping[str, Any]) -> None:
        if ("class_name" not in entry and "name" in entry) or isinstance(entry.get("layers"), list):
            raise UnsupportedModelError(
                f"{self.what} was saved by Keras 0.3 or older, which is not supported; load it with Keras 1 and save "
                "it again there"
            )

    def sequential(self, layers: Sequence[Any], name: str, *, nested: bool) -> Config:
        for layer in layers:
            self.refuse_old(layer)
        if layers[0]["class_name"] == "Merge":
            if nested:
                raise self.refused(name, "Sequential", "begins with a Merge and is part of another model")
            return _Branches(self).model(layers, name)
        first = [self.input_of(layers[0])] if layers[0]["class_name"] != "InputLayer" else []
        return _entry("Sequential", {"name": name, "layers": first + [self.layer(layer) for layer in layers]})

    def input_of(self, first: Mapping[str, Any]) -> Config:
        """The InputLayer that Keras 1 put in front of a Sequential's first layer."""
        config = first["config"]
        while first["class_name"] in CONTAINERS:  # that of the first layer of the first model
            layers = config if isinstance(config, list) else config["layers"]
            first, config = layers[0], layers[0]["config"]
        shape = config.get("batch_input_shape")
        if shape is None:
            raise LoadError(f"{self.what} is damaged: its first layer {printable(str(config['name']))} has no shape")
        if first["class_name"] == "Embedding" and config.get("input_length") is not None and len(shape) == 2:
            shape = [shape[0], config["input_length"]]
        name = config["name"] if first["class_name"] == "InputLayer" else f"{config['name']}_input"
        dtype = config.get("input_dtype") or "float32"
        return _entry("InputLayer", {"name": name, "batch_input_shape": shape, "dtype": dtype, "sparse": False})

    def placed(self, entry: Mapping[str, Any], inbound: Any) -> Config:
        """A layer as an entry of a graph."""
        name = entry.get("name") or entry["config"]["name"]
        return {**self.layer(entry, name), "name": name, "inbound_nodes": inbound}

    # -------------------------------------------------------------------------------------------- layers

    def layer(self, entry: Mapping[str, Any], name: str | None = None) -> Config:
        """A layer or a nested model; several layers where Keras 2 needs them."""
        self.refuse_old(entry)
        kind, config = entry["class_name"], entry["config"]
        if kind in CONTAINERS:
            own = config.get("name") if isinstance(config, Mapping) else None
            return self.model(entry, name or own or self.fresh("sequential"))
        name = name or config["name"]
        if kind in REFUSED:
            raise self.refused(name, kind, REFUSED[kind])
        if kind == "InputLayer":
            given = {"batch_input_shape": config["batch_input_shape"], "dtype": config.get("input_dtype") or "float32"}
            return _entry(kind, {"name": name, "sparse": bool(config.get("sparse")), **given})
        if kind == "Merge":
            return self.merge(name, config)
        self.refuse_modes(name, kind, config)
        modern = RENAMED.get(kind, kind)
        if not (is_keras_layer(modern) or kind == "MaxoutDense"):  # a class of the user's
            return _entry(kind, config)
        arguments = self.arguments(kind, config)
        if kind in SILENT:
            arguments["data_format"] = self.ordering(name, kind)
        if kind == "Lambda":
            return _entry(kind, arguments)
        if kind.startswith("ZeroPadding"):
            arguments["padding"] = _padding(kind, arguments["padding"])
        if modern == "Conv2DTranspose":
            arguments |= self.transposed(name, kind, arguments, config.get("output_shape"))
        if kind == "MaxoutDense":
            return self.maxout(name, arguments, config["nb_feature"])
        if modern in PADDINGS:
            return self.convolution(modern, name, arguments)
        return _entry(modern, arguments)

    def arguments(self, kind: str, config: Mapping[str, Any]) -> Config:
        own = CLASS_ARGUMENTS.get(kind, {})
        found: Config = {}
        for names in SIZES:
            if names[0] in config:
                found["kernel_size"] = [config[size] for size in names]
        for key, value in config.items():
            new = own[key] if key in own else ARGUMENTS.get(key, key)
            if new is None or any(key in names for names in SIZES):
                continue
            if new.endswith("regularizer"):
                value = _regularizer(value)
            elif new.endswith("constraint"):
                value = _constraint(value)
            elif new == "layer":
                value = self.layer(value)
            found[new] = VALUES[new](value) if new in VALUES else value
        return found

    def refuse_modes(self, name: str, kind: str, config: Mapping[str, Any]) -> None:
        """What a mode or the backend makes of a layer, where no Keras 2 layer does the same."""
        if kind == "BatchNormalization" and config.get("mode", 0) != 0:
            why = {
                1: "normalises each sample (mode=1), with its epsilon twice",
                2: "normalises by the statistics of each batch at inference too (mode=2)",
            }
            raise self.refused(name, kind, why.get(config["mode"], "has an unknown mode") + ", as Keras 3 cannot")
        same, full = config.get("border_mode") == "same", config.get("border_mode") == "full"
        if full and RENAMED.get(kind, kind) not in PADDINGS:
            raise self.refused(name, kind, "has border_mode='full', which Keras 3 has not")
        if not self.theano:
            return
        if kind in POOLINGS and same:
            sizes = _sizes(config.get("pool_size", config.get("pool_length")))
            strides = _sizes(config.get("strides", config.get("stride"))) or sizes
            if any((size, stride) != (3, 1) and size != 1 for size, stride in zip(sizes, strides, strict=True)):
                raise self.refused(name, kind, "pools with border_mode='same' as only Theano does")
        if kind == "ConvLSTM2D" and (config["nb_row"] % 2 == 0 or config["nb_col"] % 2 == 0):
            raise self.refused(name, kind, "has a kernel of even size, which Theano pads as no other")

    def ordering(self, name: str, kind: str) -> str:
        if len(self.orderings) != 1:
            raise self.refused(name, kind, "does not say its dim_ordering, and the file's other layers leave it open")
        return ORDERINGS[next(iter(self.orderings))]

    def merge(self, name: str, config: Mapping[str, Any]) -> Config:
        mode = config["mode"]
        if config.get("mode_type", "raw") != "raw" or mode not in MERGES:
            said = f"mode {printable(str(mode))!r}" if config.get("mode_type", "raw") == "raw" else "code of its own"
            raise self.refused(name, "Merge", f"merges with {said}, which has no equivalent in Keras 3")
        more = {"concat": {"axis": config.get("concat_axis", -1)}, "dot": {"axes": config.get("dot_axes", -1)}}
        return _entry(MERGES[mode], {"name": name, "trainable": True, **more.get(mode, {})})

    def convolution(self, kind: str, name: str, arguments: Config) -> Config:
        """A convolution, behind a padding where its own is not Keras 2's."""
        sizes, dilations = _sizes(arguments["kernel_size"]), _sizes(arguments.get("dilation_rate", 1))
        dilations *= len(sizes) // len(dilations)
        sizes = [(size - 1) * dilation + 1 for size, dilation in zip(sizes, dilations, strict=True)]
        usual = all(size % 2 for size in sizes) and all(stride == 1 for stride in _sizes(arguments.get("strides", 1)))
        if arguments["padding"] == "full":
            margins = [[size - 1, size - 1] for size in sizes]
        elif arguments["padding"] == "same" and self.theano and not usual:
            margins = [[size // 2, (size - 1) // 2] for size in sizes]
        else:
            return _entry(kind, arguments)
        padding: Config = {"name": f"{name}.padding", "padding": margins if kind != "Conv1D" else margins[0]}
        if "data_format" in arguments:
            padding["data_format"] = arguments["data_format"]
        layers = [_entry(PADDINGS[kind], padding), _entry(kind, {**arguments, "padding": "valid"})]
        return _entry("Sequential", {"name": name, "layers": layers})

    def transposed(self, name: str, kind: str, arguments: Config, shape: Any) -> Config:
        """The output_padding that makes an output of the recorded shape."""
        sizes, strides = _sizes(arguments["kernel_size"]), _sizes(arguments["strides"])
        valid = arguments["padding"] == "valid"
        if self.theano and not valid and any(s > 1 or k % 2 == 0 for k, s in zip(sizes, strides, strict=True)):
            raise self.refused(name, kind, "pads with border_mode='same' as only Theano does")
        wanted = shape[2:4] if arguments["data_format"] == "channels_first" else shape[1:3]
        if any(type(size) is not int for size in wanted):
            raise self.refused(name, kind, "was made for an output without a fixed size, as Keras 3 cannot")
        paddings, usual = [], True
        for o, k, s in zip(wanted, sizes, strides, strict=True):
            n = (o - k) // s + 1 if valid else -(-o // s)
            paddings.append(o - (n - 1) * s - (k if valid else k % 2))
            usual &= o == ((n - 1) * s + max(k, s) if valid else n * s)
        return {} if usual else {"output_padding": paddings}

    def maxout(self, name: str, arguments: Config, features: int) -> Config:
        units = arguments["units"]
        layers = [
            _entry("Dense", {**arguments, "units": features * units}),
            _entry("Reshape", {"name": f"{name}.features", "target_shape": [features, units]}),
            _entry("GlobalMaxPooling1D", {"name": f"{name}.max"}),
        ]
        return _entry("Sequential", {"name": name, "layers": layers})


class _Branches:
    """A Sequential that begins with a Merge of models, as one graph: its file lists the layers inside the branches."""

    def __init__(self, job: _Modernisation) -> None:
        self.job = job
        self.layers: dict[str, Config] = {}

    def model(self, layers: Sequence[Any], name: str) -> Config:
        output = self.chain(layers)
        ends = {"input_layers": self.sources(output), "output_layers": [output]}
        return _entry("Model", {"name": name, "layers": list(self.layers.values()), **ends})

    def chain(self, layers: Sequence[Any]) -> list[Any]:
        first = layers[0]
        self.job.refuse_old(first)
        if first["class_name"] == "Merge":
            tensor = self.add(first, [self.branch(branch) for branch in first["config"]["layers"]])
        elif first["class_name"] != "InputLayer":
            tensor = self.add(first, [self.add(self.job.input_of(first), [])])
        else:
            tensor = self.add(first, [])
        for layer in layers[1:]:
            tensor = self.add(layer, [tensor])
        return tensor

    def branch(self, entry: Mapping[str, Any]) -> list[Any]:
        """The tensor that a branch makes."""
        kind, config = entry["class_name"], entry["config"]
        if kind == "Sequential":
            return self.chain(config)
        if kind not in CONTAINERS:
            return self.chain([entry])
        for layer in config["layers"]:
            if layer["name"] not in self.layers:
                self.layers[layer["name"]] = self.job.placed(layer, _called(layer["inbound_nodes"]))
        return list(config["output_layers"][0])

    def add(self, entry: Mapping[str, Any], inputs: list[list[Any]]) -> list[Any]:
        """The output of a layer on some tensors; a layer that is there already is called again."""
        kind, config = entry["class_name"], entry["config"]
        if kind == "Sequential":
            raise UnsupportedModelError(
                f"{self.job.what} merges models with a Sequential inside, whose weights it keeps under a name that it "
                "does not give; build it as a functional model and load the weights there"
            )
        name, node = config["name"], [[*tensor, {}] for tensor in inputs]
        if name not in self.layers:
            made = entry if kind == "InputLayer" else self.job.layer(entry, name)
            self.layers[name] = {**made, "name": name, "inbound_nodes": []}
        nodes = self.layers[name]["inbound_nodes"]
        if node and node not in nodes:
            nodes.append(node)
        return [name, (nodes.index(node) if node else 0) + int(kind in CONTAINERS), 0]

    def sources(self, tensor: list[Any]) -> list[list[Any]]:
        """The inputs on which a tensor depends, in the order of a search into the depth: the order of the arguments."""
        waiting, seen, found = [tensor], set(), []
        while waiting:
            name, call, _ = waiting.pop()[:3]
            nodes = self.layers[name]["inbound_nodes"]
            counted = call - int(self.layers[name]["class_name"] == "Model")
            if (name, counted) in seen:
                continue
            seen.add((name, counted))
            if nodes:
                waiting += reversed(nodes[counted])
            else:
                found.append([name, 0, 0])
        return found


def _entry(kind: str, config: Mapping[str, Any]) -> Config:
    return {"class_name": kind, "config": dict(config)}


def _walk(value: Any) -> Iterator[Mapping[str, Any]]:
    """All objects of a description; it is known not to be deep."""
    if isinstance(value, Mapping):
        yield value
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _walk(inner)


def _called(nodes: Sequence[Any]) -> list[Any]:
    """Calls with Keras 2's fourth item: further arguments, of which Keras 1 had none."""
    return [[[*reference, {}] for reference in node] for node in nodes]


def _sizes(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value or ())


def _padding(kind: str, padding: Any) -> Any:
    """Keras 1 also took one number, four in a row, or a dict of sides."""
    sides = ("left_pad", "right_pad") if kind == "ZeroPadding1D" else ("top_pad", "bottom_pad", "left_pad", "right_pad")
    if isinstance(padding, Mapping):
        padding = [padding.get(side, 0) for side in sides]
    if kind == "ZeroPadding1D":
        return [padding] * 2 if isinstance(padding, int) else list(padding)
    padding = list(padding)
    if kind == "ZeroPadding2D" and len(padding) == 4:
        return [padding[:2], padding[2:]]
    return [[margin, margin] for margin in padding]


def _regularizer(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if value["name"] in REGULARIZERS:
        return _entry("L1L2", {key: value[key] for key in ("l1", "l2")})
    return _entry(value["name"], {})


def _constraint(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    new = CONSTRAINTS.get(value["name"], {})
    return _entry(value["name"], {new.get(key, key): item for key, item in value.items() if key != "name"})


# ------------------------------------------------------------------------------------------------------ arrays


@dataclass(frozen=True)
class Law:
    """The arrays of one class: what Keras 1 called them, in its order, and how they become Keras 2's.

    ``trained`` are the names by the layer's config, ``frozen`` those of further arrays, which stay as they are.
    """

    trained: Callable[[Mapping[str, Any]], tuple[str, ...]]
    change: Callable[[list[Array], Mapping[str, Any]], list[Array]]
    frozen: tuple[str, ...] = ()


def _kernel(kernel: Array, config: Mapping[str, Any]) -> Array:
    """(filters, channels, sizes...) -> (sizes..., channels, filters)"""
    if config.get("data_format") != "channels_first":
        return kernel
    return np.transpose(kernel, (*range(2, kernel.ndim), 1, 0))


def _convolution(arrays: list[Array], config: Mapping[str, Any]) -> list[Array]:
    return [_kernel(arrays[0], config), *arrays[1:]]


def _convolution_1d(arrays: list[Array], config: Mapping[str, Any]) -> list[Array]:
    """(length, 1, channels, filters), before Keras 1.1 (filters, channels, length, 1) -> (length, channels, filters)"""
    kernel, size, filters = arrays[0], _sizes(config["kernel_size"])[0], config["filters"]
    if kernel.shape[:2] != (size, 1) or kernel.shape[3] != filters:
        kernel = np.transpose(kernel, (2, 3, 1, 0))
    return [kernel[:, 0], *arrays[1:]]


def _transposed(arrays: list[Array], config: Mapping[str, Any]) -> list[Array]:
    return [np.swapaxes(_kernel(arrays[0], config), -1, -2), *arrays[1:]]


def _separable(arrays: list[Array], config: Mapping[str, Any]) -> list[Array]:
    """(multiplier, channels, rows, columns) -> (rows, columns, channels, multiplier), and the pointwise one alike"""
    return [*(_kernel(array, config) for array in arrays[:2]), *arrays[2:]]


def _gathered(order: str) -> Callable[[list[Array], Mapping[str, Any]], list[Array]]:
    """W, U, b of each gate -> kernel, recurrent kernel, bias; ``order``: Keras 2's gates as places in Keras 1's."""
    places = [int(place) for place in order]

    def gather(arrays: list[Array], config: Mapping[str, Any]) -> list[Array]:
        if len(arrays) == 3:
            return arrays
        arrays = [_kernel(array, config) if array.ndim == 4 else array for array in arrays]
        return [np.concatenate([arrays[3 * place + part] for place in places], axis=-1) for part in range(3)]

    return gather


def _as_they_are(arrays: list[Array], config: Mapping[str, Any]) -> list[Array]:
    return arrays


def _dense(arrays: list[Array], config: Mapping[str, Any]) -> list[Array]:
    """A MaxoutDense has (features, inputs, units) and (features, units)."""
    if arrays[0].ndim != 3:
        return arrays
    kernel = np.transpose(arrays[0], (1, 0, 2))
    return [kernel.reshape(len(kernel), -1), *(bias.reshape(-1) for bias in arrays[1:])]


def _named(*names: str) -> Callable[[Mapping[str, Any]], tuple[str, ...]]:
    """Names of arrays; ``b`` is there with use_bias."""
    return lambda config: tuple(name for name in names if name != "b" or config.get("use_bias", True))


def _gates(gates: str) -> Callable[[Mapping[str, Any]], tuple[str, ...]]:
    apart = tuple(f"{part}_{gate}" for gate in gates for part in "WUb")
    together = ("W", "U", "b")
    return lambda config: apart if config.get("implementation", 0) in ONE_ARRAY_PER_GATE else together


LAWS: Mapping[str, Law] = {
    "Dense": Law(_named("W", "b"), _dense),
    "Embedding": Law(_named("W"), _as_they_are),
    "Conv1D": Law(_named("W", "b"), _convolution_1d),
    "Conv2D": Law(_named("W", "b"), _convolution),
    "Conv3D": Law(_named("W", "b"), _convolution),
    "Conv2DTranspose": Law(_named("W", "b"), _transposed),
    "SeparableConv2D": Law(_named("depthwise_kernel", "pointwise_kernel", "b"), _separable),
    "SimpleRNN": Law(_named("W", "U", "b"), _as_they_are),
    "GRU": Law(_gates("zrh"), _gathered("012")),
    "LSTM": Law(_gates("icfo"), _gathered("0213")),
    "ConvLSTM2D": Law(_gates("icfo"), _gathered("0213")),
    "BatchNormalization": Law(_named("gamma", "beta"), _as_they_are, ("running_mean", "running_std")),
    "PReLU": Law(_named("alphas"), _as_they_are),
}


@dataclass
class _Leaf:
    """A layer with arrays, maybe inside another.

    ``thawed``: Keras 1 lists it with those that are trained. ``trainable``: Keras 3 does, which does not ask wrappers.
    """

    law: Law
    config: Mapping[str, Any]
    thawed: bool
    trainable: bool


def rearranged(
    class_name: str, arrays: Sequence[Array], names: Sequence[str], config: Mapping[str, Any], *, what: str = "the file"
) -> list[Array]:
    """The arrays of one layer or nested model in the layout and the order of Keras 2.

    ``class_name`` and ``config`` are Keras 2's (after `modernise`), ``names`` what the file calls the arrays. All
    arrays that are trained come first, then the others, those of nested layers too. Raises LoadError where number or
    names are not those of the layer; shapes are the business of `weights`.
    """
    if class_name not in (*LAWS, *CONTAINERS, "TimeDistributed", "Bidirectional"):
        return list(arrays)  # a class of the user's, or one without arrays
    label = f"{what}: the weights of layer {printable(str(config.get('name')))} do not fit"
    whole = {**config, "trainable": True} if class_name == "TimeDistributed" else config  # frozen as a whole: no matter
    leaves = list(_leaves(class_name, whole))
    slots = _slots(leaves)
    expected = [name for _, name in slots]
    if len(expected) != len(arrays):
        raise LoadError(f"{label} ({len(arrays)} arrays for {len(expected)}); is it intact?")
    for name, kind in zip(names, expected, strict=True):
        if not _is_called(name, kind):
            raise LoadError(f"{label} ({printable(name)} stands where its {kind} is expected); is it intact?")
    given: list[list[Array]] = [[] for _ in leaves]
    for (number, _), array in zip(slots, arrays, strict=True):
        given[number].append(np.asarray(array))
    thawed = class_name in CONTAINERS or config.get("trainable", True)
    trained: list[Array] = []
    frozen: list[Array] = []
    for leaf, mine in zip(leaves, given, strict=True):
        count = len(leaf.law.trained(leaf.config))
        try:
            changed = leaf.law.change(mine[:count], leaf.config) if count else []
        except DAMAGE as error:
            raise LoadError(f"{label} (their shapes are not those of the layer); is it intact?") from error
        (trained if thawed and leaf.trainable else frozen).extend(changed)
        frozen.extend(mine[count:])
    return trained + frozen


def _leaves(class_name: str, config: Mapping[str, Any], thawed: bool = True) -> Iterator[_Leaf]:
    """The layers with arrays, in the order of the description; ``thawed``: no wrapper around them is frozen."""
    own = bool(config.get("trainable", True))
    if class_name in CONTAINERS:  # which do not record whether they are trained
        for entry in config["layers"]:
            yield from _leaves(entry["class_name"], entry["config"], thawed)
    elif class_name == "TimeDistributed":
        yield from _leaves(config["layer"]["class_name"], config["layer"]["config"], thawed and own)
    elif class_name == "Bidirectional":  # whose own flag Keras 1 did not ask
        yield from [*_leaves(config["layer"]["class_name"], config["layer"]["config"])] * 2
    elif class_name in LAWS:
        yield _Leaf(LAWS[class_name], config, thawed and own, own)


def _slots(leaves: Sequence[_Leaf]) -> list[tuple[int, str]]:
    """(leaf, name) of every array in the order of a file of Keras 1."""
    first: list[tuple[int, str]] = []
    then: list[tuple[int, str]] = []
    for number, leaf in enumerate(leaves):
        (first if leaf.thawed else then).extend((number, name) for name in leaf.law.trained(leaf.config))
        then.extend((number, name) for name in leaf.law.frozen)
    return first + then


def _is_called(name: str, kind: str) -> bool:
    """``lstm_1_W_i``, with TensorFlow ``lstm_1_W_i_2:0``; what had no name is ``param_3``."""
    bare = re.sub(r"(_\d+)?:\d+$", "", name)
    return bare.endswith((f"_{kind}", f"/{kind}")) or bare == kind or re.fullmatch(r"param_\d+", bare) is not None


def rearranged_file(
    config: Mapping[str, Any], stored: Mapping[str, Sequence[Named]], *, what: str
) -> dict[str, list[Array]]:
    """The arrays of a file, by layer group, in Keras 2's layout; ``config`` is the modernised description.

    Groups belong to the layers of the outermost model by name, or in turn where the names are not the same: Keras 1
    does not record the name of a Sequential.
    """
    entries = {entry["config"]["name"]: entry for entry in config["config"]["layers"]}
    with_arrays = [e for e in entries.values() if any(_leaves(e["class_name"], e["config"]))]
    filled = {group: arrays for group, arrays in stored.items() if arrays}
    if not set(filled) <= set(entries):
        if len(with_arrays) != len(filled):
            raise LoadError(
                f"{what} has weights for {len(filled)} layers, its model has {len(with_arrays)}; is it intact?"
            )
        entries = dict(zip(filled, with_arrays, strict=True))
    return {
        group: rearranged(
            entries[group]["class_name"],
            [array for _, array in arrays],
            [name for name, _ in arrays],
            entries[group]["config"],
            what=what,
        )
        for group, arrays in filled.items()
    }
