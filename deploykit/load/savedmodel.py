"""SavedModel folders: the layers that Keras described are rebuilt, and the graph is left alone.

``model.save("folder")`` of tf.keras 2.0 to 2.15 and of tf_keras leaves the same model twice in a folder: as a
TensorFlow graph, and as what Keras needs to make it again. Only the second is read here:

    saved_model.pb      the tree of objects: model -layer-3-> layer -kernel-> variable; up to TF 2.4 also each
                        layer's JSON description
    keras_metadata.pb   these descriptions, by the object's number, from TF 2.5 on
    variables/          a checkpoint: an index (name -> type, shape, place), shards with the values, and the
                        tree of objects once more, its leaves naming their entry in the index

A weight of the Keras 3 model is found by walking the tree beside the model: models lead to their layers by the
layer's name, anything else to its parts by attribute (``forward_layer``, ``cell``, ``_query_dense``, ``kernel``;
``RENAMED`` lists what has another name in Keras 3). Order decides nothing. Every weight of the model must be
found with its shape, and every variable of the tree must be used, but for the state of optimizers, metrics,
random generators and stateful recurrences.

A folder without such descriptions (of TensorFlow 1, of a ``tf.Module``, of Keras 3's ``model.export``) and a subclassed
model, whose description names no layers, are opaque: `savedgraph` reads their graph.

The folder is untrusted. Links out of it are refused, every length is checked against the bytes that are there
before anything is allocated, and of saved_model.pb only the tree of objects is parsed.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import stat
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from tensorflow.core.protobuf.saved_object_graph_pb2 import SavedObjectGraph

from deploykit.errors import LoadError, UnsafeModelError, UnsupportedModelError
from deploykit.files import sha256 as sha256_of_file
from deploykit.load import savedgraph
from deploykit.load.checkpoint import (
    INDEX,
    MAX_OBJECTS_BYTES,
    MAX_RECORDS,
    Checkpoint,
    reading,
    refuse_size,
    refuse_tree,
    varint,
)
from deploykit.load.contents import Contents, mapping_of, parse_config, printable, text_of
from deploykit.load.legacy import modern_name, plain, steepen
from deploykit.load.legacy.config import LEARNT
from deploykit.opaque import Graph

GRAPH, METADATA = "saved_model.pb", "keras_metadata.pb"

MAX_GRAPH_BYTES = 2 << 30  # a protocol buffer is never longer
MAX_METADATA_BYTES = 256 << 20  # repeats a nested model's description at every level
MAX_FILES = 10_000
MAX_DEPTH = 64  # objects within objects

MODELS = frozenset(("_tf_keras_model", "_tf_keras_network", "_tf_keras_sequential"))
NO_WEIGHTS = frozenset(("_tf_keras_metric", "optimizer", "experimentalOptimizer", "signature_map"))

# Edges that hold no weights of their own: second paths to the same ones, or state that no inference needs.
BOOKKEEPING = frozenset(
    (
        "keras_api",
        "variables",
        "trainable_variables",
        "non_trainable_variables",
        "regularization_losses",
        "optimizer",
        "signatures",
        "states",
        "_random_generator",
        "_rng",  # of image augmentation up to TF 2.8
    )
)

# Keras 3 class -> attribute of its variable -> attribute in the folder, where they differ by more than a leading "_".
RENAMED: dict[str, dict[str, str]] = {
    "BaseDepthwiseConv": {"kernel": "depthwise_kernel"},
}

_LAYER = re.compile(r"layer(_with_weights)?-\d+")
_OWN_LISTS = frozenset(("_layers", "_metrics", "_trainable_variables", "_non_trainable_variables", "_seed_generators"))


def recognises(path: Path) -> bool:
    """A folder with a ``saved_model.pb``."""
    return path.is_dir() and (path / GRAPH).is_file()


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a folder: over ``name \\0 sha256 \\n`` of each file, sorted by name.

    ``name`` is the path below the folder with "/" between its parts, in UTF-8. Empty folders do not count.
    """
    digest = hashlib.sha256()
    for name, file in sorted(_files(path).items()):
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + sha256_of_file(file).encode() + b"\n")
    return digest.hexdigest()


