"""Migrate: an old model file in, a clean Keras 3 file out that is proven to be the same model.

    witness     the old file, run by the Keras that it was made for
    new         the new file, read back by Keras from the very bytes that will stand at the output
    reference   the new model evaluated in float64

The witness of a Keras 1 or 2 file is tf_keras, the maintained legacy package, in a process of its own
(`deploykit.runtimes.tf_keras_process`). A file saved by Keras 3 is its own generation already: there the witness is
plain `keras.models.load_model` on the old file, and what is proven is that rewriting it changed nothing.

The comparison is `deploykit.verify`'s: whole output, each sample, worst element, top-1; integers must be equal.

    float64     the witness in float64 too. Both evaluate the same algebra, in another order, so they may differ by what
                that amounts to: 1e-12 and 32 times the float64 noise of `deploykit.fuse.proof`, and 2 and 4 times as
                much noise in the worst sample and element
    float32     where the witness cannot be built in float64, or does not compute in float64 throughout and misses the
                float64 bound: its float32 run, judged by the new model's own float32 error (policy ``float32``)

A witness that disagrees ends it: ProofError, nothing is written, and no option helps. Where nothing can be proven (no
tf_keras, a file that it cannot read, an output that hardly varies between inputs) nothing is written either, unless
the caller asks for an unproven file. Theano's kernels are such a case: tf_keras reads them without turning them.

Safety. tf_keras runs bytecode and imports modules at the word of a file. It gets a private copy, and only after that
copy, not the original, has passed `deploykit.load` once more and its description, as it stands in the file, names
nothing but Keras' own parts: what is dropped when Keras 3 layers are made (a regularizer, an operation on which no
output depends) tf_keras would still build, and call. The graph of a SavedModel it runs whatever is in it, so that such
a folder is shown to it only where code was allowed.

Limits: user classes for Keras 3 are no use to tf_keras; a file that needs them cannot be proven.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import numpy.typing as npt

from deploykit import verify
from deploykit.archive import write_keras
from deploykit.compare import OutputComparison, Policy, all_passed, compare_outputs
from deploykit.data import Samples
from deploykit.deploy import Clock, DataOptions, Progress, samples_for, silent
from deploykit.errors import (
    DataError,
    DeploykitError,
    InputError,
    LoadError,
    MissingComponentError,
    ProofError,
    UnsupportedModelError,
)
from deploykit.files import claim, whole_file
from deploykit.fuse import proof as proofs
from deploykit.fuse.proof import Reference
from deploykit.graph import Trace, float32_only, replay, run, trace, values_per_sample
from deploykit.load import READERS, Loaded, load, state
from deploykit.load.contents import printable
from deploykit.load.legacy import operations
from deploykit.load.safety import examine
from deploykit.runtimes import tf_keras_process as process

Array = npt.NDArray[Any]

SAMPLES, LARGE_NET = 64, 2_000_000  # of a proof; nets that make more numbers from a sample get fewer samples
TIMEOUT_S = 1800.0
FLOAT64 = Policy(
    "float64",
    factor_whole=float(proofs.NOISE_FACTOR),
    factor_sample=2.0 * proofs.NOISE_FACTOR,
    factor_element=4.0 * proofs.NOISE_FACTOR,
    factor_top1=float(proofs.NOISE_FACTOR),
    floor_l2=proofs.FLOOR,
    floor_max=proofs.FLOOR,
    noise_limit=proofs.IRREPRODUCIBLE,
    default_noise=0.0,  # replaced by the model's own float64 noise
)

# Where a module in a description may point: Keras' own parts, by the names of its generations.
KERAS_MODULES = ("builtins", "keras", "tf_keras")

_HINT = "; --unproven writes it anyway"
_UNPROVABLE = (UnsupportedModelError, MissingComponentError, ProofError, DataError)
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from deploykit.runtimes.tf_keras_process import main; main(sys.argv[2])"
)


@dataclass(frozen=True, eq=False)
class Witness:
    """What the old model answered, in the order of its outputs.

    ``double``: in float64, None where it cannot be (``why``). ``float32_ops``: what in that run computes in less than
    float64. ``unlike``: how its inputs differ from the new model's, so that it was not run.
    """

    by: str
    names: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    own: tuple[Array, ...] = ()
    double: tuple[Array, ...] | None = None
    why: str | None = None
    float32_ops: tuple[str, ...] = ()
    unlike: str | None = None


@dataclass(frozen=True)
class Proof:
    """How the new model compares with the witness. Each output's ``error`` and ``bound`` are relative L2."""

    by: str
    precision: str
    why_not_float64: str | None
    samples: int
    data: str
    outputs: tuple[Mapping[str, Any], ...]
    reason: str | None = None

    @property
    def holds(self) -> bool:
        return self.reason is None

    @property
    def worst(self) -> Mapping[str, Any]:
        """The output nearest to its bound, or furthest beyond it."""
        judged = [output for output in self.outputs if output["error"] is not None] or [{"error": None, "bound": None}]
        return max(judged, key=lambda output: (output["error"] or 0.0) / (output["bound"] or 1.0))

    def to_json(self) -> dict[str, Any]:
        return {
            "by": self.by,
            "precision": self.precision,
            "why_not_float64": self.why_not_float64,
            "error": self.worst["error"],
            "bound": self.worst["bound"],
            "samples": self.samples,
            "data": self.data,
            "outputs": [dict(output) for output in self.outputs],
        }


