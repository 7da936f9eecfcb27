"""How fast: stock export, Keras' own serving, OpenVINO and LiteRT beside deploykit's file; makes docs/performance.md.

    python benchmarks/latency.py [--only MODEL ...] [--seconds 3] [--minutes 40] [--store build/latency.json]
        [--check] [--out docs/performance.md]

The nets are those of keras.applications in `NETS`, as `coverage.py` makes them (random weights, calibrated statistics,
no download), at their native sizes, and without their softmax, which would hide errors. The trained models are those of
`false_alarms.files()`. Each goes through what `deploykit deploy` does (fuse, export, check), in a process of its own,
which also writes the stock export (`deploykit.export.export_stock`), a .tflite file of the unfused model, and judges
all of them by `deploykit check`'s law. Timed are then, by `deploykit.bench`, with t the latency:

    stock      t(stock) / t(ours)                            fresh processes until the interval is one over processes
    beside     t(Keras, OpenVINO, LiteRT) / t(ours)          one process each: the interval is widened by its luck
    profile    shares of ours by kind of operator            where stock is less than `GAIN` slower, or another one wins

A ratio above 1 means that ours is faster. Means over models are geometric: the ratio of two means is the mean of the
ratios, and no model counts more because it is slower.

Every cell is kept in ``--store`` as soon as it is finished, with the environment that it was measured in, and the files
in a folder beside it. A cell is measured again when a file that it timed, a package, or ``--seconds`` has changed;
files are made again when the code that makes them has. No cell is started that would not end within ``--minutes``, by
estimate: then nothing is written, and the same command goes on. What fails stands in the document with the reason, and
is tried again. With ``--only`` the tables are printed and not written. Exit code 1 where something failed or is left,
and, with ``--check``, where a required figure is missed or was not measured.

Limits. LiteRT's file has a fixed batch of 1, as is customary; the others' is free. `deploy`
also times the file without lowering and may ship that one; here it is always the lowered one, if it passed.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from coverage import table  # noqa: E402  # after the path is set
from false_alarms import files  # noqa: E402

Row = dict[str, Any]
OURS, STOCK, KERAS, OPENVINO, LITERT = "ours", "stock", "keras", "openvino", "litert"
# Runtime and file of every candidate; bench and check call it by this name.
CANDIDATES: Mapping[str, tuple[str, str]] = {
    OURS: ("onnxruntime-cpu", "ours.onnx"),
    STOCK: ("onnxruntime-cpu", "stock.onnx"),
    KERAS: ("keras", "keras.keras"),
    OPENVINO: ("openvino", "ours.onnx"),
    LITERT: ("litert", "litert.tflite"),
}
RIVALS = (OPENVINO, LITERT)
SAMPLES, TIMED = 8, 4  # that the files are checked on; that are timed, before the edge cases begin
GAIN = 1.05  # where stock is less than this many times slower, the profile says why
BLAMED = 3  # kinds of operators that a row names
MAKE_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Net:
    """A net of keras.applications: its native size, and about how long ours takes, for the estimate alone."""

    size: int
    about_ms: float
    batches: tuple[int, ...] = (1,)


NETS: Mapping[str, Net] = {
    "MobileNetV2": Net(224, 6, (1, 8)),
    "MobileNetV3Small": Net(224, 3, (1, 8)),
    "ResNet50": Net(224, 40, (1, 8)),
    "ResNet50V2": Net(224, 38),
    "DenseNet121": Net(224, 40, (1, 8)),
    "EfficientNetB0": Net(224, 11, (1, 8)),
    "EfficientNetV2B0": Net(224, 14),
    "Xception": Net(299, 70),
    "InceptionV3": Net(299, 48),
    "NASNetMobile": Net(224, 20),
}
TRAINED = Net(0, 2)
MLP = "mlp_"  # how the names of the multilayer perceptrons in models/ begin

# What must be reached: by a geometric mean, by single nets at batch 1, and by the upper end of every net's interval.
REQUIRED_MEAN, REQUIRED_KERAS, REQUIRED_MLP = 1.08, 2.2, 8.0
REQUIRED: Mapping[str, float] = {"DenseNet121": 1.15, "EfficientNetB0": 1.10}
NEVER_BELOW = 0.97


# ------------------------------------------------------------------------------------------------------ the store


@dataclass
class Store:
    """Finished cells in a JSON file that is replaced after each; ``errors`` are of this run and tried again."""

    path: Path
    cells: dict[str, Row] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    @classmethod
    def at(cls, path: Path) -> Store:
        return cls(path, json.loads(path.read_text("utf-8")) if path.exists() else {})

    def folder(self, model: str) -> Path:
        """Where a model's files are."""
        return self.path.with_suffix("") / model

    def add(self, key: str, cell: Row) -> None:
        from deploykit.files import whole_file
        from deploykit.report import dumps, strict

        self.cells[key] = cell
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path, force=True) as part:
            part.write_text(dumps(strict(self.cells)), "utf-8")

    def made(self, model: str) -> Row | None:
        """The record of a model's files, if they are there and what made them is what would make them now."""
        cell = self.cells.get(f"{model} files")
        if cell is None or cell["maker"] != maker():
            return None
        here = all(self.file(model, cell, name).exists() for name in cell["sha256"])
        return cell if here and (self.folder(model) / "inputs.npz").exists() else None

    def file(self, model: str, made: Row, name: str) -> Path:
        return Path(made["elsewhere"].get(name, self.folder(model) / CANDIDATES[name][1]))

    def finished(self, job: Job, made: Row) -> Row | None:
        """A cell that is still about these files and packages."""
        cell = self.cells.get(job.key)
        same = cell is not None and cell["sha256"] == job.hashes(made) and _packages(cell) == _packages(made)
        return cell if same else None


