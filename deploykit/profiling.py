"""Where the time of an ONNX file goes on ONNX Runtime's CPU provider, and how far from the machine's limit that is.

A process of its own runs the file three times, each session closed before the next opens, so that no other thread
pool spins: without the profiler, with it, without it again. What the profiler costs is the ratio of the medians.

*Nothing is lost.* ONNX Runtime records how long a run took and how long each node took within it. A node with a body
(Loop, If) gets what its body's nodes do not. What a run spends between nodes is a row of its own, "runtime". Every row
is the median over the runs, and the rows add up to ``total_s``: a run without interruptions. On a busy machine every
run has some, each time in other nodes; they are told as one figure, ``interrupted_s``, so that

    rows + interrupted = the median run under the profiler

*From kernels to layers.* ONNX Runtime runs an optimised graph: nodes are fused, renamed (``block/Relu:0_nchwc``) and
joined by reorders to and from its blocked layout, and inner tensors lose their names. That graph is written out, and
followed from its inputs on. Every kernel makes a tensor that the file knows, by its own name or by the node's; the
kernel *covers* the nodes of the file from that tensor back to the tensors that the kernel reads. Its operations are
the sum over those, and its layer is that of the heaviest one: a convolution with the ReLU fused into it counts for the
convolution. A reorder covers nothing and counts for the layer whose tensor it reorders, or, for an input of the model,
for the layer that reads it. What cannot be followed belongs to no layer and counts under "runtime" among the layers,
under its own kind among the kinds.

*The limit* (roofline: Williams, Waterman, Patterson 2009). F operations on B bytes take at least

    t = max(F / peak, B / bandwidth(B)),    i.e.  attainable = min(peak, F/B · bandwidth)

``peak`` is the fastest matrix product and ``bandwidth(B)`` the fastest copy that touches B or more bytes, both of
ONNX Runtime itself on the same number of threads: what fits into a cache is held against the cache's speed. The
sum of the limits over the time measured is how far the model has come; the time *lost* is the difference.

Limits. The profiler counts whole microseconds: what that cuts off, and most of what the profiler itself costs, shows
under "runtime"; a net of a few microseconds is nearly all that. A node that reads what the one before left in a cache
may beat its limit, and so may arithmetic in less than float32, because peak is float32's. Layers are those that the
nodes' names tell: ``layer/Operation``.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from deploykit import environment
from deploykit.errors import DataError, InputError, LoadError
from deploykit.flops import Call, Shape, bytes_moved, flops, graph_flops, kind
from deploykit.runtimes import RUNTIMES, Array, fitted
from deploykit.runtimes.files import file_of, onnx_signature, read_onnx
from deploykit.runtimes.trained import inputs_for
from deploykit.verify import archive

__all__ = ["RUNTIME", "LayerTime", "NodeTime", "Profile", "Roofline", "profile", "roofline"]

NAME = "onnxruntime-cpu"
RUNTIME = "runtime"  # the row of what belongs to no layer, or to no node

SECONDS = 2.0
WARM_RUNS, LEAST_RUNS = 3, 6
MOST_EVENTS = 40_000  # one is about 1 kB of JSON
TIMEOUT_S = 600.0
BLAMED = 3  # layers that the verdict names
OVERHEAD_LIMIT = 0.10
HUGE = 1 << 30  # bytes; larger files keep their weights outside when they are copied


@dataclass(frozen=True)
class Roofline:
    """What this machine can do. ``copies``: (bytes touched, bytes/s), with the size increasing and the speed not."""

    threads: int
    peak_flops_s: float
    copies: tuple[tuple[int, float], ...]

    def bandwidth(self, size: float) -> float:
        """Bytes/s of a copy that touches so many bytes, interpolated between the sizes that were measured."""
        sizes, speeds = zip(*self.copies, strict=True)
        return float(np.exp(np.interp(math.log(max(size, 1)), np.log(sizes), np.log(speeds))))

    def limit_s(self, operations: float, size: float) -> float:
        """The least time for so many operations on so many bytes."""
        return max(operations / self.peak_flops_s, size / self.bandwidth(size))

    def to_json(self) -> dict[str, Any]:
        return {
            "threads": self.threads,
            "peak_gflop_per_s": self.peak_flops_s / 1e9,
            "copies": [{"bytes": size, "gb_per_s": speed / 1e9} for size, speed in self.copies],
        }


@dataclass(frozen=True)
class Spent:
    """Time, and what was done in it. ``flops`` None: unknown; then ``limit_s`` holds for the bytes alone."""

    time_s: float
    flops: float | None
    bytes: float
    limit_s: float

    @property
    def lost_s(self) -> float:
        return max(self.time_s - self.limit_s, 0.0)

    def figures(self, total_s: float) -> dict[str, Any]:
        """The keys that rows of nodes, layers and kinds share."""
        known = self.flops is not None and self.time_s > 0
        return {
            "time_ms": self.time_s * 1e3,
            "share": self.time_s / total_s,
            "flops": self.flops,
            "bytes": self.bytes,
            "gflop_per_s": self.flops / self.time_s / 1e9 if known and self.flops is not None else None,
            "gb_per_s": self.bytes / self.time_s / 1e9 if self.time_s > 0 else None,
            "intensity": self.flops / self.bytes if self.flops is not None and self.bytes else None,
            "limit_ms": self.limit_s * 1e3,
            "of_limit": self.limit_s / self.time_s if self.time_s > 0 else None,
            "lost_ms": self.lost_s * 1e3,
        }


@dataclass(frozen=True)
class NodeTime(Spent):
    """One kernel. ``covers``: operators of the file that it stands for; ``layer`` None: it could not be mapped."""

    name: str
    operator: str
    kind: str
    layer: str | None
    covers: tuple[str, ...]


@dataclass(frozen=True)
class LayerTime(Spent):
    """What the kernels of one layer, or of one kind of operator, took together."""

    name: str
    nodes: int
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Profile:
    """``nodes`` in running order, the last one "runtime"; their times add up to ``total_s``.

    With ``interrupted_s`` that is the median run under the profiler. ``plain_s`` is the median run without it, and
    ``overhead`` what the profiler added, as a part of that.
    """

    model: str
    threads: int
    input_shapes: Mapping[str, Shape]
    runs: int
    total_s: float
    interrupted_s: float
    plain_s: float
    overhead: float
    nodes: tuple[NodeTime, ...]
    roofline: Roofline
    notices: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[LayerTime, ...]:
        """By time, longest first."""
        return _grouped(self.nodes, lambda node: node.layer or RUNTIME)

    @property
    def kinds(self) -> tuple[LayerTime, ...]:
        """By time, longest first; names are those of `deploykit.flops.KINDS`, "other" and "runtime"."""
        return _grouped(self.nodes, lambda node: node.kind)

    @property
    def blamed(self) -> tuple[LayerTime, ...]:
        """The layers by the time they lose against their limit, most first."""
        return tuple(sorted(self.layers, key=lambda layer: -layer.lost_s))

    @property
    def limit_s(self) -> float:
        return sum(node.limit_s for node in self.nodes)

    def share(self, kind: str) -> float:
        """The part of the time that operators of one kind take: 0.9 for a model that is nearly all convolution."""
        return sum(node.time_s for node in self.nodes if node.kind == kind) / self.total_s

    def to_json(self) -> dict[str, Any]:
        """One of ``profiles`` in ``deploykit.bench/1``."""
        whole = _sum(self.nodes)
        return {
            "model": self.model,
            "runtime": NAME,
            "threads": self.threads,
            "input_shapes": {name: list(shape) for name, shape in self.input_shapes.items()},
            "runs": self.runs,
            "unprofiled_ms": self.plain_s * 1e3,
            "profiled_ms": (self.total_s + self.interrupted_s) * 1e3,
            "interrupted_ms": self.interrupted_s * 1e3,
            "overhead": self.overhead,
            **whole.figures(self.total_s),
            "roofline": self.roofline.to_json(),
            "blamed": [layer.name for layer in self.blamed[:BLAMED]],
            "kinds": [_row(row, self.total_s, "kind") for row in self.kinds],
            "layers": [_row(row, self.total_s, "layer") for row in self.layers],
            "nodes": [
                {
                    "node": node.name,
                    "operator": node.operator,
                    "kind": node.kind,
                    "layer": node.layer,
                    "covers": list(node.covers),
                    **node.figures(self.total_s),
                }
                for node in self.nodes
            ],
            "notices": list(self.notices),
        }


def _row(row: LayerTime, total_s: float, key: str) -> dict[str, Any]:
    return {key: row.name, "operators": list(row.operators), "nodes": row.nodes, **row.figures(total_s)}


def _sum(parts: Iterable[Spent]) -> Spent:
    parts = list(parts)
    counts = [part.flops for part in parts]
    return Spent(
        sum(part.time_s for part in parts),
        None if None in counts else sum(count or 0 for count in counts),
        sum(part.bytes for part in parts),
        sum(part.limit_s for part in parts),
    )


def _grouped(nodes: Sequence[NodeTime], key: Callable[[NodeTime], str]) -> tuple[LayerTime, ...]:
    groups: defaultdict[str, list[NodeTime]] = defaultdict(list)
    for node in nodes:
        groups[key(node)].append(node)
    rows = []
    for name, members in groups.items():
        operators = Counter(itertools.chain.from_iterable(node.covers or (node.operator,) for node in members))
        spent = dataclasses.asdict(_sum(members))
        rows.append(LayerTime(**spent, name=name, nodes=len(members), operators=tuple(filter(None, operators))))
    return tuple(sorted(rows, key=lambda row: -row.time_s))


# ---------------------------------------------------------------------------------------------------- profiling


def profile(
    model: str | os.PathLike[str],
    inputs: Mapping[str, Array],
    *,
    batch: int | None = None,
    threads: int | None = None,
    seconds: float = SECONDS,
) -> Profile:
    """Profile an ONNX file on the CPU.

    ``inputs`` are arrays by input name, in the trained model's layout; with ``batch`` their samples (axis 0) are
    repeated or cut to that many, else they are fed as they are. ``threads`` defaults to the physical cores that this
    process may use. ``seconds`` is how long it runs, half of it under the profiler; loading and the roofline (measured
    once per process and number of threads) are not counted. The optimised graph goes to a temporary folder, which needs
    as much room as the file.

    Raises InputError for a file that is no .onnx or a request that makes no sense, LoadError for a file that ONNX
    Runtime refuses, DataError for inputs that do not fit.
    """
    threads = environment.physical_cores() if threads is None else threads
    if Path(model).suffix.lower() not in RUNTIMES[NAME].suffixes:
        raise InputError(f"cannot profile {model}: only .onnx files; write one with: deploykit export {model}")
    if threads < 1 or (batch is not None and batch < 1) or not 0 < seconds < math.inf:
        raise InputError(f"cannot profile with threads={threads}, batch={batch}, seconds={seconds}; give positive ones")
    path = file_of(NAME, model)
    proto = read_onnx(NAME, path, weights=False)
    feed = _fed(proto, inputs_for(path, inputs), batch)
    shapes = {name: array.shape for name, array in feed.items()}
    with tempfile.TemporaryDirectory(prefix="deploykit-profile-") as folder:
        Path(folder, "inputs.npz").write_bytes(archive(feed))
        profiled = _named(path, proto, Path(folder))
        if profiled != path:
            proto = onnx.load_model(profiled, load_external_data=False)
        told = _work("profile", folder, path, model=str(profiled.absolute()), threads=threads, seconds=seconds)
        runs = _runs(json.loads(Path(told["events"]).read_text("utf-8")), told["warm"])
        optimised = onnx.load_model(told["optimised"], load_external_data=False)
    limits = roofline(threads)
    nodes = _nodes(runs, _Origin(proto, shapes), optimised.graph, limits)
    between = [run.total_us - sum(kernel.time_us for kernel in run.kernels.values()) for run in runs]
    nodes.append(NodeTime(max(_median(between), 0.0) / 1e6, 0, 0, 0.0, RUNTIME, "", RUNTIME, None, ()))
    total = sum(node.time_s for node in nodes)
    plain = _median(told["plain_s"])
    found = Profile(
        os.fspath(model),
        threads,
        shapes,
        len(runs),
        total,
        _median([run.total_us for run in runs]) / 1e6 - total,
        plain,
        _median(told["profiled_s"]) / plain - 1,
        tuple(nodes),
        limits,
    )
    return dataclasses.replace(found, notices=tuple(_notices(found)))


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def _fed(proto: Any, inputs: Mapping[str, Array], batch: int | None) -> dict[str, Array]:
    specs = onnx_signature(proto.graph).inputs
    arrays = dict(inputs)
    if batch is not None:
        if empty := [name for name, array in inputs.items() if np.ndim(array) == 0 or len(array) == 0]:
            raise DataError(f"input {empty[0]} has no samples; axis 0 must count them")
        arrays = {name: np.asarray(array)[np.arange(batch) % len(array)] for name, array in inputs.items()}
    return {spec.name: array for spec, array in zip(specs, fitted(arrays, specs), strict=True)}


def _notices(found: Profile) -> Iterator[str]:
    if found.overhead > OVERHEAD_LIMIT:
        often = f"runs under the profiler took {1 + found.overhead:.2f}x those without"
        yield f"{often}: milliseconds are too many, most of all those of short nodes"
    if found.interrupted_s > OVERHEAD_LIMIT * found.total_s:
        yield (
            f"a run took {1 + found.interrupted_s / found.total_s:.2f}x the sum of its nodes' usual times: other"
            " programs interrupt it; close them and measure again"
        )
    if found.limit_s > found.total_s:
        yield "the nodes took less than their limits: the machine was busy while these were measured; measure again"
    unknown = sorted({node.operator for node in found.nodes if node.flops is None})
    if unknown:
        yield f"operations of {', '.join(unknown)} are unknown; their limit counts bytes alone"
    if lost := sum(node.time_s for node in found.nodes if node.layer is None and node.operator) / found.total_s:
        yield f"{lost:.1%} of the time is in nodes that belong to no layer by name"


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and those inside of it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)


def _named(path: Path, proto: Any, folder: Path) -> Path:
    """The file itself, or, where nodes share a name or have none, a copy in which all can be told apart."""
    names = [node.name for graph in _graphs(proto.graph) for node in graph.node]
    if "" not in names and len(set(names)) == len(names):
        return path
    whole = read_onnx(NAME, path, weights=True)
    taken = Counter(names)
    for graph in _graphs(whole.graph):
        for node in graph.node:
            if not node.name or taken[node.name] > 1:
                stem = node.name or next(filter(None, node.output), node.op_type)
                node.name = next(n for i in itertools.count() if (n := f"{stem}#{i}") not in taken)
                taken[node.name] = 1
    copy = folder / "named.onnx"
    onnx.save_model(whole, copy, save_as_external_data=whole.ByteSize() > HUGE)
    return copy


# ----------------------------------------------------------------------------------------------- what was recorded


_Tensor = tuple[Shape, int]  # its shape, and its bytes


@dataclass
class _Kernel:
    """What one node did in one run. ``calls``: the tensors that it read and made."""

    time_us: float = 0.0
    calls: list[tuple[list[_Tensor], list[_Tensor]]] = field(default_factory=list)


@dataclass
class _Run:
    total_us: float
    kernels: dict[tuple[str, str], _Kernel]  # by name and operator


_BYTES = {
    **{f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "float": 4,
    "double": 8,
    "float16": 2,
    "bfloat16": 2,
    "bool": 1,
}
_SUFFIX = "_kernel_time"


def _tensors(described: Sequence[Mapping[str, Sequence[int]]]) -> list[_Tensor]:
    """The tensors of an event; an element of a type without a size (a string) counts as no byte."""
    return [
        (tuple(shape), math.prod(shape) * _BYTES.get(dtype, 0)) for row in described for dtype, shape in row.items()
    ]


def _stored(graph: Any) -> dict[str, _Tensor]:
    """Every constant of a graph and of those inside of it."""
    sizes = {}
    for tensor in itertools.chain.from_iterable(inner.initializer for inner in _graphs(graph)):
        shape = tuple(tensor.dims)
        sizes[tensor.name] = shape, math.prod(shape) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return sizes


def _reads(node: Any, seen: Sequence[_Tensor], stored: Mapping[str, _Tensor]) -> list[_Tensor | None]:
    """What a node reads, place by place, None where nothing is.

    An event lists neither inputs that are left out nor constants that ONNX Runtime has packed for its kernel.
    """
    if node is None:
        return list(seen)
    waiting, found = list(seen), list[_Tensor | None]()
    needed = sum(bool(name) and name not in stored for name in node.input)
    for name in node.input:
        constant = stored.get(name)
        if not name:
            found.append(None)
        elif constant is None:
            needed -= 1
            found.append(waiting.pop(0) if waiting else None)
        elif len(waiting) > needed and waiting[0][0] == constant[0]:
            found.append(waiting.pop(0))
        else:
            found.append(constant)
    return found


def _runs(events: Sequence[Mapping[str, Any]], skip: int) -> list[_Run]:
    """The runs that the profiler saw, without the first ones, each with its nodes' own time."""
    whole = sorted((e["ts"], e["dur"]) for e in events if e["cat"] == "Session" and e["name"] == "model_run")[skip:]
    runs, starts = [_Run(duration, {}) for _, duration in whole], [start for start, _ in whole]
    open_nodes: list[tuple[int, _Kernel]] = []  # end, and the kernel: those that the next node may be inside of
    nodes = [e for e in events if e["cat"] == "Node" and e["name"].endswith(_SUFFIX)]
    for event in sorted(nodes, key=lambda e: (e["ts"], -e["dur"])):
        place = bisect.bisect_right(starts, event["ts"]) - 1
        if place < 0 or event["ts"] > starts[place] + runs[place].total_us:
            continue  # a run for warming up
        about = event["args"]
        key = (event["name"].removesuffix(_SUFFIX), about["op_name"])
        kernel = runs[place].kernels.setdefault(key, _Kernel())
        while open_nodes and open_nodes[-1][0] <= event["ts"]:
            open_nodes.pop()
        if open_nodes:
            open_nodes[-1][1].time_us -= event["dur"]
        open_nodes.append((event["ts"] + event["dur"], kernel))
        kernel.time_us += event["dur"]
        kernel.calls.append((_tensors(about["input_type_shape"]), _tensors(about["output_type_shape"])))
    return runs