@dataclass(frozen=True, eq=False)
class Migrated:
    """A migration that ended: ``path`` is None where nothing was written, ``reason`` says why it is not proven."""

    path: Path | None
    proof: Proof | None
    reason: str | None
    notices: tuple[str, ...] = ()
    bytes: int | None = None

    @property
    def proven(self) -> bool:
        return self.reason is None

    def to_json(self, loaded: Loaded) -> dict[str, Any]:
        """The keys of ``deploykit.migrate/1``."""
        return {
            "format": loaded.format,
            "saved_by": loaded.saved_by,
            "backend": loaded.backend,
            "size_bytes": {"before": loaded.bytes, "after": self.bytes},
            "proof": None if self.proof is None else self.proof.to_json(),
        }


class NotProvenError(ProofError):
    """The witness disagrees, or the samples prove nothing; ``found`` is what there is to report."""

    def __init__(self, found: Migrated) -> None:
        super().__init__(found.reason or "")
        self.found = found


def migrate(
    loaded: Loaded,
    output: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    data: DataOptions | None = None,
    unproven: bool = False,
    force: bool = False,
    progress: Progress = silent,
    clock: Clock | None = None,
) -> Migrated:
    """Write a loaded model as a Keras 3 file, if its own generation agrees with it.

    ``weights``: the file that it was filled from. ``unproven``: write it too where nothing can be proven.
    Raises NotProvenError when the witness disagrees or the samples prove nothing, UnsupportedModelError or
    MissingComponentError when there is no witness; nothing is written then.
    """
    data, clock = data or DataOptions(), clock or Clock()
    if Path(output).suffix != ".keras":
        raise InputError(f"-o {output}: a migrated model is written as .keras; give a name that ends so")
    if loaded.opaque is not None:
        raise UnsupportedModelError(
            f"{loaded.path} is a TensorFlow graph without Keras layers, which no .keras file can hold; "
            "`deploykit export` takes it as it is"
        )
    claim(output, force=force, inputs=(loaded.path, weights, data.data))
    with tempfile.TemporaryDirectory(prefix="deploykit-") as scratch, state.undisturbed():
        room = Path(scratch)
        progress("writing")
        written = write_keras(loaded.model, room / "new.keras")
        clock.lap("write")
        size = written.stat().st_size
        proof, reason = None, None
        try:
            proof = _proven(loaded, written, weights, data, room, progress, clock)
        except _UNPROVABLE as error:
            if isinstance(error, DataError) and data.data is not None:
                raise
            reason = str(error)
            if not unproven and isinstance(error, ProofError):
                raise NotProvenError(Migrated(None, None, f"{loaded.path}: {reason}{_HINT}")) from error
            if not unproven:
                raise type(error)(f"{reason}{_HINT}") from error
        if proof is not None and not proof.holds:
            what = f"{loaded.path}: {proof.by} answers otherwise than the new model ({proof.reason})"
            raise NotProvenError(Migrated(None, proof, f"{what}; nothing was written"))
        with whole_file(output, force=force) as target:
            shutil.copyfile(written, target)
    return Migrated(Path(output), proof, reason, tuple(_drift(proof)) if proof is not None else (), size)


