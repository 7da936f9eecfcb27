"""Where the time of a file goes: rows that add up, kernels that are traced to layers, limits, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from deploykit.errors import DataError, InputError, LoadError
from deploykit.flops import graph_flops
from deploykit.profiling import NodeTime, Profile, Roofline, _named, _notices, _Origin, _reads, _runs, profile, roofline
from deploykit.report import profile_text

RANDOM = np.random.default_rng(0)
SECONDS = 0.2


def weights(*shape):
    return (RANDOM.standard_normal(shape) * 0.1).astype(np.float32)


def file(path, nodes, inputs, outputs, constants):
    """``nodes``: (name, operator, inputs, outputs, attributes)."""
    made = [helper.make_node(op, reads, writes, name=name, **more) for name, op, reads, writes, more in nodes]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(made, "net", values, ends, stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


SAME = {"pads": [1, 1, 1, 1]}
NET = [
    ("stem/Transpose", "Transpose", ["x"], ["stem/Transpose:0"], {"perm": [0, 3, 1, 2]}),
    ("stem/Conv", "Conv", ["stem/Transpose:0", "w1", "b1"], ["stem/Conv:0"], SAME),
    ("act/Relu", "Relu", ["stem/Conv:0"], ["act/Relu:0"], {}),
    ("deep/Conv", "Conv", ["act/Relu:0", "w2"], ["deep/Conv:0"], {"group": 32, **SAME}),
    ("swish/Sigmoid", "Sigmoid", ["deep/Conv:0"], ["swish/Sigmoid:0"], {}),
    ("swish/Mul", "Mul", ["deep/Conv:0", "swish/Sigmoid:0"], ["swish/Mul:0"], {}),
    ("squeeze/ReduceMean", "ReduceMean", ["swish/Mul:0"], ["squeeze/ReduceMean:0"], {"axes": [2, 3]}),
    ("gate/Conv", "Conv", ["squeeze/ReduceMean:0", "w3"], ["gate/Conv:0"], {}),
    ("gate/Sigmoid", "Sigmoid", ["gate/Conv:0"], ["gate/Sigmoid:0"], {}),
    ("excite/Mul", "Mul", ["swish/Mul:0", "gate/Sigmoid:0"], ["excite/Mul:0"], {}),
    ("last/bn/batchnorm/Conv", "Conv", ["excite/Mul:0", "w4"], ["last/bn/batchnorm/Conv:0"], SAME),
    ("flat/Reshape", "Reshape", ["last/bn/batchnorm/Conv:0", "to"], ["flat/Reshape:0"], {}),
    ("Cast", "Cast", ["flat/Reshape:0"], ["Cast:0"], {"to": TensorProto.FLOAT}),
    ("head/MatMul", "MatMul", ["Cast:0", "w5"], ["head/MatMul:0"], {}),
    ("head/Softmax", "Softmax", ["head/MatMul:0"], ["y"], {}),
]
CONSTANTS = {
    "w1": weights(32, 16, 3, 3), "b1": weights(32), "w2": weights(32, 1, 3, 3), "w3": weights(32, 32, 1, 1),
    "w4": weights(24, 32, 3, 3), "to": np.array([0, -1]), "w5": weights(24 * 40 * 40, 10),
}  # fmt: skip
SHAPE = (1, 40, 40, 16)
LAYERS = {"stem", "deep", "swish", "squeeze", "gate", "excite", "last/bn", "head"}


def samples(*shape):
    return {"x": RANDOM.random(shape or SHAPE, np.float32)}


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    return file(path, NET, {"x": ["batch", *SHAPE[1:]]}, ["y"], CONSTANTS)


@pytest.fixture(scope="module")
def found(net):
    return profile(net, samples(), threads=1, seconds=0.6)


# ------------------------------------------------------------------------------------------------ rows that add up


def test_the_rows_are_the_whole(found):
    for rows in (found.nodes, found.layers, found.kinds):
        assert sum(row.time_s for row in rows) == pytest.approx(found.total_s, rel=1e-9)
        assert sum(row.limit_s for row in rows) == pytest.approx(found.limit_s, rel=1e-9)
    assert found.nodes[-1].kind == "runtime"
    assert found.nodes[-1].time_s > 0
    assert sum(row["share"] for row in found.to_json()["kinds"]) == pytest.approx(1)


def test_the_profiler_s_own_cost_is_stated(found):
    """A run as it was under the profiler is the rows and what interrupted them."""
    profiled = found.total_s + found.interrupted_s
    assert found.plain_s * (1 + found.overhead) == pytest.approx(profiled, rel=0.2)
    assert found.runs >= 6


def test_every_kernel_has_a_layer(found):
    assert [node.name for node in found.nodes if node.layer is None] == ["runtime"]
    assert {layer.name for layer in found.layers} - {"runtime", "flat", "act"} == LAYERS


def by_layer(found):
    return {layer.name: layer for layer in found.layers}


def test_a_fused_activation_counts_for_its_convolution(found):
    (fused,) = [node for node in found.nodes if "Relu" in node.covers]
    assert (fused.layer, fused.kind) == ("stem", "convolution")
    assert {"Conv", "Relu"} <= set(fused.covers)


def test_reorders_count_for_the_layer_whose_tensor_they_reorder(found):
    reorders = [node for node in found.nodes if node.operator.startswith("Reorder")]
    if not reorders:  # this machine's ONNX Runtime keeps the plain layout
        pytest.skip("no blocked layout on this processor")
    assert {node.layer for node in reorders} <= LAYERS
    assert all(node.flops == 0 and node.bytes > 0 and node.kind == "layout" for node in reorders)


def test_what_belongs_to_no_layer_by_name_goes_to_its_producer_s(found):
    assert all(node.layer in ("flat", "last/bn") for node in found.nodes if node.operator in ("Cast", "Reshape"))


def test_operations_are_those_of_the_file(found, net):
    """However kernels are fused, split and reordered, each of the file's nodes counts once."""
    expected = graph_flops(onnx.load(net), {"x": SHAPE})
    assert sum(node.flops for node in found.nodes) == sum(expected.values())
    layers = by_layer(found)
    pixels = 40 * 40
    assert layers["deep"].flops == 2 * 9 * 32 * pixels
    assert layers["swish"].flops == (4 + 1) * 32 * pixels


