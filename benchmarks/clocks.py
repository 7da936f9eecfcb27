"""How often a timing's verdict is wrong, and how often a true difference is found: on simulated clocks, and here.

    python benchmarks/clocks.py [--benchmarks 1000] [--seed 0]     simulated, tests/noisy_clock.py; a few minutes
    python benchmarks/clocks.py --machine [--times 20]             a small ONNX file against itself, on this machine

Simulated: for every interval considered, what share of benchmarks calls a model different from itself ("wrong", at
most 5 % is allowed) and finds a true 10 % ("found", at least 90 % is wanted), in rounds of one process; then the same
of both stages of `deploykit.bench`, with luck that processes keep. Exit code 1 where what deploykit uses is wrong in
more than 5 %. On the machine: exit code 1 when more than 3 of 20 verdicts are wrong.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from math import comb
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np
from noisy_clock import MODES, Noise, by_ranks, called, logs_of, medians_of, pipeline

Intervals = Sequence[tuple[float, float]]
RESAMPLES = 999
WRONG = 0.05
TENTH = 1.1
MACHINE_WRONG = 3 / 20

# two-sided 97.5 % quantiles of Student's t for the degrees of freedom below
STUDENT = {5: 2.571, 9: 2.262, 19: 2.093, 29: 2.045, 59: 2.001}


def by_order(logs: np.ndarray) -> Intervals:
    """The sign test's interval, at least 95 %: order statistics."""
    n, k, outside = logs.shape[1], 0, 0.0
    while (outside := outside + 2 * comb(n, k) / 2**n) <= WRONG:
        k += 1
    ordered = np.sort(logs, axis=1)
    return list(zip(ordered[:, k - 1], ordered[:, n - k], strict=True))


def by_bootstrap(logs: np.ndarray) -> Intervals:
    """Percentiles of the median of resampled rounds."""
    drawn = np.random.default_rng(1).integers(0, logs.shape[1], (RESAMPLES, logs.shape[1]))
    return [tuple(np.quantile(np.median(row[drawn], axis=1), (WRONG / 2, 1 - WRONG / 2))) for row in logs]


def by_student(logs: np.ndarray) -> Intervals:
    half = STUDENT[logs.shape[1] - 1] * logs.std(axis=1, ddof=1) / np.sqrt(logs.shape[1])
    return list(zip(logs.mean(axis=1) - half, logs.mean(axis=1) + half, strict=True))


METHODS: dict[str, Callable[[np.ndarray], Intervals]] = {
    "signed ranks": by_ranks,
    "order statistics": by_order,
    "bootstrap, rounds": by_bootstrap,
    "Student's t": by_student,
}


def ratio_of_medians(seed: int, benchmarks: int, rounds: int, effect: float, noise: Noise) -> float:
    """Percentiles of log(median over a / median over b), rounds resampled: the pairing serves the drawing alone."""
    medians = medians_of(np.random.default_rng(seed), benchmarks, rounds, effect, noise)
    drawn = np.random.default_rng(1).integers(0, rounds, (RESAMPLES, rounds))
    tails = (WRONG / 2, 1 - WRONG / 2)
    return share(
        [
            tuple(np.quantile(np.median(a[drawn], axis=1) - np.median(b[drawn], axis=1), tails))
            for a, b in medians.transpose(0, 2, 1)
        ]
    )


def share(intervals: Intervals) -> float:
    return called(intervals) / len(intervals)


def simulate(benchmarks: int, seed: int) -> bool:
    """Print both tables; whether what deploykit uses keeps its promise."""
    worst = max(intervals(benchmarks, seed), stages(benchmarks, seed))
    print(f"\nwrong at most: {worst:.1%} of the benchmarks")
    return worst <= WRONG


def intervals(benchmarks: int, seed: int) -> float:
    """What each interval says of rounds in one process; the share of wrong verdicts of the one that is used."""
    worst = 0.0
    print(f"{benchmarks} benchmarks in one process each; percent wrong / percent found of a true 10 %\n")
    print(
        f"{'speeds by':9} {'burst':>5} {'rounds':>6}  " + "  ".join(f"{m:>17}" for m in (*METHODS, "ratio of medians"))
    )
    for modes in MODES[:3]:
        for burst in (1, 10):
            for rounds in (6, 10, 20, 30, 60):
                noise, cells = Noise(modes, burst), []
                logs = {e: logs_of(np.random.default_rng(seed), benchmarks, rounds, e, noise) for e in (1.0, TENTH)}
                for method in METHODS.values():
                    cells.append([share(method(logs[effect])) for effect in logs])
                worst = max(worst, cells[0][0])
                cells.append([ratio_of_medians(seed, benchmarks, rounds, effect, noise) for effect in logs])
                shown = "  ".join(f"{100 * wrong:9.1f} / {100 * found:5.1f}" for wrong, found in cells)
                print(f"{modes:9} {burst:5} {rounds:6}  {shown}", flush=True)
    return worst


