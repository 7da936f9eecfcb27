"""One small file per runtime behind one Protocol; nothing heavy is imported before a session is opened.

A runtime executes a model on a device. `open` gives a `Session`, whatever the runtime:

    with contextlib.closing(open("onnxruntime-cpu", "model.onnx", threads=2)) as session:
        outputs = session.run({"image": x})     # a dict in the order of session.signature.outputs

`RUNTIMES` is the table: the name people type, how the runtime is called, the module that implements it,
the file kinds it reads and the extra that installs it. A runtime module has one function,
``session(model, *, threads)``. A new runtime is one row here and one file beside this one; `FileSession`
in `deploykit.runtimes.files` is what those that read a file share.

Sessions never run on another device than the one they were opened for: a provider that would fall
back to the CPU in silence is an error. They compute in the file's own precision: where a runtime would
round to less by default (TF32 on a GPU, bfloat16 on a CPU that has it) that is switched off, and ``notes``
say so. They print nothing and report to nobody.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from deploykit.errors import DataError, InputError, MissingComponentError
from deploykit.signature import Signature, TensorSpec

Array = npt.NDArray[Any]


class Session(Protocol):
    """A model that is loaded and ready to run."""

    @property
    def runtime(self) -> str:
        """The name in `RUNTIMES`."""

    @property
    def signature(self) -> Signature:
        """Names, shapes and dtypes, in the model's own order."""

    @property
    def notes(self) -> tuple[str, ...]:
        """How it computes where that is not the runtime's default, and where; a report prints them."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, in the order of the signature. Raises DataError for inputs that do not fit."""

    def close(self) -> None:
        """Let go of the model; a closed session cannot run."""


@dataclass(frozen=True)
class Runtime:
    """A row of `RUNTIMES`. ``packages`` are the modules whose absence means that ``extra`` is missing."""

    name: str
    module: str
    suffixes: tuple[str, ...]
    packages: tuple[str, ...]
    extra: str | None = None  # None: comes with deploykit itself
    title: str = ""  # as its makers call it, for messages; the name where it is empty
    ordered: bool = True  # False: its files address tensors by name only, and their order means nothing
    gpu: bool = False  # its module has `required`, its sessions have `bound`: see `onnxruntime_gpu`


RUNTIMES: dict[str, Runtime] = {
    row.name: row
    for row in (
        Runtime("keras", f"{__name__}.keras_tf", (".keras",), ("keras", "tensorflow")),
        # of the runtimes that read a kind of file the first is taken where none is named
        Runtime("onnxruntime-cpu", f"{__name__}.onnxruntime_cpu", (".onnx",), ("onnxruntime",), title="ONNX Runtime"),
        *(
            Runtime(
                f"onnxruntime-{name}",
                f"{__name__}.onnxruntime_{name.replace('-', '_')}",
                (".onnx",),
                ("onnxruntime",),
                "gpu",
                "ONNX Runtime",
                gpu=True,
            )
            for name in ("cuda", "cuda-graph", "tensorrt", "tensorrt-graph")
        ),
        Runtime("openvino", f"{__name__}.openvino_cpu", (".onnx",), ("openvino",), "openvino", "OpenVINO"),
        Runtime("onnx-reference", f"{__name__}.onnx_reference", (".onnx",), ("onnx",), title="onnx's evaluator"),
        Runtime("litert", f"{__name__}.litert", (".tflite",), ("ai_edge_litert",), "litert", "LiteRT", ordered=False),
    )
}


def missing(name: str, component: str) -> MissingComponentError:
    """The error that says which extra brings what a runtime needs."""
    extra = RUNTIMES[name].extra
    install = "deploykit" if extra is None else f"deploykit[{extra}]"
    return MissingComponentError(f"runtime {name} needs {component}; install it with: pip install '{install}'")


def known(name: str) -> Runtime:
    """The row of the runtime called ``name``. Raises InputError where there is none."""
    row = RUNTIMES.get(name)
    if row is None:
        raise InputError(f"unknown runtime {name!r}; known are {', '.join(RUNTIMES)}")
    return row


def open(name: str, model: Any, *, threads: int | None = None) -> Session:
    """Load ``model`` (a path; for "keras" also a keras.Model) into the runtime called ``name``.

    ``threads`` bounds the threads of one operation where the runtime can bound them per session.
    Raises InputError for an unknown runtime, MissingComponentError where its package is not
    installed, LoadError for a file that it cannot read.
    """
    row = known(name)
    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1, not {threads}")
    try:
        module = importlib.import_module(row.module)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in row.packages:
            raise
        raise missing(name, package) from error
    session: Session = module.session(model, threads=threads)
    return session


def runtime_for(path: str | os.PathLike[str]) -> str:
    """The name of the first runtime in the table that reads files of this kind, or else of Keras.

    Keras models have any name (HDF5 without an extension, folders), and are known by their content.
    """
    suffix = Path(path).suffix.lower()
    return next((row.name for row in RUNTIMES.values() if suffix in row.suffixes), "keras")


def signature_like(session: Session, reference: Signature) -> Signature:
    """The session's signature, in the order of ``reference`` where its files have no order of their own.

    A .tflite file addresses tensors by name and lists them alphabetically: there another order is no difference,
    other names are.
    """
    found = session.signature
    if RUNTIMES[session.runtime].ordered:
        return found

    def arranged(mine: Sequence[TensorSpec], theirs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        place = {spec.name: index for index, spec in enumerate(theirs)}
        return tuple(sorted(mine, key=lambda spec: place.get(spec.name, len(place))))

    return Signature(arranged(found.inputs, reference.inputs), arranged(found.outputs, reference.outputs))


def fitted(inputs: Mapping[str, Array], specs: Sequence[TensorSpec]) -> list[Array]:
    """The arrays in the order of ``specs``, checked against them.

    A dtype is converted only where no value can change (float32 -> float64, int32 -> int64, a Python
    list of small integers), never the other way. Raises DataError that names the input otherwise.
    """
    known = [spec.name for spec in specs]
    if missing := [name for name in known if name not in inputs]:
        raise DataError(f"no data for input {', '.join(missing)}; the model's inputs are {', '.join(known)}")
    if unknown := [name for name in inputs if name not in known]:
        raise DataError(f"the model has no input {', '.join(unknown)}; its inputs are {', '.join(known)}")
    return [_fit(np.asarray(inputs[spec.name]), spec) for spec in specs]


def _fit(array: Array, spec: TensorSpec) -> Array:
    fits = len(array.shape) == len(spec.shape) and all(
        want is None or have == want for have, want in zip(array.shape, spec.shape, strict=True)
    )
    if not fits:
        raise DataError(f"input {spec} was given an array of shape {list(array.shape)}; reshape the data to fit")
    if array.dtype == spec.dtype:
        return array
    if _holds(spec.dtype, array.dtype):
        return array.astype(spec.dtype)
    raise DataError(f"input {spec} was given {array.dtype} data; convert it to {spec.dtype} first")


def _holds(wide: str, narrow: np.dtype[Any]) -> bool:
    """Whether ``wide`` can hold every number of ``narrow``."""
    try:
        return narrow.kind not in "OSU" and np.can_cast(narrow, wide, "safe")
    except TypeError:  # a dtype that numpy does not have, such as bfloat16
        return False