def _nodes(runs: Sequence[_Run], origin: _Origin, graph: Any, limits: Roofline) -> list[NodeTime]:
    """Every node's median time over the runs, in running order; operations and bytes are means."""
    known = {node.name: node for inner in _graphs(graph) for node in inner.node}
    stored = _stored(graph)
    covers = origin.follow(graph)
    order = dict.fromkeys(key for run in runs for key in run.kernels)
    rows = []
    for name, operator in order:
        seen = [kernel for run in runs if (kernel := run.kernels.get((name, operator))) is not None]
        time_s = _median([k.time_us if (k := run.kernels.get((name, operator))) else 0.0 for run in runs]) / 1e6
        node = known.get(name)
        calls = [(_reads(node, read, stored), made) for kernel in seen for read, made in kernel.calls]
        moved = sum(bytes_moved(operator, _sizes(read), _sizes(made)) for read, made in calls) / len(runs)
        cover = covers.get(name, _Cover(origin.layer_called(name), (), None))
        count = cover.flops
        if count is None:  # inside of a body, or its shape could not be inferred: what the run itself saw
            settings = _settings(node)
            count = _mean([flops(_call(operator, *call, settings)) for call in calls], len(runs))
        often = max(len(calls) / len(runs), 1.0)  # within a loop: the limit of one call, so often
        limit = often * limits.limit_s((count or 0) / often, moved / often)
        rows.append(NodeTime(time_s, count, moved, limit, name, operator, kind(operator), cover.layer, cover.operators))
    return rows


