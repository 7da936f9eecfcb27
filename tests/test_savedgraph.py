"""SavedModels without Keras layers: read without being run, answered as TensorFlow answers, exported and checked."""

from __future__ import annotations

import json
import shutil

import keras
import numpy as np
import onnx
import pytest
import savedgraph_files as files
import tensorflow as tf
from tensorflow.python.framework import op_def_registry

from deploykit import opaque, runtimes
from deploykit.check import Candidate, check, make_reference
from deploykit.check import body as check_body
from deploykit.compare import policy_from
from deploykit.data import Samples, synthesize
from deploykit.errors import DeploykitError, LoadError, UnsafeModelError, UnsupportedModelError
from deploykit.export import export
from deploykit.fuse import fuse
from deploykit.graph import signature
from deploykit.load import load, savedgraph
from deploykit.report.evidence import verdict

SPEC = tf.TensorSpec((None, 3), tf.float32, name="x")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each good folder and inputs for it."""
    room = tmp_path_factory.mktemp("graphs")
    return {name: (room / name, write(room / name)) for name, write in files.GOOD.items()}


def answers(model, inputs, runtime="keras"):
    session = runtimes.open(runtime, model)
    try:
        return session.run(inputs)
    finally:
        session.close()


def one_line(call, kind, *words):
    with pytest.raises(DeploykitError) as caught:
        call()
    assert type(caught.value) is kind, caught.value
    assert str(caught.value).isprintable()
    for word in words:
        assert word in str(caught.value)


# What it answers


@pytest.mark.parametrize("name", files.GOOD)
def test_a_graph_answers_as_tensorflow_runs_it(folders, name):
    folder, inputs = folders[name]
    loaded = load(folder)
    assert loaded.opaque == "it was saved without Keras layers"
    assert loaded.generation is None
    theirs = tf.saved_model.load(str(folder)).signatures["serving_default"]
    expected = theirs(**{key: tf.constant(value) for key, value in inputs.items()})
    found = dict(zip(sorted(expected), answers(loaded.model, inputs).values(), strict=True))
    for key, output in found.items():
        assert output.std() > 0.01 or key == "best"
        np.testing.assert_allclose(output, expected[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", files.GOOD)
def test_a_graph_is_exported_and_equivalent_but_not_proven(folders, tmp_path, name):
    folder, inputs = folders[name]
    model = load(folder).model
    exported = export(model, tmp_path / "model.onnx")
    assert [spec.name for spec in exported.signature] == [spec.name for spec in signature(model)]
    reference = make_reference("graph", model, Samples(inputs, "the test's"))
    assert reference.precision == "float32"
    compared = check(reference, [Candidate("onnx", exported.path, "onnxruntime-cpu")], policy_from())
    report = check_body(reference, compared, policy_from())
    assert report["passed"], compared
    assert verdict(report)[0] is False


@pytest.mark.parametrize("name", ["exported", "twins", "version1"])
def test_a_wrong_file_does_not_pass(folders, tmp_path, name):
    folder, inputs = folders[name]
    model = load(folder).model
    path = export(model, tmp_path / "model.onnx").path
    proto = onnx.load(path)
    weight = max((one for one in proto.graph.initializer if one.data_type == 1), key=lambda one: np.prod(one.dims))
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[0] *= 1.05
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(proto, path)
    reference = make_reference("graph", model, Samples(inputs, "the test's"))
    assert not check(reference, [Candidate("onnx", path, "onnxruntime-cpu")], policy_from())[0].passed


def test_the_yardstick_is_of_the_size_of_the_models_own_error(folders):
    """Of a model whose float64 reference is known: within an order of magnitude (benchmarks/yardstick.py)."""
    image = keras.Input((6, 6, 2), name="image")
    x = keras.layers.Conv2D(8, 3, activation="relu")(image)
    model = keras.Model(image, keras.layers.Dense(5)(keras.layers.Flatten()(x)))
    files.enliven(model, 3)
    samples = synthesize(signature(model), count=32, seed=0)
    real = make_reference("keras", model, samples)
    (right,), (own,) = real.outputs.values(), real.original.values()
    weights = {f"w{i}": weight for i, weight in enumerate(model.get_weights())}
    rng = np.random.default_rng(0)
    nudged = keras.models.clone_model(model)
    nudged.set_weights([opaque.nudge(weight, rng) for weight in weights.values()])
    moved = nudged(opaque.nudge(samples.arrays["image"], rng))
    ratio = np.linalg.norm(np.asarray(moved, float) - right) / np.linalg.norm(own.astype(float) - right)
    assert 0.3 < ratio < 10


def test_the_inputs_and_outputs_have_the_signatures_names_in_natural_order(tmp_path):
    def many(x):
        return [x * float(place) for place in range(12)]

    loaded = load(files.write(tmp_path / "many", many, SPEC))
    assert [spec.name for spec in signature(loaded.model).outputs] == [f"output_{place}" for place in range(12)]


def test_two_graphs_whose_functions_have_the_same_names_live_in_one_process(folders, tmp_path):
    """Names of functions are the process' own; what another folder calls the same may do something else."""
    folder = shutil.copytree(folders["twins"][0], tmp_path / "twins")

    def other(meta):
        for function in meta.graph_def.library.function:
            for node in function.node_def:
                node.op = "Relu6" if node.op == "Relu" else node.op

    files.rewritten(folder, other)
    inputs = {name: 20 * values for name, values in folders["twins"][1].items()}
    first, second = load(folders["twins"][0]).model, load(folder).model
    before = answers(first, inputs)["y"]
    assert np.abs(answers(second, inputs)["y"] - before).max() > 0.1
    np.testing.assert_array_equal(answers(first, inputs)["y"], before)


