#!/usr/bin/env python3
"""Prove a bundle on the machine that will run it: standard library, numpy and onnxruntime, nothing else.

    python BUNDLE_DIR/verify.py [--provider NAME] [--threads N] [--seconds S] [--json PATH|-]
    python BUNDLE_DIR/verify.py --predict FILE [--output FILE.npz]

Exit codes: 0 equivalent, 1 not equivalent (or nothing was compared), 2 bad usage, a changed file or a missing
component (one line ``error: ...``), 70 an internal error, 130 interrupted. Runs on Python 3.9 and later.

This file is copied into every bundle, so it is the one home of the arithmetic by which deploykit judges: what
"equivalent" means, what a timing means, how a manifest is sealed.

What "equivalent" means
-----------------------
r is the reference (the trained model in float64), o the original (the trained model's own float32 answer), c the
candidate. A float32 evaluation of a sum Σ aᵢ·bᵢ errs by about eps·Σ|aᵢ·bᵢ| (Higham, *Accuracy and Stability of
Numerical Algorithms*, 2nd ed., sec. 3.1): the error grows with the magnitudes that were summed, not with the
result. Elementwise relative error therefore means nothing near zero, and no fixed tolerance fits both a tame and
an ill-conditioned net. The one honest yardstick is what float32 did to *this* model on *these* inputs: o − r.
Two correct evaluation orders differ from r by two draws of the same size, so c − r is compared with a small
multiple of o − r. With N(s) = norm of (o − r) of sample s, R(s) = norm of r of sample s, these laws must hold:

    whole      ‖c−r‖      ≤ 4·‖o−r‖ + 4·eps·‖r‖                                       L2 over the output
    sample     ‖c_s−r_s‖  ≤ 8·max(N(s), q·S(s)) + 4·eps·S(s)                          L2 of each sample
    element    max|c_s−r_s| ≤ 16·max(N(s), q·S(s)) + 4·eps·S(s)                       the same in the maximum norm
    channel    rms(c_k−r_k) ≤ 16·max(n(k), p·T(k)) + 4·eps·T(k)                       over samples and positions
    top-1      a changed answer is excused where r's margin ≤ 2·(4·max(N(s), q·S(s)) + 4·eps·S(s)), maximum norm

* eps = 2⁻²³. The floor 4·eps covers the rounding of the stored reference, and a yardstick that is zero by luck.
  4·x + 4·y < 10·max(x, y): a candidate more than ten times as wrong as the original, and by more than 10·eps,
  never passes the first law.
* The sample law keeps one huge sample from hiding a wrong small one. S(s) = max(R(s), the lower median of R): a
  sample that is small by cancellation still carries the rounding of what cancelled. *Lower* median, so that of two
  samples the smaller sets the scale. o may hit one sample by luck, so its own noise is pooled: q = the 90th
  percentile of N/S, rounded down to a sample, so that one rogue sample never sets it. (With the median instead, an
  ill-conditioned net with one number per sample fails correct candidates several times as often.) Samples with R = 0
  stay out of both.
* The channel law keeps a price of a million from hiding the wrong probabilities joined to it: one norm over both sees
  the price alone. A channel is an index k of one axis of a sample, and every axis is taken in turn; n(k) is the rms
  of o − r in it, T(k) the larger of its rms and min(1, rms of the output), p the 90th percentile of n/T. The 1 is
  there because runtimes compute sigmoid and softmax to an absolute accuracy of some eps: a rare class beside likely
  ones has no relative one. So what is smaller than its output *and* than 1 is held to the larger of both. A class
  that is likely in one sample of many has one draw, however many samples there are, and of a thousand such classes o
  is lucky in some. ‖r_k‖²/max|r_k|² counts the draws of a channel; where they are fewer than eight, n(k) is at least
  rms(r_k)·‖o−r‖/‖r‖, what the whole output shows. The law takes an original (a bundle that carries none of its errors
  by channel is not held to it), and 2⁻¹²⁶ is added for runtimes that make zeros of denormal numbers.
* The factors grow with the number of things that must hold together (1, samples, channels, elements): the largest of
  many draws exceeds the typical one. Top-1 takes the whole law's factor, because an answer that two errors of that size
  cannot turn was turned by something else.
* An original that misses the reference by more than 1/32 is no yardstick: that fails, whatever c is.
* Without an original (an opaque graph is its own reference) the yardstick is 32·eps of each sample, and the result
  is called passed, not proven.

Lower precisions cannot be held to float32's error. A candidate that computes in float16 (unit roundoff u = 2⁻¹¹) or
bfloat16 (2⁻⁸) is judged by what it keeps:

    whole      SNR = 20·log10(‖r‖/‖c−r‖) of at least 40 dB (float16), 22 dB (bfloat16), 20 dB (int8)
    sample     12 dB less in each sample, against S(s)
    answers    98 % (float16) or 95 % of the samples keep their largest class, but for those whose margin is at most
               twice the error that the first line allows; of whole numbers, the same share stays

Rounding after each of L layers adds up like a random walk to u·√L, an SNR of 66 − 10·log10(L) dB for float16 and
48 − 10·log10(L) for bfloat16: the bounds leave room for about 400 layers, or for as much ill-conditioning. Eight bits
hold at best 50 dB in each tensor (6.02·8 + 1.76), of which calibration to outliers and depth leave half. A model that
passes here is no longer the same but as good as; accuracy on labelled data says more.

NaN and infinity: a sample in which o and r disagree about them (float32 overflow) is *excluded*: its noise is
null, it is counted, not judged. Everywhere else c must have r's pattern exactly. If nothing is left, that fails.

Integers, booleans and strings carry no margin that would tell a rounding error from a wrong answer. Elements in which
o itself differs from r (its flips) are excused; a sample that consists of them is excluded. Of the n others in all, and
of the n_s in a sample, where o has F and F_s flips, so many may differ:

    whole      f(4, F, n, 2⁻¹⁰)             f(k, F, n, h) = min(k·F, h·n) + min(k, h·n/4) + h·n/64
    sample     f(8, F_s, n_s, 2⁻⁶)

An answer flips where the margin is below the error, so flips are as many as the error is large, and the factors are
those of the norms. They are rare: Poisson's law. The second term is for its luck: two draws of one mean, whatever it
is, part by more than 4·F + 4 in less than 1 % of cases. The third is what errors of a few eps turn where margins are
spread evenly. The shares h keep an original that flips everywhere from excusing everything, and small outputs strict:
below 3,856 elements in all, or 241 in a sample (a class for each), every flip is o's own or a failure. Whole numbers
that no rounding reaches (counts, codes) are exact under ``Tolerance()``.

Limits: the laws need draws. With one number per sample and few samples, luck in o can fail a correct candidate; give
``Noise.between`` several float32 runs, or more samples (`deploykit check` draws o again where there are few, and in
single samples that fail, or by which a channel or the whole does). A runtime whose sigmoid has *absolute* accuracy
fails the relative laws on an output that is saturated in most samples: compare before the sigmoid as well.

What a timing means
-------------------
A round measures a and b next to each other, so drift cancels in log(median a / median b). If a and b are equally fast,
exchanging them changes nothing: the logs are distributed symmetrically about 0, whatever the noise. Hence the estimate
is Hodges' and Lehmann's (the median of all pairwise means of the rounds' logs) and its interval inverts Wilcoxon's
signed-rank test, which assumes that symmetry, independent rounds and no shape (Hollander, Wolfe & Chicken,
*Nonparametric Statistical Methods*, 3rd ed., sec. 3.1-3.3). The level is 1 − 2/2⁶ = 96.9 %, the best that six rounds,
the fewest, can give. The simulation behind it, and what other intervals do in it, stand in `deploykit.stats`.

What a session profile means
----------------------------
``session`` in the manifest, where it is there, is how ONNX Runtime's CPU provider is to be opened: the settings that
`deploykit bench BUNDLE --tune-session` found faster than the defaults (``SessionSettings``), and where it measured
them. This file opens, judges and times the model so; the ``environment`` of the report says what was applied.
``--threads`` wins over the profile's threads, other providers take nothing of it, and on another processor there is a
notice. A setting that this version does not know is refused, not ignored: the model would run otherwise than it was
proven.

ONNX Runtime flushes denormal numbers on the thread that opens the session as well, so with ``denormals_as_zero`` the
judgement runs on a thread that is older than the session: one that takes 1e-40 for zero cannot see that it was lost.

What a seal means
-----------------
The manifest holds the SHA-256 of every file and of itself, so damage and careless edits are caught. It is no
signature: whoever rewrites file, hash and seal together is not caught.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import platform
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

try:
    import numpy as np
except ImportError:  # pragma: no cover - exercised in a subprocess
    if __name__ != "__main__":
        raise
    sys.stderr.write("error: numpy is not installed; run: pip install numpy onnxruntime\n")
    sys.exit(2)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]
    Floats = NDArray[np.float64]

EPS32 = 2.0**-23
SCHEMA = "deploykit.verify/1"
BUNDLE_SCHEMA = "deploykit.bundle/1"
MANIFEST = "deploykit.json"


class RefusedError(ValueError):
    """The request or the material cannot be judged at all: exit 2, one line that names the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


LINE = 400  # characters of a reason


def _one_line(text: object, limit: int = LINE) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


# --------------------------------------------------------------------------------------------------------------
# Comparison
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """How far a candidate of one precision may be from the reference; the laws are in the module docstring."""

    name: str
    factor_whole: float
    factor_sample: float
    factor_element: float  # of channels too
    factor_top1: float
    floor_l2: float
    floor_max: float
    noise_limit: float  # an original further off than this, relative L2, is no yardstick
    default_noise: float  # the yardstick where there is no original, relative to each sample

    def allowed_whole(self, own: float, size: float) -> float:
        """The L2 error that all samples together may have."""
        return self.factor_whole * own + self.floor_l2 * size

    def allowed_sample(self, own: Floats, size: Floats, scale: Scale) -> Floats:
        """The L2 error that each sample may have."""
        return self.factor_sample * scale.own(own, size) + self.floor_l2 * scale.size(size)

    def allowed_element(self, own: Floats, size: Floats, scale: Scale) -> Floats:
        """The largest error of one element that each sample may have; all arguments in the maximum norm."""
        return self.factor_element * scale.own(own, size) + self.floor_max * scale.size(size)

    def allowed_margin(self, own: Floats, size: Floats, scale: Scale) -> Floats:
        """The margin of a largest class, in the reference, that rounding may turn; in the maximum norm."""
        return 2 * (self.factor_top1 * scale.own(own, size) + self.floor_max * scale.size(size))

    def allowed_channel(self, own: Floats, size: Floats, draws: Floats) -> Floats:
        """The RMS error that each channel may have; of all channels of an output, both in RMS.

        ``draws``: how many values of its size a channel has; of few, the output as a whole is the yardstick.
        """
        least = min(1.0, norm(size) / math.sqrt(len(size)))
        scale = Scale(least, quantile(ratios(own, np.maximum(size, least)), POOLED))
        share = norm(own) / (norm(size) or math.inf)
        own = np.maximum(scale.own(own, size), np.where(draws < FEW, share * size, 0.0))
        return self.factor_element * own + self.floor_l2 * scale.size(size) + FLUSHED

    def allowed_flips(self, own: float, count: float) -> float:
        """How many of so many whole numbers may differ, where the original has ``own`` others."""
        return float(_allowed_flips(self.factor_whole, own, count, FLIPS_WHOLE))

    def allowed_sample_flips(self, own: Array, count: Array) -> Floats:
        """The same of each sample."""
        return np.asarray(_allowed_flips(self.factor_sample, own, count, FLIPS_SAMPLE), dtype=np.float64)


def _allowed_flips(factor: float, own: Any, count: Any, share: float) -> Any:
    return np.minimum(factor * own, share * count) + np.minimum(factor, share / 4 * count) + share / 64 * count


@dataclass(frozen=True)
class Fidelity:
    """How much of the reference a candidate of a lower precision must keep; the laws are in the module docstring."""

    name: str
    snr_db: float  # of the whole output
    sample_db: float  # of each sample, against its size or the median size
    top1: float  # share of samples whose answer must stay

    def allowed_whole(self, own: float, size: float) -> float:
        """The L2 error that all samples together may have, whatever the original's own."""
        return float(10 ** (-self.snr_db / 20) * size)

    def allowed_sample(self, own: Floats, size: Floats, scale: Scale) -> Floats:
        """The L2 error that each sample may have."""
        return float(10 ** (-self.sample_db / 20)) * scale.size(size)

    def allowed_element(self, own: Floats, size: Floats, scale: Scale) -> Floats:
        """No law holds a single element."""
        return np.full(np.shape(size), math.inf)

    def allowed_margin(self, own: Floats, size: Floats, scale: Scale) -> Floats:
        """The margin of a largest class, in the reference, that rounding may turn; in the maximum norm."""
        return 2 * float(10 ** (-self.snr_db / 20)) * scale.size(size)


POOLED = 0.9  # nine of ten samples have a smaller own error, relative to their size, than a sample is credited with
FEW = 8  # values of a channel's size: of fewer, luck decides
FLUSHED = 2.0**-126  # what is lost where a runtime makes zeros of denormal numbers
FLIPS_WHOLE, FLIPS_SAMPLE = 2.0**-10, 2.0**-6  # the share of whole numbers up to which flips of the original excuse


