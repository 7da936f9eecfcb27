"""Conduits: the layers a change of units may travel through. One row per class, with its law.

A law is said of affines, f(s·x + t) = s'·f(x) + t', and holds for both directions of a change (`Change.carried`).
Three kinds of rows:

    CONDUITS   one tensor in, one out: what stands in front of the layer determines what stands behind it
    MERGES     several tensors in: the layer relates all of them, and a rule lists the ways to make the others follow

For a linear merge out = Σ w_i·x_i in new units x_i' = s·x_i + t_i every branch must share the scale, and

    out' = s·out + Σ w_i·t_i

so a shift that comes in on one branch either leaves with the output or is taken back on another branch. That choice
is what lets the shift of a pre-activation disappear: the last convolution of a residual block takes it back.

For activations with f(s·x) = s·f(x), s >= 0 (ReLU and its kin) only scales travel; maxima pass shifts too.

Zero padding puts p = 0 where the new units want forth(p): an exact fold needs that to be one number for all channels,
and then an explicit constant pad holds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from deploykit.affine import Affine
from deploykit.fuse.change import Change, Site, Travelled, unit
from deploykit.fuse.reasons import Refusal
from deploykit.graph import key

L = keras.layers
Law = Callable[[Site, Change, bool], Change | Refusal]  # site, change on one side, True when that side is the input
Float64 = npt.NDArray[np.float64]


# ------------------------------------------------------------------------------------------- one in, one out


def _same(at: Site, change: Change, forward: bool) -> Change | Refusal:
    return change


def _channelwise(at: Site, change: Change, forward: bool) -> Change | Refusal:
    """Windows along the other axes: the affine must be along the layer's channels."""
    found = change.onto(at.channel_axis, at.inputs[0][at.channel_axis])
    return found or Refusal("axis_mismatch", f"{at.name} works along the affine's axis {change.axis}")


def _global(at: Site, change: Change, forward: bool) -> Change | Refusal:
    inside, outside = at.channel_axis, at.channel_axis if at.layer.keepdims else 1
    here, there = (inside, outside) if forward else (outside, inside)
    found = change.onto(here, at.inputs[0][inside])
    if found is None:
        return Refusal("axis_mismatch", f"{at.name} pools along the affine's axis {change.axis}")
    return found.on(there)


def _rising(law: Law) -> Law:
    """max(s·x + t) = s·max(x) + t for s >= 0."""

    def rule(at: Site, change: Change, forward: bool) -> Change | Refusal:
        if not change.keeps_order:
            return negative(at.name, change.affine)
        return law(at, change, forward)

    return rule


def _homogeneous(at: Site, change: Change, forward: bool) -> Change | Refusal:
    """f(s·x) = s·f(x) for s >= 0."""
    if not change.is_scaling:
        return Refusal("nonlinear", f"{at.name} passes no shift (of up to {change.affine.largest_shift:.3g})")
    return change if change.keeps_order else negative(at.name, change.affine)


def negative(name: str, affine: Affine) -> Refusal:
    """The refusal of a layer that needs scales of one sign: says which channels have the other."""
    where = np.flatnonzero(affine.scale < 0)
    first = ", ".join(map(str, where[:4])) + (", ..." if len(where) > 4 else "")
    return Refusal("negative_scale", f"{name} turns round {len(where)} of {affine.channels} channels (channel {first})")


# activations with f(s·x) = s·f(x) for s >= 0
HOMOGENEOUS = (keras.activations.relu, keras.activations.leaky_relu)


def activation_name(layer: Any) -> str:
    activation = getattr(layer, "activation", None)
    return getattr(activation, "__name__", str(activation))


def _activation(at: Site, change: Change, forward: bool) -> Change | Refusal:
    if at.layer.activation is keras.activations.linear:
        return change
    if at.layer.activation in HOMOGENEOUS:
        return _homogeneous(at, change, forward)
    return Refusal("nonlinear", f"{at.name} is a {activation_name(at.layer)}, which an affine cannot pass")


def _relu(at: Site, change: Change, forward: bool) -> Change | Refusal:
    layer = at.layer
    if layer.max_value is not None or layer.threshold:
        what = f"max_value={layer.max_value}" if layer.max_value is not None else f"threshold={layer.threshold}"
        return Refusal("nonlinear", f"{at.name} has {what}, which no scale passes")
    return _homogeneous(at, change, forward)


