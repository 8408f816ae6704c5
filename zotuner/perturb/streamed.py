"""Modules that run on perturbed weights: W + alpha z is built in scratch, used, and forgotten.

    inputs of k branches, one after the other in dim 0  ->  branch j meets W + alpha_j z_j  ->  outputs likewise

Each weight is visited once, its k perturbations made while it is in cache. A linear layer works by chunks of its rows,
an embedding by the rows that the batch names; low-rank noise is applied to the activations and never built.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from zotuner.blocks import Piece
from zotuner.perturb import half
from zotuner.perturb.draw import Draw
from zotuner.perturb.watch import Watch

CHUNK = 1 << 20  # elements of scratch that one linear layer takes at a time


@dataclass(frozen=True)
class Perturbation:
    """A place to evaluate the loss at: theta_i + alphas[i] z_i."""

    draw: Draw
    alphas: Sequence[float]  # (n,) the factor of z in each block


@dataclass(frozen=True, eq=False)
class Slot:
    """A parameter as one module holds it."""

    module: nn.Module
    name: str
    param: nn.Parameter
    pieces: tuple[tuple[int, Piece], ...]  # (block's number, its part of the parameter)

    @property
    def linear(self) -> bool:
        """Whether all that the module does with its weight is to multiply by it."""
        return type(self.module) is nn.Linear

    def chunks(self, scratch: "Scratch") -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) at theta, of a matrix; each is valid until the next comes."""
        for first, last in row_spans(*self.param.shape):
            yield first, self.param.detach()[first:last]

    def product(self, x: Tensor, out: Tensor, scratch: "Scratch") -> None:
        """out = x W^T at theta."""
        torch.mm(x, self.param.detach().t(), out=out)

    def hold(self, point: Perturbation, scratch: "Scratch") -> list[Tensor]:
        """The module holds the parameter at a point from now on; returns the scratch that it lies in."""
        taken = scratch.take(self.param.numel(), self.param)
        perturbed = taken[: self.param.numel()].view(self.param.shape)
        build(self, point, perturbed)
        self.module._parameters[self.name] = perturbed  # type: ignore[assignment]
        return [taken]

    def release(self) -> None:
        """And at theta again."""
        self.module._parameters[self.name] = self.param


class CannotStackError(Exception):
    """A module was met whose inputs do not tell which rows belong to which branch."""


