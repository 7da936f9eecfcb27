"""Reports for a terminal: one screen each, verdict first within each part.

Every function takes the JSON form of one verb's report and a rich console; nothing is computed here that
the report does not say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from deploykit.report import audit_text, evidence, profile_text
from deploykit.report.ci_text import ci
from deploykit.report.markdown import against, fused_in_short, setting
from deploykit.report.wording import count, fastest, milliseconds, origin, ratio, size, small, snr

Json = Mapping[str, Any]
ROWS = 20  # a table of decisions folds into counts beyond this


def _grid(rows: Sequence[tuple[str, RenderableType]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for label, content in rows:
        grid.add_row(label, content)
    return grid


def _table(*columns: str, right: Sequence[int] = ()) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in right else "left", overflow="fold")
    return table


def _verdict(good: bool, yes: str, no: str) -> Text:
    return Text(yes, style="bold green") if good else Text(no, style="bold red")


def _notices(report: Json) -> list[tuple[str, RenderableType]]:
    return [("notice" if i == 0 else "", escape(text)) for i, text in enumerate(report.get("notices", []))]


def _head(report: Json, what: str = "") -> Text:
    return Text.assemble((f"deploykit {report['deploykit']}", "dim"), "  ", (str(report["model"]), "bold"), f"  {what}")


def _unproven(report: Json) -> list[tuple[str, RenderableType]]:
    """Why what passed is no proof."""
    passed = report.get("passed", report.get("check", {}).get("passed"))
    return [("NOT PROVEN", Text(report["reason"], style="yellow"))] if passed and report["reason"] else []


def _seconds(report: Json) -> str:
    parts = report.get("seconds", {})
    return ", ".join(f"{name} {value:.1f}" for name, value in parts.items() if value >= 0.05 and name != "total")


# ------------------------------------------------------------------------------------------------- fuse


def _fused_rows(fuse: Json, *, reasons: bool = True) -> list[tuple[str, RenderableType]]:
    affines, decisions = fuse["affines"], fuse["decisions"]
    if fuse.get("folding"):
        return [("fused", fused_in_short(fuse))]
    if not affines["total"]:
        return [
            ("fused", "nothing: the model has no BatchNormalization, Normalization, Rescaling or constant arithmetic")
        ]
    kinds = ", ".join(f"{n['fused']} of {n['total']} {kind}" for kind, n in affines["by_kind"].items())
    ways = Counter(d["direction"] for d in decisions if d["outcome"] == "fused")
    told = ", ".join(f"{ways[way]} {way}" for way in ("backward", "forward", "both") if ways[way])
    params = fuse["params"]
    rows: list[tuple[str, RenderableType]] = [
        (
            "fused",
            f"{kinds}{f'  ({told})' if told else ''};  {params['before']:,} -> {params['after']:,} parameters",
        )
    ]
    for outcome in ("reduced", "kept") if reasons else ():
        stay = [d for d in decisions if d["outcome"] == outcome]
        if len(stay) > 4:
            codes = Counter(d["code"] for d in stay)
            rows.append((outcome, ", ".join(f"{n} {code}" for code, n in codes.most_common())))
        rows += [
            (outcome if i == 0 else "", escape(f"{d['layer']}: {d['reason']}"))
            for i, d in enumerate(stay)
            if len(stay) <= 4
        ]
    if reasons and all(d["outcome"] == "fused" for d in decisions):
        rows.append(("kept", "none"))
    if fuse.get("exactness_f64") is not None:
        rows.append(
            (
                "exact",
                f"{small(fuse['exactness_f64'])} relative in float64 (bound {small(fuse['exactness_bound'])}); "
                f"{small(fuse['exactness_stored'])} with the weights as stored",
            )
        )
    if fuse.get("insensitive"):
        rows.append(("", f"no evidence from {', '.join(fuse['insensitive'])}: hardly varies between inputs"))
    return rows


def fuse(report: Json, console: Console) -> None:
    decisions = report["decisions"]
    parts: list[RenderableType] = [_head(report)]
    listed = 0 < len(decisions) <= ROWS
    rows = _fused_rows(report, reasons=not listed)
    if listed:
        table = _table("layer", "outcome", "direction", "into", "through", "reason")
        for d in decisions:
            cells = (d["layer"], d["outcome"], d["direction"] or "-", ", ".join(d["into"]) or "-")
            table.add_row(*map(escape, (*cells, ", ".join(d["through"]) or "-", d["reason"])))
        parts.append(table)
    elif decisions:
        table = _table("outcome", "direction", "code", "layers", right=[3])
        groups = Counter((d["outcome"], d["direction"] or "-", d["code"]) for d in decisions)
        for (outcome, direction, code), number in groups.most_common():
            table.add_row(outcome, direction, code, str(number))
        parts.append(table)
    if report["outputs_written"]:
        rows.append(("written", escape(", ".join(report["outputs_written"]))))
    parts.append(_grid(rows + _notices(report)))
    console.print(Group(*parts))


# ------------------------------------------------------------------------------------------------- check


def _judgement(output: Json) -> Text:
    if output["passed"] and evidence.doubt(output):
        return Text("same, but no evidence", style="yellow")
    return _verdict(output["passed"], "same", "DIFFERS")


def _check_rows(check: Json) -> list[tuple[str, RenderableType]]:
    rows: list[tuple[str, RenderableType]] = []
    for index, comparison in enumerate(check["comparisons"]):
        own = "original's own" if check["reference"]["precision"] == "float64" else "yardstick"
        table = _table("output", "SNR", own, "max abs", "top-1", "verdict", right=[1, 2, 3, 4])
        for output in comparison["outputs"]:
            top1 = output["top1_agreement"]
            table.add_row(
                escape(output["name"]),
                snr(output),
                snr(output, "reference_snr_db"),
                small(output["max_abs"]),
                "-" if top1 is None else f"{100 * top1:.2f} %",
                _judgement(output),
            )
        verdict = _verdict(comparison["passed"], "equivalent:", "NOT EQUIVALENT:")
        what = f" {comparison['candidate']} on {comparison['runtime']}, {count(comparison['samples'], 'sample')}"
        reasons = [output["reason"] for output in comparison["outputs"] if output["reason"] and not output["passed"]]
        if comparison.get("reason"):
            reasons.insert(0, comparison["reason"])
        content: list[RenderableType] = [Text.assemble(verdict, what), table]
        content += [Text(reason, style="red") for reason in reasons[:4]]
        left_out = max((output.get("excluded") or 0 for output in comparison["outputs"]), default=0)
        if left_out:
            content.append(Text(f"{comparison['samples'] - left_out} of them judged", style="yellow"))
        rows.append(("check" if index == 0 else "", Group(*content)))
    return rows


def check(report: Json, console: Console) -> None:
    rows = _check_rows(report)
    reference = report["reference"]
    rows.append(("reference", escape(f"{reference['model']} in {reference['precision']}, on {report['data']}")))
    for other in report.get("other_sizes", ()):
        rows.append(("", escape(f"and on {other}")))
    if layers := report.get("layers"):
        rows.append(("layers", escape(layers["text"])))
        rows += [("", escape(f"{more['candidate']}: {more['text']}")) for more in report.get("further_layers", ())]
    for key, label in (("worst_case", "worst case"), ("gradients", "gradients")):
        for part in report.get(key, ()):
            rows.append((label, escape(f"{part['candidate']}: {part['text']}")))
    if report["outputs_written"]:
        rows.append(("written", escape(", ".join(report["outputs_written"]))))
    console.print(Group(_head(report), _grid(rows + _unproven(report) + _notices(report))))


# ------------------------------------------------------------------------------------------------- bench


def _bench_table(bench: Json) -> RenderableType:
    table = _table("candidate", "batch", "median", "p90", "ratio", "95 % interval", "", right=[1, 2, 3, 4])
    candidates = bench["candidates"]
    for place in dict.fromkeys(map(setting, candidates)):
        group = [c for c in candidates if setting(c) == place]
        last, batch = group[-1], place[0]
        for c in group:
            if c["failed"]:
                table.add_row(
                    escape(c["name"]), str(batch), "-", "-", "-", "-", Text(f"failed: {c['failed']}", style="red")
                )
                continue
            value, interval, verdict = against(bench, c, last["name"])
            latency = c["latency_ms"]
            table.add_row(
                escape(c["name"]),
                str(batch),
                milliseconds(latency["median"]),
                milliseconds(latency["p90"]),
                "" if c is last else ratio(value),
                f"[{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "",
                _said(verdict, last["name"]) if c is not last else "",
            )
    return table


def _said(verdict: str, last: str) -> str:
    """A verdict on a row, as a phrase about the last one: the ratio is time / time of the last."""
    return {"slower": f"{last} is faster", "faster": f"{last} is slower"}.get(verdict, verdict)


def _session_rows(session: Json) -> list[tuple[str, RenderableType]]:
    """What is recommended, what it was chosen from, and how to use it."""
    rows: list[tuple[str, RenderableType]] = [("session", escape(session["reason"]))]
    for label, run in (("tried", session["tried"]), ("again", session["confirmed"])):
        table = _table("settings", "ratio", "95 % interval", "", right=[1, 2])
        for trial in run:
            interval = trial["ci95"]
            said = f"faster, but: {trial['differs']}" if trial["differs"] else trial["verdict"]
            table.add_row(
                escape(trial["name"]),
                "-" if trial["ratio"] is None else ratio(trial["ratio"]),
                f"[{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "",
                escape(trial["reason"] if trial["ratio"] is None else said),
            )
        if run:
            rows.append((label, table))
    if session["chosen"]:
        rows += [("python" if place == 0 else "", escape(line)) for place, line in enumerate(session["python"])]
    return rows


def bench(report: Json, console: Console) -> None:
    threads = sorted({str(c["threads"]) for c in report["candidates"]})
    cpu = report["environment"].get("cpu", "?")
    session = report.get("session")
    rows = _session_rows(session) if session else [("time", _bench_table(report))]
    for gate in report.get("gates") or ():
        said = {"passed": "fast enough", "undecided": "UNDECIDED", "failed": "TOO SLOW"}[gate["outcome"]]
        limit = f"at most {gate['max_slowdown']:g}x the time of {gate['baseline']}"
        rows.append(("gate", escape(f"{said}: {gate['candidate']}, {ratio(gate['ratio'])}; {limit}")))
    rows.append(("on", escape(f"{cpu}, threads {', '.join(threads)}")))
    if session:
        rows.append(("", escape(f"batch {session['measured']['batch']}; ratios are time / time of the default, alone")))
        rows.append(("written", escape(", ".join(report["outputs_written"]) or "nothing")))
    console.print(Group(_head(report), _grid(rows + _notices(report))))
    for found in report.get("profiles") or ():
        profile_text.profile(found, console)


# ----------------------------------------------------------------------------------- inspect, export, deploy


def inspect(report: Json, console: Console) -> None:
    file, signature = report["file"], report["signature"]
    rows: list[tuple[str, RenderableType]] = [
        (
            "file",
            f"{file['format']}, {size(file['bytes'])}, {escape(report['graph']['origin'])}"
            if report["graph"]
            else f"{file['format']}, {size(file['bytes'])}, saved by Keras {file['saved_by'] or '?'}"
            + (f" on {escape(file['backend'])}" if file["backend"] else "")
            + (f", translated from generation {file['generation']}" if file["generation"] < 3 else ""),
        ),
        (
            "model",
            f"{report['class']} '{report['name']}', {count(report['layers_total'], 'layer')}, "
            f"{report['parameters']['total']:,} parameters ({report['parameters']['trainable']:,} trainable)",
        ),
    ]
    for side in ("inputs", "outputs"):
        for index, spec in enumerate(signature[side]):
            sizes = ", ".join("?" if s is None else str(s) for s in spec["shape"])
            rows.append((side if index == 0 else "", escape(f"{spec['name']} {spec['dtype']} [{sizes}]")))
    rows.append(("training", "training configuration found" if file["training_config_found"] else "none in the file"))
    kinds = ", ".join(f"{number} {kind}" for kind, number in report["affines"].items()) or "none"
    if report["graph"]:
        most = list(report["graph"]["operations"].items())[:8]
        rows.append(("operations", escape(", ".join(f"{number} {name}" for name, number in most))))
    else:
        rows.append(("affines", f"{kinds}; `deploykit fuse --dry-run` says which can go"))
    for index, warning in enumerate(report["health"]):
        rows.append(("health" if index == 0 else "", Text(warning, style="yellow")))
    if not report["health"] and report["graph"]:
        rows.append(("health", "nothing to warn about: all weights are finite"))
    elif not report["health"]:
        rows.append(("health", "nothing to warn about: all weights are finite and no layer's numbers are unusual"))
    parts: list[RenderableType] = [_head(report), _grid(rows + _notices(report))]
    if report["graph"]:
        console.print(Group(*parts))
        return
    table = _table("layer", "class", "output", "parameters", right=[3])
    layers = report["layers"]
    shown = layers if len(layers) <= 2 * ROWS else [*layers[:ROWS], None, *layers[-ROWS // 2 :]]
    for layer in shown:
        if layer is None:
            table.add_row("...", f"{len(layers) - len(shown) + 1} more in --json", "", "")
            continue
        sizes = ", ".join("?" if s is None else str(s) for s in layer["output_shape"] or [])
        table.add_row(*map(escape, (layer["name"], layer["class"], f"[{sizes}]", f"{layer['parameters']:,}")))
    console.print(Group(*parts, table))


def export(report: Json, console: Console) -> None:
    rows: list[tuple[str, RenderableType]] = [
        (
            "written",
            escape(f"{', '.join(report['outputs_written'])}  ({size(report['size_bytes'])}, opset {report['opset']})"),
        )
    ]
    if report.get("fuse"):
        rows += _fused_rows(report["fuse"])
    if report.get("check"):
        rows += _check_rows(report["check"])
    console.print(Group(_head(report), _grid(rows + _unproven(report) + _notices(report))))


def deploy(report: Json, console: Console) -> None:
    file = report["source"]
    rows = _fused_rows(report["fuse"])
    rows += _check_rows(report["check"])
    rows.append(("", escape(f"on {report['check']['data']}; reference in {report['check']['reference']['precision']}")))
    rows += _unproven(report)
    rows.append(("time", _bench_table(report["bench"])))
    timed = report["bench"]["candidates"][0]
    how = f"{count(timed['threads'], 'thread')}, batch {timed['batch']}"
    rows.append(("", escape(f"on {report['environment'].get('cpu', '?')}, {how}")))
    if (best := fastest(report.get("recommended"))) is not None:
        rows.append(("runtime", escape(best)))
    if session := report.get("session"):
        rows.append(("session", escape(session["reason"])))
    files = ", ".join(f"{f['name']} {size(f['bytes'])}" for f in report["files"])
    rows.append(("bundle", escape(f"{report['bundle']}: {files}; verify.py, golden data, report.html, README.md")))
    rows.append(("", escape(f"prove it on the target: python {report['bundle']}/verify.py")))
    rows += _notices(report)
    rows.append(("seconds", f"{report['seconds']['total']:.1f}  ({_seconds(report)})"))
    head = _head(report, f"{origin(file)}, {size(file['bytes'])}")
    console.print(Group(head, _grid(rows)))


# ---------------------------------------------------------------------------------------------- migrate


def _outputs(outputs: list[Json]) -> RenderableType:
    table = _table("output", "relative error", "bound", "verdict", right=[1, 2])
    for output in outputs[:ROWS]:
        verdict = _verdict(output["passed"], "same", "DIFFERS")
        if output["passed"] and output["insensitive"]:
            verdict = Text("same, but no evidence: hardly varies between inputs", style="yellow")
        error = "exact" if output["exact"] else small(output["error"])
        table.add_row(escape(output["name"]), error, small(output["bound"]), verdict)
    if len(outputs) > ROWS:
        table.add_row(f"... {len(outputs) - ROWS} more in --json", "", "", "")
    return table


def migrate(report: Json, console: Console) -> None:
    """Verdict first: proven by what, how well, and what was written."""
    proof = report["proof"]
    origin = f"Keras {report['saved_by']}" if report["saved_by"] else "no Keras version recorded"
    rows: list[tuple[str, RenderableType]] = []
    if proof is not None:
        verdict = _verdict(report["proven"], "the same model:", "NOT THE SAME MODEL:")
        what = f" {proof['by']} and the new file in {proof['precision']}, {count(proof['samples'], 'sample')}"
        rows.append(("proof", Group(Text.assemble(verdict, what), _outputs(proof["outputs"]))))
        if proof["why_not_float64"]:
            rows.append(("", escape(f"not in float64; {proof['why_not_float64']}")))
        rows.append(("", escape(f"on {proof['data']}")))
    if report["reason"] is not None:
        rows.append(("" if proof else "NOT PROVEN", Text(report["reason"], style="red")))
    if report["outputs_written"]:
        rows.append(
            ("written", escape(f"{', '.join(report['outputs_written'])}  ({size(report['size_bytes']['after'])})"))
        )
    head = _head(report, f"{origin}, {size(report['size_bytes']['before'])}")
    console.print(Group(head, _grid(rows + _notices(report))))


# -------------------------------------------------------------------------------------------- swap-head


def swap_head(report: Json, console: Console) -> None:
    """What the new model answers and how well; what was trained; what of the body is still the base's."""
    told = [f"{c['name']} {'' if c['samples'] is None else c['samples']}".strip() for c in report["classes"]]
    rows: list[tuple[str, RenderableType]] = []
    table = _table("data", "samples", "accuracy", "loss", right=[1, 2, 3])
    for name, loss in report["loss"].items():
        share = report["accuracy"][name]
        table.add_row(name, f"{report['samples'][name]:,}", "-" if share is None else f"{share:.2%}", f"{loss:.4g}")
    rows.append(("result", table))
    rows.append(("classes", escape(", ".join(told) or f"{report['task']}, {count(len(report['head']), 'layer')}")))
    rows.append(
        ("head", escape(f"{', '.join(report['head'])} on {report['feature_point']}: {report['features']} features"))
    )
    phases = _table("phase", "trained", "parameters", "epochs", "best", "ended by", "seconds", right=[2, 3, 4, 6])
    for phase in report["phases"]:
        best = "as before" if phase["best_epoch"] is None else str(phase["best_epoch"] + 1)
        cells = (phase["phase"], count(len(phase["layers"]), "layer"), f"{phase['parameters']:,}", str(phase["epochs"]))
        phases.add_row(*cells, best, phase["stopped"], f"{phase['seconds']:.1f}")
    rows.append(("training", phases))
    for index, check in enumerate(report["sanity"]):
        word = _verdict(check["passed"], "as expected", "look again")
        line = Text.assemble(f"{check['check']} {check['value']:.3g}, expected {check['expected']}: ", word)
        rows.append(("sanity" if index == 0 else "", line))
    changed = report["body_changed"]
    told_body = "bit for bit that of the base" if not changed else f"{count(len(changed), 'layer')} fine-tuned"
    rows.append(("body", escape(f"{told_body}; {report['body']['layers']} layers of {report['body']['model']}")))
    rows.append(("written", escape(f"{', '.join(report['outputs_written'])}  ({size(report['size_bytes'])})")))


