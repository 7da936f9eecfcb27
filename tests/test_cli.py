"""The command line: every verb, and the whole table of bad input: exit 2, one line, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from nets import chain, enliven
from test_verify import write_bundle

from deploykit import graph
from deploykit.cli import _exit_code

L = keras.layers
ROOT = Path(__file__).resolve().parent.parent
CNN, SAMPLE = ROOT / "models" / "fashion_cnn.keras", ROOT / "models" / "fashion_sample.npz"
COMMAND = [sys.executable, "-m", "deploykit.cli"]


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A small live model on disk."""
    path = tmp_path_factory.mktemp("small") / "net.keras"
    chain((6,), L.Dense(5), L.BatchNormalization(name="bn"), L.ReLU(), L.Dense(3, name="y"), seed=3).save(path)
    return path


def refused(result, *words) -> None:
    """Exit 2 and exactly one line on stderr that says the words."""
    code, out, err = result
    assert code == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert out == ""
    assert "Traceback" not in err
    for word in words:
        assert word in err


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ------------------------------------------------------------------------------------------------ the verbs


def test_inspect_shows_the_file(cli, small):
    code, out, err = cli("inspect", small)
    assert (code, err) == (0, "")
    assert "1 BatchNormalization" in out
    assert "x float32 [?, 6]" in out


def test_fuse_writes_beside_the_input_and_says_what_went(cli, small, tmp_path):
    source = tmp_path / "net.keras"
    source.write_bytes(small.read_bytes())
    code, out, _ = cli("fuse", source)
    assert code == 0
    assert "1 of 1 BatchNormalization" in out
    model = keras.models.load_model(tmp_path / "net.fused.keras", compile=False)
    assert not any(isinstance(layer, L.BatchNormalization) for layer in model.layers)


def test_dry_run_writes_nothing(cli, small, tmp_path):
    before = files(small.parent)
    code, _, _ = cli("fuse", small, "--dry-run", "--json", tmp_path / "report.json")
    assert code == 0
    assert files(small.parent) == before
    assert json.loads((tmp_path / "report.json").read_text())["outputs_written"] == []


FUSE_KEYS = {"affines", "decisions", "params", "exactness_f64", "exactness_bound", "exactness_stored"}
COMMON_KEYS = {"schema", "deploykit", "proven", "environment", "seconds", "model", "outputs_written", "notices"}


def test_json_on_stdout_is_all_of_stdout(cli, small, tmp_path):
    code, out, err = cli("fuse", small, "-o", tmp_path / "f.keras", "--json", "-")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["schema"] == "deploykit.fuse/1"
    assert set(report) >= COMMON_KEYS | FUSE_KEYS
    assert report["affines"]["by_kind"]["BatchNormalization"] == {"total": 1, "fused": 1, "reduced": 0, "kept": 0}
    assert set(report["decisions"][0]) >= {"layer", "kind", "outcome", "direction", "into", "through", "code", "reason"}
    assert report["proven"] is True


def test_keep_and_barrier_reach_the_plan(cli, small, tmp_path):
    for flag, name, code_word in (("--keep", "bn", "kept_by_user"), ("--barrier", "bn", "barrier")):
        _, out, _ = cli("fuse", small, "--dry-run", flag, name, "--json", "-")
        assert json.loads(out)["decisions"][0]["code"] == code_word
    refused(cli("fuse", small, "--dry-run", "--keep", "bm"), "bm", "did you mean bn")


def test_export_and_check(cli, small, tmp_path):
    target = tmp_path / "net.onnx"
    code, out, _ = cli("export", small, "-o", target)
    assert code == 0
    assert "equivalent" in out
    code, out, err = cli("check", small, target, "--json", "-")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["schema"] == "deploykit.check/1"
    assert report["passed"]
    assert report["reference"]["precision"] == "float64"
    output = report["comparisons"][0]["outputs"][0]
    expected = "name passed snr_db reference_snr_db max_abs max_rel cosine top1_agreement smallest_rtol smallest_atol"
    assert set(output) >= {*expected.split(), "worst_sample", "worst_index", "reason"}


