"""The benchmark behind docs/performance.md: means, what is measured again, what is missed, and what the tables say."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.environment import environment
from deploykit.errors import DeploykitError

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "latency.py"
TRAINED = ("mlp_bn_after.keras", "mlp_bn_before.keras", "fashion_cnn.keras")
SECONDS = 3.0


def loaded() -> ModuleType:
    """The script as a module; what it and the scripts beside it set for their own process is taken back."""
    path, modules, variables = list(sys.path), set(sys.modules), dict(os.environ)
    try:
        spec = importlib.util.spec_from_file_location("benchmark_latency", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path
        for name in set(os.environ) - set(variables):
            del os.environ[name]
        for name in {"coverage", "false_alarms"} - modules:  # the first is also the name of a well-known package
            sys.modules.pop(name, None)
    return module


latency = loaded()
HERE = environment()


# ------------------------------------------------------------------------------------------- a store that is filled


def ratio(value, low=None, high=None):
    ends = [low or value * 0.98, high or value * 1.02]
    verdict = "faster" if ends[1] < 1 else "slower" if ends[0] > 1 else "undecided"
    return {"ratio": value, "ci95": ends, "verdict": verdict}


def files_of(store, name):
    """The record of a model's files, and the files, as far as the store looks at them."""
    folder = store.folder(name)
    folder.mkdir(parents=True)
    for file in ("inputs.npz", *(file for _, file in latency.CANDIDATES.values())):
        (folder / file).write_bytes(b"")
    return {
        "sha256": {key: f"{name} {key}" for key in latency.CANDIDATES},
        "elsewhere": {},
        "options": {},
        "absent": {},
        "stock": "stock",
        "checks": {key: {"passed": True, "reason": None} for key in ("ours", "stock", "openvino", "litert")},
        "maker": latency.maker(),
        "environment": copy.deepcopy(HERE),
    }


def filled(path, names=(*latency.NETS, *TRAINED)):
    """Everything measured, and every required figure reached."""
    store = latency.Store.at(path)
    for name in names:
        made = files_of(store, name)
        store.cells[f"{name} files"] = made
        rows = {
            "stock": {"ratios": {"stock": ratio(1.2)}, "ms": {"stock": 12.0, "ours": 10.0}},
            "beside": {
                "ratios": {"keras": ratio(9.0), "openvino": ratio(1.3), "litert": ratio(1.1, 0.9, 1.4)},
                "ms": {"keras": 90.0, "openvino": 13.0, "litert": 11.0, "ours": 10.0},
            },
            "profile": {
                "of_limit": 0.5,
                "time_ms": 10.0,
                "kinds": [
                    {"kind": "convolution", "share": 0.75, "lost_ms": 1.0, "of_limit": 0.9},
                    {"kind": "layout", "share": 0.25, "lost_ms": 2.5, "of_limit": 0.0},
                ],
            },
        }
        batches = latency.NETS.get(name, latency.TRAINED).batches
        for job in [*latency.jobs(latency.Model(name), SECONDS)] + [
            latency.Job(name, "profile", batch, SECONDS) for batch in batches
        ]:
            store.cells[job.key] = {
                **copy.deepcopy(rows[job.what]),
                "sha256": job.hashes(made),
                "environment": copy.deepcopy(HERE),
                "seconds": 10.0,
            }
    return store


@pytest.fixture
def store(tmp_path):
    return filled(tmp_path / "latency.json")


def resumed(store, seconds=SECONDS, names=(*latency.NETS, *TRAINED)):
    """Models and what is left, where there is no time to measure anything."""
    return latency.run(names, store, seconds, time.perf_counter() - 1)


# ----------------------------------------------------------------------------------------------------------- means


@pytest.mark.parametrize(
    ("ratios", "mean"),
    [([2.0, 0.5], 1.0), ([1.21], 1.21), ([1, 10, 100], 10.0), ([], None), ([1e-300, 1e300], 1.0)],
)
def test_the_geometric_mean(ratios, mean):
    assert latency.geometric_mean(ratios) == (None if mean is None else pytest.approx(mean, rel=1e-12))


def test_the_mean_of_ratios_is_the_ratio_of_means():
    a, b = np.random.default_rng(0).uniform(0.1, 10, (2, 50))
    found = latency.geometric_mean(list(a)) / latency.geometric_mean(list(b))
    assert latency.geometric_mean(list(a / b)) == pytest.approx(found, rel=1e-12)


# -------------------------------------------------------------------------------------------------------- resuming


def test_what_is_finished_is_not_measured_again(store):
    models, left = resumed(store)
    assert not left
    assert not store.errors
    assert [model.name for model in models] == [*latency.NETS, *TRAINED]
    assert models[0].ratio("stock", 8)["ratio"] == 1.2


