"""Which affines of well-known nets go: every family of keras.applications, fused and proven; makes docs/coverage.md.

    python benchmarks/coverage.py [--size 96] [--nets MobileNetV2 Xception] [--check] [--out docs/coverage.md]

The nets have random weights (no download) and live, calibrated statistics with positive gammas, as `tests/nets.py`
makes them: without that the output of a deep random net hardly depends on its input. The proof sees four samples that
deploykit draws for the net. Each net is built, saved, loaded and fused
(with its proof) in a process of its own, one after the other. Images are ``--size`` pixels wide, which changes
neither the layers nor the algebra, only the time and the memory that a proof takes; 96 is enough for every net
(the largest minimum is 75) and leaves padding at the borders of all but the last maps.

Without ``--nets`` the table is written to ``--out``; with it, only printed. ``--check`` compares the counts with
the numbers in `NETS` and the spread with `EVIDENCE`, and exits 1 when one is missed. A net that cannot be built,
loaded or fused, and a family that has no row, always exit 1.

Limits: one net stands for its family where only depth and width differ (DenseNet169, EfficientNetB7, ...). Seconds
belong to the machine that ran it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

BN = "BatchNormalization"
OUTCOMES = ("fused", "reduced", "kept")
SAMPLES = 4
EVIDENCE = 1e-2  # smallest relative spread in front of the softmax that makes agreement evidence
Row = dict[str, Any]


@dataclass(frozen=True)
class Required:
    """What must be reached: so many BN there, at least so many of them fused, the rest reduced, none kept.

    ``left``: how many affines of other kinds may remain at most; None: not asked.
    """

    bn: int
    fused: int
    left: int | None = None


@dataclass(frozen=True)
class Net:
    """One net: its family (the module of keras.applications), the smallest image it takes, what must be reached."""

    family: str
    required: Required | None = None
    smallest: int = 32


NETS: Mapping[str, Net] = {
    "MobileNet": Net("mobilenet"),
    "MobileNetV2": Net("mobilenet_v2", Required(52, 52)),
    "MobileNetV3Small": Net("mobilenet_v3"),
    "MobileNetV3Large": Net("mobilenet_v3"),
    "ResNet50": Net("resnet", Required(53, 53)),
    "ResNet152": Net("resnet"),
    "ResNet50V2": Net("resnet_v2", Required(49, 48)),
    "DenseNet121": Net("densenet", Required(121, 59)),
    "EfficientNetB0": Net("efficientnet", Required(49, 49, left=1)),
    "EfficientNetV2B0": Net("efficientnet_v2"),
    "Xception": Net("xception", Required(40, 40), smallest=71),
    "InceptionV3": Net("inception_v3", Required(94, 94), smallest=75),
    "InceptionResNetV2": Net("inception_resnet_v2", smallest=75),
    "NASNetMobile": Net("nasnet", Required(192, 192)),
    "VGG16": Net("vgg16"),
    "VGG19": Net("vgg19"),
    "ConvNeXtTiny": Net("convnext"),
}


# ---------------------------------------------------------------------------------------- one net, one process


def build(name: str, size: int) -> Any:
    """The calibrated net."""
    import keras
    from nets import calibrate

    keras.utils.set_random_seed(0)
    side = max(size, NETS[name].smallest)
    return calibrate(getattr(keras.applications, name)(weights=None, input_shape=(side, side, 3)))


def measure(name: str, size: int) -> Row:
    """Build, save, load and fuse one net in this process."""
    import numpy as np

    from deploykit import graph
    from deploykit.data import synthesize
    from deploykit.fuse import fuse
    from deploykit.fuse.sources import is_source
    from deploykit.load import load

    with tempfile.TemporaryDirectory() as room:
        path = Path(room) / f"{name}.keras"
        build(name, size).save(path)
        begin = time.perf_counter()
        model = load(path).model
        load_s = time.perf_counter() - begin
    found = graph.trace(model)
    (spec,) = found.signature.inputs
    images = synthesize(found.signature, count=SAMPLES, edges=0).arrays
    fused = fuse(model, samples=images)
    assert fused.proof is not None
    logits = graph.run(graph.replay(found, dtype="float64", logits=True), images)[-1]
    counts: dict[str, dict[str, int]] = {BN: dict.fromkeys(OUTCOMES, 0)}
    for decision in fused.decisions:
        counts.setdefault(decision.kind, dict.fromkeys(OUTCOMES, 0))[decision.outcome] += 1
    left = [decision for decision in fused.decisions if decision.outcome != "fused"]
    classes = (type(node.layer).__name__ for node in found.nodes if not is_source(node))
    return {
        "net": name,
        "size": spec.shape[1],
        "layers": len(found.nodes),
        "counts": counts,
        "norms": Counter(kind for kind in classes if kind.endswith("Normalization")),
        "left": [[d.layer, d.kind, d.outcome, d.code, d.reason] for d in left],
        "exactness_f64": fused.proof.exactness_f64,
        "exactness_bound": fused.proof.exactness_bound,
        "float32_original": fused.proof.float32_original,
        "float32_fused": fused.proof.float32_fused,
        "spread": float(logits.std(axis=0).mean() / np.abs(logits).mean()),
        "seconds": {"load": load_s, **fused.seconds},
    }


def fresh(name: str, size: int) -> Row:
    """The same in a process of its own; ``error`` says why there is nothing."""
    command = [sys.executable, __file__, "--one", name, "--size", str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"net": name, "error": said[-1]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


# --------------------------------------------------------------------------------------------------- judging


def missed(row: Row) -> Iterator[str]:
    """What a net was to reach and did not."""
    name = row["net"]
    if "error" in row:
        yield f"{name}: {row['error']}"
        return
    bn = row["counts"][BN]
    if row["exactness_f64"] > row["exactness_bound"]:
        yield f"{name}: differs by {row['exactness_f64']:.1e} in float64, allowed are {row['exactness_bound']:.0e}"
    if row["spread"] < EVIDENCE:
        yield f"{name}: its output varies by {row['spread']:.1e} only, so the proof saw nothing"
    required = NETS[name].required
    if required is None:
        return
    if sum(bn.values()) != required.bn:
        yield f"{name}: {sum(bn.values())} BN, expected {required.bn}"
    if bn["fused"] < required.fused:
        yield f"{name}: {bn['fused']} BN fused, required {required.fused}"
    if bn["kept"]:
        yield f"{name}: {bn['kept']} BN kept, required none"
    others = sum(row["counts"][kind][o] for kind in row["counts"] if kind != BN for o in ("reduced", "kept"))
    if required.left is not None and others > required.left:
        yield f"{name}: {others} other affines left, allowed are {required.left}"


def unlisted() -> list[str]:
    """Families of keras.applications that build models and have no row in `NETS`."""
    import keras

    home = "keras.src.applications."
    builders = (value for name, value in vars(keras.applications).items() if name[0].isupper() and callable(value))
    families = {builder.__module__.removeprefix(home) for builder in builders}
    return sorted(families - {net.family for net in NETS.values()})


# ------------------------------------------------------------------------------------------------- rendering

# heading -> the cell of a row
COLUMNS: Mapping[str, Any] = {
    "net": lambda row: row["net"],
    "BN": lambda row: sum(row["counts"][BN].values()),
    "fused": lambda row: row["counts"][BN]["fused"],
    "reduced": lambda row: row["counts"][BN]["reduced"],
    "kept": lambda row: row["counts"][BN]["kept"],
    "other affines": lambda row: others(row),
    "exactness": lambda row: f"{row['exactness_f64']:.1e}",
    "bound": lambda row: f"{row['exactness_bound']:.0e}",
    "float32 original": lambda row: f"{row['float32_original']:.1e}",
    "float32 fused": lambda row: f"{row['float32_fused']:.1e}",
    "spread": lambda row: f"{row['spread']:.2f}",
    "plan s": lambda row: f"{row['seconds']['plan']:.2f}",
    "apply s": lambda row: f"{row['seconds']['apply']:.2f}",
    "load s": lambda row: f"{row['seconds']['load']:.2f}",
}

PROSE = """# Coverage: what goes in well-known nets

