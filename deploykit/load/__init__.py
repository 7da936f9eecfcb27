"""A model file in, a ``keras.Model`` out; nothing that came with the file runs on the way.

Four steps: look at the bytes to find the reader (a name's extension proves nothing), let the reader take
out the model's description without Keras, judge that description (``safety``), and only then build the
model. A format of files is one module with ``recognises``, ``peek``, ``build`` and ``fill``, and one row of
``READERS``. What Keras 3 saved is handed to Keras (``build``); a description of an older Keras is translated
(``legacy``), and the model that is made of it filled with the file's weights (``fill``).

Whatever Keras makes of a broken file leaves here as one line; what it says on the way becomes notices; and
the process is left as it was (``state``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from deploykit.errors import CustomObjectError, DeploykitError, LoadError, UnsafeModelError, UnsupportedModelError
from deploykit.files import sha256
from deploykit.graph import misplaced_biases
from deploykit.load import description, hdf5, keras3, legacy, savedmodel, size, state
from deploykit.load.contents import Contents, named, printable
from deploykit.load.custom import custom_objects as import_objects
from deploykit.load.health import nonfinite_weights, refuse_rewriting
from deploykit.load.safety import Findings, examine
from deploykit.opaque import model_of

__all__ = ["READERS", "Loaded", "Reader", "load", "nonfinite_weights", "refuse_rewriting"]


@dataclass(frozen=True)
class Reader:
    """One format: how it is recognised, what it says about itself, how a model of each generation comes out of it."""

    format: str
    recognises: Callable[[Path], bool]
    peek: Callable[[Path], Contents]
    build: Callable[[Path, Mapping[str, Any], bool], keras.Model] | None  # of Keras 3
    fill: Callable[[Path, keras.Model, Contents], list[str]]  # the weights of older ones; returns notices
    holds: Callable[[Path], int]  # bytes of weights that are stored, at most


READERS = (
    Reader("keras", keras3.recognises, keras3.peek, keras3.build, keras3.fill, size.in_archive),
    Reader("hdf5", hdf5.recognises, hdf5.peek, hdf5.build, hdf5.fill, size.in_hdf5),
    Reader("savedmodel", savedmodel.recognises, savedmodel.peek, None, savedmodel.fill, savedmodel.size_bytes),
    Reader("json", description.recognises, description.peek, description.build, description.fill, size.in_description),
)


@dataclass(frozen=True)
class Loaded:
    """A model and where it came from.

    ``saved_by`` is the Keras version that the file records, ``backend`` the backend, None where it does
    not say; ``generation`` its major version, assumed from the format where no version is recorded, None for a graph.
    ``opaque``: why its layers are unknown, where a TensorFlow graph is all there is (`deploykit.opaque`).
    ``custom_objects`` are the user's objects by name: later steps that rebuild layers from their config do
    so within ``loaded.scope()``. ``options`` are the arguments of `load` that another process needs to load
    a copy of the model. ``training_config`` says how the model was compiled, as data: nothing was made of it;
    ``about``, what `deploykit swap-head` wrote beside the model: classes, task, recipe, accuracy.
    """

    model: keras.Model
    path: Path
    sha256: str
    format: str
    bytes: int
    saved_by: str | None
    generation: int | None
    backend: str | None
    training_config_found: bool
    notices: tuple[str, ...]
    custom_objects: Mapping[str, Any]
    options: Mapping[str, Any]
    opaque: str | None = None
    training_config: Mapping[str, Any] | None = None
    saved_on: str | None = None
    about: Mapping[str, Any] | None = None

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Within it, layers can be rebuilt from their config, with the user's own objects and the trust given."""
        stack = contextlib.ExitStack()
        stack.enter_context(keras.saving.custom_object_scope(dict(self.custom_objects)))
        stack.enter_context(state.safe_mode(not self.options["allow_code"]))
        return stack


