"""The order of layers: imports point downward only, and nothing from `affine` on needs Keras or TensorFlow."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "deploykit"

# Highest first; modules of one row may import each other.
ORDER = [
    {"cli", "pytest_plugin"},
    {"ci", "deploy", "diagnosis", "drawing", "equivalence", "inspection", "latency", "migrate", "recommendation"},
    {"check", "bench", "bundle", "bisect", "worst_case", "gradients", "gates", "profiling", "transfer", "tuning"},
    {"fuse", "export", "load", "runtimes", "archive", "health"},
    {"graph", "channels", "opaque"},
    {"affine", "compare", "stats", "noise", "flops", "report", "data", "environment"},
    {"verify", "errors", "signature", "files", "modules", "layout"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
FRAMEWORKS = {"keras", "tensorflow", "tf2onnx"}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path, *, everywhere: bool) -> set[str]:
    """Dotted names a file imports, on its top level or anywhere."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else tree.body
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_a_level():
    assert {room(path) for path in FILES} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    rooms = {name.split(".")[1] for name in imported(path, everywhere=True) if name.startswith("deploykit.")}
    upward = {other for other in rooms & set(LEVEL) if LEVEL[other] < LEVEL[room(path)]}
    assert not upward


@pytest.mark.parametrize("path", [p for p in FILES if LEVEL[room(p)] >= LEVEL["affine"]], ids=lambda p: p.name)
def test_low_layers_import_no_framework(path):
    assert not {name.split(".")[0] for name in imported(path, everywhere=False)} & FRAMEWORKS


def test_verify_imports_nothing_but_numpy_and_onnxruntime():
    names = {name.split(".")[0] for name in imported(PACKAGE / "verify.py", everywhere=True)}
    assert names - set(sys.stdlib_module_names) <= {"numpy", "onnxruntime"}


@pytest.mark.parametrize(
    "command", ["import deploykit; dir(deploykit)", "import deploykit.cli", "import deploykit.verify"]
)
def test_importing_needs_no_tensorflow(command):
    script = f"{command}; import sys; sys.exit(bool({{'tensorflow', 'keras', 'onnxruntime'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
