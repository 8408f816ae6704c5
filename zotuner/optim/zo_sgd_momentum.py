"""ZO-SGD with momentum: MeZO's estimate, averaged over steps at the cost of a number an element."""

from typing import Any

from torch import nn

from zotuner.optim.base import ZOOptimizer
from zotuner.optim.estimators import TwoPoint
from zotuner.optim.updates import Momentum, check_decay


class ZOSGDMomentum(ZOOptimizer):
    """Zeroth-order SGD with heavy-ball momentum, as `torch.optim.SGD` has it.

        c = [L(theta + eps z) - L(theta - eps z)] / (2 eps);   m <- beta m + c z;   theta <- theta - lr m

    A step moves as far in the end as one of MeZO whose lr is larger by 1 / (1 - beta).

    Args:
        model: The module to tune; floating-point weights.
        lr: Learning rate.
        eps: Size of a perturbation.
        noise: "gaussian", "rademacher" or "low-rank".
        seed: Of the noise.
        momentum: beta, in [0, 1); 0 is MeZO.
        **options: `granularity`, how low-rank noise is made, and where losses are evaluated: see `ZOOptimizer`.

    Example:
        >>> opt = ZOSGDMomentum(model, lr=1e-7)
        >>> loss = opt.step(lambda: model(**batch).loss)

    References:
        Polyak, "Some methods of speeding up the convergence of iteration methods", 1964; for language models the
        baseline "MeZO-momentum" of Malladi et al., arXiv:2305.17333.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-7,
        eps: float = 1e-3,
        noise: str = "gaussian",
        seed: int = 0,
        *,
        momentum: float = 0.9,
        **options: Any,
    ) -> None:
        check_decay(momentum=momentum)
        super().__init__(
            model,
            lr=lr,
            eps=eps,
            noise=noise,
            seed=seed,
            estimator=TwoPoint(),
            update=Momentum(momentum),
            **options,
        )
