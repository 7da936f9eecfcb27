"""Samples: what goes through a model when it is compared or timed.

Either the user's own (`open_samples`: arrays, folders of them or of images, a Keras data set, a Python function;
`hold_samples`: arrays in memory) or made up (`synthesize`, `other_sizes`). Both fit the signature exactly when they
leave here: names, shapes, dtypes, one number of samples, no NaN; what had to be done to them is written into
``source``. Pickles are never read.

    samples    what everybody holds: `Samples` in memory, `Stream` read batch by batch
    fit        what an input takes against what there is: headers at once, values when they are read
    sources    a reader for each kind of place; pixels
    listing    a CSV of path,label
    reading    from a place to a stream, whatever it is for
    program    module:function
    rows       where the numbers lie until they are needed; temporary files
    synthetic  made up ones, and their edge cases
    targets    what labels mean: classes, several labels at once, numbers
    labelled   samples with targets, to train on (`open_labelled`)

Memory: of a `Stream` one batch is in memory, of any source but two. What a Keras data set or a function returns whole
is in memory already. Labels are held for all samples: one number each.

numpy only; pillow and Keras are imported where they are needed.
"""

from __future__ import annotations

import numpy as np

from deploykit.data.labelled import Labelled, open_labelled
from deploykit.data.program import part_of
from deploykit.data.reading import Reader, in_words, opened, reader_of, refuse_unheeded
from deploykit.data.samples import Samples, Stream
from deploykit.data.sources import KERAS_SETS, Request, Source
from deploykit.data.synthetic import EDGES, FREE_SEQUENCE, FREE_SPATIAL, batch_of, other_sizes, synthesize
from deploykit.errors import DataError
from deploykit.signature import Signature

__all__ = [
    "EDGES",
    "FREE_SEQUENCE",
    "FREE_SPATIAL",
    "KERAS_SETS",
    "Labelled",
    "Samples",
    "Stream",
    "hold_samples",
    "open_labelled",
    "open_samples",
    "other_sizes",
    "read_samples",
    "refuse_unheeded",
    "synthesize",
]


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
    pixels; without it the model's own range decides (`deploykit.data.sources.pixel_law`). Where there are no pixels it
    is refused, and so is ``image_size`` where no image is resized. A last axis of size 1 too many or too few is mended;
    a fixed batch size drops the rest.

    Raises DataError with what was expected and what was found, MissingComponentError without pillow: here for all that
    headers tell, from ``batches`` and ``head`` for values.
    """
    return _stream(reader_of(where), Request(where, signature, limit, seed, image_size, scale))


def hold_samples(given: object, signature: Signature, where: str, *, limit: int | None = None, seed: int = 0) -> Stream:
    """Samples that the caller holds, by the rules of `open_samples`: an array, a dict of arrays by input name, (x, y).

    ``where`` says what they are. Raises DataError as `open_samples` does.
    """
    request = Request(where, signature, limit, seed, None, None)
    return _stream(lambda request: Source([part_of(given, request, where)]), request)


def _stream(read: Reader, request: Request) -> Stream:
    signature, found = request.signature, opened(read, request)
    numbers = request.chosen(found.count)
    labels = [np.concatenate(part.labels) for part in found.parts if part.labels is not None]
    drawn = f"{len(numbers):,} of {found.count:,} samples" if len(numbers) < found.count else ""
    words = in_words(request.where, [*found.notes, drawn])
    batch = batch_of(signature)
    if len(numbers) < batch:
        raise DataError(f"{words} has {len(numbers)} samples, the model's batch size is fixed to {batch}; give more")
    numbers = numbers[: len(numbers) - len(numbers) % batch]
    return found.stream(numbers, words, np.concatenate(labels)[numbers] if labels else None)


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
