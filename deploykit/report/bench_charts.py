"""The pictures of a benchmark and of a profile, from the JSON of ``deploykit.bench/1``.

    latency     how often which latency was seen, one strip for each candidate on a common axis; median, p90, p99
    ratios      every pair's ratio with its interval, around the line at 1
    sweep       time per sample over the batch size, or latency over the threads
    kinds       where the time of a model goes, by kind of operator
    lost        the layers that lose most time against their limit
    roofline    what every layer reaches, under what this machine can do

Axes are logarithmic wherever ratios matter: twice as slow is as far everywhere. Colours never stand alone: a word, a
marker or a dash says the same. A picture without anything to show is None; `of_bench` gives those that a report has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from deploykit.report.drawing import shortened
from deploykit.report.html_charts import ratio_span
from deploykit.report.picture import FONT, LETTER, WIDTH, Box, Dot, Line, Mark, Picture, Words, text_width
from deploykit.report.wording import milliseconds, ratio

Json = Mapping[str, Any]

BINS = 72  # of a strip
ROWS = 12  # of a picture, at most
SERIES = 6
LABELLED = 5
TONES = {"faster": "good", "slower": "bad", "undecided": "quiet"}
LOOKS: Sequence[tuple[str, tuple[float, float] | None]] = (
    ("accent", None),
    ("unsure", (6, 3)),
    ("good", (2, 2)),
    ("bad", (8, 2)),
    ("ink", (4, 4)),
    ("quiet", (1, 3)),
)


def of_bench(report: Json) -> list[Picture]:
    """Every picture that a report of `deploykit bench` (or the ``bench`` of a deployment) has something for."""
    rows = report.get("candidates") or []
    found: list[Picture | None] = []
    for setting in dict.fromkeys(_setting(row) for row in rows):
        found.append(latency([row for row in rows if _setting(row) == setting]))
    found.append(ratios(report.get("comparisons") or []))
    found += [sweep(rows, key) for key in ("batch", "threads")]
    for profile in report.get("profiles") or []:
        found += of_profile(profile)
    return [picture for picture in found if picture is not None]


def of_profile(profile: Json) -> list[Picture]:
    """Every picture of one profile."""
    found = (kinds(profile), lost(profile), roofline(profile))
    return [picture for picture in found if picture is not None]


def _setting(row: Json) -> tuple[Any, ...]:
    return row["batch"], row.get("threads"), _size(row)


def _size(row: Json) -> str:
    """The inputs' sizes without the batch: "32x32x3"."""
    shapes = (row.get("input_shapes") or {}).values()
    return str(row.get("size") or " ".join("x".join(map(str, shape[1:])) for shape in shapes))


def _in_words(batch: int | None, threads: int | None, size: str = "") -> str:
    """ "batch 1, 2 threads, 32x32x3", leaving out what is not given."""
    parts = [f"batch {batch}"] if batch is not None else []
    if threads is not None:
        parts.append(f"{threads} thread{'' if threads == 1 else 's'}")
    return ", ".join([*parts, size] if size else parts)


