"""The plan: what leaves by splitting, by moving along streams, by pads and by other affines, and what is reduced."""

from __future__ import annotations

import sys

import keras
import numpy as np
import pytest
from nets import calibrate, chain, enliven, inputs_for

from deploykit import graph
from deploykit.archive import write_keras
from deploykit.data import synthesize
from deploykit.fuse import fuse

L = keras.layers
BN = L.BatchNormalization
planning = sys.modules["deploykit.fuse.plan"]


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


def fused(model, **options):
    options.setdefault("samples", inputs_for(model))
    result = fuse(model, **options)
    assert result.proof.exactness_f64 <= 1e-12
    return result


def outcomes(result):
    return {d.layer: d.outcome for d in result.decisions}


def block(x, channels=5, name=None):
    """A pre-activation residual block."""
    y = L.ReLU()(BN(name=name)(x))
    y = L.Conv2D(channels, 3, padding="same")(y)
    y = L.ReLU()(BN()(y))
    return L.Add()([x, L.Conv2D(channels, 3, padding="same")(y)])


def stream(blocks, end=True, positive=True, seed=0):
    x = keras.Input((7, 6, 3), name="x")
    y = L.Conv2D(5, 3, padding="same", name="stem")(x)
    for i in range(blocks):
        y = block(y, name=f"pre{i}")
    if end:
        y = L.ReLU()(BN(name="post")(y))
    return enliven(keras.Model(x, L.Dense(2)(L.GlobalAveragePooling2D()(y))), seed, positive=positive)


# ------------------------------------------------------------------------------------- splitting, moving shifts


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_shifts_of_a_residual_stream_telescope_into_the_last_convolutions(blocks):
    model = stream(blocks)
    result = fused(model)
    assert set(outcomes(result).values()) == {"fused"}
    assert not any(isinstance(layer, (BN, L.Rescaling)) for layer in result.model.layers)
    assert {d.direction for d in result.decisions if d.layer.startswith("pre")} == {"both"}


def test_a_channel_that_is_turned_round_keeps_its_layer_and_is_named():
    model = stream(2)
    model.get_layer("pre1").gamma.assign([1.0, 1, -1, 1, 1])
    (decision,) = [d for d in fused(model).decisions if d.layer == "pre1"]
    assert (decision.outcome, decision.code) == ("kept", "fan_out")
    assert "1 of 5 channels (channel 2)" in decision.reason


def test_a_channel_of_scale_zero_keeps_its_layer_and_is_named():
    model = chain((6,), L.Activation("tanh"), BN(name="bn"), L.ReLU(), L.Dense(2), positive=True)
    model.get_layer("bn").gamma.assign([1.0, 0, 1, 1, 0, 1])
    (decision,) = fused(model).decisions
    assert (decision.outcome, decision.code) == ("kept", "not_invertible")
    assert "2 channels is 0 (channel 1, 4)" in decision.reason


def test_a_scale_of_zero_still_goes_where_nothing_has_to_undo_it():
    model = chain((6,), L.Activation("tanh"), BN(name="bn"), L.Dense(3), L.Dropout(0.1), BN(name="after"), L.Softmax())
    model.get_layer("bn").gamma.assign([1.0, 0, 1, 1, 0, 1])
    model.get_layer("after").gamma.assign([1.0, 0, -1])
    assert outcomes(fused(model)) == {"bn": "fused", "after": "fused"}


def test_the_scale_goes_back_through_a_fused_relu_and_the_shift_forward():
    model = chain((6,), L.Dense(5, activation="relu", name="d"), BN(), L.Dense(3), positive=True)
    result = fused(model, barrier=[model.layers[-1].name])
    assert outcomes(result)[model.layers[2].name] == "reduced"
    assert result.decisions[0].into == ("d",)


def test_a_dense_block_loses_one_and_reduces_the_rest():
    """BN-ReLU-Conv-Concat: every BN reads the same stream, so only one shift can go back."""
    x = keras.Input((6, 6, 3), name="x")
    y = L.Conv2D(4, 3)(x)
    for i in range(3):
        y = L.Concatenate()([y, L.Conv2D(2, 3, padding="same")(L.ReLU()(BN(name=f"b{i}")(y)))])
    y = L.GlobalAveragePooling2D()(L.ReLU()(BN(name="end")(y)))
    result = fused(enliven(keras.Model(x, L.Dense(2)(y)), positive=True))
    assert sorted(outcomes(result).values()) == ["fused", "reduced", "reduced", "reduced"]
    kinds = [type(layer) for layer in result.model.layers]
    assert BN not in kinds
    assert kinds.count(L.Rescaling) == 3
    assert all(layer.scale == 1.0 for layer in result.model.layers if isinstance(layer, L.Rescaling))


