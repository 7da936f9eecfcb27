"""A report as the comment of a pull request: verdict first, one table, what is long behind a fold.

At most `MAX_LINES` lines and `MAX_CHARACTERS` characters (GitHub refuses comments above 65,536), whatever is in the
report: rows are shown worst first, and how many were left out is said. Names come from files: whatever means something
in Markdown or HTML is written as an entity, nobody is mentioned and no issue linked, and a long name keeps both ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deploykit.files import whole_file
from deploykit.report.cases import Case, cases
from deploykit.report.wording import count

MAX_LINES = 60
MAX_CHARACTERS = 65_536
ROWS = 25  # of the table
REASONS, NOTICES = 6, 3  # behind the fold
_NAME, _REASON = 40, 300

_ORDER = ("failed", "error", "undecided", "passed")
_MARKS = {"passed": "✅", "failed": "❌ **failed**", "error": "❌ **could not run**", "undecided": "⚠️ undecided"}
# GitHub looks for @names and #numbers after entities are resolved; a zero-width space ends the search.
_ENTITIES = {ord(sign): f"&#{ord(sign)};" for sign in "|`*_[]~\\&<>"} | {ord(sign): f"{sign}&#8203;" for sign in "@#"}


def cut(text: str, width: int = _NAME) -> str:
    """The text on one line, its middle left out where it is too long."""
    line = " ".join(printable(text).split())
    tail = width // 2
    return line if len(line) <= width else f"{line[: width - 1 - tail]}…{line[-tail:]}"


def printable(text: str) -> str:
    """Without control characters and lone surrogates, which no file of text can hold."""
    return "".join(sign if sign.isprintable() or sign.isspace() else "�" for sign in text)


def code(text: str, width: int = _NAME) -> str:
    """A name as code within a table's cell: HTML, because a backslash does not escape within backticks."""
    return f"<code>{plain(cut(text, width))}</code>" if text else ""


def plain(text: str) -> str:
    """Text in which Markdown and HTML mean nothing."""
    return printable(text).translate(_ENTITIES)


def markdown(report: Mapping[str, Any]) -> str:
    """The comment for a check, bench, deploy or ci report."""
    found = sorted(cases(report), key=lambda case: _ORDER.index(case.outcome))
    lines = [f"### {_verdict(report, found)}", ""]
    lines += _table(found)
    lines += _reasons([case for case in found if case.outcome != "passed"])
    lines += _notices(report.get("notices") or ())
    lines += ["", f"<sub>deploykit {plain(str(report['deploykit']))}{_seconds(report)}</sub>"]
    return "\n".join(lines) + "\n"


def write_markdown(report: Mapping[str, Any], path: str | os.PathLike[str], *, force: bool = True) -> Path:
    """Write the comment whole or not at all."""
    with whole_file(path, force=force) as target:
        target.write_text(markdown(report), encoding="utf-8")
    return Path(path)


def _verdict(report: Mapping[str, Any], found: Sequence[Case]) -> str:
    bad = [case for case in found if case.bad]
    model = f" {code(str(report['model']))}"
    if bad:
        return f"❌ {len(bad)} of {count(len(found), 'case')} failed:{model}"
    open_ones = sum(case.outcome == "undecided" for case in found)
    doubt = f", {open_ones} undecided" if open_ones else ""
    if not report["proven"] and not open_ones:
        doubt = ", not proven"
    return f"{'⚠️' if doubt else '✅'} {count(len(found) - open_ones, 'case')} passed{doubt}:{model}"


def _table(found: Sequence[Case]) -> list[str]:
    columns = (
        "",
        "model",
        "candidate",
        "output",
        "measured",
        "original's own, or limit",
        "largest error, worst element",
    )
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for case in found[:ROWS]:
        cells = (
            _MARKS[case.outcome],
            code(case.model),
            code(case.title if case.title != case.model else ""),
            code(case.part, 24),
            plain(case.measured),
            plain(case.yardstick),
            plain(case.worst),
        )
        lines.append(f"| {' | '.join(cells)} |")
    if len(found) > ROWS:
        rest = found[ROWS:]
        told = ", ".join(
            f"{sum(case.outcome == kind for case in rest)} {kind}"
            for kind in _ORDER
            if any(case.outcome == kind for case in rest)
        )
        lines.append(f"| … | {len(rest)} more: {told} | | | | | |")
    return lines


def _folded(summary: str, items: Iterable[str]) -> list[str]:
    return ["", f"<details><summary>{summary}</summary>", "", *(f"- {item}" for item in items), "", "</details>"]


def _reasons(found: Sequence[Case]) -> list[str]:
    if not found:
        return []
    items = [
        f"{code(case.label, 2 * _NAME)}: {plain(cut(case.reason or case.outcome, _REASON))}" for case in found[:REASONS]
    ]
    if len(found) > REASONS:
        items.append(f"… and {len(found) - REASONS} more")
    return _folded("Reasons", items)


def _notices(notices: Sequence[str]) -> list[str]:
    items = [plain(cut(notice, _REASON)) for notice in notices[:NOTICES]]
    if len(notices) > NOTICES:
        items.append(f"… and {len(notices) - NOTICES} more")
    return _folded(count(len(notices), "notice"), items) if items else []


def _seconds(report: Mapping[str, Any]) -> str:
    total = (report.get("seconds") or {}).get("total")
    return "" if total is None else f", {total:.1f} s"