def _sizes(tensors: Sequence[_Tensor | None]) -> list[int]:
    return [tensor[1] for tensor in tensors if tensor is not None]


def _call(
    operator: str, read: Sequence[_Tensor | None], made: Sequence[_Tensor | None], settings: Mapping[str, Any]
) -> Call:
    inputs, outputs = (tuple(tensor and tensor[0] for tensor in side) for side in (read, made))
    return Call(operator, inputs, outputs, settings)


def _settings(node: Any) -> dict[str, Any]:
    if node is None:
        return {}
    return {a.name: helper.get_attribute_value(a) for a in node.attribute if a.type != onnx.AttributeProto.GRAPH}


def _mean(counts: Sequence[int | None], runs: int) -> float | None:
    return None if None in counts else sum(count or 0 for count in counts) / runs


# ------------------------------------------------------------------------------------- from kernels to layers


@dataclass(frozen=True)
class _Cover:
    """What a kernel stands for; ``flops`` None where some of it is unknown."""

    layer: str | None
    operators: tuple[str, ...]
    flops: float | None


# Scopes that Keras and TensorFlow open within one layer.
_INNER = frozenset(
    {"batchnorm", "moments", "Reshape", "Tensordot", "convolution", "depthwise", "separable_conv2d", "strided_slice"}
    | {"BiasAdd", "MatMul", "einsum", "resize", "BroadcastTo", "MaxPool", "AvgPool"}
)


