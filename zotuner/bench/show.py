"""The figures as tables and as a plot."""

from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from zotuner.bench.measure import PARTS
from zotuner.report import save_figure

COLUMNS = {  # key in the JSON -> (heading, format)
    "seconds": ("seconds", ".3f"),
    "forwards": ("forwards", "d"),
    "per_own_forwards": ("step / its forwards", ".3f"),
    "per_official_step": ("step / official", ".3f"),
    "official_step_per_step": ("official / step", ".2f"),
    "per_base_step": ("step / base", ".3f"),
    "tokens_per_second": ("tokens / s", ".0f"),
    "peak_per_forward": ("memory / forward", ".3f"),
}
COLORS = {"forward": "0.75", "noise": "C0", "update": "C1", "statistics": "C2", "pertnn": "C3"}


def tables(entries: dict[str, dict[str, Any]], title: str) -> tuple[Table, Table]:
    """What each row costs, and where its time goes."""
    costs = _table(title, "step", *(heading for heading, _ in COLUMNS.values()))
    where = _table("where the time goes, % of the step", "step", "forward", *PARTS)
    for name, row in entries.items():
        costs.add_row(name, *(_cell(row[key], spec) for key, (_, spec) in COLUMNS.items()))
        if row["shares"] is not None:
            where.add_row(name, *(f"{100 * row['shares'][part]:.1f}" for part in ("forward", *PARTS)))
    return costs, where


def drift_table(entries: dict[str, dict[str, Any]], title: str) -> Table:
    """How far each method moved the weights."""
    table = _table(title, "step", "rms", "max")
    for name, row in entries.items():
        table.add_row(name, f"{row['rms']:.3g}", f"{row['max']:.3g}")
    return table


def pertnn_table(entries: dict[str, dict[str, Any]], title: str) -> Table:
    """How long the nets of each architecture take."""
    table = _table(title, "architecture", "median", "min", "max")
    for name, row in entries.items():
        table.add_row(name, *(f"{row[key]:.2f}" for key in ("median", "min", "max")))
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _cell(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def plot(entries: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    """Writes a PNG: a bar a method, its step over its own forwards, cut into where the time goes.

    Raises:
        ZotunerError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    shown = {name: row for name, row in entries.items() if row["shares"] is not None}
    figure = Figure(figsize=(8, 1.5 + 0.32 * len(shown)), layout="constrained")
    axes = figure.subplots()
    left = dict.fromkeys(shown, 0.0)
    for part, color in COLORS.items():
        widths = [row["per_own_forwards"] * row["shares"][part] for row in shown.values()]
        axes.barh(list(shown), widths, left=list(left.values()), color=color, label=part)
        left = {name: start + width for (name, start), width in zip(left.items(), widths, strict=True)}
    for name, end in left.items():
        axes.annotate(f"{end:.2f}", (end, name), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axes.invert_yaxis()
    axes.set(xlabel="step / its own forwards", title=title, xlim=(0, 1.1 * max(left.values(), default=1.0)))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(COLORS))
    save_figure(figure, path)