def test_a_layer_that_shares_a_tensor_undoes_the_change():
    x = keras.Input((6,), name="x")
    y = L.Dense(5, name="maker")(x)
    model = enliven(keras.Model(x, L.Add()([L.Softmax()(BN()(y)), L.Dense(5, name="other", activation="tanh")(y)])))
    result = fused(model)
    assert result.decisions[0].into == ("maker", "other")


def test_both_branches_of_a_fork_carry_an_affine_to_the_merge():
    x = keras.Input((6,), name="x")
    y = BN()(L.Activation("tanh")(x))
    y = L.Add()([L.Dropout(0.1)(L.Dropout(0.1)(y)), L.Identity()(y)])
    assert set(outcomes(fused(enliven(keras.Model(x, L.Dense(3)(y))))).values()) == {"fused"}


def test_branches_of_a_fork_that_come_back_differently_stop_it():
    x = keras.Input((5, 6), name="x")
    y = BN(center=False)(L.Activation("tanh")(x))
    y = L.Add()([y, L.Softmax()(y)])
    model = enliven(keras.Model(x, L.Dense(3)(y)))
    assert set(outcomes(fused(model)).values()) == {"kept"}


# ---------------------------------------------------------------------------------------------- other affines


def test_affines_in_a_row_become_one_where_none_can_leave():
    model = chain((6,), L.Activation("tanh"), BN(), L.Rescaling(0.5, 1), BN(name="last"), L.Activation("tanh"))
    result = fused(model)
    assert sorted(outcomes(result).values()) == ["fused", "fused", "kept"]
    assert sum(isinstance(layer, (BN, L.Rescaling)) for layer in result.model.layers) == 1


def test_preprocessing_collapses_into_one_addition_in_front_of_a_padded_convolution():
    x = keras.Input((8, 8, 3), name="x")
    y = L.Normalization(mean=[0.4, 0.5, 0.6], variance=[0.04, 0.05, 0.06])(L.Rescaling(1 / 255)(x))
    y = L.Rescaling([1.1, 1.2, 1.3])(y)
    y = L.Conv2D(4, 3, strides=2)(L.ZeroPadding2D(((0, 1), (0, 1)))(y))
    model = enliven(keras.Model(x, L.Dense(2)(L.GlobalAveragePooling2D()(L.Activation("tanh")(y)))))
    samples = {"x": np.random.default_rng(0).uniform(0, 255, (6, 8, 8, 3)).astype(np.float32)}
    result = fused(model, samples=samples)
    assert sorted(outcomes(result).values()) == ["fused", "fused", "reduced"]


def test_a_user_kept_layer_takes_nothing_in():
    model = chain((6,), L.Activation("tanh"), BN(name="a"), BN(name="b"), L.Activation("tanh"))
    result = fused(model, keep=["b"])
    assert outcomes(result) == {"a": "kept", "b": "kept"}
    assert np.array_equal(graph.numpy(result.model.get_layer("b").gamma), graph.numpy(model.get_layer("b").gamma))


def test_an_identity_leaves_from_anywhere():
    x = keras.Input((6,), name="x")
    y = L.Rescaling(1.0, name="nothing")(x)
    result = fuse(keras.Model(x, [L.Dense(2)(y), y]), prove=False)
    assert [(d.outcome, d.into) for d in result.decisions] == [("fused", ())]


# ----------------------------------------------------------------------------------------------------- padding

PADDED = {
    "same": lambda: [L.Conv2D(4, 3, padding="same", name="conv")],
    "same strided": lambda: [L.Conv2D(4, 3, strides=2, padding="same", name="conv")],
    "same dilated": lambda: [L.Conv2D(4, (3, 2), dilation_rate=2, padding="same", name="conv")],
    "same groups": lambda: [L.Conv2D(6, 3, groups=3, padding="same", name="conv")],
    "depthwise": lambda: [L.DepthwiseConv2D(3, padding="same", name="conv")],
    "separable": lambda: [L.SeparableConv2D(4, 3, padding="same", depth_multiplier=2, name="conv")],
    "ZeroPadding2D": lambda: [L.ZeroPadding2D(((0, 1), (1, 0)), name="conv"), L.Conv2D(4, 3)],
    "causal": lambda: [L.Reshape((64, 3)), L.Conv1D(4, 3, padding="causal", dilation_rate=2, name="conv")],
}


