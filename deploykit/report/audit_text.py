"""The report of an audit for a terminal: what learns, what changed, what is wrong; then layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from deploykit.report.wording import count, small

Json = Mapping[str, Any]
Row = tuple[str, RenderableType]

LIMIT = 3  # findings of one code that are told one by one
STYLE = {"error": "red", "warning": "yellow", "note": "dim"}
MODES = {
    "frozen": "frozen (moving statistics, always)",
    "training": "trainable (statistics move in training)",
    "batch": "called with training=True (normalises by the batch)",
}


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:LIMIT]) + (f" and {len(names) - LIMIT} more" if len(names) > LIMIT else "")


def _training(config: Json | None) -> str:
    if config is None:
        return "no training configuration in the file"
    rate, schedule = config["learning_rate"], config["schedule"]
    parts = [config["optimizer"] or "no optimizer"]
    if rate is not None:
        parts.append(f"learning rate {rate:.3g}")
    elif schedule is not None:
        parts.append(f"learning rate by {schedule['name']}")
    for loss in config["losses"]:
        where = "" if loss["output"] is None else f" of {loss['output']}"
        parts.append(f"loss{where} {loss['name']}{' from logits' if loss['from_logits'] else ''}")
    if config["metrics"]:
        parts.append(f"metrics {', '.join(config['metrics'])}")
    state = config["optimizer_state"]
    if state is not None:
        steps = f", {count(state['steps'], 'step')}" if state["steps"] else ""
        parts.append(f"optimizer state{steps}" if state["present"] else "no optimizer state")
    return "; ".join(parts)


def _found(findings: Sequence[Json]) -> list[Row]:
    """Up to `LIMIT` findings of one code in full, more of them as one line."""
    rows: list[Row] = []
    for code, number in Counter(finding["code"] for finding in findings).items():
        same = [finding for finding in findings if finding["code"] == code]
        label, style = same[0]["severity"], STYLE[same[0]["severity"]]
        if number <= LIMIT:
            rows += [(label, Text(f"{finding['layer']}: {finding['message']}", style=style)) for finding in same]
            continue
        names = _names([finding["layer"] for finding in same])
        told = f"{number} layers ({names}): in {same[0]['layer']}: {same[0]['message']}; `audit --json` has each"
        rows.append((label, Text(told, style=style)))
    return rows or [("findings", Text("none", style="green"))]


def rows(report: Json) -> list[Row]:
    file, total = report["file"], report["trainable"]
    learning, frozen = total["trainable_layers"], total["frozen_layers"]
    told = f"{total['trainable']:,} of {total['total']:,} parameters, in {count(len(learning), 'layer')}"
    told += f"; {total['frozen']:,} frozen, in {count(len(frozen), 'layer')} ({_names(frozen)})" if frozen else ""
    told += f"; {total['statistics']:,} statistics" if total["statistics"] else ""
    found: list[Row] = [("trainable", escape(told))]
    modes = Counter(norm["mode"] for norm in report["norms"])
    found += [
        ("norms" if place == 0 else "", f"{number} BatchNormalization {MODES[mode]}")
        for place, (mode, number) in enumerate(modes.items())
    ]
    if (base := report["base"]) is not None:
        style = "green" if base["body_equal"] else "yellow"
        found.append(("base", Text(base["summary"], style=style)))
    found.append(("training", escape(_training(report["training_config"]))))
    when = f" on {file['saved_on']}" if file["saved_on"] else ""
    found.append(("saved", escape(f"by Keras {file['saved_by'] or '?'}{when}")))
    return [*found, *_found(report["findings"])]


def fill(table: Table, report: Json, most: int) -> None:
    """The layers with weights, or those that say something about the base, each with what became of it."""
    changes = {} if report["base"] is None else {change["layer"]: change for change in _present(report)}
    layers = [layer for layer in report["layers"] if layer["parameters"]["total"]]
    lines = [(layer["name"], layer["class"], layer["parameters"], changes.get(layer["name"])) for layer in layers]
    gone = [] if report["base"] is None else [c for c in report["base"]["layers"] if c["state"] == "missing"]
    shown = lines if len(lines) <= most else [*lines[: most // 2], *lines[-most // 2 :]]
    for place, (name, kind, sizes, change) in enumerate(shown):
        if len(shown) < len(lines) and place == most // 2:
            table.add_row(f"... {len(lines) - len(shown)} more in --json", "", "", "", "")
        table.add_row(escape(name), kind, f"{sizes['trainable']:,}", f"{sizes['frozen']:,}", escape(_became(change)))
    for change in gone:
        table.add_row(escape(change["layer"]), change["class"], "-", "-", "missing")


def _present(report: Json) -> list[Json]:
    return [change for change in report["base"]["layers"] if change["state"] != "missing"]


def _became(change: Json | None) -> str:
    if change is None:
        return ""
    apart = [weight for weight in change["weights"] if not weight["equal"]]
    told = ", ".join(f"{weight['name']} {small(weight['distance'])}" for weight in apart)
    if change["settings"]:
        told += f"{'; ' if told else ''}settings {', '.join(change['settings'])}"
    other = change["base_layer"] if change["matched_by"] and change["base_layer"] != change["layer"] else None
    by = f" ({other}, by {change['matched_by']})" if other else ""
    return f"{change['state']}{by}{f': {told}' if told else ''}"
