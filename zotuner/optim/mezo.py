"""MeZO: the baseline. One two-point estimate a step, the same noise scale in every block."""

from typing import Any

from torch import nn

from zotuner.optim.base import ZOOptimizer
from zotuner.optim.estimators import TwoPoint


class MeZO(ZOOptimizer):
    """Memory-efficient zeroth-order SGD.

        c = [L(theta + eps z) - L(theta - eps z)] / (2 eps);   theta <- theta - lr c z

    Args:
        model: The module to tune.
        lr: Learning rate.
        eps: Size of a perturbation.
        noise: "gaussian" (the paper's), "rademacher" or "low-rank".
        seed: Of the noise.
        **options: `granularity`, how low-rank noise is made, and where losses are evaluated: see `ZOOptimizer`.

    Example:
        >>> opt = MeZO(model, lr=1e-6)
        >>> loss = opt.step(lambda: model(**batch).loss)

    References:
        Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", arXiv:2305.17333, Alg. 1.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-6,
        eps: float = 1e-3,
        noise: str = "gaussian",
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            lr=lr,
            eps=eps,
            noise=noise,
            seed=seed,
            estimator=TwoPoint(),
            **options,
        )
