"""Bisect names the spoilt layer and no other; a right candidate has none."""

from __future__ import annotations

import json

import keras
import numpy as np
import onnx
import pytest
from nets import chain, enliven, inputs_for
from onnx import numpy_helper

from deploykit import graph
from deploykit.bisect import _Sums, layer_errors, layouts, twin_of
from deploykit.errors import InputError
from deploykit.export import export
from deploykit.fuse import fuse
from deploykit.runtimes import onnxruntime_cpu
from deploykit.verify import FLOAT32, POLICIES

L = keras.layers


def branching(seed=0, *, pool=L.MaxPooling2D):
    """Two branches, one of them with a fork inside; affines that fold backward, and a scale that moves forward."""
    x = keras.Input((12, 12, 3), name="x")
    left = L.BatchNormalization(name="left_bn")(L.Conv2D(6, 3, padding="same", name="left")(x))
    left = L.ReLU(name="left_relu")(left)
    right = L.Conv2D(6, 3, padding="same", name="right")(x)
    right = L.Conv2D(6, 1, name="right_2")(L.ReLU(name="right_relu")(right))
    y = pool(name="pool")(L.Add(name="add")([left, right]))
    y = L.DepthwiseConv2D(3, name="deep")(y)
    y = L.Activation("relu", name="deep_relu")(L.BatchNormalization(name="deep_bn")(y))
    y = L.Flatten(name="flat")(y)
    return enliven(keras.Model(x, [L.Dense(5, name="head")(y), L.Dense(2, name="side")(y)], name="net"), seed)


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """A net, its samples, its fused form and the ONNX files of both."""
    model = branching()
    samples = inputs_for(model, 8)
    fused = fuse(model, samples=samples)
    folder = tmp_path_factory.mktemp("bisect")
    export(fused.model, folder / "fused.onnx")
    export(model, folder / "plain.onnx")
    return model, samples, fused, folder


@pytest.fixture(scope="module")
def right(net):
    """The report on the file of the fused model."""
    model, samples, fused, folder = net
    return layer_errors(model, folder / "fused.onnx", samples, fused=fused)


def by_name(report):
    return {row.layer: row for row in report.rows}


# ------------------------------------------------------------------------------------------------ right ones


@pytest.mark.parametrize("case", ["Keras", "ONNX", "ONNX, nobody says how it was fused"])
def test_a_right_candidate_has_no_jump_and_its_folds_are_mapped(net, right, case):
    model, samples, fused, folder = net
    report = {
        "Keras": lambda: layer_errors(model, fused.model, samples),
        "ONNX": lambda: right,
        "ONNX, nobody says how it was fused": lambda: layer_errors(model, folder / "fused.onnx", samples),
    }[case]()
    rows = by_name(report)
    assert report.first is None
    assert {name for name, row in rows.items() if row.status == "skipped"} >= {"left_bn", "deep_bn"}
    assert rows["left"].reference == "left_bn"
    assert rows["deep"].reference == "deep_bn"
    assert rows["add"].reference is None
    assert {rows[name].status for name in ("left", "left_relu", "right", "add", "deep", "head", "side")} == {"same"}


def test_an_export_without_fusing_has_no_jump(net):
    model, samples, _, folder = net
    assert layer_errors(model, folder / "plain.onnx", samples).first is None


def test_rows_are_in_order_of_depth_and_json_is_strict(right):
    record = right.to_json()
    depths = [row["depth"] for row in record["layers"]]
    assert depths == sorted(depths)
    assert depths[0] == 1
    assert record["first"] is None
    assert {"layer", "class", "onnx_tensor", "snr_db", "own_snr_db", "ratio", "status"} <= set(record["layers"][0])
    json.dumps(record, allow_nan=False)


