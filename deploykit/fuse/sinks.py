"""Sinks: the layers that take an affine into their weights, and the weights they then have. One row per class.

With the kernel as a block K (see `deploykit.channels`), bias b, input x and * the layer's product:

    the affine follows     s·(K*x + b) + t   =  (K·s_out) * x  +  (s·b + t)             absorb "after"
    the affine precedes    K*(s·x + t) + b   =  (K·s_in) * x   +  (b + response(K, t))   absorb "before"

    row          after                               before
    product      kernel and bias                     kernel and bias: Dense and all convolutions
    einsum       by the letter of the axis           the same, t summed over the letters that are contracted
    lookup       every row of the table              -
    norm         its own gamma and beta              -
    recurrent    -                                   the input kernel and bias of every gate
    attention    the output projection               the projections of query, key and value

"After" needs the layer to be linear up to there; a ReLU still lets a scale s >= 0 through, s·relu(y) = relu(s·y).
"Before" needs every window to see the whole shift: with padding the border sees the pad value, so the shift must be
zero there, or one pad value for all channels must do (`deploykit.fuse.conduits.new_padding`); a transposed
convolution's border windows see fewer inputs, and only scales go in. A layer that has no bias gets one when a shift
needs it.

`demand` judges without touching weights; `rewritten` computes all weights of the layer in float64. Paths such as
"cell.kernel" name a variable from the layer on.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import keras
import numpy as np
import numpy.typing as npt

from deploykit.affine import Affine
from deploykit.channels import CHANNELS, Kernel, from_block, response, scale_inputs, scale_outputs, to_block
from deploykit.fuse.change import Change, Site
from deploykit.fuse.conduits import HOMOGENEOUS, activation_name, negative, new_padding, same_padding
from deploykit.fuse.reasons import Refusal
from deploykit.graph import Config, Shape, key, numpy

L = keras.layers
Side = Literal["after", "before"]
Float64 = npt.NDArray[np.float64]
Weights = Mapping[str, Float64]


@dataclass(frozen=True, eq=False)
class Edit:
    """One affine that a layer absorbs on one side; ``source`` names the layer it came from.

    ``axis`` is what the sink's rule said its weights take it on; ``roles`` name the parts of the layer that see it,
    where not all do.
    """

    layer: str
    side: Side
    axis: int
    affine: Affine
    source: str
    roles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sink:
    """How one kind of layer absorbs: each field is None where it cannot.

    ``after``, ``before``: judge a change, and give it along the axis the weights will take it on.
    ``weights``: all weights after the edits.  ``config``: entries of the config that change with them.
    ``ports``: which inputs an affine may come in by, and the parts of the layer that see each.
    """

    after: Callable[[Site, Change], Change | Refusal] | None
    before: Callable[[Site, Change, int], Change | Refusal] | None
    weights: Callable[[Any, Sequence[Edit]], Weights]
    config: Callable[[Any, Sequence[Edit]], Config]
    ports: Callable[[Site], Mapping[int, tuple[str, ...]]] = lambda at: {0: ()}
    several: bool = False  # tensors beside the first change nothing about what it does with each


def _read(variable: Any) -> Float64:
    return numpy(variable).astype(np.float64)


def _mismatch(at: Site, axis: int) -> Refusal:
    return Refusal("axis_mismatch", f"the affine acts along axis {axis}, the channels of {at.name} along another")


def _shifts(edits: Sequence[Edit]) -> bool:
    return any(not edit.affine.is_scaling for edit in edits)


def _behind_activation(at: Site, change: Change) -> Refusal | None:
    """What the activation inside a layer lets through from behind."""
    name, activation = activation_name(at.layer), at.layer.activation
    if activation is keras.activations.linear:
        return None
    if activation not in HOMOGENEOUS or not change.is_scaling:
        return Refusal("fused_activation", f"{at.name} has activation='{name}'")
    if not change.keeps_order:
        return Refusal("fused_activation", negative(f"activation='{name}' of {at.name}", change.affine).reason)
    return None


# ------------------------------------------------------------------------------------------ Dense, convolutions


def is_padded(layer: Any, shape: Shape) -> bool:
    """Whether some window of a convolution on an input of ``shape`` sees padding."""
    if layer.padding == "valid":
        return False
    first = 2 if layer.data_format == "channels_first" else 1
    sizes = shape[first : first + len(layer.kernel_size)]
    windows = zip(sizes, layer.kernel_size, layer.strides, layer.dilation_rate, strict=True)
    for size, kernel, stride, dilation in windows:
        reach = (kernel - 1) * dilation + 1
        if reach == 1:
            continue
        if layer.padding == "causal" or size is None:
            return True
        if (math.ceil(size / stride) - 1) * stride + reach > size:  # "same" pads what is missing
            return True
    return False


def _product_after(at: Site, change: Change) -> Change | Refusal:
    axis = 1 if getattr(at.layer, "data_format", None) == "channels_first" else len(at.output) - 1
    found = change.onto(axis, at.output[axis])
    if found is None:
        return _mismatch(at, change.axis)
    return _behind_activation(at, found) or found


def _product_before(at: Site, change: Change, port: int) -> Change | Refusal:
    layer, shape = at.layer, at.inputs[0]
    found = change.onto(at.channel_axis, shape[at.channel_axis])
    if found is None:
        return _mismatch(at, change.axis)
    channels, back = CHANNELS[type(layer)], found.back
    if back is None:
        return Refusal("not_invertible", f"{at.name} cannot undo a scale of 0")
    if channels.transposed and not back.is_scaling:
        return Refusal("padded_shift", f"border windows of {at.name} would miss a shift of up to {_seen(back)}")
    if pads_anew(at, found):
        widths = same_padding(at)
        if at.steps or isinstance(widths, Refusal) or isinstance(new_padding(at, found), Refusal):
            wrong = (
                "" if isinstance(widths, Refusal) else f" (the border wrong by up to {_border(at, back, widths):.3g})"
            )
            return Refusal(
                "padded_shift",
                f"padding='{layer.padding}' on {at.name} would see a shift of up to {_seen(back)}{wrong}",
            )
    return found


def pads_anew(at: Site, change: Change) -> bool:
    """Whether a change of a layer's input shows in the constant that its windows see around it."""
    channels = CHANNELS.get(type(at.layer))
    if channels is None or not channels.windowed or channels.transposed or not is_padded(at.layer, at.inputs[0]):
        return False
    return bool(at.pad) or not change.is_scaling


