"""The whole chain's checker: right candidates pass, wrong ones fail with the place, nothing is ever a pass."""

from __future__ import annotations

import contextlib

import keras
import numpy as np
import onnx
import pytest
from nets import chain, inputs_for

from deploykit import graph, runtimes
from deploykit.check import Candidate, _heard_again, _worse, accuracy, body, candidate_for, check, make_reference
from deploykit.compare import compare, noise_between, policy_from
from deploykit.data import Samples, synthesize
from deploykit.errors import InputError
from deploykit.export import export
from deploykit.fuse import fuse
from deploykit.verify import Judge

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


def test_a_folder_that_only_looks_like_a_bundle_is_refused(tmp_path):
    (tmp_path / "deploykit.json").write_text("{}")
    with pytest.raises(InputError, match=r"deploykit\.json"):  # what is no bundle is no candidate
        candidate_for(tmp_path)


def test_a_candidate_whose_name_no_file_can_have_is_missing_like_any_other():
    assert candidate_for("a" * 5000 + ".onnx").runtime == "onnxruntime-cpu"  # and is refused when it is opened


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


@pytest.fixture(scope="module")
def deep():
    """Six layers and one number: the float32 error of a sample is one draw, and now and then a lucky one."""
    keras.utils.set_random_seed(3)
    x = y = keras.Input((16,), name="x")
    for _ in range(6):
        y = L.Dense(64, activation="tanh")(y)
    return keras.Model(x, L.Dense(1, name="y")(y))


def test_a_sample_that_the_original_hit_by_luck_passes_alone(deep, tmp_path):
    path = export(deep, tmp_path / "deep.onnx").path
    x = np.random.default_rng(0).standard_normal((200, 16)).astype(np.float32)
    many = make_reference("deep", deep, Samples({"x": x}, "random"))
    right, own = many.outputs["y"], many.original["y"]
    with contextlib.closing(runtimes.open("onnxruntime-cpu", path)) as session:
        answers = session.run({"x": x})["y"]
    s = int(np.argmax(np.abs(answers - right) / np.maximum(np.abs(own - right), 1e-12)))
    one = slice(s, s + 1)
    assert not compare("y", right[one], own[one], answers[one], POLICY).passed  # one draw
    alone = make_reference("deep", deep, Samples({"x": x[one]}, "one"))
    assert judged(alone, path, "onnxruntime-cpu").passed
    again = make_reference("deep", deep, Samples({"x": x[one]}, "one"))
    assert np.array_equal(alone.original["y"], again.original["y"])  # seeded
    assert np.array_equal(alone.outputs["y"], right[one])  # what is right stays
    assert not judged(alone, moved(deep, 100, alone), "keras").passed


def test_whole_numbers_that_the_draws_turn_are_not_held_against_a_candidate():
    right, own = np.array([[1, 2, 3, 4]]), np.array([[1, 9, 3, 4]])
    found = _worse(right, own, np.array([[1, 2, 8, 4]]), np.array([[1, 2, 3, 7]]))
    assert found.tolist() == [[1, 9, 8, 7]]


DRAWN = [  # reference, own, reference beside it, own beside it, what comes out
    (1.0, 1.5, 2.0, 2.25, 1.5),  # the smaller error: its own answer stays
    (1.0, 1.5, 2.0, 3.0, 2.0),  # the larger one is taken over
    (np.inf, np.inf, 2.0, 3.0, np.inf),
    (np.nan, 1.0, 2.0, 3.0, 1.0),
    (1.0, np.inf, 2.0, 3.0, np.inf),  # the original overflows: it stays no judge
    (1.0, 1.5, 2.0, np.nan, 1.5),
    (1.0, 1.5, 2.0, 1e300, 1.5),  # no float32
]


@pytest.mark.parametrize(("right", "own", "near", "drawn", "expected"), DRAWN)
def test_the_larger_of_two_errors_counts(right, own, near, drawn, expected):
    arrays = [np.array([[x]], dtype) for x, dtype in zip((right, own, near, drawn), "dfdd", strict=True)]
    found = _worse(*arrays)
    assert found.dtype == np.float32
    assert np.array_equal(found, [[np.float32(expected)]], equal_nan=True)


@pytest.mark.parametrize("batch", [None, 2])
def test_few_samples_of_any_inputs_are_drawn_again(batch):
    a = keras.Input(batch_shape=(batch, 5), dtype="int32", name="a")
    b = keras.Input(batch_shape=(batch, 3), name="b")
    y = L.Concatenate()([L.Flatten()(L.Embedding(7, 4)(a)), b])
    model = keras.Model([a, b], [L.Dense(3, name="y")(y), keras.ops.argmax(y, axis=-1)])
    samples = synthesize(graph.signature(model), count=2, edges=0)
    reference = make_reference("two", model, samples)
    assert judged(reference, model).passed
    whole = keras.Model(a, L.Dense(2)(L.Flatten()(L.Embedding(7, 4)(a))))  # nothing to nudge
    assert judged(make_reference("ids", whole, synthesize(graph.signature(whole), count=2, edges=0)), whole).passed


def heard(reference, rows, factor):
    """A judge that heard of an original luckier than it is (20 times), and a candidate that is not, in ``rows``."""
    right, own = reference.outputs["y"], reference.original["y"]
    lucky = (right + (own - right) / 20).astype(np.float64)
    answers = lucky.copy()
    answers[rows] = right[rows] + factor * (own[rows] - right[rows])
    judge = Judge(POLICY)
    judge.add({"y": right}, {"y": answers}, {"y": noise_between(right, lucky)}, {"y": np.float64})
    return judge


@pytest.mark.parametrize(("count", "factor", "passed"), [(1, 1, True), (1, 300, False), (9, 1, False)])
def test_bad_luck_in_few_samples_is_drawn_again(count, factor, passed):
    losing = chain((6,), L.Dense(3), L.Rescaling(1, 1000.0), L.Rescaling(1, -1000.0, name="y"))  # digits, in float32
    reference = make_reference("net", losing, Samples(inputs_for(losing, 40), "random"))
    errors = np.abs(reference.original["y"] - reference.outputs["y"]).max(axis=1)
    rows = np.argsort(errors)[-count:].tolist()  # those in which a 20th is lucky indeed
    judge = heard(reference, rows, factor)
    assert not judge.conclude()[0].passed
    assert set() < set(judge.suspects()) <= set(rows)
    _heard_again(reference, judge)
    assert judge.conclude()[0].passed == passed
