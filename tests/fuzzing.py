"""Mutate valid model files and load them: nothing may come of it but a model or one line.

    python tests/fuzzing.py --cases 500 --seed 7             that many cases; failing files are kept in --keep
    python tests/fuzzing.py --seconds 300 --seed 7           as many as fit
    python tests/fuzzing.py --seed 7 --only 123              one case again, by its number
    python tests/fuzzing.py --cases 500 --kind "old hdf5"    of one kind (``KINDS``) alone

Small valid files of every kind (``KINDS``) are written once, by a process of its own. A case is drawn from the seed and
its number alone: a kind, a net, and one to three mutations, from flipped bits to a description whose layers swap their
classes. It is loaded in a child that is forked from a process that has imported everything and computed nothing, so
that it costs a fraction of a second, under limits of time and memory, and watched by an audit hook. It must end in

    a model, or a DeploykitError of one printable line with exit code 2.

Any other exception, a signal, a hang, more memory than ``MEMORY_BYTES``, an import of a package that was not there, a
process, a connection, and a file written anywhere but in the case's temporary folder fail it. A failing case is
made smaller (fewer mutations) and kept; its file bears the seed and the number.

``KNOWN`` holds faults that are reported and not mended yet, each by its place; they are counted, not failed.

Limits: what a native library writes is seen only in the case's working folder; mutated files are small, so that what
takes long because it is large is not looked for.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fcntl
import io
import itertools
import json
import os
import pickle
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
QUIET = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "CUDA_VISIBLE_DEVICES": "-1",
    **dict.fromkeys(("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"), "1"),
}

TIMEOUT_S = 60.0
MEMORY_BYTES = 3 << 30  # beyond what the process has mapped before it loads
MAX_LINE = 1000

NOT_EVEN_KERAS = ("hdf5", "operations")  # Keras 3 writes its operations to HDF5 and cannot read them back

# Functions of deploykit through which an exception escapes: reported, not mended yet (`test_load_fuzz.FOUND`).
KNOWN: frozenset[str] = frozenset()


# --------------------------------------------------------------------------------------------- the valid files


def _branches(k: Any) -> Any:
    """A functional net: convolution, shared layer, two outputs."""
    L = k.layers
    image = k.Input((5, 5, 2), name="image")
    x = L.Conv2D(3, 2, name="conv", kernel_regularizer="l2", activation="relu")(image)
    x = L.BatchNormalization(name="norm")(x)
    x = L.PReLU(name="bend")(x)
    x = L.Flatten(name="flat")(x)
    shared = L.Dense(4, name="shared", activation="hard_sigmoid", kernel_initializer="he_normal")
    x = L.Add(name="sum")([shared(x), shared(x)])
    return k.Model(image, [L.Dense(2, name="left")(x), L.Concatenate(name="right")([x, x])], name="branches")


def _steps(k: Any) -> Any:
    """Recurrent layers, wrappers and a nested model."""
    L = k.layers
    words = k.Input((4,), dtype="int32", name="words")
    x = L.Embedding(5, 3, name="embed")(words)
    x = L.Bidirectional(L.LSTM(2, return_sequences=True, name="lstm"), name="both")(x)
    x = L.TimeDistributed(L.Dense(3, name="each"), name="spread")(x)
    x = L.RNN(L.GRUCell(2, name="cell"), name="cells")(x)
    inner = k.Sequential([k.Input((2,)), L.Dense(3, name="inner"), L.LayerNormalization(name="ln")], name="nest")
    return k.Model(words, inner(x), name="steps")


def _chain(k: Any) -> Any:
    return k.Sequential(
        [
            k.Input((6, 2)),
            k.layers.Conv1D(3, 2, name="first", padding="causal"),
            k.layers.ReLU(name="relu", max_value=6.0),
            k.layers.GlobalMaxPooling1D(name="pool"),
            k.layers.Dropout(0.5, name="drop"),
            k.layers.Dense(2, name="last", activation="softmax"),
        ],
        name="chain",
    )


def _operations(k: Any) -> Any:
    """TensorFlow functions between the layers; Keras 3 writes its own."""
    inputs = x = k.Input((4, 6), name="x")
    if k.__name__ == "tf_keras":
        import tensorflow as tf

        x = tf.nn.relu(x[:, 1:3] * 2.0 + 1.0)
        x = tf.concat([x, tf.reshape(x, (-1, 2, 6))], axis=1)
        x = tf.reduce_mean(tf.transpose(x, (0, 2, 1)), axis=-1, keepdims=False)
    else:
        x = k.ops.relu(x[:, 1:3] * 2.0 + 1.0)
        x = k.ops.mean(k.ops.transpose(x, (0, 2, 1)), axis=-1)
    return k.Model(inputs, k.layers.Dense(2, name="head")(x), name="operations")


NETS = {"branches": _branches, "steps": _steps, "chain": _chain, "operations": _operations}


def _first_branches(k: Any) -> Any:
    """A graph of Theano: paddings of its own, a shared layer, two outputs."""
    norm, shared = k.batchnorm("norm", 3, axis=1), k.dense("shared", 27, 4, "hard_sigmoid")
    shared[0]["config"].update(W_regularizer={"name": "WeightRegularizer", "l1": 0.0, "l2": 0.01})
    sums = k.merge("sum", "sum")
    calls = [
        (k.source("image", 2, 5, 5), []),
        (k.conv2d("conv", 2, 3, 2, 2, order="th", border_mode="same", subsample=[2, 2]), [("image", 0, 0)]),
        (norm, [("conv", 0, 0)]),
        (k.layer("PReLU", "bend", None, {"bend_alphas": k.rand(3, 3, 3)}, init="zero"), [("norm", 0, 0)]),
        (k.layer("Flatten", "flat"), [("bend", 0, 0)]),
        (shared, [("flat", 0, 0)]),
        (sums, [("shared", 0, 0), ("shared", 1, 0)]),
        (k.dense("left", 4, 2, W_constraint={"name": "MaxNorm", "m": 2, "axis": 0}), [("sum", 0, 0)]),
        (k.merge("right", "concat"), [("sum", 0, 0), ("sum", 0, 0)]),
    ]
    model, groups = k.functional("branches", calls, [("left", 0, 0), ("right", 0, 0)])
    entry = next(item for item in model["config"]["layers"] if item["name"] == "shared")
    entry["inbound_nodes"] *= 2
    return model, groups


def _first_steps(k: Any) -> Any:
    """Recurrent layers, wrappers and a nested model."""
    each, lstm = k.dense("each", 4, 3), k.recurrent("LSTM", "lstm", 3, 2, prefix="forward_", return_sequences=True)
    behind = k.recurrent("LSTM", "lstm", 3, 2, prefix="backward_")[1]
    both = k.layer("Bidirectional", "both", None, lstm[1] | behind, layer=lstm[0], merge_mode="concat")
    body, parts = k.sequential(k.dense("inner", 2, 3, shape=[2]), k.batchnorm("ln", 3))
    inner, norm = parts.values()
    calls = [
        (k.source("words", 4, dtype="int32"), []),
        (k.embedding("embed", 5, 3, length=4), [("words", 0, 0)]),
        (both, [("embed", 0, 0)]),
        (k.layer("TimeDistributed", "spread", None, each[1], layer=each[0]), [("both", 0, 0)]),
        (k.recurrent("GRU", "cells", 3, 2, consume_less="gpu"), [("spread", 0, 0)]),
        (({**body, "name": "nest"}, inner | norm), [("cells", 0, 0)]),
    ]
    return k.functional("steps", calls, [("nest", 1, 0)])


def _first_chain(k: Any) -> Any:
    return k.sequential(
        k.conv1d("first", 2, 3, 2, shape=[6, 2]),
        k.pool("MaxPooling1D", "pool", 2),
        k.layer("LeakyReLU", "relu", alpha=0.1),
        k.layer("Flatten", "flat"),
        k.layer("Dropout", "drop", p=0.5),
        k.dense("last", 6, 2, "softmax"),
    )


def _first_operations(k: Any) -> Any:
    """A Sequential that begins with a Merge of Sequentials, and layers that are several in Keras 2."""
    grown = {"output_dim": 3, "init": "glorot_uniform", "nb_feature": 2, "bias": True, "input_dim": None, **k.TRAINING}
    left = [k.layer("ZeroPadding2D", "pad", [4, 4, 2], padding=[1, 1]), k.conv2d("conv", 2, 3, 3, 3)]
    right = [k.layer("UpSampling2D", "grow", [2, 2, 3], size=[2, 2])]
    top = [
        k.pool("MaxPooling2D", "pool", [2, 2]),
        k.layer("Flatten", "flat"),
        k.layer("MaxoutDense", "maxout", None, {"maxout_W": k.rand(2, 12, 3), "maxout_b": k.rand(2, 3)}, **grown),
    ]
    model, _ = k.sequential(k.merge("sum", "sum", [k.sequential(*part)[0] for part in (left, right)]), *top)
    return model, {entry["config"]["name"]: arrays for entry, arrays in [*left, *right, *top]}


FIRST = {  # as Keras 1 wrote them -> on which backend
    "branches": (_first_branches, "theano"),
    "steps": (_first_steps, "tensorflow"),
    "chain": (_first_chain, "theano"),
    "operations": (_first_operations, "tensorflow"),
}


def write_seeds(folder: Path) -> None:
    """Every net in every kind; in a process that may import and compute what it likes."""
    import keras
    import legacy_keras1_files
    import tf_keras

    for name, (first, backend) in FIRST.items():
        model, groups = first(legacy_keras1_files)
        legacy_keras1_files.write(folder / f"{name}_first.h5", model, groups, backend=backend)
        described, weights = legacy_keras1_files.write_apart(folder, model, groups, backend=backend)
        described.rename(folder / f"{name}_first.json")
        weights.rename(folder / f"{name}_first_weights.h5")
    for name, net in NETS.items():
        new, old = net(keras), net(tf_keras)
        new.save(folder / f"{name}.keras")
        new.save(folder / f"{name}.h5")
        new.save_weights(folder / f"{name}.weights.h5")
        (folder / f"{name}.json").write_text(new.to_json())
        old.save(folder / f"{name}_old.keras")
        old.save(folder / f"{name}_old.h5")
        old.save(folder / f"{name}_old_folder", save_format="tf", save_traces=False)
        old.save_weights(folder / f"{name}_old_weights.h5")
        new.export(str(folder / f"{name}_graph"), verbose=False)
        (folder / f"{name}_old.json").write_text(old.to_json())


@dataclass(frozen=True)
class Kind:
    """``source``: the file that is mutated; ``model``: what is loaded where that is a file of weights beside it."""

    source: str
    model: str | None = None
    weights: str | None = None


KINDS = {
    "keras": Kind("{}.keras"),
    "hdf5": Kind("{}.h5"),
    "json": Kind("{}.json", weights="{}.weights.h5"),
    "weights": Kind("{}.weights.h5", model="{}.json"),
    "old keras": Kind("{}_old.keras"),
    "old hdf5": Kind("{}_old.h5"),
    "old folder": Kind("{}_old_folder"),
    "graph": Kind("{}_graph"),
    "old json": Kind("{}_old.json", weights="{}_old_weights.h5"),
    "old weights": Kind("{}_old_weights.h5", model="{}_old.json"),
    "old whole as weights": Kind("{}_old.keras", model="{}_old.json"),
    "first hdf5": Kind("{}_first.h5"),
    "first json": Kind("{}_first.json", weights="{}_first_weights.h5"),
    "first weights": Kind("{}_first_weights.h5", model="{}_first.json"),
}


# ------------------------------------------------------------------------------------------------ mutating JSON

Random = random.Random
CANARY = "deploykit_fuzz_canary"  # a module that exists, so that a file could have it imported

NAMES = (
    *("Dense", "Conv2D", "LSTM", "InputLayer", "Functional", "Sequential", "Model", "Add", "Lambda", "TFSMLayer"),
    *("TimeDistributed", "Bidirectional", "RNN", "StackedRNNCells", "Reshape", "Normalization", "StringLookup"),
    *("TFOpLambda", "SlicingOpLambda", "TensorFlowOpLayer", "ClassMethod", "AddLoss", "PruneLowMagnitude"),
    *("QuantizeWrapperV2", "KerasLayer", "TorchModuleWrapper", "JaxLayer", "SpectralNormalization", "Embedding"),
    *("CuDNNLSTM", "ThresholdedReLU", "MultiHeadAttention", "GRU", "Activation", "BatchNormalization", "Merge"),
    *("__lambda__", "__tensor__", "__numpy__", "__typespec__", "function", "CompositeTensor", "DTypePolicy"),
    *("Custom>Dense", "builtins>eval", "os>system", f"{CANARY}>Thing", "keras.layers.Dense", "GetItem", "Slice"),
)
STRINGS = (
    *("", "\0", "²", "٣", "\ud800", "\x1b[2J", "a\nb", "../../x", "/etc/passwd", "x" * 3000, "3.99.0", "1", "²³.0"),
    *("float16", "float8", "string", "relu", "hard_sigmoid", "eval", CANARY, f"{CANARY}.Thing", "os", "keras.utils"),
    *("io.read_file", "math.reduce_max", "channels_first", "causal", "nan", "None", "_CONSTANT_VALUE", "theano"),
)
NUMBERS = (0, -1, 1, 2, 3, 255, 2**31 - 1, 2**31, 2**63, -(2**63) - 1, 10**40, 10**400, 1e308, -0.0, 0.5, 1e-300)
ODD = (float("nan"), float("inf"), float("-inf"))
MODEST = (0, -1, 1, 2, 3, 7, 64, 0.5, -2.5)  # what does not ask for a lot of memory


def _places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every node, without recursion."""
    waiting = [(at, tree)]
    while waiting:
        way, node = waiting.pop()
        yield way
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        waiting.extend(((*way, key), value) for key, value in items)


