"""MeZO and FZOO in the manner of their authors' public code: what `zotuner bench` measures our steps against.

Our own code, written from the papers' algorithms (MeZO, arXiv:2305.17333, Alg. 1; FZOO, arXiv:2506.09034, Alg. 1), with
what makes the cost of the authors' programs: noise from torch's global generator, which is seeded anew before each
walk over the weights; whole tensors of it; weights changed out of place; and noise drawn once more for the update.

    MeZO: theta + eps z, L+;  theta - 2 eps z, L-;  theta + eps z;  theta - lr c z            4 walks, 2 forwards
    FZOO: L;  N times (theta + eps u_i, L_i;  theta - eps u_i);  N times theta - lr c_i u_i  3 N walks, N + 1 forwards
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function

Closure = Callable[[], Tensor]


class _Walker(ABC):
    """The walk over all trainable weights that both methods make.

    Args:
        model: What is tuned.
        lr: Learning rate.
        eps: Size of a perturbation.
        seed: Of the seeds of the steps.
    """

    def __init__(self, model: nn.Module, lr: float, eps: float = 1e-3, seed: int = 0) -> None:
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._lr, self._eps = lr, eps
        self._seeds = np.random.default_rng(seed)

    @abstractmethod
    def _noise(self, param: Tensor) -> Tensor:
        """The noise of one weight, of its shape and type, from the global generator."""

    def _new_seed(self) -> int:
        return int(self._seeds.integers(1_000_000_000))

    def _perturb(self, seed: int, scaling: float) -> None:
        """theta = theta + scaling eps z, z drawn from the seed on."""
        with record_function("zotuner::noise"):
            torch.manual_seed(seed)
            for param in self._params:
                param.data = param.data + scaling * self._noise(param) * self._eps

    def _update(self, seed: int, coefficient: float) -> None:
        """theta = theta - lr c z, the same z drawn again."""
        with record_function("zotuner::update"):
            torch.manual_seed(seed)
            for param in self._params:
                param.data = param.data - self._lr * (coefficient * self._noise(param))


class OfficialMeZO(_Walker):
    """c = [L(theta + eps z) - L(theta - eps z)] / (2 eps);  theta <- theta - lr c z, z Gaussian."""

    def _noise(self, param: Tensor) -> Tensor:
        return torch.normal(mean=0, std=1, size=param.size(), device=param.device, dtype=param.dtype)

    @torch.no_grad()
    def step(self, closure: Closure) -> float:
        """One step; returns L+."""
        seed = self._new_seed()
        self._perturb(seed, 1)
        loss_plus = float(closure())
        self._perturb(seed, -2)
        loss_minus = float(closure())
        self._perturb(seed, 1)
        self._update(seed, (loss_plus - loss_minus) / (2 * self._eps))
        return loss_plus


class OfficialFZOO(_Walker):
    """l_i = L(theta + eps u_i), u_i of signs;  theta <- theta - lr sum_i (l_i - l_0) / (N s) u_i, s their spread.

    Args:
        model: What is tuned.
        lr: Learning rate.
        eps: Size of a perturbation.
        seed: Of the seeds of the steps.
        num_perturbations: N.
    """

    def __init__(
        self, model: nn.Module, lr: float, eps: float = 1e-3, seed: int = 0, num_perturbations: int = 8
    ) -> None:
        super().__init__(model, lr, eps, seed)
        self._num_perturbations = num_perturbations

    def _noise(self, param: Tensor) -> Tensor:
        return (torch.randint(0, 2, param.size(), device=param.device) * 2 - 1).to(param.dtype)

    @torch.no_grad()
    def step(self, closure: Closure) -> float:
        """One step; returns l_0."""
        seeds = [self._new_seed() for _ in range(self._num_perturbations)]
        base = float(closure())
        losses = [self._loss_at(seed, closure) for seed in seeds]
        spread = float(np.std(losses, ddof=1))
        for seed, loss in zip(seeds, losses, strict=True):
            self._update(seed, (loss - base) / (len(seeds) * spread) if spread > 0 else 0.0)
        return base

    def _loss_at(self, seed: int, closure: Closure) -> float:
        """L(theta + eps u); theta is then walked back."""
        self._perturb(seed, 1)
        loss = float(closure())
        self._perturb(seed, -1)
        return loss
