"""Pictures as plain values, and the ways to show them: in a page, as an .svg file, as a .png file.

A picture is a title in words, a height and a list of marks (lines, boxes, dots, texts) on a sheet that is `WIDTH` units
wide: as wide as a phone, with text of 11 units, so that it can be read there and is only scaled up elsewhere. Colours
are names of `deploykit.report.html_style.COLOURS`.

    fragment    an <svg> for a page with that style sheet: its colours follow the page's, by day and night
    figures     several of them, as a section of such a page
    document    a whole .svg file, with the colours in its own style sheet, and no script and no reference
    png         drawn by pillow, by day, three pixels to the unit; shapes are drawn larger and reduced, for soft edges

Texts come from files and may hold anything: they are made one line of printable signs, and escaped.

Limits: the font of a .png (pillow's own) has Latin letters alone; others show as boxes there.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from deploykit.errors import InputError, MissingComponentError
from deploykit.files import claim, whole_file
from deploykit.report.drawing import plain
from deploykit.report.html_style import COLOURS

WIDTH = 360
MARGIN = 12  # around the pictures of a file
FONT = 11
LETTER = 0.62  # width of a letter over its height, on average, in a wide font
SHOWN = 540  # width of an .svg file where there is room, in pixels of the screen
PIXELS = 3  # of a .png, to the unit
SOFT = 2  # ... and how much larger shapes are drawn first


@dataclass(frozen=True)
class Line:
    """A line through points (x, y). ``dash``: lengths of stroke and gap."""

    points: tuple[tuple[float, float], ...]
    colour: str = "accent"
    width: float = 1.5
    dash: tuple[float, float] | None = None


@dataclass(frozen=True)
class Box:
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    colour: str = "accent"
    opacity: float = 1.0


@dataclass(frozen=True)
class Dot:
    """A disc with a thin rim of the ground's colour."""

    x: float
    y: float
    radius: float
    colour: str = "accent"
    opacity: float = 1.0


@dataclass(frozen=True)
class Words:
    """One line of text; ``y`` is its base line, ``anchor`` start, middle or end."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    colour: str = "quiet"
    bold: bool = False


Mark = Line | Box | Dot | Words


@dataclass(frozen=True)
class Picture:
    """``title`` says in words what the picture shows, for those who cannot see it."""

    title: str
    height: float
    marks: tuple[Mark, ...]


def moved(mark: Mark, x: float, y: float) -> Mark:
    """The mark at another place."""
    if isinstance(mark, Line):
        return dataclasses.replace(mark, points=tuple((px + x, py + y) for px, py in mark.points))
    return dataclasses.replace(mark, x=mark.x + x, y=mark.y + y)


def text_width(text: str) -> float:
    """About how wide a text is, in units."""
    return LETTER * FONT * len(text)


# --------------------------------------------------------------------------------------------------------- SVG


def _svg_line(mark: Line) -> str:
    (x, y), *more = mark.points
    path = f"M{x:.1f} {y:.1f}" + "".join(f"L{px:.1f} {py:.1f}" for px, py in more)
    dash = f"; stroke-dasharray: {mark.dash[0]:g} {mark.dash[1]:g}" if mark.dash else ""
    return f'<path d="{path}" style="fill: none; stroke: var(--{mark.colour}); stroke-width: {mark.width:g}{dash}"/>'


def _svg_box(mark: Box) -> str:
    place = f'x="{mark.x:.1f}" y="{mark.y:.1f}" width="{mark.width:.1f}" height="{mark.height:.1f}"'
    return f'<rect {place} style="fill: var(--{mark.colour}); opacity: {mark.opacity:g}"/>'


def _svg_dot(mark: Dot) -> str:
    look = f"fill: var(--{mark.colour}); opacity: {mark.opacity:g}; stroke: var(--paper); stroke-width: 0.75"
    return f'<circle cx="{mark.x:.1f}" cy="{mark.y:.1f}" r="{mark.radius:.1f}" style="{look}"/>'


def _svg_words(mark: Words) -> str:
    weight = "; font-weight: 600" if mark.bold else ""
    return (
        f'<text x="{mark.x:.1f}" y="{mark.y:.1f}" text-anchor="{mark.anchor}" '
        f'style="fill: var(--{mark.colour}){weight}">{escape(plain(mark.text))}</text>'
    )


def _svg_marks(marks: Sequence[Mark]) -> Iterator[str]:
    for mark in marks:
        if isinstance(mark, Line):
            yield _svg_line(mark)
        elif isinstance(mark, Box):
            yield _svg_box(mark)
        elif isinstance(mark, Dot):
            yield _svg_dot(mark)
        else:
            yield _svg_words(mark)


def fragment(picture: Picture) -> str:
    """The picture as an <svg> element within a page that has `html_style.STYLE`; it is as wide as there is room."""
    body = "".join(_svg_marks(picture.marks))
    size = f'viewBox="0 0 {WIDTH} {picture.height:g}"'
    return f'<svg role="img" {size}><title>{escape(plain(picture.title))}</title>{body}</svg>'


def figures(pictures: Sequence[Picture]) -> str:
    """All pictures for such a page, side by side where there is room; "" where there is none."""
    shown = "".join(f"<figure>{fragment(picture)}</figure>" for picture in pictures)
    return f'<div class="plots">{shown}</div>' if shown else ""


def _palette(place: int) -> str:
    return " ".join(f"--{name}: {pair[place]};" for name, pair in COLOURS.items())


def document(pictures: Sequence[Picture]) -> str:
    """All pictures, one below the other, as the text of an .svg file."""
    sheet = _sheet(pictures)
    width, height = WIDTH + 2 * MARGIN, sheet.height
    style = (
        f"svg {{ {_palette(0)} color-scheme: light dark; }} "
        f"@media (prefers-color-scheme: dark) {{ svg {{ {_palette(1)} }} }} "
        f"@media (max-width: {SHOWN}px) {{ svg {{ width: 100%; height: auto; }} }} "
        f"text {{ font: {FONT}px system-ui, sans-serif; stroke: var(--paper); stroke-width: 3px; "
        "stroke-linejoin: round; paint-order: stroke; }"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{SHOWN}" height="{SHOWN * height / width:.0f}" '
        f'viewBox="0 0 {width} {height:g}"><title>{escape(plain(sheet.title))}</title><style>{style}</style>'
        f'<rect width="{width}" height="{height:g}" style="fill: var(--paper)"/>'
        f"{''.join(_svg_marks(sheet.marks))}</svg>\n"
    )


def _sheet(pictures: Sequence[Picture]) -> Picture:
    """The pictures below one another, with a margin."""
    marks: list[Mark] = []
    y = float(MARGIN)
    for picture in pictures:
        marks += [moved(mark, MARGIN, y) for mark in picture.marks]
        y += picture.height + 2 * MARGIN
    return Picture(" ".join(picture.title for picture in pictures), max(y - MARGIN, 2.0 * MARGIN), tuple(marks))


# --------------------------------------------------------------------------------------------------------- PNG


def _pillow() -> Any:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ModuleNotFoundError as error:
        raise MissingComponentError(
            "a .png picture needs pillow; install it with: pip install 'deploykit[report]', or write an .svg"
        ) from error
    return Image, ImageDraw, ImageFont


def _rgb(colour: str, opacity: float = 1.0) -> tuple[int, ...]:
    """A colour by day, mixed with the paper's."""
    over, under = (COLOURS[name][0] for name in (colour, "paper"))
    pairs = ((int(over[i : i + 2], 16), int(under[i : i + 2], 16)) for i in (1, 3, 5))
    return tuple(round(opacity * a + (1 - opacity) * b) for a, b in pairs)


