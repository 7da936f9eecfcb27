"""Reading and rebuilding graphs: the copy computes the same, and says the same of itself."""

from __future__ import annotations

import random

import keras
import numpy as np
import pytest
from nets import enliven, inputs_for

from deploykit import graph, runtimes
from deploykit.errors import UnsupportedModelError
from deploykit.export import export

L = keras.layers


def functional():
    x = keras.Input((8, 8, 3), name="image")
    y = L.Conv2D(4, 3, padding="same")(x / 127.5 - 1)
    y = L.Add()([y, L.Conv2D(4, 1)(L.BatchNormalization()(y))])
    return keras.Model(x, L.Dense(2, activation="softmax", name="class")(L.GlobalAveragePooling2D()(y)))


def sequential():
    return keras.Sequential([keras.Input((5,), name="x"), L.Dense(4, activation="relu"), L.BatchNormalization()])


def nested():
    inner = keras.Sequential([keras.Input((5,)), L.Dense(5), L.BatchNormalization()], name="inner")
    deeper = keras.Sequential([keras.Input((5,)), inner, L.ReLU()], name="deeper")
    x = keras.Input((5,), name="x")
    return keras.Model(x, inner(deeper(x)))


def dictionaries():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    return keras.Model({"b": b, "a": a}, {"sum": L.Add()([a, b]), "twice": L.Dense(2)(L.Concatenate()([b, a]))})


def shared():
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    dense = L.Dense(3)
    return keras.Model([a, b], L.Subtract()([dense(a), dense(b)]))


def multiple_outputs_of_one_layer():
    x = keras.Input((6, 3), name="x")
    y, h, c = L.LSTM(4, return_state=True, return_sequences=True, name="lstm")(x)
    return keras.Model(x, [y, h, c])


def embedding():
    x = keras.Input((7,), dtype="int32", name="tokens")
    return keras.Model(x, L.GlobalAveragePooling1D()(L.Embedding(5, 4, mask_zero=True)(x)))


def adapted():
    layer = L.Normalization()
    layer.adapt(np.random.default_rng(0).normal(5, 3, (50, 4)).astype(np.float32))
    return keras.Sequential([keras.Input((4,), name="x"), layer, L.Dense(2)])


def half_precision():
    return keras.Sequential([keras.Input((4,), name="x"), L.Dense(3, dtype="mixed_float16"), L.BatchNormalization()])


def cast_inside():
    x = keras.Input((4,), dtype="uint8", name="x")
    return keras.Model(x, L.Dense(2)(keras.ops.cast(x, "float32") * np.float32(0.1)))


MODELS = [
    functional, sequential, nested, dictionaries, shared, multiple_outputs_of_one_layer, embedding, adapted,
    half_precision, cast_inside,
]  # fmt: skip


@pytest.mark.parametrize("make", MODELS)
def test_the_canonical_model_is_the_same_model(make):
    model = enliven(make())
    copy = graph.canonical(model)
    inputs = inputs_for(model)
    for a, b in zip(graph.run(model, inputs), graph.run(copy, inputs), strict=True):
        np.testing.assert_array_equal(a, b)
    assert graph.signature(copy) == graph.signature(model)
    assert not any(isinstance(layer, keras.Model) for layer in copy.layers)


@pytest.mark.parametrize("make", MODELS)
def test_the_double_computes_in_float64(make):
    model = enliven(make())
    double = graph.replay(graph.trace(model), dtype="float64")
    inputs = inputs_for(model)
    for a, b in zip(graph.run(model, inputs), graph.run(double, inputs), strict=True):
        assert b.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=2e-2 if make is half_precision else 1e-4, atol=1e-2)
        assert not np.array_equal(a, b) or make in (embedding,)


def test_reading_and_rebuilding_leaves_the_model_alone():
    model = enliven(functional())
    before = [graph.numpy(w) for w in model.weights]
    nodes = [(len(op._inbound_nodes), len(op._outbound_nodes)) for op in model.operations]
    random.seed(1)
    state = random.getstate()
    graph.canonical(model)
    assert random.getstate() == state
    assert nodes == [(len(op._inbound_nodes), len(op._outbound_nodes)) for op in model.operations]
    assert all(np.array_equal(a, graph.numpy(b)) for a, b in zip(before, model.weights, strict=True))