def test_bytes_are_those_of_the_tensors(found):
    (deep,) = [node for node in found.nodes if node.layer == "deep" and node.kind == "convolution"]
    assert deep.bytes == 4 * (2 * 32 * 40 * 40 + 32 * 9)
    (product,) = [node for node in found.nodes if node.operator == "MatMul"]  # its weights are packed
    assert product.bytes == 4 * (24 * 40 * 40 + 24 * 40 * 40 * 10 + 10)


def test_the_share_of_a_kind(found):
    kinds = {row.name: row for row in found.kinds}
    assert found.share("convolution") == pytest.approx(kinds["convolution"].time_s / found.total_s)
    assert found.share("recurrent") == 0
    assert kinds["convolution"].nodes == 4


def test_the_report_is_plain_json(found):
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["input_shapes"] == {"x": list(SHAPE)}
    assert told["of_limit"] == pytest.approx(told["limit_ms"] / told["time_ms"])
    assert told["profiled_ms"] == pytest.approx(told["time_ms"] + told["interrupted_ms"])
    head = next(row for row in told["layers"] if row["layer"] == "last/bn")
    assert head["gflop_per_s"] == pytest.approx(head["flops"] / head["time_ms"] / 1e6)
    assert head["gb_per_s"] == pytest.approx(head["bytes"] / head["time_ms"] / 1e6)
    assert len(told["blamed"]) == 3


# -------------------------------------------------------------------------------------------------- other graphs


def test_samples_are_repeated_to_the_batch(net):
    found = profile(net, samples(2, *SHAPE[1:]), batch=3, threads=1, seconds=SECONDS)
    assert found.input_shapes == {"x": (3, *SHAPE[1:])}
    assert by_layer(found)["deep"].flops == 3 * 2 * 9 * 32 * 1600


