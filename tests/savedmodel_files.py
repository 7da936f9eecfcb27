"""SavedModel folders for the tests: written by tf_keras in a process of its own, or byte by byte.

Run as a script it writes one folder for each function of ``NETS`` and beside it ``NAME.json``, the config that
an HDF5 file would hold, and ``NAME.npz`` with random inputs and what tf_keras computes from them, and the
folders of ``_refused``. The rest spoils such folders: ``edit`` and ``regraph`` change the two trees of objects,
``redescribe`` a layer's JSON, ``reindex`` the checkpoint's index, ``table`` writes any index at all.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


# The nets, in either Keras: each layer's name is its class and a number, the same in both


class Named:
    """A module of layers whose layers are named in order."""

    def __init__(self, layers) -> None:
        self.layers, self.made = layers, 0

    def __getattr__(self, kind):
        def make(*arguments, **options):
            self.made += 1
            options.setdefault("name", f"{kind.lower()}_{self.made}")
            return getattr(self.layers, kind)(*arguments, **options)

        return make


def convolutions(K):
    L = Named(K.layers)
    inputs = x = K.Input((12, 12, 3))
    x = L.RandomFlip()(x)
    x = L.Conv2D(8, 3, padding="same", groups=1)(x)
    x = L.BatchNormalization()(x)
    x = L.PReLU(shared_axes=[1, 2])(x)
    x = L.SeparableConv2D(6, 3, depth_multiplier=2)(x)
    x = L.BatchNormalization(scale=False)(x)
    x = L.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False)(x)
    x = L.LayerNormalization()(x)
    x = L.Conv2DTranspose(4, 3, strides=2)(x)
    x = L.GroupNormalization(2)(x)
    x = L.Dropout(0.5)(x)
    x = L.Reshape((-1, 4))(x)
    x = L.SeparableConv1D(3, 3)(x)
    x = L.Conv1D(4, 2, groups=1)(x)
    x = L.DepthwiseConv1D(2)(x)
    return K.Model(inputs, L.Dense(5, activation="softmax")(L.GlobalAveragePooling1D()(x)))


def nested(K):
    """Layers of one name at three levels, a model called twice, a layer shared between two models."""
    L = Named(K.layers)
    shared = L.Dense(6, name="shared")
    core = K.Sequential([K.Input((6,)), L.Dense(6, name="d"), L.PReLU()], name="core")
    at = K.Input((6,))
    middle = K.Model(at, L.Dense(6, name="d")(shared(core(at))), name="middle")
    inputs = K.Input((6,))
    x = L.Dense(6, name="d")(inputs)
    x = middle(middle(x))
    x = L.BatchNormalization()(x)
    return K.Model(inputs, [shared(x), L.Dense(3, use_bias=False)(shared(core(x)))])


def recurrent(K):
    L = Named(K.layers)
    inputs = x = K.Input((7, 4))
    x = L.Bidirectional(L.LSTM(3, return_sequences=True))(x)
    x = L.GRU(5, return_sequences=True)(x)
    x = L.GRU(4, return_sequences=True, reset_after=False)(x)
    x = L.TimeDistributed(L.Dense(6))(x)
    x = L.TimeDistributed(K.Sequential([K.Input((6,)), L.Dense(5), L.LayerNormalization()]))(x)
    x = L.Bidirectional(L.GRU(2, return_sequences=True), merge_mode="sum")(x)
    x = L.RNN([L.LSTMCell(3), L.GRUCell(4)], return_sequences=True)(x)
    return K.Model(inputs, L.Dense(2)(L.SimpleRNN(3)(x)))


def video(K):
    L = Named(K.layers)
    inputs = x = K.Input((3, 6, 6, 2))
    x = L.ConvLSTM2D(4, 3, return_sequences=True, recurrent_activation="sigmoid")(x)
    x = L.TimeDistributed(L.Conv2D(3, 2))(x)
    return K.Model(inputs, L.Conv3D(2, 2)(x))


def attention(K):
    L = Named(K.layers)
    inputs = K.Input((6,), dtype="int32")
    x = L.Embedding(11, 8)(inputs)
    x = L.LayerNormalization()(L.Add()([x, L.MultiHeadAttention(2, 3, value_dim=5)(x, x)]))
    x = L.Attention(use_scale=True, score_mode="concat")([x, x])
    x = L.AdditiveAttention()([x, x])
    x = L.EinsumDense("abc,cd->abd", output_shape=(None, 4), bias_axes="d")(x)
    return K.Model(inputs, L.Dense(2)(x))


def sequential(K):
    L = Named(K.layers)
    parts = [L.Normalization(), L.Dense(5, activation="relu"), L.BatchNormalization(), L.Dense(2)]
    return K.Sequential([K.Input((4,)), *parts])


def half(K):
    """Float32 weights under a mixed policy."""
    L = Named(K.layers)
    policy = K.mixed_precision.Policy("mixed_float16")
    inputs = K.Input((4,))
    x = L.Dense(5, dtype=policy)(inputs)
    return K.Model(inputs, L.Dense(3, dtype="float32")(x))


def stateful(K):
    L = Named(K.layers)
    inputs = K.Input((3, 2), batch_size=4)
    return K.Model(inputs, L.Dense(2)(L.LSTM(3, stateful=True)(inputs)))


def custom(K):
    """A user's own layer: weights and layers in lists, in a dict and under a name with an underscore."""
    L = Named(K.layers)

    class Own(K.layers.Layer):
        def build(self, shape):
            self.scales = [self.add_weight(name="scale", shape=(shape[-1],)) for _ in range(2)]
            self.shifts = {"a": self.add_weight(name="shift", shape=(shape[-1],))}
            self._gain = self.add_weight(name="gain", shape=())
            self.steps = [K.layers.Dense(3, name="same"), K.layers.Dense(3, name="same")]
            self.steps[0].build(shape)
            self.steps[1].build((None, 3))
            self.seen = K.metrics.Mean(name="seen")
            super().build(shape)

        def call(self, x):
            return self.steps[1](self.steps[0](x * self.scales[0] + self.scales[1] + self.shifts["a"])) * self._gain

    inputs = K.Input((4,))
    return K.Model(inputs, L.Dense(2)(Own(name="own")(inputs)))


