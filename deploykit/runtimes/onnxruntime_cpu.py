"""ONNX Runtime on the CPU: its own defaults unless settings say otherwise, one provider, quiet.

How a session may be set up is `deploykit.verify.SessionSettings`, as in a bundle's manifest. Graph optimisation stays
at ONNX Runtime's default (all), because that is what people deploy. The provider is named explicitly and checked after
loading; its messages are not printed (errors are raised). What the other providers of ONNX Runtime need of this is
`opened` and `over`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploykit.errors import InputError
from deploykit.runtimes import Array
from deploykit.runtimes.files import FileSession, file_of, unreadable
from deploykit.signature import Signature, TensorSpec
from deploykit.verify import SessionSettings, import_onnxruntime

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


def opened(
    model: str | bytes, provider: str, options: Mapping[str, str], settings: SessionSettings, entries: Mapping[str, str]
) -> Any:
    """An ``InferenceSession`` on one provider. ``entries`` are further session configuration entries."""
    told = settings.apply(ort.SessionOptions())
    told.log_severity_level = QUIET
    for key, value in entries.items():
        told.add_session_config_entry(key, value)
    return ort.InferenceSession(model, told, providers=[(provider, dict(options))], enable_fallback=0)


def over(loaded: Any, name: str, path: Path, notes: Sequence[str] = ()) -> FileSession:
    """The session over an ``InferenceSession``."""
    signature = Signature(tuple(map(_spec, loaded.get_inputs())), tuple(map(_spec, loaded.get_outputs())))
    names = [spec.name for spec in signature.outputs]

    def compute(arrays: dict[str, Array]) -> Sequence[Array]:
        outputs: Sequence[Array] = loaded.run(names, arrays)
        return outputs

    return FileSession(name, path, signature, compute, loaded, notes)


def session(
    model: str | os.PathLike[str], *, threads: int | None = None, settings: SessionSettings | None = None
) -> FileSession:
    """Load an ONNX file; external data is found beside it. ``settings`` say all about the session, threads too."""
    path = file_of(NAME, model)
    settings = settings or SessionSettings(threads)
    try:
        loaded = opened(os.fspath(path), PROVIDER, {}, settings, {})
    except Exception as error:  # ONNX Runtime's exception classes are not public
        raise unreadable(NAME, path, error) from error
    if loaded.get_providers() != [PROVIDER]:
        raise InputError(f"ONNX Runtime opened {path} on {loaded.get_providers()} instead of {PROVIDER}")
    return over(loaded, NAME, path)
