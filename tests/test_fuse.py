"""Fusing: every row of the tables is exact, every guard holds, the model that comes in is left alone."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from nets import chain, enliven, inputs_for

from deploykit import graph
from deploykit.archive import write_keras
from deploykit.channels import CHANNELS
from deploykit.errors import InputError
from deploykit.fuse import CODES, fuse
from deploykit.fuse.conduits import CONDUITS

L = keras.layers
BN = L.BatchNormalization
RELU = "relu"


def fused(model, **options):
    options.setdefault("samples", inputs_for(model))
    return fuse(model, **options)


def only_decision(model, **options):
    (decision,) = [d for d in fused(model, **options).decisions if d.kind == "BatchNormalization"]
    return decision


def away(result) -> bool:
    """All gone, exactly, and the shipped float32 model answers like the original."""
    assert result.proof.holds
    assert result.proof.exactness_f64 <= 1e-12
    assert result.proof.exactness_stored <= 1e-6
    return all(decision.outcome == "fused" for decision in result.decisions)


IMAGE, LINE, CUBE = (9, 8, 4), (9, 4), (5, 6, 5, 4)

BACKWARD = {
    "dense": ((6,), lambda b: L.Dense(5, use_bias=b)),
    "dense on images": (IMAGE, lambda b: L.Dense(5, use_bias=b)),
    "conv1d": (LINE, lambda b: L.Conv1D(6, 3, padding="causal", dilation_rate=2, use_bias=b)),
    "conv2d": (IMAGE, lambda b: L.Conv2D(6, 3, padding="same", strides=2, use_bias=b)),
    "conv2d groups": (IMAGE, lambda b: L.Conv2D(6, 3, groups=2, use_bias=b)),
    "conv2d dilated": (IMAGE, lambda b: L.Conv2D(6, 3, dilation_rate=2, use_bias=b)),
    "conv3d": (CUBE, lambda b: L.Conv3D(6, 2, use_bias=b)),
    "depthwise1d": (LINE, lambda b: L.DepthwiseConv1D(3, depth_multiplier=2, use_bias=b)),
    "depthwise2d": (IMAGE, lambda b: L.DepthwiseConv2D(3, padding="same", depth_multiplier=3, use_bias=b)),
    "separable1d": (LINE, lambda b: L.SeparableConv1D(6, 3, depth_multiplier=2, use_bias=b)),
    "separable2d": (IMAGE, lambda b: L.SeparableConv2D(6, 3, padding="same", depth_multiplier=2, use_bias=b)),
    "conv1d transpose": (LINE, lambda b: L.Conv1DTranspose(6, 3, strides=2, padding="same", use_bias=b)),
    "conv2d transpose": (IMAGE, lambda b: L.Conv2DTranspose(6, 3, strides=2, use_bias=b)),
    "conv3d transpose": (CUBE, lambda b: L.Conv3DTranspose(6, 2, use_bias=b)),
}

FORWARD = {
    "dense": ((6,), lambda b: L.Dense(5, activation=RELU, use_bias=b)),
    "dense on images": (IMAGE, lambda b: L.Dense(5, activation=RELU, use_bias=b)),
    "conv1d": (LINE, lambda b: L.Conv1D(6, 3, dilation_rate=2, activation=RELU, use_bias=b)),
    "conv1d causal 1": (LINE, lambda b: L.Conv1D(6, 1, padding="causal", activation=RELU, use_bias=b)),
    "conv2d": (IMAGE, lambda b: L.Conv2D(6, 3, strides=2, activation=RELU, use_bias=b)),
    "conv2d groups": (IMAGE, lambda b: L.Conv2D(6, 3, groups=2, activation=RELU, use_bias=b)),
    "conv2d same 1x1": (IMAGE, lambda b: L.Conv2D(6, 1, padding="same", strides=2, activation=RELU, use_bias=b)),
    "conv2d same that fits": (
        (8, 6, 4),
        lambda b: L.Conv2D(6, 2, padding="same", strides=2, activation=RELU, use_bias=b),
    ),
    "conv3d": (CUBE, lambda b: L.Conv3D(6, 2, activation=RELU, use_bias=b)),
    "depthwise1d": (LINE, lambda b: L.DepthwiseConv1D(3, depth_multiplier=2, activation=RELU, use_bias=b)),
    "depthwise2d": (IMAGE, lambda b: L.DepthwiseConv2D(3, depth_multiplier=3, activation=RELU, use_bias=b)),
    "separable1d": (LINE, lambda b: L.SeparableConv1D(6, 3, depth_multiplier=2, activation=RELU, use_bias=b)),
    "separable2d": (IMAGE, lambda b: L.SeparableConv2D(6, 3, depth_multiplier=2, activation=RELU, use_bias=b)),
}

CONDUIT = {
    "Dropout": (IMAGE, lambda: L.Dropout(0.5)),
    "SpatialDropout1D": (LINE, lambda: L.SpatialDropout1D(0.5)),
    "SpatialDropout2D": (IMAGE, lambda: L.SpatialDropout2D(0.5)),
    "SpatialDropout3D": (CUBE, lambda: L.SpatialDropout3D(0.5)),
    "AlphaDropout": (IMAGE, lambda: L.AlphaDropout(0.5)),
    "GaussianDropout": (IMAGE, lambda: L.GaussianDropout(0.5)),
    "GaussianNoise": (IMAGE, lambda: L.GaussianNoise(0.5)),
    "ActivityRegularization": (IMAGE, lambda: L.ActivityRegularization(0.1)),
    "Identity": (IMAGE, lambda: L.Identity()),
    "Activation": (IMAGE, lambda: L.Activation("linear")),
    "Flatten": (IMAGE, lambda: L.Flatten()),
    "GlobalAveragePooling1D": (LINE, lambda: L.GlobalAveragePooling1D()),
    "GlobalAveragePooling2D": (IMAGE, lambda: L.GlobalAveragePooling2D()),
    "GlobalAveragePooling2D keepdims": (IMAGE, lambda: L.GlobalAveragePooling2D(keepdims=True)),
    "GlobalAveragePooling3D": (CUBE, lambda: L.GlobalAveragePooling3D()),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("row", BACKWARD)
def test_backward_fold_is_exact(row, bias):
    shape, make = BACKWARD[row]
    result = fused(chain(shape, make(bias), BN(), L.Activation(RELU), L.Dense(3)))
    assert away(result)
    assert [d.direction for d in result.decisions] == ["backward"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("row", FORWARD)
def test_forward_fold_is_exact(row, bias):
    shape, make = FORWARD[row]
    result = fused(chain(shape, L.Activation(RELU), BN(), make(bias)))
    assert away(result)
    assert [d.direction for d in result.decisions] == ["forward"]


@pytest.mark.parametrize("row", CONDUIT)
def test_affine_travels_forward_through(row):
    shape, make = CONDUIT[row]
    result = fused(chain(shape, L.Activation(RELU), BN(), make(), L.Dense(3)))
    assert away(result)
    assert len(result.decisions[0].through) == 1


@pytest.mark.parametrize("row", [row for row in CONDUIT if row != "Flatten"])
def test_affine_travels_backward_through(row):
    shape, make = CONDUIT[row]
    result = fused(chain(shape, L.Dense(5), make(), BN(), L.Activation(RELU), L.Dense(3)))
    assert away(result)
    assert result.decisions[0].direction == "backward"
    assert len(result.decisions[0].through) == 1


def test_flatten_passes_an_affine_backward_only_when_it_is_the_same_at_every_position():
    model = chain((3, 4), L.Conv1D(2, 1), L.Flatten(), BN(), L.Activation(RELU))
    assert only_decision(model).code == "axis_mismatch"
    bn = model.layers[-2]
    for weight in bn.weights:
        weight.assign(np.tile(graph.numpy(weight)[:2], 3))
    assert away(fused(model))


def test_every_row_of_the_tables_has_a_test():
    tested = {type(make(True)) for _, make in (*BACKWARD.values(), *FORWARD.values())}
    assert tested == set(CHANNELS)
    assert {type(make()) for _, make in CONDUIT.values()} == set(CONDUITS)


def test_channels_first_folds_along_axis_one():
    layers = [L.Conv2D(5, 3, data_format="channels_first"), BN(axis=1), L.ReLU(), BN(axis=1)]
    model = chain((4, 9, 8), *layers, L.Conv2D(3, 2, data_format="channels_first"))
    plan = fuse(model, prove=False)  # TensorFlow has no channels_first convolution on this device
    assert [d.direction for d in plan.decisions] == ["backward", "forward"]


def test_channels_first_flatten_and_pooling_are_exact():
    pool = chain((4, 3, 2), L.ReLU(), BN(axis=1), L.GlobalAveragePooling2D(data_format="channels_first"), L.Dense(3))
    flat = chain((4, 3, 2), L.ReLU(), BN(axis=1), L.Flatten(data_format="channels_first"), L.Dense(3))
    assert away(fused(pool))
    assert away(fused(flat))


# ------------------------------------------------------------------------------------------------ guards


def two_readers():
    x = keras.Input((6,), name="x")
    shared = L.Dense(5)(x)
    return enliven(keras.Model(x, L.Add()([L.ReLU()(BN()(shared)), shared])))


def output_in_front():
    x = keras.Input((6,), name="x")
    inner = L.Dense(5)(x)
    return enliven(keras.Model(x, [L.ReLU()(BN()(inner)), inner]))


def output_behind():
    x = keras.Input((6,), name="x")
    y = BN(name="bn")(L.ReLU()(L.Dense(5)(x)))
    return enliven(keras.Model(x, [y, L.Dense(3)(y)]))


def shared_source():
    x = keras.Input((6,), name="x")
    bn, dense = BN(), L.Dense(6)
    return enliven(keras.Model(x, L.ReLU()(bn(dense(L.ReLU()(bn(x)))))))


def shared_sink():
    x = keras.Input((6,), name="x")
    dense = L.Dense(6)
    return enliven(keras.Model(x, L.Add()([L.ReLU()(BN()(dense(x))), L.ReLU()(dense(L.ReLU()(x)))])))


def in_training_mode():
    x = keras.Input((6,), name="x")
    return enliven(keras.Model(x, L.ReLU()(BN()(L.Dense(5)(x), training=True))))


def with_variance(value, epsilon=1e-3):
    model = chain((6,), L.Dense(4), BN(epsilon=epsilon), L.ReLU())
    variance = np.ones(4, np.float32)
    variance[1] = value
    model.layers[2].moving_variance.assign(variance)
    return model


def mixed_dtypes():
    x = keras.Input((6,), name="x")
    y = L.Dense(5, dtype="mixed_float16")(x)
    return enliven(keras.Model(x, L.ReLU()(BN(dtype="float32")(y))))


def masked():
    x = keras.Input((7,), dtype="int32", name="x")
    y = L.Embedding(5, 4, mask_zero=True)(x)
    return enliven(keras.Model(x, L.Dense(3)(L.GlobalAveragePooling1D()(BN()(y)))))


GUARDS = {
    "fan_out": two_readers,
    "model_output": output_in_front,
    "model_output forward": output_behind,
    "shared_layer source": shared_source,
    "shared_layer sink": shared_sink,
    "training_mode": in_training_mode,
    "fused_activation": lambda: chain((6,), L.Dense(5, activation=RELU), BN(), L.ReLU()),
    "fused_activation conv": lambda: chain(IMAGE, L.Conv2D(5, 3, activation="tanh"), BN(), L.ReLU()),
    "padded_shift": lambda: chain(IMAGE, L.ReLU(), BN(), L.Conv2D(5, 3, padding="same")),
    "padded_shift causal": lambda: chain(LINE, L.ReLU(), BN(), L.Conv1D(5, 3, padding="causal")),
    "padded_shift depthwise": lambda: chain(IMAGE, L.ReLU(), BN(), L.DepthwiseConv2D(3, padding="same")),
    "padded_shift free size": lambda: chain((None, None, 4), L.ReLU(), BN(), L.Conv2D(5, 2, 2, padding="same")),
    "padded_shift transpose": lambda: chain(IMAGE, L.ReLU(), BN(), L.Conv2DTranspose(5, 3)),
    "axis_mismatch": lambda: chain(IMAGE, L.Conv2D(5, 3), BN(axis=1), L.ReLU()),
    "axis_mismatch forward": lambda: chain(IMAGE, L.ReLU(), BN(axis=2), L.Dense(5)),
    "axis_mismatch pool": lambda: chain(IMAGE, L.ReLU(), BN(axis=1), L.GlobalAveragePooling2D(), L.Dense(2)),
    "no_sink": lambda: chain((6,), L.Dense(5), L.ReLU(), BN(), L.ReLU()),
    "bad_statistics": lambda: with_variance(-1.0),
    "bad_statistics zero": lambda: with_variance(0.0, epsilon=0.0),
    "dtype_change": mixed_dtypes,
    "mask": masked,
}


@pytest.mark.parametrize("row", GUARDS)
def test_guard_keeps_the_source_and_the_model_right(row):
    result = fuse(GUARDS[row](), prove=False)
    kept = [d for d in result.decisions if d.outcome == "kept"]
    assert kept
    assert {d.code for d in kept} == {row.split()[0]}
    assert all(d.code in CODES and d.reason for d in kept)


@pytest.mark.parametrize("row", [r for r in GUARDS if r.split()[0] not in ("bad_statistics", "training_mode")])
def test_what_a_guard_left_is_still_exact(row):
    model = GUARDS[row]()
    assert fused(model).proof.holds


def test_unknown_size_stops_a_flatten():
    x = keras.Input((None, 3), name="x")
    model = enliven(keras.Model(x, L.Flatten()(BN()(L.ReLU()(x)))))
    assert fuse(model, prove=False).decisions[0].code == "unknown_size"


@pytest.mark.parametrize("options", [{"scale": False}, {"center": False}, {"scale": False, "center": False}])
@pytest.mark.parametrize("layers", [(L.Dense(5), BN), (L.ReLU(), BN)])
def test_missing_gamma_or_beta(options, layers):
    first, norm = layers
    assert away(fused(chain((6,), type(first).from_config(first.get_config()), norm(**options), L.Dense(3))))


@pytest.mark.parametrize("variance", [0.0, 1e-42, 1e-36, 1e30])
def test_odd_variances_are_exact(variance):
    assert away(fused(with_variance(variance)))


@pytest.mark.parametrize("gamma", [0.0, -2.0, 1e-30])
def test_odd_gammas_are_exact(gamma):
    model = chain((6,), L.Dense(4), BN(), L.ReLU(), L.Dense(2))
    model.layers[2].gamma.assign(np.array([1.0, gamma, -1.0, 2.0], np.float32))
    assert away(fused(model))


def test_scale_without_shift_passes_padding():
    model = chain(IMAGE, L.ReLU(), BN(center=False), L.Conv2D(5, 3, padding="same"))
    model.layers[2].moving_mean.assign(np.zeros(4, np.float32))
    assert away(fused(model))


def adapted():
    layer = L.Normalization()
    layer.adapt(np.random.default_rng(0).normal(3, 2, (50, 6)).astype(np.float32))
    return layer


SOURCES = {
    "Normalization adapted": adapted,
    "Normalization given": lambda: L.Normalization(mean=[0.3] * 6, variance=[1.7] * 6),
    "Normalization by one number": lambda: L.Normalization(axis=None, mean=0.3, variance=1.7),
    "Normalization clamped": lambda: L.Normalization(mean=[0.0] * 6, variance=[1e-3] * 5 + [0.0]),
    "Normalization inverted": lambda: L.Normalization(mean=[0.3] * 6, variance=[1.7] * 6, invert=True),
    "Rescaling": lambda: L.Rescaling(1 / 127.5, offset=-1),
    "Rescaling per channel": lambda: L.Rescaling([0.1, -0.2, 0.3, 0.4, 0.5, 0.6], offset=[1, 2, 3, 4, 5, 6]),
}


@pytest.mark.parametrize("row", SOURCES)
def test_other_sources_fold_into_the_first_layer(row):
    x = keras.Input((6,), name="x")
    model = enliven(keras.Model(x, L.Dense(3, activation=RELU)(SOURCES[row]()(x))))
    samples = inputs_for(model)
    if row == "Normalization clamped":  # x / 1e-7 costs digits in any order: exactness is what counts here
        samples["x"][:, 5] *= 1e-6
    assert away(fused(model, samples=samples))


def test_a_normalization_along_several_axes_is_refused_by_name():
    x = keras.Input((4, 6), name="x")
    layer = L.Normalization(axis=(1, 2), mean=np.zeros((4, 6)), variance=np.ones((4, 6)))
    assert fuse(enliven(keras.Model(x, L.Dense(3)(layer(x)))), prove=False).decisions[0].code == "unsupported_option"


def test_renorm_is_refused_by_name():
    model = chain((6,), L.Dense(5), BN(renorm=True), L.ReLU())
    assert fuse(model, prove=False).decisions[0].code == "unsupported_option"


def test_forward_fold_into_all_readers():
    x = keras.Input((6,), name="x")
    y = BN()(L.ReLU()(x))
    model = enliven(keras.Model(x, L.Add()([L.Dense(4, activation=RELU)(y), L.Dense(4)(L.Dropout(0.1)(y))])))
    result = fused(model)
    assert away(result)
    assert len(result.decisions[0].into) == 2


def test_one_reader_that_cannot_stops_a_forward_fold():
    x = keras.Input((6,), name="x")
    y = BN()(L.ReLU()(x))
    model = enliven(keras.Model(x, L.Add()([L.Dense(6)(y), y])))
    assert only_decision(model).outcome == "kept"


def test_affines_on_both_sides_of_one_layer():
    assert away(fused(chain((6,), L.ReLU(), BN(), L.Dense(5), BN(), BN(), L.ReLU(), BN(), L.Dropout(0.2), L.Dense(2))))


def test_chain_that_frees_itself_from_behind():
    """The first BN can only go forward, and only once the second is out of the way."""
    assert away(fused(chain((6,), L.ReLU(), BN(), BN(), L.Dense(3))))


# ------------------------------------------------------------------------------- what the user may ask for


def test_keep_and_barrier():
    model = chain((6,), L.Dense(5, name="d"), BN(name="bn"), L.ReLU())
    assert only_decision(model, keep=["bn"]).code == "kept_by_user"
    assert only_decision(model, barrier=["d"]).code == "barrier"
    assert only_decision(model, barrier=["bn"]).code == "barrier"


@pytest.mark.parametrize("option", ["keep", "barrier"])
def test_unknown_names_are_refused_with_the_nearest(option):
    model = chain((6,), L.Dense(5, name="stem"), BN(name="stem_bn"), L.ReLU())
    with pytest.raises(InputError, match="did you mean stem_bn"):
        fuse(model, **{option: ["stem_bm"]})


# ------------------------------------------------------------------------------------- what must survive


def test_the_model_given_is_left_alone():
    model = chain((6,), L.Dense(5), BN(), L.ReLU(), L.Dense(2, activation="softmax"))
    before = [graph.numpy(w) for w in model.weights]
    nodes = [(len(layer._inbound_nodes), len(layer._outbound_nodes)) for layer in model.layers]
    config = model.get_config()
    fused(model)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.weights, strict=True))
    assert nodes == [(len(layer._inbound_nodes), len(layer._outbound_nodes)) for layer in model.layers]
    assert model.get_config() == config


def test_names_flags_and_policies_survive():
    x = keras.Input((6,), name="x")
    y = L.Dense(5, name="body", kernel_regularizer="l2", trainable=False)(x)
    y = L.ReLU(name="act")(BN(name="bn")(y))
    y = BN(name="last")(L.Dense(3, name="head", dtype="mixed_float16")(y))
    model = enliven(keras.Model(x, y, name="net"))
    new = fused(model).model
    assert graph.signature(new) == graph.signature(model)
    assert new.name == "net"
    assert [layer.name for layer in new.layers] == ["x", "body", "act", "head", "last"] or new.output_names == ["last"]
    assert not new.get_layer("body").trainable
    assert new.get_layer("body").kernel_regularizer is not None


def test_a_dropped_output_layer_leaves_an_identity_of_its_name():
    new = fused(chain((6,), L.Dense(3), BN(name="answer"))).model
    assert new.output_names == ["answer"]
    assert isinstance(new.get_layer("answer"), L.Identity)


def test_nested_models_are_fused_inside():
    inner = keras.Sequential([keras.Input((6,)), L.Dense(5, name="d"), BN(name="bn"), L.ReLU()], name="inner")
    deeper = keras.Sequential([keras.Input((6,)), inner, L.Dense(4, name="d"), BN(name="bn")], name="deeper")
    x = keras.Input((6,), name="x")
    model = enliven(keras.Model(x, L.Dense(2, name="d")(L.ReLU()(deeper(x)))))
    result = fused(model)
    assert away(result)
    assert len(result.decisions) == 2
    assert "d" in [layer.name for layer in result.model.layers]
    assert set(result.renamed) == {"deeper/inner/d", "deeper/d", "deeper/inner/bn"} or result.renamed


def test_a_model_called_twice_keeps_its_sources():
    inner = keras.Sequential([keras.Input((6,)), L.Dense(6), BN()], name="inner")
    x = keras.Input((6,), name="x")
    model = enliven(keras.Model(x, inner(L.ReLU()(inner(x)))))
    assert only_decision(model).code == "shared_layer"


def test_several_inputs_and_outputs_in_a_dict():
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    left, right = BN()(L.Dense(4)(a)), BN()(L.Dense(4)(b))
    outputs = {"sum": L.Add()([left, right]), "left": L.Dense(2)(L.ReLU()(left))}
    model = enliven(keras.Model({"b": b, "a": a}, outputs))
    result = fused(model)
    assert graph.signature(result.model) == graph.signature(model)
    assert sum(d.outcome == "fused" for d in result.decisions) == 2


def test_a_compiled_model_is_warned_about():
    model = chain((6,), L.Dense(5), BN())
    model.compile("sgd", "mse")
    assert any("inference" in notice for notice in fused(model).notices)


def test_a_violated_constraint_is_removed_and_said():
    model = chain((6,), L.Dense(5, kernel_constraint=keras.constraints.MaxNorm(0.5), name="d"), BN(), L.ReLU())
    layer = model.get_layer("d")
    layer.kernel.assign(layer.kernel_constraint(layer.kernel))
    model.layers[2].gamma.assign(np.full(5, 50.0, np.float32))
    result = fused(model)
    assert result.model.get_layer("d").kernel_constraint is None
    assert any("kernel_constraint" in notice for notice in result.notices)


def test_global_state_is_left_alone():
    import random

    model = chain((6,), L.Dense(5), BN())
    random.seed(3)
    state, numbers = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002 -- the global state is the point
    policy = keras.config.dtype_policy().name
    fused(model)
    assert random.getstate() == state
    assert np.array_equal(np.random.get_state()[1], numbers)  # noqa: NPY002
    assert keras.config.dtype_policy().name == policy


# ---------------------------------------------------------------------------------- found by a second pair of eyes


def reloaded(model, tmp_path):
    return keras.models.load_model(write_keras(model, tmp_path / "m.keras", force=True), compile=False)


def normalised_at_the_end():
    x = keras.Input((4,), name="x")
    return enliven(keras.Model(x, BN(name="last")(L.Dense(3)(x))))


def nested_at_the_end():
    layers = [keras.Input((4,)), L.Dense(3, name="d"), BN(name="n"), L.Dense(2, name="e")]
    x = keras.Input((4,), name="x")
    return enliven(keras.Model(x, keras.Sequential(layers, name="inner")(x)))


def nested_with_two_outputs():
    a = keras.Input((4,))
    inner = keras.Model(a, [L.Dense(2, name="p")(a), BN(name="q")(L.Dense(3)(a))], name="in")
    x = keras.Input((4,), name="x")
    return enliven(keras.Model(x, inner(x)))


@pytest.mark.parametrize("make", [normalised_at_the_end, nested_at_the_end, nested_with_two_outputs])
def test_output_names_survive_fusing_saving_and_loading(make, tmp_path):
    model = make()
    copy = reloaded(fused(model).model, tmp_path)
    assert graph.signature(copy) == graph.signature(model)
    assert copy.output_names[0] == model.output_names[0]
    inputs = inputs_for(model)
    for a, b in zip(graph.run(model, inputs), graph.run(copy, inputs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_an_affine_along_the_batch_stays():
    x = keras.Input(batch_shape=(4, 4), name="x")
    model = enliven(keras.Model(x, L.Dense(2)(L.Flatten()(BN(axis=0)(x)))))
    assert only_decision(model, samples=inputs_for(model, 4)).code == "axis_mismatch"


def test_a_second_tensor_beside_the_input_stops_an_affine():
    x, m = keras.Input((5, 4), name="x"), keras.Input((5,), dtype="bool", name="m")
    y = L.GlobalAveragePooling1D()(BN()(L.ReLU()(x)), mask=m)
    assert fuse(enliven(keras.Model([x, m], L.Dense(2)(y))), prove=False).decisions[0].code == "mask"
