"""Opaque models: a TensorFlow graph that is one Keras layer, because nobody knows the layers it was made of.

Such a model has inputs, outputs and weights like any other, so it is exported, run and timed like any other. It has no
layers to fold, and none that could be built again in float64; so the reference is its own float32 answer, and nothing
about it is called proven.

The yardstick. What the original's rounding amounts to is then not known. It is estimated from what the model makes of
errors of the size that float32 makes: every weight, larger constant and floating input times 1 + `NUDGE_ULPS`·eps·u, u
uniform in [-1, 1]. A layer y = W·x in float32 answers as an exact one would with other W and x, each off by a few eps
(backward error: Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., sec. 3.1); so the nudged answer
differs from the given one by about as much as two correct evaluation orders do. It knows the model's condition, which
no fixed tolerance does; `docs/decisions.md` has the comparison with models whose float64 reference is known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tensorflow.python.eager import context  # no public way to register a function by its definition

from deploykit.signature import TensorSpec

Array = npt.NDArray[Any]
Specs = tuple[tuple[str, TensorSpec], ...]

NUDGE_ULPS = 1.0
NUDGED_ABOVE = 8  # constants of so many values: smaller ones may be sizes, steps and limits

CALLS = frozenset(("PartitionedCall", "StatefulPartitionedCall"))
SILENT = frozenset(  # what is no work: names, values, and ways to reach them
    (
        "Const",
        "Identity",
        "IdentityN",
        "NoOp",
        "Placeholder",
        "PlaceholderWithDefault",
        "ReadVariableOp",
        "StopGradient",
    )
)


@dataclass(frozen=True, eq=False)
class Graph:
    """A TensorFlow graph, cut at its inputs and variables.

    ``inputs`` and ``outputs``: a tensor's name in ``definition``, and the name, shape and dtype that users know it by.
    ``variables``: node that makes a variable's handle -> its value. ``origin``: what the file says it is.
    """

    definition: Any  # tf.compat.v1.GraphDef
    inputs: Specs
    outputs: Specs
    variables: Mapping[str, Array]
    origin: str


@keras.saving.register_keras_serializable("deploykit")
class OpaqueGraph(keras.layers.Layer):  # type: ignore[misc]  # Keras has no types
    """One call runs the graph. It cannot be rebuilt from its config: the graph is no part of it."""

    def __init__(self, graph: Graph, name: str) -> None:
        super().__init__(name=name, trainable=False, dtype="float32", autocast=False)
        self.graph = graph
        self.handles = {
            node: self.add_weight(
                shape=value.shape, dtype=value.dtype.name, initializer="zeros", trainable=False, name=_plain(node)
            )
            for node, value in graph.variables.items()
        }
        for node, value in graph.variables.items():
            self.handles[node].assign(value)
        for function in graph.definition.library.function:  # importing a graph leaves them where running does not look
            if not context.context().has_function(function.signature.name):
                context.context().add_function_def(function)
        specs = [tf.TensorSpec(spec.shape, spec.dtype) for _, spec in graph.inputs]
        self._function = tf.function(self._imported, autograph=False, input_signature=specs)
        self._function.get_concrete_function()  # which fails where a graph is no graph
        self.built = True

    def _imported(self, *tensors: Any) -> list[Any]:
        feeds = {name: tensor for (name, _), tensor in zip(self.graph.inputs, tensors, strict=True)}
        own = tf.compat.v1.get_default_graph()
        for node, variable in self.handles.items():
            own.watch_variable(variable.value)  # so that freezing finds it
            feeds[f"{node}:0"] = own.capture(variable.value.handle)
        outputs = tf.graph_util.import_graph_def(
            self.graph.definition,
            input_map=feeds,
            return_elements=[name for name, _ in self.graph.outputs],
            name="graph",
        )
        for output, (_, spec) in zip(outputs, self.graph.outputs, strict=True):
            output.set_shape(spec.shape)
        return list(outputs)

    def call(self, *tensors: Any) -> list[Any]:
        return list(self._function(*tensors))

    def compute_output_spec(self, *tensors: Any, **kwargs: Any) -> list[Any]:
        """As the file's signature says it: TensorFlow does not look into functions."""
        return [keras.KerasTensor(spec.shape, spec.dtype) for _, spec in self.graph.outputs]