def _packages(cell: Row) -> Row:
    found: Row = cell["environment"]["packages"]
    return found


@functools.cache
def maker() -> str:
    """A hash of what the exported files depend on: the code that makes them, and its packages."""
    from deploykit.environment import environment

    parts = ("affine.py", "channels.py", "graph.py", "opaque.py", "load", "fuse", "export")
    found = hashlib.sha256(json.dumps(environment()["packages"], sort_keys=True).encode())
    for part in parts:
        path = ROOT / "deploykit" / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found.update(file.read_bytes())
    return found.hexdigest()


# -------------------------------------------------------------------------------- the files, in a process of their own


def make(name: str, folder: Path) -> Row:
    """Write all files of a model into ``folder``, and judge them; ``absent`` says why one is missing."""
    import numpy as np

    from deploykit.check import Candidate, check
    from deploykit.compare import policy_from
    from deploykit.data import synthesize
    from deploykit.deploy import Clock, export_checked, with_batch
    from deploykit.errors import DeploykitError
    from deploykit.export import export_stock
    from deploykit.files import sha256
    from deploykit.graph import signature
    from deploykit.load import load

    clock = Clock()
    folder.mkdir(parents=True, exist_ok=True)
    source = _source(name, folder)
    clock.lap("build")
    loaded = load(source, allow_code=True)
    samples = synthesize(signature(loaded.model), count=SAMPLES)
    clock.lap("load")
    np.savez(folder / "inputs.npz", **samples.head(TIMED).arrays)  # type: ignore[arg-type]  # a name is never allow_pickle's
    paths = {key: folder / file for key, (_, file) in CANDIDATES.items()}
    made = export_checked(
        loaded, paths[OURS], samples=samples, fusing=loaded.opaque is None, own_samples=False, force=True, clock=clock
    )
    if made.refused is not None:
        raise DeploykitError(f"not equivalent: {made.refused}")
    stock: str | None = None
    absent: dict[str, str] = {}
    elsewhere: dict[str, str] = {}
    try:
        stock = export_stock(loaded.model, paths[STOCK], samples.head(2).arrays, force=True).kind
    except DeploykitError as error:
        absent[STOCK] = str(error)
    clock.lap("stock")
    try:
        paths[LITERT].write_bytes(tflite(loaded.model))
    except Exception as error:  # whatever TensorFlow's converter raises
        absent[LITERT] = f"not convertible: {_line(error)}"
    clock.lap("tflite")
    kept = _keras_file(loaded, paths[KERAS])
    if kept != paths[KERAS]:
        elsewhere[KERAS] = str(kept.absolute())
    reference, policy = made.reference, policy_from()
    checks: dict[str, Row] = {OURS: {"passed": True, "reason": None}}
    for key in (STOCK, *RIVALS):
        if key not in absent:
            judge = with_batch(reference, 1) if key == LITERT else reference
            try:
                (found,) = check(judge, [Candidate(key, paths[key], CANDIDATES[key][0])], policy)
                why = found.reason or next((f"{o.name}: {o.reason}" for o in found.outputs if not o.passed), None)
                checks[key] = {"passed": found.passed, "reason": why}
            except DeploykitError as error:
                absent[key] = str(error)
    clock.lap("judge")
    present = [key for key in CANDIDATES if key not in absent]
    return {
        "sha256": {key: sha256(elsewhere.get(key, paths[key])) for key in present if not _is_folder(elsewhere, key)},
        "elsewhere": elsewhere,
        "options": dict(loaded.options),
        "absent": absent,
        "stock": stock,
        "checks": checks,
        "lowered": {key: count for key, count in made.exported.lowered.items() if count},
        "notices": made.notices,
        "seconds": clock.total(),
    }


