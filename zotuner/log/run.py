"""What a run's directory holds so far, read and checked.

A run that is going on, or was killed, has no summary and may end its files in half a line. Anything else that is
amiss is an error: a log that skips what it cannot read would show a run that never was.
"""

import time
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from zotuner.config import read_yaml
from zotuner.errors import ZotunerError
from zotuner.files import has_writer, is_run
from zotuner.log.scales import Scales
from zotuner.metrics import ASIDE, read_rows

# Seconds without a new row after which a run on another machine seems to have stopped; ten of its steps, if longer
SILENCE = 600.0


class _Read(BaseModel):
    """Something that a run wrote, and maybe more than is asked for here. Null: a number that is not finite."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class Head(_Read):
    """What `config.yaml` says of the run as a whole; a fine-tuning has a task and a method, a meta-training tasks."""

    model: str
    steps: int
    max_skipped: int = Field(10, ge=1)
    task: str = ""
    method: str = ""
    lr: float | None = None
    lr_schedule: str = "constant"
    tasks: list[str] = []
    inner_lr: float | None = None


class Step(_Read):
    """A row of `metrics.jsonl`. `step` counts from 0; `seconds` from the start of the run."""

    step: int = Field(ge=0)
    seconds: float
    loss: float | None
    coefficients: list[float | None]
    skipped: bool | int | None = None  # a number in older meta-trainings

    @property
    def was_skipped(self) -> bool:
        """Whether it changed nothing; rows of older runs do not say, but a loss that is not finite means that."""
        return self.loss is None if self.skipped is None else bool(self.skipped)


class FinetuneStep(Step):
    """Of a fine-tuning; `forwards` counts from the start of the run."""

    forwards: int
    lr: float
    clipped: bool = False


class MetaStep(Step):
    """Of a meta-training; `position` is the number of points since the model last began anew."""

    meta_loss: float | None
    sigma_min: float | None
    sigma_max: float | None
    sigma_log_std: float | None
    gain: float | None = None  # over sigma = 1, where the meta-loss tells
    position: int
    task: str


class Evaluation(_Read):
    """A row of `evals.jsonl`: the dev examples after `step` steps; `metrics` are the task's."""

    step: int = Field(ge=0)
    loss: float | None
    metrics: dict[str, float | None] = {}

    @model_validator(mode="before")
    @classmethod
    def _gathered(cls, row: Any) -> Any:
        """What a row holds beside counts, loss and its error are metrics."""
        if not isinstance(row, dict):
            return row
        apart = {"loss", *ASIDE}
        return {**row, "metrics": {name: value for name, value in row.items() if name not in apart}}


class _Blocks(_Read):
    """The first row of `scales.jsonl`."""

    blocks: list[str]


class _StepScales(_Read):
    """Any other: the normalised sigma~ of each block."""

    step: int = Field(ge=0)
    scales: list[float | None]


@dataclass(frozen=True)
class Run:
    """A run as far as it went.

    Attributes:
        folder: Its directory.
        head: What it was told to do.
        steps: What it did: at least one row; all of them `MetaStep` for a meta-training, else `FinetuneStep`.
        evaluations: On dev, in the order of their steps.
        scales: sigma~ by block, where a tuner chose it.
        finished: Whether its summary was written.
        has_writer: Whether a process writes to it; None where that is a matter of another machine.
        silence: Seconds since it last wrote a row.
    """

    folder: Path
    head: Head
    steps: list[Any]
    evaluations: list[Evaluation]
    scales: Scales | None
    finished: bool
    has_writer: bool | None
    silence: float

    @property
    def is_meta(self) -> bool:
        """Whether it trains a tuner."""
        return bool(self.head.tasks)

    @cached_property
    def coefficients(self) -> NDArray[np.float64]:
        """(steps,): the root mean square over each step's coefficients; NaN where there are none, or not all finite."""
        rms = [
            np.mean(np.square(np.array(row.coefficients, float))) if row.coefficients else np.nan for row in self.steps
        ]
        return np.sqrt(rms)

    @cached_property
    def best(self) -> Evaluation | None:
        """The evaluation whose weights the run keeps: the lowest loss on dev, the start left out."""
        found = [row for row in self.evaluations if row.step and row.loss is not None]
        return min(found, key=lambda row: row.loss or 0.0, default=None)

    def column(self, name: str) -> NDArray[np.float64]:
        """(steps,): one number of every step; NaN where it was not finite."""
        return np.array([getattr(row, name) for row in self.steps], float)

    @property
    def state(self) -> str:
        """Finished, going on or stopped, as far as the files say."""
        if self.finished:
            return "finished"
        last = f"last row {_ago(self.silence)} ago"
        if self.has_writer:
            return f"going on: {last}"
        tail = self.steps[-self.head.max_skipped :]
        if len(tail) == self.head.max_skipped and all(row.was_skipped for row in tail):
            return f"stopped: no finite loss {len(tail)} steps in a row"
        if self.has_writer is False:
            return f"stopped: {last}"
        patience = max(SILENCE, 10 * self.steps[-1].seconds / len(self.steps))
        return f"{'going on' if self.silence < patience else 'stopped'}, it seems: {last}"


