"""Everything that must hold before a change lands: `[tool.deploykit]`, read, run and reported in one go.

    [tool.deploykit]
    bundles = ["dist/*"]                          # seal, hashes and golden data; needs no TensorFlow

    [[tool.deploykit.check]]                      # candidates against the trained model in float64
    reference = "models/net.keras"
    candidates = ["dist/net", "build/net.onnx"]
    data = "tests/samples.npz"

    [[tool.deploykit.latency]]                    # a gate on a ratio that is measured in one run
    candidate = "dist/net"
    baseline = "main/net.onnx"
    max-slowdown = 1.10

Paths are relative to the folder of the file that holds the table. `read_config` refuses a table with an unknown key, a
wrong type, a missing file or nothing to do before anything runs; `run` then carries out all of it, whatever
fails on the way. Each entry ends in one of four outcomes:

    passed      proven, or equivalent with a reason why that is no proof
    failed      not equivalent, or slower than allowed                                                     exit 1
    undecided   a latency whose interval holds the limit: a notice, and a failure only where strict = true
    error       it could not be carried out: a damaged file, a bundle that was changed                     exit 2

Exit 1 wins over 2: what is known to be wrong is told first.

*The gate.* With [low, high] the 95 % interval of latency(candidate) / latency(baseline), it fails where
low > max-slowdown, passes where high ≤ max-slowdown, and is undecided between: noise alone never fails a build and
never passes one. Absolute milliseconds are no gate, because the next run has another machine. Limit: `deploykit.bench`
spends more processes on a pair while it cannot tell the two apart, not while the limit is in doubt; more
``seconds`` narrow the interval.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from deploykit import __version__, verify
from deploykit.compare import Law, policy_from
from deploykit.data import KERAS_SETS
from deploykit.environment import environment
from deploykit.errors import DeploykitError, InputError, ProofError
from deploykit.report import Report
from deploykit.runtimes import RUNTIMES
from deploykit.verify import is_number

if TYPE_CHECKING:  # `deploy` imports TensorFlow, which a configuration of bundles alone never needs
    pass

Progress = Callable[[str], None]
Job = TypeVar("Job")

# ------------------------------------------------------------------------------------------------ what is asked for


@dataclass(frozen=True)
class Check:
    """A row of ``[[tool.deploykit.check]]``."""

    reference: str
    candidates: tuple[str, ...]
    data: str | None
    samples: int | None
    image_size: str | None
    scale: float | None
    seed: int
    policy: str | None
    rtol: float | None
    atol: float | None
    runtime: str | None
    custom_objects: tuple[str, ...]
    weights: str | None
    allow_code: bool


@dataclass(frozen=True)
class Latency:
    """A row of ``[[tool.deploykit.latency]]``."""

    candidate: str
    baseline: str
    max_slowdown: float
    strict: bool
    runtime: str | None
    batch: int
    threads: int | None
    seconds: float
    data: str | None
    samples: int | None
    image_size: str | None
    scale: float | None
    seed: int


@dataclass(frozen=True)
class Config:
    """All of ``[tool.deploykit]``, checked; paths are as a shell in the current folder takes them."""

    path: Path
    checks: tuple[Check, ...]
    latency: tuple[Latency, ...]
    bundles: tuple[str, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Everything that is read; a report may replace none of it."""
        rows: tuple[Check | Latency, ...] = (*self.checks, *self.latency)
        models = [path for check in self.checks for path in (check.reference, *check.candidates, check.weights)]
        models += [path for gate in self.latency for path in (gate.candidate, gate.baseline)]
        models += [place for check in self.checks for place in check.custom_objects]
        return tuple(path for path in (str(self.path), *models, *(row.data for row in rows), *self.bundles) if path)


_REQUIRED = object()


@dataclass(frozen=True)
class _Key:
    """A row of a table of keys.

    ``wants`` says in words what ``fits`` tests; ``default`` serves where the key is left out. ``place`` (folder, text,
    where) resolves a path, or each of a list, and refuses what is not there.
    """

    wants: str
    fits: Callable[[Any], bool]
    default: Any = None
    place: Callable[[Path, str, str], str] | None = None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _file(folder: Path, text: str, where: str) -> str:
    if not os.path.exists(folder / text):  # False for a name that is too long, where Path raises
        raise InputError(f"{where}: there is no {folder / text}; paths are relative to the configuration's folder")
    return str(folder / text)


