"""What does nothing disappears; what looks like it stays."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import parser
from onnx_ir.passes.common import ShapeInferencePass

from deploykit.export.lowering import LOWERINGS, lower, residue

X = np.random.default_rng(2).normal(size=(2, 3, 4)).astype(np.float32)
CONSTANTS = (
    "int64[3] same={0,-1,4}, int64[3] free={-1,3,4}, int64[3] other={0,4,3}, int64[2] flat={-1,12},"
    " int64[3] back={-1,3,4}, int64[3] ones={1,1,1}, int64[3] zeros={0,0,0}, int64[3] less={9,3,3},"
    " int64[3] ends={9223372036854775807,3,4}, int64[6] none={0,0,0,0,0,0}, int64[1] a0={0}, int64[1] a1={1},"
    " int64[1] am4={-4}, int64[1] two={2}, int64[1] big={99}, float half={0.5}, int64[1] twelve={12},"
    " int64[2] z12={0,12}, float nzero={-0.0}, float pzero={0}, int64[3] step={1,2,1}, int64[3] long={1,3,4},"
    " int64[3] twos={1,1,2}"
)


def build(body: str, outputs: str = "float[a,b,c] y", x: str = "float[n,3,4] x") -> onnx.ModelProto:
    text = f'<ir_version: 8, opset_import: ["": 18]> g ({x}) => ({outputs}) <{CONSTANTS}> {{ {body} }}'
    proto = parser.parse_model(text)
    for place, node in enumerate(proto.graph.node):
        node.name = f"node_{place}"
    for value in proto.graph.output:  # any rank
        value.type.tensor_type.ClearField("shape")
    return proto


def lowered(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    model = ir.from_proto(proto)
    ShapeInferencePass(strict_mode=False)(model)
    count = residue.apply(model)
    made = ir.to_proto(model)
    onnx.checker.check_model(made, full_check=True)
    return made, count


def run(proto: onnx.ModelProto) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return ort.InferenceSession(proto.SerializeToString(), options).run(None, {"x": X})


def agree(proto: onnx.ModelProto, made: onnx.ModelProto) -> None:
    """Bit by bit: nothing here computes anything else."""
    assert [value.name for value in proto.graph.output] == [value.name for value in made.graph.output]
    for a, b in zip(run(proto), run(made), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()


def ops(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


GONE = {
    "identity": "z=Identity(x) y=Relu(z)",
    "cast": "z=Cast<to=1>(x) y=Relu(z)",
    "transpose": "z=Transpose<perm=[0,1,2]>(x) y=Relu(z)",
    "reshape": "z=Reshape(x,same) y=Relu(z)",
    "reshape of any batch": "z=Reshape(x,free) y=Relu(z)",
    "expand": "z=Expand(x,ones) y=Relu(z)",
    "slice": "z=Slice(x,zeros,ends) y=Relu(z)",
    "slice of some axes": "z=Slice(x,a0,big,two,a1) y=Relu(z)",
    "pad": "z=Pad(x,none) y=Relu(z)",
    "tile": "z=Tile(x,ones) y=Relu(z)",
    "concat": "z=Concat<axis=1>(x) y=Relu(z)",
    "squeeze of an unsqueeze": "u=Unsqueeze(x,a0) z=Squeeze(u,am4) y=Relu(z)",
    "several": "a=Identity(x) b=Reshape(a,same) c=Pad(b,none) z=Slice(c,zeros,ends) y=Relu(z)",
    "a dead end": "u=Exp(x) v=Neg(u) y=Relu(x)",
}


@pytest.mark.parametrize("name", GONE)
def test_what_does_nothing_disappears(name):
    proto = build(GONE[name])
    made, count = lowered(proto)
    assert ops(made) == ["Relu"]
    assert count
    agree(proto, made)


KEPT = {
    "cast": "w=Cast<to=11>(x) z=Cast<to=1>(w) y=Relu(z)",
    "transpose": "z=Transpose<perm=[0,2,1]>(x) y=Relu(z)",
    "reversing transpose": "z=Transpose(x) y=Relu(z)",
    "reshape": "z=Reshape(x,other) y=Relu(z)",
    "expand": "r=ReduceMax<keepdims=1>(x,a1) z=Expand(r,long) y=Relu(z)",
    "slice that ends": "z=Slice(x,zeros,less) y=Relu(z)",
    "slice that begins": "z=Slice(x,ones,ends) y=Relu(z)",
    "slice with gaps": "r=ReduceMax(x,a0) q=Concat<axis=0>(x,r) z=Slice(q,zeros,ends,,step) y=Relu(z)",
    "tile": "z=Tile(x,twos) y=Relu(z)",
    "concat": "z=Concat<axis=1>(x,x) y=Relu(z)",
    "a shape that is not known": "s=Shape(x) c=Cast<to=1>(s) m=ReduceSum(c) y=Mul(x,m)",
    "unsqueeze and another squeeze": "r=ReduceMax<keepdims=1>(x,a1) u=Unsqueeze(r,a0) z=Squeeze(u,two) y=Relu(z)",
    "reshape that copies a size": "u=Reshape(x,other) z=Reshape(u,z12) y=Relu(z)",
}


@pytest.mark.parametrize("name", KEPT)
def test_what_does_something_stays(name):
    proto = build(KEPT[name].replace("r=ReduceMax(x,a0) q=Concat<axis=0>(x,r)", "q=Concat<axis=1>(x,x)"))
    made, count = lowered(proto)
    assert (ops(made), count) == (ops(proto), 0)
    agree(proto, made)


def test_a_target_with_two_unknown_sizes_stays():
    body = "s=Shape(x) b=Slice(s,a0,a1) c=Slice(s,two,big) t=Concat<axis=0>(c,b,three) r=Reshape(x,t) y=Relu(r)"
    proto = build(body, x="float[n,3,m] x")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([3], np.int64), "three"))
    made, _ = lowered(proto)
    assert "Concat" in ops(made)
    agree(proto, made)


def test_an_unknown_size_is_no_reason_to_remove():
    """Only along the free batch axis could this be a no-op; nobody knows."""
    proto = build("z=Slice(x,a0,big,a0) y=Relu(z)")
    assert ops(lowered(proto)[0]) == ["Slice", "Relu"]


REWRITTEN = {
    "reshapes": ("u=Reshape(x,other) y=Reshape(u,flat)", ["Reshape"]),
    "a reshape behind a squeeze": ("u=Unsqueeze(x,a0) y=Reshape(u,flat)", ["Reshape"]),
    "a reshape behind a flatten": ("u=Flatten<axis=1>(x) y=Reshape(u,back)", ["Reshape"]),
    "the size of a batch": (
        "s=Shape(x) b=Slice(s,a0,a1) t=Concat<axis=0>(b,twelve) r=Reshape(x,t) y=Relu(r)",
        ["Reshape", "Relu"],
    ),
    "a part of the shape": (
        "s=Shape<start=0,end=1>(x) t=Concat<axis=0>(s,twelve) r=Reshape(x,t) y=Relu(r)",
        ["Reshape", "Relu"],
    ),
    "twins": ("a=Relu(x) b=Relu(x) c=Exp(a) d=Exp(b) y=Add(c,d)", ["Relu", "Exp", "Add"]),
    "twins with attributes": (
        "a=LeakyRelu<alpha=0.5>(x) b=LeakyRelu<alpha=0.5>(x) c=LeakyRelu<alpha=0.25>(x) d=Add(a,b) y=Add(c,d)",
        ["LeakyRelu", "LeakyRelu", "Add", "Add"],
    ),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_what_is_said_twice_is_said_once(name):
    body, expected = REWRITTEN[name]
    proto = build(body)
    made, count = lowered(proto)
    assert ops(made) == expected
    assert count
    agree(proto, made)


def test_sizes_that_are_known_are_computed():
    body = (
        "s=Shape(x) h=Gather(s,a1) w=Gather(s,two) m=Mul(h,w)"
        " i=Cast<to=6>(m) j=Cast<to=7>(i) f=Cast<to=1>(j) y=Mul(x,f)"
    )
    proto = build(body, x="float[2,3,4] x")
    made, _ = lowered(proto)
    assert ops(made) == ["Cast", "Mul"]  # the cast to float is the runtime's
    agree(proto, made)


OUTPUTS = {
    "a no-op": ("r=Relu(x) y=Reshape(r,same)", "float[a,b,c] y"),
    "two names of one tensor": ("y=Relu(x) z=Identity(y)", "float[a,b,c] y, float[a,b,c] z"),
    "twins": ("y=Relu(x) z=Relu(x)", "float[a,b,c] y, float[a,b,c] z"),
    "a twin second": ("a=Relu(x) y=Exp(a) z=Relu(x)", "float[a,b,c] y, float[a,b,c] z"),
    "the input": ("y=Pad(x,none)", "float[a,b,c] y"),
    "a known shape": ("y=Relu(x) z=Shape<start=1>(x)", "float[a,b,c] y, int64[d] z"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_keep_their_names(name):
    proto = build(*OUTPUTS[name])
    agree(proto, lowered(proto)[0])


def test_equal_constants_are_one_but_for_the_sign_of_zero():
    proto = build("a=Add(x,nzero) b=Add(x,pzero) c=Div(half,a) d=Div(half,b) y=Concat<axis=1>(c,d)")
    made, _ = lowered(proto)
    assert ops(made) == ops(proto)
    assert {"nzero", "pzero"} <= {constant.name for constant in made.graph.initializer}


@pytest.mark.parametrize("op", ["RandomNormalLike", "Bernoulli"])
def test_random_draws_are_no_twins(op):
    made, _ = lowered(build(f"a={op}(x) b={op}(x) y=Sub(a,b)"))
    assert ops(made) == [op, op, "Sub"]


def test_nodes_that_leave_out_different_outputs_are_no_twins():
    proto = build(
        "v, i = MaxPool<kernel_shape=[1]>(x) w = MaxPool<kernel_shape=[1]>(x) f=Cast<to=1>(i) g=Add(v,f) y=Add(g,w)"
    )
    made, _ = lowered(proto)
    assert ops(made).count("MaxPool") == 2
    agree(proto, made)


def test_a_branch_reads_what_is_left():
    proto = build("i=Identity(x) z=Reshape(i,same) r=Relu(z) q=Relu(i) y=Add(r,q)")
    out = onnx.helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, None)
    branches = {
        f"{side}_branch": onnx.helper.make_graph([onnx.helper.make_node(op, [read], ["b"], name=op)], side, [], [out])
        for side, op, read in (("then", "Neg", "z"), ("else", "Abs", "q"))
    }
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(False), "flag"))
    proto.graph.node.append(onnx.helper.make_node("If", ["flag"], ["o"], name="if", **branches))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("o", onnx.TensorProto.FLOAT, None))
    made, _ = lowered(proto)
    assert ops(made) == ["Relu", "Add", "If"]
    agree(proto, made)


def test_constants_without_content_are_not_equal():
    """Above 2 GB a constant has sizes and no content until the file is written; two of one size differ."""
    proto = build("a=Add(x,u) y=Mul(a,v)")
    for name in "uv":
        proto.graph.initializer.add(name=name, data_type=1, dims=[100, 3, 4])
    model = ir.from_proto(proto)
    residue.apply(model)
    made = ir.to_proto(model)
    assert [list(node.input) for node in made.graph.node] == [["x", "u"], ["a", "v"]]


def test_all_lowerings_together_report_what_each_did():
    proto = build("i=Identity(x) a=Relu(i) b=Relu(x) y=Add(a,b)")
    made, done = lower(proto)
    assert list(done) == [row.name for row in LOWERINGS]
    assert done["residue"] == 2
    agree(proto, made)


def test_a_lowering_can_be_left_out():
    made, done = lower(build("i=Identity(x) y=Relu(i)"), without=["residue"])
    assert "residue" not in done
    assert ops(made) == ["Identity", "Relu"]
