"""Labelled data: every source gives the same samples and targets, and what cannot be trained on is one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.data import Labelled, Stream, open_labelled, open_samples
from deploykit.data.labelled import class_weights, digest, split
from deploykit.errors import DataError
from deploykit.signature import Signature, TensorSpec

IMAGE = Signature((TensorSpec("x", (None, 4, 6, 3), "float32"),), ())
SPOT = Signature((TensorSpec("x", (None, 1), "float32"),), ())
GREYS = {"bird": (10, 20, 30), "cat": (40, 50), "dog": (60, 70, 80, 90)}  # class -> the grey of each of its images


def complaint(action: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        action()
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)  # and what to do about it
    return str(caught.value)


def grey(path: Path, value: int) -> None:
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new("RGB", (6, 4), (value,) * 3).save(path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """`GREYS` as a folder for each class."""
    for name, values in GREYS.items():
        for value in values:
            grey(tmp_path / "set" / name / f"{value}.png", value)
    return tmp_path / "set"


def listing(pictures: Path, text: str) -> str:
    (pictures / "labels.csv").write_text(text, encoding="utf-8")
    return str(pictures / "labels.csv")


def archive(tmp_path: Path, **arrays: Any) -> str:
    np.savez(tmp_path / "s.npz", **arrays)
    return str(tmp_path / "s.npz")


def spots(tmp_path: Path, y: Any, **more: Any) -> str:
    """An archive of the samples 0, 1, 2, ... with these labels."""
    return archive(tmp_path, x=np.arange(len(y), dtype=np.float32)[:, None], y=np.asarray(y), **more)


def seen(labelled: Labelled) -> list[tuple[float, Any]]:
    """The first number of each sample with its target."""
    values = [float(sample.flat[0]) for batch in labelled.samples.batches(4) for sample in next(iter(batch.values()))]
    return list(zip(values, labelled.targets.tolist(), strict=True))


# --- sources ---------------------------------------------------------------------------------------------------------


def _folder(pictures: Path) -> str:
    return str(pictures)


def _rows() -> list[str]:
    return [f"{name}/{value}.png,{name}" for name, values in GREYS.items() for value in values]


def _csv(pictures: Path) -> str:
    return listing(pictures, "\n".join(_rows()))


def _csv_with_header(pictures: Path) -> str:
    return listing(
        pictures,
        "\ufefffile,what\n\n" + "\r\n".join(f'"{row.split(",")[0]}", "{row.split(",")[1]}"' for row in _rows()),
    )


def _absolute_csv(pictures: Path) -> str:
    return listing(pictures, "\n".join(f"{pictures / row}" for row in _rows()))


def _arrays() -> tuple[np.ndarray, np.ndarray]:
    values = np.array([value for values in GREYS.values() for value in values], np.float64)
    return np.ones((9, 4, 6, 3)) * values[:, None, None, None] / 255, np.repeat(np.arange(3), [3, 2, 4])


def _numbers_with_names(pictures: Path) -> str:
    x, y = _arrays()
    return archive(pictures.parent, x=x, y=y.astype(np.uint8), classes=np.array(list(GREYS)))


def _strings(pictures: Path) -> str:
    x, y = _arrays()
    return archive(pictures.parent, x=x, y=np.array(list(GREYS))[y])


def _bytes(pictures: Path) -> str:
    x, y = _arrays()
    return archive(pictures.parent, x=x, y=np.array([name.encode() for name in GREYS])[y][:, None])


def _one_hot(pictures: Path) -> str:
    x, y = _arrays()
    return archive(pictures.parent, x=x, y=np.eye(3)[y], classes=np.array(list(GREYS)))


def _float_numbers_with_names(pictures: Path) -> str:
    x, y = _arrays()
    return archive(pictures.parent, x=x, y=y.astype(np.float32), classes=np.array(list(GREYS)))


def _shards(pictures: Path) -> str:
    x, y = _arrays()
    names = np.array(list(GREYS))
    (pictures.parent / "shards").mkdir(exist_ok=True)
    for number, rows in enumerate((slice(0, 5), slice(5, 9))):
        np.savez(pictures.parent / "shards" / f"{number}.npz", x=x[rows], y=y[rows], classes=names)
    return str(pictures.parent / "shards")


SOURCES = (
    _folder, _csv, _csv_with_header, _absolute_csv, _numbers_with_names, _strings, _bytes, _one_hot,
    _float_numbers_with_names, _shards,
)  # fmt: skip
EXPECTED = [(value, number) for number, values in enumerate(GREYS.values()) for value in values]


def in_255(labelled: Labelled) -> list[tuple[int, Any]]:
    return [(round(255 * value), target) for value, target in seen(labelled)]


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same(pictures: Path, source: Callable[[Path], str]) -> None:
    labelled = open_labelled(source(pictures), IMAGE)
    assert isinstance(labelled.samples, Stream)
    assert (labelled.task, labelled.classes, labelled.count) == ("classes", ("bird", "cat", "dog"), 9)
    assert labelled.targets.dtype == np.int64
    assert in_255(labelled) == EXPECTED
    assert any("one-hot" in notice for notice in labelled.notices) == (source is _one_hot)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("only", [("dog", "bird"), ("2", "0"), ("dog", "0")])
def test_only_keeps_classes_in_the_order_given(
    pictures: Path, source: Callable[[Path], str], only: tuple[str, ...]
) -> None:
    labelled = open_labelled(source(pictures), IMAGE, only=only)
    assert labelled.classes == ("dog", "bird")
    assert in_255(labelled) == [(value, {0: 1, 2: 0}[number]) for value, number in EXPECTED if number != 1]
    assert "7 of 9 samples" in labelled.source


@pytest.mark.parametrize("source", SOURCES)
def test_a_limit_draws_by_seed_from_the_classes_that_are_kept(pictures: Path, source: Callable[[Path], str]) -> None:
    def draw(seed: int) -> list[tuple[int, Any]]:
        return in_255(
            open_labelled(source(pictures), IMAGE, only=("cat", "dog"), limit=5, seed=seed, classes=("cat", "dog"))
        )

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert set(draw(1)) < {(value, number - 1) for value, number in EXPECTED if number}
    assert len(draw(1)) == 5


def test_a_part_is_in_the_order_asked_for_and_still_a_stream(pictures: Path) -> None:
    labelled = open_labelled(_shards(pictures), IMAGE, only=("dog", "bird"))
    numbers = [6, 0, 4, 4]
    assert in_255(labelled.take(numbers)) == [in_255(labelled)[number] for number in numbers]
    assert in_255(labelled.take(numbers).take([1, 0])) == [in_255(labelled)[number] for number in (0, 6)]


def test_several_inputs_by_name(tmp_path: Path) -> None:
    two = Signature((TensorSpec("a", (None, 2), "float32"), TensorSpec("b", (None,), "int32")), ())
    where = archive(tmp_path, b=np.arange(4), a=np.ones((4, 2)), y=np.array([1, 0, 1, 0]))
    (batch,) = open_labelled(where, two).samples.batches(9)
    assert list(batch) == ["a", "b"]
    np.testing.assert_array_equal(batch["b"], np.arange(4))


def test_inputs_may_be_called_y_or_classes(tmp_path: Path) -> None:
    signature = Signature((TensorSpec("x", (None, 1), "float32"), TensorSpec("classes", (None,), "int32")), ())
    where = spots(tmp_path, [0, 1, 1], classes=np.arange(3))
    assert open_labelled(where, signature).classes == ("0", "1")
    own = Signature((TensorSpec("y", (None,), "float32"),), ())
    assert "has no labels" in complaint(lambda: open_labelled(where, own))


# --- what labels mean ------------------------------------------------------------------------------------------------

ROWS = np.array([[1, 0, 1], [0, 0, 1], [1, 1, 0]])
MEANINGS: dict[str, tuple[Any, dict[str, Any], str, tuple[str, ...], Any]] = {
    "numbers": ([1, 0, 2], {}, "classes", ("0", "1", "2"), [1, 0, 2]),
    "a column": ([[1], [0], [2]], {}, "classes", ("0", "1", "2"), [1, 0, 2]),
    "no or yes": ([True, False, True], {}, "classes", ("0", "1"), [1, 0, 1]),
    "numbers, chosen": ([7, 3, 9, 3], {"only": ("3", "7")}, "classes", ("3", "7"), [1, 0, 0]),
    "huge numbers, chosen": ([10**15, 3], {"only": ("3", str(10**15))}, "classes", ("3", str(10**15)), [1, 0]),
    "strings": (["b", "a", "b"], {}, "classes", ("a", "b"), [1, 0, 1]),
    "floats": ([0.5, 1.5, 2.0], {}, "regression", (), [[0.5], [1.5], [2.0]]),
    "rows of floats": (ROWS / 2, {}, "regression", (), (ROWS / 2).tolist()),
    "floats as classes": ([1.0, 0.0, 1.0], {"task": "classes"}, "classes", ("0", "1"), [1, 0, 1]),
    "numbers as regression": ([7, 3, -1], {"task": "regression"}, "regression", (), [[7], [3], [-1]]),
    "several labels": (ROWS, {}, "multi-label", ("0", "1", "2"), ROWS.tolist()),
    "several labels in floats": (ROWS.astype("f8"), {}, "multi-label", ("0", "1", "2"), ROWS.tolist()),
    "one-hot as several labels": (np.eye(2), {"task": "multi-label"}, "multi-label", ("0", "1"), [[1, 0], [0, 1]]),
    "one label": ([1, 0, 1], {"task": "multi-label"}, "multi-label", ("0",), [[1], [0], [1]]),
    "one-hot": (np.eye(3, dtype=int)[[1, 0, 2]], {}, "classes", ("0", "1", "2"), [1, 0, 2]),
}


@pytest.mark.parametrize("case", MEANINGS)
def test_what_labels_mean(tmp_path: Path, case: str) -> None:
    y, options, task, classes, targets = MEANINGS[case]
    labelled = open_labelled(spots(tmp_path, y), SPOT, **options)
    assert (labelled.task, labelled.classes, labelled.targets.tolist()) == (task, classes, targets)
    assert labelled.targets.dtype == ("int64" if task == "classes" else "float32")
    assert "left aside" not in labelled.source


def test_a_guess_that_could_be_wrong_is_said(tmp_path: Path) -> None:
    def notices(y: Any, **options: Any) -> str:
        return " ".join(open_labelled(spots(tmp_path, y), SPOT, **options).notices)

    assert "--task classes" in notices([0.0, 1.0, 2.0])
    assert notices([0.0, 1.0, 2.0], task="regression") == ""
    assert notices([0.0, 1.5]) == notices([-1.0, 1.0]) == ""
    assert "one-hot" in notices(np.eye(3))
    assert notices(np.eye(3), task="classes") == ""


PAIRS = [[1, 1], [0, 1], [1, 0]]
LISTINGS: dict[str, tuple[str, str, tuple[str, ...], Any]] = {
    "numbers": ("{0},1\n{1},0\n{2},1", "classes", ("0", "1"), [1, 0, 1]),
    "numbers as names": ("{0},01\n{1},00\n{2},01", "classes", ("00", "01"), [1, 0, 1]),
    "numbers and names": ("{0},1\n{1},one\n{2},1", "classes", ("1", "one"), [0, 1, 0]),
    "floats": ("file,price\n{0},1\n{1},-2.5\n{2},1e3", "regression", (), [[1], [-2.5], [1000]]),
    "several labels": ("file,red,round\n{0},1,1\n{1},0,1\n{2},1,0", "multi-label", ("red", "round"), PAIRS),
    "several labels without a header": ("{0},1,1\n{1},0,1\n{2},1,0", "multi-label", ("0", "1"), PAIRS),
    "several numbers": ("file,a,b\n{0},1,.5\n{1},0,1\n{2},1,0", "regression", (), [[1, 0.5], [0, 1], [1, 0]]),
    "one-hot": ("file,red,round\n{0},1,0\n{1},0,1\n{2},1,0", "classes", ("red", "round"), [0, 1, 0]),
    "quoted": ('"{0}","a, b"\n{1},"say ""c"""\n{2},"a, b"', "classes", ("a, b", 'say "c"'), [0, 1, 0]),
}  # fmt: skip