def _get(tree: Any, way: tuple[Any, ...]) -> Any:
    for key in way:
        tree = tree[key]
    return tree


def _value(rng: Random, old: Any, tree: Any) -> Any:
    """Something to stand where ``old`` stood, more often of its own type than not."""
    if isinstance(old, str) and rng.random() < 0.7:
        return rng.choice((*NAMES, *STRINGS))
    if isinstance(old, (int, float)) and rng.random() < 0.7:
        return rng.choice((*MODEST, *ODD) if rng.random() < 0.7 else NUMBERS)
    if rng.random() < 0.3:
        return copy.deepcopy(_get(tree, rng.choice(list(_places(tree)))))
    if rng.random() < 0.05:
        deep: Any = 1
        for _ in range(rng.choice((30, 200, 240, 300))):
            deep = [deep] if rng.random() < 0.5 else {"config": deep}
        return deep
    return rng.choice(
        (None, True, False, [], {}, [None], "x", 3, 2.5, [1, 2, 3], {"class_name": "Dense", "config": {}}, [[]], "²")
    )


def mutate_tree(rng: Random, tree: Any) -> Any:
    """One structural edit of a JSON value."""
    ways = [way for way in _places(tree) if way]
    if not ways:
        return _value(rng, tree, tree)
    if rng.random() < 0.35:  # names of classes, modules and functions, and references between layers decide most
        telling = ("class_name", "module", "config", "function", "name", "inbound_nodes", "layers", "layer", "dtype")
        ways = [way for way in ways if way[-1] in telling] or ways
    way = rng.choice(ways)
    parent, key = _get(tree, way[:-1]), way[-1]
    edit = rng.choice(("drop", "set", "set", "set", "twice", "swap", "rename", "wrap", "add"))
    if edit == "drop":
        del parent[key]
    elif edit == "twice" and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
    elif edit == "swap":
        other = rng.choice(ways)
        if other[: len(way)] != way and way[: len(other)] != other:
            there = _get(tree, other[:-1])
            parent[key], there[other[-1]] = there[other[-1]], parent[key]
    elif edit == "rename" and isinstance(parent, dict):
        keys = {str(w[-1]) for w in ways if isinstance(w[-1], str)} | {"layer", "cell", "cells", "module", "config"}
        parent[rng.choice((*sorted(keys), *STRINGS))] = parent.pop(key)
    elif edit == "wrap":
        parent[key] = rng.choice(
            ([parent[key]], {"config": parent[key]}, {"class_name": "Dense", "config": parent[key]})
        )
    elif edit == "add" and isinstance(parent, dict):
        names = ("registered_name", "build_config", "compile_config", "vocabulary", "backward_layer", "data_format")
        parent[rng.choice(names)] = _value(rng, None, tree)
    else:
        parent[key] = _value(rng, parent[key], tree)
    return tree


