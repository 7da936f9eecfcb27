"""A session runs one model on one runtime, by names, and says clearly what does not fit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from deploykit import runtimes
from deploykit.errors import DataError, InputError, LoadError, MissingComponentError, UnsupportedModelError
from deploykit.graph import signature as keras_signature
from deploykit.signature import Signature, TensorSpec

L = keras.layers


@pytest.fixture(scope="module")
def model() -> keras.Model:
    a, b = L.Input((3,), name="a"), L.Input((2,), name="b", dtype="int32")
    return keras.Model([b, a], [L.Dense(2, name="y")(a), L.Lambda(lambda t: t * 2, name="twice")(b)])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = a + a and z = b, with a free batch size."""
    nodes = [helper.make_node("Add", ["a", "a"], ["y"]), helper.make_node("Identity", ["b"], ["z"])]
    floats, ints = TensorProto.FLOAT, TensorProto.INT64
    io = [helper.make_tensor_value_info(n, t, ["batch", 2]) for n, t in (("a", floats), ("b", ints))]
    out = [helper.make_tensor_value_info(n, t, ["batch", 2]) for n, t in (("y", floats), ("z", ints))]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", io, out), opset_imports=[helper.make_opsetid("", 18)], ir_version=8
    )
    path = tmp_path_factory.mktemp("runtimes") / "model.onnx"
    onnx.save_model(proto, path)
    return path


GOOD = {"a": np.ones((3, 2), np.float32), "b": np.ones((3, 2), np.int64)}


