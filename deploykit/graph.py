"""The only file that knows Keras' graph: `trace` reads it, `replay` builds it again, `canonical` flattens it.

A `Trace` is a flat list of calls (`Node`) between numbered tensors, in an order in which they can be
run. Sequential and nested models are inlined: a nested model that is called contributes its own
calls, once per call, so an inner layer of a model that is called twice shows up as a layer with two
calls. Layers themselves are not copied and not touched; a trace is a description.

`replay` walks a trace and builds a new functional model: every layer is cloned from its config
(possibly changed), called on the new tensors and given its weights (possibly changed). A dropped
node's call returns its input; where its output is an output of the model, an Identity of its name
stands in, so that output names survive.

How Keras keeps a graph (`_keras_history`, `_inbound_nodes`, `Node.arguments`) is known to this file alone (and, to
name the operations that they make, to `load.legacy`); it has been the same since Keras 3.0. What cannot be
inlined exactly (a nested model that is called with a mask, or that converts what it is given) stays one opaque call,
and so do its other calls.

Limits: a subclassed model is traced by calling it symbolically; where its `call` does not allow that
it is refused by name.
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import tree
from keras.src.models.functional import Functional  # the class of functional models has no public name

from deploykit.errors import UnsupportedModelError
from deploykit.signature import Signature, TensorSpec

L = keras.layers
Config = dict[str, Any]
Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Ref:
    """A place in the arguments of a call where tensor number ``index`` goes."""

    index: int


@dataclass(frozen=True)
class Tensor:
    index: int
    shape: Shape
    dtype: str
    producer: int | None  # the node that makes it; None for an input of the model
    masked: bool = False  # a Keras mask travels with it


@dataclass(frozen=True, eq=False)
class Node:
    """One call of one layer (or plain Keras operation)."""

    index: int
    layer: Any  # keras.Operation; belongs to the traced model, never modified
    name: str  # unique in the trace; the layer's own name unless two inlined layers collide
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    training: bool | None = None  # the mode that this call, or one of a model around it, asks for; None: neither

    def __repr__(self) -> str:
        return f"{self.name}({type(self.layer).__name__}) {self.inputs} -> {self.outputs}"


@dataclass(frozen=True, eq=False)
class Trace:
    """A model as a flat list of calls.

    ``inputs`` and ``outputs`` are tensor numbers in the model's own (flattened) order, the structures
    are the model's own nests of `Ref`. ``renamed`` maps the path of an inlined layer whose name was
    taken to the name it has here.
    """

    name: str
    nodes: tuple[Node, ...]
    tensors: tuple[Tensor, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    input_structure: Any
    output_structure: Any
    signature: Signature
    input_layers: tuple[Any, ...] = ()
    output_names: tuple[str, ...] = ()  # what Keras calls each output: the outermost layer that makes it
    trainable: bool = True
    renamed: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _consumers(self) -> dict[int, tuple[Node, ...]]:
        found: dict[int, list[Node]] = {}
        for node in self.nodes:
            for tensor in dict.fromkeys(node.inputs):
                found.setdefault(tensor, []).append(node)
        return {tensor: tuple(nodes) for tensor, nodes in found.items()}

    @cached_property
    def _calls(self) -> dict[int, int]:
        counts: dict[int, int] = {}
        for node in self.nodes:
            counts[id(node.layer)] = counts.get(id(node.layer), 0) + 1
        return counts

    def consumers(self, tensor: int) -> tuple[Node, ...]:
        """The calls that read a tensor, each once, in order."""
        return self._consumers.get(tensor, ())

    def producer(self, tensor: int) -> Node | None:
        """The call that makes a tensor; None for an input of the model."""
        index = self.tensors[tensor].producer
        return None if index is None else self.nodes[index]

    def is_output(self, tensor: int) -> bool:
        return tensor in self.outputs

    def calls(self, node: Node) -> int:
        """How often the node's layer is called in the whole trace."""
        return self._calls[id(node.layer)]


def key(layer: Any) -> type | str:
    """What tables of rules are keyed by: a layer's class, or the name of a plain Keras operation ("Add": x + y)."""
    kind = type(layer)
    return kind.__name__ if kind.__module__.startswith("keras.src.ops.") else kind


def inner_layers(layer: Any) -> tuple[Any, ...]:
    """The layers inside a layer, at any depth."""
    return tuple(layer._flatten_layers(include_self=False)) if isinstance(layer, L.Layer) else ()


# ---------------------------------------------------------------------------------------------- reading


def _calls(model: Any) -> Iterator[tuple[Any, Any, tuple[Any, ...], dict[str, Any], list[Any]]]:
    """(operation, Keras node, args, kwargs, output tensors) of a functional model, in running order.

    The order is that of a walk from the outputs, arguments first. It depends on the graph alone, not on the order in
    which layers were called, so that a model that is rebuilt is read the same way as the first.
    """
    done: set[int] = set()
    waiting = [(_made_by(symbol), False) for symbol in reversed(model.outputs)]
    while waiting:
        node, ready = waiting.pop()
        if id(node) in done or node.is_input:
            continue
        if ready:
            done.add(id(node))
            yield node.operation, node, node.arguments.args, node.arguments.kwargs, node.outputs
        else:
            waiting.append((node, True))
            waiting += [(_made_by(symbol), False) for symbol in reversed(node.input_tensors)]


def _made_by(symbol: Any) -> Any:
    """The Keras node that makes a symbolic tensor."""
    history = symbol._keras_history
    return history.operation._inbound_nodes[history.node_index]


def _functional(model: Any) -> Any | None:
    """The functional form of a model whose graph Keras already holds, or None."""
    if isinstance(model, keras.Sequential):
        return model._functional if type(model).call is keras.Sequential.call else None
    if isinstance(model, Functional):
        return model if type(model).call is Functional.call else None
    return None


