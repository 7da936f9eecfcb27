"""The user's own classes and functions: code that runs because the user named it, never because a file did.

A place is a module (``pkg.layers``), one object of it (``pkg.layers:Scale``), or a Python file
(``layers.py``, ``layers.py:Scale``). Of a module count the public classes and functions that it defines
itself, and whatever it or its submodules registered with ``register_keras_serializable``; what it merely
imported does not, so a file that says ``from keras.layers import *`` overrides nothing.

Importing is a side effect that cannot be undone, but its effect on Keras is: the registry is put back by
the caller, and the objects travel in ``Loaded.custom_objects`` instead.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import keras

from deploykit.errors import CustomObjectError
from deploykit.modules import RAISED, import_file, importable, place_and_name

_FLAG = "--custom-objects takes a module, module:Name or a .py file"


def _import(place: str) -> ModuleType:
    try:
        if place.endswith(".py"):
            if not Path(place).is_file():
                raise CustomObjectError(f"custom objects: there is no file {place}; {_FLAG}")
            return import_file(Path(place))
        with importable(Path.cwd(), first=False):
            return importlib.import_module(place)
    except CustomObjectError:
        raise
    except RAISED as error:
        cause = f"{type(error).__name__}: {error}".strip()
        raise CustomObjectError(f"custom objects: cannot import {place!r} ({cause[:200]}); {_FLAG}") from error


def _names(found: object, name: str) -> Iterator[str]:
    yield name
    registered = keras.saving.get_registered_name(found)
    if isinstance(registered, str):
        yield registered


def _objects(module: ModuleType) -> Iterator[tuple[str, object]]:
    family = [m for n, m in list(sys.modules.items()) if n == module.__name__ or n.startswith(f"{module.__name__}.")]
    for member in sorted(family, key=lambda m: m is module):  # the module itself last: it wins
        for name, found in sorted(vars(member).items()):
            if not (inspect.isclass(found) or inspect.isfunction(found)):
                continue
            own = found.__module__ == member.__name__
            registered = keras.saving.get_registered_name(found) != found.__name__
            if own and (registered or (not name.startswith("_") and member is module)):
                yield name, found
    for name, found in sorted(vars(module).items()):  # a package that re-exports its submodules' classes
        if not name.startswith("_") and str(getattr(found, "__module__", "")).startswith(f"{module.__name__}."):
            yield name, found


def custom_objects(places: Sequence[str]) -> dict[str, Any]:
    """Import the named places and return their objects by plain and by registered name.

    Raises CustomObjectError when a place cannot be imported, lacks the object, or holds none.
    """
    objects: dict[str, Any] = {}
    for place in places:
        source, wanted = place_and_name(place)
        module = _import(source)
        found = dict(_objects(module))
        if wanted:
            if not hasattr(module, wanted):
                known = ", ".join(sorted(found)[:6]) or "nothing usable"
                raise CustomObjectError(f"custom objects: {source} has no {wanted}; it defines {known}")
            found = {wanted: getattr(module, wanted)}
        if not found:
            raise CustomObjectError(f"custom objects: {source} defines no class or function; {_FLAG}")
        for name, thing in found.items():
            objects.update(dict.fromkeys(_names(thing, name), thing))
    return objects


def lookup(objects: Mapping[str, Any], name: str) -> Any:
    """An object under its name, its registered name, or its registered name without the package."""
    return objects.get(name, objects.get(name.rpartition(">")[2]))
