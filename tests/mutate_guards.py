"""Take the guards of fusing out, one at a time, and expect a test to fail. A script, not a test:

    python tests/mutate_guards.py                 all of them
    python tests/mutate_guards.py --only NAME...  some (any part of a name)
    python tests/mutate_guards.py --list

A guard is a line that keeps a fold from going wrong; a test that passes without it does not test it. Each row names a
guard, its text, the text without it and the tests that must notice. All rows work on a copy of the checkout: first the
tests run as things are and must pass, then once per row with that one text replaced, and must fail.

Exit code 0: every guard was noticed. 1: one survived, a row has gone stale (its text is no longer there exactly once,
or its tests cannot be collected), or the tests fail as things are.

Every run is a process of its own, forked from one that has imported Keras already where the platform can.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 120  # a guard may be all that ends a loop: a run that hangs has noticed
QUICK = ("--assert=plain", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:xdist")
TESTS_FAILED = 1  # pytest's exit code; others mean that nothing was tested

FUSE = "tests/test_fuse.py::"
KEEPS = FUSE + "test_guard_keeps_the_source_and_the_model_right"
ROW = "tests/test_guards.py::test_guard_decides"
MORE = "tests/test_guards.py::"
PROOF = "tests/test_proof.py::"
WAYS = "tests/test_plan.py::"
GRAPH = "tests/test_graph.py::"
SIGN = FUSE + "test_what_needs_a_sign_lets_no_channel_be_turned_round"
NO_SHIFT = FUSE + "test_what_passes_no_shift_leaves_it"


@dataclass(frozen=True)
class Mutation:
    """``old`` stands exactly once in ``deploykit/<file>``; with ``new`` in its place one of ``tests`` fails."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def row(name: str, file: str, old: str, new: str, *tests: str) -> Mutation:
    return Mutation(name, file, old, new, tests)


def decides(*names: str) -> tuple[str, ...]:
    return tuple(f"{ROW}[{name}]" for name in names)


PLAN, SINKS, SOURCES = "fuse/plan.py", "fuse/sinks.py", "fuse/sources.py"
CONDUITS, CHANGE, APPLY = "fuse/conduits.py", "fuse/change.py", "fuse/apply.py"
PROVE, INIT = "fuse/proof.py", "fuse/__init__.py"

