"""The command line: parse, one library call, render, exit code.

    0    done and proven
    1    a proof, a check or a gate failed
    2    bad usage, bad input, a missing optional component: exactly one line `error: ...` on stderr
    70   an internal error: one line too, asking for a report
    130  interrupted

TensorFlow is imported inside the commands that need it, after its chatter was silenced: C++ libraries
write to the file descriptors, so these are pointed elsewhere for the whole run and people's output goes
to private copies. With `--json -` stdout carries the report and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from deploykit import __version__
from deploykit.errors import DeploykitError, InputError, ProofError

if TYPE_CHECKING:
    from rich.console import Console

    from deploykit.deploy import Clock, DataOptions
    from deploykit.load import Loaded
    from deploykit.report import Report

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A trained Keras model in, a verified and faster ONNX bundle out.",
    epilog="Exit codes: 0 done and proven, 1 a proof or check failed, 2 bad usage or input, 130 interrupted.",
)

Model = Annotated[
    Path, typer.Argument(help="A trained Keras model: .keras, HDF5, a SavedModel folder or JSON.", show_default=False)
]
Out = Annotated[Path | None, typer.Option("-o", "--output", help="Where to write.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Json = Annotated[str | None, typer.Option("--json", metavar="PATH|-", help="Write the machine report; - is stdout.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Fixes all randomness.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show libraries' own messages and tracebacks.")]
Custom = Annotated[
    list[str] | None,
    typer.Option("--custom-objects", metavar="MODULE[:NAME]", help="Your own layers: module, module:Name or .py file."),
]
Weights = Annotated[Path | None, typer.Option("--weights", help="Fill the model from this weights file.")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Run code that came with the file. Only if you trust it.")
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Real inputs: .npy, .npz, a folder of images or .npz, a Keras data set, or module:function of yours.",
    ),
]
Samples = Annotated[int | None, typer.Option("--samples", min=1, help="Use at most this many samples.")]
ImageSize = Annotated[str | None, typer.Option("--image-size", metavar="HxW", help="Resize images, if sizes are free.")]
Scale = Annotated[float | None, typer.Option("--scale", help="Multiply pixels by this (1/255: 0.00392157).")]
NoLower = Annotated[bool, typer.Option("--no-lower", help="Leave the ONNX graph as tf2onnx writes it.")]
Layout = Annotated[
    Literal["nhwc", "nchw"],
    typer.Option(
        "--layout",
        help="Images of the file; with nchw callers give and get (batch, channels, height, width).",
    ),
]
Precision = Annotated[
    Literal["fp32", "fp16"],
    typer.Option(
        "--precision",
        help="Weights and arithmetic; fp16 is for GPUs. Inputs and outputs keep their dtype.",
    ),
]
Keep = Annotated[list[str] | None, typer.Option("--keep", metavar="LAYER", help="This affine layer must stay.")]
Barrier = Annotated[
    list[str] | None,
    typer.Option("--barrier", metavar="LAYER", help="Nothing may be folded into or across this layer."),
]
Opset = Annotated[int, typer.Option("--opset", min=13, max=18, help="ONNX opset; 18 is what tf2onnx reaches.")]
Batch = Annotated[str, typer.Option("--batch", metavar="dynamic|N", help="Batch size of the exported file.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads per runtime; default: all cores.")]
Seconds = Annotated[float, typer.Option("--seconds", min=0.1, help="Measuring time per candidate.")]
Rtol = Annotated[float | None, typer.Option("--rtol", help="Judge by |c-r| <= atol + rtol*|r| instead of the policy.")]
Atol = Annotated[float | None, typer.Option("--atol", help="See --rtol.")]
PolicyName = Annotated[
    str | None,
    typer.Option("--policy", metavar="float32|float16|bfloat16|int8", help="What to expect of the candidate."),
]
Junit = Annotated[Path | None, typer.Option("--junit", metavar="PATH", help="Write JUnit XML.", show_default=False)]
Markdown = Annotated[
    Path | None,
    typer.Option("--markdown", metavar="PATH", help="Write a pull request's comment.", show_default=False),
]
Html = Annotated[Path | None, typer.Option("--html", metavar="PATH", help="Write a page.", show_default=False)]


# --------------------------------------------------------------------------------------------------- terminal


class _Terminal:
    """Private copies of stdout and stderr, and where libraries' chatter goes meanwhile."""

    def __init__(self, json_target: str | None, quiet: bool, verbose: bool) -> None:
        self.json_target, self.quiet, self.verbose = json_target, quiet, verbose
        self.targets: dict[str, Path] | None = None  # what else is written; None: a verb that CI systems do not ask
        self.out = sys.stdout
        self.err = sys.stderr

    def console(self) -> Console:
        """Where the text report goes: stdout, or stderr when stdout carries the JSON."""
        from rich.console import Console

        stream = self.err if self.json_target == "-" else self.out
        width = None if stream.isatty() else 120
        return Console(file=stream, highlight=False, soft_wrap=False, width=width)

    def progress(self, message: str) -> None:
        if not self.quiet and self.err.isatty():
            self.err.write(f"\r\x1b[K{message} ...")
            self.err.flush()

    def clear(self) -> None:
        if not self.quiet and self.err.isatty():
            self.err.write("\r\x1b[K")
            self.err.flush()


