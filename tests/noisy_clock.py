"""A machine whose clock is known to lie: simulated rounds of A B B A, and the whole of `bench` on them.

    sample = time of the candidate x drift x burst x mode x jitter

    drift     ±30 % a minute: 1 + 0.3·sin(2π·t / 60 s + φ), φ drawn for each benchmark
    burst     5 % of the samples take 3 times as long, ``burst`` of them in a row
    mode      half of the time everything takes 15 % longer; ``modes`` says what the half is of:
              "run"      each single run is drawn
              "block"    all runs of a candidate in a round
              "seldom"   the speed changes after one block in ten
              "process"  a process is fast or slow for good
    jitter    3 % of each sample, log-normal
    luck      what a process keeps for good, log-normal; 0 unless a test says otherwise

The candidates take turns (A B, B A, A B, ...), ``block_s`` seconds each, and so meet the drift in other places.
What comes out are logs of time(a) / time(b), one for each round, as `deploykit.verify.log_ratios` gives them.
`benchmarks/clocks.py` prints what follows from them, `tests/test_stats.py` demands it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploykit import verify
from deploykit.bench import FIRST, LATER, PROCESSES
from deploykit.stats import Ratio

DRIFT, MINUTE_S = 0.30, 60.0
BURSTS, BURST = 0.05, 3.0
MODE = 1.15
JITTER = 0.03
START_S = 2.0  # between the last round of a process and the first of the next
RUNS = 10  # samples of a block

MODES = ("run", "block", "seldom", "process")


@dataclass(frozen=True)
class Noise:
    """One machine; the module's docstring says what the fields mean."""

    modes: str = "block"
    burst: int = 1
    luck: float = 0.0
    block_s: float = 1.0


def medians_of(
    rng: np.random.Generator, benchmarks: int, rounds: int, effect: float, noise: Noise, phase: Any = None
) -> np.ndarray:
    """Logs of the blocks' medians, benchmarks x rounds x (a, b), of one process each; a takes ``effect`` times b's."""
    medians = np.median(_samples(rng, benchmarks, rounds, noise, phase), axis=-1)
    kept = noise.luck * rng.standard_normal((benchmarks, 1, 2))
    if noise.modes == "process":
        kept += np.log(MODE) * (rng.random(kept.shape) < 0.5)
    return medians + kept + (np.log(effect), 0.0)


def logs_of(
    rng: np.random.Generator, benchmarks: int, rounds: int, effect: float, noise: Noise, phase: Any = None
) -> np.ndarray:
    """log(time(a) / time(b)), benchmarks x rounds, of one process each."""
    medians: np.ndarray = medians_of(rng, benchmarks, rounds, effect, noise, phase)
    return medians[..., 0] - medians[..., 1]


def _samples(rng: np.random.Generator, benchmarks: int, rounds: int, noise: Noise, phase: Any) -> np.ndarray:
    """Logs of the samples of a and b: benchmarks x rounds x 2 x RUNS."""
    shape = (benchmarks, rounds, 2, RUNS)
    phase = rng.uniform(0, 2 * np.pi, benchmarks) if phase is None else phase
    at = noise.block_s * np.arange(2 * rounds)
    drift = np.log1p(DRIFT * np.sin(2 * np.pi * at / MINUTE_S + phase[:, None]))
    logs = _in_turns(drift)[..., None] + JITTER * rng.standard_normal(shape)
    begins = rng.random((*shape[:3], RUNS + noise.burst - 1)) < 1 - (1 - BURSTS) ** (1 / noise.burst)
    logs += np.log(BURST) * np.logical_or.reduce([begins[..., i : i + RUNS] for i in range(noise.burst)])
    slow: dict[str, Callable[[], Any]] = {
        "run": lambda: rng.random(shape) < 0.5,
        "block": lambda: rng.random((*shape[:3], 1)) < 0.5,
        "seldom": lambda: _in_turns(_changing(rng, benchmarks, 2 * rounds))[..., None],
        "process": lambda: False,
    }
    return logs + np.log(MODE) * slow[noise.modes]()


def _changing(rng: np.random.Generator, benchmarks: int, blocks: int) -> np.ndarray:
    changes = rng.random((benchmarks, blocks)) < 0.1
    return (np.cumsum(changes, axis=1) + rng.integers(0, 2, (benchmarks, 1))) % 2


def _in_turns(blocks: np.ndarray) -> np.ndarray:
    """From the order of time to rounds x (a, b): A B, B A, A B, ..."""
    pairs = blocks.reshape(len(blocks), -1, 2)
    pairs[:, 1::2] = pairs[:, 1::2, ::-1].copy()
    return pairs


def pipeline(rng: np.random.Generator, benchmarks: int, effect: float, noise: Noise) -> list[Ratio]:
    """`bench` of two candidates: a process each, and fresh ones where the first leave it undecided."""
    phase = rng.uniform(0, 2 * np.pi, benchmarks)
    processes = []
    for number in range(PROCESSES):
        rounds = (FIRST if number == 0 else LATER).most
        processes.append(logs_of(rng, benchmarks, rounds, effect, noise, phase))
        phase = phase + 2 * np.pi * (2 * rounds * noise.block_s + START_S) / MINUTE_S
    return [_both_stages([list(logs[i]) for logs in processes]) for i in range(benchmarks)]


def _both_stages(processes: Sequence[Sequence[float]]) -> Ratio:
    first = Ratio.of_processes(processes[:1])
    return Ratio.of_processes(processes) if first.verdict == "undecided" else first


def called(intervals: Sequence[tuple[float, float]]) -> int:
    """How many benchmarks, given the intervals of their logs, end with "faster" or "slower"."""
    return sum(high < 0 or low > 0 for low, high in intervals)


def by_ranks(logs: np.ndarray) -> list[tuple[float, float]]:
    """The intervals that `deploykit.stats` uses, one for each row."""
    found = [verify.centre_interval(row) for row in logs]
    return [interval for interval in found if interval is not None]
