"""Charts: of one task as SVG to stand within a page, of all tasks as PNG to stand anywhere.

The SVG has no outside reference, and the page's own colour for text.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zotuner.compare.figures import Row
from zotuner.compare.spec import Unit
from zotuner.compare.state import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by those who see few colours, on white and on black (the first seven: Okabe and Ito 2008)
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8c8c8c", "#6A3D9A", "#8B4513")
INK = "#010203"  # drawn with, and then replaced by the page's text colour
DRAWN_IN_INK = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
PER_ROW = 4  # tasks in a picture of all
HEADROOM = 0.25  # of the fall of the loss: what is shown above the start; runs that diverge leave the chart
LEAST_HEADROOM = 0.02  # of the loss at the start: where hardly anything falls, what rises a little is seen

Curve = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def task_chart(rows: Sequence[Row], colors: Mapping[str, str], unit: Unit) -> str:
    """Loss on dev against what it cost and against the lr, and losses in training against the baseline's."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = dict.fromkeys(DRAWN_IN_INK, INK)
    style |= {"svg.fonttype": "none", "svg.hashsalt": rows[0].task, "axes.facecolor": "none"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(13, 4), layout="constrained")
        panels = figure.subplots(1, len(PANELS))
        for axes, panel in zip(panels, PANELS.values(), strict=True):
            panel.draw(axes, rows, colors, unit)
            axes.set(ylabel=panel.shows, title=panel.title)
        handles, labels = panels[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
        return _svg(figure)


def overview(tasks: Mapping[str, Sequence[Row]], colors: Mapping[str, str], unit: Unit, what: str) -> bytes | None:
    """One of `PANELS` for each task as PNG; None where there is nothing to draw yet."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panel = PANELS[what]
    drawn = {task: rows for task, rows in tasks.items() if panel.has(rows)}
    if not drawn:
        return None
    across = min(PER_ROW, len(drawn))
    down = math.ceil(len(drawn) / across)
    figure = Figure(figsize=(3.4 * across, 2.7 * down + 0.5), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes, (task, rows) in zip(panels, drawn.items(), strict=False):
        panel.draw(axes, rows, colors, unit)
        axes.set_title(task)
    for axes in panels[len(drawn) :]:
        axes.set_axis_off()
    methods = dict.fromkeys(row.method for rows in drawn.values() for row in panel.has(rows))
    handles = [Line2D([], [], color=colors[method], marker="o", ms=3, label=method) for method in methods]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False)
    figure.supylabel(panel.shows, fontsize="medium")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def mean_curve(curves: Sequence[Sequence[Point]], unit: Unit) -> Curve:
    """Where any of them was evaluated, as far as all go: place, mean and standard deviation (0 for one curve)."""
    xs = [np.array([getattr(point, unit) for point in curve], float) for curve in curves]
    ys = [np.array([point.loss for point in curve], float) for curve in curves]
    places = np.unique(np.concatenate(xs))
    places = places[places <= min(x[-1] for x in xs)]
    values = np.stack([np.interp(places, x, y) for x, y in zip(xs, ys, strict=True)])
    std = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros_like(places)
    return places, values.mean(axis=0), std


def _with_curves(rows: Sequence[Row]) -> list[Row]:
    """Those of which a line can be drawn."""
    return [row for row in rows if any(len(curve) > 1 for curve in row.curves.values())]


def _draw_curves(axes: "Axes", rows: Sequence[Row], colors: Mapping[str, str], unit: Unit) -> None:
    drawn = _with_curves(rows)
    for row in drawn:
        x, mean, std = mean_curve([curve for curve in row.curves.values() if len(curve) > 1], unit)
        label = row.method if row.lr is None else f"{row.method}, lr {row.lr:g}"
        axes.plot(x, mean, "o-", ms=3, color=colors[row.method], label=label)
        if len(row.curves) > 1:
            axes.fill_between(x, mean - std, mean + std, color=colors[row.method], alpha=0.2, linewidth=0)
    axes.set_xlabel(unit)
    axes.grid(alpha=0.3)
    _limit(axes, [point.loss for row in drawn for curve in row.curves.values() for point in curve], drawn)


def _with_training(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.training_parts]


def _draw_training(axes: "Axes", rows: Sequence[Row], colors: Mapping[str, str], unit: Unit) -> None:
    """Means of equal parts of the run, with a band of their standard error; 0 is the baseline."""
    axes.axhline(0, color="#8c8c8c", linewidth=1)
    for row in _with_training(rows):
        mean = np.array([part.mean for part in row.training_parts])
        error = np.array([(part.error or 0.0) / math.sqrt(part.count) for part in row.training_parts])
        x = (np.arange(len(mean)) + 0.5) / len(mean)
        axes.plot(x, mean, "o-", ms=3, color=colors[row.method])
        axes.fill_between(x, mean - error, mean + error, color=colors[row.method], alpha=0.15, linewidth=0)
    axes.set(xlabel=f"share of the {unit}", xlim=(0, 1))
    axes.grid(alpha=0.3)


def _draw_grids(axes: "Axes", rows: Sequence[Row], colors: Mapping[str, str], unit: Unit) -> None:
    """The best loss on dev of each lr, a star on the chosen one; crosses at the top are lrs that failed."""
    lrs: list[float] = []
    for row in rows:
        known = [(tried.lr, tried.dev) for tried in row.tried if tried.lr is not None and tried.dev is not None]
        failed = [tried.lr for tried in row.tried if tried.failed and tried.lr is not None]
        color = colors[row.method]
        x, y = [lr for lr, _ in known], [dev.mean for _, dev in known]
        axes.errorbar(x, y, [dev.std or 0.0 for _, dev in known], fmt="o-", ms=4, color=color, capsize=2)
        chosen = [(lr, dev.mean) for lr, dev in known if lr == row.lr]
        if chosen:
            axes.plot(*zip(*chosen, strict=True), "*", ms=14, color=color)
        if failed:
            axes.plot(failed, [0.97] * len(failed), "x", color=color, transform=axes.get_xaxis_transform())
        lrs += x + failed
    if lrs:
        _log_scale(axes, lrs)
    axes.set_xlabel("lr")
    axes.grid(alpha=0.3)
    _limit(axes, [tried.dev.mean for row in rows for tried in row.tried if tried.dev], rows)


def _log_scale(axes: "Axes", lrs: Sequence[float]) -> None:
    """Few labels, and more than one where the lrs lie within a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if max(lrs) > 30 * min(lrs) else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _limit(axes: "Axes", values: Sequence[float], rows: Sequence[Row]) -> None:
    """Cuts the chart a little above the loss that all started from."""
    start = [curve[0].loss for row in _with_curves(rows) for curve in row.curves.values()]
    known = [value for value in values if np.isfinite(value)]
    if known and start and min(known) < max(start):
        fall = max(start) - min(known)
        headroom = max(HEADROOM * fall, LEAST_HEADROOM * max(start))
        axes.set_ylim(min(known) - 0.08 * fall, min(axes.get_ylim()[1], max(start) + headroom))


def _svg(figure: "Figure") -> str:
    """Only the drawing: without the prolog, its metadata and its name spaces, which HTML does not need."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    return text.replace(INK, "currentColor")


class Panel(NamedTuple):
    """What a panel shows.

    Attributes:
        draw: Draws it.
        has: The rows of a task of which it shows anything.
        shows: The label of its values.
        title: Beside the others of a task.
    """

    draw: Callable[["Axes", Sequence[Row], Mapping[str, str], Unit], None]
    has: Callable[[Sequence[Row]], list[Row]]
    shows: str
    title: str


PANELS = {
    "curves": Panel(_draw_curves, _with_curves, "dev loss", "the chosen lr of each method"),
    "training": Panel(_draw_training, _with_training, "training loss - baseline's", "the same batches"),
    "lr": Panel(_draw_grids, _with_curves, "best dev loss", "each lr of the grids"),
}
