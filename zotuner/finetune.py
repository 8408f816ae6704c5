"""Fine-tuning: one model, one task, one method, one run directory.

zero-shot evaluation  ->  steps, with evaluations on dev  ->  best on dev  ->  final evaluation  ->  summary

A run that was killed goes on where it was: its steps are repeated from the last snapshot, those that the ledger has
without a forward, and end with the same bits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zotuner.adapters import adapted, adapter_of, check_tuner
from zotuner.config import FinetuneConfig
from zotuner.errors import ZotunerError
from zotuner.evaluate import Evaluation, evaluate
from zotuner.files import check_out, claim_out, locked
from zotuner.hub import AUTO, Say, find_tuner
from zotuner.metrics import read_json, write_json, write_rows
from zotuner.models import (
    compile_layers,
    kind_of,
    load_model,
    restore_weights,
    save_model,
    weights_sha256,
)
from zotuner.objective import Objective, objective_for
from zotuner.progress import Display, peak_rss_bytes
from zotuner.prompting import with_shots
from zotuner.quantized import quantize_
from zotuner.signals import Requests
from zotuner.snapshot import drop_all
from zotuner.steppers import Stepper, stepper_for, without_effect
from zotuner.tasks import Example, Splits, Task, get_task
from zotuner.training import BEST, Progressed, Training, best_file
from zotuner.tuner import Tuner, versions

MASKED_K = 16  # examples of each class that masked models are tuned on (arXiv:2012.15723; arXiv:2305.17333)
ZERO_SHOT, SUMMARY, PREDICTIONS = "zero_shot.json", "summary.json", "predictions.jsonl"


@dataclass(frozen=True)
class Setup:
    """What a run works with, loaded and checked before anything is written."""

    config: FinetuneConfig
    model: Any
    tokenizer: Any
    objective: Objective
    splits: Splits
    tuner: Tuner | None


def prepare(config: FinetuneConfig, say: Say = lambda _: None) -> Setup:
    """Loads everything that may be wrong; `say` is told which tuner was found, if one was to be.

    Raises:
        ZotunerError: An unknown task or model, bad data, a tuner that cannot be read.
    """
    task = get_task(config.task, config.data_dir)
    tuner = _tuner(config, say)
    if tuner is not None:  # by a name that finds the very same again: --resume and replay read it in the record
        config = config.model_copy(update={"tuner": tuner.source})
    model, tokenizer = load_model(config.model, dtype=config.dtype)
    model = adapted(model, config, config.model)
    if tuner is not None:
        check_tuner(tuner, model)
    if kind_of(model) == "masked" and not {"k_shot", "train_size"} & config.model_fields_set:
        config = config.model_copy(update={"k_shot": MASKED_K})
    splits = _splits(config, task, model, tokenizer)
    if config.quantize is not None:
        quantize_(model, config.quantize, frozen_only=adapter_of(model) is not None)
    if config.compile:
        compile_layers(model)
    options: dict[str, Any] = {"reward": config.objective, "static": config.compile, "special_tokens": not config.chat}
    objective = objective_for(task, model, tokenizer, max_length=config.max_length, **options)
    return Setup(config, model, tokenizer, objective, splits, tuner)


def _tuner(config: FinetuneConfig, say: Say) -> Tuner | None:
    """The one that is named, or the one for the model."""
    if config.tuner is None:
        return None
    return find_tuner(config.model, say) if config.tuner == AUTO else Tuner.from_pretrained(config.tuner)


def _splits(config: FinetuneConfig, task: Task, model: Any, tokenizer: Any) -> Splits:
    """The run's examples, with demonstrations and under a chat template as it is told."""
    sizes = {name: getattr(config, name) for name in ("train_size", "dev_size", "eval_size", "k_shot", "seed")}
    splits = task.splits(**sizes, kind=kind_of(model))
    if not config.shots and not config.chat:
        return splits
    if config.shots > len(splits.train):
        raise ZotunerError(f"--shots: expected at most the {len(splits.train)} training examples, got {config.shots}")
    speaks, shots = tokenizer if config.chat else None, splits.train[: config.shots]
    train, dev, test = (with_shots(part, shots, speaks)[1] for part in (splits.train, splits.dev, splits.test))
    return Splits(tuple(train), tuple(dev), tuple(test))


