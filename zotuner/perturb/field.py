"""Vectors over all blocks that no plain noise is: made of noise and of elementwise state, chunk by chunk.

    z of a chunk, state of a chunk  ->  elements of the chunk  ->  src + alpha elements, and forgotten

A `Field` has the verbs of a `Draw`, so that it serves as a direction to perturb by, in every engine, and as the change
that an update makes, in the same sweep. Whoever makes elements uses single operations (`mul`, `add`, `sqrt`, `div`),
which IEEE 754 rounds in one way: of fused ones, such as `addcmul`, the last bit can hang on the number of threads.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from zotuner import noise
from zotuner.blocks import Block, Piece, moments_from, pieces_of, row_spans
from zotuner.perturb.draw import Draw
from zotuner.perturb.lanes import spread

T = TypeVar("T")

CHUNK = 1 << 20  # elements that are made at a time


class Held:
    """Elementwise state of the parameters, found by block and element.

    Args:
        blocks: Of the model.
        state: Of a parameter: tensors of its shape, by name.
    """

    def __init__(self, blocks: Sequence[Block], state: Mapping[Any, Mapping[str, Tensor]]) -> None:
        self._pieces = [block.pieces for block in blocks]
        self._state = state

    def of(self, block: int, start: int, shape: Sequence[int]) -> dict[str, Tensor]:
        """Views of the elements from `start` on that have a shape: a whole piece's, or that of some of its rows."""
        piece = next(p for p in self._pieces[block] if p.start <= start < p.start + p.numel)
        held = self._state.get(piece.param, {})
        return {name: _rows(piece, tensor, start, shape) for name, tensor in held.items()}


def _rows(piece: Piece, tensor: Tensor, start: int, shape: Sequence[int]) -> Tensor:
    whole = piece.of(tensor)
    if whole.shape == torch.Size(shape):
        return whole
    whole = whole if whole.ndim else whole[None]
    first = (start - piece.start) // whole[0].numel()
    return whole[first : first + shape[0]]


@dataclass(frozen=True)
class Chunk:
    """Some rows of a piece of a block: what elements are made of.

    Attributes:
        draw: Its noise.
        block: The block's number.
        start: The block's element that it begins with.
        origin: The block's element that its piece begins with.
        total: Elements of the piece.
        like: A tensor of its shape, and of the dtype that is worked in.
        held: State, by name; whoever changes it does so in place.
    """

    draw: Draw
    block: int
    start: int
    origin: int
    total: int
    like: Tensor
    held: Mapping[str, Tensor]

    def z(self, alphas: Sequence[float], branch: int = 0) -> Tensor:
        """sum_k alphas[k] z of the draw's branch `branch + k`, a new tensor."""
        out = torch.zeros_like(self.like, memory_format=torch.contiguous_format)
        draw = self.draw.branched(self.draw.branch + branch)
        if draw.low_rank(out):
            matrix = out.view(-1, out.shape[-1])
            rows = (self.start - self.origin) // out.shape[-1], self.total // out.shape[-1]
            draw.add(matrix, alphas, out=matrix, block=self.block, start=self.origin, rows=rows)
        else:
            draw.add(out, alphas, out=out, block=self.block, start=self.start)
        return out


Make = Callable[[Chunk], Tensor]  # of a chunk: its elements, a new tensor of the chunk's shape


