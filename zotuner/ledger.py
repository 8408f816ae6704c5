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
from typing import Any, Self

from zotuner.errors import ZotunerError

MAGIC = b"ZOLEDGER"
FORMAT_VERSION = 1
MAX_HEADER = 1 << 20  # bytes
_CRC, _LENGTH = struct.Struct("<I"), struct.Struct("<I")


@dataclass(frozen=True)
class Record:
    """One step."""

    step: int
    lr: float
    losses: tuple[float, ...]


def _layout(losses: int) -> struct.Struct:
    return struct.Struct(f"<Id{losses}f")


class Ledger:
    """Appends a run's steps to a new file, each synced before `write` returns.

    Args:
        path: The file; it must not exist.
        header: JSON's types only. `losses`, the number of losses a step, is required.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self._layout = _layout(header["losses"])
        self._file = path.open("xb")
        text = json.dumps({"format_version": FORMAT_VERSION, **header}).encode()
        self._append(MAGIC + _LENGTH.pack(len(text)) + text + _CRC.pack(zlib.crc32(text)))

    def write(self, step: int, lr: float, losses: Sequence[float]) -> None:
        """Appends one step."""
        body = self._layout.pack(step, lr, *losses)
        self._append(body + _CRC.pack(zlib.crc32(body)))

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_ledger(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """The header and all whole records; a torn last record, left by a crash, is dropped.

    Raises:
        ZotunerError: No ledger, or damage before the last record; names the offset.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ZotunerError(f"{path}: cannot be read as a ledger: {error.strerror}") from None
    start = len(MAGIC) + _LENGTH.size
    if data[: len(MAGIC)] != MAGIC or len(data) < start:
        raise ZotunerError(f"{path}: expected a zotuner ledger, which begins with {MAGIC.decode()}")
    (length,) = _LENGTH.unpack_from(data, len(MAGIC))
    if length > MAX_HEADER or len(data) < start + length + _CRC.size:
        raise ZotunerError(f"{path}: damaged at offset {len(MAGIC)}: header of {length} bytes in a file of {len(data)}")
    text = data[start : start + length]
    if _CRC.unpack_from(data, start + length) != (zlib.crc32(text),):
        raise ZotunerError(f"{path}: damaged at offset {start}: the header's checksum does not match")
    header: dict[str, Any] = json.loads(text)
    if header.get("format_version") != FORMAT_VERSION:
        raise ZotunerError(f"{path}: expected ledger format {FORMAT_VERSION}, got {header.get('format_version')}")
    layout = _layout(header["losses"])
    size = layout.size + _CRC.size
    body = start + length + _CRC.size
    records: list[Record] = []
    for offset in range(body, len(data) - size + 1, size):
        packed = data[offset : offset + layout.size]
        if _CRC.unpack_from(data, offset + layout.size) != (zlib.crc32(packed),):
            if offset + size >= len(data):
                break
            raise ZotunerError(f"{path}: damaged at offset {offset}: the checksum of record {len(records)} is wrong")
        step, lr, *losses = layout.unpack(packed)
        records.append(Record(step, lr, tuple(losses)))
    return header, records
