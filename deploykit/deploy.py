"""The main job: a trained Keras model in, a verified and timed ONNX bundle out.

    load -> fuse (with its proof) -> export -> check against float64 -> bench beside what runs today -> bundle

The bundle appears whole, under its name, only when every step before it succeeded and the check passed; a
failed proof raises ProofError, which carries the report of what was found, and leaves nothing behind.
`fuse_step` and `check_step` are the same steps that the single verbs take.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import deploykit
from deploykit import bundle as bundles
from deploykit import layout as layouts
from deploykit import recommendation, verify
from deploykit.archive import write_keras
from deploykit.bench import PROCESSES, BenchReport, bench
from deploykit.bench import Candidate as Timed
from deploykit.check import Candidate, Reference, body, check, make_reference
from deploykit.compare import Law, policy_from
from deploykit.data import Samples, Stream, open_samples, refuse_unheeded, synthesize
from deploykit.environment import environment
from deploykit.errors import DataError, DeploykitError, ProofError
from deploykit.export import ALL_LOWERINGS, Exported, export, export_stock
from deploykit.export import precision as narrowing
from deploykit.files import claim, whole_folder
from deploykit.fuse import Fused, fuse
from deploykit.graph import signature as signature_of
from deploykit.graph import trace
from deploykit.inspection import health_of, signature_json, source_json
from deploykit.load import Loaded
from deploykit.opaque import graph_of, operations
from deploykit.report import Report, dumps, evidence
from deploykit.report.html import page
from deploykit.report.markdown import model_card
from deploykit.signature import Signature, TensorSpec
from deploykit.tuning import tune_bundle

Progress = Callable[[str], None]
SYNTHETIC = 64  # samples of a check without data
OURS = "deploykit"  # the candidate that a deployment is about
PLAIN, LOWERED = "deploykit, not lowered", "deploykit, lowered"  # the other file, if lowering changed anything
LAYOUT_SAID = {layouts.NHWC: "the axes of the Keras model, batch first", layouts.NCHW: layouts.SAID}  # in manifests
REAL = 256  # samples of a deployment with data, unless the user says otherwise


def silent(message: str) -> None:
    """The progress callback of a caller who wants none."""


@dataclass(frozen=True)
class DataOptions:
    """Where samples come from; the same words as on the command line."""

    data: str | None = None
    limit: int | None = None
    image_size: tuple[int, int] | None = None
    scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises DataError for an option that only data could heed where there are none."""
        if self.data is None:
            refuse_unheeded("samples made without --data", (), image_size=self.image_size, scale=self.scale)


@dataclass
class Clock:
    """Seconds per phase, in order."""

    seconds: dict[str, float] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)
    last: float = field(default_factory=time.perf_counter)

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now

    def total(self) -> dict[str, float]:
        return {**self.seconds, "total": time.perf_counter() - self.start}


def samples_for(model: Any, options: DataOptions, most: int | None = None) -> Samples | Stream:
    """The user's samples, or seeded synthetic ones with edge cases; ``most``: unless the options have a limit."""
    signature = signature_of(model)
    if options.data is None:
        return synthesize(signature, count=SYNTHETIC if options.limit is None else options.limit, seed=options.seed)
    return open_samples(
        options.data,
        signature,
        limit=most if options.limit is None else options.limit,
        seed=options.seed,
        image_size=options.image_size,
        scale=options.scale,
    )


