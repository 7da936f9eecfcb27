"""What each lowering does to well-known nets: where it applies, whether the file is still right, and how much faster.

    python benchmarks/lowering.py [--nets NAME ...] [--only LOWERING ...] [--size 224] [--seconds 4]
        [--store build/lowering.json]

The nets are those of `benchmarks/applications.py`: keras.applications with random, calibrated weights, no download.
Each is fused, then exported with every lowering, with none, and with each one left out that rewrote something. Every
file is checked against the float64 reference of the original model, as `deploykit check` does it. The ratio of a
lowering is the latency of the file without it over that of the file with all, interleaved and in processes of their own
(`deploykit bench`), with its 95 % interval: above 1, the lowering helps. What rewrites nothing is not measured.

Finished cells are kept in ``--store``, by net, lowering and settings, and not measured again; delete the file to start
afresh. The nets end before their softmax, which would hide errors. Prints the tables of docs/lowering.md as Markdown;
exit code 1 where a lowered file fails the check.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from applications import make  # noqa: E402  # beside this file

NETS = (
    "MobileNetV2",
    "MobileNetV3Small",
    "ResNet50",
    "ResNet50V2",
    "DenseNet121",
    "EfficientNetB0",
    "EfficientNetV2B0",
    "Xception",
    "InceptionV3",
    "NASNetMobile",
)
NONE, ALL = "none", "all"
SAMPLES = 8  # that the files are checked on


class Store:
    """Finished cells, in a JSON file that is replaced after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, key: str, cell: Any) -> None:
        self.cells[key] = cell
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.cells, indent=1, sort_keys=True))
        part.replace(self.path)


def exported(model: Any, path: Path, without: Sequence[str]) -> dict[str, int]:
    """Write a file; how many places each lowering rewrote."""
    from deploykit.export import export

    return dict(export(model, path, without=without, force=True).lowered)


def checked(model: Any, data: Path, files: Sequence[Path]) -> list[dict[str, Any]]:
    """For each file: whether it passed, its SNR and that of the original in float32."""
    from deploykit.check import Candidate, check, make_reference
    from deploykit.data import open_samples
    from deploykit.graph import signature
    from deploykit.verify import POLICIES

    reference = make_reference(data.stem, model, open_samples(str(data), signature(model), limit=SAMPLES))
    found = check(reference, [Candidate(file.name, file, "onnxruntime-cpu") for file in files], POLICIES["float32"])
    rows = [comparison.to_json() for comparison in found]
    return [
        {
            "passed": row["passed"],
            "snr_db": min(output["snr_db"] for output in row["outputs"]),
            "own_db": min(output["reference_snr_db"] for output in row["outputs"]),
        }
        for row in rows
    ]


def timed(with_all: Path, without: Path, data: Path, seconds: float) -> dict[str, Any]:
    """The ratio of a file without a lowering to the one with all, and its interval."""
    import numpy as np
    import onnx

    from deploykit.bench import Candidate, bench

    name = onnx.load(with_all, load_external_data=False).graph.input[0].name
    candidates = [Candidate.of(file) for file in (without, with_all)]
    with np.load(data) as arrays:
        report = bench(candidates, {name: arrays["x"][:1]}, seconds=seconds)
    found = report.comparison(candidates[0].name, candidates[1].name)
    return found.to_json()


def measure(net: str, options: argparse.Namespace, store: Store, room: Path) -> None:
    """Fill the cells of one net that are missing."""
    key = f"{net} {options.size}"
    cells = store.cells
    wanted = options.only
    if key in cells and all(f"{key} {name} {options.seconds:g}" in cells for name in due(cells[key], wanted)):
        return
    import keras

    from deploykit import fuse
    from deploykit.export.lowering import LOWERINGS

    path, data = room / f"{net}.keras", room / f"{net}.npz"
    make(net, options.size, path, data)
    original = keras.models.load_model(path, compile=False)
    original.layers[-1].activation = keras.activations.linear  # a softmax of 1,000 random classes hides every error
    model = fuse(original).model
    names = [row.name for row in LOWERINGS]
    files = {ALL: room / f"{net}.all.onnx", NONE: room / f"{net}.none.onnx"}
    places = exported(model, files[ALL], ())
    exported(model, files[NONE], names)
    for name in due({"places": places}, wanted):
        if name not in files:
            files[name] = room / f"{net}.no-{name}.onnx"
            exported(model, files[name], [name])
    if key not in cells:
        verdicts = dict(zip(files, checked(original, data, list(files.values())), strict=True))
        store.add(key, {"places": places, "checks": verdicts})
    for name in due(cells[key], wanted):
        cell = f"{key} {name} {options.seconds:g}"
        same = f"{key} {NONE} {options.seconds:g}"
        if cell not in cells and same in cells and files[name].read_bytes() == files[NONE].read_bytes():
            store.add(cell, cells[same])  # this lowering alone did anything
        if cell not in cells:
            print(f"{net}: timing the file without {name if name != NONE else 'any lowering'}", file=sys.stderr)
            store.add(cell, timed(files[ALL], files[name], data, options.seconds))
    keras.backend.clear_session()


def due(cell: dict[str, Any], wanted: Sequence[str] | None) -> list[str]:
    """What is measured for a net: all lowerings together, and each that does something."""
    names = [name for name, count in cell["places"].items() if count]
    return ([NONE] if names else []) + [name for name in names if wanted is None or name in wanted]


def shown(cell: dict[str, Any] | None) -> str:
    if cell is None or cell.get("ratio") is None:
        return "-"
    low, high = cell["ci95"]
    return f"{cell['ratio']:.2f} [{low:.2f}, {high:.2f}]"


def table(options: argparse.Namespace, store: Store) -> None:
    """Two Markdown tables: what is rewritten and right, and what it gains."""
    nets = {net: store.cells[f"{net} {options.size}"] for net in options.nets if f"{net} {options.size}" in store.cells}
    names = list(dict.fromkeys(name for cell in nets.values() for name in cell["places"]))
    print(f"| net | {' | '.join(names)} | check | SNR lowered / unlowered / Keras float32, dB |")
    print("|---|" + "---:|" * len(names) + "---|---|")
    for net, cell in nets.items():
        checks = cell["checks"]
        snr = f"{checks[ALL]['snr_db']:.1f} / {checks[NONE]['snr_db']:.1f} / {checks[ALL]['own_db']:.1f}"
        verdict = "passed" if checks[ALL]["passed"] else "FAILED"
        verdict += "" if checks[NONE]["passed"] else " (unlowered: failed)"
        places = " | ".join(str(cell["places"].get(name, 0) or "") for name in names)
        print(f"| {net} | {places} | {verdict} | {snr} |")
    print()
    print(f"| net | all together | {' | '.join(f'{name}' for name in names)} |")
    print("|---|" + "---|" * (len(names) + 1))
    for net in nets:
        cells = [store.cells.get(f"{net} {options.size} {name} {options.seconds:g}") for name in (NONE, *names)]
        print(f"| {net} | {' | '.join(map(shown, cells))} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=list(NETS))
    parser.add_argument("--only", nargs="+", help="lowerings to leave out one by one; default: each")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=4.0, help="measuring time per file")
    parser.add_argument("--store", type=Path, default=ROOT / "build" / "lowering.json")
    options = parser.parse_args()
    store = Store(options.store)
    for net in options.nets:
        with tempfile.TemporaryDirectory() as room:
            measure(net, options, store, Path(room))
    table(options, store)
    checks = [store.cells[f"{net} {options.size}"]["checks"][ALL]["passed"] for net in options.nets]
    return int(not all(checks))


if __name__ == "__main__":
    sys.exit(main())