def _is_folder(elsewhere: Mapping[str, str], key: str) -> bool:
    return key in elsewhere and Path(elsewhere[key]).is_dir()


def _line(error: BaseException) -> str:
    """The first line that says something, not too long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]


def _source(name: str, folder: Path) -> Path:
    """The Keras file of a model; a net is built once, because its calibration is not the same in every bit."""
    if name not in NETS:
        return files()[name]
    path = folder / "keras.keras"
    if not path.exists():
        import keras
        from coverage import build

        from deploykit.archive import write_keras

        model = build(name, NETS[name].size)
        model.layers[-1].activation = keras.activations.linear
        write_keras(model, path)
    return path


def _keras_file(loaded: Any, path: Path) -> Path:
    """What Keras' tf.function is loaded from, by today's Keras: the file itself where that cannot be saved anew."""
    from deploykit.archive import write_keras
    from deploykit.errors import DeploykitError

    if loaded.path == path:
        return path
    if loaded.opaque is not None:
        return Path(loaded.path)
    try:
        return write_keras(loaded.model, path, force=True)
    except DeploykitError:
        return Path(loaded.path)


def tflite(model: Any) -> bytes:
    """TensorFlow's converter with its defaults: float32, a batch of one, the model's own names as signature."""
    import tensorflow as tf

    from deploykit.graph import signature
    from deploykit.runtimes.files import silenced

    stated = signature(model)
    specs = [tf.TensorSpec((1, *spec.shape[1:]), spec.dtype, name=spec.name) for spec in stated.inputs]

    @tf.function(input_signature=specs, autograph=False)
    def call(*tensors: Any) -> dict[str, Any]:
        outputs = model(list(tensors) if len(tensors) > 1 else tensors[0], training=False)
        return dict(zip((spec.name for spec in stated.outputs), tf.nest.flatten(outputs), strict=True))

    held = tf.Module()
    held.variables_ = [variable.value for variable in model.variables]
    with silenced():
        converter = tf.lite.TFLiteConverter.from_concrete_functions([call.get_concrete_function()], held)
        content: bytes = converter.convert()
    return content


def made_fresh(name: str, store: Store) -> Row:
    """The same in a process of its own. Raises RuntimeError with one line where there is no file of ours."""
    command = [sys.executable, __file__, "--one", name, "--store", str(store.path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=MAKE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no files within {MAKE_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return dict(json.loads(done.stdout.splitlines()[-1]))


# ------------------------------------------------------------------------------------------------------- the cells


@dataclass(frozen=True)
class Job:
    """One cell to be measured: ``what`` is "stock", "beside" or "profile"."""

    model: str
    what: str
    batch: int
    seconds: float

    @property
    def key(self) -> str:
        return f"{self.model} {self.what} {self.batch} {self.seconds:g}"

    def candidates(self, made: Row) -> list[str]:
        """Who is timed, ours last."""
        wanted = {"stock": (STOCK, OURS), "beside": (KERAS, *RIVALS, OURS), "profile": (OURS,)}[self.what]
        return [name for name in wanted if name not in made["absent"]]

    def hashes(self, made: Row) -> dict[str, str]:
        return {name: made["sha256"][name] for name in self.candidates(made) if name in made["sha256"]}

    def estimate_s(self) -> float:
        """About how long it takes."""
        ms = NETS.get(self.model, TRAINED).about_ms * self.batch
        if self.what == "profile":
            return 3 + self.seconds + 30 * ms / 1e3
        if self.what == "stock":
            return 2 * bench_s(0.7, ms, self.seconds)
        return sum(
            bench_s(start, slower * ms, self.seconds, 1) for start, slower in ((10, 3), (1.5, 1), (0.7, 1), (0.7, 1))
        )


def bench_s(start_s: float, ms: float, seconds: float, processes: int | None = None) -> float:
    """About how long `deploykit.bench` takes for a candidate whose process starts in so many seconds."""
    from deploykit.bench import BLOCK_RUNS, BLOCK_S, FIRST, LATER, PROCESSES
    from deploykit.runtimes.worker import WARM_LIMIT_S, WINDOW_RUNS

    warm = min(2 * WINDOW_RUNS * ms / 1e3, WARM_LIMIT_S) + ms / 1e3
    block = max(BLOCK_S, BLOCK_RUNS[0] * ms / 1e3) + ms / 1e3
    stages = [FIRST] + [LATER] * ((PROCESSES if processes is None else processes) - 1)
    rounds = (min(max(stage.least * block, stage.share * seconds), stage.most * block) for stage in stages)
    return len(stages) * (start_s + warm) + sum(rounds)


def make_s(model: str) -> float:
    """About how long it takes to make a model's files."""
    return 45 + 0.8 * NETS[model].about_ms if model in NETS else 20


