"""OpenVINO, LiteRT and onnx's own evaluator: real nets answer like Keras, and what does not fit is one line.

The .onnx files are deploykit's exports; the .tflite files come from TensorFlow's converter, given a signature with the
names of the Keras model.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import pytest
import tensorflow as tf
from nets import chain, enliven, inputs_for
from onnx import TensorProto, helper, numpy_helper

from deploykit import runtimes
from deploykit.errors import DataError, InputError, LoadError, MissingComponentError, UnsupportedModelError
from deploykit.export import export
from deploykit.graph import signature as keras_signature
from deploykit.runtimes import onnx_reference, openvino_cpu
from deploykit.runtimes.files import reason, silenced
from deploykit.signature import Signature, TensorSpec

L = keras.layers
ONNX = ["openvino", "onnx-reference"]
FILES = [*ONNX, "litert"]
ROOT = Path(__file__).resolve().parent.parent


def conv() -> keras.Model:
    layers = (L.Conv2D(6, 3, padding="same"), L.BatchNormalization(), L.ReLU(), L.MaxPooling2D(), L.Flatten())
    return chain((8, 8, 3), *layers, L.Dense(4, activation="softmax", name="y"))


def dense() -> keras.Model:
    return chain((5,), L.Dense(7, activation="tanh"), L.BatchNormalization(), L.Dense(3, name="y"))


def two() -> keras.Model:
    """Two inputs and two outputs of different kinds, in no alphabetical order."""
    zeta, alpha = L.Input((4,), name="zeta"), L.Input((6,), name="alpha", dtype="int32")
    seen = L.Flatten()(L.Embedding(5, 3)(alpha))
    joined = L.Concatenate()([L.Dense(5, name="d")(zeta), seen])
    return enliven(keras.Model([zeta, alpha], [L.Dense(2, name="word")(joined), L.Dense(3, name="class")(joined)]))


def free() -> keras.Model:
    """Free spatial sizes."""
    return chain((None, None, 2), L.Conv2D(3, 3), L.BatchNormalization(), L.GlobalAveragePooling2D(), L.Dense(2))


NETS: Mapping[str, Callable[[], keras.Model]] = {"conv": conv, "dense": dense, "two": two, "free": free}


def to_tflite(model: keras.Model, path: Path, *, signature: bool = True) -> Path:
    """TensorFlow's converter, told the names of the Keras model."""
    stated = keras_signature(model)
    specs = [tf.TensorSpec(spec.shape, spec.dtype, name=spec.name) for spec in stated.inputs]

    @tf.function(input_signature=specs)
    def call(*tensors: Any) -> dict[str, Any]:
        outputs = model(list(tensors) if len(tensors) > 1 else tensors[0], training=False)
        return dict(zip((spec.name for spec in stated.outputs), tf.nest.flatten(outputs), strict=True))

    held = tf.Module()
    held.variables_ = [variable.value for variable in model.variables]
    with silenced():
        converter = tf.lite.TFLiteConverter.from_concrete_functions(
            [call.get_concrete_function()], held if signature else None
        )
        path.write_bytes(converter.convert())
    return path


@dataclass(frozen=True)
class Net:
    model: keras.Model
    files: Mapping[str, Path]  # by runtime


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runtimes")


@pytest.fixture(scope="module")
def nets(folder: Path) -> Callable[[str], Net]:
    made: dict[str, Net] = {}

    def net(name: str) -> Net:
        if name not in made:
            keras.utils.set_random_seed(0)  # kernels too: a bound of few roundings is for these
            model = NETS[name]()
            graph, flat = export(model, folder / f"{name}.onnx").path, to_tflite(model, folder / f"{name}.tflite")
            made[name] = Net(model, {**dict.fromkeys([*ONNX, "onnxruntime-cpu"], graph), "litert": flat})
        return made[name]

    return net