def size_bytes(path: Path) -> int:
    """All files together."""
    return sum(file.stat().st_size for file in _files(path).values())


def peek(path: Path) -> Contents:
    """Read what the folder says about its model. Raises LoadError, UnsafeModelError or UnsupportedModelError."""
    files = _files(path)
    saved = _saved(path)
    if 0 not in saved.described:
        return _opaque(saved, "it was saved without Keras layers")
    identifier, text = saved.described[0]
    document = parse_config(text, f"the Keras metadata of {path}")
    model = document.get("model_config")
    model = model if isinstance(model, dict) and isinstance(model.get("config"), dict) else document
    name, config = model.get("class_name"), plain(model.get("config"))
    if not isinstance(name, str) or identifier not in MODELS:
        return _opaque(saved, f"{printable(str(name))} ({printable(identifier)}) is no Keras model")
    if not isinstance(config, dict) or not isinstance(config.get("layers"), list):
        return _opaque(saved, f"it is a subclassed model ({printable(name)}), whose layers only its own code knows")
    _refuse_learnt(config, path)
    if INDEX not in files:
        raise LoadError(f"{path} describes a model but holds no weights; save it again with model.save()")
    saved_by = printable(text_of(document.get("keras_version")))
    notices = []
    if saved_by is None:
        notices.append(f"{path.name} does not say which Keras saved it, only TensorFlow {saved.tensorflow}")
    return Contents(
        config={"class_name": name, "config": config},
        saved_by=saved_by or saved.tensorflow,
        backend=printable(text_of(document.get("backend"))) or "tensorflow",
        training_config_found=document.get("training_config") is not None,
        notices=tuple(notices),
        assumed=2,
        training_config=mapping_of(plain(document.get("training_config"))),
    )


def _opaque(saved: _Saved, why: str) -> Contents:
    return Contents(
        config={},
        saved_by=None,
        backend="tensorflow",
        training_config_found=False,
        notices=(
            f"{why}: the TensorFlow graph is taken as it is, which has no layers to fold and no float64 reference",
        ),
        opaque=why,
    )


def graph(path: Path) -> Graph:
    """The graph of a folder whose contents `peek` called opaque. Raises like `savedgraph.read`."""
    return savedgraph.read(path, described=bool(_saved(path).objects.nodes))


def fill(path: Path, model: keras.Model, contents: Contents) -> list[str]:
    """Assign every weight of ``model`` from the folder that `peek` described as ``contents``.

    Nothing is assigned before everything fits. Raises LoadError, naming layer and weight, when one is
    missing, left over, of another shape or damaged. Returns notices.
    """
    _files(path)
    tree = _Tree(path, _saved(path), Checkpoint(path))
    weights = list(_weights(model, tree.root, "", tree))
    _refuse_rest(model, weights, tree)
    for weight in weights:
        found = tree.checkpoint.shape(tree.key(weight.node, weight.label), weight.label)
        if found != tuple(weight.variable.shape):
            raise LoadError(
                f"{path}: {weight.label} has shape {found} in the folder and {tuple(weight.variable.shape)} in the "
                "model; the description and the weights are not of the same model"
            )
    rounded = []
    for weight in weights:
        values = tree.checkpoint.array(tree.key(weight.node, weight.label), weight.label)
        if keras.backend.is_float_dtype(weight.variable.dtype) and values.dtype.itemsize > _bytes_each(weight.variable):
            rounded.append(f"{weight.label} is stored in {values.dtype} and was rounded to {weight.variable.dtype}")
        weight.variable.assign(values)
    steepen(model)
    for weight in weights:
        if isinstance(weight.owner, keras.layers.Normalization):
            weight.owner.finalize_state()  # it computes with tensors that are made from its weights
    return rounded


def _bytes_each(variable: keras.Variable) -> int:
    size: int = tf.as_dtype(variable.dtype).size
    return size


def _refuse_rest(model: keras.Model, weights: list[_Weight], tree: _Tree) -> None:
    """Raise LoadError for a weight of the model that was not found, and for one of the folder that was not used."""
    assigned = {id(weight.variable) for weight in weights}
    for variable in model.weights:
        if id(variable) not in assigned:
            raise LoadError(f"{tree.path}: weight {printable(variable.path)!r} of the model belongs to no layer in it")
    used = {weight.node.stored for weight in weights}
    for label, stored in tree.variables():
        if stored not in used:
            raise LoadError(f"{tree.path}: the model has no place for {label}; it was saved from another model")


