"""Models of Keras 2 and tf-keras come out as the same models in Keras 3: compared with who wrote them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import legacy_nets
import numpy as np
import pytest

from deploykit import graph
from deploykit.errors import CustomObjectError, DeploykitError, LoadError, UnsafeModelError, UnsupportedModelError
from deploykit.fuse import fuse
from deploykit.load import load
from deploykit.load.contents import text_of
from deploykit.load.legacy import config as translation

L = keras.layers
HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def nets(tmp_path_factory) -> Path:
    """The folder of all nets, written once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "legacy_nets"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            script = [sys.executable, "-W", "ignore", str(HERE / "legacy_nets.py"), str(folder)]
            made = subprocess.run(script, capture_output=True, text=True, check=False)
            assert made.returncode == 0, made.stderr[-2000:]
            (folder / "done").touch()
    return folder


def known(folder: Path, name: str) -> tuple[list[Any], list[Any]]:
    """Inputs of a net and the answers of the package that wrote it."""
    with np.load(folder / f"{name}.npz", allow_pickle=False) as stored:
        return tuple([stored[key] for key in sorted(stored.files) if key[0] == letter] for letter in "xy")


def answers(model: keras.Model, inputs: list[Any]) -> list[Any]:
    return [graph.numpy(y) for y in graph.flat_call(model)(*map(keras.ops.convert_to_tensor, inputs))]


def distance(found: list[Any], wanted: list[Any]) -> float:
    assert [y.shape for y in found] == [y.shape for y in wanted]
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(found, wanted, strict=True)]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


def agrees(path: Path, folder: Path, name: str) -> keras.Model:
    """Load a file and compare it with what is known of the net."""
    inputs, wanted = known(folder, name)
    loaded = load(path)
    assert distance(answers(loaded.model, inputs), wanted) < (2e-3 if name == "mixed" else 2e-6)
    return loaded


# ------------------------------------------------------------------------------------- as tf-keras writes today


FILES = [
    (name, end)
    for name in legacy_nets.NETS
    for end in ("h5", "keras")
    if name not in legacy_nets.ONLY_HDF5 or end == "h5"
]


@pytest.mark.parametrize(("name", "suffix"), FILES)
def test_a_net_answers_as_where_it_was_saved(name, suffix, nets):
    told = agrees(nets / f"{name}.{suffix}", nets, name).notices
    assert len(told) == {"slashes": 1, "spectral": 2, "mask_through_nested": 1}.get(name, 0)


@pytest.mark.parametrize(
    "name",
    [
        *("hard_sigmoid_layer", "gru_before", "rnn_stack", "nested_twice", "operations", "noise"),
        *("decoder_lstm", "decoder_gru", "decoder_bidirectional", "bidirectional_backwards"),
    ],
)
def test_what_was_loaded_is_a_clean_model_of_keras_3(name, nets, tmp_path):
    loaded = load(nets / f"{name}.h5")
    loaded.model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras", compile=False, safe_mode=True)
    inputs, wanted = known(nets, name)
    assert distance(answers(again, inputs), wanted) < (2e-3 if name == "mixed" else 2e-6)


@pytest.mark.parametrize(
    "name", ["nested", "nested_in_sequential", "shared_layer", "operations", "bn", "several_outputs"]
)
def test_what_was_loaded_can_be_fused(name, nets):
    model = load(nets / f"{name}.h5").model
    inputs, wanted = known(nets, name)
    fused = fuse(model)
    assert fused.proof.holds
    assert distance(answers(fused.model, inputs), wanted) < 1e-5


def test_names_and_flags_survive(nets):
    model = load(nets / "nested_frozen.h5").model
    body = model.get_layer("body")
    assert [layer.name for layer in body.layers][1:3] == ["conv", "bn"]
    assert not body.trainable
    assert model.layers[-1].trainable
    partly = load(nets / "nested_partly_frozen.h5").model.get_layer("body")
    assert [partly.get_layer(name).trainable for name in ("conv", "bn")] == [True, False]


# ------------------------------------------------------------------------------ description and weights apart


def described(nets: Path, name: str, path: Path) -> Path:
    """What `model.to_json` writes."""
    with h5py.File(nets / f"{name}.h5") as file:
        config = {**json.loads(file.attrs["model_config"]), "keras_version": "2.15.0", "backend": "tensorflow"}
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("weights", ["nested.h5", "nested.keras"])
def test_a_description_is_filled_from_a_file_beside_it(weights, nets, tmp_path):
    inputs, wanted = known(nets, "nested")
    loaded = load(described(nets, "nested", tmp_path / "net.json"), weights=nets / weights)
    assert loaded.format == "json"
    assert distance(answers(loaded.model, inputs), wanted) < 2e-6


