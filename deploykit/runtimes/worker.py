"""One model in one process, driven by lines of JSON: the far end of `deploykit.bench`.

    python -m deploykit.runtimes.worker

reads one command per line on stdin and answers each with one line on stdout:

    {"do": "load", "runtime": R, "model": PATH, "threads": N, "inputs": FILE.npz, "batch": B}
                                         {"import_s": s, "load_s": s}
    {"do": "warm"}                       {"first_s": s, "median_s": s, "runs": n, "settled": bool, "peak_rss_bytes": n}
    {"do": "run", "runs": N}             {"samples_s": [s, ...], "cpu_s": s, "megahertz": f, "peak_rss_bytes": n}
    {"do": "require", "runtime": R}      {}, or why this machine cannot run a GPU's runtime
    {"do": "answer", "inputs": FILE.npz, "outputs": FILE.npz}
                                         {}; the outputs are then in the file
    {"do": "quit"}, or the end of stdin  no answer; the process ends

A command that fails is answered with {"failed": "one line"}. Stdout belongs to the protocol: file
descriptor 1 is turned to stderr before a runtime is imported, so that C++ cannot print into it either.

The time of a run is that of ``Session.run``: arrays in, arrays out, the conversions that a server makes
included (5 to 10 us for ONNX Runtime, about 100 us for TensorFlow; that matters for tiny models).
``load_s`` is opening the session, without the runtime's import, with the file as the system's cache has it.
On a GPU it is the time with inputs and outputs on the device, until the device is done (`deploykit.verify.Bound`);
``"beside_s"`` of a block are then samples of what comes on top: ``to_device``, ``from_device``, and ``end_to_end``,
which is ``Session.run`` itself.
``cpu_s`` is the time of processors that the block took, all threads together. ``"session": {...}`` in a load command
are `deploykit.verify.SessionSettings`, which take the place of ``threads``; ONNX Runtime on the CPU alone has them.

Warm-up. After a first run (it compiles and allocates) runs are taken in windows of at least 5 runs and
20 ms, until the medians of two windows in a row are within 5 % of each other, or 2 s have passed.

Each block begins with one run that is not timed: the caches may hold another process' data. Python's
garbage collector is off while the clock runs.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import runtimes
from deploykit.environment import peak_rss_bytes
from deploykit.errors import DataError, DeploykitError
from deploykit.noise import megahertz
from deploykit.verify import SessionSettings, archive

WINDOW_RUNS = 5
WINDOW_S = 0.02
SETTLED = 0.05
WARM_LIMIT_S = 2.0
REASON_LENGTH = 400
BESIDE_RUNS = 5  # of each transfer in a block

Answer = dict[str, Any]


def _bound_tensorflow(threads: int) -> None:
    """TensorFlow's pools belong to the process and are fixed when it first runs something."""
    import tensorflow as tf  # only the keras worker pays for it

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)


# What must be done once per process before a session of a runtime is opened.
PREPARE: dict[str, Callable[[int], None]] = {"keras": _bound_tensorflow}


def timed(call: Callable[[], object], runs: int) -> list[float]:
    """Durations of so many calls, in seconds, each at least a nanosecond."""
    clock = time.perf_counter_ns
    ticks = []
    for _ in range(runs):
        begin = clock()
        call()
        ticks.append(clock() - begin)
    return [round(max(tick, 1) * 1e-9, 9) for tick in ticks]


def warm_up(call: Callable[[], object], limit_s: float = WARM_LIMIT_S) -> Answer:
    """Run until the running median settles; the rule is in the module's docstring."""
    clock = time.perf_counter
    begin = clock()
    call()
    runs, before, first_s = 1, None, clock() - begin
    while True:
        opened, window = clock(), timed(call, 1)
        while (len(window) < WINDOW_RUNS or clock() - opened < WINDOW_S) and clock() - begin < limit_s:
            window += timed(call, 1)
        runs += len(window)
        median = statistics.median(window)
        settled = before is not None and abs(median - before) <= SETTLED * before
        if settled or (before is not None and clock() - begin >= limit_s):
            return {"first_s": first_s, "median_s": median, "runs": runs, "settled": settled}
        before = median


def _read(runtime: str, model: str, options: Mapping[str, Any]) -> Any:
    """A Keras file that needs the user's own code is read with it; every other model is opened by its path."""
    if runtime != "keras" or not any(options.values()):
        return model
    from deploykit.load import load

    return load(model, **options).model