def _seen(affine: Affine) -> str:
    return f"{affine.largest_shift:.3g}"


def _border(at: Site, back: Affine, widths: Sequence[tuple[int, int]]) -> float:
    """By how much the padded windows would be wrong: the answer of the taps that see padding to the shift."""
    layer = at.layer
    blocks = _blocks(layer, _product_weights(layer, at.edits) if at.edits else None)
    first, later = blocks[0][1], blocks[1:]
    g, i = first.shape[1:3]
    taps = np.einsum("kgio,gi->kgo", first, back.shift.reshape(g, i)).reshape(len(first), -1)
    for _, block in later:
        taps = np.stack([response(block, tap) for tap in taps])
    spatial = 2 if layer.data_format == "channels_first" else 1
    pads = widths[spatial : spatial + len(layer.kernel_size)]
    taps = taps.reshape(*layer.kernel_size, -1)
    worst = 0.0
    for ends in product((0, 1, 2), repeat=len(pads)):  # each axis: first window, an inner one, last window
        inside = np.ones(layer.kernel_size, bool)
        for axis, (end, pad, dilation) in enumerate(zip(ends, pads, layer.dilation_rate, strict=True)):
            missing = math.ceil(pad[end % 2] / dilation) if end < 2 else 0
            index = np.arange(layer.kernel_size[axis])
            sees = index >= missing if end == 0 else index < len(index) - missing
            inside &= sees.reshape([-1 if a == axis else 1 for a in range(len(pads))])
        worst = max(worst, float(np.abs(taps[~inside].sum(axis=0)).max(initial=0.0)))
    return worst