def test_loading_is_silent_and_draws_nothing(folders, capfd):
    load(folders["exported"][0])
    assert capfd.readouterr() == ("", "")


# The verbs


def test_every_verb_says_what_it_can_do_with_a_graph(cli, folders, tmp_path):
    folder = folders["exported"][0]
    code, out, _ = cli("inspect", folder)
    assert code == 0
    assert "signature 'serving_default', TensorFlow" in out
    assert "1 Conv2D" in out
    for verb, words in (("fuse", "there are none to fold"), ("migrate", "no .keras file can hold")):
        code, _, err = cli(verb, folder, "-o", tmp_path / "no.keras")
        assert code == 2
        assert words in err
    assert list(tmp_path.iterdir()) == []
    code, out, _ = cli("export", folder, "-o", tmp_path / "net.onnx", "--json", tmp_path / "export.json")
    assert code == 0
    assert "NOT PROVEN" in out
    report = json.loads((tmp_path / "export.json").read_text())
    assert (report["proven"], report["check"]["passed"]) == (False, True)
    assert report["check"]["reference"]["precision"] == "float32"
    folding = report["fuse"]["folding"]
    assert folding["before"] > folding["after"] > 0
    code, out, _ = cli("check", folder, tmp_path / "net.onnx")
    assert code == 0
    assert "NOT PROVEN" in out


@pytest.mark.slow
def test_a_graph_is_timed_and_deployed(cli, folders, tmp_path):
    folder = folders["exported"][0]
    code, out, _ = cli("deploy", folder, "-o", tmp_path / "bundle", "--seconds", "0.3")
    assert code == 0
    assert "TensorFlow graph" in out
    report = json.loads((tmp_path / "bundle/report.json").read_text())
    assert report["proven"] is False
    assert not any(row["failed"] for row in report["bench"]["candidates"])
    assert "Not proven" in (tmp_path / "bundle/README.md").read_text()
    code, _, _ = cli("check", tmp_path / "bundle")
    assert code == 0


def test_fusing_a_graph_is_refused(folders):
    one_line(lambda: fuse(load(folders["exported"][0]).model), UnsupportedModelError, "none to fold")


