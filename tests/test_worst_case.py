"""The search finds what random data miss, and nothing where nothing is wrong."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import keras
import numpy as np
import pytest
import savedgraph_files
from nets import chain

from deploykit import graph, runtimes
from deploykit.bisect import layer_errors
from deploykit.compare import Tolerance
from deploykit.errors import DataError, InputError, UnsupportedModelError
from deploykit.export import export
from deploykit.fuse import fuse
from deploykit.gradients import input_gradients
from deploykit.load import load
from deploykit.verify import FLOAT32, POLICIES, Scale
from deploykit.worst_case import CHILDREN, Box, _Errors, _Judge, _measured, _Search, boxes_of, search

L = keras.layers


def searched(model, candidate, samples, runtime="keras", **options):
    with contextlib.closing(runtimes.open(runtime, candidate)) as session:
        return search(model, session, samples, **{"budget": 100, **options})


def replay_ratio(model, candidate, sample):
    """Largest output error on a sample over the float32 rounding of the output."""
    exact = graph.run(graph.replay(graph.trace(model), dtype="float64"), sample)
    return max(
        np.linalg.norm(a - b) / (2.0**-20 * np.linalg.norm(b))
        for a, b in zip(graph.run(candidate, sample), exact, strict=True)
    )


def convolutional(cap=None, head="head"):
    return chain(
        (8, 8, 3),
        L.Conv2D(6, 3, padding="same", name="conv"),
        L.BatchNormalization(name="bn"),
        L.ReLU(cap, name="relu"),
        L.GlobalAveragePooling2D(name="gap"),
        L.Dense(4, name=head),
    )


@pytest.fixture(scope="module")
def images():
    """A net, data, its fused form and its ONNX file."""
    model = convolutional()
    samples = {"x": np.random.default_rng(0).normal(0, 1, (32, 8, 8, 3)).astype(np.float32)}
    return model, samples, fuse(model, samples=samples).model


def capped(images):
    """ReLU that is cut off above what any of the data reaches."""
    model, samples, _ = images
    peak = graph.run(keras.Model(model.inputs, model.get_layer("relu").output), samples)[0].max()
    wrong = convolutional(cap=float(peak) * 1.15)
    wrong.set_weights([graph.numpy(weight) for weight in model.weights])
    return model, wrong, samples


def beyond(images):
    """A branch that adds something where the mean of a channel is near the top of its range."""
    model, _, samples = capped(images)
    bound = 2 * samples["x"].mean(axis=(1, 2))[:, 0].max()
    inner = convolutional(head="inner")
    inner.set_weights([graph.numpy(weight) for weight in model.weights])
    gate = L.Dense(1, activation="relu", name="gate")
    mean = L.GlobalAveragePooling2D(name="mean")(inner.input)
    y = L.Add(name="head")([inner.output, L.Dense(4, use_bias=False, name="extra")(gate(mean))])
    gate.set_weights([np.array([[1.0], [0.0], [0.0]]), np.array([-bound])])
    return model, keras.Model(inner.input, y), samples


def unseen_token(_):
    """One row of an Embedding that no sample uses, though its number lies within their range."""
    tokens = keras.Input((6,), dtype="int32", name="tokens")
    model = keras.Model(tokens, L.Dense(3, name="y")(L.Flatten()(L.Embedding(200, 4, name="e")(tokens))))
    values = np.random.default_rng(1).integers(0, 200, (30, 6))
    values[values == 23] = 22
    values[0], values[1] = 0, 199
    wrong = graph.canonical(model)
    table = graph.numpy(wrong.get_layer("e").embeddings).copy()
    table[23] *= 1.01
    wrong.get_layer("e").embeddings.assign(table)
    return model, wrong, {"tokens": values.astype(np.int32)}


PLANTS = {"an activation cut off": capped, "a branch above a threshold": beyond, "an unseen token": unseen_token}


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_faults_that_the_data_miss_are_found(images, plant):
    model, wrong, samples = PLANTS[plant](images)
    found = searched(model, wrong, samples)
    assert found.among_data < 1
    assert not found.passed
    assert found.ratio > 1
    assert "allowed" in found.reason
    assert all(
        (value >= samples[name].min()).all() and (value <= samples[name].max()).all()
        for name, value in found.sample.items()
    )
    assert replay_ratio(model, wrong, found.sample) > 10


def test_every_token_comes_up_as_soon_as_there_are_places_for_it():
    model, _, samples = unseen_token(None)
    with contextlib.closing(runtimes.open("keras", model)) as session:
        points = [
            batch["tokens"]
            for batch in _Search(model, session, samples, boxes_of([samples]), FLOAT32, 0, None).counted()
        ]
    assert set(np.concatenate(points).ravel()) == set(range(200))
    assert sum(batch.size for batch in points) < 200 + CHILDREN * 6


@pytest.mark.parametrize("slope", [True, False])
def test_the_gradient_leads_to_a_fault_that_chance_hardly_meets(slope, monkeypatch):
    """A fault where twenty inputs are all near the right end: a needle for chance, and a straight way up the slope."""
    signs = np.where(np.arange(20) % 2, 1.0, -1.0).reshape(20, 1)
    model = chain((20,), L.Dense(1, use_bias=False, name="y"))
    wrong = chain((20,), L.Dense(1, use_bias=False, name="sums"), L.ReLU(17.0, negative_slope=1.0, name="y"))
    for net in (model, wrong):
        net.layers[1].kernel.assign(signs)
    if not slope:
        monkeypatch.setattr("deploykit.worst_case._Climber.of", lambda *_: None)
    samples = {"x": np.random.default_rng(0).uniform(-1, 1, (32, 20)).astype(np.float32)}
    assert searched(model, wrong, samples, budget=60, fused=model).passed != slope


def scaled(model, factor):
    """The same net, every weight off by a factor: the error is of that size wherever one looks."""
    other = graph.canonical(model)
    other.set_weights([graph.numpy(weight) * factor for weight in model.weights])
    return other


@pytest.mark.parametrize(
    ("law", "fine", "wrong"),
    [
        (FLOAT32, 1 + 2.0**-23, 1.001),
        (POLICIES["float16"], 1.005, 1.1),
        (POLICIES["int8"], 1.1, 1.6),
        (Tolerance(rtol=0.01), 1.005, 1.02),
        (Tolerance(atol=0.01), 1 + 1e-6, 1.1),
    ],
    ids=["float32", "float16", "int8", "rtol", "atol"],
)
def test_a_search_judges_by_the_law_of_the_check(law, fine, wrong):
    model = chain((5,), L.Dense(3, use_bias=False, name="y"))
    model.get_layer("y").kernel.assign(np.random.default_rng(0).integers(1, 5, (5, 3)) / 8.0)
    samples = {"x": np.random.default_rng(1).integers(1, 9, (24, 5)).astype(np.float32)}  # float32 has no error here
    data = [searched(model, scaled(model, factor), samples, budget=1, law=law) for factor in (fine, wrong)]
    assert [found.passed for found in data] == [True, False]
    if isinstance(law, Tolerance) and law.rtol:
        assert data[1].ratio == pytest.approx(2.0, rel=1e-4)
        assert data[1].allowed == pytest.approx(data[1].error / 2, rel=1e-4)


@pytest.mark.parametrize("law", [FLOAT32, POLICIES["float16"], Tolerance(1.0, 1.0)], ids=["float32", "float16", "1"])
def test_nan_is_too_much_for_every_law(law):
    model, other = (chain((2,), L.Dense(2, name="y")) for _ in range(2))
    other.get_layer("y").bias.assign([0.0, np.nan])
    found = searched(model, other, {"x": np.ones((3, 2), np.float32)}, budget=1, law=law)
    assert not found.passed
    assert found.ratio is None
    assert "error inf, NaN or infinity on one side alone" in found.reason


def test_a_tolerance_is_asked_of_the_element_that_is_furthest_beyond_it():
    """The largest error is allowed, a smaller one is not."""
    model, other = (chain((2,), L.Dense(2, use_bias=False, name="y")) for _ in range(2))
    model.get_layer("y").kernel.assign([[100.0, 0.0], [0.0, 1.0]])
    other.get_layer("y").kernel.assign([[100.5, 0.0], [0.0, 1.02]])
    samples = {"x": np.ones((3, 2), np.float32)}
    found = searched(model, other, samples, budget=1, law=Tolerance(rtol=0.01))
    assert (found.error, found.allowed) == (pytest.approx(0.02, rel=1e-4), pytest.approx(0.01, rel=1e-4))


def test_whole_numbers_count_but_where_a_policy_lets_some_of_them_change():
    model, other = (chain((3,), L.Discretization(bin_boundaries=[bound], name="y")) for bound in (0.25, 0.75))
    samples = {"x": np.eye(3, dtype=np.float32) / 2}
    verdicts = [searched(model, other, samples, budget=1, law=law).passed for law in (FLOAT32, POLICIES["float16"])]
    assert verdicts == [False, True]


@pytest.mark.parametrize(
    ("flips", "own", "beside", "passed"),
    [
        (0, 0, 0, True),
        (1, 0, 0, False),
        (1, 1, 0, True),
        (1, 0, 1, True),
        (3, 1, 1, False),
        (10, 6, 0, True),
        (1, 10, 0, True),
    ],
)
def test_as_many_whole_numbers_may_differ_as_the_original_turns_itself(flips, own, beside, passed):
    """Of ten numbers: the candidate's flips, the original's own at the point and beside it."""
    r = np.zeros((1, 10), np.int64)
    o, c, near = (np.array([[0] * (10 - count) + [1] * count], np.int64) for count in (own, 0, beside))
    c[0, :flips] = 1
    judge = _Judge.__new__(_Judge)
    judge.law, judge.whole, judge.scales = FLOAT32, [True], [Scale()] * 2
    judge.own = lambda points: [(r, near)]
    errors = _Errors(*_measured(r, o, c, FLOAT32))
    fair = judge.fairly({}, errors, np.random.default_rng(0))
    assert (judge.columns(fair)[0].max() <= 1) == passed


def test_answers_of_another_shape_are_named():
    model, other = (chain((4,), L.Dense(units, name="y")) for units in (3, 1))
    with pytest.raises(DataError, match=r"output y has shape \[2, 1\] instead of \[2, 3\]"):
        searched(model, other, {"x": np.zeros((2, 4), np.float32)})


@pytest.mark.parametrize("led", [True, False])
def test_the_slope_of_the_difference_leads_where_no_output_of_the_original_does(led):
    signs = np.where(np.arange(40) % 2, 1.0, -1.0).reshape(40, 1)
    x = keras.Input((40,), name="x")
    y = L.Rescaling(0.0, offset=1.0)(L.Dense(1, name="still")(x))
    extra = L.Dense(1, activation="softplus", name="hidden")(x)
    model, wrong = keras.Model(x, L.Rescaling(1.0, name="y")(y)), keras.Model(x, L.Add(name="y")([y, extra]))
    wrong.get_layer("hidden").kernel.assign(signs)
    wrong.get_layer("hidden").bias.assign([-34.0])
    samples = {"x": np.random.default_rng(0).uniform(-1, 1, (32, 40)).astype(np.float32)}
    assert searched(model, wrong, samples, budget=60, fused=wrong if led else None).passed != led


def test_right_candidates_do_not_fail(images, tmp_path):
    model, samples, fused = images
    export(fused, tmp_path / "net.onnx")
    for candidate, runtime, pair in ((fused, "keras", None), (tmp_path / "net.onnx", "onnxruntime-cpu", fused)):
        found = searched(model, candidate, samples, runtime, fused=pair)
        assert found.passed
        assert found.ratio <= 1
        assert found.reason is None
        assert found.evaluations == 100


@pytest.mark.parametrize("seed", range(2))
def test_a_lucky_original_is_no_reason_to_fail(seed):
    """One ill-conditioned number: the original's error at a single point says little, and a search looks for luck."""
    model = chain((6,), L.Dense(30, activation="tanh"), L.Dense(1), seed=seed)
    first = model.layers[-1].kernel
    first.assign(graph.numpy(first) * np.where(np.arange(30) % 2, 1, -1)[:, None] * 10)
    samples = {"x": np.random.default_rng(seed).normal(0, 1, (16, 6)).astype(np.float32)}
    order = np.random.default_rng(9).permutation(30)  # the same sums in another order: as right as the first
    other = graph.canonical(model)
    a, b = other.layers[1], other.layers[2]
    a.kernel.assign(graph.numpy(a.kernel)[:, order])
    a.bias.assign(graph.numpy(a.bias)[order])
    b.kernel.assign(graph.numpy(b.kernel)[order])
    assert searched(model, other, samples, seed=seed, budget=200).passed


