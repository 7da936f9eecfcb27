"""The proof: it notices a fold that is wrong, a cast that loses, digits that go, and outputs that say nothing."""

from __future__ import annotations

import sys
from dataclasses import replace

import keras
import numpy as np
import pytest
from nets import calibrate, chain, enliven, inputs_for

from deploykit import graph
from deploykit.data import synthesize
from deploykit.errors import ProofError, UnsupportedModelError
from deploykit.fuse import blame, conduits, fuse, proof, sinks

fusing = sys.modules["deploykit.fuse"]  # the package; its name in deploykit is the function's
L = keras.layers
BN = L.BatchNormalization


def codes(result):
    return {d.layer: d.code for d in result.decisions}


# ----------------------------------------------------------------------------------------- finding the fault


@pytest.mark.parametrize("guilty", [set(), {"a"}, {"h"}, {"c", "f"}, set("abcdefgh")])
def test_blame_finds_single_faults(guilty):
    assert set(blame(list("abcdefgh"), lambda group: len(group & guilty), 0)) == guilty


@pytest.mark.parametrize("worst", "abcd")
def test_blame_names_the_worst_of_what_fails_only_together(worst):
    """Each is below the limit alone, all together are not."""
    assert blame(list("abcd"), lambda group: len(group) + 0.5 * (worst in group), 2.6) == [worst]


def test_blame_asks_few_questions():
    asked = []
    blame([str(i) for i in range(256)], lambda group: asked.append(group) or float("77" in group), 0)
    assert len(asked) <= 2 * 8 + 1


# -------------------------------------------------------------------------------- a law that does not hold


def test_a_wrong_law_is_found_by_the_proof_and_its_source_kept(monkeypatch):
    wrong = {**conduits.CONDUITS, L.ReLU: conduits.Conduit(conduits._same, conduits._same)}  # relu is no conduit
    monkeypatch.setattr(conduits, "CONDUITS", wrong)
    x = keras.Input((6,), name="x")
    good = BN(name="good")(L.Dense(5)(x))
    bad = BN(name="bad")(L.ReLU()(L.Dense(5)(L.LeakyReLU()(good))))
    model = enliven(keras.Model(x, L.Dense(3)(L.LeakyReLU()(bad))))
    result = fuse(model, barrier=[model.layers[-1].name], samples=inputs_for(model))
    assert codes(result) == {"good": "folded", "bad": "proof_failed"}
    assert result.proof.holds


def test_a_wrong_sink_is_found_by_the_proof(monkeypatch):
    right = sinks.rewritten

    def forgets_the_bias(layer, edits):
        weights = dict(right(layer, edits))
        if layer.name == "d2" and edits:
            weights["bias"] = weights["bias"] * 0
        return weights

    monkeypatch.setattr(sys.modules["deploykit.fuse.apply"], "rewritten", forgets_the_bias)
    model = chain((6,), L.Dense(5, name="d1"), BN(name="b1"), L.ReLU(), L.Dense(4, name="d2"), BN(name="b2"), L.ReLU())
    assert codes(fuse(model, samples=inputs_for(model))) == {"b1": "folded", "b2": "proof_failed"}


# ------------------------------------------------------------------------------------- casts and conditioning


def test_a_weight_that_overflows_its_dtype_keeps_the_source():
    model = chain((6,), L.Dense(4, name="d", dtype="float16"), BN(name="b", dtype="float16"), L.ReLU())
    model.get_layer("b").moving_variance.assign(np.full(4, 1e-7, np.float16))
    model.get_layer("b").epsilon = 1e-12
    model.get_layer("b").gamma.assign(np.full(4, 6e4, np.float16))
    assert codes(fuse(model, prove=False)) == {"b": "overflow"}


def test_a_channel_that_vanishes_in_its_dtype_keeps_the_source():
    model = chain((6,), L.Dense(4, name="d", dtype="float16"), BN(name="b", dtype="float16"), L.ReLU())
    b = model.get_layer("b")
    b.gamma.assign(np.full(4, 6e-8, np.float16))
    b.moving_variance.assign(np.full(4, 6e4, np.float16))
    for weight in (b.beta, b.moving_mean, model.get_layer("d").bias):
        weight.assign(np.zeros(4, np.float16))
    assert codes(fuse(model, prove=False)) == {"b": "underflow"}