def body():
    nodes = [
        helper.make_node("MatMul", ["state", "w"], ["product"], name="cell/step/MatMul"),
        helper.make_node("Tanh", ["product"], ["next"], name="cell/step/Tanh"),
        helper.make_node("Identity", ["go"], ["on"], name="cell/step/Identity"),
    ]
    value = helper.make_tensor_value_info
    inputs = [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("state", 1, [32, 64])]
    return helper.make_graph(nodes, "body", inputs, [value("on", TensorProto.BOOL, []), value("next", 1, [32, 64])])


def test_a_loop_has_what_its_body_does_not(tmp_path):
    """The nodes inside are rows of their own, so often as they ran, and their time is not the loop's as well."""
    loop = ("cell/Loop", "Loop", ["times", "", "x"], ["y"], {"body": body()})
    path = file(tmp_path / "loop.onnx", [loop], {"x": [32, 64]}, ["y"], {"times": np.array(7), "w": weights(64, 64)})
    found = profile(path, samples(32, 64), threads=1, seconds=SECONDS)
    rows = {node.operator: node for node in found.nodes}
    assert rows["MatMul"].flops == 7 * 2 * 32 * 64 * 64
    assert rows["MatMul"].bytes == 7 * 4 * (2 * 32 * 64 + 64 * 64)
    assert rows["MatMul"].layer == "cell/step"
    assert sum(node.time_s for node in found.nodes) == pytest.approx(found.total_s)
    assert found.total_s + found.interrupted_s <= found.plain_s * (1 + found.overhead) * 1.2  # counted once
    assert any("Loop" in text and "unknown" in text for text in found.notices)


def test_nodes_that_cannot_be_told_apart_get_names(tmp_path):
    names = ("", "same/MatMul", "", "same/MatMul")
    chain = ["x", "one/out", "two/out", "three/out", "y"]
    nodes = [
        (name, "MatMul" if name else "Neg", [chain[i], "w"][: 1 + bool(name)], [chain[i + 1]], {})
        for i, name in enumerate(names)
    ]
    path = file(tmp_path / "net.onnx", nodes, {"x": [8, 32]}, ["y"], {"w": weights(32, 32)})
    before = path.read_bytes()
    found = profile(path, samples(8, 32), threads=1, seconds=SECONDS)
    products = [node for node in found.nodes if node.operator == "MatMul"]
    assert [node.flops for node in products] == [2 * 8 * 32 * 32] * 2
    assert len({node.name for node in found.nodes}) == 5
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("names", "copied"), [(["a/Neg", "b/Neg"], False), (["a/Neg", "a/Neg"], True), (["a/Neg", ""], True)]
)
def test_only_a_file_whose_nodes_cannot_be_told_apart_is_copied(tmp_path, names, copied):
    tensors = ["x", "a/Neg:0", "y"]
    nodes = [(name, "Neg", [tensors[i]], [tensors[i + 1]], {}) for i, name in enumerate(names)]
    path = file(tmp_path / "net.onnx", nodes, {"x": [2]}, ["y"], {})
    found = _named(path, onnx.load(path), tmp_path)
    assert (found != path) == copied
    assert len({node.name for node in onnx.load(found).graph.node} - {""}) == 2


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        (["net_1/one_1/MatMul", "net_1/two_1/Tensordot/MatMul"], ["one_1", "two_1"]),  # the model's name is no layer
        (["one/MatMul", "one/MatMul_1"], ["one", "one"]),  # ... but one layer is one
        (["a/one/MatMul", "b/MatMul"], ["a/one", "b"]),
        (["/one/bn/batchnorm/mul_1", "two/Reshape/Concat"], ["one/bn", "two"]),
        (["Reshape/Concat", "MatMul"], ["Reshape", "Reshape"]),  # a layer of that name; a producer's
        (["MatMul", "b/MatMul"], ["b", "b"]),  # a consumer's
    ],
)
def test_layers_are_told_by_names(tmp_path, names, layers):
    tensors = ["x", "a", "y"]
    nodes = [(name, "Neg", [tensors[i]], [tensors[i + 1]], {}) for i, name in enumerate(names)]
    proto = onnx.load(file(tmp_path / "net.onnx", nodes, {"x": [2]}, ["y"], {}))
    covers = _Origin(proto, {"x": (2,)}).follow(proto.graph)
    assert [covers[name].layer for name in names] == layers


