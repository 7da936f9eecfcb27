"""Leave the process as it was: what Keras changes while it loads is put back, what it says is collected.

Building layers draws seeds from Python's ``random`` (Keras' initializers), importing custom code fills
Keras' registry and may set the global dtype policy, and deep graphs need more recursion than Python
allows. Safe mode is forced on or off for the block: a process that once called
``keras.config.enable_unsafe_deserialization()`` would otherwise overrule the argument.

Not covered: Keras' counters for automatic layer names, and what native code writes to file descriptor 2.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
import sys
import warnings
from collections.abc import Iterator

import keras
from keras.src.saving.serialization_lib import SafeModeScope  # no public name for it

_LOGGERS = ("absl", "tensorflow", "keras")
_FRAMES_PER_PART = 4  # Keras walks a graph recursively, a few frames for each layer
_MAX_RECURSION = 200_000
_MAX_NOTICE = 300


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Restore Python's random state, Keras' registry and the global dtype policy."""
    randomness = random.getstate()
    registry = keras.saving.get_custom_objects()
    registered = dict(registry)
    policy = keras.config.dtype_policy()
    try:
        yield
    finally:
        random.setstate(randomness)
        registry.clear()
        registry.update(registered)
        if keras.config.dtype_policy() != policy:
            keras.config.set_dtype_policy(policy)


@contextlib.contextmanager
def safe_mode(on: bool) -> Iterator[None]:
    """Keras' safe mode for the block, whatever the process has set."""
    with SafeModeScope(on):
        yield


@contextlib.contextmanager
def room_for(parts: int) -> Iterator[None]:
    """Enough recursion for a chain of layers made of so many parts."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, min(1000 + _FRAMES_PER_PART * parts, _MAX_RECURSION)))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def collected(notices: list[str]) -> Iterator[None]:
    """Append to ``notices``, one line each and none twice, what Keras prints, logs or warns about."""
    collector = _Collector()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    printed = io.StringIO()
    with (
        warnings.catch_warnings(record=True) as warned,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        warnings.simplefilter("default")
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):  # for Keras' authors
            warnings.simplefilter("ignore", category)
        for logger in loggers:
            logger.handlers, logger.propagate = [collector], False
        try:
            yield
        finally:
            for logger, (handlers, propagate) in zip(loggers, before, strict=True):
                logger.handlers, logger.propagate = handlers, propagate
            said = [str(warning.message) for warning in warned] + collector.lines + printed.getvalue().splitlines()
            for text in said:
                line = " ".join(text.split())[:_MAX_NOTICE]
                if line and line not in notices:
                    notices.append(line)
