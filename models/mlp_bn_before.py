"""Perceptron with batch normalization *before* each activation.

The layout of the original BN paper: Dense without bias (the BN's beta takes its place), BN, ReLU. Every BN
folds backward into the Dense that feeds it, which gains a bias. The counterpart of `mlp_bn_after`.
"""

import keras
from _train import Settings, train_and_save
from keras import layers


def build() -> keras.Model:
    """Flatten, twice Dense, BN, ReLU, then softmax over 10 classes."""
    image = keras.Input((28, 28), name="image")
    x = layers.Flatten(name="flatten")(image)
    for block, units in (("hidden1", 300), ("hidden2", 100)):
        x = layers.Dense(units, use_bias=False, name=f"{block}_dense")(x)
        x = layers.BatchNormalization(name=f"{block}_bn")(x)
        x = layers.Activation("relu", name=f"{block}_relu")(x)
    x = layers.Dense(10, activation="softmax", name="class")(x)
    return keras.Model(image, x, name="mlp_bn_before")


if __name__ == "__main__":
    train_and_save("mlp_bn_before", build, Settings(epochs=12))
