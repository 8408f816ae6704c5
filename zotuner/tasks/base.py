"""What a task is: where its rows come from, and how a row becomes a prompt with candidates."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from zotuner.errors import ZotunerError
from zotuner.metrics import read_rows

Row = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A prompt, the texts that may follow it, and which of them is right."""

    prompt: str
    candidates: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Splits:
    """The examples that a run works with."""

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]


class Task(ABC):
    """One task: one small file each under `zotuner/tasks`.

    Class attributes:
        name: As on the command line and in `--data-dir`.
        prompt_version: Raised whenever a prompt changes.
        hub: (repository, configuration) on the Hub; None for a task that is embedded.
        fields: Of a row: name to type.
        labels: Number of labels a row may have.
        loss: "classification" over the candidates, or "language-modelling" of the right one.
        dev_size: Development examples by default (as published).
        dev_split, test_split: Where those examples come from; the official test sets have no labels. Where dev is
            drawn from "train", it is disjoint from the training examples.

    Args:
        data_dir: Reads `data_dir/<name>/<split>.jsonl` in place of the Hub.
    """

    name: ClassVar[str]
    prompt_version: ClassVar[int] = 1
    hub: ClassVar[tuple[str, str] | None]
    fields: ClassVar[dict[str, type]]
    labels: ClassVar[int] = 2
    loss: ClassVar[Literal["classification", "language-modelling"]]
    dev_size: ClassVar[int] = 500
    dev_split: ClassVar[str] = "train"
    test_split: ClassVar[str] = "validation"

    def __init__(self, data_dir: str | Path | None = None) -> None:
        self.data_dir = Path(data_dir) if data_dir is not None else None

    @abstractmethod
    def example(self, row: Row) -> Example:
        """The published prompt and candidates of a row."""

    def rows(self, split: str) -> list[Row]:
        """All rows of a split, checked.

        Raises:
            ZotunerError: No such data, an empty split, a field that is missing or of another type.
        """
        where, rows = self._read(split)
        if not rows:
            raise ZotunerError(f"{where}: expected examples of task {self.name}, found none")
        for number, row in enumerate(rows, start=1):
            self._check(row, f"{where}, row {number}")
        return rows

    def _read(self, split: str) -> tuple[str, list[Row]]:
        """Where the rows come from, and the rows."""
        if self.data_dir is not None:
            path = self.data_dir / self.name / f"{split}.jsonl"
            return str(path), read_rows(path)
        assert self.hub is not None
        return f"{self.hub[0]} ({self.hub[1]}, {split})", self._download(*self.hub, split)

    def _download(self, repository: str, configuration: str, split: str) -> list[Row]:
        from datasets import load_dataset

        try:
            return [dict(row) for row in load_dataset(repository, configuration, split=split)]
        except Exception as error:  # datasets, huggingface_hub and their HTTP client raise dozens of kinds
            reason = str(error).strip().split("\n")[0]
            raise ZotunerError(
                f"task {self.name}: cannot be had from the Hub ({repository}: {reason}); "
                f"go online, or pass --data-dir D with D/{self.name}/{split}.jsonl"
            ) from error

    def _check(self, row: Row, where: str) -> None:
        for field, kind in self.fields.items():
            if field not in row:
                raise ZotunerError(f"{where}: field {field!r} is missing; task {self.name} needs {list(self.fields)}")
            if not isinstance(row[field], kind) or isinstance(row[field], bool):
                raise ZotunerError(f"{where}: field {field!r} must be a {kind.__name__}, got {row[field]!r}")
        if not 0 <= row["label"] < self.labels:
            raise ZotunerError(f"{where}: field 'label' must be 0 to {self.labels - 1}, got {row['label']}")

    def splits(self, *, train_size: int, dev_size: int | None = None, eval_size: int = 1000, seed: int = 0) -> Splits:
        """Draws a run's examples by the seed, without replacement.

        Where a split is too small, dev takes at most a quarter of the training rows, and the rest take what there is.
        """
        random = np.random.default_rng(seed)
        train = _shuffled(self.rows("train"), random)
        wanted = dev_size or self.dev_size
        if self.dev_split == "train":
            count = min(wanted, max(1, len(train) // 4))
            if len(train) < 2:
                raise ZotunerError(f"task {self.name}: needs at least 2 training rows, one of them for dev")
            dev, train = train[-count:], train[:-count]
        else:
            dev = _shuffled(self.rows(self.dev_split), random)[:wanted]
        test = _shuffled(self.rows(self.test_split), random)[:eval_size]
        return Splits(*(tuple(self.example(row) for row in rows) for rows in (train[:train_size], dev, test)))


class EmbeddedTask(Task):
    """A task whose rows are in the package, with labelled test rows."""

    hub = None
    dev_split = "validation"
    test_split = "test"

    def _read(self, split: str) -> tuple[str, list[Row]]:
        path = Path(__file__).parent / "data" / self.name / f"{split}.jsonl"
        return path.name, read_rows(path)


def batches(examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[list[Example]]:
    """Endless batches: each epoch is a new order, drawn by (seed, epoch); an epoch's last batch may be smaller."""
    epoch = 0
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(len(examples))
        for start in range(0, len(order), batch_size):
            yield [examples[i] for i in order[start : start + batch_size]]
        epoch += 1


def digest(examples: Sequence[Example]) -> str:
    """What tells one batch from another: SHA-256 of its texts and labels, shortened."""
    return hashlib.sha256(repr(list(examples)).encode()).hexdigest()[:16]


def _shuffled(rows: list[Row], random: np.random.Generator) -> list[Row]:
    return [rows[i] for i in random.permutation(len(rows))]