def onnx_file(path: Path, nodes: list[Any], inputs: list[str], outputs: list[str], **initializers: Any) -> Path:
    """A graph over float32 vectors of free batch size."""
    values = [
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 2]) for n in part] for part in (inputs, outputs)
    ]
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in initializers.items()]
    graph = helper.make_graph(nodes, "g", *values, stored)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save_model(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


# ------------------------------------------------------------------------------------------------ right answers


@pytest.mark.parametrize("runtime", FILES)
@pytest.mark.parametrize("name", NETS)
def test_it_answers_like_keras_for_a_batch_of_one_and_of_many(nets, name: str, runtime: str) -> None:
    net = nets(name)
    session = runtimes.open(runtime, net.files[runtime])
    assert session.runtime == runtime
    assert keras_signature(net.model).differences(runtimes.signature_like(session, keras_signature(net.model))) == []
    keras_session = runtimes.open("keras", net.model)
    for count, size in ((1, 7), (5, 9), (2, 9)):
        inputs = inputs_for(net.model, count, seed=count, free=size)
        found, wanted = session.run(inputs), keras_session.run(inputs)
        assert found.keys() == wanted.keys()
        for key, right in wanted.items():
            assert (found[key].shape, found[key].dtype) == (right.shape, right.dtype)
            error = np.linalg.norm(found[key] - right) / np.linalg.norm(right)
            assert error < 16 * 2.0**-24, f"{key}: {error}"  # a few float32 roundings; bfloat16 is 2**16 of them away


@pytest.mark.parametrize("runtime", FILES)
def test_a_wrong_weight_shows(nets, tmp_path: Path, runtime: str) -> None:
    model = nets("dense").model
    wrong = keras.models.clone_model(model)
    wrong.set_weights([value * (1 + 1e-4 * (value.shape == (7, 3))) for value in model.get_weights()])
    file = to_tflite(wrong, tmp_path / "w.tflite") if runtime == "litert" else export(wrong, tmp_path / "w.onnx").path
    inputs = inputs_for(model)
    (found,), (right,) = (runtimes.open(*pair).run(inputs).values() for pair in ((runtime, file), ("keras", model)))
    assert np.linalg.norm(found - right) / np.linalg.norm(right) > 1e-5


@pytest.mark.parametrize("runtime", FILES)
def test_answers_last_and_views_may_be_given(nets, runtime: str) -> None:
    net = nets("dense")
    session = runtimes.open(runtime, net.files[runtime])
    (name, array), *_ = inputs_for(net.model, 8).items()
    first = session.run({name: array[::2]})["y"]
    kept = first.copy()
    session.run({name: -array[::2]})
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(first, session.run({name: array[::2].copy()})["y"])
    np.testing.assert_array_equal(first, session.run({name: np.asfortranarray(array[::2])})["y"])


@pytest.mark.parametrize("runtime", FILES)
def test_a_fixed_batch_stays_fixed(tmp_path: Path, runtime: str) -> None:
    net = keras.Sequential([L.Input(batch_shape=(2, 3), name="x"), L.Dense(4, name="y")])
    file = to_tflite(net, tmp_path / "n.tflite") if runtime == "litert" else export(net, tmp_path / "n.onnx").path
    session = runtimes.open(runtime, file)
    assert session.signature == Signature((TensorSpec("x", (2, 3), "float32"),), (TensorSpec("y", (2, 4), "float32"),))
    with pytest.raises(DataError, match=r"was given an array of shape \[3, 3\]"):
        session.run({"x": np.ones((3, 3), np.float32)})


@pytest.mark.parametrize("runtime", ONNX)
def test_names_are_those_of_the_file(tmp_path: Path, runtime: str) -> None:
    """Two outputs that are one tensor, an input that is an output, and an initializer listed as an input."""
    nodes = [helper.make_node("Mul", ["a", "w"], ["y"]), helper.make_node("Identity", ["y"], ["b"])]
    path = onnx_file(tmp_path / "m.onnx", nodes, ["a", "w"], ["y", "b"], w=np.full((1, 2), 3, np.float32))
    session = runtimes.open(runtime, path)
    assert [str(spec) for spec in session.signature] == ["a float32 [?, 2]", "y float32 [?, 2]", "b float32 [?, 2]"]
    found = session.run({"a": np.array([[1, 2]], np.float32)})
    assert {name: value.tolist() for name, value in found.items()} == {"y": [[3, 6]], "b": [[3, 6]]}


@pytest.mark.parametrize("runtime", ONNX)
def test_external_data_is_found_beside_the_file(nets, tmp_path: Path, runtime: str) -> None:
    net = nets("conv")
    proto = onnx.load(net.files[runtime])
    onnx.save_model(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    inputs = inputs_for(net.model)
    found, right = (runtimes.open(runtime, path).run(inputs)["y"] for path in (tmp_path / "m.onnx", net.files[runtime]))
    np.testing.assert_array_equal(found, right)
    (tmp_path / "m.data").unlink()
    with pytest.raises(LoadError, match=r"m\.onnx"):
        runtimes.open(runtime, tmp_path / "m.onnx")


# ---------------------------------------------------------------------------------------- the order of .tflite


def test_a_tflite_file_has_no_order_but_names(nets) -> None:
    net = nets("two")
    session, right = runtimes.open("litert", net.files["litert"]), keras_signature(net.model)
    assert [spec.name for spec in session.signature] == ["alpha", "zeta", "class", "word"]
    assert right.differences(session.signature)
    assert right.differences(runtimes.signature_like(session, right)) == []
    renamed = Signature(
        right.inputs, (TensorSpec("word", (None, 2), "float32"), TensorSpec("kind", (None, 3), "float32"))
    )
    assert "['word', 'class']" in renamed.differences(runtimes.signature_like(session, renamed))[0]


def test_order_counts_where_the_format_has_one(nets) -> None:
    net = nets("two")
    session, right = runtimes.open("openvino", net.files["openvino"]), keras_signature(net.model)
    other = Signature(right.inputs, right.outputs[::-1])
    assert other.differences(runtimes.signature_like(session, other))


# -------------------------------------------------------------------------------------------- settings, quiet


def test_openvino_is_told_threads_and_float32(nets) -> None:
    session = runtimes.open("openvino", nets("dense").files["openvino"], threads=1)
    told = {key: session.native.get_property(key) for key in (openvino_cpu.THREADS, openvino_cpu.MODE)}
    assert told == {openvino_cpu.THREADS: 1, openvino_cpu.MODE: openvino_cpu.ov.properties.hint.ExecutionMode.ACCURACY}
    assert session.native.get_property(openvino_cpu.PRECISION) == openvino_cpu.ov.Type.f32
    assert session.notes == ("inference precision float32",)


def test_openvino_says_when_it_takes_fewer_threads_than_it_may(nets) -> None:
    session = runtimes.open("openvino", nets("dense").files["openvino"], threads=4096)
    taken = session.native.get_property(openvino_cpu.THREADS)
    assert session.notes[1:] == (f"threads {taken}, as many as it finds processors",)


QUIET = """
import os, sys
from pathlib import Path
import numpy as np
from deploykit import runtimes

onnx_file, tflite_file = sys.argv[1:]
sizes = []
for name, file, threads in [
    ("openvino", onnx_file, 1),
    ("onnx-reference", onnx_file, None),
    ("litert", tflite_file, 1),
    ("litert", tflite_file, 3),
]:
    before = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0
    session = runtimes.open(name, file, threads=threads)
    session.run({"x": np.ones((64, 8, 8, 3), np.float32)})
    sizes.append(len(os.listdir("/proc/self/task")) - before if sys.platform == "linux" else 0)
    session.close()
reported = [name for name, module in sys.modules.items() if name.startswith("openvino_telemetry")]
print(sizes[2:], reported, "tensorflow" in sys.modules, os.listdir(Path.home()))
"""


def test_nothing_is_printed_nothing_is_reported_and_threads_are_what_was_asked(nets, tmp_path: Path) -> None:
    """In a process and a home of its own: OpenVINO marks in the home that it reports, LiteRT speaks when first used."""
    files = nets("conv").files
    command = [sys.executable, "-c", QUIET, files["openvino"], files["litert"]]
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "PYTHONPATH")}
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**environment, "HOME": str(tmp_path)}, cwd=ROOT
    )
    tasks = "[0, 2]" if sys.platform == "linux" else "[0, 0]"
    assert (ended.stdout, ended.stderr) == (f"{tasks} [] False []\n", "")


