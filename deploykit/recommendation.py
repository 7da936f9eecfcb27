"""Which runtime to run a bundle's file on: the fastest of those that passed the check here.

A bundle holds one ONNX file, which several runtimes read. ONNX Runtime is the one that the bundle is made for and that
`verify.py` uses; each of `OTHERS` that is installed is judged by the same law on the same samples, and timed beside it
if it passed. Another one is recommended only where `deploykit.bench` says that it is faster; of several, the one that
takes the least time.

Limits: measured on this machine, with one batch size; GPUs are not timed here. LiteRT reads other files. Where the
bundle got the file without lowering because that was faster, the others were timed with the lowered one, and there is
no recommendation but ONNX Runtime.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.bench import BenchReport
from deploykit.bench import Candidate as Timed
from deploykit.check import Candidate, Reference, check
from deploykit.compare import Law
from deploykit.errors import DeploykitError
from deploykit.runtimes import RUNTIMES

OURS = "onnxruntime-cpu"
OTHERS = ("openvino",)  # read the same file on the CPU, and are made for production


@dataclass(frozen=True)
class Trial:
    """Another runtime, and why it may not be recommended (None: it passed the check)."""

    runtime: str
    reason: str | None

    @property
    def name(self) -> str:
        """How it is called among the candidates of the benchmark."""
        return f"deploykit, on {RUNTIMES[self.runtime].title}"

    def timed(self, path: Path) -> Timed:
        return Timed(self.name, path, self.runtime)


def installed(names: Iterable[str] = OTHERS) -> list[str]:
    """Those whose packages are there."""
    return [name for name in names if all(map(importlib.util.find_spec, RUNTIMES[name].packages))]


def tried(path: Path, reference: Reference, policy: Law) -> tuple[Trial, ...]:
    """The file on every other runtime that is installed, held to the same law."""
    return tuple(_tried(name, path, reference, policy) for name in installed())


def _tried(runtime: str, path: Path, reference: Reference, policy: Law) -> Trial:
    try:
        (found,) = check(reference, [Candidate(path.name, path, runtime)], policy)
    except DeploykitError as error:
        return Trial(runtime, str(error))
    wrong = next((f"{output.name}: {output.reason}" for output in found.outputs if not output.passed), None)
    return Trial(runtime, None if found.passed else found.reason or wrong or "it did not pass the check")


def recommended(measured: BenchReport, ours: str, trials: Sequence[Trial]) -> dict[str, Any]:
    """``runtime``, and what was found for each other one; ``ours`` is the file's name in the benchmark."""
    rows, best = [], (1.0, OURS)
    for trial in trials:
        row: dict[str, Any] = {"runtime": trial.runtime, "passed": trial.reason is None, "reason": trial.reason}
        row.update({"ratio": None, "ci95": None, "verdict": None})
        if trial.reason is None:
            pair = measured.comparison(trial.name, ours)
            row.update({"reason": pair.reason, **(pair.ratio.to_json() if pair.ratio else {})})
            if pair.ratio is not None and pair.verdict == "faster":
                best = min(best, (pair.ratio.ratio, trial.runtime))
        rows.append(row)
    return {"runtime": best[1], "others": rows}
