"""Published attacks on loading Keras models, through every door that older generations open: nothing must happen.

Each attack is a real file whose payload writes a marker, imports a module of ours that writes it, or opens a path.
It must be refused in one line, or load without the part that is the attack; in both cases nothing may have happened:
no marker, no import, no process, no file opened that the attack names (an audit hook looks on).

What Keras 3's own `.keras` and `.h5` files can attempt is in `test_load`, folders that lie in `test_savedmodel`, what
changes under `migrate`'s hands in `test_migrate`. Here: HDF5 of Keras 2 and tf.keras, tf-keras archives, SavedModel
metadata, descriptions beside weights, wrappers, operations in the graph, containers, and ONNX candidates.
"""

from __future__ import annotations

import base64
import importlib
import io
import json
import marshal
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fuzzing
import h5py
import keras
import numpy as np
import onnx
import pytest
import savedmodel_files
from onnx import TensorProto, helper
from test_load import TRICKS

from deploykit.errors import CustomObjectError, DeploykitError, LoadError, UnsafeModelError, UnsupportedModelError
from deploykit.load import legacy, load
from deploykit.load.contents import MAX_CONFIG_DEPTH

migrating = importlib.import_module("deploykit.migrate")
Config = dict[str, Any]
Edit = Callable[[Config, "Payload"], Any]

ROUTES = ("h5", "keras", "folder", "json")


# ------------------------------------------------------------------------------------------------- the watchman


class Watchman:
    """Sees what Python does while it is armed. Audit hooks cannot be removed, so there is one."""

    EVENTS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class")

    def __init__(self) -> None:
        self.armed: Payload | None = None
        self.seen: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, details: tuple[Any, ...]) -> None:
        if self.armed is None:
            return
        named = (str(self.armed.secret), str(self.armed.marker))
        if event == "import" and str(details[0]).startswith(self.armed.module):
            self.seen.append(f"imports {details[0]}")
        elif event in self.EVENTS or (event == "open" and str(details[0]) in named):
            self.seen.append(f"{event} {details[0]}")


class Payload:
    """What an attack tries: to write ``marker``, to import ``module`` (which writes it), to read ``secret``."""

    def __init__(self, folder: Path) -> None:
        self.marker = folder / "marker"
        self.secret = folder / "secret.txt"
        self.module = f"deploykit_attack_{abs(hash(folder.name)):x}"
        self.secret.write_text("apple\npear\n")
        (folder / f"{self.module}.py").write_text(
            f"open({str(self.marker)!r}, 'w').close()\ndef f(*a, **k): return a[0]\nclass Thing:\n    pass\n"
        )

    @property
    def bytecode(self) -> list[Any]:
        """A lambda as Keras 2 wrote it: marshalled code in base64, defaults, closure."""
        code = eval(f"lambda x: (open({str(self.marker)!r}, 'w').close(), x)[1]").__code__
        return [base64.b64encode(marshal.dumps(code)).decode(), None, None]

    @property
    def lambda_layer(self) -> Config:
        inner = {"name": "lam", "function": self.bytecode, "function_type": "lambda", "module": "__main__"}
        return {"class_name": "Lambda", "config": {**inner, "output_shape": None, "arguments": {}}}

    @property
    def lambda_value(self) -> Config:
        code, defaults, closure = self.bytecode
        return {"class_name": "__lambda__", "config": {"code": code, "defaults": defaults, "closure": closure}}

    @property
    def pickled(self) -> bytes:
        marker = str(self.marker)

        class Bomb:
            def __reduce__(self) -> Any:
                return (open, (marker, "w"))

        return pickle.dumps(np.array([Bomb()], dtype=object))


_WATCHMAN = Watchman()


