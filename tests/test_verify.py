"""A bundle proves itself, and every change to it is caught: in process, and as the file a user runs."""

import ast
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from deploykit import verify
from deploykit.verify import Noise, RefusedError, read_tensor, seal, unseal, verify_bundle

CLASSES = ["T-shirt", "Füße", "bag"]


def weights():
    rng = np.random.default_rng(0)
    return rng.standard_normal((6, 8)).astype(np.float32), rng.standard_normal((8, 3)).astype(np.float32)


def network(dtype, x, w1, w2):
    h = np.maximum(x.astype(dtype) @ w1.astype(dtype), 0) @ w2.astype(dtype)
    e = np.exp(h - h.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def onnx_model(w1, w2, batch="n"):
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w2"], ["c"]),
        helper.make_node("Softmax", ["c"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [batch, s]) for n, s in (("x", 6), ("y", 3))]
    initial = [numpy_helper.from_array(w, name) for w, name in ((w1, "w1"), (w2, "w2"))]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], initial)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def tensor(array, name):
    return numpy_helper.from_array(array, name).SerializeToString()


def write_bundle(folder, change_weights=lambda w1, w2: (w1, w2), **changes):
    """A bundle of a small classifier; `changes` go into the manifest, `change_weights` into the ONNX file alone."""
    w1, w2 = weights()
    x = np.random.default_rng(1).standard_normal((16, 6)).astype(np.float32)
    reference, original = network(np.float64, x, w1, w2), network(np.float32, x, w1, w2)
    stored = reference.astype(np.float32)
    golden = folder / "test_data_set_0"
    golden.mkdir(parents=True)
    (golden / "input_0.pb").write_bytes(tensor(x, "x"))
    (golden / "output_0.pb").write_bytes(tensor(stored, "y"))
    (folder / "model.onnx").write_bytes(onnx_model(*change_weights(w1, w2)).SerializeToString())
    shutil.copy(verify.__file__, folder / "verify.py")
    manifest = {
        "schema": "deploykit.bundle/1",
        "model": "model.onnx",
        "policy": "float32",
        "class_names": CLASSES,
        "signature": {
            "inputs": [{"name": "x", "shape": [None, 6], "dtype": "float32", "low": -9, "high": 9}],
            "outputs": [{"name": "y", "shape": [None, 3], "dtype": "float32"}],
        },
        "golden": [
            {
                "folder": "test_data_set_0",
                "inputs": ["input_0.pb"],
                "outputs": ["output_0.pb"],
                "noise": {"y": Noise.between(stored, original).to_json()},
                "reference": "float64",
            }
        ],
    }
    reseal(folder, {**manifest, **changes})
    return folder


def reseal(folder, manifest):
    """Write the manifest over the files as they are now: what a careful forger, or a bug in the writer, would do."""
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != "deploykit.json"]
    files = {name: record((folder / name).read_bytes()) for name in names}
    (folder / "deploykit.json").write_bytes(seal({"files": files, **manifest}))


def record(data):
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle")


