"""Files that `torch.save` wrote, read without running anything that they say.

    bytes  ->  container (zip or legacy)  ->  pickle  ->  dicts and records  ->  tensors of the expected shapes

Sizes are checked before memory is taken: the file's and the pickle's against what is expected, an entry's against the
file and against what the pickle says of it, a tensor's against its storage.
"""

import hashlib
import io
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zotuner.errors import ZotunerError
from zotuner.pickled import Evaluation, Limits, RefusedError, Storage, TensorRecord, shown

ZIP = b"PK\x03\x04"
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the legacy container begins with them
ORDERS = {b"little": "<", b"big": ">"}
# What a damaged file makes `zipfile`, `pickletools` and an evaluation raise.
DAMAGE = (
    *(zipfile.BadZipFile, struct.error, OSError, EOFError, RuntimeError, ArithmeticError),
    *(AttributeError, LookupError, TypeError, ValueError),
)


@dataclass(frozen=True)
class Saved:
    """What a file holds.

    Attributes:
        content: The object that was saved: dicts, lists, tuples, strings, numbers and records of `zotuner.pickled`.
        storages: The bytes of each, by key.
        order: Of the bytes of a number: "<" or ">".
        sha256: Of the file.
    """

    content: Any
    storages: Mapping[str, bytes]
    order: str
    sha256: str

    def tensor(self, record: object, shape: tuple[int, ...]) -> Tensor:
        """A tensor of a known shape, as float32.

        Raises:
            RefusedError: The record is another thing, has another shape, or leaves its storage.
        """
        if not isinstance(record, TensorRecord) or not isinstance(record.storage, Storage):
            raise RefusedError(f"expected a tensor {shape}, got something else")
        offset, stride, storage = record.offset, record.stride, record.storage
        if record.size != shape:
            raise RefusedError(f"expected a tensor {shape}, got {_numbers(record.size)}")
        if not _counts((offset,)) or not _counts(stride) or len(stride) != len(shape):
            raise RefusedError(f"expected strides and an offset from 0 up, got {_numbers(stride)}, {_numbers(offset)}")
        steps = [step if size > 1 else 0 for size, step in zip(shape, stride, strict=True)]
        if offset + sum((size - 1) * step for size, step in zip(shape, steps, strict=True)) >= storage.numel:
            raise RefusedError(f"a tensor {shape} reaches beyond the {storage.numel} numbers of its storage")
        words = np.frombuffer(self.storages[storage.key], f"{self.order}i{storage.dtype.itemsize}")
        whole = torch.from_numpy(words.astype(words.dtype.newbyteorder("="))).view(storage.dtype)
        return whole.as_strided(shape, steps, offset).float().contiguous()


def read_pth(path: Path, limits: Limits) -> Saved:
    """Reads a file of `torch.save`, of either container.

    Args:
        path: The file.
        limits: What it may take.

    Raises:
        ZotunerError: The file is damaged, exceeds a limit, or asks for what `zotuner.pickled` does not know.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limits.nbytes + 1)
    except OSError as error:
        raise ZotunerError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) > limits.nbytes:
        raise ZotunerError(f"{path}: expected at most {limits.nbytes} bytes for this base model, the file has more")
    try:
        return _read_zip(data, limits) if data.startswith(ZIP) else _read_legacy(data, limits)
    except RefusedError as refusal:
        raise ZotunerError(f"{path}: {refusal} (nothing of the file was run)") from None
    except DAMAGE as error:
        reason = shown(str(error)) or type(error).__name__
        raise ZotunerError(f"{path}: expected a whole file of torch.save ({reason}); get the file again") from None


def _read_zip(data: bytes, limits: Limits) -> Saved:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        for name, entry in entries.items():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise RefusedError(f"entry {shown(name)}: expected it stored as it is, found it compressed")
        if sum(entry.file_size for entry in entries.values()) > len(data):
            raise RefusedError(f"its entries claim more than the {len(data)} bytes of the file")
        roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise RefusedError(f"expected one entry data.pkl, as torch.save writes it, found {len(roots)}")
        (root,) = roots
        evaluation = Evaluation(limits)
        content = evaluation.run(io.BytesIO(archive.read(f"{root}data.pkl")))
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
        if order not in ORDERS:
            raise RefusedError(f"entry byteorder: expected little or big, got {shown(str(order))}")
        storages = {}
        for key, storage in evaluation.storages.items():
            entry = archive.getinfo(f"{root}data/{key}")
            if (size := entry.file_size) != storage.nbytes:
                raise RefusedError(f"storage {shown(key)}: expected {storage.nbytes} bytes, its entry has {size}")
            storages[key] = archive.read(entry)
    return Saved(content, storages, ORDERS[order], hashlib.sha256(data).hexdigest())


def _read_legacy(data: bytes, limits: Limits) -> Saved:
    """Five pickles (magic number, protocol, facts of the machine, object, keys of the storages), then the storages."""
    file, evaluation = io.BytesIO(data), Evaluation(limits)
    if evaluation.run(file) != MAGIC or evaluation.run(file) != PROTOCOL:
        raise ValueError("it begins otherwise")
    evaluation.run(file)
    content, keys = evaluation.run(file), evaluation.run(file)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("no list of storages")
    if len(keys) != len(evaluation.storages) or set(keys) != set(evaluation.storages):
        raise RefusedError(f"it lists {len(keys)} storages, its pickle uses {len(evaluation.storages)}, or others")
    storages = {}
    for key in keys:
        storage = evaluation.storages[key]
        numel = int.from_bytes(file.read(8), "little", signed=True)
        if numel != storage.numel:
            raise RefusedError(f"storage {shown(key)}: expected {storage.numel} numbers, found {numel}")
        storages[key] = file.read(storage.nbytes)
        if len(storages[key]) != storage.nbytes:
            raise EOFError(f"storage {key} ends early")
    return Saved(content, storages, "<", hashlib.sha256(data).hexdigest())


def _counts(values: object) -> bool:
    """Whether it is a tuple of whole numbers of at least 0."""
    return isinstance(values, tuple) and all(type(value) is int and value >= 0 for value in values)


def _numbers(value: object) -> str:
    """Numbers out of a file for a message."""
    values = value if isinstance(value, tuple) else (value,)
    if not all(type(x) is int and abs(x) < 1 << 64 for x in values) or len(values) > 4:
        return "something else"
    return str(value)
