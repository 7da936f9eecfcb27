"""How a model was compiled, read out of its file as data: optimizer, learning rate, losses, metrics.

A file keeps this beside the model: ``compile_config`` in a ``.keras`` archive and in a JSON description,
``training_config`` in HDF5 and in a SavedModel. Nothing here is deserialised: no class is looked up and no code of the
file's or the user's is called. A name is a name, and what is no name, number or list is left as it stands.

    "mse"                                             a name
    {"class_name": "Adam", "config": {...}}           an object
    {"class_name": "function", "config": "mse"}       a function of Keras 3
    [a, b]   {"output": a, ...}                       one for each output

Limits: what a custom loss or schedule does is not known. A loss is called by its function's name, so that
``SparseCategoricalCrossentropy`` and ``sparse_categorical_crossentropy`` are the same; ``from_logits`` is False where
the file does not say otherwise, as it is in Keras.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from deploykit.load.contents import printable

# Entries of an optimizer's config that are no hyperparameters.
_NO_HYPERPARAMETERS = ("name", "learning_rate", "lr", "jit_compile", "is_legacy_optimizer")
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


@dataclass(frozen=True)
class Loss:
    """``name`` in small letters with underscores. ``output``: the name or place of the output it is for; None: all."""

    name: str
    from_logits: bool = False
    output: str | int | None = None


@dataclass(frozen=True)
class Training:
    """``learning_rate`` is None where a ``schedule`` gives it, or where the file does not say."""

    optimizer: str | None = None
    learning_rate: float | None = None
    schedule: Mapping[str, Any] | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    losses: tuple[Loss, ...] = ()
    metrics: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer,
            "learning_rate": self.learning_rate,
            "schedule": self.schedule,
            "hyperparameters": dict(self.hyperparameters),
            "losses": [{"name": x.name, "from_logits": x.from_logits, "output": x.output} for x in self.losses],
            "metrics": list(self.metrics),
        }


def read(config: Mapping[str, Any]) -> Training:
    """What a training configuration says. Entries that are not as Keras writes them are left out."""
    optimizer = config.get("optimizer", config.get("optimizer_config"))
    options = _options(optimizer)
    rate = options.get("learning_rate", options.get("lr"))
    schedule = {**_plain(_options(rate)), "name": _name(rate)} if isinstance(rate, dict) else None
    return Training(
        optimizer=_name(optimizer),
        learning_rate=_number(rate),
        schedule=schedule,
        hyperparameters=_plain({k: v for k, v in options.items() if k not in _NO_HYPERPARAMETERS and v is not None}),
        losses=tuple(_losses(config.get("loss"))),
        metrics=tuple(dict.fromkeys(_names(config.get("metrics")))),
    )


def _number(value: Any) -> float | None:
    """A finite number as a float; JSON also holds whole numbers of any length."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return float(value)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("class_name"), str)


def _options(value: Any) -> dict[str, Any]:
    options = value.get("config") if _is_object(value) else None
    if not isinstance(options, dict):
        return {}
    inner = options.get("inner_optimizer", options.get("optimizer"))  # of one that scales the loss
    return _options(inner) if _is_object(inner) else options


def _name(value: Any) -> str | None:
    """The name of a function or class; a wrapper of Keras around a function is called by that."""
    if isinstance(value, str):
        return printable(value)
    if not _is_object(value):
        return None
    options = value.get("config")
    if isinstance(options, str):  # a function of Keras 3
        return printable(options)
    inner = (options.get("fn") or options.get("inner_optimizer")) if isinstance(options, dict) else None
    return _name(inner) or printable(value["class_name"])


def _names(value: Any) -> Iterator[str]:
    """Every name in a nest of lists and of objects by output."""
    if (name := _name(value)) is not None:
        yield name
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _names(item)


def _losses(value: Any) -> Iterator[Loss]:
    if isinstance(value, list):
        parts: list[tuple[str | int | None, Any]] = list(enumerate(value))
    elif isinstance(value, dict) and not _is_object(value):
        parts = [(printable(str(key)), item) for key, item in value.items()]
    else:
        parts = [(None, value)]
    for output, part in parts:
        if (name := _name(part)) is not None:
            yield Loss(_WORDS.sub("_", name).lower(), _options(part).get("from_logits") is True, output)


def _plain(value: Any, depth: int = 4) -> Any:
    """A value of the file's as a report may hold it: short texts, no deep nests."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(str(key)): _plain(item, depth - 1) for key, item in value.items()} if depth else "..."
    if isinstance(value, list):
        return [_plain(item, depth - 1) for item in value] if depth else "..."
    return value
