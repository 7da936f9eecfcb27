"""The picture of a fuse: what it shows, that no name breaks it, and that its file is whole or absent."""

from __future__ import annotations

import json
import re
import shutil
import stat
from itertools import pairwise
from xml.etree import ElementTree

import keras
import pytest
from nets import chain, enliven

from deploykit.drawing import picture
from deploykit.errors import InputError, MissingComponentError, OutputError
from deploykit.fuse import Decision
from deploykit.graph import trace
from deploykit.report import drawing
from deploykit.report.drawing import OUTCOMES, Arrow, Box, Side, claim_drawing, dot, draw, quoted, shortened

L = keras.layers
BN = L.BatchNormalization
HOSTILE = 'a "quote" <b>\\N\\n&amp;\nnew line \x00\x1b[31m \ud800 -> {} | ;'

rendering = pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")


def decision(layer, outcome, into=(), code="folded", reason="exact"):
    return Decision(layer, "BatchNormalization", outcome, "backward" if into else None, tuple(into), (), code, reason)


def small():
    """Two sources: one that goes into ``dense``, one that stays; and the model without the first."""
    layers = L.Dense(5, name="dense"), BN(name="goes"), L.ReLU(name="relu"), BN(name="stays"), L.ReLU(name="end")
    before = chain((6,), *layers)
    x = keras.Input((6,), name="x")
    after = keras.Model(x, L.ReLU(name="end")(BN(name="stays")(L.ReLU(name="relu")(L.Dense(5, name="dense")(x)))))
    made = [decision("goes", "fused", ["dense"]), decision("stays", "kept", code="no_sink", reason="relu is none")]
    return picture(trace(before), made, trace(after))


def named(side):
    return {box.name: box for box in side.boxes if not box.end}


def lines(text, box):
    """The line of the source that says what a box looks like, once per side."""
    return [line for line in text.splitlines() if f'label="{box}\\n' in line and "ellipse" not in line]


# --------------------------------------------------------------------------------------- from traces to boxes


def test_a_source_that_goes_is_gone_in_before_and_its_sink_says_so_in_after():
    before, after = small()
    assert (named(before)["goes"].outcome, named(before)["goes"].state) == ("fused", "gone")
    assert named(before)["goes"].into == ("dense",)
    assert "goes" not in named(after)
    assert named(after)["dense"].took == ("goes",)
    assert named(before)["dense"].took == ()


def test_a_source_that_stays_is_coloured_on_both_sides():
    for side in small():
        box = named(side)["stays"]
        assert (box.outcome, box.state, box.code, box.reason) == ("kept", "stays", "no_sink", "relu is none")


def test_arrows_follow_the_tensors_from_input_to_output():
    before, _ = small()
    names = [f"{box.name}:{box.kind}" for box in before.boxes]
    assert [(names[arrow.start], names[arrow.stop]) for arrow in before.arrows] == [
        ("x:Input", "dense:Dense"),
        ("dense:Dense", "goes:BatchNormalization"),
        ("goes:BatchNormalization", "relu:ReLU"),
        ("relu:ReLU", "stays:BatchNormalization"),
        ("stays:BatchNormalization", "end:ReLU"),
        ("end:ReLU", "end:Output"),
    ]


def test_a_layer_called_twice_is_two_boxes_and_a_tensor_used_twice_one_arrow():
    x = keras.Input((6,), name="x")
    twice = L.Dense(6, name="twice")
    found = trace(keras.Model(x, L.Add(name="sum")([y := twice(twice(x)), y])))
    side, _ = picture(found, [], found)
    assert [box.name for box in side.boxes] == ["x", "twice", "twice", "sum", "sum"]
    assert side.arrows == (Arrow(0, 1), Arrow(1, 2), Arrow(2, 3), Arrow(3, 4))


def test_what_is_left_of_a_reduced_source_keeps_its_colour():
    before = chain((6,), L.Dense(5, name="dense"), BN(name="bn"), L.ReLU())
    after = chain((6,), L.Dense(5, name="dense"), L.Rescaling(1.0, name="bn"), L.ReLU())
    _, side = picture(trace(before), [decision("bn", "reduced", ["dense"])], trace(after))
    assert (named(side)["bn"].kind, named(side)["bn"].outcome) == ("Rescaling", "reduced")
    assert named(side)["dense"].took == ("bn",)


def test_a_layer_that_only_after_has_is_new():
    before = chain((6,), L.Dense(5, name="dense"))
    after = chain((6,), L.Dense(5, name="dense"), L.Rescaling(2.0, name="add"))
    _, side = picture(trace(before), [], trace(after))
    assert {box.name: box.state for box in side.boxes if not box.end} == {"dense": "stays", "add": "new"}


