"""Audit: what of a model is trainable, what changed against its base, and the usual mistakes of transfer learning.

Each mistake is one row of `ROWS`: a code, a severity, what it means, what to do, and the judge that finds it. Findings
are data: a sick model is described, not refused. What a layer's numbers say about its health is told by
`deploykit.health` (`inspect`); the one row that is a mistake of transfer learning too is taken from there.

Modes of a BatchNormalization, as Keras 3 runs it (measured, and tested against `fit`):

    frozen     trainable=False: normalises by its moving statistics, always; they never move
    batch      called with training=True: where no mode is asked for, normalises by the batch
    training   any other: `fit` normalises by the batch and moves the statistics

There is no fourth: ``training=False`` in a call holds for ``model(x)``, but `fit` passes its own mode to every layer of
a functional model, and that wins. A trainable BatchNormalization that is called with ``training=False`` does move.

By the same rule `predict`, `evaluate` and an exported file turn off what is called with ``training=True``, and
``model(x)`` does not. Augmentation layers are called so unless something else is said: it is their default.

Preprocessing is read as stages: Rescaling, Normalization and constant arithmetic on the way from an input to the first
layer with a kernel. A stage of scale `SHRINKS` or less brings pixels of 0 to 255 down to a few units; two of them in a
row leave less than an eighth of one.

Two linear maps in a row, of widths n -> u -> v, are one of rank at most min(n, u, v): where u >= min(n, v) the first
adds nothing.

Limits: the graph is judged, and not data: preprocessing outside the model is not seen, and of Rescaling on whole
numbers the scale is not read. Inside layers that are called as a whole (custom layers, a nested model that is given a
mask) only BatchNormalization is looked at. The code of subclassed models is not read, and may pass on another mode than
`fit`. A learning rate is shown and not judged: what is too high depends on the data.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import keras
import numpy as np

from deploykit import health
from deploykit.errors import UnsupportedModelError
from deploykit.fuse.sources import Source, is_source
from deploykit.fuse.sources import read as affine_of
from deploykit.graph import Node, Trace, key, trace
from deploykit.load import Loaded
from deploykit.load.training import Loss, Training
from deploykit.load.training import read as read_training
from deploykit.opaque import graph_of
from deploykit.transfer.likeness import Likeness, WeightChange, layers_of, likeness, weights_of

L = keras.layers

Severity = Literal["note", "warning", "error"]
Mode = Literal["frozen", "batch", "training"]
Said = Iterator[tuple[str, str]]  # layer, the finding as half a sentence

SHRINKS = 1 / 32
CLASSES = 1000  # of ImageNet, and of every head in keras.applications

# Layers that act in training only, by class name: at inference they hand their input on.
NOISE = (
    *("Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D"),
    *("AlphaDropout", "GaussianDropout", "GaussianNoise"),
)
MIXES = ("AugMix", "CutMix", "MixUp", "RandAugment")

# Layers without weights of their own through which a classifier's answer stays what it is.
PASSES = (L.Dropout, L.Flatten, L.Reshape, L.Identity)

# What a body of keras.applications is known by, however much of its top is cut off, and what its weights expect.
SCALED = "pixels scaled to -1..1"
CENTRED = "BGR pixels less the mean of ImageNet"
STANDARDISED = "pixels standardised by ImageNet's mean and deviation"
FAMILIES: Mapping[frozenset[str], tuple[str, str]] = {
    frozenset({"block1_conv1", "block1_pool"}): ("VGG", CENTRED),
    frozenset({"conv1_conv", "conv1_bn", "conv2_block1_0_conv"}): ("ResNet", CENTRED),
    frozenset({"conv1_conv", "conv2_block1_preact_bn"}): ("ResNetV2", SCALED),
    frozenset({"conv1_conv", "conv1_bn", "conv2_block1_0_bn", "conv2_block1_concat"}): ("DenseNet", STANDARDISED),
    frozenset({"conv1", "conv1_bn", "conv_dw_1"}): ("MobileNet", SCALED),
    frozenset({"Conv1", "bn_Conv1", "expanded_conv_depthwise"}): ("MobileNetV2", SCALED),
    frozenset({"block1_conv1", "block1_conv1_bn", "block2_sepconv1"}): ("Xception", SCALED),
    frozenset({"stem_conv1", "stem_bn1"}): ("NASNet", SCALED),
    frozenset({"mixed0", "mixed1"}): ("InceptionV3", SCALED),
    frozenset({"mixed_5b", "block35_1_mixed"}): ("InceptionResNetV2", SCALED),
}


@dataclass(frozen=True)
class Finding:
    """One mistake in one layer. ``code`` is a key of `CODES`; ``message`` says what is wrong and what to do."""

    layer: str
    code: str
    message: str

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"unknown audit code {self.code!r}")

    @property
    def severity(self) -> Severity:
        return SEVERITY[self.code]

    def __str__(self) -> str:
        return f"{self.layer}: {self.message}"

    def to_json(self) -> dict[str, str]:
        return {"layer": self.layer, "code": self.code, "severity": self.severity, "message": self.message}


@dataclass(frozen=True)
class Norm:
    """A BatchNormalization, ``part`` of the layer that ``node`` calls, or that layer itself.

    ``asked``: what its calls ask for, of True, False and None (nothing).
    """

    layer: str
    node: Node
    part: Any
    trainable: bool
    asked: tuple[bool | None, ...]

    @property
    def mode(self) -> Mode:
        if not self.trainable:
            return "frozen"
        return "batch" if True in self.asked else "training"


@dataclass(frozen=True)
class Count:
    """Numbers in the weights of layers: ``trainable``; ``frozen``, which would be; ``statistics``, which never are."""

    trainable: int = 0
    frozen: int = 0
    statistics: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.trainable + other.trainable, self.frozen + other.frozen, self.statistics + other.statistics)

    @property
    def total(self) -> int:
        return self.trainable + self.frozen + self.statistics

    def to_json(self) -> dict[str, int]:
        return {
            "total": self.total,
            "trainable": self.trainable,
            "frozen": self.frozen,
            "statistics": self.statistics,
        }


@dataclass(frozen=True, eq=False)
class Subject:
    """What a judge sees. ``learns``: ids of the variables that an optimizer would train."""

    found: Trace
    learns: frozenset[int]
    training: Training | None = None
    base: Trace | None = None
    likeness: Likeness | None = None

    @cached_property
    def counts(self) -> dict[str, Count]:
        """By layer, of those with weights, in running order."""
        return {node.name: self._count(node.layer) for node in layers_of(self.found) if weights_of(node.layer)}

    def _count(self, layer: Any) -> Count:
        made_to_learn = {id(v) for part in layer._flatten_layers() for v in part._trainable_variables}
        sizes: Counter[str] = Counter()
        for variable in weights_of(layer):
            learns, could = id(variable) in self.learns, id(variable) in made_to_learn
            sizes["trainable" if learns else "frozen" if could else "statistics"] += math.prod(variable.shape)
        return Count(**sizes)

    @cached_property
    def norms(self) -> list[Norm]:
        calls: dict[int, list[Node]] = {}
        for node in self.found.nodes:
            calls.setdefault(id(node.layer), []).append(node)
        return [norm for nodes in calls.values() for norm in _norms(nodes)]


def _norms(nodes: list[Node]) -> Iterator[Norm]:
    node = nodes[0]
    for part in node.layer._flatten_layers() if isinstance(node.layer, L.Layer) else ():
        if isinstance(part, L.BatchNormalization):
            yield Norm(
                layer=node.name if part is node.layer else f"{node.name}/{part.name}",
                node=node,
                part=part,
                trainable=bool(part.trainable),
                asked=tuple(dict.fromkeys(call.training for call in nodes)),
            )


# ------------------------------------------------------------------------------------------- walking a graph


def _inmost(node: Node) -> Any:
    return node.layer.layer if type(node.layer) is L.TimeDistributed else node.layer


def _activation(node: Node) -> str | None:
    """The activation that a call ends with; None where that is not known."""
    layer = _inmost(node)
    if isinstance(key(layer), str):  # keras.ops.softmax(x) in the graph
        return {"Softmax": "softmax", "Sigmoid": "sigmoid", "Relu": "relu", "Tanh": "tanh"}.get(str(key(layer)))
    if isinstance(layer, L.Softmax):
        return "softmax"
    if isinstance(layer, L.ReLU):
        return "relu"
    if isinstance(layer, (L.Dense, L.EinsumDense, L.Conv1D, L.Conv2D, L.Conv3D, L.Activation)):
        return getattr(layer.activation, "__name__", None)
    return None


def _passes(node: Node) -> bool:
    return isinstance(node.layer, PASSES) or (isinstance(node.layer, L.Activation) and _activation(node) == "linear")


def _final(found: Trace, tensor: int) -> Node | None:
    """The call that makes an output, past those that hand it on."""
    maker = found.producer(tensor)
    while maker is not None and _passes(maker):
        maker = found.producer(maker.inputs[0])
    return maker


def _readers(found: Trace, tensor: int) -> Iterator[Node]:
    """The calls that read a tensor, or what was handed on of it."""
    for node in found.consumers(tensor):
        if _passes(node):
            yield from _readers(found, node.outputs[0])
        else:
            yield node


def _width(found: Trace, node: Node) -> int | None:
    """The last size of what a call makes."""
    return found.tensors[node.outputs[0]].shape[-1]


def _fed(found: Trace, node: Node) -> Node | None:
    """The Dense that a call's answer goes straight into; None where it is also an answer of the model."""
    if found.is_output(node.outputs[0]):
        return None
    return next((reader for reader in _readers(found, node.outputs[0]) if isinstance(reader.layer, L.Dense)), None)


