"""Made-up samples: plausible, varied, reproducible, with the edge cases in which wrong models hide.

*Floats* are z = scale · (w · white + (1 - w) · smooth) + offset: white noise and a smooth wave mixed anew for each
sample, with an offset for each sample and channel, so that features pooled over space or time vary between
samples (white noise alone averages to the same everywhere, and a comparison on it would see nothing). Without a known
range z is used as it is, with one it is squeezed through a logistic curve into it.

*Integers* are uniform in their range, or 0 and 1; where the samples have room for it, each number of the range is
there at least once: an embedding row that is never looked up is never compared.

*Edges* (`EDGES`) are the last samples: up to a quarter of all, at least three where that leaves as many ordinary ones.
Each is one law for all inputs, and an input that a law does not suit keeps an ordinary sample there. `LARGE` values are
only for inputs whose range the model does not state. All are finite in float16.

*Open sizes* are `FREE_SEQUENCE` or `FREE_SPATIAL`; `other_sizes` makes further sets at others.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploykit.data.fit import expected
from deploykit.data.samples import Array, Samples
from deploykit.errors import DataError
from deploykit.signature import Signature, TensorSpec

FREE_SEQUENCE = 16  # stands for an open size of a sample with one or two axes
FREE_SPATIAL = 32  # ... and with three or more: images, volumes

# What open sizes are besides, by the number of a sample's axes; several open ones take the numbers in turn. Of two sets
# one is smaller than the default, odd or unequal, and no power of two; the other is larger. The larger ones suit nets
# that halve their size often (multiples of 8 and 32) or need many pixels (75 for Inception).
OTHER_SEQUENCES = ((5,), (40,))
OTHER_IMAGES = ((24, 40), (96, 128))
OTHER_VOLUMES = ((24, 40), (64, 32))  # of four axes and more: cubes of images grow fast
_OTHER = {0: OTHER_SEQUENCES, 1: OTHER_SEQUENCES, 2: OTHER_SEQUENCES, 3: OTHER_IMAGES}

LARGE = (6.0, 16.0)  # standardised data rarely goes beyond the one and hardly ever beyond the other
TINY = 1e-6  # below every epsilon that a layer adds to a variance or norm, once it is squared
WIDEST = 8  # bytes of a number while samples are made


def batch_of(signature: Signature) -> int:
    """What a number of samples must be a multiple of; 1 where no batch size is fixed."""
    return math.lcm(*(spec.shape[0] or 1 for spec in signature.inputs if spec.shape))


# --- edges -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Ground:
    """What an edge is made of: the input's range, whether the model states it, an ordinary sample."""

    low: float
    high: float
    stated: bool
    whole: bool
    ordinary: Array

    @property
    def zero(self) -> float:
        """The value next to 0 that the range has."""
        return min(max(0.0, self.low), self.high)

    @property
    def rank(self) -> int:
        return self.ordinary.ndim

    @property
    def parity(self) -> Array:
        """0 and 1, a chequerboard over all axes."""
        return np.indices(self.ordinary.shape).sum(axis=0) % 2 if self.rank else np.zeros((), np.intp)

    def shaped(self) -> Array:
        """The ordinary sample with its peak at 1."""
        z = np.asarray(self.ordinary, np.float64)
        peak = float(z.flat[np.abs(z).argmax()])
        return z / peak if peak else z

    def zeros_but(self, at: tuple[int, ...]) -> Array:
        values = np.full(self.ordinary.shape, self.zero)
        values[at] = self.high
        return values

    def half(self, first: bool) -> Array:
        """One half of the ordinary sample along its first axis (time, height), zeros in the other."""
        values = np.array(self.ordinary, np.float64)
        middle = (len(values) + 1) // 2
        values[slice(middle, None) if first else slice(0, middle)] = self.zero
        return values


def _free(ground: Ground) -> bool:
    return not ground.stated and not ground.whole


def _always(ground: Ground) -> bool:
    return True


def _has_axes(ground: Ground) -> bool:
    return ground.rank > 0


def _long(ground: Ground) -> bool:
    return ground.rank > 0 and len(ground.ordinary) > 1


