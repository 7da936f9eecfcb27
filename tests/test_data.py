"""Samples: everything that fits the model exactly, or one line that says why not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit.data import EDGES, Samples, other_sizes, read_samples, synthesize
from deploykit.errors import DataError, MissingComponentError
from deploykit.signature import Signature, TensorSpec

KERAS_HOME = Path(__file__).parents[2] / "shared" / "data" / "keras"
RNG = np.random.default_rng(3)


def takes(*specs: TensorSpec) -> Signature:
    return Signature(specs, ())


def one(shape: tuple[int | None, ...], dtype: str = "float32", **bounds: float) -> Signature:
    return takes(TensorSpec("x", (None, *shape), dtype, **bounds))


def stored(path: Path, **arrays: Any) -> str:
    if path.suffix == ".npy":
        np.save(path, arrays["x"])
    else:
        np.savez(path, **arrays)
    return str(path)


def complaint(action: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Samples ------------------------------------------------------------------------------------------------------


def test_samples_count_cut_and_batch() -> None:
    samples = Samples({"a": np.arange(5), "b": np.arange(10).reshape(5, 2)}, "here", np.arange(5))
    assert samples.count == 5
    head = samples.head(2)
    assert (head.count, head.source) == (2, "here")
    np.testing.assert_array_equal(head.labels, [0, 1])
    assert samples.head(99).count == 5
    assert [len(batch["b"]) for batch in samples.batches(2)] == [2, 2, 1]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Samples({"a": np.zeros(2), "b": np.zeros(3)}, "s"), "a 2, b 3"),
        (lambda: Samples({"a": np.zeros(2)}, "s", np.zeros(1)), "labels 1"),
        (lambda: Samples({"a": np.zeros(0)}, "s"), "no samples"),
        (lambda: Samples({}, "s"), "no samples"),
        (lambda: list(Samples({"a": np.zeros(2)}, "s").batches(0)), "at least 1"),
    ],
)
def test_samples_that_make_no_sense(make: Callable[[], object], words: str) -> None:
    assert words in complaint(make)


# --- arrays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "shape", "dtype", "result"),
    [
        (np.zeros((4, 3)), (3,), "float32", (4, 3)),
        (np.zeros((4, 3)), (None,), "float16", (4, 3)),
        (np.zeros((4, 3)), (3, 1), "float32", (4, 3, 1)),  # a last axis of size 1 is missing
        (np.zeros((4, 3, 1)), (3,), "float32", (4, 3)),  # ... or too many
        (np.zeros((4, 3), "uint8"), (3,), "float32", (4, 3)),
        (np.ones((4, 3)), (3,), "int32", (4, 3)),
        (np.ones((4, 3), bool), (3,), "int64", (4, 3)),
        (np.ones((4, 3), "int64"), (3,), "bool", (4, 3)),
        (np.array([["a"], ["b"]]), (1,), "string", (2, 1)),
    ],
)
def test_arrays_are_made_to_fit(
    tmp_path: Path, given: np.ndarray, shape: tuple[int | None, ...], dtype: str, result: tuple[int, ...]
) -> None:
    for name in ("s.npy", "s.npz"):
        samples = read_samples(stored(tmp_path / name, x=given), one(shape, dtype))
        assert samples.arrays["x"].shape == result
        assert samples.arrays["x"].dtype == (given.dtype if dtype == "string" else dtype)


MISFITS: dict[str, tuple[Any, Signature, str]] = {
    "shape": (np.zeros((4, 5)), one((3,)), "takes [?, 3] float32, found [4, 5] float64"),
    "no batch axis": (np.zeros(3), one((3,)), "the first axis counts samples"),
    "a number": (np.float32(3), one((3,)), "single number"),
    "too many axes": (np.zeros((4, 3, 2)), one((3,)), "found [4, 3, 2]"),
    "none": (np.zeros((0, 3)), one((3,)), "at least one sample"),
    "NaN": (np.array([[0.0], [np.nan]]), one((1,)), "NaN or Inf, first in sample 1"),
    "Inf": (np.array([[np.inf]]), one((1,)), "NaN or Inf"),
    "too large": (np.array([[1e39]]), one((1,)), "too large for float32"),
    "fractions": (np.array([[0.5]]), one((1,), "int32"), "whole numbers"),
    "outside dtype": (np.array([[300]]), one((1,), "uint8"), "the input takes 0..255"),
    "negative": (np.array([[-1]]), one((1,), "uint8"), "the input takes 0..255"),
    "below vocabulary": (np.array([[5], [-1]]), one((1,), "int32", low=0.0, high=9.0), "-1..-1, first in sample 1"),
    "outside vocabulary": (
        np.array([[10]]),
        one((1,), "int32", low=0.0, high=9.0),
        "10..10, first in sample 0; the input takes 0..9",
    ),
    "text": (np.array([["a"]]), one((1,)), "give numbers"),
    "complex": (np.array([[1j]]), one((1,)), "give numbers"),
    "numbers for text": (np.array([[1]]), one((1,), "string"), "give strings"),
    "pickle": (np.array([[{}]], dtype=object), one((1,)), "Python objects, which are never read"),
    "short of a batch": (np.zeros((3, 1)), takes(TensorSpec("x", (4, 1), "float32")), "fixed to 4"),
    "two inputs": (
        np.zeros((3, 1)),
        takes(TensorSpec("a", (None, 1), "float32"), TensorSpec("b", (None, 1), "float32")),
        "",
    ),
}


@pytest.mark.parametrize("name", ["s.npy", "s.npz"])
@pytest.mark.parametrize("case", MISFITS)
def test_a_misfit_is_one_line(tmp_path: Path, case: str, name: str) -> None:
    given, signature, words = MISFITS[case]
    text = complaint(lambda: read_samples(stored(tmp_path / name, x=given), signature))
    assert words in text


def test_an_estimated_range_is_no_limit(tmp_path: Path) -> None:
    where = stored(tmp_path / "s.npy", x=np.array([[9]]))
    for high in (4.0, 4.5):
        assert read_samples(where, one((1,), "int32", low=-1.5, high=high)).count == 1


def test_npz_by_input_names_with_labels(tmp_path: Path) -> None:
    signature = takes(TensorSpec("a", (None, 2), "float32"), TensorSpec("b", (None,), "int32"))
    where = stored(
        tmp_path / "s.npz", b=np.arange(4), a=np.ones((4, 2)), y=np.arange(4).reshape(4, 1), other=np.ones(1)
    )
    samples = read_samples(where, signature)
    assert list(samples.arrays) == ["a", "b"]
    np.testing.assert_array_equal(samples.labels, np.arange(4))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": np.ones((2, 1)), "z": np.ones(2)}, "must hold a, b; found a, z"),
        ({"a": np.ones((2, 1)), "b": np.ones((3, 1))}, "differ"),
        ({"a": np.ones((2, 1)), "b": np.ones((2, 1)), "y": np.ones(3)}, "y (3,)"),
        ({"a": np.ones((2, 1)), "b": np.ones((2, 1)), "y": np.array(3)}, "y ()"),
        ({}, "found nothing"),
    ],
)
def test_npz_that_does_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    signature = takes(TensorSpec("a", (None, 1), "float32"), TensorSpec("b", (None, 1), "float32"))
    assert words in complaint(lambda: read_samples(stored(tmp_path / "s.npz", **arrays), signature))


@pytest.mark.parametrize("name", ["s.npy", "s.npz"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_files(tmp_path: Path, name: str, share: float) -> None:
    where = Path(stored(tmp_path / name, x=RNG.random((40, 3))))
    where.write_bytes(where.read_bytes()[: int(where.stat().st_size * share)])
    assert "damaged or truncated" in complaint(lambda: read_samples(str(where), one((3,))))


@pytest.mark.parametrize(("content", "words"), [(b"", "neither an .npy nor"), (b"1,2,3\n", "neither an .npy nor")])
def test_other_files(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "s.csv").write_bytes(content)
    assert words in complaint(lambda: read_samples(str(tmp_path / "s.csv"), one((3,))))


@pytest.mark.parametrize("where", ["nowhere.npy", "imdb", "", "a\0b"])
def test_nothing_of_that_name(where: str) -> None:
    text = complaint(lambda: read_samples(where, one((3,))))
    assert "fashion_mnist" in text or "cannot read" in text or "no images" in text


@pytest.mark.parametrize("name", ["s.npy", "s.npz"])
def test_a_limit_draws_by_seed(tmp_path: Path, name: str) -> None:
    where = stored(tmp_path / name, x=np.arange(100.0)[:, None], y=np.arange(100))
    first = read_samples(where, one((1,)), limit=10, seed=1)
    again, other = (read_samples(where, one((1,)), limit=10, seed=seed) for seed in (1, 2))
    np.testing.assert_array_equal(first.arrays["x"], again.arrays["x"])
    assert (first.arrays["x"] != other.arrays["x"]).any()
    assert (np.diff(first.arrays["x"], axis=0) > 0).all()  # in their order
    assert len(set(first.arrays["x"].ravel())) == first.count == 10
    if first.labels is not None:
        np.testing.assert_array_equal(first.labels, first.arrays["x"].ravel())
    assert read_samples(where, one((1,)), limit=1000).count == 100


@pytest.mark.parametrize(
    ("options", "words"), [({"limit": 0}, "limit"), ({"scale": 0.0}, "scale"), ({"scale": np.nan}, "scale")]
)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    where = stored(tmp_path / "s.npy", x=np.ones((2, 1)))
    assert words in complaint(lambda: read_samples(where, one((1,)), **options))


def test_a_fixed_batch_size_drops_the_rest(tmp_path: Path) -> None:
    signature = takes(TensorSpec("x", (4, 1), "float32"))
    where = stored(tmp_path / "s.npz", x=np.ones((11, 1)), y=np.arange(11))
    samples = read_samples(where, signature)
    assert (samples.count, len(samples.labels)) == (8, 8)


# --- images -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes, 2 and 3 pictures of 6 x 4 in several formats, colours by class."""
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    for label, (name, suffixes) in enumerate({"cat": ("png", "BMP"), "dog": ("gif", "png", "jpg")}.items()):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index, suffix in enumerate(suffixes):
            image.new("RGB", (6, 4), (255, 255 * label, 0)).save(tmp_path / "set" / name / f"{index}.{suffix}")
    (tmp_path / "set" / "cat" / "notes.txt").write_text("not an image")
    return tmp_path / "set"