def test_the_identity_that_keeps_the_name_of_a_fused_output_is_no_source():
    before = chain((6,), L.Dense(5, name="dense"), BN(name="y"))
    after = chain((6,), L.Dense(5, name="dense"), L.Identity(name="y"))
    left, right = picture(trace(before), [decision("y", "fused", ["dense"])], trace(after))
    assert named(left)["y"].state == "gone"
    assert (named(right)["y"].kind, named(right)["y"].outcome) == ("Identity", None)


# ------------------------------------------------------------------------------------------ from boxes to dot


def test_dot_has_both_sides_with_their_marks():
    text = dot(*small(), title="net")
    assert re.findall(r"subgraph cluster_(\w+)", text) == ["before", "after"]
    (goes,) = lines(text, "goes")
    assert "fused → dense" in goes
    assert OUTCOMES["fused"].fill in goes
    assert "dashed" in goes
    plain, sink = lines(text, "dense")
    assert "penwidth" not in plain
    assert "penwidth=3" in sink
    assert "took goes" in sink
    for stays in lines(text, "stays"):
        assert OUTCOMES["kept"].fill in stays
        assert "kept: no_sink" in stays
        assert "no_sink: relu is none" in stays.split("tooltip=")[1]
        assert "dashed" not in stays


def test_a_new_layer_has_a_double_frame():
    text = dot(Side((), ()), Side((Box("pad", "ZeroPadding2D", state="new"),), ()))
    assert "peripheries=2" in lines(text, "pad")[0]


def test_the_legend_names_every_outcome_in_its_colour():
    text = dot(Side((), ()), Side((), ()))
    assert all(f'<TD BGCOLOR="{look.fill}">{name}: ' in text for name, look in OUTCOMES.items())


