"""How fast: every candidate in processes of its own, in turns, judged by ratios.

One process each, because the thread pools of two sessions in one process disturb each other (the same file
took 4.4 ms alone and 11.7 ms as second session). In turns, because a shared machine drifts by a factor of two
within a minute: a round measures every candidate once, one after the other, and drift that is slower than a
round cancels in the ratio.

    round 1    A B C        the order is drawn at random (``seed``) ...
    round 2    C B A        ... and mirrored, so that nobody has always the same place or neighbour

A block is what one candidate does in one round: one run that is not timed, then as many as fill ``BLOCK_S``,
at least 3. The other processes are stopped meanwhile (`deploykit.runtimes.process`).

A process keeps the memory layout it got, and with it a few percent of speed (`deploykit.stats`, ``LUCK``), so:

    stage 1    one process each; every pair's interval, over rounds, is widened by ``LUCK`` on both sides
    stage 2    candidates of a pair that stage 1 leaves undecided get fresh processes, until there are 7 of each;
               the pair's interval is then over processes (one value for each: the ratio over its rounds)

A candidate that is three times slower than the others is started once, however slow its runtime's import is.

A setting is a batch size, a number of threads and a size of the inputs. Every setting gets fresh processes too, so
that memory and caches of one do not show in the other, and only candidates in the same setting are compared. A
candidate that cannot load or run, dies or hangs stays in the report with the reason; the others go on. Raw samples
are kept; medians, intervals and verdicts are `deploykit.stats`'.

What makes a number doubtful is data, too: ``warnings``, of which `deploykit.noise` knows those of the machine.

    busy, other_load, steal, frequency      other programs, the hypervisor, the processors' clock
    unsettled, drift, spread                what the samples themselves show
    few_rounds, few_samples                 wide intervals, percentiles that are null
    oversubscribed                          more threads than cores
    denormals                               numbers below 1.2e-38, on which a processor may be a hundred times slower

A candidate of ONNX Runtime's CPU may bring the settings of its session (`deploykit.verify.SessionSettings`), which then
say all about it, threads too; `deploykit.tuning` compares them so.

Denormals are looked for on request, in the first setting, on ONNX Runtime's CPU: a fresh process whose session
flushes them to zero takes ``FLUSH_ROUNDS`` short rounds with the candidate's own; warned is where it is faster in each
of them by more than ``LUCK``.

A file in NCHW (`deploykit.layout`) is given the same images, transposed before anything is timed.

Limits. ``load_ms`` and ``cold_start_ms`` (from the start of the process to its first answer, the imports included)
find the files in the system's cache as they are. Runtimes of the CPU run with GPUs hidden from them; what is timed of a
GPU's is said in `deploykit.runtimes.worker`. Stopping needs Linux; elsewhere blocks start while another process may
still spin.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from deploykit import environment, layout, verify
from deploykit.errors import DataError, InputError
from deploykit.noise import Doubt, Watch, busy
from deploykit.runtimes import RUNTIMES, runtime_for
from deploykit.runtimes.process import NoAnswerError, Process
from deploykit.runtimes.trained import is_nchw
from deploykit.stats import LUCK, Latency, Ratio
from deploykit.verify import SessionSettings

__all__ = ["BenchReport", "Candidate", "Comparison", "Progress", "Timing", "bench"]

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
Rounds = tuple[tuple[float, ...], ...]

BLOCK_S = 0.03
BLOCK_RUNS = (3, 1000)  # at least, at most
PROCESSES = 7  # one more than an interval over processes needs: one that was disturbed does not set its end alone


@dataclass(frozen=True)
class _Stage:
    """How long one set of processes is measured: a share of the time, and bounds for its rounds.

    Even, because rounds come in mirrored pairs.
    """

    share: float
    least: int
    most: int


FIRST, LATER = _Stage(0.4, 10, 30), _Stage(0.1, 4, 10)  # 6 of the second after the first

MOST_BATCH = 2**31 - 1  # more are a mistake
TIMEOUT_S = 300.0  # for any one answer of a worker

DRIFT_LIMIT = 1.10  # last quarter of the rounds over the first, or its inverse
SPREAD_LIMIT = 0.20  # interquartile range of the rounds' medians over their median
FEW_ROUNDS = 20
FEW_RUNS = 100  # fewer have no p99
FREQUENCY_LIMIT = 1.10  # the 90th percentile of the rounds' clocks over the 10th

INPUTS = {False: "inputs.npz", True: "inputs-nchw.npz"}  # what a worker reads; True: for files in NCHW

FLUSH_ROUNDS = 3
FLUSH_S = 0.01
SETTABLE = "onnxruntime-cpu"  # the runtime whose sessions have settings, one of which flushes denormals to zero

TRANSFERS = ("to_device", "from_device")

# How a runtime is called in a candidate's name: what is run is not always what people expect.
TITLES = {"keras": "keras (tf.function)"}


@dataclass(frozen=True)
class Candidate:
    """Something to be timed. ``threads`` None: what `bench` was given. ``options``: for loading a Keras file.

    ``session`` takes the place of ``threads``; where it leaves them to ONNX Runtime, a report says `bench`'s.
    """

    name: str
    model: str | os.PathLike[str]
    runtime: str
    threads: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    session: SessionSettings | None = None

    @property
    def own_threads(self) -> int | None:
        """What it says itself."""
        return self.threads if self.session is None else self.session.threads

    @classmethod
    def of(cls, model: str | os.PathLike[str], runtime: str | None = None, *, threads: int | None = None) -> Candidate:
        """Named after its file or bundle and its runtime, which is found by the file's kind if not given."""
        inside = Path(model) / "model.onnx"
        file = inside if (Path(model) / verify.MANIFEST).is_file() else model
        runtime = runtime_for(file) if runtime is None else runtime
        return cls(f"{Path(model).name}, {TITLES.get(runtime, runtime)}", file, runtime, threads)


