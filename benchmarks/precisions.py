"""What lower precision makes of right models: the evidence for the policies float16, bfloat16 and int8 of `check`.

    python benchmarks/precisions.py [--count 20] [--start 0] [--data PATH] [MODEL ...]

Each MODEL, and random nets of `tests/random_nets.py` by seed, run as a whole in float16 and in bfloat16 (weights,
activations and sums, as TensorFlow's CPU kernels have it) on 64 synthetic inputs with edge cases. int8 is what ONNX
Runtime's own static quantization makes of the exported file of each MODEL: weights per channel, activations by the
largest values that 64 inputs show, on 64 further inputs. These are without edge cases, which lie beyond the range it is
calibrated for, by design; with ``--data`` all inputs are the user's, the first 64 for calibration.

Printed for each output: the SNR against the float64 reference, that of the worst sample, the share of samples whose
largest class stays. Below: quantiles, and how many pass the policies.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # whose random_nets is meant

import numpy as np
from random_nets import drawn

from deploykit import runtimes
from deploykit.check import make_reference
from deploykit.compare import compare_outputs
from deploykit.data import Samples, open_samples, synthesize
from deploykit.export import export
from deploykit.graph import replay, run, trace
from deploykit.load import load
from deploykit.verify import POLICIES

SAMPLES = 64
HALVES = ("float16", "bfloat16")
KINDS = (*HALVES, "int8")


def models(count: int, start: int, paths: list[str]) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """Name, model, precisions."""
    for path in paths:
        yield Path(path).name, load(path, allow_code=True).model, KINDS
    for seed in range(start, start + count):
        yield f"random {seed}", drawn(seed)[1].model, HALVES


class Given:
    """What onnxruntime.quantization calibrates with: one sample after the other."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        count = len(next(iter(arrays.values())))
        self._rows = iter([{name: array[i : i + 1] for name, array in arrays.items()} for i in range(count)])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._rows, None)


def in_int8(model: Any, calibration: dict[str, Any], arrays: dict[str, Any]) -> dict[str, Any]:
    """The answers of the quantized file."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    with tempfile.TemporaryDirectory() as room:
        plain, small = Path(room) / "plain.onnx", Path(room) / "int8.onnx"
        export(model, plain)
        quantize_static(
            plain,
            small,
            Given(calibration),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return runtimes.open("onnxruntime-cpu", small).run(arrays)


def inputs_for(kind: str, signature: Any, data: str | None) -> tuple[Any, Any]:
    """What to calibrate with, and what to judge on."""
    if data is not None:
        arrays = open_samples(data, signature, limit=2 * SAMPLES).head(2 * SAMPLES).arrays
        halves = [
            {name: array[rows] for name, array in arrays.items()} for rows in (slice(SAMPLES), slice(SAMPLES, None))
        ]
        return tuple(Samples(half, data) for half in halves)
    edges = 0 if kind == "int8" else None
    return tuple(synthesize(signature, count=SAMPLES, edges=edges, seed=seed) for seed in (1, 0))


def answers_in(kind: str, model: Any, found: Any, calibration: Any, samples: Any) -> dict[str, Any]:
    if kind == "int8":
        return in_int8(model, calibration.arrays, samples.arrays)
    arrays = run(replay(found, dtype=kind), samples.arrays, batch=16)
    names = (spec.name for spec in found.signature.outputs)
    return dict(zip(names, (np.asarray(array, np.float32) for array in arrays), strict=True))


def measured(model: Any, kinds: tuple[str, ...], data: str | None) -> Iterator[tuple[str, str, Any, float]]:
    """(precision, output, comparison, SNR of the worst sample in dB) of a model."""
    found = trace(model)
    for kind in kinds:
        calibration, samples = inputs_for(kind, found.signature, data)
        reference = make_reference("model", model, samples, sizes=False)
        answers = answers_in(kind, model, found, calibration, samples)
        judged = compare_outputs(reference.outputs, reference.original, answers, POLICIES[kind])
        for comparison in judged:
            right, answer = reference.outputs[comparison.name], answers[comparison.name]
            if right.dtype.kind != "f" or comparison.insensitive or comparison.snr_db is None:
                continue
            rows = [np.asarray(array, float).reshape(len(array), -1) for array in (right, answer)]
            sizes = np.linalg.norm(rows[0], axis=1)
            scale = np.maximum(sizes, np.median(sizes))
            errors = np.linalg.norm(rows[1] - rows[0], axis=1)
            yield kind, comparison.name, comparison, float(-20 * np.log10(np.nanmax(errors / scale)))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=20, help="random nets")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--data", help="as in `deploykit check`; at least 128 samples")
    parser.add_argument("models", nargs="*", help="model files")
    options = parser.parse_args()
    rows: dict[str, list[tuple[float, float, bool]]] = {kind: [] for kind in KINDS}
    print(f"{'model':30} {'output':14} {'precision':9} {'SNR':>6} {'worst':>6} {'top-1':>7}")
    for name, model, kinds in models(options.count, options.start, options.models):
        try:
            found = list(measured(model, kinds, options.data))
        except Exception as error:  # TensorFlow lacks kernels in half precision
            print(f"{name:30} left out: {type(error).__name__}: {str(error).splitlines()[0][:80]}")
            continue
        for kind, output, comparison, worst in found:
            top1 = comparison.top1_agreement
            shown = "" if top1 is None else f"{100 * top1:6.1f} %"
            verdict = "" if comparison.passed else "  not passed"
            print(f"{name:30} {output[:14]:14} {kind:9} {comparison.snr_db:6.1f} {worst:6.1f} {shown:>7}{verdict}")
            rows[kind].append((comparison.snr_db, worst, comparison.passed))
    print("\nquantiles 0, 10, 50, 90, 100 %, in dB")
    for kind, found in rows.items():
        if not found:
            continue
        for place, what in enumerate(("SNR", "worst sample")):
            values = np.quantile([row[place] for row in found], (0, 0.1, 0.5, 0.9, 1))
            print(f"{kind:9} {what:13}" + "".join(f"{value:8.1f}" for value in values))
        print(f"{kind:9} {sum(row[2] for row in found)} of {len(found)} outputs pass")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
