"""What a description demands is held against what is stored for it, in every format, before memory is taken."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzzing
import h5py
import keras
import legacy_keras1_files as k1
import numpy as np
import pytest
from test_load_attacks import ROUTES, described, layer, options, refused, repacked

from deploykit.errors import LoadError
from deploykit.load import READERS, load, size

L = keras.layers
MIB = 1 << 20


@pytest.fixture(scope="session")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.getbasetemp()
    return fuzzing.written((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "attacked")


def asks(path: Path, **further: Any) -> None:
    """Loading it is refused for what it demands, and leaves Keras as it was."""
    made = keras.Variable.__init__
    text = refused(path, LoadError, **further)
    assert text.startswith(f"{path} demands")
    assert "stored; refusing to build it" in text
    assert keras.Variable.__init__ is made


# -------------------------------------------------------------------------------------- what older generations ask


def _set(name: str, **config: Any) -> Callable[[Any], None]:
    return lambda model: layer(model, name)["config"].update(config)


def _cell(model: Any) -> None:
    layer(model, "cells")["config"]["cell"]["config"]["units"] = 10**6


DEMANDS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "dense": ("branches", _set("left", units=10**9)),
    "convolution": ("branches", _set("conv", kernel_size=[10**5, 10**5], padding="same")),
    "words": ("steps", _set("embed", input_dim=10**12, output_dim=10**6)),
    "recurrent cell": ("steps", _cell),
    "half a gigabyte": ("branches", _set("left", units=35 * 10**6)),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("demand", DEMANDS)
def test_a_description_of_an_older_generation_is_held_to_its_file(demand, route, valid, tmp_path):
    net, change = DEMANDS[demand]
    asks(described(valid, tmp_path, route, change, net), **options(valid, route, net))


def test_a_description_of_keras_1_is_held_to_its_file(tmp_path):
    model, groups = k1.sequential(k1.dense("d", 6, 4, shape=[6]))
    model["config"][0]["config"]["output_dim"] = 10**9
    asks(k1.write(tmp_path / "m.h5", model, groups))
    described, weights = k1.write_apart(tmp_path, model, groups)
    asks(described, weights=weights)


# ------------------------------------------------------------------------------------------------ what Keras 3 asks


def _net(units: int = 3) -> keras.Model:
    return keras.Sequential([keras.Input((6,)), L.Dense(units, name="d"), L.Dense(2, name="e")])


def _larger(text: str) -> str:
    config = json.loads(text)
    layer(config, "d")["config"]["units"] = 10**9
    return json.dumps(config)


def _archive(folder: Path) -> dict[str, Any]:
    _net().save(folder / "m.keras")
    with zipfile.ZipFile(folder / "m.keras") as archive:
        text = _larger(archive.read("config.json").decode())
    return {"path": repacked(folder / "m.keras", config__json=text.encode())}


def _hdf5(folder: Path) -> dict[str, Any]:
    _net().save(folder / "m.h5")
    with h5py.File(folder / "m.h5", "r+") as file:
        file.attrs["model_config"] = _larger(file.attrs["model_config"])
    return {"path": folder / "m.h5"}


def _description(folder: Path) -> dict[str, Any]:
    _net().save_weights(folder / "m.weights.h5")
    (folder / "m.json").write_text(_larger(_net().to_json()))
    return {"path": folder / "m.json", "weights": folder / "m.weights.h5"}


@pytest.mark.parametrize("make", [_archive, _hdf5, _description])
def test_a_description_of_keras_3_is_held_to_its_file(make, tmp_path):
    asks(**make(tmp_path))


def test_declared_arrays_that_are_not_stored_do_not_count(tmp_path):
    """Each is small enough to be no bomb; together they would allow for anything."""
    made = _hdf5(tmp_path)
    with h5py.File(made["path"], "r+") as file:
        for number in range(500):
            file.create_dataset(f"model_weights/x{number}", (15 * MIB,), "f4", chunks=(MIB,))
    asks(**made)


# ---------------------------------------------------------------------------------------- what is not to be refused


@pytest.fixture
def no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small files tell whether what is stored is counted rightly."""
    monkeypatch.setattr(size, "FLOOR_BYTES", 0)


def _saved(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    model = _net(400)
    if name == "m.json":
        path.write_text(model.to_json())
        model.save_weights(folder / "m.weights.h5")
        return {"path": path, "weights": folder / "m.weights.h5"}
    model.save(path)
    return {"path": path}


@pytest.mark.parametrize("name", ["m.keras", "m.h5", "m.json"])
def test_what_is_stored_may_be_built(name, no_floor, tmp_path):
    load(**_saved(tmp_path, name))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("net", ["branches", "steps"])
def test_what_older_generations_stored_may_be_built(net, route, no_floor, valid, tmp_path):
    load(described(valid, tmp_path, route, lambda model: None, net), **options(valid, route, net))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "mixed_bfloat16", "float64"])
def test_short_types_are_counted_as_they_are(dtype, no_floor, tmp_path):
    model = keras.Sequential([keras.Input((6,)), L.Dense(4000, dtype=dtype), L.Dense(300, dtype=dtype)])
    model.save(tmp_path / "m.keras")
    load(tmp_path / "m.keras")


