"""Operation layers of tf.keras files: the same numbers from `keras.ops`, before and after a save, or a refusal."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import legacy_operations_files as files
import numpy as np
import pytest
import tensorflow as tf

from deploykit.errors import UnsupportedModelError
from deploykit.load.legacy import operations
from deploykit.load.legacy.operations import operation

FUNCTION_CASES = sorted(files.cases(tf, SimpleNamespace(backend=None)))  # for the names alone


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Every case as tf_keras describes it, with its inputs and what it computes."""
    folder = tmp_path_factory.mktemp("operations")
    done = subprocess.run(
        [sys.executable, str(Path(files.__file__)), str(folder)],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "cases.json").read_text()), np.load(folder / "arrays.npz")


def rebuilt(config: dict[str, Any]) -> keras.Model:
    """A model of input and operation layers, built from what tf.keras wrote."""
    layers = {layer["name"]: layer for layer in config["layers"]}
    made: dict[str, list[Any]] = {}
    inputs = {}
    for name, layer in layers.items():
        if layer["class_name"] == "InputLayer":
            shape = layer["config"]["batch_input_shape"]
            inputs[name] = keras.Input(shape[1:], dtype=layer["config"]["dtype"], name=name)
            made[name] = [inputs[name]]

    def is_reference(value: Any) -> bool:
        return isinstance(value, list) and len(value) in (3, 4) and isinstance(value[0], str) and value[0] in layers

    def resolved(value: Any) -> Any:
        if is_reference(value):
            return made[value[0]][value[2]]
        if isinstance(value, list):
            return value[2] if value and value[0] == "_CONSTANT_VALUE" else [resolved(item) for item in value]
        return {key: resolved(item) for key, item in value.items()} if isinstance(value, dict) else value

    def arguments(node: Any) -> dict[str, Any]:
        while not isinstance(node[0], str):
            node = node[0]
        return resolved(node[3]) if len(node) == 4 else {}

    waiting = [layer for layer in config["layers"] if layer["class_name"] != "InputLayer"]
    while waiting:
        later = []
        for layer in waiting:
            (node,) = layer["inbound_nodes"]
            try:
                first, further = resolved(node), arguments(node)
            except KeyError:
                later.append(layer)
                continue
            assert operations.known(layer["class_name"], layer["config"])
            found = operation(layer["class_name"], layer["config"], layer["name"])(first, **further)
            made[layer["name"]] = found if isinstance(found, list) else [found]
        assert len(later) < len(waiting)
        waiting = later
    outputs = config["output_layers"]
    outputs = [outputs] if isinstance(outputs[0], str) else outputs
    ins = config["input_layers"]
    ins = [ins] if isinstance(ins[0], str) else ins
    return keras.Model([inputs[name] for name, *_ in ins], [made[name][index] for name, _, index in outputs])


def saved_and_loaded(model: keras.Model, folder: Path) -> keras.Model:
    model.save(folder / "model.keras")
    return keras.models.load_model(folder / "model.keras", safe_mode=True)


def results(model: keras.Model, batch: list[np.ndarray]) -> list[np.ndarray]:
    found = model([tf.constant(values) for values in batch])
    return [np.asarray(values) for values in keras.tree.flatten(found)]