def fuse_body(fused: Fused, findings: Sequence[Mapping[str, str]] = ()) -> dict[str, Any]:
    """The keys of ``deploykit.fuse/1``; ``findings``: what there is to say about the model's health."""
    kinds: dict[str, dict[str, int]] = {}
    outcomes = ("fused", "reduced", "kept")
    for decision in fused.decisions:
        row = kinds.setdefault(decision.kind, {"total": 0, **dict.fromkeys(outcomes, 0)})
        row["total"] += 1
        row[decision.outcome] += 1
    proof = fused.proof
    return {
        "affines": {
            "total": len(fused.decisions),
            **{outcome: fused.count(outcome) for outcome in outcomes},
            "by_kind": kinds,
        },
        "decisions": [
            {
                "layer": d.layer,
                "kind": d.kind,
                "outcome": d.outcome,
                "direction": d.direction,
                "into": list(d.into),
                "through": list(d.through),
                "code": d.code,
                "reason": d.reason,
            }
            for d in fused.decisions
        ],
        "params": {"before": fused.params_before, "after": fused.params_after},
        "renamed": dict(fused.renamed),
        "exactness_f64": proof.exactness_f64 if proof else None,
        "exactness_bound": proof.exactness_bound if proof else None,
        "exactness_stored": proof.exactness_stored if proof else None,
        "noise_f64": proof.noise_f64 if proof else None,
        "float32": {"original": proof.float32_original, "fused": proof.float32_fused} if proof else None,
        "insensitive": list(proof.insensitive) if proof else [],
        "proof_samples": proof.samples if proof else 0,
        "findings": list(findings),
    }


def fused_part(loaded: Loaded, made: Checked) -> dict[str, Any]:
    """The keys of ``deploykit.fuse/1`` within another report.

    A model without layers has ``folding`` there: the operations of its graph, and those that are left in the file.
    """
    if made.fused is not None:
        return fuse_body(made.fused, made.findings)
    graph = graph_of(loaded.model)
    assert graph is not None
    parameters = loaded.model.count_params()
    return {
        "affines": {"total": 0, "fused": 0, "reduced": 0, "kept": 0, "by_kind": {}},
        "decisions": [],
        "params": {"before": parameters, "after": parameters},
        "exactness_f64": None,
        "exactness_bound": None,
        "exactness_stored": None,
        "reason": "a TensorFlow graph has no layers to fold; what is constant in it was folded",
        "folding": {"before": operations(graph.definition).total(), "after": made.exported.operations},
    }


def metadata(loaded: Loaded, fused: Fused | None) -> dict[str, str]:
    """The ``metadata_props`` record of an exported file."""
    record = {
        "deploykit.version": deploykit.__version__,
        "deploykit.source_sha256": loaded.sha256,
        "deploykit.source_name": loaded.path.name,
    }
    if fused is not None:
        decisions = [[d.layer, d.kind, d.outcome, d.direction, list(d.into), d.code] for d in fused.decisions]
        record["deploykit.decisions"] = json.dumps(decisions, separators=(",", ":"))
    return record


@dataclass(frozen=True)
class Spare:
    """The same file without lowering, where that differs and passed: its path, and the body of its check."""

    path: Path
    check: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Checked:
    """A file that was exported and compared: everything that was made on the way.

    ``reference`` is the one the file was judged by (whole batches only, where its batch size is fixed);
    ``check`` the body of the check report.
    """

    fused: Fused | None
    exported: Exported
    reference: Reference
    check: dict[str, Any]
    notices: list[str]
    written: list[str]
    findings: list[dict[str, str]]  # about the health of the model fused
    spare: Spare | None = None

    @property
    def refused(self) -> str | None:
        """Why nothing may be written, or None."""
        return evidence.refusal(self.check)


