"""Reading: from a place to a `Stream`, the same way for every use of samples.

`reader_of` finds the reader for a place; `opened` asks it for its parts and looks at every header. From `Opened` come
the samples of any numbers, wherever they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from deploykit.data.fit import Fitted, fitted
from deploykit.data.program import is_program, read_program
from deploykit.data.rows import Rows
from deploykit.data.samples import Array, Numbers, Stream
from deploykit.data.sources import KERAS_SETS, Part, Request, Source, read_folder, read_keras, read_npy, read_npz
from deploykit.errors import DataError
from deploykit.signature import Signature

Reader = Callable[[Request], Source]
Columns = Mapping[str, Fitted]

_FILES: dict[bytes, Reader] = {  # by the first bytes
    b"\x93NUMPY": read_npy,
    b"PK\x03\x04": read_npz,
    b"PK\x05\x06": read_npz,
}


def reader_of(where: str) -> Reader:
    path = Path(where)
    try:
        if path.is_dir():
            return read_folder
        if path.is_file():
            with open(path, "rb") as stream:
                magic = stream.read(6)
            for start, reader in _FILES.items():
                if magic.startswith(start):
                    return reader
            raise DataError(
                f"{where} is neither an .npy nor an .npz file; save the samples with numpy.save or numpy.savez"
            )
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {where!r} ({error}); check the path and its permissions") from error
    if where in KERAS_SETS:
        return read_keras
    if is_program(where):
        return read_program
    raise DataError(
        f"there is no file, folder or Keras data set {where!r}; data sets: {', '.join(KERAS_SETS)}; "
        "a Python function is module:function"
    )


@dataclass(frozen=True, eq=False)
class Opened:
    """A source of which the headers fit: its parts, and what the model takes of each."""

    source: Source = field(repr=False)
    parts: Sequence[Part] = field(repr=False)
    columns: Sequence[Columns] = field(repr=False)

    @property
    def count(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def notes(self) -> list[str]:
        """What happened to the samples, and to their labels, on their way."""
        return [*self.source.done, *(note for part in self.parts for note in part.notes)]

    def stream(self, numbers: Numbers, source: str, labels: Array | None = None) -> Stream:
        starts = np.cumsum([0, *(part.count for part in self.parts[:-1])])
        return Stream(numbers, partial(_fetch, self.columns, starts), source, labels)


def opened(read: Reader, request: Request) -> Opened:
    """What ``read`` finds. Raises DataError for all that headers tell."""
    source = read(request)
    refuse_unheeded(request.where, source.heeds, image_size=request.image_size, scale=request.scale)
    found = _fitting_parts(source, request.signature)
    return Opened(source, [part for part, _ in found], [columns for _, columns in found])


_PIXEL_OPTIONS = {  # what each is for
    "image_size": "folders of images",
    "scale": "pixels (folders of images, Keras data sets of images)",
}


def refuse_unheeded(source: str, heeds: Collection[str], **given: object) -> None:
    """Raise DataError for an option about pixels that a source of samples does not heed."""
    for name, value in given.items():
        if value is not None and name not in heeds:
            option = name.replace("_", "-")
            raise DataError(f"--{option} is for {_PIXEL_OPTIONS[name]} and changes nothing in {source}; leave it out")


def in_words(where: str, notes: Sequence[str]) -> str:
    """A source and what was done to it, for a report; empty notes and repeated ones do not count."""
    done = ", ".join(dict.fromkeys(filter(None, notes)))
    return f"{where} ({done})" if done else where


def _fitting_parts(source: Source, signature: Signature) -> list[tuple[Part, Columns]]:
    """Each part with its rows as the model takes them. A program makes the next part between two rounds of the loop."""
    parts: list[tuple[Part, Columns]] = []
    first = 0
    for part in source.parts:
        first += parts[-1][0].count if parts else 0  # now: the last part grew until this one came
        columns = {spec.name: fitted(part.rows[spec.name], spec, part.where, first) for spec in signature.inputs}
        if parts:
            _same_kind(part, columns, *parts[0])
        parts.append((part, columns))
    return parts


def _same_kind(part: Part, columns: Columns, other: Part, others: Columns) -> None:
    for name, column in columns.items():
        if column.sizes != others[name].sizes:
            raise DataError(
                f"{part.where}: the samples of input {name} are {list(column.sizes)}, those in {other.where} "
                f"{list(others[name].sizes)}; give all of one size"
            )
    if (part.labels is None) != (other.labels is None):
        if part.y is not None and other.y is not None:
            raise other_kind(part.where, part.y, other.where, other.y)
        raise DataError(f"only one of {other.where} and {part.where} has labels (y); give all of them labels, or none")


def other_kind(where: str, y: Rows | Array, first: str, other: Rows | Array) -> DataError:
    """Labels of two parts that are not of one width, or text beside numbers."""
    return DataError(
        f"{where}: y is {list(y.shape)} {y.dtype}, that of {first} {list(other.shape)} {other.dtype}; "
        "give all of one kind"
    )


def _fetch(parts: Sequence[Columns], starts: Numbers, numbers: Numbers) -> dict[str, Array]:
    """The samples of these numbers, ascending, from the parts they lie in."""
    found = np.searchsorted(starts, numbers, side="right") - 1
    pieces = [(parts[part], numbers[found == part] - starts[part]) for part in np.unique(found)]
    arrays = {name: [columns[name].take(rows) for columns, rows in pieces] for name in parts[0]}
    return {name: taken[0] if len(taken) == 1 else np.concatenate(taken) for name, taken in arrays.items()}
