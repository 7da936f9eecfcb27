"""The ``.keras`` archive of Keras 3: a zip of metadata.json, config.json, model.weights.h5 and assets/.

The archive is checked before a member is unpacked: names that leave the folder, names that occur
twice (two readers could see two different files), encrypted members, and members that are far larger
than what is stored for them. The weights inside are an HDF5 file and get that format's checks; a
member that is stored without compression, as Keras writes it, is checked in place, without a copy.

tf-keras 2.12 and later write archives that look the same; ``metadata.json`` tells them apart. Those are translated
(`deploykit.load.legacy`).
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, cast

import h5py
import keras

from deploykit.archive import ABOUT
from deploykit.errors import LoadError, UnsafeModelError
from deploykit.load import hdf5
from deploykit.load.contents import MAX_CONFIG_BYTES, Contents, mapping_of, named, parse_config, printable, text_of
from deploykit.load.legacy import fill_archive

MAGIC, EMPTY = b"PK\x03\x04", b"PK\x05\x06"
CONFIG, METADATA = "config.json", "metadata.json"
WEIGHTS = ("model.weights.h5", "model.weights.npz")

BOMB_FLOOR_BYTES = 16 << 20
BOMB_EXPANSION = 100  # Keras stores members uncompressed; weights hardly compress
MAX_MEMBERS = 10_000
_LOCAL_HEADER_BYTES = 30


def recognises(path: Path) -> bool:
    """A zip, also one whose end was cut off."""
    with open(path, "rb") as stream:
        return stream.read(len(MAGIC)) in (MAGIC, EMPTY)  # one that begins later has something else in front


class _Window(io.RawIOBase):
    """Bytes ``start`` to ``start + size`` of an open file as a file of its own."""

    def __init__(self, stream: BinaryIO, start: int, size: int) -> None:
        super().__init__()
        self._stream, self._start, self._size, self._at = stream, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._stream.seek(self._start + self._at)
        wanted = min(len(buffer), max(0, self._size - self._at))
        got = self._stream.read(wanted)
        buffer[: len(got)] = got
        self._at += len(got)
        return len(got)


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise LoadError(f"{path} is a truncated or damaged archive; copy or save it again") from error


def refuse_members(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise UnsafeModelError for names and sizes that no model archive has."""
    members = archive.infolist()
    names = [member.filename for member in members]
    if len(members) > MAX_MEMBERS:
        raise UnsafeModelError(f"{path} has {len(members)} members, the limit is {MAX_MEMBERS}; refusing to unpack it")
    for name in names:
        parts = name.replace("\\", "/").split("/")
        if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "\0" in name:
            raise UnsafeModelError(f"{path} has a member {name!r} that leaves the archive; refusing to unpack it")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UnsafeModelError(f"{path} has two members {twice!r}; refusing to choose one, save the model again")
    for member in members:
        if member.flag_bits & 1:
            raise LoadError(f"{path} has an encrypted member {member.filename!r}; save the model without a password")
        if member.file_size > BOMB_FLOOR_BYTES and member.file_size > BOMB_EXPANSION * member.compress_size:
            raise UnsafeModelError(
                f"{path}: {member.filename!r} would unpack to {member.file_size >> 20} MiB from "
                f"{member.compress_size} bytes; refusing to unpack it"
            )
    unpacked_bytes, file_bytes = sum(member.file_size for member in members), path.stat().st_size
    if unpacked_bytes > BOMB_FLOOR_BYTES and unpacked_bytes > BOMB_EXPANSION * file_bytes:
        raise UnsafeModelError(f"{path} would unpack to {unpacked_bytes >> 20} MiB in all; refusing to unpack it")


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    if archive.getinfo(name).file_size > MAX_CONFIG_BYTES:
        raise LoadError(f"{name} in {path} is over {MAX_CONFIG_BYTES >> 20} MiB; refusing it")
    try:
        return archive.read(name)
    except Exception as error:  # zlib, lzma and zipfile have no common base
        raise LoadError(f"{name} in {path} is damaged; copy or save the file again") from error


@contextlib.contextmanager
def _weights(archive: zipfile.ZipFile, name: str, path: Path) -> Iterator[h5py.File]:
    """The HDF5 file inside the archive, opened with the checks of its format."""
    member = archive.getinfo(name)
    with ExitStack() as stack:
        stream: BinaryIO
        if member.compress_type == zipfile.ZIP_STORED:
            outer = stack.enter_context(open(path, "rb"))
            outer.seek(member.header_offset)
            header = outer.read(_LOCAL_HEADER_BYTES)
            if len(header) < _LOCAL_HEADER_BYTES or not header.startswith(MAGIC):
                raise LoadError(f"{name} in {path} is damaged; copy or save the file again")
            # Lengths of the name and of the extra field, which stand between the header and the bytes.
            start = (
                member.header_offset + len(header) + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
            )
            stream = cast(BinaryIO, io.BufferedReader(_Window(outer, start, member.file_size), 1 << 16))
        else:
            stream = stack.enter_context(tempfile.TemporaryFile())
            try:
                with archive.open(member) as packed:
                    while piece := packed.read(1 << 20):
                        stream.write(piece)
            except Exception as error:  # zlib, lzma and zipfile have no common base
                raise LoadError(f"{name} in {path} is damaged; copy or save the file again") from error
            stream.seek(0)
        yield stack.enter_context(hdf5.open_checked(stream, f"{name} in {path}"))


def peek(path: Path) -> Contents:
    """Read what the archive says about itself. Raises LoadError, UnsafeModelError or UnsupportedModelError."""
    with _open_zip(path) as archive:
        refuse_members(archive, path)
        names = set(archive.namelist())
        if CONFIG not in names:
            inside = ", ".join(sorted(names)[:4]) or "nothing"
            raise LoadError(f"{path} is a zip without a Keras model (it holds {inside}); pass a model file")
        config = parse_config(_member(archive, CONFIG, path), f"{CONFIG} of {path}")
        metadata = _metadata(_member(archive, METADATA, path)) if METADATA in names else {}
        saved_by, notices = printable(text_of(metadata.get("keras_version"))), []
        if saved_by is None:
            notices.append(f"{path.name} does not say which Keras saved it")
        contents = Contents(
            config=config,
            saved_by=saved_by,
            backend=None,
            training_config_found=bool(config.get("compile_config")),
            notices=tuple(notices),
            assumed=3,
            training_config=mapping_of(config.get("compile_config")),
            saved_on=printable(text_of(metadata.get("date_saved"))),
            about=mapping_of(metadata.get(ABOUT)),
        )
        weights = [name for name in WEIGHTS if name in names]
        if not weights:
            raise LoadError(f"{path} describes a model but holds no weights; save it again with model.save()")
        if weights[0].endswith(".h5"):
            with _weights(archive, weights[0], path):
                pass
    return contents


def _metadata(text: bytes) -> dict[str, Any]:
    try:
        metadata = json.loads(text[:65536])
    except (ValueError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def fill(path: Path, model: keras.Model, contents: Contents) -> list[str]:
    """Give a model that was built from a legacy description its weights; returns notices."""
    with _open_zip(path) as archive, _weights(archive, WEIGHTS[0], path) as file:
        return fill_archive(file, model, contents.config, what=str(path))


def build(path: Path, custom_objects: Mapping[str, Any], safe_mode: bool) -> keras.Model:
    """Let Keras build the model; it is not compiled."""
    with named(path, ".keras") as name:
        return keras.models.load_model(name, dict(custom_objects), compile=False, safe_mode=safe_mode)
