"""TensorFlow operations in the graph of a tf.keras model become calls of `keras.ops`.

tf.keras keeps a plain TensorFlow call between layers as a layer of its own: `TFOpLambda` and `SlicingOpLambda`
(2.4 and later) name a function, whose arguments stand in the node; `TensorFlowOpLayer` (2.0 to 2.3) holds the
NodeDef of one raw operation and the constants among its inputs. Both are looked up in a table, `FUNCTIONS` and
`RAW`: name -> law. A law is a function with the *signature of the TensorFlow function*, defaults included, so
that an argument that the file leaves out means what it meant there; its body is what `keras.ops` calls it.
Nothing is imported, looked up in a module or evaluated at the word of the file: what is not in the table is
refused by name, and so is an argument that has no exact equivalent.

Three kinds of values flow along the graph:

- symbolic tensors. The operations made here are Keras' own, so that the new model is saved and loaded with safe
  mode on. They bear the name of the layer that they replace (further ones `name.1`, `name.2`, ...), because
  automatic names would collide with the names in the file;
- constants: numbers or numpy arrays. TensorFlow turns a constant into the dtype of the tensor it meets, Keras
  would promote; so constants are rounded to that dtype first. An array must be a numpy array: Keras derives
  shapes from it, which it cannot do from a list, and saves it with its dtype; a tensor of the backend is not
  saved at all. A call of constants alone is computed at once;
- extents: what `tf.shape` gives. Known ones are constants. One that is known only when the model runs is an
  `Extent`, several of them a `Shape`: they may be multiplied, picked and packed on their way to a reshape, where
  the only unknown becomes -1 (the number of elements leaves no choice), or to a resize by whole factors.

Every result is checked to have the dtype that TensorFlow gives.

Limits: strings, sparse and ragged tensors, random numbers, control flow and masks by value are refused.
`tf.einsum` is refused because tf.keras does not write its operands down.
"""

from __future__ import annotations

import base64
import binascii
import inspect
import json
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from deploykit.errors import UnsupportedModelError
from deploykit.load.contents import printable

FUNCTION_CLASSES = frozenset(("TFOpLambda", "SlicingOpLambda"))
IDENTITY_CLASSES = frozenset(("AddLoss", "AddMetric"))  # they pass their input on; no part of inference
OBJECT_CLASSES = frozenset(("ClassMethod", "InstanceMethod", "InstanceProperty"))  # of ragged and sparse tensors
CLASSES = FUNCTION_CLASSES | IDENTITY_CLASSES | OBJECT_CLASSES | {"TensorFlowOpLayer"}

# One function is written under several names: `tf.sigmoid`, `tf.nn.sigmoid` and `tf.math.sigmoid` are the same.
NAMESPACES = frozenset(("", "math", "nn", "linalg", "dtypes", "__operators__"))

Tensor = Any  # a parameter that may be a symbolic tensor, or a sequence of them; any other must be constant
Extents = Any  # a parameter that may hold extents known only when the model runs
Law = Callable[..., Any]


class _RefusedError(Exception):
    """No exact equivalent; the reason completes the sentence "layer 'x' calls tf.y ..."."""


@dataclass(frozen=True, eq=False)
class Extent:
    """``factor`` times the length of ``tensor`` along ``axis``; without a tensor, some unknown length."""

    tensor: Any = None
    axis: int = 0
    factor: int = 1


@dataclass(frozen=True, eq=False)
class Shape:
    """What `tf.shape` gives where some length is known only when the model runs. Not a list: it is one output."""

    extents: tuple[int | Extent, ...]


def known(class_name: str, config: Mapping[str, Any]) -> bool:
    """Whether the table has the operation; nothing is built."""
    if class_name in IDENTITY_CLASSES:
        return True
    if class_name in FUNCTION_CLASSES:
        return _row(config.get("function")) in FUNCTIONS
    return class_name == "TensorFlowOpLayer" and str(_node_def(config).get("op")) in RAW


def operation(class_name: str, config: Mapping[str, Any], name: str) -> Callable[..., Any]:
    """What replaces the operation layer ``name``: ``call(first, **arguments)``.

    ``first`` is the node's first argument: a symbolic tensor, a constant, or a list of both; symbolic tensors
    stand in the place of references everywhere. The result is a symbolic tensor, a list of them (several
    outputs), or for calls on `tf.shape` and constants a value to be handed on as it is.

    Raises UnsupportedModelError, here or in the call, for an operation outside the table, arguments without an
    exact equivalent, or arguments that do not fit.
    """
    if class_name in IDENTITY_CLASSES:
        return _Call(name, class_name, lambda first, /, **_: _single(first))
    if class_name in FUNCTION_CLASSES:
        function = config.get("function")
        called = f"tf.{function}"
        law = FUNCTIONS.get(_row(function))
        if law is None:
            raise _refusal(name, called, _UNWRITTEN.get(str(_row(function)), "which has no row in the table"))
        return _Call(name, called, lambda first, /, **arguments: _apply(law, (first,), arguments))
    if class_name != "TensorFlowOpLayer":
        what = config.get("attr_name") or f"{config.get('cls_symbol')}.{config.get('method_name')}"
        raise _refusal(name, str(what), "which belongs to ragged or sparse tensors")
    node = _node_def(config)
    called = f"the TensorFlow operation {node.get('op')}"
    raw = RAW.get(str(node.get("op")))
    if raw is None:
        raise _refusal(name, called, "which has no row in the table")
    return _Call(name, called, lambda first, /, **_: _apply(raw, _inputs(first, config), _attributes(node)))


def _refusal(name: str, called: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"layer {printable(name)!r} calls {printable(called)}, {printable(reason)}; "
        "build the model with Keras layers there and save it again"
    )


@dataclass
class _Call:
    """One operation layer. Each call of it makes operations of its own; the first has the layer's name."""

    name: str
    called: str
    run: Callable[..., Any]
    made: int = 0

    def __call__(self, first: Any, /, **arguments: Any) -> Any:  # "first" and "self" may be names in the file
        try:
            result = self.run(_plain(first), **{key: _plain(value) for key, value in arguments.items()})
        except _RefusedError as error:
            raise _refusal(self.name, self.called, str(error)) from error
        except Exception as error:  # arguments that do not fit fail anywhere in Keras or TensorFlow
            lines = str(error).rpartition("Exception encountered:")[2].split("\n")
            cause = next((line.strip() for line in lines if line.strip()), type(error).__name__)
            raise _refusal(self.name, self.called, f"whose arguments do not fit ({cause})") from error
        given = {id(symbol) for symbol in _symbols((first, arguments))}
        outputs = [result] if not isinstance(result, list) else result
        if any(id(output) in given for output in outputs):  # keep a layer of this name
            result = _by_layer(keras.layers.Identity, result)
            outputs = [result]
        for made in _made(outputs, given):
            base = self.name.replace("/", "_")  # Keras 3 takes no slash in a name
            made.name = f"{base}.{self.made}" if self.made else base
            self.made += 1
        return result


# What the file says, as plain values


def _row(function: object) -> str | None:
    """The key of a function in the table: its name without the namespaces that do not tell functions apart."""
    if not isinstance(function, str):
        return None
    if function in FUNCTIONS:
        return function
    space, _, last = function.removeprefix("compat.v1.").rpartition(".")
    return last if space in NAMESPACES else f"{space}.{last}"


def _plain(value: Any) -> Any:
    """Undo what the JSON encoders of tf.keras write for tuples, shapes, slices and the like."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("class_name")
    if kind == "__ellipsis__":
        return Ellipsis
    if kind in ("__tuple__", "TensorShape"):
        return _plain(value.get("items", value.get("config")))
    if value.keys() == {"start", "stop", "step"}:
        return slice(value["start"], value["stop"], value["step"])
    raise _RefusedError(f"with an argument of the kind {kind!r}")


def _node_def(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The NodeDef of a raw operation: JSON, in some versions as text; empty when it is neither."""
    node = config.get("node_def")
    if isinstance(node, str):
        try:
            node = json.loads(node)
        except ValueError:
            node = None
    return node if isinstance(node, dict) else {}


