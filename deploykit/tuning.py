"""Session settings of ONNX Runtime's CPU, chosen by measurement: what `deploykit bench --tune-session` does.

Settings are guessed wrong as often as right: a second thread is a loss for a small net, spinning helps whoever calls
again at once, an arena costs nothing until it does. So every alternative to ONNX Runtime's defaults is timed, and the
default stands unless something is shown to be faster, twice.

    try        the default, and alternatives that differ in one setting each, in one interleaved run of `bench`
    prove      the answers of those that were `faster`, each in a process of its own; who fails is out
    combine    what is left, one of each setting: the thread count with the smallest ratio, and all the others
    confirm    the default, the best single alternative and the combination, in a second run on fresh processes

Recommended is the combination where the second run calls it `faster` than the default and than the best single one;
else the best single one, where that is `faster` than the default; else the combination, where only that is; else
nothing. The ratios reported are the second run's: those of the first are those of winners, which flatters.

Why twice. An interval misses the truth with probability 1/32 (`deploykit.verify`), on either side alike, so a setting
that makes no difference is called `faster` with probability 1/64. Of k alternatives some one is, with probability up to
k/64, whatever they share (the default's processes, say): for eight 1 in 8, too much. The second run knows nothing of
the first, and asks again about two candidates at most: k/64 * 2/64, for eight 1 in 256. A setting that is in truth
slower is recommended more seldom still. What is missed: effects of a few percent, where processes differ by more.

Same answers. Another number of threads adds up in another order, and flushed denormals are other numbers. So a profile
is only recommended where the file's answers under it are as right as under the default:

    bundle         its golden data, by the law and the yardstick in its manifest (`deploykit.verify`)
    plain file     the default session's own answers on the inputs that are timed (`PROVEN` samples at most): the
                   same bits, or within the float32 policy without an original, 32 * eps of each sample

Every proof runs the model in a fresh process, because ONNX Runtime heeds denormals-as-zero in the first session of a
process only, and judges here, where denormal numbers still count.

Limits. "Faster" means faster alone: nothing else runs, calls come one after the other without a pause, and only latency
counts. Threads and spinning take processors from other programs, so on a shared machine fewer are kinder than what is
recommended here. A profile holds for the processor, cores, batch size and onnxruntime on which it was measured. Plain
files of lower precision are held to float32's law, and fail it where a setting changes their rounding.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deploykit import environment, verify
from deploykit.bench import PROCESSES, SETTABLE, TIMEOUT_S, BenchReport, Candidate, Comparison, Progress, Timing, bench
from deploykit.errors import DataError, InputError, OutputError
from deploykit.files import sha256, whole_file
from deploykit.runtimes.process import NoAnswerError, Process
from deploykit.runtimes.trained import inputs_for
from deploykit.verify import Bundle, Judge, Profile, SessionSettings

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
Proof = Callable[[SessionSettings], "str | None"]  # why the answers are not the same, or None

PROVEN = 64  # samples on which a plain file's answers are compared


@dataclass(frozen=True)
class Trial:
    """Settings beside the default: what was measured, and why they are out although they were faster."""

    settings: SessionSettings
    comparison: Comparison
    differs: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A row of ``tried`` or ``confirmed``."""
        found = self.comparison.to_json()
        numbers = {key: found[key] for key in ("ratio", "ci95", "verdict", "reason")}
        return {"name": self.settings.text, "settings": self.settings.to_json(), **numbers, "differs": self.differs}