def assert_same(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted, strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        if want.dtype.kind == "f":
            finite = want[np.isfinite(want)].astype("float64")
            unit = 1e-3 if want.dtype == np.float16 else 1e-6
            scale = float(np.abs(finite).max(initial=0.0))
            np.testing.assert_allclose(got.astype("float64"), want.astype("float64"), rtol=unit, atol=unit * scale)
        else:
            np.testing.assert_array_equal(got, want)


# Functions: TFOpLambda and SlicingOpLambda, as tf_keras writes them


@pytest.mark.parametrize("case", FUNCTION_CASES)
def test_a_function_computes_what_it_did_in_tf_keras(written, case, tmp_path):
    described, arrays = written
    batch = [arrays[f"{case}/x/{i}"] for i in range(sum(key.startswith(f"{case}/x/") for key in arrays.files))]
    wanted = [arrays[f"{case}/y/{i}"] for i in range(sum(key.startswith(f"{case}/y/") for key in arrays.files))]
    model = rebuilt(described[case])
    assert_same(results(model, batch), wanted)
    again = saved_and_loaded(model, tmp_path)
    assert_same(results(again, batch), wanted)
    assert [tensor.shape for tensor in again.outputs] == [tensor.shape for tensor in model.outputs]


def test_every_function_in_the_table_has_a_case(written):
    described, _ = written
    functions = {layer["config"].get("function") for config in described.values() for layer in config["layers"]}
    functions |= {function for function, *_ in WHOLE} | {"math.logical_xor"}
    assert set(operations.FUNCTIONS) <= {operations._row(function) for function in functions}


IMAGE, POSITIVE, VECTOR, DEEP, COUNTS = files.IMAGE, files.POSITIVE, files.VECTOR, files.DEEP, files.COUNTS
SHIFT = [1.0, 2.0, 3.0]

# Functions that tf_keras 2.21 takes apart before it writes them down; others wrote them whole.
WHOLE = [
    ("math.divide", (IMAGE, POSITIVE), "y", {}, lambda x, y: tf.math.divide(x, y)),
    ("math.equal", (COUNTS, COUNTS), "y", {}, lambda x, y: tf.math.equal(x, y)),
    ("math.floordiv", (IMAGE, POSITIVE), "y", {}, lambda x, y: tf.math.floordiv(x, y)),
    ("__operators__.eq", (COUNTS, COUNTS), "other", {}, lambda x, y: x == y),
    ("__operators__.eq", (COUNTS,), None, {"other": 3}, lambda x: x == 3),
    ("__operators__.ne", (COUNTS, COUNTS), "other", {}, lambda x, y: x != y),
    ("nn.batch_normalization", (IMAGE,), None, {"mean": SHIFT, "variance": SHIFT, "variance_epsilon": 0.5},
     lambda x: tf.nn.batch_normalization(x, tf.constant(SHIFT), tf.constant(SHIFT), None, None, 0.5)),
    ("nn.batch_normalization", (IMAGE,), None,
     {"mean": SHIFT, "variance": SHIFT, "offset": SHIFT, "scale": SHIFT, "variance_epsilon": 0.5},
     lambda x: tf.nn.batch_normalization(x, *map(tf.constant, [SHIFT] * 4), 0.5)),
    ("nn.batch_normalization", (IMAGE, POSITIVE), "variance", {"mean": SHIFT, "variance_epsilon": 0.5},
     lambda x, y: tf.nn.batch_normalization(x, tf.constant(SHIFT), y, None, None, 0.5)),
]  # fmt: skip


@pytest.mark.parametrize(("function", "specs", "second", "constants", "reference"), WHOLE)
def test_a_function_written_whole_computes_what_tensorflow_does(
    function, specs, second, constants, reference, tmp_path
):
    symbols = [keras.Input(spec[0], dtype=spec[1]) for spec in specs]
    further = constants | ({second: symbols[1]} if second else {})
    output = operation("TFOpLambda", {"function": function}, "op")(symbols[0], **further)
    batch = [files.draw(spec, seed) for seed, spec in enumerate(specs)]
    model = saved_and_loaded(keras.Model(symbols, output), tmp_path)
    assert_same(results(model, batch), [reference(*map(tf.constant, batch)).numpy()])


def test_exclusive_or_written_whole(tmp_path):
    x, y = keras.Input((5,)), keras.Input((5,))
    sides = keras.ops.greater(x, 0), keras.ops.greater(y, 0)
    output = operation("TFOpLambda", {"function": "math.logical_xor"}, "op")(sides[0], y=sides[1])
    batch = [files.draw(VECTOR, seed) for seed in (0, 1)]
    model = saved_and_loaded(keras.Model([x, y], output), tmp_path)
    assert_same(results(model, batch), [(batch[0] > 0) ^ (batch[1] > 0)])


# Raw operations: TensorFlowOpLayer, written by hand as TensorFlow 2.0 to 2.3 wrote it. Inputs by name in the order
# of the NodeDef, each a spec or a constant, then attributes.

BITS = ((4, 6, 3), "bool", 0, 2)
MATRIX = ((3, 4), "float32", -2.0, 2.0)
_X, _XY = {"x": IMAGE}, {"x": IMAGE, "y": IMAGE}
_PADS = np.array([[0, 0], [1, 2], [1, 1], [0, 0]], "int32")


def _axis(*axes: int) -> np.ndarray:
    return np.array(axes, "int32")


RAW_CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *(
        (op, _XY, {})
        for op in files.words("Add AddV2 Sub Mul RealDiv DivNoNan FloorDiv Maximum Minimum SquaredDifference")
    ),
    *((op, _XY, {}) for op in files.words("Less LessEqual Greater GreaterEqual")),
    *((op, {"x": COUNTS, "y": COUNTS}, {"incompatible_shape_error": True}) for op in ("Equal", "NotEqual")),
    *((op, _X, {}) for op in files.words("Abs Neg Sign Floor Ceil Round Rint Square Exp Erf Sin Cos Tanh Sigmoid")),
    *((op, {"x": POSITIVE}, {}) for op in files.words("Sqrt Rsqrt Reciprocal Log Log1p")),
    *((op, {"features": IMAGE}, {}) for op in files.words("Relu Relu6 Elu Selu Softplus Softsign LeakyRelu")),
    *((op, {"x": BITS, "y": BITS}, {}) for op in ("LogicalAnd", "LogicalOr")),
    ("LogicalNot", {"x": BITS}, {}),
    ("Mul", {"x": IMAGE, "y": np.float32(0.1)}, {}),
    ("Sub", {"x": np.float32(2), "y": IMAGE}, {}),
    ("AddV2", {"x": IMAGE, "y": np.array(SHIFT, "float32")}, {}),
    ("RealDiv", {"x": IMAGE, "y": np.float32(127.5)}, {}),
    ("AddN", {"inputs": [IMAGE, IMAGE, IMAGE]}, {}),
    ("FloorMod", {"x": COUNTS, "y": COUNTS}, {}),
    ("Pow", {"x": POSITIVE, "y": IMAGE}, {}),
    ("LeakyRelu", {"features": IMAGE}, {"alpha": 0.3}),
    ("Softmax", {"logits": IMAGE}, {}),
    ("LogSoftmax", {"logits": IMAGE}, {}),
    ("ClipByValue", {"t": IMAGE, "clip_value_min": np.float32(-1), "clip_value_max": np.float32(1)}, {}),
    ("Cast", {"x": IMAGE}, {"SrcT": "DT_FLOAT", "DstT": "DT_INT32", "Truncate": False}),
    ("Identity", {"input": IMAGE}, {}),
    ("StopGradient", {"input": IMAGE}, {}),
    ("ZerosLike", {"x": IMAGE}, {}),
    ("OnesLike", {"x": IMAGE}, {}),
    ("Select", {"condition": BITS, "x": IMAGE, "y": IMAGE}, {}),
    ("SelectV2", {"condition": BITS, "t": IMAGE, "e": np.float32(0.5)}, {}),
    *(
        (op, {"input": IMAGE, "axis": axes}, {"keep_dims": keep})
        for op in files.words("Sum Mean Max Min Prod")
        for axes, keep in ((_axis(1, 2), True), (np.int32(-1), False))
    ),
    ("Any", {"input": BITS, "axis": _axis(1)}, {"keep_dims": False}),
    ("All", {"input": BITS, "axis": _axis(1)}, {"keep_dims": True}),
    ("ArgMax", {"input": IMAGE, "dimension": np.int32(-1)}, {"output_type": "DT_INT64"}),
    ("ArgMin", {"input": IMAGE, "dimension": np.int32(1)}, {"output_type": "DT_INT32"}),
    ("LRN", {"input": DEEP}, {"depth_radius": 2, "bias": 1.0, "alpha": 0.5, "beta": 0.75}),
    ("ConcatV2", {"values": [IMAGE, IMAGE], "axis": np.int32(3)}, {"N": 2}),
    ("Pack", {"values": [IMAGE, IMAGE, IMAGE]}, {"N": 3, "axis": 1}),
    ("Unpack", {"value": IMAGE}, {"num": 3, "axis": -1}),
    ("Split", {"axis": np.int32(-1), "value": IMAGE}, {"num_split": 3}),
    ("SplitV", {"value": IMAGE, "size_splits": _axis(1, -1), "axis": np.int32(2)}, {"num_split": 2}),
    ("Tile", {"input": IMAGE, "multiples": _axis(1, 2, 1, 1)}, {}),
    ("ExpandDims", {"input": IMAGE, "axis": np.int32(1)}, {}),
    ("Squeeze", {"input": files.FIXED}, {"squeeze_dims": [1]}),
    ("Reshape", {"tensor": IMAGE, "shape": _axis(-1, 24, 3)}, {}),
    ("Transpose", {"x": IMAGE, "perm": _axis(0, 3, 1, 2)}, {}),
    ("Pad", {"input": IMAGE, "paddings": _PADS}, {}),
    ("PadV2", {"input": IMAGE, "paddings": _PADS, "constant_values": np.float32(0.1)}, {}),
    ("MirrorPad", {"input": IMAGE, "paddings": _PADS}, {"mode": "REFLECT"}),
    ("MirrorPad", {"input": IMAGE, "paddings": _PADS}, {"mode": "SYMMETRIC"}),
    ("ReverseV2", {"tensor": IMAGE, "axis": _axis(-1)}, {}),
    ("DepthToSpace", {"input": DEEP}, {"block_size": 2, "data_format": "NHWC"}),
    ("SpaceToDepth", {"input": DEEP}, {"block_size": 2, "data_format": "NHWC"}),
    (
        "StridedSlice",
        {"input": IMAGE, "begin": _axis(0, 1, 0, 0), "end": _axis(0, 3, 0, 1), "strides": _axis(1, 2, 1, 1)},
        {"begin_mask": 5, "end_mask": 5, "ellipsis_mask": 0, "new_axis_mask": 0, "shrink_axis_mask": 8},
    ),
    (
        "StridedSlice",
        {"input": IMAGE, "begin": _axis(0, 0, 1), "end": _axis(0, 0, 2), "strides": _axis(1, 1, 1)},
        {"begin_mask": 0, "end_mask": 0, "ellipsis_mask": 1, "new_axis_mask": 2, "shrink_axis_mask": 0},
    ),
    ("Slice", {"input": IMAGE, "begin": _axis(0, 1, 2, 0), "size": _axis(-1, 2, -1, 3)}, {}),
    ("GatherV2", {"params": IMAGE, "indices": _axis(2, 0), "axis": np.int32(3)}, {"batch_dims": 0}),
    (
        "OneHot",
        {"indices": COUNTS, "depth": np.int32(7), "on_value": np.float32(1), "off_value": np.float32(0)},
        {"axis": -1},
    ),
    ("MatMul", {"a": VECTOR, "b": np.ones((4, 5), "float32")}, {"transpose_a": False, "transpose_b": True}),
    ("BatchMatMul", {"x": MATRIX, "y": MATRIX}, {"adj_x": True, "adj_y": False}),
    ("BatchMatMulV2", {"x": MATRIX, "y": MATRIX}, {"adj_x": False, "adj_y": True}),
    ("Einsum", {"inputs": [MATRIX, MATRIX]}, {"equation": "bij,bik->bjk"}),
    ("BiasAdd", {"value": IMAGE, "bias": np.array(SHIFT, "float32")}, {"data_format": "NHWC"}),
    (
        "MaxPool",
        {"input": IMAGE},
        {"ksize": [1, 2, 2, 1], "strides": [1, 2, 2, 1], "padding": "SAME", "data_format": "NHWC"},
    ),
    (
        "AvgPool",
        {"value": IMAGE},
        {"ksize": [1, 3, 3, 1], "strides": [1, 1, 1, 1], "padding": "SAME", "data_format": "NHWC"},
    ),
    (
        "Conv2D",
        {"input": IMAGE, "filter": np.linspace(-1, 1, 36, dtype="float32").reshape(2, 3, 3, 2)},
        {
            "strides": [1, 2, 1, 1],
            "padding": "SAME",
            "dilations": [1, 1, 1, 1],
            "data_format": "NHWC",
            "explicit_paddings": [],
            "use_cudnn_on_gpu": True,
        },
    ),
    (
        "DepthwiseConv2dNative",
        {"input": IMAGE, "filter": np.linspace(-1, 1, 36, dtype="float32").reshape(2, 3, 3, 2)},
        {"strides": [1, 1, 1, 1], "padding": "VALID", "dilations": [1, 1, 1, 1], "data_format": "NHWC"},
    ),
    *(
        (op, {"images": IMAGE, "size": size}, {"align_corners": corners, "half_pixel_centers": half})
        for op in ("ResizeBilinear", "ResizeNearestNeighbor")
        for size in (_axis(8, 12), _axis(3, 5))
        for corners, half in ((False, False), (True, False), (False, True))
    ),
]


