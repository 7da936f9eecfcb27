"""A check or a deployment as a page: one self-contained file, verdict first, readable on a phone, light and dark.

No script, no network, no font: the page's own policy (Content-Security-Policy) forbids the browser to load or run
anything, whatever a file's names hold. All that came from a file is escaped, stripped of control characters and set
apart from the direction of the text around it (``bdi``).

The page says what the report says and nothing else; what was not measured is not mentioned. From top to bottom, each
where the report has it:

    verdict       equivalent, NOT equivalent, or equivalent but not proven, with the reason and the layer that is wrong
    figures       the few numbers that a reader asks for first
    outputs       every output of every candidate; how far values are from the reference (histograms in ulp)
    layers        SNR by layer against depth, the candidate's and the original's own, with its table
    searches      worst case and gradients
    latency       median, p90, and the ratio with its interval
    decisions     what became of each affine
    the rest      notices, how it was measured, environment

Only the JSON form of a report is read (`deploykit.check/1`, `deploykit.deploy/1`): a stored one can be shown again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from deploykit.files import whole_file
from deploykit.report import evidence, strict
from deploykit.report.bench_charts import of_bench
from deploykit.report.cases import cases
from deploykit.report.check_markdown import cut, printable
from deploykit.report.html_charts import (
    bar,
    depths,
    histogram,
    in_words,
    interval,
    octave_span,
    octaves,
    ratio_span,
)
from deploykit.report.html_style import STYLE
from deploykit.report.markdown import against, fused_in_short, setting
from deploykit.report.picture import figures
from deploykit.report.wording import count, milliseconds, origin, ratio, size, small

Json = Mapping[str, Any]

OPEN_ROWS = 16  # a table with more rows is folded away
PLOTS = 6  # histograms that are shown; the others are folded away
LISTED = 20  # elements of a list of plain values
SHORT = 24  # signs of a text that does not need a line of its own on a narrow screen
REASON = 240  # signs of a reason in the head; the table below has it whole

# what is said, how it is painted, by (passed, proven)
VERDICTS: Mapping[tuple[bool, bool], tuple[str, str]] = {
    (True, True): ("Equivalent to the trained model", "good"),
    (True, False): ("Equivalent to the trained model, not proven", "unsure"),
    (False, True): ("NOT equivalent to the trained model", "bad"),
    (False, False): ("NOT equivalent to the trained model", "bad"),
}
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_DEPLOY, _CHECK, _BENCH = "deploykit.deploy/1", "deploykit.check/1", "deploykit.bench/1"


class Markup(str):
    """HTML that is ours; every other text is escaped."""


@dataclass(frozen=True)
class Column:
    """Of a table. ``kind``: "" short text, "n" a number, "text" long text, "plot" a picture."""

    label: str
    kind: str = ""


def page(report: Json) -> str:
    """A complete HTML page. Raises KeyError for a report of another verb than check and deploy."""
    report = {key: strict(value) for key, value in report.items()}
    deployed = {_DEPLOY: True, _CHECK: False}[report["schema"]]
    check = report["check"] if deployed else report
    layers = check.get("layers") or report.get("layers") or {}
    said, tone = VERDICTS[bool(check["passed"]), bool(report["proven"])]
    sections = [
        _section("Outputs", _outputs(check)),
        _section("Distance from the reference", _histograms(check)),
        _section("Error by layer", "".join(map(_layers, (layers, *(check.get("further_layers") or ()))))),
        _section("Worst case", _generic(check.get("worst_case") or report.get("worst_case"))),
        _section("Gradients", _generic(check.get("gradients") or report.get("gradients"))),
        _section("Latency", _latency(report)),
        _section("Decisions", _decisions(report["fuse"]) if deployed else ""),
        _section("Notices", _bullets(report.get("notices") or ())),
        _section("How it was measured", _measured(report, check)),
    ]
    header = f'<h1 class="verdict {tone}">{said}</h1>{_why(report, check, layers)}{_facts(report, check)}'
    return _whole(report, f"{said}: {_base(report['model'])}", header, sections)


def bench_page(report: Json) -> str:
    """The page of a benchmark: tables, pictures, and what makes the figures doubtful."""
    report = {key: strict(value) for key, value in report.items()}
    reason = report.get("reason")
    said, tone = ("Measured", "good") if reason is None else ("Failed", "bad")
    gates = report.get("gates") or ()
    if gates and reason is None:
        said = "Fast enough" if all(gate["outcome"] == "passed" for gate in gates) else "Undecided"
        tone = "good" if said == "Fast enough" else "unsure"
    sections = [
        _section("Latency", _latency({"bench": report, "environment": report.get("environment")})),
        _section("Session profile", _session(report.get("session"))),
        _section("Gates", _generic(gates)),
        _section("Pictures", figures(of_bench(report))),
        _section("Notices", _bullets(report.get("notices") or ())),
    ]
    header = f'<h1 class="verdict {tone}">{said}</h1>' + (f"<p>{_text(reason)}</p>" if reason else "")
    return _whole(report, f"{said}: {_base(report['model'])}", header, sections)


def _session(session: Json | None) -> str:
    """What is recommended, what it was chosen from, and the lines of Python that apply it."""
    if not session:
        return ""
    rows = [
        {"run": run, **{key: trial[key] for key in ("name", "ratio", "verdict", "differs")}}
        for run, part in ((1, "tried"), (2, "confirmed"))
        for trial in session[part]
    ]
    code = "".join(f"<pre>{_text(line)}</pre>" for line in session["python"] if session["chosen"])
    return _sentences(_text(session["reason"])) + _generic({"tried": rows, "measured": session["measured"]}) + code


def _whole(report: Json, title: str, header: str, sections: Sequence[str]) -> str:
    verb = report["schema"].removeprefix("deploykit.").removesuffix("/1")
    name = _base(report["model"])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>\n<body>\n<header>"
        f'<p class="what">deploykit {verb} · {_name(name)}</p>{header}</header>\n<main>'
        + "\n".join(section for section in sections if section)
        + f"</main>\n<footer><p>{_foot(report)}</p></footer>\n</body></html>\n"
    )


def write_page(report: Json, path: str | os.PathLike[str], *, force: bool = True) -> Path:
    """Write the page of a report of check, deploy or bench whole or not at all."""
    made = bench_page if report["schema"] == _BENCH else page
    with whole_file(path, force=force) as target:
        target.write_text(made(report), encoding="utf-8")
    return Path(path)


# ---------------------------------------------------------------------------------------------------- text


def _text(value: object) -> Markup:
    return Markup(escape(printable(str(value))))


def _name(value: object) -> Markup:
    return Markup(f"<bdi>{_text(value)}</bdi>")


def _base(path: str) -> str:
    return path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or path


def _cell(value: object) -> str:
    """What stands in a cell; the style sheet marks one that is empty."""
    if isinstance(value, Markup):
        return value
    return "" if value is None or value == "" else _name(value)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _bullets(items: Iterable[str]) -> str:
    listed = "".join(f"<li>{_name(item)}</li>" for item in items)
    return f"<ul>{listed}</ul>" if listed else ""


def _sentences(*sentences: str) -> str:
    return "".join(f"<p>{sentence}</p>" for sentence in sentences if sentence)


def _folded(summary: str, content: str, unfolded: bool = False) -> str:
    return f"<details{' open' if unfolded else ''}><summary>{summary}</summary>{content}</details>" if content else ""


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.2f} %"


def _number(value: float | None) -> str | None:
    return None if value is None else small(value)


def _snr(value: float | None, exact: bool = False) -> str | None:
    return f"{value:.1f}" if value is not None else "exact" if exact else None


# -------------------------------------------------------------------------------------------------- tables


def _row(columns: Sequence[Column], row: Sequence[object]) -> str:
    """A row of a table; its first cell is its heading."""
    cells = [f'<th scope="row" role="rowheader">{_cell(row[0])}</th>']
    for column, value in zip(columns[1:], row[1:], strict=True):
        kind = "" if column.kind == "text" and len(str(value)) <= SHORT else column.kind
        mark = f' class="{kind}"' if kind else ""
        cells.append(f'<td role="cell"{mark} data-label="{escape(column.label)}">{_cell(value)}</td>')
    return f'<tr role="row">{"".join(cells)}</tr>'


def _group(columns: Sequence[Column], heading: str) -> str:
    cell = f'<th class="group" scope="rowgroup" role="rowheader" colspan="{len(columns)}">{heading}</th>'
    return f'<tr role="row">{cell}</tr>'


def _spanning(columns: Sequence[Column], content: str) -> str:
    return f'<tr role="row"><td class="why" role="cell" colspan="{len(columns)}">{content}</td></tr>'


def _framed(columns: Sequence[Column], bodies: Iterable[str], label: str, kind: str = "cards") -> str:
    """Rows within a table; its roles are named because a style sheet that makes cards of rows takes them away."""
    head = "".join(
        f'<th scope="col" role="columnheader"{mark}>{escape(column.label)}</th>'
        for column in columns
        for mark in (' class="n"' if column.kind == "n" else "",)
    )
    groups = "".join(f'<tbody role="rowgroup">{body}</tbody>' for body in bodies)
    return (
        f'<div class="frame {kind}" role="region" tabindex="0" aria-label="{escape(label)}"><table role="table">'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>{groups}</table></div>'
    )


def _table(columns: Sequence[Column], rows: Sequence[Sequence[object]], label: str, kind: str = "cards") -> str:
    """Columns in which no row has anything are left out."""
    kept = [
        place
        for place, column in enumerate(columns)
        if place == 0 or any(row[place] is not None and row[place] != "" for row in rows)
    ]
    shown = [columns[place] for place in kept]
    return _framed(shown, ["".join(_row(shown, [row[place] for place in kept]) for row in rows)], label, kind)


# ------------------------------------------------------------------------------------- verdict and figures


def _why(report: Json, check: Json, layers: Json) -> str:
    """What is to be said about the verdict: the first failures, or why nothing is proven; and where it goes wrong."""
    judged = {"model": report["model"], "reason": report.get("reason"), **check, "schema": _CHECK}
    bad = [case for case in cases(judged) if case.bad]
    told = [f"<strong>{_name(case.name)}</strong>: {_name(_short(case.reason or case.outcome))}" for case in bad[:3]]
    if len(bad) > 3:
        told.append(f"{len(bad) - 3} more below.")
    reason = report.get("reason")
    if reason and not any(case.reason and (reason in case.reason or case.reason in reason) for case in bad):
        told.append(str(_name(reason)))
    if first := layers.get("first"):
        told.append(f"The error jumps first at layer <strong><code>{_name(first)}</code></strong>.")
    return _sentences(*told)


def _short(text: str) -> str:
    return text if len(text) <= REASON else f"{text[:REASON].rpartition(' ')[0] or text[:REASON]} …"


def _facts(report: Json, check: Json) -> str:
    """The figures that are asked for first."""
    judged = [(c, o) for c in check["comparisons"] for o in c["outputs"]]
    figures: list[tuple[str, str, str]] = []
    measured = [o for _, o in judged if o.get("snr_db") is not None]
    if measured:
        low = min(measured, key=lambda o: float(o["snr_db"]))
        own = low.get("reference_snr_db")
        beside = "" if own is None else f"{_yardstick(check, 'original')} {own:.1f} dB"
        figures.append(("Lowest SNR" if len(measured) > 1 else "SNR", f"{low['snr_db']:.1f} dB", beside))
    elif judged and all(o.get("exact") for _, o in judged):
        figures.append(("Error", "none", "bit for bit the reference"))
    ratios = [o["noise_ratio"] for _, o in judged if o.get("noise_ratio") is not None]
    if ratios:
        figures.append((f"Error / {_yardstick(check)}", ratio(max(ratios)), "largest" if len(ratios) > 1 else ""))
    errors = [o["max_abs"] for _, o in judged if o.get("max_abs") is not None]
    if errors:
        figures.append(("Largest error", small(max(errors)), "absolute"))
    top = [o["top1_agreement"] for _, o in judged if o.get("top1_agreement") is not None]
    if top:
        figures.append(("Same top-1 class", f"{100 * min(top):.2f} %", ""))
    accuracies = [c["accuracy"] for c in check["comparisons"] if c.get("accuracy") is not None]
    if accuracies:
        own = check.get("reference_accuracy")
        figures.append(
            ("Accuracy", f"{100 * min(accuracies):.2f} %", "" if own is None else f"original {100 * own:.2f} %")
        )
    if check["comparisons"]:
        samples = max(c["samples"] for c in check["comparisons"])
        figures.append(("Samples", f"{samples:,}", "" if check.get("policy") is None else _policy(check["policy"])))
    figures += _deployed(report)
    cells = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}{f'<small>{_text(more)}</small>' if more else ''}</dd></div>"
        for name, value, more in figures
    )
    return f'<dl class="facts">{cells}</dl>' if cells else ""


def _yardstick(check: Json, own: str = "original's own") -> str:
    """What the error is measured by: the original's own, where there is a reference better than the original."""
    precision = (check.get("reference") or {}).get("precision")
    return "yardstick" if precision == "float32" else own