SEARCH = (
    row("an output keeps its values", PLAN, "if found.is_output(tensor):", "if False:", f"{KEEPS}[model_output]"),
    row(
        "an output behind keeps its values",
        PLAN,
        "if found.is_output(tensor):",
        "if maker is asker and False or found.is_output(tensor) and maker is not asker:",
        f"{KEEPS}[model_output forward]",
    ),
    row(
        "an input keeps its values",
        PLAN,
        'return _Failure(Refusal("model_input", "it follows an input of the model"), choices)',
        "return None",
        *decides("an input of the model changes nothing"),
    ),
    row(
        "other readers undo a change",
        PLAN,
        "for reader in found.consumers(tensor):\n            if",
        "for reader in () if behind else found.consumers(tensor):\n            if",
        f"{KEEPS}[fan_out]",
    ),
    row(
        "all readers take a change",
        PLAN,
        "for reader in found.consumers(tensor):\n            if",
        "for reader in found.consumers(tensor)[:1]:\n            if",
        *decides("one reader that takes nothing"),
    ),
    row(
        "a tensor takes one change",
        PLAN,
        "return _Failure(refusal, choices | search.choices[tensor])",
        "return None",
        *decides("a tensor takes one change"),
    ),
    row(
        "an unchanged tensor asks nobody",
        PLAN,
        "        if change.is_identity:\n            return None\n        maker",
        "        maker",
        FUSE + "test_affine_travels_backward_through[Dropout]",
    ),
    row(
        "the other end of a source stays",
        PLAN,
        """        for tensor, change in (
            (node.inputs[0], changed if back else same),
            (node.outputs[0], same if back else changed),
        ):
""",
        """        for tensor, change in (
            (node.inputs[0] if back else node.outputs[0], changed),
        ):
""",
        *decides("a source stays apart from its own input"),
    ),
    row("a search has an end", PLAN, "if self.left < 0:", "if False:", MORE + "test_a_search_has_an_end"),
    row(
        "a barrier on the way",
        PLAN,
        'if node.name in self.barriers:\n            return Refusal("barrier"',
        'if False:\n            return Refusal("barrier"',
        FUSE + "test_keep_and_barrier",
    ),
    row(
        "a barrier that is a source",
        PLAN,
        "if node.name in planner.barriers:",
        "if False:",
        FUSE + "test_keep_and_barrier",
    ),
    row(
        "names asked for exist",
        PLAN,
        "if name not in known:",
        "if False:",
        FUSE + "test_unknown_names_are_refused_with_the_nearest",
    ),
    row(
        "a kept source stays",
        PLAN,
        "            if name in standing:",
        "            if False:",
        FUSE + "test_keep_and_barrier",
    ),
    row(
        "a kept source takes nothing in",
        PLAN,
        "planner.closed.add(name)",
        "pass",
        MORE + "test_a_source_that_the_user_keeps_takes_nothing_in",
    ),
    row(
        "a source that failed its proof takes nothing in",
        PLAN,
        'UNTOUCHABLE = ("kept_by_user", "proof_failed")',
        'UNTOUCHABLE = ("kept_by_user",)',
        MORE + "test_a_source_of_which_the_proof_failed_takes_nothing_in",
    ),
    row(
        "a closed source refuses",
        PLAN,
        "node.name in self.closed or",
        "",
        MORE + "test_a_source_that_the_user_keeps_takes_nothing_in",
    ),
    row(
        "a source that cannot be read takes nothing in",
        PLAN,
        " or node.name not in self.open:",
        ":",
        MORE + "test_a_source_that_is_no_fixed_map_takes_nothing_in",
    ),
    row(
        "a source cannot undo a 0 in front",
        PLAN,
        "if (before is not None and before.back is None) or",
        "if",
        MORE + "test_a_source_cannot_undo_a_zero_of_its_neighbour",
    ),
    row(
        "a source cannot undo a 0 behind",
        PLAN,
        " or (after is not None and after.forth is None):",
        ":",
        *decides("a source joined to a 0 cannot share it"),
    ),
    row(
        "a source takes its own axis",
        PLAN,
        "if change is not None and change.onto(source.axis, source.affine.channels) is None:",
        "if False:",
        MORE + "test_a_source_along_another_axis_takes_nothing_in",
    ),
    row(
        "only what a trial names may leave",
        PLAN,
        "if name not in final and (only is None or name in only)]",
        "if name not in final]",
        PROOF + "test_a_wrong_sink_is_found_by_the_proof",
    ),
    row(
        "a second tensor at a conduit",
        PLAN,
        "(conduits.is_conduit(at) or (sink and not sinks.takes_several(at)))",
        "(sink and not sinks.takes_several(at))",
        FUSE + "test_a_second_tensor_beside_the_input_stops_an_affine",
    ),
    row(
        "a second tensor at a sink",
        PLAN,
        "(conduits.is_conduit(at) or (sink and not sinks.takes_several(at)))",
        "conduits.is_conduit(at)",
        *decides("a wrapper that is given a mask takes nothing"),
    ),
    row(
        "a shared sink",
        PLAN,
        "if self.found.calls(node) > 1:",
        "if False:",
        f"{KEEPS}[shared_layer sink]",
    ),
    row(
        "states are no output",
        PLAN,
        'if not isinstance(seen, Refusal) and side == "after" and port:',
        "if False:",
        *decides("scores are not what a projection makes"),
    ),
    row(
        "a padding layer follows",
        PLAN,
        """            value = self.new_padding(at, moved if forward is None else seen)
            if isinstance(value, Refusal):
                return value
""",
        "            pass\n",
        FUSE + "test_what_passes_no_shift_leaves_it[ZeroPadding2D]",
    ),
    row(
        "a padding layer of every step",
        PLAN,
        "if at.steps or self.found.calls(at.node) > 1:",
        "if self.found.calls(at.node) > 1:",
        *decides("a padding layer of every step"),
    ),
    row(
        "a shared padding layer",
        PLAN,
        "if at.steps or self.found.calls(at.node) > 1:",
        "if at.steps:",
        *decides("a padding layer that is called twice"),
    ),
    row(
        "a merge of one tensor with itself",
        PLAN,
        "if len(set(node.inputs)) < len(node.inputs):",
        "if False:",
        *decides("a sum of one tensor with itself"),
    ),
    row(
        "a 0 cannot be taken apart",
        PLAN,
        "    if divided is None:\n        return None\n",
        "",
        *decides("a 0 lets no shift back past it"),
    ),
    row(
        "a way that ends halfway is taken back",
        PLAN,
        "            back()\n",
        "            pass\n",
        MORE + "test_a_way_that_ends_halfway_leaves_nothing_behind",
    ),
    row(
        "recursion while planning",
        PLAN,
        "with deep_recursion(len(found.nodes)):",
        "if True:",
        MORE + "test_a_long_stream_is_no_recursion_error",
    ),
    row(
        "a change runs along an axis",
        CHANGE,
        "return self.axis == other.axis and a is not None",
        "return a is not None",
        *decides("a tensor takes one change along one axis"),
    ),
    row(
        "changes that differ do not agree",
        CHANGE,
        "and b is not None and a.is_close(b)",
        "and b is not None",
        *decides("a range of one joint is that of another"),
    ),
    row(
        "only uniform affines change their axis",
        CHANGE,
        "if not self.affine.is_uniform or channels is None:",
        "if channels is None:",
        f"{KEEPS}[axis_mismatch]",
        f"{KEEPS}[axis_mismatch forward]",
    ),
    row(
        "an axis of unknown size",
        CHANGE,
        "if not self.affine.is_uniform or channels is None:",
        "if not self.affine.is_uniform:",
        *decides("one number turned onto a free axis"),
    ),
    row(
        "the steps of a wrapper",
        CHANGE,
        """    if moved is None:
        return Refusal("axis_mismatch", f"{at.name} runs along the affine's axis {change.axis}")
""",
        "    moved = moved or change\n",
        f"{KEEPS}[axis_mismatch time]",
    ),
)