@dataclass(frozen=True)
class Tuned:
    """What was tried and confirmed, and what follows: ``chosen`` is None where the default stands."""

    default: SessionSettings
    tried: tuple[Trial, ...]
    first: BenchReport
    confirmed: tuple[Trial, ...] = ()
    second: BenchReport | None = None
    chosen: Trial | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> SessionSettings:
        """What is recommended."""
        return self.default if self.chosen is None else self.chosen.settings

    @property
    def profile(self) -> Profile | None:
        """What a manifest says of it; None where the default stands."""
        return None if self.chosen is None else Profile(self.chosen.settings, dict(self.measured))

    @property
    def reason(self) -> str:
        """Why this and nothing else, in one sentence."""
        default = f"the default ({self.default.text})" if self.default.changed else "ONNX Runtime's default"
        if self.chosen is not None:
            return f"{self.chosen.settings.text}: faster than {default} in two runs, with answers as right"
        if self.confirmed:
            return f"{default} stands: what was faster at first was not in a second run"
        if out := [trial for trial in self.tried if trial.differs is not None]:
            return f"{default} stands: {out[0].settings.text} is faster, but changes the answers: {out[0].differs}"
        return f"{default} stands: nothing was faster"

    def to_json(self) -> dict[str, Any]:
        """The ``session`` of ``deploykit.bench/1``."""
        second = {} if self.second is None else self.second.to_json()
        return {
            "chosen": self.chosen is not None,
            "profile": self.settings.to_json(),
            "text": self.settings.text,
            "reason": self.reason,
            "default": self.default.to_json(),
            "tried": [trial.to_json() for trial in self.tried],
            "confirmed": [trial.to_json() for trial in self.confirmed],
            "confirmation": {key: second.get(key, []) for key in ("candidates", "comparisons", "warnings")},
            "measured": dict(self.measured),
            "python": self.settings.python,
        }


# ------------------------------------------------------------------------------------------------------ what to try


def default_of(threads: Sequence[int] | None) -> SessionSettings:
    """ONNX Runtime's own, with the most threads that the user allows."""
    return SessionSettings(max(threads)) if threads else SessionSettings()


def alternatives(threads: Sequence[int] | None, cores: int) -> list[SessionSettings]:
    """What differs from the default in one setting each, on a machine of so many physical cores.

    Thread counts are the user's, or the powers of two and all cores. Operations run in parallel on as many threads as
    there are cores or the user allows; with one there is nothing to run in parallel, and nothing that spins.
    """
    default, most = default_of(threads), max(threads or [cores])
    counts = threads or sorted({*itertools.takewhile(lambda n: n < cores, (2**i for i in range(64))), cores})
    found = [replace(default, threads=count) for count in sorted(counts) if count != default.threads]
    if most > 1:
        found.append(replace(default, execution_mode="parallel", inter_op_threads=most))
        found.append(replace(default, spinning=False))
    found.append(replace(default, denormals_as_zero=True))
    found.append(replace(default, cpu_arena=False))
    return found


def combined(default: SessionSettings, trials: Sequence[Trial]) -> SessionSettings:
    """Everything in which the trials differ from the default; where they disagree, the fastest one's."""
    ordered = sorted(trials, key=_ratio, reverse=True)  # the fastest writes last
    base = default.to_json()
    changes = [
        {key: value for key, value in trial.settings.to_json().items() if value != base[key]} for trial in ordered
    ]
    return replace(default, **{key: value for change in changes for key, value in change.items()})


def _ratio(trial: Trial) -> float:
    return 1.0 if trial.comparison.ratio is None else trial.comparison.ratio.ratio


# ------------------------------------------------------------------------------------------------------------- tune


