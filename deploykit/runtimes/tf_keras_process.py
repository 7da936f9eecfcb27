"""The old model in its own generation: tf_keras, in a process of its own; the far end of `deploykit.migrate`.

    main(FOLDER)    reads FOLDER/job.json and FOLDER/inputs.npz, writes FOLDER/outputs.npz, then FOLDER/answer.json

The job: ``model`` and ``weights`` (paths under names whose endings tf_keras chooses its readers by; weights may be
null), ``inputs`` (the new model's input names; array i of inputs.npz is called ``i``), ``batch``, ``allow_code``.
The answer: ``by``, ``outputs`` (names), ``dtypes``, ``why`` (why there is no float64 run, or null),
``float32_ops``; or ``by`` and ``unlike`` (how its inputs differ); or ``failed`` and the ``stage`` in which it failed:
missing (tf_keras is not installed), import, load or run.

Two runs. *As it is*: the model as tf_keras reads it (arrays ``run.0``, ``run.1``, ...). *In float64*: the model built
again from its own JSON with every float type replaced by float64, and given the same weights (``double.0``, ...).
Whether that run is float64 throughout is read off the traced graph: an operation that still gives a narrower float
is named in ``float32_ops`` (TensorFlow resizes images in float32 whatever it is given).

This process trusts the file: whoever starts it has judged the very bytes that it reads.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

JOB, INPUTS, OUTPUTS, ANSWER = "job.json", "inputs.npz", "outputs.npz", "answer.json"
REASON_LENGTH = 240

# Every spelling of a narrower float in a model's JSON: dtypes, names of policies, node attributes of TensorFlowOpLayer.
WIDER = {
    **dict.fromkeys(("float16", "bfloat16", "float32", "mixed_float16", "mixed_bfloat16"), "float64"),
    **dict.fromkeys(("DT_HALF", "DT_BFLOAT16", "DT_FLOAT"), "DT_DOUBLE"),
}

# Operations that hand on what others made: values as stored, and calls whose bodies are looked at themselves.
CARRIERS = {
    *("Const", "Identity", "IdentityN", "Placeholder", "ReadVariableOp", "VarHandleOp"),
    *("PartitionedCall", "StatefulPartitionedCall", "While", "StatelessWhile", "If", "StatelessIf", "Case"),
}


def paired(old: Sequence[str], new: Sequence[str]) -> list[int]:
    """For each input of the old model the position of the new one's: by name where the names agree, else by order."""
    return [list(new).index(name) for name in old] if sorted(old) == sorted(new) else list(range(len(new)))


def unlike(names: Sequence[str], shapes: Sequence[Sequence[int | None]], fed: Sequence[Array]) -> str | None:
    """How a model's inputs differ from the arrays that another model takes, in their order; None where they do not."""
    if len(names) != len(fed):
        return f"it has {len(names)} inputs there and {len(fed)} here"
    for name, shape, array in zip(names, shapes, fed, strict=True):
        sizes = list(array.shape[1:])
        if len(shape) != array.ndim or any(w not in (None, h) for w, h in zip(shape[1:], sizes, strict=True)):
            return f"its input {name} takes {list(shape[1:])} there and {sizes} here"
    return None


