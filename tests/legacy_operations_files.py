"""Models of TensorFlow operations between layers, as tf_keras describes and computes them.

Run as a script, in a process of its own, it builds every case with tf_keras and writes what a file would say and
what the model gives: ``cases.json`` and ``arrays.npz`` in the folder that is its argument.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Inputs, without the batch: a shape, a dtype, and the range from which values are drawn.
IMAGE = ((4, 6, 3), "float32", -3.0, 3.0)
ANY_IMAGE = ((None, None, 3), "float32", -3.0, 3.0)
POSITIVE = ((4, 6, 3), "float32", 0.1, 3.0)
UNIT = ((4, 6, 3), "float32", -0.9, 0.9)
VECTOR = ((5,), "float32", -3.0, 3.0)
SEQUENCE = ((6, 8), "float32", -3.0, 3.0)
ANY_SEQUENCE = ((None, 8), "float32", -3.0, 3.0)
COUNTS = ((5,), "int32", 1, 9)
SMALL = ((5,), "uint8", 1, 9)
HALF = ((5,), "float16", -3.0, 3.0)
DOUBLE = ((5,), "float64", -3.0, 3.0)
DEEP = ((4, 4, 8), "float32", -3.0, 3.0)
FIXED = ((1, 2, 5), "float32", -3.0, 3.0)

words = str.split
Case = tuple[tuple[Any, ...], Callable[..., Any]]


def _attention(tf: Any, x: Any) -> Any:
    """As in TensorFlow's tutorial: heads split off with the batch of `tf.shape`, scaled by the root of a length."""
    batch = tf.shape(x)[0]
    heads = tf.transpose(tf.reshape(x * 2.0, (batch, -1, 2, 4)), perm=[0, 2, 1, 3])
    scores = tf.matmul(heads, heads, transpose_b=True) / tf.math.sqrt(tf.cast(tf.shape(heads)[-1], tf.float32))
    mixed = tf.transpose(tf.matmul(tf.nn.softmax(scores, axis=-1), heads), perm=[0, 2, 1, 3])
    return tf.reshape(mixed, (batch, -1, 8))


def _squeeze_from_shape(tf: Any, x: Any) -> Any:
    size = tf.shape(x)
    return tf.reshape(x, tf.stack([size[0], size[1] * size[2], 3]))


