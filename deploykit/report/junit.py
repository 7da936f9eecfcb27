"""JUnit XML, for every CI system that shows test results.

The schema is the one that Jenkins' xUnit plugin validates by (junit-10.xsd), the strictest in use: testsuites >
testsuite > (properties, testcase > failure | error | skipped), counts on every suite, times as plain decimals. What was
not decided (a latency gate whose interval holds the limit) is ``skipped``: neither a pass nor a failure.

XML 1.0 has no way to write most control characters and no lone surrogate, not even escaped (section 2.2 of the
recommendation); names of files and layers may hold them, and they are removed.
"""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploykit.files import whole_file
from deploykit.report.cases import Case, Suite, suites

_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MESSAGE = 500  # characters of the attribute; the text below it is whole

_TAGS = {"failed": "failure", "error": "error", "undecided": "skipped"}
_COUNTS = {"failures": "failed", "errors": "error", "skipped": "undecided"}


def legal(text: str) -> str:
    """The text without what XML 1.0 cannot hold."""
    return _ILLEGAL.sub("", text)


def junit(report: Mapping[str, Any]) -> bytes:
    """The XML document of a check, bench, deploy or ci report, UTF-8 with its declaration."""
    found = suites(report)
    root = ET.Element("testsuites", {"name": f"deploykit {report['deploykit']}", **_counts(*found)})
    root.attrib.pop("skipped")  # the schema has it on suites only
    for suite in found:
        root.append(_suite(suite))
    ET.indent(root)
    document: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def write_junit(report: Mapping[str, Any], path: str | os.PathLike[str], *, force: bool = True) -> Path:
    """Write the document whole or not at all."""
    with whole_file(path, force=force) as target:
        target.write_bytes(junit(report))
    return Path(path)


def _counts(*of: Suite) -> dict[str, str]:
    outcomes = [case.outcome for suite in of for case in suite.cases]
    seconds = [suite.seconds for suite in of if suite.seconds is not None]
    counts = {name: str(outcomes.count(outcome)) for name, outcome in _COUNTS.items()}  # type: ignore[arg-type]
    return {"tests": str(len(outcomes)), **counts, **({"time": f"{sum(seconds):.3f}"} if seconds else {})}


def _suite(suite: Suite) -> ET.Element:
    element = ET.Element("testsuite", {"name": legal(suite.name), **_counts(suite)})
    if suite.facts:
        properties = ET.SubElement(element, "properties")
        for name, value in suite.facts.items():
            ET.SubElement(properties, "property", {"name": name, "value": legal(value)})
    for case in suite.cases:
        element.append(_case(suite, case))
    return element


def _case(suite: Suite, case: Case) -> ET.Element:
    element = ET.Element("testcase", {"name": legal(case.name), "classname": legal(suite.name)})
    if suite.seconds is not None and len(suite.cases) == 1:
        element.set("time", f"{suite.seconds:.3f}")
    if case.outcome != "passed":
        reason = legal(case.reason or case.outcome)
        kind = {"type": case.outcome} if case.outcome != "undecided" else {}
        ET.SubElement(element, _TAGS[case.outcome], {"message": reason[:_MESSAGE], **kind}).text = legal(details(case))
    return element


def details(case: Case) -> str:
    """What is known about a case, a line for each thing."""
    lines = (
        ("", case.reason),
        ("measured: ", case.measured),
        ("allowed, or the original's own: ", case.yardstick),
        ("largest error: ", case.worst),
    )
    return "\n".join(f"{label}{text}" for label, text in lines if text and text != "-")
