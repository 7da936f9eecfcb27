"""Per-channel arithmetic ends up in a neighbour or in one node, and the numbers stay the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import ShapeInferencePass

from deploykit.export.lowering import affines

RNG = np.random.default_rng(3)
IMAGE = (2, 16, 6, 6)


def vector(count: int = 16, *, rank: int = 4) -> np.ndarray:
    """One number per channel, of both signs, away from zero."""
    numbers = RNG.uniform(0.5, 1.5, count) * RNG.choice([-1, 1], count)
    return numbers.reshape(1, count, *[1] * (rank - 2)) if rank > 1 else numbers


def build(
    *lines: tuple[Any, ...],
    constants: dict[str, Any],
    shape: tuple[int | str, ...] = IMAGE,
    outputs: tuple[str, ...] = ("y",),
    kind: int = TensorProto.FLOAT,
    opset: int = 18,
) -> onnx.ModelProto:
    """A graph from lines (operation, inputs, output, attributes) and constants."""
    nodes = [
        helper.make_node(op, inputs.split(), [made], name=f"{made}/{op}", **dict(*rest))
        for op, inputs, made, *rest in lines
    ]
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    given = [
        numpy_helper.from_array(np.asarray(value, None if np.asarray(value).dtype.kind == "i" else dtype), name)
        for name, value in constants.items()
    ]
    made = [helper.make_tensor_value_info(name, kind, None) for name in outputs]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", kind, shape)], made, given)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def lowered(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    model = ir.from_proto(proto)
    ShapeInferencePass(strict_mode=False)(model)
    count = affines.apply(model)
    made = ir.to_proto(model)
    onnx.checker.check_model(made, full_check=True)
    return made, count


def run(proto: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(proto.SerializeToString(), options).run(None, {"x": x})


def ops(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def agree(proto: onnx.ModelProto, made: onnx.ModelProto, *, rtol: float = 1e-5) -> None:
    value = proto.graph.input[0].type.tensor_type
    shape = [dim.dim_value or 3 for dim in value.shape.dim]
    x = RNG.normal(0, 2, shape).astype(helper.tensor_dtype_to_np_dtype(value.elem_type))
    assert [o.name for o in proto.graph.output] == [o.name for o in made.graph.output]
    for a, b in zip(run(proto, x), run(made, x), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(b, a, rtol=0, atol=rtol * np.abs(a).max())


def weights(*shape: int) -> np.ndarray:
    return RNG.normal(0, 0.3, shape)


MUL_ADD = (("Mul", "c s", "m"), ("Add", "m t", "y"))
ST = {"s": vector(), "t": vector()}

# name -> graph, operations afterwards
FOLDED: dict[str, tuple[onnx.ModelProto, list[str]]] = {
    "conv": (build(("Conv", "x w", "c"), *MUL_ADD, constants={"w": weights(16, 16, 3, 3), **ST}), ["Conv"]),
    "conv with bias": (
        build(("Conv", "x w b", "c"), *MUL_ADD, constants={"w": weights(16, 16, 3, 3), "b": weights(16), **ST}),
        ["Conv"],
    ),
    "grouped conv": (
        build(
            ("Conv", "x w", "c", {"group": 4, "pads": [1, 1, 1, 1]}),
            *MUL_ADD,
            constants={"w": weights(16, 4, 3, 3), **ST},
        ),
        ["Conv"],
    ),
    "grouped transposed conv": (
        build(
            ("ConvTranspose", "x w", "c", {"group": 2, "strides": [2, 2]}),
            *MUL_ADD,
            constants={"w": weights(16, 8, 3, 3), **ST},
        ),
        ["ConvTranspose"],
    ),
    "subtracted from, then divided": (
        build(
            ("Conv", "x w", "c"),
            ("Sub", "t c", "m"),
            ("Div", "m s", "y"),
            constants={"w": weights(16, 16, 1, 1), **ST},
        ),
        ["Conv"],
    ),
    "one number for all": (
        build(("Conv", "x w", "c"), ("Mul", "s c", "y"), constants={"w": weights(16, 16, 1, 1), "s": 0.3}),
        ["Conv"],
    ),
    "1D conv": (
        build(
            ("Conv", "x w", "c"),
            *MUL_ADD,
            shape=("n", 16, 9),
            constants={"w": weights(16, 16, 3), "s": vector(rank=3), "t": vector(rank=3)},
        ),
        ["Conv"],
    ),
    "gemm": (
        build(
            ("Gemm", "x w b", "c", {"transB": 1, "alpha": 0.5, "beta": 2.0}),
            *MUL_ADD,
            shape=("n", 8),
            constants={"w": weights(16, 8), "b": weights(1, 16), "s": vector(rank=1), "t": vector(rank=2)},
        ),
        ["Gemm"],
    ),
    "matmul keeps its bias": (
        build(
            ("MatMul", "x w", "a"),
            ("Add", "a b", "c"),
            *MUL_ADD,
            shape=("n", 5, 8),
            constants={"w": weights(8, 16), "b": weights(16), "s": vector(rank=1), "t": vector(rank=1)},
        ),
        ["MatMul", "Add"],
    ),
    "matmul with a scale alone": (
        build(
            ("MatMul", "x w", "c"),
            ("Mul", "c s", "m"),
            ("Relu", "m", "y"),
            shape=("n", 8),
            constants={"w": weights(8, 16), "s": vector(rank=1)},
        ),
        ["MatMul", "Relu"],
    ),
    "before a grouped conv": (
        build(
            ("Mul", "x s", "m"),
            ("Add", "m t", "c"),
            ("Conv", "c w b", "y", {"group": 4}),
            constants={"w": weights(8, 4, 3, 3), "b": weights(8), **ST},
        ),
        ["Conv"],
    ),
    "a scale before a padded conv": (
        build(
            ("Mul", "x s", "c"),
            ("Conv", "c w", "y", {"pads": [1, 1, 1, 1]}),
            constants={"w": weights(8, 16, 3, 3), **ST},
        ),
        ["Conv"],
    ),
    "before a gemm": (
        build(
            ("Mul", "x s", "m"),
            ("Add", "m t", "c"),
            ("Gemm", "c w b", "y", {"alpha": 0.5, "beta": 3.0}),
            shape=("n", 16),
            constants={"w": weights(16, 4), "b": weights(4), "s": vector(rank=1), "t": vector(rank=1)},
        ),
        ["Gemm"],
    ),
    "before a transposed gemm": (
        build(
            ("Mul", "x s", "m"),
            ("Add", "m t", "c"),
            ("Gemm", "c w", "y", {"transB": 1}),
            shape=("n", 16),
            constants={"w": weights(4, 16), "s": vector(rank=1), "t": vector(rank=1)},
        ),
        ["Gemm"],
    ),
    "a scale before a matmul": (
        build(
            ("Mul", "x s", "c"),
            ("MatMul", "c w", "y"),
            shape=("n", 5, 16),
            constants={"w": weights(16, 4), "s": vector(rank=1)},
        ),
        ["MatMul"],
    ),
    "float64": (
        build(
            ("Gemm", "x w", "c"),
            *MUL_ADD,
            kind=TensorProto.DOUBLE,
            shape=("n", 8),
            constants={"w": weights(8, 16), "s": vector(rank=1), "t": vector(rank=1)},
        ),
        ["Gemm"],
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_an_affine_disappears_into_its_neighbour(name):
    proto, expected = FOLDED[name]
    made, count = lowered(proto)
    assert (ops(made), count) == (expected, 1)
    agree(proto, made, rtol=1e-13 if name == "float64" else 1e-5)


RELU = ("Relu", "x", "c")

# name -> graph, operations afterwards
MERGED: dict[str, tuple[onnx.ModelProto, list[str]]] = {
    "mul and add": (build(RELU, *MUL_ADD, constants=ST), ["Relu", "BatchNormalization"]),
    "an add alone": (build(RELU, ("Add", "c t", "y"), constants=ST), ["Relu", "BatchNormalization"]),
    "two of them": (
        build(
            RELU,
            ("Mul", "c s", "m"),
            ("Add", "m t", "n"),
            ("Mul", "n s", "o"),
            ("Sub", "o t", "y"),
            constants=ST,
        ),
        ["Relu", "BatchNormalization"],
    ),
    "of any batch": (build(RELU, *MUL_ADD, constants=ST, shape=("n", 16, 6, 6)), ["Relu", "BatchNormalization"]),
    "sequences": (
        build(RELU, *MUL_ADD, shape=(2, 16, 9), constants={"s": vector(rank=3), "t": vector(rank=3)}),
        ["Relu", "BatchNormalization"],
    ),
    "float64": (build(RELU, *MUL_ADD, constants=ST, kind=TensorProto.DOUBLE), ["Relu", "BatchNormalization"]),
    "channels last": (
        build(
            RELU,
            ("Mul", "c s", "m"),
            ("Add", "m t", "n"),
            ("Mul", "n s", "y"),
            shape=(2, 6, 6, 16),
            constants={"s": vector(rank=1), "t": vector(rank=1)},
        ),
        ["Relu", "Mul", "Add"],
    ),
    "scales alone": (
        build(RELU, ("Mul", "c s", "m"), ("Div", "m t", "y"), constants=ST),
        ["Relu", "Mul"],
    ),
    "shifts of everything": (
        build(RELU, ("Add", "c s", "m"), ("Sub", "m t", "y"), constants={"s": 0.25, "t": 1.5}),
        ["Relu", "Add"],
    ),
}


@pytest.mark.parametrize("name", MERGED)
def test_what_finds_no_neighbour_becomes_as_few_nodes_as_there_can_be(name):
    proto, expected = MERGED[name]
    made, count = lowered(proto)
    assert (ops(made), count) == (expected, 1)
    agree(proto, made, rtol=1e-14 if name == "float64" else 1e-6)


NHWC, TO_NCHW = (2, 6, 5, 3), {"perm": [0, 3, 1, 2]}
THREE = {"s": vector(3, rank=1), "t": vector(3, rank=1), "u": 0.5}

# name -> graph, operations afterwards
MOVED: dict[str, tuple[onnx.ModelProto, list[str]]] = {
    "an add": (
        build(("Add", "x t", "a"), ("Transpose", "a", "y", TO_NCHW), shape=NHWC, constants=THREE),
        ["Transpose", "BatchNormalization"],
    ),
    "scale and shift": (
        build(("Mul", "x s", "m"), ("Add", "t m", "a"), ("Transpose", "a", "y", TO_NCHW), shape=NHWC, constants=THREE),
        ["Transpose", "BatchNormalization"],
    ),
    "a difference from a constant": (
        build(("Sub", "t x", "a"), ("Transpose", "a", "y", TO_NCHW), shape=NHWC, constants=THREE),
        ["Transpose", "BatchNormalization"],
    ),
    "a factor of everything in front": (
        build(("Mul", "x u", "m"), ("Add", "m t", "a"), ("Transpose", "a", "y", TO_NCHW), shape=NHWC, constants=THREE),
        ["Transpose", "BatchNormalization"],
    ),
    "a constant of all axes": (
        build(
            ("Add", "x t", "a"),
            ("Transpose", "a", "y", TO_NCHW),
            shape=NHWC,
            constants={"t": THREE["t"].reshape(1, 1, 1, 3)},
        ),
        ["Transpose", "BatchNormalization"],
    ),
    "axes in reverse": (
        build(("Mul", "x s", "m"), ("Transpose", "m", "y"), shape=NHWC, constants=THREE),
        ["Transpose", "Mul"],
    ),
    "into the weights behind": (
        build(
            ("Mul", "x s", "m"),
            ("Transpose", "m", "t", TO_NCHW),
            ("Conv", "t w", "y"),
            shape=NHWC,
            constants={"s": THREE["s"], "w": weights(4, 3, 1, 1)},
        ),
        ["Transpose", "Conv"],
    ),
}


@pytest.mark.parametrize("name", MOVED)
def test_arithmetic_on_the_innermost_axis_goes_behind_the_transpose(name):
    proto, expected = MOVED[name]
    made, count = lowered(proto)
    assert ops(made) == expected
    assert count > 0
    assert {node.op_type: node.name.split("/")[1] for node in made.graph.node}["Transpose"] == "Transpose"
    agree(proto, made, rtol=1e-6)


# name -> graph whose arithmetic stays in front of the Transpose
IN_FRONT: dict[str, onnx.ModelProto] = {
    "others read the sum": build(
        ("Add", "x t", "a"),
        ("Transpose", "a", "y", TO_NCHW),
        ("Relu", "a", "z"),
        outputs=("y", "z"),
        shape=NHWC,
        constants=THREE,
    ),
    "the sum is an output": build(
        ("Add", "x t", "a"), ("Transpose", "a", "y", TO_NCHW), outputs=("y", "a"), shape=NHWC, constants=THREE
    ),
    "the innermost axis stays": build(
        ("Add", "x t", "a"), ("Transpose", "a", "y", {"perm": [0, 2, 1, 3]}), shape=NHWC, constants=THREE
    ),
    "of another axis": build(
        ("Mul", "x s", "a"),
        ("Transpose", "a", "y", {"perm": [0, 2, 3, 1]}),
        shape=(2, 3, 6, 5),
        constants={"s": vector(3)},
    ),
}


@pytest.mark.parametrize("name", IN_FRONT)
def test_arithmetic_stays_in_front_of_a_transpose(name):
    made, count = lowered(IN_FRONT[name])
    assert (ops(made), count) == (ops(IN_FRONT[name]), 0)


def test_a_merged_affine_between_convolutions_stays_in_the_blocked_layout(tmp_path):
    proto = build(
        ("Conv", "x w", "a"),
        ("Relu", "a", "c"),
        ("Mul", "c s", "m"),
        ("Add", "m t", "n"),
        ("Relu", "n", "r"),
        ("Conv", "r v", "y"),
        ("GlobalAveragePool", "c", "z"),
        outputs=("y", "z"),
        constants={"w": weights(16, 16, 1, 1), "v": weights(16, 16, 1, 1), **ST},
    )
    reorders = []
    for which in (proto, lowered(proto)[0]):
        options = ort.SessionOptions()
        options.log_severity_level = 3  # the written file is for this machine: that is the point
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        ort.InferenceSession(which.SerializeToString(), options)
        kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
        reorders.append(kinds["ReorderInput"] + kinds["ReorderOutput"] + kinds["Relu"] + kinds["Add"])
    assert reorders[1] < reorders[0] or reorders == [0, 0]  # a CPU without a blocked layout has neither


WIDE = {"w": weights(16, 16, 3, 3), **ST}

# name -> graph that stays as it is
LEFT: dict[str, onnx.ModelProto] = {
    "a scale alone": build(RELU, ("Mul", "c s", "y"), constants=ST),
    "an add behind a matmul": build(
        ("MatMul", "x w", "c"),
        ("Add", "c t", "y"),
        shape=("n", 8),
        constants={"w": weights(8, 16), "t": vector(rank=1)},
    ),
    "an add of another rank": build(RELU, ("Add", "c t", "y"), shape=(2, 16), constants={"t": vector(rank=2)}),
    "not a constant": build(RELU, ("Mul", "c x", "y"), constants={}),
    "along two axes": build(RELU, ("Add", "c t", "y"), constants={"t": weights(1, 16, 6, 1)}),
    "that makes the tensor larger": build(RELU, ("Add", "c t", "y"), shape=(2, 1, 6, 6), constants=ST),
    "that makes a tensor of another rank": build(
        RELU, ("Add", "c t", "y"), constants={"t": vector(rank=5)[:, None, :, :, :, 0]}
    ),
    "along one axis, then another": build(
        RELU,
        ("Mul", "c s", "m"),
        ("Add", "m t", "y"),
        shape=(2, 16, 16, 6),
        constants={"s": vector(), "t": vector().reshape(16, 1)},
    ),
    "of nothing": build(
        RELU,
        ("Add", "c t", "m"),
        ("Mul", "m s", "y"),
        shape=(2, 0, 6, 6),
        constants={"t": np.zeros((1, 0, 1, 1)), "s": 0.5},
    ),
    "of an unknown number of channels": build(RELU, ("Add", "c t", "y"), shape=(2, "c", 6, 6), constants=ST),
    "integers": build(
        ("Mul", "x s", "m"), ("Add", "m t", "y"), kind=TensorProto.INT32, constants={"s": ST["t"] > 0, "t": ST["t"] > 0}
    ),
    "half precision": build(RELU, *MUL_ADD, kind=TensorProto.FLOAT16, constants=ST),
    "a division by zero": build(("Conv", "x w", "c"), ("Div", "c s", "y"), constants={**WIDE, "s": 0 * ST["s"]}),
    "a division of a constant": build(RELU, ("Div", "s c", "y"), constants=ST),
    "infinite": build(RELU, ("Add", "c t", "y"), constants={"t": np.full((1, 16, 1, 1), np.inf)}),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_affine_or_gains_nothing_is_left_alone(name):
    made, count = lowered(LEFT[name])
    assert (ops(made), count) == (ops(LEFT[name]), 0)


# name -> graph whose convolution must keep its weights
GUARDED: dict[str, onnx.ModelProto] = {
    "the producer is read twice": build(
        ("Conv", "x w", "c"), *MUL_ADD, ("Relu", "c", "z"), outputs=("y", "z"), constants=WIDE
    ),
    "the producer is an output": build(("Conv", "x w", "c"), *MUL_ADD, outputs=("y", "c"), constants=WIDE),
    "an activation between": build(("Conv", "x w", "r"), ("Relu", "r", "c"), *MUL_ADD, constants=WIDE),
    "another axis": build(
        ("Conv", "x w", "c"),
        ("Mul", "c s", "m"),
        ("Add", "m t", "y"),
        shape=(2, 16, 18, 18),
        constants={"w": WIDE["w"], "s": vector(rank=3), "t": vector(rank=3)},
    ),
    "shared weights": build(("Conv", "x w", "c"), *MUL_ADD, ("Conv", "x w", "z"), outputs=("y", "z"), constants=WIDE),
    "the affine is read twice": build(
        ("Mul", "x s", "m"),
        ("Add", "m t", "c"),
        ("Conv", "c w", "y"),
        ("Relu", "c", "z"),
        outputs=("y", "z"),
        constants=WIDE,
    ),
    "padding would not see the shift": build(
        ("Mul", "x s", "m"), ("Add", "m t", "c"), ("Conv", "c w", "y", {"pads": [0, 0, 0, 1]}), constants=WIDE
    ),
    "automatic padding would not": build(
        ("Mul", "x s", "m"), ("Add", "m t", "c"), ("Conv", "c w", "y", {"auto_pad": "SAME_UPPER"}), constants=WIDE
    ),
    "a shift before a transposed convolution": build(
        ("Mul", "x s", "m"), ("Add", "m t", "c"), ("ConvTranspose", "c w", "y"), constants=WIDE
    ),
    "a shift before a matmul": build(
        ("Mul", "x s", "m"),
        ("Add", "m t", "c"),
        ("MatMul", "c w", "y"),
        shape=("n", 16),
        constants={"w": weights(16, 4), "s": vector(rank=1), "t": vector(rank=1)},
    ),
    "the affine is of the bias": build(
        ("Relu", "x", "r"),
        ("Mul", "x s", "c"),
        ("Gemm", "r w c", "y"),
        shape=("n", 16),
        constants={"w": weights(16, 16), "s": vector(rank=1)},
    ),
    "a large shift": build(
        ("Mul", "x s", "m"), ("Add", "m t", "c"), ("Conv", "c w", "y"), constants={**WIDE, "t": 17 + 0 * ST["t"]}
    ),
    "the affine is of the weights": build(
        ("Relu", "x", "c"), ("Mul", "w s", "m"), ("Conv", "c m", "y"), constants={**WIDE, "s": weights(1, 16, 1, 1)}
    ),
    "a product that overflows": build(
        ("Conv", "x w", "c"), *MUL_ADD, constants={**WIDE, "w": 1e30 * WIDE["w"], "s": 1e30 * ST["s"]}
    ),
    "a product that loses digits": build(
        ("Conv", "x w", "c"), *MUL_ADD, constants={**WIDE, "w": 1e-20 * WIDE["w"], "s": 1e-20 * ST["s"]}
    ),
}


@pytest.mark.parametrize("name", GUARDED)
def test_a_fold_that_would_be_wrong_is_not_done(name):
    proto = GUARDED[name]
    made, _ = lowered(proto)
    before = {w.name: numpy_helper.to_array(w) for w in proto.graph.initializer}["w"]
    kernels = [numpy_helper.to_array(w) for w in made.graph.initializer if w.dims == list(before.shape)]
    assert len(kernels) == 1
    assert np.array_equal(before, kernels[0])
    if "overflows" not in name:
        agree(proto, made)


def test_centering_far_from_zero_is_not_multiplied_out():
    """x is near 1000 and known to 6e-5; 100 x - 100000 would be known to 8e-3."""
    proto = build(
        RELU, ("Sub", "c t", "m"), ("Mul", "m s", "y"), constants={"t": 0 * ST["t"] + 1000, "s": 0 * ST["s"] + 100}
    )
    made, _ = lowered(proto)
    x = (1000 + RNG.normal(0, 0.01, IMAGE)).astype(np.float32)
    exact = (x.astype(np.float64) - 1000) * 100
    assert np.abs(run(made, x)[0] - exact).max() < 1e-4


def test_scaling_before_a_large_shift_is_one_affine_all_the_same():
    proto = build(RELU, *MUL_ADD, constants={**ST, "t": 1000 * ST["t"]})
    assert ops(lowered(proto)[0]) == ["Relu", "BatchNormalization"]


def test_a_value_between_that_is_an_output_keeps_its_name():
    proto = build(RELU, *MUL_ADD, outputs=("y", "m"), constants=ST)
    made, _ = lowered(proto)
    assert "Mul" in ops(made)
    agree(proto, made)


def test_a_value_that_a_branch_reads_is_not_folded_away():
    """The branch of an If reads the convolution's result from outside."""
    out = helper.make_tensor_value_info("b", TensorProto.FLOAT, None)
    branches = {
        f"{side}_branch": helper.make_graph([helper.make_node(op, ["c"], ["b"], name=op)], side, [], [out])
        for side, op in (("then", "Neg"), ("else", "Abs"))
    }
    proto = build(("Conv", "x w", "c"), *MUL_ADD, constants=WIDE)
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    proto.graph.node.append(helper.make_node("If", ["flag"], ["z"], name="if", **branches))
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    made, _ = lowered(proto)
    assert ops(made) == ["Conv", "BatchNormalization", "If"]
    agree(proto, made)


