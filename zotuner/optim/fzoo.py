"""FZOO: many one-sided sign perturbations a step, the step normalised by the spread of their losses."""

from typing import Any

from torch import nn

from zotuner.optim.base import ZOOptimizer
from zotuner.optim.estimators import OneSided


class FZOO(ZOOptimizer):
    """Fast zeroth-order optimizer.

        l_0 = L(theta);   l_i = L(theta + eps u_i);   s = Std(l_1..l_N), N - 1 in the denominator
        theta <- theta - lr sum_i (l_i - l_0) / (N s) u_i

    E[s^2] = eps^2 |grad L|^2 + O(eps^3), so the step is that of normalised SGD. The authors' code takes the population
    standard deviation: an lr larger by sqrt(N / (N - 1)) there gives the same step.

    Args:
        model: The module to tune.
        lr: Learning rate.
        eps: Size of a perturbation.
        num_perturbations: N, at least 2; a step costs N + 1 forwards.
        noise: "rademacher" (the paper's), "gaussian" or "low-rank".
        seed: Of the noise.
        **options: `granularity`, how low-rank noise is made, and where losses are evaluated: see `ZOOptimizer`.

    Example:
        >>> opt = FZOO(model, lr=1e-4, num_perturbations=8)
        >>> loss = opt.step(lambda: model(**batch).loss)

    References:
        Dang et al., "FZOO: Fast Zeroth-Order Optimizer for Fine-Tuning Large Language Models towards Adam-Scale
        Speed", arXiv:2506.09034, Alg. 1.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-4,
        eps: float = 1e-3,
        num_perturbations: int = 8,
        noise: str = "rademacher",
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            lr=lr,
            eps=eps,
            noise=noise,
            seed=seed,
            estimator=OneSided(num_perturbations),
            **options,
        )
