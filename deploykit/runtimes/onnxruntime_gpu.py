"""What ONNX Runtime's GPU providers share: is the provider usable here, and did it really take the model?

ONNX Runtime hands a model to the CPU without a word in three cases, each of which is an error here:

1.  The provider is not in the package, or its libraries or the device are missing. A model of one node is
    opened first: a provider that does not take it cannot be used on this machine, whatever the file.
2.  The provider fails while it runs. The retry on the CPU is switched off (``enable_fallback=0``).
3.  The provider has no kernel for some nodes. ONNX Runtime is asked to record where each node went. On the CPU
    it may leave only *shape arithmetic*, which it puts there on purpose: nodes whose result depends on the shapes of
    the inputs alone. (``session.disable_cpu_ep_fallback`` refuses those, too, and with them most models whose batch
    size is free.)

Shape arithmetic is found in the file's graph: an input's values are *live*, and so is all that is computed from
something live, except by Shape and Size. A node that the file does not know by name counts as arithmetic on values.

A session for timings keeps its inputs and outputs on the device (`DeviceSession.bound`). A *CUDA graph* is one such run
recorded, and replayed in one call: it belongs to one set of shapes, and ONNX Runtime records it only where every node
that computes is on the provider. What cannot be recorded is an error, too. Other shapes open the model anew.

Limits: nodes inside the bodies of Loop, Scan and If are not looked at in the file; on the CPU they are refused.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from onnx import AttributeProto, TensorProto, helper

from deploykit.errors import LoadError, MissingComponentError, ProofError
from deploykit.runtimes import Array, fitted, missing
from deploykit.runtimes.files import FileSession, file_of, read_onnx, reason, silenced, unreadable
from deploykit.runtimes.onnxruntime_cpu import opened, ort, over
from deploykit.verify import Bound, SessionSettings

RECORD = {"session.record_ep_graph_assignment_info": "1"}
PACKAGE = "onnxruntime-gpu"
SHOWN = 3  # nodes that a message names


@dataclass(frozen=True)
class Provider:
    """A GPU provider of ONNX Runtime; ``needs`` is what must be on the machine besides the package.

    ``graph`` are the options that record CUDA graphs, ``plain`` is the runtime that does not; both are empty where
    nothing is recorded. ``device``: whose memory it computes in, by ONNX Runtime's name.
    """

    runtime: str
    name: str
    options: Mapping[str, str]
    needs: str
    graph: Mapping[str, str] = field(default_factory=dict)
    plain: str = ""
    device: str = "cuda"

    def recording(self, runtime: str, graph: Mapping[str, str]) -> Provider:
        """The same provider with CUDA graphs."""
        return replace(self, runtime=runtime, graph=graph, plain=self.runtime)


class DeviceSession(FileSession):
    """A session whose inputs and outputs may stay on the device."""

    def __init__(self, base: FileSession, path: Path, device: str, fresh: Callable[[], Any] | None) -> None:
        """``fresh`` opens the model once more, for a graph of other shapes; None: nothing is recorded."""
        names = [spec.name for spec in base.signature.outputs]
        self._device, self._fresh = device, fresh
        self._replay: tuple[dict[str, Any], Bound] | None = None

        def compute(arrays: dict[str, Array]) -> Sequence[Array]:
            if fresh is None:
                outputs: Sequence[Array] = self.native.run(names, arrays)
                return outputs
            bound = self.bound(arrays)
            bound.run()
            return list(bound.from_device().values())

        super().__init__(base.runtime, path, base.signature, compute, base.native, base.notes)

    def bound(self, inputs: Mapping[str, Array]) -> Bound:
        """Room on the device for inputs and outputs of these shapes, with these values; of a graph, the one it has.

        Raises what ONNX Runtime raises.
        """
        specs = self.signature.inputs
        arrays = {spec.name: array for spec, array in zip(specs, fitted(inputs, specs), strict=True)}
        if self._fresh is None:
            return Bound(self.native, self._device, arrays)
        shapes = {name: array.shape for name, array in arrays.items()}
        if self._replay is None or self._replay[0] != shapes:
            if self._replay is not None:
                self._replay = None  # its memory, before the next takes more
                self.native = self._fresh()
            self._replay = shapes, Bound(self.native, self._device, arrays)
        else:
            self._replay[1].to_device(arrays)
        return self._replay[1]

    def close(self) -> None:
        self._replay = None
        super().close()


def gpu_session(
    provider: Provider, model: str | os.PathLike[str], *, threads: int | None, notes: tuple[str, ...]
) -> DeviceSession:
    """Load an ONNX file on a GPU provider, entirely.

    Raises MissingComponentError where the provider cannot be used on this machine, ProofError where it leaves
    nodes that compute with the inputs' values to the CPU, and LoadError where no CUDA graph can be recorded.
    """
    path = file_of(provider.runtime, model)
    require(provider)
    graph = read_onnx(provider.runtime, path, weights=False).graph

    def fresh() -> Any:
        return opened(
            os.fspath(path), provider.name, {**provider.options, **provider.graph}, SessionSettings(threads), RECORD
        )

    try:
        loaded = fresh()
    except Exception as error:  # ONNX Runtime's exception classes are not public
        if provider.plain:
            why = f"{provider.name} does not open {path} with CUDA graphs: {reason(error)}; use {provider.plain}"
            raise LoadError(why) from error
        raise unreadable(provider.runtime, path, error) from error
    places = placed(loaded)
    astray = strayed(places, provider.name, shape_arithmetic(graph))
    total = sum(map(len, places.values()))
    if astray or provider.name not in places:
        named = ", ".join(astray[:SHOWN]) + (", ..." if len(astray) > SHOWN else "")
        raise ProofError(
            f"{path} does not run on {provider.name}: {len(astray) or total} of {total} nodes would run elsewhere"
            f" ({named or 'all of them'}); check it on onnxruntime-cpu, or export it with operators the provider has"
        )
    if small := total - len(places[provider.name]):
        notes = (*notes, f"shape arithmetic of {small} nodes on the CPU")
    base = over(loaded, provider.runtime, path, notes)
    return DeviceSession(base, path, provider.device, fresh if provider.plain else None)


def require(provider: Provider) -> None:
    """Open a model of one node on the provider; MissingComponentError, with the reason, where that fails."""
    if provider.name not in ort.get_available_providers():
        if _installed(PACKAGE):  # both packages own the module's files, and the one installed last wins
            raise MissingComponentError(
                f"runtime {provider.runtime} needs {PACKAGE}, whose files onnxruntime has overwritten;"
                f" run: pip install --force-reinstall --no-deps {PACKAGE}"
            )
        raise missing(provider.runtime, f"{provider.name}, which the installed onnxruntime {ort.__version__} lacks")
    why = ""
    with silenced() as said:
        ort.preload_dlls()  # CUDA and cuDNN, where they were installed by pip
        try:
            tried = opened(_one_node(), provider.name, provider.options, SessionSettings(), {})
            if provider.name in tried.get_providers():
                return
        except Exception as error:  # ONNX Runtime's exception classes are not public
            why = reason(error)
        said.seek(0)
        why = _cause(said.read()) or why or "ONNX Runtime does not say why"
    raise MissingComponentError(
        f"runtime {provider.runtime} cannot use {provider.name} on this machine: {why}; it needs {provider.needs}"
    )


def _installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def _cause(printed: str) -> str:
    """The reason in what ONNX Runtime printed: a library that cannot be loaded, or what CUDA said."""
    marks = ("with error: ", "CUDA failure", "CUDA error")
    for line in printed.splitlines():
        for mark in marks:
            if mark in line:
                return line[line.index(mark) :].removeprefix("with error: ").strip()
    return ""


def _one_node() -> bytes:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", [x], [y])
    model: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8
    ).SerializeToString()
    return model


def placed(loaded: Any) -> dict[str, list[str]]:
    """The names of the nodes that each provider took; of a session that was opened with `RECORD`."""
    places: dict[str, list[str]] = {}
    for part in loaded.get_provider_graph_assignment_info():
        places.setdefault(str(part.ep_name), []).extend(
            str(node.name) or f"a {node.op_type} without a name" for node in part.get_nodes()
        )
    return places


def strayed(places: Mapping[str, list[str]], provider: str, harmless: set[str]) -> list[str]:
    """The nodes that another provider took and that compute with values."""
    return [node for name, nodes in places.items() if name != provider for node in nodes if node not in harmless]


def shape_arithmetic(graph: Any) -> set[str]:
    """The names of the nodes of an ONNX graph whose results depend on the shapes of its inputs alone."""
    live = {value.name for value in graph.input} - {tensor.name for tensor in graph.initializer}
    found = set()
    for node in graph.node:  # in an order in which they can run
        nested = any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute)
        if node.op_type in ("Shape", "Size") or not (nested or live.intersection(node.input)):
            found.add(node.name)
        else:
            live.update(node.output)
    return found - {""}