def _inputs(first: Any, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """The inputs of a raw operation in order: tensors, with the constants at the places of their own."""
    inputs = list(first) if isinstance(first, list) else [first]
    constants = config.get("constants") or {}
    for index in sorted(constants, key=int):
        value = np.asarray(constants[index])
        inputs.insert(int(index), value if value.ndim else value.item())
    return tuple(inputs)


_TYPES = {
    "DT_HALF": "float16",
    "DT_BFLOAT16": "bfloat16",
    "DT_FLOAT": "float32",
    "DT_DOUBLE": "float64",
    "DT_INT8": "int8",
    "DT_INT16": "int16",
    "DT_INT32": "int32",
    "DT_INT64": "int64",
    "DT_UINT8": "uint8",
    "DT_UINT16": "uint16",
    "DT_UINT32": "uint32",
    "DT_UINT64": "uint64",
    "DT_BOOL": "bool",
}

_ATTRIBUTES: dict[str, Callable[[Any], Any]] = {
    "i": int,  # protobuf writes 64-bit integers as strings
    "f": float,
    "b": bool,
    "s": lambda text: base64.b64decode(text).decode("utf-8"),
    "type": lambda name: _TYPES.get(name, name),
    "list": lambda kinds: [_ATTRIBUTES[kind](item) for kind, items in kinds.items() for item in items],
}


def _attributes(node: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a raw operation that change what it computes: not the types of its inputs, nor hints."""
    found = {}
    for name, value in (node.get("attr") or {}).items():
        if name.startswith(("T", "_")) or name in ("N", "SrcT", "Index"):
            continue
        kind, content = next(iter(value.items()), ("", None))
        try:
            found[name] = _ATTRIBUTES[kind](content)
        except (KeyError, ValueError, binascii.Error) as error:
            raise _RefusedError(f"with the attribute {name!r} of an unknown kind") from error
    return found


# Calling a law

# What changes no result, only its speed, its name or what is an error.
_HINTS = frozenset(
    (
        "name",
        "validate_indices",
        "use_cudnn_on_gpu",
        "layout",
        "a_is_sparse",
        "b_is_sparse",
        "incompatible_shape_error",
    )
)

# TensorFlow 1 and raw operations call the same argument otherwise.
_SYNONYMS = {
    "keep_dims": "keepdims",
    "reduction_indices": "axis",
    "dimension": "axis",
    "dim": "axis",
    "squeeze_dims": "axis",
    "other": "y",
    "filter": "filters",
    "rate": "dilations",
    "DstT": "dtype",
    "num_split": "num",
}


def _apply(law: Law, first: tuple[Any, ...], arguments: Mapping[str, Any]) -> Any:
    """Bind as TensorFlow would and run: on extents, on constants at once, or on symbolic tensors."""
    given: dict[str, Any] = {}
    for key, value in arguments.items():
        if value is not None and key not in _HINTS and given.setdefault(_SYNONYMS.get(key, key), value) is not value:
            raise _RefusedError(f"with {key!r} given twice")
    parameters = inspect.signature(law).parameters
    if unknown := [key for key in given if key not in parameters]:
        raise _RefusedError(f"with {unknown[0]!r}, which has no equivalent")
    try:
        bound = inspect.signature(law).bind(*first, **given)
    except TypeError as error:
        raise _RefusedError(f"whose arguments do not fit ({error})") from error
    for key, value in bound.arguments.items():
        kind = parameters[key].annotation
        if kind == "Extents":
            continue
        if any(True for _ in _extents(value)):
            other = _EXTENT_LAWS.get(law)
            if other is None:
                raise _RefusedError(f"with {key!r} that depends on the size of the input")
            bound.apply_defaults()
            return other(*bound.args, **bound.kwargs)
        if kind != "Tensor" and any(True for _ in _symbols(value)):
            raise _RefusedError(f"with a tensor for {key!r}, where only a constant has an equivalent")
    if law in _GROWING and not any(True for _ in _symbols(bound.args)):
        raise _RefusedError("on constants alone")
    return _settled(law(*bound.args, **bound.kwargs))


def _settled(result: Any) -> Any:
    """Tensors of the backend, which come of constants alone, as constants: Keras saves no others."""
    if isinstance(result, (list, tuple)):
        return [_settled(item) for item in result]
    if keras.utils.is_keras_tensor(result) or isinstance(result, (Extent, Shape)):
        return result
    value = np.asarray(ops.convert_to_numpy(result))
    return value if value.ndim else value.item()


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    elif isinstance(value, slice):
        yield from _leaves((value.start, value.stop, value.step))
    else:
        yield value


def _symbols(value: Any) -> Iterator[Any]:
    return (leaf for leaf in _leaves(value) if keras.utils.is_keras_tensor(leaf))


def _extents(value: Any) -> Iterator[Extent | Shape]:
    return (leaf for leaf in _leaves(value) if isinstance(leaf, (Extent, Shape)))


def _by_layer(layer: Any, tensor: Any, *arguments: Any, **options: Any) -> Any:
    """Call a layer of Keras in the dtype of the tensor: by default it would cast to the global policy's."""
    dtype = _dtype(next(_symbols(tensor)))
    if _is_float(dtype):
        options["dtype"] = dtype
    return layer(*arguments, **options)(tensor)


def _single(value: Any) -> Any:
    return _single(value[0]) if isinstance(value, list) and len(value) == 1 else value


# What Keras keeps of a tensor's making


def _maker(symbol: Any) -> tuple[Any, list[Any]]:
    """The operation that made a tensor, and what it was called with."""
    history = symbol._keras_history
    return history.operation, history.operation._inbound_nodes[history.node_index].input_tensors


def _made(outputs: Sequence[Any], given: set[int]) -> list[Any]:
    """The operations between ``given`` tensors and ``outputs``, those that make the outputs first."""
    found: dict[int, Any] = {}
    queue = list(_symbols(list(outputs)))
    for symbol in queue:
        maker, inputs = _maker(symbol)
        if id(symbol) not in given and id(maker) not in found:
            found[id(maker)] = maker
            queue.extend(inputs)
    return list(found.values())


# Operations of Keras that leave the first axis alone whatever their arguments.
_KEEPS_FIRST_AXIS = frozenset(
    (
        "Absolute",
        "Add",
        "Cast",
        "Clip",
        "Divide",
        "Elu",
        "Erf",
        "Exp",
        "Gelu",
        "LeakyRelu",
        "Log",
        "Maximum",
        "Minimum",
        "Multiply",
        "Negative",
        "Power",
        "Reciprocal",
        "Relu",
        "Relu6",
        "Rsqrt",
        "Selu",
        "Sigmoid",
        "Silu",
        "Softmax",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Square",
        "Subtract",
        "Tanh",
        "TrueDivide",
    )
)


# Others that leave it alone under a condition.
_MAY_KEEP_FIRST_AXIS: dict[str, Callable[[Any, int], bool]] = {
    "Transpose": lambda made, rank: made.axes is not None and made.axes[0] == 0,
    "Concatenate": lambda made, rank: made.axis not in (0, -rank),
    "Matmul": lambda made, rank: rank > 2,
    "Swapaxes": lambda made, rank: not {made.axis1, made.axis2} & {0, -rank},
}


def _is_batch(tensor: Any) -> bool:
    """Whether the first axis of a tensor is the batch that the model is called with.

    It is when every way back to the inputs leads through operations on tensors of one rank that leave the first
    axis alone, or through Keras' own layers.
    """
    seen: set[int] = set()
    stack = [tensor]
    while stack:
        symbol = stack.pop()
        if id(symbol) in seen:
            continue
        seen.add(id(symbol))
        if not symbol.shape or symbol.shape[0] is not None:
            return False
        maker, inputs = _maker(symbol)
        own = type(maker).__module__.startswith("keras.")
        layer = isinstance(maker, keras.Layer) and not isinstance(maker, (keras.Model, keras.layers.Lambda))
        kind, rank = type(maker).__name__, len(symbol.shape)
        keeps = kind in _KEEPS_FIRST_AXIS or (kind in _MAY_KEEP_FIRST_AXIS and _MAY_KEEP_FIRST_AXIS[kind](maker, rank))
        if not own or not (layer or (keeps and all(len(x.shape) == rank for x in inputs))):
            return False
        stack.extend(inputs)
    return True


# Constants and dtypes


def _dtype(value: Any) -> str:
    if hasattr(value, "dtype"):
        return str(keras.backend.standardize_dtype(value.dtype))
    leaf = next(_leaves(value), 0.0)
    return "bool" if isinstance(leaf, bool) else "int32" if isinstance(leaf, int) else "float32"


def _common(*values: Any) -> str:
    """The dtype in which TensorFlow combines values: that of the tensors; constants follow."""
    dtypes = {_dtype(value) for value in values if keras.utils.is_keras_tensor(value)}
    if len(dtypes) > 1:
        raise _RefusedError(f"which mixes {' and '.join(sorted(dtypes))}")
    return dtypes.pop() if dtypes else _dtype(values[0])


def _as(value: Any, dtype: str) -> Any:
    """A constant rounded to ``dtype``: an array, or a plain number, which both are saved; tensors as they are."""
    if keras.utils.is_keras_tensor(value):
        return value
    array = np.asarray(value)
    if array.dtype.kind == "f" and not _is_float(dtype):
        raise _RefusedError(f"with a constant that is no {dtype}")
    array = array.astype(dtype)
    return array if array.ndim else array.item()


def _together(*values: Any) -> list[Any]:
    dtype = _common(*values)
    # Keras would compute two plain numbers in float32; between constants the dtype is theirs.
    return [_as(value, dtype) for value in values]


def _typed(result: Any, dtype: str) -> Any:
    """The guard on every result: Keras promotes where TensorFlow does not."""
    if _dtype(result) != dtype:
        raise _RefusedError(f"whose result on {dtype} would be {_dtype(result)}")
    return result


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))


