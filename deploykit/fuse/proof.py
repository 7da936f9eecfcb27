"""The proof: original and fused, both in float64, on the same inputs.

    exactness_f64      fused with its float64 weights, before the cast, against the original: relative L2
    exactness_bound    max(1e-12, 32 x noise), which exactness_f64 must not exceed
    noise_f64          the original against itself with every weight moved by one float64 ulp up or down:
                       by backward error analysis (Higham, Accuracy and Stability, ch. 3) that is what
                       summing in another order amounts to, so it is what exact algebra may differ by
    exactness_stored   the fused weights as the file has them, evaluated in float64
    float32_*          both models as they run, against the float64 original

The last two say what rounding costs; they are compared in front of a final softmax or the like instead of behind it,
where large logits would make them a matter of luck. For exactness every output counts, and besides it what goes into
a final softmax, sigmoid or the like, because those hide differences. An output that hardly varies from sample to
sample (spread below 1e-6 of its size) is listed as insensitive and is no evidence; without any evidence there is no
proof. The two float64 models never live at the same time.

All of this is about copies of the model's layers, made from their configs; a copy that does not answer like the model
itself in its own precision ends the proof.

Limits: a model that does not answer the same twice (noise above 1e-5: random layers) cannot be proven.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from ml_dtypes import finfo  # knows bfloat16 too; TensorFlow depends on it

from deploykit.errors import ProofError
from deploykit.fuse.apply import apply, round_weights
from deploykit.fuse.plan import Plan
from deploykit.graph import Trace, numpy, replay, run, squashed_outputs, values_per_sample

Arrays = Sequence[npt.NDArray[Any]]
FLOOR = 1e-12  # relative L2 that float64 reaches on any net that is not ill-conditioned
NOISE_FACTOR = 32
INSENSITIVE = 1e-6
IRREPRODUCIBLE = 1e-5
NOISE_SAMPLES = 4  # of the proof's samples measure the noise


@dataclass(frozen=True)
class Proof:
    """Relative L2 errors, the largest over all outputs that are evidence."""

    exactness_f64: float
    exactness_bound: float
    exactness_stored: float
    noise_f64: float
    float32_original: float
    float32_fused: float
    insensitive: tuple[str, ...]
    samples: int

    @property
    def holds(self) -> bool:
        return self.exactness_f64 <= self.exactness_bound

    @property
    def rounding(self) -> float:
        """What being fused costs in the model's own precision: in its weights alone, or as it runs."""
        return max(self.exactness_stored, self.float32_fused)


@dataclass(frozen=True, eq=False)
class Reference:
    """The original in float64 on the proof's inputs; computed once for all attempts."""

    samples: Mapping[str, npt.NDArray[Any]]
    batch: int
    names: tuple[str, ...]
    outputs: tuple[npt.NDArray[Any], ...]  # the model's own, then what goes into squashing ends
    evidence: tuple[bool, ...]
    noise: float
    float32: tuple[npt.NDArray[Any], ...]  # the same as the original runs
    judged: tuple[bool, ...] = ()  # where rounding is compared: in front of a squashing end, not behind it

    @property
    def bound(self) -> float:
        return max(FLOOR, NOISE_FACTOR * self.noise)

    def error(self, outputs: Arrays) -> float:
        """Largest relative L2 distance to the reference, of the outputs that are evidence."""
        return self._largest(outputs, self.evidence)

    def rounding(self, outputs: Arrays) -> float:
        """The same of outputs that rounding made, in front of a final softmax or the like."""
        return self._largest(outputs, self.judged)

    def _largest(self, outputs: Arrays, counted: Sequence[bool]) -> float:
        pairs = zip(outputs, self.outputs, counted, strict=False)
        return max((distance(a, b) for a, b, counts in pairs if counts), default=math.inf)


def distance(candidate: npt.NDArray[Any], reference: npt.NDArray[Any]) -> float:
    """||c - r|| / ||r|| over the elements where r is finite; infinite where c is not finite there."""
    if candidate.shape != reference.shape:
        return math.inf
    if not np.issubdtype(reference.dtype, np.floating):
        return 0.0 if np.array_equal(candidate, reference) else math.inf
    finite = np.isfinite(reference)
    c, r = candidate[finite].astype(np.float64), reference[finite].astype(np.float64)
    if not np.isfinite(c).all():
        return math.inf
    size = float(np.linalg.norm(r))
    error = float(np.linalg.norm(c - r))
    return error / size if size else (0.0 if error == 0 else math.inf)


def _varies(output: npt.NDArray[Any]) -> bool:
    """Whether an output depends on the sample visibly enough to be evidence."""
    if not np.issubdtype(output.dtype, np.floating):
        return len(np.unique(output, axis=0)) > 1
    finite = np.isfinite(output).reshape(len(output), -1).all(axis=1)
    values = output[finite].astype(np.float64)
    if len(values) < 2:
        return False
    size = float(np.sqrt(np.mean(values**2)))
    return size > 0 and float(np.sqrt(np.mean(values.var(axis=0)))) / size > INSENSITIVE