@pytest.mark.parametrize(
    ("shape", "result", "words"),
    [
        ((4, 6, 3), (5, 4, 6, 3), "4x6 RGB"),
        ((3, 4, 6), (5, 3, 4, 6), "4x6 RGB"),
        ((8, 8, 1), (5, 8, 8, 1), "8x8 L"),
        ((4, 6), (5, 4, 6), "4x6 L"),
        ((4, 6, 4), (5, 4, 6, 4), "RGBA"),
    ],
)
def test_images_become_what_the_model_takes(
    pictures: Path, shape: tuple[int, ...], result: tuple[int, ...], words: str
) -> None:
    samples = read_samples(str(pictures), one(shape))
    assert samples.arrays["x"].shape == result
    assert samples.arrays["x"].dtype == "float32"
    assert words in samples.source
    assert "2 classes" in samples.source
    np.testing.assert_array_equal(samples.labels, [0, 0, 1, 1, 1])


@pytest.mark.parametrize(
    ("bounds", "dtype", "scale", "top", "bottom", "words"),
    [
        ({}, "float32", None, 1.0, 0.0, "/ 255, as the model states no range"),
        ({"low": 0.0, "high": 1.0}, "float32", None, 1.0, 0.0, "/ 255"),
        ({"low": -0.42, "high": 0.99}, "float32", None, 1.0, 0.0, "/ 255"),  # a Normalization's estimate
        ({"low": -0.1, "high": 1.2}, "float32", None, 1.0, 0.0, "/ 255"),
        ({"low": -1.0, "high": 1.0}, "float32", None, 1.0, -1.0, "/ 127.5 - 1"),
        ({"low": 0.0, "high": 255.0}, "float32", None, 255.0, 0.0, "pixels 0..255"),
        ({}, "uint8", None, 255, 0, "pixels 0..255"),
        ({}, "float32", 1.0, 255.0, 0.0, "pixels x 1"),
        ({"low": 0.0, "high": 255.0}, "float32", 0.5, 127.5, 0.0, "pixels x 0.5"),
    ],
)
def test_pixels_follow_the_range_of_the_model(
    pictures: Path, bounds: dict[str, float], dtype: str, scale: float | None, top: float, bottom: float, words: str
) -> None:
    samples = read_samples(str(pictures / "cat"), one((4, 6, 3), dtype, **bounds), scale=scale)
    assert samples.labels is None
    assert (samples.arrays["x"].max(), samples.arrays["x"].min()) == (top, bottom)
    assert samples.source.endswith(f"{words})")