ON_THE_WAY = (
    row(
        "windows along the affine's axis",
        CONDUITS,
        """return found or Refusal("axis_mismatch", f"{at.name} works along the affine's axis {change.axis}")""",
        "return found or change",
        *decides("a window along the affine's axis"),
    ),
    row(
        "a pool over the affine's axis",
        CONDUITS,
        """    if found is None:
        return Refusal("axis_mismatch", f"{at.name} pools along the affine's axis {change.axis}")
""",
        "    found = found or change\n",
        *decides("a pool over the affine's axis"),
    ),
    row(
        "a maximum turned round",
        CONDUITS,
        "        if not change.keeps_order:\n",
        "        if False:\n",
        f"{SIGN}[MaxPooling2D]",
        f"{SIGN}[GlobalMaxPooling2D]",
    ),
    row("an activation sees no shift", CONDUITS, "if not change.is_scaling:", "if False:", f"{NO_SHIFT}[ReLU]"),
    row(
        "an activation turned round",
        CONDUITS,
        "return change if change.keeps_order else negative(at.name, change.affine)",
        "return change",
        f"{SIGN}[LeakyReLU]",
    ),
    row(
        "an activation that passes nothing",
        CONDUITS,
        """return Refusal("nonlinear", f"{at.name} is a {activation_name(at.layer)}, which an affine cannot pass")""",
        "return _homogeneous(at, change, forward)",
        *decides("a tanh on the way lets no scale pass"),
    ),
    row(
        "a ReLU with a maximum",
        CONDUITS,
        "if layer.max_value is not None or layer.threshold:",
        "if layer.threshold:",
        f"{KEEPS}[nonlinear max_value]",
    ),
    row(
        "a ReLU with a threshold",
        CONDUITS,
        "if layer.max_value is not None or layer.threshold:",
        "if layer.max_value is not None:",
        f"{KEEPS}[nonlinear threshold]",
    ),
    row(
        "an element of unknown place",
        CONDUITS,
        "if len(sizes) < len(shape) or len(wanted) < len(result):",
        "if False:",
        FUSE + "test_unknown_size_stops_a_flatten",
    ),
    row(
        "an affine that differs by position",
        "affine.py",
        "return one if same else None",
        "return one",
        FUSE + "test_flatten_passes_an_affine_backward_only_when_it_is_the_same_at_every_position",
        f"{KEEPS}[axis_mismatch reshape]",
    ),
    row(
        "channels that Keras turns before it flattens",
        CONDUITS,
        'turned = isinstance(at.layer, L.Flatten) and at.layer.data_format == "channels_first" and len(sizes) > 1',
        "turned = False",
        FUSE + "test_channels_first_rows_are_exact[flatten]",
    ),
    row(
        "a conduit in training mode",
        CONDUITS,
        "if at.node.training:",
        "if False:",
        *decides("dropout in training mode is no fixed map"),
    ),
    row(
        "a conduit that sees a mask",
        CONDUITS,
        "if at.masked and not conduit.masks:",
        "if False:",
        *decides("a rearrangement that sees a mask"),
    ),
    row(
        "a product that sees a mask",
        CONDUITS,
        "if at.masked and key(at.layer) is L.Multiply:",
        "if False:",
        *decides("a product puts 1 where it is masked"),
    ),
    row(
        "a source that takes a mask away",
        SOURCES,
        "if before.masked and not after.masked:",
        "if False:",
        *decides("an operation that takes a mask away"),
    ),
    row(
        "a mask that leaks",
        "graph.py",
        'hands_on = getattr(layer, "supports_masking", False) or _functional(layer) is not None',
        'hands_on = getattr(layer, "supports_masking", False)',
        *decides("a mask leaks out of a model that is called as a whole"),
    ),
    row(
        "one pad value for all channels",
        CONDUITS,
        "if float(np.ptp(new)) > 4 * np.finfo(np.float64).eps * float(np.abs(new).max()):",
        "if False:",
        f"{NO_SHIFT}[ZeroPadding2D]",
        *decides("padding of a shift that differs"),
    ),
    row(
        "a pad that would undo a 0",
        CONDUITS,
        """    if change.forth is None:
        return Refusal("padded_shift", f"the padding of {at.name} would have to undo a scale of 0")
""",
        "",
        *decides("padding cannot undo a 0"),
    ),
    row(
        "how far padding reaches is known",
        CONDUITS,
        "if size is None and stride > 1 and reach > 1:",
        "if False:",
        *decides("padding of a length that is not known"),
    ),
)

MERGING = (
    row(
        "tensors of different rank",
        CONDUITS,
        "if any(len(shape) != len(at.output) for shape in at.inputs):",
        "if False:",
        *decides("a sum of tensors of different rank"),
    ),
    row(
        "a merge of unknown size",
        CONDUITS,
        """    if channels is None:
        return Refusal("unknown_size", f"{at.name} has an axis {axis} of unknown size")
""",
        "",
        *decides("a sum with a tensor of free width"),
    ),
    row(
        "a channel that a merge repeats",
        CONDUITS,
        "if moved is None or shape[axis] != channels:",
        "if moved is None:",
        *decides("a sum that repeats the affine's channel"),
    ),
    row(
        "a 0 that other branches would share",
        CONDUITS,
        "        if moved.forth is None:\n",
        "        if False:\n",
        *decides("a sum cannot share a 0"),
    ),
    row(
        "a branch that a merge repeats takes no channels",
        CONDUITS,
        "if ports.inputs[i] is None and at.inputs[i][axis] == channels]",
        "if ports.inputs[i] is None]",
        *decides("a sum that repeats a branch"),
    ),
    row(
        "all branches of a sum share a scale",
        CONDUITS,
        "if len(able) < len(unknown):",
        "if False:",
        *decides("a sum that repeats a branch"),
    ),
    row(
        "branches are scaled alike",
        CONDUITS,
        "if not all(forth.is_close(scale) for forth in known):",
        "if False:",
        *decides("branches share one scale"),
    ),
    row(
        "a shift that is shared by all",
        CONDUITS,
        "if len(able) > 1 and len(able) == len(unknown) and",
        "if len(able) > 1 and",
        *decides("an average of which one branch is repeated"),
    ),
    row(
        "a shift that cancels is not shared",
        CONDUITS,
        "len(able) == len(unknown) and np.sum(w) != 0:",
        "len(able) == len(unknown):",
        *decides("a tensor less itself takes no shift"),
    ),
    row(
        "a shift that no branch can take",
        CONDUITS,
        'return back or Refusal("conflict"',
        'return back or [Option({})] or Refusal("conflict"',
        *decides("a tensor less itself takes no shift"),
    ),
    row(
        "a product with a shift",
        CONDUITS,
        "if not all(forth.is_scaling for forth in known):",
        "if False:",
        *decides("a product lets no shift pass"),
    ),
    row(
        "a product of a 0 has no way back",
        CONDUITS,
        "for port in able] if arriving.all() else []",
        "for port in able]",
        *decides("a product cannot undo a 0"),
    ),
    row(
        "a product cannot divide by 0",
        CONDUITS,
        "    if not arriving.all():\n",
        "    if False:\n",
        *decides("a product cannot divide by 0"),
    ),
    row(
        "a scale that no branch can take",
        CONDUITS,
        "    if not able:\n        return Refusal",
        "    if not able:\n        return [Option({})] or Refusal",
        *decides("a square has no branch for a scale"),
    ),
    row(
        "joined along two axes",
        CONDUITS,
        "        if change is not None and found is None:\n",
        "        if False:\n",
        *decides("joined tensors change along one axis"),
    ),
    row(
        "joined in steps",
        CONDUITS,
        "if not all(change is None or change.agrees(one) for change in moved):",
        "if False:",
        *decides("tensors joined in steps change alike"),
    ),
    row(
        "joined at an unknown place",
        CONDUITS,
        "    if any(size is None for size in sizes):\n",
        "    if False:\n",
        *decides("a joint with a tensor of free width"),
    ),
    row(
        "a range that is asked two things",
        CONDUITS,
        "if change is not None and not piece.agrees(change):",
        "if False:",
        *decides("a range of one joint is that of another"),
    ),
)

