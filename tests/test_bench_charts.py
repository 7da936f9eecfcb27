"""The pictures of a benchmark: drawn to scale, whatever names they hold, and shown by a browser without a flaw."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from test_html import EVIL, FLAWS, WIDE, browser  # noqa: F401  # a fixture

from deploykit.errors import InputError, MissingComponentError, OutputError
from deploykit.report.bench_charts import (
    kinds,
    latency,
    lost,
    of_bench,
    of_profile,
    ratios,
    roofline,
    sweep,
)
from deploykit.report.html_style import COLOURS, STYLE
from deploykit.report.picture import (
    MARGIN,
    PIXELS,
    WIDTH,
    Box,
    Dot,
    Line,
    Picture,
    Words,
    claim_picture,
    document,
    figures,
    png,
    write_pictures,
)

RANDOM = np.random.default_rng(0)


def candidate(name="a.onnx", batch=1, threads=2, median=2.0, size=32, **more):
    """One whose samples lie evenly, on logarithms, from half to twice the median."""
    samples = np.geomspace(median / 2, median * 2, 401) / 1e3
    known = {"median": median, "p90": median * 2**0.8, "p99": median * 2**0.98, "min": median / 2}
    return {"name": name, "batch": batch, "threads": threads, "input_shapes": {"x": [batch, size, size, 3]},
            "latency_ms": known, "samples_s": [[list(samples[:200]), list(samples[200:])]], "failed": None,
            **more}  # fmt: skip


def failed(name="broken.onnx", **more):
    empty = dict.fromkeys(("median", "p90", "p99", "min"))
    return candidate(name) | {"latency_ms": empty, "samples_s": [], "failed": "it does not load", **more}


def pair(a="a.onnx", b="b.onnx", ratio=0.5, ci95=(0.4, 0.625), verdict="faster", **more):
    return {"a": a, "b": b, "batch": 1, "threads": 2, "ratio": ratio, "ci95": ci95, "verdict": verdict, **more}


def layer(name, time, limit, flops=1e6, size=1e5, total=10.0, **more):
    return {"layer": name, "time_ms": time, "share": time / total, "flops": flops, "bytes": size,
            "gflop_per_s": flops / time / 1e6, "gb_per_s": size / time / 1e6, "intensity": flops / size,
            "limit_ms": limit, "of_limit": limit / time, "lost_ms": max(time - limit, 0), "operators": ["Conv"],
            "nodes": 1, **more}  # fmt: skip


def profiled(**more):
    layers = [layer("good", 5, 4.5, 4e8), layer("bad", 4, 0.5, 1e7), layer("moved", 1, 0.2, 0)]
    rows = [{"kind": "convolution", "share": 0.9}, {"kind": "layout", "share": 0.1}, {"kind": "runtime", "share": 0.0}]
    roof = {"peak_gflop_per_s": 100.0, "threads": 2,
            "copies": [{"bytes": 1e4, "gb_per_s": 40.0}, {"bytes": 1e8, "gb_per_s": 10.0}]}  # fmt: skip
    return {"model": "net.onnx", "threads": 2, "time_ms": 10.0, "limit_ms": 5.2, "of_limit": 0.52, "kinds": rows,
            "layers": layers, "roofline": roof, "blamed": ["bad"], **more}  # fmt: skip


def report(**more):
    rows = [candidate(f"{name}.onnx", batch, threads, median * batch**0.8 / threads**0.5)
            for name, median in (("stock", 4.0), ("ours", 2.0)) for batch in (1, 8) for threads in (1, 2)]  # fmt: skip
    return {"candidates": [*rows, failed()], "comparisons": [pair("ours.onnx", "stock.onnx"), pair(verdict="slower")],
            "profiles": [profiled()], **more}  # fmt: skip


def marks(picture, kind, **like):
    return [m for m in picture.marks if isinstance(m, kind) and all(getattr(m, k) == v for k, v in like.items())]


def said(picture):
    return [mark.text for mark in marks(picture, Words)]


# ---------------------------------------------------------------------------------------------------- drawn to scale


def test_a_latency_is_where_its_axis_says():
    """Samples from 1 to 4 ms: 2 is halfway on logarithms, and every bin is as full as the others."""
    picture = latency([candidate(median=2.0)])
    (median,) = marks(picture, Line, colour="ink")
    assert median.points[0][0] == pytest.approx(WIDTH / 2, abs=WIDTH * 0.01)
    bars = marks(picture, Box)
    inner = [bar.height for bar in bars[2:-2]]
    assert max(inner) < 1.5 * min(inner)
    assert sum(bar.width for bar in bars) == pytest.approx(WIDTH, rel=0.05)
    p90, p99 = (line.points[0][0] for line in marks(picture, Line, colour="quiet"))
    middle = median.points[0][0]
    assert (p99 - middle) / (p90 - middle) == pytest.approx(0.98 / 0.8, rel=1e-6)


def test_candidates_share_their_axis():
    picture = latency([candidate("slow", median=8.0), candidate("fast", median=2.0)])
    slow, fast = (line.points[0][0] for line in marks(picture, Line, colour="ink"))
    ticks = {mark.text.removesuffix(" ms"): mark.x for mark in marks(picture, Words, anchor="middle")}
    assert slow - fast == pytest.approx((ticks["10"] - ticks["1"]) * math.log10(4))
    assert {"8.00 ms", "2.00 ms"} <= set(said(picture))


def test_without_samples_a_strip_shows_the_percentiles():
    picture = latency([candidate() | {"samples_s": []}])
    assert not marks(picture, Box)
    (reach,) = marks(picture, Line, colour="accent")
    assert reach.points[0][0] < marks(picture, Line, colour="ink")[0].points[0][0] < reach.points[1][0]


def test_the_few_longest_samples_do_not_stretch_the_axis():
    usual = latency([candidate()])
    row = candidate()
    row["samples_s"] = [[*row["samples_s"][0], [5.0]]]
    middle = [marks(picture, Line, colour="ink")[0].points[0][0] for picture in (usual, latency([row]))]
    assert middle[0] == pytest.approx(middle[1], abs=3)


def test_what_failed_is_counted_and_not_drawn():
    assert said(latency([candidate(), failed()]))[-1].endswith("p99; 1 could not be measured")
    assert latency([failed()]) is None
    assert of_bench({"candidates": [failed()], "comparisons": []}) == []


def test_ratios_lie_around_one():
    picture = ratios([pair(ratio=0.5, ci95=[0.4, 0.625]), pair(ratio=2.0, ci95=[1.6, 2.5], verdict="slower")])
    one = next(line for line in marks(picture, Line) if line.dash).points[0][0]
    half, twice = (dot.x for dot in marks(picture, Dot))
    assert one - half == pytest.approx(twice - one)
    ends = next(line for line in marks(picture, Line, colour="good", width=2)).points
    assert ends[0][0] + ends[1][0] == pytest.approx(2 * half)
    assert [dot.colour for dot in marks(picture, Dot)] == ["good", "bad"]
    assert {"0.50x faster", "2.00x slower"} <= set(said(picture))
    assert "against b.onnx" in said(picture)


def test_pairs_of_several_settings_say_which():
    rows = [pair(batch=batch, size=size) for batch in (1, 8) for size in ("32x32x3", "64x64x3")]
    assert "against b.onnx (batch 8, 2 threads, 64x64x3)" in said(ratios(rows))
    assert "against b.onnx (batch 8, 2 threads)" in said(ratios([pair(), pair(batch=8)]))
    assert "batch 1, 2 threads, 32x32x3" in said(latency([candidate()]))
    assert "batch 1, 2 threads, a 3, b 5" in said(latency([candidate(input_shapes={}) | {"size": "a 3, b 5"}]))


def test_a_ratio_without_interval_is_a_dot():
    picture = ratios([pair(ci95=None, verdict="undecided")])
    assert len(marks(picture, Dot)) == 1
    assert not marks(picture, Line, width=2)
    assert ratios([pair(ratio=None, ci95=None, verdict="undecided")]) is None


def test_a_sweep_divides_by_the_batch():
    """Where twice the batch takes twice as long, the curve is level."""
    picture = sweep([candidate(batch=batch, median=2.0 * batch) for batch in (1, 2, 8)], "batch")
    curve = next(line for line in marks(picture, Line) if len(line.points) == 3)
    assert len({round(y, 6) for _, y in curve.points}) == 1
    near, middle, far = (x for x, _ in curve.points)
    assert (middle - near) / (far - near) == pytest.approx(1 / 3)


def test_a_sweep_over_threads_shows_latency():
    rows = [candidate(threads=threads, batch=4, median=8.0 / threads) for threads in (1, 2, 4)]
    curve = next(line for line in marks(sweep(rows, "threads"), Line) if len(line.points) == 3)
    (x1, y1), (x2, y2), (x3, y3) = curve.points
    assert y2 - y1 == pytest.approx(y3 - y2)
    assert y3 > y1  # less time is lower
    assert x2 - x1 == pytest.approx(x3 - x2)


def test_one_point_is_no_sweep():
    rows = [candidate(threads=2), candidate("b.onnx", threads=4), failed(threads=4)]
    assert sweep(rows, "threads") is None
    assert sweep(rows, "batch") is None


def test_curves_of_several_settings_say_which():
    picture = sweep(report()["candidates"], "batch")
    assert {"stock.onnx, 1 thread", "ours.onnx, 2 threads"} <= set(said(picture))
    sizes = [candidate(batch=batch, size=size) for batch in (1, 8) for size in (32, 64)]
    assert {"a.onnx, 32x32x3", "a.onnx, 64x64x3"} <= set(said(sweep(sizes, "batch")))
    one = [candidate(batch=batch) for batch in (1, 8)]
    assert "a.onnx" in said(sweep(one, "batch"))


def test_bars_of_kinds_are_shares():
    picture = kinds(profiled())
    long, short = (box.width for box in marks(picture, Box))
    assert long == pytest.approx(9 * short)
    assert {"90.0%", "10.0%"} <= set(said(picture))
    assert "runtime" not in said(picture)


def test_the_layer_that_loses_most_comes_first():
    picture = lost(profiled())
    names = [text for text in said(picture) if text in ("good", "bad", "moved")]
    assert names == ["bad", "moved", "good"]
    limits, losses = (marks(picture, Box, height=9, colour=colour) for colour in ("good", "accent"))
    assert [box.width for box in limits] == pytest.approx([WIDTH * v / 5 for v in (0.5, 0.2, 4.5)])
    assert [box.width for box in losses] == pytest.approx([WIDTH * v / 5 for v in (3.5, 0.8, 0.5)])


def test_layers_lie_under_their_roof_where_the_axes_say():
    picture = roofline(profiled())
    roofs = marks(picture, Line, colour="ink")
    cache, memory = (roof.points for roof in roofs)
    assert [roof.dash is None for roof in roofs] == [False, True]
    assert cache[1][1] == memory[1][1] == memory[2][1]  # both end at the peak

    decade = (memory[1][0] - cache[1][0]) / math.log10(4)  # the ridges are a factor of 40 / 10 apart
    dots = {round(dot.x, 3): dot for dot in marks(picture, Dot)}
    assert len(dots) == 2  # a layer without arithmetic has no place
    good, bad = (memory[1][0] + decade * math.log10(intensity / 10) for intensity in (4e3, 1e2))
    assert sorted(dots) == pytest.approx(sorted((bad, good)), abs=0.01)
    # the good one reaches 80 GFLOP/s, the bad one 2.5
    ys = [dots[min(dots, key=lambda x: abs(x - place))].y for place in (good, bad)]
    unit = (ys[1] - ys[0]) / math.log10(80 / 2.5)
    assert ys[0] - memory[1][1] == pytest.approx(unit * math.log10(100 / 80), rel=1e-6)
    assert "10.0% of the time is in layers without arithmetic, not drawn" in said(picture)


def test_a_report_has_every_picture_that_it_has_figures_for():
    titles = [picture.title.split(" ")[0] for picture in of_bench(report())]
    assert titles == ["Latency,"] * 4 + ["Ratios", "Time", "Latency", "Time", "Layers", "Roofline"]
    assert of_bench({}) == []
    assert figures([]) == ""
    assert len(of_profile(profiled(layers=[layer("moved", 1, 0.2, 0)]))) == 2


def test_nothing_is_drawn_beside_the_sheet():
    many = [candidate(f"{'long-name-' * 9}{i}", i, threads=1, median=10.0 ** (i % 7 - 3)) for i in range(1, 30)]
    crowded = {"candidates": many, "comparisons": [pair(ratio=10.0 ** (i - 8), ci95=None) for i in range(30)]}
    for picture in of_bench(crowded) + of_bench(report()):
        for mark in picture.marks:
            points = mark.points if isinstance(mark, Line) else ((mark.x, mark.y),)
            assert all(-0.01 <= x <= WIDTH + 0.01 and -0.01 <= y <= picture.height + 0.01 for x, y in points), mark


# ------------------------------------------------------------------------------------------------------- files


def evil():
    rows = [candidate(EVIL, batch) for batch in (1, 8)]
    told = profiled(model=EVIL)
    for row in told["layers"]:
        row["layer"] = EVIL
    told["kinds"][0]["kind"] = EVIL
    return {"candidates": rows, "comparisons": [pair(EVIL, EVIL)], "profiles": [told]}


@pytest.mark.parametrize("make", [report, evil])
def test_an_svg_is_well_formed_and_asks_for_nothing(make):
    text = document(of_bench(make()))
    root = ElementTree.fromstring(text)
    assert {element.tag.rpartition("}")[2] for element in root.iter()} == {
        "svg", "title", "style", "rect", "path", "circle", "text",
    }  # fmt: skip
    assert {name for element in root.iter() for name in element.attrib} <= {
        "role", "width", "height", "viewBox", "style", "d", "x", "y", "cx", "cy", "r", "text-anchor",
    }  # fmt: skip
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= set(COLOURS)


def test_names_are_only_text():
    root = ElementTree.fromstring(document(of_bench(evil())))
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert any(text.startswith('<script>alert("x")') for text in texts)
    assert not any("‮" in text or "\0" in text for text in texts)


def test_a_png_is_the_sheet_in_three_pixels_to_the_unit():
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    box = Picture("a box", 50, (Box(100, 10, 20, 20, "bad"), Line(((0, 40), (WIDTH, 40)), "good", 4), Dot(200, 20, 8)))
    found = image.open(io.BytesIO(png([box, box])))
    assert found.size == (PIXELS * (WIDTH + 2 * MARGIN), PIXELS * (2 * 50 + 4 * MARGIN))

    def at(x, y):
        return "#" + "".join(f"{value:02x}" for value in found.getpixel((PIXELS * x, PIXELS * y)))

    for below in (MARGIN, 50 + 3 * MARGIN):
        assert at(MARGIN + 110, below + 20) == COLOURS["bad"][0]
        assert at(MARGIN + 150, below + 20) == COLOURS["paper"][0]
        assert at(MARGIN + 5, below + 40) == COLOURS["good"][0]
        assert at(MARGIN + 200, below + 20) == COLOURS["accent"][0]


@pytest.mark.parametrize(("name", "start"), [("a.svg", b"<svg"), ("a.png", b"\x89PNG"), ("a.PNG", b"\x89PNG")])
def test_the_suffix_says_what_is_written(tmp_path, name, start):
    pytest.importorskip("PIL", reason="pillow is not installed")
    path = write_pictures(of_profile(evil()["profiles"][0]), tmp_path / name)
    assert path.read_bytes().startswith(start)
    with pytest.raises(OutputError, match="exists already"):
        write_pictures([kinds(profiled())], path)
    write_pictures([kinds(profiled())], path, force=True)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_the_same_figures_give_the_same_bytes():
    assert document(of_bench(report())) == document(of_bench(json.loads(json.dumps(report()))))


def test_other_suffixes_and_empty_pictures_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"drawn as \.svg or \.png"):
        claim_picture(tmp_path / "a.pdf")
    with pytest.raises(InputError, match="nothing to draw"):
        write_pictures([], tmp_path / "a.svg")
    assert list(tmp_path.iterdir()) == []


def test_without_pillow_a_png_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingComponentError, match=r"deploykit\[report\]"):
        claim_picture(tmp_path / "a.png")
    assert write_pictures(of_bench(report()), tmp_path / "a.svg").exists()


# ------------------------------------------------------------------------------------------------- in a browser


def page(pictures):
    head = '<!DOCTYPE html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return f"{head}<style>{STYLE}</style><body><main>{figures(pictures)}</main>"


@pytest.mark.parametrize("width", [360, 1200])
def test_a_page_shows_them_large_enough_and_within_their_frames(browser, tmp_path, width):  # noqa: F811
    path = tmp_path / "page.html"
    for make in (report, evil):
        path.write_text(page(of_bench(make())), encoding="utf-8")
        browser.open(path, width)
        for scheme in ("light", "dark"):
            browser.emulate(scheme)
            needed, there = browser.run(WIDE)
            assert needed <= there
            assert browser.run(FLAWS) == []
        assert browser.run("document.querySelectorAll('script, img').length") == 0
        assert not browser.heard("Page.javascriptDialogOpening", "Runtime.exceptionThrown")


# Texts of one picture that lie over each other, by more than a little.
COVERED = """(() => { const found = []; for (const svg of document.querySelectorAll('svg')) {
  const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
  for (const [i, [a, p]] of boxes.entries()) for (const [b, q] of boxes.slice(i + 1)) {
    const x = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const y = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (x > 3 && y > 4) found.push([a, b]); } } return found; })()"""


def test_texts_do_not_cover_each_other(browser, tmp_path):  # noqa: F811
    path = tmp_path / "page.html"
    path.write_text(page(of_bench(report())), encoding="utf-8")
    browser.open(path, 360)
    assert browser.run(COVERED) == []
    spoilt = Picture("two", 40, (Words(0, 20, "one text"), Words(20, 22, "another text")))
    path.write_text(page([spoilt]), encoding="utf-8")
    browser.open(path, 360)
    assert browser.run(COVERED) == [["one text", "another text"]]


@pytest.mark.parametrize("width", [360, 1200])
def test_an_svg_file_fits_a_telephone_and_follows_the_night(browser, tmp_path, width):  # noqa: F811
    path = write_pictures(of_bench(report()), tmp_path / "a.svg")
    browser.open(path, width)
    size = browser.run("(r => [r.left, r.right])(document.documentElement.getBoundingClientRect())")
    assert size[1] - size[0] == pytest.approx(min(width, 540), abs=20)  # less a scroll bar
    texts = "[...document.querySelectorAll('text')].map(t => t.getBoundingClientRect())"
    assert browser.run(f"{texts}.filter(b => b.left < {size[0] - 1} || b.right > {size[1] + 1}).length") == 0
    for place, scheme in enumerate(("light", "dark")):
        browser.emulate(scheme)
        paper = COLOURS["paper"][place]
        expected = f"rgb({', '.join(str(int(paper[i : i + 2], 16)) for i in (1, 3, 5))})"
        assert browser.run("getComputedStyle(document.querySelector('rect')).fill") == expected
    assert not browser.heard("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