def test_open_sizes_need_an_image_size(pictures: Path) -> None:
    assert "--image-size" in complaint(lambda: read_samples(str(pictures), one((None, None, 3))))
    assert read_samples(str(pictures), one((None, None, 3)), image_size=(5, 7)).arrays["x"].shape == (5, 5, 7, 3)
    assert read_samples(str(pictures), one((None, None, 3)), image_size=(5, 7), limit=2).count == 2
    for size in ((4, 4), (0, 6)):
        text = complaint(lambda size=size: read_samples(str(pictures), one((4, 6, 3)), image_size=size))
        assert "does not fit" in text


@pytest.mark.parametrize(
    ("shape", "words"), [((3,), "no images"), ((5, 6, 7), "1, 3 or 4 channels"), ((2, 4, 6, 3), "no images")]
)
def test_inputs_that_take_no_images(pictures: Path, shape: tuple[int, ...], words: str) -> None:
    assert words in complaint(lambda: read_samples(str(pictures), one(shape)))


def test_folders_that_are_no_set_of_images(pictures: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "empty").mkdir()
    assert "holds no images" in complaint(lambda: read_samples(str(tmp_path / "empty"), one((4, 6, 3))))
    (pictures / "cat" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    assert "1.png is no readable image" in complaint(lambda: read_samples(str(pictures), one((4, 6, 3))))
    image.new("I;16", (6, 4)).save(pictures / "cat" / "1.png")
    assert "more than 8 bits" in complaint(lambda: read_samples(str(pictures), one((4, 6, 3))))
    image.new("L", (6, 4)).save(pictures / "top.png")
    assert "images and folders of images" in complaint(lambda: read_samples(str(pictures), one((4, 6, 3))))


def test_images_without_pillow_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingComponentError, match=r"deploykit\[report\]"):
        read_samples(str(tmp_path), one((4, 6, 3)))


