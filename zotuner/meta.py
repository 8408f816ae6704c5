"""Meta-training: learns PertNNs from virtual zeroth-order steps along a first-order trajectory.

    point theta_0  ->  features -> sigma~  ->  c from L(theta_0 +- eps u)  ->  theta_1 = theta_0 - lr_inner c u
                   ->  one backward at theta_1, dot by dot  ->  d meta-loss / d sigma~  ->  PertNNs (Adam)

Source: ZO Fine-tuner, arXiv:2510.00419. With z and c held fixed,

    dL(theta_1) / d sigma~_i = -lr_inner c <grad_i L(theta_1), z_i>

so there is no graph over the parameters and no copy of the model, and a gradient is freed once its dot is taken.
The other meta-loss, the expected gain of a step, is in `zotuner.expected`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from zotuner.block_types import block_types
from zotuner.blocks import Block, find_blocks, pieces_of
from zotuner.config import MetaTrainConfig
from zotuner.expected import Loss, Profiles, Remembered, gain, minus_log_gain, profile
from zotuner.gradients import block_dots
from zotuner.optim.estimators import TwoPoint
from zotuner.optim.zo_finetuner import features_of
from zotuner.pertnn import normalize
from zotuner.perturb import Draw, Perturbation, Perturber, shifted
from zotuner.snapshot import (
    optimizer_groups,
    optimizer_tensors,
    restore_optimizer,
)
from zotuner.tuner import Tuner

TOGETHER = 8  # points an outer step of the expected meta-loss


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


@dataclass(frozen=True)
class _Told:
    """What the nets are told of the last point of a task.

    Attributes:
        losses: Of it; 0 at the first.
        sigma: (n,) raw scales there; 1 at the first.
        start: The loss at the task's first point since the model began anew; None: this is the first.
    """

    losses: tuple[float, float]
    sigma: Tensor
    start: float | None


class _Visited(NamedTuple):
    """A point whose signal is known.

    Attributes:
        inputs: (n, 5) what the nets saw.
        own: (3, n) of `Profiles.add`.
        phase: Which profiles it belongs to.
    """

    inputs: Tensor
    own: Tensor
    phase: str


@dataclass(frozen=True)
class _Found:
    """What a meta-loss says at a point.

    Attributes:
        row: Of metrics.
        gradient: (n,) float64, by each sigma~; None: nothing is to be learned by it.
        losses: What the nets are told at the next point; None: as at this.
    """

    row: dict[str, Any]
    gradient: Tensor | None
    losses: tuple[float, float] | None


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
        losses = tuple(perturber.losses(closure, points))
    (c,) = estimator.coefficients(losses, eps)
    dots = torch.zeros(len(blocks), dtype=torch.float64)
    if not math.isfinite(c):
        return VirtualStep(losses, c, math.nan, dots)
    step = [[-lr * c * s] for s in sigma]
    with shifted(blocks, draw, step), torch.enable_grad(), block_dots(blocks, draw, dots):
        loss = (judge or closure)()
        loss.backward()
    return VirtualStep(losses, c, float(loss.detach()), -lr * c * dots)


class MetaTrainer:
    """Updates a tuner's PertNNs, point by point.

    Args:
        model: At the trajectory's weights whenever `update` is called.
        tuner: Whose nets are trained.
        config: Noise, eps, learning rates, draws, normalisation.
    """

    def __init__(self, model: nn.Module, tuner: Tuner, config: MetaTrainConfig) -> None:
        self.blocks = find_blocks(model, tuner.granularity)
        self._pieces = list(pieces_of(self.blocks))
        self._tuner, self._config = tuner, config
        self._numels = tuner.numels_for(model, self.blocks)
        self._perturber = Perturber(model, self.blocks)
        self._outer = torch.optim.Adam(tuner.bank.parameters(), lr=config.outer_lr)
        self._told: dict[str, _Told] = {}  # of each task
        self._profiles: dict[str, Profiles] = {}  # of each task, before and after it has settled
        self._visited: list[_Visited] = []
        self._remembered: dict[str, Remembered] = {}  # of each task, since the model began anew
        self._types = block_types([block.name for block in self.blocks])

    def update(
        self,
        closure: Loss,
        *,
        other: Loss,
        centred: Loss | None,
        examples: int,
        number: int,
        position: int,
        task: str,
    ) -> dict[str, Any]:
        """One outer step at the model's present weights.

        Args:
            closure: The differentiable loss of the point's batch.
            other: That of another batch: the sampled meta-loss asks it if `second_batch` is set.
            centred: That of the batch without what its examples share, asked by the expected meta-loss once
                `settle` points have passed; None: there is none.
            examples: In the batch.
            number: Of the point; noise is drawn with it.
            position: 0: the trajectory begins anew, and so do the nets' inputs.
            task: Of the point: the nets are told of the last point of the same.

        Returns:
            What a row of metrics holds.
        """
        if position == 0:
            self._told.clear()
        if position in (0, self._config.settle):
            self._remembered.clear()
        raw, scales = self.scales(task)
        if self._config.meta_loss == "expected":
            phase = "settled" if position >= self._config.settle else "settling"
            centred = centred if phase == "settled" else None
            found = self._expected(closure, centred, examples, scales.detach(), task, f"{task} {phase}")
            self._learn(number)
        else:
            found = self._sampled(closure, other if self._config.second_batch else None, number, scales.detach())
        if found.gradient is not None:
            self._descend((scales * found.gradient).sum())
        if found.losses is not None:
            start = self._of(task).start
            start = sum(found.losses) / 2 if start is None else start
            self._told[task] = _Told(found.losses, raw.detach(), start)
        return found.row | self._spread(scales.detach())

    def _descend(self, objective: Tensor) -> None:
        self._outer.zero_grad()
        objective.backward()
        self._outer.step()

    def _sampled(self, closure: Loss, judge: Loss | None, number: int, scales: Tensor) -> _Found:
        """The loss after a virtual step, averaged over draws."""
        lr = self._inner_lr(number)
        draws = [Draw(self._config.noise, self._config.seed, number, k) for k in range(self._config.draws)]
        steps = [
            virtual_step(self._perturber, self.blocks, closure, draw, scales, eps=self._config.eps, lr=lr, judge=judge)
            for draw in draws
        ]
        row = {
            "loss": _mean([sum(step.losses) / 2 for step in steps]),
            "meta_loss": _mean([step.meta_loss for step in steps]),
            "coefficients": [step.coefficient for step in steps],
        }
        usable = [step for step in steps if step.finite]
        row["skipped"] = len(steps) - len(usable)
        if not usable:
            return _Found(row, None, None)
        losses = (_mean([step.losses[0] for step in usable]), _mean([step.losses[1] for step in usable]))
        return _Found(row, torch.stack([step.gradient for step in usable]).mean(dim=0), losses)

    def _expected(
        self, closure: Loss, centred: Loss | None, examples: int, scales: Tensor, task: str, phase: str
    ) -> _Found:
        """The loss after a step at its best lr, averaged over noise; the losses told are that of the point."""
        remembered = self._remembered.setdefault(task, Remembered())
        point = profile(self.blocks, closure, centred, remembered, examples=examples)
        row: dict[str, Any] = {"loss": point.loss, "meta_loss": math.nan, "coefficients": [], "gain": math.nan}
        if not point.finite:
            del self._remembered[task]  # it met a gradient that is not
            return _Found(row | {"skipped": self._config.draws}, None, None)
        row["skipped"], losses = 0, (point.loss, point.loss)
        if point.signal is None:
            return _Found(row, None, losses)
        profiles = self._profiles.setdefault(phase, Profiles())
        self._visited.append(_Visited(self._inputs(task), profiles.add(point), phase))
        reached = gain(profiles.means, scales)
        row["meta_loss"] = point.loss - reached
        row["gain"] = reached / gain(profiles.means, torch.ones_like(scales))
        return _Found(row, None, losses)

    def _learn(self, number: int) -> None:
        """Outer steps on points visited so far: what they say does not depend on the nets."""
        random = np.random.default_rng((self._config.seed, number, 3))
        of_phase = {phase: profiles.means for phase, profiles in self._profiles.items()}
        for _ in range(self._config.outer_steps if self._visited else 0):
            chosen = [self._visited[i] for i in random.integers(len(self._visited), size=TOGETHER)]
            inputs, own = torch.stack([x.inputs for x in chosen]), torch.stack([x.own for x in chosen])
            means = torch.stack([of_phase[x.phase] for x in chosen])
            objective = minus_log_gain(own, means, self._normalized(self._tuner.bank(inputs)))
            if objective is not None:
                self._descend(objective)

    def _inner_lr(self, number: int) -> float:
        """The lr of a point's virtual steps, uniform in its logarithm."""
        width = math.log(self._config.inner_lr_range)
        return self._config.inner_lr * math.exp(width * (2 * _uniform(self._config.seed, number) - 1))

    def _spread(self, scales: Tensor) -> dict[str, Any]:
        """How sigma~ differs between blocks."""
        logs = torch.log(scales.clamp_min(1e-12))
        types = {label: math.exp(float(logs[members].mean())) for label, members in self._types.items()}
        return {
            "sigma_min": float(scales.min()),
            "sigma_max": float(scales.max()),
            "sigma_log_std": float(logs.std()) if len(logs) > 1 else 0.0,
            "sigma_types": types,
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the next outer step stands on: the nets and Adam's moments, and what the nets are told."""
        nets = {f"nets.{name}": tensor for name, tensor in self.nets().items()}
        told = {f"told.{task}": told.sigma for task, told in self._told.items()}
        tensors = {**nets, **optimizer_tensors(self._outer, "outer."), **told}
        tensors |= {f"profiles.{phase}": p.sums for phase, p in self._profiles.items() if p.sums is not None}
        if self._visited:
            tensors["visited.inputs"] = torch.stack([x.inputs for x in self._visited])
            tensors["visited.own"] = torch.stack([x.own for x in self._visited])
        for task, remembered in self._remembered.items():
            tensors |= {f"remembered.{task}.{k}": remembered.means[piece] for k, (_, piece) in enumerate(self._pieces)}
        numbers = {
            "told": {task: [*told.losses, told.start] for task, told in self._told.items()},
            "profiles": {phase: p.count for phase, p in self._profiles.items()},
            "visited": [x.phase for x in self._visited],
            "remembered": {task: r.weight for task, r in self._remembered.items()},
        }
        return tensors, {"outer": optimizer_groups(self._outer), **numbers}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Takes back what `state` gave."""
        self.take_nets(under("nets.", tensors))
        restore_optimizer(self._outer, state["outer"], tensors, "outer.")
        sigmas = under("told.", tensors)
        self._told = {
            task: _Told((plus, minus), sigmas[task], start) for task, (plus, minus, start) in state["told"].items()
        }
        sums, visited = under("profiles.", tensors), under("visited.", tensors)
        self._profiles = {phase: Profiles(sums[phase], count) for phase, count in state["profiles"].items()}
        self._visited = [
            _Visited(visited["inputs"][k], visited["own"][k], phase) for k, phase in enumerate(state["visited"])
        ]
        for task, weight in state["remembered"].items():
            kept = under(f"remembered.{task}.", tensors)
            # clones lie where torch aligns memory, on which a product's last bits depend; a file's tensors need not
            means = {piece: kept[str(k)].clone() for k, (_, piece) in enumerate(self._pieces)}
            self._remembered[task] = Remembered(means, weight)

    def nets(self) -> dict[str, Tensor]:
        """A copy of the nets as they are."""
        return {name: tensor.clone() for name, tensor in self._tuner.bank.state_dict().items()}

    def take_nets(self, nets: dict[str, Tensor]) -> None:
        """Takes back what `nets` gave."""
        self._tuner.bank.load_state_dict(nets)

    def scales(self, task: str) -> tuple[Tensor, Tensor]:
        """(raw sigma, sigma~), both (n,), for the next point of a task, with their graph into the PertNNs."""
        raw = self._tuner.bank(self._inputs(task))
        return raw, self._normalized(raw)

    def _inputs(self, task: str) -> Tensor:
        """(n, 5): what the nets see at the next point of a task."""
        told = self._of(task)
        return self._tuner.spec(features_of(self.blocks, told.losses, told.sigma.tolist()), told.start)

    def _normalized(self, raw: Tensor) -> Tensor:
        return normalize(raw, self._numels) if self._config.normalized else raw.double()

    def _of(self, task: str) -> _Told:
        return self._told.get(task, _Told((0.0, 0.0), torch.ones(len(self.blocks)), None))


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _uniform(seed: int, number: int) -> float:
    """In [0, 1): a function of these two."""
    return float(np.random.default_rng((seed, number, 2)).random())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
