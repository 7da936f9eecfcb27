"""What disturbs a timing on this machine, read from Linux: other programs, a hypervisor, the clock of the processors.

    /proc/stat                                    time of each processor: computing, and stolen by the hypervisor
    /sys/devices/system/cpu/cpu*/cpufreq          the frequency of the processor that has just computed
    /proc/cpuinfo                                 the same, where there is no cpufreq and few processors

With `Watch` around a measurement, over the processors that this process may use:

    others = (time computing − time of our own processes) / elapsed      in processors
    stolen = time stolen / (time computing + time stolen)

Limits. The kernel counts in ticks (10 ms), so less than ``LEAST_S`` say nothing. Work of others on a hardware thread
of the same core, or in the memory that all share, is seen only where they run on processors that we may use. Where a
file is not there (other systems, sandboxes) nothing is said.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

LEAST_S = 0.5
OTHERS_LIMIT = 0.10  # of all processors' time
STOLEN_LIMIT = 0.01

_FREQUENCY = "/sys/devices/system/cpu/cpu{}/cpufreq/scaling_cur_freq"  # kHz
_FEW_PROCESSORS = 16  # reading /proc/cpuinfo asks every processor


@dataclass(frozen=True)
class Doubt:
    """Something to know before trusting a number: ``code`` for scripts, ``text`` for people.

    ``candidate`` is the name of what it is about; None where it is about the machine.
    """

    code: str
    text: str
    candidate: str | None = None

    def to_json(self) -> dict[str, str | None]:
        return {"code": self.code, "text": self.text, "candidate": self.candidate}


@dataclass(frozen=True)
class Ticks:
    """Time of some processors since the machine started, in seconds."""

    computing_s: float
    stolen_s: float

    @classmethod
    def of(cls, text: str, processors: set[int], tick_s: float) -> Ticks | None:
        """From the text of /proc/stat; None where it does not say.

        A line is ``cpu0 user nice system idle iowait irq softirq steal ...``, in ticks (proc_stat(5)).
        """
        computing = stolen = 0
        seen = False
        for line in text.splitlines():
            name, *counts = line.split() or [""]
            if name.removeprefix("cpu").isdecimal() and int(name[3:]) in processors and len(counts) >= 8:
                user, nice, system, _, _, irq, soft, steal = map(int, counts[:8])
                computing += user + nice + system + irq + soft
                stolen += steal
                seen = True
        return cls(computing * tick_s, stolen * tick_s) if seen else None


def _ticks() -> Ticks | None:
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError, ValueError), open("/proc/stat", encoding="ascii", errors="replace") as stream:
        return Ticks.of(stream.read(), os.sched_getaffinity(0), 1 / os.sysconf("SC_CLK_TCK"))
    return None


class Watch:
    """Sums what happened in the blocks it was put around, ``with watch: ...``; ``ours_s`` is added by the caller."""

    def __init__(self) -> None:
        self.elapsed_s = self.computing_s = self.stolen_s = self.ours_s = 0.0
        self._began: tuple[float, float, Ticks | None] = (0.0, 0.0, None)

    def __enter__(self) -> Watch:
        self._began = time.perf_counter(), time.process_time(), _ticks()
        return self

    def __exit__(self, *_: object) -> None:
        began, own, before = self._began
        after = _ticks()
        if before is not None and after is not None:
            self.elapsed_s += time.perf_counter() - began
            self.ours_s += time.process_time() - own
            self.computing_s += after.computing_s - before.computing_s
            self.stolen_s += after.stolen_s - before.stolen_s

    def warnings(self, processors: int) -> Iterator[Doubt]:
        """What was seen; ``processors`` is how many of them this process may use."""
        if self.elapsed_s < LEAST_S:
            return
        others = (self.computing_s - self.ours_s) / self.elapsed_s
        if others > OTHERS_LIMIT * processors:
            yield Doubt("other_load", f"other programs used {others:.1f} of {processors} cores meanwhile; stop them")
        stolen = self.stolen_s / max(self.computing_s + self.stolen_s, 1e-9)
        if stolen > STOLEN_LIMIT:
            yield Doubt("steal", f"the hypervisor took {stolen:.1%} of the time; use a machine that is not shared")


def busy(processors: int) -> Iterator[Doubt]:
    """Whether more programs want to compute than there are processors."""
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # not on every system
        return
    if load > processors:
        text = f"load average is {load:.1f} on {processors} cores: other programs are computing; timings are noisy"
        yield Doubt("busy", text)


def megahertz() -> float | None:
    """The frequency of the processor that this thread has just computed on; None where the system does not tell."""
    if sys.platform != "linux":
        return None
    import ctypes

    processor = int(ctypes.CDLL(None).sched_getcpu())
    with contextlib.suppress(OSError, ValueError), open(_FREQUENCY.format(processor), encoding="ascii") as stream:
        return int(stream.read()) / 1000
    if (os.cpu_count() or 1) > _FEW_PROCESSORS:
        return None
    with contextlib.suppress(OSError, ValueError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
        found = [float(line.partition(":")[2]) for line in stream if line.startswith("cpu MHz")]
        return found[processor] if processor < len(found) else None
    return None