def widened(value: Any) -> Any:
    """A model's JSON with every narrower float type, and every policy, replaced by float64; names stay."""
    if isinstance(value, dict):
        if str(value.get("class_name")).endswith("Policy"):
            return "float64"
        return {key: item if key == "name" else widened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [widened(item) for item in value]
    return WIDER.get(value, value) if isinstance(value, str) else value


def _types(node: Any, registry: Any) -> Iterator[int]:
    """The types of a graph node's outputs, as its operation defines them."""
    definition = registry.get(node.op)
    for output in definition.output_arg if definition is not None else ():
        if output.type_list_attr:
            yield from node.attr[output.type_list_attr].list.type
        else:
            yield node.attr[output.type_attr].type if output.type_attr else output.type


def _narrow(tf: Any, graph: Any) -> list[str]:
    """The operations of a graph, at any depth, that compute in a narrower float than float64."""
    from tensorflow.python.framework import op_def_registry  # no public name for it

    narrow = {dtype.as_datatype_enum for dtype in (tf.float16, tf.bfloat16, tf.float32)}
    whole = graph.as_graph_def()
    nodes = [node for part in (whole.node, *(f.node_def for f in whole.library.function)) for node in part]
    found = (node for node in nodes if node.op not in CARRIERS)
    return sorted({node.op for node in found if narrow & set(_types(node, op_def_registry))})


def _run(tf: Any, model: Any, arrays: Sequence[Array], batch: int) -> tuple[list[Any], list[str]]:
    """The outputs, and the operations that are not float64."""
    specs = [tf.TensorSpec(symbol.shape, symbol.dtype) for symbol in model.inputs]

    def call(*tensors: Any) -> list[Any]:
        return list(tf.nest.flatten(model(tensors[0] if len(tensors) == 1 else list(tensors), training=False)))

    traced = tf.function(call, autograph=False).get_concrete_function(*specs)
    with contextlib.suppress(AttributeError):  # a model without recurrent layers may have no states to reset
        model.reset_states()
    fixed = specs[0].shape[0]
    size, pieces = fixed or batch, []
    for start in range(0, len(arrays[0]), size):
        parts = [array[start : start + size] for array in arrays]
        count = len(parts[0])
        if fixed and count < fixed:  # a model of one batch size gets the last sample again
            parts = [np.concatenate([part, np.repeat(part[-1:], fixed - count, axis=0)]) for part in parts]
        tensors = [tf.cast(tf.constant(part), spec.dtype) for part, spec in zip(parts, specs, strict=True)]
        outputs = traced(*tensors)
        pieces.append([tf.cast(o, tf.float32) if o.dtype == tf.bfloat16 else o for o in outputs])
        pieces[-1] = [np.asarray(output)[:count] for output in pieces[-1]]
    return [np.concatenate(parts) for parts in zip(*pieces, strict=True)], _narrow(tf, traced.graph)


def _load(keras: Any, job: Mapping[str, Any]) -> Any:
    path = str(job["model"])
    if path.endswith(".json"):
        model = keras.models.model_from_json(Path(path).read_text("utf-8"))
    else:
        model = keras.models.load_model(path, compile=False, safe_mode=not job["allow_code"])
    if job["weights"] is not None:
        model.load_weights(job["weights"])
    if not getattr(model, "inputs", None):
        raise ValueError("it does not know its own inputs")
    return model


def _in_float64(keras: Any, model: Any) -> Any:
    """The same model built again in float64, with the same weights."""
    keras.backend.set_floatx("float64")
    double = keras.models.model_from_json(json.dumps(widened(json.loads(model.to_json()))))
    double.set_weights(model.get_weights())
    for layer in double._flatten_layers():
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # what it computes with is derived from its weights
    return double


def _reason(error: Exception) -> str:
    """The line of a message that says what is wrong, without the advice behind it."""
    lines = [line.strip() for line in str(error).splitlines()]
    marks = (
        'File "',
        "Exception encountered",
        "Arguments received",
        "Detected at",
        "Graph execution error",
        "Call arguments",
    )
    said = next((line for line in lines if line and not line.startswith(marks)), type(error).__name__)
    return said.partition(". Please")[0][:REASON_LENGTH]


def answered(folder: Path) -> dict[str, Any]:
    """Do the job of a folder."""
    job = json.loads((folder / JOB).read_text("utf-8"))
    with np.load(folder / INPUTS, allow_pickle=False) as stored:
        arrays = [stored[str(index)] for index in range(len(job["inputs"]))]
    if importlib.util.find_spec("tf_keras") is None:
        return {"failed": "tf_keras is not installed", "stage": "missing"}
    stage = "import"
    try:
        import tensorflow as tf
        import tf_keras as keras
        from tf_keras.src.saving.serialization_lib import SafeModeScope  # no public name for it

        stage = "load"
        with SafeModeScope(not job["allow_code"]):
            model = _load(keras, job)
            stage = "run"
            arrays = [arrays[place] for place in paired(model.input_names, job["inputs"])]
            if other := unlike(model.input_names, [symbol.shape.as_list() for symbol in model.inputs], arrays):
                return {"by": f"tf_keras {keras.__version__}", "unlike": other}
            outputs, _ = _run(tf, model, arrays, job["batch"])
            names, dtypes = list(model.output_names), [output.dtype.name for output in model.outputs]
            found = {f"run.{i}": output for i, output in enumerate(outputs)}
            why, narrow = None, list[str]()
            try:
                doubles, narrow = _run(tf, _in_float64(keras, model), arrays, job["batch"])
                found |= {f"double.{i}": output for i, output in enumerate(doubles)}
            except Exception as error:  # whatever a layer that knows float32 only raises
                why = f"tf_keras cannot build it in float64 ({_reason(error)})"
    except Exception as error:  # whatever tf_keras raises is the answer
        return {"failed": _reason(error), "stage": stage}
    np.savez(folder / OUTPUTS, **found)
    by = f"tf_keras {keras.__version__}"
    return {"by": by, "outputs": names, "dtypes": dtypes, "why": why, "float32_ops": narrow}


def _die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies (prctl(2))."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig, sigkill = 1, 9
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, sigkill, 0, 0, 0)


def main(folder: str) -> None:
    """Answer the job of ``folder``; the answer appears whole, after the arrays."""
    _die_with_parent()
    answer = Path(folder, ANSWER)
    partial = answer.with_suffix(".part")
    partial.write_text(json.dumps(answered(Path(folder))), "utf-8")
    partial.replace(answer)
