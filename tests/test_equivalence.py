"""From comparisons to one verdict: what is no evidence does not pass, one bad candidate does not silence the others."""

from __future__ import annotations

import json

import keras
import numpy as np
import onnx
import pytest
from nets import chain, enliven

from deploykit.compare import policy_from
from deploykit.deploy import DataOptions
from deploykit.equivalence import equivalence
from deploykit.errors import LoadError
from deploykit.export import export
from deploykit.report import evidence
from deploykit.report.cases import cases

L = keras.layers


def output(name="y", **more):
    return {"name": name, "passed": True, "insensitive": False, "samples": 10, "excluded": 0, "reason": None, **more}


def checked(*outputs, passed=True, precision="float64"):
    comparison = {"candidate": "c", "runtime": "keras", "passed": passed, "reason": None, "outputs": list(outputs)}
    return {"passed": passed, "reference": {"precision": precision}, "comparisons": [comparison]}


@pytest.mark.parametrize(
    ("check", "refused", "objected", "proven"),
    [
        (checked(output()), False, False, True),
        (checked(output(insensitive=True)), True, True, False),
        (checked(output(), output("b", insensitive=True)), False, True, False),
        (checked(output(excluded=5)), False, False, True),
        (checked(output(excluded=6)), False, True, False),
        (checked(output(passed=False, reason="off"), passed=False), True, True, False),
        (checked(output(), precision="float32"), False, False, False),
        (checked(passed=False), True, True, False),
    ],
)
def test_a_verdict_follows_from_the_comparisons(check, refused, objected, proven):
    assert (evidence.refusal(check) is not None) == refused
    assert (evidence.objection(check) is not None) == objected
    assert evidence.verdict(check) == (proven, evidence.verdict(check)[1])
    assert (evidence.verdict(check)[1] is None) == proven


def test_samples_that_were_not_judged_are_said():
    assert evidence.excluded(checked(output(excluded=2), output("b"))) == [
        "output y: 2 of 10 samples not judged, where the original itself is no yardstick"
    ]


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """A live net in memory, and its folder with the right file, a wrong one, and one that is none."""
    folder = tmp_path_factory.mktemp("net")
    model = chain((6,), L.Dense(5), L.BatchNormalization(), L.ReLU(), L.Dense(3, name="y"), seed=3)
    right = export(model, folder / "right.onnx").path
    wrong = onnx.load(right)
    bias = next(t for t in wrong.graph.initializer if t.dims == [3])
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(0.1), bias.name))
    onnx.save(wrong, folder / "wrong.onnx")
    (folder / "damaged.onnx").write_bytes(b"no model")
    return model, folder


def judged(net, *names, **more):
    model, folder = net
    return equivalence(model, [folder / name for name in names], data=DataOptions(), policy=policy_from(), **more)


def test_what_is_right_passes(net):
    found = judged(net, "right.onnx")
    assert (found.passed, found.proven, found.error, found.body["passed"]) == (True, True, None, True)


@pytest.mark.parametrize("bad", ["damaged.onnx", "absent.onnx"])
def test_a_candidate_that_cannot_be_judged_does_not_silence_the_others(net, bad):
    found = judged(net, bad, "right.onnx")
    assert isinstance(found.error, LoadError)
    assert [row["passed"] for row in found.body["comparisons"]] == [False, True]
    assert [row["error"] for row in found.body["comparisons"]] == [True, False]
    assert not found.passed


def test_what_is_wrong_is_told_before_what_cannot_be_judged(net):
    found = judged(net, "damaged.onnx", "wrong.onnx")
    assert found.error is None
    assert not found.passed


def test_the_cases_of_a_report_tell_failures_from_errors(net):
    found = judged(net, "damaged.onnx", "wrong.onnx")
    report = {"schema": "deploykit.check/1", "model": "net", "reason": found.reason, **found.body}
    assert {case.title: case.outcome for case in cases(report) if case.bad} == {
        f"{net[1] / 'damaged.onnx'} on onnxruntime-cpu": "error",
        f"{net[1] / 'wrong.onnx'} on onnxruntime-cpu": "failed",
    }


def test_all_samples_of_the_user_count_unless_he_says_otherwise(net, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(700, 6)).astype(np.float32))
    model, folder = net
    for limit, count, words in ((None, 700, "x.npy"), (300, 300, "x.npy (300 of 700 samples)")):
        data = DataOptions(str(tmp_path / "x.npy"), limit)
        found = equivalence(model, [folder / "right.onnx"], data=data, policy=policy_from())
        assert found.body["comparisons"][0]["samples"] == count
        assert found.body["data"].endswith(words)


def test_an_output_that_hardly_varies_proves_nothing(tmp_path):
    x = keras.Input((4,), name="x")
    dead = L.Dense(2, name="dead")(L.ReLU()(L.Dense(3, kernel_initializer="zeros", name="off")(x)))
    model = enliven(keras.Model(x, [L.Dense(2, name="alive")(x), dead]))
    model.get_layer("off").set_weights([np.zeros((4, 3)), -np.ones(3)])
    wrong = keras.models.clone_model(model)
    wrong.set_weights(model.get_weights())
    kernel, bias = wrong.get_layer("dead").get_weights()
    wrong.get_layer("dead").set_weights([-3 * kernel, bias])
    found = equivalence(model, [wrong], data=DataOptions(), policy=policy_from())
    assert not found.passed
    assert not found.proven
    assert "output dead hardly varies" in str(found.reason)


def test_a_bundle_that_was_touched_is_no_candidate(cli, tmp_path):
    model = chain((6,), L.Dense(4), L.BatchNormalization(), L.Dense(3, name="y"))
    model.save(tmp_path / "net.keras")
    assert cli("deploy", tmp_path / "net.keras", "-o", tmp_path / "b", "--seconds", 0.1)[0] == 0
    assert cli("check", tmp_path / "net.keras", tmp_path / "b")[0] == 0
    touched = onnx.load(tmp_path / "b" / "model.onnx")
    touched.doc_string = "mine"
    onnx.save(touched, tmp_path / "b" / "model.onnx")
    code, out, _ = cli("check", tmp_path / "net.keras", tmp_path / "b", "--json", "-")
    assert code == 2
    assert "sealed" in json.loads(out)["comparisons"][0]["reason"]


def test_a_gradient_has_no_tolerance_of_outputs(cli, tmp_path):
    code, _, err = cli("check", "absent.keras", "absent.keras", "--gradients", "--rtol", 0.1)
    assert (code, err.count("\n")) == (2, 1)
    assert "--gradients" in err
