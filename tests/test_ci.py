"""`deploykit ci`: the configuration refused or carried out as a whole, one report, and the exit code."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_verify import write_bundle

from deploykit.ci import CHECK_KEYS, LATENCY_KEYS, _carry_out, _error, read_config, run
from deploykit.errors import InputError, ProofError
from deploykit.gates import judged

ROOT = Path(__file__).resolve().parent.parent
SOURCE = {"source": {"name": "net.keras"}}


def onnx_mlp(path, weights, factor=1.0):
    """Dense layers with ReLU between as an ONNX file; ``factor`` makes its last kernel wrong."""
    nodes, constants, tensor = [], [], "x"
    for number, (kernel, bias) in enumerate(weights):
        last = number == len(weights) - 1
        kernel = kernel * np.float32(factor if last else 1)
        constants += [numpy_helper.from_array(kernel, f"k{number}"), numpy_helper.from_array(bias, f"b{number}")]
        nodes.append(helper.make_node("Gemm", [tensor, f"k{number}", f"b{number}"], ["y" if last else f"d{number}"]))
        if not last:
            nodes.append(helper.make_node("Relu", [f"d{number}"], [f"r{number}"]))
        tensor = f"r{number}"
    sizes = (("x", weights[0][0].shape[0]), ("y", weights[-1][0].shape[1]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in sizes]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def random_mlp(*sizes):
    rng = np.random.default_rng(0)
    pairs = itertools.pairwise(sizes)
    return [(rng.normal(0, i**-0.5, (i, o)).astype("f"), rng.normal(size=o).astype("f")) for i, o in pairs]


def keras_net(folder):
    """A small live net as net.keras, right.onnx, and wrong.onnx, which is off by one percent."""
    import keras
    from nets import chain

    model = chain((6,), keras.layers.Dense(5, activation="relu"), keras.layers.Dense(3, name="y"), seed=3)
    model.save(folder / "net.keras")
    weights = [(layer.get_weights()[0], layer.get_weights()[1]) for layer in model.layers[1:]]
    onnx_mlp(folder / "right.onnx", weights)
    onnx_mlp(folder / "wrong.onnx", weights, 1.01)
    np.savez(folder / "x.npz", x=np.random.default_rng(1).normal(size=(20, 6)).astype("f"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything a configuration may name: a net with a right and a wrong candidate, bundles, a slow file."""
    folder = tmp_path_factory.mktemp("project")
    keras_net(folder)
    write_bundle(folder / "dist" / "good", **SOURCE)
    (folder / "dist" / "wheel.whl").touch()
    changed = write_bundle(folder / "changed", **SOURCE)
    with open(changed / "model.onnx", "ab") as stream:
        stream.write(b"x")
    write_bundle(folder / "worse", lambda w1, w2: (w1 * 1.01, w2), **SOURCE)
    onnx_mlp(folder / "slow.onnx", random_mlp(6, 2000, 2000, 3))
    return folder


def config(folder, text, name="pyproject.toml"):
    path = folder / name
    path.write_text(text)
    return path


