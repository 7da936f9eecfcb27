"""The mutation score of `deploykit check`: wrong candidates that it catches, right ones that it passes.

    python benchmarks/mutation_score.py [--quick] [--subjects residual tokens] [--processes 2] [--seed 0]
                                        [--json PATH|-] [--check] [--out docs/mutation_score.md]

Mutants are made from small real models (`mutants/subjects.py`), as Keras models and as ONNX files, in twelve families.
Each goes through the product's own path, as `deploykit check` without data does it: synthetic inputs, float64
reference, default policy (`mutants/product.py` is the only file that knows it). Of files that other people trained,
where they are there, some kinds of each family are made.

*Counted* is a mutant whose own float64 outputs differ from the reference, on the inputs of the check, by more than 10
times the original's float32 error: effect = ||m - r|| / ||o - r||, L2, the largest over all outputs; infinite where m
has another shape, NaN or infinity. Mutants of the families "shapes" and "rare" count by definition: they are wrong for
a batch, a size or a kind of sample that users have, whether or not the check's inputs show it. A counted mutant that
passes is *missed*. What does not run in float64 at all is *stillborn*, and no mutant (but for "shapes", where that is
the point).

*Preserving* variants compute the same function, written otherwise; one that fails is a false alarm.

Exit code 1 when a counted mutant is missed, a variant fails, the referee disagrees with the reference, or a family has
fewer than five kinds in one form. Without ``--quick`` and ``--subjects`` the document is written to ``--out``;
``--check`` writes nothing, and also exits 1 where the document's tables differ from what was found. Seeded: the same
machine gives the same score; effects near 10 may fall otherwise on another.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # tiny nets: a CPU is what they fit
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from mutants import BY_DEFINITION, FAMILIES, StillbornError

ROOT = Path(__file__).resolve().parent.parent
COUNTS_ABOVE = 10.0  # times the original's own float32 error
REFEREE_LIMIT = COUNTS_ABOVE / 4  # so that what the referee errs by decides no count
FEWEST_KINDS = 5  # of each family, in Keras and in ONNX
FORMS = ("Keras", "ONNX")
PLACES = dict.fromkeys(FAMILIES, 1) | {"single weights": 2, "biases": 2, "whole channels": 2}
QUICK_KINDS, QUICK_VARIANTS = 2, 6
TRAINED_KINDS = 4  # of each family, in each form; these models are larger
Row = dict[str, Any]


# ------------------------------------------------------------------------------------- one subject, in a worker


def effect(outputs: Mapping[str, Any], reference: Any) -> float:
    """How far outputs in float64 are from the reference, in units of the original's own error."""
    import numpy as np

    largest = 0.0
    for name, right in reference.outputs.items():
        wrong = outputs.get(name)
        if wrong is None or wrong.shape != right.shape or (np.isfinite(wrong) != np.isfinite(right)).any():
            return math.inf
        finite = np.isfinite(right)
        error = float(np.linalg.norm((wrong - right)[finite]))
        own = float(np.linalg.norm((reference.original[name].astype(np.float64) - right)[finite]))
        largest = max(largest, error / own if own else math.inf if error else 0.0)
    return largest


def measured(subject: str, form: str, made: Any, reference: Any) -> Row:
    """The row of one mutant."""
    from mutants import product

    try:
        size = effect(made.doubled(reference.samples.arrays), reference)
    except StillbornError:
        size = None
    counted = made.family in BY_DEFINITION or (size is not None and size > COUNTS_ABOVE)
    row = {"subject": subject, "form": form, "family": made.family, "kind": made.kind, "where": made.where}
    if size is None and made.family not in BY_DEFINITION:
        return {**row, "stillborn": True}
    objection = product.objection(reference, made.artefact)
    return {**row, "effect": _finite(size), "counted": counted, "caught": objection is not None, "objection": objection}


def _finite(size: float | None) -> float | str:
    return "does not run" if size is None else "NaN or shape" if math.isinf(size) else size