@dataclass(frozen=True)
class Stage:
    """A step of preprocessing; ``scale``: its largest factor, None where it is not known."""

    layer: str
    scale: float | None


def _stage(found: Trace, node: Node) -> Stage | None:
    if not is_source(node) or isinstance(_inmost(node), L.BatchNormalization):
        return None
    read = affine_of(found, node)
    return Stage(node.name, float(np.abs(read.affine.scale).max()) if isinstance(read, Source) else None)


def _preprocessing(found: Trace) -> list[tuple[Stage, ...]]:
    """The stages in front of every layer with weights that is the first on its way from an input."""
    reached: dict[int, tuple[Stage, ...]] = dict.fromkeys(found.inputs, ())
    fronts = []
    for node in found.nodes:
        ways = [reached[tensor] for tensor in node.inputs if tensor in reached]
        if not ways:
            continue
        longest = max(ways, key=len)
        stage = _stage(found, node)
        if stage is None and weights_of(node.layer):
            fronts.append(longest)
            continue
        reached.update((tensor, (*longest, stage) if stage else longest) for tensor in node.outputs)
    return fronts


# -------------------------------------------------------------------------------------------------- judges


def _became(at: Subject, norm: Norm) -> list[WeightChange]:
    """What became of a BatchNormalization's own weights; nothing where the base does not have it."""
    kept = [] if at.likeness is None else at.likeness.of("equal", "changed")
    change = next((change for change in kept if change.layer == norm.node.name), None)
    own = {id(variable) for variable in norm.part.weights}
    pairs = [] if change is None else zip(weights_of(norm.node.layer), change.weights, strict=True)
    return [weight for variable, weight in pairs if id(variable) in own]


