"""SavedModel folders: what Keras wrote is what comes back, and nothing in a folder is trusted or run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc

import keras
import numpy as np
import pytest
import savedmodel_files as files
import tensorflow as tf
from keras.src.legacy.saving.saving_utils import model_from_config
from tensorflow.core.protobuf.saved_object_graph_pb2 import SavedObject, SavedObjectGraph

from deploykit.errors import DeploykitError, LoadError, UnsafeModelError, UnsupportedModelError
from deploykit.load import checkpoint, load, savedmodel

NETS = sorted(files.NETS)
INDEX, SHARD = savedmodel.INDEX, "variables/variables.data-00000-of-00001"


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """One folder for each net, as tf_keras writes it."""
    pytest.importorskip("tf_keras", reason="tf_keras, which writes the folders, is not installed")
    folder = tmp_path_factory.mktemp("savedmodel")
    done = subprocess.run(
        [sys.executable, files.__file__, str(folder)], env=files.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.fixture
def copied(folders, tmp_path):
    """A folder of one's own to spoil."""

    def copy(name="half"):
        return shutil.copytree(folders / name, tmp_path / name)

    return copy


def built(name):
    """The same net in Keras 3, every weight set to a number that no file has."""
    model = files.NETS[name](keras)
    for weight in model.weights:
        weight.assign(np.full(weight.shape, 7))
    return model


def filled(folder, model):
    return savedmodel.fill(folder, model, savedmodel.peek(folder))


def agree(model, arrays, bound=1e-6):
    outputs = model(arrays["x"], training=False)
    for place, output in enumerate(outputs if isinstance(outputs, list) else [outputs]):
        expected = arrays[f"output_{place}"]
        assert expected.std() > 0.01
        assert np.abs(np.asarray(output) - expected).max() <= bound * np.abs(expected).max()


def one_line(call, kind, *said):
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    for part in said:
        assert part in text
    return text


# What comes back


def simple(config):
    """Without what depends on the serializer, and not on the model."""
    if isinstance(config, list):
        return [simple(item) for item in config]
    if not isinstance(config, dict):
        return config
    left_out = ("module", "registered_name", "shared_object_id", "build_config")
    return {key: simple(value) for key, value in config.items() if key not in left_out}


@pytest.mark.parametrize("name", NETS)
def test_the_config_is_what_an_hdf5_file_would_hold(folders, name):
    contents = savedmodel.peek(folders / name)
    expected = json.loads((folders / f"{name}.json").read_text())
    assert simple(contents.config) == simple({key: expected[key] for key in ("class_name", "config")})


def test_the_folder_says_who_saved_it(folders):
    contents = savedmodel.peek(folders / "sequential")
    assert (contents.saved_by, contents.backend, contents.generation) == ("2.21.0", "tensorflow", 2)
    assert contents.training_config_found
    assert not savedmodel.peek(folders / "nested").training_config_found


@pytest.mark.parametrize("name", NETS)
def test_a_filled_net_computes_what_it_computed_in_tf_keras(folders, name):
    model = built(name)
    assert filled(folders / name, model) == []
    agree(model, np.load(folders / f"{name}.npz"))


@pytest.mark.parametrize("name", ["nested", "recurrent", "sequential"])
def test_descriptions_inside_the_graph_are_read_too(folders, copied, name):
    folder = copied(name)
    files.describe_inside(folder)
    assert savedmodel.peek(folder) == savedmodel.peek(folders / name)
    model = built(name)
    filled(folder, model)
    agree(model, np.load(folders / f"{name}.npz"))


@pytest.mark.parametrize("name", ["nested", "sequential", "recurrent"])
def test_order_decides_nothing(folders, copied, name):
    folder = copied(name)

    def reverse(tree):
        for node in tree.nodes:
            children = list(node.children)[::-1]
            del node.children[:]
            node.children.extend(children)

    files.edit(folder, reverse)
    files.regraph(folder, reverse)
    model = built(name)
    filled(folder, model)
    agree(model, np.load(folders / f"{name}.npz"))


