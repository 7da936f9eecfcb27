"""Keras on TensorFlow: the model as a `tf.function`, traced once for any batch size.

What is timed and compared is the compiled graph that serving would run, with ``training=False``, not
`predict`'s Python loop. Inputs and outputs go by the names of `keras_signature`.

Names. An input is called as its InputLayer, or as its key where the model takes a dict. An output is
called as in ``model.output_names``, or as its key where the model returns a dict. Where names repeat
(an LSTM that also returns its states has three outputs of one name; an input may itself be an output)
the later ones become ``lstm_1``, ``lstm_2``, because ONNX and every data file need distinct names.

Limits: TensorFlow's thread pools belong to the process, so ``threads`` cannot be set per session and
is refused when it differs from what the process uses.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from deploykit.errors import DataError, InputError, LoadError, UnsupportedModelError
from deploykit.runtimes import Array, fitted
from deploykit.signature import Signature, TensorSpec

NAME = "keras"


def _distinct(wanted: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """Names in order; one that repeats, or is taken, gets the first free ``_1``, ``_2``, ... behind it."""
    given: list[str] = []
    for name in wanted:
        free, count = name, 0
        while free in given or free in taken or (count and free in wanted):
            count += 1
            free = f"{name}_{count}"
        given.append(free)
    return given


def _keys(structure: Any) -> list[str] | None:
    """The keys of a flat dict in the order in which Keras flattens it; None for any other structure."""
    if not isinstance(structure, dict) or any(keras.tree.is_nested(leaf) for leaf in structure.values()):
        return None
    order = keras.tree.flatten({key: position for position, key in enumerate(structure)})
    keys = list(structure)
    return [str(keys[position]) for position in order]


def keras_signature(model: Any) -> Signature:
    """The signature of a model whose graph Keras knows (functional, or a built Sequential)."""
    try:
        inputs, outputs = list(model.inputs or []), list(model.outputs or [])
    except (AttributeError, ValueError):
        inputs = outputs = []
    if not inputs or not outputs:
        raise UnsupportedModelError(
            f"model {model.name} has no known inputs and outputs; build it, or give it as a functional model"
        )
    functional = getattr(model, "_functional", None) or model
    input_names = _keys(getattr(functional, "_inputs_struct", None)) or [
        tensor._keras_history.operation.name for tensor in inputs
    ]
    output_names = _keys(getattr(functional, "_outputs_struct", None)) or list(functional.output_names)

    input_names = _distinct(input_names)
    output_names = _distinct(output_names, input_names)

    def specs(names: Sequence[str], tensors: list[Any]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name, tuple(tensor.shape), keras.backend.standardize_dtype(tensor.dtype))
            for name, tensor in zip(names, tensors, strict=True)
        )

    return Signature(specs(input_names, inputs), specs(output_names, outputs))


_NOISE = ("Graph execution error", "Detected at node", "File ", "[[", "Exception encountered", "Arguments received")


def _cause(error: Exception) -> str:
    """The line of a TensorFlow or Keras message that says what is wrong; the others say where."""
    lines = [line.strip() for line in str(getattr(error, "message", error)).splitlines()]
    return next((line for line in lines if line and not line.startswith(_NOISE)), type(error).__name__)


class KerasSession:
    """A `deploykit.runtimes.Session` over a traced keras.Model. The model is shared, not copied."""

    runtime = NAME

    def __init__(self, model: Any) -> None:
        self._model: Any = model
        self.signature = keras_signature(model)
        structure = getattr(getattr(model, "_functional", None) or model, "_inputs_struct", None)
        structure = model.inputs[0] if structure is None else structure

        def call(*tensors: Any) -> list[Any]:
            packed = keras.tree.pack_sequence_as(structure, list(tensors))
            return list(keras.tree.flatten(self._model(packed, training=False)))

        specs = [tf.TensorSpec(spec.shape, spec.dtype) for spec in self.signature.inputs]
        try:
            self._call: Any = tf.function(call, autograph=False).get_concrete_function(*specs)
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
    """Trace a keras.Model, or load one from a .keras file (safe mode on)."""
    if threads is not None and threads != _process_threads():
        raise InputError(
            f"TensorFlow runs with {_process_threads()} threads in this process, not {threads};"
            " start a process with tf.config.threading set, before TensorFlow runs anything"
        )
    if isinstance(model, str | os.PathLike):
        path = Path(model)
        if not path.is_file():
            raise LoadError(f"{path} does not exist or is no file; give the path of a .keras file")
        try:
            model = keras.models.load_model(path, compile=False, safe_mode=True)
        except Exception as error:  # Keras raises whatever its layers raise
            raise LoadError(f"Keras cannot load {path}: {error}") from error
    if not isinstance(model, keras.Model):
        raise InputError(f"runtime {NAME} runs keras.Model objects and .keras files, not {type(model).__name__}")
    return KerasSession(model)