def test_options_about_pixels_are_refused_where_there_are_none(tmp_path: Path) -> None:
    x = np.ones((2, 4, 6, 3), np.float32)
    (tmp_path / "set").mkdir()
    (tmp_path / "code.py").write_text("import numpy\ndef made(): return numpy.ones((2, 4, 6, 3))\n")
    stored(tmp_path / "set" / "a.npz", x=x)
    places = [stored(tmp_path / name, x=x) for name in ("x.npy", "x.npz")]
    for where in (*places, str(tmp_path / "set"), f"{tmp_path / 'code.py'}:made"):
        assert read_samples(where, one((4, 6, 3))).count == 2
        for options, words in (({"scale": 1.0}, "--scale is for pixels"), ({"image_size": (4, 6)}, "--image-size is")):
            text = complaint(lambda where=where, options=options: read_samples(where, one((4, 6, 3)), **options))
            assert words in text
            assert f"changes nothing in {where}" in text


# --- Keras data sets ----------------------------------------------------------------------------------------------

FASHION = """
import numpy as np
from deploykit.data import read_samples
from deploykit.errors import DataError
from deploykit.signature import Signature, TensorSpec
def read(shape, **options):
    bounds = {k: options.pop(k) for k in ("low", "high") if k in options}
    spec = TensorSpec("x", (None, *shape), "float32", **bounds)
    return read_samples("fashion_mnist", Signature((spec,), ()), **options)
images = read((28, 28, 1), limit=500)
assert images.arrays["x"].shape == (500, 28, 28, 1) and images.arrays["x"].max() == 1.0, images.source
words = "fashion_mnist (test half, pixels / 255, as the model states no range, 500 of 10,000 samples)"
assert images.source == words, images.source
assert len(np.unique(images.labels)) == 10 and images.labels.shape == (500,)
assert read((28, 28), scale=1.0, limit=9).arrays["x"].max() > 200
assert read((1, 28, 28), high=255.0, limit=9).arrays["x"].max() > 200
assert "flattened" in read((784,), limit=9).source
assert read((28, 28, 1)).count == 10_000
for shape, options, words in (
    ((32, 32, 3), {}, "takes [?, 32, 32, 3]"),
    ((28, 28), {"image_size": (28, 28)}, "--image-size is for folders of images"),
):
    try:
        read(shape, **options)
    except DataError as error:
        assert words in str(error)
    else:
        raise AssertionError

# to train on: both halves, and the names of the classes
from deploykit.data.labelled import open_labelled
def labelled(**options):
    return open_labelled("fashion_mnist", Signature((TensorSpec("x", (None, 28, 28, 1), "float32"),), ()), **options)
shirts = labelled(only=("0", "Pullover"), limit=200, seed=3)
assert "training half" in shirts.source and "200 of 60,000" in shirts.source, shirts.source
assert (shirts.classes, shirts.count, shirts.notices) == (("T-shirt/top", "Pullover"), 200, ()), shirts
assert shirts.samples.head(9).arrays["x"].max() <= 1
test = labelled(half="test", only=("2", "0"), classes=shirts.classes)
assert test.classes == shirts.classes and "test half" in test.source, test
assert np.bincount(test.targets).tolist() == [1000, 1000]
shirt = images.arrays["x"][images.labels == 0][0]  # number 0 is the T-shirt, by both ways
assert any((x == shirt).all() for x in test.take(np.flatnonzero(test.targets == 0)).samples.head(1000).arrays["x"])
"""


