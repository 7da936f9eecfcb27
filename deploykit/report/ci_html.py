"""`deploykit ci` as a page: one self-contained file, verdict first, readable on a phone, light and dark.

No script, no network; everything that came from a file is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from deploykit.files import whole_file
from deploykit.report.cases import Case, suites
from deploykit.report.check_markdown import printable
from deploykit.report.wording import count

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --good: #14713a; --bad: #b3261e; --unsure: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --good: #6fd598; --bad: #ff8a80; --unsure: #f2c14e; } }
body { margin: 0 auto; padding: 1.2rem; max-width: 62rem; font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; overflow-wrap: anywhere; }
.passed { color: var(--good); } .failed, .error { color: var(--bad); } .undecided { color: var(--unsure); }
.table { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.mark { white-space: nowrap; font-weight: 600; } td.name { overflow-wrap: anywhere; min-width: 9rem; }
p { overflow-wrap: anywhere; } small { opacity: .75; }
"""
_COLUMNS = ("", "candidate", "output", "measured", "original's own, or limit", "largest error, worst element")


def ci_page(report: Mapping[str, Any]) -> str:
    """A complete HTML page for a ``deploykit.ci/1`` report."""
    found = suites(report)
    everything = [case for suite in found for case in suite.cases]
    bad = sum(case.bad for case in everything)
    total = count(len(everything), "case")
    verdict = f"{bad} of {total} failed" if bad else f"{total}: nothing failed"
    sections = [
        f'<h1 class="{"failed" if bad else "passed"}">{verdict}</h1>',
        f"<p>{_text(report['model'])}</p>",
        f"<p>Not proven: {_text(report['reason'])}</p>" if not report["proven"] and not bad else "",
    ]
    for suite in found:
        facts = "; ".join(f"{name} {value}" for name, value in suite.facts.items())
        head = "".join(f"<th>{column}</th>" for column in _COLUMNS)
        rows = "".join(map(_row, suite.cases))
        sections.append(f"<h2>{_text(suite.name)}</h2><p><small>{_text(facts)}</small></p>")
        sections.append(f'<div class="table"><table><tr>{head}</tr>{rows}</table></div>')
        sections += map(_reason, suite.cases)
    if report["notices"]:
        sections.append(f"<h2>Notices</h2><ul>{''.join(f'<li>{_text(n)}</li>' for n in report['notices'])}</ul>")
    about = report["environment"]
    sections.append(
        f"<p><small>deploykit {_text(report['deploykit'])}, {report['seconds']['total']:.1f} s, "
        f"{_text(about.get('cpu') or '?')}, Python {_text(about.get('python') or '?')}</small></p>"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(report['model'])}: deploykit ci</title><style>{_STYLE}</style></head><body>"
        + "\n".join(sections)
        + "</body></html>\n"
    )


def write_ci_page(report: Mapping[str, Any], path: str | os.PathLike[str], *, force: bool = True) -> Path:
    """Write the page whole or not at all."""
    with whole_file(path, force=force) as target:
        target.write_text(ci_page(report), encoding="utf-8")
    return Path(path)


def _text(value: object) -> str:
    return escape(printable(str(value)))


def _row(case: Case) -> str:
    cells = "".join(f"<td>{_text(cell)}</td>" for cell in (case.part, case.measured, case.yardstick, case.worst))
    name = "" if case.title == case.model else case.title
    return f'<tr><td class="mark {case.outcome}">{case.outcome}</td><td class="name">{_text(name)}</td>{cells}</tr>'


def _reason(case: Case) -> str:
    """Below the table, where it needs no scrolling on a phone."""
    return f'<p><b class="{case.outcome}">{_text(case.name)}</b>: {_text(case.reason)}</p>' if case.reason else ""
