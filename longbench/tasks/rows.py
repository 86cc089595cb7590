"""Rows of a JSON lines file, each with its line number; a bad line is reported and the rest goes on."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..sample import Skipped

Row = dict[str, Any]


def read_rows(path: Path, text: str | None = None) -> Iterator[tuple[int, Row] | Skipped]:
    """Yield (line number from 1, object) or what is wrong with the line; blank lines are passed over.

    Args:
        path: names the file, and is read unless `text` is given (a member of an archive).
    """
    if text is None:
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            yield Skipped(str(path), None, f"cannot be read ({error.strerror})")
            return
    else:
        lines = text.encode("utf-8").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            yield Skipped(str(path), number, f"not JSON ({error})")
            continue
        yield (number, row) if isinstance(row, dict) else Skipped(str(path), number, "not a JSON object")


def problem(row: Mapping[str, Any], fields: Mapping[str, type | tuple[type, ...]]) -> str | None:
    """The first field that is missing or of a wrong type, in words; None if the row is good."""
    for name, kind in fields.items():
        if name not in row:
            return f"the field {name!r} is missing"
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            return f"the field {name!r} must not be {type(row[name]).__name__}"
    return None
