"""What a check can be asked for beyond its verdict: where it fails, on what it would fail most, whether slopes agree.

    layers       errors layer by layer (`deploykit.bisect`) of every candidate that failed; with ``layers`` of all
    worst case   the input on which each candidate differs most (`deploykit.worst_case`)
    gradients    input gradients of each candidate that is a Keras model (`deploykit.gradients`)

Where they look
---------------
At `SAMPLES` samples: first those in which the candidate's outputs failed, wherever in the data they lie, then others
spread evenly over all of it. What failed at another size alone is looked at there. An error in one sample of many may
be too small for a norm over all; where no layer's error jumps, the failing samples are bisected again, alone. The box
of a search is the range of *all* the data, which are read once more for it, batch by batch. Layers of at most `MOST`
candidates are compared: each costs about four passes over the samples.

What it means for the verdict
-----------------------------
A worst case that fails, and gradients that differ, fail the check; numerical differences with which the original itself
disagrees judge nothing, and a notice says so. A verdict is never lost: whatever goes wrong in here
is told in a notice once the check has failed. Where it had passed, a search or gradients that were asked for and did
not take place are a failure, because nothing compared is no pass. Layers explain and do not judge: where they cannot
be told apart (an opaque graph, a file that names none) a notice says why.

Layers under a tolerance (``rtol``, ``atol``) are held to the policy of float32, as that speaks of outputs alone.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deploykit.bisect import LayerReport, layer_errors, twin_of
from deploykit.check import Candidate, Comparison, Reference
from deploykit.compare import Fidelity, Law, Policy, Tolerance
from deploykit.errors import DeploykitError, InputError
from deploykit.gradients import GradientReport, input_gradients
from deploykit.load import load
from deploykit.opaque import graph_of
from deploykit.runtimes import trained
from deploykit.verify import FLOAT32
from deploykit.worst_case import Box, WorstCase, boxes_of, search

Arrays = dict[str, npt.NDArray[Any]]
Judged = tuple[Candidate, Comparison]

SAMPLES = 32  # that layers, searches and gradients start from
MOST = 4  # candidates whose layers are compared
BATCH = 32  # samples that are read at once for their range


@dataclass(frozen=True)
class Wishes:
    """What was asked for. ``layers``: also where nothing failed; ``budget``: evaluations of a search, 0 for none;
    ``save``: where the worst of all samples goes.
    """

    layers: bool = False
    budget: int = 0
    save: Path | None = None
    gradients: bool = False
    seed: int = 0
    force: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """Further keys of a check report, what failed, and notices.

    ``body``: ``layers`` (of the first that failed), ``further_layers`` (of the others), ``worst_case``, ``gradients``;
    what was not done is missing. ``explained``: where the error of each candidate begins, a line for each.
    """

    body: dict[str, Any]
    failures: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    written: tuple[str, ...] = ()

    @property
    def explained(self) -> tuple[str, ...]:
        records = [*([self.body["layers"]] if "layers" in self.body else ()), *self.body.get("further_layers", ())]
        return tuple(f"{record['candidate']}: {record['text'].splitlines()[0]}" for record in records)


def diagnosed(
    original: Any,
    reference: Reference,
    candidates: Sequence[Candidate],
    comparisons: Sequence[Comparison],
    policy: Law,
    wishes: Wishes,
) -> Diagnosis:
    """Do what was asked for, for candidates that were compared: in the order of ``comparisons``.

    With no wishes: the layers of those that failed, and nothing where all passed. Raises nothing: what went wrong is in
    the notices, or in the failures.
    """
    return _Closer(original, reference, policy, wishes, list(zip(candidates, comparisons, strict=True))).look()


# ------------------------------------------------------------------------------------------------- which samples


def failing(comparison: Comparison) -> list[int]:
    """The samples that the outputs which failed name as their worst."""
    worst = [output.worst_sample for output in comparison.outputs if not output.passed]
    return [sample for sample in dict.fromkeys(worst) if sample is not None]


def chosen(count: int, first: Sequence[int], batch: int | None, most: int = SAMPLES) -> npt.NDArray[np.intp]:
    """The numbers of at most ``most`` samples out of ``count``: ``first``, then others evenly over all.

    Whole batches where the model's batch size is fixed.
    """
    size = min(count, most)
    if batch:
        size = max(batch, size - size % batch)
    first = [sample for sample in dict.fromkeys(first) if 0 <= sample < count][:size]
    others = np.setdiff1d(np.arange(count), first)
    spread = np.linspace(0, max(0, len(others) - 1), min(len(others), size - len(first)))
    return np.concatenate([np.array(first, np.intp), others[np.rint(spread).astype(np.intp)]])


def filled(rows: Sequence[int], batch: int | None) -> npt.NDArray[np.intp]:
    """The rows, the last one repeated up to whole batches."""
    short = -len(rows) % (batch or 1)
    return np.array([*rows, *[rows[-1]] * short], np.intp)


# ---------------------------------------------------------------------------------------------------- looking


class _Closer:
    """One diagnosis while it is made. A candidate without outputs was not compared: nothing is asked of it."""

    def __init__(self, original: Any, reference: Reference, law: Law, wishes: Wishes, judged: Sequence[Judged]) -> None:
        self.original, self.reference, self.law, self.wishes = original, reference, law, wishes
        self.judged = judged
        self.failed = not all(comparison.passed for _, comparison in judged)
        self.models: dict[int, Any] = {}  # by the place of the candidate: what was loaded once
        self.body: dict[str, Any] = {}
        self.failures, self.notices, self.written = list[str](), list[str](), list[str]()

    def look(self) -> Diagnosis:
        self.layers()
        if self.wishes.budget:
            self.worst_cases()
        if self.wishes.gradients:
            self.gradients()
        return Diagnosis(self.body, tuple(self.failures), tuple(self.notices), tuple(self.written))

    @contextlib.contextmanager
    def told(self, what: str, *, judging: bool = True) -> Iterator[None]:
        """Whatever goes wrong is a notice; where the verdict hangs on it, a failure."""
        try:
            yield
        except Exception as error:  # also what nobody foresaw: the verdict must not be lost
            known = isinstance(error, DeploykitError)
            cause = str(error) if known else f"internal error, please report it: {type(error).__name__}: {error}"
            lines = self.failures if judging and not self.failed else self.notices
            lines.append(" ".join(f"{what}: {cause}".split()))

    def model(self, place: int) -> Any:
        """The candidate; a Keras file is read once."""
        candidate = self.judged[place][0]
        if candidate.runtime != "keras" or not isinstance(candidate.model, str | os.PathLike):
            return candidate.model
        if place not in self.models:
            self.models[place] = load(candidate.model).model
        return self.models[place]

    def compared(self, undone: str) -> Iterator[tuple[int, Candidate, Comparison]]:
        """The candidates that have outputs; the others are left ``undone``."""
        for place, (candidate, comparison) in enumerate(self.judged):
            if comparison.outputs:
                yield place, candidate, comparison
            else:
                self.notices.append(f"{candidate.name} on {candidate.runtime} {undone}: it was not compared")

    def samples(self, comparison: Comparison) -> Arrays:
        samples = self.reference.samples
        return dict(samples.take(chosen(samples.count, failing(comparison), self.reference.fixed)).arrays)

    # ------------------------------------------------------------------------------------------------- layers

    def layers(self) -> None:
        wrong = [place for place, (_, found) in enumerate(self.judged) if not found.passed and found.outputs]
        asked = [place for place in range(len(self.judged)) if place not in wrong] if self.wishes.layers else []
        places = [*wrong, *asked]
        records = []
        for place in places[:MOST]:
            candidate, comparison = self.judged[place]
            with self.told(f"{candidate.name} is not compared layer by layer", judging=False):
                found = self.layer_errors(place, comparison)
                record = found.to_json()
                rows = record.pop("layers")
                records.append({**record, "rows": rows, "candidate": candidate.name, "text": found.text()})
        if records:
            self.body["layers"] = records[0]
        if records[1:]:
            self.body["further_layers"] = records[1:]
        if left := [self.judged[place][0].name for place in places[MOST:]]:
            self.notices.append(
                f"not compared layer by layer, because others were: {', '.join(left)}; check them alone"
            )

    def layer_errors(self, place: int, comparison: Comparison) -> LayerReport:
        model, law = self.model(place), self.law if isinstance(self.law, Policy | Fidelity) else FLOAT32
        wrong = failing(comparison)
        if not wrong and (other := self.other_size(comparison)) is not None:
            return layer_errors(self.original, model, dict(other.samples.head(SAMPLES).arrays), policy=law)
        found = layer_errors(self.original, model, self.samples(comparison), policy=law)
        if found.first is not None or not wrong:
            return found
        few = self.reference.samples.take(filled(wrong, self.reference.fixed)).arrays
        alone = layer_errors(self.original, model, few, policy=law)
        return found if alone.first is None else alone

    def other_size(self, comparison: Comparison) -> Reference | None:
        """The size at which a candidate failed, where it passed at that of the data."""
        sources = {source for source, reason in comparison.sizes if reason is not None}
        return next((other for other in self.reference.others if other.samples.source in sources), None)

    # -------------------------------------------------------------------------------------------- worst cases

    def worst_cases(self) -> None:
        self.body["worst_case"] = []
        found: list[tuple[float, str, WorstCase]] = []
        boxes: dict[str, Box] = {}
        for place, candidate, comparison in self.compared("is not searched"):
            with self.told(f"no worst case of {candidate.name} on {candidate.runtime} was searched"):
                boxes = boxes or boxes_of(self.reference.samples.batches(self.reference.fixed or BATCH))
                worst = self.searched(place, candidate, self.samples(comparison), boxes)
                told = worst.text().removeprefix("worst case: ")
                self.body["worst_case"].append({"candidate": candidate.name, **worst.to_json(), "text": told})
                found.append((math.inf if worst.ratio is None else worst.ratio, candidate.name, worst))
                if not worst.passed:
                    self.failures.append(f"{candidate.name} on {candidate.runtime} is not equivalent: {worst.reason}")
        if found and self.wishes.save is not None:
            with self.told("the worst input was not saved"):
                ratio, name, worst = max(found, key=lambda entry: entry[0])
                self.written.append(str(worst.save(self.wishes.save, force=self.wishes.force)))
                share = f", {ratio:.3g} times what is allowed" if math.isfinite(ratio) else ""
                self.notices.append(f"{self.wishes.save} holds the worst input found, that of {name}{share}")

    def searched(self, place: int, candidate: Candidate, arrays: Arrays, boxes: Mapping[str, Box]) -> WorstCase:
        with contextlib.closing(trained.open(candidate.runtime, self.model(place))) as session:
            return search(
                self.original,
                session,
                arrays,
                budget=self.wishes.budget,
                seed=self.wishes.seed,
                fused=self.pair(place, candidate),
                law=self.law,
                boxes=boxes,
            )

    def pair(self, place: int, candidate: Candidate) -> Any | None:
        """The Keras model whose difference from the original leads a search: the candidate, or what it was made of.

        None where nobody knows that: then the outputs alone lead.
        """
        if graph_of(self.original) is not None:
            return None
        if candidate.runtime == "keras":
            model = self.model(place)
            return None if graph_of(model) is not None else model
        try:
            return twin_of(self.original, candidate.model)
        except DeploykitError:
            return None

    # ---------------------------------------------------------------------------------------------- gradients

    def gradients(self) -> None:
        self.body["gradients"] = []
        for place, candidate, comparison in self.compared("has no gradients to compare"):
            if candidate.runtime != "keras":
                self.notices.append(f"{candidate.name} on {candidate.runtime} has no gradients to compare")
                continue
            with self.told(f"no gradients of {candidate.name} were compared"):
                slopes = self.slopes(self.model(place), self.samples(comparison))
                self.body["gradients"].append({"candidate": candidate.name, **slopes.to_json(), "text": slopes.text()})
                self.notices += [f"gradients of {candidate.name}: {notice}" for notice in slopes.notices]
                if not slopes.passed:
                    self.failures.append(f"{candidate.name}: {slopes.reason}")
        if not (self.body["gradients"] or self.failed or self.failures):
            self.failures.append("no gradients were compared; give a .keras file as candidate")

    def slopes(self, model: Any, arrays: Arrays) -> GradientReport:
        if isinstance(self.law, Tolerance):
            raise InputError("rtol and atol speak of outputs, not of slopes; judge them by a policy")
        return input_gradients(self.original, model, arrays, seed=self.wishes.seed, law=self.law)