def test_a_vanishing_channel_beside_a_larger_bias_is_no_loss():
    model = chain((6,), L.Dense(4, name="d", dtype="float16"), BN(name="b", dtype="float16"), L.ReLU())
    b = model.get_layer("b")
    b.gamma.assign(np.full(4, 6e-8, np.float16))
    b.moving_variance.assign(np.full(4, 6e4, np.float16))
    b.beta.assign(np.ones(4, np.float16))
    assert codes(fuse(model, prove=False)) == {"b": "folded"}


def far_from_zero(ratio):
    """A Normalization whose mean is ``ratio`` deviations away: exact to fold, and digits go when folded."""
    norm = L.Normalization(mean=[ratio] * 8, variance=[1.0] * 8, name="norm")
    return keras.Sequential([keras.Input((8,), name="x"), norm, L.Dense(4, activation="tanh"), L.Dense(3)])


def test_a_fold_that_would_cost_accuracy_is_kept():
    model = far_from_zero(1e5)
    x = (1e5 + np.random.default_rng(0).normal(0, 1, (16, 8))).astype(np.float32)
    result = fuse(model, samples={"x": x})
    assert codes(result) == {"norm": "conditioning"}
    assert "bits in float32" in result.decisions[0].reason


def test_the_same_fold_goes_when_it_costs_nothing():
    x = np.random.default_rng(0).normal(0, 1, (16, 8)).astype(np.float32)
    assert codes(fuse(far_from_zero(0.3), samples={"x": x})) == {"norm": "folded"}


def test_what_was_reduced_for_its_digits_stays_when_fused_again(monkeypatch):
    """The limit follows the own error of the model given, and that of the reduced model is another."""
    norm = L.Normalization(mean=[30.0] * 8, variance=[4.0] * 8, name="norm")
    model = keras.Sequential([keras.Input((8,), name="x"), norm, L.Dense(4, activation="tanh"), L.Dense(3)])
    samples = {"x": (30 + np.random.default_rng(0).normal(0, 2, (16, 8))).astype(np.float32)}
    monkeypatch.setattr(fusing, "_rounding_limit", lambda ref: np.inf)
    cost = fuse(model, samples=samples).proof.rounding
    monkeypatch.setattr(fusing, "_rounding_limit", lambda ref: 0.9 * cost)
    once = fuse(model, samples=samples)
    assert [(d.outcome, d.code) for d in once.decisions] == [("reduced", "conditioning")]
    monkeypatch.setattr(fusing, "_rounding_limit", lambda ref: 1.3 * cost)
    assert codes(fuse(once.model, samples=samples)) == {"norm": "conditioning"}
    assert codes(fuse(model, samples=samples)) == {"norm": "folded"}


def test_rounding_counts_in_the_stored_weights_and_as_the_model_runs():
    one = proof.Proof(0.0, 1e-12, 3e-7, 0.0, 1e-7, 2e-7, (), 16)
    assert (one.rounding, replace(one, float32_fused=4e-7).rounding) == (3e-7, 4e-7)


# --------------------------------------------------------------------------------------- what is no evidence


def test_an_output_that_hardly_varies_is_no_evidence():
    x = keras.Input((6,), name="x")
    y = L.ReLU()(BN()(L.Dense(5)(x)))
    model = enliven(keras.Model(x, [L.Dense(3)(y), L.Rescaling(1e-12, offset=5.0, name="flat")(L.Dense(2)(y))]))
    assert fuse(model, samples=inputs_for(model)).proof.insensitive == ("flat",)


def test_without_evidence_there_is_no_proof():
    x = keras.Input((6,), name="x")
    model = enliven(keras.Model(x, L.Rescaling(0.0, offset=5.0)(L.ReLU()(BN()(L.Dense(5)(x))))))
    with pytest.raises(ProofError, match="--data"):
        fuse(model, samples=inputs_for(model))