@dataclass(frozen=True)
class Progress:
    """What happens next: ``phase`` is "load", "warm", "round" or "flush" (the search for denormals).

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
    """What was measured for one candidate in one setting.

    ``processes_s``: the samples, in seconds, of each round of each process; empty where ``failed`` says why.
    ``input_shapes`` include the batch, ``size`` does not. ``load_s`` and ``cold_start_s`` are medians over processes,
    ``peak_rss_bytes`` is the largest. ``megahertz``: what the processor ran at after each round, where the system
    tells. ``denormals``: how many times as fast it is when denormals are zero; None where that makes no difference
    beyond luck, or was not tried. ``beside_s``: of a GPU's runtime samples of what comes on top of a run, by name.
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
    cold_start_s: float | None = None
    megahertz: tuple[float, ...] = ()
    denormals: float | None = None
    beside_s: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def size(self) -> str:
        """The inputs' sizes without the batch: "224x224x3"; with their names where there are several."""
        return _size(self.input_shapes)

    @property
    def setting(self) -> tuple[int, int, str]:
        """What must be equal for two timings to be compared."""
        return self.batch, self.threads, self.size

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

    @property
    def clock_range(self) -> tuple[float, float] | None:
        """Slow and fast clock of the processor in MHz: the 10th and 90th percentile over the rounds."""
        if not self.megahertz:
            return None
        slow, fast = np.percentile(self.megahertz, [10, 90])
        return float(slow), float(fast)

    @property
    def beside_ms(self) -> dict[str, float]:
        """Medians of ``beside_s``; empty where inputs and outputs have no way to go."""
        return {name: float(np.median(samples)) * 1e3 for name, samples in self.beside_s.items()}

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
            "session": None if self.candidate.session is None else self.candidate.session.to_json(),
            "size": self.size,
            "input_shapes": {name: list(shape) for name, shape in self.input_shapes.items()},
            "latency_ms": empty if latency is None else latency.to_json(),
            "throughput": None if latency is None else self.batch / latency.median * 1e3,
            "transfers_ms": {name: self.beside_ms[name] for name in TRANSFERS} if self.beside_s else None,
            "end_to_end_ms": self.beside_ms.get("end_to_end"),
            "cold_start_ms": None if self.cold_start_s is None else self.cold_start_s * 1e3,
            "load_ms": None if self.load_s is None else self.load_s * 1e3,
            "peak_rss_bytes": self.peak_rss_bytes,
            "size_bytes": self.size_bytes,
            "processes": len(self.processes_s),
            "rounds": len(self.rounds_s),
            "runs": sum(map(len, self.rounds_s)),
            "noise": {
                "drift": self.drift,
                "spread": self.spread,
                "warm_up_settled": self.settled,
                "megahertz": None if self.clock_range is None else list(self.clock_range),
                "denormals": self.denormals,
            },
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
    size: str = ""

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
            "size": self.size,
            **numbers,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class BenchReport:
    """All timings, by setting and then in the order of the candidates, and what makes them doubtful."""

    timings: tuple[Timing, ...]
    warnings: tuple[Doubt, ...] = ()

    @property
    def notices(self) -> tuple[str, ...]:
        """The warnings, as people read them."""
        return tuple(warning.text for warning in self.warnings)

    def timing(
        self, name: str, batch: int | None = None, threads: int | None = None, size: str | None = None
    ) -> Timing:
        """The one of this name (and setting, where there are several). Raises InputError where there is none."""
        wanted = (batch, threads, size)
        found = [
            timing
            for timing in self.timings
            if timing.candidate.name == name
            and all(want in (None, have) for want, have in zip(wanted, timing.setting, strict=True))
        ]
        if len(found) != 1:
            have = ", ".join(f"{t.candidate.name} at {_spelled(t)}" for t in self.timings)
            said = f"batch {batch}, threads {threads}, size {size}"
            raise InputError(f"{len(found)} timings are called {name!r} at {said}; there are: {have}")
        return found[0]

    def comparison(
        self, a: str, b: str, batch: int | None = None, threads: int | None = None, size: str | None = None
    ) -> Comparison:
        """Any two candidates in one setting, said of ``a``."""
        return _compare(self.timing(a, batch, threads, size), self.timing(b, batch, threads, size))

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Every pair once, for each setting: the one listed later, said of the earlier one."""
        return tuple(
            _compare(later, earlier)
            for place, later in enumerate(self.timings)
            for earlier in self.timings[:place]
            if earlier.setting == later.setting
        )

    def renamed(self, names: Mapping[str, str], *, last: str) -> BenchReport:
        """The same with other names for candidates, the one called ``last`` at the end of every setting."""
        timings = []
        for timing in self.timings:
            name = timing.candidate.name
            timings.append(replace(timing, candidate=replace(timing.candidate, name=names.get(name, name))))
        settings = list(dict.fromkeys(timing.setting for timing in timings))
        timings.sort(key=lambda timing: (settings.index(timing.setting), timing.candidate.name == last))
        return BenchReport(tuple(timings), self.warnings)

    def to_json(self) -> dict[str, Any]:
        """What ``deploykit.bench/1`` has beyond every report's envelope."""
        return {
            "candidates": [timing.to_json() for timing in self.timings],
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
            "warnings": [warning.to_json() for warning in self.warnings],
            "notices": list(self.notices),
        }


