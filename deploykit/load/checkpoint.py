"""Checkpoints of TensorFlow, read without TensorFlow: ``tf.train.load_checkpoint`` aborts on a malformed shape.

    variables.index                 name -> type, shape, shard, place and checksum of each tensor
    variables.data-00000-of-00001   a shard: the values, as they lie in memory

The index is a LevelDB table, uncompressed; all checksums are CRC-32C, which TensorFlow stores "masked". Every length is
checked against the bytes that are there before anything is allocated. Values are read on demand.

Format: tensorflow/core/util/tensor_bundle, and LevelDB's doc/table_format.md.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # comes without types
from tensorflow.core.protobuf.tensor_bundle_pb2 import BundleEntryProto, BundleHeaderProto
from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

from deploykit.errors import LoadError

Array = np.ndarray[Any, np.dtype[Any]]
Bits = np.ndarray[Any, np.dtype[np.uint32]]

INDEX = "variables/variables.index"
OBJECTS = "_CHECKPOINTABLE_OBJECT_GRAPH"  # the entry that holds the tree of objects

MAX_OBJECTS_BYTES = 64 << 20  # the tree of objects: a few MB for an ImageNet-size net
MAX_INDEX_BYTES = 64 << 20  # about 100 bytes for each variable
MAX_KEY_BYTES = 64 << 20  # all names together: the index stores only how a name differs from the one before
MAX_RECORDS = 1_000_000  # whatever is walked one by one: fields, objects, variables


@contextlib.contextmanager
def reading(what: str, path: Path) -> Iterator[None]:
    """Bytes that do not mean what they should leave as one line."""
    try:
        yield
    except (ValueError, IndexError, struct.error, DecodeError) as error:
        raise LoadError(f"{path}: {what} is damaged or truncated; copy or save the folder again") from error
    except OSError as error:
        raise LoadError(f"{path}: cannot read {what} ({error.strerror}); check its permissions") from error


def refuse_size(size: int, limit: int, what: str, path: Path) -> None:
    if size > limit:
        raise LoadError(f"{path}: {what} is {size >> 20} MiB long, the limit is {limit >> 20}; refusing it")


def refuse_tree(nodes: Sequence[Any], what: str, path: Path) -> None:
    """Raise LoadError for a tree of objects that is too large or points to what is not there."""
    if len(nodes) > MAX_RECORDS:
        raise LoadError(f"{path}: {what} holds more than {MAX_RECORDS} objects; refusing to read them")
    if any(not 0 <= child.node_id < len(nodes) for node in nodes for child in node.children):
        raise LoadError(f"{path}: {what} is damaged (it points to an object that is not there); save the model again")


def varint(data: bytes | mmap.mmap, at: int) -> tuple[int, int]:
    """A variable-length number at ``at`` and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number that does not end")


