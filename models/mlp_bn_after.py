"""Perceptron with batch normalization *after* each activation.

The classic textbook layout: every BN stands between a ReLU and the next Dense, the first one between the
pixels and the first Dense. No BN can be folded backward, through the ReLU, into the layer that feeds it; each
can only be folded forward, into the Dense that reads it. The model is here to hold that case.
"""

import keras
from _train import Settings, train_and_save
from keras import layers


def build() -> keras.Model:
    """Flatten, BN, then twice Dense with ReLU and BN, then softmax over 10 classes."""
    image = keras.Input((28, 28), name="image")
    x = layers.Flatten(name="flatten")(image)
    x = layers.BatchNormalization(name="pixel_bn")(x)
    x = layers.Dense(300, activation="relu", name="hidden1_dense")(x)
    x = layers.BatchNormalization(name="hidden1_bn")(x)
    x = layers.Dense(100, activation="relu", name="hidden2_dense")(x)
    x = layers.BatchNormalization(name="hidden2_bn")(x)
    x = layers.Dense(10, activation="softmax", name="class")(x)
    return keras.Model(image, x, name="mlp_bn_after")


if __name__ == "__main__":
    train_and_save("mlp_bn_after", build, Settings(epochs=12))
