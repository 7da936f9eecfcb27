"""The pytest plugin, in pytest runs of its own: the fixture, the bundles, and runs that use neither."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from test_ci import keras_net
from test_verify import write_bundle

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def inner(pytester, monkeypatch, tmp_path_factory):
    """pytest in a subprocess that finds the plugin by the entry point that pyproject.toml states."""
    (ours,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"].items()
    site = tmp_path_factory.mktemp("site")
    information = site / "deploykit_under_test-0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: deploykit-under-test\nVersion: 0\n")
    (information / "entry_points.txt").write_text(f"[pytest11]\n{ours[0]} = {ours[1]}\n")
    monkeypatch.setenv("PYTHONPATH", f"{site}:{ROOT}")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makeini("[pytest]\naddopts = --strict-markers -p no:cacheprovider")
    return pytester


WITHOUT = """
    import sys

    def test_nothing_was_imported():
        assert not {"numpy", "keras", "tensorflow", "onnxruntime"} & set(sys.modules)
        assert ("deploykit.pytest_plugin" in sys.modules) is %s
"""


def test_a_run_that_does_not_use_it_imports_nothing_heavy(inner):
    inner.makepyfile(WITHOUT % True)
    inner.runpytest_subprocess("-p", "no:hypothesispytest").assert_outcomes(passed=1)


def test_it_can_be_left_out(inner):
    inner.makepyfile(WITHOUT % False)
    inner.runpytest_subprocess("-p", "no:hypothesispytest", "-p", "no:deploykit").assert_outcomes(passed=1)
    assert (
        inner.runpytest_subprocess("-p", "no:deploykit", "--deploykit-bundle", ".").ret == pytest.ExitCode.USAGE_ERROR
    )


def test_its_import_needs_pytest_alone():
    script = "import deploykit.pytest_plugin, sys; print(*{'numpy', 'keras', 'tensorflow', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# ---------------------------------------------------------------------------------------------------- the fixture

FIXTURE = """
    import pathlib
    import keras
    import numpy as np
    import pytest
    from deploykit.errors import DataError, InputError

    X = np.load("x.npz")["x"]

    def test_files(assert_equivalent):
        report = assert_equivalent("net.keras", pathlib.Path("right.onnx"), data="x.npz", samples=10)
        assert report["schema"] == "deploykit.check/1"
        assert (report["passed"], report["proven"]) == (True, True)
        assert report["data"] == "10 samples: x.npz (10 of 20 samples)"
        assert report["comparisons"][0]["runtime"] == "onnxruntime-cpu"

    def test_wrong_file(assert_equivalent):
        assert_equivalent("net.keras", "wrong.onnx", data="x.npz", rtol=1e-5)

    def test_a_tolerance_counts(assert_equivalent):
        assert_equivalent("net.keras", "wrong.onnx", data="x.npz", atol=0.5)

    @pytest.mark.parametrize("data", [X.astype("float64"), {"x": X.tolist()}], ids=["array", "named"])
    def test_models_in_memory(assert_equivalent, data):
        model = keras.models.load_model("net.keras")
        assert assert_equivalent(model, keras.models.clone_model(model), data=data, rtol=1e9)["data"].startswith("20")

    def test_wrong_model_in_memory(assert_equivalent):
        model = keras.models.load_model("net.keras")
        other = keras.models.clone_model(model)  # other weights
        assert_equivalent(model, other, data=X, samples=4)

    def test_misuse(assert_equivalent):
        with pytest.raises(InputError, match="paths and keras.Models, not int"):
            assert_equivalent("net.keras", 1)
        with pytest.raises(InputError, match="paths and keras.Models, not NoneType"):
            assert_equivalent(None, "right.onnx")
        with pytest.raises(DataError, match="NaN or Inf, first in sample 1;"):
            assert_equivalent("net.keras", "right.onnx", data=np.where(np.arange(20)[:, None] == 1, np.nan, X))
        with pytest.raises(DataError, match="limit of -3"):
            assert_equivalent("net.keras", "right.onnx", data=X, samples=-3)
        with pytest.raises(DataError, match="0 samples"):
            assert_equivalent("net.keras", "right.onnx", samples=0)
        with pytest.raises(DataError, match="no such|no file"):
            assert_equivalent("net.keras", "right.onnx", data="none.npz")
        with pytest.raises(InputError, match="abacus"):
            assert_equivalent("net.keras", "right.onnx", runtime="abacus")

    def test_wrong_signature(assert_equivalent):
        assert_equivalent("net.keras", "other.keras")