def test_fashion_mnist_from_the_cache_of_keras() -> None:
    if not (KERAS_HOME / "datasets" / "fashion-mnist").is_dir():
        pytest.skip("no Fashion-MNIST in a local cache of Keras, and tests download nothing")
    environment = {**os.environ, "KERAS_HOME": str(KERAS_HOME), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, "-c", FASHION], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""


# --- made up ------------------------------------------------------------------------------------------------------

IMAGE = TensorSpec("image", (None, 16, 16, 3), "float32")


def test_two_inputs_get_different_samples() -> None:
    arrays = synthesize(takes(TensorSpec("a", (None, 9), "float32"), TensorSpec("b", (None, 9), "float32"))).arrays
    assert (arrays["a"][0] != arrays["b"][0]).all()


def test_synthetic_samples_are_reproducible() -> None:
    code = (
        "from deploykit.data import synthesize; from deploykit.signature import *; import zlib\n"
        "s = synthesize(Signature((TensorSpec('image', (None, 16, 16, 3), 'float32'),), ()))\n"
        "print(zlib.crc32(s.arrays['image'].round(3).tobytes()))"
    )
    here = synthesize(takes(IMAGE)).arrays["image"]
    again = synthesize(takes(TensorSpec("other", (None, 2), "float32"), IMAGE)).arrays["image"]
    np.testing.assert_array_equal(here, again)  # other inputs change nothing
    prints = {subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(2)}
    assert len(prints) == 1
    assert (here != synthesize(takes(IMAGE), seed=1).arrays["image"]).any()


