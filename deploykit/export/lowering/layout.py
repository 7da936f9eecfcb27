"""NCHW instead of NHWC at the edge of the file.

Keras' images are NHWC and ONNX's convolutions NCHW, so the file starts with a Transpose for the caller's sake. Who has
NCHW arrays anyway would transpose them only to have it undone. Law: ``f(T(x)) = g(x)`` with x in NCHW; the input
changes its shape, and a Transpose to NHWC stands behind it. That one meets the one to NCHW, and `transposes` removes
both. An output of rank 4 is turned the other way round.

This changes what callers have to give and what they get, so it is an option of the export and no lowering:
`deploykit.layout` says what the file's signature is then, and what that does to arrays.

Limits: rank 4 means an image, and all inputs and outputs of rank 4 are turned. An input whose Transpose would stay is
refused: that net works on NCHW itself (``data_format="channels_first"``), or reads its input as no image.
"""

from __future__ import annotations

import onnx_ir as ir

from deploykit.errors import UnsupportedModelError
from deploykit.export.lowering import transposes
from deploykit.export.lowering.patterns import is_op
from deploykit.layout import IMAGE_RANK, TO_NCHW, TO_NHWC


def nchw(model: ir.Model) -> int:
    """Let images come in and go out as NCHW, in place; returns how many inputs and outputs were turned."""
    graph = model.graph
    inputs = [value for value in graph.inputs if value.shape is not None and len(value.shape) == IMAGE_RANK]
    outputs = [
        place
        for place, value in enumerate(graph.outputs)
        if value.shape is not None and len(value.shape) == IMAGE_RANK and value not in inputs
    ]
    if not inputs and not outputs:
        raise UnsupportedModelError("the model has no input or output of rank 4; export it without --layout nchw")
    for value in inputs:
        _turn_input(graph, value)
    for place in outputs:
        _turn_output(graph, place)
    transposes.apply(model)
    for value in inputs:
        if any(is_op(use.node, "Transpose") for use in value.uses()):
            raise UnsupportedModelError(
                f"input {value.name} is not read as an image in NHWC, so NCHW would cost a Transpose instead of"
                " saving one; export the model without --layout nchw"
            )
    return len(inputs) + len(outputs)


def _transpose(source: ir.Value, perm: tuple[int, ...], name: str) -> ir.Node:
    node = ir.node("Transpose", [source], {"perm": list(perm)}, name=name)
    assert source.shape is not None
    made = node.outputs[0]
    made.shape, made.type = ir.Shape([source.shape[axis] for axis in perm]), source.type
    return node


def _turn_input(graph: ir.Graph, value: ir.Value) -> None:
    assert value.shape is not None
    value.shape = ir.Shape([value.shape[axis] for axis in TO_NCHW])
    readers = list(value.uses())
    node = _transpose(value, TO_NHWC, f"{value.name}/Transpose")
    if readers:
        graph.insert_before(graph[0], node)
    for use in readers:
        use.node.replace_input_with(use.idx, node.outputs[0])


def _turn_output(graph: ir.Graph, place: int) -> None:
    value = graph.outputs[place]
    node = _transpose(value, TO_NCHW, f"{value.name}/Transpose")
    name, value.name = value.name, f"{value.name}/NHWC"
    node.outputs[0].name = name
    graph.append(node)
    graph.outputs[place] = node.outputs[0]
