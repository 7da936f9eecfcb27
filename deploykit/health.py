"""Health: what a trained model's numbers say about its training, one warning per layer and complaint.

Nothing here stands against fusing: a sick model is fused exactly into an equally sick one. A warning names the
layer, gives the number that decided, and says what to do. Each complaint is one row of `ROWS`: a code, the
predicate that returns the finding as half a sentence (or None), and the remedy as the other half.

A BatchNormalization computes

    y = gamma·(x - mean)/sigma + beta,   sigma = sqrt(variance + epsilon)

and its statistics are moving averages that start at mean 0, variance 1. After n training steps

    variance = m^n·1 + (1 - m)·sum(m^(n-k)·v_k),   v_k >= 0 the variance of batch k,

so the share m^n of the initial values that is still inside is at most the smallest variance. This bound needs
nothing but the file, and it acquits: a momentum is only called too high while no variance of the layers that were
trained with it leaves less room than the share. (A pretrained model that was fine-tuned for a few steps passes.)

A warning must be worth reading, so every threshold lies where float arithmetic, not taste, puts it, and far from
what healthy trained nets hold; the constants below say how far. Weights of either sign are healthy. Layers whose
weights are not finite are left to `deploykit.load.nonfinite_weights`.

Limits: only the weights are judged, not what flows through them. Of a nested model that stays opaque in the
trace, calls with training=True inside it are not seen. A channel that died early and whose variance is still
decaying from 1 is found once the decay has passed `VANISHES`, not before. The number of training steps is known
only where the file carries its optimizer (`training_steps`), and counts since the last compile.
"""

from __future__ import annotations

import contextlib
import io
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import numpy.typing as npt

from deploykit.graph import Node, Trace, numpy
from deploykit.load.hdf5 import open_checked

L = keras.layers
Vector = npt.NDArray[np.float64]

# Half a unit in the last place of half precision (float16, and TF32, in which GPUs may multiply float32): beside a
# value of size 1 anything smaller is rounded away. Trained nets keep a wide gap around it: their faintest live
# channels, the almost black corner pixels of an input, stand at 1e-2, their dead ones below 1e-6.
VANISHES = 2.0**-11

# Ten of float32's 24 bits, three of its seven decimal digits. What is left is just above half precision.
# Trained nets reach a gamma/sigma of some tens (with Keras' epsilon of 0.001 a gamma of 1 makes at most 32).
AMPLIFIES = 2.0**10

# The line for every dtype: float32 and bfloat16 share their exponent range, and wider weights end up there. float16
# has its own denormals below 6e-5, where ordinary weights live, and none of its values comes down to this line.
SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)

# The share of the initial statistics from which on they are called unfinished: a variance of 0.1, a common one, then
# still reads 45 % too large. Much less is lost in the scatter that every moving average keeps.
INITIAL_SHARE = 0.05

# Without a step count a momentum is only doubted from here on: 0.9999 takes 30,000 steps to bring the initial
# share below 5 %, where 0.999, the slowest in common use, takes 3,000.
SLOW_MOMENTUM = 0.9999

# An average with momentum m has the noise of (1 + m)/(1 - m) batches: 199 at 0.99, 9 at 0.8, less than 3 below
# 0.5. That is no average; the usual cause is the other convention, in which 0.1 means what Keras calls 0.9.
FAST_MOMENTUM = 0.5

MAX_ARCHIVED_BYTES = 256 << 20  # an archive's weights are unpacked in memory to find one number; not beyond this

FEW = 4  # channels, weights or layers that a sentence names before it counts
LIMIT = 3  # findings of one code that are told one by one


@dataclass(frozen=True)
class Finding:
    """One complaint about one layer. ``code`` is a key of `CODES`; ``message`` says what is wrong and what to do."""

    layer: str
    code: str
    message: str

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"unknown health code {self.code!r}")

    def __str__(self) -> str:
        return f"{self.layer}: {self.message}"


@dataclass(frozen=True, eq=False)
class Weights:
    """The floating-point weights of a layer: (name, value) pairs, as stored."""

    layer: str
    values: tuple[tuple[str, npt.NDArray[Any]], ...]


@dataclass(frozen=True, eq=False)
class Norm:
    """A BatchNormalization with finite weights, one float64 value per channel.

    ``by_batch``, ``by_moving``: whether some call normalises by its batch, and by the moving statistics.
    ``fresh_start``: it is updated in training, and its moving variance began at one. ``room``: the smallest
    variance among all such layers of its momentum, which bounds the initial share. ``steps``: training steps, None
    if unknown.
    """

    layer: str
    gamma: Vector
    beta: Vector
    mean: Vector
    variance: Vector
    epsilon: float
    momentum: float
    by_batch: bool
    by_moving: bool
    fresh_start: bool
    steps: int | None
    room: float = math.inf

    @property
    def sigma(self) -> Vector:
        """What the layer divides by; 0 where variance + epsilon is negative."""
        return np.asarray(np.sqrt(np.maximum(self.variance + self.epsilon, 0.0)))

    @property
    def constant(self) -> npt.NDArray[np.bool_]:
        """Channels whose input varied by less than `VANISHES` of what the layer divides it by."""
        return np.asarray(np.sqrt(np.maximum(self.variance, 0.0)) <= VANISHES * self.sigma)

    @property
    def untouched(self) -> bool:
        return bool((self.mean == 0).all() and (self.variance == 1).all())


