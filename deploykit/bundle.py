"""The bundle: a folder that carries a model and the proof of it to a machine without TensorFlow.

    model.onnx (+ model.onnx.data)   the model
    test_data_set_0/                 golden data in ONNX's own layout: inputs, and the float64 reference's outputs
    test_data_set_1/                 rounded to the outputs' dtypes; a batch, and one sample alone
    deploykit.json                   the manifest: signature, tolerances, decisions, origin, all hashes; sealed
    verify.py                        repeats hashes, equivalence and latency with numpy and onnxruntime alone
    report.json, report.html         what was measured where the bundle was made
    README.md                        a model card of measured facts

The noise (the original's own error against the rounded reference, per sample) travels in the manifest, so
that the target judges by the same laws. The manifest holds a hash of every other file and is sealed itself:
any changed byte is found.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from deploykit import layout as layouts
from deploykit import verify
from deploykit.check import Reference
from deploykit.compare import Noise, noise_between
from deploykit.files import sha256

Array = npt.NDArray[Any]

GOLDEN_BYTES = 8_000_000  # of inputs in the golden batch; at most 32 samples
GOLDEN_SAMPLES = 32

# Oldest ONNX Runtime that runs an opset (the ONNX Runtime documentation, "Compatibility": ONNX opset support).
OLDEST_RUNTIME = {
    13: "1.6",
    14: "1.8",
    15: "1.9",
    16: "1.11",
    17: "1.12",
    18: "1.14",
}


def _write_tensor(path: Path, name: str, array: npt.NDArray[Any]) -> None:
    tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
    path.write_bytes(tensor.SerializeToString())


def golden_count(reference: Reference) -> int:
    """How many samples the golden batch has: at most 32, and about 8 MB of inputs."""
    one = sum(array.nbytes for array in reference.samples.head(1).arrays.values())
    return max(1, min(GOLDEN_SAMPLES, reference.samples.count, GOLDEN_BYTES // max(1, one)))


@dataclass(frozen=True)
class _Level:
    """The original's usual error, found on all samples that were compared.

    ``l2`` and ``peak``: relative to a sample, the 90th percentile, by which `deploykit.verify` pools the noise of a
    large set. ``channels``: L2 for each index of each axis, of one sample in the mean.
    """

    l2: float
    peak: float
    channels: tuple[tuple[float, ...], ...] | None

    @classmethod
    def of(cls, reference: Array, original: Array) -> _Level:
        noise = noise_between(reference, original)
        rows = np.asarray(reference, np.float64).reshape(len(reference), -1)
        sizes = np.linalg.norm(rows, axis=1), np.abs(rows).max(axis=1, initial=0.0)
        levels = []
        for errors, size in zip((noise.l2, noise.max_abs), sizes, strict=True):
            known = [e / s for e, s in zip(errors, size, strict=True) if e is not None and 0 < s < np.inf]
            levels.append(float(np.quantile(known, 0.9, method="lower")) if known else 0.0)
        share = 1 / np.sqrt(max(1, sum(error is not None for error in noise.l2)))
        channels = noise.channels and tuple(tuple(float(share * own) for own in axis) for axis in noise.channels)
        return cls(levels[0], levels[1], channels)

    def least(self, noise: Noise, reference: Array) -> Noise:
        """Noise of at least this level in every sample, and in every channel.

        A golden set is small, its last one a single sample, and there the original may have been lucky: its
        error far below what another correct evaluation shows (two draws of one size differ by more than 4x in
        one case of six). The yardstick of few samples is therefore the level found on all that were compared.
        """
        if reference.dtype.kind != "f":
            return noise
        rows = np.asarray(reference, np.float64).reshape(len(reference), -1)
        sizes = np.linalg.norm(rows, axis=1), np.abs(rows).max(axis=1, initial=0.0)

        def raised(errors: tuple[float | None, ...], size: Array, share: float) -> tuple[float | None, ...]:
            floors = np.where(np.isfinite(size), share * size, 0.0)
            return tuple(e if e is None else max(e, float(floor)) for e, floor in zip(errors, floors, strict=True))

        channels = noise.channels
        if channels is not None and self.channels is not None:
            more = float(np.sqrt(sum(error is not None for error in noise.l2)))
            channels = tuple(
                tuple(max(own, more * usual) for own, usual in zip(axis, level, strict=True))
                for axis, level in zip(channels, self.channels, strict=True)
            )
        return replace(
            noise,
            l2=raised(noise.l2, sizes[0], self.l2),
            max_abs=raised(noise.max_abs, sizes[1], self.peak),
            channels=channels,
        )


def write_golden(folder: Path, reference: Reference, layout: str = layouts.NHWC) -> list[dict[str, Any]]:
    """Write the golden data sets in the file's own layout; returns their manifest entries.

    The noise is that of the trained model's layout: `verify.Bundle.judged` compares images with their channels last.
    """

    def write(path: Path, name: str, array: Array) -> None:
        turned = layouts.transposed({name: array}, layouts.TO_NCHW) if layout == layouts.NCHW else {name: array}
        _write_tensor(path, name, turned[name])

    count = golden_count(reference)
    fixed = reference.signature.inputs[0].shape[0]
    counts = [count, 1] if fixed is None and count > 1 else [fixed or count]
    entries = []
    usual = {key: _Level.of(array, reference.original[key]) for key, array in reference.outputs.items()}
    for index, number in enumerate(counts):
        name = f"test_data_set_{index}"
        (folder / name).mkdir()
        record: dict[str, Any] = {"folder": name, "reference": reference.precision, "inputs": [], "outputs": []}
        for place, (key, array) in enumerate(reference.samples.head(number).arrays.items()):
            record["inputs"].append(f"input_{place}.pb")
            write(folder / name / f"input_{place}.pb", key, array[:number])
        noise = {}
        for place, (key, array) in enumerate(reference.outputs.items()):
            original = reference.original[key][:number]
            rounded = array[:number].astype(original.dtype)
            record["outputs"].append(f"output_{place}.pb")
            write(folder / name / f"output_{place}.pb", key, rounded)
            noise[key] = usual[key].least(noise_between(rounded, original), rounded).to_json()
        record["noise"] = noise
        entries.append(record)
    return entries


def seal(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Copy verify.py in, hash every file and write the sealed manifest. Nothing may be written afterwards."""
    shutil.copyfile(verify.__file__, folder / "verify.py")
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / verify.MANIFEST).write_bytes(verify.seal({**manifest, "files": files}))
