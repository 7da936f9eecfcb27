"""An exported file computes what the model computes, under the model's own names, the same bytes every time."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import pytest
import tensorflow as tf
import tf2onnx

from deploykit import runtimes
from deploykit.errors import InputError, OutputError, UnsupportedModelError
from deploykit.export import Exported, canonical, export, export_stock, tracing
from deploykit.graph import signature as keras_signature
from deploykit.signature import Signature, TensorSpec

L = keras.layers
Net = Callable[[], keras.Model]
NETS: dict[str, Net] = {}


def net(build: Net) -> Net:
    NETS[build.__name__] = build
    return build


def image(channels: int = 4, size: int = 8) -> Any:
    return L.Input((size, size, channels), name="image")


@net
def mlp() -> keras.Model:
    return keras.Sequential([L.Input((6,)), L.Dense(8, "relu"), L.BatchNormalization(), L.Dense(3, "softmax")])


@net
def grouped_2d() -> keras.Model:
    x = L.Conv2D(8, 3, groups=2, padding="same")(i := image())
    return keras.Model(i, L.Conv2D(6, 3, groups=2, strides=2, use_bias=False)(L.BatchNormalization()(x)))


@net
def grouped_1d() -> keras.Model:
    x = L.Conv1D(6, 3, groups=3, padding="causal", dilation_rate=2)(i := L.Input((20, 6), name="s"))
    return keras.Model(i, L.Conv1D(12, 5, groups=6, strides=2)(x))


@net
def grouped_3d() -> keras.Model:
    return keras.Model(i := L.Input((6, 6, 6, 4)), L.Conv3D(4, 3, groups=2)(i))


@net
def grouped_in_nested_sequential() -> keras.Model:
    inner = keras.Sequential([L.Input((8, 8, 4)), L.Conv2D(8, 3, groups=4, padding="same"), L.ReLU()], name="inner")
    return keras.Model(i := image(), L.GlobalAveragePooling2D()(inner(i)))


@net
def what_reducing_leaves() -> keras.Model:
    """One addition per channel, along two axes, as `deploykit fuse` writes it."""
    x = L.Rescaling(1.0, offset=[0.1, -0.2, 0.3, 0.4])(L.Activation("tanh")(i := image()))
    x = L.Rescaling(1.0, offset=[[[0.1]], [[0.2]], [[-0.3]], [[0.4]], [[0.5]], [[0.6]], [[0.7]], [[0.8]]])(x)
    return keras.Model(i, L.Conv2D(3, 3, padding="same")(x))


@net
def what_a_padded_shift_leaves() -> keras.Model:
    """A constant pad in front of a convolution that pads no more, as `deploykit fuse` writes it."""
    x = keras.ops.pad(i := image(), ((0, 0), (1, 1), (0, 1), (0, 0)), constant_values=127.5)
    return keras.Model(i, L.Conv2D(3, 3)(x))


@net
def channels_first() -> keras.Model:
    x = L.Conv2D(6, 3, groups=2, data_format="channels_first")(i := L.Input((4, 9, 9)))
    x = L.MaxPooling2D(data_format="channels_first")(L.BatchNormalization(axis=1)(x))
    return keras.Model(i, L.DepthwiseConv2D(3, data_format="channels_first")(x))


@net
def channels_first_3d() -> keras.Model:
    return keras.Model(i := L.Input((2, 6, 6, 6)), L.Conv3D(4, 3, data_format="channels_first")(i))


@net
def bias_along_the_width() -> keras.Model:
    """Keras' `add` would take the last axis for the channels, because its size fits."""
    return keras.Model(i := L.Input((4, 8, 8)), L.Conv2D(6, 3, groups=2, data_format="channels_first")(i))


@net
def lstm_with_states() -> keras.Model:
    return keras.Model(i := L.Input((7, 5), name="seq"), L.LSTM(4, return_state=True)(i))


@net
def bidirectional_gru_of_any_length() -> keras.Model:
    return keras.Model(i := L.Input((None, 5), name="seq"), L.Bidirectional(L.GRU(4, return_sequences=True))(i))


