"""Gradients: do the input gradients of the fused model agree with the original's?

Whoever fine-tunes a fused model, or asks which pixels an answer rests on, relies on its gradients; equal outputs do not
guarantee them (a stopped gradient changes no output). Every output is summed with fixed random weights,

    L(x) = Σ_k ⟨w_k, f_k(x)⟩        w_k standard normal, divided by √(elements of the output)

and g = ∂L/∂x is compared sample by sample.

Two proofs
----------
*Fused against original.* The reference is the original's gradient in float64, the yardstick the original's own
float32 gradient, and the laws of the whole and of the sample are those of `deploykit.verify`. Under the policy of a
lower precision each sample's gradient must keep the SNR that the policy asks of each sample of an output. A tolerance
(``rtol``, ``atol``) speaks of outputs and has nothing to say about slopes.

*Both against numbers.* In float64 the derivative along random unit directions v should be what the function says,

    D(h) = (L(x+h·v) − L(x−h·v)) / 2h          |D(h/2) − g·v| ≤ τ,    τ = 1e-5·(|g·v| + ‖g‖/√d) + 64·eps·‖L‖/h

with h = 1e-5 of the sample's rms: the truncation error is of the order of h² ≈ 1e-10, the rounding error of eps/h ≈
2e-11, both far below τ. That holds the layers' own gradient code to account, which the first proof takes on trust.
It judges the fused model in the directions in which the original agrees with numbers. Where the original does not
(stop_gradient, a gradient of its own, rounding that lets it pass), its gradient is no derivative, on purpose: numbers
are no evidence there about either, ``notices`` say so, and the first proof alone decides.

Kinks
-----
ReLU, max-pooling and their kin have no derivative at a kink. Where rounding takes a float32 unit to the other side of
one, its gradient is another, rightly. So a sample that breaks the first law is asked again at `RETRIES` points beside
it (1e-3 of its rms away, far more than rounding moves anything): a wrong model fails at all of them, a right one hardly
at two. Such samples are counted as ``kinks``. A direction is skipped where D(h) and D(h/2) differ by more than τ: a
kink lies in between. All points are first moved off the given samples by as little, because a sample of zeros sits
*on* the kinks of a net without biases.

Limits: integer inputs are held fixed, and a model with no other is refused: what a token number's derivative would be
nobody asks. Only floating-point outputs count. Samples in which float32 overflows are left out, and counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from deploykit.data.synthetic import batch_of
from deploykit.errors import UnsupportedModelError
from deploykit.fuse.proof import slice_of
from deploykit.graph import Trace, flat_call, functional_form, replay, runnable, trace
from deploykit.opaque import graph_of
from deploykit.verify import FLOAT32, Fidelity, Policy, Scale, decibels, norm, norms, number, ratios

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
Floats = npt.NDArray[np.float64]

COUNT = 8  # samples: a gradient costs three passes, and there are six of them
RETRIES = 4
BESIDE = 1e-3
STEP = 1e-5
AGREEMENT = 1e-5
EPS = float(np.finfo(np.float64).eps)
VERDICTS = {False: "DISAGREE", None: "no evidence"}


@dataclass(frozen=True)
class InputGradient:
    """The gradient with respect to one input. ``ratio``: the largest error over what a law allows; ``law`` says which.

    ``kinks``: samples that were judged beside a kink; ``excluded``: samples without a finite gradient in float32.
    """

    name: str
    passed: bool
    snr_db: float | None
    own_snr_db: float | None
    ratio: float | None
    law: str
    kinks: int
    excluded: int
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class Differences:
    """Gradients of one model in float64 against numerical differences. ``worst``: the largest error over τ.

    ``passed`` is None where they are no evidence: the original disagrees, or leaves nothing to judge the fused by.
    """

    model: str
    passed: bool | None
    directions: int
    skipped: int
    worst: float | None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class GradientReport:
    """``inputs``: fused against original; ``differences``: each of the two against numbers."""

    samples: int
    inputs: tuple[InputGradient, ...]
    differences: tuple[Differences, ...]
    fixed: tuple[str, ...] = ()  # inputs that were held fixed

    @property
    def passed(self) -> bool:
        return self.reason is None

    @property
    def reason(self) -> str | None:
        """What does not agree first; None where everything does."""
        if not self.inputs:
            return "no gradient was compared"
        wrong = [f"gradient of {part.name}: {part.reason}" for part in self.inputs if not part.passed]
        wrong += [self._told(part) for part in self.differences if part.passed is False]
        return wrong[0] if wrong else None

    @property
    def notices(self) -> tuple[str, ...]:
        """Where numbers are no evidence; what is said of the original covers the fused model."""
        return tuple(self._told(part) for part in self.differences[:1] if part.passed is None)

    def _told(self, part: Differences) -> str:
        return f"numerical differences, {part.model}: {part.reason}"

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "reason": self.reason,
            "samples": self.samples,
            "inputs": [part.to_json() for part in self.inputs],
            "differences": [part.to_json() for part in self.differences],
            "fixed": list(self.fixed),
        }

    def text(self) -> str:
        """One line for each proof."""
        lines = []
        for part in self.inputs:
            snr, own = (("-" if db is None else f"{db:.1f} dB") for db in (part.snr_db, part.own_snr_db))
            kinks = f", {part.kinks} judged beside a kink" if part.kinks else ""
            verdict = "agrees" if part.passed else f"DIFFERS: {part.reason}"
            lines.append(f"gradient of {part.name}: {verdict} (SNR {snr}, the original's own {own}{kinks})")
        for found in self.differences:
            verdict = "agree" if found.passed else f"{VERDICTS[found.passed]}: {found.reason}"
            lines.append(
                f"numerical differences, {found.model}: {verdict} "
                f"({found.directions} directions, {found.skipped} skipped at kinks)"
            )
        return "\n".join(lines)


def input_gradients(
    original: Any,
    fused: Any,
    samples: Arrays,
    *,
    directions: int = 16,
    count: int = COUNT,
    seed: int = 0,
    law: Policy | Fidelity = FLOAT32,
) -> GradientReport:
    """Compare the input gradients of two Keras models of the same signature, at ``count`` of the samples.

    Where the batch size is fixed, at whole batches. ``directions``: how many random directions are checked against
    numerical differences, for each model. ``law``: that of the fused model's precision. Raises UnsupportedModelError
    for opaque models, and where no input or no output holds floating-point numbers.
    """
    for model in (original, fused):
        if graph_of(model) is not None:
            raise UnsupportedModelError(f"model {model.name} is one TensorFlow graph, which is not differentiated")
    found, other = trace(original), trace(fused)
    moving = [spec.name for spec in found.signature.inputs if "float" in spec.dtype]
    fixed = tuple(spec.name for spec in found.signature.inputs if spec.name not in moving)
    if not moving:
        raise UnsupportedModelError(
            f"model {original.name} takes whole numbers only ({', '.join(fixed)}): it has no input gradients; "
            "cut it behind its Embedding to compare them"
        )
    rng = np.random.default_rng(seed)
    whole = batch_of(found.signature)
    count = whole * max(1, count // whole)
    points = _beside({name: array[:count] for name, array in samples.items()}, moving, rng)
    weights = _weights(found, rng)
    names, batch = [spec.name for spec in found.signature.inputs], slice_of(found)
    doubles = (replay(found, dtype="float64"), replay(other, dtype="float64"))
    exact, exact_fused, plain, candidate = (
        _Gradient(model, names, moving, weights, batch) for model in (*doubles, original, fused)
    )
    judged = _judged(points, moving, (exact, plain, candidate), law, rng)
    there, here = (
        _differences(gradient, points, moving, directions, np.random.default_rng(seed + 1))
        for gradient in (exact, exact_fused)
    )
    numbers = (_told_original(there), _told_fused(here, there))
    return GradientReport(len(next(iter(points.values()))), tuple(judged), numbers, fixed)


def _beside(arrays: Arrays, moving: Sequence[str], rng: np.random.Generator) -> dict[str, Array]:
    """Points a little off the given ones, in every floating-point input."""

    def moved(array: Array) -> Array:
        offsets = BESIDE * _rms(array) * rng.standard_normal(array.shape)
        return np.asarray(array + offsets, dtype=array.dtype)

    return {name: moved(array) if name in moving else array for name, array in arrays.items()}


def _rms(array: Array) -> Floats:
    """Root mean square of each sample, shaped to multiply with; 1 for a sample of zeros."""
    rows = array.reshape(len(array), -1).astype(np.float64)
    size = np.sqrt(np.square(rows).mean(axis=1))
    return np.asarray(np.where(size > 0, size, 1.0)).reshape(-1, *[1] * (array.ndim - 1))


Weigh = Callable[[int, Any, str], Any]


def _weights(found: Trace, rng: np.random.Generator) -> Weigh:
    """The weight of every element of every output: drawn once the size of a sample is known, the same ever after."""
    dtypes = [found.tensors[index].dtype for index in found.outputs]
    if not any("float" in dtype for dtype in dtypes):
        raise UnsupportedModelError(f"no output of model {found.name} holds floating-point numbers: no gradients")
    seed = int(rng.integers(2**31))
    drawn: dict[tuple[int, ...], Floats] = {}

    def weigh(place: int, output: Any, dtype: str) -> Any:
        shape = tuple(int(size) for size in output.shape[1:])
        if (place, *shape) not in drawn:
            own = np.random.default_rng([seed, place])
            drawn[(place, *shape)] = own.standard_normal(shape) / math.sqrt(max(1, math.prod(shape)))
        return tf.constant(drawn[(place, *shape)], dtype=dtype)

    return weigh


class _Gradient:
    """L(x) and ∂L/∂x of one model, sample by sample."""

    def __init__(self, model: Any, names: Sequence[str], moving: Sequence[str], weigh: Weigh, batch: int) -> None:
        self.model, self.names = functional_form(runnable(model)), names
        self.call, self.moving, self.weigh = flat_call(self.model), moving, weigh
        self.batch = self.model.inputs[0].shape[0] or batch

    def tensors(self, arrays: Arrays) -> dict[str, Any]:
        return {
            name: keras.ops.convert_to_tensor(arrays[name], dtype=symbol.dtype)
            for name, symbol in zip(self.names, self.model.inputs, strict=True)
        }

    def total(self, tensors: Mapping[str, Any]) -> Any:
        """L of each sample, shape (batch,)."""
        parts = []
        for place, output in enumerate(self.call(*tensors.values())):
            if output.dtype.is_floating:
                weighed = output * self.weigh(place, output, output.dtype.name)
                parts.append(tf.cast(tf.reduce_sum(weighed, axis=list(range(1, len(output.shape)))), tf.float64))
        return tf.add_n(parts)

    def values(self, arrays: Arrays) -> Floats:
        parts = [self.total(self.tensors(part)).numpy() for part in self.slices(arrays)]
        return np.concatenate(parts)

    def at(self, arrays: Arrays) -> dict[str, Floats]:
        """∂L/∂x by input; zeros for an input that L does not depend on."""
        found: dict[str, list[Floats]] = {name: [] for name in self.moving}
        for part in self.slices(arrays):
            tensors = self.tensors(part)
            watched = [tensors[name] for name in self.moving]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(watched)
                total = self.total(tensors)
            gradients = tape.gradient(total, watched, unconnected_gradients=tf.UnconnectedGradients.ZERO)
            for name, gradient in zip(self.moving, gradients, strict=True):
                found[name].append(np.asarray(tf.convert_to_tensor(gradient), dtype=np.float64))
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def slices(self, arrays: Arrays) -> list[dict[str, Array]]:
        count = len(next(iter(arrays.values())))
        return [
            {name: array[start : start + self.batch] for name, array in arrays.items()}
            for start in range(0, count, self.batch)
        ]


# ------------------------------------------------------------------------------------------ fused against original


@dataclass(frozen=True, eq=False)
class _Norms:
    """Of each sample: the candidate's error, the original's own, the reference's size; and whether all are finite."""

    error: Floats
    own: Floats
    size: Floats
    finite: npt.NDArray[np.bool_]
    broken: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, r: Floats, o: Floats, c: Floats) -> _Norms:
        r, o, c = (array.reshape(len(array), -1) for array in (r, o, c))
        finite = np.asarray(np.isfinite(r).all(axis=1) & np.isfinite(o).all(axis=1))
        broken = np.asarray(finite & ~np.isfinite(c).all(axis=1))
        with np.errstate(all="ignore"):
            error, own, size = (norms(np.where(np.isfinite(x), x, 0.0)) for x in (c - r, o - r, r))
        return cls(np.where(broken, math.inf, error), own, size, finite, broken)

    @property
    def scale(self) -> Scale:
        return Scale.of(self.own, self.size, self.finite)

    def ratios(self, law: Policy | Fidelity, scale: Scale, least: Floats | float = 0.0) -> Floats:
        """Each sample's error over what the law of the sample allows; ``least``: the size it counts as, at least."""
        allowed = law.allowed_sample(self.own, np.maximum(self.size, least), scale)
        return np.where(self.finite, ratios(self.error, allowed), 0.0)


