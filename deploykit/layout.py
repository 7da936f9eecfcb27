"""Images as NHWC, as Keras has them, or as NCHW, as a file exported with ``--layout nchw`` has them.

Which tensors differ follows from the rank alone: every input and output of rank 4 is an image. A file says of itself
that it is one (`PROPERTY`, in its metadata), and everything that feeds files goes by that, so that a caller of
deploykit has the trained model's layout whatever the file has. The permutations and what they do to signatures and
arrays stand here once. numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from deploykit.errors import InputError
from deploykit.signature import Signature, TensorSpec

Array = npt.NDArray[Any]

NHWC, NCHW = "nhwc", "nchw"
LAYOUTS = (NHWC, NCHW)
PROPERTY = "deploykit.layout"  # in a file's metadata_props: "NCHW", or absent
TO_NCHW, TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)
IMAGE_RANK = 4
SAID = "images as NCHW: batch, channels, height, width (the trained model has NHWC)"


def known(layout: str) -> str:
    """The layout, where it is one. Raises InputError otherwise."""
    if layout not in LAYOUTS:
        raise InputError(f"no layout {layout!r}; give {' or '.join(LAYOUTS)}")
    return layout


def permuted(signature: Signature, axes: Sequence[int]) -> Signature:
    """The signature with the axes of every tensor of rank 4 in another order: `TO_NCHW` or `TO_NHWC`."""

    def turned(spec: TensorSpec) -> TensorSpec:
        return replace(spec, shape=tuple(spec.shape[axis] for axis in axes)) if len(spec.shape) == IMAGE_RANK else spec

    return Signature(tuple(map(turned, signature.inputs)), tuple(map(turned, signature.outputs)))


def transposed(arrays: Mapping[str, Array], axes: Sequence[int]) -> dict[str, Array]:
    """The same of arrays by name; what is turned is copied, so that nothing is left to do when it is used."""
    return {
        name: np.ascontiguousarray(np.transpose(array, axes)) if np.ndim(array) == IMAGE_RANK else array
        for name, array in arrays.items()
    }