def _set_up(model: str, session: Mapping[str, Any]) -> Any:
    """A session of ONNX Runtime's CPU by settings; the first of its process, as denormals as zero ask for."""
    from deploykit.runtimes import onnxruntime_cpu  # only a worker that runs it pays for it

    return onnxruntime_cpu.session(model, settings=SessionSettings.from_json(session))


def _arrays(path: str) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


class Worker:
    """The commands; ``load`` comes first."""

    def __init__(self) -> None:
        self._session: runtimes.Session | None = None
        self._call: Callable[[], object] | None = None
        self._beside: dict[str, Callable[[], object]] = {}

    def require(self, runtime: str) -> Answer:
        importlib.import_module(runtimes.known(runtime).module).required()
        return {}

    def load(
        self,
        runtime: str,
        model: str,
        threads: int,
        inputs: str,
        batch: int,
        options: Mapping[str, Any] | None = None,
        session: Mapping[str, Any] | None = None,
    ) -> Answer:
        feed = _arrays(inputs)
        begin = time.perf_counter()
        if runtime in runtimes.RUNTIMES:  # a missing package is reported by `open`, in its own words
            try:
                importlib.import_module(runtimes.RUNTIMES[runtime].module)
                if runtime in PREPARE:
                    PREPARE[runtime](threads)
            except ModuleNotFoundError:
                pass
        imported = time.perf_counter()
        if session is not None:
            opened = _set_up(model, session)
        else:
            opened = runtimes.open(runtime, _read(runtime, model, options or {}), threads=threads)
        loaded = time.perf_counter()
        for spec in opened.signature.inputs:
            if spec.shape and spec.shape[0] not in (None, batch):
                raise DataError(f"the model's batch size is fixed at {spec.shape[0]}; batch {batch} cannot run")
        self._session, self._call = opened, lambda: opened.run(feed)
        if runtimes.RUNTIMES[runtime].gpu:
            self._bind(opened, feed)
        return {"import_s": imported - begin, "load_s": loaded - imported}

    def _bind(self, session: Any, feed: Mapping[str, Any]) -> None:
        """Time runs on the device alone, and the rest beside them."""
        bound = session.bound(feed)
        self._beside = {
            "to_device": lambda: bound.to_device(feed),
            "from_device": bound.from_device,
            "end_to_end": lambda: session.run(feed),
        }
        self._call = bound.run

    def warm(self) -> Answer:
        answer = warm_up(self._ready())
        gc.collect()
        gc.freeze()  # collections between blocks then skip what the runtime's import left behind
        return {**answer, "peak_rss_bytes": peak_rss_bytes()}

    def run(self, runs: int) -> Answer:
        call = self._ready()
        gc.collect()
        gc.disable()
        computed = time.process_time()
        try:
            call()
            samples = timed(call, runs)
            beside = {name: timed(each, 1 + BESIDE_RUNS)[1:] for name, each in self._beside.items()}
        finally:
            gc.enable()
        cpu_s = time.process_time() - computed
        found = {"samples_s": samples, "cpu_s": cpu_s, "megahertz": megahertz(), "peak_rss_bytes": peak_rss_bytes()}
        return {**found, "beside_s": beside} if beside else found

    def answer(self, inputs: str, outputs: str) -> Answer:
        self._ready()
        assert self._session is not None
        Path(outputs).write_bytes(archive(self._session.run(_arrays(inputs))))
        return {}

    def _ready(self) -> Callable[[], object]:
        if self._call is None:
            raise DataError("nothing is loaded; send a load command first")
        return self._call


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, DeploykitError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= REASON_LENGTH else text[: REASON_LENGTH - 3] + "..."


def serve(commands: Iterable[str], answer: Callable[[Mapping[str, Any]], None]) -> None:
    """Answer commands until one says quit or there are no more."""
    worker = Worker()
    verbs: dict[str, Callable[..., Answer]] = {
        name: getattr(worker, name) for name in ("require", "load", "warm", "run", "answer")
    }
    for line in commands:
        try:
            command = json.loads(line)
            verb = command.pop("do")
            if verb == "quit":
                return
            found = verbs[verb](**command)
        except Exception as error:  # whatever a runtime raises is the answer
            found = {"failed": _reason(error)}
        answer(found)


def _die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, even while it is stopped (prctl(2))."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig, sigkill = 1, 9
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, sigkill, 0, 0, 0)


def main() -> None:
    """Keep stdout for the answers alone, then serve."""
    _die_with_parent()
    protocol = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)

    def answer(found: Mapping[str, Any]) -> None:
        protocol.write(json.dumps(found, allow_nan=False) + "\n")
        protocol.flush()

    serve(iter(sys.stdin.readline, ""), answer)


if __name__ == "__main__":
    main()
