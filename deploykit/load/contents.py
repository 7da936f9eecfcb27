"""What a model file says about itself, read without letting Keras near it.

A reader turns a file into ``Contents`` first: plain JSON values and strings. Everything that decides
whether the file may be loaded looks at these; only then does the reader's ``build`` hand the file to
Keras.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from deploykit.errors import LoadError

MAX_CONFIG_BYTES = 64 << 20  # ImageNet-size nets need under 1 MB; a long vocabulary a few
MAX_NAME = 120
MAX_CONFIG_DEPTH = 256  # a nested model adds about six levels

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


@dataclass(frozen=True)
class Contents:
    """``config`` is the model's own description (never None); ``backend`` and ``saved_by`` as recorded.

    ``assumed``: the generation of files of this format that record no version. ``opaque``: why there is no
    description, in a SavedModel whose graph is all that is known of the model. ``training_config``: how the model was
    compiled, as the file has it, None where it has nothing readable; ``saved_on``: the date it records. ``about``: what
    `deploykit.archive.write_keras` put beside the model, unchecked.
    """

    config: dict[str, Any]
    saved_by: str | None
    backend: str | None
    training_config_found: bool
    notices: tuple[str, ...] = ()
    assumed: int = 1
    opaque: str | None = None
    training_config: dict[str, Any] | None = None
    saved_on: str | None = None
    about: dict[str, Any] | None = None

    @property
    def generation(self) -> int:
        """Major version of the Keras that saved the file."""
        major = (self.saved_by or "").partition(".")[0]
        return int(major) if major.isdecimal() and len(major) < 4 else self.assumed

    @property
    def is_legacy(self) -> bool:
        """Whether an older Keras than 3 saved the file, so that its description has to be translated."""
        return self.generation < 3


def parse_config(text: bytes, what: str) -> dict[str, Any]:
    """Parse a model's JSON description in bounded time, memory and depth.

    Raises LoadError when it is too long, too deep, no JSON, or describes no model.
    """
    config = _parsed(text, what)
    if not isinstance(config, dict) or not isinstance(config.get("class_name"), str):
        raise LoadError(f"{what} describes no model; pass a file written by model.save()")
    return config


def parse_training(text: str | None) -> dict[str, Any] | None:
    """Parse the JSON that says how a model was compiled; None where it cannot be read, which no model depends on."""
    try:
        config = _parsed((text or "").encode("utf-8", "surrogateescape"), "the training configuration")
    except LoadError:
        return None
    return config if isinstance(config, dict) else None


def _parsed(text: bytes, what: str) -> Any:
    """Any JSON value. Raises LoadError when it is too long, too deep or no JSON.

    The depth is counted on the brackets outside strings before anything is parsed: a parser recurses
    once per level, and how deep it may go depends on a limit that other code can change.
    """
    if len(text) > MAX_CONFIG_BYTES:
        raise LoadError(f"{what} is {len(text) >> 20} MiB long, the limit is {MAX_CONFIG_BYTES >> 20}; refusing it")
    brackets = np.frombuffer(_STRING.sub(b"", text).translate(None, _NOT_BRACKETS), dtype=np.uint8)
    steps = np.where((brackets == ord("[")) | (brackets == ord("{")), 1, -1)
    depth = int(np.cumsum(steps).max(initial=0))
    if depth > MAX_CONFIG_DEPTH:
        raise LoadError(f"{what} is nested {depth} levels deep, the limit is {MAX_CONFIG_DEPTH}; refusing it")
    try:
        return json.loads(text.decode("utf-8"))
    except ValueError as error:
        raise LoadError(f"{what} is no valid JSON ({error}); the file is damaged, save the model again") from error


def mapping_of(value: object) -> dict[str, Any] | None:
    """A JSON object that holds something, else None."""
    return value if isinstance(value, dict) and value else None


def text_of(value: object) -> str | None:
    """A string attribute that may be stored as bytes; None when it is neither."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else None


@overload
def printable(text: str) -> str: ...
@overload
def printable(text: None) -> None: ...
def printable(text: str | None) -> str | None:
    """Text of the file's as it may appear in a message: short, and without anything that moves a terminal."""
    if text is None:
        return None
    return "".join(char if char.isprintable() else "?" for char in text[:MAX_NAME])


@contextlib.contextmanager
def named(path: Path, *suffixes: str) -> Iterator[str]:
    """``path`` under a name that ends in one of ``suffixes``: Keras picks its reader by the name."""
    absolute = os.path.abspath(path)
    weights_only = absolute.endswith(".weights.h5")  # ends in .h5 too, but is another format
    if absolute.endswith(suffixes) and weights_only == (".weights.h5" in suffixes):
        yield absolute
        return
    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
        link = os.path.join(folder, f"model{suffixes[0]}")
        try:
            os.symlink(absolute, link)
        except OSError:  # a file system or an account without symbolic links
            shutil.copyfile(absolute, link)
        yield link
