"""Listings: a CSV of path,label, one image a row; with several label columns, several targets a row.

A path is relative to the CSV's own folder. A header is optional: the first row is one when its path neither has the
suffix of an image nor is a file. Fields may be quoted, as Python's csv module reads them; spaces around them and
empty lines do not count. Numbers become numbers where every label of the file is one, written as numbers are: labels
"01" and "1e" are names.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploykit.data.samples import Array
from deploykit.data.sources import IMAGE_SUFFIXES, Request, Source, images, listed
from deploykit.errors import DataError

_WHOLE = re.compile(r"-?(0|[1-9]\d{0,17})", re.ASCII)  # fits int64
_DIGITS = re.compile(r"[+-]?\d+", re.ASCII)


def is_listing(where: str) -> bool:
    return Path(where).suffix.lower() == ".csv" and Path(where).is_file()


@dataclass(frozen=True)
class _Row:
    line: int
    fields: list[str]


def read_listing(request: Request) -> Source:
    where, folder = request.where, Path(request.where).parent
    rows = _rows(where)
    width = len(rows[0].fields)
    _refuse(where, rows, lambda row: len(row.fields) != width or width < 2, "path,label as in the first row")
    header, rows = (rows[0].fields, rows[1:]) if _is_header(rows[0], folder) else ([], rows)
    if not rows:
        raise DataError(f"{where} has a header and no rows; give a row of path,label for each image")
    _refuse(where, rows, lambda row: "" in row.fields, "a path and a label, none of them empty")
    y = _values([field for row in rows for field in row.fields[1:]]).reshape(len(rows), width - 1)
    if width > 2 and y.dtype.kind == "U":
        raise DataError(
            f"{where} has {width - 1} label columns with text in them; give numbers, or one column of names"
        )
    names = np.array(header[1:]) if header and width > 2 else None
    return images(request, [folder / row.fields[0] for row in rows], folder, y[:, 0] if width == 2 else y, names)


def _rows(where: str) -> list[_Row]:
    try:
        with open(where, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, skipinitialspace=True, strict=True)
            rows = [_Row(reader.line_num, [field.strip() for field in fields]) for fields in reader if fields]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{where} is no readable CSV ({error}); give rows of path,label in UTF-8") from error
    if not rows:
        raise DataError(f"{where} is empty; give rows of path,label")
    return rows


def _refuse(where: str, rows: Sequence[_Row], unfit: Callable[[_Row], bool], wanted: str) -> None:
    if bad := [_said(row) for row in rows if unfit(row)]:
        raise DataError(
            f"{where}: {len(bad):,} of {len(rows):,} rows do not fit ({listed(bad)}); each needs {wanted}, "
            "separated by commas"
        )


def _said(row: _Row) -> str:
    empty = ", one of them empty" if "" in row.fields else ""
    return f"line {row.line} has {len(row.fields)} fields{empty}".replace(" 1 fields", " 1 field")


def _is_header(row: _Row, folder: Path) -> bool:
    path = folder / row.fields[0]
    return path.suffix.lower() not in IMAGE_SUFFIXES and not path.is_file()


def _values(fields: Sequence[str]) -> Array:
    """int64 or float64 where every field is such a number, else text."""
    if all(map(_WHOLE.fullmatch, fields)):
        return np.array([int(field) for field in fields], np.int64)
    try:
        values = np.array([float(field) for field in fields])
    except ValueError:
        return np.array(fields)
    return np.array(fields) if all(map(_DIGITS.fullmatch, fields)) else values