def _judged(
    points: Arrays,
    moving: Sequence[str],
    gradients: Sequence[_Gradient],
    law: Policy | Fidelity,
    rng: np.random.Generator,
) -> list[InputGradient]:
    answers = [gradient.at(points) for gradient in gradients]
    first = {name: _Norms.of(*(answer[name] for answer in answers)) for name in moving}
    over = {name: found.ratios(law, found.scale) for name, found in first.items()}
    suspect = {name: over[name] > 1 for name in moving}
    failing = np.flatnonzero(np.any(list(suspect.values()), axis=0))
    cleared = {name: np.zeros(len(suspect[name]), bool) for name in moving}
    for _ in range(RETRIES if len(failing) else 0):
        # whole batches, for models that take no other
        other = _beside({name: array[_filled(failing, len(array))] for name, array in points.items()}, moving, rng)
        again = [gradient.at(other) for gradient in gradients]
        for name in moving:
            found = _Norms.of(*(answer[name] for answer in again))
            least = first[name].size[_filled(failing, len(over[name]))]
            fine = found.ratios(law, first[name].scale, least)[: len(failing)] <= 1
            cleared[name][failing[fine]] = True
    return [_concluded(name, first[name], over[name], suspect[name], cleared[name], law) for name in moving]


def _filled(rows: npt.NDArray[np.intp], count: int) -> npt.NDArray[np.intp]:
    """The rows, and then the first one again, ``count`` in all."""
    return np.concatenate([rows, np.repeat(rows[:1], count - len(rows))])