def test_weights_under_other_names_are_taken_in_the_order_of_the_description(nets, tmp_path):
    """A net that was built again in the same session has its layers counted on; two branches, other than by depth."""
    shutil.copy(nets / "branches.h5", path := tmp_path / "weights.h5")
    with h5py.File(path, "r+") as file:
        group = file["model_weights"]
        for name in map(text_of, group.attrs["layer_names"]):
            group.move(name, f"{name}_7")
        group.attrs["layer_names"] = [f"{text_of(name)}_7" for name in group.attrs["layer_names"]]
    inputs, wanted = known(nets, "branches")
    loaded = load(described(nets, "branches", tmp_path / "net.json"), weights=path)
    assert distance(answers(loaded.model, inputs), wanted) < 2e-6


def archived_weights(nets: Path, name: str, path: Path) -> Path:
    """What `model.save_weights` of tf-keras writes."""
    with zipfile.ZipFile(nets / f"{name}.keras") as archive:
        path.write_bytes(archive.read("model.weights.h5"))
    return path


@pytest.mark.parametrize("name", ["hard_sigmoid_dense", "lstm_hard", "nested", "attention"])
def test_weights_that_tf_keras_saved_alone_are_its_own(name, nets, tmp_path):
    weights = archived_weights(nets, name, tmp_path / "w.weights.h5")
    inputs, wanted = known(nets, name)
    loaded = load(described(nets, name, tmp_path / "net.json"), weights=weights)
    assert distance(answers(loaded.model, inputs), wanted) < 2e-6


def test_weights_that_keras_3_saved_alone_are_taken_as_they_are(nets, tmp_path):
    model = keras.Sequential([keras.Input((6,)), L.Dense(4, activation="hard_sigmoid")])
    model.save_weights(weights := tmp_path / "w.weights.h5")
    loaded = load(described(nets, "hard_sigmoid_dense", tmp_path / "net.json"), weights=weights)
    np.testing.assert_array_equal(graph.numpy(loaded.model.layers[0].kernel), graph.numpy(model.layers[0].kernel))


def test_a_description_of_keras_3_is_filled_too(tmp_path):
    model = keras.Sequential([keras.Input((6,)), L.Dense(3, activation="hard_sigmoid")])
    (tmp_path / "net.json").write_text(model.to_json())
    for name in ("w.weights.h5", "w.h5"):
        model.save_weights(tmp_path / name) if "weights" in name else model.save(tmp_path / name)
        loaded = load(tmp_path / "net.json", weights=tmp_path / name)
        np.testing.assert_array_equal(graph.numpy(loaded.model.layers[0].kernel), graph.numpy(model.layers[0].kernel))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "pass the weights file with --weights"),
        ("backend: tensorflow\nclass_name: Sequential\n", "in YAML"),
        ("{}", "describes no model"),
    ],
)
def test_a_description_alone_is_one_line(text, words, nets, tmp_path):
    path = tmp_path / "net.json"
    described(nets, "dense", path) if text is None else path.write_text(text)
    with pytest.raises(DeploykitError, match=words):
        load(path)


def test_weights_of_another_net_are_one_line(nets, tmp_path):
    with pytest.raises(LoadError, match=r"is it intact|do not fit"):
        load(described(nets, "dense", tmp_path / "net.json"), weights=nets / "lstm.h5")


# -------------------------------------------------------------------------------------------- as Keras 2 wrote


