"""Arrays of older files into the weights of Keras 3 layers.

Two layouts: HDF5 files keep, for each layer of the outermost model, a list of named arrays in the order of
``layer.weights`` (trainable ones first, those of all layers inside a nested model too); archives of tf-keras keep a
tree of attributes, ``layers/conv2d_1/vars/0``, in which layers are counted by class.

What was laid out otherwise is changed by law, per class:

    CuDNNLSTM, CuDNNGRU    each gate's kernel is stored by columns, recurrent kernels are transposed, and there are two
                           biases: an LSTM adds them, a GRU with reset_after keeps both
    Theano                 convolves where others correlate: kernels are rotated by 180 degrees
    pruned layers          kernel·mask is what the layer applied
    spectral normalization its estimate of the norm is left out: the kernel is stored as it is applied
    hard_sigmoid           the factor 1.2 of `config.STEEPER`, gate by gate

Order and layout are checked, not assumed: every array has the shape of its weight, its recorded name is of the same
kind ("kernel", "gamma", ...), and nothing is left over on either side.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import h5py
import keras
import numpy as np
import numpy.typing as npt

from deploykit.errors import LoadError, UnsupportedModelError
from deploykit.load.contents import printable, text_of
from deploykit.load.legacy import keras1
from deploykit.load.legacy.config import MODELS, PRUNED, SPECTRAL, STEEPER, modern_name, unused

L = keras.layers
Array = npt.NDArray[Any]
Order = Mapping[str, "Order"]  # the layers of a model in the order of its description -> those of the model inside
NO_ORDER: Order = {}

ALIASES = {  # kinds of weights under their old names
    "depthwise_kernel": "kernel",  # of a DepthwiseConv; a SeparableConv says the same in both
    "running_mean": "moving_mean",
    "running_std": "moving_variance",
    "w": "kernel",
    "u": "recurrent_kernel",
    "b": "bias",
    "alphas": "alpha",
}
EXCESS, EXCESS_FLOOR = 4, 1 << 24  # masks of pruned layers, layers on which no output depends
PRUNING = ("mask", "threshold", "pruning_step")
ESTIMATE = "vector_u"  # of the largest singular value, from which spectral normalization goes on in training


@dataclass(frozen=True)
class Stored:
    """An array of a file and what the file calls it: ``conv2d_1/kernel:0``, or None."""

    name: str | None
    value: Array
    origin: str = ""  # the dataset of an archive

    @property
    def place(self) -> str:
        """``conv2d_1`` of ``conv2d_1/kernel:0``."""
        return (self.name or "").rpartition("/")[0]

    @property
    def kind(self) -> str | None:
        """``kernel`` of ``block1/conv_1/kernel_1:0``."""
        if self.name is None:
            return None
        last = re.sub(r"(_\d+)?(:\d+)?$", "", self.name.rpartition("/")[2].lower())
        return ALIASES.get(last, last)


# ------------------------------------------------------------------------------------------------- the laws


def _gates(kernel: Array, count: int, change: Callable[[Array], Array]) -> Array:
    return np.concatenate([change(gate) for gate in np.split(kernel, count, axis=-1)], axis=-1)


def _from_cudnn(arrays: list[Array], gates: int) -> list[Array]:
    kernel, recurrent, bias = arrays
    return [
        _gates(kernel, gates, lambda gate: gate.T.reshape(gate.shape, order="F")),
        _gates(recurrent, gates, lambda gate: gate.T),
        np.split(bias, 2)[0] + np.split(bias, 2)[1] if gates == 4 else bias.reshape(2, -1),
    ]


def _rotated(kernel: Array, ranks: int) -> Array:
    return np.flip(kernel, axis=tuple(range(ranks)))


GATES = {L.LSTM: 4, L.GRU: 3}
CONVOLUTIONAL_CELLS = (L.ConvLSTM1D, L.ConvLSTM2D, L.ConvLSTM3D)  # the recurrent kernel is one too
CONVOLUTIONS = (
    *(L.Conv1D, L.Conv2D, L.Conv3D, L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose),
    *(L.DepthwiseConv1D, L.DepthwiseConv2D, *CONVOLUTIONAL_CELLS),
    *(L.SeparableConv1D, L.SeparableConv2D),
)


def _steeper(layer: Any, arrays: list[Array]) -> list[Array]:
    """Weights in front of a hard_sigmoid, for which Keras 3 has another slope."""
    for (kind, key), factors in STEEPER.items():
        if type(layer).__name__ == kind and getattr(layer, key, None) is keras.activations.hard_sigmoid:
            pointwise = isinstance(layer, (L.SeparableConv1D, L.SeparableConv2D))
            return [
                array if pointwise and number == 0 else _scaled(array, factors) for number, array in enumerate(arrays)
            ]
    return arrays


def steepen(model: keras.Model) -> None:
    """Apply the factor of hard_sigmoid to weights that were filled in as they are stored."""
    for leaf in dict.fromkeys(leaves(model)):
        before = [np.asarray(weight.value) for weight in leaf.weights]
        for weight, old, new in zip(leaf.weights, before, _steeper(leaf, before), strict=True):
            if new is not old:
                weight.assign(new)


def _scaled(array: Array, factors: Sequence[float]) -> Array:
    repeated = np.repeat(np.asarray(factors), array.shape[-1] // len(factors)) if len(factors) > 1 else factors[0]
    return (array.astype(np.float64) * repeated).astype(array.dtype)


def _unpruned(stored: Sequence[Stored]) -> list[Stored]:
    """What a pruning wrapper applied: weights times their masks, which are told by shape and, if need be, by name.

    Raises ValueError where they cannot be told.
    """
    masks = [array for array in stored if array.kind == "mask"]
    kept = []
    for array in (array for array in stored if array.kind not in PRUNING):
        fitting = [mask for mask in masks if mask.value.shape == array.value.shape]
        alike = [other for other in stored if other.kind not in PRUNING and other.value.shape == array.value.shape]
        if len(alike) > 1:
            fitting = [mask for mask in fitting if mask.place == array.place]
        if len(fitting) > 1 or (len(alike) > 1 and not fitting and masks):
            raise ValueError("masks of pruning that cannot be told apart")
        kept.append(replace(array, value=array.value * fitting[0].value) if fitting else array)
    return kept


# -------------------------------------------------------------------------------------------- into a layer


def leaves(layer: Any, order: Order = NO_ORDER) -> list[Any]:
    """The layers inside that have weights of their own, in the order in which older generations list them.

    ``order``: that of the layers in models inside. Keras 3 sorts them by depth, which a translation may change.
    """
    if isinstance(layer, keras.Model):
        turn = {name: number for number, name in enumerate(order)}
        parts = sorted(layer.layers, key=lambda inner: turn.get(inner.name, 0))
        return [leaf for inner in parts for leaf in leaves(inner, order.get(inner.name, NO_ORDER))]
    if isinstance(layer, L.Bidirectional):
        return [*leaves(layer.forward_layer), *leaves(layer.backward_layer)]
    if isinstance(layer, L.TimeDistributed):
        return leaves(layer.layer, order)
    if type(layer) is L.RNN:
        return leaves(layer.cell)
    if isinstance(layer, L.StackedRNNCells):
        return [leaf for cell in layer.cells for leaf in leaves(cell)]
    return [layer]


def in_order(layer: Any, order: Order = NO_ORDER) -> list[tuple[Any, Any]]:
    """(leaf, weight) in the order of an HDF5 file: all trainable ones, then the others."""
    pairs = [(leaf, weight) for leaf in leaves(layer, order) for weight in leaf.weights]
    frozen = {id(weight) for weight in layer.non_trainable_weights}
    return [pair for pair in pairs if id(pair[1]) not in frozen] + [pair for pair in pairs if id(pair[1]) in frozen]


class Filler:
    """Gives the layers of one model their arrays, and says what it changed."""

    def __init__(self, what: str, backend: str | None = None, *, modern: bool = False) -> None:
        self.what = what
        self.theano = backend == "theano"
        self.modern = modern  # saved by Keras 3, for its own functions
        self.notices: list[str] = []

    def misfit(self, layer: Any, why: str) -> LoadError:
        return LoadError(f"{self.what}: the weights of layer {printable(layer.name)} do not fit ({why}); is it intact?")

    def fill(self, layer: Any, stored: Sequence[Stored], order: Order = NO_ORDER, *, pruned: bool = False) -> None:
        """All weights of a layer of the model, in the order of `in_order`."""
        pairs = in_order(layer, order)
        try:
            stored = _unpruned(stored) if pruned else [array for array in stored if array.kind != ESTIMATE]
        except ValueError as error:
            raise self.misfit(layer, str(error)) from error
        if len(pairs) != len(stored):
            raise self.misfit(layer, f"{len(stored)} arrays for {len(pairs)} weights")
        gathered: dict[int, tuple[Any, list[tuple[Any, Stored]]]] = {}
        for (leaf, weight), array in zip(pairs, stored, strict=True):
            if array.kind not in (None, self.kind_of(weight)):
                raise self.misfit(layer, f"{printable(str(array.name))} stands where its {weight.name} is expected")
            gathered.setdefault(id(leaf), (leaf, []))[1].append((weight, array))
        for leaf, given in gathered.values():
            self.assign(leaf, [weight for weight, _ in given], [array.value for _, array in given])

    @staticmethod
    def kind_of(weight: Any) -> str:
        name = str(weight.name)
        return ALIASES.get(name, name)

    def assign(self, leaf: Any, weights: Sequence[Any], arrays: list[Array]) -> None:
        gates = GATES.get(type(leaf))
        if gates is not None and len(arrays) == 3 and arrays[2].shape == (2 * gates * leaf.units,):  # two biases
            arrays = _from_cudnn(arrays, gates)
        if self.theano and isinstance(leaf, CONVOLUTIONS):
            kernels = 2 if isinstance(leaf, CONVOLUTIONAL_CELLS) else 1
            rotated = [_rotated(kernel, len(leaf.kernel_size)) for kernel in arrays[:kernels]]
            arrays = [*rotated, *arrays[kernels:]]
            self.notices.append("saved on Theano: its convolution kernels are rotated by 180 degrees")
        arrays = arrays if self.modern else _steeper(leaf, arrays)
        for weight, array in zip(weights, arrays, strict=True):
            if tuple(weight.shape) != array.shape:
                raise self.misfit(leaf, f"{weight.name} has the shape {tuple(weight.shape)}, the file {array.shape}")
            weight.assign(array)
        if isinstance(leaf, L.Normalization):
            leaf.finalize_state()


# ---------------------------------------------------------------------------------------------------- HDF5


def _strings(group: Any, name: str) -> list[str]:
    """A list of strings in an attribute; long ones are cut into ``name0``, ``name1``, ..."""
    pieces = [group.attrs[name]] if name in group.attrs else []
    while not pieces or f"{name}{len(pieces)}" in group.attrs:
        key = f"{name}{len(pieces)}"
        if key not in group.attrs:
            break
        pieces.append(group.attrs[key])
    return [text_of(text) or "" for piece in pieces for text in piece]


def layer_order(entry: Mapping[str, Any]) -> Order:
    """The layers of a description in its own order, and of each those of the model inside."""
    inner = entry.get("config")
    if entry.get("class_name") not in MODELS:
        wrapped = inner.get("layer") if isinstance(inner, Mapping) else None
        return layer_order(wrapped) if isinstance(wrapped, Mapping) else NO_ORDER
    layers = inner.get("layers", ()) if isinstance(inner, Mapping) else inner or ()
    named = [(layer.get("name") or layer["config"].get("name"), layer) for layer in layers]
    return {modern_name(str(name)): layer_order(layer) for name, layer in named}


def stored_names(file: h5py.File) -> list[str]:
    """What a file calls its arrays."""
    groups = file.get("model_weights", file)
    return [weight for layer in _strings(groups, "layer_names") for weight in _strings(groups[layer], "weight_names")]


def _refuse_excess(groups: Any, names: Sequence[str], model: keras.Model, what: str) -> None:
    """Raise LoadError when far more is declared than the model holds, before any of it is read."""
    declared = sum(groups[name][weight].size for name in names for weight in _strings(groups[name], "weight_names"))
    held = sum(math.prod(weight.shape) for weight in model.weights)
    if declared > EXCESS * held + EXCESS_FLOOR:
        raise LoadError(f"{what} declares {declared} weights, its model has {held}; is it intact?")


def fill_hdf5(
    file: h5py.File,
    model: keras.Model,
    config: Mapping[str, Any] | None = None,
    *,
    what: str,
    backend: str | None,
    order: Order = NO_ORDER,
    generation: int = 2,
) -> list[str]:
    """Fill a model from the layer groups of an open, checked HDF5 file; returns notices. Raises LoadError.

    ``config``: the description in the same file, as Keras 2 has it; weights alone have none. ``generation``: the
    file's. Groups belong to layers by name, or in turn where the names are not the same (a net that was built again
    counts its layers on): ``order`` are the layers as the description lists them, which is not the order of Keras 3.
    """
    groups = file.get("model_weights", file)
    names = _strings(groups, "layer_names")
    _refuse_excess(groups, names, model, what)
    arrays = {
        name: [(weight, np.asarray(groups[name][weight])) for weight in _strings(groups[name], "weight_names")]
        for name in names
    }
    if "top_level_model_weights" in groups and _strings(groups["top_level_model_weights"], "weight_names"):
        raise UnsupportedModelError(f"{what} holds weights that belong to no layer; build the model from layers")
    version = text_of(groups.attrs.get("keras_version")) or text_of(file.attrs.get("keras_version")) or ""
    if generation == 1 and config is not None:
        laid_out = keras1.rearranged_file(config, arrays, what=what)
        found = {name: [Stored(None, array) for array in values] for name, values in laid_out.items()}
    else:
        found = {name: [Stored(weight, array) for weight, array in values] for name, values in arrays.items()}
    gone = unused(config) if config is not None else ()  # the model has no layers on which no output depends
    stored = {modern_name(name): values for name, values in found.items() if values and name not in gone}
    turn = {name: number for number, name in enumerate(order)}
    layers = sorted((layer for layer in model.layers if layer.weights), key=lambda layer: turn.get(layer.name, 0))
    filler = Filler(what, backend, modern=version.startswith("3."))
    by_name = {layer.name for layer in layers} == set(stored)
    if len(layers) != len(stored):
        raise LoadError(f"{what} has weights for {len(stored)} layers, its model has {len(layers)}; is it intact?")
    for layer, in_turn in zip(layers, stored.values(), strict=True):
        own = stored[layer.name] if by_name else in_turn
        within = order.get(layer.name, NO_ORDER)
        filler.fill(layer, own, within, pruned=any(array.kind == "pruning_step" for array in own))
    return list(dict.fromkeys(filler.notices))


# ----------------------------------------------------------------------------------------- tf-keras archives


def _snake(name: str) -> str:
    """How archives spell a class: ``PReLU`` -> ``p_re_lu``, ``Conv2D`` -> ``conv2d``."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def fill_archive(file: h5py.File, model: keras.Model, config: Mapping[str, Any], *, what: str) -> list[str]:
    """Fill a model from the ``model.weights.h5`` of a tf-keras archive; ``config`` is the archive's own description.

    Raises LoadError for arrays that do not fit, UnsupportedModelError for arrays that no layer of the model takes.
    """
    filler = Filler(what)
    left = {name for name in _arrays_in(file) if not TRAINING.intersection(name.split("/"))}
    for leaf, arrays, pruned in _archived(file, model, config):
        left -= {array.origin for array in arrays}
        if leaf is not None and (arrays or leaf.weights):
            filler.fill(leaf, arrays, pruned=pruned)
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise UnsupportedModelError(
            f"{what} holds weights that no layer of Keras 3 takes ({printable(min(left).lstrip('/'))}{more}); "
            "build the model from plain layers"
        )
    return list(dict.fromkeys(filler.notices))


