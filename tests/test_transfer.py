"""Training a head: what is computed once, what may change, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from dataclasses import replace

import keras
import numpy as np
import onnx
import pytest
from nets import enliven

import deploykit
from deploykit import graph
from deploykit.data import hold_samples
from deploykit.data.labelled import Labelled
from deploykit.errors import DataError, InputError, OutputError, TrainingError
from deploykit.export import export
from deploykit.export.lowering import LOWERINGS
from deploykit.inspection import inspect_body
from deploykit.load import load
from deploykit.signature import Signature, TensorSpec
from deploykit.transfer import Head, Phase, Recipe, features, swap, train, train_head
from deploykit.transfer.augmentation import AUGMENTATIONS, augmentation
from deploykit.transfer.recipe import OPTIMIZERS, SCHEDULES
from deploykit.transfer.sanity import sanity
from deploykit.transfer.training import evaluate, standard

L = keras.layers
QUICK = Recipe(head=Phase(epochs=12, learning_rate=0.02), tune=None, sanity=False)


def base(name="x", size=8):
    x = keras.Input((size, size, 1), name=name)
    seeds = iter(range(9))

    def normal():
        return keras.initializers.GlorotNormal(seed=next(seeds))

    y = L.Conv2D(6, 3, name="conv", kernel_initializer=normal())(x)
    y = L.ReLU(name="relu")(L.BatchNormalization(name="bn")(y))
    y = L.BatchNormalization(name="bn_2")(L.Conv2D(5, 3, name="conv_2", kernel_initializer=normal())(y))
    y = L.GlobalAveragePooling2D(name="gap")(y)
    return enliven(keras.Model(x, L.Dense(4, "softmax", name="old")(y)), positive=True)


SIGNATURE = Signature((TensorSpec("x", (None, 8, 8, 1), "float32"),), ())


def pictures(count=60, seed=0, classes=2):
    """Bright and dark ones; a class of them is easy to tell."""
    rng = np.random.default_rng(seed)
    numbers = np.arange(count).reshape(-1, 1, 1, 1) % classes
    return (rng.uniform(0, 0.3, (count, 8, 8, 1)) + 0.5 * numbers).astype(np.float32)


def labelled(count=60, seed=0, classes=2, task="classes", x=None):
    numbers = np.arange(count) % classes
    x = pictures(count, seed, classes) if x is None else x
    targets = {
        "classes": numbers,
        "multi-label": np.stack([numbers == 0, numbers == 1], axis=1).astype(np.float32),
        "regression": (2.0 * numbers[:, None] + 1).astype(np.float32),
    }[task]
    names = tuple(f"class {n}" for n in range(classes)) if task != "regression" else ()
    return Labelled(hold_samples(x, SIGNATURE, "made up"), targets, names, task, "made up")


def body_weights(model, names):
    return {name: [graph.numpy(weight) for weight in model.get_layer(name).weights] for name in names}


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


BODY = ("conv", "bn", "conv_2", "bn_2")


def test_phase_1_learns_the_task_and_leaves_the_body_bit_for_bit(tmp_path):
    net = base()
    trained = train_head(net, labelled(), test=labelled(seed=1), recipe=QUICK, folder=tmp_path)
    assert trained.accuracy["test"] == trained.accuracy["validation"] == 1.0
    assert trained.changed == ()
    before, after = body_weights(net, BODY), body_weights(trained.model, BODY)
    assert all(same(before[name], after[name]) for name in BODY)
    assert trained.phases[0].layers == ("head",)
    files = {}
    for name, model in (("old", net), ("new", trained.model)):
        export(model, tmp_path / f"{name}.onnx", without=[row.name for row in LOWERINGS])
        proto = onnx.load(tmp_path / f"{name}.onnx")
        files[name] = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    ours = [key for key in files["old"] if "conv" in key or "bn" in key]
    assert ours
    assert all(np.array_equal(files["old"][key], files["new"][key]) for key in ours)


def test_features_are_computed_once_and_again_when_anything_changes(tmp_path):
    data, net = labelled(), base()
    train_head(net, data, recipe=QUICK, folder=tmp_path)
    (stored,) = tmp_path.iterdir()
    made = stored.stat().st_mtime_ns
    train_head(net, data, recipe=replace(QUICK, seed=3), folder=tmp_path)
    assert [path.stat().st_mtime_ns for path in tmp_path.iterdir()] == [made]
    train_head(net, labelled(seed=5), recipe=QUICK, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    kernel = net.get_layer("conv").kernel
    kernel.assign(1.001 * graph.numpy(kernel))
    train_head(net, data, recipe=QUICK, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_stored_features_are_those_of_the_body(tmp_path):
    data, swapped = labelled(count=70), swap(base(), Head(2))
    features.compute(features.fused_body(swapped.body, data.samples)[0], data.samples, tmp_path / "f.npy")
    found = features.mapped(tmp_path / "f.npy")
    assert isinstance(found, np.memmap)
    (expected,) = graph.run(swapped.body, data.samples.head(data.count).arrays)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_views_are_augmented_copies_in_their_order(tmp_path):
    data, swapped = labelled(count=10), swap(base(), Head(2))
    changed = augmentation(("translation",), graph.signature(swapped.model))
    features.compute(swapped.body, data.samples, tmp_path / "f.npy", views=2, augmentation=changed)
    found = features.mapped(tmp_path / "f.npy").reshape(3, 10, -1)
    (expected,) = graph.run(swapped.body, data.samples.head(data.count).arrays)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5)
    assert (np.abs(found[1:] - expected).max(axis=2) > 1e-3).all(axis=0).any()
    recipe = replace(QUICK, augment=("translation",), views=2)
    trained = train_head(base(), labelled(), recipe=recipe, augmentation=changed, folder=tmp_path)
    assert trained.accuracy["train"] == 1.0


def test_what_standardised_the_features_is_in_the_weights_of_the_head(tmp_path):
    """The model judges raw features as the head judged standardised ones."""
    data = labelled()
    trained = train_head(base(), data, recipe=QUICK, folder=tmp_path)
    best = min(trained.phases[0].history["val_loss"])
    assert trained.loss["validation"] == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("spread", [1e-9, 1.0, 1e6])
def test_the_scale_of_features_is_that_of_all_of_them(spread):
    rng = np.random.default_rng(0)
    stored = (5 + spread * rng.standard_normal((9000, 3))).astype(np.float64)
    stored[:, 1] = 7.0
    mean, deviation = standard(stored, np.arange(9000))
    np.testing.assert_allclose(mean, stored.mean(axis=0), rtol=1e-5, atol=1e-5 * spread)
    assert deviation[1] == 1.0  # a constant feature is left as it is
    expected = 1.0 if spread == 1e-9 else stored.std(axis=0)[0]
    assert deviation[0] == pytest.approx(expected, rel=1e-5)


TUNE = replace(QUICK, tune=Phase(epochs=2, learning_rate=1e-2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unfreeze", "norms", "learning"),
    [(0, False, ()), (1, False, ("conv_2",)), (2, True, ("conv_2", "bn_2")), (None, False, ("conv", "conv_2")),
     (None, True, BODY)],
)  # fmt: skip
def test_phase_2_trains_the_top_of_the_body_and_no_statistics(unfreeze, norms, learning, tmp_path):
    recipe = replace(TUNE, unfreeze=unfreeze, train_norms=norms)
    trained = train_head(base(), labelled(), recipe=recipe, folder=tmp_path)
    assert len(trained.phases) == (1 if unfreeze == 0 else 2)
    if unfreeze != 0:
        assert trained.phases[1].layers == (*learning, "head")
    assert set(trained.changed) <= set(learning)


@pytest.mark.slow
def test_a_second_phase_that_is_worse_leaves_nothing_behind(tmp_path):
    bad = replace(QUICK, tune=Phase(epochs=2, learning_rate=10.0, optimizer="sgd", clipvalue=1e-3))
    plain = train_head(base(), labelled(), recipe=QUICK, folder=tmp_path)
    trained = train_head(base(), labelled(), recipe=bad, folder=tmp_path)
    if trained.phases[1].best is None:
        assert trained.changed == ()
        assert trained.loss == plain.loss
    else:
        assert trained.loss["validation"] < plain.loss["validation"]


def test_phase_2_keeps_the_statistics_of_frozen_norms(tmp_path):
    net = base()
    trained = train_head(net, labelled(), recipe=replace(TUNE, unfreeze=None), folder=tmp_path)
    assert {"conv", "conv_2"} & set(trained.changed)
    for name in ("bn", "bn_2"):
        assert same(body_weights(net, [name])[name], body_weights(trained.model, [name])[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "head"),
    [("classes", None), ("classes", Head(1, "sigmoid")), ("multi-label", None), ("regression", None)],
)  # fmt: skip
def test_every_kind_of_answer_is_learned(task, head, tmp_path):
    recipe = replace(QUICK, head=Phase(epochs=60, learning_rate=0.05))
    data = labelled(task=task)
    trained = train_head(base(), data, head=head, recipe=recipe, test=labelled(seed=1, task=task), folder=tmp_path)
    if task == "regression":
        assert trained.accuracy["test"] is None
        assert trained.loss["test"] < 0.05 * np.var(data.targets)
    else:
        assert trained.accuracy["test"] > 0.97


def test_accuracy_and_loss_are_those_of_all_samples():
    data, model = labelled(count=300), swap(base(), Head(2)).model
    loss, accuracy = evaluate(model, data, "softmax")
    assert (loss, accuracy) == (pytest.approx(np.log(2)), 0.5)


# --------------------------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_a_step(name):
    optimizer = Phase(1, 0.1, name, clipnorm=1.0).build(name, {})
    assert (type(optimizer), optimizer.clipnorm) == (OPTIMIZERS[name], 1.0)
    variable = keras.Variable(np.ones(3, np.float32))
    optimizer.build([variable])
    optimizer.apply([np.array([1.0, 2.0, 3.0], np.float32)], [variable])
    assert (graph.numpy(variable) < 1).all()


def test_the_second_of_two_optimizers_finishes(tmp_path):
    recipe = replace(QUICK, head=Phase(epochs=6, learning_rate=0.05, optimizer="adam>sgd"))
    (record,) = train_head(base(), labelled(), recipe=recipe, folder=tmp_path).phases
    assert record.epochs == 6
    assert record.history["loss"][-1] < 0.8 * record.history["loss"][0]


def test_two_optimizers_share_the_epochs():
    assert Phase(9, 0.1, "adam>sgd").stages() == (("adam", 0, 6), ("sgd", 6, 9))
    assert Phase(1, 0.1, "adam>sgd").stages() == (("adam", 0, 1),)
    momentum = Phase(9, 0.1, "adam>sgd").build("sgd", {}).momentum
    assert (momentum, Phase(9, 0.1, "sgd").build("sgd", {}).momentum) == (0.9, 0.0)
    assert Phase(9, 0.1, "sgd", {"momentum": 0.5}).build("sgd", {}).momentum == 0.5


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", (1, 1, 1, 1)),
        ("cosine", (1, 0.853553, 0.5, 0.146447)),
        ("step", (1, 1, 0.1, 0.01)),
        ("exponential", (1, 0.316228, 0.1, 0.0316228)),
        ("plateau", (1, 1, 1, 1)),
    ],
)
def test_the_rate_of_a_step(schedule, factors):
    phase = Phase(4, 0.5, schedule=schedule)
    assert [phase.rate(step, 4) / 0.5 for step in range(4)] == pytest.approx(factors, rel=1e-5)
    warm = replace(phase, warmup=0.5)
    assert warm.rate(0, 4) == pytest.approx(0.5 * factors[0] / 3)
    assert set(SCHEDULES) == {"constant", "cosine", "step", "exponential", "plateau"}


@pytest.mark.slow
def test_a_plateau_lowers_the_rate(tmp_path):
    phase = Phase(epochs=16, learning_rate=1e-12, schedule="plateau")
    trained = train_head(base(), labelled(), recipe=replace(QUICK, head=phase), folder=tmp_path)
    rates = trained.phases[0].history["learning_rate"]
    assert rates[-1] <= 0.3 * rates[0]


@pytest.mark.slow
def test_patience_ends_a_phase(tmp_path):
    phase = Phase(epochs=50, learning_rate=1e-12, patience=3)
    (record,) = train_head(base(), labelled(), recipe=replace(QUICK, head=phase), folder=tmp_path).phases
    assert record.epochs < 50
    assert "without a better validation loss" in record.stopped


@pytest.mark.slow
def test_a_multiplier_of_zero_holds_a_layer(tmp_path):
    phase = Phase(epochs=2, learning_rate=1e-2, multipliers={"conv": 0.0})
    trained = train_head(base(), labelled(), recipe=replace(QUICK, tune=phase), folder=tmp_path)
    assert trained.changed == ("conv_2",)
    unknown = replace(QUICK, tune=replace(phase, multipliers={"nix": 2.0}))
    with pytest.raises(InputError, match=r"trains no layer 'nix'.*conv"):
        train_head(base(), labelled(), recipe=unknown, folder=tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "at least 1"),
        ({"batch": 0}, "at least 1"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"learning_rate": float("nan")}, "above 0"),
        ({"schedule": "fast"}, "constant, cosine"),
        ({"warmup": 1.0}, "warm-up"),
        ({"optimizer": "adm"}, "sgd, adagrad"),
        ({"optimizer": "adam>sgd>sgd"}, "unknown"),
        ({"options": {"momentum": 0.9}}, "adam has no option 'momentum'; it has "),
        ({"clipnorm": -1.0}, "clipnorm"),
        ({"multipliers": {"conv": -1.0}}, "multiplier"),
    ],
)
def test_a_phase_that_makes_no_sense_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        Phase(**{"epochs": 3, "learning_rate": 0.1, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"validation": 0.0}, "between 0 and 1"),
        ({"unfreeze": -1}, "0 or more"),
        ({"views": 1}, "--augment"),
        ({"views": -1}, "0 or more"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        Recipe(**options)


# -------------------------------------------------------------------------------------------- what goes wrong


def test_a_loss_that_is_not_finite_ends_it_and_keeps_the_best(tmp_path):
    swapped = swap(base(), Head(2))
    recipe = replace(QUICK, tune=Phase(epochs=5, learning_rate=1e30, optimizer="sgd"))
    words = r"tune: the (validation )?loss is (nan|inf).*epoch \d+.*learning rate"
    with pytest.raises(TrainingError, match=words) as caught:
        train(swapped, labelled(), recipe, folder=tmp_path)
    assert caught.value.usable
    assert all(np.isfinite(graph.numpy(weight)).all() for weight in swapped.model.weights)
    _, accuracy = evaluate(swapped.model, labelled(), "softmax")
    assert accuracy == 1.0


def test_features_that_are_not_finite_are_refused_and_leave_no_file(tmp_path):
    x = pictures()
    x[7] = 1e38
    data = labelled(x=x)
    with pytest.raises(DataError, match="no finite features for sample 7"):
        features.compute(swap(base(), Head(2)).body, data.samples, tmp_path / "f.npy")
    assert not list(tmp_path.iterdir())


def test_a_cache_without_room_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    usage = features.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda folder: usage._replace(free=100))
    with pytest.raises(OutputError, match=r"features need 0 MiB.*--cache"):
        train_head(base(), labelled(), recipe=QUICK, folder=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="--cache"):
        train_head(base(), labelled(), recipe=QUICK, folder=tmp_path / "file")


def judged(data, phase=Phase(epochs=5, learning_rate=2e-3), head=None):  # noqa: B008 -- frozen
    swapped = swap(base(), head or Head(len(data.classes)))
    (found,) = graph.run(swapped.body, data.samples.head(data.count).arrays)
    found = (found - found.mean(axis=0)) / found.std(axis=0)
    rows = np.arange(data.count)
    before = [graph.numpy(weight).copy() for weight in swapped.head.weights]
    result = sanity(swapped.head, lambda picked: found[picked], rows, data.targets, phase, swapped.task)
    assert same(before, [graph.numpy(weight) for weight in swapped.head.weights])  # copies only
    return {finding.check: finding for finding in result}


def test_a_sane_start_is_as_expected():
    found = judged(labelled(classes=3))
    assert found["initial loss"].value == pytest.approx(np.log(3))
    assert {name: finding.passed for name, finding in found.items()} == dict.fromkeys(found, True)


def test_samples_that_contradict_one_another_cannot_be_learned():
    x = pictures(2)[:1] + 1e-3 * pictures()
    x[1::2] = x[::2]
    assert not judged(labelled(x=x))["overfit a handful"].passed


@pytest.mark.parametrize(("rate", "hidden", "word"), [(1e-8, (8,), "small"), (1.0, (), "large")])
def test_a_rate_that_cannot_work_is_seen_before_the_run(rate, hidden, word):
    data = labelled()
    data.targets[:] = np.random.default_rng(0).integers(0, 2, data.count)  # never learned, so that steps stay large
    found = judged(data, Phase(epochs=5, learning_rate=rate), Head(2, hidden=hidden))["update ratio"]
    assert not found.passed
    assert f"too {word}" in found.advice


# ----------------------------------------------------------------------------------------------- augmentation


@pytest.mark.slow
def test_augmentation_is_in_no_file(tmp_path):
    recipe = replace(TUNE, augment=tuple(AUGMENTATIONS))
    changed = augmentation(recipe.augment, graph.signature(base()))
    trained = train_head(base(), labelled(), recipe=recipe, augmentation=changed, folder=tmp_path)
    trained.model.save(tmp_path / "new.keras")
    body = inspect_body(load(tmp_path / "new.keras"))
    assert {layer["name"] for layer in body["layers"]} == {"conv", "bn", "relu", "conv_2", "bn_2", "gap", "head"}
    export(trained.model, tmp_path / "new.onnx")
    assert not [node.op_type for node in onnx.load(tmp_path / "new.onnx").graph.node if "Random" in node.op_type]


def test_augmentation_changes_images_and_refuses_what_is_none():
    signature = graph.signature(base())
    x = pictures()
    for name in AUGMENTATIONS:
        assert not np.array_equal(graph.numpy(augmentation((name,), signature)(x, training=True)), x), name
    with pytest.raises(InputError, match="choose from flip"):
        augmentation(("blur",), signature)
    vectors = keras.Input((4,), name="x")
    with pytest.raises(InputError, match="no image"):
        augmentation(("flip",), graph.signature(keras.Model(vectors, L.Dense(2)(vectors))))


# ------------------------------------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swap")
    base().save(folder / "base.keras")
    for name, seed in (("train", 0), ("test", 1)):
        data = labelled(seed=seed)
        np.savez(folder / f"{name}.npz", x=pictures(seed=seed), y=data.targets, classes=np.array(data.classes))
    np.savez(folder / "one.npz", x=pictures(), y=np.zeros(60, np.int64))
    return folder


def test_the_command_writes_a_model_that_plain_keras_loads_and_deploy_knows(files):
    command = [sys.executable, "-m", "deploykit.cli", "swap-head", "base.keras", "--cache", "cache"]
    quick = ("--epochs", "12,2", "--learning-rate", "0.02,1e-4", "--optimizer", "sgd", "--option", "momentum=0.9")
    given = ("--data", "train.npz", "--test", "test.npz", "-o", "new.keras", "--json", "new.json")
    done = subprocess.run([*command, *given, *quick], cwd=files, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((files / "new.json").read_text())
    assert report["schema"] == "deploykit.swap_head/1"
    assert report["accuracy"]["test"] == 1.0
    assert [c["name"] for c in report["classes"]] == ["class 0", "class 1"]
    assert report["body_unchanged"] == (report["body_changed"] == [])
    assert [phase["phase"] for phase in report["phases"]] == ["head", "tune"]
    assert report["recipe"]["head"]["options"] == {"momentum": 0.9}
    model = keras.saving.load_model(files / "new.keras", safe_mode=True)
    assert model.output_shape == (None, 2)
    with zipfile.ZipFile(files / "new.keras") as archive:
        assert json.loads(archive.read("metadata.json"))["deploykit"]["classes"] == ["class 0", "class 1"]
    loaded = load(files / "new.keras")
    assert loaded.about["recipe"]["head"]["epochs"] == 12
    data = deploykit.DataOptions(str(files / "test.npz"))
    deploykit.deploy(loaded, files / "bundle", data=data, seconds=0.2)
    manifest = json.loads((files / "bundle" / "deploykit.json").read_text())
    assert manifest["class_names"] == ["class 0", "class 1"]
    assert manifest["accuracy"]["keras"] == manifest["accuracy"]["onnx"] == 1.0
    assert manifest["training"]["accuracy"]["test"] == 1.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--data", "one.npz", "-o", "a.keras"), "class"),
        (("--data", "train.npz", "-o", "a.keras", "--at", "nix"), "no layer 'nix'"),
        (("--data", "train.npz", "-o", "base.keras", "--force"), "base.keras"),
        (("--data", "train.npz", "-o", "a.keras", "--unfreeze", "some"), "a number of layers, all or none"),
        (("--data", "train.npz", "-o", "a.keras", "--option", "momentum=fast"), "NAME=NUMBER"),
        (("--data", "train.npz", "-o", "a.keras", "--epochs", "a"), "for each phase"),
        (("--data", "nowhere", "-o", "a.keras"), "nowhere"),
    ],
)
def test_bad_input_is_one_line(files, options, words, cli, monkeypatch):
    monkeypatch.chdir(files)
    code, out, err = cli("swap-head", "base.keras", "--cache", "cache", *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert not (files / "a.keras").exists()


def test_what_was_good_before_the_loss_diverged_is_kept(files, cli, monkeypatch):
    monkeypatch.chdir(files)
    options = ("--epochs", "8,5", "--learning-rate", "0.02,1e30", "--optimizer", "sgd", "--no-sanity")
    given = ("--data", "train.npz", "-o", "far.keras", "--cache", "cache")
    code, _, err = cli("swap-head", "base.keras", *given, *options)
    assert (code, "far.last-good.keras" in err) == (2, True), err
    assert not (files / "far.keras").exists()
    assert keras.saving.load_model(files / "far.last-good.keras", safe_mode=True).output_shape == (None, 2)