def command(folder, *arguments, flags=(), **options):
    """The bundle's own verify.py, as a user runs it."""
    line = [sys.executable, *flags, str(folder / "verify.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, **options)


def refused(capsys, folder, *arguments):
    """The one line of a refusal."""
    code = verify.main([*map(str, arguments)], str(folder))
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert re.fullmatch(r"error: [^\n]+\n", err)
    return err


# ---- a good bundle ---------------------------------------------------------------------------------------------


def test_a_good_bundle_proves_itself_from_the_command_line(bundle):
    done = command(bundle, "--seconds", 0.05)
    assert (done.returncode, done.stderr) == (0, "")
    assert "PROVEN" in done.stdout
    assert re.search(r"^y +16 +\d+\.\d +\d+\.\d +\S+ +pass$", done.stdout, re.M)
    assert re.search(r"^latency, batch 1: median [\d.]+", done.stdout, re.M)
    assert re.search(r"^latency, batch 16: median [\d.]+", done.stdout, re.M)


def test_the_report_is_strict_json_and_alone_on_stdout(bundle):
    done = command(bundle, "--seconds", 0.05, "--json", "-", flags=["-O"])
    report = json.loads(done.stdout, parse_constant=pytest.fail)
    assert done.stderr == ""
    assert (report["schema"], report["passed"], report["proven"]) == ("deploykit.verify/1", True, True)
    (comparison,) = report["comparisons"]
    assert (comparison["passed"], comparison["samples"], comparison["outputs"][0]["name"]) == (True, 16, "y")
    keys = "name passed snr_db reference_snr_db max_abs max_rel cosine top1_agreement smallest_rtol smallest_atol"
    assert set(f"{keys} worst_sample worst_index reason".split()) <= set(comparison["outputs"][0])
    assert [latency["batch"] for latency in report["latency_ms"]] == [1, 16]
    assert report["environment"]["provider"] == "CPUExecutionProvider"


def test_the_function_gives_the_same_report(bundle):
    report = verify_bundle(bundle, threads=1, seconds=0)
    assert report["proven"]
    assert report["latency_ms"] == []
    assert report["environment"]["threads"] == 1


def test_importing_costs_numpy_and_nothing_else():
    code = (
        "import sys, deploykit.verify; print(sorted({'onnxruntime', 'keras', 'tensorflow', 'onnx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_file_stands_alone_and_reads_as_python_39():
    tree = ast.parse(Path(verify.__file__).read_text(encoding="utf-8"), feature_version=(3, 9))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert imported - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]  # -O would drop it


# ---- not equivalent: exit 1 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("-O",)])
def test_a_wrong_weight_in_a_well_sealed_bundle_is_not_equivalent(tmp_path, flags):
    folder = write_bundle(tmp_path / "b", lambda w1, w2: (w1 * np.float32(1.001), w2))
    done = command(folder, "--seconds", 0, flags=flags)
    assert (done.returncode, done.stderr) == (1, "")
    assert "NOT EQUIVALENT" in done.stdout
    assert re.search(r"^FAIL test_data_set_0 y: whole output: .*worst: sample \d+", done.stdout, re.M)


UNPROVEN = {
    "no golden data": ({"golden": []}, "nothing was compared"),
    "tight tolerance": ({"policy": {"rtol": 1e-12}}, "not equivalent"),
}


@pytest.mark.parametrize(("changes", "reason"), UNPROVEN.values(), ids=UNPROVEN.keys())
def test_what_is_not_shown_fails(tmp_path, changes, reason, capsys):
    folder = write_bundle(tmp_path / "b", **changes)
    assert verify.main(["--json", "-"], str(folder)) == 1
    report = json.loads(capsys.readouterr().out)
    assert reason in report["reason"]
    assert (report["passed"], report["proven"], report["latency_ms"]) == (False, False, [])


def test_a_tolerance_replaces_the_policy(tmp_path):
    assert verify_bundle(write_bundle(tmp_path / "b", policy={"atol": 1e-5, "rtol": None}), seconds=0)["passed"]


def changed(folder, edit):
    manifest = unseal((folder / "deploykit.json").read_bytes())
    edit(manifest)
    del manifest["files"]
    reseal(folder, manifest)
    return folder


def test_a_float32_reference_passes_but_proves_nothing(bundle):
    changed(bundle, lambda m: m["golden"][0].update(reference="float32"))
    report = verify_bundle(bundle, seconds=0)
    assert (report["passed"], report["proven"], report["reference"]) == (True, False, "float32")
    assert "no proof" in report["reason"]


def test_renamed_outputs_fail(bundle):
    (bundle / "test_data_set_0/output_0.pb").write_bytes(tensor(np.zeros((16, 3), np.float32), ""))

    def rename(manifest):
        manifest["signature"]["outputs"][0]["name"] = "z"
        manifest["golden"][0]["noise"] = {"z": manifest["golden"][0]["noise"]["y"]}

    (comparison,) = verify_bundle(changed(bundle, rename), seconds=0)["comparisons"]
    assert {o["name"]: o["reason"] for o in comparison["outputs"]} == {
        "z": "missing from the candidate",
        "y": "not an output of the reference",
    }


def test_golden_data_that_the_model_cannot_run_fails(bundle):
    (bundle / "test_data_set_0/input_0.pb").write_bytes(tensor(np.zeros((16, 7), np.float32), "x"))
    report = verify_bundle(changed(bundle, lambda m: None), seconds=0)
    assert not report["passed"]
    assert "does not run" in report["comparisons"][0]["reason"]


def test_excluded_and_insensitive_outputs_are_noticed(bundle):
    def spoil(manifest):
        noise = manifest["golden"][0]["noise"]["y"]
        noise["l2"][0] = noise["max"][0] = None

    assert verify_bundle(changed(bundle, spoil), seconds=0)["notices"] == [
        "output y: 1 samples excluded from judgement"
    ]


# ---- tampering: exit 2 -----------------------------------------------------------------------------------------


FILES = ["model.onnx", "verify.py", "test_data_set_0/input_0.pb", "test_data_set_0/output_0.pb"]


@pytest.mark.parametrize("name", FILES)
def test_a_changed_or_missing_file_is_named(bundle, name, capsys):
    path = bundle / name
    data = path.read_bytes()
    for damaged in (data[:-1], data + b"\n", data[:9] + bytes([data[9] ^ 1]) + data[10:]):
        path.write_bytes(damaged)
        assert f"{name} was changed" in refused(capsys, bundle)
    path.unlink()
    assert f"{name} cannot be read" in refused(capsys, bundle)


def test_the_seal_catches_any_changed_byte():
    data = seal({"b": [1, 2.5, None, True], "a": {"ü": "x"}, "seal": "whatever"})
    assert unseal(data)["a"] == {"ü": "x"}
    for at in range(len(data)):
        for bit in range(8):
            with pytest.raises(RefusedError):
                unseal(data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :])


HOSTILE = [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"seal": 3}', b'{"seal": NaN}', b"9" * 5000]


@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_manifest_is_one_line(bundle, data, capsys):
    (bundle / "deploykit.json").write_bytes(data)
    assert "deploykit.json" in refused(capsys, bundle)


def test_the_seal_is_canonical():
    data = seal({"b": 1, "a": 2})
    assert data == seal({"a": 2, "b": 1, "seal": "old"})
    for other in (data[:-1], data + b"\n", data.replace(b"\n", b"\r\n"), data.replace(b'"a": 2', b'"a":  2')):
        with pytest.raises(RefusedError):
            unseal(other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, np.float32(1)])
