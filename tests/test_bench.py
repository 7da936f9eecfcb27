"""Timings from processes of their own: what is claimed, what is only shown, and what is left behind."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit import environment
from deploykit.bench import (
    PROCESSES,
    BenchReport,
    Candidate,
    Progress,
    Timing,
    _noise,
    _of_batch,
    _ratio,
    _slowed,
    bench,
    schedule,
)
from deploykit.bench import size_bytes as size_of
from deploykit.errors import DataError, InputError
from deploykit.runtimes import worker
from deploykit.stats import LUCK

ORT = "onnxruntime-cpu"
X = {"x": np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)}
QUICK = {"threads": 1, "seconds": 0.4, "processes": 1}

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def mlp(path: Path, layers: int, batch: int | str = "n") -> Path:
    random = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for i in range(layers):
        w = random.standard_normal((64, 64)).astype(np.float32) / 8
        weights.append(numpy_helper.from_array(w, f"w{i}"))
        nodes += [
            helper.make_node("MatMul", [last, f"w{i}"], [f"m{i}"]),
            helper.make_node("Tanh", [f"m{i}"], [f"h{i}"]),
        ]
        last = f"h{i}"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 64]) for name in "xy")
    return saved(path, helper.make_graph(nodes, "mlp", [x], [y], weights))


def endless(path: Path) -> Path:
    """A loop of 2^62 turns."""
    one = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Tanh", ["v"], ["w"])],
        "body",
        [one("i", TensorProto.INT64, []), one("go", TensorProto.BOOL, []), one("v", TensorProto.FLOAT, ["n", 64])],
        [one("on", TensorProto.BOOL, []), one("w", TensorProto.FLOAT, ["n", 64])],
    )
    turns = [numpy_helper.from_array(np.array(2**62), "turns"), numpy_helper.from_array(np.array(True), "yes")]
    nodes = [helper.make_node("Loop", ["turns", "yes", "x"], ["y"], body=body)]
    x, y = (one(name, TensorProto.FLOAT, ["n", 64]) for name in "xy")
    return saved(path, helper.make_graph(nodes, "endless", [x], [y], turns))


def saved(path: Path, graph: onnx.GraphProto) -> Path:
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return mlp(tmp_path_factory.mktemp("bench") / "small.onnx", 4)


def children(pid: int | None = None) -> dict[int, str]:
    """Processes whose parent is ``pid`` (default: this one), with their state; zombies are gone already."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == (pid or os.getpid()) and state != "Z":
            found[int(entry.parent.name)] = state
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------------ report

CANDIDATE_KEYS = {
    *("name", "model", "runtime", "batch", "threads", "latency_ms", "throughput", "load_ms", "peak_rss_bytes"),
    *("size_bytes", "rounds", "runs", "failed", "size", "cold_start_ms"),
}


