"""Slots that hold a quantised matrix: its rows are dequantised, perturbed, used and forgotten, chunk by chunk."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zotuner.blocks import Piece, Weight
from zotuner.perturb.slot import Perturbation, Scratch, Slot
from zotuner.quantized import QuantizedLinear, QuantizedMatrix, QuantizedPiece


@dataclass(frozen=True, eq=False)
class StoredSlot(Slot):
    """A quantised matrix as one module holds it."""

    module: QuantizedLinear
    param: QuantizedMatrix  # type: ignore[assignment]
    pieces: tuple[tuple[int, QuantizedPiece], ...]

    linear = True  # whatever holds a quantised matrix multiplies by it

    def chunks(self, scratch: Scratch) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) at theta, float32, in scratch."""
        width = self.param.shape[1]
        buffer = scratch.take(self.chunk_numel, self.param)  # type: ignore[arg-type]
        for first, last in self.spans:
            yield first, self.param.rows(first, last, buffer[: (last - first) * width].view(-1, width))
        scratch.give([buffer])

    def product(self, x: Tensor, out: Tensor, scratch: Scratch) -> None:
        """out = x W^T at theta."""
        for first, rows in self.chunks(scratch):
            torch.mm(x, rows.to(x.dtype).t(), out=out[:, first : first + len(rows)])

    def hold(self, holder: nn.Module, point: Perturbation, scratch: Scratch) -> list[Tensor]:
        """The holder's own forward runs at a point from now on; takes no scratch."""

        def perturb(rows: Tensor, first: int) -> None:
            for number, piece in self.pieces:
                piece.perturb(rows, first, point.draw, point.alphas[number], number)

        holder.perturb = perturb  # type: ignore[assignment]
        return []

    def release(self, holder: nn.Module) -> None:
        """And at theta again."""
        holder.perturb = None  # type: ignore[assignment]


def slot_of(module: nn.Module, name: str, weight: Weight, pieces: tuple[tuple[int, Piece], ...]) -> Slot:
    """The slot of a weight of either kind."""
    if isinstance(weight, nn.Parameter):
        return Slot(module, name, weight, pieces)
    return StoredSlot(module, name, weight, pieces)  # type: ignore[arg-type]
