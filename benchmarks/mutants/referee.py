"""An ONNX graph in float64: onnx's ReferenceEvaluator on a copy whose float32 became float64.

What deploykit's runtime of that name corrects is corrected here, and convolution and pooling are replaced, because its
loops over pixels take minutes. `mutation_score.py` fails where the referee does not agree with the Keras float64
reference on the unmutated graph of a subject.

Limits: operators that subjects use; no ceil_mode, no dilated pooling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from deploykit.runtimes.onnx_reference import CORRECTED
from mutants import StillbornError

Array = NDArray[Any]
FLOAT, DOUBLE = TensorProto.FLOAT, TensorProto.DOUBLE


def _pads(size: Sequence[int], kernel: Sequence[int], strides: Sequence[int], auto_pad: Any, pads: Any) -> list[Any]:
    if auto_pad in (None, "", "NOTSET"):
        given = list(pads or [0] * (2 * len(size)))
        return list(zip(given[: len(size)], given[len(size) :], strict=True))
    if auto_pad == "VALID":
        return [(0, 0)] * len(size)
    totals = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(size, kernel, strides, strict=True)]
    return [(t // 2, t - t // 2) if auto_pad == "SAME_UPPER" else (t - t // 2, t // 2) for t in totals]


def _windows(
    x: Array, kernel: Sequence[int], strides: Any, dilations: Any, auto_pad: Any, pads: Any, fill: float
) -> Array:
    """[N, C, *places, *kernel]"""
    rank = len(kernel)
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    edges = _pads(x.shape[2:], reach, strides, auto_pad, pads)
    padded = np.pad(x, [(0, 0), (0, 0), *edges], constant_values=fill)
    found = sliding_window_view(padded, reach, axis=tuple(range(2, 2 + rank)))
    return found[(..., *(slice(None, None, s) for s in strides), *(slice(None, None, d) for d in dilations))]


class Conv(OpRun):
    def _run(self, x, w, b=None, auto_pad=None, dilations=None, group=None, kernel_shape=None, pads=None, strides=None):
        seen = _windows(x, w.shape[2:], strides, dilations, auto_pad, pads, 0.0)
        rank = w.ndim - 2
        batch, places = len(x), seen.shape[2 : 2 + rank]
        groups = group or 1
        rows = np.moveaxis(seen, 1, 1 + rank).reshape(batch * math.prod(places), groups, -1)
        kernels = w.reshape(groups, len(w) // groups, -1)
        y = np.concatenate([rows[:, g] @ kernels[g].T for g in range(groups)], axis=1)
        y = np.moveaxis(y.reshape(batch, *places, len(w)), -1, 1)
        return (y if b is None else y + b.reshape(-1, *[1] * rank),)


class MaxPool(OpRun):
    def _run(self, x, kernel_shape=None, strides=None, auto_pad=None, pads=None, **_):
        seen = _windows(x, kernel_shape, strides, None, auto_pad, pads, -np.inf)
        return (seen.max(axis=tuple(range(-len(kernel_shape), 0))),)


class AveragePool(OpRun):
    def _run(self, x, kernel_shape=None, strides=None, auto_pad=None, pads=None, count_include_pad=None, **_):
        axes = tuple(range(-len(kernel_shape), 0))
        sums = _windows(x, kernel_shape, strides, None, auto_pad, pads, 0.0).sum(axis=axes)
        if count_include_pad:
            return (sums / math.prod(kernel_shape),)
        return (sums / _windows(np.ones_like(x), kernel_shape, strides, None, auto_pad, pads, 0.0).sum(axis=axes),)


_OPERATORS = [Conv, MaxPool, AveragePool, *CORRECTED]


def _widened(tensor: Any) -> None:
    if tensor.data_type == FLOAT:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


def _widen(graph: Any) -> None:
    for tensor in graph.initializer:
        _widened(tensor)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == FLOAT:
            value.type.tensor_type.elem_type = DOUBLE
    graph.ClearField("value_info")
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == FLOAT:
                attribute.i = DOUBLE
            if attribute.type == onnx.AttributeProto.TENSOR:
                _widened(attribute.t)
            if attribute.type == onnx.AttributeProto.GRAPH:
                _widen(attribute.g)


def doubled(proto: Any) -> Any:
    """A float64 copy of a float32 graph."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    _widen(copy.graph)
    return copy


def evaluate(proto: Any, arrays: Mapping[str, Array], batch: int = 64) -> dict[str, Array]:
    """Outputs by name; floats are given as the graph's inputs want them."""
    wanted = {
        value.name: onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        for value in proto.graph.input
    }
    names = [value.name for value in proto.graph.output]
    pieces = []
    with np.errstate(all="ignore"):
        try:
            session = ReferenceEvaluator(proto, new_ops=_OPERATORS)
            for start in range(0, len(next(iter(arrays.values()))), batch):
                rows = {name: arrays[name][start : start + batch].astype(dtype) for name, dtype in wanted.items()}
                pieces.append(session.run(names, rows))
        except Exception as error:  # whatever an operator of the evaluator raises
            raise StillbornError(f"does not run in float64: {error}") from error
    return {name: np.concatenate([piece[i] for piece in pieces]) for i, name in enumerate(names)}
