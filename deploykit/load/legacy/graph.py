"""The normal form of a legacy description as a Keras 3 model: layers are made and called along the recorded graph.

A functional graph is a list of layers with their calls (``inbound_nodes``); a call names its inputs by
``[layer, call of it, output of that call]``. In all generations these are written alike, but for details:

- a call may be one reference, a list of them, or a nest (a dict of inputs); the fourth item of a reference holds the
  call's further arguments, in which tensors are references of three items;
- ``["_CONSTANT_VALUE", -1, value, ...]`` is a constant in place of a tensor;
- the calls of a nested model are counted from 1 (0 is its own making), but for a Sequential without an input from 0.
  What the references say decides; where they leave it open, that rule does;
- recurrent layers get their initial states as further inputs in the list, and with them their mask as an argument,
  which Keras 3 does not find there itself.

Limits: none on sizes; a description that refers to what is not there is damaged and refused in one line.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import tree
from keras.src.utils.python_utils import is_default

from deploykit.errors import LoadError, UnsupportedModelError
from deploykit.graph import inner_layers
from deploykit.load.contents import printable
from deploykit.load.legacy import operations
from deploykit.load.legacy.config import CONSTANT, is_reference, modern_name, references, version

Config = dict[str, Any]
Reference = tuple[str, int, int]

L = keras.layers
RECURRENT = (L.RNN, L.Bidirectional)
ACTIVATING = ("activation", "recurrent_activation")  # arguments that may hold a layer

_BN = L.BatchNormalization
_ELEMENTWISE = (L.Multiply, L.Minimum, L.Maximum)  # they put other values in the place of what is masked now
_MERGE = (L.Add, L.Subtract, L.Average, L.Concatenate, *_ELEMENTWISE)
_TOOK = (L.Identity, L.Rescaling, L.Normalization)  # masks, which they hand on now
_AT_RANDOM = ("keras.src.layers.regularization.", "keras.src.layers.preprocessing.")
_MASK_READERS = (
    *(L.RNN, L.Bidirectional, L.TimeDistributed, L.GlobalAveragePooling1D, L.Softmax),
    *(L.MultiHeadAttention, L.Attention, L.AdditiveAttention),
)


def _is_keras(layer: Any) -> bool:
    return type(layer).__module__.startswith("keras.src.")


def _builds(layer: Any) -> bool:
    """Whether a layer that was just made has weights to make yet."""
    return not layer.built and not is_default(layer.build)


def _random(layer: Any) -> bool:
    """Whether a layer does something at random in training."""
    return type(layer).__module__.startswith(_AT_RANDOM) and (
        hasattr(layer, "seed_generator") or hasattr(layer, "generator")
    )


def build(
    model: Mapping[str, Any],
    objects: Mapping[str, Any],
    *,
    what: str,
    safe_mode: bool = True,
    saved_by: str | None = None,
) -> keras.Model:
    """The Keras 3 model of a normal form, with fresh weights; ``objects`` are the user's own classes by name.

    Models are not frozen yet (`freeze`): that changes the order in which weights are listed. Raises LoadError where the
    graph does not hang together; what Keras says of a layer's arguments comes as it is.
    """
    return _Builder(objects, what, safe_mode, version(saved_by or "")).model(model)


def freeze(made: keras.Model, model: Mapping[str, Any]) -> None:
    """Freeze what the normal form says is frozen as a whole."""
    for entry in model["layers"]:
        if "nested" in entry:
            freeze(made.get_layer(entry["nested"]["name"]), entry["nested"])
    if not model["trainable"]:
        made.trainable = False


class _Builder:
    def __init__(self, objects: Mapping[str, Any], what: str, safe_mode: bool, saved_by: tuple[int, ...]) -> None:
        self.saved_by = saved_by
        self.doubtful: dict[int, str] = {}  # tensors that had a mask which they have not now -> the layer that made it
        self.named: set[int] = set()  # operations that make masks
        self.copies: dict[int, tuple[Any, Any]] = {}  # tensors with masks, and the same without
        self.maskless: dict[int, Any] = {}  # recurrent layers with states given that would miss a mask from outside
        self.untrained: dict[int, Any] = {}  # layers of which training cannot be seen; alive, or ids are used again
        self.objects = dict(objects)
        self.what = what
        self.safe_mode = safe_mode

    def damaged(self, why: str) -> LoadError:
        return LoadError(f"{self.what} is damaged: {why}; copy or save it again")

    # ------------------------------------------------------------------------------------------------ models

    def model(self, model: Mapping[str, Any]) -> keras.Model:
        return self.functional(model) if model["model"] == "Functional" else self.sequential(model)

    def sequential(self, model: Mapping[str, Any]) -> keras.Sequential:
        layers = [self.input(model["input"])] if model["input"] is not None else []
        for entry in model["layers"]:
            if "operation" in entry:
                raise self.damaged(f"{printable(entry['name'])} is an operation and stands in a Sequential")
            layers += [*(self.layer(before) for before in entry.get("before", ())), self.made(entry)]
        return keras.Sequential(layers, name=model["name"])

    def functional(self, model: Mapping[str, Any]) -> keras.Model:
        graph = _Graph(model)
        tensors: dict[Reference, Any] = {}
        calls: dict[str, Callable[..., list[Any]]] = {}
        waiting: list[tuple[str, int, Any]] = []
        for entry in model["layers"]:
            if "input" in entry:
                tensors[entry["name"], 0, 0] = self.input(entry)
                continue
            calls[entry["name"]] = self.call(entry)
            waiting += [(entry["name"], number, node) for number, node in enumerate(entry["inbound_nodes"])]
        while waiting:
            ready = [call for call in waiting if all(graph.at(r) in tensors for r in graph.tensors(call[2]))]
            if not ready:
                raise self.damaged(f"layer {printable(waiting[0][0])} waits for a tensor that no layer makes")
            for name, number, node in ready:
                first, further = self.arguments(node, lambda r: tensors[graph.at(r)])
                outputs = calls[name](first, **further)
                tensors.update({(name, number, index): output for index, output in enumerate(outputs)})
            done = {(name, number) for name, number, _ in ready}
            waiting = [call for call in waiting if (call[0], call[1]) not in done]

        def end(reference: Sequence[Any]) -> Any:
            found = tensors.get(graph.at(reference))
            if not isinstance(found, keras.KerasTensor):
                raise self.damaged("its inputs or outputs name a tensor that no layer makes")
            return found

        ends = [_single(_mapped(model[key], end)) for key in ("input_layers", "output_layers")]
        return keras.Model(*ends, name=model["name"])

    def arguments(self, node: Any, tensor: Callable[[Any], Any]) -> tuple[Any, Config]:
        """The first argument of a call and the further ones."""
        found = list(references(node))
        further = dict(next((r[3] for r in found if len(r) == 4 and r[3]), {}))
        first = _mapped(node, lambda r: r[2] if r[0] == CONSTANT else tensor(r))
        return first, {key: _mapped(value, tensor) for key, value in further.items()}

    # ------------------------------------------------------------------------------------------------ layers

    def input(self, entry: Mapping[str, Any]) -> Any:
        given = entry["input"]
        return keras.Input(
            batch_shape=tuple(given["batch_shape"]),
            dtype=given["dtype"],
            sparse=given["sparse"],
            name=modern_name(entry["name"]),
        )

    def made(self, entry: Mapping[str, Any]) -> Any:
        made = self.model(entry["nested"]) if "nested" in entry else self.layer(entry["layer"])
        if entry.get("untrained"):
            self.untrained[id(made)] = made
        return made

    def layer(self, serialised: Mapping[str, Any]) -> Any:
        config = {key: self.part(value) for key, value in serialised["config"].items()}
        made = keras.saving.deserialize_keras_object(
            {**serialised, "config": config}, custom_objects=self.objects, safe_mode=self.safe_mode
        )
        if not isinstance(made, keras.layers.Layer):
            raise self.damaged(f"{printable(serialised['class_name'])} is no layer")
        self.refuse_weighted_activations(made)
        return made

    def refuse_weighted_activations(self, layer: Any) -> None:
        """Raise where a layer of Keras is activated by a layer with weights, for which its files have no place."""
        for part in filter(_is_keras, (layer, *inner_layers(layer))):
            found = [getattr(part, key, None) for key in ACTIVATING]
            heavy = [x for x in found if isinstance(x, L.Layer) and any(map(_builds, (x, *inner_layers(x))))]
            if heavy:
                kind = type(heavy[0]).__name__
                raise UnsupportedModelError(
                    f"{self.what}: layer {printable(layer.name)} has an activation with weights ({kind}), which Keras "
                    f"3 does not save; build the model with {kind} as a layer of its own"
                )

    def part(self, value: Any) -> Any:
        """A model in a wrapper, as Keras serialises it."""
        if isinstance(value, Mapping) and set(value) == {"nested"}:
            return keras.saving.serialize_keras_object(self.model(value["nested"]))
        return {key: self.part(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value

    def call(self, entry: Mapping[str, Any]) -> Callable[..., list[Any]]:
        """What calls the layer of an entry on the first argument of a node and the further ones; gives its outputs."""
        if "operation" in entry:
            kind, config = entry["operation"]["kind"], entry["operation"]["config"]
            operation = operations.operation(kind, config, entry["name"])

            def operate(first: Any, **further: Any) -> list[Any]:
                try:
                    result = operation(first if kind in operations.FUNCTION_CLASSES else _single(first), **further)
                except UnsupportedModelError as error:
                    raise UnsupportedModelError(f"{self.what}: {error}") from error
                return result if isinstance(result, list) else [result]  # what is no list is one, whatever it is

            return operate
        layer = self.made(entry)
        before = [self.layer(serialised) for serialised in entry.get("before", ())]

        def run(first: Any, **further: Any) -> list[Any]:
            first = _single(first)
            for other in before:
                first = other(first)
            self.refuse_training(layer, further.get("training"))
            idle = (None,) if _is_keras(layer) else ()  # absent, or at inference: what Keras does anyway
            further = {
                key: value
                for key, value in further.items()
                if value not in idle and not (key in ("training", "mask") and value in (None, False))
            }
            self.refuse_masks(layer, first)
            inputs = tree.flatten(first)
            if self.sees_no_mask(layer):
                first, further = tree.map_structure(self.unmasked, (first, further))
            if isinstance(layer, RECURRENT) and isinstance(first, list):
                first, *states = first
                further["initial_state"] = states
            if isinstance(layer, RECURRENT) and "initial_state" in further and "mask" not in further:
                further |= self.mask_beside_states(layer, first)
            try:
                outputs = list(tree.flatten(layer(first, **further)))
            except Exception as error:
                said = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
                raise self.damaged(
                    f"Keras cannot call layer {printable(entry['name'])} as it was called ({said})"
                ) from error
            self.doubt(layer, inputs, outputs)
            self.name_masks(layer, outputs)
            return outputs

        return run

    def name_masks(self, layer: Any, outputs: list[Any]) -> None:
        """Operations that make a mask get names of their own: automatic ones collide with names in the file."""
        waiting = [mask for mask in map(_mask, outputs) if mask is not None]
        while waiting:
            history = waiting.pop()._keras_history
            made = history.operation
            if isinstance(made, keras.layers.Layer) or id(made) in self.named:
                continue
            self.named.add(id(made))
            made.name = f"{layer.name}.mask.{len(self.named)}"
            waiting += made._inbound_nodes[history.node_index].input_tensors

    # ------------------------------------------------------------------------- masks and training, then and now

    def refuse_training(self, layer: Any, training: Any) -> None:
        parts = [layer, *layer._flatten_layers(include_self=False)]
        told = any(_random(p) or id(p) in self.untrained or (isinstance(p, _BN) and p.trainable) for p in parts)
        if training is True and told:
            raise UnsupportedModelError(
                f"{self.what}: layer {printable(layer.name)} is called with training=True, also at inference, which "
                "Keras 3 does not keep; call it without"
            )

    def sees_no_mask(self, layer: Any) -> bool:
        """Whether a layer took no notice of masks where the model was saved, and does now."""
        old_attention = isinstance(layer, L.MultiHeadAttention) and (0,) < self.saved_by[:2] < (2, 10)
        return isinstance(layer, (*_ELEMENTWISE, *_TOOK)) or old_attention

    def mask_beside_states(self, layer: Any, first: Any) -> Config:
        """The mask of a recurrent layer's input as an argument: beside states Keras 3 does not look for it itself."""
        if (mask := _mask(first)) is not None:
            return {"mask": mask}
        self.maskless[id(layer)] = layer
        return {}

    def unmasked(self, value: Any) -> Any:
        """A tensor without its mask: what is no layer hands none on, also where the model is called again."""
        if _mask(value) is None:
            return value
        if id(value) not in self.copies:
            copy = keras.ops.copy(value)
            copy._keras_history.operation.name = f"unmasked.{len(self.copies) + 1}"
            self.copies[id(value)] = value, copy
        return self.copies[id(value)][1]

    def refuse_masks(self, layer: Any, first: Any) -> None:
        """Raise where a mask decides what a layer answers, and is another in Keras 3 than it was."""
        inputs = tree.flatten(first)
        origin = next((self.doubtful[id(x)] for x in inputs if id(x) in self.doubtful), None)
        if any(_mask(x) is not None for x in inputs):
            stepwise = isinstance(layer, L.TimeDistributed) and (
                inputs[0].shape[0] is not None  # what was masked could get the answer of the step before
                or any(isinstance(part, _MASK_READERS) for part in inner_layers(layer))
            )
            missed = isinstance(layer, keras.Model) and any(id(part) in self.maskless for part in inner_layers(layer))
            if stepwise or missed or (isinstance(layer, L.MultiHeadAttention) and not self.saved_by):
                raise self.other_mask(layer, layer.name)
        if origin is not None and (isinstance(layer, _MASK_READERS) or not _is_keras(layer)):
            raise self.other_mask(layer, origin)

    def other_mask(self, layer: Any, origin: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.what}: layer {printable(layer.name)} ({type(layer).__name__}) sees a mask that {printable(origin)} "
            "hands on otherwise in Keras 3 than where the model was saved; build it without the mask there"
        )

    def doubt(self, layer: Any, inputs: list[Any], outputs: list[Any]) -> None:
        """Give outputs the mask that older generations gave them, and remember those for which that is not known.

        A merge let pass what no mask of its inputs hides; Keras 3 lets pass what any of them does, or has no mask where
        an input has none. Where it concatenates steps that is the same.
        """
        masks = {id(mask): mask for mask in map(_mask, inputs) if mask is not None}
        if masks and isinstance(layer, _MERGE):
            steps = isinstance(layer, L.Concatenate) and layer.axis % len(inputs[0].shape) == 1
            if not steps:
                outputs[0]._keras_mask = functools.reduce(keras.ops.logical_and, masks.values())
        origin = next((self.doubtful[id(x)] for x in inputs if id(x) in self.doubtful), None)
        if isinstance(layer, L.TimeDistributed) and _makes_masks(layer.layer):
            origin = layer.name
        if origin is not None:
            self.doubtful.update((id(output), origin) for output in outputs)


