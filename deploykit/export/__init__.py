"""A Keras model as a verified-by-construction ONNX file: same names, same shapes, same bytes every time.

`export` is deploykit's own: it freezes what tf2onnx would turn into required inputs, keeps Keras' input
and output names, names nodes after layers, and refuses in one line what cannot be exported. `export_stock`
is what people run today, as the baseline to compare with.

The steps are `tracing` (Keras to ONNX), `lowering` (the same function in operations that run faster), on request
`lowering.layout` (NCHW at the edge) and `precision` (float16 inside), `canonical` (names and order) and the writing
here. A file is written whole or not at all; with external data the old model goes first and the new model comes last,
so that a model never stands beside data that is not its own.

Limits: no layers that keep state between calls (``stateful=True``), no string, sparse or ragged inputs, no operation
that tf2onnx lacks. Opsets 13 to 18. A model above 2 GB is not lowered: its constants are not in the graph. For the same
reason it has no other layout and precision than its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import keras
import numpy.typing as npt
import onnx
import onnx_ir as ir
import tensorflow as tf
import tf2onnx
from onnx_ir.passes.common import ShapeInferencePass

import deploykit
from deploykit import layout as layouts
from deploykit import runtimes
from deploykit.errors import DeploykitError, InputError, UnsupportedModelError
from deploykit.export import canonical, lowering, tracing
from deploykit.export import precision as narrowing
from deploykit.export.lowering import layout as edge
from deploykit.files import claim, data_path, whole_file
from deploykit.graph import flat_call
from deploykit.graph import signature as signature_of
from deploykit.signature import Signature, TensorSpec

__all__ = ["ALL_LOWERINGS", "Exported", "export", "export_stock"]

# Above this many bytes of constants the data goes to a file of its own. A protobuf message ends at 2^31;
# the rest is room for the graph itself and for constants that folding makes larger.
EXTERNAL_ABOVE_BYTES = 1_900_000_000
ALIGNMENT_BYTES = 4096  # external tensors start at a page, so that they can be mapped

ALL_LOWERINGS = tuple(row.name for row in lowering.LOWERINGS)
PLAIN, STOCK, STOCK_FROZEN = "deploykit", "stock", "stock, captures frozen"


@dataclass(frozen=True)
class Exported:
    """What was written. ``bytes`` counts the external data too; ``kind`` says which exporter made it.

    ``signature`` is the file's own, in its ``layout``. ``lowered``: how many places each lowering rewrote.
    ``unlowered``: the same file without lowering, where that was asked for and differs.
    """

    path: Path
    opset: int
    signature: Signature
    bytes: int
    notices: tuple[str, ...]
    external_data: bool
    kind: str = PLAIN
    operations: int = 0  # nodes that compute something
    lowered: Mapping[str, int] = field(default_factory=dict)
    unlowered: Path | None = None
    layout: str = layouts.NHWC
    precision: str = narrowing.FP32


def export(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    opset: int = 18,
    batch: int | None = None,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
    external_above: int = EXTERNAL_ABOVE_BYTES,
    without: Collection[str] = (),
    unlowered: str | os.PathLike[str] | None = None,
    layout: str = layouts.NHWC,
    precision: str = narrowing.FP32,
) -> Exported:
    """Write ``model`` as ONNX, with the names, shapes and dtypes it has in Keras.

    ``layout`` "nchw": but images (inputs and outputs of rank 4) are NCHW. ``precision`` "fp16": it computes in float16,
    and inputs and outputs keep their dtypes. The file's metadata say so.

    ``batch`` fixes the batch size; None leaves it free. ``metadata`` goes into the file's ``metadata_props``.
    ``without`` names the lowerings to leave out; ``unlowered`` is where to write the file without any, too, if one
    of them changes something. More than ``external_above`` bytes of constants go to ``<path>.data``. The model
    is not changed. Raises UnsupportedModelError for what ONNX or tf2onnx cannot express, OutputError
    where the file exists (without ``force``) or cannot be written.
    """
    path = claim(path, force=force)
    wanted = _Wanted(layouts.known(layout), narrowing.known(precision))
    signature = _fixed(_exportable(model), batch)
    paths: dict[str, str] = {}
    with tracing.recorded() as records:
        function = tracing.concrete(model, signature, paths)
        large = tracing.frozen_bytes(function) > external_above
        if large:
            claim(data_path(path), force=force)
        outside = max(tracing.SMALL_CONSTANT_BYTES, external_above // 2000) if large else None
        frozen = tracing.freeze(function, paths, outside_bytes=outside)
        converted, contents, notices = tracing.convert(frozen, opset, records)

    if contents and wanted.changes:
        raise UnsupportedModelError(
            "the model's constants are too large for one file, so that it can only be exported as it is;"
            f" leave out {' and '.join(wanted.changes)}"
        )
    record = {**(metadata or {}), **wanted.metadata()}

    def written(proto: Any, path: Path) -> tuple[int, bool]:
        new = canonical.canonicalise(proto, wanted.signature(signature), _known(frozen), model.name, opset)
        outside = {new[name]: content for name, content in contents.items() if name in new}
        proto.producer_name, proto.producer_version = "deploykit", deploykit.__version__
        onnx.helper.set_model_props(proto, dict(sorted(record.items())))
        return _write(proto, outside, path, force=force, external_above=external_above)

    proto, lowered = (converted, {}) if contents else lowering.lower(converted, without=without)
    proto, more = wanted.applied(proto, signature)
    notices += more
    plain = claim(unlowered, force=force) if unlowered is not None and any(lowered.values()) else None
    if plain is not None:
        converted, more = wanted.beside(converted, signature)
        notices += more
        plain = None if converted is None else plain
    size, external = written(proto, path)
    if plain is not None:
        written(converted, plain)
    operations = sum(node.op_type not in ("Identity", "Constant") for node in proto.graph.node)
    return Exported(
        path,
        opset,
        wanted.signature(signature),
        size,
        tuple(notices),
        external,
        operations=operations,
        lowered=lowered,
        unlowered=plain,
        layout=layout,
        precision=precision,
    )


@dataclass(frozen=True)
class _Wanted:
    """What a file has otherwise than the model, because the user wants it so."""

    layout: str
    precision: str

    @property
    def changes(self) -> list[str]:
        """The options that say so."""
        given = (("layout", self.layout, layouts.NHWC), ("precision", self.precision, narrowing.FP32))
        return [f"--{name} {value}" for name, value, default in given if value != default]

    def metadata(self) -> dict[str, str]:
        """What the file says of it."""
        turned = {layouts.PROPERTY: self.layout.upper()} if self.layout == layouts.NCHW else {}
        half = {narrowing.PROPERTY: narrowing.POLICY[self.precision]} if self.precision == narrowing.FP16 else {}
        return turned | half

    def signature(self, of: Signature) -> Signature:
        """The file's, of a model's."""
        return layouts.permuted(of, layouts.TO_NCHW) if self.layout == layouts.NCHW else of

    def beside(self, proto: Any, signature: Signature) -> tuple[Any | None, list[str]]:
        """The same of the graph without lowering; None, and why, where it cannot be had without."""
        try:
            return self.applied(proto, signature)[0], []
        except UnsupportedModelError as error:
            return None, [f"no file without lowering beside it: {error}"]

    def applied(self, proto: Any, signature: Signature) -> tuple[Any, list[str]]:
        """The graph as it is wanted, and what there is to say about it."""
        if not self.changes:
            return proto, []
        canonical.rename_io(proto, signature)  # for what is said of them
        model, notices = ir.from_proto(proto), []
        for values, specs in ((model.graph.inputs, signature.inputs), (model.graph.outputs, signature.outputs)):
            for value, spec in zip(values, specs, strict=True):
                if value.shape is None:
                    value.shape = ir.Shape(spec.shape)
        infer = ShapeInferencePass(strict_mode=False)
        infer(model)
        if self.layout == layouts.NCHW:
            edge.nchw(model)
            infer(model)
            notices.append("images go in and come out as NCHW: transpose what is NHWC before it is given to the file")
        if self.precision == narrowing.FP16:
            notices += narrowing.to_float16(model).notices()
        return ir.to_proto(model), notices


def export_stock(
    model: keras.Model,
    path: str | os.PathLike[str],
    sample: Mapping[str, npt.NDArray[Any]],
    *,
    opset: int = 18,
    force: bool = False,
) -> Exported:
    """Write ``model`` as tf2onnx does it by itself; where that file cannot run on ``sample``, with frozen captures.

    Only inputs and outputs are renamed to Keras' names, so that the file can be compared; that costs no
    time at inference. ``sample`` has one array per input of the model. Raises UnsupportedModelError
    where neither way gives a file that runs.
    """
    path = claim(path, force=force)
    signature = _exportable(model)
    reasons = []
    for kind, converted in STOCK_WAYS.items():
        try:
            with tracing.recorded():
                proto = converted(model, signature, opset)
                if len(proto.graph.input) != len(signature.inputs):
                    raise UnsupportedModelError(f"the file asks for {len(proto.graph.input)} inputs")
                canonical.rename_io(proto, signature)
            with whole_file(path, force=force) as part:
                onnx.save_model(proto, os.fspath(part))
                session = runtimes.open("onnxruntime-cpu", part)
                session.run(sample)
                session.close()
        except DeploykitError as error:
            reasons.append(f"{kind}: {error}")
        except Exception as error:  # tf2onnx and TensorFlow raise anything
            reasons.append(f"{kind}: {tracing.first_line(error)}")
        else:
            notices = tuple(f"not exportable as {reason}" for reason in reasons)
            return Exported(path, opset, signature, path.stat().st_size, notices, False, kind)
    raise UnsupportedModelError(f"model {model.name} has no stock export that runs ({'; '.join(reasons)})")


def _stock(model: Any, signature: Signature, opset: int) -> Any:
    function = tf.function(flat_call(model))
    return tf2onnx.convert.from_function(function, input_signature=_tf_specs(signature), opset=opset)[0]


def _stock_frozen(model: Any, signature: Signature, opset: int) -> Any:
    function = tf.function(flat_call(model)).get_concrete_function(*_tf_specs(signature))
    own = function.inputs[: len(function.inputs) - len(function.captured_inputs)]
    inputs, outputs = [tensor.name for tensor in own], [tensor.name for tensor in function.outputs]
    with tf.device("/cpu:0"):
        graph_def = tf2onnx.tf_loader.from_function(function, inputs, outputs)
        return tf2onnx.convert._convert_common(
            graph_def, continue_on_error=True, opset=opset, input_names=inputs, output_names=outputs
        )[0]


STOCK_WAYS: dict[str, Callable[[Any, Signature, int], Any]] = {STOCK: _stock, STOCK_FROZEN: _stock_frozen}


def _tf_specs(signature: Signature) -> list[Any]:
    return [tf.TensorSpec(spec.shape, spec.dtype, f"input_{i}") for i, spec in enumerate(signature.inputs)]


# ------------------------------------------------------------------------------------------------- before


def _exportable(model: Any) -> Signature:
    """The model's signature; refuses what can be seen to be hopeless before any work is done."""
    if not isinstance(model, keras.Model):
        raise InputError(f"cannot export a {type(model).__name__}; give a keras.Model")
    for layer in model._flatten_layers():
        if getattr(layer, "stateful", False):
            raise UnsupportedModelError(
                f"layer {layer.name} keeps its state between calls, which an ONNX file cannot;"
                " build it with stateful=False, or make the state an input"
            )
    signature = signature_of(model)
    names = [spec.name for spec in signature]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UnsupportedModelError(f"several inputs or outputs are called {', '.join(repeated)}; rename their layers")
    for spec in signature:
        if spec.dtype == "string" or spec.dtype.startswith("complex"):
            raise UnsupportedModelError(f"{spec.name} is a {spec.dtype} tensor, which cannot be exported")
    return signature


