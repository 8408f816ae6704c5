"""From what a block's gradient and curvature are to its scale, and to an artefact.

    G_i, C_i  ->  G_i / d_i and C_i / d_i, kept from 0  ->  sigma_i^2 ~ (G_i / C_i)^power  ->  tuner, measured.json

Source: docs/method.md, "Static scales: measured and calibrated".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zotuner.block_types import block_types
from zotuner.blocks import Block
from zotuner.config import STATISTIC
from zotuner.errors import ZotunerError
from zotuner.metrics import write_json
from zotuner.pertnn import normalize
from zotuner.tuner import Tuner
from zotuner.tuner_out import TABLE

FLOOR = 0.1  # of what is typical of its type: what a block's estimate is raised to

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """Numbers, one for each of n things.

    Attributes:
        values: (n,); what is positive may come out negative.
        error: (n,) standard errors; None where they cannot be told.
    """

    values: Floats
    error: Floats | None = None


@dataclass(frozen=True)
class Statistics:
    """What was found for each block of a model.

    Attributes:
        gradient: G_i = |grad_i L|^2.
        curvature: C_i = tr H_ii; None where nobody asked for it.
        further: (n,) columns for the table.
    """

    gradient: Estimate
    curvature: Estimate | None
    further: dict[str, Floats]

    def columns(self) -> dict[str, Floats]:
        """All that there is, by name."""
        named = {"gradient": self.gradient} | ({} if self.curvature is None else {"curvature": self.curvature})
        values = {name: estimate.values for name, estimate in named.items()}
        errors = {f"{name}_se": estimate.error for name, estimate in named.items() if estimate.error is not None}
        return values | errors | self.further


def scales_of(found: Statistics, blocks: Sequence[Block], statistic: STATISTIC, power: float) -> Tensor:
    """sigma_i^2 ~ (G_i / C_i)^power, or (G_i / d_i)^power: (n,), with sum_i d_i sigma_i^2 = d.

    Raises:
        ZotunerError: No block has a positive estimate.
    """
    numels = np.array([block.numel for block in blocks], float)
    types = list(block_types([block.name for block in blocks]).values())
    ratio = _raised("gradient", found.gradient, numels, types)
    if statistic == "gradient-curvature":
        assert found.curvature is not None
        ratio /= _raised("curvature", found.curvature, numels, types)
    logs = power / 2 * np.log(ratio)
    return normalize(torch.from_numpy(np.exp(logs - logs.max())), torch.from_numpy(numels))


def _raised(what: str, estimate: Estimate, numels: Floats, types: Sequence[Sequence[int]]) -> Floats:
    """Estimates an element, kept from 0.

    Where something positive is small beside the error of its estimate, the estimate is often negative, or near 0 by
    chance. None stays below `FLOOR` of the median over the blocks of its type, or of the median of their standard
    errors where that is larger; where neither is positive, of the median over all blocks with a positive estimate.
    """
    density = estimate.values / numels
    error = np.zeros(len(numels)) if estimate.error is None else estimate.error / numels
    positive = density[density > 0]
    if not len(positive) or not np.isfinite(density).all():
        raise ZotunerError(f"no {what} could be told from its error; use more batches or forwards, or another --eps")
    raised = density.copy()
    for members in types:
        typical = max(np.median(density[members]), np.median(error[members]))
        raised[members] = np.maximum(density[members], FLOOR * (typical if typical > 0 else np.median(positive)))
    return raised


def write_table(out: Path, tuner: Tuner, found: Statistics) -> None:
    """Writes, beside a tuner, what was found for each block."""
    columns = {
        "name": list(tuner.block_names),
        "numel": [block.numel for block in tuner.info.blocks],
        **{name: values.tolist() for name, values in found.columns().items()},
        "sigma": tuner.bank.state_dict()["sigma"].tolist(),
    }
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    write_json(out / TABLE, {**tuner.info.config, "blocks": rows})