def _mask(tensor: Any) -> Any:
    return getattr(tensor, "_keras_mask", None)


def _makes_masks(layer: Any) -> bool:
    """Whether a layer makes masks of what it is given, which TimeDistributed handed on once."""
    if isinstance(layer, keras.Model):
        return any(_mask(output) is not None for output in layer.outputs)
    if isinstance(layer, L.TimeDistributed):
        return _makes_masks(layer.layer)
    return isinstance(layer, L.Masking) or bool(getattr(layer, "mask_zero", False))


class _Graph:
    """How the calls of each layer are counted in one functional graph."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        said: dict[str, set[int]] = {}
        for nest in (model["output_layers"], *(entry["inbound_nodes"] for entry in model["layers"])):
            for reference in references(nest):
                said.setdefault(reference[0], set()).add(reference[1])
        self.first: dict[str, int] = {}
        for entry in model["layers"]:
            if "nested" in entry:
                calls, indices = len(entry["inbound_nodes"]), said.get(entry["name"], set())
                known = entry["nested"]["model"] == "Functional" or entry["nested"]["input"] is not None
                self.first[entry["name"]] = 0 if 0 in indices else 1 if calls in indices else int(known)

    def at(self, reference: Sequence[Any]) -> Reference:
        name, call, output = reference[:3]
        return name, call - self.first.get(name, 0), output

    @staticmethod
    def tensors(node: Any) -> list[Sequence[Any]]:
        return [reference for reference in references(node) if reference[0] != CONSTANT]


def _mapped(nest: Any, change: Callable[[Any], Any]) -> Any:
    """A nest with every reference replaced."""
    if is_reference(nest):
        return change(nest)
    if isinstance(nest, Mapping):
        return {key: _mapped(value, change) for key, value in nest.items()}
    return [_mapped(value, change) for value in nest] if isinstance(nest, (list, tuple)) else nest


def _single(value: Any) -> Any:
    """A list of one tensor stands for the tensor."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value
