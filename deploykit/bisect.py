"""Bisect: the first layer at which a candidate stops answering like the original.

Every tensor between two layers is compared as `deploykit.verify` compares an output: r is the original in float64, o
the original as it runs, c the candidate, and a layer's error is too large when it breaks the law of the whole output,

    ratio = ‖c−r‖ / (4·‖o−r‖ + 4·eps·‖r‖) > 1

A layer whose ratio is too large while those of all layers in front of it are not is a *jump*: there the candidate
computes something else. What lies behind a jump and is too large as well came *after* it.

What a tensor of the candidate should be
----------------------------------------
Layers are matched by name (the calls of a shared layer in their order). Where affines were folded away, a tensor may
legitimately be another than in the original. It is never guessed from the candidate what it should be:

    the original's own         most tensors; a scale or shift that passes by in front or behind does not touch them
    the original's, behind     Conv -> BN folded backward: the fused Conv gives what BN gave, and ``reference`` says so
    the fused model's own      *moved*: the tensor is in new units (a scale on its way forward through a ReLU). It is
                               compared with that tensor of a trusted fused model in float64: the one given, or the
                               plan that removes exactly the sources that the candidate lacks

so that a wrong layer inside a moved stretch is found, too. An affine that the ONNX exporter alone folded into the
layer in front of it (tf2onnx does that to Conv -> BN) is matched in the second way.

ONNX files
----------
Nodes of an exported file are named ``layer path/operation`` (`deploykit.export.canonical`). A layer's tensors are those
that leave it: made by one of its nodes, and read by another layer's or an output of the graph. They become
outputs of a copy of the graph, some at a time, so that memory does not grow with the depth; external data stays where
it is. A tensor in another layout (channels in front, time in front, axes of size 1) is brought into the layer's own;
where sizes leave several ways the best one counts. A layer without nodes of its own gets a convolution
that goes by the name of what it reads (tf2onnx makes some anew); where there is none, the layer was folded or optimised
away, and is *skipped*.

Exporters move constants as well (the half of an average goes into the next kernel). So a tensor of an ONNX file is
wrong only if what is made of it is: where no way leads on from it, through layers whose ratio is above `TOUCHED`, to a
wrong output, it counts as ``moved``. Right layers have ratios near 0.1, in ill-conditioned nets up to 0.9.

Limits: ONNX Runtime fuses fewer nodes of a copy whose tensors somebody wants to see; a candidate that fails although
no layer jumps suffers from such an optimisation, or differs on so few samples that a norm over all of them does not
see it: bisect again on those samples alone. Errors are measured on the CPU. Where nobody says
how a candidate was fused, it is held to the plan of this version.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import numpy.typing as npt

from deploykit import runtimes
from deploykit.errors import InputError, UnsupportedModelError
from deploykit.fuse import Fused
from deploykit.fuse.apply import apply
from deploykit.fuse.plan import plan as make_plan
from deploykit.fuse.proof import slice_of
from deploykit.fuse.sources import is_source
from deploykit.graph import Node, Trace, flat_call, functional_form, numpy, replay, runnable, showing, trace
from deploykit.layout import TO_NCHW, transposed
from deploykit.load import load
from deploykit.opaque import graph_of
from deploykit.runtimes.files import file_of, read_onnx, reason, unreadable
from deploykit.runtimes.trained import is_nchw
from deploykit.verify import FLOAT32, Fidelity, Policy, SessionSettings, decibels, norm, norms, number, ratios

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
Status = Literal["same", "jump", "after", "moved", "skipped"]
Key = tuple[str, int, int]  # layer, call, output
Evaluate = Callable[[Arrays], Sequence[Any]]  # an array for each tensor, or in words why there is none

ONNX = "onnxruntime-cpu"
BATCH = 8  # samples at a time
CHUNK_ELEMENTS = 8_000_000  # of the tensors that are held at a time: 64 MB in float64, for each model that runs
REMADE = frozenset(("Conv", "ConvTranspose"))  # nodes that tf2onnx makes anew, so that they lose their layer
TOUCHED = 0.5  # a ratio that a fault in front of a layer explains
FOLDER = "session.model_external_initializers_file_folder_path"  # where a model given as bytes finds its data


@dataclass(frozen=True)
class LayerError:
    """One call of one layer. ``ratio``: the error over what is allowed; None where nothing was measured, and where a
    number stands on one side alone (``note`` says so). ``reference``: the layer of the original whose output this is.
    """

    layer: str
    kind: str
    depth: int  # calls on the longest way from an input
    status: Status
    call: int = 0
    output: int = 0
    reference: str | None = None
    onnx_tensor: str | None = None
    snr_db: float | None = None
    own_snr_db: float | None = None
    ratio: float | None = None
    note: str | None = None

    @property
    def label(self) -> str:
        call = f" (call {self.call + 1})" if self.call else ""
        return f"{self.layer}{call}{f':{self.output}' if self.output else ''}"

    def to_json(self) -> dict[str, Any]:
        record = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"layer": record.pop("layer"), "class": record.pop("kind"), **record}


@dataclass(frozen=True)
class LayerReport:
    """All layers, none deeper than the next; ``candidate``: what was compared."""

    candidate: str
    samples: int
    rows: tuple[LayerError, ...]

    @property
    def first(self) -> LayerError | None:
        """The first layer at which the error jumps."""
        return next((row for row in self.rows if row.status == "jump"), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "candidate": self.candidate,
            "samples": self.samples,
            "first": None if self.first is None else self.first.label,
            "layers": [row.to_json() for row in self.rows],
        }

    def text(self, around: int = 4) -> str:
        """The verdict and the rows around it (all, where nothing jumps and there are few)."""
        measured = [row for row in self.rows if row.status != "skipped"]
        skipped = len(self.rows) - len(measured)
        first = self.first
        if first is None:
            head = f"no layer's error jumps ({len(measured)} compared, {skipped} skipped)"
            near = measured[-(2 * around) :]
        else:
            head = f"the error jumps at {first.label} ({first.kind}): {_told(first)}"
            place = measured.index(first)
            near = measured[max(0, place - around) : place + around + 1]
        columns = [("layer", "class", "SNR dB", "original dB", "error / allowed", "status")]
        for row in near:
            numbers = (_shown(row.snr_db, ".1f"), _shown(row.own_snr_db, ".1f"), _shown(row.ratio, ".3g"))
            whose = f"{row.status} (= {row.reference})" if row.reference else row.status
            columns.append((row.label, row.kind, *numbers, whose))
        widths = [max(len(row[i]) for row in columns) for i in range(len(columns[0]))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in columns]
        return "\n".join([head, *(line.rstrip() for line in lines)])


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _told(row: LayerError) -> str:
    if row.ratio is None:
        return row.note or "it cannot be compared"
    return f"{row.ratio:.3g} times what is allowed, SNR {_shown(row.snr_db, '.1f')} dB where the original has " + (
        f"{_shown(row.own_snr_db, '.1f')} dB"
    )


def layer_errors(
    original: Any,
    candidate: Any,
    samples: Arrays,
    *,
    fused: Fused | None = None,
    policy: Policy | Fidelity = FLOAT32,
) -> LayerReport:
    """Compare a candidate (a Keras model, or the path of a Keras or ONNX file) with the original, layer by layer.

    ``samples``: arrays by input name. ``fused``: what the candidate was made of, where that is known; it must be a
    right one, the candidate is held to it where tensors moved. ``policy``: that of the candidate's precision.

    Raises UnsupportedModelError for a model without layers, InputError for an ONNX file that names none of them.
    """
    if graph_of(original) is not None:
        raise UnsupportedModelError(f"model {original.name} is one TensorFlow graph: it has no layers to bisect")
    found = trace(original)
    answers = _answers(candidate, found)
    twin = _planned(found, answers) if fused is None else fused.model
    sure = answers.own or fused is not None
    return _Bisection(found, answers, None if twin is None else trace(twin), policy, sure).report(samples)


def twin_of(original: Any, candidate: Any) -> Any | None:
    """A right Keras model that has the candidate's layers: what `layer_errors` holds the candidate to.

    None where it lacks none of the original's. Raises what `layer_errors` raises.
    """
    if graph_of(original) is not None:
        raise UnsupportedModelError(f"model {original.name} is one TensorFlow graph: it has no layers to leave out")
    found = trace(original)
    return _planned(found, _answers(candidate, found))


def _answers(candidate: Any, found: Trace) -> _Answers:
    return _onnx(candidate, found) if _is_onnx(candidate) else _keras(candidate)


def _is_onnx(candidate: Any) -> bool:
    return isinstance(candidate, str | os.PathLike) and runtimes.runtime_for(candidate) != "keras"


# ------------------------------------------------------------------------------------------------- who answers


def keyed(found: Trace) -> dict[Key, int]:
    """The tensors between layers, by the layer's name, the number of its call and of its output."""
    calls: dict[str, int] = {}
    keys: dict[Key, int] = {}
    for node in found.nodes:
        call = calls[node.name] = calls.get(node.name, -1) + 1
        keys.update(((node.name, call, place), tensor) for place, tensor in enumerate(node.outputs))
    return keys


