"""Where numbers were measured: interpreter, machine, cores, package versions, and this process' memory.

Nothing that is described gets imported: versions come from the packages' metadata.

Cores. A container may see 64 processors and be allowed the time of two; a process may be pinned; and two
hardware threads of one core share its arithmetic units. ``cores`` counts what this process may run on,
``physical_cores`` the same without hardware siblings, and both stop at the container's quota.

Memory. Linux keeps ``ru_maxrss`` across ``exec``: a child of a large process reports its parent's size as its
own peak (getrusage(2)). The high-water mark of the address space, ``VmHWM``, starts anew.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import sys
from pathlib import Path
from typing import Any

from deploykit.verify import cpu_name

PACKAGES = (
    "deploykit",
    "tensorflow",
    "keras",
    "onnx",
    "onnxruntime",
    "tf2onnx",
    "numpy",
    "h5py",
    # optional ones
    "onnxruntime-gpu",
    "openvino",
    "ai-edge-litert",
    "tf_keras",
)

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def environment() -> dict[str, Any]:
    """The ``environment`` object of every report: python, platform, cpu, cores, physical_cores, packages."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": cores(),
        "physical_cores": physical_cores(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _allowed() -> list[int]:
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def quota(text: str) -> float:
    """Cores' worth of time that a line of ``cpu.max`` ("200000 100000", "max 100000") grants."""
    try:
        limit, period = map(float, text.split())
    except ValueError:
        return math.inf
    return limit / period if limit > 0 and period > 0 else math.inf


def _bounded(count: int) -> int:
    try:
        granted = quota(_QUOTA.read_text())
    except OSError:
        granted = math.inf
    return max(1, count if count <= granted else math.ceil(granted))


def cores() -> int:
    """Processors that this process may use, hardware threads counted singly."""
    return _bounded(len(_allowed()))


def physical_cores() -> int:
    """The same with hardware threads of one core counted once: a sensible number of threads for arithmetic."""
    siblings = set()
    for processor in _allowed():
        try:
            siblings.add(Path(_SIBLINGS.format(processor)).read_text())
        except OSError:
            siblings.add(str(processor))
    return _bounded(len(siblings))


def peak_rss_bytes() -> int | None:
    """The most memory this process has held at once, in bytes; None where the system does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as stream:
            for line in stream:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        return None
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
