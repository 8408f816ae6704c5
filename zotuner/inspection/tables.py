"""An inspection on the terminal: everything is in the text, colour only adds to it; 80 columns are enough."""

import math

import numpy as np
from rich.markup import escape
from rich.style import Style
from rich.table import Table
from rich.text import Text

from zotuner.block_types import block_types
from zotuner.inspection.fresh import Weights
from zotuner.inspection.sigma import LOSSES, Array, Comparison, Sigmas
from zotuner.log.scales import geometric_mean
from zotuner.report import new_table

LEVELS = 10  # one digit each
LABEL = 30  # columns; a longer label loses its beginning
MOST_CELLS = 48  # columns; more layers than these share cells
FARTHEST = 5  # blocks shown where two tuners differ most
COLD, WARM = (59, 76, 192), (180, 4, 38)  # the ends of the colours, as in the figure: blue is small


def heat_map(found: Sigmas) -> Text:
    """A row a type of block, a digit a layer: 0 is the smallest scale, 9 the largest, in equal steps of the log.

    A dot stands for layers without any noise.
    """
    rows = found.by_layer()
    noisy = np.concatenate([row[row > 0] for row in rows.values()])
    low, high = float(noisy.min()), float(noisy.max())
    depth = max(len(row) for row in rows.values())
    share = -(-depth // MOST_CELLS)
    layers = f"{share} layers a digit" if share > 1 else "a digit a layer"
    dots = ", a dot is none" if found.silent else ""
    out = Text(f"0 is {low:.3f}, 9 is {high:.3f}{dots}; {layers}, first to last\n")
    for label, row in rows.items():
        out.append(f"{_short(label):<{LABEL}} ")
        for start in range(0, len(row), share):
            part = row[start : start + share]
            known = part[~np.isnan(part)]
            out.append(*_cell(geometric_mean(known), low, high)) if len(known) else out.append(" ")
        out.append("\n")
    return out


def _cell(value: float, low: float, high: float) -> tuple[str, Style]:
    if value == 0:
        return ".", Style()
    where = math.log(value / low) / max(1e-9, math.log(high / low))
    where = min(1.0, max(0.0, where))
    red, green, blue = (round(255 + (end - 255) * abs(2 * where - 1)) for end in (WARM if where > 0.5 else COLD))
    dark = abs(2 * where - 1) > 0.6
    style = Style(color="white" if dark else "black", bgcolor=f"rgb({red},{green},{blue})")
    return str(min(LEVELS - 1, int(where * LEVELS))), style


def _short(label: str) -> str:
    return label if len(label) <= LABEL else ".." + label[2 - LABEL :]


def sigma_table(found: Sigmas) -> Table:
    """By type of block: geometric mean and range at the first step, and the mean at other losses."""
    out = _table(found.name, "blocks", "mean", "min", "max", *(f"loss {loss:g}" for loss in LOSSES))
    for label, members in block_types(found.blocks).items():
        mine = found.first[members]
        numbers = [geometric_mean(mine), mine.min(), mine.max(), *(geometric_mean(at[members]) for at in found.at)]
        out.add_row(escape(label), str(len(members)), *(f"{x:.3f}" for x in numbers))
    return out


def tensors_table(found: list[Weights]) -> Table:
    """The nets' tensors against fresh ones; "err": sampling errors."""
    out = _table("weights", "mean", "err", "std", "fresh", "err", "beyond", "moved", "like fresh")
    for one in found:
        out.add_row(
            one.name,
            f"{one.mean:.2g}",
            _errors(one.mean_errors),
            f"{one.std:.4f}",
            f"{one.fresh_std:.4f}",
            _errors(one.std_errors),
            f"{one.beyond:.1%}",
            "-" if one.moved is None else f"{one.moved:.3f}",
            "yes" if one.like_fresh else "no",
        )
    return out


def _errors(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.1f}"


def compared_table(comparison: Comparison) -> Table:
    """By type of block, the largest difference first: both means, and their ratio."""
    types = block_types(comparison.blocks)
    ratio = comparison.log_ratio
    out = _table("type of block", "blocks", "this", "other", "ratio", "min", "max")
    for label, mine in sorted(types.items(), key=lambda item: -abs(float(ratio[item[1]].mean()))):
        means = [geometric_mean(side[mine]) for side in (comparison.ours, comparison.theirs)]
        ratios = [float(np.exp(x)) for x in (ratio[mine].mean(), ratio[mine].min(), ratio[mine].max())]
        out.add_row(escape(label), str(len(mine)), *(_number(x) for x in [*means, *ratios]))
    return out


def farthest_table(comparison: Comparison) -> Table:
    """The blocks in which the two differ most."""
    ratio = comparison.log_ratio
    out = _table("block", "this", "other", "ratio")
    for i in np.argsort(-np.abs(ratio))[:FARTHEST]:
        numbers = (comparison.ours[i], comparison.theirs[i], float(np.exp(ratio[i])))
        out.add_row(escape(comparison.blocks[i]), *(_number(x) for x in numbers))
    return out


def _number(value: float | Array) -> str:
    return f"{float(value):.3f}" if float(value) < 1e3 else f"{float(value):.1e}"


def _table(*names: str) -> Table:
    """Whose first column a narrow terminal breaks, not the numbers."""
    out = new_table(None, *names)
    out.columns[0].no_wrap, out.columns[0].overflow = False, "fold"
    return out
