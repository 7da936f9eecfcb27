"""A model file is untrusted: what its description names is judged before Keras acts on it.

The description is JSON; every object in it that has a ``class_name`` is an order to build something. The
rule is a list of what is allowed, not of what is dangerous: Keras' own layers, operations, initializers
and the like, resolved here without importing anything; values such as tensors, slices and bytes; and what
the user gave. Everything else is one of two things:

- *code*: it would run code, or read files, at the word of the file: Lambda layers and pickled lambdas,
  layers that load a graph or a pickle from elsewhere, functions outside Keras' activations and the like,
  classes of the standard library, Keras names that are no part of a model (``get_file``), a built-in that
  poses as a registered object, and vocabularies given as a path. Refused unless code was allowed;
- *missing*: a class or function of the user's that was not given. All are collected, for one message.

This closes what Keras itself fixed over time and keeps it closed for every format: arbitrary ``module``
imports (CVE-2025-1550), ``get_file`` as a Lambda's function (CVE-2025-8747), switching safe mode off from
inside (CVE-2025-9906), bytecode in HDF5 files (CVE-2025-9905), vocabularies read from any path
(CVE-2025-12058). Keras' safe mode is on as well: this is a second lock, not a replacement.

Limits: a description may still demand layers too large for the machine; that ends in an error of the
backend, not in code being run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from deploykit.errors import LoadError
from deploykit.load.contents import printable
from deploykit.load.custom import lookup

VALUES = frozenset(
    (
        "__keras_tensor__",
        "__tensor__",
        "__numpy__",
        "__bytes__",
        "__ellipsis__",
        "__slice__",
        "__tuple__",
        "TensorShape",
    )
)

# Markers that Keras or TensorFlow turn into code, or into a type that the file picks.
CODE_MARKERS = {
    "__lambda__": "holds Python bytecode",
    "__typespec__": "picks a TensorFlow type",
    "TypeSpec": "picks a TensorFlow type",
    "CompositeTensor": "picks a TensorFlow type",
}

CODE_CLASSES = {
    "Lambda": "is a Lambda layer",
    "TFSMLayer": "loads a TensorFlow graph from a path",
    "TorchModuleWrapper": "holds a pickled PyTorch module",
    "JaxLayer": "calls a function that the file names",
    "FlaxLayer": "calls a function that the file names",
}

# Keys of lookup layers that hold words, or the path of a file to read them from.
PATH_KEYS = ("vocabulary", "idf_weights")

ALLOWED_BASES = (
    keras.Layer,
    keras.Operation,
    keras.initializers.Initializer,
    keras.regularizers.Regularizer,
    keras.constraints.Constraint,
    keras.DTypePolicy,
    keras.dtype_policies.DTypePolicyMap,
    keras.random.SeedGenerator,
    keras.quantizers.Quantizer,
    keras.quantizers.QuantizationConfig,
    keras.losses.Loss,
    keras.metrics.Metric,
    keras.optimizers.Optimizer,
    keras.optimizers.schedules.LearningRateSchedule,
)

# Where a class without a module (Keras 2) is looked up, in Keras' own order.
NAMESPACES = (
    "keras.layers",
    "keras.models",
    "keras.src.models",
    "keras.initializers",
    "keras.regularizers",
    "keras.constraints",
    "keras",
)

# Keras 3 writes functions with module "builtins"; "keras.ops" holds tensor functions only.
FUNCTION_SPACES = tuple(
    f"keras.{name}"
    for name in ("activations", "constraints", "initializers", "losses", "metrics", "optimizers", "regularizers", "ops")
)
NOT_TENSOR_FUNCTIONS = frozenset(("get", "serialize", "deserialize"))

# Strings inside a built-in layer's config that name a function or a class.
NAMED_BY_STRING: dict[str, Callable[[str], object]] = {
    "activation": keras.activations.get,
    "initializer": keras.initializers.get,
    "regularizer": keras.regularizers.get,
    "constraint": keras.constraints.get,
}

FOREIGN = sys.stdlib_module_names | {"numpy", "tensorflow", "torch", "jax", "h5py", "pip", "setuptools"}


@dataclass(frozen=True)
class Findings:
    """What a description asks for beyond Keras' own parts.

    ``code``: what would run code. ``missing``: names that were not given, with where they are needed.
    ``untrained``: names that were not given and serve training alone -> what stands in for them. ``renamed``:
    given objects under the names that the file uses. ``parts``: how many objects are to be built.
    """

    code: tuple[str, ...]
    missing: tuple[str, ...]
    untrained: Mapping[str, type]
    renamed: Mapping[str, Any]
    parts: int


class _Initializer(keras.initializers.Zeros):  # type: ignore[misc]
    """Stands in for an initializer of the user's: the weights come from the file."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Any:
        return keras.initializers.Zeros()