@contextlib.contextmanager
def _reported(terminal: _Terminal, verb: str, model: Path, clock: Clock) -> Iterator[None]:
    """A proof that fails before there is anything to report still leaves a machine report: what failed, and why."""
    try:
        yield
    except ProofError as error:
        if terminal.json_target is not None:
            from deploykit.report import dumps, write_json

            body: dict[str, Any] = {"affines": None, "decisions": [], "params": None} if verb == "fuse" else {}
            record = _report(verb, clock, body, model=str(model), proven=False, reason=str(error)).to_json()
            if terminal.json_target == "-":
                terminal.out.write(dumps(record))
                terminal.out.flush()
            else:
                write_json(record, terminal.json_target, force=True)
        raise


@contextlib.contextmanager
def _terminal(
    json_target: str | None,
    quiet: bool,
    verbose: bool,
    force: bool,
    read: Sequence[Path | str | None],
    written: Mapping[str, Path | None] | None = None,
) -> Iterator[_Terminal]:
    """Silence libraries for one command; give the terminal back whatever happens.

    ``read``, ``written``: what the command reads, and what else it writes, by option; the report may be none of it.
    """
    if json_target is not None and json_target != "-":
        from deploykit.files import apart, claim

        claim(json_target, force=force, inputs=read)
        apart({"--json": json_target, **(written or {})})
    terminal = _Terminal(json_target, quiet, verbose)
    if verbose:
        yield terminal
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    python = sys.stdout, sys.stderr
    terminal.out = os.fdopen(os.dup(saved[0]), "w", encoding="utf-8", errors="replace")
    terminal.err = os.fdopen(os.dup(saved[1]), "w", encoding="utf-8", errors="replace")
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 -- closed below
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield terminal
    finally:
        terminal.clear()
        sys.stdout.close()
        sys.stdout, sys.stderr = python
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for stream in (terminal.out, terminal.err):
            with contextlib.suppress(OSError):
                stream.close()
        for descriptor in (*saved, nowhere):
            os.close(descriptor)


def _finish(terminal: _Terminal, report: Report, *, shown: bool = True) -> None:
    """Write the JSON where it was asked for and show the text; not where all there is to say is one line of error."""
    from deploykit.report import dumps, write_json
    from deploykit.report.text import render

    record = report.to_json()
    terminal.clear()
    if terminal.json_target == "-":
        terminal.out.write(dumps(record))
        terminal.out.flush()
    elif terminal.json_target is not None:
        write_json(record, terminal.json_target, force=True)  # claimed before the work began
    if shown and not terminal.quiet and terminal.json_target != "-":
        render(record, terminal.console())
    if terminal.targets is not None:
        from deploykit.report.delivery import deliver
        from deploykit.report.github import announce

        deliver(record, terminal.targets)
        announce(record, terminal.err if terminal.json_target == "-" else terminal.out)


def _fail_after_report(terminal: _Terminal, report: Report, reason: str) -> NoReturn:
    _finish(terminal, report)
    raise ProofError(reason)


# ------------------------------------------------------------------------------------------------- arguments


def _load(model: Path, custom: Sequence[str] | None, weights: Path | None, allow_code: bool, **options: Any) -> Loaded:
    from deploykit.load import load

    return load(model, custom_objects=tuple(custom or ()), weights=weights, allow_code=allow_code, **options)


def _data(data: str | None, samples: int | None, image_size: str | None, scale: float | None, seed: int) -> DataOptions:
    from deploykit.deploy import DataOptions

    size = None
    if image_size is not None:
        try:
            height, width = (int(part) for part in image_size.lower().split("x"))
        except ValueError:
            raise InputError(f"--image-size {image_size}: give height and width as in 224x224") from None
        size = (height, width)
    return DataOptions(data, samples, size, scale, seed)


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise InputError(f"--batch {text}: give 'dynamic' or a number above 0")


