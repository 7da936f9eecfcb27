"""What a CI system is shown: JUnit, Markdown, annotations and the page say the same, whatever the names hold."""

from __future__ import annotations

import io
import os
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from test_verify import write_bundle

from deploykit import ci, verify
from deploykit.compare import compare_outputs, policy_from
from deploykit.errors import InputError, OutputError
from deploykit.report import github
from deploykit.report.cases import cases
from deploykit.report.check_markdown import MAX_CHARACTERS, MAX_LINES, cut, markdown
from deploykit.report.ci_html import ci_page
from deploykit.report.delivery import claim_targets, deliver
from deploykit.report.evidence import NO_EVIDENCE
from deploykit.report.junit import junit

HOSTILE = "a|b`c\x00\x1b[31m\n::error::x\udc80<img src=x>*_[y](z)&@team #12 %0A"


def judged(*factors, name="y"):
    """A comparison of real arrays for each factor: 1 agrees, another does not."""
    rng = np.random.default_rng(0)
    right = {name: rng.normal(size=(8, 5))}
    original = {name: right[name].astype(np.float32)}
    found = []
    for number, factor in enumerate(factors):
        wrong = {name: (right[name] * factor).astype(np.float32)}
        outputs = [o.to_json() for o in compare_outputs(right, original, wrong, policy_from())]
        passed = all(o["passed"] for o in outputs)
        found.append({"candidate": f"c{number}.onnx", "runtime": "onnxruntime-cpu", "passed": passed, "samples": 8,
                      "reason": None, "outputs": outputs})  # fmt: skip
    return found


def check(comparisons, **changes):
    record = {
        "schema": "deploykit.check/1",
        "deploykit": "0.1.0",
        "model": "net.keras",
        "passed": bool(comparisons) and all(c["passed"] for c in comparisons),
        "proven": True,
        "reason": None,
        "reference": {"model": "net.keras", "precision": "float64"},
        "data": "8 samples: x.npz",
        "policy": "float32",
        "insensitive": [],
        "comparisons": comparisons,
        "notices": [],
        "seconds": {"total": 1.5},
        "environment": {},
    }
    return {**record, **changes}


def dull(comparisons):
    """The same, with outputs that hardly vary between the samples."""
    return [{**c, "outputs": [{**output, "insensitive": True} for output in c["outputs"]]} for c in comparisons]


def drifted():
    return {"candidate": "d.onnx", "runtime": "onnxruntime-cpu", "passed": False, "samples": 0, "outputs": [],
            "reason": "the signature drifted: outputs ['y'] became ['z']"}  # fmt: skip


def bench(failed=None):
    row = {"name": "b.onnx", "model": "b.onnx", "batch": 1, "latency_ms": {"median": 0.5}, "failed": failed}
    return {"schema": "deploykit.bench/1", "deploykit": "0.1.0", "model": "b.onnx", "proven": True, "candidates": [row]}


