"""Loading: what comes in well, what is refused in one line, and that a file never gets to run anything."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

from deploykit.errors import CustomObjectError, DeploykitError, LoadError, UnsafeModelError, UnsupportedModelError
from deploykit.load import load, nonfinite_weights, refuse_rewriting
from deploykit.load.contents import MAX_CONFIG_DEPTH

REAL = Path(__file__).parents[2] / "shared" / "models"
Config = dict[str, Any]

CUSTOM = """
import keras

@keras.saving.register_keras_serializable(package="shop")
class Scale(keras.layers.Layer):
    def call(self, x):
        return 2.0 * x

class Shift(keras.layers.Layer):
    def call(self, x):
        return x + 1.0

def bend(x):
    return keras.ops.tanh(x)

def touch(marker):
    open(marker, "w").close()
"""


def net() -> keras.Model:
    inputs = keras.Input((6,), name="x")
    hidden = keras.layers.Dense(4, activation="relu", name="first")(inputs)
    hidden = keras.layers.BatchNormalization(name="norm")(hidden)
    return keras.Model(inputs, keras.layers.Dense(2, name="last")(hidden), name="net")


def save(model: keras.Model, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    model = net()
    rng = np.random.default_rng(1)
    model.set_weights([rng.uniform(0.5, 1.5, w.shape).astype(w.dtype) for w in model.get_weights()])
    save(model, folder / "net.keras")
    save(model, folder / "net.h5")
    model.save_weights(folder / "net.weights.h5")
    return folder


def message(path: Path | str, error: type[DeploykitError], **options: Any) -> str:
    """The one line that loading fails with."""
    with pytest.raises(DeploykitError) as caught:
        load(path, **options)
    text = str(caught.value)
    assert type(caught.value) is error, text
    assert "\n" not in text
    assert len(text) < 700
    shown = Path(path).name.replace("\0", "?")  # an error is safe to print
    assert shown in text or "custom objects" in text
    return text


def rezip(source: Path, target: Path, changes: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive with members replaced, added or (None) left out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            if name not in changes:
                new.writestr(name, old.read(name))
        for name, text in changes.items():
            if text is not None:
                new.writestr(name, text)
    return target


def reconfigured(folder: Path, tmp_path: Path, kind: str, change: Callable[[Config], None]) -> Path:
    """The small net with its description changed, as an archive or as HDF5."""
    target = tmp_path / f"changed.{kind}"
    if kind == "keras":
        with zipfile.ZipFile(folder / "net.keras") as archive:
            config = json.loads(archive.read("config.json"))
        change(config)
        return rezip(folder / "net.keras", target, {"config.json": json.dumps(config).encode()})
    shutil.copy(folder / "net.h5", target)
    with h5py.File(target, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        change(config)
        file.attrs["model_config"] = json.dumps(config)
    return target


def layer(config: Config, name: str) -> Config:
    return next(item for item in config["config"]["layers"] if item["config"]["name"] == name)


# --- what loads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name", "format"),
    [
        ("net.keras", "net.keras", "keras"),
        ("net.h5", "net.h5", "hdf5"),
        ("net.keras", "net.h5", "keras"),  # the extension lies: the content decides
        ("net.h5", "net.keras", "hdf5"),
        ("net.h5", "net.weights.h5", "hdf5"),
        ("net.h5", "net.model", "hdf5"),
        ("net.keras", "net", "keras"),
    ],
)
def test_content_decides_the_reader(folder: Path, tmp_path: Path, source: str, name: str, format: str) -> None:
    path = tmp_path / name
    shutil.copy(folder / source, path)
    loaded = load(path)
    assert (loaded.format, loaded.path, loaded.bytes) == (format, path, path.stat().st_size)
    assert loaded.saved_by == keras.__version__
    assert len(loaded.sha256) == 64
    assert not loaded.training_config_found
    expected = keras.models.load_model(folder / source, compile=False)
    for mine, theirs in zip(loaded.model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", ["compiled.keras", "compiled.h5"])
def test_a_training_configuration_is_reported_and_not_used(tmp_path: Path, name: str) -> None:
    model = net()
    model.compile("adam", "mse")
    loaded = load(save(model, tmp_path / name))
    assert loaded.training_config_found
    assert not loaded.model.compiled


def test_a_custom_loss_at_the_top_does_not_matter(folder: Path, tmp_path: Path) -> None:
    def change(config: Config) -> None:
        config["compile_config"] = {"optimizer": "adam", "loss": {"module": "m", "class_name": "Mine", "config": {}}}

    assert load(reconfigured(folder, tmp_path, "keras", change)).training_config_found


@pytest.mark.parametrize(
    ("name", "saved_by", "outputs"),
    [
        ("mlperf_tiny_resnet.h5", "2.4.0", 10),
        ("tiny_xception_kdef.hdf5", "2.0.5", 7),
        ("resnet1d_keras36.keras", "3.6.0", None),
    ],
)
def test_real_files_load(name: str, saved_by: str, outputs: int | None) -> None:
    if not (REAL / name).exists():
        pytest.skip("the folder of real models is not here")
    loaded = load(REAL / name)
    assert loaded.saved_by == saved_by
    assert outputs in (None, loaded.model.output_shape[-1])


def test_everything_keras_can_say_about_a_layer_is_allowed(tmp_path: Path) -> None:
    """No false alarm: operations, nested models, wrappers, regularizers, policies, masks, lookups, shared layers."""
    image = keras.Input((8, 8, 3))
    x = keras.layers.Rescaling(1 / 255)(image)
    x = keras.layers.Conv2D(4, 3, kernel_regularizer="l2", kernel_constraint=keras.constraints.MaxNorm(2.0))(x)
    x = keras.layers.SeparableConv2D(4, 3, activation=keras.activations.gelu, dtype="mixed_float16")(x)
    x = keras.ops.abs(x) / 2 + keras.ops.mean(x, axis=(1, 2), keepdims=True)
    shared = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, activation="swish")], name="shared")
    x = keras.layers.Flatten()(x[:, 1:3])
    x = keras.layers.Dense(4, kernel_initializer=keras.initializers.HeNormal(seed=1))(x)
    x = keras.layers.Add()([shared(x), shared(keras.ops.relu(x))])
    words = keras.Input((5,), dtype="int32")
    w = keras.layers.Embedding(9, 4, mask_zero=True)(words)
    w = keras.layers.Bidirectional(keras.layers.LSTM(3))(w)
    nested = keras.Sequential([keras.Input((6,)), keras.layers.SpectralNormalization(keras.layers.Dense(2))])
    nested.compile("adam", keras.losses.MeanSquaredError(), metrics=["mae"])
    model = keras.Model([image, words], keras.layers.Concatenate()([x, nested(w)]))
    loaded = load(save(model, tmp_path / "all.keras"))
    assert loaded.model.count_params() == model.count_params()


def test_a_string_lookup_with_its_words_inside_loads(tmp_path: Path) -> None:
    inputs = keras.Input((1,), dtype="string")
    model = keras.Model(inputs, keras.layers.StringLookup(vocabulary=["a", "b"])(inputs))
    assert load(save(model, tmp_path / "words.keras")).model.layers[-1].get_vocabulary() == ["[UNK]", "a", "b"]


@pytest.mark.parametrize("source", ["net.weights.h5", "net.h5", "net.keras"])
@pytest.mark.parametrize("name", ["other.bin", "other.weights.h5"])
def test_weights_fill_the_model(folder: Path, tmp_path: Path, source: str, name: str) -> None:
    fresh = save(net(), tmp_path / "fresh.keras")
    other = Path(shutil.copy(folder / source, tmp_path / name))
    loaded = load(fresh, weights=other)
    expected = load(folder / "net.keras").model.get_weights()
    np.testing.assert_array_equal(loaded.model.get_weights()[0], expected[0])
    assert any("weights filled from" in notice for notice in loaded.notices)


def test_weights_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    other = keras.Sequential([keras.Input((6,)), keras.layers.Dense(9)])
    with pytest.raises(LoadError, match="do not fit the model"):
        load(save(other, tmp_path / "other.keras"), weights=folder / "net.weights.h5")


# --- bad files, one line each -------------------------------------------------------------------------------------


def _truncated(name: str, share: float) -> Callable[[Path, Path], Path]:
    def make(folder: Path, tmp_path: Path) -> Path:
        whole = (folder / name).read_bytes()
        path = tmp_path / name
        path.write_bytes(whole[: int(len(whole) * share)])
        return path

    return make


def _bytes(name: str, content: bytes) -> Callable[[Path, Path], Path]:
    def make(_: Path, tmp_path: Path) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return make


def _zip(**members: bytes) -> Callable[[Path, Path], Path]:
    def make(_: Path, tmp_path: Path) -> Path:
        with zipfile.ZipFile(tmp_path / "some.keras", "w") as archive:
            for name, content in members.items():
                archive.writestr(name.replace("__", "."), content)
        return tmp_path / "some.keras"

    return make


def _folder(name: str) -> Callable[[Path, Path], Path]:
    def make(_: Path, tmp_path: Path) -> Path:
        (tmp_path / "saved").mkdir()
        (tmp_path / "saved" / name).write_bytes(b"")
        return tmp_path / "saved"

    return make


def _without(member: str) -> Callable[[Path, Path], Path]:
    return lambda folder, tmp_path: rezip(folder / "net.keras", tmp_path / "net.keras", {member: None})


def _with(member: str, content: bytes, *dropped: str) -> Callable[[Path, Path], Path]:
    changes = {**dict.fromkeys(dropped), member: content}
    return lambda folder, tmp_path: rezip(folder / "net.keras", tmp_path / "net.keras", changes)


def _h5(change: Callable[[h5py.File], None]) -> Callable[[Path, Path], Path]:
    def make(folder: Path, tmp_path: Path) -> Path:
        path = tmp_path / "net.h5"
        shutil.copy(folder / "net.h5", path)
        with h5py.File(path, "r+") as file:
            change(file)
        return path

    return make


def _empty_h5(_: Path, tmp_path: Path) -> Path:
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["samples"] = np.zeros(3)
    return tmp_path / "data.h5"


def _deep(opening: str, closing: str, levels: int = 100_000) -> bytes:
    return b'{"class_name": "Functional", "config": ' + (opening * levels + "1" + closing * levels).encode() + b"}"


def _drop(key: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[key]

    return change


def _unset(key: str) -> Callable[[h5py.File], None]:
    return lambda file: file.attrs.__delitem__(key)


def _no_utf8(file: h5py.File) -> None:
    file.attrs.create("model_config", b'{"class_name": "\xff"}', dtype=h5py.string_dtype("utf-8"))


def _weights_alone(file: h5py.File) -> None:
    del file.attrs["model_config"]
    file.move("model_weights", "layers")


def _set(key: str, value: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file.attrs[key] = value

    return change


BAD: dict[str, tuple[Callable[[Path, Path], Path], type[DeploykitError], str]] = {
    "missing": (lambda folder, _: folder / "nope.keras", LoadError, "there is no file"),
    "remote": (lambda folder, _: Path("hf:/somebody/net.keras"), LoadError, "there is no file"),
    "plain folder": (_folder("notes.txt"), LoadError, "a folder without a model"),
    "SavedModel": (_folder("saved_model.pb"), LoadError, "saved_model.pb"),
    "unpacked": (_folder("config.json"), UnsupportedModelError, "unpacked"),
    "empty": (_bytes("empty.keras", b""), LoadError, "is empty"),
    "text": (_bytes("notes.h5", b"not a model\n" * 50), LoadError, "neither a .keras archive nor an HDF5 file"),
    "null byte": (lambda folder, _: Path("a\0net.keras"), LoadError, "net.keras"),
    "cut .keras": (_truncated("net.keras", 0.6), LoadError, "truncated or damaged archive"),
    "cut HDF5": (_truncated("net.h5", 0.6), LoadError, "truncated HDF5"),
    "stub HDF5": (_truncated("net.h5", 0.01), LoadError, "truncated HDF5"),
    "other zip": (_zip(readme__txt=b"hello"), LoadError, "a zip without a Keras model (it holds readme.txt)"),
    "empty zip": (_zip(), LoadError, "it holds nothing"),
    "no weights": (_without("model.weights.h5"), LoadError, "holds no weights"),
    "weights are text": (_with("model.weights.h5", b"text"), LoadError, "damaged or truncated HDF5"),
    "weights are no npz": (_with("model.weights.npz", b"PK", "model.weights.h5"), LoadError, "Keras cannot load"),
    "config is text": (_with("config.json", b"text"), LoadError, "no valid JSON"),
    "config is a list": (_with("config.json", b"[]"), LoadError, "describes no model"),
    "config is UTF-16": (_with("config.json", '{"class_name": "A"}'.encode("utf-16")), LoadError, "no valid JSON"),
    "config names a number": (_with("config.json", b'{"class_name": 3}'), LoadError, "describes no model"),
    "inner number": (_with("config.json", b'{"class_name":"A","b":{"class_name":3}}'), LoadError, "is damaged"),
    "config is a layer": (
        _with("config.json", b'{"module":"keras.layers","class_name":"ReLU","config":{}}'),
        LoadError,
        "not a model",
    ),
    "config of nothing": (_with("config.json", b'{"class_name":"Functional","config":null}'), LoadError, "Keras"),
    "deep lists": (_with("config.json", _deep("[", "]")), LoadError, "levels deep"),
    "deep objects": (_with("config.json", _deep('{"a":', "}")), LoadError, "levels deep"),
    "weights only": (
        lambda folder, tmp_path: Path(shutil.copy(folder / "net.weights.h5", tmp_path / "w.h5")),
        LoadError,
        "weights only",
    ),
    "old weights only": (_h5(_weights_alone), LoadError, "weights only"),
    "HDF5 data": (_empty_h5, LoadError, "without a Keras model (it holds samples)"),
    "HDF5 without weights": (_h5(_drop("model_weights")), LoadError, "holds no weights"),
    "HDF5 layer gone": (_h5(_drop("model_weights/first")), LoadError, "Keras cannot load"),
    "HDF5 config no text": (_h5(_set("model_config", np.arange(4))), LoadError, "without a Keras model"),
    "HDF5 config no JSON": (_h5(_set("model_config", "{")), LoadError, "no valid JSON"),
    "HDF5 config no UTF-8": (_h5(_no_utf8), LoadError, "no valid JSON"),
    "HDF5 deep": (_h5(_set("model_config", _deep("[", "]", 20_000).decode())), LoadError, "levels deep"),
    "not of Keras 1": (_h5(_set("keras_version", "1.2.2")), UnsupportedModelError, "code of its own"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_line_with_a_remedy(case: str, folder: Path, tmp_path: Path) -> None:
    make, error, words = BAD[case]
    assert words in message(make(folder, tmp_path), error)


def test_a_file_that_lost_its_version_is_known_by_its_form(folder: Path, tmp_path: Path) -> None:
    path = _h5(_unset("keras_version"))(folder, tmp_path)
    assert (load(path).saved_by, load(path).generation) == (None, 3)


def test_an_unreadable_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "secret.keras"
    path.write_bytes(b"PK\x03\x04")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this account reads everything")
    assert "cannot read" in message(path, LoadError)


def test_hostile_depth_is_refused_whatever_the_recursion_limit(folder: Path, tmp_path: Path) -> None:
    path = rezip(folder / "net.keras", tmp_path / "deep.keras", {"config.json": _deep("[", "]", 200_000)})
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1_000_000)  # with this limit the JSON parser itself overflows the C stack
    try:
        assert f"limit is {MAX_CONFIG_DEPTH}" in message(path, LoadError)
    finally:
        sys.setrecursionlimit(before)


def test_brackets_in_strings_are_no_depth(folder: Path, tmp_path: Path) -> None:
    def change(config: Config) -> None:
        config["config"]["layers"][1]["note"] = "[" * 1000 + '"\\' + "{" * 1000

    assert load(reconfigured(folder, tmp_path, "keras", change)).format == "keras"


@pytest.mark.parametrize("name", ["unbuilt.keras", "unbuilt.h5"])
@pytest.mark.parametrize("built", [False, True])
def test_a_sequential_without_input_shape(tmp_path: Path, name: str, built: bool) -> None:
    model = keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(2)])
    if built:
        model(np.zeros((1, 4), "float32"))
    path = save(model, tmp_path / name)
    if built:
        assert load(path).model.count_params() == 23
    else:
        assert "no known input shape" in message(path, LoadError)


def test_a_sequential_of_keras_2_that_was_built_by_its_first_batch(tmp_path: Path) -> None:
    """The weights are there, the input shape is not."""
    path = save(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="only")]), tmp_path / "m.h5")
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        config["config"].pop("build_input_shape", None)
        config["config"]["layers"] = [layer(config, "only")]
        file.attrs["model_config"] = json.dumps(config)
    assert "no known input shape" in message(path, LoadError)


@pytest.mark.parametrize("name", ["newer.keras", "newer.h5"])
def test_a_newer_keras_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    def change(config: Config) -> None:
        layer(config, "first").update(class_name="Denser")

    path = reconfigured(folder, tmp_path, name.partition(".")[2], change)
    if name.endswith("h5"):
        with h5py.File(path, "r+") as file:
            file.attrs["keras_version"] = "3.99.0"
    else:
        path = rezip(path, tmp_path / name, {"metadata.json": b'{"keras_version": "3.99.0"}'})
    text = message(path, UnsupportedModelError)
    assert "the newer Keras 3.99.0" in text
    assert "Denser" in text


# --- containers that lie ------------------------------------------------------------------------------------------


def _bomb_name(name: str) -> Callable[[Path, Path], Path]:
    return _with(name, b"x")


def _zip_bomb(folder: Path, tmp_path: Path) -> Path:
    return rezip(folder / "net.keras", tmp_path / "b.keras", {"assets/a": bytes(40 << 20)}, zipfile.ZIP_DEFLATED)


def _sum_bomb(folder: Path, tmp_path: Path) -> Path:
    """Members that share their bytes: each unpacks honestly, all together to hundreds of times the file."""
    path = tmp_path / "sum.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", bytes(1 << 20))
        for index in range(150):
            again = zipfile.ZipInfo(f"b{index}")
            again.file_size = again.compress_size = 1 << 20
            again.header_offset = again.CRC = 0
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
    return path


def _twice(folder: Path, tmp_path: Path) -> Path:
    path = rezip(folder / "net.keras", tmp_path / "twice.keras", {})
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("config.json", b"{}")
    return path


def _encrypted(folder: Path, tmp_path: Path) -> Path:
    path = rezip(folder / "net.keras", tmp_path / "locked.keras", {})
    raw = bytearray(path.read_bytes())
    at = raw.find(b"PK\x01\x02")
    raw[at + 8] |= 1
    path.write_bytes(raw)
    return path


def _external_link(file: h5py.File) -> None:
    file["model_weights/first/more"] = h5py.ExternalLink("/etc/hostname", "/")


def _soft_link(file: h5py.File) -> None:
    file["model_weights/soft"] = h5py.SoftLink("/model_weights/first")


def _external_data(file: h5py.File) -> None:
    file.create_dataset("model_weights/outside", (4,), "f4", external=[("/etc/hostname", 0, 16)])


def _virtual_data(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", (4,))
    file.create_virtual_dataset("model_weights/elsewhere", layout)


def _shape_bomb(file: h5py.File) -> None:
    file.create_dataset("model_weights/huge", (1 << 40,), "f4", chunks=(1024,))


def _inner(change: Callable[[h5py.File], None], compression: int) -> Callable[[Path, Path], Path]:
    """The weights inside an archive, changed."""

    def make(folder: Path, tmp_path: Path) -> Path:
        buffer = io.BytesIO((folder / "net.weights.h5").read_bytes())
        with h5py.File(buffer, "r+") as file:
            file.create_group("model_weights/first")
            change(file)
        return rezip(folder / "net.keras", tmp_path / "in.keras", {"model.weights.h5": buffer.getvalue()}, compression)

    return make


LIES: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "parent": (_bomb_name("../../evil.txt"), "leaves the archive"),
    "absolute": (_bomb_name("/tmp/evil.txt"), "leaves the archive"),
    "backslash": (_bomb_name("assets\\..\\..\\evil.txt"), "leaves the archive"),
    "drive": (_bomb_name("C:evil.txt"), "leaves the archive"),
    "zip bomb": (_zip_bomb, "'assets/a' would unpack to 40 MiB"),
    "shared bytes": (_sum_bomb, "in all"),
    "twice": (_twice, "two members 'config.json'"),
    "external link": (_h5(_external_link), "ExternalLink"),
    "soft link": (_h5(_soft_link), "SoftLink"),
    "external data": (_h5(_external_data), "in another file"),
    "virtual data": (_h5(_virtual_data), "in another file"),
    "shape bomb": (_h5(_shape_bomb), "declares"),
    "inner link": (_inner(_external_link, zipfile.ZIP_STORED), "ExternalLink"),
    "inner link, packed": (_inner(_external_link, zipfile.ZIP_DEFLATED), "ExternalLink"),
    "inner data": (_inner(_external_data, zipfile.ZIP_STORED), "in another file"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_container_that_lies_is_refused(case: str, folder: Path, tmp_path: Path) -> None:
    make, words = LIES[case]
    assert words in message(make(folder, tmp_path), UnsafeModelError)


def test_an_encrypted_archive_is_refused(folder: Path, tmp_path: Path) -> None:
    assert "an encrypted member" in message(_encrypted(folder, tmp_path), LoadError)


def test_weights_files_get_the_same_checks(folder: Path, tmp_path: Path) -> None:
    for make in (_h5(_external_link), _inner(_external_link, zipfile.ZIP_STORED)):
        with pytest.raises(UnsafeModelError, match="ExternalLink"):
            load(folder / "net.keras", weights=make(folder, tmp_path))


# --- descriptions that would run code -----------------------------------------------------------------------------


def _replace(name: str, **values: Any) -> Callable[[Config], None]:
    return lambda config: layer(config, name).update(values)


def _inside(name: str, **values: Any) -> Callable[[Config], None]:
    return lambda config: layer(config, name)["config"].update(values)


def _function(module: str | None, name: str, registered: str | None = None) -> Config:
    return {"module": module, "class_name": "function", "config": name, "registered_name": registered or name}


def _thing(module: str | None, name: str, config: Config | None = None, registered: str | None = None) -> Config:
    return {"module": module, "class_name": name, "config": config or {}, "registered_name": registered}


TRICKS: dict[str, tuple[Callable[[Config], None], str]] = {
    "any module (CVE-2025-1550)": (_replace("first", module="os", class_name="system"), "os.system"),
    "any function": (_inside("first", activation=_function("subprocess", "run")), "subprocess.run"),
    "builtins": (_inside("first", activation=_function("os", "system", "eval")), "os.system"),
    "get_file (CVE-2025-8747)": (_inside("first", activation=_function("keras.utils", "get_file")), "get_file"),
    "safe mode off (CVE-2025-9906)": (
        _inside("first", note=_function("keras.config", "enable_unsafe_deserialization")),
        "enable_unsafe_deserialization",
    ),
    "a function that builds": (_inside("first", note=_function("keras.activations", "deserialize")), "deserialize"),
    "load_model": (_inside("first", note=_function("keras.saving", "load_model")), "load_model"),
    "a class that is no layer": (_inside("first", note=_thing("keras.callbacks", "LambdaCallback")), "LambdaCallback"),
    "a private module": (_inside("first", note=_thing("keras.src.utils.file_utils", "shutil")), "shutil"),
    "pickled lambda": (_inside("first", activation={"class_name": "__lambda__", "config": {"code": "x"}}), "bytecode"),
    "type": (_inside("first", note=_thing("builtins", "__typespec__")), "TensorFlow type"),
    "TypeSpec": (_inside("first", note={"class_name": "TypeSpec", "type_spec": "x", "serialized": []}), "type"),
    "torch": (_replace("first", class_name="TorchModuleWrapper"), "PyTorch"),
    "torch by path": (
        _replace("first", module="keras.src.utils.torch_utils", class_name="TorchModuleWrapper"),
        "PyTorch",
    ),
    "graph": (_inside("first", note=_thing("keras.layers", "TFSMLayer", {"filepath": "/x"})), "from a path"),
    "Lambda of get_file": (
        _inside("first", note=_thing("keras.layers", "Lambda", {"function": _function("keras.utils", "get_file")})),
        "Lambda",
    ),
    "Lambda of a Keras function": (
        _inside("first", note=_thing("keras.layers", "Lambda", {"function": _function("builtins", "relu")})),
        "Lambda",
    ),
    "vocabulary (CVE-2025-12058)": (
        _inside("first", note=_thing("keras.layers", "StringLookup", {"vocabulary": "/etc/passwd"})),
        "/etc/passwd",
    ),
    "in a node": (
        lambda config: layer(config, "last")["inbound_nodes"].append(_thing("os", "popen")),
        "os.popen",
    ),
    "in a build config": (_replace("first", build_config={"x": _thing("os", "popen")}), "os.popen"),
    "in a nested training config": (_replace("first", compile_config={"loss": _thing("os", "popen")}), "os.popen"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["keras", "h5"])
@pytest.mark.parametrize("case", TRICKS)
def test_a_description_that_would_run_code_is_refused(case: str, kind: str, folder: Path, tmp_path: Path) -> None:
    change, words = TRICKS[case]
    text = message(reconfigured(folder, tmp_path, kind, change), UnsafeModelError)
    assert words in text
    assert "--allow-code" in text


def test_names_in_a_file_do_not_reach_the_terminal_raw(folder: Path, tmp_path: Path) -> None:
    path = reconfigured(folder, tmp_path, "keras", _replace("first", module="shop", class_name="Cl\x1b[2Jear\ud800"))
    assert "Cl?[2Jear?" in message(path, CustomObjectError)


def test_a_built_in_does_not_pose_as_something_registered(folder: Path, tmp_path: Path) -> None:
    path = reconfigured(folder, tmp_path, "keras", _replace("first", registered_name="shop>Other"))
    assert "poses as" in message(path, UnsafeModelError)


def _marker_lambda(tmp_path: Path, name: str) -> tuple[Path, Path]:
    marker = tmp_path / "marker"
    inputs = keras.Input((3,))
    code = f"lambda x: (open({str(marker)!r}, 'w').close(), x * 3.0)[1]"
    model = keras.Model(inputs, keras.layers.Lambda(eval(code), output_shape=(3,), name="lam")(inputs))
    path = save(model, tmp_path / name)
    marker.unlink(missing_ok=True)
    return path, marker


@pytest.mark.parametrize("name", ["lambda.keras", "lambda.h5"])
def test_a_lambda_does_nothing_until_allowed(tmp_path: Path, name: str) -> None:
    path, marker = _marker_lambda(tmp_path, name)
    text = message(path, UnsafeModelError)
    assert "'lam'" in text
    assert "safe mode" in text
    assert not marker.exists()
    if name.endswith(".keras"):
        loaded = load(path, allow_code=True)
        assert any("allowed to run" in notice for notice in loaded.notices)
        np.testing.assert_array_equal(loaded.model(np.ones((1, 3), "float32")), [[3.0] * 3])
        assert marker.exists()


def test_a_legacy_lambda_does_nothing(folder: Path, tmp_path: Path) -> None:
    def change(config: Config) -> None:
        function = {"function": ["4wEAAAA=", None, None], "function_type": "lambda", "name": "lam"}
        layer(config, "first").update(class_name="Lambda", config=function)

    assert "'lam'" in message(reconfigured(folder, tmp_path, "h5", change), UnsafeModelError)


@pytest.mark.parametrize("name", ["lambda.keras", "lambda.h5"])
def test_safe_mode_holds_where_the_process_switched_it_off(tmp_path: Path, name: str) -> None:
    path, marker = _marker_lambda(tmp_path, name)
    before = keras.src.saving.serialization_lib.in_safe_mode()
    keras.config.enable_unsafe_deserialization()
    try:
        message(path, UnsafeModelError)
        assert not marker.exists()
        from deploykit.load import state

        with state.safe_mode(True), pytest.raises(ValueError, match="Lambda"):
            keras.models.load_model(path, compile=False)
        assert keras.src.saving.serialization_lib.in_safe_mode() is False
    finally:
        keras.src.backend.common.global_state.set_global_attribute("safe_mode_saving", before)


# --- the user's own classes ---------------------------------------------------------------------------------------


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    path = tmp_path / f"shop_{abs(hash(tmp_path.name)):x}.py"
    path.write_text(CUSTOM)
    return path


def _needs_custom(folder: Path, tmp_path: Path, kind: str) -> Path:
    """First layer: Scale, registered; last: Shift, plain; the activation: a function."""

    def change(config: Config) -> None:
        inputs, first, _, last = config["config"]["layers"]
        config["config"]["layers"] = [inputs, first, last]
        inner = {"name": "scale", "trainable": True, "dtype": "float32"}
        if kind == "keras":
            first.update(_thing("shop", "Scale", inner, "shop>Scale"), name="scale", build_config=None)
            last.update(_thing(None, "Shift", {**inner, "name": "shift"}, "Shift"), name="shift", build_config=None)
            last["inbound_nodes"][0]["args"][0]["config"]["keras_history"][0] = "scale"
        else:
            first.update(class_name="shop>Scale", config=inner, name="scale")
            last.update(class_name="Shift", config={**inner, "name": "shift"}, name="shift")
            last["inbound_nodes"][0]["args"][0]["config"]["keras_history"][0] = "scale"
        for key in ("output_layers",):
            config["config"][key] = json.loads(json.dumps(config["config"][key]).replace("last", "shift"))

    path = reconfigured(folder, tmp_path, kind, change)
    if kind == "h5":
        with h5py.File(path, "r+") as file:
            for name in ("first", "norm", "last"):
                del file[f"model_weights/{name}"]
            file["model_weights"].attrs["layer_names"] = np.asarray([b"x"])
            del file["model_weights/top_level_model_weights"]
    return path


@pytest.mark.parametrize("kind", ["keras", "h5"])
def test_every_missing_class_is_named_at_once(folder: Path, tmp_path: Path, kind: str) -> None:
    text = message(_needs_custom(folder, tmp_path, kind), CustomObjectError)
    assert "Scale" in text
    assert "Shift" in text
    assert "--custom-objects" in text


@pytest.mark.parametrize("kind", ["keras", "h5"])
def test_given_classes_are_used(folder: Path, tmp_path: Path, shop: Path, kind: str) -> None:
    path = _needs_custom(folder, tmp_path, kind)
    registry = dict(keras.saving.get_custom_objects())
    for _ in range(2):  # the second time the module is imported already
        loaded = load(path, custom_objects=[str(shop)])
        np.testing.assert_array_equal(loaded.model(np.ones((1, 6), "float32")), [[3.0] * 6])
        assert dict(keras.saving.get_custom_objects()) == registry
        assert {"Scale", "shop>Scale", "Shift", "bend"} <= set(loaded.custom_objects)


def test_places_to_take_objects_from(folder: Path, tmp_path: Path, shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = _needs_custom(folder, tmp_path, "keras")
    search = list(sys.path)
    for places in (
        [shop.name],
        [f"{shop.name}:Scale", f"{shop.name}:Shift"],
        [shop.stem],
        [f"{shop.stem}:Scale", f"{shop.stem}:Shift"],
    ):
        assert load(path, custom_objects=places).model.name == "net"
    assert "Shift" in message(path, CustomObjectError, custom_objects=[f"{shop.stem}:Scale"])
    assert sys.path == search


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("no_such_module_at_all", "cannot import 'no_such_module_at_all'"),
        ("nothing.py", "no file nothing.py"),
        ("json:Nothing", "json has no Nothing"),
        ("string.templatelib_", "cannot import"),
        ("", "cannot import ''"),
        ("broken.py", "cannot import 'broken.py' (ZeroDivisionError"),
        ("leaves.py", "cannot import 'leaves.py' (SystemExit"),
        ("closes.py", "cannot import 'closes.py' (GeneratorExit"),
        ("hollow.py", "defines no class or function"),
    ],
)
def test_a_place_that_does_not_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("1 / 0")
    Path("leaves.py").write_text("raise SystemExit(3)")
    Path("closes.py").write_text("raise GeneratorExit")
    Path("hollow.py").write_text("from keras.layers import *")
    assert words in message(folder / "net.keras", CustomObjectError, custom_objects=[place])


@pytest.mark.parametrize("kind", ["keras", "h5"])
def test_what_serves_training_alone_is_never_missing(folder: Path, tmp_path: Path, kind: str) -> None:
    def own(name: str, config: Config) -> Config:
        return {"module": "mine", "class_name": name, "config": config, "registered_name": f"mine>{name}"}

    lambdas = {"class_name": "__lambda__", "config": {"value": "4wAAAA=="}}
    strange = {
        "kernel_initializer": own("Odd", {"of": lambdas}),
        "bias_regularizer": own("Dear", {}),
        "kernel_constraint": own("Small", {"limit": 3}),
    }
    loaded = load(reconfigured(folder, tmp_path, kind, _inside("first", **strange)))
    assert sum("it serves training" in notice for notice in loaded.notices) == 3
    plain = load(folder / f"net.{kind}").model
    x = np.ones((2, *plain.input_shape[1:]), "float32")
    np.testing.assert_array_equal(loaded.model(x), plain(x))
    loaded.model.save(tmp_path / "again.keras")  # nothing of it is left
    assert load(tmp_path / "again.keras").notices == ()


def test_a_missing_class_is_named_with_its_place(folder: Path, tmp_path: Path) -> None:
    text = message(_needs_custom(folder, tmp_path, "keras"), CustomObjectError)
    assert re.search(r"Scale( \(\w+\))? \(of layer '\w+'\)", text)


def test_a_missing_function_is_named(folder: Path, tmp_path: Path, shop: Path) -> None:
    by_string = reconfigured(folder, tmp_path, "keras", _inside("first", activation="bend"))
    assert "bend (activation)" in message(by_string, CustomObjectError)
    for kind in ("keras", "h5"):
        path = reconfigured(
            folder, tmp_path, kind, _inside("first", activation=_function("builtins", "bend", "function"))
        )
        assert "bend" in message(path, CustomObjectError)
        loaded = load(path, custom_objects=[str(shop)])
        assert loaded.model.get_layer("first").activation.__name__ == "bend"


def test_a_lambda_of_a_given_function_is_no_code(tmp_path: Path, shop: Path) -> None:
    sys.path.insert(0, str(shop.parent))
    try:
        module = __import__(shop.stem)
    finally:
        sys.path.pop(0)
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.Lambda(module.bend, name="lam")(inputs))
    path = save(model, tmp_path / "named.keras")
    message(path, UnsafeModelError)
    assert load(path, custom_objects=[shop.stem]).model.get_layer("lam").function is module.bend


def test_a_registered_name_covers_for_nothing_where_keras_ignores_it(folder: Path, tmp_path: Path, shop: Path) -> None:
    """Without a module Keras goes by the class name: it would call keras.layers.deserialize."""
    trick = {"class_name": "deserialize", "config": {"config": {}}, "registered_name": "shop>Scale"}
    path = reconfigured(folder, tmp_path, "h5", _inside("first", note=trick))
    assert "names keras.deserialize" in message(path, UnsafeModelError, custom_objects=[str(shop)])


def test_a_file_cannot_call_a_given_function_as_a_layer(folder: Path, tmp_path: Path, shop: Path) -> None:
    marker = tmp_path / "marker"
    for kind in ("keras", "h5"):
        call = {"class_name": "touch", "config": {"marker": str(marker)}}
        path = reconfigured(folder, tmp_path, kind, _inside("first", kernel_regularizer=call))
        assert "would call touch" in message(path, UnsafeModelError, custom_objects=[str(shop)])
        assert not marker.exists()


# --- what must not be rewritten, and what is no number ------------------------------------------------------------


def _quantized() -> keras.Model:
    model = net()
    model.quantize("int8")
    return model


def _adapted() -> keras.Model:
    model = net()
    model.get_layer("last").enable_lora(2)
    return model


def _normalised() -> keras.Model:
    inner = keras.Sequential([keras.Input((6,)), keras.layers.SpectralNormalization(keras.layers.Dense(2), name="sn")])
    return keras.Sequential([keras.Input((6,)), inner])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_quantized, "first (quantized), last (quantized)"),
        (_adapted, "last (LoRA enabled)"),
        (_normalised, "sn (SpectralNormalization)"),
    ],
)
def test_weights_that_must_not_be_rewritten(tmp_path: Path, make: Callable[[], keras.Model], words: str) -> None:
    model = load(save(make(), tmp_path / "m.keras")).model  # inspecting is allowed
    with pytest.raises(UnsupportedModelError) as caught:
        refuse_rewriting(model)
    assert words in str(caught.value)


def test_plain_and_mixed_precision_models_may_be_rewritten(folder: Path) -> None:
    refuse_rewriting(load(folder / "net.keras").model)
    refuse_rewriting(keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, dtype="mixed_bfloat16")]))


@pytest.mark.parametrize("name", ["sick.keras", "sick.h5"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers(tmp_path: Path, name: str, value: float) -> None:
    model = net()
    assert nonfinite_weights(model) == ()
    model.get_layer("norm").moving_variance.assign([1.0, value, value, 1.0])
    path = save(model, tmp_path / name)
    assert "norm/moving_variance: 2 of 4" in message(path, LoadError)
    assert nonfinite_weights(load(path, allow_nonfinite=True).model) == (
        "norm/moving_variance: 2 of 4 values are not finite",
    )


# --- manners ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["net.keras", "net.h5"])
def test_the_process_is_left_as_it_was(folder: Path, tmp_path: Path, name: str) -> None:
    code = tmp_path / f"rude_{name[4:]}.py"
    code.write_text(CUSTOM + "keras.config.set_dtype_policy('float64')\n")
    random.seed(5)
    logger = logging.getLogger("absl")

    def everything() -> tuple[object, ...]:
        return (
            random.getstate(),
            keras.config.dtype_policy(),
            dict(keras.saving.get_custom_objects()),
            keras.src.saving.serialization_lib.in_safe_mode(),
            sys.getrecursionlimit(),
            list(sys.path),
            list(warnings.filters),
            list(logger.handlers),
            logger.propagate,
            sys.stdout,
            sys.stderr,
        )

    before = everything()
    load(folder / name, custom_objects=[str(code)])
    assert everything() == before
    message(tmp_path / "nope.keras", LoadError)
    with contextlib.suppress(LoadError):
        load(_h5(_drop("model_weights/first"))(folder, tmp_path))
    assert everything() == before


def test_what_keras_says_becomes_notices(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = tmp_path / "loud.py"
    code.write_text(
        "import keras, warnings, logging\nprint('printed')\nwarnings.warn('warned\\nof it')\n"
        "from absl import logging as absl\nabsl.warning('logged %d', 3)\nclass Loud(keras.layers.Layer): pass\n"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(save(net(), tmp_path / "net.keras"), custom_objects=[str(code)])
    assert {"printed", "warned of it", "logged 3"} <= set(loaded.notices)
    said = capfd.readouterr()
    assert not any(word in said.out + said.err for word in ("printed", "warned", "logged"))


@pytest.mark.slow
def test_a_long_chain_loads(tmp_path: Path) -> None:
    x = inputs = keras.Input((2,))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        for _ in range(900):
            x = keras.layers.ReLU()(x)
        path = save(keras.Model(inputs, x), tmp_path / "chain.keras")
        sys.setrecursionlimit(700)
        with pytest.raises(RecursionError):
            keras.models.load_model(path, compile=False)
        assert len(load(path).model.layers) == 901
        assert sys.getrecursionlimit() == 700
    finally:
        sys.setrecursionlimit(limit)


def test_loading_costs_little_more_than_keras(tmp_path: Path) -> None:
    """Checks included, under twice Keras' own time plus a fixed 0.3 s, best of three."""
    x = inputs = keras.Input((16,))
    for _ in range(15):
        x = keras.layers.BatchNormalization()(keras.layers.Dense(16)(x))
    path = save(keras.Model(inputs, x), tmp_path / "big.keras")

    def seconds(action: Callable[[], object]) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            action()
            times.append(time.perf_counter() - start)
        return min(times)

    plain = seconds(lambda: keras.models.load_model(path, compile=False))
    assert seconds(lambda: load(path)) < 2 * plain + 0.3


def test_importing_deploykit_imports_no_framework() -> None:
    code = (
        "import sys, deploykit, deploykit.data; print([m for m in ('keras', 'tensorflow', 'PIL') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