def test_a_store_comes_back_from_its_file(store):
    store.add("one more", {"value": math.nan})
    again = latency.Store.at(store.path)
    assert again.cells == {**store.cells, "one more": {"value": None}}
    assert not resumed(again)[1]


STALE = {
    "a cell is missing": (lambda store: store.cells.pop("ResNet50 stock 8 3"), ["ResNet50 stock 8 3"]),
    "a file has changed": (
        lambda store: store.cells["Xception files"]["sha256"].update(stock="another"),
        ["Xception stock 1 3"],
    ),
    "ours has changed": (
        lambda store: store.cells["Xception files"]["sha256"].update(ours="another"),
        ["Xception stock 1 3", "Xception beside 1 3"],
    ),
    "a package has changed": (
        lambda store: store.cells["Xception beside 1 3"]["environment"]["packages"].update(onnxruntime="0.1"),
        ["Xception beside 1 3"],
    ),
    "a file is gone": (lambda store: (store.folder("Xception") / "ours.onnx").unlink(), ["Xception"]),
    "the samples are gone": (lambda store: (store.folder("Xception") / "inputs.npz").unlink(), ["Xception"]),
    "the code that makes files has changed": (
        lambda store: store.cells["Xception files"].update(maker="older"),
        ["Xception"],
    ),
}


@pytest.mark.parametrize("why", STALE)
def test_what_has_changed_is_measured_again(store, why):
    change, due = STALE[why]
    change(store)
    assert resumed(store)[1] == due


def test_another_measuring_time_is_another_cell(store):
    _, left = resumed(store, seconds=0.5, names=["Xception"])
    assert left == ["Xception stock 1 0.5", "Xception beside 1 0.5"]


def test_another_machine_keeps_its_cells(store):
    """They say where they were measured; a ratio need not be had anew for that."""
    store.cells["Xception stock 1 3"]["environment"]["cpu"] = "another one"
    assert not resumed(store)[1]


@pytest.mark.parametrize(
    ("cell", "change", "profiles"),
    [
        ("stock 1", {"stock": ratio(1.2)}, []),
        ("stock 1", {"stock": ratio(1.04)}, [1]),
        ("stock 8", {"stock": ratio(1.04)}, [8]),
        ("beside 1", {"litert": ratio(0.99, 0.8, 1.2)}, [1]),
        ("beside 1", {"openvino": ratio(0.5)}, [1]),
        ("beside 1", {"openvino": {"ratio": None, "ci95": None, "verdict": "undecided"}}, []),
    ],
)
def test_a_profile_is_made_where_there_is_something_to_explain(store, cell, change, profiles):
    store.cells[f"ResNet50 {cell} 3"]["ratios"].update(change)
    (model,), _ = resumed(store, names=["ResNet50"])
    assert [batch for what, batch in model.cells if what == "profile"] == profiles


def test_an_absent_file_is_no_candidate(store):
    store.cells["Xception files"]["absent"]["litert"] = "not convertible"
    made = store.made("Xception")
    assert latency.Job("Xception", "beside", 1, SECONDS).candidates(made) == ["keras", "openvino", "ours"]


# ------------------------------------------------------------------------------------------------------- estimates


def test_the_estimate_counts_what_is_missing(store):
    names = list(latency.NETS)
    assert latency.estimate_s(names, store, SECONDS) == 0
    del store.cells["ResNet50 stock 8 3"]
    one = latency.Job("ResNet50", "stock", 8, SECONDS).estimate_s()
    assert latency.estimate_s(names, store, SECONDS) == pytest.approx(one)
    assert one > latency.Job("ResNet50", "stock", 1, SECONDS).estimate_s()


def test_a_whole_run_is_estimated_at_forty_minutes_at_most(tmp_path):
    names = [*latency.NETS, *TRAINED, *(f"trained {place}" for place in range(10))]
    assert latency.estimate_s(names, latency.Store.at(tmp_path / "new.json"), SECONDS) < 40 * 60


# --------------------------------------------------------------------------------------------------------- judging


def test_nothing_is_missed_where_all_is_reached(store):
    assert list(latency.missed(resumed(store)[0])) == []


def having(what, candidate, row, names=latency.NETS):
    """A change of the store: this comparison in every cell of these models."""

    def change(store):
        for name in names:
            for batch in latency.NETS.get(name, latency.TRAINED).batches:
                if (key := f"{name} {what} {batch} 3") in store.cells:
                    store.cells[key]["ratios"][candidate] = row

    return change


def lacking(key):
    return lambda store: store.cells.pop(key)


