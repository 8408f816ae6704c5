"""A meta-training run: one outer step at every point of a trajectory, and all that is kept of it.

load  ->  point  ->  outer step, row of metrics  ->  first-order step  ->  ...  ->  tuner, summary

A run that was killed goes on from its last snapshot, and ends with the same tuner.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zotuner.adapters import adapted, adapter_of
from zotuner.config import MetaTrainConfig
from zotuner.errors import ZotunerError
from zotuner.files import check_out, claim_out, locked
from zotuner.meta import MetaTrainer
from zotuner.metrics import MetricsLog, keep_rows, write_json
from zotuner.models import kind_of, known_as, load_model, weights_sha256
from zotuner.objective import Objective, objective_for
from zotuner.progress import Display, peak_rss_bytes
from zotuner.signals import Requests
from zotuner.snapshot import drop_all, drop_unfinished, latest, take, under
from zotuner.tasks import Example, Splits, digest, get_task
from zotuner.trajectory import Point, Recorded, Walk, tidy
from zotuner.tuner import Tuner
from zotuner.visit import Loss, Visit

METRICS, POINTS, SUMMARY, TRAJECTORY = "metrics.jsonl", "points.safetensors", "summary.json", "trajectory"
# What a run is told that does not change the tuner, and so is none of its card's business
NOT_OF_THE_TUNER = {"out", "data_dir", "overwrite", "save_every"}


def meta_train(config: MetaTrainConfig, display: Display, *, resume: bool = False) -> Tuner:
    """Runs a meta-training and fills its run directory.

    Args:
        config: All options.
        display: Where progress goes.
        resume: Go on with the run that `config.out` holds, from its last snapshot; `config` must be what it was begun
            with.

    Returns:
        The tuner, which lies in `config.out`.

    Raises:
        ZotunerError: Something that the user can put right; nothing was written unless the run had begun.
        Interrupted: A signal ended the run; it can be resumed.
    """
    if resume and (config.out / SUMMARY).exists():
        display.say(f"{config.out}: this run is finished")
        with locked(config.out):
            tidy(config.out / TRAJECTORY)
            drop_all(config.out)
        return Tuner.from_pretrained(config.out)
    if not resume:
        check_out(
            config.out,
            config.overwrite,
            [Path(config.model), config.data_dir, config.trajectory, *map(Path, config.tasks)],
        )
    with display, Requests() as requests, locked(config.out):
        display.say(f"loading {config.model} and {', '.join(config.tasks)}")
        tasks = {task.name: task for task in (get_task(name, config.data_dir) for name in config.tasks)}
        if len(tasks) < len(set(config.tasks)):
            raise ZotunerError(f"--tasks: expected tasks of different names, got {', '.join(tasks)} more than once")
        model, tokenizer = load_model(config.model, dtype=config.dtype)
        base_sha256 = weights_sha256(model)
        model = adapted(model, config, config.model)
        options: dict[str, Any] = {"train_size": config.train_size, "seed": config.seed, "kind": kind_of(model)}
        splits = {name: task.splits(**options) for name, task in tasks.items()}
        _check_sizes(config, splits)
        objectives = {
            name: objective_for(task, model, tokenizer, max_length=config.max_length) for name, task in tasks.items()
        }
        tuner = Tuner.for_model(
            model,
            config.architecture,
            config.seed,
            granularity=config.granularity,
            normalized=config.normalized,
            base_model=known_as(config.model),
            base_weights_sha256=base_sha256,
            adapter=adapter_of(model),
            tasks=tuple(tasks),
            config=config.model_dump(mode="json", exclude=NOT_OF_THE_TUNER, exclude_none=True)
            | {"tasks": [*tasks], "examples": {name: len(split.train) for name, split in splits.items()}},
        )

        def loss(task: str, examples: Any) -> Tensor:
            return objectives[task].loss(model, objectives[task].training_batch(examples))

        points = _trajectory(config, model, loss, splits)
        if not resume:
            claim_out(config.out, config.overwrite, config.to_yaml())
        data = digest([example for split in splits.values() for example in split.train])
        trainer = MetaTrainer(model, tuner, config)
        walked = _Walked(config, trainer, points, objectives, model, display, requests, data)
        seconds = walked.run()
        tuner.save_pretrained(config.out)
        trainer.save_points(config.out / POINTS)
        summary = {
            "model": config.model,
            "tasks": [*tasks],
            "steps": config.steps,
            "seconds": round(seconds, 3),
            "peak_rss_bytes": peak_rss_bytes(),
            "blocks": len(tuner.block_names),
            "tuner_sha256": tuner.sha256(),
            "seed": config.seed,
            "versions": tuner.info.versions,
        }
        write_json(config.out / SUMMARY, summary)
        points.close()
        drop_all(config.out)
        display.say(f"tuner for {len(tuner.block_names)} blocks written to {config.out}")
    return tuner


def _check_sizes(config: MetaTrainConfig, splits: dict[str, Splits]) -> None:
    """Raises a ZotunerError where a task has no second batch, or none of two examples."""
    for name, split in splits.items():
        if config.meta_loss == "expected" and len(split.train) < 2:
            raise ZotunerError(
                f"--meta-loss expected: needs at least 2 training examples of task {name}, got {len(split.train)}"
            )
        if config.second_batch and len(split.train) <= config.batch_size:
            raise ZotunerError(
                f"--second-batch: expected more than --batch-size {config.batch_size} training examples of task "
                f"{name}, got {len(split.train)}"
            )


def _trajectory(config: MetaTrainConfig, model: Any, loss: Any, splits: dict[str, Splits]) -> Walk | Recorded:
    train = {name: split.train for name, split in splits.items()}
    if config.trajectory is not None:
        return Recorded(model, train, config.trajectory)
    return Walk(
        model,
        loss,
        train,
        config.out / TRAJECTORY,
        optimizer=config.fo_optimizer,
        lr=config.fo_lr,
        reset_every=config.reset_every,
        batch_size=config.batch_size,
        seed=config.seed,
        snapshot_every=config.snapshot_every,
    )


class _Walked:
    """One outer step at every point, from the first or from the last snapshot.

    Args:
        config: All options.
        trainer: Takes the outer steps.
        points: Of the trajectory.
        objectives: Of each task.
        model: At its starting weights.
        display: Where progress goes.
        requests: What signals ask for.
        data: Digest of the examples.
    """

    def __init__(
        self,
        config: MetaTrainConfig,
        trainer: MetaTrainer,
        points: Walk | Recorded,
        objectives: Mapping[str, Objective],
        model: nn.Module,
        display: Display,
        requests: Requests,
        data: str,
    ) -> None:
        self._config, self._trainer, self._points, self._objectives = config, trainer, points, objectives
        self._model, self._display, self._requests = model, display, requests
        self._begun_with = {"data": data, "weights": weights_sha256(model)}
        self._in_a_row, self._before = 0, 0.0
        self._started = time.perf_counter()

    def run(self) -> float:
        """Takes the steps that are left. Returns the seconds of all."""
        config = self._config
        start = self._restore()
        keep_rows(config.out / METRICS, lambda row: row["step"] < start)
        bar = self._display.bar("meta-train", config.steps, start)
        with MetricsLog(config.out / METRICS) as metrics:
            for point in self._points.points(config.steps, start):
                self._heed(point, point.number > start)
                if point.begins:
                    self._trainer.end_round(point.number)
                row = self._update(point)
                metrics.write(
                    step=point.number, position=point.position, task=point.task, seconds=self._seconds(), **row
                )
                self._in_a_row = self._in_a_row + 1 if row["skipped"] else 0
                if self._in_a_row >= config.max_skipped:
                    raise ZotunerError(
                        f"step {point.number}: no loss was finite {self._in_a_row} steps in a row; try a smaller lr"
                    )
                bar.advance(status=_status(row))
        bar.close()
        self._trainer.end_round(config.steps)
        return self._seconds()

    def _update(self, point: Point) -> dict[str, Any]:
        objective = self._objectives[point.task]

        def of(loss: Callable[[Any, Any], Tensor], examples: Sequence[Example]) -> Loss:
            return lambda: loss(self._model, objective.training_batch(examples))

        centred = of(objective.centred_loss, point.examples) if objective.classifies else None
        return self._trainer.update(
            Visit(point, of(objective.loss, point.examples), of(objective.loss, point.others), centred)
        )

    def _seconds(self) -> float:
        return round(self._before + time.perf_counter() - self._started, 3)

    def _heed(self, point: Point, moved: bool) -> None:
        """Before a point's outer step: the snapshots that are due, and the end."""
        every = self._config.save_every
        due = point.position == 0 if every is None else point.number % every == 0
        stop = self._requests.stop is not None and point.number > 0
        if (due and moved) or stop or self._requests.snapshot_wanted():
            self._snapshot(point.number)
        self._requests.check(
            f"after step {point.number} of {self._config.steps}", f"zotuner meta-train --resume {self._config.out}"
        )

    def _snapshot(self, number: int) -> None:
        tensors, state = self._trainer.state()
        walked, groups = self._points.state()
        parts = {"trainer": tensors, "walk": walked}
        everything = {f"{part}.{k}": v for part, named in parts.items() for k, v in named.items()}
        about = {
            "begun_with": self._begun_with,
            "seconds": self._seconds(),
            "in_a_row": self._in_a_row,
        }
        take(self._config.out, number, self._model, everything, {**about, "trainer": state, "walk": groups})

    def _restore(self) -> int:
        """Goes back to the last snapshot, if there is one; returns the number of the next point."""
        drop_unfinished(self._config.out)
        found = latest(self._config.out)
        if found is None:
            return 0
        for what, began in found.state["begun_with"].items():
            if began != self._begun_with[what]:
                raise ZotunerError(
                    f"{found.path}: this run was begun with {what} of SHA-256 {began}, got {self._begun_with[what]}; "
                    "give it back what it began with, or start another run"
                )
        tensors = found.restore(self._model)
        self._trainer.restore(under("trainer.", tensors), found.state["trainer"])
        self._points.restore(under("walk.", tensors), found.state["walk"])
        self._before, self._in_a_row = found.state["seconds"], found.state["in_a_row"]
        self._display.say(f"goes on with step {found.step}")
        return found.step


def _status(row: dict[str, Any]) -> str:
    """Of the progress bar: losses, what is gained over sigma = 1, and the types of blocks with least and most noise."""
    types = sorted(row["sigma_types"].items(), key=lambda item: item[1])
    ends = [f"{label.removesuffix('.weight')} {sigma:.2f}" for label, sigma in (types[0], types[-1])]
    gain = f"gain x{row['gain']:.2f}  " if math.isfinite(row.get("gain", math.nan)) else ""
    return f"loss {row['loss']:.4f}  meta-loss {row['meta_loss']:.4f}  {gain}sigma: {' to '.join(ends)}"
