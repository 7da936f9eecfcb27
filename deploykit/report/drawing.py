"""A picture of a model before and after, as Graphviz source and as a file that the `dot` program renders.

A side of the picture is plain values: boxes (calls of layers, inputs, outputs) and arrows between their
positions. `dot` writes both sides as clusters next to each other, in Graphviz' language:

    colour       what became of a source; the three fills come from the palette of Okabe and Ito (Color Universal
                 Design, 2008) and differ in brightness, too, and the word stands in the box, so that the picture
                 can be read by everybody and in print
    dashes       a layer that is gone in the other side
    thick frame  a layer that took an affine in; double frame: a layer that is new
    tooltip      the whole name and the reason (shown by a browser that opens the .svg)

Names come from model files and may hold anything. They are written as quoted strings, never as Graphviz'
HTML-like labels: a quote ends such a string, a backslash starts an escape (``\\N`` would be the node's number), an
ampersand starts an entity, and what cannot be printed cannot stand in an SVG; all four are dealt with in `quoted`.
Tooltips are unescaped twice by some versions of Graphviz and once by others, so there a backslash is written as the
sign that looks like it.

Limits: Graphviz takes seconds for a thousand layers and much longer beyond; after `PATIENCE_S` the drawing is
given up. A .png is at most 32,767 pixels high, so a net of hundreds of layers is scaled down in it: take .svg. The
source can always be written (.dot, .gv) and needs no Graphviz.
"""

from __future__ import annotations

import html
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deploykit.errors import InputError, MissingComponentError, OutputError
from deploykit.files import claim, whole_file

PROGRAM = "dot"
PATIENCE_S = 600.0
# suffix -> what `dot -T` calls it; None: the source itself
FORMATS: Mapping[str, str | None] = {".svg": "svg", ".png": "png", ".pdf": "pdf", ".dot": None, ".gv": None}

NAME_SIGNS = 40  # longer names are cut in the middle: the beginning tells the block, the end the layer
BACKSLASH = "⧵"  # U+29F5, for tooltips
NOTHING = '" "'  # as tooltip: without one, Graphviz shows its own numbers
LISTED = 2  # names in one line of a box; the tooltip has them all


@dataclass(frozen=True)
class Look:
    """How an outcome is painted, and what the legend says about it."""

    fill: str
    meaning: str


OUTCOMES: Mapping[str, Look] = {
    "fused": Look("#56B4E9", "fused: absorbed completely"),
    "reduced": Look("#F0E442", "reduced: part of it absorbed"),
    "kept": Look("#D55E00", "kept: for the reason named"),
}
PLAIN = "#FFFFFF"
MARKS = ("dashed: gone afterwards", "thick frame: took an affine", "double frame: new")


@dataclass(frozen=True)
class Box:
    """One call of a layer, or an input or output of the model.

    ``kind``: class of the layer; ``detail``: one more word on it (its output shape). ``outcome``: a key of
    `OUTCOMES` for a source, with ``code`` and ``reason`` and the layers it goes ``into``; ``took``: the sources that a
    sink absorbed. ``state`` says whether the other side has it, too; ``end``: an input or output of the model.
    """

    name: str
    kind: str
    detail: str = ""
    outcome: str | None = None
    code: str = ""
    reason: str = ""
    into: tuple[str, ...] = ()
    took: tuple[str, ...] = ()
    state: Literal["stays", "gone", "new"] = "stays"
    end: bool = False


@dataclass(frozen=True)
class Arrow:
    """A tensor on its way, between positions in the boxes of a side."""

    start: int
    stop: int


@dataclass(frozen=True)
class Side:
    """One model as boxes, in running order, and arrows."""

    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]


# ------------------------------------------------------------------------------------------------ the source


def plain(text: str) -> str:
    """One line of printable signs; the others (control signs, lone surrogates) become question marks."""
    return " ".join("".join(sign if sign.isprintable() or sign.isspace() else "?" for sign in text).split())


def shortened(name: str, most: int = NAME_SIGNS) -> str:
    """A name of at most ``most`` signs, cut in the middle."""
    if len(name) <= most:
        return name
    head = most // 2
    return f"{name[:head]}…{name[len(name) - (most - head - 1) :]}"


def quoted(*lines: str) -> str:
    """Lines of text as one string of Graphviz' language that shows exactly these signs."""
    escapes = (("\\", "\\\\"), ('"', '\\"'), ("&", "&amp;"))  # the backslash first: the others bring their own
    written = []
    for line in lines:
        line = plain(line)
        for sign, escape in escapes:
            line = line.replace(sign, escape)
        written.append(line)
    return '"' + "\\n".join(written) + '"'