# What ONNX Runtime puts between kernels: the same values under another layout, shape or type.
_JOINTS = frozenset({"ReorderInput", "ReorderOutput", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Cast"})


class _Origin:
    """The graph of the file: who makes what, in which layer, and at what cost."""

    def __init__(self, proto: Any, shapes: Mapping[str, Shape]) -> None:
        graph = proto.graph
        self._nodes = list(graph.node)
        self._maker = {name: place for place, node in enumerate(self._nodes) for name in node.output if name}
        self._reader: dict[str, int] = {}  # the first one
        for place, node in enumerate(self._nodes):
            for name in node.input:
                self._reader.setdefault(name, place)
        self._called = {node.name: place for place, node in enumerate(self._nodes)}
        self._inputs = {value.name for value in graph.input} - {tensor.name for tensor in graph.initializer}
        self._flops = graph_flops(proto, shapes)
        self._prefix = self._model_name()
        live = set(self._inputs)  # what depends on the inputs; the rest is computed while the file is loaded
        for node in self._nodes:
            if live.intersection(node.input) or any(a.type == onnx.AttributeProto.GRAPH for a in node.attribute):
                live.update(node.output)
        self._live = live
        self._layers = self._of_layers()

    def _model_name(self) -> str:
        """A first part that all names have in common is the model's and no layer's."""
        parts = [name.strip("/").split("/") for name in self._called]
        parts = [part for part in parts if len(part) > 1]
        shared = {part[0] for part in parts}
        return f"{shared.pop()}/" if len(shared) == 1 and len({tuple(part[1:-1]) for part in parts}) > 1 else ""

    def _of_layers(self) -> list[str | None]:
        """The layer of every node: its name's, or that of its first producer with one, or of its consumer."""
        layers = [self.layer_called(node.name) for node in self._nodes]
        for place, node in enumerate(self._nodes):
            before = (layers[self._maker[name]] for name in node.input if name in self._maker)
            layers[place] = layers[place] or next(filter(None, before), None)
        for place in reversed(range(len(self._nodes))):
            for name in self._nodes[place].input:
                if name in self._maker:
                    layers[self._maker[name]] = layers[self._maker[name]] or layers[place]
        return layers

    def layer_called(self, name: str) -> str | None:
        """The layer that a node's name tells; None where it tells none."""
        parts = name.strip("/").removeprefix(self._prefix).split("/")[:-1]
        while len(parts) > 1 and parts[-1] in _INNER:
            parts.pop()
        return "/".join(parts) or None

    def follow(self, optimised: Any) -> dict[str, _Cover]:
        """Every node of the optimised graph, in its order, by name."""
        alias: dict[str, str] = {name: name for name in self._inputs}
        claimed: set[int] = set()
        covers: dict[str, _Cover] = {}
        for node in optimised.node:
            reads = [alias.get(name, name) for name in node.input]
            made = self._known(node)
            if not made and node.op_type in _JOINTS:
                made = reads[:1]
            alias.update(zip(node.output, made, strict=False))
            cover = self._cone(made, set(reads), claimed)
            claimed.update(cover)
            covers[node.name] = self._cover(cover, made, node)
        return covers

    def _known(self, node: Any) -> list[str]:
        """The tensors of the file that a node makes: told by its outputs' names, or else by its own."""
        if made := [name for name in node.output if name in self._maker]:
            return made
        name = node.name
        while name and name != node.op_type:
            if name in self._maker:
                return [name]
            if name in self._called:
                return [made for made in self._nodes[self._called[name]].output if made]
            name = name[: max(name.rfind("/"), name.rfind("_"), 0)]
        return []

    def _cone(self, made: Sequence[str], reads: set[str], claimed: set[int]) -> list[int]:
        """Places of the nodes between what is read and what is made that no kernel has yet, in the file's order."""
        found: set[int] = set()
        stack = list(made)
        while stack:
            place = self._maker.get(stack.pop())
            if (
                place is None
                or place in found
                or place in claimed
                or not self._live.intersection(self._nodes[place].output)
            ):
                continue
            found.add(place)
            stack += [name for name in self._nodes[place].input if name and name not in reads]
        return sorted(found)

    def _cover(self, places: Sequence[int], made: Sequence[str], node: Any) -> _Cover:
        if not places:
            nodes = [self._maker.get(name, self._reader.get(name)) for name in made]
            layer = next((self._layers[place] for place in nodes if place is not None), None)
            moves = kind(node.op_type) in ("layout", "data movement")
            return _Cover(layer, (), 0 if moves else None)
        counts = [self._flops[next(filter(None, self._nodes[place].output))] for place in places]
        heaviest = max(range(len(places)), key=lambda index: (counts[index] or 0, index))
        operators = tuple(self._nodes[place].op_type for place in places)
        total = None if None in counts else sum(count or 0 for count in counts)
        return _Cover(self._layers[places[heaviest]], operators, total)


# ---------------------------------------------------------------------------------------------- the worker process

# The worker finds modules where this process finds them, and nowhere else: not in the current folder.
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from deploykit.profiling import _main; _main()"


def _work(verb: str, folder: str, path: Path | None, **arguments: Any) -> dict[str, Any]:
    """What a process of its own answers; LoadError with the reason where it does not."""
    request = {"do": verb, "folder": folder, **arguments}
    what = f"cannot profile {path}" if path is not None else "cannot measure what this machine can do"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _BOOT, json.dumps(sys.path)],
            input=json.dumps(request).encode("ascii"),
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        )
    except subprocess.TimeoutExpired:
        raise LoadError(f"{what}: no answer within {TIMEOUT_S:.0f} s; profile a smaller batch") from None
    answer = Path(folder, "answer.json")
    if done.returncode or not answer.is_file():
        said = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise LoadError(f"{what}: {said[-1]}; check that the file runs with: deploykit bench MODEL.onnx")
    result: dict[str, Any] = json.loads(answer.read_text("utf-8"))
    return result