def attribute(value: Any) -> dict[str, Any]:
    """As protobuf writes a NodeDef's attribute in JSON."""
    if isinstance(value, bool):
        return {"b": value}
    if isinstance(value, int):
        return {"i": str(value)}
    if isinstance(value, float):
        return {"f": value}
    if isinstance(value, list):
        return {"list": {"i": [str(item) for item in value]} if value else {}}
    return {"type": value} if value.startswith("DT_") else {"s": base64.b64encode(value.encode()).decode()}


def node_def(op: str, attributes: dict[str, Any]) -> dict[str, Any]:
    noise = {"T": {"type": "DT_FLOAT"}, "Tidx": {"type": "DT_INT32"}, "_cloned": {"b": True}}
    return {"name": op, "op": op, "input": [], "attr": noise | {k: attribute(v) for k, v in attributes.items()}}


def op_layer(op: str, attributes: dict[str, Any], constants: dict[str, Any] | None = None, *, name: str = "op") -> Any:
    config = {"name": op, "trainable": True, "dtype": "float32", "node_def": node_def(op, attributes)}
    config = json.loads(json.dumps(config | {"constants": constants or {}}))
    assert operations.known("TensorFlowOpLayer", config)
    return operation("TensorFlowOpLayer", config, name)


def is_spec(value: Any) -> bool:
    return isinstance(value, tuple)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"), RAW_CASES, ids=lambda value: value if type(value) is str else ""
)
def test_a_raw_operation_computes_what_tensorflow_does(op, inputs, attributes, tmp_path):
    flat = [part for value in inputs.values() for part in (value if isinstance(value, list) else [value])]
    symbols = [keras.Input(part[0], dtype=part[1]) for part in flat if is_spec(part)]
    constants = {str(i): part.tolist() for i, part in enumerate(flat) if not is_spec(part)}
    call = op_layer(op, attributes, constants)
    outputs = call(symbols if len(symbols) > 1 else symbols[0])
    model = keras.Model(symbols, outputs)

    specs = [part for part in flat if is_spec(part)]
    batch = [files.draw(spec, seed) for seed, spec in enumerate(specs)]
    values = iter(batch)
    tensors = {
        name: [tf.constant(next(values)) for _ in value]
        if isinstance(value, list)
        else tf.constant(next(values) if is_spec(value) else value)
        for name, value in inputs.items()
    }
    types = {"DT_INT32": tf.int32, "DT_INT64": tf.int64, "DT_FLOAT": tf.float32}
    options = {
        {"squeeze_dims": "axis"}.get(name, name): types.get(value, value) if isinstance(value, str) else value
        for name, value in attributes.items()
        if name not in ("N", "SrcT")
    }
    wanted = [tensor.numpy() for tensor in tf.nest.flatten(getattr(tf.raw_ops, op)(**tensors, **options))]
    assert_same(results(model, batch), wanted)
    assert_same(results(saved_and_loaded(model, tmp_path), batch), wanted)


