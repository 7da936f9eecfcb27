"""Shared fixtures. TensorFlow's chatter is silenced before anything imports it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # some tests import onnxruntime themselves

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture
def shared_models() -> Path:
    """Real trained models that are not part of the repository."""
    folder = SHARED / "models"
    if not folder.is_dir():
        pytest.skip("the folder of real trained models is not beside this checkout")
    return folder


@pytest.fixture
def cli(capfd):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        from deploykit.cli import main  # after the environment above is set

        handler = signal.getsignal(signal.SIGTERM)
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                main([str(argument) for argument in arguments])
        finally:
            signal.signal(signal.SIGTERM, handler)
        captured = capfd.readouterr()
        return ended.value.code, captured.out, captured.err

    return run
