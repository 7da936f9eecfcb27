"""Nets of an older generation, written by the package that still speaks it. A script, run by tests:

    python tests/legacy_nets.py FOLDER

Builds every net of `NETS` with tf_keras, draws its weights, and writes ``NAME.h5``, ``NAME.keras`` (tf-keras' archive,
but for `ONLY_HDF5`) and ``NAME.npz`` with inputs ``x0``, ``x1``, ... and the answers ``y0``, ``y1``, ... of tf_keras.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NETS: dict[str, Callable[[Any], Any]] = {}


def net(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    NETS[make.__name__] = make
    return make


def _sequential(shape: Any, *kinds: Any, dtype: str | None = None) -> Callable[[Any], Any]:
    """``kinds``: (class name, arguments) per layer."""

    def make(k: Any) -> Any:
        layers = [getattr(k.layers, kind)(**_resolved(k, arguments)) for kind, arguments in kinds]
        return k.Sequential([k.layers.InputLayer(shape, dtype=dtype), *layers])

    return make


def _resolved(k: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value(k) if callable(value) else value for key, value in arguments.items()}


IMAGE, SEQUENCE, VECTOR = (8, 7, 3), (9, 4), (6,)
ROWS: dict[str, Any] = {
    "conv1d": _sequential(SEQUENCE, ("Conv1D", {"filters": 5, "kernel_size": 3, "padding": "causal"})),
    "conv2d_groups": _sequential((8, 7, 4), ("Conv2D", {"filters": 6, "kernel_size": 3, "groups": 2})),
    "conv3d": _sequential((5, 6, 4, 2), ("Conv3D", {"filters": 3, "kernel_size": 2, "strides": 2})),
    "transpose1d": _sequential(SEQUENCE, ("Conv1DTranspose", {"filters": 3, "kernel_size": 3, "strides": 2})),
    "transpose2d": _sequential(
        IMAGE,
        (
            "Conv2DTranspose",
            {"filters": 4, "kernel_size": 3, "strides": 2, "padding": "same", "output_padding": (1, 1)},
        ),
    ),
    "transpose3d": _sequential((4, 4, 3, 2), ("Conv3DTranspose", {"filters": 3, "kernel_size": 2})),
    "depthwise1d": _sequential(SEQUENCE, ("DepthwiseConv1D", {"kernel_size": 3, "depth_multiplier": 2})),
    "depthwise2d": _sequential(
        IMAGE, ("DepthwiseConv2D", {"kernel_size": 3, "depth_multiplier": 2, "dilation_rate": 2})
    ),
    "separable1d": _sequential(SEQUENCE, ("SeparableConv1D", {"filters": 5, "kernel_size": 3})),
    "separable_causal": _sequential(
        SEQUENCE,
        ("SeparableConv1D", {"filters": 5, "kernel_size": 3, "padding": "causal", "dilation_rate": 2}),
        ("SeparableConv1D", {"filters": 2, "kernel_size": 2, "padding": "causal", "strides": 2, "activation": "tanh"}),
    ),
    "spectral": _sequential(
        (4, 8, 7, 3),
        ("TimeDistributed", {"layer": lambda k: k.layers.SpectralNormalization(k.layers.Conv2D(4, 3))}),
        ("SpectralNormalization", {"layer": lambda k: k.layers.Dense(3, use_bias=False)}),
    ),
    "separable2d": _sequential(IMAGE, ("SeparableConv2D", {"filters": 5, "kernel_size": 3, "depth_multiplier": 2})),
    "bn": _sequential(IMAGE, ("BatchNormalization", {}), ("BatchNormalization", {"axis": 1, "scale": False})),
    "sync_bn": _sequential(IMAGE, ("BatchNormalization", {"synchronized": True})),
    "layer_norm": _sequential(SEQUENCE, ("LayerNormalization", {}), ("LayerNormalization", {"axis": [1, 2]})),
    "group_norm": _sequential((8, 7, 4), ("GroupNormalization", {"groups": 2})),
    "unit_norm": _sequential(VECTOR, ("UnitNormalization", {})),
    "dense": _sequential(VECTOR, ("Dense", {"units": 4, "activation": "relu"}), ("Dense", {"units": 3})),
    "einsum": _sequential(SEQUENCE, ("EinsumDense", {"equation": "abc,cd->abd", "output_shape": (None, 5)})),
    "hard_sigmoid_dense": _sequential(VECTOR, ("Dense", {"units": 4, "activation": "hard_sigmoid"})),
    "hard_sigmoid_conv": _sequential(IMAGE, ("Conv2D", {"filters": 4, "kernel_size": 2, "activation": "hard_sigmoid"})),
    "hard_sigmoid_separable": _sequential(
        IMAGE, ("SeparableConv2D", {"filters": 4, "kernel_size": 2, "activation": "hard_sigmoid"})
    ),
    "hard_sigmoid_depthwise": _sequential(IMAGE, ("DepthwiseConv2D", {"kernel_size": 2, "activation": "hard_sigmoid"})),
    "hard_sigmoid_layer": _sequential(VECTOR, ("Dense", {"units": 4}), ("Activation", {"activation": "hard_sigmoid"})),
    "lstm": _sequential(SEQUENCE, ("LSTM", {"units": 5, "return_sequences": True}), ("LSTM", {"units": 3})),
    "lstm_hard": _sequential(SEQUENCE, ("LSTM", {"units": 5, "recurrent_activation": "hard_sigmoid"})),
    "lstm_hard_no_bias": _sequential(
        SEQUENCE, ("LSTM", {"units": 5, "recurrent_activation": "hard_sigmoid", "use_bias": False})
    ),
    "gru": _sequential(SEQUENCE, ("GRU", {"units": 5, "go_backwards": True})),
    "gru_before": _sequential(SEQUENCE, ("GRU", {"units": 5, "reset_after": False})),
    "gru_hard": _sequential(SEQUENCE, ("GRU", {"units": 5, "recurrent_activation": "hard_sigmoid"})),
    "gru_hard_before": _sequential(
        SEQUENCE, ("GRU", {"units": 5, "recurrent_activation": "hard_sigmoid", "reset_after": False})
    ),
    "simple_rnn": _sequential(SEQUENCE, ("SimpleRNN", {"units": 5})),
    "simple_rnn_hard": _sequential(SEQUENCE, ("SimpleRNN", {"units": 5, "activation": "hard_sigmoid"})),
    "rnn_cell": _sequential(SEQUENCE, ("RNN", {"cell": lambda k: k.layers.LSTMCell(4)})),
    "rnn_stack": _sequential(SEQUENCE, ("RNN", {"cell": lambda k: [k.layers.GRUCell(4), k.layers.LSTMCell(3)]})),
    "bidirectional": _sequential(
        SEQUENCE, ("Bidirectional", {"layer": lambda k: k.layers.LSTM(4, recurrent_activation="hard_sigmoid")})
    ),
    "bidirectional_gru": _sequential(
        SEQUENCE,
        ("Bidirectional", {"layer": lambda k: k.layers.GRU(4, return_sequences=True), "merge_mode": "sum"}),
    ),
    "bidirectional_two": _sequential(
        SEQUENCE,
        (
            "Bidirectional",
            {
                "layer": lambda k: k.layers.LSTM(4),
                "backward_layer": lambda k: k.layers.GRU(4, go_backwards=True, recurrent_activation="hard_sigmoid"),
            },
        ),
    ),
    "bidirectional_backwards": _sequential(
        SEQUENCE,
        (
            "Bidirectional",
            {
                "layer": lambda k: k.layers.LSTM(
                    3, go_backwards=True, return_sequences=True, recurrent_activation="hard_sigmoid"
                )
            },
        ),
    ),
    "conv_lstm": _sequential((4, 6, 5, 2), ("ConvLSTM2D", {"filters": 3, "kernel_size": 2})),
    "conv_lstm_hard": _sequential(
        (4, 6, 5, 2),
        ("ConvLSTM2D", {"filters": 3, "kernel_size": 2, "recurrent_activation": "hard_sigmoid"}),
    ),
    "time_distributed": _sequential(
        (4, 8, 7, 3),
        ("TimeDistributed", {"layer": lambda k: k.layers.Conv2D(3, 2)}),
        ("TimeDistributed", {"layer": lambda k: k.layers.BatchNormalization()}),
    ),
    "embedding": _sequential(
        (7,), ("Embedding", {"input_dim": 5, "output_dim": 4, "input_length": 7}), ("Flatten", {}), dtype="int32"
    ),
    "embedding_masked": _sequential(
        (7,),
        ("Embedding", {"input_dim": 5, "output_dim": 4, "mask_zero": True}),
        ("LSTM", {"units": 3}),
        dtype="int32",
    ),
    "masking": _sequential(SEQUENCE, ("Masking", {"mask_value": 0.5}), ("GRU", {"units": 3})),
    "leaky": _sequential(VECTOR, ("Dense", {"units": 5}), ("LeakyReLU", {"alpha": 0.1})),
    "leaky_activation": _sequential(VECTOR, ("Dense", {"units": 5, "activation": "leaky_relu"})),
    "prelu": _sequential(IMAGE, ("PReLU", {"shared_axes": [1, 2]}), ("PReLU", {})),
    "thresholded": _sequential(VECTOR, ("ThresholdedReLU", {"theta": 0.4})),
    "elu": _sequential(VECTOR, ("ELU", {"alpha": 0.7}), ("Softmax", {})),
    "relu6": _sequential(VECTOR, ("ReLU", {"max_value": 6.0, "negative_slope": 0.1, "threshold": 0.2})),
    **{
        f"activation_{name}": _sequential(VECTOR, ("Dense", {"units": 5, "activation": name}))
        for name in ("elu", "exponential", "gelu", "mish", "relu", "selu", "sigmoid", "softmax", "softplus", "swish")
    },
    "pools": _sequential(
        (12, 11, 3),
        ("MaxPooling2D", {"padding": "same"}),
        ("AveragePooling2D", {"pool_size": 2, "strides": 1, "padding": "same"}),
        ("GlobalAveragePooling2D", {"keepdims": True}),
    ),
    "pools1d": _sequential((12, 3), ("MaxPooling1D", {}), ("AveragePooling1D", {}), ("GlobalMaxPooling1D", {})),
    "pools3d": _sequential((6, 6, 6, 2), ("MaxPooling3D", {}), ("GlobalAveragePooling3D", {})),
    "resizing": _sequential(
        IMAGE, ("UpSampling2D", {"size": (2, 3), "interpolation": "bilinear"}), ("Resizing", {"height": 5, "width": 9})
    ),
    "random_crop": _sequential((12, 9, 3), ("RandomCrop", {"height": 7, "width": 4, "seed": 3})),
    "random_crop_of_less": _sequential((5, 9, 3), ("RandomCrop", {"height": 10, "width": 7})),
    "upsampling": _sequential((4, 3, 2, 2), ("UpSampling3D", {"size": 2})),
    "padding": _sequential(
        IMAGE,
        ("ZeroPadding2D", {"padding": ((1, 0), (2, 1))}),
        ("Cropping2D", {"cropping": ((0, 1), (1, 0))}),
    ),
    "padding1d": _sequential(SEQUENCE, ("ZeroPadding1D", {"padding": (2, 0)}), ("Cropping1D", {"cropping": (0, 1)})),
    "cropping1d": _sequential(SEQUENCE, ("Cropping1D", {"cropping": (1, 0)}), ("Cropping1D", {"cropping": (0, 0)})),
    "shapes": _sequential(
        IMAGE,
        ("Permute", {"dims": (2, 1, 3)}),
        ("Reshape", {"target_shape": (-1, 3)}),
        ("Flatten", {}),
        ("RepeatVector", {"n": 3}),
    ),
    "noise": _sequential(
        IMAGE,
        ("Dropout", {"rate": 0.3}),
        ("SpatialDropout2D", {"rate": 0.3}),
        ("GaussianNoise", {"stddev": 0.3}),
        ("GaussianDropout", {"rate": 0.3}),
        ("AlphaDropout", {"rate": 0.3}),
        ("ActivityRegularization", {"l1": 0.1}),
        ("RandomFlip", {}),
        ("RandomRotation", {"factor": 0.2}),
    ),
    "rescaling": _sequential(
        IMAGE, ("Rescaling", {"scale": 0.1, "offset": -1.0}), ("CenterCrop", {"height": 4, "width": 5})
    ),
    "normalization": _sequential(VECTOR, ("Normalization", {"mean": [1.0] * 6, "variance": [2.0] * 6})),
    "regularized": _sequential(
        VECTOR,
        (
            "Dense",
            {
                "units": 4,
                "kernel_regularizer": "l2",
                "kernel_constraint": lambda k: k.constraints.MaxNorm(2.0),
                "kernel_initializer": "he_normal",
            },
        ),
    ),
    "mixed": _sequential(
        VECTOR, ("Dense", {"units": 4, "dtype": "mixed_float16"}), ("Dense", {"units": 3, "dtype": "float32"})
    ),
    "dynamic_length": _sequential((None, 3), ("Conv1D", {"filters": 4, "kernel_size": 3, "padding": "same"})),
}
NETS.update(ROWS)


@net
def adapted(k):
    import numpy as np

    layer = k.layers.Normalization()
    layer.adapt(np.random.default_rng(0).normal(3, 2, (50, 6)).astype("float32"))
    return k.Sequential([k.layers.InputLayer((6,)), layer, k.layers.Dense(3)])


@net
def no_input_layer(k):
    return k.Sequential([k.layers.Dense(4, input_shape=(6,)), k.layers.BatchNormalization(), k.layers.ReLU()])


@net
def built_later(k):
    model = k.Sequential([k.layers.Dense(4), k.layers.ReLU()])
    model.build((None, 6))
    return model


@net
def merges(k):
    a, b = k.Input((6,), name="a"), k.Input((6,), name="b")
    pieces = [getattr(k.layers, n)()([a, b]) for n in ("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum")]
    dot = k.layers.Dot(1, normalize=True)([a, b])
    return k.Model([a, b], k.layers.Concatenate(axis=-1)([*pieces, dot]))


@net
def several_outputs(k):
    x = k.Input((9, 4))
    y, h, c = k.layers.LSTM(3, return_state=True, return_sequences=True, name="lstm")(x)
    return k.Model(x, [y, h, c])


@net
def initial_state(k):
    x, h, c = k.Input((9, 4)), k.Input((3,)), k.Input((3,))
    return k.Model([x, h, c], k.layers.LSTM(3)(x, initial_state=[h, c]))


@net
def bidirectional_state(k):
    x = k.Input((9, 4))
    y, *states = k.layers.Bidirectional(k.layers.GRU(3, return_state=True, return_sequences=True))(x)
    return k.Model(x, k.layers.Bidirectional(k.layers.GRU(3))(y, initial_state=states))


@net
def shared_layer(k):
    a, b = k.Input((6,)), k.Input((6,))
    dense = k.layers.Dense(3, name="twice")
    return k.Model([a, b], k.layers.Subtract()([dense(b), dense(a)]))


def _body(k, name="body"):
    a = k.Input((8, 7, 3))
    y = k.layers.Conv2D(4, 3, name="conv")(a)
    return k.Model(a, k.layers.ReLU()(k.layers.BatchNormalization(name="bn")(y)), name=name)


@net
def nested(k):
    x = k.Input((8, 7, 3))
    y = _body(k)(x)
    return k.Model(x, k.layers.Dense(2)(k.layers.GlobalAveragePooling2D()(y)))


@net
def nested_frozen(k):
    x = k.Input((8, 7, 3))
    body = _body(k)
    body.trainable = False
    return k.Model(x, k.layers.Dense(2)(k.layers.Flatten()(body(x, training=False))))


@net
def nested_partly_frozen(k):
    body = _body(k)
    body.get_layer("bn").trainable = False
    head = k.Sequential([k.layers.Conv2D(3, 2), k.layers.BatchNormalization(), k.layers.Flatten()], name="head")
    x = k.Input((8, 7, 3))
    return k.Model(x, head(body(x)))


@net
def nested_frozen_in_front(k):
    """Its weights come last in the file: trainable ones first."""
    a = k.Input((8, 7, 3))
    y = k.layers.Conv2D(4, 3, name="conv", trainable=False)(a)
    body = k.Model(a, k.layers.Conv2D(4, 3, name="thawed")(k.layers.ReLU()(y)), name="body")
    x = k.Input((8, 7, 3))
    return k.Model(x, k.layers.Flatten()(body(x)))


@net
def nested_at_the_end(k):
    x = k.Input((8, 7, 3))
    return k.Model(x, _body(k)(x))


@net
def branches(k):
    """Layers of one shape on branches of different length."""
    x = k.Input((6,))
    short = k.layers.Dense(6, name="short")(x)
    long = k.layers.Dense(6, name="long_2")(k.layers.Dense(6, name="long_1")(x))
    return k.Model(x, k.layers.Subtract()([short, k.layers.Dense(6, name="last")(long)]))


@net
def nested_branches(k):
    """A hard_sigmoid alone becomes two layers, which makes its branch the longer one."""
    a = k.Input((6,))
    plain, bent = (k.layers.Dense(6, name=name)(a) for name in ("plain", "bent"))
    bent = k.layers.Activation("hard_sigmoid")(bent)
    body = k.Model(a, k.layers.Subtract()([k.layers.Dense(6, name="next")(plain), bent]), name="body")
    x = k.Input((2, 6))
    other = k.models.clone_model(body)
    return k.Model(x, body(k.layers.Flatten()(k.layers.AveragePooling1D()(k.layers.TimeDistributed(other)(x)))))


@net
def nested_twice(k):
    a, b = k.Input((8, 7, 3)), k.Input((8, 7, 3))
    body = _body(k)
    return k.Model([a, b], k.layers.Add()([body(b), body(a)]))


@net
def nested_in_sequential(k):
    head = k.Sequential([k.layers.Flatten(), k.layers.Dense(3)])
    return k.Sequential([k.Input((8, 7, 3)), _body(k), head, k.layers.ReLU()])


@net
def nested_deeply(k):
    inner = k.Sequential([k.Input((8, 7, 3)), _body(k, "innermost"), k.layers.MaxPooling2D()], name="inner")
    x = k.Input((8, 7, 3))
    return k.Model(x, k.layers.Conv2D(2, 1)(inner(x)))


@net
def nested_several_outputs(k):
    a = k.Input((6,))
    inner = k.Model(a, [k.layers.Dense(3)(a), k.layers.Dense(4)(a)], name="inner")
    x = k.Input((6,))
    y, z = inner(x)
    return k.Model(x, [z, y])


@net
def time_distributed_model(k):
    x = k.Input((4, 8, 7, 3))
    return k.Model(x, k.layers.TimeDistributed(_body(k))(x))


@net
def dictionary_inputs(k):
    a, b = k.Input((6,), name="a"), k.Input((6,), name="b")
    return k.Model({"b": b, "a": a}, k.layers.Concatenate()([k.layers.Dense(2)(b), a]))


@net
def attention(k):
    x, y = k.Input((5, 4)), k.Input((7, 4))
    z = k.layers.MultiHeadAttention(2, 3, name="mha")(x, y)
    z = k.layers.MultiHeadAttention(2, 3, use_bias=False)(z, y, key=y)
    return k.Model([x, y], k.layers.Attention(use_scale=True)([z, y]))


@net
def additive_attention(k):
    x, y = k.Input((5, 4)), k.Input((7, 4))
    return k.Model([x, y], k.layers.AdditiveAttention()([x, y]))


@net
def training_flag(k):
    x = k.Input((6,))
    return k.Model(x, k.layers.Dropout(0.5)(k.layers.Dense(3)(x), training=False))


@net
def layer_as_activation(k):
    activations = (k.layers.LeakyReLU(0.2), k.layers.Softmax(), k.layers.Rescaling(2.0))
    return k.Sequential([k.layers.InputLayer((6,)), *(k.layers.Dense(4, activation=a) for a in activations)])


@net
def list_of_one(k):
    x = k.Input((6,))
    return k.Model([x], [k.layers.Dense(3)(x)])


@net
def frozen_but_for_the_last(k):
    """A model that is frozen as a whole lists what is thawed inside it first."""
    a = k.Input((4,))
    body = k.Model(a, k.layers.Dense(4, name="c")(k.layers.Dense(4, name="b")(a)), name="body")
    body.trainable = False
    body.get_layer("c").trainable = True
    x = k.Input((4,))
    return k.Model(x, body(x))


@net
def masks_that_are_one(k):
    x = k.Input((7,), dtype="int32")
    e = k.layers.Embedding(5, 4, mask_zero=True)(x)
    y = k.layers.Add()([e, k.layers.Dropout(0.1)(e)])
    return k.Model(x, k.layers.LSTM(3)(k.layers.Concatenate()([y, e])))


@net
def masks_that_nothing_reads(k):
    i, j = k.Input((7,), dtype="int32"), k.Input((7,), dtype="int32")
    y = k.layers.Add()([k.layers.Embedding(5, 4, mask_zero=True)(i), k.layers.Embedding(5, 4)(j)])
    return k.Model([i, j], k.layers.Dense(3)(y))


@net
def masked_attention(k):
    x = k.Input((7,), dtype="int32")
    e = k.layers.Embedding(5, 4, mask_zero=True)(x)
    return k.Model(x, k.layers.MultiHeadAttention(2, 3)(e, e))


@net
def wrapped_twice(k):
    x = k.Input((3, 4, 6))
    inner = k.Sequential([k.layers.Input((6,)), k.layers.Dense(3), k.layers.ReLU()])
    return k.Model(x, k.layers.TimeDistributed(k.layers.TimeDistributed(inner))(x))


def _two(k):
    i, j = k.Input((7,), dtype="int32"), k.Input((7,), dtype="int32")
    return i, j, k.layers.Embedding(5, 4, mask_zero=True)(i), k.layers.Embedding(5, 4)(j)


def _both(k):
    """Two embeddings that mask other steps each."""
    i, j = k.Input((7,), dtype="int32"), k.Input((7,), dtype="int32")
    return i, j, k.layers.Embedding(5, 4, mask_zero=True)(i), k.layers.Embedding(5, 4, mask_zero=True)(j)


def _masked(name: str, make: Callable[[Any, Any, Any], Any], inputs: Callable[[Any], Any] = _two) -> None:
    def build(k: Any) -> Any:
        i, j, a, b = inputs(k)
        return k.Model([i, j], make(k.layers, a, b))

    NETS[f"mask_{name}"] = build


_masked("add", lambda L, m, p: L.GlobalAveragePooling1D()(L.Add()([m, p])))
_masked("average_of_both", lambda L, m, p: L.GlobalAveragePooling1D()(L.Average()([m, p, m])), _both)
_masked("concatenate", lambda L, m, p: L.GRU(3)(L.Dropout(0.1)(L.Concatenate()([m, p]))))
_masked("concatenate_both", lambda L, m, p: L.Bidirectional(L.LSTM(3))(L.Concatenate(axis=2)([m, p])), _both)
_masked("concatenate_steps", lambda L, m, p: L.GlobalAveragePooling1D()(L.Concatenate(axis=1)([m, p])), _both)
_masked("multiply", lambda L, m, p: L.Dense(3)(L.Multiply()([m, p])))
_masked("multiply_both", lambda L, m, p: L.GlobalAveragePooling1D()(L.Multiply()([m, p])), _both)
_masked("maximum", lambda L, m, p: L.Dense(3)(L.Maximum()([m, p])), _both)
_masked("rescaling", lambda L, m, p: L.GlobalAveragePooling1D()(L.Add()([L.Rescaling(2.0)(m), p])))
_masked("time_distributed", lambda L, m, p: L.LSTM(3)(L.TimeDistributed(L.Dense(3))(L.SpatialDropout1D(0.2)(m))))


@net
def mask_of_nested(k):
    embed = k.Sequential([k.layers.InputLayer((7,), dtype="int32"), k.layers.Embedding(5, 4, mask_zero=True)])
    x = k.Input((7,), dtype="int32")
    return k.Model(x, k.layers.GlobalAveragePooling1D()(embed(x)))


@net
def mask_through_nested(k):
    inner = k.Sequential([k.layers.InputLayer((7, 4)), k.layers.Dense(3), k.layers.ReLU()])
    x = k.Input((7,), dtype="int32")
    return k.Model(x, k.layers.GlobalAveragePooling1D()(inner(k.layers.Embedding(5, 4, mask_zero=True)(x))))


@net
def mask_hierarchy(k):
    """Words make sentences, sentences a document: the mask of the words ends inside."""
    words = k.Sequential(
        [
            k.layers.InputLayer((7,), dtype="int32"),
            k.layers.Embedding(5, 4, mask_zero=True),
            k.layers.GlobalAveragePooling1D(),
        ]
    )
    x = k.Input((3, 7), dtype="int32")
    return k.Model(x, k.layers.GRU(2)(k.layers.TimeDistributed(words)(x)))


def _decoder(kind: str) -> Callable[[Any], Any]:
    """Words in, words out: the decoder has a mask and the states of the encoder."""

    def build(k: Any) -> Any:
        def layer(**arguments: Any) -> Any:
            if kind == "Bidirectional":
                return k.layers.Bidirectional(k.layers.GRU(3, **arguments))
            return getattr(k.layers, kind)(3, **arguments)

        i, j = k.Input((7,), dtype="int32"), k.Input((6,), dtype="int32")
        _, *states = layer(return_state=True)(k.layers.Embedding(5, 4, mask_zero=True)(i))
        y = k.layers.Embedding(5, 4, mask_zero=True)(j)
        return k.Model([i, j], k.layers.GlobalAveragePooling1D()(layer(return_sequences=True)(y, initial_state=states)))

    return build


NETS.update({f"decoder_{kind.lower()}": _decoder(kind) for kind in ("LSTM", "GRU", "Bidirectional")})


def _step(k: Any) -> Any:
    x, s = k.Input((7, 4)), k.Input((3,))
    return k.Model([x, s], k.layers.GRU(3)(x, initial_state=s))


@net
def decoder_nested(k):
    i, s = k.Input((7,), dtype="int32"), k.Input((3,))
    return k.Model([i, s], _step(k)([k.layers.Embedding(5, 4)(i), s]))


# Nets that compute something else in Keras 3, so that they must be refused.
REFUSED: dict[str, Callable[[Any], Any]] = {}

REFUSED["mask_beside_states_in_a_model"] = lambda k: k.Model(
    [i := k.Input((7,), dtype="int32"), s := k.Input((3,))],
    _step(k)([k.layers.Embedding(5, 4, mask_zero=True)(i), s]),
)
REFUSED["activation_dense"] = _sequential(
    VECTOR, ("Dense", {"units": 3, "activation": lambda k: k.layers.PReLU()}), ("Dense", {"units": 3})
)
REFUSED["activation_alone"] = _sequential(VECTOR, ("Activation", {"activation": lambda k: k.layers.PReLU()}))
REFUSED["activation_wrapped"] = _sequential(
    SEQUENCE,
    ("TimeDistributed", {"layer": lambda k: k.layers.Dense(3, activation=k.layers.BatchNormalization())}),
)
REFUSED["mask_inside"] = lambda k: k.Model(
    x := k.Input((3, 7, 4)), k.layers.TimeDistributed(k.layers.LSTM(3))(k.layers.Masking()(x))
)
REFUSED["mask_made_inside"] = lambda k: k.Model(
    x := k.Input((3, 7, 4)), k.layers.TimeDistributed(k.layers.LSTM(3))(k.layers.TimeDistributed(k.layers.Masking())(x))
)
REFUSED["mask_of_a_known_batch"] = lambda k: k.Model(
    x := k.Input(batch_shape=(2, 7, 4)), k.layers.TimeDistributed(k.layers.Dense(3))(k.layers.Masking()(x))
)
REFUSED["hard_sigmoid_wrapped"] = _sequential(
    SEQUENCE, ("TimeDistributed", {"layer": lambda k: k.layers.Activation("hard_sigmoid")})
)
REFUSED["training"] = lambda k: k.Model(x := k.Input((6,)), k.layers.BatchNormalization()(x, training=True))


def _in_training(kind: str, **arguments: Any) -> Callable[[Any], Any]:
    def build(k: Any) -> Any:
        inner = k.Sequential([k.layers.InputLayer((12, 9, 3)), getattr(k.layers, kind)(**_resolved(k, arguments))])
        return k.Model(x := k.Input((12, 9, 3)), inner(x, training=True))

    return build


REFUSED["training_crop"] = _in_training("RandomCrop", height=7, width=4)
REFUSED["training_height"] = _in_training("RandomHeight", factor=0.3)
REFUSED["training_flip"] = _in_training("RandomFlip")
REFUSED["training_spectral"] = _in_training("SpectralNormalization", layer=lambda k: k.layers.Conv2D(2, 3))
REFUSED["separable_wrapped"] = _sequential(
    (3, *SEQUENCE), ("TimeDistributed", {"layer": lambda k: k.layers.SeparableConv1D(2, 3, padding="causal")})
)


ONLY_HDF5 = {name for name in NETS if name.startswith("mask_")}  # of which the graph matters, not the weights


@net
def slashes(k):
    x = k.Input((6,), name="in/x")
    return k.Model(x, k.layers.BatchNormalization(name="a/b/bn")(k.layers.Dense(3, name="a/dense")(x)))


@net
def losses(k):
    """What made the loss is no part of the model at inference, though its layers are in the file."""
    import tensorflow as tf

    x = k.Input((6,))
    y = k.layers.Dense(3, name="head")(x)
    model = k.Model(x, y)
    model.add_loss(tf.reduce_mean(tf.math.lgamma(tf.abs(k.layers.Dense(2, name="critic")(y)) + 1.0)))
    return model


@net
def operations(k):
    import tensorflow as tf

    x = k.Input((8, 8, 3))
    y = tf.nn.relu(x / 2.0 - 0.5)
    z = tf.concat([y, tf.nn.leaky_relu(x)], axis=-1)
    return k.Model(x, k.layers.Conv2D(3, 1)(tf.reduce_mean(z, axis=[1, 2], keepdims=True) + z))


def _drawn(model: Any, rng: Any) -> None:
    import numpy as np

    adapted = {id(v) for x in model._flatten_layers() if type(x).__name__ == "Normalization" for v in x.weights}
    for variable in model.weights:
        if id(variable) in adapted:  # what such a layer computes with was derived from them
            continue
        name, shape = variable.name.rpartition("/")[2], variable.shape
        if "variance" in name:
            value = 10 ** rng.uniform(-1, 1, shape)
        elif "gamma" in name:
            value = rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape)
        else:
            value = rng.normal(0, 1 / np.sqrt(max(1, np.prod(shape[:-1]))) if len(shape) > 1 else 0.5, shape)
        variable.assign(value.astype("float32"))


def _inputs(model: Any, rng: Any) -> list[Any]:
    found = []
    for tensor in model.inputs:
        shape = (4, *(size or 11 for size in tensor.shape[1:]))
        if "int" in tensor.dtype.name:
            found.append(rng.integers(0, 5, shape).astype(tensor.dtype.name))
        else:
            found.append((2 * rng.normal(0, 1, shape)).astype("float32"))
    return found


def main(folder: Path) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["TF_USE_LEGACY_KERAS"] = "1"  # tf_keras' own SpectralNormalization asks tf.keras for its parts
    import numpy as np
    import tensorflow as tf
    import tf_keras as k

    for number, (name, make) in enumerate(NETS.items()):
        k.backend.clear_session()
        rng = np.random.default_rng(number)
        model = make(k)
        _drawn(model, rng)
        inputs = _inputs(model, rng)
        given = tf.nest.pack_sequence_as(model.input, inputs) if isinstance(model.input, dict) else inputs
        given = given[0] if isinstance(given, list) and len(given) == 1 else given
        outputs = tf.nest.flatten(model(given, training=False))
        np.savez(
            folder / f"{name}.npz",
            **{f"x{i}": x for i, x in enumerate(inputs)},
            **{f"y{i}": y.numpy() for i, y in enumerate(outputs)},
        )
        model.save(folder / f"{name}.h5")
        if name not in ONLY_HDF5:
            model.save(folder / f"{name}.keras")
    for name, make in REFUSED.items():
        k.backend.clear_session()
        make(k).save(folder / f"refused_{name}.h5")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
