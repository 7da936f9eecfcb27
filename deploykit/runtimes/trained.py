"""A file's session as the trained model would answer: NHWC in, NHWC out, whatever the file's own layout is.

A file exported with ``--layout nchw`` says so in its metadata. `open` reads that and shows the session of such a file
with the trained model's signature, transposing both ways; every other session it gives as it is. Whoever compares files
with models opens them here; whoever times them opens them with `runtimes.open` and turns the arrays beforehand
(`inputs_for`), because transposing is not the file's time.

Limit: a file that was turned by other tools says nothing, and its signature is then another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploykit import layout, runtimes
from deploykit.runtimes import Array, Session, fitted
from deploykit.runtimes.files import stated


class AsTrained:
    """A `Session` in NHWC over one in NCHW."""

    def __init__(self, inner: Session) -> None:
        self._inner = inner
        self.runtime = inner.runtime
        self.signature = layout.permuted(inner.signature, layout.TO_NHWC)
        self.notes = (*inner.notes, "inputs and outputs transposed from and to NHWC")

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        specs = self.signature.inputs
        arrays = dict(zip((spec.name for spec in specs), fitted(inputs, specs), strict=True))
        return layout.transposed(self._inner.run(layout.transposed(arrays, layout.TO_NCHW)), layout.TO_NHWC)

    def close(self) -> None:
        self._inner.close()


def is_nchw(model: Any) -> bool:
    """Whether ``model`` is a file that says that its images are NCHW."""
    return stated(model).get(layout.PROPERTY) == layout.NCHW.upper()


def open(name: str, model: Any, *, threads: int | None = None) -> Session:
    """`runtimes.open`, with the signature of the trained model."""
    session = runtimes.open(name, model, threads=threads)
    return AsTrained(session) if is_nchw(model) else session


def inputs_for(model: Any, arrays: Mapping[str, Array]) -> Mapping[str, Array]:
    """The trained model's inputs as the file has to be given them."""
    return layout.transposed(arrays, layout.TO_NCHW) if is_nchw(model) else arrays