def slice_of(found: Trace) -> int:
    """Samples that fit into about 400 MB of float64 activations at a time."""
    return max(1, min(32, 50_000_000 // max(1, values_per_sample(found))))


def proof_count(found: Trace) -> int:
    """How many samples a proof uses: 16, fewer for nets on which one sample is work."""
    values = values_per_sample(found)
    return 16 if values < 2_000_000 else 8


def reference(found: Trace, model: Any, samples: Mapping[str, npt.NDArray[Any]], seed: int = 0) -> Reference:
    """Evaluate the original in float64 (and as it runs), and measure its own float64 noise."""
    batch = slice_of(found)
    double = replay(found, dtype="float64", logits=True)
    outputs = tuple(run(double, samples, batch=batch))
    rng = np.random.default_rng(seed)
    for variable in double.weights:
        value = numpy(variable)
        if value.dtype == np.float64:
            towards = np.where(rng.integers(0, 2, value.shape, np.int8) == 1, np.inf, -np.inf)
            variable.assign(np.nextafter(value, towards))
    some = {name: array[:NOISE_SAMPLES] for name, array in samples.items()}
    moved = run(double, some, batch=batch)
    del double
    gc.collect()
    names = [spec.name for spec in found.signature.outputs]
    names += [f"in front of the end {i}" for i in range(len(outputs) - len(names))]
    evidence = tuple(_varies(output) for output in outputs)
    pairs = zip(moved, outputs, evidence, strict=True)
    noise = max((distance(a, b[:NOISE_SAMPLES]) for a, b, counts in pairs if counts), default=0.0)
    if not any(np.isfinite(output).any() for output in outputs if output.dtype.kind == "f"):
        raise ProofError(
            "every output of the model is NaN or infinite on the inputs of the proof; `deploykit inspect` says which "
            "weights or statistics are at fault"
        )
    if noise > IRREPRODUCIBLE:
        raise ProofError(
            f"the model does not answer the same twice (float64 runs differ by {noise:.2g}): a layer is random at "
            "inference; nothing can be proven about it"
        )
    if not any(evidence):
        raise ProofError(
            "no output of the model varies between the inputs of the proof, so nothing can be proven; "
            "give real inputs with --data"
        )
    own = run(model, samples, batch=batch)
    copy = run(replay(found, logits=True), samples, batch=batch)
    _check_copy(found, own, copy, noise)
    judged = (*(not squashed for squashed in squashed_outputs(found)), *[True] * (len(outputs) - len(own)))
    return Reference(samples, batch, tuple(names), outputs, evidence, noise, (*own, *copy[len(own) :]), judged)


def _check_copy(found: Trace, own: Arrays, copy: Arrays, noise: float) -> None:
    """Every proof is about copies of the layers: ProofError unless a copy of the model answers like the model itself.

    What may differ is rounding, in the model's own precision and amplified as the float64 noise shows.
    """
    for spec, a, b in zip(found.signature.outputs, copy, own, strict=False):
        floating = b.dtype.kind == "f" or b.dtype.name == "bfloat16"
        ulp = float(finfo(b.dtype).eps) if floating else 0.0  # type: ignore[no-untyped-call]
        limit = 64 * ulp + min(1e-2, NOISE_FACTOR * noise * ulp / float(np.finfo(np.float64).eps))
        if (far := distance(a, b)) > limit:
            raise ProofError(
                f"a copy of the model made from its layers' configs answers otherwise than the model (output "
                f"{spec.name} differs by {far:.2g}): the get_config of some layer does not describe all that it does"
            )


def exactness(found: Trace, plan: Plan, ref: Reference) -> float:
    """How far the model of a plan is from the reference, with its float64 weights."""
    return ref.error(run(apply(found, plan, dtype="float64", logits=True).model, ref.samples, batch=ref.batch))


def _stored(double: Any, found: Trace, plan: Plan, ref: Reference) -> float:
    """The error of a plan's weights as a file has them; ``double`` is the plan's model in float64, and is spent."""
    round_weights(double, found, plan)
    return ref.rounding(run(double, ref.samples, batch=ref.batch))


def _running(found: Trace, plan: Plan, ref: Reference, fused: Any = None) -> float:
    """The error of a plan's model as it runs; ``fused``: that model, where it exists already."""
    outputs = [] if fused is None else run(fused, ref.samples, batch=ref.batch)
    if fused is None or any(squashed_outputs(found)):
        outputs += run(apply(found, plan, logits=True).model, ref.samples, batch=ref.batch)[len(outputs) :]
    return ref.rounding(outputs)


def rounding(found: Trace, plan: Plan, ref: Reference) -> float:
    """`Proof.rounding` of a plan on trial."""
    double = apply(found, plan, dtype="float64", logits=True).model
    return max(_stored(double, found, plan, ref), _running(found, plan, ref))


def prove(found: Trace, plan: Plan, fused: Any, ref: Reference) -> Proof:
    """Measure everything about a fused model; nothing is judged here but by `Proof.holds`."""
    double = apply(found, plan, dtype="float64", logits=True).model
    exact = ref.error(run(double, ref.samples, batch=ref.batch))
    return Proof(
        exactness_f64=exact,
        exactness_bound=ref.bound,
        exactness_stored=_stored(double, found, plan, ref),
        noise_f64=ref.noise,
        float32_original=ref.rounding(ref.float32),
        float32_fused=_running(found, plan, ref, fused),
        insensitive=tuple(n for n, counts in zip(ref.names, ref.evidence, strict=True) if not counts),
        samples=len(next(iter(ref.samples.values()))),
    )