def _some(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:FEW])) + (", ..." if len(names) > FEW else "")


def _channels(which: npt.NDArray[np.bool_]) -> str:
    """How many channels and the first few: "3 of 32 channels (0, 4, 17)"."""
    return f"{np.count_nonzero(which)} of {which.size} channels ({_some(np.flatnonzero(which).tolist())})"


# ------------------------------------------------------------------------------------------- the predicates


def _training_mode(norm: Norm) -> str | None:
    if not norm.by_batch:
        return None
    return "it is called with training=True, so where no other mode is asked for each answer depends on its batch"


def _never_updated(norm: Norm) -> str | None:
    if not (norm.by_moving and norm.untouched):
        return None
    fresh = bool((norm.gamma == 1).all() and (norm.beta == 0).all())
    more = "; gamma and beta are initial, too" if fresh else ", although gamma and beta were trained"
    return f"mean 0 and variance 1 in all {norm.mean.size} channels: its statistics were never updated{more}"


def _negative_variance(norm: Norm) -> str | None:
    if not (norm.by_moving and (bad := norm.variance < 0).any()):
        return None
    return f"{_channels(bad)} have a negative variance, down to {norm.variance.min():.3g}"


def _dead_variance(norm: Norm) -> str | None:
    # sqrt(variance)/sigma is how much of the channel's output is left of the 1 that normalising aims at
    dead = norm.constant & (norm.variance >= 0)
    if not (norm.by_moving and dead.any()):
        return None
    largest = norm.variance[dead].max()
    return f"{_channels(dead)} carry a constant: variance at most {largest:.2g} against epsilon {norm.epsilon:.2g}"


def _dead_gamma(norm: Norm) -> str | None:
    # beside the layer's largest gamma, but no further up than the 1 that gamma starts at: one huge gamma must not
    # make the others look dead
    size = np.abs(norm.gamma)
    dead = size <= VANISHES * min(size.max(), 1.0)
    if not dead.any():
        return None
    largest = size[dead].max()
    return f"{_channels(dead)} are switched off: |gamma| at most {largest:.2g}, the largest is {size.max():.2g}"


def _amplification(norm: Norm) -> str | None:
    sigma = np.where(norm.sigma > 0, norm.sigma, np.inf)
    gain = np.abs(norm.gamma) / sigma
    loud = gain >= AMPLIFIES
    if not (norm.by_moving and loud.any()):
        return None
    return f"{_channels(loud)} amplify rounding: gamma/sigma up to {gain.max():.2g}, {math.log2(gain.max()):.0f} bits"


def _cancellation(norm: Norm) -> str | None:
    # x is about mean and known to 2^-24 of it; what is left of it after the subtraction is about sigma
    sigma = np.where(norm.sigma > 0, norm.sigma, np.inf)
    ratio = np.where(norm.constant, 0.0, np.abs(norm.mean) / sigma)  # a constant has no signal to lose
    lost = ratio >= AMPLIFIES
    if not (norm.by_moving and lost.any()):
        return None
    return f"{_channels(lost)} cancel: |mean|/sigma up to {ratio.max():.2g} costs {math.log2(ratio.max()):.0f} bits"


def _momentum_high(norm: Norm) -> str | None:
    m = norm.momentum
    if not (norm.by_moving and norm.fresh_start and 0 < m < 1) or norm.untouched:
        return None  # frozen, or never moved at all, is not a question of momentum
    if norm.steps is not None:
        share = m**norm.steps
        if share <= INITIAL_SHARE or norm.room < share * (1 - 1e-3):  # float32 moving averages are good to 1e-3
            return None
        return (
            f"{norm.steps:,} training steps with momentum {m:g} leave {100 * share:.0f} % of the initial mean 0 and "
            f"variance 1 in its statistics (the smallest variance trained with it, {norm.room:.2g}, agrees)"
        )
    if m < SLOW_MOMENTUM or norm.room < INITIAL_SHARE:
        return None
    needed = math.ceil(math.log(INITIAL_SHARE) / math.log(m))
    return (
        f"momentum {m:g} needs {needed:,} training steps to forget the initial statistics, and no variance "
        f"trained with it (the smallest is {norm.room:.2g}) shows that it had them"
    )


