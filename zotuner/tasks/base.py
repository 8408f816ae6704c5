"""What a task is: where its rows come from, and how a row becomes a prompt with candidates."""

import hashlib
from abc import ABC
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from zotuner.errors import ZotunerError, first_line, repeated
from zotuner.metrics import ASIDE, read_rows
from zotuner.tasks.scores import Example, Mean, Metric, right
from zotuner.tasks.tables import read_table

Row = dict[str, Any]
Kind = Literal["causal", "masked"]  # of models
Loss = Literal["classification", "language-modelling"]


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
        hub: (repository, configuration) on the Hub, the latter "" where it has one alone; None for a task that is
            elsewhere.
        sources: Split to the table that holds it, a path from `folder` (.csv, .tsv, .jsonl, .json or .parquet); with
            `hub`, to the name that the split has there, if it is another.
        folder: Of a task in a file of its own: where that file is.
        fields: Of a row: name to type.
        label_field: The field that holds a row's class, if `fields` has it.
        labels: Number of classes.
        loss: "classification" over the candidates, or "language-modelling" of the right one, for causal models; masked
            ones always classify.
        metrics: By name; the first is the one to look at. Each is a function of (all answers, their examples).
        generates: The answer is text that the model generates, not one of several candidates.
        max_new_tokens: Tokens that are generated at most.
        stop: Text at which a generated answer ends.
        dev_size: Development examples by default (as published).
        dev_split, test_split: Where those examples come from; the official test sets have no labels. Where dev is
            drawn from "train", it is disjoint from the training examples; so is test, which may be as well.

    Args:
        data_dir: Reads `data_dir/<name>/<split>.jsonl` in place of the Hub.
    """

    name: ClassVar[str]
    prompt_version: ClassVar[int] = 1
    hub: ClassVar[tuple[str, str] | None] = None
    sources: ClassVar[dict[str, str]] = {}
    folder: ClassVar[Path] = Path()
    fields: ClassVar[dict[str, type]]
    label_field: ClassVar[str] = "label"
    labels: ClassVar[int] = 2
    loss: ClassVar[Loss]
    metrics: ClassVar[dict[str, Metric]] = {"accuracy": Mean(right)}
    generates: ClassVar[bool] = False
    max_new_tokens: ClassVar[int] = 50
    stop: ClassVar[str] = "\n"
    dev_size: ClassVar[int] = 500
    dev_split: ClassVar[str] = "train"
    test_split: ClassVar[str] = "validation"

    def __init__(self, data_dir: str | Path | None = None) -> None:
        self.data_dir = Path(data_dir) if data_dir is not None else None

    def example(self, row: Row) -> Example:
        """The published prompt and candidates of a row, for a causal model.

        Raises:
            ZotunerError: The task has none.
        """
        raise ZotunerError(f"task {self.name} has a prompt for masked models alone (such as RoBERTa)")

    def masked(self, row: Row) -> Example:
        """The same for a masked model: the candidates, of a token each, stand between `prompt` and `suffix`.

        Raises:
            ZotunerError: The task has none.
        """
        raise ZotunerError(f"task {self.name} has a prompt for causal models alone")

    @classmethod
    def kinds(cls) -> tuple[Kind, ...]:
        """Of models that the task has a prompt for."""
        found: dict[Kind, bool] = {"causal": cls.example is not Task.example, "masked": cls.masked is not Task.masked}
        return tuple(kind for kind, has in found.items() if has)

    def label(self, row: Row) -> int:
        """The class of a row, for sampling so many of each."""
        number: int = row[self.label_field]
        return number

    def labelled(self, row: Row) -> bool:
        """False for a row, right in form, that the published set leaves without an answer: `rows` drops it."""
        return True

    def rows(self, split: str) -> list[Row]:
        """All labelled rows of a split, checked.

        Raises:
            ZotunerError: No such data, an empty split, a field that is missing or of another type.
        """
        where, rows = self._read(split)
        for number, row in enumerate(rows, start=1):
            self._check(row, f"{where}, row {number}")
        rows = [row for row in rows if self.labelled(row)]
        if not rows:
            raise ZotunerError(f"{where}: expected examples of task {self.name}, found none")
        return rows

    def _read(self, split: str) -> tuple[str, list[Row]]:
        """Where the rows come from, and the rows."""
        if self.data_dir is not None:
            path = self.data_dir / self.name / f"{split}.jsonl"
            return str(path), read_rows(path)
        if self.hub is not None:
            part = ", ".join(filter(None, (self.hub[1], split)))
            return f"{self.hub[0]} ({part})", self._download(*self.hub, split)
        if split not in self.sources:
            raise ZotunerError(
                f"task {self.name} has no {split!r} rows: name their table in sources, or another split in dev_split "
                f"and test_split, or pass --data-dir D with D/{self.name}/{split}.jsonl"
            )
        path = self.folder / self.sources[split]
        return str(path), [self._typed(row) for row in read_table(path)]

    def _typed(self, row: Row) -> Row:
        """A row of a table that may know text alone: text becomes the number that a field is to be, if it is one."""
        for name, kind in self.fields.items():
            if kind in (int, float) and isinstance(row.get(name), str):
                with suppress(ValueError):  # `_check` says what is wrong
                    row = row | {name: kind(row[name])}
        return row

    def _download(self, repository: str, configuration: str, split: str) -> list[Row]:
        from datasets import load_dataset

        try:
            found = load_dataset(repository, configuration or None, split=self.sources.get(split, split))
            return [dict(row) for row in found]
        except Exception as error:  # datasets, huggingface_hub and their HTTP client raise dozens of kinds
            reason = first_line(error)
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
        field = self.label_field
        if field in self.fields and self.labelled(row) and not 0 <= row[field] < self.labels:
            raise ZotunerError(f"{where}: field {field!r} must be 0 to {self.labels - 1}, got {row[field]}")

    def splits(
        self,
        *,
        train_size: int,
        dev_size: int | None = None,
        eval_size: int = 1000,
        k_shot: int | None = None,
        seed: int = 0,
        kind: Kind = "causal",
    ) -> Splits:
        """Draws a run's examples by the seed, without replacement.

        Where a split is too small, what is held back from the training rows is at most a quarter of them each for test
        and dev, and the rest take what there is.

        Args:
            train_size: Training examples.
            dev_size: Development examples; None: the task's own number.
            eval_size: Test examples.
            k_shot: So many training and so many development examples of each class, in place of both sizes, as masked
                models are tuned (arXiv:2012.15723, section 3.1; arXiv:2305.17333, appendix).
            seed: Of the draw.
            kind: Of the model that the prompts are for.
        """
        random = np.random.default_rng(seed)
        train = _shuffled(self.rows("train"), random)
        quarter = max(1, len(train) // 4)
        if self.test_split == "train":
            train, test = self._hold_back(train, min(eval_size, quarter))
        if k_shot is not None:
            train, dev = self._of_each_class(train, k_shot)
        elif self.dev_split == "train":
            train, dev = self._hold_back(train, min(dev_size or self.dev_size, quarter))
        else:
            dev = _shuffled(self.rows(self.dev_split), random)[: dev_size or self.dev_size]
        if k_shot is None:
            train = train[:train_size]
        if self.test_split != "train":
            test = _shuffled(self.rows(self.test_split), random)[:eval_size]
        written = self.example if kind == "causal" else self.masked
        return Splits(*(tuple(written(row) for row in rows) for rows in (train, dev, test)))

    def _hold_back(self, rows: list[Row], count: int) -> tuple[list[Row], list[Row]]:
        """The rows without the last so many, and those."""
        if len(rows) < 2:
            least = 1 + [self.dev_split, self.test_split].count("train")
            raise ZotunerError(
                f"task {self.name}: needs at least {least} training rows, one each for dev and test drawn from them"
            )
        return rows[:-count], rows[-count:]

    def _of_each_class(self, rows: list[Row], k: int) -> tuple[list[Row], list[Row]]:
        """The first k rows of each class, and the next k."""
        if self.generates:
            raise ZotunerError(f"task {self.name} has no classes to take {k} examples of: use --train-size")
        by_class: dict[int, list[Row]] = {}
        for row in rows:
            by_class.setdefault(self.label(row), []).append(row)
        for label, found in by_class.items():
            if len(found) < 2 * k:
                raise ZotunerError(
                    f"task {self.name}: expected {2 * k} training rows of class {label}, half of them for dev, "
                    f"found {len(found)}; take a smaller --k-shot"
                )
        classes = sorted(by_class)
        return [r for c in classes for r in by_class[c][:k]], [r for c in classes for r in by_class[c][k : 2 * k]]


class EmbeddedTask(Task):
    """A task whose rows are in the package, with labelled test rows; `data_dir` may hold others."""

    hub = None
    dev_split = "validation"
    test_split = "test"

    def _read(self, split: str) -> tuple[str, list[Row]]:
        if self.data_dir is not None and (self.data_dir / self.name).is_dir():
            return super()._read(split)
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


def check_metrics(where: str, names: Sequence[str]) -> None:
    """Raises a ZotunerError where a metric's name is that of something else that a run writes, or stands twice."""
    for name in names:
        if name == "loss" or name in ASIDE:
            raise ZotunerError(f"{where}: a metric cannot be called {name!r}, as what a run writes beside it is")
    twice = repeated(names)
    if twice is not None:
        raise ZotunerError(f"{where}: expected metrics of different names, got {twice!r} twice")


def digest(examples: Sequence[Example]) -> str:
    """What tells one batch from another: SHA-256 of its texts and labels, shortened."""
    return hashlib.sha256(repr(list(examples)).encode()).hexdigest()[:16]


def texts(value: object) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _shuffled(rows: list[Row], random: np.random.Generator) -> list[Row]:
    return [rows[i] for i in random.permutation(len(rows))]