@dataclass(frozen=True)
class Scale:
    """What holds a sample up that is small, or that the original hit by luck; in one norm.

    ``median``: the lower median of the sizes. ``share``: the pooled own error q, relative to the size.
    """

    median: float = 0.0
    share: float = 0.0

    @classmethod
    def of(cls, own: Floats, size: Floats, judged: NDArray[np.bool_] | None = None) -> Scale:
        """From the original's own errors and the reference's norms of the samples that are judged (default: finite)."""
        known = (np.isfinite(own) if judged is None else judged) & (size > 0)
        median = quantile(size[known], 0.5)
        return cls(median, quantile(own[known] / np.maximum(size[known], median), POOLED))

    def size(self, size: Floats) -> Floats:
        """S(s) of the module docstring."""
        return np.maximum(size, self.median)

    def own(self, own: Floats, size: Floats) -> Floats:
        """max(N(s), q·S(s))."""
        return np.maximum(own, self.share * self.size(size))


FLOAT32 = Policy("float32", 4.0, 8.0, 16.0, 4.0, 4 * EPS32, 4 * EPS32, 2.0**-5, 32 * EPS32)

# One row per precision.
POLICIES: dict[str, Policy | Fidelity] = {
    "float32": FLOAT32,
    "float16": Fidelity("float16", 40.0, 28.0, 0.98),
    "bfloat16": Fidelity("bfloat16", 22.0, 10.0, 0.95),
    "int8": Fidelity("int8", 20.0, 8.0, 0.95),
}


@dataclass(frozen=True)
class Tolerance:
    """The user's own law instead of a policy: |c − r| ≤ atol + rtol·|r| for every element, as in numpy's allclose."""

    rtol: float = 0.0
    atol: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not is_number(value) or value < 0:
                raise RefusedError(f"{name} is {value!r}; give a finite number that is not negative")

    def allowed(self, reference: Floats) -> Floats:
        """What each element may be off by."""
        return self.atol + self.rtol * np.abs(reference)


if TYPE_CHECKING:
    Law = Policy | Fidelity | Tolerance


@dataclass(frozen=True)
class Noise:
    """The original's own error: what a bundle carries instead of the original's outputs.

    ``l2`` and ``max_abs`` are, for each sample, the norms of original − reference over the elements that are finite
    in both; ``None`` marks a sample in which the two disagree about NaN or infinity (or, for exact kinds, everywhere).
    ``channels``: for each axis of a sample, the last first, the L2 norm for each of its indices, over all samples that
    are not None. ``flips``: for exact kinds, the positions in each flattened sample where the two differ. Either may be
    unknown: then nothing is held to it, and nothing excused by it.
    A bundle stores the reference rounded to the model's dtype: take the noise against that rounded reference.
    """

    l2: tuple[float | None, ...]
    max_abs: tuple[float | None, ...]
    channels: tuple[tuple[float, ...], ...] | None = None
    flips: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def between(cls, reference: Array, *originals: Array) -> Noise:
        """Measure one or several float32 evaluations against the reference; of several, the largest counts."""
        if not originals:
            raise RefusedError("noise needs the answer of the original; give at least one")
        runs = [_noise_of(np.asarray(reference), np.asarray(original)) for original in originals]
        return functools.reduce(_larger_noise, runs)

    def to_json(self) -> dict[str, Any]:
        record: dict[str, Any] = {"l2": list(self.l2), "max": list(self.max_abs)}
        if self.channels is not None:
            record["channels"] = [list(axis) for axis in self.channels]
        if self.flips is not None:
            record["flips"] = [list(places) for places in self.flips]
        return record

    @classmethod
    def from_json(cls, record: object) -> Noise:
        """The record that ``to_json`` wrote; anything else is refused."""
        parts: Any = [
            record.get(key) if isinstance(record, dict) else None for key in ("l2", "max", "channels", "flips")
        ]
        l2, peak, channels, flips = parts
        if not (_is_errors(l2) and _is_errors(peak)) or [v is None for v in l2] != [v is None for v in peak]:
            raise RefusedError(
                'a noise record must be {"l2": [...], "max": [...]}, alike in length and nulls; measure again'
            )
        axes = [channels] if _is_errors(channels) and channels else channels  # a bundle of old knows the last axis only
        if axes is not None and not (
            isinstance(axes, list) and all(_is_errors(axis) and None not in axis for axis in axes)
        ):
            raise RefusedError("the channels of a noise record must be numbers that are not negative; measure again")
        if flips is not None and not (
            isinstance(flips, list) and len(flips) == len(l2) and all(map(_is_places, flips))
        ):
            raise RefusedError("the flips of a noise record must be a list of positions per sample; measure again")
        return cls(
            tuple(None if v is None else float(v) for v in l2),
            tuple(None if v is None else float(v) for v in peak),
            None if axes is None else tuple(tuple(map(float, axis)) for axis in axes),
            None if flips is None else tuple(map(tuple, flips)),
        )


def _is_errors(values: Any) -> bool:
    """A list of finite numbers that are not negative, or None."""
    return isinstance(values, list) and all(v is None or (is_number(v) and v >= 0) for v in values)


def _is_places(values: Any) -> bool:
    """A list of positions."""
    return isinstance(values, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)


@dataclass(frozen=True)
class OutputComparison:
    """What was found for one output. ``reason`` is None where it passed; every float is finite or None.

    ``samples`` were there, ``excluded`` of them not judged; ``worst_index`` counts within the sample and is the
    element furthest beyond (or nearest to) what is allowed. ``noise_ratio`` is the candidate's L2 error over the
    original's, ``spread`` the standard deviation between samples over the rms: below 1e-6 the output is
    ``insensitive``, no evidence. ``yardstick`` says what it was measured by. ``top5_agreement`` is the share of
    samples whose five largest classes are (a choice of) the reference's. ``ulp`` has percentiles of |c − r| in
    units in the last place of r, each at most 1.19 times the exact one, and how many values lie up to each power
    of two. ``kl`` has the mean and the largest Kullback-Leibler divergence Σ r·ln(r/c) − r + c, in nats, where an
    output is a distribution along its last axis.
    """

    name: str
    passed: bool
    reason: str | None = None
    yardstick: str | None = None
    samples: int = 0
    excluded: int = 0
    exact: bool = False
    snr_db: float | None = None
    reference_snr_db: float | None = None
    noise_ratio: float | None = None
    max_abs: float | None = None
    max_rel: float | None = None
    cosine: float | None = None
    top1_agreement: float | None = None
    top5_agreement: float | None = None
    kl: dict[str, float | None] | None = None
    ulp: dict[str, Any] | None = None
    smallest_rtol: float | None = None
    smallest_atol: float | None = None
    worst_sample: int | None = None
    worst_index: tuple[int, ...] | None = None
    mismatches: int | None = None
    spread: float | None = None
    insensitive: bool = False

    def to_json(self) -> dict[str, Any]:
        record = dataclasses.asdict(self)
        record["worst_index"] = None if self.worst_index is None else list(self.worst_index)
        return record


def judge(
    name: str,
    reference: Array,
    candidate: Array,
    policy: Law,
    noise: Noise | None = None,
    dtype: Any = None,
) -> OutputComparison:
    """Compare one output. Axis 0 counts samples; ``dtype`` (default: the reference's) is what the candidate must have.

    Never raises for what the candidate holds; a noise record that does not fit the reference is refused.
    """
    case = _Case(name, policy)
    case.add(np.asarray(reference), np.asarray(candidate), noise, dtype)
    return case.conclude()


def judge_outputs(
    reference: Mapping[str, Array],
    candidate: Mapping[str, Array],
    policy: Law,
    noises: Mapping[str, Noise] | None = None,
    dtypes: Mapping[str, Any] | None = None,
) -> tuple[OutputComparison, ...]:
    """Compare all outputs, in the reference's order. Missing, extra and reordered outputs fail, and so does none.

    ``noises`` None means that no original exists; given, it must cover every output.
    """
    court = Judge(policy)
    court.add(reference, candidate, noises, dtypes)
    return court.conclude()


class Judge:
    """All outputs of a candidate, batch after batch: `judge_outputs` for more samples than memory holds.

    What the laws need is a few numbers for each sample; the arrays themselves are let go.
    """

    def __init__(self, policy: Law) -> None:
        self.policy = policy
        self._cases: dict[str, _Case] = {}
        self._strangers: list[str] = []

    def add(
        self,
        reference: Mapping[str, Array],
        candidate: Mapping[str, Array],
        noises: Mapping[str, Noise] | None = None,
        dtypes: Mapping[str, Any] | None = None,
    ) -> None:
        """Take in a batch: the next samples of every output. The arguments are those of `judge_outputs`."""
        names, theirs = list(reference), list(candidate)
        moved = sorted(names) == sorted(theirs) and names != theirs
        for position, name in enumerate(names):
            case = self._cases.setdefault(name, _Case(name, self.policy))
            if name not in candidate:
                case.fail("missing from the candidate")
            elif moved and theirs[position] != name:
                case.fail(f"moved from position {position} to {theirs.index(name)}")
            elif noises is not None and name not in noises:
                case.fail("the original's own answer is missing, so there is no yardstick")
            else:
                case.add(
                    np.asarray(reference[name]),
                    np.asarray(candidate[name]),
                    None if noises is None else noises[name],
                    None if dtypes is None else dtypes.get(name),
                )
        known = (*names, *self._strangers)
        self._strangers += [name for name in theirs if name not in known]

    def suspects(self) -> list[int]:
        """The samples that a law about single samples fails, and those that a channel or the whole fails by.

        Only where the yardstick is the original's own error.
        """
        found = (case.suspects() for case in self._cases.values())
        return sorted({number for numbers in found for number in numbers})

    def remeasured(self, numbers: Sequence[int], noises: Mapping[str, Noise]) -> None:
        """Take in another measurement of the original's own error in these samples; the larger one counts."""
        for name, noise in noises.items():
            if name in self._cases:
                self._cases[name].remeasured(numbers, noise)

    def conclude(self) -> tuple[OutputComparison, ...]:
        found = [case.conclude() for case in self._cases.values()]
        found += [OutputComparison(name, False, "not an output of the reference") for name in self._strangers]
        return tuple(found) or (OutputComparison("", False, "nothing was compared: there are no outputs"),)


def all_passed(comparisons: Sequence[OutputComparison]) -> bool:
    """Every output passed, and there was at least one."""
    return len(comparisons) > 0 and all(comparison.passed for comparison in comparisons)


class _Case:
    """One output: what its batches were found to be, and the verdict on all of them."""

    def __init__(self, name: str, policy: Law) -> None:
        self.name, self.policy = name, policy
        self.samples = 0
        self.reason: str | None = None
        self.tally: _Tally | None = None

    def fail(self, reason: str) -> None:
        self.reason = self.reason or reason

    def add(self, r: Array, c: Array, noise: Noise | None, dtype: Any) -> None:
        samples = 1 if r.ndim == 0 else int(r.shape[0])
        self.samples += samples
        unlike = _unlike(r, c, np.dtype(r.dtype if dtype is None else dtype))
        if unlike is not None:
            self.fail(unlike)
            return
        if noise is not None and (len(noise.l2) != samples or len(noise.max_abs) != samples):
            raise RefusedError(
                f"output {self.name}: the noise record has {len(noise.l2)} samples, the data {samples}; measure again"
            )
        with np.errstate(all="ignore"):  # overflow and 0/0 are looked for and become None
            tally = (_tally_values if _kind(r.dtype) == "value" else _tally_exact)(r, c, self.policy, noise)
            self.tally = tally if self.tally is None else self.tally.joined(tally, self.name)

    def suspects(self) -> list[int]:
        tally, policy = self.tally, self.policy
        if self.reason is not None or tally is None or tally.kind != "value" or not isinstance(policy, Policy):
            return []
        if not tally.stated:
            return []
        with np.errstate(all="ignore"):
            columns = tally.columns
            rows = _Rows(columns, policy, tally.stated)
            bad = ~(columns["error_l2"] <= policy.allowed_sample(*rows.l2))
            bad |= ~(columns["error_max"] <= policy.allowed_element(*rows.max))
            found = set(np.flatnonzero(bad & columns["judged"]).tolist())
            found.update(*(channels.suspects(policy) for channels in tally.channels))
            return sorted(found | rows.suspects(policy))

    def remeasured(self, numbers: Sequence[int], noise: Noise) -> None:
        if self.tally is None or self.tally.kind != "value":
            return
        columns = self.tally.columns
        for place, number in enumerate(numbers):
            for key, values in (("noise_l2", noise.l2), ("noise_max", noise.max_abs)):
                columns[key][number] = max(columns[key][number], values[place] or 0.0)
        channels = tuple(
            dataclasses.replace(axis, own=np.maximum(axis.own, np.array(own)))
            for axis, own in zip(self.tally.channels, noise.channels or ())  # noqa: B905 -- none where shapes differ
        )
        self.tally = dataclasses.replace(self.tally, parts=[columns], channels=channels or self.tally.channels)

    def conclude(self) -> OutputComparison:
        found = OutputComparison(self.name, False, self.reason, samples=self.samples)
        if self.reason is not None:
            return found
        if self.tally is None:
            return dataclasses.replace(found, reason="nothing was compared: there are no samples")
        with np.errstate(all="ignore"):
            conclude = _conclude_values if self.tally.kind == "value" else _conclude_exact
            return conclude(found, self.tally, self.policy)