def _rearranged(at: Site, change: Change, forward: bool) -> Change | Refusal:
    """Flatten, Reshape, Permute: an affine stays an affine of every element; is it one per channel afterwards?"""
    shape, result = at.inputs[0][1:], at.output[1:]
    if isinstance(at.layer, L.Permute):  # the axis goes where the layer says, whatever the sizes
        there = [0, *at.layer.dims]  # axis i of the result is axis there[i] of the input
        return change.on(there.index(change.axis) if forward else there[change.axis])
    sizes, wanted = ([s for s in shape if s is not None], [s for s in result if s is not None])
    if len(sizes) < len(shape) or len(wanted) < len(result):
        return Refusal("unknown_size", f"{at.name} moves elements of a size that is not known")
    # Keras moves the channels behind before it flattens
    turned = isinstance(at.layer, L.Flatten) and at.layer.data_format == "channels_first" and len(sizes) > 1
    middle = (*sizes[1:], sizes[0]) if turned else tuple(sizes)

    def move(values: Float64) -> Float64:
        if forward:
            return (np.moveaxis(values, 0, -1) if turned else values).reshape(wanted)
        return np.moveaxis(values.reshape(middle), -1, 0) if turned else values.reshape(middle)

    def law(axis: int, affine: Affine) -> Travelled:
        spread = affine.spread(tuple(sizes) if forward else tuple(wanted), axis - 1)
        scale, shift = (move(v.reshape(sizes if forward else wanted)) for v in (spread.scale, spread.shift))
        flat = Affine(scale.ravel(), shift.ravel())
        order = [at.channel_axis - 1, *range(scale.ndim)] if not forward else range(scale.ndim - 1, -1, -1)
        for candidate in order:  # the axis along which alone it varies
            gathered = flat.gathered(scale.shape, candidate)
            if gathered is not None:
                return candidate + 1, gathered
        return Refusal("axis_mismatch", f"the affine differs by position on the other side of {at.name}")

    return change.carried(law)


def _widths(at: Site) -> tuple[tuple[int, int], ...]:
    """(before, after) per axis of keras.ops.pad."""
    widths = tuple((int(low), int(high)) for low, high in at.layer.pad_width)
    return widths * at.rank if len(widths) == 1 else widths


def _around(at: Site, change: Change, forward: bool) -> Change | Refusal:
    if any(_widths(at)[change.axis]):
        return Refusal("axis_mismatch", f"{at.name} pads along the affine's axis {change.axis}")
    return change


@dataclass(frozen=True)
class Conduit:
    """``law`` carries a change over the layer; ``masks``: a mask does not change what the layer does to values."""

    law: Law
    masks: bool = True
    pads: bool = False  # puts a constant around its input, which must follow the change


_IDENTITY = Conduit(_same)  # f(x) = x at inference
_MEAN = Conduit(_global, masks=False)  # mean(s·x + t) = s·mean(x) + t
_MAX = Conduit(_rising(_global), masks=False)  # max(s·x + t) = s·max(x) + t
_WINDOW_MEAN = Conduit(_channelwise)  # TensorFlow leaves padding out of the mean
_WINDOW_MAX = Conduit(_rising(_channelwise))  # ... and out of the maximum
_MOVED = Conduit(_channelwise)  # repeats, leaves out or mixes elements of a channel with weights that sum to 1
_PADDED = Conduit(_channelwise, pads=True)  # exact where the pad value can follow
_HOMOGENEOUS = Conduit(_homogeneous)  # f(s·x) = s·f(x) for s >= 0

CONDUITS: Mapping[type | str, Conduit] = {
    L.Dropout: _IDENTITY,
    L.SpatialDropout1D: _IDENTITY,
    L.SpatialDropout2D: _IDENTITY,
    L.SpatialDropout3D: _IDENTITY,
    L.AlphaDropout: _IDENTITY,
    L.GaussianDropout: _IDENTITY,
    L.GaussianNoise: _IDENTITY,
    L.ActivityRegularization: _IDENTITY,
    L.Identity: _IDENTITY,
    L.Activation: Conduit(_activation),
    L.ReLU: Conduit(_relu),  # with neither max_value nor threshold
    L.LeakyReLU: _HOMOGENEOUS,
    L.PReLU: _HOMOGENEOUS,  # its slopes are per element and do not change
    "Relu": _HOMOGENEOUS,  # keras.ops.relu in the graph
    L.Flatten: Conduit(_rearranged, masks=False),
    L.Reshape: Conduit(_rearranged, masks=False),
    L.Permute: Conduit(_rearranged, masks=False),
    L.GlobalAveragePooling1D: _MEAN,
    L.GlobalAveragePooling2D: _MEAN,
    L.GlobalAveragePooling3D: _MEAN,
    L.GlobalMaxPooling1D: _MAX,
    L.GlobalMaxPooling2D: _MAX,
    L.GlobalMaxPooling3D: _MAX,
    L.AveragePooling1D: _WINDOW_MEAN,
    L.AveragePooling2D: _WINDOW_MEAN,
    L.AveragePooling3D: _WINDOW_MEAN,
    L.MaxPooling1D: _WINDOW_MAX,
    L.MaxPooling2D: _WINDOW_MAX,
    L.MaxPooling3D: _WINDOW_MAX,
    L.UpSampling1D: _MOVED,
    L.UpSampling2D: _MOVED,
    L.UpSampling3D: _MOVED,
    L.Cropping1D: _MOVED,
    L.Cropping2D: _MOVED,
    L.Cropping3D: _MOVED,
    L.ZeroPadding1D: _PADDED,
    L.ZeroPadding2D: _PADDED,
    L.ZeroPadding3D: _PADDED,
    "Pad": Conduit(_around, pads=True),  # keras.ops.pad
}