def tune(
    model: Path,
    inputs: Arrays,
    *,
    bundle: Bundle | None = None,
    default: SessionSettings | None = None,
    tried: Sequence[SessionSettings] | None = None,
    batch: int = 1,
    threads: Sequence[int] | None = None,
    seconds: float = 4.0,
    seed: int = 0,
    processes: int = PROCESSES,
    progress: Callable[[str], None] = lambda message: None,
) -> Tuned:
    """Find the session settings for an ONNX file at one batch size. ``threads`` restricts the counts that are tried.

    ``default`` and ``tried``, where they are not given, are `default_of` and `alternatives` on this machine.
    ``bundle``: the file is its model, and its golden data are the proof. ``seconds`` (for each candidate of each run)
    and ``processes`` are `deploykit.bench`'s. Raises InputError where the file does not run with the default.
    """
    _refuse_few(threads)
    default = default or default_of(threads)
    tried = alternatives(threads, environment.physical_cores()) if tried is None else tried

    def timed(listed: Sequence[SessionSettings], run: int, focus: bool) -> tuple[BenchReport, list[Trial]]:
        def told(at: Progress) -> None:
            progress(f"session, run {run} of 2, {at.candidate}: {at.phase}, round {at.rounds} of {at.limit}")

        report = bench(
            [Candidate(each.text, model, SETTABLE, session=each) for each in (*listed, default)],
            inputs,
            batches=(batch,),
            seconds=seconds,
            seed=2 * seed + run - 1,  # another order in the second run
            processes=processes,
            focus=default.text if focus else None,
            progress=told,
        )
        broken = report.timing(default.text).failed
        if broken is not None:
            raise InputError(f"{model} does not run with {default.text}: {broken}")
        return report, [Trial(each, report.comparison(each.text, default.text)) for each in listed]

    first, trials = timed(tried, 1, True)
    proof = _golden_proof(model, bundle) if bundle is not None else _own_proof(model, default, inputs, batch)
    progress("session: comparing answers")
    trials = [replace(trial, differs=proof(trial.settings)) if _faster(trial) else trial for trial in trials]
    found = Tuned(default, tuple(trials), first, measured=_measured(first.timing(default.text), bundle))
    left = [trial for trial in trials if _faster(trial) and trial.differs is None]
    if not left:
        return found
    best, both = min(left, key=_ratio).settings, combined(default, left)
    finalists = [best]
    if both != best and proof(both) is None:
        finalists.append(both)
    second, confirmed = timed(finalists, 2, False)
    chosen = _chosen(confirmed, second)
    measured = {**found.measured, **({} if chosen is None else _numbers(chosen))}
    return replace(found, confirmed=tuple(confirmed), second=second, chosen=chosen, measured=measured)


def _refuse_few(threads: Sequence[int] | None) -> None:
    if threads is not None and (not threads or min(threads) < 1 or len(set(threads)) < len(threads)):
        raise InputError(f"thread counts are {list(threads)}; give different numbers from 1 on")


def _faster(trial: Trial) -> bool:
    return trial.comparison.verdict == "faster"


def _chosen(confirmed: Sequence[Trial], second: BenchReport) -> Trial | None:
    """The rule of the module's docstring; ``confirmed`` are the best single one and, where there is one, both."""
    best, *more = confirmed
    for both in more:
        beats = second.comparison(both.settings.text, best.settings.text).verdict == "faster"
        if _faster(both) and (beats or not _faster(best)):
            return both
    return best if _faster(best) else None


def _measured(timing: Timing, bundle: Bundle | None) -> dict[str, Any]:
    """On what it holds; of the same words as `deploykit.verify.machine`."""
    return {
        **verify.machine(),
        "physical_cores": environment.physical_cores(),
        "batch": timing.batch,
        "size": timing.size,
        "onnxruntime": environment.environment()["packages"].get("onnxruntime"),
        "proof": "golden data" if bundle is not None else "the default's answers",
    }


def _numbers(trial: Trial) -> dict[str, Any]:
    found = trial.to_json()
    return {key: found[key] for key in ("ratio", "ci95")}


# ------------------------------------------------------------------------------------------------------ same answers


def _golden_proof(model: Path, bundle: Bundle) -> Proof:
    with _explained():
        golden = bundle.golden()
    if not golden:
        raise InputError(f"{bundle.folder} holds no golden data to prove a profile with; write the bundle again")

    def proof(settings: SessionSettings) -> str | None:
        try:
            found = answers(model, settings, [data.inputs for data in golden])
        except NoAnswerError as error:
            return f"it does not run: {error}"
        judged = [bundle.judged(data, each) for data, each in zip(golden, found, strict=True)]
        return _first_failure(output for outputs in judged for output in outputs)

    return proof


def _own_proof(model: Path, default: SessionSettings, inputs: Arrays, batch: int) -> Proof:
    pieces = list(_pieces(inputs_for(model, inputs), batch))
    kept: list[list[dict[str, Array]]] = []  # the default's answers, once they are asked for

    def proof(settings: SessionSettings) -> str | None:
        try:
            if not kept:
                kept.append(answers(model, default, pieces))
            found = answers(model, settings, pieces)
        except NoAnswerError as error:
            return f"it does not run: {error}"
        if all(_same_bits(own, each) for own, each in zip(kept[0], found, strict=True)):
            return None
        judge = Judge(verify.FLOAT32)
        for own, each in zip(kept[0], found, strict=True):
            judge.add(own, each, None, {name: array.dtype for name, array in own.items()})
        return _first_failure(judge.conclude())

    return proof


