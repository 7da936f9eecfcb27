"""Two questions to a loaded model: are its weights numbers, and may its layers be rewritten?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from deploykit.errors import UnsupportedModelError

Rule = Callable[[Any], bool]


def _quantized(layer: Any) -> bool:
    policy = getattr(layer, "dtype_policy", None)
    return getattr(policy, "quantization_mode", None) is not None


# A layer whose weights are not the kernel that it applies: new values written into it would be scaled,
# added to or normalised once more.
UNTOUCHABLE: dict[str, Rule] = {
    "quantized": _quantized,  # kernel = int8 codes x scale
    "LoRA enabled": lambda layer: bool(getattr(layer, "lora_enabled", False)),  # kernel + A·B
    "SpectralNormalization": lambda layer: isinstance(layer, keras.layers.SpectralNormalization),  # kernel / sigma
}


def every_layer(model: keras.Model) -> Iterator[Any]:
    """All layers at any depth, inside nested models and wrappers too."""
    yield from model._flatten_layers(include_self=False, recursive=True)


def refuse_rewriting(model: keras.Model) -> None:
    """Raise UnsupportedModelError, naming every layer, when weights must not be rewritten."""
    found = [
        f"{layer.name} ({reason})"
        for layer in every_layer(model)
        for reason, is_so in UNTOUCHABLE.items()
        if is_so(layer)
    ]
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise UnsupportedModelError(
            f"the weights of {', '.join(found[:5])}{more} cannot be rewritten exactly; "
            "pass the model as it was before quantizing or adding the adapter"
        )


def nonfinite_weights(model: keras.Model) -> tuple[str, ...]:
    """One line for each weight that holds NaN or Inf: its path and how many of its values."""
    found = []
    for variable in model.variables:
        values = np.asarray(variable.value.numpy())
        if np.issubdtype(values.dtype, np.integer) or values.dtype == bool:
            continue
        try:
            bad = values.size - int(np.count_nonzero(np.isfinite(values)))
        except TypeError:  # a variable that holds no numbers, a table of strings say
            continue
        if bad:
            found.append(f"{variable.path}: {bad} of {values.size} values are not finite")
    return tuple(found)
