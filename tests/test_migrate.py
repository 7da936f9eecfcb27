"""Migrating: old files written by tf_keras itself, each run by it again, and everything that must not be written.

One process writes all the old files; each migration of one starts tf_keras once (about five seconds), so that what
can be judged without it is: the verdict on wrong answers, the guards, the ends of the process.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from nets import chain

from deploykit.errors import LoadError, UnsupportedModelError
from deploykit.fuse import proof as proofs
from deploykit.graph import trace
from deploykit.load import load
from deploykit.migrate import Migrated, NotProvenError, Proof, Witness, migrate
from deploykit.runtimes.tf_keras_process import paired, unlike, widened

L = keras.layers
migrating = importlib.import_module("deploykit.migrate")
ROOT = Path(__file__).resolve().parent.parent

WRITE = """
import sys
import numpy as np
import tf_keras as keras

L, out = keras.layers, sys.argv[1]
keras.utils.set_random_seed(1)


def alive(model):
    rng = np.random.default_rng(0)
    model.set_weights([w + rng.uniform(0.1, 0.6, w.shape).astype(w.dtype) for w in model.get_weights()])
    return model


@keras.saving.register_keras_serializable("own")
class Scale(L.Layer):
    def call(self, x):
        return x * 2.0


image = keras.Input((8, 8, 3), name="image")
x = L.ReLU()(L.BatchNormalization()(L.Conv2D(4, 3, padding="same")(image)))
cnn = alive(keras.Model(image, L.Dense(3, activation="softmax")(L.GlobalAveragePooling2D()(x))))
cnn.save(out + "/cnn.h5")
cnn.save(out + "/cnn.keras")
alive(cnn).save_weights(out + "/other.h5")

x = keras.Input((6, 3), name="steps")
both = L.Bidirectional(L.LSTM(4, return_sequences=True))(x)
alive(keras.Model(x, [L.GRU(3)(both), L.Dense(2)(both)])).save(out + "/recurrent.h5")

a, b = keras.Input((5,), name="b_first"), keras.Input((5,), name="a_second")
inner = keras.Sequential([L.Dense(4, activation="tanh"), L.Dense(2)], name="inner")
alive(keras.Model([a, b], [L.Subtract()([inner(a), inner(b)]), L.Concatenate()([a, b])])).save(out + "/nested.h5")

x = keras.Input((8, 8, 3))
alive(keras.Model(x, L.Conv2D(2, 3)(L.UpSampling2D(2, interpolation="bilinear")(x)))).save(out + "/resize.h5")

x = keras.Input((5,))
alive(keras.Model(x, L.Dense(2)(Scale(name="doubled")(x)))).save(out + "/custom.h5")

marker = out + "/ran"
x = keras.Input((5,))
code = eval(f"lambda t: (open({marker!r}, 'w').close(), t)[1]")
keras.Model(x, L.Lambda(code)(x)).save(out + "/bytecode.h5")
"""

OWN = """
import keras

@keras.saving.register_keras_serializable("own")
class Scale(keras.layers.Layer):
    def call(self, x):
        return x * 2.0