@pytest.mark.parametrize("batch", ["dynamic", "4"])
def test_export_batch(cli, small, tmp_path, batch):
    import onnxruntime

    code, _, _ = cli("export", small, "-o", tmp_path / "n.onnx", "--batch", batch, "--no-fuse", "--opset", "17", "-q")
    assert code == 0
    session = onnxruntime.InferenceSession(tmp_path / "n.onnx")
    assert session.get_inputs()[0].shape[0] == ("batch" if batch == "dynamic" else 4)


def test_check_fails_on_another_model_and_says_where(cli, small, tmp_path):
    other = tmp_path / "other.keras"
    model = keras.models.load_model(small)
    model.get_layer("y").kernel.assign_add(np.full(model.get_layer("y").kernel.shape, 1e-3, np.float32))
    model.save(other)
    code, out, err = cli("check", small, other)
    assert code == 1
    assert "DIFFERS" in out
    assert err.count("\n") == 1
    assert "not equivalent" in err


def test_rtol_and_atol_replace_the_policy(cli, small, tmp_path):
    other = tmp_path / "other.keras"
    model = keras.models.load_model(small)
    model.get_layer("y").bias.assign_add(np.full(3, 1e-3, np.float32))
    model.save(other)
    assert cli("check", small, other, "--atol", "0.002", "-q")[0] == 0
    assert cli("check", small, other, "--atol", "0.0005", "-q")[0] == 1
    refused(cli("check", small, other, "--rtol", "-1"), "rtol")


def test_names_of_models_may_hold_anything_a_terminal_would_interpret(cli, small, tmp_path):
    odd = tmp_path / "[bold]a b[red].keras"
    odd.write_bytes(small.read_bytes())
    code, out, _ = cli("inspect", odd)
    assert code == 0
    assert "[bold]a b[red].keras" in out.replace("\n", "")


# ------------------------------------------------------------------------------------------------- bad input


def truncated(small: Path, path: Path) -> None:
    path.write_bytes(small.read_bytes()[:-2000])