def test_outcomes_can_be_told_apart_without_seeing_colours():
    def brightness(fill):  # Rec. 709 luma
        red, green, blue = (int(fill[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    assert set(OUTCOMES) == {"fused", "reduced", "kept"}
    levels = sorted([*(brightness(look.fill) for look in OUTCOMES.values()), 1.0])
    assert min(high - low for low, high in pairwise(levels)) > 0.1
    assert levels[0] > 0.35  # black letters stay readable


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ('say "x"', '"say \\"x\\""'),
        ("\\N", '"\\\\N"'),
        ("end\\", '"end\\\\"'),
        ('\\"', '"\\\\\\""'),
        ("&lt;", '"&amp;lt;"'),
        ("<b>", '"<b>"'),
        ("two\nlines\there", '"two lines here"'),
        ("nul\x00esc\x1b\ud800", '"nul?esc??"'),
    ],
)
def test_quoted_shows_the_signs_themselves(text, written):
    assert quoted(text) == written


def test_a_hostile_name_stays_within_its_string():
    box = Box(HOSTILE, "Dense", outcome="kept", reason=HOSTILE, into=(HOSTILE,), took=(HOSTILE,))
    text = dot(Side((box,), ()), Side((), ()), title=HOSTILE)
    text.encode()
    bare = re.sub(r'"(\\.|[^"\\])*"', "", text.split("subgraph")[1])
    assert bare.count("[") == bare.count("]") == 1
    assert "quote" not in bare
    assert "<b>" not in text.split("subgraph")[0]  # in the title, which is HTML-like
    (line,) = (line for line in text.splitlines() if line.startswith("    b0 "))
    assert "\\" not in re.sub(r'\\["n]', "", line.split("tooltip=")[1])


def test_long_names_keep_both_ends():
    name = "stage_4/block_17/" + "very_" * 20 + "deep_conv"
    assert shortened("conv", 40) == "conv"
    assert len(shortened(name, 40)) == 40
    assert shortened(name, 40).startswith("stage_4/block_17/")
    assert shortened(name, 40).endswith("deep_conv")
    text = dot(Side((Box(name, "Conv2D"),), ()), Side((), ()))
    (label, tooltip) = next(line for line in text.splitlines() if line.startswith("    b0 ")).split("tooltip=")
    assert name not in label
    assert name in tooltip


def test_many_names_are_counted():
    box = Box("dense", "Dense", took=tuple(f"bn_{i}" for i in range(9)))
    (line,) = lines(dot(Side((), ()), Side((box,), ())), "dense")
    assert "took bn_0, bn_1 +7" in line
    assert "bn_8" in line.split("tooltip=")[1]


# ------------------------------------------------------------------------------------------- from dot to file


@pytest.fixture
def no_graphviz(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def fake_dot(monkeypatch, tmp_path, script):
    """A program called ``dot`` that does what a shell script says."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "dot"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize("suffix", [".dot", ".gv", ".DOT"])
def test_the_source_needs_no_graphviz(no_graphviz, tmp_path, suffix):
    path = draw("digraph { é }", claim_drawing(tmp_path / f"net{suffix}"))
    assert path.read_text(encoding="utf-8") == "digraph { é }"


@pytest.mark.parametrize("step", [claim_drawing, lambda path: draw("digraph {}", path)])
def test_without_graphviz_the_remedy_is_named(no_graphviz, tmp_path, step):
    with pytest.raises(MissingComponentError, match="apt install graphviz"):
        step(tmp_path / "net.svg")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["net.txt", "net", "net.svgz"])
def test_another_suffix_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"\.svg, \.png, \.pdf, \.dot, \.gv"):
        claim_drawing(tmp_path / name)


def test_an_existing_file_is_replaced_only_by_force(tmp_path):
    path = tmp_path / "net.dot"
    path.write_text("mine")
    for refused in (lambda: claim_drawing(path), lambda: draw("digraph {}", path)):
        with pytest.raises(OutputError, match="--force"):
            refused()
    assert path.read_text() == "mine"
    assert draw("digraph {}", path, force=True).read_text() == "digraph {}"


def test_a_picture_never_replaces_an_input(tmp_path):
    path = tmp_path / "net.dot"
    path.write_text("mine")
    with pytest.raises(OutputError, match="input"):
        claim_drawing(path, force=True, inputs=(path,))


@pytest.mark.parametrize(
    ("script", "words"),
    [("echo half; echo out of ink >&2; exit 3", "out of ink"), ("exit 0", "exit code 0"), ("exec sleep 5", "1 s")],
)
def test_a_failing_graphviz_leaves_nothing(monkeypatch, tmp_path, script, words):
    fake_dot(monkeypatch, tmp_path, script)
    with pytest.raises(OutputError, match=words):
        draw("digraph {}", tmp_path / "net.svg", patience_s=1)
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@rendering
@pytest.mark.parametrize(
    ("suffix", "start"), [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF"), (".PNG", b"\x89P")]
)
def test_graphviz_draws_every_kind_of_file(tmp_path, suffix, start):
    assert draw(dot(*small()), tmp_path / f"net{suffix}").read_bytes().startswith(start)


@rendering
def test_the_drawing_shows_hostile_names_sign_by_sign(tmp_path):
    name = 'q"<b>\\N\\n&amp; &lt;'
    side = Side((Box(name, "Dense", took=(name,)), Box("two", "Dense")), (Arrow(0, 1),))
    tree = ElementTree.parse(draw(dot(side, side, title=name), tmp_path / "net.svg"))
    shown = ["".join(element.itertext()) for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert shown.count(name) == 3  # the title and a box on each side
    assert shown.count(f"took {name}") == 2
    tips = [element.get("{http://www.w3.org/1999/xlink}title") for element in tree.iter()]
    expected = name.replace("\\", drawing.BACKSLASH)
    assert sum(tip is not None and tip.startswith(f"{expected}: Dense") for tip in tips) == 2


# ------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def net(tmp_path):
    path = tmp_path / "net.keras"
    x = keras.Input((6,), name="x")
    y = L.Dense(3, name="y")(L.ReLU()(BN(name="bn")(L.Dense(5, name="dense")(x))))
    enliven(keras.Model(x, y)).save(path)
    return path


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_fuse_draws_what_it_did(cli, net, tmp_path):
    code, out, err = cli("fuse", net, "--plot", tmp_path / "net.dot", "--json", "-")
    assert code == 0, err
    assert json.loads(out)["outputs_written"] == [str(tmp_path / "net.dot"), str(tmp_path / "net.fused.keras")]
    assert "fused → dense" in (tmp_path / "net.dot").read_text(encoding="utf-8")


def test_a_dry_run_draws_and_writes_no_model(cli, net, tmp_path):
    code, _, err = cli("fuse", net, "--dry-run", "--plot", tmp_path / "net.dot")
    assert code == 0, err
    assert names(tmp_path) == {"net.keras", "net.dot"}


@pytest.mark.parametrize(
    ("plot", "words"),
    [("old.dot", "exists already"), ("net.keras", "a picture is written as"), ("net.svg", "apt install graphviz")],
)
def test_a_picture_that_cannot_be_is_refused_before_the_work(cli, net, tmp_path, no_graphviz, monkeypatch, plot, words):
    monkeypatch.setattr("deploykit.cli._load", lambda *a, **k: pytest.fail("the work had begun"))
    (tmp_path / "old.dot").write_text("mine")
    code, out, err = cli("fuse", net, "--plot", tmp_path / plot)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert words in err
    assert names(tmp_path) == {"net.keras", "old.dot"}


def test_the_report_and_the_picture_are_two_files(cli, net, tmp_path):
    code, _, err = cli("fuse", net, "--plot", tmp_path / "net.dot", "--json", tmp_path / "net.dot")
    assert code == 2
    assert "--json" in err
    assert "--plot" in err


def test_a_drawing_that_fails_leaves_no_model(cli, net, tmp_path, monkeypatch):
    fake_dot(monkeypatch, tmp_path, "exit 3")
    code, _, err = cli("fuse", net, "--plot", tmp_path / "net.svg")
    assert code == 2, err
    assert "exit code 3" in err
    assert names(tmp_path) == {"net.keras", "bin"}