def _symbolic(model: Any) -> Any:
    """A subclassed model as a functional one, by calling it on symbolic inputs."""
    known = f"{type(model).__name__} '{model.name}'"
    build = model.get_build_config() or {}
    shape = getattr(model, "input_shape", None) if isinstance(model, Functional) else build.get("input_shape")
    if not isinstance(shape, (tuple, list)) or not all(size is None or isinstance(size, int) for size in shape):
        raise UnsupportedModelError(
            f"cannot read the graph of the subclassed model {known}: it records no single input shape; "
            "build it as a functional model"
        )
    inputs = keras.Input(batch_shape=(None, *shape[1:]), name="input")
    try:
        outputs = model.call(inputs)
        return keras.Model(inputs, outputs, name=model.name)
    except Exception as error:
        raise UnsupportedModelError(
            f"cannot read the graph of the subclassed model {known}: its call() does not work on symbolic tensors "
            f"({type(error).__name__}); build it as a functional model"
        ) from error


def functional_form(model: Any) -> Any:
    """The model as a functional one over the same layers; raises UnsupportedModelError where there is none."""
    if isinstance(model, keras.Sequential) and model._functional is None:
        raise UnsupportedModelError(
            f"Sequential model '{model.name}' has no input shape; add keras.Input(shape=...) and save it again"
        )
    return _functional(model) or _symbolic(model)


class _Reader:
    """Collects the calls of a model and of the models inside it.

    ``whole``: ids of nested models that stay one call; those that reading shows cannot be inlined are added.
    """

    def __init__(self, whole: Collection[int]) -> None:
        self.whole = set(whole)
        self.nodes: list[Node] = []
        self.tensors: list[Tensor] = []
        self.names: dict[int, str] = {}
        self.taken: set[str] = set()
        self.renamed: dict[str, str] = {}
        self.kept_alive: list[Any] = []

    def tensor(self, symbol: Any, producer: int | None, masked: bool = False) -> int:
        masked = masked or getattr(symbol, "_keras_mask", None) is not None
        self.tensors.append(Tensor(len(self.tensors), tuple(symbol.shape), symbol.dtype, producer, masked))
        return len(self.tensors) - 1

    def name(self, layer: Any, path: str) -> str:
        if id(layer) not in self.names:
            name, taken = layer.name, self.taken
            if name in taken:  # Keras forbids "/" in the name of a layer
                stem = ".".join((path + layer.name).split("/"))
                name = next(n for i in range(len(taken) + 2) if (n := stem + (f"_{i}" if i else "")) not in taken)
                self.renamed[path + layer.name] = name
            self.names[id(layer)] = name
            taken.add(name)
        return self.names[id(layer)]

    def read(self, model: Any, numbers: dict[int, int], training: bool | None, path: str) -> list[int]:
        """Append the calls of a functional model; ``numbers`` maps id(symbol) of its inputs to tensors."""
        self.kept_alive.append(model)
        for layer, keras_node, args, kwargs, outputs in _calls(model):
            if any(id(symbol) not in numbers for symbol in keras_node.input_tensors):
                continue  # belongs to another model that shares layers with this one
            asked = kwargs.get("training")
            mode = training if training is not None or asked is None else bool(asked)  # as Keras: the outer call wins
            inner = _functional(layer)
            if inner is not None and not self.inlines(inner, args, kwargs, numbers):
                self.whole.add(id(layer))
            if inner is not None and id(layer) not in self.whole:
                given = {id(x): numbers[id(y)] for x, y in zip(inner.inputs, tree.flatten(args[0]), strict=True)}
                results = self.read(inner, given, mode, f"{path}{layer.name}/")
            else:
                results = self.call(layer, args, kwargs, outputs, numbers, mode, path)
            numbers.update((id(symbol), result) for symbol, result in zip(outputs, results, strict=True))
        return [numbers[id(symbol)] for symbol in model.outputs]

    def inlines(self, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any], numbers: dict[int, int]) -> bool:
        """Whether calling ``inner`` does nothing but run its calls: no mask given, nothing converted."""
        if len(args) != 1 or any(value is not None for key, value in kwargs.items() if key != "training"):
            return False
        given = tree.flatten(args[0])
        if len(given) != len(inner.inputs) or isinstance(args[0], dict) != isinstance(inner.input, dict):
            return False
        tensors = [self.tensors[numbers[id(symbol)]] for symbol in given]
        pairs = zip(tensors, inner.inputs, strict=True)
        return all(len(tensor.shape) == len(x.shape) and tensor.dtype == x.dtype for tensor, x in pairs)

    def call(
        self,
        layer: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        symbols: list[Any],
        numbers: dict[int, int],
        training: bool | None,
        path: str,
    ) -> list[int]:
        def place(value: Any) -> Any:
            return Ref(numbers[id(value)]) if isinstance(value, keras.KerasTensor) else value

        index = len(self.nodes)
        args, kwargs = tree.map_structure(place, args), tree.map_structure(place, kwargs)
        inputs = tuple(value.index for value in tree.flatten((args, kwargs)) if isinstance(value, Ref))
        # a model that is called as a whole says that it hands no mask on, but those of its layers leak out
        hands_on = getattr(layer, "supports_masking", False) or _functional(layer) is not None
        masked = hands_on and any(self.tensors[i].masked for i in inputs)
        results = [self.tensor(symbol, index, masked) for symbol in symbols]
        name = self.name(layer, path)
        self.nodes.append(Node(index, layer, name, args, kwargs, inputs, tuple(results), training))
        return results