def is_of_keras_3(file: h5py.File) -> bool:
    """Whether weights in the layout of archives were saved by Keras 3, which notes the name of each layer."""
    named: list[bool] = []
    file.visititems(lambda name, item: named.append("name" in item.attrs) if name.endswith("vars") else None)
    return any(named)


def _arrays_in(group: Any) -> list[str]:
    """The paths of all datasets in a group, None for no group, from the root of its file."""
    found: list[str] = []
    if group is not None:
        group.visititems(lambda _, item: found.append(item.name) if isinstance(item, h5py.Dataset) else None)
    return found


Entry = Mapping[str, Any]
Archived = Iterator[tuple[Any, list[Stored], bool]]

NOTHING = np.empty(0)
# Groups of what training and randomness keep.
TRAINING = frozenset(
    (
        *("optimizer", "_optimizer", "loss", "compiled_loss", "compiled_metrics", "metrics", "keras_metrics"),
        *("random_generator", "_random_generator", "seed_generator"),
    )
)
# What is inside a layer: attribute -> how the layer's config describes it.
INSIDE: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Entry]]] = {
    "Bidirectional": lambda c: {"forward_layer": c["layer"], "backward_layer": c.get("backward_layer") or c["layer"]},
    "TimeDistributed": lambda c: {"layer": c["layer"]},
    "RNN": lambda c: {"cell": c["cell"]},
}
PARTS: Mapping[type, tuple[str, ...]] = {  # groups that hold the arrays of one leaf
    **dict.fromkeys((L.LSTM, L.GRU, L.SimpleRNN, L.ConvLSTM1D, L.ConvLSTM2D, L.ConvLSTM3D), ("cell",)),
    L.MultiHeadAttention: ("_query_dense", "_key_dense", "_value_dense", "_output_dense"),
}