@pytest.mark.parametrize("bounds", [{}, {"low": 0.0, "high": 255.0}, {"low": -1.0}, {"high": 3.0}])
def test_pooled_features_vary_between_samples(bounds: dict[str, float]) -> None:
    x = synthesize(takes(TensorSpec("image", (None, 32, 32, 3), "float32", **bounds))).arrays["image"]
    low, high = bounds.get("low"), bounds.get("high")
    assert low is None or x.min() >= low
    assert high is None or x.max() <= high
    inside = x[: -len(EDGES)]
    spread = inside.mean(axis=(1, 2)).std(axis=0) / inside.std()
    assert (spread > 0.2).all()  # white noise has 1 / 32
    rough = np.abs(np.diff(inside, axis=1)).mean(axis=(1, 2, 3)) / inside.std(axis=(1, 2, 3))
    assert rough.max() > 3 * rough.min()  # from smooth to rough


@pytest.mark.parametrize(
    ("bounds", "values"),
    [({}, (0, 1, -1, 1)), ({"low": 2.0, "high": 9.0}, (2, 9, 2, 9)), ({"high": 9.0}, (0, 9, 0, 9))],
)
def test_the_last_samples_are_edge_cases(bounds: dict[str, float], values: tuple[float, ...]) -> None:
    zeros, high, first, second = values
    x = synthesize(one((4, 4, 2), **bounds), count=8).arrays["x"]
    assert (x[5] == zeros).all()
    assert (x[6] == high).all()
    assert x[7, 0, 0].tolist() == [first, second]
    assert x[7, 0, 1].tolist() == [second, first]


def edge_samples(*specs: TensorSpec, count: int = 64) -> dict[str, dict[str, np.ndarray]]:
    """Of inputs that all edges suit: the edge samples by name."""
    arrays = synthesize(takes(*specs), count=count).arrays
    rows = range(count - len(EDGES), count)
    return {edge: {name: array[row] for name, array in arrays.items()} for edge, row in zip(EDGES, rows, strict=True)}


def test_what_each_edge_is() -> None:
    """Of an input without a stated range: what could hide from all the others."""
    found = {name: sample["x"] for name, sample in edge_samples(TensorSpec("x", (None, 8, 6, 2), "float32")).items()}
    peaks = {name: float(np.abs(x).max()) for name, x in found.items()}
    assert (found["all low"] == -1).all()
    assert ((found["large"] > 4).any(), 4 < peaks["large"] <= 6) == (True, True)
    assert ((found["very large"] > 10).any(), 10 < peaks["very large"] <= 16) == (True, True)
    assert (np.abs(found["very large"]) > 4).mean() > 0.2  # not one element only
    assert ((found["hot spot"] != 0).sum(), found["hot spot"][4, 3, 1]) == (1, 1)
    assert 0 < peaks["tiny"] <= 1e-6
    assert len(np.unique(found["tiny"])) > 50
    assert (found["far from zero"].min() >= 15, np.ptp(found["far from zero"]) > 0.5) == (True, True)
    assert (found["ends in zeros"][:4].all(), found["ends in zeros"][4:].any()) == (True, False)
    assert (found["begins with zeros"][:4].any(), found["begins with zeros"][4:].all()) == (False, True)
    for name, place in {"first only": (0, 0), "last only": (-1, -1)}.items():
        assert ((found[name] != 0).sum(), found[name][place].tolist()) == (2, [1, 1])
    assert set(found["constant"].ravel()) == {0.5}
    assert (found["spike"] == 16).sum() == 1
    assert np.median(np.abs(found["spike"])) < 4