def _ordered(
    nodes: Sequence[Node], tensors: Sequence[Tensor], outputs: Sequence[int]
) -> tuple[tuple[Node, ...], tuple[Tensor, ...]]:
    """The calls that some output needs, numbered anew in the order of a walk from the outputs, arguments first.

    Of a nested model not every output may be used. The order of the walk is that of the flat graph, so that a model
    and its copy without nested models are read the same way.
    """
    order: dict[int, int] = {}
    entered: set[int] = set()
    waiting = [tensors[index].producer for index in reversed(outputs)]
    while waiting:
        maker = waiting.pop()
        if maker is None or maker in order:
            continue
        if maker in entered:
            order[maker] = len(order)
        else:
            entered.add(maker)
            waiting += [maker, *(tensors[index].producer for index in reversed(nodes[maker].inputs))]
    ordered = tuple(replace(nodes[old], index=new) for old, new in order.items())
    made = (None if tensor.producer is None else order.get(tensor.producer) for tensor in tensors)
    return ordered, tuple(replace(tensor, producer=maker) for tensor, maker in zip(tensors, made, strict=True))


def cut(found: Trace, tensor: int) -> Trace:
    """The part of a model that makes one tensor, which is then its only output; inputs that it does not need go."""
    nodes, tensors = _ordered(found.nodes, found.tensors, [tensor])
    needed = {index for node in nodes for index in node.inputs} | {tensor}
    kept = [number for number, index in enumerate(found.inputs) if index in needed]
    structure = found.input_structure
    if len(kept) < len(found.inputs):
        structure = Ref(0) if len(kept) == 1 else [Ref(number) for number in range(len(kept))]
    layers = tuple(found.input_layers[number] for number in kept)
    maker = tensors[tensor].producer
    name = layers[0].name if maker is None else nodes[maker].name
    part = replace(
        found,
        nodes=nodes,
        tensors=tensors,
        inputs=tuple(found.inputs[number] for number in kept),
        outputs=(tensor,),
        input_structure=structure,
        output_structure=Ref(0),
        input_layers=layers,
        output_names=(name,),
    )
    return replace(part, signature=_signature(part))


def trace(model: Any) -> Trace:
    """Read a Keras model. The model is not changed.

    Raises UnsupportedModelError for a model without known inputs or whose graph cannot be read.
    """
    functional = functional_form(model)
    input_layers = tuple(symbol._keras_history.operation for symbol in functional.inputs)
    output_names = tuple(symbol._keras_history.operation.name for symbol in functional.outputs)
    known: set[int] | None = None
    whole: set[int] = set()
    while known != whole:  # a model of which one call cannot be inlined stays whole in all: they share its layers
        known = whole
        reader = _Reader(whole)
        numbers = {id(symbol): reader.tensor(symbol, None) for symbol in functional.inputs}
        inputs = tuple(numbers.values())
        for layer in (*input_layers, *functional.operations):  # names of the outermost level are never changed
            if _functional(layer) is None or layer.name in output_names:
                reader.names[id(layer)] = layer.name
                reader.taken.add(layer.name)
        with deep_recursion(len(functional.operations)):
            outputs = tuple(reader.read(functional, numbers, None, ""))
        whole = reader.whole
    position = {id(symbol): index for index, symbol in enumerate(functional.inputs)}
    counter = iter(range(len(outputs)))
    nodes, tensors = _ordered(reader.nodes, reader.tensors, outputs)
    found = Trace(
        name=model.name,
        nodes=nodes,
        tensors=tensors,
        inputs=inputs,
        outputs=outputs,
        input_structure=tree.map_structure(lambda symbol: Ref(position[id(symbol)]), functional.input),
        output_structure=tree.map_structure(lambda symbol: Ref(next(counter)), functional.output),
        signature=Signature((), ()),
        input_layers=input_layers,
        output_names=output_names,
        trainable=model.trainable,
        renamed=dict(reader.renamed),
    )
    return replace(found, signature=_signature(found))


def showing(found: Trace, tensors: Sequence[int]) -> Trace:
    """The same trace with other outputs: a list of tensors that layers make."""
    makers = [found.producer(tensor) for tensor in tensors]
    names = tuple(maker.name for maker in makers if maker is not None)
    structure = [Ref(place) for place in range(len(tensors))]
    return replace(found, outputs=tuple(tensors), output_structure=structure, output_names=names)


def _signature(found: Trace) -> Signature:
    inputs = []
    for index, layer in zip(found.inputs, found.input_layers, strict=True):
        low, high = _plausible_range(found, index)
        tensor = found.tensors[index]
        inputs.append(TensorSpec(layer.name, tensor.shape, tensor.dtype, low, high))
    wanted = list(found.output_names)
    if isinstance(found.output_structure, dict):
        paths = tree.flatten_with_path(found.output_structure)
        wanted = [".".join(str(key) for key in path) for path, _ in paths]
    names = distinct(wanted, [spec.name for spec in inputs])
    outputs = tuple(
        TensorSpec(name, found.tensors[index].shape, found.tensors[index].dtype)
        for name, index in zip(names, found.outputs, strict=True)
    )
    return Signature(tuple(inputs), outputs)


def distinct(wanted: Sequence[str], taken: Sequence[str]) -> list[str]:
    """Names in order; one that repeats, or is taken, gets the first free ``_1``, ``_2``, ... behind it."""
    given: list[str] = []
    for name in wanted:
        free, count = name, 0
        while free in given or free in taken or (count and free in wanted):
            count += 1
            free = f"{name}_{count}"
        given.append(free)
    return given


def signature(model: Any) -> Signature:
    """Names, shapes, dtypes and plausible ranges of a model's inputs and outputs, in the model's order.

    An input is called what its InputLayer is called; an output what the layer that makes it is called,
    or its key where the model returns a dict. Where names repeat (an LSTM that also returns its states
    has three outputs of one name; an input may itself be an output) the later ones become ``lstm_1``,
    ``lstm_2``, because ONNX and every data file need distinct names.
    """
    return trace(model).signature