CHECK = '[[tool.deploykit.check]]\nreference = "net.keras"\ncandidates = ["right.onnx"]\n'
LATENCY = '[[tool.deploykit.latency]]\ncandidate = "right.onnx"\nbaseline = "slow.onnx"\nmax-slowdown = 1.1\n'


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[tool.other]", "no table [tool.deploykit]"),
        ("tool = 1", "no table [tool.deploykit]"),
        ("[tool]\ndeploykit = 1", "no table [tool.deploykit]"),
        ("[tool.deploykit", "is no TOML"),
        ("[tool.deploykit]", "asks for nothing"),
        ("[tool.deploykit]\nbundles = []", "bundles is []"),
        ("[tool.deploykit]\nbundles = 'dist/*'", "bundles is 'dist/*'; give a list"),
        ("[tool.deploykit]\nbundles = [1]", "bundles is [1]"),
        ("[tool.deploykit]\nbundles = ['none/*']", "no bundle is found by 'none/*'"),
        ("[tool.deploykit]\nbundles = ['dist/*.whl']", "no bundle is found by 'dist/*.whl'"),
        ("[tool.deploykit]\nbundles = ['dist/*', 'none']", "no bundle is found by 'none'"),
        ("[tool.deploykit]\nchecks = []", "unknown key 'checks'; did you mean 'check'?"),
        ("[tool.deploykit.check]\nreference = 'net.keras'", "give an array of tables, [[tool.deploykit.check]]"),
        ("[tool.deploykit]\ncheck = []", "check is []"),
        ("[[tool.deploykit.check]]\nreference = 'net.keras'", "number 1 lacks 'candidates'"),
        (CHECK + "tolerance = 1", "unknown key 'tolerance'; known are reference, candidates"),
        (CHECK + "sample = 1", "unknown key 'sample'; did you mean 'samples'?"),
        (CHECK.replace("net.keras", "no.keras"), "there is no"),
        (CHECK.replace("right.onnx", "no.onnx"), "no.onnx"),
        (CHECK.replace("net.keras", "a" * 5000), "there is no"),
        (CHECK + f"data = '{'a' * 5000}'", "data: there is no"),
        (CHECK.replace('["right.onnx"]', '"right.onnx"'), "candidates is 'right.onnx'; give a list of paths"),
        (CHECK.replace('["right.onnx"]', "[]"), "candidates is []"),
        (CHECK + "data = 'no.npz'", "data: there is no"),
        (CHECK + "samples = 0", "samples is 0; give a whole number from 1 on"),
        (CHECK + "samples = true", "samples is True"),
        (CHECK + "samples = 1.5", "samples is 1.5"),
        (CHECK + "seed = -1", "seed is -1"),
        (CHECK + "seed = false", "seed is False"),
        (CHECK + f"rtol = {10**400}", "rtol is 1000"),
        (LATENCY + f"seconds = {10**400}", "seconds is 1000"),
        (CHECK + "rtol = -1.0", "rtol is -1.0"),
        (CHECK + "atol = nan", "atol is nan"),
        (CHECK + "atol = '1'", "atol is '1'"),
        (CHECK + "scale = 0", "scale is 0"),
        (CHECK + "policy = 'float33'", "policy is 'float33'; give one of float32"),
        (CHECK + "policy = 'float32'\natol = 1.0", "either policy or rtol and atol"),
        (CHECK + "runtime = 'abacus'", "runtime is 'abacus'; give one of keras"),
        (CHECK + "runtime = 1", "runtime is 1"),
        (CHECK + "image-size = '10'", "image-size is '10'"),
        (CHECK + "image-size = '0x10'", "image-size is '0x10'"),
        (CHECK + "weights = 'no.h5'", "weights: there is no"),
        (CHECK + "allow-code = 'yes'", "allow-code is 'yes'; give true or false"),
        (CHECK + "custom-objects = ['no.py:Layer']", "custom-objects: there is no"),
        (CHECK + CHECK.replace("net.keras", "no.keras"), "number 2: reference"),
        (LATENCY.replace("1.1", "0"), "max-slowdown is 0"),
        (LATENCY.replace("1.1", "inf"), "max-slowdown is inf"),
        (LATENCY.replace("max-slowdown = 1.1\n", ""), "lacks 'max-slowdown'"),
        (LATENCY.replace("slow.onnx", "./right.onnx"), "both candidate and baseline"),
        (LATENCY + "strict = 1", "strict is 1"),
        (LATENCY + "seconds = 0", "seconds is 0"),
        (LATENCY + "batch = 0", "batch is 0"),
    ],
)
def test_a_configuration_that_is_wrong_is_refused_in_one_line(folder, text, words):
    with pytest.raises(InputError) as refused:
        read_config(config(folder, text, "wrong.toml"))
    assert words in str(refused.value)
    assert "wrong.toml" in str(refused.value)


