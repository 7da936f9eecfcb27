"""A model's description alone: the JSON of ``model.to_json()``, whose weights are in another file (``--weights``).

The text of Keras 2 names its version; that of Keras 3 does not, but names the module of every class. That of Keras 1
is complete with its weights alone, whose names tell the backend (`completed`). YAML, which Keras wrote until 2.5, is
refused: reading it ran whatever the file said, and only that Keras knows its dialect.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras

from deploykit.errors import LoadError, UnsupportedModelError
from deploykit.load import hdf5
from deploykit.load.contents import MAX_CONFIG_BYTES, Contents, mapping_of, parse_config, printable, text_of

START_BYTES = 4096


def recognises(path: Path) -> bool:
    """Text that begins like a JSON object, or names classes as YAML does."""
    if not path.is_file():
        return False
    with open(path, "rb") as stream:
        start = stream.read(START_BYTES)
    return start.lstrip().startswith(b"{") or _is_yaml(start)


def _is_yaml(start: bytes) -> bool:
    return any(line.startswith((b"class_name:", b"backend:")) for line in start.splitlines())


def peek(path: Path) -> Contents:
    """Read the description. Raises LoadError or UnsupportedModelError."""
    with open(path, "rb") as stream:
        text = stream.read(MAX_CONFIG_BYTES + 1)
    if _is_yaml(text[:START_BYTES]):
        raise UnsupportedModelError(
            f"{path} describes a model in YAML, which only the Keras that wrote it reads; "
            "write it there with model.to_json(), or save the whole model with model.save()"
        )
    config = parse_config(text, str(path))
    return Contents(
        config=config,
        saved_by=printable(text_of(config.get("keras_version"))),
        backend=printable(text_of(config.get("backend"))),
        training_config_found=bool(config.get("compile_config")),
        assumed=3 if "module" in config else hdf5.assumed(text.decode("utf-8")),
        training_config=mapping_of(config.get("compile_config")),
    )


def completed(contents: Contents, path: Path, weights: Path | None) -> Contents:
    """What the file says, with what its weights say of it. Raises LoadError where there are none."""
    if weights is None:
        raise LoadError(f"{path} describes a model but holds no weights; pass the weights file with --weights")
    if contents.generation > 1:
        return contents
    if not weights.exists():
        raise LoadError(f"there is no file {weights}; check the path")
    if not hdf5.recognises(weights):
        raise LoadError(f"{path} is of Keras 1, {weights} is not; pass what model.save_weights() wrote for it there")
    with hdf5.open_checked(weights, str(weights)) as file:
        return hdf5.modernised(contents, hdf5.backend_of(file, str(weights)), str(path))


def build(path: Path, custom_objects: Mapping[str, Any], safe_mode: bool) -> keras.Model:
    """Let Keras build the model, with fresh weights; the scope of safe mode is the caller's."""
    return keras.models.model_from_json(path.read_text(encoding="utf-8"), dict(custom_objects))


def fill(path: Path, model: keras.Model, contents: Contents) -> list[str]:
    """Nothing: the weights are in another file."""
    return []