def _concluded(
    name: str,
    found: _Norms,
    over: Floats,
    suspect: npt.NDArray[np.bool_],
    cleared: npt.NDArray[np.bool_],
    law: Policy | Fidelity,
) -> InputGradient:
    counted = found.finite & ~(suspect & cleared)
    kinks, excluded = int((suspect & cleared).sum()), int((~found.finite).sum())
    error, own, size = (norm(x[counted]) for x in (found.error, found.own, found.size))
    wrong = suspect & ~cleared
    worst = {"sample": float(over[counted].max(initial=0.0))}
    if isinstance(law, Policy):
        worst["whole"] = float(ratios(np.array(error), np.array(law.allowed_whole(own, size))))
    which = max(worst, key=lambda key: worst[key])
    reason = None
    if not counted.any():
        reason = "nothing left to compare: no sample has a finite gradient beside a kink"
    elif isinstance(law, Policy) and found.scale.share > law.noise_limit:
        reason = "the original's own gradient in float32 is no yardstick: it misses the reference by more than 1/32"
    elif found.broken[counted].any():
        reason = "NaN or infinity where the original's gradient has none"
    elif worst[which] > 1:
        whose = f"sample {int(np.argmax(np.where(counted, over, 0.0)))} ({int(wrong.sum())} fail)"
        reason = f"error {worst[which]:.3g} times what is allowed, {whose if which == 'sample' else 'all samples'}"
    return InputGradient(
        name,
        reason is None,
        decibels(size, error),
        decibels(size, own),
        number(worst[which]),
        which,
        kinks,
        excluded,
        reason,
    )