@pytest.mark.parametrize("row", PADDED)
def test_a_shift_that_is_one_pad_value_for_all_channels_goes(row, tmp_path):
    x = keras.Input((8, 8, 3), name="x")
    y = x / 127.5 - 1
    for layer in PADDED[row]():
        y = layer(y)
    model = enliven(keras.Model(x, L.Dense(2)(L.Activation("tanh")(y))))
    samples = {"x": np.random.default_rng(0).uniform(0, 255, (6, 8, 8, 3)).astype(np.float32)}
    result = fused(model, samples=samples)
    assert set(outcomes(result).values()) == {"fused"}
    loaded = keras.models.load_model(write_keras(result.model, tmp_path / "m.keras"), compile=False)
    np.testing.assert_allclose(graph.run(loaded, samples)[0], graph.run(model, samples)[0], rtol=1e-4, atol=1e-5)
    again = fuse(loaded, samples=samples)
    assert again.decisions == ()


def test_a_second_affine_moves_a_pad_that_an_earlier_one_left():
    x = keras.Input((8, 8, 3), name="x")
    y = L.Conv2D(4, 3)(keras.ops.pad(x * 0.5, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=3.0))
    model = enliven(keras.Model(x, L.Dense(2)(L.Activation("tanh")(y))))
    result = fused(model)
    assert set(outcomes(result).values()) == {"fused"}
    (pad,) = [node for node in graph.trace(result.model).nodes if type(node.layer).__name__ == "Pad"]
    assert pad.kwargs["constant_values"] == 6.0


@pytest.mark.parametrize("mode", ["reflect", "symmetric"])
def test_padding_that_repeats_the_input_follows_by_itself(mode):
    x = keras.Input((8, 8, 3), name="x")
    y = BN()(L.Activation("tanh")(x))
    y = keras.ops.pad(y, ((0, 0), (1, 1), (1, 2), (0, 0)), mode=mode)
    assert set(outcomes(fused(enliven(keras.Model(x, L.Conv2D(4, 3)(y))))).values()) == {"fused"}


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_padding_along_the_affines_own_axis_stops_it(order):
    x = keras.Input((5, 4), name="x")
    first = L.Activation("tanh")(x) if order == "forward" else L.Permute((2, 1))(L.Dense(5)(L.Permute((2, 1))(x)))
    y = BN(axis=1)(first) if order == "forward" else first
    y = keras.ops.pad(y, ((0, 0), (1, 2), (0, 0)))
    y = L.Activation("tanh")(y if order == "forward" else BN(axis=1)(y))
    model = enliven(keras.Model(x, L.Dense(2)(y)), positive=True)
    assert {d.code for d in fused(model).decisions} == {"axis_mismatch"}


def test_the_pad_that_is_made_takes_a_free_name():
    x = keras.Input((8, 8, 3), name="x")
    y = L.Conv2D(4, 3, padding="same", name="conv")(x / 127.5 - 1)
    model = enliven(keras.Model(x, L.Conv2D(2, 1, name="conv.pad")(L.Activation("tanh")(y))))
    samples = {"x": np.random.default_rng(0).uniform(0, 255, (6, 8, 8, 3)).astype(np.float32)}
    assert set(outcomes(fused(model, samples=samples)).values()) == {"fused"}


def test_a_shift_that_differs_by_channel_leaves_an_addition_and_says_how_wrong_the_border_would_be():
    model = chain((9, 8, 4), L.Activation("tanh"), BN(), L.Conv2D(5, 3, padding="same"), positive=True)
    (decision,) = fused(model).decisions
    assert (decision.outcome, decision.code, decision.direction) == ("reduced", "padded_shift", "forward")
    told = float(decision.reason.split("the border wrong by up to ")[1].split(")")[0])
    # what the border really gets wrong when the shift is folded as if there were no padding
    bn, conv = model.layers[2], model.layers[3]
    scale = graph.numpy(bn.gamma) / np.sqrt(graph.numpy(bn.moving_variance) + bn.epsilon)
    shift = graph.numpy(bn.beta) - graph.numpy(bn.moving_mean) * scale
    kernel = graph.numpy(conv.kernel)
    ones = np.broadcast_to(shift / scale, (1, 9, 8, 4)).astype(np.float32)
    seen = graph.numpy(keras.ops.conv(ones, kernel * scale[:, None], padding="same"))
    whole = np.einsum("hwio,i->o", kernel * scale[:, None], shift / scale)
    assert told == pytest.approx(np.abs(seen - whole).max(), rel=1e-2)


