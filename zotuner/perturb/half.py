"""Matrix products in bfloat16 that leave the difference of two losses right.

Rounding x and W + eps z to bfloat16 in each branch by itself costs the difference L+ - L- about a third of its value,
since the branches round differently. So they are taken apart into what they share and in what they differ, which meet
one and the same rounded W; z = +-1 is exact in bfloat16:

    two-point    m = (x+ + x-) / 2, d = (x+ - x-) / 2;   y+- = m W^T +- (d W^T + eps m z^T)
    one-sided    d_i = x_i - x_0;   y_0 = x_0 W^T,   y_i = y_0 + d_i W^T + eps x_i z_i^T

The first leaves out eps d z^T, which is of order eps^2 and the same in both branches. All else is float32: sums, norms,
attention, the losses.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def applies(alphas: Sequence[float | None]) -> bool:
    """Whether the factors of z (None: theta itself) are those of a two-point or of a one-sided step."""
    return _two_point(alphas) or (len(alphas) > 1 and alphas[0] is None and None not in alphas[1:])


def multiply(
    weight: Tensor,  # (rows, width) float32
    alphas: Sequence[float | None],  # the factor of z in each branch, for which `applies` holds
    inputs: Sequence[Tensor],  # (m, width) float32
    outputs: Sequence[Tensor],  # (m, rows) float32, filled
    noise: Callable[[int], Tensor] | None = None,  # of a branch: z, (rows, width) float32; None: leave z out
) -> None:
    """y_j = x_j (W + alpha_j z_j)^T."""
    pair = _two_point(alphas)
    parts = _mean_and_difference(*inputs) if pair else _differences(inputs)
    with rounded_products():
        products = list(torch.mm(parts, weight.t()).chunk(len(inputs)))
        if noise is not None:
            for j, x in enumerate([parts[: len(inputs[0])]] if pair else inputs[1:], start=1):
                products[j].add_(torch.mm(x, noise(j).t()), alpha=(alphas[0] if pair else alphas[j]) or 0.0)
    if pair:
        torch.add(*products, out=outputs[0])
        torch.sub(*products, out=outputs[1])
        return
    outputs[0].copy_(products[0])
    for y, product in zip(outputs[1:], products[1:], strict=True):
        torch.add(products[0], product, out=y)


@contextmanager
def rounded_products() -> Iterator[None]:
    """oneDNN rounds the inputs of float32 products to bfloat16, and adds up in float32, for a while."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _mean_and_difference(plus: Tensor, minus: Tensor) -> Tensor:
    """(2 m, width): the mean of both, and by how much the first exceeds it."""
    parts = plus.new_empty(2 * len(plus), plus.shape[1])
    mean, difference = parts.chunk(2)
    torch.add(plus, minus, out=mean).mul_(0.5)
    torch.sub(plus, mean, out=difference)
    return parts


def _differences(inputs: Sequence[Tensor]) -> Tensor:
    """(k m, width): the first, and by how much each other exceeds it."""
    parts = torch.cat(list(inputs))
    for part in parts.chunk(len(inputs))[1:]:
        part.sub_(inputs[0])
    return parts


def _two_point(alphas: Sequence[float | None]) -> bool:
    plus, minus = alphas if len(alphas) == 2 else (None, None)
    return plus is not None and minus is not None and plus == -minus
