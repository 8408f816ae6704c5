"""Noise that is a pure function of (kind, seed, step, branch, block, element): the rule everything rests on.

Whoever perturbs, updates, differentiates or replays asks for the same coordinates and gets the same z, whatever
the order, the chunking, the process or the device. The global random state is never read or set.

    sample   z itself, as a tensor
    add_     tensor += sum_k alpha_k z_k, without ever holding z
    add      the same into another tensor
    add_rows the same for some rows of a matrix
    dot      <g, z>
    sums     of a tensor's elements and of their squares, by the kernels' own order
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zotuner.noise import philox
from zotuner.noise.philox import KINDS, check_range

__all__ = ["KINDS", "VERSION", "add", "add_", "add_rows", "dot", "round_to_", "round_to_integers_", "sample", "sums"]

VERSION = 1  # of the map from coordinates to z; a recorded run can be replayed by this version alone
CHUNK = 1 << 20  # elements of z held at once where a fused kernel does not apply


def sample(
    kind: str,
    *,
    seed: int,
    step: int,
    block: int,
    start: int,
    stop: int,
    branch: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Elements [start, stop) of a block's noise vector, mean 0 and variance 1 an element.

    Rademacher noise is bit-identical on every backend; Gaussian is within 1e-5 across them, and bit-identical on one.

    Args:
        kind: "gaussian" or "rademacher".
        seed: Of the run, in [0, 2^64).
        step: The optimizer's step, in [0, 2^32).
        block: The block's position in the optimizer's list, in [0, 2^24).
        start: First element, counted in C order of the block.
        stop: One past the last element.
        branch: Which of a step's perturbations, in [0, 2^24).
        device: Where the tensor is made.

    Returns:
        (stop - start,) float32.

    Raises:
        ValueError: An unknown kind or a coordinate out of range.

    Example:
        >>> sample("rademacher", seed=0, step=3, block=1, start=0, stop=4).abs()
        tensor([1., 1., 1., 1.])
    """
    check_range(start, stop)
    at = philox.address(kind, seed=seed, step=step, block=block, branch=branch)
    return _draw(kind, at, start, stop, device)


def add(
    src: Tensor,
    alpha: float | Sequence[float],
    *,
    out: Tensor,
    kind: str,
    seed: int,
    step: int,
    block: int,
    start: int = 0,
    branch: int = 0,
    rounding: str = "nearest",
) -> Tensor:
    """out = src + alpha z, without ever holding z; with k alphas, out = src + sum_k alpha_k z of branch `branch + k`.

    The arithmetic is float32 (float64 for a float64 `src`): each alpha is rounded to it, each product too, the sum
    over branches goes from left to right, and the result is rounded once to `out`'s dtype.

    Args:
        src: Any shape, any floating dtype, strided as it may be; element j in C order takes z[start + j].
        alpha: A factor, or one a branch.
        out: Where the result goes, of `src`'s shape; may be `src`.
        kind: As in `sample`, like all that follow.
        seed: Of the run.
        step: The optimizer's step.
        block: The block's number.
        start: The element of the block that `src` begins with.
        branch: The first branch.
        rounding: "nearest", or "stochastic": to bfloat16 or float16 without bias, up or down by a word of the same
            generator, which depends on (seed, step, block, element) alone. An update far below a weight's spacing,
            which the nearest rounding would lose, then happens in the mean.

    Returns:
        `out`.

    Raises:
        ValueError: Shapes that differ, an unknown kind or rounding, or a coordinate out of range.
    """
    if src.shape != out.shape:
        raise ValueError(f"out must have src's shape {tuple(src.shape)}, got {tuple(out.shape)}")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}")
    check_range(start, start + src.numel())
    alphas = [alpha] if isinstance(alpha, float | int) else list(alpha)
    addresses = [philox.address(kind, seed=seed, step=step, block=block, branch=branch + k) for k in range(len(alphas))]
    into, of = _plain(out), _plain(src)
    if not alphas or not src.numel():
        into.copy_(of)
        return out
    if _fused(of) and _fused(into):
        _add_flat(into, of, alphas, kind, addresses, start)
        return out
    work = torch.float64 if src.dtype == torch.float64 else torch.float32
    for rows, low, _ in _row_chunks(of):
        sums = of[rows].to(work, copy=True, memory_format=torch.contiguous_format)
        _add_flat(sums, sums, alphas, kind, addresses, start + low)
        if rounding == "stochastic":
            round_to_(sums, out.dtype, seed=seed, step=step, block=block, start=start + low)
        into[rows].copy_(sums)
    return out


def add_(tensor: Tensor, alpha: float | Sequence[float], **at: Any) -> Tensor:
    """tensor += alpha z in place; the arguments are those of `add`."""
    return add(tensor, alpha, out=tensor, **at)


def round_to_(values: Tensor, dtype: torch.dtype, *, seed: int, step: int, block: int, start: int = 0) -> Tensor:
    """Rounds values stochastically to ones that a smaller dtype holds exactly, in place; see `add`.

    Args:
        values: Contiguous float32.
        dtype: bfloat16 or float16; others leave the values as they are.
        seed: Of the run.
        step: The optimizer's step.
        block: The block's number.
        start: The element of the block that `values` begins with.

    Returns:
        `values`.
    """
    if dtype in philox.DROPPED:
        _round(values, philox.DROPPED[dtype], philox.rounding_address(seed=seed, step=step, block=block), start)
    return values


def round_to_integers_(values: Tensor, *, seed: int, step: int, block: int, start: int = 0) -> Tensor:
    """Rounds values stochastically to whole numbers, in place: floor(value + w 2^-32), w the word of `round_to_`.

    Args:
        values: Contiguous float32.
        seed: Of the run.
        step: The optimizer's step.
        block: The block's number.
        start: The element of the block that `values` begins with.

    Returns:
        `values`.
    """
    _round(values, philox.WHOLE, philox.rounding_address(seed=seed, step=step, block=block), start)
    return values