@net
def masked_embedding() -> keras.Model:
    x = L.LSTM(4)(L.Embedding(30, 6, mask_zero=True)(i := L.Input((9,), dtype="int32", name="token")))
    return keras.Model(i, L.Dense(2)(L.Dropout(0.5)(L.GaussianNoise(0.1)(x))))


@net
def adapted_squeeze_and_excite() -> keras.Model:
    """Like EfficientNet: Rescaling, adapted Normalization, swish, squeeze-and-excite."""
    normalization = L.Normalization(mean=[0.3, 0.5, 0.1], variance=[0.2, 4.0, 0.05])
    x = normalization(L.Rescaling(1 / 255, offset=[1.0, 2.0, 3.0])(i := image(3)))
    x = L.Conv2D(4, 3, padding="same", activation="swish")(x)
    gate = L.Conv2D(2, 1, activation="swish")(L.GlobalAveragePooling2D(keepdims=True)(x))
    x = L.Multiply()([x, L.Conv2D(4, 1, activation="sigmoid")(gate)])
    return keras.Model(i, L.Dense(3)(L.GlobalAveragePooling2D()(x)))


@net
def scalar_after_convolution() -> keras.Model:
    """As in a hard swish: relu6(conv(x) + 3)."""
    x = L.ReLU(6.0)(L.Rescaling(1.0, offset=3.0)(L.Conv2D(8, 3, use_bias=False)(i := image())))
    return keras.Model(i, L.Conv2D(3, 3)(x))


@net
def dicts() -> keras.Model:
    b, a = L.Input((3,), name="b"), L.Input((2,), name="a")
    return keras.Model({"b": b, "a": a}, {"y": L.Dense(1)(b), "x": L.Concatenate()([a, b])})


@net
def one_tensor_as_many_outputs() -> keras.Model:
    a, b = L.Input((3,), name="z"), L.Input((2,))
    y = L.Dense(1, name="d")(a)
    return keras.Model([a, (b,)], {"y": [y, a], "a": L.Concatenate()([a, b]), "q": y, "p": L.Identity()(a)})


@net
def shared_layer() -> keras.Model:
    y = (shared := L.Dense(4, name="shared"))(i := L.Input((4,), name="x"))
    return keras.Model(i, [y, shared(shared(y)), y])


@net
def mixed_float16() -> keras.Model:
    policy = keras.DTypePolicy("mixed_float16")
    x = L.BatchNormalization(dtype=policy)(L.Conv2D(4, 3, dtype=policy)(i := image()))
    return keras.Model(i, L.Dense(3, dtype=policy)(L.GlobalAveragePooling2D(dtype=policy)(x)))


@net
def float64() -> keras.Model:
    return keras.Model(i := L.Input((4,), dtype="float64"), L.Dense(3, dtype="float64")(i))


@net
def unusual_names() -> keras.Model:
    return keras.Model(i := L.Input((4,), name="my input.1:x y"), L.Dense(2, name="Out-put.2")(i))


@net
def transposed_and_resized() -> keras.Model:
    x = L.BatchNormalization()(L.Conv2DTranspose(5, 3, strides=2, padding="same")(i := image()))
    x = L.SeparableConv2D(3, 3)(L.UpSampling2D(interpolation="bilinear")(x))
    return keras.Model(i, L.PReLU(shared_axes=[1, 2])(L.ZeroPadding2D()(x)))


@net
def attention_with_exact_gelu() -> keras.Model:
    x = L.MultiHeadAttention(2, 4)(i := L.Input((5, 8)), i)
    return keras.Model(i, L.Dense(3, activation="gelu")(L.LayerNormalization()(x + i)))


@net
def convolutional_lstm() -> keras.Model:
    return keras.Model(i := L.Input((3, 6, 6, 2)), L.ConvLSTM2D(3, 3)(i))


@net
def batch_statistics() -> keras.Model:
    return keras.Model(i := L.Input((4,)), L.BatchNormalization()(i, training=True))


