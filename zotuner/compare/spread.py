"""Values over seeds, and numbers that are not known."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Spread:
    """Values over seeds: their mean, their standard deviation (n - 1; None for one seed), how many.

    `error`: standard error of one run's value over its n examples, of a share p sqrt(p (1 - p) / n); None: not known.
    """

    mean: float
    std: float | None
    count: int
    error: float | None = None


def spread(values: Sequence[float], errors: Sequence[float] = ()) -> Spread | None:
    """Mean and standard deviation, and the mean of the runs' own errors where all are known; None for no value."""
    if not values:
        return None
    finite = all(map(math.isfinite, values))
    std = (stdev(values) if finite else math.nan) if len(values) > 1 else None
    error = fmean(errors) if errors and all(map(math.isfinite, errors)) else None
    return Spread(fmean(values) if finite else math.nan, std, len(values), error)


def or_nan(value: float | None) -> float:
    return math.nan if value is None else value