def measure(job: Job, made: Row, store: Store) -> Row:
    """One cell. Raises DeploykitError where it cannot be measured at all."""
    import numpy as np

    from deploykit.environment import environment

    with np.load(store.folder(job.model) / "inputs.npz") as stored:
        inputs = dict(stored)
    begin = time.perf_counter()
    found = profiled(job, made, store, inputs) if job.what == "profile" else timed(job, made, store, inputs)
    return {
        **found,
        "sha256": job.hashes(made),
        "environment": environment(),
        "seconds": time.perf_counter() - begin,
    }


def timed(job: Job, made: Row, store: Store, inputs: Mapping[str, Any]) -> Row:
    from deploykit.bench import PROCESSES, Candidate, bench
    from deploykit.errors import DeploykitError

    names = job.candidates(made)
    candidates = [
        Candidate(
            name,
            store.file(job.model, made, name),
            CANDIDATES[name][0],
            options=made["options"] if name == KERAS and KERAS in made["elsewhere"] else {},
        )
        for name in names
    ]
    processes = PROCESSES if job.what == "stock" else 1
    report = bench(candidates, inputs, batches=[job.batch], seconds=job.seconds, processes=processes, focus=OURS)
    ours = report.timing(OURS)
    if ours.failed is not None:
        raise DeploykitError(f"ours did not run: {ours.failed}")
    latencies = {timing.candidate.name: timing.latency for timing in report.timings}
    return {
        "ratios": {name: report.comparison(name, OURS).to_json() for name in names if name != OURS},
        "ms": {name: latency.median for name, latency in latencies.items() if latency is not None},
        "failed": {timing.candidate.name: timing.failed for timing in report.timings if timing.failed is not None},
        "threads": ours.threads,
        "warnings": [warning.to_json() for warning in report.warnings],
    }


def profiled(job: Job, made: Row, store: Store, inputs: Mapping[str, Any]) -> Row:
    from deploykit.profiling import profile

    found = profile(store.file(job.model, made, OURS), inputs, batch=job.batch, seconds=job.seconds).to_json()
    kept = ("kind", "share", "lost_ms", "of_limit")
    return {
        "of_limit": found["of_limit"],
        "time_ms": found["time_ms"],
        "overhead": found["overhead"],
        "kinds": [{key: row[key] for key in kept} for row in found["kinds"]],
        "notices": found["notices"],
    }


# ------------------------------------------------------------------------------------------------------ the run


@dataclass
class Model:
    """What is known of a model: the record of its files, and its cells by what and batch."""

    name: str
    made: Row | None = None
    cells: dict[tuple[str, int], Row] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        return self.name not in NETS

    def ratio(self, name: str, batch: int = 1) -> Row | None:
        """The comparison of a candidate with ours, if it has a ratio."""
        cell = self.cells.get(("stock" if name == STOCK else "beside", batch), {})
        row: Row | None = cell.get("ratios", {}).get(name)
        return row if row is not None and row["ratio"] is not None else None

    def winners(self) -> list[str]:
        """The other runtimes that were faster, whether or not beyond doubt."""
        rows = ((name, self.ratio(name)) for name in RIVALS)
        return [name for name, row in rows if row is not None and row["ratio"] < 1]

    def passed(self, name: str) -> bool:
        return self.made is not None and bool(self.made["checks"].get(name, {}).get("passed"))


