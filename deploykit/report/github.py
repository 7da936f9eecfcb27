"""What GitHub shows beside a run: annotations on its page, and the summary of the step.

An annotation is a line ``::error title=TITLE::MESSAGE`` on stdout or stderr (GitHub's "Workflow commands"). The message
ends with the line, so percent signs and line ends are written as %25, %0D and %0A; in a property colons and commas,
too.
A runner shows ten errors and ten warnings of a step and drops the rest in silence, so the last of ten counts the
others.

The summary is Markdown appended to the file that GITHUB_STEP_SUMMARY names; a file that cannot be written is a warning
of its own, as the verdict does not hang on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from deploykit.report.cases import Case, cases
from deploykit.report.check_markdown import markdown, printable

SHOWN = 10  # of one level in one step
_ESCAPES = {"%": "%25", "\r": "%0D", "\n": "%0A"}
_IN_PROPERTY = {**_ESCAPES, ":": "%3A", ",": "%2C"}


def running(environment: Mapping[str, str] | None = None) -> bool:
    """Whether this is a step of GitHub Actions."""
    return (os.environ if environment is None else environment).get("GITHUB_ACTIONS") == "true"


def _escaped(text: str, signs: Mapping[str, str]) -> str:
    return "".join(signs.get(sign, sign) for sign in printable(text))


def annotation(level: str, title: str, message: str) -> str:
    """One workflow command, without its line end."""
    return f"::{level} title={_escaped(title, _IN_PROPERTY)}::{_escaped(message, _ESCAPES)}"


def commands(report: Mapping[str, Any]) -> list[str]:
    """The commands for a report: an error for what failed, a warning for what stayed undecided."""
    found = cases(report)
    bad = [case for case in found if case.bad]
    unsure = [case for case in found if case.outcome == "undecided"]
    return [*_level("error", bad), *_level("warning", unsure)]


def _level(level: str, found: Sequence[Case]) -> Iterator[str]:
    shown = found if len(found) <= SHOWN else found[: SHOWN - 1]
    for case in shown:
        yield annotation(level, f"deploykit: {case.label}", case.reason or case.outcome)
    if len(shown) < len(found):
        rest = ", ".join(case.label for case in found[len(shown) :][:SHOWN])
        yield annotation(level, "deploykit", f"{len(found) - len(shown)} more: {rest}")


def announce(report: Mapping[str, Any], stream: TextIO, environment: Mapping[str, str] | None = None) -> None:
    """Tell GitHub about a report, where this is a step of GitHub Actions; anywhere else do nothing."""
    known = os.environ if environment is None else environment
    if not running(known):
        return
    lines = commands(report)
    summary = known.get("GITHUB_STEP_SUMMARY")
    if summary:
        try:
            with open(summary, "a", encoding="utf-8") as file:
                file.write(f"{markdown(report)}\n")
        except OSError as error:
            lines.append(annotation("warning", "deploykit", f"the step summary cannot be written: {error.strerror}"))
    stream.writelines(f"{line}\n" for line in lines)
    stream.flush()
