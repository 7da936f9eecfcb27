"""Arrays against a float64 reference: the yardstick is the original's own float32 error.

The laws, their derivation and their limits stand once, in ``deploykit.verify``, because that file travels in every
bundle; here they get deploykit's errors and the shape in which checks use them. numpy only.

    reference   the trained model in float64
    original    the trained model's own float32 answer; None where no reference better than it exists
    candidate   what is judged
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit import verify
from deploykit.errors import DataError, InputError
from deploykit.verify import Fidelity, Noise, OutputComparison, Policy, Tolerance, all_passed

__all__ = [
    "Fidelity",
    "Law",
    "Noise",
    "OutputComparison",
    "Policy",
    "Tolerance",
    "all_passed",
    "compare",
    "compare_outputs",
    "noise_between",
    "policy_from",
]

Array = NDArray[Any]
Law = Policy | Fidelity | Tolerance


def policy_from(
    rtol: float | None = None,
    atol: float | None = None,
    precision: str | None = None,
    *,
    default: str = verify.FLOAT32.name,
) -> Law:
    """The user's tolerance if there is one (a missing half is 0), otherwise the policy of the precision."""
    if precision is not None and (rtol is not None or atol is not None):
        raise InputError(f"--rtol and --atol take the place of the policy {precision}; give one or the other")
    precision = precision or default
    if rtol is not None or atol is not None:
        with _explained(InputError):
            return Tolerance(0.0 if rtol is None else rtol, 0.0 if atol is None else atol)
    if precision not in verify.POLICIES:
        raise InputError(
            f"no policy for precision {precision!r}; there is one for {', '.join(verify.POLICIES)}, "
            "or give --rtol and --atol"
        )
    return verify.POLICIES[precision]


def noise_between(reference: Array, *originals: Array) -> Noise:
    """The original's own error; of several float32 evaluations the largest counts, sample by sample."""
    with _explained(DataError):
        return Noise.between(reference, *originals)


def compare(name: str, reference: Array, original: Array | None, candidate: Array, policy: Law) -> OutputComparison:
    """Judge one output, axis 0 counting samples; the candidate must have the original's shape and dtype."""
    with _explained(DataError, f"output {name}"):
        noise = None if original is None else Noise.between(np.asarray(reference), np.asarray(original))
        dtype = None if original is None else np.asarray(original).dtype
        return verify.judge(name, reference, candidate, policy, noise, dtype)


def compare_outputs(
    reference: Mapping[str, Array],
    original: Mapping[str, Array] | None,
    candidate: Mapping[str, Array],
    policy: Law,
) -> tuple[OutputComparison, ...]:
    """Judge all outputs, in the reference's order; missing, extra, renamed or reordered ones fail, and so does none."""
    noises: dict[str, Noise] | None = None
    dtypes: dict[str, Any] | None = None
    if original is not None:
        noises, dtypes = {}, {}
        for name in reference:
            if name in original:
                with _explained(DataError, f"output {name}"):
                    noises[name] = Noise.between(np.asarray(reference[name]), np.asarray(original[name]))
                dtypes[name] = np.asarray(original[name]).dtype
    with _explained(DataError):
        return verify.judge_outputs(reference, candidate, policy, noises, dtypes)


@contextlib.contextmanager
def _explained(kind: type[InputError], where: str = "") -> Iterator[None]:
    try:
        yield
    except verify.RefusedError as error:
        raise kind(f"{where}: {error}" if where else str(error)) from error