def jobs(model: Model, seconds: float) -> Iterator[Job]:
    """What there is to measure of a model; profiles come last, where the cells filled meanwhile ask for one."""
    batches = NETS.get(model.name, TRAINED).batches
    for batch in batches:
        yield Job(model.name, "stock", batch, seconds)
    yield Job(model.name, "beside", 1, seconds)
    for batch in batches:
        row = model.ratio(STOCK, batch)
        if (row is not None and row["ratio"] < GAIN) or (batch == 1 and model.winners()):
            yield Job(model.name, "profile", batch, seconds)


def estimate_s(names: Iterable[str], store: Store, seconds: float) -> float:
    """About how long what is missing takes; of profiles, one for each model."""
    total = 0.0
    for name in names:
        made = store.made(name)
        total += make_s(name) if made is None else 0
        wanted = [*jobs(Model(name), seconds), Job(name, "profile", 1, seconds)]
        total += sum(job.estimate_s() for job in wanted if made is None or store.finished(job, made) is None)
    return total


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(names: Sequence[str], store: Store, seconds: float, deadline: float) -> tuple[list[Model], list[str]]:
    """All models, with what was finished before or is now; and what is left, because it would not end in time."""
    from deploykit.environment import environment
    from deploykit.errors import DeploykitError

    models, left = [Model(name) for name in names], list[str]()
    for model in models:
        model.made = store.made(model.name)
        if model.made is None:
            if time.perf_counter() + make_s(model.name) > deadline:
                left.append(model.name)
                continue
            begin = time.perf_counter()
            try:
                made = made_fresh(model.name, store)
            except RuntimeError as error:
                store.errors[model.name] = str(error)
                say(f"{model.name}: {error}")
                continue
            model.made = {**made, "maker": maker(), "environment": environment()}
            store.add(f"{model.name} files", model.made)
            say(f"{model.name}: files made in {time.perf_counter() - begin:.0f} s (about {make_s(model.name):.0f})")
        for job in jobs(model, seconds):
            cell = store.finished(job, model.made)
            if cell is None and time.perf_counter() + job.estimate_s() > deadline:
                left.append(job.key)
                continue
            if cell is None and not (job.what != "profile" and len(job.candidates(model.made)) < 2):
                try:
                    cell = measure(job, model.made, store)
                except DeploykitError as error:
                    store.errors[job.key] = str(error)
                    say(f"{job.key}: {error}")
                    continue
                store.add(job.key, cell)
                say(f"{job.key}: {cell['seconds']:.0f} s (about {job.estimate_s():.0f})")
            if cell is not None:
                model.cells[job.what, job.batch] = cell
    return models, left


# ------------------------------------------------------------------------------------------------------- judging


def geometric_mean(ratios: Sequence[float]) -> float | None:
    """exp of the mean of the logs; None of nothing."""
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios)) if ratios else None


def ratios(models: Iterable[Model], name: str, batches: Sequence[int] = (1,)) -> list[float]:
    found = (model.ratio(name, batch) for model in models for batch in batches)
    return [row["ratio"] for row in found if row is not None]


