"""Float16 weights and arithmetic, with the caller's dtypes at the edge: ``--precision fp16``.

A GPU multiplies float16 matrices several times as fast as float32 ones and moves half the bytes. Float16 has 11 bits
(2^-11 relative) and a range from 6.1e-5 (6e-8 with fewer bits) to 65,504. Inputs and outputs keep their dtype; Casts
stand where a tensor passes from one to the other, one for each tensor and direction.

Every node is one of two kinds: *half*, whose float32 inputs and outputs become float16, or *single*, which stays as it
is. A node is half as far as ONNX's own schema lets it: a place whose type has no float16 (the scales of a Resize) stays
float32. These are single:

- *Shapes*: what depends on the shapes of the inputs alone. Sizes above 2,048 are not exact in float16.
- *Whole numbers*: what a Cast to integers or a comparison reads, back through operations that move or scale numbers.
  Indices above 2,048 are not exact in float16 (a Keras Embedding reads float32 inputs by default), a mask that asks for
  zeros takes 1e-9 for one, and ONNX Runtime has no float16 comparisons on the CPU, where it folds constants.
- *Range*: roots, powers, exponentials, logarithms and sums, with what leads to them (squares and differences under a
  mean, an epsilon) and what brings their result back (a division, a reciprocal and its product). The variance of
  numbers around 300 overflows, an epsilon of 1e-12 is zero, exp(12) is infinite. It is what mixed precision in training
  keeps in float32, too. GlobalAveragePool and ReduceMean are half: runtimes sum them in float32.
- Loop, If and Scan with all that is inside of them, and what makes floats of nothing (ConstantOfShape, random draws).

Constants of half nodes are rounded to nearest, which is float16's own rule; a finite one beyond 65,504 becomes 65,504,
since an infinite weight makes NaN of zero. `Narrowed` counts these and those that become zero, and the export reports
both; whether the file is still the model is for `check` to say, under its float16 policy.

Why not a library: ``onnxruntime.transformers.float16`` (of 1.31, which onnxconverter-common's is the origin of) was
tried first. It needs no torch, but appends its Casts unsorted and makes two of the same name where two nodes of its
block list read one tensor, which the checker refuses; converts loop bodies with Casts outside of them; lifts tiny
constants to 6e-8 and cuts large ones with a debug message; and takes shape arithmetic and indices to float16.

Limits: a model above 2 GB is refused (its constants are not in the graph), and so is one that has nothing in float32.
Recurrences written as Loop gain nothing. Attributes stay float32 numbers, as ONNX has them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from deploykit.errors import InputError, UnsupportedModelError

FP32, FP16 = "fp32", "fp16"
PROPERTY = "deploykit.precision"  # in a file's metadata_props: a name of `POLICY`, or absent
POLICY = {FP32: "float32", FP16: "float16"}  # by what `check` judges the file
LARGEST = float(np.finfo(np.float16).max)
HALF = "tensor(float16)"

# fmt: off
MOVES = frozenset((
    "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Reshape", "Slice",
    "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where",
))
SCALES = frozenset(("Abs", "Add", "Ceil", "Clip", "Div", "Floor", "Max", "Min", "Mod", "Mul", "Neg", "Round", "Sub"))
COMPARES = frozenset(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"))
RANGE = frozenset((
    "CumSum", "Exp", "Log", "Pow", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
    "ReduceProd", "ReduceSum", "ReduceSumSquare", "Sqrt",
))
# fmt: on
EPSILON = frozenset(("Add", "Max", "Clip"))  # in front of a root or logarithm
SQUARE = frozenset(("Mul", "Pow", "Abs"))  # under a mean
CHAIN = frozenset(("Add", "Mul", "ReduceSum", "Sub"))
# by operation: the readers that bring its result back into range, and so are of its kind
BACK = {
    "Exp": CHAIN | {"Div", "Log", "Reciprocal"},
    "Sqrt": frozenset(("Div", "Mul", "Reciprocal")),
    "Reciprocal": frozenset(("Min", "Mul")),
    "Min": frozenset(("Mul",)),
    "ReduceSum": frozenset(("Div",)),
}


@dataclass(frozen=True)
class Narrowed:
    """What `to_float16` did: nodes that are half, single ones by operation, constants, and what became of them."""

    half: int
    single: Counter[str]
    constants: int
    cut: int  # finite, and beyond 65,504
    zeroed: int  # not zero, and nearer to it than half of the least float16

    def notices(self) -> Iterator[str]:
        """What a user must know, one line each."""
        if self.single:
            named = ", ".join(f"{kind} ({count})" for kind, count in sorted(self.single.items()))
            total = self.single.total()
            yield f"float16: {total} of {self.half + total} operations on floats stay in float32: {named}"
        if self.cut:
            yield f"float16: {self.cut} of {self.constants} constants are beyond {LARGEST:,.0f} and were cut to that"
        if self.zeroed:
            yield f"float16: {self.zeroed} of {self.constants} constants are below 3e-8 and became zero"


def known(precision: str) -> str:
    """The precision, where it is one. Raises InputError otherwise."""
    if precision not in POLICY:
        raise InputError(f"no precision {precision!r}; give {' or '.join(POLICY)}")
    return precision


def to_float16(model: ir.Model) -> Narrowed:
    """Let a model, whose types are inferred, compute in float16, in place.

    Raises UnsupportedModelError where nothing in it computes in float32.
    """
    graph = model.graph
    version = model.opset_imports[""]
    single = _shape_arithmetic(graph) | _whole_numbers(graph) | _ranges(graph)
    places = {node: _places(node, version) for node in graph if node not in single}
    half = {node: found for node, found in places.items() if found is not None}
    if unknown := next((node for node in graph if any(value.type is None for value in node.outputs)), None):
        raise UnsupportedModelError(
            f"what {unknown.op_type} makes in {unknown.name or 'the graph'} is of no known type, so that nothing can be"
            " made float16; export it without --precision fp16"
        )
    if not half:
        raise UnsupportedModelError("nothing in the model computes in float32; export it without --precision fp16")
    left = Counter(node.op_type for node in graph if node not in half and _floats(node))
    edges = _Edges(graph)
    for node, (inputs, outputs) in half.items():
        for place in inputs:
            edges.reads_half(node, place)
        if node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT16))
        edges.made_half.update(dict.fromkeys(node.outputs[place] for place in outputs))
    edges.connect()
    return Narrowed(len(half), left, edges.constants, edges.cut, edges.zeroed)


# ------------------------------------------------------------------------------------------------------- which nodes


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def _floats(node: ir.Node) -> bool:
    return node.op_type != "Constant" and any(map(_is_float, node.outputs))


def _places(node: ir.Node, version: int) -> tuple[list[int], list[int]] | None:
    """The inputs and outputs of a node that can be float16; None where it stays as it is."""
    if node.domain not in ("", "ai.onnx") or _has_graphs(node) or not onnx.defs.has(node.op_type, version, ""):
        return None
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    if any(not isinstance(value.type, ir.TensorType) for value in values):
        return None  # unknown, or a sequence
    schema = onnx.defs.get_schema(node.op_type, version, "")
    allowed = {row.type_param_str: HALF in row.allowed_type_strs for row in schema.type_constraints}

    def formal(formals: list[onnx.defs.OpSchema.FormalParameter], place: int) -> str:
        return str(formals[min(place, len(formals) - 1)].type_str)

    inputs = [p for p, v in enumerate(node.inputs) if _is_float(v) and allowed.get(formal(schema.inputs, p))]
    outputs = [p for p, v in enumerate(node.outputs) if _is_float(v) and allowed.get(formal(schema.outputs, p))]
    given = {formal(schema.inputs, place) for place in inputs}
    made = {formal(schema.outputs, place) for place in outputs}
    if not made <= given and node.op_type != "Cast":
        return None  # its type is an attribute's
    return (inputs, outputs) if outputs or (inputs and node.op_type != "Cast") else None


def _has_graphs(node: ir.Node) -> bool:
    return any(value.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for value in node.attributes.values())


def _makers(node: ir.Node) -> Iterator[ir.Node]:
    for value in node.inputs:
        maker = None if value is None else value.producer()
        if maker is not None and maker.graph is node.graph:
            yield maker


def _readers(node: ir.Node) -> Iterator[ir.Node]:
    for value in node.outputs:
        yield from (use.node for use in value.uses() if use.node.graph is node.graph)


def _is_constant(value: ir.Value | None) -> bool:
    return value is None or value.const_value is not None


def _shape_arithmetic(graph: ir.Graph) -> set[ir.Node]:
    found: set[ir.Node] = set()
    for node in graph:
        makers = set(_makers(node))
        known = makers & found and all(
            _is_constant(value) or value.producer() in found for value in node.inputs if value is not None
        )
        if node.op_type in ("Shape", "Size") or (known and not _has_graphs(node)):
            found.add(node)
    return found


def _whole_numbers(graph: ir.Graph) -> set[ir.Node]:
    def starts(node: ir.Node) -> bool:
        if node.op_type == "Cast":
            return _is_float(node.inputs[0]) and node.attributes["to"].as_int() not in _FLOATING
        return node.op_type in COMPARES and _is_float(node.inputs[0])

    found: set[ir.Node] = set()
    waiting = [node for node in graph if starts(node)]
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        for maker in _makers(node):
            scaled = maker.op_type in SCALES and sum(not _is_constant(value) for value in maker.inputs) == 1
            if maker.op_type in MOVES or scaled:
                waiting.append(maker)
    return found


_FLOATING = {int(kind) for kind in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)}


def _ranges(graph: ir.Graph) -> set[ir.Node]:
    found: set[ir.Node] = set()
    for node in graph:
        if node.op_type in RANGE:
            found.add(node)
            found |= set(_before(node))
            found |= _behind(node, node.op_type)
    return found


def _before(node: ir.Node) -> Iterator[ir.Node]:
    """What leads to a node that needs range: an epsilon, a mean, its squares, and the difference they are of."""
    if node.op_type.startswith("Reduce"):
        yield from _squares(node)
    for maker in _makers(node):
        if maker.op_type in EPSILON and sum(not _is_constant(value) for value in maker.inputs) == 1:
            yield maker
            yield from _before(maker)
        elif maker.op_type == "ReduceMean":
            yield maker
            yield from _squares(maker)


def _squares(mean: ir.Node) -> Iterator[ir.Node]:
    for square in _makers(mean):
        if square.op_type in SQUARE:
            yield square
            for difference in _makers(square):
                if difference.op_type == "Sub":
                    yield difference
                    yield from (maker for maker in _makers(difference) if maker.op_type == "ReduceMean")


def _behind(node: ir.Node, kind: str) -> set[ir.Node]:
    found: set[ir.Node] = set()
    waiting = [(node, kind)]
    while waiting:
        node, kind = waiting.pop()
        for reader in _readers(node):
            if reader not in found and reader.op_type in BACK.get(kind, ()):
                found.add(reader)
                waiting.append((reader, kind if kind == "Exp" and reader.op_type in CHAIN else reader.op_type))
    return found


# ------------------------------------------------------------------------------------------------------------- edges


class _Edges:
    """The two forms of every float tensor that is read in both, and the Casts between them."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.made_half: dict[ir.Value, None] = {}  # outputs of half nodes, in their order
        self.constants = self.cut = self.zeroed = 0
        self._halves: dict[ir.Value, list[tuple[ir.Node, int]]] = {}  # the places that read a tensor as float16

    def reads_half(self, node: ir.Node, place: int) -> None:
        value = node.inputs[place]
        assert value is not None
        self._halves.setdefault(value, []).append((node, place))

    def connect(self) -> None:
        """Give every reader the form it reads, and the graph's outputs float32."""
        for value, places in self._halves.items():
            if value not in self.made_half:
                half = self._constant(value) if _is_constant(value) else self._cast(value, ir.DataType.FLOAT16)
                for node, place in places:
                    node.replace_input_with(place, half)
        places_of: dict[ir.Value, list[int]] = {}
        for place, value in enumerate(self.graph.outputs):
            places_of.setdefault(value, []).append(place)
        for value in self.made_half:
            self._widen(value, places_of.get(value, []))

    def _widen(self, value: ir.Value, outputs: Sequence[int]) -> None:
        halves = set(self._halves.get(value, ()))
        readers = [use for use in value.uses() if (use.node, use.idx) not in halves]
        value.dtype = ir.DataType.FLOAT16
        if readers or outputs:
            wide = self._cast(value, ir.DataType.FLOAT)
            for use in readers:
                use.node.replace_input_with(use.idx, wide)
            for place in outputs:
                self.graph.outputs[place] = wide
            if outputs:
                value.name, wide.name = f"{value.name}/float16", value.name

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        maker, name = value.producer(), f"{value.name}/{to.name.lower()}"
        node = ir.node("Cast", [value], {"to": int(to)}, name=name)
        if maker is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(maker, node)
        made = node.outputs[0]
        made.name, made.shape, made.type = name, value.shape, ir.TensorType(to)
        return made

    def _constant(self, value: ir.Value) -> ir.Value:
        assert value.const_value is not None
        exact = value.const_value.numpy()
        with np.errstate(over="ignore", under="ignore"):
            half = exact.astype(np.float16)
        beyond = np.isinf(half) & np.isfinite(exact)
        half[beyond] = np.copysign(LARGEST, exact[beyond]).astype(np.float16)
        self.constants += exact.size
        self.cut += int(beyond.sum())
        self.zeroed += int(((half == 0) & (exact != 0)).sum())
        name = f"{value.name}/float16"
        made = ir.Value(name=name, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT16))
        made.const_value = ir.tensor(half, name=name)
        self.graph.register_initializer(made)
        return made