def _policy(policy: object) -> str:
    if isinstance(policy, Mapping):
        return ", ".join(f"{name} {value:g}" for name, value in policy.items() if value is not None)
    return f"policy {policy}"


def _deployed(report: Json) -> list[tuple[str, str, str]]:
    """What a deployment adds: what was folded, how large the file is, and whether it is faster than the original."""
    if report["schema"] != _DEPLOY:
        return []
    figures = []
    affines = report["fuse"].get("affines")
    if affines and affines["total"]:
        figures.append(("Affines folded", f"{affines['fused']} of {affines['total']}", ""))
    if report.get("files"):
        figures.append(("Size", size(sum(file["bytes"] for file in report["files"])), ""))
    candidates = report["bench"].get("candidates") or []
    if len(candidates) > 1:
        first, last = candidates[0], candidates[-1]
        value, _, verdict = against(report["bench"], first, last["name"])
        if value and verdict in ("slower", "faster"):
            told = (
                f"{ratio(value if verdict == 'slower' else 1 / value)} {'faster' if verdict == 'slower' else 'slower'}"
            )
            figures.append(("Latency", told, f"than {first['name']}"))
    if (report.get("recommended") or {}).get("others"):
        figures.append(("Fastest runtime", report["recommended"]["runtime"], "of those that passed"))
    return figures


