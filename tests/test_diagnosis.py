"""A check that looks closer: at the right samples, at every candidate, and without ever losing its verdict."""

from __future__ import annotations

import json
from dataclasses import replace

import keras
import numpy as np
import pytest
from nets import chain, inputs_for

from deploykit import graph
from deploykit.check import Candidate, check, make_reference
from deploykit.compare import Tolerance
from deploykit.data import Samples, open_samples
from deploykit.diagnosis import MOST, Wishes, chosen, diagnosed, failing, filled
from deploykit.export import export
from deploykit.verify import FLOAT32, POLICIES

L = keras.layers


def keras_candidates(*models):
    return [Candidate(f"candidate {number}", model, "keras") for number, model in enumerate(models)]


def compared(model, candidates, data, law=FLOAT32):
    """A reference on data (arrays or samples), and the candidates judged against it."""
    samples = data if hasattr(data, "count") else Samples(data, "data")
    reference = make_reference("model", model, samples)
    return reference, check(reference, candidates, law)


def looked(model, candidates, data, law=FLOAT32, **wishes):
    """What `diagnosed` finds for candidates that were compared."""
    reference, comparisons = compared(model, candidates, data, law)
    return comparisons, diagnosed(model, reference, candidates, comparisons, law, Wishes(**wishes))


def dense(seed=0, cap=None):
    return chain((4,), L.Dense(6, name="a"), L.ReLU(cap, name="relu"), L.Dense(3, name="head"), seed=seed)


def spoilt(model, layer="a", factor=1.01):
    wrong = graph.canonical(model)
    kernel = wrong.get_layer(layer).kernel
    kernel.assign(factor * graph.numpy(kernel))
    return wrong


def capped(model, cap):
    """The same weights, and an activation that is cut off at ``cap``."""
    wrong = dense(cap=float(cap))
    wrong.set_weights([graph.numpy(weight) for weight in model.weights])
    return wrong


@pytest.fixture(scope="module")
def net():
    return dense(), {"x": np.random.default_rng(0).normal(0, 1, (40, 4)).astype(np.float32)}


# ------------------------------------------------------------------------------------------------- which samples


@pytest.mark.parametrize(
    ("count", "first", "batch", "expected"),
    [
        (9, [], None, [0, 2, 4, 6, 8]),
        (9, [7, 3], None, [7, 3, 0, 4, 8]),
        (3, [2], None, [2, 0, 1]),
        (9, [6, 6, 8], None, [6, 8, 0, 3, 7]),
        (9, [], 2, [0, 3, 5, 8]),  # whole batches
        (14, [13], 7, [13, 0, 2, 5, 7, 10, 12]),  # one batch at least
        (9, [9, -1], None, [0, 2, 4, 6, 8]),  # no such samples
    ],
)
def test_failing_samples_come_first_and_the_others_from_all_over_the_data(count, first, batch, expected):
    rows = chosen(count, first, batch, most=5)
    assert rows.tolist() == expected


def test_rows_of_a_stream_are_those_of_the_file_in_the_order_asked_for(net, tmp_path):
    model, data = net
    np.savez(tmp_path / "data.npz", **data)
    stream = open_samples(str(tmp_path / "data.npz"), graph.signature(model))
    rows = np.array([30, 2, 30, 7])
    for samples in (stream, Samples(data, "data")):
        np.testing.assert_array_equal(samples.take(rows).arrays["x"], data["x"][rows])
    assert filled([4, 5], 3).tolist() == [4, 5, 5]
    assert filled([4, 5], None).tolist() == [4, 5]