def test_the_same_seed_finds_the_same_sample_and_it_can_be_saved_and_replayed(images, tmp_path):
    model, wrong, samples = capped(images)
    first, second = (searched(model, wrong, samples, seed=5, budget=40) for _ in range(2))
    assert first.to_json() == second.to_json()
    np.testing.assert_array_equal(first.sample["x"], second.sample["x"])
    json.dumps(first.to_json(), allow_nan=False)
    path = first.save(tmp_path / "worst.npz")
    with np.load(path, allow_pickle=False) as stored:
        np.testing.assert_array_equal(stored["x"], first.sample["x"])
    assert f"{first.ratio:.3g}" in first.text()
    renamed = replace(first, sample={"file": first.sample["x"]})  # numpy.savez has a parameter of that name
    with np.load(renamed.save(path, force=True), allow_pickle=False) as stored:
        np.testing.assert_array_equal(stored["file"], first.sample["x"])


def test_the_budget_and_the_samples_must_be_there(images):
    model, samples, fused = images
    with pytest.raises(InputError, match="at least 1"):
        searched(model, fused, samples, budget=0)
    with pytest.raises(DataError, match="give at least one"):
        searched(model, fused, {"x": samples["x"][:0]})


def test_the_box_is_the_range_of_each_channel_and_what_is_constant_stays():
    images = np.zeros((4, 5, 5, 2), np.float32)
    images[..., 0] = np.random.default_rng(0).uniform(-3, 5, (4, 5, 5))
    images[..., 1] = 0.25
    box = Box.around(images)
    points = box.inside(np.random.default_rng(1).normal(0, 100, (9, 5, 5, 2)))
    assert points.dtype == np.float32
    assert points[..., 0].min() == images[..., 0].min()
    assert points[..., 0].max() == images[..., 0].max()
    assert (points[..., 1] == 0.25).all()
    front = Box.around(np.moveaxis(images, -1, 1)[:, :1])
    assert front.low.shape == (1, 1, 1, 1)
    parts = boxes_of({"x": part} for part in (images[:1], images[1:]))["x"]
    np.testing.assert_array_equal([parts.low, parts.high], [box.low, box.high])
    images[2, 3, 3, 0] = np.inf
    with pytest.raises(DataError, match="give finite data"):
        Box.around(images)
    whole = Box.around(np.array([[3, 7], [5, 7]]))
    assert whole.inside(np.array([[4.4, 9.0], [99.0, 0.0]])).tolist() == [[4, 7], [5, 7]]
    with pytest.raises(DataError, match="cannot vary"):
        Box.around(np.array([["text"]]))