def test_weights_beside_a_graph_are_refused(folders, tmp_path):
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]).save_weights(tmp_path / "a.weights.h5")
    one_line(lambda: load(folders["exported"][0], weights=tmp_path / "a.weights.h5"), LoadError, "its own weights")


# What is refused


def reads(x):
    return x + tf.cast(tf.strings.length(tf.io.read_file("secret")), tf.float32)


def writes(x):
    with tf.control_dependencies([tf.io.write_file("written", "x")]):
        return x + 1.0


def looked_up(x):
    table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer([1], [2.0]), 0.0)
    return table.lookup(tf.cast(x, tf.int32))


def called_back(x):
    return tf.ensure_shape(tf.numpy_function(lambda y: y, [x], tf.float32), (None, 3))


def random(x):
    return x + tf.random.normal(tf.shape(x))


HOSTILE = {
    reads: "ReadFile",
    writes: "WriteFile",
    called_back: "PyFunc",
    random: "RandomStandardNormal",
}


@pytest.mark.parametrize("function", HOSTILE, ids=lambda function: function.__name__)
def test_operations_that_do_more_than_compute_are_named_and_not_run(tmp_path, monkeypatch, function):
    monkeypatch.chdir(tmp_path)
    folder = files.write(tmp_path / "bad", function, SPEC)
    one_line(lambda: load(folder), UnsafeModelError, HOSTILE[function])
    assert not (tmp_path / "written").exists()


def test_a_table_is_refused(tmp_path):
    class Table(tf.Module):
        def __init__(self):
            super().__init__()
            start = tf.lookup.KeyValueTensorInitializer([1], [2.0], tf.int32, tf.float32)
            self.table = tf.lookup.StaticHashTable(start, 0.0)

        @tf.function(input_signature=[SPEC])
        def __call__(self, x):
            return self.table.lookup(tf.cast(x, tf.int32))

    module = Table()
    tf.saved_model.save(module, str(tmp_path / "table"), module.__call__)
    one_line(lambda: load(tmp_path / "table"), UnsafeModelError, "HashTableV2", "LookupTableFindV2")


def test_an_operation_hidden_behind_the_name_of_a_harmless_one_is_found(folders, tmp_path, monkeypatch):
    """A function may be called like an operation, and TensorFlow then runs the function."""
    monkeypatch.chdir(tmp_path)
    folder = files.write(tmp_path / "bad", writes, SPEC)

    def hide(meta):
        library = meta.graph_def.library
        body = next(f for f in library.function if any(node.op == "WriteFile" for node in f.node_def))
        for function in library.function:
            for node in function.node_def:
                for attribute in node.attr.values():
                    if attribute.func.name == body.signature.name:
                        attribute.func.name = "AddV2"
        body.signature.name = "AddV2"

    files.rewritten(folder, hide)
    one_line(lambda: load(folder), UnsafeModelError, "WriteFile")


def test_every_operation_allowed_is_known_and_touches_nothing():
    """By TensorFlow's own registry: none is stateful but calls, loops, variables and a check of numbers; none takes the
    name of a file, a device or a registered function."""
    stateful = {"PartitionedCall", "StatefulPartitionedCall", "If", "While", "Case", "VarHandleOp", "ReadVariableOp"}
    stateful |= {"ResourceGather", "Variable", "VariableV2", "CheckNumerics"}
    stateful |= {name for name in savedgraph.OPERATIONS if name.startswith("TensorArray")}  # lists in memory
    for name in savedgraph.OPERATIONS:
        definition = op_def_registry.get(name)
        assert definition is not None, name
        assert not definition.is_stateful or name in stateful, name
        arguments = {argument.name for argument in (*definition.input_arg, *definition.attr)}
        touching = {"filename", "filenames", "file_pattern", "token", "address", "target", "descriptor_source", "path"}
        assert not arguments & touching, name
    for name in ("ReadFile", "WriteFile", "MatchingFiles", "RestoreV2", "SaveV2", "PyFunc", "EagerPyFunc", "PrintV2"):
        assert name not in savedgraph.OPERATIONS
    for name in (
        "AssignVariableOp",
        "LoadLibrary",
        "DecodeProtoV2",
        "RpcCall",
        "XlaLaunch",
        "SymbolicGradient",
        "Send",
    ):
        assert name not in savedgraph.OPERATIONS