def test_compressed_files_are_counted_as_they_unpack(no_floor, tmp_path):
    model = _net(100_000)
    for weight in model.weights:
        weight.assign(keras.ops.zeros(weight.shape))
    model.save(tmp_path / "m.keras")
    model.save(tmp_path / "m.h5")
    with zipfile.ZipFile(tmp_path / "m.keras") as old, zipfile.ZipFile(tmp_path / "packed.keras", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED if name != "model.weights.h5" else None)
    with h5py.File(tmp_path / "m.h5") as old, h5py.File(tmp_path / "packed.h5", "w") as new:
        _packed(old, new)
    assert (tmp_path / "packed.h5").stat().st_size < (tmp_path / "m.h5").stat().st_size / 20
    for name in ("packed.keras", "packed.h5"):
        assert load(tmp_path / name).model.count_params() == model.count_params()


def _packed(old: h5py.Group, new: h5py.Group) -> None:
    """A copy with compressed arrays, as h5repack makes it."""
    new.attrs.update(dict(old.attrs))
    for name, item in old.items():
        if isinstance(item, h5py.Group):
            _packed(item, new.create_group(name))
        else:
            new.create_dataset(name, data=item[()], compression="gzip", compression_opts=9) if item.shape else None


def test_what_no_file_stores_fits_under_the_floor(tmp_path):
    """States of random generators, which HDF5 does not keep."""
    model = keras.Sequential([keras.Input((8, 8, 3)), L.RandomFlip(), L.GaussianNoise(0.1), L.Flatten()])
    model.save(tmp_path / "m.h5")
    assert size.in_hdf5(tmp_path / "m.h5") == 0
    load(tmp_path / "m.h5")


def test_every_format_says_what_it_holds(valid):
    """No less than the bytes of its weights, no more than those of the file."""
    held = {
        "keras": valid / "branches_old.keras",
        "hdf5": valid / "branches_old_weights.h5",
        "savedmodel": valid / "branches_old_folder",
        "json": valid / "branches_old.json",
    }
    weights = 4 * load(held["hdf5"].with_name("branches_old.h5")).model.count_params()
    for reader in READERS:
        path = held[reader.format]
        whole = sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
        least = 0 if reader.format == "json" else weights
        assert least <= reader.holds(path) <= whole
        assert reader.format != "hdf5" or reader.holds(path) == weights


# -------------------------------------------------------------------------------------------------------- the bound


def _variable(mebibytes: float, dtype: str = "float32") -> keras.Variable:
    return keras.Variable("zeros", shape=(int(mebibytes * MIB) // (2 if "16" in dtype else 4),), dtype=dtype)


def _making(make: Callable[[float], Any], *mebibytes: float) -> None:
    with size.bounded("m", lambda: MIB):
        for each in mebibytes:
            make(each)


def test_the_bound_lies_at_the_excess_and_the_floor(monkeypatch):
    monkeypatch.setattr(size, "FLOOR_BYTES", MIB)
    _making(_variable, 4.5, 0.5)
    _making(functools.partial(_variable, dtype="bfloat16"), 4.5, 0.5)
    with pytest.raises(LoadError, match=r"^m demands 5\.5 MB of weights or more, where 1\.0 MB are stored"):
        _making(_variable, 4.5, 0.75)


def _swallowed(mebibytes: float) -> None:
    with contextlib.suppress(LoadError):
        _variable(mebibytes)


def _changed(mebibytes: float) -> None:
    try:
        _variable(mebibytes)
    except LoadError as error:
        raise TypeError("could not be deserialized") from error


@pytest.mark.parametrize("make", [_variable, _swallowed, _changed])
def test_a_refusal_comes_out_whatever_keras_makes_of_it(make):
    with pytest.raises(LoadError, match=r"^m demands 524 MB"):
        _making(make, 500, 1)


def test_what_else_goes_wrong_comes_out_as_it_is():
    with pytest.raises(KeyError, match="x"), size.bounded("m", lambda: 0):
        raise KeyError("x")


def test_keras_is_left_as_it_was():
    """Blocks in blocks too."""
    made = dict(vars(keras.Variable))
    with size.bounded("m", lambda: 0):
        outer = keras.Variable.__init__
        with size.bounded("m", lambda: 0):
            assert keras.Variable.__init__ is not outer
        assert keras.Variable.__init__ is outer
    assert dict(vars(keras.Variable)) == made


def test_small_models_cost_no_look_at_the_file():
    with size.bounded("m", lambda: pytest.fail("looked")):
        _variable(1)


@pytest.mark.parametrize("shape", [(None,), ("a",), 3, (float("nan"),), (float("inf"),), (-1, 5), None])
def test_shapes_that_are_none_are_left_to_keras(shape):
    with pytest.raises((ValueError, TypeError)), size.bounded("m", lambda: 0):
        keras.Variable("zeros", shape=shape)


def test_what_keras_refuses_makes_no_room():
    def negative(_: float) -> None:
        with contextlib.suppress(ValueError):
            keras.Variable("zeros", shape=(-(10**12),))
        _variable(500)

    with pytest.raises(LoadError, match=r"^m demands 524 MB"):
        _making(negative, 1)


def test_sizes_beyond_any_number_are_one_line():
    with pytest.raises(LoadError, match=r"^m demands 1000000000\.00 GB"), size.bounded("m", lambda: 0):
        keras.Variable("zeros", shape=(10**400, 3))


def test_a_value_is_counted_by_its_own_shape(monkeypatch):
    monkeypatch.setattr(size, "FLOOR_BYTES", 100)
    with pytest.raises(LoadError, match="demands 400 B"), size.bounded("m", lambda: 0):
        keras.Variable(np.zeros((10, 10), np.float32))
