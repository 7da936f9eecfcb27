"""Apply a plan: replay the graph without the fused sources and with the new weights.

New weights are computed layer by layer in float64, right before they are assigned, and cast once, to
the dtype of the variable they go into; nothing keeps a float64 copy of the model. The cast is watched:

    overflow    a finite weight becomes infinite
    underflow   all weights of an output channel vanish although they would show beside its bias

Constraints are judged on the new weights: one that would change them (a MaxNorm on a kernel that grew)
is removed, because the first training step would undo the fold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from ml_dtypes import finfo  # knows bfloat16 too; TensorFlow depends on it

from deploykit.channels import CHANNELS, to_block
from deploykit.fuse.plan import Plan
from deploykit.fuse.reasons import Refusal
from deploykit.fuse.sinks import needs_bias, rewritten
from deploykit.graph import Config, Trace, numpy, replay

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Applied:
    """The fused model, what was noticed, and the sources whose cast lost something."""

    model: Any
    notices: tuple[str, ...]
    losses: Mapping[str, Refusal]


def _cast_loss(layer: Any, name: str, weights: Mapping[str, Float64], dtype: np.dtype[Any]) -> Refusal | None:
    """Whether casting a layer's new weights to ``dtype`` loses one of them."""
    for value in weights.values():
        with np.errstate(over="ignore"):
            lost = ~np.isfinite(value.astype(dtype).astype(np.float64))
        if lost.any():
            return Refusal("overflow", f"{name} would hold {np.abs(value[lost]).max():.3g}, too large for {dtype}")
    kernel = _kernels(layer)[-1]
    groups = getattr(layer, "groups", 1) if kernel.name == "kernel" else 1
    block = np.abs(to_block(weights[kernel.name], kernel.order, groups))
    size = block.max(axis=(0, 2), initial=0.0).ravel()  # the largest weight of every output channel
    with np.errstate(under="ignore"):
        vanished = (size > 0) & (size.astype(dtype).astype(np.float64) == 0)
    if "bias" in weights:  # beside a bias that is larger by more than its rounding nobody would see them
        vanished &= np.abs(weights["bias"]) < size / float(finfo(dtype).eps)  # type: ignore[no-untyped-call]
    if vanished.any():
        return Refusal(
            "underflow", f"{int(vanished.sum())} channels of {name} would vanish: {size[vanished].max():.3g} in {dtype}"
        )
    return None


def _configs(found: Trace, edited: Mapping[str, Any], plan: Plan) -> tuple[dict[str, Config], list[str]]:
    """Config entries of edited layers that change: a bias that is new, constraints that no longer hold."""
    configs: dict[str, Config] = {}
    notices: list[str] = []
    for name, layer in edited.items():
        edits = plan.edits_of(name)
        change: Config = {}
        if needs_bias(layer, edits) and not layer.use_bias:
            change["use_bias"] = True
        slots = [(kernel.name, f"{kernel.name.removesuffix('_kernel')}_constraint") for kernel in _kernels(layer)]
        for variable, slot in (*slots, ("bias", "bias_constraint")):
            constraint = getattr(layer, slot, None)
            if constraint is None:
                continue
            value = rewritten(layer, edits).get(variable)
            if value is None:
                continue
            held = numpy(constraint(keras.ops.convert_to_tensor(value, dtype="float32")))
            if not np.allclose(held, value, rtol=1e-6, atol=1e-7):
                change[slot] = None
                notices.append(
                    f"removed {slot} ({type(constraint).__name__}) of {name}: the fused weights do not satisfy it"
                )
        if change:
            configs[name] = change
    return configs, notices


def _kernels(layer: Any) -> tuple[Any, ...]:
    return CHANNELS[type(layer)].kernels


def _own_dtype(layer: Any) -> np.dtype[Any]:
    return numpy(getattr(layer, _kernels(layer)[0].name)).dtype


def _edited(found: Trace, plan: Plan) -> dict[str, Any]:
    layers = {node.name: node.layer for node in found.nodes}
    return {name: layers[name] for name in plan.edited}


def apply(
    found: Trace,
    plan: Plan,
    *,
    dtype: str | None = None,
    logits: bool = False,
) -> Applied:
    """Build the fused model of a plan.

    By default the model to ship: every layer in its own dtype. With ``dtype="float64"`` the model of
    the proof, with its weights as computed.
    """
    edited = _edited(found, plan)
    configs, notices = _configs(found, edited, plan)
    losses: dict[str, Refusal] = {}

    def weights(name: str) -> Mapping[str, npt.NDArray[Any]] | None:
        layer = edited.get(name)
        if layer is None:
            return None
        computed = rewritten(layer, plan.edits_of(name))
        own = _own_dtype(layer)
        loss = _cast_loss(layer, name, computed, own)
        if loss is not None:
            losses.update(dict.fromkeys(plan.sources_of(name), loss))
        if dtype is not None:
            return computed
        with np.errstate(over="ignore"):
            return {key: value.astype(own) for key, value in computed.items()}

    model = replay(found, changes=configs, weights=weights, dropped=plan.dropped, dtype=dtype, logits=logits)
    return Applied(model, tuple(notices), losses)


def round_weights(double: Any, found: Trace, plan: Plan) -> None:
    """Round a float64 model's new weights, in place, to the dtypes they are stored in."""
    for name, layer in _edited(found, plan).items():
        for variable in double.get_layer(name).weights:
            with np.errstate(over="ignore", under="ignore"):
                variable.assign(numpy(variable).astype(_own_dtype(layer)).astype(np.float64))