class _Layers:
    """A Keras model whose tensors can be asked for by key. A copy: the model itself is not touched."""

    def __init__(self, found: Trace, dtype: str | None = None) -> None:
        numeric = {key: tensor for key, tensor in keyed(found).items() if _is_numeric(found.tensors[tensor].dtype)}
        self.place = {key: place for place, key in enumerate(numeric)}
        self.inputs = [spec.name for spec in found.signature.inputs]
        self.model = replay(showing(found, list(numeric.values())), dtype=dtype)

    def part(self, keys: Sequence[Key]) -> Evaluate:
        """A function from arrays by input name to the tensors of ``keys``."""
        outputs = [self.model.outputs[self.place[key]] for key in keys]
        model = functional_form(runnable(keras.Model(self.model.inputs, outputs)))
        dtypes, call = [symbol.dtype for symbol in model.inputs], flat_call(model)

        def evaluate(arrays: Arrays) -> list[Array]:
            given = [
                keras.ops.convert_to_tensor(arrays[name], dtype=dtype)
                for name, dtype in zip(self.inputs, dtypes, strict=True)
            ]
            return [numpy(output) for output in call(*given)]

        return evaluate


def _is_numeric(dtype: str) -> bool:
    return dtype != "string" and not dtype.startswith("complex")


