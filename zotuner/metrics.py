"""Rows of JSON, one a line: what a run measured as it went."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from statistics import stdev
from typing import IO, Any, Self

from zotuner.errors import ZotunerError
from zotuner.files import write_atomically

COUNTS = ("step", "forwards", "tokens", "seconds")  # of a row of evals.jsonl
ASIDE = (*COUNTS, "loss_error")  # likewise; the rest are the loss and metrics


def standard_error(values: Sequence[float]) -> float:
    """Of their mean; NaN for fewer than two, and where one is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    return stdev(values) / math.sqrt(len(values))


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


def read_json(path: Path) -> Any:
    """The content of one JSON document.

    Raises:
        ZotunerError: It cannot be read, or is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ZotunerError(f"{path}: expected JSON: {error}") from None


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


def keep_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Cuts a file of rows before the first that is not to be kept, or is cut short, and returns those that stay.

    A file that is not there has none.
    """
    if not path.exists():
        return []
    rows = list(takewhile(keep, read_rows(path, torn_end=True)))
    write_rows(path, rows)
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes a file of rows, whole or not at all."""
    write_atomically(path, "".join(json.dumps(jsonable(row)) + "\n" for row in rows))


def read_rows(path: Path, *, torn_end: bool = False) -> list[dict[str, Any]]:
    """All rows of a file of JSON lines.

    Args:
        path: The file.
        torn_end: Drop a last line that is cut short: a program that was killed, or is writing now, leaves one.

    Raises:
        ZotunerError: The file is missing or a line is no JSON object; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ZotunerError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ZotunerError(f"{path}: expected a UTF-8 text file of JSON lines: {error}") from None
    rows = []
    lines = text.split("\n")
    if torn_end and not _is_json(lines[-1]):  # behind the last newline: "" if the last line is whole
        del lines[-1]
    for number, line in enumerate(lines, start=1):
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


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return False
    return True