def test_raw_operations_on_a_shape(tmp_path):
    """Flattening as TensorFlow 2.0 wrote it: Shape, StridedSlice, Prod, Pack and Reshape."""
    x = keras.Input((4, 6, 3))
    shape = op_layer("Shape", {"out_type": "DT_INT32"})(x)
    masks = {"begin_mask": 0, "end_mask": 0, "ellipsis_mask": 0, "new_axis_mask": 0}
    first = {"1": [0], "2": [1], "3": [1]}
    batch = op_layer("StridedSlice", masks | {"shrink_axis_mask": 1}, first)(shape)
    rest = op_layer("StridedSlice", masks | {"shrink_axis_mask": 0, "end_mask": 1}, {"1": [1], "2": [0], "3": [1]})(
        shape
    )
    length = op_layer("Prod", {"keep_dims": False}, {"1": [0]})(rest)
    wanted = op_layer("Pack", {"N": 2, "axis": 0})([batch, length])
    flat = op_layer("Reshape", {})([x, wanted])
    model = saved_and_loaded(keras.Model(x, flat), tmp_path)
    values = files.draw(IMAGE, 0)
    assert_same(results(model, [values]), [values.reshape(2, -1)])


def test_a_shape_may_be_cut_by_a_strided_slice():
    x = image()
    cut = operation("TFOpLambda", {"function": "strided_slice"}, "cut")
    batch = cut(shape_of(x), begin=[0], end=[1], shrink_axis_mask=1)
    rows = cut(shape_of(x), begin=[0], end=[2], begin_mask=1)
    assert (batch.axis, batch.factor) == (0, 1)
    assert [rows.extents[0].axis, rows.extents[1]] == [0, 4]