def _dashes(mark: Line) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    """The strokes of a line, from one point to the next; the pattern starts anew at each point."""
    for (x1, y1), (x2, y2) in zip(mark.points, mark.points[1:], strict=False):
        length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
        on, off = mark.dash or (length, 0.0)
        start = 0.0
        while start < length:
            a, b = start / length, min(start + on, length) / length
            yield (x1 + a * (x2 - x1), y1 + a * (y2 - y1)), (x1 + b * (x2 - x1), y1 + b * (y2 - y1))
            start += on + off


def png(pictures: Sequence[Picture]) -> bytes:
    """All pictures, one below the other, as the bytes of a .png file. Raises MissingComponentError without pillow."""
    image_of, draw_of, font_of = _pillow()
    sheet = _sheet(pictures)
    size = ((WIDTH + 2 * MARGIN) * PIXELS, round(sheet.height * PIXELS))
    scale = PIXELS * SOFT
    large = image_of.new("RGB", (size[0] * SOFT, size[1] * SOFT), _rgb("paper"))
    draw = draw_of.Draw(large)
    for mark in sheet.marks:
        if isinstance(mark, Line):
            for start, end in _dashes(mark):
                ends = [tuple(value * scale for value in point) for point in (start, end)]
                draw.line(ends, fill=_rgb(mark.colour), width=max(round(mark.width * scale), 1))
        elif isinstance(mark, Box):
            far = ((mark.x + mark.width) * scale - 1, (mark.y + mark.height) * scale - 1)
            near = (mark.x * scale, mark.y * scale)
            draw.rectangle([near, tuple(map(max, near, far))], fill=_rgb(mark.colour, mark.opacity))
        elif isinstance(mark, Dot):
            rim = scale // 2
            draw.circle((mark.x * scale, mark.y * scale), mark.radius * scale + rim, fill=_rgb("paper"))
            draw.circle((mark.x * scale, mark.y * scale), mark.radius * scale, fill=_rgb(mark.colour, mark.opacity))
    image = large.resize(size, image_of.Resampling.BOX)
    draw, font = draw_of.Draw(image), font_of.load_default(FONT * PIXELS)
    for mark in sheet.marks:
        if isinstance(mark, Words):
            place, anchor = (
                (mark.x * PIXELS, mark.y * PIXELS),
                {"start": "ls", "middle": "ms", "end": "rs"}[mark.anchor],
            )
            for colour, rim in (("paper", 4), (mark.colour, 1 if mark.bold else 0)):  # first clear what is behind
                draw.text(place, plain(mark.text), fill=_rgb(colour), font=font, anchor=anchor, stroke_width=rim)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------------- files


def _as_svg(pictures: Sequence[Picture]) -> bytes:
    return document(pictures).encode()


FORMATS: Mapping[str, Any] = {".svg": _as_svg, ".png": png}


def claim_picture(
    path: str | os.PathLike[str], *, force: bool = False, inputs: Sequence[str | os.PathLike[str] | None] = ()
) -> Path:
    """Check, before any work is done, that pictures can be written to ``path``; see `deploykit.files.claim`.

    Raises InputError for another suffix, MissingComponentError for a .png without pillow, OutputError when the file
    may not be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise InputError(f"{path}: measurements are drawn as {' or '.join(FORMATS)}; give a name that ends so")
    if suffix == ".png":
        _pillow()
    return claim(path, force=force, inputs=inputs)


def write_pictures(pictures: Sequence[Picture], path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write the kind of file that the suffix of ``path`` names: whole, or not at all. Raises like `claim_picture`."""
    path = claim_picture(path, force=force)
    if not pictures:
        raise InputError(f"nothing to draw in {path}: no candidate could be measured")
    data = FORMATS[path.suffix.lower()](pictures)
    with whole_file(path, force=force) as target:
        target.write_bytes(data)
    return path
