"""GPU providers: refused where they cannot be used, and never a model that ran on the CPU instead.

This machine need not have a GPU: what decides is tested on sessions that ONNX Runtime really opened. Where
onnxruntime-gpu and a GPU are there, the last test runs on them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit import runtimes
from deploykit.bench import Candidate, Progress, bench
from deploykit.errors import DataError, InputError, LoadError, MissingComponentError, ProofError
from deploykit.latency import Settings, latency
from deploykit.runtimes import onnxruntime_gpu, process, worker
from deploykit.runtimes.onnxruntime_cpu import opened, ort
from deploykit.runtimes.onnxruntime_cuda import CUDA
from deploykit.runtimes.onnxruntime_cuda_graph import CUDA_GRAPH
from deploykit.runtimes.onnxruntime_gpu import RECORD, Provider, gpu_session, placed, require, shape_arithmetic, strayed
from deploykit.runtimes.onnxruntime_tensorrt import TENSORRT
from deploykit.runtimes.onnxruntime_tensorrt_graph import TENSORRT_GRAPH
from deploykit.verify import SessionSettings

GPUS = [CUDA, TENSORRT]
lacking = pytest.mark.skipif(CUDA.name in ort.get_available_providers(), reason="onnxruntime-gpu is installed")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = tanh of (a·w beside two constants): three nodes that compute, and four whose results follow from shapes."""
    nodes = [
        helper.make_node("MatMul", ["a", "w"], ["m"], name="matmul"),
        helper.make_node("Shape", ["m"], ["s"], name="shape"),
        helper.make_node("Gather", ["s", "zero"], ["n"], name="gather"),
        helper.make_node("Concat", ["n", "two"], ["to"], name="concat", axis=0),
        helper.make_node("Expand", ["c", "to"], ["e"], name="expand"),
        helper.make_node("Concat", ["m", "e"], ["j"], name="join", axis=1),
        helper.make_node("Tanh", ["j"], ["y"], name="tanh"),
    ]
    stored = {
        "w": np.eye(4, dtype=np.float32) * 2,
        "zero": np.array([0]),
        "two": np.array([2]),
        "c": np.full((1, 2), 2, np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, ["b", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 6])],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    path = tmp_path_factory.mktemp("gpu") / "model.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


# ------------------------------------------------------------------------------------------ not on this machine


@lacking
@pytest.mark.parametrize("provider", GPUS, ids=lambda p: p.runtime)
def test_a_provider_that_is_not_installed_names_the_extra(provider: Provider, file: Path, cli, tmp_path: Path) -> None:
    with pytest.raises(MissingComponentError, match=rf"{provider.name}.* pip install 'deploykit\[gpu\]'") as caught:
        runtimes.open(provider.runtime, file)
    assert caught.value.exit_code == 2
    model = Path(__file__).resolve().parent.parent / "models" / "mlp_bn_after.keras"
    code, out, err = cli("check", model, file, "--runtime", provider.runtime)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "deploykit[gpu]" in err


