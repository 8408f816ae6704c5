"""Closures: what a step evaluates, `() -> loss` or `(branches=k) -> (k,) losses`."""

import inspect
from collections.abc import Callable

from torch import Tensor

Closure = Callable[..., Tensor | float]


def takes_branches(closure: Closure) -> bool:
    """Whether a closure has a parameter `branches`."""
    try:
        return "branches" in inspect.signature(closure).parameters
    except (TypeError, ValueError):  # builtins have no signature
        return False


def value_of(loss: Tensor | float) -> float:
    """A closure's result as a float."""
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return float(loss.detach())
    if isinstance(loss, int | float):
        return float(loss)
    came = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
    raise ValueError(f"the closure must return the loss, a tensor with one element or a float; it returned {came}")


def values_of(losses: Tensor | float, count: int) -> list[float]:
    """A stacked closure's result as floats."""
    if isinstance(losses, Tensor) and losses.shape == (count,):
        return [float(x) for x in losses.detach()]
    came = f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
    raise ValueError(
        f"a closure called with branches={count} must return losses of shape ({count},); it returned {came}"
    )