def mutate_json(rng: Random, text: bytes) -> bytes:
    if rng.random() < 0.1:
        return mutate_bytes(rng, text)
    if rng.random() < 0.03:  # deeper than the parser, or the writer, would go
        levels, at = rng.choice((300, 2000, 50_000)), text.find(b'"layers": ') + len('"layers": ')
        return text[:at] + b'{"config": [' * levels + text[at:]
    return json.dumps(mutate_tree(rng, json.loads(text))).encode("utf-8", "surrogatepass")


# ----------------------------------------------------------------------------------------------- mutating bytes


def mutate_bytes(rng: Random, data: bytes) -> bytes:
    """Flip, overwrite, insert, drop, repeat or cut off."""
    raw = bytearray(data)
    edit = rng.choice(("flip", "flip", "write", "number", "insert", "drop", "repeat", "cut", "zero"))
    at = rng.randrange(len(raw) + 1)
    size = min(rng.choice((1, 1, 2, 4, 8, 64, 512)), len(raw) - at)
    if edit == "cut":
        del raw[at:]
    elif edit == "insert":
        raw[at:at] = rng.randbytes(rng.choice((1, 3, 8, 100)))
    elif edit == "drop":
        del raw[at : at + size]
    elif edit == "repeat":
        raw[at:at] = raw[at : at + size]
    elif edit == "zero":
        raw[at : at + size] = bytes(size)
    elif edit == "number":
        width = rng.choice((1, 2, 4, 8))
        values = (0, 1, -1, 2 ** (8 * width - 1) - 1, -(2 ** (8 * width - 1)), 64)
        raw[at : at + width] = rng.choice(values).to_bytes(width, "little", signed=True)
    elif edit == "write":
        raw[at : at + size] = rng.randbytes(size)
    else:
        for _ in range(rng.choice((1, 1, 2, 8))):
            if raw:
                raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(raw)


