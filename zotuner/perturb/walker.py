"""The in-place engine's way: theta goes from point to point by noise drawn again."""

from collections.abc import Sequence

from zotuner.blocks import Block
from zotuner.perturb.closure import Closure, value_of
from zotuner.perturb.field import Direction, Move, shift
from zotuner.perturb.slot import Perturbation, marked


class Walker:
    """Moves theta from point to point by noise drawn again.

    Args:
        blocks: Of the model.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = blocks
        self._at: Perturbation | None = None

    def loss(self, closure: Closure, point: Perturbation | None) -> float:
        """L at a point; theta stays there, or comes home if the closure raises."""
        with marked("noise"):
            self.move(point)
        try:
            return value_of(closure())
        except BaseException:
            self.move(None)
            raise

    def move(self, to: Perturbation | None) -> None:
        """One sweep where the two points' noise lies in one branch or in neighbouring ones, else two."""
        here, self._at = self._at, to
        if here is not None and to is not None and to.draw == here.draw:
            shift(self._blocks, to.draw, [[b - a] for a, b in zip(here.alphas, to.alphas, strict=True)])
        elif here is not None and to is not None and to.draw == here.draw.branched(here.draw.branch + 1):
            shift(self._blocks, here.draw, [[-a, b] for a, b in zip(here.alphas, to.alphas, strict=True)])
        else:
            if here is not None:
                shift(self._blocks, here.draw, [[-a] for a in here.alphas])
            if to is not None:
                shift(self._blocks, to.draw, [[b] for b in to.alphas])

    def home_and(self, draw: Direction, alphas: Sequence[Sequence[float]]) -> Move:
        """The sweep that is left to do for an update: it holds the way home where the point's branch is one of its own.

        Elsewhere theta goes home first.
        """
        here = self._at
        place = -1 if here is None or here.draw != draw.branched(here.draw.branch) else here.draw.branch - draw.branch
        if here is None or not 0 <= place < len(alphas[0]):
            self.move(None)
            return draw, alphas
        self._at = None
        return draw, [
            [x - a if k == place else x for k, x in enumerate(row)] for row, a in zip(alphas, here.alphas, strict=True)
        ]
