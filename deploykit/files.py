"""Files that are whole or absent.

Every output is written under a temporary name in the folder it belongs to and renamed when it is
complete, so a killed run, a full disk or an error leaves what was there before and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from deploykit.errors import InputError, OutputError
from deploykit.modules import place_and_name

Target = str | os.PathLike[str] | None


def data_path(model: str | os.PathLike[str]) -> Path:
    """Where the weights of an .onnx file lie that is too large for one file."""
    return Path(f"{os.fspath(model)}.data")


def _sources(given: str | os.PathLike[str]) -> Iterator[Path]:
    """What is there of an input: itself, the weights beside it, the file of ``file.py:name``."""
    found = Path(given), data_path(given), Path(place_and_name(os.fspath(given))[0])
    return (path for path in found if path.exists())


def _overlap(one: Path, other: Path) -> bool:
    """Whether two paths are one place or one lies in the other; a symbolic link is where it lies and what it names."""
    places = [(path.resolve(), path.parent.resolve() / path.name) for path in (one, other)]
    return any(a.is_relative_to(b) or b.is_relative_to(a) for a, b in itertools.product(*places))


def claim(
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    folder: str | None = None,
    inputs: Sequence[Target] = (),
) -> Path:
    """Check, before any work is done, that ``path`` may be written; return it as a Path.

    Raises OutputError when it exists and ``force`` is not set, when its parent is no folder, or
    when the folder cannot be written to. Parents are created only when the output is.
    ``folder``: the output is a folder, and only one that is empty or holds a file of this name may be
    replaced. ``inputs``: what is read: models, data, code (``file.py:name``); the output may not be one of them, nor
    hold one, nor lie in one.
    """
    path = Path(path)
    if path.is_dir() and not folder:
        raise OutputError(f"{path} is a folder; give the name of a file")
    if path.exists() and not force:
        raise OutputError(f"{path} exists already; give another -o, or --force to replace it")
    for given in inputs:
        if given is not None and any(_overlap(path, source) for source in _sources(given)):
            raise OutputError(f"writing {path} would replace the input {given} or a part of it; choose another path")
    if folder and path.is_dir() and any(path.iterdir()) and not (path / folder).is_file():
        raise OutputError(f"{path} is a folder with other things in it, not a bundle; choose another -o")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"cannot write {path}: {parent} is a file, not a folder; choose another -o")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write {path}: no permission to write in {parent}; choose another -o")
    return path


def apart(targets: Mapping[str, Target]) -> None:
    """Raise InputError where two outputs, by option, are one place or one lies in the other. ``-`` is no place."""
    given = [(option, Path(path)) for option, path in targets.items() if path is not None and str(path) != "-"]
    for (option, path), (other, there) in itertools.combinations(given, 2):
        if _overlap(path, there):
            raise InputError(
                f"{option} {path} and {other} {there} name the same file, or one inside the other; "
                "give each a place of its own"
            )


def _explained(path: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(f"cannot write {path}: {reason.lower()}; free some space or choose another -o")


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Give a temporary path with the same suffix beside ``path``; rename it when the block ends well.

    The temporary file is removed when the block raises. OSErrors (a full disk) become OutputError.
    """
    path = claim(path, force=force)
    temporary: Path | None = None
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.absolute().parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise _explained(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str], *, mark: str, force: bool = False) -> Iterator[Path]:
    """The same for a folder. With ``force`` an old one, known by its file ``mark``, is moved aside and deleted last."""
    path = claim(path, force=force, folder=mark)
    temporary: Path | None = None
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.absolute().parent))
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o777 & ~umask)
        if path.is_dir() and not path.is_symlink():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.absolute().parent))
            os.replace(path, old / "old")
            os.replace(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
            os.replace(temporary, path)
    except OSError as error:
        raise _explained(path, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces of one MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