def test_nodes_are_named_after_what_they_replace():
    proto = build(("Conv", "x w", "c"), *MUL_ADD, constants=WIDE)
    assert [node.name for node in lowered(proto)[0].graph.node] == ["c/Conv"]
    proto = build(RELU, *MUL_ADD, constants=ST)
    assert [node.name for node in lowered(proto)[0].graph.node] == ["c/Relu", "y/Add"]


def test_a_constant_whose_content_is_elsewhere_stays():
    """Above 2 GB a constant has sizes and no content until the file is written."""
    proto = build(("Conv", "x w", "c"), *MUL_ADD, constants=WIDE)
    proto.graph.initializer[0].ClearField("raw_data")
    model = ir.from_proto(proto)
    ShapeInferencePass(strict_mode=False)(model)
    affines.apply(model)
    made = ir.to_proto(model)
    assert ops(made) == ["Conv", "BatchNormalization"]
    assert made.graph.initializer[0] == proto.graph.initializer[0]


def test_old_weights_leave_the_file():
    proto, _ = FOLDED["conv with bias"]
    made, _ = lowered(proto)
    assert sorted(list(w.dims) for w in made.graph.initializer) == [[16], [16, 16, 3, 3]]


@pytest.mark.parametrize("opset", [13, 14, 15, 16, 17, 18])
def test_every_opset_has_the_merged_node(opset):
    proto = build(RELU, *MUL_ADD, constants=ST, opset=opset)
    made, _ = lowered(proto)
    assert ops(made) == ["Relu", "BatchNormalization"]
    agree(proto, made, rtol=1e-6)
