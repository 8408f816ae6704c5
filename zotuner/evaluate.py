"""Loss and metrics over a set of examples, batched by length."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from zotuner.objective import Objective
from zotuner.tasks import Example


@torch.no_grad()
def evaluate(
    model: Any,
    objective: Objective,
    examples: Sequence[Example],
    batch_size: int = 32,
    *,
    answers: bool = True,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, float]:
    """Answers every example.

    Args:
        model: Of the objective's kind.
        objective: Of the task.
        examples: At least one.
        batch_size: Examples a forward.
        answers: Leave metrics of generated answers out if not set: the loss alone is much faster.
        advance: Told how many examples were done.

    Returns:
        `loss`: the mean over the examples; then the task's metrics of the answers, by name.
    """
    ordered = sorted(examples, key=objective.length)
    prefix = objective.prefix(model, ordered)
    loss, given = 0.0, []
    for start in range(0, len(ordered), batch_size):
        part = ordered[start : start + batch_size]
        assessed = objective.assess(model, part, prefix, answers=answers)
        loss += float(assessed.losses.double().sum())
        given += assessed.answers or []
        advance(len(part))
    metrics = objective.task.metrics if given else {}
    return {"loss": loss / len(ordered), **{name: metric(given, ordered) for name, metric in metrics.items()}}