def edited(
    source: Path, target: Path, change: Callable[[dict[str, Any]], Any], version: str = "2.2.4", **attrs
) -> Path:
    """A copy of an HDF5 file with another description."""
    shutil.copy(source, target)
    with h5py.File(target, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        changed = change(config)  # in place, or another one
        file.attrs["model_config"] = json.dumps(changed if isinstance(changed, dict) else config)
        file.attrs["keras_version"] = version
        for key, value in attrs.items():
            file.attrs[key] = value
    return target


SINCE = {  # arguments that are younger than Keras 2.0
    *(
        "groups",
        "module",
        "registered_name",
        "build_config",
        "build_input_shape",
        "keepdims",
        "ragged",
        "zero_output_for_mask",
    ),
    *("use_legacy_format", "dtype", "time_major", "synchronized", "axis_names", "output_padding"),
}


def as_in_keras_20(config: dict[str, Any]) -> dict[str, Any]:
    """The description as Keras 2.0 had it: fewer arguments, a Sequential is a list that begins with its first layer."""

    def layer(entry: Any) -> Any:
        if isinstance(entry, list):
            return [layer(item) for item in entry]
        if not isinstance(entry, dict):
            return entry
        entry = {key: layer(value) for key, value in entry.items() if key not in SINCE}
        if entry.get("class_name") == "Sequential" and isinstance(entry["config"], dict):
            layers = entry["config"]["layers"]
            if layers[0]["class_name"] == "InputLayer":
                shape, layers = layers[0]["config"]["batch_input_shape"], layers[1:]
                if "layers" not in layers[0]["config"]:
                    layers[0]["config"]["batch_input_shape"] = shape
            entry["config"] = layers
        if entry.get("class_name") == "Functional":
            entry["class_name"] = "Model"
        if entry.get("class_name") == "BatchNormalization" and isinstance(entry["config"]["axis"], list):
            (entry["config"]["axis"],) = entry["config"]["axis"]
        return entry

    return layer(config)


OLD = [
    *(
        "conv1d",
        "conv3d",
        "transpose2d",
        "depthwise2d",
        "separable2d",
        "bn",
        "dense",
        "lstm",
        "lstm_hard",
        "gru_before",
    ),
    *(
        "gru_hard_before",
        "simple_rnn",
        "bidirectional",
        "conv_lstm",
        "time_distributed",
        "embedding",
        "masking",
        "leaky",
    ),
    *("prelu", "thresholded", "elu", "pools1d", "padding", "padding1d", "shapes", "no_input_layer", "merges"),
    *(
        "several_outputs",
        "initial_state",
        "shared_layer",
        "nested",
        "nested_partly_frozen",
        "nested_twice",
        "nested_deeply",
    ),
    *("regularized", "dynamic_length"),
]


@pytest.mark.parametrize("name", OLD)
def test_a_net_as_keras_20_wrote_it_answers_alike(name, nets, tmp_path):
    agrees(edited(nets / f"{name}.h5", tmp_path / "old.model", as_in_keras_20, "2.0.5"), nets, name)


@pytest.mark.parametrize("name", ["conv2d_groups", "padding", "merges"])
def test_marked_tuples_are_lists(name, nets, tmp_path):
    def marked(value):
        if isinstance(value, list) and value and all(isinstance(item, int | None) for item in value):
            return {"class_name": "__tuple__", "items": value}
        if isinstance(value, dict):
            return {key: marked(item) for key, item in value.items()}
        return [marked(item) for item in value] if isinstance(value, list) else value

    agrees(edited(nets / f"{name}.h5", tmp_path / "m.h5", marked), nets, name)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("leaky", {"alpha": 0.1}), ("relu6", {"max_value": 6.0, "negative_slope": 0.1, "threshold": 0.2})],
)
def test_numbers_that_were_arrays_are_numbers(name, arguments, nets, tmp_path):
    def marked(config):
        last = config["config"]["layers"][-1]["config"]
        assert set(arguments) <= set(last)
        last.update({key: {"type": "ndarray", "value": value} for key, value in arguments.items()})

    agrees(edited(nets / f"{name}.h5", tmp_path / "m.h5", marked, "2.0.5"), nets, name)


def test_what_looks_like_an_array_and_is_none_stays():
    same = {"a": {"type": "ndarray", "value": 1, "more": 2}, "b": {"type": "list", "value": 1}}
    assert translation.plain(same) == same
    assert translation.plain([{"type": "ndarray", "value": [1, 2]}]) == [[1, 2]]


@pytest.mark.parametrize(("mode", "told"), [({}, 1), ({"output_mode": "int"}, 1), ({"output_mode": "one_hot"}, 0)])
def test_bins_of_another_whole_type_are_told(mode, told):
    entry = {"class_name": "Discretization", "config": {"name": "bins", "bin_boundaries": [0.0, 1.0], **mode}}
    config = {"name": "m", "layers": [entry], "build_input_shape": [None, 3]}
    notices = translation.translate({"class_name": "Sequential", "config": config}, what="x").notices
    assert [notice for notice in notices if "int64" in notice] == list(notices)
    assert len(notices) == told