TAKING = (
    row(
        "an activation inside a layer",
        SINKS,
        "if activation not in HOMOGENEOUS or not change.is_scaling:",
        "if not change.is_scaling:",
        *decides("a tanh inside lets no scale out"),
    ),
    row(
        "a shift behind an activation inside",
        SINKS,
        "if activation not in HOMOGENEOUS or not change.is_scaling:",
        "if activation not in HOMOGENEOUS:",
        *decides("a relu inside lets no shift out"),
    ),
    row(
        "an activation inside turned round",
        SINKS,
        "    if not change.keeps_order:\n",
        "    if False:\n",
        *decides("a relu inside lets nothing turned out"),
    ),
    row(
        "an activation inside a convolution",
        SINKS,
        "return _behind_activation(at, found) or found",
        "return found",
        f"{KEEPS}[fused_activation]",
        f"{KEEPS}[fused_activation conv]",
    ),
    row(
        "an activation inside an einsum",
        SINKS,
        "return _behind_activation(at, change) or change",
        "return change",
        *decides("a relu inside an einsum lets no shift out"),
    ),
    row(
        "a causal window",
        SINKS,
        'if layer.padding == "causal" or size is None:',
        "if size is None:",
        *decides("causal padding that strides leave uneven"),
    ),
    row(
        "a window on an unknown size",
        SINKS,
        'if layer.padding == "causal" or size is None:',
        'if layer.padding == "causal":',
        f"{KEEPS}[padded_shift free size]",
    ),
    row(
        "padding that would see a shift",
        SINKS,
        "    if pads_anew(at, found):\n",
        "    if False:\n",
        f"{KEEPS}[padded_shift]",
        f"{KEEPS}[padded_shift causal]",
        f"{KEEPS}[padded_shift depthwise]",
    ),
    row(
        "padding of every step",
        SINKS,
        "if at.steps or isinstance(widths, Refusal)",
        "if isinstance(widths, Refusal)",
        *decides("padding of every step"),
    ),
    row(
        "padding of unknown width",
        SINKS,
        "if at.steps or isinstance(widths, Refusal) or isinstance(new_padding(at, found), Refusal):",
        "if at.steps or isinstance(new_padding(at, found), Refusal):",
        *decides("padding of a length that is not known"),
    ),
    row(
        "padding that an earlier fold has filled",
        SINKS,
        "return bool(at.pad) or not change.is_scaling",
        "return not change.is_scaling",
        *decides("padding that an earlier fold has filled"),
    ),
    row(
        "a transposed window",
        SINKS,
        "if channels.transposed and not back.is_scaling:",
        "if False:",
        f"{KEEPS}[padded_shift transpose]",
        *decides("a transposed window that misses a shift"),
    ),
    row(
        "a product in front of another axis",
        SINKS,
        """    if found is None:
        return _mismatch(at, change.axis)
    return _behind_activation""",
        "    found = found or change\n    return _behind_activation",
        *decides("a dense layer in front of another axis"),
    ),
    row(
        "a product behind another axis",
        SINKS,
        """    if found is None:
        return _mismatch(at, change.axis)
    channels, back""",
        "    found = found or change\n    channels, back",
        *decides("a dense layer behind another axis"),
    ),
    row(
        "a product cannot undo a 0",
        SINKS,
        "    if back is None:\n",
        "    if False:\n",
        *decides("a dense layer cannot undo a 0"),
    ),
    row(
        "an einsum in front of another axis",
        SINKS,
        "if letter not in equation.kernel:",
        "if False:",
        *decides("an einsum over another axis in front"),
    ),
    row(
        "an einsum behind another axis",
        SINKS,
        "if equation.inputs[change.axis] not in equation.kernel:",
        "if False:",
        *decides("an einsum over another axis behind"),
    ),
    row(
        "an einsum cannot undo a 0",
        SINKS,
        "    if change.back is None:\n",
        "    if False:\n",
        *decides("an einsum cannot undo a 0"),
    ),
    row(
        "an einsum that sums what its kernel lacks",
        SINKS,
        "if not change.back.is_scaling and not equation.contracted <= set(equation.kernel):",
        "if False:",
        *decides("an einsum that sums what its kernel lacks"),
    ),
    row(
        "a table or an attention in front of another axis",
        SINKS,
        "return change.onto(axis, at.output[axis]) or _mismatch(at, change.axis)",
        "return change.onto(axis, at.output[axis]) or change",
        *decides("an attention in front of another axis"),
    ),
    row(
        "a norm in front of another axis",
        SINKS,
        """    if found is None:
        return _mismatch(at, change.axis)
    if getattr(layer""",
        "    found = found or change\n    if getattr(layer",
        *decides("a norm in front of another axis"),
    ),
    row(
        "a norm without a place for a shift",
        SINKS,
        'if getattr(layer, "rms_scaling", False) and not found.is_scaling:',
        "if False:",
        *decides("a norm that has no place for a shift"),
    ),
    row(
        "a norm without a place",
        SINKS,
        "if layer.gamma is None and layer.beta is None and len(axes) > 1:",
        "if False:",
        *decides("a norm that has no place at all"),
    ),
    row(
        "a recurrent layer behind another axis",
        SINKS,
        """    found = change.onto(2, at.inputs[0][2])
    if found is None:
        return _mismatch(at, change.axis)
""",
        "    found = change.onto(2, at.inputs[0][2]) or change\n",
        *decides("a recurrent layer behind another axis"),
    ),
    row(
        "a recurrent layer cannot undo a 0",
        SINKS,
        """    found = change.onto(2, at.inputs[0][2])
    if found is None:
        return _mismatch(at, change.axis)
    return found if found.back is not None else""",
        """    found = change.onto(2, at.inputs[0][2])
    if found is None:
        return _mismatch(at, change.axis)
    return found if True else""",
        *decides("a recurrent layer cannot undo a 0"),
    ),
    row(
        "an attention behind another axis",
        SINKS,
        """    found = change.onto(axis, at.inputs[port][axis])
    if found is None:
        return _mismatch(at, change.axis)
""",
        "    found = change.onto(axis, at.inputs[port][axis]) or change\n",
        *decides("an attention behind another axis"),
    ),
    row(
        "an attention cannot undo a 0",
        SINKS,
        """    found = change.onto(axis, at.inputs[port][axis])
    if found is None:
        return _mismatch(at, change.axis)
    return found if found.back is not None else""",
        """    found = change.onto(axis, at.inputs[port][axis])
    if found is None:
        return _mismatch(at, change.axis)
    return found if True else""",
        *decides("an attention cannot undo a 0"),
    ),
    row(
        "a sink in training mode",
        SINKS,
        "if at.node.training and type(at.layer) not in CHANNELS:",
        "if False:",
        *decides("recurrent dropout in training mode is no fixed map"),
    ),
    row(
        "a layer that takes nothing behind it",
        SINKS,
        "if sink.after is None:",
        "if False:",
        *decides("a recurrent layer takes nothing behind"),
    ),
    row(
        "a layer cannot apply what has no way forth",
        SINKS,
        "if change.forth is None:",
        "if False:",
        *decides("a layer joined to a 0 cannot share it"),
    ),
    row(
        "a layer that takes nothing in front",
        SINKS,
        "if sink.before is None or port not in ports(at):",
        "if port not in ports(at):",
        *decides("a norm takes nothing in front"),
    ),
    row(
        "an input that no kernel sees",
        SINKS,
        "if sink.before is None or port not in ports(at):",
        "if sink.before is None:",
        *decides("a first state is no input of a kernel", "a mask of scores is no projected input"),
    ),
    row(
        "groups",
        SINKS,
        'getattr(layer, "groups", 1) if kernel.name == "kernel" else 1',
        "1",
        FUSE + "test_backward_fold_is_exact[conv2d groups-True]",
        FUSE + "test_forward_fold_is_exact[conv2d groups-True]",
    ),
    row(
        "depth multiplier",
        "channels.py",
        '_DEPTHWISE = Channels((Kernel("kernel", "g o"),))',
        '_DEPTHWISE = Channels((Kernel("kernel", "i go"),))',
        FUSE + "test_backward_fold_is_exact[depthwise2d-True]",
    ),
    row(
        "transposed kernels",
        "channels.py",
        '(Kernel("kernel", "o i"),), transposed=True)',
        '(Kernel("kernel", "o i"),))',
        f"{KEEPS}[padded_shift transpose]",
    ),
    row(
        "a collapsed channel has no inverse",
        "affine.py",
        "return found if found.is_finite else None",
        "return found",
        "tests/test_affine.py::test_the_inverse_undoes_what_can_be_undone",
    ),
)