def _unlike(r: Array, c: Array, wanted: Any) -> str | None:
    """Why two arrays cannot be compared, or None."""
    if c.shape != r.shape:
        return f"shape {list(c.shape)} instead of {list(r.shape)}"
    if _dtype_name(c.dtype) != _dtype_name(wanted):
        return f"dtype {_dtype_name(c.dtype)} instead of {_dtype_name(wanted)}"
    if r.size == 0:
        return f"nothing to compare: the output is empty, shape {list(r.shape)}"
    if _kind(r.dtype) is None or _kind(c.dtype) != _kind(r.dtype):
        return f"{_dtype_name(c.dtype)} cannot be judged against {_dtype_name(r.dtype)}"
    return None


_KINDS = {"f": "value", "b": "exact", "i": "exact", "u": "exact", "O": "exact", "U": "exact", "S": "exact"}


def _kind(dtype: Any) -> str | None:
    return _KINDS.get(np.dtype(dtype).kind)


def _dtype_name(dtype: Any) -> str:
    dtype = np.dtype(dtype)
    return "string" if dtype.kind in "OUS" else str(dtype.name)


def _pairs(a: Iterable[Any], b: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(a, b)  # noqa: B905 - `strict` came with Python 3.10; callers compare the lengths first


def _rows(x: Array) -> Array:
    """One row per sample."""
    return x.reshape((1, 1) if x.ndim == 0 else (x.shape[0], -1))


def _values(x: Array) -> Floats:
    return np.asarray(_rows(x), dtype=np.float64)


def _pattern(x: Floats) -> NDArray[np.int64]:
    """0 finite, 1 NaN, 2 +inf, 3 -inf."""
    return np.asarray(np.isnan(x) * 1 + np.isposinf(x) * 2 + np.isneginf(x) * 3)


def ratios(error: Array, allowed: Array) -> Floats:
    """Errors over what is allowed; above 1 is too much. 0 where there is no error, infinite where none is allowed."""
    with np.errstate(all="ignore"):
        return np.asarray(np.where(error > 0, error / np.where(allowed > 0, allowed, 0.0), 0.0), dtype=np.float64)


def norms(x: Floats) -> Floats:
    """L2 of each row, scaled so that neither 1e200 nor 1e-200 leaves the range."""
    peak = np.abs(x).max(axis=1, initial=0.0)
    safe = np.where(peak > 0, peak, 1.0)
    return np.asarray(peak * np.sqrt(np.square(x / safe[:, None]).sum(axis=1)))


def norm(x: Floats) -> float:
    return float(norms(x.reshape(1, -1))[0])


def is_number(value: Any) -> bool:
    """A finite number that a float can hold; JSON and TOML have larger ones, and a bool is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def number(x: Any) -> float | None:
    """Strict JSON knows no NaN and no infinity."""
    x = float(x)
    return x if math.isfinite(x) else None


def decibels(signal: float, error: float) -> float | None:
    return 20 * (math.log10(signal) - math.log10(error)) if 0 < signal < math.inf and 0 < error < math.inf else None


def quantile(x: Floats, share: float) -> float:
    """The sample at or below this share of the order, never between two; 0 where there is none."""
    return float(np.sort(x)[int(share * (x.size - 1))]) if x.size else 0.0


def _noise_of(r: Array, o: Array) -> Noise:
    """The own error of one float32 evaluation."""
    if o.shape != r.shape:
        raise RefusedError(f"the original's output has shape {list(o.shape)}, the reference's {list(r.shape)}")
    if _kind(r.dtype) is None or _kind(o.dtype) != _kind(r.dtype):
        raise RefusedError(f"an original of dtype {o.dtype} cannot be measured against a reference of dtype {r.dtype}")
    if r.size == 0:
        empty = (0.0,) * (1 if r.ndim == 0 else int(r.shape[0]))
        return Noise(empty, empty)
    if _kind(r.dtype) == "exact":
        other = np.asarray(_rows(_comparable(r)) != _rows(_comparable(o)), dtype=bool)
        same = tuple(None if gone else 0.0 for gone in np.asarray(other.all(axis=1)))
        return Noise(same, same, flips=tuple(tuple(np.flatnonzero(row).tolist()) for row in other))
    reference, original = _values(r), _values(o)
    with np.errstate(all="ignore"):
        agree = (_pattern(reference) == _pattern(original)).all(axis=1)
        error = np.where(np.isfinite(reference) & np.isfinite(original), original - reference, 0.0)
        lengths, peaks = norms(error), np.abs(error).max(axis=1)
        usable = agree & np.isfinite(lengths)
        channels = [norms(_by_channel(error[usable], r.shape[1:], axis).T) for axis in _axes(r)]
    l2, peak = (tuple(float(v) if ok else None for v, ok in _pairs(part, usable)) for part in (lengths, peaks))
    known = all(np.isfinite(axis).all() for axis in channels)
    return Noise(l2, peak, tuple(tuple(axis.tolist()) for axis in channels) if known else None)


def _larger_noise(a: Noise, b: Noise) -> Noise:
    def larger(first: Sequence[float | None], second: Sequence[float | None]) -> tuple[float | None, ...]:
        return tuple(None if v is None or w is None else max(v, w) for v, w in _pairs(first, second))

    known = a.channels is not None and b.channels is not None
    return Noise(
        larger(a.l2, b.l2),
        larger(a.max_abs, b.max_abs),
        tuple(larger(v, w) for v, w in _pairs(a.channels, b.channels)) if known else None,  # type: ignore[arg-type,misc]
        None
        if a.flips is None or b.flips is None
        else tuple(tuple(sorted({*v, *w})) for v, w in _pairs(a.flips, b.flips)),
    )


def _axes(output: Array) -> Iterator[int]:
    """The axes of a sample along which there may be channels, the last first; the first axis of a sample is 0."""
    yield from range(output.ndim - 2, -1, -1)


def _by_channel(rows: Floats, shape: Sequence[int], axis: int) -> Floats:
    """Rows of flattened samples as rows of positions, one column for each index of an axis of the sample."""
    return np.moveaxis(rows.reshape(-1, *shape), 1 + axis, -1).reshape(-1, shape[axis])


def _comparable(x: Array) -> Array:
    """Strings come as objects, as str or as bytes; make them one."""
    if x.dtype.kind == "S":
        return np.char.decode(x, "utf-8", "surrogateescape").astype(object)
    if x.dtype.kind == "O":
        flat = [v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else v for v in x.ravel()]
        texts = np.empty(len(flat), dtype=object)
        texts[:] = flat
        return texts.reshape(x.shape)
    return x.astype(object) if x.dtype.kind == "U" else x


def _unravelled(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    """The index within a sample of a position in the flattened sample."""
    return tuple(int(i) for i in np.unravel_index(flat, tuple(shape))) if len(shape) else ()


@dataclass(frozen=True)
class _Tally:
    """What the laws need of the samples of one output so far: a few numbers for each, and sums over all of them.

    ``columns``: vectors over samples, as they came in batches. ``moments``: of each feature over the samples (see
    `_moments`). ``ulps``: how many values lie in each class of `_ULP_EDGES`. ``shape``: of one sample. ``stated``:
    there was an original to measure noise by. ``channels``: by axis; empty where nothing is known or asked of them.
    """

    kind: str
    shape: tuple[int, ...]
    parts: list[dict[str, Array]]
    moments: tuple[float, int, Floats, Floats, NDArray[np.bool_]] | None
    ulps: NDArray[np.int64]
    stated: bool
    channels: tuple[_Channels, ...] = ()

    @property
    def columns(self) -> dict[str, Array]:
        return {name: np.concatenate([part[name] for part in self.parts]) for name in self.parts[0]}

    @property
    def samples(self) -> int:
        return sum(len(part["judged"]) for part in self.parts)

    def joined(self, other: _Tally, name: str) -> _Tally:
        """With the next batch."""
        if (self.kind, self.stated) != (other.kind, other.stated):
            raise RefusedError(f"output {name}: its batches are of different kinds; measure again")
        alike = self.shape == other.shape
        return _Tally(
            self.kind,
            self.shape,
            [*self.parts, *other.parts],
            _pooled_moments(self.moments, other.moments) if alike else None,
            self.ulps + other.ulps,
            self.stated,
            tuple(mine.joined(theirs, self.samples) for mine, theirs in zip(self.channels, other.channels))  # noqa: B905
            if alike
            else (),
        )


@dataclass(frozen=True)
class _Channels:
    """Of each index of an axis: L2 norms over samples and positions, and the element of the largest error.

    ``axis``: of the sample. ``values``: how many elements each index has. ``largest``: of the reference. ``position``:
    in the flattened sample.
    """

    axis: int
    values: int
    error: Floats
    own: Floats
    size: Floats
    largest: Floats
    peak: Floats
    sample: NDArray[np.int64]
    position: NDArray[np.int64]
    c: Floats
    r: Floats

    @classmethod
    def of(
        cls,
        r: Floats,
        c: Floats,
        error: Floats,
        size: Floats,
        judged: NDArray[np.bool_],
        own: Floats,
        shape: Sequence[int],
        axis: int,
    ) -> _Channels:
        """From rows of flattened samples; errors and sizes are 0 where nothing is compared."""
        errors, sizes = _by_channel(error, shape, axis), _by_channel(size, shape, axis)
        rows, here = errors.argmax(axis=0), np.arange(shape[axis])
        places = _by_channel(np.arange(r.shape[1], dtype=np.float64), shape, axis)
        samples, positions = rows // len(places), places[rows % len(places), here].astype(np.int64)
        return cls(
            axis,
            int(judged.sum()) * len(places),
            norms(errors.T),
            own,
            norms(sizes.T),
            sizes.max(axis=0, initial=0.0),
            errors[rows, here],
            samples,
            positions,
            c[samples, positions],
            r[samples, positions],
        )

    def joined(self, other: _Channels, before: int) -> _Channels:
        """With the next batch; ``before``: the samples until then."""
        later = other.peak > self.peak

        def chosen(name: str, shift: int = 0) -> Any:
            return np.where(later, getattr(other, name) + shift, getattr(self, name))

        sums = {name: np.hypot(getattr(self, name), getattr(other, name)) for name in ("error", "own", "size")}
        sums["largest"] = np.maximum(self.largest, other.largest)
        places = {name: chosen(name) for name in ("peak", "position", "c", "r")}
        values = self.values + other.values
        return _Channels(axis=self.axis, values=values, sample=chosen("sample", before), **sums, **places)

    def _rms(self) -> list[Floats]:
        return [norm / math.sqrt(max(1, self.values)) for norm in (self.error, self.own, self.size)]

    def _allowed(self, policy: Policy) -> Floats:
        """The RMS error of each channel; infinite where there is but one, which is the whole output."""
        if len(self.own) < 2:
            return np.full(len(self.own), math.inf)
        _, own, size = self._rms()
        return policy.allowed_channel(own, size, ratios(self.size, self.largest) ** 2)

    def suspects(self, policy: Policy) -> set[int]:
        """The samples with the largest error in a channel that fails."""
        return set(self.sample[~(self._rms()[0] <= self._allowed(policy))].tolist())

    def failing(self, policy: Policy) -> tuple[str, int] | None:
        """What is wrong with the worst channel, and its index; None where all are within the law."""
        error, own, _ = self._rms()
        allowed = self._allowed(policy)
        bad = ~(error <= allowed)
        if not bad.any():
            return None
        k = int(np.argmax(np.where(bad, ratios(error, allowed), -1.0)))
        return (
            f"({int(bad.sum())} of {len(own)} fail): RMS error {error[k]:.3g}, allowed {allowed[k]:.3g} "
            f"(the original's own {own[k]:.3g})"
        ), k


# Upper edges of the classes in which distances in ulps are counted: 0, then four to an octave.
_ULP_STEPS, _ULP_LOWEST = 4, -4
_ULP_EDGES = np.concatenate([[0.0], 2.0 ** (np.arange(0, _ULP_STEPS * 140) / _ULP_STEPS + _ULP_LOWEST)])


def _moments(rows: Floats) -> tuple[float, int, Floats, Floats, NDArray[np.bool_]] | None:
    """(scale, samples, mean, sum of squared deviations, finite) of each feature, values divided by ``scale``.

    A scale, a power of two, keeps squares within the range; batches are pooled by Chan, Golub & LeVeque, *Updating
    formulae and a pairwise algorithm for computing sample variances*, 1979.
    """
    if not len(rows):
        return None
    finite = np.asarray(np.isfinite(rows).all(axis=0))
    values = np.where(finite, rows, 0.0)
    scale = float(2.0 ** np.frexp(np.abs(values).max(initial=0.0))[1])
    values = values / (scale if 0 < scale < math.inf else 1.0)
    mean = values.mean(axis=0)
    return scale, len(rows), mean, np.square(values - mean).sum(axis=0), finite


def _pooled_moments(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return b if a is None else a
    if a[0] < b[0]:
        a, b = b, a
    shrink = b[0] / a[0]
    n, m = a[1], b[1]
    apart = b[2] * shrink - a[2]
    squares = a[3] + b[3] * shrink * shrink + np.square(apart) * (n * m / (n + m))
    return a[0], n + m, a[2] + apart * (m / (n + m)), squares, a[4] & b[4]


def _spread(moments: Any) -> tuple[float | None, bool]:
    """Standard deviation between samples over the rms, and whether the output hardly varies."""
    if moments is None or moments[1] < 2 or not moments[4].any():
        return None, False
    _, samples, mean, squares, finite = moments
    deviation = float(squares[finite].sum())
    total = deviation + samples * float(np.square(mean[finite]).sum())
    if total == 0:
        return 0.0, True
    spread = math.sqrt(deviation / total)
    return number(spread), spread < 1e-6


def _ulps(error: Floats, r: Floats, mask: NDArray[np.bool_], dtype: Any) -> NDArray[np.int64]:
    """Counts of |c − r| in units in the last place of r, by `_ULP_EDGES`."""
    kind = np.dtype(dtype) if np.dtype(dtype).kind == "f" else np.dtype(np.float32)
    unit = np.spacing(np.abs(r[mask]).astype(kind)).astype(np.float64)
    distance = error[mask] / np.where(np.isfinite(unit) & (unit > 0), unit, np.inf)
    places = np.searchsorted(_ULP_EDGES, distance, side="left")
    return np.asarray(np.bincount(np.minimum(places, len(_ULP_EDGES) - 1), minlength=len(_ULP_EDGES)))


def _ulp_summary(counts: NDArray[np.int64]) -> dict[str, Any] | None:
    total = int(counts.sum())
    if not total:
        return None
    reached = np.cumsum(counts)

    def quantile(share: float) -> float:
        return float(_ULP_EDGES[int(np.searchsorted(reached, math.ceil(share * total)))])

    octaves = [[float(_ULP_EDGES[place]), int(counts[place])] for place in (0, 1)]
    for start in range(2, len(counts), _ULP_STEPS):
        stop = min(start + _ULP_STEPS, len(counts))
        octaves.append([float(_ULP_EDGES[stop - 1]), int(counts[start:stop].sum())])
    return {
        **{f"p{share}": quantile(share / 100) for share in (50, 90, 99)},
        "max": quantile(1.0),
        "counts": [row for row in octaves if row[1]],
    }


def _tally_exact(r: Array, c: Array, policy: Law, noise: Noise | None) -> _Tally:
    reference, candidate = _rows(_comparable(r)), _rows(_comparable(c))
    excused = _excused(reference.shape, noise)
    judged = np.asarray(~excused.all(axis=1))
    wrong = np.asarray(reference != candidate, dtype=bool) & ~excused
    numeric = r.dtype.kind in "biu"
    apart = (
        np.where(wrong, np.abs(_values(r) - _values(c)), 0.0).max(axis=1) if numeric else wrong.any(axis=1) * math.nan
    )
    place = wrong.argmax(axis=1)
    here = np.arange(len(place))
    columns = {
        "judged": judged,
        "wrong": wrong.sum(axis=1),
        "own": excused.sum(axis=1) * judged,
        "count": np.full(len(judged), wrong.shape[1]),
        "largest": apart,
        "place": place,
        "c": np.array([f"{value!s:.60}" for value in candidate[here, place]], dtype=object),
        "r": np.array([f"{value!s:.60}" for value in reference[here, place]], dtype=object),
    }
    moments = _moments(_values(r)[judged]) if numeric else None
    return _Tally("exact", r.shape[1:], [columns], moments, np.zeros(len(_ULP_EDGES), np.int64), noise is not None)


def _excused(shape: tuple[int, int], noise: Noise | None) -> NDArray[np.bool_]:
    """The elements in which the original itself differs from the reference."""
    found = np.zeros(shape, bool)
    if noise is None:
        return found
    found[[v is None for v in noise.l2]] = True
    for row, places in _pairs(found, noise.flips or ()):
        if max(places, default=0) >= len(row):
            raise RefusedError("a noise record has flips outside of the output; measure again")
        row[list(places)] = True
    return found


def _conclude_exact(found: OutputComparison, tally: _Tally, policy: Law) -> OutputComparison:
    columns = tally.columns
    judged, wrong, own = columns["judged"], columns["wrong"], columns["own"]
    found = dataclasses.replace(found, yardstick="equality", excluded=int((~judged).sum()), mismatches=0)
    if not judged.any():
        return dataclasses.replace(
            found, reason="nothing left to compare: the original itself differs from the reference in every sample"
        )
    flips, elements, count = int(own.sum()), int(columns["count"][judged].sum()), int(wrong.sum())
    allowed, over = 0.0, wrong > 0
    if isinstance(policy, Policy):
        allowed, each = policy.allowed_flips(flips, elements), policy.allowed_sample_flips(own, columns["count"])
        over = wrong > each
    elif isinstance(policy, Fidelity):
        allowed, over = (1 - policy.top1) * elements, np.zeros(len(wrong), bool)
    spread, insensitive = _spread(tally.moments)
    largest = number(columns["largest"].max()) if tally.moments is not None else (None if count else 0.0)
    found = dataclasses.replace(
        found,
        passed=count <= allowed and not over.any(),
        yardstick=f"equality, but where the original differs ({flips} of {elements} values)" if flips else "equality",
        exact=count == 0,
        mismatches=count,
        max_abs=largest,
        smallest_atol=largest,
        smallest_rtol=None if count else 0.0,
        spread=spread,
        insensitive=insensitive,
    )
    if found.passed:
        return found
    sample = int(np.argmax(over if over.any() else wrong > 0))
    index = _unravelled(int(columns["place"][sample]), tally.shape)
    most = ""
    if int(allowed):
        most = f", {int(allowed)} may"
        if over.any():
            most += f"; {int(wrong[sample])} of {int(columns['count'][sample])} in sample {sample}"
    return dataclasses.replace(
        found,
        worst_sample=sample,
        worst_index=index,
        reason=_one_line(
            f"{count} of {elements} values differ{most} (first: sample {sample} "
            f"{list(index)}: candidate {columns['c'][sample]}, reference {columns['r'][sample]})"
        ),
    )


def _tally_values(output: Array, candidate: Array, policy: Law, noise: Noise | None) -> _Tally:
    r, c = _values(output), _values(candidate)
    judged = np.array([True] * len(r) if noise is None else [v is not None for v in noise.l2])
    live = judged[:, None] & np.isfinite(r)
    drift = (_pattern(r) != _pattern(c)) & judged[:, None]
    both = live & np.isfinite(c)
    error, size = np.where(both, np.abs(c - r), 0.0), np.where(live, np.abs(r), 0.0)
    if isinstance(policy, Tolerance):
        allowed = policy.allowed(size)
        excess = ratios(error, allowed)
        wrong = (~(error <= allowed)).sum(axis=1)
    else:
        excess, wrong = error, np.zeros(len(r), np.int64)
    place = np.where(drift.any(axis=1), drift.argmax(axis=1), excess.argmax(axis=1))
    here = np.arange(len(r))
    size_l2, other_l2 = norms(size), norms(np.where(both, c, 0.0))
    counted = both & (r != 0)
    relative = np.where(counted, error / np.where(counted, size, 1.0), 0.0).max(axis=1, initial=0.0)
    columns = {
        "judged": judged,
        "live": live.any(axis=1),
        "drift": drift.sum(axis=1),
        "count": np.full(len(r), r.shape[1]),
        "wrong": wrong,
        "excess": excess.max(axis=1, initial=0.0),
        "place": place,
        "c": c[here, place],
        "r": r[here, place],
        "error_l2": norms(error),
        "error_max": error.max(axis=1, initial=0.0),
        "size_l2": size_l2,
        "size_max": size.max(axis=1, initial=0.0),
        "other_l2": other_l2,
        "cosine": (_unit_rows(np.where(both, c, 0.0)) * _unit_rows(np.where(both, r, 0.0))).sum(axis=1),
        "both_l2": norms(np.where(both, r, 0.0)),
        "relative": np.where(counted.any(axis=1), relative, math.nan),
        "rtol": _smallest_rtols(error, size),
        "noise_l2": np.array([0.0] * len(r) if noise is None else [0.0 if v is None else v for v in noise.l2]),
        "noise_max": np.array([0.0] * len(r) if noise is None else [0.0 if v is None else v for v in noise.max_abs]),
        "kl": _divergences(r, c, judged, output.shape),
        **_classes(r, c, judged, output.ndim),
    }
    ulps = _ulps(error, r, both, candidate.dtype)
    channels = []
    if isinstance(policy, Policy) and noise is not None:
        for axis, own in zip(_axes(output), noise.channels or ()):  # noqa: B905 -- old records know the last axis only
            if len(own) != output.shape[1 + axis]:
                raise RefusedError(
                    f"the noise record has {len(own)} channels, the data {output.shape[1 + axis]}; measure again"
                )
            channels.append(_Channels.of(r, c, error, size, judged, np.array(own), output.shape[1:], axis))
    return _Tally("value", output.shape[1:], [columns], _moments(r[judged]), ulps, noise is not None, tuple(channels))


def _conclude_values(found: OutputComparison, tally: _Tally, policy: Law) -> OutputComparison:
    columns = tally.columns
    judged = columns["judged"]
    found = dataclasses.replace(found, excluded=int((~judged).sum()))
    if not judged.any():
        return dataclasses.replace(
            found,
            reason="nothing left to compare: original and reference disagree about NaN or infinity in every sample",
        )
    if not columns["live"].any():
        return dataclasses.replace(found, reason="nothing left to compare: the reference holds no finite value")
    rows = _Rows(columns, policy, tally.stated)
    drift = int(columns["drift"].sum())
    channel = None
    if isinstance(policy, Tolerance):
        failures, excess = _tolerance_law(columns, policy), columns["excess"]
    elif isinstance(policy, Fidelity):
        failures, excess = _fidelity_laws(rows, policy), columns["error_max"]
    else:
        failures, allowed = _noise_laws(rows, policy)
        excess = ratios(columns["error_max"], allowed)
        for channels in tally.channels:
            wrong = channels.failing(policy)
            if wrong is not None:
                channel = None if failures else (channels, wrong[1])
                called = "channel" if channels.axis == len(tally.shape) - 1 else f"on axis {channels.axis + 1}, index"
                failures.append(f"{called} {wrong[1]} {wrong[0]}")
        failures += _top1_law(rows, policy)
    if drift:
        excess, channel = columns["drift"] > 0, None
        failures = [f"NaN or infinity at {drift} places where the reference has none, or the reverse"]
    sample = int(np.argmax(excess))
    index = _unravelled(int(columns["place"][sample]), tally.shape)
    worst_c, worst_r = columns["c"][sample], columns["r"][sample]
    if channel is not None:
        axis, k = channel
        sample, worst_c, worst_r = int(axis.sample[k]), axis.c[k], axis.r[k]
        index = _unravelled(int(axis.position[k]), tally.shape)
    place = f" (worst: sample {sample} {list(index)}: candidate {worst_c:.9g}, reference {worst_r:.9g})"
    total, signal = norm(columns["error_l2"]), norm(columns["size_l2"])
    exact = not drift and not columns["error_max"].any()
    spread, insensitive = _spread(tally.moments)
    own = norm(rows.noise_l2) if tally.stated else 0.0
    largest = None if drift else number(columns["error_max"].max())
    relative = columns["relative"][~np.isnan(columns["relative"])]
    usable, kl = columns["usable"], columns["kl"][judged]
    return dataclasses.replace(
        found,
        passed=not failures,
        reason=_one_line("; ".join(failures), LINE - len(place)) + place if failures else None,
        yardstick=rows.yardstick,
        exact=exact,
        snr_db=None if drift else decibels(signal, total),
        reference_snr_db=decibels(signal, own),
        noise_ratio=number(total / own) if own > 0 and not drift else None,
        max_abs=largest,
        max_rel=number(relative.max()) if relative.size else None,
        cosine=_cosine(columns),
        top1_agreement=float(1 - columns["turned"].sum() / usable.sum()) if usable.any() else None,
        top5_agreement=float(columns["five"].sum() / usable.sum()) if usable.any() and columns["of"][0] > 5 else None,
        kl=None if np.isnan(kl).any() else {"mean": number(kl.mean()), "max": number(kl.max())},
        ulp=None if drift else _ulp_summary(tally.ulps),
        smallest_rtol=None if drift else number(columns["rtol"].max()),
        smallest_atol=largest,
        worst_sample=None if exact else sample,
        worst_index=None if exact else index,
        spread=spread,
        insensitive=insensitive,
    )


def _unit_rows(x: Floats) -> Floats:
    """Each row as a vector of length 1 (or 0), without leaving the range."""
    peak = np.abs(x).max(axis=1, initial=0.0)
    x = x / np.where(peak > 0, peak, 1.0)[:, None]
    length = np.sqrt(np.square(x).sum(axis=1))
    return np.asarray(x / np.where(length > 0, length, 1.0)[:, None])


def _cosine(columns: Mapping[str, Array]) -> float | None:
    """Of all samples as one vector: Σ cos(c_s, r_s)·‖c_s‖·‖r_s‖ / (‖c‖·‖r‖)."""
    mine, theirs = columns["other_l2"], columns["both_l2"]
    if not mine.any() or not theirs.any():
        return None
    inner = float(np.sum(columns["cosine"] * (mine / norm(mine)) * (theirs / norm(theirs))))
    return number(min(1.0, max(-1.0, inner)))


def _smallest_rtols(error: Floats, size: Floats) -> Floats:
    """For each sample the smallest rtol with which |c − r| ≤ rtol·|r| holds *as evaluated in float64*; or infinity."""
    wrong = error > 0
    quotient = error / np.where(size > 0, size, 1.0)
    rtol = np.where(wrong, np.where(size > 0, quotient, math.inf), 0.0).max(axis=1, initial=0.0)
    for _ in range(4):  # the quotient may be rounded down, by one step
        short = np.isfinite(rtol) & (error > rtol[:, None] * size).any(axis=1)
        rtol = np.where(short, np.nextafter(rtol, math.inf), rtol)
    return np.asarray(rtol)


def _divergences(r: Floats, c: Floats, judged: NDArray[np.bool_], shape: Sequence[int]) -> Floats:
    """The largest divergence Σ r·ln(r/c) − r + c of each sample's distributions; NaN where they are none."""
    nothing = np.full(len(r), math.nan)
    if len(shape) < 2 or shape[-1] < 2:
        return nothing
    p, q = (x.reshape(len(x), -1, shape[-1]) for x in (r, c))
    sums = np.abs(p.sum(axis=2) - 1.0).max(axis=1, initial=0.0)
    proper = (p >= 0).all(axis=(1, 2)) & (sums < 1e-3) & np.isfinite(q).all(axis=(1, 2))
    if not proper[judged].all():
        return nothing
    terms = np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0) / np.where(q > 0, q, 0.0)), 0.0) - p + q
    return np.asarray(np.where(proper, np.maximum(terms.sum(axis=2), 0.0).max(axis=1, initial=0.0), math.nan))