def _blocks(layer: Any, weights: Weights | None = None) -> list[tuple[Kernel, Float64]]:
    """The kernels of a layer as blocks; ``weights`` in place of its own."""
    found = []
    for kernel in CHANNELS[type(layer)].kernels:
        groups = getattr(layer, "groups", 1) if kernel.name == "kernel" else 1
        values = weights[kernel.name] if weights else numpy(getattr(layer, kernel.name))
        found.append((kernel, to_block(values, kernel.order, groups)))
    return found


def _product_weights(layer: Any, edits: Sequence[Edit]) -> Weights:
    stored = _blocks(layer)
    blocks = [block for _, block in stored]
    outputs = blocks[-1].shape[1] * blocks[-1].shape[3]
    bias = _read(layer.bias) if layer.use_bias else np.zeros(outputs)
    for edit in edits:
        scale, shift = edit.affine.scale, edit.affine.shift
        if edit.side == "after":
            blocks[-1] = scale_outputs(blocks[-1], scale)
            bias = scale * bias + shift
        else:
            seen = shift
            for block in blocks:
                seen = response(block, seen)
            bias = bias + seen
            blocks[0] = scale_inputs(blocks[0], scale)
    weights = {
        kernel.name: from_block(block, kernel.order, tuple(getattr(layer, kernel.name).shape))
        for (kernel, _), block in zip(stored, blocks, strict=True)
    }
    if layer.use_bias or _shifts(edits):
        weights["bias"] = bias
    return weights


def _bias_if_shifted(layer: Any, edits: Sequence[Edit]) -> Config:
    return {"use_bias": True} if _shifts(edits) and not layer.use_bias else {}


# ------------------------------------------------------------------------------------------------- EinsumDense


@dataclass(frozen=True)
class _Equation:
    """An einsum equation with a letter for every axis: dots stand for as many axes as the input has."""

    inputs: str
    kernel: str
    output: str

    @staticmethod
    def of(layer: Any, rank: int) -> _Equation:
        left, output = layer.equation.replace(" ", "").split("->")
        inputs, kernel = left.split(",")
        free = [letter for letter in string.ascii_uppercase if letter not in layer.equation]
        dots = "".join(free[: rank - len(inputs.replace("...", ""))])
        return _Equation(*(part.replace("...", dots) for part in (inputs, kernel, output)))

    @property
    def contracted(self) -> set[str]:
        return set(self.inputs) - set(self.output)


def _bias_letters(layer: Any, equation: _Equation) -> str:
    return "".join(letter for letter in equation.output if letter in (layer.bias_axes or ""))


def _einsum_after(at: Site, change: Change) -> Change | Refusal:
    equation = _Equation.of(at.layer, at.rank)
    letter = equation.output[change.axis]
    if letter not in equation.kernel:
        return _mismatch(at, change.axis)
    return _behind_activation(at, change) or change


def _einsum_before(at: Site, change: Change, port: int) -> Change | Refusal:
    equation = _Equation.of(at.layer, at.rank)
    if equation.inputs[change.axis] not in equation.kernel:
        return _mismatch(at, change.axis)
    if change.back is None:
        return Refusal("not_invertible", f"{at.name} cannot undo a scale of 0")
    if not change.back.is_scaling and not equation.contracted <= set(equation.kernel):
        return Refusal("unsupported_option", f"{at.name} sums over an axis that its kernel does not have")
    return change


def _along(array: Float64, letters: str, target: str) -> Float64:
    """An array over ``letters`` as one that broadcasts along ``target``."""
    ordered = np.transpose(array, [letters.index(letter) for letter in target if letter in letters])
    sizes = iter(ordered.shape)
    return ordered.reshape([next(sizes) if letter in letters else 1 for letter in target])


