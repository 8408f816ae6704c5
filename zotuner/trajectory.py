"""First-order trajectories: the weights that a model passes through as Adam tunes it, seen again and again.

    theta_0  --Adam-->  theta_1  --Adam-->  ...  --every R points-->  theta_0  ...

A trajectory can be recorded (batches and losses always, weights on request) and visited again without walking it.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from zotuner.errors import ZotunerError
from zotuner.metrics import MetricsLog, keep_rows, read_rows
from zotuner.models import check_weights, keep_weights, restore_weights
from zotuner.snapshot import optimizer_groups, optimizer_tensors, restore_optimizer
from zotuner.tasks import Example, digest

MOMENTUM = 0.9  # of SGD
ROWS, START = "points.jsonl", "start.safetensors"

Loss = Callable[[str, Sequence[Example]], Tensor]  # (task, examples) -> 0-d loss at the model's present weights


@dataclass(frozen=True)
class Point:
    """One stop of a trajectory; the model's weights are at it.

    Attributes:
        number: From 0, over the whole walk.
        position: Steps since the last reset.
        begins: Whether the model began anew since the point before, or this is the first.
        task: Whose batch it is.
        examples: The batch.
        others: As many further examples of the task, as far as there are.
    """

    number: int
    position: int
    begins: bool
    task: str
    examples: tuple[Example, ...]
    others: tuple[Example, ...]


def first_order(name: Literal["adam", "sgd"], model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Adam, or SGD with momentum 0.9, over a model's trainable parameters; fused, so that no copies are made."""
    params = [p for p in model.parameters() if p.requires_grad]
    if name == "adam":
        return torch.optim.Adam(params, lr=lr, fused=True)
    return torch.optim.SGD(params, lr=lr, momentum=MOMENTUM, fused=True)


def tidy(folder: Path) -> None:
    """Removes what a walk that is over leaves: its starting weights, and files of a process that was killed."""
    for path in (folder / START, *folder.glob("*.part")):
        path.unlink(missing_ok=True)


