"""The page of a check or a deployment: what it says, that nothing of a file acts in it, and how a browser shows it."""

from __future__ import annotations

import base64
import contextlib
import copy
import itertools
import json
import math
import os
import re
import select
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from deploykit import verify
from deploykit.errors import OutputError
from deploykit.report import Report
from deploykit.report.html import page, write_page
from deploykit.report.html_charts import bar, depths, histogram, interval, octave_span, octaves, ratio_span
from deploykit.report.html_style import COLOURS, GROUNDS, STYLE, TEXTS
from deploykit.report.wording import ratio

EVIL = '<script>alert("x")</script></style><img src=x onerror=alert(1)>&\'"\u202e\u0000\ud800 שלום ' + "x" * 120
ENVIRONMENT = {"cpu": "a CPU", "cores": 2, "python": "3.11.7", "packages": {"onnxruntime": "1.2.3"}, "threads": None}


def output(name="class", off=1.0, samples=64):
    """A real comparison; with ``off`` 1 the candidate's error is of the order of the original's own."""
    rng = np.random.default_rng(0)
    right = rng.dirichlet(np.ones(10), samples)
    own = right.astype(np.float32)
    candidate = (right * (1 + off * 1e-7 * rng.standard_normal(right.shape))).astype(np.float32)
    noise = verify.Noise.between(right, own)
    return verify.judge(name, right, candidate, verify.POLICIES["float32"], noise, own.dtype).to_json()


def comparison(*outputs, **more):
    passed = bool(outputs) and all(o["passed"] for o in outputs) and not more.get("reason")
    return {"candidate": "out/model.onnx", "runtime": "onnxruntime-cpu", "passed": passed, "samples": 64,
            "reason": None, "accuracy": None, "sizes": [], "notes": [], "outputs": list(outputs), **more}  # fmt: skip


def checked(*comparisons, proven=True, reason=None, **more):
    body = {"passed": bool(comparisons) and all(c["passed"] for c in comparisons),
            "reference": {"model": "net.keras", "precision": "float64"}, "data": "64 samples: d.npz",
            "policy": "float32", "comparisons": list(comparisons), **more}  # fmt: skip
    return Report("check", "1.2", "a/net.keras", proven, body, ENVIRONMENT, {"total": 1.5}, ["a notice"],
                  reason=reason).to_json()  # fmt: skip


def layers(number=40, jump=25):
    rows = [
        {"layer": f"block{i}_conv", "class": "Conv2D", "onnx_tensor": f"block{i}/Conv:0", "depth": i + 1,
         "snr_db": 140 - i / 10 if i < jump else 60.0, "own_snr_db": 138 - i / 10, "ratio": 0.1 if i < jump else 99.0,
         "status": "same" if i < jump else "jump" if i == jump else "after"}
        for i in range(number)
    ]  # fmt: skip
    rows[3] |= {"status": "skipped", "snr_db": None, "own_snr_db": None, "ratio": None, "note": "folded away"}
    rows[5] |= {"status": "moved", "note": "in other units"}
    return {"rows": rows, "first": f"block{jump}_conv" if jump < number else None}


def timing(name, median, p90=None, failed=None):
    return {"name": name, "model": "m", "batch": 1, "threads": 2, "latency_ms": {"median": median, "p90": p90},
            "failed": failed}  # fmt: skip


