"""Rows: where the numbers lie until they are needed; the array they belong to may be larger than memory.

    Held     in memory already
    Stored   in a file, from some byte on: a .npy file, a member of an .npz that is not compressed, a spool
    Member   of an .npz: where it is not compressed it is read in place; else it is unpacked whole to a temporary
             file when one of its rows is first wanted, and stays unpacked until another member takes its `Slot`
    Spool    batches that come only once, written one behind another to a temporary file

A file is mapped for as long as it takes to copy the rows out: what stays mapped would count as the process's memory,
and every part of a large folder would keep a file open. Temporary files have no name (on Windows: are deleted by
the system), so that nothing is left of them however the process ends. They go where Python's tempfile says: TMPDIR.

An .npz carries checksums, and they are checked before the first row of a member is used. Pickles are never read.
"""

from __future__ import annotations

import contextlib
import lzma
import math
import struct
import tempfile
import tokenize
import weakref
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

import numpy as np

from deploykit.data.samples import Array, Numbers
from deploykit.errors import DataError

PIECE = 1 << 20  # bytes that are copied at a time

_DAMAGE = (  # what numpy, zipfile and the decompressors raise for bytes that are no array
    OSError,
    ValueError,
    EOFError,
    KeyError,
    MemoryError,
    RuntimeError,  # encrypted; NotImplementedError: an unknown compression
    SyntaxError,
    tokenize.TokenError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


@contextlib.contextmanager
def explained(where: str) -> Iterator[None]:
    """DataError, in one line, for whatever goes wrong with the bytes of a numpy file."""
    try:
        yield
    except _DAMAGE as error:
        raise DataError(f"{where} is a damaged or truncated numpy file; save it again") from error


def _temporary() -> IO[bytes]:
    return tempfile.TemporaryFile(prefix="deploykit-")


@contextlib.contextmanager
def _room(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place, cause = tempfile.gettempdir(), (error.strerror or str(error)).lower()
        raise DataError(
            f"cannot unpack {what} into {place} ({cause}); free some space, or set TMPDIR to a folder that has it"
        ) from error


class Rows(Protocol):
    """An array, whole only on paper."""

    @property
    def shape(self) -> tuple[int, ...]:
        """With the number of rows first."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what `take` gives."""

    def take(self, rows: Numbers) -> Array:
        """A copy of these rows. Raises DataError where they cannot be read."""


@dataclass(frozen=True, eq=False)
class Held:
    """Rows of an array in memory."""

    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def take(self, rows: Numbers) -> Array:
        return np.asarray(self.array[rows])


# --- .npy ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What an .npy file says of its array."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


_VERSIONS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _header(stream: IO[bytes], size_bytes: int, where: str) -> Header:
    """Read the header of an .npy file of that size; the stream stands at the array then."""
    begin = stream.tell()
    version = np.lib.format.read_magic(stream)
    if version not in _VERSIONS:  # 3.0 differs by the names of fields in UTF-8
        raise DataError(f"{where} holds records with named fields; save plain numbers")
    found = Header(*_VERSIONS[version](stream))
    if found.dtype.hasobject:
        raise DataError(f"{where} holds Python objects, which are never read; save plain numbers")
    if min(found.shape, default=0) < 0 or stream.tell() - begin + found.size_bytes > size_bytes:
        raise ValueError("the array does not end within its file")
    return found


@dataclass(frozen=True, eq=False)
class Stored:
    """Rows of an array that lies in ``file`` (a path, or an open temporary file) from byte ``start`` on."""

    file: str | IO[bytes]
    start: int
    header: Header
    where: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.header.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.header.dtype

    def take(self, rows: Numbers) -> Array:
        if not self.header.size_bytes:
            return np.empty((len(rows), *self.shape[1:]), self.dtype)
        with explained(self.where):
            order: Any = "F" if self.header.fortran else "C"
            mapped: Any = np.memmap(self.file, self.dtype, "r", self.start, self.shape, order)
            return np.asarray(mapped.view(np.ndarray)[rows])


def npy(path: str) -> Stored:
    """The array of an .npy file."""
    with explained(path), open(path, "rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        found = _header(stream, size, path)
        return Stored(path, stream.tell(), found, path)


# --- .npz ----------------------------------------------------------------------------------------------------------


class Slot:
    """Room for one unpacked member."""

    def __init__(self) -> None:
        self._name: tuple[str, str] | None = None  # not the member itself, which knows this slot: no cycle
        self._stored: Stored | None = None

    def of(self, member: Member) -> Stored:
        name = (member.path, member.name)
        if self._stored is None or self._name != name:
            self._stored = None  # its temporary file goes before the next one comes
            self._stored, self._name = member.unpacked(), name
        return self._stored


@dataclass(frozen=True, eq=False)
class Member:
    """Rows of one array of an .npz."""

    path: str
    name: str
    header: Header
    slot: Slot = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.header.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.header.dtype

    def take(self, rows: Numbers) -> Array:
        return self.slot.of(self).take(rows)

    def unpacked(self) -> Stored:
        """Check the sums of the member and give it as a file's bytes. Raises DataError for damage, or no room."""
        with explained(self.path), zipfile.ZipFile(self.path) as archive:
            info = archive.getinfo(self.name)
            with archive.open(info) as stream:
                if info.compress_type == zipfile.ZIP_STORED:
                    while stream.read(PIECE):  # zipfile compares the sum when it comes to the end
                        pass
                    with open(self.path, "rb") as file:
                        return self._behind_header(file, _begin(file, info), info.file_size, self.path)
                unpacked = _copied(stream, self.path)
                stored = self._behind_header(unpacked, 0, info.file_size, unpacked)
                weakref.finalize(stored, unpacked.close)
                return stored

    def _behind_header(self, stream: IO[bytes], begin: int, size_bytes: int, file: str | IO[bytes]) -> Stored:
        stream.seek(begin)
        if _header(stream, size_bytes, self.path) != self.header:
            raise ValueError("the file was replaced since it was opened")
        return Stored(file, stream.tell(), self.header, self.path)


def _begin(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its local header of 30 bytes, its name and its extra field."""
    file.seek(info.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + int(name) + int(extra)


def _copied(stream: IO[bytes], what: str) -> IO[bytes]:
    """A temporary file with what ``stream`` gives; reading and writing fail for different reasons."""
    with _room(what):
        file = _temporary()
    try:
        while piece := stream.read(PIECE):
            with _room(what):
                file.write(piece)
        with _room(what):
            file.flush()
    except BaseException:
        file.close()
        raise
    return file


def npz_keys(path: str) -> list[str]:
    """The names of the arrays in an .npz."""
    with explained(path), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def npz_member(path: str, key: str, slot: Slot) -> Member:
    """One array of an .npz; only its header is read."""
    with explained(path), zipfile.ZipFile(path) as archive:
        name = f"{key}.npy" if f"{key}.npy" in archive.namelist() else key
        info = archive.getinfo(name)
        with archive.open(info) as stream:
            return Member(path, name, _header(stream, info.file_size, path), slot)


# --- what comes only once --------------------------------------------------------------------------------------------


class Spool:
    """Rows that are appended while they come, of one shape and dtype."""

    def __init__(self, like: Array, where: str) -> None:
        self._where = where
        self._like = Header(like.shape[1:], False, like.dtype)
        self._count = 0
        with _room(f"what {where} gives"):
            self._file = _temporary()
        weakref.finalize(self, self._file.close)

    def fits(self, array: Array) -> bool:
        """Whether the array can go behind those that are here: one shape, and no digit (or letter) lost."""
        kind = array.dtype.kind == self.dtype.kind and np.can_cast(array.dtype, self.dtype, "safe")
        return kind and array.shape[1:] == self._like.shape

    def append(self, array: Array) -> None:
        with _room(f"what {self._where} gives"):
            self._file.seek(0, 2)
            self._file.write(array.astype(self.dtype).tobytes())  # in C order
            self._file.flush()
        self._count += len(array)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._count, *self._like.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._like.dtype

    def take(self, rows: Numbers) -> Array:
        return Stored(self._file, 0, Header(self.shape, False, self.dtype), self._where).take(rows)