def _floating(value: Any) -> None:
    if not _is_float(_dtype(value)):
        raise _RefusedError(f"on {_dtype(value)}, which TensorFlow computes otherwise")


def _ints(value: Any) -> list[int]:
    """A constant list of integers, in whatever form."""
    return [int(item) for item in np.asarray(value).ravel()]


def _axes(value: Any) -> int | list[int] | None:
    """An axis, several or, for None, all. An empty list means none, which is no reduction."""
    if value is None:
        return None
    axes = _ints(value)
    if not axes:
        raise _RefusedError("along no axis")
    return axes[0] if np.ndim(value) == 0 else axes


def _named_dtype(dtype: object) -> str:
    if not isinstance(dtype, str) or _TYPES.get(dtype, dtype) not in _TYPES.values():
        raise _RefusedError(f"with the dtype {dtype!r}")
    return _TYPES.get(dtype, dtype)


def _only(**conditions: tuple[Any, Any]) -> None:
    """Refuse options that have another value than the one that has an equivalent."""
    for name, (value, wanted) in conditions.items():
        if value != wanted:
            raise _RefusedError(f"with {name}={value!r}")


# Laws: element by element


def _unary(op: Law) -> Law:
    def law(x: Tensor) -> Any:
        return _typed(op(x), _dtype(x))

    return law


def _binary(op: Law, gives: str | None = None) -> Law:
    def law(x: Tensor, y: Tensor) -> Any:
        a, b = _together(x, y)
        return _typed(op(a, b), gives or _common(x, y))

    return law


def _test(op: Law) -> Law:
    def law(x: Tensor) -> Any:
        return _typed(op(x), "bool")

    return law


def _equality(op: Law) -> Law:
    def law(x: Tensor, y: Tensor = None) -> Any:
        if y is None:  # so in tf.keras of TensorFlow 2.16 and later
            raise _RefusedError("whose second operand is not in the file")
        a, b = _together(x, y)
        return _typed(op(a, b), "bool")

    return law


def truediv(x: Tensor, y: Tensor) -> Any:  # integers are divided in float64, those up to 16 bits in float32
    sides, dtype = _together(x, y), _common(x, y)
    if not _is_float(dtype):
        dtype = "float32" if dtype in ("int8", "uint8", "int16", "uint16") else "float64"
        sides = [ops.cast(side, dtype) if keras.utils.is_keras_tensor(side) else _as(side, dtype) for side in sides]
    return _typed(ops.true_divide(*sides), dtype)


def squared_difference(x: Tensor, y: Tensor) -> Any:
    a, b = _together(x, y)
    return _typed(ops.square(ops.subtract(a, b)), _common(x, y))


def atan2(y: Tensor, x: Tensor) -> Any:  # the names are the other way round
    a, b = _together(y, x)
    return _typed(ops.arctan2(a, b), _common(y, x))


def leaky_relu(features: Tensor, alpha: float = 0.2) -> Any:  # keras.layers.LeakyReLU has 0.3
    return _typed(ops.leaky_relu(features, negative_slope=float(alpha)), _dtype(features))


def silu(features: Tensor, beta: float = 1.0) -> Any:  # x·σ(βx)
    if beta == 1.0:
        return _typed(ops.silu(features), _dtype(features))
    return ops.multiply(features, ops.sigmoid(ops.multiply(features, _as(beta, _dtype(features)))))


def gelu(features: Tensor, approximate: bool = False) -> Any:  # keras.ops.gelu is approximate unless told
    return _typed(ops.gelu(features, approximate=bool(approximate)), _dtype(features))


def softmax(logits: Tensor, axis: int = -1) -> Any:
    return _typed(ops.softmax(logits, axis=int(axis)), _dtype(logits))


def log_softmax(logits: Tensor, axis: int = -1) -> Any:
    return _typed(ops.log_softmax(logits, axis=int(axis)), _dtype(logits))


def crelu(features: Tensor, axis: int = -1) -> Any:  # relu of x and of -x side by side
    return ops.relu(ops.concatenate([features, ops.negative(features)], axis=int(axis)))


def clip_by_value(t: Tensor, clip_value_min: Tensor, clip_value_max: Tensor) -> Any:
    _, low, high = _together(t, clip_value_min, clip_value_max)
    if isinstance(low, (int, float)) and isinstance(high, (int, float)):
        return _typed(ops.clip(t, low, high), _dtype(t))
    return _typed(ops.maximum(ops.minimum(t, high), low), _dtype(t))  # in this order: the lower bound wins


def add_n(inputs: Tensor) -> Any:
    total, *others = _together(*inputs)
    for other in others:
        total = ops.add(total, other)
    return total


def where(condition: Tensor, x: Tensor = None, y: Tensor = None) -> Any:
    if x is None or y is None:
        raise _RefusedError("without values to choose from, whose result has no fixed shape")
    a, b = _together(x, y)
    return _typed(ops.where(condition, a, b), _common(x, y))


def select(condition: Tensor, x: Tensor, y: Tensor) -> Any:  # TensorFlow 1: a vector picks whole rows
    if len(condition.shape) != max(len(np.shape(x)), len(np.shape(y))):
        raise _RefusedError("with a condition of another rank")
    return where(condition, x, y)


def cast(x: Tensor, dtype: str) -> Any:
    return ops.cast(x, _named_dtype(dtype))


def identity(input: Tensor) -> Any:
    if isinstance(input, list):
        raise _RefusedError("on several tensors")
    return input


