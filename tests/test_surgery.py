"""Surgery: where a head begins, what is cut, and that the base never notices."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from nets import enliven, inputs_for

import deploykit
from deploykit import graph
from deploykit.errors import InputError, UnsupportedModelError
from deploykit.transfer.surgery import Head, dominates, swap

L = keras.layers


def functional(x, *layers):
    y = x
    for layer in layers:
        y = layer(y)
    return enliven(keras.Model(x, y))


def image():
    return keras.Input((8, 8, 3), name="image")


def conv_net(*head):
    body = (L.Conv2D(6, 3, name="conv"), L.BatchNormalization(name="bn"), L.ReLU(name="relu"))
    return functional(image(), *body, *head)


def nested():
    inner = keras.Sequential(
        [keras.Input((8, 8, 3)), L.Conv2D(4, 3, name="conv"), L.GlobalMaxPooling2D(name="top")], name="body"
    )
    return functional(image(), inner, L.Dropout(0.1), L.Dense(3, "softmax", name="old"))


def two_inputs():
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    joined = L.Concatenate(name="join")([L.Dense(5, name="left")(a), L.Dense(5, name="right")(b)])
    return enliven(keras.Model([a, b], L.Dense(2, "softmax", name="old")(joined)))


def pooled_convolution():  # as in SqueezeNet
    return conv_net(L.Conv2D(5, 1, name="last"), L.ReLU(), L.GlobalAveragePooling2D(), L.Softmax())


def convolution_of_a_pixel():  # as in MobileNet
    head = (L.GlobalAveragePooling2D(keepdims=True, name="gap"), L.Dropout(0.2), L.Conv2D(5, 1, name="last"))
    return conv_net(*head, L.Reshape((5,)), L.Activation("softmax"))


FLAT = L.GlobalAveragePooling2D
HEADS = {  # base -> feature point, what is gone
    "a Dense": (lambda: conv_net(FLAT(name="gap"), L.Dense(4, "softmax", name="old")), "gap", ["old"]),
    "an activation of its own": (
        lambda: conv_net(FLAT(name="gap"), L.Dense(4, name="old"), L.Softmax(name="s")), "gap", ["old", "s"],
    ),
    "dropout in front": (
        lambda: conv_net(FLAT(name="gap"), L.Dropout(0.5, name="d"), L.Dense(4, name="old")), "gap", ["d", "old"],
    ),
    "flattened": (lambda: conv_net(L.Flatten(name="flat"), L.Dense(4, "sigmoid", name="old")), "flat", ["old"]),
    "a pooled convolution": (pooled_convolution, "relu", None),
    "a convolution of one pixel": (convolution_of_a_pixel, "gap", None),
    "a nested body": (nested, "top", None),
    "two inputs": (two_inputs, "join", ["old"]),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS)
def test_the_head_is_found_and_the_features_are_those_of_the_base(case):
    build, point, gone = HEADS[case]
    base = build()
    swapped = swap(base, Head(3))
    assert swapped.feature_point == point
    assert gone is None or list(swapped.gone) == gone
    samples = inputs_for(base)
    found = graph.trace(base)
    (node,) = [node for node in found.nodes if node.name == point]
    (expected,) = graph.run(graph.replay(graph.cut(found, node.outputs[0])), samples)
    (features,) = graph.run(swapped.body, samples)
    if expected.ndim == 4:
        expected = expected.mean(axis=(1, 2))
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-5)
    (answer,) = graph.run(swapped.model, samples)
    np.testing.assert_allclose(answer, 1 / 3, rtol=1e-6)  # nothing was learned, so every class is equally likely
    assert [spec.name for spec in graph.signature(swapped.model).inputs] == [s.name for s in found.signature.inputs]
    assert {layer.name for layer in swapped.model.layers if layer.trainable and layer.weights} == {"head"}


def test_training_the_result_leaves_the_base_alone():
    base = conv_net(FLAT(), L.Dense(4, "softmax"))
    before = [graph.numpy(weight).copy() for weight in base.weights]
    model = deploykit.swap_head(base, 2)
    for layer in model.layers:
        layer.trainable = True
    model.compile(keras.optimizers.SGD(1.0), "sparse_categorical_crossentropy")
    x = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype(np.float32)
    model.fit(x, np.arange(16) % 2, epochs=4, verbose=0)
    assert not np.array_equal(graph.numpy(model.get_layer("conv").kernel), graph.numpy(base.get_layer("conv").kernel))
    assert all(np.array_equal(a, graph.numpy(b)) for a, b in zip(before, base.weights, strict=True))
    assert not {id(layer) for layer in model.layers} & {id(layer) for layer in base.layers}


def mlp():
    dense = [L.Dense(n, name=f"d{n}") for n in (9, 8, 7)]
    parts = [part for d in dense for part in (d, L.BatchNormalization(), L.ReLU(name=f"relu_{d.name}"))]
    return functional(keras.Input((5,), name="x"), *parts, L.Dense(3, "softmax", name="old"))


@pytest.mark.parametrize(("drop", "point", "units"), [(0, "relu_d7", 7), (1, "relu_d8", 8), (2, "relu_d9", 9)])
def test_upper_layers_are_dropped_with_what_stands_behind_them(drop, point, units):
    swapped = swap(mlp(), Head(2), drop=drop)
    assert (swapped.feature_point, swapped.head.input.shape[-1]) == (point, units)


def test_a_layer_can_be_named():
    swapped = swap(mlp(), Head(2), at="relu_d9")
    assert (swapped.feature_point, "d8" in swapped.gone) == ("relu_d9", True)


@pytest.mark.parametrize(
    ("head", "names", "activation", "shape"),
    [
        (Head(4), ["head"], "softmax", 4),
        (Head(1, "sigmoid"), ["head"], "sigmoid", 1),
        (Head(5, "multi-label"), ["head"], "sigmoid", 5),
        (Head(2, "regression", hidden=(6,)), ["head_hidden_1", "head"], "linear", 2),
        (
            Head(3, hidden=(6, 5), dropout=0.3, l2=1e-4),
            ["head_hidden_1", "head_dropout_1", "head_hidden_2", "head_dropout_2", "head"], "softmax", 3,
        ),
        (Head(3, dropout=0.3), ["head_dropout", "head"], "softmax", 3),
    ],
)  # fmt: skip
def test_the_new_head_is_what_was_asked_for(head, names, activation, shape):
    swapped = swap(mlp(), head)
    assert list(swapped.head_layers) == names
    last = swapped.model.layers[-1]
    assert (last.activation.__name__, swapped.model.output.shape[-1]) == (activation, shape)
    dense = [layer for layer in swapped.model.layers if layer.name in names and isinstance(layer, L.Dense)]
    assert all((layer.kernel_regularizer is not None) == bool(head.l2) for layer in dense)


@pytest.mark.parametrize(("pooling", "units"), [("auto", 6), ("average", 6), ("max", 6), ("flatten", 6 * 36)])
def test_features_with_positions_become_vectors(pooling, units):
    swapped = swap(conv_net(FLAT(), L.Dense(4)), Head(2, pooling=pooling), at="relu")
    assert swapped.head.input.shape == (None, units)


def test_channels_in_front_are_pooled_over_the_positions():
    x = keras.Input((3, 8, 8), name="image")
    base = enliven(keras.Model(x, L.Conv2D(6, 3, data_format="channels_first", name="conv")(x)))
    assert swap(base, Head(2), at="conv").head.input.shape == (None, 6)


def test_a_swapped_model_can_be_swapped_again():
    first = swap(mlp(), Head(4, hidden=(6,))).model
    second = swap(first, Head(2, hidden=(6,)))
    assert second.feature_point == "head_hidden_1"
    assert second.head_layers == ("head_hidden_1_1", "head")


def test_an_input_that_the_features_do_not_need_goes_and_is_named():
    swapped = swap(two_inputs(), Head(2), at="join")
    assert len(swapped.model.inputs) == 2
    x, late = keras.Input((4,), name="x"), keras.Input((2,), name="late")
    base = keras.Model([x, late], [L.Dense(3, name="a")(x), L.Dense(3, name="b")(late)])
    with pytest.raises(InputError, match="does not dominate"):
        swap(base, Head(2), at="a")


def u_net():
    x = image()
    down = L.Conv2D(4, 3, 2, padding="same", name="down")(x)
    up = L.UpSampling2D(name="up")(down)
    return keras.Model(x, L.Conv2D(2, 1, name="out")(L.Concatenate()([x, up])))


def shared():
    x, dense = keras.Input((4,), name="x"), L.Dense(4, name="twice")
    return keras.Model(x, L.Dense(2, name="old")(dense(dense(x))))


def two_outputs():
    x = keras.Input((4,), name="x")
    h = L.Dense(4, name="h")(x)
    return keras.Model(x, [L.Dense(2, name="one")(h), L.Dense(3, name="two")(h)])


def fixed():
    x = keras.Input(batch_shape=(4, 5), name="x")
    return keras.Model(x, L.Dense(2)(L.Dense(3, name="h")(x)))


def headless():
    return conv_net()


REFUSED = {
    "no head": (headless, {}, r"no head that is recognised.*name one with --at: relu 6x6x6, bn 6x6x6, conv 6x6x6"),
    "no such layer": (mlp, {"at": "nix"}, r"no layer 'nix'; name one with --at: old 3, relu_d7 7"),
    "something flows around": (u_net, {"at": "down"}, "'down' does not dominate the output"),
    "called twice": (shared, {"at": "twice"}, "called 2 times"),
    "two outputs": (two_outputs, {}, "2 outputs; name the feature point with --at"),
    "dropped too many": (mlp, {"drop": 4}, "cannot drop 4 layers"),
    "nothing is left": (mlp, {"drop": 3}, "nothing is left below input 'x'"),
    "a fixed batch": (fixed, {}, "batches of 4 only"),
    "a negative number": (mlp, {"drop": -1}, "cannot drop -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_cut_is_refused_in_one_line(case):
    build, options, words = REFUSED[case]
    with pytest.raises((InputError, UnsupportedModelError), match=words) as caught:
        swap(build(), Head(2), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("at", ["h", "one"])
def test_of_several_outputs_all_must_go_through_the_feature_point(at):
    found = graph.trace(two_outputs())
    (node,) = [node for node in found.nodes if node.name == at]
    assert dominates(found, node.outputs[0]) == (at == "h")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"outputs": 1}, "at least 2"),
        ({"outputs": 2, "task": "sigmoid"}, "one output"),
        ({"outputs": 2, "task": "words"}, "unknown"),
        ({"outputs": 2, "hidden": (0,)}, "above 0"),
        ({"outputs": 2, "dropout": 1.0}, "dropout"),
        ({"outputs": 2, "l1": -1.0}, "penalties"),
        ({"outputs": 2, "pooling": "deep"}, "unknown"),
    ],
)
def test_a_head_that_makes_no_sense_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        Head(**options)


def test_open_sizes_cannot_be_flattened():
    x = keras.Input((None, None, 3), name="image")
    base = keras.Model(x, L.Conv2D(2, 3, name="conv")(x))
    with pytest.raises(InputError, match="cannot be flattened"):
        swap(base, Head(2, pooling="flatten"), at="conv")
    assert swap(base, Head(2), at="conv").head.input.shape == (None, 2)


def test_names_flags_and_statistics_of_the_body_survive():
    base = conv_net(FLAT(name="gap"), L.Dense(4, "softmax", name="old"))
    swapped = swap(base, Head(2))
    assert [layer.name for layer in swapped.model.layers] == ["image", "conv", "bn", "relu", "gap", "head"]
    for name in ("conv", "bn"):
        for mine, theirs in zip(swapped.model.get_layer(name).weights, base.get_layer(name).weights, strict=True):
            assert np.array_equal(graph.numpy(mine), graph.numpy(theirs))
