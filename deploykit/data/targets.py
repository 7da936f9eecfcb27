"""Targets: what the labels of a data set mean.

    classes       one class for each sample: int64 numbers from 0 on, a name for each
    multi-label   several yes or no for each sample: (n, k) of 0 and 1 in float32, a name for each column
    regression    numbers: (n, k) in float32

`understood` reads labels as one of these; where it is not told which, the labels decide (`guessed`):

    strings, whole numbers                 classes
    (n, k) of 0 and 1, one 1 in each row   classes (one-hot)
    (n, k) of 0 and 1 otherwise            multi-label
    other floats                           regression; with names of classes beside them: classes

A one-hot y and the y of several labels that happen to exclude one another look the same, and so do regression targets
that are all whole and class numbers saved as floats: what was guessed of those is said in a notice, and ``task``
overrules it.

Class numbers without names are their own names ("0", "1", ...). `kept` and `aligned` change which classes there are:
from then on numbers are places in the new order, and names say what is what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from deploykit.data.samples import Array, Numbers
from deploykit.data.sources import listed
from deploykit.errors import DataError

Task = Literal["classes", "multi-label", "regression"]


@dataclass(frozen=True, eq=False)
class Targets:
    """``numbered``: the names are numbers that the labels were found to have, as no names were given."""

    values: Array
    classes: tuple[str, ...]
    task: Task
    notices: tuple[str, ...] = ()
    numbered: bool = False

    @property
    def counts(self) -> Numbers:
        """Samples of each class."""
        return np.bincount(self.values, minlength=len(self.classes))

    def take(self, numbers: Numbers) -> Targets:
        return replace(self, values=self.values[numbers])


def understood(y: Array, names: Sequence[str] | None, task: Task | Literal["auto"], where: str) -> Targets:
    """Labels ``y``, (n,) or (n, k), as targets; ``names`` of the classes or columns by number. Raises DataError."""
    y = np.asarray(y)
    if y.ndim not in (1, 2) or 0 in y.shape:
        raise DataError(
            f"{where}: labels of shape {list(y.shape)} are no targets; give one row of them for each sample"
        )
    if y.dtype.kind == "S":
        y = np.char.decode(y, "utf-8", "replace")
    if y.dtype.kind == "b":
        y = y.astype(np.int64)
    if y.dtype.kind not in "Uiuf":
        raise DataError(f"{where}: labels of dtype {y.dtype} are no targets; give whole numbers, names or floats")
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        bad = ~np.isfinite(y).reshape(len(y), -1).all(axis=1)
        raise DataError(
            f"{where}: {bad.sum():,} of {len(y):,} samples have NaN or Inf in their labels, the first is "
            f"{int(bad.argmax())}; give them labels or take them out"
        )
    if names is not None and (len(set(names)) < len(names) or "" in names):
        raise DataError(f"{where}: the names of the classes are {listed(names, 12)}; give each one a name of its own")
    if y.shape[1:] == (1,) and task in ("auto", "classes"):
        y = y[:, 0]
    if task != "auto":
        return replace(_READ[task](y, names, where), notices=())
    return _READ[guessed(y, names, where)](y, names, where)


def guessed(y: Array, names: Sequence[str] | None, where: str) -> Task:
    if y.ndim == 1:
        return "classes" if y.dtype.kind != "f" or names else "regression"
    if _yes_or_no(y):
        return "classes" if _one_hot(y) else "multi-label"
    if y.dtype.kind == "f":
        return "regression"
    raise DataError(
        f"{where}: labels of shape {list(y.shape)} and dtype {y.dtype} are neither class numbers nor 0 and 1; "
        "say --task regression if numbers are meant"
    )


def _yes_or_no(y: Array) -> bool:
    return y.dtype.kind != "U" and bool(np.isin(y, (0, 1)).all())


def _one_hot(y: Array) -> bool:
    return _yes_or_no(y) and bool((y.sum(axis=1) == 1).all())


# --- one reader for each task ----------------------------------------------------------------------------------------


def _classes(y: Array, names: Sequence[str] | None, where: str) -> Targets:
    if y.ndim == 2:
        if not _one_hot(y):
            raise DataError(
                f"{where}: labels of shape {list(y.shape)} are not one-hot (one 1 in each row), so no classes; give "
                "class numbers, or say --task multi-label"
            )
        named = _column_names(y, names, where)
        return Targets(y.argmax(axis=1), named, "classes", (f"{where}: y is one-hot and was read as classes",))
    return _by_name(y, names, where) if y.dtype.kind == "U" else _by_number(y, names, where)


def _by_name(y: Array, names: Sequence[str] | None, where: str) -> Targets:
    found, numbers = np.unique(y, return_inverse=True)
    if "" in found:
        missing = y == ""
        raise DataError(
            f"{where}: {missing.sum():,} of {len(y):,} samples have no label, the first is "
            f"{int(missing.argmax())}; give them labels or take them out"
        )
    own = [str(name) for name in found]
    if names is None:
        return Targets(numbers.astype(np.int64), tuple(own), "classes")
    if strange := [name for name in own if name not in names]:
        raise DataError(f"{where}: labels {listed(strange)} are not among the classes {listed(names, 12)}; mend either")
    places = np.array([list(names).index(name) for name in own])
    return Targets(places[numbers], tuple(names), "classes")


def _by_number(y: Array, names: Sequence[str] | None, where: str) -> Targets:
    _refuse(y != np.rint(y) if y.dtype.kind == "f" else np.zeros(len(y), bool), y, where, "not a whole number")
    _refuse(y < 0, y, where, "negative")
    if names is not None:
        _refuse(y >= len(names), y, where, f"beyond the {len(names)} classes that have names")
        return Targets(y.astype(np.int64), tuple(names), "classes")
    found, numbers = np.unique(y, return_inverse=True)
    return Targets(numbers.astype(np.int64), tuple(str(int(number)) for number in found), "classes", numbered=True)


def _refuse(bad: Array, y: Array, where: str, fault: str) -> None:
    if bad.any():
        first = int(bad.argmax())
        raise DataError(
            f"{where}: {bad.sum():,} of {len(y):,} labels are {fault}, the first is {y[first]} of sample {first}; "
            "class numbers are 0, 1, 2, ..."
        )


def _multi_label(y: Array, names: Sequence[str] | None, where: str) -> Targets:
    y = y.reshape(len(y), -1)
    if not _yes_or_no(y):
        raise DataError(f"{where}: the labels are not all 0 or 1, as several labels at once must be; mend them")
    classes = _column_names(y, names, where)
    return Targets(y.astype(np.float32), classes, "multi-label")


def _column_names(y: Array, names: Sequence[str] | None, where: str) -> tuple[str, ...]:
    if names is not None and len(names) != y.shape[1]:
        raise DataError(f"{where} has {y.shape[1]} columns of labels and {len(names)} names for them; give as many")
    return tuple(names) if names is not None else tuple(map(str, range(y.shape[1])))


def _regression(y: Array, names: Sequence[str] | None, where: str) -> Targets:
    if y.dtype.kind == "U":
        raise DataError(
            f"{where}: the labels are text ({listed([str(v) for v in y.flat[:4]])}); regression needs numbers"
        )
    with np.errstate(over="ignore"):
        values = y.reshape(len(y), -1).astype(np.float32)
    if not np.isfinite(values).all():
        first = int((~np.isfinite(values)).any(axis=1).argmax())
        raise DataError(f"{where}: a label of sample {first} is too large for float32; scale the labels")
    classlike = y.ndim == 1 and y.dtype.kind == "f" and y.min() >= 0 and (y == np.rint(y)).all()
    notice = (
        f"{where}: y is whole numbers up to {y.max():g} in {y.dtype}, read as regression; if they are class numbers, "
        "say --task classes"
    )
    return Targets(values, (), "regression", (notice,) if classlike else ())


_READ: Mapping[Task, Callable[[Array, Sequence[str] | None, str], Targets]] = {
    "classes": _classes,
    "multi-label": _multi_label,
    "regression": _regression,
}


# --- other classes -----------------------------------------------------------------------------------------------


def kept(targets: Targets, only: Sequence[str], where: str) -> tuple[Targets, Numbers]:
    """The classes ``only``, by name or else by number, in that order; and which samples have them."""
    if targets.task != "classes":
        raise DataError(f"{where}: --only chooses among classes, and the labels are {targets.task}; leave it out")
    places: list[int] = []
    for name in only:
        number = int(name) if name.isdecimal() and not targets.numbered else len(targets.classes)
        if name not in targets.classes and number >= len(targets.classes):
            raise DataError(f"{where} has no class {name!r} for --only; it has {listed(targets.classes, 12)}")
        places.append(targets.classes.index(name) if name in targets.classes else number)
    if len(set(places)) < len(places):
        raise DataError(f"--only {','.join(only)} names a class twice; name each once")
    return _renumbered(targets, places, [targets.classes[place] for place in places])


def aligned(targets: Targets, classes: Sequence[str], where: str) -> Targets:
    """The same targets in terms of ``classes``, those of the training set, matched by name. Raises DataError."""
    if targets.task == "regression":
        raise DataError(
            f"{where}: the labels are numbers, and the classes {listed(classes)} are wanted; give class labels"
        )
    present = targets.counts > 0 if targets.task == "classes" else np.ones(len(targets.classes), bool)
    strange = [name for name, there in zip(targets.classes, present, strict=True) if there and name not in classes]
    if strange:
        raise DataError(
            f"{where} has samples of {listed(strange)}, which the classes {listed(classes, 12)} lack; leave them "
            "out with --only, or name the classes as in training"
        )
    if targets.task == "classes":
        places = [targets.classes.index(name) if name in targets.classes else -1 for name in classes]
        return _renumbered(targets, places, classes)[0]
    if absent := [name for name in classes if name not in targets.classes]:
        raise DataError(f"{where} has no labels for {listed(absent)}; give a column for each of {listed(classes, 12)}")
    return replace(
        targets, values=targets.values[:, [targets.classes.index(c) for c in classes]], classes=tuple(classes)
    )


def _renumbered(targets: Targets, places: Sequence[int], names: Sequence[str]) -> tuple[Targets, Numbers]:
    """Class ``places[i]`` (-1: none) becomes class i; and which samples are left."""
    new = np.full(len(targets.classes), -1)
    for number, place in enumerate(places):
        if place >= 0:
            new[place] = number
    values = new[targets.values]
    left = np.flatnonzero(values >= 0)
    return replace(targets, values=values[left], classes=tuple(names), numbered=False), left