# ------------------------------------------------------------------------------------------------ mutating HDF5


def _attribute(rng: Random, name: str, old: Any) -> Any:
    import h5py
    import numpy as np

    if name in ("layer_names", "weight_names") and rng.random() < 0.7:
        names = [str(n.decode() if isinstance(n, bytes) else n) for n in np.atleast_1d(old)]
        edit = rng.choice(("drop", "twice", "shuffle", "other", "many", "scalar"))
        if edit == "drop" and names:
            names.pop(rng.randrange(len(names)))
        elif edit == "twice" and names:
            names.insert(0, rng.choice(names))
        elif edit == "shuffle":
            rng.shuffle(names)
        elif edit == "many" and names:
            names = [rng.choice(names)] * 2000
        elif edit == "scalar":
            return "".join(names) or "x"
        else:
            names.append(rng.choice(("nowhere", "", "/", ".", "..", "/model_weights", "a/b", *names)))
        return np.asarray([n.encode() for n in names]) if names else h5py.Empty("S1")
    return rng.choice(
        (
            h5py.Empty("f4"),
            np.arange(4),
            "²",
            "1.2.0",
            "3.1",
            b"\xff\xfe",
            np.void(b"\0\1"),
            float("nan"),
            np.asarray([b"x" * 10]),
            np.zeros((2, 2)),
            np.zeros(2, [("a", "f4"), ("b", "S3")]),
            True,
            "{}",
            "theano",
            np.asarray(["a", "ü"], dtype=h5py.string_dtype()),
        )
    )


def _dataset(rng: Random) -> Any:
    import numpy as np

    return rng.choice(
        (
            np.float32(1.5),
            np.zeros((0,), "f4"),
            np.zeros((3, 3), "f4"),
            np.asarray([b"text"]),
            np.zeros((2,), "c8"),
            np.zeros((2, 2), "i8"),
            np.full((2,), np.nan, ">f8"),
            np.zeros(2, [("a", "f4")]),
            "text",
            np.asarray([True, False]),
        )
    )