def export_checked(
    loaded: Loaded,
    path: str | Path,
    *,
    samples: Samples | Stream,
    fusing: bool = True,
    keep: Collection[str] = (),
    barrier: Collection[str] = (),
    own_samples: bool = True,
    opset: int = 18,
    batch: int | None = None,
    policy: Law | None = None,
    seed: int = 0,
    lowering: bool = True,
    layout: str = layouts.NHWC,
    precision: str = narrowing.FP32,
    spare: Path | None = None,
    force: bool = False,
    progress: Progress = silent,
    clock: Clock | None = None,
) -> Checked:
    """Fuse, export and compare; ``path`` exists afterwards only when the comparison passed and is evidence.

    ``layout`` and ``precision`` are those of `deploykit.export`. Where no ``policy`` is given the file is judged by
    that of its precision, and the fused Keras model, which is float32 in any case, by that of float32.

    ``own_samples``: the samples are the user's and serve the proof of the fusing, too. A lowered file is compared
    beside the one without lowering: where it alone does not pass, the other is written. ``spare``: where to keep that
    other one.
    """
    path = claim(path, force=force, inputs=(loaded.path,))
    common_policy = policy or policy_from()
    policy = policy or policy_from(default=narrowing.POLICY[narrowing.known(precision)])
    clock = clock or Clock()
    model, fused = loaded.model, None
    notices = list(loaded.notices)
    findings: list[dict[str, str]] = []
    if fusing:
        progress("fusing")
        inputs = samples.head(16).arrays if own_samples else None
        with loaded.scope():
            fused = fuse(model, keep=keep, barrier=barrier, samples=inputs, seed=seed)
        model = fused.model
        findings, lines = health_of(loaded, trace(loaded.model))
        notices += [*fused.notices, *lines]
        clock.lap("fuse")
    existing = path.absolute().parent
    while not existing.is_dir():
        existing = existing.parent
    with tempfile.TemporaryDirectory(prefix=".deploykit-", dir=existing) as room:
        progress("exporting to ONNX")
        folder, plain = Path(room) / "file", Path(room) / "plain"
        folder.mkdir()
        plain.mkdir()
        exported = export(
            model,
            folder / path.name,
            opset=opset,
            batch=batch,
            metadata=metadata(loaded, fused),
            without=() if lowering else ALL_LOWERINGS,
            unlowered=plain / path.name,
            layout=layout,
            precision=precision,
        )
        clock.lap("export")
        progress("checking against the float64 reference")
        with loaded.scope():
            reference = make_reference(str(loaded.path), loaded.model, samples)
        shipped = with_batch(reference, batch)
        files = [exported.path] if exported.unlowered is None else [exported.path, exported.unlowered]
        ours = [Candidate(path.name, file, "onnxruntime-cpu") for file in files]
        keras_one = [] if fused is None else [Candidate("fused Keras model", fused.model, "keras")]
        if batch is None and common_policy == policy:
            comparisons = check(reference, [*keras_one, *ours], policy, progress=progress)
        else:
            common_ones = check(reference, keras_one, common_policy)
            comparisons = (*common_ones, *check(shipped, ours, policy, progress=progress))
        common, judged = comparisons[: len(keras_one)], comparisons[len(keras_one) :]
        found, *others = (body(shipped, (*common, comparison), policy) for comparison in judged)
        other = None
        if others and exported.unlowered is not None and evidence.refusal(others[0]) is None:
            other = Spare(exported.unlowered, others[0])
        if other is not None and evidence.refusal(found) is not None:
            notices.append(f"without lowering, because the lowered file would not pass: {evidence.worst(found)}")
            exported, found, folder, other = unlowered(exported), other.check, plain, None
        if other is not None and spare is not None:
            other = replace(other, path=Path(shutil.copyfile(other.path, spare)))
        clock.lap("check")
        written = []
        if evidence.refusal(found) is None:
            path.absolute().parent.mkdir(parents=True, exist_ok=True)
            for file in folder.iterdir():
                claim(path.with_name(file.name), force=force)
            for file in sorted(folder.iterdir(), reverse=True):  # the data first, then the file that names it
                os.replace(file, path.with_name(file.name))
                written.append(str(path.with_name(file.name)))
            exported = replace(exported, path=path)
    notices += [*exported.notices, *reference.notices, *evidence.excluded(found)]
    return Checked(
        fused,
        exported,
        shipped,
        found,
        list(dict.fromkeys(notices)),
        written,
        findings,
        other if spare is not None else None,
    )