def convert_to_tensor(value: Tensor, dtype: str | None = None, dtype_hint: str | None = None) -> Any:
    if dtype is not None and keras.utils.is_keras_tensor(value):
        _only(dtype=(_named_dtype(dtype), _dtype(value)))
    return identity(value)


def like(op: Law) -> Law:
    def law(input: Tensor, dtype: str | None = None) -> Any:
        return op(input, dtype=_dtype(input) if dtype is None else _named_dtype(dtype))

    return law


# Laws: reductions and the like


def _reduction(op: Law) -> Law:
    """Means of integers, which TensorFlow divides as integers, are caught by their dtype."""

    def law(input_tensor: Tensor, axis: Any = None, keepdims: bool = False) -> Any:
        return _typed(op(input_tensor, axis=_axes(axis), keepdims=bool(keepdims)), _dtype(input_tensor))

    return law


def euclidean_norm(input_tensor: Tensor, axis: Any = None, keepdims: bool = False) -> Any:
    total = ops.sum(ops.square(input_tensor), axis=_axes(axis), keepdims=bool(keepdims))
    return _typed(ops.sqrt(total), _dtype(input_tensor))


def norm(tensor: Tensor, ord: Any = "euclidean", axis: Any = None, keepdims: bool = False) -> Any:
    several = np.size(axis) > 1
    if ord in ("euclidean", "fro") or (ord == 2 and not several):  # 2 of a matrix is its largest singular value
        return euclidean_norm(tensor, axis, keepdims)
    if ord == 1 and not several:
        return ops.sum(ops.abs(tensor), axis=_axes(axis), keepdims=bool(keepdims))
    raise _RefusedError(f"with ord={ord!r}")


def _arg(op: Law) -> Law:
    def law(input: Tensor, axis: int = 0, output_type: str = "int64") -> Any:  # Keras gives int32
        return ops.cast(op(input, axis=int(axis)), _named_dtype(output_type))

    return law


