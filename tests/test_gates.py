"""A gate fails only where the whole interval lies beyond the limit, and the baseline is measured beside."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from deploykit.bench import BenchReport, Candidate, Timing, _Job, _Lane, _undecided, bench
from deploykit.errors import InputError
from deploykit.gates import gate, judged, worst
from deploykit.noise import Watch

ORT = "onnxruntime-cpu"


def rounds(seconds, count=12):
    return tuple((seconds, seconds) for _ in range(count))


def timing(name, processes, batch=1, **more):
    return Timing(Candidate(name, f"{name}.onnx", ORT), batch, 2, {"x": (batch, 4)}, None, tuple(processes), **more)


def report(new, old):
    """Both from six processes each, which differ by a thousandth from one to the next."""
    return BenchReport(
        tuple(
            timing(name, [rounds(seconds * (1 + spread * i)) for i in range(6)])
            for name, seconds, spread in (("new", new, 0.001), ("old", old, 0.0))
        )
    )


GATES = [
    ("slower than allowed", 1.10, 1.05, False, "failed"),
    ("slower, but not by more than allowed", 1.10, 1.20, False, "passed"),
    ("faster", 0.80, 1.05, False, "passed"),
    ("not as much faster as asked for", 0.95, 0.90, False, "failed"),
    ("at the limit", 1.0475, 1.05, False, "undecided"),
    ("at the limit, strictly", 1.0475, 1.05, True, "failed"),
    ("the interval ends within", 1.04, 1.05, True, "passed"),
]


@pytest.mark.parametrize(("name", "new", "limit", "strict", "outcome"), GATES, ids=[row[0] for row in GATES])
def test_the_whole_interval_decides(name, new, limit, strict, outcome):
    (found,) = gate(report(new, 1.0), "old", limit, strict=strict)
    assert (found.candidate, found.baseline, found.outcome) == ("new", "old", outcome)
    assert found.interval[0] <= found.ratio <= found.interval[1]
    assert (found.reason is None) == (outcome == "passed")
    row = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert row["ci95"] == pytest.approx(list(found.interval))
    assert (row["batch"], row["threads"], row["size"], row["max_slowdown"]) == (1, 2, "4", limit)


def test_without_an_interval_nothing_is_decided():
    few = BenchReport((timing("new", [rounds(9.0, 3)]), timing("old", [rounds(1.0, 3)])))
    (found,) = gate(few, "old", 1.05)
    assert (found.outcome, found.interval, found.to_json()["ci95"]) == ("undecided", None, None)
    assert found.reason == "undecided: too few rounds for an interval; at most 1.05x is allowed; give more seconds"
    assert gate(few, "old", 1.05, strict=True)[0].reason.startswith("undecided (strict): too few rounds")


def test_every_candidate_in_every_setting_has_its_gate():
    seconds = {"new": (1.0, 2.0), "newer": (2.0, 1.0), "old": (1.0, 1.0)}
    found = gate(
        BenchReport(
            tuple(
                timing(name, [rounds(times[i])] * 6, batch)
                for i, batch in enumerate((1, 8))
                for name, times in seconds.items()
            )
        ),
        "old",
        1.05,
    )
    assert [(g.candidate, g.batch, g.outcome) for g in found] == [
        ("new", 1, "passed"),
        ("newer", 1, "failed"),
        ("new", 8, "failed"),
        ("newer", 8, "passed"),
    ]
    assert (worst(found), worst(found[::3]), worst(())) == ("failed", "passed", "passed")
    undecided = gate(report(1.0475, 1.0), "old", 1.05)
    assert worst((*found[::3], *undecided)) == "undecided"
    assert worst((*undecided, *found)) == "failed"


REFUSED = [
    (report(1.0, 1.0), "older", 1.05, "nothing to compare with the baseline 'older'"),
    (BenchReport((timing("old", [rounds(1.0)]),)), "old", 1.05, "nothing to compare with the baseline 'old'"),
    (report(1.0, 1.0), "old", 0.0, "slowdown allowed is 0"),
    (report(1.0, 1.0), "old", float("nan"), "slowdown allowed is nan"),
    (
        BenchReport((timing("new", [], failed="gone"), timing("old", [rounds(1.0)]))),
        "old",
        1.05,
        "new did not run: gone",
    ),
]


@pytest.mark.parametrize(("measured", "baseline", "limit", "message"), REFUSED)
def test_what_was_not_measured_neither_passes_nor_fails(measured, baseline, limit, message):
    with pytest.raises(InputError, match=message):
        gate(measured, baseline, limit)


@pytest.mark.parametrize(
    ("interval", "limit", "outcome"),
    [((1.0, 1.05), 1.05, "passed"), ((1.05, 1.2), 1.05, "undecided"), ((1.0501, 1.2), 1.05, "failed")],
)
def test_the_limit_itself_is_allowed(interval, limit, outcome):
    assert judged(interval, limit, strict=False)[0] == outcome


def lane(name, seconds):
    found = _Lane(Candidate(name, "m.onnx", ORT), 1, 1, Path(), 1.0)
    found._processes.append(list(rounds(seconds)))
    return found


LIMITS = [
    ("the order of the two is known", 1.5, None, None, 0),
    ("but not whether it is within the limit", 1.5, "old", 1.45, 2),
    ("within the limit, beyond doubt", 1.5, "old", 2.0, 0),
    ("beyond the limit, beyond doubt", 1.5, "old", 1.05, 0),
    ("the ratio is that to the baseline, not its inverse", 1.5, "old", 1 / 1.5, 0),
    ("the order of the two is open", 1.1, "old", 2.0, 2),
]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(("name", "new", "focus", "limit", "lanes"), LIMITS, ids=[row[0] for row in LIMITS])
def test_fresh_processes_are_started_where_the_limit_is_in_doubt(name, new, focus, limit, lanes, order):
    job = _Job(7, focus, limit, 1.0, 0, False, Watch(), lambda step: None)
    assert len(_undecided([lane("new", new), lane("old", 1.0)][::order], job)) == lanes


def test_a_real_slowdown_fails_a_real_gate(tmp_path):
    paths = {}
    for name, layers in (("old", 2), ("new", 60)):
        nodes = [helper.make_node("Tanh", [f"v{i}"], [f"v{i + 1}"]) for i in range(layers)]
        x, y = (helper.make_tensor_value_info(v, TensorProto.FLOAT, ["n", 4096]) for v in ("v0", f"v{layers}"))
        graph = helper.make_graph(nodes, name, [x], [y])
        paths[name] = tmp_path / f"{name}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), paths[name])
    listed = [Candidate(name, path, ORT) for name, path in paths.items()]
    inputs = {"v0": np.ones((1, 4096), np.float32)}
    measured = bench(listed, inputs, threads=1, seconds=0.3, processes=2, focus="old", limit=1.05)
    (found,) = gate(measured, "old", 1.05)
    assert (found.candidate, found.outcome) == ("new", "failed")
    assert found.reason.startswith("slower than allowed: the 95 % interval is ")
    assert gate(measured, "old", 1000.0)[0].outcome == "passed"
