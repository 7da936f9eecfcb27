"""Apply a plan: replay the graph without the fused sources and with the new weights.

New weights are computed layer by layer in float64, right before they are assigned, and cast once, to
the dtype of the variable they go into; nothing keeps a float64 copy of the model. The cast is watched:

    overflow    a finite weight becomes infinite
    underflow   all weights of an output channel vanish although they would show beside its bias

A source that stays with another affine than its own (one per-channel addition, or two affines in one) becomes a
Rescaling of its name, the standard layer that is nothing but scale and offset. Padding with another value than zero
becomes a constant pad in front of a layer that pads no more.

Constraints are judged on the new weights: one that would change them (a MaxNorm on a kernel that grew)
is removed, because the first training step would undo the fold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from ml_dtypes import finfo  # knows bfloat16 too; TensorFlow depends on it

from deploykit.affine import Affine
from deploykit.channels import CHANNELS, to_block
from deploykit.fuse.change import Site, site
from deploykit.fuse.conduits import CONDUITS, padding_of, same_padding
from deploykit.fuse.plan import Plan
from deploykit.fuse.reasons import Refusal
from deploykit.fuse.sinks import Edit, new_config, rewritten
from deploykit.graph import Config, Padding, Trace, key, numpy, replay

L = keras.layers
Float64 = npt.NDArray[np.float64]
DType = np.dtype[Any]


@dataclass(frozen=True)
class Applied:
    """The fused model, what was noticed, and the sources whose cast lost something."""

    model: Any
    notices: tuple[str, ...]
    losses: Mapping[str, Refusal]


@dataclass(frozen=True, eq=False)
class _Edited:
    """A layer that absorbs something: the one that computes (inside a TimeDistributed), and its edits."""

    name: str
    layer: Any
    edits: Sequence[Edit]
    wrapper: Any | None
    valid: bool  # padding="same" or "causal" has become a pad of its own

    @property
    def dtype(self) -> DType:
        """What the layer stores its weights in."""
        stored: DType = np.dtype(self.layer.variable_dtype)
        return stored

    def weights(self) -> Mapping[str, Float64]:
        return rewritten(self.layer, self.edits)

    def config(self) -> tuple[Config, list[str]]:
        """Entries of the config that change, and what there is to say: a bias that is new, constraints that fall."""
        change, notices = dict(new_config(self.layer, self.edits)), []
        if self.valid:
            change["padding"] = "valid"
        for path, entry, owner in _parts(self.layer):
            fallen = self.fallen(path, owner)
            notices += [
                f"removed {slot} ({type(constraint).__name__}) of {self.name}: the fused weights do not satisfy it"
                for slot, constraint in fallen.items()
            ]
            freed = dict.fromkeys(fallen)
            if entry is None:
                change.update(freed)
            elif freed:
                stored = change.get(entry) or self.layer.get_config()[entry]
                change[entry] = {**stored, "config": {**stored["config"], **freed}}
        if self.wrapper is None or not change:
            return change, notices
        inner = self.wrapper.get_config()["layer"]
        return {"layer": {**inner, "config": {**inner["config"], **change}}}, notices

    def fallen(self, path: str, owner: Any) -> dict[str, Any]:
        """Config slot -> constraint of ``owner`` that the new weights under ``path`` do not satisfy."""
        constraints = _constraints(owner)
        found = {}
        for name, value in self.weights().items() if constraints else ():
            stem = name.rsplit(".", 1)[-1]
            # a depthwise convolution calls the constraint of its kernel otherwise
            slots = (
                f"{stem.removesuffix('_kernel')}_constraint",
                *(("depthwise_constraint",) if stem == "kernel" else ()),
            )
            for slot in slots:
                if name.startswith(path) and slot in constraints:
                    held = numpy(constraints[slot](keras.ops.convert_to_tensor(value, dtype="float32")))
                    if not np.allclose(held, value, rtol=1e-6, atol=1e-7):
                        found[slot] = constraints[slot]
        return found


CONSTRAINED = ("kernel", "depthwise", "pointwise", "recurrent", "bias", "embeddings", "gamma", "beta")


def _parts(layer: Any) -> list[tuple[str, str | None, Any]]:
    """(path of its weights, entry of the config, layer) for each part of a layer that has a config of its own."""
    if not isinstance(layer, L.Bidirectional):
        return [("", None, layer)]
    behind = "backward_layer" if "backward_layer" in layer.get_config() else "layer"
    return [("forward_layer.", "layer", layer.forward_layer), ("backward_layer.", behind, layer.backward_layer)]


def _constraints(layer: Any) -> dict[str, Any]:
    """Config slot -> the constraint that a layer holds there."""
    slots = [f"{name}_constraint" for name in CONSTRAINED]
    held = {slot: getattr(layer, slot, None) or getattr(layer, f"_{slot}", None) for slot in slots}
    return {slot: constraint for slot, constraint in held.items() if constraint is not None}


def _edited(found: Trace, plan: Plan) -> dict[str, _Edited]:
    by_name = {node.name: node for node in found.nodes}
    collected: dict[str, _Edited] = {}
    edits: dict[str, list[Edit]] = {name: [] for name in plan.pads if not _only_pads(site(found, by_name[name]))}
    for edit in plan.edits:
        edits.setdefault(edit.layer, []).append(edit)
    for name, own in edits.items():
        at = site(found, by_name[name])
        wrapper = at.node.layer if at.steps else None
        collected[name] = _Edited(name, at.layer, own, wrapper, name in plan.pads)
    return collected


def _only_pads(at: Site) -> bool:
    return key(at.layer) in CONDUITS


def _cast_loss(edited: _Edited, weights: Mapping[str, Float64]) -> Refusal | None:
    """Whether casting a layer's new weights to its dtype loses one of them."""
    layer, name, dtype = edited.layer, edited.name, edited.dtype
    for value in weights.values():
        with np.errstate(over="ignore"):
            lost = ~np.isfinite(value.astype(dtype).astype(np.float64))
        if lost.any():
            return Refusal("overflow", f"{name} would hold {np.abs(value[lost]).max():.3g}, too large for {dtype}")
    if type(layer) not in CHANNELS:
        return None
    kernel = CHANNELS[type(layer)].kernels[-1]
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


