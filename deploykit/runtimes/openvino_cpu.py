"""OpenVINO on the CPU, in full float32.

On processors with bfloat16 units OpenVINO rounds float32 models to bfloat16 by default: eight bits, for which no
float32 policy has room. The inference precision is therefore set to float32, and the execution mode to accuracy,
and both are read back after compiling.

Names and their order are those of the ONNX file; OpenVINO's own ports may have several names each.
The file is read by onnx first: of a damaged one OpenVINO tries every format that it knows.

OpenVINO's package reports its import to its maker unless told otherwise in the user's home folder. It does so through
the package ``openvino_telemetry``, and has a stand-in for where that is not installed; that is what it gets here.

Limits: the CPU plugin computes float64 in float32 and int64 in int32. Of an array that does not fit the graph inside
(a free size that a later layer cannot take) it may not complain.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from deploykit.errors import LoadError, UnsupportedModelError
from deploykit.runtimes import Array
from deploykit.runtimes.files import FileSession, file_of, onnx_signature, read_onnx, unreadable
from deploykit.signature import Signature, TensorSpec

NAME = "openvino"
DEVICE = "CPU"
PRECISION, MODE, THREADS = "INFERENCE_PRECISION_HINT", "EXECUTION_MODE_HINT", "INFERENCE_NUM_THREADS"
TELEMETRY = "openvino_telemetry"


def import_openvino() -> Any:
    """openvino, without its telemetry; where it has been imported already it stays as it is."""
    if "openvino" in sys.modules:
        return importlib.import_module("openvino")
    absent: Any = None  # Python's own mark for a module that cannot be imported
    before = {TELEMETRY: sys.modules[TELEMETRY]} if TELEMETRY in sys.modules else {}
    sys.modules[TELEMETRY] = absent
    try:
        return importlib.import_module("openvino")
    finally:
        del sys.modules[TELEMETRY]
        sys.modules.update(before)


ov = import_openvino()


def _spec(name: str, port: Any) -> TensorSpec:
    if name not in port.get_names():
        raise LoadError(f"OpenVINO calls the file's tensor {name} {', '.join(sorted(port.get_names())) or 'nothing'}")
    shape = tuple(size.get_length() if size.is_static else None for size in port.partial_shape)
    return TensorSpec(name, shape, port.element_type.to_dtype().name)


def _signature(compiled: Any, stated: Signature) -> Signature:
    """Sizes and dtypes as OpenVINO has them, names as the file has them."""
    inputs, outputs = (
        tuple(_spec(spec.name, port) for spec, port in zip(specs, ports, strict=True))
        for specs, ports in ((stated.inputs, compiled.inputs), (stated.outputs, compiled.outputs))
    )
    return Signature(inputs, outputs)


def session(model: str | os.PathLike[str], *, threads: int | None = None) -> FileSession:
    """Compile an ONNX file for the CPU; external data is found beside it."""
    path = file_of(NAME, model)
    stated = onnx_signature(read_onnx(NAME, path, weights=False).graph)
    wanted: dict[str, Any] = {PRECISION: ov.Type.f32, MODE: ov.properties.hint.ExecutionMode.ACCURACY}
    if threads is not None:
        wanted[THREADS] = threads
    try:
        compiled = ov.Core().compile_model(os.fspath(path), DEVICE, wanted)
        request = compiled.create_infer_request()
        signature = _signature(compiled, stated)
    except Exception as error:  # RuntimeError of OpenVINO's own, and what its bindings raise
        raise unreadable(NAME, path, error) from error
    kept = {key: compiled.get_property(key) for key in wanted}
    if changed := [key for key in (PRECISION, MODE) if kept[key] != wanted[key]]:
        raise UnsupportedModelError(f"OpenVINO does not keep {', '.join(changed)} as asked for {path}")
    notes = ["inference precision float32"]
    if threads is not None and kept[THREADS] != threads:
        notes.append(f"threads {kept[THREADS]}, as many as it finds processors")

    def compute(arrays: dict[str, Array]) -> Sequence[Array]:
        found = request.infer(dict(enumerate(arrays.values())))
        return [found[index] for index in range(len(signature.outputs))]

    return FileSession(NAME, path, signature, compute, compiled, notes)
