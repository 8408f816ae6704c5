"""The ledger: what a zeroth-order run needs to be rebuilt from its starting weights, a few numbers a step.

    magic | length of header | header (JSON) | CRC-32 of header | record | record | ...
    record: step (u32) | lr (f64) | losses (f32 each) | CRC-32 of the record (u32)

Noise comes from the header's seed and a record's step; coefficients and scales follow from the losses.
"""

import json
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from zotuner.errors import ZotunerError
from zotuner.files import write_atomically

MAGIC = b"ZOLEDGER"
FORMAT_VERSION = 1
MAX_HEADER = 1 << 20  # bytes
MAX_LOSSES = 1 << 16  # of a step
_CRC, _LENGTH = struct.Struct("<I"), struct.Struct("<I")


@dataclass(frozen=True)
class Record:
    """One step."""

    step: int
    lr: float
    losses: tuple[float, ...]


def _layout(losses: int) -> struct.Struct:
    return struct.Struct(f"<Id{losses}f")


def _packed_header(header: dict[str, Any]) -> bytes:
    text = json.dumps({"format_version": FORMAT_VERSION, **header}).encode()
    return MAGIC + _LENGTH.pack(len(text)) + text + _CRC.pack(zlib.crc32(text))


def _packed(layout: struct.Struct, record: Record) -> bytes:
    body = layout.pack(record.step, record.lr, *record.losses)
    return body + _CRC.pack(zlib.crc32(body))


class Ledger:
    """Appends a run's steps to a file.

    Args:
        path: The file. It must not exist, unless it is continued.
        header: Of a new file; JSON's types only. `losses`, the number of losses a step, is required. None: go on with
            a file that is there, behind its last whole record.
        sync_every: Steps after which what was written is synced; 1: before `write` returns.

    Raises:
        FileExistsError: A new ledger where a file is.
        ZotunerError: A file to go on with that is none, or is damaged.
    """

    def __init__(self, path: Path, header: dict[str, Any] | None, *, sync_every: int = 1) -> None:
        self.header: dict[str, Any]
        self.records: list[Record]  # that it held when it was opened
        self._sync_every, self._unsynced = sync_every, 0
        if header is not None:
            if path.exists():
                raise FileExistsError(path)
            write_atomically(path, _packed_header(header))
            self.header, self.records = header, []
        else:
            self.header, self.records = read_ledger(path)
        self._layout = _layout(self.header["losses"])
        size = self._layout.size + _CRC.size
        self._file: IO[bytes] = path.open("r+b")
        self._file.seek(_body(path) + len(self.records) * size)
        self._file.truncate()

    def write(self, step: int, lr: float, losses: Sequence[float]) -> None:
        """Appends one step."""
        self._file.write(_packed(self._layout, Record(step, lr, tuple(losses))))
        self._file.flush()
        self._unsynced += 1
        if self._unsynced >= self._sync_every:
            self.sync()

    def sync(self) -> None:
        """Everything that was written is on the disk."""
        os.fsync(self._file.fileno())
        self._unsynced = 0

    def __enter__(self) -> Self:
        return self

    def close(self) -> None:
        """Syncs what is not yet, and ends."""
        if self._unsynced:
            self.sync()
        self._file.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def write_ledger(path: Path, header: dict[str, Any], records: Sequence[Record]) -> None:
    """Writes a whole ledger at once, such as one to share."""
    layout = _layout(header["losses"])
    write_atomically(path, _packed_header(header) + b"".join(_packed(layout, record) for record in records))


def read_ledger(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """The header and all whole records; a torn last record, left by a crash, is dropped.

    Raises:
        ZotunerError: No ledger, or damage before the last record; names the offset.
    """
    try:
        with path.open("rb") as file:
            header = _read_header(path, file)
            return header, _read_records(path, file, _layout(header["losses"]))
    except OSError as error:
        raise ZotunerError(f"{path}: cannot be read as a ledger: {error.strerror}") from None


def _body(path: Path) -> int:
    """Where the records begin, in a file whose header is whole."""
    with path.open("rb") as file:
        file.seek(len(MAGIC))
        return len(MAGIC) + _LENGTH.size + int(_LENGTH.unpack(file.read(_LENGTH.size))[0]) + _CRC.size


def _read_header(path: Path, file: IO[bytes]) -> dict[str, Any]:
    start = len(MAGIC) + _LENGTH.size
    begin = file.read(start)
    if begin[: len(MAGIC)] != MAGIC or len(begin) < start:
        raise ZotunerError(f"{path}: expected a zotuner ledger, which begins with {MAGIC.decode()}")
    (length,) = _LENGTH.unpack_from(begin, len(MAGIC))
    size = os.fstat(file.fileno()).st_size
    if length > MAX_HEADER or size < start + length + _CRC.size:
        raise ZotunerError(f"{path}: damaged at offset {len(MAGIC)}: header of {length} bytes in a file of {size}")
    text = file.read(length)
    if _CRC.unpack(file.read(_CRC.size)) != (zlib.crc32(text),):
        raise ZotunerError(f"{path}: damaged at offset {start}: the header's checksum does not match")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ZotunerError(f"{path}: damaged at offset {start}: expected a header that is a JSON object")
    if header.get("format_version") != FORMAT_VERSION:
        raise ZotunerError(f"{path}: expected ledger format {FORMAT_VERSION}, got {header.get('format_version')}")
    losses = header.get("losses")
    if not isinstance(losses, int) or not 1 <= losses <= MAX_LOSSES:
        raise ZotunerError(f"{path}: header: losses: expected 1 to {MAX_LOSSES} a step, got {losses!r}")
    return header


def _read_records(path: Path, file: IO[bytes], layout: struct.Struct) -> list[Record]:
    size, end = layout.size + _CRC.size, os.fstat(file.fileno()).st_size
    records: list[Record] = []
    while len(packed := file.read(size)) == size:
        if _CRC.unpack_from(packed, layout.size) != (zlib.crc32(packed[: layout.size]),):
            if file.tell() >= end:
                break
            offset = file.tell() - size
            raise ZotunerError(f"{path}: damaged at offset {offset}: the checksum of record {len(records)} is wrong")
        step, lr, *losses = layout.unpack_from(packed)
        records.append(Record(step, lr, tuple(losses)))
    return records