def test_names_that_collide_are_told_apart_and_listed():
    inner = keras.Sequential([keras.Input((5,)), L.Dense(5, name="d")], name="inner")
    x = keras.Input((5,), name="x")
    found = graph.trace(keras.Model(x, L.Dense(2, name="d")(inner(x))))
    assert [node.name for node in found.nodes] == ["inner.d", "d"]  # the outermost keeps its name
    assert found.renamed == {"inner/d": "inner.d"}


def test_inner_layers_of_a_model_called_twice_have_two_calls():
    inner = keras.Sequential([keras.Input((5,)), L.Dense(5)], name="inner")
    x = keras.Input((5,), name="x")
    found = graph.trace(keras.Model(x, inner(inner(x))))
    assert [found.calls(node) for node in found.nodes] == [2, 2]


def test_a_nested_model_that_converts_its_input_stays_whole():
    inner = keras.Sequential([keras.Input((5,), dtype="float32"), L.Dense(5)], name="inner")
    x = keras.Input((5,), dtype="float16", name="x")
    found = graph.trace(keras.Model(x, inner(x)))
    assert [type(node.layer).__name__ for node in found.nodes] == ["Sequential"]


def shared_encoder():
    """A model that is called with a mask, which it keeps as one call, and without one."""
    encoder = keras.Model(a := keras.Input((9, 4)), L.Dense(4, name="d")(a), name="encoder")
    tokens = keras.Input((9,), dtype="int32", name="tokens")
    masked = encoder(L.Embedding(5, 4, mask_zero=True)(tokens))
    return keras.Model(tokens, encoder(masked))  # a functional model hands no mask on


@pytest.mark.filterwarnings("ignore:.*does not support masking")
def test_a_model_of_which_one_call_stays_whole_stays_whole_in_all():
    model = shared_encoder()
    calls = [node for node in graph.trace(model).nodes if node.name == "encoder"]
    assert len(calls) == 2
    copy = graph.canonical(model)
    assert copy.count_params() == model.count_params()  # the calls still share their weights
    assert copy.output_names == model.output_names == ["encoder"]


def test_an_inner_layer_does_not_take_the_name_of_an_output():
    inner = keras.Sequential([keras.Input((5,)), L.Dense(4, name="head"), L.ReLU(name="end")], name="head")
    x = keras.Input((5,), name="x")
    model = keras.Model(x, inner(x))
    copy = graph.canonical(model)
    assert copy.output_names == model.output_names == ["head"]
    assert graph.trace(model).renamed == {"head/head": "head.head"}


def call_order_of_nested_outputs():
    """Inside the model its second output is made first; the outer graph asks for another order."""
    a = keras.Input((5,), name="a")
    layer = L.Dense(5, name="d")
    inner = keras.Model(a, [layer(a), a], name="inner")
    x = keras.Input((5,), name="x")
    one, same = inner(x)
    two, _ = inner(same)
    return keras.Model(x, L.Subtract()([two, one]))


@pytest.mark.filterwarnings("ignore:.*does not support masking")
@pytest.mark.parametrize("make", [nested, shared_encoder, call_order_of_nested_outputs])
def test_a_copy_of_a_copy_has_the_same_config(make):
    once = graph.canonical(make())
    assert graph.canonical(once).get_config() == once.get_config()


# ------------------------------------------------------------------------------------------- channels in front