def unlowered(exported: Exported) -> Exported:
    """The record of the file without lowering, in place of the lowered one."""
    assert exported.unlowered is not None
    size = exported.unlowered.stat().st_size
    return replace(exported, path=exported.unlowered, bytes=size, lowered={}, unlowered=None)


def deploy(
    loaded: Loaded,
    out: str | Path,
    *,
    data: DataOptions | None = None,
    keep: Collection[str] = (),
    barrier: Collection[str] = (),
    opset: int = 18,
    batch: int | None = None,
    policy: Law | None = None,
    threads: int | None = None,
    seconds: float = 4.0,
    class_names: Sequence[str] | None = None,
    lowering: bool = True,
    layout: str = layouts.NHWC,
    precision: str = narrowing.FP32,
    processes: int = PROCESSES,
    tune_session: bool = False,
    force: bool = False,
    progress: Progress = silent,
    clock: Clock | None = None,
) -> Report:
    """Make the bundle ``out`` from a loaded model; returns the ``deploykit.deploy/1`` report.

    A lowered file that turns out slower than the same without ``lowering`` is not shipped; the other one is. ``layout``
    and ``precision`` are those of `deploykit.export`; without a ``policy`` a float16 file is judged by that of float16.
    ``tune_session``: its session settings are chosen by measurement (`deploykit.tuning`), as a last step,
    and no other runtime is tried, because that would have to be compared with the tuned one.
    ``batch`` fixes the batch size of the file; None leaves it free. ``threads``, ``seconds`` (per candidate) and
    ``processes`` are those of `deploykit.bench`. Raises ProofError, with the report so far in its ``report`` attribute,
    when the result is not equivalent, and OutputError when ``out`` cannot be written.
    """
    data, clock = data or DataOptions(), clock or Clock()
    out = claim(out, force=force, folder=verify.MANIFEST, inputs=(loaded.path, data.data))
    samples = samples_for(loaded.model, data, REAL)
    with tempfile.TemporaryDirectory(prefix="deploykit-") as name:
        room = Path(name)
        made = export_checked(
            loaded,
            room / "model.onnx",
            samples=samples,
            fusing=loaded.opaque is None,
            keep=keep,
            barrier=barrier,
            own_samples=data.data is not None,
            opset=opset,
            batch=batch,
            policy=policy,
            seed=data.seed,
            lowering=lowering,
            layout=layout,
            precision=precision,
            spare=room / "plain.onnx",
            progress=progress,
            clock=clock,
        )
        if made.refused is not None:
            report = _report(loaded, made, {}, {"bundle": None}, clock, ())
            raise failed(f"{loaded.path}: {made.refused}; nothing was written", report)
        law = policy or policy_from(default=narrowing.POLICY[precision])
        trials = () if tune_session else recommendation.tried(made.exported.path, made.reference, law)
        clock.lap("check")
        timed = _timed(loaded, made, room, samples, opset, trials)
        clock.lap("export")
        progress("measuring latency")
        measured = bench(
            timed,
            samples.head(REAL).arrays,
            batches=(batch or 1,),
            threads=threads,
            seconds=seconds,
            seed=data.seed,
            processes=processes,
            focus=OURS,
        )
        clock.lap("bench")
        shipped, measured = _faster(made, measured)
        best = recommendation.recommended(measured, OURS, trials if shipped is made else ())
        if precision == narrowing.FP16:
            shipped.notices.append(_half_here(measured, batch or 1))
        with whole_folder(out, mark=verify.MANIFEST, force=force) as folder:
            report = _fill(folder, out, loaded, shipped, measured.to_json(), best, clock, class_names)
            if tune_session:
                counts, arrays = None if threads is None else (threads,), samples.head(REAL).arrays
                found = tune_bundle(
                    folder,
                    arrays,
                    batch=batch or 1,
                    threads=counts,
                    seconds=seconds,
                    seed=data.seed,
                    processes=processes,
                    progress=progress,
                )
                clock.lap("tune")
                report = replace(report, body={**report.body, "session": found.to_json()}, seconds=clock.total())
            return report