def test_a_sample_that_fails_beyond_those_that_are_kept_is_fetched(tmp_path):
    """One sample of 300 is cut off; none of those spread over the data is."""
    model = dense()
    data = np.random.default_rng(1).normal(0, 1, (300, 4)).astype(np.float32)
    hidden = graph.run(keras.Model(model.inputs, model.get_layer("relu").output), {"x": data})[0]
    peak, place = hidden.max(), int(hidden.max(axis=1).argmax())
    data[[place, 287]] = data[[287, place]]
    np.savez(tmp_path / "data.npz", x=data)
    samples = open_samples(str(tmp_path / "data.npz"), graph.signature(model))
    wrong = capped(model, np.sort(hidden.max(axis=1))[-2] * 0.5 + peak * 0.5)
    (found,), closer = looked(model, keras_candidates(wrong), samples)
    assert failing(found) == [287]
    assert 287 not in chosen(300, [], None)
    assert closer.body["layers"]["first"] == "relu"


def test_an_error_too_small_for_a_norm_over_all_is_bisected_in_its_sample_alone():
    model, wrong = (chain((4,), L.Dense(4, use_bias=False, name="a"), L.ReLU(cap, name="relu")) for cap in (None, 1.1))
    for net in (model, wrong):
        net.get_layer("a").kernel.assign(np.eye(4))
    data = np.random.default_rng(0).uniform(0.95, 1.05, (64, 4)).astype(np.float32)
    data[40, 0] = 1.2  # 5 % of the sample is cut off, which is 0.9 % of 32 samples
    (found,), closer = looked(model, keras_candidates(wrong), {"x": data}, POLICIES["float16"])
    assert failing(found) == [40]
    assert closer.body["layers"]["first"] == "relu"
    assert closer.body["layers"]["samples"] == 1


def test_a_fixed_batch_is_always_full():
    def net(seed):
        x = keras.Input(batch_shape=(3, 4), name="x")
        return keras.Model(x, L.Dense(2, name="head")(L.Dense(5, activation="relu", name="a")(x)))

    model = net(0)
    data = {"x": np.random.default_rng(0).normal(0, 1, (39, 4)).astype(np.float32)}
    _, closer = looked(model, keras_candidates(spoilt(model)), data, budget=8, gradients=True)
    assert closer.body["layers"]["first"] == "a"
    assert closer.body["layers"]["samples"] == 30
    assert [len(closer.body[key]) for key in ("worst_case", "gradients")] == [1, 1]
    assert closer.notices == ()


@keras.saving.register_keras_serializable("test_diagnosis")
class SumOver64(L.Layer):
    """The mean of an 8x8 image, and of no other."""

    def call(self, x):
        return keras.ops.sum(x, axis=(1, 2)) / 64

    def compute_output_shape(self, shape):
        return (shape[0], shape[3])


def test_what_fails_at_another_size_alone_is_looked_at_there():
    def net(pool):
        return chain((None, None, 3), L.Conv2D(4, 1, name="conv"), pool, L.Dense(2, name="head"))

    model, wrong = net(L.GlobalAveragePooling2D(name="mean")), net(SumOver64(name="mean"))
    wrong.set_weights([graph.numpy(weight) for weight in model.weights])
    data = {"x": np.random.default_rng(0).normal(0, 1, (40, 8, 8, 3)).astype(np.float32)}
    (found,), closer = looked(model, keras_candidates(wrong), data)
    assert all(output.passed for output in found.outputs)
    assert not found.passed
    assert closer.body["layers"]["first"] == "mean"
    assert closer.body["layers"]["samples"] < 32


# ------------------------------------------------------------------------------------------------- who is looked at


def test_every_candidate_that_failed_is_explained_up_to_a_bound(net):
    model, data = net
    layers = ["a", "head", "a", "head", "a", "head"]
    candidates = keras_candidates(model, *(spoilt(model, layer) for layer in layers))
    _, closer = looked(model, candidates, data)
    records = [closer.body["layers"], *closer.body["further_layers"]]
    assert [record["first"] for record in records] == layers[:MOST]
    assert [record["candidate"] for record in records] == [f"candidate {number + 1}" for number in range(MOST)]
    (notice,) = closer.notices
    assert "candidate 5, candidate 6" in notice
    assert [line.split(" (Dense)")[0] for line in closer.explained] == [
        f"candidate {number + 1}: the error jumps at {layer}" for number, layer in enumerate(layers[:MOST])
    ]
    json.dumps(closer.body, allow_nan=False)


