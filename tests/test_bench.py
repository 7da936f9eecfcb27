"""Timings from processes of their own: what is claimed, what is only shown, and what is left behind."""

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
from deploykit.bench import LUCK, BenchReport, Candidate, Progress, Timing, _noise, _of_batch, _ratio, bench, schedule
from deploykit.bench import size_bytes as size_of
from deploykit.errors import DataError, InputError
from deploykit.runtimes import worker

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
    *("size_bytes", "rounds", "runs", "failed"),
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

    listed = [Candidate.of(tmp_path / "net.keras", threads=1), Candidate.of(tmp_path / "net.onnx", threads=1)]
    found = bench(listed, X, seconds=0.5, processes=1, progress=look)
    report = json.loads(json.dumps(found.to_json(), allow_nan=False))

    assert [c["name"] for c in report["candidates"]] == ["net.keras, keras (tf.function)", "net.onnx, onnxruntime-cpu"]
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
        assert row["load_ms"] > 0
    keras_row, onnx_row = report["candidates"]
    assert onnx_row["peak_rss_bytes"] < 200e6 < keras_row["peak_rss_bytes"]
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


def test_a_file_ties_with_itself(small):
    found = bench([Candidate("a", small, ORT), Candidate("b", small, ORT)], X, threads=1, seconds=0.4)
    (comparison,) = found.comparisons
    assert [len(t.processes_s) for t in found.timings] == [6, 6]  # within 10 %: asked again in fresh processes
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
import numpy as np, sys
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
        ["median_s", "peak_rss_bytes", "runs", "settled"],
        ["peak_rss_bytes", "samples_s"],
    ]
    assert len(answers[-1]["samples_s"]) == 4
    assert done.stderr.count("chatter") == 3
    assert done.returncode == 0


def test_a_steady_model_settles_and_a_drifting_one_is_bounded():
    pause = [0.004]

    def slower_and_slower() -> None:
        pause[0] *= 1.1
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
    ("one process cannot tell 5 %", [1.05], [1.0], "undecided"),
    ("one process tells 20 %", [1.20], [1.0], "slower"),
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


def timing(processes, settled=True) -> Timing:
    return Timing(Candidate("a", "m.onnx", ORT), 1, 1, {}, None, tuple(processes), settled=settled)


NOISE = [
    ([rounds(1.0, 30)], True, None),
    ([rounds(1.0, 30)], False, "warm-up did not settle"),
    ([rounds(1.0, 10)], True, "only 10 rounds"),
    ([rounds(1.0, 15), rounds(1.2, 15)], True, "1.20x the first"),
    ([rounds(1.0, 1), rounds(1.5, 1)] * 16, True, "spread by"),
]


@pytest.mark.parametrize(("processes", "settled", "notice"), NOISE)
def test_noise_is_said(processes, settled, notice):
    said = list(_noise(timing(processes, settled)))
    assert len(said) == (notice is not None)
    assert notice is None or notice in said[0]
    assert timing(processes, settled).to_json()["noise"]["warm_up_settled"] == settled


def test_candidates_with_other_threads_are_compared_only_when_asked():
    a, b = timing([rounds(1.0)]), timing([rounds(2.0)])
    b = Timing(Candidate("b", "m.onnx", ORT, 2), 1, 2, {}, None, b.processes_s)
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