def test_openvino_leaves_telemetry_importable_for_others() -> None:
    assert sys.modules.get(openvino_cpu.TELEMETRY, "absent") is not None


def test_the_reference_evaluator_cannot_bound_threads_and_says_so(nets) -> None:
    with pytest.raises(InputError, match="belong to the process; leave threads out"):
        runtimes.open("onnx-reference", nets("dense").files["onnx-reference"], threads=2)


def test_silence_is_caught_and_ends(capfd: pytest.CaptureFixture[str]) -> None:
    with silenced() as said:
        os.write(1, b"native ")
        os.write(2, b"error ")
        print("python")
        said.seek(0)
        text = said.read()
    assert sorted(text.split()) == ["error", "native", "python"]
    print("after")
    os.write(2, b"after")
    assert capfd.readouterr() == ("after\n", "after")


def test_a_reason_is_what_is_wrong_and_not_where() -> None:
    message = "Exception from src/core.cpp:84:\nCheck 'x == y' failed at src/x.cpp:1:\nsizes differ\n\n"
    assert reason(RuntimeError(message)) == "sizes differ"
    assert reason(RuntimeError("Exception from src/core.cpp:84:")) == "Exception from src/core.cpp:84:"
    assert reason(ValueError()) == "ValueError"


# ------------------------------------------------------------------------------------------------- refusals


