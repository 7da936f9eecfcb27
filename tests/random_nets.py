"""Random nets as programs: what a property test of fusing runs on.

A net is a short list of instructions, drawn from a seed, printed in readable lines and built into a functional
Keras model:

    x0 = Input(7, 5, 4)
    v1 = Conv(x0, filters=3, kernel=3, padding='same')
    v2 = BatchNormalization(v1, stats='dead')
    v3 = Add(v1, v2)
    return v3

`OPS` is the table of instructions: the choices of each option (the first one is the simplest: that is where
shrinking goes), the law of the output shape, and the builder. An instruction that the law rejects is not
generated; the same law tells the shrinker what it may delete. Nets are drawn instruction by instruction, and in
between come whole motifs (pre-activation blocks, dense blocks, inverted residuals, squeeze and excite) that
uniform draws rarely make. Two instructions are not layers: `Again` calls the layer of an earlier instruction once
more, `Nested` is a model inside the model, with a body of its own.

Weights and samples come from the seed and the instruction's own name, so that what is left of a shrunk net has the
numbers it had. They are drawn while the net is built, with the samples running through it: kernels are scaled by
the size of what comes in, and BatchNormalization gets statistics that fit what it sees, then jitter. So values stay
near one at any depth, every branch of an activation is taken, and outputs depend on inputs.

`failure` is the property: fuse does not raise, is exact, does nothing the second time, leaves the source model
alone, and plain Keras (`benchmarks/reprove.py`) agrees. Whether a fold costs too many digits is judged against the own
rounding error of the model given, and a fused model has another than its source: a source that was refused for that
reason may go when the model is fused again. Such nets are counted (`Outcome.reconsidered`).

Limits: float32 models on channels_last tensors with known sizes, rank at most 4 with the batch.
"""

from __future__ import annotations

import importlib.util
import math
import re
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from deploykit import graph
from deploykit.archive import write_keras
from deploykit.fuse import Fused, fuse

L = keras.layers
Shape = tuple[int, ...]  # without the batch; the last axis is the channels
Options = Mapping[str, Any]
Rng = np.random.Generator
Array = npt.NDArray[Any]

LARGEST = 600  # elements of one sample of one tensor
LONGEST = 14  # any axis but that of a vector
SAMPLES = 6
VOCABULARY = 5
SPREAD = 1e-3  # of an output between samples, relative to its size: less is no evidence
LIMIT = 1e6  # of any value inside
EXACT = 1e-11  # float64, unless the net's own noise is larger: then four times that, well inside the proof's bound

# ---------------------------------------------------------------------------------------------- programs


@dataclass(frozen=True)
class Source:
    """An input of a graph: floats of a shape, or ``tokens``."""

    name: str
    shape: Shape
    tokens: bool = False


@dataclass(frozen=True)
class Step:
    """One instruction. Its result is called ``name``; further results ``name.1``, ``name.2``, ..."""

    name: str
    op: str
    on: tuple[str, ...]
    options: tuple[tuple[str, Any], ...] = ()
    body: Graph | None = None  # of Nested

    def lines(self) -> list[str]:
        shown = [f"{key}={value!r}" for key, value in self.options]
        head = f"{self.name} = {self.op}({', '.join([*self.on, *shown])})"
        return [head] if self.body is None else [f"{head}:", *("    " + line for line in self.body.lines())]


@dataclass(frozen=True)
class Graph:
    inputs: tuple[Source, ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]

    def lines(self) -> list[str]:
        inputs = [
            f"{x.name} = {'Tokens' if x.tokens else 'Input'}({', '.join(str(size) for size in x.shape)})"
            for x in self.inputs
        ]
        steps = [line for step in self.steps for line in step.lines()]
        return [*inputs, *steps, f"return {', '.join(self.outputs)}"]

    def calls(self) -> Iterator[Step]:
        """All instructions, those of nested bodies too."""
        for step in self.steps:
            yield step
            if step.body is not None:
                yield from step.body.calls()


@dataclass(frozen=True)
class Program:
    """``negative``: gammas of both signs."""

    seed: int
    negative: bool
    graph: Graph

    def __str__(self) -> str:
        head = f"# seed {self.seed}, gammas {'of both signs' if self.negative else 'positive'}"
        return "\n".join([head, *self.graph.lines()])


# ------------------------------------------------------------------------------------------- shape laws
#
# (shapes of the operands, options) -> shape of the result, or None where the instruction does not fit.

Law = Callable[[Sequence[Shape], Options], Shape | None]


def _same(shapes: Sequence[Shape], o: Options) -> Shape | None:
    return shapes[0]


def _of_rank(*ranks: int, law: Law = _same) -> Law:
    return lambda shapes, o: law(shapes, o) if len(shapes[0]) in ranks else None


def _channels(key: str) -> Law:
    return lambda shapes, o: (*shapes[0][:-1], o[key])


