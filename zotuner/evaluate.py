"""Loss and accuracy over a set of examples, batched by length."""

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
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, float]:
    """Scores every candidate of every example.

    Args:
        model: A causal language model.
        objective: Of the task.
        examples: At least one.
        batch_size: Examples a forward.
        advance: Told how many examples were done.

    Returns:
        `loss`: the mean of the task's training loss; `accuracy`: the share of examples whose right candidate scores
        highest.
    """
    ordered = sorted(examples, key=objective.length)
    loss = correct = 0.0
    for start in range(0, len(ordered), batch_size):
        part = ordered[start : start + batch_size]
        batch = objective.batch(part)
        scores = objective.scores(model, batch)
        loss += float(objective.losses(scores, batch.labels).double().sum())
        correct += int((scores.argmax(dim=1).cpu() == batch.labels).sum())
        advance(len(part))
    return {"loss": loss / len(ordered), "accuracy": correct / len(ordered)}
