"""Audit: every mistake is found in a model that has just this one, and clean models have none."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from nets import enliven
from rich.console import Console
from savedgraph_files import exported

from deploykit.errors import UnsupportedModelError
from deploykit.graph import numpy, trace
from deploykit.load import load
from deploykit.load.training import Loss, Training, read
from deploykit.report.text import render
from deploykit.transfer.audit import (
    CODES,
    FAMILIES,
    ROWS,
    SHRINKS,
    Finding,
    _misfit,
    audit,
    findings,
    subject_of,
)
from deploykit.transfer.likeness import AKIN, _change, likeness

L = keras.layers
ROOT = Path(__file__).resolve().parent.parent
PIXELS = np.random.default_rng(0).uniform(0, 255, (32, 8, 8, 3)).astype("float32")

# ---------------------------------------------------------------------------------------------- models


def base(prepared=True):
    """Rescaling, twice Conv-BN-ReLU, pooling, five classes; alive."""
    image = keras.Input((8, 8, 3), name="image")
    x = L.Rescaling(1 / 255, name="prepare")(image) if prepared else image
    for place in (1, 2):
        x = L.Conv2D(4, 3, use_bias=False, name=f"conv_{place}")(x)
        x = L.ReLU(name=f"relu_{place}")(L.BatchNormalization(name=f"bn_{place}")(x))
    x = L.GlobalAveragePooling2D(name="pool")(x)
    return settled(keras.Model(image, L.Dense(5, activation="softmax", name="class")(x), name="base"))


def settled(model):
    """Alive, and the same each time."""
    rng = np.random.default_rng(4)
    for weight in model.trainable_weights:
        weight.assign(rng.normal(0, 0.5, weight.shape))
    return enliven(model, 3)


def copied(model):
    new = keras.models.clone_model(model)
    new.set_weights(model.get_weights())
    return new


def swapped(model, *, freeze=True, head=None, nested=False, front=(), **call):
    """The body of a copy of ``model`` with a new head; ``nested``: called as a model, with ``call``."""
    body = copied(model)
    body = keras.Model(body.inputs[0], body.get_layer("pool").output, name="body")
    body.trainable = not freeze
    head = head or [L.Dense(2, activation="softmax", name="shirts")]
    if nested or front:
        start = x = keras.Input((8, 8, 3), name="image")
        for layer in front:
            x = layer(x)
        x = body(x, **call)
    else:
        start, x = body.inputs[0], body.output
    for layer in head:
        x = layer(x)
    return keras.Model(start, x, name="swapped")


def chained(*layers, shape=(6,), **call):
    """Layers one after the other; ``call``: layer name -> training."""
    start = x = keras.Input(shape, name="x")
    for layer in layers:
        x = layer(x, training=call[layer.name]) if layer.name in call else layer(x)
    return enliven(keras.Model(start, x, name="net"))


def normed(training, trainable=True):
    model = chained(L.Dense(5, name="first"), L.BatchNormalization(name="bn"), L.Dense(3, name="last"), bn=training)
    model.get_layer("bn").trainable = trainable
    return model


def partly_frozen(*learning):
    model = base()
    for layer in model.layers:
        layer.trainable = layer.name in learning
    return model


def moved():
    """A head trained by a loop of one's own that called the whole model with training=True."""
    model = swapped(base(), freeze=False)
    model(PIXELS, training=True)
    for layer in model.layers[:-1]:
        layer.trainable = False
    return model


def cnn(*, channels=3, front=(), names=("block1_conv1", "block1_pool")):
    image = keras.Input((8, 8, channels), name="image")
    x = image
    for layer in front:
        x = layer(x)
    x = L.MaxPooling2D(name=names[1])(L.Conv2D(4, 3, name=names[0])(x))
    return keras.Model(image, L.Dense(2, activation="softmax")(L.Flatten()(x)))


def dense(units, activation=None, name=None):
    return L.Dense(units, activation=activation, name=name)


COMPILED = read({"optimizer": {"class_name": "Adam", "config": {"learning_rate": 1e-3}}, "loss": "mse"})
LOGITS = read({"loss": {"class_name": "SparseCategoricalCrossentropy", "config": {"from_logits": True}}})


def frozen():
    model = chained(dense(3, "relu"), dense(2))
    model.trainable = False
    return model