@lacking
def test_a_package_whose_files_were_overwritten_says_how_to_put_it_back(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both packages own onnxruntime/: the record of one stays while its files are the other's."""
    record = tmp_path / "onnxruntime_gpu-1.31.1.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingComponentError, match="--force-reinstall --no-deps onnxruntime-gpu"):
        runtimes.open("onnxruntime-cuda", file)


MISSING_LIBRARY = (
    "2026-11-21 [E:onnxruntime:Default, provider_bridge_ort.cc:2458 operator()] FAIL : Failed to load library"
    " libonnxruntime_providers_cuda.so with error: libcublasLt.so.13: cannot open shared object file: No such file"
)
CAUSES = {
    MISSING_LIBRARY: "libcublasLt.so.13: cannot open shared object file: No such file",
    "x.cc:1 CUDA failure 100: no CUDA-capable device": "CUDA failure 100: no CUDA-capable device",
    "Please reference the requirements": "",
}


@pytest.mark.parametrize("printed", CAUSES)
def test_the_cause_is_found_in_what_onnxruntime_prints(printed: str) -> None:
    assert onnxruntime_gpu._cause(f"first line\n{printed}\nlast line") == CAUSES[printed]


def test_a_provider_that_opens_a_model_is_of_use(capfd: pytest.CaptureFixture[str]) -> None:
    require(Provider("onnxruntime-cuda", "CPUExecutionProvider", {}, "nothing"))
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------- no silent fallback


def test_a_model_that_the_provider_leaves_to_the_cpu_fails(file: Path) -> None:
    """ONNX Runtime lists this provider, opens the model on it, and runs every node on the CPU."""
    astray = Provider("onnxruntime-cuda", "AzureExecutionProvider", {}, "nothing")
    assert opened(str(file), astray.name, {}, SessionSettings(), {}).get_providers()[0] == astray.name
    with pytest.raises(
        ProofError,
        match=r"does not run on AzureExecutionProvider: 3 of 7 nodes would run elsewhere .matmul, join, tanh",
    ) as e:
        gpu_session(astray, file, threads=None, notes=())
    assert e.value.exit_code == 1


def test_a_model_on_its_provider_opens_with_its_notes(file: Path, tmp_path: Path) -> None:
    home = Provider("onnxruntime-cuda", "CPUExecutionProvider", {}, "nothing")
    session = gpu_session(home, file, threads=1, notes=("TF32 off",))
    assert (session.runtime, session.notes) == ("onnxruntime-cuda", ("TF32 off",))
    found = session.run({"a": np.ones((3, 4), np.float32)})
    np.testing.assert_allclose(found["y"], np.full((3, 6), np.tanh(2)), rtol=1e-6)
    (tmp_path / "bad.onnx").write_bytes(b"junk")
    with pytest.raises(LoadError, match=r"bad\.onnx.*complete \.onnx file"):
        gpu_session(home, tmp_path / "bad.onnx", threads=1, notes=())


def test_where_nodes_went_is_read_off_the_session(file: Path) -> None:
    places = placed(opened(str(file), "CPUExecutionProvider", {}, SessionSettings(1), RECORD))
    assert {name: sorted(nodes) for name, nodes in places.items()} == {
        "CPUExecutionProvider": ["concat", "expand", "gather", "join", "matmul", "shape", "tanh"]
    }
    arithmetic = shape_arithmetic(onnx.load(file).graph)
    assert arithmetic == {"shape", "gather", "concat", "expand"}
    assert strayed(places, "CPUExecutionProvider", set()) == []
    assert strayed(places, "CUDAExecutionProvider", arithmetic) == ["matmul", "join", "tanh"]


def _body() -> onnx.GraphProto:
    out = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    return helper.make_graph([helper.make_node("Abs", ["x"], ["inner"], name="inside")], "body", [], [out])


ARITHMETIC = {
    "a value": ([("Abs", ["x"])], set()),
    "a constant": ([("Abs", ["w"])], {"n0"}),
    "a shape": ([("Shape", ["x"]), ("Abs", ["y0"])], {"n0", "n1"}),
    "a size of a result": ([("Abs", ["x"]), ("Size", ["y0"]), ("Add", ["y1", "w"])], {"n1", "n2"}),
    "a shape and a value": ([("Shape", ["x"]), ("Reshape", ["x", "y0"]), ("Abs", ["y1"])], {"n0"}),
}


@pytest.mark.parametrize("case", ARITHMETIC)
def test_shape_arithmetic_is_what_no_value_reaches(case: str) -> None:
    steps, wanted = ARITHMETIC[case]
    nodes = [helper.make_node(op, ins, [f"y{i}"], name=f"n{i}") for i, (op, ins) in enumerate(steps)]
    x, w = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xw")
    stored = [numpy_helper.from_array(np.ones(2, np.float32), "w")]
    assert shape_arithmetic(helper.make_graph(nodes, "g", [x, w], [], stored)) == wanted


def test_a_branch_sees_values_without_naming_them() -> None:
    """The body of an If takes x from outside; and a node without a name cannot be told from another."""
    nodes = [
        helper.make_node("If", ["go"], ["y"], name="if", then_branch=_body(), else_branch=_body()),
        helper.make_node("Abs", ["w"], ["z"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    stored = [numpy_helper.from_array(np.array(True), "go"), numpy_helper.from_array(np.ones(2, np.float32), "w")]
    assert shape_arithmetic(helper.make_graph(nodes, "g", [x], [], stored)) == set()


# ------------------------------------------------------------------------------------------- on the device, recorded

HOST = Provider("onnxruntime-cuda", "CPUExecutionProvider", {}, "nothing", device="cpu")
RECORDED = HOST.recording("onnxruntime-cuda-graph", {"enable_cuda_graph": "1"})


def rows(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"a": np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)}


@pytest.mark.parametrize("provider", [HOST, RECORDED], ids=["plain", "recorded"])
def test_a_session_answers_the_same_bound_recorded_or_not(provider: Provider, file: Path) -> None:
    session = gpu_session(provider, file, threads=1, notes=())
    right = runtimes.open("onnxruntime-cpu", file, threads=1)
    for seed, count in enumerate((3, 3, 5, 3)):
        assert session.run(rows(count, seed))["y"].tobytes() == right.run(rows(count, seed))["y"].tobytes()
        bound = session.bound(rows(count, seed + 9))
        bound.run()
        assert bound.from_device()["y"].tobytes() == right.run(rows(count, seed + 9))["y"].tobytes()
        with pytest.raises(DataError, match="has no input b"):
            session.bound({**rows(count), "b": np.ones(1)})
    session.close()
    with pytest.raises(InputError, match="is closed"):
        session.run(rows(3))


def test_a_graph_belongs_to_its_shapes(file: Path) -> None:
    session = gpu_session(RECORDED, file, threads=1, notes=())
    native = session.native
    assert session.bound(rows(3)) is session.bound(rows(3))
    assert session.native is native
    other = session.bound(rows(5))
    assert session.native is not native  # a graph is recorded anew, in a session that has none
    assert other is not session.bound(rows(3))
    plain = gpu_session(HOST, file, threads=1, notes=())
    assert plain.bound(rows(3)) is not plain.bound(rows(3))


def test_what_cannot_be_opened_with_graphs_names_the_runtime_without(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("NoSuch", ["x"], ["y"])], "g", [x], [y])
    path = tmp_path / "model.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    with pytest.raises(
        LoadError, match=r"does not open .*model\.onnx with CUDA graphs: .*NoSuch.*use onnxruntime-cuda$"
    ):
        gpu_session(RECORDED, path, threads=1, notes=())


def test_graphs_are_asked_for_by_the_provider_s_own_option() -> None:
    options = {p.runtime: (p.name, {**p.options, **p.graph}) for p in (*GPUS, CUDA_GRAPH, TENSORRT_GRAPH)}
    assert options == {
        "onnxruntime-cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}),
        "onnxruntime-cuda-graph": ("CUDAExecutionProvider", {"use_tf32": "0", "enable_cuda_graph": "1"}),
        "onnxruntime-tensorrt": ("TensorrtExecutionProvider", {}),
        "onnxruntime-tensorrt-graph": ("TensorrtExecutionProvider", {"trt_cuda_graph_enable": "1"}),
    }
    assert {row.name for row in runtimes.RUNTIMES.values() if row.gpu} == set(options)


# ---------------------------------------------------------------------------------------------------------- timing

# A runtime of the host's memory that the tables hold for a GPU's, here and in the workers.
ON_HOST = """
import sys, types
from deploykit import runtimes
from deploykit.runtimes import onnxruntime_gpu, worker

HOST = onnxruntime_gpu.Provider("onnxruntime-cuda", "CPUExecutionProvider", {}, "nothing", device="cpu")

def session(model, *, threads):
    return onnxruntime_gpu.gpu_session(HOST, model, threads=threads, notes=())

sys.modules["on_host"] = types.SimpleNamespace(session=session, required=lambda: None)
runtimes.RUNTIMES["on-host"] = runtimes.Runtime("on-host", "on_host", (".onnx",), (), gpu=True)
worker.main()
"""


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_BOOT", f"import json; {process._BOOT.partition('; from ')[0]}\n{ON_HOST}")
    monkeypatch.setitem(runtimes.RUNTIMES, "on-host", runtimes.Runtime("on-host", "on_host", (".onnx",), (), gpu=True))


def test_transfers_are_timed_apart(file: Path, host: None) -> None:
    found = latency([file], wanted=["on-host"], settings=Settings((2,), (1,), seconds=0.2))
    (device,) = found.body["candidates"]
    assert device["failed"] is None
    assert sorted(device["transfers_ms"]) == ["from_device", "to_device"]
    # what a run is made of is less than the whole; the median of single runs may wander, not by a factor
    assert 0 < device["transfers_ms"]["to_device"] < 10 * device["end_to_end_ms"]
    assert 0 < device["transfers_ms"]["from_device"] < 10 * device["end_to_end_ms"]
    notices = [text for text in found.notices if "on the device" in text]
    assert [text.split(":")[0] for text in notices] == [f"{file} on on-host at batch 2"]
    assert f"{device['end_to_end_ms']:.3g} ms" in notices[0]
    timing = found.report.timing(device["name"])
    assert {len(samples) for samples in timing.beside_s.values()} == {worker.BESIDE_RUNS * device["rounds"]}


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_only_a_gpus_worker_sees_gpus(file: Path, host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    seen = {}

    def look(step: Progress) -> None:
        if step.phase == "warm":
            for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
                pairs = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                seen[step.candidate] = dict(pair.partition(b"=")[::2] for pair in pairs)[b"CUDA_VISIBLE_DEVICES"]

    for runtime in ("on-host", "onnxruntime-cpu"):
        one = [Candidate(runtime, file, runtime, 1)]
        row = bench(one, rows(2), seconds=0.1, processes=1, progress=look).timings[0].to_json()
        assert row["failed"] is None
    assert (row["transfers_ms"], row["end_to_end_ms"]) == (None, None)  # of the processor, the last
    assert seen == {"on-host": b"5", "onnxruntime-cpu": b"-1"}


@lacking
@pytest.mark.parametrize("runtime", ["onnxruntime-cuda", "onnxruntime-tensorrt-graph"])
def test_bench_without_a_gpu_is_refused_before_anything_is_measured(file: Path, cli, runtime: str) -> None:
    code, out, err = cli("bench", file, "--runtime", "onnxruntime-cpu", "--runtime", runtime)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: runtime {runtime} needs ")


# ------------------------------------------------------------------------------------------------ where there is one


ON_GPU = """
import json, sys
import numpy as np
from deploykit import runtimes
from deploykit.errors import MissingComponentError

x = {"a": np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)}
right = runtimes.open("onnxruntime-cpu", sys.argv[2]).run(x)["y"]
try:
    session = runtimes.open(sys.argv[1], sys.argv[2])
except MissingComponentError as error:
    print(json.dumps({"missing": str(error)}))
else:
    bound = session.bound({"a": np.zeros_like(x["a"])})
    bound.to_device(x)
    bound.run()
    error = max(float(np.abs(found["y"] - right).max()) for found in (session.run(x), bound.from_device()))
    print(json.dumps({"error": error, "notes": session.notes, "options": session.native.get_provider_options()}))
"""


@pytest.mark.parametrize("provider", [*GPUS, CUDA_GRAPH, TENSORRT_GRAPH], ids=lambda p: p.runtime)
def test_a_gpu_answers_like_the_cpu(
    provider: Provider, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if provider.name not in ort.get_available_providers():
        pytest.skip(f"the installed onnxruntime has no {provider.name}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if provider.plain:  # for a graph, nothing that follows from shapes
        node = helper.make_node("Tanh", ["a"], ["y"])
        a, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [64, 4]) for name in "ay")
        graph = helper.make_graph([node], "g", [a], [y])
        file = tmp_path / "fixed.onnx"
        onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), file)
    command = [sys.executable, "-c", ON_GPU, provider.runtime, str(file)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(ended.stdout)
    if "missing" in found:
        assert "it needs an NVIDIA GPU" in found["missing"]
        pytest.skip(found["missing"])
    assert found["error"] < 1e-6
    assert "TF32 off" in found["notes"]
    assert provider.name != CUDA.name or found["options"][CUDA.name]["use_tf32"] == "0"
