"""Timings: percentiles with enough samples behind them, and ratios with an interval.

The arithmetic and its calibration stand once, in ``deploykit.verify``. Absolute numbers are shown, ratios are
claimed: a verdict is said only when the whole 95 % interval of the ratio lies on one side of 1.

Limit: the interval speaks for the rounds it saw. A process that got a lucky memory layout keeps it in every round;
only rounds in fresh processes average over that.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from deploykit import verify
from deploykit.errors import DataError

MIN_ROUNDS = 6  # 1 − 2·(1/2)^n ≥ 0.95 needs n ≥ 6


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
    """Latency of a over latency of b, with its 95 % interval; ``verdict`` is said of a."""

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
        if not logs.size:
            raise DataError("no rounds to compare; measure a and b in at least one")
        ratio = math.exp(float(np.median(logs)))
        interval = verify.median_interval(logs)
        if interval is None:
            reason = f"{logs.size} rounds are too few for an interval; {MIN_ROUNDS} are needed"
            return cls(ratio, None, None, "undecided", reason, int(logs.size))
        low, high = (math.exp(end) for end in interval)
        verdict = "faster" if high < 1 else "slower" if low > 1 else "undecided"
        doubt = "the interval holds 1" if verdict == "undecided" else None
        return cls(ratio, low, high, verdict, doubt, int(logs.size))

    def to_json(self) -> dict[str, object]:
        """The part of a bench report's comparison that the numbers fill."""
        interval = None if self.low is None or self.high is None else [self.low, self.high]
        return {"ratio": self.ratio, "ci95": interval, "verdict": self.verdict, "reason": self.reason}


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except verify.RefusedError as error:
        raise DataError(str(error)) from error