# code -> (the model, its base, its training configuration; the layers it is found in; words of the message)
MISTAKES = {
    "statistics_moved": (lambda: (moved(), base()), ["bn_1", "bn_2"], ["not trainable", "of their size"]),
    "training_mode": (lambda: (normed(True),), ["bn"], ["training=True"]),
    "flag_ignored": (
        lambda: (swapped(base(), freeze=False, nested=True, training=False), base()),
        ["bn_1", "bn_2"],
        ["training=False", "fit() overrides", "trainable=False"],
    ),
    "norm_among_frozen": (lambda: (partly_frozen("bn_1", "class"),), ["bn_1"], ["between frozen layers"]),
    "dropout_always_on": (
        lambda: (chained(dense(4, "relu"), L.Dropout(0.3, name="drop"), dense(2), drop=True),),
        ["drop"],
        ["answers are random"],
    ),
    "augmentation_on": (
        lambda: (swapped(base(), front=[L.RandomRotation(0.1, name="turn")]), base()),
        ["turn"],
        ["model(x) distorts"],
    ),
    "augmentation": (
        lambda: (chained(L.RandomFlip(name="flip"), L.Conv2D(2, 3), shape=(8, 8, 3), flip=False),),
        ["flip"],
        ["does nothing"],
    ),
    "preprocessing_missing": (lambda: (swapped(base(prepared=False)), base()), ["image"], ["(prepare)"]),
    "preprocessing_doubled": (
        lambda: (swapped(base(), front=[L.Rescaling(1 / 127.5, -1, name="outer")]), base()),
        ["prepare"],
        ["0.00392", "outer has scaled by 0.00784"],
    ),
    "preprocessing_outside": (lambda: (cnn(),), ["image"], ["VGG", "BGR"]),
    "include_top": (
        lambda: (chained(dense(1000, "softmax", "predictions"), L.Dropout(0.2), dense(2, "softmax", "head")),),
        ["predictions"],
        ["1000 classes", "input of head"],
    ),
    "head_on_softmax": (
        lambda: (chained(dense(5, "softmax", "class"), dense(2, "softmax", "head")),),
        ["class"],
        ["input of head"],
    ),
    "linear_pair": (lambda: (chained(dense(4, name="logits"), dense(2, "softmax", "head")),), ["logits"], ["head"]),
    "softmax_of_one": (lambda: (chained(dense(1, "softmax", "answer")),), ["answer"], ["is 1"]),
    "activation_loss": (
        lambda: (chained(dense(3, "softmax", "answer")), None, LOGITS),
        ["answer"],
        ["sparse_categorical_crossentropy", "from_logits=True"],
    ),
    "nothing_trainable": (lambda: (frozen(), None, COMPILED), ["net"], ["Adam", "every layer is frozen"]),
}


def found(model, base=None, training=None):
    return findings(subject_of(model, base, training))


@pytest.mark.parametrize("code", CODES)
def test_each_mistake_is_found_alone(code):
    make, layers, words = MISTAKES[code]
    said = found(*make())
    assert {finding.code for finding in said} == {code}
    assert [finding.layer for finding in said] == layers
    row = next(row for row in ROWS if row.code == code)
    for finding in said:
        assert finding.message.endswith(f"; {row.remedy}")
        assert finding.severity == row.severity
        assert finding.message.isprintable()
    for word in words:
        assert word in said[0].message


def cascade():
    """A softmax that is an answer of its own, and feeds the next."""
    start = keras.Input((6,))
    coarse = L.Dense(3, activation="softmax", name="coarse")(start)
    return keras.Model(start, [coarse, L.Dense(8, activation="softmax", name="fine")(coarse)])


def attention():
    start = keras.Input((6,))
    weighed = L.Multiply()([start, L.Dense(6, activation="softmax")(start)])
    return keras.Model(start, L.Dense(2)(weighed))


def siamese():
    left, right = keras.Input((6,)), keras.Input((6,))
    shared = L.Dense(6, name="shared")
    return keras.Model([left, right], L.Add()([L.Dense(2)(shared(left)), L.Dense(2)(shared(right))]))


def tuned(freeze=False):
    """Fine-tuned: gammas and statistics have all moved."""
    model = swapped(base(), freeze=False)
    model(PIXELS, training=True)
    for layer in model.layers:
        if isinstance(layer, L.BatchNormalization):
            layer.gamma.assign(numpy(layer.gamma) * 1.01)
            layer.trainable = not freeze
    return model


def efficient(*second):
    """As EfficientNet prepares its input: three stages, one of which scales pixels down."""
    stages = [L.Rescaling(1 / 255), L.Normalization(mean=[0.4] * 3, variance=[0.05] * 3), L.Rescaling(2.1)]
    return cnn(front=[*second, *stages], names=("stem", "stem_pool"))