READING = (
    row("renorm", SOURCES, "if layer.renorm:", "if False:", FUSE + "test_renorm_is_refused_by_name"),
    row(
        "a variance that is not positive",
        SOURCES,
        "if not (variance + layer.epsilon > 0).all():",
        "if False:",
        f"{KEEPS}[bad_statistics]",
        f"{KEEPS}[bad_statistics zero]",
    ),
    row(
        "no gamma",
        SOURCES,
        "numpy(layer.gamma).astype(np.float64) if layer.scale else np.ones_like(mean)",
        "numpy(layer.gamma).astype(np.float64)",
        FUSE + "test_missing_gamma_or_beta",
    ),
    row(
        "no beta",
        SOURCES,
        "numpy(layer.beta).astype(np.float64) if layer.center else np.zeros_like(mean)",
        "numpy(layer.beta).astype(np.float64)",
        FUSE + "test_missing_gamma_or_beta",
    ),
    row(
        "the axis of a BatchNormalization",
        SOURCES,
        "return layer.axis % at.rank, Affine",
        "return at.rank - 1, Affine",
        FUSE + "test_channels_first_folds_along_axis_one",
        f"{KEEPS}[axis_mismatch]",
    ),
    row(
        "a normalization along several axes",
        SOURCES,
        "if len(axes) > 1:",
        "if False:",
        FUSE + "test_a_normalization_along_several_axes_is_refused_by_name",
    ),
    row(
        "a normalization of unknown size",
        SOURCES,
        """    if channels is None:
        return Refusal("unknown_size", f"{at.name} normalises""",
        """    if False:
        return Refusal("unknown_size", f"{at.name} normalises""",
        *decides("a normalization of free width"),
    ),
    row(
        "Keras' clamped deviation",
        SOURCES,
        "np.maximum(np.sqrt(variance), keras.config.epsilon())",
        "np.sqrt(variance)",
        FUSE + "test_other_sources_fold_into_the_first_layer[Normalization clamped]",
    ),
    row(
        "a constant that changes the shape",
        SOURCES,
        "if at.output != shape or max(scale.ndim, shift.ndim) > at.rank:",
        "if False:",
        *decides("a constant that widens its tensor"),
    ),
    row(
        "a constant along several axes",
        SOURCES,
        "if len(varied) > 1:",
        "if False:",
        *decides("a constant that varies along two axes"),
    ),
    row(
        "a constant on an unknown size",
        SOURCES,
        """    if channels is None:
        return Refusal("unknown_size", f"{at.name} has an axis""",
        """    if False:
        return Refusal("unknown_size", f"{at.name} has an axis""",
        *decides("a constant on a tensor of free width"),
    ),
    row(
        "a division by the tensor",
        SOURCES,
        "        if found is None:\n",
        "        found = found or law(constant, True)\n        if False:\n",
        FUSE + "test_arithmetic_that_is_no_affine_stays",
    ),
    row("a shared source", SOURCES, "if found.calls(node) > 1:", "if False:", f"{KEEPS}[shared_layer source]"),
    row(
        "a source in training mode",
        SOURCES,
        "if node.training and isinstance(at.layer, L.BatchNormalization) and at.layer.trainable:",
        "if False:",
        f"{KEEPS}[training_mode]",
    ),
    row(
        "a source of whole numbers",
        SOURCES,
        'if "float" not in before.dtype:',
        "if False:",
        f"{KEEPS}[unsupported_option integers]",
    ),
    row(
        "a bidirectional of something else",
        SINKS,
        "if strange is not None:",
        "if False:",
        WAYS + "test_a_bidirectional_of_something_else_takes_nothing",
    ),
    row(
        "padding along the affine's own axis",
        CONDUITS,
        "if any(_widths(at)[change.axis]):",
        "if False:",
        WAYS + "test_padding_along_the_affines_own_axis_stops_it",
    ),
    row(
        "a name for the pad that is made",
        "graph.py",
        'distinct([f"{node.name}.pad"], taken)[0]',
        'f"{node.name}.pad"',
        WAYS + "test_the_pad_that_is_made_takes_a_free_name",
    ),
    row(
        "a copy that is not the model",
        PROVE,
        "if (far := distance(a, b)) > limit:",
        "if False:",
        PROOF + "test_a_copy_that_is_not_the_model_proves_nothing",
    ),
    row(
        "an answer of NaN",
        PROVE,
        'if not any(np.isfinite(output).any() for output in outputs if output.dtype.kind == "f"):',
        "if False:",
        PROOF + "test_a_model_that_answers_nan_is_told_so",
    ),
    row(
        "a vocabulary",
        "graph.py",
        'if hasattr(old, "load_assets"):',
        "if False:",
        PROOF + "test_a_vocabulary_is_copied_too",
    ),
    row(
        "a source with a second tensor",
        SOURCES,
        "if len(node.inputs) > 1 and not isinstance(at.layer, L.BatchNormalization):",
        "if False:",
        *decides("a wrapped source that is given a mask stays"),
    ),
    row(
        "a source that changes the dtype",
        SOURCES,
        "if before.dtype != after.dtype:",
        "if False:",
        f"{KEEPS}[dtype_change]",
    ),
    row("the batch axis", SOURCES, "if axis == 0:", "if False:", FUSE + "test_an_affine_along_the_batch_stays"),
    row(
        "parameters that are not finite",
        SOURCES,
        "if not affine.is_finite:",
        "if False:",
        FUSE + "test_arithmetic_that_is_no_affine_stays",
    ),
)

