"""What a report found, as one flat list: a `Case` for everything that could have failed, whichever verb wrote it.

    deploykit.check/1     one case for each output of each candidate; one for a candidate that failed before it had any
    deploykit.deploy/1    its check, and its bench
    deploykit.bench/1     one case for each candidate: it ran, or why it did not
    deploykit.ci/1        all its checks, latency gates and bundles

JUnit, Markdown and the annotations of GitHub show this list and nothing else, so they cannot disagree. Their one law: a
report that did not pass has at least one case that did not. Where no comparison says why, the report's own
reason becomes a case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from deploykit.report import evidence
from deploykit.report.wording import ratio, small, snr

Json = Mapping[str, Any]
Outcome = Literal["passed", "failed", "error", "undecided"]


@dataclass(frozen=True)
class Case:
    """One thing that was asked of ``model``. ``part`` is the output, or "" for the candidate as a whole.

    ``measured``, ``yardstick`` and ``worst`` are for people: the SNR, the original's own, and where the worst element
    is; for a gate the ratio with its interval, and the limit.
    """

    model: str
    title: str
    part: str
    outcome: Outcome
    reason: str | None = None
    measured: str = ""
    yardstick: str = ""
    worst: str = ""

    @property
    def name(self) -> str:
        return f"{self.title}: {self.part}" if self.part else self.title

    @property
    def label(self) -> str:
        """Model and name, for where a case stands alone."""
        return self.name if self.title == self.model else f"{self.model}: {self.name}"

    @property
    def bad(self) -> bool:
        return self.outcome in ("failed", "error")


@dataclass(frozen=True)
class Suite:
    """Cases about one model. ``seconds`` is what all of them took; ``facts`` say how they were judged."""

    name: str
    cases: tuple[Case, ...]
    seconds: float | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


def suites(report: Json) -> tuple[Suite, ...]:
    """The cases of a report, grouped by what they are about. Raises KeyError for a schema that is not in the table."""
    return tuple(_READERS[report["schema"]](report))


def cases(report: Json) -> list[Case]:
    return [case for suite in suites(report) for case in suite.cases]


def worst_element(output: Json) -> str:
    """The largest error, and the element furthest beyond what is allowed (or nearest to it), which may be another.

    ``0.00047; worst element sample 6 [5]``; "" where nothing was compared.
    """
    if output.get("worst_sample") is None:
        return ""
    place = f"sample {output['worst_sample']}"
    if index := output.get("worst_index"):
        place += f" [{', '.join(map(str, index))}]"
    largest = "" if output.get("max_abs") is None else f"{small(output['max_abs'])}; "
    return f"{largest}worst element {place}"


def _output(model: str, title: str, output: Json) -> Case:
    reason, doubt = None, evidence.doubt(output)
    if not output["passed"]:
        reason = output.get("reason") or "it differs from the reference"
    return Case(
        model,
        title,
        output["name"],
        "failed" if reason else "undecided" if doubt else "passed",
        reason or doubt,
        snr(output),
        snr(output, "reference_snr_db"),
        worst_element(output),
    )


def _judged(model: str, comparison: Json) -> Iterator[Case]:
    """The cases of one candidate; at least one of them failed if it did."""
    title = f"{comparison['candidate']} on {comparison['runtime']}"
    if comparison.get("data"):
        title += f", {comparison['data']}"
    found = [_output(model, title, output) for output in comparison["outputs"]]
    whole = comparison.get("reason")
    if not found and whole is None:
        whole = "nothing was compared"
    elif evidence.dull(comparison):
        whole = evidence.NO_EVIDENCE
    elif whole is None and not comparison["passed"] and not any(case.bad for case in found):
        whole = "the candidate did not pass"
    if whole is not None:
        yield Case(model, title, "", "error" if comparison.get("error") else "failed", whole)
    yield from found


def _closer(report: Json) -> Iterator[Case]:
    """What was looked at beyond the samples: the worst case, and gradients."""
    for key, title in (("worst_case", "worst case"), ("gradients", "gradients")):
        rows = report.get(key)
        for row in rows if isinstance(rows, list) else ():
            reason = None if row["passed"] else row.get("reason") or row["text"].splitlines()[0]
            yield Case(
                report["model"], f"{row['candidate']}: {title}", "", "passed" if row["passed"] else "failed", reason
            )


def _check(report: Json) -> Iterator[Suite]:
    found = [case for comparison in report["comparisons"] for case in _judged(report["model"], comparison)]
    found += _closer(report)
    if not found or (not report["passed"] and not any(case.bad for case in found)):
        outcome: Outcome = "error" if report.get("outcome") == "error" else "failed"
        title = ", ".join(report.get("candidates") or ()) or report["model"]
        found.append(Case(report["model"], title, "", outcome, report.get("reason") or "nothing was compared"))
    reference = report.get("reference") or {}
    policy = report.get("policy")
    facts = {
        "reference": reference.get("precision"),
        "data": report.get("data"),
        "policy": ", ".join(f"{k} {v:g}" for k, v in policy.items()) if isinstance(policy, Mapping) else policy,
    }
    yield Suite(report["model"], tuple(found), _total(report), {k: str(v) for k, v in facts.items() if v is not None})


def _bench(report: Json) -> Iterator[Suite]:
    found = [
        Case(
            row["model"],
            row["name"],
            f"batch {row['batch']}",
            "error" if row["failed"] else "passed",
            row["failed"],
            "-" if row["failed"] else f"{row['latency_ms']['median']:.3g} ms",
        )
        for row in report["candidates"]
    ]
    yield Suite(
        "latency", tuple(found) or (Case("latency", "latency", "", "error", "nothing was timed"),), _total(report)
    )


def _deploy(report: Json) -> Iterator[Suite]:
    yield from _check({"model": report["model"], "reason": report.get("reason"), **report["check"]})
    if report["bench"].get("candidates"):
        yield from _bench(report["bench"])


def _gate(gate: Json) -> Suite:
    interval = gate["ci95"]
    measured = "-" if gate["ratio"] is None else ratio(gate["ratio"])
    if interval:
        measured += f" [{interval[0]:.3g}, {interval[1]:.3g}]"
    limit = f"at most {gate['max_slowdown']:g}x"
    title = f"latency / {gate['baseline']}"
    case = Case(gate["candidate"], title, "", gate["outcome"], gate["reason"], measured, limit)
    return Suite(gate["candidate"], (case,), _total(gate))


def _ci(report: Json) -> Iterator[Suite]:
    """One suite for each entry; a model that is checked several times gives suites of different names."""
    seen: Counter[str] = Counter()
    entries = (suite for check in (*report["checks"], *report["bundles"]) for suite in _check(check))
    for suite in (*entries, *map(_gate, report["latency"])):
        seen[suite.name] += 1
        yield suite if seen[suite.name] == 1 else replace(suite, name=f"{suite.name} ({seen[suite.name]})")


def _total(report: Json) -> float | None:
    """The seconds of a whole report; of one that has only phases, their sum."""
    seconds: Mapping[str, float] = report.get("seconds") or {}
    return seconds.get("total", sum(seconds.values())) if seconds else None


_READERS: Mapping[str, Callable[[Json], Iterable[Suite]]] = {
    "deploykit.check/1": _check,
    "deploykit.bench/1": _bench,
    "deploykit.deploy/1": _deploy,
    "deploykit.ci/1": _ci,
}