CLEAN = {
    "a new head on a frozen body": lambda: (swapped(base()), base()),
    "a frozen body that is called with training=False": lambda: (
        swapped(base(), nested=True, training=False),
        base(),
    ),
    "a body that was fine-tuned": lambda: (tuned(), base()),
    "a body that was fine-tuned, then frozen": lambda: (tuned(freeze=True), base()),
    "the base itself": lambda: (base(), base()),
    "a frozen BatchNormalization called with training=True": lambda: (normed(True, trainable=False),),
    "a trainable BatchNormalization": lambda: (normed(None),),
    "a new BatchNormalization behind a frozen body": lambda: (
        swapped(base(), head=[L.BatchNormalization(name="new"), dense(2, "softmax")]),
        base(),
    ),
    "a trainable BatchNormalization in front of frozen layers": lambda: (
        swapped(base(prepared=False), front=[L.BatchNormalization(name="new")]),
        base(prepared=False),
    ),
    "trainable layers behind a frozen one": lambda: (partly_frozen("conv_2", "bn_2", "class"),),
    "dropout that nobody forces": lambda: (chained(dense(4, "relu"), L.Dropout(0.3), dense(2)),),
    "dropout of nothing": lambda: (chained(dense(4, "relu"), L.Dropout(0.0, name="drop"), dense(2), drop=True),),
    "a crop, which acts at inference too": lambda: (
        chained(L.RandomCrop(4, 4, name="crop"), L.Flatten(), shape=(8, 8, 3), crop=False),
    ),
    "another preprocessing than the base's": lambda: (
        swapped(base(prepared=False), front=[L.Normalization(mean=100.0, variance=4000.0)]),
        base(),
    ),
    "a BatchNormalization in front of the base, which is no preprocessing": lambda: (
        chained(dense(2, name="d")),
        chained(L.BatchNormalization(), dense(2, name="d")),
    ),
    "another model than the base": lambda: (cnn(names=("other", "pool"), front=[]), base()),
    "three stages of which one scales pixels": lambda: (efficient(),),
    "marks of VGG on one channel": lambda: (cnn(channels=1),),
    "marks of VGG behind preprocessing": lambda: (cnn(front=[L.Rescaling(1 / 127.5, -1)]),),
    "a wide hidden layer": lambda: (chained(dense(1000, "relu"), dense(2)),),
    "a wide convolution": lambda: (chained(L.Conv1D(1000, 1), L.Flatten(), dense(2), shape=(1, 3)),),
    "a softmax that is an answer, too": lambda: (cascade(),),
    "a softmax that weighs": lambda: (attention(),),
    "a linear bottleneck": lambda: (chained(dense(2), dense(4)),),
    "a linear map at every place": lambda: (chained(dense(4), L.Flatten(), dense(3), shape=(5, 3)),),
    "a linear map that two inputs share": lambda: (siamese(),),
    "a softmax over places": lambda: (chained(dense(1), L.Softmax(axis=1), shape=(5, 3)),),
    "an answer that fits its loss": lambda: (chained(dense(3)), None, LOGITS),
    "frozen without an optimizer": lambda: (frozen(), None, read({"loss": "mse"})),
    "an optimizer and nothing that could learn": lambda: (chained(L.Flatten(), shape=(2, 3)), None, COMPILED),
    "something trainable and an optimizer": lambda: (chained(dense(3)), None, COMPILED),
}


@pytest.mark.parametrize("make", CLEAN.values(), ids=CLEAN)
def test_clean_models_have_no_findings(make):
    assert found(*make()) == ()


@pytest.mark.parametrize("name", ["fashion_cnn", "fashion_cnn_8", "mlp_bn_after", "mlp_bn_before"])
def test_the_models_of_this_repository_are_clean(name):
    assert audit(load(ROOT / "models" / f"{name}.keras")).findings == ()


def test_a_real_trained_model_is_clean(shared_models):
    result = audit(load(shared_models / "resnet1d_keras36.keras"))
    assert result.findings == ()
    assert result.body["training_config"]["optimizer"] == "Adam"


def test_the_logits_of_imagenet_are_a_classifier_too():
    (finding,) = found(chained(dense(1000, name="logits"), dense(2, "softmax")))
    assert (finding.code, finding.layer) == ("include_top", "logits")


def test_two_stages_that_scale_pixels_are_one_too_many():
    (finding,) = found(efficient(L.Rescaling(1 / 255, name="outer")))
    assert finding.code == "preprocessing_doubled"
    (finding,) = found(efficient(L.Rescaling(SHRINKS, name="outer")))
    assert finding.code == "preprocessing_doubled"
    assert found(efficient(L.Rescaling(SHRINKS * 1.01, name="outer"))) == ()


