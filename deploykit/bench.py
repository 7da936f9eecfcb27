"""How fast: every candidate in processes of its own, in turns, judged by ratios.

One process each, because the thread pools of two sessions in one process disturb each other (the same file
took 4.4 ms alone and 11.7 ms as second session). In turns, because a shared machine drifts by a factor of two
within a minute: a round measures every candidate once, one after the other, and drift that is slower than a
round cancels in the ratio.

    round 1    A B C        the order is drawn at random (``seed``) ...
    round 2    C B A        ... and mirrored, so that nobody has always the same place or neighbour

A block is what one candidate does in one round: one run that is not timed, then as many as fill ``BLOCK_S``,
at least 3. The other processes are stopped meanwhile (SIGSTOP): threads that spin while they wait for work
(ONNX Runtime's do, for more than 50 ms) would take the cores from the one that is measured.

A process keeps the memory layout it got, and with it a few percent of speed: within two processes of the *same*
18 µs file, rounds agree to 1 %, and the ratio of the two is anything from 0.97 to 1.01. Rounds cannot average
that out, only fresh processes can. So with L = ``LUCK``:

    stage 1    one process each; every pair's interval, over rounds, is widened by L on both sides
    stage 2    candidates of a pair that stage 1 leaves undecided get fresh processes, until there are 6 of each;
               the pair's interval is then over processes (one value for each: the ratio over its rounds)

With 6 values the interval is their whole range (1 - 2/2^6 = 97 %); from 9 on, one disturbed process does not count.
On a busy machine a file was called different from itself in 1 of 24 trials; from one process each, unwidened, in
6 of 8.
A candidate that is three times slower than
the others is started once, however slow its runtime's import is.

Every batch size gets fresh processes too, so that memory and caches of one do not show in the other. A candidate
that cannot load or run, dies or hangs stays in the report with the reason; the others go on. Raw samples are
kept; medians, intervals and verdicts are `deploykit.stats`'.

Limits. ``load_ms`` finds the file in the system's cache as it is. Runtimes run on the CPU: GPUs are hidden from
the workers. Stopping needs Linux; elsewhere blocks start while another process may still spin.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from deploykit import environment
from deploykit.errors import DataError, InputError
from deploykit.runtimes import RUNTIMES, runtime_for
from deploykit.stats import MIN_ROUNDS, Latency, Ratio

__all__ = ["BenchReport", "Candidate", "Comparison", "Progress", "Timing", "bench"]

Array = npt.NDArray[Any]
Rounds = tuple[tuple[float, ...], ...]

BLOCK_S = 0.03
BLOCK_RUNS = (3, 1000)  # at least, at most
LUCK = 1.10  # two processes of one file may differ by this factor
PROCESSES = MIN_ROUNDS  # as many as an interval over processes needs


@dataclass(frozen=True)
class _Stage:
    """How long one set of processes is measured: a share of the time, and bounds for its rounds.

    Even, because rounds come in mirrored pairs.
    """

    share: float
    least: int
    most: int


FIRST, LATER = _Stage(1 / 2, 10, 30), _Stage(1 / 10, 4, 6)  # 5 of the second after the first: 60 rounds at most

TIMEOUT_S = 300.0  # for any one answer of a worker

DRIFT_LIMIT = 1.10  # last quarter of the rounds over the first, or its inverse
SPREAD_LIMIT = 0.20  # interquartile range of the rounds' medians over their median
FEW_ROUNDS = 20

# How a runtime is called in a candidate's name: what is run is not always what people expect.
TITLES = {"keras": "keras (tf.function)"}


@dataclass(frozen=True)
class Candidate:
    """Something to be timed. ``threads`` None: what `bench` was given. ``options``: for loading a Keras file."""

    name: str
    model: str | os.PathLike[str]
    runtime: str
    threads: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: str | os.PathLike[str], runtime: str | None = None, *, threads: int | None = None) -> Candidate:
        """A candidate named after its file and runtime; the runtime is found by the file's kind if not given."""
        runtime = runtime_for(model) if runtime is None else runtime
        return cls(f"{Path(model).name}, {TITLES.get(runtime, runtime)}", model, runtime, threads)