@dataclass(frozen=True, eq=False)
class _Answers:
    """The candidate: the names of the tensors that may be a layer's, and how to evaluate some of them.

    ``own``: it is asked by key, and gives each layer's tensor in the layer's own layout. ``lost``: tensors of other
    names that may be those of a layer that has none. ``kinds``: the class of each layer, where the candidate says it.
    """

    name: str
    tensors: Mapping[str, tuple[Any, ...]]  # by layer
    part: Callable[[Sequence[Any]], Evaluate]
    own: bool
    lost: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)

    def of(self, key: Key) -> tuple[Any, ...]:
        tensors = self.tensors.get(key[0]) or self.lost.get(key[0], ())
        return tuple(tensor for tensor in tensors if tensor == key) if self.own else tensors


def _keras(candidate: Any) -> _Answers:
    name = str(candidate) if isinstance(candidate, str | os.PathLike) else str(candidate.name)
    model = load(candidate).model if isinstance(candidate, str | os.PathLike) else candidate
    found = trace(model)
    layers = _Layers(found)
    tensors: dict[str, tuple[Any, ...]] = {}
    for key in layers.place:
        tensors[key[0]] = (*tensors.get(key[0], ()), key)
    kinds = {node.name: type(node.layer).__name__ for node in found.nodes}
    return _Answers(name, tensors, layers.part, True, kinds=kinds)