# What is wrong -> how lines about it begin.
MISSED = {
    "all": (
        having("stock", "stock", ratio(1.07)),
        ["DenseNet121 beside", "EfficientNetB0 beside", *["geometric mean beside stock, batch"] * 2],
    ),
    "DenseNet121": (having("stock", "stock", ratio(1.14), ["DenseNet121"]), ["DenseNet121 beside stock: 1.140"]),
    "EfficientNetB0": (having("stock", "stock", ratio(1.09), ["EfficientNetB0"]), ["EfficientNetB0 beside stock"]),
    "another net": (having("stock", "stock", ratio(1.0), ["Xception"]), []),
    "an interval": (having("stock", "stock", ratio(0.9, 0.8, 0.96), ["Xception"]), ["Xception at batch 1: the"]),
    "half an interval": (having("stock", "stock", ratio(0.96, 0.8, 0.98), ["Xception"]), []),
    "tf.function": (having("beside", "keras", ratio(2.1)), ["geometric mean beside Keras' tf.function: 2.100"]),
    "perceptrons": (
        having("beside", "keras", ratio(7.9), TRAINED[:2]),
        ["geometric mean beside Keras' tf.function, perceptrons: 7.900"],
    ),
    "other trained models": (having("beside", "keras", ratio(1.1), TRAINED[2:]), []),
    "a cell": (lacking("Xception stock 1 3"), ["Xception at batch 1 beside stock: not measured"]),
    "a batch": (lacking("ResNet50 stock 8 3"), ["ResNet50 at batch 8 beside stock: not measured"]),
    "Keras": (lacking("Xception beside 1 3"), ["Xception beside Keras' tf.function: not measured"]),
}


@pytest.mark.parametrize("what", MISSED)
def test_what_is_missed(store, what):
    change, lines = MISSED[what]
    change(store)
    found = list(latency.missed(resumed(store)[0]))
    assert len(found) == len(lines)
    assert all(line.startswith(start) for line, start in zip(found, lines, strict=True))


def test_without_perceptrons_their_figure_is_missed(store):
    models, _ = resumed(store, names=list(latency.NETS))
    assert list(latency.missed(models)) == ["perceptrons of models/: not measured"]


# ------------------------------------------------------------------------------------------------------- rendering


def section(text, heading):
    """What stands below the heading that begins so."""
    return text.split(f"\n{heading}", 1)[1].partition("\n")[2].split("\n#", 1)[0]


