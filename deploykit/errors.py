"""The error tree. Every message is one line that says what is wrong and what to do about it.

    DeploykitError
    ├── InputError                 exit 2: bad usage, bad input, a missing optional component
    │   ├── LoadError                  a model file that cannot be read
    │   │   ├── UnsafeModelError       ... because it would run code that came with the file
    │   │   └── CustomObjectError      ... because it names classes that were not given
    │   ├── UnsupportedModelError      a model that loads, but must not or cannot be handled
    │   ├── DataError                  samples that do not fit the model
    │   ├── TrainingError              training that cannot go on
    │   ├── OutputError                a place that cannot be written
    │   └── MissingComponentError      an extra that is not installed
    └── ProofError                 exit 1: a proof, a check or a gate failed

Anything else that escapes a command is an internal error: exit 70.
"""

from __future__ import annotations


class DeploykitError(Exception):
    """Base of every error that deploykit raises on purpose.

    ``exit_code`` is what the command line returns for it.
    """

    exit_code = 70

    def __init__(self, message: str) -> None:
        plain = "".join(sign if sign.isprintable() or sign.isspace() else "?" for sign in message)
        super().__init__(" ".join(plain.split()))


class InputError(DeploykitError):
    """The input or the request is at fault; the message names the remedy."""

    exit_code = 2


class LoadError(InputError):
    """A model file cannot be read."""


class UnsafeModelError(LoadError):
    """Loading the file would run code that came with it."""


class CustomObjectError(LoadError):
    """The file names classes or functions that were not given."""


class UnsupportedModelError(InputError):
    """The model was read, but deploykit must not or cannot handle it."""


class DataError(InputError):
    """Samples that cannot be read or do not fit the model's inputs."""


class TrainingError(InputError):
    """Training cannot go on: the loss is no longer finite. ``usable``: the weights from before are worth keeping."""

    def __init__(self, message: str, usable: bool = False) -> None:
        super().__init__(message)
        self.usable = usable


class OutputError(InputError):
    """An output cannot be written where it was asked for."""


class MissingComponentError(InputError):
    """An optional component is not installed; the message names the extra."""


class ProofError(DeploykitError):
    """A proof, a check or a gate failed: what was made must not be used."""

    exit_code = 1