# --------------------------------------------------------------------------------------------- against differences


@dataclass(frozen=True, eq=False)
class _Compared:
    """Directions: which do not cross a kink, and the error over τ in each."""

    smooth: npt.NDArray[np.bool_]
    error: Floats

    @property
    def agrees(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self.smooth & (self.error <= 1))

    def concluded(self, who: str, asked: npt.NDArray[np.bool_], passed: bool | None, reason: str | None) -> Differences:
        told = self.smooth & asked
        worst = float(self.error[told].max()) if told.any() else None
        return Differences(who, passed, int(told.sum()), int((asked & ~told).sum()), worst, reason)


def _told_original(found: _Compared) -> Differences:
    """The original is not judged: where it disagrees, numbers are no evidence."""
    told, against = int(found.smooth.sum()), int((found.smooth & ~found.agrees).sum())
    reason = None
    if against:
        reason = f"its gradient is not its numerical derivative in {against} of {told} directions, which judge nothing"
    elif not told:
        reason = "every direction meets a kink"
    return found.concluded("original", np.ones_like(found.smooth), None if reason else True, reason)


def _told_fused(found: _Compared, original: _Compared) -> Differences:
    """Judged where the original agrees."""
    asked = original.agrees
    told = found.smooth & asked
    worst = float(found.error[told].max(initial=0.0))
    if not asked.any():
        return found.concluded("fused", asked, None, "the original agrees in no direction: nothing was compared")
    reason = None
    if not told.any():
        reason = "every direction meets a kink: nothing was compared"
    elif worst > 1:
        reason = f"a gradient is {worst:.3g} times further from the numerical difference than is allowed"
    return found.concluded("fused", asked, reason is None, reason)