@net
def any_image_size() -> keras.Model:
    i = L.Input((None, None, 3), name="image")
    return keras.Model(i, [L.Conv2D(2, 3, padding="same")(i), L.GlobalMaxPooling2D()(i)])


def alive(model: keras.Model) -> keras.Model:
    """Every weight drawn anew, variances positive."""
    rng = np.random.default_rng(1)
    for weight in model.weights:
        if weight.dtype.startswith("float"):
            draw = rng.normal(0, 0.5, weight.shape)
            weight.assign(np.abs(draw) + 0.3 if "variance" in weight.name else draw)
    return model


def sample(signature: Signature, batch: int) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    shapes = {spec: (batch, *spec.sample_shape(5)) for spec in signature.inputs}
    return {
        spec.name: (rng.integers(0, 20, shape) if "int" in spec.dtype else rng.normal(0, 1, shape)).astype(spec.dtype)
        for spec, shape in shapes.items()
    }


def assert_agree(model: keras.Model, path: Path, batches: tuple[int, ...] = (1, 3)) -> None:
    reference, candidate = runtimes.open("keras", model), runtimes.open("onnxruntime-cpu", path)
    for batch in batches:
        inputs = sample(reference.signature, batch)
        expected, found = reference.run(inputs), candidate.run(inputs)
        assert list(expected) == list(found)
        for name, want in expected.items():
            assert want.shape == found[name].shape
            assert want.dtype == found[name].dtype
            scale = float(np.abs(want.astype(np.float64)).max(initial=0)) or 1.0
            tolerance = 3e-3 if want.dtype == np.float16 else 1e-6
            np.testing.assert_allclose(found[name].astype(np.float64), want, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", NETS)
def test_the_file_has_the_signature_and_computes_what_keras_computes(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = alive(NETS[name]())
    made = export(model, tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")
    assert made.signature == keras_signature(model)
    assert made.signature.differences(runtimes.open("onnxruntime-cpu", made.path).signature) == []
    assert (made.notices, made.external_data, made.opset) == ((), False, 18)
    assert made.bytes == made.path.stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert_agree(model, made.path)


@pytest.mark.parametrize("opset", [13, 15, 17])
def test_older_opsets_work_too(opset: int, tmp_path: Path) -> None:
    made = export(model := alive(adapted_squeeze_and_excite()), tmp_path / "m.onnx", opset=opset)
    assert [(entry.domain, entry.version) for entry in onnx.load(made.path).opset_import] == [("", opset)]
    assert_agree(model, made.path)


def test_a_fixed_batch_is_fixed_everywhere(tmp_path: Path) -> None:
    made = export(model := alive(mlp()), tmp_path / "m.onnx", batch=3)
    session = runtimes.open("onnxruntime-cpu", made.path)
    assert [spec.shape for spec in session.signature] == [(3, 6), (3, 3)]
    assert_agree(model, made.path, batches=(3,))


def test_free_sizes_have_names(tmp_path: Path) -> None:
    graph = onnx.load(export(any_image_size(), tmp_path / "m.onnx").path).graph
    assert [dim.dim_param or dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim] == [
        *("batch", "image_dim1", "image_dim2", 3)
    ]


def test_nodes_lead_back_to_layers_even_where_names_look_like_tensorflows_numbering(tmp_path: Path) -> None:
    x = i = image()
    for name in ("conv", "conv_1", "conv__1"):
        x = L.Activation("relu", name=f"act_{name}")(L.Conv2D(4, 3, padding="same", name=name)(x))
    inner = keras.Sequential([L.Input((8, 8, 4)), L.Conv2D(4, 1, name="conv")], name="inner")
    graph = onnx.load(export(alive(keras.Model(i, inner(x))), tmp_path / "m.onnx").path).graph
    convolutions = [node.name for node in graph.node if node.op_type == "Conv"]
    assert convolutions == ["conv/Conv", "conv_1/Conv", "conv__1/Conv", "inner/conv/Conv"]
    activations = [node.name for node in graph.node if node.op_type == "Relu"]
    assert activations == ["act_conv/Relu", "act_conv_1/Relu", "act_conv__1/Relu"]
    assert {"conv/Conv/W", "conv/Conv/B"} <= {constant.name for constant in graph.initializer}


def test_layer_names_that_tensorflow_refuses_are_exported(tmp_path: Path) -> None:
    model = keras.Sequential([L.Input((4,), name="größe"), L.Dense(3, name="_dichte 1"), L.Dense(2, name="dense é")])
    graph = onnx.load(export(model, tmp_path / "m.onnx").path).graph
    assert (graph.input[0].name, graph.output[0].name) == ("größe", "dense é")
    assert {"_dichte 1/MatMul", "dense é/MatMul"} <= {node.name for node in graph.node}


def test_a_scalar_does_not_keep_transposes_in_the_graph(tmp_path: Path) -> None:
    graph = onnx.load(export(scalar_after_convolution(), tmp_path / "m.onnx").path).graph
    assert Counter(node.op_type for node in graph.node)["Transpose"] == 2  # in and out


def test_metadata_is_written_in_order(tmp_path: Path) -> None:
    made = export(mlp(), tmp_path / "m.onnx", metadata={"source_sha256": "ab", "decisions": "[]"})
    assert [(p.key, p.value) for p in onnx.load(made.path).metadata_props] == [
        *(("decisions", "[]"), ("source_sha256", "ab"))
    ]


def mobilenet() -> keras.Model:
    return keras.applications.MobileNetV3Small((32, 32, 3), weights=None)


SAVED: dict[str, Net] = {
    build.__name__: build
    for build in (
        adapted_squeeze_and_excite,
        attention_with_exact_gelu,
        bidirectional_gru_of_any_length,
        convolutional_lstm,
        masked_embedding,
        mixed_float16,
        mobilenet,
        one_tensor_as_many_outputs,
        scalar_after_convolution,
    )
}

TWO_PROCESSES = """
import sys, keras
from deploykit.export import export
folder, run, *names = sys.argv[1:]
print("imported", file=sys.stderr, flush=True)
for name in names:
    export(keras.models.load_model(f"{folder}/{name}.keras"), f"{folder}/{name}.{run}.onnx")
"""


@pytest.mark.slow
def test_the_same_model_gives_the_same_bytes_in_any_process_and_order_and_prints_nothing(tmp_path: Path) -> None:
    for name, build in SAVED.items():
        alive(build()).save(tmp_path / f"{name}.keras")
    runs = {"a": list(SAVED), "b": list(reversed(SAVED))}
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(tmp_path), run, *names],
            env={**environment, "PYTHONHASHSEED": str(seed)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed, (run, names) in enumerate(runs.items(), 1)
    ]
    for process in processes:
        out, err = process.communicate()
        assert (process.returncode, out, err.partition("imported\n")[2]) == (0, "", "")
    for name in SAVED:
        first, second = ((tmp_path / f"{name}.{run}.onnx").read_bytes() for run in runs)
        assert first == second, name
        assert re.search(rb"__\d{5,}", first) is None, f"{name} holds a name numbered by tf2onnx"


def test_the_same_model_gives_the_same_bytes_twice(tmp_path: Path) -> None:
    model = alive(masked_embedding())
    paths = [export(model, tmp_path / f"{i}.onnx").path for i in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


# ------------------------------------------------------------------------------------------ external data


def large() -> keras.Model:
    x = L.Conv2D(16, 3, groups=2, padding="same")(i := image(16))
    x = L.LSTM(8)(L.Reshape((-1, 16))(L.BatchNormalization()(x)))
    return alive(keras.Model(i, L.Dense(64)(L.Normalization(mean=0.2, variance=2.0)(x))))


def test_large_models_keep_their_data_beside_them(tmp_path: Path) -> None:
    model = large()
    made = export(model, tmp_path / "m.onnx", external_above=4000)
    data = tmp_path / "m.onnx.data"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert made.external_data
    assert made.bytes == made.path.stat().st_size + data.stat().st_size
    tensors = onnx.load(made.path, load_external_data=False).graph.initializer
    entries = [{e.key: e.value for e in t.external_data} for t in tensors if t.external_data]
    assert len(entries) == 3  # the kernels, but for the LSTM's small recurrent one
    assert all(e["location"] == "m.onnx.data" and int(e["offset"]) % 4096 == 0 for e in entries)
    assert sum(len(t.raw_data) for t in tensors) < 4000
    assert_agree(model, made.path)
    before = made.path.read_bytes(), data.read_bytes()
    export(model, made.path, external_above=4000, force=True)
    assert (made.path.read_bytes(), data.read_bytes()) == before


def test_data_that_only_became_large_on_the_way_goes_out_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "frozen_bytes", lambda function: 0)
    made = export(model := large(), tmp_path / "m.onnx", external_above=4000)
    assert made.external_data
    assert_agree(model, made.path)


def test_external_data_is_not_overwritten_without_force_and_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "m.onnx.data").write_text("mine")
    with pytest.raises(OutputError, match=r"m.onnx.data exists already"):
        export(large(), tmp_path / "m.onnx", external_above=4000)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("m.onnx.data", "mine")]