@pytest.mark.parametrize("case", LISTINGS)
def test_what_a_listing_says(pictures: Path, case: str) -> None:
    text, task, classes, targets = LISTINGS[case]
    where = listing(pictures, text.format("bird/10.png", "cat/40.png", "dog/60.png"))
    labelled = open_labelled(where, IMAGE)
    assert (labelled.task, labelled.classes, labelled.targets.tolist()) == (task, classes, targets)
    assert [value for value, _ in in_255(labelled)] == [10, 40, 60]


def test_a_first_row_is_no_header_where_its_path_is_a_file(pictures: Path) -> None:
    (pictures / "bird" / "10.png").rename(pictures / "ten")
    labelled = open_labelled(listing(pictures, "ten,a\ncat/40.png,b"), IMAGE)
    assert in_255(labelled) == [(10, 0), (40, 1)]


# --- a test set ------------------------------------------------------------------------------------------------------


def test_a_test_set_is_numbered_by_the_classes_of_training(tmp_path: Path) -> None:
    where = spots(tmp_path, ["cat", "dog", "cat"])
    labelled = open_labelled(where, SPOT, classes=("dog", "bird", "cat"))
    assert (labelled.classes, labelled.targets.tolist()) == (("dog", "bird", "cat"), [2, 0, 2])
    assert any("no sample of bird" in notice for notice in labelled.notices)
    one = open_labelled(where, SPOT, classes=("dog", "cat"), only=("cat",))
    assert (one.classes, one.targets.tolist()) == (("dog", "cat"), [1, 1])