def test_normalization_up_to_tensorflow_2_5_keeps_its_moments_under_other_names(folders, copied):
    folder = copied("sequential")

    def rename(tree):
        for node in tree.nodes:
            for child in node.children:
                child.local_name = child.local_name.replace("adapt_", "former_")

    files.edit(folder, rename)
    files.regraph(folder, rename)
    model = built("sequential")
    filled(folder, model)
    agree(model, np.load(folders / "sequential.npz"))


def test_a_real_folder_of_tensorflow_2_3(shared_models):
    folder = shared_models / "mlperf_tiny_kws_savedmodel"
    contents = savedmodel.peek(folder)
    assert (contents.saved_by, contents.config["class_name"]) == ("2.4.0", "Functional")
    for layer in contents.config["config"]["layers"]:
        if layer["class_name"] == "DepthwiseConv2D":
            del layer["config"]["groups"]
    model = model_from_config(contents.config)
    assert savedmodel.fill(folder, model, contents) == []
    generator = np.random.default_rng(0)
    x = (generator.normal(0, 20, (64, 1, 10, 1)) + generator.normal(0, 5, (64, 49, 10, 1))).astype("float32")
    original = tf.saved_model.load(str(folder))
    theirs = {variable.name.removesuffix(":0"): variable for variable in original.variables}
    assert len(theirs) == len(model.weights) == 56
    for weight in model.weights:
        name = weight.path.replace("/kernel", "/depthwise_kernel") if "depthwise" in weight.path else weight.path
        np.testing.assert_array_equal(weight, theirs[name])
    (expected,) = original.signatures["serving_default"](tf.constant(x)).values()
    assert expected.numpy().std(axis=0).max() > 0.05
    # Both are float32: each is up to 2e-6 from the same net in float64, depending on how threads share the sums.
    np.testing.assert_allclose(model([x]), expected, rtol=0, atol=5e-6)


def test_the_checkpoint_reads_as_tensorflow_reads_it(folders):
    for name in ("sequential", "recurrent"):
        ours = checkpoint.Checkpoint(folders / name)
        theirs = tf.train.load_checkpoint(str(folders / name / "variables/variables"))
        keys = [key for key, kind in theirs.get_variable_to_dtype_map().items() if kind != tf.string]
        assert len(keys) > 10
        for key in keys:
            values = ours.array(key, key)
            assert values.dtype == theirs.get_tensor(key).dtype
            np.testing.assert_array_equal(values, theirs.get_tensor(key))
        graph = checkpoint.OBJECTS
        assert ours.text(graph) == theirs.get_tensor(graph)


# What does not fit


def test_a_weight_that_the_folder_lacks_is_named(folders):
    inputs = keras.Input((4,))
    x = keras.layers.Dense(5, name="dense_1")(inputs)
    more = keras.layers.Dense(3, name="dense_2")(keras.layers.Dense(5, name="new")(x))
    one_line(lambda: filled(folders / "half", keras.Model(inputs, more)), LoadError, "layer 'new'", "no weights")
    other = keras.layers.Dense(3, name="dense_2")(keras.layers.BatchNormalization(name="dense_1")(inputs))
    one_line(lambda: filled(folders / "half", keras.Model(inputs, other)), LoadError, "'gamma'", "'dense_1'", "missing")
    part = keras.layers.Dense(3, name="dense_2")(
        keras.layers.LSTM(5, name="dense_1")(keras.layers.Reshape((4, 1))(inputs))
    )
    one_line(lambda: filled(folders / "half", keras.Model(inputs, part)), LoadError, "'dense_1'", "no part 'cell'")