def _statistics_moved(at: Subject) -> Said:
    for norm in at.norms:
        weights = _became(at, norm)
        learnt = [weight for weight in weights if not weight.is_statistic]
        moved = [weight for weight in weights if weight.is_statistic and not weight.equal]
        trained = not all(weight.equal for weight in learnt)  # whatever the flag says now
        if not moved or trained or (norm.trainable and not learnt):
            continue
        known = [weight.distance for weight in moved if weight.distance is not None]
        far = f" by up to {max(known):.2g} of their size" if known else ""
        why = "it is not trainable" if not norm.trainable else "gamma and beta are the base's"
        yield norm.layer, f"its moving statistics differ from the base's{far}, although {why}"


def _training_mode(at: Subject) -> Said:
    remedy = next(row.remedy for row in health.ROWS if row.code == "training_mode")
    for finding in health.examine(at.found):
        if finding.code == "training_mode":
            yield finding.layer, finding.message.removesuffix(f"; {remedy}")


def _flag_ignored(at: Subject) -> Said:
    for norm in at.norms:
        if norm.mode == "training" and False in norm.asked:
            yield norm.layer, "it is called with training=False but is trainable, and fit() overrides the call"


def _norm_among_frozen(at: Subject) -> Said:
    frozen = {name for name, count in at.counts.items() if count.frozen and not count.trainable}
    behind: set[int] = set()  # tensors on whose way to an output a frozen layer lies
    for node in reversed(at.found.nodes):
        if node.name in frozen or behind & set(node.outputs):
            behind |= set(node.inputs)
    before: set[int] = set()  # tensors whose last layers with weights, BatchNormalization apart, are all frozen
    for node in at.found.nodes:
        passes = not weights_of(node.layer) or isinstance(node.layer, L.BatchNormalization)
        if node.name in frozen or (passes and node.inputs and set(node.inputs) <= before):
            before |= set(node.outputs)
    for norm in at.norms:
        node = norm.node
        if norm.mode != "frozen" and before.issuperset(node.inputs) and behind & set(node.outputs):
            yield (
                norm.layer,
                "it is trainable between frozen layers, which were trained with its old statistics",
            )