def deployed(**more):
    decisions = [
        {"layer": "bn1", "kind": "BatchNormalization", "outcome": "fused", "direction": "backward", "into": ["conv1"],
         "through": [], "code": "folded", "reason": "exact"},
        {"layer": "bn2", "kind": "BatchNormalization", "outcome": "kept", "direction": None, "into": [], "through": [],
         "code": "padded_shift", "reason": "padding='same' on conv would see a shift of up to 0.82"},
    ]  # fmt: skip
    check = checked(comparison(output(), accuracy=0.875), reference_accuracy=0.875)
    body = {
        "source": {"path": "a/net.keras", "saved_by": "3.15", "bytes": 10, "sha256": "0" * 64, "opaque": None},
        "fuse": {"affines": {"total": 2, "fused": 1, "reduced": 0, "kept": 1}, "decisions": decisions,
                 "exactness_f64": 6e-16, "exactness_bound": 1e-12, "exactness_stored": 5e-8},
        "check": {key: check[key] for key in ("passed", "reference", "data", "policy", "comparisons",
                                              "reference_accuracy")},
        "bench": {
            "candidates": [timing("stock", 4.0, 5.0), timing("broken", None, failed="no file"),
                           timing("ours", 2.0, 2.5)],
            "comparisons": [{"a": "ours", "b": "stock", "batch": 1, "threads": 2, "ratio": 0.5, "ci95": [0.4, 0.8],
                             "verdict": "faster"}],
        },
        "files": [{"name": "model.onnx", "bytes": 1234}], "opset": 18, "oldest_onnxruntime": "1.14", **more,
    }  # fmt: skip
    return Report("deploy", "1.2", "a/net.keras", True, body, ENVIRONMENT, {"total": 1.5}).to_json()


def failing(**more):
    search = {"passed": False, "steps": 40, "ratio": 12.3456, "found": [{"input": "image", "snr_db": 101.25}]}
    gradients = {"passed": True, "inputs": [{"name": "image", "snr_db": 120.5, "reason": None}], "fixed": []}
    wrong = comparison(
        output(off=1e4), output("box"), candidate="out/wrong.onnx", notes=["TF32 is off"],
        sizes=[{"data": "2 samples of 32x32", "passed": False, "reason": "another shape"}],
    )  # fmt: skip
    return checked(wrong, comparison(output()), layers=layers(), worst_case=search, gradients=gradients, **more)


def evil():
    report = failing(proven=False, reason=EVIL)
    report["model"] = EVIL
    for found in report["comparisons"]:
        found |= {"candidate": EVIL, "runtime": EVIL, "data": EVIL, "reason": EVIL, "notes": [EVIL],
                  "sizes": [{"data": EVIL, "passed": False, "reason": EVIL}]}  # fmt: skip
        for number, judged in enumerate(found["outputs"]):
            judged |= {"name": f"{EVIL}{number}", "reason": EVIL, "passed": False}
    report["layers"]["rows"][25] |= {"layer": EVIL, "class": EVIL, "onnx_tensor": EVIL, "note": EVIL}
    report["layers"] |= {"first": EVIL, "candidate": EVIL}
    report["worst_case"] = {EVIL: EVIL, "a": [EVIL] * 30, "b": {"c": {"d": EVIL}}, "e": [[1, 2], {"f": EVIL}]}
    report["notices"] = [EVIL]
    report["environment"] = {"cpu": EVIL, EVIL: {EVIL: EVIL}, "list": [EVIL]}
    return report


def evil_deployment():
    report = deployed()
    report["source"]["saved_by"] = EVIL
    report["files"][0]["name"] = EVIL
    report["oldest_onnxruntime"] = EVIL
    for row in report["bench"]["candidates"]:
        row["name"] = EVIL if row["name"] == "ours" else row["name"]
    report["bench"]["candidates"][1]["failed"] = EVIL
    report["bench"]["comparisons"][0]["a"] = EVIL
    report["fuse"]["decisions"][0] |= {"layer": EVIL, "kind": EVIL, "direction": EVIL, "into": [EVIL], "reason": EVIL}
    report["environment"]["cpu"] = EVIL
    return report


def many():
    outputs = [output(f"head_{i}") for i in range(4)]
    return checked(*(comparison(*outputs, candidate=f"net{i}.onnx") for i in range(3)), layers=layers(150, 100))


