"""onnx's own reference evaluator: numpy, operator by operator, as the specification says.

An independent referee: it shares no code with ONNX Runtime, OpenVINO or TensorFlow, and where two of those differ
it says which one computes what the file means. It is slow, its pooling above all, which goes through the pixels in
Python: about 1 us per element that a node produces, per sample. Hence the limit: graphs whose nodes produce more than
`LIMIT` elements for one sample are refused.

Two of its operators do not do what the specification says and are replaced (`CORRECTED`): Erf rounds float64 to
float32, and what a Loop collects is joined along its first axis instead of stacked along a new one.

Limits: sizes that are free in the file count as 1. numpy's threads belong to the process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_loop import Loop as ReferenceLoop

from deploykit.errors import InputError, UnsupportedModelError
from deploykit.runtimes import Array
from deploykit.runtimes.files import FileSession, file_of, onnx_signature, read_onnx, unreadable

NAME = "onnx-reference"
LIMIT = 500_000


_erf = np.vectorize(math.erf, otypes=[np.float64])


class Erf(OpRun):  # type: ignore[misc]  # onnx has no types
    """In float64, rounded once."""

    def _run(self, x: Array) -> tuple[Array]:
        return (_erf(x).astype(x.dtype),)


class Loop(ReferenceLoop):  # type: ignore[misc]
    """Scan outputs are stacked along a new first axis."""

    def _run(
        self, times: Any, go: Any, *states: Any, context: Any = None, body: Any = None, attributes: Any = None, **_: Any
    ) -> tuple[Any, ...]:
        names, count = self.body.input_names, 0
        scans: list[list[Array]] = [[] for _ in range(self.K)]
        while go and (times is None or count < times):
            values = {**(context or {}), names[0]: np.array(count, np.int64), names[1]: np.array(go)}
            go, *rest = self._run_body({**values, **dict(zip(names[2:], states, strict=True))}, attributes=attributes)
            states, count = tuple(rest[: self.N]), count + 1
            for found, value in zip(scans, rest[self.N :], strict=True):
                found.append(value)
        return (*states, *map(np.stack, scans))


CORRECTED = [Erf, Loop]


def produced(proto: Any) -> int:
    """How many elements the nodes of a graph produce for one sample; free sizes count as 1."""
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    shapes = {
        value.name: [size.dim_value if size.HasField("dim_value") else 1 for size in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.output)
    }
    return sum(math.prod(shapes.get(name, [])) for node in inferred.node for name in node.output)


def session(model: str | os.PathLike[str], *, threads: int | None = None) -> FileSession:
    """Load a small ONNX file; external data is found beside it."""
    path = file_of(NAME, model)
    if threads is not None:
        raise InputError(f"runtime {NAME} computes with numpy, whose threads belong to the process; leave threads out")
    proto = read_onnx(NAME, path, weights=True)
    try:
        onnx.checker.check_model(proto)
        elements = produced(proto)
    except Exception as error:  # onnx's own, and protobuf's above 2 GB
        raise unreadable(NAME, path, error) from error
    if elements > LIMIT:
        raise UnsupportedModelError(
            f"{path} produces {elements:,} elements per sample, and runtime {NAME}, which is slow, takes at most"
            f" {LIMIT:,}; use onnxruntime-cpu"
        )
    try:
        signature, evaluator = onnx_signature(proto.graph), ReferenceEvaluator(proto, new_ops=CORRECTED)
    except Exception as error:  # an operator that it does not implement, for one
        raise unreadable(NAME, path, error) from error
    names = [spec.name for spec in signature.outputs]

    def compute(arrays: dict[str, Array]) -> Sequence[Array]:
        with np.errstate(all="ignore"):  # infinities and NaN are answers like others, and are compared
            outputs: Sequence[Array] = evaluator.run(names, arrays)
        return outputs

    return FileSession(NAME, path, signature, compute, evaluator)
