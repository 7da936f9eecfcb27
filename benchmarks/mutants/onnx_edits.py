"""Mutants as ONNX files: edits of the graph that deploykit exports.

What Keras calls a layer is a few nodes here, so that places are found by operator and by initializer. A
BatchNormalization is the product and the sum that it was folded into; its parameters come from the Keras model.
`Graph` keeps nodes in an order in which they can be run.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, shape_inference

from deploykit.data import FREE_SEQUENCE
from deploykit.signature import Signature
from mutants import OFF_BY, OUTCOMES, Arrays, Made, Trigger, quantized, referee, rounded, triggers
from mutants.keras_edits import MISREAD, norm_of, width

Array = NDArray[Any]
Build = Callable[["Graph", str], str]
FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16}
LAST = np.iinfo(np.int64).min  # the end of a slice that runs backwards through the first element


class Graph:
    """A copy of a model to be edited."""

    def __init__(self, proto: Any) -> None:
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(proto)
        self.graph = self.proto.graph
        self._pending: list[Any] = []
        self._count = 0

    @functools.cached_property
    def types(self) -> dict[str, Any]:
        """What is known of each tensor: onnx's TypeProto.Tensor."""
        graph = shape_inference.infer_shapes(self.proto).graph
        found = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info, *graph.output)}
        for tensor in graph.initializer:
            found[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims).tensor_type
        return found

    def is_float(self, name: str) -> bool:
        return name in self.types and self.types[name].elem_type in FLOATS

    def rank(self, name: str) -> int:
        return len(self.types[name].shape.dim)

    def nodes(self, *kinds: str) -> list[Any]:
        return [node for node in self.graph.node if node.op_type in kinds]

    def constant(self, name: str) -> Array | None:
        return next((numpy_helper.to_array(t) for t in self.graph.initializer if t.name == name), None)

    def floats(self, name: str) -> bool:
        """Whether this is a float initializer of several values."""
        value = self.constant(name)
        return value is not None and value.dtype == np.float32 and value.size > 1

    def new(self, value: Any, dtype: Any = np.float32) -> str:
        """A further initializer."""
        self._count += 1
        name = f"mutant/{self._count}"
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A further node, inserted with the next `insert`."""
        self._count += 1
        self._pending.append(helper.make_node(kind, inputs, [f"mutant/{self._count}"], **attributes))
        return str(self._pending[-1].output[0])

    def insert(self, position: int) -> None:
        nodes = list(self.graph.node)
        self.graph.ClearField("node")
        self.graph.node.extend([*nodes[:position], *self._pending, *nodes[position:]])
        self._pending = []

    def behind(self, node: Any, build: Build) -> None:
        """``build`` happens to the first output of a node before anybody reads it."""
        position = list(self.graph.node).index(node)
        name, inner = node.output[0], f"{node.output[0]}/right"
        self.graph.node[position].output[0] = inner
        last = build(self, inner)
        self._pending[-1].output[0] = name if self._pending and self._pending[-1].output[0] == last else last
        self.insert(position + 1)

    def at_input(self, name: str, build: Build) -> None:
        """``build`` happens to an input before any node reads it."""
        readers = list(self.graph.node)
        last = build(self, name)
        for node in readers:
            for i, given in enumerate(node.input):
                if given == name:
                    node.input[i] = last
        self.insert(0)

    def instead(self, node: Any, build: Build) -> None:
        """``build`` of the first input takes the place of a node."""
        position = list(self.graph.node).index(node)
        name, given = node.output[0], node.input[0]
        last = build(self, given)
        assert self._pending
        assert self._pending[-1].output[0] == last
        self._pending[-1].output[0] = name
        del self.graph.node[position]
        self.insert(position)

    def give(self, node: Any, position: int, value: Array) -> None:
        """An initializer of its own for one input of a node."""
        node.input[position] = self.new(value)


def attributes(node: Any) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def with_attribute(node: Any, name: str, value: Any) -> None:
    kept = [a for a in node.attribute if a.name != name]
    node.ClearField("attribute")
    node.attribute.extend(kept if value is None else [*kept, helper.make_attribute(name, value)])


# ------------------------------------------------------------------------------------------------- places


@dataclass(frozen=True)
class Weight:
    """An initializer as one input of a node, and the axes of its output and input channels."""

    node: int
    position: int
    output: int
    input: int


# operator -> inputs that are kernels: position, axis of the output channels, of the input channels
KERNELS: Mapping[str, tuple[tuple[int, int, int], ...]] = {
    "Conv": ((1, 0, 1),),
    "MatMul": ((1, 1, 0),),
    "Gemm": ((1, 1, 0),),
    "LSTM": ((1, 1, 2), (2, 1, 2)),
    "GRU": ((1, 1, 2), (2, 1, 2)),
    "Gather": ((0, 1, 0),),
    "Loop": ((4, -1, 0), (5, -1, 0), (6, -1, 0)),
}
BIASES: Mapping[str, tuple[int, ...]] = {"Conv": (2,), "Add": (0, 1), "LSTM": (3,), "GRU": (3,), "Gemm": (2,)}


@dataclass(frozen=True, eq=False)
class Site:
    """A graph that may be edited, what it was exported from, and a generator that draws places in it."""

    graph: Graph
    model: Any
    signature: Signature
    rng: np.random.Generator

    def one(self, choices: Sequence[Any]) -> Any:
        return choices[int(self.rng.integers(len(choices)))] if choices else None

    def kernels(self) -> list[Weight]:
        return [
            Weight(i, position, output, input)
            for i, node in enumerate(self.graph.graph.node)
            for position, output, input in KERNELS.get(node.op_type, ())
            if position < len(node.input) and self.graph.floats(node.input[position])
        ]

    def biases(self) -> list[Weight]:
        return [
            Weight(i, position, 0, 0)
            for i, node in enumerate(self.graph.graph.node)
            for position in BIASES.get(node.op_type, ())
            if position < len(node.input) and self.graph.floats(node.input[position])
        ]

    def value(self, weight: Weight) -> Array:
        found = self.graph.constant(self.graph.graph.node[weight.node].input[weight.position])
        assert found is not None
        return found.astype(np.float64)

    def give(self, weight: Weight, value: Array) -> str:
        node = self.graph.graph.node[weight.node]
        self.graph.give(node, weight.position, value)
        return str(node.output[0])

    def merges(self, *kinds: str) -> list[Any]:
        """Nodes that join two computed tensors."""
        g = self.graph
        return [
            node
            for node in g.nodes(*kinds)
            if len(set(node.input)) == 2 and all(g.constant(x) is None and g.is_float(x) for x in node.input)
        ]

    def float_nodes(self, *kinds: str) -> list[Any]:
        return [node for node in self.graph.nodes(*kinds) if self.graph.is_float(node.output[0])]


Kind = Callable[[Site], str | None]  # edits the site's graph and says where; None: there is no such place


def _kernel(change: Callable[[Site, Weight, Array], Array | None]) -> Kind:
    def kind(site: Site) -> str | None:
        weight = site.one(site.kernels())
        new = None if weight is None else change(site, weight, site.value(weight))
        return None if new is None else site.give(weight, new)

    return kind


def _bias(change: Callable[[Site, Array], Array]) -> Kind:
    def kind(site: Site) -> str | None:
        weight = site.one(site.biases())
        return None if weight is None else site.give(weight, change(site, site.value(weight)))

    return kind


def _single(off: float) -> Kind:
    def change(site: Site, weight: Weight, value: Array) -> Array:
        value.flat[int(site.rng.integers(value.size))] *= 1 + off * site.rng.choice([-1, 1])
        return value

    return _kernel(change)


def _put(x: Array, where: Any, value: Any) -> Array:
    x[where] = value
    return x


def _channels(change: Callable[[Array, Array], Array], *, of: str = "output") -> Kind:
    def changed(site: Site, weight: Weight, value: Array) -> Array | None:
        axis = weight.output if of == "output" else weight.input
        front = np.moveaxis(value, axis, 0)
        if len(front) < 2:
            return None
        return np.moveaxis(change(front.copy(), site.rng.permutation(len(front))[:2]), 0, axis)

    return _kernel(changed)


def _swapped(places: str) -> Kind:
    """Two initializers of one shape exchanged."""

    def kind(site: Site) -> str | None:
        found = site.kernels() if places == "kernels" else site.biases()
        values = [site.value(weight) for weight in found]
        pairs = [
            (i, j)
            for i, a in enumerate(values)
            for j, b in enumerate(values[:i])
            if a.shape == b.shape and found[i].node != found[j].node and (a != b).any()
        ]
        if not pairs:
            return None
        i, j = site.one(pairs)
        return f"{site.give(found[i], values[j])}, {site.give(found[j], values[i])}"

    return kind


def _folded(site: Site) -> list[tuple[Any, Any, Any]]:
    """BatchNormalizations that are still a sum: (layer, its Mul or the MatMul that took it in, Add)."""
    norms = {layer.name: layer for layer in site.model.layers if isinstance(layer, keras.layers.BatchNormalization)}
    found = []
    for name, layer in norms.items():
        norm = norm_of(layer)
        right = norm.gamma / np.sqrt(norm.variance + norm.epsilon)
        for add in site.graph.nodes("Add"):
            makers = [node for node in site.graph.nodes("Mul", "MatMul") if node.output[0] == add.input[0]]
            scale = site.graph.constant(makers[0].input[1]) if makers else None
            if not add.output[0].startswith(f"{name}/") or scale is None or scale.shape[-1:] != right.shape[-1:]:
                continue
            if makers[0].op_type == "MatMul" or np.allclose(scale.ravel(), right, rtol=1e-5):
                found.append((layer, makers[0], add))
    return found


def _rewritten(site: Site, place: tuple[Any, Any, Any], wrong: tuple[Array, Array]) -> None:
    """Another scale and shift for a BatchNormalization: y = k·x + t, of which k holds its scale as a factor."""
    layer, product, add = place
    right = MISREAD["right"](norm_of(layer))
    scale, shift = site.graph.constant(product.input[1]), site.graph.constant(add.input[1])
    assert scale is not None
    assert shift is not None
    ratio, size = wrong[0] / right[0], (-1,) if product.op_type == "MatMul" else scale.shape
    site.graph.give(product, 1, scale * ratio.reshape(size))
    moved = (shift.ravel() - right[1]) * ratio + wrong[1]  # what a bias before it added is scaled as well
    site.graph.give(add, 1, moved.reshape(shift.shape))


def _misread(name: str) -> Kind:
    def kind(site: Site) -> str | None:
        place = site.one(_folded(site))
        if place is None:
            return None
        _rewritten(site, place, MISREAD[name](norm_of(place[0])))
        return str(place[0].name)

    return kind


def _other_statistics(site: Site) -> str | None:
    found = _folded(site)
    pairs = [(a, b) for a in found for b in found if a is not b and a[0].moving_mean.shape == b[0].moving_mean.shape]
    if not pairs:
        return None
    place, (other, *_) = site.one(pairs)
    layer = place[0]
    norm, theirs = norm_of(layer), norm_of(other)
    scale = norm.gamma / np.sqrt(theirs.variance + norm.epsilon)
    _rewritten(site, place, (scale, norm.beta - theirs.mean * scale))
    return f"{layer.name} with those of {other.name}"


# --------------------------------------------------------------------------------------------- attributes


def _attribute(kinds: tuple[str, ...], change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Kind:
    """Attributes of one node changed; ``change`` gives None where it would change nothing."""

    def kind(site: Site) -> str | None:
        node = site.one([node for node in site.graph.nodes(*kinds) if change(attributes(node)) is not None])
        if node is None:
            return None
        for name, value in (change(attributes(node)) or {}).items():
            with_attribute(node, name, value)
        return str(node.output[0])

    return kind


def _renamed(swap: Mapping[str, str]) -> Kind:
    """A node becomes another operator that takes the same inputs."""

    def kind(site: Site) -> str | None:
        node = site.one(site.float_nodes(*swap))
        if node is None:
            return None
        node.op_type = swap[node.op_type]
        if node.op_type == "MaxPool":
            with_attribute(node, "count_include_pad", None)
        return str(node.output[0])

    return kind


def _turned_pads(a: dict[str, Any]) -> dict[str, Any] | None:
    pads = a.get("pads")
    if not pads:
        return {"auto_pad": "SAME_LOWER"} if a.get("auto_pad") == b"SAME_UPPER" else None
    half = len(pads) // 2
    turned = [*pads[half:], *pads[:half]]
    return {"pads": turned} if turned != list(pads) else None


def _all_in_front(a: dict[str, Any]) -> dict[str, Any] | None:
    pads = a.get("pads")
    if not pads or not any(pads):
        return None
    half = len(pads) // 2
    front = [before + after for before, after in zip(pads[:half], pads[half:], strict=True)]
    return {"pads": [*front, *[0] * half]}


def _uncounted(a: dict[str, Any]) -> dict[str, Any] | None:
    padded = any(a.get("pads", ())) or a.get("auto_pad") == b"SAME_UPPER"
    return {"count_include_pad": 1} if padded and not a.get("count_include_pad") else None


def _other_order(site: Site) -> str | None:
    """Channels stay in front before a Reshape that flattens."""
    inputs = {name for node in site.graph.nodes("Reshape") for name in node.input[:1]}
    node = site.one(
        [n for n in site.float_nodes("Transpose") if n.output[0] in inputs and len(attributes(n)["perm"]) == 4]
    )
    if node is None:
        return None
    with_attribute(node, "perm", [0, 1, 2, 3])
    return str(node.output[0])


def _pads_of_pad(site: Site) -> str | None:
    nodes = [n for n in site.float_nodes("Pad") if (p := site.graph.constant(n.input[1])) is not None and p.any()]
    node = site.one(nodes)
    if node is None:
        return None
    pads = site.graph.constant(node.input[1])
    assert pads is not None
    half = len(pads) // 2
    node.input[1] = site.graph.new([*pads[half:], *pads[:half]], np.int64)
    return str(node.output[0])


def _concat_order(site: Site) -> str | None:
    node = site.one([n for n in site.float_nodes("Concat") if len(set(n.input)) == 2])
    if node is None:
        return None
    given = list(node.input)[::-1]
    node.ClearField("input")
    node.input.extend(given)
    return str(node.output[0])


# -------------------------------------------------------------------------------------------- activations


def _clip(low: float, high: float) -> Build:
    return lambda g, x: g.op("Clip", x, g.new(low), g.new(high))


def _simple(kind: str, **given: Any) -> Build:
    return lambda g, x: g.op(kind, x, **given)


def _selu_rounded(g: Graph, x: str) -> str:
    return g.op("Mul", g.op("Elu", x, alpha=1.6733), g.new(1.0507))


def _erf_by_tanh(g: Graph, z: str) -> str:
    x = g.op("Mul", z, g.new(np.sqrt(2)))
    cube = g.op("Mul", g.op("Mul", x, g.op("Mul", x, x)), g.new(0.044715))
    return g.op("Tanh", g.op("Mul", g.op("Add", x, cube), g.new(np.sqrt(2 / np.pi))))


ALTERNATIVES: Mapping[str, Mapping[str, Build]] = {
    "Relu": {
        "relu6": _clip(0, 6),
        "leaky (0.01)": _simple("LeakyRelu", alpha=0.01),
        "elu": _simple("Elu"),
        "nothing": _simple("Identity"),
        "softplus": _simple("Softplus"),
    },
    "LeakyRelu": {
        "leaky (0.01)": _simple("LeakyRelu", alpha=0.01),
        "leaky (0.3)": _simple("LeakyRelu", alpha=0.3),
        "relu": _simple("Relu"),
    },
    "Clip": {"relu": _simple("Relu"), "nothing": _simple("Identity")},
    "Elu": {"elu (alpha 0.5)": _simple("Elu", alpha=0.5), "selu": _simple("Selu"), "relu": _simple("Relu")},
    "Selu": {"elu": _simple("Elu"), "selu (rounded constants)": _selu_rounded},
    "Sigmoid": {
        "hard sigmoid": _simple("HardSigmoid", alpha=1 / 6, beta=0.5),
        "hard sigmoid of Keras 2": _simple("HardSigmoid", alpha=0.2, beta=0.5),
        "tanh": _simple("Tanh"),
    },
    "Tanh": {"hard tanh": _clip(-1, 1), "softsign": _simple("Softsign"), "sigmoid": _simple("Sigmoid")},
    "Softplus": {"relu": _simple("Relu")},
    "Softmax": {
        "sigmoid": _simple("Sigmoid"),
        "softmax over the batch": _simple("Softmax", axis=0),
        "nothing": _simple("Identity"),
    },
    "Erf": {"tanh formula": _erf_by_tanh, "tanh": _simple("Tanh")},
}


def _reactivated(old: str, new: str) -> Kind:
    def kind(site: Site) -> str | None:
        node = site.one(site.float_nodes(old))
        if node is None:
            return None
        where = str(node.output[0])
        site.graph.instead(node, ALTERNATIVES[old][new])
        return where

    return kind


# ---------------------------------------------------------------------------------------------- structure


def _merged(kinds: tuple[str, ...], change: Callable[[Any], None]) -> Kind:
    """A node that joins two tensors, changed in place."""

    def kind(site: Site) -> str | None:
        node = site.one(site.merges(*kinds))
        if node is None:
            return None
        change(node)
        return str(node.output[0])

    return kind


def _only(position: int) -> Callable[[Any], None]:
    def change(node: Any) -> None:
        kept = node.input[position]
        node.op_type = "Identity"
        node.ClearField("input")
        node.input.append(kept)

    return change


def _twice(node: Any) -> None:
    node.input[1] = node.input[0]


def _exchange(node: Any) -> None:
    node.input[0], node.input[1] = node.input[1], node.input[0]


def _becomes(kind: str) -> Callable[[Any], None]:
    def change(node: Any) -> None:
        node.op_type = kind

    return change


def _exchanged_outputs(site: Site) -> str | None:
    shapes = [spec.shape for spec in site.signature.outputs]
    pairs = [(i, j) for i in range(len(shapes)) for j in range(i) if shapes[i] == shapes[j]]
    if not pairs:
        return None
    a, b = (site.signature.outputs[i].name for i in site.one(pairs))
    swap = {a: b, b: a}
    for node in site.graph.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = swap.get(name, name)
    return f"{b}, {a}"


def _transposed(site: Site, weight: Weight, value: Array) -> Array | None:
    if value.ndim == 4:
        return value.swapaxes(2, 3) if value.shape[2] == value.shape[3] > 1 else None
    return value.T if value.ndim == 2 and value.shape[0] == value.shape[1] else None


def _flipped(site: Site, weight: Weight, value: Array) -> Array | None:
    return np.flip(value, (2, 3)) if value.ndim == 4 and value[0, 0].size > 1 else None


def _skipped(site: Site) -> str | None:
    fits = []
    for weight in site.kernels():
        node, shape = site.graph.graph.node[weight.node], site.value(weight).shape
        conv = node.op_type == "Conv" and set(attributes(node).get("strides", [1])) == {1}
        group = attributes(node).get("group", 1)
        if (conv and shape[0] == shape[1] * group) or (node.op_type == "MatMul" and shape[0] == shape[1]):
            fits.append(node)
    node = site.one(fits)
    if node is None:
        return None
    where = str(node.output[0])
    site.graph.instead(node, _simple("Identity"))
    return where


def _gates(site: Site) -> str | None:
    node = site.one(site.graph.nodes("LSTM", "GRU"))
    if node is None:
        return None
    count = 4 if node.op_type == "LSTM" else 3
    for position in (1, 2):
        value = site.graph.constant(node.input[position])
        assert value is not None
        parts = np.split(value, count, axis=1)
        parts[0], parts[1] = parts[1], parts[0]
        site.graph.give(node, position, np.concatenate(parts, axis=1))
    return str(node.output[0])


def _directions(site: Site) -> str | None:
    node = site.one([n for n in site.graph.nodes("LSTM", "GRU") if attributes(n).get("direction") == b"bidirectional"])
    if node is None:
        return None
    for position in (1, 2, 3):
        value = site.graph.constant(node.input[position])
        if value is not None:
            site.graph.give(node, position, value[::-1].copy())
    return str(node.output[0])


# ------------------------------------------------------------------------------------------------- inputs


def _backwards(axis: int) -> Build:
    def build(g: Graph, x: str) -> str:
        return g.op("Slice", x, *(g.new([v], np.int64) for v in (-1, LAST, axis, -1)))

    return build


def _fed(change: Callable[[Any], Build], fits: Callable[[Any], bool]) -> Kind:
    """The first input that fits is changed before the model sees it."""

    def kind(site: Site) -> str | None:
        spec = next((spec for spec in site.signature.inputs if fits(spec)), None)
        if spec is None:
            return None
        site.graph.at_input(spec.name, change(spec))
        return str(spec.name)

    return kind


def _is_float(spec: Any) -> bool:
    return bool(spec.dtype == "float32")


def _is_whole(spec: Any) -> bool:
    return "int" in spec.dtype


def _unranged(spec: Any) -> bool:
    return _is_float(spec) and spec.low is None


def _times(factor: float) -> Build:
    return lambda g, x: g.op("Mul", x, g.new(factor))


def _plus(term: float) -> Build:
    return lambda g, x: g.op("Add", x, g.new(term))


def _stepped(step: float) -> Build:
    return lambda g, x: g.op("Mul", g.op("Round", g.op("Mul", x, g.new(1 / step))), g.new(step))


def _below(limit: int) -> Build:
    def build(g: Graph, x: str) -> str:
        return g.op("Where", g.op("Greater", x, g.new(limit, np.int32)), g.new(0, np.int32), x)

    return build


INPUTS: Mapping[str, Kind] = {
    "height and width exchanged": _fed(
        lambda i: _simple("Transpose", perm=[0, 2, 1, 3]), lambda i: len(i.shape) == 4 and i.shape[1] == i.shape[2]
    ),
    "channels reversed": _fed(lambda i: _backwards(-1), lambda i: _is_float(i) and (i.shape[-1] or 0) > 1),
    "upside down": _fed(lambda i: _backwards(1), lambda i: len(i.shape) > 2 or _is_whole(i)),
    "divided by 255": _fed(lambda i: _times(1 / 255), _is_float),
    "128 instead of 127.5": _fed(lambda i: _times(127.5 / 128), _is_float),
    "range shifted by 1 %": _fed(lambda i: _plus(0.01 * width(i)), _is_float),
    "range shifted by 0.01 %": _fed(lambda i: _plus(1e-4 * width(i)), _is_float),
    "mirrored": _fed(lambda i: _simple("Neg"), _unranged),
    "negative values lost": _fed(lambda i: _simple("Relu"), _unranged),
    "rounded to whole steps": _fed(lambda i: _stepped(width(i) / 255), _is_float),
    "clipped at 90 % of the range": _fed(
        lambda i: _clip((i.low or -1.0) + 0.05 * width(i), (i.high or 1.0) - 0.05 * width(i)), _is_float
    ),
    "ids off by one": _fed(
        lambda i: lambda g, x: g.op("Max", g.op("Sub", x, g.new(1, np.int32)), g.new(0, np.int32)), _is_whole
    ),
    "ids above 20 unknown": _fed(lambda i: _below(20), _is_whole),
}


# ---------------------------------------------------------------------------------------------- precision


def _narrow(dtype: str, *, everywhere: bool) -> Kind:
    def kind(site: Site) -> str | None:
        places = [*site.kernels(), *(site.biases() if everywhere else ())]
        chosen = places if everywhere else [site.one(places)]
        if not places:
            return None
        narrow = quantized if dtype == "int8" else functools.partial(rounded, dtype=dtype)
        where = [site.give(weight, narrow(site.value(weight))) for weight in chosen]
        return "all" if everywhere else where[0]

    return kind


def _cast(dtype: str) -> Build:
    to = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[dtype]
    return lambda g, x: g.op("Cast", g.op("Cast", x, to=to), to=TensorProto.FLOAT)


def _behind(kinds: tuple[str, ...], build: Build) -> Kind:
    def kind(site: Site) -> str | None:
        node = site.one(site.float_nodes(*kinds))
        if node is None:
            return None
        where = str(node.output[0])
        site.graph.behind(node, build)
        return where

    return kind


def _output(build: Callable[[Site, str], Build]) -> Kind:
    """One output is changed behind the model."""

    def kind(site: Site) -> str | None:
        name = site.one([spec.name for spec in site.signature.outputs])
        site.graph.behind(next(node for node in site.graph.graph.node if name in node.output), build(site, name))
        return str(name)

    return kind


# ------------------------------------------------------------------------------------------ shapes and rare


def _batch(size: int) -> Kind:
    def kind(site: Site) -> str:
        for value in (*site.graph.graph.input, *site.graph.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = size
        return "the signature"

    return kind


def _reshaped(sizes: Callable[[Any], list[int] | None]) -> Kind:
    """An input goes through a Reshape to sizes that are right for some batches or lengths only."""

    def kind(site: Site) -> str | None:
        spec = site.signature.inputs[0]
        target = sizes(spec)
        if target is None:
            return None
        site.graph.at_input(spec.name, lambda g, x: g.op("Reshape", x, g.new(target, np.int64)))
        return str(spec.name)

    return kind


def _closed(shape: Sequence[int | None]) -> list[int] | None:
    """The sizes of a sample, where they are all known."""
    return None if None in shape[1:] else [int(size or 0) for size in shape[1:]]


def _declared(change: Callable[[Any], None], build: Build) -> Kind:
    """An output is changed, and what the file says of it too."""

    def kind(site: Site) -> str:
        value = site.one(list(site.graph.graph.output))
        node = next(node for node in site.graph.graph.node if value.name in node.output)
        site.graph.behind(node, build)
        change(value.type.tensor_type)
        return str(value.name)

    return kind


def _one_more(kind: Any) -> None:
    dims = [(d.dim_value, d.dim_param) for d in kind.shape.dim]
    kind.shape.ClearField("dim")
    for size, name in [dims[0], (1, ""), *dims[1:]]:
        dim = kind.shape.dim.add()
        if name or not size:
            dim.dim_param = name or "free"
        else:
            dim.dim_value = size


def _to_double(kind: Any) -> None:
    kind.elem_type = TensorProto.DOUBLE


def _first_for_all(g: Graph, y: str) -> str:
    return g.op("Add", g.op("Mul", y, g.new(0.0)), g.op("Gather", y, g.new([0], np.int64), axis=0))


def _less_mean(g: Graph, y: str) -> str:
    mean = g.op("ReduceMean", y, g.new([0], np.int64), keepdims=1)
    return g.op("Sub", y, g.op("Mul", mean, g.new(0.01)))


def _first_steps(g: Graph, x: str) -> str:
    one = g.op("Add", g.op("Mul", x, g.new(0.0)), g.new(1.0))
    step = g.op("CumSum", one, g.new(1, np.int64))
    return g.op("Where", g.op("LessOrEqual", step, g.new(float(FREE_SEQUENCE))), x, g.new(0.0))


def _has_length(spec: Any) -> bool:
    return len(spec.shape) == 3 and spec.shape[1] is None


def _renamed_end(which: str) -> Kind:
    def kind(site: Site) -> str:
        value = site.one(list(getattr(site.graph.graph, which)))
        old, new = value.name, f"{value.name}_0"
        value.name = new
        for node in site.graph.graph.node:
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    names[i] = new if name == old else name
        return str(old)

    return kind


def _reordered_outputs(site: Site) -> str | None:
    outputs = list(site.graph.graph.output)
    if len(outputs) < 2:
        return None
    site.graph.graph.ClearField("output")
    site.graph.graph.output.extend(outputs[::-1])
    return "all"


def _true_of(g: Graph, trigger: Trigger, x: str) -> str:
    """Which samples of a batch, booleans of shape [batch]."""
    axes = g.new(list(range(1, g.rank(x))), np.int64)
    x = g.op("Cast", x, to=TensorProto.FLOAT)
    least, most = (g.op(kind, x, axes, keepdims=0) for kind in ("ReduceMin", "ReduceMax"))
    conditions = []
    if trigger.least is not None:
        conditions.append(g.op("GreaterOrEqual", least, g.new(trigger.least)))
    if trigger.most is not None:
        conditions.append(g.op("LessOrEqual", most, g.new(trigger.most)))
    if trigger.flat:
        conditions += [g.op("Equal", least, most), g.op("Not", g.op("Equal", most, g.new(0.0)))]
    if trigger.peak is not None:
        conditions.append(g.op("GreaterOrEqual", most, g.new(trigger.peak)))
    if trigger.place is not None:
        one = g.op("Add", g.op("Mul", most, g.new(0.0)), g.new(1.0))
        index = g.op("CumSum", one, g.new(0, np.int64))
        count = g.op("ReduceSum", one, keepdims=0)
        several = g.op("Greater", count, g.new(1.0))
        odd = g.op("Equal", g.op("Mod", count, g.new(2.0), fmod=1), g.new(1.0))
        conditions += {
            "first": lambda: [g.op("Equal", index, g.new(1.0))],
            "last": lambda: [g.op("Equal", index, count), several],
            "alone": lambda: [g.op("Equal", g.op("Mul", index, count), g.new(1.0))],
            "late": lambda: [g.op("Greater", index, g.new(8.0))],
            "odd": lambda: [g.op("Greater", index, g.new(0.0)), several, odd],
        }[trigger.place]()
    return functools.reduce(lambda a, b: g.op("And", a, b), conditions)


def _rare(trigger: Trigger, outcome: str) -> Kind:
    def kind(site: Site) -> str:
        name = site.signature.outputs[0].name
        rank = site.graph.rank(name)

        def build(g: Graph, y: str) -> str:
            condition = _true_of(g, trigger, site.signature.inputs[0].name)
            wide = g.op("Reshape", condition, g.new([-1, *[1] * (rank - 1)], np.int64))
            wrong = g.op("Mul", y, g.new(float("nan") if outcome == "NaN" else 1.01))
            return g.op("Where", wide, wrong, y)

        site.graph.behind(next(node for node in site.graph.graph.node if name in node.output), build)
        return str(name)

    return kind


def _small_part(build: Build) -> Kind:
    """The columns of a Concat that come out of a Softmax: small beside what they are joined to."""

    def kind(site: Site) -> str | None:
        g = site.graph
        parts = {node.output[0]: node for node in g.nodes("Softmax")}
        joined = {name for node in g.nodes("Concat") for name in node.input}
        node = site.one([node for name, node in parts.items() if name in joined])
        if node is None:
            return None
        name = str(node.output[0])
        g.behind(node, build)
        return name

    return kind


def _rolled(g: Graph, y: str) -> str:
    first, rest = (
        g.op("Slice", y, *(g.new([v], np.int64) for v in bounds))
        for bounds in ((0, 1, -1, 1), (1, np.iinfo(np.int64).max, -1, 1))
    )
    return g.op("Concat", rest, first, axis=-1)


# -------------------------------------------------------------------------------------------------- tables

WINDOWS = ("Conv", "MaxPool", "AveragePool")
BUSY = ("Conv", "MatMul", "Add", "Mul", "Relu")


def _all_are(key: str, value: int, becomes: int) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    return lambda a: {key: [becomes] * len(a[key])} if key in a and set(a[key]) == {value} else None


def _doubled_pads(a: dict[str, Any]) -> dict[str, Any] | None:
    """Dilation 2 for 1 with the padding that keeps the size."""
    if set(a.get("dilations", [])) != {1} or max(a["kernel_shape"]) == 1 or not any(a.get("pads", [])):
        return None
    reach = [2 * (k - 1) for k in a["kernel_shape"]]
    return {"dilations": [2] * len(reach), "pads": [*(r // 2 for r in reach), *(r - r // 2 for r in reach)]}


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
    },
    "biases": {
        "dropped": _bias(lambda s, x: 0 * x),
        "shifted by 0.01": _bias(lambda s, x: x + 0.01),
        "shifted by 0.0001": _bias(lambda s, x: x + 0.0001),
        "rolled by one": _bias(lambda s, x: np.roll(x.ravel(), 1).reshape(x.shape)),
        "negated": _bias(lambda s, x: -x),
        "added twice": _bias(lambda s, x: 2 * x),
        "one value lost": _bias(lambda s, x: _put(x.ravel(), int(s.rng.integers(x.size)), 0.0).reshape(x.shape)),
        "swapped between layers": _swapped("biases"),
    },
    "BN": {
        **{name: _misread(name) for name in MISREAD if name != "right"},
        "statistics of another layer": _other_statistics,
    },
    "attributes": {
        "strides 1 for 2": _attribute(WINDOWS, _all_are("strides", 2, 1)),
        "strides 2 for 1": _attribute(WINDOWS, _all_are("strides", 1, 2)),
        "dilation 2 for 1": _attribute(("Conv",), _doubled_pads),
        "dilation 1 for 2": _attribute(
            ("Conv",),
            lambda a: (
                {"dilations": [1, 1], "pads": [p // 2 for p in a["pads"]]} if set(a["dilations"]) == {2} else None
            ),
        ),
        "pads dropped": _attribute(
            WINDOWS, lambda a: {"pads": [0] * len(a["pads"])} if any(a.get("pads", ())) else None
        ),
        "uneven pads at the other end": _attribute(WINDOWS, _turned_pads),
        "pads all in front": _attribute(("Conv",), _all_in_front),
        "padding node at the other end": _pads_of_pad,
        "pads counted by the average": _attribute(("AveragePool",), _uncounted),
        "max pooling for average, or the reverse": _renamed({"MaxPool": "AveragePool", "AveragePool": "MaxPool"}),
        "global max for mean": _renamed({"ReduceMean": "ReduceMax"}),
        "sum for mean": _renamed({"ReduceMean": "ReduceSum"}),
        "alpha 0.11 for 0.1": _attribute(("LeakyRelu",), lambda a: {"alpha": 0.11}),
        "flattened channels first": _other_order,
        "concatenated the other way round": _concat_order,
    },
    "activations": {f"{old} -> {new}": _reactivated(old, new) for old, row in ALTERNATIVES.items() for new in row},
    "structure": {
        "outputs exchanged": _exchanged_outputs,
        "residual dropped": _merged(("Add",), _only(1)),
        "branch dropped": _merged(("Add", "Mul", "Max", "Sub"), _only(0)),
        "one branch fed twice": _merged(("Add", "Mul", "Max", "Sub", "Concat"), _twice),
        "operands exchanged": _merged(("Sub",), _exchange),
        "difference for sum": _merged(("Add",), _becomes("Sub")),
        "sum for product": _merged(("Mul",), _becomes("Add")),
        "kernel transposed": _kernel(_transposed),
        "kernel flipped": _kernel(_flipped),
        "weights of two layers exchanged": _swapped("kernels"),
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
        "float16 behind one node": _behind(BUSY, _cast("float16")),
        "bfloat16 behind one node": _behind(BUSY, _cast("bfloat16")),
        "float16 input": _fed(lambda i: _cast("float16"), _is_float),
        "float16 output": _output(lambda site, name: _cast("float16")),
        "bfloat16 output": _output(lambda site, name: _cast("bfloat16")),
    },
    "scales": {
        "small columns times 1.5": _small_part(lambda g, y: g.op("Mul", y, g.new(1.5))),
        "small columns times 1.001": _small_part(lambda g, y: g.op("Mul", y, g.new(1.001))),
        "small columns shifted by 0.0001": _small_part(lambda g, y: g.op("Add", y, g.new(1e-4))),
        "small columns rolled by one": _small_part(_rolled),
        "small columns zeroed": _small_part(lambda g, y: g.op("Mul", y, g.new(0.0))),
        "small columns those of other samples": _small_part(_backwards(0)),
    },
    "shapes": {
        "batch of 1 in the signature": _batch(1),
        "batch of 32 in the signature": _batch(32),
        "batch of 32 inside": _reshaped(lambda i: (s := _closed(i.shape)) and [32, *s]),
        "batch of 1 inside": _reshaped(lambda i: (s := _closed(i.shape)) and [1, *s]),
        f"length of {FREE_SEQUENCE} inside": _reshaped(
            lambda i: [-1, FREE_SEQUENCE, i.shape[2]] if _has_length(i) else None
        ),
        f"steps beyond {FREE_SEQUENCE} lost": _fed(lambda i: _first_steps, _has_length),
        "an axis more": _declared(_one_more, lambda g, y: g.op("Unsqueeze", y, g.new([1], np.int64))),
        "output in float64": _declared(_to_double, _simple("Cast", to=TensorProto.DOUBLE)),
        "every answer that of the first sample": _output(lambda site, name: _first_for_all),
        "samples in reverse order": _output(lambda site, name: _backwards(0)),
        "mean over the batch subtracted": _output(lambda site, name: _less_mean),
        "input renamed": _renamed_end("input"),
        "output renamed": _renamed_end("output"),
        "outputs in another order": _reordered_outputs,
    },
}


def kinds_for(signature: Signature) -> Mapping[str, Mapping[str, Kind]]:
    """All kinds; those of the family "rare" depend on what the first input takes."""
    spec = signature.inputs[0]
    found = zip(triggers(spec.low, spec.high, "int" in spec.dtype), itertools.cycle(OUTCOMES[::-1]))
    return {**KINDS, "rare": {f"{outcome} on {trigger.label}": _rare(trigger, outcome) for trigger, outcome in found}}


def mutants(
    proto: Any,
    model: Any,
    signature: Signature,
    rng: np.random.Generator,
    most: Mapping[str, int],
    path: Path,
    kinds: int | None = None,
) -> Iterator[Made]:
    """Mutants of one graph, each written to ``path`` when its turn comes; the rest as for Keras."""
    for family, rows in kinds_for(signature).items():
        left = kinds
        for name in rng.permutation(list(rows)) if kinds else rows:
            seen: set[str] = set()
            for _ in range(4 * most[family]):
                if left == 0:
                    break
                graph = Graph(proto)
                where = rows[name](Site(graph, model, signature, rng))
                if where is None:
                    break
                if where in seen:
                    continue
                seen.add(where)
                graph.graph.ClearField("value_info")  # sizes may have changed
                path.write_bytes(graph.proto.SerializeToString())
                yield Made(family, str(name), where, path, functools.partial(_doubled, graph.proto))
                if len(seen) == most[family]:
                    break
            left = left - 1 if left and seen else left


def _doubled(proto: Any, arrays: Arrays) -> dict[str, Array]:
    return referee.evaluate(referee.doubled(proto), arrays)