def _size(shapes: Mapping[str, Sequence[int]]) -> str:
    said = {name: "x".join(map(str, shape[1:])) or "scalar" for name, shape in shapes.items()}
    return next(iter(said.values())) if len(said) == 1 else ", ".join(f"{name} {size}" for name, size in said.items())


def _spelled(timing: Timing) -> str:
    plural = "" if timing.threads == 1 else "s"
    return f"batch {timing.batch}, {timing.threads} thread{plural}, size {timing.size}"


def _compare(a: Timing, b: Timing) -> Comparison:
    threads = a.threads if a.threads == b.threads else None
    names = (a.candidate.name, b.candidate.name, a.batch, threads)
    failed = [t.candidate.name for t in (a, b) if t.failed is not None]
    if failed:
        return Comparison(*names, None, f"{' and '.join(failed)} could not be measured", a.size)
    ratio = _ratio(a.processes_s, b.processes_s)
    return Comparison(*names, ratio, ratio.reason, a.size)


def _ratio(a: Sequence[Rounds], b: Sequence[Rounds]) -> Ratio:
    """Process i of a beside process i of b; a candidate that was decided early has fewer."""
    return Ratio.of_processes([list(verify.log_ratios(*pair)) for pair in zip(a, b, strict=False)])


def bench(
    candidates: Sequence[Candidate],
    inputs: Arrays | Sequence[Arrays],
    *,
    batches: Sequence[int] = (1,),
    threads: int | Sequence[int] | None = None,
    seconds: float = 4.0,
    seed: int = 0,
    processes: int = PROCESSES,
    focus: str | None = None,
    limit: float | None = None,
    denormals: bool = False,
    timeout: float = TIMEOUT_S,
    progress: Callable[[Progress], None] | None = None,
) -> BenchReport:
    """Time every candidate in every setting (size of the inputs, threads, batch), side by side.

    ``inputs`` are samples by input name, axis 0 counting them, in the trained model's layout; they are repeated or cut
    to each batch size. Several such mappings are several sizes. ``threads`` (default: the physical cores this process
    may use) holds for candidates that do not say otherwise; several are several settings. ``seconds`` is the most that
    each candidate runs in each setting, loading and warm-up not counted (but 10 rounds of the first process and 4 of
    each other are always measured); ``processes`` the most that are started for it: with less than 6, differences of a
    few percent stay undecided. ``focus`` names the candidate whose pairs alone are worth more processes (None: every
    pair is); with ``limit``, a ratio to it, processes are also started where that is in doubt. ``denormals``: look
    whether they slow a candidate, at the price of one more process each. ``timeout``, in seconds, is how long a worker
    may take for any one answer. ``seed`` draws the order within rounds. ``progress`` is called before each step, while
    nothing is being timed.

    Raises InputError or DataError for a request that makes no sense; a candidate that fails is a row of
    the report. No process outlives the call, whatever ends it.
    """
    sizes = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    counts = [environment.physical_cores()] if threads is None else [threads] if isinstance(threads, int) else threads
    _refuse_nonsense(candidates, sizes, batches, counts, focus, limit)
    _refuse_numbers(seconds, timeout, processes, seed)
    cores = environment.cores()
    warnings = list(busy(cores))
    watch, timings = Watch(), list[Timing]()
    layouts = [is_nchw(candidate.model) for candidate in candidates]
    with tempfile.TemporaryDirectory(prefix="deploykit-bench-") as name:
        folder = Path(name)
        for arrays, count, batch in itertools.product(sizes, counts, batches):
            feed = {key: _of_batch(np.asarray(array), batch) for key, array in arrays.items()}
            for turned in set(layouts):
                fed = layout.transposed(feed, layout.TO_NCHW) if turned else feed
                (folder / INPUTS[turned]).write_bytes(verify.archive(fed))
            shapes = {key: array.shape for key, array in feed.items()}
            lanes = [
                _Lane(each, batch, each.own_threads or count, folder / INPUTS[turned], timeout)
                for each, turned in zip(candidates, layouts, strict=True)
            ]
            flush = denormals and not timings
            job = _Job(processes, focus, limit, seconds, seed, flush, watch, progress or (lambda next_step: None))
            _measure(lanes, job)
            timings += [lane.timing(shapes) for lane in lanes]
    warnings += watch.warnings(cores)
    for timing in timings:
        warnings += _noise(timing)
    return BenchReport(tuple(timings), tuple(warnings))