IN_FRONT = {
    "conv": ((3, 8, 7), lambda f: L.Conv2D(4, 3, padding="same", strides=2, data_format=f)),
    "bias along the width": ((4, 8, 8), lambda f: L.Conv2D(6, 3, data_format=f)),
    "conv1d": ((3, 9), lambda f: L.Conv1D(4, 3, data_format=f)),
    "conv3d": ((3, 5, 6, 4), lambda f: L.Conv3D(4, 2, data_format=f)),
    "groups": ((4, 8, 7), lambda f: L.Conv2D(6, 3, groups=2, data_format=f)),
    "depthwise": ((3, 8, 7), lambda f: L.DepthwiseConv2D(3, depth_multiplier=2, data_format=f)),
    "separable": ((3, 8, 7), lambda f: L.SeparableConv2D(5, 3, data_format=f)),
    "transpose": ((3, 8, 7), lambda f: L.Conv2DTranspose(5, 3, strides=2, data_format=f)),
    "max": ((3, 8, 7), lambda f: L.MaxPooling2D(padding="same", data_format=f)),
    "average": ((3, 8, 7), lambda f: L.AveragePooling2D(2, data_format=f)),
    "global": ((3, 8, 7), lambda f: L.GlobalAveragePooling2D(data_format=f)),
    "global kept": ((3, 8, 7), lambda f: L.GlobalMaxPooling2D(data_format=f, keepdims=True)),
    "upsampling": ((3, 4, 5), lambda f: L.UpSampling2D(2, interpolation="bilinear", data_format=f)),
    "padding": ((3, 8, 7), lambda f: L.ZeroPadding2D(((1, 0), (2, 1)), data_format=f)),
    "cropping": ((3, 8, 7), lambda f: L.Cropping2D(1, data_format=f)),
    "flatten": ((3, 8, 7), lambda f: L.Flatten(data_format=f)),
}


def front_and_behind(shape, make, axis, dtype=None):
    """A layer with channels in front, at ``axis``, and its twin with channels behind: (answers, twin's answers)."""
    x = keras.Input(shape, name="x")
    model = enliven(keras.Model(x, make("channels_first")(x)))
    behind = keras.Input((*shape[: axis - 1], *shape[axis:], shape[axis - 1]), name="x")
    other = keras.Model(behind, make("channels_last")(behind))
    other.set_weights(model.get_weights())
    models = [m if dtype is None else graph.replay(graph.trace(m), dtype=dtype) for m in (model, other)]
    inputs = inputs_for(model)
    return graph.run(models[0], inputs), graph.run(models[1], {"x": np.moveaxis(inputs["x"], axis, -1)})


@pytest.mark.parametrize("dtype", [None, "float64"])
@pytest.mark.parametrize("row", IN_FRONT)
def test_channels_in_front_give_what_channels_behind_give(row, dtype):
    shape, make = IN_FRONT[row]
    (first,), (last,) = front_and_behind(shape, make, 1, dtype)
    last = np.moveaxis(last, -1, 1) if last.ndim == len(shape) + 1 else last
    np.testing.assert_allclose(first, last, rtol=0, atol=1e-5 if dtype is None else 1e-13)


def _each(make):
    return lambda f: L.TimeDistributed(make(f))


def _twice(make):
    return _each(_each(make))


def _both_ways(make, merge_mode):
    return lambda f: L.Bidirectional(make(f), merge_mode=merge_mode)


def _memory(f, **arguments):
    return L.ConvLSTM2D(3, 2, data_format=f, **arguments)


VIDEO = (3, 2, 6, 5)  # steps, channels, height, width
IN_FRONT_LATER = {  # shape, axis of the channels before and after, or None where there are none any more
    "conv": (VIDEO, 2, 2, _each(lambda f: L.Conv2D(4, 3, strides=2, activation="tanh", data_format=f))),
    "conv1d": ((5, 3, 8), 2, 2, _each(lambda f: L.Conv1D(4, 3, data_format=f))),
    "separable": (VIDEO, 2, 2, _each(lambda f: L.SeparableConv2D(4, 3, data_format=f))),
    "max": (VIDEO, 2, 2, _each(lambda f: L.MaxPooling2D(data_format=f))),
    "bias along the width": (VIDEO, 2, 2, _each(lambda f: L.Conv2D(3, 3, data_format=f))),
    "global": (VIDEO, 2, None, _each(lambda f: L.GlobalAveragePooling2D(data_format=f))),
    "flatten": ((5, 3, 8), 2, None, _each(lambda f: L.Flatten(data_format=f))),
    "padding": (VIDEO, 2, 2, _each(lambda f: L.ZeroPadding2D(((1, 0), (2, 1)), data_format=f))),
    "wrapped twice": ((2, *VIDEO), 3, 3, _twice(lambda f: L.Conv2D(4, 3, data_format=f))),
    "memory": (VIDEO, 2, 1, _memory),
    "memory of all steps": ((3, 2, 6), 2, 2, lambda f: L.ConvLSTM1D(3, 2, return_sequences=True, data_format=f)),
    "both directions": (VIDEO, 2, 2, _both_ways(lambda f: _memory(f, return_sequences=True), "sum")),
}