def travel(at: Site, change: Change, *, forward: bool) -> Change | Refusal:
    """Carry a change over a conduit, from its input (forward) or from its output."""
    conduit = CONDUITS[key(at.layer)]
    if at.node.training:
        return Refusal("training_mode", f"{at.name} is called with training=True")
    if at.masked and not conduit.masks:
        return Refusal("mask", f"{at.name} sees a mask")
    return conduit.law(at, change, forward)


def pads_constant(at: Site) -> bool:
    """Whether a layer puts a constant around its input; what repeats or mirrors the edge follows by itself."""
    return CONDUITS[key(at.layer)].pads and getattr(at.layer, "mode", "constant") == "constant"


def padding_of(at: Site) -> tuple[tuple[tuple[int, int], ...], float]:
    """(before, after) per axis, batch included, and the value that a padding layer puts there."""
    if key(at.layer) == "Pad":
        value = at.node.kwargs.get("constant_values", at.node.args[1] if len(at.node.args) > 1 else None)
        return _widths(at), float(value or 0.0)
    given = at.layer.padding
    inner = [tuple(given)] if isinstance(at.layer, L.ZeroPadding1D) else [tuple(pair) for pair in given]
    around = [(int(low), int(high)) for low, high in inner]
    first = 2 if at.channel_axis == 1 else 1
    return ((0, 0),) * first + tuple(around) + ((0, 0),) * (at.rank - first - len(around)), 0.0


def pad_value(at: Site) -> float:
    """What stands around the input of a layer that pads it, as things are now."""
    if at.pad is not None:
        return at.pad
    return padding_of(at)[1] if key(at.layer) in CONDUITS else 0.0  # padding="same" and "causal" of a convolution


def new_padding(at: Site, change: Change) -> float | Refusal:
    """What the constant around the input becomes: forth of it, if that is one number for all channels."""
    value = pad_value(at)
    if change.forth is None:
        return Refusal("padded_shift", f"the padding of {at.name} would have to undo a scale of 0")
    new = change.forth.scale * value + change.forth.shift
    if float(np.ptp(new)) > 4 * np.finfo(np.float64).eps * float(np.abs(new).max()):
        stands = (
            "channels are scaled apart" if change.is_scaling else f"a shift of up to {_largest_back(change):.3g} stands"
        )
        return Refusal("padded_shift", f"{at.name} pads with {value:.3g} where {stands}")
    return float(new[0])


def _largest_back(change: Change) -> float:
    return change.affine.largest_shift if change.back is None else change.back.largest_shift


# ----------------------------------------------------------------------------------------- several in, one out


@dataclass(frozen=True, eq=False)
class Ports:
    """What is known of the changes around a merge: one entry per tensor going in, and the one coming out.

    ``nearest``: the inputs, that which was made last first: the shorter ways to a sink.
    """

    inputs: tuple[Change | None, ...]
    output: Change | None
    nearest: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Option:
    """One way to make a merge consistent: the changes that its other tensors must take."""

    inputs: Mapping[int, Change]
    output: Change | None = None


Merge = Callable[[Site, Ports], Sequence[Option] | Refusal]


