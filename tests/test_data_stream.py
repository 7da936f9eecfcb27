"""Streams: one batch in memory, whatever the source; the same numbers and the same complaints as read whole."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit.data import hold_samples, open_samples, read_samples, rows
from deploykit.data.rows import Slot, npz_member
from deploykit.errors import DataError, MissingComponentError
from deploykit.signature import Signature, TensorSpec

RNG = np.random.default_rng(11)
X = RNG.random((37, 3))
TWO = Signature((TensorSpec("a", (None, 2), "float32"), TensorSpec("b", (None,), "int32")), ())


def one(shape: tuple[int | None, ...], dtype: str = "float32", **bounds: float) -> Signature:
    return Signature((TensorSpec("x", (None, *shape), dtype, **bounds),), ())


def complaint(action: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shards(folder: Path, *arrays: dict[str, Any], packed: bool = False) -> str:
    folder.mkdir()
    for index, named in enumerate(arrays):
        (np.savez_compressed if packed else np.savez)(folder / f"{index:02}.npz", **named)
    return str(folder)


def program(folder: Path, body: str, name: str = "made.py") -> str:
    (folder / name).write_text("import numpy as np\n" + body)
    return f"{folder / name}:load"


# --- one result from every source ----------------------------------------------------------------------------------


def _npy(folder: Path) -> str:
    np.save(folder / "s.npy", X)
    return str(folder / "s.npy")


def _fortran(folder: Path) -> str:
    np.save(folder / "s.npy", np.asfortranarray(X))
    return str(folder / "s.npy")


def _npz(folder: Path) -> str:
    np.savez(folder / "s.npz", x=X)
    return str(folder / "s.npz")


def _compressed(folder: Path) -> str:
    np.savez_compressed(folder / "s.npz", x=X)
    return str(folder / "s.npz")


def _unaligned(folder: Path) -> str:
    """A member that begins at an odd place."""
    np.savez(folder / "s.npz", pad=np.zeros(3, np.uint8), x=X)
    return str(folder / "s.npz")


def _folder(folder: Path) -> str:
    return shards(folder / "set", {"x": X[:10]}, {"x": X[10:11]}, {"x": X[11:]})


def _packed_folder(folder: Path) -> str:
    return shards(folder / "set", {"x": X[:10]}, {"x": X[10:11]}, {"x": X[11:]}, packed=True)


def _array(folder: Path) -> str:
    np.save(folder / "own.npy", X)
    return program(folder, f"def load(): return np.load({str(folder / 'own.npy')!r})")


def _batches(folder: Path) -> str:
    np.save(folder / "own.npy", X)
    return program(
        folder, f"def load():\n    for i in range(0, 37, 8): yield np.load({str(folder / 'own.npy')!r})[i:i+8]"
    )


SOURCES = (_npy, _fortran, _npz, _compressed, _unaligned, _folder, _packed_folder, _array, _batches)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("size", [1, 10, 100])
def test_batches_are_the_samples_in_order_again_and_again(
    tmp_path: Path, source: Callable[[Path], str], size: int
) -> None:
    stream = open_samples(source(tmp_path), one((3,)))
    assert stream.count == 37
    for _ in range(2):
        batches = [batch["x"] for batch in stream.batches(size)]
        assert [len(batch) for batch in batches] == [size] * (37 // size) + [37 % size] * (37 % size > 0)
        np.testing.assert_array_equal(np.concatenate(batches), X.astype(np.float32))
        np.testing.assert_array_equal(stream.head(12).arrays["x"], X[:12].astype(np.float32))
    assert (stream.head(99).count, stream.head(2).source) == (37, stream.source)


@pytest.mark.parametrize("source", [s for s in SOURCES if s is not _batches])
def test_every_source_draws_the_same_samples(tmp_path: Path, source: Callable[[Path], str]) -> None:
    drawn = np.sort(np.random.default_rng(5).permutation(37)[:9])
    where = source(tmp_path)
    np.testing.assert_array_equal(
        read_samples(where, one((3,)), limit=9, seed=5).arrays["x"], X[drawn].astype(np.float32)
    )


# --- values are looked at batch by batch ---------------------------------------------------------------------------

SPOILT: dict[str, tuple[Any, Signature, str]] = {
    "NaN": (np.nan, one((1,)), "NaN or Inf, first in sample 7"),
    "too large": (1e39, one((1,)), "up to 1e+39, too large for float32, first in sample 7"),
    "fraction": (0.5, one((1,), "int32"), "first in sample 7"),
    "vocabulary": (10.0, one((1,), "int32", low=0.0, high=9.0), "values 10..10, first in sample 7"),
    "negative": (-1.0, one((1,), "uint8"), "values -1..-1, first in sample 7"),
}


@pytest.mark.parametrize("case", SPOILT)
@pytest.mark.parametrize("split", [False, True])
def test_a_sample_that_does_not_fit_is_named_when_its_batch_comes(tmp_path: Path, case: str, split: bool) -> None:
    value, signature, words = SPOILT[case]
    x = np.ones((10, 1))
    x[7] = value
    if split:
        where = shards(tmp_path / "set", {"x": x[:4]}, {"x": x[4:]})
        words += " (row 3 there)"
    else:
        np.save(tmp_path / "s.npy", x)
        where = str(tmp_path / "s.npy")
    stream = open_samples(where, signature)
    batches = stream.batches(3)
    assert [len(next(batches)["x"]) for _ in range(2)] == [3, 3]
    assert words in complaint(lambda: next(batches))
    assert words in complaint(lambda: read_samples(where, signature))


HEADERS: dict[str, tuple[Any, Signature, str]] = {
    "shape": (np.zeros((4, 5)), one((3,)), "found [4, 5] float64"),
    "kind": (np.array([["a"]]), one((1,)), "give numbers"),
    "text": (np.ones((2, 1)), one((1,), "string"), "give strings"),
    "pickle": (np.array([[{}]], dtype=object), one((1,)), "never read"),
    "none": (np.zeros((0, 3)), one((3,)), "at least one sample"),
    "batch": (np.zeros((3, 1)), Signature((TensorSpec("x", (4, 1), "float32"),), ()), "fixed to 4"),
}


@pytest.mark.parametrize("case", HEADERS)
@pytest.mark.parametrize("name", ["s.npy", "s.npz", "folder"])
def test_what_headers_tell_is_refused_at_once(tmp_path: Path, case: str, name: str) -> None:
    given, signature, words = HEADERS[case]
    if name == "s.npy":
        np.save(tmp_path / name, given)
    elif name == "s.npz":
        np.savez(tmp_path / name, x=given)
    else:
        shards(tmp_path / name, {"x": given})
    assert words in complaint(lambda: open_samples(str(tmp_path / name), signature))


# --- archives ------------------------------------------------------------------------------------------------------


def test_a_member_begins_where_its_local_header_says(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        info = zipfile.ZipInfo("x.npy")
        info.extra = b"\xfe\xca\x03\x00abc"  # only here, and of odd length
        archive.writestr(info, (tmp_path / "x.npy").read_bytes())
    np.testing.assert_array_equal(read_samples(str(tmp_path / "s.npz"), one((3,))).arrays["x"], X.astype(np.float32))


@pytest.mark.parametrize("name", ["s.npy", "s.npz"])
def test_an_array_longer_than_its_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    np.save(tmp_path / "s.npy", X)
    (tmp_path / "s.npy").write_bytes((tmp_path / "s.npy").read_bytes()[:-1])
    if name == "s.npz":
        with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
            archive.write(tmp_path / "s.npy", "x.npy")
    assert "damaged or truncated" in complaint(lambda: open_samples(str(tmp_path / name), one((3,))))


def test_members_are_read_in_place_unless_compressed(tmp_path: Path) -> None:
    stored = npz_member(_npz(tmp_path), "x", Slot()).unpacked()
    assert stored.file == str(tmp_path / "s.npz")
    packed = npz_member(_compressed(tmp_path), "x", Slot()).unpacked()
    assert not isinstance(packed.file, str)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_in_an_archive_is_found(tmp_path: Path, save: Callable[..., None]) -> None:
    path = tmp_path / "s.npz"
    save(path, x=np.tile(X, (1000, 1)))  # what one read does not take in
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "damaged" in complaint(lambda: read_samples(str(path), one((3,))))


def test_a_file_cut_short_while_it_is_read_is_one_line(tmp_path: Path) -> None:
    stream = open_samples(_npy(tmp_path), one((3,)))
    (tmp_path / "s.npy").write_bytes((tmp_path / "s.npy").read_bytes()[:300])
    assert "damaged or truncated" in complaint(lambda: stream.head(1))


def test_a_file_replaced_while_it_is_read_is_one_line(tmp_path: Path) -> None:
    stream = open_samples(_npz(tmp_path), one((3,)))
    np.savez(tmp_path / "s.npz", x=X.view(np.int64))
    assert "damaged" in complaint(lambda: stream.head(1))


@pytest.mark.skipif(sys.platform != "linux", reason="open files without a name are counted in /proc")
@pytest.mark.parametrize("source", [_compressed, _packed_folder, _batches])
def test_temporary_files_have_no_name_and_go_with_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Callable[[Path], str]
) -> None:
    room = tmp_path / "room"
    room.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(room))

    def open_files() -> int:
        return sum(str(room) in str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())

    opened = []
    create = rows._temporary
    monkeypatch.setattr(rows, "_temporary", lambda: (opened.append(open_files()), create())[1])
    stream = open_samples(source(tmp_path), one((3,)))
    stream.head(37)
    assert set(opened) == {0}  # an old one goes before the next comes
    assert (list(room.iterdir()), open_files()) == ([], 1)  # of all the members, one is unpacked
    del stream
    assert open_files() == 0


def test_no_room_for_temporary_files_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = open_samples(_compressed(tmp_path), one((3,)))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    text = complaint(lambda: stream.head(1))
    assert "nowhere" in text
    assert "TMPDIR" in text
    assert "TMPDIR" in complaint(lambda: open_samples(_batches(tmp_path), one((3,))))


# --- folders of .npz -----------------------------------------------------------------------------------------------


def test_a_folder_of_npz_is_one_set_in_the_order_of_names(tmp_path: Path) -> None:
    where = shards(
        tmp_path / "set",
        {"a": np.zeros((3, 2)), "b": np.arange(3), "y": np.arange(3)},
        {"a": np.ones((4, 2)), "b": np.arange(3, 7), "y": np.arange(3, 7).reshape(4, 1)},
    )
    (tmp_path / "set" / ".hidden.npz").write_bytes(b"not read")
    stream = open_samples(where, TWO)
    assert (stream.count, stream.source) == (7, f"{where} (2 files)")
    np.testing.assert_array_equal(stream.labels, np.arange(7))
    np.testing.assert_array_equal(np.concatenate([b["b"] for b in stream.batches(2)]), np.arange(7))
    drawn = open_samples(where, TWO, limit=3, seed=2)
    np.testing.assert_array_equal(drawn.labels, drawn.head(3).arrays["b"])


FOLDERS: dict[str, tuple[Signature, list[dict[str, Any]], str]] = {
    "missing": (
        TWO,
        [{"a": np.ones((2, 2)), "b": np.ones(2)}, {"a": np.ones((2, 2))}],
        "01.npz must hold a, b; found a",
    ),
    "sizes": (one((None,)), [{"x": np.ones((2, 3))}, {"x": np.ones((2, 4))}], "[4], those in"),
    "shape": (one((3,)), [{"x": np.ones((2, 3))}, {"x": np.ones((2, 4))}], "01.npz: input x takes [?, 3]"),
    "labels": (one((1,)), [{"x": np.ones((2, 1)), "y": np.ones(2)}, {"x": np.ones((2, 1))}], "has labels"),
    "counts": (TWO, [{"a": np.ones((2, 2)), "b": np.ones(3)}], "differ"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_whose_files_do_not_agree(tmp_path: Path, case: str) -> None:
    signature, arrays, words = FOLDERS[case]
    assert words in complaint(lambda: open_samples(shards(tmp_path / "set", *arrays), signature))


def test_a_folder_holds_images_or_arrays(tmp_path: Path) -> None:
    where = shards(tmp_path / "set", {"x": X})
    (tmp_path / "set" / "a.png").write_bytes(b"")
    assert "images and .npz" in complaint(lambda: open_samples(where, one((3,))))


def test_an_input_may_be_called_y(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", y=np.arange(2))
    stream = open_samples(str(tmp_path / "s.npz"), Signature((TensorSpec("y", (None,), "int32"),), ()))
    assert stream.labels is None
    assert stream.head(2).arrays["y"].tolist() == [0, 1]


def test_images_without_pillow_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingComponentError):
        open_samples(str(tmp_path), one((4, 6, 3)))


def test_a_spoilt_image_is_named_when_its_batch_comes(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    for name in "ab":
        image.new("RGB", (6, 4), (255, 0, 0)).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes(b"spoilt")
    batches = open_samples(str(tmp_path), one((4, 6, 3))).batches(2)
    assert next(batches)["x"].shape == (2, 4, 6, 3)
    assert "c.png is no readable image" in complaint(lambda: next(batches))


def test_labels_that_are_no_classes_are_left_aside_and_said(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", x=np.ones((2, 1)), y=np.ones((2, 4, 4)))
    stream = open_samples(str(tmp_path / "s.npz"), one((1,)))
    assert stream.labels is None
    assert "y [4, 4] is no class label" in stream.source


# --- programs ------------------------------------------------------------------------------------------------------

GIVEN = {
    "array": "return np.arange(6.0).reshape(6, 1)",
    "dict": "return {'x': np.arange(6.0).reshape(6, 1), 'y': np.arange(6)}",
    "pair": "return np.arange(6.0).reshape(6, 1), list(range(6))",
    "pair with a dict": "return {'x': np.arange(6.0).reshape(6, 1)}, np.arange(6)",
    "list": "return [np.arange(4.0).reshape(4, 1), np.arange(4.0, 6.0).reshape(2, 1)]",
    "pairs": "return ((np.full((1, 1), i), [i]) for i in range(6))",
    "dicts": "return ({'x': np.full((1, 1), i), 'y': np.array([[i]])} for i in range(6))",
    "growing dtypes": "return (np.full((1, 1), i, 'f4' if i < 3 or i == 4 else 'f8') for i in range(6))",
}


LABELLED = {"dict", "pair", "pair with a dict", "pairs", "dicts"}


@pytest.mark.parametrize("case", GIVEN)
def test_a_program_may_return(tmp_path: Path, case: str) -> None:
    where = program(tmp_path, f"def load(): {GIVEN[case]}")
    stream = open_samples(where, one((1,)))
    np.testing.assert_array_equal(stream.head(9).arrays["x"].ravel(), np.arange(6))
    np.testing.assert_array_equal(np.concatenate([b["x"].ravel() for b in stream.batches(4)]), np.arange(6))
    assert (stream.labels is None) == (case not in LABELLED)
    if stream.labels is not None:
        np.testing.assert_array_equal(stream.labels, np.arange(6))


def test_words_of_any_length_come_in_batches(tmp_path: Path) -> None:
    where = program(tmp_path, "def load(): return (np.array([['ab' * i]]) for i in (1, 3, 2))")
    assert open_samples(where, one((1,), "string")).head(3).arrays["x"].ravel().tolist() == ["ab", "ababab", "abab"]


def test_a_pair_feeds_an_input_called_y(tmp_path: Path) -> None:
    signature = Signature((TensorSpec("y", (None, 1), "float32"),), ())
    stream = open_samples(program(tmp_path, "def load(): return np.full((2, 1), 5.0), [0, 1]"), signature)
    assert stream.head(2).arrays["y"].ravel().tolist() == [5, 5]
    np.testing.assert_array_equal(stream.labels, [0, 1])


def test_a_limit_takes_the_first_samples_and_asks_for_no_more(tmp_path: Path) -> None:
    body = "def made():\n  try:\n    for i in range(9):\n      assert i < 3\n      yield np.full((2, 1), i), [i, i]\n"
    body += f"  finally:\n    print('noise'); open({str(tmp_path / 'closed')!r}, 'w').close()\n"
    body += "MADE = made()\ndef load(): return MADE\n"  # held by somebody else: it is closed, not only forgotten
    where = program(tmp_path, body)
    stream = open_samples(where, one((1,)), limit=5, seed=1)
    assert stream.head(9).arrays["x"].ravel().tolist() == [0, 0, 1, 1, 2]
    assert stream.source == f"{where} (its first 5 samples)"
    np.testing.assert_array_equal(stream.labels, [0, 0, 1, 1, 2])
    assert (tmp_path / "closed").exists()


def test_a_program_is_told_the_signature_and_imports_its_neighbours(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "neighbour_of_made.py").write_text("SIZE = 4")
    body = "def load(signature, n=2):\n    from neighbour_of_made import SIZE\n    print('loading')\n"
    body += "    return {s.name: np.zeros((SIZE, *s.shape[1:]), s.dtype) for s in signature.inputs}"
    before = list(sys.path)
    assert open_samples(program(tmp_path, body), TWO).count == 4
    assert sys.path == before
    assert capsys.readouterr() == ("", "loading\n")


def test_a_program_that_exits_when_it_is_closed_ends_nothing(tmp_path: Path) -> None:
    body = "def load():\n    try:\n        while True: yield np.ones((1, 1))\n    finally: raise SystemExit(0)"
    assert open_samples(program(tmp_path, body), one((1,)), limit=2).count == 2


def test_a_program_is_interrupted_like_everything_else(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        open_samples(program(tmp_path, "def load():\n    raise KeyboardInterrupt"), one((1,)))


# --- what the caller holds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [X, X.tolist(), {"x": X}, (X, None)], ids=["array", "lists", "named", "pair"])
def test_arrays_that_are_held_follow_the_rules_of_files(tmp_path: Path, given: Any) -> None:
    held, stored = (
        hold_samples(given, one((3,)), "mine", limit=9, seed=5),
        open_samples(_npy(tmp_path), one((3,)), limit=9, seed=5),
    )
    assert held.source == "mine (9 of 37 samples)"
    arrays = held.head(9).arrays
    np.testing.assert_array_equal(arrays["x"], stored.head(9).arrays["x"])
    assert arrays["x"].dtype == np.float32


def test_held_arrays_fill_whole_batches_and_may_have_labels() -> None:
    stream = hold_samples((X, np.arange(37)), Signature((TensorSpec("x", (10, 3), "float32"),), ()), "mine")
    assert (stream.count, stream.labels.tolist()) == (30, list(range(30)))


HELD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "limit": (X, {"limit": -3}, "a limit of -3 samples"),
    "NaN": (np.where(np.arange(37)[:, None] < 5, np.nan, X), {}, "NaN or Inf, first in sample 0"),
    "shape": (X[:, :2], {}, "takes [?, 3] float32, found [37, 2]"),
    "name": ({"z": X}, {}, "must hold x; found z"),
    "ragged": ([[1, 2, 3], [1]], {}, "is no array"),
    "none": (X[:0], {}, "gives no samples"),
    "number": (3.0, {}, "is a single number"),
}


@pytest.mark.parametrize("case", HELD)
def test_held_arrays_that_do_not_fit(case: str) -> None:
    given, options, words = HELD[case]
    assert words in complaint(lambda: hold_samples(given, one((3,)), "mine", **options).head(37))


def test_one_array_does_not_feed_two_inputs() -> None:
    assert "give a dict of a, b" in complaint(lambda: hold_samples(X, TWO, "mine"))


def test_a_program_may_be_a_module_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "def load(): return np.ones((2, 1))", "samples_of_mine.py")
    monkeypatch.chdir(tmp_path)
    assert open_samples("samples_of_mine:load", one((1,))).count == 2


FAULTS: dict[str, tuple[str, str]] = {
    "raises": ("def load():\n    return 1 / 0", "ZeroDivisionError: division by zero (made.py, line 3, in load)"),
    "raises late": ("def load():\n    yield np.ones((1, 1))\n    raise OSError", "OSError (made.py, line 4, in load)"),
    "raises in a library": ("import json\ndef load():\n    json.loads('x')", "(made.py, line 4, in load)"),
    "exits": ("def load():\n    raise SystemExit(3)", "SystemExit: 3"),
    "closes": ("def load():\n    yield np.ones((1, 1))\n    raise GeneratorExit", "GeneratorExit (made.py, line 4"),
    "does not parse": ("def load(:", "made.py, line 2)"),
    "raises on import": ("import nothing_of_that_name", "ModuleNotFoundError"),
    "no function": ("load = 3", "has no function load"),
    "no such name": ("", "has no function load"),
    "parameters": ("def load(path, signature, n=1): pass", "must be given path; it may take nothing but `signature`"),
    "nothing": ("def load(): pass", "returned nothing; return an array"),
    "text": ("def load(): return 'x'", "returned an object of type str"),
    "triple": ("def load(): return 1, 2, 3", "gives a tuple of 3"),
    "number": ("def load(): return np.float32(1)", "single number"),
    "ragged": ("def load(): return {'x': [[1], [1, 2]]}", "is no array"),
    "wrong shape": ("def load(): return np.ones((2, 3))", "takes [?, 1] float32, found [2, 3]"),
    "wrong name": ("def load(): return {'z': np.ones((2, 1))}", "must hold x; found z"),
    "no batches": ("def load(): return []", "gives no batches"),
    "empty batch": ("def load(): return [np.ones((0, 1))]", "batch 0 gives no samples"),
    "no batch": ("def load(): return [[1, 2]]", "batch 0 is an object of type list"),
    "some labels": (
        "def load(): return [(np.ones((1, 1)), [1]), np.ones((1, 1))]",
        "batch 1: some batches have labels",
    ),
    "labels too few": ("def load(): return np.ones((2, 1)), [1]", "differ"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_program_at_fault_is_one_line(tmp_path: Path, case: str) -> None:
    body, words = FAULTS[case]
    assert words in complaint(lambda: open_samples(program(tmp_path, body), one((1,))))


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("nowhere.py:load", "no file nowhere.py"),
        ("nowhere:load", "the module nowhere, which is not there"),
        ("a b:c", "no file, f"),
    ],
)
def test_a_program_that_is_not_there(where: str, words: str) -> None:
    assert words in complaint(lambda: open_samples(where, one((1,))))


def test_a_wrong_first_batch_ends_it(tmp_path: Path) -> None:
    body = "def load():\n    yield np.ones((1, 7))\n    raise AssertionError('asked for a second')"
    assert "found [1, 7]" in complaint(lambda: open_samples(program(tmp_path, body), one((1,))))


def test_batches_of_other_sizes_are_refused(tmp_path: Path) -> None:
    where = program(tmp_path, "def load(): return [np.ones((2, 5)), np.ones((2, 6))]")
    assert "batch 1: the samples of input x are [6]" in complaint(lambda: open_samples(where, one((None,))))


def test_one_array_for_several_inputs_is_refused(tmp_path: Path) -> None:
    where = program(tmp_path, "def load(): return np.ones((2, 2))")
    assert "give a dict of a, b" in complaint(lambda: open_samples(where, TWO))


# --- memory --------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
import numpy as np
from deploykit.data import open_samples
from deploykit.signature import Signature, TensorSpec
def peak():  # of this program; getrusage would start from what the process that started it had
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024
where, width, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
before = peak()
stream = open_samples(where, Signature((TensorSpec("x", (None, width), "float32"),), ()))
if how == "whole":
    seen = stream.head(stream.count).count
else:
    seen = sum(len(batch["x"]) for _ in range(2) for batch in stream.batches(256))
print(seen, peak() - before)
"""