# ------------------------------------------------------------------------------------------------- outputs

_OWN = Column("original's own", "n")
_OUTPUT = (
    Column("output"),
    Column("verdict"),
    Column("SNR, dB", "n"),
    _OWN,
    Column("error / own", "n"),
    Column("max abs", "n"),
    Column("max rel", "n"),
    Column("rtol to pass", "n"),
    Column("atol to pass", "n"),
    Column("top-1", "n"),
    Column("top-5", "n"),
    Column("KL max", "n"),
)


def _judged(output: Json) -> tuple[object, ...]:
    return (
        Markup(
            f"{_name(output['name'])}{f' <small>worst: {_text(where)}</small>' if (where := _place(output)) else ''}"
        ),
        _badge(output["passed"]),
        _snr(output.get("snr_db"), output.get("max_abs") == 0),
        _snr(output.get("reference_snr_db")),
        None if output.get("noise_ratio") is None else ratio(output["noise_ratio"]),
        _number(output.get("max_abs")),
        _number(output.get("max_rel")),
        _number(output.get("smallest_rtol")),
        _number(output.get("smallest_atol")),
        _percent(output.get("top1_agreement")),
        _percent(output.get("top5_agreement")),
        _number((output.get("kl") or {}).get("max")),
    )


def _place(output: Json) -> str:
    """Where the element is that is furthest beyond what is allowed, or nearest to it."""
    if output.get("worst_sample") is None:
        return ""
    index = ", ".join(map(str, output.get("worst_index") or ()))
    return f"sample {output['worst_sample']}" + (f" [{index}]" if index else "")


