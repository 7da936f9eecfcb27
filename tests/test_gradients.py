"""Input gradients of original and fused agree, and both with numerical differences; damage shows."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
from nets import chain, enliven, inputs_for

from deploykit import graph
from deploykit.errors import UnsupportedModelError
from deploykit.fuse import fuse
from deploykit.gradients import (
    GradientReport,
    _Compared,
    _Gradient,
    _Norms,
    _told_fused,
    _told_original,
    input_gradients,
)
from deploykit.verify import FLOAT32, POLICIES

L = keras.layers


@pytest.fixture(scope="module")
def net():
    x = keras.Input((8, 8, 3), name="x")
    y = L.Conv2D(5, 3, padding="same", use_bias=False, name="conv")(x)
    y = L.ReLU(name="relu")(L.BatchNormalization(name="bn")(y))
    y = L.Add(name="add")([y, L.Conv2D(5, 1, name="skip")(x)])
    y = L.Flatten(name="flat")(L.MaxPooling2D(name="pool")(y))
    model = enliven(keras.Model(x, [L.Dense(4, name="head")(y), L.Dense(2, activation="tanh", name="side")(y)]))
    samples = inputs_for(model, 8)
    samples["x"][-1] = 0  # sits on the kinks of a net without biases
    return model, fuse(model, samples=samples).model, samples


def test_gradients_of_a_fused_model_agree(net):
    model, fused, samples = net
    report = input_gradients(model, fused, samples)
    assert report.passed
    (row,) = report.inputs
    assert row.name == "x"
    assert row.snr_db > 100
    assert [(found.model, found.directions + found.skipped) for found in report.differences] == [
        ("original", 16),
        ("fused", 16),
    ]
    assert all(found.directions >= 8 for found in report.differences)
    json.dumps(report.to_json(), allow_nan=False)
    assert report.text().count("agree") == 3


def wrong_weight(model):
    copy = graph.canonical(model)
    kernel = copy.get_layer("conv").kernel
    value = graph.numpy(kernel).copy()
    value[1, 1, 0, 0] *= 1.01
    kernel.assign(value)
    return copy


class Stopped(L.Layer):
    """Equal outputs, no gradient: what a careless rewrite may leave behind."""

    def call(self, x):
        return keras.ops.stop_gradient(x)


class Doubled(L.Layer):
    """A gradient of its own that is not that of what it computes."""

    def call(self, x):
        return 2 * x - keras.ops.stop_gradient(x)


def with_behind(model, layer, kind):
    """The model with a layer of ``kind`` behind ``layer``."""
    return keras.models.clone_model(
        model,
        call_function=lambda own, *args, **kwargs: (
            kind(name=f"behind_{layer}")(own(*args, **kwargs)) if own.name == layer else own(*args, **kwargs)
        ),
        clone_function=lambda own: own,
    )


DAMAGES = {
    "a wrong weight": wrong_weight,
    "a stopped gradient": lambda model: with_behind(graph.canonical(model), "relu", Stopped),
    "a doubled gradient": lambda model: with_behind(graph.canonical(model), "skip", Doubled),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_shows(net, damage):
    model, fused, samples = net
    wrong = DAMAGES[damage](fused)
    if damage != "a wrong weight":  # which outputs do not show
        for a, b in zip(graph.run(wrong, samples), graph.run(fused, samples), strict=True):
            np.testing.assert_array_equal(a, b)
    report = input_gradients(model, wrong, samples)
    assert not report.passed
    assert report.reason == f"gradient of x: {report.inputs[0].reason}"
    assert f"DIFFERS: {report.inputs[0].reason}" in report.text()
    assert not report.inputs[0].passed
    assert report.inputs[0].kinks == 0
    numbers = {found.model: found.passed for found in report.differences}
    assert numbers == {"original": True, "fused": damage == "a wrong weight"}


class Drifting(L.Layer):
    """The gradient of x, and a value beside it that no gradient tells."""

    def call(self, x):
        return x + 0.01 * keras.ops.stop_gradient(keras.ops.sin(x))


class Sometimes(L.Layer):
    """Lets a gradient pass in samples that begin with a positive number."""

    def call(self, x):
        return keras.ops.where(x[:, :1] > 0, x, keras.ops.stop_gradient(x))


def smooth(kind=None):
    """The same weights each time; with a layer of ``kind`` beside a path that lets gradients pass."""
    x = keras.Input((6,), name="x")
    y = L.Dense(9, activation="tanh", name="a")(x)
    model = enliven(keras.Model(x, L.Dense(3, name="c")(L.Add()([y, L.Dense(9, name="b")(x)]))))
    return model if kind is None else with_behind(model, "b", kind)


def test_numbers_that_the_original_misses_are_no_evidence():
    """A stopped gradient is what the model means: it must be kept, and numbers say nothing of it."""
    model, samples = smooth(Stopped), inputs_for(smooth(), 8)
    report = input_gradients(model, graph.canonical(model), samples)
    assert report.passed
    assert [(part.model, part.passed) for part in report.differences] == [("original", None), ("fused", None)]
    assert [part.directions for part in report.differences] == [16, 0]
    (notice,) = report.notices
    assert "not its numerical derivative in 16 of 16 directions" in notice
    assert report.text().count("no evidence") == 2
    json.dumps(report.to_json(), allow_nan=False)
    lost = input_gradients(model, smooth(), samples)  # equal outputs, and a gradient that the original stops
    assert lost.reason == f"gradient of x: {lost.inputs[0].reason}"


@pytest.mark.parametrize("kind", [None, Sometimes])
def test_numbers_judge_where_the_original_agrees_with_them(kind):
    """The damage has the original's gradient, so that numbers alone tell it."""
    model, samples = smooth(kind), inputs_for(smooth(), 8)
    right = input_gradients(model, graph.canonical(model), samples)
    original, fused = right.differences
    assert right.passed
    assert (original.passed, fused.passed) == (None if kind else True, True)
    assert 0 < fused.directions <= original.directions
    assert (fused.directions < original.directions) == (kind is not None)
    wrong = input_gradients(model, with_behind(graph.canonical(model), "c", Drifting), samples)
    assert wrong.inputs[0].passed
    assert wrong.reason == f"numerical differences, fused: {wrong.differences[1].reason}"
    assert "DISAGREE" in wrong.text()