def _numbers(text: str, flag: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise InputError(f"{flag} {text}: give numbers above 0, separated by commas")
    return numbers


def _report(verb: str, clock: Clock, body: dict[str, Any], **fields: Any) -> Report:
    from deploykit.environment import environment
    from deploykit.report import Report

    return Report(verb=verb, version=__version__, body=body, environment=environment(), seconds=clock.total(), **fields)


# -------------------------------------------------------------------------------------------------- commands


def _version(value: bool) -> None:
    if value:
        print(f"deploykit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A trained Keras model in, a verified and faster ONNX bundle out."""


@app.command()
def inspect(
    model: Model,
    custom_objects: Custom = None,
    weights: Weights = None,
    allow_code: AllowCode = False,
    force: Force = False,
    json: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what a model file holds, and its health."""
    with _terminal(json, quiet, verbose, force, [model, weights, *(custom_objects or ())]) as terminal:
        terminal.progress("loading")
        from deploykit.deploy import Clock
        from deploykit.inspection import inspect_body

        clock = Clock()
        loaded = _load(model, custom_objects, weights, allow_code, allow_nonfinite=True)
        clock.lap("load")
        body = inspect_body(loaded)
        _finish(
            terminal,
            _report(
                "inspect",
                clock,
                body,
                model=str(model),
                proven=loaded.opaque is None,
                reason=loaded.opaque,
                notices=loaded.notices,
            ),
        )


@app.command()
def audit(
    model: Model,
    base: Annotated[
        Path | None,
        typer.Option("--base", help="The model it was made from: what changed, layer by layer.", show_default=False),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where a warning or an error is found.")] = False,
    custom_objects: Custom = None,
    weights: Weights = None,
    allow_code: AllowCode = False,
    force: Force = False,
    json: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what is trainable, what changed against a base, how it was trained, and the usual mistakes."""
    with _terminal(json, quiet, verbose, force, [model, weights, base, *(custom_objects or ())]) as terminal:
        terminal.progress("loading")
        from deploykit.deploy import Clock
        from deploykit.report.wording import count
        from deploykit.transfer.audit import audit as run

        clock = Clock()
        loaded = _load(model, custom_objects, weights, allow_code, allow_nonfinite=True)
        origin = None if base is None else _load(base, custom_objects, None, allow_code, allow_nonfinite=True)
        clock.lap("load")
        found = run(loaded, origin)
        clock.lap("audit")
        failed = None
        if strict and found.serious:
            codes = ", ".join(dict.fromkeys(finding.code for finding in found.serious))
            failed = f"{count(len(found.serious), 'finding')} of severity warning or above ({codes}); see the report"
        report = _report(
            "audit",
            clock,
            found.body,
            model=str(model),
            proven=failed is None,
            reason=failed,
            notices=(*loaded.notices, *(() if origin is None else origin.notices), *found.notices),
        )
        if failed is not None:
            _fail_after_report(terminal, report, failed)
        _finish(terminal, report)


@app.command()
def fuse(
    model: Model,
    output: Out = None,
    keep: Keep = None,
    barrier: Barrier = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Decide and prove, write no model.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="PATH",
            help="Draw the model before and after: .svg, .png, .pdf, or .dot.",
            show_default=False,
        ),
    ] = None,
    data: Data = None,
    samples: Samples = None,
    image_size: ImageSize = None,
    scale: Scale = None,
    custom_objects: Custom = None,
    weights: Weights = None,
    allow_code: AllowCode = False,
    seed: Seed = 0,
    force: Force = False,
    json: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fold BatchNormalization and its kin into the neighbours, prove it, write MODEL.fused.keras."""
    read = [model, weights, data, *(custom_objects or ())]
    target = output or model.with_suffix(".fused.keras")
    targets = {"-o": None if dry_run else target, "--plot": plot}
    with _terminal(json, quiet, verbose, force, read, targets) as terminal:
        from deploykit.files import claim
        from deploykit.report.drawing import claim_drawing, dot, draw

        if target.suffix != ".keras":
            raise InputError(f"-o {target}: a fused model is written as .keras; give a name that ends so")
        if not dry_run:
            claim(target, force=force, inputs=read)
        if plot is not None:
            claim_drawing(plot, force=force, inputs=read)
        terminal.progress("loading")
        from deploykit.archive import write_keras
        from deploykit.deploy import Clock, fuse_body, samples_for
        from deploykit.drawing import picture
        from deploykit.fuse import fuse as run
        from deploykit.graph import trace
        from deploykit.inspection import health_of

        clock = Clock()
        loaded = _load(model, custom_objects, weights, allow_code)
        clock.lap("load")
        options = _data(data, samples, image_size, scale, seed)
        inputs = samples_for(loaded.model, options).head(16).arrays if data is not None else None
        terminal.progress("fusing")
        with loaded.scope(), _reported(terminal, "fuse", model, clock):
            fused = run(loaded.model, keep=keep or (), barrier=barrier or (), samples=inputs, seed=seed)
            clock.seconds.update(fused.seconds)
            written = []
            if plot is not None:  # first, so that a drawing that fails leaves no model behind
                start = time.perf_counter()
                sides = picture(trace(loaded.model), fused.decisions, trace(fused.model))
                written.append(str(draw(dot(*sides, title=model.name), plot, force=force)))
                clock.seconds["plot"] = time.perf_counter() - start
            if not dry_run:
                written.append(str(write_keras(fused.model, target, force=force)))
        findings, health = health_of(loaded, trace(loaded.model))
        report = _report(
            "fuse",
            clock,
            fuse_body(fused, findings),
            model=str(model),
            proven=True,
            notices=[*loaded.notices, *fused.notices, *health],
            outputs_written=written,
        )
        _finish(terminal, report)


@app.command()
def migrate(
    old: Annotated[
        Path,
        typer.Argument(help="A model of any Keras: HDF5, .keras, a SavedModel folder, JSON.", show_default=False),
    ],
    output: Out = None,
    unproven: Annotated[
        bool, typer.Option("--unproven", help="Write it even where nothing can be proven; never if it is wrong.")
    ] = False,
    data: Data = None,
    samples: Samples = None,
    image_size: ImageSize = None,
    scale: Scale = None,
    custom_objects: Custom = None,
    weights: Weights = None,
    allow_code: AllowCode = False,
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Accept NaN and Inf in weights.")] = False,
    seed: Seed = 0,
    force: Force = False,
    json: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write an old model as OLD.migrated.keras for Keras 3, proven by the Keras that it was made for."""
    read = [old, weights, data, *(custom_objects or ())]
    target = output or old.with_suffix(".migrated.keras")
    with _terminal(json, quiet, verbose, force, read, {"-o": target}) as terminal:
        from deploykit.files import claim

        claim(target, force=force, inputs=read)
        terminal.progress("loading")
        from deploykit.deploy import Clock
        from deploykit.migrate import Migrated, NotProvenError
        from deploykit.migrate import migrate as run

        clock = Clock()
        loaded = _load(old, custom_objects, weights, allow_code, allow_nonfinite=allow_nonfinite)
        clock.lap("load")
        options = _data(data, samples, image_size, scale, seed)

        def report(found: Migrated) -> Report:
            return _report(
                "migrate",
                clock,
                found.to_json(loaded),
                model=str(old),
                proven=found.proven,
                reason=found.reason,
                notices=[*loaded.notices, *found.notices],
                outputs_written=[str(found.path)] if found.path else [],
            )

        try:
            found = run(
                loaded,
                target,
                weights=weights,
                data=options,
                unproven=unproven,
                force=force,
                progress=terminal.progress,
                clock=clock,
            )
        except NotProvenError as error:
            _fail_after_report(terminal, report(error.found), str(error))
        _finish(terminal, report(found))


@app.command()
def recalibrate(
    model: Model,
    data: Annotated[
        str, typer.Option("--data", help="What the statistics are measured on, training images say; as elsewhere.")
    ],
    output: Out = None,
    method: Annotated[
        Literal["sequential", "joint"],
        typer.Option("--method", help="Layer after layer, exact and proven; or all at once, in one pass."),
    ] = "sequential",
    test: Annotated[
        str | None,
        typer.Option("--test", metavar="DATA", help="Labelled samples for the accuracy; default: those of --data."),
    ] = None,
    samples: Samples = None,
    image_size: ImageSize = None,
    scale: Scale = None,
    custom_objects: Custom = None,
    weights: Weights = None,
    allow_code: AllowCode = False,
    seed: Seed = 0,
    force: Force = False,
    json: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure the statistics of every BatchNormalization anew over a data set, write MODEL.recalibrated.keras."""
    read = [model, weights, data, test, *(custom_objects or ())]
    target = output or model.with_suffix(".recalibrated.keras")
    with _terminal(json, quiet, verbose, force, read, {"-o": target}) as terminal:
        from deploykit.files import claim

        if target.suffix != ".keras":
            raise InputError(f"-o {target}: a recalibrated model is written as .keras; give a name that ends so")
        claim(target, force=force, inputs=read)
        terminal.progress("loading")
        from deploykit.archive import write_keras
        from deploykit.deploy import Clock, samples_for
        from deploykit.transfer.recalibration import recalibrate as run

        clock = Clock()
        loaded = _load(model, custom_objects, weights, allow_code)
        clock.lap("load")
        inputs = samples_for(loaded.model, _data(data, samples, image_size, scale, seed))
        judged = None if test is None else samples_for(loaded.model, _data(test, None, image_size, scale, seed))
        with loaded.scope(), _reported(terminal, "recalibrate", model, clock):
            found = run(loaded.model, inputs, method=method, test=judged, seed=seed, progress=terminal.progress)
            clock.lap("recalibrate")
            written = write_keras(found.model, target, force=force)
        notices = [*loaded.notices, *found.notices]
        if loaded.training_config_found:
            notices.append("the new file holds no training configuration and no optimizer; compile it to train on")
        report = _report(
            "recalibrate",
            clock,
            found.to_json(),
            model=str(model),
            proven=found.proven,
            reason=found.reason,
            notices=notices,
            outputs_written=[str(written)],
        )
        _finish(terminal, report)


@app.command()
def export(
    model: Model,
    output: Out = None,
    no_fuse: Annotated[bool, typer.Option("--no-fuse", help="Export the model as it is.")] = False,
    no_lower: NoLower = False,
    layout: Layout = "nhwc",
    precision: Precision = "fp32",
    opset: Opset = 18,
    batch: Batch = "dynamic",
    keep: Keep = None,
    barrier: Barrier = None,
    data: Data = None,
    samples: Samples = None,
    image_size: ImageSize = None,
    scale: Scale = None,
    custom_objects: Custom = None,
    weights: Weights = None,
    allow_code: AllowCode = False,
    seed: Seed = 0,
    force: Force = False,
    json: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fuse, write MODEL.onnx, and check it against the float64 reference."""
    read = [model, weights, data, *(custom_objects or ())]
    target = output or model.with_suffix(".onnx")
    with _terminal(json, quiet, verbose, force, read, {"-o": target}) as terminal:
        from deploykit.files import claim

        claim(target, force=force, inputs=read)
        size = _batch(batch)
        terminal.progress("loading")
        from deploykit.deploy import REAL, Clock, export_checked, fused_part, samples_for
        from deploykit.report import evidence

        clock = Clock()
        loaded = _load(model, custom_objects, weights, allow_code)
        clock.lap("load")
        options = _data(data, samples, image_size, scale, seed)
        inputs = samples_for(loaded.model, options, REAL)
        with _reported(terminal, "export", model, clock):
            result = export_checked(
                loaded,
                target,
                samples=inputs,
                fusing=not no_fuse and loaded.opaque is None,
                keep=keep or (),
                barrier=barrier or (),
                own_samples=data is not None,
                opset=opset,
                batch=size,
                seed=seed,
                lowering=not no_lower,
                layout=layout,
                precision=precision,
                force=force,
                progress=terminal.progress,
                clock=clock,
            )
        body = {
            "opset": opset,
            "size_bytes": result.exported.bytes,
            "lowered": dict(result.exported.lowered),
            "layout": layout,
            "precision": precision,
            "fuse": fused_part(loaded, result) if loaded.opaque or not no_fuse else None,
            "check": result.check,
        }
        proven, reason = evidence.verdict(result.check)
        report = _report(
            "export",
            clock,
            body,
            model=str(model),
            proven=proven,
            reason=reason,
            notices=result.notices,
            outputs_written=result.written,
        )
        if result.refused is not None:
            _fail_after_report(terminal, report, f"{model}: {result.refused}; nothing was written")
        _finish(terminal, report)


@app.command()
def check(
    context: typer.Context,
    reference: Annotated[Path, typer.Argument(help="The trained model; or a bundle, alone.", show_default=False)],
    candidates: Annotated[
        list[Path] | None, typer.Argument(help="Files or bundles to compare with it.", show_default=False)
    ] = None,
    runtime: Annotated[str | None, typer.Option("--runtime", help="Run every candidate on this runtime.")] = None,
    policy: PolicyName = None,
    rtol: Rtol = None,
    atol: Atol = None,
    data: Data = None,
    samples: Samples = None,
    image_size: ImageSize = None,
    scale: Scale = None,
    custom_objects: Custom = None,
    weights: Weights = None,
    allow_code: AllowCode = False,
    seed: Seed = 0,
    force: Force = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show errors layer by layer, also where all passed.")
    ] = False,
    worst_case: Annotated[
        int, typer.Option("--worst-case", min=0, metavar="N", help="Search the worst input, with N evaluations.")
    ] = 0,
    save_worst: Annotated[
        Path | None, typer.Option("--save-worst", metavar="X.npz", help="Keep that input.", show_default=False)
    ] = None,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Compare input gradients of Keras candidates.")
    ] = False,
    junit: Junit = None,
    markdown: Markdown = None,
    html: Html = None,
    json: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare candidates with the model that was trained, in float64; or a bundle with its golden data."""
    read = [reference, *(candidates or ()), weights, data, *(custom_objects or ())]
    with _terminal(json, quiet, verbose, force, read) as terminal:
        from deploykit.compare import Tolerance, policy_from
        from deploykit.report.delivery import claim_targets

        if save_worst is not None and (save_worst.suffix != ".npz" or not worst_case):
            raise InputError("--save-worst X.npz keeps what --worst-case N finds; give both")
        wanted = {"junit": junit, "markdown": markdown, "html": html}
        others = {"json": json, "save-worst": save_worst}
        terminal.targets = claim_targets(wanted, force=force, inputs=read, others=others)

        law = policy_from(rtol, atol, policy)
        if not candidates:
            _check_bundle(terminal, reference, _options_beside(context, BUNDLE_OPTIONS))
            return
        if gradients and isinstance(law, Tolerance):
            raise InputError("--rtol and --atol speak of outputs, not of gradients; leave them or --gradients out")
        if gradients and not any(_is_keras(candidate, runtime) for candidate in candidates):
            raise InputError("--gradients compares Keras models; give a .keras file as candidate")
        terminal.progress("loading")
        from deploykit.deploy import Clock
        from deploykit.diagnosis import Wishes
        from deploykit.equivalence import equivalence

        clock = Clock()
        loaded = _load(reference, custom_objects, weights, allow_code)
        clock.lap("load")
        found = equivalence(
            loaded,
            candidates,
            data=_data(data, samples, image_size, scale, seed),
            policy=law,
            runtime=runtime,
            wishes=Wishes(layers, worst_case, save_worst, gradients, seed, force),
            progress=terminal.progress,
            clock=clock,
            custom_objects=tuple(custom_objects or ()),
            allow_code=allow_code,
        )
        report = _report(
            "check",
            clock,
            found.body,
            model=str(reference),
            proven=found.proven,
            reason=found.reason,
            notices=found.notices,
            outputs_written=found.written,
        )
        if found.passed:
            _finish(terminal, report)
        elif found.error is not None:
            _finish(terminal, report, shown=False)
            raise found.error
        else:
            _fail_after_report(terminal, report, str(found.reason))


def _is_keras(candidate: Path, runtime: str | None) -> bool:
    from deploykit.runtimes import runtime_for
    from deploykit.verify import MANIFEST

    return (runtime or runtime_for(candidate)) == "keras" and not (candidate / MANIFEST).is_file()


# What `check BUNDLE` heeds: where the report goes. All else is about a comparison with a reference.
BUNDLE_OPTIONS = {"reference", "force", "junit", "markdown", "html", "json", "quiet", "verbose"}


def _options_beside(context: typer.Context, heeded: Collection[str]) -> list[str]:
    """The options that were given on the command line and are not among those."""
    others = (each for each in context.command.params if each.name is not None and each.name not in heeded)
    sources = {each.opts[0]: context.get_parameter_source(each.name) for each in others}
    return [option for option, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def _check_bundle(terminal: _Terminal, folder: Path, unheeded: Sequence[str]) -> None:
    """`check BUNDLE_DIR`: hashes and golden data, without TensorFlow; options about anything else are refused."""
    from deploykit import verify
    from deploykit.report import Report

    if not (folder / verify.MANIFEST).is_file():
        raise InputError(
            f"{folder} is no bundle, and there is no candidate to compare it with; give REFERENCE CANDIDATE or a bundle"
        )
    if unheeded:
        raise InputError(
            f"{', '.join(unheeded)} cannot be used on a bundle alone, which is checked against its golden data on the "
            f"CPU; compare it with its model (check REFERENCE {folder}), or run {folder / 'verify.py'} --provider NAME"
        )
    try:
        record = verify.verify_bundle(folder, seconds=0)
    except verify.RefusedError as error:
        raise InputError(str(error)) from error
    manifest = verify.open_bundle(folder).manifest
    report = Report(
        verb="check",
        version=__version__,
        model=str(folder),
        proven=record["proven"],
        reason=record["reason"],
        body={
            "passed": record["passed"],
            "reference": {"model": (manifest.get("source") or {}).get("name"), "precision": record["reference"]},
            "data": "golden data of the bundle",
            "comparisons": record["comparisons"],
        },
        environment=record["environment"],
        seconds=record["seconds"],
        notices=record["notices"],
    )
    if not record["passed"]:
        _fail_after_report(terminal, report, f"{folder}: {record['reason']}")
    _finish(terminal, report)


@app.command()
def bench(
    models: Annotated[
        list[Path], typer.Argument(help="Keras or .onnx or .tflite files, or bundles; ratios are to the last.")
    ],
    runtime: Annotated[
        list[str] | None,
        typer.Option("--runtime", help="Runtimes to use, such as onnxruntime-cuda; default: by file."),
    ] = None,
    batch: Annotated[str, typer.Option("--batch", metavar="1,8", help="Batch sizes.")] = "1",
    threads: Annotated[
        str | None, typer.Option("--threads", metavar="1,2", help="Thread counts; default: cores.")
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="64,128", help="Sizes to measure, where the model's are open.")
    ] = None,
    seconds: Seconds = 4.0,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", metavar="OLD", help="Measure this beside them, for --max-slowdown.")
    ] = None,
    max_slowdown: Annotated[
        float | None, typer.Option("--max-slowdown", metavar="1.05", help="Fail where time / OLD's time is above.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where --max-slowdown stays undecided, too.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time goes, layer by layer.")] = False,
    tune_session: Annotated[
        bool,
        typer.Option(
            "--tune-session",
            help="Choose ONNX Runtime's session settings for one model by measurement; a bundle keeps them.",
        ),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="X.svg|X.png", help="Draw what was measured.", show_default=False)
    ] = None,
    data: Data = None,
    samples: Samples = None,
    image_size: ImageSize = None,
    scale: Scale = None,
    seed: Seed = 0,
    force: Force = False,
    html: Html = None,
    json: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Time models side by side: own processes, interleaved rounds, ratio with interval and verdict."""
    read = [*models, data, baseline]
    with _terminal(json, quiet, verbose, force, read) as terminal:
        batches = _numbers(batch, "--batch")
        counts = None if threads is None else _numbers(threads, "--threads")
        sizes = () if size is None else _numbers(size, "--size")
        from deploykit.deploy import Clock
        from deploykit.latency import Gate, Settings, latency, tuned
        from deploykit.report.delivery import claim_targets
        from deploykit.report.picture import claim_picture

        if (baseline is None) != (max_slowdown is None):
            raise InputError("a gate needs both --baseline OLD and --max-slowdown RATIO; give the other one, too")
        if strict and baseline is None:
            raise InputError("--strict is about a gate; give --baseline OLD and --max-slowdown RATIO with it")
        if tune_session and (baseline is not None or profile):
            raise InputError("--tune-session goes alone; leave --baseline and --profile out")
        if plot is not None:
            claim_picture(plot, force=force, inputs=read)
        terminal.targets = claim_targets({"html": html}, force=force, inputs=read, others={"json": json, "plot": plot})
        terminal.progress("reading the signature")
        clock = Clock()
        asked: dict[str, Any] = {
            "wanted": tuple(runtime or ()),
            "data": _data(data, samples, image_size, scale, seed),
            "settings": Settings(batches, counts, sizes, seconds, seed),
            "progress": terminal.progress,
            "clock": clock,
        }
        if tune_session:
            found = tuned(models, force=force, **asked)
        else:
            gate = None if baseline is None or max_slowdown is None else Gate(baseline, max_slowdown, strict)
            found = latency(models, gate=gate, profiled=profile, denormals=True, **asked)
        broken = [row for row in found.body["candidates"] if row["failed"] and not tune_session]
        why = f"{broken[0]['name']} did not run: {broken[0]['failed']}" if broken else found.failure
        report = _report(
            "bench",
            clock,
            found.body,
            model=str(models[-1]),
            proven=why is None,
            reason=why,
            notices=found.notices,
            outputs_written=(*found.written, *(() if plot is None else (str(plot),))),
        )
        if plot is not None and len(broken) < len(found.body["candidates"]):
            from deploykit.report.bench_charts import of_bench
            from deploykit.report.picture import write_pictures

            write_pictures(of_bench(found.body), plot, force=force)
        _finish(terminal, report)
        if len(broken) == len(found.body["candidates"]):
            raise InputError(f"no candidate ran: {broken[0]['failed']}")
        if found.failure is not None:
            raise ProofError(found.failure)


@app.command()
def deploy(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The bundle's folder.", show_default=False)],
    opset: Opset = 18,
    batch: Batch = "dynamic",
    keep: Keep = None,
    barrier: Barrier = None,
    data: Data = None,
    samples: Samples = None,
    image_size: ImageSize = None,
    scale: Scale = None,
    class_names: Annotated[
        str | None, typer.Option("--class-names", metavar="A,B,...", help="Stored in the bundle.")
    ] = None,
    no_lower: NoLower = False,
    layout: Layout = "nhwc",
    precision: Precision = "fp32",
    policy: PolicyName = None,
    rtol: Rtol = None,
    atol: Atol = None,
    threads: Threads = None,
    seconds: Seconds = 4.0,
    tune_session: Annotated[
        bool,
        typer.Option("--tune-session", help="Choose ONNX Runtime's session settings, and keep them in the bundle."),
    ] = False,
    custom_objects: Custom = None,
    weights: Weights = None,
    allow_code: AllowCode = False,
    seed: Seed = 0,
    force: Force = False,
    json: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Load, fuse, export, check, time, and write a bundle that proves itself."""
    read = [model, weights, data, *(custom_objects or ())]
    with _terminal(json, quiet, verbose, force, read, {"-o": output}) as terminal:
        from deploykit.compare import policy_from
        from deploykit.files import claim
        from deploykit.verify import MANIFEST

        claim(output, force=force, folder=MANIFEST, inputs=read)
        size = _batch(batch)
        said = (rtol, atol, policy) != (None, None, None)
        law = policy_from(rtol, atol, policy) if said else None  # None: that of --precision
        terminal.progress("loading")
        from deploykit.deploy import Clock
        from deploykit.deploy import deploy as run

        clock = Clock()
        loaded = _load(model, custom_objects, weights, allow_code)
        clock.lap("load")
        try:
            report = run(
                loaded,
                output,
                data=_data(data, samples, image_size, scale, seed),
                keep=keep or (),
                barrier=barrier or (),
                opset=opset,
                batch=size,
                policy=law,
                threads=threads,
                seconds=seconds,
                class_names=class_names.split(",") if class_names else None,
                lowering=not no_lower,
                tune_session=tune_session,
                layout=layout,
                precision=precision,
                force=force,
                progress=terminal.progress,
                clock=clock,
            )
        except ProofError as error:
            found = getattr(error, "report", None)
            if found is not None:
                _finish(terminal, found)
            raise
        _finish(terminal, report)


def _unfreeze(text: str) -> int | None:
    if text in ("all", "none"):
        return None if text == "all" else 0
    if text.isascii() and text.isdigit():
        return int(text)
    raise InputError(f"--unfreeze {text}: give a number of layers, all or none")


def _pairs(given: Sequence[str] | None, flag: str) -> dict[str, Any]:
    """NAME=VALUE, whose values are numbers, or true and false."""
    found: dict[str, Any] = {}
    for text in given or ():
        name, _, value = text.partition("=")
        try:
            found[name] = {"true": True, "false": False}[value.lower()] if value.isalpha() else float(value)
        except (KeyError, ValueError):
            raise InputError(f"{flag} {text}: give NAME=NUMBER, NAME=true or NAME=false") from None
    return found


@app.command("swap-head")
def swap_head(
    base: Annotated[Path, typer.Argument(help="A trained Keras model: its body is kept.", show_default=False)],
    data: Annotated[
        str,
        typer.Option("--data", help="Labelled: a folder per class, .npz with y, CSV of path,label, a Keras data set."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the new model.", show_default=False)],
    test: Annotated[
        str | None, typer.Option("--test", help="Test set, read once at the end; 'same': that half of a data set.")
    ] = None,
    only: Annotated[str | None, typer.Option("--only", metavar="A,B,...", help="Only these classes.")] = None,
    at: Annotated[str | None, typer.Option("--at", metavar="LAYER", help="The head reads this layer.")] = None,
    drop: Annotated[int, typer.Option("--drop", min=0, help="Drop so many upper layers, too.")] = 0,
    hidden: Annotated[str | None, typer.Option("--hidden", metavar="256,128", help="Hidden layers.")] = None,
    dropout: Annotated[float, typer.Option("--dropout", help="In front of the Dense layers.")] = 0.0,
    l1: Annotated[float, typer.Option("--l1", help="Penalty on the head's kernels.")] = 0.0,
    l2: Annotated[float, typer.Option("--l2", help="Penalty on the head's kernels.")] = 0.0,
    pooling: Annotated[
        Literal["auto", "average", "max", "flatten"], typer.Option("--pooling", help="Of features with positions.")
    ] = "auto",
    task: Annotated[
        Literal["auto", "classes", "sigmoid", "multi-label", "regression"],
        typer.Option("--task", help="What is learned; auto goes by the labels."),
    ] = "auto",
    unfreeze: Annotated[
        str, typer.Option("--unfreeze", metavar="N|all|none", help="Layers of the body that phase 2 trains.")
    ] = "all",
    train_norms: Annotated[
        bool, typer.Option("--train-norms", help="BatchNormalization learns and updates its statistics, too.")
    ] = False,
    epochs: Annotated[str | None, typer.Option("--epochs", metavar="A[,B]", help="Of phase 1, of phase 2.")] = None,
    learning_rate: Annotated[
        str | None, typer.Option("--learning-rate", metavar="A[,B]", help="Of phase 1, of phase 2.")
    ] = None,
    batch: Annotated[str | None, typer.Option("--batch", metavar="A[,B]", help="Of phase 1, of phase 2.")] = None,
    optimizer: Annotated[
        str | None, typer.Option("--optimizer", metavar="NAME[>NAME]", help="Any of Keras'; adam>sgd ends with SGD.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="Of the optimizer, as momentum=0.9.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option("--schedule", metavar="NAME", help="constant, cosine, step, exponential, plateau.")
    ] = None,
    warmup: Annotated[float | None, typer.Option("--warmup", help="Share of the steps, 0..1.")] = None,
    patience: Annotated[int | None, typer.Option("--patience", min=1, help="Epochs without progress.")] = None,
    clipnorm: Annotated[float | None, typer.Option("--clipnorm", help="Largest norm of a gradient.")] = None,
    clipvalue: Annotated[float | None, typer.Option("--clipvalue", help="Largest value in a gradient.")] = None,
    rate: Annotated[
        list[str] | None, typer.Option("--rate", metavar="LAYER=FACTOR", help="Of one layer's learning rate.")
    ] = None,
    validation: Annotated[float, typer.Option("--validation", help="Share of the data.")] = 0.2,
    augment: Annotated[
        str | None, typer.Option("--augment", metavar="flip,zoom,...", help="At random, in training only.")
    ] = None,
    views: Annotated[int, typer.Option("--views", min=0, help="Augmented copies that phase 1 sees.")] = 0,
    class_weight: Annotated[
        Literal["auto"] | None, typer.Option("--class-weight", help="Rare classes weigh more.")
    ] = None,
    sanity: Annotated[bool, typer.Option("--sanity/--no-sanity", help="Checks before a long run.")] = True,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read.")] = False,
    cache: Annotated[Path | None, typer.Option("--cache", help="Folder for features.", show_default=False)] = None,
    samples: Samples = None,
    image_size: ImageSize = None,
    scale: Scale = None,
    custom_objects: Custom = None,
    weights: Weights = None,
    allow_code: AllowCode = False,
    seed: Seed = 0,
    force: Force = False,
    json: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Give a trained body a new head and train it for another task."""
    read = [base, weights, data, test, *(custom_objects or ())]
    with _terminal(json, quiet, verbose, force, read, {"-o": output}) as terminal:
        from deploykit.files import claim

        claim(output, force=force, inputs=read)
        where = _data(data, samples, image_size, scale, seed)
        depth, layers = _unfreeze(unfreeze), _numbers(hidden, "--hidden") if hidden else ()
        options, multipliers = _pairs(option, "--option"), _pairs(rate, "--rate")
        terminal.progress("loading")
        from dataclasses import replace

        from deploykit import graph
        from deploykit.data.labelled import open_labelled
        from deploykit.deploy import Clock
        from deploykit.transfer import Recipe, head_for
        from deploykit.transfer.augmentation import augmentation
        from deploykit.transfer.job import Job, swap_and_train

        clock = Clock()
        recipe = Recipe(
            unfreeze=depth,
            train_norms=train_norms,
            validation=validation,
            augment=tuple(augment.split(",")) if augment else (),
            views=views,
            class_weight=class_weight,
            sanity=sanity,
            seed=seed,
        )
        said = {
            "optimizer": optimizer,
            "schedule": schedule,
            "warmup": warmup,
            "patience": patience,
            "clipnorm": clipnorm,
            "clipvalue": clipvalue,
            "options": options or None,
            "multipliers": multipliers or None,
        }
        settings: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
        phases = []
        for number, phase in enumerate((recipe.head, recipe.tune)):
            assert phase is not None
            for text, name in ((epochs, "epochs"), (learning_rate, "learning_rate"), (batch, "batch")):
                phase = phase if text is None else phase.with_(text, number, name)
            phases.append(replace(phase, **settings))
        recipe = replace(recipe, head=phases[0], tune=phases[1])

        loaded = _load(base, custom_objects, weights, allow_code)
        clock.lap("load")
        signature = graph.signature(loaded.model)
        wanted = "classes" if task == "sigmoid" else task
        common: dict[str, Any] = {"image_size": where.image_size, "scale": scale, "skip_bad": skip_bad, "seed": seed}
        kept = only.split(",") if only else ()
        given = open_labelled(data, signature, task=wanted, only=kept, limit=samples, **common)
        tested = None
        if test is not None:
            tested = open_labelled(
                data if test == "same" else test,
                signature,
                task=given.task,
                only=kept,
                half="test",
                classes=() if kept else given.classes,
                **common,
            )
        job = Job(
            head=head_for(
                given,
                **({"task": "sigmoid"} if task == "sigmoid" else {}),
                hidden=layers,
                dropout=dropout,
                l1=l1,
                l2=l2,
                pooling=pooling,
            ),
            recipe=recipe,
            data=given,
            test=tested,
            at=at,
            drop=drop,
            augmentation=augmentation(recipe.augment, signature, seed),
            folder=cache,
        )
        clock.lap("data")
        with loaded.scope():
            report = swap_and_train(loaded, output, job, force=force, seconds=clock.total(), progress=terminal.progress)
        _finish(terminal, report)


@app.command()
def ci(
    config: Annotated[Path, typer.Option("--config", help="The file that holds \\[tool.deploykit].")] = Path(
        "pyproject.toml"
    ),
    force: Force = False,
    junit: Junit = None,
    markdown: Markdown = None,
    html: Html = None,
    json: Json = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run everything that \\[tool.deploykit] asks for: checks, latency gates, bundles; one report."""
    with _terminal(json, quiet, verbose, force, [config]) as terminal:
        from deploykit.ci import read_config
        from deploykit.ci import run as run_all
        from deploykit.report.delivery import claim_targets

        asked = read_config(config)
        wanted = {"junit": junit, "markdown": markdown, "html": html}
        terminal.targets = claim_targets(wanted, force=force, inputs=asked.inputs, others={"json": json})
        finished = run_all(asked, progress=terminal.progress)
        _finish(terminal, finished.report)
        if finished.error is not None:
            raise finished.error


# ---------------------------------------------------------------------------------------------------- errors

INTERRUPTED = 130  # 128 + SIGINT
_NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
_NO_WAY = {errno.ENAMETOOLONG, errno.EACCES}  # what asking whether a file is there may end in


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: native code turns it into exceptions of its own."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt) or "KeyboardInterrupt" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _exit_code(error: BaseException) -> tuple[int, str]:
    """Exit code and message of whatever ended a command."""
    if isinstance(error, DeploykitError):
        return error.exit_code, str(error)
    if isinstance(error, typer.TyperException):
        return 2, error.format_message()
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return 2, f"cannot write: {(error.strerror or 'no room').lower()}; free some space or choose another -o"
    if isinstance(error, OSError) and error.errno in _NO_WAY:
        place = os.fspath(error.filename or "a file")
        return 2, f"cannot reach {place!s:.60} ({(error.strerror or 'no way').lower()}); check the path"
    if isinstance(error, MemoryError):
        return 2, "out of memory; give fewer --samples or use a machine with more"
    return 70, f"internal error, please report it: {type(error).__name__}: {error}"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        code = app(args=arguments, standalone_mode=False, prog_name="deploykit")
        if code == INTERRUPTED:  # typer has caught it
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader has gone; do not complain again at exit
        sys.exit(0)
    except Exception as error:
        if _interrupted(error):
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        code, message = _exit_code(error)
        if "--verbose" in arguments or "-v" in arguments:
            traceback.print_exc()
        print(f"error: {_one_line(message)}", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    main()