def test_where_all_passed_nothing_is_looked_at_unless_asked(net):
    model, data = net
    candidates = keras_candidates(model, graph.canonical(model))
    assert looked(model, candidates, data)[1].body == {}
    body = looked(model, candidates, data, layers=True)[1].body
    assert [body["layers"]["first"], *(record["first"] for record in body["further_layers"])] == [None, None]


def test_the_sample_that_is_saved_is_the_worst_of_all_candidates(net, tmp_path):
    model, data = net
    candidates = keras_candidates(model, spoilt(model, factor=1.5), spoilt(model, factor=1.001))
    _, closer = looked(model, candidates, data, budget=10, save=tmp_path / "worst.npz")
    ratios = [part["ratio"] for part in closer.body["worst_case"]]
    assert max(ratios) == ratios[1]
    assert closer.written == (str(tmp_path / "worst.npz"),)
    (notice,) = [line for line in closer.notices if "worst.npz" in line]
    assert "that of candidate 1" in notice
    (alone,) = looked(model, candidates[1:2], data, budget=10)[1].body["worst_case"]
    assert alone["ratio"] == ratios[1]
    with np.load(tmp_path / "worst.npz") as kept:
        exact = graph.run(graph.replay(graph.trace(model), dtype="float64"), dict(kept))[0]
        error = np.abs(graph.run(candidates[1].model, dict(kept))[0] - exact)
    found = closer.body["worst_case"][1]["error"]
    assert found in (pytest.approx(np.linalg.norm(error), rel=1e-3), pytest.approx(error.max(), rel=1e-3))


# ------------------------------------------------------------------------------------------------------ the search


def test_the_slope_of_the_difference_leads_a_search_through_a_keras_candidate():
    """An addition that no output of the original depends on: nothing else leads there, and chance hardly does."""
    signs = np.where(np.arange(40) % 2, 1.0, -1.0).reshape(40, 1)
    x = keras.Input((44,), name="x")
    y = L.Dense(1, use_bias=False, name="seen")(x)
    extra = L.Activation("softplus", name="soft")(L.Dense(1, name="hidden")(x))
    model, wrong = keras.Model(x, L.Rescaling(1.0, name="y")(y)), keras.Model(x, L.Add(name="y")([y, extra]))
    for net in (model, wrong):
        net.get_layer("seen").kernel.assign(np.concatenate([0 * signs, np.ones((4, 1))]))
    wrong.get_layer("hidden").kernel.assign(np.concatenate([signs, np.zeros((4, 1))]))
    wrong.get_layer("hidden").bias.assign([-34.0])
    data = {"x": np.random.default_rng(0).uniform(-1, 1, (64, 44)).astype(np.float32)}
    (found,), closer = looked(model, keras_candidates(wrong), data, budget=60)
    assert found.passed
    (worst,) = closer.body["worst_case"]
    assert not worst["passed"]
    assert len(closer.failures) == 1


def test_the_search_has_room_over_all_the_data_and_not_only_where_it_starts():
    model, wrong = (chain((2,), L.Dense(1, use_bias=False, name="a"), L.ReLU(cap, name="relu")) for cap in (None, 15))
    for net in (model, wrong):
        net.get_layer("a").kernel.assign(np.ones((2, 1)))
    data = np.random.default_rng(0).uniform(0.5, 1, (300, 2)).astype(np.float32)
    rare = sorted(set(range(300)) - set(chosen(300, [], None).tolist()))[100:102]
    data[rare] = [[10, 0.5], [0.5, 10]]
    (found,), closer = looked(model, keras_candidates(wrong), {"x": data}, budget=10)
    assert found.passed
    assert not closer.body["worst_case"][0]["passed"]


# --------------------------------------------------------------------------------------------------- the verdict