def test_a_weight_that_the_model_has_no_place_for_is_named(folders):
    inputs = keras.Input((4,))
    bare = keras.layers.Dense(3, name="dense_2", use_bias=False)(keras.layers.Dense(5, name="dense_1")(inputs))
    one_line(lambda: filled(folders / "half", keras.Model(inputs, bare)), LoadError, "no place", "'bias'", "'dense_2'")
    short = keras.Model(inputs, keras.layers.Dense(5, name="dense_1")(inputs))
    one_line(lambda: filled(folders / "half", short), LoadError, "no place", "'dense_2'")


def test_a_weight_of_another_shape_is_named_and_nothing_is_assigned(folders):
    inputs = keras.Input((4,))
    wide = keras.layers.Dense(4, name="dense_2")(keras.layers.Dense(5, name="dense_1")(inputs))
    model = keras.Model(inputs, wide)
    before = [weight.numpy() for weight in model.weights]
    one_line(lambda: filled(folders / "half", model), LoadError, "'kernel' of layer 'dense_2'", "(5, 3)", "(5, 4)")
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight, value)


def test_a_weight_that_is_rounded_is_said(folders):
    inputs = keras.Input((4,))
    x = keras.layers.Dense(5, name="dense_1")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3, name="dense_2", dtype="float16")(x))
    kernel, bias = filled(folders / "half", model)
    assert "'kernel' of layer 'dense_2' is stored in float32 and was rounded to float16" in kernel
    assert "'bias'" in bias


def test_a_weight_that_no_attribute_leads_to_is_named(folders):
    model = built("half")
    model._track_variable(keras.Variable(np.zeros(2), name="loose"))
    one_line(lambda: filled(folders / "half", model), LoadError, "loose", "belongs to no layer")


def test_two_layers_of_one_name_are_refused(copied):
    folder = copied()
    for layer in (1, 2):
        files.redescribe(folder, lambda document: {**document, "name": "dense_1"}, layer)
    one_line(lambda: filled(folder, built("half")), LoadError, "two layers 'dense_1'")


# What is no rebuildable Keras model


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("module", "it was saved without Keras layers"),
        ("plain", "it was saved without Keras layers"),
        ("subclassed", "it is a subclassed model (Own), whose layers only its own code knows"),
        ("version1", "it was saved without Keras layers"),
    ],
)
def test_other_folders_are_graphs_with_the_reason(folders, name, said):
    assert savedmodel.recognises(folders / name)
    contents = savedmodel.peek(folders / name)
    assert contents.opaque == said
    assert said in contents.notices[0]


def test_a_subclassed_model_is_its_graph(folders):
    model = load(folders / "subclassed").model
    theirs = tf.saved_model.load(str(folders / "subclassed")).signatures["serving_default"]
    x = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    (expected,) = theirs(tf.constant(x)).values()
    np.testing.assert_allclose(model(x), expected, rtol=1e-6)


def test_a_vocabulary_that_only_the_graph_knows_is_asked_for(folders):
    said = "(StringLookup) keeps its vocabulary in the graph"
    one_line(lambda: savedmodel.peek(folders / "lookup"), UnsupportedModelError, said)


def test_a_layer_alone_is_a_graph(copied):
    folder = copied()

    def layer(tree):
        tree.nodes[0].user_object.identifier = "_tf_keras_layer"

    files.describe_inside(folder)
    files.edit(folder, layer)
    assert "is no Keras model" in savedmodel.peek(folder).opaque


def test_only_folders_with_a_graph_are_recognised(folders, tmp_path):
    assert savedmodel.recognises(folders / "half")
    assert not savedmodel.recognises(folders / "half/saved_model.pb")
    assert not savedmodel.recognises(tmp_path)
    assert not savedmodel.recognises(tmp_path / "absent")


def test_without_a_keras_version_tensorflows_stands_in_with_a_notice(copied):
    folder = copied()
    files.redescribe(folder, lambda document: document.pop("keras_version") and None)
    contents = savedmodel.peek(folder)
    assert contents.saved_by == tf.__version__
    assert "only TensorFlow" in contents.notices[0]