# ------------------------------------------------------------------------------- sources that stay, and padding


def _rescaling(name: str, axis: int, rank: int, affine: Affine, policy: Any, dtype: str | None) -> Any:
    """A Rescaling that is the affine, in float64 exactly, else rounded to what its dtype computes with."""
    layer = L.Rescaling(1.0, dtype=dtype or policy, name=name)
    _set_rescaling(layer, axis, rank, affine, None if dtype else np.dtype(layer.compute_dtype))
    return layer


def _set_rescaling(layer: Any, axis: int, rank: int, affine: Affine, rounded: DType | None) -> None:
    def told(values: Float64) -> Any:
        with np.errstate(over="ignore", under="ignore"):
            exact = values if rounded is None else values.astype(rounded).astype(np.float64)
        shaped = exact[0] if (exact == exact[0]).all() else exact.reshape(-1, *[1] * (rank - 1 - axis))
        # Python's numbers are read in float32 first: right for a file, not for a proof in float64
        return np.asarray(shaped) if layer.compute_dtype == "float64" else shaped.tolist()

    layer.scale, layer.offset = told(affine.scale), told(affine.shift)


def _swaps(found: Trace, plan: Plan, dtype: str | None) -> dict[str, Callable[[], Any]]:
    """Makers of the layers that stand in for sources with another affine than their own."""
    nodes = {node.name: node for node in found.nodes}
    swaps: dict[str, Callable[[], Any]] = {}
    for name, (axis, affine) in plan.affines.items():
        node = nodes[name]
        tensor = found.tensors[node.outputs[0]]
        policy = node.layer.dtype_policy if isinstance(node.layer, L.Layer) else tensor.dtype

        swaps[name] = partial(_rescaling, name, axis, len(tensor.shape), affine, policy, dtype)
    return swaps


def _pads(found: Trace, plan: Plan) -> dict[str, Padding]:
    nodes = {node.name: node for node in found.nodes}
    pads = {}
    for name, value in plan.pads.items():
        at = site(found, nodes[name])
        if _only_pads(at):
            pads[name] = Padding(padding_of(at)[0], value, alone=True)
        else:
            widths = same_padding(at)
            assert not isinstance(widths, Refusal)
            pads[name] = Padding(widths, value, alone=False)
    return pads


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
    configs: dict[str, Config] = {}
    notices: list[str] = []
    losses: dict[str, Refusal] = {}
    for name, layer in edited.items():
        configs[name], said = layer.config()
        notices += said

    def weights(name: str) -> Mapping[str, npt.NDArray[Any]] | None:
        layer = edited.get(name)
        if layer is None:
            return None
        computed = layer.weights()
        loss = _cast_loss(layer, computed)
        if loss is not None:
            losses.update(dict.fromkeys(plan.sources_of(name), loss))
        path = "layer." if layer.wrapper is not None else ""
        with np.errstate(over="ignore", under="ignore"):
            return {path + k: value if dtype else value.astype(layer.dtype) for k, value in computed.items()}

    model = replay(
        found,
        changes=configs,
        weights=weights,
        dropped=plan.dropped,
        swaps=_swaps(found, plan, dtype),
        pads=_pads(found, plan),
        dtype=dtype,
        logits=logits,
    )
    return Applied(model, tuple(notices), losses)


def round_weights(double: Any, found: Trace, plan: Plan) -> None:
    """Round a float64 model's new weights, in place, to the dtypes they are stored in."""
    layers = {layer.name: layer for layer in double.layers}
    for name, edited in _edited(found, plan).items():
        for variable in layers[name].weights:
            with np.errstate(over="ignore", under="ignore"):
                variable.assign(numpy(variable).astype(edited.dtype).astype(np.float64))
    nodes = {node.name: node for node in found.nodes}
    for name, (axis, affine) in plan.affines.items():
        tensor = found.tensors[nodes[name].outputs[0]]
        _set_rescaling(layers[name], axis, len(tensor.shape), affine, np.dtype(tensor.dtype))
