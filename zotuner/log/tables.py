"""A run in words: a headline, a table of its steps by spans, a table of its scales by type of block.

Steps are counted from 1 here, so that a span "21-40" ends with the evaluation that is called step 40.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from zotuner.block_types import block_types
from zotuner.log.run import Evaluation, Run
from zotuner.log.scales import Scales, geometric_mean
from zotuner.report import new_table, number

START, SPAN = "start", "steps"


def headline(run: Run) -> str:
    """What runs, how far it is, and whether it goes on."""
    head = run.head
    if run.is_meta:
        parts = [f"meta-training on {' '.join(head.tasks)}", head.model, f"inner lr {number(head.inner_lr, 'g')}"]
    else:
        schedule = "" if head.lr_schedule == "constant" else f" ({head.lr_schedule})"
        parts = [head.task, head.model, head.method, f"lr {number(head.lr, 'g')}{schedule}"]
    return ", ".join([*parts, f"{run.steps[-1].step + 1} of {head.steps} steps", run.state])


def spans(count: int, rows: int) -> list[slice]:
    """Cuts `count` steps into at most `rows` spans of almost the same length; every step lies in one."""
    rows = min(rows, count)
    return [slice(i * count // rows, (i + 1) * count // rows) for i in range(rows)]


def steps_table(run: Run, rows: int) -> Table:
    """Means over spans of steps; a column that has nothing to say is left out."""
    cuts = spans(len(run.steps), rows)
    columns = {SPAN: [_name(run.steps[cut][0].step + 1, run.steps[cut][-1].step + 1) for cut in cuts]}
    columns |= _meta_columns(run, cuts) if run.is_meta else _finetune_columns(run, cuts)
    columns["s/step"] = [f"{seconds:.3g}" for seconds in _seconds(run, cuts)]
    if run.evaluations:
        columns = _with_evaluations(run, cuts, columns)
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    out = new_table(None, *shown)
    for cells in zip(*shown.values(), strict=True):
        out.add_row(*cells)
    return out


def _name(first: int, last: int) -> str:
    return f"{first}-{last}" if first < last else str(first)


def _finetune_columns(run: Run, cuts: Sequence[slice]) -> dict[str, list[str]]:
    clipped = run.column("clipped")
    return {
        "loss": [_mean(run.column("loss")[cut], ".4f") for cut in cuts],
        "coef rms": _coefficients(run, cuts),
        "lr": [f"{run.steps[cut][-1].lr:.3g}" for cut in cuts],
        "skipped": _skipped(run, cuts),
        "clipped": [_count(clipped[cut].sum()) for cut in cuts],
        "forwards": [str(run.steps[cut][-1].forwards) for cut in cuts],
    }


def _meta_columns(run: Run, cuts: Sequence[slice]) -> dict[str, list[str]]:
    loss, meta_loss, gain = run.column("loss"), run.column("meta_loss"), run.column("gain")
    return {
        "loss": [_mean(loss[cut], ".4f") for cut in cuts],
        "meta-loss": [_mean(meta_loss[cut], ".4f") for cut in cuts],
        "gain": [_mean((loss - meta_loss)[cut], "+.5f") for cut in cuts],
        **({"x sigma = 1": [_mean(gain[cut], ".2f") for cut in cuts]} if np.isfinite(gain).any() else {}),
        "sigma~ min": [_extreme(run.column("sigma_min")[cut], np.nanmin) for cut in cuts],
        "max": [_extreme(run.column("sigma_max")[cut], np.nanmax) for cut in cuts],
        "std of log": [_mean(run.column("sigma_log_std")[cut], ".3f") for cut in cuts],
        "coef rms": _coefficients(run, cuts),
        "skipped": _skipped(run, cuts),
    }


def _coefficients(run: Run, cuts: Sequence[slice]) -> list[str]:
    """Empty cells for a method without coefficients."""
    if not any(row.coefficients for row in run.steps):
        return [""] * len(cuts)
    squares = run.coefficients**2
    return [_mean(squares[cut], ".3g", math.sqrt) for cut in cuts]


def _skipped(run: Run, cuts: Sequence[slice]) -> list[str]:
    return [_count(sum(row.was_skipped for row in run.steps[cut])) for cut in cuts]


def _seconds(run: Run, cuts: Sequence[slice]) -> NDArray[np.float64]:
    """Seconds a step in each span."""
    ends = np.array([run.steps[cut][-1].seconds for cut in cuts])
    lengths = np.array([cut.stop - cut.start for cut in cuts])
    result: NDArray[np.float64] = np.diff(ends, prepend=0.0) / lengths
    return result


def _with_evaluations(run: Run, cuts: Sequence[slice], columns: dict[str, list[str]]) -> dict[str, list[str]]:
    """A row in front for the evaluation before the first step, and each span's best one; `*` marks the run's best."""
    ends = [run.steps[0].step, *(run.steps[cut][-1].step + 1 for cut in cuts)]
    within: list[list[Evaluation]] = [[] for _ in ends]
    for row in run.evaluations:
        within[min(int(np.searchsorted(ends, row.step)), len(cuts))].append(row)
    best = [min(rows, key=lambda row: math.inf if row.loss is None else row.loss, default=None) for rows in within]
    out = {name: ["", *cells] for name, cells in columns.items()}
    out[SPAN][0] = START
    out["dev @step"] = [
        "" if row is None else f"{number(row.loss, '.4f')} @{row.step}{'*' if row is run.best else ' '}" for row in best
    ]
    for name in dict.fromkeys(name for row in run.evaluations for name in row.metrics):
        out[name] = ["" if row is None else number(row.metrics.get(name), ".3f") for row in best]
    return out


def scales_table(scales: Scales) -> Table:
    """sigma~ of each type of block at the first and the last recorded step; geometric means, without zeros."""
    names = ["type of block", "blocks"]
    picked = [0, -1] if len(scales.steps) > 1 else [0]
    for time in picked:
        names += [f"mean @{scales.steps[time] + 1}", "min", "max"]
    out = new_table("sigma~, the scale of the perturbation", *names)
    first = out.columns[0]
    first.no_wrap, first.overflow = False, "fold"  # a narrow terminal breaks the labels, not the numbers
    for label, members in block_types(scales.blocks).items():
        cells: list[str] = []
        for time in picked:
            values = scales.values[time, members]
            cells += [_extreme(values, which) for which in (geometric_mean, np.min, np.max)]
        out.add_row(escape(label), str(len(members)), *cells)
    return out


def _mean(values: NDArray[np.float64], spec: str, back: object = None) -> str:
    """The mean of those that are numbers, sent through `back`; "-" if none is."""
    known = values[~np.isnan(values)]
    if not len(known):
        return "-"
    mean = float(known.mean())
    return format(back(mean) if callable(back) else mean, spec)


def _extreme(values: NDArray[np.float64], which: object) -> str:
    known = values[~np.isnan(values)]
    return format(float(which(known)), ".3f") if len(known) and callable(which) else "-"


def _count(value: float) -> str:
    """A number of times; none is not worth a figure."""
    return f"{value:.0f}" if value else ""
