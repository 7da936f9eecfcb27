"""Session settings: told to ONNX Runtime as they say, chosen twice, proven, and kept in a bundle that stays whole."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_verify import changed, refused, tensor, write_bundle

from deploykit import environment, latency, tuning, verify
from deploykit.bench import SETTABLE, BenchReport, Candidate, Timing, bench
from deploykit.errors import DataError, InputError
from deploykit.tuning import Trial, alternatives, combined, default_of, save, tune, tune_bundle
from deploykit.verify import Noise, Profile, RefusedError, SessionSettings, verify_bundle

DEFAULT = SessionSettings()
ALL = SessionSettings(3, "parallel", 2, spinning=False, denormals_as_zero=True, cpu_arena=False)
ONE, TWO, CALM = SessionSettings(1), SessionSettings(2), SessionSettings(spinning=False)
BOTH = SessionSettings(1, spinning=False)
# Every small node is handed from thread to thread, and more of them spin than there are cores: slow on any machine.
HANDED = SessionSettings(1, "parallel", 8 * environment.cores())
HERE = verify.machine()


def saved(path: Path, nodes, width: int, constants) -> Path:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name in "xy"]
    held = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def tiny(path: Path, hidden: bool) -> Path:
    """Makes the denormal 1e-40 of ones; ``hidden``: and loses it in a sum."""
    nodes = [helper.make_node("Mul", ["x", "f"], ["h"]), helper.make_node("Mul", ["h", "f"], ["z"])]
    last = helper.make_node("Add", ["x", "z"], ["y"]) if hidden else helper.make_node("Identity", ["z"], ["y"])
    return saved(path, [*nodes, last], 6, {"f": 1e-20})


LAYERS, WIDTH = 20, 16


def deep_weights() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((LAYERS, WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5


def deep(path: Path) -> Path:
    """Many small nodes."""
    nodes, last = [], "x"
    for i in range(LAYERS):
        nodes += [
            helper.make_node("MatMul", [last, f"w{i}"], [f"m{i}"]),
            helper.make_node("Tanh", [f"m{i}"], [f"h{i}"]),
        ]
        last = f"h{i}"
    return saved(
        path,
        [*nodes, helper.make_node("Identity", [last], ["y"])],
        WIDTH,
        {f"w{i}": w for i, w in enumerate(deep_weights())},
    )


def deep_answer(x: np.ndarray, dtype) -> np.ndarray:
    for w in deep_weights():
        x = np.tanh(x.astype(dtype) @ w.astype(dtype))
    return x


X = {"x": np.random.default_rng(1).standard_normal((16, WIDTH)).astype(np.float32)}


def repacked(folder: Path, model, x: np.ndarray, reference: np.ndarray, original: np.ndarray) -> Path:
    """The bundle of `test_verify` with another model inside."""
    write_bundle(folder)
    model(folder / "model.onnx")
    (folder / "test_data_set_0/input_0.pb").write_bytes(tensor(x, "x"))
    (folder / "test_data_set_0/output_0.pb").write_bytes(tensor(reference, "y"))

    def edit(manifest) -> None:
        manifest["signature"] = {
            side: [{"name": name, "shape": [None, x.shape[1]], "dtype": "float32"}]
            for side, name in (("inputs", "x"), ("outputs", "y"))
        }
        manifest["golden"][0]["noise"] = {"y": Noise.between(reference, original).to_json()}
        manifest["class_names"] = None

    return changed(folder, edit)


def deep_bundle(folder: Path) -> Path:
    right = deep_answer(X["x"], np.float64).astype(np.float32)
    return repacked(folder, deep, X["x"], right, deep_answer(X["x"], np.float32))


def with_profile(folder: Path, settings: SessionSettings, **measured) -> Path:
    profile = Profile(settings, {**HERE, **measured}).to_json()
    return changed(folder, lambda manifest: manifest.update(session=profile))


# ------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("count", [0, -1, 1025, 2**40, True, 1.5])
def test_settings_of_no_or_countless_threads_are_refused(count):
    with pytest.raises(RefusedError, match="give a number from 1 to 1024"):
        SessionSettings(threads=count)


def test_settings_travel_as_json():
    for settings in (DEFAULT, ALL):
        assert SessionSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    assert SessionSettings.from_json({"spinning": False}) == SessionSettings(spinning=False)
    assert (DEFAULT.text, SessionSettings(1, spinning=False).text) == ("defaults", "threads 1, no spinning")


def told(options) -> list[object]:
    entries = ["session.intra_op.allow_spinning", "session.inter_op.allow_spinning", "session.set_denormal_as_zero"]
    names = ["intra_op_num_threads", "inter_op_num_threads", "execution_mode", "enable_cpu_mem_arena"]
    found: list[object] = [getattr(options, name) for name in names]
    for entry in entries:
        try:
            found.append(options.get_session_config_entry(entry))
        except RuntimeError:  # not there
            found.append(None)
    return found


def test_onnx_runtime_is_told_what_the_settings_say_and_nothing_else():
    mode = onnxruntime.ExecutionMode
    assert told(DEFAULT.apply(onnxruntime.SessionOptions())) == told(onnxruntime.SessionOptions())
    assert told(ALL.apply(onnxruntime.SessionOptions())) == [3, 2, mode.ORT_PARALLEL, False, "0", "0", "1"]


@pytest.mark.parametrize("settings", [DEFAULT, ALL, SessionSettings(1, spinning=False)])
def test_the_lines_of_python_do_the_same(settings):
    scope = {"onnxruntime": onnxruntime}
    exec("\n".join(settings.python), scope)
    assert told(scope["options"]) == told(settings.apply(onnxruntime.SessionOptions()))


DAMAGED = [
    ([], "must be an object"),
    ({"threads": 0}, "threads is 0"),
    ({"threads": True}, "threads is True"),
    ({"threads": 1.0}, "threads is 1.0"),
    ({"inter_op_threads": 2}, "needs the execution mode parallel"),
    ({"execution_mode": "fast"}, "give sequential or parallel"),
    ({"spinning": 0}, "spinning is 0"),
    ({"denormals_as_zero": None}, "denormals_as_zero is None"),
    ({"cpu_arena": "yes"}, "cpu_arena is 'yes'"),
    ({"graph": "all"}, "unknown session setting 'graph'; this version knows threads"),
]


@pytest.mark.parametrize(("record", "words"), DAMAGED)
def test_damaged_settings_are_refused(record, words):
    with pytest.raises(RefusedError, match=words):
        SessionSettings.from_json(record)


# ---------------------------------------------------------------------------------------------------- what is tried

TRIED = [
    (None, 1, ["threads 1", "denormals as zero", "no CPU arena"]),
    (None, 2, ["threads 1", "threads 2", "parallel execution, inter-op threads 2", "no spinning"]),
    (None, 6, ["threads 1", "threads 2", "threads 4", "threads 6", "parallel execution, inter-op threads 6"]),
    ((1,), 8, ["threads 1, denormals as zero", "threads 1, no CPU arena"]),
    ((3, 2), 8, ["threads 2", "threads 3, parallel execution, inter-op threads 3", "threads 3, no spinning"]),
]


@pytest.mark.parametrize(("threads", "cores", "names"), TRIED)
def test_alternatives_differ_in_one_setting_and_keep_to_the_users_threads(threads, cores, names):
    found = alternatives(threads, cores)
    assert [each.text for each in found][: len(names)] == names
    assert default_of(threads) not in found
    assert all(each.threads in (threads or range(1, cores + 1)) for each in found if each.threads or threads)


def rounds(seconds: float) -> tuple[tuple[float, ...], ...]:
    return tuple((seconds * (1 + 0.001 * (i % 3)),) for i in range(12))


def measured(times: dict[SessionSettings, float]) -> BenchReport:
    """A run that never was, of 7 processes each."""
    return BenchReport(
        tuple(
            Timing(
                Candidate(each.text, "m.onnx", SETTABLE, session=each),
                *(1, each.threads or 2, {"x": (1, 2)}, 1),
                (rounds(seconds),) * 7,
            )
            for each, seconds in times.items()
        )
    )


def trials(times: dict[SessionSettings, float]) -> list[Trial]:
    report = measured({DEFAULT: 1.0, **times})
    return [Trial(each, report.comparison(each.text, DEFAULT.text)) for each in times]


def test_a_combination_takes_the_fastest_of_what_excludes_each_other():
    assert combined(DEFAULT, trials({TWO: 0.9, CALM: 0.9, ONE: 0.8})) == BOTH
    assert combined(DEFAULT, trials({ONE: 0.8, CALM: 0.9, TWO: 0.7})) == SessionSettings(2, spinning=False)


CONFIRMED = [
    ({ONE: 0.8, BOTH: 0.7}, BOTH),
    ({ONE: 0.8, BOTH: 0.8}, ONE),  # no faster than the simpler one
    ({ONE: 0.8, BOTH: 0.9}, ONE),
    ({ONE: 1.0, BOTH: 0.9}, BOTH),
    ({ONE: 1.0, BOTH: 1.0}, None),
    ({ONE: 1.2, BOTH: 1.1}, None),  # faster than what is slower than the default
    ({ONE: 0.8}, ONE),
    ({ONE: 1.0}, None),
]


@pytest.mark.parametrize(("times", "expected"), CONFIRMED)
def test_only_what_the_second_run_confirms_is_chosen(times, expected):
    found = tuning._chosen(trials(times), measured({DEFAULT: 1.0, **times}))
    assert (found and found.settings) == expected


# ------------------------------------------------------------------------------------------------------ measurement


def test_what_is_faster_twice_is_recommended_and_kept_by_the_bundle(cli, tmp_path):
    folder, messages = deep_bundle(tmp_path / "b"), []
    before = verify.open_bundle(folder).manifest
    found = tune_bundle(
        folder, X, default=HANDED, tried=[ONE], seconds=0.1, processes=1, progress=lambda text: messages.append(text)
    )
    assert found.settings == ONE
    assert found.chosen.comparison.ratio.high < 1
    body = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert {"profile", "chosen", "tried", "confirmed"} <= set(body)
    assert SessionSettings.from_json(body["profile"]) == ONE
    assert {"settings", "ratio", "ci95", "verdict"} <= set(body["tried"][0])
    assert [row["session"] for row in body["confirmation"]["candidates"]] == [ONE.to_json(), HANDED.to_json()]
    assert body["confirmation"]["candidates"][0]["samples_s"] != found.first.to_json()["candidates"][0]["samples_s"]
    assert any("run 2 of 2" in message for message in messages)
    bundle = verify.open_bundle(folder)
    assert bundle.manifest == {**before, "session": found.profile.to_json(), "seal": bundle.manifest["seal"]}
    assert found.measured.items() >= {**HERE, "batch": 1, "onnxruntime": onnxruntime.__version__}.items()
    assert bundle.profile.measured["ratio"] == body["confirmed"][0]["ratio"]
    assert cli("check", folder)[0] == 0
    code, _, err = cli("bench", folder, "--tune-session")
    assert (code, err.count("\n")) == (2, 1)
    assert "--force measures again" in err
    assert verify.open_bundle(folder).manifest == bundle.manifest


def test_a_profile_that_fails_the_golden_data_is_not_recommended(tmp_path):
    """The reference is wrong, so no answer is right, however fast."""
    right = deep_answer(X["x"], np.float64).astype(np.float32)
    folder = repacked(tmp_path / "b", deep, X["x"], right * np.float32(1.001), deep_answer(X["x"], np.float32) * 1.001)
    bundle = verify.open_bundle(folder)
    found = tune(folder / "model.onnx", X, bundle=bundle, default=HANDED, tried=[ONE], seconds=0.1, processes=1)
    assert found.chosen is None
    assert found.profile is None
    assert found.confirmed == ()
    assert "stands" in found.reason
    assert "changes the answers: output y: whole output" in found.reason


@pytest.mark.parametrize("hidden", [True, False])
def test_answers_that_lose_denormals_differ_where_they_show(tmp_path, hidden):
    path, x = tiny(tmp_path / "m.onnx", hidden), {"x": np.ones((3, 6), np.float32)}
    why = tuning._own_proof(path, SessionSettings(1), x, 1)(SessionSettings(1, denormals_as_zero=True))
    assert (why is None) == hidden
    assert hidden or why.startswith("output y:")


def test_answers_within_rounding_are_the_same(tmp_path):
    """Of the same file, and of one whose weights were moved by an eighth of a percent."""
    path, moved = deep(tmp_path / "m.onnx"), deep(tmp_path / "n.onnx")
    model = onnx.load(moved)
    weights = numpy_helper.to_array(model.graph.initializer[0]) * np.float32(1.00125)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights, "w0"))
    onnx.save(model, moved)
    pieces = list(tuning._pieces(X, 8))
    found = tuning.answers(path, SessionSettings(2), pieces)
    assert [len(each["y"]) for each in found] == [8, 8]
    np.testing.assert_allclose(
        np.concatenate([each["y"] for each in found]), deep_answer(X["x"], np.float64), atol=1e-5
    )
    assert tuning._own_proof(path, SessionSettings(1), X, 8)(SessionSettings(2)) is None
    other = tuning.answers(moved, SessionSettings(1), pieces)
    assert not tuning._same_bits(found[0], other[0])
    judge = verify.Judge(verify.FLOAT32)
    judge.add(found[0], other[0], None, None)
    assert tuning._first_failure(judge.conclude()).startswith("output y: whole output")


def test_a_file_in_nchw_is_given_its_own_layout(tmp_path):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 4, 5]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "net", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {"deploykit.layout": "NCHW"})
    onnx.save(model, tmp_path / "m.onnx")
    images = {"x": np.random.default_rng(0).standard_normal((4, 4, 5, 3)).astype(np.float32)}
    assert tuning._own_proof(tmp_path / "m.onnx", ONE, images, 2)(CALM) is None


def test_a_model_that_does_not_run_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="does not run with threads 1"):
        tune(tmp_path / "m.onnx", X, threads=(1,), seconds=0.1, processes=1)


@pytest.mark.parametrize("threads", [(), (0,), (2, 2)])
def test_thread_counts_that_make_no_sense_are_refused(tmp_path, threads):
    with pytest.raises(InputError, match="thread counts are"):
        tune(tmp_path / "m.onnx", X, threads=threads)


def test_a_candidate_says_its_threads_once(tmp_path):
    for candidate in (
        Candidate("a", "m.onnx", SETTABLE, 1, session=ONE),
        Candidate("a", "m.keras", "keras", session=ONE),
    ):
        with pytest.raises(InputError, match="session settings are for onnxruntime-cpu"):
            bench([candidate], X)


# ------------------------------------------------------------------------------------------------------------ bundle


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_profile_is_written_into_the_manifest_and_nowhere_else(tmp_path):
    folder = write_bundle(tmp_path / "b")
    before, bundle = files_of(folder), verify.open_bundle(folder)
    notices: list[str] = []
    assert save(bundle, Profile(ONE, dict(HERE)), notices)
    after = files_of(folder)
    assert {name for name in before if before[name] != after[name]} == {"deploykit.json"}
    assert set(before) == set(after)
    sealed = verify.open_bundle(folder)
    assert {key: value for key, value in sealed.manifest.items() if key not in ("session", "seal")} == {
        key: value for key, value in bundle.manifest.items() if key != "seal"
    }
    assert sealed.profile == Profile(ONE, HERE)
    assert notices == []
    assert save(sealed, None, notices)  # the default won after all
    assert files_of(folder) == before
    assert notices == ["the profile that the bundle had was removed"]
    assert not save(verify.open_bundle(folder), None, [])


def test_a_bundle_that_changed_meanwhile_is_left_alone(tmp_path):
    folder = write_bundle(tmp_path / "b")
    bundle = verify.open_bundle(folder)
    changed(folder, lambda manifest: manifest.update(class_names=None))
    before = files_of(folder)
    with pytest.raises(DataError, match="changed while it was measured"):
        save(bundle, Profile(ONE, dict(HERE)), [])
    (folder / "model.onnx").write_bytes(b"")
    with pytest.raises(InputError, match=r"model\.onnx was changed"):
        save(bundle, Profile(ONE, dict(HERE)), [])
    assert {**before, "model.onnx": b""} == files_of(folder)


def test_a_verify_of_another_version_is_told(tmp_path):
    folder = write_bundle(tmp_path / "b")
    with (folder / "verify.py").open("a") as stream:
        stream.write("# older\n")
    changed(folder, lambda manifest: None)
    notices: list[str] = []
    save(verify.open_bundle(folder), Profile(ONE, dict(HERE)), notices)
    assert "another version's" in notices[0]


@pytest.mark.parametrize(
    ("arguments", "applied"), [((), BOTH), (("--threads", "2"), SessionSettings(2, spinning=False))]
)
def test_verify_applies_the_profile_and_says_so(tmp_path, arguments, applied):
    folder = with_profile(write_bundle(tmp_path / "b"), BOTH)
    line = [sys.executable, str(folder / "verify.py"), "--seconds", "0.05", *arguments, "--json", str(tmp_path / "r")]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    about = json.loads((tmp_path / "r").read_text())["environment"]
    assert SessionSettings.from_json(about["session"]) == applied
    assert about["threads"] == applied.threads
    assert f"session profile: {applied.text}" in done.stdout


def test_the_session_is_really_opened_so(tmp_path):
    bundle = verify.open_bundle(with_profile(write_bundle(tmp_path / "b"), SessionSettings(1, "parallel", 3)))
    options = verify.Session(bundle, None, None).session.get_session_options()
    mode = onnxruntime.ExecutionMode
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 3)
    assert options.execution_mode == mode.ORT_PARALLEL
    bounded = verify.Session(bundle, None, 2).session.get_session_options()  # the user's threads are all there are
    assert (bounded.intra_op_num_threads, bounded.execution_mode) == (2, mode.ORT_SEQUENTIAL)


def test_without_a_profile_there_is_none(tmp_path):
    report = verify_bundle(write_bundle(tmp_path / "b"), seconds=0)
    assert report["environment"]["session"] is None
    assert report["notices"] == []


@pytest.mark.parametrize("elsewhere", [{"cpu": "Z80"}, {"cores": 999}, {}])
def test_another_machine_is_noticed(tmp_path, elsewhere):
    notices = verify_bundle(with_profile(write_bundle(tmp_path / "b"), ONE, **elsewhere), seconds=0)["notices"]
    assert [("tune it again" in notice) for notice in notices] == [True] * bool(elsewhere)


BROKEN = [
    (3, "session in deploykit.json lacks 'settings'"),
    ({"settings": {}}, "lacks 'measured'"),
    ({"settings": {}, "measured": {"cores": 1}}, "lacks 'cpu'"),
    ({"settings": {}, "measured": {"cpu": "Z80"}}, "lacks 'cores'"),
    ({"settings": {"threads": -1}, "measured": HERE}, "threads is -1"),
    ({"settings": {"turbo": True}, "measured": HERE}, "unknown session setting 'turbo'"),
]


@pytest.mark.parametrize(("record", "words"), BROKEN)
def test_a_damaged_profile_is_one_line(tmp_path, capsys, record, words):
    folder = changed(write_bundle(tmp_path / "b"), lambda manifest: manifest.update(session=record))
    assert words in refused(capsys, folder)


@pytest.mark.parametrize("flushed", [False, True])
def test_verify_sees_denormals_that_the_profile_loses(tmp_path, flushed):
    """The session makes zeros of them on its own thread; the judgement must not."""
    x, y = np.ones((3, 6), np.float32), np.full((3, 6), np.float32(1e-20) * np.float32(1e-20))
    folder = repacked(tmp_path / "b", lambda path: tiny(path, False), x, y, y)
    with_profile(folder, SessionSettings(1, denormals_as_zero=flushed))
    line = [sys.executable, str(folder / "verify.py"), "--seconds", "0"]
    assert subprocess.run(line, capture_output=True, check=False).returncode == int(flushed)


# ------------------------------------------------------------------------------------------------------ command line


def test_the_report_says_what_the_bundle_keeps(cli, tmp_path, monkeypatch):
    """Whatever is found: with one thread, and one process for each candidate, there is little to win."""
    monkeypatch.setattr(latency, "tune", partial(tune, processes=1))
    folder = with_profile(deep_bundle(tmp_path / "b"), CALM)
    options = [
        "--threads",
        1,
        "--seconds",
        0.1,
        "--force",
        "--json",
        tmp_path / "r.json",
        "--html",
        tmp_path / "r.html",
    ]
    code, out, err = cli("bench", folder, "--tune-session", *options)
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "r.json").read_text())
    session, kept = report["session"], verify.open_bundle(folder).profile
    assert kept is None or kept.settings.to_json() == session["profile"]
    assert (kept is not None) == session["chosen"]
    assert report["outputs_written"] == [str(folder / "deploykit.json")]  # the old profile is gone in any case
    assert [row["name"] for row in session["tried"]] == ["threads 1, denormals as zero", "threads 1, no CPU arena"]
    assert session["tried"][1]["name"] in out
    assert session["reason"] in " ".join(out.split())
    assert session["tried"][1]["name"] in (tmp_path / "r.html").read_text()


SENSELESS = [
    (["{model}", "{model}"], "one model"),
    (["{model}", "--batch", "1,2"], "one batch size"),
    (["{model}", "--runtime", "onnxruntime-cpu", "--runtime", "openvino"], "one runtime"),
    (["{model}", "--runtime", "openvino"], "sets up onnxruntime-cpu"),
    (["{model}", "--size", "3,4"], "one size"),
    (["{model}", "--profile"], "goes alone"),
    (["{model}", "--baseline", "{model}", "--max-slowdown", "1.1"], "goes alone"),
    (["{model}", "--threads", "1,1"], "thread counts are"),
    (["net.keras"], "would run on keras"),
    (["gone.onnx"], "gone.onnx"),
]


@pytest.mark.parametrize(("arguments", "words"), SENSELESS)
def test_a_request_that_makes_no_sense_is_one_line(cli, tmp_path, arguments, words):
    model = deep(tmp_path / "m.onnx")
    code, _, err = cli("bench", "--tune-session", *(part.format(model=model) for part in arguments))
    assert (code, err.count("\n")) == (2, 1)
    assert words in err


def test_bench_says_that_it_does_not_apply_a_profile(cli, tmp_path):
    folder = with_profile(deep_bundle(tmp_path / "b"), ONE)
    code, out, err = cli("bench", folder, "--seconds", "0.1", "--json", "-")
    assert code == 0, err
    assert any("session profile (threads 1), which bench does not apply" in line for line in json.loads(out)["notices"])
