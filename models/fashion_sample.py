"""Writes `fashion_sample.npz`: 256 real test images with labels, so that demo and tests need no download.

They are the first 256 of the Fashion-MNIST test set, not a choice: accuracy on them estimates the accuracy on
the whole test set without bias. `x` is float32 (256, 28, 28, 1) in 0..1, `y` int64 with the original labels
0 to 9.
"""

import numpy as np
from _train import MODELS, load_data

if __name__ == "__main__":
    _, _, (images, labels) = load_data(channel=True)
    path = MODELS / "fashion_sample.npz"
    np.savez_compressed(path, x=images[:256], y=labels[:256])
    print(f"{path.name}: {path.stat().st_size} bytes, images per class {np.bincount(labels[:256]).tolist()}")
