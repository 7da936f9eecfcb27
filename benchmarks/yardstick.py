"""The yardstick of opaque models beside the real one: how far nudging a graph tells its float32 error.

    python benchmarks/yardstick.py [--count 60] [--start 0] [MODEL ...]

Each net (of `tests/random_nets.py`, by seed, and each MODEL given) is saved as a SavedModel without Keras layers, read
back, and answers 32 synthetic inputs. Printed for each, as relative L2 over all outputs:

    own         its float32 answer against its float64 reference, which a graph does not have
    nudged      its nudged answer against its answer: the yardstick (`deploykit.opaque`)
    candidate   its ONNX file on ONNX Runtime against its answer: what has to pass
    verdict     of `deploykit.check`, by the nudged yardstick

and below: the quantiles of nudged / own and candidate / nudged. Exit code 1 when a right file does not pass.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np
from random_nets import drawn

from deploykit.check import Candidate, check, make_reference
from deploykit.compare import policy_from
from deploykit.data import synthesize
from deploykit.errors import DeploykitError
from deploykit.export import export
from deploykit.load import load
from deploykit.runtimes import open as open_session

SAMPLES = 32


def nets(count: int, start: int, models: list[str]) -> Iterator[tuple[str, Any]]:
    for path in models:
        yield Path(path).name, load(path).model
    for seed in range(start, start + count):
        yield f"random {seed}", drawn(seed)[1].model


def distance(answers: dict[str, Any], right: dict[str, Any]) -> float:
    floats = [name for name, values in right.items() if values.dtype.kind == "f"]
    off = sum(float(np.sum((answers[name].astype(float) - right[name]) ** 2)) for name in floats)
    size = sum(float(np.sum(right[name].astype(float) ** 2)) for name in floats)
    return math.sqrt(off / size) if size else 0.0


def measured(model: Any, room: Path) -> tuple[float, float, float, bool]:
    model.export(str(room / "saved"), verbose=False)
    opaque = load(room / "saved").model
    samples = synthesize_for(opaque)
    reference = make_reference("graph", opaque, samples)
    named = dict(zip((symbol.name for symbol in model.inputs), samples.arrays.values(), strict=True))
    original = make_reference("keras", model, type(samples)(named, samples.source))
    names = dict(zip(original.outputs, reference.outputs, strict=True))
    own = distance(original.original, original.outputs)
    file = export(opaque, room / "model.onnx").path
    answers = open_session("onnxruntime-cpu", file).run(samples.arrays)
    (found,) = check(reference, [Candidate("onnx", file, "onnxruntime-cpu")], policy_from())
    assert len(names) == len(reference.outputs)
    return own, distance(reference.original, reference.outputs), distance(answers, reference.outputs), found.passed


def synthesize_for(model: Any) -> Any:
    from deploykit.graph import signature

    return synthesize(signature(model), count=SAMPLES, seed=0)


def quantiles(values: list[float]) -> str:
    found = np.quantile(values, (0.0, 0.1, 0.5, 0.9, 1.0))
    return "  ".join(f"{value:8.2f}" for value in found)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=60, help="random nets")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("models", nargs="*", help="model files")
    options = parser.parse_args()
    rows = []
    print(f"{'net':28} {'own':>9} {'nudged':>9} {'candidate':>9}")
    for name, model in nets(options.count, options.start, options.models):
        with tempfile.TemporaryDirectory() as room:
            try:
                row = measured(model, Path(room))
            except DeploykitError as error:
                print(f"{name:28} left out: {error}")
                continue
        rows.append(row)
        print(
            f"{name:28} {row[0]:9.2e} {row[1]:9.2e} {row[2]:9.2e}  {'passed' if row[3] else 'FALSE ALARM'}", flush=True
        )
    real = [row for row in rows if min(row[:3]) > 0]
    print(f"\n{len(rows)} nets, {len(real)} with rounding in all three; quantiles 0, 10, 50, 90, 100 %")
    print(f"nudged / own        {quantiles([row[1] / row[0] for row in real])}")
    print(f"candidate / nudged  {quantiles([row[2] / row[1] for row in real])}")
    return int(not all(row[3] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
