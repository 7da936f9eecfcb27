"""Recalibrate: the statistics of every BatchNormalization, measured again over a whole data set.

A BatchNormalization with moving mean m and moving variance v answers gamma·(x - m)/sqrt(v + epsilon) + beta. Training
leaves moving averages in m and v: after few steps they still hold the initial 0 and 1, after fine-tuning or on another
domain those of other data. Here they become mean and (biased, as in Keras) variance of what enters the layer.

Sums over batches
-----------------
Of each batch count, mean and sum of squared deviations are taken in float64, in two passes over the tensor, and batches
are combined by the law of Chan, Golub and LeVeque (1979, "Updating formulae and a pairwise algorithm for computing
sample variances"; for batches of one it is Welford's of 1962):

    n = n_A + n_B     d = mean_B - mean_A
    mean = mean_A + d·n_B/n     M = M_A + M_B + d²·n_A·n_B/n     variance = M/n

which is exact in exact arithmetic and loses nothing where the mean is large. Memory holds one batch and three numbers a
channel, however many samples there are; all calls of a shared layer go into one sum. Where a Keras mask travels, masked
positions do not count, as in Keras' own training.

Two methods
-----------
sequential  Layer after layer: each is measured with all BatchNormalizations in front of it already renewed, and working
            as they will at inference. The result is what it says: in the new model, every layer's statistics are those
            of what enters it (on this data, whatever the size of a batch). It takes as many passes as there are
            BatchNormalizations on the longest path; those that have as many in front of them share one, and a pass ends
            at the last layer it is about.
joint       All at once, in one pass: each layer normalises by its batch, as in training (dropout and augmentation stay
            off), and the moments of all batches are combined by the law above; that is PreciseBN (Wu and Johnson 2021,
            "Rethinking 'Batch' in BatchNorm", section 3), where for batches of one size
            variance = E[var_B + mean_B²] - E[mean_B]². Batches are drawn without replacement, by seed, as data is often
            sorted by class. Limits: what a layer sees while those in front of it normalise by batch is not what it
            sees at inference; the smaller the batch, the larger the gap. With all samples in one batch there is none.

What is proven
--------------
One more pass, through a new copy of the finished model, measures what enters each layer, beside what is stored there.
Where both agree to `SETTLED` deviations (and the rounding of what is stored), it is proven that the statistics are
those of the model's own activations on this data. ``sequential`` must agree: where it does not (a data set that is not
the same when it is read again, a net with noise in it) ProofError is raised. ``joint`` may miss; then the result is not
called proven, and says by how much. That answers become better is measured where there are labels, never claimed.

Limits: a layer on whose answer its own input depends (a shared one, called on what it made) has no order, only
``joint`` takes it. Subclasses of BatchNormalization are refused, as their statistics may be others; so are layers that
normalise by the batch whatever mode is asked for. Under TimeDistributed the steps of a sample are pooled.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import numpy.typing as npt

from deploykit.archive import write_keras
from deploykit.data import Samples, Stream
from deploykit.errors import DataError, InputError, ProofError, UnsupportedModelError
from deploykit.graph import (
    Trace,
    activation_of,
    cause,
    flat_call,
    functional_form,
    inner_layers,
    numpy,
    replay,
    runnable,
    showing,
    trace,
    values_per_sample,
)
from deploykit.opaque import graph_of

ops = keras.ops
Norm = keras.layers.BatchNormalization
Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Method = Literal["sequential", "joint"]
Data = Samples | Stream
Key = tuple[str, int]  # the name of the layer in the trace, and which of the BatchNormalizations in it

BATCH = 256  # samples at a time
BATCH_ELEMENTS = 100_000_000  # numbers on their way through the model at a time: 400 MB in float32
SETTLED = 1e-3  # deviations; float32 gives a mean of a hundred deviations to 1e-5, and a thousandth changes no answer
CLIP = 1e-7  # of probabilities under a logarithm, as in Keras


# ------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True, eq=False)
class Moments:
    """Values seen, their mean and the sum of their squared deviations: float64, one for each channel."""

    count: Vector
    mean: Vector
    squares: Vector

    @property
    def variance(self) -> Vector:
        """Biased, as Keras has it."""
        return np.asarray(self.squares / np.maximum(self.count, 1))

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.mean).all() and np.isfinite(self.squares).all())

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        apart = other.mean - self.mean
        squares = self.squares + other.squares + apart**2 * self.count * share
        return Moments(count, self.mean + apart * share, squares)


def _sum(parts: Iterable[Moments]) -> Moments:
    return reduce(add, parts)


def moments(x: Any, axis: int, mask: Any = None) -> Moments:
    """Of one tensor, per place along ``axis``; ``mask`` has one axis less, False where values do not count."""
    axis %= len(x.shape)
    others = tuple(place for place in range(len(x.shape)) if place != axis)
    x = ops.cast(x, "float64")
    if mask is None:
        counts = ops.broadcast_to(math.prod(x.shape) / max(1, x.shape[axis]), (x.shape[axis],))
        mean = ops.mean(x, others, keepdims=True)
        squares = ops.sum(ops.square(x - mean), others)
    else:
        live = ops.broadcast_to(ops.expand_dims(ops.cast(mask, "bool"), -1), x.shape)
        counts = ops.sum(ops.cast(live, "float64"), others)
        total = ops.sum(ops.where(live, x, 0.0), others, keepdims=True)
        mean = total / ops.reshape(ops.maximum(counts, 1.0), total.shape)
        squares = ops.sum(ops.where(live, ops.square(x - mean), 0.0), others)
    return Moments(*(numpy(value).astype(np.float64).reshape(-1) for value in (counts, mean, squares)))


@dataclass(frozen=True)
class Deviation:
    """How far what enters a layer is from what the layer has stored; sigma is what it divides by, sqrt(v + epsilon).

    ``shift_sigma``: root mean square over the channels of (mean - m)/sigma; ``variance_ratio``: geometric mean of
    (variance + epsilon)/(v + epsilon). ``worst_*``: the channel furthest off. 0 and 1 are a perfect fit.
    """

    shift_sigma: float
    variance_ratio: float
    worst_shift_sigma: float
    worst_variance_ratio: float


def deviation(layer: Any, seen: Moments) -> Deviation:
    """What entered a BatchNormalization beside what it has stored."""
    mean, variance = _stored(layer)
    with np.errstate(all="ignore"):
        shift = (seen.mean - mean) / np.sqrt(variance + layer.epsilon)
        logs = np.log((seen.variance + layer.epsilon) / (variance + layer.epsilon))
        return Deviation(
            shift_sigma=float(np.sqrt(np.mean(shift**2))),
            variance_ratio=float(np.exp(np.mean(logs))),
            worst_shift_sigma=float(np.abs(shift).max()),
            worst_variance_ratio=float(np.exp(logs[np.abs(logs).argmax()])),
        )


def _stored(layer: Any) -> tuple[Vector, Vector]:
    mean, variance = (
        numpy(value).astype(np.float64).reshape(-1) for value in (layer.moving_mean, layer.moving_variance)
    )
    return mean, np.maximum(variance, 0.0)


def _settled(layer: Any, seen: Moments) -> bool:
    """Whether what is stored is what was seen, to `SETTLED` and the rounding of the layer's own weights."""
    mean, variance = _stored(layer)
    dtype = numpy(layer.moving_mean).dtype
    rounding = 2.0 * (2.0**-7 if dtype.name == "bfloat16" else float(np.finfo(dtype).eps))
    scale = variance + layer.epsilon
    near = np.abs(seen.mean - mean) <= SETTLED * np.sqrt(scale) + rounding * np.abs(mean)
    return bool((near & (np.abs(seen.variance - variance) <= (SETTLED + rounding) * scale)).all())