@dataclass(frozen=True)
class Progress:
    """What happens next: ``phase`` is "load", "warm" or "round".

    ``rounds`` of at most ``limit`` are done by the candidate's processes number ``process``, counted from 1.
    """

    candidate: str
    batch: int
    phase: str
    rounds: int
    limit: int
    process: int


@dataclass(frozen=True)
class Timing:
    """What was measured for one candidate at one batch size.

    ``processes_s``: the samples, in seconds, of each round of each process; empty where ``failed`` says why.
    ``input_shapes`` include the batch. ``load_s`` is the median over processes, ``peak_rss_bytes`` the largest.
    """

    candidate: Candidate
    batch: int
    threads: int
    input_shapes: Mapping[str, tuple[int, ...]]
    size_bytes: int | None
    processes_s: tuple[Rounds, ...] = ()
    load_s: float | None = None
    peak_rss_bytes: int | None = None
    settled: bool = True
    failed: str | None = None

    @property
    def rounds_s(self) -> Rounds:
        """The rounds of all processes, one after the other."""
        return tuple(samples for rounds in self.processes_s for samples in rounds)

    @property
    def latency(self) -> Latency | None:
        """Of all single runs together; None where the candidate failed."""
        return Latency.of([sample for samples in self.rounds_s for sample in samples]) if self.rounds_s else None

    @property
    def medians_s(self) -> list[float]:
        """The median of each round."""
        return [float(np.median(samples)) for samples in self.rounds_s]

    @property
    def drift(self) -> float | None:
        """The last quarter of the rounds over the first: 1.2 means that it became 20 % slower."""
        medians = self.medians_s
        quarter = len(medians) // 4
        return float(np.median(medians[-quarter:]) / np.median(medians[:quarter])) if quarter else None

    @property
    def spread(self) -> float | None:
        """Interquartile range of the rounds' medians over their median."""
        if not self.rounds_s:
            return None
        low, middle, high = np.percentile(self.medians_s, [25, 50, 75])
        return float((high - low) / middle)

    def to_json(self) -> dict[str, Any]:
        """A row of ``candidates`` in ``deploykit.bench/1``."""
        latency = self.latency
        empty = dict.fromkeys(("median", "p90", "p99", "p99_9", "min"))
        return {
            "name": self.candidate.name,
            "model": os.fspath(self.candidate.model),
            "runtime": self.candidate.runtime,
            "batch": self.batch,
            "threads": self.threads,
            "input_shapes": {name: list(shape) for name, shape in self.input_shapes.items()},
            "latency_ms": empty if latency is None else latency.to_json(),
            "throughput": None if latency is None else self.batch / latency.median * 1e3,
            "load_ms": None if self.load_s is None else self.load_s * 1e3,
            "peak_rss_bytes": self.peak_rss_bytes,
            "size_bytes": self.size_bytes,
            "processes": len(self.processes_s),
            "rounds": len(self.rounds_s),
            "runs": sum(map(len, self.rounds_s)),
            "noise": {"drift": self.drift, "spread": self.spread, "warm_up_settled": self.settled},
            "samples_s": [[list(samples) for samples in rounds] for rounds in self.processes_s],
            "failed": self.failed,
        }


