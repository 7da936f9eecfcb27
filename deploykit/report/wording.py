"""Numbers as people read them. Reports keep seconds, bytes and plain ratios; only renderers come here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def size(count: float | None) -> str:
    """Bytes in decimal units: 283 kB."""
    if count is None:
        return "?"
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def milliseconds(value: float | None) -> str:
    if value is None:
        return "-"
    digits = 3 if value < 1 else 2 if value < 10 else 1
    return f"{value:.{digits}f} ms"


def ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def snr(output: Mapping[str, Any], key: str = "snr_db") -> str:
    """The candidate's SNR, or the original's own (``reference_snr_db``); without an error there is no SNR."""
    if output.get(key) is not None:
        return f"{output[key]:.1f} dB"
    return "exact" if key == "snr_db" and output.get("max_abs") == 0 else "-"


def small(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def origin(file: Mapping[str, Any]) -> str:
    """Who saved a model: ``file`` is the report's record of it."""
    return "TensorFlow graph" if file.get("opaque") else f"Keras {file['saved_by'] or '?'}"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def fastest(recommended: Mapping[str, Any] | None) -> str | None:
    """Which runtime a bundle's file is fastest on, and what was found for the others; None where none was tried."""
    if recommended is None or not recommended["others"]:
        return None
    told = []
    for row in recommended["others"]:
        if row["ratio"] is None:
            told.append(
                f"{row['runtime']} {'could not be timed' if row['passed'] else 'did not pass'}: {row['reason']}"
            )
        else:
            told.append(f"{row['runtime']} takes {ratio(row['ratio'])} the time of onnxruntime-cpu, {row['verdict']}")
    return f"{recommended['runtime']} ({'; '.join(told)})"