def _classes(r: Floats, c: Floats, judged: NDArray[np.bool_], ndim: int) -> dict[str, Array]:
    """Largest classes: whether a sample was looked at, turned to a class that is not the reference's largest, the
    margin it would have had to cross, both classes, and whether its five largest are the reference's.
    """
    none = np.zeros(len(r), bool)
    found: dict[str, Array] = dict.fromkeys(("usable", "turned", "five"), none)
    found.update(margin=np.zeros(len(r)), mine=np.zeros(len(r), int), theirs=np.zeros(len(r), int))
    found["of"] = np.full(len(r), r.shape[1] if ndim == 2 else 0)
    if ndim != 2 or r.shape[1] < 2:
        return found
    usable = judged & np.isfinite(r).all(axis=1) & np.isfinite(c).all(axis=1)
    x, y = np.where(usable[:, None], r, 0.0), np.where(usable[:, None], c, 0.0)
    here = np.arange(len(r))
    chosen = np.argmax(y, axis=1)
    margin = x.max(axis=1) - x[here, chosen]
    found.update(usable=usable, turned=usable & (margin > 0), margin=margin, mine=np.argmax(x, axis=1), theirs=chosen)
    if r.shape[1] > 5:
        fifth = np.partition(x, -5, axis=1)[:, -5]
        best = np.argpartition(y, -5, axis=1)[:, -5:]
        found["five"] = usable & (x[here[:, None], best] >= fifth[:, None]).all(axis=1)
    return found