def test_preprocessing_by_arithmetic_in_the_graph_counts():
    image = keras.Input((8, 8, 3), name="image")
    model = keras.Model(image, L.Conv2D(2, 3)(L.Rescaling(1 / 255, name="own")(image / 127.5 - 1)))
    (finding,) = found(model)
    assert (finding.code, finding.layer) == ("preprocessing_doubled", "own")


def test_of_several_ways_to_a_layer_the_longest_counts():
    image = keras.Input((8, 8, 3), name="image")
    prepared = L.Rescaling(1 / 255, name="own")(L.Rescaling(1 / 255)(image))
    (finding,) = found(keras.Model(image, L.Conv2D(2, 3)(L.Concatenate()([image, prepared]))))
    assert (finding.code, finding.layer) == ("preprocessing_doubled", "own")


def test_a_body_of_keras_applications_is_known():
    body = keras.applications.MobileNet(weights=None, include_top=False, alpha=0.25, input_shape=(32, 32, 3))
    (finding,) = found(body)
    assert (finding.code, "MobileNet expects pixels scaled to -1..1" in finding.message) == (
        "preprocessing_outside",
        True,
    )
    assert len({family for family, _ in FAMILIES.values()}) == len(FAMILIES)


@pytest.mark.parametrize(
    ("asked", "codes", "random"),
    [
        (None, {"augmentation_on"}, True),
        (True, {"augmentation_on", "dropout_always_on"}, True),
        (False, {"augmentation"}, False),
    ],
)
def test_the_call_of_a_body_wins_over_what_its_layers_ask_for(asked, codes, random):
    """RandomFlip asks for training=True by itself, and Dropout for training=False."""
    body = chained(L.RandomFlip(name="flip"), L.Dropout(0.5, name="drop"), shape=(8, 8, 3))
    start = keras.Input((8, 8, 3))
    model = keras.Model(start, L.Conv2D(2, 3)(body(start, training=asked)))
    assert {finding.code for finding in found(model)} == codes
    answers = {numpy(model(PIXELS[:4])).tobytes() for _ in range(6)}
    assert (len(answers) > 1) is random


def test_an_unknown_code_is_refused():
    with pytest.raises(ValueError, match="unknown audit code"):
        Finding("bn", "nonsense", "?")


# ------------------------------------------------------------------------------------- modes, against fit


@pytest.mark.parametrize(("asked", "trainable"), [(None, True), (None, False), (False, True), (True, False)])
def test_a_mode_says_whether_fit_moves_the_statistics(asked, trainable):
    model = normed(asked, trainable)
    (norm,) = subject_of(model).norms
    before = model.get_layer("bn").get_weights()[-2:]
    model.compile("sgd", "mse")
    model.fit(np.ones((8, 6), "float32"), np.ones((8, 3), "float32"), verbose=0)
    after = model.get_layer("bn").get_weights()[-2:]
    moves = any((old != new).any() for old, new in zip(before, after, strict=True))
    assert moves == (norm.mode == "training")


def test_in_mode_batch_an_answer_depends_on_its_batch():
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    for asked, mode, depends in ((True, "batch", True), (False, "training", False)):
        model = normed(asked)
        (norm,) = subject_of(model).norms
        assert (norm.mode, norm.asked) == (mode, (asked,))
        assert np.allclose(numpy(model(x))[:1], numpy(model(x[:1])), atol=1e-5) is not depends


def test_a_norm_inside_a_wrapper_is_judged_by_its_own_weights():
    def build():
        inside = keras.Sequential([keras.Input((3,)), dense(3, name="map"), L.BatchNormalization(name="inner")])
        return settled(chained(L.TimeDistributed(inside, name="steps"), shape=(5, 3)))

    model, origin = build(), build()
    norm = model.get_layer("steps").layer.get_layer("inner")
    norm.moving_mean.assign([9.0, 9.0, 9.0])
    model.get_layer("steps").layer.get_layer("map").bias.assign([7.0, 7.0, 7.0])
    (finding,) = found(model, origin)
    assert (finding.layer, finding.code) == ("steps/inner", "statistics_moved")
    norm.beta.assign([1.0, 1.0, 1.0])
    assert found(model, origin) == ()


