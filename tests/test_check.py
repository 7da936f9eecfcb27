"""The whole chain's checker: right candidates pass, wrong ones fail with the place, nothing is ever a pass."""

from __future__ import annotations

import keras
import numpy as np
import onnx
import pytest
from nets import chain, inputs_for

from deploykit import graph
from deploykit.check import Candidate, accuracy, body, candidate_for, check, make_reference
from deploykit.compare import policy_from
from deploykit.data import Samples, synthesize
from deploykit.errors import InputError
from deploykit.export import export
from deploykit.fuse import fuse

L = keras.layers
POLICY = policy_from()


@pytest.fixture(scope="module")
def trained():
    """A live model, its reference on random inputs."""
    model = chain((9, 8, 3), L.Conv2D(6, 3), L.BatchNormalization(), L.ReLU(), L.Flatten(), L.Dense(4, name="y"))
    return model, make_reference("net", model, Samples(inputs_for(model, 20), "random"))


@pytest.fixture(scope="module")
def onnx_file(trained, tmp_path_factory):
    model, _ = trained
    return export(fuse(model).model, tmp_path_factory.mktemp("onnx") / "net.onnx").path


def judged(reference, model, runtime="keras"):
    (found,) = check(reference, [Candidate("candidate", model, runtime)], POLICY)
    return found


def test_the_model_itself_its_fused_form_and_its_export_pass(trained, onnx_file):
    model, reference = trained
    assert judged(reference, model).passed
    assert judged(reference, fuse(model).model).passed
    assert judged(reference, onnx_file, "onnxruntime-cpu").passed


def moved(model, factor, reference):
    """A copy with one weight moved so far that its float64 effect is ``factor`` times the original's own error."""
    copy = graph.canonical(model)
    kernel = copy.get_layer("y").kernel
    value = graph.numpy(kernel)
    own = np.linalg.norm(reference.original["y"] - reference.outputs["y"])
    unit = value.copy()
    unit[0, 0] += 1.0
    kernel.assign(unit)
    double = graph.replay(graph.trace(copy), dtype="float64")
    effect = np.linalg.norm(graph.run(double, reference.samples.arrays)[0] - reference.outputs["y"])
    value[0, 0] += factor * own / effect
    kernel.assign(value)
    return copy


@pytest.mark.parametrize("factor", [15, 100, 1e4])
def test_one_wrong_weight_is_caught(trained, factor):
    model, reference = trained
    found = judged(reference, moved(model, factor, reference))
    assert not found.passed
    assert found.outputs[0].reason


def test_one_wrong_weight_in_the_onnx_file_is_caught(trained, onnx_file, tmp_path):
    _, reference = trained
    wrong = onnx.load(onnx_file)
    tensor = max(wrong.graph.initializer, key=lambda t: len(t.raw_data))
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[0] += 0.05
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(wrong, tmp_path / "wrong.onnx")
    assert not judged(reference, tmp_path / "wrong.onnx", "onnxruntime-cpu").passed


def test_a_frozen_batch_is_a_drifted_signature(trained, tmp_path):
    model, reference = trained
    frozen = export(model, tmp_path / "frozen.onnx", batch=4).path
    found = judged(reference, frozen, "onnxruntime-cpu")
    assert not found.passed
    assert "signature drifted" in found.reason


def test_renamed_outputs_are_a_drifted_signature(trained):
    _, reference = trained
    other = chain((9, 8, 3), L.Conv2D(6, 3), L.BatchNormalization(), L.ReLU(), L.Flatten(), L.Dense(4, name="z"))
    assert "became ['z']" in judged(reference, other).reason


def test_nothing_compared_is_a_failure(trained):
    _, reference = trained
    assert body(reference, [], POLICY)["passed"] is False


def test_an_unknown_runtime_is_refused(trained):
    model, reference = trained
    with pytest.raises(InputError, match="onnxruntime-cpu"):
        check(reference, [Candidate("c", model, "abacus")], POLICY)


def test_the_candidate_of_a_bundle_is_its_model(tmp_path):
    (tmp_path / "deploykit.json").write_text("{}")
    found = candidate_for(tmp_path)
    assert (found.model.name, found.runtime) == ("model.onnx", "onnxruntime-cpu")


def test_accuracy_needs_labels_that_fit():
    scores = {"y": np.eye(3)}
    arrays = {"x": np.zeros((3, 1))}
    assert accuracy(scores, Samples(arrays, "s", np.array([0, 1, 1]))) == pytest.approx(2 / 3)
    assert accuracy(scores, Samples(arrays, "s", np.array([0, 1, 3]))) is None
    assert accuracy(scores, Samples(arrays, "s")) is None


def test_integer_and_several_inputs_are_checked(tmp_path):
    tokens, scale = keras.Input((7,), dtype="int32", name="tokens"), keras.Input((4,), name="scale")
    y = L.Multiply()([L.GlobalAveragePooling1D()(L.Embedding(50, 4)(tokens)), scale])
    model = keras.Model([tokens, scale], {"a": L.Dense(2)(y), "b": L.Dense(3, activation="softmax")(y)})
    reference = make_reference("net", model, synthesize(graph.signature(model), count=16))
    path = export(fuse(model).model, tmp_path / "net.onnx").path
    found = judged(reference, path, "onnxruntime-cpu")
    assert found.passed
    assert [output.name for output in found.outputs] == ["a", "b"]