def _refuse_nonsense(
    candidates: Sequence[Candidate],
    sizes: Sequence[Arrays],
    batches: Sequence[int],
    threads: Sequence[int],
    focus: str | None,
    limit: float | None,
) -> None:
    names = [candidate.name for candidate in candidates]
    if not candidates:
        raise InputError("nothing to measure; give at least one candidate")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"several candidates are called {', '.join(twice)}; give each a name of its own")
    if unknown := sorted({c.runtime for c in candidates if c.runtime not in RUNTIMES}):
        raise InputError(f"unknown runtime {', '.join(unknown)}; known are {', '.join(RUNTIMES)}")
    if not batches or min(batches) < 1 or max(batches) > MOST_BATCH or len(set(batches)) < len(batches):
        raise InputError(f"batch sizes are {list(batches)}; give different numbers from 1 to {MOST_BATCH}")
    own = [candidate.own_threads for candidate in candidates if _says_threads(candidate)]
    if lacking := [count for count in (*threads, *own) if count is not None and count < 1]:
        raise InputError(f"threads must be at least 1, not {lacking[0]}")
    for candidate in candidates:
        if candidate.session is not None and (candidate.runtime != SETTABLE or candidate.threads is not None):
            raise InputError(f"{candidate.name}: session settings are for {SETTABLE}, and say its threads themselves")
    if not threads or len(set(threads)) < len(threads) or (own and len(threads) > 1):
        raise InputError(f"thread counts are {list(threads)}; give different ones, and none to single candidates")
    if focus is not None and focus not in names:
        raise InputError(f"no candidate is called {focus!r}; there are: {', '.join(names)}")
    if limit is not None and (focus is None or not 0 < limit < math.inf):
        raise InputError(f"limit is {limit}; give a positive ratio, and as focus the candidate that it is to")
    if not sizes:
        raise DataError("no input data; give an array for every input of the model")
    for inputs in sizes:
        _refuse_inputs(inputs)
    if len(shapes := [_size({key: np.shape(array) for key, array in inputs.items()}) for inputs in sizes]) > len(
        set(shapes)
    ):
        raise DataError(f"the inputs' sizes are {', '.join(shapes)}; give different ones")


