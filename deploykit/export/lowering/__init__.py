"""Lowering: the same function in operations that the runtime executes faster.

tf2onnx translates operation by operation. A runtime has kernels for more than that (a hard-swish, a convolution
that pads), and keeps a chain of operations in its fastest layout only while it knows every one of them. A lowering
rewrites the ONNX graph towards those kernels. Each is a module of this package that states its law and one row of
`LOWERINGS`:

    apply(model)    rewrites an `onnx_ir` model in place, returns the number of places that it rewrote

The laws are exact in real arithmetic, and what they make of float32 is judged like everything else: by `check`, on the
file as written. Rules for a module here:

- It works on what the graph says (operations, attributes, constants, known shapes), never on names.
- A value that is an output of the graph, or is read by a subgraph, keeps its name and stays.
- A node that it makes is named after the node it replaces, because names lead back to layers (`export.canonical`).
- Arithmetic on constants is done in float64 and rounded once. A constant whose content is kept outside of the graph
  (`Frozen.constants`, only in models above 2 GB) has no value here, and what needs it is left alone.

Limit: which rewriting is faster is the runtime's business. The order below and the choices in the modules are those
that were faster on ONNX Runtime's CPU kernels (docs/lowering.md has the figures, and the command that prints them).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from deploykit.export.lowering import activations, affines, pads, residue, transposes


@dataclass(frozen=True)
class Lowering:
    """One rewriting: its name in reports and options, and what does it."""

    name: str
    apply: Callable[[ir.Model], int]


LOWERINGS: tuple[Lowering, ...] = (
    Lowering("residue", residue.apply),
    Lowering("transposes", transposes.apply),
    Lowering("activations", activations.apply),
    Lowering("affines", affines.apply),
    Lowering("pads", pads.apply),
)

_INFER_SHAPES = ShapeInferencePass(strict_mode=False)


def lower(proto: Any, *, without: Collection[str] = ()) -> tuple[Any, dict[str, int]]:
    """The lowered ModelProto, and how many places each lowering rewrote; ``without`` names those to leave out."""
    model = ir.from_proto(proto)
    done = {}
    for row in LOWERINGS:
        if row.name not in without:
            _INFER_SHAPES(model)
            done[row.name] = row.apply(model)
    return ir.to_proto(model), done
