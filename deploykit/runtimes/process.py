"""The near end of `deploykit.runtimes.worker`: a process that answers one command at a time, and stands still between.

A process that has nothing to answer is stopped (SIGSTOP): threads that spin while they wait for work (ONNX Runtime's
do, for more than 50 ms) would take the cores from the one that is measured. Whatever ends this process ends it too.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploykit.errors import MissingComponentError


class NoAnswerError(Exception):
    """A worker failed, died or took too long; the message is the reason, in words."""


# The worker finds modules where this process finds them, and nowhere else: not in the current folder.
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from deploykit.runtimes.worker import main; main()"

_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3"}
_NO_GPU = {"CUDA_VISIBLE_DEVICES": "-1"}  # for runtimes of the CPU, which would take them where they can
REQUIRE_S = 120.0


class Process:
    """A process of `deploykit.runtimes.worker`, stopped whenever it has nothing to answer; GPUs are hidden or seen."""

    def __init__(self, log: Any, log_path: Path, *, gpu: bool = False) -> None:
        self._log_path = log_path
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **_QUIET, **({} if gpu else _NO_GPU)},
            start_new_session=True,  # Ctrl-C goes to this process, which ends the workers in order
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        with stream:
            for line in stream:
                self._answers.put(line.decode("ascii", "replace"))
        self._answers.put("")  # the end

    def ask(self, verb: str, timeout: float, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Let the process run until it has answered. Raises NoAnswerError, with the reason, where it does not."""
        stream = self._process.stdin
        assert stream is not None
        try:
            self._resume()
            stream.write(json.dumps({"do": verb, **arguments}).encode("ascii") + b"\n")
            stream.flush()
            line = self._answers.get(timeout=timeout)
        except OSError:
            line = ""  # it is gone
        except queue.Empty:
            raise NoAnswerError(f"no answer to {verb} within {timeout:g} s; the worker was ended") from None
        if not line:
            raise NoAnswerError(self._death(verb))
        self._stop()
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise NoAnswerError(f"unreadable answer to {verb}: {line[:100]!r}") from None
        if "failed" in answer:
            raise NoAnswerError(str(answer["failed"]))
        return answer

    # Only on Linux is a stopped process sure to die with its parent (see the worker).

    def _resume(self) -> None:
        if sys.platform == "linux":
            self._process.send_signal(signal.SIGCONT)

    def _stop(self) -> None:
        if sys.platform == "linux":
            self._process.send_signal(signal.SIGSTOP)
            with contextlib.suppress(ChildProcessError):  # it died; the next command finds out
                os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _death(self, verb: str) -> str:
        code = self._process.wait()
        lines = self._log_path.read_text("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        if code < 0:
            cause = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            hint = " (out of memory?)" if cause == "SIGKILL" else ""
            return f"the worker was killed by {cause}{hint} during {verb}"
        return f"the worker ended with code {code} during {verb}: {last[:200]}"

    def close(self) -> None:
        """End the process at once, stopped or not, and reap it."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()


def require_gpu(runtime: str) -> None:
    """Raise MissingComponentError, with the reason, where this machine cannot run a GPU's runtime.

    Asked in a process of its own, as a candidate's is: this one may hide GPUs, and is to keep no memory of theirs.
    """
    with tempfile.TemporaryDirectory(prefix="deploykit-gpu-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as stream:
            process = Process(stream, log, gpu=True)
        try:
            process.ask("require", REQUIRE_S, {"runtime": runtime})
        except NoAnswerError as error:
            raise MissingComponentError(str(error)) from None
        finally:
            process.close()