def deploy(check_body, bench_body):
    return {**check([]), "schema": "deploykit.deploy/1", "check": check_body, "bench": bench_body}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A real `deploykit ci` over three bundles: right, wrong by one percent, and changed after it was sealed."""
    folder = tmp_path_factory.mktemp("bundles")
    for name, factor in (("right", 1), ("wrong", 1.01), ("changed", 1)):
        write_bundle(folder / name, lambda w1, w2, factor=factor: (w1 * factor, w2))
    with open(folder / "changed" / "model.onnx", "ab") as stream:
        stream.write(b"x")
    (folder / "c.toml").write_text('[tool.deploykit]\nbundles = ["*"]')
    return ci.run(ci.read_config(folder / "c.toml")).report.to_json()


# ---------------------------------------------------------------------------------------------------------- cases


@pytest.mark.parametrize(
    ("record", "outcomes"),
    [
        (check(judged(1)), ["passed"]),
        (check(judged(1, 1.01)), ["passed", "failed"]),
        (check([*judged(1), drifted()]), ["passed", "failed"]),
        (check([]), ["failed"]),
        (check([{**drifted(), "reason": None}]), ["failed"]),
        (check([*judged(1), {**drifted(), "reason": None, "passed": True}]), ["passed", "failed"]),
        (check([{**judged(1)[0], "passed": False}]), ["failed", "passed"]),
        (check(judged(1), passed=False, reason="why"), ["passed", "failed"]),
        (check(dull(judged(1))), ["failed", "undecided"]),
        (check(dull(judged(1)), passed=False), ["failed", "undecided"]),
        (check([], outcome="error", reason="unreadable"), ["error"]),
        (bench(), ["passed"]),
        (bench("out of memory"), ["error"]),
        ({**bench(), "candidates": []}, ["error"]),
        (deploy(check(judged(1)), bench()), ["passed", "passed"]),
        (deploy(check(judged(1.01)), {}), ["failed"]),
    ],
)
def test_whatever_did_not_pass_is_a_case_that_did_not(record, outcomes):
    assert [case.outcome for case in cases(record)] == outcomes


def test_agreement_without_evidence_says_so():
    assert cases(check(dull(judged(1))))[0].reason == NO_EVIDENCE


def test_a_real_report_has_every_bundle(finished):
    found = {os.path.basename(case.model): case.outcome for case in cases(finished)}
    assert found == {"right": "passed", "wrong": "failed", "changed": "error"}
    assert not finished["passed"]
    assert not finished["proven"]


# ---------------------------------------------------------------------------------------------------------- JUnit

# The rules of Jenkins' junit-10.xsd: element -> (attributes that must be there, that may be, children).
OUTCOME = (set(), {"type", "message"}, set())
SCHEMA = {
    "testsuites": (set(), {"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors"},
        {"time", "skipped", "timestamp", "hostname", "id", "package", "file", "group"},
        {"properties", "testcase", "system-out", "system-err"},
    ),
    "properties": (set(), set(), {"property"}),
    "property": ({"name", "value"}, set(), set()),
    "testcase": ({"name"}, {"time", "classname", "group"}, {"failure", "error", "skipped", "system-out"}),
    "failure": OUTCOME,
    "error": OUTCOME,
    "skipped": OUTCOME,
}
TIME = re.compile(r"\d+(\.\d+)?")


def parsed(record):
    """The document, held against the schema, and its counts against what it holds."""
    root = ET.fromstring(junit(record))
    assert root.tag == "testsuites"
    for element in root.iter():
        needed, possible, children = SCHEMA[element.tag]
        assert needed <= set(element.attrib) <= needed | possible, element.tag
        assert {child.tag for child in element} <= children, element.tag
        assert TIME.fullmatch(element.get("time", "0"))
    for suite in [root, *root.iter("testsuite")]:
        for count, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            if count in suite.attrib:
                assert int(suite.get(count)) == len(list(suite.iter(tag))), count
    return root


def test_a_case_for_every_candidate_and_output():
    root = parsed(check([*judged(1, 1.01), drifted()]))
    assert [case.get("name") for case in root.iter("testcase")] == [
        "c0.onnx on onnxruntime-cpu: y",
        "c1.onnx on onnxruntime-cpu: y",
        "d.onnx on onnxruntime-cpu",
    ]
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("3", "2", "0")


def test_a_failure_tells_the_reason_and_the_worst_element():
    record = check(judged(1.01))
    output = record["comparisons"][0]["outputs"][0]
    (failure,) = parsed(record).iter("failure")
    assert output["reason"] in failure.text
    assert f"worst element sample {output['worst_sample']} [{output['worst_index'][0]}]" in failure.text
    assert f"{output['snr_db']:.1f} dB" in failure.text


def test_the_time_of_a_suite_is_that_of_its_report():
    assert parsed(check(judged(1)))[0].get("time") == "1.500"
    assert parsed(check(judged(1), seconds={}))[0].get("time") is None


def test_a_real_report_is_valid(finished):
    root = parsed(finished)
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("3", "1", "1")


def hostile():
    comparisons = judged(1.01, name=HOSTILE)
    comparisons[0]["candidate"] = HOSTILE
    comparisons[0]["outputs"][0]["reason"] = HOSTILE
    return check(comparisons, model=HOSTILE, notices=[HOSTILE])


def test_what_xml_cannot_hold_is_removed():
    root = parsed(hostile())
    name = next(root.iter("testcase")).get("name")
    assert not re.search("[\x00\x1b\udc80]", name)
    assert "<img src=x>" in name  # escaped in the file, and itself again after parsing


# ------------------------------------------------------------------------------------------------------- Markdown


def test_the_verdict_comes_first():
    assert markdown(check(judged(1))).startswith("### ✅ 1 case passed")
    assert markdown(check(judged(1, 1.01))).startswith("### ❌ 1 of 2 cases failed")
    assert "not proven" in markdown(check(judged(1), proven=False, reason="opaque")).split("\n")[0]


def test_every_row_has_the_cells_of_the_head():
    rows = [line for line in markdown(check([*judged(1, 1.01), drifted()])).split("\n") if line.startswith("|")]
    assert len(rows) == 2 + 3
    assert {row.count("|") for row in rows} == {8}


def test_failures_come_first_and_carry_the_worst_element():
    rows = markdown(check(judged(1, 1.01))).split("\n")
    assert "**failed**" in rows[4]
    assert "worst element sample" in rows[4]
    assert "c1.onnx" in rows[4]


def test_a_comment_stays_short_whatever_is_in_it():
    comparisons = [c for _ in range(100) for c in judged(1.01)]
    for comparison in comparisons:
        comparison["candidate"] = "@#|" * 500
        comparison["outputs"][0]["reason"] = "@#|" * 500
    text = markdown(check(comparisons, model="@#|" * 500, notices=["@#|" * 500] * 100))
    assert text.count("\n") <= MAX_LINES
    assert len(text.encode()) <= MAX_CHARACTERS
    assert "75 more: 75 failed" in text


def test_names_cannot_end_the_table_or_speak_markdown():
    text = markdown(hostile())
    text.encode()
    rows = [line for line in text.split("\n") if line.startswith("|")]
    assert len(rows) == 3
    assert {row.count("|") for row in rows} == {8}
    assert "<img" not in text
    assert not re.search(r"@team|(?<!&)#12|[`\x00\x1b]", text)


def test_a_long_name_keeps_both_ends():
    assert cut("models/" + "x" * 100 + "/net.onnx", 20) == "models/xx…x/net.onnx"


# ---------------------------------------------------------------------------------------------------- annotations


def test_an_annotation_is_one_line():
    (line,) = github.commands(hostile())
    assert "\n" not in line
    head, message = line.removeprefix("::error title=").split("::", 1)
    assert not re.search("[:,]", head)
    assert "%0A::error::x" in message
    assert message.endswith("%250A")


def test_an_undecided_gate_is_a_warning_and_skipped():
    gate = {"candidate": "a", "baseline": "b", "outcome": "undecided", "reason": "why", "ratio": 1.0,
            "ci95": [0.9, 1.2], "max_slowdown": 1.1}  # fmt: skip
    record = {**check([]), "schema": "deploykit.ci/1", "checks": [], "bundles": [], "latency": [gate]}
    assert github.commands(record) == ["::warning title=deploykit%3A a%3A latency / b::why"]
    assert len(list(parsed(record).iter("skipped"))) == 1
    assert "1.00x [0.9, 1.2]" in [case.measured for case in cases(record)]


def test_the_tenth_annotation_counts_the_rest():
    lines = github.commands(check(judged(*[1.01] * 14)))
    assert len(lines) == 10
    assert "5 more" in lines[-1]
    assert len(github.commands(check(judged(*[1.01] * 10)))) == 10


@pytest.mark.parametrize("environment", [{}, {"GITHUB_ACTIONS": "false", "GITHUB_STEP_SUMMARY": "summary.md"}])
def test_elsewhere_nothing_is_announced(environment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stream = io.StringIO()
    github.announce(check(judged(1.01)), stream, environment)
    assert stream.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


def test_the_summary_is_appended(tmp_path):
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    stream = io.StringIO()
    github.announce(check(judged(1.01)), stream, {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(summary)})
    assert summary.read_text().startswith("before\n### ❌")
    assert stream.getvalue().startswith("::error ")


def test_a_summary_that_cannot_be_written_is_a_warning(tmp_path):
    stream = io.StringIO()
    github.announce(check(judged(1)), stream, {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(tmp_path)})
    assert stream.getvalue().startswith("::warning title=deploykit::the step summary cannot be written")


# ---------------------------------------------------------------------------------------------------------- files


def test_all_files_of_a_real_report(finished, tmp_path):
    targets = {kind: tmp_path / kind for kind in ("junit", "markdown", "html")}
    deliver(finished, claim_targets(targets))
    assert (tmp_path / "junit").read_bytes() == junit(finished)
    assert (tmp_path / "markdown").read_text() == markdown(finished)
    page = (tmp_path / "html").read_text()
    assert page == ci_page(finished)
    assert "2 of 3 cases failed" in page
    assert not re.search(r"https?:|<script|src=", page)


def test_names_in_the_page_are_escaped():
    record = {**hostile(), "schema": "deploykit.ci/1", "checks": [hostile()], "bundles": [], "latency": []}
    page = ci_page(record)
    page.encode()
    assert "<img" not in page


def test_targets_are_claimed_before_the_work(tmp_path):
    there = tmp_path / "there.xml"
    there.touch()
    with pytest.raises(OutputError, match="exists already"):
        claim_targets({"junit": there})
    assert claim_targets({"junit": there, "markdown": None}, force=True) == {"junit": there}
    with pytest.raises(InputError, match="same file"):
        claim_targets({"junit": there}, force=True, others={"json": str(there)})
    with pytest.raises(OutputError, match="would replace the input"):
        claim_targets({"junit": there}, force=True, inputs=[there])
    with pytest.raises(OutputError, match="replace the input"):
        claim_targets({}, force=True, inputs=[there], others={"json": there})
    with pytest.raises(InputError, match="only --json"):
        claim_targets({"markdown": "-"})
    assert claim_targets({"junit": tmp_path / "new"}, others={"json": "-"})


def test_the_manifest_has_one_name():
    from deploykit import pytest_plugin

    assert pytest_plugin.MANIFEST == verify.MANIFEST
