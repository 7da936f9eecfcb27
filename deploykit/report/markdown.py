"""The README.md of a bundle: a model card made of measured facts, and how to use the file.

Nothing stands in it that the report does not say; what was not measured is not mentioned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploykit.report.wording import fastest, milliseconds, origin, ratio, size, small, snr

Json = Mapping[str, Any]

# What the options of an export mean for whoever uses the file.
CARD = {
    "nchw": "Images go in and come out as NCHW: batch, channels, height, width. The trained model has NHWC.",
    "fp16": "Weights and arithmetic are float16, for GPUs; inputs and outputs have the dtypes below.",
}


def _sizes(spec: Json) -> str:
    return "[" + ", ".join("any" if s is None else str(s) for s in spec["shape"]) + "]"


def _signature(report: Json) -> list[str]:
    lines = ["| | name | dtype | shape | plausible range |", "|---|---|---|---|---|"]
    for side in ("inputs", "outputs"):
        for spec in report["signature"][side]:
            known = spec["low"] is not None
            span = f"{spec['low']:g} .. {spec['high']:g}" if known else "not recorded in the model"
            lines.append(
                f"| {side[:-1]} | `{spec['name']}` | {spec['dtype']} | {_sizes(spec)} | "
                f"{span if side == 'inputs' else ''} |"
            )
    return lines


def _equivalence(check: Json) -> list[str]:
    lines = [
        "| file | runtime | output | SNR | original's own SNR | max abs error | top-1 agreement | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for comparison in check["comparisons"]:
        for output in comparison["outputs"]:
            top1 = "" if output["top1_agreement"] is None else f"{100 * output['top1_agreement']:.2f} %"
            lines.append(
                f"| {comparison['candidate']} | {comparison['runtime']} | `{output['name']}` | "
                f"{snr(output)} | {snr(output, 'reference_snr_db')} | {small(output['max_abs'])} | "
                f"{top1} | {'same' if output['passed'] else 'DIFFERS'} |"
            )
    return lines


def _speed(bench: Json) -> list[str]:
    lines = ["| candidate | batch | median | p90 | time / this bundle's | 95 % interval | verdict on it |"]
    lines.append("|---|---|---|---|---|---|---|")
    last = bench["candidates"][-1]["name"]
    for row in bench["candidates"]:
        if row["failed"]:
            lines.append(f"| {row['name']} | {row['batch']} | failed: {row['failed']} | | | | |")
            continue
        value, interval, verdict = against(bench, row, last)
        latency = row["latency_ms"]
        shown = f"[{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
        lines.append(
            f"| {row['name']} | {row['batch']} | {milliseconds(latency['median'])} | {milliseconds(latency['p90'])} | "
            f"{ratio(value) if value else ''} | {shown} | {verdict} |"
        )
    return lines


def setting(row: Json) -> tuple[int, int | None, str | None]:
    """In what a row of a benchmark can be compared with others: batch, threads, size of the inputs."""
    return row["batch"], row["threads"], row.get("size")


def against(bench: Json, row: Json, last: str) -> tuple[float | None, list[float] | None, str]:
    """(latency of ``row`` / latency of the candidate ``last``, its interval, verdict on ``row``)."""
    turn = {"faster": "slower", "slower": "faster"}
    for c in bench["comparisons"]:
        if setting(c) != setting(row) or not c["ratio"]:
            continue
        if (c["a"], c["b"]) == (row["name"], last):
            return c["ratio"], c["ci95"], c["verdict"]
        if (c["a"], c["b"]) == (last, row["name"]):
            interval = [1 / x for x in reversed(c["ci95"])] if c["ci95"] else None
            return 1 / c["ratio"], interval, turn.get(c["verdict"], c["verdict"])
    return None, None, ""


def fused_in_short(fuse: Json) -> str:
    """How many affines went, or what constant folding left where there are no layers."""
    if folding := fuse.get("folding"):
        return f"no layers to fold; constant folding left {folding['after']} of {folding['before']} operations"
    affines = fuse["affines"]
    told = f"{affines['fused']} of {affines['total']} affines were folded into their neighbours"
    return told + (f", {affines['reduced']} were reduced to one addition" if affines["reduced"] else "")


def model_card(report: Json) -> str:
    """Markdown for a bundle's README from its ``deploykit.deploy/1`` report."""
    fuse, check, bench, source = report["fuse"], report["check"], report["bench"], report["source"]
    first = report["signature"]["inputs"][0]
    kept = [d for d in fuse["decisions"] if d["outcome"] != "fused"]
    best = fastest(report.get("recommended"))
    name = source["path"].replace("\\", "/").rsplit("/", 1)[-1]
    example = ", ".join(str(s or 1) for s in first["shape"])
    lines = [
        f"# {name}, deployed",
        "",
        f"Made by deploykit {report['deploykit']} from `{name}` ({origin(source)}, "
        f"sha256 `{source['sha256'][:16]}...`).",
        f"`model.onnx` has opset {report['opset']} and runs on ONNX Runtime {report['oldest_onnxruntime'] or '?'} "
        "and later.",
        *(CARD[key] for key in (report.get("layout"), report.get("precision")) if key in CARD),
        "",
        "## Use",
        "",
        "```python",
        "import numpy as np, onnxruntime",
        'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])',
        f'outputs = session.run(None, {{"{first["name"]}": np.zeros(({example},), np.{first["dtype"]})}})',
        "```",
        "",
        *_signature(report),
        "",
        "## Prove it here",
        "",
        "`python verify.py` checks every file's hash, compares the model with the golden data and measures latency; it",
        "needs numpy and onnxruntime, nothing else, and exits 0 (equivalent), 1 (not) or 2 (a file was changed).",
        "",
        "## Equivalence",
        "",
        f"Measured against the original in {check['reference']['precision']} on {check['data']}.",
        *([f"Not proven: {report['reason']}."] if report["reason"] else []),
        "",
        *_equivalence(check),
    ]
    accuracy = check.get("reference_accuracy")
    if accuracy is not None:
        ours = check["comparisons"][-1]["accuracy"]
        lines += ["", f"Accuracy on the labelled samples: original {accuracy:.2%}, `model.onnx` {ours:.2%}."]
    lines += ["", "## Fused", "", f"{fused_in_short(fuse)}."]
    lines += [f"- {d['outcome']} `{d['layer']}`: {d['reason']}" for d in kept[:20]]
    if len(kept) > 20:
        lines.append(f"- and {len(kept) - 20} more, see `report.json`")
    if fuse["exactness_f64"] is not None:
        lines += [
            "",
            f"In float64 the fused model differs from the original by {small(fuse['exactness_f64'])} (relative).",
        ]
    lines += [
        "",
        "## Speed",
        "",
        f"On {report['environment'].get('cpu', '?')}, {bench['candidates'][0]['threads']} threads, "
        "each candidate in its own process, rounds interleaved.",
        "",
        *_speed(bench),
        "",
        *([f"Fastest runtime that passed the check: {best}.", ""] if best else []),
        f"`model.onnx` is {size(report['files'][0]['bytes'])}.",
    ]
    return "\n".join(lines) + "\n"