@pytest.mark.parametrize("dtype", [None, "float64"])
@pytest.mark.parametrize("row", IN_FRONT_LATER)
def test_channels_behind_time_are_in_front_too(row, dtype):
    shape, axis, after, make = IN_FRONT_LATER[row]
    (first,), (last,) = front_and_behind(shape, make, axis, dtype)
    last = last if after is None else np.moveaxis(last, -1, after)
    np.testing.assert_allclose(first, last, rtol=0, atol=1e-5 if dtype is None else 1e-13)


def test_a_model_of_each_step_keeps_channels_in_front():
    """CNN-LSTM: one convolutional model for all frames; its replayed twin has its weights in another order."""

    def frame(f):
        shape = VIDEO[1:] if f == "channels_first" else (*VIDEO[2:], VIDEO[1])
        axis = 1 if f == "channels_first" else -1
        a = keras.Input(shape)
        y = L.BatchNormalization(axis=axis)(L.Conv2D(4, 2, data_format=f)(a))
        inner = keras.Sequential([keras.Input(y.shape[1:]), L.Conv2D(4, 1, data_format=f), L.ReLU()])
        return keras.Model(a, L.GlobalMaxPooling2D(data_format=f)(L.Add()([y, inner(y)])))

    (first,), (last,) = front_and_behind(VIDEO, _each(frame), 2)
    np.testing.assert_allclose(first, last, rtol=0, atol=1e-5)


def test_a_model_that_is_called_as_a_whole_keeps_channels_in_front():
    x = keras.Input((3, 6, 5), dtype="float16", name="x")
    conv = L.Conv2D(4, 3, data_format="channels_first")
    body = keras.Sequential([keras.Input((3, 6, 5), name="frame"), conv], name="body")
    model = enliven(keras.Model(x, body(x)))
    assert [type(node.layer) for node in graph.trace(model).nodes] == [keras.Sequential]
    inputs = inputs_for(model)
    frames = {"frame": inputs["x"].astype("float16")}
    np.testing.assert_array_equal(graph.run(model, inputs)[0], graph.run(body, frames)[0])
    (copy,) = [layer for layer in graph.runnable(model).layers if layer.name == "body"]
    assert {layer.data_format for layer in copy.layers if isinstance(layer, L.Conv2D)} == {"channels_last"}


@pytest.mark.filterwarnings("ignore:.*does not support masking")
def test_a_model_of_each_step_that_gets_a_mask_is_left_as_it_is():
    x = keras.Input(VIDEO, name="x")
    body = keras.Sequential([keras.Input(VIDEO[1:]), L.Conv2D(4, 3, data_format="channels_first")], name="body")
    copy = graph.runnable(keras.Model(x, L.TimeDistributed(body)(L.Masking()(x))))
    assert copy.layers[-1].layer.layers[-1].data_format == "channels_first"


@pytest.mark.parametrize("wrap", [lambda layer: layer, L.TimeDistributed])
def test_an_activation_along_the_last_axis_stays_along_it(wrap):
    """Which is the width where channels are in front, as Keras takes it."""
    x = keras.Input((3, 2, 6, 5) if wrap is L.TimeDistributed else (2, 6, 5), name="x")
    model, plain = (
        keras.Model(x, wrap(L.Conv2D(4, 3, activation=name, data_format="channels_first"))(x))
        for name in ("softmax", None)
    )
    plain.set_weights(enliven(model).get_weights())
    inputs = inputs_for(model)
    (found,), (logits,) = graph.run(model, inputs), graph.run(plain, inputs)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(found, np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), rtol=1e-5)


