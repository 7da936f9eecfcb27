"""Models of older generations as Keras 3 layers, without the package that saved them.

A file of Keras 1 or 2, tf.keras or tf-keras describes its model in JSON. That description becomes a normal form: the
same graph, with the classes and arguments of Keras 3 (``config``, a table of what changed in which version; ``keras1``
takes the first generation to the second). The normal form is judged like any other description
(``deploykit.load.safety``), built by calling the layers along the recorded graph (``graph``; plain TensorFlow
operations through ``operations``), and filled with the arrays of the file (``weights``).

Nothing that could change an answer is dropped in silence: an argument without an equivalent is refused by name, a
function that changed its meaning is replaced by an exact equivalent, and what does not touch inference (initializers,
regularizers, constraints of unknown classes) goes with a notice.
"""

from deploykit.load.legacy.config import Translated, modern_name, plain, translate
from deploykit.load.legacy.graph import build, freeze
from deploykit.load.legacy.weights import fill_archive, fill_hdf5, is_of_keras_3, layer_order, steepen, stored_names

__all__ = [
    "Translated",
    "build",
    "fill_archive",
    "fill_hdf5",
    "freeze",
    "is_of_keras_3",
    "layer_order",
    "modern_name",
    "plain",
    "steepen",
    "stored_names",
    "translate",
]
