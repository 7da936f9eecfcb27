"""Views compose, regions commute, and what does not pay or has no law stays as it is."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import parser
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import ShapeInferencePass

from deploykit.export.lowering import transposes

X = np.random.default_rng(3).normal(size=(2, 6, 5, 4)).astype(np.float32)
CONSTANTS = (
    "int64[2] hw={1,2}, int64[2] HW={2,3}, int64[1] zero={0}, int64[1] one={1}, int64[1] two={2}, int64[1] three={3},"
    " int64[1] minus3={-3}, int64[4] flat={-1,6,1,1}, int64[2] rows={-1,20}, int64[8] pads={0,1,2,0,0,0,1,3},"
    " float half={0.5}, float low={0}, float[1] five={5}, float[6] c={1,2,3,4,5,6}, float[4] d={1,2,3,4},"
    " float[1,5,1,6] image={1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3},"
    " float[1,1,1,1,1] deep={2}, float[3,1,1] long={1,2,3}"
)


def build(body: str, opset: int = 18) -> onnx.ModelProto:
    text = f'<ir_version: 8, opset_import: ["": {opset}]> g (float[n,6,5,4] x) => (y)'
    return parser.parse_model(f"{text} <{CONSTANTS}> {{ {body} }}".replace("=> (y)", "=> (float y)"))


def outputs_of_any_shape(proto: onnx.ModelProto) -> onnx.ModelProto:
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    return proto


def lowered(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    model = ir.from_proto(outputs_of_any_shape(proto))
    ShapeInferencePass(strict_mode=False)(model)
    count = transposes.apply(model)
    made = ir.to_proto(model)
    onnx.checker.check_model(made, full_check=True)
    return made, count


def agree(proto: onnx.ModelProto, made: onnx.ModelProto) -> None:
    """ONNX's own reference in what there was, ONNX Runtime and the reference in what there is."""
    names = [value.name for value in proto.graph.output]
    exact = ReferenceEvaluator(proto).run(names, {"x": X})
    session = ort.InferenceSession(made.SerializeToString())
    for found in (session.run(names, {"x": X}), ReferenceEvaluator(made).run(names, {"x": X})):
        for mine, wanted in zip(found, exact, strict=True):
            assert mine.shape == wanted.shape
            np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-6)