def test_a_scale_on_its_way_through_a_relu_is_moved_and_not_an_error():
    model = chain(
        (6,), L.Dense(5, name="a"), L.ReLU(name="relu"), L.BatchNormalization(name="bn"), L.ReLU(name="r2"), L.Dense(3)
    )
    bn = model.get_layer("bn")
    bn.beta.assign(np.zeros(5))
    bn.moving_mean.assign(np.zeros(5))
    bn.gamma.assign(np.linspace(0.5, 2, 5))
    samples = inputs_for(model, 32)
    fused = fuse(model, samples=samples)
    assert fused.decisions[0].outcome == "fused"
    report = layer_errors(model, fused.model, samples, fused=fused)
    assert report.first is None
    assert by_name(report)["a"].status == "moved"
    assert by_name(report)["relu"].reference == "bn"
    spoilt = graph.canonical(fused.model)  # a wrong layer shows in units of its own, too
    spoil_weight("a", "kernel", (0, 0), 1.01)(spoilt)
    assert layer_errors(model, spoilt, samples, fused=fused).first.layer == "a"


def test_layers_whose_tensors_have_other_layouts_have_no_jump(tmp_path):
    x = keras.Input((8, 5), name="x")
    left = L.TimeDistributed(L.Dense(4))(L.BatchNormalization()(L.LSTM(4, return_sequences=True, name="lstm")(x)))
    right = L.Dense(4, activation="gelu")(L.LayerNormalization()(L.Conv1D(4, 3, padding="causal")(x)))
    y = L.GlobalAveragePooling1D()(L.Dropout(0.5)(L.Concatenate()([left, right])))
    model = enliven(keras.Model(x, L.Softmax()(y)))
    export(model, tmp_path / "net.onnx")
    report = layer_errors(model, tmp_path / "net.onnx", inputs_for(model, 6))
    assert report.first is None
    assert sum(row.status == "same" for row in report.rows) >= 9


def test_a_constant_that_the_exporter_moves_is_no_jump_but_an_error_behind_it_is(tmp_path):
    """The half of an average goes into the scale behind it."""
    x = keras.Input((6, 6, 3), name="x")
    mean = L.Average(name="mean")([L.Conv2D(4, 1, name="a")(x), L.Conv2D(4, 1, name="b")(x)])
    model = enliven(keras.Model(x, L.ReLU(name="c")(L.BatchNormalization()(mean))))
    export(model, tmp_path / "net.onnx")
    samples = inputs_for(model, 8)
    report = layer_errors(model, tmp_path / "net.onnx", samples)
    assert report.first is None
    assert by_name(report)["mean"].status == "moved"
    assert by_name(report)["c"].status == "same"
    proto = onnx.load(tmp_path / "net.onnx")
    initializer(proto, "a/Conv/B", lambda value: 1.01 * value)
    onnx.save(proto, tmp_path / "net.onnx")
    assert layer_errors(model, tmp_path / "net.onnx", samples).first.layer == "a"


def test_nested_and_shared_layers_go_by_the_calls_they_make(tmp_path):
    inner = keras.Sequential([keras.Input((5,)), L.Dense(5, name="dense"), L.ReLU()], name="inner")
    x = keras.Input((5,), name="x")
    shared = L.Dense(5, name="shared")
    y = L.Dense(3, name="dense")(inner(shared(inner(shared(x)))))
    model = enliven(keras.Model(x, y))
    export(model, tmp_path / "net.onnx")
    report = layer_errors(model, tmp_path / "net.onnx", inputs_for(model, 16))
    assert report.first is None
    assert [(row.layer, row.call) for row in report.rows if row.layer == "shared"] == [("shared", 0), ("shared", 1)]
    assert by_name(report)["inner.dense"].status == "same"
    other = graph.canonical(model)
    spoil_weight("inner.dense", "kernel", (0, 0), 1.01)(other)
    assert layer_errors(model, other, inputs_for(model, 16)).first.label == "inner.dense"


# ------------------------------------------------------------------------------------------------ wrong ones


def spoil_weight(layer, weight, index, factor):
    def spoil(model):
        variable = getattr(model.get_layer(layer), weight)
        value = graph.numpy(variable).copy()
        value[index] *= factor
        variable.assign(value)

    return spoil


def with_config(layer, **changes):
    """A replacement for the model: the same weights, one layer with another config."""

    def rebuilt(model):
        return graph.replay(graph.trace(model), changes={layer: changes})

    return rebuilt


