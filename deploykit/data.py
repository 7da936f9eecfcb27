"""Samples: what goes through a model when it is compared or timed.

Either the user's own (``read_samples``: arrays, a folder of images, a Keras data set) or made up
(``synthesize``). Both fit the signature exactly when they leave here: names, shapes, dtypes, one number of
samples, no NaN; what had to be done to them is written into ``Samples.source``. Pickles are never read.

*Pixels* (0..255) become what the model says it takes, the range of its first layers. A range that ends above
``RAW_ABOVE`` leaves them as they are; one that begins below ``SIGNED_BELOW`` gives x / 127.5 - 1; any other
gives x / 255. A model that says nothing has no Rescaling of its own and was most likely trained on scaled
pixels, so it gets x / 255 too; ``scale`` (a factor) overrules all of it.

*Synthetic floats* are z = scale · (w · white + (1 - w) · smooth) + offset: white noise and a smooth wave mixed
anew for each sample, with an offset for each sample and channel, so that features pooled over space or
time vary between samples (white noise alone averages to the same everywhere, and a comparison on it would see nothing).
Without a known range z is used as it is, with one it is squeezed through a logistic curve into it. Integers
are uniform in their range, or 0 and 1. The last samples are edge cases; see ``EDGES``.

numpy only; pillow and Keras are imported where they are needed.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import DataError, MissingComponentError
from deploykit.signature import Signature, TensorSpec

Array = NDArray[Any]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif")
IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> pillow's mode

# Keras data sets of fixed shape; True: of pixels. (imdb and reuters are ragged and pickled.)
KERAS_SETS = {
    "mnist": True,
    "fashion_mnist": True,
    "cifar10": True,
    "cifar100": True,
    "boston_housing": False,
    "california_housing": False,
}

# A range may be an estimate (mean ± 2 deviations of a Normalization), so these lie well between the usual ones.
RAW_ABOVE = 8.0  # 0..1 and -1..1 end far below, 0..255 far above
SIGNED_BELOW = -0.75  # dark images in 0..1 reach -0.4

FREE_SEQUENCE = 16  # stands for an open size of a sample with one or two axes
FREE_SPATIAL = 32  # ... and with three or more: images, volumes


@dataclass(frozen=True)
class Samples:
    """Arrays by input name, all with the same number of rows; ``source`` says for a report what they are.

    ``labels``: one row for each sample, or None.
    """

    arrays: Mapping[str, Array]
    source: str
    labels: Array | None = None

    def __post_init__(self) -> None:
        counts = {name: len(array) for name, array in self.arrays.items()}
        if self.labels is not None:
            counts["labels"] = len(self.labels)
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise DataError(f"{self.source}: the numbers of samples differ ({found}); give every input as many")
        if not self.arrays or not self.count:
            raise DataError(f"{self.source} holds no samples; give at least one")

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(next(iter(self.arrays.values())))

    def head(self, n: int) -> Samples:
        """The first ``n`` samples (all, when there are fewer)."""
        return self._rows(slice(0, n))

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """Arrays by name, ``size`` samples at a time; the last batch may be smaller."""
        if size < 1:
            raise DataError(f"a batch of {size} samples makes no sense; give at least 1")
        for start in range(0, self.count, size):
            yield {name: array[start : start + size] for name, array in self.arrays.items()}

    def _rows(self, rows: slice) -> Samples:
        labels = None if self.labels is None else self.labels[rows]
        return Samples({name: array[rows] for name, array in self.arrays.items()}, self.source, labels)


# --- the user's own ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
    where: str
    signature: Signature
    limit: int | None
    seed: int
    image_size: tuple[int, int] | None
    scale: float | None

    def chosen(self, count: int) -> NDArray[np.intp]:
        """Which of ``count`` samples are used: all, or ``limit`` of them drawn by ``seed``, in their order.

        Drawn, not the first ones: files are often sorted by class.
        """
        if self.limit is None or self.limit >= count:
            return np.arange(count)
        return np.sort(np.random.default_rng(self.seed).permutation(count)[: self.limit])

    def only_input(self) -> TensorSpec:
        if len(self.signature.inputs) == 1:
            return self.signature.inputs[0]
        names = ", ".join(spec.name for spec in self.signature.inputs)
        raise DataError(f"{self.where} feeds one input and the model has several ({names}); give an .npz keyed by them")


@dataclass(frozen=True)
class _Raw:
    arrays: Mapping[str, Array]
    labels: Array | None = None
    done: str = ""


def read_samples(
    where: str,
    signature: Signature,
    *,
    limit: int | None = None,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
    scale: float | None = None,
) -> Samples:
    """Read samples that fit ``signature`` from one of:

    - ``.npy``: the samples of a model with one input;
    - ``.npz``: arrays by input name, or ``x`` for a model with one input; ``y``, if it is there, labels;
    - a folder of images (png, jpg, bmp, gif; first frame), or of one folder for each class, whose order by name
      gives the labels; resized (bilinear) to the model's input, or to ``image_size`` (height, width) where
      that is open;
    - the name of a Keras data set, its test half (see ``KERAS_SETS``).

    ``limit`` draws that many by ``seed``. ``scale`` multiplies pixels; without it the model's own range decides (see
    the module). A last axis of size 1 too many or too few is mended; a fixed batch size drops the rest.

    Raises DataError with what was expected and what was found, MissingComponentError without pillow.
    """
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} samples leaves none; give at least 1")
    if scale is not None and (not math.isfinite(scale) or scale == 0):
        raise DataError(f"a pixel scale of {scale} makes no sense; 1 keeps 0..255 and 0.00392157 gives 0..1")
    request = _Request(where, signature, limit, seed, image_size, scale)
    raw = _reader(where)(request)
    source = f"{where} ({raw.done})" if raw.done else where
    arrays = {spec.name: _fitted(raw.arrays[spec.name], spec, where) for spec in signature.inputs}
    samples = Samples(arrays, source, raw.labels)
    return _whole_batches(samples, signature)


def _reader(where: str) -> Callable[[_Request], _Raw]:
    path = Path(where)
    try:
        if path.is_dir():
            return _read_images
        if path.is_file():
            with open(path, "rb") as stream:
                magic = stream.read(6)
            for start, reader in _FILES.items():
                if magic.startswith(start):
                    return reader
            raise DataError(
                f"{where} is neither an .npy nor an .npz file; save the samples with numpy.save or numpy.savez"
            )
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {where!r} ({error}); check the path and its permissions") from error
    if where in KERAS_SETS:
        return _read_keras
    raise DataError(f"there is no file, folder or Keras data set {where!r}; data sets: {', '.join(KERAS_SETS)}")


def _read_npy(request: _Request) -> _Raw:
    spec = request.only_input()
    with _explained(request.where):
        stored = np.load(request.where, mmap_mode="r", allow_pickle=False)
        if stored.ndim == 0:
            raise DataError(f"{request.where} holds a single number; expected {_expected(spec)}")
        return _Raw({spec.name: np.array(stored[request.chosen(len(stored))])})


def _read_npz(request: _Request) -> _Raw:
    names = [spec.name for spec in request.signature.inputs]
    with _explained(request.where), np.load(request.where, allow_pickle=False) as stored:
        keys = {name: name for name in names}
        if len(names) == 1 and names[0] not in stored.files:
            keys = {names[0]: "x"}
        absent = [key for key in keys.values() if key not in stored.files]
        if absent:
            found = ", ".join(stored.files) or "nothing"
            alternative = " (or x)" if len(names) == 1 else ""
            raise DataError(
                f"{request.where} must hold {', '.join(names)}{alternative}; found {found}; rename the arrays"
            )
        arrays = {name: stored[key] for name, key in keys.items()}
        labels = stored["y"] if "y" in stored.files and "y" not in names else None
    for name, array in arrays.items():
        if array.ndim == 0:
            raise DataError(f"{request.where}: {name} is a single number; give one row for each sample")
    counts = {len(array) for array in arrays.values()} | (
        {len(labels)} if labels is not None and labels.ndim else set()
    )
    if len(counts) > 1 or (labels is not None and not labels.ndim):
        found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        found += f", y {labels.shape}" if labels is not None else ""
        raise DataError(f"{request.where}: the numbers of samples differ ({found}); give every array as many rows")
    rows = request.chosen(counts.pop())
    if labels is not None:
        labels = labels[rows]
        labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    return _Raw({name: array[rows] for name, array in arrays.items()}, labels)


_FILES: dict[bytes, Callable[[_Request], _Raw]] = {
    b"\x93NUMPY": _read_npy,
    b"PK\x03\x04": _read_npz,
    b"PK\x05\x06": _read_npz,
}


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError, MemoryError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        if any(word in str(error).lower() for word in ("pickle", "python objects")):
            raise DataError(f"{where} holds Python objects, which are never read; save plain numbers") from error
        raise DataError(f"{where} is a damaged or truncated numpy file; save it again") from error


def _read_keras(request: _Request) -> _Raw:
    spec = request.only_input()
    name = request.where
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the progress of a download
            _, (x, y) = importlib.import_module(f"keras.datasets.{name}").load_data()
    except Exception as error:  # whatever a download or a damaged cache raises
        cause = " ".join(str(error).split())[:200]
        raise DataError(
            f"cannot get the Keras data set {name} ({cause}); download it once where there is a network"
        ) from error
    rows = request.chosen(len(x))
    x, labels = np.asarray(x)[rows], np.asarray(y)[rows]
    done = "test half"
    if KERAS_SETS[name]:
        x = x[..., None] if x.ndim == 3 else x
        x, reshaped = _arranged(x, spec, name)
        x, scaled = _pixels(x, spec, request.scale)
        done = ", ".join(filter(None, (done, reshaped, scaled)))
    return _Raw({spec.name: x}, labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels, done)


def _arranged(images: Array, spec: TensorSpec, where: str) -> tuple[Array, str]:
    """Images (N, H, W, C) in the axis order of the input; flattened for an input of vectors."""
    sample = spec.shape[1:]
    if len(sample) == 1 and sample[0] in (None, math.prod(images.shape[1:])):
        return images.reshape(len(images), -1), "flattened"
    for arranged, words in ((images, ""), (np.moveaxis(images, -1, 1), "channels first")):
        if len(sample) == 3 and all(
            want in (None, have) for want, have in zip(sample, arranged.shape[1:], strict=True)
        ):
            return arranged, words
    if len(sample) == 2 and images.shape[-1] == 1:
        return images[..., 0], ""
    raise DataError(f"{where} has samples of shape {images.shape[1:]}; input {spec.name} takes {_expected(spec)}")


def _pixels(images: Array, spec: TensorSpec, scale: float | None) -> tuple[Array, str]:
    """Pixels 0..255 as the input takes them (see the module), and in words what was done."""
    if scale is not None:
        return images * np.float64(scale), f"pixels x {scale:g}"
    if np.dtype(spec.dtype).kind in "iu" or (spec.high is not None and spec.high > RAW_ABOVE):
        return images, "pixels 0..255"
    if spec.high is None:
        return images / 255.0, "pixels / 255, as the model states no range"
    if spec.low is not None and spec.low < SIGNED_BELOW:
        return images / 127.5 - 1.0, "pixels / 127.5 - 1"
    return images / 255.0, "pixels / 255"


def _read_images(request: _Request) -> _Raw:
    spec = request.only_input()
    files, labels = _image_files(request.where)
    channels, size, first = _image_layout(spec, request)
    rows = request.chosen(len(files))
    images = np.stack([_decoded(files[row], size, channels) for row in rows])
    if len(spec.shape) == 3:
        images = images[..., 0]
    elif first:
        images = np.moveaxis(images, -1, 1)
    images, scaled = _pixels(images, spec, request.scale)
    kinds = f", {labels.max() + 1} classes" if labels is not None else ""
    done = f"{len(rows)} images, {size[0]}x{size[1]} {IMAGE_MODES[channels]}{kinds}, {scaled}"
    return _Raw({spec.name: images}, None if labels is None else labels[rows], done)


def _image_files(where: str) -> tuple[list[Path], NDArray[np.int64] | None]:
    def images(folder: Path) -> list[Path]:
        found = (p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
        return sorted(p for p in found if p.is_file())

    root = Path(where)
    try:
        flat = images(root)
        classes = [found for sub in sorted(p for p in root.iterdir() if p.is_dir()) if (found := images(sub))]
    except OSError as error:
        raise DataError(f"cannot read the folder {where} ({error.strerror}); check its permissions") from error
    if flat and classes:
        raise DataError(f"{where} holds images and folders of images; use one folder for each class, or none")
    if not flat and not classes:
        raise DataError(
            f"{where} holds no images; expected {', '.join(IMAGE_SUFFIXES)}, or a folder of them for each class"
        )
    if flat:
        return flat, None
    labels = np.repeat(np.arange(len(classes)), [len(found) for found in classes])
    return [path for found in classes for path in found], labels


def _image_layout(spec: TensorSpec, request: _Request) -> tuple[int, tuple[int, int], bool]:
    """Channels, (height, width), and whether the channels come first."""
    sample = spec.shape[1:]
    if len(sample) == 2:
        sample = (*sample, 1)
    if len(sample) != 3:
        raise DataError(f"{request.where} is a folder of images; input {spec.name} takes {_expected(spec)}, no images")
    first = sample[2] not in (*IMAGE_MODES, None) and sample[0] in IMAGE_MODES
    channels = sample[0] if first else sample[2] or 3
    if channels not in IMAGE_MODES:
        raise DataError(f"images have 1, 3 or 4 channels; input {spec.name} takes {_expected(spec)}; give an .npy file")
    height, width = sample[1:] if first else sample[:2]
    wanted = request.image_size
    if wanted is None and (height is None or width is None):
        raise DataError(f"input {spec.name} takes images of any size; choose one with --image-size HEIGHTxWIDTH")
    asked = wanted or (height, width)
    for have, want in zip((height, width), asked, strict=True):
        if want is None or want < 1 or have not in (None, want):
            raise DataError(f"--image-size {asked[0]}x{asked[1]} does not fit input {spec.name}: {_expected(spec)}")
    return channels, (int(asked[0] or 0), int(asked[1] or 0)), first


def _decoded(path: Path, size: tuple[int, int], channels: int) -> NDArray[np.uint8]:
    """One image as (height, width, channels)."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingComponentError("images need pillow; install it with: pip install 'deploykit[report]'") from error
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{path} has pixels of more than 8 bits; convert it to 8 bits")
            image = image.convert(IMAGE_MODES[channels])
            if image.size != size[::-1]:
                image = image.resize(size[::-1], Image.Resampling.BILINEAR)
            return np.asarray(image, dtype=np.uint8).reshape(*size, channels)
    except DataError:
        raise
    except Exception as error:  # pillow's decoders raise anything
        raise DataError(f"{path} is no readable image; remove or replace it") from error


