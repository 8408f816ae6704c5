"""What a meta-loss is asked at a point of a trajectory, and what it answers.

point, its losses, the nets' scales  ->  a row of metrics, what the nets are told next, objectives for the nets
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from zotuner.trajectory import Point

Loss = Callable[[], Tensor]  # differentiable, of one fixed batch, at the model's present weights
ScalesOf = Callable[[Tensor], Tensor]  # (..., n, 5) what the nets see -> (..., n) sigma~, with its graph


@dataclass(frozen=True)
class Visit:
    """A point, with the model's weights at it.

    Attributes:
        point: Its number, position, task and examples.
        loss: Of its batch.
        other: Of another batch of the task.
        centred: Of its batch, without what all its examples share (`Objective.centred_loss`); None: there is none.
    """

    point: Point
    loss: Loss
    other: Loss
    centred: Loss | None


class Found(NamedTuple):
    """What a meta-loss says of a point.

    Attributes:
        row: Of metrics: loss, meta_loss, coefficients, skipped, and its own.
        losses: What the nets are told at the task's next point; None: as at this one.
    """

    row: dict[str, Any]
    losses: tuple[float, float] | None


class MetaLoss(Protocol):
    """One way to judge scales.

    Attributes:
        anew: What a point says does not depend on the nets: they learn at the end of a round, from where they began, of
            all points so far. Otherwise at each point.
    """

    anew: bool

    def visit(self, visit: Visit, inputs: Tensor, scales: Tensor) -> Found:
        """Measures a point.

        Args:
            visit: The point.
            inputs: (n, 5) what the nets see there.
            scales: (n,) sigma~ they make of it, without a graph.
        """

    def objectives(self, number: int, scales_of: ScalesOf) -> Iterator[Tensor]:
        """0-d tensors to be made small, one an outer step; each is made when the step before it is done.

        Args:
            number: Points visited so far.
            scales_of: The nets as they are.
        """

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the next point stands on."""

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Takes back what `state` gave."""
