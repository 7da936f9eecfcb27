"""Activations that the runtime has as one operation, or that are cheaper in another form.

    HardSigmoid   s clip(x + b, 0, h), clip(a x + b, 0, 1)   ->  HardSigmoid(a = s, b = s b), if s h = 1
    HardSwish     x HardSigmoid(x; 1/6, 1/2)                 ->  HardSwish(x), from opset 14 on
    Gelu          x/2 (1 - erf(-x sqrt(1/2)))                ->  (x (erf(x / sqrt 2) + 1)) / 2
    Mish          x tanh(log(1 + e^x))                       ->  x n / (n + 2), n = t (t + 2), t = e^min(x, 20)

ONNX Runtime merges HardSigmoid and HardSwish into the convolution in front, where three or four operations in plain
layout stood between two conversions. It recognises the exact GELU by the order of its operations, and Keras' own order
is none that it knows (erf is odd, so both are the same). Softplus is computed number by number there;
``tanh(log(1 + t)) = n / (n + 2)`` takes a vectorised exponential, and above 20 it is 1 to the last digit.

Left alone: swish and ReLU6 (the runtime merges x sigmoid(x) and Clip by itself), Softplus alone (what is faster
overflows or loses the digits of large negative x), the GELU with tanh (as ``x sigmoid(2 u)`` little was gained). `Gelu`
and `Mish` as operations need opsets 20 and 18, and runtimes that have them.

Limits: scalar constants only; HardSigmoid near its lower knee has the absolute, not the relative error of the pattern.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from deploykit.export.lowering.patterns import (
    FLOATS,
    attribute,
    become,
    constant,
    fresh_name,
    graphs,
    is_op,
    new_constant,
    own_graph,
    reader,
    sizes,
)

HARD_SWISH_SINCE = 14
MISH_SATURATES = 20.0  # 1 - tanh(log(1 + e^20)) < 1e-17
_DIGITS = 4  # constants of a formula are recognised if they differ by this many units in the last place


def _scalar(value: ir.Value | None) -> float | None:
    content = constant(value)
    return float(content.ravel()[0]) if content is not None and content.size == 1 else None


def _rank(value: ir.Value | None) -> int:
    content = constant(value)
    return 0 if content is None else content.ndim


def _near(found: float | None, wanted: float, dtype: ir.DataType | None) -> bool:
    """Whether a constant is this number, as rounded to the dtype."""
    if found is None or dtype not in FLOATS:
        return False
    return abs(found - wanted) <= _DIGITS * float(np.finfo(dtype.numpy()).eps) * abs(wanted)


def _split(value: ir.Value | None, kind: str) -> Iterator[tuple[ir.Value, float]]:
    """``value = kind(other, scalar)`` in both orders, and Div by a scalar as Mul and Sub of one as Add.

    Nothing where a constant has axes that the result would otherwise not have.
    """
    node = value.producer() if value is not None else None
    for name, turned in ((kind, None), *_TURNED[kind]):
        if node is None or not is_op(node, name):
            continue
        for data, other in ((0, 1), (1, 0)) if turned is None else ((0, 1),):
            source, scalar = node.inputs[data], _scalar(node.inputs[other])
            if source is None or scalar is None or constant(source) is not None or not _keeps_rank(node, source):
                continue
            if turned is None:
                yield source, scalar
            elif scalar or name != "Div":
                yield source, turned(scalar)


_TURNED: dict[str, tuple[tuple[str, Callable[[float], float]], ...]] = {
    "Mul": (("Div", lambda scalar: 1 / scalar),),
    "Add": (("Sub", lambda scalar: -scalar),),
}


def _keeps_rank(node: ir.Node, source: ir.Value) -> bool:
    ranks = [_rank(value) for value in node.inputs]
    return max(ranks) == 0 or (source.shape is not None and max(ranks) <= len(source.shape))


def _clipped(value: ir.Value | None) -> tuple[ir.Value, float] | None:
    """``value = clip(other, 0, high)``."""
    node = value.producer() if value is not None else None
    if node is None or not is_op(node, "Clip") or len(node.inputs) != 3:
        return None
    source, low, high = node.inputs[0], _scalar(node.inputs[1]), _scalar(node.inputs[2])
    return (source, high) if source is not None and low == 0 and high is not None and high > 0 else None


def _hard_sigmoid(node: ir.Node) -> bool:
    made, dtype = node.outputs[0], node.outputs[0].dtype
    if dtype != ir.DataType.FLOAT:  # the attributes are float32 whatever the tensor is
        return False
    for inner, scale in _split(made, "Mul") if is_op(node, "Mul", "Div") else ():
        found = _clipped(inner)
        if found is not None and scale > 0 and _near(scale * found[1], 1, dtype):
            for x, shift in _split(found[0], "Add"):
                become(node, "HardSigmoid", [x], {"alpha": scale, "beta": scale * shift})
                return True
    found = _clipped(made) if is_op(node, "Clip") else None
    if found is not None and found[1] == 1:
        for inner, shift in _split(found[0], "Add"):
            for x, slope in _split(inner, "Mul"):
                become(node, "HardSigmoid", [x], {"alpha": slope, "beta": shift})
                return True
    return False


def _hard_swish(node: ir.Node) -> bool:
    if not is_op(node, "Mul") or own_graph(node).opset_imports.get("", 0) < HARD_SWISH_SINCE:
        return False
    for x, gate in (node.inputs, node.inputs[::-1]):
        inner = gate.producer() if gate is not None else None
        if inner is None or gate is None or not is_op(inner, "HardSigmoid") or inner.inputs[0] is not x:
            continue
        slope, shift = attribute(inner, "alpha", 0.2), attribute(inner, "beta", 0.5)
        if reader(gate) is node and _near(slope, 1 / 6, ir.DataType.FLOAT) and _near(shift, 0.5, ir.DataType.FLOAT):
            become(node, "HardSwish", [x])
            return True
    return False


def _same_over_root_two(value: ir.Value | None, x: ir.Value) -> int:
    """The sign s of ``value = s x sqrt(1/2)``, found in the ways of writing that; 0 where it is none."""
    for inner, factor in _split(value, "Mul"):
        sign = 1
        negated = inner.producer()
        if negated is not None and is_op(negated, "Neg"):
            inner, sign = negated.inputs[0] or inner, -1
        if inner is x and _near(abs(factor), math.sqrt(0.5), x.dtype):
            return sign if factor > 0 else -sign
    negated = value.producer() if value is not None else None
    return -_same_over_root_two(negated.inputs[0], x) if negated is not None and is_op(negated, "Neg") else 0


def _erf_sign(value: ir.Value | None, x: ir.Value) -> int:
    node = value.producer() if value is not None else None
    return _same_over_root_two(node.inputs[0], x) if node is not None and is_op(node, "Erf") else 0


def _phi_twice(value: ir.Value | None, x: ir.Value) -> bool:
    """``value = 1 + erf(x sqrt(1/2))``, twice the normal distribution."""
    node = value.producer() if value is not None else None
    if node is None:
        return False
    if is_op(node, "Sub"):
        return (
            _scalar(node.inputs[0]) == 1
            and _rank(node.inputs[0]) <= _known_rank(x)
            and (_erf_sign(node.inputs[1], x) == -1)
        )
    return any(shift == 1 and _erf_sign(inner, x) == 1 for inner, shift in _split(value, "Add"))


def _known_rank(value: ir.Value) -> int:
    return -1 if value.shape is None else len(value.shape)


def _gelu(node: ir.Node) -> bool:
    """Only Keras' form, ``(x / 2) (...)``: any other is either known to the runtime or nobody's."""
    if not is_op(node, "Mul") or node.outputs[0].dtype not in FLOATS:
        return False
    for half, phi in (node.inputs, node.inputs[::-1]):
        for x, factor in _split(half, "Mul"):
            if factor == 0.5 and _phi_twice(phi, x):
                _emit_gelu(node, x)
                return True
    return False


def _before(node: ir.Node, kind: str, *inputs: ir.Value | float) -> ir.Value:
    """A new elementwise operation in front of a node; numbers become scalar constants."""
    like = next(value for value in inputs if isinstance(value, ir.Value))
    values = [value if isinstance(value, ir.Value) else _number(node, value, like) for value in inputs]
    step = ir.Node("", kind, values, num_outputs=1, name=fresh_name(node, kind))
    own_graph(node).insert_before(node, step)
    made = step.outputs[0]
    made.shape, made.type = like.shape, like.type
    return made


def _number(node: ir.Node, value: float, like: ir.Value) -> ir.Value:
    assert like.dtype is not None
    return new_constant(node, "constant", np.array([value], like.dtype.numpy()))


def _emit_gelu(node: ir.Node, x: ir.Value) -> None:
    """In the order of operations that ONNX Runtime merges into one."""
    erf = _before(node, "Erf", _before(node, "Div", x, math.sqrt(2)))
    twice = _before(node, "Mul", x, _before(node, "Add", erf, 1.0))
    become(node, "Mul", [twice, _number(node, 0.5, x)])


def _mish(node: ir.Node) -> bool:
    if not is_op(node, "Mul") or node.outputs[0].dtype not in FLOATS:
        return False
    for x, gate in (node.inputs, node.inputs[::-1]):
        tanh = gate.producer() if gate is not None else None
        inner = tanh.inputs[0] if tanh is not None and is_op(tanh, "Tanh") else None
        softplus = inner.producer() if inner is not None else None
        if x is not None and softplus is not None and is_op(softplus, "Softplus") and softplus.inputs[0] is x:
            power = _before(node, "Exp", _before(node, "Min", x, MISH_SATURATES))
            n = _before(node, "Mul", power, _before(node, "Add", power, 2.0))
            become(node, "Mul", [x, _before(node, "Div", n, _before(node, "Add", n, 2.0))])
            return True
    return False


ROWS: tuple[Callable[[ir.Node], bool], ...] = (_hard_sigmoid, _hard_swish, _gelu, _mish)


def apply(model: ir.Model) -> int:
    """Rewrite activations in place; returns how many."""
    count = 0
    for graph in graphs(model):
        for node in list(graph):  # a result of rank 0, or of unknown rank, is none of a layer
            if node.graph is graph and len(node.outputs) == 1 and not node.domain:
                count += bool(sizes(node.outputs[0])) and any(row(node) for row in ROWS)
    return count
