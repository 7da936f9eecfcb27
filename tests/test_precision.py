"""Float16 inside, the caller's dtypes outside: what becomes float16, what stays, and that nothing is lost unsaid."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, parser
from onnx_ir.passes.common import ShapeInferencePass

from deploykit.errors import InputError, UnsupportedModelError
from deploykit.export.precision import Narrowed, known, to_float16
from deploykit.runtimes.onnxruntime_cpu import PROVIDER, opened
from deploykit.verify import SessionSettings

RNG = np.random.default_rng(5)
X = RNG.normal(size=(3, 4)).astype(np.float32)
IDS = np.array([[2049.0, 4093.0, 7.0, 5000.0]] * 3, np.float32)
IMAGE = RNG.normal(size=(3, 2, 6, 6)).astype(np.float32)
LOOP = """
  times = Constant<value_int=3>() go = Cast<to=9>(times) a = Relu(x)
  s = Loop(times, go, a) <body = b (int64 i, bool c, float[n,4] v) => (bool c2, float[n,4] v2) {
    c2 = Identity(c) t = Add(v, a) v2 = Mul(t, half)
  }>
  y = MatMul(s, W)
"""
IF = """
  total = ReduceMax<keepdims=0>(x) go = Greater(total, zero) a = Relu(x)
  s = If(go) <then_branch = t () => (float[n,4] a2) { a2 = Identity(a) },
              else_branch = e () => (float[n,4] a3) { a3 = Neg(a) }>
  y = MatMul(s, W)
