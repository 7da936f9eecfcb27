"""Labelled data: samples with targets, to train on and to test with.

`open_labelled` reads a place as `deploykit.data.open_samples` does, one batch at a time, and its labels as
`deploykit.data.targets` understands them, all at once: targets are in memory, inputs never are. What cannot be trained
on is refused before anything runs: one class only, a class without samples, labels that are missing, NaN or out of
range, images that cannot be read (each one is decoded once for that). NaN among the inputs is found when its batch is
read, which `digest` does for all of them.

*Which samples*: first the classes (``only``), then ``limit`` of these, drawn by seed, then those that can be read.

*A split* takes from each class of n samples the part v of them for validation: v·n, rounded, but at least one and at
most n - 1. So each class keeps its share to within one sample, both halves have every class, and how one class is
split depends on the seed and on that class only.

*Weights* of classes are n / (k · n_c) for class c of k with n_c of all n samples: every class weighs the same in
total, and the mean weight of a sample is 1. This is the rule "balanced" of scikit-learn's compute_class_weight, after
King and Zeng, "Logistic Regression in Rare Events Data", Political Analysis 9 (2001).

A batch size that the model fixes is no concern here: no sample is dropped for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from deploykit.data.listing import is_listing, read_listing
from deploykit.data.program import read_program
from deploykit.data.reading import Opened, Reader, in_words, opened, other_kind, reader_of
from deploykit.data.samples import Array, Numbers, Stream
from deploykit.data.sources import Half, Part, Request, listed
from deploykit.data.targets import Targets, Task, aligned, kept, understood
from deploykit.errors import DataError
from deploykit.signature import Signature

UNEVEN = 3.0  # how many times as many samples the largest class may have as the smallest before it is said
_DIGEST_BATCH = 32  # samples; the digest does not depend on it

_PLACES = "images in one folder for each class, an .npz with y, a CSV of path,label or a Keras data set"


@dataclass(frozen=True, eq=False)
class Labelled:
    """Samples and their targets; ``notices``: what was left out, and what is uneven.

    ``targets``: (n,) int64 class numbers; (n, k) float32 of 0 and 1 (multi-label) or of numbers (regression).
    ``classes``: names by class number, or of the columns (multi-label); () for regression.
    """

    samples: Stream = field(repr=False)
    targets: Array = field(repr=False)
    classes: tuple[str, ...]
    task: Task
    source: str
    notices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.targets) != self.samples.count:
            raise DataError(
                f"{self.source}: {self.samples.count:,} samples and {len(self.targets):,} labels; give as many of both"
            )

    @property
    def count(self) -> int:
        """Number of samples."""
        return self.samples.count

    def take(self, numbers: Sequence[int] | Numbers) -> Labelled:
        """The samples of these numbers, counted from 0, in this order; none of them is read."""
        wanted = np.asarray(numbers, np.intp)
        return replace(self, samples=self.samples.part(wanted), targets=self.targets[wanted])


def open_labelled(
    where: str,
    signature: Signature,
    *,
    task: Task | Literal["auto"] = "auto",
    only: Sequence[str] = (),
    half: Half = "train",
    limit: int | None = None,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
    scale: float | None = None,
    skip_bad: bool = False,
    classes: Sequence[str] = (),
) -> Labelled:
    """Samples that fit ``signature`` and their targets, from one of:

    - a folder with one folder of images for each class, which gives it its name;
    - ``.npz`` (or a folder of them): arrays by input name, or ``x``; ``y``; and, if you like, ``classes``, the names
      of the classes by number, or of the columns of ``y``;
    - ``.csv``: an image's path and its label in each row (`deploykit.data.listing`);
    - the name of a Keras data set (``KERAS_SETS``), its ``half``.

    ``only`` keeps those classes, by name or number, in that order, renumbered from 0. ``classes`` are those of a
    training set: the samples are numbered by them, by name, and may lack some of them; without it there must be two
    classes at least and a sample of each. A test set is best read with the ``task`` of its training set.
    ``skip_bad`` leaves out images that cannot be read. ``limit``, ``seed``, ``image_size`` and ``scale`` are those of
    `deploykit.data.open_samples`.

    Raises DataError, in one line, for whatever cannot be trained on; MissingComponentError without pillow.
    """
    request = Request(where, signature, limit, seed, image_size, scale, half)
    found = opened(_reader(where), replace(request, limit=None))  # the limit is for the classes that are kept
    told = understood(*_labels(found, where), task, where)
    numbers = np.arange(found.count)
    notices = [*found.source.notices, *told.notices]
    if hidden := [name for name in told.classes if name.startswith(".")] if Path(where).is_dir() and not only else []:
        only = [name for name in told.classes if name not in hidden]
        notices.append(f"{where}: the hidden {listed(hidden)} is no class and was left out")
    if only:
        told, numbers = kept(told, only, where)
    elif not classes and told.numbered:
        _without_gaps(told, where)
    drawn = request.chosen(len(numbers))
    readable, skipped = _readable(found, numbers[drawn], where, skip_bad)
    told, numbers = told.take(drawn[readable]), numbers[drawn[readable]]
    notices += skipped
    told = aligned(told, classes, where) if classes else told
    notices += _absent(told, where) if classes else _trainable(told, where)
    notes = [
        *found.source.done,
        f"{len(numbers):,} of {found.count:,} samples" if len(numbers) < found.count else "",
        f"classes {', '.join(only)}" if only else "",
    ]
    source = in_words(where, notes)
    return Labelled(found.stream(numbers, source), told.values, told.classes, told.task, source, tuple(notices))


def _reader(where: str) -> Reader:
    if is_listing(where):
        return read_listing
    reader = reader_of(where)
    if reader is read_program:
        raise DataError(f"{where} is a Python function, and training reads its data more than once; give {_PLACES}")
    return reader


# --- labels ----------------------------------------------------------------------------------------------------------


def _labels(found: Opened, where: str) -> tuple[Array, tuple[str, ...] | None]:
    """All labels, and the names of the classes where there are some."""
    pieces: list[Array] = []
    for part in found.parts:
        if part.y is None:
            raise DataError(f"{part.where} has no labels; give {_PLACES}")
        if len(part.y.shape) > 2:
            raise DataError(f"{part.where}: y is {list(part.y.shape)}; give one row of labels for each sample")
        pieces.append(part.y.take(np.arange(part.count)))
    first = pieces[0]
    for part, piece in zip(found.parts, pieces, strict=True):
        if piece.shape[1:] != first.shape[1:] or (piece.dtype.kind in "US") != (first.dtype.kind in "US"):
            raise other_kind(part.where, piece, found.parts[0].where, first)
    named = {_names(part) for part in found.parts}
    if len(named) > 1:
        raise DataError(f"{where}: its files name different classes; give all of them the same `classes`")
    return np.concatenate(pieces), named.pop()


def _names(part: Part) -> tuple[str, ...] | None:
    if part.classes is None:
        return None
    names = part.classes()
    if names.ndim != 1 or not names.size or names.dtype.kind not in "USiu":
        raise DataError(f"{part.where}: `classes` is {list(names.shape)} {names.dtype}; give a list of names")
    return tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names)


def _readable(found: Opened, numbers: Numbers, where: str, skip_bad: bool) -> tuple[Numbers, list[str]]:
    """Places in ``numbers`` of the samples that can be read, and a notice about the others."""
    if not numbers.size:
        raise DataError(f"{where}: no samples are left; choose other classes")
    faults = found.source.faults(numbers)
    if not faults:
        return np.arange(len(numbers)), []
    said = f"{where}: {len(faults):,} of {len(numbers):,} images cannot be read ({listed(list(faults.values()))})"
    if not skip_bad:
        raise DataError(f"{said}; replace them, or leave them out with --skip-bad")
    if len(faults) == len(numbers):
        raise DataError(f"{said}; nothing is left to train on: check the path")
    return np.flatnonzero(~np.isin(numbers, list(faults))), [f"{said} and were left out"]


# --- what can be trained on ------------------------------------------------------------------------------------------


def _without_gaps(told: Targets, where: str) -> None:
    numbers = [int(name) for name in told.classes]
    if numbers[-1] >= len(numbers):
        raise DataError(
            f"{where} has samples of the class numbers {listed(told.classes, 12)} and of none between or before; "
            "number the classes 0, 1, 2, ..., or name those to keep with --only"
        )


def _trainable(told: Targets, where: str) -> list[str]:
    """Notices about uneven classes. Raises DataError for classes that nothing could be learned of."""
    if told.task != "classes":
        return _constant_labels(told, where) if told.task == "multi-label" else []
    names, counts = told.classes, told.counts
    if len(names) < 2:
        raise DataError(f"{where} has one class only ({listed(names)}); give samples of at least two")
    if len(told.values) < len(names):
        raise DataError(
            f"{where}: {len(told.values):,} samples are fewer than the {len(names):,} classes; give at least two each"
        )
    if absent := [name for name, count in zip(names, counts, strict=True) if not count]:
        raise DataError(
            f"{where} has no sample of {listed(absent)}; give some, or name the classes to keep with --only"
        )
    least, most = int(counts.argmin()), int(counts.argmax())
    if counts[most] <= UNEVEN * counts[least]:
        return []
    return [
        f"{where}: classes are uneven: {counts[most]:,} samples of {names[most]}, {counts[least]:,} of {names[least]}; "
        "--class-weight auto lets every class weigh the same"
    ]


def _constant_labels(told: Targets, where: str) -> list[str]:
    same = told.values.min(axis=0) == told.values.max(axis=0)
    names = [name for name, constant in zip(told.classes, same, strict=True) if constant]
    return [f"{where}: the same in all samples, so nothing is learned of it: {listed(names)}"] if names else []


def _absent(told: Targets, where: str) -> list[str]:
    if told.task != "classes":
        return []
    names = [name for name, count in zip(told.classes, told.counts, strict=True) if not count]
    return [f"{where} has no sample of {listed(names)}"] if names else []


# --- use -------------------------------------------------------------------------------------------------------------


def split(labelled: Labelled, validation: float = 0.2, seed: int = 0) -> tuple[Numbers, Numbers]:
    """Numbers of the samples for training and of those for validation, both ascending.

    Class by class (see above); regression and several labels at once are drawn as one class, plainly. Raises DataError
    where a class has fewer than two samples.
    """
    if not 0 < validation < 1:
        raise DataError(f"a validation part of {validation:g} makes no sense; give one between 0 and 1, like 0.2")
    if labelled.task == "classes":
        groups = {name: np.flatnonzero(labelled.targets == c) for c, name in enumerate(labelled.classes)}
    else:
        groups = {"": np.arange(labelled.count)}
    if few := [
        f"{len(members)} of {name}".removesuffix(" of ") for name, members in groups.items() if len(members) < 2
    ]:
        raise DataError(
            f"{labelled.source}: too few samples to split ({listed(few)}); training and validation need one each"
        )
    held = np.zeros(labelled.count, bool)
    for number, members in enumerate(groups.values()):
        size = min(max(int(np.floor(validation * len(members) + 0.5)), 1), len(members) - 1)
        held[np.random.default_rng([seed, number]).permutation(members)[:size]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def class_weights(targets: Array, count: int) -> NDArray[np.float64]:
    """A weight for each of ``count`` classes, n / (k · n_c) (see above). Raises DataError where one has no samples."""
    if targets.ndim != 1 or targets.dtype.kind not in "iu":
        raise DataError("class weights are for classes, and these targets have none; leave --class-weight out")
    counts = np.bincount(targets, minlength=count)
    if not counts.all():
        raise DataError(f"class {int(counts.argmin())} has no samples and so no weight; give it some")
    return len(targets) / (count * counts.astype(np.float64))


def digest(labelled: Labelled) -> str:
    """sha256, in hexadecimal, of all inputs as the model takes them and of all targets, in their order.

    Reads everything, batch by batch; so it raises DataError for samples that are damaged or hold NaN.
    """
    sums: dict[str, hashlib._Hash] = {}
    for batch in labelled.samples.batches(_DIGEST_BATCH):
        for name, array in batch.items():
            if name not in sums:
                sums[name] = hashlib.sha256(_header(name, array, labelled.count))
            sums[name].update(_bytes(array))
    whole = hashlib.sha256(_header("", labelled.targets, labelled.count) + _bytes(labelled.targets))
    for name in sorted(sums):
        whole.update(sums[name].digest())
    return whole.hexdigest()


def _header(name: str, array: Array, count: int) -> bytes:
    kind = "string" if array.dtype.kind in "US" else array.dtype.str
    return repr((name, kind, count, array.shape[1:])).encode()


def _bytes(array: Array) -> bytes:
    """Text of any width as its UTF-8, numbers as they are."""
    if array.dtype.kind not in "US":
        return np.ascontiguousarray(array).tobytes()
    return b"".join(repr(str(value)).encode() for value in array.ravel())
