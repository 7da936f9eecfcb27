"""Operations and bytes of ONNX operators: formulas against counted products, tables that hold together, whole files."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from deploykit.flops import BYTES, FLOPS, KINDS, Call, bytes_moved, flops, graph_flops, kind


def model(nodes, inputs, outputs, constants=(), opset=17):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    stored = [onnx.numpy_helper.from_array(array, name) for name, array in dict(constants).items()]
    graph = helper.make_graph(nodes, "net", values, made, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


# operator, shapes of its inputs, attributes. Nothing is padded, so that every product is a real one.
PRODUCTS = {
    "conv": ("Conv", [(2, 6, 9, 7), (8, 6, 3, 2)], {}),
    "conv, strided and dilated": ("Conv", [(1, 4, 11, 11), (5, 4, 3, 3)], {"strides": [2, 1], "dilations": [1, 2]}),
    "conv, grouped": ("Conv", [(1, 6, 8, 8), (9, 2, 3, 3)], {"group": 3}),
    "conv, depthwise": ("Conv", [(2, 6, 8, 8), (6, 1, 3, 3)], {"group": 6}),
    "conv, 1-D": ("Conv", [(2, 3, 20), (4, 3, 5)], {"strides": [3]}),
    "conv, 3-D": ("Conv", [(1, 2, 5, 6, 7), (3, 2, 2, 3, 2)], {}),
    "transposed conv": ("ConvTranspose", [(2, 3, 5, 4), (3, 6, 3, 2)], {"strides": [2, 2]}),
    "transposed conv, grouped": ("ConvTranspose", [(1, 4, 5, 5), (4, 3, 3, 3)], {"group": 2}),
    "matmul": ("MatMul", [(5, 7), (7, 3)], {}),
    "matmul, stacked": ("MatMul", [(2, 4, 5, 7), (4, 7, 3)], {}),
    "gemm": ("Gemm", [(5, 7), (3, 7)], {"transB": 1}),
    "gemm, first one transposed": ("Gemm", [(7, 5), (7, 3)], {"transA": 1}),
    "einsum": ("Einsum", [(2, 3, 4), (2, 4, 5)], {"equation": "bij, bjk -> bik"}),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_as_many_multiply_adds_as_ones_add_up_to(case):
    """With ones everywhere every product is 1, and the sum of the outputs is how many there were."""
    operator, shapes, attributes = PRODUCTS[case]
    names = [f"x{place}" for place in range(len(shapes))]
    file = model([helper.make_node(operator, names, ["y"], **attributes)], dict(zip(names, shapes, strict=True)), ["y"])
    ones = {name: np.ones(shape, np.float32) for name, shape in zip(names, shapes, strict=True)}
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, ones)
    assert graph_flops(file, {})["y"] == 2 * found.sum(dtype=np.float64)


def of(operator, inputs, output, **attributes):
    raw = {name: value.encode() if isinstance(value, str) else value for name, value in attributes.items()}
    return flops(Call(operator, tuple(inputs), (output,), raw))


X = (2, 3, 8, 8)
SIZE = math.prod(X)
FORMULAS = [
    (of("Conv", [X, (5, 3, 3, 3), (5,)], (2, 5, 6, 6)), 2 * 5 * 36 * (2 * 27 + 1)),  # a bias is one addition more
    (of("ConvTranspose", [X, (3, 5, 3, 3), (5,)], (2, 5, 10, 10)), 2 * SIZE * 45 + 1000),
    (of("Gemm", [(4, 7), (7, 3), (3,)], (4, 3)), 4 * 3 * 15),
    (of("QLinearConv", [X, (), (), (5, 3, 3, 3), (), (), (), (), (5,)], (2, 5, 6, 6)), 2 * 5 * 36 * (2 * 27 + 1)),
    (of("ConvInteger", [X, (5, 3, 3, 3), ()], (2, 5, 6, 6)), 2 * 5 * 36 * 2 * 27),
    (of("MaxPool", [X], (2, 3, 4, 4), kernel_shape=[3, 3]), 2 * 3 * 16 * 9),
    (of("GlobalAveragePool", [X], (2, 3, 1, 1)), SIZE),
    (of("ReduceMean", [X, (2,)], (2, 3)), SIZE),
    (of("ReduceL2", [X, (2,)], (2, 3)), 2 * SIZE),
    (of("Relu", [X], X), SIZE),
    (of("Clip", [X, (), ()], X), 2 * SIZE),
    (of("Sigmoid", [X], X), 4 * SIZE),
    (of("Mul", [X, (3, 1, 1)], X), SIZE),
    (of("Add", [(3, 1, 1), X], X), SIZE),  # what is broadcast does not count less
    (of("Sum", [X, X, X], X), 2 * SIZE),
    (of("Softmax", [X], X), 5 * SIZE),
    (of("BatchNormalization", [X, (3,), (3,), (3,), (3,)], X), 2 * SIZE),
    (of("LayerNormalization", [X, (8,), (8,)], X), 7 * SIZE),
    (of("LRN", [X], X, size=5), 14 * SIZE),
    # 2 directions, 4 gates: 5 steps of batch 3 with 7 inputs and 6 states
    (of("LSTM", [(5, 3, 7), (2, 24, 7), (2, 24, 6)], (5, 2, 3, 6)), 2 * 5 * 3 * 6 * (8 * (7 + 6) + 17)),
    (of("GRU", [(5, 3, 7), (1, 18, 7), (1, 18, 6)], (5, 1, 3, 6)), 5 * 3 * 6 * (6 * (7 + 6) + 14)),
    (of("RNN", [(5, 3, 7), (1, 6, 7), (1, 6, 6)], (5, 1, 3, 6)), 5 * 3 * 6 * (2 * (7 + 6) + 3)),
    (of("Resize", [X, None, (4,)], (2, 3, 16, 16), mode="linear"), 2 * 3 * 256 * 7),  # 4 products, 3 sums
    (of("Resize", [X, None, (4,)], (2, 3, 8, 16), mode="linear"), 2 * 3 * 128 * 3),  # along one axis: 2 and 1
    (of("Resize", [X, None, (4,)], (2, 3, 16, 16), mode="nearest"), 0),
    (of("Transpose", [X], (2, 8, 8, 3)), 0),
    (of("Einsum", [X, X], X, equation="...i,...i->..."), None),
    (of("SomethingNew", [X], X), None),
    (of("Conv", [None, (5, 3, 3, 3)], (2, 5, 6, 6)), 2 * 2 * 5 * 36 * 27),  # the input's shape is not needed
    (of("Conv", [X, None], (2, 5, 6, 6)), None),
    (of("Conv", [X, (5, 3, 3, 3)], None), None),
    (of("MaxPool", [X], (2, 3, 4, 4)), None),  # without its window
    (of("Loop", [(), ()], X), None),
]  # fmt: skip


@pytest.mark.parametrize(("found", "expected"), FORMULAS)
def test_formulas(found, expected):
    assert found == expected


@pytest.mark.parametrize(
    ("operator", "inputs", "outputs", "expected"),
    [
        ("Conv", [400, 80, 8], [200], 688),  # weights are read, too
        ("Add", [400, 4], [400], 804),
        ("Reshape", [400, 16], [400], 0),
        ("Slice", [4000, 8, 8], [40], 80),
        ("Gather", [4000, 8], [40], 80),
        ("ConstantOfShape", [16], [400], 400),
        ("SomethingNew", [1], [2], 3),
    ],
)
def test_bytes(operator, inputs, outputs, expected):
    assert bytes_moved(operator, inputs, outputs) == expected


def test_every_operator_has_one_kind_at_most():
    names = [name for row in KINDS.values() for name in row]
    assert len(set(names)) == len(names)
    assert kind("Transpose") == "layout"
    assert kind("SomethingNew") == "other"
    assert {name for name in {*FLOPS, *BYTES} if kind(name) == "other"} == set()


def test_names_are_onnx_names():
    """A misspelt row would never be used."""
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    runtime = {"FusedConv", "FusedMatMul", "FusedGemm", "QuickGelu", "ReorderInput", "ReorderOutput"}
    assert {*FLOPS, *BYTES} - known - runtime <= {"SimplifiedLayerNormalization"}


# ---------------------------------------------------------------------------------------------------- whole files


def small_net():
    weights = np.ones((8, 3, 3, 3), np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Shape", ["r"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"], axis=0),
        helper.make_node("Concat", ["n", "rest"], ["to"], axis=0),
        helper.make_node("Reshape", ["r", "to"], ["f"]),
        helper.make_node("MatMul", ["f", "d"], ["y"]),
    ]
    constants = {"w": weights, "d": np.ones((8 * 16 * 16, 5), np.float32),
                 "zero": np.array([0]), "rest": np.array([-1])}  # fmt: skip
    return model(nodes, {"x": ["batch", 3, 16, 16]}, ["y"], constants)


@pytest.mark.parametrize("batch", [1, 7])
def test_a_file_is_counted_for_the_shapes_it_gets(batch):
    """Shapes are found through a Reshape whose sizes are computed, for any batch."""
    file = small_net()
    before = file.SerializeToString()
    pixels = batch * 16 * 16
    assert graph_flops(file, {"x": (batch, 3, 16, 16)}) == {
        "c": 2 * pixels * 8 * 27, "r": pixels * 8, "s": 0, "n": 0, "to": 0, "f": 0, "y": 2 * batch * 5 * 8 * 256,
    }  # fmt: skip
    assert file.SerializeToString() == before


def test_without_the_shapes_of_the_inputs_the_count_is_unknown():
    assert graph_flops(small_net(), {})["c"] is None


def test_weights_outside_of_the_file_are_not_needed(tmp_path):
    onnx.save_model(small_net(), tmp_path / "net.onnx", save_as_external_data=True, location="w.bin", size_threshold=64)
    expected = graph_flops(small_net(), {"x": (1, 3, 16, 16)})
    (tmp_path / "w.bin").unlink()
    light = onnx.load_model(tmp_path / "net.onnx", load_external_data=False)
    assert graph_flops(light, {"x": (1, 3, 16, 16)}) == expected
