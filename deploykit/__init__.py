"""deploykit: a trained Keras model in, a verified and timed ONNX bundle out."""

from __future__ import annotations

__version__ = "0.1.0"
