"""Guards of the plan: each net here would be fused wrongly, or not at all, without one line of `deploykit.fuse`.

`tests/mutate_guards.py` takes these lines out one at a time and expects a test to fail. Where the decision is the
point, the plan alone is asked; where the result is, the fused model is proven.
"""

from __future__ import annotations

import inspect
import math
import sys

import keras
import numpy as np
import pytest
from nets import chain, enliven, inputs_for

from deploykit import graph
from deploykit.errors import ProofError, UnsupportedModelError
from deploykit.fuse import Decision, Plan, Refusal, Refused, fuse, proof
from deploykit.fuse.apply import apply

L = keras.layers
fusing = sys.modules["deploykit.fuse"]  # whose name in `deploykit` is the function
planner = sys.modules["deploykit.fuse.plan"]
applier = sys.modules["deploykit.fuse.apply"]


pytestmark = [  # Keras', about what the nets are made to do
    pytest.mark.filterwarnings("ignore:You passed `rms_scaling"),
    pytest.mark.filterwarnings("ignore:Layer '(flatten|model).*mask"),
]


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


# What a BatchNormalization of these nets is: one sign unless said, other in every channel, no shift unless said.
KINDS = {
    "scale": lambda c: (np.linspace(0.5, 1.5, c), np.zeros(c)),
    "whole": lambda c: (np.linspace(0.5, 1.5, c), np.linspace(-1, 2, c)),
    "turned": lambda c: (np.linspace(0.5, 1.5, c) * (1 - 2 * (np.arange(c) == 1)), np.zeros(c)),
    "zero": lambda c: (np.linspace(0.5, 1.5, c) * (np.arange(c) != 1), np.zeros(c)),
    "zero and shift": lambda c: (np.linspace(0.5, 1.5, c) * (np.arange(c) != 1), np.linspace(-1, 2, c)),
    "equal halves": lambda c: (np.tile(np.linspace(0.5, 1.5, c // 2), 2), np.zeros(c)),
}


def net(shapes, build, **kinds):
    """A model of inputs x (or x0, x1, ...); ``kinds`` says what each BatchNormalization is."""
    several = isinstance(shapes, list)
    names = [f"x{i}" for i in range(len(shapes))] if several else ["x"]
    starts = [keras.Input(s, name=n) for s, n in zip(shapes if several else [shapes], names, strict=True)]
    model = enliven(keras.Model(starts if several else starts[0], build(*starts)))
    for name, kind in kinds.items():
        layer = next(layer for layer in model._flatten_layers() if layer.name == name)
        norm = layer.layer if isinstance(layer, L.TimeDistributed) else layer
        gamma, beta = KINDS[kind](norm.moving_mean.shape[0])
        for weight, value in (
            (norm.gamma, gamma),
            (norm.beta, beta),
            (norm.moving_mean, 0 * gamma),
            (norm.moving_variance, 0 * gamma + 1),
        ):
            weight.assign(value)
    return model


def bn(name="n", axis=-1):
    return L.BatchNormalization(axis=axis, name=name)


def tanh(x):
    return L.Activation("tanh")(x)


def named(result, name="n"):
    """The result of an operation, which is a source, under a name."""
    result._keras_history.operation.name = name
    return result


def whole_model():
    return keras.Sequential([keras.Input((5, 4)), L.SimpleRNN(4, return_sequences=True)], name="model")


def keep_alike(x):
    """The tensor again: what changes on one side changes on the other."""
    return L.Dropout(0.5)(x)


def uniform(x, name="n"):
    return L.Rescaling(2.0, offset=1.0, name=name)(x)


def decisions(model, **options):
    return {d.layer: d for d in planner.plan(graph.trace(model), **options).decisions}


# --------------------------------------------------------------------------------- what stands behind an affine


def padded_twice(x):
    pad, y = L.ZeroPadding1D(1), tanh(x)
    return L.Conv1D(3, 2)(pad(uniform(y))), L.Conv1D(3, 2)(pad(y))


def affine_then_uniform(x):
    return L.Conv1D(3, 3, padding="same")(uniform(bn("n")(tanh(x)), "u"))


def own_output_beside_input(x):
    y = L.Dense(4)(x)
    return tanh(L.Dense(3)(L.Add()([bn()(y), keep_alike(y)])))


def scaled_two_ways(x):
    y = L.Dense(4)(x)
    return tanh(L.Dense(3)(L.Add()([keep_alike(y), bn()(y)])))


def piece_and_copy(x):
    y = L.Dense(4)(x)
    return tanh(bn()(L.Concatenate()([y, keep_alike(y)])))


def piece_and_turned_copy(x):
    y = L.Dense(4)(x)
    return tanh(bn()(L.Concatenate()([y, L.Permute((2, 1))(y)])))


def pieces_in_two_places(x):
    y = L.Dense(4)(x)
    one = L.Concatenate()([y, L.Dense(4)(x)])
    two = L.Concatenate()([L.Dense(4)(x), y])
    return tanh(bn()(L.Add()([one, two])))


def joined_along_two_axes(x):
    y = L.Dense(4)(x)
    return tanh(bn()(y)), tanh(L.Dense(3)(L.Concatenate()([y, L.Permute((2, 1))(y)])))


def changed_beside_unchanged(x):
    y = L.Dense(4)(x)
    return tanh(L.Dense(3)(L.Concatenate(axis=1)([bn()(y), y])))


def read_by(make, *, shape=(5, 4)):
    """A dense layer whose answer a BatchNormalization and one other layer read."""

    def build(x):
        y = L.Dense(shape[-1])(x)
        return tanh(bn()(y)), tanh(make(y))

    return shape, build


def attended(x):
    scores = L.MultiHeadAttention(2, 3)(x, x, return_attention_scores=True)
    return tanh(L.Dense(2)(scores[0])), L.Softmax()(bn(axis=2)(scores[1]))


def product_of_both(x):
    y = L.Dense(4)(x)
    return tanh(bn()(L.Concatenate(axis=1)([y, L.Multiply()([y, L.Dense(4)(x)])])))


def product_beside(x):
    y = L.Dense(4)(x)
    return tanh(bn()(y)), tanh(L.Dense(3)(L.Multiply()([y, L.Dense(4)(x)])))


def average_with_a_column(x):
    y = L.Dense(4)(x)
    return tanh(L.Average()([y, keep_alike(y), L.Dense(1)(x)]) + np.arange(4, dtype=np.float32))


# name -> input shape(s), what is built on them, what the affine "n" is, its outcome, its code
ROWS = {
    # the ends of a model, and what other layers read
    "an input of the model changes nothing": ((5, 4), lambda x: tanh(bn()(x)), "whole", "kept", "nonlinear"),
    "a source stays apart from its own input": ((6,), own_output_beside_input, "scale", "kept", "fan_out"),
    "branches share one scale": ((6,), scaled_two_ways, "scale", "kept", "fan_out"),
    "a tensor takes one change": ((6,), piece_and_copy, "scale", "kept", "fan_out"),
    "a tensor takes one change along one axis": (
        (4, 4),
        piece_and_turned_copy,
        "equal halves",
        "kept",
        "fan_out",
    ),
    "a range of one joint is that of another": ((6,), pieces_in_two_places, "scale", "kept", "fan_out"),
    "joined tensors change along one axis": ((4, 4), joined_along_two_axes, "scale", "kept", "fan_out"),
    "tensors joined in steps change alike": ((5, 6), changed_beside_unchanged, "scale", "kept", "fan_out"),
    "a sum of one tensor with itself": (
        (6,),
        lambda x: tanh(bn()(L.Add()([y := L.Dense(4)(x), y]))),
        "whole",
        "kept",
        "fan_out",
    ),
    "one reader that takes nothing": (
        (4,),
        lambda x: tanh(L.Add()([L.Dense(4)(y := bn()(tanh(x))), y])),
        "whole",
        "kept",
        "nonlinear",
    ),
    # activations inside a layer
    "a tanh inside lets no scale out": (
        (6,),
        lambda x: tanh(bn()(L.Dense(4, activation="tanh")(x))),
        "scale",
        "kept",
        "fused_activation",
    ),
    "a relu inside lets no shift out": (
        (6,),
        lambda x: tanh(bn()(L.Dense(4, activation="relu")(x))),
        "whole",
        "reduced",
        "fused_activation",
    ),
    "a relu inside lets nothing turned out": (
        (6,),
        lambda x: tanh(bn()(L.Dense(4, activation="relu")(x))),
        "turned",
        "kept",
        "fused_activation",
    ),
    "a relu inside an einsum lets no shift out": (
        (4, 4),
        lambda x: tanh(bn()(L.EinsumDense("abc,cd->abd", (None, 4), activation="relu")(x))),
        "whole",
        "reduced",
        "fused_activation",
    ),
    "a tanh on the way lets no scale pass": (
        (6,),
        lambda x: L.Dense(3)(L.Activation("tanh")(bn()(tanh(x)))),
        "scale",
        "kept",
        "nonlinear",
    ),
    # modes and masks
    "dropout in training mode is no fixed map": (
        (6,),
        lambda x: L.Dense(3)(L.Dropout(0.5)(bn()(tanh(x)), training=True)),
        "whole",
        "kept",
        "training_mode",
    ),
    "recurrent dropout in training mode is no fixed map": (
        (5, 4),
        lambda x: L.LSTM(3, dropout=0.5)(bn()(tanh(x)), training=True),
        "whole",
        "kept",
        "training_mode",
    ),
    "a wrapper that sees a mask takes nothing": (
        (5, 4),
        lambda x: tanh(bn()(L.TimeDistributed(L.Dense(4))(L.Masking()(x)))),
        "whole",
        "kept",
        "mask",
    ),
    "a rearrangement that sees a mask": (
        (5, 4),
        lambda x: L.Dense(3)(L.Flatten()(bn()(tanh(L.Masking()(x))))),
        "whole",
        "kept",
        "mask",
    ),
    "a product puts 1 where it is masked": (
        [(5, 4), (5, 4)],
        lambda x, y: L.Dense(3)(L.Multiply()([bn()(tanh(L.Masking()(x))), tanh(y)])),
        "scale",
        "kept",
        "mask",
    ),
    "an operation that takes a mask away": (
        (5, 4),
        lambda x: L.LSTM(3)(named(tanh(L.Masking()(x)) * 2.0)),
        None,
        "kept",
        "mask",
    ),
    "a mask leaks out of a model that is called as a whole": (
        (5, 4),
        lambda x: L.Dense(3)(L.GlobalAveragePooling1D()(bn()(whole_model()(L.Masking()(x))))),
        "scale",
        "kept",
        "mask",
    ),
    "a wrapped source that is given a mask stays": (
        [(5, 4), (5,)],
        lambda x, m: L.Dense(3)(L.TimeDistributed(L.Rescaling(2.0), name="n")(tanh(x), mask=keras.ops.cast(m, "bool"))),
        None,
        "kept",
        "mask",
    ),
    "a wrapper that is given a mask takes nothing": (
        [(5, 4), (5,)],
        lambda x, m: tanh(bn()(L.TimeDistributed(L.Dense(4))(x, mask=keras.ops.cast(m, "bool")))),
        "whole",
        "kept",
        "mask",
    ),
    "a first state is no input of a kernel": (
        [(5, 4), (3,)],
        lambda x, h: L.GRU(3)(x, initial_state=bn()(L.Softmax()(h))),
        "whole",
        "kept",
        "no_sink",
    ),
    "a mask of scores is no projected input": (
        [(5, 4), (5, 5)],
        lambda x, m: L.MultiHeadAttention(2, 3)(x, x, attention_mask=bn()(L.Softmax()(m))),
        "whole",
        "kept",
        "no_sink",
    ),
    "scores are not what a projection makes": ((4, 4), attended, "scale", "kept", "no_sink"),
    # axes
    "a window along the affine's axis": (
        (4, 4, 4),
        lambda x: L.Dense(3)(L.Permute((2, 3, 1))(L.AveragePooling2D(2, 1, "same")(bn(axis=1)(tanh(x))))),
        "whole",
        "kept",
        "axis_mismatch",
    ),
    "a pool over the affine's axis": (
        (4, 4, 4),
        lambda x: L.Dense(3)(L.GlobalAveragePooling2D()(bn(axis=1)(tanh(x)))),
        "whole",
        "kept",
        "axis_mismatch",
    ),
    "a dense layer behind another axis": (
        (4, 4),
        lambda x: L.Dense(3)(bn(axis=1)(tanh(x))),
        "whole",
        "kept",
        "axis_mismatch",
    ),
    "a dense layer in front of another axis": (
        (4, 4),
        lambda x: tanh(bn(axis=1)(L.Dense(4)(x))),
        "whole",
        "kept",
        "axis_mismatch",
    ),
    "an einsum over another axis behind": (
        (4, 4),
        lambda x: L.EinsumDense("abc,cd->abd", (None, 4))(bn(axis=1)(tanh(x))),
        "whole",
        "kept",
        "axis_mismatch",
    ),
    "an einsum over another axis in front": (
        (4, 4),
        lambda x: tanh(bn(axis=1)(L.EinsumDense("abc,cd->abd", (4, 4))(x))),
        "whole",
        "kept",
        "axis_mismatch",
    ),
    "an einsum that sums what its kernel lacks": (
        (4, 4),
        lambda x: L.EinsumDense("abc,cd->ad", 4)(bn()(tanh(x))),
        "whole",
        "reduced",
        "unsupported_option",
    ),
    "an attention in front of another axis": (
        (4, 4),
        lambda x: tanh(bn(axis=1)(L.MultiHeadAttention(2, 3)(x, x))),
        "whole",
        "kept",
        "axis_mismatch",
    ),
    "an attention behind another axis": (
        (4, 4),
        lambda x: L.MultiHeadAttention(2, 3)(y := bn(axis=1)(tanh(x)), y),
        "whole",
        "kept",
        "axis_mismatch",
    ),
    "a recurrent layer behind another axis": (
        (4, 4),
        lambda x: L.LSTM(3)(bn(axis=1)(tanh(x))),
        "whole",
        "kept",
        "axis_mismatch",
    ),
    "a norm in front of another axis": (
        (4, 4),
        lambda x: tanh(bn(axis=1)(L.LayerNormalization()(x))),
        "whole",
        "kept",
        "axis_mismatch",
    ),
    "a norm that has no place for a shift": (
        (4, 4),
        lambda x: tanh(bn()(L.LayerNormalization(rms_scaling=True)(x))),
        "whole",
        "reduced",
        "unsupported_option",
    ),
    "a norm that has no place at all": (
        (4, 4),
        lambda x: tanh(bn()(L.LayerNormalization(axis=[1, 2], center=False, scale=False)(x))),
        "whole",
        "kept",
        "unsupported_option",
    ),
    "a sum of tensors of different rank": (
        [(5, 4), (4,)],
        lambda x, y: L.Dense(3)(L.Add()([bn()(tanh(x)), L.Dense(4)(y)])),
        "scale",
        "kept",
        "axis_mismatch",
    ),
    "a sum that repeats the affine's channel": (
        [(5, 1), (5, 4)],
        lambda x, y: L.Dense(3)(L.Add()([bn()(tanh(x)), L.Dense(4)(y)])),
        "whole",
        "kept",
        "axis_mismatch",
    ),
    "a sum that repeats a branch": (
        (5, 4),
        lambda x: tanh(bn()(L.Add()([L.Dense(4)(x), L.Dense(1)(x)]))),
        "scale",
        "kept",
        "axis_mismatch",
    ),
    "an average of which one branch is repeated": ((5, 4), average_with_a_column, None, "kept", "fan_out"),
    "a sum with a tensor of free width": (
        [(5, 4), (5, None)],
        lambda x, y: tanh(L.Add()([bn()(tanh(x)), y])),
        "scale",
        "kept",
        "unknown_size",
    ),
    "a joint with a tensor of free width": (
        [(5, 4), (5, None)],
        lambda x, y: tanh(L.Concatenate()([bn()(tanh(x)), y])),
        "scale",
        "kept",
        "unknown_size",
    ),
    # products and differences
    "a product lets no shift pass": (
        [(4,), (4,)],
        lambda x, y: L.Dense(3)(L.Multiply()([bn()(tanh(x)), tanh(y)])),
        "whole",
        "reduced",
        "nonlinear",
    ),
    "a square has no branch for a scale": (
        (6,),
        lambda x: tanh(bn()(L.Multiply()([y := L.Dense(4)(x), keep_alike(y)]))),
        "scale",
        "kept",
        "fan_out",
    ),
    "a tensor less itself takes no shift": (
        (6,),
        lambda x: tanh(bn()(L.Subtract()([y := L.Dense(4)(x), keep_alike(y)]))),
        "whole",
        "reduced",
        "fan_out",
    ),
    # a scale of 0
    "a dense layer cannot undo a 0": (*read_by(L.Dense(3)), "zero", "kept", "fan_out"),
    "an einsum cannot undo a 0": (*read_by(L.EinsumDense("abc,cd->abd", (None, 3))), "zero", "kept", "fan_out"),
    "a recurrent layer cannot undo a 0": (*read_by(L.LSTM(3)), "zero", "kept", "fan_out"),
    "an attention cannot undo a 0": (
        *read_by(lambda y: L.MultiHeadAttention(2, 3)(y, y)),
        "zero",
        "kept",
        "fan_out",
    ),
    "a source cannot undo a 0": (
        *read_by(lambda y: L.BatchNormalization(name="other")(L.Activation("relu")(y))),
        "zero",
        "kept",
        "fan_out",
    ),
    "a product cannot undo a 0": ((5, 4), product_beside, "zero", "kept", "fan_out"),
    "a product cannot divide by 0": ((5, 4), product_of_both, "zero", "kept", "fan_out"),
    "a sum cannot share a 0": (
        [(4,), (4,)],
        lambda x, y: L.Dense(3)(L.Add()([bn()(tanh(x)), L.Dense(4)(y)])),
        "zero",
        "kept",
        "not_invertible",
    ),
    "a layer joined to a 0 cannot share it": (
        [(5, 4), (5, 4)],
        lambda x, y: L.Dense(3)(L.Concatenate(axis=1)([bn()(tanh(x)), L.Dense(4)(y)])),
        "zero",
        "kept",
        "not_invertible",
    ),
    "a source joined to a 0 cannot share it": (
        [(5, 4), (5, 4)],
        lambda x, y: L.Dense(3)(L.Concatenate(axis=1)([bn()(tanh(x)), bn("other")(tanh(y))])),
        "zero",
        "kept",
        "not_invertible",
    ),
    "padding cannot undo a 0": (
        (5, 4),
        lambda x: L.Conv1D(3, 2)(L.ZeroPadding1D(1)(bn()(tanh(x)))),
        "zero",
        "kept",
        "padded_shift",
    ),
    "a 0 lets no shift back past it": (
        (6,),
        lambda x: tanh(bn()(L.Activation("relu")(L.Dense(4)(x)))),
        "zero and shift",
        "reduced",
        "not_invertible",
    ),
    # padding
    "padding of a shift that differs": (
        (5, 4),
        lambda x: L.Conv1D(3, 3, padding="same")(bn()(tanh(x))),
        "whole",
        "reduced",
        "padded_shift",
    ),
    "causal padding that strides leave uneven": (
        (8, 4),
        lambda x: L.Conv1D(3, 2, strides=2, padding="causal")(bn()(tanh(x))),
        "whole",
        "reduced",
        "padded_shift",
    ),
    "padding of a length that is not known": (
        (None, 4),
        lambda x: L.Conv1D(3, 2, strides=2, padding="same")(uniform(tanh(x))),
        None,
        "reduced",
        "padded_shift",
    ),
    "padding of every step": (
        (5, 6, 4),
        lambda x: L.TimeDistributed(L.Conv1D(3, 3, padding="same"))(uniform(tanh(x))),
        None,
        "reduced",
        "padded_shift",
    ),
    "a padding layer of every step": (
        (5, 6, 4),
        lambda x: L.TimeDistributed(L.Conv1D(3, 3))(L.TimeDistributed(L.ZeroPadding1D(1))(uniform(tanh(x)))),
        None,
        "reduced",
        "padded_shift",
    ),
    "a padding layer that is called twice": ((5, 4), padded_twice, None, "reduced", "padded_shift"),
    "padding that an earlier fold has filled": ((5, 4), affine_then_uniform, "scale", "kept", "padded_shift"),
    "a transposed window that misses a shift": (
        (5, 4),
        lambda x: L.Conv1DTranspose(3, 3)(bn()(tanh(x))),
        "whole",
        "reduced",
        "padded_shift",
    ),
    # layers that take nothing on one side
    "a recurrent layer takes nothing behind": (
        (5, 4),
        lambda x: L.Softmax()(bn()(L.LSTM(4)(x))),
        "whole",
        "kept",
        "no_sink",
    ),
    "a norm takes nothing in front": (
        (5, 4),
        lambda x: tanh(L.LayerNormalization()(bn()(L.Softmax()(x)))),
        "whole",
        "kept",
        "no_sink",
    ),
    # constants in the graph
    "a constant that widens its tensor": (
        (1,),
        lambda x: L.Dense(3)(keras.ops.add(tanh(x), np.ones(6, np.float32))),
        None,
        "kept",
        "unsupported_option",
    ),
    "a constant that varies along two axes": (
        (3, 4),
        lambda x: L.Dense(3)(tanh(x) + np.arange(12, dtype=np.float32).reshape(3, 4)),
        None,
        "kept",
        "unsupported_option",
    ),
    "a constant on a tensor of free width": (
        (5, None),
        lambda x: tanh(tanh(x) * 2.0),
        None,
        "kept",
        "unknown_size",
    ),
    "a normalization of free width": (
        (5, None),
        lambda x: tanh(L.Normalization(axis=None, mean=0.5, variance=2.0)(tanh(x))),
        None,
        "kept",
        "unknown_size",
    ),
    "one number turned onto a free axis": (
        (None, 4),
        lambda x: tanh(L.MaxPooling1D(2, data_format="channels_last")(L.Permute((2, 1))(uniform(tanh(x))))),
        None,
        "kept",
        "axis_mismatch",
    ),
}


def of_row(row):
    shapes, build, kind, outcome, code = ROWS[row]
    model = net(shapes, build, **({"n": kind} if kind else {}))
    return model, outcome, code


@pytest.mark.parametrize("row", ROWS)
def test_guard_decides(row):
    model, outcome, code = of_row(row)
    plan = planner.plan(graph.trace(model))
    found = next((d for d in plan.decisions if d.layer == "n"), plan.decisions[0])
    assert (found.outcome, found.code) == (outcome, code), found.reason


# ------------------------------------------------------------------------------------------- another source's part


def test_a_source_that_the_user_keeps_takes_nothing_in():
    model = net((4,), lambda x: tanh(bn("kept")(bn()(tanh(x)))), n="whole", kept="whole")
    assert decisions(model)["n"].into == ("kept",)
    assert decisions(model, keep=["kept"])["n"].outcome == "kept"


def test_a_source_of_which_the_proof_failed_takes_nothing_in():
    model = net((4,), lambda x: tanh(bn("bad")(bn()(tanh(x)))), n="whole", bad="whole")
    assert decisions(model, refused={"bad": Refusal("proof_failed", "")})["n"].outcome == "kept"


def test_a_source_that_is_no_fixed_map_takes_nothing_in():
    model = net((4,), lambda x: tanh(bn("moving")(bn()(tanh(x)), training=True)), n="whole", moving="whole")
    assert {d.outcome for d in decisions(model).values()} == {"kept"}


def test_a_source_along_another_axis_takes_nothing_in():
    model = net((4, 4), lambda x: tanh(bn("other")(bn(axis=1)(tanh(x)))), n="whole", other="whole")
    assert {d.outcome for d in decisions(model).values()} == {"kept"}


def test_a_source_cannot_undo_a_zero_of_its_neighbour():
    def build(x):
        y = L.Dense(4)(x)
        return tanh(bn()(y)), tanh(bn("other")(y))

    model = net((4,), build, n="zero", other="whole")
    found = decisions(model)
    assert (found["n"].outcome, found["other"].outcome) == ("kept", "fused")
    assert fuse(model, samples=inputs_for(model)).proof.holds


# -------------------------------------------------------------------------------------------------- the search


def test_a_search_has_an_end(monkeypatch):
    monkeypatch.setattr(planner, "SEARCH_LIMIT", 5)
    monkeypatch.setattr(planner, "NEAR", 5)
    layers = [L.Dense(4), *[L.Dropout(0.1) for _ in range(9)], bn(), L.Activation("tanh")]
    assert decisions(chain((4,), *layers))["n"].code == "search_limit"


def test_a_way_that_ends_halfway_leaves_nothing_behind():
    model = net((4,), lambda x: tanh(bn()(L.Activation("relu")(L.Dense(4)(x)))), n="whole")
    found = planner.plan(graph.trace(model))
    assert [d.outcome for d in found.decisions] == ["reduced"]
    _, left = found.affines["n"]
    assert (left.scale == 1).all()
    assert left.shift.any()
    assert fuse(model, samples=inputs_for(model)).proof.holds


def ladder(rungs):
    """A residual stream whose sums each leave a choice, of which the second is right: the stream takes the shift."""
    x = keras.Input((4,), name="x")
    y = L.Dense(4)(x)
    for _ in range(rungs):
        y = L.Add()([y, tanh(L.Dense(4)(y))])
    return keras.Model(x, tanh(y + np.arange(4, dtype=np.float32)))


@pytest.fixture
def shallow():
    """Just enough recursion for this test, so that a deep net shows without being built."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    yield
    sys.setrecursionlimit(limit)


def test_a_long_stream_is_no_recursion_error(request):
    found = graph.trace(ladder(70))
    request.getfixturevalue("shallow")
    assert [d.outcome for d in planner.plan(found).decisions] == ["fused"]


# --------------------------------------------------------------------------------------- what a round found unfit


def planned(outcome):
    return Plan((Decision("n", "BatchNormalization", outcome, None, (), (), "folded", ""),), ())


@pytest.mark.parametrize(
    ("outcome", "code", "again"),
    [("fused", "conditioning", {"n"}), ("reduced", "conditioning", set()), ("fused", "overflow", set())],
)
def test_what_costs_accuracy_may_leave_in_part_once(outcome, code, again):
    before = Refused({}, frozenset({"n"} if outcome == "reduced" else ()))
    assert before.with_({"n": Refusal(code, "")}, planned(outcome)).reducible == again


def test_all_are_at_fault_where_none_is_found(monkeypatch):
    monkeypatch.setattr(fusing, "blame", lambda *given: [])
    right = applier.rewritten
    monkeypatch.setattr(
        applier, "rewritten", lambda layer, edits: {k: v * (2 if edits else 1) for k, v in right(layer, edits).items()}
    )
    model = net((4,), lambda x: tanh(bn()(L.Dense(4)(x))), n="whole")
    result = fuse(model, samples=inputs_for(model))
    assert [d.code for d in result.decisions] == ["proof_failed"]
    assert result.proof.holds


def test_a_rebuilt_model_that_differs_with_nothing_fused_is_an_error(monkeypatch):
    monkeypatch.setattr(proof.Proof, "holds", property(lambda self: False))
    model = chain((4,), L.Dense(3))
    with pytest.raises(ProofError, match="nothing fused"):
        fuse(model, samples=inputs_for(model))


def test_a_model_of_which_nothing_was_fused_is_not_called_worse(monkeypatch):
    monkeypatch.setattr(fusing, "_rounding_limit", lambda ref: -1.0)
    model = chain((4,), L.Dense(3))
    assert fuse(model, samples=inputs_for(model)).decisions == ()


def test_nothing_compared_is_no_evidence():
    nothing = proof.Reference({}, 1, ("y",), (np.ones((2, 2)),), (False,), 0.0, ())
    assert nothing.error([np.ones((2, 2))]) == math.inf


def test_reasons_have_a_code_of_the_table():
    with pytest.raises(ValueError, match="unknown reason code"):
        Refusal("because", "")


def test_a_channel_of_weight_zero_does_not_vanish():
    model = net((4,), lambda x: tanh(bn()(L.Dense(4, use_bias=False)(x))), n="zero")
    assert [d.outcome for d in fuse(model, prove=False).decisions] == ["fused"]


def test_a_constraint_that_holds_stays():
    model = net((4,), lambda x: tanh(bn()(L.Dense(4, kernel_constraint="max_norm", name="d")(x))), n="scale")
    kernel = model.get_layer("d").kernel
    kernel.assign(graph.numpy(kernel) * 0.1)
    result = fuse(model, prove=False)
    assert result.model.get_layer("d").kernel_constraint is not None
    assert result.notices == ()


# --------------------------------------------------------------------------------------------- building it again


def test_weights_that_are_missing_are_no_weights_of_zero(monkeypatch):
    right = applier.rewritten
    monkeypatch.setattr(
        applier, "rewritten", lambda layer, edits: {k: v for k, v in right(layer, edits).items() if k != "bias"}
    )
    model = net((4,), lambda x: tanh(bn()(L.Dense(4)(x))), n="whole")
    with pytest.raises(UnsupportedModelError, match="other weights"):
        fuse(model, prove=False)


@keras.saving.register_keras_serializable("tests")
class Forgets(L.Dense):
    def get_config(self):
        return {**super().get_config(), "use_bias": False}


def test_a_layer_whose_copy_has_other_weights_is_refused():
    with pytest.raises(UnsupportedModelError, match="other weights"):
        graph.canonical(chain((4,), Forgets(3)))


def test_a_pad_in_front_of_one_layer_is_not_seen_by_the_next():
    def build(x):
        y = uniform(tanh(x))
        return L.Conv1D(3, 3, padding="same")(y), L.Conv1D(3, 2, padding="valid")(y)

    model = net((6, 4), build)
    result = fuse(model, samples=inputs_for(model))
    assert [d.outcome for d in result.decisions] == ["fused"]
    assert result.proof.holds


def test_an_output_layer_that_is_called_twice_keeps_its_activation():
    dense = L.Dense(4, activation="softmax")
    model = net((4,), lambda x: dense(dense(x)))
    inputs = inputs_for(model)
    double = graph.replay(graph.trace(model), dtype="float64", logits=True)
    np.testing.assert_allclose(graph.run(double, inputs)[0], graph.run(model, inputs)[0], rtol=1e-5)


DOUBLES = {
    "a resizing that crops": ((8, 6, 3), lambda: L.Resizing(5, 5, crop_to_aspect_ratio=True)),
    "an upsampling of free size": ((None, None, 3), lambda: L.UpSampling2D(2, interpolation="bilinear")),
    "an upsampling": ((5, 6, 3), lambda: L.UpSampling2D(2, interpolation="bicubic")),
    "a pool over cubes": ((5, 6, 7, 2), lambda: L.AveragePooling3D(2, padding="same")),
}


@pytest.mark.parametrize("row", DOUBLES)
def test_the_double_stands_in_for_what_it_is(row):
    shape, make = DOUBLES[row]
    model = chain(shape, make())
    inputs = inputs_for(model, 2)
    double = graph.run(graph.replay(graph.trace(model), dtype="float64"), inputs)[0]
    np.testing.assert_allclose(double, graph.run(model, inputs)[0], rtol=1e-4, atol=1e-4)


def test_a_pool_over_cubes_of_free_size_has_no_stand_in_and_is_built_all_the_same():
    model = chain((None, None, None, 2), L.MaxPooling3D(2, name="pool"))
    double = graph.replay(graph.trace(model), dtype="float64")
    assert type(double.get_layer("pool")) is L.MaxPooling3D


@pytest.mark.filterwarnings("ignore:Layer 'inner'")  # Keras', about the mask that the test is about
def test_a_nested_model_that_is_given_a_mask_stays_whole():
    start = keras.Input((5, 4))
    inner = keras.Model(start, bn()(L.Dense(4)(start)), name="inner")
    x, m = keras.Input((5, 4), name="x"), keras.Input((5,), dtype="bool", name="m")
    found = graph.trace(keras.Model([x, m], inner(x, mask=m)))
    assert [node.name for node in found.nodes] == ["inner"]


def test_a_nested_model_hands_its_training_mode_down():
    inner = keras.Sequential([keras.Input((4,)), L.Dense(4), bn()], name="inner")
    model = net((4,), lambda x: tanh(inner(x, training=True)))
    assert decisions(model)["n"].code == "training_mode"


@pytest.mark.parametrize(("inner", "outer", "mode"), [(True, False, False), (False, True, True), (True, None, True)])
def test_of_two_modes_the_outer_call_wins_as_it_does_in_keras(inner, outer, mode):
    norm, start, x = bn("n"), keras.Input((4,)), keras.Input((4,))
    body = keras.Model(start, norm(start, training=inner))
    model = keras.Model(x, body(x, training=outer))
    values = np.random.default_rng(0).normal(3, 2, (8, 4)).astype("float32")
    by_batch = not np.allclose(model(values)[:1], model(values[:1]), atol=1e-3)
    assert by_batch is mode
    assert [node.training for node in graph.trace(model).nodes] == [mode]


def test_a_model_cut_out_of_another_has_its_own_calls_only():
    x = keras.Input((4,), name="x")
    middle = L.Dense(4, name="before")(x)
    whole = keras.Model(x, tanh(bn()(L.Dense(4, name="inside")(middle))))
    part = keras.Model(middle, whole.output)
    assert "before" not in [node.name for node in graph.trace(part).nodes]


def test_a_call_that_several_read_is_one_call():
    model = net((4,), lambda x: L.Add()([L.ReLU()(y := L.Dense(4)(x)), tanh(y)]))
    assert len(graph.trace(model).nodes) == 4


def test_a_layer_of_another_model_too_has_one_call_here():
    dense = L.Dense(4)
    other = keras.Model(y := keras.Input((4,)), tanh(dense(y)))
    model = net((4,), lambda x: tanh(bn()(dense(x))), n="whole")
    assert len(other.layers) == 3
    assert decisions(model)["n"].outcome == "fused"


def test_a_long_chain_is_built_again(request):
    found = graph.trace(chain((4,), *[L.ReLU() for _ in range(150)]))
    request.getfixturevalue("shallow")
    assert len(graph.replay(found).layers) == 151
    assert apply(found, Plan((), ())).losses == {}