# The folder


def _files(path: Path) -> dict[str, Path]:
    """Every file below the folder by its name there. Raises UnsafeModelError for what leads out of it."""
    found: dict[str, Path] = {}
    root = path.resolve()
    for folder, folders, names in os.walk(path, onerror=_raise):
        for name in folders + names:
            here = Path(folder, name)
            label = here.relative_to(path).as_posix()
            if here.is_symlink() and (not here.resolve().is_relative_to(root) or here.is_dir()):
                raise UnsafeModelError(
                    f"{path}: {label!r} is a link out of the folder or to another folder; refusing to follow it, "
                    "copy the folder with its links resolved (cp -rL)"
                )
            if name in folders:
                continue
            if not stat.S_ISREG(here.stat().st_mode):
                raise UnsafeModelError(f"{path}: {label!r} is no regular file; refusing to read it")
            found[label] = here
            if len(found) > MAX_FILES:
                raise UnsafeModelError(f"{path} holds more than {MAX_FILES} files; refusing to read them")
    return found


def _raise(error: OSError) -> None:
    raise LoadError(f"cannot read {error.filename} ({error.strerror}); check its permissions") from error


# The description: protocol buffers


@dataclass(frozen=True)
class _Saved:
    """``described``: identifier and JSON text of each Keras object, by its number in ``objects``; 0 is the root."""

    tensorflow: str | None
    objects: SavedObjectGraph
    described: Mapping[int, tuple[str, bytes]]


def _fields(data: bytes | mmap.mmap, span: slice) -> Iterator[tuple[int, int | slice]]:
    """Number and value of each field of a message; strings and messages as the span of their bytes."""
    at, stop = span.start, span.stop
    for _ in range(MAX_RECORDS):
        if at == stop:
            return
        tag, at = varint(data, at)
        kind = tag & 7
        value: int | slice
        if kind == 0:
            value, at = varint(data, at)
        elif kind in (1, 2, 5):
            size, at = (8, at) if kind == 1 else (4, at) if kind == 5 else varint(data, at)
            value = slice(at, at + size)
            at += size
        else:
            raise ValueError("an unknown kind of field")
        if at > stop:
            raise ValueError("a field that is longer than its message")
        yield tag >> 3, value
    raise ValueError("too many fields")


def _spans(data: bytes | mmap.mmap, span: slice, number: int) -> list[slice]:
    return [value for found, value in _fields(data, span) if found == number and isinstance(value, slice)]


