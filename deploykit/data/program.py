"""Programs: samples that a Python function of the user makes, ``module:function`` or ``file.py:function``.

It is imported because the user typed its name; nothing else ever names one. It takes nothing, or ``signature`` where it
has such a parameter, and returns

    an array                            for a model with one input
    a dict of arrays by input name      (``y`` in it: labels)
    (x, y)                              x as above, y labels
    an iterable of batches of these     a generator, a list, a tf.data.Dataset

Batches come once, and how many there are is known when the last has come. So they are written to temporary files as
they come (`deploykit.data.rows.Spool`), and from there on everything is as with any other source; ``limit`` takes the
first samples and asks for no more batches than that needs. What is returned at once is drawn from, like a file.

What the function raises becomes one line, with the place in the user's own code. What it prints goes to stderr.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.data.rows import Held, Rows, Spool
from deploykit.data.samples import Array
from deploykit.data.sources import Part, Request, Source, part_by_name
from deploykit.errors import DataError
from deploykit.modules import RAISED, import_file, importable, place_and_name

BATCH = "an array, a dict of arrays by input name, or (x, y)"
RETURNS = f"return {BATCH}, or an iterable of batches of these"
_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
_END = object()


def is_program(where: str) -> bool:
    """Whether ``where`` reads like module:function."""
    place, name = place_and_name(where)
    return bool(name) and (place.endswith(".py") or _is_module(place))


def _is_module(place: str) -> bool:
    return all(name.isidentifier() for name in place.split("."))


def read_program(request: Request) -> Source:
    where = request.where
    place, name = place_and_name(where)
    if place.endswith(".py") and not Path(place).is_file():
        raise DataError(f"{where}: there is no file {place}; check the path")
    with _running(where, place):
        module = import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise DataError(f"{where}: {place} has no function {name}; name one that makes samples")
    options = {"signature": request.signature} if "signature" in _parameters(function, where) else {}
    with _running(where, place):
        given = function(**options)
    if _is_batch(given):
        return Source([part_of(given, request, where)])
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes)):
        raise DataError(f"{where} returned {_kind(given)}; {RETURNS}")
    done: list[str] = []
    return Source(_spooled(given, request, place, done), done)


def _parameters(function: Any, where: str) -> Mapping[str, inspect.Parameter]:
    try:
        found = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin that does not say
        return {}
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [
        name for name, p in found.items() if p.default is p.empty and p.kind not in optional and name != "signature"
    ]
    if needed:
        raise DataError(f"{where} must be given {', '.join(needed)}; it may take nothing but `signature`")
    return found


# --- the user's code -----------------------------------------------------------------------------------------------


@contextmanager
def _running(where: str, place: str) -> Iterator[None]:
    """The user's code may import its neighbours here; what it raises becomes one line, what it prints is no output."""
    is_file = place.endswith(".py")
    folder = Path(place).resolve().parent if is_file else Path.cwd()
    try:
        with importable(folder, first=is_file), contextlib.redirect_stdout(sys.stderr):
            yield
    except RAISED as error:
        if isinstance(error, ModuleNotFoundError) and error.name == place:
            raise DataError(
                f"{where} names a function of the module {place}, which is not there; check the name"
            ) from error
        cause = f"{type(error).__name__}: {str(error)[:200]}".removesuffix(": ")
        raise DataError(f"{where} failed with {cause}{_line(error)}; mend it") from error


def _line(error: BaseException) -> str:
    """Where it happened: the innermost line of the user's own code, or of a library where there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({Path(error.filename).name}, line {error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    frames = [f for f in frames if "importlib" not in f.filename]
    own = [f for f in frames if not f.filename.startswith(_LIBRARIES)] or frames
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno}, in {own[-1].name})" if own else ""


# --- what it returns -----------------------------------------------------------------------------------------------


def _kind(value: object) -> str:
    return "nothing" if value is None else f"an object of type {type(value).__name__}"


def _is_batch(value: object) -> bool:
    return isinstance(value, (tuple, Mapping)) or hasattr(value, "__array__")


def _held(value: object, where: str) -> Held:
    try:
        return Held(np.asarray(value))
    except Exception as error:  # ragged lists; tensors that live on another device
        raise DataError(f"{where} gives {_kind(value)} that is no array ({str(error)[:200]}); give {BATCH}") from error


def part_of(value: Any, request: Request, where: str) -> Part:
    """A batch as a part: an array, a dict of arrays by input name, or (x, y)."""
    y: Rows | None = None
    if isinstance(value, tuple):
        if len(value) != 2:
            raise DataError(f"{where} gives a tuple of {len(value)}; give {BATCH}")
        value, labels = value
        y = None if labels is None else _held(labels, where)
    if isinstance(value, Mapping):
        arrays = {str(name): _held(found, where) for name, found in value.items()}
    elif len(request.names) == 1:
        arrays = {request.names[0]: _held(value, where)}
    else:
        raise DataError(
            f"{where} gives one array and the model has several inputs; give a dict of {', '.join(request.names)}"
        )
    part = part_by_name(request.names, list(arrays), arrays.__getitem__, where, y)
    if not part.count:
        raise DataError(f"{where} gives no samples; give at least one")
    return part


def _spooled(batches: Iterable[Any], request: Request, place: str, done: list[str]) -> Iterator[Part]:
    """The batches, one part for each run of equal shapes and dtypes; a part grows after it was given."""
    where, limit = request.where, request.limit
    with _running(where, place):
        iterator = iter(batches)
    spools: dict[str, Spool] = {}
    labels: list[Array] | None = None
    total = number = 0
    try:
        while limit is None or total < limit:
            with _running(where, place):
                batch = next(iterator, _END)
            if batch is _END:
                break
            name = f"{where}, batch {number}"
            if not _is_batch(batch):
                raise DataError(f"{name} is {_kind(batch)}; {RETURNS}")
            part = part_of(batch, request, name)
            rows = np.arange(part.count if limit is None else min(part.count, limit - total))
            arrays = {key: found.take(rows) for key, found in part.rows.items()}
            if number and (labels is None) != (part.labels is None):
                raise DataError(
                    f"{name}: some batches have labels and some have none; give all of them labels, or none"
                )
            fresh = not spools or not all(spools[key].fits(array) for key, array in arrays.items())
            if fresh:
                spools = {key: Spool(array, where) for key, array in arrays.items()}
                labels = None if part.labels is None else []
            for key, array in arrays.items():
                spools[key].append(array)
            if labels is not None and part.labels is not None:
                labels.append(part.labels[0][: len(rows)])
            total, number = total + len(rows), number + 1
            if fresh:
                yield Part(spools, name, labels, part.notes)
        else:
            done.append(f"its first {total} samples")
    finally:
        with contextlib.suppress(*RAISED), contextlib.redirect_stdout(sys.stderr):
            getattr(iterator, "close", lambda: None)()
    if not number:
        raise DataError(f"{where} gives no batches; {RETURNS}")