def cases(tf: Any, tk: Any) -> dict[str, Case]:
    """Every case: the inputs, and the calls between them and the outputs."""
    v1, K = tf.compat.v1, tk.backend
    m, nn, im = tf.math, tf.nn, tf.image
    one: dict[str, Callable[..., Any]] = {}  # on an image
    for name in words("abs negative sign floor ceil square exp sin cos sinh cosh tanh sigmoid log_sigmoid erf expm1"):
        one[name] = getattr(m, name)
    for name in words("relu relu6 elu selu softsign softplus gelu silu leaky_relu softmax log_softmax crelu"):
        one[name] = getattr(nn, name)
    for name in words("sum mean max min prod variance std logsumexp euclidean_norm"):
        reduce = getattr(m, f"reduce_{name}")
        one[f"reduce_{name}"] = lambda x, f=reduce: [f(x, axis=[1, 2], keepdims=True), f(x, -1), f(x, axis=(0, 3))]
    found: dict[str, Case] = {name: ((IMAGE,), call) for name, call in one.items()}
    for name in words("sqrt rsqrt log log1p reciprocal"):
        found[name] = ((POSITIVE,), getattr(m, name))
    for name in words("asin acos atan tan"):
        found[name] = ((UNIT,), getattr(m, name))
    for name in words("add subtract multiply divide maximum minimum squared_difference atan2 divide_no_nan"):
        found[name] = ((IMAGE, IMAGE), getattr(m, name))
    for name in words("less less_equal greater greater_equal equal not_equal"):
        compare = getattr(m, name)
        found[name] = ((IMAGE, IMAGE), lambda x, y, f=compare: f(tf.round(x), tf.round(y)))
    for name in words("logical_and logical_or logical_xor"):
        combine = getattr(m, name)
        found[name] = ((IMAGE, IMAGE), lambda x, y, f=combine: f(x > 0, y > 0))
    return found | {
        "operators": ((IMAGE, IMAGE), lambda x, y: [x + y, x - y, x * y, x / y, x // y, x % y, -x, abs(x)]),
        "operators with a number": ((IMAGE,), lambda x: [x + 0.1, 2 - x, x * 0.1, 1 / x, x // 0.7, x % 0.7]),
        "operators on integers": ((COUNTS,), lambda x: [x + 1, 7 - x, x * 3, x / 3, 3 / x, x // 2, x % 3, x**2]),
        "operators on bytes": ((SMALL,), lambda x: [x / 3, x + 1, x // 2]),
        "operators on halves": ((HALF,), lambda x: [x + 0.1, 2 - x, x * [0.1, 1, 2, 3, 4]]),
        "operators on doubles": ((DOUBLE,), lambda x: [x + 0.1, x / 3, x * [0.1, 1, 2, 3, 4]]),
        "comparing with a number": ((IMAGE,), lambda x: [x > 0, x < 0.5, x >= 1, ~(x <= 1)]),
        "constants that widen": ((VECTOR,), lambda x: x + tf.constant([[[1.0]], [[2.0]]])),
        "channels": ((IMAGE,), lambda x: (x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]),
        "pow": ((POSITIVE,), lambda x: [x**2, x**0.5, 2**x, x**x]),
        "floor_div": ((IMAGE, POSITIVE), lambda x, y: v1.floor_div(x, y)),
        "floordiv": ((IMAGE, POSITIVE), lambda x, y: m.floordiv(x, y)),
        "floormod": ((IMAGE, POSITIVE), lambda x, y: m.floormod(x, -y)),
        "add_n": ((IMAGE, IMAGE), lambda x, y: m.add_n([x, y, x])),
        "round": ((COUNTS,), lambda x: [m.round(tf.cast(x, "float32") / 2.0), m.rint(tf.cast(x, "float32") / 2.0)]),
        "is_nan": ((IMAGE,), lambda x: [m.is_nan(m.log(x)), m.is_inf(x), m.is_finite(m.log(x))]),
        "logical_not": ((IMAGE,), lambda x: m.logical_not(x > 0)),
        "leaky_relu slope": ((IMAGE,), lambda x: [nn.leaky_relu(x, 0.3), nn.leaky_relu(x, alpha=0.01)]),
        "silu beta": ((IMAGE,), lambda x: nn.silu(x, beta=1.7)),
        "gelu approximate": ((IMAGE,), lambda x: [nn.gelu(x, approximate=True), nn.gelu(x, False)]),
        "softmax axis": ((IMAGE,), lambda x: [nn.softmax(x, axis=1), nn.log_softmax(x, 2)]),
        "activations": (
            (IMAGE,),
            lambda x: (
                [
                    getattr(tk.activations, name)(x)
                    for name in words("sigmoid hard_sigmoid gelu swish mish relu softmax elu selu softplus tanh")
                ]
                + [tk.activations.relu(x, alpha=0.1, max_value=2.0, threshold=0.5)]
            ),
        ),
        "clip_by_value": ((IMAGE,), lambda x: [tf.clip_by_value(x, -1.0, 2), tf.clip_by_value(x, [-1.0, 0, 1], 2.0)]),
        "clip to tensors": ((IMAGE, POSITIVE), lambda x, y: tf.clip_by_value(x, -y, y)),
        "cast": ((IMAGE,), lambda x: [tf.cast(x, "int32"), tf.cast(x, tf.float16), tf.cast(x, tf.bool)]),
        "identity": ((IMAGE,), lambda x: [tf.identity(x), tf.convert_to_tensor(x), tf.stop_gradient(x)]),
        "identity of doubles": ((DOUBLE,), lambda x: tf.identity(x)),
        "zeros_like": ((IMAGE,), lambda x: [tf.zeros_like(x), tf.ones_like(x, dtype="int32")]),
        "where": ((IMAGE, IMAGE), lambda x, y: [tf.where(x > 0, x, y), tf.where(x > y, x, 0.5)]),
        "where rows": ((VECTOR,), lambda x: tf.where(x > 0, 1.0, [0.0, 1, 2, 3, 4])),
        "where v1": ((IMAGE, IMAGE), lambda x, y: v1.where(x > 0, x, y)),
        "reduce everything": ((IMAGE,), lambda x: [m.reduce_max(x), m.reduce_sum(x, keepdims=True)]),
        "reduce integers": ((COUNTS,), lambda x: [m.reduce_sum(x, 1), m.reduce_max(x, 1), m.reduce_prod(x, 1)]),
        "reduce v1": ((IMAGE,), lambda x: v1.reduce_mean(x, reduction_indices=[1], keep_dims=True)),
        "reduce_any": ((IMAGE,), lambda x: [m.reduce_any(x > 2, 1), m.reduce_all(x > -2, [1, 2], keepdims=True)]),
        "norm": (
            (IMAGE,),
            lambda x: [tf.norm(x, axis=-1), tf.norm(x, 1, axis=1), tf.norm(x, axis=[1, 2], keepdims=True)],
        ),
        "argmax": ((IMAGE,), lambda x: [tf.argmax(x), tf.argmax(x, -1), tf.argmin(x, 1, output_type=tf.int32)]),
        "cumsum": ((IMAGE,), lambda x: [m.cumsum(x, 1), m.cumsum(x, axis=2, reverse=True), m.cumprod(x, -1)]),
        "top_k": ((IMAGE,), lambda x: list(m.top_k(x, k=2))),
        "l2_normalize": ((IMAGE,), lambda x: [m.l2_normalize(x, -1), nn.l2_normalize(x, [1, 2], epsilon=0.5)]),
        "tiny l2_normalize": ((IMAGE,), lambda x: m.l2_normalize(x * 1e-7, -1)),
        "backend functions": (
            (IMAGE,),
            lambda x: [
                K.mean(K.square(x), axis=[1, 2], keepdims=True),
                K.l2_normalize(x, -1),
                K.concatenate([x, x]),
                K.batch_flatten(x),
                K.clip(x, 0, 1),
                K.permute_dimensions(x, (0, 3, 1, 2)),
                K.var(x, axis=1),
                K.std(x, axis=1),
                K.spatial_2d_padding(x),
                K.repeat_elements(x, 2, 1),
                K.batch_dot(K.batch_flatten(x), K.batch_flatten(x), axes=1),
                K.pool2d(x, (2, 2), strides=(2, 2), padding="same"),
                K.pool2d(x, (2, 2), pool_mode="avg"),
            ],
        ),
        "preprocessing": (
            (IMAGE,),
            lambda x: [
                tk.applications.imagenet_utils.preprocess_input(x, mode=mode) for mode in ("tf", "caffe", "torch")
            ],
        ),
        "moments": ((IMAGE,), lambda x: list(nn.moments(x, [1, 2], keepdims=True))),
        "batch_normalization": (
            (IMAGE, POSITIVE),
            lambda x, y: [
                nn.batch_normalization(x, x, y, y, x, 1e-3),
                nn.batch_normalization(x, tf.constant([1.0, 2, 3]), tf.constant([1.0, 2, 3]), None, None, 1e-3),
                nn.batch_normalization(x, x, y, tf.constant([1.0, 2, 3]), tf.constant([3.0, 2, 1]), 0.5),
            ],
        ),
        "local_response_normalization": (
            (DEEP,),
            lambda x: [nn.local_response_normalization(x), nn.local_response_normalization(x, 2, 2.0, 1e-2, 0.75)],
        ),
        "concat": ((IMAGE, IMAGE), lambda x, y: [tf.concat([x, y], -1), tf.concat([x, y, x], axis=1)]),
        "concat with a constant": ((FIXED,), lambda x: tf.concat([x, tf.ones((2, 1, 2, 3))], axis=-1)),
        "stack": ((IMAGE, IMAGE), lambda x, y: [tf.stack([x, y]), tf.stack([x, y, y], axis=2), tf.stack([x, y], -1)]),
        "unstack": ((IMAGE,), lambda x: [tf.unstack(x, axis=-1)[1], tf.unstack(x, 4, 1)[3]]),
        "split": ((IMAGE,), lambda x: tf.split(x, 3, axis=-1) + tf.split(x, [1, -1, 2], 2) + tf.split(x, [4], 1)),
        "tile": ((ANY_IMAGE,), lambda x: tf.tile(x, [1, 2, 1, 3])),
        "repeat": ((IMAGE,), lambda x: [tf.repeat(x, 2, axis=1), tf.repeat(x, [1, 2, 3], axis=-1)]),
        "expand_dims": ((IMAGE,), lambda x: [tf.expand_dims(x, 1), tf.expand_dims(x, -1), v1.expand_dims(x, dim=0)]),
        "squeeze": ((FIXED,), lambda x: [tf.squeeze(x, 1), tf.squeeze(x, [1]), v1.squeeze(x, squeeze_dims=[1])]),
        "reshape": ((IMAGE,), lambda x: [tf.reshape(x, [-1, 24, 3]), tf.reshape(x, (-1, 2, 36)), tf.reshape(x, [-1])]),
        "reshape of tf.shape": ((IMAGE,), lambda x: tf.reshape(x, [tf.shape(x)[0], -1, 3])),
        "reshape of all of tf.shape": ((IMAGE, IMAGE), lambda x, y: tf.reshape(x + 1.0, tf.shape(y))),
        "reshape by products": ((IMAGE,), lambda x: _squeeze_from_shape(tf, x)),
        "reshape any image": (
            (ANY_IMAGE,),
            lambda x: tf.reshape(x, [tf.shape(x)[0], tf.shape(x)[1] * tf.shape(x)[2], 3]),
        ),
        "reshape by parts of tf.shape": (
            (IMAGE,),
            lambda x: [
                tf.reshape(x, tf.concat([tf.shape(x)[:1], [24, 3]], 0)),
                tf.reshape(x, [tf.shape(x)[0] * tf.shape(x)[1], 6, 3]),
                tf.reshape(x, [m.reduce_prod(tf.shape(x)[:2]), 18]),
                tf.reshape(x, [tf.cast(tf.shape(x), "int64")[0], 72]),
                tf.reshape(x, [tf.size(x) // 3, tf.rank(x) - 1]),
                tf.reshape(x, [tf.unstack(tf.shape(x))[0] + 0, 72]),
            ],
        ),
        "attention": ((ANY_SEQUENCE,), lambda x: _attention(tf, x)),
        "attention of known length": ((SEQUENCE,), lambda x: _attention(tf, x)),
        "value of tf.shape": ((IMAGE,), lambda x: x / tf.cast(tf.shape(x)[1] * 2, tf.float32)),
        "transpose": ((IMAGE,), lambda x: [tf.transpose(x, [0, 2, 1, 3]), tf.transpose(x)]),
        "pad": (
            (ANY_IMAGE,),
            lambda x: [
                tf.pad(x, [[0, 0], [1, 2], [1, 1], [0, 0]], constant_values=0.1),
                tf.pad(x, [[0, 0], [1, 2], [1, 1], [0, 0]]),
                tf.pad(x, [[0, 0], [1, 2], [1, 1], [0, 0]], "REFLECT"),
                tf.pad(x, [[0, 0], [1, 2], [1, 1], [0, 0]], mode="SYMMETRIC"),
            ],
        ),
        "reverse": ((IMAGE,), lambda x: [tf.reverse(x, [-1]), tf.reverse(x, [1, 2]), tf.roll(x, [1, 2], [1, 2])]),
        "roll": ((IMAGE,), lambda x: tf.roll(x, shift=-1, axis=2)),
        "depth_to_space": ((DEEP,), lambda x: [nn.depth_to_space(x, 2), v1.depth_to_space(x, 2)]),
        "depth_to_space of any image": (
            (ANY_IMAGE,),
            lambda x: nn.depth_to_space(tf.concat([x, -x, x, x], -1), block_size=2),
        ),
        "space_to_depth": ((DEEP,), lambda x: [nn.space_to_depth(x, 2), v1.space_to_depth(x, 4)]),
        "getitem": (
            (IMAGE,),
            lambda x: [x[:, 1:3], x[:, 1], x[..., 0], x[:, ::2, 1:-1], x[..., ::-1], x[:, None, ..., tf.newaxis], x[0]],
        ),
        "getitem of any image": ((ANY_IMAGE,), lambda x: [x[:, 1:, :-1], x[:, 0], x[..., 1], x[1:]]),
        "strided_slice": (
            (IMAGE,),
            lambda x: [
                tf.strided_slice(x, [0, 1], [2, 3]),
                tf.strided_slice(x, [0, 1, 0], [2, 0, 0], [1, 2, 1], begin_mask=1, end_mask=3, shrink_axis_mask=4),
                tf.strided_slice(x, [0, 0, 1], [0, 0, 2], ellipsis_mask=1, new_axis_mask=2),
            ],
        ),
        "slice": ((IMAGE,), lambda x: tf.slice(x, [0, 1, 0, 1], [-1, 2, -1, 1])),
        "gather": ((IMAGE,), lambda x: [tf.gather(x, [2, 0, 0], axis=-1), tf.gather(x, 1, axis=1)]),
        "gather by a tensor": ((COUNTS,), lambda x: tf.gather(tf.reshape(tf.range(20.0), (10, 2)), x)),
        "one_hot": ((COUNTS,), lambda x: [tf.one_hot(x, 7), tf.one_hot(x, 9, axis=1, dtype="int32")]),
        "matmul": (
            (IMAGE, IMAGE),
            lambda x, y: [
                tf.matmul(x, y, transpose_b=True),
                tf.matmul(x, y, transpose_a=True),
                x @ tf.constant([[1.0, 2], [3, 4], [5, 6]]),
                tf.matmul(x, tf.constant([[1.0, 2, 3]]), transpose_b=True),
            ],
        ),
        "tensordot": (
            (IMAGE,),
            lambda x: [tf.tensordot(x, tf.ones((3, 2)), 1), tf.tensordot(x, tf.ones((6, 3, 2)), [[2, 3], [0, 1]])],
        ),
        "bias_add": ((IMAGE,), lambda x: [nn.bias_add(x, [0.1, 2.0, 3.0]), nn.bias_add(x, [0.1, 2, 3, 4], "NC...")]),
        "pools": (
            (IMAGE,),
            lambda x: [
                nn.max_pool2d(x, 2, 2, "SAME"),
                nn.max_pool2d(x, [1, 3, 2, 1], [1, 2, 1, 1], "VALID"),
                nn.avg_pool2d(x, (2, 3), 1, "SAME"),
                v1.nn.max_pool(x, [1, 2, 2, 1], [1, 2, 2, 1], "SAME"),
                v1.nn.avg_pool(x, [1, 2, 2, 1], [1, 2, 2, 1], "SAME"),
                nn.avg_pool(x, 3, 2, "SAME"),
                nn.max_pool(x, 2, 1, "VALID"),
            ],
        ),
        "pools of sequences": ((SEQUENCE,), lambda x: [nn.max_pool1d(x, 2, 2, "SAME"), nn.avg_pool1d(x, 4, 1, "SAME")]),
        "convolutions": (
            (IMAGE,),
            lambda x: [
                nn.conv2d(x, _kernel(tf, (3, 2, 3, 4)), 1, "SAME"),
                nn.conv2d(x, _kernel(tf, (2, 2, 3, 1)), [1, 2, 1, 1], "VALID"),
                nn.conv2d(x, _kernel(tf, (2, 2, 3, 2)), 1, "SAME", dilations=2),
                nn.depthwise_conv2d(x, _kernel(tf, (3, 3, 3, 2)), [1, 1, 1, 1], "SAME"),
                nn.depthwise_conv2d(x, _kernel(tf, (2, 2, 3, 1)), [1, 2, 2, 1], "VALID"),
            ],
        ),
        "image.resize": (
            (IMAGE,),
            lambda x: [
                im.resize(x, (8, 9)),
                im.resize(x, [3, 4], "nearest"),
                im.resize(x, (7, 5), method="bicubic"),
                im.resize(x, (9, 13), method="lanczos3"),
                im.resize(x, (2, 3), antialias=True),
                im.resize(x, (4, 6)),
                K.resize_images(x, 2, 3, "channels_last", interpolation="bilinear"),
            ],
        ),
        "image.resize of other dtypes": (
            (IMAGE,),
            lambda x: [
                im.resize(tf.cast(x, "float16"), (8, 9)),
                im.resize(tf.cast(x * 9, "int32"), (8, 9)),
                im.resize(tf.cast(x * 9, "int32"), (8, 9), "nearest"),
                im.resize(tf.cast(x * 9, "int32"), (4, 6)),
            ],
        ),
        "image.resize by factors": (
            (ANY_IMAGE,),
            lambda x: [
                im.resize(x, tf.shape(x)[1:3] * 2),
                im.resize(x, tf.shape(x)[1:3] * [2, 3], "nearest"),
                im.resize(x, [tf.shape(x)[1] * 3, tf.shape(x)[2] * 2], method="bicubic"),
            ],
        ),
        "image.resize to another": (
            (IMAGE, ((8, 3, 1), "float32", 0.0, 1.0)),
            lambda x, y: im.resize(x, tf.shape(y)[1:3]),
        ),
        "v1 resizes": (
            (IMAGE,),
            lambda x: [
                f(x, size, align_corners=corners, half_pixel_centers=half)
                for f in (v1.image.resize_bilinear, v1.image.resize_nearest_neighbor)
                for size in ((8, 12), (3, 5), (7, 2), (1, 1), (4, 6))
                for corners, half in ((False, False), (True, False), (False, True))
            ],
        ),
        "v1 resize_images": (
            (IMAGE,),
            lambda x: [
                v1.image.resize_images(x, (8, 9)),
                v1.image.resize_images(x, (9, 5), 1),
                v1.image.resize_images(x, (9, 5), method=0, align_corners=True),
                v1.image.resize_images(tf.cast(x, "int32"), (4, 6)),
            ],
        ),
        "flips": ((IMAGE,), lambda x: [im.flip_left_right(x), im.flip_up_down(x)]),
    }


def _kernel(tf: Any, shape: tuple[int, ...]) -> Any:
    return tf.constant(np.random.default_rng(len(shape)).normal(size=shape).astype("float32"))


def draw(spec: tuple[Any, ...], seed: int) -> np.ndarray:
    """A batch of two for an input; lengths that are not known are 5."""
    shape, dtype, low, high = spec
    size = [2, *(5 if length is None else length for length in shape)]
    return np.random.default_rng(seed).uniform(low, high, size).astype(dtype)


def main(folder: Path) -> None:
    import tensorflow as tf
    import tf_keras as tk

    described, arrays = {}, {}
    for name, (specs, build) in cases(tf, tk).items():
        tk.backend.clear_session()
        inputs = [tk.Input(spec[0], dtype=spec[1]) for spec in specs]
        outputs = build(*inputs)
        model = tk.Model(inputs, outputs if isinstance(outputs, list) else [outputs])
        batch = [draw(spec, seed) for seed, spec in enumerate(specs)]
        found = model([tf.constant(values) for values in batch])
        found = found if isinstance(found, list) else [found]
        described[name] = json.loads(model.to_json())["config"]
        arrays |= {f"{name}/x/{i}": values for i, values in enumerate(batch)}
        arrays |= {f"{name}/y/{i}": values.numpy() for i, values in enumerate(found)}
    (folder / "cases.json").write_text(json.dumps(described))
    np.savez(folder / "arrays.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