def _data(folder: Path, text: str, where: str) -> str:
    """A path, the name of a Keras data set, or module:function."""
    if os.path.exists(folder / text) or not (text in KERAS_SETS or ":" in text):
        return _file(folder, text, where)
    return _code(folder, text, where)


def _code(folder: Path, text: str, where: str) -> str:
    """A module as it is; a .py file, with or without :Name, beside the configuration."""
    file, colon, name = text.partition(":")
    return _file(folder, file, where) + colon + name if file.endswith(".py") else text


_SIZE = re.compile(r"([1-9]\d*)[xX]([1-9]\d*)\Z", re.ASCII)
_DATA = {
    "data": _Key("a path, a Keras data set or module:function", _is_text, place=_data),
    "samples": _Key("a whole number from 1 on", _is_count),
    "image-size": _Key('height and width as in "224x224"', lambda value: _is_text(value) and bool(_SIZE.match(value))),
    "scale": _Key("a number other than 0", lambda value: is_number(value) and value != 0),
    "seed": _Key("a whole number from 0 on", lambda value: _is_count(value, 0), 0),
    "runtime": _Key(f"one of {', '.join(RUNTIMES)}", lambda value: _is_text(value) and value in RUNTIMES),
}
_TOLERANCE = _Key("a number that is not negative", lambda value: is_number(value) and value >= 0)
_FLAG = _Key("true or false", lambda value: isinstance(value, bool), False)

CHECK_KEYS: Mapping[str, _Key] = {
    "reference": _Key("the path of a trained model", _is_text, _REQUIRED, _file),
    "candidates": _Key("a list of paths", _is_texts, _REQUIRED, _file),
    **_DATA,
    "policy": _Key(f"one of {', '.join(verify.POLICIES)}", lambda value: _is_text(value) and value in verify.POLICIES),
    "rtol": _TOLERANCE,
    "atol": _TOLERANCE,
    "custom-objects": _Key("a list of modules or .py files", _is_texts, [], _code),
    "weights": _Key("the path of a weights file", _is_text, place=_file),
    "allow-code": _FLAG,
}
LATENCY_KEYS: Mapping[str, _Key] = {
    "candidate": _Key("the path of a model or bundle", _is_text, _REQUIRED, _file),
    "baseline": _Key("the path of a model or bundle", _is_text, _REQUIRED, _file),
    "max-slowdown": _Key("a ratio above 0, such as 1.1", lambda value: is_number(value) and value > 0, _REQUIRED),
    "strict": _FLAG,
    "batch": _Key("a whole number from 1 on", _is_count, 1),
    "threads": _Key("a whole number from 1 on", _is_count),
    "seconds": _Key("a number above 0", lambda value: is_number(value) and value > 0, 4.0),
    **_DATA,
}
TABLE_KEYS: Mapping[str, _Key] = {
    "check": _Key("an array of tables, [[tool.deploykit.check]]", lambda value: _are_tables(value), []),
    "latency": _Key("an array of tables, [[tool.deploykit.latency]]", lambda value: _are_tables(value), []),
    "bundles": _Key("a list of paths or patterns", _is_texts, []),
}


def _are_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def read_config(path: str | os.PathLike[str]) -> Config:
    """Read ``[tool.deploykit]`` and check all of it. Raises InputError, one line, for whatever is wrong with it."""
    path = Path(path)
    try:
        with open(path, "rb") as stream:
            document = tomllib.load(stream)
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); give --config, a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no TOML: {error}") from error
    tool = document.get("tool")
    table = tool.get("deploykit") if isinstance(tool, dict) else None
    if not isinstance(table, dict):
        raise InputError(f"{path} has no table [tool.deploykit]; see docs/ci.md for an example")
    where = f"{path}: [tool.deploykit]"
    values = _read(table, TABLE_KEYS, where, path.parent)
    checks = [
        Check(**_read(row, CHECK_KEYS, f"{path}: [[tool.deploykit.check]] number {number}", path.parent))
        for number, row in enumerate(values["check"], 1)
    ]
    gates = [
        Latency(**_read(row, LATENCY_KEYS, f"{path}: [[tool.deploykit.latency]] number {number}", path.parent))
        for number, row in enumerate(values["latency"], 1)
    ]
    bundles = _bundles(path.parent, values["bundles"], where)
    if not (checks or gates or bundles):
        raise InputError(f"{where} asks for nothing; give at least one of {', '.join(TABLE_KEYS)}")
    for check in checks:
        if check.policy is not None and (check.rtol, check.atol) != (None, None):
            raise InputError(f"{path}: check of {check.reference}: give either policy or rtol and atol")
    for gate in gates:
        if Path(gate.candidate).resolve() == Path(gate.baseline).resolve():
            raise InputError(f"{path}: latency: {gate.candidate} is both candidate and baseline; compare two files")
    return Config(path, tuple(checks), tuple(gates), bundles)