NETS = {
    net.__name__: net for net in (convolutions, nested, recurrent, video, attention, sequential, half, stateful, custom)
}


# In the process that has tf_keras


def _train(model) -> None:
    """So that the checkpoint holds an adapted layer, optimizer slots and metrics."""
    generator = np.random.default_rng(3)
    model.layers[0].adapt(generator.normal(3, 2, (50, 4)).astype("float32"))
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(generator.normal(3, 2, (20, 4)), generator.normal(size=(20, 2)), verbose=0)


def _randomise(model, generator):
    for weight in model.weights:
        if weight.dtype.is_floating:
            positive = "variance" in weight.name
            values = generator.uniform(0.5, 2, weight.shape) if positive else generator.normal(0, 0.7, weight.shape)
            weight.assign(values)


def _refused(K, folder):
    """Folders that are no rebuildable Keras model."""
    import tensorflow as tf

    L = K.layers

    class Own(K.Model):
        def __init__(self):
            super().__init__()
            self.dense = L.Dense(2)

        def call(self, x):
            return self.dense(x)

    own = Own()
    own(np.zeros((1, 3), "float32"))
    own.save(folder / "subclassed", save_format="tf")

    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, 2))])
        def __call__(self, x):
            return x + 1.0

    tf.saved_model.save(Module(), str(folder / "module"))
    dense = K.Sequential([K.Input((3,)), L.Dense(2)])
    tf.saved_model.save(dense, str(folder / "plain"))
    lookup = L.StringLookup()
    lookup.adapt(np.array([["a"], ["b"]]))
    inputs = K.Input((1,), dtype="string")
    K.Model(inputs, L.Dense(1)(L.Embedding(5, 2)(lookup(inputs))[:, 0])).save(folder / "lookup", save_format="tf")
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        place = tf.compat.v1.placeholder(tf.float32, (None, 2))
        tf.compat.v1.saved_model.simple_save(session, str(folder / "version1"), {"x": place}, {"y": place + 1.0})


def _main(folder: Path) -> None:
    import tf_keras as K  # noqa: N812 (the nets call either Keras K)

    for number, (name, net) in enumerate(NETS.items()):
        K.utils.set_random_seed(number)
        generator = np.random.default_rng(number)
        model = net(K)
        if name == "sequential":
            _train(model)
        else:
            _randomise(model, generator)
        shape = [size or 4 for size in model.input_shape]
        whole = model.input.dtype.is_integer
        x = generator.integers(0, 11, shape) if whole else generator.normal(size=shape).astype("float32")
        outputs = model(x, training=False)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        if name == "stateful":
            model.reset_states()
        model.save(folder / name, save_format="tf", save_traces=name == "nested")  # traces: slow, and not read
        (folder / f"{name}.json").write_text(model.to_json())  # what an HDF5 file would hold
        arrays = {f"output_{place}": np.asarray(output) for place, output in enumerate(outputs)}
        np.savez(folder / f"{name}.npz", x=x, **arrays)
    _refused(K, folder)