def zip_without_model(small: Path, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


def hdf5_weights(small: Path, path: Path) -> None:
    model = keras.models.load_model(small)
    weights = path.with_name("w.weights.h5")
    model.save_weights(weights)
    weights.rename(path)


@keras.saving.register_keras_serializable("elsewhere")
class Unknown(L.Layer):
    def call(self, x):
        return x * 2


def custom_layer(small: Path, path: Path) -> None:
    chain((6,), L.Dense(2), Unknown(name="odd_one")).save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["config.json"] = members["config.json"].replace(b"Unknown", b"Stranger")
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def lambda_layer(small: Path, path: Path) -> None:
    x = keras.Input((6,), name="x")
    keras.Model(x, L.Lambda(lambda t: t * 2, output_shape=(6,), name="code")(L.Dense(6)(x))).save(path)


def spectral(small: Path, path: Path) -> None:
    x = keras.Input((6,), name="x")
    enliven(keras.Model(x, L.BatchNormalization()(L.SpectralNormalization(L.Dense(4), name="sn")(x)))).save(path)


def lora(small: Path, path: Path) -> None:
    model = chain((6,), L.Dense(4, name="adapted"), L.BatchNormalization())
    model.get_layer("adapted").enable_lora(2)
    model.save(path)


def quantized(small: Path, path: Path) -> None:
    model = chain((6,), L.Dense(4, name="narrow"), L.BatchNormalization())
    model.quantize("int8")
    model.save(path)


def nan_weights(small: Path, path: Path) -> None:
    model = keras.models.load_model(small)
    model.get_layer("y").kernel.assign(np.full(model.get_layer("y").kernel.shape, np.nan, np.float32))
    model.save(path)


BAD = {
    "missing file": (lambda small, path: None, "m.keras", ["m.keras"]),
    "folder": (lambda small, path: path.mkdir(), "m", ["folder"]),
    "empty file": (lambda small, path: path.write_bytes(b""), "m.keras", ["empty"]),
    "truncated": (truncated, "m.keras", ["m.keras"]),
    "zip that is no model": (zip_without_model, "m.keras", ["m.keras"]),
    "weights only": (hdf5_weights, "m.h5", ["weights"]),
    "custom layer": (custom_layer, "m.keras", ["Stranger", "--custom-objects"]),
    "lambda": (lambda_layer, "m.keras", ["code", "--allow-code"]),
    "lambda in HDF5": (lambda_layer, "m.h5", ["code", "--allow-code"]),
    "SpectralNormalization": (spectral, "m.keras", ["sn", "SpectralNormalization"]),
    "LoRA": (lora, "m.keras", ["adapted", "LoRA"]),
    "int8": (quantized, "m.keras", ["narrow", "quantized"]),
    "NaN": (nan_weights, "m.keras", ["y"]),
}


@pytest.mark.parametrize("row", BAD)
def test_bad_models_are_refused_in_one_line(cli, small, tmp_path, row):
    make, name, words = BAD[row]
    path = tmp_path / name
    make(small, path)
    before = files(tmp_path)
    refused(cli("fuse", path, "-o", tmp_path / "out" / "f.keras"), *words)
    assert files(tmp_path) == before


@pytest.mark.parametrize("verb", ["inspect", "export", "deploy", "check"])
def test_every_verb_refuses_a_missing_file(cli, small, tmp_path, verb):
    more = {"deploy": ["-o", tmp_path / "b"], "check": [small]}.get(verb, [])
    refused(cli(verb, tmp_path / "none.keras", *more), "none.keras")


def test_inspect_still_reports_nan(cli, small, tmp_path):
    nan_weights(small, tmp_path / "m.keras")
    code, out, _ = cli("inspect", tmp_path / "m.keras")
    assert code == 0
    assert "health" in out
    assert "NaN" in out or "nan" in out


@pytest.mark.parametrize("verb", ["fuse", "export", "deploy"])
def test_an_existing_output_needs_force(cli, small, tmp_path, verb):
    target = tmp_path / "there.keras"
    target.write_text("mine")
    refused(cli(verb, small, "-o", target), "--force")
    assert target.read_text() == "mine"


@pytest.mark.parametrize("verb", ["fuse", "export", "deploy"])
def test_an_output_below_a_file_is_refused(cli, small, tmp_path, verb):
    (tmp_path / "file").write_text("x")
    refused(cli(verb, small, "-o", tmp_path / "file" / "below"), "file")


LONG = "a" * 5000  # no file can be called so


@pytest.mark.parametrize(
    "arguments",
    [
        ["fuse"],
        ["fuze"],
        ["fuse", "{small}", "--nonsense"],
        ["export", "{small}", "--batch", "zero"],
        ["export", "{small}", "--opset", "99"],
        ["fuse", "{small}", "--image-size", "12"],
        ["bench", "{small}", "--batch", "1,x"],
        ["check", "{small}"],
        ["check", LONG],
        ["check", "{small}", LONG],
        ["check", "{small}", LONG + ".onnx"],
        ["check", "{small}", "{small}", "--json", LONG],
        ["fuse", "{small}", "-o", LONG],
        ["check", "{small}", "{small}", "--samples", "1" + 30 * "0"],
        ["check", "{small}", "{small}", "--runtime", "abacus"],
        ["deploy", "{small}"],
        ["fuse", "{small}", "--dry-run", "--data", "nowhere.npz"],
        ["fuse", "{small}", "--dry-run", "--json", "/dev/null/report.json"],
    ],
)
def test_bad_usage_is_one_line(cli, small, arguments):
    refused(cli(*[argument.format(small=small) for argument in arguments]))


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.EACCES])
def test_a_path_that_leads_nowhere_is_no_internal_error(number):
    code, line = _exit_code(OSError(number, "No Way", "a" * 5000))
    assert (code, len(line) < 200) == (2, True)
    assert "no way" in line