def _badge(passed: bool) -> Markup:
    return Markup(f'<strong class="{"good" if passed else "bad"}">{"same" if passed else "DIFFERS"}</strong>')


def _who(comparison: Json) -> str:
    data = f", {comparison['data']}" if comparison.get("data") else ""
    return f"{comparison['candidate']} on {comparison['runtime']}{data}"


def _outputs(check: Json) -> str:
    """A table with a group of rows for each candidate; columns that are empty everywhere are left out."""
    judged = [[_judged(output) for output in c["outputs"]] for c in check["comparisons"]]
    everything = [row for rows in judged for row in rows]
    if not check["comparisons"]:
        return "<p>Nothing was compared.</p>"
    kept = [place for place in range(len(_OUTPUT)) if place == 0 or any(row[place] is not None for row in everything)]
    named = {_OWN: Column(_yardstick(check), "n")}
    columns = [named.get(_OUTPUT[place], _OUTPUT[place]) for place in kept]
    bodies = []
    for comparison, rows in zip(check["comparisons"], judged, strict=True):
        body = [_group(columns, f"{_name(_who(comparison))} {_about(comparison)}")]
        for output, row in zip(comparison["outputs"], rows, strict=True):
            body.append(_row(columns, [row[place] for place in kept]))
            if not output["passed"]:
                body.append(_spanning(columns, f"{_name(output.get('reason') or 'it differs')}"))
            elif doubt := evidence.doubt(output):
                body.append(_spanning(columns, f'<span class="unsure">{_text(doubt)}</span>'))
        body += [_spanning(columns, told) for told in _remarks(comparison)]
        bodies.append("".join(body))
    return _framed(columns, bodies, "Outputs of every candidate")