def missed(models: Sequence[Model]) -> Iterator[str]:
    """The figures that were to be reached and were not; what was not measured is missed, too."""
    by_name = {model.name: model for model in models}
    nets = [by_name.get(name, Model(name)) for name in NETS]
    mlps = [model for model in models if model.name.startswith(MLP)]
    for net in nets:
        for batch in NETS[net.name].batches:
            row = net.ratio(STOCK, batch)
            if row is None:
                yield f"{net.name} at batch {batch} beside stock: not measured"
            elif row["ci95"] is None or row["ci95"][1] < NEVER_BELOW:
                yield f"{net.name} at batch {batch}: the interval {_interval(row)} lies below {NEVER_BELOW}"
        if net.ratio(KERAS) is None:
            yield f"{net.name} beside Keras' tf.function: not measured"
    for name, least in REQUIRED.items():
        row = by_name.get(name, Model(name)).ratio(STOCK)
        if row is not None and row["ratio"] < least:
            yield f"{name} beside stock: {row['ratio']:.3f}, required {least}"
    if not mlps:
        yield "perceptrons of models/: not measured"
    for what, found, least in (
        ("stock, batch 1", ratios(nets, STOCK), REQUIRED_MEAN),
        ("stock, batches 1 and 8", ratios(nets, STOCK, (1, 8)), REQUIRED_MEAN),
        ("Keras' tf.function", ratios(nets, KERAS), REQUIRED_KERAS),
        ("Keras' tf.function, perceptrons", ratios(mlps, KERAS), REQUIRED_MLP),
    ):
        mean = geometric_mean(found)
        if mean is not None and mean < least:
            yield f"geometric mean beside {what}: {mean:.3f}, required {least}"


# ------------------------------------------------------------------------------------------------------ rendering

PROSE = """Latency of others over latency of deploykit's file: above 1, ours is faster. `deploykit bench` measured it,
each candidate in processes of its own, in turns; intervals are of 95 %, and a verdict is said only where the whole
interval lies on one side of 1 ([latency.md](latency.md)). Milliseconds are shown and belong to the machine named here.
Nets have random, calibrated weights, their native sizes, and no softmax. Every file was judged by `deploykit check`'s
law on {samples} synthetic samples; the speed of one that **fails check** says nothing about a right one."""


def _interval(row: Row) -> str:
    return "-" if row["ci95"] is None else f"{row['ci95'][0]:.2f} - {row['ci95'][1]:.2f}"


def _shown(row: Row | None) -> str:
    return "-" if row is None else f"{row['ratio']:.2f} [{_interval(row)}]"


def _mean(found: Sequence[float]) -> str:
    mean = geometric_mean(found)
    return "-" if mean is None else f"**{mean:.2f}** of {len(found)}"


def _ms(cell: Row, name: str) -> str:
    return f"{cell['ms'][name]:.3g}" if name in cell.get("ms", {}) else "-"


class Places:
    """A letter for every environment that cells were measured in."""

    def __init__(self, models: Iterable[Model]) -> None:
        self.known: list[Row] = []
        for model in models:
            for cell in model.cells.values():
                if cell["environment"] not in self.known:
                    self.known.append(cell["environment"])

    def letter(self, cell: Row) -> str:
        return chr(ord("A") + self.known.index(cell["environment"]))

    def rows(self) -> list[list[str]]:
        return [
            [
                chr(ord("A") + place),
                f"{found['cpu']}, {found['physical_cores']} cores of {found['cores']} processors",
                f"{found['platform']}, Python {found['python']}",
                ", ".join(f"{name} {version}" for name, version in found["packages"].items()),
            ]
            for place, found in enumerate(self.known)
        ]


def _stock_file(model: Model) -> str:
    """Which kind of stock export it was, and whether it is right."""
    made = model.made or {}
    if STOCK in made.get("absent", {}):
        return "none"
    kind = str(made.get("stock"))
    return kind if model.passed(STOCK) else f"{kind}; **fails check**"


def stock_table(models: Sequence[Model], places: Places) -> str:
    rows = []
    for model in models:
        for batch in NETS.get(model.name, TRAINED).batches:
            cell, row = model.cells.get(("stock", batch)), model.ratio(STOCK, batch)
            if cell is not None and row is not None:
                times = [_ms(cell, STOCK), _ms(cell, OURS)]
                found = [f"{row['ratio']:.3f}", _interval(row), row["verdict"]]
                rows.append([model.name, batch, *found, *times, _stock_file(model), places.letter(cell)])
    headings = ["model", "batch", "stock / ours", "95 %", "stock is", "stock, ms", "ours, ms", "stock file", "on"]
    return table(headings, rows)


def wrong_files(models: Sequence[Model]) -> str:
    """What `check` says against files, and which files there are not."""
    lines = []
    for model in models:
        made = model.made or {"checks": {}, "absent": {}}
        lines += [
            f"- {model.name}, {name}: fails `deploykit check` ({str(found['reason']).partition(';')[0]})"
            for name, found in made["checks"].items()
            if not found["passed"]
        ]
        lines += [f"- {model.name}, {name}: none ({why})" for name, why in made["absent"].items()]
        for cell in model.cells.values():
            lines += [f"- {model.name}, {name}: did not run ({why})" for name, why in cell.get("failed", {}).items()]
    return "\n".join(dict.fromkeys(lines))


