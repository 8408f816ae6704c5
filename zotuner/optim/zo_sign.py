"""ZO-signSGD: of the estimate, only the signs are used."""

from typing import Any

from torch import nn

from zotuner.optim.base import Estimator, ZOOptimizer
from zotuner.optim.estimators import TwoPoint
from zotuner.optim.updates import Sign


class ZOSign(ZOOptimizer):
    """Zeroth-order sign descent: each element moves by lr.

        c = [L(theta + eps z) - L(theta - eps z)] / (2 eps);   theta <- theta - lr sign(c z)

    With `OneSided(N)`, g is proportional to the mean over N perturbations of (l_i - l_0) u_i, the paper's estimate from
    forward differences: the factor 1 / s of that estimator leaves every sign as it is.

    Args:
        model: The module to tune.
        lr: What each element moves by.
        eps: Size of a perturbation.
        noise: "gaussian", "rademacher" or "low-rank"; with rademacher, sign(c z) is sign(c) z.
        seed: Of the noise.
        estimator: `TwoPoint()`, or `OneSided(N)`.
        **options: `granularity`, how low-rank noise is made, and where losses are evaluated: see `ZOOptimizer`.

    Example:
        >>> opt = ZOSign(model, lr=1e-6)
        >>> loss = opt.step(lambda: model(**batch).loss)

    References:
        Liu, Chen, Chen and Hong, "signSGD via Zeroth-Order Oracle", ICLR 2019, Alg. 1.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-6,
        eps: float = 1e-3,
        noise: str = "gaussian",
        seed: int = 0,
        *,
        estimator: Estimator | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            lr=lr,
            eps=eps,
            noise=noise,
            seed=seed,
            estimator=estimator or TwoPoint(),
            update=Sign(),
            **options,
        )
