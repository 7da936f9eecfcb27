"""Documents that are made from tables stay equal to them."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import deploykit
from deploykit.fuse import CODES

ROOT = Path(__file__).resolve().parent.parent


def test_the_table_of_codes_is_the_table_in_the_code():
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", (ROOT / "docs" / "decisions.md").read_text(), re.M)
    assert dict(rows) == CODES


def test_what_loads_is_what_the_tables_say():
    script = [sys.executable, str(ROOT / "benchmarks" / "compatibility.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-500:]


def test_the_changelog_knows_this_version():
    assert f"## {deploykit.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_names_every_command():
    from deploykit.cli import app

    names = {(command.name or command.callback.__name__) for command in app.registered_commands}
    readme = (ROOT / "README.md").read_text()
    assert {name for name in names if f"deploykit {name}" not in readme} == set()


def test_every_extra_that_a_message_names_exists():
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    sources = "".join(path.read_text() for path in (ROOT / "deploykit").rglob("*.py"))
    assert set(re.findall(r"deploykit\[(\w+)\]", sources)) <= extras
    assert extras >= {"gpu", "openvino", "litert", "legacy", "report", "dev"}


def test_no_document_has_a_gap():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "models").glob("*.md")]
    assert [path.name for path in documents if "@@" in path.read_text() or "TODO" in path.read_text()] == []
