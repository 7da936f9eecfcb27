"""ONNX Runtime on an NVIDIA GPU, compiled by TensorRT, in full float32.

float16 and int8 are off by TensorRT's default. TF32 is on, and ONNX Runtime has no option for it: NVIDIA's libraries
read the environment variable ``NVIDIA_TF32_OVERRIDE`` when they are first used in a process. It is set to 0 here
unless the user has set it; ``notes`` say what holds.

Limit: where the process has used CUDA before (TensorFlow on a GPU, say), the variable comes too late. TF32 then shows
as an error of about 1e-3 and fails the check: set the variable in the shell.
"""

from __future__ import annotations

import os

from deploykit.runtimes.onnxruntime_gpu import DeviceSession, Provider, gpu_session, require

TENSORRT = Provider(
    "onnxruntime-tensorrt",
    "TensorrtExecutionProvider",
    {},
    "an NVIDIA GPU, its driver, CUDA 13, cuDNN 9 (pip install 'deploykit[gpu]' brings these two) and TensorRT 10,"
    " whose libraries the loader must find (LD_LIBRARY_PATH)",
)
TF32 = "NVIDIA_TF32_OVERRIDE"


def tf32_off() -> str:
    """Switch TF32 off unless the user has decided; the note that says what holds."""
    state = os.environ.setdefault(TF32, "0")
    return "TF32 off" if state == "0" else f"TF32 as {TF32}={state} says"


def session(model: str | os.PathLike[str], *, threads: int | None = None) -> DeviceSession:
    """Compile an ONNX file for the GPU, which takes seconds to minutes; ``threads`` bounds the CPU's part."""
    return gpu_session(TENSORRT, model, threads=threads, notes=(tf32_off(),))


def required() -> None:
    """MissingComponentError, with the reason, where this machine cannot run it."""
    require(TENSORRT)
