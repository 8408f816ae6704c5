"""An inspection as a figure: scales by type of block and layer, and, with a run, over its steps."""

from typing import TYPE_CHECKING

import numpy as np

from zotuner.inspection.sigma import Sigmas
from zotuner.log import Run, paint_scales

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, ROW, MARGIN = 9.0, 0.28, 1.4  # inches: of the figure, of a type of block, of title and axis


def draw(title: str, found: Sigmas, run: Run | None) -> "Figure":
    """The heat map of the terminal, and the one that `zotuner log` draws."""
    from matplotlib.figure import Figure

    rows = found.by_layer()
    heights = [MARGIN + ROW * len(rows), *([MARGIN + ROW * len(rows)] if run is not None else [])]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    grid = figure.subplots(len(heights), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    depth = max(len(row) for row in rows.values())
    values = np.full((len(rows), depth), np.nan)
    for at, row in enumerate(rows.values()):
        values[at, : len(row)] = row
    logs = np.ma.masked_invalid(np.log2(np.where(values > 0, values, np.nan)))  # white: no noise, or no block
    limit = max(0.01, float(np.abs(logs).max()))
    mesh = grid[0].pcolormesh(logs, cmap="RdBu_r", vmin=-limit, vmax=limit)
    grid[0].set_yticks(np.arange(len(rows)) + 0.5, list(rows), fontsize=7)
    grid[0].invert_yaxis()
    grid[0].set_xlabel("layer (a type without layers stands at 0)")
    bar = figure.colorbar(mesh, ax=grid[0], pad=0.01)
    bar.ax.yaxis.set_major_formatter(lambda exponent, _: f"{2.0**exponent:.3g}")
    bar.set_label(f"{found.name} (1: as MeZO)")
    if run is not None:
        paint_scales(grid[1], run)
        grid[1].set_xlabel(f"steps of {run.folder.name}")
    figure.suptitle(f"{title}: {found.name} {found.told}", fontsize=9, wrap=True)
    return figure