def _about(comparison: Json) -> str:
    verdict = '<span class="good">same</span>' if comparison["passed"] else '<span class="bad">DIFFERS</span>'
    accuracy = comparison.get("accuracy")
    correct = "" if accuracy is None else f", {100 * accuracy:.2f} % right"
    return f"<small>{verdict} · {count(comparison['samples'], 'sample')}{correct}</small>"


def _remarks(comparison: Json) -> list[str]:
    """Rows below a candidate's outputs: why it failed as a whole, what was found at other sizes, and notes."""
    told = []
    if reason := comparison.get("reason"):
        told.append(f'<span class="bad">fails</span>: {_name(reason)}')
    for found in comparison.get("sizes") or ():
        tone, said = ("good", "same") if found["passed"] else ("bad", f"DIFFERS: {found.get('reason') or ''}")
        told.append(f'On {_name(found["data"])}: <span class="{tone}">{_name(said)}</span>')
    return told + [f'<span class="quiet">{_name(note)}</span>' for note in comparison.get("notes") or ()]


def _histograms(check: Json) -> str:
    found = []
    for comparison in check["comparisons"]:
        for output in comparison["outputs"]:
            counts = octaves((output.get("ulp") or {}).get("counts") or ())
            if counts:
                found.append((_base(comparison["candidate"]), comparison, output, counts))
    if not found:
        return ""
    span = octave_span(counts for *_, counts in found)
    figures = []
    for short, comparison, output, counts in found:
        ulp = output["ulp"]
        data = f", {comparison['data']}" if comparison.get("data") else ""
        who = f"{short} on {comparison['runtime']}{data}: {output['name']}"
        title = f"Distances of {printable(who)} from the reference in ulp: {in_words(ulp)}"
        drawn = histogram(counts, span, {"p50": ulp.get("p50"), "p99": ulp.get("p99")}, title)
        many = count(sum(number for _, number in counts), "value")
        head = f"<figcaption>{_name(who)}<small>{many}; {in_words(ulp)}</small></figcaption>"
        figures.append(f"<figure>{head}{drawn}</figure>")
    explained = (
        '<p class="what">How many values are how far from the reference, in units in the last place (ulp) of the '
        "reference's value; each bar is one doubling, and what is exact stands at 0.</p>"
    )
    rest = "".join(figures[PLOTS:])
    more = _folded(f"{len(figures) - PLOTS} more", f'<div class="plots">{rest}</div>') if rest else ""
    return f'{explained}<div class="plots">{"".join(figures[:PLOTS])}</div>{more}'