def test_a_saturated_softmax_is_looked_behind():
    model = chain((6,), L.Dense(5), BN(), L.ReLU(), L.Dense(3, activation="softmax", name="y"))
    model.get_layer("y").bias.assign(np.array([500.0, 0, 0], np.float32))
    result = fuse(model, samples=inputs_for(model))
    assert result.proof.insensitive == ("y",)
    assert result.proof.holds


def clipped(x):
    return keras.ops.clip(x, 0, 1)


def test_a_copy_that_is_not_the_model_proves_nothing():
    clipped.__name__ = "relu"  # so that its config says relu
    model = chain((6,), L.Dense(5, activation=clipped), BN(), L.Dense(3))
    with pytest.raises(ProofError, match="get_config"):
        fuse(model, samples=inputs_for(model))


def test_a_model_that_answers_nan_is_told_so():
    model = chain((6,), L.Dense(5), BN(), L.Dense(3))
    model.layers[2].moving_variance.assign(np.full(5, -1.0, np.float32))
    with pytest.raises(ProofError, match="NaN"):
        fuse(model, samples=inputs_for(model))


def test_a_vocabulary_is_copied_too():
    lookup = L.IntegerLookup()
    lookup.adapt([1, 5, 9, 7])
    x = keras.Input((4,), dtype="int64", name="x")
    model = enliven(keras.Model(x, L.Dense(2)(BN(name="b")(L.Embedding(8, 3)(lookup(x))))))
    samples = {"x": np.array([[1, 5, 9, 7], [5, 5, 1, 1], [7, 9, 9, 9]])}
    assert codes(fuse(model, samples=samples)) == {"b": "folded"}


def test_a_model_that_is_random_at_inference_cannot_be_proven():
    @keras.saving.register_keras_serializable("tests")
    class Noise(L.Layer):
        def call(self, x):
            return x + keras.random.normal(keras.ops.shape(x), dtype=x.dtype)

    model = chain((6,), L.Dense(5), BN(), Noise(), L.Dense(3))
    with pytest.raises(ProofError, match="random"):
        fuse(model, samples=inputs_for(model))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_distance_counts_a_new_nan_as_infinitely_far(wrong):
    r = np.array([[1.0, 2.0], [3.0, np.nan]])
    c = r.copy()
    assert proof.distance(c, r) == 0
    c[0, 0] = wrong
    assert proof.distance(c, r) == np.inf
    assert proof.distance(r[:1], r) == np.inf


def test_integer_outputs_must_be_equal():
    assert proof.distance(np.array([1, 2]), np.array([1, 2])) == 0
    assert proof.distance(np.array([1, 3]), np.array([1, 2])) == np.inf


# ------------------------------------------------------------------------------------------- what is refused


def test_layers_that_must_not_be_rewritten_are_refused():
    x = keras.Input((6,), name="x")
    with pytest.raises(UnsupportedModelError, match="sn"):
        fuse(keras.Model(x, L.SpectralNormalization(L.Dense(4), name="sn")(x)))


def test_a_subclass_is_no_known_layer():
    @keras.saving.register_keras_serializable("tests")
    class Doubling(L.Dense):
        def call(self, x):
            return 2 * super().call(x) + 1

    model = chain((6,), Doubling(5), BN(name="b"), L.Softmax())
    assert codes(fuse(model, samples=inputs_for(model))) == {"b": "no_sink"}


# ------------------------------------------------------------------------------------------------- big nets


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("MobileNetV2", 52), ("ResNet50", 53), ("EfficientNetB0", 49)])
def test_all_bn_of_well_known_nets_go(name, count):
    keras.utils.set_random_seed(0)
    model = calibrate(getattr(keras.applications, name)(weights=None, input_shape=(96, 96, 3)))
    samples = synthesize(graph.signature(model), count=4, edges=0).arrays
    result = fuse(model, samples=samples)
    outcomes = [d.outcome for d in result.decisions if d.kind == "BatchNormalization"]
    assert outcomes == ["fused"] * count
    assert result.proof.holds
    assert result.proof.float32_fused <= 2 * result.proof.float32_original
    logits = graph.run(graph.replay(graph.trace(model), dtype="float64", logits=True), samples)[-1]
    assert logits.std(axis=0).mean() / np.abs(logits).mean() > 1e-2  # the proof had something to see