@linux
def test_keras_and_onnx_side_by_side(tmp_path, capfd):
    import keras

    from deploykit.export import export

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,), name="x"), keras.layers.Dense(64, "tanh"), keras.layers.Dense(5)])
    model.save(tmp_path / "net.keras")
    export(model, tmp_path / "net.onnx")
    capfd.readouterr()
    libraries, states = {}, set()

    def look(step: Progress) -> None:
        workers = children()
        states.update(workers.values())
        assert all(os.getpgid(pid) == pid for pid in workers)  # Ctrl-C reaches the caller alone
        if step.phase == "round" and step.rounds == 1:
            for pid in workers:
                maps = Path(f"/proc/{pid}/maps").read_text()
                libraries[pid] = {name for name in ("tensorflow", "onnxruntime") if f"/{name}/" in maps}

    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "deploykit.json").write_text("{}")
    (tmp_path / "net.onnx").rename(bundle / "model.onnx")
    listed = [Candidate.of(tmp_path / "net.keras", threads=1), Candidate.of(bundle, threads=1)]
    found = bench(listed, X, seconds=0.5, processes=1, progress=look)
    report = json.loads(json.dumps(found.to_json(), allow_nan=False))

    assert [c["name"] for c in report["candidates"]] == ["net.keras, keras (tf.function)", "bundle, onnxruntime-cpu"]
    for row in report["candidates"]:
        assert set(row) >= CANDIDATE_KEYS
        assert row["failed"] is None
        assert (row["batch"], row["threads"], row["input_shapes"]) == (1, 1, {"x": [1, 64]})
        assert row["throughput"] == pytest.approx(1e3 / row["latency_ms"]["median"])
        assert (
            row["runs"] == sum(len(samples) for rounds in row["samples_s"] for samples in rounds) >= 3 * row["rounds"]
        )
        assert row["rounds"] >= 10
        assert row["size_bytes"] == Path(row["model"]).stat().st_size
        assert 0 < row["load_ms"] < row["cold_start_ms"]
        assert row["size"] == "64"
    keras_row, onnx_row = report["candidates"]
    assert onnx_row["peak_rss_bytes"] < 200e6 < keras_row["peak_rss_bytes"]
    assert onnx_row["cold_start_ms"] < keras_row["cold_start_ms"]  # TensorFlow's import
    (comparison,) = report["comparisons"]
    assert comparison["ci95"][0] <= comparison["ratio"] <= comparison["ci95"][1] < 1
    assert [comparison[key] for key in ("a", "b", "batch", "threads", "verdict")] == [
        *(onnx_row["name"], keras_row["name"], 1, 1, "faster")
    ]
    assert found.comparison(keras_row["name"], onnx_row["name"]).verdict == "slower"
    assert sorted(libraries.values(), key=sorted) == [{"onnxruntime"}, {"tensorflow"}]  # neither has the other's
    assert states == {"T"}  # whenever nothing is asked, all of them stand still
    assert capfd.readouterr() == ("", "")


def test_every_batch_size_is_measured_and_a_fixed_one_says_so(small, tmp_path):
    fixed = mlp(tmp_path / "fixed.onnx", 4, batch=1)
    found = bench([Candidate("free", small, ORT), Candidate("fixed", fixed, ORT)], X, batches=(1, 5), **QUICK)
    assert [(t.candidate.name, t.batch) for t in found.timings] == [
        ("free", 1),
        ("fixed", 1),
        ("free", 5),
        ("fixed", 5),
    ]
    assert found.timing("fixed", 1).failed is None
    assert found.timing("fixed", 5).failed == "the model's batch size is fixed at 1; batch 5 cannot run"
    assert found.timing("free", 5).input_shapes == {"x": (5, 64)}
    assert found.timing("free", 5).to_json()["throughput"] == pytest.approx(
        5e3 / found.timing("free", 5).latency.median
    )
    assert [(c.a, c.b, c.batch) for c in found.comparisons] == [("fixed", "free", 1), ("fixed", "free", 5)]
    with pytest.raises(InputError, match="2 timings are called 'free'"):
        found.timing("free")


def test_every_size_and_number_of_threads_is_a_setting(tmp_path):
    path = tmp_path / "any.onnx"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "steps", 8]) for name in "xy"]
    saved(path, helper.make_graph([helper.make_node("Tanh", ["x"], ["y"])], "any", ends[:1], ends[1:]))
    sizes = [{"x": np.ones((2, steps, 8), np.float32)} for steps in (4, 4000)]
    found = bench([Candidate("a", path, ORT)], sizes, threads=(1, 2), seconds=0.1, processes=1)
    settings = [(1, threads, size) for size in ("4x8", "4000x8") for threads in (1, 2)]
    assert [t.setting for t in found.timings] == settings
    report = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [c["input_shapes"]["x"] for c in report["candidates"]] == [[1, 4, 8]] * 2 + [[1, 4000, 8]] * 2
    assert found.timing("a", 1, 1, "4x8").latency.median < found.timing("a", 1, 1, "4000x8").latency.median
    with pytest.raises(InputError, match="2 timings are called 'a' at batch 1, threads 1, size None"):
        found.timing("a", 1, 1)


def test_only_within_a_setting_candidates_are_compared():
    settings = list(itertools.product((1, 8), (1, 2), (4, 9)))
    report = BenchReport(
        tuple(
            Timing(Candidate(name, "m.onnx", ORT), batch, threads, {"x": (batch, size)}, None, (rounds(seconds),))
            for batch, threads, size in settings
            for name, seconds in (("a", 1.0), ("b", 2.0))
        )
    )
    rows = report.to_json()["comparisons"]
    assert [(row["batch"], row["threads"], row["size"]) for row in rows] == [(*s[:2], str(s[2])) for s in settings]
    assert {(row["a"], row["b"], row["verdict"]) for row in rows} == {("b", "a", "slower")}
    assert report.comparison("a", "b", 8, 1, "9").verdict == "faster"


