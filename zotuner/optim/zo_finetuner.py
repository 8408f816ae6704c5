"""ZO Fine-tuner: the scale of the noise in each block comes from a frozen, meta-trained PertNN."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from zotuner.blocks import Block, moments
from zotuner.optim.base import Estimator, ZOOptimizer
from zotuner.optim.estimators import TwoPoint
from zotuner.pertnn import normalize
from zotuner.perturb import spread
from zotuner.tuner import Tuner


def features_of(
    blocks: Sequence[Block],
    loss_prev: tuple[float, float],
    sigma_prev: Sequence[float],
    known: Sequence[tuple[float, float]] | None = None,
) -> Tensor:
    """What the PertNNs are told: (n, 5) float32, in the order of `zotuner.pertnn.FEATURES`.

    Args:
        blocks: The model's blocks.
        loss_prev: loss_plus and loss_minus of the step before, 0 at the first.
        sigma_prev: (n,) raw scales of the step before, 1 at the first.
        known: Mean and variance of each block, where somebody has taken them; None: they are taken now.
    """
    with record_function("zotuner::statistics"):
        found = spread(moments, blocks, [block.numel for block in blocks]) if known is None else known
        rows = [(*loss_prev, sigma, *pair) for pair, sigma in zip(found, sigma_prev, strict=True)]
    return torch.tensor(rows, dtype=torch.float32)


class Learned:
    """sigma from a tuner, told the losses, scales and weights of the moment.

    Args:
        tuner: Frozen.
        model: The module to tune.
        blocks: Of the model; each, or what it was added to, must be one of the tuner's.
        normalized: Keep the Frobenius budget.
    """

    def __init__(self, tuner: Tuner, model: nn.Module, blocks: Sequence[Block], normalized: bool = True) -> None:
        self._tuner = tuner
        self._hosts = tuner.hosts_for(model, blocks)
        self._nets = tuner.nets_for(self._hosts)
        self._numels = tuner.numels_for(model, blocks)
        self._normalized = normalized
        self._stored = list(dict.fromkeys(t for block in self._hosts for piece in block.pieces for t in piece.stored))
        self._known: list[tuple[float, float]] = []  # moments of the hosts, after the last update
        self._versions: list[int] = []  # of what is stored, then
        self._moving = self._hosts == tuple(blocks)
        if not self._moving:  # what an adapter was added to stays as it is
            self._known, self._versions = [moments(host) for host in self._hosts], self._now()

    def scales(self, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(raw sigma, sigma~), both (n,); the step before and the first loss are read from `state`."""
        sigma_prev = state.get("sigma_prev", [1.0] * len(self._hosts))
        known = self._known if self._versions == self._now() else None
        features = features_of(self._hosts, state.get("loss_prev", (0.0, 0.0)), sigma_prev, known)
        with record_function("zotuner::pertnn"):
            raw = self._tuner.scales(features, self._nets, state.get("loss_start"))
        return raw, normalize(raw, self._numels) if self._normalized else raw.double()

    def moved(self, moments: list[tuple[float, float]]) -> None:
        """Keeps the moments that an update has taken of the blocks, until somebody else writes to the weights."""
        if self._moving:
            self._known, self._versions = moments, self._now()

    def _now(self) -> list[int]:
        """How often torch has seen each tensor change (not through `.data`, and not at all in inference mode)."""
        return [tensor._version for tensor in self._stored]


class ZOFineTuner(ZOOptimizer):
    """MeZO with learned, block-wise perturbation scales.

        sigma_i = PertNN_i(loss_plus, loss_minus, sigma_prev_i, mean(theta_i), var(theta_i))
        u_i = sigma~_i z_i;   c = [L(theta + eps u) - L(theta - eps u)] / (2 eps);   theta <- theta - lr c u

    With sigma = 1 everywhere it is MeZO, bit for bit.

    Args:
        model: The module to tune; each of its blocks must be known to the tuner, by name and size. A LoRA or IA3 takes
            the scales of what it adapts, by the statistics of that.
        tuner: `zotuner.Tuner.from_pretrained(...)`.
        lr: Learning rate; the normalisation lets MeZO's carry over.
        eps: Size of a perturbation.
        noise: "gaussian" (the paper's), "rademacher" or "low-rank".
        seed: Of the noise.
        normalized: sigma~ = sigma sqrt(d / sum_j d_j sigma_j^2); without it sigma~ = sigma. None: as the
            tuner was trained.
        estimator: `TwoPoint()`, or `OneSided(N)` for FZOO's estimator with learned scales.
        **options: How low-rank noise is made, and where losses are evaluated: see `ZOOptimizer`.

    Raises:
        ZotunerError: The tuner was made for other blocks; names the first that differ.

    Example:
        >>> tuner = zotuner.Tuner.from_pretrained("tuners/smollm2-135m-instruct")
        >>> opt = ZOFineTuner(model, tuner, lr=1e-6)
        >>> loss = opt.step(lambda: model(**batch).loss)

    References:
        Zhang et al., "Learning a Zeroth-Order Optimizer for Fine-Tuning LLMs", arXiv:2510.00419.
    """

    def __init__(
        self,
        model: nn.Module,
        tuner: Tuner,
        lr: float = 1e-6,
        eps: float = 1e-3,
        noise: str = "gaussian",
        seed: int = 0,
        *,
        normalized: bool | None = None,
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
            scale=lambda blocks: Learned(
                tuner, model, blocks, tuner.info.normalized if normalized is None else normalized
            ),
            granularity=tuner.granularity,
            **options,
        )