# Nothing of the folder runs, nothing is written


def test_the_graph_is_not_even_parsed(folders, copied):
    """``graph_def`` is replaced by bytes that no parser takes."""
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    folder = copied("nested")
    graph = SavedModel.FromString((folder / "saved_model.pb").read_bytes()).meta_graphs[0]
    parts = {1: graph.meta_info_def.SerializeToString(), 2: b"\xff" * 64, 7: graph.object_graph_def.SerializeToString()}
    inner = b"".join(bytes((number << 3 | 2,)) + files.varint(len(part)) + part for number, part in parts.items())
    (folder / "saved_model.pb").write_bytes(b"\x08\x01\x12" + files.varint(len(inner)) + inner)
    model = built("nested")
    filled(folder, model)
    agree(model, np.load(folders / "nested.npz"))


def test_tensorflow_never_sees_the_folder(folders, monkeypatch):
    def never(*_, **__):
        raise AssertionError("TensorFlow was given the folder")

    for owner, name in ((tf.saved_model, "load"), (tf.train, "load_checkpoint"), (tf, "load_op_library")):
        monkeypatch.setattr(owner, name, never)
    filled(folders / "half", built("half"))


def test_reading_leaves_the_folder_as_it_was(copied):
    folder = copied()
    before = savedmodel.sha256(folder), sorted(os.walk(folder))
    filled(folder, built("half"))
    assert (savedmodel.sha256(folder), sorted(os.walk(folder))) == before


def test_the_fingerprint_is_of_names_and_contents(copied, folders):
    folder = copied()
    first = savedmodel.sha256(folder)
    assert first == savedmodel.sha256(folders / "half")
    os.utime(folder / INDEX, (0, 0))
    (folder / "empty").mkdir()
    assert savedmodel.sha256(folder) == first
    assert savedmodel.size_bytes(folder) == sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    (folder / "fingerprint.pb").rename(folder / "other.pb")
    renamed = savedmodel.sha256(folder)
    assert renamed != first
    with open(folder / SHARD, "ab") as stream:
        stream.write(b"x")
    assert savedmodel.sha256(folder) not in (first, renamed)


# Hostile and damaged folders


def test_a_link_out_of_the_folder_is_refused(copied, tmp_path):
    folder = copied()
    (folder / INDEX).rename(tmp_path / "elsewhere")
    (folder / INDEX).symlink_to(tmp_path / "elsewhere")
    for call in (savedmodel.peek, savedmodel.sha256, lambda path: savedmodel.fill(path, None, None)):
        one_line(lambda call=call: call(folder), UnsafeModelError, "variables.index", "link")


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(copied):
    folder = copied()
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to("/etc/passwd")
    one_line(lambda: savedmodel.peek(folder), UnsafeModelError, "variables.data", "link")


def test_a_link_to_a_folder_is_refused(copied):
    folder = copied()
    (folder / "assets/round").symlink_to(folder, target_is_directory=True)
    one_line(lambda: savedmodel.sha256(folder), UnsafeModelError, "assets/round")


def test_a_link_within_the_folder_is_followed(copied):
    folder = copied()
    (folder / INDEX).rename(folder / "kept")
    (folder / INDEX).symlink_to("../kept")
    filled(folder, built("half"))


def test_a_folder_that_is_itself_a_link_is_followed(folders, tmp_path):
    (tmp_path / "link").symlink_to(folders / "half", target_is_directory=True)
    filled(tmp_path / "link", built("half"))


