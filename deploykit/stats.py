"""Timings: percentiles with enough samples behind them, and ratios with an interval.

Absolute numbers are shown, ratios are claimed: a verdict is said only when the whole interval of the ratio lies on one
side of 1. The arithmetic stands once, in ``deploykit.verify``; what is said of it here comes from simulated clocks
(``tests/noisy_clock.py``; ``benchmarks/clocks.py`` prints all figures): drift of ±30 % a minute, bursts of 3x in 5 % of
the samples, two speeds 15 % apart that change by run, by block or seldom.

*Which interval.* Of 1,000 simulated benchmarks, how many percent call a model different from itself / find a true
10 %; speeds by block, bursts of ten samples in a row, which is the hardest of these clocks:

                                               10 rounds      20 rounds      60 rounds     wrong at most, 6 to 60
    Wilcoxon's signed ranks, level 31/32       2.1 / 36.8     3.9 / 68.6     3.4 / 99.9    3.9
    order statistics (sign test), 95 %         1.6 / 21.7     3.1 / 52.9     2.1 / 95.0    4.3
    bootstrap of the rounds' median, 95 %      4.8 / 42.9     5.3 / 66.7     4.6 / 97.8    7.2
    bootstrap of the ratio of medians, 95 %    3.3 / 29.9     1.2 / 34.2     0.4 / 55.3    6.4
    Student's t, 95 %                          2.3 / 30.9     2.5 / 34.2     4.9 / 58.1    5.2

The bootstrap of the ratio of medians resamples rounds, but compares medians over all of them: it takes the drift of
the whole benchmark, which cancels within a round, for noise of a and of b. The bootstrap of the rounds' median is too
narrow at few rounds. Student's t believes in bursts. The signed ranks ask for symmetry alone, which equal candidates
have by exchange, and use the sizes that the sign test throws away: they keep the promise and find more.

*Luck of a process.* A process keeps the memory layout it got, and with it a few percent of speed: within two processes
of the *same* 18 µs file, rounds agree to 1 %, and the ratio of the two is anything from 0.97 to 1.01. Rounds cannot
average that out, only fresh processes can. So `Ratio.of_processes`, with L = ``LUCK``:

    fewer than 6 processes each    over all rounds, the interval widened by L on both sides
    6 or more                      over processes, one value for each: the estimate over its rounds

L covers two processes of which one got the slower of two speeds 15 % apart, and 8 % of other luck. In simulation both
stages of `bench` call a model different from itself in 1.9 to 3.5 % of benchmarks and find a true 10 % in 95 % or
more; where processes are fast or slow for good, 15 % apart, they find it in half of them and leave the rest undecided.
The rounds of all processes pooled would be wrong in 7 to 50 % of benchmarks where processes have luck.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deploykit import verify
from deploykit.errors import DataError

MIN_ROUNDS = 6  # what an interval of the level that `verify` keeps needs
LUCK = 1.25  # two processes of one file may differ by this factor


@dataclass(frozen=True)
class Latency:
    """Milliseconds of single runs; a percentile without enough samples is None."""

    median: float
    p90: float | None
    p99: float | None
    p99_9: float | None
    min: float
    runs: int

    @classmethod
    def of(cls, samples_s: Sequence[float]) -> Latency:
        """Summarize durations given in seconds."""
        with _explained():
            found = {key: None if v is None else v * 1e3 for key, v in verify.summarize(samples_s).items()}
        median, fastest = found["median"], found["min"]
        if median is None or fastest is None:  # one sample is enough for both, and none was refused
            raise DataError("no timings; measure at least one run")
        return cls(median, found["p90"], found["p99"], found["p99_9"], fastest, len(samples_s))

    def to_json(self) -> dict[str, float | None]:
        """The ``latency_ms`` object of a report."""
        return {name: getattr(self, name) for name in ("median", "p90", "p99", "p99_9", "min")}


@dataclass(frozen=True)
class Ratio:
    """Latency of a over latency of b, with its interval of 95 % or more; ``verdict`` is said of a."""

    ratio: float
    low: float | None
    high: float | None
    verdict: str
    reason: str | None
    rounds: int

    @classmethod
    def of(cls, rounds_a: Sequence[Sequence[float]], rounds_b: Sequence[Sequence[float]]) -> Ratio:
        """Compare a and b; round i of both was measured side by side. Durations in any one unit."""
        with _explained():
            logs = verify.log_ratios(rounds_a, rounds_b)
        return cls.of_logs(list(logs))

    @classmethod
    def of_logs(cls, logs: Sequence[float]) -> Ratio:
        """The same of log(a / b), one for each round."""
        if not logs:
            raise DataError("no rounds to compare; measure a and b in at least one")
        ratio, interval = math.exp(verify.centre(logs)), verify.centre_interval(logs)
        if interval is None:
            reason = f"{len(logs)} rounds are too few for an interval; {MIN_ROUNDS} are needed"
            return cls(ratio, None, None, "undecided", reason, len(logs))
        low, high = map(math.exp, interval)
        return cls(ratio, low, high, *_judged(low, high, "the interval holds 1"), len(logs))

    @classmethod
    def of_processes(cls, processes: Sequence[Sequence[float]]) -> Ratio:
        """Of each pair of processes the logs of its rounds; over processes where they are enough, else widened."""
        if len(processes) >= MIN_ROUNDS:
            return cls.of_logs([verify.centre(logs) for logs in processes])
        found = cls.of_logs(list(itertools.chain(*processes)))
        if found.low is None or found.high is None:
            return found
        low, high = found.low / LUCK, found.high * LUCK
        said = _judged(low, high, f"one pair of processes may differ by {LUCK - 1:.0%} by luck")
        return dataclasses.replace(found, low=low, high=high, verdict=said[0], reason=said[1])

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends; None where there were too few rounds."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def to_json(self) -> dict[str, object]:
        """The part of a bench report's comparison that the numbers fill."""
        interval = None if self.interval is None else list(self.interval)
        return {"ratio": self.ratio, "ci95": interval, "verdict": self.verdict, "reason": self.reason}


def _judged(low: float, high: float, doubt: str) -> tuple[str, str | None]:
    """The verdict that an interval allows, and why there is none."""
    if low <= 1 <= high:
        return "undecided", doubt
    return ("faster" if high < 1 else "slower"), None


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except verify.RefusedError as error:
        raise DataError(str(error)) from error
