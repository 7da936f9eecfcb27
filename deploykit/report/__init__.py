"""Reports: what a command did, as one JSON-able value, and the renderers that show it.

A `Report` is the envelope that every verb shares (schema, version, proven, environment, seconds, notices)
around a body with the verb's own keys. The renderers (`text`, `markdown`, `html`) read nothing but the
JSON form, so a stored report.json can be shown again, the same way, later.

JSON is strict: NaN and infinity cannot be written; a number that is not finite becomes null, and the
body says why beside it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploykit.files import whole_file


@dataclass(frozen=True)
class Report:
    """One command's result. ``body`` holds the keys that DESIGN fixes for ``deploykit.<verb>/1``."""

    verb: str
    version: str
    model: str
    proven: bool
    body: Mapping[str, Any]
    environment: Mapping[str, Any]
    seconds: Mapping[str, float] = field(default_factory=dict)
    notices: Sequence[str] = ()
    outputs_written: Sequence[str] = ()
    reason: str | None = None  # why not proven

    def to_json(self) -> dict[str, Any]:
        """The machine report; every value is plain JSON."""
        record = {
            "schema": f"deploykit.{self.verb.replace('-', '_')}/1",
            "deploykit": self.version,
            "model": self.model,
            "proven": self.proven,
            "reason": self.reason,
            **self.body,
            "notices": list(self.notices),
            "outputs_written": list(self.outputs_written),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "environment": dict(self.environment),
        }
        plain = strict(record)
        assert isinstance(plain, dict)
        return plain


def strict(value: Any) -> Any:
    """A value with every number that JSON cannot hold replaced by None; tuples become lists."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def dumps(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def write_json(record: Mapping[str, Any], path: str | os.PathLike[str], *, force: bool = True) -> Path:
    """Write a report whole or not at all."""
    with whole_file(path, force=force) as target:
        target.write_text(dumps(record), encoding="utf-8", errors="backslashreplace")  # file names may be any bytes
    return Path(path)
