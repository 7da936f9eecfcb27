"""Surgery: a trained model in, its body with a new head out.

    base      the model handed in; never modified, shares nothing with what comes out
    body      everything that leads to the feature point, cloned with its weights and its names
    head      [pooling or Flatten,] hidden Dense layers with Dropout, a Dense with its activation
    features  what the first Dense of the head reads, a vector for each sample: what training may cache

The feature point is the last tensor in front of the classifier. The classifier is found by walking back from the
output over what only rearranges or squashes its answer (`_BEHIND`); it must be a Dense, or a convolution that is one
(a 1x1 kernel, as in MobileNet). From its input the walk goes on over Dropout. ``drop`` takes further layers with a
kernel off the top, each with what stands behind it. ``at`` names a layer instead; its output is the feature point.

A feature point must *dominate* the output: every path from an input to an output passes it, so that nothing flows
around the cut. An encoder's bottleneck does; a level of a U-Net with skip connections does not, and is refused.

A classifier without hidden layers starts at zero (Kolesnikov et al. 2020, "Big Transfer"): its problem is convex, every
class starts equally likely, and the first loss is log(classes) whatever the size of the features.

Limits: nested models are inlined, so that depth is counted in layers; a layer that the base calls several times is one
layer of the body. Other outputs of the base go, and inputs that the features do not need.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import keras

from deploykit import graph
from deploykit.errors import InputError, UnsupportedModelError
from deploykit.graph import Node, Trace

L = keras.layers
Task = Literal["softmax", "sigmoid", "multi-label", "regression"]
Pooling = Literal["auto", "average", "max", "flatten"]

# What a head answers with: activation, loss.
TASKS: dict[str, tuple[str, str]] = {
    "softmax": ("softmax", "sparse_categorical_crossentropy"),  # one of k classes
    "sigmoid": ("sigmoid", "binary_crossentropy"),  # one of two classes, as one number
    "multi-label": ("sigmoid", "binary_crossentropy"),  # each of k labels or not
    "regression": ("linear", "mean_squared_error"),  # k numbers
}
_POOLS = {
    ("average", 3): L.GlobalAveragePooling1D,
    ("average", 4): L.GlobalAveragePooling2D,
    ("average", 5): L.GlobalAveragePooling3D,
    ("max", 3): L.GlobalMaxPooling1D,
    ("max", 4): L.GlobalMaxPooling2D,
    ("max", 5): L.GlobalMaxPooling3D,
}
_GLOBAL_POOLS = tuple(_POOLS.values())
_KERNELS = (
    *(L.Dense, L.EinsumDense, L.Conv1D, L.Conv2D, L.Conv3D, L.DepthwiseConv1D, L.DepthwiseConv2D),
    *(L.SeparableConv1D, L.SeparableConv2D, L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose),
)
# What may stand between a classifier and the output: it has no weights and keeps every answer apart.
_BEHIND = (L.Activation, L.Softmax, L.ReLU, L.Dropout, L.Identity, L.Flatten, L.Reshape, *_GLOBAL_POOLS)
_SQUASHING_OPS = ("Softmax", "Sigmoid", "Squeeze", "Reshape", "Identity")
_DROPOUTS = (L.Dropout, L.SpatialDropout1D, L.SpatialDropout2D, L.SpatialDropout3D, L.GaussianDropout)
_LISTED = 6  # candidates that a message names


@dataclass(frozen=True)
class Head:
    """What the new head looks like.

    ``outputs``: classes, labels or numbers. ``hidden``: units of the Dense layers in between, the first next to the
    body. ``dropout`` stands in front of every Dense but the first of several, ``l1`` and ``l2`` weigh all its kernels.
    """

    outputs: int
    task: Task = "softmax"
    hidden: tuple[int, ...] = ()
    dropout: float = 0.0
    l1: float = 0.0
    l2: float = 0.0
    activation: str = "relu"
    pooling: Pooling = "auto"

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise InputError(f"a head for '{self.task}' is unknown; choose one of {', '.join(TASKS)}")
        least = 2 if self.task == "softmax" else 1
        if self.outputs < least:
            raise InputError(f"a {self.task} head with {self.outputs} outputs decides nothing; give at least {least}")
        if self.task == "sigmoid" and self.outputs != 1:
            raise InputError(f"a sigmoid head has one output for two classes, not {self.outputs}; use softmax")
        if any(units < 1 for units in self.hidden):
            raise InputError(f"hidden layers of {list(self.hidden)} units; give numbers above 0")
        if not 0 <= self.dropout < 1:
            raise InputError(f"a dropout of {self.dropout:g} makes no sense; give a share from 0 up to below 1")
        if self.l1 < 0 or self.l2 < 0:
            raise InputError(f"penalties l1 {self.l1:g} and l2 {self.l2:g} must not be negative")
        if self.pooling not in get_args(Pooling):
            raise InputError(f"pooling '{self.pooling}' is unknown; choose one of {', '.join(get_args(Pooling))}")


@dataclass(frozen=True, eq=False)
class Swapped:
    """A body with a new head, all of one functional ``model``, whose body is frozen.

    ``task``: what the head answers. ``body`` goes from the inputs to the features, ``head`` from the features to the
    answer; both share the model's layers. ``gone``: names of the base's layers that are not in it.
    """

    model: Any
    body: Any
    head: Any
    task: Task
    feature_point: str
    body_layers: tuple[str, ...]
    head_layers: tuple[str, ...]
    gone: tuple[str, ...]
    notices: tuple[str, ...] = ()


# --------------------------------------------------------------------------------------- the feature point


def feature_point(found: Trace, at: str | None = None, drop: int = 0) -> int:
    """The tensor that a new head reads: found, or what the layer ``at`` makes; below ``drop`` layers with a kernel.

    Raises InputError where there is none, several, or one that does not dominate the output.
    """
    if drop < 0:
        raise InputError(f"cannot drop {drop} layers; give 0 or more")
    tensor = _found(found) if at is None else _named(found, at)
    for count in range(drop):
        tensor = _below(found, tensor, count + 1)
    shape = found.tensors[tensor].shape
    maker = found.producer(tensor)
    if maker is None:
        raise InputError(f"nothing is left below input '{_place(found, tensor)}'; drop fewer layers")
    if len(shape) < 2 or not found.tensors[tensor].dtype.startswith(("float", "bfloat")):
        raise InputError(
            f"'{maker.name}' makes {found.tensors[tensor].dtype} {list(shape)}, no features; {_candidates(found)}"
        )
    if not dominates(found, tensor):
        raise InputError(
            f"'{maker.name}' does not dominate the output: something flows around it, which a cut would lose; "
            f"{_candidates(found)}"
        )
    return tensor


def _found(found: Trace) -> int:
    if len(found.outputs) != 1:
        raise InputError(f"the model has {len(found.outputs)} outputs; name the feature point with --at LAYER")
    tensor = found.outputs[0]
    pooled = False
    while True:
        node = found.producer(tensor)
        if node is None or len(node.inputs) != 1 or found.calls(node) != 1:
            break
        if _classifies(node, pooled):
            return _before_dropout(found, node.inputs[0])
        if not (isinstance(node.layer, _BEHIND) or graph.key(node.layer) in _SQUASHING_OPS):
            break
        pooled |= isinstance(node.layer, _GLOBAL_POOLS)
        tensor = node.inputs[0]
    raise InputError(
        f"the model ends in no head that is recognised (a Dense or a 1x1 convolution); {_candidates(found)}"
    )


def _classifies(node: Node, pooled: bool) -> bool:
    """A Dense; or a 1x1 convolution of a map of one pixel, or of one that is pooled behind it."""
    layer = node.layer
    if isinstance(layer, L.Dense):
        return not pooled
    if not isinstance(layer, (L.Conv1D, L.Conv2D, L.Conv3D)) or any(size != 1 for size in layer.kernel_size):
        return False
    sizes = layer.output.shape[1:-1] if layer.data_format == "channels_last" else layer.output.shape[2:]
    return pooled or all(size == 1 for size in sizes)


def _before_dropout(found: Trace, tensor: int) -> int:
    node = found.producer(tensor)
    while node is not None and isinstance(node.layer, _DROPOUTS):
        tensor = node.inputs[0]
        node = found.producer(tensor)
    return tensor


def _named(found: Trace, at: str) -> int:
    calls = [node for node in found.nodes if at in (node.name, node.layer.name)]
    if not calls:
        raise InputError(f"the model has no layer '{at}'; {_candidates(found)}")
    if len(calls) > 1 or len(calls[0].outputs) != 1:
        what = f"is called {len(calls)} times" if len(calls) > 1 else f"makes {len(calls[0].outputs)} tensors"
        raise InputError(f"layer '{at}' {what}, so it names no single tensor; {_candidates(found)}")
    return calls[0].outputs[0]


def _below(found: Trace, tensor: int, count: int) -> int:
    """The feature point one layer with a kernel further down."""
    while True:
        node = found.producer(tensor)
        if node is None or len(node.inputs) != 1 or found.calls(node) != 1:
            where = "the input" if node is None else f"'{node.name}'"
            raise InputError(
                f"cannot drop {count} layers: number {count} would be below {where}, where branches meet or nothing is "
                "left; name the feature point with --at LAYER"
            )
        tensor = node.inputs[0]
        if isinstance(node.layer, _KERNELS):
            return _before_dropout(found, tensor)


def dominates(found: Trace, tensor: int) -> bool:
    """Whether every path from an input of the model to any of its outputs passes a tensor."""
    waiting, seen = [index for index in found.outputs if index != tensor], set()
    while waiting:
        index = waiting.pop()
        if index in found.inputs:
            return False
        if index in seen or index == tensor:
            continue
        seen.add(index)
        node = found.producer(index)
        waiting += [given for given in node.inputs if given != tensor] if node is not None else []
    return True


def _dominators(found: Trace) -> Iterator[Node]:
    """Calls whose output could be a feature point, the last first."""
    for node in reversed(found.nodes):
        tensor = found.tensors[node.outputs[0]]
        features = len(tensor.shape) >= 2 and tensor.dtype.startswith(("float", "bfloat"))
        if len(node.outputs) == 1 and features and found.calls(node) == 1 and dominates(found, node.outputs[0]):
            yield node


def _candidates(found: Trace) -> str:
    listed = []
    for node in itertools.islice(_dominators(found), _LISTED):
        sizes = found.tensors[node.outputs[0]].shape[1:]
        listed.append(f"{node.name} {'x'.join('?' if size is None else str(size) for size in sizes)}")
    if not listed:
        return "no layer of it can be one"
    return f"name one with --at: {', '.join(listed)}"


def _place(found: Trace, tensor: int) -> str:
    return found.input_layers[found.inputs.index(tensor)].name if tensor in found.inputs else str(tensor)


# ------------------------------------------------------------------------------------------------ the head


def swap(base: Any, head: Head, *, at: str | None = None, drop: int = 0, seed: int = 0) -> Swapped:
    """A copy of ``base`` whose head is a new one. ``base``: keras.Model, not modified; weights are copied.

    The body is frozen, the head is not. ``seed`` fixes the first weights of hidden layers.

    Raises InputError as `feature_point` does, UnsupportedModelError for a graph that cannot be read or copied.
    """
    found = graph.trace(base)
    fixed = found.tensors[found.inputs[0]].shape[0]
    if fixed is not None:
        raise UnsupportedModelError(f"the base takes batches of {fixed} only; save it with a batch size of None")
    tensor = feature_point(found, at, drop)
    kept = graph.cut(found, tensor)
    body = graph.replay(kept)
    for layer in body.layers:
        layer.trainable = False
    point = found.producer(tensor)
    assert point is not None
    taken = [*(node.name for node in kept.nodes), *(layer.name for layer in kept.input_layers)]
    layers = list(_layers(head, found, tensor, seed))
    for layer, name in zip(layers, graph.distinct([layer.name for layer in layers], taken), strict=True):
        layer.name = name
    vectors = features = body.outputs[0]
    answer = None
    for layer in layers:
        if isinstance(layer, (L.Dropout, L.Dense)):
            answer = layer(vectors if answer is None else answer)
        else:
            vectors = layer(vectors)
    model = keras.Model(body.input, answer, name=found.name)
    start = keras.Input(batch_shape=vectors.shape, dtype=vectors.dtype, name="features")
    answer = start
    for layer in layers:
        if isinstance(layer, (L.Dropout, L.Dense)):
            answer = layer(answer)
    names = {node.name for node in kept.nodes}
    lost = [layer.name for layer in found.input_layers if layer not in kept.input_layers]
    return Swapped(
        model=model,
        body=body if vectors is features else keras.Model(body.input, vectors, name=f"{found.name}_body"),
        head=keras.Model(start, answer, name="head"),
        task=head.task,
        feature_point=point.name,
        body_layers=tuple(node.name for node in kept.nodes),
        head_layers=tuple(layer.name for layer in layers),
        gone=tuple(dict.fromkeys(node.name for node in found.nodes if node.name not in names)),
        notices=tuple(f"the features do not need input '{name}'; the new model has no such input" for name in lost),
    )


def _layers(head: Head, found: Trace, tensor: int, seed: int) -> Iterator[Any]:
    yield from _pooling(head, found, tensor)
    for number, units in enumerate(head.hidden, start=1):
        yield L.Dense(
            units,
            activation=head.activation,
            kernel_initializer=keras.initializers.HeNormal(seed=seed + number),
            kernel_regularizer=_penalty(head),
            dtype="float32",
            name=f"head_hidden_{number}",
        )
        if head.dropout:
            yield L.Dropout(head.dropout, seed=seed + number, dtype="float32", name=f"head_dropout_{number}")
    if head.dropout and not head.hidden:
        yield L.Dropout(head.dropout, seed=seed, dtype="float32", name="head_dropout")
    yield L.Dense(
        head.outputs,
        activation=TASKS[head.task][0],
        kernel_initializer=keras.initializers.GlorotUniform(seed=seed) if head.hidden else "zeros",
        kernel_regularizer=_penalty(head),
        dtype="float32",
        name="head",
    )


def _penalty(head: Head) -> Any:
    return keras.regularizers.L1L2(head.l1, head.l2) if head.l1 or head.l2 else None


def _pooling(head: Head, found: Trace, tensor: int) -> Iterator[Any]:
    """What makes a vector of the features."""
    shape = found.tensors[tensor].shape
    if len(shape) == 2:
        return
    if head.pooling == "flatten":
        if None in shape[1:]:
            raise InputError(f"features of shape {list(shape)} have open sizes and cannot be flattened; use average")
        yield L.Flatten(dtype="float32", name="head_flatten")
        return
    kind = _POOLS.get(("average" if head.pooling == "auto" else head.pooling, len(shape)))
    if kind is None:
        raise UnsupportedModelError(f"features of shape {list(shape)} cannot be pooled; use pooling flatten")
    yield kind(data_format=_data_format(found, tensor), dtype="float32", name="head_pool")


def _data_format(found: Trace, tensor: int) -> str:
    """Where the features keep their channels, as the nearest layer says that knows."""
    node = found.producer(tensor)
    while node is not None:
        known = getattr(node.layer, "data_format", None)
        if known is not None:
            return str(known)
        node = found.producer(node.inputs[0]) if node.inputs else None
    return "channels_last"