def _einsum_weights(layer: Any, edits: Sequence[Edit]) -> Weights:
    equation = _Equation.of(layer, layer.input_spec.ndim)
    output, kernel = equation.output, _read(layer.kernel)
    bias = np.zeros(()) if layer.bias is None else _read(layer.bias)
    bias = bias.reshape([1] * (len(output) - bias.ndim) + list(bias.shape))  # over all axes of the output
    for edit in edits:
        scale, shift = edit.affine.scale, edit.affine.shift
        if edit.side == "after":
            letter = equation.output[edit.axis]
            bias = bias * _along(scale, letter, output) + _along(shift, letter, output)
        else:
            letter = equation.inputs[edit.axis]
            kept = "".join(c for c in equation.kernel if c not in equation.contracted)
            bias = bias + _along(np.einsum(f"{equation.kernel},{letter}->{kept}", kernel, shift), kept, output)
        kernel = kernel * _along(scale, letter, equation.kernel)
    letters = _einsum_config(layer, edits).get("bias_axes", _bias_letters(layer, equation))
    if not letters:
        return {"kernel": kernel}
    first = output.index(letters[0])
    sizes = [
        1 if c not in letters else kernel.shape[equation.kernel.index(c)] if c in equation.kernel else bias.shape[i]
        for i, c in enumerate(output)
    ]
    return {"kernel": kernel, "bias": np.broadcast_to(bias.reshape(bias.shape[first:]), sizes[first:]).copy()}


def _einsum_config(layer: Any, edits: Sequence[Edit]) -> Config:
    equation = _Equation.of(layer, layer.input_spec.ndim)
    letters = set(_bias_letters(layer, equation))
    for edit in edits:
        if edit.affine.is_scaling:
            continue
        if edit.side == "after":
            letters.add(equation.output[edit.axis])
        else:
            letters |= set(equation.kernel) - equation.contracted
    wanted = "".join(letter for letter in equation.output if letter in letters)
    return {} if wanted == _bias_letters(layer, equation) else {"bias_axes": wanted}


# --------------------------------------------------------------------------------------- Embedding, own affines


def _last_axis_after(at: Site, change: Change) -> Change | Refusal:
    axis = len(at.output) - 1
    return change.onto(axis, at.output[axis]) or _mismatch(at, change.axis)


def _lookup_weights(layer: Any, edits: Sequence[Edit]) -> Weights:
    table = _read(layer.embeddings)
    for edit in edits:
        table = table * edit.affine.scale + edit.affine.shift
    return {"embeddings": table}


def _normalised_axes(layer: Any, rank: int) -> tuple[int, ...]:
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    return tuple(axis % rank for axis in axes)


def _norm_after(at: Site, change: Change) -> Change | Refusal:
    layer, axes = at.layer, _normalised_axes(at.layer, at.rank)
    found = change if change.axis in axes else change.onto(axes[-1], at.output[axes[-1]])
    if found is None:
        return _mismatch(at, change.axis)
    if getattr(layer, "rms_scaling", False) and not found.is_scaling:
        return Refusal("unsupported_option", f"{at.name} uses rms_scaling and has no beta to take a shift")
    if layer.gamma is None and layer.beta is None and len(axes) > 1:
        return Refusal("unsupported_option", f"{at.name} has neither gamma nor beta and several axes")
    return found.on(axes.index(found.axis))  # the axis of gamma and beta


def _norm_weights(layer: Any, edits: Sequence[Edit]) -> Weights:
    own = layer.gamma if layer.gamma is not None else layer.beta
    shape = (edits[0].affine.channels,) if own is None else tuple(own.shape)
    gamma = np.ones(shape) if layer.gamma is None else _read(layer.gamma)
    beta = np.zeros(shape) if layer.beta is None else _read(layer.beta)
    for edit in edits:
        place = [-1 if axis == edit.axis else 1 for axis in range(len(shape))]
        scale, shift = edit.affine.scale.reshape(place), edit.affine.shift.reshape(place)
        gamma, beta = gamma * scale, beta * scale + shift
    config = _norm_config(layer, edits)
    weights = {"gamma": gamma} if layer.gamma is not None or "scale" in config else {}
    return {**weights, "beta": beta} if layer.beta is not None or "center" in config else weights


