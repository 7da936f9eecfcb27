#!/usr/bin/env python3
"""The whole GPU check from bundles alone: is it the same model there, and what does a run take?

    python gpu.py BUNDLE [FLOAT16_BUNDLE] [--provider cuda|tensorrt|cpu] [--batches 1,8,32] [--rounds N] [--json OUT]

Needs Python 3.9, numpy, onnxruntime-gpu and the bundles, whose own verify.py judges and does the arithmetic; this file
may be copied beside them. Prints Markdown for docs/gpu.md; ``--json`` keeps every sample. ``--provider cpu`` takes the
same way through the same code with memory of the host: for trying out, no measurement of anything.

Proven first, timed afterwards:

    prove     hashes and golden data, arrays in and out, TF32 off: as ``verify.py --provider cuda`` does it. Then each
              variant again with inputs and outputs bound to the device: its first run (for a CUDA graph: the recorded
              one) sees zeros, then the golden inputs are copied over them, so that a replay of old values fails.
    time      each variant in a process of its own, in rounds A B C, C B A; a block is one run that is not timed, then
              as many as fill 50 ms, then five transfers each way and five runs from arrays to arrays.

    TF32 off      the yardstick: ``use_tf32=0`` (TensorRT: NVIDIA_TF32_OVERRIDE=0), the precision of the proof
    CUDA graph    the same, recorded once and replayed
    TF32 on       what ONNX Runtime does by default; whether it passes a float32 proof is told, and decides nothing
    float16       FLOAT16_BUNDLE, judged by its own policy

"on the device" is a run with inputs and outputs in the device's memory, until the device is done. A ratio is time over
time of the yardstick at the same batch size: the centre of the rounds' ratios with its 95 % interval (`verify.py`,
``centre_interval``). A variant that cannot run is a row with the reason.

Exit codes: 0 proven, 1 a proof failed (TF32's does not count), 2 bad usage, or nothing to run on: one line on stderr.

Limits: one process each, so a few percent between variants may be luck; GPUs that others use meanwhile are not noticed;
the device is number 0 of those that are visible (CUDA_VISIBLE_DEVICES).
"""

# ruff: noqa: B905  (zip has no strict in Python 3.9)

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

BLOCK_S, LEAST, MOST = 0.05, 3, 1000
BESIDE = 5  # transfers, and runs from arrays to arrays, in a block
WARM_S = 0.5
OVERRIDE = "NVIDIA_TF32_OVERRIDE"
TIMES = ("device", "to_device", "from_device", "end_to_end")


class RefusedError(Exception):
    """Nothing can be measured; the message says why, in one line."""


@dataclass(frozen=True)
class Options:
    """What a provider is told beyond what verify.py tells it: its options, and NVIDIA_TF32_OVERRIDE (None: unset)."""

    graph: dict[str, str] = field(default_factory=dict)
    tf32: dict[str, str] = field(default_factory=dict)
    override: tuple[str | None, str | None] = (None, None)  # with TF32 off, with TF32 on


PROVIDERS = {
    "cuda": Options({"enable_cuda_graph": "1"}, {"use_tf32": "1"}),
    "tensorrt": Options({"trt_cuda_graph_enable": "1"}, {}, ("0", "1")),
    "cpu": Options(),
}


@dataclass(frozen=True)
class Variant:
    """A way to run a bundle; ``counts``: whether its proof decides the exit code."""

    name: str
    bundle: str
    override: str | None
    changes: dict[str, str] = field(default_factory=dict)
    graph: bool = False
    counts: bool = True


def variants(provider: str, bundles: list[str]) -> list[Variant]:
    """The yardstick comes first."""
    options = PROVIDERS[provider]
    off, on = options.override
    return [
        Variant("TF32 off", bundles[0], off),
        Variant("CUDA graph", bundles[0], off, options.graph, graph=True),
        Variant("TF32 on", bundles[0], on, options.tf32, counts=False),
        *(Variant("float16", bundle, off) for bundle in bundles[1:]),
    ]