class Page(HTMLParser):
    """Tags, attributes and text of a page; it must be well formed."""

    VOID = ("meta", "line", "rect", "circle", "path")

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = set(), [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [(tag, key, value) for key, value in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [(tag, key, value) for key, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


def text(report):
    return " ".join(Page(page(report)).text.split())


# ------------------------------------------------------------------------------------------------ what it says


@pytest.mark.parametrize(
    ("off", "proven", "words", "tone"),
    [
        (1, True, "Equivalent to the trained model", "good"),
        (1, False, "Equivalent to the trained model, not proven", "unsure"),
        (1e4, True, "NOT equivalent to the trained model", "bad"),
        (1e4, False, "NOT equivalent to the trained model", "bad"),
    ],
)
def test_the_verdict_comes_first(off, proven, words, tone):
    html = page(checked(comparison(output(off=off)), proven=proven, reason=None if proven else "it is a graph"))
    assert f'<h1 class="verdict {tone}">{words}</h1>' in html
    assert ("it is a graph" in html) is not proven
    assert html.index("<h1") < html.index("<dl") < html.index("<h2")


def test_a_failure_says_which_output_why_and_at_which_layer():
    report = failing()
    head = text(report).partition(" Outputs ")[0]
    reason = report["comparisons"][0]["outputs"][0]["reason"]
    assert f"out/wrong.onnx on onnxruntime-cpu: class : {reason[:60]}" in head
    assert "jumps first at layer block25_conv" in head
    assert reason in text(report)  # whole, below


def test_nothing_compared_is_no_pass():
    shown = text(checked())
    assert "NOT equivalent" in shown
    assert shown.lower().count("nothing was compared") == 2
    alone = checked(comparison(reason="it does not run: no such operator"))
    assert "it does not run: no such operator" in text(alone)


def test_every_figure_of_an_output_is_there():
    judged = output(off=3.0)
    shown = text(checked(comparison(judged)))
    for number in (f"{judged['snr_db']:.1f}", f"{judged['reference_snr_db']:.1f}", f"{judged['max_abs']:.2g}",
                   f"{judged['max_rel']:.2g}", f"{judged['smallest_rtol']:.2g}", f"{judged['smallest_atol']:.2g}",
                   ratio(judged["noise_ratio"]), f"{judged['kl']['max']:.2g}", "100.00 %",
                   f"sample {judged['worst_sample']} [{judged['worst_index'][0]}]", "640 values"):  # fmt: skip
        assert number in shown


def test_sizes_notes_searches_notices_and_environment_are_there():
    shown = text(failing())
    for words in ("On 2 samples of 32x32 : DIFFERS: another shape", "TF32 is off", "Worst case", "12.346", "101.25",
                  "Gradients", "120.5", "a notice", "onnxruntime 1.2.3", "40 layers", "folded away",
                  "39 layers compared, 1 folded or optimised away"):  # fmt: skip
        assert words in shown


def test_a_deployment_shows_decisions_and_timings():
    shown = text(deployed())
    for words in ("2.00x faster than stock", "4.00 ms", "2.50 ms", "1.25 … 2.50", "ours is faster", "failed: no file",
                  "padding='same' on conv would see", "1 of 2", "87.50 %", "6e-16", "1.14 or later"):  # fmt: skip
        assert words in shown


@pytest.mark.parametrize("report", [failing(), deployed(bench={"candidates": [], "comparisons": []})])
def test_without_timings_none_are_shown(report):
    shown = text(report)
    assert "Latency" not in shown
    assert " ms" not in shown
    assert "p90" not in re.sub(r"median \S+ p90 \S+", "", shown)


def test_an_undecided_ratio_is_no_headline():
    report = deployed()
    report["bench"]["comparisons"][0]["verdict"] = "undecided"
    shown = text(report)
    assert "than stock" not in shown
    assert "undecided" in shown


def test_an_insensitive_output_is_called_no_evidence():
    assert "no evidence" in text(checked(comparison({**output(), "insensitive": True})))


def test_a_graph_without_layers_has_no_decisions():
    fuse = {"folding": {"before": 90, "after": 40}, "affines": {"total": 0, "fused": 0}, "decisions": [],
            "exactness_f64": None}  # fmt: skip
    shown = text(deployed(fuse=fuse))
    assert "constant folding left 40 of 90 operations" in shown
    assert "In float64" not in shown
    assert "Affines folded" not in shown


@pytest.mark.parametrize(("precision", "own"), [("float64", "original's own"), ("float32", "yardstick")])
def test_without_a_better_reference_the_yardstick_is_not_called_the_original(precision, own):
    shown = text(checked(comparison(output()), reference={"model": "m", "precision": precision}))
    assert ("yardstick" in shown) == (own == "yardstick")
    assert ("original's own" in shown) == (own != "yardstick")
    assert f"m in {precision}" in shown


def test_another_verb_is_refused():
    with pytest.raises(KeyError):
        page({**checked(comparison(output())), "schema": "deploykit.fuse/1"})


# ------------------------------------------------------------------------------------- nothing acts, nothing lacks


@pytest.mark.parametrize("report", [failing(), deployed()], ids=["check", "deploy"])
def test_tables_say_what_they_are_however_they_are_laid_out(report):
    """Some browsers take a table's meaning away with its layout, unless it is named."""
    html = page(report)
    for tag, roles in (("table", "table"), ("thead", "rowgroup"), ("tbody", "rowgroup"), ("tr", "row"), ("td", "cell"),
                       ("th", "columnheader|rowheader")):  # fmt: skip
        opened = re.findall(rf"<{tag}[ >][^>]*", html)
        assert opened
        assert all(re.search(rf' role="({roles})"', found) for found in opened), tag
    assert all(' scope="' in found for found in re.findall(r"<th [^>]*", html))


@pytest.mark.parametrize("report", [evil(), evil_deployment()], ids=["check", "deploy"])
def test_what_came_from_a_file_is_only_text(report):
    html = page(report)
    found = Page(html)
    assert not found.tags & {"script", "img", "link", "iframe", "object", "a", "form", "input"}
    assert not {key for _, key, _ in found.attributes} & {"src", "href", "onerror", "onload", "onclick"}
    assert html.count("</style>") == 1
    assert not set(html) & {"\u202e", "\0", "\ud800"}
    assert 'alert("x")' in found.text
    html.encode()


def test_the_page_asks_for_nothing():
    html = page(deployed())
    assert not re.search(r"https?:|//|@import|url\(|@font-face", html)
    assert "default-src 'none'" in html


def test_numbers_that_are_none_are_not_written():
    report = failing()
    for found in report["comparisons"]:
        for judged in found["outputs"]:
            judged |= {key: math.nan for key in judged if isinstance(judged[key], float)}
            judged["ulp"] = {"p50": math.inf, "p90": None, "p99": math.nan, "max": math.inf, "counts": [[math.inf, 3]]}
    for row in report["layers"]["rows"]:
        row |= {"snr_db": -math.inf, "own_snr_db": math.nan}
    report["worst_case"]["ratio"] = math.nan
    shown = Page(page(report))
    drawn = " ".join(str(value) for tag, _, value in shown.attributes if tag in ("svg", "path", "line", "rect", "text"))
    assert not re.search(r"\b(nan|inf|none|null)\b", f"{shown.text} {drawn}", re.I)


def _paths(value, path=()):
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            yield from _paths(item, (*path, key))


@pytest.mark.parametrize("whole", [failing(), deployed()], ids=["check", "deploy"])
def test_whatever_may_be_absent_may_be_absent(whole):
    needed = {"schema", "deploykit", "model", "proven", "passed", "comparisons", "check", "fuse", "bench"}
    optional = [key for key in whole if key not in needed]
    assert len(optional) > 6
    for key in optional:
        page({name: value for name, value in whole.items() if name != key})
        page({**whole, key: None})
    kept = {"name", "passed"}
    for key in set(output()) - kept:
        report = copy.deepcopy(whole)
        for found in (report.get("check") or report)["comparisons"]:
            found["outputs"] = [{name: None if name == key else value for name, value in o.items()}
                                for o in found["outputs"]]  # fmt: skip
        page(report)
        for found in (report.get("check") or report)["comparisons"]:
            found["outputs"] = [{name: value for name, value in o.items() if name != key} for o in found["outputs"]]
        page(report)


def test_a_page_is_written_whole_and_replaces_nothing_unasked(tmp_path):
    path = write_page(deployed(), tmp_path / "report.html", force=False)
    assert path.read_text(encoding="utf-8") == page(deployed())
    with pytest.raises(OutputError):
        write_page(deployed(), path, force=False)
    assert os.listdir(tmp_path) == ["report.html"]


# ---------------------------------------------------------------------------------------------------- pictures


def numbers(svg, kind, *names):
    found = re.findall(rf'<{kind}[^>]*class="bar"[^>]*>|<{kind}[^>]*>', svg)
    return [tuple(float(re.search(rf' {name}="(-?[\d.]+)%?"', tag)[1]) for name in names) for tag in found]


def test_bars_are_as_high_as_their_counts_and_an_octave_wide():
    counts = octaves([[0.0, 5], [None, 3], [1.0, 10], [2.0, 40], [16.0, 20], [32.0, 0]])
    assert counts == [(0.0, 5), (1.0, 10), (2.0, 40), (16.0, 20)]
    svg = histogram(counts, octave_span([counts]), {"p50": 2.0, "p99": None}, "t")
    bars = numbers(svg, "rect", "x", "width", "height")
    assert [round(h / bars[2][2], 2) for *_, h in bars] == [0.12, 0.25, 1.0, 0.5]
    (_, _, _), (one, wide, _), (two, _, _), (sixteen, _, _) = bars
    assert two - one == pytest.approx(wide / 0.9, abs=0.02)
    assert sixteen - two == pytest.approx(3 * (two - one), abs=0.05)
    assert bars[0][0] + bars[0][1] < one
    assert ">53 %</text>" in svg


def test_marks_that_fall_together_have_one_label():
    counts = [(2.0**power, 5) for power in range(10)]
    span = octave_span([counts])
    for p99, labels in ((8.0, 1), (8.5, 1), (256.0, 2)):
        svg = histogram(counts, span, {"p50": 8.0, "p99": p99}, "t")
        assert svg.count('class="mark"') == 2
        assert len(re.findall(r">p\d\d</text>", svg)) == labels


def test_histograms_share_their_axis():
    near, far = [(1.0, 5)], [(1024.0, 5)]
    span = octave_span([near, far])
    assert span == (-1.0, 10.0)
    places = [numbers(histogram(c, span, {}, "t"), "rect", "x")[0][0] for c in (near, far)]
    assert places[0] < 20 < 85 < places[1]
    assert "rect" in histogram([(0.0, 7)], octave_span([[(0.0, 7)]]), {"p50": 0.0}, "t")


def test_curves_rise_with_the_figure_stop_where_there_is_none_and_mark_the_first_jump():
    rows = layers(10, 6)["rows"]
    rows[2]["snr_db"] = None
    svg = depths(rows, "t")
    curve = re.search(r'class="stroke" d="([^"]+)"', svg)[1]
    assert curve.count("M") == 2  # layers 2 and 3 have none
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", curve)]
    figures = [row["snr_db"] for row in rows if row["snr_db"] is not None]
    scale = (heights[-1] - heights[0]) / (figures[0] - figures[-1])
    assert scale > 0
    assert heights == pytest.approx([heights[0] + scale * (figures[0] - f) for f in figures], abs=0.1)
    assert svg.count('class="jump"') == 1
    assert 'x1="65.00%"' in re.search(r'<line class="jump"[^>]*>', svg)[0]
    assert "block6_conv" in svg
    wrong = re.search(r'class="dots wrong"[^>]* d="([^"]+)"', svg)[1]
    assert wrong.count("M") == 4


def test_without_figures_there_is_no_curve_but_a_table():
    assert depths([{**row, "snr_db": None, "own_snr_db": None} for row in layers()["rows"]], "t") == ""
    report = checked(comparison(output()), layers={"rows": [layers()["rows"][3]], "first": None})
    assert "All 1 layer as a table" in text(report)


def test_latency_is_drawn_to_scale():
    svg = bar(2.0, 3.0, 4.0, "t")
    assert 'width="50.00%"' in svg
    assert 'x1="50.00%" y1="7" x2="75.00%"' in svg
    for no_way_on in (None, 2.0, 1.0):
        assert "stroke" not in bar(2.0, no_way_on, 4.0, "t")


def test_ratios_are_drawn_on_logarithms_around_one():
    span = ratio_span([0.25, 4.0])
    assert span[0] == pytest.approx(-span[1])
    assert ratio_span([4.0, 8.0])[0] < 0 < ratio_span([0.25, 0.5])[1]
    svg = interval(4.0, [2.0, 8.0], ratio_span([0.125, 8.0]), "t")
    ends = re.search(r'<line class="stroke" x1="([\d.]+)%" y1="7" x2="([\d.]+)%"', svg)
    dot = float(re.search(r'cx="([\d.]+)%"', svg)[1])
    assert float(ends[1]) + float(ends[2]) == pytest.approx(2 * dot, abs=0.02)
    assert 'class="mark" x1="50.00%"' in svg
    assert "stroke" not in interval(4.0, None, span, "t")


@pytest.mark.parametrize("night", [0, 1], ids=["day", "night"])
def test_colours_can_be_told_from_the_ground(night):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for name, ground in itertools.product(TEXTS, GROUNDS):
        low, high = sorted(luminance(COLOURS[key][night]) for key in (name, ground))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)
    assert set(re.findall(r"var\(--(\w+)\)", STYLE)) <= set(COLOURS)


# ------------------------------------------------------------------------------------------------- in a browser


class Browser:
    """Chromium, spoken to over two pipes (the DevTools protocol, messages end in a zero byte)."""

    def __init__(self, program, profile):
        their_input, self.requests = os.pipe()
        self.answers, their_output = os.pipe()

        def connect():  # pragma: no cover - in the child; 3 and 4 are where Chromium looks
            ends = os.dup(their_input), os.dup(their_output)
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                   "--disable-background-networking", "--disable-component-update")  # fmt: skip
        self.process = subprocess.Popen(
            [program, *options, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"],
            close_fds=False, preexec_fn=connect, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(their_input)
        os.close(their_output)
        self.numbers, self.rest, self.events, self.session = itertools.count(1), b"", [], {}
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.rest:
            assert select.select([self.answers], [], [], 60)[0], "the browser does not answer"
            part = os.read(self.answers, 1 << 16)
            assert part, "the browser has ended"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def send(self, method, **params):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params, **self.session}
        os.write(self.requests, json.dumps(message).encode() + b"\0")
        while (answer := self.message()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path, width, scheme="light", media="screen"):
        self.events.clear()
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.emulate(scheme, media)
        self.send("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())

    def emulate(self, scheme, media="screen"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", media=media, features=features)

    def run(self, script):
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def heard(self, *methods):
        return [event for event in self.events if event["method"] in methods]

    def close(self):
        with contextlib.suppress(AssertionError, OSError):
            self.session = {}
            self.send("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.requests)
        os.close(self.answers)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed: nothing to show the page in")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


PAGES = {"fails": failing, "deployed": deployed, "evil": evil, "evil-deployed": evil_deployment, "many": many}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return {name: write_page(make(), folder / f"{name}.html") for name, make in PAGES.items()}


# Of every piece of text that is shown: too small, too faint, or (in a picture) beyond the frame that it belongs to.
FLAWS = """(() => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => { const [r, g, b] = numbers(colour).slice(0, 3).map(v => v / 255).map(
    v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = node => { for (; node; node = node.parentElement) {
    const found = getComputedStyle(node).backgroundColor; const parts = numbers(found);
    if (parts.length < 4 || parts[3] === 1) return found; } return 'rgb(255, 255, 255)'; };
  const flaws = []; const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT); let seen = 0;
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement, said = walker.currentNode.data.trim();
    if (!said || !node.checkVisibility() || node.closest('title')) continue;
    seen++;
    const style = getComputedStyle(node), svg = node.closest('svg');
    if (parseFloat(style.fontSize) < 10.9) flaws.push(['small', style.fontSize, said.slice(0, 30)]);
    const [low, high] = [light(svg ? style.fill : style.color), light(ground(node))].sort((a, b) => a - b);
    if ((high + 0.05) / (low + 0.05) < 4.5) flaws.push(['faint', said.slice(0, 30)]);
    if (svg) { const box = node.getBoundingClientRect(), frame = node.closest('figure, td').getBoundingClientRect();
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1)
        flaws.push(['outside', said.slice(0, 30), box.left - frame.left, box.right - frame.right]); } }
  return seen > 40 ? flaws : ['nothing seen']; })()"""
SCROLLED = "[...document.querySelectorAll('.cards')].filter(f => f.scrollWidth > f.clientWidth).length"
WIDE = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
UNFOLD = "document.querySelectorAll('details').forEach(d => { d.open = true; })"


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("name", PAGES)
def test_a_browser_shows_it_without_complaint(browser, pages, name, width):
    browser.open(pages[name], width)
    for scheme, unfold in (("light", ""), ("dark", UNFOLD), ("light", "")):
        browser.emulate(scheme)
        browser.run(unfold)
        needed, there = browser.run(WIDE)
        assert needed <= there, scheme
        assert browser.run(SCROLLED) == 0
        assert browser.run(FLAWS) == [], scheme
        paper = COLOURS["paper"][scheme == "dark"]
        expected = f"rgb({', '.join(str(int(paper[i : i + 2], 16)) for i in (1, 3, 5))})"
        assert browser.run("getComputedStyle(document.body).backgroundColor") == expected
    assert not browser.heard("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert not browser.heard("Page.javascriptDialogOpening")
    asked = {event["params"]["request"]["url"] for event in browser.heard("Network.requestWillBeSent")}
    assert asked == {pages[name].as_uri()}


def test_the_browser_test_sees_flaws(browser, tmp_path):
    """The checks above find what they look for."""
    html = page(failing()).replace("default-src 'none'", "default-src *  'unsafe-inline'")
    spoilt = '<p style="width: 2000px; color: #999; font-size: 9px">spoilt</p><script>console.error("spoilt")</script>'
    path = tmp_path / "spoilt.html"
    path.write_text(html.replace("</main>", f"{spoilt}</main>"))
    browser.open(path, 360)
    needed, there = browser.run(WIDE)
    assert needed > there
    assert {flaw[0] for flaw in browser.run(FLAWS)} >= {"small", "faint"}
    assert browser.heard("Runtime.consoleAPICalled")
    path.write_text(page(failing()).replace("</main>", f"{spoilt}</main>"))  # the page's own policy stops a script
    browser.open(path, 360)
    assert not browser.heard("Runtime.consoleAPICalled")


@pytest.mark.parametrize("width", [360, 1200])
def test_a_screen_reader_finds_tables_and_named_pictures(browser, pages, width):
    browser.open(pages["fails"], width)
    tree = browser.send("Accessibility.getFullAXTree")["nodes"]
    found = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]]
    roles = [role for role, _ in found]
    assert {"table", "row", "rowheader", "columnheader", "cell", "heading", "banner", "main"} <= set(roles)
    pictures = [name for role, name in found if role in ("image", "img", "graphics-document")]
    assert len(pictures) == 4
    assert all(len(name) > 20 for name in pictures)


def test_on_paper_it_is_light_and_unfolded(browser, pages):
    browser.open(pages["fails"], 794, "dark", media="print")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    needed, there = browser.run(WIDE)
    assert needed <= there
    seen = "[...document.querySelectorAll('details:not([open])')].map(d => d.lastElementChild.checkVisibility())"
    assert browser.run(seen) == [True, True]
    browser.emulate("light")
    assert browser.run(seen) == [False, False]
    browser.emulate("dark", "print")
    paper = base64.b64decode(browser.send("Page.printToPDF", preferCSSPageSize=True)["data"])
    assert paper.startswith(b"%PDF")