def test_a_gru_that_does_not_say_resets_before(nets, tmp_path):
    def forget(config):
        for entry in config["config"]["layers"]:
            entry["config"].pop("reset_after", None)

    agrees(edited(nets / "gru_before.h5", tmp_path / "old.h5", forget), nets, "gru_before")


def test_an_embedding_that_promised_a_length_has_it(nets, tmp_path):
    def promise(config):
        layers = config["config"]["layers"]
        layers[1]["config"]["batch_input_shape"] = [None, None]
        del layers[0]

    agrees(edited(nets / "embedding.h5", tmp_path / "old.h5", promise), nets, "embedding")


@pytest.mark.parametrize("name", ["conv1d", "conv2d_groups", "conv3d", "depthwise2d", "separable2d", "conv_lstm"])
def test_kernels_of_theano_are_rotated(name, nets, tmp_path):
    """Where others correlate, Theano convolves: the same net has its kernels the other way round there."""
    path = edited(nets / f"{name}.h5", tmp_path / "theano.h5", lambda config: None, backend="theano")
    with h5py.File(path, "r+") as file:
        for key in list(_datasets(file["model_weights"])):
            data = file["model_weights"][key]
            if "kernel" in key and "pointwise" not in key:
                data[...] = np.flip(data[...], axis=tuple(range(data.ndim - 2)))
    assert any("Theano" in notice for notice in agrees(path, nets, name).notices)


@pytest.mark.parametrize(
    ("name", "padding"),
    [
        ("conv2d_groups", {"kernel_size": [2, 2]}),
        ("conv2d_groups", {"strides": [2, 2]}),
        ("pools1d", {}),
        ("transpose2d", {}),
    ],
)
def test_a_padding_that_only_theano_does_is_refused(name, padding, nets, tmp_path):
    path = edited(nets / f"{name}.h5", tmp_path / "m.h5", _first(padding="same", **padding), backend="theano")
    with pytest.raises(UnsupportedModelError, match="pads as Theano does"):
        load(path)


def _datasets(group: h5py.Group) -> list[str]:
    found: list[str] = []
    group.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    return found


def test_weights_of_cudnn_layers_are_laid_out_anew(nets, tmp_path):
    """The kernel of each gate by columns, recurrent kernels transposed, two biases."""

    def cudnn(config):
        entry = config["config"]["layers"][1]
        entry["class_name"] = "CuDNNLSTM"
        for key in ("activation", "recurrent_activation", "use_bias", "dropout", "recurrent_dropout", "unroll"):
            del entry["config"][key]

    path = edited(nets / "lstm.h5", tmp_path / "cudnn.h5", cudnn)
    with h5py.File(path, "r+") as file:
        group = file["model_weights"]
        names = {name.rpartition("/")[2]: name for name in _datasets(group) if name.startswith("lstm/")}
        kernel, recurrent = group[names["kernel:0"]], group[names["recurrent_kernel:0"]]
        kernel[...] = np.hstack([gate.reshape(gate.shape[::-1], order="F").T for gate in np.hsplit(kernel[...], 4)])
        recurrent[...] = np.hstack([gate.T for gate in np.hsplit(recurrent[...], 4)])
        bias = group[names["bias:0"]][...]
        del group[names["bias:0"]]
        group[names["bias:0"]] = np.concatenate([0.3 * bias, 0.7 * bias])
    agrees(path, nets, "lstm")


def test_a_pruned_layer_is_what_its_mask_leaves(nets, tmp_path):
    mask = np.random.default_rng(0).integers(0, 2, (6, 4)).astype(np.float32)

    def prune(config):
        entry = config["config"]["layers"][1]
        wrapped = {"class_name": entry["class_name"], "config": dict(entry["config"])}
        entry.update(
            class_name="PruneLowMagnitude",
            config={"name": entry["config"]["name"], "layer": wrapped, "block_size": [1, 1]},
        )

    path = edited(nets / "dense.h5", tmp_path / "pruned.h5", prune)
    with h5py.File(path, "r+") as file:
        name = text_of(file["model_weights"].attrs["layer_names"][0])
        group = file["model_weights"][name]
        kernel = group[f"{name}/kernel:0"][...]
        more = {f"{name}/mask:0": mask, f"{name}/threshold:0": np.float32(0.1), f"{name}/pruning_step:0": np.int64(7)}
        for key, value in more.items():
            group[key] = value
        group.attrs["weight_names"] = [f"{name}/kernel:0", f"{name}/bias:0", *more]
    loaded = load(path)
    assert any("pruning" in notice for notice in loaded.notices)
    np.testing.assert_array_equal(graph.numpy(loaded.model.layers[0].kernel), kernel * mask)