def _momentum_low(norm: Norm) -> str | None:
    m = norm.momentum
    if not (norm.by_moving and 0 <= m < FAST_MOMENTUM) or norm.untouched:
        return None
    return f"momentum {m:g} averages no more than {(1 + m) / (1 - m):.1f} batches, so its statistics are still noisy"


def _denormals(weights: Weights) -> str | None:
    counts = []
    for name, value in weights.values:
        size = np.abs(value.astype(np.float64))
        if number := int(np.count_nonzero((size > 0) & (size < SMALLEST_NORMAL))):
            counts.append(f"{name} {number} of {value.size}")
    if not counts:
        return None
    what = f"values below {SMALLEST_NORMAL:.2g}, which some runtimes flush to zero and others compute slowly with"
    return f"{what} ({_some(counts)})"


# ------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Row:
    """One complaint: what it means for several layers, how it is found in one, and what to do about it."""

    code: str
    meaning: str
    remedy: str
    judge: Callable[[Norm], str | None] | None = None
    judge_weights: Callable[[Weights], str | None] | None = None


RECALIBRATE = "run `deploykit recalibrate` with training data"

ROWS: tuple[Row, ...] = (
    Row(
        "training_mode",
        "BatchNormalization is called with training=True and normalises by the batch",
        "build the model again without training=True in that call, then load these weights",
        _training_mode,
    ),
    Row(
        "never_updated",
        "the moving statistics were never updated: mean 0, variance 1 in every channel",
        f"unless a plain scale and shift is meant, {RECALIBRATE}",
        _never_updated,
    ),
    Row(
        "negative_variance",
        "a moving variance is negative, which no training produces",
        "the file is damaged or was converted wrongly: take it from its source again",
        _negative_variance,
    ),
    Row(
        "dead_variance",
        "dead channels: the moving variance is nearly zero beside epsilon",
        "prune them with the filters in front; if they should live, rescale the input or lower the learning rate "
        "and train again",
        _dead_variance,
    ),
    Row(
        "dead_gamma",
        "dead channels: gamma is nearly zero beside the largest gamma of the layer",
        "prune them (what is left is beta, a constant); if they should live, train with less decay on gamma",
        _dead_gamma,
    ),
    Row(
        "amplification",
        "gamma/sigma is so large that it amplifies rounding",
        "keep this layer in float32 and compare on real data; train again with a larger epsilon or decay on gamma",
        _amplification,
    ),
    Row(
        "cancellation",
        "the mean is so large beside sigma that subtracting it cancels digits",
        "centre what enters the model, or the layer in front, and train again; keep this layer in float32 until then",
        _cancellation,
    ),
    Row(
        "momentum_high",
        "the momentum is too high for the training: the statistics still hold their initial values",
        f"train longer or with a lower momentum, or {RECALIBRATE}",
        _momentum_high,
    ),
    Row(
        "momentum_low",
        "the momentum is so low that the statistics are those of the last batch or two",
        f"use 0.9 to 0.99 (another library's 0.1 is 0.9 here), and {RECALIBRATE}",
        _momentum_low,
    ),
    Row(
        "denormals",
        "weights too small for a normal float32",
        "set them to zero and save again",
        judge_weights=_denormals,
    ),
)

CODES: Mapping[str, str] = {row.code: row.meaning for row in ROWS}


# ------------------------------------------------------------------------------------------------- reading


def _vector(value: Any) -> Vector:
    return numpy(value).astype(np.float64).ravel()


def _norms(nodes: Sequence[Node], steps: int | None) -> Iterator[Norm]:
    """The BatchNormalizations of a layer, itself or inside a wrapper, from all its calls."""
    node = nodes[0]
    for part in node.layer._flatten_layers() if isinstance(node.layer, L.Layer) else ():
        if not isinstance(part, L.BatchNormalization) or not part.built:
            continue
        mean, variance = _vector(part.moving_mean), _vector(part.moving_variance)
        gamma = _vector(part.gamma) if part.scale else np.ones_like(mean)
        beta = _vector(part.beta) if part.center else np.zeros_like(mean)
        if not all(np.isfinite(values).all() for values in (mean, variance, gamma, beta)):
            continue
        by_batch = [bool(call.training and part.trainable) for call in nodes]  # Keras ignores training=True once frozen
        yield Norm(
            layer=node.name if part is node.layer else f"{node.name}/{part.name}",
            gamma=gamma,
            beta=beta,
            mean=mean,
            variance=variance,
            epsilon=float(part.epsilon),
            momentum=float(part.momentum),
            by_batch=any(by_batch),
            by_moving=not all(by_batch),
            fresh_start=part.trainable and isinstance(part.moving_variance_initializer, keras.initializers.Ones),
            steps=steps,
        )


