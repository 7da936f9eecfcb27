"""Augmentation: Keras' random layers in front of the training, never in the model.

They run on a batch before the model sees it, as part of the data, so that neither the saved nor the exported model can
hold any of them. Each has a strength that suits photographs of things; Keras' documentation says what the numbers are.

Limits: images with their channels last, as the model's first input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from deploykit.errors import InputError
from deploykit.signature import Signature

L = keras.layers
Range = tuple[float, float]

# Name -> the layer, given the range of the pixels and a seed.
AUGMENTATIONS: Mapping[str, Callable[[Range, int], Any]] = {
    "flip": lambda pixels, seed: L.RandomFlip("horizontal", seed=seed),
    "flip-vertical": lambda pixels, seed: L.RandomFlip("vertical", seed=seed),
    "rotation": lambda pixels, seed: L.RandomRotation(0.03, seed=seed),  # of a turn: about 11 degrees either way
    "zoom": lambda pixels, seed: L.RandomZoom(0.1, seed=seed),
    "translation": lambda pixels, seed: L.RandomTranslation(0.08, 0.08, seed=seed),
    "contrast": lambda pixels, seed: L.RandomContrast(0.2, value_range=pixels, seed=seed),
}


def augmentation(names: Sequence[str], signature: Signature, seed: int = 0) -> Any:
    """A keras.Model of a batch of the model's first input that changes it at random, or None for no names.

    Raises InputError for a name that is not in `AUGMENTATIONS`, and for an input that is no image.
    """
    if not names:
        return None
    unknown = [name for name in names if name not in AUGMENTATIONS]
    if unknown:
        raise InputError(f"augmentation '{unknown[0]}' is unknown; choose from {', '.join(AUGMENTATIONS)}")
    spec = signature.inputs[0]
    if len(spec.shape) != 4 or spec.shape[-1] not in (1, 3, 4):
        raise InputError(f"input {spec} is no image with its channels last, so it cannot be augmented")
    pixels = (spec.low or 0.0, spec.high if spec.high is not None else 1.0)
    layers = [AUGMENTATIONS[name](pixels, seed + number) for number, name in enumerate(names)]
    return keras.Sequential([keras.Input(spec.shape[1:], dtype=spec.dtype), *layers], name="augmentation")
