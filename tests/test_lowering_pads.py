"""A Pad goes where it is the same, and nowhere else."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import parser
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import ShapeInferencePass

from deploykit.export.lowering import pads

X = np.random.default_rng(5).normal(-0.5, 1, (2, 16, 9, 9)).astype(np.float32)
CONSTANTS = (
    "int64[8] p={0,0,1,1,0,0,1,1}, int64[8] q={0,0,0,1,0,0,1,2}, int64[4] s={1,1,0,1}, int64[2] hw={2,3},"
    " float zero={0}, int64[8] c={0,1,1,1,0,0,1,1}, int64[8] crop={0,0,-1,1,0,0,1,1}, float one={1},"
    " float low={-3.4028235e38}, float six={6}, float neg={-1}, float[1,16,1,1] pos={1,2,1,2,1,2,1,2,1,2,1,2,1,2,1,2}"
)


def build(body: str, opset: int = 18) -> onnx.ModelProto:
    text = f'<ir_version: 8, opset_import: ["": {opset}]> g (float[n,16,9,9] x) => (float[n,k,h,w] y)'
    proto = parser.parse_model(f"{text} <{CONSTANTS}> {{ {body} }}")
    kernel = np.random.default_rng(6).normal(size=(8, 16, 3, 3)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(kernel, "K"))
    image = np.random.default_rng(8).normal(size=(1, 16, 12, 12)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(image, "D"))
    return proto


def lowered(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    model = ir.from_proto(proto)
    ShapeInferencePass(strict_mode=False)(model)
    count = pads.apply(model)
    made = ir.to_proto(model)
    onnx.checker.check_model(made, full_check=True)
    return made, count


def answers(proto: onnx.ModelProto) -> np.ndarray:
    """As ONNX Runtime computes it with all of its own rewriting."""
    return ort.InferenceSession(proto.SerializeToString()).run(None, {"x": X})[0]


def agree(proto: onnx.ModelProto, made: onnx.ModelProto) -> None:
    """What is written is what ONNX's own reference says of what there was, on a real runtime."""
    exact = ReferenceEvaluator(proto).run(None, {"x": X})[0]
    for found in (answers(made), ReferenceEvaluator(made).run(None, {"x": X})[0]):
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def ops(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


POOL = "kernel_shape=[3,3],strides=[2,2]"

MERGED = {
    "conv": ("z=Pad(x,p) y=Conv(z,K)", 1),
    "conv, its own pads too": ("z=Pad(x,q,zero) y=Conv<pads=[1,0,2,1]>(z,K)", 1),
    "conv that says VALID": ('z=Pad(x,q) y=Conv<auto_pad="VALID">(z,K)', 1),
    "wider than the kernel": ("z=Pad(x,q) w=Pad(z,q) y=Conv<pads=[3,3,3,3]>(w,K)", 1),
    "named axes": ("z=Pad(x,s,,hw) y=Conv(z,K)", 1),
    "two convs": ("z=Pad(x,p) a=Conv(z,K) b=Conv(z,K) y=Add(a,b)", 2),
    "average": (f"z=Pad(x,q) y=AveragePool<{POOL}>(z)", 1),
    "average that counts": (f"z=Pad(x,p) y=AveragePool<{POOL},pads=[0,1,1,0],count_include_pad=1>(z)", 1),
    "maximum of what is positive": (f"r=Relu(x) z=Pad(r,p) y=MaxPool<{POOL}>(z)", 1),
    "maximum, both padding": (f"r=Relu(x) z=Pad(r,p) y=MaxPool<{POOL},pads=[1,0,1,1]>(z)", 1),
    "maximum behind more": (
        f"r=Relu(x) i=Clip(x,zero,six) a=Concat<axis=1>(r,i) m=MaxPool<kernel_shape=[2,2]>(a)"
        f" g=Sigmoid(m) b=Add(m,g) z=Pad(b,q) y=MaxPool<{POOL}>(z)",
        1,
    ),
    "maximum times positive": (f"r=Relu(x) t=Mul(r,pos) z=Pad(t,p) y=MaxPool<{POOL}>(z)", 1),
    "lowest in front of a maximum": (f"z=Pad(x,p,low) y=MaxPool<{POOL},pads=[1,1,1,1]>(z)", 1),
}


@pytest.mark.parametrize("name", MERGED)
def test_a_pad_becomes_part_of_what_reads_it(name):
    body, times = MERGED[name]
    made, count = lowered(build(body))
    assert count == times
    assert ops(made).count("Pad") == ("w=Pad" in body)
    agree(build(body), made)


KEPT = {
    "another value": "z=Pad(x,p,one) y=Conv(z,K)",
    "another mode": 'z=Pad<mode="reflect">(x,p) y=Conv(z,K)',
    "sizes from the image": 'z=Pad(x,p) y=Conv<auto_pad="SAME_UPPER">(z,K)',
    "channels too": f"z=Pad(x,c) v=AveragePool<{POOL}>(z) y=Relu(v)",
    "average that does not count its own": f"z=Pad(x,p) y=AveragePool<{POOL},pads=[1,1,1,1]>(z)",
    "average, wider than the window": "z=Pad(x,q) y=AveragePool<kernel_shape=[2,2]>(z)",
    "average, rounded up": f"z=Pad(x,p) y=AveragePool<{POOL},ceil_mode=1>(z)",
    "average of ones": f"z=Pad(x,p,one) y=AveragePool<{POOL}>(z)",
    "maximum, wider than the window": "r=Relu(x) z=Pad(r,q) y=MaxPool<kernel_shape=[2,2]>(z)",
    "maximum of anything": f"z=Pad(x,p) y=MaxPool<{POOL}>(z)",
    "maximum of a difference": f"r=Relu(x) d=Sub(r,one) z=Pad(d,p) y=MaxPool<{POOL}>(z)",
    "maximum clipped elsewhere": f"r=Clip(x,low,six) z=Pad(r,p) y=MaxPool<{POOL}>(z)",
    "maximum of one branch": f"r=Relu(x) a=Add(r,x) z=Pad(a,p) y=MaxPool<{POOL}>(z)",
    "maximum, between zero and nothing": f"r=Relu(x) z=Pad(r,p) y=MaxPool<{POOL},pads=[1,1,1,1],ceil_mode=1>(z)",
    "maximum with gaps": "r=Relu(x) z=Pad(r,p) y=MaxPool<kernel_shape=[3,3],dilations=[2,2]>(z)",
    "maximum less one": f"r=Relu(x) d=Add(r,neg) z=Pad(d,p) y=MaxPool<{POOL}>(z)",
    "an output": "y=Pad(x,p) z=Conv(y,K)",
    "something else": "z=Pad(x,p) y=Relu(z)",
}


@pytest.mark.parametrize("name", KEPT)
def test_a_pad_that_means_something_else_stays(name):
    proto = build(KEPT[name])
    made, _ = lowered(proto)
    assert "Pad" in ops(made)
    agree(proto, made)


def test_one_reader_that_cannot_take_it_over_leaves_the_pad_to_itself():
    made, count = lowered(build("z=Pad(x,p) a=Conv<pads=[0,0,0,0]>(z,K) b=Relu(z) d=Conv(b,K) y=Add(a,d)"))
    assert count == 1
    assert ops(made) == ["Pad", "Conv", "Relu", "Conv", "Add"]
    assert made.graph.node[1].input[0] == "x"


SHIELDED = {
    "opset 18": (f"z=Pad(x,p) y=MaxPool<{POOL}>(z)", 18),
    "opset 13": (f"z=Pad(x,p,zero) y=MaxPool<{POOL},pads=[0,0,0,0]>(z)", 13),
    "its own pads": (f"z=Pad(x,p) y=MaxPool<{POOL},pads=[1,1,1,1]>(z)", 18),
    "its own pads and zero": (f"z=Pad(x,p,zero) y=MaxPool<{POOL},pads=[1,1,1,1]>(z)", 18),
    "rounded up": ("z=Pad(x,p) y=MaxPool<kernel_shape=[2,2],strides=[2,2],ceil_mode=1>(z)", 18),
}


@pytest.mark.parametrize("name", SHIELDED)
def test_zeros_in_front_of_a_maximum_survive_the_runtime(name):
    """Without help ONNX Runtime makes minus infinity of them: the day this fails, the shield can go."""
    proto = build(*SHIELDED[name])
    exact = ReferenceEvaluator(proto).run(None, {"x": X})[0]
    found = answers(proto)
    assert found.shape != exact.shape or np.abs(found - exact).max() > 0.1
    made, count = lowered(proto)
    assert count == 1
    agree(proto, made)


@pytest.mark.parametrize("pool", [POOL, f"{POOL},pads=[1,1,1,1]", "kernel_shape=[2,2],strides=[2,2],ceil_mode=1"])
@pytest.mark.parametrize("opset", [13, 18])
def test_zeros_behind_a_convolution_stay_in_the_blocked_layout(pool, opset):
    proto = build(f"a=Conv(x,L) z=Pad(a,q) y=MaxPool<{pool}>(z)", opset)
    kernel = np.random.default_rng(7).normal(size=(32, 16, 3, 3)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(kernel, "L"))
    made, count = lowered(proto)
    assert (ops(made), count) == (["Conv", "Conv", "MaxPool"], 1)
    agree(proto, made)


def test_channels_that_fill_no_block_are_not_convolved():
    made, count = lowered(build(f"a=Conv(x,K) z=Pad(a,p) y=MaxPool<{POOL}>(z)"))  # K has 8
    assert (ops(made), count) == (["Conv", "Pad", "MaxPool"], 1)


def test_shielding_is_done_once():
    for body, opset in SHIELDED.values():
        made, _ = lowered(build(body, opset))
        assert lowered(made)[1] == 0


@pytest.mark.parametrize("body", ["z=Pad(x,crop) y=Conv(z,K)", "z=Pad(x,p) y=Conv(D,z)"])
def test_a_pad_that_crops_or_makes_a_kernel_stays(body):
    assert lowered(build(body))[1] == 0


def test_zeros_wider_than_the_window_survive_the_runtime():
    """ONNX Runtime would merge them, too, and then refuse what it made."""
    proto = build("z=Pad(x,q) y=AveragePool<kernel_shape=[2,2]>(z)")
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.Fail, match="smaller than kernel"):
        answers(proto)
    agree(proto, lowered(proto)[0])


def test_a_pad_that_is_not_constant_stays():
    proto = build("two=Shape(x) z=Pad(x,p) y=Conv(z,K)")
    proto.graph.node[1].input[1] = "w"
    proto.graph.input.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.INT64, [8]))
    assert lowered(proto)[1] == 0


def test_the_indices_of_a_maximum_count_in_the_padded_image():
    proto = build(f"r=Relu(x) z=Pad(r,p) v,i=MaxPool<{POOL}>(z) f=Cast<to=1>(i) y=Add(v,f)")
    made, count = lowered(proto)
    assert count == 0 or made.graph.node[2].attribute
    agree(proto, made)
    assert "Pad" in ops(made)