def _says_threads(candidate: Candidate) -> bool:
    return candidate.threads is not None or candidate.session is not None


def _refuse_inputs(inputs: Arrays) -> None:
    if not inputs:
        raise DataError("no input data; give an array for every input of the model")
    for name, array in inputs.items():
        if np.ndim(array) == 0 or len(array) == 0:
            raise DataError(f"input {name} has no samples; axis 0 must count them")
        if np.asarray(array).dtype.hasobject:
            raise DataError(f"input {name} holds Python objects; convert it to an array of numbers")


def _refuse_numbers(seconds: float, timeout: float, processes: int, seed: int) -> None:
    for option, number, least in (("processes", processes, 1), ("seed", seed, 0)):
        if number < least:
            raise InputError(f"{option} must be at least {least}, not {number}")
    for option, value in (("seconds", seconds), ("timeout", timeout)):
        if not 0 < value < math.inf:
            raise InputError(f"{option} is {value}; give a positive number")


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


@dataclass(frozen=True)
class _Job:
    """What `bench` was asked for, as far as one setting needs it; ``flush``: look for denormals."""

    processes: int
    focus: str | None
    limit: float | None
    seconds: float
    seed: int
    flush: bool
    watch: Watch
    tell: Callable[[Progress], None]


def _measure(lanes: Sequence[_Lane], job: _Job) -> None:
    """Both stages; when it returns or raises, no process is left."""
    for process in range(1, job.processes + 1):
        with contextlib.ExitStack() as stack:
            for lane in lanes:
                stack.callback(lane.close)
            _turns(lanes, process, job)
        if process == 1:
            lanes = _undecided(lanes, job)
        if not lanes:
            return


def _undecided(lanes: Sequence[_Lane], job: _Job) -> list[_Lane]:
    """The candidates about which the first processes leave a question open that matters."""
    doubtful: set[_Lane] = set()
    for pair in itertools.combinations([lane for lane in lanes if lane.failed is None], 2):
        names = [lane.candidate.name for lane in pair]
        if job.focus is not None and job.focus not in names:
            continue
        first, second = pair if names[1] == job.focus else pair[::-1]
        found = _ratio(first.processes_s, second.processes_s)
        ends = found.interval
        beyond = job.limit is not None and ends is not None and ends[0] <= job.limit <= ends[1]
        if found.verdict == "undecided" or beyond:
            doubtful.update(pair)
    return [lane for lane in lanes if lane in doubtful]


