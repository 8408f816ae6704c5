"""Which blocks are perturbed together, and what each block is, from what groups of blocks gave.

    a group's value  =  sum of its unknowns' values + noise  ->  least squares, no value negative, and their errors

An unknown is a block's own value, or that of all blocks of a type together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zotuner.block_types import block_types
from zotuner.blocks import Block
from zotuner.controls.scales import Estimate, Floats
from zotuner.errors import ZotunerError

Member = NDArray[np.bool_]

TYPES, BLOCK = "types", "block"
SWEEPS = 1000  # over the unknowns; those of disjoint groups are there after one
CLOSE = 1e-9  # relative change of a sweep after which the values stay


@dataclass(frozen=True)
class Grouping:
    """How blocks are perturbed.

    Attributes:
        unknowns: Which blocks each number that is wanted stands for, as a sum over them.
        parts: Groups a round; None: each unknown is a group of its own, in every round.
        seed: Of random groups.
    """

    unknowns: tuple[tuple[int, ...], ...]
    parts: int | None
    seed: int

    @property
    def count(self) -> int:
        """Groups a round."""
        return len(self.unknowns) if self.parts is None else self.parts

    def members(self, number: int) -> Member:
        """(groups, unknowns): what is perturbed together in a round; each unknown is in one group."""
        if self.parts is None:
            return np.eye(len(self.unknowns), dtype=bool)
        random = np.random.default_rng((self.seed, number))
        dealt = random.permutation(len(self.unknowns)) % self.parts
        inside: Member = np.arange(self.parts)[:, None] == dealt
        return inside

    def blocks_of(self, group: Member) -> Iterator[int]:
        """The blocks of a group."""
        return (block for unknown, inside in zip(self.unknowns, group, strict=True) if inside for block in unknown)


def grouping(blocks: Sequence[Block], groups: str, seed: int) -> Grouping:
    """The grouping that `--groups` asks for.

    Args:
        blocks: Of the model.
        groups: "types": a group a type of blocks, whose blocks share a scale; "block": a group a block; or a
            number: so many random groups a round, from which each block's own value is told.
        seed: Of random groups.

    Raises:
        ZotunerError: Anything else, or more groups than blocks.
    """
    names = tuple(block.name for block in blocks)
    if groups == TYPES:
        return Grouping(tuple(map(tuple, block_types(names).values())), None, seed)
    single = tuple((i,) for i in range(len(names)))
    if groups == BLOCK:
        return Grouping(single, None, seed)
    if groups.isdecimal() and 2 <= int(groups) <= len(names):
        return Grouping(single, int(groups), seed)
    raise ZotunerError(
        f"--groups: expected {TYPES}, {BLOCK} or a number from 2 to {len(names)}, that of the blocks, got {groups!r}"
    )


def solve(
    rows: Member,  # (m, unknowns)
    values: Floats,  # (m,)
) -> Estimate:  # of the unknowns
    """argmin_x |rows x - values|^2 with x >= 0, by coordinate descent; 0 for an unknown that is in no row.

    The standard errors are those without the bound, for noise that differs from row to row (White, Econometrica 1980,
    with m / (m - unknowns) for small m); None where there are no more rows than unknowns.
    """
    normal = rows.T.astype(float) @ rows.astype(float)
    right = rows.T.astype(float) @ values
    x = np.zeros(len(right))
    for _ in range(SWEEPS):
        before = x.copy()
        for i in np.flatnonzero(np.diag(normal)):
            x[i] = max(0.0, x[i] + (right[i] - normal[i] @ x) / normal[i, i])
        if np.abs(x - before).max() <= CLOSE * np.abs(x).max():
            break
    m, n = rows.shape
    if m <= n:
        return Estimate(x)
    inverse, noise = np.linalg.pinv(normal), (values - rows @ x) ** 2
    spread = inverse @ (rows.T.astype(float) * noise) @ rows.astype(float) @ inverse
    return Estimate(x, np.sqrt(np.diag(spread).clip(min=0) * m / (m - n)))
