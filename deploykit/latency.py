"""One benchmark from files to report: inputs that fit, candidates, timing, profile, gate.

`deploykit.bench` times and compares; here is what the command and `deploykit ci` share around it. All models of a run
get the same inputs, so their signatures must agree with the first one's; a model that refuses them is a row that says
so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit import gates, runtimes, verify
from deploykit.bench import SETTABLE, BenchReport, Timing, bench
from deploykit.bench import Candidate as Timed
from deploykit.check import candidate_for
from deploykit.data import Samples, read_samples, synthesize
from deploykit.deploy import REAL, SYNTHETIC, Clock, DataOptions, Progress, silent
from deploykit.errors import InputError
from deploykit.export.precision import FP16, POLICY, PROPERTY
from deploykit.profiling import profile
from deploykit.runtimes import trained
from deploykit.runtimes.files import stated
from deploykit.runtimes.process import require_gpu
from deploykit.signature import Signature
from deploykit.tuning import refuse_profiled, save, tune

PROFILED = "onnxruntime-cpu"


@dataclass(frozen=True)
class Settings:
    """What to measure: every combination of batch, threads and size. ``sizes`` are numbers for the open sizes."""

    batches: tuple[int, ...] = (1,)
    threads: tuple[int, ...] | None = None
    sizes: tuple[int, ...] = ()
    seconds: float = 4.0
    seed: int = 0


@dataclass(frozen=True)
class Gate:
    """A baseline, and how much slower than it the others may be."""

    baseline: Path
    max_slowdown: float
    strict: bool = False


@dataclass(frozen=True)
class Measured:
    """The keys of ``deploykit.bench/1``, and the gates where there are any."""

    body: dict[str, Any]
    notices: tuple[str, ...]
    report: BenchReport
    gates: tuple[gates.Gate, ...] = ()
    written: tuple[str, ...] = ()

    @property
    def failure(self) -> str | None:
        """Why a gate fails, or None."""
        failed = [gate for gate in self.gates if gate.outcome == "failed"]
        return f"{failed[0].candidate} against {failed[0].baseline}: {failed[0].reason}" if failed else None


def latency(
    models: Sequence[Path],
    *,
    wanted: Sequence[str] = (),
    data: DataOptions | None = None,
    settings: Settings | None = None,
    gate: Gate | None = None,
    profiled: bool = False,
    denormals: bool = False,
    progress: Progress = silent,
    clock: Clock | None = None,
) -> Measured:
    """Time models on the runtimes ``wanted`` (or on the one that follows from each file), side by side.

    ``gate``: its baseline is measured beside the others, as the last one. ``profiled``: profile what runs on ONNX
    Runtime's CPU kernels, in every setting. Raises InputError for a request that makes no sense.
    """
    data, settings, clock = data or DataOptions(), settings or Settings(), clock or Clock()
    paths = [*models, gate.baseline] if gate else list(models)
    chosen = candidates(paths, wanted)
    if profiled and not any(candidate.runtime == PROFILED for candidate in chosen):
        raise InputError(f"--profile sees into {PROFILED} alone; give an .onnx file or a bundle")
    if profiled and (half := [each.name for each in chosen if stated(each.model).get(PROPERTY) == POLICY[FP16]]):
        raise InputError(f"--profile cannot follow float16 on a CPU, which computes in float32; leave {half[0]} out")
    for runtime in dict.fromkeys(candidate.runtime for candidate in chosen):
        if runtimes.known(runtime).gpu:
            progress(f"looking for what {runtime} needs")
            require_gpu(runtime)
    inputs, notices = given(models[0], data, settings.sizes)
    notices += [line for path in paths for line in _unused(path)]
    clock.lap("load")
    report = bench(
        chosen,
        [samples.arrays for samples in inputs],
        batches=settings.batches,
        threads=settings.threads,
        seconds=settings.seconds,
        seed=settings.seed,
        focus=chosen[-1].name if gate else None,
        limit=gate.max_slowdown if gate else None,
        denormals=denormals,
        progress=lambda at: progress(f"{at.candidate}: {at.phase}, round {at.rounds} of {at.limit}"),
    )
    clock.lap("bench")
    body = report.to_json()
    notices += body.pop("notices")
    notices += [_on_device(timing) for timing in report.timings if timing.beside_s]
    if profiled:
        progress("profiling")
        body["profiles"] = _profiles(chosen, inputs, settings)
        clock.lap("profile")
    held = gates.gate(report, chosen[-1].name, gate.max_slowdown, strict=gate.strict) if gate else ()
    if gate:
        body["gates"] = [each.to_json() for each in held]
    notices += [f"{each.candidate}: {each.reason}" for each in held if each.outcome == "undecided"]
    return Measured(body, tuple(notices), report, held)


def _on_device(timing: Timing) -> str:
    there, back, whole = (timing.beside_ms[name] for name in ("to_device", "from_device", "end_to_end"))
    return (
        f"{timing.candidate.name} at batch {timing.batch}: timed with inputs and outputs on the device; transfers take"
        f" {there:.3g} ms to it and {back:.3g} ms from it, the whole from arrays to arrays {whole:.3g} ms"
    )


def tuned(
    models: Sequence[Path],
    *,
    wanted: Sequence[str] = (),
    data: DataOptions | None = None,
    settings: Settings | None = None,
    force: bool = False,
    progress: Progress = silent,
    clock: Clock | None = None,
) -> Measured:
    """Choose session settings for one ONNX file or bundle by measurement (`deploykit.tuning`); a bundle keeps them.

    The body is that of the first run, with what was found under ``session``. Raises InputError for a request that makes
    no sense, and OutputError where a bundle has a profile already and ``force`` is not set.
    """
    data, settings, clock = data or DataOptions(), settings or Settings(), clock or Clock()
    asked = {"model": models, "runtime": wanted, "batch size": settings.batches, "size": settings.sizes}
    if many := [what for what, values in asked.items() if len(values) > 1]:
        raise InputError(f"--tune-session is about one {many[0]}, not {len(asked[many[0]])}; give one")
    (candidate,) = candidates(models, wanted)
    if candidate.runtime != SETTABLE:
        raise InputError(
            f"--tune-session sets up {SETTABLE}, and {models[0]} would run on {candidate.runtime}; give an .onnx file "
            "or a bundle"
        )
    bundle = verify.open_bundle(models[0]) if (models[0] / verify.MANIFEST).is_file() else None
    if bundle is not None:
        refuse_profiled(bundle, force=force)
    (inputs,), notices = given(models[0], data, settings.sizes)
    clock.lap("load")
    found = tune(
        Path(candidate.model),
        inputs.arrays,
        bundle=bundle,
        batch=settings.batches[0],
        threads=settings.threads,
        seconds=settings.seconds,
        seed=settings.seed,
        progress=progress,
    )
    clock.lap("tune")
    body = found.first.to_json()
    notices += body.pop("notices")
    written = (str(models[0] / verify.MANIFEST),) if bundle is not None and save(bundle, found.profile, notices) else ()
    return Measured({**body, "session": found.to_json()}, tuple(notices), found.first, written=written)


def _profiles(chosen: Sequence[Timed], inputs: Sequence[Samples], settings: Settings) -> list[dict[str, Any]]:
    return [
        profile(candidate.model, samples.arrays, batch=batch, threads=threads).to_json()
        for candidate in chosen
        if candidate.runtime == PROFILED
        for samples in inputs
        for threads in settings.threads or (None,)
        for batch in settings.batches
    ]


def given(model: Path, data: DataOptions, sizes: Sequence[int] = ()) -> tuple[list[Samples], list[str]]:
    """Inputs that fit a model, read from the file's own signature: one set for each of ``sizes``; and notices."""
    signature = _signature(model)
    if sizes and (data.data is not None or not any(None in spec.shape[1:] for spec in signature.inputs)):
        why = "--data has a size of its own" if data.data is not None else f"{model} has no open sizes"
        raise InputError(f"--size makes inputs of several sizes, but {why}; leave one of them out")
    if data.data is None:
        made = (
            synthesize(signature, count=data.limit or SYNTHETIC, seed=data.seed, free=free) for free in sizes or (None,)
        )
        return list(made), ["timed on synthetic inputs"]
    found = read_samples(
        data.data, signature, limit=data.limit or REAL, seed=data.seed, image_size=data.image_size, scale=data.scale
    )
    return [found], []


def _signature(model: Path) -> Signature:
    candidate = candidate_for(model)
    session = trained.open(candidate.runtime, candidate.model)
    try:
        return session.signature
    finally:
        session.close()


def _unused(model: Path) -> list[str]:
    """That a bundle's session profile is not applied here: what is compared is compared in one setting."""
    found = verify.open_bundle(model).profile if (model / verify.MANIFEST).is_file() else None
    return (
        [] if found is None else [f"{model} has a session profile ({found.settings.text}), which bench does not apply"]
    )


def candidates(models: Sequence[Path], wanted: Sequence[str]) -> list[Timed]:
    """Every model on every runtime named, or on the one that follows from the file."""
    rows = []
    for model in models:
        for runtime in wanted or (None,):
            candidate = candidate_for(model, runtime)
            name = str(model) if not wanted else f"{model} on {runtime}"
            rows.append(Timed(name, Path(candidate.model), candidate.runtime))
    return rows