def flat_call(model: Any) -> Callable[..., list[Any]]:
    """The model in inference mode as a function from its flat inputs to the list of its flat outputs."""
    functional = functional_form(model)

    def call(*tensors: Any) -> list[Any]:
        given = tree.pack_sequence_as(functional.input, list(tensors))
        return list(tree.flatten(functional(given, training=False)))

    return call


def _plausible_range(found: Trace, tensor: int) -> tuple[float | None, float | None]:
    """What the first layers say about the values of an input: (low, high), or (None, None)."""
    for node in found.consumers(tensor):
        layer = node.layer
        if isinstance(layer, L.Embedding):
            return 0.0, float(layer.input_dim - 1)
        if isinstance(layer, L.Rescaling) and np.ndim(layer.scale) == 0 and np.ndim(layer.offset) == 0 and layer.scale:
            # made to map what comes in to 0..1 or to -1..1
            low, high = ((bound - float(layer.offset)) / float(layer.scale) for bound in (0.0, 1.0))
            if float(layer.offset) < 0:
                low = (-1.0 - float(layer.offset)) / float(layer.scale)
            return round(min(low, high), 6), round(max(low, high), 6)
        if isinstance(layer, L.Normalization) and not layer.invert and getattr(layer, "mean", None) is not None:
            mean = numpy(layer.mean).astype(np.float64)
            deviation = np.sqrt(numpy(layer.variance).astype(np.float64))
            return float((mean - 2 * deviation).min()), float((mean + 2 * deviation).max())
    return None, None


# --------------------------------------------------------------------------------------------- building


@contextlib.contextmanager
def deep_recursion(calls: int) -> Iterator[None]:
    """Keras walks graphs recursively; a chain of a thousand layers needs more than Python's default."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, 20 * calls + 1000))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


@contextlib.contextmanager
def _undisturbed_random() -> Iterator[None]:
    """Building a layer draws initial weights and seeds from Python's generator; put it back."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def _is_float(dtype: Any) -> bool:
    """Whether a dtype, a policy name or a policy config stands for floating-point computation."""
    if isinstance(dtype, Mapping):
        dtype = dtype.get("config", {}).get("name")
    return isinstance(dtype, str) and ("float" in dtype)


def _with_dtype(config: Any, dtype: str) -> Any:
    """A layer config in which every floating-point dtype policy, also of wrapped layers, is ``dtype``."""
    if isinstance(config, Mapping):
        return {
            key: dtype if key == "dtype" and _is_float(value) else _with_dtype(value, dtype)
            for key, value in config.items()
        }
    if isinstance(config, (list, tuple)):
        return type(config)(_with_dtype(value, dtype) for value in config)
    return config


def _clone(node: Node, changes: Config, dtype: str | None, kind: Any = None) -> Any:
    layer = node.layer
    try:
        config = dict(layer.get_config())
        if "name" in config:
            config["name"] = node.name
        config.update(changes)
        if dtype is not None:
            config = _with_dtype(config, dtype)
        clone = (kind or type(layer)).from_config(config)
        if clone.name != node.name:  # a config that leaves the name out would get a new one each time
            clone.name = node.name
        return clone
    except Exception as error:
        raise UnsupportedModelError(
            f"cannot copy layer '{node.name}' ({type(layer).__name__}): its get_config/from_config do not rebuild it "
            f"({type(error).__name__})"
        ) from error


def _cast_constant(value: Any, dtype: str) -> Any:
    if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating):
        return value.astype(dtype)
    return value


def numpy(variable: Any) -> npt.NDArray[Any]:
    """The value of a Keras variable or tensor as a numpy array of its own dtype."""
    return np.asarray(keras.ops.convert_to_tensor(variable).numpy())


def _copy_weights(new: Any, old: Any, name: str) -> None:
    if len(new.weights) != len(old.weights):
        raise UnsupportedModelError(f"cannot copy layer '{name}' ({type(old).__name__}): its copy has other weights")
    for target, source in zip(new.weights, old.weights, strict=True):
        target.assign(numpy(source))
    if hasattr(old, "load_assets"):  # a vocabulary is no weight
        with tempfile.TemporaryDirectory() as room:
            old.save_assets(room)
            new.load_assets(room)


@dataclass(frozen=True)
class Padding:
    """A constant pad: (before, after) per axis, batch included. ``alone``: it stands in for the layer itself."""

    widths: tuple[tuple[int, int], ...]
    value: float
    alone: bool


def _padded(tensor: Any, padding: Padding, name: str) -> Any:
    """A tensor with a constant around it, by an operation called ``name``."""
    result = keras.ops.pad(tensor, padding.widths, constant_values=padding.value)
    result._keras_history.operation.name = name
    return result


def _assign(layer: Any, values: Mapping[str, npt.NDArray[Any]], name: str) -> None:
    """Give a layer all of its weights, by paths such as "cell.kernel"."""
    if len(values) != len(layer.weights):
        raise UnsupportedModelError(f"cannot rewrite layer '{name}' ({type(layer).__name__}): it has other weights")
    for path, value in values.items():
        variable = layer
        for part in path.split("."):
            variable = getattr(variable, part)
        variable.assign(value)


# --------------------------------------------------------- what TensorFlow does in float32 only, in float64


def _interpolates(layer: Any) -> bool:
    return isinstance(layer, (L.UpSampling2D, L.Resizing)) and layer.interpolation != "nearest"


def _resampled(found: Trace, node: Node) -> bool:
    """Whether a layer that interpolates is a matrix per axis: sizes known, nothing cropped or padded."""
    shape = found.tensors[node.inputs[0]].shape
    cuts = (getattr(node.layer, f"{what}_to_aspect_ratio", False) for what in ("crop", "pad"))
    return _interpolates(node.layer) and len(shape) == 4 and None not in shape[1:] and not any(cuts)