def _turns(lanes: Sequence[_Lane], process: int, job: _Job) -> None:
    """Start a process for each candidate, warm it up, and measure rounds while the stage's time lasts."""

    stage, seed = FIRST if process == 1 else LATER, (job.seed, process)

    def take(lane: _Lane, phase: str, rounds: int) -> None:
        if lane.failed is None:
            job.tell(Progress(lane.candidate.name, lane.batch, phase, rounds, stage.most, process))
            getattr(lane, phase)()

    for place in next(schedule(len(lanes), seed)):  # who starts first could matter
        take(lanes[place], "load", 0)
        take(lanes[place], "warm", 0)
    used = sum(lane.computed_s for lane in lanes)
    begin = time.perf_counter()
    with job.watch:
        for done, order in enumerate(schedule(len(lanes), (*seed, 1))):
            alive = sum(lane.failed is None for lane in lanes)
            spent = time.perf_counter() - begin >= job.seconds * stage.share * alive
            if not alive or done == stage.most or (done >= stage.least and done % 2 == 0 and spent):
                break
            for place in order:
                take(lanes[place], "round", done)
    job.watch.ours_s += sum(lane.computed_s for lane in lanes) - used
    if job.flush and process == 1:
        for lane in lanes:
            if lane.candidate.runtime == SETTABLE:
                take(lane, "flush", done)


class _Lane:
    """One candidate in one setting: its worker, and what it answered so far."""

    def __init__(self, candidate: Candidate, batch: int, threads: int, inputs: Path, timeout: float) -> None:
        self.candidate, self.batch, self.threads = candidate, batch, threads
        self.failed: str | None = None
        self.computed_s = 0.0  # the time of processors that its rounds took
        self._inputs, self._timeout = inputs, timeout
        self._worker: Process | None = None
        self._processes: list[list[tuple[float, ...]]] = []
        self._loads_s: list[float] = []
        self._cold_s: list[float] = []
        self._megahertz: list[float] = []
        self._peak: int | None = None
        self._denormals: float | None = None
        self._beside: dict[str, list[float]] = {}
        self._settled, self._median_s = True, BLOCK_S

    @property
    def processes_s(self) -> tuple[Rounds, ...]:
        return tuple(map(tuple, self._processes))

    def _started(self) -> Process:
        handle, log = tempfile.mkstemp(suffix=".log", dir=self._inputs.parent)
        with open(handle, "wb") as stream:
            return Process(stream, Path(log), gpu=RUNTIMES[self.candidate.runtime].gpu)

    def _load(self, **more: Any) -> dict[str, Any]:
        return {
            "runtime": self.candidate.runtime,
            "model": os.path.abspath(self.candidate.model),
            "threads": self.threads,
            "inputs": str(self._inputs),
            "batch": self.batch,
            "options": dict(self.candidate.options),
            "session": None if self.candidate.session is None else self.candidate.session.to_json(),
            **more,
        }

    def load(self) -> None:
        begin = time.perf_counter()
        self._worker = self._started()
        answer = self._ask("load", **self._load())
        if answer is not None:
            self._cold_s.append(time.perf_counter() - begin)
            self._loads_s.append(answer["load_s"])
            self._processes.append([])

    def warm(self) -> None:
        answer = self._ask("warm")
        if answer is not None:
            self._cold_s[-1] += answer["first_s"]
            self._median_s = answer["median_s"]
            self._settled &= answer["settled"]
            self._grew(answer)

    def round(self) -> None:
        answer = self._ask("run", runs=self._runs(BLOCK_S, BLOCK_RUNS[0]))
        if answer is not None:
            self._processes[-1].append(tuple(answer["samples_s"]))
            self.computed_s += answer["cpu_s"]
            for name, samples in answer.get("beside_s", {}).items():
                self._beside.setdefault(name, []).extend(samples)
            if answer["megahertz"] is not None:
                self._megahertz.append(answer["megahertz"])
            self._grew(answer)

    def flush(self) -> None:
        """Rounds beside a process that takes denormals for zero. One that cannot is no failure of the candidate."""
        flushed, settings = self._started(), self.candidate.session or SessionSettings(self.threads)
        try:
            settings = replace(settings, denormals_as_zero=True)
            flushed.ask("load", self._timeout, self._load(session=settings.to_json()))
            runs = {"runs": self._runs(FLUSH_S, 1)}
            pairs = [(self._ask("run", **runs), flushed.ask("run", self._timeout, runs)) for _ in range(FLUSH_ROUNDS)]
        except NoAnswerError:
            return
        finally:
            flushed.close()
        self._denormals = _slowed([(own["samples_s"], zero["samples_s"]) for own, zero in pairs if own is not None])

    def _runs(self, seconds: float, least: int) -> int:
        return min(BLOCK_RUNS[1], max(least, math.ceil(seconds / self._median_s)))

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
        except NoAnswerError as error:
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
            float(np.median(self._cold_s)) if self._cold_s and not self.failed else None,
            tuple(self._megahertz),
            self._denormals,
            {} if self.failed else {name: tuple(samples) for name, samples in self._beside.items()},
        )


