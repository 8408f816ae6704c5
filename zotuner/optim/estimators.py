"""Estimators: which losses a step asks for, and the coefficient of each perturbation that they give.

All have the same few verbs: `points`, `coefficients`, `reported` (what `step` returns) and `pair` (what a PertNN
is told of a step).
"""

import math
import statistics
from dataclasses import dataclass

Points = tuple[tuple[int, float], ...]  # (branch, factor of u) of each loss; a factor of 0 is theta itself


@dataclass(frozen=True)
class TwoPoint:
    """c = [L(theta + eps u) - L(theta - eps u)] / (2 eps), for one u (MeZO, arXiv:2305.17333, Alg. 1)."""

    first_branch: int = 0

    def points(self, eps: float) -> Points:
        """Of loss_plus and loss_minus: two forwards."""
        return (0, eps), (0, -eps)

    def coefficients(self, losses: tuple[float, ...], eps: float) -> tuple[float, ...]:
        """(projected_grad,): the update is -lr c u."""
        return ((losses[0] - losses[1]) / (2 * eps),)

    def reported(self, losses: tuple[float, ...]) -> float:
        """The mean of the two."""
        return (losses[0] + losses[1]) / 2

    def pair(self, losses: tuple[float, ...]) -> tuple[float, float]:
        """(loss_plus, loss_minus)."""
        return losses[0], losses[1]


@dataclass(frozen=True)
class OneSided:
    """c_i = (l_i - l_0) / (N s), s the standard deviation of l_1..l_N (FZOO, arXiv:2506.09034, Alg. 1).

    The step has no 1 / eps: s carries it. s = 0 (all losses equal) gives no step.

    Args:
        num_perturbations: N, at least 2.
    """

    num_perturbations: int = 8

    def __post_init__(self) -> None:
        if self.num_perturbations < 2:
            raise ValueError(
                f"num_perturbations must be at least 2 for a standard deviation, got {self.num_perturbations}"
            )

    @property
    def first_branch(self) -> int:
        """u_i is noise's branch i; the update walks them from the first."""
        return 1

    def points(self, eps: float) -> Points:
        """Of l_0, l_1, ..., l_N: N + 1 forwards."""
        return (0, 0.0), *((i, eps) for i in range(1, self.num_perturbations + 1))

    def coefficients(self, losses: tuple[float, ...], eps: float) -> tuple[float, ...]:
        """(c_1, ..., c_N): the update is -lr sum_i c_i u_i."""
        if not all(math.isfinite(loss) for loss in losses):
            return (math.nan,) * self.num_perturbations
        base, perturbed = losses[0], losses[1:]
        s = statistics.stdev(perturbed)
        return tuple((loss - base) / (self.num_perturbations * s) if s > 0 else 0.0 for loss in perturbed)

    def reported(self, losses: tuple[float, ...]) -> float:
        """l_0."""
        return losses[0]

    def pair(self, losses: tuple[float, ...]) -> tuple[float, float]:
        """(mean of l_1..l_N, l_0): the same two points, in the mean, as one-sided losses can give them."""
        return statistics.fmean(losses[1:]), losses[0]


@dataclass(frozen=True)
class ThreePoint:
    """c as of `TwoPoint`, and theta's own loss, which tells the curvature along u (HiZOO, arXiv:2402.15173, Alg. 1)."""

    first_branch: int = 0

    def points(self, eps: float) -> Points:
        """Of l_0, loss_plus and loss_minus: three forwards."""
        return (0, 0.0), (0, eps), (0, -eps)

    def coefficients(self, losses: tuple[float, ...], eps: float) -> tuple[float, ...]:
        """(projected_grad,)."""
        return ((losses[1] - losses[2]) / (2 * eps),)

    def reported(self, losses: tuple[float, ...]) -> float:
        """l_0."""
        return losses[0]

    def pair(self, losses: tuple[float, ...]) -> tuple[float, float]:
        """(loss_plus, loss_minus)."""
        return losses[1], losses[2]