def _norm_config(layer: Any, edits: Sequence[Edit]) -> Config:
    config: Config = {}
    if layer.gamma is None and any((edit.affine.scale != 1).any() for edit in edits):
        config["scale"] = True
    if layer.beta is None and _shifts(edits):
        config["center"] = True
    return config


# -------------------------------------------------------------------------------------------- recurrent layers

_RECURRENT = (L.LSTM, L.GRU, L.SimpleRNN)


def _recurrent_before(at: Site, change: Change, port: int) -> Change | Refusal:
    sides = [at.layer]
    if isinstance(at.layer, L.Bidirectional):
        sides = [at.layer.forward_layer, at.layer.backward_layer]
    strange = next((type(side).__name__ for side in sides if type(side) not in _RECURRENT), None)
    if strange is not None:
        return Refusal("no_sink", f"{at.name} runs a {strange}, which cannot take an affine in front of it")
    found = change.onto(2, at.inputs[0][2])
    if found is None:
        return _mismatch(at, change.axis)
    return found if found.back is not None else Refusal("not_invertible", f"{at.name} cannot undo a scale of 0")


def _cells(layer: Any) -> list[tuple[str, Any]]:
    if isinstance(layer, L.Bidirectional):
        return [(f"{side}.cell.", getattr(layer, side).cell) for side in ("forward_layer", "backward_layer")]
    return [("cell.", layer.cell)]


def _recurrent_weights(layer: Any, edits: Sequence[Edit]) -> Weights:
    weights: dict[str, Float64] = {}
    for path, cell in _cells(layer):
        kernel = _read(cell.kernel)
        if cell.use_bias:
            bias = _read(cell.bias)
        else:  # a GRU that resets after the product has two
            bias = np.zeros((2, kernel.shape[1]) if getattr(cell, "reset_after", False) else kernel.shape[1])
        for edit in edits:
            seen = edit.affine.shift @ kernel
            bias = np.stack([bias[0] + seen, bias[1]]) if bias.ndim == 2 else bias + seen
            kernel = kernel * edit.affine.scale[:, None]
        weights |= {f"{path}kernel": kernel, f"{path}recurrent_kernel": _read(cell.recurrent_kernel)}
        if cell.use_bias or _shifts(edits):
            weights[f"{path}bias"] = bias
    return weights


def _recurrent_config(layer: Any, edits: Sequence[Edit]) -> Config:
    if not isinstance(layer, L.Bidirectional):
        return _bias_if_shifted(layer, edits)
    config: Config = {}
    for entry, inner in (("layer", layer.forward_layer), ("backward_layer", layer.backward_layer)):
        stored = layer.get_config().get(entry)
        if stored is not None and _bias_if_shifted(inner, edits):
            config[entry] = {**stored, "config": {**stored["config"], "use_bias": True}}
    return config


# --------------------------------------------------------------------------------------------------- attention

_ROLES = ("query", "value", "key")


def _attention_ports(at: Site) -> Mapping[int, tuple[str, ...]]:
    """Which projections each input feeds; without a key the values are the keys."""
    refs = dict(zip(_ROLES, at.node.args, strict=False))
    refs |= {role: at.node.kwargs[role] for role in _ROLES if role in at.node.kwargs}
    if refs.get("key") is None:
        refs["key"] = refs["value"]
    ports: dict[int, tuple[str, ...]] = {}
    for role, ref in refs.items():
        if role in _ROLES:
            port = at.node.inputs.index(ref.index)
            ports[port] = (*ports.get(port, ()), role)
    return ports


def _attention_before(at: Site, change: Change, port: int) -> Change | Refusal:
    axis = len(at.inputs[port]) - 1
    found = change.onto(axis, at.inputs[port][axis])
    if found is None:
        return _mismatch(at, change.axis)
    return found if found.back is not None else Refusal("not_invertible", f"{at.name} cannot undo a scale of 0")