def _fixed(signature: Signature, batch: int | None) -> Signature:
    if batch is None:
        return signature
    if batch < 1:
        raise InputError(f"batch must be at least 1, not {batch}")

    def fix(spec: TensorSpec) -> TensorSpec:
        return replace(spec, shape=(batch, *spec.shape[1:])) if spec.shape[:1] == (None,) else spec

    for spec in signature.inputs:
        if spec.shape[:1] not in ((None,), (batch,)):
            raise InputError(f"input {spec} has a fixed batch size; export without batch={batch}")
    return Signature(tuple(map(fix, signature.inputs)), tuple(map(fix, signature.outputs)))


def _known(frozen: tracing.Frozen) -> Callable[[str], str | None]:
    return lambda name: frozen.path(name) if name.partition("/")[0] in frozen.paths else None


# ------------------------------------------------------------------------------------------------ writing


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(os.fspath(path), full_check=True)
    except Exception as error:  # checker and shape inference have exception classes of their own
        raise UnsupportedModelError(
            f"tf2onnx made an invalid graph of this model ({tracing.first_line(error)}); try another --opset"
        ) from error


def _write(proto: Any, contents: dict[str, bytes], path: Path, *, force: bool, external_above: int) -> tuple[int, bool]:
    """Check and write a model; returns the bytes on disk and whether there is external data."""
    if not contents and sum(len(constant.raw_data) for constant in proto.graph.initializer) > external_above:
        for constant in proto.graph.initializer:
            if len(constant.raw_data) > tracing.SMALL_CONSTANT_BYTES:
                contents[constant.name] = constant.raw_data
                constant.ClearField("raw_data")
    external = bool(contents)
    try:
        with whole_file(path, force=force) as part:
            if external:
                _write_external(proto, contents, part, path, force=force)
            else:
                part.write_bytes(proto.SerializeToString(deterministic=True))
                _check(part)
    except BaseException:
        if external and not path.exists():
            data_path(path).unlink(missing_ok=True)
        raise
    size = path.stat().st_size + (data_path(path).stat().st_size if external else 0)
    return size, external


def _write_external(proto: Any, contents: dict[str, bytes], part: Path, path: Path, *, force: bool) -> None:
    """Write the data whole, then the model that points to it to ``part``."""
    constants = [constant for constant in proto.graph.initializer if constant.name in contents]
    with whole_file(data_path(path), force=force) as data:
        with open(data, "wb") as stream:
            for constant in constants:
                content = contents.pop(constant.name)
                stream.write(bytes(-stream.tell() % ALIGNMENT_BYTES))
                constant.data_location = onnx.TensorProto.EXTERNAL
                for key, value in (("location", data.name), ("offset", stream.tell()), ("length", len(content))):
                    constant.external_data.add(key=key, value=str(value))
                stream.write(content)
        part.write_bytes(proto.SerializeToString(deterministic=True))
        _check(part)
        for constant in constants:
            constant.external_data[0].value = data_path(path).name
        part.write_bytes(proto.SerializeToString(deterministic=True))
        path.unlink(missing_ok=True)  # from here on the old model, if any, has lost its data