def test_a_candidate_that_was_not_compared_is_not_searched_nor_differentiated(net):
    model, data = net
    renamed = keras.Model(model.inputs, L.Rescaling(1.0, name="other")(model.output))
    comparisons, closer = looked(model, keras_candidates(renamed, model), data, budget=5, gradients=True)
    assert [comparison.passed for comparison in comparisons] == [False, True]
    assert [part["candidate"] for part in closer.body["worst_case"]] == ["candidate 1"]
    assert [part["candidate"] for part in closer.body["gradients"]] == ["candidate 1"]
    assert [line.split(":")[0] for line in closer.notices] == [
        "candidate 0 on keras is not searched",
        "candidate 0 on keras has no gradients to compare",
    ]
    assert closer.failures == ()


@pytest.mark.parametrize("passed", [True, False])
def test_what_did_not_take_place_is_no_pass_and_never_hides_a_verdict(net, passed, tmp_path):
    """A file that is gone, and something that nobody foresaw, between the check and the closer look."""
    model, data = net
    export(model if passed else spoilt(model), tmp_path / "net.onnx")
    candidates = [Candidate("gone", tmp_path / "net.onnx", "onnxruntime-cpu"), *keras_candidates(model)]
    reference, comparisons = compared(model, candidates, data)
    assert [comparison.passed for comparison in comparisons] == [passed, True]
    (tmp_path / "net.onnx").unlink()
    broken = [candidates[0], replace(candidates[1], model=object())]
    wishes = Wishes(layers=True, budget=5, gradients=True)
    closer = diagnosed(model, reference, broken, comparisons, FLOAT32, wishes)
    assert closer.body == {"worst_case": [], "gradients": []}
    told = [line for line in (closer.failures if passed else closer.notices) if line.startswith("no ")]
    assert [line.split(":")[0] for line in told] == [
        "no worst case of gone on onnxruntime-cpu was searched",
        "no worst case of candidate 0 on keras was searched",
        "no gradients of candidate 0 were compared",
    ]
    assert "please report it: " in told[2]
    assert all("\n" not in line for line in (*closer.failures, *closer.notices))
    assert bool(closer.failures) == passed
    assert sum("not compared layer by layer" in line for line in closer.notices) == 2


def test_gradients_of_nothing_are_no_pass(net, tmp_path):
    model, data = net
    export(model, tmp_path / "net.onnx")
    only = [Candidate("net", tmp_path / "net.onnx", "onnxruntime-cpu")]
    assert looked(model, only, data, gradients=True)[1].failures == (
        "no gradients were compared; give a .keras file as candidate",
    )
    _, closer = looked(model, keras_candidates(model), data, Tolerance(1e-3, 1e-3), gradients=True)
    assert "speak of outputs" in closer.failures[0]


@pytest.mark.parametrize("size", [None, 40])
def test_a_gradient_that_the_original_stops_is_noticed_and_fails_nothing(size):
    x = keras.Input(batch_shape=(size, 6), name="x")
    y = L.Add()([L.Dense(5, name="a")(x), keras.ops.stop_gradient(L.Dense(5, name="b")(x))])
    model = keras.Model(x, L.Dense(3, name="c")(y))
    data = Samples(inputs_for(model, 40), "inputs of a test")
    _, closer = looked(model, keras_candidates(model), data, gradients=True)
    assert closer.failures == ()
    assert [line.partition(": its ")[0] for line in closer.notices] == [
        "gradients of candidate 0: numerical differences, original"
    ]
    (found,) = closer.body["gradients"]
    assert (found["passed"], found["samples"]) == (True, size or 8)


@pytest.mark.parametrize(("law", "passed"), [(POLICIES["float16"], True), (FLOAT32, False)])
def test_searches_and_gradients_are_judged_by_the_policy_of_the_check(net, law, passed):
    model, data = net
    rounded = graph.canonical(model)
    rounded.set_weights([graph.numpy(w).astype("float16").astype("float32") for w in model.weights])
    (found,), closer = looked(model, keras_candidates(rounded), data, law, budget=20, gradients=True)
    verdicts = [found.passed, *(closer.body[key][0]["passed"] for key in ("worst_case", "gradients"))]
    assert verdicts == [passed] * 3
    assert bool(closer.failures) != passed