def mutate_hdf5(rng: Random, data: bytes) -> bytes:
    """Edit attributes, links and datasets; a description inside is edited as JSON."""
    import h5py

    from deploykit.load.hdf5 import refuse_heaps

    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    buffer = io.BytesIO(data)
    refuse_heaps(buffer, "what an earlier mutation made")  # libhdf5 would hang here, where nothing stops it
    with h5py.File(buffer, "r+") as file:
        if "model_config" in file.attrs and rng.random() < 0.5:
            text = mutate_json(rng, file.attrs["model_config"].encode()).decode("utf-8", "replace").replace("\0", "?")
            del file.attrs["model_config"]
            with contextlib.suppress(OSError, RuntimeError):  # too long for an attribute
                file.attrs["model_config"] = text
            return _closed(file, buffer)
        names: list[str] = [""]
        file.visit(lambda name: names.append(name))
        name = rng.choice(names)
        item = file[name] if name else file
        edit = rng.choice(("attribute", "attribute", "attribute", "delete", "move", "replace", "link", "reshape"))
        owners = [n for n in names if (file[n] if n else file).attrs]
        if edit == "attribute" and owners:
            owner = file[chosen] if (chosen := rng.choice(owners)) else file
            key = rng.choice(sorted(owner.attrs))
            new = _attribute(rng, key, owner.attrs[key])
            if rng.random() < 0.15:
                del owner.attrs[key]
            else:
                owner.attrs[key] = new
        elif name and edit == "delete":
            del file[name]
        elif name and edit == "move":
            target = rng.choice(names[1:]) + "_"
            if not target.startswith(f"{name}/"):
                file.move(name, target)
        elif name and edit == "link":
            del file[name]
            others = [n for n in names[1:] if n != name and not n.startswith(f"{name}/")] or ["nowhere"]
            kinds = (
                h5py.SoftLink(f"/{rng.choice(others)}"),
                h5py.SoftLink("/nowhere"),
                h5py.ExternalLink("/etc/hostname", "/"),
                h5py.ExternalLink("other.h5", "/x"),
            )
            file[name] = rng.choice(kinds)
        elif name and edit == "reshape" and isinstance(item, h5py.Dataset):
            shape = rng.choice(((1 << 40,), (1 << 20, 1 << 20), (4096, 3000), (0,), (1,) * 20))
            del file[name]
            file.create_dataset(
                name, shape, "f4", chunks=tuple(min(n, 64) or 1 for n in shape), maxshape=(None,) * len(shape)
            )
        elif name:
            group = isinstance(item, h5py.Group)
            del file[name]
            if group or rng.random() < 0.6:
                file[name] = _dataset(rng)
            else:
                file.create_group(name)
        return _closed(file, buffer)


def _closed(file: Any, buffer: io.BytesIO) -> bytes:
    file.close()
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------- mutating zips