def test_a_pipe_in_the_folder_is_refused_and_not_waited_for(copied):
    folder = copied()
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)
    one_line(lambda: savedmodel.peek(folder), UnsafeModelError, "no regular file")


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("MAX_GRAPH_BYTES", 1000),
        ("MAX_OBJECTS_BYTES", 100),
        ("MAX_METADATA_BYTES", 1000),
        ("MAX_INDEX_BYTES", 100),
        ("MAX_KEY_BYTES", 100),
        ("MAX_RECORDS", 6),
        ("MAX_FILES", 4),
        ("MAX_DEPTH", 0),
    ],
)
def test_each_limit_holds(folders, monkeypatch, limit, value):
    model = built("half")
    filled(folders / "half", model)
    for module in (checkpoint, savedmodel):
        if hasattr(module, limit):
            monkeypatch.setattr(module, limit, value)
    one_line(lambda: filled(folders / "half", model), LoadError)


def test_the_number_of_objects_and_of_variables_is_limited(folders, monkeypatch, tmp_path):
    for module in (checkpoint, savedmodel):
        monkeypatch.setattr(module, "MAX_RECORDS", 3)
    one_line(lambda: checkpoint.Checkpoint(folders / "half"), LoadError, "variables.index")
    tree = SavedObjectGraph(nodes=[SavedObject()] * 4)
    one_line(lambda: checkpoint.refuse_tree(tree.nodes, "it", tmp_path), LoadError, "more than 3 objects")


def test_an_index_of_one_block_over_and_over_is_refused(copied):
    """A short index could have its long blocks read a million times."""
    folder = copied()
    data = (folder / INDEX).read_bytes()
    _, at = checkpoint.varint(data[-48:], 0)
    _, at = checkpoint.varint(data[-48:], at)
    handle = next(checkpoint._block(data, data[-48:], at))[1]
    body = b"".join(bytes((0, 1, len(handle), place)) + handle for place in range(9)) + b"\0\0\0\0\1\0\0\0"
    block = body + b"\0" + files.masked(files.crc32c(body + b"\0")).to_bytes(4, "little")
    footer = files.varint(0) * 2 + files.varint(len(data) - 48) + files.varint(len(body))
    (folder / INDEX).write_bytes(data[:-48] + block + footer.ljust(40, b"\0") + checkpoint._MAGIC)
    one_line(lambda: filled(folder, built("half")), LoadError, "variables.index")


def test_objects_nested_too_deep_are_refused(copied):
    folder, depth = copied(), savedmodel.MAX_DEPTH + 5

    def chain(tree):
        last = 0
        for _ in range(depth):
            number = len(tree.nodes)
            tree.nodes[last].children.add(node_id=number, local_name="next")
            tree.nodes.add()
            last = number

    files.edit(folder, chain)
    files.regraph(folder, chain)
    one_line(lambda: filled(folder, built("half")), LoadError, "nested more than")


def test_objects_in_a_circle_are_walked_once(copied):
    folder = copied()

    def circle(tree):
        tree.nodes[1].children.add(node_id=0, local_name="model")

    files.edit(folder, circle)
    files.regraph(folder, circle)
    filled(folder, built("half"))


@pytest.mark.parametrize("change", [files.edit, files.regraph])
def test_an_edge_to_an_object_that_is_not_there_is_refused(copied, change):
    folder = copied()

    def point(tree):
        tree.nodes[0].children[0].node_id = 10**6

    change(folder, point)
    one_line(lambda: filled(folder, built("half")), LoadError, "damaged")


def test_a_description_that_is_too_deep_is_refused(copied):
    folder = copied()
    document = None
    for _ in range(300):
        document = {"class_name": "Functional", "config": document}
    files.redescribe(folder, lambda _: document)
    one_line(lambda: savedmodel.peek(folder), LoadError, "levels deep")


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense"])
def test_a_description_that_is_none_is_refused(copied, text):
    folder = copied()
    files.redescribe(folder, lambda document: document)
    from tf_keras.protobuf.saved_metadata_pb2 import SavedMetadata

    metadata = SavedMetadata.FromString((folder / "keras_metadata.pb").read_bytes())
    metadata.nodes[0].metadata = text
    (folder / "keras_metadata.pb").write_bytes(metadata.SerializeToString())
    one_line(lambda: savedmodel.peek(folder), DeploykitError)