def one(job: tuple[str, int, bool]) -> Row:
    """Everything about one subject: mutants, variants, and how well the referee agrees."""
    name, seed, quick = job
    import numpy as np
    import onnx
    import tensorflow as tf
    from mutants import keras_edits, onnx_edits, preserving, product, referee, subjects

    from deploykit.export import export

    tf.config.threading.set_intra_op_parallelism_threads(1)  # the parent runs several of these
    tf.config.threading.set_inter_op_parallelism_threads(1)
    begin = time.perf_counter()
    model = subjects.subject(name, seed)
    reference = product.reference_for(name, model, seed)
    rng = np.random.default_rng([seed, *name.encode()])
    trained = name in subjects.FILES
    kinds = QUICK_KINDS if quick else TRAINED_KINDS if trained else None
    places = dict.fromkeys(FAMILIES, 1) if quick or trained else PLACES
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        path = export(model, room / "right.onnx").path
        proto = onnx.load(path)
        double = keras_edits.apply(model, keras_edits.Edit(), "float64")
        arrays = reference.samples.arrays
        agreement = {
            "Keras": effect(keras_edits.evaluate(double, arrays), reference),
            "ONNX": effect(referee.evaluate(referee.doubled(proto), arrays), reference),
        }
        made = {
            "Keras": keras_edits.mutants(model, reference.signature, rng, places, kinds),
            "ONNX": onnx_edits.mutants(proto, model, reference.signature, rng, places, room / "mutant.onnx", kinds),
        }
        rows = [measured(name, form, mutant, reference) for form in FORMS for mutant in made[form]]
        given = preserving.Given(model, proto, path, room, reference, rng)
        alarms = [
            {"subject": name, "variant": variant, "objection": _objection(reference, artefact)}
            for variant, artefact in preserving.variants(given, QUICK_VARIANTS if quick else None)
        ]
    seconds = time.perf_counter() - begin
    return {"subject": name, "mutants": rows, "variants": alarms, "agreement": agreement, "seconds": seconds}


def _objection(reference: Any, artefact: Any) -> str | None:
    from mutants import product

    judge = product.objection_to_answers if isinstance(artefact, dict) else product.objection
    return judge(reference, artefact)


# --------------------------------------------------------------------------------------------------- judging


def born(found: Sequence[Row]) -> list[Row]:
    return [row for subject in found for row in subject["mutants"] if not row.get("stillborn")]


def missed(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["counted"] and not row["caught"]]


def false_alarms(found: Sequence[Row]) -> list[Row]:
    return [row for subject in found for row in subject["variants"] if row["objection"] is not None]


def faults(found: Sequence[Row], *, whole: bool) -> Iterator[str]:
    """Why this run is no success; ``whole``: of all subjects and kinds."""
    rows = born(found)
    for row in missed(rows):
        yield f"missed: {named(row)}"
    for row in false_alarms(found):
        yield f"false alarm: {row['subject']}, {row['variant']}: {row['objection']}"
    for subject in found:
        for form, size in subject["agreement"].items():
            if not size < REFEREE_LIMIT:
                yield f"{subject['subject']}: the {form} referee is {size:.2g} x the own error from the reference"
    for family in FAMILIES if whole else ():
        for form in FORMS:
            kinds = {row["kind"] for row in rows if row["family"] == family and row["form"] == form}
            if len(kinds) < FEWEST_KINDS:
                yield f"{family}: only {len(kinds)} kinds in {form}"


def named(row: Row) -> str:
    size = row["effect"]
    size = size if isinstance(size, str) else f"{size:.2g} x"
    return f"{row['family']}, {row['kind']}, {row['form']} {row['subject']} at {row['where']} ({size})"


# ------------------------------------------------------------------------------------------------- rendering

PROSE = """# Mutation score of `deploykit check`

Wrong candidates made from right ones, judged as `deploykit check` judges without data. *Counted*: the float64 effect on
some output exceeds 10 times the original's own float32 error (families *shapes* and *rare*: by definition); *missed*:
counted, and passed; *uncounted*: too small to count, and how many of those were caught all the same; *stillborn*: runs
nowhere. `benchmarks/mutation_score.py` says it in full.
"""


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def scores(found: Sequence[Row]) -> list[list[Any]]:
    """A line for each family and form, and the sum."""
    rows = born(found)
    dead = [row for subject in found for row in subject["mutants"] if row.get("stillborn")]

    def line(family: str, form: str, chosen: Sequence[Row], stillborn: int) -> list[Any]:
        counted = [row for row in chosen if row["counted"]]
        small = [row for row in chosen if not row["counted"]]
        caught, also = (sum(row["caught"] for row in part) for part in (counted, small))
        kinds = len({(row["form"], row["kind"]) for row in chosen})
        also = sum(row["caught"] for row in small)
        return [
            family,
            form,
            kinds,
            len(chosen),
            len(counted),
            caught,
            len(counted) - caught,
            len(small),
            also,
            stillborn,
        ]

    lines = [
        line(
            family,
            form,
            [row for row in rows if row["family"] == family and row["form"] == form],
            sum(row["family"] == family and row["form"] == form for row in dead),
        )
        for family in FAMILIES
        for form in FORMS
    ]
    return [*lines, line("all", "", rows, len(dead))]