def _cumulative(op: Law) -> Law:
    def law(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Any:
        _only(exclusive=(bool(exclusive), False))
        axis = int(axis)
        if reverse:  # from the end: turn, accumulate, turn back
            return ops.flip(op(ops.flip(x, axis=axis), axis=axis), axis=axis)
        return _typed(op(x, axis=axis), _dtype(x))

    return law


def top_k(input: Tensor, k: int = 1, sorted: bool = True, index_type: str = "int32") -> Any:
    _only(index_type=(_named_dtype(index_type), "int32"))
    return list(ops.top_k(input, int(k), sorted=bool(sorted)))


def l2_normalize(x: Tensor, axis: Any = None, epsilon: float = 1e-12) -> Any:
    # x·rsqrt(max(Σx², ε)); keras.ops.normalize bounds the norm itself
    total = ops.sum(ops.square(x), axis=_axes(axis), keepdims=True)
    return _typed(ops.multiply(x, ops.rsqrt(ops.maximum(total, _as(epsilon, _dtype(x))))), _dtype(x))


def batch_normalization(
    x: Tensor, mean: Tensor, variance: Tensor, offset: Tensor = None, scale: Tensor = None, variance_epsilon: float = 0
) -> Any:
    # x·i + (offset - mean·i) with i = scale·rsqrt(variance + ε)
    dtype = _dtype(x)
    factor = _settled(ops.rsqrt(ops.add(_as(variance, dtype), _as(variance_epsilon, dtype))))
    if scale is not None:
        factor = _settled(ops.multiply(factor, _as(scale, dtype)))
    shift = _settled(ops.multiply(_as(mean, dtype), factor))
    shift = ops.negative(shift) if offset is None else ops.subtract(_as(offset, dtype), shift)
    return _typed(ops.add(ops.multiply(x, factor), _settled(shift)), dtype)


def local_response_normalization(
    input: Tensor, depth_radius: int = 5, bias: float = 1.0, alpha: float = 1.0, beta: float = 0.5
) -> Any:
    # x / (bias + α·Σ x²)^β, summed over the channels within the radius: a product with a band of ones
    channels = np.arange(input.shape[-1])
    band = (np.abs(channels[:, None] - channels) <= depth_radius).astype(_dtype(input))
    total = ops.matmul(ops.square(input), band)
    return ops.divide(input, ops.power(ops.add(ops.multiply(total, float(alpha)), float(bias)), float(beta)))


# Laws: shapes


def concat(values: Tensor, axis: Any) -> Any:
    if keras.utils.is_keras_tensor(values):
        return values
    if len(values) == 1:
        return values[0]
    return _typed(ops.concatenate(_together(*values), axis=_ints(axis)[0]), _common(*values))


def stack(values: Tensor, axis: int = 0) -> Any:
    return _typed(ops.stack(_together(*values), axis=int(axis)), _common(*values))


def unstack(value: Tensor, num: int | None = None, axis: int = 0) -> Any:
    return list(ops.unstack(value, num=None if num is None else int(num), axis=int(axis)))


def split(value: Tensor, num_or_size_splits: Any, axis: Any = 0, num: int | None = None) -> Any:
    axis = _ints(axis)[0]
    length = value.shape[axis]
    if np.ndim(num_or_size_splits) == 0:
        parts = int(num_or_size_splits)
        if length is not None and length % parts:  # Keras makes uneven parts, TensorFlow none
            raise _RefusedError(f"of {length} into {parts}")
        return list(ops.split(value, parts, axis=axis))
    sizes = _ints(num_or_size_splits)
    if length is None:
        raise _RefusedError("along an axis whose length is not known")
    sizes = [length - sum(sizes) - 1 if size == -1 else size for size in sizes]  # -1: what is left
    if sum(sizes) != length or min(sizes) < 0:
        raise _RefusedError(f"of {length} into {sizes}")
    return list(ops.split(value, np.cumsum(sizes)[:-1].tolist(), axis=axis)) if len(sizes) > 1 else [value]


def tile(input: Tensor, multiples: Any) -> Any:
    return ops.tile(input, _ints(multiples))


def repeat(input: Tensor, repeats: Any, axis: int | None = None) -> Any:
    counts = _ints(repeats)
    return ops.repeat(input, counts[0] if len(counts) == 1 else counts, axis=None if axis is None else int(axis))


def expand_dims(input: Tensor, axis: Any) -> Any:
    return ops.expand_dims(input, _ints(axis)[0])


def squeeze(input: Tensor, axis: Any = None) -> Any:
    if axis is None or np.size(axis) == 0:
        if None in input.shape:  # a batch of one would lose its axis
            raise _RefusedError("without an axis, whose result depends on the size of the input")
        return ops.squeeze(input)
    return ops.squeeze(input, axis=_axes(axis))


def reshape(tensor: Tensor, shape: Extents) -> Any:
    wanted = _listed(shape)
    unknown = [place for place, extent in enumerate(wanted) if isinstance(extent, Extent) or extent == -1]
    if len(unknown) <= 1:  # the number of elements leaves no choice
        return ops.reshape(tensor, tuple(-1 if place in unknown else extent for place, extent in enumerate(wanted)))
    batch = wanted[0]
    if len(unknown) == 2 and isinstance(batch, Extent) and _is_batch_of(batch, tensor):
        rest = [-1 if isinstance(extent, Extent) else extent for extent in wanted[1:]]
        return _by_layer(keras.layers.Reshape, tensor, rest)
    raise _RefusedError("with a shape of which more than one length is known only when the model runs")


def _is_batch_of(extent: Extent, tensor: Any) -> bool:
    if extent.tensor is None or extent.axis != 0 or extent.factor != 1:
        return False
    return extent.tensor is tensor or (_is_batch(extent.tensor) and _is_batch(tensor))


def transpose(a: Tensor, perm: Any = None, conjugate: bool = False) -> Any:
    return ops.transpose(a, axes=None if perm is None else _ints(perm))


def pad(tensor: Tensor, paddings: Any, mode: str = "CONSTANT", constant_values: float = 0) -> Any:
    widths = np.asarray(paddings).astype(int).tolist()
    if mode.upper() == "CONSTANT":
        return ops.pad(tensor, widths, mode="constant", constant_values=_as(constant_values, _dtype(tensor)))
    if mode.upper() not in ("REFLECT", "SYMMETRIC"):
        raise _RefusedError(f"with mode={mode!r}")
    return ops.pad(tensor, widths, mode=mode.lower())


def reverse(tensor: Tensor, axis: Any) -> Any:
    return ops.flip(tensor, axis=_ints(axis))


def roll(input: Tensor, shift: Any, axis: Any) -> Any:
    return ops.roll(input, _axes(shift), axis=_axes(axis))


def _flip_image(axis: int) -> Law:
    def law(image: Tensor) -> Any:  # (batch,) height, width, channels
        return ops.flip(image, axis=axis)

    return law


def depth_to_space(input: Tensor, block_size: int, data_format: str = "NHWC") -> Any:
    return ops.depth_to_space(input, int(block_size), data_format=_image_format(data_format))


def space_to_depth(input: Tensor, block_size: int, data_format: str = "NHWC") -> Any:
    return ops.space_to_depth(input, int(block_size), data_format=_image_format(data_format))


def _image_format(data_format: str) -> str:
    try:
        return {"NHWC": "channels_last", "NCHW": "channels_first"}[data_format]
    except KeyError:
        raise _RefusedError(f"with data_format={data_format!r}") from None


def getitem(tensor: Tensor, slice_spec: Any = None) -> Any:
    spec = slice_spec if isinstance(slice_spec, list) else [slice_spec]
    key = tuple(int(part) if isinstance(part, np.integer) else part for part in spec)
    if not all(part is None or part is Ellipsis or type(part) in (int, slice) for part in key):
        raise _RefusedError("with an index that is no slice")
    return ops.get_item(tensor, key) if keras.utils.is_keras_tensor(tensor) else np.asarray(tensor)[key]


def strided_slice(
    input_: Tensor,
    begin: Any,
    end: Any,
    strides: Any = None,
    begin_mask: int = 0,
    end_mask: int = 0,
    ellipsis_mask: int = 0,
    new_axis_mask: int = 0,
    shrink_axis_mask: int = 0,
) -> Any:
    return getitem(
        input_,
        _slices(begin, end, strides, begin_mask, end_mask, ellipsis_mask, new_axis_mask, shrink_axis_mask),
    )


def _slices(begin: Any, end: Any, strides: Any, first: int, last: int, rest: int, new: int, shrink: int) -> list[Any]:
    """Bit i of a mask speaks of part i; the masks are judged in this order."""
    starts, stops = _ints(begin), _ints(end)
    steps = [1] * len(starts) if strides is None else _ints(strides)
    key: list[Any] = []
    for i, (start, stop, step) in enumerate(zip(starts, stops, steps, strict=True)):
        bit = 1 << i
        if rest & bit:
            key.append(Ellipsis)
        elif new & bit:
            key.append(None)
        elif shrink & bit:
            key.append(start)
        else:
            key.append(slice(None if first & bit else start, None if last & bit else stop, step))
    return key


def slice_(input_: Tensor, begin: Any, size: Any) -> Any:
    parts = zip(_ints(begin), _ints(size), strict=True)
    return getitem(input_, [slice(start, None if count == -1 else start + count) for start, count in parts])


def gather(params: Tensor, indices: Tensor, axis: Any = 0, batch_dims: int = 0) -> Any:
    _only(batch_dims=(int(batch_dims), 0))
    chosen = indices if keras.utils.is_keras_tensor(indices) else np.asarray(indices, "int32")
    return _typed(ops.take(_as(params, _dtype(params)), chosen, axis=_ints(axis)[0]), _dtype(params))


def one_hot(
    indices: Tensor, depth: int, on_value: Any = None, off_value: Any = None, axis: int = -1, dtype: str | None = None
) -> Any:
    _only(on_value=(on_value or 1, 1), off_value=(off_value or 0, 0))
    given = next((value for value in (on_value, off_value) if value is not None), 1.0)
    wanted = _dtype(given) if dtype is None else _named_dtype(dtype)
    return ops.one_hot(indices, int(depth), axis=int(axis), dtype=wanted)


def batch_flatten(x: Tensor) -> Any:
    return _by_layer(keras.layers.Flatten, x, data_format="channels_last")


# Laws: products, windows


def matmul(
    a: Tensor,
    b: Tensor,
    transpose_a: bool = False,
    transpose_b: bool = False,
    adjoint_a: bool = False,
    adjoint_b: bool = False,
) -> Any:
    left, right = _together(a, b)
    if transpose_a or adjoint_a:  # the same for real numbers
        left = _settled(ops.swapaxes(left, -1, -2))
    if transpose_b or adjoint_b:
        right = _settled(ops.swapaxes(right, -1, -2))
    return _typed(ops.matmul(left, right), _common(a, b))


def tensordot(a: Tensor, b: Tensor, axes: Any) -> Any:
    left, right = _together(a, b)
    chosen = int(axes) if np.ndim(axes) == 0 else [_ints(side) for side in axes]
    return _typed(ops.tensordot(left, right, axes=chosen), _common(a, b))


def bias_add(value: Tensor, bias: Tensor, data_format: str = "NHWC") -> Any:
    _, bias = _together(value, bias)
    if data_format.startswith("NC"):  # the channels stand second: NCHW, NC..
        bias = _settled(ops.reshape(bias, (-1, *[1] * (len(value.shape) - 2))))
    return _typed(ops.add(value, bias), _dtype(value))


def _window(value: Any, axes: int) -> int | list[int]:
    """Sizes along the axes of space, of TensorFlow's one, ``axes`` or ``axes + 2`` numbers; one where all agree."""
    sizes = _ints(value)
    if len(sizes) == axes + 2 and sizes[0] == sizes[-1] == 1:
        sizes = sizes[1:-1]
    if len(sizes) not in (1, axes):
        raise _RefusedError(f"with the sizes {sizes}")
    return sizes[0] if len(set(sizes)) == 1 else sizes


def _spatial(tensor: Any, padding: Any, data_format: str | None, axes: int | None) -> int:
    """The number of axes of space, where space is padded by name and the channels are last."""
    if padding not in ("SAME", "VALID"):
        raise _RefusedError(f"with padding={padding!r}")
    if data_format not in (None, "NWC", "NHWC", "NDHWC"):
        raise _RefusedError(f"with data_format={data_format!r}")
    found = len(tensor.shape) - 2
    if found not in ((1, 2, 3) if axes is None else (axes,)):
        raise _RefusedError(f"on a tensor of rank {found + 2}")
    return found


def _pool(op: Law, axes: int | None = None) -> Law:
    def law(input: Tensor, ksize: Any, strides: Any, padding: str, data_format: str | None = None) -> Any:
        count = _spatial(input, padding, data_format, axes)
        size, step = _window(ksize, count), _window(strides, count)
        return op(input, size, step, padding.lower(), data_format="channels_last")

    return law


def conv2d(
    input: Tensor, filters: Tensor, strides: Any, padding: str, data_format: str | None = None, dilations: Any = 1
) -> Any:
    return _convolved(ops.conv, input, filters, strides, padding, data_format, dilations)


def depthwise_conv2d(
    input: Tensor, filters: Tensor, strides: Any, padding: str, data_format: str | None = None, dilations: Any = 1
) -> Any:
    return _convolved(ops.depthwise_conv, input, filters, strides, padding, data_format, dilations)


def _convolved(
    op: Law, input: Any, filters: Any, strides: Any, padding: str, data_format: str | None, dilations: Any
) -> Any:
    count = _spatial(input, padding, data_format, 2)
    image, kernel = _together(input, filters)
    return op(
        image,
        kernel,
        _window(strides, count),
        padding.lower(),
        data_format="channels_last",
        dilation_rate=_window(dilations, count),
    )


# Laws: resizing images (batch, height, width, channels) or (height, width, channels)

_METHODS = frozenset(("bilinear", "nearest", "bicubic", "lanczos3", "lanczos5"))  # area, gaussian...: not in Keras
_METHODS_V1 = {0: "bilinear", 1: "nearest", 2: "bicubic", 3: "area"}


def resize(
    images: Tensor,
    size: Extents,
    method: str = "bilinear",
    preserve_aspect_ratio: bool = False,
    antialias: bool = False,
) -> Any:
    """TensorFlow 2: pixel centres at (i + ½)·in/out - ½, as in Keras."""
    _only(preserve_aspect_ratio=(bool(preserve_aspect_ratio), False))
    if method not in _METHODS:
        raise _RefusedError(f"with method={method!r}")
    wanted = _listed(size)
    if any(isinstance(extent, Extent) for extent in wanted):
        _only(antialias=(bool(antialias), False))
        return _enlarged(images, wanted, method)
    if method != "nearest":  # always computed and returned in float32, even where the size stays
        images = _as_float32(images)
    return ops.image.resize(
        images, tuple(wanted), interpolation=method, antialias=bool(antialias), data_format="channels_last"
    )


def _as_float32(images: Any) -> Any:
    return images if _dtype(images) == "float32" else ops.cast(images, "float32")


def _enlarged(images: Any, wanted: Sequence[Any], method: str) -> Any:
    """Whole multiples of a height and width that are known only when the model runs."""
    factors = []
    for axis, extent in zip((1, 2), wanted, strict=True):
        if not isinstance(extent, Extent) or extent.tensor is not images or extent.axis != axis:
            raise _RefusedError("with a size that is no whole multiple of the size of its input")
        factors.append(extent.factor)
    if method != "nearest":
        images = _as_float32(images)
    return _by_layer(keras.layers.UpSampling2D, images, factors, data_format="channels_last", interpolation=method)


def resize_images(
    images: Tensor, size: Extents, method: Any = 0, align_corners: bool = False, preserve_aspect_ratio: bool = False
) -> Any:
    """TensorFlow 1, which puts pixel corners on one another."""
    _only(preserve_aspect_ratio=(bool(preserve_aspect_ratio), False))
    name = _METHODS_V1.get(method, method)
    if name not in _RESIZES_V1:
        raise _RefusedError(f"with method={name!r}")
    if list(images.shape[-3:-1]) == _listed(size):  # as they are, dtype included
        return images
    return _RESIZES_V1[name](images, size, align_corners)


def resize_nearest_neighbor(
    images: Tensor, size: Extents, align_corners: bool = False, half_pixel_centers: bool = False
) -> Any:
    if half_pixel_centers and not align_corners:
        return resize(images, size, "nearest")
    for axis, wanted in zip((1, 2), _fixed(images, size), strict=True):
        at = _positions(images.shape[axis], wanted, align_corners, half_pixel_centers)
        # with aligned corners halves are rounded away from zero, else the position is cut
        near = np.floor(at + np.float32(0.5)) if align_corners else np.floor(at)
        images = ops.take(images, np.clip(near, 0, images.shape[axis] - 1).astype("int32"), axis=axis)
    return images


def resize_bilinear(
    images: Tensor, size: Extents, align_corners: bool = False, half_pixel_centers: bool = False
) -> Any:
    if half_pixel_centers and not align_corners:
        return resize(images, size, "bilinear")
    heights_and_widths = _fixed(images, size)
    images = _as_float32(images)
    for axis, wanted in ((2, heights_and_widths[1]), (1, heights_and_widths[0])):  # TensorFlow: rows first
        length = images.shape[axis]
        at = _positions(length, wanted, align_corners, half_pixel_centers)
        low = np.maximum(np.floor(at), 0).astype("int32")
        high = np.minimum(np.ceil(at), length - 1).astype("int32")
        share = (at - np.floor(at)).reshape((-1, 1, 1) if axis == 1 else (-1, 1))
        below = ops.take(images, low, axis=axis)
        step = ops.subtract(ops.take(images, high, axis=axis), below)
        images = ops.add(below, ops.multiply(step, share))
    return images


def _fixed(images: Any, size: Any) -> list[int]:
    wanted = _listed(size)
    known = len(images.shape) == 4 and None not in images.shape[1:3]
    if not known or any(isinstance(extent, Extent) for extent in wanted):
        raise _RefusedError("with corners on one another (not half_pixel_centers) and a size that is not fixed")
    return wanted


_MAX_PIXELS = 1 << 16  # along one axis


def _positions(length: int, wanted: int, align_corners: bool, half_pixel_centers: bool) -> Any:
    """Where the new pixels lie among the old ones, in float32 as TensorFlow computes it."""
    if not 0 < wanted <= _MAX_PIXELS:
        raise _RefusedError(f"to {wanted} pixels")
    aligned = align_corners and wanted > 1
    scale = np.float32(length - 1) / np.float32(wanted - 1) if aligned else np.float32(length) / np.float32(wanted)
    if half_pixel_centers:
        raise _RefusedError("with align_corners and half_pixel_centers, which TensorFlow refuses too")
    return np.arange(wanted, dtype="float32") * scale


_RESIZES_V1: dict[str, Law] = {"bilinear": resize_bilinear, "nearest": resize_nearest_neighbor}


# Laws: extents


def shape(input: Tensor, out_type: str = "int32") -> Any:
    if not keras.utils.is_keras_tensor(input):
        return np.asarray(np.shape(input), "int32")
    return _packed([Extent(input, axis) if length is None else length for axis, length in enumerate(input.shape)])


def size(input: Tensor, out_type: str = "int32") -> Any:
    return _product(_listed(shape(input)))


def rank(input: Tensor) -> Any:
    return len(input.shape)


def _packed(extents: Sequence[Any]) -> Any:
    if any(isinstance(extent, Extent) for extent in extents):
        return Shape(tuple(extents))
    return np.asarray(extents, "int32")


def _listed(value: Any) -> list[Any]:
    """The lengths in a shape that was given as a list, array, number, extent or shape, or a mixture."""
    if isinstance(value, Shape):
        return list(value.extents)
    if isinstance(value, Extent):
        return [value]
    if isinstance(value, list):
        return [extent for item in value for extent in _listed(item)]
    if keras.utils.is_keras_tensor(value):
        raise _RefusedError("with a tensor in a shape, where only constants and tf.shape have an equivalent")
    return _ints(value)


def _product(extents: Sequence[Any]) -> Any:
    unknown = [extent for extent in extents if isinstance(extent, Extent)]
    factor = math.prod(extent for extent in extents if not isinstance(extent, Extent))
    if not unknown:
        return factor
    if len(unknown) > 1 or unknown[0].tensor is None or factor < 1:
        return Extent()
    return Extent(unknown[0].tensor, unknown[0].axis, unknown[0].factor * factor)


def _each(combine: Callable[[Any, Any], Any]) -> Law:
    """Two lengths or, place by place, two shapes; one length meets every place."""

    def law(x: Any, y: Any) -> Any:
        left, right = _listed(x), _listed(y)
        length = max(len(left), len(right))
        if {len(left), len(right)} - {1, length}:
            raise _RefusedError("on shapes of different lengths")
        pairs = zip(left * (length // len(left)), right * (length // len(right)), strict=True)
        found = [combine(a, b) for a, b in pairs]
        return _packed(found) if any(isinstance(side, (Shape, list, np.ndarray)) for side in (x, y)) else found[0]

    return law


def _if_known(combine: Callable[[int, int], int]) -> Law:
    return _each(lambda a, b: Extent() if isinstance(a, Extent) or isinstance(b, Extent) else combine(a, b))


def _extents_getitem(tensor: Any, slice_spec: Any = None) -> Any:
    spec = slice_spec if isinstance(slice_spec, list) else [slice_spec]
    if len(spec) != 1 or not isinstance(tensor, Shape) or type(spec[0]) not in (int, slice):
        raise _RefusedError("with an index that is no slice of a shape")
    found = tensor.extents[spec[0]]
    return _packed(found) if isinstance(found, tuple) else found


def _extents_strided_slice(input_: Any, begin: Any, end: Any, strides: Any = None, *masks: int) -> Any:
    return _extents_getitem(input_, _slices(begin, end, strides, *masks))


def _extents_cast(x: Any, dtype: str) -> Any:
    if _named_dtype(dtype) not in ("int32", "int64"):
        raise _RefusedError("to compute with a length that is known only when the model runs")
    return x


def _extents_prod(input_tensor: Any, axis: Any = None, keepdims: bool = False) -> Any:
    return _product(_listed(input_tensor))


def _extents_unstack(value: Any, num: int | None = None, axis: int = 0) -> Any:
    return _listed(value)


def _extents_concat(values: Any, axis: Any) -> Any:
    return _packed(_listed(values))


def _extents_stack(values: Any, axis: int = 0) -> Any:
    return _packed(_listed(values))


# The tables. A function's key is its name without the namespaces that do not tell functions apart.

_ADD, _SUBTRACT, _MULTIPLY = _binary(ops.add), _binary(ops.subtract), _binary(ops.multiply)
_FLOORDIV, _PROD = _binary(ops.floor_divide), _reduction(ops.prod)
_EQUAL, _NOT_EQUAL = _equality(ops.equal), _equality(ops.not_equal)
_ROUND = _unary(ops.round)  # halves to even in both

FUNCTIONS: dict[str | None, Law] = {
    "add": _ADD,
    "subtract": _SUBTRACT,
    "multiply": _MULTIPLY,
    "truediv": truediv,
    "divide": truediv,
    "divide_no_nan": _binary(ops.divide_no_nan),
    "floordiv": _FLOORDIV,
    "floor_div": _FLOORDIV,
    "floormod": _binary(ops.mod),  # the sign of the divisor, as in Python
    "pow": _binary(ops.power),
    "maximum": _binary(ops.maximum),
    "minimum": _binary(ops.minimum),
    "squared_difference": squared_difference,
    "atan2": atan2,
    "add_n": add_n,
    "equal": _EQUAL,
    "eq": _EQUAL,
    "not_equal": _NOT_EQUAL,
    "ne": _NOT_EQUAL,
    "less": _binary(ops.less, "bool"),
    "less_equal": _binary(ops.less_equal, "bool"),
    "greater": _binary(ops.greater, "bool"),
    "greater_equal": _binary(ops.greater_equal, "bool"),
    "logical_and": _binary(ops.logical_and),
    "logical_or": _binary(ops.logical_or),
    "logical_xor": _binary(ops.logical_xor),
    "logical_not": _unary(ops.logical_not),
    "is_nan": _test(ops.isnan),
    "is_inf": _test(ops.isinf),
    "is_finite": _test(ops.isfinite),
    "abs": _unary(ops.abs),
    "negative": _unary(ops.negative),
    "sign": _unary(ops.sign),
    "floor": _unary(ops.floor),
    "ceil": _unary(ops.ceil),
    "round": _ROUND,
    "rint": _ROUND,
    "square": _unary(ops.square),
    "sqrt": _unary(ops.sqrt),
    "rsqrt": _unary(ops.rsqrt),
    "reciprocal": _unary(ops.reciprocal),
    "exp": _unary(ops.exp),
    "expm1": _unary(ops.expm1),
    "log": _unary(ops.log),
    "log1p": _unary(ops.log1p),
    "erf": _unary(ops.erf),
    "sin": _unary(ops.sin),
    "cos": _unary(ops.cos),
    "tan": _unary(ops.tan),
    "asin": _unary(ops.arcsin),
    "acos": _unary(ops.arccos),
    "atan": _unary(ops.arctan),
    "sinh": _unary(ops.sinh),
    "cosh": _unary(ops.cosh),
    "tanh": _unary(ops.tanh),
    "sigmoid": _unary(ops.sigmoid),
    "log_sigmoid": _unary(ops.log_sigmoid),
    "softplus": _unary(ops.softplus),
    "softsign": _unary(ops.softsign),
    "relu": _unary(ops.relu),
    "relu6": _unary(ops.relu6),
    "elu": _unary(ops.elu),
    "selu": _unary(ops.selu),
    "leaky_relu": leaky_relu,
    "silu": silu,
    "gelu": gelu,
    "crelu": crelu,
    "softmax": softmax,
    "log_softmax": log_softmax,
    "clip_by_value": clip_by_value,
    "cast": cast,
    "identity": identity,
    "stop_gradient": _unary(ops.stop_gradient),
    "convert_to_tensor": convert_to_tensor,
    "zeros_like": like(ops.zeros_like),
    "ones_like": like(ops.ones_like),
    "where": where,
    "compat.v1.where": select,
    "reduce_sum": _reduction(ops.sum),
    "reduce_mean": _reduction(ops.mean),
    "reduce_max": _reduction(ops.max),
    "reduce_min": _reduction(ops.min),
    "reduce_prod": _PROD,
    "reduce_any": _reduction(ops.any),
    "reduce_all": _reduction(ops.all),
    "reduce_variance": _reduction(ops.var),  # of the population, in both
    "reduce_std": _reduction(ops.std),
    "reduce_logsumexp": _reduction(ops.logsumexp),
    "reduce_euclidean_norm": euclidean_norm,
    "norm": norm,
    "argmax": _arg(ops.argmax),
    "argmin": _arg(ops.argmin),
    "cumsum": _cumulative(ops.cumsum),
    "cumprod": _cumulative(ops.cumprod),
    "top_k": top_k,
    "l2_normalize": l2_normalize,
    "batch_normalization": batch_normalization,
    "local_response_normalization": local_response_normalization,
    "concat": concat,
    "stack": stack,
    "unstack": unstack,
    "split": split,
    "tile": tile,
    "repeat": repeat,
    "expand_dims": expand_dims,
    "squeeze": squeeze,
    "reshape": reshape,
    "transpose": transpose,
    "pad": pad,
    "reverse": reverse,
    "roll": roll,
    "depth_to_space": depth_to_space,
    "space_to_depth": space_to_depth,
    "getitem": getitem,
    "strided_slice": strided_slice,
    "slice": slice_,
    "gather": gather,
    "one_hot": one_hot,
    "keras.backend.batch_flatten": batch_flatten,
    "matmul": matmul,
    "tensordot": tensordot,
    "bias_add": bias_add,
    "max_pool": _pool(ops.max_pool),
    "max_pool1d": _pool(ops.max_pool, 1),
    "max_pool2d": _pool(ops.max_pool, 2),
    "avg_pool": _pool(ops.average_pool),  # windows over the edge are divided by what lies inside, in both
    "avg_pool1d": _pool(ops.average_pool, 1),
    "avg_pool2d": _pool(ops.average_pool, 2),
    "conv2d": conv2d,
    "depthwise_conv2d": depthwise_conv2d,
    "shape": shape,
    "size": size,
    "rank": rank,
    "image.resize": resize,
    "image.resize_images": resize_images,
    "image.resize_bilinear": resize_bilinear,
    "image.resize_nearest_neighbor": resize_nearest_neighbor,
    "image.flip_left_right": _flip_image(-2),
    "image.flip_up_down": _flip_image(-3),
}

# Functions of which the file does not say enough.
_UNWRITTEN = {
    "einsum": "whose operands tf.keras does not write to the file",
    "meshgrid": "whose operands tf.keras does not write to the file",
    "dropout": "which drops at random in inference too",
}


def _concat_v2(*inputs: Tensor) -> Any:
    return concat(list(inputs[:-1]), inputs[-1])


def _pack(*inputs: Tensor, axis: int = 0) -> Any:
    return stack(list(inputs), axis)


def _add_all(*inputs: Tensor) -> Any:
    return add_n(list(inputs))


def _split_raw(axis: Any, value: Tensor, num: int) -> Any:
    return split(value, num, axis)


def _split_v(value: Tensor, size_splits: Any, axis: Any, num: int | None = None) -> Any:
    return split(value, size_splits, axis)


def _pad_v2(tensor: Tensor, paddings: Any, constant_values: Any) -> Any:
    return pad(tensor, paddings, "CONSTANT", constant_values)


def _mirror_pad(tensor: Tensor, paddings: Any, mode: str) -> Any:
    return pad(tensor, paddings, mode)


def _one_hot_raw(indices: Tensor, depth: Any, on_value: Any, off_value: Any, axis: int = -1) -> Any:
    _floating(on_value)  # of integers the file does not say the width here
    return one_hot(indices, depth, on_value, off_value, axis)


def _matmul_raw(a: Tensor, b: Tensor, transpose_a: bool = False, transpose_b: bool = False) -> Any:
    return matmul(a, b, transpose_a, transpose_b)


def _batch_matmul(x: Tensor, y: Tensor, adj_x: bool = False, adj_y: bool = False) -> Any:
    return matmul(x, y, adj_x, adj_y)


def _einsum(*inputs: Tensor, equation: str) -> Any:
    operands = _together(*inputs)
    return _typed(ops.einsum(equation, *operands), _common(*inputs))


def _conv_raw(op: Law) -> Law:
    def law(
        input: Tensor,
        filters: Tensor,
        strides: Any,
        padding: str,
        data_format: str = "NHWC",
        dilations: Any = 1,
        explicit_paddings: Any = (),
    ) -> Any:
        return op(input, filters, strides, padding, data_format, dilations)  # padding="EXPLICIT" is refused there

    return law


def _pool_raw(op: Law) -> Law:
    pool = _pool(op, 2)

    def law(
        input: Tensor, ksize: Any, strides: Any, padding: str, data_format: str = "NHWC", explicit_paddings: Any = ()
    ) -> Any:
        return pool(input, ksize, strides, padding, data_format)

    return law


RAW: dict[Any, Law] = {
    "Add": _ADD,
    "AddV2": _ADD,
    "AddN": _add_all,
    "Sub": _SUBTRACT,
    "Mul": _MULTIPLY,
    "RealDiv": truediv,
    "DivNoNan": FUNCTIONS["divide_no_nan"],
    "FloorDiv": _FLOORDIV,
    "FloorMod": FUNCTIONS["floormod"],
    "Pow": FUNCTIONS["pow"],
    "Maximum": FUNCTIONS["maximum"],
    "Minimum": FUNCTIONS["minimum"],
    "SquaredDifference": squared_difference,
    "Equal": _EQUAL,
    "NotEqual": _NOT_EQUAL,
    "Less": FUNCTIONS["less"],
    "LessEqual": FUNCTIONS["less_equal"],
    "Greater": FUNCTIONS["greater"],
    "GreaterEqual": FUNCTIONS["greater_equal"],
    "LogicalAnd": FUNCTIONS["logical_and"],
    "LogicalOr": FUNCTIONS["logical_or"],
    "LogicalNot": FUNCTIONS["logical_not"],
    "Abs": FUNCTIONS["abs"],
    "Neg": FUNCTIONS["negative"],
    "Sign": FUNCTIONS["sign"],
    "Floor": FUNCTIONS["floor"],
    "Ceil": FUNCTIONS["ceil"],
    "Round": _ROUND,
    "Rint": _ROUND,
    "Square": FUNCTIONS["square"],
    "Sqrt": FUNCTIONS["sqrt"],
    "Rsqrt": FUNCTIONS["rsqrt"],
    "Reciprocal": FUNCTIONS["reciprocal"],
    "Exp": FUNCTIONS["exp"],
    "Log": FUNCTIONS["log"],
    "Log1p": FUNCTIONS["log1p"],
    "Erf": FUNCTIONS["erf"],
    "Sin": FUNCTIONS["sin"],
    "Cos": FUNCTIONS["cos"],
    "Tanh": FUNCTIONS["tanh"],
    "Sigmoid": FUNCTIONS["sigmoid"],
    "Softplus": FUNCTIONS["softplus"],
    "Softsign": FUNCTIONS["softsign"],
    "Relu": FUNCTIONS["relu"],
    "Relu6": FUNCTIONS["relu6"],
    "Elu": FUNCTIONS["elu"],
    "Selu": FUNCTIONS["selu"],
    "LeakyRelu": leaky_relu,
    "Softmax": softmax,
    "LogSoftmax": log_softmax,
    "ClipByValue": clip_by_value,
    "Cast": cast,
    "Identity": identity,
    "StopGradient": FUNCTIONS["stop_gradient"],
    "ZerosLike": FUNCTIONS["zeros_like"],
    "OnesLike": FUNCTIONS["ones_like"],
    "Select": select,
    "SelectV2": where,
    "Sum": FUNCTIONS["reduce_sum"],
    "Mean": FUNCTIONS["reduce_mean"],
    "Max": FUNCTIONS["reduce_max"],
    "Min": FUNCTIONS["reduce_min"],
    "Prod": _PROD,
    "Any": FUNCTIONS["reduce_any"],
    "All": FUNCTIONS["reduce_all"],
    "ArgMax": FUNCTIONS["argmax"],
    "ArgMin": FUNCTIONS["argmin"],
    "LRN": local_response_normalization,
    "ConcatV2": _concat_v2,
    "Pack": _pack,
    "Unpack": unstack,
    "Split": _split_raw,
    "SplitV": _split_v,
    "Tile": tile,
    "ExpandDims": expand_dims,
    "Squeeze": squeeze,
    "Reshape": reshape,
    "Transpose": transpose,
    "Pad": pad,
    "PadV2": _pad_v2,
    "MirrorPad": _mirror_pad,
    "ReverseV2": reverse,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
    "StridedSlice": strided_slice,
    "Slice": slice_,
    "GatherV2": gather,
    "OneHot": _one_hot_raw,
    "MatMul": _matmul_raw,
    "BatchMatMul": _batch_matmul,
    "BatchMatMulV2": _batch_matmul,
    "Einsum": _einsum,
    "BiasAdd": bias_add,
    "MaxPool": _pool_raw(ops.max_pool),
    "AvgPool": _pool_raw(ops.average_pool),
    "Conv2D": _conv_raw(conv2d),
    "DepthwiseConv2dNative": _conv_raw(depthwise_conv2d),
    "Shape": shape,
    "ResizeBilinear": resize_bilinear,
    "ResizeNearestNeighbor": resize_nearest_neighbor,
}

# A few numbers in the file could make these fill the memory, were they computed at once.
_GROWING = frozenset((tile, repeat, pad, _pad_v2, _mirror_pad, one_hot, _one_hot_raw, resize, resize_images))

# What the same functions do to lengths that are known only when the model runs.
_EXTENT_LAWS: dict[Law, Law] = {
    _MULTIPLY: _each(lambda a, b: _product([a, b])),
    _ADD: _if_known(operator.add),
    _SUBTRACT: _if_known(operator.sub),
    _FLOORDIV: _if_known(operator.floordiv),
    _PROD: _extents_prod,
    getitem: _extents_getitem,
    strided_slice: _extents_strided_slice,
    cast: _extents_cast,
    identity: lambda input: input,
    convert_to_tensor: lambda value, dtype=None, dtype_hint=None: value,
    stack: _extents_stack,
    _pack: lambda *inputs, axis=0: _packed(_listed(list(inputs))),
    concat: _extents_concat,
    _concat_v2: lambda *inputs: _packed(_listed(list(inputs[:-1]))),
    unstack: _extents_unstack,
}