def _dims(*sizes):
    def change(key, entry):
        if "kernel" in key:
            del entry.shape.dim[:]
            for size in sizes:
                entry.shape.dim.add(size=size)

    return change


def _set(**values):
    def change(_, entry):
        for name, value in values.items():
            setattr(entry, name, value)

    return change


def _absurd(key, entry):
    """The shape stays what the model wants; the rest lies."""
    entry.size = 1 << 50


def _sliced(_, entry):
    entry.slices.add().extent.add(start=0, length=2)


def _no_rank(_, entry):
    entry.shape.unknown_rank = True


# TensorFlow's own reader aborts the process on the first four and on an entry that is no message.
LIES = {
    "negative": _dims(-7, 5),
    "huge": _dims(1 << 62, 1 << 62),
    "many dimensions": _dims(*[2] * 300),
    "unknown type": _set(dtype=77),
    "a terabyte": _dims(1 << 20, 1 << 18),
    "a string": _set(dtype=7),
    "another type": _set(dtype=2),
    "no type": _set(dtype=0),
    "too long": _absurd,
    "too short": _set(size=1),
    "negative size": _set(size=-1),
    "behind the end": _set(offset=1 << 40),
    "before the start": _set(offset=-8),
    "another shard": _set(shard_id=3),
    "another checksum": _set(crc32c=1),
    "in slices": _sliced,
    "no rank": _no_rank,
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies_is_refused_before_anything_is_allocated(copied, lie):
    folder, model = copied(), built("half")
    files.reindex(folder, lambda key, entry: None)
    filled(folder, model)  # an index written again is fine
    files.reindex(folder, LIES[lie])
    tracemalloc.start()
    try:
        one_line(lambda: filled(folder, model), LoadError)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_type_that_changed_on_the_disk_is_not_believed(copied):
    """Float32 read as int32 would have the same size and the same checksum of its values."""
    folder = copied()
    index = (folder / INDEX).read_bytes()
    assert b"\x08\x01\x12" in index
    (folder / INDEX).write_bytes(index.replace(b"\x08\x01\x12", b"\x08\x03\x12"))
    one_line(lambda: filled(folder, built("half")), LoadError, "variables.index")


def test_weights_that_are_complex_numbers_are_refused(copied):
    folder = copied()
    shard = (folder / SHARD).read_bytes()

    def change(key, entry):
        if "kernel" in key:
            entry.dtype, entry.offset, entry.size = 8, 0, 2 * entry.size
            entry.crc32c = files.masked(files.crc32c(shard[: entry.size]))

    files.reindex(folder, change)
    one_line(lambda: filled(folder, built("half")), LoadError, "'kernel'")


def test_a_checkpoint_without_objects_is_refused(copied):
    folder = copied()
    files.regraph(folder, lambda tree: tree.Clear())
    one_line(lambda: filled(folder, built("half")), LoadError, "tree of objects")


def test_a_graph_file_without_a_graph_is_damaged(copied):
    folder = copied()
    (folder / "saved_model.pb").write_bytes(b"\x08\x01")
    one_line(lambda: savedmodel.peek(folder), LoadError, "damaged")


@pytest.mark.parametrize("message", [b"\x0a\x05ab", b"\x0b", b"\x08" + b"\xff" * 20, b"\x0d\0"])
def test_a_message_that_is_none_is_refused(message):
    with pytest.raises(ValueError, match=r"longer|kind|end"):
        list(savedmodel._fields(message, slice(0, len(message))))


def test_an_index_that_is_no_table_of_entries_is_refused(copied):
    folder, model = copied(), built("half")
    good = files.entries(folder)
    for bad in (
        files.table({**good, b"zz": b"\xff\xff\xff"}),
        files.table(good, compression=1),
        files.table({key: value for key, value in good.items() if key}),
        files.table({**good, b"": b"\x08\x01\x10\x01"}),  # one shard, big-endian
        files.table({**good, b"\xff\xfe": good[b"_CHECKPOINTABLE_OBJECT_GRAPH"]}),
        files.table({b"": good[b""]}),
        b"",
        b"\0" * 48,
    ):
        (folder / INDEX).write_bytes(bad)
        one_line(lambda: filled(folder, model), LoadError)


def test_names_that_unfold_are_bounded(copied, monkeypatch):
    """Each entry of an index repeats the name before it but for one byte."""
    monkeypatch.setattr(checkpoint, "MAX_KEY_BYTES", 1 << 20)
    folder = copied()
    first = files.varint(0) + files.varint(5000) + files.varint(0) + b"a" * 5000
    body = first + (files.varint(5000) + files.varint(0) + files.varint(0)) * 5000 + b"\0\0\0\0\1\0\0\0"
    kind = b"\0"
    block = body + kind + files.masked(files.crc32c(body + kind)).to_bytes(4, "little")
    entry = files.varint(0) + files.varint(len(body))
    inner = files.varint(0) + files.varint(1) + files.varint(len(entry)) + b"z" + entry + b"\0\0\0\0\1\0\0\0"
    index = inner + kind + files.masked(files.crc32c(inner + kind)).to_bytes(4, "little")
    footer = files.varint(0) * 2 + files.varint(len(block)) + files.varint(len(inner))
    (folder / INDEX).write_bytes(block + index + footer.ljust(40, b"\0") + checkpoint._MAGIC)
    one_line(lambda: filled(folder, built("half")), LoadError, "variables.index")


@pytest.mark.parametrize("name", [INDEX, SHARD, "keras_metadata.pb", "saved_model.pb"])
def test_a_file_that_is_cut_short_is_one_line(copied, name):
    folder, model = copied(), built("half")
    whole = (folder / name).read_bytes()
    for cut in (0, 1, 10, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        (folder / name).write_bytes(whole[:cut])
        one_line(lambda: filled(folder, model), DeploykitError)


@pytest.mark.parametrize("name", [INDEX, SHARD, "variables"])
def test_a_part_that_is_absent_is_one_line(copied, name):
    folder = copied()
    shutil.rmtree(folder / name) if name == "variables" else (folder / name).unlink()
    one_line(lambda: filled(folder, built("half")), LoadError)


@pytest.mark.parametrize("name", [INDEX, SHARD, "keras_metadata.pb", "saved_model.pb"])
def test_flipped_bits_are_refused_or_change_no_weight(folders, copied, name):
    folder, model, draw = copied(), built("half"), random.Random(0)
    whole = bytearray((folder / name).read_bytes())
    filled(folders / "half", model)
    expected = [weight.numpy() for weight in model.weights]
    for _ in range(60):
        spoilt = bytearray(whole)
        for _ in range(draw.choice((1, 1, 8))):
            spoilt[draw.randrange(len(spoilt))] ^= 1 << draw.randrange(8)
        (folder / name).write_bytes(spoilt)
        with contextlib.suppress(DeploykitError):  # whose messages are one line by construction
            filled(folder, model)
            for weight, value in zip(model.weights, expected, strict=True):
                np.testing.assert_array_equal(weight, value)


# The checksum


def test_the_checksum_is_castagnolis():
    assert checkpoint.crc32c(b"") == 0
    assert checkpoint.crc32c(b"123456789") == 0xE3069283


def test_the_checksum_of_every_length_is_that_of_the_definition(monkeypatch):
    data = np.random.default_rng(0).bytes(300)
    for length in range(130):
        assert checkpoint.crc32c(data[:length]) == files.crc32c(data[:length])
    monkeypatch.setattr(checkpoint, "_PIECE_BYTES", 64)
    for length in (63, 64, 65, 128, 129, 300):
        assert checkpoint.crc32c(data[:length]) == files.crc32c(data[:length])
