"""Samples: what goes through a model when it is compared or timed.

Either the user's own (`open_samples`: arrays, folders of them or of images, a Keras data set, a Python function;
`hold_samples`: arrays in memory) or made up (`synthesize`, `other_sizes`). Both fit the signature exactly when they
leave here: names, shapes, dtypes, one number of samples, no NaN; what had to be done to them is written into
``source``. Pickles are never read.

    samples    what everybody holds: `Samples` in memory, `Stream` read batch by batch
    fit        what an input takes against what there is: headers at once, values when they are read
    sources    a reader for each kind of place; pixels
    program    module:function
    rows       where the numbers lie until they are needed; temporary files
    synthetic  made up ones, and their edge cases

Memory: of a `Stream` one batch is in memory, of any source but two. What a Keras data set or a function returns whole
is in memory already. Labels are held for all samples: one number each.

numpy only; pillow and Keras are imported where they are needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from deploykit.data.fit import Fitted, fitted
from deploykit.data.program import is_program, part_of, read_program
from deploykit.data.samples import Array, Numbers, Samples, Stream
from deploykit.data.sources import KERAS_SETS, Part, Request, Source, read_folder, read_keras, read_npy, read_npz
from deploykit.data.synthetic import EDGES, FREE_SEQUENCE, FREE_SPATIAL, batch_of, other_sizes, synthesize
from deploykit.errors import DataError
from deploykit.signature import Signature

__all__ = [
    "EDGES",
    "FREE_SEQUENCE",
    "FREE_SPATIAL",
    "KERAS_SETS",
    "Samples",
    "Stream",
    "hold_samples",
    "open_samples",
    "other_sizes",
    "read_samples",
    "synthesize",
]

_FILES: dict[bytes, Callable[[Request], Source]] = {  # by the first bytes
    b"\x93NUMPY": read_npy,
    b"PK\x03\x04": read_npz,
    b"PK\x05\x06": read_npz,
}


def open_samples(
    where: str,
    signature: Signature,
    *,
    limit: int | None = None,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
    scale: float | None = None,
) -> Stream:
    """Samples that fit ``signature``, read as they are used, from one of:

    - ``.npy``: the samples of a model with one input;
    - ``.npz``: arrays by input name, or ``x`` for a model with one input; ``y``, if it is there, labels;
    - a folder of ``.npz`` files, one after another in the order of their names;
    - a folder of images (png, jpg, bmp, gif; first frame), or of one folder for each class, whose order by name
      gives the labels; resized (bilinear) to the model's input, or to ``image_size`` (height, width) where
      that is open;
    - the name of a Keras data set, its test half (see ``KERAS_SETS``);
    - ``module:function`` or ``file.py:function``: Python code of the user's that makes them (`deploykit.data.program`).

    ``limit`` draws that many by ``seed`` (of batches that a function makes: takes the first). ``scale`` multiplies
    pixels; without it the model's own range decides (`deploykit.data.sources.pixel_law`). A last axis of size 1 too
    many or too few is mended; a fixed batch size drops the rest.

    Raises DataError with what was expected and what was found, MissingComponentError without pillow: here for all that
    headers tell, from ``batches`` and ``head`` for values.
    """
    if scale is not None and (not math.isfinite(scale) or scale == 0):
        raise DataError(f"a pixel scale of {scale} makes no sense; 1 keeps 0..255 and 0.00392157 gives 0..1")
    request = Request(where, signature, limit, seed, image_size, scale)
    return _stream(_reader(where)(request), request)


def hold_samples(given: object, signature: Signature, where: str, *, limit: int | None = None, seed: int = 0) -> Stream:
    """Samples that the caller holds, by the rules of `open_samples`: an array, a dict of arrays by input name, (x, y).

    ``where`` says what they are. Raises DataError as `open_samples` does.
    """
    request = Request(where, signature, limit, seed, None, None)
    return _stream(Source([part_of(given, request, where)]), request)


def _stream(source: Source, request: Request) -> Stream:
    where, signature = request.where, request.signature
    parts = _fitting_parts(source, signature)
    counts = [part.count for part, _ in parts]
    numbers = request.chosen(sum(counts))
    labels = [np.concatenate(part.labels) for part, _ in parts if part.labels is not None]
    notes = [
        *source.done,
        *(note for part, _ in parts for note in part.notes),
        f"{len(numbers):,} of {sum(counts):,} samples" if len(numbers) < sum(counts) else "",
    ]
    done = ", ".join(dict.fromkeys(filter(None, notes)))
    words = f"{where} ({done})" if done else where
    batch = batch_of(signature)
    if len(numbers) < batch:
        raise DataError(f"{words} has {len(numbers)} samples, the model's batch size is fixed to {batch}; give more")
    numbers = numbers[: len(numbers) - len(numbers) % batch]
    fetch = partial(_fetch, [columns for _, columns in parts], np.cumsum([0, *counts[:-1]]))
    return Stream(numbers, fetch, words, np.concatenate(labels)[numbers] if labels else None)


def read_samples(
    where: str,
    signature: Signature,
    *,
    limit: int | None = None,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
    scale: float | None = None,
) -> Samples:
    """The samples of `open_samples`, all in memory and all checked."""
    stream = open_samples(where, signature, limit=limit, seed=seed, image_size=image_size, scale=scale)
    return stream.head(stream.count)


def _reader(where: str) -> Callable[[Request], Source]:
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


Columns = Mapping[str, Fitted]


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
        raise DataError(f"only one of {other.where} and {part.where} has labels (y); give all of them labels, or none")


def _fetch(parts: Sequence[Columns], starts: Numbers, numbers: Numbers) -> dict[str, Array]:
    """The samples of these numbers, ascending, from the parts they lie in."""
    found = np.searchsorted(starts, numbers, side="right") - 1
    pieces = [(parts[part], numbers[found == part] - starts[part]) for part in np.unique(found)]
    arrays = {name: [columns[name].take(rows) for columns, rows in pieces] for name in parts[0]}
    return {name: taken[0] if len(taken) == 1 else np.concatenate(taken) for name, taken in arrays.items()}
