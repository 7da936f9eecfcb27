"""The mutation score: what it makes is wrong, what it calls preserving is not, and a blind check would be seen."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # last: tests have a random_nets of their own

import mutation_score  # noqa: E402
from mutants import FAMILIES, keras_edits, onnx_edits, preserving, product, referee, subjects  # noqa: E402

from deploykit.export import export  # noqa: E402

EVERY = dict.fromkeys(FAMILIES, 1)


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """The model of a table: (model, its reference, its file, the graph in it)."""
    model = subjects.subject("table")
    path = export(model, tmp_path_factory.mktemp("right") / "right.onnx").path
    return model, product.reference_for("table", model, 0), path, onnx.load(path)


def made(right, form, kinds, tmp_path, seed=0):
    model, reference, _, proto = right
    rng = np.random.default_rng(seed)
    if form == "Keras":
        return keras_edits.mutants(model, reference.signature, rng, EVERY, kinds)
    return onnx_edits.mutants(proto, model, reference.signature, rng, EVERY, tmp_path / "mutant.onnx", kinds)


@pytest.mark.parametrize("form", mutation_score.FORMS)
def test_a_mutant_of_every_family_is_caught(right, form, tmp_path):
    rows = [mutation_score.measured("table", form, mutant, right[1]) for mutant in made(right, form, 1, tmp_path)]
    born = [row for row in rows if not row.get("stillborn")]
    assert {row["family"] for row in born} == set(FAMILIES)
    seen = [row for row in born if row["counted"] and row["family"] != "rare"]  # the data decides about rare ones
    assert len(seen) >= 5
    assert mutation_score.missed(seen) == []


def test_a_check_that_passes_everything_misses_everything_that_counts(right, tmp_path, monkeypatch):
    monkeypatch.setattr(product, "objection", lambda reference, artefact: None)
    rows = [mutation_score.measured("table", "ONNX", mutant, right[1]) for mutant in made(right, "ONNX", 2, tmp_path)]
    found = [{"subject": "table", "mutants": rows, "variants": [], "agreement": {}}]
    counted = [row for row in mutation_score.born(found) if row["counted"]]
    assert len(mutation_score.missed(counted)) == len(counted) > 5
    assert sum(line.startswith("missed: ") for line in mutation_score.faults(found, whole=False)) == len(counted)


@pytest.mark.parametrize("form", mutation_score.FORMS)
def test_every_family_has_five_kinds(right, form):
    kinds = (keras_edits if form == "Keras" else onnx_edits).kinds_for(right[1].signature)
    assert tuple(kinds) == FAMILIES
    assert all(len(rows) >= mutation_score.FEWEST_KINDS for rows in kinds.values())


def test_variants_that_preserve_the_function_pass(right, tmp_path):
    model, reference, path, proto = right
    given = preserving.Given(model, proto, path, tmp_path, reference, np.random.default_rng(0))
    found = {name: mutation_score._objection(reference, artefact) for name, artefact in preserving.variants(given)}
    assert len(found) >= 20
    assert {name: objection for name, objection in found.items() if objection} == {}


def test_a_variant_that_does_not_preserve_the_function_is_told(right, tmp_path):
    _, reference, path, _ = right
    answers = product.answers_of(path, reference, 1)
    assert product.objection_to_answers(reference, answers) is None
    answers["kind"] = answers["kind"] * np.float32(1.001)
    assert "kind" in product.objection_to_answers(reference, answers)


@pytest.mark.parametrize("name", ["table", "tokens"])
def test_both_referees_agree_with_the_reference(name, tmp_path):
    model = subjects.subject(name)
    reference = product.reference_for(name, model, 0)
    arrays = reference.samples.arrays
    proto = onnx.load(export(model, tmp_path / "right.onnx").path)
    double = keras_edits.apply(model, keras_edits.Edit(), "float64")
    assert mutation_score.effect(keras_edits.evaluate(double, arrays), reference) < 1e-6
    assert (
        mutation_score.effect(referee.evaluate(referee.doubled(proto), arrays), reference)
        < mutation_score.REFEREE_LIMIT
    )


def test_an_effect_is_measured_in_units_of_the_originals_own_error(right):
    reference = right[1]
    outputs = {name: np.array(value, np.float64) for name, value in reference.outputs.items()}
    assert mutation_score.effect(outputs, reference) == 0
    own = {name: value.astype(np.float64) for name, value in reference.original.items()}
    assert mutation_score.effect(own, reference) == pytest.approx(1)
    assert mutation_score.effect({**outputs, "kind": outputs["kind"][:, :2]}, reference) == float("inf")
    outputs["kind"][3, 1] = np.nan
    assert mutation_score.effect(outputs, reference) == float("inf")


def test_the_document_names_what_was_missed_and_the_score(right):
    row = {"subject": "table", "form": "ONNX", "family": "rare", "kind": "NaN on zeros", "where": "kind"}
    lost = {**row, "effect": 0.0, "counted": True, "caught": False, "objection": None}
    small = {
        **row,
        "family": "BN",
        "kind": "epsilon",
        "effect": 2.5,
        "counted": False,
        "caught": True,
        "objection": "x",
    }
    alarm = {"subject": "table", "variant": "Identity", "objection": "too far"}
    found = [
        {"subject": "table", "mutants": [lost, small], "variants": [alarm], "agreement": {"Keras": 0.0, "ONNX": 0.2}}
    ]
    text = mutation_score.document(found, 0)
    assert "**0 of 1** counted" in text
    assert "**1 false alarms** among 1" in text
    assert "| rare: NaN on zeros | table | ONNX | kind | 0 |" in text
    assert "| BN: epsilon | table | ONNX | kind | 2.5 | yes |" in text
    assert [line.split(":")[0] for line in mutation_score.faults(found, whole=False)] == ["missed", "false alarm"]