def test_a_model_never_stands_beside_data_that_is_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(large(), tmp_path / "m.onnx", external_above=4000)
    rename = os.replace

    def fails_for_the_model(source: Any, target: Any) -> None:
        if Path(target).suffix == ".onnx":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fails_for_the_model)
    with pytest.raises(OutputError, match="input/output error"):
        export(large(), tmp_path / "m.onnx", external_above=4000, force=True)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_check_leaves_no_file_of_either_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = onnx.checker.ValidationError("made up")
    monkeypatch.setattr(onnx.checker, "check_model", lambda *_, **__: (_ for _ in ()).throw(broken))
    for limit in (4000, 10**9):
        with pytest.raises(UnsupportedModelError, match=r"made an invalid graph of this model .*made up"):
            export(large(), tmp_path / "m.onnx", external_above=limit)
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------- refusals


def _fft() -> keras.Model:
    return keras.Model(i := L.Input((8,)), L.Lambda(lambda t: tf.math.lgamma(t), name="spectrum")(i))


def _stateful() -> keras.Model:
    return keras.Model(i := L.Input(batch_shape=(1, 4, 2)), L.LSTM(2, stateful=True, name="memory")(i))


def _string() -> keras.Model:
    return keras.Model(i := L.Input((1,), dtype="string", name="word"), L.StringLookup(vocabulary=["a"])(i))


