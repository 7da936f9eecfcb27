"""HDF5 model files: whole models saved by Keras 2 and, with ``save("x.h5")``, by Keras 3.

The file keeps the model's JSON description in the attribute ``model_config`` and one group per layer
under ``model_weights``. HDF5 can also point outside itself: external links, datasets in other files,
virtual datasets, soft links. A model needs none of them, so any link that is not a plain hard link and
any dataset that is not stored in the file is refused before a value is read.

What Keras 1 or 2 wrote is translated (`deploykit.load.legacy`); only files of Keras 3 are handed to Keras.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import keras

from deploykit.errors import LoadError, UnsafeModelError
from deploykit.load.contents import Contents, named, parse_config, parse_training, printable, text_of
from deploykit.load.legacy import fill_hdf5, keras1, layer_order, stored_names

MAGIC = b"\x89HDF\r\n\x1a\n"

# A dataset may declare a shape that it hardly stores: reading it would allocate the declaration.
BOMB_FLOOR_BYTES = 64 << 20
BOMB_EXPANSION = 1000  # gzip reaches about 1000:1 on constant data


HEAP = b"GCOL\1"  # a global heap, of the only version
HEAP_HEADER_BYTES = 16  # of it and of an object in it, where lengths take 8 bytes, as libhdf5 writes them


# Where no version is recorded (Keras 1.0, and files that were copied by hand): what only a newer Keras writes.
NEWER = {"batch_input_shape": 2, "module": 3, "kernel_initializer": 2, "moving_variance_initializer": 2}


def recognises(path: Path) -> bool:
    """The signature sits at byte 0, 512, 1024, ...: h5py follows a user block too."""
    return bool(h5py.is_hdf5(path))


def refuse_pointers(file: h5py.File, what: str) -> None:
    """Raise UnsafeModelError when anything in an open HDF5 file lies outside it, or is not what it declares."""
    names: list[str] = []
    file.visit_links(lambda name: names.append(text_of(name) or "?"))  # an exception in there would be lost
    for name in names:
        try:
            link = file.get(name, getlink=True)
        except (KeyError, TypeError, ValueError) as error:
            raise UnsafeModelError(f"{what}: unknown kind of link at {name!r}; refusing to follow it") from error
        if link is None:
            raise LoadError(f"{what} is a damaged HDF5 file ({name!r} leads nowhere); copy or save it again")
        if not isinstance(link, h5py.HardLink):
            raise UnsafeModelError(
                f"{what}: {name!r} is a {type(link).__name__} that may point outside the model; refusing to follow "
                "it, save the model again with all its weights in one file"
            )
        item = file.get(name, getclass=True)
        if item is h5py.Dataset:
            _refuse_dataset(file[name], name, what)


def _refuse_dataset(dataset: h5py.Dataset, name: str, what: str) -> None:
    if dataset.external or dataset.is_virtual:
        raise UnsafeModelError(f"{what}: the values of {name!r} lie in another file; refusing to read them")
    declared_bytes = math.prod(dataset.shape or ()) * dataset.dtype.itemsize
    stored_bytes = dataset.id.get_storage_size()
    if declared_bytes > BOMB_FLOOR_BYTES and declared_bytes > BOMB_EXPANSION * stored_bytes:
        raise UnsafeModelError(
            f"{what}: {name!r} declares {declared_bytes >> 20} MiB but stores {stored_bytes} bytes; refusing to read it"
        )


def refuse_heaps(stream: BinaryIO, what: str) -> None:
    """Raise LoadError where libhdf5 would walk a global heap, which holds texts of any length, for ever.

    A heap is a header and a chain of objects; each begins with its number, uses and length, and the next begins behind
    it. libhdf5 (1.14) follows one that does not lead on, of number 0 (free space) and length 0 say, without end.
    """
    left = stream.seek(0, io.SEEK_END) // HEAP_HEADER_BYTES
    for heap in list(_found(stream, HEAP)):
        stream.seek(heap)
        end = heap + int.from_bytes(stream.read(HEAP_HEADER_BYTES)[8:], "little")
        at = heap + HEAP_HEADER_BYTES
        while at + HEAP_HEADER_BYTES <= end:
            stream.seek(at)
            header = stream.read(HEAP_HEADER_BYTES)
            if len(header) < HEAP_HEADER_BYTES:
                break  # beyond the file, which libhdf5 notices
            size = int.from_bytes(header[8:], "little")
            step = HEAP_HEADER_BYTES + -(-size // 8) * 8 if any(header[:2]) else size
            left -= 1
            if not HEAP_HEADER_BYTES <= step < 1 << 63 or left < 0:
                raise LoadError(f"{what} is a damaged HDF5 file (a heap that leads nowhere); copy or save it again")
            at += step


def _found(stream: BinaryIO, mark: bytes) -> Iterator[int]:
    """Where a mark stands in a file."""
    start, before = 0, b""
    stream.seek(0)
    while piece := stream.read(1 << 20):
        piece = before + piece
        at = piece.find(mark)
        while at >= 0:
            yield start + at
            at = piece.find(mark, at + 1)
        before = piece[-len(mark) + 1 :]
        start += len(piece) - len(before)


def open_checked(source: Path | BinaryIO, what: str) -> h5py.File:
    """Open for reading and refuse pointers; the caller closes. Raises LoadError for a damaged file."""
    try:
        with open(source, "rb") if isinstance(source, Path) else contextlib.nullcontext(source) as stream:
            refuse_heaps(stream, what)
        file = h5py.File(source, "r")
    except (OSError, RuntimeError, ValueError) as error:
        raise LoadError(f"{what} is a damaged or truncated HDF5 file; copy or save it again") from error
    try:
        if file.id.get_create_plist().get_sizes() != (8, 8):
            raise LoadError(f"{what} is an HDF5 file with addresses or lengths that are not of 8 bytes; save it again")
        refuse_pointers(file, what)
    except LoadError:
        file.close()
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        file.close()
        raise LoadError(f"{what} is a damaged HDF5 file; copy or save it again") from error
    return file


def peek(path: Path) -> Contents:
    """Read what the file says about itself. Raises LoadError, UnsafeModelError or UnsupportedModelError."""
    with open_checked(path, str(path)) as file:
        try:
            attributes = dict(file.attrs)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise LoadError(f"{path} has attributes that cannot be read; the file is damaged") from error
        text = text_of(attributes.get("model_config"))
        if text is None:
            raise _without_config(file, attributes, path)
        if not isinstance(file.get("model_weights"), h5py.Group):
            raise LoadError(f"{path} describes a model but holds no weights; save it again with model.save()")
        config = parse_config(text.encode("utf-8", "surrogateescape"), f"model_config of {path}")
        contents = Contents(
            config=config,
            saved_by=printable(text_of(attributes.get("keras_version"))),
            backend=printable(text_of(attributes.get("backend"))),
            training_config_found="training_config" in attributes,
            assumed=assumed(text),
            training_config=parse_training(text_of(attributes.get("training_config"))),
        )
        return contents if contents.generation > 1 else modernised(contents, backend_of(file, str(path)), str(path))


def assumed(text: str) -> int:
    """The generation of a description that records no version."""
    return 1 if '"W_regularizer":' in text else next((n for key, n in NEWER.items() if f'"{key}":' in text), 1)


def modernised(contents: Contents, backend: str | None, what: str) -> Contents:
    """A description of Keras 1 as Keras 2 would have written it; ``backend``: what saved the weights."""
    config = keras1.modernise(contents.config, what=what, backend=backend)
    return replace(contents, config=config, backend=backend)


def backend_of(weights: h5py.File, what: str) -> str | None:
    """What a file records, or else the names of its weights tell: Keras 1 recorded nothing."""
    try:
        return printable(text_of(weights.attrs.get("backend"))) or keras1.backend_of(stored_names(weights))
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise LoadError(f"{what} is damaged: its weights are not where it names them; copy or save it again") from error


def _without_config(file: h5py.File, attributes: Mapping[str, object], path: Path) -> LoadError:
    if is_weights(file):
        return LoadError(
            f"{path} holds weights only, no model; pass the model file, and this one with --weights, "
            "or save the whole model with model.save()"
        )
    inside = ", ".join(sorted(map(str, list(file)[:4]))) or "nothing"
    return LoadError(f"{path} is an HDF5 file without a Keras model (it holds {inside}); pass a model file")


def is_weights(file: h5py.File) -> bool:
    """Weights without a model: Keras 2's layer groups, or Keras 3's ``.weights.h5``."""
    return "layer_names" in file.attrs or "layer_names0" in file.attrs or bool({"layers", "vars"} & set(file))


def fill(path: Path, model: keras.Model, contents: Contents) -> list[str]:
    """Give a model that was built from a legacy description its weights; returns notices."""
    with open_checked(path, str(path)) as file:
        config = contents.config
        return fill_hdf5(
            file,
            model,
            config,
            what=str(path),
            backend=contents.backend,
            order=layer_order(config),
            generation=contents.generation,
        )


def fill_beside(file: h5py.File, model: keras.Model, described: Contents, what: str) -> list[str]:
    """Fill a model from layer groups that are not in the file of its description; returns notices.

    Weights of Keras 1 record no version, and have to be of the backend for which its description was read.
    """
    order = layer_order(described.config)
    version = text_of(file.attrs.get("keras_version")) or "1"
    if described.generation > 1 or not version.startswith("1"):
        return fill_hdf5(file, model, what=what, backend=text_of(file.attrs.get("backend")), order=order)
    if (backend := backend_of(file, what)) != described.backend:
        raise LoadError(
            f"{what} was saved on {backend}, the model on {described.backend}, which computes otherwise; "
            "pass the weights of this very model"
        )
    return fill_hdf5(file, model, described.config, what=what, backend=backend, order=order, generation=1)


def build(path: Path, custom_objects: Mapping[str, Any], safe_mode: bool) -> keras.Model:
    """Let Keras build the model; it is not compiled."""
    with named(path, ".h5", ".hdf5") as name:
        return keras.models.load_model(name, dict(custom_objects), compile=False, safe_mode=safe_mode)