def test_only_strict_json_is_sealed(value):
    with pytest.raises(RefusedError, match="strict JSON"):
        seal({"a": value})


MALFORMED = {
    "schema": (lambda m: m.update(schema="deploykit.bundle/9"), "schema 'deploykit.bundle/9'"),
    "files": (lambda m: m.update(files=[]), "lacks 'files'"),
    "model gone": (lambda m: m["files"].pop("model.onnx"), "model.onnx is not among the files"),
    "verify gone": (lambda m: m["files"].pop("verify.py"), "verify.py is not among the files"),
    "data gone": (lambda m: m["files"].pop("test_data_set_0/input_0.pb"), "input_0.pb is not among the files"),
    "leave": (lambda m: m["files"].update({"../x": {}}), "'../x', which is no path inside"),
    "absolute": (lambda m: m["files"].update({"/etc/passwd": {}}), "which is no path inside"),
    "windows": (lambda m: m["files"].update({"..\\x": {}}), "which is no path inside"),
    "nul": (lambda m: m["files"].update({"a\0b": {}}), "which is no path inside"),
    "dot": (lambda m: m["files"].update({"./verify.py": {}}), "which is no path inside"),
    "record": (lambda m: m["files"].update({"model.onnx": 7}), "lacks 'sha256'"),
    "policy": (lambda m: m.update(policy="int3"), "unknown policy 'int3'"),
    "no policy": (lambda m: m.pop("policy"), "unknown policy None"),
    "empty policy": (lambda m: m.update(policy={}), "unknown policy {}"),
    "tolerance": (lambda m: m.update(policy={"rtol": -1}), "rtol is -1"),
    "no golden": (lambda m: m.pop("golden"), "lacks 'golden'"),
    "golden type": (lambda m: m.update(golden=[3]), "golden[0] lacks 'folder'"),
    "golden count": (lambda m: m["golden"][0].update(inputs=[]), "0 inputs, the signature 1"),
    "golden name": (lambda m: m["golden"][0].update(inputs=["output_0.pb"]), "holds 'y', the signature says 'x'"),
    "reference": (lambda m: m["golden"][0].update(reference="float8"), "'float8' is neither"),
    "no noise": (lambda m: m["golden"][0].pop("noise"), "lacks 'noise'"),
    "noise of y": (lambda m: m["golden"][0].update(noise={}), "noise record must be"),
    "short noise": (lambda m: m["golden"][0].update(noise={"y": {"l2": [0], "max": [0]}}), "1 samples, the data 16"),
    "signature": (lambda m: m.update(signature=None), "lacks 'signature'"),
    "shape": (lambda m: m["signature"]["inputs"][0].update(shape=["n"]), "is no shape"),
    "dtype": (lambda m: m["signature"]["inputs"][0].update(dtype="f99"), "unknown dtype 'f99'"),
    "twice": (lambda m: m["signature"].update(inputs=m["signature"]["inputs"] * 2), "names one tensor twice"),
    "source": (lambda m: m.update(source="abc"), "source in deploykit.json lacks 'name'"),
    "source name": (lambda m: m.update(source={"name": 3}), "source in deploykit.json lacks 'name'"),
    "half a character": (lambda m: m["files"].update({"a\ud800": {}}), "'a\\ud800', which is no path inside"),
    "huge tolerance": (lambda m: m.update(policy={"rtol": 10**400}), "rtol is 1000"),
    "huge noise": (lambda m: m["golden"][0]["noise"]["y"].update(l2=[10**400] * 16), "noise record must be"),
    "huge channel": (lambda m: m["golden"][0]["noise"]["y"].update(channels=[10**400] * 3), "channels of a noise"),
    "size": (lambda m: m["signature"]["inputs"][0].update(shape=[True, 6]), "is no shape"),
    "range": (lambda m: m["signature"]["inputs"][0].update(low="-9"), "low is '-9', no number"),
    "input name": (
        lambda m: (m["signature"]["inputs"][0].update(name="q"), m["golden"][0].update(inputs=["nameless.pb"])),
        "has inputs ['x'], the signature ['q']",
    ),
}