def _slowed(rounds: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float | None:
    """How many times as long the first of each pair takes; None unless all do by more than luck."""
    ratios = [float(np.median(own) / np.median(zero)) for own, zero in rounds]
    return float(np.median(ratios)) if len(ratios) == FLUSH_ROUNDS and min(ratios) > LUCK else None


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


@dataclass(frozen=True)
class _Symptom:
    """A row of `_SYMPTOMS`: when it shows, and how it is said."""

    code: str
    shows: Callable[[Timing], bool]
    text: Callable[[Timing], str]


def _clock(timing: Timing) -> tuple[float, float]:
    return timing.clock_range or (1.0, 1.0)


_SYMPTOMS = (
    _Symptom("unsettled", lambda t: not t.settled, lambda t: "the warm-up did not settle"),
    _Symptom(
        "few_rounds",
        lambda t: len(t.rounds_s) < FEW_ROUNDS,
        lambda t: f"only {len(t.rounds_s)} rounds fitted into the time; more seconds narrow the interval",
    ),
    _Symptom(
        "few_samples",
        lambda t: sum(map(len, t.rounds_s)) < FEW_RUNS,
        lambda t: f"{sum(map(len, t.rounds_s))} runs are too few for p99, which needs {FEW_RUNS}; give more seconds",
    ),
    _Symptom(
        "drift",
        lambda t: t.drift is not None and not 1 / DRIFT_LIMIT <= t.drift <= DRIFT_LIMIT,
        lambda t: f"the last quarter of the rounds took {t.drift:.2f}x the first; trust ratios, not milliseconds",
    ),
    _Symptom(
        "spread",
        lambda t: t.spread is not None and t.spread > SPREAD_LIMIT,
        lambda t: f"the rounds' medians spread by {t.spread:.0%}; close other programs and measure again",
    ),
    _Symptom(
        "frequency",
        lambda t: _clock(t)[1] > FREQUENCY_LIMIT * _clock(t)[0],
        lambda t: f"the processor's clock went from {_clock(t)[0]:.0f} to {_clock(t)[1]:.0f} MHz between rounds",
    ),
    _Symptom(
        "oversubscribed",
        lambda t: t.threads > environment.cores(),
        lambda t: f"{t.threads} threads share {environment.cores()} cores; give fewer threads",
    ),
    _Symptom(
        "denormals",
        lambda t: t.denormals is not None,
        lambda t: (
            f"{t.denormals:.1f}x as fast when denormal numbers count as zero; look for weights or values below "
            "1.2e-38, or set ONNX Runtime's session.set_denormal_as_zero"
        ),
    ),
)


def _noise(timing: Timing) -> Iterator[Doubt]:
    """What the samples themselves say about how far they can be trusted."""
    if timing.failed is None:
        name = timing.candidate.name
        for row in _SYMPTOMS:
            if row.shows(timing):
                yield Doubt(row.code, f"{name} at batch {timing.batch}: {row.text(timing)}", name)