PROVING = (
    row(
        "overflow",
        APPLY,
        "        if lost.any():\n",
        "        if False:\n",
        PROOF + "test_a_weight_that_overflows_its_dtype_keeps_the_source",
    ),
    row(
        "underflow",
        APPLY,
        "    if vanished.any():\n",
        "    if False:\n",
        PROOF + "test_a_channel_that_vanishes_in_its_dtype_keeps_the_source",
    ),
    row(
        "a channel that is 0 anyway",
        APPLY,
        "vanished = (size > 0) & (size.",
        "vanished = (size.",
        FUSE + "test_odd_gammas_are_exact[0.0]",
        MORE + "test_a_channel_of_weight_zero_does_not_vanish",
    ),
    row(
        "a channel beside a larger bias",
        APPLY,
        'if "bias" in weights:',
        "if False:",
        PROOF + "test_a_vanishing_channel_beside_a_larger_bias_is_no_loss",
    ),
    row(
        "a constraint that the new weights violate",
        APPLY,
        "if not np.allclose(held, value, rtol=1e-6, atol=1e-7):",
        "if False:",
        FUSE + "test_a_violated_constraint_is_removed_and_said",
    ),
    row(
        "a constraint that the new weights keep",
        APPLY,
        "if not np.allclose(held, value, rtol=1e-6, atol=1e-7):",
        "if True:",
        MORE + "test_a_constraint_that_holds_stays",
    ),
    row(
        "a loss sends a plan back",
        INIT,
        "if applied.losses:",
        "if False:",
        PROOF + "test_a_weight_that_overflows_its_dtype_keeps_the_source",
    ),
    row(
        "the proof's bound",
        PROVE,
        "return self.exactness_f64 <= self.exactness_bound",
        "return True",
        PROOF + "test_a_wrong_sink_is_found_by_the_proof",
    ),
    row(
        "the shape of an answer",
        PROVE,
        "if candidate.shape != reference.shape:",
        "if False:",
        PROOF + "test_distance_counts_a_new_nan_as_infinitely_far",
    ),
    row(
        "an answer that is not finite",
        PROVE,
        "if not np.isfinite(c).all():",
        "if False:",
        PROOF + "test_distance_counts_a_new_nan_as_infinitely_far",
    ),
    row(
        "whole numbers are equal or not",
        PROVE,
        "    if not np.issubdtype(reference.dtype, np.floating):\n        return 0.0",
        "    if False:\n        return 0.0",
        PROOF + "test_integer_outputs_must_be_equal",
    ),
    row(
        "an output that hardly varies",
        PROVE,
        "/ size > INSENSITIVE",
        "/ size > 0",
        PROOF + "test_an_output_that_hardly_varies_is_no_evidence",
    ),
    row(
        "a proof needs evidence",
        PROVE,
        "if not any(evidence):",
        "if False:",
        PROOF + "test_without_evidence_there_is_no_proof",
    ),
    row(
        "nothing compared is no evidence",
        PROVE,
        "default=math.inf)",
        "default=0.0)",
        MORE + "test_nothing_compared_is_no_evidence",
    ),
    row(
        "a model that is random",
        PROVE,
        "if noise > IRREPRODUCIBLE:",
        "if False:",
        PROOF + "test_a_model_that_is_random_at_inference_cannot_be_proven",
    ),
    row(
        "what a softmax hides",
        PROVE,
        'double = replay(found, dtype="float64", logits=True)',
        'double = replay(found, dtype="float64", logits=False)',
        PROOF + "test_a_saturated_softmax_is_looked_behind",
    ),
    row(
        "conditioning",
        INIT,
        "if rounding > allowed:",
        "if False:",
        PROOF + "test_a_fold_that_would_cost_accuracy_is_kept",
    ),
    row(
        "conditioning blames a fold",
        INIT,
        "if not suspects:",
        "if False:",
        MORE + "test_a_model_of_which_nothing_was_fused_is_not_called_worse",
    ),
    row(
        "what was reduced for its digits stays reduced",
        INIT,
        "(plan.changed & job.shifts, limit / 2)",
        "(plan.changed & job.shifts, limit)",
        PROOF + "test_what_was_reduced_for_its_digits_stays_when_fused_again",
    ),
    row(
        "rounding in the stored weights",
        PROVE,
        "return max(self.exactness_stored, self.float32_fused)",
        "return self.float32_fused",
        PROOF + "test_rounding_counts_in_the_stored_weights_and_as_the_model_runs",
    ),
    row(
        "what fails together is at fault together",
        INIT,
        "return found or [_worst(max(halves, key=lambda half: error(frozenset(half))), error)]",
        "return found",
        PROOF + "test_blame_names_the_worst_of_what_fails_only_together",
    ),
    row(
        "somebody is at fault",
        INIT,
        "return blame(suspects, of, limit) or suspects",
        "return blame(suspects, of, limit)",
        MORE + "test_all_are_at_fault_where_none_is_found",
    ),
    row(
        "a rebuilt model that differs",
        INIT,
        "        if not plan.changed:\n",
        "        if False:\n",
        MORE + "test_a_rebuilt_model_that_differs_with_nothing_fused_is_an_error",
    ),
    row(
        "reducible once",
        INIT,
        "(self.reducible - set(found)) | costly",
        "self.reducible | costly",
        MORE + "test_what_costs_accuracy_may_leave_in_part_once",
    ),
    row(
        "reducible where accuracy is the matter",
        INIT,
        'if why.code == "conditioning" and outcomes[n] == "fused"}',
        'if outcomes[n] == "fused"}',
        MORE + "test_what_costs_accuracy_may_leave_in_part_once",
    ),
    row(
        "reducible from whole",
        INIT,
        'if why.code == "conditioning" and outcomes[n] == "fused"}',
        'if why.code == "conditioning"}',
        MORE + "test_what_costs_accuracy_may_leave_in_part_once",
    ),
    row(
        "layers that must not be rewritten",
        INIT,
        "    refuse_rewriting(model)\n",
        "",
        PROOF + "test_layers_that_must_not_be_rewritten_are_refused",
    ),
    row(
        "a compiled model",
        INIT,
        'if getattr(model, "compiled", False):',
        "if False:",
        FUSE + "test_a_compiled_model_is_warned_about",
    ),
    row(
        "reasons have a code",
        "fuse/reasons.py",
        "if self.code not in CODES:",
        "if False:",
        MORE + "test_reasons_have_a_code_of_the_table",
    ),
)

