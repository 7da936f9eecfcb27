"""Making samples fit: what an input takes against what there is, from headers alone and then batch by batch.

A shape, a rank or a kind of dtype that does not fit is refused before any number is read (`fitted`). Values are
looked at when they are fetched (`Fitted.take`): NaN and Inf, fractions and numbers outside the range for integers,
overflow in the cast. A last axis of size 1 too many or too few is mended.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from deploykit.data.rows import Rows
from deploykit.data.samples import Array, Numbers
from deploykit.errors import DataError
from deploykit.signature import TensorSpec


def expected(spec: TensorSpec) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in spec.shape)}] {spec.dtype}"


@dataclass(frozen=True, eq=False)
class Fitted:
    """Rows as one input takes them; ``sizes`` of one sample, ``first`` the number of row 0 among all samples."""

    rows: Rows = field(repr=False)
    spec: TensorSpec
    sizes: tuple[int, ...]
    problem: str
    first: int

    def take(self, rows: Numbers) -> Array:
        """Cast and checked. Raises DataError with the first sample at fault."""
        array = self.rows.take(rows).reshape(len(rows), *self.sizes)
        return _cast(array, self, rows)

    def sample(self, row: int) -> str:
        there = f" (row {row} there)" if self.first else ""
        return f"sample {row + self.first}{there}"


def fitted(rows: Rows, spec: TensorSpec, where: str, first: int = 0) -> Fitted:
    """``rows`` for the input ``spec``; the header decides. Raises DataError."""
    shape, want = rows.shape, spec.shape
    problem = f"{where}: input {spec.name} takes {expected(spec)}, found [{', '.join(map(str, shape))}] {rows.dtype}"
    sizes = shape[1:]
    if len(shape) == len(want) - 1 and want[-1] in (1, None):
        sizes = (*sizes, 1)
    elif len(shape) == len(want) + 1 and shape[-1] == 1:
        sizes = sizes[:-1]
    if len(sizes) != len(want) - 1 or any(w not in (None, h) for w, h in zip(want[1:], sizes, strict=True)):
        batch = "; the first axis counts samples" if len(shape) == len(want) - 1 else ""
        raise DataError(f"{problem}{batch}; reshape the samples")
    if 0 in shape:
        raise DataError(f"{problem}; give at least one sample")
    if spec.dtype == "string" and rows.dtype.kind not in "US":
        raise DataError(f"{problem}; give strings")
    if spec.dtype != "string" and rows.dtype.kind not in "biuf":
        raise DataError(f"{problem}; give numbers")
    return Fitted(rows, spec, sizes, problem, first)


def _first(bad: Array) -> int:
    return int(np.argmax(bad.reshape(len(bad), -1).any(axis=1)))


def _cast(array: Array, fit: Fitted, rows: Numbers) -> Array:
    spec, problem = fit.spec, fit.problem
    if spec.dtype == "string":
        return array
    if array.dtype.kind == "f" and not (finite := np.isfinite(array)).all():
        raise DataError(
            f"{problem} with NaN or Inf, first in {fit.sample(int(rows[_first(~finite)]))}; clean the samples"
        )
    if spec.dtype == "bfloat16":  # numpy has none; frameworks cast float32 themselves
        return array.astype(np.float32)
    dtype = np.dtype(spec.dtype)
    if dtype.kind in "iub":
        low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        if spec.low == 0 and spec.high is not None and spec.high == int(spec.high):  # a vocabulary, no estimate
            low, high = 0, min(high, int(spec.high))
        if array.dtype.kind == "f" and (bad := array != np.rint(array)).any():
            raise DataError(f"{problem}, not whole first in {fit.sample(int(rows[_first(bad)]))}; give whole numbers")
        if array.min() < low or array.max() > high:
            at = _first((array < low) | (array > high))
            least, most = array[at].min(), array[at].max()
            raise DataError(
                f"{problem} with values {least:g}..{most:g}, first in {fit.sample(int(rows[at]))}; "
                f"the input takes {low}..{high}"
            )
        return array.astype(dtype)
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if not (finite := np.isfinite(cast)).all():
        at = _first(~finite)
        raise DataError(
            f"{problem} with values up to {np.abs(array[at]).max():.3g}, too large for {spec.dtype}, "
            f"first in {fit.sample(int(rows[at]))}; scale them"
        )
    return cast
