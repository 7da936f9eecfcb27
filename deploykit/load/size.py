"""A model demands no more memory for its weights than there are weights for it.

A description of a few bytes can ask for any number of weights, ``Dense(10**9)``, and Keras allocates them before it
looks at those in the file. But each of them has a value there, so

    bytes of the variables made  <=  EXCESS · bytes of the arrays stored  +  FLOOR

where the excess pays for a model that is made twice (one inside a wrapper is, a wrapper of a wrapper four times) and
for values stored in a shorter type, the floor for variables that no file stores: states of random generators, and
what a class of the user's keeps to itself.

`bounded` counts where every variable of Keras comes from, the constructor of ``keras.Variable``, before it allocates.
What is stored is counted as it unpacks: arrays of HDF5 as declared, within what compression can reach; members of an
archive at their full length.

Limits: other threads that make variables meanwhile count as well. Not counted is what is no variable: initial states
and statistics that Keras computes as it builds (a stateful RNN, for its batch size; a Normalization with a given mean,
for its input), and what only a call takes (``UpSampling2D(10**6)``).
"""

from __future__ import annotations

import contextlib
import functools
import math
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import tensorflow as tf

from deploykit.errors import LoadError
from deploykit.load import hdf5
from deploykit.report.wording import size

EXCESS = 4
FLOOR_BYTES = 256 << 20
_UTMOST_BYTES = 10**18  # more is not worth a number


@contextlib.contextmanager
def bounded(what: str, stored: Callable[[], int]) -> Iterator[None]:
    """Raise LoadError as soon as the variables made within the block outgrow what is stored for them.

    Whatever Keras makes of that on its way out: an exception of its own, or nothing at all. ``stored`` counts the bytes
    of the arrays, and is asked only of what exceeds the floor.
    """
    refusal: LoadError | None = None
    demanded = 0
    stored = functools.cache(stored)
    make = keras.Variable.__init__

    def counted(self: Any, initializer: Any, shape: Any = None, dtype: Any = None, *further: Any, **named: Any) -> None:
        nonlocal demanded, refusal
        demanded += _bytes(initializer, shape, dtype)
        if demanded > FLOOR_BYTES and demanded > EXCESS * stored() + FLOOR_BYTES:
            refusal = refusal or LoadError(
                f"{what} demands {size(min(demanded, _UTMOST_BYTES))} of weights or more, where {size(stored())} are "
                "stored; refusing to build it, save the whole model again"
            )
            raise refusal
        make(self, initializer, shape, dtype, *further, **named)

    inherited = "__init__" not in vars(keras.Variable)
    keras.Variable.__init__ = counted
    try:
        yield
    except Exception as error:
        if refusal is None or error is refusal:
            raise
        raise refusal from error
    finally:
        if inherited:
            del keras.Variable.__init__
        else:
            keras.Variable.__init__ = make
    if refusal is not None:
        raise refusal


def _bytes(initializer: Any, shape: Any, dtype: Any) -> int:
    """What a variable will take; 0 for arguments that Keras will refuse."""
    try:
        sizes = [int(n) for n in (initializer.shape if shape is None else shape)]
        return max(0, math.prod(sizes)) * int(tf.as_dtype(keras.backend.standardize_dtype(dtype)).size)
    except (AttributeError, TypeError, ValueError, OverflowError):
        return 0


# ------------------------------------------------------------------------------------------------ what is stored


def in_hdf5(path: Path) -> int:
    """All arrays of a file, optimizer and all."""
    found: list[int] = []

    def count(_: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            reached = hdf5.BOMB_EXPANSION * item.id.get_storage_size()
            found.append(min(math.prod(item.shape or ()) * item.dtype.itemsize, reached))

    with hdf5.open_checked(path, str(path)) as file:
        file.visititems(count)
    return sum(found)


def in_archive(path: Path) -> int:
    """All members, which were found to be no bombs."""
    with zipfile.ZipFile(path) as archive:
        return sum(member.file_size for member in archive.infolist())


def in_description(path: Path) -> int:
    """None."""
    return 0
