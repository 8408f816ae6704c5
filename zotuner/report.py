"""Runs side by side: a table, and the curve of the loss on dev over forward passes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from rich import box
from rich.markup import escape
from rich.table import Table

from zotuner.errors import ZotunerError, at_fault, repeated
from zotuner.metrics import read_json, read_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Best(BaseModel):
    """The evaluation on dev whose weights a run delivered. Here and below: null for what was not finite."""

    step: int
    loss: float | None


class Dev(BaseModel):
    """What dev said of a run."""

    best: Best


class Summary(BaseModel):
    """What a table needs of a `summary.json`, which holds more."""

    model: str
    task: str
    method: str
    lr: float | None
    steps: int
    forwards: int
    seconds: float
    peak_rss_bytes: int
    zero_shot: dict[str, float | None] | None
    final: dict[str, float | None]
    dev: Dev | None


def read_summary(run: Path) -> dict[str, Any]:
    """A finished run's summary.

    Raises:
        ZotunerError: The folder holds no finished run.
    """
    path = run / "summary.json"
    if not path.exists():
        raise ZotunerError(f"{run}: expected a finished run, but it has no summary.json")
    summary = read_json(path)
    try:
        Summary.model_validate(summary)
    except ValidationError as error:
        raise ZotunerError(f"{path}: expected that of a fine-tuning run: {at_fault(error)}") from None
    return dict(summary)


def number(value: float | None, spec: str) -> str:
    """A number, or what stands for one that was not finite."""
    return "-" if value is None else format(value, spec)


def new_table(title: str | None, *names: str) -> Table:
    """An empty table: the first column is text, the others are numbers, and none is wrapped."""
    out = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in names:
        out.add_column(name, justify="left" if name == names[0] else "right", no_wrap=True)
    return out


def table(runs: Sequence[Path], title: str | None = None) -> Table:
    """One row a run: what it cost (GiB: peak memory) and what it gave (loss and metric of the best on dev)."""
    summaries = [read_summary(run) for run in runs]
    names = {main_metric(s["final"])[0] for s in summaries}
    metric = names.pop() if len(names) == 1 else "metric"
    out = new_table(title, "run", "lr", "steps", "forwards", "sec", "GiB", "dev @step", "loss", metric)
    several = len({(s["model"], s["task"]) for s in summaries}) > 1
    shown: set[tuple[str, str]] = set()
    for name, s in zip(_names(runs), summaries, strict=True):
        zero = s["zero_shot"]
        if zero is not None and (s["model"], s["task"]) not in shown:
            shown.add((s["model"], s["task"]))
            out.add_row(
                f"zero-shot {s['task']}" if several else "zero-shot",
                *[""] * 6,
                *_loss_and_metric(zero, metric),
            )
        best = (s["dev"] or {}).get("best")
        out.add_row(
            escape(name if s["method"] in name else f"{name} ({s['method']})"),
            f"{s['lr']:g}" if s["steps"] else "",
            str(s["steps"]),
            str(s["forwards"]),
            f"{s['seconds']:.0f}",
            f"{s['peak_rss_bytes'] / 2**30:.2f}",
            f"{number(best['loss'], '.4f')} @{best['step']}" if best else "",
            *_loss_and_metric(s["final"], metric),
        )
    return out


def _names(runs: Sequence[Path]) -> list[str]:
    """The folders' own names, as long as these tell them apart."""
    names = [run.resolve().name for run in runs]
    return names if repeated(names) is None else [str(run) for run in runs]


def main_metric(evaluated: dict[str, Any]) -> tuple[str, float | None]:
    """The name and the value of the metric to look at: the first behind the loss."""
    return next((pair for pair in evaluated.items() if pair[0] != "loss"), ("", None))


def _loss_and_metric(evaluated: dict[str, Any], column: str) -> tuple[str, str]:
    """Their cells; the metric is named where the column does not."""
    name, value = main_metric(evaluated)
    return number(evaluated["loss"], ".4f"), number(value, ".3f") + ("" if name == column else f" {name}")


def plot(runs: Sequence[Path], path: Path) -> None:
    """Writes a PNG: loss on dev against forward passes, a line a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        if not (run / "evals.jsonl").exists():
            continue
        rows = read_rows(run / "evals.jsonl")
        for place, row in enumerate(rows, start=1):
            if not {"forwards", "loss"} <= row.keys():
                raise ZotunerError(f"{run / 'evals.jsonl'}, row {place}: expected forwards and loss, got {list(row)}")
        summary = read_summary(run)
        label = f"{summary['method']}, lr {summary['lr']:g}"
        axes.plot([r["forwards"] for r in rows], [r["loss"] for r in rows], marker="o", markersize=3, label=label)
    axes.set(xlabel="forward passes", ylabel="loss on dev")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    save_figure(figure, path)


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a figure, without a display, in the format that the file's ending names.

    Raises:
        ZotunerError: The file cannot be written.
    """
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: an ending that matplotlib does not know
        raise ZotunerError(f"{path}: cannot be written: {error}") from None
