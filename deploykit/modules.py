"""The user's own Python: a file or module that was named on the command line, imported where its imports work.

A file is imported under its own name, since pickles, registered classes and messages bear it, unless that is another
module's. Nothing here runs at the word of a model file.
"""

from __future__ import annotations

import importlib.util
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

RAISED = (Exception, SystemExit, GeneratorExit)  # what that Python may raise; KeyboardInterrupt is the user, now


def place_and_name(text: str) -> tuple[str, str]:
    """``module:name`` or ``file.py:name`` in two; the name is empty where none is given."""
    place, _, name = text.rpartition(":")
    return (place, name) if place and name.isidentifier() else (text, "")


@contextmanager
def importable(folder: Path, *, first: bool) -> Iterator[None]:
    """Let imports find ``folder``: first for a file's neighbours, last for the working folder."""
    before = list(sys.path)
    sys.path.insert(0 if first else len(sys.path), str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def import_file(path: Path) -> ModuleType:
    """Import a file under its own name, or under a longer one when that name is another module's."""
    path = path.resolve(strict=True)
    name = path.stem
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) != str(path):
        name = f"{name}_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with importable(path.parent, first=True):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