def _aligned(at: Site, ports: Ports) -> tuple[int, int, list[Affine | None], Affine | None] | Refusal:
    """(axis, channels, forth of every known input, forth of the output), all along one axis."""
    known = [change for change in (*ports.inputs, ports.output) if change is not None]
    axis = next((change.axis for change in known if not change.affine.is_uniform), known[0].axis)
    channels = at.output[axis]
    if any(len(shape) != len(at.output) for shape in at.inputs):
        return Refusal("axis_mismatch", f"{at.name} merges tensors of different rank")
    if channels is None:
        return Refusal("unknown_size", f"{at.name} has an axis {axis} of unknown size")
    forths: list[Affine | None] = []
    for change, shape in zip((*ports.inputs, ports.output), (*at.inputs, at.output), strict=True):
        if change is None:
            forths.append(None)
            continue
        moved = change.onto(axis, channels)
        if moved is None or shape[axis] != channels:
            return Refusal("axis_mismatch", f"{at.name} repeats a tensor along the affine's axis")
        if moved.forth is None:
            return Refusal("not_invertible", f"a scale of 0 cannot be undone on the other branches of {at.name}")
        forths.append(moved.forth)
    return axis, channels, forths[:-1], forths[-1]


def _able(at: Site, axis: int, channels: int, ports: Ports) -> list[int]:
    """The inputs that could still change and have all the channels themselves, nearest first."""
    return [i for i in ports.nearest if ports.inputs[i] is None and at.inputs[i][axis] == channels]


def _linear(weights: Callable[[int], Sequence[float]]) -> Merge:
    """out = Σ w_i·x_i. A change is a scale or a shift here, never both (`deploykit.fuse.plan`)."""

    def rule(at: Site, ports: Ports) -> Sequence[Option] | Refusal:
        aligned = _aligned(at, ports)
        if isinstance(aligned, Refusal):
            return aligned
        axis, channels, ins, out = aligned
        unknown = [port for port, forth in enumerate(ins) if forth is None]
        able = _able(at, axis, channels, ports)
        known = [forth for forth in (*ins, out) if forth is not None]
        scale = next((forth for forth in known if not (forth.scale == 1).all()), None)
        if scale is not None:  # which every tensor has to share
            if not all(forth.is_close(scale) for forth in known):
                return Refusal("conflict", f"the branches of {at.name} would be scaled differently")
            if len(able) < len(unknown):
                return Refusal("axis_mismatch", f"{at.name} repeats a tensor along the affine's axis")
            shared = Change.to(axis, scale)
            return [Option(dict.fromkeys(unknown, shared), None if out else shared)]

        def shifted(shift: Float64) -> Change:
            return Change.to(axis, Affine(np.ones(channels), shift))

        w = weights(len(ins))
        arriving = sum((w[i] * forth.shift for i, forth in enumerate(ins) if forth is not None), np.zeros(channels))
        missing = -arriving if out is None else out.shift - arriving
        if float(np.abs(missing).max()) <= 1e-14 * max(forth.largest_shift for forth in known):
            return [Option({})]
        back = [Option({port: shifted(missing / w[port])}) for port in able]
        if out is None:  # taken back on another branch, which is the shorter way, or passed on
            return [*back, Option({}, shifted(-missing))]
        if len(able) > 1 and len(able) == len(unknown) and np.sum(w) != 0:  # or each takes a share
            share = shifted(missing / sum(w[port] for port in unknown))
            back.append(Option(dict.fromkeys(unknown, share)))
        return back or Refusal("conflict", f"nothing in front of {at.name} is left to take the shift")

    return rule


def _product(at: Site, ports: Ports) -> Sequence[Option] | Refusal:
    """out = Π x_i: scales multiply, no shift passes. With masks the layer puts 1 where a factor is masked."""
    if at.masked and key(at.layer) is L.Multiply:
        return Refusal("mask", f"{at.name} puts 1 in the place of what is masked")
    aligned = _aligned(at, ports)
    if isinstance(aligned, Refusal):
        return aligned
    axis, channels, ins, out = aligned
    known = [forth for forth in (*ins, out) if forth is not None]
    if not all(forth.is_scaling for forth in known):
        shift = max(forth.largest_shift for forth in known)
        return Refusal("nonlinear", f"{at.name} passes no shift (of up to {shift:.3g})")
    arriving = np.prod([forth.scale for forth in ins if forth is not None], axis=0, initial=1.0) * np.ones(channels)
    able = _able(at, axis, channels, ports)

    def scaled(scale: Float64) -> Change:
        return Change.to(axis, Affine(scale, np.zeros(channels)))

    if out is None:
        back = [Option({port: scaled(1 / arriving)}) for port in able] if arriving.all() else []
        return [Option({}, scaled(arriving)), *back]
    if not arriving.all():
        return Refusal("not_invertible", f"a scale of 0 cannot be undone on the other branches of {at.name}")
    missing = out.scale / arriving
    if Affine(missing, np.zeros(channels)).is_close(unit(channels)):
        return [Option({})]
    if not able:
        return Refusal("conflict", f"nothing in front of {at.name} is left to take the scale")
    return [Option({port: scaled(missing)}) for port in able]