def finetune(config: FinetuneConfig, display: Display, *, resume: bool = False) -> dict[str, Any]:
    """Runs one fine-tuning and fills its run directory.

    Args:
        config: All options.
        display: Where progress goes.
        resume: Go on with the run that `config.out` holds; `config` must be what it was begun with.

    Returns:
        The content of `summary.json`.

    Raises:
        ZotunerError: Something that the user can put right; nothing was written unless the run had begun.
        Interrupted: A signal ended the run; it can be resumed.
    """
    if resume and (config.out / SUMMARY).exists():
        display.say(f"{config.out}: this run is finished")
        with locked(config.out):
            _tidy(config.out)
        return dict(read_json(config.out / SUMMARY))
    if not resume:
        inputs = (config.model, config.task, config.tuner, config.data_dir)
        check_out(config.out, config.overwrite, [Path(name) for name in inputs if name])
    with display, Requests() as requests, locked(config.out):
        display.say(f"loading {config.model} and task {config.task}")
        setup = prepare(config, display.say)
        config = setup.config
        stepper = stepper_for(config, setup.model, setup.tuner)
        if not resume:
            for name in without_effect(config):
                why = "with --k-shot" if name in ("train_size", "dev_size") else f"on method {config.method}"
                display.say(f"--{name.replace('_', '-')} has no effect {why}")
            claim_out(config.out, config.overwrite, config.to_yaml())
        summary = _run(config, setup, stepper, display, requests)
        write_json(config.out / SUMMARY, summary)
        _tidy(config.out)
    return summary


def _run(
    config: FinetuneConfig, setup: Setup, stepper: Stepper | None, display: Display, requests: Requests
) -> dict[str, Any]:
    """Everything between loading and the summary."""

    def evaluated(examples: Sequence[Example], title: str, state: str, answers: bool = False) -> Evaluation:
        bar = display.bar(title, len(examples))

        def advance(count: int) -> None:
            bar.advance(count)
            requests.check(state, f"zotuner finetune --resume {config.out}")

        options: dict[str, Any] = {"batch_size": config.eval_batch_size, "answers": answers, "advance": advance}
        came = evaluate(setup.model, setup.objective, examples, **options)
        bar.close()
        return came

    def tested(title: str, state: str) -> dict[str, float]:
        came = evaluated(setup.splits.test, title, state, answers=True)
        assert came.answers is not None
        rows = [{"loss": loss, "answer": answer} for loss, answer in zip(came.losses, came.answers, strict=True)]
        write_rows(config.out / PREDICTIONS, rows)
        return came.figures

    zero_shot = final = None
    if config.zero_shot or stepper is None or not config.steps:
        zero_shot = final = _once(config.out / ZERO_SHOT, lambda: tested("zero-shot", "before the first step"))
    totals, dev = Progressed(), None
    if stepper is not None and config.steps:
        training = Training(config, setup, stepper, evaluated, display, requests)
        totals, dev = training.run()
        restore_weights(setup.model, best_file(config.out, dev["best"]["step"]))
        final = tested("final", "after the last step")
    if config.save_model:
        save_model(setup.model, setup.tokenizer, config.out / "model", config.model)
    return {
        "model": config.model,
        "task": setup.objective.task.name,
        "method": config.method,
        "objective": config.objective,
        "steps": totals.steps,
        "forwards": totals.forwards,
        "tokens": totals.tokens,
        "seconds": round(totals.seconds, 3),
        "peak_rss_bytes": peak_rss_bytes(),
        "zero_shot": zero_shot,
        "final": final,
        "dev": dev,
        "skipped": totals.skipped,
        "clipped": totals.clipped,
        "examples": {name: len(getattr(setup.splits, name)) for name in ("train", "dev", "test")},
        "weights_sha256": weights_sha256(setup.model),
        "seed": config.seed,
        "lr": config.lr,
        "prompt_version": setup.objective.task.prompt_version,
        "versions": versions(),
    }


def _tidy(out: Path) -> None:
    """Removes what a run keeps for the time of it."""
    for path in (*out.glob(BEST), out / ZERO_SHOT, *out.glob("*.part")):  # the last: of a process that was killed
        path.unlink(missing_ok=True)
    drop_all(out)


def _once(path: Path, evaluated: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What an evaluation gave, kept in a file, so that it is made once."""
    if not path.exists():
        write_json(path, evaluated())
    kept = read_json(path)
    if not isinstance(kept, dict):
        raise ZotunerError(f"{path}: expected an evaluation, got {kept!r}; remove the file to make it again")
    return {name: math.nan if value is None else value for name, value in kept.items()}
