"""MeZO-Adam (ZO-Adam): Adam on MeZO's estimate, at the cost of two numbers an element."""

from typing import Any

from torch import nn

from zotuner.optim.base import ZOOptimizer
from zotuner.optim.estimators import TwoPoint
from zotuner.optim.updates import Adam, check_decay


class MeZOAdam(ZOOptimizer):
    """Adam whose gradient is a zeroth-order estimate.

        g = c z,   c = [L(theta + eps z) - L(theta - eps z)] / (2 eps)
        m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g^2
        theta <- theta - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + 1e-8)

    This is Adam with its bias corrections. ZO-AdaMM is AMSGrad instead: it takes the largest v so far, has no
    corrections, and projects onto a feasible set; MeZO's appendix keeps no moments, but makes them again from all
    coefficients so far, which gives these very numbers at the cost of time.

    Args:
        model: The module to tune; floating-point weights.
        lr: Learning rate, about what an element moves by in a step.
        eps: Size of a perturbation.
        noise: "gaussian", "rademacher" (g^2 is then the same for all elements) or "low-rank".
        seed: Of the noise.
        momentum: beta1, in [0, 1).
        beta2: Of the second moment, in [0, 1).
        **options: `granularity`, how low-rank noise is made, and where losses are evaluated: see `ZOOptimizer`.

    Example:
        >>> opt = MeZOAdam(model, lr=1e-5)
        >>> loss = opt.step(lambda: model(**batch).loss)

    References:
        Chen et al., "ZO-AdaMM: Zeroth-Order Adaptive Momentum Method for Black-Box Optimization", arXiv:1910.06513;
        Malladi et al., arXiv:2305.17333, appendix (MeZO-Adam); Kingma and Ba, arXiv:1412.6980.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-5,
        eps: float = 1e-3,
        noise: str = "gaussian",
        seed: int = 0,
        *,
        momentum: float = 0.9,
        beta2: float = 0.999,
        **options: Any,
    ) -> None:
        check_decay(momentum=momentum, beta2=beta2)
        super().__init__(
            model,
            lr=lr,
            eps=eps,
            noise=noise,
            seed=seed,
            estimator=TwoPoint(),
            update=Adam(momentum, beta2),
            **options,
        )
