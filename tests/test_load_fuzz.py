"""Mutated model files: `fuzzing`, bounded, and what it found.

    DEPLOYKIT_FUZZ_CASES, DEPLOYKIT_FUZZ_SEED    how many cases the suite runs, and of which seed

Every case follows from its seed and its number, so that a failure is repeated by the line that the script prints.
``FOUND`` holds the smallest file for each fault that fuzzing, or reading the code for it, brought up.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzzing
import h5py
import numpy as np
import pytest
from fuzzing import Case, Outcome

from deploykit.errors import LoadError, ProofError
from deploykit.load import hdf5, legacy
from deploykit.load.contents import parse_config
from deploykit.load.legacy import keras1
from deploykit.load.safety import examine

CASES = int(os.environ.get("DEPLOYKIT_FUZZ_CASES", "90"))
SEED = int(os.environ.get("DEPLOYKIT_FUZZ_SEED", "4"))
DESCRIPTIONS = 1500  # these cost about two milliseconds each


@pytest.fixture(scope="session")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.getbasetemp()
    return fuzzing.written((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "attacked")


def _judged(name: str, text: bytes) -> None:
    config = parse_config(text, name)
    config = keras1.modernise(config, what=name) if "first" in name else config
    examine(legacy.translate(config, what=name).model if "_" in name else config, {}, name)


@pytest.mark.slow
def test_a_mutated_file_becomes_a_model_or_one_line(seeds, tmp_path):
    """In a process of its own: this one has computed, and cannot be forked safely."""
    script = [sys.executable, "-W", "ignore", fuzzing.__file__, "--cases", str(CASES), "--seed", str(SEED)]
    further = ["--keep", str(tmp_path), "--valid", str(seeds)]
    ended = subprocess.run([*script, *further], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-1000:]
    assert f"{CASES} cases" in ended.stdout


def test_any_description_is_judged_or_refused(seeds):
    """The stages before Keras, without a child for each: nothing of a description is acted on there."""
    texts = [(path.name, path.read_bytes()) for path in sorted(seeds.glob("*.json"))]
    for number in range(DESCRIPTIONS):
        rng = random.Random(f"{SEED}:{number}")
        name, text = rng.choice(texts)
        for _ in range(rng.choice((1, 1, 2, 3))):
            try:
                text = fuzzing.mutate_json(rng, text)
            except (ValueError, RecursionError):  # no JSON any more, or too deep for its writer
                text = fuzzing.mutate_bytes(rng, text)
        ended = fuzzing.verdict(Path(name), None, lambda path, _, text=text: _judged(path.name, text))
        assert ended.fine, f"description {SEED}:{number}: {ended}"


# --------------------------------------------------------------------------------------------------- the harness


@pytest.mark.parametrize("kind", sorted(fuzzing.KINDS))
def test_a_case_follows_from_its_seed_and_number(kind, seeds, tmp_path):
    number = next(n for n in range(10_000) if Case(SEED, n).drawn()[1] == kind)
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Case(SEED, number).make(seeds, tmp_path / name)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        made.append({path.relative_to(tmp_path / name): path.read_bytes() for path in files})
    assert made[0] == made[1]
    originals = {path.name: path.read_bytes() for path in seeds.rglob("*") if path.is_file()}
    assert any(originals.get(path.name) != data for path, data in made[0].items()) or len(made[0]) < 3


def _raises(error: BaseException) -> Callable[..., Any]:
    def load(path: Path, weights: Path | None) -> Any:
        raise error

    return load


def _does(action: Callable[[], Any]) -> Callable[..., Any]:
    return lambda path, weights: action()


ENDS: dict[str, tuple[Callable[..., Any], str]] = {
    "a model": (_does(lambda: None), "loaded"),
    "one line": (_raises(LoadError("x is damaged; save it again")), "refused"),
    "no line": (_raises(LoadError("")), "no clear line"),
    "a long line": (_raises(LoadError("x" * 2000)), "no clear line"),
    "another exit code": (_raises(ProofError("x")), "exit code"),
    "another exception": (_raises(KeyError("x")), "exception"),
    "leaving": (_raises(SystemExit(3)), "exception"),
    "a signal": (_does(lambda: os.kill(os.getpid(), signal.SIGKILL)), "crash"),
    "leaving at once": (_does(lambda: os._exit(0)), "crash"),
    "a hang": (_does(lambda: time.sleep(60)), "hang"),
    "memory": (_does(lambda: bytearray(4 * fuzzing.MEMORY_BYTES)), "exception"),
    "an import": (_does(lambda: __import__("this_is_no_module_of_anyone")), "deed"),
    "a process": (_does(lambda: os.system("true")), "deed"),
    "a file left behind": (_does(lambda: Path("left").write_text("x")), "deed"),
    "a file elsewhere": (_does(lambda: Path("../elsewhere").resolve().write_text("x")), "deed"),
    "a folder elsewhere": (_does(lambda: os.mkdir(Path("../folder").resolve())), "deed"),
    "a pickle": (_does(lambda: fuzzing.pickle.loads(fuzzing.pickle.dumps(os.getcwd))), "deed"),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDS)
def test_the_harness_notices(case, tmp_path):
    action, wanted = ENDS[case]
    ended = fuzzing.run(
        tmp_path, None, tmp_path, lambda path, weights: fuzzing.verdict(path, weights, action), timeout_s=2.0
    )
    assert ended.verdict == wanted, ended
    assert ended.fine == (wanted in ("loaded", "refused"))


def test_a_known_fault_is_counted_and_not_failed():
    for place in fuzzing.KNOWN:
        assert Outcome("exception", where=("KeyError", "load/__init__.py:load", place)).known
    assert not Outcome("exception", where=("KeyError", "load/__init__.py:load")).known


# ------------------------------------------------------------------------------- heaps that lead libhdf5 in circles


def _heap(at: int, *values: tuple[int, bytes]) -> Callable[[bytearray, int], None]:
    """Write values into the object ``at`` bytes into a heap."""

    def change(data: bytearray, heap: int) -> None:
        for place, value in values:
            start = heap + at + place
            data[start : start + len(value)] = value

    return change


CIRCLES = {
    "free space of no length": _heap(16, (0, b"\0\0"), (8, bytes(8))),
    "free space of less than its header": _heap(16, (0, b"\0\0"), (8, b"\x08" + bytes(7))),
    "a length that wraps around": _heap(16, (8, b"\xf0" + b"\xff" * 7)),
    "under a header that is not all its own": _heap(0, (5, b"abc"), (16, b"\0\0"), (24, bytes(8))),
}


@pytest.mark.parametrize("circle", CIRCLES)
def test_a_heap_that_leads_nowhere_is_refused_before_it_is_walked(circle, seeds, tmp_path):
    """libhdf5 walks it for ever when an attribute is read, which opening the file does not do."""
    data = bytearray((seeds / "branches_first.h5").read_bytes())
    CIRCLES[circle](data, data.index(b"GCOL"))
    path = tmp_path / "m.h5"
    path.write_bytes(data)
    with pytest.raises(LoadError, match="leads nowhere"):
        hdf5.open_checked(path, str(path))


def test_a_file_full_of_heaps_is_refused_in_time():
    """Heaps inside each other would be walked as often as there are any."""
    heap = b"GCOL\1\0\0\0" + (1 << 40).to_bytes(8, "little") + b"\1" + bytes(7) + (16).to_bytes(8, "little")
    started = time.monotonic()
    with pytest.raises(LoadError, match="leads nowhere"):
        hdf5.refuse_heaps(io.BytesIO(heap * 20_000), "m")
    assert time.monotonic() - started < 5


def test_a_heap_is_found_wherever_it_stands():
    circle = b"GCOL\1\0\0\0" + (4096).to_bytes(8, "little") + bytes(4080)
    for place in ((1 << 20) - 3, (1 << 20) - 5, 1 << 20):
        with pytest.raises(LoadError, match="leads nowhere"):
            hdf5.refuse_heaps(io.BytesIO(b"x" * place + circle), "m")


def test_lengths_of_another_size_are_refused(tmp_path):
    """Their heaps are laid out otherwise."""
    sizes = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    sizes.set_sizes(8, 4)
    h5py.h5f.create(str(tmp_path / "m.h5").encode(), fcpl=sizes).close()
    with pytest.raises(LoadError, match="not of 8 bytes"):
        hdf5.open_checked(tmp_path / "m.h5", "m")


# ---------------------------------------------------------------------------------------------- what was found


def _h5(source: str, change: Callable[[h5py.File], None]) -> Callable[[Path, Path], tuple[Path, Path | None]]:
    def make(seeds: Path, folder: Path) -> tuple[Path, Path | None]:
        path = Path(shutil.copyfile(seeds / source, folder / "m.h5"))
        with h5py.File(path, "r+") as file:
            change(file)
        return (seeds / "branches_old.json", path) if "weights" in source else (path, None)

    return make


def _json(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, Path], tuple[Path, Path | None]]:
    def make(seeds: Path, folder: Path) -> tuple[Path, Path | None]:
        config = json.loads((seeds / "branches_old.json").read_text())
        change(config)
        (folder / "m.json").write_text(json.dumps(config))
        return folder / "m.json", seeds / "branches_old_weights.h5"

    return make


def _archive_as_weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, Path], tuple[Path, Path | None]]:
    def make(seeds: Path, folder: Path) -> tuple[Path, Path | None]:
        path = folder / "m.keras"
        with zipfile.ZipFile(seeds / "branches_old.keras") as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                content = old.read(name)
                if name == "config.json":
                    config = json.loads(content)
                    change(config)
                    content = json.dumps(config).encode()
                new.writestr(name, content)
        return seeds / "branches_old.json", path

    return make


def _instead(kind: str, **config: Any) -> Callable[[dict[str, Any]], None]:
    def change(model: dict[str, Any]) -> None:
        entry = next(item for item in model["config"]["layers"] if item["config"]["name"] == "bend")
        entry.update(class_name=kind, config={"name": "bend", **config})

    return change


def _names(*names: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file["left"].attrs["weight_names"] = np.asarray([name.encode() for name in names])

    return change


FOUND: dict[str, Callable[[Path, Path], tuple[Path, Path | None]]] = {
    "weights that are named and absent": _h5("branches_old_weights.h5", _names("left/bias:0", "no:0")),
    "weights that are named by nothing": _h5(
        "branches_old_weights.h5", lambda f: f["left"].attrs.__setitem__("weight_names", h5py.Empty("S1"))
    ),
    "weights of a layer that is absent": _h5("branches_old_weights.h5", lambda f: f.__delitem__("left")),
    "weights of a model without a class": _archive_as_weights(lambda c: c["config"]["layers"][1].update(class_name=[])),
    "weights of a layer without a name": _archive_as_weights(lambda c: c["config"]["layers"][1].update(name={"a": 1})),
    "a version in HDF5": _h5("branches_old.h5", lambda f: f.attrs.__setitem__("keras_version", "²")),
    "a version in a description": _json(lambda c: c.update(keras_version="²")),
    "a newer version": _h5(
        "branches.h5",
        lambda f: f.attrs.update({"keras_version": "3.²", "model_config": '{"class_name":"A","config":{}}'}),
    ),
    "weights of Keras 1 that are named by no list": _h5(
        "branches_first.h5", lambda f: f["model_weights"].attrs.__setitem__("layer_names", 3)
    ),
    "weights of Keras 1 of a layer that is absent": _h5(
        "branches_first.h5", lambda f: f["model_weights"].__delitem__("left")
    ),
    "a slope that is a text": _json(_instead("LeakyReLU", alpha="x")),
    "a slope that is too large": _json(_instead("LeakyReLU", alpha=10**400)),
}


@pytest.mark.parametrize("case", FOUND)
def test_a_file_that_was_found_is_refused_in_one_line(case, seeds, tmp_path):
    path, weights = FOUND[case](seeds, tmp_path)
    ended = fuzzing.verdict(path, weights)
    assert ended.fine, ended