def _concatenated(at: Site, ports: Ports) -> Sequence[Option] | Refusal:
    """Along the affine's axis every branch has its own range; along another one all share the affine."""
    along = at.layer.axis % len(at.output)
    known = [change for change in (*ports.inputs, ports.output) if change is not None]
    ends_here = along if along == len(at.output) - 1 else known[0].axis  # where a uniform one is best taken along
    axis = next((change.axis for change in known if not change.affine.is_uniform), ends_here)
    sizes = [shape[axis] for shape in at.inputs]
    moved: list[Change | None] = []
    for change, size in zip((*ports.inputs, ports.output), (*sizes, at.output[axis]), strict=True):
        found = change and change.onto(axis, size)
        if change is not None and found is None:
            return Refusal("axis_mismatch", f"the branches of {at.name} change along different axes")
        moved.append(found)
    ins, out = moved[:-1], moved[-1]
    if along != axis:
        one = next(change for change in moved if change is not None)
        if not all(change is None or change.agrees(one) for change in moved):
            return Refusal("conflict", f"the branches of {at.name} would change differently")
        return [Option({i: one for i, change in enumerate(ins) if change is None}, None if out else one)]
    if any(size is None for size in sizes):
        return Refusal("unknown_size", f"{at.name} joins tensors of unknown size")
    lengths = [int(size) for size in sizes if size is not None]
    ends = np.cumsum([0, *lengths])
    if out is not None:
        pieces = [_piece(out, ends[i], ends[i + 1]) for i in range(len(lengths))]
        for piece, change in zip(pieces, ins, strict=True):
            if change is not None and not piece.agrees(change):
                return Refusal("conflict", f"the branches of {at.name} would change differently")
        return [Option({i: p for i, p in enumerate(pieces) if ins[i] is None and not p.is_identity})]
    parts = [change or Change.to(axis, unit(size)) for change, size in zip(ins, lengths, strict=True)]
    forths, backs = [part.forth for part in parts], [part.back for part in parts]
    return [Option({}, Change(axis, _joined(forths), _joined(backs)))]


def _piece(change: Change, low: int, high: int) -> Change:
    cut = (side and Affine(side.scale[low:high], side.shift[low:high]) for side in (change.forth, change.back))
    forth, back = cut
    # a range without a zero has a way back even where the whole has none
    if forth is not None and back is None:
        back = forth.inverse()
    if back is not None and forth is None:
        forth = back.inverse()
    return Change(change.axis, forth, back)


def _joined(parts: Sequence[Affine | None]) -> Affine | None:
    whole = [part for part in parts if part is not None]
    if len(whole) < len(parts):
        return None
    return Affine(np.concatenate([part.scale for part in whole]), np.concatenate([part.shift for part in whole]))


_SUM = _linear(lambda n: [1.0] * n)
_DIFFERENCE = _linear(lambda n: [1.0, -1.0])

MERGES: Mapping[type | str, Merge] = {
    L.Add: _SUM,
    L.Average: _linear(lambda n: [1.0 / n] * n),
    L.Subtract: _DIFFERENCE,
    L.Multiply: _product,
    L.Concatenate: _concatenated,
    "Add": _SUM,  # x + y as a plain operation
    "Subtract": _DIFFERENCE,
    "Multiply": _product,
}


def is_conduit(at: Site) -> bool:
    return key(at.layer) in CONDUITS


def is_merge(at: Site) -> bool:
    return key(at.layer) in MERGES


def same_padding(at: Site) -> tuple[tuple[int, int], ...] | Refusal:
    """What padding='same' or 'causal' puts around a convolution's input, per axis, batch included."""
    layer, shape = at.layer, at.inputs[0]
    first = 2 if at.channel_axis == 1 else 1
    widths = [(0, 0)] * len(shape)
    windows = zip(layer.kernel_size, layer.strides, layer.dilation_rate, strict=True)
    for axis, (kernel, stride, dilation) in enumerate(windows, start=first):
        reach = (kernel - 1) * dilation + 1
        size = shape[axis]
        if layer.padding == "causal":
            widths[axis] = (reach - 1, 0)
        elif layer.padding == "same":
            if size is None and stride > 1 and reach > 1:
                return Refusal("unknown_size", f"how far padding='same' of {at.name} reaches depends on the input")
            total = reach - 1 if size is None else max(0, (math.ceil(size / stride) - 1) * stride + reach - size)
            widths[axis] = (total // 2, total - total // 2)
    return tuple(widths)