def row_spans(rows: int, width: int) -> list[tuple[int, int]]:
    """(first, one past the last) of each chunk of a matrix's rows."""
    step = max(1, CHUNK // width)
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def chunk_numel(shape: Sequence[int]) -> int:
    """Elements of the largest chunk of a matrix's rows."""
    rows, width = shape
    return min(rows, max(1, CHUNK // width)) * width


class Scratch:
    """Flat buffers that are used again."""

    def __init__(self) -> None:
        self._pool: list[Tensor] = []

    def take(self, numel: int, like: Tensor) -> Tensor:
        """A buffer of at least `numel` elements; the caller gives it back."""
        for i, buffer in enumerate(self._pool):
            if buffer.numel() >= numel and buffer.dtype == like.dtype and buffer.device == like.device:
                return self._pool.pop(i)
        return torch.empty(max(numel, CHUNK), dtype=like.dtype, device=like.device)

    def give(self, buffers: Sequence[Tensor]) -> None:
        """Takes buffers back."""
        self._pool += buffers


@dataclass
class Evaluation:
    """One forward of the model at k points.

    Attributes:
        points: Where; None is theta itself.
        scratch: Buffers.
        watch: Is told what is our own reading of the weights.
        half: Multiply float32 matrices in bfloat16, where `zotuner.perturb.half` can.
        rows: Size of dim 0 of the stacked batch, known once the first module has run.
    """

    points: Sequence[Perturbation | None]
    scratch: Scratch
    watch: Watch | None = None
    half: bool = False
    rows: int | None = None

    def begin(self, *_: Any) -> None:
        """The model starts on a batch."""
        self.rows = None

    def own(self) -> AbstractContextManager[None]:
        """Around our own reading of the weights."""
        return nullcontext() if self.watch is None else self.watch.closed()

    @contextmanager
    def alone(self, j: int) -> Iterator[Perturbation | None]:
        """The evaluation is that of one branch for a while: what runs within a module's forward of that branch."""
        points, rows = self.points, self.rows
        self.points, self.rows = [points[j]], None
        try:
            yield points[j]
        finally:
            self.points, self.rows = points, rows

    def split(self, args: Any) -> list[Any]:
        """The arguments of each branch: tensors that hold the stacked batch are cut, all others are shared."""
        k = len(self.points)
        if k == 1:
            return [args]
        leaves, spec = tree_flatten(args)
        cut = [self._parts(leaf, k) for leaf in leaves]
        return [tree_unflatten([parts[j] for parts in cut], spec) for j in range(k)]

    def join(self, outputs: list[Any], cut: bool) -> Any:
        """The outputs of the branches as the stacked batch has them; `cut`: the inputs held it."""
        if len(outputs) == 1:
            return outputs[0]
        flat = [tree_flatten(out) for out in outputs]
        leaves = [self._joined(parts, cut) for parts in zip(*(leaves for leaves, _ in flat), strict=True)]
        return tree_unflatten(leaves, flat[0][1])

    def _parts(self, leaf: Any, k: int) -> Sequence[Any]:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] == 1:
            return [leaf] * k
        if self.rows is None:
            if leaf.shape[0] % k:
                raise CannotStackError(f"dim 0 of {tuple(leaf.shape)} does not hold {k} branches")
            self.rows = leaf.shape[0]
        return [leaf] * k if leaf.shape[0] % self.rows else leaf.chunk(k)

    def _joined(self, parts: Sequence[Any], cut: bool) -> Any:
        """One output of all branches: cut ones are put together, shared ones are repeated over a branch's rows."""
        first = parts[0]
        if not isinstance(first, Tensor):
            return first
        k = len(parts)
        if self.rows is None or first.ndim == 0:
            raise CannotStackError("an output without the batch's dimension")
        batch, length = self.rows // k, first.shape[0]
        # what does not come from the batch, and has no dimension of 1 in its place, may not be for each row
        fits = length == 1 or length % batch == 0 if cut else length == 1 and first.ndim > 1
        if not fits:
            raise CannotStackError(f"an output of shape {tuple(first.shape)} for a batch of {batch}")
        return torch.cat([part.expand(batch, *part.shape[1:]) if len(part) == 1 else part for part in parts])


def forward_of(module: nn.Module, slots: Sequence[Slot], evaluation: Evaluation) -> Callable[..., Any]:
    """The module's forward at the points of an evaluation."""
    original = module.forward
    by_name = {slot.name: slot for slot in slots}
    weight, bias = by_name.get("weight"), by_name.get("bias")
    if weight is not None and (len(weight.pieces) > 1 or "forward" in module.__dict__):
        weight = None
    table = weight if type(module) is nn.Embedding and module.max_norm is None else None
    linear = weight if weight is not None and weight.linear else None

    def forward(*args: Any, **kwargs: Any) -> Any:
        if table is not None or (linear is not None and _by_rows(evaluation, args, kwargs)):
            with evaluation.own():
                out: Any = (
                    _linear(module, linear, bias, evaluation, *args)
                    if linear is not None
                    else _embedding(table, evaluation, *args, **kwargs)
                )
        else:
            out = _each(slots, evaluation, original, args, kwargs)
        if evaluation.watch is not None:
            evaluation.watch.measure(out)
        return out

    return forward


def _by_rows(evaluation: Evaluation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a linear layer's input is the stacked batch, and a product into given memory is what is wanted."""
    if kwargs or len(args) != 1 or torch.is_grad_enabled() or torch.is_autocast_enabled(args[0].device.type):
        return False
    (leaf,) = args
    return len(evaluation.points) == 1 or evaluation.split(leaf)[0] is not leaf


@contextmanager
def replaced_forwards(forwards: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Sets `module.forward` of each module for a while; what an instance had set itself comes back."""
    with ExitStack() as stack:
        for module, forward in forwards:
            stack.callback(_restore_forward, module, module.__dict__.get("forward"))
            module.forward = forward  # type: ignore[method-assign]
        yield


def build(slot: Slot, point: Perturbation, out: Tensor) -> None:
    """out = the slot's parameter at a point."""
    with record_function("zotuner::noise"):
        for number, piece in slot.pieces:
            point.draw.add(
                piece.of(slot.param.detach()),
                [point.alphas[number]],
                out=piece.of(out),
                block=number,
                start=piece.start,
            )


def _restore_forward(module: nn.Module, own: Callable[..., Any] | None) -> None:
    del module.__dict__["forward"]
    if own is not None:
        module.forward = own  # type: ignore[method-assign]


def _each(
    slots: Sequence[Slot], evaluation: Evaluation, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]
) -> Any:
    """A module's own forward, a branch at a time, while it holds perturbed parameters."""
    outputs, parts = [], evaluation.split((args, kwargs))
    cut = any(part is not leaf for part, leaf in zip(tree_leaves(parts[0]), tree_leaves((args, kwargs)), strict=True))
    for j, (some, named) in enumerate(parts):
        with evaluation.alone(j) as point, _held(slots, point, evaluation) as taken:
            outputs.append(tree_map(lambda out, taken=taken: _own(out, taken), original(*some, **named)))
    return evaluation.join(outputs, cut)


@contextmanager
def _held(slots: Sequence[Slot], point: Perturbation | None, evaluation: Evaluation) -> Iterator[list[Tensor]]:
    """Lets a module hold its parameters at a point; yields the scratch that they lie in."""
    taken: list[Tensor] = []
    try:
        if point is not None:
            with evaluation.own():
                for slot in slots:
                    taken += slot.hold(point, evaluation.scratch)
        yield taken
    finally:
        for slot in slots:
            slot.release()
        evaluation.scratch.give(taken)


def _own(out: Any, buffers: Sequence[Tensor]) -> Any:
    """A copy of an output that is a view of a scratch buffer, such as `return self.latents[:n]`; others as they are."""
    if isinstance(out, Tensor) and any(
        out.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for b in buffers
    ):
        return out.clone()
    return out


def _linear(module: Any, weight: Slot, bias: Slot | None, evaluation: Evaluation, input: Tensor) -> Tensor:
    """x W^T + b, branch by branch into one output."""
    rows, width = weight.param.shape
    stacked = input.reshape(-1, width)
    out = input.new_empty(len(stacked), rows)
    k = len(evaluation.points)
    calls = list(zip(evaluation.points, stacked.chunk(k), out.chunk(k), strict=True))
    low_rank = any(point is not None and point.draw.low_rank(weight.param) for point in evaluation.points)
    if evaluation.half and weight.param.dtype == torch.float32 and half.applies(_alphas(weight, calls)):
        _multiply_half(weight, calls, evaluation.scratch, low_rank)
    elif low_rank:
        weight.product(stacked, out, evaluation.scratch)
    else:
        _multiply(weight, calls, evaluation.scratch)
    if low_rank:
        _add_low_rank(weight, calls)
    if module.bias is not None:
        for point, _, y in calls:
            y.add_(module.bias if bias is None else _vector(bias, point))
    return out.view(*input.shape[:-1], rows)


Call = tuple[Perturbation | None, Tensor, Tensor]  # of one branch: where, x (m, width), y (m, rows), which is filled


def _multiply(weight: Slot, calls: Sequence[Call], scratch: Scratch) -> None:
    """y = x (W + alpha z)^T by chunks of W's rows; each is perturbed and used k times while it is in cache."""
    width = weight.param.shape[1]
    ((number, piece),) = weight.pieces
    buffer = scratch.take(chunk_numel(weight.param.shape), weight.param)
    for first, plain in weight.chunks(scratch):
        chunk = buffer[: plain.numel()].view(plain.shape)
        for point, x, y in calls:
            if point is not None:
                with record_function("zotuner::noise"):
                    start = piece.start + first * width
                    point.draw.add(plain, [point.alphas[number]], out=chunk, block=number, start=start)
            torch.mm(x, (plain if point is None else chunk).to(x.dtype).t(), out=y[:, first : first + len(plain)])
    scratch.give([buffer])


def _multiply_half(weight: Slot, calls: Sequence[Call], scratch: Scratch, low_rank: bool) -> None:
    """As `_multiply`, in bfloat16; noise of low rank is left to `_add_low_rank`."""
    width = weight.param.shape[1]
    ((number, piece),) = weight.pieces
    buffer = scratch.take(chunk_numel(weight.param.shape), weight.param)
    for first, plain in weight.chunks(scratch):
        z = buffer[: plain.numel()].view(plain.shape)
        noise = partial(_half_noise, calls, number, piece.start + first * width, z)
        inputs, outputs = [x for _, x, _ in calls], [y[:, first : first + len(plain)] for _, _, y in calls]
        half.multiply(plain, _alphas(weight, calls), inputs, outputs, None if low_rank else noise)
    scratch.give([buffer])


def _half_noise(calls: Sequence[Call], block: int, start: int, z: Tensor, j: int) -> Tensor:
    """z of a branch."""
    point = calls[j][0]
    assert point is not None
    with record_function("zotuner::noise"):
        point.draw.add(z.zero_(), [1.0], out=z, block=block, start=start)
        return z


def _alphas(weight: Slot, calls: Sequence[Call]) -> list[float | None]:
    """The factor of z in each branch; None at theta itself."""
    ((number, _),) = weight.pieces
    return [None if point is None else point.alphas[number] for point, _, _ in calls]


def _add_low_rank(weight: Slot, calls: Sequence[Call]) -> None:
    """y += alpha / sqrt(r) (x B) A^T: x (W + alpha A B^T / sqrt(r))^T without the product A B^T."""
    ((number, piece),) = weight.pieces
    for point, x, y in calls:
        if point is not None:
            with record_function("zotuner::noise"):
                a, b = (f.to(x) for f in point.draw.factors(weight.param.shape, number, piece.start))
            y.addmm_(x @ b, a.t(), alpha=point.alphas[number] * point.draw.rank**-0.5)


def _vector(slot: Slot, point: Perturbation | None) -> Tensor:
    """A small parameter at a point, in memory of its own."""
    if point is None:
        return slot.param.detach()
    out = torch.empty_like(slot.param)
    build(slot, point, out)
    return out


def _embedding(weight: Slot | None, evaluation: Evaluation, input: Tensor) -> Tensor:
    """Looks up tables of the rows that the input names, perturbed."""
    assert weight is not None
    ((number, piece),) = weight.pieces
    outputs, parts = [], evaluation.split(input)
    if len(parts) > 1 and input.ndim and input.shape[0] not in (1, evaluation.rows):  # positions, of one text
        raise CannotStackError(f"an embedding of {tuple(input.shape)} for {evaluation.rows} rows")
    for point, ids in zip(evaluation.points, parts, strict=True):
        if point is None:
            outputs.append(F.embedding(ids, weight.param.detach()))
            continue
        with record_function("zotuner::noise"):
            rows, positions = torch.unique(ids, return_inverse=True)
            table = point.draw.rows(weight.param, rows, point.alphas[number], block=number, start=piece.start)
        outputs.append(F.embedding(positions, table))
    whole: Tensor = evaluation.join(outputs, parts[0] is not input)
    return whole