def graph(*nodes):
    """An optimised graph: (name, operator, inputs, outputs)."""
    made = [helper.make_node(op, reads, writes, name=name) for name, op, reads, writes in nodes]
    return helper.make_graph(made, "optimised", [], [])


def origin(path, nodes, constants=(), size=10):
    proto = onnx.load(file(path, nodes, {"x": [size]}, ["y"], dict(constants)))
    return _Origin(proto, {"x": (size,)})


CHAIN = [
    ("one/bn/Mul", "Mul", ["x", "s"], ["one/bn/Mul:0"], {}),
    ("one/bn/Add", "Add", ["one/bn/Mul:0", "t"], ["one/bn/Add:0"], {}),
    ("two/Sigmoid", "Sigmoid", ["one/bn/Add:0"], ["two/Sigmoid:0"], {}),
    ("two/Mul", "Mul", ["one/bn/Add:0", "two/Sigmoid:0"], ["two/Mul:0"], {}),
    ("three/Exp", "Exp", ["two/Mul:0"], ["y"], {}),
]
AFFINE = {"s": weights(10), "t": weights(10)}


def test_inner_tensors_are_followed_through_the_names_of_kernels(tmp_path):
    """As the blocked layout leaves them: tensors without a name, reorders, an affine that became a convolution."""
    covers = origin(tmp_path / "net.onnx", CHAIN, AFFINE).follow(
        graph(
            ("ReorderInput", "ReorderInput", ["x"], ["r0"]),
            ("one/bn/Mul:0_mul_nchwc", "Conv", ["r0", "s"], ["r1"]),
            ("one/bn/Add:0_nchwc", "Conv", ["r1", "t"], ["r2"]),
            ("Reshape_token_7", "Reshape", ["r2", "to"], ["r3"]),
            ("two/Mul/QuickGeluFusion/", "QuickGelu", ["r3"], ["r4"]),
            ("ReorderOutput", "ReorderOutput", ["r4"], ["two/Mul:0"]),
            ("three/Exp", "Exp", ["two/Mul:0"], ["y"]),
            ("FusedByNobody", "Mystery", ["y"], ["nowhere"]),
        )
    )
    assert {name: (cover.layer, cover.operators, cover.flops) for name, cover in covers.items()} == {
        "ReorderInput": ("one/bn", (), 0),
        "one/bn/Mul:0_mul_nchwc": ("one/bn", ("Mul",), 10),
        "one/bn/Add:0_nchwc": ("one/bn", ("Add",), 10),
        "Reshape_token_7": ("one/bn", (), 0),
        "two/Mul/QuickGeluFusion/": ("two", ("Sigmoid", "Mul"), 50),
        "ReorderOutput": ("two", (), 0),
        "three/Exp": ("three", ("Exp",), 10),
        "FusedByNobody": (None, (), None),
    }


def test_a_kernel_counts_for_its_heaviest_node(tmp_path):
    covers = origin(tmp_path / "net.onnx", CHAIN, AFFINE).follow(graph(("all", "Fused", ["x"], ["y"])))
    assert covers["all"].operators == ("Mul", "Add", "Sigmoid", "Mul", "Exp")
    assert (covers["all"].layer, covers["all"].flops) == ("two", 80)


def test_a_node_that_two_kernels_repeat_counts_once(tmp_path):
    covers = origin(tmp_path / "net.onnx", CHAIN, AFFINE).follow(
        graph(("a", "Fused", ["x"], ["two/Mul:0"]), ("b", "Fused", ["x"], ["y"]))
    )
    assert [covers[name].flops for name in "ab"] == [70, 10]


def test_what_is_computed_while_loading_does_not_count(tmp_path):
    nodes = [("one/Exp", "Exp", ["s"], ["k"], {}), ("one/Add", "Add", ["x", "k"], ["y"], {})]
    covers = origin(tmp_path / "net.onnx", nodes, AFFINE).follow(graph(("one/Add", "Add", ["x", "folded"], ["y"])))
    assert (covers["one/Add"].operators, covers["one/Add"].flops) == (("Add",), 10)


# ------------------------------------------------------------------------------------------------ what is recorded


