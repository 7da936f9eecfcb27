"""ONNX Runtime's CUDA kernels, recorded as a CUDA graph and replayed; else as `deploykit.runtimes.onnxruntime_cuda`.

One call then starts all kernels of a run, which pays where they are short. What a graph needs, and that its failure is
an error, is said in `deploykit.runtimes.onnxruntime_gpu`.
"""

from __future__ import annotations

import os

from deploykit.runtimes.onnxruntime_cuda import CUDA
from deploykit.runtimes.onnxruntime_gpu import DeviceSession, gpu_session, require

CUDA_GRAPH = CUDA.recording("onnxruntime-cuda-graph", {"enable_cuda_graph": "1"})


def session(model: str | os.PathLike[str], *, threads: int | None = None) -> DeviceSession:
    """Load an ONNX file on the GPU; a graph is recorded at the first run, and anew for other shapes."""
    return gpu_session(CUDA_GRAPH, model, threads=threads, notes=("TF32 off", "CUDA graph"))


def required() -> None:
    """MissingComponentError, with the reason, where this machine cannot run it."""
    require(CUDA_GRAPH)