def _fixed_batch() -> keras.Model:
    return keras.Model(i := L.Input(batch_shape=(2, 3), name="pair"), L.Dense(1)(i))


def _raising() -> keras.Model:
    def call(tensor: Any) -> Any:
        if not isinstance(tensor, keras.KerasTensor):
            raise RuntimeError("out of order")
        return tensor

    return keras.Model(i := L.Input((3,)), L.Lambda(call, output_shape=(3,))(i))


REFUSED: dict[str, Callable[[Path], object]] = {
    "operation Lgamma of layer spectrum has no ONNX form": lambda p: export(_fft(), p),
    "layer memory keeps its state between calls": lambda p: export(_stateful(), p),
    "word is a string tensor": lambda p: export(_string(), p),
    "has no input shape": lambda p: export(keras.Sequential([L.Dense(1)]), p),
    "cannot export a list; give a keras.Model": lambda p: export([], p),  # type: ignore[arg-type]
    "opset 99 cannot be written; choose one from 13 to 18": lambda p: export(mlp(), p, opset=99),
    "batch must be at least 1, not 0": lambda p: export(mlp(), p, batch=0),
    r"input pair float32 \[2, 3\] has a fixed batch size": lambda p: export(_fixed_batch(), p, batch=3),
    "cannot be traced: RuntimeError: .*out of order": lambda p: export(_raising(), p),
    "no stock export that runs": lambda p: export_stock(_fft(), p, {"x": np.ones((1, 8), np.float32)}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_exported_is_refused_in_one_line_and_leaves_no_file(
    message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        REFUSED[message](tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_an_existing_file_is_replaced_only_with_force(tmp_path: Path) -> None:
    (path := tmp_path / "m.onnx").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        export(mlp(), path)
    assert path.read_text() == "mine"
    assert_agree(model := mlp(), export(model, path, force=True).path)


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        ((None, 3), (None, 2), r"input a float32 \[\?, 3\] of the model would become float32 \[\?, 2\]"),
        ((None, 2), (None,), r"output b float32 \[\?\] of the model would become float32 \[\?, 2\]"),
        ((None, 2), None, r"the model has 0 outputs but its ONNX graph has 1"),
    ],
)
def test_a_signature_that_drifts_is_refused(x: tuple[int, ...], y: tuple[int, ...] | None, said: str) -> None:
    text = '<ir_version: 8, opset_import: ["": 18]> g (float[n,2] x) => (float[n,2] y) { y = Abs(x) }'
    outputs = () if y is None else (TensorSpec("b", y, "float32"),)
    wanted = Signature((TensorSpec("a", x, "float32"),), outputs)
    with pytest.raises(UnsupportedModelError, match=said):
        canonical.canonicalise(onnx.parser.parse_model(text), wanted, lambda name: None, "m", 18)


def test_the_model_and_everything_global_stay_as_they_were(tmp_path: Path) -> None:
    model = alive(masked_embedding())
    loggers = [logging.getLogger(name) for name in (None, "tf2onnx", "tensorflow", "absl", "tf2onnx.tfonnx")]

    def state() -> list[object]:
        return [
            [(tuple(x.handlers), x.level, x.propagate, x.disabled) for x in loggers],
            keras.config.dtype_policy().name,
            keras.config.floatx(),
            random.getstate(),
            [str(part) for part in np.random.get_state()],  # noqa: NPY002  # the state that must not change
            tf.config.threading.get_intra_op_parallelism_threads(),
            list(warnings.filters),
            tf2onnx.utils.INTERNAL_NAME,
            tf.executing_eagerly(),
            [weight.tobytes() for weight in model.get_weights()],
            [layer.name for layer in model.layers],
            model.get_config(),
        ]

    before = state()
    export(model, tmp_path / "m.onnx")
    with contextlib.suppress(UnsupportedModelError):
        export(_fft(), tmp_path / "n.onnx")
    assert state() == before


def test_what_others_log_meanwhile_is_passed_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = logging.getLogger("tf2onnx")
    monkeypatch.setattr(theirs, "handlers", [caplog.handler])  # even where somebody listens to it
    with tracing.recorded() as records:
        logging.getLogger("elsewhere").warning("heard")
        logging.getLogger("tf2onnx.tfonnx").warning("kept")
    assert [record.message for record in caplog.records] == ["heard"]
    assert [record.msg for record in records] == ["kept"]
    assert theirs.handlers == [caplog.handler]


def test_an_optimizer_that_fails_is_a_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("made up")

    monkeypatch.setattr(tracing._Transposes, "_add_handler", fail)
    made = export(model := alive(scalar_after_convolution()), tmp_path / "m.onnx")
    assert [notice.partition(";")[0] for notice in made.notices] == ["an optimizer of tf2onnx failed and was skipped"]
    assert_agree(model, made.path)


# -------------------------------------------------------------------------------------------------- stock


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (mlp, "stock"),
        (dicts, "stock"),
        (scalar_after_convolution, "stock"),
        (adapted_squeeze_and_excite, "stock, captures frozen"),
    ],
)
def test_stock_is_what_tf2onnx_makes_or_that_with_frozen_captures(
    build: Net, kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = alive(build())
    made = export_stock(model, tmp_path / "m.onnx", sample(keras_signature(model), 2))
    assert isinstance(made, Exported)
    assert made.kind == kind
    assert len(made.notices) == (kind != "stock")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert capfd.readouterr() == ("", "")
    assert_agree(model, made.path)


def test_stock_has_none_of_our_repairs(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no stock export that runs"):
        export_stock(model := grouped_2d(), tmp_path / "m.onnx", sample(keras_signature(model), 1))
    assert list(tmp_path.iterdir()) == []
