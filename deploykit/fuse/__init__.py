"""Fuse: analyse, plan, apply, prove.

A plan says what goes (`deploykit.fuse.plan`), applying it gives a model (`deploykit.fuse.apply`), and the
proof compares that model with the original (`deploykit.fuse.proof`). Three findings send a plan back,
each with the sources at fault marked as kept and the reason with them:

    a cast that loses a weight       the sources whose edits land in that layer
    a proof that does not hold       the sources found by halving: fused alone they break it (by rounding alone:
                                     conditioning, as below)
    a float32 answer that is worse   the same, judged by what rounding costs, in the stored weights alone or as the
                                     model runs: more than 3x the original's own error and more than 4 ulp
                                     (conditioning: exact in algebra, but digits are lost)

What costs digits is the shift, so that such a source may still be reduced to it. A Rescaling that only adds, which
is what reduction leaves, may cost half as much: it is cheap to keep, and what was just refused must not pass when
the fused model is fused again, whose own error is another.

The factor 3 lies below what `deploykit check` and `benchmarks/reprove.py` allow (4), so that what passes here passes
there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from deploykit.data import synthesize
from deploykit.errors import ProofError, UnsupportedModelError
from deploykit.fuse import proof as proofs
from deploykit.fuse import sources
from deploykit.fuse.apply import apply
from deploykit.fuse.plan import Decision, Plan
from deploykit.fuse.plan import plan as make_plan
from deploykit.fuse.proof import Proof, Reference
from deploykit.fuse.reasons import CODES, Refusal
from deploykit.graph import Trace, float32_only, key, trace
from deploykit.load.health import refuse_rewriting
from deploykit.opaque import graph_of

__all__ = ["CODES", "Decision", "Fused", "Plan", "Proof", "Refusal", "fuse"]

CONDITIONING_FACTOR = 3.0
CONDITIONING_FLOOR_ULP = 4.0
ROUNDING = (
    1e-10  # float64 errors below are told as lost digits, above as a wrong law; either way the fold is taken back
)


@dataclass(frozen=True, eq=False)
class Fused:
    """A fused model with everything that was decided and measured.

    ``seconds``: "trace", "plan", "apply" and "proof". ``renamed``: path of an inlined layer whose name
    was taken -> its name here. ``proof`` is None after a dry run.
    """

    model: Any
    decisions: tuple[Decision, ...]
    proof: Proof | None
    notices: tuple[str, ...]
    renamed: Mapping[str, str]
    params_before: int
    params_after: int
    seconds: Mapping[str, float]

    def count(self, outcome: str) -> int:
        return sum(decision.outcome == outcome for decision in self.decisions)


def _parameters(model: Any) -> int:
    return sum(math.prod(variable.shape) for variable in model.weights)


def blame(suspects: Sequence[str], error: Callable[[frozenset[str]], float], limit: float) -> list[str]:
    """The sources at fault: those that alone bring the error above the limit.

    ``error(group)`` is that of the model with only ``group`` fused. Where a group is too far off although both its
    halves are not, the one source is named that the larger errors lead to; the caller asks again without it.
    """
    if error(frozenset(suspects)) <= limit:
        return []
    if len(suspects) == 1:
        return list(suspects)
    halves = suspects[: len(suspects) // 2], suspects[len(suspects) // 2 :]
    found = [name for half in halves for name in blame(half, error, limit)]
    return found or [_worst(max(halves, key=lambda half: error(frozenset(half))), error)]


def _worst(suspects: Sequence[str], error: Callable[[frozenset[str]], float]) -> str:
    if len(suspects) == 1:
        return suspects[0]
    halves = suspects[: len(suspects) // 2], suspects[len(suspects) // 2 :]
    return _worst(max(halves, key=lambda half: error(frozenset(half))), error)


def _rounding_limit(ref: Reference) -> float:
    dtypes = [output.dtype for output in ref.float32 if output.dtype.kind == "f" or output.dtype.name == "bfloat16"]
    ulp = max((2.0**-7 if d.name == "bfloat16" else float(np.finfo(d).eps) for d in dtypes), default=0.0)
    return max(CONDITIONING_FACTOR * ref.rounding(ref.float32), CONDITIONING_FLOOR_ULP * ulp)


@dataclass(frozen=True, eq=False)
class Refused:
    """Sources that a round of measuring found unfit, with the reason; the reducible ones may still leave in part."""

    reasons: Mapping[str, Refusal]
    reducible: frozenset[str] = frozenset()

    def with_(self, found: Mapping[str, Refusal], plan: Plan) -> Refused:
        """What a fold costs in accuracy its shift costs: the scale alone may still go, but not twice unfit."""
        outcomes = {decision.layer: decision.outcome for decision in plan.decisions}
        costly = {n for n, why in found.items() if why.code == "conditioning" and outcomes[n] == "fused"}
        return Refused({**self.reasons, **found}, (self.reducible - set(found)) | costly)


@dataclass(frozen=True, eq=False)
class _Job:
    """One fuse: the trace and what the user asked for."""

    found: Trace
    keep: Collection[str]
    barrier: Collection[str]

    def plan(self, refused: Refused, only: frozenset[str] | None = None) -> Plan:
        return make_plan(
            self.found,
            keep=self.keep,
            barrier=self.barrier,
            refused=refused.reasons,
            reducible=refused.reducible,
            only=only,
        )

    @cached_property
    def shifts(self) -> frozenset[str]:
        """The sources that look like what reduction leaves."""
        nodes = [
            node for node in self.found.nodes if sources.is_source(node) and key(node.layer) is keras.layers.Rescaling
        ]
        read = [sources.read(self.found, node) for node in nodes]
        return frozenset(x.node.name for x in read if isinstance(x, sources.Source) and (x.affine.scale == 1).all())

    def at_fault(
        self, group: Collection[str], refused: Refused, error: Callable[[Plan], float], limit: float
    ) -> list[str]:
        """Those of a group of sources that are at fault; all of it where none can be told from the others."""
        suspects = sorted(group)
        known: dict[frozenset[str], float] = {}

        def of(group: frozenset[str]) -> float:
            if group not in known:
                known[group] = error(self.plan(refused, group))
            return known[group]

        return blame(suspects, of, limit) or suspects


def fuse(
    model: Any,
    *,
    keep: Collection[str] = (),
    barrier: Collection[str] = (),
    samples: Mapping[str, npt.NDArray[Any]] | None = None,
    seed: int = 0,
    prove: bool = True,
) -> Fused:
    """Fold every affine of a Keras model that can go exactly; the model given is not touched.

    ``keep``: names of layers that must stay; ``barrier``: layers no affine may enter or cross.
    ``samples``: inputs of the proof, keyed by input name; synthetic ones (``seed``) when absent.
    ``prove=False`` leaves the proof out (the result then says ``proof=None``).

    Raises UnsupportedModelError for models that must not be rewritten, ProofError when what was fused
    does not reproduce the original.
    """
    refuse_rewriting(model)
    if graph_of(model) is not None:
        raise UnsupportedModelError(
            f"model {model.name} is a TensorFlow graph without Keras layers: there are none to fold; "
            "`deploykit export` and `deploykit deploy` take it as it is"
        )
    clock = time.perf_counter
    start = clock()
    found = trace(model)
    job = _Job(found, keep, barrier)
    seconds = {"trace": clock() - start, "plan": 0.0, "apply": 0.0, "proof": 0.0}
    notices = []
    if getattr(model, "compiled", False):
        notices.append("the model is compiled; the fused one is for inference and is not")
    ref: Reference | None = None
    refused = Refused({})
    while True:
        start = clock()
        plan = job.plan(refused)
        seconds["plan"] += clock() - start
        start = clock()
        applied = apply(found, plan)
        seconds["apply"] += clock() - start
        if applied.losses:
            refused = refused.with_(applied.losses, plan)
            continue
        if not prove:
            proof = None
            break
        start = clock()
        if ref is None:
            if samples is None:
                samples = synthesize(found.signature, count=proofs.proof_count(found), seed=seed).arrays
            ref = proofs.reference(found, model, samples, seed)
        proof = proofs.prove(found, plan, applied.model, ref)
        worse = _worse(job, plan, refused, proof, ref)
        seconds["proof"] += clock() - start
        if not worse:
            break
        refused = refused.with_(worse, plan)
    notices += applied.notices
    single = float32_only(found)
    if prove and single:
        notices.append(f"TensorFlow evaluates {', '.join(single[:3])} in float32 whatever the dtype policy")
    return Fused(
        model=applied.model,
        decisions=plan.decisions,
        proof=proof,
        notices=tuple(notices),
        renamed=found.renamed,
        params_before=_parameters(model),
        params_after=_parameters(applied.model),
        seconds=seconds,
    )


def _worse(job: _Job, plan: Plan, refused: Refused, proof: Proof, ref: Reference) -> dict[str, Refusal]:
    """The sources that a plan must give up, with the reason; empty when all is well."""
    if not proof.holds:
        if not plan.changed:
            raise ProofError(
                f"the rebuilt model differs from the original by {proof.exactness_f64:.2g} in float64 "
                f"(bound {proof.exactness_bound:.2g}) with nothing fused; please report it"
            )
        names = job.at_fault(plan.changed, refused, lambda trial: proofs.exactness(job.found, trial, ref), ref.bound)
        differs = f"the model would differ by {proof.exactness_f64:.2g} in float64 (bound {proof.exactness_bound:.2g})"
        if proof.exactness_f64 < ROUNDING:
            return {name: Refusal("conditioning", f"would lose digits: {differs}") for name in names}
        return {name: Refusal("proof_failed", f"fused, {differs}") for name in names}
    limit = _rounding_limit(ref)
    error = partial(proofs.rounding, job.found, ref=ref)
    for suspects, allowed in ((plan.changed, limit), (plan.changed & job.shifts, limit / 2)):
        if not suspects:
            continue
        rounding = proof.rounding if suspects == plan.changed else error(job.plan(refused, suspects))
        if rounding > allowed:
            names = job.at_fault(suspects, refused, error, allowed)
            bits = math.log2(rounding / max(proof.float32_original, 2.0**-23))
            return {name: Refusal("conditioning", f"would lose {bits:.1f} bits in float32") for name in names}
    return {}
