"""Wrong candidates made from right ones, and right ones written otherwise: what `mutation_score.py` has checked.

    subjects      the right models
    keras_edits   mutants as Keras models: an `Edit` of the layers, weights, calls, inputs or outputs of a copy
    onnx_edits    mutants as ONNX files: an edit of the exported graph
    preserving    the same function written otherwise; these must pass
    referee       an ONNX graph in float64
    product       all that is known here about deploykit's check

A *kind* is a function that makes one mutant at a place drawn from a seeded generator, or None where a model has no
such place. Kinds stand in tables by family; the families are the same for Keras and for ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]

FAMILIES = (
    "single weights",
    "whole channels",
    "biases",
    "BN",
    "attributes",
    "activations",
    "structure",
    "inputs",
    "precision",
    "scales",
    "shapes",
    "rare",
)

# Wrong by construction, whatever one norm over an output says: in small columns beside large ones, or on inputs that a
# user may give (another batch or size, a kind of sample that is seldom seen).
BY_DEFINITION = ("scales", "shapes", "rare")
OUTCOMES = ("NaN", "1 % off")  # what a rare mutant answers; the forms take turns with them
OFF_BY = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)  # relative errors of a single weight


class StillbornError(Exception):
    """A mutant that is no model at all: nobody would ever compare it."""


@dataclass(frozen=True, eq=False)
class Made:
    """One mutant: what is checked, and how to compute its outputs in float64."""

    family: str
    kind: str
    where: str
    artefact: Any  # a keras.Model or the path of an .onnx file
    doubled: Callable[[Arrays], dict[str, NDArray[Any]]]


@dataclass(frozen=True)
class Trigger:
    """One kind of input on which a rare mutant is wrong. ``label`` completes "wrong on ...".

    Of whole samples: ``least`` <= every value <= ``most`` (None: not asked), or all values equal (``flat``), or one
    value at least ``peak``. Of batches: ``place``.
    """

    label: str
    least: float | None = None
    most: float | None = None
    flat: bool = False
    peak: float | None = None
    place: str | None = None


def triggers(low: float | None, high: float | None, whole: bool) -> tuple[Trigger, ...]:
    """What can happen to be special about a sample whose values lie between ``low`` and ``high`` (None: any)."""
    zero = Trigger("a sample of zeros", least=0.0, most=0.0)
    flat = Trigger("a constant sample, not zero", flat=True)
    places = (
        Trigger("the first sample of a batch", place="first"),
        Trigger("the last sample of a batch of several", place="last"),
        Trigger("a batch of one", place="alone"),
        Trigger("every sample from the 9th of a batch on", place="late"),
        Trigger("batches of odd size", place="odd"),
    )
    if whole:
        top = high or 1.0
        return (zero, flat, Trigger("a sample that holds the largest id", peak=top), *places)
    if low is None or high is None:
        negative, bright = Trigger("a sample without positive values", most=-1e-9), Trigger("values above 4", peak=4.0)
        positive = Trigger("a sample without negative values", least=1e-9)
        return (zero, flat, negative, positive, bright, Trigger("values above 10", peak=10.0), *places)
    middle = (low + high) / 2
    return (
        zero,
        flat,
        Trigger("a sample in the lower half of the range", most=middle),
        Trigger("a sample in the upper half of the range", least=middle),
        Trigger("the highest value of the range", peak=high),
        *places,
    )


def rounded(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Values of a narrow type, held in the array's own dtype."""
    import ml_dtypes

    return np.asarray(array).astype(getattr(ml_dtypes, dtype, dtype)).astype(array.dtype)


def quantized(array: NDArray[Any]) -> NDArray[Any]:
    """Eight bits, one scale for all."""
    scale = float(np.abs(array).max()) / 127 or 1.0
    return (np.round(array / scale) * scale).astype(array.dtype)