def _saved(path: Path) -> _Saved:
    """Take the tree of objects out of ``saved_model.pb``; the graph, most of the file, is stepped over."""
    refuse_size((path / GRAPH).stat().st_size, MAX_GRAPH_BYTES, GRAPH, path)
    with reading(GRAPH, path):
        with (
            open(path / GRAPH, "rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            # SavedModel.meta_graphs = 2; MetaGraphDef.meta_info_def = 1, .object_graph_def = 7
            graphs = _spans(data, slice(0, len(data)), 2)
            objects = [span for graph in graphs[:1] for span in _spans(data, graph, 7)]
            infos = [span for graph in graphs[:1] for span in _spans(data, graph, 1)]
            refuse_size(sum(s.stop - s.start for s in objects), MAX_OBJECTS_BYTES, f"the objects in {GRAPH}", path)
            tree = SavedObjectGraph.FromString(b"".join(data[span] for span in objects))
            # MetaInfoDef.tensorflow_version = 5
            versions = [data[span].decode("utf-8", "replace") for info in infos for span in _spans(data, info, 5)]
        if not graphs:
            raise ValueError("no graph")
    tensorflow = printable(versions[-1]) if versions else None
    refuse_tree(tree.nodes, GRAPH, path)
    described = _described(path) if (path / METADATA).is_file() else _described_inside(tree)
    return _Saved(tensorflow, tree, described)


def _described_inside(tree: SavedObjectGraph) -> dict[int, tuple[str, bytes]]:
    """The descriptions up to TF 2.4: within the tree of objects."""
    return {
        number: (node.user_object.identifier, node.user_object.metadata.encode())
        for number, node in enumerate(tree.nodes)
        if node.user_object.identifier.startswith("_tf_keras_") and node.user_object.metadata
    }


def _described(path: Path) -> dict[int, tuple[str, bytes]]:
    """The descriptions from TF 2.5 on: SavedMetadata.nodes = 1; .node_id = 2, .identifier = 4, .metadata = 5."""
    found = {}
    refuse_size((path / METADATA).stat().st_size, MAX_METADATA_BYTES, METADATA, path)
    with reading(METADATA, path):
        data = (path / METADATA).read_bytes()
        for span in _spans(data, slice(0, len(data)), 1):
            record = {number: data[v] if isinstance(v, slice) else v for number, v in _fields(data, span)}
            number, identifier, text = record.get(2, 0), record.get(4, b""), record.get(5, b"")
            if isinstance(number, bytes) or isinstance(identifier, int) or isinstance(text, int):
                raise ValueError("a field of another type")
            found[number] = identifier.decode(), text
    return found


def _refuse_learnt(config: object, path: Path) -> None:
    stack = [config]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack.extend(node)
        if not isinstance(node, dict):
            continue
        stack.extend(node.values())
        name, inner = node.get("class_name"), node.get("config")
        key = LEARNT.get(name) if isinstance(name, str) else None
        if key is not None and isinstance(inner, dict) and not inner.get(key):
            raise UnsupportedModelError(
                f"{path}: layer {printable(str(inner.get('name')))!r} ({name}) keeps its {key.replace('_', ' ')} in "
                "the graph, which is not read; load the model with the Keras that saved it and save it as .keras"
            )


# The tree of objects, beside the model


@dataclass(frozen=True)
class _Node:
    """One object, by its number in the description's tree and in the checkpoint's."""

    saved: int
    stored: int


@dataclass(frozen=True)
class _Weight:
    """A variable of the model, the layer that owns it and its object in the folder."""

    owner: keras.Layer
    variable: keras.Variable
    node: _Node
    label: str


class _Tree:
    """The objects of the folder and how they hang together."""

    root = _Node(0, 0)

    def __init__(self, path: Path, saved: _Saved, checkpoint: Checkpoint) -> None:
        self.path, self.checkpoint = path, checkpoint
        self._saved = saved
        self._stored = checkpoint.objects()
        self._names: dict[int, str | None] = {}

    def children(self, node: _Node) -> dict[str, _Node]:
        """What hangs at an object, by attribute, where both trees have it."""
        stored = {child.local_name: child.node_id for child in self._stored[node.stored].children}
        return {
            child.local_name: _Node(child.node_id, stored[child.local_name])
            for child in self._saved.objects.nodes[node.saved].children
            if child.local_name in stored
        }

    def follow(self, node: _Node, path: str) -> _Node | None:
        """The object at ``path``, attributes with "/" between them."""
        found: _Node | None = node
        for name in path.split("/"):
            found = self.children(found).get(name) if found is not None else None
        return found

    def layers(self, model: _Node) -> dict[str, _Node]:
        """A model's layers by name."""
        found: dict[str, _Node] = {}
        for edge, node in self.children(model).items():
            name = self.name(node) if _LAYER.fullmatch(edge) else None
            if name is not None and found.setdefault(modern_name(name), node) != node:
                raise LoadError(f"{self.path} has two layers {printable(name)!r} in one model; refusing to choose one")
        return found

    def name(self, node: _Node) -> str | None:
        """The layer's name in its description; None for what is no layer."""
        if node.saved not in self._names:
            _, text = self._saved.described.get(node.saved, ("", b""))
            document = parse_config(text, f"the Keras metadata of {self.path}") if text else {}
            config = document.get("config")
            inner = config.get("name") if isinstance(config, dict) else None
            self._names[node.saved] = text_of(document.get("name")) or text_of(inner)
        return self._names[node.saved]

    def _key(self, node: _Node) -> str | None:
        values = [a.checkpoint_key for a in self._stored[node.stored].attributes if a.name == "VARIABLE_VALUE"]
        return values[0] if values else None

    def holds_value(self, node: _Node) -> bool:
        return self._key(node) is not None

    def key(self, node: _Node, label: str) -> str:
        """The variable's name in the checkpoint."""
        if (key := self._key(node)) is None:
            raise LoadError(f"{self.path}: {label} has no values in the checkpoint; save the model again")
        return key

    def variables(self) -> Iterator[tuple[str, int]]:
        """Label and number of each variable that an object of the model holds, by the shortest way to it."""
        waiting, seen = deque([(self.root, "", "", 0)]), {self.root}
        while waiting:
            node, layer, attribute, depth = waiting.popleft()
            if self.holds_value(node):
                yield f"weight {printable(attribute)!r} of layer {printable(layer)!r}", node.stored
            if depth > MAX_DEPTH:
                raise LoadError(f"{self.path}: its objects are nested more than {MAX_DEPTH} deep; refusing to read it")
            for edge, child in self.children(node).items():
                identifier = self._saved.objects.nodes[child.saved].user_object.identifier
                if child in seen or edge in BOOKKEEPING or identifier in NO_WEIGHTS:
                    continue
                seen.add(child)
                name = self.name(child)
                inner = f"{attribute}/{edge}".strip("/") if name is None else ""
                waiting.append((child, "/".join(filter(None, (layer, name))), inner, depth + 1))


def _weights(layer: keras.Layer, node: _Node, within: str, tree: _Tree) -> Iterator[_Weight]:
    """Each weight below a layer of the model, with its object in the folder."""
    if isinstance(layer, keras.Model) and (named := tree.layers(node)):
        for part in layer.layers:
            if not part.weights:
                continue
            label = f"{within}/{part.name}".lstrip("/")
            if part.name not in named:
                raise LoadError(f"{tree.path}: layer {printable(label)!r} has no weights in the folder; save it again")
            yield from _weights(part, named[part.name], label, tree)
        return
    own = {id(variable) for variable in layer.weights}
    for attribute, part in _parts(layer):
        if isinstance(part, keras.Layer):
            if part.weights:
                place = _place(node, (attribute, attribute.lstrip("_")), tree)
                if place is None:
                    raise LoadError(
                        f"{tree.path}: layer {printable(within)!r} has no part {attribute!r} in the folder; "
                        "it was saved by another kind of layer"
                    )
                yield from _weights(part, place, f"{within}/{attribute}", tree)
        elif id(part) in own:
            label = f"weight {attribute.lstrip('_')!r} of layer {printable(within)!r}"
            place = _place(node, _spellings(layer, attribute, part.name), tree)
            if place is None:
                raise LoadError(f"{tree.path}: {label} is missing in the folder; save the model again")
            yield _Weight(layer, part, place, label)


def _parts(layer: keras.Layer) -> Iterator[tuple[str, Any]]:
    """Variables and layers that a layer holds, by attribute; in lists and dicts ``attribute/place``."""
    for name, value in vars(layer).items():
        if name in _OWN_LISTS or name.startswith("_self_"):  # TensorFlow's own bookkeeping of attributes
            continue
        items: list[tuple[str, Any]] = [(name, value)]
        if isinstance(value, (list, tuple)):
            items = [(f"{name}/{place}", item) for place, item in enumerate(value)]
        elif isinstance(value, dict):
            items = [(f"{name}/{place}", item) for place, item in value.items()]
        yield from (item for item in items if isinstance(item[1], (keras.Variable, keras.Layer)))


def _spellings(layer: keras.Layer, attribute: str, name: str) -> tuple[str, ...]:
    """Where the folder may keep a variable: as the table says, else under the attribute's or the variable's name."""
    plain = attribute.lstrip("_")
    for kind in type(layer).__mro__:
        if (old := RENAMED.get(kind.__name__, {}).get(plain)) is not None:
            return (old,)
    return (attribute, plain, name)


def _place(node: _Node, spellings: tuple[str, ...], tree: _Tree) -> _Node | None:
    places = (tree.follow(node, spelling) for spelling in spellings)
    return next((place for place in places if place is not None), None)