# -------------------------------------------------------------------------------------------------- layers

_LAYER = (
    Column("layer"),
    Column("SNR, dB", "n"),
    Column("original's own", "n"),
    Column("error / allowed", "n"),
    Column("status"),
    Column("compared with"),
    Column("ONNX tensor"),
    Column("note", "text"),
)
_TONES = {"same": "good", "jump": "bad", "after": "bad"}


def _layer(row: Json) -> tuple[object, ...]:
    tone = _TONES.get(row["status"], "quiet")
    return (
        Markup(f"<code>{_name(_label(row))}</code> <small>{_name(row['class'])}</small>"),
        _snr(row.get("snr_db"), row.get("ratio") == 0),
        _snr(row.get("own_snr_db")),
        None if row.get("ratio") is None else f"{row['ratio']:.3g}",
        Markup(f'<span class="{tone}">{_text(row["status"])}</span>'),
        row.get("reference"),
        row.get("onnx_tensor"),
        row.get("note"),
    )


def _label(row: Json) -> str:
    """A layer's name, and which of its calls and outputs it is where there are several."""
    call = f" (call {row['call'] + 1})" if row.get("call") else ""
    return f"{row['layer']}{call}{':' + str(row['output']) if row.get('output') else ''}"


def _layers(layers: Json) -> str:
    rows = layers.get("rows") or ()
    if not rows:
        return ""
    measured = [row for row in rows if row["status"] != "skipped"]
    skipped = len(rows) - len(measured)
    told = f"{count(len(measured), 'layer')} compared" + (f", {skipped} folded or optimised away" if skipped else "")
    first = layers.get("first")
    verdict = f"the error jumps first at {first}" if first else "no layer's error jumps"
    of = f"of {_name(_base(layers['candidate']))}" if layers.get("candidate") else ""
    drawn = depths(measured, f"Signal to error by layer, in dB, against depth: {printable(verdict)}")
    keys = "".join(
        f'<span><svg aria-hidden="true"><line class="{kind}" x1="0" y1="5" x2="100%" y2="5"/></svg>{name}</span>'
        for kind, name in (("stroke", "candidate"), ("own", "the original as it runs"))
    )
    table = _table(_LAYER, [_layer(row) for row in rows], "Errors by layer", "wide")
    return (
        f"<figure><figcaption>Signal to error {of} in dB, against depth"
        f"<small>{told}; {_name(verdict)}</small></figcaption>"
        + (f'<p class="key">{keys}</p><div class="depth">{drawn}</div>' if drawn else "")
        + "</figure>"
        + _folded(f"All {count(len(rows), 'layer')} as a table", table)
    )


# ----------------------------------------------------------------------------------- whatever has its own keys


TITLES: Mapping[str, str] = {
    "snr_db": "SNR, dB",
    "own_snr_db": "original's own, dB",
    "reference_snr_db": "original's own, dB",
    "max_abs": "max abs",
    "max_rel": "max rel",
    "kl": "KL",
}


def _plain(value: object) -> str | None:
    """A value without parts, as text."""
    if value is None:
        return None
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _flat(value: object) -> bool:
    return not isinstance(value, (Mapping, list))


def _title(key: object) -> str:
    return TITLES.get(str(key), str(key).replace("_", " "))


