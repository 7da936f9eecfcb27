"""The long run of the property test: thousands of random nets through `fuse`.

    python benchmarks/random_nets.py [--count 2000] [--start 0] [--processes 1] [--log random_nets.jsonl]

Each seed is one net of `tests/random_nets.py`: built, fused, fused again, and compared by plain Keras
(`reprove.py`). Each appends one JSON line to the log; seeds that the log already has are not run again, but those
that failed are, so an interrupted run goes on where it stopped and a mended one repeats what was wrong. Worker
processes are replaced after a hundred nets, because TensorFlow keeps some memory of every graph. Exit code 1 when
a net fails; its seed, what is wrong and the shrunk net are printed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # tiny nets: a CPU is what they fit
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

NETS_PER_PROCESS = 100
TRIES = 200  # nets looked at while one failure is shrunk


def one(seed: int) -> dict[str, Any]:
    """The line of one net; runs in a worker."""
    # Imported here: the parent process needs no TensorFlow. The folder of tests is on the path of this run only.
    from random_nets import drawn, measure, shrunk

    begin = time.perf_counter()
    program, built = drawn(seed)
    found = measure(program, built)
    line = {
        "seed": seed,
        "layers": found.layers,
        "sources": found.sources,
        "fused": found.fused,
        "reduced": found.reduced,
        "kept": found.kept,
        "exactness": found.exactness,
        "reconsidered": found.reconsidered,
        "seconds": round(time.perf_counter() - begin, 3),
        "failure": found.failure,
    }
    return line if found.failure is None else {**line, "shrunk": str(shrunk(program, found.failure, TRIES))}


def lines_of(log: Path) -> dict[int, dict[str, Any]]:
    """Seed -> its last whole line; a line that was cut off when a run was killed does not count."""
    found: dict[int, dict[str, Any]] = {}
    for text in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        found[line["seed"]] = line
    return found


def complaint(line: dict[str, Any]) -> str:
    return f"seed {line['seed']}: {line['failure']}\n{line['shrunk']}\n"


def summary(lines: list[dict[str, Any]]) -> str:
    if not lines:
        return "no nets"
    total = {key: sum(line[key] for line in lines) for key in ("sources", "fused", "reduced", "kept")}
    layers = [line["layers"] for line in lines]
    seconds = [line["seconds"] for line in lines]
    worst = max((line["exactness"] for line in lines if line["exactness"] is not None), default=None)
    failures = sum(line["failure"] is not None for line in lines)
    return "\n".join(
        [
            f"nets        {len(lines)}, failures {failures}",
            f"layers      {min(layers)} to {max(layers)}, median {statistics.median(layers):g}",
            f"sources     {total['sources']}: fused {total['fused']}, reduced {total['reduced']}, kept {total['kept']}",
            f"again       {sum(line['reconsidered'] for line in lines)} nets lost a source that had cost digits",
            f"exactness   {'unknown' if worst is None else f'{worst:.2g}'} at worst",
            f"seconds     {statistics.median(seconds):.2f} per net (median), {max(seconds):.2f} at most",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="fuse random nets and check every promise")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--log", type=Path, default=Path("random_nets.jsonl"))
    options = parser.parse_args()
    wanted = range(options.start, options.start + options.count)
    known = {seed: line for seed, line in lines_of(options.log).items() if seed in wanted and line["failure"] is None}
    left = [seed for seed in wanted if seed not in known]
    print(f"{len(known)} nets in {options.log}, {len(left)} to go", file=sys.stderr)
    spawn = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork
    with (
        spawn.Pool(options.processes, maxtasksperchild=NETS_PER_PROCESS) as pool,
        options.log.open("a", encoding="utf-8") as log,
    ):
        for line in pool.imap_unordered(one, left):
            known[line["seed"]] = line
            log.write(json.dumps(line) + "\n")
            log.flush()
            if line["failure"] is not None:
                print(complaint(line), file=sys.stderr)
            if len(known) % 100 == 0:
                print(f"{len(known)} of {len(wanted)}", file=sys.stderr)
    failed = [known[seed] for seed in sorted(known) if known[seed]["failure"] is not None]
    for line in failed:
        print(complaint(line))
    print(summary(list(known.values())))
    return 1 if failed or len(known) < len(wanted) else 0


if __name__ == "__main__":
    sys.exit(main())
