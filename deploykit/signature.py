"""What goes into a model and what comes out of it: names, shapes, dtypes, plausible ranges.

A signature is the contract that every step keeps: the fused file, the ONNX file and the bundle
all have the signature of the model that came in. Shapes have the batch axis first and ``None``
where a size is free. No framework is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    ``shape`` includes the batch axis (``None``: any size). ``low`` and ``high`` bound plausible
    values where the model itself says so (an Embedding's vocabulary, a Rescaling by 1/255);
    ``None`` where it does not.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    low: float | None = None
    high: float | None = None

    def sample_shape(self, free: int = 1) -> tuple[int, ...]:
        """Shape of one sample, without the batch axis; ``free`` replaces sizes that are open."""
        return tuple(free if size is None else size for size in self.shape[1:])

    def __str__(self) -> str:
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.name} {self.dtype} [{sizes}]"


@dataclass(frozen=True)
class Signature:
    """All inputs and outputs of a model, in the model's own order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __iter__(self) -> Iterator[TensorSpec]:
        yield from self.inputs
        yield from self.outputs

    def differences(self, other: Signature) -> list[str]:
        """What ``other`` has otherwise, one line each; ranges do not count.

        A size that is free on one side and fixed on the other is a difference.
        """
        found = []
        for kind, mine, theirs in (("input", self.inputs, other.inputs), ("output", self.outputs, other.outputs)):
            if [spec.name for spec in mine] != [spec.name for spec in theirs]:
                found.append(f"{kind}s {[s.name for s in mine]} became {[s.name for s in theirs]}")
                continue
            for before, after in zip(mine, theirs, strict=True):
                if before.shape != after.shape or before.dtype != after.dtype:
                    found.append(f"{kind} {before} became {after}")
        return found