def test_sizes_of_several_inputs_carry_their_names():
    found = Timing(Candidate("a", "m.onnx", ORT), 2, 1, {"u": (2, 5, 3), "v": (2,)}, None)
    assert found.size == "u 5x3, v scalar"


def test_litert_stands_beside_onnx(small, tmp_path):
    pytest.importorskip("ai_edge_litert")
    import tensorflow as tf

    class Net(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([1, 64], tf.float32, name="x")])
        def serve(self, x):
            return {"y": tf.tanh(x)}

    net = Net()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([net.serve.get_concrete_function()], net)
    (tmp_path / "net.tflite").write_bytes(converter.convert())
    listed = [Candidate.of(tmp_path / "net.tflite"), Candidate.of(small)]
    assert [candidate.runtime for candidate in listed] == ["litert", ORT]
    found = bench(listed, X, **QUICK)
    assert [timing.failed for timing in found.timings] == [None, None]
    assert found.comparisons[0].ratio is not None


def test_a_file_ties_with_itself(small):
    found = bench([Candidate("a", small, ORT), Candidate("b", small, ORT)], X, threads=1, seconds=0.4)
    (comparison,) = found.comparisons
    assert [len(t.processes_s) for t in found.timings] == [PROCESSES] * 2  # as close as luck: asked again, afresh
    assert comparison.ratio.low < 1.05
    assert comparison.ratio.high > 0.95


def test_more_work_is_slower_and_one_process_shows_it(small, tmp_path):
    heavy = mlp(tmp_path / "heavy.onnx", 200)
    found = bench([Candidate("small", small, ORT), Candidate("heavy", heavy, ORT)], X, threads=1, seconds=0.4)
    (comparison,) = found.comparisons
    assert (comparison.a, comparison.b, comparison.verdict) == ("heavy", "small", "slower")
    assert comparison.ratio.low > 1
    assert [len(t.processes_s) for t in found.timings] == [1, 1]
    assert found.comparison("small", "heavy").verdict == "faster"


# ------------------------------------------------------------------------------------------------------ failures


def test_what_cannot_load_or_run_stays_in_the_list(small, tmp_path, capfd):
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x0anonsense")
    listed = {
        "gone": (tmp_path / "gone.onnx", "does not exist"),
        "broken": (tmp_path / "broken.onnx", "cannot load"),
        "good": (small, None),
    }
    found = bench([Candidate(name, path, ORT) for name, (path, _) in listed.items()], X, **QUICK)
    for timing, (_, reason) in zip(found.timings, listed.values(), strict=True):
        assert (timing.failed is None) == (reason is None)
        assert reason is None or (reason in timing.failed and "\n" not in timing.failed)
    assert found.timing("good").latency.median > 0
    row = found.to_json()["candidates"][0]
    assert (row["latency_ms"]["median"], row["throughput"], row["load_ms"], row["rounds"]) == (None, None, None, 0)
    assert [c.verdict for c in found.comparisons] == ["undecided"] * 3
    assert found.comparison("good", "gone").reason == "gone could not be measured"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"z": X["x"]}, "no data for input x"),
        ({"x": X["x"].astype(np.float64)}, "float64"),
        ({"x": X["x"][:, :5]}, "shape"),
    ],
)
def test_data_that_does_not_fit_is_the_reason(small, inputs, reason):
    (timing,) = bench([Candidate("a", small, ORT)], inputs, **QUICK).timings
    assert reason in timing.failed


@linux
def test_a_worker_that_dies_leaves_the_others_running(small):
    def kill(step: Progress) -> None:
        if step.candidate == "victim" and step.phase == "round" and step.rounds == 3:
            os.kill(max(set(children()) - keep), signal.SIGKILL)
        elif step.candidate == "victim" and step.phase == "load":
            keep.update(children())
        if step.candidate == "fine" and step.phase == "load":
            before.update(children())
        if step.candidate == "fine" and step.phase == "warm":
            keep.update(set(children()) - before)

    keep: set[int] = set()
    before: set[int] = set()
    found = bench([Candidate("fine", small, ORT), Candidate("victim", small, ORT)], X, progress=kill, **QUICK)
    assert found.timing("victim").failed == "the worker was killed by SIGKILL (out of memory?) during run"
    assert found.timing("fine").failed is None
    assert len(found.timing("fine").rounds_s) >= 10
    assert children() == {}