def _give(layer: Any, mean: Vector, variance: Vector) -> None:
    """Give a BatchNormalization its statistics, cast once; of batch renormalisation all copies of them."""
    values = {"moving_mean": mean, "moving_variance": variance}
    if layer.renorm:
        deviations = np.sqrt(variance + layer.epsilon)
        values |= {"moving_stddev": deviations, "renorm_mean": mean, "renorm_stddev": deviations}
    for name, value in values.items():
        with np.errstate(over="ignore"):  # who stores looks at what was stored
            getattr(layer, name).assign(value)


# ------------------------------------------------------------------------------------------------- accuracy


@dataclass(frozen=True)
class Score:
    """Share of right answers and mean cross-entropy over labelled samples."""

    accuracy: float
    loss: float
    samples: int


def _labels(found: Trace, data: Data) -> Labels | str:
    """The class number of each sample, or why there is no accuracy."""
    labels = data.labels
    if labels is None:
        return "the data has no labels"
    if len(found.outputs) != 1:
        return "the model has several outputs"
    shape = found.tensors[found.outputs[0]].shape
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        return "the labels are no class numbers"
    if len(shape) != 2 or shape[1] is None:
        return f"the output, of shape {list(shape)}, is no list of class scores"
    if shape[1] == 1 and activation_of(found, found.outputs[0]) != "sigmoid":
        return "the output is one number that no sigmoid makes"
    classes = max(shape[1], 2)
    if labels.min() < 0 or labels.max() >= classes:
        return f"the labels run from {labels.min()} to {labels.max()}, the model has {classes} classes"
    return np.asarray(labels, np.int64)