def _always_on(at: Subject, is_so: Callable[[Any], bool], what: str) -> Said:
    for node in at.found.nodes:
        if node.training and is_so(_inmost(node)):
            yield node.name, f"it is called with training=True, so that {what}"


def _is_noise(layer: Any) -> bool:
    return type(layer).__name__ in NOISE and bool(getattr(layer, "rate", None) or getattr(layer, "stddev", None))


def _is_augmentation(layer: Any) -> bool:
    return type(layer).__module__.startswith("keras.") and (
        type(layer).__name__.startswith("Random") or type(layer).__name__ in MIXES
    )


def _augmentation(at: Subject) -> Said:
    for node in layers_of(at.found):
        if _is_augmentation(_inmost(node)) and not node.training and not isinstance(node.layer, L.RandomCrop):
            yield node.name, "an augmentation is still in the graph, although at inference it does nothing"


def _missing(at: Subject) -> Said:
    if at.base is None or at.likeness is None or not at.likeness.of("equal", "changed"):
        return
    stages = [stage.layer for front in _preprocessing(at.base) for stage in front]
    if stages and not any(_preprocessing(at.found)):
        names = ", ".join(dict.fromkeys(stages))
        yield at.found.input_layers[0].name, f"the base prepares its input ({names}), this model does not"


def _doubled(at: Subject) -> Said:
    for front in dict.fromkeys(_preprocessing(at.found)):
        small = [stage for stage in front if stage.scale is not None and stage.scale <= SHRINKS]
        if len(small) > 1:
            first, second = small[0], small[1]
            yield second.layer, f"it scales by {second.scale:.3g} what {first.layer} has scaled by {first.scale:.3g}"


def _outside(at: Subject) -> Said:
    names = {layer for node in at.found.nodes for layer in (node.name, node.layer.name)}
    coloured = any(len(spec.shape) == 4 and 3 in (spec.shape[1], spec.shape[3]) for spec in at.found.signature.inputs)
    if any(_preprocessing(at.found)) or not coloured:
        return
    for marks, (family, wants) in FAMILIES.items():
        if marks <= names:
            yield at.found.input_layers[0].name, f"a {family} expects {wants}, and nothing in the file prepares them"
            return


def _classifiers(at: Subject, whole: bool) -> Said:
    """Answers of a classifier that go into a Dense; ``whole``: those of ImageNet's classes, or the others."""
    for node in at.found.nodes:
        activation, dense = _activation(node), isinstance(node.layer, L.Dense)
        wide = _width(at.found, node) == CLASSES and activation in ("softmax", "linear")
        if not (wide or activation == "softmax") or wide != whole or (activation == "linear" and not dense):
            continue
        reader = _fed(at.found, node)
        if reader is not None:
            what = f"the {CLASSES} classes of ImageNet" if wide else "a softmax"
            yield node.name, f"its answer, {what}, is the input of {reader.name}"