"""


@pytest.mark.slow
def test_the_fixture_passes_what_is_right_and_tells_what_is_wrong(inner):
    import keras

    keras_net(inner.path)
    start = keras.Input((6,), name="other")
    keras.Model(start, keras.layers.Dense(3, name="y")(start)).save(inner.path / "other.keras")
    inner.makepyfile(FIXTURE)
    result = inner.runpytest_subprocess()
    result.assert_outcomes(passed=5, failed=3)
    result.stdout.fnmatch_lines(
        [
            "E *AssertionError: wrong.onnx is not equivalent to net.keras",
            "E *output y",
            "E *(worst: sample * candidate *, reference *",
            "E *SNR * dB, the original's own * dB",
            "E *worst element sample * [[]*",
            "E *inputs: 20 samples: x.npz",
            "E *to see more: deploykit check net.keras wrong.onnx --data x.npz --rtol 1e-05 --json report.json",
            "E *the Keras model * is not equivalent to the Keras model *",
            "E *to see more: save both models and compare the files with `deploykit check`",
            "E *the signature drifted: *",
        ]
    )
    assert "pytest_plugin.py:" not in result.stdout.str()  # the failure is the test's, not the plugin's


# ---------------------------------------------------------------------------------------------------- the bundles


def test_every_bundle_below_becomes_tests(inner):
    write_bundle(write_bundle(inner.path / "dist" / "deep" / "good") / "inside")
    write_bundle(inner.path / "dist" / "wrong", lambda w1, w2: (w1 * 1.01, w2))
    write_bundle(inner.path / "dist" / "empty", golden=[])
    write_bundle(inner.path / "dist" / ".half-written")
    (write_bundle(inner.path / "dist" / "changed") / "model.onnx").write_bytes(b"x")
    (inner.path / "dist" / "unsealed").mkdir()
    (inner.path / "dist" / "unsealed" / "deploykit.json").write_text("{}")
    inner.makepyfile(
        """
        import sys

        def test_own():
            assert not {"keras", "tensorflow", "onnx"} & set(sys.modules)
        """
    )
    result = inner.runpytest_subprocess("--deploykit-bundle", "dist", "-rA")
    result.assert_outcomes(passed=5, failed=5)
    summary = [line.split(" - ")[0] for line in result.outlines if line.startswith(("PASSED dist", "FAILED"))]
    assert sorted(summary) == [
        "FAILED dist/changed::hashes",
        "FAILED dist/changed::test_data_set_0",
        "FAILED dist/empty::golden data",
        "FAILED dist/unsealed::hashes",
        "FAILED dist/wrong::test_data_set_0",
        "PASSED dist/deep/good::hashes",
        "PASSED dist/deep/good::test_data_set_0",
        "PASSED dist/empty::hashes",
        "PASSED dist/wrong::hashes",
    ]
    result.stdout.fnmatch_lines(
        [
            "dist/changed: model.onnx was changed after the bundle was sealed*",
            "dist/empty: nothing was compared: the bundle holds no golden data",
            "dist/wrong: not equivalent on test_data_set_0",
            "  output y: * candidate *, reference *",
            "*worst element sample * [[]*",
        ]
    )
    assert "Traceback" not in result.stdout.str()


def test_only_the_bundles_can_be_asked_for(inner):
    for name in ("a", "b"):
        write_bundle(inner.path / name / "bundle")
    inner.makepyfile("def test_own(): assert False")
    result = inner.runpytest_subprocess("--deploykit-bundle=a", "--deploykit-bundle=b", "-m", "deploykit_bundle")
    result.assert_outcomes(passed=4, deselected=1)
    result.stdout.fnmatch_lines(["collected 5 items / 1 deselected / 4 selected"])


@pytest.mark.parametrize("folder", ["empty", "none"])
def test_a_folder_without_a_bundle_is_a_usage_error(inner, folder):
    (inner.path / "empty").mkdir()
    inner.makepyfile("def test_own(): pass")
    result = inner.runpytest_subprocess("--deploykit-bundle", folder)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --deploykit-bundle {folder}: no bundle is there*"])
