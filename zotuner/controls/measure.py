"""G_i and C_i of each block, by backpropagation.

    batch k  ->  backward at theta: g_k, added up; at theta +- eps z_k: z_i . (g_i+ - g_i-) / (2 eps)

    G_i = (|sum_k g_ki|^2 - sum_k |g_ki|^2) / (K (K - 1)),   the mean of <g_ki, g_li> over k != l
    C_i = mean_k z_ki . (grad_i L_k(theta + eps z_k) - grad_i L_k(theta - eps z_k)) / (2 eps)

The sum of gradients is the one copy of the weights' size that is kept; each gradient is freed as it comes.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zotuner import noise
from zotuner.blocks import Block, Piece, pieces_of
from zotuner.card import MADE
from zotuner.config import STATISTIC
from zotuner.controls.scales import Estimate, Floats, Statistics, scales_of
from zotuner.controls.setting import Setting
from zotuner.errors import ZotunerError
from zotuner.gradients import block_dots, each_gradient
from zotuner.perturb import Draw, shift
from zotuner.progress import Display
from zotuner.tuner import Tuner

Loss = Callable[[], Tensor]  # differentiable, of one fixed batch


def measure(
    setting: Setting,
    display: Display,
    *,
    statistic: STATISTIC,
    power: float,
    batches: int,
    batch_size: int,
    eps: float,
    seed: int,
) -> tuple[Tuner, Statistics]:
    """A static tuner from gradients on a task, and what it stands on.

    Args:
        setting: Model and task.
        display: Where progress goes.
        statistic: sigma_i^2 ~ (G_i / C_i)^power, or (G_i / d_i)^power.
        power: See there.
        batches: K, at least 2.
        batch_size: Examples of each.
        eps: Size of a perturbation.
        seed: Of the noise and the order of batches.

    Raises:
        ZotunerError: Too few examples, or a loss that is not finite.
    """
    chosen = setting.disjoint(batch_size, seed, batches)
    curvature = statistic == "gradient-curvature"
    bar = display.bar("measure", batches)

    def losses() -> Iterable[Loss]:
        for batch in chosen:
            yield partial(setting.objective.loss, setting.model, batch)
            bar.advance()

    found = statistics_of(setting.blocks, losses(), eps=eps, seed=seed, curvature=curvature)
    bar.close()
    about: dict[str, Any] = {"statistic": statistic, "power": power, "batches": batches, "batch_size": batch_size}
    task = setting.objective.task.name
    made = f"measured on {task} by backpropagation on {batches} batches: a control"
    sigma = scales_of(found, setting.blocks, statistic, power)
    config = {MADE: made, **about, "eps": eps, "seed": seed}
    return Tuner.static(setting.model, sigma, config=config, **setting.about), found


def statistics_of(
    blocks: tuple[Block, ...], losses: Iterable[Loss], *, eps: float, seed: int, curvature: bool
) -> Statistics:
    """The estimates of the module's docstring.

    Args:
        blocks: Whose parameters are floating-point; they come back to where they were, to within rounding.
        losses: One a batch, two at least.
        eps: Size of the perturbation by which gradients are compared.
        seed: Of z; batch k has step k.
        curvature: Whether C_i is wanted.
    """
    total = {piece: torch.zeros_like(piece.view, dtype=torch.float32) for _, piece in pieces_of(blocks)}
    squares, traces = np.zeros(len(blocks)), []

    def add(number: int, piece: Piece, gradient: Tensor) -> None:
        total[piece] += gradient
        squares[number] += noise.sums(gradient)[1]

    count = 0
    for step, loss in enumerate(losses):
        with each_gradient(blocks, add):
            _backward(loss, step)
        if curvature:
            traces.append(_traces(blocks, loss, Draw("rademacher", seed, step), eps))
        count = step + 1
    if count < 2:
        raise ValueError(f"the signal in a gradient takes products of different batches: at least 2, got {count}")
    whole = np.array([sum(noise.sums(total[piece])[1] for piece in block.pieces) for block in blocks])
    return Statistics(
        Estimate((whole - squares) / (count * (count - 1))),
        Estimate(np.mean(traces, axis=0), np.std(traces, axis=0, ddof=1) / count**0.5) if curvature else None,
        {"gradient_with_noise": squares / count},
    )


def _traces(blocks: tuple[Block, ...], loss: Loss, draw: Draw, eps: float) -> Floats:
    """(n,) z_i . (grad_i L(theta + eps z) - grad_i L(theta - eps z)) / (2 eps)."""
    at, dots = 0.0, torch.zeros(2, len(blocks), dtype=torch.float64)
    try:
        for row, to in zip(dots, (eps, -eps), strict=True):
            shift(blocks, draw, [[to - at]] * len(blocks))
            at = to
            with block_dots(blocks, draw, row):
                _backward(loss, draw.step)
    finally:
        shift(blocks, draw, [[-at]] * len(blocks))
    return np.asarray((dots[0] - dots[1]) / (2 * eps))


def _backward(loss: Loss, batch: int) -> None:
    value = loss()
    if not bool(torch.isfinite(value)):
        raise ZotunerError(f"batch {batch}: expected a finite loss, got {float(value.detach())}; try a smaller --eps")
    value.backward()