def test_a_memory_in_both_directions_joins_along_the_last_axis_and_gives_its_states():
    states = [keras.Input((3, 5, 4), name=f"s{i}") for i in range(4)]

    def net(f, merge_mode):
        front = f == "channels_first"
        x = keras.Input(VIDEO if front else (3, 6, 5, 2), name="x")
        given = states if front else [keras.Input((5, 4, 3), name=f"s{i}") for i in range(4)]
        layer = L.Bidirectional(_memory(f, return_state=True), merge_mode=merge_mode)
        return keras.Model([x, *given], list(layer(x, initial_state=given)))

    model, other = net("channels_first", "concat"), net("channels_last", None)
    other.set_weights(enliven(model).get_weights())
    inputs = inputs_for(model)
    found = graph.run(model, inputs)
    behind = {name: np.moveaxis(value, 2 if name == "x" else 1, -1) for name, value in inputs.items()}
    forth, back, *after = (np.moveaxis(y, -1, 1) for y in graph.run(other, behind))
    assert found[0].shape[1:] == (3, 5, 8)
    for a, b in zip(found, [np.concatenate([forth, back], -1), *after], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [
    lambda: L.TimeDistributed(_memory("channels_first", return_sequences=True)),
    lambda: _memory("channels_first", activation="softmax"),
])  # fmt: skip
def test_what_has_no_equivalent_with_channels_behind_is_left_as_it_is(layer):
    """TensorFlow says whether it can run it; a softmax of a memory is along another axis with channels behind."""
    made = layer()
    x = keras.Input((2, *VIDEO) if isinstance(made, L.TimeDistributed) else VIDEO, name="x")
    config = graph.runnable(keras.Model(x, made(x))).layers[-1].get_config()
    assert config == {**made.get_config(), **{key: config[key] for key in config if key == "build_config"}}


def test_a_model_without_channels_in_front_is_run_as_it_is():
    model = sequential()
    assert graph.runnable(model) is model


@pytest.mark.parametrize(("width", "found"), [(8, ("c",)), (9, ())])
def test_a_bias_along_the_width_is_named(width, found):
    x = keras.Input((4, 8, width))
    conv = L.Conv2D(6, 3, data_format="channels_first", name="c")
    body = keras.Sequential([keras.Input((4, 8, width)), conv], name="body")
    frames = keras.Input((2, 4, 8, width))
    distributed = keras.Model(frames, L.TimeDistributed(conv, name="c")(frames))
    of_model = keras.Model(frames, L.TimeDistributed(body, name="t")(frames))
    assert graph.misplaced_biases(keras.Model(x, conv(x))) == graph.misplaced_biases(distributed) == found
    assert graph.misplaced_biases(of_model) == tuple(f"t/{name}" for name in found)


def test_logits_are_seen_in_front_of_a_softmax():
    model = enliven(functional())
    double = graph.replay(graph.trace(model), dtype="float64", logits=True)
    probabilities, logits = graph.run(double, inputs_for(model))
    np.testing.assert_allclose(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), probabilities, rtol=1e-9)


def test_plausible_ranges_come_from_the_first_layers():
    def low_high(*layers, dtype="float32"):
        model = keras.Sequential([keras.Input((4,), dtype=dtype, name="x"), *layers])
        spec = graph.signature(model).inputs[0]
        return spec.low, spec.high

    assert low_high(L.Rescaling(1 / 255)) == (0.0, 255.0)
    assert low_high(L.Rescaling(1 / 127.5, offset=-1)) == (0.0, 255.0)
    assert low_high(L.Embedding(9, 2), dtype="int32") == (0.0, 8.0)
    assert low_high(L.Dense(2)) == (None, None)
    assert low_high(L.Normalization(mean=[1.0] * 4, variance=[4.0] * 4)) == (-3.0, 5.0)


def test_a_long_chain_is_no_recursion_error():
    x = y = keras.Input((4,), name="x")
    for _ in range(1200):
        y = L.ReLU()(y)
    import sys

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(30000)  # Keras itself needs it to build the model
    try:
        model = keras.Model(x, y)
    finally:
        sys.setrecursionlimit(limit)
    assert len(graph.trace(model).nodes) == 1200
    graph.canonical(model)
    assert sys.getrecursionlimit() == limit


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.first, self.norm = L.Dense(4, name="first"), L.BatchNormalization(name="norm")

    def call(self, x):
        return keras.ops.relu(self.norm(self.first(x)))