@dataclass(frozen=True)
class Field:
    """A vector u over all blocks, u = make(noise, state).

    Attributes:
        draw: The noise that it is made of.
        make: Makes the elements of a chunk. It may change the state, in place, if the field is used for one sweep.
        held: The state that it is made of.
    """

    draw: Draw
    make: Make
    held: Held = field(compare=False)

    @property
    def branch(self) -> int:
        """Which of the step's perturbations."""
        return self.draw.branch

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.draw.seed

    @property
    def step(self) -> int:
        """The optimizer's step."""
        return self.draw.step

    def branched(self, branch: int) -> "Field":
        """The same step's field of another number."""
        return replace(self, draw=self.draw.branched(branch))

    def low_rank(self, tensor: Tensor) -> bool:
        """No: its elements are of their own, each."""
        return False

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
        """out = src + sum_k alphas[k] u of branch `branch + k`; the arguments are those of `Draw.add`."""
        if not src.numel():
            return
        if src.ndim == 0:
            src, out = src[None], out[None]
        width = src[0].numel()
        work = torch.promote_types(src.dtype, torch.float32)
        total = src.numel() if rows is None else rows[1] * width
        for first, last in row_spans((len(src), width), CHUNK):
            part = src[first:last]
            begin = start + (first + (0 if rows is None else rows[0])) * width
            moved = part.to(work, copy=True, memory_format=torch.contiguous_format)
            held = self.held.of(block, begin, part.shape)
            for k, alpha in enumerate(alphas):
                draw = self.draw.branched(self.branch + k)
                moved.add_(self.make(Chunk(draw, block, begin, start, total, moved, held)).mul_(alpha))
            if rounding == "stochastic":
                noise.round_to_(moved, out.dtype, seed=self.seed, step=self.step, block=block, start=begin)
            out[first:last].copy_(moved)

    def rows(self, src: Tensor, rows: Tensor, alpha: float, *, block: int, start: int) -> Tensor:
        """src[rows] + alpha u[rows], (m, width), for a matrix that is one piece."""
        moved, width = F.embedding(rows, src.detach()), src.shape[1]
        for i, row in enumerate(rows.tolist()):
            self.add(moved[i : i + 1], [alpha], out=moved[i : i + 1], block=block, start=start + row * width)
        return moved


Direction = Draw | Field
Move = tuple[Direction, Sequence[Sequence[float]]]  # along what, and how far in each block and branch


def shift(
    blocks: Sequence[Block], along: Direction, alphas: Sequence[Sequence[float]], rounding: str = "nearest"
) -> None:
    """theta_i += sum_k alphas[i][k] u_i of branch `along.branch + k`, in place, one sweep over the weights.

    On the CPU each core takes blocks of its own.
    """
    _sweep(blocks, along, alphas, rounding, lambda piece: None)


def shift_and_measure(
    blocks: Sequence[Block], along: Direction, alphas: Sequence[Sequence[float]], rounding: str = "nearest"
) -> list[tuple[float, float]]:
    """`shift`, and (mean, variance) of each block after it: those of `zotuner.blocks.moments`, bit for bit.

    A piece is summed up when it has moved, while it is in cache.
    """
    sums = iter(_sweep(blocks, along, alphas, rounding, lambda piece: piece.sums()))
    return [moments_from(block, [next(sums) for _ in block.pieces]) for block in blocks]


def _sweep(
    blocks: Sequence[Block],
    along: Direction,
    alphas: Sequence[Sequence[float]],
    rounding: str,
    then: Callable[[Piece], T],
) -> list[T]:
    """Moves each piece; returns what `then` gives of it."""

    def move(numbered: tuple[int, Piece]) -> T:
        number, piece = numbered
        if any(alphas[number]):
            piece.move(along, alphas[number], number, rounding)
        return then(piece)

    pieces = list(pieces_of(blocks))
    on_cpu = all(piece.param.device.type == "cpu" for _, piece in pieces)
    found = spread(move, pieces, [piece.numel for _, piece in pieces], None if on_cpu else 1)
    for tensor in dict.fromkeys(tensor for _, piece in pieces for tensor in piece.stored):
        increment_version(tensor)  # kernels write where torch does not see it
    return found


@contextmanager
def shifted(blocks: Sequence[Block], along: Direction, alphas: Sequence[Sequence[float]]) -> Iterator[None]:
    """While it lasts, the weights are where `shift` brings them; they come back by the opposite, to within rounding."""
    shift(blocks, along, alphas)
    try:
        yield
    finally:
        shift(blocks, along, [[-alpha for alpha in row] for row in alphas])