def _generic(record: Any) -> str:
    """Numbers of a record by their names; a list of records as a table, a record within as a part of its own."""
    if not record:
        return ""
    if isinstance(record, list):
        return f"<p>{_listed(record)}</p>" if all(map(_flat, record)) else "".join(map(_generic, record))
    pairs, parts = [], []
    for key, value in record.items():
        if value is None or value == []:
            continue
        if _flat(value):
            pairs.append((_title(key), _cell(_plain(value))))
        elif isinstance(value, list) and all(map(_flat, value)):
            pairs.append((_title(key), _listed(value)))
        elif isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
            parts.append(f"<h3>{_text(_title(key))}</h3>{_records(value, _title(key))}")
        else:
            parts.append(f"<h3>{_text(_title(key))}</h3>{_generic(value)}")
    return _pairs(pairs) + "".join(parts)


def _records(records: Sequence[Json], title: str) -> str:
    """A table of the values without parts."""
    names = list(dict.fromkeys(name for record in records for name, part in record.items() if _flat(part)))
    columns = [Column(_title(name), "n" if _numeric(records, name) else "") for name in names]
    rows = [[_plain(part) if _flat(part := record.get(name)) else None for name in names] for record in records]
    return _table(columns, rows, title, "cards snug") if names else ""


def _numeric(records: Sequence[Json], name: str) -> bool:
    values = [record.get(name) for record in records if record.get(name) is not None]
    return bool(values) and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _listed(values: Sequence[object]) -> str:
    shown = ", ".join(_cell(_plain(value)) for value in values[:LISTED])
    return f"{shown} and {len(values) - LISTED} more" if len(values) > LISTED else shown


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    listed = "".join(f"<dt>{_text(name)}</dt><dd>{value}</dd>" for name, value in pairs if value)
    return f'<dl class="pairs">{listed}</dl>' if listed else ""


# ------------------------------------------------------------------------------------------------- latency


def _latency(report: Json) -> str:
    """Timings, by batch size and threads; "" where nothing was timed."""
    bench = report.get("bench") or {}
    rows = bench.get("candidates") or []
    settings = list(dict.fromkeys(map(setting, rows)))
    parts = [_timed(bench, [row for row in rows if setting(row) == place], place) for place in settings]
    if not parts:
        return ""
    cpu = (report.get("environment") or {}).get("cpu") or "?"
    return (
        f'<p class="what">On {_name(cpu)}; each candidate in its own process, rounds interleaved. A bar ends at the '
        "median, its line at p90; a ratio's line is its 95 % interval.</p>" + "".join(parts)
    )


def _timed(bench: Json, rows: Sequence[Json], place: tuple[int, int | None, str | None]) -> str:
    last = rows[-1]["name"]
    short = cut(last, 24)
    pairs = [against(bench, row, last) for row in rows]
    times = [row["latency_ms"] for row in rows if not row["failed"]]
    known = [t[key] for t in times for key in ("median", "p90") if t.get(key)]
    span = ratio_span(end for value, ends, _ in pairs if value for end in (value, *(ends or ())))
    columns = (
        Column("candidate"),
        Column("median to p90", "plot"),
        Column("median", "n"),
        Column("p90", "n"),
        Column(f"time / time of {short}", "plot"),
        Column("ratio", "n"),
        Column("95 % interval", "n"),
        Column("verdict", "text"),
    )
    shown: list[tuple[object, ...]] = []
    for row, (value, ends, verdict) in zip(rows, pairs, strict=True):
        name = _name(row["name"])
        if row["failed"]:
            shown.append((name, *[None] * 6, Markup(f'<span class="bad">failed: {_name(row["failed"])}</span>')))
            continue
        median, p90 = row["latency_ms"]["median"], row["latency_ms"]["p90"]
        title = f"{printable(row['name'])}: median {milliseconds(median)}, p90 {milliseconds(p90)}"
        drawn = Markup(bar(median, p90, max(known), title)) if median else None
        within = f"{ends[0]:.2f} … {ends[1]:.2f}" if ends else None
        title = f"{printable(row['name'])}: {ratio(value)} the time of {short}, interval {within or 'unknown'}"
        compared = Markup(interval(value, ends, span, title)) if value else None
        said = {"slower": f"{short} is faster", "faster": f"{short} is slower"}.get(verdict, verdict)
        figures = (milliseconds(median), None if p90 is None else milliseconds(p90))
        shown.append((name, drawn, *figures, compared, ratio(value) if value else None, within, said))
    batch, threads, given = place
    heading = f"Batch {batch}" + ("" if threads is None else f", {count(threads, 'thread')}")
    heading += f", {given}" if given else ""
    return f"<h3>{heading}</h3>{_table(columns, shown, f'Latency, {heading.lower()}')}"