@pytest.mark.parametrize("trainable", [False, True])
def test_without_gamma_and_beta_only_a_frozen_norm_can_be_judged(trainable):
    def build():
        return chained(L.BatchNormalization(name="bn", scale=False, center=False))

    model, origin = build(), build()
    model.get_layer("bn").moving_mean.assign(np.full(6, 9.0))
    model.get_layer("bn").trainable = trainable
    assert [finding.code for finding in found(model, origin)] == ([] if trainable else ["statistics_moved"])


def test_parameters_are_counted_by_what_becomes_of_them():
    model = partly_frozen("bn_1", "class")
    counts = subject_of(model).counts
    assert (counts["bn_1"].trainable, counts["bn_1"].frozen, counts["bn_1"].statistics) == (8, 0, 8)
    assert (counts["bn_2"].trainable, counts["bn_2"].frozen, counts["bn_2"].statistics) == (0, 8, 8)
    assert (counts["conv_1"].trainable, counts["conv_1"].frozen) == (0, 108)
    assert sum(count.total for count in counts.values()) == model.count_params()
    assert sum(count.trainable for count in counts.values()) == 8 + 25


# --------------------------------------------------------------------------------------- loss and activation


@pytest.mark.parametrize(
    ("loss", "from_logits", "activation", "width", "fits"),
    [
        ("categorical_crossentropy", False, "softmax", 3, True),
        ("categorical_crossentropy", False, "sigmoid", 3, False),
        ("categorical_crossentropy", False, "linear", 3, False),
        ("categorical_crossentropy", True, "linear", 3, True),
        ("categorical_crossentropy", True, "softmax", 3, False),
        ("sparse_categorical_crossentropy", True, "sigmoid", 3, False),
        ("sparse_categorical_crossentropy", False, "sigmoid", 1, False),
        ("sparse_categorical_crossentropy", True, "linear", 1, False),
        ("categorical_focal_crossentropy", False, "relu", 3, False),
        ("binary_crossentropy", False, "sigmoid", 1, True),
        ("binary_crossentropy", False, "sigmoid", 4, True),
        ("binary_crossentropy", False, "softmax", 4, False),
        ("binary_crossentropy", False, "softmax", 2, True),
        ("binary_crossentropy", True, "softmax", 2, False),
        ("binary_crossentropy", False, "linear", 1, False),
        ("binary_crossentropy", True, "linear", 1, True),
        ("binary_crossentropy", True, "sigmoid", 1, False),
        ("binary_focal_crossentropy", False, "tanh", 1, False),
        ("mean_squared_error", False, "softmax", 3, True),
        ("of_my_own", False, "linear", 3, True),
    ],
)
def test_a_final_activation_fits_its_loss(loss, from_logits, activation, width, fits):
    assert (_misfit(Loss(loss, from_logits), activation, width) is None) is fits


@pytest.mark.parametrize("losses", [["mse", "categorical_crossentropy"], {"b": "categorical_crossentropy", "a": "mse"}])
def test_each_output_has_its_own_loss(losses):
    start = keras.Input((6,))
    model = keras.Model(start, [L.Dense(3, name="a")(start), L.Reshape((3,), name="b")(L.Dense(3, name="raw")(start))])
    (finding,) = found(model, None, read({"loss": losses}))
    assert (finding.code, finding.layer) == ("activation_loss", "raw")


def test_an_activation_of_its_own_layer_is_the_final_one():
    model = chained(dense(3, name="raw"), L.Activation("softmax", name="act"), L.Activation("linear"))
    (finding,) = found(model, None, LOGITS)
    assert finding.layer == "act"
    start = keras.Input((6,))
    (finding,) = found(keras.Model(start, keras.ops.softmax(L.Dense(3)(start))), None, LOGITS)
    assert finding.code == "activation_loss"


# ------------------------------------------------------------------------------------------------ the base


def states(model, origin):
    return {change.layer: (change.state, change.matched_by) for change in likeness(trace(model), trace(origin)).layers}


def test_a_body_that_was_not_touched_is_bit_for_bit_the_base():
    result = likeness(trace(swapped(base())), trace(base()))
    assert result.body_equal
    assert result.summary == "the body is bit for bit that of the base (4 layers); new: shirts; missing: class"


def test_a_nested_body_is_found_by_its_names():
    assert states(swapped(base(), nested=True), base())["conv_2"] == ("equal", "name")


def test_names_that_collide_with_outer_ones_are_found():
    model = swapped(base(), front=[L.Dense(3, name="conv_1")])  # the body's own becomes "body.conv_1"
    found = states(model, base())
    assert found["conv_1"] == ("new", None)
    assert found["body.conv_1"] == ("equal", "name")


