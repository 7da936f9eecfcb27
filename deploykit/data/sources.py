"""Sources: one reader for each kind of place that samples come from.

A reader takes a `Request` and gives a `Source`: parts (files, or batches of a program), each with rows by input name.
Parts are an iterator, because a program's batches come when it makes them; who reads them looks at each before the
next is asked for.

*Pixels* (0..255) become what the model says it takes; the law is `pixel_law`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deploykit.data.fit import expected
from deploykit.data.rows import Held, Rows, Slot, npy, npz_keys, npz_member
from deploykit.data.samples import Array, Numbers
from deploykit.errors import DataError, MissingComponentError
from deploykit.signature import Signature, TensorSpec

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

# Names of the classes that a data set's own page gives to its numbers; the others have numbers only.
KERAS_CLASSES = {
    "mnist": ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
    "fashion_mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}

Half = Literal["train", "test"]
_HALVES: Mapping[Half, str] = {"train": "training half", "test": "test half"}

# A range may be an estimate (mean ± 2 deviations of a Normalization), so these lie well between the usual ones.
RAW_ABOVE = 8.0  # 0..1 and -1..1 end far below, 0..255 far above
SIGNED_BELOW = -0.75  # dark images in 0..1 reach -0.4


@dataclass(frozen=True)
class Request:
    """What samples are wanted; see `deploykit.data.open_samples`. ``half``: of a Keras data set."""

    where: str
    signature: Signature
    limit: int | None
    seed: int
    image_size: tuple[int, int] | None
    scale: float | None
    half: Half = "test"

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise DataError(f"a limit of {self.limit} samples leaves none; give at least 1")
        if self.scale is not None and (not math.isfinite(self.scale) or self.scale == 0):
            raise DataError(f"a pixel scale of {self.scale} makes no sense; 1 keeps 0..255 and 0.00392157 gives 0..1")

    def chosen(self, count: int) -> Numbers:
        """Which of ``count`` samples are used: all, or ``limit`` of them drawn by ``seed``, in their order.

        Drawn, not the first ones: files are often sorted by class.
        """
        if self.limit is None or self.limit >= count:
            return np.arange(count)
        return np.sort(np.random.default_rng(self.seed).permutation(count)[: self.limit])

    @property
    def names(self) -> list[str]:
        return [spec.name for spec in self.signature.inputs]

    def only_input(self) -> TensorSpec:
        if len(self.signature.inputs) == 1:
            return self.signature.inputs[0]
        names = ", ".join(self.names)
        raise DataError(f"{self.where} feeds one input and the model has several ({names}); give an .npz keyed by them")


@dataclass(frozen=True, eq=False)
class Part:
    """Rows by input name, all equally many. ``labels``: pieces, more of which may come while parts are read.

    To train on there is more: ``y``, of any width, and the names of its classes or columns, looked up when they are
    asked for.
    """

    rows: Mapping[str, Rows]
    where: str
    labels: list[Array] | None = None
    notes: tuple[str, ...] = ()
    y: Rows | None = None
    classes: Callable[[], Array] | None = None

    @property
    def count(self) -> int:
        return next(iter(self.rows.values())).shape[0]


def _no_faults(rows: Numbers) -> dict[int, str]:
    return {}


@dataclass(frozen=True, eq=False)
class Source:
    """``done``: what happened to the samples on their way, in words.

    ``faults`` tries which of some rows can be read and says of the others why not; where headers tell all, none.
    ``notices``: what was passed over. ``heeds``: options about pixels that mattered.
    """

    parts: Iterable[Part]
    done: Sequence[str] = field(default=())
    faults: Callable[[Numbers], dict[int, str]] = _no_faults
    notices: tuple[str, ...] = ()
    heeds: tuple[str, ...] = ()


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def part_by_name(
    names: Sequence[str], keys: Sequence[str], rows_of: Callable[[str], Rows], where: str, y: Rows | None = None
) -> Part:
    """A part of what is there by name: the inputs, or ``x`` for the only one; labels are ``y``, or there as ``y``.

    Raises DataError where a name is missing or the numbers of samples differ. Labels are one number for each
    sample; a ``y`` of more (masks, say) is left aside, and ``notes`` tell.
    """
    wanted = {name: name for name in names}
    if len(names) == 1 and names[0] not in keys:
        wanted = {names[0]: "x"}
    if any(key not in keys for key in wanted.values()):
        alternative = " (or x)" if len(names) == 1 and names[0] != "x" else ""
        raise DataError(
            f"{where} must hold {', '.join(names)}{alternative}; found {', '.join(keys) or 'nothing'}; "
            "rename the arrays"
        )
    rows = {name: rows_of(key) for name, key in wanted.items()}
    for name, found in rows.items():
        if not found.shape:
            raise DataError(f"{where}: {name} is a single number; give one row for each sample")
    if y is None and "y" in keys and "y" not in wanted.values():
        y = rows_of("y")
    named = "classes" in keys and "classes" not in wanted.values()
    classes = (lambda: _whole(rows_of("classes"))) if named else None
    counts = {found.shape[:1] for found in (*rows.values(), *([] if y is None else [y]))}
    if len(counts) > 1:
        shapes = {**{name: found.shape for name, found in rows.items()}, **({} if y is None else {"y": y.shape})}
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise DataError(f"{where}: the numbers of samples differ ({listed}); give every array as many rows")
    if y is None:
        return Part(rows, where)
    if len(y.shape) > 2 or y.shape[1:] not in ((), (1,)):
        note = f"y {list(y.shape[1:])} is no class label and left aside"
        return Part(rows, where, notes=(note,), y=y, classes=classes)
    return Part(rows, where, [_whole(y).reshape(-1)], y=y, classes=classes)


def _whole(rows: Rows) -> Array:
    return rows.take(np.arange(rows.shape[0])) if rows.shape else np.empty(0)


# --- arrays --------------------------------------------------------------------------------------------------------


def read_npy(request: Request) -> Source:
    spec = request.only_input()
    stored = npy(request.where)
    if not stored.shape:
        raise DataError(f"{request.where} holds a single number; expected {expected(spec)}")
    return Source([Part({spec.name: stored}, request.where)])


def _npz_part(path: str, request: Request, slots: Mapping[str, Slot]) -> Part:
    keys = npz_keys(path)
    return part_by_name(request.names, keys, lambda key: npz_member(path, key, slots[key]), path)


def _slots(request: Request) -> dict[str, Slot]:
    return {key: Slot() for key in (*request.names, "x", "y", "classes")}


def read_npz(request: Request) -> Source:
    return Source([_npz_part(request.where, request, _slots(request))])


# --- folders -------------------------------------------------------------------------------------------------------


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    found = (p for p in folder.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))
    return sorted(p for p in found if p.is_file())


def read_folder(request: Request) -> Source:
    root = Path(request.where)
    try:
        arrays = _files(root, (".npz",))
        flat = _files(root, IMAGE_SUFFIXES)
        folders = sorted(p for p in root.iterdir() if p.is_dir())
        classes = {sub.name: found for sub in folders if (found := _files(sub, IMAGE_SUFFIXES))}
    except OSError as error:
        raise DataError(f"cannot read the folder {root} ({error.strerror}); check its permissions") from error
    if arrays and (flat or classes):
        raise DataError(f"{request.where} holds images and .npz files; use a folder for each kind")
    if flat and classes:
        raise DataError(f"{request.where} holds images and folders of images; use one folder for each class, or none")
    if arrays:
        slots = _slots(request)
        parts = (_npz_part(str(path), request, slots) for path in arrays)
        return Source(parts, [f"{len(arrays)} files"])
    if flat:
        return images(request, flat, root)
    if not classes:
        raise DataError(
            f"{request.where} holds no images and no .npz files; expected {', '.join(IMAGE_SUFFIXES)}, a folder of "
            "them for each class, or .npz"
        )
    labels = np.repeat(np.arange(len(classes)), [len(found) for found in classes.values()])
    source = images(
        request, [path for found in classes.values() for path in found], root, labels, np.array(list(classes))
    )
    empty = [sub.name for sub in folders if sub.name not in classes and not sub.name.startswith(".")]
    notice = f"{request.where}: no images in {listed(empty)}, which is no class" if empty else ""
    done = [source.done[0], f"{len(classes)} classes", *source.done[1:]]
    return replace(source, done=done, notices=(notice,) if empty else ())


# --- pixels --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Pixels:
    """Rows of pixels 0..255, put through a law as they are taken."""

    raw: Rows
    law: Callable[[Array], Array]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.raw.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.law(np.zeros(1, self.raw.dtype)).dtype

    def take(self, rows: Numbers) -> Array:
        return self.law(self.raw.take(rows))


def pixel_law(spec: TensorSpec, scale: float | None) -> tuple[Callable[[Array], Array], str]:
    """How pixels 0..255 become what an input takes, and in words what is done.

    The range of the model's first layers decides. One that ends above `RAW_ABOVE` leaves pixels as they are; one that
    begins below `SIGNED_BELOW` gives x / 127.5 - 1; any other gives x / 255. A model that says nothing has no Rescaling
    of its own and was most likely trained on scaled pixels, so it gets x / 255 too. ``scale``, a factor, overrules it.
    """
    if scale is not None:
        factor = np.float64(scale)
        return lambda x: x * factor, f"pixels x {scale:g}"
    if np.dtype(spec.dtype).kind in "iu" or (spec.high is not None and spec.high > RAW_ABOVE):
        return lambda x: x, "pixels 0..255"
    if spec.high is None:
        return lambda x: x / 255.0, "pixels / 255, as the model states no range"
    if spec.low is not None and spec.low < SIGNED_BELOW:
        return lambda x: x / 127.5 - 1.0, "pixels / 127.5 - 1"
    return lambda x: x / 255.0, "pixels / 255"


def read_keras(request: Request) -> Source:
    spec = request.only_input()
    name = request.where
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the progress of a download
            train, test = importlib.import_module(f"keras.datasets.{name}").load_data()
    except Exception as error:  # whatever a download or a damaged cache raises
        cause = " ".join(str(error).split())[:200]
        raise DataError(
            f"cannot get the Keras data set {name} ({cause}); download it once where there is a network"
        ) from error
    x, labels = (np.asarray(array) for array in (train if request.half == "train" else test))
    rows: Rows = Held(x)
    done = [_HALVES[request.half]]
    if KERAS_SETS[name]:
        x, reshaped = _arranged(x[..., None] if x.ndim == 3 else x, spec, name)
        law, scaled = pixel_law(spec, request.scale)
        rows = _Pixels(Held(x), law)
        done += [reshaped, scaled]
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    classes = (lambda: np.array(KERAS_CLASSES[name])) if name in KERAS_CLASSES else None
    part = Part({spec.name: rows}, name, [labels], y=Held(labels), classes=classes)
    return Source([part], done, heeds=("scale",) if KERAS_SETS[name] else ())


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
    raise DataError(f"{where} has samples of shape {images.shape[1:]}; input {spec.name} takes {expected(spec)}")


# --- images --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Images:
    """Image files, decoded as they are taken; (N, H, W, C), (N, C, H, W) or (N, H, W)."""

    files: Sequence[Path] = field(repr=False)
    size: tuple[int, int]
    channels: int
    axes: str  # of one sample: "HWC", "CHW" or "HW"

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = dict(zip("HWC", (*self.size, self.channels), strict=True))
        return (len(self.files), *(sizes[axis] for axis in self.axes))

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint8)

    def take(self, rows: Numbers) -> Array:
        images = np.empty((len(rows), *self.size, self.channels), np.uint8)
        for place, row in enumerate(rows):
            images[place] = _decoded(self.files[row], self.size, self.channels)
        return {"HWC": images, "CHW": np.moveaxis(images, -1, 1), "HW": images[..., 0]}[self.axes]


def images(
    request: Request, files: Sequence[Path], root: Path, y: Array | None = None, classes: Array | None = None
) -> Source:
    """Image files as the model's only input; ``y`` and ``classes`` as in `Part`. Faults name files from ``root`` on."""
    spec = request.only_input()
    _pillow()
    channels, size, axes = _image_layout(spec, request)
    law, scaled = pixel_law(spec, request.scale)
    stored = _Images(files, size, channels, axes)
    count = len(request.chosen(len(files)))
    done = f"{count} images, {size[0]}x{size[1]} {IMAGE_MODES[channels]}"
    part = Part(
        {spec.name: _Pixels(stored, law)},
        request.where,
        None if y is None else [y],
        y=None if y is None else Held(y),
        classes=None if classes is None else lambda: classes,
    )
    return Source([part], [done, scaled], partial(_unusable, stored, root), heeds=("image_size", "scale"))


