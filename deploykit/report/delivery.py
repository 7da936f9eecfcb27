"""Where a report goes besides the terminal and --json: files for a CI system, and GitHub where it runs there.

Every target is claimed before the work begins, so a check of ten minutes does not end in "exists already", and written
whole or not at all afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deploykit.errors import InputError
from deploykit.files import Target, apart, claim
from deploykit.report.check_markdown import write_markdown
from deploykit.report.ci_html import write_ci_page
from deploykit.report.html import write_page
from deploykit.report.junit import write_junit

WRITERS: Mapping[str, Callable[..., Path]] = {
    "junit": write_junit,
    "markdown": write_markdown,
    "html": lambda report, path, force: PAGES[report["schema"]](report, path, force=force),
}
PAGES: Mapping[str, Callable[..., Path]] = {
    "deploykit.ci/1": write_ci_page,
    "deploykit.check/1": write_page,
    "deploykit.deploy/1": write_page,
    "deploykit.bench/1": write_page,
}


def claim_targets(
    targets: Mapping[str, Target],
    *,
    force: bool = False,
    inputs: Sequence[Target] = (),
    others: Mapping[str, Target] | None = None,
) -> dict[str, Path]:
    """The targets (``{"junit": path, ...}``) that were asked for.

    Raises OutputError where one may not be written or is an input, and InputError where one is named twice. ``others``
    are options that write files, too (``{"json": path}``), and are claimed with them.
    """
    asked = {key: Path(path) for key, path in targets.items() if path is not None}
    more = {key: Path(path) for key, path in (others or {}).items() if path not in (None, "-")}
    for key, path in asked.items():
        if str(path) == "-":
            raise InputError(f"--{key} -: only --json writes to stdout; give a path")
    apart({f"--{key}": path for key, path in {**more, **asked}.items()})
    for path in (*more.values(), *asked.values()):
        claim(path, force=force, inputs=inputs)
    return asked


def deliver(report: Mapping[str, Any], targets: Mapping[str, Path]) -> None:
    """Write a report to the targets that `claim_targets` gave."""
    for key, path in targets.items():
        WRITERS[key](report, path, force=True)