@pytest.mark.parametrize(("edit", "reason"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_but_sealed_manifest_is_one_line(bundle, edit, reason, capsys):
    (bundle / "test_data_set_0/nameless.pb").write_bytes(tensor(np.zeros((1, 6), np.float32), ""))
    changed(bundle, lambda m: None)
    manifest = unseal((bundle / "deploykit.json").read_bytes())
    edit(manifest)
    (bundle / "deploykit.json").write_bytes(seal(manifest))
    assert reason in refused(capsys, bundle)


def test_a_link_out_of_the_bundle_is_refused(bundle, tmp_path, capsys):
    outside = tmp_path / "model.onnx"
    (bundle / "model.onnx").rename(outside)
    (bundle / "model.onnx").symlink_to(outside)
    assert "leads out of the bundle" in refused(capsys, bundle)


def test_weights_beside_the_model_must_be_sealed_and_strangers_are_noticed(bundle, capsys):
    (bundle / "notes.txt").write_text("x")
    assert verify_bundle(bundle, seconds=0)["notices"] == ["not covered by the manifest: notes.txt"]
    (bundle / "model.onnx.data").write_text("x")
    assert "model.onnx.data is not among the files" in refused(capsys, bundle)


# ---- usage and components: exit 2 ------------------------------------------------------------------------------


USAGE = [
    (["--seconds", "-1"], "seconds is -1.0"),
    (["--seconds", "nan"], "seconds is nan"),
    (["--seconds", "x"], "invalid float value"),
    (["--threads", "0"], "threads is 0"),
    (["--threads", "x"], "invalid int value"),
    (["--provider", "cuda"], "provider 'cuda' is not in this onnxruntime; it has "),
    (["--provider", "nonsense"], "provider 'nonsense' is not in this onnxruntime"),
    (["--what"], "unrecognized arguments"),
    (["--json"], "expected one argument"),
    (["--output", "x.npz"], "--output needs --predict"),
    (["--predict", "absent/x.npy"], "absent/x.npy cannot be read"),
    (["--json", "absent/x.json"], "absent/x.json cannot be written"),
]


@pytest.mark.parametrize(("arguments", "reason"), USAGE)
def test_bad_usage_is_one_line(bundle, arguments, reason, capsys, monkeypatch):
    monkeypatch.chdir(bundle)
    if "cuda" in arguments and "CUDAExecutionProvider" in __import__("onnxruntime").get_available_providers():
        pytest.skip("this machine has CUDA")
    assert reason in refused(capsys, bundle, *arguments)


def test_a_provider_that_takes_no_node_is_no_proof(bundle, capsys):
    import onnxruntime

    if "AzureExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs a provider that accepts everything and runs nothing")
    assert "would run on CPUExecutionProvider" in refused(capsys, bundle, "--provider", "AzureExecutionProvider")


@pytest.mark.parametrize("name", ["cpu", "CPU", "CPUExecutionProvider", "cpuexecutionprovider"])
def test_providers_go_by_short_and_long_names(bundle, name):
    assert verify_bundle(bundle, provider=name, seconds=0)["proven"]


def test_a_folder_that_is_no_bundle_is_one_line(tmp_path, capsys):
    assert "no readable deploykit.json" in refused(capsys, tmp_path)


def test_a_model_that_does_not_load_is_one_line(bundle, capsys):
    (bundle / "model.onnx").write_bytes(b"not a model")
    changed(bundle, lambda m: m.update(oldest_onnxruntime="9.9"))
    assert "cannot load model.onnx; it needs onnxruntime 9.9 or later" in refused(capsys, bundle)


def test_missing_components_are_named(bundle, tmp_path):
    bare = command(bundle, flags=["-S"])
    assert bare.returncode == 2
    assert bare.stderr == "error: numpy is not installed; run: pip install numpy onnxruntime\n"
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('no such module')")
    done = command(bundle, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: onnxruntime cannot be imported [^\n]*pip install onnxruntime\n", done.stderr)


def test_help_works_anywhere(tmp_path):
    shutil.copy(verify.__file__, tmp_path / "verify.py")
    done = command(tmp_path, "--help")
    assert done.returncode == 0
    assert "exit codes" in done.stdout


def test_a_reader_that_leaves_is_no_traceback(bundle):
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    done = subprocess.run(
        [sys.executable, str(bundle / "verify.py"), "--seconds", "0"],
        stdout=reader.stdin,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    with contextlib.suppress(BrokenPipeError):
        reader.stdin.close()
    assert done.stderr == ""


# ---- fixed memory on the device --------------------------------------------------------------------------------


def bound_to(model, inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session, verify.Bound(session, "cpu", inputs)


def elementwise(operator, kind):
    x, y = (helper.make_tensor_value_info(name, kind, ["n", 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"])], "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT64])
def test_a_bound_run_is_the_same_run_bit_for_bit(kind):
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    first, second = (np.random.default_rng(i).normal(0, 99, (4, 3)).astype(dtype) for i in (1, 2))
    session, bound = bound_to(elementwise("Abs", kind), {"x": first})
    seen = bound.from_device()
    for values in (first, second):
        bound.to_device({"x": values})
        bound.run()
        (wanted,) = session.run(["y"], {"x": values})
        assert bound.from_device()["y"].tobytes() == wanted.tobytes()
        assert bound.from_device()["y"].dtype == wanted.dtype
    assert seen["y"].tobytes() == session.run(["y"], {"x": first})[0].tobytes()  # a copy, made at the first run
    assert first.tobytes() != second.tobytes()  # the caller's own memory was not written to


def test_a_net_is_the_same_when_bound():
    x = np.random.default_rng(3).standard_normal((16, 6)).astype(np.float32)
    session, bound = bound_to(onnx_model(*weights()), {"x": np.zeros_like(x)})
    bound.to_device({"x": x[::-1]})  # not contiguous
    bound.run()
    assert bound.from_device()["y"].tobytes() == session.run(["y"], {"x": x[::-1].copy()})[0].tobytes()


MISFITS = {
    "dtype": {"x": np.ones((4, 3), np.float64)},
    "half the bytes": {"x": np.ones((4, 3), np.float16)},
    "shape of the same size": {"x": np.ones((3, 4), np.float32)},
    "batch": {"x": np.ones((5, 3), np.float32)},
    "name": {"z": np.ones((4, 3), np.float32)},
    "none": {},
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_the_bound_memory_is_refused(case):
    _, bound = bound_to(elementwise("Abs", TensorProto.FLOAT), {"x": np.ones((4, 3), np.float32)})
    with pytest.raises(RefusedError, match=r"do not fit what was bound.*bind them anew"):
        bound.to_device(MISFITS[case])
    assert np.array_equal(bound.from_device()["y"], np.ones((4, 3)))


def test_what_cannot_be_bound_is_raised():
    """ONNX Runtime has no device memory for strings."""
    with pytest.raises(RuntimeError, match="non-string"):
        bound_to(elementwise("Identity", TensorProto.STRING), {"x": np.full((1, 3), "a", object)})


def test_a_session_takes_options_on_top(bundle):
    opened = verify.Session(verify.open_bundle(bundle), "cpu", None, {"use_tf32": "1"})
    assert opened.environment()["provider_options"] == {"use_tf32": "1"}
    assert verify.PROVIDERS["cpu"] == ("CPUExecutionProvider", {})
    x = np.zeros((2, 6), np.float32)
    assert opened.bound({"x": x}).from_device()["y"].tobytes() == opened.run({"x": x})["y"].tobytes()


# ---- reports and predictions -----------------------------------------------------------------------------------


def test_the_report_file_is_replaced_only_with_force(bundle, tmp_path, capsys):
    target = tmp_path / "report.json"
    assert verify.main(["--seconds", "0", "--json", str(target)], str(bundle)) == 0
    assert json.loads(target.read_text())["proven"]
    assert "PROVEN" in capsys.readouterr().out
    assert "exists already" in refused(capsys, bundle, "--json", target)
    assert verify.main(["--seconds", "0", "--json", str(target), "--force"], str(bundle)) == 0
    capsys.readouterr()
    assert "belongs to the bundle" in refused(capsys, bundle, "--json", bundle / "model.onnx", "--force")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "report.json"]


def test_one_file_is_not_two_outputs_nor_the_data(bundle, tmp_path, capsys):
    data = user_data(tmp_path / "x.npy", np.zeros((2, 6), np.float32))
    before = data.read_bytes()
    asked = ("--predict", data, "--output", tmp_path / "s.npz")
    assert "name the same file" in refused(capsys, bundle, *asked, "--json", tmp_path / "." / "s.npz")
    assert "what --predict reads" in refused(capsys, bundle, *asked, "--json", data, "--force")
    assert "what --predict reads" in refused(capsys, bundle, "--predict", data, "--output", data, "--force")
    assert (data.read_bytes(), (tmp_path / "s.npz").exists()) == (before, False)


def user_data(path, array):
    (np.savez if path.suffix == ".npz" else np.save)(
        path, **({"x": array} if path.suffix == ".npz" else {"arr": array})
    )
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8])
def test_predict_runs_the_proven_model_on_user_data(bundle, tmp_path, suffix, dtype, capsys):
    x = np.random.default_rng(5).uniform(0, 9, (13, 6)).astype(dtype)
    data, out = user_data(tmp_path / f"x{suffix}", x), tmp_path / "y.npz"
    assert verify.main(["--predict", str(data), "--output", str(out)], str(bundle)) == 0
    right = network(np.float64, x.astype(np.float32), *weights())
    with np.load(out, allow_pickle=False) as answers:
        assert np.allclose(answers["y"], right, atol=1e-6)
    text = capsys.readouterr().out
    top = int(np.argmax(right[0]))
    assert f"  sample 0: class {top} {CLASSES[top]} (" in text
    assert "... and 3 more samples" in text


UNFIT = [
    (np.zeros((2, 7), np.float32), "input x has shape [2, 7]; the model wants [any, 6]"),
    (np.zeros(6, np.float32), "input x has shape [6]"),
    (np.zeros((0, 6), np.float32), "input x has shape [0, 6]"),
    (np.full((1, 6), 1e300), "float64 that float32 cannot hold"),
    (np.full((1, 6), "a"), "that float32 cannot hold"),
    (np.array([[{}] * 6]), "without pickles"),
]


@pytest.mark.parametrize(("array", "reason"), UNFIT)
def test_data_that_does_not_fit_is_one_line(bundle, tmp_path, array, reason, capsys):
    assert reason in refused(capsys, bundle, "--predict", user_data(tmp_path / "x.npy", array))


@pytest.mark.parametrize("data", [b"", b"PK\3\4 broken", b"\x93NUMPY\x01\x00", b"1,2,3"])
def test_a_damaged_data_file_is_one_line(bundle, tmp_path, data, capsys):
    (tmp_path / "x.npz").write_bytes(data)
    assert "cannot be read as .npy or .npz" in refused(capsys, bundle, "--predict", tmp_path / "x.npz")


def test_archives_need_the_inputs_names(bundle, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", image=np.zeros((1, 6)))
    assert "exactly the arrays x" in refused(capsys, bundle, "--predict", tmp_path / "x.npz")


def test_values_out_of_range_are_noticed(bundle, tmp_path, capsys):
    data = user_data(tmp_path / "x.npy", np.full((1, 6), 255.0))
    assert verify.main(["--predict", str(data)], str(bundle)) == 0
    assert "notice: input x holds values from 255 to 255; the model expects -9 to 9" in capsys.readouterr().out


def test_an_unproven_model_predicts_nothing(tmp_path, capsys):
    folder = write_bundle(tmp_path / "b", lambda w1, w2: (w1, -w2))
    data = user_data(tmp_path / "x.npy", np.zeros((1, 6)))
    assert verify.main(["--predict", str(data), "--output", str(tmp_path / "y.npz")], str(folder)) == 1
    assert not (tmp_path / "y.npz").exists()
    assert "sample 0: class" not in capsys.readouterr().out


def test_floats_are_never_cut_to_integers(bundle):
    spec = {"name": "i", "shape": [None], "dtype": "int32"}
    assert verify._fitted(spec, np.array([1, 2], np.int64), []).dtype == np.int32
    for array in (np.array([1.0, 2.0]), np.array([2**40])):
        with pytest.raises(RefusedError, match="cannot hold"):
            verify._fitted(spec, array, [])


def test_any_output_name_can_be_written(tmp_path):
    (tmp_path / "y.npz").write_bytes(verify.archive({"file": np.ones(2), "a/b": np.array(["x"], object)}))
    with np.load(tmp_path / "y.npz", allow_pickle=False) as answers:
        assert answers["file"].tolist() == [1, 1]
        assert answers["a/b"].tolist() == ["x"]


def test_class_names_survive_a_narrow_terminal(bundle, tmp_path):
    data = user_data(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((10, 6)))
    done = command(bundle, "--predict", data, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")


# ---- tensors ---------------------------------------------------------------------------------------------------


DTYPES = ["float32", "float64", "float16", "bool", *(f"{u}int{b}" for u in ("", "u") for b in (8, 16, 32, 64))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0, 4), (2, 1, 200)])
def test_tensors_read_as_onnx_reads_them(dtype, shape):
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    data = tensor(array, "ü/name:0")
    name, value = read_tensor(data)
    theirs = numpy_helper.to_array(onnx.TensorProto.FromString(data))
    assert name == "ü/name:0"
    assert (value.dtype, value.shape, value.tolist()) == (theirs.dtype, theirs.shape, theirs.tolist())


def test_unpacked_dims_and_unknown_fields_are_read():
    raw = np.arange(6, dtype=np.float32).tobytes()
    data = b"\x0a\x02\x02\x03" + b"\x10\x01" + b"\x4a\x18" + raw  # packed dims, as proto3 writers may send them
    assert read_tensor(data)[1].shape == (2, 3)
    assert read_tensor(b"\x08\x02\x08\x03\x10\x01\x4a\x18" + raw + b"\x98\x06\x07")[1].shape == (2, 3)


OTHERS = [
    helper.make_tensor("t", TensorProto.FLOAT, [2], [1.0, 2.0]),
    helper.make_tensor("t", TensorProto.STRING, [1], [b"x"]),
    helper.make_tensor("t", TensorProto.BFLOAT16, [1], b"\0\0", raw=True),
    helper.make_tensor("t", TensorProto.COMPLEX64, [1], [1j]),
    TensorProto(data_type=1, dims=[2], raw_data=b"\0" * 7),
    TensorProto(data_type=1, dims=[-1], raw_data=b""),
    TensorProto(data_type=1, dims=[2**40, 2**40], raw_data=b"\0" * 8),
    TensorProto(data_type=1, dims=[1] * 65, raw_data=b"\0" * 4),
    TensorProto(data_type=9, dims=[2], raw_data=b"\1\2"),
    TensorProto(data_type=1, dims=[0, -4], raw_data=b""),
]


@pytest.mark.parametrize("proto", OTHERS, ids=range(len(OTHERS)))
def test_other_tensors_are_refused_in_one_line(proto):
    with pytest.raises(RefusedError) as caught:
        read_tensor(proto.SerializeToString())
    assert "\n" not in str(caught.value)


def test_every_truncation_of_a_tensor_is_refused():
    data = tensor(np.arange(6, dtype=np.float32).reshape(2, 3), "name")
    for end in range(len(data)):
        with pytest.raises(RefusedError):
            read_tensor(data[:end])
    with pytest.raises(RefusedError, match="ends too early"):
        read_tensor(data + b"\x9a\x06\x05abc")  # an unknown field, cut


@settings(max_examples=500, deadline=None)
@given(data=st.binary(max_size=60), at=st.integers(0, 40), value=st.integers(0, 255))
def test_hostile_tensor_bytes_never_raise_anything_else(data, at, value):
    good = tensor(np.arange(6, dtype=np.float32), "name")
    for candidate in (data, good[:at] + bytes([value]) + good[at + 1 :], good[:at] + data):
        with contextlib.suppress(RefusedError):
            read_tensor(candidate)