def verifier(bundle: str) -> Any:
    """The bundle's own verify.py as a module."""
    path = os.path.join(bundle, "verify.py")
    if not os.path.isfile(path):
        raise RefusedError(f"{bundle} holds no verify.py; give the folder of a bundle")
    sys.dont_write_bytecode = True  # the bundle stays as it is
    spec = importlib.util.spec_from_file_location("bundle_verify", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise RefusedError(f"{path} cannot be imported ({error}); run: pip install numpy onnxruntime-gpu") from None
    except Exception as error:  # it was changed; its hash cannot be read before it runs
        raise RefusedError(f"{path} is damaged ({type(error).__name__}); write the bundle again") from None
    if not hasattr(module, "Bound"):
        raise RefusedError(f"{path} is older than I/O binding; write the bundle again with deploykit deploy")
    return module


# ------------------------------------------------------------------------------------------- one variant, one process


class Worker:
    """The far end of `Lane`: one variant, answering commands."""

    def __init__(self, bundle: str, provider: str, changes: dict[str, str], graph: bool) -> None:
        self.verify = verifier(bundle)
        self.bundle, self.provider, self.changes = self.verify.open_bundle(bundle), provider, changes
        self.graph = graph

    def session(self) -> Any:
        return self.verify.Session(self.bundle, self.provider, None, self.changes)

    def plain(self) -> dict[str, Any]:
        """The bundle's own verdict: hashes and golden data, arrays in and out."""
        return dict(self.verify.verify_bundle(self.bundle.folder, self.provider, None, 0))

    def prove(self) -> dict[str, Any]:
        """Golden data through bound memory, whose first run saw zeros; a session for each set, as a graph needs."""
        found: list[Any] = []
        for golden in self.bundle.golden():
            session = self.session()
            bound = session.bound({name: self.verify.np.zeros_like(array) for name, array in golden.inputs.items()})
            bound.to_device(golden.inputs)
            bound.run()
            found += session.judged(golden, bound.from_device())
        passed = bool(found) and self.verify.all_passed(found)
        levels = [output.snr_db for output in found if output.snr_db is not None]
        reasons = [str(output.reason) for output in found if output.reason]
        return {
            "passed": passed,
            "policy": str(self.bundle.manifest.get("policy")),
            "snr_db": min(levels) if levels else None,  # None: exact
            "reason": None if passed else (reasons or ["the bundle holds no golden data"])[0],
            "nodes": session.nodes,
            "elsewhere": _elsewhere(session),
            "notices": session.notices(),
            "environment": session.environment(),
            "cuda": getattr(self.verify.import_onnxruntime(), "cuda_version", None),  # that it was built for
            OVERRIDE: os.environ.get(OVERRIDE),
        }

    def open(self, batch: int) -> dict[str, Any]:
        """Inputs of so many samples: the golden ones, repeated or cut."""
        np = self.verify.np
        golden = self.bundle.golden()[0].inputs
        self.feed = {
            name: np.ascontiguousarray(a[np.arange(batch) % len(a)]) if a.ndim else a for name, a in golden.items()
        }
        session = self.session()
        self.bound = session.bound(self.feed)
        self.whole = self._through if self.graph else session.run  # a recorded run knows the bound memory only
        median = statistics.median(self.verify.measure(self.bound.run, WARM_S))
        self.runs = min(MOST, max(LEAST, math.ceil(BLOCK_S / median)))
        return {}

    def _through(self, feed: Any) -> Any:
        self.bound.to_device(feed)
        self.bound.run()
        return self.bound.from_device()

    def block(self) -> dict[str, Any]:
        calls = (
            (self.bound.run, self.runs),
            (lambda: self.bound.to_device(self.feed), BESIDE),
            (self.bound.from_device, BESIDE),
            (lambda: self.whole(self.feed), BESIDE),
        )
        return {name: timed(*call) for name, call in zip(TIMES, calls)}


def flat(rounds: list[list[float]]) -> list[float]:
    """The samples of all rounds."""
    return list(itertools.chain.from_iterable(rounds))


def timed(call: Any, runs: int) -> list[float]:
    """Durations in seconds, after one that is not timed."""
    call()
    samples = []
    for _ in range(runs):
        begin = time.perf_counter_ns()
        call()
        samples.append(max(time.perf_counter_ns() - begin, 1) * 1e-9)
    return samples


def _elsewhere(session: Any) -> dict[str, int] | None:
    """How many nodes of each kind another provider took; None in versions that do not tell."""
    if session.nodes is None:
        return None
    found: dict[str, int] = {}
    for part in session.session.get_provider_graph_assignment_info():
        if part.ep_name != session.provider:
            for node in part.get_nodes():
                found[str(node.op_type)] = found.get(str(node.op_type), 0) + 1
    return found


def serve(arguments: dict[str, Any]) -> int:
    """Answer commands from stdin; stdout is turned away from native code, which prints."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            worker = worker or Worker(**arguments)
            found = getattr(worker, command.pop("do"))(**command)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            refused = type(error).__name__ == "RefusedError"  # ours, or that of verify.py
            text = " ".join(str(error).split())[:400] or type(error).__name__
            found = {"refused" if refused else "failed": text}
        answers.write(json.dumps(found) + "\n")
        answers.flush()
    return 0


def variables(variant: Variant) -> dict[str, str]:
    """The environment, of which the variant alone decides about TF32."""
    kept = {name: value for name, value in os.environ.items() if name != OVERRIDE}
    return kept if variant.override is None else {**kept, OVERRIDE: variant.override}


class FailedError(Exception):
    """A variant that cannot run; the message is the reason."""


class Lane:
    """The near end of `Worker`."""

    def __init__(self, variant: Variant, provider: str) -> None:
        arguments = {
            "bundle": variant.bundle,
            "provider": provider,
            "changes": variant.changes,
            "graph": variant.graph,
        }
        self.variant, self._log = variant, tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--worker", json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=variables(variant),
        )

    def ask(self, verb: str, **more: Any) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps({"do": verb, **more}) + "\n")
            stdin.flush()
            line = stdout.readline()
        if not line:
            self._log.seek(0)
            said = [text.strip() for text in self._log if text.strip()]
            raise FailedError(
                f"its process ended with code {self._process.wait()}: {(said or ['nothing said'])[-1][:200]}"
            )
        found = dict(json.loads(line))
        if "refused" in found:
            raise RefusedError(found["refused"])
        if "failed" in found:
            raise FailedError(found["failed"])
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()


# ------------------------------------------------------------------------------------------------------------- prove


def prove(wanted: list[Variant], provider: str) -> list[dict[str, Any]]:
    """A row for each variant, the first with the bundle's own verdict. Raises RefusedError where nothing runs."""
    rows = []
    for variant in wanted:
        row: dict[str, Any] = {"variant": variant.name, "bundle": variant.bundle, "counts": variant.counts}
        with contextlib.closing(Lane(variant, provider)) as lane:
            try:
                if not rows:
                    row["verify"] = lane.ask("plain")
                row.update(lane.ask("prove"), failed=None)
                if row["passed"] and not row.get("verify", row)["passed"]:
                    row.update(passed=False, reason=row["verify"]["reason"])
            except (FailedError, RefusedError) as error:
                if not rows and isinstance(error, RefusedError):
                    raise
                row.update(passed=False, failed=str(error))
        rows.append(row)
    return rows


def failures(wanted: list[Variant], proofs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that make the check fail. A graph that cannot be recorded does not; one that answers wrongly does."""
    return [
        row
        for variant, row in zip(wanted, proofs)
        if variant.counts and not row["passed"] and not (variant.graph and row["failed"] is not None)
    ]


# -------------------------------------------------------------------------------------------------------------- time


def time_all(runnable: list[Variant], provider: str, batch: int, rounds: int, verify: Any) -> list[dict[str, Any]]:
    """A row for each variant at one batch size."""
    lanes = [Lane(variant, provider) for variant in runnable]
    samples: list[dict[str, list[list[float]]]] = [{name: [] for name in TIMES} for _ in lanes]
    failed: list[str | None] = [None for _ in lanes]

    def take(place: int, verb: str, **more: Any) -> None:
        if failed[place] is None:
            try:
                for name, values in lanes[place].ask(verb, **more).items():
                    samples[place][name].append(values)
            except (FailedError, RefusedError) as error:
                failed[place] = str(error)

    try:
        for place in range(len(lanes)):
            take(place, "open", batch=batch)
        for done in range(rounds):
            for place in range(len(lanes))[:: -1 if done % 2 else 1]:
                take(place, "block")
    finally:
        for lane in lanes:
            lane.close()
    rows = []
    for place, variant in enumerate(runnable):
        found: dict[str, Any] = {"variant": variant.name, "batch": batch, "failed": failed[place]}
        if failed[place] is None:
            own, first = samples[place], samples[0]
            known = failed[0] is None
            found.update(
                ms={name: 1e3 * statistics.median(flat(own[name])) for name in TIMES},
                latency_ms={
                    key: None if value is None else value * 1e3
                    for key, value in verify.summarize(flat(own["device"])).items()
                },
                ratio=ratio(own["device"], first["device"], verify) if known and place else None,
                end_to_end_ratio=ratio(own["end_to_end"], first["device"], verify) if known else None,
                samples_s=own,
            )
        rows.append(found)
    return rows


def ratio(a: list[list[float]], b: list[list[float]], verify: Any) -> dict[str, Any]:
    """Time of a over time of b, round beside round; the interval is None below six rounds."""
    logs = verify.log_ratios(a, b)
    ends = verify.centre_interval(logs, 0.95)
    return {"value": math.exp(verify.centre(logs)), "ci95": ends and [math.exp(end) for end in ends]}


# ------------------------------------------------------------------------------------------------------------ report


def gpus() -> list[dict[str, str]]:
    """What nvidia-smi tells; empty where there is none."""
    keys = ("name", "driver_version", "memory.total", "utilization.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(keys, map(str.strip, line.split(",")))) for line in done.stdout.splitlines() if line.strip()]


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{found['value']:.2f}" + (" [{:.2f}, {:.2f}]".format(*found["ci95"]) if found["ci95"] else "")


def _verdict(report: dict[str, Any]) -> str:
    own = report["proofs"][0]["verify"]
    return "Proven." if own["proven"] else f"Equivalent, not proven: {own['reason']}."


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    def spelled(row: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"

    return [spelled(head), "|" + " --- |" * len(head), *map(spelled, rows), ""]


def markdown(report: dict[str, Any]) -> str:
    about = report["environment"]
    where = ", ".join(f"{gpu['name']} (driver {gpu['driver_version']})" for gpu in report["gpus"]) or about["cpu"]
    cuda = next((row["cuda"] for row in report["proofs"] if row.get("cuda")), None)
    built = f" for CUDA {cuda}" if cuda else ""
    lines = [
        f"### {report['bundle']}, {about['provider']}",
        "",
        f"{where}; onnxruntime {about['packages']['onnxruntime']}{built}, numpy {about['packages']['numpy']},"
        f" Python {about['python']}, {about['platform']}.",
        "",
    ]
    proofs = []
    for row in report["proofs"]:
        if row["failed"] is not None:
            proofs.append((row["variant"], "cannot run", "", "", row["failed"]))
            continue
        taken = "?" if row["nodes"] is None else ", ".join(f"{n} {name}" for name, n in row["nodes"].items())
        strays = ", ".join(f"{n} {kind}" for kind, n in (row["elsewhere"] or {}).items())
        level = "exact" if row["snr_db"] is None else f"{row['snr_db']:.1f}"
        said = ("pass" if row["passed"] else "FAIL") + ("" if row["counts"] else ", for information")
        note = "; ".join(text for text in (row["reason"] or "", strays and f"elsewhere: {strays}") if text)
        proofs.append((row["variant"], f"{said} ({row['policy']})", level, taken, note))
    lines += _table(("variant", "golden data", "SNR dB, worst", "nodes", ""), proofs)
    times = []
    for row in report["timings"]:
        if row["failed"] is not None:
            times.append((str(row["batch"]), row["variant"], "-", "", "", "", "", "", row["failed"]))
            continue
        ms = row["ms"]
        shown = [f"{ms[name]:.3f}" for name in TIMES]
        times.append(
            (str(row["batch"]), row["variant"], shown[0], _cell(row["ratio"]), *shown[1:],
             _cell(row["end_to_end_ratio"]), "")
        )  # fmt: skip
    head = ("batch", "variant", "on the device, ms", "ratio", "to it, ms", "from it, ms", "end to end, ms", "ratio", "")
    return "\n".join(lines + (_table(head, times) if times else []) + [report["reason"] or _verdict(report)]) + "\n"


def write(path: str, text: str) -> None:
    """The whole file or none."""
    try:
        with open(path + ".part", "w", encoding="ascii") as stream:
            stream.write(text)
        os.replace(path + ".part", path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(path + ".part")
        raise RefusedError(f"cannot write {path}: {error.strerror}") from None


# -------------------------------------------------------------------------------------------------------------- main


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise RefusedError(f"{message}; see --help")


def _parser() -> _Parser:
    parser = _Parser(description="Prove and time a bundle on a GPU.", allow_abbrev=False)
    parser.add_argument("bundle", metavar="BUNDLE", help="the float32 bundle")
    parser.add_argument("float16", metavar="FLOAT16_BUNDLE", nargs="?", help="the same model in float16")
    parser.add_argument("--provider", choices=PROVIDERS, default="cuda", help="default: cuda; cpu: trying out")
    parser.add_argument("--batches", metavar="N,N", default="1,8,32", help="default: 1,8,32")
    parser.add_argument("--rounds", metavar="N", type=int, default=20, help="default: 20; 0: prove only")
    parser.add_argument("--json", metavar="OUT", help="write everything, with all samples")
    parser.add_argument("--force", action="store_true", help="replace an existing OUT")
    return parser


def _refuse_strangers(opened: list[Any]) -> None:
    """The first bundle is the yardstick, float32; the second is the same model in float16."""
    policies = [str(bundle.manifest.get("policy")) for bundle in opened]
    if policies[0] in ("float16", "bfloat16", "int8"):
        raise RefusedError(f"{opened[0].folder} is a {policies[0]} bundle; give the float32 one first")
    sources = [(bundle.manifest.get("source") or {}).get("sha256") for bundle in opened]
    if len(set(sources)) > 1:
        raise RefusedError(
            f"{opened[1].folder} was made from another model than {opened[0].folder}; give bundles of one"
        )
    if policies[1:] == ["float32"]:
        raise RefusedError(f"{opened[1].folder} is a float32 bundle; make one with deploykit deploy --precision fp16")


def _batches(text: str, fixed: Any) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise RefusedError(f"--batches is {text!r}; give numbers from 1 on, like 1,8,32")
    return list(dict.fromkeys(found)) if fixed is None else [fixed]


def check(options: argparse.Namespace) -> int:
    if options.rounds < 0:
        raise RefusedError(f"--rounds is {options.rounds}; give a number from 0 on")
    bundles = [bundle for bundle in (options.bundle, options.float16) if bundle]
    verify = verifier(options.bundle)
    opened = [verifier(bundle).open_bundle(bundle) for bundle in bundles]  # a damaged one ends it before anything runs
    if options.json:
        for bundle in opened:  # none of its files may be replaced
            verify._claim(options.json, bundle, options.force)
    _refuse_strangers(opened)
    fixed = opened[0].inputs[0]["shape"][:1]
    batches = _batches(options.batches, fixed[0] if fixed else None)
    found = gpus()
    wanted = variants(options.provider, bundles)
    try:
        proofs = prove(wanted, options.provider)
    except RefusedError as error:
        lacking = options.provider != "cpu" and not found
        raise RefusedError(f"{error}; nvidia-smi finds no GPU on this machine" if lacking else str(error)) from None
    able = [variant for variant, row in zip(wanted, proofs) if row["failed"] is None]
    timings = []
    if proofs[0]["passed"] and options.rounds:
        for batch in batches:
            timings += time_all(able, options.provider, batch, options.rounds, verify)
    wrong = failures(wanted, proofs)
    report = {
        "schema": "deploykit.gpu/1",
        "bundle": os.path.basename(os.path.abspath(options.bundle)),
        "passed": not wrong,
        "reason": f"{wrong[0]['variant']}: {wrong[0]['failed'] or wrong[0]['reason']}" if wrong else None,
        "gpus": found,
        "environment": next((row["environment"] for row in proofs if row["failed"] is None), None),
        "proofs": proofs,
        "timings": timings,
    }
    if options.json:
        write(options.json, json.dumps(report, indent=1, allow_nan=False) + "\n")
    if report["environment"] is not None:
        sys.stdout.write(markdown(report))
    if wrong:
        sys.stderr.write(f"error: {report['reason']}\n")
    return 1 if wrong else 0


def main(argv: list[str]) -> int:
    if argv[:1] == ["--worker"]:
        return serve(json.loads(argv[1]))
    try:
        return check(_parser().parse_args(argv))
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except Exception as error:
        if type(error).__name__ != "RefusedError":
            raise
        message, code = f"error: {' '.join(str(error).split())}", 2
    sys.stderr.write(message + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