def _main() -> None:  # pragma: no cover - runs in the worker
    request = json.load(sys.stdin)
    verbs: dict[str, Callable[..., dict[str, Any]]] = {"profile": _profile_here, "roofline": _roofline_here}
    folder = Path(request.pop("folder"))
    answer = verbs[request.pop("do")](folder, **request)
    Path(folder, "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def _session(model: str | bytes, threads: int, events: Path | None, optimised: Path | None = None) -> Any:
    from deploykit.verify import import_onnxruntime  # in the worker only: this module is imported without it

    ort = import_onnxruntime()
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = threads
    if events is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(events)
    if optimised is not None:  # its weights are not wanted: they go to a file beside it
        settings.optimized_model_filepath = str(optimised)
        key = "session.optimized_model_external_initializers_file_name"
        settings.add_session_config_entry(key, f"{optimised.name}.data")
    return ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


def _timed(session: Any, feed: Mapping[str, Array], seconds: float, most: int) -> list[float]:
    """Seconds of each run, after some that are not timed."""
    for _ in range(WARM_RUNS):
        session.run(None, feed)
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < LEAST_RUNS or (time.perf_counter() - begin < seconds and len(samples) < most):
        start = time.perf_counter()
        session.run(None, feed)
        samples.append(time.perf_counter() - start)
    return samples


def _profile_here(folder: Path, model: str, threads: int, seconds: float) -> dict[str, Any]:
    with np.load(folder / "inputs.npz") as stored:
        feed = dict(stored)
    optimised = folder / "optimised.onnx"
    plain = _timed(_session(model, threads, None), feed, seconds / 4, MOST_EVENTS)
    session = _session(model, threads, folder / "events", optimised)
    count = len(onnx.load_model(optimised, load_external_data=False).graph.node)
    profiled = _timed(session, feed, seconds / 2, max(LEAST_RUNS, MOST_EVENTS // max(count, 1)))
    events = session.end_profiling()
    del session
    plain += _timed(_session(model, threads, None), feed, seconds / 4, MOST_EVENTS)
    told = {"plain_s": plain, "profiled_s": profiled, "warm": WARM_RUNS}
    return {**told, "events": events, "optimised": str(optimised)}


# ------------------------------------------------------------------------------------------------- the machine

PRODUCTS = (256, 384, 512, 1024)  # rows and columns: small ones fit between two interruptions
COPIES = tuple(1 << bits for bits in range(14, 27, 2))  # bytes touched
PROBE_RUNS, PROBE_S = (4, 60), 0.15  # of each: at least, at most, and for how long


@functools.cache
def roofline(threads: int) -> Roofline:
    """What ONNX Runtime reaches on this machine: measured on the first call for a number of threads, in about 1 s."""
    with tempfile.TemporaryDirectory(prefix="deploykit-roofline-") as folder:
        told = _work("roofline", folder, None, threads=threads)
    sizes, speeds = zip(*told["copies"], strict=True)
    # a larger copy is never faster than a smaller one: calls that are too short to be timed do not count
    falling = np.maximum.accumulate(speeds[::-1])[::-1]
    return Roofline(threads, told["peak"], tuple(zip(sizes, map(float, falling), strict=True)))


def _probe(operator: str, shape: Shape, places: int) -> bytes:
    """A model of one node with as many inputs of one shape."""
    values = [helper.make_tensor_value_info(f"x{place}", TensorProto.FLOAT, shape) for place in range(places)]
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    graph = helper.make_graph([helper.make_node(operator, [v.name for v in values], ["y"])], "probe", values, [made])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    serialised: bytes = model.SerializeToString()
    return serialised


def _fastest_s(folder: Path, threads: int, operator: str, shape: Shape, places: int) -> float:
    """Of one node; the profiler's clock is the one that nodes of a model are timed by."""
    session = _session(_probe(operator, shape, places), threads, folder / "probe")
    random = np.random.default_rng(0)
    arrays = [random.random(shape, np.float32) for _ in range(places)]
    binding = session.io_binding()
    result = np.zeros(shape, np.float32)
    for place, array in enumerate(arrays):
        binding.bind_cpu_input(f"x{place}", array)
    binding.bind_output("y", "cpu", 0, np.float32, shape, result.ctypes.data)
    least, most = PROBE_RUNS
    begin = time.perf_counter()
    for count in range(most):
        if count >= least and time.perf_counter() - begin > PROBE_S:
            break
        session.run_with_iobinding(binding)
    events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    fastest_us: int = min(e["dur"] for e in events if e["cat"] == "Node")
    return max(fastest_us, 1) / 1e6


def _roofline_here(folder: Path, threads: int) -> dict[str, Any]:
    peak = max(2 * size**3 / _fastest_s(folder, threads, "MatMul", (size, size), 2) for size in PRODUCTS)
    copies = [(size, size / _fastest_s(folder, threads, "Neg", (size // 512, 64), 1)) for size in COPIES]
    return {"peak": peak, "copies": copies}