@linux
def test_a_worker_that_hangs_is_ended_at_once(small, tmp_path):
    def look(step: Progress) -> None:
        assert step.phase != "round" or len(children()) == 1

    listed = [Candidate("hangs", endless(tmp_path / "e.onnx"), ORT), Candidate("fine", small, ORT)]
    found = bench(listed, X, timeout=5, progress=look, **QUICK)
    assert found.timing("hangs").failed == "no answer to warm within 5 s; the worker was ended"
    assert found.timing("fine").failed is None
    assert children() == {}


@linux
@pytest.mark.parametrize("phase", ["load", "warm", "round"])
def test_an_interrupt_leaves_no_process(small, phase):
    def interrupt(step: Progress) -> None:
        if (step.candidate, step.phase) == ("b", phase):
            assert children()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench([Candidate("a", small, ORT), Candidate("b", small, ORT)], X, progress=interrupt, **QUICK)
    assert children() == {}


CALLER = """
import numpy as np, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in what it runs in the background
from deploykit.bench import Candidate, bench
listed = [Candidate(name, sys.argv[1], "onnxruntime-cpu") for name in "ab"]
x = {"x": np.ones((1, 64), np.float32)}
bench(listed, x, threads=1, seconds=100, progress=lambda step: print(step, flush=True))
"""


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_caller_that_is_killed_leaves_no_process(small, number):
    with subprocess.Popen(
        [sys.executable, "-c", CALLER, str(small)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as caller:
        while "rounds=2" not in caller.stdout.readline():
            assert caller.poll() is None
        workers = children(caller.pid)
        assert len(workers) == 2
        caller.send_signal(number)
        assert caller.wait(20) != 0
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


REFUSED = [
    ({"candidates": []}, InputError, "at least one candidate"),
    ({"candidates": ["a", "a"]}, InputError, "several candidates are called a"),
    ({"runtime": "onnx"}, InputError, "unknown runtime onnx; known are"),
    ({"batches": ()}, InputError, "batch sizes"),
    ({"batches": (0,)}, InputError, "batch sizes"),
    ({"batches": (2, 2)}, InputError, "batch sizes"),
    ({"batches": (10**30,)}, InputError, "batch sizes"),
    ({"threads": (1, 0)}, InputError, "threads must be"),
    ({"threads": (2, 2)}, InputError, "thread counts are"),
    ({"threads": ()}, InputError, "thread counts are"),
    ({"focus": "b"}, InputError, "no candidate is called 'b'"),
    ({"limit": 1.1}, InputError, "as focus the candidate"),
    ({"limit": 0, "focus": "a"}, InputError, "limit is 0"),
    ({"inputs": []}, DataError, "no input data"),
    ({"inputs": [{"x": np.ones((1, 4))}, {"x": np.ones((2, 4))}]}, DataError, "give different ones"),
    ({"threads": 0}, InputError, "threads must be"),
    ({"seconds": 0}, InputError, "seconds is 0"),
    ({"seconds": math.nan}, InputError, "seconds is nan"),
    ({"timeout": -1}, InputError, "timeout is -1"),
    ({"processes": 0}, InputError, "processes must be"),
    ({"seed": -1}, InputError, "seed must be"),
    ({"inputs": {}}, DataError, "no input data"),
    ({"inputs": {"x": np.float32(1)}}, DataError, "no samples"),
    ({"inputs": {"x": np.ones((0, 4))}}, DataError, "no samples"),
    ({"inputs": {"x": np.array([None])}}, DataError, "Python objects"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED)
def test_nonsense_is_refused_before_anything_starts(change, error, message):
    change = dict(change)
    runtime = change.pop("runtime", ORT)
    listed = [Candidate(name, "m.onnx", runtime) for name in change.pop("candidates", ["a"])]
    inputs = change.pop("inputs", X)
    with pytest.raises(error, match=message):
        bench(listed, inputs, progress=lambda step: pytest.fail("started"), **change)


def test_threads_of_a_candidate_and_a_sweep_exclude_each_other():
    with pytest.raises(InputError, match="none to single candidates"):
        bench([Candidate("a", "m.onnx", ORT, threads=1)], X, threads=(1, 2))


# ----------------------------------------------------------------------------------------------------- denormals


def tiny(path: Path) -> Path:
    """Multiplies by 1e-20 twice: ones become the denormal 1e-40."""
    factor = numpy_helper.from_array(np.array(1e-20, np.float32), "f")
    nodes = [helper.make_node("Mul", [source, "f"], [target]) for source, target in (("x", "h"), ("h", "y"))]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 64]) for name in "xy"]
    return saved(path, helper.make_graph(nodes, "tiny", ends[:1], ends[1:], [factor]))