WRONG_DATA = {
    "no data for input zeta": lambda x: {"alpha": x["alpha"]},
    "the model has no input c": lambda x: {**x, "c": x["zeta"]},
    r"input zeta float32 \[\?, 4\] was given an array of shape \[6, 3\]": lambda x: {**x, "zeta": x["zeta"][:, :3]},
    r"array of shape \[4\]": lambda x: {**x, "zeta": x["zeta"][0]},
    "convert it to float32 first": lambda x: {**x, "zeta": x["zeta"].astype(np.float64)},
    "convert it to int32 first": lambda x: {**x, "alpha": x["alpha"].astype(np.float32)},
}


@pytest.mark.parametrize("runtime", FILES)
def test_data_that_does_not_fit_is_refused_by_name(nets, runtime: str) -> None:
    net = nets("two")
    session, inputs = runtimes.open(runtime, net.files[runtime]), inputs_for(net.model)
    for message, spoil in WRONG_DATA.items():
        with pytest.raises(DataError, match=message):
            session.run(spoil(inputs))
    session.run(inputs)
    session.close()
    with pytest.raises(InputError, match="closed; open it again"):
        session.run(inputs)


def test_data_that_fails_inside_is_one_line_and_prints_nothing(nets, tmp_path, capfd) -> None:
    nodes = [helper.make_node("Reshape", ["a", "shape"], ["y"])]
    path = onnx_file(tmp_path / "m.onnx", nodes, ["a"], ["y"], shape=np.array([2, 2], np.int64))
    for runtime, file, x in (
        *((runtime, path, {"a": np.ones((3, 2), np.float32)}) for runtime in ONNX),
        ("litert", nets("free").files["litert"], {"x": np.ones((2, 1, 1, 2), np.float32)}),  # smaller than the kernel
    ):
        session = runtimes.open(runtime, file)
        with pytest.raises(DataError, match=rf"{file.name} on this data: .") as caught:
            session.run(x)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def damaged(whole: bytes) -> dict[str, bytes]:
    cuts = {f"cut at {share}": whole[: int(len(whole) * share)] for share in (0.1, 0.5, 0.97)}
    return {"empty": b"", "junk": b"junk", "zeros": bytes(4096), **cuts}


@pytest.mark.parametrize("runtime", FILES)
def test_a_damaged_file_is_refused_in_one_line(nets, tmp_path: Path, runtime: str, capfd) -> None:
    file = nets("conv").files[runtime]
    for kind, content in damaged(file.read_bytes()).items():
        (tmp_path / file.name).write_bytes(content)
        with pytest.raises(
            LoadError, match=rf"{file.name}.*; check that it is a complete \{file.suffix} file"
        ) as caught:
            runtimes.open(runtime, tmp_path / file.name)
        assert "\n" not in str(caught.value), kind
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("runtime", FILES)
def test_what_is_no_file_is_refused(nets, tmp_path: Path, runtime: str) -> None:
    for given, kind, message in (
        (tmp_path / "absent", LoadError, "does not exist or is no file"),
        (tmp_path, LoadError, "does not exist or is no file"),
        (nets("dense").model, InputError, "not Functional objects; give a path"),
    ):
        with pytest.raises(kind, match=message):
            runtimes.open(runtime, given)