class _Rows:
    """Norms per sample: error, reference, yardstick and pooled yardstick, in L2 and in the maximum norm."""

    def __init__(self, columns: Mapping[str, Array], policy: Law, stated: bool) -> None:
        self.columns, self.judged = columns, columns["judged"]
        self.size_l2, self.size_max = columns["size_l2"], columns["size_max"]
        if stated:
            self.yardstick = "the original's own error"
            self.noise_l2, self.noise_max = columns["noise_l2"], columns["noise_max"]
        else:
            share = policy.default_noise if isinstance(policy, Policy) else 0.0
            self.yardstick = f"{share:.3g} of each sample, for want of an original"
            self.noise_l2, self.noise_max = share * self.size_l2 * self.judged, share * self.size_max * self.judged
        if isinstance(policy, Tolerance):
            self.yardstick = f"atol {policy.atol:g} + rtol {policy.rtol:g}"
        elif isinstance(policy, Fidelity):
            self.yardstick = f"{policy.snr_db:g} dB, {policy.sample_db:g} dB in each sample"

    @property
    def l2(self) -> tuple[Floats, Floats, Scale]:
        """The original's own error, the reference, and what they are held up by, in L2."""
        return self.noise_l2, self.size_l2, Scale.of(self.noise_l2, self.size_l2, self.judged)

    @property
    def max(self) -> tuple[Floats, Floats, Scale]:
        """The same in the maximum norm."""
        return self.noise_max, self.size_max, Scale.of(self.noise_max, self.size_max, self.judged)

    def suspects(self, policy: Policy) -> set[int]:
        """The fewest samples that make up half of the whole output's error, where that is too large."""
        error = self.columns["error_l2"]
        total = norm(error)
        if total <= policy.allowed_whole(norm(self.noise_l2), norm(self.size_l2)) or not math.isfinite(total):
            return set()
        order = np.argsort(-error, kind="stable")
        share = np.cumsum(np.square(error[order] / (error.max() or 1.0)))
        return set(order[: 1 + int(np.searchsorted(share, share[-1] / 2))].tolist())

    def worst(self, error: Floats, allowed: Floats) -> tuple[int, int] | None:
        """The sample furthest beyond what is allowed, and how many are."""
        bad = ~(error <= allowed) & self.judged
        return (int(np.argmax(np.where(bad, ratios(error, allowed), -1.0))), int(bad.sum())) if bad.any() else None


def _noise_laws(rows: _Rows, policy: Policy) -> tuple[list[str], Floats]:
    """What fails, and what the element law allows each sample."""
    failures = []
    error_l2, error_max = rows.columns["error_l2"], rows.columns["error_max"]
    noise, signal, error = norm(rows.noise_l2), norm(rows.size_l2), norm(error_l2)
    if noise > policy.noise_limit * signal:
        failures.append(
            f"the original's own error is {noise:.3g} against a reference of {signal:.3g}: no yardstick, "
            "so nothing can be proven (is the reference right?)"
        )
    whole = policy.allowed_whole(noise, signal)
    if not error <= whole:
        failures.append(f"whole output: L2 error {error:.3g}, allowed {whole:.3g} (the original's own {noise:.3g})")
    sample = policy.allowed_sample(*rows.l2)
    bad = rows.worst(error_l2, sample)
    if bad is not None:
        s, count = bad
        failures.append(
            f"sample {s} ({count} of {int(rows.judged.sum())} fail): L2 error {error_l2[s]:.3g}, "
            f"allowed {sample[s]:.3g} (the original's own {rows.noise_l2[s]:.3g})"
        )
    element = policy.allowed_element(*rows.max)
    bad = rows.worst(error_max, element)
    if bad is not None:
        s, _ = bad
        failures.append(
            f"worst element: error {error_max[s]:.3g} in sample {s}, allowed {element[s]:.3g} "
            f"(the original's own {rows.noise_max[s]:.3g})"
        )
    return failures, element


def _fidelity_laws(rows: _Rows, policy: Fidelity) -> list[str]:
    failures = []
    error_l2 = rows.columns["error_l2"]
    error, signal = norm(error_l2), norm(rows.size_l2)
    if not error <= policy.allowed_whole(0.0, signal):
        found = decibels(signal, error)
        failures.append(
            f"whole output: SNR {0.0 if found is None else found:.1f} dB, {policy.snr_db:g} dB are asked for"
        )
    allowed = policy.allowed_sample(*rows.l2)
    bad = rows.worst(error_l2, allowed)
    if bad is not None:
        s, count = bad
        failures.append(
            f"sample {s} ({count} of {int(rows.judged.sum())} fail): L2 error {error_l2[s]:.3g}, "
            f"allowed {allowed[s]:.3g}"
        )
    close = rows.columns["margin"] <= policy.allowed_margin(*rows.max)
    usable, turned = int(rows.columns["usable"].sum()), int((rows.columns["turned"] & ~close).sum())
    if turned > (1 - policy.top1) * usable:
        failures.append(
            f"top-1 changed in {turned} of {usable} samples by more than {policy.snr_db:g} dB explain, "
            f"{policy.top1:.0%} must stay"
        )
    return failures


def _tolerance_law(columns: Mapping[str, Array], policy: Tolerance) -> list[str]:
    wrong, count = int(columns["wrong"].sum()), int(columns["count"].sum())
    return [f"{wrong} of {count} values beyond {policy.atol:g} + {policy.rtol:g}·|reference|"] if wrong else []


def _top1_law(rows: _Rows, policy: Policy) -> list[str]:
    turned, margin = rows.columns["turned"], rows.columns["margin"]
    if not turned.any():
        return []
    excused = policy.allowed_margin(*rows.max)
    bad = turned & ~(margin <= excused)
    if not bad.any():
        return []
    s = int(np.argmax(np.where(bad, margin - excused, -np.inf)))
    return [
        f"top-1 changed in {int(bad.sum())} samples; in sample {s} from class {int(rows.columns['mine'][s])} to "
        f"{int(rows.columns['theirs'][s])}, a margin of {margin[s]:.3g} where rounding explains {excused[s]:.3g}"
    ]


# --------------------------------------------------------------------------------------------------------------
# Timing
# --------------------------------------------------------------------------------------------------------------

# Name: percentile, and the samples it needs so that at least one lies beyond it.
PERCENTILES = {"median": (50.0, 1), "p90": (90.0, 10), "p99": (99.0, 100), "p99_9": (99.9, 1000)}
CONFIDENCE = 1 - 2 / 2**6  # six values of one sign


def summarize(samples: Sequence[float]) -> dict[str, float | None]:
    """Median, p90, p99, p99_9 and min of the samples, in their own unit; None where there are too few.

    Percentiles interpolate linearly (numpy's default). Samples must be positive and finite.
    """
    values = _durations(samples)
    found: dict[str, float | None] = {
        name: float(np.percentile(values, percent)) if values.size >= needed else None
        for name, (percent, needed) in PERCENTILES.items()
    }
    return {**found, "min": float(values.min())}


def log_ratios(rounds_a: Sequence[Sequence[float]], rounds_b: Sequence[Sequence[float]]) -> Floats:
    """log(median a / median b) of each round; round i of a was measured next to round i of b."""
    if len(rounds_a) != len(rounds_b):
        raise RefusedError(f"a has {len(rounds_a)} rounds, b has {len(rounds_b)}; measure both in every round")
    return np.array(
        [math.log(np.median(_durations(a)) / np.median(_durations(b))) for a, b in _pairs(rounds_a, rounds_b)]
    )


def centre(values: Sequence[float] | Floats) -> float:
    """Hodges' and Lehmann's estimate: the median of the means of all pairs, each value with itself included."""
    return float(np.median(_pair_means(np.asarray(values, np.float64))))