def test_an_opaque_model_of_a_fixed_batch_is_searched_without_a_gradient(tmp_path):
    """Its outputs hold whole numbers, too; it has no layers to bisect and is not differentiated."""
    savedgraph_files.fixed(tmp_path / "saved")
    model = load(tmp_path / "saved").model
    samples = {"x": np.random.default_rng(2).normal(size=(12, 4)).astype(np.float32)}
    right = searched(model, model, samples)
    assert right.passed
    assert right.way != "gradient"
    x = keras.Input(batch_shape=(1, 4), name="x")
    names = [spec.name for spec in graph.signature(model).outputs]
    kernel = graph.run(model, {"x": np.eye(4, dtype=np.float32)})[names.index("scores")]
    product = L.Dense(3, use_bias=False, name="product")
    peak = float(max(output.max() for output in graph.run(model, samples) if output.dtype.kind == "f"))
    scores = L.ReLU(peak * 1.05, negative_slope=1.0, name="scores")(product(x))
    best = L.Lambda(lambda v: keras.ops.cast(keras.ops.argmax(v, -1), "int64"), name="best")(product(x))
    product.set_weights([kernel])
    wrong = searched(model, keras.Model(x, [{"scores": scores, "best": best}[name] for name in names]), samples)
    assert not wrong.passed
    assert wrong.sample["x"].shape == (1, 4)
    for refused in (lambda: layer_errors(model, model, samples), lambda: input_gradients(model, model, samples)):
        with pytest.raises(UnsupportedModelError, match="one TensorFlow graph"):
            refused()