@pytest.mark.parametrize(
    ("original", "fused", "passed", "directions"),
    [
        ("ss", "ss", (True, True), 2),
        ("ss", "sd", (True, False), 2),
        ("sd", "sd", (None, True), 1),
        ("ds", "sd", (None, False), 1),
        ("dd", "ds", (None, None), 0),
        ("kk", "ss", (None, None), 0),
        ("ks", "sk", (True, False), 0),
    ],
)
def test_each_direction_is_judged_on_its_own(original, fused, passed, directions):
    """Of each direction: s the same as numbers, d different, k across a kink."""
    there, here = (
        _Compared(np.array([sign != "k" for sign in signs]), np.array([3.0 * (sign == "d") for sign in signs]))
        for signs in (original, fused)
    )
    told = _told_original(there), _told_fused(here, there)
    assert tuple(part.passed for part in told) == passed
    assert told[1].directions == directions


def test_models_of_a_fixed_batch_are_asked_in_whole_batches():
    x = keras.Input(batch_shape=(20, 8), name="x")
    y = keras.ops.reshape(L.Dense(6, activation="relu")(x), (20, 2, 3))
    model = enliven(keras.Model(x, L.Dense(3)(keras.ops.reshape(y, (20, 6)))))
    samples = inputs_for(model, 20)
    report = input_gradients(model, graph.canonical(model), samples)
    assert report.passed
    assert report.samples == 20


@pytest.mark.parametrize(("law", "passed"), [("float32", False), ("float16", True), ("bfloat16", True)])
def test_rounded_weights_agree_under_the_policy_of_their_precision_alone(law, passed):
    """Smooth, so that no rounding crosses a kink; a stopped gradient passes under no policy."""
    model = chain((6,), L.Dense(9, activation="tanh"), L.Dense(5, activation="tanh", name="b"), L.Dense(3))
    rounded = graph.canonical(model)
    rounded.set_weights([graph.numpy(w).astype("float16").astype("float32") for w in model.weights])
    samples = inputs_for(model, 8)
    report = input_gradients(model, rounded, samples, law=POLICIES[law])
    assert report.passed == passed
    assert report.inputs[0].law == ("sample" if passed else report.inputs[0].law)
    stopped = with_behind(graph.canonical(model), "b", Stopped)
    assert not input_gradients(model, stopped, samples, law=POLICIES[law]).passed


def test_nothing_compared_is_no_agreement():
    report = GradientReport(0, (), ())
    assert not report.passed
    assert report.reason == "no gradient was compared"


@pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
def test_norms_of_gradients_stay_within_the_range(size):
    r = size * np.array([[1.0, 2.0, 3.0]] * 4)
    found = _Norms.of(r, r * (1 + 1e-7), r * (1 + 1e-6))
    np.testing.assert_allclose(found.ratios(FLOAT32, found.scale), np.full(4, 1e-6 / (8e-7 + 4 * 2.0**-23)), rtol=1e-6)


def test_a_gradient_that_differs_at_a_kink_alone_is_asked_again_beside_it(net, monkeypatch):
    """One sample's gradient is spoilt once, as a float32 unit on the other side of a kink would."""
    model, fused, samples = net
    real, count = _Gradient.at, []

    def flipped(self, arrays):
        found = real(self, arrays)
        count.append(self.model.name)
        if len(count) == 3:  # the candidate's first answer
            found["x"][2] += 0.1
        return found

    monkeypatch.setattr(_Gradient, "at", flipped)
    report = input_gradients(model, fused, samples)
    assert report.passed
    assert report.inputs[0].kinks == 1


def test_directions_across_a_kink_are_skipped_and_counted():
    model = chain((3,), L.Dense(400, name="d"), L.ReLU(), L.Dense(2))
    model.get_layer("d").bias.assign(np.zeros(400))
    samples = {"x": np.random.default_rng(0).normal(0, 1, (8, 3)).astype(np.float32)}
    import deploykit.gradients as module

    before = module.STEP
    try:
        module.STEP = 1e-2  # so wide that kinks lie in between
        report = input_gradients(model, model, samples, directions=32)
    finally:
        module.STEP = before
    assert report.passed
    assert report.differences[0].skipped > 8


def test_whole_number_inputs_are_held_fixed_and_alone_they_are_refused():
    token, x = keras.Input((4,), dtype="int32", name="token"), keras.Input((4, 3), name="x")
    y = L.Concatenate()([L.Embedding(5, 3)(token), x])
    model = enliven(keras.Model([token, x], L.Dense(2)(L.BatchNormalization()(y))))
    samples = inputs_for(model, 4)
    report = input_gradients(model, fuse(model, samples=samples).model, samples, directions=4)
    assert report.passed
    assert [row.name for row in report.inputs] == ["x"]
    assert report.fixed == ("token",)
    only = keras.Model(token, L.Dense(2)(L.Flatten()(L.Embedding(5, 3)(token))))
    with pytest.raises(UnsupportedModelError, match="behind its Embedding"):
        input_gradients(only, only, {"token": samples["token"]})
