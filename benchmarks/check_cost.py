"""What a check costs, in units of what it cannot do without.

    python benchmarks/check_cost.py [--net ResNet50] [--samples 64] [--size 224] [--rounds 3]

A check must evaluate the original in float64 once and run the candidate once. Measured inside one process, in turns,
because the machine drifts: one float64 pass over the samples, the candidate's own run over them (the net's ONNX file on
ONNX Runtime), and the whole check as `deploykit check` does it after loading (reference, original, candidate, laws).
Printed: the median of each and

    cost = (check - candidate's own run) / float64 pass        at most 3

Then the peak memory of a check of so many samples and of four times as many, streamed from a file, each in a process of
its own. Exit code 1 when the cost is above `LIMIT` or the memory grows by more than `GROWTH`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

LIMIT = 3.0
GROWTH = 0.10  # of the peak; what an allocator does by chance
MEMORY_SIZE = 64  # pixels, because memory per sample is what is asked, and not how long a sample takes


def images(path: Path, count: int, size: int) -> None:
    import numpy as np

    rng = np.random.default_rng(1)
    np.save(path, rng.random((count, size, size, 3), np.float32) * np.linspace(0.2, 1, count)[:, None, None, None])


def seconds(run: Any) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def prepared(net: str, data: Path, size: int, room: Path) -> tuple[Any, Any, Any]:
    from coverage import build

    from deploykit.check import Candidate
    from deploykit.deploy import DataOptions, samples_for
    from deploykit.export import export

    model = build(net, size)
    samples = samples_for(model, DataOptions(str(data)))
    return model, samples, Candidate("onnx", export(model, room / "net.onnx").path, "onnxruntime-cpu")


def cost(net: str, count: int, size: int, rounds: int) -> float:
    """Print the times; returns the cost."""
    from deploykit import runtimes
    from deploykit.check import check, make_reference
    from deploykit.compare import policy_from
    from deploykit.fuse.proof import slice_of
    from deploykit.graph import replay, run, trace

    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        images(room / "x.npy", count, size)
        model, samples, candidate = prepared(net, room / "x.npy", size, room)
        found = trace(model)
        arrays = samples.head(count).arrays

        def float64_pass() -> None:
            run(replay(found, dtype="float64"), arrays, batch=slice_of(found))

        def own_run() -> None:
            session = runtimes.open(candidate.runtime, candidate.model)
            for start in range(0, count, 32):
                session.run({name: array[start : start + 32] for name, array in arrays.items()})
            session.close()

        def whole() -> None:
            (judged,) = check(make_reference(net, model, samples), [candidate], policy_from())
            assert judged.passed, judged

        parts = {"float64 pass": float64_pass, "candidate's own run": own_run, "whole check": whole}
        times: dict[str, list[float]] = {name: [] for name in parts}
        for part in parts.values():  # what a first run pays for is not what is asked
            part()
        for turn in range(rounds):
            for name in parts if turn % 2 == 0 else reversed(parts):
                times[name].append(seconds(parts[name]))
    middle = {name: statistics.median(found) for name, found in times.items()}
    for name, median in middle.items():
        print(f"{name:22}{median:8.2f} s   ({', '.join(f'{t:.2f}' for t in times[name])})")
    result = (middle["whole check"] - middle["candidate's own run"]) / middle["float64 pass"]
    print(f"cost: {result:.2f} float64 passes beyond the candidate's own run (at most {LIMIT:g})")
    return result


def peak(net: str, count: int) -> float:
    """MiB that a process takes at most which checks so many samples."""
    import resource

    from deploykit.check import check, make_reference
    from deploykit.compare import policy_from

    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        images(room / "x.npy", count, MEMORY_SIZE)
        model, samples, candidate = prepared(net, room / "x.npy", MEMORY_SIZE, room)
        (judged,) = check(make_reference(net, model, samples), [candidate], policy_from())
        assert judged.passed, judged
        assert judged.samples == count
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--net", default="ResNet50")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(json.dumps(peak(options.net, options.peak)))
        return 0
    found = cost(options.net, options.samples, options.size, options.rounds)
    peaks = []
    for count in (512, 2048):
        command = [sys.executable, __file__, "--net", options.net, "--peak", str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout.splitlines()[-1]))
        print(f"peak memory with {count:5} samples of {MEMORY_SIZE} pixels: {peaks[-1]:.0f} MiB")
    grown = peaks[1] / peaks[0] - 1
    print(f"grown by {grown:.1%} (at most {GROWTH:.0%})")
    return int(found > LIMIT or grown > GROWTH)


if __name__ == "__main__":
    sys.exit(main())
