"""What loads, from which generation of Keras, with what caveat: `docs/compatibility.md`, made from the reader's tables.

    python benchmarks/compatibility.py [--check] [--out docs/compatibility.md]

`--check` writes nothing and exits with 1 where the document differs from the tables.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from deploykit.load.legacy import config, keras1, operations

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"

FORMATS = [
    ("`.keras` of Keras 3", "Keras itself, safe mode on", "what is newer than the Keras installed is refused"),
    ("HDF5 of Keras 3", "Keras itself, safe mode on", ""),
    ("HDF5 of Keras 2, tf.keras, tf-keras", "translated", "whatever the extension"),
    ("HDF5 of Keras 1.0 to 1.2, TensorFlow and Theano", "translated to Keras 2, then on", "0.3 is refused"),
    ("`.keras` of tf-keras 2.12 to 2.21", "translated", ""),
    (
        "SavedModel folder that Keras wrote (TensorFlow 2.0 to 2.15, tf-keras)",
        "translated from the Keras metadata; the graph is not run",
        "a vocabulary that only the graph knows is refused",
    ),
    (
        "SavedModel folder without Keras layers, or of a subclassed model (any TensorFlow, Keras 3's `model.export`)",
        "as the graph it is: `export`, `check`, `bench`, `deploy`",
        "nothing to fold, never proven; an operation that does more than compute is refused by name",
    ),
    ("JSON of `model.to_json()`, Keras 1 too", "with `--weights`", "YAML is refused"),
    ("weights of any of these", "`--weights`", ""),
]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _values(harmless: Collection[Any] | None) -> str:
    return "any value" if harmless is None else "only " + ", ".join(f"`{value}`" for value in harmless)


def _names(table: Collection[Any]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(str(name) for name in table if name))


def _lines() -> Iterator[str]:
    steeper = _names({kind for kind, _ in config.STEEPER})
    defaults = [(kind, key, value) for kind, row in config.DEFAULTS.items() for key, value in row.items()]
    yield "# What loads"
    yield ""
    yield "Made by `benchmarks/compatibility.py` from the tables of `deploykit/load`; a test keeps it equal to them."
    yield ""
    yield from _table(("format", "how", "caveat"), FORMATS)
    yield "Nothing that comes with a file runs. `deploykit migrate OLD -o NEW.keras` writes a clean Keras 3 file and"
    yield "proves it against the package that speaks the old format (`pip install 'deploykit[legacy]'`)."
    yield ""
    yield "## Classes under another name"
    yield ""
    renamed = {
        **config.RENAMED,
        **dict.fromkeys(config.IDENTITIES, "Identity"),
        **dict.fromkeys(config.STRIPPED, "the layer inside"),
    }
    yield from _table(("then", "in Keras 3"), ((f"`{old}`", f"`{new}`") for old, new in sorted(renamed.items())))
    yield "## Arguments"
    yield ""
    yield "An argument that Keras 3's class does not take is refused by name, unless it changes nothing:"
    yield ""
    yield from _table(
        ("class", "argument", "left out with"),
        ((f"`{kind}`" if kind else "all", f"`{key}`", _values(v)) for (kind, key), v in config.MEANT_NOTHING.items()),
    )
    yield "What an absent argument stood for, and arguments with another name:"
    yield ""
    yield from _table(
        ("class", "then", "in Keras 3"),
        [
            *((f"`{k}`", f"no `{key}`", f"`{key}={v!r}`") for k, key, v in defaults),
            *((f"`{k}`", f"`{old}`", f"`{new}`") for (k, old), (new, _) in config.ARGUMENTS.items()),
        ],
    )
    yield "Keras 2's `hard_sigmoid` is `clip(0.2·x + 0.5, 0, 1)`, Keras 3's `clip(x/6 + 0.5, 0, 1)`. The weights in"
    yield f"front of one are multiplied by {config.STEEPNESS}, which is the same function, where it is the `activation`"
    yield f"or `recurrent_activation` of {steeper}."
    yield "A lone `Activation` gets a `Rescaling` in front; elsewhere it is refused."
    yield ""
    yield "A causal `SeparableConv1D` becomes a `ZeroPadding1D` and a valid convolution. The bilinear `UpSampling2D`"
    yield "of Keras before 2.4 beside TensorFlow 1, which took other points than today, becomes one by repetition and"
    yield "`AveragePooling2D`, once per factor of 2, with a notice; today's tf_keras answers otherwise there."
    yield ""
    yield "Initializers, regularizers and constraints that Keras 3 does not know are left out with a notice: they serve"
    yield "training. Kernels saved under Theano are rotated by 180 degrees, with a notice."
    yield ""
    yield "## Refused by name"
    yield ""
    refused = sorted({**keras1.REFUSED, **config.REFUSED}.items())
    yield from _table(("class", "because it"), ((f"`{kind}`", why) for kind, why in refused))
    yield "Of files saved under Theano also `same` padding that TensorFlow does otherwise (even kernels, strides);"
    yield "Keras 1's convolution with it becomes a padding and a convolution."
    yield ""
    yield "And uses of a layer that Keras 3 would answer otherwise without saying so: training=True on what differs"
    yield "in training; the bilinear UpSampling2D of Keras before 2.4 beside TensorFlow 1 by other factors than 2, 4,"
    yield "8, ... or under Theano; a causal SeparableConv1D inside another layer; and masks in TimeDistributed: those"
    yield "that the layer inside reads or makes, and any where the batch has a fixed size."
    yield ""
    yield "## Masks"
    yield ""
    yield "Masks are handed on as they were, by operations in the graph where Keras 3 would make others: a merge lets"
    yield "pass what none of its masks hides, Multiply, Minimum and Maximum count what is masked, too, Identity,"
    yield "Rescaling and Normalization take masks away, and a MultiHeadAttention saved before 2.10 does not see any."
    yield ""
    yield "What was learnt by `adapt` must stand in the description:"
    yield ""
    learnt = sorted((f"`{kind}`", f"`{key}`") for kind, key in config.LEARNT.items())
    yield from _table(("class", "argument"), learnt)
    yield "## TensorFlow operations between layers"
    yield ""
    yield f"Functions ({len(operations.FUNCTIONS)}): {_names(operations.FUNCTIONS)}."
    yield ""
    yield f"Raw operations of tf.keras 2.0 to 2.3 ({len(operations.RAW)}): {_names(operations.RAW)}."


def document() -> str:
    return "\n".join(_lines()) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path, default=DOCUMENT)
    options = parser.parse_args()
    if options.check:
        same = options.out.exists() and options.out.read_text(encoding="utf-8") == document()
        print("equal to the tables" if same else f"{options.out.name} differs from the tables")
        return 0 if same else 1
    options.out.write_text(document(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