def add_rows(
    src: Tensor,
    rows: Tensor,
    alpha: float,
    *,
    kind: str,
    seed: int,
    step: int,
    block: int,
    start: int = 0,
    branch: int = 0,
) -> Tensor:
    """src[rows] + alpha z[rows]: noise for the rows that are named, and no others.

    Args:
        src: (n, width), any floating dtype.
        rows: (m,) int64 on `src`'s device.
        alpha: A factor.
        kind: As in `add`, like all that follow.
        seed: Of the run.
        step: The optimizer's step.
        block: The block's number.
        start: The element of the block that `src` begins with.
        branch: Which of the step's perturbations.

    Returns:
        (m, width) of `src`'s dtype.

    Raises:
        IndexError: A row that `src` does not have.
        ValueError: As in `add`.
    """
    at = philox.address(kind, seed=seed, step=step, block=block, branch=branch)
    check_range(start, start + src.numel())
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(src):
        raise IndexError(
            f"index out of range: rows must lie in [0, {len(src)}), got {int(rows.min())} to {int(rows.max())}"
        )
    of = src.detach()
    if _fused(of):
        from zotuner.noise import cpu

        out = of.new_empty(len(rows), of.shape[1])
        cpu.add_rows(out, of, rows, alpha, kind, at, start)
        return out
    out, width = of[rows], of.shape[1]
    coordinates = {"kind": kind, "seed": seed, "step": step, "block": block, "branch": branch}
    for i, row in enumerate(rows.tolist()):
        add_(out[i], alpha, start=start + row * width, **coordinates)
    return out


def dot(g: Tensor, *, kind: str, seed: int, step: int, block: int, start: int = 0, branch: int = 0) -> float:
    """<g, z>: float32 products (float64 for a float64 g), summed in float64.

    Args:
        g: Any shape and floating dtype; element j in C order meets z[start + j].
        kind: As in `sample`, like all that follow.
        seed: Of the run.
        step: The optimizer's step.
        block: The block's number.
        start: The element of the block that `g` begins with.
        branch: Which of the step's perturbations.

    Returns:
        The inner product.
    """
    check_range(start, start + g.numel())
    at = philox.address(kind, seed=seed, step=step, block=block, branch=branch)
    if _fused(g) and g.numel():
        from zotuner.noise import cpu

        return cpu.dot(g.detach(), kind, at, start)
    work = torch.float64 if g.dtype == torch.float64 else torch.float32
    total = 0.0
    for rows, low, high in _row_chunks(g):
        z = _draw(kind, at, start + low, start + high, g.device)
        total += float((g.detach()[rows].to(work).reshape(-1) * z.to(work)).sum(dtype=torch.float64))
    return total


def sums(tensor: Tensor) -> tuple[float, float]:
    """(sum of x, sum of x^2) over all elements, in float64.

    On the CPU the order of the additions is fixed, whatever the number of threads, so that a replay finds them again.
    """
    tensor = _plain(tensor)
    if tensor.device.type == "cpu" and tensor.numel():
        from zotuner.noise import cpu

        return cpu.sums(tensor.to(torch.float32).contiguous())
    wide = tensor.double()
    return float(wide.sum()), float(wide.square().sum())


def _plain(tensor: Tensor) -> Tensor:
    """Without autograd; each call of torch that can be spared is one less for threads to meet at Python's lock."""
    return tensor.detach() if tensor.requires_grad else tensor


def _fused(tensor: Tensor) -> bool:
    """Whether the CPU kernels work on a tensor as it lies."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()


def _add_flat(
    out: Tensor, src: Tensor, alphas: Sequence[float], kind: str, addresses: Sequence[philox.Address], start: int
) -> None:
    """out = src + sum_k alpha_k z_k for contiguous tensors of one working precision."""
    if _fused(src):
        from zotuner.noise import cpu

        cpu.add(out, src, np.asarray(alphas, np.float32), kind, addresses[0], start)
        return
    terms = [
        torch.tensor(a, dtype=src.dtype, device=src.device)
        * _draw(kind, at, start, start + src.numel(), src.device).to(src.dtype)
        for a, at in zip(alphas, addresses, strict=True)
    ]
    out.copy_(src + functools.reduce(torch.add, terms).view(src.shape))


def _round(values: Tensor, drop: int, at: philox.Address, start: int) -> None:
    """Stochastic rounding in place, by the backend of a device."""
    if values.device.type == "cpu":
        from zotuner.noise import cpu

        cpu.round_(values, drop, at, start)
    else:
        philox.round_(values, drop, at, start)


def _draw(kind: str, at: philox.Address, start: int, stop: int, device: torch.device | str) -> Tensor:
    """Elements [start, stop) at an address, by the backend of a device."""
    if start == stop:
        return torch.empty(0, device=device)
    if torch.device(device).type == "cpu":
        from zotuner.noise import cpu

        return cpu.sample(kind, at, start, stop)
    return philox.sample(kind, at, start, stop, device)


def _row_chunks(tensor: Tensor) -> list[tuple[Any, int, int]]:
    """Cuts a tensor along its first dimension: (index, first element, one past the last) of each piece."""
    if tensor.numel() == 0:
        return []
    if tensor.ndim == 0:
        return [((), 0, 1)]
    width = tensor.numel() // tensor.shape[0]
    rows = max(1, CHUNK // width)
    bounds = [(r, min(r + rows, tensor.shape[0])) for r in range(0, tensor.shape[0], rows)]
    return [(slice(a, b), a * width, b * width) for a, b in bounds]