class _Tally:
    """Right answers and cross-entropy, batch by batch."""

    def __init__(self, labels: Labels) -> None:
        self.labels, self.place, self.right, self.loss = labels, 0, 0, 0.0

    def add(self, answers: Array) -> None:
        labels = self.labels[self.place : self.place + len(answers)]
        self.place += len(answers)
        scores = answers.astype(np.float64)
        if scores.shape[1] == 1:  # of a sigmoid
            scores = np.concatenate([1 - scores, scores], axis=1)
        right = scores.argmax(axis=1) == labels
        self.right += int((right & np.isfinite(scores).all(axis=1)).sum())
        with np.errstate(all="ignore"):
            chance = scores
            if not ((scores >= 0).all() and np.allclose(scores.sum(axis=1), 1, atol=1e-2)):  # logits
                powers = np.exp(scores - scores.max(axis=1, keepdims=True))
                chance = powers / powers.sum(axis=1, keepdims=True)
            self.loss -= float(np.log(np.clip(chance[np.arange(len(labels)), labels], CLIP, 1.0)).sum())

    @property
    def score(self) -> Score:
        return Score(self.right / self.place, self.loss / self.place, self.place)


# ------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True, eq=False)
class Survey:
    """What enters each BatchNormalization of a model as it is, and the model's accuracy where there are labels."""

    seen: Mapping[Key, Moments]
    score: Score | None


class _Probe:
    """Stands in for the call of one BatchNormalization of a copy: takes in what enters it, then lets it answer.

    ``listening``: take it in. ``by_batch``: answer by the statistics of this batch, as in training.
    """

    def __init__(self, layer: Any, name: str, turn: Callable[[], None]) -> None:
        self.layer, self.name, self.turn = layer, name, turn
        self.plain = layer.call
        self.seen: Moments | None = None
        self.listening = self.by_batch = self.in_training = False
        layer.call = self.call

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        self.in_training |= bool(training) and self.layer.trainable  # Keras ignores it once frozen
        self.turn()
        if self.listening:
            found = moments(inputs, self.layer.axis, mask)
            self.seen = found if self.seen is None else self.seen + found
            if self.by_batch:
                _give(self.layer, found.mean, found.variance)
        return self.plain(inputs, training=False, mask=mask)

    def restart(self, *, listening: bool, by_batch: bool = False) -> None:
        self.seen, self.listening, self.by_batch = None, listening, by_batch