# --- making them fit -----------------------------------------------------------------------------------------------


def _expected(spec: TensorSpec) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in spec.shape)}] {spec.dtype}"


def _fitted(array: Array, spec: TensorSpec, where: str) -> Array:
    """``array`` with the shape and dtype of ``spec``, or DataError."""
    found = f"[{', '.join(map(str, array.shape))}] {array.dtype}"
    problem = f"{where}: input {spec.name} takes {_expected(spec)}, found {found}"
    want = spec.shape
    if array.ndim == len(want) - 1 and want[-1] in (1, None):
        array = array[..., None]
    elif array.ndim == len(want) + 1 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != len(want) or any(w not in (None, h) for w, h in zip(want[1:], array.shape[1:], strict=True)):
        batch = "; the first axis counts samples" if array.ndim == len(want) - 1 else ""
        raise DataError(f"{problem}{batch}; reshape the samples")
    if not array.size:
        raise DataError(f"{problem}; give at least one sample")
    return _cast(array, spec, problem)


def _cast(array: Array, spec: TensorSpec, problem: str) -> Array:
    if spec.dtype == "string":
        if array.dtype.kind not in "US":
            raise DataError(f"{problem}; give strings")
        return array
    if array.dtype.kind not in "biuf":
        raise DataError(f"{problem}; give numbers")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        first = np.argwhere(~np.isfinite(array))[0]
        raise DataError(f"{problem} with NaN or Inf, first in sample {first[0]}; clean the samples")
    if spec.dtype == "bfloat16":  # numpy has none; frameworks cast float32 themselves
        return array.astype(np.float32)
    dtype = np.dtype(spec.dtype)
    if dtype.kind in "iub":
        low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        if spec.low == 0 and spec.high is not None and spec.high == int(spec.high):  # a vocabulary, no estimate
            high = min(high, int(spec.high))
        if array.dtype.kind == "f" and (array != np.rint(array)).any():
            raise DataError(f"{problem}; give whole numbers")
        if array.min() < low or array.max() > high:
            raise DataError(f"{problem} with values {array.min():g}..{array.max():g}; the input takes {low}..{high}")
        return array.astype(dtype)
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if not np.isfinite(cast).all():
        raise DataError(
            f"{problem} with values up to {np.abs(array).max():.3g}, too large for {spec.dtype}; scale them"
        )
    return cast