BUILDING = (
    row(
        "a call is read once",
        "graph.py",
        "if id(node) in done or node.is_input:",
        "if node.is_input:",
        MORE + "test_a_call_that_several_read_is_one_call",
    ),
    row(
        "a name that is taken",
        "graph.py",
        "if name in taken:",
        "if False:",
        GRAPH + "test_names_that_collide_are_told_apart_and_listed",
    ),
    row(
        "a nested model that is given a mask",
        "graph.py",
        'if len(args) != 1 or any(value is not None for key, value in kwargs.items() if key != "training"):',
        "if len(args) != 1:",
        MORE + "test_a_nested_model_that_is_given_a_mask_stays_whole",
    ),
    row(
        "a nested model that converts",
        "graph.py",
        "len(tensor.shape) == len(x.shape) and tensor.dtype == x.dtype",
        "len(tensor.shape) == len(x.shape)",
        GRAPH + "test_a_nested_model_that_converts_its_input_stays_whole",
    ),
    row(
        "all calls of a model that stays whole",
        "graph.py",
        "if inner is not None and id(layer) not in self.whole:",
        "if inner is not None and self.inlines(inner, args, kwargs, numbers):",
        GRAPH + "test_a_model_of_which_one_call_stays_whole_stays_whole_in_all",
    ),
    row(
        "the name of an output is taken",
        "graph.py",
        "if _functional(layer) is None or layer.name in output_names:",
        "if _functional(layer) is None:",
        GRAPH + "test_an_inner_layer_does_not_take_the_name_of_an_output",
    ),
    row(
        "the order of calls is that of the flat graph",
        "graph.py",
        "ordered = tuple(replace(nodes[old], index=new) for old, new in order.items())",
        "order = {old: new for new, old in enumerate(sorted(order))}\n"
        "    ordered = tuple(replace(nodes[old], index=new) for old, new in order.items())",
        GRAPH + "test_a_copy_of_a_copy_has_the_same_config",
    ),
    row(
        "a nested model in training mode",
        "graph.py",
        "mode = training if training is not None or asked is None else bool(asked)",
        "mode = None if asked is None else bool(asked)",
        MORE + "test_a_nested_model_hands_its_training_mode_down",
    ),
    row(
        "a mask travels along",
        "graph.py",
        'masked = masked or getattr(symbol, "_keras_mask", None) is not None',
        "masked = False",
        *decides("a rearrangement that sees a mask"),
    ),
    row(
        "a Sequential without a shape",
        "graph.py",
        "if isinstance(model, keras.Sequential) and model._functional is None:",
        "if False:",
        GRAPH + "test_models_without_a_readable_graph_are_refused_by_name",
    ),
    row(
        "a dropped output leaves its name",
        "graph.py",
        "if output._keras_history.operation.name != name:",
        "if False:",
        FUSE + "test_a_dropped_output_layer_leaves_an_identity_of_its_name",
    ),
    row(
        "a layer gets all of its weights",
        "graph.py",
        "if len(values) != len(layer.weights):",
        "if False:",
        MORE + "test_weights_that_are_missing_are_no_weights_of_zero",
    ),
    row(
        "a copy has the same weights",
        "graph.py",
        "if len(new.weights) != len(old.weights):",
        "if False:",
        MORE + "test_a_layer_whose_copy_has_other_weights_is_refused",
    ),
    row(
        "a pad in front of one call only",
        "graph.py",
        "                tensors[node.inputs[0]] = whole\n",
        "                pass\n",
        MORE + "test_a_pad_in_front_of_one_layer_is_not_seen_by_the_next",
    ),
    row(
        "a shared output layer is not taken apart",
        "graph.py",
        "if last and found.calls(node) == 1 else None",
        "if last else None",
        MORE + "test_an_output_layer_that_is_called_twice_keeps_its_activation",
    ),
    row(
        "interpolation in float64",
        "graph.py",
        'if dtype == "float64" and _resampled(found, node):',
        "if False:",
        FUSE + "test_affine_travels_forward_through[UpSampling2D bilinear]",
    ),
    row(
        "pooling over cubes in float64",
        "graph.py",
        'elif dtype == "float64" and _pools_cubes(found, node):',
        "elif False:",
        FUSE + "test_affine_travels_forward_through[AveragePooling3D]",
    ),
    row(
        "interpolation that crops",
        "graph.py",
        " and None not in shape[1:] and not any(cuts)",
        " and None not in shape[1:]",
        MORE + "test_the_double_stands_in_for_what_it_is[a resizing that crops]",
    ),
    row(
        "interpolation of unknown size",
        "graph.py",
        " and None not in shape[1:] and not any(cuts)",
        " and not any(cuts)",
        MORE + "test_the_double_stands_in_for_what_it_is[an upsampling of free size]",
    ),
    row(
        "cubes of unknown size",
        "graph.py",
        "and None not in (found.tensors[node.inputs[0]].shape[1:])",
        "and True",
        MORE + "test_a_pool_over_cubes_of_free_size_has_no_stand_in_and_is_built_all_the_same",
    ),
    row(
        "recursion while building",
        "graph.py",
        "with _undisturbed_random(), deep_recursion(len(found.nodes)):",
        "with _undisturbed_random():",
        MORE + "test_a_long_chain_is_built_again",
    ),
    row(
        "Python's random numbers",
        "graph.py",
        "with _undisturbed_random(), deep_recursion(len(found.nodes)):",
        "with deep_recursion(len(found.nodes)):",
        GRAPH + "test_reading_and_rebuilding_leaves_the_model_alone",
    ),
)

