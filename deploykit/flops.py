"""What an ONNX operator has to do: floating-point operations and bytes, from the shapes of its tensors alone.

The count is of the mathematics, not of a kernel. An addition, a multiplication, a comparison and a value of exp, log,
tanh, erf or sqrt count 1 each, a multiply-add 2; moving and converting values counts 0. |X| is the number of elements
of the first input, |Y| of the first output, and a formula stands beside each row of `FLOPS`. What no row knows is None
("unknown"), never 0.

Bytes are those that any kernel must touch once: every input read, every output written. Exceptions are rows of
`BYTES`: an operator that only gives a tensor another shape touches none, and one that picks a part reads that part.

`graph_flops` needs the shapes of a whole file; ONNX's own shape inference finds them from the shapes of the inputs.

Limits. Implementations may do more (padding to whole blocks, layouts) or less (Winograd, sparsity, sums kept between
runs): figures compare two files or a file with a machine, and are no measurement. A body of Loop, Scan or If runs
an unknown number of times, so that node is unknown; integer arithmetic counts like floating-point arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper

__all__ = ["KINDS", "Call", "bytes_moved", "flops", "graph_flops", "kind"]

Shape = tuple[int, ...]
Count = Callable[["Call"], int]

LARGE = 1024  # elements: the values of larger constants say nothing about shapes


@dataclass(frozen=True)
class Call:
    """One execution of an operator. ``inputs``: a shape for each place, None for one left out."""

    operator: str
    inputs: tuple[Shape | None, ...]
    outputs: tuple[Shape | None, ...]
    attributes: Mapping[str, Any]

    def shape(self, place: int) -> Shape:
        """The shape of an input; raises LookupError where there is none."""
        shape = self.inputs[place]
        if shape is None:
            raise LookupError(place)
        return shape

    def has(self, place: int) -> bool:
        return place < len(self.inputs) and self.inputs[place] is not None

    @property
    def x(self) -> int:
        return math.prod(self.shape(0))

    @property
    def y(self) -> int:
        shape = self.outputs[0]
        if shape is None:
            raise LookupError("output")
        return math.prod(shape)


# ---------------------------------------------------------------------------------------------------- formulas


def _conv(weight: int, bias: int) -> Count:
    """2·|Y|·|W|/M: every output is a product with one of the M filters; + |Y| for the bias."""

    def count(call: Call) -> int:
        shape = call.shape(weight)
        return 2 * call.y * math.prod(shape[1:]) + call.y * call.has(bias)

    return count


def _conv_transpose(call: Call) -> int:
    """2·|X|·|W|/C: every one of the C input channels is spread by its filters; + |Y| for the bias."""
    return 2 * call.x * math.prod(call.shape(1)[1:]) + call.y * call.has(2)


def _product(call: Call) -> int:
    """2·|Y|·K, K being what the rows of the first matrix and the columns of the second have in common."""
    return 2 * call.y * call.shape(0)[-1]


def _gemm(call: Call) -> int:
    """2·|Y|·K, + |Y| for C."""
    return 2 * call.y * call.shape(0)[0 if call.attributes.get("transA") else 1] + call.y * call.has(2)


def _einsum(call: Call) -> int:
    """(number of inputs)·Π(sizes of all indices): one multiplication per further input, and one addition."""
    terms = call.attributes["equation"].replace(b" ", b"").decode().split("->")[0].split(",")
    if any("." in term for term in terms):
        raise LookupError("ellipsis")
    sizes = {
        index: size for place, term in enumerate(terms) for index, size in zip(term, call.shape(place), strict=True)
    }
    return len(terms) * math.prod(sizes.values())


def _recurrent(gates: int, pointwise: int) -> Count:
    """D·T·B·(2·G·H·(I + H) + e·H): G gates read I inputs and H states; e: biases, activations, the state's update."""

    def count(call: Call) -> int:
        steps = math.prod(call.shape(0)[:2])
        directions, _, size = call.shape(1)
        hidden = call.shape(2)[-1]
        return directions * steps * hidden * (2 * gates * (size + hidden) + pointwise)

    return count


def _pool(call: Call) -> int:
    """|Y|·Π(window)."""
    window: int = math.prod(call.attributes["kernel_shape"])
    return call.y * window


def _resize(call: Call) -> int:
    """(2·taps - 1)·|Y|, taps = 1, 2 or 4 to the number of axes that change; nearest: 0."""
    taps = {b"nearest": 0, b"linear": 2, b"cubic": 4}[call.attributes.get("mode", b"nearest")]
    after = call.outputs[0] or ()
    changed = sum(a != b for a, b in zip(call.shape(0), after, strict=True))
    return (2 * taps**changed - 1) * call.y if taps and changed else 0


def _each_output(number: int) -> Count:
    return lambda call: number * call.y


def _each_input(number: int) -> Count:
    return lambda call: number * call.x


def _nary(call: Call) -> int:
    """(number of inputs - 1)·|Y|."""
    return (len(call.inputs) - 1) * call.y


