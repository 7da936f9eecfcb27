"""Why an affine stays: a closed table of codes, and the refusal that carries one.

The codes are a contract: scripts group by them. The sentence beside a code in a report names the
layer in the way and the number that decided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CODES: Mapping[str, str] = {
    "folded": "the affine was absorbed completely",
    "no_sink": "the neighbour is neither a layer that can absorb an affine nor one it can pass",
    "fan_out": "the tensor in front feeds other layers too, which must not see the change",
    "model_output": "the tensor is an output of the model and must keep its values",
    "model_input": "nothing stands between an input of the model and the affine",
    "shared_layer": "a layer on the way is called more than once, and the other calls must not change",
    "fused_activation": "an activation stands between the weights and the affine",
    "padded_shift": "padding (or a transposed window) puts zeros where the shift would have to be seen",
    "axis_mismatch": "the affine acts along another axis than the layer's channels",
    "unknown_size": "a size on the way is not known, so that the axis cannot be followed",
    "mask": "a mask decides which steps count, and the affine would not pass it unchanged",
    "training_mode": "a layer is called with training=True and is no fixed map",
    "bad_statistics": "variance + epsilon is not positive, or a parameter is not finite",
    "unsupported_option": "the layer has an option whose inference is not a per-channel affine",
    "dtype_change": "the layer also changes the dtype, which its neighbours would have to take over",
    "enclosed": "it stands inside a layer that is called as a whole: a model in a TimeDistributed, a custom layer",
    "kept_by_user": "--keep names the layer",
    "barrier": "--barrier names a layer on the way",
    "overflow": "a folded weight would not fit into the layer's dtype",
    "underflow": "the folded weights of a channel would vanish in the layer's dtype",
    "conditioning": "exact in algebra, but the fold would cost accuracy in the layer's dtype",
    "nonlinear": "an activation (or a product) on the way passes scales at most, and no shift",
    "negative_scale": "the scale of a channel is negative where an activation or a maximum needs it positive",
    "not_invertible": "the scale of a channel is 0 where it would have to be undone",
    "conflict": "the layers around would have to change in two ways at once",
    "search_limit": "the search for layers that could follow was given up",
    "proof_failed": "the fold did not reproduce the model in float64; please report it",
}


@dataclass(frozen=True)
class Refusal:
    """One reason against a fold. ``code`` is a key of `CODES`; ``reason`` is one sentence."""

    code: str
    reason: str

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"unknown reason code {self.code!r}")