def _proven(
    loaded: Loaded,
    written: Path,
    weights: str | os.PathLike[str] | None,
    data: DataOptions,
    room: Path,
    progress: Progress,
    clock: Clock,
) -> Proof:
    safe = not loaded.options["allow_code"]
    if loaded.generation == 1:  # its description is rewritten before it is scanned: tf_keras must not see the file
        raise UnsupportedModelError(f"{loaded.path} was saved by Keras 1, which no maintained package reads")
    with loaded.scope():
        new = _read_back(written, safe)
        found = trace(new)
        samples = _samples(new, found, data)
        progress("evaluating the new model in float64")
        reference = proofs.reference(found, new, samples.arrays, data.seed)
        if not any(reference.evidence[: len(found.outputs)]):
            raise ProofError(
                "no output of the model varies between the inputs of the proof, so nothing can be proven; "
                "give real inputs with --data"
            )
        clock.lap("reference")
        copy, filled = _private_copy(loaded, weights, room)
        if loaded.generation is not None and loaded.generation >= 3:
            progress("running the old file in Keras")
            witness = _keras(copy, filled, samples.arrays, reference.batch, safe)
        else:
            progress("running the old file in tf_keras")
            _refuse_code(loaded, copy)
            witness = _tf_keras(loaded, copy, filled, found, samples.arrays, reference.batch, room)
        clock.lap("witness")
    return judge(found, reference, witness, samples.source)


def _read_back(path: Path, safe: bool) -> Any:
    try:
        return keras.models.load_model(path, compile=False, safe_mode=safe)
    except Exception as error:  # a custom layer's from_config may raise anything
        raise UnsupportedModelError(f"Keras cannot read back what it wrote ({_line(error)})") from error


def _samples(new: Any, found: Trace, data: DataOptions) -> Samples:
    many = values_per_sample(found) < LARGE_NET
    count = data.limit or (SAMPLES if many else proofs.proof_count(found))
    return samples_for(new, replace(data, limit=count)).head(count)


# ------------------------------------------------------------------------------------------------- the old file


def _suffix(path: Path) -> str:
    """The ending by which tf_keras and Keras choose the right reader for these bytes."""
    with open(path, "rb") as stream:
        if stream.read(2) == b"PK":
            return ".keras"
    return ".h5" if h5py.is_hdf5(path) else ".json"


def _weights_suffix(path: Path) -> str:
    suffix = _suffix(path)
    if suffix != ".h5":
        return suffix
    with h5py.File(path, "r") as file:
        return ".h5" if "layer_names" in file.attrs or "model_weights" in file else ".weights.h5"