@dataclass
class Checkpoint:
    """``variables/``: entries by name, values on demand."""

    path: Path
    entries: dict[str, BundleEntryProto] = field(default_factory=dict)
    shards: int = 0

    def __post_init__(self) -> None:
        index = self.path / INDEX
        with reading(INDEX, self.path):
            refuse_size(index.stat().st_size, MAX_INDEX_BYTES, INDEX, self.path)
            for key, value in _table(index.read_bytes()):
                if key.startswith(b"\0"):
                    continue  # a slice; the entry of the whole says that it has some
                if key:
                    self.entries[key.decode()] = BundleEntryProto.FromString(value)
                else:
                    header = BundleHeaderProto.FromString(value)
                    if header.endianness != BundleHeaderProto.LITTLE:
                        raise LoadError(f"{self.path}: {INDEX} was written on a big-endian machine; save it on another")
                    self.shards = header.num_shards

    def _entry(self, key: str, label: str) -> BundleEntryProto:
        entry = self.entries.get(key)
        if entry is None:
            raise LoadError(f"{self.path}: {label} is missing in the checkpoint; copy or save the folder again")
        if entry.slices or entry.shape.unknown_rank or any(dim.size < 0 for dim in entry.shape.dim):
            raise LoadError(f"{self.path}: {label} is not stored in one piece; save the model again")
        return entry

    def _bytes(self, entry: BundleEntryProto, label: str) -> bytes:
        """The stored bytes, as many as the shard really has."""
        shard = f"{INDEX.removesuffix('index')}data-{entry.shard_id:05d}-of-{self.shards:05d}"
        if not (self.path / shard).is_file():
            raise LoadError(f"{self.path}: {shard} with {label} is missing; copy or save the folder again")
        with reading(label, self.path):
            size = (self.path / shard).stat().st_size
            if not (0 <= entry.offset <= size and 0 <= entry.size <= size - entry.offset):
                raise ValueError("lies behind the end of the shard")
            with open(self.path / shard, "rb") as stream:
                stream.seek(entry.offset)
                return stream.read(entry.size)

    def shape(self, key: str, label: str) -> tuple[int, ...]:
        return tuple(dim.size for dim in self._entry(key, label).shape.dim)

    def array(self, key: str, label: str) -> Array:
        """The values of a variable, once they are as many as declared and their checksum holds."""
        entry, shape = self._entry(key, label), self.shape(key, label)
        with reading(label, self.path):
            kind = _numeric(entry.dtype)
            data = self._bytes(entry, label)
            if entry.crc32c != _masked(crc32c(data)):
                raise ValueError("checksum")
            return np.frombuffer(data, dtype=kind).reshape(shape)  # ValueError for more or fewer values than declared

    def text(self, key: str) -> bytes:
        """A single string: its length, a checksum of the length as 4 or 8 bytes, and the bytes."""
        entry = self._entry(key, "the tree of objects")
        if self.shape(key, "") or entry.dtype != tf.string.as_datatype_enum:
            raise ValueError("no string")
        refuse_size(entry.size, MAX_OBJECTS_BYTES, "the checkpoint's tree of objects", self.path)
        data = self._bytes(entry, "the tree of objects")
        size, at = varint(data, 0)
        length, text = struct.pack("<I" if size < 1 << 32 else "<Q", size), data[at + 4 :]
        if entry.crc32c != _masked(crc32c(length + data[at:])):
            raise ValueError("checksum")
        return text

    def objects(self) -> Sequence[Any]:
        """The tree of objects: each with its children by attribute, and the names of its values."""
        with reading("the checkpoint's tree of objects", self.path):
            nodes: Sequence[Any] = TrackableObjectGraph.FromString(self.text(OBJECTS)).nodes
            if not nodes:
                raise ValueError("no objects")
        refuse_tree(nodes, "the checkpoint", self.path)
        return nodes


def _numeric(number: int) -> np.dtype[Any]:
    """The numpy type of a TensorFlow type's number; ValueError for strings, resources and unknown ones."""
    try:
        kind = tf.dtypes.as_dtype(number)
    except TypeError as error:
        raise ValueError("an unknown type") from error
    if not (kind.is_floating or kind.is_integer or kind.is_bool) or kind.is_quantized:
        raise ValueError("no real numbers")
    numpy: np.dtype[Any] = np.dtype(kind.as_numpy_dtype)
    return numpy


