"""Where a perturbation points: one noise vector z over all blocks, of full or of low rank.

full       z = what `zotuner.noise` draws, element by element
low rank   z = A B^T / sqrt(r) in each matrix of m rows and n columns: A (m, r) and B (n, r) are drawn
           (LOZO, arXiv:2410.07698; EGGROLL, arXiv:2511.16652); vectors, such as biases, as in the full case.
           B may stay for some steps, while A is drawn in each (LOZO's lazy sampling)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zotuner import noise
from zotuner.noise.philox import MAX_ELEMENTS

FACTORS = MAX_ELEMENTS // 2  # where the elements that factors are made of begin; below lie those of plain noise


@dataclass(frozen=True)
class Draw:
    """One noise vector z over all blocks.

    Attributes:
        kind: Distribution of z's elements, or of its factors': "gaussian" or "rademacher".
        seed: Of the run.
        step: The optimizer's step.
        branch: Which of the step's perturbations.
        rank: r of the low-rank form; 0 for noise of full rank.
        resample_every: Steps for which B of the low-rank form stays.
    """

    kind: str
    seed: int
    step: int
    branch: int = 0
    rank: int = 0
    resample_every: int = 1

    def branched(self, branch: int) -> "Draw":
        """The same step's perturbation of another number."""
        return replace(self, branch=branch)

    def at(self, block: int, start: int) -> dict[str, Any]:
        """The keyword arguments of `noise.add` and `noise.dot`."""
        coordinates = {"kind": self.kind, "seed": self.seed, "step": self.step, "branch": self.branch}
        return {**coordinates, "block": block, "start": start}

    def low_rank(self, tensor: Tensor) -> bool:
        """Whether z has the low-rank form in a tensor: it has in matrices, and in stacks of them."""
        return self.rank > 0 and tensor.ndim >= 2

    def add(
        self,
        src: Tensor,
        alphas: Sequence[float],
        *,
        out: Tensor,
        block: int,
        start: int,
        rounding: str = "nearest",
        rows: tuple[int, int] | None = None,
    ) -> None:
        """out = src + sum_k alphas[k] z of branch `branch + k`, for a piece of a block that begins at `start`.

        With `rows` = (first, total), `src` is the rows from `first` on of a matrix of `total` rows, the piece.
        """
        if rows is not None and not self.low_rank(src):
            start += rows[0] * src.shape[-1]
        if not self.low_rank(src):
            noise.add(src, alphas, out=out, rounding=rounding, **self.at(block, start))
            return
        shape = src.shape if rows is None else (rows[1], src.shape[-1])
        pairs = [self.branched(self.branch + k).factors(shape, block, start) for k in range(len(alphas))]
        if rows is not None:
            pairs = [(a[rows[0] : rows[0] + len(src)], b) for a, b in pairs]
        left = torch.cat([a * (alpha * self.rank**-0.5) for alpha, (a, _) in zip(alphas, pairs, strict=True)], dim=1)
        right = torch.cat([b for _, b in pairs], dim=1)
        work = torch.promote_types(src.dtype, torch.float32)
        left, right = left.to(src.device, work), right.to(src.device, work)
        if src.dtype == work and src.ndim == 2:
            torch.addmm(src, left, right.t(), out=out)
            return
        moved = (left @ right.t()).view(src.shape).add_(src)
        if rounding == "stochastic":
            noise.round_to_(moved, out.dtype, seed=self.seed, step=self.step, block=block, start=start)
        out.copy_(moved)

    def rows(self, src: Tensor, rows: Tensor, alpha: float, *, block: int, start: int) -> Tensor:
        """src[rows] + alpha z[rows], (m, width), for a matrix that is one piece."""
        if not self.low_rank(src):
            return noise.add_rows(src.detach(), rows, alpha, **self.at(block, start))
        a, b = (factor.to(src) for factor in self.factors(src.shape, block, start))
        moved: Tensor = F.embedding(rows, src.detach()) + (F.embedding(rows, a) @ b.t()) * (alpha * self.rank**-0.5)
        return moved

    def factors(self, shape: Sequence[int], block: int, start: int) -> tuple[Tensor, Tensor]:
        """A (m, r) and B (n, r) in float32, n the last dimension and m all others; z = A B^T / sqrt(r).

        A piece that begins at element s of its block takes its factors from element 2 r s of the numbers' upper half
        on: pieces never share, neither with each other nor with the vectors of the block.
        """
        columns, total = shape[-1], torch.Size(shape).numel()
        rows, base = total // columns, FACTORS + 2 * self.rank * start
        coordinates = self.at(block, 0)
        del coordinates["start"]
        middle, stop = base + rows * self.rank, base + (rows + columns) * self.rank
        if kept := self.step % self.resample_every:
            a = noise.sample(start=base, stop=middle, **coordinates)
            b = noise.sample(start=middle, stop=stop, **{**coordinates, "step": self.step - kept})
        else:
            a, b = noise.sample(start=base, stop=stop, **coordinates).split([middle - base, stop - middle])
        return a.view(rows, self.rank), b.view(columns, self.rank)
