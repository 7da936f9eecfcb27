"""Features: what a frozen body makes of every sample, computed once and kept in a file.

While a body is frozen it answers the same in every epoch, so its answers are computed once, by the fused body (the same
function with fewer layers, proven by `fuse`), and the head trains on them. They are written batch by batch into an
``.npy`` file and mapped into memory, so that memory does not grow with the number of samples.

    row v·n + i     features of sample i of n in view v; view 0 is the sample itself, the others are augmented copies

The file is named by what it depends on: a hash of the body's layers and weights, of the data's content, of the
augmentation and its seed, and of Keras' version. It is whole or absent.

Limits: an augmentation that depends on what else is in a batch gives other views for another batch size, which is why
the batch size is part of the name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from deploykit import graph
from deploykit.data import Samples, Stream
from deploykit.errors import DataError, OutputError, ProofError, UnsupportedModelError
from deploykit.files import whole_file
from deploykit.fuse import fuse

Array = npt.NDArray[Any]
BATCH = 64
PROOF_SAMPLES = 4


def cache_folder() -> Path:
    """Where features are kept unless the user says otherwise: the user's cache, as XDG names it."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "deploykit" / "features"


def fused_body(body: Any, samples: Samples | Stream) -> tuple[Any, str | None]:
    """The body as it is run, and why it is not fused where it is not."""
    try:
        return fuse(body, samples=samples.head(PROOF_SAMPLES).arrays).model, None
    except (UnsupportedModelError, ProofError) as error:
        return body, f"features come from the body as it is, which could not be fused: {error}"


def key(body: Any, data: str, views: int = 0, augmentation: Any = None) -> str:
    """Name of the file that holds these features. ``data``: a hash of the samples' content."""
    digest = hashlib.sha256()
    about = ["features/1", keras.__version__, data, views, BATCH]
    about.append(None if augmentation is None else [layer.get_config() for layer in augmentation.layers])
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    for node in graph.trace(body).nodes:
        digest.update(json.dumps([node.name, *map(repr, (node.inputs, node.outputs))]).encode())
        if isinstance(node.layer, keras.layers.Layer):
            digest.update(json.dumps(node.layer.get_config(), sort_keys=True, default=str).encode())
            for variable in node.layer.weights:
                digest.update(np.ascontiguousarray(graph.numpy(variable)).tobytes())
    return digest.hexdigest()[:32]


def compute(
    body: Any,
    samples: Samples | Stream,
    path: Path,
    *,
    views: int = 0,
    augmentation: Any = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write features of all samples, float32 (samples · (1 + views), units), to ``path``.

    ``body``: one input per array of the samples, a vector as output. ``augmentation``: a Keras model of the first
    input, called in training mode. ``progress(done, total)`` counts samples of all views.

    Raises DataError for a sample whose features are not finite, OutputError where there is no room for the file.
    """
    run = _compiled(body)
    units = int(body.output.shape[-1])
    rows = samples.count * (1 + views)
    _room(path, rows * units * 4)
    with whole_file(path, force=True) as target:
        stored = np.lib.format.open_memmap(target, mode="w+", dtype=np.float32, shape=(rows, units))
        done = 0
        for view in range(1 + views):
            start = view * samples.count
            for batch in samples.batches(BATCH):
                if view:
                    name = next(iter(batch))
                    batch = {**batch, name: graph.numpy(augmentation(batch[name], training=True))}
                found = run(batch)
                bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
                if len(bad):
                    raise DataError(
                        f"the body gives no finite features for sample {start - view * samples.count + bad[0]} "
                        f"({len(bad)} of {len(found)} in its batch); look at `deploykit inspect` and at the data"
                    )
                stored[start : start + len(found)] = found
                start += len(found)
                done += len(found)
                progress(done, rows)
        stored.flush()
        del stored


def mapped(path: Path) -> Array:
    """The features, read from disk as they are used."""
    stored: Array = np.load(path, mmap_mode="r")
    return stored


def _compiled(body: Any) -> Callable[[dict[str, Array]], Array]:
    """The body as one function of a batch, which Keras compiles once; a shorter last batch is filled up."""
    model = graph.functional_form(graph.runnable(body))
    names = [symbol._keras_history.operation.name for symbol in model.inputs]

    def run(batch: dict[str, Array]) -> Array:
        count = len(next(iter(batch.values())))
        parts = [batch[name] for name in names]
        if count < BATCH:
            parts = [np.concatenate([part, np.repeat(part[-1:], BATCH - count, axis=0)]) for part in parts]
        given = keras.tree.pack_sequence_as(model.input, parts)
        features: Array = np.asarray(model.predict_on_batch(given), dtype=np.float32)
        wanted: Array = features[:count]
        return wanted

    return run


def _room(path: Path, size: int) -> None:
    folder = path.absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise OutputError(
            f"cannot keep features in {folder} ({error.strerror}); give another folder with --cache"
        ) from error
    if size > free:
        raise OutputError(
            f"features need {size / 2**20:,.0f} MiB and {folder} has {free / 2**20:,.0f} MiB left; free some space or "
            "give another folder with --cache"
        )
