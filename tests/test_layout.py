"""A file in NCHW beside the model in NHWC: whoever compares or times it gives and gets what the model has."""

from __future__ import annotations

import json
import subprocess
import sys

import keras
import numpy as np
import onnx
import pytest
from nets import chain, inputs_for

from deploykit import layout as layouts
from deploykit import verify
from deploykit.bench import Candidate, bench
from deploykit.bisect import layer_errors
from deploykit.deploy import DataOptions, deploy, export_checked, samples_for
from deploykit.diagnosis import Wishes
from deploykit.equivalence import equivalence
from deploykit.errors import DataError, InputError, UnsupportedModelError
from deploykit.export import _Wanted, export
from deploykit.latency import given
from deploykit.load import load
from deploykit.profiling import profile
from deploykit.runtimes import open as raw
from deploykit.runtimes import trained
from deploykit.runtimes.files import stated
from deploykit.signature import Signature, TensorSpec

L = keras.layers
VARIANTS = {"nhwc": {}, "nchw": {"layout": "nchw"}, "fp16": {"precision": "fp16"}}
VARIANTS["both"] = VARIANTS["nchw"] | VARIANTS["fp16"]


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """A net with an image and a vector as outputs, in a .keras file, and its exports by name."""
    folder = tmp_path_factory.mktemp("layout")
    start = L.Input((8, 6, 3), name="image")
    x = L.Conv2D(4, 3, activation="relu", name="conv")(start)
    x = L.BatchNormalization(name="bn")(x)
    mask = L.Conv2D(2, 1, name="mask")(x)
    scores = L.Dense(5, activation="softmax", name="scores")(L.GlobalAveragePooling2D()(x))
    model = keras.Model(start, [mask, scores])
    rng = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(
            rng.uniform(0.2, 1.0, weight.shape) * rng.choice([-1, 1] if "variance" not in weight.path else [1])
        )
    model.save(folder / "net.keras")
    for name, options in VARIANTS.items():
        export(model, folder / f"{name}.onnx", **options)
    return model, folder


def shapes(path) -> dict[str, list[int]]:
    graph = onnx.load(path).graph
    return {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim][1:] for v in (*graph.input, *graph.output)}


def test_the_file_says_what_it_is(net):
    _, folder = net
    told = {name: stated(folder / f"{name}.onnx") for name in VARIANTS}
    assert told["nhwc"] == {}
    assert told["both"] == {"deploykit.layout": "NCHW", "deploykit.precision": "float16"}
    assert shapes(folder / "nchw.onnx") == {"image": [3, 8, 6], "mask": [2, 6, 4], "scores": [5]}
    assert shapes(folder / "fp16.onnx") == shapes(folder / "nhwc.onnx")
    assert not any(node.op_type == "Transpose" for node in onnx.load(folder / "both.onnx").graph.node)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_model_gives_the_same_bytes(net, tmp_path, name):
    model, folder = net
    export(model, tmp_path / "again.onnx", **VARIANTS[name])
    assert (tmp_path / "again.onnx").read_bytes() == (folder / f"{name}.onnx").read_bytes()