@dataclass(frozen=True)
class Comparison:
    """Latency of a over latency of b; the verdict is said of a. Without a ratio, ``reason`` says why."""

    a: str
    b: str
    batch: int
    threads: int | None  # None where the two differ
    ratio: Ratio | None
    reason: str | None

    @property
    def verdict(self) -> str:
        return "undecided" if self.ratio is None else self.ratio.verdict

    def to_json(self) -> dict[str, Any]:
        """A row of ``comparisons`` in ``deploykit.bench/1``."""
        numbers = {"ratio": None, "ci95": None, "verdict": self.verdict} if self.ratio is None else self.ratio.to_json()
        return {
            "a": self.a,
            "b": self.b,
            "batch": self.batch,
            "threads": self.threads,
            **numbers,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class BenchReport:
    """All timings, by batch size and then in the order of the candidates."""

    timings: tuple[Timing, ...]
    notices: tuple[str, ...]

    def timing(self, name: str, batch: int | None = None) -> Timing:
        """The one of this name (and batch, where there are several). Raises InputError where there is none."""
        found = [t for t in self.timings if t.candidate.name == name and batch in (None, t.batch)]
        if len(found) != 1:
            have = ", ".join(f"{t.candidate.name} at batch {t.batch}" for t in self.timings)
            raise InputError(f"{len(found)} timings are called {name!r} at batch {batch}; there are: {have}")
        return found[0]

    def comparison(self, a: str, b: str, batch: int | None = None) -> Comparison:
        """Any two candidates at one batch size, said of ``a``."""
        return _compare(self.timing(a, batch), self.timing(b, batch))

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Every pair once, for each batch and number of threads: the one listed later, said of the earlier one."""
        return tuple(
            _compare(later, earlier)
            for place, later in enumerate(self.timings)
            for earlier in self.timings[:place]
            if (earlier.batch, earlier.threads) == (later.batch, later.threads)
        )

    def to_json(self) -> dict[str, Any]:
        """What ``deploykit.bench/1`` has beyond every report's envelope."""
        return {
            "candidates": [timing.to_json() for timing in self.timings],
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
            "notices": list(self.notices),
        }


def _compare(a: Timing, b: Timing) -> Comparison:
    threads = a.threads if a.threads == b.threads else None
    names = (a.candidate.name, b.candidate.name, a.batch, threads)
    failed = [t.candidate.name for t in (a, b) if t.failed is not None]
    if failed:
        return Comparison(*names, None, f"{' and '.join(failed)} could not be measured")
    ratio = _ratio(a.processes_s, b.processes_s)
    return Comparison(*names, ratio, ratio.reason)


def _ratio(a: Sequence[Rounds], b: Sequence[Rounds]) -> Ratio:
    """Over processes where there are enough of both, else over rounds and widened; see the module's docstring."""
    pairs = list(zip(a, b, strict=False))  # a candidate that was decided early has fewer
    if len(pairs) >= MIN_ROUNDS:
        return Ratio.of([[Ratio.of(*pair).ratio] for pair in pairs], [[1.0]] * len(pairs))
    found = Ratio.of(*(list(itertools.chain(*side)) for side in zip(*pairs, strict=True)))
    if found.low is None or found.high is None:
        return found
    low, high = found.low / LUCK, found.high * LUCK
    verdict = "faster" if high < 1 else "slower" if low > 1 else "undecided"
    doubt = f"one pair of processes may differ by {LUCK - 1:.0%} by luck" if verdict == "undecided" else None
    return dataclasses.replace(found, low=low, high=high, verdict=verdict, reason=doubt)


def bench(
    candidates: Sequence[Candidate],
    inputs: Mapping[str, Array],
    *,
    batches: Sequence[int] = (1,),
    threads: int | None = None,
    seconds: float = 4.0,
    seed: int = 0,
    processes: int = PROCESSES,
    focus: str | None = None,
    timeout: float = TIMEOUT_S,
    progress: Callable[[Progress], None] | None = None,
) -> BenchReport:
    """Time every candidate at every batch size, side by side.

    ``inputs`` are samples by input name, axis 0 counting them; they are repeated or cut to each batch size.
    ``threads`` (default: the physical cores this process may use) holds for candidates that do not say
    otherwise. ``seconds`` is the most that each candidate runs at each batch size, loading and warm-up not
    counted (but 10 rounds are always measured); ``processes`` the most that are started for it: with less
    than 6, differences of a few percent stay undecided. ``focus`` names the candidate whose pairs alone are
    worth more processes (None: every pair is). ``timeout``, in seconds, is how long a worker may
    take for any one answer. ``seed`` draws the order within rounds. ``progress`` is called before each
    step, while nothing is being timed.

    Raises InputError or DataError for a request that makes no sense; a candidate that fails is a row of
    the report. No process outlives the call, whatever ends it.
    """
    threads = environment.physical_cores() if threads is None else threads
    _refuse_nonsense(candidates, inputs, batches, threads, seconds, timeout, processes, seed)
    notices = list(_busy())
    timings: list[Timing] = []
    with tempfile.TemporaryDirectory(prefix="deploykit-bench-") as name:
        folder = Path(name)
        for batch in batches:
            feed = {key: _of_batch(np.asarray(array), batch) for key, array in inputs.items()}
            np.savez(folder / "inputs.npz", **feed)  # type: ignore[arg-type]  # a name is never allow_pickle's
            shapes = {key: array.shape for key, array in feed.items()}
            lanes = [_Lane(candidate, batch, candidate.threads or threads, folder, timeout) for candidate in candidates]
            _measure(lanes, processes, focus, seconds, seed, progress or (lambda next_step: None))
            timings += [lane.timing(shapes) for lane in lanes]
    for timing in timings:
        notices += _noise(timing)
    return BenchReport(tuple(timings), tuple(notices))


def _refuse_nonsense(
    candidates: Sequence[Candidate],
    inputs: Mapping[str, Array],
    batches: Sequence[int],
    threads: int,
    seconds: float,
    timeout: float,
    processes: int,
    seed: int,
) -> None:
    names = [candidate.name for candidate in candidates]
    if not candidates:
        raise InputError("nothing to measure; give at least one candidate")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"several candidates are called {', '.join(twice)}; give each a name of its own")
    if unknown := sorted({c.runtime for c in candidates if c.runtime not in RUNTIMES}):
        raise InputError(f"unknown runtime {', '.join(unknown)}; known are {', '.join(RUNTIMES)}")
    if not batches or min(batches) < 1 or len(set(batches)) < len(batches):
        raise InputError(f"batch sizes are {list(batches)}; give different numbers from 1 on")
    if lacking := [count for count in (threads, *(c.threads for c in candidates)) if count is not None and count < 1]:
        raise InputError(f"threads must be at least 1, not {lacking[0]}")
    for option, number, least in (("processes", processes, 1), ("seed", seed, 0)):
        if number < least:
            raise InputError(f"{option} must be at least {least}, not {number}")
    for option, value in (("seconds", seconds), ("timeout", timeout)):
        if not 0 < value < math.inf:
            raise InputError(f"{option} is {value}; give a positive number")
    if not inputs:
        raise DataError("no input data; give an array for every input of the model")
    for name, array in inputs.items():
        if np.ndim(array) == 0 or len(array) == 0:
            raise DataError(f"input {name} has no samples; axis 0 must count them")
        if np.asarray(array).dtype.hasobject:
            raise DataError(f"input {name} holds Python objects; convert it to an array of numbers")


