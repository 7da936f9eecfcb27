"""Small residual convolutional network, with each kind of layer whose BN folds backward.

Every BN directly follows a bias-free linear layer that feeds nothing else: an ordinary, a strided, a
depthwise or a 1x1 convolution, or the Dense of the head. None follows an Add, where nothing could take it in.
Folding all of them therefore changes no output beyond rounding.
"""

import keras
from _train import Settings, train_and_save
from keras import KerasTensor, layers


def bn_relu(x: KerasTensor, name: str) -> KerasTensor:
    """The BN and ReLU that follow a linear layer."""
    x = layers.BatchNormalization(name=f"{name}_bn")(x)
    return layers.ReLU(name=f"{name}_relu")(x)


def conv(x: KerasTensor, filters: int, strides: int, name: str) -> KerasTensor:
    """3x3 convolution, BN, ReLU."""
    x = layers.Conv2D(filters, 3, strides, padding="same", use_bias=False, name=f"{name}_conv")(x)
    return bn_relu(x, name)


def residual(x: KerasTensor, name: str) -> KerasTensor:
    """x plus a depthwise-separable branch, then ReLU; both convolutions of the branch have their own BN."""
    branch = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name=f"{name}_depthwise_conv")(x)
    branch = bn_relu(branch, f"{name}_depthwise")
    branch = layers.Conv2D(x.shape[-1], 1, use_bias=False, name=f"{name}_pointwise_conv")(branch)
    branch = layers.BatchNormalization(name=f"{name}_pointwise_bn")(branch)
    x = layers.Add(name=f"{name}_add")([x, branch])
    return layers.ReLU(name=f"{name}_relu")(x)


def build(classes: int = 10, name: str = "fashion_cnn") -> keras.Model:
    """Stem, two strided convolutions each with a residual block, pooling, Dense-BN-ReLU head, softmax."""
    image = keras.Input((28, 28, 1), name="image")
    x = conv(image, 16, strides=1, name="stem")
    x = conv(x, 48, strides=2, name="down1")
    x = residual(x, "block1")
    x = conv(x, 96, strides=2, name="down2")
    x = residual(x, "block2")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(64, use_bias=False, name="head_dense")(x)
    x = bn_relu(x, "head")
    x = layers.Dropout(0.2, name="head_dropout")(x)
    x = layers.Dense(classes, activation="softmax", name="class")(x)
    return keras.Model(image, x, name=name)


SETTINGS = Settings(epochs=7, learning_rate=4e-3, mirror=True)

if __name__ == "__main__":
    train_and_save("fashion_cnn", build, SETTINGS)
