"""Write a Keras model as a `.keras` file that is the same, byte for byte, for the same model.

Keras puts three things into the archive that change from run to run: the time of saving (in the zip
headers and in metadata.json), memory addresses as `shared_object_id`, and HDF5 object headers. Here the
zip gets one fixed time, metadata.json the same (`date_saved` is what the format requires; a constant says
nothing false about the weights), and shared ids are numbered in order of appearance.

The file loads in plain Keras with safe mode on; nothing of deploykit is needed to read it. It is written
under a temporary name and renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deploykit.errors import UnsupportedModelError
from deploykit.files import whole_file

ABOUT = "deploykit"  # key of metadata.json; Keras reads two others and leaves it alone
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can hold
_DATE = "1980-01-01@00:00:00"
_SHARED_ID = re.compile(r'("shared_object_id": )(\d+)')


def _normal(name: str, data: bytes, about: Mapping[str, Any] | None) -> bytes:
    if name == "metadata.json":
        record = json.loads(data)
        record["date_saved"] = _DATE
        if about is not None:
            record[ABOUT] = about
        return json.dumps(record).encode()
    if name == "config.json":
        numbers: dict[str, int] = {}
        return _SHARED_ID.sub(
            lambda match: match[1] + str(numbers.setdefault(match[2], len(numbers) + 1)), data.decode()
        ).encode()
    return data


@contextlib.contextmanager
def _scratch(folder: str) -> Iterator[None]:
    """Keras leaves its temporary folder behind when saving fails; let it lie where we clean up."""
    before = tempfile.tempdir
    tempfile.tempdir = folder
    try:
        yield
    finally:
        tempfile.tempdir = before


def write_keras(
    model: Any, path: str | os.PathLike[str], *, force: bool = False, about: Mapping[str, Any] | None = None
) -> Path:
    """Save ``model`` (weights and architecture; no optimizer) to ``path``; returns the path.

    ``about``: plain JSON that the file carries beside the model, for whoever deploys it.

    Raises OutputError where the path cannot be written, UnsupportedModelError where Keras cannot save it.
    """
    path = Path(path)
    with (
        whole_file(path, force=force) as target,
        tempfile.TemporaryDirectory(dir=target.parent, prefix=".save-") as room,
    ):
        plain = Path(room) / "model.keras"
        try:
            with _scratch(room):
                model.save(plain)
        except OSError:
            raise
        except Exception as error:
            raise UnsupportedModelError(f"Keras cannot save this model: {error}") from error
        with zipfile.ZipFile(plain) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            for name in sorted(source.namelist()):
                entry = zipfile.ZipInfo(name, _EPOCH)
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, _normal(name, source.read(name), about))
    return path