def test_every_raw_operation_in_the_table_has_a_case():
    assert set(operations.RAW) <= {op for op, *_ in RAW_CASES} | {"Shape"}


def test_the_node_def_may_be_text():
    config = {"node_def": json.dumps(node_def("Relu", {})), "constants": {}}
    assert operations.known("TensorFlowOpLayer", config)
    assert operation("TensorFlowOpLayer", config, "op")(keras.Input((3,))).shape == (None, 3)


def test_a_real_layer_of_tensorflow_2_1(shared_models):
    h5py = pytest.importorskip("h5py")
    with h5py.File(shared_models / "fast_srgan_generator.h5") as file:
        layers = json.loads(file.attrs["model_config"])["config"]["layers"]
    (layer, *_) = [layer for layer in layers if layer["class_name"] == "TensorFlowOpLayer"]
    found = operation(layer["class_name"], layer["config"], layer["name"])(keras.Input((None, None, 12)))
    assert found.shape == (None, None, None, 3)


# What passes its input on


@pytest.mark.parametrize("class_name", ["AddLoss", "AddMetric"])
def test_losses_and_metrics_in_the_graph_pass_their_input_on(class_name, tmp_path):
    x = keras.Input((5,))
    assert operations.known(class_name, {})
    model = keras.Model(x, operation(class_name, {"unconditional": False}, "kept")(x, y=3))
    values = files.draw(VECTOR, 0)
    again = saved_and_loaded(model, tmp_path)
    assert_same(results(again, [values]), [values])
    assert again.output_names == ["kept"]


# Names


def names(model: keras.Model) -> list[str]:
    return [made.name for made in model.operations][1:]


def test_operations_have_the_names_of_their_layers():
    x = keras.Input((5,), name="multiply")  # the name that Keras would give to its next product
    y = operation("TFOpLambda", {"function": "math.multiply"}, "tf.math.multiply_3")(x, y=2.0)
    y = operation("TFOpLambda", {"function": "math.l2_normalize"}, "model/norm")(y, axis=-1)
    assert names(keras.Model(x, y)) == [
        "tf.math.multiply_3", "model_norm.4", "model_norm.3", "model_norm.2", "model_norm.1", "model_norm",
    ]  # fmt: skip


def test_a_second_call_of_a_layer_has_names_of_its_own():
    x = keras.Input((5,))
    layer = operation("TFOpLambda", {"function": "nn.relu"}, "act")
    assert names(keras.Model(x, layer(layer(x)))) == ["act", "act.1"]


def test_every_output_of_a_layer_is_one_operation():
    parts = operation("TFOpLambda", {"function": "split"}, "parts")(keras.Input((6,)), num_or_size_splits=3, axis=-1)
    assert isinstance(parts, list)
    assert {part._keras_history.operation.name for part in parts} == {"parts"}


# Refusals


def image(*shape: int | None, dtype: str = "float32") -> Any:
    return keras.Input(shape or (4, 6, 3), dtype=dtype)


def shape_of(tensor: Any) -> Any:
    return operation("TFOpLambda", {"function": "compat.v1.shape"}, "shape")(tensor, out_type="int32")


def item(shape: Any, spec: Any) -> Any:
    return operation("SlicingOpLambda", {"function": "__operators__.getitem"}, "item")(shape, slice_spec=spec)


def merged(tensor: Any) -> Any:
    """Batch and rows in one axis: of unknown length, but not the batch."""
    return keras.ops.reshape(tensor, (-1, 6, 3))


def _reshape_to_another_batch(x: Any) -> tuple[Any, dict[str, Any]]:
    return merged(x), {"shape": [item(shape_of(x), 0), -1, 3]}