# ------------------------------------------------------------------------------------------- recalibrate


def _shifts(layers: list[Json]) -> RenderableType:
    table = _table("layer", "channels", "shift", "worst", "variance", "worst", "shift after", right=range(1, 7))
    for row in layers if len(layers) <= ROWS else layers[: ROWS - 1]:
        sigmas = [small(row["shift_sigma"]), small(row["worst_shift_sigma"])]
        ratios = [f"x {small(row[key])}" for key in ("variance_ratio", "worst_variance_ratio")]
        after = small(row["after"]["worst_shift_sigma"])
        table.add_row(escape(row["layer"]), f"{row['channels']:,}", *sigmas, *ratios, after)
    if len(layers) > ROWS:
        table.add_row(f"... {len(layers) - ROWS + 1} more in --json", *[""] * 6)
    return table


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def recalibrate(report: Json, console: Console) -> None:
    """Accuracy first, then how far each layer was off, in units of its own sigma."""
    accuracy = report["accuracy"]
    rows: list[tuple[str, RenderableType]] = []
    if accuracy["after"] is None:
        rows.append(("accuracy", escape(f"not measured: {accuracy['reason']}")))
    else:
        losses = " -> ".join(_loss(accuracy[f"loss_{when}"]) for when in ("before", "after"))
        rows.append(
            ("accuracy", f"{100 * accuracy['before']:.2f} % -> {100 * accuracy['after']:.2f} %  (loss {losses})")
        )
        rows.append(("", escape(f"on {count(accuracy['samples'], 'sample')}: {accuracy['data']}")))
    rows.append(("measured", escape(f"{report['method']}, {count(report['samples'], 'sample')}: {report['data']}")))
    passes = "one pass" if report["passes"] == 1 else f"{report['passes']} passes"
    rows.append(("", f"in {passes}, {count(report['batch'], 'sample')} at a time"))
    rows.append(("layers", _shifts(report["layers"])))
    if report["proven"]:
        rows.append(("proven", "measured once more, the new model's statistics are those of what enters its layers"))
    else:
        rows.append(("NOT PROVEN", Text(report["reason"], style="yellow")))
    rows.append(("written", escape(", ".join(report["outputs_written"]))))
    rows += _notices(report)
    rows.append(("seconds", f"{report['seconds']['total']:.1f}  ({_seconds(report)})"))
    console.print(Group(_head(report), _grid(rows)))


# ------------------------------------------------------------------------------------------------ audit


def audit(report: Json, console: Console) -> None:
    heads = ("layer", "class", "trainable", "frozen", *(("against the base",) if report["base"] else ("",)))
    table = _table(*heads, right=[2, 3])
    audit_text.fill(table, report, 2 * ROWS)
    console.print(Group(_head(report), _grid(audit_text.rows(report) + _notices(report)), table))


RENDERERS: Mapping[str, Callable[[Json, Console], None]] = {
    "deploykit.inspect/1": inspect,
    "deploykit.fuse/1": fuse,
    "deploykit.export/1": export,
    "deploykit.check/1": check,
    "deploykit.bench/1": bench,
    "deploykit.deploy/1": deploy,
    "deploykit.migrate/1": migrate,
    "deploykit.swap_head/1": swap_head,
    "deploykit.recalibrate/1": recalibrate,
    "deploykit.audit/1": audit,
    "deploykit.ci/1": ci,
}


def render(report: Json, console: Console) -> None:
    """Show any report."""
    RENDERERS[report["schema"]](report, console)