def mutate_zip(rng: Random, data: bytes) -> bytes:
    """Edit a member by its own kind, or the list of members; or the bytes of the whole."""
    if rng.random() < 0.15:
        return mutate_bytes(rng, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    edit = rng.choice(("config.json", "config.json", "config.json", "model.weights.h5", "metadata.json", "list"))
    method = zipfile.ZIP_STORED
    if edit == "list":
        place = rng.randrange(len(members))
        name, content = members[place]
        which = rng.choice(("drop", "rename", "add", "pack", "empty", "exchange"))
        if which == "drop":
            members.pop(place)
        elif which == "rename":
            members[place] = (
                rng.choice((name.upper(), f"../{name}", f"a/{name}", "model.weights.npz", "a\\..\\b")),
                content,
            )
        elif which == "add":
            new = rng.choice(
                ("assets/x", "../evil", "/evil", "C:evil", "assets/../../evil", "x\0y", "model.weights.npz")
            )
            members.append((new, rng.choice((b"", content, pickle.dumps(os.getcwd)))))
        elif which == "empty":
            members[place] = (name, b"")
        elif which == "exchange":
            members[place] = (name, rng.choice(members)[1])
        else:
            method = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    else:
        change = mutate_hdf5 if edit.endswith("h5") else mutate_json
        members = [(name, change(rng, content) if name == edit else content) for name, content in members]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------- mutating folders


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes((*out, number))


def _described(rng: Random, data: bytes) -> bytes:
    """``keras_metadata.pb`` with one description edited: field 1 of the file, field 5 of the record."""
    from deploykit.load.savedmodel import _fields

    records = []
    for _, span in _fields(data, slice(0, len(data))):
        records.append([(number, data[v] if isinstance(v, slice) else v) for number, v in _fields(data, span)])
    chosen = records[0] if rng.random() < 0.6 else rng.choice(records)
    for place, (number, value) in enumerate(chosen):
        if number == 5 and value:
            chosen[place] = (number, mutate_json(rng, value))
    out = b""
    for record in records:
        body = b""
        for number, value in record:
            packed = _varint(value) if isinstance(value, int) else _varint(len(value)) + value
            body += _varint(number << 3 | (0 if isinstance(value, int) else 2)) + packed
        out += b"\x0a" + _varint(len(body)) + body
    return out


def _regrown(rng: Random, folder: Path) -> None:
    """One edge of the tree of objects leads elsewhere or has another name."""
    import savedmodel_files

    def change(tree: Any) -> None:
        node = rng.choice([node for node in tree.nodes if node.children])
        child = rng.choice(list(node.children))
        if rng.random() < 0.5:
            child.node_id = rng.choice((0, len(tree.nodes) - 1, rng.randrange(len(tree.nodes))))
        else:
            child.local_name = rng.choice(("kernel", "layer-0", "layer-1", "cell", "", "a/b", "vars", "_kernel"))

    rng.choice((savedmodel_files.edit, savedmodel_files.regraph))(folder, change)


def _reindexed(rng: Random, folder: Path) -> None:
    """One entry of the checkpoint's index lies."""
    import savedmodel_files

    chosen, numbers = rng.random(), (0, 1, 7, 2**20, 2**31, 2**62)
    what = rng.choice(("offset", "size", "shard_id", "dtype", "crc32c", "dim"))
    number = rng.choice(numbers)

    def change(key: str, entry: Any) -> None:
        if random.Random(f"{key}{chosen}").random() > 0.3:
            return
        if what == "dim":
            entry.shape.dim.add().size = number
        else:
            setattr(entry, what, min(number, 2**31 - 1) if what not in ("offset", "size") else number)

    savedmodel_files.reindex(folder, change)


def _rewired(rng: Random, folder: Path) -> None:
    """One node of the graph, or of its functions, is another operation, reads another tensor, or lies about itself."""
    import savedgraph_files

    sizes, numbers = (0, 1, 3, -1, -5, 2**20, 2**31, 2**62), (0, 1, 2, 3, 7, 19, 20, 99)
    operations = (
        "Relu",
        "MatMul",
        "Reshape",
        "Fill",
        "While",
        "StatefulPartitionedCall",
        "ReadFile",
        "Const",
        "",
        "Range",
    )

    def change(meta: Any) -> None:
        functions = list(meta.graph_def.library.function)
        body = rng.choice([meta.graph_def.node, *(function.node_def for function in functions if function.node_def)])
        node = rng.choice(list(body))
        what = rng.choice(("op", "input", "drop", "repeat", "attribute", "attribute", "attribute", "lose", "signature"))
        if what == "op":
            node.op = rng.choice((*operations, rng.choice(list(body)).op, *(f.signature.name for f in functions)))
        elif what == "input" and node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice(
                (rng.choice(list(body)).name, "", "^x", "a:b:c", ":9")
            )
        elif what == "drop":
            body.remove(node)
        elif what == "repeat":
            body.add().CopyFrom(node)
        elif what == "lose" and functions:
            meta.graph_def.library.function.remove(rng.choice(functions))
        elif what == "signature":
            info = rng.choice(list(rng.choice(list(meta.signature_def.values())).inputs.values()) or [None])
            if info is not None:
                info.tensor_shape.dim.add(size=rng.choice(sizes))
                info.dtype = rng.choice(numbers)
        elif node.attr:
            attribute = node.attr[rng.choice(sorted(node.attr))]
            kind = attribute.WhichOneof("value")
            if kind == "type":
                attribute.type = rng.choice(numbers)
            elif kind == "i":
                attribute.i = rng.choice(sizes)
            elif kind == "func" and functions:
                attribute.func.name = rng.choice((rng.choice(functions).signature.name, "nowhere", "AddV2"))
            elif kind == "tensor":
                attribute.tensor.tensor_shape.dim.add(size=rng.choice(sizes))
            elif kind == "shape":
                attribute.shape.dim.add(size=rng.choice(sizes))
            else:
                attribute.Clear()

    savedgraph_files.rewritten(folder, change)


def mutate_folder(rng: Random, folder: Path) -> None:
    metadata = folder / "keras_metadata.pb"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    edit = rng.choice(("described", "described", "described", "grown", "indexed", "bytes", "bytes", "drop", "swap"))
    if edit == "described" and metadata.exists():
        metadata.write_bytes(_described(rng, metadata.read_bytes()))
    elif edit == "described":  # there is nothing but the graph
        _rewired(rng, folder)
    elif edit == "grown":
        _regrown(rng, folder)
    elif edit == "indexed":
        _reindexed(rng, folder)
    elif edit == "drop":
        rng.choice(files).unlink()
    elif edit == "swap":
        rng.choice(files).write_bytes(rng.choice(files).read_bytes())
    else:
        chosen = rng.choice(files)
        chosen.write_bytes(mutate_bytes(rng, chosen.read_bytes()))


def mutate(rng: Random, path: Path) -> None:
    """One mutation in place; what an earlier one left unreadable gets bytes."""
    state = rng.getstate()
    try:
        if path.is_dir():
            mutate_folder(rng, path)
            return
        data = path.read_bytes()
        change = mutate_zip if data[:2] == b"PK" else mutate_hdf5 if data[:4] == b"\x89HDF" else mutate_json
        path.write_bytes(change(rng, data))
    except Exception:  # an earlier mutation broke it too much for this one
        rng.setstate(state)
        if path.is_file():
            path.write_bytes(mutate_bytes(rng, path.read_bytes()))


# --------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """Everything about it follows from the seed and the number."""

    seed: int
    number: int

    @property
    def rng(self) -> Random:
        return Random(f"{self.seed}:{self.number}")

    def drawn(self) -> tuple[Kind, str, str, int, int]:
        """Kind, its name, net, how many mutations, and what they are drawn from."""
        rng = self.rng
        kind, net = rng.choice(sorted(KINDS)), rng.choice(sorted(NETS))
        return KINDS[kind], kind, net, rng.choice((1, 1, 1, 2, 3)), rng.getrandbits(64)

    def make(self, seeds: Path, folder: Path, leave_out: frozenset[int] = frozenset()) -> tuple[Path, Path | None]:
        """Write the case's file below ``folder``; returns what is loaded and the weights for it."""
        kind, _, net, count, entropy = self.drawn()
        name = kind.source.format(net)
        target = folder / name
        if (seeds / name).is_dir():
            shutil.copytree(seeds / name, target)
        else:
            shutil.copyfile(seeds / name, target)
        for step in range(count):
            if step not in leave_out:
                mutate(Random(f"{entropy}:{step}"), target)
        if kind.model is not None:
            return seeds / kind.model.format(net), target
        return target, seeds / kind.weights.format(net) if kind.weights else None


@dataclass(frozen=True)
class Outcome:
    """``verdict``: loaded, refused, or how it failed. ``where``: the exception and deploykit's functions around it."""

    verdict: str
    said: str = ""
    where: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def fine(self) -> bool:
        return self.verdict in ("loaded", "refused")

    @property
    def known(self) -> bool:
        return not KNOWN.isdisjoint(self.where)


def _tops() -> frozenset[str]:
    return frozenset(name.partition(".")[0] for name in sys.modules)


REACHING = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "ctypes.dlopen")
CHANGING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate")


