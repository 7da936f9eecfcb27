"""Random nets: fusing keeps every promise on them, the generator makes all it should, the shrinker shrinks."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import random_nets
from random_nets import (
    ALL_OPS,
    Graph,
    Program,
    Source,
    Step,
    alive,
    build,
    config,
    draft,
    failure,
    generate,
    inferred,
    shrink,
    shrunk,
    smaller,
)

from deploykit import graph
from deploykit.fuse import Fused, conduits

L = keras.layers
SEEDS = range(12)


@pytest.mark.parametrize("seed", SEEDS)
def test_fusing_a_random_net_is_exact_idempotent_and_leaves_its_source_alone(seed):
    found = failure(program := generate(seed))
    if found is not None:
        pytest.fail(f"seed {seed}: {found}\n{shrunk(program, found, 60)}")


# ---------------------------------------------------------------------------------------------- the generator


@pytest.fixture(scope="module")
def programs():
    return [draft(seed) for seed in range(1000)]


def test_every_instruction_and_every_choice_of_its_options_occurs(programs):
    seen = {(step.op, key, value) for p in programs for step in p.graph.calls() for key, value in step.options}
    wanted = {
        (op, key, value) for op, row in ALL_OPS.items() for key, values in row.choices.items() for value in values
    }
    assert not {choice for choice in wanted - seen if choice[0] not in RARE}
    assert set(ALL_OPS) | {"Again", "Nested"} == {step.op for p in programs for step in p.graph.calls()}


RARE = ("GRU", "LSTM", "SimpleRNN", "Bidirectional", "GroupNormalization")  # they occur; not all of their options


def has_twice(program, op):
    again = [dict(step.options)["of"] for step in program.graph.steps if step.op == "Again"]
    return any(step.op == op and step.name in again for step in program.graph.steps)


WANTED = {
    "gammas of both signs": lambda p: p.negative,
    "several inputs": lambda p: len(p.graph.inputs) > 1,
    "tokens": lambda p: any(x.tokens for x in p.graph.inputs),
    "several outputs": lambda p: len(p.graph.outputs) > 1,
    "an output that is read inside": lambda p: {x for s in p.graph.steps for x in s.on} & {*p.graph.outputs},
    "a shared BatchNormalization": lambda p: has_twice(p, "BatchNormalization"),
    "a shared convolution": lambda p: has_twice(p, "Conv"),
    "a nested model called twice": lambda p: has_twice(p, "Nested"),
    "models nested twice": lambda p: any(
        inner.op == "Nested" for s in p.graph.steps if s.body is not None for inner in s.body.calls()
    ),
    "a nested model of several outputs": lambda p: any(
        s.body is not None and len(s.body.outputs) > 1 for s in p.graph.calls()
    ),
    "a nested model of several inputs": lambda p: any(len(s.on) > 1 for s in p.graph.calls() if s.op == "Nested"),
    "more than 25 layers": lambda p: sum(1 for _ in p.graph.calls()) > 25,
}


@pytest.mark.parametrize("row", WANTED)
def test_nets_have(row, programs):
    assert sum(1 for p in programs if WANTED[row](p)) >= 5


def test_nets_have_five_to_forty_layers_and_a_third_has_gammas_of_both_signs(programs):
    assert all(5 <= sum(1 for _ in p.graph.calls()) <= 40 for p in programs)
    assert 0.25 < np.mean([p.negative for p in programs]) < 0.42


def test_a_seed_is_one_net_and_prints_as_one(programs):
    assert [str(draft(seed)) for seed in range(20)] == [str(p) for p in programs[:20]]
    assert len({str(p) for p in programs}) == len(programs)


@pytest.mark.parametrize("seed", range(6))
def test_a_build_is_the_same_every_time(seed):
    one, two = build(generate(seed)), build(generate(seed))
    # Keras makes masks by operations that it names itself
    own = re.compile(r"'(not_equal|logical_or|logical_and|any)(_\d+)?'")
    first, second = (own.sub(r"'\1'", config(each.model)) for each in (one, two))
    assert first == second
    assert all(map(np.array_equal, map(graph.numpy, one.model.weights), map(graph.numpy, two.model.weights)))
    assert all(np.array_equal(one.samples[name], two.samples[name]) for name in one.samples)


ALIVE = range(20, 40)


@pytest.fixture(scope="module")
def built():
    return [(p, build(p)) for p in map(generate, ALIVE)]


def test_shapes_are_what_keras_makes_of_them(built):
    for program, net in built:
        shapes = inferred(program.graph)
        assert {name: value.shape[1:] for name, value in net.values.items()} == shapes
        assert [tuple(x.shape[1:]) for x in net.model.outputs] == [shapes[name] for name in program.graph.outputs]


def test_most_drafts_are_alive_and_a_dead_one_is_drawn_again(monkeypatch):
    drafts = [draft(seed) for seed in range(20)]
    assert np.mean([alive(build(p), p) for p in drafts]) > 0.8
    monkeypatch.setattr(random_nets, "alive", lambda net, program: program != drafts[0])
    assert generate(0) == draft(0, 1)


def test_a_net_whose_output_hangs_on_nothing_is_dead():
    dead = Step("v3", "ReLU", ("v2",), (("max_value", None), ("negative_slope", 0.0), ("threshold", 1e5)))
    program = replace(TINY, graph=replace(TINY.graph, steps=(*TINY.graph.steps[:2], dead)))
    assert alive(build(TINY), TINY)
    assert not alive(build(program), program)


def test_every_branch_of_an_activation_is_taken(built):
    into = [
        (dict(step.options), net.values[step.on[0]])
        for program, net in built
        for step in program.graph.steps
        if step.op == "ReLU"
    ]
    assert sum(1 for _, value in into if value.min() < 0 < value.max()) > 0.9 * len(into)
    six = [value for options, value in into if options["max_value"] == 6.0]
    assert sum(1 for value in six if value.max() > 6) > 0.5 * len(six) > 2
    for program, net in built:
        for source in program.graph.inputs:
            if not source.tokens and len(source.shape) > 1:
                assert not net.samples[source.name][1, 0].any()
                assert not net.samples[source.name][1, -1].any()
                assert np.abs(net.samples[source.name]).max() > 6


# ---------------------------------------------------------------------------------------- negative controls

TINY = Program(
    3,
    False,
    Graph(
        (Source("x0", (5,)),),
        (
            Step("v1", "Dense", ("x0",), (("units", 4), ("activation", "linear"), ("use_bias", True))),
            Step(
                "v2",
                "BatchNormalization",
                ("v1",),
                (("axis", -1), ("scale", True), ("center", True), ("epsilon", 1e-3), ("stats", "fitting")),
            ),
            Step("v3", "Activation", ("v2",), (("activation", "relu"),)),
        ),
        ("v3",),
    ),
)


def with_decision(fused: Fused, **changes):
    first, *others = fused.decisions
    return replace(fused, decisions=(replace(first, **changes), *others))


def raises(model, fused):
    raise ValueError("no")


def is_inexact(model, fused):
    return replace(fused, proof=replace(fused.proof, exactness_f64=1e-9))


def touches_a_weight(model, fused):
    model.weights[0].assign(graph.numpy(model.weights[0]) * 1.001)
    return fused


def calls_a_layer(model, fused):
    model.layers[1](keras.Input((5,)))
    return fused


def touches_the_config(model, fused):
    model.layers[1].trainable = False
    return fused


def renames_an_output(model, fused):
    new = graph.replay(graph.trace(fused.model))
    return replace(fused, model=keras.Model(new.inputs, L.Identity(name="other")(new.outputs[0])))


def writes_a_wrong_weight(model, fused):
    fused.model.weights[0].assign(graph.numpy(fused.model.weights[0]) * 1.001)
    return fused


CONTROLS = {
    "raised ValueError": raises,
    "a wrong fold": lambda model, fused: with_decision(fused, outcome="kept", code="proof_failed"),
    "no proof": lambda model, fused: replace(fused, proof=None),
    "not exact": is_inexact,
    "source model changed weight": touches_a_weight,
    "source model changed graph": calls_a_layer,
    "source model changed config": touches_the_config,
    "another signature": renames_an_output,
    "plain Keras disagrees": writes_a_wrong_weight,
    # a fuse that leaves what it could take finds it the next time
    "not idempotent": lambda model, fused: replace(fused, model=graph.replay(graph.trace(model))),
}


@pytest.mark.parametrize("row", CONTROLS)
def test_what_is_broken_is_seen(row, monkeypatch):
    right, called = random_nets.fuse, []

    def broken(model, **options):
        called.append(model)
        fused = right(model, **options)
        return CONTROLS[row](model, fused) if len(called) == 1 else fused

    assert failure(TINY) is None
    monkeypatch.setattr(random_nets, "fuse", broken)
    found = failure(TINY)
    assert found is not None
    assert found.split(":")[0] in row


# ---------------------------------------------------------------------------------------------- the shrinker


def ops(program):
    return Counter(step.op for step in program.graph.calls())


@pytest.mark.parametrize("op", ["Multiply", "BatchNormalization", "Nested", "Again"])
def test_a_net_shrinks_to_what_its_failure_needs(op, programs):
    found = next(p for p in programs if op in ops(p) and sum(1 for _ in p.graph.calls()) > 12)
    small = shrink(found, lambda p: op in ops(p), 5000)
    needed = {"Multiply": 1, "BatchNormalization": 1, "Nested": 2, "Again": 2}
    twice_nested = op == "Again" and "Nested" in ops(small)  # which has a call inside
    assert sum(1 for _ in small.graph.calls()) == needed[op] + twice_nested
    assert len(small.graph.outputs) == 1


def test_shrinking_ends_with_simple_options(programs):
    found = next(p for p in programs if any(dict(s.options).get("stats") == "dead" for s in p.graph.steps))
    small = shrink(found, lambda p: ops(p)["BatchNormalization"] > 0, 5000)
    (step,) = small.graph.steps
    assert dict(step.options) == {key: values[0] for key, values in ALL_OPS[step.op].choices.items()}


def test_every_smaller_net_is_a_net(programs):
    for program in programs[:3]:
        candidates = list(smaller(program.graph))
        assert candidates
        for found in candidates[:: max(1, len(candidates) // 4)]:
            build(replace(program, graph=found))


@pytest.mark.slow
def test_a_wrong_law_is_found_and_shrunk_to_the_layers_it_takes(monkeypatch):
    wrong = {**conduits.CONDUITS, L.ReLU: conduits.CONDUITS[L.Identity]}  # a ReLU passes no shift
    monkeypatch.setattr(conduits, "CONDUITS", wrong)
    program, found = next((p, said) for p in map(generate, range(40)) if (said := failure(p)) is not None)
    assert found.startswith("a wrong fold")
    small = shrunk(program, found)
    assert sum(1 for _ in small.graph.calls()) <= 4
    assert ops(small)["ReLU"] == 1
    assert failure(small) is not None


# ---------------------------------------------------------------------------------------------- the long run


@pytest.fixture
def long_run(monkeypatch):
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "random_nets.py"
    spec = importlib.util.spec_from_file_location("long_run", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "long_run", module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    return module


def test_a_line_says_what_one_net_showed(long_run):
    line = long_run.one(0)
    assert line["failure"] is None
    assert line["sources"] == line["fused"] + line["reduced"] + line["kept"]
    assert "nets        1, failures 0" in long_run.summary([line])


def test_a_log_that_was_cut_off_is_read_up_to_there(long_run, tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"seed": 1, "failure": "x"}) + "\n" + json.dumps({"seed": 1, "failure": None}) + '\n{"se')
    assert long_run.lines_of(log) == {1: {"seed": 1, "failure": None}}


def test_a_failure_is_printed_with_its_seed_and_its_shrunk_net(long_run, monkeypatch):
    monkeypatch.setattr(random_nets, "measure", lambda p, built: random_nets.Outcome("wrong: always", 5))
    monkeypatch.setattr(random_nets, "shrunk", lambda p, found, tries: TINY)
    text = long_run.complaint(long_run.one(4))
    assert text.startswith("seed 4: wrong: always\n")
    assert "v3 = Activation(v2, activation='relu')" in text
