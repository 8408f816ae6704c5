"""What a step costs: every method, its authors' way of writing it, and AdamW, side by side in one process."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from zotuner.bench.machine import describe
from zotuner.bench.measure import LR, check_finite, drift, memory, shares, time_rounds
from zotuner.bench.pertnn import time_pertnn
from zotuner.bench.rows import Row, choose
from zotuner.bench.show import drift_table, pertnn_table, plot, tables
from zotuner.bench.summary import summarize
from zotuner.bench.task import task_rounds, task_table
from zotuner.bench.workload import Workload, load
from zotuner.errors import ZotunerError
from zotuner.metrics import write_json
from zotuner.models import load_model
from zotuner.progress import Display, stdout

DRIFT_SHAPE = {"batch_size": 1, "length": 4}  # what drifts is the weights: the smallest forward will do


def bench(
    model: str,
    *,
    batch_size: int,
    length: int,
    logits: str,
    dtype: str,
    methods: Sequence[str] | None,
    rounds: int,
    drift_steps: int | None,
    pertnn_blocks: int | None,
    task: str | None,
    data_dir: Path | None,
    out: Path | None,
    plot_to: Path | None,
    display: Display,
) -> None:
    """Measures a forward and a step of each method on random tokens; prints tables, and writes JSON and PNG if asked.

    Args:
        model: As `--model` everywhere, or "random:0.5b", "random:1.1b".
        batch_size: Sequences a forward.
        length: Tokens a sequence.
        logits: Positions that the loss is of: "all" or "last".
        dtype: Of the weights.
        methods: Names of rows; None: all.
        rounds: Measurements of each, after one that does not count.
        drift_steps: Measure how far so many steps with lr = 0 move the weights, and nothing else.
        pertnn_blocks: Measure instead what so many PertNNs cost; no model is loaded.
        task: Measure instead what a step on real examples of this task costs.
        data_dir: As `--data-dir` everywhere.
        out: Where the JSON goes.
        plot_to: Where the plot of a measurement of time goes.
        display: Where progress goes.

    Raises:
        ZotunerError: An unknown model or method, a file that cannot be written, options that do not go together, or
            weights that are not finite any more.
    """
    _check_files(out, plot_to)
    others = {"--pertnn": pertnn_blocks, "--task": task, "--drift": drift_steps}
    instead = next((flag for flag, given in others.items() if given is not None), None)
    if plot_to is not None and instead is not None:
        raise ZotunerError(f"--plot draws the times of the methods' steps, which {instead} does not measure")
    if methods is not None and instead in ("--pertnn", "--task"):
        raise ZotunerError(f"--methods chooses among the methods' steps, which {instead} does not measure")
    if pertnn_blocks is not None:
        _bench_pertnn(pertnn_blocks, rounds, out)
        return
    if task is not None:
        _bench_task(model, task, data_dir, batch_size, rounds, out, display)
        return
    rows = choose(methods, display.say)
    shape = {"batch_size": batch_size, "length": length} if drift_steps is None else DRIFT_SHAPE
    about: dict[str, Any] = {"model": model, "logits": logits, **shape}
    title = f"{model}, {dtype}, batch {shape['batch_size']} x {shape['length']}, logits {logits}"
    with display, torch.random.fork_rng(devices=[]):
        display.say(f"loading {model}")
        work = Workload(load(model, dtype), logits=logits, **shape)
        if drift_steps is None:
            entries = _measure(rows, work, rounds, display)
            about["rounds"] = rounds
        else:
            entries = _drift(rows, work, drift_steps, display)
            about["drift_steps"] = drift_steps
        check_finite(work.model)
    about |= {"dtype": str(work.model.dtype).removeprefix("torch."), "parameters": work.parameters}
    if out is not None:
        write_json(out, {**about, "machine": describe(), "entries": entries})
    if drift_steps is not None:
        stdout().print(drift_table(entries, f"{title}: change of the weights by {drift_steps} steps with lr = 0"))
        return
    for table in tables(entries, f"{title}, median of {rounds} rounds"):
        stdout().print(table)
    if plot_to is not None:
        plot(entries, title, plot_to)


def _bench_pertnn(blocks: int, rounds: int, out: Path | None) -> None:
    entries = time_pertnn(blocks, rounds)
    if out is not None:
        write_json(out, {"blocks": blocks, "rounds": rounds, "machine": describe(), "entries": entries})
    stdout().print(pertnn_table(entries, f"{blocks} PertNNs, ms a call"))


def _bench_task(
    model: str, task: str, data_dir: Path | None, batch_size: int, rounds: int, out: Path | None, display: Display
) -> None:
    """The measurement on real examples."""
    with display:
        display.say(f"loading {model} and task {task}")
        loaded, tokenizer = load_model(model)
        entries = task_rounds(
            loaded, tokenizer, task=task, data_dir=data_dir, batch_size=batch_size, rounds=rounds, display=display
        )
    about = {"model": model, "task": task, "batch_size": batch_size, "rounds": rounds}
    if out is not None:
        write_json(out, {**about, "machine": describe(), "entries": entries})
    stdout().print(task_table(entries, f"{model}, {task}, batch {batch_size}, median of {rounds} rounds"))


def _measure(rows: Sequence[Row], work: Workload, rounds: int, display: Display) -> dict[str, dict[str, Any]]:
    """The three passes; what the first two built is gone before the third measures memory."""
    steps = {row.name: row.make(work, LR) for row in rows}
    bar = display.bar("time", len(rows) * (rounds + 1))
    times = time_rounds(steps, steps["forward"], rounds, bar.advance)
    bar.close()
    marked = [row.name for row in rows if row.walks]
    bar = display.bar("where it goes", len(marked))
    parts = {}
    for name in marked:
        parts[name] = shares(steps[name])
        bar.advance()
    bar.close()
    steps.clear()
    gc.collect()
    bar = display.bar("memory", len(rows))
    peaks = memory(rows, work, bar.advance)
    bar.close()
    return summarize(rows, work.tokens, times, parts, peaks)


def _drift(rows: Sequence[Row], work: Workload, steps: int, display: Display) -> dict[str, dict[str, Any]]:
    walking = [row for row in rows if row.walks]
    bar = display.bar("drift", len(walking))
    found: dict[str, dict[str, Any]] = {}
    for row in walking:
        found[row.name] = drift(row, work, steps)
        bar.advance(status=row.name)
    bar.close()
    return found


def _check_files(out: Path | None, plot_to: Path | None) -> None:
    """Complains before the work rather than after it."""
    for path in (out, plot_to):
        if path is not None and not path.absolute().parent.is_dir():
            raise ZotunerError(f"{path}: there is no folder {path.parent} to write to")
        if path is not None and path.is_dir():
            raise ZotunerError(f"{path}: expected a file to write to, found a folder")
    if plot_to is not None and plot_to.suffix != ".png":
        raise ZotunerError(f"--plot: expected a name that ends in .png, got {plot_to}")
