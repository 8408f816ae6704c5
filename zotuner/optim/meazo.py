"""MEAZO: Adam's step size without Adam's memory, by one number for the whole model."""

from typing import Any

from torch import nn

from zotuner.optim.base import ZOOptimizer
from zotuner.optim.estimators import TwoPoint
from zotuner.optim.updates import ScalarMoment, check_decay


class MEAZO(ZOOptimizer):
    """MeZO divided by the running root mean square of its projected gradient.

        c_t = [L(theta + eps z) - L(theta - eps z)] / (2 eps);   v_t = beta v_{t-1} + (1 - beta) c_t^2
        theta <- theta - lr c_t / (sqrt(v_t / (1 - beta^t)) + 1e-8) z

    t counts from 1, with v_0 = 0; the first step is thus lr sign(c) z. (The paper's index of the correction is one
    lower, its v begins one later.)

    Args:
        model: The module to tune.
        lr: Learning rate, about what an element moves by in a step.
        eps: Size of a perturbation.
        noise: "gaussian", "rademacher" or "low-rank".
        seed: Of the noise.
        beta2: beta, in [0, 1); Adam's, since the paper compares with Adam.
        **options: `granularity`, how low-rank noise is made, and where losses are evaluated: see `ZOOptimizer`.

    Example:
        >>> opt = MEAZO(model, lr=1e-5)
        >>> loss = opt.step(lambda: model(**batch).loss)

    References:
        Dbouk, Gazagnadou, Reisser and Louizos, "On Adaptivity in Zeroth-Order Optimization", arXiv:2605.03869.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-5,
        eps: float = 1e-3,
        noise: str = "gaussian",
        seed: int = 0,
        *,
        beta2: float = 0.999,
        **options: Any,
    ) -> None:
        check_decay(beta2=beta2)
        super().__init__(
            model,
            lr=lr,
            eps=eps,
            noise=noise,
            seed=seed,
            estimator=TwoPoint(),
            update=ScalarMoment(beta2),
            **options,
        )