def _read(table: Mapping[str, Any], keys: Mapping[str, _Key], where: str, folder: Path) -> dict[str, Any]:
    """The values of a table by the name of their field; every key known, of its type, every path there."""
    for key in table:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, 1)
            raise InputError(f"{where} has an unknown key {key!r}; {_meant(near, keys)}")
    values = {}
    for key, row in keys.items():
        if key not in table and row.default is _REQUIRED:
            raise InputError(f"{where} lacks {key!r}; give {row.wants}")
        value = table.get(key, row.default)
        if key in table and not row.fits(value):
            raise InputError(f"{where}: {key} is {value!r}; give {row.wants}")
        if row.place is not None and value is not None:
            inside = f"{where}: {key}"
            single = isinstance(value, str)
            value = row.place(folder, value, inside) if single else [row.place(folder, v, inside) for v in value]
        values[key.replace("-", "_")] = tuple(value) if isinstance(value, list) else value
    return values


def _meant(near: Sequence[str], keys: Mapping[str, _Key]) -> str:
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(keys)}"


def _bundles(folder: Path, patterns: Sequence[str], where: str) -> tuple[str, ...]:
    """The bundles that the patterns find, each pattern at least one, in order of name."""
    found: dict[str, None] = {}
    for pattern in patterns:
        whole = os.path.join(glob.escape(str(folder)), pattern)
        places = [os.path.normpath(place) for place in sorted(glob.glob(whole, recursive=True))]
        bundles = [place for place in places if os.path.isfile(os.path.join(place, verify.MANIFEST))]
        if not bundles:
            raise InputError(f"{where}: bundles: no bundle is found by {pattern!r} in {folder}")
        found.update(dict.fromkeys(bundles))
    return tuple(found)


def _policy(check: Check) -> Law:
    return policy_from(check.rtol, check.atol, check.policy)


def _options(job: Check | Latency) -> Mapping[str, Any]:
    """The fields of `deploykit.deploy.DataOptions`."""
    size = _SIZE.match(job.image_size) if job.image_size else None
    return {
        "data": job.data,
        "limit": job.samples,
        "image_size": (int(size[1]), int(size[2])) if size else None,
        "scale": job.scale,
        "seed": job.seed,
    }


# ---------------------------------------------------------------------------------------------------- carried out


@dataclass(frozen=True)
class Finished:
    """The report, and what the command ends with: None, or the error whose exit code and line it shows."""

    report: Report
    error: Exception | None


def run(config: Config, *, progress: Progress = lambda message: None) -> Finished:
    """Carry out all of a configuration, what is quick first; nothing that fails stops the rest."""
    begin = time.perf_counter()
    errors: list[Exception] = []
    found = {
        "bundles": _carry_out(config.bundles, _run_bundle, _no_bundle, progress, errors),
        "checks": _carry_out(config.checks, _run_check, _no_check, progress, errors),
        "latency": _carry_out(config.latency, _run_latency, _no_latency, progress, errors),
    }
    entries = [entry for part in found.values() for entry in part]
    reason = _reason(entries)
    unproven = next((f"{entry['model']}: {entry['reason']}" for entry in entries if not entry["proven"]), None)
    report = Report(
        verb="ci",
        version=__version__,
        model=str(config.path),
        proven=unproven is None,
        reason=reason or unproven,
        body={"passed": reason is None, **found},
        environment=environment(),
        seconds={
            **{key: sum(entry["seconds"]["total"] for entry in part) for key, part in found.items()},
            "total": time.perf_counter() - begin,
        },
        notices=[f"{entry['model']}: {notice}" for entry in entries for notice in entry["notices"]],
    )
    return Finished(report, _error(entries, reason, errors))


def _carry_out(
    jobs: Sequence[Job],
    work: Callable[[Job], dict[str, Any]],
    nothing: Callable[[Job], dict[str, Any]],
    progress: Progress,
    errors: list[Exception],
) -> list[dict[str, Any]]:
    """One entry for each job; what ended a job early is appended to ``errors``."""
    entries = []
    for job in jobs:
        entry = nothing(job)
        progress(f"checking {entry['model']}")
        start = time.perf_counter()
        try:
            entry |= work(job)
        except Exception as error:  # also what nobody foresaw: the others still run, and it is raised at the end
            entry |= _broken(error)
            errors.append(error)
        entries.append({**entry, "seconds": {"total": time.perf_counter() - start}})
    return entries


