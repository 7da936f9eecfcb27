"""Keras on TensorFlow: the model as a `tf.function`, traced once for any batch size.

What is timed and compared is the compiled graph that serving would run, with ``training=False``, not
`predict`'s Python loop. Inputs and outputs go by the names of `deploykit.graph.signature`.

Limits: TensorFlow's thread pools belong to the process, so ``threads`` cannot be set per session and
is refused when it differs from what the process uses.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from deploykit.errors import DataError, InputError, UnsupportedModelError
from deploykit.graph import flat_call, runnable, signature
from deploykit.load import load
from deploykit.runtimes import Array, fitted

NAME = "keras"


_NOISE = (
    "<stack traces",
    "•",
    "Graph execution error",
    "Detected at node",
    "File ",
    "[[",
    "Exception encountered",
    "Arguments received",
)


def _cause(error: Exception) -> str:
    """The line of a TensorFlow or Keras message that says what is wrong; the others say where."""
    lines = [line.strip() for line in str(getattr(error, "message", error)).splitlines()]
    return next((line for line in lines if line and not line.startswith(_NOISE)), type(error).__name__)


class KerasSession:
    """A `deploykit.runtimes.Session` over a traced keras.Model. The model is shared, not copied."""

    runtime = NAME
    notes: tuple[str, ...] = ()

    def __init__(self, model: Any) -> None:
        self._model: Any = model
        self.signature = signature(model)
        specs = [tf.TensorSpec(spec.shape, spec.dtype) for spec in self.signature.inputs]
        try:
            self._call: Any = tf.function(flat_call(runnable(model)), autograph=False).get_concrete_function(*specs)
        except Exception as error:  # whatever the model's layers raise
            raise UnsupportedModelError(f"model {model.name} cannot be traced: {_cause(error)}") from error

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self._model is None:
            raise InputError("the session is closed; open it again")
        arrays = fitted(inputs, self.signature.inputs)
        try:
            outputs = self._call(*map(tf.constant, arrays))
        except tf.errors.OpError as error:
            raise DataError(f"model {self._model.name} cannot run on this data: {_cause(error)}") from error
        names = (spec.name for spec in self.signature.outputs)
        return {name: np.asarray(output) for name, output in zip(names, outputs, strict=True)}

    def close(self) -> None:
        self._model = self._call = None


def _process_threads() -> int:
    return tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count() or 1


def session(model: Any, *, threads: int | None = None) -> KerasSession:
    """Trace a keras.Model, or load one from a file (safe mode on)."""
    if threads is not None and threads != _process_threads():
        raise InputError(
            f"TensorFlow runs with {_process_threads()} threads in this process, not {threads};"
            " start a process with tf.config.threading set, before TensorFlow runs anything"
        )
    if isinstance(model, str | os.PathLike):
        model = load(model).model
    if not isinstance(model, keras.Model):
        raise InputError(f"runtime {NAME} runs keras.Model objects and their files, not {type(model).__name__}")
    return KerasSession(model)