def _signed(ground: Ground) -> bool:
    return ground.low < 0


def _around_zero(ground: Ground) -> bool:
    return not ground.whole and ground.low <= 0 <= ground.high


def _wide(ground: Ground) -> bool:
    return not ground.whole or ground.high - ground.low > 1


def _corner(ground: Ground, end: int) -> tuple[int, ...]:
    """The first (0) or last (-1) place, all its channels."""
    return (end,) * max(1, ground.rank - 1)


@dataclass(frozen=True)
class Edge:
    values: Callable[[Ground], Array | float]
    suits: Callable[[Ground], bool] = _always


# In the order of their worth: few samples have the first ones only.
EDGES: Mapping[str, Edge] = {
    "zeros": Edge(lambda g: g.zero),  # dead units, 0/0
    "all high": Edge(lambda g: g.high),  # saturation (1 without a known range); the last row of an embedding
    "alternating": Edge(lambda g: np.where(g.parity == 0, g.low, g.high)),  # the largest differences (-1, 1)
    "all low": Edge(lambda g: g.low, _signed),  # no positive value at all
    "large": Edge(lambda g: LARGE[0] * np.tanh(4 * g.shaped()), _free),  # relu6, clipping, tails of exp and erf
    "very large": Edge(lambda g: LARGE[1] * np.tanh(4 * g.shaped()), _free),
    "hot spot": Edge(lambda g: g.zeros_but(tuple(n // 2 for n in g.ordinary.shape)), _has_axes),  # one element
    "tiny": Edge(lambda g: np.clip(TINY * g.shaped(), g.low, g.high), _around_zero),  # epsilons; flushed to zero
    "far from zero": Edge(lambda g: LARGE[1] + g.shaped(), _free),  # variance as E[x²] - E[x]²
    "ends in zeros": Edge(lambda g: g.half(first=True), _long),  # padding; what a mask hides
    "begins with zeros": Edge(lambda g: g.half(first=False), _long),
    "first only": Edge(lambda g: g.zeros_but(_corner(g, 0)), _has_axes),  # one step, one pixel: borders, causality
    "last only": Edge(lambda g: g.zeros_but(_corner(g, -1)), _has_axes),
    "constant": Edge(lambda g: g.low + 0.75 * (g.high - g.low), _wide),  # a variance of 0 that is not all zeros
    "spike": Edge(lambda g: np.where(np.abs(g.shaped()) == 1, LARGE[1], g.ordinary), _free),  # one outlier
}


# --- samples ---------------------------------------------------------------------------------------------------------


def synthesize(
    signature: Signature,
    *,
    count: int = 64,
    seed: int = 0,
    free: int | Sequence[int] | None = None,
    edges: int | None = None,
) -> Samples:
    """Plausible, varied, reproducible samples for a signature; the same on every machine.

    ``count`` is rounded up to whole batches where the batch size is fixed. ``free`` replaces open sizes: one
    number for all, or one for each in their order; by default ``FREE_SPATIAL`` for samples with three or more axes,
    else ``FREE_SEQUENCE``. The last samples are ``EDGES``: ``edges`` of them at most, by default a quarter of ``count``
    and at least three where that leaves half ordinary.

    Raises DataError for an input that takes strings.
    """
    sizes = {spec.name: _sizes(spec, free) for spec in signature.inputs}
    arrays, used = _made_up(signature, sizes, count, seed, edges)
    total = len(next(iter(arrays.values())))
    return Samples(arrays, f"synthetic, {total} samples, the last {used} edge cases, seed {seed}")


def other_sizes(signature: Signature, *, seed: int = 0, count: int = 4) -> tuple[Samples, ...]:
    """Two sets of ordinary samples with other open sizes than `synthesize` uses; none where no size is open.

    All inputs of a set share their sizes by kind (sequence, image, volume): which of them must agree only the model
    knows, and some models run at no other size. ``source`` says the sizes. Raises DataError as `synthesize` does.
    """
    if not any(None in spec.shape[1:] for spec in signature.inputs):
        return ()
    return tuple(_other_size(signature, seed, count, which) for which in (0, 1))


def _other_size(signature: Signature, seed: int, count: int, which: int) -> Samples:
    sizes = {}
    for spec in signature.inputs:
        open_sizes = spec.shape[1:].count(None)
        given = _OTHER.get(len(spec.shape) - 1, OTHER_VOLUMES)[which]
        sizes[spec.name] = _sizes(spec, [given[i % len(given)] for i in range(open_sizes)])
    arrays, _ = _made_up(signature, sizes, count, seed, 0)
    said = ", ".join(f"{name} {'x'.join(map(str, size)) or 'scalar'}" for name, size in sizes.items())
    total = len(next(iter(arrays.values())))
    return Samples(arrays, f"synthetic, {total} samples of other sizes ({said}), seed {seed}")


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
            raise DataError(f"input {spec.name} takes {expected(spec)}; give a size of at least 1 for each open one")
        sizes.append(chosen)
    return tuple(sizes)


def _made_up(
    signature: Signature, sizes: Mapping[str, tuple[int, ...]], count: int, seed: int, edges: int | None
) -> tuple[dict[str, Array], int]:
    """Arrays by input name, and how many of the last samples are edge cases."""
    if count < 1:
        raise DataError(f"{count} samples make no sense; give at least 1")
    if not signature.inputs:
        raise DataError("the model has no inputs to make samples for")
    count += -count % batch_of(signature)
    if any(count * math.prod(size) * WIDEST > sys.maxsize for size in sizes.values()):
        raise DataError(f"{count} samples are more than any memory holds; give fewer")
    values = {spec.name: _ordinary(spec, count, sizes[spec.name], seed) for spec in signature.inputs}
    grounds = {spec.name: _grounds(spec, values[spec.name]) for spec in signature.inputs}
    suiting = [edge for edge in EDGES.values() if any(edge.suits(ground(0)) for ground in grounds.values())]
    most = max(count // 4, min(3, count // 2)) if edges is None else min(edges, count)
    used = suiting[:most]
    for spec in signature.inputs:
        for row, edge in enumerate(used, start=count - len(used)):
            ground = grounds[spec.name](row)
            if edge.suits(ground):
                values[spec.name][row] = edge.values(ground)
        _cover(spec, values[spec.name][: count - len(used)], seed)
    dtypes = {spec.name: np.float32 if spec.dtype == "bfloat16" else np.dtype(spec.dtype) for spec in signature.inputs}
    return {name: array.astype(dtypes[name]) for name, array in values.items()}, len(used)


def _kind(spec: TensorSpec) -> str:
    kind = "f" if spec.dtype == "bfloat16" else "" if spec.dtype == "string" else np.dtype(spec.dtype).kind
    if kind not in ("f", "i", "u", "b"):
        raise DataError(f"cannot make up samples for input {spec.name} ({spec.dtype}); give some with --data")
    return kind


def _stated(spec: TensorSpec) -> bool:
    return spec.low is not None or spec.high is not None


def _ordinary(spec: TensorSpec, count: int, sizes: tuple[int, ...], seed: int) -> Array:
    kind = _kind(spec)
    rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])  # its own stream, whatever the other inputs
    if kind != "f":
        first, last = _whole_range(spec)
        return rng.integers(first, last, (count, *sizes), endpoint=True)
    values = _waves(rng, count, sizes)
    if _stated(spec):
        low, high = _range(spec)
        values = low + (high - low) / (1.0 + np.exp(-1.7 * values))
    return values


def _grounds(spec: TensorSpec, values: Array) -> Callable[[int], Ground]:
    whole = _kind(spec) != "f"
    low, high = _whole_range(spec) if whole else _range(spec)
    return lambda row: Ground(low, high, _stated(spec), whole, values[row])


def _cover(spec: TensorSpec, values: Array, seed: int) -> None:
    """Put each number of an integer input's range somewhere into ``values``, in place, if there is room for all."""
    if _kind(spec) == "f":
        return
    first, last = _whole_range(spec)
    if last - first < values.size:
        rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode()), 1])
        places = rng.choice(values.size, last - first + 1, replace=False)
        values.reshape(-1)[places] = np.arange(first, last + 1)


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