def _watch(folder: Path, deeds: list[str]) -> None:
    """Note what Python does from here on that no file may bring about."""
    known, inside = _tops(), str(folder)

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event == "import":
            if str(details[0]).partition(".")[0] not in known:
                deeds.append(f"imports {details[0]}")
        elif event == "open":
            path, _, flags = details
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and isinstance(path, (str, bytes)) and not os.fsdecode(path).startswith((inside, "/dev/null")):
                deeds.append(f"opens {os.fsdecode(path)} to write")
        elif event in CHANGING:
            paths = [os.fsdecode(part) for part in details[:2] if isinstance(part, (str, bytes))]
            if isinstance(details[-1], int) and details[-1] >= 0 and event in ("os.remove", "os.rmdir"):
                paths = [os.path.join(os.readlink(f"/proc/self/fd/{details[-1]}"), path) for path in paths]
            if paths and not any(path.startswith(inside) for path in paths):
                deeds.append(f"{event} {paths[0]}")
        elif event in REACHING or event == "pickle.find_class":
            deeds.append(f"{event} {details[:2]!r}"[:200])

    sys.addaudithook(hook)


def _places_of(error: BaseException) -> tuple[str, ...]:
    """The exception and the functions of deploykit that it came through, outermost first."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/deploykit/" in f.filename]
    return (type(error).__name__, *(f"{f.filename.rpartition('/deploykit/')[2]}:{f.name}" for f in frames))


def _load(path: Path, weights: Path | None) -> Any:
    from deploykit.load import load

    return load(path, weights=weights)


def verdict(path: Path, weights: Path | None, load: Callable[[Path, Path | None], Any] = _load) -> Outcome:
    """In the child: what an exception, or none, means."""
    from deploykit.errors import DeploykitError

    try:
        load(path, weights)
    except DeploykitError as error:
        said = str(error)
        if not said or "\n" in said or not said.isprintable() or len(said) > MAX_LINE:
            return Outcome("no clear line", repr(said[: 2 * MAX_LINE]), _places_of(error))
        if error.exit_code != 2:
            return Outcome("exit code", f"{error.exit_code}: {said}", _places_of(error))
        return Outcome("refused", said)
    except BaseException as error:
        text = "".join(traceback.format_exception(error)[-6:])
        return Outcome("exception", text, _places_of(error))
    return Outcome("loaded")


Loader = Callable[[Path, Path | None], Outcome]


def _child(path: Path, weights: Path | None, folder: Path, answer: int, loader: Loader) -> None:
    """Never returns."""
    try:
        os.chdir(folder / "cwd")
        quiet = os.open(folder / "said", os.O_WRONLY | os.O_CREAT)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        tempfile.tempdir = str(folder / "tmp")
        os.environ["TMPDIR"] = tempfile.tempdir
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        deeds: list[str] = []
        _watch(folder / "tmp", deeds)
        outcome = loader(path, weights)
        deeds += [f"leaves {name}" for place in ("tmp", "cwd") for name in os.listdir(folder / place)]
        if deeds:
            outcome = Outcome(
                "deed", "; ".join(deeds[:5]) + f" ({outcome.verdict}: {outcome.said[:300]})", ("deed", "?")
            )
        with os.fdopen(answer, "wb") as stream:
            pickle.dump(outcome, stream)
    finally:
        os._exit(0)


def run(
    path: Path, weights: Path | None, folder: Path, loader: Loader = verdict, timeout_s: float = TIMEOUT_S
) -> Outcome:
    """Load in a child and say how it ended."""
    for name in ("tmp", "cwd"):
        (folder / name).mkdir(exist_ok=True)
    read, write = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(read)
        _child(path, weights, folder, write, loader)
    os.close(write)
    pieces = []
    while (left := start + timeout_s - time.monotonic()) > 0 and select.select([read], [], [], left)[0]:
        if not (piece := os.read(read, 1 << 16)):
            break
        pieces.append(piece)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        return Outcome("hang", f"more than {timeout_s:.0f} s", ("hang",), timeout_s)
    os.close(read)
    _, status = os.waitpid(child, 0)
    seconds = time.monotonic() - start
    if not pieces:
        said = (folder / "said").read_text("utf-8", "replace")[-600:] if (folder / "said").exists() else ""
        name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {status}"
        return Outcome("crash", f"{name}: {said}", (name,), seconds)
    found: Outcome = pickle.loads(b"".join(pieces))
    return Outcome(found.verdict, found.said, found.where, seconds)


def attempt(case: Case, seeds: Path, leave_out: frozenset[int] = frozenset(), keep: Path | None = None) -> Outcome:
    """Make a case in a folder of its own and run it; ``keep``: where its file goes."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        folder = Path(scratch)
        path, weights = case.make(seeds, folder, leave_out)
        if keep is not None:
            for thing in filter(None, (path, weights)):
                place = keep / f"{case.seed}-{case.number}-{thing.name}"
                shutil.rmtree(place, ignore_errors=True)
                shutil.copytree(thing, place) if thing.is_dir() else shutil.copyfile(thing, place)
        return run(path, weights, folder)