def _linear_pair(at: Subject) -> Said:
    for node in at.found.nodes:
        width = _width(at.found, node)
        if not isinstance(node.layer, L.Dense) or _activation(node) != "linear" or width == CLASSES:
            continue
        reader = _fed(at.found, node)
        if reader is None or at.found.calls(node) > 1:
            continue
        before, between = (at.found.tensors[call.inputs[0]].shape[-1] for call in (node, reader))
        if between != width:
            continue  # flattened: the first is the same map at every place, the second is not
        if width is not None and width >= min(before or math.inf, _width(at.found, reader) or math.inf):
            yield node.name, f"nothing that bends lies between it and {reader.name}: together they are one linear map"


def _softmax_of_one(at: Subject) -> Said:
    for node in at.found.nodes:
        axis = getattr(_inmost(node), "axis", -1) if isinstance(_inmost(node), L.Softmax) else -1
        if _activation(node) == "softmax" and axis == -1 and _width(at.found, node) == 1:
            yield node.name, "a softmax over one unit is 1 whatever comes in"


EXCLUSIVE = ("categorical_crossentropy", "sparse_categorical_crossentropy", "categorical_focal_crossentropy")
SINGLE = ("binary_crossentropy", "binary_focal_crossentropy")
UNBOUND = dict.fromkeys(("linear", "relu", "tanh"), "the loss expects probabilities, which {activation} does not give")
TWICE = dict.fromkeys(
    ("softmax", "sigmoid"), "the loss has from_logits=True and applies a {own} of its own to that {activation}"
)

# (a family of losses, from_logits) -> final activations that do not fit, and why
MISFITS: Mapping[tuple[tuple[str, ...], bool], Mapping[str, str]] = {
    (EXCLUSIVE, True): TWICE,
    (EXCLUSIVE, False): {**UNBOUND, "sigmoid": "the loss is for one class of many, a sigmoid answers for each alone"},
    (SINGLE, True): TWICE,
    (SINGLE, False): {**UNBOUND, "softmax": "the loss judges each class alone, a softmax shares 1 among all"},
}


def _loss_of(training: Training, place: int, names: tuple[str, ...]) -> Loss | None:
    if len(training.losses) == 1 and training.losses[0].output is None:
        return training.losses[0]
    return next((loss for loss in training.losses if loss.output == place or loss.output in names), None)


def _misfit(loss: Loss, activation: str, width: int | None) -> str | None:
    if loss.name in SINGLE and activation == "softmax" and width == 2 and not loss.from_logits:
        return None  # of two, the loss of either class is that of the pair
    if loss.name in EXCLUSIVE and width == 1:
        return "the loss compares several classes, and there is one unit: it is always 0"
    for (losses, from_logits), misfits in MISFITS.items():
        if loss.name in losses and from_logits == loss.from_logits and activation in misfits:
            own = "softmax" if losses == EXCLUSIVE else "sigmoid"
            return misfits[activation].format(activation=activation, own=own)
    return None


def _activation_loss(at: Subject) -> Said:
    for place, tensor in enumerate(at.found.outputs):
        names = (at.found.output_names[place], at.found.signature.outputs[place].name)
        loss = None if at.training is None else _loss_of(at.training, place, names)
        maker = _final(at.found, tensor)
        activation = None if maker is None else _activation(maker)
        if loss is None or maker is None or activation is None:
            continue
        why = _misfit(loss, activation, _width(at.found, maker))
        if why is not None:
            yield maker.name, f"its activation ({activation}) does not fit {loss.name}: {why}"


def _nothing_trainable(at: Subject) -> Said:
    if at.training is not None and at.training.optimizer is not None and at.counts and not at.learns:
        yield at.found.name, f"the file has an optimizer ({at.training.optimizer}), and every layer is frozen"


# ------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Row:
    """One mistake: how bad it is, what it means for several layers, what to do about it, and how it is found."""

    code: str
    severity: Severity
    meaning: str
    remedy: str
    judge: Callable[[Subject], Said]