@pytest.mark.parametrize("flush", [False, True])
def test_a_session_that_flushes_has_no_denormals(tmp_path, flush):
    """In a process of its own: ONNX Runtime heeds the option in the first session only."""
    script = """
        import sys, numpy as np
        from deploykit.runtimes import onnxruntime_cpu
        from deploykit.verify import SessionSettings
        path, flush = sys.argv[1], sys.argv[2] == "True"
        session = onnxruntime_cpu.session(path, settings=SessionSettings(1, denormals_as_zero=flush))
        answer = session.run({"x": np.ones((1, 64), np.float32)})["y"]
        print(bool((answer == 0).all()), bool((answer > 0).all()))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tiny(tmp_path / "tiny.onnx")), str(flush)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(flush), str(not flush)]


def test_denormals_are_looked_for_on_request_once_for_each_candidate(small):
    def steps(denormals: bool) -> list[str]:
        told: list[Progress] = []
        more = {**QUICK, "batches": (1, 2), "seconds": 0.1}
        found = bench([Candidate("a", small, ORT)], X, denormals=denormals, progress=told.append, **more)
        assert not [doubt for doubt in found.warnings if doubt.code == "denormals"]  # it has none
        assert found.timings[0].failed is None
        return [step.phase for step in told if step.phase == "flush"]

    assert (steps(True), steps(False)) == (["flush"], [])


SLOWED = [
    ([2.0, 3.0, 2.5], 2.5),
    ([2.0, 3.0, 1.1], None),  # not in every round
    ([1.1, 1.15, 1.1], None),  # two processes differ by as much
    ([2.0, 3.0], None),  # one round is missing
]


@pytest.mark.parametrize(("ratios", "found"), SLOWED)
def test_only_what_luck_cannot_do_is_blamed_on_denormals(ratios, found):
    assert _slowed([([ratio, ratio, 9.0], [1.0, 1.0, 1.0]) for ratio in ratios]) == found


# ------------------------------------------------------------------------------------------------------ worker


@linux
def test_threads_are_what_was_asked_for(small):
    counts = {}

    def look(step: Progress) -> None:
        if step.phase == "round":
            (pid,) = children()
            counts[threads] = len(os.listdir(f"/proc/{pid}/task"))

    for threads in (1, 3):
        bench([Candidate("a", small, ORT, threads)], X, seconds=0.1, processes=1, progress=look)
    assert counts[3] - counts[1] == 2


NOISY = """
import os, sys, types
from deploykit import runtimes
from deploykit.runtimes import worker, onnxruntime_cpu

def session(model, *, threads):
    os.write(1, b"chatter of native code\\n"); print("chatter of Python"); os.system("echo chatter of a child")
    return onnxruntime_cpu.session(model, threads=threads)

