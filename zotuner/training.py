"""The steps of one fine-tuning run, and all that is kept of them.

    ledger (what repeats a step)  ->  metrics row  ->  evaluation on dev, best weights, row  ->  snapshot

In this order, so that whoever is killed between two of them finds, on going on, what the last one stands on.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch

from zotuner import noise
from zotuner.batch import Batch
from zotuner.config import FinetuneConfig
from zotuner.errors import Interrupted, ZotunerError
from zotuner.evaluate import Evaluation
from zotuner.ledger import Ledger, Record
from zotuner.metrics import ASIDE, MetricsLog, keep_rows
from zotuner.models import keep_weights, weights_sha256
from zotuner.objective import Objective
from zotuner.progress import Display
from zotuner.signals import Requests
from zotuner.snapshot import (
    drop_unfinished,
    latest,
    optimizer_groups,
    optimizer_tensors,
    restore_optimizer,
    take,
)
from zotuner.steppers import Stepper, Taken, ZOStepper
from zotuner.tasks import Example, Splits, batches, digest
from zotuner.tuner import Tuner, versions

BEST = "best-*.safetensors"  # weights by the step of their evaluation: the best so far; for the time of a run
LEDGER, METRICS, EVALS, SCALES = "ledger.bin", "metrics.jsonl", "evals.jsonl", "scales.jsonl"
SECONDS_DIGITS = 4  # that rows keep
SCALES_ROWS = 100  # about so many of a run's steps leave their scales
SCALES_BITS = 6  # where tokens or seconds end a run: all of the first 64 steps, then 32 before their number has doubled

Evaluated = Callable[[Sequence[Example], str, str], Evaluation]  # (examples, title, how far)
SAME = {  # of a ledger's header: what a run that goes on must have in common with its beginning
    "weights_sha256": "the model's weights (SHA-256)",
    "data_sha256": "the examples (SHA-256)",
    "tuner_sha256": "the tuner (SHA-256)",
    "noise_version": "the noise's version",
}


class Loaded(Protocol):
    """What a training works with."""

    @property
    def model(self) -> Any: ...
    @property
    def objective(self) -> Objective: ...
    @property
    def splits(self) -> Splits: ...
    @property
    def tuner(self) -> Tuner | None: ...


@dataclass
class Progressed:
    """The running totals of a run."""

    steps: int = 0
    forwards: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    clipped: int = 0
    skipped_in_a_row: int = 0


def best_file(out: Path, step: int) -> Path:
    """Where the weights are kept that were the best so far after a step."""
    return out / BEST.replace("*", str(step))


class Training:
    """All steps of a run, from its beginning or from where it was left.

    Args:
        config: All options.
        setup: The model is at its starting weights.
        stepper: Of the method.
        evaluated: Evaluates examples, and raises `Interrupted` when the run is to stop.
        display: Where progress goes.
        requests: What signals ask for.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        setup: Loaded,
        stepper: Stepper,
        evaluated: Evaluated,
        display: Display,
        requests: Requests,
    ) -> None:
        assert config.eval_every is not None
        assert config.save_every is not None
        self._config, self._setup, self._stepper = config, setup, stepper
        self._display, self._requests = display, requests
        self._eval_every, self._save_every = config.eval_every, config.save_every
        self.totals = Progressed()
        self._schedule = (
            torch.optim.lr_scheduler.LinearLR(
                stepper.optimizer, start_factor=1.0, end_factor=0.0, total_iters=config.steps
            )
            if config.lr_schedule == "linear"
            else None
        )
        self._ledger = self._open_ledger()
        self._records: list[Record] = [] if self._ledger is None else list(self._ledger.records)
        self._restore()
        reached = max(self.totals.steps, len(self._records))
        self._rows = keep_rows(config.out / METRICS, lambda row: row["step"] < reached)
        kept = keep_rows(config.out / SCALES, lambda row: row.get("step", 0) < reached)
        self._blocks_named = bool(kept)
        self._scales_upto = kept[-1].get("step", -1) if kept else -1  # the last step whose scales are there
        self._dev = _Dev(config, setup, evaluated, self.totals, display, reached)

    def run(self) -> tuple[Progressed, dict[str, Any]]:
        """Takes what steps are left; the weights of the best evaluation on dev lie in its `best_file` then.

        Returns:
            The totals, and what dev said.
        """
        config = self._config
        bar = self._display.bar(config.method, config.steps, self.totals.steps)
        examples = batches(self._setup.splits.train, config.batch_size, config.seed)
        if self._records and isinstance(self._stepper, ZOStepper):
            first = next(batches(self._setup.splits.train, config.batch_size, config.seed))
            self._stepper.learn_model(self._setup.objective, self._batches(first))
        with ExitStack() as stack:
            if self._ledger is not None:
                stack.enter_context(self._ledger)
            self._metrics = stack.enter_context(MetricsLog(config.out / METRICS))
            try:
                self._dev.begin()
                self._evaluate_if_due()  # whoever was stopped in an evaluation has its step, but not its row
                for batch in islice(examples, self.totals.steps, config.steps):
                    if self._spent():
                        break
                    taken = self._step(self._batches(batch))
                    bar.advance(status=self._status(taken))
                    self._after_step()
            except Interrupted:
                self._snapshot()
                raise
        bar.close()
        return self.totals, {"zero_shot": self._dev.start, "best": self._dev.best, "last": self._dev.last}

    def _batches(self, examples: Sequence[Example]) -> list[Batch]:
        return self._setup.objective.training_batches(examples, self._config.micro_batch_size)

    def _step(self, micro_batches: list[Batch]) -> Taken:
        """One step, taken or repeated, and its rows; only a step that is taken is timed."""
        totals, number = self.totals, self.totals.steps
        if number < len(self._records):
            assert isinstance(self._stepper, ZOStepper)
            taken = self._stepper.replay(self._records[number])
        else:
            started = time.perf_counter()
            taken = self._stepper(self._setup.objective, micro_batches)
            totals.seconds += time.perf_counter() - started
            if self._ledger is not None:
                self._ledger.write(number, taken.lr, taken.losses)
        totals.forwards += taken.forwards
        totals.tokens += taken.forwards * self._setup.objective.tokens(self._setup.model, micro_batches)
        totals.skipped += taken.skipped
        totals.clipped += taken.clipped
        totals.skipped_in_a_row = totals.skipped_in_a_row + 1 if taken.skipped else 0
        self._write_rows(number, taken)
        totals.steps += 1
        if self._schedule is not None:
            self._schedule.step()
        if totals.skipped_in_a_row >= self._config.max_skipped:
            raise ZotunerError(_not_finite(self._config, totals))
        return taken

    def _write_rows(self, number: int, taken: Taken) -> None:
        """A step's rows, unless they are there already."""
        if number < len(self._rows):
            self.totals.seconds = self._rows[number]["seconds"]
        else:
            marks = {"skipped": taken.skipped, "clipped": taken.clipped}
            self._metrics.write(
                step=number,
                forwards=self.totals.forwards,
                tokens=self.totals.tokens,
                seconds=round(self.totals.seconds, SECONDS_DIGITS),
                loss=taken.loss,
                lr=taken.lr,
                coefficients=taken.coefficients,
                **{name: True for name, is_so in marks.items() if is_so},
            )
        if taken.scales is not None and number % self._scales_every(number) == 0 and number > self._scales_upto:
            assert isinstance(self._stepper, ZOStepper)
            with MetricsLog(self._config.out / SCALES) as rows:
                if not self._blocks_named:
                    rows.write(blocks=[block.name for block in self._stepper.optimizer.blocks])
                    self._blocks_named = True
                rows.write(step=number, scales=[float(f"{scale:.5g}") for scale in taken.scales.tolist()])
                self._scales_upto = number

    def _scales_every(self, number: int) -> int:
        """Steps between rows of scales: the same over a run whose steps are known, else more and more."""
        if self._config.max_tokens is None and self._config.max_seconds is None:
            return -(-self._config.steps // SCALES_ROWS)
        return 1 << max(0, number.bit_length() - SCALES_BITS)

    def _status(self, taken: Taken) -> str:
        skipped = f"  skipped {self.totals.skipped}" if self.totals.skipped else ""
        return f"loss {taken.loss:.4f}  forwards {self.totals.forwards}{skipped}"

    def _after_step(self) -> None:
        """What is due after a step: an evaluation, a snapshot, the end."""
        step = self.totals.steps
        self._evaluate_if_due()
        due = step % self._save_every == 0 and step < self._config.steps and step > len(self._records)
        if self._requests.snapshot_wanted() or due:
            self._snapshot()
        self._requests.check(
            f"after step {step} of {self._config.steps}", f"zotuner finetune --resume {self._config.out}"
        )

    def _evaluate_if_due(self) -> None:
        step = self.totals.steps
        if step and (step % self._eval_every == 0 or step == self._config.steps or self._spent()):
            self._dev.evaluate()

    def _spent(self) -> bool:
        """Whether the tokens or seconds are used up; told by what the rows hold, so that a resumed run agrees."""
        config, totals = self._config, self.totals
        return (config.max_tokens is not None and totals.tokens >= config.max_tokens) or (
            config.max_seconds is not None and round(totals.seconds, SECONDS_DIGITS) >= config.max_seconds
        )

    def _snapshot(self) -> None:
        """Keeps all that the next step stands on, unless that is the beginning."""
        if self.totals.steps == 0:
            return
        if self._ledger is not None:
            self._ledger.sync()
        state = {
            "totals": asdict(self.totals),
            "groups": optimizer_groups(self._stepper.optimizer),
            "schedule": None if self._schedule is None else self._schedule.state_dict(),
        }
        take(
            self._config.out,
            self.totals.steps,
            self._setup.model,
            optimizer_tensors(self._stepper.optimizer),
            state,
        )
        self._dev.snapshot_taken()

    def _restore(self) -> None:
        """Goes back to the last snapshot that the ledger reaches, if there is one."""
        out = self._config.out
        drop_unfinished(out)
        found = latest(out, lambda step: self._ledger is None or step <= len(self._records))
        if found is not None:
            tensors = found.restore(self._setup.model)
            restore_optimizer(self._stepper.optimizer, found.state["groups"], tensors)
            if self._schedule is not None:
                self._schedule.load_state_dict(found.state["schedule"])
            self.totals = Progressed(**found.state["totals"])
        steps = max(self.totals.steps, len(self._records))
        if steps:
            repeated = f", repeats {steps - self.totals.steps} from the ledger" if self._ledger is not None else ""
            self._display.say(f"goes on after step {steps}: begins with step {self.totals.steps}{repeated}")

    def _open_ledger(self) -> Ledger | None:
        """That of a zeroth-order run; a first-order one has none, since its steps cannot be repeated from numbers.

        Raises:
            ZotunerError: The run was begun with other weights, examples or noise.
        """
        if not isinstance(self._stepper, ZOStepper):
            return None
        path, sync_every = self._config.out / LEDGER, self._config.sync_every
        header = header_of(self._config, self._setup, self._stepper.optimizer.losses_per_step)
        if not path.exists():
            return Ledger(path, header, sync_every=sync_every)
        ledger = Ledger(path, None, sync_every=sync_every)
        for key, what in SAME.items():
            if ledger.header.get(key) != header[key]:
                ledger.close()
                raise ZotunerError(
                    f"{path}: this run was begun with {what} {ledger.header.get(key)}, got {header[key]}; "
                    "give it back what it began with, or start another run"
                )
        return ledger


class _Dev:
    """Evaluates on the development examples, and keeps the weights that did best on them.

    Two files of them at most: of the best when the last snapshot was taken, which a run that goes on from there may end
    with, and of the best since.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        setup: Loaded,
        evaluated: Evaluated,
        totals: Progressed,
        display: Display,
        reached: int,
    ) -> None:
        self._config, self._setup, self._evaluated = config, setup, evaluated
        self._totals, self._display = totals, display
        kept = keep_rows(config.out / EVALS, lambda row: row["step"] <= reached)
        self._kept = {row["step"]: row for row in kept}
        self.best: dict[str, Any] | None = None
        self.start: dict[str, float] = {}
        for step in sorted(self._kept):
            if 0 < step <= totals.steps:  # the steps up to here are not taken again
                self._compare(step, self._came(step))
        self._at_snapshot = self._best_step

    def begin(self) -> None:
        """Evaluates the starting weights."""
        if 0 not in self._kept:
            self._write(0, self._evaluate(0))
        self.start = self._came(0)
        self.last = self.start if not self.best else self._came(max(s for s in self._kept if s <= self._totals.steps))

    def evaluate(self) -> None:
        """Evaluates now, unless that was done. A loss that is not finite is worse than any other."""
        step = self._totals.steps
        if step in self._kept:
            self.last = self._came(step)
            self._compare(step, self.last)
            return
        found = self._evaluate(step)
        self.last = found.figures
        metrics = "".join(f", {name} {value:.3f}" for name, value in self.last.items() if name != "loss")
        self._display.say(f"step {step}: dev loss {self.last['loss']:.4f}{metrics}")
        if self._compare(step, self.last):
            # before the row, which says that they are there
            keep_weights(self._setup.model, best_file(self._config.out, step))
            self._drop(lambda other: self._at_snapshot < other < step)
        self._write(step, found)

    def snapshot_taken(self) -> None:
        """A run that goes on does so from here."""
        self._at_snapshot = self._best_step
        self._drop(lambda other: other < self._at_snapshot)

    @property
    def _best_step(self) -> int:
        return 0 if self.best is None else int(self.best["step"])

    def _drop(self, superseded: Callable[[int], bool]) -> None:
        for path in self._config.out.glob(BEST):
            if superseded(int(path.stem.rpartition("-")[2])):
                path.unlink()

    def _evaluate(self, step: int) -> Evaluation:
        return self._evaluated(self._setup.splits.dev, "dev", f"after step {step} of {self._config.steps}")

    def _came(self, step: int) -> dict[str, float]:
        found = {name: value for name, value in self._kept[step].items() if name not in ASIDE}
        return {name: math.nan if value is None else value for name, value in found.items()}

    def _compare(self, step: int, came: dict[str, float]) -> bool:
        """Whether it is the best so far; it is noted then."""
        best = self.best is None or not math.isfinite(self.best["loss"]) or came["loss"] < self.best["loss"]
        if best:
            self.best = {"step": step, **came}
        return best

    def _write(self, step: int, found: Evaluation) -> None:
        totals = self._totals
        row: dict[str, Any] = {
            **{"step": step, "forwards": totals.forwards, "tokens": totals.tokens},
            **{"seconds": round(totals.seconds, SECONDS_DIGITS), **found.figures, "loss_error": found.loss_error},
        }
        with MetricsLog(self._config.out / EVALS) as evals:
            evals.write(**row)
        self._kept[step] = row


def header_of(config: FinetuneConfig, setup: Loaded, losses: int) -> dict[str, Any]:
    """A ledger's header: whose steps they are, of how many losses each, and all that repeating them takes."""
    return {
        "losses": losses,
        "method": config.method,
        "model": config.model,
        "weights_sha256": weights_sha256(setup.model),
        "data_sha256": digest([*setup.splits.train, *setup.splits.dev]),
        "tuner": config.tuner,
        "tuner_sha256": None if setup.tuner is None else setup.tuner.sha256(),
        "noise": config.noise,
        "noise_version": noise.VERSION,
        "seed": config.seed,
        "eps": config.eps,
        "config": config.model_dump(mode="json", exclude={"out", "overwrite", "data_dir"}),
        "versions": versions(),
    }


def _not_finite(config: FinetuneConfig, totals: Progressed) -> str:
    advice = (
        "float16 holds no number above 65504, and a sum on the way exceeded it: use --dtype bfloat16 or float32"
        if config.dtype == "float16"
        else "try a smaller --lr or --eps, or --clip"
    )
    return f"step {totals.steps}: the loss was not finite {totals.skipped_in_a_row} steps in a row; {advice}"