def _batch(signature: Signature) -> int:
    """What a number of samples must be a multiple of; 1 where no batch size is fixed."""
    return math.lcm(*(spec.shape[0] or 1 for spec in signature.inputs if spec.shape))


def _whole_batches(samples: Samples, signature: Signature) -> Samples:
    batch = _batch(signature)
    usable = samples.count - samples.count % batch
    if not usable:
        raise DataError(
            f"{samples.source} has {samples.count} samples, the model's batch size is fixed to {batch}; give more"
        )
    return samples if usable == samples.count else samples.head(usable)


# --- made up ---------------------------------------------------------------------------------------------------------

# The last samples, in this order: from (low, high) and the index of an element along all axes, its value.
EDGES: dict[str, Callable[[float, float, NDArray[np.intp]], Array | float]] = {
    "zeros": lambda low, high, _: min(max(0.0, low), high),  # dead units, 0/0
    "all high": lambda low, high, _: high,  # saturation (1 without a known range)
    "alternating": lambda low, high, index: np.where(index % 2 == 0, low, high),  # the largest differences (-1, 1)
}


def synthesize(
    signature: Signature, *, count: int = 64, seed: int = 0, free: int | Sequence[int] | None = None
) -> Samples:
    """Plausible, varied, reproducible samples for a signature; the same on every machine.

    ``count`` is rounded up to whole batches where the batch size is fixed. ``free`` replaces open sizes: one
    number for all, or one for each in their order; by default ``FREE_SPATIAL`` for samples with three or more axes,
    else ``FREE_SEQUENCE``. The last three samples (fewer when ``count`` is below 6) are ``EDGES``.

    Raises DataError for an input that takes strings.
    """
    if count < 1:
        raise DataError(f"{count} samples make no sense; give at least 1")
    batch = _batch(signature)
    count += -count % batch
    edges = min(len(EDGES), count // 2)
    arrays = {spec.name: _made_up(spec, count, edges, seed, free) for spec in signature.inputs}
    if not arrays:
        raise DataError("the model has no inputs to make samples for")
    return Samples(arrays, f"synthetic, {count} samples, the last {edges} edge cases, seed {seed}")


def _sizes(spec: TensorSpec, free: int | Sequence[int] | None) -> tuple[int, ...]:
    sample = spec.shape[1:]
    if free is None:
        free = FREE_SPATIAL if len(sample) >= 3 else FREE_SEQUENCE
    if isinstance(free, int):
        free = [free] * len(sample)
    sizes, given = [], iter(free)
    for size in sample:
        chosen = next(given, None) if size is None else size
        if chosen is None or chosen < 1:
            raise DataError(f"input {spec.name} takes {_expected(spec)}; give a size of at least 1 for each open one")
        sizes.append(chosen)
    return tuple(sizes)


def _made_up(spec: TensorSpec, count: int, edges: int, seed: int, free: int | Sequence[int] | None) -> Array:
    kind = "f" if spec.dtype == "bfloat16" else "" if spec.dtype == "string" else np.dtype(spec.dtype).kind
    if kind not in ("f", "i", "u", "b"):
        raise DataError(f"cannot make up samples for input {spec.name} ({spec.dtype}); give some with --data")
    sizes = _sizes(spec, free)
    rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])  # its own stream, whatever the other inputs
    low, high = _range(spec) if kind == "f" else _whole_range(spec)
    values: Array
    if kind == "f":
        known = spec.low is not None or spec.high is not None
        values = _waves(rng, count, sizes)
        if known:
            values = low + (high - low) / (1.0 + np.exp(-1.7 * values))
    else:
        values = rng.integers(int(low), int(high), (count, *sizes), endpoint=True)
    index = np.indices(sizes).sum(axis=0) if sizes else np.zeros((), np.intp)
    for row, edge in zip(range(count - edges, count), EDGES.values(), strict=False):
        values[row] = edge(low, high, index)
    return values.astype(np.float32 if spec.dtype == "bfloat16" else np.dtype(spec.dtype))


