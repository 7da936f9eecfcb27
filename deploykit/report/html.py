"""The HTML report of a deployment: one self-contained file, verdict first, readable on a phone, light and dark.

No script, no network, no font; everything that came from a file (layer names, paths) is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from deploykit.report.markdown import against, fused_in_short
from deploykit.report.wording import decibels, milliseconds, origin, ratio, size, small

Json = Mapping[str, Any]

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --paper: #fff; --line: #d9dee7; --good: #14713a; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ef; --paper: #151a21; --line: #333c49; --good: #6fd598; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; }
p { margin: .3rem 0; } .good { color: var(--good); } .bad { color: var(--bad); }
.verdict { font-size: 1.6rem; font-weight: 700; margin: .4rem 0; }
.table { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { overflow-wrap: anywhere; } small { opacity: .75; }
"""


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]], numeric: Sequence[int] = ()) -> str:
    def cells(tag: str, values: Sequence[Any]) -> str:
        marks = [' class="n"' if i in numeric else "" for i in range(len(values))]
        return "".join(f"<{tag}{mark}>{escape(str(v))}</{tag}>" for mark, v in zip(marks, values, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="table"><table><tr>{cells("th", columns)}</tr>{body}</table></div>'


def _check(check: Json) -> str:
    rows = []
    for comparison in check["comparisons"]:
        for o in comparison["outputs"]:
            top1 = "" if o["top1_agreement"] is None else f"{100 * o['top1_agreement']:.2f} %"
            verdict = "same" if o["passed"] else f"DIFFERS: {o['reason']}"
            who = f"{comparison['candidate']} on {comparison['runtime']}"
            numbers = (decibels(o["snr_db"]), decibels(o["reference_snr_db"]), small(o["max_abs"]), top1)
            rows.append((who, o["name"], *numbers, verdict))
    columns = ("candidate", "output", "SNR", "original's own", "max abs", "top-1", "verdict")
    return _table(columns, rows, numeric=(2, 3, 4, 5))


def _bench(bench: Json) -> str:
    rows = []
    last = bench["candidates"][-1]["name"]
    for row in bench["candidates"]:
        if row["failed"]:
            rows.append((row["name"], row["batch"], "-", "-", "-", "-", f"failed: {row['failed']}"))
            continue
        value, interval, verdict = against(bench, row, last)
        shown = f"[{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
        latency = row["latency_ms"]
        numbers = (milliseconds(latency["median"]), milliseconds(latency["p90"]), ratio(value) if value else "", shown)
        rows.append((row["name"], row["batch"], *numbers, verdict))
    columns = ("candidate", "batch", "median", "p90", "time / last", "95 % interval", "verdict")
    return _table(columns, rows, numeric=(1, 2, 3, 4, 5))


def page(report: Json) -> str:
    """A complete HTML page for a ``deploykit.deploy/1`` report."""
    fuse, check, bench, source = report["fuse"], report["check"], report["bench"], report["source"]
    passed = check["passed"]
    verdict = "Equivalent to the trained model" if passed else "NOT equivalent to the trained model"
    if passed and not report["proven"]:
        verdict += ", not proven"
    name = source["path"].replace("\\", "/").rsplit("/", 1)[-1]
    decisions = [
        (d["layer"], d["kind"], d["outcome"], d["direction"] or "-", ", ".join(d["into"]) or "-", d["reason"])
        for d in fuse["decisions"]
    ]
    exact = (
        f"<p>In float64 the fused model differs by {small(fuse['exactness_f64'])} (bound "
        f"{small(fuse['exactness_bound'])}); with weights as stored by {small(fuse['exactness_stored'])}.</p>"
        if fuse["exactness_f64"] is not None
        else ""
    )
    notices = "".join(f"<li>{escape(notice)}</li>" for notice in report["notices"])
    environment = report["environment"]
    files = ", ".join(f"{f['name']} {size(f['bytes'])}" for f in report["files"])
    sections = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="verdict {"good" if passed else "bad"}">{verdict}</p>',
        f"<p>{escape(report['reason'])}.</p>" if report["reason"] else "",
        f"<p>{escape(fused_in_short(fuse))}; {escape(files)}; opset {report['opset']}.</p>",
        f"<h2>Equivalence</h2><p>Reference in {check['reference']['precision']}, {escape(check['data'])}.</p>",
        _check(check),
        "<h2>Latency</h2>",
        f"<p>{escape(str(environment.get('cpu', '?')))}; each candidate in its own process, rounds interleaved.</p>",
        _bench(bench),
        f"<h2>Decisions</h2>{exact}",
        _table(("layer", "kind", "outcome", "direction", "into", "reason"), decisions) if decisions else "",
        f"<h2>Notices</h2><ul>{notices}</ul>" if notices else "",
        f"<p><small>deploykit {escape(report['deploykit'])}; source sha256 <code>{escape(source['sha256'])}</code>; "
        f"{escape(origin(source))}</small></p>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}: deploykit</title><style>{_STYLE}</style></head><body>"
        + "\n".join(sections)
        + "</body></html>\n"
    )
