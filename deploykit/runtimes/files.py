"""What the runtimes that read a file share: the file, the session over it, ONNX graphs as they stand, quiet.

`FileSession` checks what goes in and names what comes out; a runtime module only says how its library loads a file and
computes. `stated` is what an .onnx file says of itself. `silenced` is for native code that prints and cannot be told
not to.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from deploykit.errors import DataError, InputError, LoadError
from deploykit.runtimes import RUNTIMES, Array, fitted
from deploykit.signature import Signature, TensorSpec

Compute = Callable[[dict[str, Array]], Sequence[Array]]


class FileSession:
    """A `deploykit.runtimes.Session` over a file.

    ``compute`` takes the arrays by name and gives the outputs in the order of the signature; whatever it raises
    becomes a DataError. ``native`` is the library's own object, for what only that can tell.
    """

    def __init__(
        self, runtime: str, path: Path, signature: Signature, compute: Compute, native: Any, notes: Sequence[str] = ()
    ) -> None:
        self.runtime = runtime
        self.signature = signature
        self.notes = tuple(notes)
        self.native: Any = native
        self._path = path
        self._compute: Compute | None = compute

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self._compute is None:
            raise InputError(f"the session of {self._path} is closed; open it again")
        specs = self.signature.inputs
        arrays = fitted(inputs, specs)
        try:
            outputs = self._compute({spec.name: array for spec, array in zip(specs, arrays, strict=True)})
        except Exception as error:  # the libraries' exception classes share no base and are mostly not public
            raise DataError(f"{_title(self.runtime)} cannot run {self._path} on this data: {reason(error)}") from error
        names = (spec.name for spec in self.signature.outputs)
        return {name: np.asarray(output) for name, output in zip(names, outputs, strict=True)}

    def close(self) -> None:
        self._compute = self.native = None


def file_of(runtime: str, model: Any) -> Path:
    """The path of a file that is there, or an error that says what the runtime reads."""
    kind = "/".join(RUNTIMES[runtime].suffixes)
    if not isinstance(model, str | os.PathLike):
        raise InputError(f"runtime {runtime} runs {kind} files, not {type(model).__name__} objects; give a path")
    path = Path(model)
    if not path.is_file():
        raise LoadError(f"{path} does not exist or is no file; give the path of a {kind} file")
    return path


def unreadable(runtime: str, path: Path, error: Exception) -> LoadError:
    """The error for a file that the runtime's library refuses."""
    kind = "/".join(RUNTIMES[runtime].suffixes)
    return LoadError(f"{_title(runtime)} cannot load {path}: {reason(error)}; check that it is a complete {kind} file")


def _title(runtime: str) -> str:
    return RUNTIMES[runtime].title or runtime


# Lines of OpenVINO's messages that say where in its source a check stands.
_PLACES = ("Exception from ", "Check '")


def reason(error: Exception) -> str:
    """The lines of a library's message that say what is wrong."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(_PLACES)]
    return " ".join(said or lines).strip() or type(error).__name__


def read_onnx(runtime: str, path: Path, *, weights: bool) -> Any:
    """The ModelProto of an .onnx file; without ``weights`` external data stays where it is."""
    import onnx  # not every runtime needs it

    try:
        proto = onnx.load_model(path, load_external_data=weights)
    except Exception as error:  # protobuf's and onnx's own
        raise unreadable(runtime, path, error) from error
    if not proto.graph.output:
        raise LoadError(f"{path} holds no graph with outputs; check that it is a complete .onnx file")
    return proto


def stated(model: Any) -> dict[str, str]:
    """The metadata_props of an .onnx file; nothing for everything else, and for a file that cannot be read."""
    if not isinstance(model, str | os.PathLike) or Path(model).suffix.lower() != ".onnx":
        return {}
    import onnx  # not every runtime needs it

    try:
        proto = onnx.load_model(model, load_external_data=False)
    except Exception:  # protobuf's and onnx's own; whoever opens the file says what is wrong with it
        return {}
    return {entry.key: entry.value for entry in proto.metadata_props}


def onnx_signature(graph: Any) -> Signature:
    """Inputs that are not initializers, and outputs, as an ONNX graph states them."""
    import onnx

    def spec(value: Any) -> TensorSpec:
        kind = value.type.tensor_type
        shape = tuple(size.dim_value if size.HasField("dim_value") else None for size in kind.shape.dim)
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        return TensorSpec(value.name, shape, "str" if dtype.kind in "OU" else dtype.name)

    stored = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in stored]
    return Signature(tuple(map(spec, inputs)), tuple(map(spec, graph.output)))


@contextlib.contextmanager
def silenced() -> Iterator[TextIO]:
    """Turn the process' stdout and stderr, file descriptors 1 and 2, into a file; yields it for reading.

    Limit: the descriptors belong to the process, and so other threads are silenced as well; hence only around
    the opening of a session.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        saved = os.dup(1), os.dup(2)
        try:
            for descriptor in (1, 2):
                os.dup2(said.fileno(), descriptor)
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                yield said
                said.flush()
        finally:
            for descriptor, before in zip((1, 2), saved, strict=True):
                os.dup2(before, descriptor)
                os.close(before)