def load(
    path: str | os.PathLike[str],
    *,
    custom_objects: Sequence[str] = (),
    weights: str | os.PathLike[str] | None = None,
    allow_code: bool = False,
    allow_nonfinite: bool = False,
) -> Loaded:
    """Load a whole Keras model, uncompiled.

    ``custom_objects``: modules, ``module:Name`` or .py files with the user's own classes. ``weights``: a
    weights file (or another model file) to fill the model from. ``allow_code``: let code that came with
    the file run. ``allow_nonfinite``: accept NaN and Inf in weights.

    Raises LoadError, UnsafeModelError or CustomObjectError for a file that cannot be read, and
    UnsupportedModelError for one whose generation is not supported; always one line.
    """
    path = Path(path)
    beside = Path(weights) if weights is not None else None
    reader = _reader(path)
    contents = reader.peek(path)
    if reader.format == "json":
        contents = description.completed(contents, path, beside)
    notices = list(contents.notices)
    if contents.opaque is None:
        model, objects = _described(reader, path, contents, custom_objects, beside, allow_code, notices)
    else:
        model, objects = _opaque(path, beside, notices), {}
    if not allow_nonfinite and (bad := nonfinite_weights(model)):
        more = f" and {len(bad) - 1} more weights" if len(bad) > 1 else ""
        raise LoadError(f"{path}: {bad[0]}{more}; the training diverged, go back to an earlier checkpoint")
    return Loaded(
        model=model,
        path=path,
        sha256=_fingerprint(path),
        format=reader.format,
        bytes=savedmodel.size_bytes(path) if path.is_dir() else path.stat().st_size,
        saved_by=contents.saved_by,
        generation=contents.generation if contents.opaque is None else None,
        backend=contents.backend,
        training_config_found=contents.training_config_found,
        notices=tuple(notices),
        custom_objects=objects,
        options={"custom_objects": tuple(custom_objects), "allow_code": allow_code},
        opaque=contents.opaque,
        training_config=contents.training_config,
        about=contents.about,
        saved_on=contents.saved_on,
    )


def _described(
    reader: Reader,
    path: Path,
    contents: Contents,
    custom_objects: Sequence[str],
    weights: Path | None,
    allow_code: bool,
    notices: list[str],
) -> tuple[keras.Model, Mapping[str, Any]]:
    """The model that a description describes, with its weights, and the objects by name; appends to ``notices``."""
    with state.undisturbed():
        with state.collected(notices):
            given = {**keras.saving.get_custom_objects(), **import_objects(custom_objects)}
            config = contents.config
            if contents.is_legacy:
                translated = legacy.translate(
                    config, what=str(path), given=given, backend=contents.backend, saved_by=contents.saved_by
                )
                config = translated.model
            findings = examine(config, given, str(path))
        if contents.is_legacy:
            notices += translated.notices
        notices += _judged(findings, contents, path, allow_code)
        notices += [f"{printable(name)} is unknown and left out; it serves training" for name in findings.untrained]
        objects = {**given, **findings.renamed, **findings.untrained}
        held = [(reader, path), *([(_reader(weights), weights)] if weights is not None else [])]
        with (
            state.collected(notices),
            state.safe_mode(not allow_code),
            state.room_for(findings.parts),
            size.bounded(str(path), lambda: sum(each.holds(file) for each, file in held)),
        ):
            model, said = _built(reader, path, contents, config, objects, not allow_code)
            notices += said
            if weights is not None:
                notices += _fill(model, weights, contents)
                notices.append(f"weights filled from {weights} (sha256 {_fingerprint(weights)})")
            if contents.is_legacy:
                legacy.freeze(model, config)
    if not contents.is_legacy and (odd := misplaced_biases(model)):
        notices.append(
            f"Keras' TensorFlow backend adds the bias of {', '.join(odd[:3])} along the last axis, which is as long as "
            "their channels; deploykit adds it per channel, as it is meant"
        )
    return model, objects