HEADINGS = (
    "family",
    "form",
    "kinds",
    "mutants",
    "counted",
    "caught",
    "missed",
    "uncounted",
    "of them caught",
    "stillborn",
)


def document(found: Sequence[Row], seed: int) -> str:
    """Everything as Markdown."""
    rows = born(found)
    lost, alarms = missed(rows), false_alarms(found)
    counted = sum(row["counted"] for row in rows)
    variants = [row for subject in found for row in subject["variants"]]
    small = sorted((row for row in rows if not row["counted"]), key=lambda row: (row["family"], -row["effect"]))
    parts = [
        f"<!-- made by: python benchmarks/mutation_score.py --seed {seed} (run it again, do not edit this file) -->",
        PROSE.rstrip(),
        f"Score: **{counted - len(lost)} of {counted}** counted mutants caught; **{len(alarms)} false alarms** among "
        f"{len(variants)} variants that preserve the function.",
        table(HEADINGS, scores(found)),
        "## Missed",
        table(("mutant", "model", "form", "where", "effect"), map(_cells, lost)) if lost else "None.",
        "## False alarms",
        table(("model", "variant", "objection"), [list(row.values()) for row in alarms]) if alarms else "None.",
        "## Too small to count",
        table(
            ("mutant", "model", "form", "where", "effect", "caught"),
            [[*_cells(row), "yes" if row["caught"] else ""] for row in small],
        ),
        "## Models",
        table(
            ("model", "mutants", "variants", "Keras referee", "ONNX referee"),
            [
                [
                    subject["subject"],
                    len(subject["mutants"]),
                    len(subject["variants"]),
                    *(f"{subject['agreement'][form]:.1g}" for form in FORMS),
                ]
                for subject in found
            ],
        ),
        "*Referee*: what is computed in float64 of the unmutated model, against the reference, in units of the\n"
        "original's own float32 error. An ONNX file holds constants that were folded in float32; that remains there.",
    ]
    return "\n\n".join(parts) + "\n"


def _cells(row: Row) -> list[Any]:
    size = row["effect"] if isinstance(row["effect"], str) else f"{row['effect']:.2g}"
    return [f"{row['family']}: {row['kind']}", row["subject"], row["form"], row["where"], size]


def _same_score(text: str, path: Path) -> bool:
    """Whether the document's score table is that of ``text``."""

    def lines(document: str) -> list[str]:
        return [line for line in document.split("## ")[0].splitlines() if line.startswith(("| ", "Score"))]

    return path.exists() and lines(path.read_text(encoding="utf-8")) == lines(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few mutants of each family; writes no document")
    parser.add_argument("--subjects", nargs="+", metavar="NAME", help="only these; writes no document")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", metavar="PATH|-", help="write every mutant; with - to stdout, and only it")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the document's score differs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "mutation_score.md")
    options = parser.parse_args()
    from mutants import subjects

    names = options.subjects or subjects.names()
    if unknown := sorted(set(names) - set(subjects.names())):
        parser.error(f"no subject {', '.join(unknown)}; there are {', '.join(subjects.names())}")
    whole = not options.quick and options.subjects is None
    found = []
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
        for row in pool.imap(one, [(name, options.seed, options.quick) for name in names]):
            found.append(row)
            print(f"{row['subject']}: {len(row['mutants'])} mutants ({row['seconds']:.0f} s)", file=sys.stderr)
    text = document(found, options.seed)
    wrong = list(faults(found, whole=whole))
    if options.json:
        record = (
            json.dumps({"seed": options.seed, "faults": wrong, "subjects": found}, indent=1, allow_nan=False) + "\n"
        )
        sys.stdout.write(record) if options.json == "-" else Path(options.json).write_text(record, encoding="utf-8")
    if options.json != "-":
        print(text, end="")
    if options.check and whole and not _same_score(text, options.out):
        wrong.append(f"{options.out.name} has another score; run this without --check")
    if whole and not options.check:
        from deploykit.files import whole_file

        with whole_file(options.out, force=True) as target:
            target.write_text(text, encoding="utf-8")
    print("".join(f"{line}\n" for line in wrong), end="", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
