"""What fusing costs: time and memory against loading the same model. ResNet50 with random weights.

    python benchmarks/fuse_cost.py [--repeats 3] [--json]

Every step runs in a fresh process and reports its own peak memory; the steps take turns:

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
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS = ("import", "load", "fuse", "prove")
TARGETS = {"fuse_over_load": 1.0, "fuse_memory_over_weights": 2.5}


def build(path: Path) -> None:
    """ResNet50 with random weights and statistics that are not the identity."""
    import keras
    import numpy as np

    keras.utils.set_random_seed(0)
    model = keras.applications.ResNet50(weights=None)
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


def fresh(*arguments: str) -> str:
    """Run this file in a process of its own; what it prints."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


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


def main() -> int:
    parser = argparse.ArgumentParser(description="time and memory of fusing against loading")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print all measurements as JSON")
    parser.add_argument("--step", choices=("build", *STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step == "build":
        build(options.model)
        return 0
    if options.step is not None:
        print(json.dumps(step(options.step, options.model)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet50.keras"
        fresh("--step", "build", "--model", str(path))
        found = measure(path, options.repeats)
    print(json.dumps(found, indent=1) if options.json else table(found))
    return 0 if all(found["ratios"][name] <= limit for name, limit in TARGETS.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
