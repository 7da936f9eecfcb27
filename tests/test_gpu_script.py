"""benchmarks/gpu.py with the host's memory: the same code as on a GPU, from a bundle alone."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_verify import changed, write_bundle

from deploykit.verify import import_onnxruntime

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.py"
VARIANTS = ["TF32 off", "CUDA graph", "TF32 on"]


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("benchmark_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("good") / "net")


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """A bundle whose weights are not those that the golden data came from."""
    return write_bundle(tmp_path_factory.mktemp("bad") / "wrong", lambda w1, w2: (w1 * 1.001, w2))


@pytest.fixture
def main(gpu, capfd):
    """Exit code, stdout, stderr."""

    def run(*arguments):
        capfd.readouterr()
        return gpu.main([*map(str, arguments)]), *capfd.readouterr()

    return run


# ------------------------------------------------------------------------------------------------- from a bundle alone


@pytest.fixture(scope="module")
def alone(bundle, tmp_path_factory):
    """The script beside nothing, where deploykit, onnx, TensorFlow and Keras cannot be imported."""
    folder = tmp_path_factory.mktemp("target")
    for name in ("deploykit", "onnx", "tensorflow", "keras"):
        (folder / f"{name}.py").write_text("raise ImportError('not on this machine')")
    script = shutil.copy(SCRIPT, folder / "gpu.py")
    done = subprocess.run(
        [sys.executable, script, bundle, "--provider", "cpu", "--batches", "3", "--rounds", "6", "--json", "out.json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "NVIDIA_TF32_OVERRIDE": "7", "PYTHONDONTWRITEBYTECODE": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads((folder / "out.json").read_text()), done.stdout


def test_every_variant_is_proven_and_timed(alone):
    report, _ = alone
    assert report["schema"] == "deploykit.gpu/1"
    assert [row["variant"] for row in report["proofs"]] == VARIANTS
    assert [(row["passed"], row["failed"], row["snr_db"] > 100) for row in report["proofs"]] == [(True, None, True)] * 3
    assert report["proofs"][0]["verify"]["proven"]
    assert {row["NVIDIA_TF32_OVERRIDE"] for row in report["proofs"]} == {None}  # the shell's did not reach them
    assert [(row["variant"], row["batch"], row["failed"]) for row in report["timings"]] == [
        (v, 3, None) for v in VARIANTS
    ]


def test_every_time_has_its_rounds_and_the_ratios_follow_from_them(alone, gpu, bundle):
    report, _ = alone
    verify = gpu.verifier(str(bundle))
    first = report["timings"][0]["samples_s"]
    for row in report["timings"]:
        assert list(row["samples_s"]) == list(gpu.TIMES)
        assert all(len(rounds) == 6 for rounds in row["samples_s"].values())
        assert all(len(block) == 5 for block in row["samples_s"]["to_device"])
        assert row["latency_ms"]["median"] == row["ms"]["device"]
        assert row["end_to_end_ratio"] == gpu.ratio(row["samples_s"]["end_to_end"], first["device"], verify)
        low, high = row["end_to_end_ratio"]["ci95"]
        assert low <= row["end_to_end_ratio"]["value"] <= high
    assert report["timings"][0]["ratio"] is None
    same = gpu.ratio(first["device"], first["device"], verify)
    assert same == {"value": 1.0, "ci95": [1.0, 1.0]}


def test_the_markdown_has_what_the_report_has(alone):
    report, text = alone
    assert text.startswith("### net, CPUExecutionProvider\n")
    assert report["environment"]["packages"]["onnxruntime"] in text
    for row in report["timings"]:
        numbers = [f"{row['ms'][name]:.3f}" for name in ("device", "to_device", "from_device", "end_to_end")]
        (line,) = [line for line in text.splitlines() if line.startswith(f"| 3 | {row['variant']} |")]
        assert [cell for cell in line.split(" | ") if re.fullmatch(r"\d+\.\d{3}", cell)] == numbers
    assert text.count("| pass (float32) |") == 2
    assert "| TF32 on | pass, for information (float32) |" in text
    assert text.endswith("\nProven.\n")


def test_the_bundle_stays_as_it_is(alone, bundle):
    assert sorted(path.name for path in bundle.iterdir()) == [
        *("deploykit.json", "model.onnx", "test_data_set_0", "verify.py"),
    ]


# ----------------------------------------------------------------------------------------------------------- verdicts


def test_a_wrong_model_is_exit_1_and_is_not_timed(main, gpu, wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "variants", lambda provider, bundles: [gpu.Variant("TF32 off", bundles[0], None)])
    code, out, err = main(wrong, "--provider", "cpu", "--json", tmp_path / "o.json")
    assert code == 1
    assert re.fullmatch(r"error: TF32 off: [^\n]+\n", err)
    assert "| TF32 off | FAIL (float32) |" in out
    report = json.loads((tmp_path / "o.json").read_text())
    assert (report["passed"], report["timings"]) == (False, [])


CANNOT, WRONG, RIGHT = (
    {"passed": False, "failed": "no kernel"},
    {"passed": False, "failed": None},
    {"passed": True, "failed": None},
)
DECIDES = {
    "all is right": ({}, RIGHT, False),
    "TF32 fails": ({"counts": False}, WRONG, False),
    "TF32 cannot run": ({"counts": False}, CANNOT, False),
    "a graph answers wrongly": ({"graph": True}, WRONG, True),
    "a graph cannot be recorded": ({"graph": True}, CANNOT, False),
    "float16 fails": ({}, WRONG, True),
    "float16 cannot run": ({}, CANNOT, True),
}


@pytest.mark.parametrize("case", DECIDES)
def test_which_proofs_decide(gpu, case):
    more, row, fails = DECIDES[case]
    wanted = [gpu.Variant("first", "b", None), gpu.Variant("second", "b", None, **more)]
    assert gpu.failures(wanted, [RIGHT, row]) == ([row] if fails else [])


def test_tf32_alone_does_not_decide(gpu):
    for provider in gpu.PROVIDERS:
        wanted = gpu.variants(provider, ["a", "b"])
        assert [variant.name for variant in wanted if not variant.counts] == ["TF32 on"]
        assert [variant.name for variant in wanted if variant.graph] == ["CUDA graph"]
        assert [variant.bundle for variant in wanted] == ["a", "a", "a", "b"]


def test_a_variant_that_cannot_run_is_a_row(main, gpu, bundle, monkeypatch):
    second = gpu.Variant("second", "absent", None, graph=True)
    monkeypatch.setattr(gpu, "variants", lambda *given: [gpu.Variant("first", str(bundle), None), second])
    code, out, _ = main(bundle, "--provider", "cpu", "--rounds", "0")
    assert code == 0
    assert "| second | cannot run |  |  | absent holds no verify.py" in out


def test_the_bundles_own_verdict_decides_too_and_what_its_code_prints_is_no_answer(gpu, bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    with (copy / "verify.py").open("a") as stream:
        stream.write("os.write(1, b'chatter\\n')\n")
        stream.write("verify_bundle = lambda *given: {'passed': False, 'proven': False, 'reason': 'by arrays'}\n")
    changed(copy, lambda manifest: None)
    (row,) = gpu.prove([gpu.Variant("first", str(copy), None)], "cpu")
    assert (row["passed"], row["failed"], row["reason"], row["snr_db"] > 100) == (False, None, "by arrays", True)


def test_a_process_that_dies_is_a_row_and_the_others_are_timed(gpu, bundle, tmp_path):
    dying = tmp_path / "dying"
    shutil.copytree(bundle, dying)
    (dying / "verify.py").write_text("import os, sys; print('out of memory', file=sys.stderr, flush=True); os._exit(3)")
    wanted = [gpu.Variant("good", str(bundle), None), gpu.Variant("dying", str(dying), None)]
    good, dead = gpu.time_all(wanted, "cpu", 2, 2, gpu.verifier(str(bundle)))
    assert dead == {
        "variant": "dying",
        "batch": 2,
        "failed": "its process ended with code 3: out of memory",
    }
    assert len(good["samples_s"]["device"]) == 2
    assert good["end_to_end_ratio"]["ci95"] is None  # two rounds are too few


def test_a_replay_of_old_values_does_not_pass(gpu, bundle, monkeypatch):
    """What a graph that was recorded on other memory would do: the run answers for the values it saw first."""
    worker = gpu.Worker(str(bundle), "cpu", {}, True)
    assert worker.prove()["passed"]
    monkeypatch.setattr(worker.verify.Bound, "to_device", lambda bound, inputs: None)
    assert not worker.prove()["passed"]


def test_a_graphs_way_from_arrays_to_arrays_leads_through_its_memory(gpu, bundle, monkeypatch):
    monkeypatch.setattr(gpu, "WARM_S", 0.01)
    answers = {}
    for graph in (False, True):
        worker = gpu.Worker(str(bundle), "cpu", {}, graph)
        worker.open(2)
        answers[graph] = worker.whole(worker.feed)["y"]
        assert (worker.whole == worker._through) == graph
        assert len(worker.feed["x"]) == 2
    assert answers[False].tobytes() == answers[True].tobytes()


@pytest.mark.parametrize(("provider", "off", "on"), [("cuda", None, None), ("tensorrt", "0", "1"), ("cpu", None, None)])
def test_the_shells_tf32_does_not_reach_a_variant(gpu, monkeypatch, provider, off, on):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "7")
    for variant in gpu.variants(provider, ["a", "b"]):
        found = gpu.variables(variant)
        assert found.get("NVIDIA_TF32_OVERRIDE") == (on if variant.name == "TF32 on" else off)
        assert found["PATH"] == os.environ["PATH"]


# ----------------------------------------------------------------------------------------------------------- refusals

REFUSALS = {
    "no bundle": (["absent"], "absent holds no verify.py"),
    "batches": (["net", "--batches", "1,x"], "--batches is '1,x'"),
    "batch 0": (["net", "--batches", "0"], "--batches is '0'"),
    "rounds": (["net", "--rounds", "-1"], "--rounds is -1"),
    "provider": (["net", "--provider", "tpu"], "invalid choice: 'tpu'"),
    "existing": (["net", "--json", "there.json"], "there.json exists already"),
    "folder": (["net", "--json", "absent/x.json"], "absent/x.json cannot be written"),
    "old": (["old"], "is older than I/O binding; write the bundle again"),
    "damaged": (["net", "damaged", "--provider", "cpu"], "model.onnx"),
    "cuda": (["net"], "provider 'cuda' is not in this onnxruntime"),
    "tensorrt": (["net", "--provider", "tensorrt"], "provider 'tensorrt' is not in this onnxruntime"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_is_one_line(main, bundle, tmp_path, monkeypatch, case):
    arguments, reason = REFUSALS[case]
    if case in ("cuda", "tensorrt") and "CUDAExecutionProvider" in import_onnxruntime().get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    monkeypatch.chdir(tmp_path)
    for name in ("net", "old", "damaged"):
        shutil.copytree(bundle, name)
    Path("there.json").write_text("precious")
    Path("old/verify.py").write_text("")
    with Path("damaged/model.onnx").open("ab") as stream:
        stream.write(b"x")
    code, out, err = main(*arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", err)
    assert reason in err
    assert Path("there.json").read_text() == "precious"


def test_a_fixed_batch_is_the_only_one(gpu):
    assert gpu._batches("1,8,8", None) == [1, 8]
    assert gpu._batches("1,8", 4) == [4]


def test_bundles_that_do_not_belong_together_are_refused(bundle, main, tmp_path):
    half = changed(write_bundle(tmp_path / "half"), lambda manifest: manifest.update(policy="float16"))
    stranger = {"name": "other.keras", "sha256": "0" * 64, "saved_by": None}
    other = changed(write_bundle(tmp_path / "other"), lambda manifest: manifest.update(source=stranger))
    for pair, said in (((half, bundle), "give the float32 one first"), ((bundle, other), "another model")):
        code, out, err = main(*pair, "--provider", "cpu", "--rounds", "0")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert said in err
    code, _, err = main(bundle, bundle, "--provider", "cpu", "--rounds", "0")
    assert code == 2
    assert "--precision fp16" in err


def test_no_file_of_a_bundle_is_replaced(bundle, main):
    before = (bundle / "deploykit.json").read_bytes()
    code, _, err = main(bundle, "--provider", "cpu", "--json", bundle / "deploykit.json", "--force")
    assert (code, "belongs to the bundle" in err) == (2, True)
    assert (bundle / "deploykit.json").read_bytes() == before


def test_a_damaged_script_in_a_bundle_is_one_line(main, tmp_path):
    folder = write_bundle(tmp_path / "b")
    (folder / "verify.py").write_text("def broken(:\n")
    code, out, err = main(folder, "--provider", "cpu")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "verify.py is damaged (SyntaxError)" in err
