"""How far each run of a comparison is, from what lies in its folder and beside it.

seed-0/       the run's own directory
seed-0.log    what its processes said, one after the other
seed-0.json   how the last of them ended, and how long all of them took
"""

import json
import math
import re
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from zotuner.compare.plan import Planned
from zotuner.compare.spec import Unit
from zotuner.config import FinetuneConfig
from zotuner.errors import ZotunerError
from zotuner.files import has_writer
from zotuner.hub import AUTO
from zotuner.ledger import read_ledger
from zotuner.metrics import read_json, read_rows, write_json
from zotuner.report import read_summary

State = Literal["done", "running", "failed", "stopped", "to do"]
COMMIT = re.compile("[0-9a-f]{40}")  # a revision that names nothing else
NOT_COMPARED = ("out", "overwrite", "data_dir", "zero_shot")  # they change nothing of what a run learns
TAIL = 1 << 16  # bytes: more than a row of metrics takes


@dataclass(frozen=True)
class Note:
    """What is kept of a run's processes.

    Attributes:
        wall_seconds: Of all of them together, with loading and evaluations.
        exit_code: Of the last one; None while it goes on.
        message: Its last words, if it failed.
        commits: Of the source they ran, where that is known.
    """

    wall_seconds: float = 0.0
    exit_code: int | None = None
    message: str = ""
    commits: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether the last process ended by itself, but not well. A signal may come before a run can heed it."""
        asked = (signal.SIGINT, signal.SIGTERM)
        return self.exit_code not in (None, 0, *(128 + number for number in asked), *(-number for number in asked))


@dataclass(frozen=True)
class Point:
    """An evaluation on dev after `step` steps; a loss that was not finite is NaN.

    `loss_error`: standard error of the loss over the examples; NaN in runs of older versions.
    """

    step: int
    forwards: int
    tokens: int
    seconds: float
    loss: float
    loss_error: float = math.nan


@dataclass(frozen=True)
class Status:
    """One run as it is now.

    Attributes:
        planned: What it is to do.
        state: `stopped`: begun, and to be gone on with.
        share: How much of its cost it has spent, 0 to 1.
        note: Of its processes.
        summary: Its outcome, if it is done.
        curve: Its evaluations on dev, the starting weights first.
        test_losses: Of each test example, if it is done; empty in runs of older versions.
        step_losses: Of each step's batch, as often as it was evaluated, if it is done; empty for a first-order run.
    """

    planned: Planned
    state: State
    share: float
    note: Note
    summary: dict[str, Any]
    curve: tuple[Point, ...]
    test_losses: tuple[float, ...] = ()
    step_losses: tuple[tuple[float, ...], ...] = ()

    @property
    def best(self) -> float | None:
        """Loss on dev of the weights that a finished run delivers; None for one that took no step."""
        best = (self.summary.get("dev") or {}).get("best")
        return None if best is None else _number(best["loss"])

    @property
    def best_error(self) -> float:
        """Standard error of that over the dev examples; NaN where it is not known."""
        best = (self.summary.get("dev") or {}).get("best") or {}
        return next((point.loss_error for point in self.curve if point.step == best.get("step")), math.nan)


def log_of(planned: Planned) -> Path:
    """Where a run's processes say what they do."""
    return planned.folder.with_name(planned.folder.name + ".log")


def _note_of(planned: Planned) -> Path:
    return planned.folder.with_name(planned.folder.name + ".json")


def write_note(planned: Planned, note: Note) -> None:
    """Keeps a note beside its run, in a folder that is made for both."""
    planned.folder.parent.mkdir(parents=True, exist_ok=True)
    write_json(_note_of(planned), asdict(note))


def read_note(planned: Planned) -> Note:
    """A run's note; an empty one before its first process."""
    path = _note_of(planned)
    if not path.exists():
        return Note()
    try:
        kept = read_json(path)
        return Note(**{**kept, "commits": tuple(kept["commits"])})
    except (TypeError, KeyError) as error:
        raise ZotunerError(f"{path}: expected the note of a run ({error}); remove it") from None


def read_status(planned: Planned, unit: Unit) -> Status:
    """What a run's folder holds.

    Raises:
        ZotunerError: Damage; names the file.
    """
    folder, note = planned.folder, read_note(planned)
    if (folder / "summary.json").exists():
        losses = _test_losses(folder), _step_losses(folder)
        return Status(planned, "done", 1.0, note, read_summary(folder), _curve(folder), *losses)
    if has_writer(folder):
        state: State = "running"
    elif note.failed:
        state = "failed"
    else:
        state = "stopped" if (folder / "config.yaml").exists() else "to do"
    spent = _last_row(folder / "metrics.jsonl").get(unit, 0)
    share = min(1.0, spent / planned.cost) if planned.cost else 0.0
    return Status(planned, state, share, note, {}, _curve(folder))


def check_same(planned: Planned, file: Path) -> None:
    """Refuses a run that was begun with other options than it is now to have.

    Raises:
        ZotunerError: Names the run, the key and both values.
    """
    path = planned.folder / "config.yaml"
    if not path.is_file():
        return
    began = FinetuneConfig.read(path, {})
    for key in FinetuneConfig.model_fields:
        before, now = getattr(began, key), getattr(planned.config, key)
        if key not in NOT_COMPARED and before != now and not _left_open(key, now, before):
            raise ZotunerError(
                f"{planned.folder}: was begun with {key} {before}, but {file} says {now}; give it back what it was "
                "begun with, remove that folder, or choose another --out"
            )


def _left_open(key: str, planned: Any, began: Any) -> bool:
    """Whether an option is one that a run settles when it begins, and this is what it settled on."""
    if key == "tuner":  # which tuner it is that serves the model, and which commit of it
        name, _, revision = (planned or "").partition("@")
        return planned == AUTO or (
            began is not None and began.partition("@")[0] == name and not COMMIT.fullmatch(revision)
        )
    return key == "k_shot" and planned is None  # a number for masked models


def _curve(folder: Path) -> tuple[Point, ...]:
    path = folder / "evals.jsonl"
    rows = read_rows(path, torn_end=True) if path.exists() else []
    try:
        return tuple(
            Point(
                row["step"],
                row["forwards"],
                row["tokens"],
                row["seconds"],
                _number(row["loss"]),
                _number(row.get("loss_error")),
            )
            for row in rows
        )
    except KeyError as error:
        raise ZotunerError(
            f"{path}: expected step, forwards, tokens, seconds and loss in each row: no {error}"
        ) from None


def _test_losses(folder: Path) -> tuple[float, ...]:
    path = folder / "predictions.jsonl"
    try:
        return tuple(_number(row["loss"]) for row in (read_rows(path) if path.exists() else []))
    except KeyError:
        raise ZotunerError(f"{path}: expected a loss in each row") from None


def _step_losses(folder: Path) -> tuple[tuple[float, ...], ...]:
    path = folder / "ledger.bin"
    return tuple(record.losses for record in read_ledger(path)[1]) if path.exists() else ()


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _last_row(path: Path) -> dict[str, Any]:
    """The last whole row of a file that may be written now; nothing, if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            lines = file.read().split(b"\n")[:-1]
        return dict(json.loads(lines[-1])) if lines else {}
    except (OSError, ValueError):
        return {}