def keras_table(models: Sequence[Model], places: Places) -> str:
    rows = []
    for model in models:
        cell, row = model.cells.get(("beside", 1)), model.ratio(KERAS)
        if cell is not None and row is not None:
            times = [_ms(cell, KERAS), _ms(cell, OURS)]
            rows.append([model.name, f"{row['ratio']:.2f}", _interval(row), *times, places.letter(cell)])
    return table(["model", "Keras / ours", "95 %", "Keras, ms", "ours, ms", "on"], rows)


def fastest(model: Model) -> str:
    """The runtime with the smallest latency among those that passed; ratios that are not beyond doubt count as well."""
    found = {OURS: 1.0}
    for name in RIVALS:
        row = model.ratio(name)
        if row is not None and model.passed(name):
            found[name] = row["ratio"]
    name = min(found, key=lambda key: found[key])
    return "ONNX Runtime" if name == OURS else {OPENVINO: "OpenVINO", LITERT: "LiteRT"}[name]


def rivals_table(models: Sequence[Model], places: Places) -> str:
    rows = []
    for model in models:
        cell = model.cells.get(("beside", 1))
        if cell is not None:
            shown = [
                _shown(model.ratio(name))
                + ("" if model.passed(name) or model.ratio(name) is None else ", **fails check**")
                for name in RIVALS
            ]
            rows.append([model.name, *shown, fastest(model), places.letter(cell)])
    return table(["model", "OpenVINO / ours", "LiteRT / ours", "fastest that passed", "on"], rows)


def blamed_table(models: Sequence[Model], places: Places) -> str:
    """For every model where another runtime wins, the kinds of operators that lose most in ours."""
    rows = []
    for model in models:
        cell, winners = model.cells.get(("profile", 1)), model.winners()
        if cell is not None and winners:
            lost = sorted(cell["kinds"], key=lambda kind: -kind["lost_ms"])[:BLAMED]
            reasons = [
                f"{kind['kind']} {kind['lost_ms']:.3g} ms of {kind['share'] * cell['time_ms']:.3g}"
                for kind in lost
                if kind["lost_ms"] > 0
            ]
            wins = ", ".join(f"{name} {_shown(model.ratio(name))}" for name in winners)
            rows.append([model.name, wins, "; ".join(reasons), f"{cell['of_limit']:.0%}", places.letter(cell)])
    headings = ["model", "faster", "lost by ours", "limit / time of ours", "on"]
    return table(headings, rows) if rows else "None."


def convolution_share(cell: Row) -> float:
    return sum(float(kind["share"]) for kind in cell["kinds"] if kind["kind"] == "convolution")


def left_table(models: Sequence[Model], places: Places) -> str:
    """For every model with less than `GAIN`, what is left."""
    rows = []
    for model in models:
        for batch in NETS.get(model.name, TRAINED).batches:
            cell, row = model.cells.get(("profile", batch)), model.ratio(STOCK, batch)
            if cell is not None and row is not None and row["ratio"] < GAIN:
                rest = [kind for kind in cell["kinds"] if kind["kind"] != "convolution"][:BLAMED]
                others = ", ".join(f"{kind['kind']} {kind['share']:.0%}" for kind in rest)
                share = f"{convolution_share(cell):.0%}"
                rows.append([model.name, batch, f"{row['ratio']:.3f}", share, others, places.letter(cell)])
    headings = ["model", "batch", "stock / ours", "convolution", "most of the rest", "on"]
    return table(headings, rows) if rows else "None."


def doubts(models: Sequence[Model]) -> str:
    """The warnings of `bench`, by code: in which models they came up."""
    found: dict[str, list[str]] = {}
    for model in models:
        for cell in model.cells.values():
            for warning in cell.get("warnings", ()):
                found.setdefault(warning["code"], []).append(model.name)
    return "\n".join(f"- {code}: {', '.join(dict.fromkeys(names))}" for code, names in sorted(found.items())) or "None."