def test_a_configuration_that_is_not_there_is_refused(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("ci", "--json", "report.json")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: cannot read pyproject.toml .*\n", err)
    assert list(tmp_path.iterdir()) == []


def test_every_key_of_the_tables_is_read(folder):
    (folder / "layers.py").touch()
    rest = "samples = 3\nimage-size = '4x5'\nscale = 0.5\nseed = 7\nruntime = 'onnxruntime-cpu'\ndata = 'x.npz'\n"
    (job,) = read_config(
        config(
            folder,
            CHECK + rest + "rtol = 1e-3\natol = 0\nweights = 'x.npz'\nallow-code = true\n"
            "custom-objects = ['layers.py:Mine', 'package.module']",
        )
    ).checks
    assert job.candidates == (str(folder / "right.onnx"),)
    assert job.custom_objects == (f"{folder / 'layers.py'}:Mine", "package.module")
    assert (job.samples, job.image_size, job.scale, job.seed, job.rtol, job.atol) == (3, "4x5", 0.5, 7, 1e-3, 0)
    assert (job.data, job.weights, job.allow_code) == (str(folder / "x.npz"), str(folder / "x.npz"), True)
    (gate,) = read_config(config(folder, LATENCY + rest + "strict = true\nbatch = 8\nthreads = 1\nseconds = 2")).latency
    assert (gate.max_slowdown, gate.strict, gate.batch, gate.threads, gate.seconds) == (1.1, True, 8, 1, 2)


@pytest.mark.parametrize("data", ["fashion_mnist", "package.module:samples"])
def test_data_may_be_a_name(folder, data):
    assert read_config(config(folder, f"{CHECK}data = '{data}'")).checks[0].data == data


def test_a_file_that_gives_data_is_found_beside_the_configuration(folder):
    (folder / "given.py").write_text("def samples(signature): ...\n", encoding="utf-8")
    job = read_config(config(folder, f"{CHECK}data = 'given.py:samples'")).checks[0]
    assert job.data == f"{folder / 'given.py'}:samples"


def test_a_pattern_finds_bundles_and_passes_over_other_files(folder):
    found = read_config(config(folder, '[tool.deploykit]\nbundles = ["dist/*", "dist/good"]')).bundles
    assert found == (str(folder / "dist" / "good"),)


# ------------------------------------------------------------------------------------------------------- the gate


@pytest.mark.parametrize(
    ("interval", "limit", "strict", "outcome"),
    [
        ([0.9, 1.05], 1.1, False, "passed"),
        ([0.9, 1.1], 1.1, False, "passed"),
        ([1.0, 1.2], 1.1, False, "undecided"),
        ([1.1, 1.2], 1.1, False, "undecided"),
        ([1.0, 1.2], 1.1, True, "failed"),
        ([1.11, 1.2], 1.1, False, "failed"),
        ([0.9, 1.05], 1.1, True, "passed"),
        (None, 1.1, False, "undecided"),
        (None, 1.1, True, "failed"),
        ([0.3, 0.4], 0.5, False, "passed"),
    ],
)
def test_a_gate_fails_only_where_the_whole_interval_is_beyond(interval, limit, strict, outcome):
    found, reason = judged(interval, limit, strict=strict)
    assert found == outcome
    assert (reason is None) == (outcome == "passed")


# ----------------------------------------------------------------------------------------------------- everything


def test_one_failure_stops_nothing_and_one_report_has_all(cli, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    text = (
        '[tool.deploykit]\nbundles = ["changed", "dist/*"]\n'
        + CHECK.replace("right.onnx", "wrong.onnx")
        + CHECK
        + "data = 'x.npz'\n"
        + LATENCY
        + "seconds = 0.1\n"
        + LATENCY.replace("right.onnx", "z").replace("slow.onnx", "right.onnx").replace("z", "slow.onnx")
        + "seconds = 0.1\n"
    )
    files = {kind: tmp_path / f"report.{kind}" for kind in ("junit", "markdown", "html")}
    options = [part for kind, path in files.items() for part in (f"--{kind}", path)]
    code, out, err = cli("ci", "--config", config(folder, text), "--json", "-", *options)
    assert code == 1
    report = json.loads(out)
    assert report["schema"] == "deploykit.ci/1"
    assert (report["passed"], report["proven"]) == (False, False)
    outcomes = {part: [entry["outcome"] for entry in report[part]] for part in ("checks", "latency", "bundles")}
    assert outcomes == {"checks": ["failed", "passed"], "latency": ["passed", "failed"], "bundles": ["error", "passed"]}
    assert report["checks"][1]["data"].startswith("20 samples")
    assert report["checks"][1]["proven"]
    assert report["latency"][1]["ci95"][0] > 1.1
    assert {"environment", "seconds", "notices", "outputs_written", "model"} <= set(report)
    lines = err.strip().split("\n")
    assert sum(line.startswith("::error title=") for line in lines) == 3
    assert lines[-1].startswith(f"error: 3 of 6 did not pass; {folder / 'net.keras'}: ")
    assert ET.parse(files["junit"]).getroot().get("failures") == "2"
    assert (tmp_path / "summary.md").read_text() == files["markdown"].read_text() + "\n"
    assert "3 of 6 cases failed" in files["html"].read_text()


def test_what_cannot_be_carried_out_is_two_and_what_is_wrong_is_one(folder):
    changed = config(folder, '[tool.deploykit]\nbundles = ["changed", "dist/*"]')
    assert isinstance(run(read_config(changed)).error, InputError)
    worse = config(folder, '[tool.deploykit]\nbundles = ["changed", "worse"]')
    assert isinstance(run(read_config(worse)).error, ProofError)
    good = config(folder, '[tool.deploykit]\nbundles = ["dist/*"]')
    finished = run(read_config(good))
    assert finished.error is None
    assert finished.report.proven


def test_a_damaged_model_is_an_error_of_its_check_alone(folder, tmp_path):
    (tmp_path / "net.keras").write_bytes(b"no model")
    (tmp_path / "right.onnx").write_bytes(b"no model")
    write_bundle(tmp_path / "good")
    finished = run(read_config(config(tmp_path, '[tool.deploykit]\nbundles = ["good"]\n' + CHECK)))
    record = finished.report.to_json()
    assert [entry["outcome"] for entry in (*record["checks"], *record["bundles"])] == ["error", "passed"]
    assert isinstance(finished.error, InputError)
    assert "net.keras" in str(finished.error)


def test_what_nobody_foresaw_stops_nothing_and_is_raised_at_the_end():
    errors = []
    found = _carry_out([0, 2], lambda n: {"outcome": "passed", "value": 1 / n}, lambda n: {"model": n}, print, errors)
    assert [entry["outcome"] for entry in found] == ["error", "passed"]
    assert "internal error, please report it: ZeroDivisionError" in found[0]["reason"]
    assert _error(found, "reason", errors) is errors[0]
    assert isinstance(_error([{"outcome": "failed"}, *found], "reason", errors), ProofError)


@pytest.mark.parametrize("option", ["--json", "--junit", "--markdown", "--html"])
def test_no_report_replaces_what_is_read(cli, folder, option):
    before = (folder / "net.keras").read_bytes()
    code, _, err = cli("ci", "--config", config(folder, CHECK), option, folder / "net.keras", "--force")
    assert (code, "would replace the input" in err) == (2, True)
    assert (folder / "net.keras").read_bytes() == before


@pytest.mark.parametrize("target", ["code.py", "layers.py", "dist/good/verify.py", "dist/good/new.json", "net.keras"])
def test_no_report_replaces_code_or_a_part_of_a_bundle(cli, folder, target):
    for name in ("code.py", "layers.py"):
        (folder / name).write_text("")
    text = CHECK + "data = 'code.py:made'\ncustom-objects = ['layers.py:Thing']\n"
    path = config(folder, f"[tool.deploykit]\nbundles = ['dist/good']\n{text}")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for option in ("--json", "--junit"):
        code, _, err = cli("ci", "--config", path, option, folder / target, "--force")
        assert (code, "would replace the input" in err) == (2, True), err
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("keys", ["scale = 0.5", "image-size = '4x5'", "data = 'x.npz'\nscale = 0.5"])
def test_pixels_are_asked_for_only_where_there_are_some(folder, keys):
    finished = run(read_config(config(folder, CHECK + keys)))
    assert isinstance(finished.error, InputError)
    assert f"--{keys.splitlines()[-1].partition(' ')[0]} is for" in str(finished.error)


def test_the_own_tolerance_of_a_check_counts(folder):
    text = CHECK.replace("right.onnx", "wrong.onnx") + "data = 'x.npz'\n"
    assert run(read_config(config(folder, text + "atol = 0.5"))).error is None
    assert isinstance(run(read_config(config(folder, text + "rtol = 1e-3"))).error, ProofError)


# ------------------------------------------------------------------------------------------------------ the check


def test_check_writes_junit_and_markdown(cli, folder, tmp_path):
    files = tmp_path / "r.xml", tmp_path / "r.md"
    code, out, _ = cli(
        "check", folder / "net.keras", folder / "wrong.onnx", "--junit", files[0], "--markdown", files[1]
    )
    assert code == 1
    assert "::error" not in out
    assert ET.parse(files[0]).getroot().get("failures") == "1"
    assert files[1].read_text().startswith("### ❌ 1 of 1 case failed")
    code, _, err = cli("check", folder / "net.keras", folder / "right.onnx", "--junit", files[0])
    assert (code, "exists already" in err) == (2, True)


# --------------------------------------------------------------------------------------- without the framework

BLOCKED = """
import sys
for name in ("tensorflow", "keras", "h5py", "tf2onnx", "onnx"):
    sys.modules[name] = None  # an import raises ModuleNotFoundError
from deploykit.cli import main
main(sys.argv[1:])
"""


def blocked(*arguments, **environment):
    """The command line where nothing but numpy and onnxruntime can be imported."""
    line = [sys.executable, "-c", BLOCKED, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, env={**os.environ, **environment})


@pytest.mark.parametrize(
    ("bundle", "code", "words"),
    [("dist/good", 0, ""), ("worse", 1, "not equivalent"), ("changed", 2, "changed after the bundle was sealed")],
)
def test_a_bundle_is_replayed_without_tensorflow(folder, bundle, code, words):
    done = blocked("check", folder / bundle, "--quiet")
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr
    assert done.stderr.count("\n") == (code != 0)


def test_bundles_alone_need_no_tensorflow_in_ci(folder, tmp_path):
    path = config(folder, '[tool.deploykit]\nbundles = ["dist/*", "worse"]', "bundles.toml")
    done = blocked("ci", "--config", path, "--junit", tmp_path / "r.xml", GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY="")
    assert done.returncode == 1
    assert re.fullmatch(r"error: 1 of 2 did not pass; .*\n", done.stderr)
    assert re.search("^::error title=", done.stdout, re.M)
    assert ET.parse(tmp_path / "r.xml").getroot().get("tests") == "2"


# ------------------------------------------------------------------------------- the action and its documentation


def yaml_subset(text):
    """Mappings, lists of mappings, block scalars and plain scalars: all of YAML that action.yml may use."""
    lines = [line for line in text.split("\n") if line.strip() and not line.lstrip().startswith("#")]

    def indent(line):
        return len(line) - len(line.lstrip())

    def scalar(value):
        return value[1:-1] if value[:1] in "\"'" and value[:1] else value

    def block(at, depth):
        found = [] if lines[at].lstrip().startswith("- ") else {}
        while at < len(lines) and indent(lines[at]) == depth:
            if isinstance(found, list):
                assert lines[at].lstrip().startswith("- "), lines[at]
                lines[at] = lines[at].replace("- ", "  ", 1)
                item, at = block(at, depth + 2)
                found.append(item)
                continue
            key, colon, value = lines[at].strip().partition(":")
            assert colon, lines[at]
            assert key not in found, key
            assert not value or value.startswith(" "), lines[at]
            value, at = value.strip(), at + 1
            inner = [] if at == len(lines) or indent(lines[at]) <= depth else [indent(lines[at])]
            if value == "|":
                start = at
                while at < len(lines) and indent(lines[at]) > depth:
                    at += 1
                found[key] = "\n".join(line[inner[0] :] for line in lines[start:at])
            elif value:
                assert not inner, lines[at]
                found[key] = scalar(value)
            else:
                found[key], at = block(at, inner[0]) if inner else (None, at)
        return found, at

    found, at = block(0, 0)
    assert at == len(lines), lines[at]
    return found


def test_the_action_uses_the_inputs_it_states():
    text = (ROOT / "action.yml").read_text()
    action = yaml_subset(text)
    assert action["runs"]["using"] == "composite"
    assert set(re.findall(r"inputs\.([\w-]+)", text)) == set(action["inputs"])
    for name in ("config", "version", "extra"):
        assert action["inputs"][name]["description"]
        assert "default" in action["inputs"][name]
    for step in action["runs"]["steps"]:
        assert ("uses" in step) != ("run" in step)
        assert step.get("shell") == ("bash" if "run" in step else None)
        assert "${{ inputs." not in step.get("run", ""), "a value in a script is code; pass it through env"
        names = set(re.findall(r"\$\{?([A-Z_]+)", step.get("run", "")))
        assert names <= set(step.get("env", {})) | {"RUNNER_TEMP", "GITHUB_ACTION_PATH"}


def test_the_action_runs_what_the_command_line_has(folder, tmp_path):
    """The action's own script, over a project with a wrong bundle."""
    steps = yaml_subset((ROOT / "action.yml").read_text())["runs"]["steps"]
    (script,) = [step["run"] for step in steps if "deploykit ci" in step.get("run", "")]
    binary = tmp_path / "bin"
    binary.mkdir()
    (binary / "deploykit").write_text(f'#!/bin/sh\nexec {sys.executable} -m deploykit.cli "$@"\n')
    (binary / "deploykit").chmod(0o755)
    path, report = config(folder, '[tool.deploykit]\nbundles = ["worse"]', "action.toml"), tmp_path / "report"
    path_variable = f"{binary}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path_variable, "CONFIG": str(path), "REPORT": str(report)}
    done = subprocess.run(["bash", "-e", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert {file.suffix for file in report.iterdir()} == {".json", ".xml", ".md", ".html"}


def test_the_documented_configuration_is_valid(tmp_path):
    text = (ROOT / "docs" / "ci.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.S)
    tables = tomllib.loads(example)["tool"]["deploykit"]
    for row in (*tables["check"], *tables["latency"]):
        for path in (row.get("reference"), row.get("candidate"), row.get("baseline"), row.get("data"),
                     *row.get("candidates", ())):  # fmt: skip
            if path:
                (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / path).touch()
    for pattern in tables["bundles"]:
        write_bundle(tmp_path / pattern.replace("*", "other"))
    assert read_config(config(tmp_path, example)).bundles
    documented = set(re.findall(r"^\| `([\w-]+)`", text, re.M))
    assert documented == set(CHECK_KEYS) | set(LATENCY_KEYS) | {"bundles"}