"""
# by name: the nodes, what is fed, and by operation how many stay in float32
NETS = {
    "dense": ("m = MatMul(x, W) a = Add(m, c) y = Softmax(a)", X, {}),
    "an output that others read": ("y = MatMul(x, W) z = Relu(y)", X, {}),
    "an input that is an output": ("y = Identity(x) z = MatMul(x, W)", X, {}),
    "embedding": ("i = Cast<to=7>(x) e = Gather(table, i) y = MatMul(e, W)", IDS, {}),
    "an index that is moved and scaled": (
        "r = Reshape(x, flat) f = Mul(r, half) d = Mul(f, two) i = Cast<to=7>(d) e = Gather(table, i) y = MatMul(e, W)",
        IDS,
        {"Reshape": 1, "Mul": 2},
    ),
    "a comparison of large numbers": (
        "q = Equal(x, id) f = Cast<to=1>(q) y = MatMul(f, W)",
        IDS,
        {},
    ),
    "sizes": (
        "s = Shape(x) f = Cast<to=1>(s) g = Mul(f, large) i = Cast<to=7>(g) j = Cast<to=1>(i) k = Div(j, large)"
        " l = Cast<to=7>(k) e = Relu(x) y = Reshape(e, l)",
        X,
        {"Cast": 2, "Mul": 1, "Div": 1},
    ),
    "resize": ('y = Resize<mode="nearest">(x, , scales)', IMAGE, {}),
    "variance of large numbers": (
        "w = Mul(x, thousand) m = ReduceMean<axes=[-1]>(w) d = Sub(w, m) q = Mul(d, d) v = ReduceMean<axes=[-1]>(q)"
        " p = Add(v, tiny) s = Sqrt(p) r = Reciprocal(s) y = Mul(d, r) z = MatMul(y, W)",
        X,
        {"ReduceMean": 2, "Sub": 1, "Mul": 2, "Add": 1, "Sqrt": 1, "Reciprocal": 1},
    ),
    "an exponential and its inverse": (
        "w = Mul(x, ten) e = Exp(w) n = Add(e, two) m = Mul(n, e) o = Add(m, two) q = Div(m, o) y = Mul(q, x)",
        X,
        {"Exp": 1, "Add": 2, "Mul": 1, "Div": 1},
    ),
    "a long sum": (
        "w = Mul(x, large) r = Relu(w) s = ReduceSum<keepdims=1>(r, last) y = Div(r, s)",
        np.abs(X),
        {"ReduceSum": 1, "Div": 1},
    ),
    "a length with a floor": (
        "q = Mul(x, x) s = ReduceSum<keepdims=1>(q, last) l = Sqrt(s) r = Reciprocal(l) m = Min(r, huge) y = Mul(x, m)"
        " z = MatMul(y, W)",
        X,
        {"Mul": 2, "ReduceSum": 1, "Sqrt": 1, "Reciprocal": 1, "Min": 1},
    ),
    "floats of nothing": ("k = ConstantOfShape(one) a = Add(x, k) y = MatMul(a, W)", X, {"ConstantOfShape": 1}),
    "float64 in between": (
        "r = Reshape(x, flat) d = Cast<to=11>(r) e = Relu(d) f = Cast<to=1>(e) y = MatMul(f, W)",
        X,
        {},
    ),
    "two readers in float32": (
        "a = Relu(x) p = Exp(a) q = Sqrt(a) y = MatMul(p, W) z = MatMul(q, W)",
        X,
        {"Exp": 1, "Sqrt": 1},
    ),
    "a loop that reads from outside": (LOOP, X, {"Loop": 1}),
    "branches that read from outside": (IF, X, {"If": 1}),
}


def build(body: str, opset: int = 17, kind: str = "float") -> onnx.ModelProto:
    rank = "n,2,6,6" if "Resize" in body else "n,4"
    free = "a,b,c,d" if "Resize" in body else "a,b,c" if "Gather" in body else "a,b"
    outputs = ", ".join(f"{kind}[{free}] {name}" for name in ("y", "z") if f" {name} = " in f" {body}")
    constants = (
        "int64[2] flat={-1,4}, int64[1] last={-1}, float half={0.5}, float two={2}, float ten={10},"
        " float thousand={1000}, float large={30000}, float id={4093}, float tiny={1e-12},"
        " float zero={0}, float huge={1e12}, int64[2] one={1,4}, float[4] scales={1,1,2,1.5}"
    )
    if "axes=[" not in body:
        opset = 18
    head = f'<ir_version: 8, opset_import: ["": {opset}]> g ({kind}[{rank}] x) => ({outputs}) <{constants}>'
    proto = parser.parse_model(f"{head} {{ {body} }}")
    weights = RNG.normal(size=(4, 5)), np.linspace(-1, 1, 5), RNG.normal(size=(6000, 4))
    for name, array in zip(("W", "c", "table"), weights, strict=True):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return proto


def narrowed(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, Narrowed]:
    model = ir.from_proto(proto)
    ShapeInferencePass(strict_mode=False)(model)
    found = to_float16(model)
    made = ir.to_proto(model)
    onnx.checker.check_model(made, full_check=True)
    return made, found


def run(proto: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    return opened(proto.SerializeToString(), PROVIDER, {}, SessionSettings(1), {}).run(None, {"x": x})


@pytest.mark.parametrize(("body", "x", "single"), NETS.values(), ids=NETS)
def test_it_computes_the_same_but_for_float16(body, x, single):
    proto = build(body)
    made, found = narrowed(proto)
    assert found.single == Counter(single)
    assert {v.type.tensor_type.elem_type for v in (*made.graph.input, *made.graph.output)} == {TensorProto.FLOAT}
    assert [v.name for v in made.graph.output] == [v.name for v in proto.graph.output]
    for mine, right in zip(run(made, x), run(proto, x), strict=True):
        assert mine.dtype == right.dtype
        assert np.linalg.norm(mine - right) <= 2e-3 * np.linalg.norm(right)


def test_weights_are_float16_and_casts_stand_at_the_edges_alone():
    made, found = narrowed(build(NETS["dense"][0]))
    used = {read for node in made.graph.node for read in node.input}
    kinds = {tensor.name: tensor.data_type for tensor in made.graph.initializer if tensor.name in used}
    assert set(kinds.values()) == {TensorProto.FLOAT16}
    assert Counter(node.op_type for node in made.graph.node) == {"Cast": 2, "MatMul": 1, "Add": 1, "Softmax": 1}
    assert (found.half, found.constants, found.cut, found.zeroed) == (3, 25, 0, 0)
    assert list(found.notices()) == []


def test_a_tensor_is_cast_once_for_all_who_read_it_so():
    made, _ = narrowed(build(NETS["two readers in float32"][0]))
    assert sum(node.op_type == "Cast" for node in made.graph.node) == 6  # x, a, p, q, y, z


def test_constants_out_of_range_are_counted_and_said():
    values = np.array([1e9, -7e4, 65519, np.inf, 1e-9, -1e-8, 5e-8, 0], np.float32)
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> g (float[n,8] x) => (float[n,8] y) { y = Add(x, k) }'
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(values, "k"))
    made, found = narrowed(proto)
    assert (found.constants, found.cut, found.zeroed) == (8, 2, 2)
    assert run(made, np.zeros((1, 8), np.float32))[0][0].tolist() == [
        65504, -65504, 65504, np.inf, 0, 0, np.float16(5e-8), 0,
    ]  # fmt: skip
    assert list(found.notices()) == [
        "float16: 2 of 8 constants are beyond 65,504 and were cut to that",
        "float16: 2 of 8 constants are below 3e-8 and became zero",
    ]


def test_what_stays_is_said():
    _, found = narrowed(build(LOOP))
    assert list(found.notices()) == ["float16: 1 of 3 operations on floats stay in float32: Loop (1)"]


REFUSED = {
    "float64": ("g (double[n,4] x) => (double[n,4] y) { y = Relu(x) }", "nothing in the model computes in float32"),
    "float16": ("g (float16[n,4] x) => (float16[n,4] y) { y = Relu(x) }", "nothing in the model computes in float32"),
    "unknown types": ("g (float[n,4] x) => (float[n,4] y) { z = my.Own(x) y = Relu(z) }", "Own makes .* no known type"),
}


@pytest.mark.parametrize(("graph", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_converted_is_refused_in_one_line(graph, said):
    model = ir.from_proto(parser.parse_model(f'<ir_version: 8, opset_import: ["": 18, "my": 1]> {graph}'))
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        to_float16(model)
    assert "\n" not in str(caught.value)


def test_an_unknown_precision_is_named():
    with pytest.raises(InputError, match="'int4'; give fp32 or fp16"):
        known("int4")
