"""The loss after one virtual zeroth-order step, as the paper has it, and its gradient by each block's scale.

    u(omega)  ->  c  ->  theta_1 = theta - lr c u  ->  backward: grad L(theta_1)
    d L(theta_1) / d sigma~_i = -lr c <grad_i L(theta_1), z_i>

z and c are held fixed. Source: arXiv:2510.00419, Section 3; the gradient is docs/method.md's.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zotuner.blocks import Block
from zotuner.config import MetaTrainConfig
from zotuner.gradients import block_dots
from zotuner.optim.estimators import TwoPoint
from zotuner.perturb import Draw, Perturbation, Perturber, shifted
from zotuner.visit import Found, Loss, ScalesOf, Visit


@dataclass(frozen=True)
class VirtualStep:
    """What one virtual zeroth-order step says.

    Attributes:
        losses: (loss_plus, loss_minus).
        coefficient: c.
        meta_loss: L(theta_1).
        gradient: (n,) float64: d meta_loss / d sigma~, z and c held fixed.
    """

    losses: tuple[float, float]
    coefficient: float
    meta_loss: float
    gradient: Tensor

    @property
    def finite(self) -> bool:
        """Whether all of it can be used."""
        return math.isfinite(self.meta_loss) and bool(torch.isfinite(self.gradient).all())


def virtual_step(
    perturber: Perturber,
    blocks: Sequence[Block],
    closure: Loss,  # in the blocks' parameters
    draw: Draw,
    scales: Tensor,  # (n,) sigma~
    *,
    eps: float,
    lr: float,  # of the virtual step
    judge: Loss | None = None,  # the loss after the step; None: the closure itself
) -> VirtualStep:
    """One virtual step and the gradient of the loss after it with respect to each block's scale.

    The weights come back to where they were by the same step with the opposite sign: to within rounding.
    """
    sigma, estimator = scales.tolist(), TwoPoint()
    with torch.no_grad():
        points = [Perturbation(draw, [factor * s for s in sigma]) for _, factor in estimator.points(eps)]
        losses = estimator.pair(tuple(perturber.losses(closure, points)))
    (c,) = estimator.coefficients(losses, eps)
    dots = torch.zeros(len(blocks), dtype=torch.float64)
    if not math.isfinite(c):
        return VirtualStep(losses, c, math.nan, dots)
    step = [[-lr * c * s] for s in sigma]
    with shifted(blocks, draw, step), torch.enable_grad(), block_dots(blocks, draw, dots):
        loss = (judge or closure)()
        loss.backward()
    return VirtualStep(losses, c, float(loss.detach()), -lr * c * dots)


class Sampled:
    """The meta-loss: L(theta_1).

    Args:
        model: Whose losses it asks for.
        blocks: Of it.
        config: Noise, eps, inner learning rate, whether another batch judges.
    """

    anew = False

    def __init__(self, model: nn.Module, blocks: Sequence[Block], config: MetaTrainConfig) -> None:
        self._blocks, self._config = blocks, config
        self._perturber = Perturber(model, blocks)
        self._last: tuple[Tensor, Tensor] | None = None  # what the nets saw (n, 5), the gradient by sigma~ (n,)

    def visit(self, visit: Visit, inputs: Tensor, scales: Tensor) -> Found:
        """Takes a virtual step."""
        config = self._config
        draw = Draw(config.noise, config.seed, visit.point.number)
        judge = visit.other if config.second_batch else None
        step = virtual_step(
            self._perturber,
            self._blocks,
            visit.loss,
            draw,
            scales,
            eps=config.eps,
            lr=config.inner_lr,
            judge=judge,
        )
        row = {
            "loss": sum(step.losses) / 2,
            "meta_loss": step.meta_loss,
            "coefficients": [step.coefficient],
            "skipped": not step.finite,
        }
        self._last = (inputs, step.gradient) if step.finite else None
        return Found(row, step.losses if step.finite else None)

    def objectives(self, number: int, scales_of: ScalesOf) -> Iterator[Tensor]:
        """One, whose gradient is the step's."""
        if self._last is not None:
            inputs, gradient = self._last
            yield (scales_of(inputs) * gradient).sum()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Nothing: a point is forgotten once the nets have learned from it."""
        return {}, {}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Nothing."""