def _plain(name: str) -> str:
    return name.replace("/", ".").strip(".") or "variable"


def model_of(graph: Graph, name: str) -> keras.Model:
    """The model; its inputs and outputs have the names of the graph's signature, in its order.

    An output bears the name of the layer that makes it, hence an Identity for each.
    """
    inputs = [keras.Input(batch_shape=spec.shape, dtype=spec.dtype, name=spec.name) for _, spec in graph.inputs]
    taken = {spec.name for _, spec in graph.inputs}
    inner = _fresh("graph", {*taken, *(spec.name for _, spec in graph.outputs)})
    taken.add(inner)
    outputs = []
    results = OpaqueGraph(graph, inner)(*inputs)
    for result, (_, spec) in zip(results, graph.outputs, strict=True):
        own = _fresh(spec.name, taken)
        taken.add(own)
        outputs.append(keras.layers.Identity(name=own, dtype=spec.dtype)(result))
    return keras.Model(*(one[0] if len(one) == 1 else one for one in (inputs, outputs)), name=_plain(name))


def _fresh(name: str, taken: set[str]) -> str:
    names = (f"{name}_{count}" if count else name for count in range(len(taken) + 1))
    return next(found for found in names if found not in taken)


def graph_of(model: Any) -> Graph | None:
    """The graph of an opaque model, None for a model that is made of layers."""
    layers = getattr(model, "layers", ())
    return next((layer.graph for layer in layers if isinstance(layer, OpaqueGraph)), None)


# ----------------------------------------------------------------------------------------------- the yardstick


def nudge(array: Array, rng: np.random.Generator) -> Array:
    """The values, each off by up to `NUDGE_ULPS` units in the last place; integers and zeros stay."""
    if array.dtype.kind != "f":
        return array
    off = NUDGE_ULPS * float(np.finfo(array.dtype).eps) * rng.uniform(-1.0, 1.0, array.shape)
    return (array * (1.0 + off)).astype(array.dtype)


def nudged(model: Any, seed: int) -> keras.Model:
    """A copy of an opaque model whose weights and constants are nudged."""
    graph = graph_of(model)
    assert graph is not None
    rng = np.random.default_rng(seed)
    definition = tf.compat.v1.GraphDef()
    definition.CopyFrom(graph.definition)
    for node in nodes(definition):
        if node.op == "Const" and tf.dtypes.as_dtype(node.attr["dtype"].type).is_floating:
            value = tf.make_ndarray(node.attr["value"].tensor)
            if value.size <= NUDGED_ABOVE:
                continue
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(nudge(value, rng)))
    variables = {node: nudge(value, rng) for node, value in graph.variables.items()}
    return model_of(replace(graph, definition=definition, variables=variables), model.name)


def functions_of(attribute: Any) -> Iterator[Any]:
    """The functions that an attribute of a node names, within one another too."""
    for function in [attribute.func] if attribute.HasField("func") else attribute.list.func:
        yield function
        for inner in function.attr.values():
            yield from functions_of(inner)


def nodes(definition: Any) -> Iterator[Any]:
    """Every node of a graph and of its functions."""
    yield from definition.node
    for function in definition.library.function:
        yield from function.node_def


def operations(definition: Any) -> Counter[str]:
    """How often each operation occurs that computes something, every call written out."""
    bodies = {function.signature.name: function.node_def for function in definition.library.function}
    known: dict[str, Counter[str]] = {}

    def counted(body: Any) -> Counter[str]:
        total: Counter[str] = Counter()
        for node in body:
            called = [function.name for a in node.attr.values() for function in functions_of(a)]
            if node.op not in {*SILENT, *CALLS, *bodies}:
                total[node.op] += 1
            for name in (*called, node.op):
                if name in bodies:
                    known[name] = known[name] if name in known else counted(bodies[name])
                    total += known[name]
        return total

    return counted(definition.node)