def _archived(group: Any, layer: Any, entry: Entry) -> Archived:
    """(layer, its arrays, whether it was pruned) for every leaf of a layer or model of the file.

    No layer: arrays that the model does without.
    """
    kind, config = entry["class_name"], entry["config"]
    if kind in MODELS:
        entries = config["layers"] if isinstance(config, Mapping) else config
        layers = {inner.name: inner for inner in layer.layers}
        pairs = [(layers.get(modern_name(inner.get("name") or inner["config"]["name"])), inner) for inner in entries]
        yield from _counted(group, "layers", pairs)
    elif kind == "StackedRNNCells":
        yield from _counted(group, "cells", list(zip(layer.cells, config["cells"], strict=True)))
    elif kind == PRUNED:
        for leaf, arrays, _ in _archived(_inside(group, "layer"), layer, config["layer"]):
            yield leaf, [*arrays, *_variables(group)], True
    elif kind == SPECTRAL:  # its own variables are the kernel once more and the estimate
        yield None, _variables(group), False
        yield from _archived(_inside(group, "layer"), layer, config["layer"])
    elif kind in INSIDE:
        for name, inner in INSIDE[kind](config).items():
            yield from _archived(_inside(group, name), getattr(layer, name), inner)
    else:
        groups = [_inside(group, part) for part in PARTS.get(type(layer), ())] or [group]
        yield layer, [array for part in groups for array in _variables(part)], False


def _counted(group: Any, container: str, pairs: Sequence[tuple[Any, Entry]]) -> Archived:
    """Members of a list are stored under their class, with a number from the second one on."""
    used: dict[str, int] = {}
    for layer, entry in pairs:
        spelled = _snake(entry["class_name"])
        count = used[spelled] = used.get(spelled, -1) + 1
        own = _inside(group, f"{container}/{spelled}_{count}" if count else f"{container}/{spelled}")
        if layer is not None:
            yield from _archived(own, layer, entry)
        else:  # an input or operation, or a layer on which no output depends
            yield None, [Stored(None, NOTHING, origin) for origin in _arrays_in(own)], False


def _inside(group: Any, name: str) -> Any:
    """A group in a group, None where either is missing."""
    return None if group is None else group.get(name)


def _variables(group: Any) -> list[Stored]:
    found = _inside(group, "vars")
    names = [] if found is None else sorted(found, key=int)
    return [Stored(None, np.asarray(found[name]), found[name].name) for name in names]
