"""What a check proves: from the comparisons of a report to one verdict, whoever asks for it.

    refusal     why nothing counts: a comparison failed, or no output at all is evidence
    doubts      outputs that passed and prove nothing: they hardly vary between the samples, so that a candidate which
                computes something else from other inputs agrees just as well; or most samples could not be judged,
                because the original itself gives NaN or infinity there where float64 does not
    objection   why a check does not pass: a refusal or a doubt

`deploykit check`, `ci` and the pytest fixture pass where there is no objection. `deploy` and `export` write a file
unless there is a refusal, and say with ``proven: false`` what is in doubt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Json = Mapping[str, Any]

NO_EVIDENCE = "no output varies between the samples, so agreement is no evidence; give real inputs with --data"
LEAST_JUDGED = 0.5  # of an output's samples


def _outputs(check: Json) -> Iterator[Json]:
    for comparison in check["comparisons"]:
        yield from comparison["outputs"]


def worst(check: Json) -> str:
    """One line about what failed first in a check."""
    for comparison in check["comparisons"]:
        if comparison["passed"]:
            continue
        where = f"{comparison['candidate']} on {comparison['runtime']} is not equivalent"
        reasons = [f"output {o['name']}: {o['reason']}" for o in comparison["outputs"] if not o["passed"]]
        return f"{where}: {comparison['reason'] or (reasons or ['nothing was compared'])[0]}"
    return "nothing was compared"


def dull(comparison: Json) -> bool:
    """Whether no output of a candidate varies between the samples."""
    return bool(comparison["outputs"]) and all(output.get("insensitive") for output in comparison["outputs"])


def refusal(check: Json) -> str | None:
    """Why a check does not count: it failed, or every output hardly varies between the samples."""
    if not check["passed"]:
        return worst(check)
    return NO_EVIDENCE if any(map(dull, check["comparisons"])) else None


def doubt(output: Json) -> str | None:
    """Why agreement on an output is no evidence, or None."""
    if output.get("insensitive"):
        return "hardly varies between the samples, so agreement is no evidence; give --data on which it does"
    samples = output.get("samples") or 0
    judged = samples - (output.get("excluded") or 0)
    if judged < LEAST_JUDGED * samples:
        return (
            f"only {judged} of {samples} samples could be judged: in the others the original itself overflows;"
            " give inputs with --data on which it does not"
        )
    return None


def doubts(check: Json) -> list[str]:
    """What passed and proves nothing, one line for each output."""
    found = {output["name"]: doubt(output) for output in _outputs(check) if output["passed"]}
    return [f"output {name} {why}" for name, why in found.items() if why is not None]


def excluded(check: Json) -> list[str]:
    """Notices about samples that were not judged."""
    most: dict[str, tuple[int, int]] = {}
    for output in _outputs(check):
        if output.get("excluded"):
            found = (output["excluded"], output["samples"])
            most[output["name"]] = max(found, most.get(output["name"], (0, 0)))
    return [
        f"output {name}: {count} of {samples} samples not judged, where the original itself is no yardstick"
        for name, (count, samples) in most.items()
    ]


def objection(check: Json) -> str | None:
    """Why a check does not pass, or None."""
    return refusal(check) or next(iter(doubts(check)), None)


def verdict(check: Json) -> tuple[bool, str | None]:
    """Whether a check proves what it compared, and the reason where it does not."""
    reason = objection(check)
    if reason is None and check["reference"]["precision"] != "float64":
        reason = "a TensorFlow graph has no float64 reference: compared with its own float32 answer"
    return reason is None, reason