def _of_batch(array: Array, batch: int) -> Array:
    """So many samples, repeating from the first when there are too few."""
    return np.ascontiguousarray(array[np.arange(batch) % len(array)])


# ------------------------------------------------------------------------------------------------------ rounds


def schedule(count: int, seed: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The order of each round: a random one, its mirror image, another random one, its mirror image, ..."""
    random = np.random.default_rng(seed)
    while True:
        order = tuple(int(place) for place in random.permutation(count))
        yield order
        yield order[::-1]


def _measure(
    lanes: Sequence[_Lane],
    processes: int,
    focus: str | None,
    seconds: float,
    seed: int,
    tell: Callable[[Progress], None],
) -> None:
    """Both stages; when it returns or raises, no process is left."""
    for process in range(1, processes + 1):
        with contextlib.ExitStack() as stack:
            for lane in lanes:
                stack.callback(lane.close)
            _turns(lanes, process, seconds, (seed, process), tell)
        if process == 1:
            lanes = _undecided(lanes, focus)
        if not lanes:
            return


def _undecided(lanes: Sequence[_Lane], focus: str | None) -> list[_Lane]:
    """The candidates about which the first processes leave a question open that matters."""
    doubtful: set[_Lane] = set()
    for pair in itertools.combinations([lane for lane in lanes if lane.failed is None], 2):
        if focus is not None and all(lane.candidate.name != focus for lane in pair):
            continue
        if _ratio(*(lane.processes_s for lane in pair)).verdict == "undecided":
            doubtful.update(pair)
    return [lane for lane in lanes if lane in doubtful]


def _turns(
    lanes: Sequence[_Lane],
    process: int,
    seconds: float,
    seed: Sequence[int],
    tell: Callable[[Progress], None],
) -> None:
    """Start a process for each candidate, warm it up, and measure rounds while the stage's time lasts."""

    stage = FIRST if process == 1 else LATER

    def take(lane: _Lane, phase: str, rounds: int) -> None:
        if lane.failed is None:
            tell(Progress(lane.candidate.name, lane.batch, phase, rounds, stage.most, process))
            getattr(lane, phase)()

    for place in next(schedule(len(lanes), seed)):  # who starts first could matter
        take(lanes[place], "load", 0)
        take(lanes[place], "warm", 0)
    begin = time.perf_counter()
    for done, order in enumerate(schedule(len(lanes), (*seed, 1))):
        alive = sum(lane.failed is None for lane in lanes)
        spent = time.perf_counter() - begin >= seconds * stage.share * alive
        if not alive or done == stage.most or (done >= stage.least and done % 2 == 0 and spent):
            return
        for place in order:
            take(lanes[place], "round", done)


class _Lane:
    """One candidate at one batch size: its worker, and what it answered so far."""

    def __init__(self, candidate: Candidate, batch: int, threads: int, folder: Path, timeout: float) -> None:
        self.candidate, self.batch, self.threads = candidate, batch, threads
        self.failed: str | None = None
        self._folder, self._timeout = folder, timeout
        self._worker: _Worker | None = None
        self._processes: list[list[tuple[float, ...]]] = []
        self._loads_s: list[float] = []
        self._peak: int | None = None
        self._settled, self._runs = True, BLOCK_RUNS[0]

    @property
    def processes_s(self) -> tuple[Rounds, ...]:
        return tuple(map(tuple, self._processes))

    def load(self) -> None:
        handle, log = tempfile.mkstemp(suffix=".log", dir=self._folder)
        with open(handle, "wb") as stream:
            self._worker = _Worker(stream, Path(log))
        answer = self._ask(
            "load",
            runtime=self.candidate.runtime,
            model=os.path.abspath(self.candidate.model),
            threads=self.threads,
            inputs=str(self._folder / "inputs.npz"),
            batch=self.batch,
            options=dict(self.candidate.options),
        )
        if answer is not None:
            self._loads_s.append(answer["load_s"])
            self._processes.append([])

    def warm(self) -> None:
        answer = self._ask("warm")
        if answer is not None:
            least, most = BLOCK_RUNS
            self._runs = min(most, max(least, math.ceil(BLOCK_S / answer["median_s"])))
            self._settled &= answer["settled"]
            self._grew(answer)

    def round(self) -> None:
        answer = self._ask("run", runs=self._runs)
        if answer is not None:
            self._processes[-1].append(tuple(answer["samples_s"]))
            self._grew(answer)

    def _grew(self, answer: Mapping[str, Any]) -> None:
        found: int | None = answer["peak_rss_bytes"]
        if found is not None:
            self._peak = max(found, self._peak or 0)

    def _ask(self, verb: str, **arguments: Any) -> dict[str, Any] | None:
        """The worker's answer; None, with the reason in ``failed`` and no process left, where there is none."""
        if self._worker is None or self.failed is not None:
            return None
        try:
            return self._worker.ask(verb, self._timeout, arguments)
        except _NoAnswerError as error:
            self.failed = " ".join(str(error).split())
            self.close()
            return None

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()

    def timing(self, shapes: Mapping[str, tuple[int, ...]]) -> Timing:
        return Timing(
            self.candidate,
            self.batch,
            self.threads,
            shapes,
            size_bytes(self.candidate.model),
            () if self.failed else self.processes_s,
            float(np.median(self._loads_s)) if self._loads_s else None,
            self._peak,
            self._settled,
            self.failed,
        )


# ---------------------------------------------------------------------------------------------------- processes


class _NoAnswerError(Exception):
    """A worker failed, died or took too long; the message is the reason, in words."""


# The worker finds modules where this process finds them, and nowhere else: not in the current folder.
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from deploykit.runtimes.worker import main; main()"

_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}  # the second hides GPUs: these are CPU timings


