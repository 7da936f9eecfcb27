"""`fashion_cnn` trained on 8 of the 10 classes: a body for transfer learning.

T-shirt/top (0) and pullover (2) are left out, so that telling those two apart is a new task on which a frozen
or fine-tuned copy of this body can be tried. The remaining classes keep their order: 1, 3, 4, 5, 6, 7, 8, 9
become labels 0 to 7.
"""

import fashion_cnn
import keras
from _train import train_and_save

CLASSES = (1, 3, 4, 5, 6, 7, 8, 9)


def build() -> keras.Model:
    """The architecture of `fashion_cnn` with 8 outputs."""
    return fashion_cnn.build(len(CLASSES), "fashion_cnn_8")


if __name__ == "__main__":
    train_and_save("fashion_cnn_8", build, fashion_cnn.SETTINGS, CLASSES)
