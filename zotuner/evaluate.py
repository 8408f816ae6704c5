"""Loss and metrics over a set of examples, batched by length."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zotuner.metrics import standard_error
from zotuner.objective import Objective
from zotuner.tasks import Example


@dataclass(frozen=True)
class Evaluation:
    """What a model made of a set of examples.

    Attributes:
        figures: `loss`: the mean over the examples; then the task's metrics of the answers, by name.
        losses: Of each example, in the order in which they were given.
        answers: Likewise; None where nobody asked for them.
    """

    figures: dict[str, float]
    losses: tuple[float, ...]
    answers: tuple[str, ...] | None

    @property
    def loss_error(self) -> float:
        """Standard error of the loss over the examples."""
        return standard_error(self.losses)


@torch.no_grad()
def evaluate(
    model: Any,
    objective: Objective,
    examples: Sequence[Example],
    batch_size: int = 32,
    *,
    answers: bool = True,
    advance: Callable[[int], None] = lambda _: None,
) -> Evaluation:
    """Answers every example.

    Args:
        model: Of the objective's kind.
        objective: Of the task.
        examples: At least one.
        batch_size: Examples a forward.
        answers: Leave metrics of generated answers out if not set: the loss alone is much faster.
        advance: Told how many examples were done.
    """
    order = sorted(range(len(examples)), key=lambda number: objective.length(examples[number]))
    ordered = [examples[number] for number in order]
    prefix = objective.prefix(model, ordered)
    total, losses, given = 0.0, [], []
    for start in range(0, len(ordered), batch_size):
        part = ordered[start : start + batch_size]
        assessed = objective.assess(model, part, prefix, answers=answers)
        total += float(assessed.losses.double().sum())
        losses += assessed.losses.tolist()
        given += assessed.answers or []
        advance(len(part))
    metrics = objective.task.metrics if given else {}
    figures = {"loss": total / len(ordered), **{name: metric(given, ordered) for name, metric in metrics.items()}}
    place = sorted(range(len(order)), key=order.__getitem__)  # of each example among the ordered ones
    return Evaluation(figures, tuple(losses[at] for at in place), tuple(given[at] for at in place) if given else None)
