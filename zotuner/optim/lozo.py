"""LOZO: low-rank perturbations whose one factor stays for some steps."""

from typing import Any

from torch import nn

from zotuner.optim.base import LOW_RANK, ZOOptimizer
from zotuner.optim.estimators import TwoPoint


class LOZO(ZOOptimizer):
    """MeZO with z = U V^T / sqrt(r) in each matrix; U is drawn in each step, V every nu steps.

        c = [L(theta + eps z) - L(theta - eps z)] / (2 eps);   theta <- theta - lr c z

    The paper perturbs by eps' U V^T and steps by c' U V^T / r; with eps' = eps / sqrt(r) that is this step, for the
    same lr. (The authors' code leaves out the 1 / r of the step: its lr is smaller by r.) Vectors, such as biases, take
    plain noise, as in the authors' code. LOZO-M, its variant with momentum, is not here.

    Args:
        model: The module to tune.
        lr: Learning rate.
        eps: Size of a perturbation, an element.
        noise: "low-rank"; nothing else.
        seed: Of the noise.
        rank: r.
        factors: Distribution of U and V: "gaussian" (the paper's) or "rademacher".
        resample_every: nu.
        **options: `granularity`, and where losses are evaluated: see `ZOOptimizer`.

    Example:
        >>> opt = LOZO(model, lr=1e-6, rank=2, resample_every=50)
        >>> loss = opt.step(lambda: model(**batch).loss)

    References:
        Chen, Zhang, Cao, Yuan and Wen, "Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank
        Structures", arXiv:2410.07698, Alg. 1.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-6,
        eps: float = 1e-3,
        noise: str = LOW_RANK,
        seed: int = 0,
        *,
        rank: int = 2,
        factors: str = "gaussian",
        resample_every: int = 50,
        **options: Any,
    ) -> None:
        if noise != LOW_RANK:
            raise ValueError(f"LOZO's noise is {LOW_RANK!r}, got {noise!r}")
        super().__init__(
            model,
            lr=lr,
            eps=eps,
            noise=noise,
            seed=seed,
            estimator=TwoPoint(),
            rank=rank,
            factors=factors,
            resample_every=resample_every,
            **options,
        )