def _pools_cubes(found: Trace, node: Node) -> bool:
    """TensorFlow pools three axes in float32 and less."""
    return (
        isinstance(node.layer, (L.MaxPooling3D, L.AveragePooling3D))
        and None not in (found.tensors[node.inputs[0]].shape[1:])
    )


class _Pooling3D(keras.layers.Layer):  # type: ignore[misc]
    """A pooling over three axes as one over two and one over the third: windows are boxes, so both max and mean
    (over the elements that are no padding) are the max or mean of maxima or means."""

    def __init__(self, layer: Any, **options: Any) -> None:
        super().__init__(**options)
        self.pool = keras.ops.max_pool if isinstance(layer, L.MaxPooling3D) else keras.ops.average_pool
        self.size, self.strides, self.padding = layer.pool_size, layer.strides, layer.padding
        self.first = layer.data_format == "channels_first"

    def pooled(self, x: Any, axes: slice) -> Any:
        return self.pool(x, self.size[axes], self.strides[axes], self.padding, data_format="channels_last")

    def call(self, x: Any) -> Any:
        x = keras.ops.moveaxis(x, 1, -1) if self.first else x
        _, depth, height, width, channels = x.shape
        x = self.pooled(keras.ops.reshape(x, (-1, height, width, channels)), slice(1, 3))
        height, width = x.shape[1:3]
        x = keras.ops.moveaxis(keras.ops.reshape(x, (-1, depth, height, width, channels)), 1, 3)
        x = self.pooled(keras.ops.reshape(x, (-1, depth, channels)), slice(0, 1))
        x = keras.ops.moveaxis(keras.ops.reshape(x, (-1, height, width, x.shape[1], channels)), 3, 1)
        return keras.ops.moveaxis(x, -1, 1) if self.first else x


class _Resampling(keras.layers.Layer):  # type: ignore[misc]
    """What an interpolating layer does, in this layer's own precision.

    TensorFlow interpolates in float32 whatever it is given. Interpolation is linear and separable, so its answer to
    unit vectors is its matrix along each axis; rows are made to sum to 1 exactly, as they do in exact arithmetic.
    """

    def __init__(self, layer: Any, shape: Shape, **options: Any) -> None:
        super().__init__(**options)
        self.axes = (2, 3) if layer.data_format == "channels_first" else (1, 2)
        self.matrices = [self.matrix(layer, shape, axis) for axis in self.axes]

    def matrix(self, layer: Any, shape: Shape, axis: int) -> npt.NDArray[np.float64]:
        """Shape (size before, size after)."""
        size = shape[axis] or 1
        place = [size, 1, 1, 1]
        place[axis] = size
        answer = numpy(layer(keras.ops.convert_to_tensor(np.eye(size, dtype=np.float32).reshape(place))))
        found = np.moveaxis(answer, axis, 1)[:, :, 0, 0].astype(np.float64)
        rows: npt.NDArray[np.float64] = found / found.sum(axis=0)
        return rows

    def call(self, x: Any) -> Any:
        for axis, matrix in zip(self.axes, self.matrices, strict=True):
            x = keras.ops.moveaxis(x, axis, -1) @ keras.ops.convert_to_tensor(matrix, dtype=x.dtype)
            x = keras.ops.moveaxis(x, -1, axis)
        return x

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        shape = list(input_shape)
        for axis, matrix in zip(self.axes, self.matrices, strict=True):
            shape[axis] = matrix.shape[1]
        return tuple(shape)


# ------------------------------------------------------------------------------ channels in front, on a CPU

# In front of its spatial axes, of which a layer has ``rank``, the channels of a tensor stand at ``ndim - rank - 1``:
# behind the batch, and behind the axis of time of every TimeDistributed and of a ConvLSTM. Behind them they stand last.

_FORMATS = ("keras.src.layers.convolutional.", "keras.src.layers.pooling.", "keras.src.layers.reshaping.")
_MEMORIES = (L.ConvLSTM1D, L.ConvLSTM2D, L.ConvLSTM3D)
_ALONG = {"softmax", "log_softmax", "sparsemax", "glu"}  # activations along the last axis, wherever channels are


def _inmost(layer: Any) -> Any:
    """What TimeDistributed applies at any depth, or the forward half of a Bidirectional."""
    if isinstance(layer, L.Bidirectional):
        return layer.forward_layer
    while isinstance(layer, L.TimeDistributed):
        layer = layer.layer
    return layer


def _is_elementwise(activation: Any) -> bool:
    own = getattr(activation, "__module__", "").startswith("keras.src.activations")
    return own and activation.__name__ not in _ALONG


def _turns(layer: Any) -> bool:
    """Whether a layer keeps channels in front and has an equivalent that keeps them last."""
    inner = _inmost(layer)
    if getattr(inner, "data_format", None) != "channels_first":
        return False
    if isinstance(inner, _MEMORIES):
        halves = (layer.forward_layer, layer.backward_layer) if isinstance(layer, L.Bidirectional) else (layer,)
        return all(
            isinstance(half, _MEMORIES)
            and half.data_format == "channels_first"
            and _is_elementwise(half.activation)
            and _is_elementwise(half.recurrent_activation)
            for half in halves
        )
    return type(inner).__module__.startswith(_FORMATS)


def _channel_axis(layer: Any) -> int:
    """Where the channels of what a layer that `_turns` is given stand."""
    axis = 2 if isinstance(_inmost(layer), _MEMORIES) else 1
    while isinstance(layer, L.TimeDistributed):
        axis, layer = axis + 1, layer.layer
    return axis


def _last(config: Any) -> Any:
    """A layer config in which channels stand last, also of wrapped layers, built for no shape yet."""
    if not isinstance(config, Mapping):
        return config
    return {
        key: "channels_last" if key == "data_format" and value == "channels_first" else _last(value)
        for key, value in config.items()
        if key != "build_config"
    }


