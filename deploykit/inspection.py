"""Inspect: what a model file holds, without changing or judging anything but its health.

Reads the file, lists signature, layers, parameters and affines by kind. A model that cannot be fused (NaN
in its weights, quantized layers) is still shown, with a warning that says what to do. ``findings`` has every
complaint of `deploykit.health`, ``health`` the warnings as lines for people, in which many of one kind are one.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from deploykit.errors import UnsupportedModelError
from deploykit.fuse.sources import kinds
from deploykit.graph import Trace, trace
from deploykit.health import examine, summary, training_steps
from deploykit.load import Loaded, nonfinite_weights, refuse_rewriting
from deploykit.opaque import graph_of, operations
from deploykit.signature import Signature, TensorSpec


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "shape": list(spec.shape),
        "dtype": spec.dtype,
        "low": spec.low,
        "high": spec.high,
    }


def signature_json(signature: Signature) -> dict[str, Any]:
    """The signature as reports and manifests have it: lists of name, shape (null = free), dtype, low, high."""
    return {
        "inputs": [_spec(spec) for spec in signature.inputs],
        "outputs": [_spec(spec) for spec in signature.outputs],
    }


def source_json(loaded: Loaded) -> dict[str, Any]:
    """Where a model came from."""
    return {
        "path": str(loaded.path),
        "format": loaded.format,
        "bytes": loaded.bytes,
        "sha256": loaded.sha256,
        "saved_by": loaded.saved_by,
        "generation": loaded.generation,
        "backend": loaded.backend,
        "training_config_found": loaded.training_config_found,
        "opaque": loaded.opaque,
    }


def _parameters(variables: Any) -> int:
    return sum(math.prod(variable.shape) for variable in variables)


def health_of(loaded: Loaded, found: Trace) -> tuple[list[dict[str, str]], list[str]]:
    """What `deploykit.health` complains of: every finding, and the lines for people."""
    findings = examine(found, training_steps(loaded.path) if loaded.training_config_found else None)
    plain = [{"layer": finding.layer, "code": finding.code, "message": finding.message} for finding in findings]
    return plain, summary(findings)


def _graph_json(model: Any) -> dict[str, Any] | None:
    """What there is to say about an opaque model: where its graph is from, and its operations."""
    graph = graph_of(model)
    if graph is None:
        return None
    return {"origin": graph.origin, "operations": dict(operations(graph.definition).most_common())}


def inspect_body(loaded: Loaded) -> dict[str, Any]:
    """The keys of ``deploykit.inspect/1``."""
    model = loaded.model
    found = trace(model)
    health = [f"{where}; training diverged: go back to an earlier checkpoint" for where in nonfinite_weights(model)]
    try:
        refuse_rewriting(model)
    except UnsupportedModelError as error:
        health.append(str(error))
    findings, lines = health_of(loaded, found)
    health += lines
    layers = []
    seen: set[str] = set()
    for node in found.nodes:
        if node.name in seen:
            continue
        seen.add(node.name)
        shape = found.tensors[node.outputs[0]].shape if node.outputs else ()
        layers.append(
            {
                "name": node.name,
                "class": type(node.layer).__name__,
                "output_shape": list(shape),
                "parameters": _parameters(getattr(node.layer, "weights", ())),
                "calls": found.calls(node),
                "trainable": bool(getattr(node.layer, "trainable", False)),
            }
        )
    return {
        "name": model.name,
        "class": type(model).__name__,
        "file": source_json(loaded),
        "signature": signature_json(found.signature),
        "parameters": {
            "total": _parameters(model.weights),
            "trainable": _parameters(model.trainable_weights),
        },
        "affines": dict(Counter(kinds(found))),
        "layers_total": len(layers),
        "layers": layers,
        "health": health,
        "findings": findings,
        "graph": _graph_json(model),
    }