MUTATIONS = (*SEARCH, *ON_THE_WAY, *MERGING, *TAKING, *READING, *PROVING, *BUILDING)


# ------------------------------------------------------------------------------------------------------ running


def copied(target: Path) -> None:
    """The checkout as it stands: what git tracks and what it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():  # not what is deleted but still tracked
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def _tests(root: Path, tests: Sequence[str], log: Path) -> None:
    """Run tests on the copy at ``root``, in this process, and leave with pytest's exit code."""
    output = log.open("w")
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    os.chdir(root)
    sys.path.insert(0, str(root))  # before an editable install of the checkout
    sys.dont_write_bytecode = True  # a mutated file may have the size and the second of the one before
    import pytest

    import deploykit

    if Path(deploykit.__file__).parent != root / "deploykit":
        print(f"deploykit comes from {deploykit.__file__}")
        os._exit(99)
    os._exit(int(pytest.main(["-x", "-q", *QUICK, "--timeout", str(TIMEOUT_S), *tests])))


class Bench:
    """A copy of the checkout, and processes that run tests on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log = root / "mutation.log"
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        self.context = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            self.context.set_forkserver_preload(["keras", "pytest"])

    def run(self, tests: Sequence[str]) -> int:
        """pytest's exit code; that of failed tests where they had to be stopped."""
        process = self.context.Process(target=_tests, args=(self.root, tests, self.log))
        process.start()
        process.join(2 * TIMEOUT_S)
        if process.is_alive():
            process.kill()
            process.join()
            return TESTS_FAILED
        assert process.exitcode is not None
        return process.exitcode

    @contextlib.contextmanager
    def without(self, mutation: Mutation) -> Iterator[None]:
        path = self.root / "deploykit" / mutation.file
        right = path.read_text()
        path.write_text(right.replace(mutation.old, mutation.new))
        try:
            yield
        finally:
            path.write_text(right)

    def stale(self, mutation: Mutation) -> str | None:
        count = (self.root / "deploykit" / mutation.file).read_text().count(mutation.old)
        return None if count == 1 else f"STALE: its text is there {count} times"

    def verdict(self, mutation: Mutation) -> str:
        stale = self.stale(mutation)
        if stale is not None:
            return stale
        with self.without(mutation):
            code = self.run(mutation.tests)
        if code == TESTS_FAILED:
            return "killed"
        return "SURVIVED" if code == 0 else f"STALE: pytest exits with {code}"


def chosen(only: Sequence[str]) -> list[Mutation]:
    return [m for m in MUTATIONS if not only or any(part in m.name for part in only)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Take guards of fusing out and expect a test to fail.")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="guards whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="print the guards and their tests, run nothing")
    given = parser.parse_args(arguments)
    rows = chosen(given.only)
    if given.list:
        for mutation in rows:
            print(f"{mutation.name:<52} deploykit/{mutation.file:<18} {' '.join(mutation.tests)}")
        return 0
    if not rows:
        print("no guard has such a name; --list shows them all", file=sys.stderr)
        return 1
    os.environ["TF_CPP_MIN_LOG_LEVEL"], os.environ["CUDA_VISIBLE_DEVICES"] = "3", "-1"  # before Keras is imported
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder).resolve())
        copied(bench.root)
        start = time.perf_counter()
        code = bench.run(sorted({test for mutation in rows for test in mutation.tests}))
        print(f"{len(rows)} guards; as things are, their tests take {time.perf_counter() - start:.0f} s", flush=True)
        if code != 0:
            print(bench.log.read_text()[-4000:])
            print(f"and do not pass (pytest exits with {code}): nothing can be said")
            return 1
        verdicts = []
        for mutation in rows:
            start = time.perf_counter()
            verdicts.append(verdict := bench.verdict(mutation))
            test = mutation.tests[0].split("::", 1)[-1] + (" ..." if len(mutation.tests) > 1 else "")
            print(f"{mutation.name:<52} {verdict:<9} {time.perf_counter() - start:5.1f} s  {test}", flush=True)
    bad = sum(verdict != "killed" for verdict in verdicts)
    print(f"{len(rows) - bad} of {len(rows)} guards noticed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
