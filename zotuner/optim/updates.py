"""Updates: what a step makes of its estimate g = sum_k c_k u_k of the gradient.

Each says, as `Perturber.update` wants it, along what theta moves and how far. The first two move along the noise
itself; the others change each element by what its state says, in the same sweep:

    Plain          theta <- theta - lr g
    ScalarMoment   theta <- theta - lr g / (sqrt(vhat) + zeta), v a number
    Momentum       m <- beta m + g;   theta <- theta - lr m
    Sign           theta <- theta - lr sign(g)
    Adam           m, v <- means of g and g^2;   theta <- theta - lr mhat / (sqrt(vhat) + zeta)
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from torch import Tensor

from zotuner.perturb import Chunk, Draw, Field, Held, Move

TINY = 1e-8  # zeta, Adam's own (arXiv:1412.6980)


@dataclass(frozen=True)
class Estimate:
    """What a step found: g = sum_k coefficients[k] sigma[i] z_k in block i.

    Attributes:
        draw: z, from the estimator's first branch on.
        sigma: (n,) scale of the noise in each block.
        coefficients: Of each branch.
        losses: That they come from.
        group: The optimizer's options; numbers that an update keeps are put here.
        held: Elementwise state that it keeps.
    """

    draw: Draw
    sigma: Sequence[float]
    coefficients: tuple[float, ...]
    losses: tuple[float, ...]
    group: dict[str, Any]
    held: Held

    def gradient(self, chunk: Chunk) -> Tensor:
        """Elements of g, a new tensor."""
        return chunk.z([c * self.sigma[chunk.block] for c in self.coefficients])

    def count(self) -> int:
        """The number of this update, from 1; steps that are skipped do not count."""
        self.group["updates"] = self.group.get("updates", 0) + 1
        return int(self.group["updates"])

    def sweep(self, change: "Change") -> Move:
        """theta <- theta + change, element by element."""
        return Field(self.draw, change, self.held), [[1.0]] * len(self.sigma)


class Change(Protocol):
    """Of a chunk: what is added to its weights, a new tensor; may change the chunk's state in place, once."""

    def __call__(self, chunk: Chunk, /) -> Tensor: ...


class Update(Protocol):
    """See the module.

    Attributes:
        buffers: Elementwise state by name, and what it begins with: float32 tensors of the parameters' shapes.
    """

    buffers: ClassVar[Mapping[str, float]]

    def __call__(self, estimate: Estimate) -> Move:
        """How theta moves; called once a step that is not skipped."""
        ...


@dataclass(frozen=True)
class Plain:
    """theta <- theta - lr g."""

    buffers: ClassVar[Mapping[str, float]] = {}

    def __call__(self, estimate: Estimate) -> Move:
        """Along the noise."""
        lr = estimate.group["lr"]
        return estimate.draw, [[-lr * c * s for c in estimate.coefficients] for s in estimate.sigma]


@dataclass(frozen=True)
class ScalarMoment:
    """v <- beta2 v + (1 - beta2) mean_k(c_k)^2;   theta <- theta - lr g / (sqrt(v / (1 - beta2^t)) + zeta)."""

    beta2: float

    buffers: ClassVar[Mapping[str, float]] = {}

    def __call__(self, estimate: Estimate) -> Move:
        """Along the noise."""
        group, t = estimate.group, estimate.count()
        mean = statistics.fmean(estimate.coefficients)
        group["second_moment"] = self.beta2 * group.get("second_moment", 0.0) + (1 - self.beta2) * mean**2
        scale = 1 / (math.sqrt(group["second_moment"] / (1 - self.beta2**t)) + TINY)
        return Plain()(replace(estimate, coefficients=tuple(c * scale for c in estimate.coefficients)))


@dataclass(frozen=True)
class Momentum:
    """m <- beta m + g;   theta <- theta - lr m."""

    beta: float

    buffers: ClassVar[Mapping[str, float]] = {"momentum": 0.0}

    def __call__(self, estimate: Estimate) -> Move:
        """Elementwise."""

        def change(chunk: Chunk) -> Tensor:
            m = chunk.held["momentum"].mul_(self.beta).add_(estimate.gradient(chunk))
            return m.mul(-estimate.group["lr"])

        return estimate.sweep(change)


@dataclass(frozen=True)
class Sign:
    """theta <- theta - lr sign(g)."""

    buffers: ClassVar[Mapping[str, float]] = {}

    def __call__(self, estimate: Estimate) -> Move:
        """Elementwise."""
        return estimate.sweep(lambda chunk: estimate.gradient(chunk).sign_().mul_(-estimate.group["lr"]))


@dataclass(frozen=True)
class Adam:
    """m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g^2;   both divided by 1 - beta^t in the step."""

    beta1: float
    beta2: float

    buffers: ClassVar[Mapping[str, float]] = {"first_moment": 0.0, "second_moment": 0.0}

    def __call__(self, estimate: Estimate) -> Move:
        """Elementwise."""
        t = estimate.count()
        size, root = -estimate.group["lr"] / (1 - self.beta1**t), math.sqrt(1 - self.beta2**t)

        def change(chunk: Chunk) -> Tensor:
            g = estimate.gradient(chunk)
            m = chunk.held["first_moment"].mul_(self.beta1).add_(g.mul(1 - self.beta1))
            v = chunk.held["second_moment"].mul_(self.beta2).add_(g.square_().mul_(1 - self.beta2))
            return m.mul(size).div_(v.sqrt().div_(root).add_(TINY))

        return estimate.sweep(change)


def check_decay(**given: float) -> None:
    """Raises `ValueError` unless each is in [0, 1)."""
    for name, value in given.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