@keras.saving.register_keras_serializable("tests")
class Opaque(Subclassed):
    def call(self, x):
        return self.first(x) if float(keras.ops.sum(x)) > 0 else x


def test_a_subclassed_model_is_traced_where_its_call_allows():
    model = Subclassed()
    model(np.zeros((2, 3), np.float32))
    enliven(model)
    copy = graph.canonical(model)
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    np.testing.assert_allclose(graph.run(copy, {"input": x})[0], graph.numpy(model(x)), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: keras.Sequential([L.Dense(2)], name="loose"), "loose.*no input shape"),
        (lambda: (m := Opaque(name="odd"), m(np.ones((2, 3), np.float32)))[0], "Opaque 'odd'.*functional"),
        (lambda: Subclassed(name="unbuilt"), "Subclassed 'unbuilt'"),
    ],
)
def test_models_without_a_readable_graph_are_refused_by_name(make, says):
    with pytest.raises(UnsupportedModelError, match=says):
        graph.trace(make())


@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_model_of_one_batch_size_runs_any_number_of_samples(count):
    x = keras.Input(batch_shape=(3, 4), name="x")
    model = enliven(keras.Model(x, L.Dense(2)(keras.ops.reshape(keras.ops.reshape(x, (3, 2, 2)), (3, 4)))))
    inputs = inputs_for(model, 7)
    whole = graph.run(model, inputs)[0]
    some = graph.run(model, {"x": inputs["x"][:count]})[0]
    np.testing.assert_allclose(some, whole[:count], rtol=1e-6)


def test_an_output_without_a_batch_axis_is_refused():
    x = keras.Input((4,), name="x")
    model = keras.Model(x, keras.ops.mean(L.Dense(2)(x)))
    with pytest.raises(UnsupportedModelError, match="batch axis"):
        graph.run(model, inputs_for(model))


def test_what_tensorflow_cannot_run_is_one_line():
    @keras.saving.register_keras_serializable("tests")
    class OnlyWhole(L.Layer):
        def call(self, x):
            raise RuntimeError("\x1b[1mloud\x1b[0m\nthe device has no such kernel\nArguments received: x")

        def compute_output_spec(self, x):
            return keras.KerasTensor(x.shape, x.dtype)

    x = keras.Input((4,), name="x")
    model = keras.Model(x, OnlyWhole()(x))
    with pytest.raises(UnsupportedModelError, match="TensorFlow cannot run") as caught:
        graph.run(model, inputs_for(model))
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_layer_whose_config_forgets_its_name_keeps_it():
    @keras.saving.register_keras_serializable("tests")
    class Nameless(L.Layer):
        def call(self, x):
            return x + 1

        def get_config(self):
            return {}

    x = keras.Input((4,), name="x")
    model = keras.Model(x, Nameless(name="mine")(x))
    assert graph.signature(graph.canonical(model)) == graph.signature(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: L.Conv2D(4, 3, activation="relu"),
        lambda: L.MaxPooling2D(),
        lambda: L.BatchNormalization(),
        lambda: L.Flatten(),
        lambda: L.Dense(3),
        lambda: keras.Sequential([keras.Input((6, 5, 2)), L.Conv2D(3, 2), L.BatchNormalization(), L.Flatten()]),
        lambda: L.TimeDistributed(L.Dense(3)),
    ],
)
def test_any_number_of_steps_is_gone_through(make, tmp_path):
    """Keras 3.15 in a graph goes through as many steps as there are samples."""
    x = keras.Input((None, 6, 5, 2), name="x")
    model = keras.Model(x, L.TimeDistributed(make(), name="y")(x))
    enliven(model, 0)
    data = np.random.default_rng(0).normal(size=(3, 7, 6, 5, 2)).astype("float32")
    inner = model.get_layer("y").layer
    expected = np.stack([np.asarray(inner(data[:, step], training=False)) for step in range(7)], axis=1)
    for runtime, file in (("keras", model), ("onnxruntime-cpu", export(model, tmp_path / "net.onnx").path)):
        session = runtimes.open(runtime, file)
        np.testing.assert_allclose(session.run({"x": data})["y"], expected, rtol=1e-5, atol=1e-6)