def _linear(config: Config, layer: Any) -> Config:
    """The config of a layer without the activation of what it applies."""
    if isinstance(layer, L.TimeDistributed):
        inner = config["layer"]
        return {**config, "layer": {**inner, "config": _linear(inner["config"], layer.layer)}}
    return {**config, "activation": "linear"}


class _Turn:
    """One call of a layer that keeps channels in front, by an equivalent that keeps them last."""

    def __init__(self, found: Trace, node: Node) -> None:
        self.node, self.layer = node, node.layer
        self.inner = _inmost(self.layer)
        self.remembers = isinstance(self.inner, _MEMORIES)
        self.ndim = len(found.tensors[node.inputs[0]].shape)
        self.rank = self.ndim - _channel_axis(self.layer) - 1
        self.activation = None if self.remembers else getattr(self.inner, "activation", None)
        self.splits = self.activation is not None and not _is_elementwise(self.activation)
        # a Bidirectional joins along the last axis, which is one of space
        self.joins = isinstance(self.layer, L.Bidirectional) and self.layer.merge_mode == "concat"
        self.count = 0

    def config(self) -> Config:
        """What changes in the layer's config."""
        config = _last(self.layer.get_config())
        config = _linear(config, self.layer) if self.splits else config
        return {**config, **({"merge_mode": None} if self.joins else {}), "name": self.node.name}

    def moved(self, tensor: Any, *, back: bool = False) -> Any:
        """A tensor with its channels last, or ``back`` in front."""
        front = len(tensor.shape) - self.rank - 1
        result = keras.ops.moveaxis(tensor, *((-1, front) if back else (front, -1)))
        self.count += 1
        result._keras_history.operation.name = f"{self.name('back' if back else 'turned')}.{self.count}"
        return result

    def name(self, what: str) -> str:
        return f"{self.node.name}.{what}.{self.node.index}"

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for the turned layer: its input, and the states of a recurrence; a mask has no channels."""

        def turn(value: Any) -> Any:
            return self.moved(value) if isinstance(value, keras.KerasTensor) else value

        further = {key: value if key == "mask" else tree.map_structure(turn, value) for key, value in kwargs.items()}
        return tree.map_structure(turn, args), further

    def answer(self, results: Any) -> list[Any]:
        """What the layer itself answers, from what the turned one does."""
        found = [
            self.moved(result, back=True) if self.remembers or len(result.shape) == self.ndim else result
            for result in tree.flatten(results)
        ]
        if self.splits:
            found = [L.Activation(self.activation, dtype=self.layer.dtype_policy, name=self.name("activation"))(*found)]
        if self.joins:
            forth, back, *states = found
            found = [L.Concatenate(dtype=self.layer.dtype_policy, name=self.name("joined"))([forth, back]), *states]
        return found


def _inner_model(layer: Any) -> Any | None:
    """The model that a layer is, or that TimeDistributed applies, of which some layer turns."""
    inner = _inmost(layer)
    if _functional(inner) is None or not any(_turns(part) for part in inner._flatten_layers()):
        return None
    return inner


def _runnable_whole(found: Trace, node: Node) -> Any | None:
    """A model that is called as a whole, or under TimeDistributed, as a `runnable` one, weights included.

    None where there is nothing to turn, and where a mask goes in, which the transpositions would not hand on.
    """
    inner = _inner_model(node.layer)
    masks = (call.kwargs.get("mask") for call in found.nodes if call.layer is node.layer)
    if inner is None or any(mask is not None for mask in tree.flatten(list(masks))):
        return None

    def wrapped(layer: Any) -> Any:
        if not isinstance(layer, L.TimeDistributed):
            return runnable(layer)
        return L.TimeDistributed(wrapped(layer.layer), dtype=layer.dtype_policy, name=layer.name)

    whole = wrapped(node.layer)
    whole.name = node.name
    return whole


class _Steps(keras.layers.TimeDistributed):  # type: ignore[misc]
    """TimeDistributed over an unknown number of steps, which go through the layer as part of the batch.

    Keras 3.15 takes the batch size for their number when it runs in a graph (eagerly it does not). Each step is a
    sample of its own to a layer in inference mode, so that folding them into the batch changes nothing.
    """

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        shape = keras.ops.shape(inputs)
        more = {"training": training} if self.layer._call_has_training_arg else {}
        if mask is not None and self.layer._call_has_mask_arg:
            more["mask"] = keras.ops.reshape(mask, (-1, *keras.ops.shape(mask)[2:]))
        answer = self.layer.call(keras.ops.reshape(inputs, (shape[0] * shape[1], *shape[2:])), **more)
        return keras.ops.reshape(answer, (shape[0], shape[1], *keras.ops.shape(answer)[1:]))


def _open_steps(found: Trace, node: Node) -> bool:
    """Whether a call goes step by step through a sequence of unknown length."""
    return type(node.layer) is L.TimeDistributed and found.tensors[node.inputs[0]].shape[1] is None


def runnable(model: Any) -> Any:
    """A model that computes the same and that TensorFlow can run anywhere; the model itself where it can already.

    TensorFlow has few kernels for channels_first on a CPU, so that such layers become their channels_last equivalents
    between two transpositions: the same sums, and kernels have one layout in both formats. So do layers and models
    under TimeDistributed, and ConvLSTM layers, also in both directions. A TimeDistributed over any number of steps
    folds them into the batch (`_Steps`). Limits: not inside custom layers, not in a
    TimeDistributed recurrence, and not in a model that is called as a whole with a mask.
    """
    layers = functional_form(model)._flatten_layers()
    if not any(_turns(layer) or type(layer) is L.TimeDistributed for layer in layers):
        return model
    found = trace(model)
    if not any(_turns(layer) for layer in layers) and not any(_open_steps(found, node) for node in found.nodes):
        return model
    return replay(found, turned=True)


def misplaced_biases(model: Any) -> tuple[str, ...]:
    """Layers whose bias Keras' TensorFlow backend adds along the last axis although their channels are in front.

    `keras.ops.add` goes by sizes, and takes a last axis that is as long as the bias for the channels. `runnable` adds
    the bias per channel, as the layer means it.
    """
    if not any(_turns(layer) for layer in functional_form(model)._flatten_layers()):
        return ()
    found = trace(model)
    names = []
    for node in found.nodes:
        inner, whole = _inmost(node.layer), _inner_model(node.layer)
        shape = found.tensors[node.outputs[0]].shape
        if whole is not None:
            names += [f"{node.name}/{name}" for name in misplaced_biases(whole)]
        elif _turns(node.layer) and getattr(inner, "use_bias", False) and not isinstance(inner, _MEMORIES):
            names += [node.name] if shape[-1] == shape[_channel_axis(node.layer)] else []
    return tuple(dict.fromkeys(names))


# Activations that squash an output so far that differences in front of it hardly show behind it.
_SQUASHING = {"softmax", "sigmoid", "log_softmax", "hard_sigmoid", "tanh"}


def _squashes(node: Node) -> str | None:
    """How to see in front of a squashing last call: 'split' its activation off, or take its 'input'."""
    activation = getattr(node.layer, "activation", None)
    squashing = getattr(activation, "__name__", None) in _SQUASHING
    if isinstance(node.layer, L.Activation):
        return "input" if squashing else None
    if type(node.layer) in (L.Dense, L.Conv1D, L.Conv2D, L.Conv3D) and squashing:
        return "split"
    if isinstance(node.layer, L.Softmax) or type(node.layer).__name__.lower() in _SQUASHING:
        return "input"  # keras.ops.softmax(x) in the graph
    return None


def squashed_outputs(found: Trace) -> tuple[bool, ...]:
    """Per output, whether `replay` with ``logits`` shows what goes into the squashing call that makes it."""
    makers = [found.producer(tensor) for tensor in found.outputs]
    return tuple(maker is not None and found.calls(maker) == 1 and _squashes(maker) is not None for maker in makers)


def activation_of(found: Trace, tensor: int) -> str | None:
    """The name of the activation that makes a tensor ("sigmoid"), in a layer or as one; else of what makes it."""
    maker = found.producer(tensor)
    if maker is None:
        return None
    inside = getattr(getattr(maker.layer, "activation", None), "__name__", None)
    return inside or type(maker.layer).__name__.lower()


def replay(
    found: Trace,
    *,
    changes: Mapping[str, Config] | None = None,
    weights: Callable[[str], Mapping[str, npt.NDArray[Any]] | None] = lambda name: None,
    dropped: Collection[str] = frozenset(),
    swaps: Mapping[str, Callable[[], Any]] | None = None,
    pads: Mapping[str, Padding] | None = None,
    dtype: str | None = None,
    logits: bool = False,
    turned: bool = False,
) -> Any:
    """Build a new functional model from a trace.

    ``changes``: layer name -> config entries that replace the layer's own.
    ``weights``: layer name -> {path of a variable: value} for all of its weights, or None for a copy of the layer's
    own; asked once per layer, right after the layer was built, and its answer is not kept.
    ``dropped``: names of layers whose call returns its (single) input.
    ``swaps``: layer name -> maker of the layer without weights that stands in for it.
    ``pads``: layer name -> constant pad in front of it, or in its place.
    ``dtype``: compute in this dtype throughout ("float64" for a reference).
    ``logits``: append, as further outputs, what goes into a final softmax, sigmoid or the like; such a model is
    for proofs, and its outputs' names are not kept.
    ``turned``: layers that keep channels in front keep them last, as `runnable` says; nor are names kept then.
    """
    changes, swaps, pads = changes or {}, swaps or {}, pads or {}
    tensors: dict[int, Any] = {}
    layers: dict[int, Any] = {}
    taken = [*(node.name for node in found.nodes), *(layer.name for layer in found.input_layers)] if pads else []
    extra: list[Any] = []

    def put(value: Any) -> Any:
        if isinstance(value, Ref):
            return tensors[value.index]
        return value if dtype is None else _cast_constant(value, dtype)

    with _undisturbed_random(), deep_recursion(len(found.nodes)):
        for index, layer in zip(found.inputs, found.input_layers, strict=True):
            config = layer.get_config() if isinstance(layer, L.InputLayer) else {}
            tensor = found.tensors[index]
            tensors[index] = keras.Input(
                batch_shape=tensor.shape,
                dtype=dtype if dtype is not None and _is_float(tensor.dtype) else tensor.dtype,
                name=layer.name,
                sparse=bool(config.get("sparse", False)),
                optional=bool(config.get("optional", False)),
            )
        for node in found.nodes:
            if node.name in dropped:
                tensors[node.outputs[0]] = tensors[node.inputs[0]]
                continue
            if node.name in swaps:
                tensors[node.outputs[0]] = swaps[node.name]()(tensors[node.inputs[0]])
                continue
            pad = pads.get(node.name)
            whole = tensors[node.inputs[0]] if node.inputs else None
            if pad is not None:
                name = node.name if pad.alone else distinct([f"{node.name}.pad"], taken)[0]
                padded = _padded(whole, pad, name)
                if pad.alone:
                    tensors[node.outputs[0]] = padded
                    continue
                tensors[node.inputs[0]] = padded  # for this call only
            args, kwargs = tree.map_structure(put, node.args), tree.map_structure(put, node.kwargs)
            turn = _Turn(found, node) if turned and _turns(node.layer) else None
            if turn is not None:
                args, kwargs = turn.given(args, kwargs)
            last = logits and any(found.is_output(index) for index in node.outputs)
            see = _squashes(node) if last and found.calls(node) == 1 else None
            if see == "input":
                extra.append(tensors[node.inputs[0]])
            new = layers.get(id(node.layer))
            if new is None:
                change = {**changes.get(node.name, {}), **({} if turn is None else turn.config())}
                if see == "split":
                    change["activation"] = "linear"
                filled = _runnable_whole(found, node) if turned else None
                if filled is not None:
                    new = filled
                elif dtype == "float64" and _resampled(found, node):
                    new = _Resampling(node.layer, found.tensors[node.inputs[0]].shape, dtype=dtype, name=node.name)
                elif dtype == "float64" and _pools_cubes(found, node):
                    new = _Pooling3D(node.layer, dtype=dtype, name=node.name)
                elif isinstance(node.layer, (_Resampling, _Pooling3D)):
                    new = node.layer  # of a copy for proofs, which has no config
                else:
                    new = _clone(node, change, dtype, _Steps if turned and _open_steps(found, node) else None)
                layers[id(node.layer)] = new
                results = new(*args, **kwargs)
                if isinstance(node.layer, L.Layer) and filled is None:
                    given = weights(node.name)
                    if given is None:
                        _copy_weights(new, node.layer, node.name)
                    else:
                        _assign(new, given, node.name)
                    for part in new._flatten_layers():
                        if isinstance(part, L.Normalization):
                            part.finalize_state()  # what an adapted layer computes with is derived from its weights
            else:
                results = new(*args, **kwargs)
            if see == "split":
                extra.append(results)
                results = L.Activation(node.layer.activation, dtype=dtype, name=f"{node.name}.{see}")(results)
            if turn is not None:
                results = turn.answer(results)
            tensors.update(zip(node.outputs, tree.flatten(results), strict=True))
            if pad is not None:
                tensors[node.inputs[0]] = whole

        inputs = tree.map_structure(lambda ref: tensors[found.inputs[ref.index]], found.input_structure)
        finals = [tensors[index] for index in found.outputs]
        if not logits and not turned:
            finals = _named(found, finals, dropped)
        outputs = tree.map_structure(lambda ref: finals[ref.index], found.output_structure)
        if logits:
            outputs = [*tree.flatten(outputs), *extra]
        return keras.Model(inputs, outputs, name=found.name, trainable=found.trainable)


def _named(found: Trace, outputs: Sequence[Any], dropped: Collection[str]) -> list[Any]:
    """Outputs that Keras calls as it did in the traced model.

    An output is called after the layer that makes it. Where that layer was dropped, or was a nested model that
    is inlined now, an Identity of its name stands behind.
    """
    taken = {node.name for node in found.nodes if node.name not in dropped}
    taken |= {layer.name for layer in found.input_layers}
    results = []
    for output, name in zip(outputs, found.output_names, strict=True):
        if output._keras_history.operation.name != name:
            free = distinct([name], sorted(taken))[0]
            taken.add(free)
            output = L.Identity(name=free, dtype=output.dtype if _is_float(output.dtype) else None)(output)
        results.append(output)
    return results


def canonical(model: Any) -> Any:
    """The same model as one flat functional graph of fresh layers."""
    return replay(trace(model))


# ---------------------------------------------------------------------------------------------- running


def run(model: Any, arrays: Mapping[str, npt.NDArray[Any]], *, batch: int = 32) -> list[npt.NDArray[Any]]:
    """Evaluate a model in inference mode on arrays keyed by input name, in slices of ``batch``.

    Returns the outputs in the model's flattened order.
    """
    model = functional_form(runnable(model))
    call = flat_call(model)
    names = [symbol._keras_history.operation.name for symbol in model.inputs]
    fixed = model.inputs[0].shape[0]
    size = fixed or batch
    pieces = []
    for start in range(0, len(arrays[names[0]]), size):
        parts = [np.asarray(arrays[name][start : start + size]) for name in names]
        count = len(parts[0])
        if fixed is not None and count < fixed:  # a model of one batch size gets the last samples once more
            parts = [np.concatenate([part, np.repeat(part[-1:], fixed - count, axis=0)]) for part in parts]
        try:
            flat = [
                keras.ops.convert_to_tensor(part, dtype=symbol.dtype)
                for part, symbol in zip(parts, model.inputs, strict=True)
            ]
            outputs = [numpy(output) for output in call(*flat)]
        except Exception as error:  # whatever TensorFlow or a layer raises
            raise UnsupportedModelError(f"TensorFlow cannot run model {model.name} here: {cause(error)}") from error
        if any(output.ndim == 0 or len(output) != len(parts[0]) for output in outputs):
            raise UnsupportedModelError(
                f"model {model.name} has an output without a batch axis; samples cannot be told"
            )
        pieces.append([output[:count] for output in outputs])
    return [np.concatenate(parts) for parts in zip(*pieces, strict=True)]


_MARKS = ("<stack traces", "•", "Exception encountered", "Arguments received", "Detected at", "Graph execution error")


def cause(error: Exception) -> str:
    """The line of a Keras or TensorFlow message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = next((line for line in lines if line and not line.startswith(_MARKS) and "\x1b" not in line), "")
    return said[:200] or type(error).__name__


def values_per_sample(found: Trace, free: int = 32) -> int:
    """How many numbers one sample makes on its way through the model: a yardstick for memory."""
    sizes = [[free if size is None else size for size in tensor.shape[1:]] for tensor in found.tensors]
    return sum(int(np.prod(size)) for size in sizes)


def float32_only(found: Trace) -> tuple[str, ...]:
    """Layers that TensorFlow evaluates in float32 whatever their dtype policy, and that have no stand-in."""
    stuck = [node.name for node in found.nodes if _interpolates(node.layer) and not _resampled(found, node)]
    return tuple(dict.fromkeys(stuck))
