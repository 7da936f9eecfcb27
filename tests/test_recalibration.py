"""Recalibrating: the statistics written are those that numpy finds in float64, by plain Keras, at every layer."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import SHARED
from nets import chain, enliven, inputs_for

from deploykit.data import Samples, Stream
from deploykit.errors import DataError, InputError, ProofError, UnsupportedModelError
from deploykit.transfer import recalibration
from deploykit.transfer.recalibration import Moments, moments, recalibrate

L = keras.layers
BN = L.BatchNormalization
METHODS = ("sequential", "joint")


def drawn(model: keras.Model, count: int = 40, seed: int = 1, labels: np.ndarray | None = None) -> Samples:
    return Samples(inputs_for(model, count, seed), "drawn", labels)


def norms(model: keras.Model) -> list[BN]:
    return [layer for layer in model._flatten_layers() if isinstance(layer, BN)]


def answers(model: keras.Model, arrays: dict[str, np.ndarray]) -> np.ndarray:
    given = [arrays[symbol.name] for symbol in model.inputs]
    return np.asarray(model(given if isinstance(model.input, list) else given[0], training=False).numpy())


def entering(model: keras.Model, layer: BN, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What plain Keras hands to a layer, for each of its calls."""
    symbols = [node.input_tensors[0] for node in layer._inbound_nodes]
    return [answers(keras.Model(model.inputs, symbol), arrays).astype(np.float64) for symbol in symbols]