def grown(where: str, how: str = "in batches") -> tuple[int, float]:
    """How many samples of 1000 numbers were seen, and the growth of the peak memory in MiB."""
    if sys.platform != "linux":
        pytest.skip("only Linux tells the peak of a process's memory since it began")
    line = subprocess.check_output([sys.executable, "-c", MEASURE, where, "1000", how], text=True)
    seen, mebibytes = line.split()
    return int(seen), float(mebibytes)


def test_fifty_thousand_samples_need_the_memory_of_a_batch(tmp_path: Path) -> None:
    np.lib.format.open_memmap(tmp_path / "s.npy", "w+", np.float32, (50_000, 1000))  # 200 MB, none of it on the disk
    seen, mebibytes = grown(str(tmp_path / "s.npy"))
    assert seen == 2 * 50_000
    assert mebibytes < 20


def test_the_measure_sees_samples_that_are_read_whole(tmp_path: Path) -> None:
    np.lib.format.open_memmap(tmp_path / "s.npy", "w+", np.float32, (12_500, 1000))
    assert grown(str(tmp_path / "s.npy"), "whole")[1] > 45


@pytest.mark.parametrize("kind", ["packed", "stored", "folder", "program"])
def test_other_sources_need_the_memory_of_a_batch(tmp_path: Path, kind: str) -> None:
    if kind == "program":
        where = program(tmp_path, "def load():\n    for _ in range(125): yield np.zeros((100, 1000), np.float32)")
    else:
        pieces = np.split(np.zeros((12_500, 1000), np.float32), 5 if kind == "folder" else 1)  # 50 MB
        where = shards(tmp_path / "set", *({"x": piece} for piece in pieces), packed=kind != "stored")
    seen, mebibytes = grown(where)
    assert seen == 2 * 12_500
    assert mebibytes < 25
