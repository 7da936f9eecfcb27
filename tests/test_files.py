"""What may be written where: never over what is read, in it or around it, and never two outputs in one place."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploykit.errors import InputError, OutputError
from deploykit.files import apart, claim


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of each kind that may be read, all in the working folder."""
    for name in ("net.keras", "net.onnx", "net.onnx.data", "code.py", "set/a/0.png", "store/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "store" / "1.png")
    (tmp_path / "alias.keras").symlink_to("net.keras")
    (tmp_path / "other").symlink_to("set")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "target"),
    [
        ("net.keras", "net.keras"),
        ("net.keras", "./set/../net.keras"),
        ("net.keras", "alias.keras"),
        ("alias.keras", "net.keras"),
        ("net.onnx", "net.onnx.data"),
        ("set", "set/a/0.png"),
        ("set", "set/new.json"),
        ("set", "set/a/deep/new.json"),
        ("set", "set/link.png"),  # the link itself would be replaced
        ("set", "other/new.json"),
        ("other", "set/new.json"),
        (".", "new.json"),
        ("code.py:made", "code.py"),
        ("code.py", "code.py"),
    ],
)
def test_what_is_read_is_never_written(room: Path, given: str, target: str) -> None:
    with pytest.raises(OutputError, match="would replace the input") as caught:
        claim(target, force=True, inputs=[None, given])
    assert given in str(caught.value)


@pytest.mark.parametrize(
    ("given", "target"),
    [
        ("net.keras", "net.keras.json"),
        ("net.onnx", "net.keras"),
        ("set", "set.json"),
        ("set", "settings/new.json"),
        ("set/a", "set/new.json"),
        ("code.py:made", "made"),
        ("module:function", "function"),
        ("gone", "gone/new.json"),
    ],
)
def test_neighbours_may_be_written(room: Path, given: str, target: str) -> None:
    assert claim(target, force=True, inputs=[given]) == Path(target)


@pytest.mark.parametrize(
    ("one", "other"), [("a", "a"), ("a", "./a"), ("out", "out/deploykit.json"), ("out/x", "out"), ("set/n", "other/n")]
)
def test_two_outputs_in_one_place_are_refused(room: Path, one: str, other: str) -> None:
    with pytest.raises(InputError, match=r"--json .* and --html .* name the same file"):
        apart({"--json": one, "--html": other, "-o": None})


def test_outputs_side_by_side_are_fine(room: Path) -> None:
    apart({"--json": "-", "--html": "-", "-o": "out", "--plot": "out.svg", "--junit": None})