def _range(spec: TensorSpec) -> tuple[float, float]:
    """The spec's range, a side it does not state filled in; -1..1 without any."""
    low, high = spec.low, spec.high
    if low is None and high is None:
        return -1.0, 1.0
    if low is None:
        low = min(0.0, high or 0.0)
    if high is None:
        high = max(1.0, low + 1.0)
    return low, high


def _whole_range(spec: TensorSpec) -> tuple[int, int]:
    """The same in whole numbers that the dtype holds; 0..1 without any: valid for every vocabulary and flag."""
    if spec.dtype == "bool" or (spec.low is None and spec.high is None):
        return 0, 1
    limits = np.iinfo(np.dtype(spec.dtype))
    low, high = _range(spec)
    first = min(max(math.ceil(low), int(limits.min)), int(limits.max))
    return first, max(first, min(math.floor(high), int(limits.max)))


def _waves(rng: np.random.Generator, count: int, sizes: tuple[int, ...]) -> NDArray[np.float64]:
    """White noise and smooth waves, mixed differently for each sample; all axes but the last are smooth."""
    white = rng.standard_normal((count, *sizes))
    if not sizes:
        return white
    channels = sizes[-1]

    def per_sample(values: NDArray[np.float64], width: int = 1) -> NDArray[np.float64]:
        return values.reshape(count, *[1] * (len(sizes) - 1), width)

    smooth = per_sample(rng.uniform(0.7, 1.4, count * channels), channels)
    for axis, size in enumerate(sizes[:-1], start=1):
        place = np.linspace(0.0, 2.0 * np.pi, size, endpoint=False).reshape(
            [-1 if a == axis else 1 for a in range(len(sizes) + 1)]
        )
        turns = per_sample(rng.uniform(0.2, 3.0, count))
        phase = per_sample(rng.uniform(0.0, 2.0 * np.pi, count * channels), channels)
        smooth = smooth * np.cos(turns * place + phase)
    mix = per_sample(rng.uniform(0.0, 1.0, count))
    scale = per_sample(np.exp(rng.uniform(np.log(0.3), np.log(2.0), count)))
    offset = per_sample(rng.normal(0.0, 0.5, count * channels), channels)
    return scale * (mix * white + (1.0 - mix) * smooth) + offset