FREEZE = "set trainable=False on the layer, compile again"
LEAVE = "leave it out of the model that is deployed: augment in the data pipeline"
REBUILD = "build the model again without training=True in that call, then load these weights"

ROWS: tuple[Row, ...] = (
    Row(
        "statistics_moved",
        "warning",
        "with `--base`: the moving statistics of a BatchNormalization changed, and its gamma and beta did not: "
        "it was not trained",
        f"unless they were recalibrated on purpose, {FREEZE} and train from the base again",
        _statistics_moved,
    ),
    Row(
        "training_mode",
        "error",
        "BatchNormalization is called with training=True and normalises by the batch",
        REBUILD,
        _training_mode,
    ),
    Row(
        "flag_ignored",
        "warning",
        "a trainable BatchNormalization is called with training=False, which fit() of Keras 3 overrides",
        f"its statistics move in training; {FREEZE} before the next fit()",
        _flag_ignored,
    ),
    Row(
        "norm_among_frozen",
        "warning",
        "a trainable BatchNormalization between frozen layers: its statistics move under them in training",
        FREEZE,
        _norm_among_frozen,
    ),
    Row(
        "dropout_always_on",
        "error",
        "dropout or noise is called with training=True: answers are random",
        REBUILD,
        lambda at: _always_on(at, _is_noise, "answers are random where no other mode is asked for"),
    ),
    Row(
        "augmentation_on",
        "warning",
        "an augmentation layer in the graph is called with training=True, its default: model(x) distorts its inputs",
        LEAVE,
        lambda at: _always_on(at, _is_augmentation, "model(x) distorts its inputs, although predict() does not"),
    ),
    Row(
        "augmentation",
        "note",
        "an augmentation layer is left in the graph; called with training=False, it does nothing at inference",
        LEAVE,
        _augmentation,
    ),
    Row(
        "preprocessing_missing",
        "warning",
        "with `--base`: the base has preprocessing in its graph, the model has none",
        "put the base's layers in front again, or make sure that every caller prepares the input so",
        _missing,
    ),
    Row(
        "preprocessing_doubled",
        "warning",
        f"two stages of preprocessing, each of which scales by 1/{round(1 / SHRINKS)} or less",
        "take the outer one away: the body has its own",
        _doubled,
    ),
    Row(
        "preprocessing_outside",
        "note",
        "a body of keras.applications without preprocessing in the graph",
        "every caller must use its preprocess_input; or put that in front of the body",
        _outside,
    ),
    Row(
        "include_top",
        "warning",
        f"a classifier of ImageNet's {CLASSES} classes is inside the chain, with another Dense behind it",
        "load the body with include_top=False, or cut in front of that layer",
        lambda at: _classifiers(at, whole=True),
    ),
    Row(
        "head_on_softmax",
        "warning",
        "a Dense on top of a softmax: a classifier is left inside the chain",
        "cut in front of it: a softmax hides what tells its smaller classes apart",
        lambda at: _classifiers(at, whole=False),
    ),
    Row(
        "linear_pair",
        "warning",
        "two Dense in a row with nothing that bends between them: a classifier left inside, or a forgotten activation",
        "cut in front of the first, or give it an activation",
        _linear_pair,
    ),
    Row(
        "softmax_of_one",
        "error",
        "a softmax over one unit, which is always 1",
        "use a sigmoid, or one unit for each class",
        _softmax_of_one,
    ),
    Row(
        "activation_loss",
        "warning",
        "the final activation does not fit the loss in the file",
        "change one of the two and train the head again",
        _activation_loss,
    ),
    Row(
        "nothing_trainable",
        "warning",
        "the file has an optimizer, but every layer is frozen: fit() would change nothing",
        "set trainable=True on what is to learn, compile again",
        _nothing_trainable,
    ),
)

CODES: Mapping[str, str] = {row.code: row.meaning for row in ROWS}
SEVERITY: Mapping[str, Severity] = {row.code: row.severity for row in ROWS}