REFUSED = {
    "an unknown function": ("image.sobel_edges", lambda x: (x, {}), "has no row in the table"),
    "a function of another namespace": ("strings.length", lambda x: (x, {}), "has no row in the table"),
    "a path to code": ("os.system", lambda x: ("true", {}), "has no row in the table"),
    "a private attribute": ("__class__", lambda x: (x, {}), "has no row in the table"),
    "an operator by that name": ("__operators__.__init__", lambda x: (x, {}), "has no row in the table"),
    "no function at all": (None, lambda x: (x, {}), "has no row in the table"),
    "einsum": ("einsum", lambda x: ("bi,bj->bij", {}), "does not write to the file"),
    "dropout": ("nn.dropout", lambda x: (x, {"rate": 0.5}), "at random"),
    "an unknown argument": ("nn.relu", lambda x: (x, {"threshold": 1}), "with 'threshold'"),
    "arguments with names of Python's": ("nn.relu", lambda x: (x, {"self": 1, "first": 2}), "with 'self'"),
    "an argument twice": ("math.reduce_sum", lambda x: (x, {"axis": 1, "reduction_indices": 2}), "given twice"),
    "a missing argument": ("math.add", lambda x: (x, {}), "missing a required argument: 'y'"),
    "an operand that was not written": ("__operators__.eq", lambda x: (x, {}), "is not in the file"),
    "a tensor for a constant": ("nn.leaky_relu", lambda x: (x, {"alpha": x}), "a tensor for 'alpha'"),
    "a tensor in a slice": ("__operators__.getitem", lambda x: (x, {"slice_spec": [x]}), "a tensor for 'slice_spec'"),
    "a tensor in a shape": ("reshape", lambda x: (x, {"shape": [x, 3]}), "with a tensor in a shape"),
    "a mask": ("boolean_mask", lambda x: (x, {"mask": x}), "has no row in the table"),
    "an index that is no slice": ("__operators__.getitem", lambda x: (x, {"slice_spec": [True]}), "no slice"),
    "an odd argument": ("math.add", lambda x: (x, {"y": {"class_name": "TypeSpec"}}), "of the kind 'TypeSpec'"),
    "arguments that do not fit": ("math.add", lambda x: (x, {"y": [1.0, 2.0]}), "do not fit"),
    "two dtypes": ("math.add", lambda x: (x, {"y": image(dtype="float16")}), "mixes float16 and float32"),
    "a fraction among integers": ("math.add", lambda x: (image(dtype="int32"), {"y": 0.5}), "no int32"),
    "a mean of integers": ("math.reduce_mean", lambda x: (image(dtype="int32"), {}), "would be float32"),
    "a norm of integers": ("norm", lambda x: (image(dtype="int32"), {}), "would be float32"),
    "a promotion": ("math.reduce_sum", lambda x: (image(dtype="uint8"), {}), "would be uint32"),
    "a root of integers": ("math.sqrt", lambda x: (image(dtype="int32"), {}), "would be float32"),
    "no axis": ("math.reduce_sum", lambda x: (x, {"axis": []}), "along no axis"),
    "a spectral norm": ("compat.v1.norm", lambda x: (x, {"ord": 2, "axis": [1, 2]}), "ord=2"),
    "an odd norm": ("norm", lambda x: (x, {"ord": 3}), "ord=3"),
    "a dtype of strings": ("cast", lambda x: (x, {"dtype": "string"}), "the dtype 'string'"),
    "a conversion": ("convert_to_tensor", lambda x: (x, {"dtype": "int32"}), "dtype='int32'"),
    "several tensors as one": ("identity", lambda x: ([x, x], {}), "on several tensors"),
    "where alone": ("where", lambda x: (x, {}), "no fixed shape"),
    "rows of where": ("compat.v1.where", lambda x: (image(5), {"x": x, "y": x}), "another rank"),
    "an exclusive sum": ("math.cumsum", lambda x: (x, {"exclusive": True}), "exclusive=True"),
    "indices of 64 bits": ("math.top_k", lambda x: (x, {"index_type": "int64"}), "index_type='int64'"),
    "a batched gather": ("gather", lambda x: (x, {"indices": [0], "batch_dims": 1}), "batch_dims=1"),
    "other values in one_hot": ("one_hot", lambda x: (image(dtype="int32"), {"depth": 3, "on_value": 2.0}), "on_value"),
    "an uneven split": ("split", lambda x: (x, {"num_or_size_splits": 4, "axis": 2}), "of 6 into 4"),
    "a split that leaves some": ("split", lambda x: (x, {"num_or_size_splits": [1, 1], "axis": 2}), "of 6 into"),
    "a split of what length": (
        "split",
        lambda x: (image(None, 3), {"num_or_size_splits": [1, -1], "axis": 1}),
        "whose length is not known",
    ),
    "a squeeze of the batch": ("squeeze", lambda x: (x, {}), "without an axis"),
    "an odd padding": ("pad", lambda x: (x, {"paddings": [[0, 0]] * 4, "mode": "WRAP"}), "mode='WRAP'"),
    "vectorised channels": (
        "nn.depth_to_space",
        lambda x: (x, {"block_size": 2, "data_format": "NCHW_VECT_C"}),
        "data_format='NCHW_VECT_C'",
    ),
    "explicit padding": (
        "nn.max_pool2d",
        lambda x: (x, {"ksize": 2, "strides": 2, "padding": [[0, 0], [1, 1], [1, 1], [0, 0]]}),
        "padding=",
    ),
    "channels first": (
        "nn.avg_pool2d",
        lambda x: (x, {"ksize": 2, "strides": 2, "padding": "SAME", "data_format": "NCHW"}),
        "data_format='NCHW'",
    ),
    "a pool over the batch": (
        "nn.max_pool2d",
        lambda x: (x, {"ksize": [2, 2, 2, 1], "strides": 1, "padding": "SAME"}),
        "with the sizes [2, 2, 2, 1]",
    ),
    "a pool of another rank": (
        "nn.max_pool1d",
        lambda x: (x, {"ksize": 2, "strides": 2, "padding": "SAME"}),
        "of rank 4",
    ),
    "resizing by area": ("image.resize", lambda x: (x, {"size": [2, 2], "method": "area"}), "method='area'"),
    "keeping the ratio": (
        "image.resize",
        lambda x: (x, {"size": [2, 2], "preserve_aspect_ratio": True}),
        "preserve_aspect_ratio=True",
    ),
    "v1 resizing by area": (
        "compat.v1.image.resize_images",
        lambda x: (x, {"size": [2, 2], "method": 3}),
        "method='area'",
    ),
    "v1 keeping the ratio": (
        "compat.v1.image.resize_images",
        lambda x: (x, {"size": [2, 2], "preserve_aspect_ratio": True}),
        "preserve_aspect_ratio=True",
    ),
    "both conventions": (
        "compat.v1.image.resize_bilinear",
        lambda x: (x, {"size": [2, 2], "align_corners": True, "half_pixel_centers": True}),
        "TensorFlow refuses too",
    ),
    "corners and no size": (
        "compat.v1.image.resize_bilinear",
        lambda x: (image(None, None, 3), {"size": [2, 2]}),
        "a size that is not fixed",
    ),
    "too many pixels": (
        "compat.v1.image.resize_bilinear",
        lambda x: (x, {"size": [2, 1 << 40]}),
        "pixels",
    ),
    "resizing to another's size": (
        "image.resize",
        lambda x: (x, {"size": item(shape_of(image(None, None, 3)), {"start": 1, "stop": 3, "step": None})}),
        "no whole multiple",
    ),
    "the sides exchanged": (
        "image.resize",
        lambda x: (x2 := image(None, None, 3), {"size": [item(shape_of(x2), 2), item(shape_of(x2), 1)]}),
        "no whole multiple",
    ),
    "smoothing by factors": (
        "image.resize",
        lambda x: (
            x2 := image(None, None, 3),
            {"size": item(shape_of(x2), {"start": 1, "stop": 3, "step": None}), "antialias": True},
        ),
        "antialias=True",
    ),
    "two unknown lengths": (
        "reshape",
        lambda x: (x2 := image(None, None, 3), {"shape": [item(shape_of(x2), 1), item(shape_of(x2), 2), -1]}),
        "more than one length",
    ),
    "another batch": ("reshape", _reshape_to_another_batch, "more than one length"),
    "a length as a value": ("math.add", lambda x: (x, {"y": item(shape_of(x), 0)}), "with a tensor in a shape"),
    "a length as a float": ("cast", lambda x: (item(shape_of(x), 0), {"dtype": "float32"}), "to compute with a length"),
    "the root of a length": ("math.sqrt", lambda x: (item(shape_of(x), 0), {}), "depends on the size"),
    "copies by a length": (
        "tile",
        lambda x: (x, {"multiples": [item(shape_of(x), 0), 1, 1, 1]}),
        "depends on the size",
    ),
    "shapes of different lengths": ("math.add", lambda x: (shape_of(x), {"y": [1, 2, 3]}), "different lengths"),
    "a length of a length": ("__operators__.getitem", lambda x: (item(shape_of(x), 0), {"slice_spec": 0}), "no slice"),
    "copies of a constant": ("tile", lambda x: ([1.0], {"multiples": [1 << 40]}), "on constants alone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_exact_equivalent_is_refused_in_one_line(case):
    function, arguments, reason = REFUSED[case]
    class_name = "SlicingOpLambda" if function == "__operators__.getitem" else "TFOpLambda"
    first, further = arguments(image())
    with pytest.raises(UnsupportedModelError) as refused:
        operation(class_name, {"function": function}, "tf.the_layer")(first, **further)
    message = str(refused.value)
    assert reason in message
    assert "\n" not in message
    assert "layer 'tf.the_layer'" in message
    assert str(function) in message
    assert "save it again" in message


RAW_REFUSED = {
    "an unknown operation": (node_def("MatrixInverse", {}), "has no row in the table"),
    "no operation": ({}, "has no row in the table"),
    "binary text": ("\x0a\x04Relu", "has no row in the table"),
    "a list for an operation": ({"op": ["Relu"]}, "has no row in the table"),
    "a blend of rows": (node_def("OneHot", {"axis": -1}), "do not fit"),
    "an unknown attribute": (node_def("Relu", {"leak": 0.5}), "with 'leak'"),
    "an attribute of a function": (
        node_def("Relu", {}) | {"attr": {"f": {"func": {"name": "evil"}}}},
        "the attribute 'f' of an unknown kind",
    ),
    "an attribute that is damaged": (
        node_def("Relu", {}) | {"attr": {"alpha": {"i": "much"}}},
        "the attribute 'alpha' of an unknown kind",
    ),
    "attributes that are no object": (node_def("Relu", {}) | {"attr": [1]}, "do not fit"),
}


@pytest.mark.parametrize("case", RAW_REFUSED)
def test_a_raw_operation_without_equivalent_is_refused_in_one_line(case):
    node, reason = RAW_REFUSED[case]
    with pytest.raises(UnsupportedModelError, match="layer 'tf_op_layer_it' calls the TensorFlow operation") as refused:
        operation("TensorFlowOpLayer", {"node_def": node, "constants": {}}, "tf_op_layer_it")(image())
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_integers_in_a_raw_one_hot_are_refused():
    call = op_layer("OneHot", {"axis": -1}, {"1": 3, "2": 1, "3": 0})
    with pytest.raises(UnsupportedModelError, match="on int32"):
        call(image(dtype="int32"))


def test_constants_at_odd_places_are_refused():
    with pytest.raises(UnsupportedModelError, match="do not fit"):
        op_layer("Mul", {}, {"one": 1.0})(image())


@pytest.mark.parametrize("class_name", sorted(operations.OBJECT_CLASSES))
def test_methods_of_ragged_and_sparse_tensors_are_refused(class_name):
    config = {"cls_symbol": "RaggedTensor", "method_name": "from_tensor", "attr_name": "flat_values"}
    assert class_name in operations.CLASSES
    assert not operations.known(class_name, config)
    with pytest.raises(UnsupportedModelError, match="ragged or sparse"):
        operation(class_name, config, "op")


@pytest.mark.parametrize(
    ("class_name", "config"),
    [
        ("TFOpLambda", {"function": "os.system"}),
        ("TFOpLambda", {"function": "einsum"}),
        ("TFOpLambda", {"function": ["add"]}),
        ("TFOpLambda", {}),
        ("TensorFlowOpLayer", {}),
        ("TensorFlowOpLayer", {"node_def": {"op": ["Relu"]}}),
        ("TensorFlowOpLayer", {"node_def": "not JSON"}),
        ("Lambda", {"function": "add"}),
    ],
)
def test_what_is_not_in_the_table_is_not_known(class_name, config):
    assert not operations.known(class_name, config)


# Which tensors have the batch as their first axis: only then may a reshape to (batch, -1, ...) keep it


def reshaped(tensor: Any, batch_of: Any) -> Any:
    batch = item(shape_of(batch_of), 0)
    return operation("TFOpLambda", {"function": "reshape"}, "reshape")(tensor, shape=[batch, -1, 2])


class OwnLayer(keras.layers.Layer):
    def call(self, x):
        return keras.ops.reshape(x, (-1, 1, 6, 3))

    def compute_output_shape(self, shape):
        return (None, 1, 6, 3)


KEEP_THE_BATCH = {
    "a layer": lambda x: keras.layers.Dense(4)(x),
    "a layer on several": lambda x: keras.layers.Concatenate()([x, keras.layers.Dense(4)(x)]),
    "a sum": lambda x: x + keras.layers.Conv2D(3, 1)(x),
    "a chain": lambda x: keras.ops.relu(keras.ops.softmax(x * 2.0)),
    "axes exchanged": lambda x: keras.ops.swapaxes(keras.ops.transpose(x, (0, 2, 1, 3)), 1, -1),
    "a product": lambda x: keras.ops.matmul(x, keras.ops.swapaxes(x, -1, -2)),
    "a concatenation": lambda x: keras.ops.concatenate([x, x], axis=1),
}

MAY_MOVE_THE_BATCH = {
    "merged axes": merged,
    "axes exchanged": lambda x: keras.ops.transpose(keras.layers.ZeroPadding2D()(merged4(x)), (1, 0, 2, 3)),
    "all axes turned": lambda x: keras.ops.transpose(image(4, 6, None), None),
    "the first axis exchanged": lambda x: keras.ops.swapaxes(image(None, 6, 3), 0, 1),
    "... counted from the end": lambda x: keras.ops.swapaxes(image(None, 6, 3), -4, 1),
    "a concatenation of batches": lambda x: keras.ops.concatenate([x, x], axis=0),
    "the same counted from the end": lambda x: keras.ops.concatenate([x, x], axis=-4),
    "a part of the batch": lambda x: keras.ops.get_item(x, (slice(1, None),)),
    "a product of matrices": lambda x: keras.ops.matmul(keras.ops.transpose(image(None)), image(None)),
    "a sum of ranks": lambda x: x + keras.Input((3,), batch_size=None)[:, None],
    "a layer of the user's": lambda x: OwnLayer()(x),
    "a Lambda": lambda x: keras.layers.Lambda(lambda y: y[1:], output_shape=(4, 6, 3))(x),
    "a model": lambda x: keras.Model(inner := image(), merged(inner))(x),
    "a fixed length": lambda x: keras.Input((4, 6, 3), batch_size=1),
    "no axis": lambda x: keras.ops.sum(x),
}


def merged4(tensor: Any) -> Any:
    return keras.ops.reshape(tensor, (-1, 1, 6, 3))


@pytest.mark.parametrize("case", KEEP_THE_BATCH)
def test_the_batch_is_followed_through_what_keeps_it(case):
    x = image()
    assert operations._is_batch(KEEP_THE_BATCH[case](x))
    assert reshaped(KEEP_THE_BATCH[case](x), x).shape[0] is None


@pytest.mark.parametrize("case", MAY_MOVE_THE_BATCH)
def test_the_batch_is_not_followed_through_anything_else(case):
    assert not operations._is_batch(MAY_MOVE_THE_BATCH[case](image()))


def test_a_reshape_by_a_multiple_of_the_batch_is_refused():
    x = image()
    twice = operation("TFOpLambda", {"function": "math.multiply"}, "twice")(item(shape_of(x), 0), y=2)
    with pytest.raises(UnsupportedModelError, match="more than one length"):
        operation("TFOpLambda", {"function": "reshape"}, "reshape")(x, shape=[twice, -1, 3])


def test_a_reshape_by_another_axis_than_the_batch_is_refused():
    x = image(None, 3)
    with pytest.raises(UnsupportedModelError, match="more than one length"):
        operation("TFOpLambda", {"function": "reshape"}, "reshape")(x, shape=[item(shape_of(x), 1), -1, 3])


# Dtypes other than the global one


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize(
    ("function", "further"), [("identity", {}), ("keras.backend.batch_flatten", {}), ("math.multiply", {"y": 0.1})]
)
def test_a_tensor_keeps_its_dtype(function, further, dtype):
    assert operation("TFOpLambda", {"function": function}, "op")(image(dtype=dtype), **further).dtype == dtype


def test_a_constant_is_rounded_to_the_dtype_it_meets():
    found = operation("TFOpLambda", {"function": "math.multiply"}, "op")(image(), y=0.1)
    _, constant = found._keras_history.operation._inbound_nodes[0].arguments.args
    assert constant == float(np.float32(0.1))


def test_text_of_the_file_reaches_a_message_without_control_characters():
    with pytest.raises(UnsupportedModelError) as refused:
        operation("TFOpLambda", {"function": "a\x1b[2J\nb"}, "layer\x1b\n")
    assert "\x1b" not in str(refused.value)
    assert "\n" not in str(refused.value)