SIGNATURES = {
    "text": (lambda x: tf.strings.length(x), tf.TensorSpec((None,), tf.string, name="x"), "string"),
    "scalar": (lambda x: x + 1.0, tf.TensorSpec((), tf.float32, name="x"), "is a scalar"),
    "rankless": (lambda x: x + 1.0, tf.TensorSpec(None, tf.float32, name="x"), "unknown rank"),
    "complex": (lambda x: tf.cast(x, tf.complex64), SPEC, "complex64"),
}


@pytest.mark.parametrize("case", SIGNATURES)
def test_signatures_that_are_not_for_arrays_are_refused(tmp_path, case):
    function, spec, said = SIGNATURES[case]
    folder = files.write(tmp_path / "bad", function, spec)
    one_line(lambda: load(folder), UnsupportedModelError, said)


def test_a_folder_without_a_signature_or_with_several_is_refused(tmp_path):
    module = tf.Module()
    module.one = tf.function(lambda x: x + 1.0, input_signature=[SPEC])
    module.two = tf.function(lambda x: x * 2.0, input_signature=[SPEC])
    tf.saved_model.save(module, str(tmp_path / "none"), {})
    one_line(lambda: load(tmp_path / "none"), UnsupportedModelError, "has no signature")
    tf.saved_model.save(module, str(tmp_path / "two"), {"a": module.one, "b": module.two})
    one_line(lambda: load(tmp_path / "two"), UnsupportedModelError, "a, b", "'serving_default'")
    tf.saved_model.save(module, str(tmp_path / "other"), {"a": module.one})
    assert load(tmp_path / "other").opaque


def spoilt(change):
    return lambda folder: files.rewritten(folder, change)


def _circle(meta):
    library = meta.graph_def.library
    for function in library.function:
        for node in function.node_def:
            for attribute in node.attr.values():
                if attribute.HasField("func"):
                    attribute.func.name = function.signature.name


def _doubling(meta):
    """Thirty functions, each calling the next one twice."""
    graph = meta.graph_def
    first = next(node for node in graph.node if node.op == "StatefulPartitionedCall")
    model = next(f for f in graph.library.function if f.signature.name == first.attr["f"].func.name)
    for level in range(30):
        function = graph.library.function.add()
        function.signature.name = f"level{level}"
        for place in range(2):
            call = function.node_def.add(name=f"call{place}", op="StatefulPartitionedCall")
            call.attr["f"].func.name = f"level{level + 1}" if level < 29 else model.signature.name
    first.attr["f"].func.name = "level0"
    meta.object_graph_def.concrete_functions["level0"].CopyFrom(
        meta.object_graph_def.concrete_functions[model.signature.name]
    )


def _huge(meta):
    node = meta.graph_def.library.function[0].node_def.add(name="huge", op="Const")
    node.attr["dtype"].type = 1
    node.attr["value"].tensor.dtype = 1
    node.attr["value"].tensor.float_val.append(1.0)
    for _ in range(4):
        node.attr["value"].tensor.tensor_shape.dim.add(size=1 << 12)
    for function in meta.graph_def.library.function:
        if not any(one.name == "huge" for one in function.node_def):
            function.node_def.add().CopyFrom(node)


def _lost_function(meta):
    for function in list(meta.graph_def.library.function):
        if "signature_wrapper" not in function.signature.name:
            meta.graph_def.library.function.remove(function)


def _lost_node(meta):
    node = next(node for node in meta.graph_def.node if node.op == "StatefulPartitionedCall")
    node.input[0] = "nowhere"


def _wrong_shape(meta):
    node = next(node for node in meta.graph_def.node if node.op == "VarHandleOp")
    node.attr["shape"].shape.dim[0].size += 1