def subject_of(model: Any, base: Any = None, training: Training | None = None) -> Subject:
    """A Keras model as the judges see it. Raises UnsupportedModelError where its graph cannot be read."""
    found, beneath = trace(model), None if base is None else trace(base)
    return Subject(
        found=found,
        learns=frozenset(id(variable) for variable in model.trainable_weights),
        training=training,
        base=beneath,
        likeness=None if beneath is None else likeness(found, beneath),
    )


def findings(at: Subject) -> tuple[Finding, ...]:
    """Every mistake, in the table's order; one for each layer and code."""
    found = {(layer, row.code): f"{what}; {row.remedy}" for row in ROWS for layer, what in row.judge(at)}
    return tuple(Finding(layer, code, message) for (layer, code), message in found.items())


# ------------------------------------------------------------------------------------------------ the audit


@dataclass(frozen=True, eq=False)
class Audit:
    """``body`` has the keys of ``deploykit.audit/1``."""

    subject: Subject
    findings: tuple[Finding, ...]
    body: dict[str, Any]
    notices: tuple[str, ...]

    @property
    def serious(self) -> tuple[Finding, ...]:
        """Findings of severity warning and above."""
        return tuple(finding for finding in self.findings if finding.severity != "note")


def audit(loaded: Loaded, base: Loaded | None = None) -> Audit:
    """Audit a loaded model, beside the base that it was made from where that is known. Neither is changed.

    Raises UnsupportedModelError for a model whose layers are unknown.
    """
    for each in (loaded, base):
        if each is not None and graph_of(each.model) is not None:
            raise UnsupportedModelError(
                f"{each.path} is a TensorFlow graph without Keras layers: there are none to audit; "
                "`deploykit inspect` shows what it holds"
            )
    training = None if loaded.training_config is None else read_training(loaded.training_config)
    subject = subject_of(loaded.model, None if base is None else base.model, training)
    mistakes = findings(subject)
    damaged = loaded.training_config_found and subject.training is None
    body = {
        "file": {"format": loaded.format, "saved_by": loaded.saved_by, "saved_on": loaded.saved_on},
        "trainable": _trainable_json(subject),
        "layers": _layers_json(subject),
        "norms": _norms_json(subject),
        "base": None if base is None or subject.likeness is None else _base_json(base, subject.likeness),
        "training_config": None if subject.training is None else _training_json(loaded, subject.training),
        "findings": [finding.to_json() for finding in mistakes],
    }
    notices = (f"the training configuration in {loaded.path} cannot be read",) if damaged else ()
    return Audit(subject, mistakes, body, notices)


def _trainable_json(at: Subject) -> dict[str, Any]:
    total = sum(at.counts.values(), Count())
    frozen = [name for name, count in at.counts.items() if count.frozen]
    learning = [name for name, count in at.counts.items() if count.trainable]
    return {**total.to_json(), "trainable_layers": learning, "frozen_layers": frozen}


def _layers_json(at: Subject) -> list[dict[str, Any]]:
    rows = []
    for node in layers_of(at.found):
        count = at.counts.get(node.name, Count())
        rows.append(
            {
                "name": node.name,
                "class": type(node.layer).__name__,
                "trainable": bool(getattr(node.layer, "trainable", False)),
                "parameters": count.to_json(),
            }
        )
    return rows


def _norms_json(at: Subject) -> list[dict[str, Any]]:
    rows = []
    for norm in at.norms:
        row: dict[str, Any] = {"layer": norm.layer, "mode": norm.mode, "called_with": list(norm.asked)}
        for label, statistic in (("statistics_equal", True), ("affine_equal", False)):
            weights = [weight for weight in _became(at, norm) if weight.is_statistic == statistic]
            row[label] = all(weight.equal for weight in weights) if weights else None
        rows.append(row)
    return rows


def _base_json(base: Loaded, found: Likeness) -> dict[str, Any]:
    return {"path": str(base.path), "sha256": base.sha256, **found.to_json()}


def _training_json(loaded: Loaded, training: Training) -> dict[str, Any]:
    arrays = health.optimizer_arrays(loaded.path)
    steps = health.training_steps(loaded.path)
    state = None if arrays is None else {"present": arrays > 0, "arrays": arrays, "steps": steps}
    return {**training.to_json(), "optimizer_state": state}
