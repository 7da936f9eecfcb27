"""The runtime that a bundle recommends is the fastest one that passed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from deploykit import load, recommendation
from deploykit.bench import BenchReport, Timing
from deploykit.bench import Candidate as Timed
from deploykit.check import make_reference
from deploykit.compare import policy_from
from deploykit.deploy import DataOptions, samples_for
from deploykit.export import export
from deploykit.recommendation import Trial, recommended
from deploykit.report.wording import fastest

MODEL = Path(__file__).resolve().parent.parent / "models" / "mlp_bn_after.keras"


def measured(**factors: float | str) -> BenchReport:
    """Every candidate so many times as long as the first; a word is why it failed. The samples are made up."""
    rounds = tuple((1.0 + 0.001 * i,) for i in range(12))
    timings = []
    for name, factor in {"ours": 1.0, **factors}.items():
        candidate = Timed(name.replace("_", ", on "), "x.onnx", "onnxruntime-cpu")
        if isinstance(factor, str):
            timings.append(Timing(candidate, 1, 1, {"x": (1, 2)}, 1, failed=factor))
        else:
            seen = tuple((factor * sample,) for (sample,) in rounds)
            timings.append(Timing(candidate, 1, 1, {"x": (1, 2)}, 1, (seen,) * 7))
    return BenchReport(tuple(timings))


PASSED, WRONG = Trial("openvino", None), Trial("openvino", "SNR 3 dB")
# case -> trials, how long OpenVINO takes, what is recommended
CASES = {
    "faster": ((PASSED,), 0.8, "openvino"),
    "slower": ((PASSED,), 1.2, "onnxruntime-cpu"),
    "as fast": ((PASSED,), 1.0, "onnxruntime-cpu"),
    "did not pass": ((WRONG,), None, "onnxruntime-cpu"),
    "could not be timed": ((PASSED,), "out of memory", "onnxruntime-cpu"),
    "not tried": ((), None, "onnxruntime-cpu"),
}


@pytest.mark.parametrize("case", CASES)
def test_only_what_passed_and_is_faster_is_recommended(case):
    trials, factor, runtime = CASES[case]
    report = measured(**({} if factor is None else {"deploykit_OpenVINO": factor}))
    found = recommended(report, "ours", trials)
    assert found["runtime"] == runtime
    assert [row["runtime"] for row in found["others"]] == [trial.runtime for trial in trials]
    told = fastest(found)
    assert (told is None) == (not trials)
    assert told is None or told.startswith(f"{runtime} (openvino ")
    if trials == (WRONG,):
        assert "did not pass: SNR 3 dB" in told
    if isinstance(factor, str):
        assert "could not be timed" in told


def test_of_two_that_are_faster_the_fastest_is_recommended(monkeypatch):
    rows = recommendation.RUNTIMES
    monkeypatch.setitem(rows, "other", rows["litert"])
    report = measured(deploykit_OpenVINO=0.8, deploykit_LiteRT=0.6)
    assert recommended(report, "ours", (PASSED, Trial("other", None)))["runtime"] == "other"
    assert recommended(report, "ours", (Trial("other", None), PASSED))["runtime"] == "other"


def test_every_other_runtime_that_is_installed_is_held_to_the_law(tmp_path):
    model = load(MODEL).model
    reference = make_reference("mlp", model, samples_for(model, DataOptions(), 16))
    path = export(model, tmp_path / "right.onnx").path
    assert recommendation.tried(path, reference, policy_from()) == (Trial("openvino", None),)
    proto = onnx.load(path)
    kernel = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    kernel.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(kernel) * np.float32(1.01), kernel.name))
    onnx.save(proto, tmp_path / "wrong.onnx")
    (wrong,) = recommendation.tried(tmp_path / "wrong.onnx", reference, policy_from())
    assert "L2 error" in wrong.reason
    (tmp_path / "no.onnx").write_bytes(b"no model")
    (unread,) = recommendation.tried(tmp_path / "no.onnx", reference, policy_from())
    assert "OpenVINO cannot load" in unread.reason


def test_what_is_not_installed_is_not_tried(monkeypatch):
    assert recommendation.installed() == ["openvino"]
    absent = replace(recommendation.RUNTIMES["openvino"], packages=("openvino", "a_package_that_is_not_there"))
    monkeypatch.setitem(recommendation.RUNTIMES, "openvino", absent)
    assert recommendation.installed() == []