@pytest.fixture
def payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Payload]:
    """The payload of a test; whatever it did by the end fails the test."""
    found = Payload(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    _WATCHMAN.armed, _WATCHMAN.seen = found, []
    try:
        yield found
    finally:
        _WATCHMAN.armed = None
    assert not found.marker.exists()
    assert found.module not in sys.modules
    assert _WATCHMAN.seen == []


def test_the_payloads_are_live(tmp_path, monkeypatch):
    """Run on purpose, each leaves the marker: a test that sees none has seen something."""
    found = Payload(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, found.module, raising=False)
    code = marshal.loads(base64.b64decode(found.bytecode[0]))
    for act in (
        lambda: types.FunctionType(code, {})(1),
        lambda: importlib.import_module(found.module),
        lambda: pickle.loads(found.pickled),
    ):
        found.marker.unlink(missing_ok=True)
        act()
        assert found.marker.exists()


# --------------------------------------------------------------------------------------------------- the files


@pytest.fixture(scope="session")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Valid files of every kind (`fuzzing.write_seeds`), written once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    return fuzzing.written((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "attacked")


def repacked(path: Path, **members: bytes | None) -> Path:
    """Replace, add or (None) leave out members; ``__`` stands for the dot of a name."""
    changes = {name.replace("__", "."): content for name, content in members.items()}
    return repacked_as(path, changes)


def repacked_as(path: Path, changes: dict[str, bytes | None]) -> Path:
    with zipfile.ZipFile(path) as archive:
        before = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**before, **changes}.items():
            if content is not None:
                archive.writestr(name, content)
    return path


def described(valid: Path, tmp_path: Path, route: str, change: Callable[[Config], Any], net: str = "branches") -> Path:
    """A valid file of an older generation whose description is changed."""
    name = {"h5": "{}_old.h5", "keras": "{}_old.keras", "folder": "{}_old_folder", "json": "{}_old.json"}[route]
    source, target = valid / name.format(net), tmp_path / f"attack.{route}"
    if route == "folder":
        shutil.copytree(source, target)
        savedmodel_files.redescribe(target, lambda document: _in_folder(document, change))
        return target
    shutil.copyfile(source, target)
    if route == "h5":
        with h5py.File(target, "r+") as file:
            config = json.loads(file.attrs["model_config"])
            file.attrs["model_config"] = json.dumps(change(config) or config)
    elif route == "keras":
        with zipfile.ZipFile(target) as archive:
            config = json.loads(archive.read("config.json"))
        repacked(target, config__json=json.dumps(change(config) or config).encode())
    else:
        config = json.loads(target.read_text())
        target.write_text(json.dumps(change(config) or config))
    return target


def _in_folder(document: Config, change: Callable[[Config], Any]) -> None:
    """A folder's description of a model says it twice."""
    model = document.get("model_config") or {key: document[key] for key in ("class_name", "config")}
    model = change(model) or model
    document.update({key: model[key] for key in ("class_name", "config")}, model_config=model)


def options(valid: Path, route: str, net: str = "branches") -> dict[str, Any]:
    return {"weights": valid / f"{net}_old_weights.h5"} if route == "json" else {}


def refused(path: Path, error: type[DeploykitError], **further: Any) -> str:
    """The one line that it is refused with."""
    with pytest.raises(DeploykitError) as caught:
        load(path, **further)
    text = str(caught.value)
    assert type(caught.value) is error, text
    assert caught.value.exit_code == 2
    assert text.isprintable()
    assert len(text) < 700
    return text


def layer(config: Config, name: str) -> Config:
    return next(item for item in config["config"]["layers"] if item["config"]["name"] == name)


# ------------------------------------------------------------------------------------------ edits of descriptions


def _instead(kind: str, **config: Any) -> Edit:
    """Another layer in the place of the PReLU."""
    return lambda c, p: layer(c, "bend").update(class_name=kind, config={"name": "bend", **config})


def _lambda(**changes: Any) -> Edit:
    """A Lambda in the place of the PReLU."""

    def edit(config: Config, payload: Payload) -> None:
        new = payload.lambda_layer
        new["config"].update(name="bend", **changes)
        layer(config, "bend").update(new)

    return edit


def _wrapped(kind: str, key: str = "layer", listed: bool = False, **more: Any) -> Edit:
    """A wrapper that holds a Lambda."""

    def edit(config: Config, payload: Payload) -> None:
        inner: Any = [payload.lambda_layer] if listed else payload.lambda_layer
        layer(config, "bend").update(class_name=kind, config={"name": "bend", **more, key: inner})

    return edit


def _argument(key: str, value: Any) -> Edit:
    """An argument of the Dense layer; ``value`` may be a function of the payload."""
    return lambda c, p: layer(c, "left")["config"].update({key: value(p) if callable(value) else value})


def _function(module: str | None, name: str) -> Config:
    return {"module": module, "class_name": "function", "config": name, "registered_name": name}


def _dense(**more: Any) -> Config:
    return {"class_name": "Dense", "config": {"name": "inner", "units": 2, **more}}


def _nested(config: Config, payload: Payload) -> None:
    inner = {"name": "bend", "layers": [{"class_name": "Activation", "config": {"name": "a", "activation": "relu"}}]}
    inner["layers"].append(payload.lambda_layer)
    layer(config, "bend").update(class_name="Sequential", config=inner)


def _normal_form(config: Config, payload: Payload) -> None:
    """What only deploykit writes between its own stages, written into the file."""
    evil = {"module": "os", "class_name": "system", "config": f"touch {payload.marker}", "registered_name": None}
    model = {
        "model": "Sequential",
        "name": "s",
        "trainable": True,
        "input": None,
        "layers": [{"name": "l", "layer": evil}],
    }
    layer(config, "left")["config"]["units"] = {"nested": model}


def _operation(function: str, *arguments: Any) -> Edit:
    """A TensorFlow function in the place of the PReLU."""

    def edit(config: Config, payload: Payload) -> None:
        entry = layer(config, "bend")
        entry.update(class_name="TFOpLambda", config={"name": "bend", "function": function})
        entry["inbound_nodes"] = [["_CONSTANT_VALUE", -1, str(payload.marker), {"contents": "x"}]]

    return edit


def _raw(op: str) -> Edit:
    def edit(config: Config, payload: Payload) -> None:
        node = {"name": "bend", "op": op, "input": ["x"], "attr": {"token": {"s": "cHlmdW5jXzA="}}}
        entry = {"name": "bend", "node_def": node, "constants": {"0": str(payload.marker)}}
        layer(config, "bend").update(class_name="TensorFlowOpLayer", config=entry)

    return edit


CODE: dict[str, tuple[Edit, type[DeploykitError], str]] = {
    # Lambda
    "bytecode (CVE-2025-9905)": (_lambda(), UnsafeModelError, "Lambda"),
    "get_file as a Lambda (CVE-2025-8747)": (
        _lambda(function=_function("keras.utils", "get_file"), function_type="function"),
        UnsafeModelError,
        "Lambda",
    ),
    "a Lambda by the name of a function": (_lambda(function="system", module="os"), UnsafeModelError, "Lambda"),
    "bytecode for the shape": (
        _lambda(function="relu", output_shape_type="lambda", output_shape=["4wAA", None, None]),
        UnsafeModelError,
        "Lambda",
    ),
    # a Lambda in something
    "in TimeDistributed": (_wrapped("TimeDistributed"), UnsafeModelError, "Lambda"),
    "in Bidirectional": (_wrapped("Bidirectional"), UnsafeModelError, "Lambda"),
    "backwards": (_wrapped("Bidirectional", "backward_layer", layer=_dense()), UnsafeModelError, "Lambda"),
    "as a cell": (_wrapped("RNN", "cell"), UnsafeModelError, "Lambda"),
    "as one of the cells": (_wrapped("StackedRNNCells", "cells", listed=True), UnsafeModelError, "Lambda"),
    "in cells in an RNN": (
        lambda c, p: layer(c, "bend").update(
            class_name="RNN",
            config={"name": "bend", "cell": {"class_name": "StackedRNNCells", "config": {"cells": [p.lambda_layer]}}},
        ),
        UnsafeModelError,
        "Lambda",
    ),
    "pruned": (_wrapped("PruneLowMagnitude"), UnsafeModelError, "Lambda"),
    "in SpectralNormalization": (_wrapped("SpectralNormalization"), UnsafeModelError, "Lambda"),
    "in a nested model": (_nested, UnsafeModelError, "Lambda"),
    "as an activation": (_argument("activation", lambda p: p.lambda_layer), UnsafeModelError, "Lambda"),
    # names of functions
    "bytecode as an activation": (_argument("activation", lambda p: p.lambda_value), UnsafeModelError, "bytecode"),
    "a built-in by its package": (_argument("activation", "builtins>eval"), CustomObjectError, "builtins>eval"),
    "a built-in": (_argument("activation", "eval"), CustomObjectError, "eval"),
    "a function of the system": (_argument("activation", "os.system"), CustomObjectError, "os.system"),
    "a function by its module": (_argument("activation", _function("os", "system")), CustomObjectError, "system"),
    "a module of ours": (_argument("activation", lambda p: _function(p.module, "f")), CustomObjectError, "f"),
    "get_file": (_argument("activation", _function("keras.utils", "get_file")), CustomObjectError, "get_file"),
    "safe mode off (CVE-2025-9906)": (
        _argument("activation", _function("keras.config", "enable_unsafe_deserialization")),
        CustomObjectError,
        "enable_unsafe_deserialization",
    ),
    # names of classes
    "a registered name of a built-in": (_instead("builtins>eval"), CustomObjectError, "builtins>eval"),
    "os>system": (_instead("os>system"), CustomObjectError, "os>system"),
    "a Keras class as a custom one": (_instead("Custom>Dense", units=2), CustomObjectError, "Custom>Dense"),
    "a path for a name": (_instead("keras.layers.Dense", units=2), CustomObjectError, "keras.layers.Dense"),
    "a function of Keras": (_instead("get_file", origin="http://127.0.0.1:9/x"), CustomObjectError, "get_file"),
    "an optimizer": (_instead("SGD"), CustomObjectError, "SGD"),
    "a class in a module of ours": (
        lambda c, p: layer(c, "bend").update(
            module=p.module, class_name="Thing", registered_name=f"{p.module}>Thing", config={"name": "bend"}
        ),
        CustomObjectError,
        "Thing",
    ),
    "a class deeper inside (CVE-2025-1550)": (
        _argument("units", {"module": "os", "class_name": "system", "config": "true"}),
        UnsafeModelError,
        "os.system",
    ),
    "deploykit's own intermediate form": (_normal_form, UnsafeModelError, "os.system"),
    # layers that load something
    "a graph from elsewhere": (_instead("TFSMLayer", filepath="/tmp/x"), UnsafeModelError, "from a path"),
    "a module of TensorFlow Hub": (_instead("KerasLayer", handle="/tmp/x"), UnsupportedModelError, "TensorFlow Hub"),
    "a pickled module": (_instead("TorchModuleWrapper", module="gASV"), UnsafeModelError, "pickled"),
    "a JAX function": (_instead("JaxLayer", call_fn=_function("os", "system")), UnsafeModelError, "calls a function"),
    "feature columns": (_instead("DenseFeatures"), UnsupportedModelError, "feature columns"),
    # files that are read (CVE-2025-12058)
    "a vocabulary": (
        lambda c, p: _instead("StringLookup", vocabulary=str(p.secret))(c, p),
        UnsafeModelError,
        "as its vocabulary",
    ),
    "a vocabulary of numbers": (
        lambda c, p: _instead("IntegerLookup", vocabulary=str(p.secret))(c, p),
        UnsafeModelError,
        "as its vocabulary",
    ),
    "weights of words": (
        lambda c, p: _instead("TextVectorization", vocabulary=["a"], idf_weights=str(p.secret))(c, p),
        UnsafeModelError,
        "as its idf_weights",
    ),
    "a vocabulary in a wrapper": (
        lambda c, p: _instead(
            "TimeDistributed", layer={"class_name": "TextVectorization", "config": {"vocabulary": str(p.secret)}}
        )(c, p),
        UnsafeModelError,
        "as its vocabulary",
    ),
    # types
    "a type for the input": (
        lambda c, p: layer(c, "image")["config"].update(dtype={"class_name": "TypeSpec", "config": {"name": "x"}}),
        UnsupportedModelError,
        "",
    ),
    "a type in a layer": (
        _argument("units", {"class_name": "TypeSpec", "type_spec": "x", "serialized": []}),
        UnsafeModelError,
        "TensorFlow type",
    ),
    # models
    "a model of ours": (lambda c, p: c.update(class_name=f"{p.module}>M"), UnsupportedModelError, "code of its own"),
    # operations of the graph
    **{
        f"tf.{name}": (_operation(name), UnsupportedModelError, name.replace("'", ""))
        for name in (
            *("io.read_file", "io.write_file", "py_function", "numpy_function", "load_library", "load_op_library"),
            *("raw_ops.ReadFile", "compat.v1.py_func", "io.gfile.remove", "saved_model.load", "os.system"),
            *("keras.utils.get_file", "__class__.__mro__", "nn.__builtins__", "autograph.to_graph", "eval"),
        )
    },
    **{
        f"the operation {name}": (_raw(name), UnsupportedModelError, name)
        for name in ("ReadFile", "WriteFile", "PyFunc", "EagerPyFunc", "PyFuncStateless", "MatchingFiles", "Assert")
    },
}  # fmt: skip

LOOSE = {  # refused by another error than the table says, depending on the door; always in one line
    "a type for the input",
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", CODE)
def test_what_would_run_something_is_refused(case, route, valid, tmp_path, payload):
    edit, error, words = CODE[case]
    path = described(valid, tmp_path, route, lambda config: edit(config, payload))
    if case in LOOSE:
        with pytest.raises(DeploykitError) as caught:
            load(path, **options(valid, route))
        assert caught.value.exit_code == 2
        assert str(caught.value).isprintable()
        return
    text = refused(path, error, **options(valid, route))
    assert words in text
    if error is UnsafeModelError:
        assert "--allow-code" in text


# What is left out or never looked at: the model is the same without it.
IGNORED: dict[str, Edit] = {
    "bytecode as an initializer": _argument("kernel_initializer", lambda p: p.lambda_value),
    "bytecode as a regularizer": _argument("bias_regularizer", lambda p: p.lambda_value),
    "a Lambda as a constraint": _argument("kernel_constraint", lambda p: p.lambda_layer),
    "get_file as a regularizer": _argument("kernel_regularizer", _function("keras.utils", "get_file")),
    "a class of ours as a regularizer": _argument(
        "kernel_regularizer", lambda p: {"module": p.module, "class_name": "Thing", "config": {}}
    ),
    "a built-in as an initializer": _argument("kernel_initializer", "builtins>eval"),
    "a dotted name as a constraint": _argument("kernel_constraint", "os.system"),
    "a module beside a Keras class": lambda c, p: layer(c, "left").update(module=p.module, registered_name="os>system"),
    "a training configuration": lambda c, p: c.update(
        compile_config={"optimizer": p.lambda_layer, "loss": _function(p.module, "f")},
        training_config={"loss": {"module": p.module, "class_name": "Thing", "config": {}}},
    ),
    "a loss in the model": lambda c, p: c["config"].update(
        loss=p.lambda_layer, metrics=[{"module": p.module, "class_name": "Thing", "config": {}}]
    ),
    "how a layer was built": lambda c, p: layer(c, "left").update(
        build_config={"module": "os", "class_name": "system", "config": "true"}
    ),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", IGNORED)
def test_what_only_training_needs_is_never_built(case, route, valid, tmp_path, payload):
    path = described(valid, tmp_path, route, lambda config: IGNORED[case](config, payload))
    model = load(path, **options(valid, route)).model
    plain = load(_plain(valid, route)).model
    for mine, theirs in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def _plain(valid: Path, route: str) -> Path:
    return valid / {"folder": "branches_old_folder", "keras": "branches_old.keras"}.get(route, "branches_old.h5")


def idle(function: str, **arguments: Any) -> Callable[[Config, Payload], None]:
    """A call of a TensorFlow function on constants, on which no output depends: tf_keras calls it as it loads."""

    def edit(config: Config, payload: Payload) -> None:
        entry = {"class_name": "TFOpLambda", "name": "idle", "config": {"name": "idle", "function": function}}
        node = ["_CONSTANT_VALUE", -1, str(payload.marker), arguments]
        config["config"]["layers"].append({**entry, "inbound_nodes": [node]})

    return edit


@pytest.mark.parametrize("route", ROUTES)
def test_what_no_output_depends_on_is_not_built(route, valid, tmp_path, payload):
    """Neither a Lambda, nor an operation, nor a class of the user's."""

    def edit(config: Config) -> None:
        idle("io.write_file", contents="x")(config, payload)
        for name, entry in (("i1", payload.lambda_layer), ("i2", {"class_name": "Own", "config": {}})):
            entry = {**entry, "name": name, "config": {**entry["config"], "name": name}}
            config["config"]["layers"].append({**entry, "inbound_nodes": [[["image", 0, 0, {}]]]})

    loaded = load(described(valid, tmp_path, route, edit), **options(valid, route))
    assert {"idle", "i1", "i2"}.isdisjoint(found.name for found in loaded.model.layers)


@pytest.mark.parametrize("case", TRICKS)
def test_a_description_of_keras_3_alone_is_judged_alike(case, valid, tmp_path, payload):
    """The tricks of `test_load` in a JSON beside its weights: `model_from_json` has no safe mode of its own."""
    from test_load import net

    model = net()
    model.save_weights(tmp_path / "w.weights.h5")
    config = json.loads(model.to_json())
    change, words = TRICKS[case]
    change(config)
    (tmp_path / "net.json").write_text(json.dumps(config))
    assert words in refused(tmp_path / "net.json", UnsafeModelError, weights=tmp_path / "w.weights.h5")


def test_code_in_a_weights_file_that_is_a_whole_model_is_never_looked_at(valid, tmp_path, payload):
    """Only the arrays of ``--weights`` count: what its own description says is not built."""
    edit = TF_KERAS_ONLY["a Lambda that no output depends on"][1]
    for route in ("h5", "keras"):
        other = described(valid, tmp_path, route, lambda config: edit(config, payload))
        load(valid / "branches_old.json", weights=other)


@pytest.mark.parametrize("route", ROUTES)
def test_the_command_line_says_it_in_one_line(route, cli, valid, tmp_path, payload):
    path = described(valid, tmp_path, route, lambda config: _lambda()(config, payload))
    further = [flag for pair in options(valid, route).items() for flag in (f"--{pair[0]}", pair[1])]
    for verb in (["inspect"], ["fuse", "-o", tmp_path / "out.keras"], ["migrate", "-o", tmp_path / "out.keras"]):
        code, out, err = cli(verb[0], path, *verb[1:], *further)
        assert (code, out) == (2, ""), err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert not (tmp_path / "out.keras").exists()


# ------------------------------------------------------------------------------------- from_config and safe mode


@pytest.mark.parametrize("unsafe", [False, True])
def test_layers_rebuilt_later_are_rebuilt_in_safe_mode(valid, payload, unsafe):
    """`from_config` has no safe mode of its own: it follows the scope, and where there is none the process."""
    loaded = load(valid / "branches_old.h5")
    before = keras.src.saving.serialization_lib.in_safe_mode()
    config = {"name": "l", "function": {"class_name": "__lambda__", "config": payload.lambda_value["config"]}}
    if unsafe:
        keras.config.enable_unsafe_deserialization()
    try:
        with loaded.scope(), pytest.raises(ValueError, match=r"unsafe|safe_mode"):
            keras.layers.Lambda.from_config(config)
    finally:
        keras.src.backend.common.global_state.set_global_attribute("safe_mode_saving", before)


def test_the_builder_has_a_lock_of_its_own(payload):
    """Were the scan to miss a Lambda, Keras' safe mode still holds."""
    function = {"class_name": "__lambda__", "config": payload.lambda_value["config"]}
    lam = legacy.config.serialised("layers", "Lambda", {"name": "l", "function": function})
    shape = {"name": "i", "input": {"batch_shape": [None, 2], "dtype": "float32", "sparse": False}}
    model = {
        "model": "Sequential",
        "name": "s",
        "trainable": True,
        "input": shape,
        "layers": [{"name": "l", "layer": lam}],
    }
    with pytest.raises(ValueError, match=r"unsafe|safe_mode"):
        legacy.build(model, {}, what="x", safe_mode=True)


# ----------------------------------------------------------------------------------------- what tf_keras must not see


@pytest.fixture
def no_tf_keras(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*arguments: Any, **further: Any) -> Any:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", started)


TF_KERAS_ONLY: dict[str, tuple[str, Edit]] = {
    "a Lambda that no output depends on": (
        "h5",
        lambda c, p: c["config"]["layers"].append(
            {**p.lambda_layer, "name": "lam", "inbound_nodes": [[["image", 0, 0, {}]]]}
        ),
    ),
    "bytecode as a regularizer": ("keras", IGNORED["bytecode as a regularizer"]),
    "a Lambda as a constraint": ("h5", IGNORED["a Lambda as a constraint"]),
    "a class of a module as a regularizer": ("keras", IGNORED["a class of ours as a regularizer"]),
    "a module beside a Keras class": ("keras", IGNORED["a module beside a Keras class"]),
    "a function of Keras as a regularizer": ("keras", IGNORED["get_file as a regularizer"]),
    "a function of tf_keras as a regularizer": (
        "keras",
        _argument("kernel_regularizer", _function("tf_keras.utils", "get_file")),
    ),
    "a file that is written while loading": ("h5", idle("io.write_file", contents="x")),
    "a library that is loaded while loading": ("keras", idle("load_op_library")),
    "an operation in a description": ("json", idle("io.write_file", contents="x")),
    "an operation in the folder's description": ("folder", idle("io.write_file", contents="x")),
}  # fmt: skip


@pytest.mark.parametrize("case", TF_KERAS_ONLY)
def test_tf_keras_never_sees_what_was_left_out_of_the_new_model(case, valid, tmp_path, payload, no_tf_keras):
    """The file loads here, because the attack is in a part that Keras 3 layers do without."""
    route, edit = TF_KERAS_ONLY[case]
    path = described(valid, tmp_path, route, lambda config: edit(config, payload))
    loaded = load(path, **options(valid, route))
    with pytest.raises(UnsupportedModelError, match=r"not run|whose graph tf_keras runs"):
        migrating.migrate(loaded, tmp_path / "new.keras", weights=options(valid, route).get("weights"))
    assert not (tmp_path / "new.keras").exists()


def test_a_folder_is_shown_to_tf_keras_only_where_code_is_allowed(valid, tmp_path, no_tf_keras):
    """Whatever its description says: tf_keras makes each layer of its own record, and runs the graph beside them."""
    path = described(valid, tmp_path, "folder", lambda config: None)
    with pytest.raises(UnsupportedModelError, match="--allow-code"):
        migrating.migrate(load(path), tmp_path / "new.keras")
    assert not (tmp_path / "new.keras").exists()


def test_a_file_that_is_two_is_the_same_one_to_everybody(valid, tmp_path, payload, monkeypatch):
    """HDF5 with an archive behind it: what tf_keras reads must be what was judged."""
    path = tmp_path / "two.keras"
    path.write_bytes((valid / "chain_old.h5").read_bytes() + (valid / "branches_old.keras").read_bytes())
    jobs: list[Config] = []

    def finished(room: Path, what: str) -> None:
        jobs.append(json.loads((room / "job.json").read_text()))
        raise UnsupportedModelError("enough")

    monkeypatch.setattr(migrating, "_finished", finished)
    loaded = load(path)
    with pytest.raises(UnsupportedModelError, match="enough"):
        migrating.migrate(loaded, tmp_path / "new.keras")
    assert Path(jobs[0]["model"]).suffix == {"keras": ".keras", "hdf5": ".h5"}[loaded.format]


# --------------------------------------------------------------------------------------------- containers that lie


@pytest.mark.parametrize(
    "member", ["../../evil.txt", "/tmp/evil.txt", "assets/../../../evil", "C:\\evil", "\\\\host\\x"]
)
def test_an_archive_of_tf_keras_leads_nowhere(member, valid, tmp_path, payload):
    path = repacked_as(shutil.copyfile(valid / "branches_old.keras", tmp_path / "m.keras"), {member: b"x"})
    assert "leaves the archive" in refused(Path(path), UnsafeModelError)


def test_a_bomb_in_an_archive_of_tf_keras_is_not_unpacked(valid, tmp_path, payload):
    path = tmp_path / "m.keras"
    with zipfile.ZipFile(valid / "branches_old.keras") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, bytes(64 << 20) if name == "model.weights.h5" else old.read(name))
    tracemalloc.start()
    try:
        assert "would unpack to 64 MiB" in refused(path, UnsafeModelError)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def _external_link(file: h5py.File, group: h5py.Group) -> None:
    group["elsewhere"] = h5py.ExternalLink("/etc/hostname", "/")


def _soft_link(file: h5py.File, group: h5py.Group) -> None:
    group["elsewhere"] = h5py.SoftLink("/")


def _external_data(file: h5py.File, group: h5py.Group) -> None:
    group.create_dataset("elsewhere", (4,), "f4", external=[("/etc/hostname", 0, 16)])


def _virtual_data(file: h5py.File, group: h5py.Group) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", (4,))
    group.create_virtual_dataset("elsewhere", layout)


def _absurd(file: h5py.File, group: h5py.Group) -> None:
    group.create_dataset("elsewhere", (1 << 40,), "f4", chunks=(1024,))


POINTERS = {
    "external link": (_external_link, "ExternalLink"),
    "soft link": (_soft_link, "SoftLink"),
    "external data": (_external_data, "in another file"),
    "virtual data": (_virtual_data, "in another file"),
    "a shape": (_absurd, "declares"),
}


@pytest.mark.parametrize("door", ["whole", "weights", "archive", "weights in an archive"])
@pytest.mark.parametrize("case", POINTERS)
def test_arrays_of_an_older_file_lie_in_it(case, door, valid, tmp_path, payload):
    change, words = POINTERS[case]
    archived = "archive" in door
    buffer = io.BytesIO()
    if archived:
        with zipfile.ZipFile(valid / "branches_old.keras") as archive:
            buffer = io.BytesIO(archive.read("model.weights.h5"))
    else:
        name = "branches_old.h5" if door == "whole" else "branches_old_weights.h5"
        buffer = io.BytesIO((valid / name).read_bytes())
    with h5py.File(buffer, "r+") as file:
        change(file, file[sorted(file)[0]])
    path = tmp_path / "m.bin"
    if archived:
        shutil.copyfile(valid / "branches_old.keras", path)
        repacked(path, model__weights__h5=buffer.getvalue())
    else:
        path.write_bytes(buffer.getvalue())
    if door.startswith("weights"):
        assert words in refused(valid / "branches_old.json", UnsafeModelError, weights=path)
    else:
        assert words in refused(path, UnsafeModelError)


REPEATED = 24  # times 60 MiB


def _many_names(file: h5py.File) -> None:
    """One array that is declared and not stored, just below the limit, named many times."""
    group = file.get("model_weights", file)
    left = group["left"]
    left.create_dataset("big", (60 << 18,), "f4", chunks=(1 << 16,))
    left.attrs["weight_names"] = np.asarray([b"big"] * REPEATED)


def _many_arrays(file: h5py.File) -> None:
    group = file.get("model_weights", file)
    left = group["left"]
    names = [f"big{number}" for number in range(REPEATED)]
    for name in names:
        left.create_dataset(name, (60 << 18,), "f4", chunks=(1 << 16,))
    left.attrs["weight_names"] = np.asarray([name.encode() for name in names])


HUNGRY = {"one array, many names": _many_names, "many arrays": _many_arrays}


@pytest.mark.parametrize("door", ["whole", "weights"])
@pytest.mark.parametrize("case", HUNGRY)
def test_arrays_that_the_model_has_no_place_for_are_not_read(case, door, valid, tmp_path, payload):
    path = tmp_path / "m.h5"
    shutil.copyfile(valid / ("branches_old.h5" if door == "whole" else "branches_old_weights.h5"), path)
    with h5py.File(path, "r+") as file:
        HUNGRY[case](file)
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    try:
        if door == "whole":
            refused(path, LoadError)
        else:
            refused(valid / "branches_old.json", LoadError, weights=path)
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("route", ["h5", "keras", "json"])  # of a folder: test_savedmodel
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_hostile_depth_is_counted_before_anything_is_parsed(opening, route, valid, tmp_path, payload):
    deep = opening * 1000 + "1" + {"[": "]", '{"a":': "}"}[opening] * 1000
    text = '{"class_name": "Functional", "keras_version": "2.15.0", "config": ' + deep + "}"
    if route == "h5":
        path = Path(shutil.copyfile(valid / "branches_old.h5", tmp_path / "m.h5"))
        with h5py.File(path, "r+") as file:
            file.attrs["model_config"] = text
    elif route == "keras":
        path = repacked(Path(shutil.copyfile(valid / "branches_old.keras", tmp_path / "m")), config__json=text.encode())
    else:
        path = tmp_path / "m.json"
        path.write_text(text)
    assert f"limit is {MAX_CONFIG_DEPTH}" in refused(path, LoadError, **options(valid, route))


@pytest.mark.parametrize("kind", ["TimeDistributed", "Bidirectional", "PruneLowMagnitude", "Sequential"])
def test_wrappers_within_wrappers_end_in_one_line(kind, valid, tmp_path, payload):
    """As deep as the description may be; each level costs every stage a few calls."""

    def change(config: Config) -> None:
        inner = layer(config, "left")
        entry = {"class_name": "Dense", "config": inner["config"]}
        for level in range(60):
            wrapped = {"layers": [entry]} if kind == "Sequential" else {"layer": entry}
            entry = {"class_name": kind, "config": {"name": f"w{level}", **wrapped}}
        entry["config"]["name"] = "left"
        inner.update(entry)

    path = described(valid, tmp_path, "h5", change)
    if kind in ("PruneLowMagnitude", "Sequential"):  # these may be nested
        assert load(path).model.get_layer("left") is not None
    else:
        refused(path, LoadError)


# -------------------------------------------------------------------------------------------------------- pickles


def _npz(payload: Payload) -> bytes:
    """An .npz with a pickled object, as np.savez(allow_pickle) writes it."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("image.npy", header.getvalue() + payload.pickled)
    return buffer.getvalue()


def test_pickles_as_weights_are_not_read(valid, tmp_path, payload):
    (tmp_path / "w.npz").write_bytes(_npz(payload))
    (tmp_path / "w.pkl").write_bytes(payload.pickled)
    assert "zip without a Keras model" in refused(valid / "branches.json", LoadError, weights=tmp_path / "w.npz")
    assert "neither" in refused(valid / "branches.json", LoadError, weights=tmp_path / "w.pkl")
    assert "neither" in refused(tmp_path / "w.pkl", LoadError)


@pytest.mark.parametrize("name", ["branches.keras", "branches_old.keras"])
def test_pickled_weights_in_an_archive_are_not_read(name, valid, tmp_path, payload):
    path = Path(shutil.copyfile(valid / name, tmp_path / "m.keras"))
    repacked_as(path, {"model.weights.h5": None, "model.weights.npz": _npz(payload)})
    refused(path, LoadError)


def test_pickles_as_samples_are_not_read(cli, valid, tmp_path, payload):
    (tmp_path / "x.npz").write_bytes(_npz(payload))
    for verb in ("check", "fuse", "migrate"):
        further = [valid / "branches_old.keras"] if verb == "check" else ["-o", tmp_path / "out.keras"]
        code, _, err = cli(verb, valid / "branches_old.h5", *further, "--data", tmp_path / "x.npz")
        assert code == 2
        assert "Python objects, which are never read" in err
        assert err.count("\n") == 1
        assert not (tmp_path / "out.keras").exists()


# ----------------------------------------------------------------------------------------------------------- ONNX


def _candidate(folder: Path, location: str, length: int = 8 * 4) -> Path:
    """y = x + w, whose w is said to lie at ``location``."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[length // 4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    spec = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", length // 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", spec[:1], spec[1:], [tensor])
    path = folder / "model.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString())
    return path


@pytest.mark.parametrize("case", ["absolute", "parent", "link", "linked folder", "missing", "too long"])
def test_arrays_of_an_onnx_candidate_lie_beside_it(case, cli, tmp_path, payload):
    inside, outside = tmp_path / "candidate", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "w.bin").write_bytes(np.arange(8, dtype="f4").tobytes())
    location = {"absolute": str(outside / "w.bin"), "parent": "../outside/w.bin", "linked folder": "d/w.bin"}.get(
        case, "w"
    )
    if case == "link":
        (inside / "w").symlink_to(outside / "w.bin")
    elif case == "linked folder":
        (inside / "d").symlink_to(outside)
    elif case == "too long":
        (inside / "w").write_bytes(b"abcd")
    path = _candidate(inside, location)
    inputs = keras.Input((8,), name="x")
    keras.Model(inputs, keras.layers.ReLU(name="y")(inputs)).save(tmp_path / "reference.keras")
    code, out, err = cli("check", tmp_path / "reference.keras", path)
    assert (code, out) == (2, ""), (out, err)
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert onnx.load(path, load_external_data=False).graph.initializer[0].name == "w"