@pytest.mark.parametrize("runtime", ONNX)
def test_a_file_that_parses_and_is_no_graph_is_refused(tmp_path: Path, runtime: str, capfd) -> None:
    (tmp_path / "m.onnx").write_bytes(onnx.ModelProto(ir_version=8).SerializeToString())
    with pytest.raises(LoadError, match="holds no graph with outputs"):
        runtimes.open(runtime, tmp_path / "m.onnx")
    path = onnx_file(tmp_path / "n.onnx", [helper.make_node("Abs", ["nowhere"], ["y"])], ["a"], ["y"])
    with pytest.raises(LoadError, match="nowhere"):
        runtimes.open(runtime, path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("runtime", ONNX)
def test_an_operator_that_it_lacks_is_refused_by_name(tmp_path: Path, runtime: str) -> None:
    path = onnx_file(
        tmp_path / "m.onnx", [helper.make_node("Abacus", ["a"], ["y"], domain="com.microsoft")], ["a"], ["y"]
    )
    with pytest.raises(LoadError, match="Abacus"):
        runtimes.open(runtime, path)


def test_a_tflite_file_without_a_signature_is_refused(nets, tmp_path: Path) -> None:
    file = to_tflite(nets("dense").model, tmp_path / "m.tflite", signature=False)
    with pytest.raises(UnsupportedModelError, match=r"has 0 signatures .*from_saved_model"):
        runtimes.open("litert", file)


def test_the_reference_evaluator_rounds_erf_once(tmp_path: Path) -> None:
    text = "<ir_version: 8, opset_import: ['' : 18]> g (double[N] x) => (double[N] y) { y = Erf (x) }"
    onnx.save(onnx.parser.parse_model(text.replace("'", '"')), tmp_path / "erf.onnx")
    x = np.linspace(-3, 3, 101)
    y = runtimes.open("onnx-reference", tmp_path / "erf.onnx").run({"x": x})["y"]
    assert np.abs(y - [math.erf(value) for value in x]).max() < 1e-15


def test_the_reference_evaluator_stacks_what_a_loop_collects(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 18]> g (int64 n, float[3] x) => (float[3] last, float[K, 3] all)
    <bool go = {1}> {
        last, all = Loop <body = step (int64 i, bool on, float[3] seen) => (bool go_on, float[3] next, float[3] each) {
            go_on = Identity (on)
            next = Add (seen, seen)
            each = Identity (seen)
        }> (n, go, x)
    }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "loop.onnx")
    given = {"n": np.array(4), "x": np.array([1, 2, 3], np.float32)}
    here, there = (
        runtimes.open(name, tmp_path / "loop.onnx").run(given) for name in ("onnx-reference", "onnxruntime-cpu")
    )
    assert here["all"].shape == there["all"].shape == (4, 3)
    assert all(np.array_equal(here[name], there[name]) for name in there)


def test_the_reference_evaluator_takes_small_nets_only(tmp_path: Path) -> None:
    sizes = {}
    for side in (100, 600):
        net = keras.Sequential([L.Input((side, side, 1), name="x"), L.ReLU(name="r"), L.ReLU(name="y")])
        path = export(net, tmp_path / f"{side}.onnx").path
        sizes[side] = onnx_reference.produced(onnx.load(path))
        if sizes[side] <= onnx_reference.LIMIT:
            assert runtimes.open("onnx-reference", path).signature == keras_signature(net)
        else:
            with pytest.raises(UnsupportedModelError, match=r"600\.onnx produces 720,000 elements .* at most 500,000"):
                runtimes.open("onnx-reference", path)
    assert sizes == {100: 20_000, 600: 720_000}


# ---------------------------------------------------------------------------------------------- the whole way


@pytest.mark.parametrize("runtime", ONNX)
def test_check_runs_on_it_and_catches_a_wrong_file(cli, nets, tmp_path: Path, runtime: str) -> None:
    net = nets("conv")
    net.model.save(tmp_path / "ref.keras")
    proto = onnx.load(net.files[runtime])
    heavy = max(proto.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    value = numpy_helper.to_array(heavy).copy()
    value.flat[0] += 0.05
    heavy.CopyFrom(numpy_helper.from_array(value, heavy.name))
    onnx.save(proto, tmp_path / "wrong.onnx")
    for file, code in ((net.files[runtime], 0), (tmp_path / "wrong.onnx", 1)):
        report = tmp_path / f"{code}.json"
        found = cli("check", tmp_path / "ref.keras", file, "--runtime", runtime, "--json", report)
        assert found[0] == code, found
        (compared,) = json.loads(report.read_text())["comparisons"]
        assert (compared["runtime"], compared["passed"]) == (runtime, code == 0)
        assert compared["outputs"]


def test_check_takes_litert_for_a_tflite_file(cli, nets, tmp_path: Path) -> None:
    net = nets("dense")
    net.model.save(tmp_path / "ref.keras")
    code, out, err = cli("check", tmp_path / "ref.keras", net.files["litert"], "--json", "-")
    assert (code, err) == (0, "")
    (compared,) = json.loads(out)["comparisons"]
    assert (compared["runtime"], compared["passed"]) == ("litert", True)


@pytest.mark.parametrize(("runtime", "package"), [("openvino", "openvino"), ("litert", "ai_edge_litert")])
def test_a_runtime_that_is_not_installed_names_its_extra(
    nets, runtime: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent: Any = None  # Python's own mark for a module that cannot be imported
    for name in {package, *(name for name in sys.modules if name.startswith(f"{package}."))}:
        monkeypatch.setitem(sys.modules, name, absent)
    monkeypatch.delitem(sys.modules, runtimes.RUNTIMES[runtime].module, raising=False)
    with pytest.raises(MissingComponentError, match=rf"needs {package}; .*'deploykit\[{runtime}\]'") as caught:
        runtimes.open(runtime, nets("dense").files[runtime])
    assert caught.value.exit_code == 2
