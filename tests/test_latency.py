"""From files to a benchmark's report: sizes, gates, profile and pictures, as the command line asks for them."""

from __future__ import annotations

import json
from pathlib import Path

import keras
import pytest
from nets import chain

from deploykit.errors import InputError
from deploykit.export import export
from deploykit.latency import Gate, Settings, latency

L = keras.layers


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """A quick file, one that does the same forty times over, and one of open sizes; savez has a parameter `file`."""
    folder = tmp_path_factory.mktemp("latency")
    deep = [layer for _ in range(40) for layer in (L.Conv2D(8, 3, padding="same"), L.ReLU())]
    nets = {"quick": ((16, 16, 8), deep[:2]), "slow": ((16, 16, 8), deep), "open": ((None, None, 8), deep[:2])}
    for name, (shape, layers) in nets.items():
        copies = [layer.__class__.from_config(layer.get_config()) for layer in layers]
        export(chain(shape, *copies, name="file"), folder / f"{name}.onnx")
    return folder


def gated(room: Path, model: str, baseline: str, **more):
    gate = Gate(room / f"{baseline}.onnx", 1.05, **more)
    return latency([room / f"{model}.onnx"], settings=Settings(threads=(1,), seconds=0.3), gate=gate)


def test_what_is_slower_than_allowed_fails(room):
    found = gated(room, "slow", "quick")
    assert found.failure is not None
    assert found.body["gates"][0]["outcome"] == "failed"


def test_what_is_faster_passes(room):
    found = gated(room, "quick", "slow")
    assert found.failure is None
    assert found.body["gates"][0]["outcome"] == "passed"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--baseline", "{quick}"], "--max-slowdown"),
        (["--max-slowdown", "1.1"], "--baseline"),
        (["--strict"], "--baseline"),
        (["--size", "8,16"], "no open sizes"),
        (["--plot", "x.jpg"], ".svg or .png"),
        (["--baseline", "{quick}", "--max-slowdown", "1.1"], "called"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_line(cli, room, options, words):
    paths = {path.stem: str(path) for path in room.glob("*.onnx")}
    code, _, err = cli("bench", room / "quick.onnx", "--seconds", 0.1, *(part.format(**paths) for part in options))
    assert (code, err.count("\n")) == (2, 1)
    assert words in err


def test_a_profile_needs_a_file_of_onnx_runtime(tmp_path):
    chain((4,), L.Dense(2)).save(tmp_path / "net.keras")
    with pytest.raises(InputError, match="--profile"):
        latency([tmp_path / "net.keras"], profiled=True)


def test_sizes_threads_and_batches_are_settings_of_their_own(cli, room):
    options = ["--size", "8,12", "--batch", "1,2", "--threads", "1", "--seconds", 0.1]
    code, out, _ = cli("bench", room / "open.onnx", *options, "--json", "-")
    rows = json.loads(out)["candidates"]
    assert code == 0
    assert [(row["batch"], row["size"]) for row in rows] == [
        (1, "8x8x8"),
        (2, "8x8x8"),
        (1, "12x12x8"),
        (2, "12x12x8"),
    ]


def test_profile_page_and_pictures_come_with_the_report(cli, room, tmp_path):
    files = ["--plot", tmp_path / "x.svg", "--html", tmp_path / "x.html", "--json", tmp_path / "x.json"]
    code, _, _ = cli("bench", room / "slow.onnx", room / "quick.onnx", "--seconds", 0.2, "--profile", *files)
    assert code == 0
    report = json.loads((tmp_path / "x.json").read_text())
    assert [len(profile["layers"]) > 0 for profile in report["profiles"]] == [True, True]
    assert "<svg" in (tmp_path / "x.svg").read_text()
    assert "roofline" in (tmp_path / "x.html").read_text().lower()


def test_a_gate_that_fails_is_exit_1_with_its_report(cli, room):
    options = ["--baseline", room / "quick.onnx", "--max-slowdown", 1.1, "--seconds", 0.3]
    code, out, err = cli("bench", room / "slow.onnx", *options, "--json", "-")
    assert code == 1
    assert "slower than allowed" in err
    assert json.loads(out)["gates"][0]["outcome"] == "failed"