def _opaque(path: Path, weights: Path | None, notices: list[str]) -> keras.Model:
    """The model of a SavedModel without layers; appends to ``notices``."""
    if weights is not None:
        raise LoadError(f"{path} is a TensorFlow graph with its own weights, which --weights cannot replace")
    with state.undisturbed(), state.collected(notices):
        try:
            graph = savedmodel.graph(path)
            model = model_of(graph, path.resolve().name)
        except DeploykitError:
            raise
        except Exception as error:  # a damaged graph fails anywhere in TensorFlow
            raise LoadError(f"TensorFlow cannot read the graph of {path} ({_cause(error)}); save it again") from error
    for symbol, (_, spec) in zip(model.outputs, graph.outputs, strict=True):
        if (name := symbol._keras_history.operation.name) != spec.name:
            notices.append(f"output {spec.name} is called {name}, as an input has its name")
    return model


def _fingerprint(path: Path) -> str:
    return savedmodel.sha256(path) if path.is_dir() else sha256(path)


def _reader(path: Path) -> Reader:
    """The reader for the bytes at ``path``. Raises LoadError or UnsupportedModelError."""
    try:
        if not path.exists():
            raise LoadError(f"there is no file {path}; check the path")
        if path.is_dir():
            if savedmodel.recognises(path):
                return next(reader for reader in READERS if reader.format == "savedmodel")
            raise _folder(path)
        if not path.is_file():
            raise LoadError(f"{path} is no regular file; pass a .keras or HDF5 file")
        if path.stat().st_size == 0:
            raise LoadError(f"{path} is empty; copy or save it again")
        for reader in READERS:
            if reader.recognises(path):
                return reader
    except (OSError, ValueError) as error:
        raise LoadError(f"cannot read {path} ({_cause(error)}); check the path and its permissions") from error
    raise LoadError(
        f"{path} is neither a .keras archive nor an HDF5 file nor a JSON description; "
        "pass a model written by model.save()"
    )


def _folder(path: Path) -> DeploykitError:
    if (path / keras3.CONFIG).exists():
        return UnsupportedModelError(
            f"{path} is an unpacked .keras folder, which is not supported; save the model with model.save('x.keras')"
        )
    return LoadError(f"{path} is a folder without a model; pass a .keras or HDF5 file")


def _judged(findings: Findings, contents: Contents, path: Path, allow_code: bool) -> list[str]:
    """Raise for what must not or cannot be built; return notices for what was allowed."""
    more = f" (and {len(findings.code) - 1} more)" if len(findings.code) > 1 else ""
    if findings.code and not allow_code:
        raise UnsafeModelError(
            f"{path}: {findings.code[0]}{more}; safe mode runs nothing that comes with a file, "
            "--allow-code does if you trust its author"
        )
    if findings.missing:
        names = ", ".join(findings.missing)
        if (newer := _newer(contents)) is not None:
            raise UnsupportedModelError(
                f"{path} was saved by {newer} and needs what Keras {keras.__version__} does not have: {names}; "
                "update Keras, or give your own classes with --custom-objects"
            )
        raise CustomObjectError(
            f"{path} needs classes or functions that were not given: {names}; "
            "name the module or .py file that defines them with --custom-objects"
        )
    return [f"code from the file was allowed to run: {found}" for found in findings.code]


def _newer(contents: Contents) -> str | None:
    """The Keras that saved the file, when it is newer than the one installed."""
    said = [int(part) for part in (contents.saved_by or "").split(".")[:2] if part.isdecimal()]
    return f"the newer Keras {contents.saved_by}" if said > list(map(int, keras.__version__.split(".")[:2])) else None