def test_one_bit_is_a_change_with_a_distance():
    model = swapped(base())
    layer = model.get_layer("conv_2")
    kernel = layer.get_weights()[0]
    old = kernel.copy()
    kernel[0, 0, 0, 0] = np.nextafter(kernel[0, 0, 0, 0], np.float32(9))
    layer.set_weights([kernel])
    result = likeness(trace(model), trace(base()))
    (change,) = result.of("changed")
    assert change.layer == "conv_2"
    expected = np.linalg.norm((kernel - old).astype(float)) / np.linalg.norm(old.astype(float))
    assert change.weights[0].distance == pytest.approx(expected, rel=1e-9)
    assert 0 < expected < 1e-6
    assert not result.body_equal
    assert result.summary.startswith("1 of 4 layers of the body differ from the base (conv_2)")


def test_minus_zero_is_another_bit_pattern():
    model, origin = chained(dense(3)), chained(dense(3))
    for each, value in ((model, -0.0), (origin, 0.0)):
        each.layers[-1].set_weights([np.full((6, 3), value, "float32"), np.zeros(3, "float32")])
    (change,) = likeness(trace(model), trace(origin)).of("changed")
    assert [(weight.equal, weight.distance) for weight in change.weights] == [(False, None), (True, 0.0)]


def test_the_same_bytes_of_another_type_are_no_equals():
    assert not _change("kernel", np.zeros(3, "float32"), np.zeros(3, "int32")).equal
    assert _change("kernel", np.zeros(3, "float32"), np.zeros(3, "float32")).equal


def test_a_weight_that_is_no_number_has_no_distance():
    model, origin = chained(dense(3, name="d")), chained(dense(3, name="d"))
    kernel, bias = origin.layers[-1].get_weights()
    model.layers[-1].set_weights([kernel * np.nan, bias + 1])
    (change,) = likeness(trace(model), trace(origin)).of("changed")
    assert change.weights[0].distance is None
    assert change.weights[1].distance > 0


def renamed(scale=1.0, seed=None):
    """The base under other names; ``scale``: of every weight; ``seed``: drawn anew instead."""
    rng = np.random.default_rng(seed)
    model = base()
    config = json.loads(re.sub(r'"(conv|bn)_(\d)"', r'"\1_\g<2>x"', json.dumps(model.get_config())))
    new = keras.Model.from_config(config)
    old = model.get_weights()
    new.set_weights([rng.normal(size=w.shape) * w.std() if seed is not None else w * scale for w in old])
    return new


def test_layers_of_other_names_are_found_by_position():
    found = states(renamed(), base())
    assert found["conv_1x"] == found["bn_2x"] == ("equal", "position")
    assert states(renamed(1 + AKIN * 0.9), base())["conv_1x"] == ("changed", "position")
    assert states(renamed(1 + AKIN * 1.1), base())["conv_1x"] == ("new", None)


def test_layers_that_were_drawn_anew_are_no_one_elses():
    found = states(renamed(seed=5), base())
    assert found["conv_1x"] == ("new", None)
    assert found["conv_1"] == ("missing", None)


def test_the_same_name_with_another_shape_is_another_layer():
    result = likeness(trace(swapped(base(), head=[dense(2, "softmax", "class")])), trace(base()))
    assert [(change.layer, change.state) for change in result.layers[-2:]] == [("class", "new"), ("class", "missing")]
    assert result.body_equal


def test_a_head_of_the_same_shape_is_no_part_of_the_body():
    model = base()
    kernel, bias = model.get_layer("class").get_weights()
    model.get_layer("class").set_weights([kernel + 1, bias])
    result = likeness(trace(model), trace(base()))
    assert result.body_equal
    assert result.summary.endswith("head changed: class")


def test_other_settings_are_a_change_without_a_distance():
    model = copied(base())
    model.get_layer("bn_1").epsilon = 0.1
    model.get_layer("bn_2").momentum = 0.5  # of training, not of what it computes
    model.get_layer("conv_1").kernel_regularizer = keras.regularizers.L2(1e-4)
    (change,) = likeness(trace(model), trace(base())).of("changed")
    assert (change.layer, change.settings) == ("bn_1", ("epsilon",))
    assert all(weight.equal for weight in change.weights)


def test_a_stranger_has_no_body_of_the_base():
    result = likeness(trace(cnn()), trace(base()))
    assert not result.body_equal
    assert result.summary.startswith("no layer of the base's body is in the model")