def test_what_serves_training_alone_is_left_out_with_a_notice(nets, tmp_path):
    def strange(config):
        inner = config["config"]["layers"][1]["config"]
        inner["kernel_regularizer"] = {"class_name": "Mine", "config": {"strength": 3}}
        inner["bias_initializer"] = "odd_numbers"
        inner["kernel_constraint"] = {"class_name": "Yours", "config": {}}

    path = edited(nets / "dense.h5", tmp_path / "m.h5", strange)
    told = " ".join(agrees(path, nets, "dense").notices)
    assert all(name in told for name in ("Mine", "odd_numbers", "Yours"))


# ------------------------------------------------------------------------------------------------ what is refused


def _first(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Change the first layer behind the input; a class name under ``kind``."""

    def change(config):
        entry = config["config"]["layers"][1]
        entry["class_name"] = changes.get("kind", entry["class_name"])
        entry["config"].update({key: value for key, value in changes.items() if key != "kind"})

    return change


Edit = Callable[[dict[str, Any]], Any]
REFUSALS: dict[str, tuple[str, Edit, type[DeploykitError], str]] = {
    "quantization-aware": ("dense", _first(kind="QuantizeWrapperV2"), UnsupportedModelError, "quantization"),
    "locally connected": ("conv1d", _first(kind="LocallyConnected1D"), UnsupportedModelError, "no equivalent"),
    "TensorFlow Hub": ("dense", _first(kind="KerasLayer"), UnsupportedModelError, "TensorFlow Hub"),
    "time-major": ("lstm", _first(time_major=True), UnsupportedModelError, "time_major=True"),
    "an argument nobody knows": ("dense", _first(wobble=3), UnsupportedModelError, "wobble=3"),
    "groups of a transposed convolution": ("transpose2d", _first(groups=2), UnsupportedModelError, "groups=2"),
    "several axes": ("bn", _first(axis=[1, 3]), UnsupportedModelError, "along the axes [1, 3]"),
    "hard_sigmoid on a state": ("lstm", _first(activation="hard_sigmoid"), UnsupportedModelError, "hard_sigmoid"),
    "a class of the user's": ("dense", _first(kind="MyDense"), CustomObjectError, "MyDense"),
    "a class of a package": ("dense", _first(kind="Addons>GELU"), CustomObjectError, "Addons>GELU"),
    "a Lambda": ("dense", _first(kind="Lambda", function=["4wAAAA==", None, None]), UnsafeModelError, "Lambda"),
    "ragged": (
        "merges",
        lambda c: c["config"]["layers"][0]["config"].update(ragged=True),
        UnsupportedModelError,
        "ragged",
    ),
    "an operation nobody knows": (
        "operations",
        lambda c: next(
            x["config"] for x in c["config"]["layers"] if x["class_name"] == "TFOpLambda"
        ).update(function="io.read_file"),
        UnsupportedModelError,
        "io.read_file",
    ),
    "an operation with an argument nobody knows": (
        "operations",
        lambda c: next(x for x in c["config"]["layers"] if x["name"].startswith("tf.nn.relu"))["inbound_nodes"][0][
            3
        ].update(wobble=3),
        UnsupportedModelError,
        "'wobble', which has no equivalent",
    ),
    "a model with its own code": ("dense", lambda c: {**c, "class_name": "MyModel"}, UnsupportedModelError, "MyModel"),
    "a call of nothing": (
        "merges",
        lambda c: c["config"]["layers"][-1].update(inbound_nodes=[[["nowhere", 0, 0, {}]]]),
        LoadError,
        "waits for a tensor",
    ),
    "an output of nothing": (
        "merges",
        lambda c: c["config"].update(output_layers=[["nowhere", 0, 0]]),
        LoadError,
        "no layer makes",
    ),
    "no layers": ("dense", lambda c: {**c, "config": {"name": "x"}}, LoadError, "is damaged"),
    "an input without a shape": (
        "merges",
        lambda c: c["config"]["layers"][0]["config"].pop("batch_input_shape") and None,
        LoadError,
        "has no shape",
    ),
    "a call that fails": (
        "merges",
        lambda c: c["config"]["layers"][0]["config"].update(batch_input_shape=[None, 5]),
        LoadError,
        "cannot call layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_has_no_equivalent_is_refused_in_one_line(case, nets, tmp_path):
    name, change, error, words = REFUSALS[case]
    path = edited(nets / f"{name}.h5", tmp_path / "m.h5", change)
    with pytest.raises(DeploykitError) as caught:
        load(path)
    assert type(caught.value) is error, caught.value
    text = str(caught.value)
    assert words in text
    assert "\n" not in text
    assert "m.h5" in text


@pytest.mark.parametrize("name", legacy_nets.REFUSED)
def test_what_computes_something_else_now_is_refused_in_one_line(name, nets):
    words = {
        "training": "training=True",
        "hard": "hard_sigmoid",
        "separable": "pads causally",
        "activation": r"an activation with weights \((PReLU|BatchNormalization)\)",
    }
    with pytest.raises(UnsupportedModelError, match=words.get(name.partition("_")[0], "sees a mask")) as caught:
        load(nets / f"refused_{name}.h5")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", ["2.2.4", "2.3.1"])
@pytest.mark.parametrize("size", [[2, 2], [2, 4], [8, 1], [1, 1]])
def test_bilinear_upsampling_beside_tensorflow_1_takes_its_points(version, size, nets, tmp_path):
    import tensorflow as tf

    change = _only(name="up", size=size)
    loaded = load(edited(nets / "resizing.h5", tmp_path / "m.h5", change, version))
    assert loaded.model.layers[-1].name == "up"
    assert any("upsamples as TensorFlow 1 did" in notice for notice in loaded.notices)
    x = np.random.default_rng(0).normal(size=(3, 8, 7, 3)).astype(np.float32)
    wanted = tf.compat.v1.image.resize_bilinear(x, [8 * size[0], 7 * size[1]]).numpy()
    assert distance(answers(loaded.model, [x]), [wanted]) < 1e-6


@pytest.mark.parametrize("version", ["2.2.4-tf", "2.4.0"])
def test_bilinear_upsampling_beside_tensorflow_2_is_what_it_is_now(version, nets, tmp_path):
    agrees(edited(nets / "resizing.h5", tmp_path / "m.h5", lambda config: None, version), nets, "resizing")


@pytest.mark.parametrize(("size", "backend"), [([2, 3], "tensorflow"), ([6, 2], "tensorflow"), ([2, 2], "theano")])
def test_other_bilinear_upsampling_beside_tensorflow_1_is_refused(size, backend, nets, tmp_path):
    path = edited(nets / "resizing.h5", tmp_path / "m.h5", _only(size=size), backend=backend)
    with pytest.raises(UnsupportedModelError, match="takes other points"):
        load(path)


def _only(name: str = "up", **arguments: Any) -> Callable[[dict[str, Any]], None]:
    """The first layer alone, changed."""

    def change(config):
        del config["config"]["layers"][2:]
        config["config"]["layers"][1]["config"].update(name=name, **arguments)

    return change


def test_an_attention_that_did_not_look_at_masks_does_not_now(nets, tmp_path):
    def without(config):
        config["config"]["layers"][1]["config"]["mask_zero"] = False

    inputs, wanted = known(nets, "masked_attention")
    old = load(edited(nets / "masked_attention.h5", tmp_path / "old.h5", lambda config: None, "2.9.0")).model
    plain = load(edited(nets / "masked_attention.h5", tmp_path / "plain.h5", without, "2.9.0")).model
    np.testing.assert_array_equal(answers(old, inputs)[0], answers(plain, inputs)[0])
    assert distance(answers(old, inputs), wanted) > 1e-2


def test_an_attention_behind_a_mask_of_an_unknown_time_is_refused(nets, tmp_path):
    shutil.copy(nets / "masked_attention.h5", path := tmp_path / "m.h5")
    with h5py.File(path, "r+") as file:
        del file.attrs["keras_version"]
    with pytest.raises(UnsupportedModelError, match="sees a mask"):
        load(path)


@pytest.mark.parametrize("name", ["mask_concatenate_both", "mask_multiply_both", "mask_rescaling", "decoder_lstm"])
def test_a_mask_stays_as_it_was_in_a_clean_file_and_a_flat_copy(name, nets, tmp_path):
    model = load(nets / f"{name}.h5").model
    model.save(tmp_path / "m.keras")
    inputs, wanted = known(nets, name)
    again = keras.models.load_model(tmp_path / "m.keras", compile=False, safe_mode=True)
    for found in (again, graph.canonical(model)):
        assert distance(answers(found, inputs), wanted) < 2e-6


def test_masks_of_pruning_that_cannot_be_told_apart_are_refused(nets, tmp_path):
    shutil.copy(nets / "frozen_but_for_the_last.h5", path := tmp_path / "m.h5")
    with h5py.File(path, "r+") as file:
        group = file["model_weights"]["body"]
        names = [text_of(name) for name in group.attrs["weight_names"]]
        for key, value in {"p/mask:0": np.ones((4, 4)), "q/mask:0": np.ones((4, 4)), "p/pruning_step:0": 1}.items():
            group[key] = value
            names.append(key)
        group.attrs["weight_names"] = names
    with pytest.raises(LoadError, match="cannot be told apart"):
        load(path)


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("StringLookup", {"vocabulary": None}, "without its vocabulary"),
        ("Resizing", {"height": 3, "width": 3, "interpolation": "gaussian"}, "gaussian interpolation"),
        ("BatchNormalization", {"axis": []}, "along the axes"),
    ],
)
def test_what_keras_3_would_stumble_over_later_is_refused_now(kind, arguments, words, nets, tmp_path):
    def change(config):
        entry = config["config"]["layers"][1]
        entry.update(class_name=kind, config={"name": entry["config"]["name"], **arguments})

    with pytest.raises(UnsupportedModelError, match=words):
        load(edited(nets / "dense.h5", tmp_path / "m.h5", change))


def test_arguments_of_a_class_of_the_users_reach_it(nets, tmp_path):
    (tmp_path / "flags.py").write_text(
        "import keras\nclass Flag(keras.layers.Layer):\n"
        "    def call(self, x, double=True):\n        return 2 * x if double else x\n"
    )

    def change(config):
        entry = config["config"]["layers"][1]
        entry.update(class_name="Flag", config={"name": entry["name"]})
        entry["inbound_nodes"][0][0][3]["double"] = False

    path = edited(nets / "list_of_one.h5", tmp_path / "m.h5", change)
    with h5py.File(path, "r+") as file:
        group = file["model_weights"]
        for name in list(group):
            del group[name]
        group.attrs["layer_names"] = np.asarray([], "S1")
    model = load(path, custom_objects=[str(tmp_path / "flags.py")]).model
    np.testing.assert_array_equal(answers(model, [np.ones((2, 6), "float32")])[0], np.ones((2, 6)))


def _weights(change: Callable[[h5py.Group], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            change(file["model_weights"])

    return apply


def _group(group: h5py.Group) -> h5py.Group:
    return next(group[name] for name in group if len(group[name].attrs.get("weight_names", ())) == 2)


def _reorder(group: h5py.Group) -> None:
    one = _group(group)
    one.attrs["weight_names"] = list(one.attrs["weight_names"])[::-1]


def _lose(group: h5py.Group) -> None:
    one = _group(group)
    one.attrs["weight_names"] = list(one.attrs["weight_names"])[:1]


def _reshape(group: h5py.Group) -> None:
    one = _group(group)
    name = one.attrs["weight_names"][1]
    value = one[name][...]
    del one[name]
    one[name] = np.concatenate([value, value])


def _forget(group: h5py.Group) -> None:
    group.attrs["layer_names"] = list(group.attrs["layer_names"])[:-1]


MISFITS = {
    "another order": (_reorder, "stands where"),
    "one too few": (_lose, "1 arrays for 2 weights"),
    "another shape": (_reshape, "has the shape"),
    "a layer too few": (_forget, "has weights for 1 layers"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_weights_that_do_not_fit_are_refused_in_one_line(case, nets, tmp_path):
    change, words = MISFITS[case]
    shutil.copy(nets / "dense.h5", path := tmp_path / "m.h5")
    _weights(change)(path)
    with pytest.raises(LoadError, match=words) as caught:
        load(path)
    assert "\n" not in str(caught.value)


ARCHIVES: dict[str, tuple[Callable[[h5py.File], Any], str]] = {
    "lost a layer": (lambda file: file.pop("layers/dense_1"), "0 arrays for 2 weights"),
    "has an activation's weights": (
        lambda file: file.create_dataset("layers/dense/activation/vars/0", data=np.ones(4)),
        r"no layer of Keras 3 takes \(layers/dense/activation/vars/0\)",
    ),
    "has a model's own weights": (lambda file: file.create_dataset("vars/0", data=np.ones(4)), r"takes \(vars/0\)"),
    "has a layer more": (
        lambda file: [file.create_dataset(f"layers/dense_2/vars/{i}", data=np.ones(4)) for i in range(2)],
        "layers/dense_2/vars/0 and 1 more",
    ),
}


def rezipped(nets: Path, name: str, folder: Path, change: Callable[[h5py.File], Any]) -> Path:
    """An archive with other arrays."""
    with zipfile.ZipFile(nets / f"{name}.keras") as archive:
        archive.extractall(folder / "in")
    with h5py.File(folder / "in" / "model.weights.h5", "r+") as file:
        change(file)
    with zipfile.ZipFile(folder / "m.keras", "w") as archive:
        for part in ("config.json", "metadata.json", "model.weights.h5"):
            archive.write(folder / "in" / part, part)
    return folder / "m.keras"


@pytest.mark.parametrize("case", ARCHIVES)
def test_an_archive_with_other_arrays_is_refused_in_one_line(case, nets, tmp_path):
    change, words = ARCHIVES[case]
    with pytest.raises(DeploykitError, match=words) as caught:
        load(rezipped(nets, "dense", tmp_path, change))
    assert "\n" not in str(caught.value)


def test_what_training_keeps_in_an_archive_is_no_weight(nets, tmp_path):
    def trained(file):
        for path in ("optimizer/vars/0", "layers/dense/_random_generator/vars/0"):
            file.create_dataset(path, data=np.ones(4))

    agrees(rezipped(nets, "dense", tmp_path, trained), nets, "dense")


# ------------------------------------------------------------------------------------------------------- tables


def test_every_renamed_class_and_default_is_of_keras_3():
    for name in [*translation.RENAMED.values(), *(kind for kind, _ in translation.STEEPER)]:
        assert translation.is_keras_layer(name)
    assert not any(translation.is_keras_layer(name) for name in translation.REFUSED)


def test_every_layer_of_the_old_package_is_known_or_refused():
    """Classes of tf-keras that Keras 3 has not, and that no table knows."""
    script = "import tf_keras as k; print(*[n for n in dir(k.layers) if isinstance(getattr(k.layers, n), type)])"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    tables = {
        *translation.RENAMED,
        *translation.IDENTITIES,
        *translation.REFUSED,
        *translation.STRIPPED,
        *translation.MODELS,
        "InputSpec",
        "AbstractRNNCell",
    }
    assert {name for name in said if not translation.is_keras_layer(name)} - tables == set()


# --------------------------------------------------------------------------------------------------- real files

REAL = {
    "eegnet_tfkeras224.h5": "2.2.4-tf",
    "fast_srgan_generator.h5": "2.2.4-tf",
    "mlperf_tiny_resnet.h5": "2.4.0",
    "mltk_kws_mobilenetv2.h5": "2.4.0",
    "rapidtide_cnn_keras222.h5": "2.2.2",
    "rapidtide_cnn_tfkeras219.keras": "2.19.0",
    "tiny_xception_kdef.hdf5": "2.0.5",
}


@pytest.mark.parametrize("name", REAL)
def test_a_real_trained_file_answers_as_in_tf_keras(name, shared_models, tmp_path):
    loaded = load(shared_models / name)
    assert loaded.saved_by == REAL[name]
    rng = np.random.default_rng(0)
    shape = [4, *(size or 40 for size in loaded.model.input_shape[1:])]
    scale = 255 if name == "mlperf_tiny_resnet.h5" else 1
    np.save(tmp_path / "x.npy", (rng.uniform(0, 1, shape) * scale).astype(np.float32))
    script = (
        "import sys, numpy, tf_keras; m = tf_keras.models.load_model(sys.argv[1], compile=False);"
        "numpy.save(sys.argv[3], m(numpy.load(sys.argv[2]), training=False).numpy())"
    )
    suffix = ".keras" if name.endswith(".keras") else ".h5"
    os.symlink(shared_models / name, tmp_path / f"old{suffix}")
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / f"old{suffix}", tmp_path / "x.npy", tmp_path / "y.npy"],
        check=True,
        capture_output=True,
    )
    found = answers(loaded.model, [np.load(tmp_path / "x.npy")])
    assert distance(found, [np.load(tmp_path / "y.npy")]) < 1e-5