# ----------------------------------------------------------------------------------- decisions and the rest


def _decisions(fuse: Json) -> str:
    decisions = fuse.get("decisions") or ()
    exact = (
        f"In float64 the fused model differs by {small(fuse['exactness_f64'])} "
        f"(bound {small(fuse['exactness_bound'])}); with weights as stored by {small(fuse['exactness_stored'])}."
        if fuse.get("exactness_f64") is not None
        else ""
    )
    short = fused_in_short(fuse)
    told = _sentences(f"{_text(short[:1].upper() + short[1:])}.", exact)
    columns = (
        Column("layer"),
        Column("outcome"),
        Column("direction"),
        Column("into"),
        Column("reason", "text"),
    )
    tones = {"fused": "good", "kept": "unsure", "reduced": "unsure"}
    rows = [
        (
            Markup(f"<code>{_name(d['layer'])}</code> <small>{_name(d['kind'])}</small>"),
            Markup(f'<span class="{tones.get(d["outcome"], "quiet")}">{_text(d["outcome"])}</span>'),
            d["direction"],
            ", ".join(d["into"]) or None,
            d["reason"],
        )
        for d in decisions
    ]
    if not rows:
        return told
    return told + _folded(count(len(rows), "affine"), _table(columns, rows, "Decisions"), len(rows) <= OPEN_ROWS)


def _measured(report: Json, check: Json) -> str:
    """Reference, data and files, and behind a fold the environment."""
    reference = check.get("reference") or {}
    pairs = [
        ("reference", " in ".join(_cell(reference[key]) for key in ("model", "precision") if reference.get(key))),
        ("data", _cell(check.get("data"))),
    ]
    if check.get("policy") is not None:
        pairs.append(("judged by", str(_name(_policy(check["policy"])))))
    if others := check.get("other_sizes"):
        pairs.append(("other sizes", _listed(others)))
    if files := report.get("files"):
        pairs.append(("files", ", ".join(f"{_name(f['name'])} ({size(f['bytes'])})" for f in files)))
    if report.get("opset"):
        oldest = report.get("oldest_onnxruntime")
        pairs.append(("opset", f"{report['opset']}" + (f", ONNX Runtime {_text(oldest)} or later" if oldest else "")))
    if seconds := report.get("seconds"):
        pairs.append(("seconds", ", ".join(f"{_text(k)} {v:.1f}" for k, v in seconds.items() if v is not None)))
    environment = report.get("environment") or {}
    return _pairs(pairs) + _folded("Environment", _environment(environment))


def _environment(environment: Json) -> str:
    """Machine and packages, each on a line."""
    pairs = []
    for key, value in environment.items():
        if isinstance(value, Mapping):
            listed = ", ".join(f"{_name(name)} {_cell(_plain(item))}" for name, item in value.items() if _flat(item))
            if listed:
                pairs.append((key.replace("_", " "), listed))
        elif value is not None:
            pairs.append((key.replace("_", " "), _cell(_plain(value)) if _flat(value) else _listed(value)))
    return _pairs(pairs)


def _foot(report: Json) -> str:
    source = report.get("source") or {}
    told = [f"deploykit {_text(report['deploykit'])}", str(_name(report["model"]))]
    if source:
        told.append(str(_text(origin(source))))
    if source.get("sha256"):
        told.append(f"sha256 <code>{_text(source['sha256'])}</code>")
    return " · ".join(told)
