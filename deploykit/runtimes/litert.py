"""LiteRT (TensorFlow Lite) on the CPU: .tflite files, by the names of their signature.

The tensors of a .tflite file have the converter's names; those of the model stand in a *signature*, which the
converter writes when it is given one: `tf.lite.TFLiteConverter.from_saved_model`, or `from_concrete_functions` of a
function whose arguments and whose dictionary of results have the model's names. `from_keras_model` calls the outputs
output_0, output_1, ... A signature is a map without an order: inputs and outputs are listed alphabetically.

LiteRT's default delegate (XNNPACK) stays, because that is what people deploy; it computes in the file's precision.
A free size is set for each run, by the array that comes.

Limit: operators of TensorFlow that LiteRT does not have (a file converted with SELECT_TF_OPS) are refused by LiteRT.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from deploykit.errors import UnsupportedModelError
from deploykit.runtimes import Array
from deploykit.runtimes.files import FileSession, file_of, silenced, unreadable
from deploykit.signature import Signature, TensorSpec

NAME = "litert"
FREE = -1
TEXT = np.dtype("S").type


def _specs(details: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name,
            tuple(None if size == FREE else int(size) for size in details[name]["shape_signature"]),
            "str" if details[name]["dtype"] is TEXT else np.dtype(details[name]["dtype"]).name,
        )
        for name in sorted(details)
    )


def _prepared(interpreter: Interpreter) -> Exception | None:
    """Create the delegate, which says so on stderr, and look whether the operators can be prepared."""
    with silenced():
        try:
            interpreter.allocate_tensors()
        except Exception as error:  # RuntimeError of the bindings
            return error
    return None


def session(model: str | os.PathLike[str], *, threads: int | None = None) -> FileSession:
    """Load a .tflite file with one signature."""
    path = file_of(NAME, model)
    try:
        interpreter = Interpreter(os.fspath(path), num_threads=threads)
        keys = list(interpreter.get_signature_list())
    except Exception as error:  # ValueError and RuntimeError of the bindings
        raise unreadable(NAME, path, error) from error
    if len(keys) != 1:
        raise UnsupportedModelError(
            f"{path} has {len(keys)} signatures and must have one, which names its inputs and outputs;"
            " convert the model with tf.lite.TFLiteConverter.from_saved_model"
        )
    refused = _prepared(interpreter)
    runner = interpreter.get_signature_runner(keys[0])
    signature = Signature(_specs(runner.get_input_details()), _specs(runner.get_output_details()))
    # a size that is free stands at 1 until a run sets it; a kernel may not take that
    if refused is not None and not any(None in spec.shape[1:] for spec in signature.inputs):
        raise unreadable(NAME, path, refused) from refused

    def compute(arrays: dict[str, Array]) -> Sequence[Array]:
        found = runner(**arrays)
        return [found[spec.name] for spec in signature.outputs]

    return FileSession(NAME, path, signature, compute, interpreter)