def _layer_of(name: str, found: Trace, names: frozenset[str]) -> str | None:
    """The layer that a node belongs to: the first part of its path that is one, models around it left out."""
    parts = name.split("/")[:-1]
    for end in range(1, len(parts) + 1):
        path = "/".join(parts[:end])
        if path in found.renamed:
            return found.renamed[path]
        if parts[end - 1] in names:
            return parts[end - 1]
    return None


def _reads(node: Any) -> Iterator[str]:
    """What a node reads, its loop bodies and branches included."""
    yield from node.input
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            for step in inner.node:
                yield from _reads(step)
            yield from (value.name for value in inner.output)


def leaving(graph: Any, found: Trace) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """The tensors of an ONNX graph by the layer that they leave, in the order of the graph.

    And, for layers without nodes, those that may be theirs: outputs, which go by the model's names, and convolutions
    that go by another layer's name.
    """
    names = frozenset(node.name for node in found.nodes)
    layers = [_layer_of(node.name, found, names) for node in graph.node]
    readers: dict[str, set[str | None]] = {}
    for node, layer in zip(graph.node, layers, strict=True):
        for read in _reads(node):
            readers.setdefault(read, set()).add(layer)
    outputs = {value.name for value in graph.output}
    nameless = {node.name for node in found.nodes if node.name not in layers and "Conv" in type(node.layer).__name__}
    generous = {
        node.name
        for node in found.nodes
        if any(reader.name in nameless for tensor in node.outputs for reader in found.consumers(tensor))
    }
    tensors: dict[str, tuple[str, ...]] = {}
    lost: dict[str, tuple[str, ...]] = {}
    for node, layer in zip(graph.node, layers, strict=True):
        if layer is None:
            continue
        left = [made for made in node.output if made and (made in outputs or readers.get(made, set()) - {layer})]
        if layer in generous:
            left = [made for made in node.output if made]
        if left:
            tensors[layer] = (*tensors.get(layer, ()), *left)
        if layer in generous and node.op_type in REMADE:
            lost[layer] = (*lost.get(layer, ()), *left)
    for node in found.nodes:  # in running order, so that what a nameless layer may have lost is known behind it
        if node.name in nameless:
            makers = [maker for tensor in node.inputs if (maker := found.producer(tensor)) is not None]
            lost[node.name] = tuple(dict.fromkeys(name for maker in makers for name in lost.get(maker.name, ())))
    theirs = {name: lost[name] for name in nameless if lost.get(name)}
    for spec, tensor in zip(found.signature.outputs, found.outputs, strict=True):
        maker = found.producer(tensor)
        if maker is not None and maker.name not in tensors and spec.name in outputs:
            theirs[maker.name] = (spec.name,)
    return tensors, theirs


def _upto(proto: Any, names: Sequence[str]) -> bytes:
    """A copy of a model whose outputs are ``names``, without the nodes that these do not need."""
    import onnx  # Keras candidates need none

    makers = {made: place for place, node in enumerate(proto.graph.node) for made in node.output if made}
    needed: set[int] = set()
    waiting = [makers[name] for name in names]
    while waiting:
        place = waiting.pop()
        if place not in needed:
            needed.add(place)
            waiting += [makers[read] for read in _reads(proto.graph.node[place]) if read in makers]
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.node[:], copy.graph.output[:], copy.graph.value_info[:]
    copy.graph.node.extend(node for place, node in enumerate(proto.graph.node) if place in needed)
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    data: bytes = copy.SerializeToString()
    return data