def _unusable(stored: _Images, root: Path, rows: Numbers) -> dict[int, str]:
    found = {}
    for row in rows:
        path = stored.files[row]
        try:
            _decoded(path, stored.size, stored.channels)
        except _ImageError as error:
            found[int(row)] = f"{path.relative_to(root) if path.is_relative_to(root) else path} {error.fault}"
    return found


def _image_layout(spec: TensorSpec, request: Request) -> tuple[int, tuple[int, int], str]:
    """Channels, (height, width), and the axes of a sample."""
    sample = spec.shape[1:]
    flat = len(sample) == 2
    if flat:
        sample = (*sample, 1)
    if len(sample) != 3:
        raise DataError(f"{request.where} is a folder of images; input {spec.name} takes {expected(spec)}, no images")
    first = sample[2] not in (*IMAGE_MODES, None) and sample[0] in IMAGE_MODES
    channels = sample[0] if first else sample[2] or 3
    if channels not in IMAGE_MODES:
        raise DataError(f"images have 1, 3 or 4 channels; input {spec.name} takes {expected(spec)}; give an .npy file")
    height, width = sample[1:] if first else sample[:2]
    wanted = request.image_size
    if wanted is None and (height is None or width is None):
        raise DataError(f"input {spec.name} takes images of any size; choose one with --image-size HEIGHTxWIDTH")
    asked = wanted or (height, width)
    for have, want in zip((height, width), asked, strict=True):
        if want is None or want < 1 or have not in (None, want):
            raise DataError(f"--image-size {asked[0]}x{asked[1]} does not fit input {spec.name}: {expected(spec)}")
    return channels, (int(asked[0] or 0), int(asked[1] or 0)), "HW" if flat else "CHW" if first else "HWC"


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingComponentError("images need pillow; install it with: pip install 'deploykit[report]'") from error
    return Image


class _ImageError(DataError):
    def __init__(self, path: Path, fault: str, remedy: str) -> None:
        super().__init__(f"{path} {fault}; {remedy}")
        self.fault = fault


def _decoded(path: Path, size: tuple[int, int], channels: int) -> NDArray[np.uint8]:
    """One image as (height, width, channels)."""
    pillow = _pillow()
    try:
        with pillow.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise _ImageError(path, "has pixels of more than 8 bits", "convert it to 8 bits")
            image = image.convert(IMAGE_MODES[channels])
            if image.size != size[::-1]:
                image = image.resize(size[::-1], pillow.Resampling.BILINEAR)
            return np.asarray(image, dtype=np.uint8).reshape(*size, channels)
    except DataError:
        raise
    except Exception as error:  # pillow's decoders raise anything
        fault = "is not there" if isinstance(error, FileNotFoundError) else "is no readable image"
        raise _ImageError(path, fault, "remove or replace it") from error