# ------------------------------------------------------------------------------------------- real processes


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["fuse", "deploy"])
def test_a_disk_that_fills_leaves_nothing(tmp_path, verb):
    """A file size limit stands in for a full disk; Python turns the signal into an OSError."""
    target = tmp_path / ("out.keras" if verb == "fuse" else "out")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [*COMMAND, verb, str(CNN), "-o", str(target), "--seconds", "0.5"][: None if verb == "deploy" else -2]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, env=environment, check=False)
    refused((done.returncode, done.stdout, done.stderr), "large")
    assert files(tmp_path) == set()


def heeds_ctrl_c() -> None:
    """A shell starts what it runs in the background with SIGINT ignored, and all its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [2.0, 6.0, 12.0])
def test_ctrl_c_leaves_nothing(tmp_path, after_s):
    target = tmp_path / "bundle"
    command = [*COMMAND, "deploy", str(CNN), "-o", str(target), "--seconds", "30"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heeds_ctrl_c
    )
    time.sleep(after_s)
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=60)
    assert (job.returncode, err) == (130, "interrupted\n")
    assert files(tmp_path) == set()


@pytest.mark.parametrize("raised", ["ValueError('x') from KeyboardInterrupt()", "RuntimeError('KeyboardInterrupt: ')"])
def test_ctrl_c_that_native_code_has_turned_into_an_error_is_still_ctrl_c(raised):
    script = f"""if True:
        from deploykit import cli
        def app(**options):
            raise {raised}
        cli.app = app
        cli.main(["inspect", "x"])"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_help_and_version_are_quick():
    """No TensorFlow: both answer in a small part of the time that importing TensorFlow takes."""

    def seconds(command):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - start

    tensorflow = seconds([sys.executable, "-c", "import tensorflow"])
    for flag in ("--help", "--version"):
        assert min(seconds([*COMMAND, flag]) for _ in range(3)) < tensorflow / 2