def _private_copy(loaded: Loaded, weights: str | os.PathLike[str] | None, room: Path) -> tuple[Path, Path | None]:
    """A copy of the old file (and of its weights) that nobody else can change, judged by itself.

    Raises LoadError when it is not what was loaded.
    """
    changed = LoadError(f"{loaded.path} changed while it was being read; run it again when nothing writes to it")
    try:
        if loaded.path.is_dir():
            copy = Path(shutil.copytree(loaded.path, room / "old"))
        else:
            copy = Path(shutil.copyfile(loaded.path, room / f"old{_suffix(loaded.path)}"))
        filled = None
        if weights is not None:
            filled = Path(shutil.copyfile(weights, room / f"weights{_weights_suffix(Path(weights))}"))
        again = load(copy, **{**loaded.options, "weights": filled, "allow_nonfinite": True})
    except (OSError, DeploykitError) as error:
        raise changed from error
    if again.sha256 != loaded.sha256:
        raise changed
    return copy, filled


def _refuse_code(loaded: Loaded, copy: Path) -> None:
    """Raise where tf_keras would run or import what the file names; see the module's docstring."""
    if loaded.options["allow_code"]:
        return
    if copy.is_dir():
        raise UnsupportedModelError(
            f"{loaded.path} is a SavedModel folder, whose graph tf_keras runs as it loads it; "
            "--allow-code lets it, if you trust its author"
        )
    config = next(reader for reader in READERS if reader.format == loaded.format).peek(copy).config
    found = [*examine(config, {}, str(loaded.path)).code, *_foreign(config), *_operations(config)]
    if found:
        raise UnsupportedModelError(
            f"{loaded.path} cannot be proven: tf_keras would act on what the file names and was not run ({found[0]})"
        )


def _foreign(config: Any) -> Iterator[str]:
    """Objects that tf_keras would look up in a module that is not Keras', or among Python's built-ins."""
    stack = [config]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack.extend(node)
        if not isinstance(node, dict):
            continue
        stack.extend(node.values())
        module, name = node.get("module"), node.get("class_name")
        if isinstance(module, str) and "class_name" in node and module.partition(".")[0] not in KERAS_MODULES:
            yield f"{printable(str(name))} of the module {printable(module)}"
        if node.get("class_name") == "function" and module not in (None, "builtins", "keras.activations"):
            yield f"the function {printable(str(node.get('config')))} of the module {printable(str(module))}"
        bytecode = [key for key, value in node.items() if str(key).endswith("_type") and value == "lambda"]
        if bytecode:
            yield f"{printable(str(bytecode[0]))}: Python bytecode"


def _operations(config: Any) -> Iterator[str]:
    """Operations outside the table: tf_keras calls any function of TensorFlow, on constants at once, as it loads."""
    stack = [config]
    while stack:
        node = stack.pop()
        stack.extend(node if isinstance(node, list) else node.values() if isinstance(node, dict) else ())
        kind, inner = (node.get("class_name"), node.get("config")) if isinstance(node, dict) else (None, None)
        known = isinstance(inner, dict) and isinstance(kind, str) and operations.known(kind, inner)
        if isinstance(kind, str) and kind in operations.CLASSES and not known:
            yield f"the operation {printable(str(inner))}"


# ------------------------------------------------------------------------------------------------ its witnesses


def _keras(copy: Path, filled: Path | None, arrays: Mapping[str, Array], batch: int, safe: bool) -> Witness:
    """A Keras 3 file in Keras itself."""
    try:
        old = keras.models.load_model(copy, compile=False, safe_mode=safe)
        if filled is not None:
            old.load_weights(filled)
    except Exception as error:  # whatever Keras raises
        raise UnsupportedModelError(
            f"Keras {keras.__version__} itself cannot load the old file ({_line(error)})"
        ) from error
    found = trace(old)
    specs, names = found.signature.outputs, [spec.name for spec in found.signature.inputs]
    given, by = list(arrays.values()), f"keras {keras.__version__}"
    given = [given[place] for place in process.paired(names, list(arrays))]
    if other := process.unlike(names, [spec.shape for spec in found.signature.inputs], given):
        return Witness(by, unlike=other)
    fed = dict(zip(names, given, strict=True))
    return Witness(
        by=by,
        names=tuple(spec.name for spec in specs),
        dtypes=tuple(spec.dtype for spec in specs),
        own=tuple(run(old, fed, batch=batch)),
        double=tuple(run(replay(found, dtype="float64"), fed, batch=batch)),
        float32_ops=float32_only(found),
    )


