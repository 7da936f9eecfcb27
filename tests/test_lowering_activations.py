"""Activation patterns become what the runtime merges, as exact as they were; what only looks alike stays."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import numpy_helper, parser
from onnx_ir.passes.common import ShapeInferencePass

from deploykit.export.lowering import activations

X = np.concatenate([np.linspace(-30, 30, 4001), [-3, 3, 0, -1e4, 1e4, 19.99, 20.01]]).astype(np.float32)
REAL = X.astype(np.float64)
NUMBERS = {
    "three": 3,
    "four": 4,
    "zero": 0,
    "one": 1,
    "six": 6,
    "sixth": np.float32(1 / 6),
    "half": 0.5,
    "root": np.float32(math.sqrt(0.5)),
    "root2": np.float32(math.sqrt(2)),
    "minusroot": np.float32(-math.sqrt(0.5)),
    "minus3": -3,
    "low": -1,
}


def build(body: str, opset: int = 18, dtype: str = "float") -> onnx.ModelProto:
    head = f'<ir_version: 8, opset_import: ["": {opset}]>'
    proto = parser.parse_model(f"{head} g ({dtype}[n,{X.size}] x) => ({dtype}[n,{X.size}] y) {{ {body} }}")
    kind = np.float32 if dtype == "float" else np.float64
    proto.graph.initializer.extend(numpy_helper.from_array(np.array(v, kind), name) for name, v in NUMBERS.items())
    proto.graph.initializer.append(numpy_helper.from_array(np.full((1, 1), 3, kind), "three_2d"))
    proto.graph.initializer.append(numpy_helper.from_array(np.full((1, 1, 1), 3, kind), "three_3d"))
    proto.graph.initializer.append(numpy_helper.from_array(np.full(X.size, 3, kind), "threes"))
    return proto


def lowered(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    model = ir.from_proto(proto)
    ShapeInferencePass(strict_mode=False)(model)
    count = activations.apply(model)
    made = ir.to_proto(model)
    onnx.checker.check_model(made, full_check=True)
    return made, count


def answer(proto: onnx.ModelProto) -> np.ndarray:
    return ort.InferenceSession(proto.SerializeToString()).run(["y"], {"x": X[None]})[0][0].astype(np.float64)


def ops(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


HARD = np.clip(REAL / 6 + 0.5, 0, 1)
GELU = 0.5 * REAL * np.vectorize(math.erfc)(-REAL * math.sqrt(0.5))
MISH = REAL * np.tanh(np.logaddexp(0, REAL))
GATE = "a=Add(x,three) b=Clip(a,zero,six) c=Mul(b,sixth)"
HALF = "k=Mul(half,x) n=Neg(x) d=Mul(n,root) e=Erf(d)"

FOUND = {
    "hard sigmoid": ("a=Add(x,three) b=Clip(a,zero,six) y=Mul(b,sixth)", ["HardSigmoid"], HARD),
    "operands turned": ("a=Add(three_2d,x) b=Clip(a,zero,six) y=Mul(sixth,b)", ["HardSigmoid"], HARD),
    "divided, subtracted": ("a=Sub(x,minus3) b=Clip(a,zero,six) y=Div(b,six)", ["HardSigmoid"], HARD),
    "slope inside": ("m=Mul(x,sixth) a=Add(m,half) y=Clip(a,zero,one)", ["HardSigmoid"], HARD),
    "hard swish": (f"{GATE} y=Mul(x,c)", ["HardSwish"], REAL * HARD),
    "hard swish, turned": (f"{GATE} y=Mul(c,x)", ["HardSwish"], REAL * HARD),
    "gelu": (f"{HALF} s=Sub(one,e) y=Mul(k,s)", ["Div", "Erf", "Add", "Mul", "Mul"], GELU),
    "gelu, negative factor": (
        "k=Mul(x,half) d=Mul(x,minusroot) e=Erf(d) s=Sub(one,e) y=Mul(s,k)",
        ["Div", "Erf", "Add", "Mul", "Mul"],
        GELU,
    ),
    "gelu, negated after": (
        "k=Mul(x,half) d=Mul(x,root) n=Neg(d) e=Erf(n) s=Sub(one,e) y=Mul(s,k)",
        ["Div", "Erf", "Add", "Mul", "Mul"],
        GELU,
    ),
    "gelu, added": (
        "k=Mul(x,half) d=Div(x,root2) e=Erf(d) s=Add(e,one) y=Mul(k,s)",
        ["Div", "Erf", "Add", "Mul", "Mul"],
        GELU,
    ),
    "mish": ("s=Softplus(x) t=Tanh(s) y=Mul(x,t)", ["Min", "Exp", "Add", "Mul", "Add", "Div", "Mul"], MISH),
}


@pytest.mark.parametrize(("body", "expected", "exact"), FOUND.values(), ids=FOUND)
def test_found_and_as_exact_as_before(body, expected, exact):
    """Against float64, relative to what a float32 of that size can hold."""
    made, count = lowered(build(body))
    assert count > 0
    assert ops(made) == expected
    ulp = np.finfo(np.float32).eps * np.maximum(np.abs(REAL), 1)
    before, after = (np.max(np.abs(answer(proto) - exact) / ulp) for proto in (build(body), made))
    assert after <= max(before, 1)
    assert after < 4


STAYS = {
    "another height": "a=Add(x,three) b=Clip(a,zero,four) y=Mul(b,sixth)",
    "another bottom": "a=Add(x,three) b=Clip(a,low,six) y=Mul(b,sixth)",
    "a slope on top": "m=Mul(x,sixth) a=Add(m,half) y=Clip(a,zero,six)",
    "one shift per number": "a=Add(x,threes) b=Clip(a,zero,six) y=Mul(b,sixth)",
    "shift from a constant": "a=Sub(three,x) b=Clip(a,zero,six) y=Mul(b,sixth)",
    "scale below": "a=Add(x,three) b=Clip(a,zero,six) y=Div(six,b)",
    "not twice the same x": f"{GATE} r=Neg(x) y=Mul(r,c)",
    "erf that subtracts": "k=Mul(x,half) d=Mul(x,root) e=Erf(d) s=Sub(one,e) y=Mul(k,s)",
    "erf of another": "k=Mul(x,half) d=Mul(x,half) n=Neg(d) e=Erf(n) s=Sub(one,e) y=Mul(k,s)",
    "erf scaled otherwise": "k=Mul(x,sixth) n=Neg(x) d=Mul(n,root) e=Erf(d) s=Sub(one,e) y=Mul(k,s)",
    "from half": f"{HALF} s=Sub(half,e) y=Mul(k,s)",
    "gate of another": "r=Neg(x) s=Softplus(r) t=Tanh(s) y=Mul(x,t)",
    "swish": "s=Sigmoid(x) y=Mul(x,s)",
    "softplus": "y=Softplus(x)",
}


@pytest.mark.parametrize("body", STAYS.values(), ids=STAYS)
def test_what_only_looks_alike_stays(body):
    made, count = lowered(build(body))
    swish = body.startswith(GATE)
    assert count == int(swish)
    assert ops(made) == (["HardSigmoid", "Neg", "Mul"] if swish else ops(build(body)))
    np.testing.assert_allclose(answer(made), answer(build(body)), rtol=1e-5, atol=1e-6)


def test_a_constant_that_adds_an_axis_is_no_scalar():
    body = "a=Add(x,three_3d) b=Clip(a,zero,six) y=Mul(b,sixth)"
    proto = build(body)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    model = ir.from_proto(proto)
    ShapeInferencePass(strict_mode=False)(model)
    assert activations.apply(model) == 0


@pytest.mark.parametrize("opset", [13, 14])
def test_hard_swish_is_an_operation_since_opset_14(opset):
    made, _ = lowered(build(f"{GATE} y=Mul(x,c)", opset))
    assert ops(made) == (["HardSwish"] if opset == 14 else ["HardSigmoid", "Mul"])
    np.testing.assert_allclose(answer(made), REAL * HARD, rtol=1e-6, atol=1e-6)


def test_a_gate_that_others_read_is_computed_once():
    made, _ = lowered(build(f"{GATE} w=Mul(x,c) y=Add(w,c)"))
    assert ops(made) == ["HardSigmoid", "Mul", "Add"]


def test_a_gate_that_is_an_output_stays():
    proto = build(f"{GATE} y=Mul(x,c)")
    proto.graph.output.append(onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, ["n", X.size]))
    made, _ = lowered(proto)
    assert ops(made) == ["HardSigmoid", "Mul"]
    assert [value.name for value in made.graph.output] == ["y", "c"]


def test_double_precision_keeps_its_digits():
    """The constants of a float32 graph are no formula in float64, and attributes have no more than float32."""
    for body in (f"{HALF} s=Sub(one,e) y=Mul(k,s)", "a=Add(x,three) b=Clip(a,zero,six) y=Div(b,six)"):
        made, count = lowered(build(body, dtype="double"))
        assert count == 0
        assert ops(made) == ops(build(body))


def test_the_runtime_merges_what_is_written(tmp_path):
    """Behind a convolution nothing is left but the convolution; the exact GELU is one operation."""
    kernel = np.random.default_rng(0).normal(size=(16, 16, 1, 1)).astype(np.float32)
    for body, merged in ((f"{GATE} y=Mul(x,c)", "HardSwish"), (FOUND["gelu"][0], "Gelu")):
        proto = build(f"x=Conv(i,K) {body} z=Neg(y)")
        proto.graph.initializer.append(numpy_helper.from_array(kernel, "K"))
        proto.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("i", 1, ["n", 16, 8, 8]))
        proto.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("z", 1, ["n", 16, 8, 8]))
        made, _ = lowered(proto)
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        options.log_severity_level = 3
        ort.InferenceSession(made.SerializeToString(), options)
        seen = onnx.load(options.optimized_model_filepath).graph.node
        names = {n.op_type for n in seen} | {
            str(a.s, "utf8") for n in seen for a in n.attribute if a.name == "activation"
        }
        assert merged in names
        assert not names & {"Clip", "Erf", "Mul", "Add", "HardSigmoid"}