def _weights(node: Node) -> Weights:
    variables = [v for v in getattr(node.layer, "weights", ()) if "float" in str(v.dtype)]
    return Weights(node.name, tuple((v.path.rpartition(f"{node.layer.name}/")[2], numpy(v)) for v in variables))


def examine(found: Trace, steps: int | None = None) -> tuple[Finding, ...]:
    """What is unhealthy about the layers of a trace, in running order; a layer called several times counts once.

    ``steps``: how many training steps the model had, where that is known (`training_steps`).
    """
    calls: dict[int, list[Node]] = {}
    for node in found.nodes:
        calls.setdefault(id(node.layer), []).append(node)
    layers = [tuple(_norms(nodes, steps)) for nodes in calls.values()]
    rooms: dict[float, float] = {}
    for norm in (norm for norms in layers for norm in norms if norm.fresh_start):
        rooms[norm.momentum] = min(rooms.get(norm.momentum, math.inf), float(norm.variance.min()))
    findings = []
    for nodes, norms in zip(calls.values(), layers, strict=True):
        for row in ROWS:
            said = []
            if row.judge:
                said = [
                    (norm.layer, row.judge(replace(norm, room=rooms.get(norm.momentum, math.inf)))) for norm in norms
                ]
            elif row.judge_weights:
                said = [(nodes[0].name, row.judge_weights(_weights(nodes[0])))]
            findings += [Finding(layer, row.code, f"{what}; {row.remedy}") for layer, what in said if what]
    return tuple(findings)


def summary(findings: Sequence[Finding], limit: int = LIMIT) -> list[str]:
    """Findings as lines: up to ``limit`` of one code in full, more of them as one line; in the table's order."""
    order = {row.code: index for index, row in enumerate(ROWS)}
    lines: list[str] = []
    for code, group in groupby(sorted(findings, key=lambda finding: order[finding.code]), lambda finding: finding.code):
        same = list(group)
        if len(same) <= limit:
            lines += map(str, same)
            continue
        row = ROWS[order[code]]
        names = _some([finding.layer for finding in same])
        example = same[0].message.removesuffix(f"; {row.remedy}")
        lines.append(
            f"{len(same)} layers ({names}): {row.meaning} (in {same[0].layer}: {example}); {row.remedy}; "
            "`inspect --json` has each layer"
        )
    return lines


# ------------------------------------------------------------------------------------------ training steps


def _count(dataset: Any) -> int:
    """The value of a dataset that holds one whole number, else 0. Keras 2.0 kept its counter as a float."""
    if not isinstance(dataset, h5py.Dataset) or dataset.shape != () or dataset.dtype.kind not in "iuf":
        return 0
    value = float(dataset[()])
    return int(value) if math.isfinite(value) and value > 0 and value == int(value) else 0


def _counters(weights: h5py.File) -> Iterator[int]:
    """Every optimizer counter in a file; a loss-scaling optimizer has one that stands still and one inside it."""
    for place in ("optimizer", "optimizer/inner_optimizer"):  # the weights in a .keras archive, numbered
        yield _count(weights.get(f"{place}/vars/0"))
    names: list[str] = []
    if isinstance(group := weights.get("optimizer_weights"), h5py.Group):  # a whole model in HDF5, named
        group.visit(names.append)
    for name in names:
        if name.rpartition("/")[2].partition(":")[0] in ("iter", "iteration", "iterations"):
            yield _count(group[name])


@contextlib.contextmanager
def _stored(path: Path) -> Iterator[h5py.File | None]:
    """The HDF5 file of a model's weights; None where an archive's are larger than `MAX_ARCHIVED_BYTES`."""
    source: Path | io.BytesIO = path
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo("model.weights.h5").file_size > MAX_ARCHIVED_BYTES:
                yield None
                return
            source = io.BytesIO(archive.read("model.weights.h5"))
    with open_checked(source, str(path)) as weights:
        yield weights


def training_steps(path: Path) -> int | None:
    """How many steps the optimizer in a model file has counted; None where the file does not say.

    Reads whole-model HDF5 files and ``.keras`` archives whose weights are no larger than `MAX_ARCHIVED_BYTES`.
    """
    try:
        with _stored(path) as weights:
            return None if weights is None else max(_counters(weights)) or None
    except Exception:  # zipfile, zlib and h5py have no common base, and an unknown count only makes health quieter
        return None


def optimizer_arrays(path: Path) -> int | None:
    """How many arrays of optimizer state a model file holds, None where it does not say; reads as `training_steps`."""
    found: list[str] = []
    try:
        with _stored(path) as weights:
            if weights is None:
                return None
            for place in ("optimizer", "optimizer_weights"):
                if isinstance(group := weights.get(place), h5py.Group):
                    group.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    except Exception:  # as above
        return None
    return len(found)