def smallest(case: Case, seeds: Path, failed: Outcome) -> frozenset[int]:
    """Which mutations the failure does not need."""
    out: frozenset[int] = frozenset()
    for step in range(case.drawn()[3]):
        if attempt(case, seeds, out | {step}).where == failed.where:
            out |= {step}
    return out


def prepare() -> None:
    """Import what loading imports, so that a child has it; nothing is computed."""
    os.environ.update(QUIET)
    sys.path.insert(0, str(TESTS.parent))
    sys.path.insert(0, str(TESTS))
    for name in (
        *(
            "deploykit.load",
            "deploykit.cli",
            "savedmodel_files",
            "h5py",
            "pickle",
            "numpy.random",
            "scipy",
            "fractions",
        ),
        *("tensorflow.core.protobuf.saved_model_pb2", "lzma", "bz2", "zoneinfo", "optree", "pydoc", "getpass"),
    ):
        with contextlib.suppress(ImportError):
            __import__(name)


def written(folder: Path) -> Path:
    """The valid files in a folder; written there once, whoever asks first."""
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            script = [sys.executable, "-W", "ignore", __file__, "--write", str(folder)]
            made = subprocess.run(script, capture_output=True, text=True, check=False, env={**os.environ, **QUIET})
            if made.returncode:
                raise RuntimeError(made.stderr[-2000:])
            (folder / "done").touch()
    return folder


@contextlib.contextmanager
def seeds(folder: Path | None) -> Iterator[Path]:
    """The valid files, and a module that a file could have imported."""
    with tempfile.TemporaryDirectory(prefix="fuzz-seeds-") as scratch:
        modules = Path(scratch, "modules")
        modules.mkdir()
        (modules / f"{CANARY}.py").write_text("class Thing:\n    pass\n")
        sys.path.append(str(modules))
        yield written(folder or Path(scratch, "valid"))
        sys.path.remove(str(modules))


def valid_files_load(folder: Path) -> str | None:
    """Why nothing would be tested: a valid file that does not load."""
    for kind, row in KINDS.items():
        for net in NETS:
            name, other = (row.model, row.source) if row.model else (row.source, row.weights)
            with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
                weights = folder / other.format(net) if other else None
                outcome = run(folder / name.format(net), weights, Path(scratch))
            if outcome.verdict != "loaded" and (kind, net) != NOT_EVEN_KERAS:
                return f"the valid {kind} of {net}: {outcome.verdict} {outcome.said}"
    return None


def fuzz(
    seed: int, numbers: Iterator[int], seconds: float, folder: Path, keep: Path | None, say: Callable[[str], None]
) -> int:
    """Run cases until there are no more, or the time is over; returns how many failed."""
    start, counted = time.monotonic(), Counter[str]()
    failed = 0
    for number in numbers:
        if time.monotonic() - start > seconds:
            break
        case = Case(seed, number)
        outcome = attempt(case, folder)
        counted[outcome.verdict if outcome.fine else "known" if outcome.known else "failed"] += 1
        if outcome.fine or outcome.known:
            continue
        failed += 1
        out = smallest(case, folder, outcome)
        if keep is not None:
            attempt(case, folder, out, keep)
        _, kind, net, count, _ = case.drawn()
        what = f"{outcome.verdict} {(*outcome.where[:1], *outcome.where[-1:])}"
        say(f"case {seed}:{number} ({kind}, {net}, {count - len(out)} mutations): {what}")
        say("    " + outcome.said.strip().replace("\n", "\n    "))
    spent = time.monotonic() - start
    total = sum(counted.values())
    say(f"seed {seed}: {total} cases in {spent:.0f} s ({total / spent:.1f} per second): {dict(counted)}")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of single cases")
    parser.add_argument("--kind", nargs="*", choices=sorted(KINDS), default=sorted(KINDS), help="of these kinds alone")
    parser.add_argument("--keep", type=Path, default=None, help="folder for failing files")
    parser.add_argument("--valid", type=Path, default=None, help="folder for the valid files, to use them again")
    parser.add_argument("--write", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write is not None:
        write_seeds(options.write)
        return 0
    if options.cases == 10**9 and options.seconds == float("inf") and not options.only:
        options.cases = 200
    seed = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    keep = options.keep or Path(tempfile.gettempdir(), "deploykit-fuzz")
    keep.mkdir(parents=True, exist_ok=True)
    print(f"seed {seed}; failing files go to {keep}", flush=True)
    with seeds(options.valid) as folder:
        prepare()
        if (why := valid_files_load(folder)) is not None:
            print(why, flush=True)
            return 2
        drawn = (n for n in itertools.count(options.start) if Case(seed, n).drawn()[1] in options.kind)
        numbers = iter(options.only or itertools.islice(drawn, options.cases))
        failed = fuzz(seed, numbers, options.seconds, folder, keep, lambda line: print(line, flush=True))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