class _Regularizer(keras.regularizers.Regularizer):  # type: ignore[misc]
    """Stands in for a regularizer of the user's."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Any:
        return keras.regularizers.L2(0.0)


class _Constraint(keras.constraints.Constraint):  # type: ignore[misc]
    """Stands in for a constraint of the user's."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Any:
        return keras.constraints.Constraint()


# Arguments of built-in layers that training alone reads: by the last word of their name.
TRAINING: Mapping[str, type] = {"initializer": _Initializer, "regularizer": _Regularizer, "constraint": _Constraint}


def examine(config: Mapping[str, Any], given: Mapping[str, Any], what: str = "the model") -> Findings:
    """Judge everything that a model's description names; nothing is imported, built or called.

    The training configuration at the top is left out: it is never used. Raises LoadError, naming
    ``what``, for a description that is not even well formed.
    """
    code: dict[str, None] = {}
    missing: dict[str, list[str]] = {}  # name -> where it is needed
    untrained: dict[str, type] = {}
    renamed: dict[str, Any] = {}
    parts = 0
    root = {key: config[key] for key in config if key != "compile_config"}
    stack: list[tuple[Any, str, str]] = [(root, "the model", "")]
    while stack:
        node, owner, key = stack.pop()
        if isinstance(node, (list, tuple)):
            stack.extend((item, owner, "") for item in reversed(node))
        if not isinstance(node, dict):
            continue
        for name in PATH_KEYS:
            if isinstance(node.get(name), str):
                code[f"{owner} reads the file {printable(node[name])!r} as its {name}"] = None
        if "class_name" in node:
            inner = node.get("config")
            parts += 1
            if isinstance(inner, dict) and isinstance(inner.get("name"), str):
                owner = f"layer {printable(inner['name'])!r}"
            try:
                verdict = _judge(node, given)
            except TypeError as error:
                raise LoadError(f"{what} is damaged: {owner} {error}; copy or save it again") from error
            stand_in = TRAINING.get(key.rpartition("_")[2])
            if verdict.code:
                code[f"{owner} {printable(verdict.code)}"] = None
            elif verdict.missing and stand_in is not None and isinstance(inner, dict):
                untrained[str(node.get("registered_name") or node["class_name"])] = stand_in
                continue  # nothing of it is built
            elif verdict.missing:
                missing.setdefault(printable(verdict.missing), []).append(owner)
            renamed.update(verdict.renamed)
            if verdict.built_in and isinstance(inner, dict):
                for name in _unknown_strings(inner, given):
                    missing.setdefault(name, []).append(owner)
        stack.extend((value, owner, key) for key, value in reversed(list(node.items())))
    return Findings(tuple(code), tuple(map(_where, missing.items())), untrained, renamed, parts)


def _where(needed: tuple[str, Sequence[str]]) -> str:
    """``Scale (of layer 'a' and 2 more)``"""
    name, owners = needed
    places = list(dict.fromkeys(owner for owner in owners if owner != "the model"))
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    return f"{name} (of {places[0]}{more})" if places else name


@dataclass(frozen=True)
class _Verdict:
    code: str = ""
    missing: str = ""
    renamed: tuple[tuple[str, Any], ...] = ()
    built_in: bool = False


_FINE = _Verdict()