def step_if_finite(optimizer: torch.optim.Optimizer, loss: float) -> bool:
    """Takes a step, unless the loss or a gradient is not finite: that would be in every weight from then on.

    Gradients do not outlive it. Returns whether the step was taken.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    finite = math.isfinite(loss) and bool(torch.isfinite(nn.utils.get_total_norm(gradients)))
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    return finite


class Walk:
    """Walks a trajectory, and records it.

    Args:
        model: Its weights are moved.
        loss: Evaluates a batch.
        train: Training examples of each task.
        folder: Where the record goes; made here.
        optimizer: "adam" or "sgd".
        lr: Of that optimizer.
        reset_every: Points after which weights and optimizer start anew.
        batch_size: Examples a point.
        seed: Of tasks' order and batches.
        snapshot_every: Keep the weights of every such point, so that it can be visited again.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        train: Mapping[str, Sequence[Example]],
        folder: Path,
        *,
        optimizer: Literal["adam", "sgd"],
        lr: float,
        reset_every: int,
        batch_size: int,
        seed: int,
        snapshot_every: int | None = None,
    ) -> None:
        self._model, self._loss, self._train, self._folder = model, loss, train, folder
        self._make = lambda: first_order(optimizer, model, lr)
        self._optimizer = self._make()
        self._reset_every, self._batch_size, self._seed = reset_every, batch_size, seed
        self._snapshot_every = snapshot_every

    def points(self, count: int, start: int = 0) -> Iterator[Point]:
        """Yields each point from `start` on with the model at it, and takes the step to the next when asked for that.

        After `restore`, it goes on with a walk that was left at `start`.
        """
        kept = self._folder / START
        if start == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            keep_weights(self._model, kept)
        else:
            check_weights(self._model, kept)
        keep_rows(self._folder / ROWS, lambda row: row["number"] < start)
        yield from self._walk(count, start)

    def close(self) -> None:
        """The walk is over for good: its starting weights go."""
        tidy(self._folder)

    def state(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """What the next step stands on, beside the weights: the optimizer's tensors, and its options and numbers."""
        return optimizer_tensors(self._optimizer), optimizer_groups(self._optimizer)

    def restore(self, tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> None:
        """Takes back what `state` gave."""
        restore_optimizer(self._optimizer, groups, tensors)

    def _walk(self, count: int, start: int) -> Iterator[Point]:
        with MetricsLog(self._folder / ROWS) as rows:
            for number in range(start, count):
                position = number % self._reset_every
                if number and position == 0:
                    restore_weights(self._model, self._folder / START)
                    self._optimizer = self._make()
                task, chosen = self._batch(number)
                snapshot = self._snapshot(number)
                point = _point(self._train, number, position, position == 0, task, chosen)
                yield point
                loss = self._step(self._optimizer, point)
                rows.write(
                    number=number,
                    position=position,
                    task=task,
                    examples=chosen,
                    digest=digest(point.examples),
                    loss=loss,
                    snapshot=snapshot,
                )

    def _batch(self, number: int) -> tuple[str, list[int]]:
        """The task and the batch of a point: a function of (seed, number) alone."""
        tasks = list(self._train)
        turn = np.random.default_rng((self._seed, number // len(tasks))).permutation(len(tasks))
        task = tasks[turn[number % len(tasks)]]
        random = np.random.default_rng((self._seed, number, 1))
        size = min(self._batch_size, len(self._train[task]))
        return task, random.choice(len(self._train[task]), size, replace=False).tolist()

    def _snapshot(self, number: int) -> str | None:
        if self._snapshot_every is None or number % self._snapshot_every:
            return None
        name = f"point-{number:06d}.safetensors"
        keep_weights(self._model, self._folder / name)
        return name

    def _step(self, optimizer: torch.optim.Optimizer, point: Point) -> float:
        """One first-order step on the point's batch, if it can be taken; returns the loss."""
        loss = self._loss(point.task, point.examples)
        loss.backward()
        value = float(loss.detach())
        step_if_finite(optimizer, value)
        return value


class Recorded:
    """Visits the kept points of a recorded trajectory, over and over, without walking.

    Args:
        model: Its weights are moved.
        train: Training examples of each task, drawn as in the recorded run.
        folder: Of the record.

    Raises:
        ZotunerError: No record, no kept weights, or other tasks than the record's.
    """

    def __init__(self, model: nn.Module, train: Mapping[str, Sequence[Example]], folder: Path) -> None:
        self._model, self._train, self._folder = model, train, folder
        self._rows: list[dict[str, Any]] = [row for row in read_rows(folder / ROWS) if row.get("snapshot")]
        if not self._rows:
            raise ZotunerError(f"{folder / ROWS}: no point has its weights kept; record with --snapshot-every")
        for row in self._rows:
            check_weights(model, folder / row["snapshot"])
            known = train.get(row["task"], ())
            if max(row["examples"]) >= len(known) or digest([known[i] for i in row["examples"]]) != row["digest"]:
                raise ZotunerError(
                    f"{folder / ROWS}: the examples of point {row['number']}, of task {row['task']}, are not those "
                    "drawn now; pass the --tasks, --data-dir, --train-size and --seed that the record was made with"
                )

    def state(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """As of a `Walk`; visiting stands on nothing."""
        return {}, []

    def restore(self, tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> None:
        """As of a `Walk`."""

    def close(self) -> None:
        """As of a `Walk`; what was recorded stays."""

    def points(self, count: int, start: int = 0) -> Iterator[Point]:
        """Yields the points from `start` up to `count` with the model at each."""
        for number in range(start, count):
            row, before = (self._rows[(number - back) % len(self._rows)] for back in (0, 1))
            begins = number == 0 or row["position"] <= before["position"]
            restore_weights(self._model, self._folder / row["snapshot"])
            yield _point(self._train, number, row["position"], begins, row["task"], row["examples"])


def _point(
    train: Mapping[str, Sequence[Example]], number: int, position: int, begins: bool, task: str, chosen: Sequence[int]
) -> Point:
    """A point by the numbers of its examples; the others follow from these and the point's number alone."""
    left = np.setdiff1d(np.arange(len(train[task])), chosen)
    random = np.random.default_rng((number, *chosen))
    others = random.choice(left, min(len(chosen), len(left)), replace=False)
    picked, further = (tuple(train[task][i] for i in numbers) for numbers in (chosen, others))
    return Point(number, position, begins, task, picked, further)