def _tf_keras(
    loaded: Loaded,
    copy: Path,
    filled: Path | None,
    found: Trace,
    arrays: Mapping[str, Array],
    batch: int,
    room: Path,
) -> Witness:
    """An older file in tf_keras, in a process of its own."""
    if loaded.backend not in (None, "tensorflow"):
        raise UnsupportedModelError(
            f"{loaded.path} was saved by Keras on {loaded.backend} and cannot be proven: tf_keras reads its weights as "
            "if TensorFlow had written them"
        )
    names = [spec.name for spec in found.signature.inputs]
    job = {
        "model": str(copy),
        "weights": None if filled is None else str(filled),
        "inputs": names,
        "batch": batch,
        "allow_code": bool(loaded.options["allow_code"]),
    }
    fed = {str(place): arrays[name] for place, name in enumerate(names)}
    np.savez(room / process.INPUTS, allow_pickle=False, **fed)
    (room / process.JOB).write_text(json.dumps(job), "utf-8")
    _finished(room, str(loaded.path))
    answer = json.loads((room / process.ANSWER).read_text("utf-8"))
    if "failed" in answer:
        raise _explained(loaded, answer)
    if "unlike" in answer:
        return Witness(answer["by"], unlike=answer["unlike"])
    with np.load(room / process.OUTPUTS, allow_pickle=False) as stored:
        own, double = (
            tuple(stored[f"{kind}.{i}"] for i in range(len(answer["outputs"])) if f"{kind}.{i}" in stored.files)
            for kind in ("run", "double")
        )
    return Witness(
        by=answer["by"],
        names=tuple(answer["outputs"]),
        dtypes=tuple(answer["dtypes"]),
        own=own,
        double=double or None,
        why=answer["why"],
        float32_ops=tuple(answer["float32_ops"]),
    )


