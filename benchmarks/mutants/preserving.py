"""The same function written otherwise: every one of these must pass.

Some keep each float32 operation and its order (renamed tensors, Identity, other threads), some change the order of sums
and so the rounding (fused, optimised, permuted channels, another runtime). None changes what is computed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from deploykit.check import Reference
from deploykit.errors import DeploykitError
from deploykit.export import export, export_stock
from deploykit.fuse import fuse
from deploykit.load import load
from mutants import keras_edits, product, referee

L = keras.layers


@dataclass(frozen=True, eq=False)
class Given:
    """What variants are made from. ``path`` is the exported file, ``room`` a folder for others."""

    model: Any
    proto: Any
    path: Path
    room: Path
    reference: Reference
    rng: np.random.Generator


def _saved(given: Given, proto: Any) -> Path:
    path = given.room / "variant.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def _copy(given: Given) -> Any:
    proto = onnx.ModelProto()
    proto.CopyFrom(given.proto)
    return proto


# --------------------------------------------------------------------------------------------- ONNX graphs


def _reordered(given: Given) -> Path:
    """Another order of the nodes in which they can be run."""
    proto = _copy(given)
    graph = proto.graph
    left = list(graph.node)
    made = {made for node in left for made in node.output}
    ready: set[str] = set()
    graph.ClearField("node")
    while left:
        able = [i for i, node in enumerate(left) if all(n not in made or n in ready for n in _read(node))]
        node = left.pop(able[int(given.rng.integers(len(able)))])
        ready.update(node.output)
        graph.node.append(node)
    return _saved(given, proto)


def _read(node: Any) -> set[str]:
    """All names that a node reads, also from inside its subgraphs."""
    bodies = [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return {*node.input, *(name for body in bodies for inner in body.node for name in _read(inner))}


def _renamed(given: Given) -> Path:
    proto = _copy(given)
    graph = proto.graph
    kept = {value.name for value in (*graph.input, *graph.output)}
    inside = {
        n for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH for n in _read(node)
    }
    names = [name for node in graph.node for name in node.output] + [tensor.name for tensor in graph.initializer]
    new = {name: f"t{i}" for i, name in enumerate(names) if name and name not in kept | inside}
    for node in graph.node:
        node.name = ""
        for field in (node.input, node.output):
            for i, name in enumerate(field):
                field[i] = new.get(name, name)
    for tensor in graph.initializer:
        tensor.name = new.get(tensor.name, tensor.name)
    graph.ClearField("value_info")
    return _saved(given, proto)


def _identities(given: Given) -> Path:
    proto = _copy(given)
    nodes = []
    for node in proto.graph.node:
        nodes.append(node)
        names = [name for name in node.output[:1] if name]
        for name in names:
            node.output[0] = f"{name}/before"
            nodes.append(helper.make_node("Identity", [node.output[0]], [name]))
    copied = [type(node).FromString(node.SerializeToString()) for node in nodes]
    proto.graph.ClearField("node")
    proto.graph.node.extend(copied)
    proto.graph.ClearField("value_info")
    return _saved(given, proto)


def _constants_as_nodes(given: Given) -> Path:
    proto = _copy(given)
    made = [helper.make_node("Constant", [], [t.name], value=t) for t in proto.graph.initializer]
    nodes = [type(node).FromString(node.SerializeToString()) for node in proto.graph.node]
    proto.graph.ClearField("initializer")
    proto.graph.ClearField("node")
    proto.graph.node.extend([*made, *nodes])
    return _saved(given, proto)


def _computed_constants(given: Given) -> Path:
    """Every float weight is twice itself times one half, which is exact, at run time."""
    proto = _copy(given)
    found = []
    for tensor in proto.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32 and value.size > 1:
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(value * np.float32(2), f"{name}/twice"))
            found.append(helper.make_node("Mul", [f"{name}/twice", "a half"], [name]))
    nodes = [type(node).FromString(node.SerializeToString()) for node in proto.graph.node]
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "a half"))
    proto.graph.ClearField("node")
    proto.graph.node.extend([*found, *nodes])
    return _saved(given, proto)


def _symbolic(given: Given) -> Path:
    proto = _copy(given)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch_size"
    proto.graph.ClearField("value_info")
    return _saved(given, proto)


def _inferred(given: Given) -> Path:
    return _saved(given, onnx.shape_inference.infer_shapes(given.proto))


def _outside(given: Given) -> Path:
    path = given.room / "outside.onnx"
    (given.room / "outside.data").unlink(missing_ok=True)
    onnx.save_model(_copy(given), path, save_as_external_data=True, location="outside.data", size_threshold=128)
    return path


def _converted(opset: int) -> Callable[[Given], Path]:
    return lambda given: _saved(given, onnx.version_converter.convert_version(given.proto, opset))


def _exported(opset: int) -> Callable[[Given], Path]:
    return lambda given: export(given.model, given.room / "opset.onnx", opset=opset, force=True).path


def _optimised(level: str) -> Callable[[Given], Path]:
    """What ONNX Runtime writes after its offline optimisation."""

    def variant(given: Given) -> Path:
        path = given.room / f"{level}.onnx"
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = os.fspath(path)
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level.upper()}")
        ort.InferenceSession(os.fspath(given.path), options, providers=["CPUExecutionProvider"])
        return path

    return variant


def _max_for_relu(given: Given) -> Path | None:
    proto = _copy(given)
    found = [node for node in proto.graph.node if node.op_type == "Relu"]
    for node in found:
        node.op_type = "Max"
        node.input.append("nothing")
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(0), "nothing"))
    return _saved(given, proto) if found else None


def _stock(given: Given) -> Path | None:
    try:
        first = {name: array[:2] for name, array in given.reference.samples.arrays.items()}
        return export_stock(given.model, given.room / "stock.onnx", first, force=True).path
    except DeploykitError:
        return None  # tf2onnx itself has none that runs


def _fused_file(given: Given) -> Path:
    return export(fuse(given.model).model, given.room / "fused.onnx", force=True).path


# -------------------------------------------------------------------------------------------- Keras models


def _stored(suffix: str) -> Callable[[Given], Any]:
    def variant(given: Given) -> Any:
        path = given.room / f"saved{suffix}"
        given.model.save(path)
        return load(path).model

    return variant


def _nested(given: Given) -> Any:
    return keras_edits.apply(given.model, keras_edits.Edit(after=lambda inputs, outputs: outputs))


PASSING = (L.BatchNormalization, L.Activation, L.ReLU, L.LeakyReLU, L.MaxPooling1D, L.MaxPooling2D, L.Dropout)
MAKERS = (L.Dense, L.Conv1D, L.Conv2D)


def _permuted(given: Given) -> Any | None:
    """Channels between two layers with weights in another order: the sums that read them run otherwise."""
    layers = given.model.layers
    readers = {id(layer): _readers(layers, layer) for layer in layers}
    weights = {}
    for layer in layers:
        chain, last = [layer], layer
        while len(readers[id(last)]) == 1 and isinstance(readers[id(last)][0], PASSING):
            last = readers[id(last)][0]
            chain.append(last)
        ends = readers[id(last)]
        if not (isinstance(layer, MAKERS) and len(ends) == 1 and type(ends[0]) in MAKERS):
            continue
        if (
            layer.name in {name for name, _ in weights}
            or getattr(ends[0], "groups", 1) > 1
            or last in given.model.outputs
        ):
            continue
        order = given.rng.permutation(layer.output.shape[-1])
        changed = {(part.name, i): value[..., order] for part in chain for i, value in enumerate(part.get_weights())}
        first, *rest = ends[0].get_weights()
        reader = {(ends[0].name, 0): first[..., order, :], **{(ends[0].name, i + 1): v for i, v in enumerate(rest)}}
        weights.update({**changed, **reader})
    return keras_edits.apply(given.model, keras_edits.Edit(weights=weights)) if weights else None


def _readers(layers: list[Any], layer: Any) -> list[Any]:
    if isinstance(layer.output, (list, tuple)):
        return []
    return [
        other
        for other in layers
        if any(x is layer.output for x in keras.tree.flatten(other.input)) and other is not layer
    ]


# ------------------------------------------------------------------------------------------- other runtimes


def _threads(count: int) -> Callable[[Given], dict[str, Any]]:
    return lambda given: product.answers_of(given.path, given.reference, count)


def _referee(given: Given) -> dict[str, Any]:
    """The graph as it is, in float32, by onnx's evaluator (with numpy's sums in convolutions)."""
    return referee.evaluate(given.proto, given.reference.samples.arrays)


def _predict(given: Given) -> dict[str, Any]:
    arrays = given.reference.samples.arrays
    inputs = [arrays[spec.name] for spec in given.reference.signature.inputs]
    outputs = given.model.predict(inputs if len(inputs) > 1 else inputs[0], batch_size=7, verbose=0)
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    return dict(zip((spec.name for spec in given.reference.signature.outputs), outputs, strict=True))


# name -> what the check is given: a path, a keras.Model, a dict of answers, or None where a model has no such variant
VARIANTS: Mapping[str, Callable[[Given], Any]] = {
    "exported": lambda given: given.path,
    "nodes in another order": _reordered,
    "tensors renamed": _renamed,
    "Identity behind every node": _identities,
    "initializers as Constant nodes": _constants_as_nodes,
    "weights computed at run time": _computed_constants,
    "another name for the batch size": _symbolic,
    "shapes inferred": _inferred,
    "weights in a file of their own": _outside,
    "converted to opset 21": _converted(21),
    "exported at opset 13": _exported(13),
    "exported at opset 16": _exported(16),
    "optimised offline, basic": _optimised("basic"),
    "optimised offline, extended": _optimised("extended"),
    "optimised offline, all": _optimised("all"),
    "Max(x, 0) for Relu": _max_for_relu,
    "exported by tf2onnx alone": _stock,
    "fused and exported": _fused_file,
    "one thread": _threads(1),
    "four threads": _threads(4),
    "onnx's own evaluator": _referee,
    "Keras: the model itself": lambda given: given.model,
    "Keras: copied": lambda given: keras_edits.apply(given.model, keras_edits.Edit()),
    "Keras: nested in another model": _nested,
    "Keras: saved and loaded, .keras": _stored(".keras"),
    "Keras: saved and loaded, HDF5": _stored(".h5"),
    "Keras: fused": lambda given: fuse(given.model).model,
    "Keras: channels permuted": _permuted,
    "Keras: predict, batches of 7": _predict,
}


def variants(given: Given, most: int | None = None) -> Iterator[tuple[str, Any]]:
    """All variants of one model, or ``most`` of them; each is good until the next one is asked for."""
    names = list(VARIANTS) if most is None else [str(n) for n in given.rng.permutation(list(VARIANTS))[:most]]
    for name in names:
        made = VARIANTS[name](given)
        if made is not None:
            yield name, made