def centre_interval(values: Sequence[float] | Floats, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """The pair means w₍k₎, w₍m+1−k₎, m = n·(n+1)/2, that hold the centre with this confidence; None if n is too small.

    For values that are symmetric about the centre: P(w₍k₎ ≤ centre ≤ w₍m+1−k₎) ≥ 1 − 2·P(T < k), T the sum of the
    ranks 1, ..., n of which each counts with probability 1/2. The default level needs six values.
    """
    means = np.sort(_pair_means(np.asarray(values, np.float64)))
    k = _rank(len(values), confidence)
    return (float(means[k - 1]), float(means[-k])) if k else None


def _pair_means(values: Floats) -> Floats:
    first, second = _pairs_among(len(values))
    means: Floats = (values[first] + values[second]) / 2
    return means


@functools.lru_cache(maxsize=64)
def _pairs_among(n: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    return np.triu_indices(n)


@functools.lru_cache(maxsize=64)
def _rank(n: int, confidence: float) -> int:
    """The largest k that keeps the promise of `centre_interval`, at most half of the pair means; 0 if there is none."""
    total = n * (n + 1) // 2
    chance = np.zeros(total + 1)  # of each rank sum
    chance[0] = 1.0
    for rank in range(1, n + 1):
        chance[rank:] = (chance[rank:] + chance[:-rank]) / 2
        chance[:rank] /= 2
    outside = 2 * np.cumsum(chance[: (total + 1) // 2])  # of T ≤ 0, 1, ...
    return int(np.searchsorted(outside, 1 - confidence + 1e-12, side="right"))


def _durations(samples: Sequence[float]) -> Floats:
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.all(np.isfinite(values)) or not np.all(values > 0):
        raise RefusedError("timings must be a list of positive, finite numbers, at least one; measure again")
    return values


# --------------------------------------------------------------------------------------------------------------
# Manifest
# --------------------------------------------------------------------------------------------------------------


def seal(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's bytes: canonical JSON with ``seal``, the SHA-256 of those bytes while ``seal`` is empty."""
    digest = hashlib.sha256(_canonical({**manifest, "seal": ""})).hexdigest()
    return _canonical({**manifest, "seal": digest})


def unseal(data: bytes) -> dict[str, Any]:
    """The manifest, if the bytes are exactly what ``seal`` writes. Any changed byte is refused."""
    try:
        manifest = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{MANIFEST} is not readable JSON ({error}); fetch the bundle again") from None
    try:
        sound = isinstance(manifest, dict) and seal(manifest) == data
    except (RefusedError, RecursionError):
        sound = False
    if not sound:
        raise RefusedError(f"{MANIFEST} was changed after it was sealed; fetch the bundle again")
    return dict(manifest)


def _canonical(manifest: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(manifest, sort_keys=True, indent=2, allow_nan=False) + "\n").encode("ascii")
    except (TypeError, ValueError) as error:
        raise RefusedError(f"the manifest is not strict JSON: {error}") from None


SIGNATURE_DTYPES = {
    "string": np.dtype(object),
    **{name: np.dtype(name) for name in ("bool", "float16", "float32", "float64")},
    **{f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


# Field of SessionSettings: how a value other than ONNX Runtime's default is said, and where ONNX Runtime is told it:
# names with a dot are configuration entries of SessionOptions, the others its attributes.
SETTINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "threads": ("threads {}", ("intra_op_num_threads",)),
    "execution_mode": ("{} execution", ("execution_mode",)),
    "inter_op_threads": ("inter-op threads {}", ("inter_op_num_threads",)),
    "spinning": ("no spinning", ("session.intra_op.allow_spinning", "session.inter_op.allow_spinning")),
    "denormals_as_zero": ("denormals as zero", ("session.set_denormal_as_zero",)),
    "cpu_arena": ("no CPU arena", ("enable_cpu_mem_arena",)),
}
MODES = ("sequential", "parallel")


MOST_THREADS = 1024  # more are a mistake, and ONNX Runtime runs out of memory


@dataclass(frozen=True)
class SessionSettings:
    """How a session of ONNX Runtime's CPU provider is opened; the defaults are ONNX Runtime's own.

    ``threads`` are those of one operation (None: ONNX Runtime decides), ``inter_op_threads`` how many operations may
    run at once where ``execution_mode`` is "parallel". ``spinning``: threads wait for work at full speed.
    ``denormals_as_zero`` is heeded in the first session of a process only, and then by the whole process.
    """

    threads: int | None = None
    execution_mode: str = "sequential"
    inter_op_threads: int | None = None
    spinning: bool = True
    denormals_as_zero: bool = False
    cpu_arena: bool = True

    def __post_init__(self) -> None:
        for name in ("threads", "inter_op_threads"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and 1 <= value <= MOST_THREADS):
                raise RefusedError(
                    f"session setting {name} is {value!r}; give a number from 1 to {MOST_THREADS}, or null"
                )
        if self.execution_mode not in MODES:
            raise RefusedError(f"session setting execution_mode is {self.execution_mode!r}; give {' or '.join(MODES)}")
        for name in ("spinning", "denormals_as_zero", "cpu_arena"):
            if not isinstance(getattr(self, name), bool):
                raise RefusedError(f"session setting {name} is {getattr(self, name)!r}; give true or false")
        if self.inter_op_threads is not None and self.execution_mode != "parallel":
            raise RefusedError("session setting inter_op_threads needs the execution mode parallel; leave it null")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: object) -> SessionSettings:
        """A setting that is missing is ONNX Runtime's default; one that is unknown is refused."""
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(record, dict):
            raise RefusedError(f"session settings must be an object, not {record!r}; tune the session again")
        if unknown := sorted(set(map(str, record)) - set(known)):
            raise RefusedError(f"unknown session setting {unknown[0]!r}; this version knows {', '.join(known)}")
        return cls(**record)

    def bounded(self, threads: int) -> SessionSettings:
        """The same with so many threads for all of a run, whatever the settings say of threads."""
        return dataclasses.replace(self, threads=threads, execution_mode="sequential", inter_op_threads=None)

    @property
    def changed(self) -> dict[str, Any]:
        """The fields that differ from ONNX Runtime's defaults."""
        return {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != f.default}

    @property
    def text(self) -> str:
        """As people read it: "threads 1, no spinning"."""
        return ", ".join(SETTINGS[name][0].format(value) for name, value in self.changed.items()) or "defaults"

    @property
    def calls(self) -> list[tuple[str, Any]]:
        """What ONNX Runtime is told beyond its defaults: (attribute or configuration entry, value)."""
        return [(name, value) for field, value in self.changed.items() for name in SETTINGS[field][1]]

    def apply(self, options: Any) -> Any:
        """Tell a ``SessionOptions``; returns it."""
        for name, value in self.calls:
            if "." in name:
                options.add_session_config_entry(name, str(int(value)))
            elif name == "execution_mode":
                options.execution_mode = getattr(type(options.execution_mode), f"ORT_{value.upper()}")
            else:
                setattr(options, name, value)
        return options

    @property
    def python(self) -> list[str]:
        """The lines of Python that do the same."""
        lines = ["options = onnxruntime.SessionOptions()"]
        for name, value in self.calls:
            if "." in name:
                lines.append(f'options.add_session_config_entry("{name}", "{int(value)}")')
            elif name == "execution_mode":
                lines.append(f"options.execution_mode = onnxruntime.ExecutionMode.ORT_{value.upper()}")
            else:
                lines.append(f"options.{name} = {value}")
        return lines


@dataclass(frozen=True)
class Profile:
    """``session`` of a manifest: settings, and where they were measured as the fastest."""

    settings: SessionSettings
    measured: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"settings": self.settings.to_json(), "measured": self.measured}

    @classmethod
    def from_json(cls, record: object) -> Profile:
        where = f"session in {MANIFEST}"
        settings = SessionSettings.from_json(_field(record, "settings", dict, where))
        measured = _field(record, "measured", dict, where)
        _field(measured, "cpu", str, f"{where}.measured")
        _field(measured, "cores", int, f"{where}.measured")
        return cls(settings, measured)

    def notices(self) -> list[str]:
        """What there is to say where this machine is another one."""
        here = machine()
        if all(self.measured[key] == here[key] for key in here):
            return []
        return [
            f"the session profile was measured on {self.measured['cpu']}, {self.measured['cores']} cores; this is "
            f"{here['cpu']}, {here['cores']} cores: tune it again here with deploykit bench --tune-session --force"
        ]


def machine() -> dict[str, Any]:
    """On what a session profile depends most: the processor, and how many cores the system shows."""
    return {"cpu": cpu_name(), "cores": os.cpu_count() or 1}


@dataclass(frozen=True)
class Golden:
    """One golden data set: what goes in, what must come out, and by what yardstick."""

    folder: str
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    noises: dict[str, Noise] | None
    reference: str


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every file has the hash that its sealed manifest states."""

    folder: str
    manifest: dict[str, Any]
    model: str
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    policy: Law
    notices: tuple[str, ...]
    profile: Profile | None = None

    def golden(self) -> list[Golden]:
        return [
            _read_golden(self, record, where)
            for where, record in enumerate(_field(self.manifest, "golden", list, MANIFEST))
        ]

    def judged(self, data: Golden, answers: Mapping[str, Array]) -> tuple[OutputComparison, ...]:
        """The law by which the model's answers to golden data are judged; images with their channels last."""
        dtypes = {spec["name"]: SIGNATURE_DTYPES[spec["dtype"]] for spec in self.outputs}
        turn = _channels_last if self.manifest.get("image_axes") == "NCHW" else dict
        return judge_outputs(turn(data.outputs), turn(answers), self.policy, data.noises, dtypes)


def _channels_last(arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {name: np.moveaxis(array, 1, -1) if np.ndim(array) == 4 else array for name, array in arrays.items()}


def open_bundle(folder: str | os.PathLike[str]) -> Bundle:
    """Check the seal and every hash before anything in the bundle is used."""
    folder = os.fspath(folder)
    try:
        with open(os.path.join(folder, MANIFEST), "rb") as stream:
            manifest = unseal(stream.read())
    except OSError as error:
        raise RefusedError(f"no readable {MANIFEST} in {folder} ({error.strerror}); give a bundle folder") from None
    if manifest.get("schema") != BUNDLE_SCHEMA:
        raise RefusedError(f"{MANIFEST} has schema {manifest.get('schema')!r}, this verify.py reads {BUNDLE_SCHEMA!r}")
    files = _field(manifest, "files", dict, MANIFEST)
    for name in sorted(files):
        _check_file(folder, name, files[name])
    model = _field(manifest, "model", str, MANIFEST)
    for name in (model, "verify.py"):
        if name not in files:
            raise RefusedError(f"{name} is not among the files of {MANIFEST}; write the bundle again")
    strangers = sorted(_strangers(folder, files))
    for name in strangers:
        if name.startswith(model + "."):  # external weights that no hash covers
            raise RefusedError(f"{name} is not among the files of {MANIFEST}; remove it or write the bundle again")
    signature = _field(manifest, "signature", dict, MANIFEST)
    if manifest.get("source") is not None:
        _field(manifest["source"], "name", str, f"source in {MANIFEST}")
    return Bundle(
        folder,
        manifest,
        model,
        _specs(signature, "inputs"),
        _specs(signature, "outputs"),
        _policy(manifest.get("policy")),
        (f"not covered by the manifest: {', '.join(strangers[:5])}",) if strangers else (),
        None if manifest.get("session") is None else Profile.from_json(manifest["session"]),
    )


def _field(record: object, key: str, kind: type, where: str) -> Any:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        raise RefusedError(f"{where} lacks {key!r} (a {kind.__name__}); write the bundle again")
    return value


def _specs(signature: object, side: str) -> list[dict[str, Any]]:
    specs = _field(signature, side, list, "signature")
    for spec in specs:
        _field(spec, "name", str, f"signature.{side}")
        _field(spec, "dtype", str, f"signature.{side}")
        shape = _field(spec, "shape", list, f"signature.{side}")
        if not all(size is None or (isinstance(size, int) and is_number(size) and size >= 0) for size in shape):
            raise RefusedError(f"signature.{side}: {shape!r} is no shape; write the bundle again")
        for key in ("low", "high"):
            if spec.get(key) is not None and not is_number(spec[key]):
                raise RefusedError(f"signature.{side}: {key} is {spec[key]!r}, no number; write the bundle again")
        if spec["dtype"] not in SIGNATURE_DTYPES:
            raise RefusedError(f"signature.{side}: unknown dtype {spec['dtype']!r}; write the bundle again")
    names = [spec["name"] for spec in specs]
    if len(set(names)) != len(names):
        raise RefusedError(f"signature.{side} names one tensor twice; write the bundle again")
    return list(specs)


def _policy(record: object) -> Law:
    if isinstance(record, str) and record in POLICIES:
        return POLICIES[record]
    if isinstance(record, dict) and record and set(record) <= {"rtol", "atol"}:
        return Tolerance(**{key: 0.0 if value is None else value for key, value in record.items()})
    raise RefusedError(f"unknown policy {record!r}; this verify.py knows {', '.join(POLICIES)} and rtol/atol")


def _inside(folder: str, name: object) -> str:
    """The path of a bundle's file; names that lead out of the bundle are refused."""
    plain = isinstance(name, str) and name and not any(sign in name for sign in "\\:\0")
    try:
        os.fsencode(str(name))
    except UnicodeEncodeError:  # half a character: no file is called so
        plain = False
    if not plain or any(part in ("", ".", "..") for part in str(name).split("/")):
        raise RefusedError(f"{MANIFEST} names {name!r}, which is no path inside the bundle; fetch the bundle again")
    path, root = os.path.realpath(os.path.join(folder, str(name))), os.path.realpath(folder)
    if os.path.commonpath([path, root]) != root:
        raise RefusedError(f"{name} is a link that leads out of the bundle; fetch the bundle again")
    return path


def _check_file(folder: str, name: str, record: object) -> None:
    path = _inside(folder, name)
    digest, size = _field(record, "sha256", str, f"files[{name!r}]"), _field(record, "bytes", int, f"files[{name!r}]")
    found, count = hashlib.sha256(), 0
    try:
        with open(path, "rb") as stream:
            for piece in iter(lambda: stream.read(1 << 20), b""):
                found.update(piece)
                count += len(piece)
    except OSError as error:
        raise RefusedError(f"{name} cannot be read ({error.strerror}); fetch the bundle again") from None
    if count != size or found.hexdigest() != digest:
        raise RefusedError(f"{name} was changed after the bundle was sealed; fetch the bundle again")


def _strangers(folder: str, files: Mapping[str, Any]) -> Iterator[str]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in names:
            relative = os.path.relpath(os.path.join(place, name), folder).replace(os.sep, "/")
            if relative not in files and relative != MANIFEST:
                yield relative


def _read_golden(bundle: Bundle, record: object, position: int) -> Golden:
    where = f"golden[{position}]"
    folder = _field(record, "folder", str, where)
    reference = _field(record, "reference", str, where)
    if reference not in ("float64", "float32"):
        raise RefusedError(f"{where}: reference {reference!r} is neither float64 nor float32; write the bundle again")
    sides = []
    for side, specs in (("inputs", bundle.inputs), ("outputs", bundle.outputs)):
        names = _field(record, side, list, where)
        if len(names) != len(specs):
            raise RefusedError(f"{where} has {len(names)} {side}, the signature {len(specs)}; write the bundle again")
        tensors = {}
        for name, spec in _pairs(names, specs):
            path = f"{folder}/{name}"
            if path not in bundle.manifest["files"]:
                raise RefusedError(f"{path} is not among the files of {MANIFEST}; write the bundle again")
            with open(_inside(bundle.folder, path), "rb") as stream:
                try:
                    stored, tensors[spec["name"]] = read_tensor(stream.read())
                except RefusedError as error:
                    raise RefusedError(f"{path}: {error}") from None
            if stored and stored != spec["name"]:
                raise RefusedError(
                    f"{path} holds {stored!r}, the signature says {spec['name']!r}; write the bundle again"
                )
        sides.append(tensors)
    noises = None
    if reference == "float64":
        records = _field(record, "noise", dict, where)
        noises = {spec["name"]: Noise.from_json(records.get(spec["name"])) for spec in bundle.outputs}
    return Golden(folder, sides[0], sides[1], noises, reference)


# --------------------------------------------------------------------------------------------------------------
# ONNX TensorProto: the five fields that golden data needs
# --------------------------------------------------------------------------------------------------------------

# TensorProto.DataType (onnx.proto) -> numpy, little-endian as in the file.
TENSOR_DTYPES = {
    1: "<f4", 2: "|u1", 3: "|i1", 4: "<u2", 5: "<i2", 6: "<i4", 7: "<i8", 9: "|b1", 10: "<f2", 11: "<f8", 12: "<u4",
    13: "<u8",
}  # fmt: skip


def read_tensor(data: bytes) -> tuple[str, Array]:
    """Name and value of a serialized ONNX TensorProto with raw data; everything else is refused in one line."""
    dims: list[int] = []
    code, name, raw = 0, "", b""
    for field, value in _fields(data):
        if field == 1 and isinstance(value, int):
            dims.append(value)
        elif field == 1 and isinstance(value, bytes):  # packed
            at = 0
            while at < len(value):
                size, at = _varint(value, at)
                dims.append(size)
        elif field == 2 and isinstance(value, int):
            code = value
        elif field == 8 and isinstance(value, bytes):
            name = value.decode("utf-8", "replace")
        elif field == 9 and isinstance(value, bytes):
            raw = value
        elif field in (1, 2, 8, 9):
            raise RefusedError(f"damaged tensor: field {field} has the wrong type")
        elif field in (3, 4, 5, 6, 7, 10, 11, 13, 14):
            raise RefusedError("only tensors with raw data in one piece can be read; write them with onnx.numpy_helper")
    if code not in TENSOR_DTYPES:
        raise RefusedError(f"tensors of ONNX type {code} cannot be read; golden data must be float, integer or bool")
    dtype = np.dtype(TENSOR_DTYPES[code])
    if any(size >= 1 << 63 for size in dims) or math.prod(dims) * dtype.itemsize != len(raw):
        raise RefusedError(f"damaged tensor: {len(raw)} bytes do not fill shape {dims} of {dtype.name}")
    if len(dims) > 32:
        raise RefusedError(f"damaged tensor: {len(dims)} axes")
    if dtype.kind == "b" and raw.strip(b"\0\1"):
        raise RefusedError("damaged tensor: a bool that is neither 0 nor 1")
    return name, np.frombuffer(raw, dtype=dtype).reshape(dims).astype(dtype.newbyteorder("="))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and raw values of a protobuf message (wire types 0, 1, 2 and 5)."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value: int | bytes
            value, at = _varint(data, at)
        elif wire in (1, 2, 5):
            size = 8 if wire == 1 else 4
            if wire == 2:
                size, at = _varint(data, at)
            if size > len(data) - at:
                raise RefusedError("damaged tensor: it ends too early")
            value, at = data[at : at + size], at + size
        else:
            raise RefusedError(f"damaged tensor: unknown wire type {wire}")
        if field == 0:
            raise RefusedError("damaged tensor: field number 0")
        yield field, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise RefusedError("damaged tensor: it ends too early")
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value & (2**64 - 1), at
    raise RefusedError("damaged tensor: a number longer than 64 bits")


# --------------------------------------------------------------------------------------------------------------
# ONNX Runtime
# --------------------------------------------------------------------------------------------------------------

# Short names; every full name that this onnxruntime offers is understood too. TensorFloat-32 keeps 10 bits of the
# 23 and is CUDA's default: a float32 proof asks for float32. TensorRT's is switched off by a variable only, which
# NVIDIA's libraries read when they are first used; one that the user has set stands.
PROVIDERS: dict[str, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}),
    "tensorrt": ("TensorrtExecutionProvider", {}),
    "openvino": ("OpenVINOExecutionProvider", {}),
    "dnnl": ("DnnlExecutionProvider", {}),
    "directml": ("DmlExecutionProvider", {}),
    "coreml": ("CoreMLExecutionProvider", {}),
    "rocm": ("ROCMExecutionProvider", {}),
    "migraphx": ("MIGraphXExecutionProvider", {}),
    "qnn": ("QNNExecutionProvider", {}),
    "xnnpack": ("XnnpackExecutionProvider", {}),
}
VARIABLES = {"TensorrtExecutionProvider": ("NVIDIA_TF32_OVERRIDE", "0")}
DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}  # whose memory; others: the host's


def import_onnxruntime() -> Any:
    """onnxruntime, without its telemetry.

    From 1.29 on the official packages report sessions and model metadata to their maker unless this variable is set
    before the import (microsoft/onnxruntime, pull request 27379). A value that the user set stands.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


class Session:
    """The bundle's model in ONNX Runtime, on exactly the provider that was asked for, by the manifest's profile.

    ``changes`` are options of the provider on top of those in `PROVIDERS`.
    """

    def __init__(
        self,
        bundle: Bundle,
        provider: str | None,
        threads: int | None,
        changes: Mapping[str, str] | None = None,
    ) -> None:
        try:
            onnxruntime = import_onnxruntime()
        except Exception as error:  # a broken native library raises more than ImportError
            raise RefusedError(f"onnxruntime cannot be imported ({error}); run: pip install onnxruntime") from None
        if threads is not None and threads < 1:
            raise RefusedError(f"threads is {threads}; give a number from 1 on")
        self.bundle, self.version = bundle, str(onnxruntime.__version__)
        self.provider, self.options = _provider(provider, onnxruntime.get_available_providers())
        self.options.update(changes or {})
        if self.provider in VARIABLES:
            os.environ.setdefault(*VARIABLES[self.provider])
        if self.provider in DEVICES and hasattr(onnxruntime, "preload_dlls"):  # CUDA and cuDNN as pip installs them
            with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
                onnxruntime.preload_dlls()
        self.profile = bundle.profile if self.provider == "CPUExecutionProvider" else None
        settings = SessionSettings() if self.profile is None else self.profile.settings
        self.settings = settings if threads is None else settings.bounded(threads)
        self._judging = _thread() if self.settings.denormals_as_zero else None
        options = self.settings.apply(onnxruntime.SessionOptions())
        options.log_severity_level = 4
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")  # ignored by old versions
        wanted: list[Any] = [(self.provider, self.options)]
        if self.provider != "CPUExecutionProvider":
            wanted.append("CPUExecutionProvider")
        try:
            self.session = onnxruntime.InferenceSession(
                os.path.join(bundle.folder, bundle.model), options, providers=wanted, enable_fallback=0
            )
        except Exception as error:  # onnxruntime's exceptions share no base class
            oldest = bundle.manifest.get("oldest_onnxruntime")
            remedy = f"; it needs onnxruntime {oldest} or later" if oldest else ""
            raise RefusedError(f"onnxruntime {self.version} cannot load {bundle.model}{remedy}: {error}") from None
        self.nodes = self._nodes()
        if self.session.get_providers()[:1] != [self.provider] or (self.nodes and self.provider not in self.nodes):
            needs = " (an NVIDIA GPU, its driver, pip install 'onnxruntime-gpu[cuda,cudnn]')"
            raise RefusedError(
                f"{self.provider} was asked for, but the model would run on CPUExecutionProvider; install what the "
                f"provider needs{needs if self.provider in DEVICES else ''}, or choose another --provider"
            )
        names = [value.name for value in self.session.get_inputs()]
        stated = [spec["name"] for spec in bundle.inputs]
        if names != stated:
            raise RefusedError(f"{bundle.model} has inputs {names}, the signature {stated}; write the bundle again")
        self.outputs = [value.name for value in self.session.get_outputs()]

    def _nodes(self) -> dict[str, int] | None:
        """How many nodes of the optimized graph each provider took; None in versions that do not tell."""
        ask: Callable[[], Any] | None = getattr(self.session, "get_provider_graph_assignment_info", None)
        if ask is None:
            return None
        taken: dict[str, int] = {}
        for part in ask():
            taken[str(part.ep_name)] = taken.get(str(part.ep_name), 0) + len(part.get_nodes())
        return taken

    def notices(self) -> list[str]:
        """What the reader must know about where the model ran."""
        if self.provider == "CPUExecutionProvider":
            return [] if self.profile is None else self.profile.notices()
        unused = [] if self.bundle.profile is None else [f"the session profile is not for {self.provider}: not applied"]
        if self.nodes is None:
            return [*unused, f"onnxruntime {self.version} does not tell which nodes {self.provider} took"]
        elsewhere = sum(self.nodes.values()) - self.nodes.get(self.provider, 0)
        told = [f"{elsewhere} of {sum(self.nodes.values())} nodes run on another provider"] if elsewhere else []
        return [*unused, *told]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(_pairs(self.outputs, [np.asarray(value) for value in self.session.run(None, dict(inputs))]))

    def bound(self, inputs: Mapping[str, Array]) -> Bound:
        """The same model with inputs and outputs in memory of its device."""
        return Bound(self.session, DEVICES.get(self.provider, "cpu"), inputs)

    def judged(self, data: Golden, answers: Mapping[str, Array]) -> tuple[OutputComparison, ...]:
        """The bundle's judgement, by a thread that sees denormal numbers."""
        if self._judging is None:
            return self.bundle.judged(data, answers)
        return self._judging.submit(self.bundle.judged, data, answers).result()

    def environment(self) -> dict[str, Any]:
        return {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "packages": {"numpy": str(np.__version__), "onnxruntime": self.version},
            "provider": self.provider,
            "provider_options": self.options,
            "provider_nodes": self.nodes,
            "threads": self.settings.threads,
            "session": None if self.profile is None else self.settings.to_json(),
        }


class Bound:
    """Inputs and outputs of an ``InferenceSession`` in fixed memory of its device, so that a run moves nothing.

    ``inputs`` fix the shapes and dtypes. `run` returns when the device is done: ONNX Runtime waits for its stream at
    the end of each run, and ``synchronize_outputs`` for what was copied. Fixed memory is what a CUDA graph needs: in a
    session that was opened with ``enable_cuda_graph`` the first run here captures one, and later runs replay it.
    Whatever fails, the capture included, is raised in ONNX Runtime's own exceptions; nothing falls back.

    Transfers are from and to NumPy's own (pageable) memory. ``device`` "cpu" does the same in the host's memory.
    Limit: outputs keep the shapes that they have for ``inputs``.
    """

    def __init__(self, session: Any, device: str, inputs: Mapping[str, Array]) -> None:
        onnxruntime = import_onnxruntime()
        apart = onnxruntime.RunOptions()
        apart.add_run_config_entry("gpu_graph_id", "-1")  # a graph of this run would point to memory that is given back
        self._names = [value.name for value in session.get_outputs()]
        shown = session.run(self._names, dict(inputs), apart)

        def room(like: Array) -> Any:
            return onnxruntime.OrtValue.ortvalue_from_shape_and_type(like.shape, like.dtype.type, device, 0)

        self._like = {name: (value.shape, value.dtype) for name, value in inputs.items()}
        self._inputs = {name: room(value) for name, value in inputs.items()}
        self._outputs = [room(np.asarray(value)) for value in shown]
        self._session, self._binding = session, session.io_binding()
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in _pairs(self._names, self._outputs):
            self._binding.bind_ortvalue_output(name, value)
        self.to_device(inputs)
        self.run()

    def to_device(self, inputs: Mapping[str, Array]) -> None:
        """Copy new values over those that the device holds."""
        found = {name: (value.shape, value.dtype) for name, value in inputs.items()}
        if found != self._like:  # ONNX Runtime compares sizes alone, and copies bytes of any dtype
            raise RefusedError(f"inputs {found} do not fit what was bound, {self._like}; bind them anew")
        for name, value in inputs.items():
            self._inputs[name].update_inplace(np.ascontiguousarray(value))
        self._binding.synchronize_inputs()

    def run(self) -> None:
        """Compute, and wait for the device."""
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()

    def from_device(self) -> dict[str, Array]:
        """Copies of the outputs of the last run."""
        return dict(_pairs(self._names, self._binding.copy_outputs_to_cpu()))


def _thread() -> concurrent.futures.ThreadPoolExecutor:
    """A thread that runs already, with the floating-point mode as it is now."""
    thread = concurrent.futures.ThreadPoolExecutor(1)
    thread.submit(int).result()
    return thread


def _provider(wanted: str | None, available: Sequence[str]) -> tuple[str, dict[str, str]]:
    known = {**{name.lower(): (name, {}) for name in available}, **PROVIDERS}
    known.update({name.lower(): (name, options) for name, options in PROVIDERS.values()})
    name, options = known.get((wanted or "cpu").lower(), (wanted, {}))
    if name not in available:
        raise RefusedError(f"provider {wanted!r} is not in this onnxruntime; it has {', '.join(available)}")
    return str(name), dict(options)


def cpu_name() -> str:
    """The processor's own name, as far as the system tells."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
        for line in stream:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure(run: Callable[[], object], seconds: float) -> list[float]:
    """Durations of single runs, in seconds, after a warm-up of a fifth of the time; at least three."""
    begin = time.perf_counter()
    warm = 0
    while warm < 2 or time.perf_counter() - begin < seconds / 5:
        run()
        warm += 1
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < 3 or time.perf_counter() - begin < seconds * 4 / 5:
        before = time.perf_counter()
        run()
        samples.append(time.perf_counter() - before)
    return samples


# --------------------------------------------------------------------------------------------------------------
# Verify
# --------------------------------------------------------------------------------------------------------------


def verify_bundle(
    folder: str | os.PathLike[str], provider: str | None = None, threads: int | None = None, seconds: float = 2.0
) -> dict[str, Any]:
    """Check the hashes, compare the model with its golden data on this machine, and time it for about ``seconds``.

    Returns the ``deploykit.verify/1`` report, strict JSON; ``seconds`` 0 leaves the timing out. Raises RefusedError for
    a damaged bundle, an unusable provider or a missing onnxruntime.
    """
    begin = time.perf_counter()
    if not is_number(seconds) or seconds < 0:
        raise RefusedError(f"seconds is {seconds!r}; give a finite number that is not negative")
    bundle = open_bundle(folder)
    golden = bundle.golden()
    session = Session(bundle, provider, threads)
    report = _prove(session, golden)
    compared = time.perf_counter()
    report["latency_ms"] = _latencies(session, golden, seconds) if seconds > 0 and report["passed"] else []
    report["seconds"] = {"compare": compared - begin, "time": time.perf_counter() - compared}
    return report


def _prove(session: Session, golden: Sequence[Golden]) -> dict[str, Any]:
    bundle = session.bundle
    comparisons: list[dict[str, Any]] = []
    judged: list[OutputComparison] = []
    for data in golden:
        reason: str | None = None
        outputs: tuple[OutputComparison, ...] = ()
        try:
            answers = session.run(data.inputs)
        except Exception as error:  # onnxruntime's exceptions share no base class
            reason = _one_line(f"the model does not run on its golden data: {error}")
        else:
            outputs = session.judged(data, answers)
        judged += outputs
        comparisons.append(
            {
                "candidate": bundle.model,
                "runtime": f"onnxruntime {session.provider}",
                "data": data.folder,
                "reference": data.reference,
                "samples": max((output.samples for output in outputs), default=0),
                "passed": all_passed(outputs),
                "reason": reason,
                "outputs": [output.to_json() for output in outputs],
            }
        )
    passed = bool(comparisons) and all(bool(comparison["passed"]) for comparison in comparisons)
    rounded = any(data.reference != "float64" for data in golden)
    if not comparisons:
        reason = "nothing was compared: the bundle holds no golden data"
    elif not passed:
        reason = "the model's answers are not equivalent to the reference"
    elif rounded:
        reason = "the reference is the float32 graph itself, so agreement is no proof"
    else:
        reason = None
    notices = [*bundle.notices, *session.notices()]
    for output in judged:
        if output.insensitive:
            notices.append(f"output {output.name} hardly varies between samples: no evidence")
        if output.excluded:
            notices.append(f"output {output.name}: {output.excluded} samples excluded from judgement")
    return {
        "schema": SCHEMA,
        "deploykit": bundle.manifest.get("deploykit"),
        "model": bundle.model,
        "passed": passed,
        "proven": passed and not rounded,
        "reason": reason,
        "reference": "float32" if rounded else "float64",
        "comparisons": comparisons,
        "latency_ms": [],
        "environment": session.environment(),
        "outputs_written": [],
        "notices": notices,
    }


def _latencies(session: Session, golden: Sequence[Golden], seconds: float) -> list[dict[str, Any]]:
    """Latency of the golden batch and, where the batch size is free, of its first sample alone."""
    inputs = golden[0].inputs
    batch = next((int(value.shape[0]) for value in inputs.values() if value.ndim), 1)
    feeds = {batch: inputs}
    if batch > 1 and all(spec["shape"][:1] == [None] for spec in session.bundle.inputs):
        feeds = {1: {name: np.ascontiguousarray(value[:1]) for name, value in inputs.items()}, batch: inputs}
    found = []
    for size, feed in feeds.items():
        durations = measure(lambda feed=feed: session.run(feed), seconds / len(feeds))  # type: ignore[misc]
        summary = {key: None if v is None else v * 1e3 for key, v in summarize(durations).items()}
        found.append({"batch": size, **summary, "runs": len(durations)})
    return found


# --------------------------------------------------------------------------------------------------------------
# Predict
# --------------------------------------------------------------------------------------------------------------


def read_inputs(bundle: Bundle, path: str) -> tuple[dict[str, Array], list[str]]:
    """The user's data as the model wants it, and notices. ``.npy`` for one input, ``.npz`` keyed by input names.

    Numbers are converted where nothing but rounding is lost (float64 and integers to float32, integers that fit).
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = (
            {name: loaded[name] for name in loaded.files} if isinstance(loaded, np.lib.npyio.NpzFile) else {"": loaded}
        )
    except Exception as error:  # numpy and zipfile raise a dozen kinds for a damaged file
        raise RefusedError(f"{path} cannot be read as .npy or .npz without pickles: {error}") from None
    names = [spec["name"] for spec in bundle.inputs]
    if list(arrays) == [""] and len(names) == 1:
        arrays = {names[0]: arrays[""]}
    if set(arrays) != set(names):
        raise RefusedError(f"{path} must be an .npz with exactly the arrays {', '.join(names)}")
    notices: list[str] = []
    inputs = {spec["name"]: _fitted(spec, arrays[spec["name"]], notices) for spec in bundle.inputs}
    return inputs, notices


def _fitted(spec: Mapping[str, Any], array: Array, notices: list[str]) -> Array:
    name, shape, wanted = spec["name"], spec["shape"], SIGNATURE_DTYPES[spec["dtype"]]
    fits = len(shape) == array.ndim and all(a is None or a == b for a, b in _pairs(shape, array.shape))
    if not fits or array.size == 0:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise RefusedError(f"input {name} has shape {list(array.shape)}; the model wants [{sizes}], samples first")
    if array.dtype != wanted:
        with np.errstate(all="ignore"):
            cast = array.astype(wanted) if array.dtype.kind in "biuf" and wanted.kind in "iuf" else None
            lossless = cast is not None and (
                np.array_equal(np.isfinite(cast), np.isfinite(array))
                if wanted.kind == "f"
                else array.dtype.kind in "biu" and np.array_equal(cast, array)
            )
        if not lossless or cast is None:
            raise RefusedError(f"input {name} holds {array.dtype} that {wanted.name} cannot hold; convert it first")
        array = cast
    low, high = spec.get("low"), spec.get("high")
    if array.dtype.kind in "iuf" and (
        (low is not None and float(array.min()) < low) or (high is not None and float(array.max()) > high)
    ):
        notices.append(
            f"input {name} holds values from {array.min():g} to {array.max():g}; the model expects {low} to {high}"
        )
    return np.ascontiguousarray(array)


def _summary_lines(outputs: Mapping[str, Array], classes: object, limit: int = 10) -> Iterator[str]:
    for name, value in outputs.items():
        yield f"{name}  {_dtype_name(value.dtype)} {list(value.shape)}"
        if value.ndim != 2 or value.shape[1] < 2 or value.dtype.kind != "f":
            continue
        named = isinstance(classes, list) and len(classes) == value.shape[1]
        for sample, row in enumerate(value[:limit]):
            top = int(np.argmax(row))
            label = f" {classes[top]}" if named else ""  # type: ignore[index]
            yield f"  sample {sample}: class {top}{label} ({float(row[top]):.4g})"
        if len(value) > limit:
            yield f"  ... and {len(value) - limit} more samples"


def archive(outputs: Mapping[str, Array]) -> bytes:
    """An .npz that takes any name (np.savez stumbles over one called "file") and has no timestamps."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, value in outputs.items():
            plain = np.asarray(value, dtype=str) if value.dtype.kind == "O" else value
            piece = io.BytesIO()
            np.lib.format.write_array(piece, np.ascontiguousarray(plain).reshape(plain.shape), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(name + ".npy"), piece.getvalue())
    return stream.getvalue()


# --------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise RefusedError(f"{message}; see --help")


def _parser() -> _Parser:
    parser = _Parser(
        prog="verify.py",
        description="Prove this bundle on this machine: hashes, golden data, latency.",
        epilog="exit codes: 0 equivalent, 1 not equivalent, 2 bad usage, changed file or missing component",
        allow_abbrev=False,
    )
    parser.add_argument("--provider", metavar="NAME", help="cpu (default), cuda, tensorrt, ... or onnxruntime's name")
    parser.add_argument("--threads", metavar="N", type=int, help="threads of one run (default: the profile's)")
    parser.add_argument("--seconds", metavar="S", type=float, default=2.0, help="time to measure (default 2; 0: none)")
    parser.add_argument("--json", metavar="PATH|-", help="write the machine report; with - to stdout, and only it")
    parser.add_argument(
        "--predict", metavar="FILE", help=".npy, or .npz keyed by input names: run on this, once proven"
    )
    parser.add_argument("--output", metavar="FILE.npz", help="where --predict writes the outputs")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    return parser


def main(argv: Sequence[str] | None = None, folder: str | None = None) -> int:
    """The command line; returns the exit code. ``folder`` is the bundle, by default where this file lies."""
    try:
        return _main(_parser().parse_args(argv), folder or os.path.dirname(os.path.abspath(__file__)))
    except RefusedError as error:
        message, code = f"error: {error}", 2
    except BrokenPipeError:  # the reader of our output left
        with contextlib.suppress(Exception):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except Exception as error:
        message, code = f"error: internal: {type(error).__name__}: {_one_line(error)}; please report it", 70
    sys.stderr.write(message + "\n")
    return code


def _main(options: argparse.Namespace, folder: str) -> int:
    bundle = open_bundle(folder)
    targets = [path for path in (options.json, options.output) if path not in (None, "-")]
    for path in targets:
        _claim(path, bundle, options.force, options.predict)
    if len(set(map(os.path.realpath, targets))) < len(targets):
        raise RefusedError(f"--json and --output name the same file {options.json}; give each a name of its own")
    if options.output and not options.predict:
        raise RefusedError("--output needs --predict FILE; see --help")
    predicted: dict[str, Array] = {}
    if options.predict:
        inputs, notices = read_inputs(bundle, options.predict)
        session = Session(bundle, options.provider, options.threads)
        report = _prove(session, bundle.golden())
        report["seconds"] = {}
        report["notices"] += notices
        if report["passed"]:
            try:
                predicted = session.run(inputs)
            except Exception as error:  # onnxruntime's exceptions share no base class
                raise RefusedError(f"the model does not run on {options.predict}: {error}") from None
        if options.output and predicted:
            _write(options.output, archive(predicted))
            report["outputs_written"].append(options.output)
    else:
        report = verify_bundle(folder, options.provider, options.threads, options.seconds)
    if options.json:
        text = json.dumps(report, indent=2, allow_nan=False) + "\n"
        if options.json == "-":
            sys.stdout.write(text)
        else:
            _write(options.json, text.encode("ascii"))
    if options.json != "-":
        lines = [*_table(report), *_summary_lines(predicted, bundle.manifest.get("class_names"))]
        _print("\n".join(lines) + "\n")
    sys.stdout.flush()
    return 0 if report["passed"] else 1


def _print(text: str) -> None:
    """Write text that a narrow terminal encoding may not be able to show."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))


def _table(report: Mapping[str, Any]) -> Iterator[str]:
    def number(value: float | None, form: str, missing: str = "-") -> str:
        return missing if value is None else format(value, form)

    rows = [("output", "samples", "SNR dB", "original dB", "max abs", "verdict")]
    for comparison in report["comparisons"]:
        for output in comparison["outputs"]:
            rows.append(
                (
                    str(output["name"]),
                    str(output["samples"] - output["excluded"]),
                    number(output["snr_db"], ".1f", "exact" if output["exact"] else "-"),
                    number(output["reference_snr_db"], ".1f"),
                    number(output["max_abs"], ".3g"),
                    "pass" if output["passed"] else "FAIL",
                )
            )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in _pairs(row, widths)).rstrip()
    for comparison in report["comparisons"]:
        if comparison["reason"]:
            yield f"FAIL {comparison['data']}: {comparison['reason']}"
        for output in comparison["outputs"]:
            if output["reason"]:
                yield f"FAIL {comparison['data']} {output['name']}: {output['reason']}"
    for notice in report["notices"]:
        yield f"notice: {notice}"
    for timing in report["latency_ms"]:
        marks = ", ".join(f"{key} {number(timing[key], '.3f')}" for key in ("median", "p90", "p99"))
        yield f"latency, batch {timing['batch']}: {marks} ms ({timing['runs']} runs)"
    about = report["environment"]
    threads = "default" if about["threads"] is None else about["threads"]
    yield f"onnxruntime {about['packages']['onnxruntime']}, {about['provider']}, threads {threads}, {about['cpu']}"
    if about["session"] is not None:
        yield f"session profile: {SessionSettings.from_json(about['session']).text}"
    verdict = "PROVEN" if report["proven"] else "EQUIVALENT, NOT PROVEN" if report["passed"] else "NOT EQUIVALENT"
    yield verdict + (f": {report['reason']}" if report["reason"] else "")


def _claim(path: str, bundle: Bundle, force: bool, given: str | None = None) -> None:
    """Refuse, before any work, a target that exists, belongs to the bundle or is the data that are given."""
    target = os.path.realpath(path)
    own = [_inside(bundle.folder, name) for name in bundle.manifest["files"]]
    if target in [*own, os.path.realpath(os.path.join(bundle.folder, MANIFEST))]:
        raise RefusedError(f"{path} belongs to the bundle; choose another place")
    if given and target == os.path.realpath(given):
        raise RefusedError(f"{path} is what --predict reads; choose another place")
    if os.path.isdir(target) or not os.path.isdir(os.path.dirname(target)):
        raise RefusedError(f"{path} cannot be written: no such folder, or a folder itself; choose another place")
    if os.path.exists(target) and not force:
        raise RefusedError(f"{path} exists already; choose another place, or --force to replace it")


def _write(path: str, data: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=".verify-", dir=os.path.dirname(os.path.abspath(path)))
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise RefusedError(f"cannot write {path}: {error.strerror}; free some space or choose another place") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


if __name__ == "__main__":
    with contextlib.suppress(Exception):  # the native library may talk on stderr, which belongs to `error: ...`
        import_onnxruntime().set_default_logger_severity(4)
    sys.exit(main())
