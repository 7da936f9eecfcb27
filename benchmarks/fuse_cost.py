"""What fusing costs: against loading the same model, and by the number of layers.

    python benchmarks/fuse_cost.py [--parts loading planning] [--net ResNet50] [--repeats 3] [--json]

**loading**: a net with random weights. Every step runs in a fresh process and reports its own peak memory; the
steps take turns:

    import    TensorFlow, Keras and deploykit
    load      ... and load the model
    fuse      ... and fuse it without proof (trace, plan, apply)
    prove     load and fuse it with proof

Claimed are ratios, medians over the repeats:

    time      fuse / load, both from the process that fuses                          at most 1
    memory    (peak of fuse - peak of load) / bytes of the weights                   at most 2.5
    proof     (peak of prove - peak of load) / bytes of the weights                  shown

Seconds are shown as well; they belong to one machine. `deploykit --help` must not import TensorFlow:
its time is given relative to the import's.

**planning**: chains of 100, 1,000 and 10,000 layers, each in a fresh process: Dense, BatchNormalization, ReLU over
and over, and a residual stream with pre-activation (BN, ReLU, Dense, twice, then Add). Shown are microseconds per
layer for `trace` and for `plan`, the fastest of the repeats. Claimed is linear growth:

    growth    microseconds per layer / the same of the chain a tenth as long         at most 2

of `plan` from 1,000 to 10,000 layers; a planner whose time grows with the square would show 10. Below a thousand
layers the times are milliseconds and the fixed part shows.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

STEPS = ("import", "load", "fuse", "prove")
TARGETS = {"fuse_over_load": 1.0, "fuse_memory_over_weights": 2.5}
SIZES = (100, 1_000, 10_000)
GROWTH_TARGET = 2.0
ROOT = Path(__file__).resolve().parent.parent


def fresh(*arguments: str) -> str:
    """Run this file in a process of its own; what it prints."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


# -------------------------------------------------------------------------------------------------- loading


def build(path: Path, net: str) -> None:
    """A net of keras.applications with random weights and statistics that are not the identity."""
    import keras
    import numpy as np

    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, net)(weights=None)
    random = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            gamma, beta, mean, variance = (np.shape(weight) for weight in layer.get_weights())
            layer.set_weights(
                [
                    random.uniform(0.5, 1.5, gamma),
                    random.normal(0, 0.1, beta),
                    random.normal(0, 0.1, mean),
                    random.uniform(0.7, 1.5, variance),
                ]
            )
    model.save(path)


def step(name: str, path: Path) -> dict[str, Any]:
    """One measurement, in this process: seconds of each part, the peak memory, the weights' bytes."""
    clock = time.perf_counter
    begin = clock()
    import tensorflow  # noqa: F401  # the import is what is measured

    from deploykit.environment import peak_rss_bytes
    from deploykit.fuse import fuse
    from deploykit.load import load

    seconds = {"import": clock() - begin}
    found: dict[str, Any] = {"seconds": seconds}
    if name != "import":
        begin = clock()
        model = load(path).model
        seconds["load"] = clock() - begin
        found["weights_bytes"] = sum(weight.nbytes for weight in model.get_weights()) if name == "load" else None
        if name != "load":
            begin = clock()
            fused = fuse(model, prove=name == "prove")
            seconds[name] = clock() - begin
            seconds.update({f"{name}.{part}": value for part, value in fused.seconds.items() if value})
            found["outcomes"] = {outcome: fused.count(outcome) for outcome in ("fused", "reduced", "kept")}
    found["peak_bytes"] = peak_rss_bytes()
    return found