"""


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """A folder of files that tf_keras wrote."""
    folder = tmp_path_factory.mktemp("old")
    subprocess.run([sys.executable, "-c", WRITE, folder], check=True, capture_output=True)
    (folder / "ran").unlink(missing_ok=True)  # building the model ran it
    return folder


@pytest.fixture
def no_process(monkeypatch):
    """tf_keras must not be started."""

    def started(*arguments, **options):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", started)


@pytest.fixture
def spied(monkeypatch) -> list[subprocess.Popen]:
    """The processes that were started, in order."""
    found: list[subprocess.Popen] = []

    class Spy(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            found.append(self)

    monkeypatch.setattr(subprocess, "Popen", Spy)
    return found


def refused(result, *words) -> None:
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


# ------------------------------------------------------------------------------------------------- what is proven


COMMON = {"schema", "deploykit", "proven", "reason", "environment", "seconds", "model", "outputs_written", "notices"}
KEYS = {"format", "saved_by", "backend", "size_bytes", "proof"}
PROOF_KEYS = {"by", "precision", "why_not_float64", "error", "bound", "samples", "data", "outputs"}


def test_a_net_is_proven_in_float64_and_the_report_says_by_what(cli, old, tmp_path):
    target = tmp_path / "new.keras"
    code, out, err = cli("migrate", old / "cnn.h5", "-o", target, "--json", "-")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert set(report) >= COMMON | KEYS
    assert (report["schema"], report["proven"], report["reason"]) == ("deploykit.migrate/1", True, None)
    assert (report["format"], report["backend"]) == ("hdf5", "tensorflow")
    assert report["saved_by"].startswith("2.")
    assert report["outputs_written"] == [str(target)]
    proof = report["proof"]
    assert set(proof) == PROOF_KEYS
    assert proof["by"].startswith("tf_keras 2.")
    assert (proof["precision"], proof["samples"]) == ("float64", migrating.SAMPLES)
    assert proof["error"] <= proof["bound"] < 1e-10
    assert [output["name"] for output in proof["outputs"]] == ["dense"]
    new = keras.models.load_model(target, safe_mode=True)
    np.testing.assert_array_equal(new.get_weights()[0], load(old / "cnn.h5").model.get_weights()[0])


@pytest.mark.parametrize(("name", "outputs"), [("cnn.keras", 1), ("recurrent.h5", 2), ("nested.h5", 2)])
def test_every_kind_of_old_file_is_proven(old, tmp_path, name, outputs):
    found = migrate(load(old / name), tmp_path / "new.keras")
    assert found.proven
    assert found.proof.precision == "float64"
    assert len(found.proof.outputs) == outputs
    assert found.path.is_file()


def test_what_tensorflow_computes_in_float32_only_is_judged_in_float32(cli, old, tmp_path):
    code, out, err = cli("migrate", old / "resize.h5", "-o", tmp_path / "new.keras")
    assert (code, err) == (0, "")
    assert "in float32" in out
    assert "ResizeBilinear" in out
    assert (tmp_path / "new.keras").is_file()


def test_weights_of_another_file_reach_the_witness_too(old, tmp_path):
    loaded = load(old / "cnn.h5", weights=old / "other.h5")
    assert migrate(loaded, tmp_path / "new.keras", weights=old / "other.h5").proven


def test_a_keras_3_file_is_proven_by_keras_itself_and_always_becomes_the_same_bytes(cli, tmp_path, no_process):
    source = tmp_path / "net.keras"
    chain((6,), L.Dense(5), L.BatchNormalization(), L.Dense(3), seed=3).save(source)
    code, _, err = cli("migrate", source, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (code, err) == (0, "")
    assert report["proof"]["by"] == f"keras {keras.__version__}"
    first = (tmp_path / "net.migrated.keras").read_bytes()
    assert cli("migrate", source, "--force")[0] == 0
    assert (tmp_path / "net.migrated.keras").read_bytes() == first


# ------------------------------------------------------------------------------------------ what is not, and fails


def nudge(model) -> None:
    """Move one weight by the smallest step that float32 has."""
    kernel = model.get_layer(index=1).kernel
    values = np.array(kernel)
    values.flat[values.size // 2] = np.nextafter(values.flat[values.size // 2], np.float32(np.inf))
    kernel.assign(values)


def test_one_weight_off_by_one_step_is_caught_and_no_option_writes_it(cli, old, tmp_path, monkeypatch):
    def wrong(*arguments, **options):
        loaded = load(*arguments, **options)
        nudge(loaded.model)
        return loaded

    monkeypatch.setattr(sys.modules["deploykit.load"], "load", wrong)
    record = tmp_path / "report.json"
    code, out, err = cli("migrate", old / "cnn.h5", "-o", tmp_path / "new.keras", "--unproven", "--json", record)
    assert code == 1
    assert "NOT THE SAME MODEL" in out
    assert err.count("\n") == 1
    assert "nothing was written" in err
    assert {path.name for path in tmp_path.iterdir()} == {"report.json"}
    report = json.loads(record.read_text())
    assert (report["proven"], report["outputs_written"]) == (False, [])
    assert "dense" in report["reason"]
    assert report["proof"]["error"] > report["proof"]["bound"]


def test_a_keras_3_model_that_is_not_its_file_is_caught(tmp_path):
    source = tmp_path / "net.keras"
    chain((6,), L.Dense(5), L.Dense(3), seed=3).save(source)
    loaded = load(source)
    nudge(loaded.model)
    with pytest.raises(NotProvenError, match="nothing was written"):
        migrate(loaded, tmp_path / "new.keras", unproven=True)
    assert not (tmp_path / "new.keras").exists()


def constant(path: Path) -> Path:
    model = chain((6,), L.Dense(3, kernel_initializer="zeros", name="y"))
    model.set_weights([np.zeros((6, 3)), np.ones(3)])
    model.save(path)
    return path


def test_an_output_that_never_varies_proves_nothing(cli, tmp_path):
    source, target = constant(tmp_path / "net.keras"), tmp_path / "new.keras"
    code, _, err = cli("migrate", source, "-o", target)
    assert code == 1
    assert "varies" in err
    assert "--unproven" in err
    assert not target.exists()
    code, out, err = cli("migrate", source, "-o", target, "--unproven", "--json", "-")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert (report["proven"], report["proof"], report["outputs_written"]) == (False, None, [str(target)])
    assert "varies" in report["reason"]


@pytest.fixture(scope="module")
def judged():
    """A net with a float and an integer output, its reference, and a witness that agrees."""
    x = keras.Input((5,), name="x")
    y = L.Dense(4, name="y")(x)
    model = keras.Model(x, [y, keras.ops.argmax(y, axis=-1)])
    found = trace(model)
    samples = {"x": np.random.default_rng(0).normal(size=(32, 5)).astype(np.float32)}
    reference = proofs.reference(found, model, samples)
    witness = Witness("a witness", ("y", "i"), ("float32", "int64"), reference.float32[:2], reference.outputs[:2])
    return found, reference, witness


def verdict(judged, **changes) -> Proof:
    found, reference, witness = judged
    return migrating.judge(found, reference, replace(witness, **changes), "samples")


def changed(arrays, place: int, change) -> tuple[np.ndarray, ...]:
    copies = [np.array(array) for array in arrays]
    copies[place] = change(copies[place])
    return tuple(copies)


def one(value):
    def change(array):
        array.flat[7] += value
        return array

    return change


def test_a_witness_that_agrees_is_believed_in_either_precision(judged):
    assert verdict(judged).precision == "float64"
    assert verdict(judged).holds
    wider = changed(judged[2].own, 1, lambda array: array.astype(np.int64))
    single = verdict(judged, double=None, why="it cannot", own=wider)
    assert (single.holds, single.precision, single.why_not_float64) == (True, "float32", "it cannot")


WRONG = {
    "one value": (0, one(1e-9)),
    "one integer": (1, one(1)),
    "another shape": (0, lambda array: array[:, :3]),
    "not a number": (0, one(np.nan)),
    "another order": (0, lambda array: array[:, ::-1]),
    "another kind": (1, lambda array: array.astype(np.float64)),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_answer_in_float64_is_caught(judged, case):
    proof = verdict(judged, double=changed(judged[2].double, *WRONG[case]))
    assert not proof.holds
    assert proof.to_json()["bound"] is not None


@pytest.mark.parametrize(
    ("place", "change"), [(0, lambda array: array * np.float32(1 + 1e-4)), (0, one(1e-3)), (1, one(1))]
)
def test_a_wrong_answer_in_float32_is_caught(judged, place, change):
    assert not verdict(judged, double=None, own=changed(judged[2].own, place, change)).holds


def test_float32_is_fallen_back_on_only_where_an_operation_is_float32(judged):
    nearly = changed(judged[2].double, 0, lambda array: array.astype(np.float32).astype(np.float64))
    assert not verdict(judged, double=nearly).holds
    excused = verdict(judged, double=nearly, float32_ops=("ResizeBilinear",))
    assert (excused.holds, excused.precision) == (True, "float32")


def test_a_missing_output_is_caught(judged):
    _, _, witness = judged
    assert "1 outputs there and 2 here" in verdict(judged, own=witness.own[:1], double=witness.double[:1]).reason


def test_other_inputs_are_a_disagreement(judged):
    assert verdict(judged, unlike="its input x takes [4] there").reason == "its input x takes [4] there"


@pytest.mark.parametrize("generation", ["keras 3", "tf_keras"])
def test_a_model_of_other_inputs_is_not_written(old, tmp_path, generation):
    source = old / "cnn.h5"
    if generation == "keras 3":
        source = tmp_path / "net.keras"
        chain((6,), L.Dense(3), seed=3).save(source)
    other = chain((7,), L.Dense(3), seed=3)
    with pytest.raises(NotProvenError, match=r"there and \[7\] here"):
        migrate(replace(load(source), model=other), tmp_path / "new.keras", unproven=True)
    assert not (tmp_path / "new.keras").exists()


def test_a_changed_dtype_is_told():
    output = {"name": "y", "dtype": "int32", "old_dtype": "int64"}
    proof = Proof("w", "float64", None, 1, "", (output,))
    assert list(migrating._drift(proof)) == ["output y is int32 now and was int64"]


# ------------------------------------------------------------------------------------------------------ no witness


def test_without_tf_keras_the_extra_is_named_and_only_unproven_writes(cli, old, tmp_path, monkeypatch):
    packages, target = tmp_path / "packages", tmp_path / "new.keras"
    packages.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith("tf_keras"):
            (packages / entry.name).symlink_to(entry)
    monkeypatch.setattr(sys, "path", [str(ROOT), str(packages), *(p for p in sys.path if "site-packages" not in p)])
    refused(cli("migrate", old / "cnn.h5", "-o", target), "pip install 'deploykit[legacy]'", "--unproven")
    assert not target.exists()
    code, out, _ = cli("migrate", old / "cnn.h5", "-o", target, "--unproven", "--json", "-")
    report = json.loads(out)
    assert (code, report["proven"], report["proof"]) == (0, False, None)
    assert "deploykit[legacy]" in report["reason"]
    assert target.is_file()


def test_a_class_for_keras_3_is_no_use_to_tf_keras(cli, old, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(OWN)
    result = cli("migrate", old / "custom.h5", "-o", tmp_path / "new.keras", "--custom-objects", own)
    refused(result, "tf_keras cannot load it", "Scale", "--custom-objects", "--unproven")
    assert not (tmp_path / "new.keras").exists()


def test_kernels_saved_on_theano_have_no_witness(old, tmp_path, no_process):
    loaded = replace(load(old / "cnn.h5"), backend="theano")
    with pytest.raises(UnsupportedModelError, match="theano"):
        migrate(loaded, tmp_path / "new.keras")


def test_a_process_that_takes_too_long_is_killed(old, tmp_path, monkeypatch, spied):
    monkeypatch.setattr(migrating, "TIMEOUT_S", 0.05)
    with pytest.raises(UnsupportedModelError, match="did not finish"):
        migrate(load(old / "cnn.h5"), tmp_path / "new.keras")
    assert [process.poll() for process in spied] == [-9]
    assert not list(tmp_path.iterdir())


def test_an_interrupt_kills_the_process(old, tmp_path, monkeypatch, spied):
    waits = []

    def wait(self, timeout=None):
        waits.append(timeout)
        if len(waits) == 1:
            raise KeyboardInterrupt
        return original(self, timeout)

    original = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        migrate(load(old / "cnn.h5"), tmp_path / "new.keras")
    assert [process.poll() for process in spied] == [-9]
    assert not list(tmp_path.iterdir())


def test_a_process_that_dies_is_told_in_one_line(old, tmp_path, monkeypatch):
    monkeypatch.setattr(migrating, "_BOOT", "import os; os.abort()")
    with pytest.raises(UnsupportedModelError, match="ended with signal 6"):
        migrate(load(old / "cnn.h5"), tmp_path / "new.keras")


# ---------------------------------------------------------------------------------------------------------- safety


def test_bytecode_never_reaches_tf_keras(cli, old, tmp_path, no_process):
    for flags in ((), ("--unproven",)):
        refused(cli("migrate", old / "bytecode.h5", "-o", tmp_path / "new.keras", *flags), "Lambda", "--allow-code")
    assert not (old / "ran").exists()
    assert not (tmp_path / "new.keras").exists()


def test_a_file_that_changes_after_it_was_judged_is_not_run(old, tmp_path, no_process):
    source = tmp_path / "net.h5"
    for later in ("recurrent.h5", "bytecode.h5", "other.h5"):
        source.write_bytes((old / "cnn.h5").read_bytes())
        loaded = load(source)
        source.write_bytes((old / later).read_bytes())
        with pytest.raises(LoadError, match="changed while it was being read"):
            migrate(loaded, tmp_path / "new.keras", unproven=True)
    assert not (tmp_path / "new.keras").exists()
    assert not (old / "ran").exists()


def test_tf_keras_is_given_a_private_copy(old, tmp_path, monkeypatch):
    jobs = []

    def finished(room, what):
        jobs.append(json.loads((room / "job.json").read_text()))
        raise UnsupportedModelError("enough")

    monkeypatch.setattr(migrating, "_finished", finished)
    with pytest.raises(UnsupportedModelError, match="enough"):
        migrate(load(old / "cnn.h5"), tmp_path / "new.keras")
    assert Path(jobs[0]["model"]).parent not in (old, tmp_path)
    assert jobs[0]["allow_code"] is False
    assert not Path(jobs[0]["model"]).exists()


LAMBDA = {"class_name": "__lambda__", "config": {"value": ["4wAA", None, None]}}
HIDDEN = {
    "bytecode for a regularizer": {"kernel_regularizer": {"module": "builtins", **LAMBDA}},
    "a module to import": {"loss": {"module": "os", "class_name": "Popen", "config": {}}},
    "a wrapper's bytecode": {"residual_fn": ["4wAA", None, None], "residual_fn_type": "lambda"},
    "a built-in": {"activation": {"module": "os", "class_name": "function", "config": "system"}},
}


@pytest.mark.parametrize("case", HIDDEN)
def test_what_tf_keras_would_act_on_is_seen_in_the_file_as_it_is(old, tmp_path, monkeypatch, no_process, case):
    """Whatever a reader drops when it makes Keras 3 layers: the description that counts is the one in the file."""
    source = tmp_path / "net.h5"
    source.write_bytes((old / "cnn.h5").read_bytes())
    with h5py.File(source, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        config["config"]["layers"][1]["config"].update(HIDDEN[case])
        file.attrs["model_config"] = json.dumps(config)
    loaded = load(old / "cnn.h5")
    with pytest.raises(UnsupportedModelError, match="would act on what the file names"):
        migrating._refuse_code(loaded, source)
    migrating._refuse_code(loaded, old / "cnn.h5")
    migrating._refuse_code(replace(loaded, options={**loaded.options, "allow_code": True}), source)


def test_what_is_seen_there_keeps_the_process_from_starting(old, tmp_path, monkeypatch, no_process):
    monkeypatch.setattr(migrating, "_foreign", lambda config: ["Popen of the module os"])
    with pytest.raises(UnsupportedModelError, match=r"not run \(Popen of the module os\); --unproven"):
        migrate(load(old / "cnn.h5"), tmp_path / "new.keras")
    assert not (tmp_path / "new.keras").exists()


# ------------------------------------------------------------------------------------------------------- bad usage


def test_an_existing_output_stays_without_force(cli, old, tmp_path, no_process):
    target = tmp_path / "new.keras"
    target.write_text("mine")
    refused(cli("migrate", old / "cnn.h5", "-o", target), "--force")
    assert target.read_text() == "mine"


def test_bad_requests_are_one_line(cli, old, tmp_path, no_process):
    refused(cli("migrate", old / "cnn.h5", "-o", tmp_path / "new.h5"), ".keras")
    refused(cli("migrate", tmp_path / "absent.h5"), "absent.h5")
    wrong = tmp_path / "wrong.npy"
    np.save(wrong, np.zeros((4, 9), np.float32))
    refused(cli("migrate", old / "cnn.h5", "-o", tmp_path / "n.keras", "--data", wrong, "--unproven"), "image")
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.npy"]


# ------------------------------------------------------------------------------------------------------ the pieces


def test_inputs_are_paired_by_name_where_the_names_agree_else_by_order():
    assert paired(["a", "b"], ["b", "a"]) == [1, 0]
    assert paired(["a", "b"], ["b", "c"]) == [0, 1]


def test_inputs_must_be_as_many_and_of_the_same_sizes():
    rows = np.zeros((2, 4, 3))
    assert unlike(["a"], [(None, None, 3)], [rows]) is None
    assert unlike(["a"], [(None, 4, 3)], [rows, rows]) == "it has 1 inputs there and 2 here"
    assert unlike(["a"], [(None, 5, 3)], [rows]) == "its input a takes [5, 3] there and [4, 3] here"
    assert unlike(["a"], [(None, 12)], [rows]) == "its input a takes [12] there and [4, 3] here"


def test_every_narrow_float_is_widened_and_names_are_kept():
    policy = {"class_name": "Policy", "config": {"name": "mixed_float16"}}
    config = {"name": "float32", "dtype": policy, "args": ["float32", 2, "int32"], "T": {"type": "DT_FLOAT"}}
    expected = {"name": "float32", "dtype": "float64", "args": ["float64", 2, "int32"], "T": {"type": "DT_DOUBLE"}}
    assert widened(config) == expected


def test_a_migration_without_a_path_wrote_nothing():
    assert Migrated(None, None, "why").proven is False