def _attention_weights(layer: Any, edits: Sequence[Edit]) -> Weights:
    weights: dict[str, Float64] = {}
    for role in (*_ROLES, "output"):
        dense = getattr(layer, f"{role}_dense")
        equation = _Equation.of(dense, dense.input_spec.ndim)
        ends = {"before": dense.input_spec.ndim - 1, "after": len(equation.output) - 1}
        seen = [edit for edit in edits if role in edit.roles or (edit.side == "after" and role == "output")]
        given = _einsum_weights(dense, [replace(edit, axis=ends[edit.side]) for edit in seen])
        if "bias" not in given and _bias_if_shifted(layer, edits):  # all four projections get one, or none
            made = [c for c in equation.output if c not in equation.inputs]
            sizes = [given["kernel"].shape[equation.kernel.index(c)] for c in made]
            given = {**given, "bias": np.zeros(sizes)}
        weights |= {f"{role}_dense.{name}": value for name, value in given.items()}
    return weights


# ------------------------------------------------------------------------------------------------------- table

_PRODUCT = Sink(_product_after, _product_before, _product_weights, _bias_if_shifted)
_NORM = Sink(_norm_after, None, _norm_weights, _norm_config)
_RNN = Sink(None, _recurrent_before, _recurrent_weights, _recurrent_config, several=True)  # a mask, initial states

SINKS: Mapping[type | str, Sink] = {
    **dict.fromkeys(CHANNELS, _PRODUCT),
    L.EinsumDense: Sink(_einsum_after, _einsum_before, _einsum_weights, _einsum_config),
    L.Embedding: Sink(_last_axis_after, None, _lookup_weights, lambda layer, edits: {}),
    L.LayerNormalization: _NORM,
    L.GroupNormalization: _NORM,
    L.LSTM: _RNN,
    L.GRU: _RNN,
    L.SimpleRNN: _RNN,
    L.Bidirectional: _RNN,
    L.MultiHeadAttention: Sink(
        _last_axis_after, _attention_before, _attention_weights, _bias_if_shifted, _attention_ports, several=True
    ),
}


def is_sink(at: Site) -> bool:
    return key(at.layer) in SINKS


def demand(at: Site, side: Side, change: Change, port: int = 0) -> Change | Refusal:
    """The change as the weights would take it on that side, or why the layer cannot absorb it exactly."""
    sink = SINKS[key(at.layer)]
    if at.node.training and type(at.layer) not in CHANNELS:
        return Refusal("training_mode", f"{at.name} is called with training=True")
    if side == "after":
        if sink.after is None:
            return Refusal("no_sink", f"{at.name} ({type(at.layer).__name__}) cannot take an affine behind it")
        if change.forth is None:
            return Refusal("not_invertible", f"{at.name} cannot undo a scale of 0")
        return sink.after(at, change)
    if sink.before is None or port not in ports(at):
        return Refusal("no_sink", f"{at.name} ({type(at.layer).__name__}) cannot take an affine in front of it")
    return sink.before(at, change, port)


def ports(at: Site) -> Mapping[int, tuple[str, ...]]:
    """The inputs by which an affine may come in, and the parts of the layer that see each."""
    return SINKS[key(at.layer)].ports(at)


def takes_several(at: Site) -> bool:
    return SINKS[key(at.layer)].several


def roles(at: Site, port: int) -> tuple[str, ...]:
    return ports(at)[port]


def rewritten(layer: Any, edits: Sequence[Edit]) -> Weights:
    """All weights of the layer, in float64 and keyed by path, after it has absorbed ``edits`` in their order."""
    return SINKS[type(layer)].weights(layer, edits)


def new_config(layer: Any, edits: Sequence[Edit]) -> Config:
    """Entries of the layer's config that change: a bias that is new, say."""
    return SINKS[type(layer)].config(layer, edits)