def _window(size: int, window: int, strides: int, padding: str) -> int:
    """Positions of a window; 0 where it does not fit."""
    return math.ceil(size / strides) if padding != "valid" else max(0, (size - window) // strides + 1)


def _convolved(channels: Callable[[int, Options], int | None]) -> Law:
    def law(shapes: Sequence[Shape], o: Options) -> Shape | None:
        *space, depth = shapes[0]
        out = channels(depth, o)
        if len(space) not in (1, 2) or out is None or (o["padding"] == "causal" and len(space) == 2):
            return None
        if o["strides"] > 1 and o.get("dilation", 1) > 1:  # TensorFlow has no such convolution
            return None
        window = (o["kernel"] - 1) * o.get("dilation", 1) + 1
        return (*(_window(size, window, o["strides"], o["padding"]) for size in space), out)

    return law


def _grouped(depth: int, o: Options) -> int | None:
    return None if depth % o["groups"] or o["filters"] % o["groups"] else int(o["filters"])


def _transposed(shapes: Sequence[Shape], o: Options) -> Shape | None:
    *space, _ = shapes[0]
    extra = max(0, o["kernel"] - o["strides"]) if o["padding"] == "valid" else 0
    return (*(size * o["strides"] + extra for size in space), o["filters"])


def _pooled(shapes: Sequence[Shape], o: Options) -> Shape | None:
    *space, depth = shapes[0]
    return (*(_window(size, o["pool"], o["strides"] or o["pool"], o["padding"]) for size in space), depth)


def _globally_pooled(shapes: Sequence[Shape], o: Options) -> Shape | None:
    *space, depth = shapes[0]
    return (*([1] * len(space) if o["keepdims"] else []), depth)


def _resized(change: Callable[[int, Options], int]) -> Law:
    return lambda shapes, o: (*(change(size, o) for size in shapes[0][:-1]), shapes[0][-1])


def _normalizable(shapes: Sequence[Shape], o: Options) -> Shape | None:
    return shapes[0] if shapes[0][-1] >= 3 else None  # of two channels little more than signs would be left


def _group_normalizable(shapes: Sequence[Shape], o: Options) -> Shape | None:
    return shapes[0] if shapes[0][-1] % o["groups"] == 0 and math.prod(shapes[0]) // o["groups"] >= 6 else None


RESHAPES: Mapping[str, Callable[[Shape], Shape | None]] = {
    "merge": lambda s: (math.prod(s[:-1]), s[-1]) if len(s) == 3 else None,
    "wrap": lambda s: (1, *s) if len(s) <= 2 else None,
    "split": lambda s: (*s[:-1], s[-1] // 2, 2) if len(s) <= 2 and s[-1] % 2 == 0 else None,
    "gather": lambda s: (*s[:-2], s[-2] * s[-1]) if len(s) == 3 else None,
    "vector": lambda s: (math.prod(s),) if len(s) >= 2 else None,
}
PERMUTATIONS: Mapping[int, Mapping[str, Shape]] = {
    2: {"last": (2, 1), "space": (2, 1)},
    3: {"last": (1, 3, 2), "space": (2, 1, 3)},
}


def _merged(shapes: Sequence[Shape], o: Options) -> Shape | None:
    """Equal shapes, or sizes of one that are stretched."""
    if len({len(shape) for shape in shapes}) > 1 or any(
        len(set(sizes) - {1}) > 1 for sizes in zip(*shapes, strict=False)
    ):
        return None
    return tuple(max(sizes) for sizes in zip(*shapes, strict=True))


def _concatenated(shapes: Sequence[Shape], o: Options) -> Shape | None:
    axis = o["axis"] % (len(shapes[0]) + 1) - 1  # Keras counts the batch
    if len({len(shape) for shape in shapes}) > 1 or axis < 0 or axis >= len(shapes[0]):
        return None
    if len({(*shape[:axis], *shape[axis + 1 :]) for shape in shapes}) > 1:
        return None
    return (*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])


def _distributed(shapes: Sequence[Shape], o: Options) -> Shape | None:
    return (*shapes[0][:-1], 3) if o["inner"] == "Dense" else shapes[0]


def _recurrent(shapes: Sequence[Shape], o: Options) -> Shape | None:
    width = 6 if o.get("merge") == "concat" else 3
    return (shapes[0][0], width) if o["sequences"] else (width,)


# --------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Op:
    """One instruction: option -> choices with the simplest first (repeated ones are likelier), law, builder.

    ``build(options, shape of the first operand, rng, name)`` gives a layer, or a function of tensors.
    """

    law: Law
    build: Callable[[Options, Shape, Rng, str], Any]
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    arity: int = 1
    weight: float = 1.0
    layer: bool = True  # not a plain operation: may stand in a Sequential and be called again


def _nd(stem: str, rename: Mapping[str, str], **fixed: Any) -> Callable[[Options, Shape, Rng, str], Any]:
    """Builder of the 1D or 2D class of a family."""

    def build(o: Options, shape: Shape, rng: Rng, name: str) -> Any:
        kind = getattr(L, stem.format(len(shape) - 1))
        return kind(**{rename.get(key, key): value for key, value in o.items()}, **fixed, name=name)

    return build


def _plain(kind: Callable[..., Any]) -> Callable[[Options, Shape, Rng, str], Any]:
    return lambda o, shape, rng, name: kind(**o, name=name)


def _batch_normalization(o: Options, shape: Shape, rng: Rng, name: str) -> Any:
    axis = o["axis"] if len(shape) > 1 else -1
    return L.BatchNormalization(axis=axis, scale=o["scale"], center=o["center"], epsilon=o["epsilon"], name=name)


def _rescaling(o: Options, shape: Shape, rng: Rng, name: str) -> Any:
    if not o["per_channel"]:
        return L.Rescaling(1 / 2.5, offset=-1.0, name=name)
    scale, offset = _signed(rng, shape[-1]), rng.normal(0, 1, shape[-1])
    return L.Rescaling(scale.round(3).tolist(), offset=offset.round(3).tolist(), name=name)


def _normalization(o: Options, shape: Shape, rng: Rng, name: str) -> Any:
    mean, variance = rng.normal(0, 1, shape[-1]).round(3), rng.uniform(0.3, 3, shape[-1]).round(3)
    return L.Normalization(mean=mean.tolist(), variance=variance.tolist(), invert=o["invert"], name=name)


def _signed(rng: Rng, size: int) -> Array:
    signed: Array = rng.uniform(0.5, 1.5, size) * rng.choice([-1, 1], size)
    return signed


# Constant arithmetic as it is written in models; v is a vector of one number per channel.
ARITHMETIC: Mapping[str, tuple[Callable[[Any, Any], Any], ...]] = {
    "x+v": (lambda x, v: x + v,),
    "x*2-1": (lambda x, v: x * 2.0, lambda x, v: x - 1.0),
    "x/127.5": (lambda x, v: x / 127.5,),
    "1-x": (lambda x, v: 1.0 - x,),
    "x*v": (lambda x, v: x * v,),
    "-x": (lambda x, v: -x,),
    "(x-v)/v": (lambda x, v: x - v, lambda x, v: x / v),
}


def _arithmetic(o: Options, shape: Shape, rng: Rng, name: str) -> Any:
    v = _signed(rng, shape[-1]).astype(np.float32)

    def call(x: Any) -> Any:
        for number, operation in enumerate(ARITHMETIC[o["form"]]):
            x = _named(operation(x, v), f"{name}_{number}")
        return x

    return call


def _named(result: Any, name: str) -> Any:
    """Plain operations take their names from a global counter; nets must not."""
    if isinstance(result, keras.KerasTensor):
        result._keras_history.operation.name = name
    return result


def _merge(stem: str, operation: Callable[[Any, Any], Any] | None) -> Callable[[Options, Shape, Rng, str], Any]:
    def build(o: Options, shape: Shape, rng: Rng, name: str) -> Any:
        if operation is not None and o["plain"]:
            return lambda a, b: _named(operation(a, b), name)
        layer = getattr(L, stem)(name=name)
        return lambda *tensors: layer(list(tensors))

    return build


def _concatenation(o: Options, shape: Shape, rng: Rng, name: str) -> Any:
    layer = L.Concatenate(axis=o["axis"], name=name)
    return lambda *tensors: layer(list(tensors))


def _einsum(o: Options, shape: Shape, rng: Rng, name: str) -> Any:
    axes = "abcd"[: len(shape) + 1]
    equation = f"{axes},{axes[-1]}z->{axes[:-1]}z"
    return L.EinsumDense(
        equation,
        output_shape=(*shape[:-1], o["units"]),
        bias_axes="z" if o["use_bias"] else None,
        activation=o["activation"],
        name=name,
    )


def _noise(o: Options, shape: Shape, rng: Rng, name: str) -> Any:
    stem = f"SpatialDropout{len(shape) - 1}D" if o["kind"] == "Spatial" and len(shape) > 1 else o["kind"]
    kind = L.Dropout if stem == "Spatial" else getattr(L, stem)
    return kind(0.3, seed=1, name=name)


def _prelu(o: Options, shape: Shape, rng: Rng, name: str) -> Any:
    return L.PReLU(shared_axes=list(range(1, len(shape))) if o["shared"] and len(shape) > 1 else None, name=name)


def _permutation(o: Options, shape: Shape, rng: Rng, name: str) -> Any:
    return L.Permute(PERMUTATIONS[len(shape)][o["swap"]], name=name)


def _permuted(shapes: Sequence[Shape], o: Options) -> Shape | None:
    return tuple(shapes[0][axis - 1] for axis in PERMUTATIONS[len(shapes[0])][o["swap"]])


def _wrapper(o: Options, shape: Shape, rng: Rng, name: str) -> Any:
    inner = L.Dense(3) if o["inner"] == "Dense" else L.BatchNormalization()
    inner.name = f"{name}_inner"
    return L.TimeDistributed(inner, name=name)


def _recurrence(o: Options, shape: Shape, rng: Rng, name: str) -> Any:
    more = {"reset_after": o["reset_after"]} if "reset_after" in o else {}
    return getattr(L, o["cell"])(3, return_sequences=o["sequences"], go_backwards=o["backwards"], **more, name=name)


def _bidirectional(o: Options, shape: Shape, rng: Rng, name: str) -> Any:
    inner = L.LSTM(3, return_sequences=o["sequences"], name=f"{name}_inner")
    return L.Bidirectional(inner, merge_mode=o["merge"], name=name)


def _attention(o: Options, shape: Shape, rng: Rng, name: str) -> Any:
    layer = L.MultiHeadAttention(2, 3, use_bias=o["use_bias"], name=name)
    return lambda query, value: layer(query, value)


ACTIVATION = ("linear", "linear", "linear", "relu", "tanh")
BIAS = (True, True, False)
PADDING = ("valid", "same", "same")
NAMES = {"kernel": "kernel_size", "dilation": "dilation_rate", "pool": "pool_size", "amount": "padding"}
WINDOW: dict[str, tuple[Any, ...]] = {"kernel": (1, 3, 3, 2), "strides": (1, 1, 1, 2), "padding": PADDING}
WEIGHTS: dict[str, tuple[Any, ...]] = {"activation": ACTIVATION, "use_bias": BIAS}
FILTERS = (3, 2, 4, 6)
BORDER = (1, (1, 0), (0, 1))
RECURRENT: dict[str, tuple[Any, ...]] = {"sequences": (True, True, False), "backwards": (False, False, True)}


def _border(o: Options) -> int:
    return 2 if o["amount"] == 1 else sum(o["amount"])


def _padding_layer(stem: str, key: str) -> Callable[[Options, Shape, Rng, str], Any]:
    def build(o: Options, shape: Shape, rng: Rng, name: str) -> Any:
        amount = (o["amount"],) * 2 if o["amount"] == 1 else o["amount"]
        each = amount if len(shape) == 2 else (amount, amount)
        return getattr(L, f"{stem}{len(shape) - 1}D")(**{key: each}, name=name)

    return build


def _constant_pad(o: Options, shape: Shape, rng: Rng, name: str) -> Any:
    amount = (1, 1) if o["amount"] == 1 else o["amount"]
    widths = ((0, 0), *[amount] * (len(shape) - 1), (0, 0))
    return lambda x: _named(keras.ops.pad(x, widths, constant_values=o["value"]), name)


OPS: Mapping[str, Op] = {
    # weights
    "Dense": Op(_channels("units"), _plain(L.Dense), {"units": FILTERS, **WEIGHTS}, weight=3),
    "EinsumDense": Op(_channels("units"), _einsum, {"units": FILTERS, **WEIGHTS}),
    "Conv": Op(
        _convolved(_grouped),
        _nd("Conv{}D", NAMES),
        # a grouped convolution is compiled by XLA on a CPU, which takes long: few of them
        {"filters": FILTERS, **WINDOW, "padding": (*PADDING, "causal"), "dilation": (1, 1, 1, 2)}
        | {"groups": (1,) * 12 + (2,), **WEIGHTS},
        weight=6,
    ),
    "DepthwiseConv": Op(
        _convolved(lambda depth, o: depth * int(o["depth_multiplier"])),
        _nd("DepthwiseConv{}D", NAMES),
        {"depth_multiplier": (1, 1, 2), **WINDOW, "dilation": (1, 1, 2), **WEIGHTS},
        weight=2,
    ),
    "SeparableConv": Op(
        _convolved(lambda depth, o: int(o["filters"])),
        _nd("SeparableConv{}D", NAMES),
        {"filters": FILTERS, "depth_multiplier": (1, 2), **WINDOW, "dilation": (1, 1, 2), **WEIGHTS},
        weight=2,
    ),
    "ConvTranspose": Op(
        _of_rank(2, 3, law=_transposed),
        _nd("Conv{}DTranspose", NAMES),
        {"filters": FILTERS, "kernel": (1, 3, 2), "strides": (1, 2), "padding": PADDING, **WEIGHTS},
    ),
    "LSTM": Op(_of_rank(2, law=_recurrent), _recurrence, {"cell": ("LSTM",), **RECURRENT}, weight=0.4),
    "GRU": Op(
        _of_rank(2, law=_recurrent), _recurrence, {"cell": ("GRU",), **RECURRENT, "reset_after": BIAS}, weight=0.4
    ),
    "SimpleRNN": Op(_of_rank(2, law=_recurrent), _recurrence, {"cell": ("SimpleRNN",), **RECURRENT}, weight=0.4),
    "Bidirectional": Op(
        _of_rank(2, law=_recurrent),
        _bidirectional,
        {"merge": ("concat", "sum"), "sequences": (True, False)},
        weight=0.4,
    ),
    "TimeDistributed": Op(
        _of_rank(2, 3, law=_distributed), _wrapper, {"inner": ("Dense", "BatchNormalization")}, weight=0.6
    ),
    "MultiHeadAttention": Op(_of_rank(2), _attention, {"use_bias": (True, False)}, arity=2, weight=0.6, layer=False),
    # affines
    "BatchNormalization": Op(
        _same,
        _batch_normalization,
        {"axis": (-1, -1, -1, -1, -1, 1), "scale": BIAS, "center": BIAS, "epsilon": (1e-3, 1e-3, 1e-5)}
        | {"stats": ("fitting", "fitting", "wide", "dead", "zero gamma")},
        weight=10,
    ),
    "Rescaling": Op(_same, _rescaling, {"per_channel": (False, True)}),
    "Normalization": Op(_same, _normalization, {"invert": (False, False, True)}),
    "Arithmetic": Op(_same, _arithmetic, {"form": tuple(ARITHMETIC)}, weight=2, layer=False),
    # norms that depend on the sample
    "LayerNormalization": Op(_normalizable, _plain(L.LayerNormalization), {"scale": BIAS, "center": BIAS}),
    "GroupNormalization": Op(
        _of_rank(2, 3, law=_group_normalizable),
        _plain(L.GroupNormalization),
        {"groups": (1, 2, 3), "scale": BIAS, "center": BIAS},
    ),
    # what does nothing at inference
    "Noise": Op(_same, _noise, {"kind": ("Dropout", "Spatial", "AlphaDropout", "GaussianDropout", "GaussianNoise")}),
    "Identity": Op(_same, _plain(L.Identity), weight=0.3),
    "ActivityRegularization": Op(_same, _plain(L.ActivityRegularization), {"l1": (0.1,)}, weight=0.3),
    # activations
    "ReLU": Op(
        _same,
        _plain(L.ReLU),
        {"max_value": (None, None, 6.0), "negative_slope": (0.0, 0.0, 0.2), "threshold": (0.0, 0.0, 0.0, 0.5)},
        weight=4,
    ),
    "LeakyReLU": Op(_same, _plain(L.LeakyReLU), {"negative_slope": (0.3, 0.1)}),
    "PReLU": Op(_same, _prelu, {"shared": (True, False)}),
    "Activation": Op(
        _same,
        _plain(L.Activation),
        {"activation": ("linear", "relu", "relu6", "tanh", "sigmoid", "swish", "gelu", "elu", "softplus", "softmax")},
        weight=2,
    ),
    # the same numbers elsewhere
    "Flatten": Op(_of_rank(2, 3, law=lambda s, o: (math.prod(s[0]),)), _plain(L.Flatten), weight=0.4),
    "Reshape": Op(
        lambda shapes, o: RESHAPES[o["how"]](shapes[0]),
        lambda o, shape, rng, name: L.Reshape(RESHAPES[o["how"]](shape), name=name),
        {"how": tuple(RESHAPES)},
        weight=0.6,
    ),
    "Permute": Op(_of_rank(2, 3, law=_permuted), _permutation, {"swap": ("space", "last")}, weight=0.6),
    "Cropping": Op(
        _of_rank(2, 3, law=_resized(lambda size, o: size - _border(o))),
        _padding_layer("Cropping", "cropping"),
        {"amount": BORDER},
    ),
    "ZeroPadding": Op(
        _of_rank(2, 3, law=_resized(lambda size, o: size + _border(o))),
        _padding_layer("ZeroPadding", "padding"),
        {"amount": BORDER},
    ),
    "Pad": Op(
        _of_rank(2, 3, law=_resized(lambda size, o: size + _border(o))),
        _constant_pad,
        {"amount": BORDER, "value": (0.0, 0.75)},
        layer=False,
    ),
    "UpSampling": Op(
        _of_rank(2, 3, law=_resized(lambda size, o: size * int(o["size"]))), _nd("UpSampling{}D", {}), {"size": (2,)}
    ),
    # pooling
    "MaxPooling": Op(
        _of_rank(2, 3, law=_pooled),
        _nd("MaxPooling{}D", NAMES),
        {"pool": (2, 3), "strides": (None, 1), "padding": PADDING},
    ),
    "AveragePooling": Op(
        _of_rank(2, 3, law=_pooled),
        _nd("AveragePooling{}D", NAMES),
        {"pool": (2, 3), "strides": (None, 1), "padding": PADDING},
    ),
    "GlobalAveragePooling": Op(
        _of_rank(2, 3, law=_globally_pooled),
        _nd("GlobalAveragePooling{}D", {}),
        {"keepdims": (False, True)},
        weight=0.4,
    ),
    "GlobalMaxPooling": Op(
        _of_rank(2, 3, law=_globally_pooled), _nd("GlobalMaxPooling{}D", {}), {"keepdims": (False, True)}, weight=0.4
    ),
    # several operands
    "Add": Op(_merged, _merge("Add", lambda a, b: a + b), {"plain": (False, False, True)}, arity=2, layer=False),
    "Subtract": Op(
        _merged, _merge("Subtract", lambda a, b: a - b), {"plain": (False, True)}, arity=2, weight=0.6, layer=False
    ),
    "Multiply": Op(
        _merged, _merge("Multiply", lambda a, b: a * b), {"plain": (False, True)}, arity=2, weight=0.4, layer=False
    ),
    "Average": Op(_merged, _merge("Average", None), arity=2, weight=0.6, layer=False),
    "Maximum": Op(_merged, _merge("Maximum", None), arity=2, weight=0.4, layer=False),
    "Concatenate": Op(_concatenated, _concatenation, {"axis": (-1, -1, 1)}, arity=2, layer=False),
}
# Tokens become vectors here and nowhere else, so the generator places it and the table of unary draws does not.
EMBEDDING = Op(
    lambda shapes, o: (*shapes[0], o["width"]),
    lambda o, shape, rng, name: L.Embedding(VOCABULARY, o["width"], mask_zero=o["mask_zero"], name=name),
    {"width": (3, 4), "mask_zero": (False, False, True)},
    layer=False,
)
ALL_OPS: Mapping[str, Op] = {**OPS, "Embedding": EMBEDDING}

# ------------------------------------------------------------------------------------- what fits together


def _law_of(step: Step, steps: Mapping[str, Step]) -> Step:
    """The instruction whose layer a step calls: itself, or for `Again` an earlier one."""
    return steps[dict(step.options)["of"]] if step.op == "Again" else step


def results(step: Step, steps: Mapping[str, Step], shapes: Mapping[str, Shape]) -> dict[str, Shape] | None:
    """Name -> shape of what a step makes of tensors of known shapes; None where it does not fit."""
    if any(operand not in shapes for operand in step.on):
        return None
    given = [shapes[operand] for operand in step.on]
    if step.op == "Again":
        of = steps.get(dict(step.options)["of"])
        if of is None or given != [shapes[operand] for operand in of.on]:
            return None
        return results(replace(of, name=step.name, on=step.on), steps, shapes)
    if step.op == "Nested":
        assert step.body is not None
        if given != [x.shape for x in step.body.inputs]:
            return None
        inner = inferred(step.body)
        if inner is None:
            return None
        found = [inner[name] for name in step.body.outputs]
        return {step.name + (f".{i}" if i else ""): shape for i, shape in enumerate(found)}
    shape = ALL_OPS[step.op].law(given, dict(step.options))
    if shape is None or min(shape) < 1 or math.prod(shape) > LARGEST or max(shape[:-1], default=1) > LONGEST:
        return None
    return {step.name: shape}


def inferred(graph_: Graph) -> dict[str, Shape] | None:
    """Name -> shape of every tensor of a graph; None where an instruction does not fit."""
    shapes = {x.name: x.shape for x in graph_.inputs}
    tokens = {x.name for x in graph_.inputs if x.tokens}
    steps: dict[str, Step] = {}
    for step in graph_.steps:
        if (step.op == "Embedding") != bool(tokens.intersection(step.on)):
            return None
        made = results(step, steps, shapes)
        if made is None:
            return None
        steps[step.name] = step
        shapes |= made
    return shapes if graph_.outputs and all(name in shapes for name in graph_.outputs) else None


def pruned(graph_: Graph) -> Graph:
    """Without the instructions and inputs that no output needs."""
    needed = set(graph_.outputs)
    kept: list[Step] = []
    for step in reversed(graph_.steps):
        if needed & {step.name, *(f"{step.name}.{i}" for i in range(1, 9))}:
            kept.insert(0, step)
            needed |= {*step.on, *(value for key, value in step.options if key == "of")}
    return replace(graph_, inputs=tuple(x for x in graph_.inputs if x.name in needed), steps=tuple(kept))


# ------------------------------------------------------------------------------------------- generating

Motif = Callable[["_Writer", str], "str | None"]


class _Writer:
    """Appends instructions that fit."""

    def __init__(self, rng: Rng, inputs: Sequence[Source], depth: int = 0) -> None:
        self.rng, self.depth = rng, depth
        self.inputs = tuple(inputs)
        self.steps: dict[str, Step] = {}
        self.shapes: dict[str, Shape] = {x.name: x.shape for x in inputs}
        self.unread: dict[str, None] = {x.name: None for x in inputs if not x.tokens}
        self.values = [x.name for x in inputs if not x.tokens]  # what may be an operand, in order

    def emit(self, op: str, *on: str, body: Graph | None = None, **options: Any) -> str | None:
        """One instruction; the options that are not given are drawn. None where it does not fit."""
        choices = ALL_OPS[op].choices if op in ALL_OPS else {}
        drawn = {key: options.get(key, _pick(self.rng, values)) for key, values in choices.items()} | options
        step = Step(f"v{len(self.steps) + 1}", op, on, tuple(drawn.items()), body)
        made = results(step, self.steps, self.shapes)
        if made is None:
            return None
        self.steps[step.name] = step
        self.shapes |= made
        for operand in on:
            self.unread.pop(operand, None)
        self.unread |= dict.fromkeys(made)
        self.values += made
        return step.name

    def chain(self, start: str | None, *calls: tuple[str, Options]) -> str | None:
        for op, options in calls:
            start = None if start is None else self.emit(op, start, **options)
        return start

    def operand(self) -> str:
        """Mostly the newest tensor, often one that nobody reads yet, sometimes any."""
        luck = self.rng.random()
        if luck < 0.6:
            return self.values[-1]
        return str(_pick(self.rng, tuple(self.unread) if luck < 0.8 and self.unread else tuple(self.values)))

    def partner(self, value: str) -> str | None:
        """Another tensor of the same shape."""
        found = tuple(v for v in self.values if v != value and self.shapes[v] == self.shapes[value])
        return _pick(self.rng, found) if found else None

    def weights(self, value: str, channels: int, **options: Any) -> tuple[str, Options]:
        """A convolution that keeps the space, or what does its work on vectors."""
        bias = bool(self.rng.random() < 0.5)
        if len(self.shapes[value]) in (2, 3):
            kernel = {"filters": channels, "kernel": 3, "strides": 1, "padding": "same", "dilation": 1, "groups": 1}
            return "Conv", {**kernel, "use_bias": bias, "activation": "linear", **options}
        activation = options.get("activation", "linear")
        return "Dense", {"units": channels, "use_bias": bias, "activation": activation}

    # ---------------------------------------------------------------- kinds of instruction

    def unary(self) -> str | None:
        names = tuple(OPS)
        weights = np.array([OPS[name].weight if OPS[name].arity == 1 else 0 for name in names])
        return self.emit(names[self.rng.choice(len(names), p=weights / weights.sum())], self.operand())

    def merge(self) -> str | None:
        names = tuple(name for name, op in OPS.items() if op.arity == 2)
        weights = np.array([OPS[name].weight for name in names])
        op = names[self.rng.choice(len(names), p=weights / weights.sum())]
        value = self.operand()
        other = self.partner(value)
        if op == "MultiHeadAttention" and (other is None or self.rng.random() < 0.5):
            other = value
        return None if other is None else self.emit(op, value, other)

    def again(self) -> str | None:
        """Call a layer, or a nested model, that is there once more."""
        names = tuple(
            name
            for name, step in self.steps.items()
            if (step.op == "Nested" and len(step.on) == 1) or (step.op in OPS and OPS[step.op].layer)
        )
        if not names:
            return None
        of = _pick(self.rng, names)
        (given,) = self.steps[of].on
        fit = tuple(value for value in self.values if self.shapes[value] == self.shapes[given])
        return self.emit("Again", _pick(self.rng, fit), of=of)

    def nested(self) -> str | None:
        if self.depth > 1:
            return None
        value = self.operand()
        sources = [Source("a", self.shapes[value])]
        other = self.partner(value)
        kind = _pick(self.rng, ("Sequential", "Functional", "Functional"))
        if kind == "Functional" and other is not None and self.rng.random() < 0.3:
            sources.append(Source("b", self.shapes[value]))
        inner = _Writer(self.rng, sources, self.depth + 1)
        wanted = int(self.rng.integers(2, 5))
        for _ in range(8 * wanted):
            if len(inner.steps) >= wanted:
                break
            if kind == "Sequential":
                names = tuple(name for name, op in OPS.items() if op.layer)
                inner.emit(_pick(self.rng, (*names, *("BatchNormalization",) * 12)), inner.values[-1])
            else:
                inner.write()
        if not inner.steps:
            return None
        body = inner.graph(kind == "Functional" and self.rng.random() < 0.3)
        if [x.name for x in body.inputs] != [x.name for x in sources]:
            return None
        on = (value,) if len(sources) == 1 else (value, str(other))
        name = self.emit("Nested", *on, body=body, kind=kind)
        if name is not None and len(on) == 1 and self.rng.random() < 0.4:
            fit = tuple(v for v in self.values if self.shapes[v] == self.shapes[value])
            self.emit("Again", _pick(self.rng, fit), of=name)
        return name

    def motif(self) -> str | None:
        motif: Motif = _pick(self.rng, MOTIFS)
        return motif(self, self.operand())

    def write(self) -> str | None:
        kinds = (self.unary, self.merge, self.motif, self.again, self.nested)
        odds = (0.6, 0.16, 0.12, 0.06, 0.06)
        return kinds[self.rng.choice(len(kinds), p=odds)]()

    def graph(self, several: bool) -> Graph:
        """All that was written, with the last tensor as the output, or with a few more."""
        outputs = [self.values[-1]]
        if several:
            made = [value for value in self.values if value not in {x.name for x in self.inputs}]
            outputs += [value for value in made if value in self.unread and value != outputs[0]][-2:]
            inside = [value for value in made if value not in self.unread]
            if inside and self.rng.random() < 0.5:
                outputs.append(_pick(self.rng, inside))
        return pruned(Graph(self.inputs, tuple(self.steps.values()), tuple(dict.fromkeys(outputs))))


def _pick(rng: Rng, values: Sequence[Any]) -> Any:
    return values[int(rng.integers(len(values)))]


def _normal_relu(writer: _Writer, value: str | None, **options: Any) -> str | None:
    return writer.chain(value, ("BatchNormalization", {"axis": -1}), ("ReLU", {"threshold": 0.0, **options}))


def _conv_bn_relu(writer: _Writer, value: str) -> str | None:
    return _normal_relu(writer, writer.chain(value, writer.weights(value, _pick(writer.rng, FILTERS))))


def _preactivation(writer: _Writer, value: str) -> str | None:
    """A stream of residual blocks: x + Conv(ReLU(BN(x))), twice."""
    stream: str | None = value
    for _ in range(2):
        inner = None if stream is None else _normal_relu(writer, stream)
        inner = None if inner is None else writer.chain(inner, writer.weights(inner, writer.shapes[value][-1]))
        stream = None if inner is None or stream is None else writer.emit("Add", stream, inner)
    return stream


def _dense_block(writer: _Writer, value: str) -> str | None:
    """Growing features: [x, Conv(ReLU(BN(x)))], twice."""
    stream: str | None = value
    for _ in range(2):
        inner = None if stream is None else _normal_relu(writer, stream)
        inner = None if inner is None else writer.chain(inner, writer.weights(inner, 2))
        stream = None if inner is None or stream is None else writer.emit("Concatenate", stream, inner, axis=-1)
    return stream


def _inverted_residual(writer: _Writer, value: str) -> str | None:
    """MobileNetV2: widen, depthwise, narrow, each normalised; ReLU6 between; no activation at the end."""
    depth = writer.shapes[value][-1]
    inner = _normal_relu(writer, writer.chain(value, writer.weights(value, 6, kernel=1)), max_value=6.0)
    if inner is not None and len(writer.shapes[inner]) in (2, 3):
        deep: dict[str, Any] = {"depth_multiplier": 1, "kernel": 3, "strides": 1, "padding": "same", "dilation": 1}
        inner = writer.emit("DepthwiseConv", inner, **deep, activation="linear", use_bias=False)
        inner = _normal_relu(writer, inner, max_value=6.0)
    if inner is not None:
        inner = writer.chain(inner, writer.weights(inner, depth, kernel=1), ("BatchNormalization", {"axis": -1}))
    return None if inner is None else writer.emit("Add", value, inner)


def _squeeze_excite(writer: _Writer, value: str) -> str | None:
    """x times a gate per channel that depends on the mean of x."""
    gate: str | None = value
    if len(writer.shapes[value]) in (2, 3):
        gate = writer.emit("GlobalAveragePooling", value, keepdims=True)
    if gate is None:
        return None
    depth = writer.shapes[value][-1]
    first = writer.weights(gate, 2, kernel=1, activation="relu")
    gate = writer.chain(gate, first, writer.weights(gate, depth, kernel=1, activation="sigmoid"))
    return None if gate is None else writer.emit("Multiply", value, gate)


MOTIFS: tuple[Motif, ...] = (
    _conv_bn_relu, _conv_bn_relu, _preactivation, _preactivation, _dense_block, _inverted_residual, _squeeze_excite
)  # fmt: skip

# What comes in, the likelier first
KINDS = ("image", "image", "image", "line", "line", "vector", "tokens")


def _source(rng: Rng, kind: str, name: str) -> Source:
    space = {"image": 2, "line": 1, "vector": 0, "tokens": 1}[kind]
    shape = tuple(int(size) for size in rng.integers(5, 10, space))
    return Source(name, shape if kind == "tokens" else (*shape, int(rng.integers(2, 7))), kind == "tokens")


def draft(seed: int, attempt: int = 0) -> Program:
    """A net of 5 to 40 instructions, counting those of nested models; it may be dead."""
    rng = np.random.default_rng([seed, attempt])
    while True:
        sources = [_source(rng, _pick(rng, KINDS), "x0")]
        if rng.random() < 0.25:
            again = rng.random() < 0.5 and not sources[0].tokens
            sources.append(replace(sources[0], name="x1") if again else _source(rng, _pick(rng, KINDS), "x1"))
        writer = _Writer(rng, sources)
        for source in sources:
            if source.tokens:
                writer.emit("Embedding", source.name)
        wanted = 5 + int(35 * rng.random() ** 1.5)
        for _ in range(20 * wanted):
            if sum(1 for _ in Graph((), tuple(writer.steps.values()), ()).calls()) >= wanted:
                break
            writer.write()
        found = writer.graph(bool(rng.random() < 0.5))
        if 5 <= sum(1 for _ in found.calls()) <= 40:
            return Program(seed, bool(rng.random() < 0.34), found)


def drawn(seed: int) -> tuple[Program, Built]:
    """The net of a seed: the first draft that is alive, because a dead one proves nothing."""
    pairs = ((program, build(program)) for program in (draft(seed, i) for i in count()))
    return next((program, built) for program, built in pairs if alive(built, program))


def generate(seed: int) -> Program:
    return drawn(seed)[0]


# --------------------------------------------------------------------------------------------- building


@dataclass(frozen=True, eq=False)
class Built:
    """A model, the samples to prove it on (keyed by input name), and what every tensor is on them."""

    model: Any
    samples: Mapping[str, Array]
    values: Mapping[str, Array]


def _samples(source: Source, rng: Rng) -> Array:
    """Values far beyond 6 on both sides of zero, and zeros at the borders of some samples."""
    shape = (SAMPLES, *source.shape)
    if source.tokens:
        drawn = rng.integers(0, VOCABULARY, shape)
        drawn[:, 0] = rng.integers(1, VOCABULARY, SAMPLES)  # a sequence that is masked as a whole has no mean
        return drawn.astype(np.int32)
    values = rng.normal(0, 1, shape) * np.linspace(1, 5, SAMPLES).reshape(-1, *[1] * len(source.shape))
    for axis in range(1, len(shape) - 1):
        np.moveaxis(values[1::2], axis, 0)[[0, -1]] = 0
    return values.astype(np.float32)


def _enliven(layer: Any, value: Any, rng: Rng, negative: bool, options: Options) -> None:
    """Draw the weights of a built layer that is to see ``value``."""
    seen = np.asarray(value, np.float64)
    size = max(float(np.sqrt(np.mean(seen**2))), 1e-6) if seen.dtype.kind == "f" else 1.0
    for part in layer._flatten_layers():
        if isinstance(part, L.BatchNormalization):
            _fit(part, seen, rng, negative, str(options.get("stats", "fitting")))
            continue
        for variable in part._trainable_variables:
            shape = tuple(variable.shape)
            if any(word in variable.name for word in ("kernel", "embeddings")):
                share = shape[:-2] if variable.name == "depthwise_kernel" else shape[:-1]
                drawn = rng.normal(0, 1, shape) / math.sqrt(math.prod(share) or 1)
                if "recurrent" not in variable.name and "pointwise" not in variable.name:
                    drawn = drawn / size * 10 ** rng.uniform(-0.4, 0.6, shape[-1])  # channels of many sizes
            elif variable.name == "gamma":
                drawn = _signed(rng, math.prod(shape)).reshape(shape)
            else:  # bias, beta, and the slopes of PReLU
                drawn = rng.normal(0, 0.3, shape)
            variable.assign(drawn.astype(np.float32))


def _fit(layer: Any, seen: Array, rng: Rng, negative: bool, stats: str) -> None:
    """Statistics near those of what comes in, gammas that reach beyond 6, and what real files hold besides."""
    axis = layer.axis % seen.ndim
    others = tuple(i for i in range(seen.ndim) if i != axis)
    mean, variance = seen.mean(axis=others), seen.var(axis=others)
    width = len(mean)
    drawn = {
        "moving_mean": mean + 0.2 * np.sqrt(variance) * rng.normal(0, 1, width),
        "moving_variance": np.maximum(variance, 1e-4) * rng.uniform(0.7, 1.5, width),
        "gamma": rng.uniform(0.5, 1.5, width) * rng.choice([1, 1, 3], width),
        "beta": rng.normal(0, 0.5, width),
    }
    if negative:
        drawn["gamma"] *= rng.choice([-1, 1], width)
    one = int(rng.integers(width))
    if stats == "wide":
        drawn["moving_variance"] *= 10 ** rng.uniform(-2, 2, width)
    elif stats == "dead":
        drawn["moving_variance"][one] = 0.0
    elif stats == "zero gamma" and width > 1:
        drawn["gamma"][one] = 0.0
    for name, value in drawn.items():
        if getattr(layer, name) is not None:
            getattr(layer, name).assign(value.astype(np.float32))


class _Builder:
    def __init__(self, program: Program) -> None:
        self.program = program

    def rng(self, path: str) -> Rng:
        return np.random.default_rng([self.program.seed, zlib.crc32(path.encode())])

    def layer(self, step: Step, shape: Shape, path: str) -> Any:
        return ALL_OPS[step.op].build(dict(step.options), shape, self.rng(path), f"{step.name}_{step.op.lower()}")

    def alive(self, layer: Any, step: Step, value: Any, path: str) -> None:
        _enliven(layer, value, self.rng(path + " weights"), self.program.negative, dict(step.options))

    def sequential(self, step: Step, value: Any, path: str) -> Any:
        """A Sequential model builds itself, so its layers are brought to life afterwards, in order."""
        body = step.body
        assert body is not None
        shapes = inferred(body)
        assert shapes is not None
        layers = [self.layer(inner, shapes[inner.on[0]], f"{path}/{inner.name}") for inner in body.steps]
        model = keras.Sequential(
            [keras.Input(body.inputs[0].shape, name=body.inputs[0].name), *layers], name=f"{step.name}_nested"
        )
        for inner, layer in zip(body.steps, layers, strict=True):
            self.alive(layer, inner, value, f"{path}/{inner.name}")
            value = layer(value)
        return model

    def graph(self, found: Graph, given: Mapping[str, Any], path: str, name: str) -> tuple[Any, dict[str, Array]]:
        """A functional model, and every tensor on the samples; both come from the same calls."""
        inputs = {
            x.name: keras.Input(x.shape, dtype="int32" if x.tokens else "float32", name=x.name) for x in found.inputs
        }
        symbols: dict[str, Any] = dict(inputs)
        values: dict[str, Any] = dict(given)
        layers: dict[str, Any] = {}
        for step in found.steps:
            on, seen = [symbols[x] for x in step.on], [values[x] for x in step.on]
            here = f"{path}/{step.name}"
            if step.op == "Again":
                layer = layers[dict(step.options)["of"]]
            elif step.op == "Nested" and dict(step.options)["kind"] == "Sequential":
                layer = self.sequential(step, seen[0], here)
            elif step.op == "Nested":
                assert step.body is not None
                sources = [x.name for x in step.body.inputs]
                inner, _ = self.graph(step.body, dict(zip(sources, seen, strict=True)), here, f"{step.name}_nested")
                layer = _of_flat_arguments(inner)
            else:
                layer = self.layer(step, tuple(on[0].shape[1:]), here)
            layers[step.name] = layer
            made = keras.tree.flatten(layer(*on))
            if step.op not in ("Again", "Nested"):
                operation = made[0]._keras_history.operation
                if isinstance(operation, L.Layer):
                    self.alive(operation, step, seen[0], here)
            for i, (symbol, value) in enumerate(zip(made, keras.tree.flatten(layer(*seen)), strict=True)):
                symbols[step.name + (f".{i}" if i else "")] = symbol
                values[step.name + (f".{i}" if i else "")] = value
        outputs = [symbols[output] for output in found.outputs]
        model = keras.Model(list(inputs.values()), outputs if len(outputs) > 1 else outputs[0], name=name)
        return model, values


def _of_flat_arguments(model: Any) -> Callable[..., Any]:
    return lambda *tensors: model(tensors[0] if len(tensors) == 1 else list(tensors))


def build(program: Program) -> Built:
    """The model of a program, with its weights, and samples that reach all of it. The same every time."""
    builder = _Builder(program)
    samples = {x.name: _samples(x, builder.rng(x.name)) for x in program.graph.inputs}
    given = {name: keras.ops.convert_to_tensor(array) for name, array in samples.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not support masking.*")
        model, values = builder.graph(program.graph, given, "", "net")
    return Built(model, samples, {name: graph.numpy(value) for name, value in values.items()})


def alive(built: Built, program: Program) -> bool:
    """Whether every output depends on the sample, and no value is near the end of float32."""
    outputs = [built.values[name].astype(np.float64) for name in program.graph.outputs]
    sane = all(np.abs(value).max() < LIMIT for value in built.values.values())
    return sane and all(np.sqrt(x.var(axis=0).mean()) > SPREAD * np.sqrt((x**2).mean()) for x in outputs)


# --------------------------------------------------------------------------------------------- the property


@dataclass(frozen=True)
class Outcome:
    """What one net showed. ``failure`` is None, or ``kind: details`` with a kind that shrinking keeps."""

    failure: str | None
    layers: int
    fused: int = 0
    reduced: int = 0
    kept: int = 0
    exactness: float | None = None
    reconsidered: bool = False  # fused again, the net loses a source that had cost too many digits before

    @property
    def sources(self) -> int:
        return self.fused + self.reduced + self.kept


DISAGREES = "plain Keras disagrees"  # the kind of failure that only the independent proof shows


@cache
def _reprove() -> ModuleType:
    """The independent proof, as a module."""
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "reprove.py"
    spec = importlib.util.spec_from_file_location("reprove", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _operations(model: Any) -> Iterator[Any]:
    for operation in model.operations:
        yield operation
        if hasattr(operation, "operations"):
            yield from _operations(operation)


def config(model: Any) -> str:
    """What Keras would write about the graph, without the memory addresses in it."""
    return re.sub(r"'shared_object_id': \d+", "", repr(model.get_config()))


def _state(model: Any) -> tuple[list[Array], str, list[tuple[int, int]]]:
    """Weights, config, and how often every operation at any depth is called and read."""
    nodes = [(len(x._inbound_nodes), len(x._outbound_nodes)) for x in _operations(model)]
    return [graph.numpy(variable) for variable in model.weights], config(model), nodes


def _same_arrays(a: Sequence[Array], b: Sequence[Array]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


def _interface(model: Any) -> list[tuple[str, Any, str]]:
    """Names, shapes and dtypes; the plausible range of an input may go with the layer that said it."""
    signature = graph.signature(model)
    return [(x.name, x.shape, x.dtype) for x in (*signature.inputs, *signature.outputs)]


def _moved(fused: Fused) -> list[str]:
    return [decision.layer for decision in fused.decisions if decision.outcome != "kept"]


def _costly(fused: Fused) -> list[str]:
    """What was kept for the digits that it would cost: a judgement about the model given, not algebra."""
    return [decision.layer for decision in fused.decisions if decision.code == "conditioning"]


def _again(fused: Fused, samples: Mapping[str, Array]) -> str | None:
    """Fusing what is fused changes nothing, as long as what cost too many digits is not asked about again."""
    second = fuse(fused.model, samples=samples, keep=_costly(fused), prove=False)
    if _moved(second):
        return f"not idempotent: fused again: {', '.join(_moved(second))}"
    first = [graph.numpy(variable) for variable in fused.model.weights]
    if not _same_arrays(first, [graph.numpy(variable) for variable in second.model.weights]):
        return "not idempotent: other weights"
    if config(second.model) != config(fused.model):
        return "not idempotent: another config"
    return None


def _reproved(model: Any, fused: Any, samples: Mapping[str, Array]) -> str | None:
    """Plain Keras, on the files as written, in its own float64, by its own bound."""
    reprove = _reprove()
    with tempfile.TemporaryDirectory() as room:
        files = [write_keras(x, Path(room) / f"{name}.keras") for x, name in ((model, "original"), (fused, "fused"))]
        first, second = (keras.models.load_model(file, compile=False, safe_mode=True) for file in files)
    # all of the samples: the original's own error on a lucky few would be no yardstick
    arrays = [samples[symbol._keras_history.operation.name] for symbol in first.inputs]
    run = partial(reprove.run, arrays=arrays, batch=len(arrays[0]))
    reference = run(reprove.in_float64(first))
    stored = reprove.distance(run(reprove.in_float64(second)), reference)
    if stored <= 4 * 2.0**-23:
        return None
    bound = 4 * reprove.distance(run(first), reference)
    return None if stored <= bound else f"{DISAGREES}: {stored:.3g}, allowed {bound:.3g}"


def _violation(built: Built, fused: Fused, before: Any, outputs: Sequence[Array], reprove: bool) -> str | None:
    """The first part of the property that does not hold."""
    proof, model = fused.proof, built.model
    if proof is None:
        return "no proof"
    broken = [decision.layer for decision in fused.decisions if decision.code == "proof_failed"]
    if broken:
        return f"a wrong fold: the proof took back {', '.join(broken)}"
    if not proof.exactness_f64 <= min(proof.exactness_bound, max(EXACT, 4 * proof.noise_f64)):
        return f"not exact: {proof.exactness_f64:.3g}, bound {proof.exactness_bound:.3g}"
    weights, *rest = _state(model)
    if not _same_arrays(weights, before[0]) or rest != list(before[1:]):
        return "source model changed: weights, config or graph"
    if not _same_arrays(graph.run(model, built.samples), outputs):
        return "source model changed: other outputs"
    if _interface(fused.model) != _interface(model):
        return f"another signature: {_interface(model)} -> {_interface(fused.model)}"
    found = _again(fused, built.samples)
    return _reproved(model, fused.model, built.samples) if found is None and reprove else found


def measure(program: Program, built: Built | None = None, *, reprove: bool = True) -> Outcome:
    """Build a net (unless it is there already), fuse it and look at everything that must hold.

    ``reprove=False`` leaves out the independent proof, which takes half of the time.
    """
    layers = sum(1 for _ in program.graph.calls())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not support masking.*")
        warnings.filterwarnings("ignore", message="__array__ implementation", category=DeprecationWarning)
        built = built or build(program)
        before, outputs = _state(built.model), graph.run(built.model, built.samples)
        try:
            fused = fuse(built.model, samples=built.samples, seed=0)
        except Exception as error:  # that none is raised is the property
            return Outcome(f"raised {type(error).__name__}: {error}", layers)
        counts = {outcome: fused.count(outcome) for outcome in ("fused", "reduced", "kept")}
        exactness = fused.proof.exactness_f64 if fused.proof else None
        try:
            failure = _violation(built, fused, before, outputs, reprove)
            reconsidered = bool(_costly(fused) and _moved(fuse(fused.model, samples=built.samples)))
        except Exception as error:  # fusing again, writing and loading must not raise either
            failure, reconsidered = f"afterwards raised {type(error).__name__}: {error}", False
        return Outcome(failure, layers, **counts, exactness=exactness, reconsidered=reconsidered)


def failure(program: Program, *, reprove: bool = True) -> str | None:
    """What is wrong with fusing this net; None when all is well."""
    return measure(program, reprove=reprove).failure


# --------------------------------------------------------------------------------------------- shrinking


def _cost(found: Graph) -> tuple[int, int, int]:
    """What shrinking makes smaller: instructions, then inputs and outputs, then options off their simplest."""
    calls = list(found.calls())
    odd = sum(
        value != ALL_OPS[step.op].choices[key][0]
        for step in calls
        if step.op in ALL_OPS
        for key, value in step.options
        if key in ALL_OPS[step.op].choices
    )
    nested = sum(step.op == "Nested" for step in calls)
    return len(calls) + nested, len(found.inputs) + len(found.outputs), odd


def _renamed(found: Graph, names: Mapping[str, str]) -> Graph:
    """Every reading of a tensor as the reading of another."""
    steps = tuple(replace(step, on=tuple(names.get(x, x) for x in step.on)) for step in found.steps)
    return replace(found, steps=steps, outputs=tuple(dict.fromkeys(names.get(x, x) for x in found.outputs)))


def _swapped(found: Graph, index: int, *steps: Step) -> Graph:
    return replace(found, steps=(*found.steps[:index], *steps, *found.steps[index + 1 :]))


def _inlined(found: Graph, index: int) -> Graph:
    """The instructions of a nested model in its place."""
    step = found.steps[index]
    assert step.body is not None
    names = dict(zip((x.name for x in step.body.inputs), step.on, strict=True))
    inner = []
    for part in step.body.steps:
        fresh = f"{step.name}_{part.name}"
        options = tuple((key, f"{step.name}_{value}" if key == "of" else value) for key, value in part.options)
        inner.append(replace(part, name=fresh, on=tuple(names[x] for x in part.on), options=options))
        names |= {part.name + dot: fresh + dot for dot in ("", *(f".{i}" for i in range(1, 9)))}
    made = {step.name + (f".{i}" if i else ""): names[output] for i, output in enumerate(step.body.outputs)}
    return _renamed(_swapped(found, index, *inner), made)


def _candidates(found: Graph) -> Iterator[Graph]:
    """Nets one change away, those that take most first; not all fit."""
    shapes = inferred(found)
    assert shapes is not None
    if len(found.outputs) > 1:
        for output in found.outputs:
            yield replace(found, outputs=(output,))
            yield replace(found, outputs=tuple(x for x in found.outputs if x != output))
    for step in found.steps[:-1]:  # the net ends here, or begins here
        yield replace(found, outputs=(step.name,))
        fresh = Source(f"{step.name}_in", shapes[step.name])
        yield _renamed(replace(found, inputs=(*found.inputs, fresh)), {step.name: fresh.name})
    for index, step in reversed(list(enumerate(found.steps))):
        for operand in step.on:
            yield _renamed(_swapped(found, index), {step.name: operand})
        if step.op == "Again":  # a layer of its own
            of = next(other for other in found.steps if other.name == dict(step.options)["of"])
            yield _swapped(found, index, replace(of, name=step.name, on=step.on))
        if step.body is not None:
            yield _inlined(found, index)
            for body in map(pruned, _candidates(step.body)):
                if body.steps:
                    yield _swapped(found, index, replace(step, body=body))
    for index, step in enumerate(found.steps):
        choices = ALL_OPS[step.op].choices if step.op in ALL_OPS else {}
        for key, values in choices.items():
            options = tuple((name, values[0] if name == key else value) for name, value in step.options)
            if options != step.options:
                yield _swapped(found, index, replace(step, options=options))


def smaller(found: Graph) -> Iterator[Graph]:
    """Valid nets that are one step smaller."""
    for candidate in _candidates(found):
        candidate = pruned(candidate)
        if candidate.inputs and candidate.steps and _cost(candidate) < _cost(found) and inferred(candidate):
            yield candidate


def shrink(program: Program, fails: Callable[[Program], bool], tries: int = 400) -> Program:
    """The smallest net found that still fails: greedy, so none that is one step smaller fails.

    ``tries`` bounds the number of nets looked at.
    """
    seen: set[Graph] = set()  # a net that did not fail is not looked at again
    shrinking = True
    while shrinking:
        shrinking = False
        for found in smaller(program.graph):
            if tries <= 0:
                return program
            if found in seen:
                continue
            seen.add(found)
            tries -= 1
            candidate = replace(program, graph=found)
            if fails(candidate):
                program, shrinking = candidate, True
                break
    return program


def shrunk(program: Program, found: str, tries: int = 400) -> Program:
    """The smallest net found that fails in the same way as ``found`` says."""

    kind = found.split(":")[0]
    independent = kind == DISAGREES or kind.startswith("afterwards")

    def fails_alike(candidate: Program) -> bool:
        return (failure(candidate, reprove=independent) or "").split(":")[0] == kind

    return shrink(program, fails_alike, tries)