def test_importing_the_package_imports_no_framework() -> None:
    code = (
        "import sys, deploykit.runtimes; print([m for m in ('tensorflow', 'keras', 'onnxruntime') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_onnxruntime_runs_by_name_in_the_order_of_the_file(file: Path) -> None:
    session = runtimes.open("onnxruntime-cpu", file, threads=1)
    assert session.runtime == "onnxruntime-cpu"
    assert [str(spec) for spec in session.signature] == [
        *("a float32 [?, 2]", "b int64 [?, 2]", "y float32 [?, 2]", "z int64 [?, 2]")
    ]
    outputs = session.run({"b": GOOD["b"].astype(np.int32), "a": GOOD["a"]})
    assert list(outputs) == ["y", "z"]
    np.testing.assert_array_equal(outputs["y"], 2 * GOOD["a"])


def test_onnxruntime_is_told_the_number_of_threads_and_its_provider(file: Path) -> None:
    session = runtimes.open("onnxruntime-cpu", file, threads=1)
    assert session.native.get_session_options().intra_op_num_threads == 1
    assert session.native.get_providers() == ["CPUExecutionProvider"]


def test_keras_runs_models_with_several_inputs_by_name(model: keras.Model) -> None:
    session = runtimes.open("keras", model)
    assert session.signature == keras_signature(model)
    for batch in (1, 3):
        inputs = {"a": np.ones((batch, 3), np.float32), "b": np.ones((batch, 2), np.int32)}
        outputs = session.run(inputs)
        assert list(outputs) == ["y", "twice"]
        np.testing.assert_allclose(outputs["y"], model([inputs["b"], inputs["a"]])[0], rtol=1e-6)
        np.testing.assert_array_equal(outputs["twice"], 2 * inputs["b"])


def test_keras_runs_in_inference_mode_and_from_a_file(tmp_path: Path) -> None:
    net = keras.Sequential([L.Input((4,)), L.Dropout(0.9), L.BatchNormalization()])
    net.save(tmp_path / "net.keras")
    x = {"input_layer": np.ones((2, 4), np.float32)}
    for given in (net, tmp_path / "net.keras"):
        session = runtimes.open("keras", given)
        x = {session.signature.inputs[0].name: np.ones((2, 4), np.float32)}
        np.testing.assert_allclose(next(iter(session.run(x).values())), 1 / np.sqrt(1.001) * np.ones((2, 4)), rtol=1e-6)


def _signature_of(inputs: object, outputs: object) -> tuple[list[str], list[str]]:
    found = keras_signature(keras.Model(inputs, outputs))
    return [spec.name for spec in found.inputs], [spec.name for spec in found.outputs]


def test_names_are_those_of_keras_and_distinct() -> None:
    a, b = L.Input((3,), name="a"), L.Input((2,), name="b")
    y, state = L.Dense(1, name="y"), L.LSTM(2, return_state=True, name="s")(L.Input((4, 2), name="q"))
    assert _signature_of({"b": b, "a": a}, {"two": y(a), "one": b}) == (["a", "b"], ["one", "two"])
    assert _signature_of(a, [y(a), y(a), a]) == (["a"], ["y", "y_1", "a_1"])
    assert _signature_of(state[0]._keras_history.operation.input, state) == (["q"], ["s", "s_1", "s_2"])
    unnamed = keras.Sequential([L.Input((3,)), y])
    assert keras_signature(unnamed).inputs[0].name == unnamed.inputs[0]._keras_history.operation.name


REFUSED_MODELS = {
    "unknown runtime 'tpu'; known are keras, onnxruntime-cpu": lambda p: runtimes.open("tpu", p / "m.onnx"),
    "threads must be at least 1, not 0": lambda p: runtimes.open("keras", p / "m.keras", threads=0),
    "m.onnx does not exist": lambda p: runtimes.open("onnxruntime-cpu", p / "m.onnx"),
    "there is no file .*m.keras": lambda p: runtimes.open("keras", p / "m.keras"),
    "bad.onnx: .*complete .onnx file": lambda p: runtimes.open("onnxruntime-cpu", _junk(p / "bad.onnx")),
    "bad.keras": lambda p: runtimes.open("keras", _junk(p / "bad.keras")),
    "not Sequential objects; give a path": lambda p: runtimes.open("onnxruntime-cpu", keras.Sequential()),
    "keras.Model objects and their files, not list": lambda p: runtimes.open("keras", []),
    "has no input shape": lambda p: runtimes.open("keras", keras.Sequential([L.Dense(1)])),
    "is neither a .keras archive nor": lambda p: runtimes.open(runtimes.runtime_for("m.xyz"), _junk(p / "m.xyz")),
    "not 4096; start a process": lambda p: runtimes.open("keras", keras.Sequential(), threads=4096),
}


def _junk(path: Path) -> Path:
    path.write_bytes(b"junk")
    return path


@pytest.mark.parametrize("message", REFUSED_MODELS)
def test_what_cannot_be_opened_is_refused_in_one_line(
    message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((InputError, LoadError, UnsupportedModelError), match=message) as caught:
        REFUSED_MODELS[message](tmp_path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


REFUSED_DATA = {
    "no data for input b": {"a": GOOD["a"]},
    "the model has no input c": {**GOOD, "c": GOOD["a"]},
    r"input a float32 \[\?, 2\] was given an array of shape \[3, 3\]": {**GOOD, "a": np.ones((3, 3), np.float32)},
    r"array of shape \[2\]": {**GOOD, "a": np.ones(2, np.float32)},
    "was given float64 data; convert it to float32 first": {**GOOD, "a": np.ones((3, 2))},
    "was given float32 data; convert it to int64 first": {**GOOD, "b": np.ones((3, 2), np.float32)},
    "b int64 .* was given <U1 data": {**GOOD, "b": np.full((3, 2), "1")},
}


@pytest.mark.parametrize("message", REFUSED_DATA)
def test_data_that_does_not_fit_is_refused(message: str, file: Path) -> None:
    session = runtimes.open("onnxruntime-cpu", file)
    with pytest.raises(DataError, match=message):
        session.run(REFUSED_DATA[message])


def test_a_failing_run_is_one_line_and_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    net = keras.Sequential([L.Input((None,), name="x"), L.Reshape((2, 2))])
    with pytest.raises(DataError, match="cannot run on this data") as caught:
        runtimes.open("keras", net).run({"x": np.ones((1, 3), np.float32)})
    assert "File " not in str(caught.value)
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [2, 2])
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["a", "b"]) for n in "xy")
    graph = helper.make_graph([node], "g", [x], [y], [shape])
    onnx.save_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "m.onnx"
    )
    with pytest.raises(DataError, match="ONNX Runtime cannot run"):
        runtimes.open("onnxruntime-cpu", tmp_path / "m.onnx").run({"x": np.ones((1, 3), np.float32)})
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["keras", "onnxruntime-cpu"])
def test_a_closed_session_does_not_run(name: str, model: keras.Model, file: Path) -> None:
    session = runtimes.open(name, model if name == "keras" else file)
    session.close()
    with pytest.raises(InputError, match="closed"):
        session.run(GOOD)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    row = replace(runtimes.RUNTIMES["onnxruntime-cpu"], name="x", module="absent_package.x", extra="fast")
    monkeypatch.setitem(runtimes.RUNTIMES, "x", replace(row, packages=("absent_package",)))
    with pytest.raises(MissingComponentError, match=r"pip install 'deploykit\[fast\]'"):
        runtimes.open("x", file)
    monkeypatch.setitem(runtimes.RUNTIMES, "x", row)  # not its package: a fault of ours, not of the installation
    with pytest.raises(ModuleNotFoundError):
        runtimes.open("x", file)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        *(("m.keras", "keras"), ("m.h5", "keras"), ("m", "keras")),
        *(("a/m.ONNX", "onnxruntime-cpu"), ("m.onnx/", "onnxruntime-cpu"), ("m.tflite", "litert")),
    ],
)
def test_the_file_kind_decides_the_runtime(path: str, name: str) -> None:
    assert runtimes.runtime_for(path) == name


def test_free_and_fixed_sizes_survive_in_the_signature() -> None:
    net = keras.Sequential([L.Input(batch_shape=(2, None, 3), name="x"), L.Dense(4, name="y")])
    assert keras_signature(net) == Signature(
        (TensorSpec("x", (2, None, 3), "float32"),), (TensorSpec("y", (2, None, 4), "float32"),)
    )


def test_a_dtype_that_numpy_does_not_have_is_refused() -> None:
    with pytest.raises(DataError, match=r"convert it to tensor\(bfloat16\) first"):
        runtimes.fitted({"x": np.ones(2, np.float32)}, [TensorSpec("x", (None,), "tensor(bfloat16)")])