# -------------------------------------------------------------------------------------------------------- axes


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within (low, high), evenly spread over their logarithms as far as round numbers are."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(ticks) <= most:
            return ticks
    return ticks[:: math.ceil(len(ticks) / most)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """From values to places, by logarithms; what lies beyond the axis is put at its end."""
    span = math.log(high / low)

    def place(value: float) -> float:
        share = math.log(max(value, low) / low) / span
        return start + (end - start) * min(share, 1.0)

    return place


def _short(value: float) -> str:
    """A tick's number: 0.25, 12, 3,000."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _title(text: str, detail: str = "") -> list[Mark]:
    marks: list[Mark] = [Words(0, 11, text, colour="ink", bold=True)]
    if detail:
        marks.append(Words(0, 25, shortened(detail, _fits(WIDTH))))
    return marks


def _fits(width: float) -> int:
    """How many letters have room."""
    return max(int(width / (LETTER * FONT)), 8)


def _under(ticks: Sequence[float], x: Callable[[float], float], top: float, base: float, unit: str) -> Iterator[Mark]:
    """An axis below, with lines up from its ticks; the last label has the unit."""
    yield Line(((x(0), base), (WIDTH, base)), "line", 1)
    taken = -math.inf
    for tick in ticks:
        place = x(tick)
        yield Line(((place, top), (place, base + 3)), "line", 1)
        text = f"{_short(tick)}{unit if tick == ticks[-1] else ''}"
        half = text_width(text) / 2
        centre = min(max(place, half), WIDTH - half)
        if centre - half > taken + 4:
            yield Words(centre, base + 15, text, "middle")
            taken = centre + half


# ----------------------------------------------------------------------------------------------------- latency


def _samples_ms(nested: Any) -> Iterator[float]:
    if isinstance(nested, int | float):
        yield 1e3 * nested
    else:
        for part in nested or ():
            yield from _samples_ms(part)


def latency(rows: Sequence[Json]) -> Picture | None:
    """``rows``: candidates of one setting. Where samples are missing, a strip is a line from the least to p99."""
    measured = [row for row in rows if row.get("failed") is None and row["latency_ms"]["median"] is not None][:ROWS]
    if not measured:
        return None
    first = measured[0]
    setting = _in_words(*_setting(first))
    marks = _title("Latency", setting)
    samples = [sorted(_samples_ms(row.get("samples_s"))) for row in measured]
    ends = [
        (row["latency_ms"].get("min") or row["latency_ms"]["median"], _far(row, values))
        for row, values in zip(measured, samples, strict=True)
    ]
    low, high = min(near for near, _ in ends) / 1.03, max(far for _, far in ends) * 1.03
    x = _scale(low, high, 0, WIDTH)
    top, tall = 34, 48
    base = top + tall * len(measured)
    marks += _under(_ticks(low, high), x, top, base, " ms")
    said = []
    for index, (row, values) in enumerate(zip(measured, samples, strict=True)):
        y, median = top + tall * index, row["latency_ms"]["median"]
        figure = milliseconds(median)
        room = _fits(WIDTH - text_width(figure) - 12)
        marks += [Words(0, y + 12, shortened(row["name"], room), colour="ink")]
        marks += [Words(WIDTH, y + 12, figure, "end", "ink", bold=True)]
        marks += _strip(values, row["latency_ms"], x, y + 17, y + tall - 3)
        said.append(f"{row['name']}: median {figure}.")
    failed = sum(row.get("failed") is not None for row in rows)
    broken = f"; {failed} could not be measured" if failed else ""
    marks.append(Words(0, base + 30, f"line: median; ticks: p90, p99{broken}"))
    words = f"Latency, {setting}, on a logarithmic axis. {' '.join(said)}"
    return Picture(words, base + 34, tuple(marks))


def _far(row: Json, values: Sequence[float]) -> float:
    """Where a strip ends: one sample in 200 may lie beyond."""
    known = [row["latency_ms"].get(key) or 0.0 for key in ("median", "p90", "p99")]
    return max(*known, values[int(0.995 * (len(values) - 1))] if values else 0.0)


def _strip(
    values: Sequence[float], known: Json, x: Callable[[float], float], top: float, base: float
) -> Iterator[Mark]:
    """A histogram over the axis' logarithms, its median as a line, p90 and p99 as ticks."""
    counts = [0] * BINS
    for value in values:
        counts[min(int(x(value) / WIDTH * BINS), BINS - 1)] += 1
    most, width = max(counts), WIDTH / BINS
    for place, number in enumerate(counts):
        if number:
            high = max((base - top) * number / most, 1.0)
            yield Box(place * width, base - high, width, high, "accent", 0.75)
    reach = [known.get(key) for key in ("min", "p90", "p99")]
    ends = [x(value) for value in (*reach, known["median"]) if value is not None]
    if not values:
        yield Line(((min(ends), base - 7), (max(ends), base - 7)), "accent", 2)
    for tail in reach[1:]:
        if tail is not None:
            yield Line(((x(tail), base - 9), (x(tail), base)), "quiet", 1)
    yield Line(((x(known["median"]), top), (x(known["median"]), base)), "ink", 1.5)


# ------------------------------------------------------------------------------------------------------ ratios


def ratios(comparisons: Sequence[Json]) -> Picture | None:
    """Latency of a over latency of b, said of a: left of the line at 1 it is faster."""
    rows = [row for row in comparisons if row.get("ratio")]
    if not rows:
        return None
    shown = rows[:ROWS]
    low, high = map(math.exp, ratio_span([v for row in shown for v in (row["ratio"], *(row.get("ci95") or ()))]))
    x = _scale(low, high, 0, WIDTH)
    marks = _title("Ratio of latencies, with its 95 % interval", "left of the dashed line: faster than the other")
    top, tall = 34, 46
    base = top + tall * len(shown)
    marks += _under(_ticks(low, high), x, top, base, "x")
    marks.append(Line(((x(1), top), (x(1), base)), "quiet", 1, (3, 3)))
    settings = {_setting(row) for row in rows}
    sizes = {_size(row) for row in rows}
    said = []
    for index, row in enumerate(shown):
        y, tone = top + tall * index, TONES.get(row["verdict"], "quiet")
        figure = f"{ratio(row['ratio'])} {row['verdict']}"
        place = _in_words(row["batch"], row.get("threads"), _size(row) if len(sizes) > 1 else "")
        where = f" ({place})" if len(settings) > 1 else ""
        marks.append(Words(0, y + 12, shortened(row["a"], _fits(WIDTH - text_width(figure) - 12)), colour="ink"))
        marks.append(Words(WIDTH, y + 12, figure, "end", tone, bold=True))
        marks.append(Words(0, y + 25, f"against {shortened(row['b'], _fits(WIDTH - text_width(where)) - 8)}{where}"))
        marks += _interval(row["ratio"], row.get("ci95"), x, y + 36, tone)
        said.append(f"{row['a']} against {row['b']}{where}: {figure}.")
    if hidden := len(rows) - len(shown):
        marks.append(Words(0, base + 29, f"and {hidden} more pairs"))
    words = f"Ratios of latencies on a logarithmic axis. {' '.join(said)}"
    return Picture(words, base + (34 if hidden else 20), tuple(marks))


def _interval(
    value: float, ends: Sequence[float] | None, x: Callable[[float], float], y: float, tone: str
) -> Iterator[Mark]:
    if ends:
        near, far = map(x, ends)
        yield Line(((near, y), (far, y)), tone, 2)
        yield from (Line(((end, y - 4), (end, y + 4)), tone, 1.5) for end in (near, far))
    yield Dot(x(value), y, 4, tone)


# ------------------------------------------------------------------------------------------------------ sweeps


def sweep(rows: Sequence[Json], over: str) -> Picture | None:
    """``over``: "batch" (time per sample) or "threads" (latency). None where no candidate has two points."""
    curves: dict[tuple[Any, ...], dict[int, float]] = {}
    other = "threads" if over == "batch" else "batch"
    for row in rows:
        median = (row.get("latency_ms") or {}).get("median")
        if row.get("failed") is None and median is not None and row.get(over) is not None:
            per = row["batch"] if over == "batch" else 1
            curves.setdefault((row["name"], row[other], _size(row)), {})[row[over]] = median / per
    curves = {key: points for key, points in curves.items() if len(points) > 1}
    if not curves:
        return None
    shown = dict(list(curves.items())[:SERIES])
    places = sorted({place for points in shown.values() for place in points})
    values = [value for points in shown.values() for value in points.values()]
    what = "Time per sample over the batch size" if over == "batch" else "Latency over the number of threads"
    left, top, base = 44, 36, 196
    x = _scale(places[0], places[-1], left + 8, WIDTH - 10)
    low, high = min(values) / 1.15, max(values) * 1.15
    y = _scale(low, high, base, top)
    marks = _title(what, "milliseconds, logarithmic axes")
    for tick in _ticks(low, high, 7):
        marks += [
            Line(((left, y(tick)), (WIDTH, y(tick))), "line", 1),
            Words(left - 5, y(tick) + 4, _short(tick), "end"),
        ]
    marks += [Words(x(place), base + 15, str(place), "middle") for place in places]
    marks.append(Words(0, base + 15, over))
    others, sizes = ({key[place] for key in curves} for place in (1, 2))
    said = []
    for index, (key, points) in enumerate(shown.items()):
        colour, dash = LOOKS[index]
        path = tuple((x(place), y(points[place])) for place in sorted(points))
        marks.append(Line(path, colour, 2, dash))
        marks += [Dot(px, py, 3.5, colour) for px, py in path]
        line = base + 34 + 16 * index
        marks += [Line(((0, line - 4), (26, line - 4)), colour, 2, dash), Dot(13, line - 4, 3.5, colour)]
        detail = _curve(key, other) if len(others) > 1 else ""
        if len(sizes) > 1:
            detail += f", {key[2]}"
        marks.append(Words(32, line, shortened(key[0], _fits(WIDTH - 32 - text_width(detail))) + detail, colour="ink"))
        figures = ", ".join(f"{over} {place}: {milliseconds(points[place])}" for place in sorted(points))
        said.append(f"{key[0]}{detail}: {figures}.")
    end = base + 34 + 16 * len(shown)
    if hidden := len(curves) - len(shown):
        marks.append(Words(0, end, f"and {hidden} more"))
    return Picture(f"{what}. {' '.join(said)}", end + (6 if hidden else -8), tuple(marks))


def _curve(key: tuple[Any, ...], other: str) -> str:
    return ", " + (_in_words(key[1], None) if other == "batch" else _in_words(None, key[1]))


# ----------------------------------------------------------------------------------------------------- profile


def _about(profile: Json) -> str:
    return f"{profile['model']}, {_in_words(None, profile['threads'])}, {milliseconds(profile['time_ms'])}"


def kinds(profile: Json) -> Picture | None:
    """Shares of the time by kind of operator."""
    rows = [row for row in profile["kinds"] if row["share"] > 0.0005][:ROWS]
    if not rows:
        return None
    marks = _title("Where the time goes", _about(profile))
    left, top, tall = 100, 36, 20
    most = max(row["share"] for row in rows)
    for index, row in enumerate(rows):
        y = top + tall * index
        width = (WIDTH - left - 44) * row["share"] / most
        marks += [
            Words(0, y + 11, shortened(row["kind"], _fits(left)), colour="ink"),
            Box(left, y, max(width, 1), 14, "accent", 0.85),
        ]
        marks.append(Words(left + max(width, 1) + 5, y + 11, f"{row['share']:.1%}", colour="ink"))
    said = ", ".join(f"{row['kind']} {row['share']:.1%}" for row in rows)
    return Picture(f"Time by kind of operator of {_about(profile)}: {said}.", top + tall * len(rows), tuple(marks))


def lost(profile: Json) -> Picture | None:
    """The layers that lose most: their limit, and the time beyond it."""
    rows = sorted(profile["layers"], key=lambda row: -row["lost_ms"])[:8]
    if not rows:
        return None
    marks = _title("Layers that lose most time", _about(profile))
    marks += [Box(0, 32, 10, 10, "good"), Words(14, 41, "this machine's limit")]
    marks += [Box(136, 32, 10, 10, "accent", 0.55), Words(150, 41, "time lost beyond it")]
    top, tall = 50, 33
    most = max(max(row["time_ms"], row["limit_ms"]) for row in rows)
    for index, row in enumerate(rows):
        y = top + tall * index
        limit, time = (WIDTH * row[key] / most for key in ("limit_ms", "time_ms"))
        figure = f"{milliseconds(row['time_ms'])}, {_percent(row['of_limit'])}"
        marks.append(Words(0, y + 12, shortened(row["layer"], _fits(WIDTH - text_width(figure) - 8)), colour="ink"))
        marks.append(Words(WIDTH, y + 12, figure, "end"))
        if time > limit:
            marks.append(Box(limit, y + 17, time - limit, 9, "accent", 0.55))
        marks.append(Box(0, y + 17, max(min(limit, time), 0.5), 9, "good"))
    said = ". ".join(f"{row['layer']}: {milliseconds(row['lost_ms'])} lost" for row in rows)
    words = f"Layers of {_about(profile)} by the time they lose against the limit. {said}."
    return Picture(words, top + tall * len(rows), tuple(marks))


def _percent(share: float | None) -> str:
    return "no limit" if not share else f"{share:.0%} of limit" if share >= 0.01 else "<1% of limit"


def roofline(profile: Json) -> Picture | None:
    """Every layer at its intensity and speed; the area of a dot is its share of the time."""
    rows = [row for row in profile["layers"] if row["gflop_per_s"] and row["intensity"]]
    if not rows:
        return None
    roof = profile["roofline"]
    peak, speeds = roof["peak_gflop_per_s"], [copy["gb_per_s"] for copy in roof["copies"]]
    ridge = peak / min(speeds)
    low, high = _span([row["intensity"] for row in rows] + [peak / max(speeds), ridge])
    least, most = _span([row["gflop_per_s"] for row in rows] + [peak])
    left, top, base = 44, 36, 246
    x, y = _scale(low, high, left, WIDTH - 6), _scale(least, most, base, top)
    marks = _title("Roofline", _about(profile))
    marks += [Line(((left, top), (left, base)), "line", 1), Line(((left, base), (WIDTH, base)), "line", 1)]
    for tick in _ticks(least, most, 5):
        marks += [
            Line(((left, y(tick)), (WIDTH, y(tick))), "line", 1),
            Words(left - 5, y(tick) + 4, _short(tick), "end"),
        ]
    marks += [Words(x(tick), base + 15, _short(tick), "middle") for tick in _ticks(low, high, 6)]
    marks += [Words(WIDTH, base + 29, "operations per byte", "end"), Words(0, base + 29, "up: GFLOP/s")]
    for speed, name in ((max(speeds), "cache"), (min(speeds), "memory")):
        start = max(low, least / speed)
        path = ((x(start), y(start * speed)), (x(peak / speed), y(peak)), (x(high), y(peak)))
        marks.append(Line(path, "ink", 1.5, None if name == "memory" else (4, 3)))
    blamed = sorted(rows, key=lambda row: -row["lost_ms"])[:LABELLED]
    for row in sorted(rows, key=lambda row: -row["share"]):
        radius = max(2.0, 22 * math.sqrt(row["share"]))
        place = x(row["intensity"]), y(row["gflop_per_s"])
        marks.append(Dot(*place, min(radius, 12), "bad" if row in blamed else "accent", 0.75))
    taken: list[tuple[float, float]] = []
    for number, row in enumerate(blamed, 1):
        spot = _free(x(row["intensity"]), y(row["gflop_per_s"]), taken)
        taken.append(spot)
        marks.append(Words(*spot, str(number), "middle", "ink", bold=True))
    below = base + 48
    roofs = f"{_short(peak)} GFLOP/s, {_short(min(speeds))} GB/s; dashes: {_short(max(speeds))} GB/s, in cache"
    marks.append(Words(0, below, f"roof: {roofs}"))
    for number, row in enumerate(blamed, 1):
        figure = f"{milliseconds(row['time_ms'])}, {_percent(row['of_limit'])}"
        line = below + 17 * number
        room = _fits(WIDTH - text_width(figure) - 24)
        marks += [Words(0, line, str(number), colour="bad", bold=True), Words(WIDTH, line, figure, "end")]
        marks.append(Words(14, line, shortened(row["layer"], room), colour="ink"))
    rest = sum(row["share"] for row in profile["layers"] if row not in rows)
    end = below + 17 * (len(blamed) + 1)
    marks.append(Words(0, end, f"{rest:.1%} of the time is in layers without arithmetic, not drawn"))
    said = "; ".join(f"{row['layer']} at {_percent(row['of_limit'])}" for row in blamed)
    words = f"Roofline of {_about(profile)}: {_percent(profile['of_limit'])} in all. Most is lost in {said}."
    return Picture(words, end + 6, tuple(marks))


def _free(x: float, y: float, taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """A place for a number beside a dot that no other number has: above, below, left, right, and further away."""
    around = [(x + dx * far, y + 4 + dy * far) for far in (12, 22, 32) for dx, dy in ((0, -1), (0, 1), (-1, 0), (1, 0))]
    free = [p for p in around if all(abs(p[0] - q[0]) > 9 or abs(p[1] - q[1]) > 12 for q in taken)]
    return next((p for p in free if 50 < p[0] < WIDTH - 5 and 30 < p[1] < 245), around[0])


def _span(values: Iterable[float]) -> tuple[float, float]:
    """An axis that holds all values and some room."""
    known = list(values)
    return min(known) / 1.5, max(known) * 1.5
