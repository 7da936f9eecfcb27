"""The pytest plugin: equivalence as an assertion, and bundles as tests.

    def test_the_export_is_the_model(assert_equivalent):
        assert_equivalent("models/net.keras", "build/net.onnx", data="tests/samples.npz")

    pytest --deploykit-bundle dist            # for every bundle below dist: its hashes, and each golden data set
    pytest --deploykit-bundle dist -m deploykit_bundle                                       # nothing but these

The fixture judges as `deploykit check` does and needs TensorFlow; the bundles' tests run `deploykit.verify` and need
numpy and onnxruntime only. pytest imports this file in every run of an environment that has deploykit, so its top
level imports nothing but pytest; ``-p no:deploykit`` leaves even that out.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

MARK = "deploykit_bundle"
MANIFEST = "deploykit.json"  # that of deploykit.verify, whose import would be numpy's, too

_BUNDLES = pytest.StashKey[tuple[Path, ...]]()


# ------------------------------------------------------------------------------------------------------ the fixture


@pytest.fixture(scope="session")
def assert_equivalent() -> Callable[..., dict[str, Any]]:
    """A function that compares a candidate with the trained model in float64 and fails the test where they differ.

    ``assert_equivalent(reference, candidate, *, data=None, samples=None, rtol=None, atol=None, policy=None,
    runtime=None)``

    ``reference`` and ``candidate`` are paths (the candidate also that of a bundle) or keras.Models. ``data`` is what
    --data takes, an array for a model with one input, arrays by input name, or (x, y) with labels; without it inputs
    are made up. Arrays follow the rules of files: they are cast, NaN is refused, a fixed batch size drops the rest.
    ``samples`` bounds their number. ``policy`` is that of --policy, and float32's whatever the candidate says of
    itself. Returns the ``deploykit.check/1`` report. Raises AssertionError where the candidate is not equivalent and
    DeploykitError for whatever cannot be read or compared.
    """
    return _assert_equivalent


def _assert_equivalent(
    reference: Any,
    candidate: Any,
    *,
    data: Any = None,
    samples: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    policy: str | None = None,
    runtime: str | None = None,
) -> dict[str, Any]:
    __tracebackhide__ = True
    from deploykit import __version__
    from deploykit.compare import policy_from
    from deploykit.deploy import DataOptions
    from deploykit.environment import environment
    from deploykit.equivalence import equivalence
    from deploykit.load import load
    from deploykit.report import Report

    begin = time.perf_counter()
    law = policy_from(rtol, atol, policy)
    plain = data is None or isinstance(data, (str, os.PathLike))
    found = equivalence(
        load(reference) if _is_path(_model(reference)) else reference,
        [_model(candidate)],
        data=DataOptions(None if data is None else os.fspath(data), samples) if plain else _given(data, samples),
        policy=law,
        runtime=runtime,
    )
    report = Report(
        verb="check",
        version=__version__,
        model=found.body["reference"]["model"],
        proven=found.proven,
        reason=found.reason,
        notices=found.notices,
        body=found.body,
        environment=environment(),
        seconds={"total": time.perf_counter() - begin},
    ).to_json()
    if found.error is not None:
        raise found.error
    if not found.passed:
        options = {"--data": data if plain else GIVEN, "--samples": samples, "--rtol": rtol, "--atol": atol}
        options["--policy"] = policy
        raise AssertionError(_message(report, reference, candidate, {**options, "--runtime": runtime}, found.explained))
    return report


GIVEN = "samples.npz"  # what a message calls arrays that a test holds


def _is_path(model: Any) -> bool:
    return isinstance(model, (str, Path))


def _model(given: Any) -> Any:
    """A path as `Path`, a keras.Model as it is. Raises InputError for anything else."""
    if isinstance(given, (str, os.PathLike)):
        return Path(given)
    import keras

    from deploykit.errors import InputError

    if isinstance(given, keras.Model):
        return given
    raise InputError(f"assert_equivalent takes paths and keras.Models, not {type(given).__name__}")


def _given(data: Any, limit: int | None) -> Callable[[Any], Any]:
    """The samples of a model from arrays that a test holds."""

    def samples(model: Any) -> Any:
        from deploykit.data import hold_samples
        from deploykit.graph import signature

        return hold_samples(data, signature(model), "the test's data", limit=limit)

    return samples


def _message(
    report: Mapping[str, Any], reference: Any, candidate: Any, options: Mapping[str, Any], explained: Sequence[str]
) -> str:
    """What differs, how far and where, and how to see more."""
    from deploykit.report.cases import cases

    lines = [f"{_name(candidate)} is not equivalent to {_name(reference)}"]
    bad = [case for case in cases(report) if case.bad]
    for case in bad[:3]:
        lines.append(f"  output {case.part}" if case.part else f"  {case.title}")
        lines.append(f"    {case.reason}")
        if case.measured:
            lines.append(f"    SNR {case.measured}, the original's own {case.yardstick}")
        if case.worst:
            lines.append(f"    largest error {case.worst}")
    if len(bad) > 3:
        lines.append(f"  ... and {len(bad) - 3} more outputs")
    lines += [f"  {line}" for line in explained]
    lines.append(f"  inputs: {report['data']}")
    return "\n".join([*lines, f"  to see more: {_remedy(reference, candidate, options)}"])


def _name(model: Any) -> str:
    return os.fspath(model) if isinstance(model, (str, os.PathLike)) else f"the Keras model {model.name!r}"


def _remedy(reference: Any, candidate: Any, options: Mapping[str, Any]) -> str:
    paths = [os.fspath(m) for m in (reference, candidate) if isinstance(m, (str, os.PathLike))]
    if len(paths) < 2:
        return "save both models and compare the files with `deploykit check`"
    given = [part for flag, value in options.items() if value is not None for part in (flag, str(value))]
    command = shlex.join(["deploykit", "check", *paths, *given, "--json", "report.json"])
    return f"numpy.savez the samples as {GIVEN}, then {command}" if options["--data"] == GIVEN else command


# ------------------------------------------------------------------------------------------------------ the bundles


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("deploykit").addoption(
        "--deploykit-bundle",
        action="append",
        default=[],
        metavar="DIR",
        help="test every bundle found in DIR or below it: hashes and golden data (may be given several times)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{MARK}: made by --deploykit-bundle from a bundle's hashes and golden data")
    found: dict[Path, None] = {}
    for folder in config.getoption("deploykit_bundle"):
        bundles = sorted(_bundles(folder))
        if not bundles:
            raise pytest.UsageError(f"--deploykit-bundle {folder}: no bundle is there (a folder with {MANIFEST})")
        found.update(dict.fromkeys(bundles))
    config.stash[_BUNDLES] = tuple(found)


def _bundles(folder: str) -> Iterator[Path]:
    """Folders with a manifest; hidden folders hold what a killed run left half-written."""
    for place, folders, files in os.walk(os.path.abspath(folder)):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if MANIFEST in files:
            folders.clear()
            yield Path(place)


@pytest.hookimpl(hookwrapper=True)  # the old way, which every pytest from 7 on knows: this file is in all their runs
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, None]:
    outcome = yield
    if isinstance(collector, pytest.Session) and (bundles := collector.config.stash.get(_BUNDLES, ())):
        outcome.get_result().result.extend(BundleCollector.at(collector, folder) for folder in bundles)


class BundleFailed(Exception):  # noqa: N818 -- an outcome, told without a traceback
    """A bundle is not what it says; the message is all there is to show."""


class BundleCollector(pytest.Collector):
    """A bundle: its hashes, and each of its golden data sets."""

    @classmethod
    def at(cls, session: pytest.Session, folder: Path) -> BundleCollector:
        name = os.path.relpath(folder, session.config.rootpath).replace(os.sep, "/")
        made: BundleCollector = cls.from_parent(session, name=name, path=folder, nodeid=name)
        made.add_marker(MARK)
        return made

    def collect(self) -> Iterator[pytest.Item]:
        from deploykit import verify

        yield HashesItem.from_parent(self, name="hashes")
        try:
            golden = verify.unseal((self.path / MANIFEST).read_bytes()).get("golden")
        except (OSError, verify.RefusedError):  # the test of the hashes says so
            return
        names = (
            [record.get("folder") for record in golden if isinstance(record, dict)] if isinstance(golden, list) else []
        )
        for position, name in enumerate(names or ["golden data"]):
            yield GoldenItem.of(self, str(name), position)

    def comparison(self, position: int) -> Mapping[str, Any]:
        """One golden data set as `deploykit.verify` judges it; the bundle is verified once for all of them."""
        if self._report is None:
            from deploykit import verify

            try:
                self._report = verify.verify_bundle(self.path, seconds=0)
            except verify.RefusedError as error:
                raise BundleFailed(f"{self.name}: {error}") from None
        compared: list[Mapping[str, Any]] = self._report["comparisons"]
        if position >= len(compared):
            raise BundleFailed(f"{self.name}: {self._report['reason'] or 'nothing was compared'}")
        return compared[position]

    _report: dict[str, Any] | None = None


class _BundleItem(pytest.Item):
    @property
    def bundle(self) -> BundleCollector:
        assert isinstance(self.parent, BundleCollector)
        return self.parent

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], *args: Any) -> Any:
        return str(excinfo.value) if isinstance(excinfo.value, BundleFailed) else super().repr_failure(excinfo, *args)

    def reportinfo(self) -> tuple[os.PathLike[str] | str, int | None, str]:
        return self.path, None, f"{self.bundle.name}::{self.name}"


class HashesItem(_BundleItem):
    """The manifest's seal, and every file as it was sealed."""

    def runtest(self) -> None:
        from deploykit import verify

        try:
            verify.open_bundle(self.path)
        except verify.RefusedError as error:
            raise BundleFailed(f"{self.bundle.name}: {error}") from None


class GoldenItem(_BundleItem):
    """The model's answers on one golden data set, on this machine's CPU."""

    position: int

    @classmethod
    def of(cls, bundle: BundleCollector, name: str, position: int) -> GoldenItem:
        made: GoldenItem = cls.from_parent(bundle, name=name)
        made.position = position
        return made

    def runtest(self) -> None:
        found = self.bundle.comparison(self.position)
        if not found["passed"]:
            raise BundleFailed("\n".join([f"{self.bundle.name}: not equivalent on {self.name}", *_told(found)]))


def _told(comparison: Mapping[str, Any]) -> Iterator[str]:
    from deploykit.report.cases import worst_element

    if comparison["reason"]:
        yield f"  {comparison['reason']}"
    for output in comparison["outputs"]:
        if not output["passed"]:
            yield f"  output {output['name']}: {output['reason']}"
            if place := worst_element(output):
                yield f"    largest error {place}"
    if not comparison["reason"] and not comparison["outputs"]:
        yield "  nothing was compared"