def stages(benchmarks: int, seed: int) -> float:
    """What both stages of `bench` say, and what rounds pooled over the processes would; the share of wrong verdicts."""
    worst, rows = 0.0, itertools.count()  # each row draws numbers of its own
    print("\nboth stages of bench; percent wrong / found of a true 10 % / found of a true 25 %\n")
    print(f"{'speeds by':9} {'burst':>5} {'luck':>5} {'block':>6}  {'bench':>21}  {'rounds pooled':>15}")
    for modes in MODES:
        for burst, luck, block_s in ((1, 0.0, 1.0), (1, 0.015, 0.05), (3, 0.015, 1.0), (10, 0.0, 1.0)):
            noise, row = Noise(modes, burst, luck, block_s), next(rows)
            found = [decided(pipeline(np.random.default_rng((seed, row)), benchmarks, e, noise)) for e in EFFECTS]
            pooled = [share(by_ranks(pool((seed, row), benchmarks, e, noise))) for e in EFFECTS[:2]]
            worst = max(worst, found[0])
            shown = "  ".join(" / ".join(f"{100 * x:5.1f}" for x in row) for row in (found, pooled))
            print(f"{modes:9} {burst:5} {luck:5} {block_s:5}s  {shown}", flush=True)
    return worst


EFFECTS = (1.0, TENTH, 1.25)


def decided(ratios: Sequence[object]) -> float:
    return float(np.mean([ratio.verdict != "undecided" for ratio in ratios]))  # type: ignore[attr-defined]


def pool(seed: Sequence[int], benchmarks: int, effect: float, noise: Noise) -> np.ndarray:
    """The rounds of six processes, ten of each, as if they were of one."""
    rng = np.random.default_rng(seed)
    return np.concatenate([logs_of(rng, benchmarks, 10, effect, noise) for _ in range(6)], axis=1)


def small(path: Path) -> Path:
    """A file of 16 layers of 128 units: some tens of microseconds."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random, nodes, weights = np.random.default_rng(0), [], []
    for i in range(16):
        weights.append(numpy_helper.from_array(random.standard_normal((128, 128)).astype(np.float32) / 11, f"w{i}"))
        nodes += [
            helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"m{i}"]),
            helper.make_node("Tanh", [f"m{i}"], [f"x{i + 1}"]),
        ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 128]) for name in ("x0", "x16")]
    graph = helper.make_graph(nodes, "small", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def machine(times: int, seed: int) -> bool:
    """A file against itself; whether at most 3 of 20 verdicts are wrong."""
    from deploykit.bench import Candidate, bench

    wrong = 0
    with tempfile.TemporaryDirectory() as room:
        file = small(Path(room) / "small.onnx")
        inputs = {"x0": np.random.default_rng(seed).standard_normal((1, 128)).astype(np.float32)}
        for time in range(times):
            pair = [Candidate(name, file, "onnxruntime-cpu") for name in "ab"]
            (found,) = bench(pair, inputs, threads=1, seed=seed + time).comparisons
            ratio = found.ratio
            assert ratio is not None
            wrong += found.verdict != "undecided"
            print(f"{time + 1:3}  {ratio.ratio:.4f}  [{ratio.low:.4f}, {ratio.high:.4f}]  {found.verdict}", flush=True)
    print(f"{wrong} of {times} verdicts are wrong; at most {MACHINE_WRONG:.0%} are allowed")
    return wrong <= MACHINE_WRONG * times


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--benchmarks", type=int, default=1000, help="simulated for each row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--machine", action="store_true", help="time a real file against itself")
    parser.add_argument("--times", type=int, default=20)
    options = parser.parse_args()
    kept = machine(options.times, options.seed) if options.machine else simulate(options.benchmarks, options.seed)
    return int(not kept)


if __name__ == "__main__":
    raise SystemExit(main())
