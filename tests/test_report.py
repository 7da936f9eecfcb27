"""Reports: strict JSON, one screen of text, a card and a page that say what the report says and nothing else."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from deploykit.report import Report, dumps, strict, write_json
from deploykit.report.html import page
from deploykit.report.markdown import against, model_card
from deploykit.report.text import RENDERERS, render
from deploykit.report.wording import count, milliseconds, ratio, size, small, snr


def decision(layer, outcome="fused", **more):
    kept = {"direction": None, "into": [], "code": "padded_shift", "reason": "padding='same' on conv would see a shift"}
    gone = {"direction": "backward", "into": ["dense"], "code": "folded", "reason": "exact"}
    return {"layer": layer, "kind": "BatchNormalization", "outcome": outcome, "through": [], **(
        gone if outcome == "fused" else kept), **more}  # fmt: skip


def output(passed=True):
    return {
        "name": "<y>", "passed": passed, "snr_db": 130.0, "reference_snr_db": 128.5, "max_abs": 1e-7,
        "top1_agreement": 1.0, "reason": None if passed else "too far", "insensitive": False,
    }  # fmt: skip


def timing(name, median, failed=None):
    latency = dict.fromkeys(("median", "p90", "p99", "min"), median)
    return {"name": name, "model": "m", "batch": 1, "threads": 2, "latency_ms": latency, "failed": failed}


def deployed(decisions=(), passed=True):
    comparison = {"candidate": "model.onnx", "runtime": "onnxruntime-cpu", "passed": passed, "samples": 9,
                  "reason": None, "accuracy": 0.9, "outputs": [output(passed)]}  # fmt: skip
    kinds = {"BatchNormalization": {"total": len(decisions), "fused": 0, "reduced": 0, "kept": 0}}
    body = {
        "source": {"path": "a/<m>.keras", "saved_by": "3.15.1", "bytes": 1000, "sha256": "0" * 64},
        "fuse": {
            "affines": {"total": len(decisions), "fused": 1, "reduced": 0, "kept": 1, "by_kind": kinds},
            "decisions": list(decisions), "params": {"before": 10, "after": 8}, "insensitive": [],
            "exactness_f64": 1e-16, "exactness_bound": 1e-12, "exactness_stored": 1e-8,
        },
        "check": {"passed": passed, "reference": {"model": "m", "precision": "float64"}, "data": "9 samples: d",
                  "reference_accuracy": 0.9, "comparisons": [comparison]},
        "bench": {
            "candidates": [timing("stock", 2.0), timing("broken", None, "no file"), timing("ours", 1.0)],
            "comparisons": [{"a": "ours", "b": "stock", "batch": 1, "threads": 2, "ratio": 0.5, "ci95": [0.4, 0.8],
                             "verdict": "faster"}],
        },
        "bundle": "b", "opset": 18, "oldest_onnxruntime": "1.14", "files": [{"name": "model.onnx", "bytes": 1234}],
        "signature": {
            "inputs": [{"name": "x", "dtype": "float32", "shape": [None, 4], "low": 0.0, "high": 1.0}],
            "outputs": [{"name": "<y>", "dtype": "float32", "shape": [None, 2], "low": None, "high": None}],
        },
    }  # fmt: skip
    environment = {"cpu": "a CPU", "packages": {}}
    return Report("deploy", "0.1", "a/[bold]m", passed, body, environment, {"total": 1.0}, ["a [notice]"]).to_json()


def text(report, width=120):
    stream = io.StringIO()
    render(report, Console(file=stream, width=width))
    return stream.getvalue()


def test_numbers_that_json_cannot_hold_become_null():
    assert strict({"a": (1.0, math.nan), "b": [math.inf], "c": {"d": -math.inf}}) == {
        "a": [1.0, None], "b": [None], "c": {"d": None}
    }  # fmt: skip
    with pytest.raises(ValueError, match="not JSON compliant"):
        dumps({"a": math.nan})


def test_names_of_any_bytes_are_written(tmp_path):
    path = write_json({"model": "ä\udce9\ud800"}, tmp_path / "r.json")
    assert json.loads(path.read_text("utf-8")) == {"model": "ä\udce9\ud800"}


def test_the_envelope_has_its_keys(tmp_path):
    report = deployed([decision("bn")])
    assert report["schema"] == "deploykit.deploy/1"
    assert json.loads(write_json(report, tmp_path / "r.json").read_text()) == report
    assert Report("swap-head", "0", "m", True, {}, {}).to_json()["schema"] == "deploykit.swap_head/1"


def test_a_deployment_fits_one_screen():
    shown = text(deployed([decision("bn1"), decision("bn2", "kept")]))
    assert len(shown.splitlines()) <= 24
    for words in ("padding='same'", "130.0 dB", "128.5 dB", "2.00x", "[1.25, 2.50]", "ours is faster", "a [notice]"):
        assert words in shown
    assert "failed: no file" in shown


def test_many_kept_fold_into_counts():
    report = deployed([decision(f"bn{i}", "kept") for i in range(30)])
    assert "30 padded_shift" in text(report)
    fuse = {**report, **report["fuse"], "schema": "deploykit.fuse/1"}
    assert len(text(fuse).splitlines()) < 12
    few = {**fuse, "decisions": fuse["decisions"][:20]}
    assert len([line for line in text(few).splitlines() if "padding" in line]) == 20


def test_a_failure_is_loud():
    shown = text(deployed([decision("bn")], passed=False))
    assert "NOT EQUIVALENT" in shown
    assert "DIFFERS" in shown
    assert "too far" in shown
    assert "NOT equivalent" in page(deployed(passed=False))


def test_verdicts_turn_round_with_the_pair():
    bench = deployed()["bench"]
    assert against(bench, bench["candidates"][0], "ours") == (2.0, [1.25, 2.5], "slower")
    assert against(bench, bench["candidates"][2], "stock") == (0.5, [0.4, 0.8], "faster")
    assert against(bench, bench["candidates"][1], "ours") == (None, None, "")


def test_the_card_states_measured_facts():
    card = model_card(deployed([decision("bn1"), decision("bn2", "kept")]))
    for words in (
        "opset 18",
        "ONNX Runtime 1.14",
        "130.0 dB",
        "original 90.00%",
        "kept `bn2`",
        "2.00x",
        '"x": np.zeros',
    ):
        assert words in card


def test_the_page_is_self_contained_and_escapes_what_came_from_a_file():
    html = page(deployed([decision("<script>alert(1)</script>")]))
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "http" not in html.replace("http-equiv", "")
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_every_verb_has_a_renderer():
    verbs = ("inspect", "fuse", "export", "check", "bench", "deploy", "migrate", "swap_head", "recalibrate", "audit")
    assert set(RENDERERS) == {f"deploykit.{verb}/1" for verb in (*verbs, "ci")}


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (size(999), "999 B"), (size(283_000), "283 kB"), (size(1_230_000), "1.2 MB"), (size(2.5e9), "2.50 GB"),
        (size(None), "?"), (milliseconds(0.1234), "0.123 ms"), (milliseconds(12.34), "12.3 ms"),
        (milliseconds(None), "-"), (ratio(1.5), "1.50x"), (ratio(12.34), "12.3x"), (ratio(None), "-"),
        (snr({"snr_db": None, "max_abs": 0.0}), "exact"), (snr({"snr_db": None, "max_abs": 3.0}), "-"),
        (small(None), "-"), (count(1, "sample"), "1 sample"), (count(2, "day"), "2 days"),
    ],
)  # fmt: skip
def test_wording(shown, expected):
    assert shown == expected