def failed(message: str, report: Report) -> ProofError:
    """A ProofError that carries the report of what was found."""
    error = ProofError(message)
    error.report = report  # type: ignore[attr-defined]
    return error


def with_batch(reference: Reference, batch: int | None) -> Reference:
    """The reference for a file whose batch size was fixed on purpose: whole batches only."""
    if batch is None:
        return reference

    def fixed(spec: TensorSpec) -> TensorSpec:
        return replace(spec, shape=(batch, *spec.shape[1:]))

    count = reference.samples.count // batch * batch
    if not count:
        raise DataError(f"{reference.samples.count} samples make no batch of {batch}; give more samples")
    return replace(
        reference,
        signature=Signature(
            tuple(map(fixed, reference.signature.inputs)), tuple(map(fixed, reference.signature.outputs))
        ),
        samples=reference.samples.head(count),
        outputs={name: array[:count] for name, array in reference.outputs.items()},
        original={name: array[:count] for name, array in reference.original.items()},
        others=(),
    )


def _timed(
    loaded: Loaded,
    made: Checked,
    room: Path,
    samples: Samples | Stream,
    opset: int,
    trials: Sequence[recommendation.Trial],
) -> list[Timed]:
    """What is timed side by side: what the user runs today, and ours last. Written into ``room``."""
    rows = []
    if made.fused is None:
        rows.append(Timed("TensorFlow graph", loaded.path, "keras"))
    else:
        for name, model in (("Keras", loaded.model), ("fused Keras", made.fused.model)):
            file = write_keras(model, room / f"{name.replace(' ', '-')}.keras")
            rows.append(Timed(f"{name} (tf.function)", file, "keras", options=loaded.options))
    try:
        stock = export_stock(loaded.model, room / "stock.onnx", samples.head(2).arrays, opset=opset)
        rows.append(Timed(f"{stock.kind} export", stock.path, "onnxruntime-cpu"))
    except DeploykitError as error:
        made.notices.append(f"no stock export to compare with: {error}")
    if made.spare is not None:
        rows.append(Timed(PLAIN, made.spare.path, "onnxruntime-cpu"))
    rows += [trial.timed(made.exported.path) for trial in trials if trial.reason is None]
    return [*rows, Timed(OURS, made.exported.path, "onnxruntime-cpu")]


def _faster(made: Checked, measured: BenchReport) -> tuple[Checked, BenchReport]:
    """The file to ship, and the measurement under its names: the lowered one, unless it is slower than the other."""
    if made.spare is None:
        return made, measured
    (batch,) = {timing.batch for timing in measured.timings}
    pair = measured.comparison(OURS, PLAIN, batch)
    if pair.verdict != "slower" or pair.ratio is None:
        return made, measured
    made.notices.append(f"without lowering, which made it {pair.ratio.ratio:.2f}x as slow on this machine")
    exported = unlowered(replace(made.exported, unlowered=made.spare.path))
    return replace(made, exported=exported, check=made.spare.check, spare=None), measured.renamed(
        {OURS: LOWERED, PLAIN: OURS}, last=OURS
    )


def _half_here(measured: BenchReport, batch: int) -> str:
    """What float16 did on this CPU: the times of the file over those of the others."""
    others = dict.fromkeys(
        timing.candidate.name
        for timing in measured.timings
        if not timing.candidate.name.startswith(OURS)  # those compute in float16, too
    )
    pairs = [measured.comparison(OURS, name, batch) for name in others]
    said = [f"{pair.ratio.ratio:.2f}x that of {pair.b}" for pair in pairs if pair.ratio and pair.ratio.ratio]
    here = f"its time was {', '.join(said)}" if said else "nothing could be measured beside it"
    return f"float16 is meant for GPUs; on this CPU {here}"