def document(models: Sequence[Model], errors: Mapping[str, str], seconds: float) -> str:
    """All tables as Markdown."""
    nets, trained = ([model for model in models if model.trained is kind] for kind in (False, True))
    mlps = [model for model in trained if model.name.startswith(MLP)]
    places = Places(models)
    means = (
        f"Geometric mean at batch 1: {_mean(ratios(nets, STOCK))} nets; at batch 8:"
        f" {_mean(ratios(nets, STOCK, (8,)))}; of all: {_mean(ratios(nets, STOCK, (1, 8)))}."
    )
    right = [model for model in nets if model.passed(STOCK)]
    if len(right) < len(nets):
        means += f" Without those whose stock file fails or is missing: {_mean(ratios(right, STOCK))} at batch 1."
    parts = [
        f"<!-- made by: python benchmarks/latency.py --seconds {seconds:g} (run it again, do not edit this file) -->",
        "# Performance",
        PROSE.format(samples=SAMPLES),
        "## Where",
        table(["", "processor", "system", "packages"], places.rows()),
        "## The stock export",
        means,
        stock_table(nets, places),
        "*stock, captures frozen*: tf2onnx' own file asks for constants as inputs and cannot run; this one has them"
        "\ninside, and nothing else is changed.",
        "## Trained models",
        f"Geometric mean: {_mean(ratios(trained, STOCK))} models.",
        stock_table(trained, places),
        "## Keras' own serving",
        f"A `tf.function` of the original model at batch 1. Geometric mean: {_mean(ratios(nets, KERAS))} nets;"
        f" {_mean(ratios(mlps, KERAS))} perceptrons; {_mean(ratios(trained, KERAS))} trained models.",
        keras_table(models, places),
        "## Other runtimes",
        "OpenVINO in float32 runs our .onnx file, LiteRT a float32 .tflite file of the original model; batch 1. One\n"
        "process each, so a difference below 25 % may be a process' luck; *fastest* goes by the ratio alone.\n"
        f"Geometric means over the nets: OpenVINO {_mean(ratios(nets, OPENVINO))},"
        f" LiteRT {_mean(ratios(nets, LITERT))}.",
        rivals_table(models, places),
        "### Where another runtime is faster",
        "*lost*: time beyond what a matrix product and copies of this machine would need, by kind of operator\n"
        "(`deploykit bench --profile`).",
        blamed_table(models, places),
        f"## Where stock takes less than {GAIN:g} times as long: what is left",
        "Shares of the time of ours, from ONNX Runtime's profiler.",
        left_table(models, places),
    ]
    if wrong := wrong_files(models):
        parts += ["## Files that fail or are missing", wrong]
    if errors:
        parts += ["## Not measured", "\n".join(f"- {what}: {why}" for what, why in errors.items())]
    parts += ["## Warnings of `bench`", doubts(models)]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [*NETS, *files()]
    parser.add_argument("--only", nargs="+", choices=names, metavar="MODEL", help="only these; writes no document")
    parser.add_argument("--seconds", type=float, default=3.0, help="measuring time per candidate and cell")
    parser.add_argument("--minutes", type=float, default=40.0, help="start no cell that would end later")
    parser.add_argument("--store", type=Path, default=ROOT / "build" / "latency.json", help="finished cells")
    parser.add_argument("--check", action="store_true", help="exit 1 when a required figure is missed")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--one", choices=names, help=argparse.SUPPRESS)
    options = parser.parse_args()
    store = Store.at(options.store)
    if options.one:
        print(json.dumps(make(options.one, store.folder(options.one))))
        return 0
    chosen = options.only or names
    say(f"about {estimate_s(chosen, store, options.seconds) / 60:.0f} minutes; {options.minutes:g} are allowed")
    models, left = run(chosen, store, options.seconds, time.perf_counter() + 60 * options.minutes)
    text = document(models, store.errors, options.seconds)
    if options.only:
        print(text, end="")
    elif not left:
        from deploykit.files import whole_file

        with whole_file(options.out, force=True) as target:
            target.write_text(text, encoding="utf-8")
    lost = list(missed(models)) if options.check else []
    lost += [f"{what}: {why}" for what, why in store.errors.items()]
    lost += [f"{what}: not within {options.minutes:g} minutes; the same command goes on" for what in left]
    for line in lost:
        say(f"missed: {line}")
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