def _nothing(call: Call) -> int:
    return 0


# ------------------------------------------------------------------------------------------------------ tables

# operations per element of the output
_ELEMENTWISE: Mapping[str, int] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Neg", "Abs", "Sign", "Reciprocal", "Relu"), 1),
    **dict.fromkeys(("Exp", "Log", "Sqrt", "Erf", "Tanh", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan"), 1),
    **dict.fromkeys(("Sinh", "Cosh", "Asinh", "Acosh", "Atanh", "Floor", "Ceil", "Round", "IsNaN", "IsInf"), 1),
    **dict.fromkeys(("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Where"), 1),
    **dict.fromkeys(("And", "Or", "Xor", "Not", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot"), 1),
    "Clip": 2,  # max, min
    "LeakyRelu": 2,  # compare, multiply
    "PRelu": 2,
    "ThresholdedRelu": 1,
    "Shrink": 2,
    "Elu": 4,  # compare, exp, subtract, multiply
    "Celu": 5,  # ... and divide
    "Selu": 5,
    "Softplus": 3,  # exp, add, log
    "Softsign": 3,  # abs, add, divide
    "Sigmoid": 4,  # negate, exp, add, divide
    "HardSigmoid": 4,  # multiply, add, max, min
    "HardSwish": 5,  # ... and multiply
    "Swish": 5,
    "QuickGelu": 6,  # x·sigmoid(a·x)
    "Mish": 5,  # softplus, tanh, multiply
    "Gelu": 5,  # divide, erf, add, multiply, multiply
    "QuantizeLinear": 5,  # divide, round, add, max, min
    "DequantizeLinear": 2,  # subtract, multiply
}

# operations per element of the input
_OVER_INPUT: Mapping[str, int] = {
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd"), 1),
    **dict.fromkeys(("ArgMax", "ArgMin", "CumSum", "TopK", "GlobalMaxPool", "GlobalAveragePool"), 1),
    **dict.fromkeys(("ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum", "GlobalLpPool"), 2),
    "ReduceLogSumExp": 2,
    "Softmax": 5,  # max, subtract, exp, sum, divide
    "LogSoftmax": 5,
    "Hardmax": 1,
    "BatchNormalization": 2,  # a scale and a shift that are known
    "InstanceNormalization": 7,  # sum, subtract, square, sum, multiply; scale, shift
    "GroupNormalization": 7,
    "LayerNormalization": 7,
    "MeanVarianceNormalization": 5,
    "RMSNormalization": 4,  # square, sum, multiply; scale
    "SimplifiedLayerNormalization": 4,
    "LpNormalization": 3,
    "DynamicQuantizeLinear": 7,  # max, min, and QuantizeLinear
}

MOVES = (
    "Cast", "CastLike", "Concat", "ConstantOfShape", "DepthToSpace", "Expand", "EyeLike", "Flatten", "Gather",
    "GatherElements", "GatherND", "Identity", "NonZero", "OneHot", "Pad", "Range", "ReorderInput", "ReorderOutput",
    "Reshape", "Scatter", "ScatterElements", "ScatterND", "SequenceAt", "Shape", "Size", "Slice", "SpaceToDepth",
    "Split", "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze", "Upsample", "Constant", "Dropout",
    "ReverseSequence",
)  # fmt: skip

FLOPS: Mapping[str, Count] = {
    **dict.fromkeys(MOVES, _nothing),
    **{name: _each_output(number) for name, number in _ELEMENTWISE.items()},
    **{name: _each_input(number) for name, number in _OVER_INPUT.items()},
    "Conv": _conv(1, 2),
    "FusedConv": _conv(1, 2),
    "ConvInteger": _conv(1, 9),  # it has no bias
    "QLinearConv": _conv(3, 8),
    "ConvTranspose": _conv_transpose,
    "MatMul": _product,
    "FusedMatMul": _product,
    "MatMulInteger": _product,
    "QLinearMatMul": _product,
    "Gemm": _gemm,
    "FusedGemm": _gemm,
    "Einsum": _einsum,
    "RNN": _recurrent(1, 3),  # 2 biases, activation
    "GRU": _recurrent(3, 14),  # 6 biases, 3 activations, r·h, z·h + (1 - z)·n
    "LSTM": _recurrent(4, 17),  # 8 biases, 5 activations, f·c + i·g, o·tanh(c)
    "MaxPool": _pool,
    "AveragePool": _pool,
    "LpPool": lambda call: 2 * _pool(call),
    **dict.fromkeys(("Sum", "Max", "Min", "Mean"), _nary),
    "LRN": lambda call: (2 * call.attributes["size"] + 4) * call.x,  # squares, sum; multiply, add, power, divide
    "Resize": _resize,
}


def flops(call: Call) -> int | None:
    """Operations of one execution; None where no formula or no shape is known."""
    count = FLOPS.get(call.operator)
    if count is None:
        return None
    try:
        return count(call)
    except (LookupError, ValueError):  # a shape, an attribute or an axis is not there
        return None


def _all(inputs: Sequence[int], outputs: Sequence[int]) -> int:
    return sum(inputs) + sum(outputs)


def _no_bytes(inputs: Sequence[int], outputs: Sequence[int]) -> int:
    return 0


def _part(inputs: Sequence[int], outputs: Sequence[int]) -> int:
    return 2 * sum(outputs)


def _filled(inputs: Sequence[int], outputs: Sequence[int]) -> int:
    return sum(outputs)


BYTES: Mapping[str, Callable[[Sequence[int], Sequence[int]], int]] = {
    # the same memory under another shape
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", "Shape", "Size"), _no_bytes),
    **dict.fromkeys(("Slice", "Gather", "GatherElements", "GatherND"), _part),  # |Y| read, |Y| written
    **dict.fromkeys(("ConstantOfShape", "Range", "EyeLike"), _filled),
}


def bytes_moved(operator: str, inputs: Sequence[int], outputs: Sequence[int]) -> int:
    """Bytes that must be touched, from the size in bytes of every input (weights too) and output."""
    return BYTES.get(operator, _all)(inputs, outputs)


_QUANTISING = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_LAYOUT = frozenset({"ReorderInput", "ReorderOutput", "Transpose"})

# Kinds of operators, as a table of where the time goes names them; no operator stands in two rows.
KINDS: Mapping[str, frozenset[str]] = {
    "convolution": frozenset({"Conv", "FusedConv", "ConvTranspose", "ConvInteger", "QLinearConv", "NhwcFusedConv"}),
    "matrix product": frozenset(
        {"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Einsum", "MatMulInteger", "QLinearMatMul", "QGemm"}
        | {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "Attention", "MultiHeadAttention", "MatMulNBits"}
    ),
    "recurrent": frozenset({"RNN", "GRU", "LSTM"}),
    "pooling": frozenset(
        {"MaxPool", "AveragePool", "LpPool", "GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"}
        | {"QLinearAveragePool", "QLinearGlobalAveragePool"}
    ),
    "layout": _LAYOUT,
    "normalisation": frozenset(
        {"BatchNormalization", "InstanceNormalization", "GroupNormalization", "LayerNormalization", "LRN"}
        | {"SimplifiedLayerNormalization", "SkipLayerNormalization", "RMSNormalization", "LpNormalization"}
        | {"MeanVarianceNormalization"}
    ),
    "softmax": frozenset({"Softmax", "LogSoftmax", "Hardmax"}),
    "reduction": frozenset({name for name in _OVER_INPUT if name.startswith(("Reduce", "Arg", "CumSum", "TopK"))}),
    "quantisation": _QUANTISING,
    "elementwise": frozenset({*_ELEMENTWISE, "Sum", "Max", "Min", "Mean", "BiasGelu", "FastGelu"}) - _QUANTISING,
    "data movement": frozenset({*MOVES, "Resize"}) - _LAYOUT,
    "control": frozenset({"Loop", "Scan", "If"}),
}


def kind(operator: str) -> str:
    """The row of `KINDS` that an operator belongs to; "other" where it is in none."""
    return next((name for name, operators in KINDS.items() if operator in operators), "other")


# ------------------------------------------------------------------------------------------------------- graphs


def graph_flops(model: Any, inputs: Mapping[str, Shape]) -> dict[str, int | None]:
    """Operations of every node of a file's main graph, by the name of its first output, for inputs of these shapes.

    ``model`` is an onnx.ModelProto and stays as it is; external data need not be loaded.
    """
    shapes = _shapes(model, inputs)
    return {next(filter(None, node.output)): flops(_call(node, shapes)) for node in model.graph.node}


def _call(node: Any, shapes: Mapping[str, Shape]) -> Call:
    return Call(
        node.op_type,
        tuple(shapes.get(name) for name in node.input),
        tuple(shapes.get(name) for name in node.output),
        {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute},
    )


def _shapes(model: Any, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
    """Every tensor's shape that inference can tell."""
    graph = model.graph
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    light.graph.name = graph.name
    light.graph.node.extend(graph.node)
    light.graph.output.extend(
        helper.make_tensor_value_info(o.name, o.type.tensor_type.elem_type, None) for o in graph.output
    )  # their declared sizes may be those of another input
    for value in graph.input:
        light.graph.input.append(value)
        if value.name in inputs:
            light.graph.input[-1].CopyFrom(
                helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, inputs[value.name])
            )
    light.graph.initializer.extend(map(_light, graph.initializer))
    inferred = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    known = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    return known | dict(_known((*inferred.input, *inferred.value_info, *inferred.output)))


def _light(tensor: Any) -> Any:
    """A constant without its values, unless it may hold a shape."""
    if math.prod(tensor.dims) <= LARGE and tensor.data_location != TensorProto.EXTERNAL:
        return tensor
    return TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)


def _known(values: Sequence[Any]) -> Iterator[tuple[str, Shape]]:
    for value in values:
        sizes = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(size.HasField("dim_value") for size in sizes):
            yield value.name, tuple(size.dim_value for size in sizes)