def _built(
    reader: Reader,
    path: Path,
    contents: Contents,
    config: Mapping[str, Any],
    objects: Mapping[str, Any],
    safe_mode: bool,
) -> tuple[keras.Model, list[str]]:
    """The model with its weights, and notices."""
    try:
        if contents.is_legacy or reader.build is None:
            what, saved_by = str(path), contents.saved_by
            model = _usable(legacy.build(config, objects, what=what, safe_mode=safe_mode, saved_by=saved_by), path)
            return model, reader.fill(path, model, contents)
        return _usable(reader.build(path, objects, safe_mode), path), []
    except DeploykitError:
        raise
    except Exception as error:  # a broken file fails anywhere in Keras, h5py or TensorFlow
        if _lacks_input_shape(contents.config):
            raise _without_input_shape(path) from error
        if (newer := _newer(contents)) is not None:
            raise UnsupportedModelError(
                f"{path} was saved by {newer} and Keras {keras.__version__} cannot read it ({_cause(error)}); "
                "update Keras"
            ) from error
        raise LoadError(
            f"Keras cannot load {path} ({_cause(error)}); if it is intact, save it again with Keras {keras.__version__}"
        ) from error


def _usable(model: Any, path: Path) -> keras.Model:
    if not isinstance(model, keras.Model):
        raise LoadError(f"{path} describes a {type(model).__name__}, not a model; save a whole model with model.save()")
    if not model.built:
        raise _without_input_shape(path)
    return model


def _without_input_shape(path: Path) -> LoadError:
    return LoadError(
        f"{path} has no known input shape; start it with keras.Input(shape) or call model.build((None, ...)), "
        "then save it again"
    )


def _lacks_input_shape(config: Mapping[str, Any]) -> bool:
    """A Sequential that was never told, nor shown, its input."""
    while config.get("class_name") == "Sequential":
        inner = config.get("config")
        layers = inner if isinstance(inner, list) else inner.get("layers") if isinstance(inner, dict) else None
        if not isinstance(layers, list) or (isinstance(inner, dict) and inner.get("build_input_shape")):
            return False
        if not layers:
            return True
        config = layers[0] if isinstance(layers[0], dict) else {}
        first = config.get("config")
        if not isinstance(first, dict) or {"batch_shape", "batch_input_shape", "input_shape"} & set(first):
            return False
        if config.get("class_name") not in ("Sequential", "Functional", "Model"):
            return True
    return False


def _fill(model: keras.Model, weights: Path, described: Contents) -> list[str]:
    """Fill a model from a weights file or another model file, recognised by content; returns notices."""
    try:
        return _filled(model, weights, described)
    except DeploykitError:
        raise
    except Exception as error:  # a file of another model, or a damaged one, fails anywhere in Keras and h5py
        raise LoadError(
            f"the weights in {weights} do not fit the model ({_cause(error)}); pass the weights of this very model"
        ) from error


def _filled(model: keras.Model, weights: Path, described: Contents) -> list[str]:
    reader = _reader(weights)
    suffix = ".keras"
    if reader.format == "hdf5":
        with hdf5.open_checked(weights, str(weights)) as file:
            if "layer_names" in file.attrs or "layer_names0" in file.attrs or "model_weights" in file:
                return hdf5.fill_beside(file, model, described, str(weights))
            if not hdf5.is_weights(file):
                raise LoadError(f"{weights} holds no weights; pass a file written by model.save_weights()")
            if described.is_legacy and not legacy.is_of_keras_3(file):
                return legacy.fill_archive(file, model, described.config, what=str(weights))
            suffix = ".weights.h5"
    elif reader.format == "json":
        raise LoadError(f"{weights} describes a model but holds no weights; pass a file written by save_weights()")
    else:
        contents = reader.peek(weights)
        if contents.is_legacy or reader.build is None:
            return reader.fill(weights, model, contents)
    with named(weights, suffix) as name:
        model.load_weights(name)
    return []


def _cause(error: BaseException) -> str:
    """The innermost reason of Keras' nested messages, in one short line."""
    text = str(error).rpartition("Exception encountered:")[2].strip()
    if isinstance(error, RecursionError):
        text = "its layers are nested or chained too deeply"
    first = "".join(c if c.isprintable() else "?" for c in text.splitlines()[0]) if text else type(error).__name__
    return first if len(first) <= 200 else f"{first[:197]}..."