def test_a_name_without_samples_is_no_stranger(tmp_path: Path) -> None:
    where = spots(tmp_path, [2, 0], classes=np.array(["a", "b", "c"]))
    assert open_labelled(where, SPOT, classes=("c", "a")).targets.tolist() == [0, 1]


def test_columns_of_a_test_set_follow_their_names(tmp_path: Path) -> None:
    where = spots(tmp_path, ROWS, classes=np.array(["a", "b", "c"]))
    labelled = open_labelled(where, SPOT, classes=("c", "a", "b"))
    np.testing.assert_array_equal(labelled.targets, ROWS[:, [2, 0, 1]])
    assert "are not among" not in str(labelled.notices)


STRANGERS: dict[str, tuple[Any, dict[str, Any], tuple[str, ...], str]] = {
    "classes": (["cat", "cow", "owl"], {}, ("cat", "dog"), "samples of cow, owl, which the classes cat, dog lack"),
    "numbers": ([0, 5], {}, ("0", "1"), "samples of 5"),
    "columns": (ROWS, {"classes": np.array(["a", "b", "c"])}, ("a", "b"), "samples of c"),
    "absent columns": (ROWS, {"classes": np.array(["a", "b", "c"])}, ("a", "b", "c", "d"), "no labels for d"),
    "regression": ([0.5, 0.7], {}, ("a", "b"), "the labels are numbers"),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_classes_that_training_did_not_have_are_named(tmp_path: Path, case: str) -> None:
    y, more, classes, words = STRANGERS[case]
    where = spots(tmp_path, y, **more)
    assert words in complaint(lambda: open_labelled(where, SPOT, classes=classes))


# --- bad labels ------------------------------------------------------------------------------------------------------

NAMES = np.array(["a", "b"])
BAD: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    "one class": ([0, 0], {}, {}, "one class only (0)"),
    "one class is left": ([0, 1, 2], {}, {"only": ("1",)}, "one class only (1)"),
    "fewer samples than classes": ([0, 1], {"classes": np.array(list("abc"))}, {}, "2 samples are fewer than the 3"),
    "a limit below the classes": ([0, 1, 2, 0, 1, 2], {}, {"limit": 2}, "2 samples are fewer than the 3"),
    "a class without samples": ([0, 0, 1], {"classes": np.array(["a", "b", "c"])}, {}, "no sample of c"),
    "no samples": ([0, 0], {"classes": NAMES}, {"only": ("b",), "classes": ("b",)}, "no samples are left"),
    "a gap": ([0, 2, 2], {}, {}, "class numbers 0, 2 and of none between"),
    "not from 0": ([1, 2], {}, {}, "class numbers 1, 2 and of none between or before"),
    "negative": ([0, -1, -1], {}, {}, "2 of 3 labels are negative, the first is -1 of sample 1"),
    "beyond the names": ([0, 1, 2], {"classes": NAMES}, {}, "1 of 3 labels are beyond the 2 classes that have names"),
    "fraction": ([0.0, 0.5], {}, {"task": "classes"}, "1 of 2 labels are not a whole number, the first is 0.5"),
    "unknown name": (["a", "c"], {"classes": NAMES}, {}, "labels c are not among the classes a, b"),
    "NaN": ([0.0, np.nan, np.inf], {}, {}, "2 of 3 samples have NaN or Inf in their labels, the first is 1"),
    "NaN in a row": ([[0.0, 0.5], [np.nan, np.nan]], {}, {}, "1 of 2 samples have NaN or Inf in their labels"),
    "too large": ([[0.0], [1e39]], {}, {"task": "regression"}, "sample 1 is too large for float32"),
    "empty": (["a", "", "b"], {}, {}, "1 of 3 samples have no label, the first is 1"),
    "rows of numbers": ([[0, 3], [1, 2]], {}, {}, "--task regression"),
    "rows that are not one-hot": (ROWS, {}, {"task": "classes"}, "not one-hot"),
    "not 0 or 1": ([[0, 2], [1, 1]], {}, {"task": "multi-label"}, "not all 0 or 1"),
    "text for numbers": (["a", "b"], {}, {"task": "regression"}, "the labels are text (a, b)"),
    "text for several labels": (["a", "b"], {}, {"task": "multi-label"}, "not all 0 or 1"),
    "masks": (np.zeros((2, 3, 3)), {}, {}, "y is [2, 3, 3]"),
    "no columns": (np.zeros((2, 0)), {}, {}, "of shape [2, 0]"),
    "complex": ([1j, 2j], {}, {}, "of dtype complex128"),
    "names twice": ([0, 1], {"classes": np.array(["a", "a"])}, {}, "a, a; give each one a name of its own"),
    "a name is empty": ([0, 1], {"classes": np.array(["a", ""])}, {}, "a name of its own"),
    "names are no names": ([0, 1], {"classes": np.array([0.5, 1.5])}, {}, "`classes` is [2] float64"),
    "names in rows": ([0, 1], {"classes": np.array([["a", "b"]])}, {}, "`classes` is [1, 2]"),
    "names for other columns": (ROWS, {"classes": NAMES}, {}, "3 columns of labels and 2 names"),
    "only, unknown": ([0, 1], {"classes": NAMES}, {"only": ("a", "owl")}, "no class 'owl' for --only; it has a, b"),
    "only, beyond": ([0, 1], {"classes": NAMES}, {"only": ("0", "2")}, "no class '2'"),
    "only, a number that no sample has": ([0, 2], {}, {"only": ("0", "1")}, "no class '1' for --only; it has 0, 2"),
    "only, twice": ([0, 1], {"classes": NAMES}, {"only": ("a", "0")}, "a class twice"),
    "only of numbers": ([0.5, 1.5], {}, {"only": ("0",)}, "among classes, and the labels are regression"),
    "limit": ([0, 1], {}, {"limit": 0}, "limit of 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_labels_that_cannot_be_trained_on_are_one_line(tmp_path: Path, case: str) -> None:
    y, more, options, words = BAD[case]
    where = spots(tmp_path, y, **more)
    assert words in complaint(lambda: open_labelled(where, SPOT, **options))


def test_labels_are_missing(pictures: Path, tmp_path: Path) -> None:
    for action in (
        lambda: open_labelled(archive(tmp_path, x=np.ones((3, 1))), SPOT),
        lambda: open_labelled(str(pictures / "dog"), IMAGE),
    ):
        text = complaint(action)
        assert "has no labels" in text
        assert "one folder for each class" in text
    (tmp_path / "made.py").write_text("def load(): raise AssertionError('never run')")
    assert "is a Python function" in complaint(lambda: open_labelled(f"{tmp_path / 'made.py'}:load", SPOT))
    assert "there is no file" in complaint(lambda: open_labelled(str(tmp_path / "no.csv"), IMAGE))


def test_counts_differ(tmp_path: Path) -> None:
    where = archive(tmp_path, x=np.ones((3, 1)), y=np.arange(2))
    assert "the numbers of samples differ" in complaint(lambda: open_labelled(where, SPOT))
    samples = open_samples(where := spots(tmp_path, [0, 1]), SPOT)
    text = complaint(lambda: Labelled(samples, np.arange(3), ("a", "b", "c"), "classes", where))
    assert "2 samples and 3 labels" in text


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"y": np.arange(2)}, {"y": np.array(["a", "b"])}, "give all of one kind"),
        ({"y": np.arange(2)}, {"y": np.eye(2)}, "give all of one kind"),
        ({"y": np.arange(2), "classes": NAMES}, {"y": np.arange(2)}, "name different classes"),
        ({"y": np.zeros((2, 3, 3))}, {"y": np.zeros((2, 3, 3))}, "0.npz: y is [2, 3, 3]"),
        ({"y": np.zeros((2, 2))}, {}, "has no labels"),
    ],
)
def test_files_of_one_folder_must_agree(tmp_path: Path, first: Any, second: Any, words: str) -> None:
    for number, arrays in enumerate((first, second)):
        np.savez(tmp_path / f"{number}.npz", x=np.ones((2, 1)), **arrays)
    assert words in complaint(lambda: open_labelled(str(tmp_path), SPOT))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_among_the_inputs_is_found_when_it_is_read(tmp_path: Path, value: float) -> None:
    x = np.ones((9, 1))
    x[7] = value
    labelled = open_labelled(archive(tmp_path, x=x, y=np.arange(9) % 2), SPOT)
    assert "NaN or Inf, first in sample 7" in complaint(lambda: digest(labelled))
    assert len(digest(labelled.take(range(7)))) == 64