def _names(names: Sequence[str]) -> str:
    listed = names[:LISTED]
    more = f" +{len(names) - LISTED}" if len(names) > LISTED else ""
    return ", ".join(shortened(plain(name), NAME_SIGNS // len(listed)) for name in listed) + more


def _label(box: Box) -> Iterator[str]:
    yield shortened(plain(box.name))
    yield f"{box.kind}  {box.detail}"
    if box.outcome is not None:
        yield f"{box.outcome} → {_names(box.into)}" if box.into else f"{box.outcome}: {box.code}"
    if box.took:
        yield f"took {_names(box.took)}"


def _tooltip(box: Box) -> Iterator[str]:
    yield f"{box.name}: {box.kind} {box.detail}"
    if box.outcome is not None:
        yield f"{box.outcome} into {', '.join(box.into)}" if box.into else box.outcome
        yield f"{box.code}: {box.reason}"
    if box.took:
        yield f"took {', '.join(box.took)}"


def _attributes(box: Box) -> Iterator[tuple[str, str]]:
    yield "label", quoted(*_label(box))
    yield "tooltip", quoted(*(line.replace("\\", BACKSLASH) for line in _tooltip(box) if line))
    if box.end:
        yield "shape", "ellipse"
    if box.outcome is not None:
        yield "fillcolor", quoted(OUTCOMES[box.outcome].fill)
    if box.state == "gone":
        yield "style", '"filled,dashed"'
    if box.state == "new":
        yield "peripheries", "2"
    if box.took:
        yield "penwidth", "3"


def _cluster(side: Side, letter: str, title: str) -> Iterator[str]:
    yield f"  subgraph cluster_{title} {{"
    yield f"    label={quoted(title)}; tooltip={NOTHING};"
    for index, box in enumerate(side.boxes):
        yield f"    {letter}{index} [{', '.join(f'{key}={value}' for key, value in _attributes(box))}];"
    for arrow in side.arrows:
        yield f"    {letter}{arrow.start} -> {letter}{arrow.stop};"
    yield "  }"


def _legend(title: str) -> str:
    """Title and legend as an HTML-like label: these words are ours, and the title is escaped."""
    colours = "".join(f'<TD BGCOLOR="{look.fill}">{look.meaning}</TD>' for look in OUTCOMES.values())
    marks = "".join(f"<TD>{mark}</TD>" for mark in MARKS)
    table = '<TABLE BORDER="0" CELLBORDER="1" CELLSPACING="3" CELLPADDING="5">'
    caption = f'<TR><TD BORDER="0" COLSPAN="{len(OUTCOMES)}"><B>{html.escape(plain(title)) or " "}</B></TD></TR>'
    return f"<{table}{caption}<TR>{colours}</TR><TR>{marks}</TR></TABLE>>"


def dot(before: Side, after: Side, title: str = "model") -> str:
    """Graphviz source of both sides next to each other, with a legend above; the same values, the same text."""
    font = 'fontname="Helvetica,Arial,sans-serif"'
    lines = [
        "digraph model {",
        f'  graph [rankdir=TB, ranksep=0.25, nodesep=0.3, labelloc=t, charset="UTF-8", {font}, fontsize=14,',
        f"         bgcolor=white, tooltip={NOTHING}, label={_legend(title)}];",
        f'  node [shape=box, style=filled, fillcolor="{PLAIN}", color="#333333", {font}, fontsize=11,',
        '        margin="0.12,0.05"];',
        f'  edge [color="#555555", arrowsize=0.6, tooltip={NOTHING}];',
        *_cluster(before, "b", "before"),
        *_cluster(after, "a", "after"),
        "}",
    ]
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------------------- the file


def _program(path: Path) -> str | None:
    """The full name of the program that ``path`` needs; None where the source itself is what is written."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: a picture is written as {', '.join(FORMATS)}; give a name that ends so")
    if FORMATS[path.suffix.lower()] is None:
        return None
    program = shutil.which(PROGRAM)
    if program is None:
        raise MissingComponentError(
            f"cannot draw {path}: the program {PROGRAM} is not installed; "
            "install graphviz, for example `apt install graphviz`, or write a .dot file"
        )
    return program


def claim_drawing(
    path: str | os.PathLike[str], *, force: bool = False, inputs: Sequence[str | os.PathLike[str] | None] = ()
) -> Path:
    """Check, before any work is done, that a picture can be drawn to ``path``; see `deploykit.files.claim`.

    Raises InputError for a suffix that is no picture's, MissingComponentError when Graphviz is needed and not
    installed, OutputError when the file may not be written.
    """
    _program(Path(path))
    return claim(path, force=force, inputs=inputs)


def draw(text: str, path: str | os.PathLike[str], *, force: bool = False, patience_s: float = PATIENCE_S) -> Path:
    """Write Graphviz source ``text`` as the kind of file that the suffix of ``path`` names: whole, or not at all.

    Raises what `claim_drawing` raises, and OutputError when Graphviz fails or needs more than ``patience_s``.
    """
    path = Path(path)
    program = _program(path)
    with whole_file(path, force=force) as target:
        source = text.encode()
        target.write_bytes(source if program is None else _rendered(program, source, path, patience_s))
    return path


def _rendered(program: str, source: bytes, path: Path, patience_s: float) -> bytes:
    """What Graphviz makes of the source; it is read from a pipe, so that only `whole_file` writes."""
    remedy = "write a .dot file instead and render it with your own options"
    try:
        command = [program, f"-T{FORMATS[path.suffix.lower()]}"]
        done = subprocess.run(command, input=source, capture_output=True, timeout=patience_s, check=False)
    except subprocess.TimeoutExpired:
        raise OutputError(f"cannot draw {path}: {PROGRAM} needed more than {patience_s:.0f} s; {remedy}") from None
    if done.returncode or not done.stdout:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise OutputError(f"cannot draw {path}: {PROGRAM} says {said[0]!r}; {remedy}")
    return done.stdout
