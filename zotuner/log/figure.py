"""A run as one figure: panels under each other over the steps that were done before.

Losses of step t (counted from 0) and an evaluation after t steps are of the same weights, and stand at the same place.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zotuner.block_types import block_types
from zotuner.log.run import Run
from zotuner.log.tables import headline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Paint = Callable[["Axes", Run], None]

WIDTH, MARGIN = 9.0, 1.1  # inches: of the figure; of title and axis at its ends
WINDOWS = 40  # a running mean is over a so much smaller part of the run
MOST_RESETS = 40  # more lines than these would hide what they cut
PALE = "0.75"
THIN_TYPE = 0.035  # of the heat map's height: what a type of few blocks is given, so that its label has room


def draw(run: Run) -> "Figure":
    """The figure; panels without data are left out."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = _panels(run)
    heights = [height for height, _ in panels]
    figure = Figure(figsize=(WIDTH, MARGIN + sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (_, paint) in zip(grid[:, 0], panels, strict=True):
        paint(axes, run)
    last = max([run.steps[-1].step + 1, *(row.step for row in run.evaluations)])
    grid[-1, 0].set_xlim(-0.01 * last, 1.01 * last)
    grid[-1, 0].xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
    grid[-1, 0].set_xlabel("steps done")
    figure.suptitle(headline(run), fontsize=10, wrap=True)
    return figure


def _panels(run: Run) -> list[tuple[float, Paint]]:
    """Height (inches) and painter of each panel."""
    coefficients: list[tuple[float, Paint]] = [(1.6, _coefficients)] if np.isfinite(run.coefficients).any() else []
    if run.is_meta:
        return [(2.6, _meta_losses), (1.8, _gain), (1.9, _spread), *coefficients]
    panels: list[tuple[float, Paint]] = [(2.8, _losses), *coefficients, (1.1, _lr)]
    if run.scales is not None:
        panels.append((min(6.0, max(2.5, 0.38 * len(block_types(run.scales.blocks)) + 0.6)), paint_scales))
    return panels


def _losses(axes: "Axes", run: Run) -> None:
    _plot_mean(axes, run.column("step"), run.column("loss"), "training loss")
    known = [(row.step, row.loss) for row in run.evaluations if row.loss is not None]
    if known:
        axes.plot(*zip(*known, strict=True), "o-", color="C3", ms=5, clip_on=False, label="dev loss")
    if run.best is not None and run.best.loss is not None:
        label = f"best on dev: {run.best.loss:.4f} at step {run.best.step}"
        axes.plot(run.best.step, run.best.loss, "*", color="C3", ms=13, clip_on=False, label=label)
    for name, marker, color, rows in (
        ("skipped", "x", "black", [row.step for row in run.steps if row.was_skipped]),
        ("clipped", "|", "C1", [row.step for row in run.steps if row.clipped]),
    ):
        if rows:
            bottom = axes.get_xaxis_transform()  # steps along, the panel's height up
            axes.plot(rows, [0.03] * len(rows), marker, color=color, ms=6, label=f"{name} steps", transform=bottom)
    axes.set_ylabel("loss")
    _finish(axes)


def _coefficients(axes: "Axes", run: Run) -> None:
    """On a log scale: a coefficient of 0 has no place there and is left out."""
    rms = np.where(run.coefficients > 0, run.coefficients, np.nan)
    _plot_mean(axes, run.column("step"), rms, "rms of the coefficients", power=2)
    if np.isfinite(rms).any():
        axes.set_yscale("log")
    axes.set_ylabel("coefficients")
    _finish(axes)


def _lr(axes: "Axes", run: Run) -> None:
    lr = run.column("lr")
    axes.plot(run.column("step"), lr, color="C0")
    axes.set_ylim(0, 1.2 * lr.max())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.set_ylabel("lr")
    axes.grid(alpha=0.3)


def paint_scales(axes: "Axes", run: Run) -> None:
    """log2 sigma~: a row a block, ordered by type and then layer; a column a recorded step, wherever it stands."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    scales, figure = run.scales, axes.get_figure()
    assert scales is not None
    assert figure is not None
    types = block_types(scales.blocks)
    rows = [index for members in types.values() for index in members]
    with np.errstate(divide="ignore"):
        logs = np.ma.masked_invalid(np.log2(scales.values[:, rows].T))
    limit = max(0.1, float(np.quantile(np.abs(logs.compressed()), 0.995))) if logs.count() else 1.0
    thin = THIN_TYPE * len(rows)
    tops = np.cumsum([0.0, *(max(1.0, thin / len(m)) for m in types.values() for _ in m)])
    mesh = axes.pcolormesh(
        _edges(scales.steps),
        tops,
        logs,
        cmap=colormaps["RdBu_r"].with_extremes(bad="0.5"),
        vmin=-limit,
        vmax=limit,
        rasterized=True,
    )
    ends = np.cumsum([0, *map(len, types.values())])
    axes.set_yticks([(tops[a] + tops[b]) / 2 for a, b in pairwise(ends)], list(types), fontsize=7)
    for top in tops[ends[1:-1]]:
        axes.axhline(top, color="black", linewidth=0.4)
    axes.invert_yaxis()
    axes.set_ylabel("type of block, each from first to last layer" if len(rows) > len(types) else "block")
    beyond = np.abs(logs) > limit
    bar = figure.colorbar(mesh, ax=axes, extend="both" if beyond.any() else "neither", pad=0.01)
    bar.locator = MaxNLocator(8, integer=limit >= 1.5)
    bar.ax.yaxis.set_major_formatter(lambda exponent, _: f"{2.0**exponent:.3g}")
    bar.set_label("sigma~ (1: as MeZO)")


def _meta_losses(axes: "Axes", run: Run) -> None:
    """Means a task, since losses of different tasks are not of one size; the meta-loss, close by, on top."""
    at, names = run.column("step"), np.array([row.task for row in run.steps])
    for number, task in enumerate(dict.fromkeys(names)):
        mine = names == task
        of = f" on {task}" if len(set(names)) > 1 else ""
        color = f"C{number}"
        _plot_mean(axes, at[mine], run.column("loss")[mine], f"loss{of}", color=color, linewidth=4, alpha=0.35)
        _plot_mean(axes, at[mine], run.column("meta_loss")[mine], f"meta-loss{of}", raw=False, color=color, linewidth=1)
    _mark_resets(axes, run)
    axes.set_ylabel("loss")
    _finish(axes)


def _gain(axes: "Axes", run: Run) -> None:
    _plot_mean(axes, run.column("step"), run.column("loss") - run.column("meta_loss"), "loss - meta-loss")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel("gain of a step")
    _finish(axes)


def _spread(axes: "Axes", run: Run) -> None:
    at, std = run.column("step"), run.column("sigma_log_std")
    axes.fill_between(at, run.column("sigma_min"), run.column("sigma_max"), color="C0", alpha=0.2, label="min to max")
    axes.fill_between(at, np.exp(-std), np.exp(std), color="C0", alpha=0.5, label="within exp(std of log) of 1")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylabel("sigma~ of the blocks")
    _finish(axes)


def _mark_resets(axes: "Axes", run: Run) -> None:
    """Thin lines where the model began anew."""
    resets = [row.step for row in run.steps[1:] if row.position == 0]
    if 0 < len(resets) <= MOST_RESETS:
        for number, at in enumerate(resets):
            label = "model back at its start" if number == 0 else None
            axes.axvline(at, color="0.5", linewidth=0.8, linestyle=":", label=label)


def _plot_mean(
    axes: "Axes",
    at: NDArray[np.float64],
    values: NDArray[np.float64],
    label: str,
    *,
    power: int = 1,
    raw: bool = True,
    color: str = "C0",
    **style: Any,
) -> None:
    """A running mean (of the power `power`, and its root) over what it is the mean of, pale; a short run as it is."""
    window = len(values) // WINDOWS
    if window < 2:
        axes.plot(at, values, marker=".", color=color, label=label, **style)
        return
    if raw:
        axes.plot(at, values, color=PALE, linewidth=0.7, label="each step")
    mean = running_mean(values**power, window) ** (1 / power)
    axes.plot(at, mean, color=color, label=f"{label}, {'mean of' if power == 1 else 'over'} {window} steps", **style)


def running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Means over the `window` values around each, fewer at the ends; NaN is left out, and stays where all are NaN."""
    ones = np.ones(window)
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        total = np.convolve(np.where(known, values, 0.0), ones, "same")
        count = np.convolve(known, ones, "same")
        result: NDArray[np.float64] = total / np.where(count > 0.5, count, np.nan)
    return result


def _edges(steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """Where each column of the heat map begins and ends: halfway to its neighbours."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.array([steps[0], *middle, steps[-1] + (steps[-1] - middle[-1])])


def _finish(axes: "Axes") -> None:
    """A grid, and a legend above the panel, where it hides nothing."""
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))  # each task's pale line has the same one
    axes.legend(
        shown.values(),
        shown.keys(),
        fontsize=7,
        ncols=3,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        frameon=False,
        borderpad=0.2,
    )