# --- bad listings ----------------------------------------------------------------------------------------------------

BAD_LISTINGS: dict[str, tuple[str, str]] = {
    "empty": ("", "is empty"),
    "blank": ("\n\n", "is empty"),
    "header only": ("path,label\n", "has a header and no rows"),
    "no labels": ("bird/10.png\ncat/40.png", "line 1 has 1 field, line 2 has 1 field"),
    "semicolons": ("bird/10.png;a\ncat/40.png;b", "separated by commas"),
    "short": ("path,label\nbird/10.png,a\ncat/40.png\n\ndog/60.png", "2 of 4 rows do not fit (line 3 has 1 field,"),
    "long": ("bird/10.png,a\ncat/40.png,b,c", "line 2 has 3 fields"),
    "no label": ("bird/10.png,a\ncat/40.png,", "line 2 has 2 fields, one of them empty"),
    "no path": ("bird/10.png,a\n ,b", "line 2 has 2 fields, one of them empty"),
    "NaN": ("bird/10.png,0\ncat/40.png,nan", "NaN or Inf in their labels, the first is 1"),
    "text in several columns": ("file,a,b\nbird/10.png,0,x\ncat/40.png,1,y", "2 label columns with text"),
    "columns of one name": ("file,a,a\nbird/10.png,0,0\ncat/40.png,1,1", "a name of its own"),
    "open quote": ('bird/10.png,"a\ncat/40.png,b', "no readable CSV"),
    "not there": ("bird/10.png,a\nbird/no.png,b", "1 of 2 images cannot be read (bird/no.png is not there)"),
    "a folder": ("bird/10.png,a\nbird,b", "bird is no readable image"),
    "negative": ("bird/10.png,-1\ncat/40.png,0", "negative"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LISTINGS)
def test_listings_that_do_not_fit_are_one_line(pictures: Path, case: str) -> None:
    text, words = BAD_LISTINGS[case]
    where = listing(pictures, text)
    assert words in complaint(lambda: open_labelled(where, IMAGE))


def test_a_listing_is_text_and_lists_images(pictures: Path) -> None:
    where = listing(pictures, "")
    Path(where).write_bytes(b"\xff\xfe\x00\x00bird")
    assert "no readable CSV" in complaint(lambda: open_labelled(where, IMAGE))
    listing(pictures, "bird/10.png,a\ncat/40.png,b")
    assert "no images" in complaint(lambda: open_labelled(where, SPOT))


# --- bad images ------------------------------------------------------------------------------------------------------


def spoil(pictures: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    whole = (pictures / "dog" / "60.png").read_bytes()
    (pictures / "bird" / "10.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "dog" / "60.png").write_bytes(b"")
    image.new("I;16", (6, 4)).save(pictures / "dog" / "70.png")
    (pictures / "dog" / "80.png").write_text("not an image")


SPOILT = (
    "4 of 9 images cannot be read (bird/10.png is no readable image, dog/60.png is no readable image, "
    "dog/70.png has pixels of more than 8 bits and 1 more)"
)


@pytest.mark.parametrize("source", [_folder, _csv])
def test_unreadable_images_are_named_and_counted_or_left_out(pictures: Path, source: Callable[[Path], str]) -> None:
    spoil(pictures)
    where = source(pictures)
    text = complaint(lambda: open_labelled(where, IMAGE))
    assert SPOILT in text
    assert "--skip-bad" in text
    labelled = open_labelled(where, IMAGE, skip_bad=True)
    assert in_255(labelled) == [(20, 0), (30, 0), (40, 1), (50, 1), (90, 2)]
    assert labelled.notices == (f"{where}: {SPOILT} and were left out",)
    assert "5 of 9 samples" in labelled.source


def test_only_images_that_are_used_are_tried(pictures: Path) -> None:
    spoil(pictures)
    (pictures / "bird" / "10.png").unlink()
    assert in_255(open_labelled(str(pictures), IMAGE, only=("bird", "cat"))) == [(20, 0), (30, 0), (40, 1), (50, 1)]


def test_a_class_of_unreadable_images_is_a_class_without_samples(pictures: Path) -> None:
    for path in (pictures / "cat").iterdir():
        path.write_bytes(b"")
    assert "no sample of cat" in complaint(lambda: open_labelled(str(pictures), IMAGE, skip_bad=True))
    text = complaint(lambda: open_labelled(str(pictures), IMAGE, skip_bad=True, only=("cat",), classes=("cat", "dog")))
    assert "nothing is left" in text


def test_folders_that_are_no_class_are_said(pictures: Path) -> None:
    (pictures / "owl").mkdir()
    grey(pictures / ".cache" / "1.png", 1)
    labelled = open_labelled(str(pictures), IMAGE)
    assert labelled.classes == ("bird", "cat", "dog")
    assert in_255(labelled) == EXPECTED
    assert "no images in owl" in labelled.notices[0]
    assert ".cache is no class" in labelled.notices[1]


# --- uneven classes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("many", "said"), [(6, False), (7, True)])
def test_uneven_classes_are_said_above_three_to_one(tmp_path: Path, many: int, said: bool) -> None:
    where = spots(tmp_path, ["a"] * many + ["b"] * 2 + ["c"] * 5)
    notices = " ".join(open_labelled(where, SPOT).notices)
    assert (f"{many} samples of a, 2 of b" in notices) == said
    assert open_labelled(where, SPOT, classes=("a", "b", "c")).notices == ()  # a test set is what it is


def test_labels_that_never_change_are_said(tmp_path: Path) -> None:
    where = spots(tmp_path, [[0, 1, 1], [0, 1, 0]], classes=np.array(["never", "always", "some"]))
    assert "nothing is learned of it: never, always" in open_labelled(where, SPOT).notices[0]


def test_weights_let_every_class_weigh_the_same() -> None:
    targets = np.repeat([0, 1, 2], [60, 30, 10])
    weights = class_weights(targets, 3)
    np.testing.assert_allclose(weights, [100 / 180, 100 / 90, 100 / 30], rtol=1e-15)
    np.testing.assert_allclose(weights[targets].mean(), 1, rtol=1e-15)
    np.testing.assert_allclose(np.bincount(targets, weights[targets]), [100 / 3] * 3, rtol=1e-14)
    assert "class 3 has no samples" in complaint(lambda: class_weights(targets, 4))
    assert "are for classes" in complaint(lambda: class_weights(np.ones((3, 2), np.float32), 2))


# --- splits ----------------------------------------------------------------------------------------------------------


def made(targets: np.ndarray, task: Any = "classes") -> Labelled:
    """Labelled data of which no sample is ever read."""
    numbers = np.arange(len(targets))
    names = tuple(map(str, range(int(targets.max()) + 1))) if task == "classes" else ()
    return Labelled(Stream(numbers, lambda rows: {"x": rows}, "here"), targets, names, task, "here")


@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=6),
    st.floats(0.01, 0.99),
    st.integers(0, 2**31),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_a_split_keeps_the_share_of_every_class(counts: list[int], part: float, seed: int, order: Any) -> None:
    labels = [number for number, count in enumerate(counts) for _ in range(count)]
    order.shuffle(labels)
    labelled = made(np.array(labels))
    train, validation = split(labelled, part, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(sum(counts)))
    for number, count in enumerate(counts):
        held = int((labelled.targets[validation] == number).sum())
        assert 1 <= held <= count - 1
        assert abs(held - part * count) < 1
    again = split(labelled, part, seed)
    assert all(np.array_equal(*pair) for pair in zip((train, validation), again, strict=True))


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_split_of_numbers_is_plain(count: int, part: float, seed: int) -> None:
    labelled = made(np.ones((count, 2), np.float32), "regression")
    train, validation = split(labelled, part, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(count))
    assert 1 <= len(validation) <= count - 1
    assert abs(len(validation) - part * count) < 1


def test_a_split_is_drawn_anew_for_each_seed() -> None:
    labelled = made(np.arange(100) % 2)
    assert len({tuple(split(labelled, seed=seed)[1]) for seed in range(9)}) == 9


def test_how_a_class_is_split_depends_on_no_other() -> None:
    few = np.repeat([0, 1], [20, 20])
    more = np.concatenate([few, np.full(7, 2)])
    held = [numbers[numbers < 40] for numbers in (split(made(few))[1], split(made(more))[1])]
    np.testing.assert_array_equal(*held)


@pytest.mark.parametrize(
    ("targets", "task", "part", "words"),
    [
        (np.array([0, 0, 1]), "classes", 0.2, "too few samples to split (1 of 1)"),
        (np.ones((1, 1), np.float32), "regression", 0.2, "too few samples to split (1)"),
        (np.array([0, 0, 1, 1]), "classes", 0.0, "between 0 and 1"),
        (np.array([0, 0, 1, 1]), "classes", 1.0, "between 0 and 1"),
        (np.array([0, 0, 1, 1]), "classes", float("nan"), "between 0 and 1"),
    ],
)
def test_what_cannot_be_split(targets: np.ndarray, task: str, part: float, words: str) -> None:
    assert words in complaint(lambda: split(made(targets, task), part))


# --- digests ---------------------------------------------------------------------------------------------------------


def test_a_digest_is_of_what_goes_in_and_comes_out(tmp_path: Path, pictures: Path) -> None:
    x, y = np.arange(200.0)[:, None], np.arange(200) % 2

    def of(x: np.ndarray, y: np.ndarray, **options: Any) -> str:
        return digest(open_labelled(archive(tmp_path, x=x, y=y), SPOT, **options))

    first = of(x, y)
    assert first == of(x, y) == of(x.astype("f4"), y.astype("i1"))  # as the model takes it
    assert first == digest(open_labelled(archive(tmp_path, x=x, y=y, classes=NAMES), SPOT))
    changed = x.copy()
    changed[150] += 1
    swapped = y[::-1].copy()
    assert len({first, of(changed, y), of(x, swapped), of(x, y, limit=199), of(x, y.astype(float))}) == 5
    assert digest(open_labelled(str(pictures), IMAGE)) == digest(open_labelled(_csv(pictures), IMAGE))
    assert digest(open_labelled(str(pictures), IMAGE)) != digest(open_labelled(str(pictures), IMAGE, scale=1.0))


def test_a_digest_does_not_depend_on_how_samples_are_stored(tmp_path: Path) -> None:
    both = Signature((TensorSpec("a", (None, 1), "string"), TensorSpec("b", (None, 2), "float32")), ())
    text, numbers, y = np.array([["one"]] * 50 + [["three"]] * 50), np.ones((100, 2)), np.arange(100) % 2
    whole = digest(open_labelled(archive(tmp_path, a=text, b=numbers, y=y), both))
    (tmp_path / "set").mkdir()
    for number, (rows, dtype) in enumerate([(slice(0, 50), "U3"), (slice(50, 99), "U5"), (slice(99, 100), "U9")]):
        arrays = {"a": text[rows].astype(dtype), "b": numbers[rows], "y": y[rows]}
        np.savez(tmp_path / "set" / f"{number}.npz", **arrays)
    assert digest(open_labelled(str(tmp_path / "set"), both)) == whole
    assert digest(open_labelled(archive(tmp_path, a=text[::-1], b=numbers, y=y), both)) != whole


# --- memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
from deploykit.data.labelled import digest, open_labelled, split
from deploykit.signature import Signature, TensorSpec
def peak():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024
before = peak()
labelled = open_labelled(sys.argv[1], Signature((TensorSpec("x", (None, 1000), "float32"),), ()), only=("1", "0"))
if sys.argv[2] == "whole":
    labelled.samples.head(labelled.count)
for numbers in split(labelled):
    digest(labelled.take(numbers))
print(labelled.count, peak() - before)
"""


def grown(where: str, how: str) -> tuple[int, float]:
    if sys.platform != "linux":
        pytest.skip("only Linux tells the peak of a process's memory since it began")
    line = subprocess.check_output([sys.executable, "-c", MEASURE, where, how], text=True)
    count, mebibytes = line.split()
    return int(count), float(mebibytes)


def test_fifty_thousand_samples_need_the_memory_of_their_targets(tmp_path: Path) -> None:
    """200 MB; the negative control has a quarter of them in memory."""
    for number in range(4):
        np.savez(tmp_path / f"{number}.npz", x=np.zeros((12_500, 1000), np.float32), y=np.arange(12_500) % 2)
    count, mebibytes = grown(str(tmp_path), "in batches")
    assert count == 50_000
    assert mebibytes < 25
    for number in range(1, 4):
        (tmp_path / f"{number}.npz").unlink()
    assert grown(str(tmp_path), "whole")[1] > 45
