"""NCHW at the edge: no Transpose is left, the signature says so, and what is no NHWC image is refused."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import parser
from onnx_ir.passes.common import ShapeInferencePass

from deploykit.errors import UnsupportedModelError
from deploykit.export.lowering import layout
from deploykit.layout import TO_NCHW, TO_NHWC, permuted
from deploykit.signature import Signature, TensorSpec

X = np.random.default_rng(2).normal(size=(2, 6, 5, 3)).astype(np.float32)


def build(body: str, outputs: str = "float[n,4,3,8] y", inputs: str = "float[n,6,5,3] x") -> onnx.ModelProto:
    head = f'<ir_version: 8, opset_import: ["": 18]> g ({inputs}) => ({outputs})'
    constants = "int64[2] hw={1,2}, int64[2] flat={-1,90}, float[3] c={1,2,3}"
    proto = parser.parse_model(f"{head} <{constants}> {{ {body} }}")
    kernel = np.random.default_rng(4).normal(size=(8, 3, 3, 3)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(kernel, "K"))
    return proto


def turned(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    model = ir.from_proto(proto)
    ShapeInferencePass(strict_mode=False)(model)
    count = layout.nchw(model)
    made = ir.to_proto(model)
    onnx.checker.check_model(made, full_check=True)
    return made, count


def run(proto: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    return ort.InferenceSession(proto.SerializeToString()).run(None, {"x": x})


def ops(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def shapes(values) -> dict[str, list[int | str]]:
    return {v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in values}


CONV = "a=Add(x,c) t=Transpose<perm=[0,3,1,2]>(a) v=Conv(t,K)"
BACK = "y=Transpose<perm=[0,2,3,1]>(v)"


def test_images_in_and_out():
    made, count = turned(build(f"{CONV} {BACK}"))
    assert count == 2
    assert "Transpose" not in ops(made)
    assert shapes(made.graph.input) == {"x": ["n", 3, 6, 5]}
    assert shapes(made.graph.output) == {"y": ["n", 8, 4, 3]}
    before = run(build(f"{CONV} {BACK}"), X)[0]
    after = run(made, X.transpose(0, 3, 1, 2))[0]
    np.testing.assert_allclose(after, before.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-5)


def test_only_images_are_turned():
    body = f"{CONV} w=Transpose<perm=[0,2,3,1]>(v) y=ReduceMean<keepdims=0>(w,hw)"
    made, count = turned(build(body, "float[n,8] y"))
    assert count == 1
    assert "Transpose" not in ops(made)
    assert shapes(made.graph.output) == {"y": ["n", 8]}
    np.testing.assert_allclose(run(made, X.transpose(0, 3, 1, 2))[0], run(build(body, "float[n,8] y"), X)[0], atol=1e-5)


def test_an_output_that_others_read():
    body = f"{CONV} {BACK} z=ReduceMean<keepdims=0>(y,hw)"
    outputs = "float[n,4,3,8] y, float[n,8] z"
    made, count = turned(build(body, outputs))
    assert count == 2
    y, z = run(build(body, outputs), X)
    mine = run(made, X.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(mine[0], y.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mine[1], z, rtol=1e-5, atol=1e-5)


REFUSED = {
    "works on NCHW itself": ("y=Conv(x,K)", "float[n,8,4,3] y", "float[n,3,6,5] x", "input x is not read as an image"),
    "no image": ("y=Reshape(x,flat)", "float[n,90] y", "float[n,6,5,3] x", "input x is not read as an image"),
    "nothing of rank 4": ("y=Relu(x)", "float[n,3] y", "float[n,3] x", "no input or output of rank 4"),
}


@pytest.mark.parametrize(("body", "outputs", "inputs", "said"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(body, outputs, inputs, said):
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        turned(build(body, outputs, inputs))
    assert "\n" not in str(caught.value)


def test_the_signature_of_the_file():
    of = Signature(
        (TensorSpec("x", (None, 6, 5, 3), "float32", 0, 255), TensorSpec("more", (None, 7), "int32")),
        (TensorSpec("y", (None, 4, 3, 8), "float32"),),
    )
    found = permuted(of, TO_NCHW)
    assert found.inputs == (TensorSpec("x", (None, 3, 6, 5), "float32", 0, 255), TensorSpec("more", (None, 7), "int32"))
    assert found.outputs == (TensorSpec("y", (None, 8, 4, 3), "float32"),)
    assert permuted(found, TO_NHWC) == of