# ------------------------------------------------------------------------------------- conditioning, reduction


def test_a_shift_that_would_cost_digits_stays_and_its_scale_goes():
    model = stream(2, end=False)
    bn = model.get_layer("pre1")
    bn.gamma.assign(np.full(5, 1e-5, np.float32))  # a shift of about 5e4 on a stream of size 1
    bn.beta.assign(np.full(5, 0.5, np.float32))
    result = fuse(model, samples=inputs_for(model))
    assert result.proof.holds
    (decision,) = [d for d in result.decisions if d.layer == "pre1"]
    assert (decision.outcome, decision.code) == ("reduced", "conditioning")
    assert outcomes(result)["pre0"] == "fused"


def test_a_reduced_layer_is_an_addition_that_plain_keras_loads(tmp_path):
    model = chain((9, 4), L.Activation("tanh"), BN(name="bn"), L.Conv1D(3, 3, padding="same"), positive=True)
    result = fused(model)
    loaded = keras.models.load_model(write_keras(result.model, tmp_path / "m.keras"), compile=False)
    layer = loaded.get_layer("bn")
    assert isinstance(layer, L.Rescaling)
    assert layer.scale == 1.0
    assert len(layer.offset) == 4


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_a_reduced_layer_keeps_its_axis(axis):
    x = keras.Input((4, 5, 6), name="x")
    y = L.ReLU()(BN(axis=axis)(L.Activation("tanh")(x)))
    to_the_end = [i for i in (1, 2, 3) if i != axis] + [axis]
    model = enliven(keras.Model(x, L.Dense(2)(L.Permute(to_the_end)(y))), positive=True)
    assert set(outcomes(fused(model)).values()) == {"reduced"}


@pytest.mark.parametrize("layer", [L.LSTM(3), L.Bidirectional(L.GRU(3)), L.SimpleRNN(3)])
def test_a_mask_is_no_obstacle_for_what_leaves_steps_out(layer):
    x = keras.Input((7,), dtype="int32", name="x")
    y = L.Embedding(5, 4, mask_zero=True)(x)
    y = type(layer).from_config(layer.get_config())(BN()(L.Activation("tanh")(y)))
    assert set(outcomes(fused(enliven(keras.Model(x, L.Dense(2)(y))))).values()) == {"fused"}


@pytest.mark.parametrize("inner", [L.RNN(L.GRUCell(4)), L.RNN([L.LSTMCell(4), L.GRUCell(3)])])
def test_a_bidirectional_of_something_else_takes_nothing(inner):
    model = chain((5, 3), L.Activation("tanh"), BN(), L.Bidirectional(inner))
    assert set(outcomes(fused(model)).values()) == {"kept"}


def test_a_frozen_normalization_called_in_training_mode_is_one_at_inference():
    x = keras.Input((6,), name="x")
    frozen = BN()
    frozen.trainable = False
    y = frozen(L.Dense(4)(x), training=True)
    assert set(outcomes(fused(enliven(keras.Model(x, L.Dense(2)(L.Activation("tanh")(y)))))).values()) == {"fused"}


def test_a_join_of_one_tensor_lets_everything_pass():
    x = keras.Input((6,), name="x")
    y = L.Concatenate()([BN()(L.Activation("tanh")(x))])
    assert set(outcomes(fused(enliven(keras.Model(x, L.Dense(2)(y))))).values()) == {"fused"}


def test_an_affine_behind_a_masking_layer_goes_on():
    assert set(outcomes(fused(chain((9, 4), L.Masking(), BN(), L.GRU(3)))).values()) == {"fused"}


def test_a_synchronized_normalization_is_one_at_inference():
    assert set(outcomes(fused(chain((6,), L.Dense(4), BN(synchronized=True), L.ReLU()))).values()) == {"fused"}