def line(text, name):
    """The cells of the only row of this name."""
    (found,) = [row for row in text.splitlines() if row.startswith(f"| {name} |")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_the_document_has_every_table(store):
    store.cells["ResNet50V2 files"]["checks"]["stock"] = {"passed": False, "reason": "SNR 3 dB; and more"}
    store.cells["EfficientNetB0 files"]["stock"] = "stock, captures frozen"
    store.cells["Xception stock 1 3"]["ratios"]["stock"] = ratio(1.01)
    store.cells["InceptionV3 beside 1 3"]["ratios"]["openvino"] = ratio(0.8)
    store.cells["NASNetMobile stock 1 3"]["environment"]["cpu"] = "another one"
    store.cells["NASNetMobile beside 1 3"]["warnings"] = [{"code": "other_load", "text": "busy"}]
    text = latency.document(resumed(store)[0], {"lost.h5": "no answer"}, SECONDS)
    stock = section(text, "## The stock export")
    mean = latency.geometric_mean([1.2] * 9 + [1.01])
    assert f"at batch 1: **{mean:.2f}** of 10 nets; at batch 8: **1.20** of 5" in stock
    assert f"fails or is missing: **{latency.geometric_mean([1.2] * 8 + [1.01]):.2f}** of 9 at batch 1" in stock
    assert line(stock, "ResNet50V2")[1:] == [
        "1",
        "1.200",
        "1.18 - 1.22",
        "slower",
        "12",
        "10",
        "stock; **fails check**",
        "A",
    ]
    assert line(stock, "EfficientNetV2B0")[-2] == "stock"
    assert [row.split("|")[2].strip() for row in stock.splitlines() if "EfficientNetB0" in row] == ["1", "8"]
    assert line(stock, "NASNetMobile")[-1] == "B"
    assert line(section(text, "## Where\n"), "B")[1].startswith("another one")
    assert line(section(text, "## Trained models"), "fashion_cnn.keras")[2] == "1.200"
    assert "**9.00** of 10 nets; **9.00** of 2 perceptrons; **9.00** of 3 trained" in section(text, "## Keras' own")
    beside = section(text, "## Other runtimes")
    assert line(beside, "InceptionV3")[1:4] == ["0.80 [0.78 - 0.82]", "1.10 [0.90 - 1.40]", "OpenVINO"]
    assert line(beside, "Xception")[3] == "ONNX Runtime"
    blamed = section(text, "### Where another runtime is faster")
    assert line(blamed, "InceptionV3")[2] == "layout 2.5 ms of 2.5; convolution 1 ms of 7.5"
    assert "Xception" not in blamed
    left = section(text, "## Where stock takes")
    assert line(left, "Xception")[2:5] == ["1.010", "75%", "layout 25%"]
    assert "InceptionV3" not in left
    assert "- ResNet50V2, stock: fails `deploykit check` (SNR 3 dB)" in section(text, "## Files that fail")
    assert "- lost.h5: no answer" in section(text, "## Not measured")
    assert "- other_load: NASNetMobile" in section(text, "## Warnings of `bench`")


def test_a_document_of_nothing_says_so():
    text = latency.document([latency.Model("Xception")], {}, SECONDS)
    assert "Geometric mean at batch 1: - nets" in text
    assert "None." in section(text, "### Where another runtime is faster")


def test_a_file_that_failed_the_check_is_not_the_fastest(store):
    store.cells["Xception beside 1 3"]["ratios"]["openvino"] = ratio(0.5)
    store.cells["Xception files"]["checks"]["openvino"] = {"passed": False, "reason": "SNR 3 dB"}
    (model,), _ = resumed(store, names=["Xception"])
    assert latency.fastest(model) == "ONNX Runtime"
    assert "**fails check**" in latency.rivals_table([model], latency.Places([model]))


# ----------------------------------------------------------------------------------------------------- for real


def product(path, nodes):
    """A file of so many matrix products of 256 x 256, one after the other."""
    weight = numpy_helper.from_array(np.eye(256, dtype=np.float32), "weight")
    names = ["x", *(f"t{place}" for place in range(nodes - 1)), "y"]
    chain = [helper.make_node("MatMul", [a, "weight"], [b], f"dense_{b}/MatMul") for a, b in itertools.pairwise(names)]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 256]) for name in "xy")
    graph = helper.make_graph(chain, "product", [x], [y], [weight])
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def test_real_cells(tmp_path):
    """Two files, of which stock's has forty times the work: bench and profile give what the tables read."""
    store = latency.Store.at(tmp_path / "latency.json")
    made = files_of(store, "tiny.keras")
    made["absent"] = dict.fromkeys(("keras", "openvino", "litert"), "not made")
    folder = store.folder("tiny.keras")
    product(folder / "ours.onnx", 1)
    product(folder / "stock.onnx", 40)
    np.savez(folder / "inputs.npz", x=np.ones((8, 256), np.float32))
    stock = latency.Job("tiny.keras", "stock", 8, 0.02)
    profile = dataclasses.replace(stock, what="profile", batch=1)
    model = latency.Model("tiny.keras", made)
    for job, place in ((stock, ("stock", 1)), (profile, ("profile", 1))):
        store.add(job.key, latency.measure(job, made, store))
        assert latency.Store.at(store.path).finished(job, made)
        model.cells[place] = store.cells[job.key]
    (store.folder("tiny.keras") / "ours.onnx").write_bytes(b"no model")
    with pytest.raises(DeploykitError, match="ours did not run"):
        latency.measure(stock, made, store)
    found = model.ratio("stock")
    assert found["verdict"] == "slower"
    assert found["ratio"] > 2
    assert line(latency.stock_table([model], latency.Places([model])), "tiny.keras")[4] == "slower"
    assert sum(kind["share"] for kind in model.cells["profile", 1]["kinds"]) == pytest.approx(1)
    assert latency.convolution_share(model.cells["profile", 1]) == 0
    found["ratio"] = 0.99  # as if there were nothing gained
    assert "matrix product" in latency.left_table([model], latency.Places([model]))


def command(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_without_time_nothing_is_written(tmp_path):
    out = tmp_path / "performance.md"
    done = command("--minutes", 0, "--store", tmp_path / "latency.json", "--out", out)
    assert done.returncode == 1
    assert "missed: Xception: not within 0 minutes; the same command goes on" in done.stderr
    assert not out.exists()


def test_a_complete_store_makes_the_document(tmp_path):
    names = latency.files()
    store = filled(tmp_path / "latency.json", [*latency.NETS, *names])
    store.add("last", {})
    out = tmp_path / "performance.md"
    arguments = ("--minutes", 0, "--store", store.path, "--out", out, "--seconds", SECONDS, "--check")
    done = command(*arguments)
    assert (done.returncode, done.stderr.splitlines()[1:]) == (0, [])
    assert line(section(out.read_text(), "## The stock export"), "Xception")[2] == "1.200"
    cells = json.loads(store.path.read_text())
    cells["DenseNet121 stock 1 3"]["ratios"]["stock"] = ratio(1.12)
    store.path.write_text(json.dumps(cells))
    done = command(*arguments)
    assert (done.returncode, done.stderr.splitlines()[1:]) == (
        1,
        ["missed: DenseNet121 beside stock: 1.120, required 1.15"],
    )