def _judge(node: Mapping[str, Any], given: Mapping[str, Any]) -> _Verdict:
    name, module = node["class_name"], node.get("module")
    if not isinstance(name, str) or not isinstance(module, (str, type(None))):
        raise TypeError(f"names a class by {type(name).__name__}, not by a string")
    if name in CODE_MARKERS:
        return _Verdict(code=CODE_MARKERS[name])
    if name in VALUES or "config" not in node:
        return _FINE
    if name == "function":
        return _judge_function(node, module, given)
    # Without a module Keras goes by the class name alone, whatever else is registered.
    registered = (node.get("registered_name") or name) if "module" in node else name
    if not isinstance(registered, str):
        raise TypeError(f"registers {name!r} under {type(registered).__name__}, not under a string")
    if name in CODE_CLASSES:
        harmless = name == "Lambda" and _calls_given(node["config"], given)
        return _FINE if harmless else _Verdict(code=CODE_CLASSES[name])
    custom = lookup(given, registered)
    if custom is None and module is not None and not _of_keras(module):
        custom = lookup(given, name)
    if custom is not None:
        # Keras 2's format calls whatever bears the name, with arguments from the file.
        if not (isinstance(custom, type) and (issubclass(custom, ALLOWED_BASES) or hasattr(custom, "from_config"))):
            return _Verdict(code=f"would call {name}, which is no Keras class")
        return _Verdict(renamed=((registered, custom),))
    return _judge_class(name, module, registered)


def _judge_class(name: str, module: str | None, registered: str) -> _Verdict:
    spaces = NAMESPACES if module is None else (module,)
    found = None
    if module is None or _of_keras(module):
        found = next(
            (vars(sys.modules[s])[name] for s in spaces if s in sys.modules and name in vars(sys.modules[s])), None
        )
    if found is None:
        if module is not None and module.partition(".")[0] in FOREIGN:
            return _Verdict(code=f"names {module}.{name}, which is no part of a model")
        return _Verdict(missing=_label(registered, module))
    if not (isinstance(found, type) and issubclass(found, ALLOWED_BASES)):
        return _Verdict(code=f"names {module or 'keras'}.{name}, which is no part of a model")
    if registered != name:
        return _Verdict(code=f"is Keras' {name} but poses as {registered!r}")
    return _Verdict(built_in=True)


def _judge_function(node: Mapping[str, Any], module: str | None, given: Mapping[str, Any]) -> _Verdict:
    name = node["config"]
    if not isinstance(name, str):
        raise TypeError(f"names a function by {type(name).__name__}, not by a string")
    registered = node.get("registered_name")
    custom = lookup(given, name)
    if custom is None and isinstance(registered, str):
        custom = lookup(given, registered)
    if custom is not None:
        return _Verdict(renamed=((name, custom),))
    spaces = FUNCTION_SPACES if module in (None, "builtins") else (module,)
    for space in spaces:
        if (
            space in FUNCTION_SPACES
            and name not in NOT_TENSOR_FUNCTIONS
            and callable(vars(sys.modules[space]).get(name))
        ):
            return _FINE
    if module is not None and module != "builtins" and (_of_keras(module) or module.partition(".")[0] in FOREIGN):
        return _Verdict(code=f"names the function {module}.{name}, which is no part of a model")
    return _Verdict(missing=_label(name, module if module != "builtins" else None))


def _calls_given(config: object, given: Mapping[str, Any]) -> bool:
    """A Lambda whose function is one that the user gave."""
    function = config.get("function") if isinstance(config, dict) else None
    if isinstance(function, dict) and function.get("class_name") == "function":
        function = function.get("config")
    return isinstance(function, str) and lookup(given, function) is not None


def _unknown_strings(config: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    unknown = []
    for key, value in config.items():
        kind = key.rpartition("_")[2]
        if isinstance(value, str) and kind in NAMED_BY_STRING and lookup(given, value) is None:
            try:
                NAMED_BY_STRING[kind](value)
            except (ValueError, TypeError):
                unknown.append(printable(f"{value} ({key})"))
    return unknown


def _of_keras(module: str) -> bool:
    return module == "keras" or module.startswith("keras.")


def _label(name: str, module: str | None) -> str:
    return f"{name} ({module})" if module and module != "__main__" else name
