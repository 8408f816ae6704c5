"""Rows of JSON, one a line: what a run measured as it went."""

import json
import math
from pathlib import Path
from typing import IO, Any, Self

from zotuner.errors import ZotunerError
from zotuner.files import write_atomically


def jsonable(value: Any) -> Any:
    """The same value with numbers that JSON has not (NaN, infinities) as None, and tuples as lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON document, whole or not at all."""
    write_atomically(path, json.dumps(jsonable(value), indent=2) + "\n")


class MetricsLog:
    """Appends rows to a file, each flushed as it is written.

    Args:
        path: The file; it is made, or continued.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, **row: Any) -> None:
        """Appends one row."""
        self._file.write(json.dumps(jsonable(row)) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file of JSON lines.

    Raises:
        ZotunerError: The file is missing or a line is no JSON object; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ZotunerError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ZotunerError(f"{path}: expected a UTF-8 text file of JSON lines: {error}") from None
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ZotunerError(f"{path}, line {number}: expected one JSON object, got {line[:60]!r}: {error}") from None
        if not isinstance(row, dict):
            raise ZotunerError(f"{path}, line {number}: expected one JSON object, got {line[:60]!r}")
        rows.append(row)
    return rows