def expected(values: list[np.ndarray], axis: int = -1) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance per channel of all values together, by numpy in float64."""
    flat = np.concatenate([np.moveaxis(value, axis, -1).reshape(-1, value.shape[axis]) for value in values])
    return flat.mean(0), flat.var(0)


def agrees(layer: BN, mean: np.ndarray, variance: np.ndarray, digits: float = 1e-5) -> None:
    scale = np.sqrt(variance + layer.epsilon)
    stored = [np.asarray(value.numpy(), np.float64) for value in (layer.moving_mean, layer.moving_variance)]
    np.testing.assert_array_less(np.abs(stored[0] - mean), digits * (scale + np.abs(mean)) + 1e-12)
    np.testing.assert_array_less(np.abs(stored[1] - variance), digits * (variance + layer.epsilon) + 1e-12)


# ------------------------------------------------------------------------------------------------- the nets


def conv_chain() -> keras.Model:
    steps = [L.Conv2D(4, 3), BN(), L.ReLU(), L.DepthwiseConv2D(3), BN(scale=False), L.ReLU(), L.Flatten(), L.Dense(3)]
    return chain((9, 9, 2), *steps, BN(center=False))


def branches() -> keras.Model:
    x = keras.Input((6,), name="x")
    trunk = L.ReLU()(BN(name="trunk")(L.Dense(5)(x)))
    left, right = (BN(name=name)(L.Dense(4)(trunk)) for name in ("left", "right"))
    return enliven(keras.Model(x, BN(name="sum")(L.Add()([left, right]))))


def siamese() -> keras.Model:
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    dense, bn = L.Dense(5), BN(name="shared")
    return enliven(keras.Model([a, b], L.Subtract()([bn(dense(a)), bn(dense(L.ReLU()(b)))])))


def second_axis() -> keras.Model:
    return chain((5, 7), BN(axis=1), L.Permute((2, 1)), L.Conv1D(4, 2), BN(axis=-2), L.ReLU(), BN())


def channels_first() -> keras.Model:
    first = {"data_format": "channels_first"}
    return chain(
        (3, 8, 6), L.Conv2D(4, 3, **first), BN(axis=1), L.MaxPooling2D(**first), L.Conv2D(5, 2, **first), BN(1)
    )


def frozen() -> keras.Model:
    """Keras ignores training=True of a layer that is frozen."""
    x = keras.Input((6,), name="x")
    model = keras.Model(x, BN(trainable=False, name="bn")(L.Dense(5)(x), training=True))
    return enliven(model)


def half() -> keras.Model:
    steps = [L.Dense(5, dtype="mixed_bfloat16"), BN(dtype="mixed_bfloat16"), L.Dense(4, dtype="mixed_bfloat16")]
    return chain((6,), *steps, BN(dtype="mixed_bfloat16"))


NETS = {
    "convolutions": (conv_chain, 3),
    "branches share a pass": (branches, 3),
    "a shared layer pools its calls": (siamese, 1),
    "any axis": (second_axis, 3),
    "channels first": (channels_first, 2),
    "frozen": (frozen, 1),
    "mixed precision": (half, 2),
    "dropout is off": (lambda: chain((6,), L.Dropout(0.5), L.Dense(5), L.GaussianNoise(1.0), BN()), 1),
    "synchronized": (lambda: chain((6,), L.Dense(5), BN(synchronized=True)), 1),
    "one batch size": (
        lambda: enliven(keras.Model(x := keras.Input(batch_shape=(8, 6), name="x"), BN()(L.Dense(4)(x)))),
        1,
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_what_is_stored_is_what_enters(name):
    build, passes = NETS[name]
    model, batch = build(), 8 if name == "one batch size" else 16
    data = drawn(model)
    found = recalibrate(model, data, batch=batch)
    assert (found.proven, found.reason, found.passes, found.samples) == (True, None, passes, 40)
    assert len(found.layers) == len(norms(model))
    reads = found.model
    if name == "channels first":  # Keras cannot run it on a CPU
        reads = recalibration.runnable(found.model)
    digits = 2e-2 if name == "mixed precision" else 1e-5  # Keras' graph and its eager run round bfloat16 differently
    for layer in norms(reads):
        agrees(layer, *expected(entering(reads, layer, dict(data.arrays)), layer.axis), digits)


def test_the_size_of_a_batch_does_not_matter():
    model = conv_chain()
    data = drawn(model, 41)
    one, other = (recalibrate(model, data, batch=size).model for size in (7, 41))
    for a, b in zip(one.weights, other.weights, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-5, atol=1e-6)


def test_the_rest_of_the_model_stays_as_it_is_and_the_model_given_too():
    inner = keras.Sequential([keras.Input((5,)), L.Dense(4, name="in"), BN(name="bn"), L.ReLU()], name="body")
    x = keras.Input((6,), name="image")
    model = enliven(
        keras.Model(
            x,
            L.Dense(2, name="head")(
                inner(L.Dense(5, name="first")(L.Normalization(mean=[1] * 6, variance=[4] * 6)(x)))
            ),
            name="net",
        )
    )
    before = [value.copy() for value in model.get_weights()]
    data = Samples({"image": inputs_for(chain((6,), L.Dense(1)), 30)["x"]}, "drawn")
    new = recalibrate(model, data).model
    assert all((a == b).all() for a, b in zip(before, model.get_weights(), strict=True))
    assert new.name == "net"
    assert [layer.name for layer in new._flatten_layers()] == [layer.name for layer in model._flatten_layers()]
    same = {a.path for a, b in zip(new.variables, model.variables, strict=True) if (a.numpy() == b.numpy()).all()}
    assert {path for v in new.variables if (path := v.path) not in same} == {"bn/moving_mean", "bn/moving_variance"}
    body = new.get_layer("body")
    handed = keras.Model(new.inputs, new.get_layer("first").output)([data.arrays["image"]])
    entered = keras.Model(body.inputs, body.get_layer("in").output)(handed).numpy().astype(np.float64)
    agrees(body.get_layer("bn"), entered.mean(0), entered.var(0))


def test_steps_of_a_sequence_are_pooled():
    model = chain((4, 6), L.TimeDistributed(BN(name="inside"), name="steps"), L.Dense(3))
    data = drawn(model)
    found = recalibrate(model, data)
    assert [row.layer for row in found.layers] == ["steps/inside"]
    agrees(norms(found.model)[0], *expected([data.arrays["x"].astype(np.float64)]))


def test_a_layer_that_is_called_directly_and_in_a_wrapper_has_one_mean():
    bn, x = BN(name="shared"), keras.Input((4, 6), name="x")
    pooled = L.GlobalAveragePooling1D()(x)
    model = enliven(keras.Model(x, [L.TimeDistributed(bn, name="steps")(x), bn(pooled)]))
    data = drawn(model)
    # Keras cannot read such a model back from a file, so that there is no new one to look at
    (seen,) = recalibration._Net(model).survey(data, None, str, strict=True).seen.values()
    entered = data.arrays["x"].astype(np.float64)
    mean, variance = expected([entered, entered.mean(1)])
    np.testing.assert_allclose(seen.mean, mean, atol=1e-6)
    np.testing.assert_allclose(seen.variance, variance, rtol=1e-5)


def masked_net(axis: int = -1) -> keras.Model:
    x = keras.Input((5,), dtype="int32", name="x")
    return enliven(keras.Model(x, BN(axis=axis)(L.Embedding(9, 3, mask_zero=True)(x))))


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("method", METHODS)
def test_masked_positions_do_not_count(method, axis):
    model = masked_net(axis)
    words = np.random.default_rng(0).integers(0, 9, (30, 5)).astype("int32")
    words[:, 3:] = 0
    words[:2, 3:] = 4
    found = recalibrate(model, Samples({"x": words}, "words"), method=method, batch=7).model
    (layer,) = norms(found)
    entered = np.asarray(found.layers[1].embeddings.numpy(), np.float64)[words]
    values = np.moveaxis(entered, axis, -1).reshape(-1, entered.shape[axis])
    live = np.moveaxis(np.broadcast_to((words != 0)[..., None], entered.shape), axis, -1).reshape(values.shape)
    kept = [values[live[:, channel], channel] for channel in range(values.shape[1])]
    agrees(layer, np.array([v.mean() for v in kept]), np.array([v.var() for v in kept]))


def test_all_copies_of_the_statistics_of_batch_renormalisation_are_set():
    model = chain((6,), L.Dense(4), BN(renorm=True, name="bn"))
    data = drawn(model)
    layer = recalibrate(model, data).model.get_layer("bn")
    sigma = np.sqrt(layer.moving_variance.numpy() + layer.epsilon)
    np.testing.assert_allclose(layer.moving_stddev.numpy(), sigma, rtol=1e-5)
    np.testing.assert_allclose(layer.renorm_stddev.numpy(), sigma, rtol=1e-5)
    np.testing.assert_array_equal(layer.renorm_mean.numpy(), layer.moving_mean.numpy())


# ------------------------------------------------------------------------------------------------ arithmetic


def test_batches_are_combined_without_losing_digits():
    # mean² is 1e16 times the variance: a difference of sums of squares has no digit left in float64
    values = 1e8 + np.random.default_rng(0).normal(size=(1000, 3))
    parts = [moments(part, -1) for part in np.split(values, [1, 4, 300, 990])]
    total = sum(parts[1:], parts[0])
    assert (total.count == 1000).all()
    np.testing.assert_allclose(total.mean, values.mean(0), rtol=1e-14)
    np.testing.assert_allclose(total.variance, values.var(0), rtol=1e-7)


def test_a_batch_without_values_changes_nothing():
    some = moments(np.arange(6.0).reshape(3, 2), 1)
    none = moments(np.full((3, 2), np.nan), 1, np.zeros(3, bool))
    assert (none + none).finite
    for total in (some + none, none + some):
        assert isinstance(total, Moments)
        assert total.finite
        np.testing.assert_array_equal(total.mean, some.mean)
        np.testing.assert_array_equal(total.variance, [8 / 3] * 2)


# ----------------------------------------------------------------------------------------------------- joint


@pytest.mark.parametrize("batch", [40, 10])
def test_joint_normalises_by_batches_as_training_does(batch):
    source = conv_chain()
    clone = keras.models.clone_model(source)
    clone.set_weights(source.get_weights())
    for layer in norms(clone):
        layer.momentum = 0.0
    data = drawn(source)
    order = np.random.default_rng(5).permutation(40)
    seen = []
    for start in range(0, 40, batch):
        clone(data.arrays["x"][order[start : start + batch]], training=True)
        seen.append([(n.moving_mean.numpy().astype(np.float64), n.moving_variance.numpy()) for n in norms(clone)])
    found = recalibrate(source, data, method="joint", batch=batch, seed=5)
    assert (found.passes, found.batch) == (1, batch)
    for place, layer in enumerate(norms(found.model)):
        means, variances = (np.array([step[place][part] for step in seen]) for part in (0, 1))
        agrees(layer, means.mean(0), variances.mean(0) + means.var(0), 1e-4)
    assert found.proven == (batch == 40)
    if batch == 40:  # one batch of all: what it sees is what enters at inference
        for layer in norms(found.model):
            agrees(layer, *expected(entering(found.model, layer, dict(data.arrays))))
    else:
        assert "joint" in str(found.reason)
        assert max(row.after.worst_shift_sigma for row in found.layers) > recalibration.SETTLED


def test_joint_draws_its_batches_from_all_over_the_data():
    # sorted by class, a batch would be of one class and every layer would take its difference away
    model = chain((1,), L.Dense(4), BN(), L.ReLU(), L.Dense(4), BN(), seed=2)
    x = np.repeat([[-5.0], [5.0]], 64, axis=0) + np.random.default_rng(0).normal(size=(128, 1))
    data = Samples({"x": x.astype("float32")}, "sorted")
    joint, right = (recalibrate(model, data, method=method, batch=32).model for method in ("joint", "sequential"))
    ratio = norms(joint)[1].moving_variance.numpy() / norms(right)[1].moving_variance.numpy()
    print(ratio)
    assert np.abs(np.log(ratio)).max() < 0.5


# ------------------------------------------------------------------------------------------------ what is told


def test_the_report_says_how_far_each_layer_was_off():
    model = chain((2,), BN(name="bn", epsilon=0.5), L.Dense(1))
    layer = model.get_layer("bn")
    layer.moving_mean.assign([1.0, 0.0])
    layer.moving_variance.assign([3.5, 0.5])
    x = np.array([[-1.0, 2.0], [1.0, 4.0]] * 8, "float32")  # means 0 and 3, variances 1 and 1
    body = recalibrate(model, Samples({"x": x}, "x")).to_json()
    (row,) = body["layers"]
    assert (row["layer"], row["channels"]) == ("bn", 2)
    assert row["shift_sigma"] == pytest.approx(np.sqrt((0.5**2 + 3**2) / 2))
    assert row["worst_shift_sigma"] == pytest.approx(3)
    assert row["variance_ratio"] == pytest.approx(np.sqrt(1.5 / 4 * 1.5))
    assert row["worst_variance_ratio"] == pytest.approx(1.5 / 4)
    assert row["after"]["worst_shift_sigma"] < 1e-6
    assert row["after"]["worst_variance_ratio"] == pytest.approx(1)
    assert body["accuracy"] == {
        "before": None,
        "after": None,
        "loss_before": None,
        "loss_after": None,
        "samples": 0,
        "data": None,
        "reason": "the data has no labels",
    }


ENDS = {
    "softmax": (4, "softmax", keras.losses.SparseCategoricalCrossentropy()),
    "logits": (4, "linear", keras.losses.SparseCategoricalCrossentropy(from_logits=True)),
    "sigmoid": (1, "sigmoid", keras.losses.BinaryCrossentropy()),
}


@pytest.mark.parametrize(("end", "apart"), [("softmax", False), ("logits", True), ("sigmoid", False)])
def test_accuracy_and_loss_are_those_of_keras(end, apart):
    units, activation, loss = ENDS[end]
    model = chain((6,), L.Dense(5), BN(), L.ReLU(), L.Dense(units, activation=activation))
    labels = np.random.default_rng(3).integers(0, max(units, 2), (40, 1))
    data = drawn(model, labels=labels)
    test = drawn(model, 24, 7, labels[:24]) if apart else None
    found = recalibrate(model, data, test=test, batch=16)
    judged = test or data
    assert found.judged_on == judged.source
    assert found.accuracy is not None
    for at, score in zip((model, found.model), found.accuracy, strict=True):
        scores = answers(at, dict(judged.arrays))
        right = (scores.argmax(1) if units > 1 else scores[:, 0] > 0.5) == judged.labels[:, 0]
        wanted = (float(loss(judged.labels, scores)), right.mean(), judged.count)
        assert (score.loss, score.accuracy, score.samples) == pytest.approx(wanted, rel=1e-4)


def outputs_two() -> keras.Model:
    x = keras.Input((6,), name="x")
    return keras.Model(x, [BN()(x), L.Dense(2)(x)])


UNUSABLE = {
    "several outputs": (outputs_two, np.zeros(40, int)),
    "no class numbers": (lambda: chain((6,), BN()), np.zeros(40)),
    "of shape": (lambda: chain((6, 6), BN()), np.zeros(40, int)),
    "no sigmoid": (lambda: chain((6,), BN(), L.Dense(1)), np.zeros(40, int)),
    "run from 0 to 6, the model has 6 classes": (lambda: chain((6,), BN()), np.r_[np.zeros(39, int), 6]),
    "run from -1 to 0": (lambda: chain((6,), BN()), np.r_[np.zeros(39, int), -1]),
    "has no labels": (lambda: chain((6,), BN()), None),
}


@pytest.mark.parametrize("why", UNUSABLE)
def test_labels_that_give_no_accuracy(why):
    build, labels = UNUSABLE[why]
    model = build()
    data = drawn(model, labels=labels)
    assert why in str(recalibrate(model, data).why_not)
    with pytest.raises(InputError, match=why):
        recalibrate(model, drawn(model), test=data)


def test_a_fall_in_accuracy_is_told():
    model = chain((2,), BN(name="bn"), L.Dense(2), seed=4)
    data = drawn(model)
    labels = answers(model, dict(data.arrays)).argmax(1)
    found = recalibrate(model, Samples(data.arrays, "x", labels))
    assert found.accuracy is not None
    assert found.accuracy[0].accuracy == 1 > found.accuracy[1].accuracy
    assert "accuracy fell" in found.notices[0]


# -------------------------------------------------------------------------------------------------- bad input


def itself() -> keras.Model:
    x = keras.Input((6,), name="x")
    bn, dense = BN(name="again"), L.Dense(6)
    return enliven(keras.Model(x, bn(dense(bn(x)))))


@keras.saving.register_keras_serializable("test_recalibration")
class Live(L.Layer):
    def __init__(self, **options):
        super().__init__(**options)
        self.bn = BN(name="live", trainable=self.trainable)

    def build(self, shape):
        self.bn.build(shape)

    def call(self, x):
        return self.bn(x, training=True)


def by_batch() -> keras.Model:
    return chain((6,), Live(name="inside"))


class OwnNorm(BN):
    pass


def diverging() -> keras.Model:
    """The second layer gets infinities, whatever the first one stores."""
    model = chain((6,), BN(name="fine"), L.Dense(4, name="wide"), L.Activation("exponential"), BN(name="broken"))
    model.get_layer("wide").kernel.assign(np.full((6, 4), 1e4))
    return model


REFUSED = {
    "no BatchNormalization": (lambda: chain((6,), L.Dense(2)), 40, UnsupportedModelError),
    "again is called on what it has made": (itself, 40, UnsupportedModelError),
    "inside/live runs in training mode": (by_batch, 40, UnsupportedModelError),
    "holds a OwnNorm": (lambda: chain((6,), OwnNorm(name="own")), 40, UnsupportedModelError),
    "fewer than two values .* enter bn": (lambda: chain((6,), BN(name="bn")), 1, DataError),
    "NaN or infinity enters broken": (diverging, 40, DataError),
    "do not fit into float16": (
        lambda: chain((6,), BN(dtype="float16", name="bn"), L.Rescaling(0.1)),
        40,
        UnsupportedModelError,
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_has_no_statistics_is_refused(why):
    build, count, error = REFUSED[why]
    model = build()
    data = drawn(model, count)
    if "float16" in why:
        data = Samples({"x": data.arrays["x"] * 300}, "large")
    with pytest.raises(error, match=why):
        recalibrate(model, data)


def test_training_mode_that_a_caller_overrules_is_told():
    x = keras.Input((6,), name="x")
    model = enliven(keras.Model(x, BN(name="bn")(x, training=True)))
    found = recalibrate(model, drawn(model))
    assert found.notices[0].startswith("bn is called with training=True")
    assert not recalibrate(frozen(), drawn(model)).notices
    recalibrate(chain((6,), Live(name="inside", trainable=False)), drawn(model))  # frozen: Keras normalises as stored


def test_a_layer_called_on_what_it_made_is_taken_by_joint():
    model = itself()
    data = drawn(model)
    assert recalibrate(model, data, method="joint", batch=40).passes == 1


def test_statistics_that_let_the_net_overflow_are_mended():
    model = chain((6,), BN(name="first", epsilon=1e-12), L.Activation("exponential"), BN(name="second"), L.Dense(2))
    model.get_layer("first").moving_variance.assign([1e-12] * 6)
    labels = np.zeros(40, int)
    body = recalibrate(model, drawn(model, labels=labels)).to_json()
    assert not np.isfinite(body["layers"][1]["shift_sigma"])
    assert body["layers"][1]["after"]["worst_shift_sigma"] < 1e-5
    assert np.isfinite(body["accuracy"]["loss_after"])


def test_data_that_changes_proves_nothing():
    rng = np.random.default_rng(0)
    stream = Stream(np.arange(40), lambda rows: {"x": rng.normal(size=(len(rows), 6)).astype("float32")}, "a dice")
    with pytest.raises(ProofError, match=r"bn is off by .* the same each time"):
        recalibrate(chain((6,), BN(name="bn")), stream)


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def room(tmp_path):
    model = chain((6,), L.Dense(5), BN(name="bn"), L.Dense(3, activation="softmax"))
    model.save(tmp_path / "net.keras")
    arrays = inputs_for(model, 40)
    np.savez(tmp_path / "data.npz", **arrays, y=np.arange(40) % 3)
    np.savez(tmp_path / "plain.npz", **arrays)
    return tmp_path


def test_the_command_writes_a_file_and_a_report(cli, room):
    code, out, err = cli("recalibrate", room / "net.keras", "--data", room / "data.npz", "--json", room / "r.json")
    assert (code, err) == (0, "")
    assert "bn" in out
    assert "one pass" in out
    report = json.loads((room / "r.json").read_text())
    assert report["schema"] == "deploykit.recalibrate/1"
    assert report["outputs_written"] == [str(room / "net.recalibrated.keras")]
    assert (report["proven"], report["method"], report["samples"]) == (True, "sequential", 40)
    assert report["accuracy"]["data"] == str(room / "data.npz")
    new = keras.models.load_model(room / "net.recalibrated.keras")
    with np.load(room / "data.npz") as arrays:
        agrees(new.get_layer("bn"), *expected(entering(new, new.get_layer("bn"), {"x": arrays["x"]})))


def test_joint_is_written_but_not_proven(cli, room, monkeypatch):
    deep = chain((6,), L.Dense(5), BN(), L.ReLU(), L.Dense(5), BN())
    deep.save(room / "deep.keras")
    monkeypatch.setattr(recalibration, "BATCH", 10)
    arguments = ["--data", room / "plain.npz", "--method", "joint", "-o", room / "joint.keras", "--json", "-"]
    code, out, _ = cli("recalibrate", room / "deep.keras", *arguments)
    report = json.loads(out)
    assert (code, report["proven"]) == (0, False)
    assert "sequential is exact" in report["reason"]
    code, out, _ = cli("recalibrate", room / "deep.keras", *arguments[:-2], "--force")
    assert "NOT PROVEN" in out
    assert "not measured: the data has no labels" in out


def test_code_that_was_allowed_is_copied(cli, tmp_path):
    model = chain((6,), L.Lambda(lambda x: x * 2.0), BN(name="bn"))
    model.save(tmp_path / "code.keras")
    np.savez(tmp_path / "x.npz", **inputs_for(model, 20))
    arguments = ["recalibrate", tmp_path / "code.keras", "--data", tmp_path / "x.npz"]
    assert cli(*arguments)[0] == 2
    assert cli(*arguments, "--allow-code")[0] == 0


def test_a_graph_without_layers_is_refused(cli, tmp_path):
    model = chain((6,), BN(name="bn"))
    model.export(tmp_path / "graph", verbose=False)
    np.savez(tmp_path / "x.npz", **inputs_for(model, 20))
    code, _, err = cli("recalibrate", tmp_path / "graph", "--data", tmp_path / "x.npz")
    assert (code, "nothing to recalibrate" in err) == (2, True)


BAD = {
    "Missing option '--data'": [],
    "written as .keras": ["--data", "data.npz", "-o", "x.h5"],
    "exists already": ["--data", "data.npz", "-o", "plain.keras"],
    "would replace the input": ["--data", "data.npz", "-o", "net.keras", "--force"],
    "no accuracy on": ["--data", "data.npz", "--test", "plain.npz"],
    "no file, folder or Keras data set": ["--data", "nowhere"],
}


@pytest.mark.parametrize("why", BAD)
def test_bad_input_is_one_line_and_writes_nothing(cli, room, why, monkeypatch):
    monkeypatch.chdir(room)
    (room / "plain.keras").write_bytes(b"old")
    before = sorted(room.iterdir())
    code, out, err = cli("recalibrate", "net.keras", *BAD[why])
    assert (code, out) == (2, "")
    assert why in err
    assert err.count("\n") == 1
    assert sorted(room.iterdir()) == before
    assert (room / "plain.keras").read_bytes() == b"old"


# ----------------------------------------------------------------------------------------------- a real net


def two_classes(home: Path, part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """T-shirts (0) and pullovers (1) of Fashion-MNIST; IDX has a header of 16 (images) or 8 (labels) bytes."""
    kinds = (("images-idx3", 16), ("labels-idx1", 8))
    x, y = (
        np.frombuffer(gzip.decompress((home / f"{part}-{kind}-ubyte.gz").read_bytes()), "u1", -1, skip)
        for kind, skip in kinds
    )
    rows = np.random.default_rng(0).permutation(np.flatnonzero((y == 0) | (y == 2)))[:count]
    return x.reshape(-1, 28, 28, 1)[rows].astype("float32") / 255, (y[rows] == 2).astype("int64")


def test_a_net_trained_for_a_few_steps_knows_what_it_has_learned(tmp_path, cli):
    """21 steps of Adam on 200 images, momentum 0.99: a fifth of the way to the statistics that it needs."""
    home = SHARED / "data/keras/datasets/fashion-mnist"
    if not home.is_dir():
        pytest.skip("Fashion-MNIST is not beside this checkout")
    x, y = two_classes(home, "train", 200)
    test = two_classes(home, "t10k", 600)
    np.savez(tmp_path / "train.npz", x=x, y=y)
    np.savez(tmp_path / "test.npz", x=test[0], y=test[1])
    keras.utils.set_random_seed(0)
    sizes = [(16, 2), (32, 2), (32, 1), (32, 1), (32, 1), (32, 1)]
    blocks = [[L.Conv2D(n, 3, by, padding="same", use_bias=False), BN(), L.ReLU()] for n, by in sizes]
    head = [L.GlobalAveragePooling2D(), L.Dense(32, use_bias=False), BN(), L.ReLU(), L.Dense(2, activation="softmax")]
    model = keras.Sequential([keras.Input((28, 28, 1)), *itertools.chain(*blocks), *head])
    model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", run_eagerly=True)
    for start in range(0, 21 * 28, 28):
        rows = np.arange(start, start + 28) % 200
        model.train_on_batch(x[rows], y[rows])
    model.save(tmp_path / "scratch.keras")
    options = ["--data", tmp_path / "train.npz", "--test", tmp_path / "test.npz", "--json", "-"]
    code, out, err = cli("recalibrate", tmp_path / "scratch.keras", *options)
    assert code == 0, err
    report = json.loads(out)
    assert report["accuracy"]["samples"] == 600
    print(report["accuracy"])
    assert report["accuracy"]["before"] < 0.6
    assert report["accuracy"]["after"] > 0.85
    assert (report["passes"], report["proven"]) == (7, True)
    assert any("training configuration" in notice for notice in report["notices"])
