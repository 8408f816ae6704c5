"""sigma~ by block over a run."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Scales:
    """Recorded scales.

    Attributes:
        blocks: (n,) names, in the model's order.
        steps: (T,) the steps that took the scales, counted from 0.
        values: (T, n) sigma~; NaN where it was not finite.
    """

    blocks: tuple[str, ...]
    steps: NDArray[np.int64]
    values: NDArray[np.float64]


def geometric_mean(values: NDArray[np.float64]) -> float:
    """exp of the mean of logs, of those above 0; 0 where none is."""
    noisy = values[values > 0]
    return float(np.exp(np.log(noisy).mean())) if len(noisy) else 0.0