def _finished(room: Path, what: str) -> None:
    """Run the process to its end. It finds modules where this process does, and its chatter goes into a file."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1", "TMPDIR": str(room)}
    with open(room / "log", "wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, json.dumps(sys.path), str(room)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **quiet},
            start_new_session=True,  # Ctrl-C ends this process, which ends that one
        )
        try:
            code = worker.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise UnsupportedModelError(
                f"{what}: tf_keras did not finish within {TIMEOUT_S / 60:.0f} minutes; give fewer --samples"
            ) from None
        finally:
            worker.kill()
            worker.wait()
    if not (room / process.ANSWER).is_file():
        cause = f"signal {-code}" if code < 0 else f"exit code {code}"
        hint = " (out of memory?)" if code == -9 else ""
        raise UnsupportedModelError(f"{what}: the process of tf_keras ended with {cause}{hint}")


def _explained(loaded: Loaded, answer: Mapping[str, str]) -> InputError:
    """The error for a job that failed."""
    if answer["stage"] == "missing":
        return MissingComponentError(
            f"{loaded.path} was saved by {_origin(loaded)} and is proven by tf_keras, which is not installed; "
            "install it with: pip install 'deploykit[legacy]'"
        )
    did = {"import": "be imported", "load": "load it", "run": "run it"}[answer["stage"]]
    own = " (classes given with --custom-objects are for Keras 3, and no use there)"
    given = own if loaded.options["custom_objects"] else ""
    return UnsupportedModelError(f"{loaded.path} cannot be proven: tf_keras cannot {did}: {answer['failed']}{given}")


def _origin(loaded: Loaded) -> str:
    return f"Keras {loaded.saved_by}" if loaded.saved_by else "an old Keras"


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


# ------------------------------------------------------------------------------------------------- the verdict


def judge(found: Trace, reference: Reference, witness: Witness, data: str) -> Proof:
    """Compare a witness with the new model: in float64 where both compute so, else in float32."""
    names = [spec.name for spec in found.signature.outputs]
    count = len(next(iter(reference.samples.values())))
    unlike = witness.unlike
    if unlike is None and len(witness.own) != len(names):
        unlike = f"it has {len(witness.own)} outputs there and {len(names)} here"
    if unlike is not None:
        return Proof(witness.by, "float32", witness.why, count, data, (), unlike)
    single = (*witness.float32_ops, *float32_only(found))
    why = witness.why
    if witness.double is not None:
        proof = _compared(found, reference, witness, "float64", None, count, data)
        if proof.holds or not single:
            return proof
        why = f"in float32 whatever the dtype: {', '.join(dict.fromkeys(single))}"
    return _compared(found, reference, witness, "float32", why, count, data)


def _compared(
    found: Trace, reference: Reference, witness: Witness, precision: str, why: str | None, count: int, data: str
) -> Proof:
    names = [spec.name for spec in found.signature.outputs]
    right = dict(zip(names, reference.outputs, strict=False))
    own = {name: _plain(output) for name, output in zip(names, reference.float32, strict=False)}
    original: dict[str, Array] | None
    if precision == "float64":
        policy, original, answers = replace(FLOAT64, default_noise=reference.noise), None, witness.double or ()
        noise = dict.fromkeys(names, reference.noise)
    else:
        policy, original, answers = verify.FLOAT32, own, witness.own
        noise = {name: proofs.distance(own[name], right[name]) for name in names}
    wanted = right if original is None else original
    theirs = {name: _cast(output, wanted[name]) for name, output in zip(names, answers, strict=True)}
    compared = compare_outputs(right, original, theirs, policy)
    outputs = tuple(
        _output(
            comparison,
            proofs.distance(theirs[comparison.name], right[comparison.name]),
            policy.factor_whole * noise[comparison.name] + policy.floor_l2,
            old=old,
            dtypes=(dtype, spec.dtype),
        )
        for comparison, old, dtype, spec in zip(
            compared, witness.names, witness.dtypes, found.signature.outputs, strict=True
        )
    )
    reason = None if all_passed(compared) else _worst(compared)
    return Proof(witness.by, precision, why, count, data, outputs, reason)


def _plain(array: Array) -> Array:
    """numpy's own float types; bfloat16 is not one of them."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _cast(answer: Array, wanted: Array) -> Array:
    """An answer in the dtype it is compared in, where no value changes by that; else as it is."""
    if answer.dtype.kind == "f" and wanted.dtype == np.float64:
        return answer.astype(np.float64)
    if answer.dtype.kind in "iu" and wanted.dtype.kind in "iu":
        cast = answer.astype(wanted.dtype)
        return cast if np.array_equal(cast, answer) else answer
    return answer


def _output(
    comparison: OutputComparison, error: float, bound: float, *, old: str, dtypes: tuple[str, str]
) -> dict[str, Any]:
    kept = ("passed", "exact", "insensitive", "max_abs", "top1_agreement", "excluded", "worst_sample", "reason")
    found = comparison.to_json()
    return {
        "name": comparison.name,
        "old_name": old,
        "error": error if math.isfinite(error) else None,
        "bound": bound,
        "dtype": dtypes[1],
        "old_dtype": dtypes[0],
        **{key: found[key] for key in kept},
        "worst_index": found["worst_index"],
    }


def _worst(compared: Sequence[OutputComparison]) -> str:
    failed = [comparison for comparison in compared if not comparison.passed]
    more = f" (and {len(failed) - 1} more outputs)" if len(failed) > 1 else ""
    return f"output {failed[0].name}: {failed[0].reason}{more}"


def _drift(proof: Proof) -> Iterator[str]:
    for output in proof.outputs:
        if output["dtype"] != output["old_dtype"]:
            yield f"output {output['name']} is {output['dtype']} now and was {output['old_dtype']}"