def read_run(folder: Path) -> Run:
    """What a run's directory holds.

    Raises:
        ZotunerError: No run, one that has not taken a step, or damage; names the file and the row.
    """
    if not is_run(folder):
        raise ZotunerError(f"{folder}: expected a run's directory, with its config.yaml and metrics.jsonl")
    head = _head(folder / "config.yaml")
    metrics = folder / "metrics.jsonl"
    rows = read_rows(metrics, torn_end=True)
    if not rows:
        raise ZotunerError(f"{metrics}: expected a row a step, found none: the run has not taken a step")
    steps: list[Any] = _rows(metrics, rows, MetaStep if head.tasks else FinetuneStep)
    written = [metrics]
    evaluations: list[Evaluation] = []
    if (evals := folder / "evals.jsonl").exists():
        evaluations = _rows(evals, read_rows(evals, torn_end=True), Evaluation)
        written.append(evals)
    return Run(
        folder=folder,
        head=head,
        steps=steps,
        evaluations=evaluations,
        scales=_scales(folder / "scales.jsonl"),
        finished=(folder / "summary.json").exists(),
        has_writer=has_writer(folder),
        silence=max(0.0, time.time() - max(path.stat().st_mtime for path in written)),
    )


def _head(path: Path) -> Head:
    try:
        head = Head.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ZotunerError(f"{path}: {_first(error)}") from None
    if not head.tasks and not (head.task and head.method):
        raise ZotunerError(f"{path}: expected a task and a method, or the tasks of a meta-training")
    return head


R = TypeVar("R", bound=_Read)


def _rows(path: Path, rows: list[dict[str, Any]], kind: type[R], first: int = 1) -> list[R]:
    """Checked rows, the first of which is number `first` of its file; their steps go up."""
    try:
        found: list[R] = TypeAdapter(list[kind]).validate_python(rows)  # type: ignore[valid-type]
    except ValidationError as error:
        number = int(error.errors()[0]["loc"][0]) + first
        raise ZotunerError(f"{path}, row {number}: {_first(error)}") from None
    at = [getattr(row, "step", 0) for row in found]
    for number, (before, after) in enumerate(pairwise(at), start=first + 1):
        if after <= before:
            raise ZotunerError(f"{path}, row {number}: expected a step after {before}, got {after}")
    return found


def _scales(path: Path) -> Scales | None:
    """None where the file is missing, or has nothing to show yet."""
    rows = read_rows(path, torn_end=True) if path.exists() else []
    if not rows:
        return None
    (head,) = _rows(path, rows[:1], _Blocks)
    found = _rows(path, rows[1:], _StepScales, first=2)
    for number, row in enumerate(found, start=2):
        if len(row.scales) != len(head.blocks):
            raise ZotunerError(f"{path}, row {number}: expected {len(head.blocks)} scales, got {len(row.scales)}")
    if not found or not head.blocks:
        return None
    values = np.array([row.scales for row in found], float)
    return Scales(tuple(head.blocks), np.array([row.step for row in found]), values)


def _first(error: ValidationError) -> str:
    """The first complaint of pydantic: the key, what was expected, what came."""
    first = error.errors()[0]
    key = next((part for part in first["loc"] if isinstance(part, str)), "")
    came = "" if first["type"] == "missing" else f", got {str(first['input'])[:60]!r}"
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}{came}"


def _ago(seconds: float) -> str:
    """A time in its natural unit.

    >>> _ago(3.2), _ago(600), _ago(90000)
    ('3 s', '10 min', '25 h')
    """
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
