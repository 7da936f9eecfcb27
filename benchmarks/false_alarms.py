"""Right candidates that `deploykit check` must pass: every family of keras.applications and every trained file.

    python benchmarks/false_alarms.py [--size 96] [--only NAME ...] [--store PATH] [--check] [--out PATH]

Each model is deployed in five ways that compute the same function, and each is judged as `deploykit check` judges
without data (synthetic inputs with edge cases, float64 reference, default policy):

    fused           the fused Keras model in memory
    stock           what tf2onnx makes of the original by itself, on ONNX Runtime
    onnx            deploykit's file of the fused model, on ONNX Runtime
    one thread      the same file with one thread
    openvino        the same file on OpenVINO, where it is installed

Nets of keras.applications are those of `coverage.py`, one of each family: random weights, live calibrated statistics.
Those of `HARD` come a second time, with fresh statistics: there a deep net whose activations nothing normalises is
ill-conditioned, or its output hardly varies. Files are those of `models/`, and of a folder that holds what other people
trained, where it stands beside the checkout.

*own* is the original's float32 error (relative L2, the largest over outputs); a cell is the candidate's error in units
of it. Every model runs in a process of its own. Exit code 1 when a candidate fails or a model cannot be judged; a
runtime that cannot run a model (said in the table) is no alarm. ``--store`` keeps every model's row as soon as it is
there, and takes up from those that are; the document is written when all are. With ``--only`` the table is printed and
not written; ``--check`` writes nothing and exits 1 where a model is missing from the document.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from coverage import NETS, build, table  # noqa: E402  # after the path is set

TRAINED = ROOT.parent / "shared" / "models"
FRESH = " (fresh statistics)"
HARD = ("EfficientNetB0", "EfficientNetV2B0", "MobileNetV3Small", "NASNetMobile", "ResNet50")  # ConvNeXt has no BN
PROOF = 4  # samples on which fusing is proven; the check sees all
WAYS = ("fused", "stock", "onnx", "one thread", "openvino")
Row = dict[str, Any]


def files() -> dict[str, Path]:
    """Trained models by name."""
    found = [*(ROOT / "models").glob("*.keras"), *(TRAINED.iterdir() if TRAINED.is_dir() else ())]
    return {path.name: path for path in sorted(found) if path.suffix not in (".md", ".py", ".npz")}


def families() -> list[str]:
    """The first net of each family."""
    first: dict[str, str] = {}
    for name, net in NETS.items():
        first.setdefault(net.family, name)
    return list(first.values())


def names() -> list[str]:
    return [*families(), *(f"{name}{FRESH}" for name in HARD), *files()]


def model_for(name: str, size: int) -> Any:
    import keras

    from deploykit.load import load

    if name in files():
        return load(files()[name], allow_code=True).model
    if name.endswith(FRESH):
        net = name.removesuffix(FRESH)
        keras.utils.set_random_seed(0)
        return getattr(keras.applications, net)(weights=None, input_shape=(max(size, NETS[net].smallest),) * 2 + (3,))
    return build(name, size)


def candidates(model: Any, samples: Any, room: Path) -> Iterator[tuple[str, Any, str | None]]:
    """Way, candidate, or why there is none."""
    from deploykit.check import Candidate
    from deploykit.errors import DeploykitError
    from deploykit.export import export, export_stock
    from deploykit.fuse import fuse

    fused = fuse(model, samples=samples.head(PROOF).arrays)
    yield "fused", Candidate("fused", fused.model, "keras"), None
    try:
        sample = {name: array[:2] for name, array in samples.arrays.items()}
        path = export_stock(model, room / "stock.onnx", sample).path
        yield "stock", Candidate("stock", path, "onnxruntime-cpu"), None
    except DeploykitError as error:
        yield "stock", None, str(error).replace(f"{room}/", "")
    path = export(fused.model, room / "fused.onnx").path
    for way, runtime in (("onnx", "onnxruntime-cpu"), ("openvino", "openvino")):
        yield way, Candidate(way, path, runtime), None


def measure(name: str, size: int) -> Row:
    """Everything about one model, in this process."""
    from deploykit import runtimes
    from deploykit.check import check, make_reference
    from deploykit.compare import all_passed, compare_outputs, policy_from
    from deploykit.deploy import DataOptions, samples_for
    from deploykit.errors import DeploykitError

    begin = time.perf_counter()
    model = model_for(name, size)
    samples = samples_for(model, DataOptions())
    reference = make_reference(name, model, samples)
    row: Row = {"model": name, "samples": samples.count, "ways": {}, "own": 0.0, "spread": []}
    with tempfile.TemporaryDirectory() as folder:
        for way, candidate, absent in candidates(model, samples, Path(folder)):
            if candidate is None:
                row["ways"][way] = {"absent": absent}
                continue
            try:
                (found,) = check(reference, [candidate], policy_from())
                row["ways"][way] = _judged(found.passed, found.reason, found.outputs)
            except DeploykitError as error:
                row["ways"][way] = {"absent": str(error)}
                continue
            row["own"] = max(10 ** (-o.reference_snr_db / 20) for o in found.outputs if o.reference_snr_db is not None)
            row["spread"] = [o.spread for o in found.outputs]
            if way == "onnx":
                session = runtimes.open("onnxruntime-cpu", candidate.model, threads=1)
                answers = session.run(samples.head(reference.kept).arrays)
                outputs = compare_outputs(reference.outputs, reference.original, answers, policy_from())
                row["ways"]["one thread"] = _judged(all_passed(outputs), None, outputs)
    return {**row, "seconds": time.perf_counter() - begin}


def _judged(passed: bool, reason: str | None, outputs: Sequence[Any]) -> Row:
    why = reason or next((f"{o.name}: {o.reason}" for o in outputs if not o.passed), None)
    ratios = [o.noise_ratio for o in outputs if o.noise_ratio is not None]
    return {"passed": passed, "reason": why, "ratio": max(ratios, default=None)}


def fresh(name: str, size: int) -> Row:
    """The same in a process of its own; ``error`` says why there is nothing."""
    command = [sys.executable, __file__, "--one", name, "--size", str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"model": name, "error": said[-1]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def alarms(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if "error" in row:
            yield f"{row['model']}: {row['error']}"
        for way, found in row.get("ways", {}).items():
            if not found.get("passed", True):
                yield f"{row['model']}, {way}: {found['reason']}"


def _cell(row: Row, way: str) -> str:
    found = row["ways"].get(way)
    if found is None or "absent" in found:
        return "does not run" if found else "-"
    ratio = "=" if found["ratio"] is None else f"{found['ratio']:.2f}"
    return ratio if found["passed"] else f"**{ratio}: {found['reason']}**"


def document(rows: Sequence[Row], size: int) -> str:
    judged = sum("passed" in found for row in rows for found in row.get("ways", {}).values())
    done = [row for row in rows if "error" not in row]
    cells = [
        [
            row["model"],
            row["samples"],
            f"{row['own']:.1e}",
            *(_cell(row, way) for way in WAYS),
            f"{min((s for s in row['spread'] if s is not None), default=0):.1e}",
        ]
        for row in done
    ]
    absent = [f"- {r['model']}, {way}: {w['absent']}" for r in done for way, w in r["ways"].items() if "absent" in w]
    parts = [
        f"<!-- made by: python benchmarks/false_alarms.py --size {size} (run it again, do not edit this file) -->",
        "# False alarms of `deploykit check`",
        "Right candidates, judged as `deploykit check` judges without data; `benchmarks/false_alarms.py` says how\n"
        "they are made. *own*: the original's float32 error, relative L2. A candidate's cell is its error over the\n"
        "original's own; *spread* is how far the output varies between samples, relative to its size.",
        f"**{len(list(alarms(rows)))} false alarms** among {judged} right candidates of {len(rows)} models.",
        table(["model", "samples", "own", *WAYS, "spread"], cells),
        *(["## Did not run", "\n".join(absent)] if absent else []),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=names(), metavar="NAME", help="these models; writes no document")
    parser.add_argument("--size", type=int, default=96, help="pixels of the nets; raised to what a net needs")
    parser.add_argument("--store", type=Path, help="a JSON file to keep rows in, and to take up from")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the document lacks a model")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "false_alarms.md")
    parser.add_argument("--one", choices=names(), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.size), allow_nan=False))
        return 0
    kept = json.loads(options.store.read_text()) if options.store and options.store.exists() else {}
    rows = []
    for name in options.only or names():
        rows.append(kept.get(name) or fresh(name, options.size))
        if options.store and "error" not in rows[-1]:
            kept[name] = rows[-1]
            options.store.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        print(f"{name}: {rows[-1].get('error') or '{:.0f} s'.format(rows[-1]['seconds'])}", file=sys.stderr, flush=True)
    text = document(rows, options.size)
    print(text, end="")
    wrong = list(alarms(rows))
    if options.check:
        written = options.out.read_text(encoding="utf-8") if options.out.exists() else ""
        wrong += [f"{row['model']} is not in {options.out.name}" for row in rows if row["model"] not in written]
    elif not options.only:
        from deploykit.files import whole_file

        with whole_file(options.out, force=True) as target:
            target.write_text(text, encoding="utf-8")
    print("".join(f"{line}\n" for line in wrong), end="", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