def help_seconds() -> float | None:
    """Wall time of ``deploykit --help``; None where there is no command line yet."""
    if importlib.util.find_spec("deploykit.cli") is None:
        return None
    begin = time.perf_counter()
    command = "import sys; sys.argv[0] = 'deploykit'; from deploykit.cli import main; main()"
    subprocess.run([sys.executable, "-c", command, "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def measure(path: Path, repeats: int) -> dict[str, Any]:
    """All repeats, and the medians over them."""
    rounds: list[dict[str, Any]] = []
    for number in range(repeats):
        order = STEPS if number % 2 == 0 else STEPS[::-1]
        found = {name: json.loads(fresh("--step", name, "--model", str(path)).splitlines()[-1]) for name in order}
        found["help_s"] = help_seconds()
        rounds.append(found)
        print(f"repeat {number + 1} of {repeats}", file=sys.stderr)
    weights = rounds[0]["load"]["weights_bytes"]

    def median(of: Any) -> float:
        return float(statistics.median(of(found) for found in rounds))

    def above_loading(name: str) -> float:
        return median(lambda f: (f[name]["peak_bytes"] - f["load"]["peak_bytes"]) / weights)

    asked = rounds[0]["help_s"] is not None
    return {
        "ratios": {
            "fuse_over_load": median(lambda f: f["fuse"]["seconds"]["fuse"] / f["fuse"]["seconds"]["load"]),
            "prove_over_load": median(lambda f: f["prove"]["seconds"]["prove"] / f["prove"]["seconds"]["load"]),
            "fuse_memory_over_weights": above_loading("fuse"),
            "prove_memory_over_weights": above_loading("prove"),
            "help_over_import": median(lambda f: f["help_s"] / f["import"]["seconds"]["import"]) if asked else None,
        },
        "targets": TARGETS,
        "weights_bytes": weights,
        "peak_bytes": {name: int(median(lambda f, name=name: f[name]["peak_bytes"])) for name in STEPS},
        "seconds": {name: median(lambda f, name=name: f[name]["seconds"][name]) for name in STEPS}
        | ({"help": median(lambda f: f["help_s"])} if asked else {}),
        "outcomes": rounds[0]["prove"]["outcomes"],
        "rounds": rounds,
    }


def table(found: dict[str, Any]) -> str:
    lines = [f"{'step':<10}{'seconds':>10}{'peak MB':>10}"]
    for name, seconds in found["seconds"].items():
        peak = found["peak_bytes"].get(name)
        lines.append(f"{name:<10}{seconds:>10.2f}{'' if peak is None else f'{peak / 1e6:>10.0f}'}")
    lines += ["", f"{'ratio':<28}{'median':>8}{'target':>8}"]
    for name, value in found["ratios"].items():
        if value is not None:
            target = found["targets"].get(name)
            verdict = "" if target is None else f"{target:>8.1f}  {'met' if value <= target else 'MISSED'}"
            lines.append(f"{name:<28}{value:>8.2f}{verdict}")
    return "\n".join([*lines, "", f"weights {found['weights_bytes'] / 1e6:.0f} MB, decisions {found['outcomes']}"])


# ------------------------------------------------------------------------------------------------- planning


def plain_chain(tensor: Any, layers: int) -> Any:
    """Dense, BatchNormalization, ReLU over and over, ``layers`` in all."""
    from keras import layers as L  # noqa: N812

    for index in range(layers):
        kind = (lambda: L.Dense(4), L.BatchNormalization, L.ReLU)[index % 3]
        tensor = kind()(tensor)
    return tensor


def residual_stream(tensor: Any, layers: int) -> Any:
    """A stream to which blocks of BN, ReLU, Dense, BN, ReLU, Dense are added; ``layers`` in all, rounded to blocks."""
    from keras import layers as L  # noqa: N812

    tensor = L.Dense(4)(tensor)
    for _ in range((layers - 4) // 7):
        branch = tensor
        for _ in range(2):
            branch = L.Dense(4)(L.ReLU()(L.BatchNormalization()(branch)))
        tensor = L.Add()([tensor, branch])
    return L.Dense(4)(L.ReLU()(L.BatchNormalization()(tensor)))


CHAINS: Mapping[str, Callable[[Any, int], Any]] = {"plain": plain_chain, "residual": residual_stream}


@contextlib.contextmanager
def deep_recursion(layers: int) -> Iterator[None]:
    """Keras builds a functional model by recursion, layer by layer."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, 20 * layers + 1000))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def planning(chain: str, layers: int, repeats: int) -> dict[str, Any]:
    """Processor seconds of trace and plan of one chain, in this process; the fastest of the repeats."""
    sys.path.insert(0, str(ROOT / "tests"))
    import keras
    from nets import enliven

    from deploykit.fuse.plan import plan
    from deploykit.graph import trace

    keras.utils.set_random_seed(0)
    with deep_recursion(layers):
        start = keras.Input((4,), name="x")
        model = enliven(keras.Model(start, CHAINS[chain](start, layers)), positive=True)
    clock = time.process_time
    seconds: dict[str, list[float]] = {"trace": [], "plan": []}
    for _ in range(repeats):
        begin = clock()
        found = trace(model)
        seconds["trace"].append(clock() - begin)
        begin = clock()
        made = plan(found)
        seconds["plan"].append(clock() - begin)
    outcomes = Counter(decision.outcome for decision in made.decisions)
    fastest = {name: min(values) for name, values in seconds.items()}
    return {"layers": len(found.nodes), "seconds": fastest, "all_seconds": seconds, "outcomes": dict(outcomes)}


def measure_planning(repeats: int) -> dict[str, Any]:
    """All chains in all sizes, microseconds per layer, and how these grow from size to size."""
    chains: dict[str, Any] = {}
    for chain in CHAINS:
        sizes = []
        for layers in SIZES:
            arguments = ("--step", "plan", "--chain", chain, "--layers", str(layers), "--repeats", str(repeats))
            sizes.append(json.loads(fresh(*arguments).splitlines()[-1]))
            print(f"{chain} chain of {sizes[-1]['layers']} layers", file=sys.stderr)
        per_layer_us = {
            part: [size["seconds"][part] / size["layers"] * 1e6 for size in sizes] for part in ("trace", "plan")
        }
        growth = {part: [high / low for low, high in pairwise(values)] for part, values in per_layer_us.items()}
        chains[chain] = {"sizes": sizes, "per_layer_us": per_layer_us, "growth": growth}
    return {"chains": chains, "target": GROWTH_TARGET}


def planning_table(found: dict[str, Any]) -> str:
    heading = "".join(f"{title:>10}" for title in ("layers", "us/layer", "growth"))
    lines = []
    for chain, rows in found["chains"].items():
        for part, values in rows["per_layer_us"].items():
            lines.append(f"{chain + ', ' + part:<18}{heading}")
            for index, (size, value) in enumerate(zip(rows["sizes"], values, strict=True)):
                growth = f"{rows['growth'][part][index - 1]:>10.2f}" if index else ""
                lines.append(f"{'':<18}{size['layers']:>10,}{value:>10.1f}{growth}")
        verdict = "met" if rows["growth"]["plan"][-1] <= found["target"] else "MISSED"
        outcomes = rows["sizes"][-1]["outcomes"]
        lines += [f"growth of plan at most {found['target']:.0f}: {verdict}; decisions {outcomes}", ""]
    return "\n".join(lines)


# -----------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description="time and memory of fusing against loading")
    parser.add_argument("--parts", nargs="+", choices=("loading", "planning"), default=("loading", "planning"))
    parser.add_argument("--net", default="ResNet50", help="of keras.applications, for the part on loading")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print all measurements as JSON")
    parser.add_argument("--step", choices=("build", "plan", *STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--chain", choices=tuple(CHAINS), help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step == "build":
        build(options.model, options.net)
        return 0
    if options.step == "plan":
        print(json.dumps(planning(options.chain, options.layers, options.repeats)))
        return 0
    if options.step is not None:
        print(json.dumps(step(options.step, options.model)))
        return 0
    found: dict[str, Any] = {}
    tables: list[str] = []
    met = True
    if "loading" in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "resnet50.keras"
            fresh("--step", "build", "--model", str(path), "--net", options.net)
            found |= measure(path, options.repeats)
        tables.append(table(found))
        met &= all(found["ratios"][name] <= limit for name, limit in TARGETS.items())
    if "planning" in options.parts:
        found["planning"] = measure_planning(options.repeats)
        tables.append(planning_table(found["planning"]))
        met &= all(rows["growth"]["plan"][-1] <= GROWTH_TARGET for rows in found["planning"]["chains"].values())
    print(json.dumps(found, indent=1) if options.json else "\n\n".join(tables).rstrip())
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