def _first_failure(outputs: Any) -> str | None:
    failed = [output for output in outputs if not output.passed]
    return f"output {failed[0].name}: {failed[0].reason}" if failed else None


def _pieces(inputs: Arrays, batch: int) -> Iterator[dict[str, Array]]:
    """Batches of the samples that are there, the last one filled up from the first."""
    count = min(PROVEN, min(map(len, inputs.values())))
    for start in range(0, max(count, batch), batch):
        rows = np.arange(start, start + batch)
        yield {name: np.ascontiguousarray(array[rows % len(array)]) for name, array in inputs.items()}


def _same_bits(a: Arrays, b: Arrays) -> bool:
    return list(a) == list(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for x, y in zip(a.values(), b.values(), strict=True)
    )


def answers(model: Path, settings: SessionSettings, feeds: Sequence[Arrays]) -> list[dict[str, Array]]:
    """The model's answers in a process of its own. Raises NoAnswerError, with the reason, where it gives none."""
    with tempfile.TemporaryDirectory(prefix="deploykit-tune-") as name:
        folder = Path(name)
        given, taken, log = folder / "inputs.npz", folder / "outputs.npz", folder / "log"
        with log.open("wb") as stream:
            process = Process(stream, log)
        found = []
        try:
            for place, feed in enumerate(feeds):
                given.write_bytes(verify.archive(feed))
                if place == 0:
                    process.ask("load", TIMEOUT_S, _load(model, settings, feed, given))
                process.ask("answer", TIMEOUT_S, {"inputs": str(given), "outputs": str(taken)})
                with np.load(taken, allow_pickle=False) as arrays:
                    found.append({key: _text(arrays[key]) for key in arrays.files})
        finally:
            process.close()
        return found


def _load(model: Path, settings: SessionSettings, feed: Arrays, inputs: Path) -> dict[str, Any]:
    batch = next((len(array) for array in feed.values() if np.ndim(array)), 1)
    load = {"runtime": SETTABLE, "model": str(model.absolute()), "threads": 1, "inputs": str(inputs), "batch": batch}
    return {**load, "session": settings.to_json()}


def _text(array: Array) -> Array:
    """Text as a session gives it; a file without pickles holds it at fixed width."""
    return array.astype(object) if array.dtype.kind == "U" else array


# ------------------------------------------------------------------------------------------------------------- save


def refuse_profiled(bundle: Bundle, *, force: bool) -> None:
    """A profile that is there stays, unless the user says otherwise; said before anything is measured."""
    if bundle.profile is not None and not force:
        raise OutputError(
            f"{bundle.folder} has a session profile already ({bundle.profile.settings.text}); --force measures again"
        )


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except verify.RefusedError as error:
        raise InputError(str(error)) from error


def tune_bundle(folder: Path, inputs: Arrays, **options: Any) -> Tuned:
    """Tune a bundle that has no profile yet, and save what was found; ``options`` are those of `tune`."""
    bundle = verify.open_bundle(folder)
    found = tune(folder / bundle.model, inputs, bundle=bundle, **options)
    save(bundle, found.profile, [])
    return found


def save(bundle: Bundle, profile: Profile | None, notices: list[str]) -> bool:
    """Write the profile, or that there is none, into the bundle's manifest and seal it; whether that changed anything.

    The manifest is replaced whole or not at all, nothing else is touched; what there is to say goes to ``notices``.
    Raises DataError where the bundle is no longer what was measured.
    """
    if profile is None and bundle.profile is None:
        return False
    with _explained():
        now = verify.open_bundle(bundle.folder).manifest
    if now != bundle.manifest:
        raise DataError(f"{bundle.folder} changed while it was measured; tune it again")
    changed = {key: value for key, value in bundle.manifest.items() if key != "session"}
    if profile is None:
        notices.append("the profile that the bundle had was removed")
    else:
        changed["session"] = profile.to_json()
        if sha256(Path(bundle.folder) / "verify.py") != sha256(verify.__file__):
            notices.append("the bundle's verify.py is another version's and may not apply the profile; deploy it again")
    with whole_file(Path(bundle.folder) / verify.MANIFEST, force=True) as target:
        target.write_bytes(verify.seal(changed))
    return True
