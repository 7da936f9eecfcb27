"""Samples in memory and samples that are read as they are used: two classes with the same face.

    count, source, labels       how many, what they are (for a report), one label for each or None
    head(n) -> Samples          the first n, in memory
    take(numbers) -> Samples    those, in memory
    batches(size)               arrays by input name, ``size`` samples at a time; may be asked for again and again

and of a `Stream` only: part(numbers) -> Stream, those, still to be read.

`Stream` holds no sample: each batch is fetched, cast and checked when it is its turn, so memory depends on
the size of a batch and not on ``count``. What a check of a batch finds is a DataError then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import DataError

Array = NDArray[Any]
Numbers = NDArray[np.intp]


def _slices(count: int, size: int) -> Iterator[slice]:
    if size < 1:
        raise DataError(f"a batch of {size} samples makes no sense; give at least 1")
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


@dataclass(frozen=True)
class Samples:
    """Arrays by input name, all with the same number of rows; ``source`` says for a report what they are.

    ``labels``: one row for each sample, or None.
    """

    arrays: Mapping[str, Array]
    source: str
    labels: Array | None = None

    def __post_init__(self) -> None:
        counts = {name: len(array) for name, array in self.arrays.items()}
        if self.labels is not None:
            counts["labels"] = len(self.labels)
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise DataError(f"{self.source}: the numbers of samples differ ({found}); give every input as many")
        if not self.arrays or not self.count:
            raise DataError(f"{self.source} holds no samples; give at least one")

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(next(iter(self.arrays.values())))

    def head(self, n: int) -> Samples:
        """The first ``n`` samples (all, when there are fewer)."""
        labels = None if self.labels is None else self.labels[:n]
        return Samples({name: array[:n] for name, array in self.arrays.items()}, self.source, labels)

    def take(self, numbers: Sequence[int] | Numbers) -> Samples:
        """The samples of these numbers, counted from 0, in this order."""
        wanted = np.asarray(numbers, np.intp)
        labels = None if self.labels is None else self.labels[wanted]
        return Samples({name: array[wanted] for name, array in self.arrays.items()}, self.source, labels)

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """Arrays by name, ``size`` samples at a time; the last batch may be smaller."""
        for rows in _slices(self.count, size):
            yield {name: array[rows] for name, array in self.arrays.items()}


@dataclass(frozen=True, eq=False)
class Stream:
    """Samples that are read as they are used; made by `deploykit.data.open_samples`.

    ``numbers`` are those of the samples within their source; ``fetch`` takes some of them, ascending, and gives their
    arrays as the model takes them. Temporary files go with the last reference: there is nothing to close.
    """

    numbers: Numbers = field(repr=False)
    fetch: Callable[[Numbers], dict[str, Array]] = field(repr=False)
    source: str
    labels: Array | None = None

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.numbers)

    def head(self, n: int) -> Samples:
        """The first ``n`` samples (all, when there are fewer), in memory. Raises DataError as `batches` does."""
        labels = None if self.labels is None else self.labels[:n]
        return Samples(self._read(self.numbers[:n]), self.source, labels)

    def take(self, numbers: Sequence[int] | Numbers) -> Samples:
        """The samples of these numbers, counted from 0, in this order, in memory. Raises DataError as `batches`."""
        part = self.part(numbers)
        return part.head(part.count)

    def part(self, numbers: Sequence[int] | Numbers) -> Stream:
        """The samples of these numbers, counted from 0, in this order; none of them is read."""
        wanted = np.asarray(numbers, np.intp)
        labels = None if self.labels is None else self.labels[wanted]
        return Stream(self.numbers[wanted], self.fetch, self.source, labels)

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """Arrays by name, ``size`` samples at a time; the last batch may be smaller.

        Raises DataError, in front of the batch it is about, for samples that do not fit and files that are damaged.
        """
        for rows in _slices(self.count, size):
            yield self._read(self.numbers[rows])

    def _read(self, numbers: Numbers) -> dict[str, Array]:
        """In any order, any of them twice."""
        if (np.diff(numbers) > 0).all():
            return self.fetch(numbers)
        ascending, order = np.unique(numbers, return_inverse=True)
        return {name: array[order] for name, array in self.fetch(ascending).items()}