# --------------------------------------------------------------------------------- the training configuration


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, Training()),
        ({"optimizer": "adam", "loss": "mse", "metrics": ["mae", "mae"]},
         Training("adam", losses=(Loss("mse"),), metrics=("mae",))),
        ({"optimizer_config": {"class_name": "SGD", "config": {"lr": 0.5, "momentum": 0.9, "decay": None}}},
         Training("SGD", 0.5, hyperparameters={"momentum": 0.9})),
        ({"loss": {"class_name": "function", "config": "sparse_categorical_crossentropy"}},
         Training(losses=(Loss("sparse_categorical_crossentropy"),))),
        ({"loss": {"class_name": "LossFunctionWrapper", "config": {"fn": "BinaryCrossentropy", "from_logits": True}}},
         Training(losses=(Loss("binary_crossentropy", True),))),
        ({"loss": [None, "mse"]}, Training(losses=(Loss("mse", output=1),))),
        ({"metrics": {"a": [["acc"]], "b": {"class_name": "AUC", "config": {}}}}, Training(metrics=("acc", "AUC"))),
        ({"optimizer": {"class_name": "LossScaleOptimizer", "config": {"inner_optimizer": {
            "class_name": "Adam", "config": {"learning_rate": 0.25}}}}}, Training("Adam", 0.25)),
        ({"optimizer": {"class_name": "Adam", "config": {"learning_rate": 10**400}}}, Training("Adam")),
        ({"optimizer": {"class_name": "Adam", "config": {"learning_rate": True}}}, Training("Adam")),
        ({"optimizer": ["what"], "loss": 7, "metrics": 3}, Training()),
        ({"optimizer": "\x1b[2Jadam"}, Training("?[2Jadam")),
    ],
)  # fmt: skip
def test_a_training_configuration_is_read_as_data(config, expected):
    assert read(config) == expected


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model compiled with everything, in three formats."""
    folder = tmp_path_factory.mktemp("trained")
    model = chained(dense(4, "relu", "hidden"), dense(3, name="answer"))
    rate = keras.optimizers.schedules.CosineDecay(0.1, 100)
    model.compile(
        keras.optimizers.SGD(rate, momentum=0.9, nesterov=True, clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(np.ones((8, 6), "float32"), np.zeros(8), batch_size=2, verbose=0)
    (folder / "m.json").write_text(model.to_json())
    model.save_weights(folder / "m.weights.h5")
    for name in ("m.keras", "m.h5"):  # in this order: writing HDF5 takes the optimizer out of Keras' own record
        model.save(folder / name)
    return folder


@pytest.mark.parametrize("name", ["m.keras", "m.h5"])
def test_the_files_of_keras_say_how_a_model_was_trained(trained, name):
    result = audit(load(trained / name))
    said = result.body["training_config"]
    assert result.findings == ()
    assert (said["optimizer"], said["learning_rate"]) == ("SGD", None)
    assert (said["schedule"]["name"], said["schedule"]["initial_learning_rate"]) == ("CosineDecay", 0.1)
    assert (said["hyperparameters"]["momentum"], said["hyperparameters"]["clipnorm"]) == (0.9, 1.0)
    assert said["losses"] == [{"name": "sparse_categorical_crossentropy", "from_logits": True, "output": None}]
    assert said["metrics"] == ["accuracy"]
    assert said["optimizer_state"]["present"]
    assert said["optimizer_state"]["steps"] == 4
    assert result.body["file"]["saved_by"] == keras.__version__
    assert (result.body["file"]["saved_on"] is not None) == (name == "m.keras")


def test_a_description_says_it_too_and_has_no_state(trained):
    result = audit(load(trained / "m.json", weights=trained / "m.weights.h5"))
    assert result.body["training_config"]["optimizer"] == "SGD"
    assert result.body["training_config"]["optimizer_state"] is None


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "[" * 500 + "]" * 500])
def test_a_damaged_training_configuration_is_told_and_stops_nothing(trained, tmp_path, text):
    path = tmp_path / "m.h5"
    path.write_bytes((trained / "m.h5").read_bytes())
    with h5py.File(path, "a") as file:
        file.attrs["training_config"] = text
    result = audit(load(path))
    assert result.body["training_config"] is None
    assert result.notices == (f"the training configuration in {path} cannot be read",)


def test_a_class_that_nobody_has_is_a_name(trained, tmp_path):
    path = tmp_path / "m.h5"
    path.write_bytes((trained / "m.h5").read_bytes())
    with h5py.File(path, "a") as file:
        config = json.loads(file.attrs["training_config"])
        config["loss"] = {
            "class_name": "Evil",
            "module": "os",
            "config": {"fn": {"class_name": "function", "config": "system"}},
        }
        file.attrs["training_config"] = json.dumps(config)
    assert audit(load(path)).body["training_config"]["losses"][0]["name"] == "system"


# ------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base, a head that was really trained on its frozen body, and one whose statistics moved."""
    folder = tmp_path_factory.mktemp("pair")
    origin = base()
    origin.save(folder / "base.keras")
    head = swapped(origin)
    head.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    head.fit(PIXELS, np.arange(32) % 2, epochs=2, verbose=0)
    head.save(folder / "head.keras")
    moved().save(folder / "moved.keras")
    return folder