def _report(
    loaded: Loaded,
    made: Checked,
    bench_body: Mapping[str, Any],
    more: Mapping[str, Any],
    clock: Clock,
    written: Sequence[str],
) -> Report:
    proven, reason = evidence.verdict(made.check)
    return Report(
        verb="deploy",
        version=deploykit.__version__,
        model=str(loaded.path),
        proven=proven,
        reason=reason,
        body={
            "source": source_json(loaded),
            "layout": made.exported.layout,
            "precision": made.exported.precision,
            "fuse": fused_part(loaded, made),
            "check": made.check,
            "bench": dict(bench_body),
            **more,
        },
        environment=environment(),
        seconds=clock.total(),
        notices=list(dict.fromkeys(made.notices)),
        outputs_written=written,
    )


def _fill(
    folder: Path,
    out: Path,
    loaded: Loaded,
    made: Checked,
    bench_body: Mapping[str, Any],
    best: Mapping[str, Any],
    clock: Clock,
    class_names: Sequence[str] | None,
) -> Report:
    """Write everything into the bundle's folder, the manifest last."""
    exported, signature = made.exported, made.reference.signature
    if exported.layout == layouts.NCHW:
        signature = layouts.permuted(signature, layouts.TO_NCHW)
    for file in sorted(exported.path.parent.glob(f"{exported.path.name}*")):
        shutil.copyfile(file, folder / file.name.replace(exported.path.name, "model.onnx", 1))
    golden = bundles.write_golden(folder, made.reference, exported.layout)
    clock.lap("bundle")
    models = sorted(folder.glob("model.onnx*"))
    names = [*(file.name for file in models), "deploykit.json", "verify.py", "report.json", "report.html", "README.md"]
    more = {
        "bundle": str(out),
        "opset": exported.opset,
        "lowered": dict(exported.lowered),
        "signature": signature_json(signature),
        "files": [{"name": file.name, "bytes": file.stat().st_size} for file in models],
        "oldest_onnxruntime": bundles.OLDEST_RUNTIME.get(exported.opset),
        "recommended": dict(best),
    }
    written = [str(out / name) for name in (*names, *(entry["folder"] for entry in golden))]
    report = _report(loaded, made, bench_body, more, clock, written)
    record = report.to_json()
    (folder / "report.json").write_text(dumps(record), encoding="utf-8")
    (folder / "report.html").write_text(page(record), encoding="utf-8")
    (folder / "README.md").write_text(model_card(record), encoding="utf-8")
    about = loaded.about or {}
    known = about.get("classes")
    if not class_names and isinstance(known, list) and all(isinstance(name, str) for name in known):
        class_names = known
    judged = made.check["comparisons"][-1]
    kinds = {decision["kind"] for decision in record["fuse"]["decisions"]}
    inside = kinds & {"Rescaling", "Normalization"}
    manifest = {
        "schema": verify.BUNDLE_SCHEMA,
        "deploykit": deploykit.__version__,
        "model": "model.onnx",
        "source": {"name": loaded.path.name, "sha256": loaded.sha256, "saved_by": loaded.saved_by},
        "signature": more["signature"],
        "preprocessing": f"inside the model: {', '.join(sorted(inside))}" if inside else "none inside the model",
        "layout": LAYOUT_SAID[exported.layout],
        "image_axes": exported.layout.upper(),
        "class_names": list(class_names) if class_names else None,
        "training": {key: about[key] for key in ("task", "recipe", "accuracy") if key in about} or None,
        "accuracy": None
        if judged["accuracy"] is None
        else {
            "data": made.check["data"],
            "keras": made.check["reference_accuracy"],
            "onnx": judged["accuracy"],
        },
        "policy": made.check["policy"],
        "golden": golden,
        "decisions": record["fuse"]["decisions"],
        "opset": exported.opset,
        "oldest_onnxruntime": more["oldest_onnxruntime"],
        "recommended": best["runtime"],
        "versions": record["environment"].get("packages"),
    }
    bundles.seal(folder, manifest)
    return report
