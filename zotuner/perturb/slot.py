"""A parameter as one module holds it, and how the module comes to hold W + alpha z in its place."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.profiler import record_function

from zotuner.blocks import Piece, chunk_rows, row_spans
from zotuner.perturb.field import Direction

CHUNK = 1 << 20  # elements of scratch that one linear layer takes at a time


@dataclass(frozen=True)
class Perturbation:
    """A place to evaluate the loss at: theta_i + alphas[i] z_i (u_i, where the direction is no plain noise)."""

    draw: Direction
    alphas: Sequence[float]  # (n,) the factor of z in each block


def marked(part: str) -> AbstractContextManager[object]:
    """Names a part of a step for torch's profiler, at no cost while it is off."""
    return record_function(f"zotuner::{part}") if profiler._is_profiler_enabled else nullcontext()


class Scratch:
    """Flat buffers that are used again, by one thread."""

    def __init__(self) -> None:
        self._pool: list[Tensor] = []
        self._grounds: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._matrices: dict[tuple[torch.Size, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def take(self, numel: int, like: Tensor) -> Tensor:
        """A buffer of at least `numel` elements; the caller gives it back."""
        for i, buffer in enumerate(self._pool):
            if buffer.numel() >= numel and buffer.dtype == like.dtype and buffer.device == like.device:
                return self._pool.pop(i)
        return torch.empty(max(numel, CHUNK), dtype=like.dtype, device=like.device)

    def matrix(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """A matrix of a shape and type, and its transpose, for use until another is asked for.

        All of one type lie in the same memory, and are made once: the fewer calls of torch between two products, the
        less do threads wait for each other at Python's lock.
        """
        key = like.shape, like.dtype, like.device
        if key not in self._matrices:
            ground = self._grounds.get(key[1:])
            if ground is None or ground.numel() < like.numel():
                ground = self._grounds[key[1:]] = self.take(like.numel(), like)
                self._matrices.clear()
            matrix = ground[: like.numel()].view(like.shape)
            self._matrices[key] = matrix, matrix.t()
        return self._matrices[key]

    def give(self, buffers: Sequence[Tensor]) -> None:
        """Takes buffers back."""
        self._pool += buffers


CONTAINERS = (nn.ParameterDict, nn.ParameterList)  # have no forward: the module that has them reads their parameters


@dataclass(frozen=True, eq=False)
class Slot:
    """A parameter as one module holds it, itself or in a container of parameters."""

    module: nn.Module
    name: str
    param: nn.Parameter
    pieces: tuple[tuple[int, Piece], ...]  # (block's number, its part of the parameter)
    container: str | None = None  # its name in the module

    @property
    def linear(self) -> bool:
        """Whether all that the module does with its weight is to multiply by it."""
        return type(self.module) is nn.Linear

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(first, one past the last) of each chunk of a matrix's rows."""
        return row_spans(self.param.shape, CHUNK)

    @property
    def chunk_numel(self) -> int:
        """Elements of the largest chunk of a matrix's rows."""
        return chunk_rows(self.param.shape, CHUNK) * self.param.shape[1]

    def chunks(self, scratch: Scratch) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) at theta, of a matrix; each is valid until the next comes."""
        for first, last in self.spans:
            rows = self.param.detach()
            yield first, rows if last - first == len(rows) else rows[first:last]

    def product(self, x: Tensor, out: Tensor, scratch: Scratch) -> None:
        """out = x W^T at theta."""
        torch.mm(x, self.param.detach().t(), out=out)

    def hold(self, holder: nn.Module, point: Perturbation, scratch: Scratch) -> list[Tensor]:
        """A module (or its twin) has the parameter at a point from now on; returns the scratch that it lies in."""
        taken = scratch.take(self.param.numel(), self.param)
        perturbed = taken[: self.param.numel()].view(self.param.shape)
        build(self, point, perturbed)
        self._keeper(holder)._parameters[self.name] = perturbed  # type: ignore[assignment]
        return [taken]

    def release(self, holder: nn.Module) -> None:
        """And at theta again."""
        self._keeper(holder)._parameters[self.name] = self.param

    def _keeper(self, holder: nn.Module) -> nn.Module:
        return holder if self.container is None else holder._modules[self.container]  # type: ignore[return-value]


def build(slot: Slot, point: Perturbation, out: Tensor) -> None:
    """out = the slot's parameter at a point."""
    with marked("noise"):
        for number, piece in slot.pieces:
            point.draw.add(
                piece.of(slot.param.detach()),
                [point.alphas[number]],
                out=piece.of(out),
                block=number,
                start=piece.start,
            )