def ops(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


LAST = "t=Transpose<perm=[0,2,3,1]>(x)"
FIRST = "z=Transpose<perm=[0,3,1,2]>"

REMOVED = {
    "inverse": (f"{LAST} {FIRST}(t) y=Neg(z)", ["Neg"]),
    "inner inverse": (f"{LAST} u=Transpose<perm=[0,3,1,2]>(t) y=Relu(u)", ["Relu"]),
    "two are one": (f"{LAST} y=Transpose<perm=[3,1,0,2]>(t)", ["Transpose"]),
    "default perm": ("t=Transpose(x) y=Transpose(t)", ["Identity"]),
    "mean, then dense": (f"{LAST} y=ReduceMean<keepdims=0>(t,hw)", ["ReduceMean"]),
    "squeeze-excite": (
        f"{LAST} m=ReduceMean<keepdims=0>(t,hw) r=Reshape(m,flat) s=Sigmoid(r) y=Mul(x,s)",
        ["ReduceMean", "Sigmoid", "Mul"],
    ),
    "no-op reshape": ("m=ReduceMean<keepdims=1>(x,HW) r=Reshape(m,flat) y=Relu(r)", ["ReduceMean", "Relu"]),
    "elementwise": (f"{LAST} a=Relu(t) b=Add(a,c) {FIRST}(b) y=Neg(z)", ["Relu", "Add", "Neg"]),
    "constant with axes": (f"{LAST} a=Mul(t,image) {FIRST}(a) y=Neg(z)", ["Mul", "Neg"]),
    "constant of one number": (f"{LAST} a=Mul(five,t) {FIRST}(a) y=Neg(z)", ["Mul", "Neg"]),
    "two sources": (
        f"{LAST} r=Relu(x) v=Transpose<perm=[0,2,3,1]>(r) a=Sub(t,v) {FIRST}(a) y=Neg(z)",
        ["Relu", "Sub", "Neg"],
    ),
    "swish": (f"{LAST} s=Sigmoid(t) a=Mul(t,s) {FIRST}(a) y=Neg(z)", ["Sigmoid", "Mul", "Neg"]),
    "power inside": (f"{LAST} p=Pow(t,two) u=Transpose<perm=[0,3,1,2]>(p) y=Add(x,u)", None),
    "softmax": (f"{LAST} a=Softmax<axis=-1>(t) {FIRST}(a) y=Neg(z)", ["Softmax", "Neg"]),
    "concat": (f"{LAST} a=Concat<axis=2>(t,t) {FIRST}(a) y=Neg(z)", ["Concat", "Neg"]),
    "pad": (f"{LAST} a=Pad(t,pads,half) {FIRST}(a) y=Neg(z)", ["Pad", "Neg"]),
    "slice": (f"{LAST} a=Slice(t,one,three,hw1) {FIRST}(a) y=Neg(z)".replace("hw1", "minus3"), ["Slice", "Neg"]),
    "clip": (f"{LAST} a=Clip(t,low,half) {FIRST}(a) y=Neg(z)", ["Clip", "Neg"]),
    "conv1d": (
        "r=ReduceMax<keepdims=1>(x,three) s=Squeeze(r,three) t=Transpose<perm=[0,2,1]>(s) a=Add(t,c) b=Relu(a)"
        " u=Unsqueeze(b,minus3) y=Transpose<perm=[0,3,1,2]>(u)",
        None,
    ),
    "squeeze and back": (
        "m=ReduceMax<keepdims=1>(x,two) s=Squeeze(m,two) a=Add(s,d) z=Unsqueeze(a,two) y=Neg(z)",
        ["ReduceMax", "Add", "Neg"],
    ),
    "unit axes only": ("m=ReduceMax<keepdims=1>(x,HW) y=Transpose<perm=[0,2,3,1]>(m)", ["ReduceMax", "Reshape"]),
}


@pytest.mark.parametrize(("body", "expected"), REMOVED.values(), ids=REMOVED)
def test_transposes_disappear(body, expected):
    proto = build(body)
    made, count = lowered(proto)
    assert count > 0
    before, after = ops(proto), ops(made)
    assert after.count("Transpose") < before.count("Transpose") or len(after) < len(before)
    if expected is not None:
        assert after == expected
    agree(build(body), made)


STAYS = {
    "one is needed": f"{LAST} y=Relu(t)",
    "pays only half": f"{LAST} a=Relu(t) b=Reshape(a,rows) u=Reshape(a,rows) y=Add(b,u)",
    "an operation without a law": f"{LAST} a=MaxPool<kernel_shape=[2,2]>(t) {FIRST}(a) y=Neg(z)",
    "a constant that adds an axis": f"{LAST} a=Mul(t,deep) y=Transpose<perm=[0,1,4,2,3]>(a)",
    "one product of both orders": "t=Transpose<perm=[0,1,3,2]>(x) w=MatMul(t,x) y=Relu(w)",
    "a reshape that mixes": "r=Reshape(x,rows) y=Relu(r)",
    "softmax over two axes' worth": "r=Reshape(x,rows) y=Softmax(r)",
    "mean of everything": "y=ReduceMean<keepdims=0>(x)",
}


@pytest.mark.parametrize("body", STAYS.values(), ids=STAYS)
def test_what_does_not_pay_stays(body):
    proto = build(body)
    made, count = lowered(build(body))
    assert ops(made) == ops(proto)
    assert count == 0
    agree(proto, made)


def test_constants_on_an_axis_that_the_source_lacks():
    """Unsqueeze, then a constant that fills the new axis: the region ends there."""
    body = "u=Unsqueeze(x,one) a=Relu(u) b=Mul(a,long5) y=ReduceSum<keepdims=0>(b,one)"
    proto, before = build(body), build(body)
    for each in (proto, before):
        each.graph.initializer.append(
            onnx.numpy_helper.from_array(np.arange(3.0, dtype="f4").reshape(3, 1, 1, 1), "long5")
        )
    made, _ = lowered(proto)
    agree(before, made)


def test_a_view_that_others_read_stays_for_them():
    body = f"{LAST} r=Reshape(t,rows) s=ReduceSum<keepdims=0>(r,zero) u=Transpose<perm=[0,3,1,2]>(t)"
    body += " q=ReduceMax<keepdims=0>(u) y=Add(s,q)"
    made, count = lowered(build(body))
    assert count > 0
    assert ops(made).count("Transpose") == 1
    agree(build(body), made)


def test_outputs_keep_their_names_and_stay():
    proto = build(f"{LAST} a=Relu(t) {FIRST}(a) y=Neg(z)")
    proto.graph.output.append(onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, None))
    before = build(f"{LAST} a=Relu(t) {FIRST}(a) y=Neg(z)")
    before.graph.output.append(onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, None))
    made, _ = lowered(proto)
    assert [value.name for value in made.graph.output] == ["y", "a"]
    assert ops(made).count("Transpose") == 1
    agree(before, made)