def _broken(error: Exception) -> dict[str, Any]:
    """What an error says of the entry that it ended."""
    known = isinstance(error, DeploykitError)
    text = str(error) if known else f"internal error, please report it: {type(error).__name__}: {error}"
    return {"outcome": "failed" if isinstance(error, ProofError) else "error", "reason": " ".join(text.split())}


def _reason(entries: Sequence[Mapping[str, Any]]) -> str | None:
    """How many entries did not pass, and the first of the worst, in one line."""
    bad = [entry for outcome in ("failed", "error") for entry in entries if entry["outcome"] == outcome]
    if not bad:
        return None
    return f"{len(bad)} of {len(entries)} did not pass; {bad[0]['model']}: {bad[0]['reason']}"


def _error(entries: Sequence[Mapping[str, Any]], reason: str | None, errors: Sequence[Exception]) -> Exception | None:
    if reason is None:
        return None
    if any(entry["outcome"] == "failed" for entry in entries):
        return ProofError(reason)
    return next((error for error in errors if not isinstance(error, DeploykitError)), InputError(reason))


def _no_check(job: Check) -> dict[str, Any]:
    return {
        "model": job.reference,
        "candidates": list(job.candidates),
        "passed": False,
        "proven": False,
        "comparisons": [],
        "notices": [],
    }


def _no_bundle(bundle: str) -> dict[str, Any]:
    return {"model": _printable(bundle), "passed": False, "proven": False, "comparisons": [], "notices": []}


def _no_latency(gate: Latency) -> dict[str, Any]:
    return {
        "model": gate.candidate,
        "candidate": gate.candidate,
        "baseline": gate.baseline,
        "max_slowdown": gate.max_slowdown,
        "strict": gate.strict,
        "batch": gate.batch,
        "threads": gate.threads,
        "passed": False,
        "proven": False,
        "ratio": None,
        "ci95": None,
        "notices": [],
        "bench": None,
    }


def _printable(path: str) -> str:
    """A file's name as UTF-8 can hold it; names on disk may be any bytes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _run_check(job: Check) -> dict[str, Any]:
    from deploykit.deploy import DataOptions
    from deploykit.equivalence import equivalence
    from deploykit.load import load

    trust: dict[str, Any] = {"custom_objects": job.custom_objects, "allow_code": job.allow_code}
    loaded = load(job.reference, weights=job.weights, **trust)
    found = equivalence(
        loaded,
        job.candidates,
        data=DataOptions(**_options(job)),
        policy=_policy(job),
        runtime=job.runtime,
        **trust,
    )
    outcome = "passed" if found.passed else "failed" if found.error is None else "error"
    return {
        **_no_check(job),
        **found.body,
        "outcome": outcome,
        "proven": found.proven,
        "reason": found.reason,
        "notices": list(found.notices),
    }


def _run_bundle(bundle: str) -> dict[str, Any]:
    try:
        record = verify.verify_bundle(bundle, seconds=0)
    except verify.RefusedError as error:
        raise InputError(str(error)) from error
    return {
        **_no_bundle(bundle),
        "passed": record["passed"],
        "outcome": "passed" if record["passed"] else "failed",
        "proven": record["proven"],
        "reason": record["reason"],
        "reference": {"model": None, "precision": record["reference"]},
        "data": "golden data of the bundle",
        "comparisons": record["comparisons"],
        "notices": record["notices"],
    }


def _run_latency(gate: Latency) -> dict[str, Any]:
    from deploykit import latency
    from deploykit.deploy import DataOptions

    found = latency.latency(
        [Path(gate.candidate)],
        wanted=(gate.runtime,) if gate.runtime else (),
        data=DataOptions(**_options(gate)),
        settings=latency.Settings(
            (gate.batch,), None if gate.threads is None else (gate.threads,), (), gate.seconds, gate.seed
        ),
        gate=latency.Gate(Path(gate.baseline), gate.max_slowdown, gate.strict),
    )
    (result,) = found.gates
    return {
        **_no_latency(gate),
        "threads": result.threads,
        "passed": result.outcome == "passed",
        "outcome": result.outcome,
        "proven": result.outcome == "passed",
        "reason": result.reason,
        "ratio": result.ratio,
        "ci95": result.to_json()["ci95"],
        "notices": list(found.notices),
        "bench": found.body,
    }
