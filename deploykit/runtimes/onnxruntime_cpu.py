"""ONNX Runtime on the CPU: its own defaults, one provider, quiet.

Graph optimisation stays at ONNX Runtime's default (all), because that is what people deploy. The
provider is named explicitly and checked after loading; its messages are not printed (errors are raised).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import DataError, InputError, LoadError
from deploykit.runtimes import Array, fitted
from deploykit.signature import Signature, TensorSpec
from deploykit.verify import import_onnxruntime

ort = import_onnxruntime()

NAME = "onnxruntime-cpu"
PROVIDER = "CPUExecutionProvider"
QUIET = 4  # ONNX Runtime's severity "fatal": errors are raised, and need not be printed as well

# ONNX Runtime's element types -> numpy's names; bfloat16 and float8 have no numpy array of their own
DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
    "tensor(string)": "str",
    **{f"tensor({sign}int{bits})": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


def _spec(node: Any) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else None for size in node.shape)
    return TensorSpec(node.name, shape, DTYPES.get(node.type, node.type))


class OnnxRuntimeSession:
    """A `deploykit.runtimes.Session` over an ``InferenceSession``."""

    runtime = NAME

    def __init__(self, session: Any, path: Path) -> None:
        self._session: Any = session
        self._path = path
        self.signature = Signature(
            tuple(_spec(node) for node in session.get_inputs()), tuple(_spec(node) for node in session.get_outputs())
        )

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self._session is None:
            raise InputError(f"the session of {self._path} is closed; open it again")
        arrays = fitted(inputs, self.signature.inputs)
        feed = {spec.name: array for spec, array in zip(self.signature.inputs, arrays, strict=True)}
        names = [spec.name for spec in self.signature.outputs]
        try:
            outputs = self._session.run(names, feed)
        except Exception as error:  # ONNX Runtime's exception classes are not public
            raise DataError(f"ONNX Runtime cannot run {self._path} on this data: {error}") from error
        return {name: np.asarray(output) for name, output in zip(names, outputs, strict=True)}

    def close(self) -> None:
        self._session = None


def session(model: str | os.PathLike[str], *, threads: int | None = None) -> OnnxRuntimeSession:
    """Load an ONNX file; external data is found beside it."""
    if not isinstance(model, str | os.PathLike):
        raise InputError(f"runtime {NAME} runs .onnx files, not {type(model).__name__} objects; give a path")
    path = Path(model)
    if not path.is_file():
        raise LoadError(f"{path} does not exist or is no file; give the path of an .onnx file")
    options = ort.SessionOptions()
    options.log_severity_level = QUIET
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        loaded = ort.InferenceSession(os.fspath(path), options, providers=[PROVIDER])
    except Exception as error:  # ONNX Runtime's exception classes are not public
        raise LoadError(f"ONNX Runtime cannot load {path}: {error}; check that it is a complete .onnx file") from error
    if loaded.get_providers() != [PROVIDER]:
        raise InputError(f"ONNX Runtime opened {path} on {loaded.get_providers()} instead of {PROVIDER}")
    return OnnxRuntimeSession(loaded, path)