def test_a_reduced_layer_passes_a_mask_on():
    x = keras.Input((7,), dtype="int32", name="x")
    y = L.Activation("tanh")(L.Embedding(5, 4, mask_zero=True)(x))
    y = L.LSTM(3)(L.ReLU()(BN()(y)))
    assert set(outcomes(fused(enliven(keras.Model(x, L.Dense(2)(y)), positive=True))).values()) == {"reduced"}


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "float64"])
def test_policies_survive_and_are_exact(policy):
    x = keras.Input((6,), name="x", dtype="float64" if policy == "float64" else None)
    y = x
    for layer in (L.Dense(5, dtype=policy), BN(dtype=policy), L.ReLU(dtype=policy), L.Dense(3, dtype=policy)):
        y = layer(y)
    model = enliven(keras.Model(x, y))
    result = fuse(model, samples=inputs_for(model))
    assert [d.outcome for d in result.decisions] == ["fused"]
    assert result.proof.exactness_f64 <= 1e-12
    assert result.model.layers[1].dtype_policy.name == policy


# ------------------------------------------------------------------------------------------- purity, and again


NETS = {
    "stream": lambda: stream(3),
    "turned": lambda: stream(2, positive=False),
    "reduced": lambda: chain((9, 4), L.Activation("tanh"), BN(), L.Conv1D(3, 3, padding="same"), positive=True),
    "in a row": lambda: chain((6,), L.Activation("tanh"), BN(), BN(), L.Activation("tanh")),
}


@pytest.mark.parametrize("row", NETS)
def test_fusing_again_changes_nothing(row):
    first = fused(NETS[row]())
    again = fuse(first.model, samples=inputs_for(first.model))
    assert {d.outcome for d in again.decisions} <= {"kept"}
    assert again.model.get_config() == first.model.get_config()
    for a, b in zip(again.model.weights, first.model.weights, strict=True):
        assert np.array_equal(graph.numpy(a), graph.numpy(b))


def test_the_same_model_gets_the_same_plan():
    found = graph.trace(stream(3))
    plans = [planning.plan(found) for _ in range(2)]
    assert plans[0].decisions == plans[1].decisions
    assert [(e.layer, e.side) for e in plans[0].edits] == [(e.layer, e.side) for e in plans[1].edits]


def test_a_search_has_an_end(monkeypatch):
    monkeypatch.setattr(planning, "SEARCH_LIMIT", 60)
    layers = [layer for _ in range(100) for layer in (L.Dropout(0.1),)]
    model = chain((6,), L.Activation("tanh"), BN(), *layers, L.Dense(2))
    assert [d.code for d in fuse(model, prove=False).decisions] == ["search_limit"]


def test_planning_is_linear_in_the_number_of_layers():
    """Settled calls per layer, counted, so that no clock is asked."""
    per_layer = []
    for blocks in (10, 40):
        found = graph.trace(stream(blocks))
        settled = [0]
        original = planning._Planner.settle

        def counting(self, search, node, original=original, settled=settled):
            settled[0] += 1
            return original(self, search, node)

        planning._Planner.settle = counting
        try:
            planning.plan(found)
        finally:
            planning._Planner.settle = original
        per_layer.append(settled[0] / len(found.nodes))
    assert per_layer[1] < 1.5 * per_layer[0]


# ------------------------------------------------------------------------------------------------- known nets


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fused_count", "reduced_count"), [("ResNet50V2", 48, 1), ("DenseNet121", 62, 59), ("NASNetMobile", 192, 0)]
)
def test_well_known_nets_reach_what_is_possible(name, fused_count, reduced_count):
    size = 224 if name == "NASNetMobile" else 64
    model = enliven(getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3)), positive=True)
    decisions = fuse(model, prove=False).decisions
    assert [sum(d.outcome == o for d in decisions) for o in ("fused", "reduced")] == [fused_count, reduced_count]


@pytest.mark.slow
def test_a_pre_activation_net_is_exact():
    model = calibrate(keras.applications.ResNet50V2(weights=None, input_shape=(64, 64, 3)))
    result = fuse(model, samples=synthesize(graph.signature(model), count=4, edges=0).arrays)
    assert (result.count("fused"), result.count("reduced")) == (48, 1)
    assert result.proof.holds
