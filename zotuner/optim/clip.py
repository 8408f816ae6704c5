"""Clipping of a step's coefficients: one wild loss must not undo a run."""

import math
from typing import Any

DECAY = 0.99  # of the running mean: about the last hundred steps count
WARM_UP = 10  # steps before anything is clipped


def clipped(coefficients: tuple[float, ...], limit: float, state: dict[str, Any]) -> tuple[float, ...]:
    """The coefficients, scaled down so that their root mean square is at most `limit` running standard deviations.

    The running variance is that of the coefficients as they were used, about their mean of 0, with the weights of
    early steps corrected as Adam's second moment is (arXiv:1412.6980, section 3). A step whose coefficients are all 0,
    as they often are where a metric is the objective, says nothing of it and does not count.

    Args:
        coefficients: Finite.
        limit: In standard deviations. One of 1 or less makes the variance, and so the steps, smaller and smaller.
        state: Where the running variance and the number of steps are kept: "clip_square" and "clip_count".
    """
    square = sum(c * c for c in coefficients) / len(coefficients)
    if square == 0:
        return coefficients
    count, running = state.get("clip_count", 0), state.get("clip_square", 0.0)
    if count >= WARM_UP:
        most = limit**2 * running / (1 - DECAY**count)
        if square > most:
            factor = math.sqrt(most / square)
            coefficients, square = tuple(c * factor for c in coefficients), most
    state["clip_square"] = DECAY * running + (1 - DECAY) * square
    state["clip_count"] = count + 1
    return coefficients
