"""The recipe: how a new head, and then the top of its body, is trained. Every number that matters stands here.

    phase 1, head    the body is frozen; its features are computed once, and the head is trained on them
    phase 2, tune    the top of the body is trained too, at a tenth to a hundredth of the rate; BN stays as it is

An optimizer is any of Keras' by name, with its options; ``adam>sgd`` trains with the first for `SWITCH` of the epochs
and finishes with the second. The rate of step n of N is ``learning_rate · warm-up · schedule(n / N)`` (`SCHEDULES`),
with a warm-up that grows linearly over its share of the steps; ``plateau`` is the one schedule that looks at the
validation loss. Multipliers scale the rate of single layers.

Limits: weight decay that an optimizer applies by itself (AdamW) is not scaled by multipliers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import keras

from deploykit.errors import InputError

O = keras.optimizers  # noqa: E741 -- as L for layers elsewhere
OPTIMIZERS: Mapping[str, Any] = {
    "sgd": O.SGD,
    "adagrad": O.Adagrad,
    "rmsprop": O.RMSprop,
    "adam": O.Adam,
    "adamax": O.Adamax,
    "nadam": O.Nadam,
    "adamw": O.AdamW,
    "lion": O.Lion,
}
SWITCH = 2 / 3  # of the epochs, then the second optimizer
SECOND = {"sgd": {"momentum": 0.9, "nesterov": True}}  # what finishes, unless options say otherwise

# Share of the steps done, 0..1 -> factor of the learning rate.
SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,  # Loshchilov & Hutter 2017, without restarts
    "step": lambda t: 0.1 ** ((t >= 0.5) + (t >= 0.75)),
    "exponential": lambda t: 0.01**t,  # ends at a hundredth
    "plateau": lambda t: 1.0,  # and a factor of PLATEAU when the validation loss stands still
}
PLATEAU, PLATEAU_PATIENCE = 0.3, 4  # factor; epochs without a better validation loss


@dataclass(frozen=True)
class Phase:
    """One phase. ``learning_rate`` is the peak; ``patience``: epochs without a better validation loss, None: all.

    ``options``: of the optimizer, by Keras' own names. ``warmup``: share of the steps. ``multipliers``: factor of the
    rate by layer name.
    """

    epochs: int
    learning_rate: float
    optimizer: str = "adam"
    options: Mapping[str, Any] = field(default_factory=dict)
    schedule: str = "constant"
    warmup: float = 0.0
    batch: int = 32
    patience: int | None = None
    clipnorm: float | None = None
    clipvalue: float | None = None
    multipliers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, name in ((self.epochs, "a number of epochs"), (self.batch, "a batch size")):
            if number < 1:
                raise InputError(f"{name} of {number} trains nothing; give at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"a learning rate of {self.learning_rate:g} makes no sense; give a number above 0")
        if self.schedule not in SCHEDULES:
            raise InputError(f"schedule '{self.schedule}' is unknown; choose one of {', '.join(SCHEDULES)}")
        if not 0 <= self.warmup < 1:
            raise InputError(f"a warm-up of {self.warmup:g} makes no sense; give a share of the steps, below 1")
        names = self.optimizer.split(">")
        unknown = [name for name in names if name not in OPTIMIZERS]
        if unknown or len(names) > 2:
            raise InputError(
                f"optimizer '{self.optimizer}' is unknown; choose one of {', '.join(OPTIMIZERS)}, or two as in adam>sgd"
            )
        known = set().union(*(_options(name) for name in names))
        for name in self.options:
            if name not in known:
                raise InputError(f"{self.optimizer} has no option '{name}'; it has {', '.join(sorted(known))}")
        for name, bound in (("clipnorm", self.clipnorm), ("clipvalue", self.clipvalue)):
            if bound is not None and not 0 < bound < math.inf:
                raise InputError(f"{name} {bound:g} makes no sense; give a number above 0")
        for name, factor in self.multipliers.items():
            if not 0 <= factor < math.inf:
                raise InputError(f"a multiplier of {factor:g} for '{name}' makes no sense; give 0 or more")

    def with_(self, text: str, number: int, name: str) -> Phase:
        """This phase with one setting from ``A[,B]``, where the first is for phase 1 and the second for phase 2."""
        parts = text.split(",")
        if len(parts) > 2 or number >= len(parts):
            return self
        try:
            value = type(getattr(self, name))(parts[number])
        except ValueError:
            raise InputError(f"{name} {text}: give a number for each phase, as in 100,40") from None
        return replace(self, **{name: value})

    def stages(self) -> tuple[tuple[str, int, int], ...]:
        """Optimizer, first epoch, epoch behind the last."""
        first, _, second = self.optimizer.partition(">")
        if not second or self.epochs < 2:
            return ((first, 0, self.epochs),)
        change = min(self.epochs - 1, max(1, round(SWITCH * self.epochs)))
        return ((first, 0, change), (second, change, self.epochs))

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step number ``step`` of ``steps``, both counted from 0."""
        warm = math.floor(self.warmup * steps)
        return self.learning_rate * min(1.0, (step + 1) / (warm + 1)) * SCHEDULES[self.schedule](step / steps)

    def build(self, name: str, layers: Mapping[str, str]) -> Any:
        """A keras.Optimizer; ``layers``: variable path -> name of its layer, for multipliers."""
        kind = OPTIMIZERS[name]
        options = {**(SECOND.get(name, {}) if ">" in self.optimizer else {}), **self.options}
        options = {key: value for key, value in options.items() if key in _options(name)}
        factors = {path: self.multipliers[layer] for path, layer in layers.items() if layer in self.multipliers}
        try:
            return _scaled(kind, factors)(
                learning_rate=self.learning_rate, clipnorm=self.clipnorm, clipvalue=self.clipvalue, **options
            )
        except (TypeError, ValueError) as error:
            raise InputError(f"optimizer {name} cannot be made with {dict(options)} ({error})") from error