def test_a_head_trained_on_a_frozen_body_is_clean_and_says_so(cli, pair):
    code, out, err = cli("audit", pair / "head.keras", "--base", pair / "base.keras", "--strict", "--json", "-")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert {"schema", "trainable", "layers", "norms", "base", "training_config", "findings", "notices"} <= set(report)
    assert (report["schema"], report["proven"], report["findings"]) == ("deploykit.audit/1", True, [])
    assert report["base"]["body_equal"]
    assert report["base"]["counts"] == {"equal": 4, "changed": 0, "missing": 1, "new": 1}
    assert report["trainable"]["trainable_layers"] == ["shirts"]
    assert [norm["mode"] for norm in report["norms"]] == ["frozen", "frozen"]
    assert all(norm["statistics_equal"] and norm["affine_equal"] for norm in report["norms"])
    assert report["training_config"]["optimizer"] == "Adam"


def test_strict_fails_on_a_warning_in_a_process_of_its_own(pair, tmp_path):
    command = [sys.executable, "-m", "deploykit.cli", "audit", pair / "moved.keras", "--base", pair / "base.keras"]
    more = ["--strict", "--json", tmp_path / "report.json"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "warning    bn_1: its moving statistics differ" in done.stdout
    assert done.stderr.startswith("error: 2 findings of severity warning or above (statistics_moved)")
    assert done.stderr.count("\n") == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["proven"]
    assert "statistics_moved" in report["reason"]
    assert [norm["statistics_equal"] for norm in report["norms"]] == [False, False]
    assert [norm["affine_equal"] for norm in report["norms"]] == [True, True]


def test_a_warning_alone_fails_nothing(cli, pair):
    code, out, err = cli("audit", pair / "moved.keras", "--base", pair / "base.keras")
    assert (code, err) == (0, "")
    assert "2 of 4 layers of the body differ from the base (bn_1, bn_2)" in out


def test_a_note_is_not_serious(cli, tmp_path):
    chained(L.RandomFlip(name="flip"), L.Flatten(), dense(2), shape=(8, 8, 3), flip=False).save(tmp_path / "m.keras")
    code, out, _ = cli("audit", tmp_path / "m.keras", "--strict")
    assert code == 0
    assert "note" in out
    assert "flip: an augmentation" in out


def test_a_base_that_is_not_there_is_one_line(cli, pair):
    code, out, err = cli("audit", pair / "head.keras", "--base", pair / "nothing.keras")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "there is no file" in err


def test_a_graph_without_layers_is_refused(tmp_path):
    exported(tmp_path / "graph")
    with pytest.raises(UnsupportedModelError, match="without Keras layers"):
        audit(load(tmp_path / "graph"))


def test_many_findings_of_one_code_are_one_line():
    rows = [{"layer": f"bn_{i}", "code": "flag_ignored", "severity": "warning", "message": "m"} for i in range(9)]
    report = {
        "deploykit": "0", "model": "m", "notices": [], "layers": [], "norms": [], "base": None, "findings": rows,
        "schema": "deploykit.audit/1", "training_config": None, "file": {"saved_by": None, "saved_on": None},
        "trainable": {**dict.fromkeys(["total", "trainable", "frozen", "statistics"], 0), "trainable_layers": [],
                      "frozen_layers": []},
    }  # fmt: skip
    console = Console(width=120, record=True, file=io.StringIO())
    render(report, console)
    assert "9 layers (bn_0, bn_1, bn_2 and 6 more): in bn_0: m" in console.export_text()


# --------------------------------------------------------------------------------------------- the document


def test_the_document_has_the_table_of_the_code():
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.+) \| (.+) \|$", (ROOT / "docs" / "audit.md").read_text(), re.M)
    assert rows == [(row.code, row.severity, row.meaning, row.remedy) for row in ROWS]


def test_every_row_has_a_model_with_its_mistake():
    assert set(MISTAKES) == set(CODES)
    assert len(CODES) == len(ROWS)
