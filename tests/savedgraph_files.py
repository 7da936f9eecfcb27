"""SavedModel folders without Keras layers, for the tests: good ones (``GOOD``), and ``rewritten`` to spoil them.

Each function of ``GOOD`` writes one folder and returns inputs for it.
"""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from nets import enliven
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

L = keras.layers
V1 = tf.compat.v1


def _normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def exported(folder):
    """Keras 3's ``model.export``: convolution, BatchNormalization, Rescaling."""
    image = keras.Input((6, 6, 2), name="image")
    x = L.Rescaling(0.5, 0.1)(image)
    x = L.BatchNormalization()(L.Conv2D(4, 3, activation="relu")(x))
    model = keras.Model(image, L.Dense(3, name="scores")(L.GlobalAveragePooling2D()(x)))
    enliven(model, 0)
    model.export(str(folder), verbose=False)
    return {"image": _normal(5, 6, 6, 2)}


def recurrent(folder):
    """Loops: their bodies are functions, their weights captured by them."""
    words = keras.Input((None,), dtype="int32", name="words")
    x = L.Bidirectional(L.LSTM(3, return_sequences=True))(L.Embedding(11, 4)(words))
    model = keras.Model(words, L.Dense(2)(L.GRU(3)(x)))
    enliven(model, 1)
    model.export(str(folder), verbose=False)
    return {"words": np.random.default_rng(0).integers(0, 11, (5, 7)).astype("int32")}


class Twins(tf.Module):
    """Two variables of one name, a captured constant, several inputs and outputs, one of them handed through."""

    def __init__(self):
        super().__init__()
        self.first = tf.Variable(_normal(4, 3), name="kernel")
        self.second = tf.Variable(_normal(3, 3)[::-1] * 2, name="kernel")
        self.third = [tf.Variable(_normal(3), name="kernel")]
        self.constant = tf.constant(_normal(3) + 1)

    @tf.function
    def __call__(self, x, extra):
        hidden = tf.nn.relu(x @ self.first * self.constant)
        return {"y": hidden @ self.second + self.third[0] + extra, "sums": tf.reduce_sum(x, -1), "same": extra}


def twins(folder):
    module = Twins()
    specs = {"x": tf.TensorSpec((None, 4), tf.float32), "extra": tf.TensorSpec((None, 3), tf.float32)}
    tf.saved_model.save(module, str(folder), {"serving_default": module.__call__.get_concrete_function(**specs)})
    return {"x": _normal(5, 4), "extra": _normal(5, 3) + 1}


def version1(folder):
    """TensorFlow 1: no objects; a plain variable, a resource variable, a placeholder with a default."""
    with tf.Graph().as_default(), V1.Session() as session:
        x = V1.placeholder(tf.float32, (None, 6), name="x")
        training = V1.placeholder_with_default(False, (), name="training")
        plain = V1.get_variable("plain", initializer=_normal(6, 4), use_resource=False)
        resource = V1.get_variable("scope/resource", initializer=_normal(4), use_resource=True)
        y = tf.matmul(x, plain) + resource
        y = V1.cond(training, lambda: y * 0.0, lambda: tf.nn.elu(y))
        session.run(V1.global_variables_initializer())
        slices = V1.get_variable("slices", (6, 2), partitioner=V1.fixed_size_partitioner(2))  # of no concern to y
        session.run(V1.variables_initializer(list(slices)))
        V1.saved_model.simple_save(session, str(folder), {"x": x}, {"y": y})
    return {"x": _normal(5, 6)}


def fixed(folder):
    """A batch of one, all weights constants, an integer output."""
    kernel = tf.constant(_normal(4, 3))
    module = tf.Module()
    module.answer = tf.function(lambda x: {"scores": tf.matmul(x, kernel), "best": tf.argmax(tf.matmul(x, kernel), -1)})
    concrete = module.answer.get_concrete_function(tf.TensorSpec((1, 4), tf.float32, name="x"))
    tf.saved_model.save(module, str(folder), concrete)
    return {"x": _normal(1, 4)}


def branches(folder):
    """Branches that read what is outside of them; assertions and prints; a range and a transform."""
    kernel = tf.Variable(_normal(8, 8))

    def answer(x):
        tf.debugging.assert_greater(tf.shape(x)[0], 0)
        tf.print("seen", x[0, 0])
        x = tf.cond(tf.reduce_sum(x * x) < 0, lambda: x * 2.0, lambda: x @ kernel @ tf.transpose(kernel))
        return {"graph": x + tf.range(0.0, 8.0, 1.0), "spectrum": tf.abs(tf.signal.rfft(x))}

    write(folder, answer, tf.TensorSpec((None, 8), tf.float32, name="graph"), rest=kernel)
    return {"graph": _normal(5, 8)}


GOOD = {function.__name__: function for function in (exported, recurrent, twins, version1, fixed, branches)}


def write(folder: Path, function, *specs, **named) -> Path:
    """A module of one function, with a signature."""
    module = tf.Module()
    module.answer = tf.function(function)
    module.rest = named.pop("rest", None)
    tf.saved_model.save(module, str(folder), module.answer.get_concrete_function(*specs, **named))
    return folder


def rewritten(folder: Path, change) -> Path:
    """Apply ``change`` to the graph for serving."""
    file = folder / "saved_model.pb"
    saved = SavedModel.FromString(file.read_bytes())
    change(saved.meta_graphs[0])
    file.write_bytes(saved.SerializeToString())
    return folder
