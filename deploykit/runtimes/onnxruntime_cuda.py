"""ONNX Runtime on an NVIDIA GPU, with its CUDA kernels, in full float32.

From the Ampere generation on cuBLAS and cuDNN multiply float32 matrices in TF32, which keeps 10 bits of the 23:
an error of 1e-3 that has nothing to do with the model. ``use_tf32=0`` switches it off, for equivalence as for
timings, so that both speak of the same computation; with TF32 the GPU may be faster than what is reported.
"""

from __future__ import annotations

import os

from deploykit.runtimes.onnxruntime_gpu import DeviceSession, Provider, gpu_session, require

CUDA = Provider(
    "onnxruntime-cuda",
    "CUDAExecutionProvider",
    {"use_tf32": "0"},
    "an NVIDIA GPU, its driver, CUDA 13 and cuDNN 9 (pip install 'deploykit[gpu]' brings the last two)",
)


def session(model: str | os.PathLike[str], *, threads: int | None = None) -> DeviceSession:
    """Load an ONNX file on the GPU; ``threads`` bounds the CPU's part."""
    return gpu_session(CUDA, model, threads=threads, notes=("TF32 off",))


def required() -> None:
    """MissingComponentError, with the reason, where this machine cannot run it."""
    require(CUDA)