def _differences(
    gradient: _Gradient, points: Arrays, moving: Sequence[str], directions: int, rng: np.random.Generator
) -> _Compared:
    """One direction through all inputs at a time, for all samples at once, until there are enough."""
    exact = {name: array.astype(np.float64) if name in moving else array for name, array in points.items()}
    slopes = gradient.at(exact)
    count = len(next(iter(points.values())))
    size = math.sqrt(sum(math.prod(points[name].shape[1:]) for name in moving))
    steep = _lengths(slopes)
    step = STEP * np.mean([_rms(points[name]).reshape(count) for name in moving], axis=0) * size
    level = np.abs(gradient.values(exact))
    smooth, errors = [], []
    for _ in range(math.ceil(directions / count)):
        way = {name: rng.standard_normal(points[name].shape) for name in moving}
        length = _lengths(way)
        way = {name: along / _like(length, along) for name, along in way.items()}
        expected = sum((slopes[name] * way[name]).reshape(count, -1).sum(axis=1) for name in moving)
        wide, narrow = (_slope(gradient, exact, way, step * share) for share in (1.0, 0.5))
        margin = AGREEMENT * (np.abs(expected) + steep / size) + 64 * EPS * level / step
        live = np.isfinite(wide) & np.isfinite(narrow) & np.isfinite(expected)
        smooth.append(live & (np.abs(wide - narrow) <= margin))
        errors.append(np.abs(narrow - expected) / np.where(margin > 0, margin, 1.0))
    return _Compared(np.concatenate(smooth), np.concatenate(errors))


def _lengths(vectors: Mapping[str, Floats]) -> Floats:
    """The L2 norm of each sample over all inputs."""
    return norms(np.concatenate([vector.reshape(len(vector), -1) for vector in vectors.values()], axis=1))


def _like(values: Floats, array: Array) -> Floats:
    """One value for each sample, shaped to multiply with."""
    return values.reshape(-1, *[1] * (array.ndim - 1))


def _slope(gradient: _Gradient, points: Arrays, way: Arrays, step: Floats) -> Floats:
    ends = []
    for sign in (1.0, -1.0):
        moved = {name: array + sign * _like(step, array) * way[name] for name, array in points.items() if name in way}
        ends.append(gradient.values({**points, **moved}))
    return np.asarray((ends[0] - ends[1]) / (2 * step))