# In the process of the tests


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}


def edit(folder: Path, change) -> None:
    """Apply ``change`` to the tree of objects in ``saved_model.pb``."""
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    file = folder / "saved_model.pb"
    model = SavedModel.FromString(file.read_bytes())
    change(model.meta_graphs[0].object_graph_def)
    file.write_bytes(model.SerializeToString())


def describe_inside(folder: Path) -> None:
    """Move the layers' descriptions to where TF 2.0 to 2.4 kept them."""
    from tf_keras.protobuf.saved_metadata_pb2 import SavedMetadata

    described = SavedMetadata.FromString((folder / "keras_metadata.pb").read_bytes()).nodes

    def change(tree):
        for node in described:
            tree.nodes[node.node_id].user_object.metadata = node.metadata

    edit(folder, change)
    (folder / "keras_metadata.pb").unlink()


def redescribe(folder: Path, change, layer: int = 0) -> None:
    """Apply ``change`` to the JSON description of one object."""
    from tf_keras.protobuf.saved_metadata_pb2 import SavedMetadata

    metadata = SavedMetadata.FromString((folder / "keras_metadata.pb").read_bytes())
    node = next(node for node in metadata.nodes if node.node_id == layer)
    document = json.loads(node.metadata)
    node.metadata = json.dumps(change(document) or document)
    (folder / "keras_metadata.pb").write_bytes(metadata.SerializeToString())


def crc32c(data: bytes) -> int:
    """Bit by bit, as the definition has it."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def masked(checksum: int) -> int:
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes((*out, number))


def table(entries: dict[bytes, bytes], compression: int = 0) -> bytes:
    """A LevelDB table of one block."""

    def block(pairs) -> bytes:
        body = b"".join(varint(0) + varint(len(k)) + varint(len(v)) + k + v for k, v in pairs)
        body += struct.pack("<II", 0, 1)
        kind = bytes((compression,))
        return body + kind + struct.pack("<I", masked(crc32c(body + kind)))

    data = block(sorted(entries.items()))
    handle = varint(0) + varint(len(data) - 5)
    index = block([(b"\xff", handle)])
    footer = varint(0) + varint(0) + varint(len(data)) + varint(len(index) - 5)
    return data + index + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def entries(folder: Path) -> dict[bytes, bytes]:
    """The index of a folder: name -> serialized entry."""
    from deploykit.load.checkpoint import _table

    return dict(_table((folder / "variables/variables.index").read_bytes()))


def reindex(folder: Path, change) -> None:
    """Apply ``change`` to the parsed entry of every variable, then write the index again."""
    from tensorflow.core.protobuf.tensor_bundle_pb2 import BundleEntryProto

    out = {}
    for key, value in entries(folder).items():
        entry = BundleEntryProto.FromString(value)
        if key and key != b"_CHECKPOINTABLE_OBJECT_GRAPH":
            change(key.decode(), entry)
        out[key] = entry.SerializeToString() if key else value
    (folder / "variables/variables.index").write_bytes(table(out))


def regraph(folder: Path, change) -> None:
    """Apply ``change`` to the checkpoint's own tree of objects; its text is appended to the shard."""
    from tensorflow.core.protobuf.tensor_bundle_pb2 import BundleEntryProto
    from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

    from deploykit.load.checkpoint import Checkpoint

    key, shard = b"_CHECKPOINTABLE_OBJECT_GRAPH", folder / "variables/variables.data-00000-of-00001"
    tree = TrackableObjectGraph.FromString(Checkpoint(folder).text(key.decode()))
    change(tree)
    text = tree.SerializeToString()
    size = struct.pack("<I", len(text))
    checked = struct.pack("<I", masked(crc32c(size))) + text
    found = entries(folder)
    entry = BundleEntryProto.FromString(found[key])
    entry.offset, data = shard.stat().st_size, varint(len(text)) + checked
    entry.size, entry.crc32c = len(data), masked(crc32c(size + checked))
    with open(shard, "ab") as stream:
        stream.write(data)
    found[key] = entry.SerializeToString()
    (folder / "variables/variables.index").write_bytes(table(found))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
