"""deploykit: a trained Keras model in, a verified and timed ONNX bundle out.

    import deploykit
    loaded = deploykit.load("model.keras")
    fused = deploykit.fuse(loaded.model)             # .model, .decisions, .proof
    report = deploykit.deploy(loaded, "build/model") # the whole job; report.to_json()

Everything public is listed in ``__all__`` and imported on first use, so that importing deploykit imports no
TensorFlow. Several verbs share their name with the module that holds them (``deploykit.fuse`` is the
function; ``from deploykit.fuse import CODES`` still finds the module): the package keeps the import system
from putting the module in the function's place.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from deploykit.bench import bench as bench
    from deploykit.check import check as check
    from deploykit.deploy import DataOptions as DataOptions
    from deploykit.deploy import deploy as deploy
    from deploykit.errors import DeploykitError as DeploykitError
    from deploykit.errors import InputError as InputError
    from deploykit.errors import ProofError as ProofError
    from deploykit.export import export as export
    from deploykit.fuse import Fused as Fused
    from deploykit.fuse import fuse as fuse
    from deploykit.load import Loaded as Loaded
    from deploykit.load import load as load
    from deploykit.transfer import Head as Head
    from deploykit.transfer import Phase as Phase
    from deploykit.transfer import Recipe as Recipe
    from deploykit.transfer import swap_head as swap_head
    from deploykit.transfer import train_head as train_head

_HOME = {
    "DataOptions": "deploykit.deploy",
    "DeploykitError": "deploykit.errors",
    "Fused": "deploykit.fuse",
    "InputError": "deploykit.errors",
    "Loaded": "deploykit.load",
    "ProofError": "deploykit.errors",
    "bench": "deploykit.bench",
    "check": "deploykit.check",
    "deploy": "deploykit.deploy",
    "export": "deploykit.export",
    "fuse": "deploykit.fuse",
    "load": "deploykit.load",
    "Head": "deploykit.transfer",
    "Phase": "deploykit.transfer",
    "Recipe": "deploykit.transfer",
    "swap_head": "deploykit.transfer",
    "train_head": "deploykit.transfer",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'deploykit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)


class _Package(types.ModuleType):
    """A package whose verbs are functions although modules of the same name exist."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, types.ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
