"""The main job, on the models of this repository: bundles that prove themselves, and notice every change."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from deploykit import load, verify
from deploykit.bench import BenchReport, Timing
from deploykit.bench import Candidate as Timed
from deploykit.deploy import (
    LOWERED,
    OURS,
    PLAIN,
    Checked,
    DataOptions,
    Spare,
    _faster,
    deploy,
    export_checked,
    samples_for,
)
from deploykit.errors import InputError, OutputError, ProofError
from deploykit.export import Exported, lowering
from deploykit.report import strict
from deploykit.signature import Signature

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
SAMPLE = DataOptions(data=str(MODELS / "fashion_sample.npz"))
BN = {"mlp_bn_after": 3, "mlp_bn_before": 2, "fashion_cnn": 8, "fashion_cnn_8": 8}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The bundle of fashion_cnn and its report."""
    folder = tmp_path_factory.mktemp("deploy") / "fashion_cnn"
    report = deploy(load(MODELS / "fashion_cnn.keras"), folder, data=SAMPLE, seconds=0.2, processes=1).to_json()
    return folder, report


def copy_of(bundle, tmp_path) -> Path:
    return Path(shutil.copytree(bundle[0], tmp_path / "copy"))


def verified(folder: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    command = [python, str(folder / "verify.py"), "--seconds", "0.2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", BN)
def test_every_model_of_the_repository_deploys_with_all_its_bn_fused(name, tmp_path):
    report = deploy(load(MODELS / f"{name}.keras"), tmp_path / "b", data=SAMPLE, seconds=0.2, processes=1).to_json()
    affines = report["fuse"]["affines"]["by_kind"]["BatchNormalization"]
    assert affines == {"total": BN[name], "fused": BN[name], "reduced": 0, "kept": 0}
    assert report["fuse"]["exactness_f64"] <= report["fuse"]["exactness_bound"]
    assert report["check"]["passed"]
    assert report["proven"]
    assert verified(tmp_path / "b").returncode == 0


def test_the_report_keeps_its_contract(bundle):
    folder, report = bundle
    assert report["schema"] == "deploykit.deploy/1"
    assert {"fuse", "check", "bench", "bundle", "environment", "seconds", "notices"} <= set(report)
    assert json.loads((folder / "report.json").read_text())["fuse"] == report["fuse"]
    assert strict(report) == report
    names = [candidate["name"] for candidate in report["bench"]["candidates"]]
    keras = ["Keras (tf.function)", "fused Keras (tf.function)"]
    assert names == [*keras, "stock export", "deploykit, not lowered", "deploykit, on OpenVINO", "deploykit"]
    assert not any(candidate["failed"] for candidate in report["bench"]["candidates"])
    assert {candidate["processes"] for candidate in report["bench"]["candidates"]} == {1}  # as the fixture asked
    pairs = [{c["a"], c["b"]} for c in report["bench"]["comparisons"]]
    assert {"Keras (tf.function)", "deploykit"} in pairs
    assert {"stock export", "deploykit"} in pairs
    accuracies = {report["check"]["reference_accuracy"], *(c["accuracy"] for c in report["check"]["comparisons"])}
    assert len(accuracies) == 1


def test_the_runtimes_that_passed_are_timed_and_one_is_recommended(bundle):
    folder, report = bundle
    (other,) = report["recommended"]["others"]
    assert (other["runtime"], other["passed"]) == ("openvino", True)
    assert "deploykit, on OpenVINO" in {row["name"] for row in report["bench"]["candidates"]}
    best = report["recommended"]["runtime"]
    assert best == ("openvino" if other["verdict"] == "faster" else "onnxruntime-cpu")
    assert json.loads((folder / "deploykit.json").read_text())["recommended"] == best
    for card in ("README.md", "report.html"):
        assert "astest runtime" in (folder / card).read_text()


def test_everything_the_report_lists_was_written(bundle):
    _, report = bundle
    assert all(Path(path).exists() for path in report["outputs_written"])
    listed = {Path(path).name for path in report["outputs_written"]}
    assert {path.name for path in bundle[0].iterdir()} == listed


def test_verify_proves_the_bundle(bundle):
    done = verified(bundle[0], "--json", "-")
    report = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert report["passed"]
    assert {comparison["samples"] for comparison in report["comparisons"]} == {32, 1}


def test_verify_sends_nothing_home(bundle, tmp_path):
    """ONNX Runtime's telemetry leaves a device id and a session file; with it off there are none."""
    environment = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PATH": os.environ["PATH"]}
    command = [sys.executable, str(bundle[0] / "verify.py"), "--seconds", "0.2"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert list(tmp_path.rglob("*")) == []


def test_onnx_reads_the_golden_data(bundle):
    folder, _ = bundle
    tensor = onnx.load_tensor(folder / "test_data_set_0" / "output_0.pb")
    assert tensor.name == "class"
    assert onnx.numpy_helper.to_array(tensor).shape == (32, 10)


def every_file(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_any_changed_byte_makes_verify_fail(bundle, tmp_path):
    """One byte of every file, at its start, middle and end; judged by verify.py's own code."""
    folder = copy_of(bundle, tmp_path)
    for name in every_file(folder):
        path = folder / name
        original = path.read_bytes()
        for place in (0, len(original) // 2, len(original) - 1):
            changed = bytearray(original)
            changed[place] ^= 1
            path.write_bytes(changed)
            with pytest.raises(verify.RefusedError):
                verify.open_bundle(folder)
        path.write_bytes(original)
    verify.open_bundle(folder)


@pytest.mark.parametrize("name", ["model.onnx", "deploykit.json", "verify.py", "test_data_set_0/output_0.pb"])
def test_a_changed_file_ends_the_script_with_an_error(bundle, tmp_path, name):
    folder = copy_of(bundle, tmp_path)
    path = folder / name
    path.write_bytes(path.read_bytes() + b"\n")
    done = verified(folder)
    assert done.returncode != 0
    assert "error" in done.stderr.lower()
    assert "Traceback" not in done.stderr


def resealed(folder: Path) -> None:
    """Seal the folder again, as somebody would who wants a wrong model to pass."""
    manifest = verify.unseal((folder / "deploykit.json").read_bytes())
    from deploykit.files import sha256

    for name in manifest["files"]:
        path = folder / name
        manifest["files"][name] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    (folder / "deploykit.json").write_bytes(verify.seal(manifest))


def test_a_wrong_weight_fails_the_proof_even_with_right_hashes(bundle, tmp_path):
    folder = copy_of(bundle, tmp_path)
    model = onnx.load(folder / "model.onnx")
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[7] += 0.02
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, folder / "model.onnx")
    resealed(folder)
    done = verified(folder)
    assert done.returncode == 1, done.stderr


def test_check_reads_a_bundle_without_tensorflow(bundle):
    script = (
        "import sys; from deploykit.cli import main\n"
        "try: main(['check', sys.argv[1], '-q'])\n"
        "except SystemExit as end: code = end.code\n"
        "sys.exit(code or 10 * ('tensorflow' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script, str(bundle[0])], check=False).returncode == 0


@pytest.mark.slow
def without_its_relus(model) -> int:
    """A lowering that is wrong."""
    nodes = [node for node in model.graph if node.op_type == "Relu"]
    for node in nodes:
        node.op_type = "Identity"
    return len(nodes)


def test_a_lowering_that_goes_wrong_is_left_out_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(lowering, "LOWERINGS", (lowering.Lowering("wrong", without_its_relus),))
    loaded = load(MODELS / "mlp_bn_after.keras")
    made = export_checked(loaded, tmp_path / "net.onnx", samples=samples_for(loaded.model, SAMPLE, 64))
    assert made.refused is None
    assert made.exported.lowered == {}
    assert any(notice.startswith("without lowering, because") for notice in made.notices)
    assert "Relu" in {node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node}


def test_what_lowering_made_slower_is_not_shipped(bundle, tmp_path):
    """On measurements that are made up: the lowered file takes twice as long, or as long."""
    folder, _ = bundle
    for factor, name in ((2.0, "spare.onnx"), (1.0, "model.onnx")):
        shutil.copyfile(folder / "model.onnx", tmp_path / "spare.onnx")
        exported = Exported(folder / "model.onnx", 18, Signature((), ()), 1, (), False, lowered={"pads": 1})
        spare = Spare(tmp_path / "spare.onnx", {"passed": "spare"})
        made = Checked(None, exported, None, {"passed": "lowered"}, [], [], [], spare)
        rounds = tuple((1.0 + 0.001 * i,) for i in range(12))
        slow = tuple((factor * sample,) for (sample,) in rounds)
        timings = [
            Timing(Timed(each, "x.onnx", "onnxruntime-cpu"), 1, 1, {"x": (1, 2)}, 1, (seen,) * 7)
            for each, seen in (("stock", rounds), (PLAIN, rounds), (OURS, slow))
        ]
        shipped, measured = _faster(made, BenchReport(tuple(timings)))
        assert shipped.exported.path.name == name
        assert shipped.check["passed"] == ("spare" if factor == 2 else "lowered")
        assert shipped.exported.lowered == ({} if factor == 2 else {"pads": 1})
        names = [timing.candidate.name for timing in measured.timings]
        assert names == (["stock", LOWERED, OURS] if factor == 2 else ["stock", PLAIN, OURS])
        assert measured.timing(OURS).medians_s[0] == 1.0  # that of the file which is shipped
        assert bool(made.notices) == (factor == 2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The bundle of a net without any affine, its session tuned, and the report."""
    import keras

    folder = tmp_path_factory.mktemp("plain")
    x = keras.Input((5,), name="x")
    keras.Model(x, keras.layers.Dense(3, name="y")(x)).save(folder / "plain.keras")
    quick = {"threads": 1, "seconds": 0.1, "processes": 1}
    return folder / "b", deploy(load(folder / "plain.keras"), folder / "b", tune_session=True, **quick).to_json()


def test_a_model_without_any_affine_passes_through(plain):
    folder, report = plain
    assert report["fuse"]["affines"]["total"] == 0
    assert report["proven"]
    assert verified(folder).returncode == 0


def test_a_deployment_tunes_the_session_on_request(plain):
    folder, report = plain
    session, kept = report["session"], verify.open_bundle(folder).profile
    names = [trial["name"] for trial in session["tried"]]
    assert names == ["threads 1, denormals as zero", "threads 1, no CPU arena"]
    assert (kept is not None) == session["chosen"]
    assert kept is None or kept.settings.to_json() == session["profile"]
    assert session["measured"]["proof"] == "golden data"
    assert report["recommended"] == {"runtime": "onnxruntime-cpu", "others": []}  # others would meet the tuned session


def test_a_failed_check_writes_nothing_and_carries_its_report(tmp_path):
    """A tolerance that nothing meets stands in for a wrong model."""
    from deploykit.compare import policy_from

    with pytest.raises(ProofError, match="nothing was written") as caught:
        deploy(load(MODELS / "mlp_bn_before.keras"), tmp_path / "b", data=SAMPLE, policy=policy_from(atol=1e-12))
    assert caught.value.report.to_json()["check"]["passed"] is False
    assert list(tmp_path.iterdir()) == []


def test_an_existing_bundle_is_replaced_only_by_force(bundle, tmp_path):
    with pytest.raises(OutputError, match="--force"):
        deploy(load(MODELS / "mlp_bn_before.keras"), bundle[0], data=SAMPLE)


@pytest.mark.slow
def test_a_fixed_batch_goes_all_the_way(tmp_path):
    report = deploy(
        load(MODELS / "mlp_bn_before.keras"), tmp_path / "b", data=SAMPLE, batch=4, seconds=0.2, processes=1
    ).to_json()
    assert report["signature"]["inputs"][0]["shape"] == [4, 28, 28]
    assert verified(tmp_path / "b").returncode == 0


def test_too_few_samples_for_a_fixed_batch_is_refused(tmp_path):
    few = DataOptions(data=SAMPLE.data, limit=3)
    with pytest.raises(InputError, match="batch of 4"):
        deploy(load(MODELS / "mlp_bn_before.keras"), tmp_path / "b", data=few, batch=4)


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory) -> str:
    """An interpreter whose environment holds nothing but numpy and onnxruntime (and what that needs)."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "numpy", "onnxruntime"]
    subprocess.run(install, check=True, capture_output=True)
    return python


@pytest.mark.slow
def test_verify_needs_nothing_but_numpy_and_onnxruntime(bundle, bare_python):
    listed = subprocess.run([bare_python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert not any(name in listed for name in ("tensorflow", "keras", "onnx ", "tf2onnx"))
    done = verified(bundle[0], python=bare_python)
    assert (done.returncode, done.stderr) == (0, "")


# --------------------------------------------------------------------------- real files that other people trained

# BatchNormalization fused; None: not all of it. fast_srgan_generator.h5 would take two minutes: 16 times the pixels
REAL = {
    "eegnet_tfkeras224.h5": 3,
    "mlperf_tiny_kws_savedmodel": 9,
    "mlperf_tiny_resnet.h5": 7,
    "mltk_kws_mobilenetv2.h5": 52,
    "rapidtide_cnn_keras222.h5": 15,
    "rapidtide_cnn_tfkeras219.keras": 12,
    "resnet1d_keras36.keras": None,
    "tiny_xception_kdef.hdf5": 14,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_trained_files_deploy(name, shared_models, tmp_path):
    data = DataOptions(limit=16)
    report = deploy(load(shared_models / name), tmp_path / "b", data=data, seconds=0.2, processes=1).to_json()
    affines = report["fuse"]["affines"]
    assert affines["total"] > 0
    assert all(d["code"] and d["reason"] for d in report["fuse"]["decisions"])
    assert REAL[name] is None or affines["by_kind"]["BatchNormalization"]["fused"] == REAL[name]
    assert report["proven"]
    assert verified(tmp_path / "b").returncode == 0