sys.modules["noisy"] = types.SimpleNamespace(session=session)
runtimes.RUNTIMES["noisy"] = runtimes.Runtime("noisy", "noisy", (), ())
worker.main()
"""


def test_stdout_is_the_protocols_alone(small, tmp_path):
    np.savez(tmp_path / "x.npz", x=X["x"])
    load = {"do": "load", "runtime": "noisy", "model": str(small), "threads": 1, "batch": 3}
    commands = [
        {"do": "run", "runs": 1},
        {**load, "inputs": str(tmp_path / "x.npz")},
        {"do": "dance"},
        {"do": "warm"},
        {"do": "run", "runs": 4},
        {"do": "quit"},
        {"do": "run", "runs": 1},
    ]
    done = subprocess.run(
        [sys.executable, "-c", NOISY], input="\n".join(map(json.dumps, commands)), capture_output=True, text=True
    )
    answers = list(map(json.loads, done.stdout.splitlines()))
    assert [sorted(answer) for answer in answers] == [
        ["failed"],
        ["import_s", "load_s"],
        ["failed"],
        ["first_s", "median_s", "peak_rss_bytes", "runs", "settled"],
        ["cpu_s", "megahertz", "peak_rss_bytes", "samples_s"],
    ]
    assert len(answers[-1]["samples_s"]) == 4
    assert done.stderr.count("chatter") == 3
    assert done.returncode == 0


def test_a_steady_model_settles_and_a_drifting_one_is_bounded():
    pause = [0.004]

    def slower_and_slower() -> None:
        pause[0] *= 1.3
        time.sleep(pause[0])

    assert worker.warm_up(lambda: time.sleep(0.004))["settled"]
    begin = time.perf_counter()
    assert not worker.warm_up(slower_and_slower, limit_s=0.5)["settled"]
    assert time.perf_counter() - begin < 5


def test_importing_bench_imports_no_tensorflow():
    script = "import deploykit.bench, sys; print({'tensorflow', 'keras', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_worker_does_not_import_from_the_current_folder(small, tmp_path, monkeypatch):
    for name in ("json", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('a stranger')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert bench([Candidate("a", small, ORT)], X, **QUICK).timings[0].failed is None


# ------------------------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_second_round_mirrors_the_one_before(count):
    orders = [order for order, _ in zip(schedule(count, (0,)), range(40), strict=False)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert all(a == b[::-1] for a, b in zip(orders[::2], orders[1::2], strict=True))
    assert len(set(orders)) == min(math.factorial(count), len(set(orders)))
    assert count < 3 or orders != [order for order, _ in zip(schedule(count, (1,)), range(40), strict=False)]


def rounds(seconds: float, count: int = 12) -> tuple[tuple[float, ...], ...]:
    return tuple((seconds * (1 + 0.001 * (i % 3)), seconds, seconds) for i in range(count))


RATIOS = [
    ("one process cannot tell 20 %", [1.20], [1.0], "undecided"),
    ("one process tells 30 %", [1.30], [1.0], "slower"),
    ("six processes tell 5 %", [1.05] * 6, [1.0] * 6, "slower"),
    ("six processes in disagreement", [1.05] * 5 + [0.99], [1.0] * 6, "undecided"),
    ("five are too few", [1.05] * 5, [1.0] * 5, "undecided"),
    ("decided early: the rounds of the process they share", [2.0], [1.0] * 6, "slower"),
]


@pytest.mark.parametrize(("name", "a", "b", "verdict"), RATIOS, ids=[row[0] for row in RATIOS])
def test_verdicts_allow_for_a_process_luck(name, a, b, verdict):
    found = _ratio([rounds(s) for s in a], [rounds(s) for s in b])
    assert found.verdict == verdict
    assert (found.reason is None) == (verdict != "undecided")
    assert found.low <= found.ratio <= found.high
    if len(a) == 1:
        assert found.high / found.low >= LUCK**2


def timing(processes, threads=1, **more) -> Timing:
    return Timing(Candidate("a", "m.onnx", ORT), 1, threads, {"x": (1, 64)}, None, tuple(processes), **more)


STEADY = [rounds(1.0, 40)]
NOISE = [
    (STEADY, {}, None, None),
    (STEADY, {"settled": False}, "unsettled", "warm-up did not settle"),
    ([tuple((1.0,) * 10 for _ in range(10))], {}, "few_rounds", "only 10 rounds"),
    ([rounds(1.0, 30)], {}, "few_samples", "90 runs are too few for p99, which needs 100"),
    ([rounds(1.0, 20), rounds(1.2, 20)], {}, "drift", "1.20x the first"),
    ([rounds(1.0, 1), rounds(1.5, 1)] * 20, {}, "spread", "spread by"),
    (STEADY, {"megahertz": (2000.0,) * 20 + (2600.0,) * 20}, "frequency", "from 2000 to 2600 MHz"),
    (STEADY, {"megahertz": (2500.0,) * 39 + (1000.0,)}, None, None),
    (STEADY, {"threads": environment.cores()}, None, None),
    (STEADY, {"threads": environment.cores() + 1}, "oversubscribed", f"share {environment.cores()} cores"),
    (STEADY, {"denormals": 3.2}, "denormals", "3.2x as fast when denormal numbers count as zero"),
]


@pytest.mark.parametrize(("processes", "more", "code", "text"), NOISE)
def test_noise_is_said(processes, more, code, text):
    measured = timing(processes, **more)
    said = list(_noise(measured))
    assert [doubt.code for doubt in said] == [code] * (code is not None)
    assert code is None or text in said[0].text
    row = BenchReport((measured,), tuple(said)).to_json()
    assert row["warnings"] == [{"code": doubt.code, "text": doubt.text, "candidate": "a"} for doubt in said]
    assert row["notices"] == [doubt.text for doubt in said]
    assert measured.to_json()["noise"]["warm_up_settled"] == more.get("settled", True)


def test_a_candidate_that_failed_is_not_called_noisy():
    assert list(_noise(timing([], failed="gone", settled=False))) == []


def test_candidates_with_other_threads_are_compared_only_when_asked():
    a, b = timing([rounds(1.0)]), timing([rounds(2.0)])
    b = Timing(Candidate("b", "m.onnx", ORT, 2), 1, 2, a.input_shapes, None, b.processes_s)
    report = BenchReport((a, b), ())
    assert report.comparisons == ()
    assert (report.comparison("b", "a").verdict, report.comparison("b", "a").threads) == ("slower", None)


def test_samples_are_repeated_or_cut_to_the_batch():
    x = np.arange(3)
    assert _of_batch(x, 2).tolist() == [0, 1]
    assert _of_batch(x, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_size_counts_external_data_also_of_inner_graphs(tmp_path):
    def stored(name: str) -> onnx.TensorProto:
        tensor = numpy_helper.from_array(np.ones((100, 100), np.float32), name)
        onnx.external_data_helper.set_external_data(tensor, f"{name}.bin")
        tensor.ClearField("raw_data")
        (tmp_path / f"{name}.bin").write_bytes(bytes(40_000))
        return tensor

    condition = numpy_helper.from_array(np.array(True), "yes")
    output = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [100, 100])]
    branches = [
        helper.make_graph([helper.make_node("Identity", [name], ["y"])], name, [], output, [stored(name)])
        for name in ("one", "two")
    ]
    node = helper.make_node("If", ["yes"], ["y"], then_branch=branches[0], else_branch=branches[1])
    graph = helper.make_graph([node], "g", [], output, [condition, stored("three")])
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    assert size_of(path) == path.stat().st_size + 120_000
    assert size_of(tmp_path) == path.stat().st_size + 120_000
    assert size_of(tmp_path / "none.onnx") is None


# ----------------------------------------------------------------------------------------------------- environment


def test_the_environment_is_told_without_importing_it():
    script = """
        import json, sys
        from deploykit.environment import environment
        found = environment()
        assert not {"tensorflow", "keras", "onnx", "onnxruntime"} & set(sys.modules)
        print(json.dumps(found, allow_nan=False))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert set(found) == {"python", "platform", "cpu", "cores", "physical_cores", "packages"}
    assert found["packages"]["onnx"] == onnx.__version__
    assert 1 <= found["physical_cores"] <= found["cores"]


@pytest.mark.parametrize(
    ("text", "cores"), [("200000 100000", 2), ("150000 100000\n", 1.5), ("max 100000", math.inf), ("", math.inf)]
)
def test_a_containers_quota_bounds_the_cores(text, cores):
    assert environment.quota(text) == cores


@linux
def test_peak_memory_is_not_inherited_from_the_parent():
    child = "from deploykit.environment import peak_rss_bytes; print(peak_rss_bytes())"
    parent = f"""
        import subprocess, sys
        ballast = bytearray(400_000_000)
        subprocess.run([sys.executable, "-c", {child!r}], check=True)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(parent)], capture_output=True, text=True, check=True)
    assert 1e6 < int(done.stdout) < 200e6