class _Worker:
    """A process of `deploykit.runtimes.worker`, stopped whenever it has nothing to answer."""

    def __init__(self, log: Any, log_path: Path) -> None:
        self._log_path = log_path
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **_QUIET},
            start_new_session=True,  # Ctrl-C goes to this process, which ends the workers in order
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        with stream:
            for line in stream:
                self._answers.put(line.decode("ascii", "replace"))
        self._answers.put("")  # the end

    def ask(self, verb: str, timeout: float, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Let the process run until it has answered. Raises _NoAnswerError, with the reason, where it does not."""
        stream = self._process.stdin
        assert stream is not None
        try:
            self._resume()
            stream.write(json.dumps({"do": verb, **arguments}).encode("ascii") + b"\n")
            stream.flush()
            line = self._answers.get(timeout=timeout)
        except OSError:
            line = ""  # it is gone
        except queue.Empty:
            raise _NoAnswerError(f"no answer to {verb} within {timeout:g} s; the worker was ended") from None
        if not line:
            raise _NoAnswerError(self._death(verb))
        self._stop()
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise _NoAnswerError(f"unreadable answer to {verb}: {line[:100]!r}") from None
        if "failed" in answer:
            raise _NoAnswerError(str(answer["failed"]))
        return answer

    # Only on Linux is a stopped process sure to die with its parent (see the worker).

    def _resume(self) -> None:
        if sys.platform == "linux":
            self._process.send_signal(signal.SIGCONT)

    def _stop(self) -> None:
        if sys.platform == "linux":
            self._process.send_signal(signal.SIGSTOP)
            with contextlib.suppress(ChildProcessError):  # it died; the next command finds out
                os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _death(self, verb: str) -> str:
        code = self._process.wait()
        lines = self._log_path.read_text("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        if code < 0:
            cause = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            hint = " (out of memory?)" if cause == "SIGKILL" else ""
            return f"the worker was killed by {cause}{hint} during {verb}"
        return f"the worker ended with code {code} during {verb}: {last[:200]}"

    def close(self) -> None:
        """End the process at once, stopped or not, and reap it."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()


# -------------------------------------------------------------------------------------------------------- files


def size_bytes(model: str | os.PathLike[str]) -> int | None:
    """Bytes of a model on disk, with an ONNX file's external data; None where there is no file."""
    path = Path(model)
    if path.is_dir():
        return sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
    if not path.is_file():
        return None
    parts = {path.resolve()}
    if path.suffix.lower() == ".onnx":
        parts |= {(path.parent / name).resolve() for name in _external(path)}
    return sum(part.stat().st_size for part in parts if part.is_file())


def _external(path: Path) -> set[str]:
    """The files, relative to the model's folder, that an ONNX model keeps tensors in."""
    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
    except Exception:  # not a model; its runtime will say so
        return set()
    return {
        entry.value
        for tensor in _tensors(model.graph)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


# -------------------------------------------------------------------------------------------------------- noise


def _busy() -> Iterator[str]:
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # not on every system
        return
    count = environment.cores()
    if load > count:
        yield f"load average is {load:.1f} on {count} cores: other programs are computing; timings are noisy"


# One row per symptom: when it is one, and how it is said.
_SYMPTOMS: tuple[tuple[Callable[[Timing], bool], Callable[[Timing], str]], ...] = (
    (lambda t: not t.settled, lambda t: "the warm-up did not settle"),
    (
        lambda t: 0 < len(t.rounds_s) < FEW_ROUNDS,
        lambda t: f"only {len(t.rounds_s)} rounds fitted into the time; more seconds narrow the interval",
    ),
    (
        lambda t: t.drift is not None and not 1 / DRIFT_LIMIT <= t.drift <= DRIFT_LIMIT,
        lambda t: f"the last quarter of the rounds took {t.drift:.2f}x the first; trust ratios, not milliseconds",
    ),
    (
        lambda t: t.spread is not None and t.spread > SPREAD_LIMIT,
        lambda t: f"the rounds' medians spread by {t.spread:.0%}; close other programs and measure again",
    ),
)


def _noise(timing: Timing) -> Iterator[str]:
    """What the samples themselves say about how far they can be trusted."""
    if timing.failed is None:
        for shows, text in _SYMPTOMS:
            if shows(timing):
                yield f"{timing.candidate.name} at batch {timing.batch}: {text(timing)}"
