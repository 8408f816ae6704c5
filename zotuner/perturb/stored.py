"""Slots that hold a quantised matrix: its rows are dequantised, perturbed, used and forgotten, chunk by chunk."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zotuner.blocks import Piece, Weight, weights_of
from zotuner.perturb.slot import CONTAINERS, Perturbation, Scratch, Slot
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


def slots_of(model: nn.Module, pieces: Mapping[Weight, tuple[tuple[int, Piece], ...]]) -> list[Slot]:
    """Where a model's modules hold the weights that are cut into pieces, of either kind."""
    held: list[tuple[nn.Module, str, Weight, str | None]] = []
    for module in model.modules():
        if not isinstance(module, CONTAINERS):
            held += [(module, name, weight, None) for name, weight in weights_of(module).items()]
            for child, container in module.named_children():
                if isinstance(container, CONTAINERS):
                    held += [(module, name, weight, child) for name, weight in weights_of(container).items()]
    return [
        Slot(module, name, weight, pieces[weight], container)
        if isinstance(weight, nn.Parameter)
        else StoredSlot(module, name, weight, pieces[weight])  # type: ignore[arg-type]
        for module, name, weight, container in held
        if weight in pieces
    ]
