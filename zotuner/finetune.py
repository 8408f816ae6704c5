"""Fine-tuning: one model, one task, one method, one run directory.

zero-shot evaluation  ->  steps, with evaluations on dev  ->  best on dev  ->  final evaluation  ->  summary
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zotuner import noise
from zotuner.batch import Batch
from zotuner.config import FinetuneConfig
from zotuner.errors import ZotunerError
from zotuner.evaluate import evaluate
from zotuner.files import check_out, claim_out
from zotuner.ledger import Ledger
from zotuner.metrics import MetricsLog, write_json
from zotuner.models import (
    compile_layers,
    compute_dtype,
    keep_weights,
    load_model,
    restore_weights,
    save_model,
    weights_sha256,
)
from zotuner.objective import Objective, shares
from zotuner.optim import FZOO, MeZO, ZOFineTuner, ZOOptimizer
from zotuner.progress import Bar, Display, peak_rss_bytes
from zotuner.quantized import quantize_
from zotuner.tasks import Example, Splits, batches, get_task
from zotuner.trajectory import first_order
from zotuner.tuner import Tuner, versions

BEST = "best.safetensors"  # the best weights so far, for the time of a run


@dataclass(frozen=True)
class Taken:
    """What one step cost and gave."""

    loss: float
    lr: float
    forwards: int
    coefficients: tuple[float, ...]
    losses: tuple[float, ...]
    skipped: bool


class ZOStepper:
    """Steps of a zeroth-order method."""

    def __init__(self, config: FinetuneConfig, model: Any, tuner: Tuner | None) -> None:
        assert config.lr is not None
        shared = ("lr", "eps", "noise", "seed", "rank", "factors", "engine", "branch_batch", "branch_threads")
        common: dict[str, Any] = {name: getattr(config, name) for name in shared}
        common["compute_dtype"] = compute_dtype(model.device) if config.dtype == "auto" else None
        self.optimizer: ZOOptimizer
        if config.method == "mezo":
            self.optimizer = MeZO(model, **common)
        elif config.method == "fzoo":
            self.optimizer = FZOO(model, num_perturbations=config.num_perturbations, **common)
        else:
            assert tuner is not None
            self.optimizer = ZOFineTuner(model, tuner, **common)
        self._model = model

    @torch.no_grad()
    def __call__(self, objective: Objective, batches: Sequence[Batch]) -> Taken:
        """One step on the examples of all batches together."""
        lr = float(self.optimizer.param_groups[0]["lr"])

        def closure(branches: int = 1) -> Tensor:
            return objective.mean_loss(self._model, batches, branches)

        loss = self.optimizer.step(closure)
        info = self.optimizer.last
        assert info is not None
        return Taken(loss, lr, info.forwards, info.coefficients, info.losses, info.skipped)


class AdamStepper:
    """Steps of first-order Adam, the upper bound that backpropagation buys. Its backward counts as no forward."""

    def __init__(self, config: FinetuneConfig, model: Any) -> None:
        assert config.lr is not None
        self.optimizer = first_order("adam", model, config.lr)
        self._model = model

    def __call__(self, objective: Objective, batches: Sequence[Batch]) -> Taken:
        """One step on the examples of all batches together."""
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.zero_grad()
        value = 0.0
        for batch, share in zip(batches, shares(batches), strict=True):
            loss = share * objective.loss(self._model, batch)
            value += float(loss.detach())
            loss.backward()
        finite = math.isfinite(value)
        if finite:
            self.optimizer.step()
        return Taken(value, lr, 1, (), (value,), not finite)


Stepper = ZOStepper | AdamStepper


@dataclass
class Progressed:
    """The running totals of a run."""

    steps: int = 0
    forwards: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0


@dataclass(frozen=True)
class Setup:
    """What a run works with, loaded and checked before anything is written."""

    model: Any
    tokenizer: Any
    objective: Objective
    splits: Splits
    tuner: Tuner | None


def prepare(config: FinetuneConfig) -> Setup:
    """Loads everything that may be wrong.

    Raises:
        ZotunerError: An unknown task or model, bad data, a tuner that cannot be read.
    """
    inputs = [Path(name) for name in (config.model, config.tuner, config.data_dir) if name is not None]
    check_out(config.out, config.overwrite, inputs)
    task = get_task(config.task, config.data_dir)
    tuner = Tuner.from_pretrained(config.tuner) if config.tuner is not None else None
    splits = task.splits(
        train_size=config.train_size, dev_size=config.dev_size, eval_size=config.eval_size, seed=config.seed
    )
    model, tokenizer = load_model(config.model, dtype=config.dtype)
    if config.quantize is not None:
        quantize_(model, config.quantize)
    if config.compile:
        compile_layers(model)
    return Setup(model, tokenizer, Objective(task, tokenizer, config.max_length, static=config.compile), splits, tuner)


def finetune(config: FinetuneConfig, display: Display) -> dict[str, Any]:
    """Runs one fine-tuning and fills its run directory.

    Args:
        config: All options.
        display: Where progress goes.

    Returns:
        The content of `summary.json`.

    Raises:
        ZotunerError: Something that the user can put right; nothing was written unless the run had begun.
    """
    with display:
        display.say(f"loading {config.model} and task {config.task}")
        setup = prepare(config)
        stepper = _stepper(config, setup)
        claim_out(config.out, config.overwrite, config.to_yaml())
        zero_shot = _evaluate(setup, setup.splits.test, config, display, "zero-shot")
        totals, dev = Progressed(), None
        if stepper is not None and config.steps:
            try:
                dev = _train(config, setup, stepper, totals, display)
                restore_weights(setup.model, config.out / BEST)
            finally:
                (config.out / BEST).unlink(missing_ok=True)
        final = _evaluate(setup, setup.splits.test, config, display, "final") if totals.steps else zero_shot
        if config.save_model:
            save_model(setup.model, setup.tokenizer, config.out / "model")
        summary = {
            "model": config.model,
            "task": config.task,
            "method": config.method,
            "steps": totals.steps,
            "forwards": totals.forwards,
            "tokens": totals.tokens,
            "seconds": round(totals.seconds, 3),
            "peak_rss_bytes": peak_rss_bytes(),
            "zero_shot": zero_shot,
            "final": final,
            "dev": dev,
            "skipped": totals.skipped,
            "examples": {name: len(getattr(setup.splits, name)) for name in ("train", "dev", "test")},
            "weights_sha256": weights_sha256(setup.model),
            "seed": config.seed,
            "lr": config.lr,
            "prompt_version": setup.objective.task.prompt_version,
            "versions": versions(),
        }
        write_json(config.out / "summary.json", summary)
    return summary


def _stepper(config: FinetuneConfig, setup: Setup) -> Stepper | None:
    if config.method == "none":
        return None
    if config.method == "adam":
        return AdamStepper(config, setup.model)
    return ZOStepper(config, setup.model, setup.tuner)


def _train(
    config: FinetuneConfig, setup: Setup, stepper: Stepper, totals: Progressed, display: Display
) -> dict[str, Any]:
    """All steps; the weights of the best evaluation on dev stay in the run directory. Returns what dev said."""
    assert config.eval_every is not None
    schedule = None
    if config.lr_schedule == "linear":
        schedule = torch.optim.lr_scheduler.LinearLR(
            stepper.optimizer, start_factor=1.0, end_factor=0.0, total_iters=config.steps
        )
    in_a_row = 0
    bar = display.bar(config.method, config.steps)
    with MetricsLog(config.out / "metrics.jsonl") as metrics, _Recorder(config, setup) as record:
        dev = _Dev(config, setup, totals, display)
        for examples in islice(batches(setup.splits.train, config.batch_size, config.seed), config.steps):
            taken = _one(config, setup, stepper, examples, totals, metrics)
            record(totals.steps - 1, taken)
            if schedule is not None:
                schedule.step()
            in_a_row = in_a_row + 1 if taken.skipped else 0
            totals.skipped += taken.skipped
            if in_a_row >= config.max_skipped:
                raise ZotunerError(_not_finite(config, totals.steps, in_a_row))
            bar.advance(status=f"loss {taken.loss:.4f}  forwards {totals.forwards}")
            if totals.steps % config.eval_every == 0 or totals.steps == config.steps:
                dev.evaluate()
    bar.close()
    return {"zero_shot": dev.start, "best": dev.best, "last": dev.last}


class _Dev:
    """Evaluates on the development examples, and keeps the weights that did best on them."""

    def __init__(self, config: FinetuneConfig, setup: Setup, totals: Progressed, display: Display) -> None:
        self._config, self._setup, self._totals, self._display = config, setup, totals, display
        self.best: dict[str, Any] | None = None
        self.start = self.last = self._evaluated()

    def evaluate(self) -> None:
        """Evaluates now. A loss that is not finite is worse than any other."""
        self.last = self._evaluated()
        loss, step = self.last["loss"], self._totals.steps
        self._display.say(f"step {step}: dev loss {loss:.4f}, accuracy {self.last['accuracy']:.3f}")
        if self.best is None or not math.isfinite(self.best["loss"]) or loss < self.best["loss"]:
            self.best = {"step": step, **self.last}
            keep_weights(self._setup.model, self._config.out / BEST)

    def _evaluated(self) -> dict[str, float]:
        came = _evaluate(self._setup, self._setup.splits.dev, self._config, self._display, "dev")
        totals = self._totals
        with MetricsLog(self._config.out / "evals.jsonl") as evals:
            evals.write(step=totals.steps, forwards=totals.forwards, seconds=round(totals.seconds, 4), **came)
        return came


def _one(
    config: FinetuneConfig,
    setup: Setup,
    stepper: Stepper,
    examples: Sequence[Example],
    totals: Progressed,
    metrics: MetricsLog,
) -> Taken:
    """One step and its row of metrics; only the step itself is timed."""
    started = time.perf_counter()
    micro_batches = setup.objective.training_batches(examples, config.micro_batch_size)
    taken = stepper(setup.objective, micro_batches)
    totals.seconds += time.perf_counter() - started
    totals.forwards += taken.forwards
    totals.tokens += taken.forwards * setup.objective.tokens(setup.model, micro_batches)
    metrics.write(
        step=totals.steps,
        forwards=totals.forwards,
        tokens=totals.tokens,
        seconds=round(totals.seconds, 4),
        loss=taken.loss,
        lr=taken.lr,
        coefficients=taken.coefficients,
    )
    totals.steps += 1
    return taken


class _Recorder:
    """Writes the ledger of a zeroth-order run; a first-order one has none, since its steps cannot be replayed."""

    def __init__(self, config: FinetuneConfig, setup: Setup) -> None:
        self._ledger: Ledger | None = None
        if config.method == "adam":
            return
        header = {
            "method": config.method,
            "model": config.model,
            "weights_sha256": weights_sha256(setup.model),
            "tuner": config.tuner,
            "noise": config.noise,
            "rank": config.rank,
            "factors": config.factors,
            "noise_version": noise.VERSION,
            "quantize": config.quantize,
            "seed": config.seed,
            "eps": config.eps,
            "losses": config.num_perturbations + 1 if config.method == "fzoo" else 2,
        }
        self._ledger = Ledger(config.out / "ledger.bin", header)

    def __call__(self, step: int, taken: Taken) -> None:
        if self._ledger is not None:
            self._ledger.write(step, taken.lr, taken.losses)

    def __enter__(self) -> "_Recorder":
        return self

    def __exit__(self, *error: object) -> None:
        if self._ledger is not None:
            self._ledger.__exit__(*error)


def _evaluate(
    setup: Setup, examples: Sequence[Example], config: FinetuneConfig, display: Display, title: str
) -> dict[str, float]:
    bar: Bar = display.bar(title, len(examples))
    came = evaluate(setup.model, setup.objective, examples, config.eval_batch_size, advance=bar.advance)
    bar.close()
    return came


def _not_finite(config: FinetuneConfig, step: int, count: int) -> str:
    advice = "try --dtype bfloat16 or float32" if config.dtype == "float16" else "try a smaller --lr or --eps"
    return f"step {step}: the loss was not finite {count} steps in a row; {advice}"