@pytest.mark.parametrize(
    "bounds", [{"low": 0.0, "high": 1.0}, {"low": -2.0}, {"high": 3.0}, {"low": -2.0, "high": 0.0}]
)
def test_no_edge_leaves_a_stated_range(bounds: dict[str, float]) -> None:
    x = synthesize(one((5, 4), **bounds)).arrays["x"]
    assert x.min() >= bounds.get("low", -np.inf)
    assert x.max() <= bounds.get("high", np.inf)
    assert np.abs(x).max() <= 3


def test_integers_have_edges_beside_those_of_floats() -> None:
    """The inputs' edges share a row each; a law that suits only one of them leaves the other ordinary."""
    found = edge_samples(TensorSpec("x", (None, 4), "float32"), TensorSpec("t", (None, 8), "int32", low=0.0, high=9.0))
    tokens = {name: sample["t"].tolist() for name, sample in found.items()}
    assert (tokens["zeros"], tokens["all high"]) == ([0] * 8, [9] * 8)
    assert tokens["first only"] == [9] + [0] * 7
    assert tokens["last only"] == [0] * 7 + [9]
    assert (tokens["ends in zeros"][4:], tokens["begins with zeros"][:4]) == ([0] * 4, [0] * 4)
    assert any(tokens["ends in zeros"][:4])
    assert any(tokens["begins with zeros"][4:])
    for name in ("large", "far from zero", "tiny"):
        assert len(set(tokens[name])) > 2


@pytest.mark.parametrize(("count", "edges"), [(1, 0), (2, 1), (4, 2), (6, 3), (16, 4), (32, 8), (64, 15), (256, 15)])
def test_edges_grow_with_the_samples_up_to_a_quarter(count: int, edges: int) -> None:
    assert f"the last {edges} edge cases" in synthesize(one((3, 2)), count=count).source


@pytest.mark.parametrize(
    ("signature", "edges"),
    [
        (one((), "bool"), 3),
        (one((3, 2), low=2.0, high=9.0), 9),  # nothing large, tiny or negative
        (one((1, 2)), 13),  # no halves
        (one(()), 10),
    ],
)
def test_edges_that_suit_no_input_take_no_room(signature: Signature, edges: int) -> None:
    samples = synthesize(signature)
    assert f"the last {edges} edge cases" in samples.source
    zeros = samples.arrays["x"][-edges]
    assert (zeros == (signature.inputs[0].low or 0)).all()


def test_edges_may_be_left_out() -> None:
    samples = synthesize(one((3,)), count=20, edges=0)
    assert "the last 0 edge cases" in samples.source
    assert samples.arrays["x"][-1].std() > 0
    assert "the last 2 edge cases" in synthesize(one((3,)), count=20, edges=2).source


@pytest.mark.parametrize(("size", "edges", "seen"), [(256, 0, True), (257, 0, False), (220, None, True)])
def test_each_entry_of_a_vocabulary_is_looked_up(size: int, edges: int | None, seen: bool) -> None:
    """64 samples of 4 have room for 256 entries, 55 beside nine edge samples for 220; more are drawn at random."""
    samples = synthesize(one((4,), "int32", low=0.0, high=size - 1.0), count=64, edges=edges)
    ordinary = samples.arrays["x"][: 64 if edges == 0 else 55]
    assert (len(np.unique(ordinary)) == size) == seen


SIZES: dict[str, tuple[Signature, list[list[tuple[int, ...]]]]] = {
    "nothing open": (one((4, 3)), []),
    "sequence": (one((None, 3)), [[(5, 3)], [(40, 3)]]),
    "tokens": (one((None,), "int32", low=0.0, high=9.0), [[(5,)], [(40,)]]),
    "image": (one((None, None, 3)), [[(24, 40, 3)], [(96, 128, 3)]]),
    "channels first": (one((3, None, None)), [[(3, 24, 40)], [(3, 96, 128)]]),
    "one side": (one((8, None, 3)), [[(8, 24, 3)], [(8, 96, 3)]]),
    "volume": (one((None, None, None, 1)), [[(24, 40, 24, 1)], [(64, 32, 64, 1)]]),
    "several": (
        takes(TensorSpec("a", (None, None, 2), "float32"), TensorSpec("b", (None, None), "int32")),
        [[(5, 2), (5,)], [(40, 2), (40,)]],
    ),
    "beside a fixed one": (
        takes(TensorSpec("a", (None, 7), "float32"), TensorSpec("b", (None, None), "int32")),
        [[(7,), (5,)], [(7,), (40,)]],
    ),
}