KERAS_FAULTS = {  # independent faults are all named
    "one weight, a bias dropped": (
        ["left", "right_2"],
        spoil_weight("left", "kernel", (1, 1, 0, 2), 1.01),
        spoil_weight("right_2", "bias", slice(None), 0.0),
    ),
    "a channel negated": (["right"], spoil_weight("right", "kernel", (Ellipsis, 3), -1.0)),
    "a folded bias dropped": (["deep"], spoil_weight("deep", "bias", slice(None), 0.0)),
    "both heads": (
        ["head", "side"],
        spoil_weight("head", "bias", 1, 1.01),
        spoil_weight("side", "bias", 0, 1.01),
    ),
    "other activations": (
        ["right_relu"],
        with_config("right_relu", negative_slope=0.01),
        with_config("deep_relu", activation="elu"),
    ),
    "NaN": (["right"], spoil_weight("right", "bias", 0, np.nan)),
}


@pytest.mark.parametrize("fault", KERAS_FAULTS)
def test_the_spoilt_layer_of_a_keras_model_is_named(net, fault):
    model, samples, fused, _ = net
    layers, *spoils = KERAS_FAULTS[fault]
    candidate = graph.canonical(fused.model)
    for spoil in spoils:
        candidate = spoil(candidate) or candidate
    report = layer_errors(model, candidate, samples, fused=fused)
    assert report.first.layer == layers[0]
    assert [row.layer for row in report.rows if row.status == "jump"] == layers


def test_a_layer_beside_a_larger_one_is_named(tmp_path):
    """One norm over both sees the price alone."""
    x = keras.Input((6,), name="x")
    price = L.Rescaling(1e6, name="scale")(L.Dense(1, name="price")(x))
    model = enliven(keras.Model(x, L.Concatenate(name="out")([price, L.Dense(1, "sigmoid", name="share")(x)])))
    export(model, tmp_path / "net.onnx")
    samples = inputs_for(model, 16)
    assert layer_errors(model, tmp_path / "net.onnx", samples).first is None
    proto = onnx.load(tmp_path / "net.onnx")
    (name,) = [tensor.name for tensor in proto.graph.initializer if tensor.name.startswith("share/MatMul")]
    initializer(proto, name, lambda value: -value)
    onnx.save(proto, tmp_path / "net.onnx")
    assert layer_errors(model, tmp_path / "net.onnx", samples).first.layer == "share"


def initializer(proto, name, change):
    (tensor,) = [tensor for tensor in proto.graph.initializer if tensor.name == name]
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))


def node(proto, name):
    (found,) = [node for node in proto.graph.node if node.name == name]
    return found


def scaled(index, factor):
    def change(value):
        value[index] *= factor
        return value

    return change


def attribute(proto, name, key, value):
    found = node(proto, name)
    kept = [entry for entry in found.attribute if entry.name != key]
    del found.attribute[:]
    found.attribute.extend([*kept, onnx.helper.make_attribute(key, value)])


def edit(kind, name, value):
    return lambda proto: kind(proto, name, value)


def fed_twice(proto):
    inputs = node(proto, "add/Add").input
    inputs[1] = inputs[0]


def nameless_without_bias(proto):
    """tf2onnx makes some convolutions anew, and calls them after what they read."""
    (found,) = [one for one in proto.graph.node if one.name in ("deep/Conv", "pool/Conv")]
    found.name = "pool/Conv"
    initializer(proto, found.input[2], lambda value: 0 * value)


ONNX_FAULTS = {
    "one weight, a flipped kernel": (
        ["left", "right"],
        edit(initializer, "left/Conv/W", scaled((2, 0, 1, 1), 1.01)),
        edit(initializer, "right/Conv/W", lambda value: value[..., ::-1].copy()),
    ),
    "channels exchanged, a bias dropped": (
        ["left", "right_2"],
        edit(initializer, "left/Conv/W", lambda value: value[[1, 0, 2, 3, 4, 5]]),
        edit(initializer, "right_2/Conv/B", lambda value: 0 * value),
    ),
    "dilation, other activation": (
        ["right", "left_relu"],
        lambda proto: attribute(proto, "right/Conv", "dilations", [2, 2]),
        lambda proto: attribute(proto, "right/Conv", "pads", [2, 2, 2, 2]),
        lambda proto: setattr(node(proto, "left_relu/Relu"), "op_type", "Elu"),
    ),
    "stride, and nothing behind it runs": (
        ["pool"],
        lambda proto: attribute(proto, "pool/MaxPool", "strides", [1, 1]),
    ),
    "other pooling": (["pool"], lambda proto: setattr(node(proto, "pool/MaxPool"), "op_type", "AveragePool")),
    "a branch fed twice": (["add"], fed_twice),
    "a convolution that has lost its name": (["deep"], nameless_without_bias),
    "a head": (["head"], edit(initializer, "head/Add/B", scaled(0, 1.1))),
}


