"""Gates: a candidate must not be slower than its baseline by more than a factor, measured in one run.

With [low, high] the interval of latency(candidate) / latency(baseline) that `deploykit.bench` found, and m the largest
slowdown that is allowed:

    failed       low > m           the whole interval lies beyond
    passed       high ≤ m          the whole interval lies within
    undecided    between           a warning; a failure only where ``strict``

so noise alone never fails a build and never passes one. The baseline is an artefact that is timed again beside the
candidate: milliseconds that were stored belong to another machine or another hour. Give `bench` the baseline as
``focus`` and m as ``limit``: then it starts fresh processes also where the limit is in doubt, not the order of the two.

Limit: several settings (batch sizes, threads, sizes) are as many gates, and each may be wrong in 1 of 32 cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deploykit.bench import BenchReport
from deploykit.errors import InputError

OUTCOMES = ("passed", "undecided", "failed")  # the worst last


@dataclass(frozen=True)
class Gate:
    """One candidate in one setting against the baseline; ``reason`` is None where it passed."""

    candidate: str
    baseline: str
    batch: int
    threads: int | None
    size: str
    max_slowdown: float
    ratio: float
    interval: tuple[float, float] | None
    outcome: str
    reason: str | None

    def to_json(self) -> dict[str, Any]:
        """A row of ``gates`` in ``deploykit.bench/1``."""
        return {
            "candidate": self.candidate,
            "baseline": self.baseline,
            "batch": self.batch,
            "threads": self.threads,
            "size": self.size,
            "max_slowdown": self.max_slowdown,
            "ratio": self.ratio,
            "ci95": None if self.interval is None else list(self.interval),
            "outcome": self.outcome,
            "reason": self.reason,
        }


def gate(report: BenchReport, baseline: str, max_slowdown: float, *, strict: bool = False) -> tuple[Gate, ...]:
    """Every other candidate against the one named ``baseline``, setting by setting.

    Raises InputError for a limit that is no positive number, where nothing is called ``baseline`` or nothing stands
    beside it, and where a candidate did not run: what was not measured can neither pass nor fail.
    """
    if not 0 < max_slowdown < math.inf:
        raise InputError(f"the slowdown allowed is {max_slowdown:g}; give a ratio above 0, such as 1.05")
    names = {timing.candidate.name for timing in report.timings}
    if baseline not in names or len(names) < 2:
        raise InputError(
            f"nothing to compare with the baseline {baseline!r}; measured were: {', '.join(sorted(names))}"
        )
    for timing in report.timings:
        if timing.failed is not None:
            raise InputError(f"{timing.candidate.name} did not run: {timing.failed}")
    found = []
    for timing in report.timings:
        if timing.candidate.name == baseline:
            continue
        pair = report.comparison(timing.candidate.name, baseline, timing.batch, timing.threads, timing.size)
        assert pair.ratio is not None  # neither failed
        interval = pair.ratio.interval
        outcome, reason = judged(interval, max_slowdown, strict=strict)
        setting = (timing.batch, timing.threads, timing.size)
        found.append(Gate(pair.a, pair.b, *setting, max_slowdown, pair.ratio.ratio, interval, outcome, reason))
    return tuple(found)


def worst(gates: Sequence[Gate]) -> str:
    """The outcome of all of them: one that failed fails, one in doubt leaves a doubt."""
    return max((each.outcome for each in gates), key=OUTCOMES.index, default="passed")


def judged(interval: Sequence[float] | None, limit: float, *, strict: bool) -> tuple[str, str | None]:
    """Outcome and reason; ``interval`` is that of the ratio, None where there were too few rounds."""
    allowed = f"at most {limit:g}x is allowed"
    if interval is None:
        doubt = f"too few rounds for an interval; {allowed}; give more seconds"
    else:
        low, high = interval
        span = f"the 95 % interval is {low:.3g}x to {high:.3g}x"
        if high <= limit:
            return "passed", None
        if low > limit:
            return "failed", f"slower than allowed: {span}, {allowed}"
        doubt = f"{span}, {allowed}; give more seconds, or a quieter machine"
    return ("failed" if strict else "undecided"), f"undecided{' (strict)' if strict else ''}: {doubt}"