def event(name, ts, dur, operator="Op", shape=(4,), suffix="_kernel_time"):
    about = {"op_name": operator, "input_type_shape": [{"float": list(shape)}],
             "output_type_shape": [{"double": list(shape)}]}  # fmt: skip
    return {"cat": "Node", "name": name + suffix, "ts": ts, "dur": dur, "args": about}


def run(ts, dur):
    return {"cat": "Session", "name": "model_run", "ts": ts, "dur": dur, "args": {}}


def test_a_node_s_time_is_its_own():
    """From the profiler's events: a loop of 50 µs with nodes of 10 and 2x5 µs inside, and one of 20 µs after it."""
    events = [
        event("inner", 12, 10), event("loop", 10, 50, "Loop"), event("again", 30, 5), event("again", 40, 5),
        event("after", 60, 20), run(5, 90), event("after", 60, 7, suffix="_fence_before"),
    ]  # fmt: skip
    (found,) = _runs(events, 0)
    times = {name: kernel.time_us for (name, _), kernel in found.kernels.items()}
    assert times == {"loop": 30, "inner": 10, "again": 10, "after": 20}
    assert found.total_us == 90
    assert len(found.kernels["again", "Op"].calls) == 2
    assert found.kernels["after", "Op"].calls == [([((4,), 16)], [((4,), 32)])]


def test_runs_for_warming_up_do_not_count():
    events = [run(0, 100), event("a", 10, 90), run(200, 30), event("a", 210, 5), run(300, 40), event("a", 310, 6)]
    found = _runs(events, 1)
    assert [r.total_us for r in found] == [30, 40]
    assert [r.kernels["a", "Op"].time_us for r in found] == [5, 6]


def test_packed_constants_and_places_left_out_are_found():
    """ONNX Runtime lists neither."""
    node = helper.make_node("LSTM", ["x", "w", "r", "", "", "h"], ["y"])
    x, w, r, h = ((5, 1, 3), 60), ((1, 16, 3), 192), ((1, 16, 4), 256), ((1, 1, 4), 16)
    stored = {"w": w, "r": r}
    expected = [x, w, r, None, None, h]
    assert _reads(node, [x, h], stored) == expected
    assert _reads(node, [x, w, r, h], stored) == expected
    assert _reads(node, [x, r, h], stored) == expected
    product, square = helper.make_node("MatMul", ["w", "x"], ["y"]), ((4, 4), 64)
    assert _reads(product, [square], {"w": square}) == [square, square]  # the one that is listed is x


# ------------------------------------------------------------------------------------------------------ the limit

LIMITS = Roofline(2, 100e9, ((1000, 40e9), (1_000_000, 10e9)))


@pytest.mark.parametrize(
    ("operations", "size", "expected"),
    [
        (1e9, 1000, 0.01),  # bound by arithmetic
        (0, 1000, 1000 / 40e9),  # bound by the cache
        (0, 10, 10 / 40e9),
        (0, 5e6, 5e6 / 10e9),  # ... by memory
        (0, 31622.7766, 31622.7766 / 20e9),  # halfway, on logarithms
        (0, 0, 0),
    ],
)
def test_the_limit_is_the_roofline_s(operations, size, expected):
    assert LIMITS.limit_s(operations, size) == pytest.approx(expected, rel=1e-6)


def test_a_machine_is_measured_once_for_each_number_of_threads(found):
    limits = roofline(1)
    assert limits is found.roofline
    speeds = [speed for _, speed in limits.copies]
    assert speeds == sorted(speeds, reverse=True)
    assert limits.peak_flops_s > 1e8
    assert limits.copies[-1][0] >= 1 << 26


# ----------------------------------------------------------------------------------------------- what is refused


