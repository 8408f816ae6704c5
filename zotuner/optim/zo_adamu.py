"""ZO-AdaMU: the perturbation itself has momentum, and an uncertainty that shrinks in the course of a run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from zotuner.optim.base import ZOOptimizer
from zotuner.optim.estimators import TwoPoint
from zotuner.optim.updates import TINY, Estimate
from zotuner.perturb import Chunk, Direction, Draw, Field, Move

FIRST, SECOND = 0.05, 0.8  # shares of a run where annealing begins (the authors': step 1,024 of 20,000) and ends
SPEEDS = {"alpha": 1.0, "beta1": 0.1, "beta2": 1.5}  # phi, the authors'


def annealed(step: int, total: int, phi: float) -> float:
    """1 in the first phase, on a cosine in the second, of which phi sets the speed, and as it ended in the third.

        (1 + cos(pi (t - T1) / (T - phi (T - T2) (t - T1) / (T2 - T1)))) / 2,   t within [T1, T2]

    Args:
        step: Number of the step, t.
        total: Steps of the run, T; T1 and T2 are `FIRST` and `SECOND` of it.
        phi: Speed.
    """
    passed = min(max(step / total, FIRST), SECOND) - FIRST
    return (1 + math.cos(math.pi * passed / (1 - phi * (1 - SECOND) * passed / (SECOND - FIRST)))) / 2


@dataclass(frozen=True)
class Mixed:
    """What the noise of a step is mixed by: alpha, beta1, beta2."""

    alpha: float
    beta1: float
    beta2: float

    def parts(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """z' ~ N(0, alpha) from branch 0, and z'' ~ N(m, 1 - alpha) from branch 1."""
        return chunk.z([self.alpha**0.5]), chunk.z([(1 - self.alpha) ** 0.5], branch=1).add_(chunk.held["momentum"])

    def __call__(self, chunk: Chunk) -> Tensor:
        """u = beta1 z' + (1 - beta1) z''."""
        return self.mean(*self.parts(chunk))

    def mean(self, fresh: Tensor, led: Tensor) -> Tensor:
        """beta1 z' + (1 - beta1) z''."""
        return fresh.mul(self.beta1).add_(led.mul(1 - self.beta1))

    def square(self, fresh: Tensor, led: Tensor) -> Tensor:
        """beta2 z'^2 + (1 - beta2) z''^2."""
        return fresh.square().mul_(self.beta2).add_(led.square().mul_(1 - self.beta2))


@dataclass(frozen=True)
class Led:
    """The update of `ZOAdaMU`: along the perturbation, which becomes the momentum of the next."""

    total_steps: int

    buffers: ClassVar[Mapping[str, float]] = {"momentum": 0.0}

    def mixed(self, step: int) -> Mixed:
        """How a step's noise is mixed."""
        return Mixed(**{name: annealed(step, self.total_steps, phi) for name, phi in SPEEDS.items()})

    def __call__(self, estimate: Estimate) -> Move:
        """Elementwise."""
        mixed, (c,), lr = self.mixed(estimate.draw.step), estimate.coefficients, estimate.group["lr"]

        def change(chunk: Chunk) -> Tensor:
            parts = mixed.parts(chunk)
            u = chunk.held["momentum"].copy_(mixed.mean(*parts))
            return u.mul(-lr * c).div_(mixed.square(*parts).add_(TINY).sqrt_())

        return estimate.sweep(change)


class ZOAdaMU(ZOOptimizer):
    """Adaptive perturbation: with momentum, and with uncertainty alpha that is annealed over a run.

        z' ~ N(0, alpha);   z'' ~ N(m, 1 - alpha)
        u = beta1 z' + (1 - beta1) z'';   v = beta2 z'^2 + (1 - beta2) z''^2
        c = [L(theta + eps u) - L(theta - eps u)] / (2 eps);   theta <- theta - lr c u / sqrt(v + 1e-8);   m <- u

    alpha, beta1 and beta2 go from 1 along a cosine, each at a speed of its own (`annealed`); in the first phase u is
    plain noise. These are the paper's equations, but for the root, which is of v as in the authors' code (the paper has
    v^2 there). Further differences of that code, which are not followed: it evaluates losses along 0.1 z' + 0.9 z'',
    with other weights than the step's; it keeps sign(c) u; and its three annealings share one counter.

    Args:
        model: The module to tune; floating-point weights.
        lr: Learning rate.
        eps: Size of a perturbation.
        noise: "gaussian"; nothing else.
        seed: Of the noise.
        total_steps: Of the run, over which is annealed; the paper's runs have 20,000.
        **options: `granularity`, and where losses are evaluated: see `ZOOptimizer`.

    Example:
        >>> opt = ZOAdaMU(model, lr=1e-6, total_steps=1000)
        >>> loss = opt.step(lambda: model(**batch).loss)

    References:
        Jiang et al., "ZO-AdaMU Optimizer: Adapting Perturbation by the Momentum and Uncertainty in Zeroth-order
        Optimization", AAAI 2024, arXiv:2312.15184.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-6,
        eps: float = 1e-3,
        noise: str = "gaussian",
        seed: int = 0,
        *,
        total_steps: int = 20_000,
        **options: Any,
    ) -> None:
        if noise != "gaussian":
            raise ValueError(f"ZOAdaMU's noise is 'gaussian', got {noise!r}")
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        self._led = Led(total_steps)
        super().__init__(
            model,
            lr=lr,
            eps=eps,
            noise=noise,
            seed=seed,
            estimator=TwoPoint(),
            update=self._led,
            **options,
        )

    def _direction(self, draw: Draw) -> Direction:
        return Field(draw, self._led.mixed(draw.step), self._held)