@pytest.mark.parametrize("case", SIZES)
def test_open_sizes_are_tried_at_others(case: str) -> None:
    signature, sizes = SIZES[case]
    sets = other_sizes(signature)
    assert [[array.shape[1:] for array in samples.arrays.values()] for samples in sets] == sizes
    for samples, size in zip(sets, sizes, strict=True):
        assert samples.count == 4
        assert all("x".join(map(str, each)) in samples.source for each in size)
        assert all(len(np.unique(array.reshape(4, -1)[:, :50], axis=0)) == 4 for array in samples.arrays.values())


def test_other_sizes_keep_a_fixed_batch() -> None:
    signature = takes(TensorSpec("x", (6, None), "float32"))
    assert [samples.count for samples in other_sizes(signature)] == [6, 6]


@pytest.mark.parametrize(
    ("dtype", "bounds", "low", "high"),
    [
        ("int32", {"low": 0.0, "high": 6.0}, 0, 6),
        ("int32", {}, 0, 1),
        ("uint8", {"low": -4.0, "high": 400.0}, 0, 255),
        ("uint8", {"low": -200.0, "high": 3.0}, 0, 3),
        ("int64", {"low": 0.3, "high": 0.6}, 1, 1),
        ("bool", {}, 0, 1),
    ],
)
def test_integers_fill_their_range(dtype: str, bounds: dict[str, float], low: int, high: int) -> None:
    x = synthesize(one((40,), dtype, **bounds)).arrays["x"]
    assert x.dtype == dtype
    assert (x.min(), x.max()) == (low, high)


@pytest.mark.parametrize(
    ("shape", "free", "result"),
    [
        ((None, 4), None, (16, 4)),
        ((None,), None, (16,)),
        ((None, None, 3), None, (32, 32, 3)),
        ((None, None, 3), 8, (8, 8, 3)),
        ((None, None, 3), (8, 12), (8, 12, 3)),
        ((), None, ()),
    ],
)
def test_open_sizes_have_a_stated_default(
    shape: tuple[int | None, ...], free: int | tuple[int, ...] | None, result: tuple[int, ...]
) -> None:
    assert synthesize(one(shape), count=4, free=free).arrays["x"].shape == (4, *result)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_have_the_dtype_of_the_input(dtype: str) -> None:
    x = synthesize(one((5,), dtype)).arrays["x"]
    assert x.dtype == dtype
    assert np.isfinite(x).all()


@pytest.mark.parametrize(("batch", "count", "result"), [(1, 7, 7), (4, 7, 8), (None, 1, 1), (6, 1, 6)])
def test_counts_are_whole_batches(batch: int | None, count: int, result: int) -> None:
    signature = takes(TensorSpec("x", (batch, 3), "float32"))
    assert synthesize(signature, count=count).count == result


@pytest.mark.parametrize(
    ("signature", "options", "words"),
    [
        (one((3,), "string"), {}, "--data"),
        (one((3,), "complex64"), {}, "--data"),
        (one((3,)), {"count": 0}, "at least 1"),
        (one((3,)), {"count": 10**30}, "more than any memory holds"),
        (one((2**30,)), {"count": 2**30}, "more than any memory holds"),
        (one((None, None)), {"free": (3,)}, "each open one"),
        (one((None,)), {"free": 0}, "at least 1"),
        (takes(), {}, "no inputs"),
    ],
)
def test_what_cannot_be_made_up(signature: Signature, options: dict[str, Any], words: str) -> None:
    assert words in complaint(lambda: synthesize(signature, **options))