Random weights, live calibrated statistics, positive gammas, images of {size} pixels (or the fewest that a net takes);
every net was saved, loaded, fused and proven in a process of its own.

- *other affines*: Normalization, Rescaling, constant arithmetic as fused/reduced/kept; one that collapsed into another
  counts as fused.
- *exactness*: relative distance of the fused model from the original in float64; it must stay below the *bound*.
- *float32*: distance of the float32 runs from the float64 reference, of the original and of the fused model.
- *spread*: how far the output in front of the softmax varies between the images, relative to its size; below {evidence}
  agreement would be no evidence.
- Seconds belong to the machine that ran it; compare them with one another only.
"""


def others(row: Row) -> str:
    cells = (f"{kind} {'/'.join(str(n[o]) for o in OUTCOMES)}" for kind, n in row["counts"].items() if kind != BN)
    return ", ".join(cells) or "-"


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def document(rows: Sequence[Row], size: int) -> str:
    """All rows as Markdown."""
    done = [row for row in rows if "error" not in row]
    with_bn = [row for row in done if sum(row["counts"][BN].values())]
    parts = [
        f"<!-- made by: python benchmarks/coverage.py --size {size} (run it again instead of editing this file) -->",
        PROSE.format(size=size, evidence=EVIDENCE).rstrip(),
        table(list(COLUMNS), [[cell(row) for cell in COLUMNS.values()] for row in with_bn]),
    ]
    without = [row for row in done if row not in with_bn]
    if without:
        parts.append("## Nets without BatchNormalization")
        cells = []
        for row in without:
            norms = ", ".join(f"{count} {kind}" for kind, count in sorted(row["norms"].items())) or "none"
            cells.append([row["net"], norms, others(row), f"{row['exactness_f64']:.1e}"])
        parts.append(table(["net", "normalization that depends on the input", "affines", "exactness"], cells))
    left = []
    for row in done:
        groups = Counter((kind, outcome, code) for _, kind, outcome, code, _ in row["left"])
        for group, count in groups.items():
            layer, *_, reason = next(entry for entry in row["left"] if tuple(entry[1:4]) == group)
            left.append([row["net"], *group, count, layer, reason])
    if left:
        parts.append("## What stayed, and why")
        parts.append(table(["net", "kind", "outcome", "code", "count", "for example", "reason"], left))
    broken = [f"- {row['net']}: {row['error']}" for row in rows if "error" in row]
    if broken:
        parts += ["## Failed", "\n".join(broken)]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=list(NETS), metavar="NET", help="only these; writes no document")
    parser.add_argument("--size", type=int, default=96, help="pixels; raised to what a net needs")
    parser.add_argument("--check", action="store_true", help="exit 1 when a required number is missed")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "coverage.md")
    parser.add_argument("--one", choices=list(NETS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.size)))
        return 0
    rows = []
    for name in options.nets or NETS:
        begin = time.perf_counter()
        rows.append(fresh(name, options.size))
        print(f"{name}: {rows[-1].get('error', 'done')} ({time.perf_counter() - begin:.0f} s)", file=sys.stderr)
    text = document(rows, options.size)
    print(text, end="")
    lost = [] if options.nets else [f"keras.applications.{family} has no row" for family in unlisted()]
    lost += [f"{row['net']}: {row['error']}" for row in rows if "error" in row]
    if options.nets is None:
        from deploykit.files import whole_file

        with whole_file(options.out, force=True) as target:
            target.write_text(text, encoding="utf-8")
    if options.check:
        lost = list(dict.fromkeys([*lost, *(line for row in rows for line in missed(row))]))
        print(f"check: {'missed ' + str(len(lost)) if lost else 'all numbers reached'}", file=sys.stderr)
    print("".join(f"missed: {line}\n" for line in lost), end="", file=sys.stderr)
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
