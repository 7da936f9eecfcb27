"""The pictures of an HTML report: inline SVG without a script, from plain numbers.

A picture is as wide as there is room, and its text stays as large as the page's: positions along x are percentages, so
nothing is scaled but lengths. Curves lie in an inner coordinate system of 1000 x height that is stretched along x
alone, with strokes that are not (``vector-effect``); a dot is a stroke of length 0 with round ends.

    histogram    how many values are how far from the reference, in ulp, by octaves; 0 has a bar of its own
    depths       SNR by layer: the candidate's, the original's own, and where the error jumps
    bar          a median as a bar from 0, and the way from there to p90
    interval     a ratio and its interval, on an axis of logarithms with a line at 1

Each has a title that says in words what it shows. What is not a finite number is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from deploykit.report.check_markdown import cut
from deploykit.report.wording import small

Json = Mapping[str, Any]
Counts = Sequence[tuple[float, int]]

TICKS = 7  # labels on an axis, at most
NAME = 24  # signs of a name within a picture


def _svg(title: str, height: int, body: str) -> str:
    return f'<svg role="img" height="{height}"><title>{escape(title)}</title>{body}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.2f}%" y="{y:g}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.2f}%" y1="{y1:g}" x2="{x2:.2f}%" y2="{y2:g}"/>'


# --------------------------------------------------------------------------------------------------- histograms


def octaves(counts: Iterable[Sequence[float | None]]) -> Counts:
    """The classes of a histogram that can be drawn: (upper edge, number of values)."""
    return [(float(edge), int(number)) for edge, number in counts if edge is not None and number]


def octave_span(histograms: Iterable[Counts]) -> tuple[float, float]:
    """log2 of the lowest and the highest edge of bars, so that several histograms can share an axis."""
    edges = [math.log2(edge) for counts in histograms for edge, _ in counts if edge > 0]
    return (min(edges) - 1, max(edges)) if edges else (-1.0, 1.0)


def _power(exponent: int) -> str:
    if exponent < 0:
        return f"1/{2**-exponent}" if exponent >= -10 else f"2^{exponent}"
    return f"{2**exponent:,}" if exponent <= 13 else f"2^{exponent}"


def histogram(counts: Counts, span: tuple[float, float], marks: Mapping[str, float | None], title: str) -> str:
    """``marks``: distances (in ulp) to be marked, by name. Bars show shares of all values, each one octave wide."""
    top, base, height = 34, 118, 136
    low, high = span
    total, most = sum(number for _, number in counts), max(number for _, number in counts)
    left = 9.0  # the bar of 0 has the room in front of the axis

    def x(exponent: float) -> float:
        return left + (100 - left) * (exponent - low) / (high - low)

    octave = (100 - left) / (high - low)
    parts, named = [_line(0, base, 100, base, "axis")], False
    for edge, number in counts:
        start, width = (0.0, min(octave, left - 3)) if edge == 0 else (x(math.log2(edge) - 1), octave)
        tall = max((base - top) * number / most, 1.0)
        parts.append(
            f'<rect class="bar" x="{start + 0.05 * width:.2f}%" y="{base - tall:.1f}" width="{0.9 * width:.2f}%" '
            f'height="{tall:.1f}"/>'
        )
        if number == most and not named:
            named = True
            parts.append(_text(min(max(start + width / 2, 4), 96), top - 5, f"{100 * number / total:.0f} %"))
    if any(edge == 0 for edge, _ in counts):
        parts.append(_text(0, base + 15, "0", "start"))
    exponents = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
    step = max(1, math.ceil(len(exponents) / TICKS))
    for exponent in exponents:
        if exponent % step == 0:
            place = x(exponent)
            anchor = "start" if place < left + 4 else "end" if place > 92 else "middle"
            parts += [_line(place, base, place, base + 4, "axis"), _text(place, base + 15, _power(exponent), anchor)]
    taken: list[float] = []
    for name, distance in marks.items():
        if distance is None:
            continue
        place = min(max(x(math.log2(distance)), left), 100.0) if distance > 0 else 0.0
        parts.append(_line(place, 14, place, base, "mark"))
        if all(abs(place - other) > 9 for other in taken):
            parts.append(_text(place, 10, name, "start" if place < 4 else "end" if place > 92 else "middle"))
            taken.append(place)
    return _svg(title, height, "".join(parts))


# -------------------------------------------------------------------------------------------------- SNR by layer


def _decibel_ticks(values: Sequence[float]) -> list[float]:
    """Round numbers that enclose the values, at most `TICKS` of them."""
    step = next(s for s in (5, 10, 20, 50, 100, 200, 500) if (max(values) - min(values)) / s <= TICKS - 2 or s == 500)
    first, last = math.floor(min(values) / step), math.ceil(max(values) / step)
    return [step * k for k in range(first, max(last, first + 1) + 1)]


def depths(rows: Sequence[Json], title: str) -> str:
    """``rows``: layers that were measured, in order of their depth. "" where no layer has a figure."""
    values = [row[key] for row in rows for key in ("snr_db", "own_snr_db") if row.get(key) is not None]
    if not values:
        return ""
    top, base, height = 22, 210, 232
    ticks = _decibel_ticks(values)

    def x(index: int) -> float:
        return 1000 * (index + 0.5) / len(rows)

    def y(value: float) -> float:
        return base - (base - top) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    def path(key: str) -> str:
        """A curve; it is interrupted where a layer has no figure."""
        parts, pen = [], "M"
        for index, row in enumerate(rows):
            if row.get(key) is None:
                pen = "M"
                continue
            parts.append(f"{pen}{x(index):.1f} {y(row[key]):.1f}")
            pen = "L"
        return "".join(parts)

    def dots(wrong: bool) -> str:
        return "".join(
            f"M{x(index):.1f} {y(row['snr_db']):.1f}h0"
            for index, row in enumerate(rows)
            if row.get("snr_db") is not None and (row["status"] in ("jump", "after")) == wrong
        )

    parts = []
    for tick in ticks:
        parts.append(_line(0, y(tick), 100, y(tick), "axis"))
        unit = " dB" if tick == ticks[-1] else ""
        parts.append(f'<text x="-8" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}{unit}</text>')
    curves = f'<path class="own" d="{path("own_snr_db")}"/><path class="stroke" d="{path("snr_db")}"/>'
    width = 6 if len(rows) <= 80 else 4 if len(rows) <= 250 else 3
    points = "".join(
        f'<path class="dots{" wrong" if wrong else ""}" style="stroke-width: {width}" d="{dots(wrong)}"/>'
        for wrong in (False, True)
        if dots(wrong)
    )
    jump = next((index for index, row in enumerate(rows) if row["status"] == "jump"), None)
    if jump is not None:
        place = x(jump) / 10
        anchor, nudge = ("start", ' dx="5"') if place < 50 else ("end", ' dx="-5"')
        name = cut(str(rows[jump]["layer"]), NAME)
        parts.append(_line(place, 4, place, base, "jump"))
        parts.append(_text(place, 12, name, anchor, f' class="jumped"{nudge}'))
    parts.append(
        f'<svg x="0" y="0" width="100%" height="{height}" viewBox="0 0 1000 {height}" preserveAspectRatio="none" '
        f'aria-hidden="true">{curves}{points}</svg>'
    )
    for row, word, place, anchor in ((rows[0], "first", 0, "start"), (rows[-1], "last", 100, "end")):
        deep = f"depth {row['depth']}" if row.get("depth") is not None else f"{word} layer"
        parts.append(_text(place, base + 18, deep, anchor))
    return _svg(title, height, "".join(parts))


# ------------------------------------------------------------------------------------------------------ latency


def bar(median: float, p90: float | None, longest: float, title: str) -> str:
    """A median from 0 on an axis that ends at ``longest``, and a line on to p90."""
    end = 100 * median / longest
    parts = [_line(0, 7, 100, 7, "axis"), f'<rect class="bar" x="0" y="2" width="{end:.2f}%" height="10"/>']
    if p90 is not None and p90 > median:
        far = 100 * p90 / longest
        parts += [_line(end, 7, far, 7, "stroke"), _line(far, 3, far, 11, "stroke")]
    return _svg(title, 14, "".join(parts))


def ratio_span(values: Iterable[float]) -> tuple[float, float]:
    """log of the ends of an axis that holds all of the ratios, and 1."""
    logs = [0.0, *(math.log(value) for value in values if value > 0)]
    room = 0.06 * (max(logs) - min(logs)) or 0.1
    return min(logs) - room, max(logs) + room


def interval(value: float, ends: Sequence[float] | None, span: tuple[float, float], title: str) -> str:
    """A ratio as a dot and its interval as a line; the dashed line is 1."""

    def x(ratio: float) -> float:
        return 100 * (math.log(ratio) - span[0]) / (span[1] - span[0])

    parts = [_line(0, 7, 100, 7, "axis"), _line(x(1), 0, x(1), 14, "mark")]
    if ends and all(end > 0 for end in ends):
        parts.append(_line(x(ends[0]), 7, x(ends[1]), 7, "stroke"))
        parts += [_line(x(end), 3, x(end), 11, "stroke") for end in ends]
    parts.append(f'<circle class="fill" cx="{x(value):.2f}%" cy="7" r="4"/>')
    return _svg(title, 14, "".join(parts))


def in_words(ulp: Json) -> str:
    """Percentiles of a distance in ulp."""
    names = {"p50": "median", "p90": "p90", "p99": "p99", "max": "largest"}
    return ", ".join(f"{name} {_ulps(ulp[key])}" for key, name in names.items() if ulp.get(key) is not None)


def _ulps(value: float) -> str:
    return f"{value:,.0f}" if 10 <= value < 1e6 else small(value)