def broken(path):
    """A file that loads, and fails when it runs."""
    nodes = [("a/Reshape", "Reshape", ["x", "to"], ["y"], {})]
    return file(path, nodes, {"x": ["n", 3]}, ["y"], {"to": np.array([7, 7])})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": "net.keras"}, InputError, "only .onnx files; write one with: deploykit export"),
        ({"model": "absent.onnx"}, LoadError, "does not exist"),
        ({"threads": 0}, InputError, "threads=0"),
        ({"batch": 0}, InputError, "batch=0"),
        ({"seconds": float("nan")}, InputError, "seconds=nan"),
        ({"inputs": {}}, DataError, "no data for input x"),
        ({"inputs": {"x": np.zeros((1, 3), np.float32)}}, DataError, "reshape the data"),
        ({"inputs": {"x": np.zeros((0, *SHAPE[1:]), np.float32)}, "batch": 2}, DataError, "no samples"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refused_in_one_line(net, change, error, words):
    given = {"model": net, "inputs": samples(), "threads": 1, "seconds": SECONDS, **change}
    with pytest.raises(error, match=r"^[^\n]*$") as caught:
        profile(given.pop("model"), given.pop("inputs"), **given)
    assert words in str(caught.value)


def test_a_file_that_does_not_run_says_why(tmp_path):
    with pytest.raises(LoadError, match=r"cannot profile .*broken.onnx: .*Reshape") as caught:
        profile(broken(tmp_path / "broken.onnx"), samples(2, 3), threads=1, seconds=SECONDS)
    assert "\n" not in str(caught.value)


def test_nothing_is_left_behind(net, found):
    assert [path.name for path in net.parent.iterdir()] == ["net.onnx"]


def test_importing_it_needs_no_onnxruntime():
    script = "import deploykit.profiling, sys; sys.exit(bool({'tensorflow', 'onnxruntime'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# -------------------------------------------------------------------------------------------------- for a terminal


def node(name, time_ms, limit_ms, kind="convolution", layer=None, flops=1000):
    return NodeTime(time_ms / 1e3, flops, 100, limit_ms / 1e3, name, "Conv", kind, layer or name, ("Conv",))


def known(*nodes, **more):
    total = sum(row.time_s for row in nodes)
    told = Profile("a/net.onnx", 2, {"x": (1, 3)}, 9, total, 0.0, total, 0.05, nodes, LIMITS)
    return dataclasses.replace(told, **more)


def shown(found, **more):
    console = Console(file=io.StringIO(), width=160)
    profile_text.profile(found.to_json(), console, **more)
    return console.file.getvalue()


def test_the_verdict_says_how_far_what_and_whom_to_blame():
    told = known(node("good", 6, 6), node("bad", 3, 0.5), node("[red]odd", 1, 1, "elementwise"))
    assert [row.name for row in told.blamed][:2] == ["bad", "good"]
    words = profile_text.verdict(told.to_json())
    assert "75% of what this machine can do: 10.0 ms against a limit of 7.50 ms" in words
    assert "convolution takes 90%" in words
    assert "of 2.50 ms lost most is in bad (2.50 ms)" in words
    assert "good" not in words


def test_a_terminal_gets_the_longest_layers_and_the_rest_in_one_row():
    text = shown(known(*(node(f"layer{i}", 10 - i, 1) for i in range(8)), notices=("a notice",)), rows=3)
    assert [name in text for name in ("layer0", "layer2", "layer3", "5 more")] == [True, True, False, True]
    assert "a notice" in text
    assert "the profiler added 5.0%" in text
    assert "100 GFLOP/s, 40 GB/s in cache, 10 GB/s in memory" in text


def test_names_are_no_markup():
    assert "[red]odd" in shown(known(node("[red]odd", 1, 1)))


def test_a_real_profile_is_shown(found):
    text = shown(found)
    assert "last/bn" in text
    assert "convolution" in text


def test_what_disturbs_a_measurement_is_said(found):
    """Each notice, and none without its cause."""
    quiet = known(node("a", 6, 5))
    assert list(_notices(quiet)) == []
    for change, words in (
        ({"overhead": 0.5}, "took 1.50x those without"),
        ({"interrupted_s": 0.003}, "took 1.50x the sum"),
        ({"nodes": (node("a", 6, 5, flops=None),)}, "operations of Conv are unknown"),
        ({"nodes": (node("a", 6, 7),)}, "less than their limits"),
        ({"nodes": (dataclasses.replace(node("a", 6, 5), layer=None),)}, "belong to no layer"),
    ):
        (text,) = _notices(dataclasses.replace(quiet, **change))
        assert words in text