_FOOTER_BYTES, _TRAILER_BYTES = 48, 5
_MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a LevelDB table: data blocks, found through an index block, found through the footer."""
    footer = data[-_FOOTER_BYTES:]
    if len(footer) < _FOOTER_BYTES or not footer.endswith(_MAGIC):
        raise ValueError("no table")
    _, at = varint(footer, 0)  # the first handle leads to filters, which are not needed
    _, at = varint(footer, at)
    records = keys = blocks = 0
    for _, handle in _block(data, footer, at):
        blocks += varint(handle, varint(handle, 0)[1])[0]
        if blocks > len(data):
            raise ValueError("blocks that overlap")
        for key, value in _block(data, handle, 0):
            records, keys = records + 1, keys + len(key)
            if records > MAX_RECORDS or keys > MAX_KEY_BYTES:
                raise ValueError("too many names")
            yield key, value


def _block(data: bytes, handle: bytes, at: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of the block that a handle (place, size) at ``at`` leads to.

    An entry is how much of the key before it is kept, the lengths of what is new of the key and of the value,
    and both. A list of places to search from ends the block.
    """
    start, at = varint(handle, at)
    size, _ = varint(handle, at)
    block, trailer = data[start : start + size], data[start + size : start + size + _TRAILER_BYTES]
    kind, checksum = struct.unpack("<BI", trailer)
    if kind != 0 or checksum != _masked(crc32c(block + trailer[:1])):
        raise ValueError("a block that is compressed or damaged")
    stop = len(block) - 4 * (struct.unpack("<I", block[-4:])[0] + 1)
    place, key = 0, b""
    while place < stop:
        shared, place = varint(block, place)
        fresh, place = varint(block, place)
        length, place = varint(block, place)
        key = key[:shared] + block[place : place + fresh]
        place += fresh
        yield key, block[place : place + length]
        place += length


# CRC-32C. Its state is linear over bits, so many pieces are advanced at once and joined afterwards: with A the
# effect of a zero byte on the state, the state after the bytes x y is A^len(y) state(x) ^ state(y).

_PIECE_BYTES = 1 << 24
_BITS = np.arange(32, dtype=np.uint32)


def _apply(operator: Bits, states: Bits) -> Bits:
    """A linear map of states, given by the images of the 32 single bits."""
    chosen = np.where((states[:, None] >> _BITS) & np.uint32(1), operator, np.uint32(0))
    joined: Bits = np.bitwise_xor.reduce(chosen, axis=1)
    return joined


@functools.cache
def _byte_table() -> Bits:
    """The state after one byte, from a state of zero."""
    table: Bits = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> np.uint32(1)) ^ np.where(table & np.uint32(1), np.uint32(0x82F63B78), np.uint32(0))
    return table


@functools.cache
def _zeros(power: int) -> Bits:
    """The effect of 2^power zero bytes."""
    if power:
        half = _zeros(power - 1)
        return _apply(half, half)
    units = np.uint32(1) << _BITS
    after: Bits = _byte_table()[units & np.uint32(255)] ^ (units >> np.uint32(8))
    return after


def crc32c(data: bytes) -> int:
    """The Castagnoli checksum of bytes."""
    state = np.array([0xFFFFFFFF], dtype=np.uint32)
    for start in range(0, len(data), _PIECE_BYTES):
        piece = np.frombuffer(data, dtype=np.uint8, count=min(_PIECE_BYTES, len(data) - start), offset=start)
        for power in range(piece.size.bit_length()):
            if piece.size >> power & 1:
                state = _apply(_zeros(power), state)
        bits = (piece.size - 1).bit_length()
        steps = bits // 2
        padded = np.zeros(1 << bits, dtype=np.uint8)  # zeros in front leave a state of zero as it is
        padded[padded.size - piece.size :] = piece
        columns = np.ascontiguousarray(padded.reshape(-1, 1 << steps).T)
        lanes = np.zeros(columns.shape[1], dtype=np.uint32)
        for column in columns:
            lanes = _byte_table()[(lanes ^ column) & np.uint32(255)] ^ (lanes >> np.uint32(8))
        for power in range(steps, bits):
            lanes = _apply(_zeros(power), lanes[0::2]) ^ lanes[1::2]
        state = state ^ lanes
    return int(state[0]) ^ 0xFFFFFFFF


def _masked(checksum: int) -> int:
    """How TensorFlow stores a checksum: rotated and shifted, since a checksum of checksums is no good one."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
