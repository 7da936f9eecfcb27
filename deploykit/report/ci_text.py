"""`deploykit ci` on a terminal: verdict first, then a line for everything that was asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from deploykit.report.cases import suites
from deploykit.report.wording import count

_STYLES = {"passed": "green", "failed": "bold red", "error": "bold red", "undecided": "yellow"}


def ci(report: Mapping[str, Any], console: Console) -> None:
    found = [case for suite in suites(report) for case in suite.cases]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for column in ("", "model", "candidate", "measured", "own, or limit"):
        table.add_column(column, overflow="fold")
    for case in found:
        cells = (case.model, case.name if case.name != case.model else "", case.measured, case.yardstick)
        table.add_row(Text(case.outcome, style=_STYLES[case.outcome]), *map(escape, cells))
    bad = sum(case.bad for case in found)
    verdict = Text(f"{bad} of {count(len(found), 'case')} FAILED", style="bold red")
    if not bad:
        verdict = Text(f"{count(len(found), 'case')}: nothing failed", style="bold green")
    head = Text.assemble((f"deploykit {report['deploykit']}", "dim"), "  ", (report["model"], "bold"), "  ", verdict)
    parts: list[RenderableType] = [head, table]
    parts += [Text(f"{case.label}: {case.reason}", style=_STYLES[case.outcome]) for case in found if case.reason]
    if not bad and not report["proven"] and all(case.outcome == "passed" for case in found):
        parts.append(Text(f"NOT PROVEN  {report['reason']}", style="yellow"))
    parts += [Text(f"notice  {notice}") for notice in report["notices"]]
    parts.append(Text(f"seconds  {report['seconds']['total']:.1f}", style="dim"))
    console.print(Group(*parts))