def _onnx(path: Any, found: Trace) -> _Answers:
    from deploykit.runtimes.onnxruntime_cpu import PROVIDER, opened

    file = file_of(ONNX, path)
    proto = read_onnx(ONNX, file, weights=False)
    tensors, lost = leaving(proto.graph, found)
    if not tensors:
        raise InputError(
            f"no node of {file} is named after a layer of the model; "
            "only files that deploykit exported can be bisected: export the model again"
        )
    folder, turned = os.fspath(Path(file).resolve().parent), is_nchw(file)

    def part(names: Sequence[str]) -> Evaluate:
        try:
            session = opened(_upto(proto, names), PROVIDER, {}, SessionSettings(), {FOLDER: folder})
        except Exception as error:  # ONNX Runtime's exception classes are not public
            raise unreadable(ONNX, file, error) from error
        inputs = [value.name for value in session.get_inputs()]

        def evaluate(arrays: Arrays) -> list[Array | str]:
            given = {name: arrays[name] for name in inputs}
            try:
                outputs = session.run(list(names), transposed(given, TO_NCHW) if turned else given)
            except Exception as error:
                if len(names) == 1:
                    return [reason(error)]
                halves = names[: len(names) // 2], names[len(names) // 2 :]
                return [value for half in halves for value in part(half)(arrays)]
            return [np.asarray(value) for value in outputs]

        return evaluate

    return _Answers(str(path), tensors, part, False, lost)


def _planned(found: Trace, answers: _Answers) -> Any | None:
    """A trusted model with the candidate's layers, or None where it lacks none of the original's.

    An ONNX file does not tell a source that was reduced from one that stayed: where what it lacks may be due to the
    plan of `deploykit.fuse`, it is taken for that.
    """
    kinds = {node.name: type(node.layer).__name__ for node in found.nodes if is_source(node)}
    absent = {name for name in kinds if name not in answers.tensors}
    other = {name for name, kind in kinds.items() if answers.kinds.get(name, kind) != kind}  # reduced to a Rescaling
    if not absent | other:
        return None
    plan = make_plan(found)
    if (plan.changed != absent | other) if answers.own else not plan.dropped <= absent:
        plan = make_plan(found, only=absent | other)
    return apply(found, plan).model


# --------------------------------------------------------------------------------------------------- measuring


@dataclass
class _Sums:
    """L2 norms over all samples, and for each index of the last axis; ``largest``: of the reference, in each.

    ``broken``: NaN or infinity where the reference has none, or the reverse. ``values``: in each index.
    """

    error: Array = field(default_factory=lambda: np.zeros(1))
    own: Array = field(default_factory=lambda: np.zeros(1))
    size: Array = field(default_factory=lambda: np.zeros(1))
    largest: Array = field(default_factory=lambda: np.zeros(1))
    values: int = 0
    broken: bool = False
    times: int = 0

    def add(self, r: Array, o: Array, c: Array) -> None:
        r, o, c = (np.asarray(x, dtype=np.float64) for x in (r, o, c))
        with np.errstate(all="ignore"):
            alike = np.isfinite(r) == np.isfinite(o)  # elsewhere the original itself overflows: no judgement
            self.broken |= bool((alike & (np.isfinite(r) != np.isfinite(c))).any())
            live = np.isfinite(r) & np.isfinite(o) & np.isfinite(c)
            for name, value in (("error", c - r), ("own", o - r), ("size", r)):
                columns = np.where(live, value, 0.0).reshape(-1, r.shape[-1] if r.ndim > 1 else 1)
                setattr(self, name, np.hypot(getattr(self, name), norms(columns.T)))
            self.largest = np.maximum(self.largest, np.abs(columns).max(axis=0, initial=0.0))
        self.values += len(columns)
        self.times += 1

    def ratio(self, law: Policy | Fidelity) -> float:
        """The error over what is allowed; infinite where it is broken."""
        if self.broken:
            return math.inf
        error, own, size = map(norm, (self.error, self.own, self.size))
        whole = float(ratios(np.array(error), np.array(law.allowed_whole(own, size))))
        if isinstance(law, Fidelity) or len(self.error) < 2:
            return whole
        rms = [part / math.sqrt(max(1, self.values)) for part in (self.error, self.own, self.size)]
        allowed = law.allowed_channel(rms[1], rms[2], ratios(self.size, self.largest) ** 2)
        return max(whole, float(ratios(rms[0], allowed).max()))


def layouts(have: Sequence[int], want: Sequence[int]) -> list[tuple[int, ...] | None]:
    """Ways to make an array of shape ``have`` one of shape ``want``: axes to transpose to (without those of size 1),
    then a reshape; None for a reshape alone. The likely ones first.
    """
    if math.prod(have) != math.prod(want):
        return []
    mine, theirs = ([size for size in shape if size != 1] for shape in (have, want))
    rank = len(mine)
    if rank != len(theirs) or sorted(mine) != sorted(theirs):
        return [None]
    axes = tuple(range(rank))
    likely = [axes]
    if rank > 2:
        likely += [(0, *axes[2:], 1), (0, rank - 1, *axes[1:-1])]
    fitting = [order for order in likely if [mine[axis] for axis in order] == theirs]
    if not fitting and rank <= 5:
        every = itertools.permutations(axes)
        fitting = [order for order in every if [mine[axis] for axis in order] == theirs][:6]
    return [*dict.fromkeys(fitting)]


def _arranged(array: Array, layout: tuple[int, ...] | None, want: Sequence[int]) -> Array:
    if layout is None:
        return array.reshape(want)
    return array.reshape([size for size in array.shape if size != 1]).transpose(layout).reshape(want)


class _Bisection:
    """One comparison. A *form* of a key is what the candidate's tensor may be: ("original", key) or ("twin", key).

    ``sure``: it is known which affines were folded away.
    """

    def __init__(self, found: Trace, answers: _Answers, twin: Trace | None, law: Policy | Fidelity, sure: bool) -> None:
        self.found, self.answers, self.law, self.sure = found, answers, law, sure
        self.exact, self.plain = _Layers(found, "float64"), _Layers(found)
        self.twin_exact = None if twin is None else _Layers(twin, "float64")
        self.twin_plain = None if twin is None else _Layers(twin)
        self.tensors = keyed(found)
        self.keys = [key for key in self.exact.place if answers.of(key)]
        self.behind = {key: self._behind(key) for key in self.keys}
        self.sums: dict[tuple[Any, ...], _Sums] = {}  # (key, form, tensor, layout), and (key, "apart", form)
        self.shapes: dict[Key, str] = {}  # why a tensor cannot be compared
        self.chosen: dict[str, Any] = {}  # layer -> the tensor that was found to be its own

    def _behind(self, key: Key) -> list[Key]:
        """The sources right behind a tensor, read by nothing else, that the candidate does not have."""
        chain: list[Key] = []
        tensor = self.tensors[key]
        while True:
            readers = self.found.consumers(tensor)
            if self.found.is_output(tensor) or len(readers) != 1 or not is_source(readers[0]):
                return chain
            if readers[0].name in self.answers.tensors:
                return chain
            tensor = readers[0].outputs[0]
            chain.append((readers[0].name, 0, 0))

    # ------------------------------------------------------------------------------------------------ running

    def report(self, samples: Arrays) -> LayerReport:
        count = len(next(iter(samples.values())))
        for keys in self._chunks(samples):
            self._measure(keys, samples, count)
        return LayerReport(self.answers.name, count, tuple(self._rows()))

    def _batch(self) -> int:
        fixed = self.found.signature.inputs[0].shape[0]
        return fixed or min(BATCH, slice_of(self.found))

    def _chunks(self, samples: Arrays) -> Iterator[list[Key]]:
        free = max(max(array.shape[1:], default=1) for array in samples.values())
        chunk: list[Key] = []
        held = 0
        for key in self.keys:
            shape = self.found.tensors[self.tensors[key]].shape[1:]
            size = self._batch() * math.prod(free if axis is None else axis for axis in shape)
            if chunk and held + size > CHUNK_ELEMENTS:
                yield chunk
                chunk, held = [], 0
            chunk.append(key)
            held += size
        if chunk:
            yield chunk

    def _measure(self, keys: Sequence[Key], samples: Arrays, count: int) -> None:
        originals = list(dict.fromkeys([*keys, *(key for one in keys for key in self.behind[one])]))
        twins = [key for key in keys if self.twin_exact and key in self.twin_exact.place]
        tensors = list(dict.fromkeys(tensor for key in keys for tensor in self.answers.of(key)))
        exact, plain = self.exact.part(originals), self.plain.part(originals)
        twin_exact = self.twin_exact.part(twins) if self.twin_exact and twins else None
        twin_plain = self.twin_plain.part(twins) if self.twin_plain and twins else None
        candidate = self.answers.part(tensors)
        batch = self._batch()
        for start in range(0, count, batch):
            arrays = {name: array[start : start + batch] for name, array in samples.items()}
            pairs = zip(exact(arrays), plain(arrays), strict=True)
            forms = dict(zip((("original", key) for key in originals), pairs, strict=True))
            if twin_exact and twin_plain:
                pairs = zip(twin_exact(arrays), twin_plain(arrays), strict=True)
                forms |= dict(zip((("twin", key) for key in twins), pairs, strict=True))
            given = dict(zip(tensors, candidate(arrays), strict=True))
            for key in keys:
                self._take_in(key, forms, given)

    def _take_in(self, key: Key, forms: Mapping[Any, tuple[Array, Array]], given: Mapping[Any, Array]) -> None:
        """One batch of one layer: the candidate's tensors against every form, and the twin's against the original's."""
        mine = [("original", key), *(("original", other) for other in self.behind[key]), ("twin", key)]
        for form in mine:
            if form not in forms:
                continue
            r, o = forms[form]
            if ("twin", key) in forms and form[0] == "original" and forms["twin", key][0].shape == r.shape:
                self.sums.setdefault((key, "apart", form), _Sums()).add(r, o, forms["twin", key][0])
            for tensor in self.answers.of(key):
                value = given[tensor]
                if isinstance(value, str):
                    self.shapes[key] = f"it does not run: {value}"
                    continue
                own = self.answers.own  # then it is in the layer's own layout, or wrong
                ways = layouts(value.shape, r.shape) if not own else [None] if value.shape == r.shape else []
                for way in ways:
                    placed = _arranged(value, way, r.shape)
                    self.sums.setdefault((key, form, tensor, way), _Sums()).add(r, o, placed)
                if not ways:
                    self.shapes[key] = f"shape {list(value.shape)} instead of {list(r.shape)}"

    # ------------------------------------------------------------------------------------------------ judging

    def _forms(self, key: Key) -> list[tuple[str, Key]]:
        """What the candidate's tensor may be; the first is what it should be."""
        absent_alone = [("original", other) for other in self.behind[key]]
        if self.twin_exact is None or key not in self.twin_exact.place:
            return [("original", key), *absent_alone]
        kept = [form for form in absent_alone if form[1] in self.twin_exact.place]  # folded by the exporter alone
        for form in (("original", key), *absent_alone):
            apart = self.sums.get((key, "apart", form))
            if apart is not None and apart.ratio(self.law) <= 1:
                return [form, *kept]
        return [("twin", key), *kept, *([] if self.sure else [("original", key)])]

    def _best(self, key: Key) -> tuple[tuple[str, Key], Any, _Sums] | None:
        """Of what the candidate's tensor may be, what it is: form, tensor and sums."""
        forms, allowed = self._forms(key), self._open(key)
        options = [
            (place[1], place[2], sums)
            for place, sums in self.sums.items()
            if place[0] == key and place[1] in forms and len(place) == 4 and place[2] in allowed
        ]
        most = max((sums.times for _, _, sums in options), default=0)
        options = [option for option in options if option[2].times == most]  # a layout must fit in every batch
        return min(options, key=lambda option: option[2].ratio(self.law), default=None)

    def _open(self, key: Key) -> Sequence[Any]:
        """The tensors that may be a layer's own; of those it may have lost, the ones behind its producers' own."""
        tensors = self.answers.of(key)
        if key[0] in self.answers.tensors:
            return tensors
        taken = [tensors.index(tensor) for tensor in self.chosen.values() if tensor in tensors]
        return tensors[max(taken, default=-1) + 1 :]

    def _depths(self) -> dict[int, int]:
        depths: dict[int, int] = {}
        for node in self.found.nodes:
            below = (depths.get(maker.index, 0) for maker in self._makers(node))
            depths[node.index] = 1 + max(below, default=0)
        return depths

    def _makers(self, node: Node) -> Iterator[Node]:
        for tensor in node.inputs:
            maker = self.found.producer(tensor)
            if maker is not None:
                yield maker

    def _rows(self) -> Iterator[LayerError]:
        depths = self._depths()
        names = {tensor: key for key, tensor in self.tensors.items()}
        order = sorted(self.found.nodes, key=lambda node: (depths[node.index], node.index))
        rows = {node.index: [self._row(names[tensor], node, depths) for tensor in node.outputs] for node in order}
        wrong = {index for index, own in rows.items() if any(row.status == "jump" for row in own)}
        if not self.answers.own:
            wrong &= self._lasting(rows)
        tainted: set[int] = set()  # calls at or behind a jump
        for node in order:
            behind = any(maker.index in tainted for maker in self._makers(node))
            if behind or node.index in wrong:
                tainted.add(node.index)
            for row in rows[node.index]:
                if row.status != "jump":
                    yield row
                elif node.index in wrong:
                    yield replace(row, status="after") if behind else row
                elif row.layer in self.answers.tensors:
                    note = "in other units: what is made of it is right"
                    yield replace(row, status="moved", snr_db=None, ratio=None, note=note)
                else:
                    yield self._skipped(row)

    def _lasting(self, rows: Mapping[int, Sequence[LayerError]]) -> set[int]:
        """The calls from which an error above `TOUCHED` goes all the way to an output that is wrong."""
        lasting: set[int] = set()
        for node in reversed(self.found.nodes):
            ratios = [
                math.inf if row.ratio is None else row.ratio for row in rows[node.index] if row.status != "skipped"
            ]
            readers = (reader.index for tensor in node.outputs for reader in self.found.consumers(tensor))
            ends = any(self.found.is_output(tensor) for tensor in node.outputs)
            worst = max(ratios, default=math.inf)
            if (ends and worst > 1) or (worst > TOUCHED and any(index in lasting for index in readers)):
                lasting.add(node.index)
        return lasting

    def _skipped(self, row: LayerError) -> LayerError:
        note = "nothing of it is left in the candidate"
        return LayerError(row.layer, row.kind, row.depth, "skipped", row.call, row.output, note=note)

    def _row(self, key: Key, node: Node, depths: Mapping[int, int]) -> LayerError:
        """A layer as it stands by itself: every error that is too large is a jump."""
        row = self._skipped(LayerError(key[0], type(node.layer).__name__, depths[node.index], "jump", key[1], key[2]))
        if key not in self.behind:
            return row
        best = self._best(key)
        if best is None:
            lacks = key[0] not in self.answers.tensors
            return row if lacks else replace(row, status="jump", note=self.shapes.get(key))
        form, tensor, sums = best
        self.chosen[key[0]] = tensor
        ratio = sums.ratio(self.law)
        fine: Status = "moved" if form[0] == "twin" else "same"
        return replace(
            row,
            status=fine if ratio <= 1 else "jump",
            reference=form[1][0] if form[1] != key else None,
            onnx_tensor=None if self.answers.own else tensor,
            snr_db=None if sums.broken else decibels(norm(sums.size), norm(sums.error)),
            own_snr_db=decibels(norm(sums.size), norm(sums.own)),
            ratio=number(ratio),
            note="NaN or infinity on one side alone" if sums.broken else None,
        )
