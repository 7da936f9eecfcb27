"""A profile for a terminal: the verdict, where the time goes by kind of operator, and the layers that take most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from deploykit.report.wording import count, milliseconds, small

Json = Mapping[str, Any]
ROWS = 15  # layers that are listed
OPERATORS = 4  # ... and what is named of each


def verdict(profile: Json) -> str:
    """One line: how far from the limit, what takes the time, what to blame."""
    most = profile["kinds"][0]
    lost = sum(row["lost_ms"] for row in profile["layers"])
    layers = {row["layer"]: row for row in profile["layers"]}
    rows = [layers[name] for name in profile["blamed"] if layers[name]["lost_ms"] > 0]
    blamed = ", ".join(f"{row['layer']} ({milliseconds(row['lost_ms'])})" for row in rows) or "none"
    return (
        f"{_share(profile['of_limit'])} of what this machine can do: {milliseconds(profile['time_ms'])} against a limit"
        f" of {milliseconds(profile['limit_ms'])}; {most['kind']} takes {_share(most['share'])};"
        f" of {milliseconds(lost)} lost most is in {blamed}"
    )


def profile(profile: Json, console: Console, *, rows: int = ROWS) -> None:
    """Print one of ``profiles`` in ``deploykit.bench/1``."""
    roof = profile["roofline"]
    speeds = [copy["gb_per_s"] for copy in roof["copies"]]
    about = (
        f"{count(profile['runs'], 'run')}, {count(profile['threads'], 'thread')}; the profiler added"
        f" {_share(profile['overhead'])} to {milliseconds(profile['unprofiled_ms'])}; this machine:"
        f" {roof['peak_gflop_per_s']:.0f} GFLOP/s, {max(speeds):.0f} GB/s in cache, {min(speeds):.0f} GB/s in memory"
    )
    parts: list[RenderableType] = [
        Text.assemble(("profile  ", "bold"), (str(profile["model"]), "bold"), f"  {about}"),
        Text(verdict(profile), style="bold"),
        _kinds(profile["kinds"]),
        _layers(profile["layers"], rows),
    ]
    parts += [Text(f"notice  {text}", style="yellow") for text in profile["notices"]]
    console.print(Group(*parts))


def _kinds(rows: Sequence[Json]) -> Table:
    table = _table("kind", "time", "share", "GFLOP/s", "GB/s", "of limit", "nodes", "operators")
    for row in rows:
        table.add_row(escape(row["kind"]), *_figures(row), str(row["nodes"]), _operators(row))
    return table


def _layers(rows: Sequence[Json], most: int) -> Table:
    table = _table("layer", "time", "share", "GFLOP/s", "GB/s", "of limit", "lost", "operators")
    for row in rows[:most]:
        table.add_row(escape(row["layer"]), *_figures(row), milliseconds(row["lost_ms"]), _operators(row))
    if rest := rows[most:]:
        share, time = (sum(row[key] for row in rest) for key in ("share", "time_ms"))
        lost = milliseconds(sum(row["lost_ms"] for row in rest))
        table.add_row(f"{len(rest)} more", milliseconds(time), _share(share), "", "", "", lost, "", style="dim")
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for index, column in enumerate(columns):
        right = 0 < index < len(columns) - 1
        table.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table


def _figures(row: Json) -> tuple[str, ...]:
    return (
        milliseconds(row["time_ms"]),
        _share(row["share"]),
        small(row["gflop_per_s"]) if (row["gflop_per_s"] or 0) < 10 else f"{row['gflop_per_s']:.0f}",
        small(row["gb_per_s"]) if (row["gb_per_s"] or 0) < 10 else f"{row['gb_per_s']:.0f}",
        _share(row["of_limit"]),
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}" if abs(value) < 0.1 else f"{value:.0%}"


def _operators(row: Json) -> str:
    names = row["operators"]
    more = f" +{len(names) - OPERATORS}" if len(names) > OPERATORS else ""
    return escape(", ".join(names[:OPERATORS]) + more)
