"""Tables: the rows of a file, whatever its format. CSV, TSV, JSON, JSON lines or Parquet; text is UTF-8."""

import csv
from pathlib import Path
from typing import Any

from zotuner.errors import ZotunerError, repeated
from zotuner.metrics import read_json, read_rows

DELIMITERS = {".csv": ",", ".tsv": "\t"}
LONGEST = 1 << 30  # characters of a cell; the module csv's own limit is 131072, less than a long document
ENDINGS = (*DELIMITERS, ".jsonl", ".json", ".parquet")


def read_table(path: Path) -> list[dict[str, Any]]:
    """All rows of a file, in its order; its ending says what it is.

    Values of CSV and TSV are text, and an empty cell is None, since these formats have no other way to say so. JSON is
    a list of objects.

    Raises:
        ZotunerError: No such file, an ending that nobody knows, or content that is broken; names the row.
    """
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ZotunerError(f"{path}: expected a file that ends in {', '.join(ENDINGS)}")
    if not path.is_file():
        raise ZotunerError(f"{path}: no such file")
    if ending == ".jsonl":
        return read_rows(path)
    if ending == ".json":
        return _read_list(path)
    return _read_parquet(path) if ending == ".parquet" else _read_text(path, DELIMITERS[ending])


def _read_text(path: Path, delimiter: str) -> list[dict[str, Any]]:
    csv.field_size_limit(LONGEST)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # some programs put a byte order mark in front
            return _rows(path, csv.reader(file, delimiter=delimiter, strict=True), delimiter)
    except UnicodeDecodeError as error:
        raise ZotunerError(f"{path}: expected UTF-8 text: {error}") from None
    except OSError as error:
        raise ZotunerError(f"{path}: cannot be read: {error.strerror or error}") from None


def _rows(path: Path, lines: Any, delimiter: str) -> list[dict[str, Any]]:
    """The rows under the first line, which names the columns; empty lines are left out."""
    try:
        names, *rows = [cells for cells in lines if cells] or [[]]
    except csv.Error as error:
        raise ZotunerError(
            f'{path}, line {lines.line_num}: {error}; quote text with ", and write " in it twice'
        ) from None
    twice = repeated(names)
    if twice is not None:
        raise ZotunerError(f"{path}: expected columns of different names, {twice!r} comes more than once")
    for number, cells in enumerate(rows, start=1):
        if len(cells) != len(names):
            raise ZotunerError(
                f"{path}, row {number}: expected {len(names)} cells, got {len(cells)}; put text that holds "
                f"{delimiter!r} in double quotes"
            )
    return [{name: cell or None for name, cell in zip(names, cells, strict=True)} for cells in rows]


def _read_list(path: Path) -> list[dict[str, Any]]:
    content = read_json(path)
    if not isinstance(content, list):
        raise ZotunerError(f"{path}: expected a list of objects, got {type(content).__name__}")
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            raise ZotunerError(f"{path}, row {number}: expected an object, got {str(row)[:60]!r}")
    return content


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ZotunerError(f"{path}: expected Parquet: {' '.join(str(error).split())}") from None
    return rows
