"""HiZOO: perturbations shaped by an estimate of the Hessian's diagonal, which a third loss pays for."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from zotuner.optim.base import ZOOptimizer
from zotuner.optim.estimators import ThreePoint
from zotuner.optim.updates import Estimate
from zotuner.perturb import Chunk, Direction, Draw, Field, Move


@dataclass(frozen=True)
class Curved:
    """The update of `HiZOO`: first of h, then of theta along z / sqrt(h)."""

    smooth: float

    buffers: ClassVar[Mapping[str, float]] = {"hessian": 1.0}

    def __call__(self, estimate: Estimate) -> Move:
        """Elementwise."""
        group, (c,), (base, plus, minus) = estimate.group, estimate.coefficients, estimate.losses
        curvature = abs(plus + minus - 2 * base) / (2 * group["eps"] ** 2)

        def change(chunk: Chunk) -> Tensor:
            z, h = chunk.z([1.0]), chunk.held["hessian"]
            h.mul_(z.square().mul_(self.smooth * curvature).add_(1 - self.smooth))
            return z.div_(h.sqrt()).mul_(-group["lr"] * c)

        return estimate.sweep(change)


def along(chunk: Chunk) -> Tensor:
    """u = z / sqrt(h)."""
    return chunk.z([1.0]).div_(chunk.held["hessian"].sqrt())


class HiZOO(ZOOptimizer):
    """Zeroth-order descent informed by the Hessian's diagonal, of which it keeps an estimate h = 1 / Sigma, from 1 on.

        l_0 = L(theta);   l+- = L(theta +- eps u),  u = Sigma^{1/2} z;   c = (l+ - l-) / (2 eps)
        h <- (1 - alpha) h + alpha |l+ + l- - 2 l_0| / (2 eps^2) h z^2
        theta <- theta - lr c Sigma^{1/2} z,  with the new Sigma

    This is the paper's. Where it writes Sigma^{-1}, the authors' code has one matrix H that takes Sigma's place in the
    perturbation and 1 / Sigma's in the running mean, so that there noise grows where the curvature is large.

    Args:
        model: The module to tune; floating-point weights.
        lr: Learning rate; MeZO's, as long as h is near 1.
        eps: Size of a perturbation.
        noise: "gaussian"; with signs, z^2 = 1 would tell nothing of single elements.
        seed: Of the noise.
        smooth: alpha, in [0, 1); 0 is MeZO, at three forwards. The authors choose it by model (1e-8 for OPT-13B); at
            the curvature of 1e3 that SmolLM2-135M has along z, 1e-6 lets h change by 1e-3 a step.
        **options: `granularity`, and where losses are evaluated: see `ZOOptimizer`.

    Example:
        >>> opt = HiZOO(model, lr=1e-6)
        >>> loss = opt.step(lambda: model(**batch).loss)

    References:
        Zhao et al., "Second-Order Fine-Tuning without Pain for LLMs: A Hessian Informed Zeroth-Order Optimizer",
        arXiv:2402.15173, Alg. 1.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-6,
        eps: float = 1e-3,
        noise: str = "gaussian",
        seed: int = 0,
        *,
        smooth: float = 1e-6,
        **options: Any,
    ) -> None:
        if noise != "gaussian":
            raise ValueError(f"HiZOO's noise is 'gaussian', got {noise!r}")
        if not (math.isfinite(smooth) and 0 <= smooth < 1):
            raise ValueError(f"smooth must be at least 0 and below 1, got {smooth}")
        super().__init__(
            model,
            lr=lr,
            eps=eps,
            noise=noise,
            seed=seed,
            estimator=ThreePoint(),
            update=Curved(smooth),
            **options,
        )

    def _direction(self, draw: Draw) -> Direction:
        return Field(draw, along, self._held)