def test_the_launcher_works_from_a_checkout():
    done = subprocess.run([sys.executable, ROOT / "cli.py", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("deploykit ")


def test_weights_file_is_filled_in(cli, small, tmp_path):
    model = keras.models.load_model(small)
    model.get_layer("y").bias.assign(np.array([7, 8, 9], np.float32))
    model.save_weights(tmp_path / "w.weights.h5")
    cli("fuse", small, "--weights", tmp_path / "w.weights.h5", "-o", tmp_path / "f.keras", "-q")
    bias = graph.numpy(keras.models.load_model(tmp_path / "f.keras").get_layer("y").bias)
    np.testing.assert_array_equal(bias, [7, 8, 9])


def test_hdf5_is_read_whatever_its_extension(cli, small, tmp_path):
    keras.models.load_model(small).save(tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5") as file:
        assert "model_config" in file.attrs
    (tmp_path / "m.h5").rename(tmp_path / "m.model")
    assert cli("fuse", tmp_path / "m.model", "--dry-run", "-q")[0] == 0


OWN_LAYER = """
import keras

@keras.saving.register_keras_serializable("mine")
class Shifted(keras.layers.Layer):
    def call(self, x):
        return x + 1
"""


@pytest.mark.slow
def test_own_layers_go_all_the_way_when_given(cli, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(OWN_LAYER)
    make = (
        "import sys; sys.path.insert(0, sys.argv[1]); import keras, mine; L = keras.layers\n"
        "x = keras.Input((4,), name='x')\n"
        "keras.Model(x, mine.Shifted()(L.BatchNormalization()(L.Dense(3)(x)))).save(sys.argv[1] + '/m.keras')"
    )
    subprocess.run([sys.executable, "-c", make, str(tmp_path)], check=True, capture_output=True)
    given = ("--custom-objects", tmp_path / "mine.py")
    refused(cli("fuse", tmp_path / "m.keras"), "Shifted", "--custom-objects")
    assert cli("fuse", tmp_path / "m.keras", *given, "-q")[0] == 0
    assert cli("check", tmp_path / "m.keras", tmp_path / "m.fused.keras", *given, "-q")[0] == 0
    options = ("--seconds", "0.3", "--json", "-")
    code, out, err = cli("deploy", tmp_path / "m.keras", "-o", tmp_path / "b", *given, *options)
    assert code == 0, err
    assert not any(row["failed"] for row in json.loads(out)["bench"]["candidates"])


# ---------------------------------------------------------------------------- nothing that is there is lost


def test_a_report_replaces_a_file_only_by_force_and_never_an_input(cli, small, tmp_path):
    model = tmp_path / "m.keras"
    model.write_bytes(small.read_bytes())
    refused(cli("inspect", model, "--json", model), "exists")
    refused(cli("inspect", model, "--json", model, "--force"), "input")
    refused(cli("export", model, "-o", tmp_path / "x.onnx", "--json", tmp_path / "x.onnx"), "--json")
    assert model.read_bytes() == small.read_bytes()
    (tmp_path / "r.json").write_text("mine")
    refused(cli("inspect", model, "--json", tmp_path / "r.json"), "--force")
    assert cli("inspect", model, "--json", tmp_path / "r.json", "--force", "-q")[0] == 0


@pytest.mark.parametrize("verb", ["fuse", "export", "deploy"])
def test_force_never_replaces_the_model_itself(cli, small, tmp_path, verb):
    model = tmp_path / "m.keras"
    model.write_bytes(small.read_bytes())
    refused(cli(verb, model, "-o", model, "--force"), "input")
    assert model.read_bytes() == small.read_bytes()


def test_force_replaces_no_folder_but_a_bundle(cli, small, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years")
    refused(cli("deploy", small, "-o", tmp_path / "thesis", "--force"), "not a bundle")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "m.keras").write_bytes(small.read_bytes())
    refused(cli("deploy", tmp_path / "home" / "m.keras", "-o", tmp_path / "home", "--force"), "input")
    assert files(tmp_path) == {"thesis", "thesis/thesis.txt", "home", "home/m.keras"}


def test_two_outputs_in_one_place_are_refused_before_the_work(cli, small, tmp_path):
    source = tmp_path / "net.keras"
    source.write_bytes(small.read_bytes())
    here, out = tmp_path / "same.npz", tmp_path / "out"
    worst = ("check", source, source, "--worst-case", 5, "--save-worst", here)
    refused(cli(*worst, "--json", here), "--json", "--save-worst", "same file")
    refused(cli(*worst, "--html", here), "--html", "--save-worst", "same file")
    refused(cli("deploy", source, "-o", out, "--json", out / "deploykit.json"), "--json", "-o", "one inside the other")
    for verb, written in (("fuse", "net.fused.keras"), ("migrate", "net.migrated.keras"), ("export", "net.onnx")):
        refused(cli(verb, source, "--json", tmp_path / written), "--json", "-o", "same file")
    assert cli("fuse", source, "--dry-run", "--json", tmp_path / "net.fused.keras")[0] == 0  # no model is written
    assert files(tmp_path) == {"net.keras", "net.fused.keras"}


@pytest.mark.parametrize("option", ["--json", "--junit", "--markdown", "--html", "--save-worst", "-o"])
def test_no_output_replaces_what_is_read(cli, tmp_path, option):
    """Nothing here is a model: all of it is refused before anything is read."""
    bundle, images = tmp_path / "bundle", tmp_path / "images"
    bundle.mkdir()
    images.mkdir()
    read = [tmp_path / name for name in ("net.keras", "code.py", "layers.py", "net.weights.h5")]
    for path in (*read, bundle / "x.npz", images / "0.npz"):
        path.write_text("as it was")
    options = ("--custom-objects", f"{read[2]}:Thing", "--weights", read[3], "--force")
    verb = ("check", read[0], bundle) if option != "-o" else ("export", read[0])
    worst = ("--worst-case", 5) if option == "--save-worst" else ()
    inside = [images / "0.npz", images / "new.npz"] + [bundle / "x.npz"] * (option != "-o")
    single = [] if option == "--save-worst" else [read[2], read[3], read[0]]
    for target in (*inside, *single):
        refused(cli(*verb, "--data", images, *options, *worst, option, target), "would replace the input", str(target))
    if single:
        refused(cli(*verb, "--data", f"{read[1]}:made", *options, option, read[1]), "would replace the input")
    assert {path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {"as it was"}


OFF_A_BUNDLE = {
    "--runtime": "openvino-cpu", "--policy": "float16", "--rtol": 1, "--atol": 1, "--data": "x.npy", "--samples": 3,
    "--image-size": "7x7", "--scale": 0.5, "--custom-objects": "mine", "--weights": "w.h5", "--allow-code": None,
    "--seed": 0, "--layers": None, "--worst-case": 5, "--gradients": None,
}  # fmt: skip


@pytest.mark.parametrize("option", OFF_A_BUNDLE)
def test_a_bundle_alone_refuses_what_it_does_not_heed(cli, tmp_path, option):
    bundle = write_bundle(tmp_path / "bundle")
    value = OFF_A_BUNDLE[option]
    words = (f"error: {option} cannot", "check REFERENCE", "verify.py --provider")
    refused(cli("check", bundle, option, *([] if value is None else [value])), *words)


def test_a_bundle_alone_writes_every_report(cli, tmp_path):
    bundle = write_bundle(tmp_path / "bundle", source={"name": "net.keras"})
    kinds = {f"--{kind}": tmp_path / kind for kind in ("json", "junit", "markdown", "html")}
    asked = [part for pair in kinds.items() for part in pair]
    assert cli("check", bundle, "--quiet", "--verbose", *asked)[0] == 0
    assert cli("check", bundle, "--force", *asked)[0] == 0
    assert all(path.stat().st_size for path in kinds.values())
    refused(cli("check", bundle, "--worst-case", 5, "--save-worst", "x.npz"), "--worst-case, --save-worst cannot")


def test_pixel_options_without_pixels_are_refused(cli, small, tmp_path):
    np.save(tmp_path / "x.npy", np.ones((20, 6), np.float32))
    for verb in (["fuse", small, "--dry-run"], ["check", small, small], ["bench", small]):
        refused(cli(*verb, "--scale", 0.003), "--scale is for pixels", "without --data")
        refused(
            cli(*verb, "--data", tmp_path / "x.npy", "--image-size", "7x7"), "--image-size is for folders of images"
        )


def constant(path: Path) -> Path:
    x = keras.Input((4,), name="x")
    enliven(keras.Model(x, L.Rescaling(0.0, offset=5.0)(L.BatchNormalization()(L.Dense(3)(x))))).save(path)
    return path


def test_agreement_without_evidence_is_not_proven(cli, tmp_path):
    model = constant(tmp_path / "m.keras")
    code, out, err = cli("check", model, model, "--json", "-")
    assert code == 1
    assert json.loads(out)["proven"] is False
    assert "--data" in err


def test_a_failed_proof_still_leaves_a_machine_report(cli, tmp_path):
    code, out, _ = cli("fuse", constant(tmp_path / "m.keras"), "-o", tmp_path / "f.keras", "--json", "-")
    report = json.loads(out)
    assert code == 1
    assert report["proven"] is False
    assert report["reason"]
    assert set(report) >= COMMON_KEYS
    assert not (tmp_path / "f.keras").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["fuse", "{small}", "--seed", "-1"],
        ["export", "{small}", "--batch", "\u00b2"],
        ["fuse", "{small}", "-o", "model.h5"],
        ["inspect", "{small}", "--json", "."],
    ],
)
def test_more_bad_usage_is_one_line(cli, small, arguments):
    refused(cli(*[argument.format(small=small) for argument in arguments]))


def test_no_arguments_show_the_help():
    done = subprocess.run(COMMAND, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "deploy" in done.stdout


def test_an_export_without_evidence_is_not_written(cli, tmp_path):
    model = constant(tmp_path / "m.keras")
    code, out, err = cli("export", model, "--no-fuse", "-o", tmp_path / "m.onnx", "--json", "-")
    assert code == 1
    assert json.loads(out)["proven"] is False
    assert "--data" in err
    assert files(tmp_path) == {"m.keras"}


# ------------------------------------------------------------------------------------------- a check looks closer


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory) -> Path:
    """The small CNN of the repository as ONNX, right and with one wrong weight."""
    import onnx

    from deploykit.export import export
    from deploykit.load import load

    folder = tmp_path_factory.mktemp("spoilt")
    proto = onnx.load(export(load(CNN).model, folder / "right.onnx").path)
    weight = [one for one in proto.graph.initializer if len(one.dims) == 4][1]
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[5] *= 1.5
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(proto, folder / "wrong.onnx")
    return folder


def test_a_failed_check_names_the_layer(cli, spoilt, tmp_path):
    targets = {kind: tmp_path / f"report.{kind}" for kind in ("json", "junit", "markdown", "html")}
    options = [part for kind, path in targets.items() for part in (f"--{kind}", path)]
    code, out, err = cli("check", CNN, spoilt / "wrong.onnx", "--data", SAMPLE, "--samples", 40, *options)
    assert code == 1
    assert err.count("\n") == 1
    assert "the error jumps at down1_conv" in out
    report = json.loads(targets["json"].read_text())
    assert report["layers"]["first"] == "down1_conv"
    assert any(row["status"] == "jump" for row in report["layers"]["rows"])
    assert all(path.stat().st_size > 500 for path in targets.values())


def test_layers_worst_case_and_gradients_of_a_right_candidate(cli, spoilt, tmp_path):
    fused = tmp_path / "fused.keras"
    assert cli("fuse", CNN, "-o", fused)[0] == 0
    asked = ("--layers", "--worst-case", 30, "--save-worst", tmp_path / "worst.npz", "--gradients")
    files = (spoilt / "right.onnx", fused)
    code, out, _ = cli("check", CNN, *files, "--data", SAMPLE, "--samples", 40, *asked, "--json", tmp_path / "r.json")
    assert code == 0, out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["layers"]["first"] is None
    assert [part["passed"] for part in report["worst_case"]] == [True, True]
    assert [part["candidate"] for part in report["gradients"]] == [str(fused)]
    assert report["outputs_written"] == [str(tmp_path / "worst.npz")]
    cli("check", CNN, files[0], "--data", tmp_path / "worst.npz", "--json", tmp_path / "again.json")
    (replayed,) = json.loads((tmp_path / "again.json").read_text())["comparisons"]
    assert replayed["samples"] == 1  # it is judged: whether one sample alone is proof is another question
    assert replayed["outputs"][0]["snr_db"] > 100
    refused(cli("check", CNN, files[0], "--save-worst", tmp_path / "x.npz"), "--worst-case")
    refused(cli("check", CNN, files[0], "--gradients"), "a .keras file")


def test_a_policy_of_lower_precision_lets_rounded_weights_pass(cli, spoilt, tmp_path):
    import onnx

    proto = onnx.load(spoilt / "right.onnx")
    for weight in proto.graph.initializer:
        values = onnx.numpy_helper.to_array(weight)
        if values.dtype == np.float32:
            weight.CopyFrom(onnx.numpy_helper.from_array(values.astype("float16").astype("float32"), weight.name))
    onnx.save(proto, tmp_path / "rounded.onnx")
    data = ("--data", SAMPLE, "--samples", 64)
    assert cli("check", CNN, tmp_path / "rounded.onnx", *data)[0] == 1
    assert cli("check", CNN, tmp_path / "rounded.onnx", *data, "--policy", "float16")[0] == 0
    refused(cli("check", CNN, tmp_path / "rounded.onnx", "--policy", "float12"), "float16")
    refused(cli("check", CNN, tmp_path / "rounded.onnx", "--policy", "float16", "--rtol", "1"), "one or the other")
