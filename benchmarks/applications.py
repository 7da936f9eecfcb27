"""Deploy well-known nets end to end: all BatchNormalization fused, check passed, bundle verified.

    python benchmarks/applications.py [--nets MobileNetV2 ResNet50 EfficientNetB0] [--size 224] [--out FOLDER]

The nets come from keras.applications with random weights (no download) and live, calibrated statistics: gammas and
betas are drawn, then one training-mode pass sets means and variances; without that a deep random net's output hardly
depends on its input. They see samples that deploykit draws for them, from a file. Prints one row per net; exit code 1
when one of them fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

COUNTS = {"MobileNetV2": 52, "ResNet50": 53, "EfficientNetB0": 49}


def make(name: str, size: int, path: Path, data: Path) -> None:
    """Save a calibrated net, and samples for it."""
    import keras
    import numpy as np
    from nets import calibrate

    from deploykit.data import synthesize
    from deploykit.graph import signature

    keras.utils.set_random_seed(0)
    model = calibrate(getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3)))
    model.save(path)
    (samples,) = synthesize(signature(model), count=16).arrays.values()
    np.savez(data, x=samples)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=list(COUNTS))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--python", default=sys.executable, help="interpreter for verify.py on the target")
    options = parser.parse_args()
    print(f"{'net':16}{'BN fused':>10}{'exactness':>12}{'bound':>9}{'SNR/own dB':>15}{'verify':>8}{'stock/ours':>24}")
    failed = False
    with tempfile.TemporaryDirectory() as room:
        for name in options.nets:
            model, data, bundle = Path(room) / f"{name}.keras", Path(room) / f"{name}.npz", Path(room) / name
            make(name, options.size, model, data)
            command = [sys.executable, "-m", "deploykit.cli", "deploy", model, "--data", data, "-o", bundle]
            command += ["--seconds", "2", "--json", "-"]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{name:16}{done.stderr.strip()}")
                failed = True
                continue
            report = json.loads(done.stdout)
            norms = report["fuse"]["affines"]["by_kind"]["BatchNormalization"]
            output = report["check"]["comparisons"][-1]["outputs"][0]
            verify = subprocess.run([options.python, bundle / "verify.py", "--seconds", "0.5"], capture_output=True)
            pair = next(c for c in report["bench"]["comparisons"] if c["a"] == "deploykit" and "Keras" not in c["b"])
            ratio = f"{1 / pair['ratio']:.2f} [{1 / pair['ci95'][1]:.2f}, {1 / pair['ci95'][0]:.2f}]"
            snr = f"{output['snr_db']:.1f}/{output['reference_snr_db']:.1f}"
            print(
                f"{name:16}{norms['fused']:>4} of {norms['total']:<3}{report['fuse']['exactness_f64']:>12.1e}"
                f"{report['fuse']['exactness_bound']:>9.0e}{snr:>15}{verify.returncode:>8}{ratio:>24}",
                flush=True,
            )
            failed |= verify.returncode != 0 or norms["fused"] != COUNTS.get(name, norms["fused"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
