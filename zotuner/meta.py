"""Meta-training: learns PertNNs from virtual zeroth-order steps along a first-order trajectory.

    point theta_0  ->  features -> sigma~  ->  c from L(theta_0 +- eps u)  ->  theta_1 = theta_0 - lr_inner c u
                   ->  one backward at theta_1, dot by dot  ->  d meta-loss / d sigma~  ->  PertNNs (Adam)

Source: ZO Fine-tuner, arXiv:2510.00419. With z and c held fixed,

    dL(theta_1) / d sigma~_i = -lr_inner c <grad_i L(theta_1), z_i>

so there is no graph over the parameters and no copy of the model, and a gradient is freed once its dot is taken.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zotuner.blocks import Block, find_blocks
from zotuner.config import MetaTrainConfig
from zotuner.gradients import block_dots
from zotuner.optim.estimators import TwoPoint
from zotuner.optim.zo_finetuner import features_of
from zotuner.pertnn import normalize
from zotuner.perturb import Closure, Draw, Perturbation, Perturber, shift
from zotuner.snapshot import (
    optimizer_groups,
    optimizer_tensors,
    restore_optimizer,
)
from zotuner.tuner import Tuner


@dataclass(frozen=True)
class VirtualStep:
    """What one virtual zeroth-order step says.

    Attributes:
        losses: (loss_plus, loss_minus).
        coefficient: c.
        meta_loss: L(theta_1).
        gradient: (n,) float64: d meta_loss / d sigma~, z and c held fixed.
    """

    losses: tuple[float, ...]
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
    closure: Closure,  # differentiable in the blocks' parameters
    draw: Draw,
    scales: Tensor,  # (n,) sigma~
    *,
    eps: float,
    lr: float,  # of the virtual step
) -> VirtualStep:
    """One virtual step and the gradient of the loss after it with respect to each block's scale.

    The weights come back to where they were by the same step with the opposite sign: to within rounding.
    """
    sigma, estimator = scales.tolist(), TwoPoint()
    with torch.no_grad():
        points = [Perturbation(draw, [factor * s for s in sigma]) for _, factor in estimator.points(eps)]
        losses = tuple(perturber.losses(closure, points))
    (c,) = estimator.coefficients(losses, eps)
    dots = torch.zeros(len(blocks), dtype=torch.float64)
    if not math.isfinite(c):
        return VirtualStep(losses, c, math.nan, dots)
    step = [[-lr * c * s] for s in sigma]
    shift(blocks, draw, step)
    try:
        with torch.enable_grad(), block_dots(blocks, draw, dots):
            loss = closure()
            loss.backward()  # type: ignore[union-attr]
    finally:
        shift(blocks, draw, [[-a for a in alphas] for alphas in step])
    return VirtualStep(losses, c, float(loss.detach()), -lr * c * dots)  # type: ignore[union-attr]


class MetaTrainer:
    """Updates a tuner's PertNNs, point by point.

    Args:
        model: At the trajectory's weights whenever `update` is called.
        tuner: Whose nets are trained.
        config: Noise, eps, learning rates, draws, normalisation.
    """

    def __init__(self, model: nn.Module, tuner: Tuner, config: MetaTrainConfig) -> None:
        self.blocks = find_blocks(model, tuner.granularity)
        self._tuner, self._config = tuner, config
        self._numels = tuner.numels_for(model, self.blocks)
        self._perturber = Perturber(model, self.blocks)
        self._outer = torch.optim.Adam(tuner.bank.parameters(), lr=config.outer_lr)
        self._loss_prev = (0.0, 0.0)
        self._sigma_prev = torch.ones(len(self.blocks))

    def update(self, closure: Closure, *, number: int, position: int) -> dict[str, Any]:
        """One outer step at the model's present weights.

        Args:
            closure: The differentiable loss of the point's batch.
            number: Of the point; noise is drawn with it.
            position: 0: the trajectory begins anew, and so do the nets' inputs.

        Returns:
            What a row of metrics holds.
        """
        if position == 0:
            self._loss_prev, self._sigma_prev = (0.0, 0.0), torch.ones(len(self.blocks))
        raw, scales = self.scales()
        steps = [
            virtual_step(
                self._perturber,
                self.blocks,
                closure,
                Draw(self._config.noise, self._config.seed, number, branch),
                scales.detach(),
                eps=self._config.eps,
                lr=self._config.inner_lr,
            )
            for branch in range(self._config.draws)
        ]
        usable = [step for step in steps if step.finite]
        if usable:
            gradient = torch.stack([step.gradient for step in usable]).mean(dim=0)
            self._outer.zero_grad()
            (scales * gradient).sum().backward()
            self._outer.step()
            losses = [step.losses for step in usable]
            self._loss_prev = (_mean([a for a, _ in losses]), _mean([b for _, b in losses]))
            self._sigma_prev = raw.detach()
        log_sigma = torch.log(scales.detach().clamp_min(1e-12))
        return {
            "loss": _mean([sum(step.losses) / 2 for step in steps]),
            "meta_loss": _mean([step.meta_loss for step in steps]),
            "coefficients": [step.coefficient for step in steps],
            "sigma_min": float(scales.detach().min()),
            "sigma_max": float(scales.detach().max()),
            "sigma_log_std": float(log_sigma.std()) if len(log_sigma) > 1 else 0.0,
            "skipped": len(steps) - len(usable),
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the next outer step stands on: the nets and Adam's moments, and what the nets are told."""
        nets = {f"nets.{name}": tensor for name, tensor in self._tuner.bank.state_dict().items()}
        tensors = {**nets, **optimizer_tensors(self._outer, "outer."), "sigma_prev": self._sigma_prev}
        return tensors, {"outer": optimizer_groups(self._outer), "loss_prev": self._loss_prev}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Takes back what `state` gave."""
        self._tuner.bank.load_state_dict(under("nets.", tensors))
        restore_optimizer(self._outer, state["outer"], tensors, "outer.")
        self._sigma_prev, self._loss_prev = tensors["sigma_prev"], tuple(state["loss_prev"])

    def scales(self) -> tuple[Tensor, Tensor]:
        """(raw sigma, sigma~), both (n,), with their graph into the PertNNs."""
        features = features_of(self.blocks, self._loss_prev, self._sigma_prev.tolist())
        raw = self._tuner.bank(self._tuner.spec(features))
        return raw, normalize(raw, self._numels) if self._config.normalized else raw.double()


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