def _unbound(meta):
    for function in meta.object_graph_def.concrete_functions.values():
        del function.bound_inputs[:]


def _training(meta):
    del meta.meta_info_def.tags[:]
    meta.meta_info_def.tags.append("train")


def _nonsense(meta):
    for function in meta.graph_def.library.function:
        for node in function.node_def:
            node.op = "Conv2D" if node.op == "MatMul" else node.op


def _bodies(meta):
    """The functions that compute something; only some of them are called by the signature."""
    return [f for f in meta.graph_def.library.function if any(node.op == "MatMul" for node in f.node_def)]


def _added(body, name, op, dtype=None, value=None):
    node = body.node_def.add(name=name, op=op)
    if dtype is not None:
        node.attr["dtype"].type = dtype
    if value is not None:
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
    return node


def _sized(meta):
    for body in _bodies(meta):
        _added(body, "dims", "Const", 3, [65536, 65536])
        _added(body, "value", "Const", 1, 1.0)
        _added(body, "big", "Fill").input.extend(["dims:output:0", "value:output:0"])


def _resource(meta):
    for body in _bodies(meta):
        _added(body, "bad", "Const", 20)


def _inside(meta):
    library = meta.graph_def.library
    hidden = library.function.add()
    hidden.signature.name = "hidden"
    hidden.node_def.add(name="write", op="WriteFile")
    for body in _bodies(meta):
        call = _added(body, "call", "PartitionedCall")
        call.attr["f"].func.name = "hidden_too"
        call.attr["f"].func.attr["T"].func.name = "hidden"
    library.function.add().signature.name = "hidden_too"


def _unfed(meta):
    meta.graph_def.node.add(name="loose", op="Placeholder").attr["dtype"].type = 1
    next(node for node in meta.graph_def.node if node.op == "StatefulPartitionedCall").input.append("^loose")


def _placeholder(meta):
    for body in _bodies(meta):
        body.node_def[0].attr["extra"].placeholder = "T"


SPOILT = {
    "circle": (_circle, UnsafeModelError, "in a circle"),
    "doubling": (_doubling, UnsafeModelError, "written out"),
    "huge": (_huge, UnsafeModelError, "constants fill"),
    "lost function": (_lost_function, LoadError, "a function that is not there"),
    "lost node": (_lost_node, LoadError, "damaged"),
    "wrong shape": (_wrong_shape, LoadError, "in the checkpoint"),
    "unbound": (_unbound, LoadError, "no value in the checkpoint"),
    "training": (_training, UnsupportedModelError, "no graph for serving"),
    "a size": (_sized, UnsafeModelError, "makes 4.29e+09 numbers"),
    "a resource": (_resource, LoadError, "constant 'bad' is damaged"),
    "a function in a function": (_inside, UnsafeModelError, "WriteFile"),
    "an unknown input": (_unfed, LoadError, "no input of the signature"),
    "half an operation": (_placeholder, LoadError, "not the whole of an operation"),
    "nonsense": (_nonsense, LoadError, "cannot read the graph"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_is_damaged_or_grows_without_bound_is_refused(folders, tmp_path, case):
    change, kind, said = SPOILT[case]
    folder = files.rewritten(shutil.copytree(folders["twins"][0], tmp_path / "bad"), change)
    one_line(lambda: load(folder), kind, said)


def test_variables_in_slices_or_inside_functions_are_refused(folders, tmp_path):
    folder = shutil.copytree(folders["version1"][0], tmp_path / "bad")

    def moved(meta):
        handle = next(node for node in meta.graph_def.node if node.op == "VarHandleOp")
        body = meta.graph_def.library.function.add()
        body.signature.name = "inner"
        body.node_def.add().CopyFrom(handle)
        call = meta.graph_def.node.add(name="call", op="StatefulPartitionedCall")
        call.attr["f"].func.name = "inner"
        next(node for node in meta.graph_def.node if node.op == "MatMul").input.append("^call")

    files.rewritten(folder, moved)
    one_line(lambda: load(folder), UnsupportedModelError, "inside of a function")