@pytest.mark.parametrize("fault", ONNX_FAULTS)
def test_the_spoilt_layer_of_an_onnx_file_is_named(net, tmp_path, fault):
    model, samples, fused, folder = net
    layers, *spoils = ONNX_FAULTS[fault]
    proto = onnx.load(folder / "fused.onnx")
    for spoil in spoils:
        spoil(proto)
    onnx.save(proto, tmp_path / "spoilt.onnx")
    report = layer_errors(model, tmp_path / "spoilt.onnx", samples, fused=fused)
    assert report.first.layer == layers[0]
    assert [row.layer for row in report.rows if row.status == "jump"] == layers
    assert layers[0] in report.text().splitlines()[0]


def test_external_data_is_found_and_chunks_do_not_change_the_answer(net, right, tmp_path, monkeypatch):
    model, samples, fused, _ = net
    export(fused.model, tmp_path / "large.onnx", external_above=1)
    assert (tmp_path / "large.onnx.data").is_file()
    real, opened = onnxruntime_cpu.opened, []
    monkeypatch.setattr(onnxruntime_cpu, "opened", lambda *args: opened.append(args) or real(*args))
    monkeypatch.setattr("deploykit.bisect.CHUNK_ELEMENTS", 10_000)
    report = layer_errors(model, tmp_path / "large.onnx", samples, fused=fused)
    assert len(opened) > 3
    assert [(row.layer, row.status, row.onnx_tensor) for row in report.rows] == [
        (row.layer, row.status, row.onnx_tensor) for row in right.rows
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]


def test_the_twin_of_a_file_has_its_layers_and_is_right(net):
    model, samples, fused, folder = net
    twin = twin_of(model, folder / "fused.onnx")
    assert {layer.name for layer in twin.layers} == {layer.name for layer in fused.model.layers}
    for ours, theirs in zip(graph.run(twin, samples), graph.run(model, samples), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert twin_of(model, graph.canonical(model)) is None


@pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
def test_norms_over_batches_stay_within_the_range(size):
    rng = np.random.default_rng(0)
    r, own, error = (rng.normal(0, scale, (6, 50)) for scale in (1, 1e-7, 3e-7))
    sums = _Sums()
    for rows in (slice(0, 2), slice(2, 6)):
        sums.add(size * r[rows], size * (r + own)[rows], size * (r + error)[rows])
    allowed = 4 * np.linalg.norm(own) + 4 * 2.0**-23 * np.linalg.norm(r)
    assert sums.ratio(FLOAT32) == pytest.approx(np.linalg.norm(error) / allowed, rel=1e-6)
    assert sums.ratio(POLICIES["float16"]) == pytest.approx(100 * np.linalg.norm(error) / np.linalg.norm(r), rel=1e-6)


def test_a_file_that_names_no_layer_is_refused(net, tmp_path):
    model, samples, _, folder = net
    proto = onnx.load(folder / "fused.onnx")
    for position, found in enumerate(proto.graph.node):
        found.name = f"node_{position}"
    onnx.save(proto, tmp_path / "nameless.onnx")
    with pytest.raises(InputError, match="export the model again"):
        layer_errors(model, tmp_path / "nameless.onnx", samples)


@pytest.mark.parametrize(
    ("have", "want", "expected"),
    [
        ((2, 3, 4, 5), (2, 3, 4, 5), [(0, 1, 2, 3)]),
        ((2, 5, 3, 4), (2, 3, 4, 5), [(0, 2, 3, 1)]),
        ((2, 4, 4, 4), (2, 4, 4, 4), [(0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 1, 2)]),
        ((7, 2, 5), (2, 7, 5), [(1, 0, 2)]),
        ((2, 5, 1, 1), (2, 5), [(0, 1)]),
        ((6, 5), (2, 3, 5), [None]),
        ((2, 3), (2, 4), []),
    ],
)
def test_layouts(have, want, expected):
    assert layouts(have, want) == expected