def test_what_a_branch_reads_stays():
    inner = parser.parse_graph("b () => (float[n,5,4,6] o) { o = Identity(a) }")
    proto = build(f"{LAST} a=Relu(t) z=Transpose<perm=[0,3,1,2]>(a) y=Neg(z)")
    flag = onnx.numpy_helper.from_array(np.array(True), "flag")
    proto.graph.initializer.append(flag)
    proto.graph.node.append(onnx.helper.make_node("If", ["flag"], ["k"], then_branch=inner, else_branch=inner))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("k", onnx.TensorProto.FLOAT, None))
    before = onnx.ModelProto()
    before.CopyFrom(proto)
    made, _ = lowered(proto)
    agree(outputs_of_any_shape(before), made)


def test_a_reduction_drops_other_unit_axes_too():
    body = "m=ReduceMax<keepdims=1>(x,two) r=ReduceMean<keepdims=1>(m,three) y=Squeeze(r,HW)"
    made, _ = lowered(build(body))
    assert ops(made) == ["ReduceMax", "ReduceMean"]
    agree(build(body), made)


@pytest.mark.parametrize("opset", [13, 18])
def test_axes_as_attribute_and_as_input(opset):
    mean = "ReduceMean<keepdims=0,axes=[1,2]>(t)" if opset == 13 else "ReduceMean<keepdims=0>(t,hw)"
    body = f"{LAST} y={mean}"
    made, count = lowered(build(body, opset))
    assert ops(made) == ["ReduceMean"]
    assert count > 0
    agree(build(body, opset), made)


def test_a_reshape_keeps_the_free_batch():
    """A size that is not known is never written down, whatever it was while shapes were inferred."""
    made, _ = lowered(build("m=ReduceMax<keepdims=1>(x,HW) y=Transpose<perm=[0,2,3,1]>(m)"))
    session = ort.InferenceSession(made.SerializeToString())
    for batch in (1, 7):
        x = np.random.default_rng(batch).normal(size=(batch, 6, 5, 4)).astype(np.float32)
        np.testing.assert_array_equal(session.run(None, {"x": x})[0], x.max((2, 3))[:, None, None])


def test_two_free_sizes_are_no_view():
    text = '<ir_version: 8, opset_import: ["": 18]> g (float[n,1,w] x, int64[2] s) => (float[a,b] y) { y=Reshape(x,s) }'
    model = ir.from_proto(parser.parse_model(text))
    assert transposes.view_of(model.graph[0]) is None


def test_composition_is_numpys():
    """compose(first, second) is what two transpositions do one after the other, for every pair on three axes."""
    x = np.arange(24).reshape(2, 3, 4)
    for first, second in itertools.product(itertools.permutations(range(3)), repeat=2):
        whole = transposes.compose(first, second)
        np.testing.assert_array_equal(x.transpose(first).transpose(second), x.transpose(*whole))


def test_chance_graphs_keep_their_function():
    """Chains of random views and operations that commute with them."""
    rng = np.random.default_rng(11)
    for _ in range(40):
        lines, name, rank, keep = [], "x", 4, []
        for step in range(rng.integers(3, 9)):
            new = f"v{step}"
            kind = rng.integers(5)
            if kind == 0:
                perm = ",".join(map(str, rng.permutation(rank)))
                lines.append(f"{new}=Transpose<perm=[{perm}]>({name})")
            elif kind == 1 and rank < 6:
                rank += 1
                lines.append(f"{new}=Unsqueeze({name},{rng.choice(['one', 'two', 'minus3'])})")
            elif kind == 2:
                lines.append(f"{new}=Softmax<axis={rng.integers(rank)}>({name})")
            elif kind == 3:
                keep.append(new)
                lines.append(f"{new}s=Sigmoid({name}) {new}=Mul({name},{new}s)")
            else:
                lines.append(f"{new}=ReduceMean<keepdims=1>({name},{rng.choice(['one', 'two', 'hw'])})")
            name = new
        body = " ".join(lines) + f" y=Neg({name})"
        made, _ = lowered(build(body))
        assert ops(made).count("Transpose") <= ops(build(body)).count("Transpose")
        agree(build(body), made)


def test_a_pad_on_an_axis_that_the_source_lacks_ends_the_region():
    body = "r=Relu(x) u=Unsqueeze(x,one) w=Unsqueeze(r,one) a=Add(u,w) b=Pad(a,p10) y=Neg(b)"
    proto, before = build(body), build(body)
    for each in (proto, before):
        each.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 1, 0, 0, 0] * 2), "p10"))
    made, _ = lowered(proto)
    agree(before, made)


def test_a_reduction_that_others_read_is_computed_once():
    body = "m=ReduceMax<keepdims=1>(x,HW) s=Squeeze(m,HW) a=Mul(x,m) t=ReduceSum<keepdims=0>(a,HW) y=Sub(t,s)"
    made, _ = lowered(build(body))
    assert ops(made).count("ReduceMax") == 1
    agree(build(body), made)