@pytest.mark.parametrize("runtime", ["onnxruntime-cpu", "onnx-reference"])
def test_a_session_answers_as_the_model_does(net, runtime):
    model, folder = net
    inputs = inputs_for(model, 3)
    session, plain = (trained.open(runtime, folder / f"{name}.onnx") for name in ("nchw", "nhwc"))
    assert session.signature == plain.signature
    assert session.notes != plain.notes
    right = model(inputs["image"])
    found = session.run(inputs)
    assert list(found) == ["mask", "scores"]
    np.testing.assert_allclose(found["mask"], right[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["scores"], right[1], rtol=1e-4, atol=1e-5)
    own = raw(runtime, folder / "nchw.onnx").run({"image": inputs["image"].transpose(0, 3, 1, 2)})
    np.testing.assert_array_equal(own["mask"].transpose(0, 2, 3, 1), found["mask"])
    with pytest.raises(DataError, match=r"image float32 \[\?, 8, 6, 3\] was given"):
        session.run({"image": inputs["image"].transpose(0, 3, 1, 2)})


def test_layers_are_compared_in_nchw_too(net):
    model, folder = net
    found = layer_errors(model, folder / "nchw.onnx", inputs_for(model))
    assert found.first is None
    compared = {row.layer for row in found.rows if row.status in ("same", "moved")}
    assert {"mask", "scores"} <= compared


def test_both_layouts_stand_side_by_side_in_a_benchmark(net):
    model, folder = net
    rows = [Candidate(name, folder / f"{name}.onnx", "onnxruntime-cpu") for name in ("nchw", "nhwc")]
    report = bench(rows, inputs_for(model), seconds=0.1, processes=1)
    assert [timing.failed for timing in report.timings] == [None, None]
    assert {timing.size for timing in report.timings} == {"8x6x3"}
    assert report.comparison("nchw", "nhwc").ratio is not None


def test_inputs_for_a_benchmark_are_made_up_in_the_models_layout(net):
    (samples,), _ = given(net[1] / "nchw.onnx", DataOptions(limit=3))
    assert samples.arrays["image"].shape == (3, 8, 6, 3)


@pytest.mark.slow  # it measures the machine's limits, too
def test_a_profile_takes_the_models_images(net):
    model, folder = net
    assert profile(folder / "nchw.onnx", inputs_for(model), seconds=0.05).input_shapes == {"image": (6, 3, 8, 6)}


REFUSED = {
    "no image": (chain((4,), L.Dense(3)), {"layout": "nchw"}, "no input or output of rank 4"),
    "channels in front": (
        chain((3, 8, 8), L.Conv2D(4, 3, data_format="channels_first")),
        {"layout": "nchw"},
        "^input x is not read as an image",
    ),
    "no float32": (
        chain((4,), L.Dense(3, dtype="float64")),
        {"precision": "fp16"},
        "float32|nothing",
    ),
}


@pytest.mark.parametrize(("model", "options", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_leaves_nothing(model, options, said, tmp_path):
    with pytest.raises(UnsupportedModelError, match=said):
        export(model, tmp_path / "x.onnx", **options)
    assert list(tmp_path.iterdir()) == []


IMAGES = Signature((TensorSpec("x", (None, 6, 5, 3), "float32"),), (TensorSpec("y", (None, 6, 5, 3), "float32"),))


def parsed(body: str) -> onnx.ModelProto:
    head = '<ir_version: 8, opset_import: ["": 18, "my": 1]> g (float[n,6,5,3] x) => (float[n,6,5,3] y)'
    return onnx.parser.parse_model(f"{head} <int64[2] flat={{-1,90}}, int64[4] image={{-1,6,5,3}}> {{ {body} }}")


def test_a_file_without_lowering_that_cannot_be_turned_is_left_out():
    made, notices = _Wanted("nchw", "fp32").beside(parsed("f=Reshape(x,flat) g=Relu(f) y=Reshape(g,image)"), IMAGES)
    assert made is None
    assert notices[0].startswith("no file without lowering beside it: input x is not read as an image")


def test_an_output_whose_shape_the_graph_does_not_tell_is_turned_too():
    proto = parsed("t=Transpose<perm=[0,3,1,2]>(x) r=Relu(t) y=my.Own(r)")
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    made, _ = _Wanted("nchw", "fp32").applied(proto, IMAGES)
    assert [node.op_type for node in made.graph.node] == ["Relu", "Own", "Transpose"]


@pytest.mark.parametrize("options", [VARIANTS["nchw"], VARIANTS["fp16"]], ids=["nchw", "fp16"])
def test_constants_outside_of_the_graph_are_refused(tmp_path, options):
    model = chain((8, 6, 3), L.Flatten(), L.Dense(40))
    with pytest.raises(UnsupportedModelError, match=f"too large for one file.* leave out --{next(iter(options))}"):
        export(model, tmp_path / "x.onnx", external_above=100, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"layout": "nwhc"}, {"precision": "half"}])
def test_words_that_mean_nothing_are_named(net, tmp_path, options):
    (word,) = options.values()
    with pytest.raises(InputError, match=word):
        export(net[0], tmp_path / "x.onnx", **options)


def test_arrays_that_are_no_images_stay():
    arrays = {"image": np.zeros((1, 2, 3, 4)), "vector": np.zeros((1, 5))}
    turned = layouts.transposed(arrays, layouts.TO_NCHW)
    assert turned["image"].shape == (1, 4, 2, 3)
    assert turned["image"].flags.c_contiguous
    assert turned["vector"] is arrays["vector"]


# ------------------------------------------------------------------------------------------------ the commands


def test_a_float16_file_is_judged_so_and_the_keras_model_is_not(net, tmp_path):
    loaded = load(net[1] / "net.keras")
    samples = samples_for(loaded.model, DataOptions())
    made = export_checked(loaded, tmp_path / "x.onnx", samples=samples, precision="fp16")
    assert made.check["policy"] == "float16"
    assert made.refused is None
    strict = export_checked(loaded, tmp_path / "y.onnx", samples=samples, precision="fp16", policy=verify.FLOAT32)
    assert "x.onnx" not in str(strict.refused)
    assert "y.onnx on onnxruntime-cpu is not equivalent" in str(strict.refused)
    assert not (tmp_path / "y.onnx").exists()
    by_name = {row["candidate"]: row for row in made.check["comparisons"]}
    keras_snr, half_snr = (by_name[key]["outputs"][0]["snr_db"] for key in ("fused Keras model", "x.onnx"))
    assert half_snr < 90 < keras_snr


def test_a_file_does_not_choose_its_judge(net, cli):
    models = [net[1] / "net.keras", net[1] / "both.onnx"]
    code, out, _ = cli("check", *models, "--json", "-")
    report = json.loads(out)
    assert (code, report["policy"], report["proven"]) == (1, "float32", False)
    assert "to judge it so, give the policy float16" in report["notices"][0]
    assert cli("check", *models, "--policy", "float16")[0] == 0


# (candidates, the policy asked for) -> the policy they are judged by, who passes, a word of the first notice
JUDGED = {
    "a policy that was asked for stays": (["both"], verify.FLOAT32, "float32", [False], "give the policy float16"),
    "a float32 file beside it is held to float32": (["fp16", "nhwc"], None, "float32", [False, True], "fp16.onnx says"),
    "a wider policy needs no word": (["fp16"], verify.POLICIES["bfloat16"], "bfloat16", [True], None),
    "a float32 file": (["nchw"], None, "float32", [True], None),
}


@pytest.mark.parametrize(("names", "asked", "judged", "passed", "said"), JUDGED.values(), ids=JUDGED)
def test_a_file_weakens_no_check_unsaid(net, names, asked, judged, passed, said):
    found = equivalence(net[0], [net[1] / f"{name}.onnx" for name in names], data=DataOptions(limit=16), policy=asked)
    assert found.body["policy"] == judged
    assert [row["passed"] for row in found.body["comparisons"]] == passed
    assert [said in line for line in found.notices[:1]] == ([True] if said else [])
    assert bool(said) == any("policy float16" in line for line in found.explained)


def test_the_fixture_of_pytest_holds_to_float32_unless_told(net, assert_equivalent):
    models = [net[1] / "net.keras", net[1] / "both.onnx"]
    assert assert_equivalent(*models, samples=16, policy="float16")["policy"] == "float16"
    with pytest.raises(AssertionError, match="give the policy float16"):
        assert_equivalent(*models, samples=16)


def test_a_worst_case_is_searched_in_the_models_layout(net):
    wishes = Wishes(budget=20)
    found = equivalence(
        net[0], [net[1] / "nchw.onnx"], data=DataOptions(limit=16), policy=verify.FLOAT32, wishes=wishes
    )
    assert found.passed
    assert [row["candidate"] for row in found.body["worst_case"]] == [str(net[1] / "nchw.onnx")]


def test_export_takes_both_options(net, cli, tmp_path):
    path = tmp_path / "x.onnx"
    options = ["--layout", "nchw", "--precision", "fp16", "--no-lower", "--samples", "16"]
    code, out, err = cli("export", net[1] / "net.keras", "-o", path, *options, "--json", "-")
    assert code == 0, err
    report = json.loads(out)
    assert (report["layout"], report["precision"], report["lowered"]) == ("nchw", "fp16", {})
    assert any("NCHW: transpose" in notice for notice in report["notices"])
    assert shapes(path)["image"] == [3, 8, 6]
    assert stated(path)["deploykit.precision"] == "float16"


def test_a_bundle_in_nchw_and_float16(net, cli, tmp_path):
    reference, bundle = net[1] / "net.keras", tmp_path / "bundle"
    loaded, options = load(reference), {"layout": "nchw", "precision": "fp16"}
    report = deploy(loaded, bundle, data=DataOptions(limit=16), seconds=0.1, processes=1, **options).to_json()
    assert (report["layout"], report["precision"], report["check"]["policy"]) == ("nchw", "fp16", "float16")
    assert not any(row["failed"] for row in report["bench"]["candidates"])
    assert any(n.startswith("float16 is meant for GPUs; on this CPU its time was") for n in report["notices"])
    manifest = verify.open_bundle(bundle).manifest
    assert manifest["layout"] == layouts.SAID
    assert manifest["policy"] == "float16"
    assert manifest["signature"]["inputs"][0]["shape"] == [None, 3, 8, 6]
    card = (bundle / "README.md").read_text()
    assert "NCHW" in card
    assert "float16" in card
    images = np.random.default_rng(3).normal(size=(2, 8, 6, 3)).astype(np.float32)
    np.save(tmp_path / "mine.npy", images.transpose(0, 3, 1, 2))
    command = [sys.executable, str(bundle / "verify.py"), "--seconds", "0", "--predict", str(tmp_path / "mine.npy")]
    command += ["--output", str(tmp_path / "found.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "found.npz") as found:
        np.testing.assert_allclose(found["mask"].transpose(0, 2, 3, 1), net[0](images)[0], rtol=0.02, atol=0.02)
    assert cli("check", bundle)[0] == 0
    half = verify.POLICIES["float16"]
    assert equivalence(loaded, [bundle], data=DataOptions(limit=16), policy=half).passed


@pytest.mark.parametrize("verb", ["export", "deploy"])
def test_an_unknown_word_is_one_line(net, cli, tmp_path, verb):
    code, _, err = cli(verb, net[1] / "net.keras", "-o", tmp_path / "x.onnx", "--layout", "chwn")
    assert (code, err.count("\n")) == (2, 1)
    assert "chwn" in err


def test_a_float16_file_is_not_profiled_on_a_cpu(net, cli):
    code, _, err = cli("bench", net[1] / "both.onnx", "--profile", "--seconds", "0.1")
    assert (code, err.count("\n")) == (2, 1)
    assert "--profile cannot follow float16" in err