def norms(found: Trace) -> dict[Key, Any]:
    """Every BatchNormalization of a trace, in wrappers and in models that are called as a whole, too.

    A layer that is called in several places has several keys. Raises UnsupportedModelError for subclasses.
    """
    layers: dict[Key, Any] = {}
    for node in found.nodes:
        parts = [part for part in (node.layer, *inner_layers(node.layer)) if isinstance(part, Norm)]
        layers |= {(node.name, place): part for place, part in enumerate(parts)}
    for (name, _), layer in layers.items():
        if type(layer) is not Norm:
            raise UnsupportedModelError(
                f"layer {name} holds a {type(layer).__name__}, which extends BatchNormalization: what its statistics "
                "are is not known; recalibrate it where it was made"
            )
    return layers


def _shuffled(data: Data, size: int, seed: int) -> Iterator[Mapping[str, Array]]:
    order = np.random.default_rng(seed).permutation(data.count)
    for start in range(0, data.count, size):
        yield data.take(order[start : start + size]).arrays


class _Net:
    """A copy of a model whose BatchNormalizations report. The model itself is not touched."""

    def __init__(self, model: Any, batch: int | None = None) -> None:
        self.found = found = trace(model)
        most = min(BATCH, BATCH_ELEMENTS // max(1, values_per_sample(found)))
        self.batch = found.signature.inputs[0].shape[0] or batch or max(1, most)
        originals = norms(found)
        first = {id(layer): key for key, layer in reversed(originals.items())}
        self.same = {key: first[id(layer)] for key, layer in originals.items()}  # of a shared layer, one key for all
        self.names = {
            key: key[0] if any(n.name == key[0] and n.layer is layer for n in found.nodes) else f"{key[0]}/{layer.name}"
            for key, layer in originals.items()
        }
        holders = {name for name, _ in originals}
        self.nodes = [node for node in found.nodes if node.name in holders]
        tensors = dict.fromkeys(tensor for node in self.nodes for tensor in node.outputs)
        self.place = {tensor: place for place, tensor in enumerate(tensors)}
        self.model = functional_form(runnable(replay(showing(found, [*tensors, *found.outputs]))))
        self.order: list[Key] = []  # in which they run
        copies = norms(trace(self.model))
        self.probes: dict[Key, list[_Probe]] = {}
        probed: set[int] = set()
        for key, layer in copies.items():
            if id(layer) not in probed:
                probed.add(id(layer))
                probe = _Probe(layer, self.names[key], partial(self._turn, self.same[key]))
                self.probes.setdefault(self.same[key], []).append(probe)

    def _turn(self, key: Key) -> None:
        if key not in self.order:
            self.order.append(key)

    def layer(self, key: Key) -> Any:
        return self.probes[key][0].layer

    def seen(self, key: Key, source: str) -> Moments:
        """What entered a layer since its probes were started."""
        heard = [probe.seen for probe in self.probes[key] if probe.seen is not None]
        total = _sum(heard) if heard else None
        if total is None or total.count.min() < 2:
            raise DataError(
                f"fewer than two values of a channel enter {self.names[key]} ({source}): there is no variance; "
                "give more samples"
            )
        return total

    def _store(self, key: Key, seen: Moments) -> None:
        for probe in self.probes[key]:
            _give(probe.layer, seen.mean, seen.variance)
        held = _stored(self.layer(key))
        if not all(np.isfinite(value).all() for value in held):
            raise UnsupportedModelError(
                f"the statistics of {self.names[key]} do not fit into {self.layer(key).moving_mean.dtype}; "
                "recalibrate the model in float32"
            )

    def size(self, count: int) -> int:
        """Samples at a time, so that the last batch is not much smaller than the others."""
        return math.ceil(count / math.ceil(count / self.batch))

    def answers(
        self,
        data: Data,
        outputs: Sequence[Any],
        note: Callable[[str], None],
        *,
        strict: bool = True,
        seed: int | None = None,
    ) -> Iterator[list[Any]]:
        """Tensors of the copy, batch by batch; with a ``seed`` in an order that it draws.

        Raises for what no statistics can be made of; for NaN only if ``strict``.
        """
        model = keras.Model(self.model.inputs, list(outputs))
        call, names = flat_call(model), [spec.name for spec in self.found.signature.inputs]
        size = self.size(data.count)
        batches = data.batches(size) if seed is None else _shuffled(data, size, seed)
        for number, arrays in enumerate(batches):
            note(f"{min((number + 1) * size, data.count):,} of {data.count:,}")
            try:
                given = [
                    ops.convert_to_tensor(arrays[name], dtype=symbol.dtype)
                    for name, symbol in zip(names, model.inputs, strict=True)
                ]
                results = call(*given)
            except Exception as error:  # whatever TensorFlow or a layer raises
                raise UnsupportedModelError(
                    f"TensorFlow cannot run model {self.found.name} here: {cause(error)}"
                ) from error
            self._sound(f"batch {number + 1} of {math.ceil(data.count / size)}, {data.source}", strict)
            yield results

    def _sound(self, where: str, strict: bool) -> None:
        for key in self.order:  # the first one is the one to look at
            for probe in self.probes[key]:
                if probe.in_training:
                    raise UnsupportedModelError(
                        f"{probe.name} runs in training mode at inference: it normalises by the batch, whatever is "
                        "stored; call it without training=True"
                    )
                if strict and probe.seen is not None and not probe.seen.finite:
                    raise DataError(
                        f"NaN or infinity enters {probe.name} ({where}); mend the weights in front of it, or the data"
                    )

    def _listen(self, keys: Collection[Key], *, by_batch: bool = False) -> None:
        for key, probes in self.probes.items():
            for probe in probes:
                probe.restart(listening=key in keys, by_batch=by_batch)

    def measure(
        self, keys: Collection[Key], data: Data, note: Callable[[str], None], *, by_batch: int | None = None
    ) -> None:
        """One pass of ``data`` up to some layers, which get the statistics of what enters them.

        ``by_batch``: a seed; all layers normalise by the batch, and this draws the batches.
        """
        self._listen(keys, by_batch=by_batch is not None)
        holders = {name for (name, _), same in self.same.items() if same in keys}
        wanted = dict.fromkeys(tensor for node in self.nodes if node.name in holders for tensor in node.outputs)
        outputs = [self.model.outputs[self.place[tensor]] for tensor in wanted]
        for _ in self.answers(data, outputs, note, seed=by_batch):
            pass
        for key in keys:
            self._store(key, self.seen(key, data.source))

    def survey(self, data: Data, labels: Labels | None, note: Callable[[str], None], *, strict: bool) -> Survey:
        """One pass through the whole model as it is."""
        self._listen(self.probes)
        score = self._scored(data, labels, note, strict)
        return Survey({key: self.seen(key, data.source) for key in self.probes}, score)

    def score(self, data: Data, labels: Labels | None, note: Callable[[str], None]) -> Score | None:
        """The accuracy of the model as it is, if there are labels."""
        self._listen(())
        return self._scored(data, labels, note, False)

    def _scored(self, data: Data, labels: Labels | None, note: Callable[[str], None], strict: bool) -> Score | None:
        tally = None if labels is None else _Tally(labels)
        for results in self.answers(data, self.model.outputs[len(self.place) :], note, strict=strict):
            if tally is not None:
                tally.add(numpy(results[0]))
        return None if tally is None else tally.score

    def levels(self) -> list[list[Key]]:
        """The layers by how many lie in front of them; those within one call of a model follow as they run.

        Raises UnsupportedModelError where a layer is called on what it has made itself.
        """
        inside: dict[str, list[Key]] = {}
        for (name, _), same in self.same.items():
            inside.setdefault(name, []).append(same)
        level = dict.fromkeys(self.probes, 0)
        before = None
        while before != level:
            before = dict(level)
            height: dict[int, int] = {}
            for node in self.found.nodes:
                top = max((height.get(tensor, 0) for tensor in node.inputs), default=0)
                for key in sorted(set(inside.get(node.name, ())), key=self.order.index):
                    top = level[key] = max(level[key], top + 1)
                height |= dict.fromkeys(node.outputs, top)
            if max(level.values()) > len(level):
                worst = max(level, key=lambda key: level[key])
                raise UnsupportedModelError(
                    f"{self.names[worst]} is called on what it has made itself, so that its statistics depend on "
                    "themselves; use --method joint"
                )
        steps = range(1, max(level.values()) + 1)
        return [keys for step in steps if (keys := [key for key, place in level.items() if place == step])]


# ------------------------------------------------------------------------------------------------- the methods


def _sequential(net: _Net, data: Data, seed: int, progress: Callable[[str], None]) -> int:
    levels = net.levels()
    for number, keys in enumerate(levels, 1):
        net.measure(keys, data, _told(progress, f"pass {number} of {len(levels)}"))
    return len(levels)


def _joint(net: _Net, data: Data, seed: int, progress: Callable[[str], None]) -> int:
    net.measure(list(net.probes), data, _told(progress, "one pass"), by_batch=seed)
    return 1


# Each gives the net its statistics and says how many passes over the data it took.
METHODS: Mapping[Method, Callable[[_Net, Data, int, Callable[[str], None]], int]] = {
    "sequential": _sequential,
    "joint": _joint,
}


@dataclass(frozen=True)
class LayerChange:
    """One BatchNormalization: how far its stored statistics were, and are now, from what enters it."""

    layer: str
    channels: int
    before: Deviation
    after: Deviation
    settled: bool


@dataclass(frozen=True, eq=False)
class Recalibrated:
    """A recalibrated model with all that was measured.

    ``passes``: over the data, to measure what was stored; the looks before and after come on top. ``accuracy``:
    before and after, None without usable labels (``why_not``); ``judged_on``: which samples, in words.
    """

    model: Any
    method: Method
    samples: int
    data: str
    batch: int
    passes: int
    layers: tuple[LayerChange, ...]
    accuracy: tuple[Score, Score] | None
    judged_on: str | None
    why_not: str | None
    notices: tuple[str, ...] = ()

    @property
    def proven(self) -> bool:
        """Whether the new model's statistics were found to be those of what enters its layers."""
        return all(row.settled for row in self.layers)

    @property
    def reason(self) -> str | None:
        """Why it is not proven."""
        if self.proven:
            return None
        worst = max(self.layers, key=lambda row: row.after.worst_shift_sigma)
        return (
            "joint: measured while layers normalised by batches; at inference what enters them is another (the mean at "
            f"{worst.layer} is off by up to {worst.after.worst_shift_sigma:.2g} sigma); sequential is exact"
        )

    def to_json(self) -> dict[str, Any]:
        """The keys of ``deploykit.recalibrate/1``; each layer's own are those of before."""
        before, after = self.accuracy or (None, None)
        return {
            "method": self.method,
            "samples": self.samples,
            "data": self.data,
            "batch": self.batch,
            "passes": self.passes,
            "layers": [
                {"layer": row.layer, "channels": row.channels, **asdict(row.before), "after": asdict(row.after)}
                for row in self.layers
            ],
            "accuracy": {
                "before": None if before is None else before.accuracy,
                "after": None if after is None else after.accuracy,
                "loss_before": None if before is None else before.loss,
                "loss_after": None if after is None else after.loss,
                "samples": 0 if after is None else after.samples,
                "data": self.judged_on,
                "reason": self.why_not,
            },
        }


def _copied(model: Any) -> Any:
    """The model as it comes back from a file: nested models, names and sharing as they are."""
    with tempfile.TemporaryDirectory(prefix="deploykit-") as room:
        path = write_keras(model, Path(room) / "model.keras")
        try:
            return keras.models.load_model(path, compile=False)  # safe mode: that of the scope around
        except Exception as error:  # whatever Keras makes of it
            raise UnsupportedModelError(f"Keras cannot read back model {model.name}: {cause(error)}") from error


def _twins(net: _Net, new: Any) -> dict[Key, Key]:
    """For each BatchNormalization of a copy, that of the original: by order, as custom layers may lose their names."""
    theirs = norms(trace(new))
    if len(theirs) != len(net.same):
        raise UnsupportedModelError(
            f"Keras reads back model {new.name} with other layers; see the custom ones' get_config"
        )
    return dict(zip(theirs, net.same.values(), strict=True))


def _told(progress: Callable[[str], None], what: str) -> Callable[[str], None]:
    return lambda done: progress(f"{what}, {done}")


def _quiet(message: str) -> None:
    """The progress callback of a caller who wants none."""


def recalibrate(
    model: Any,
    data: Data,
    *,
    method: Method = "sequential",
    test: Data | None = None,
    batch: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = _quiet,
) -> Recalibrated:
    """Measure the statistics of every BatchNormalization over ``data``; the model given is not touched.

    ``data``: samples as the model takes them. ``test``: labelled ones for the accuracy; without it ``data`` itself is
    used, where it has labels. ``batch``: samples at a time, which matters to ``joint`` alone, as does ``seed``; by
    default up to 256, as memory allows. Layers of the user's own need the scope in which the model was loaded.

    Raises UnsupportedModelError for models without BatchNormalization or whose statistics have no meaning, DataError
    for data that gives none or for NaN on the way, InputError for a ``test`` without usable labels, ProofError where
    the new model's statistics are not those of what enters its layers.
    """
    if graph_of(model) is not None:
        raise UnsupportedModelError(
            f"model {model.name} is a TensorFlow graph without Keras layers: there is nothing to recalibrate"
        )
    if not norms(trace(model)):
        raise UnsupportedModelError(f"model {model.name} has no BatchNormalization: there is nothing to recalibrate")
    net = _Net(model, batch)
    judged = data if test is None else test
    labels = _labels(net.found, judged)
    why_not = labels if isinstance(labels, str) else None
    if why_not is not None and test is not None:
        raise InputError(
            f"there is no accuracy on {test.source}: {why_not}; give labelled samples, or leave --test out"
        )
    known = None if isinstance(labels, str) else labels

    def look(at: _Net, when: str, *, strict: bool) -> Survey:
        found = at.survey(data, known if test is None else None, _told(progress, when), strict=strict)
        if test is None:
            return found
        return Survey(found.seen, at.score(test, known, _told(progress, f"accuracy {when}")))

    before = look(net, "before", strict=False)  # statistics that never settled may let a deep net overflow
    changes = {key: deviation(net.layer(key), seen) for key, seen in before.seen.items()}
    passes = METHODS[method](net, data, seed, progress)
    new = _copied(model)
    twins = _twins(net, new)
    for place, layer in norms(trace(new)).items():
        _give(layer, *_stored(net.layer(twins[place])))
    done = _Net(new, batch)
    after = look(done, "after", strict=True)
    layers = []
    for key in net.order:
        mine = [place for place in after.seen if twins[place] == key]  # one, unless Keras lost that a layer is shared
        layer, seen = done.layer(mine[0]), _sum(after.seen[place] for place in mine)
        rest, settled = deviation(layer, seen), _settled(layer, seen)
        if method == "sequential" and not settled:
            raise ProofError(
                f"measured once more, what enters {net.names[key]} is off by {rest.worst_shift_sigma:.2g} sigma "
                f"(variance x {rest.worst_variance_ratio:.3g}) from what was stored; "
                "are the samples the same each time they are read, and is there no noise in the model?"
            )
        layers.append(LayerChange(net.names[key], layer.moving_mean.shape[0], changes[key], rest, settled))
    accuracy = None if before.score is None or after.score is None else (before.score, after.score)
    return Recalibrated(
        model=new,
        method=method,
        samples=data.count,
        data=data.source,
        batch=net.size(data.count),
        passes=passes,
        layers=tuple(layers),
        accuracy=accuracy,
        judged_on=None if accuracy is None else judged.source,
        why_not=why_not,
        notices=tuple(_notices(net, accuracy)),
    )


def _notices(net: _Net, accuracy: tuple[Score, Score] | None) -> Iterator[str]:
    for node in net.nodes:
        if node.training and node.layer.trainable:
            yield (
                f"{node.name} is called with training=True: where a caller asks for no mode it normalises by its "
                "batch, whatever is stored"
            )
    if accuracy is not None and accuracy[1].accuracy < accuracy[0].accuracy:
        yield "the accuracy fell: look whether the data is what the model will meet"