def _options(name: str) -> set[str]:
    taken = {"self", "learning_rate", "clipnorm", "clipvalue", "name", "kwargs"}
    return set(inspect.signature(OPTIMIZERS[name].__init__).parameters) - taken


def _scaled(kind: Any, factors: Mapping[str, float]) -> Any:
    """The optimizer's class, whose steps of some variables are longer or shorter."""
    if not factors:
        return kind

    class Scaled(kind):  # type: ignore[misc]
        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            path = self._trainable_variables[self._get_variable_index(variable)].path  # TensorFlow's own has none
            super().update_step(gradient, variable, learning_rate * factors.get(path, 1.0))

    Scaled.__name__ = kind.__name__
    return Scaled


@dataclass(frozen=True)
class Recipe:
    """Both phases. ``tune`` None: the body stays frozen.

    ``unfreeze``: how many layers with weights, counted from the top of the body, phase 2 trains; None: all.
    ``train_norms``: BN among them learn, and update their statistics. ``validation``: share of the training data.
    ``views``: how many augmented views of every image phase 1 sees beside the image itself.
    """

    head: Phase = Phase(epochs=100, learning_rate=1e-2, patience=15)
    tune: Phase | None = Phase(epochs=40, learning_rate=2e-4, schedule="cosine", warmup=0.1)
    unfreeze: int | None = None
    train_norms: bool = False
    validation: float = 0.2
    augment: tuple[str, ...] = ()
    views: int = 0
    class_weight: Literal["auto"] | None = None
    sanity: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.validation < 1:
            raise InputError(f"a validation share of {self.validation:g} makes no sense; give one between 0 and 1")
        if self.unfreeze is not None and self.unfreeze < 0:
            raise InputError(f"cannot unfreeze {self.unfreeze} layers; give 0 or more, or all")
        if self.views < 0:
            raise InputError(f"{self.views} views make no sense; give 0 or more")
        if self.views and not self.augment:
            raise InputError("views are augmented copies; say how with --augment")
