"""bfloat16 products: the difference of two losses survives them."""

from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor

from zotuner import FZOO, MeZO
from zotuner.perturb import half

EPS = 1e-3
IDS = torch.arange(96).view(8, 12) * 7 % 61


def closure_of(model: Any) -> Callable[..., Tensor]:
    def closure(branches: int = 1) -> Tensor:
        logits = model(input_ids=IDS.repeat(branches, 1)).logits[:, :-1]
        losses = [
            torch.nn.functional.cross_entropy(part.flatten(0, 1), IDS[:, 1:].flatten())
            for part in logits.chunk(branches)
        ]
        return losses[0] if branches == 1 else torch.stack(losses)

    return closure


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def products(alphas: list[float | None], inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(ours, in float64, rounded a branch at a time) of x_j (W + alpha_j z_j)^T."""
    w = 0.05 * drawn(48, 64, seed=1)
    z = [torch.sign(drawn(48, 64, seed=2 if alphas[0] is not None else 2 + j)) for j in range(len(alphas))]
    outputs = [torch.empty(len(x), 48) for x in inputs]
    half.multiply(w, alphas, inputs, outputs, lambda j: z[0 if alphas[0] is not None else j])
    moved = [w + (alpha or 0.0) * n for alpha, n in zip(alphas, z, strict=True)]
    exact = [x.double() @ m.double().t() for x, m in zip(inputs, moved, strict=True)]
    plain = [(x.bfloat16() @ m.bfloat16().t()).float() for x, m in zip(inputs, moved, strict=True)]
    return outputs, exact, plain


def error(came: list[Tensor], exact: list[Tensor]) -> float:
    """Of the last branch's difference from the first, relative to it."""
    wanted = exact[-1] - exact[0]
    return float((came[-1] - came[0] - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("alphas", [[EPS, -EPS], [None, EPS, EPS]])
def test_the_difference_of_two_products_keeps_its_value_which_plain_rounding_does_not(
    alphas: list[float | None],
) -> None:
    x, d = drawn(32, 64, seed=0), drawn(32, 64, seed=9)
    inputs = [x + 1e-3 * j * d for j in range(len(alphas))]
    ours, exact, plain = products(alphas, inputs)
    assert error(ours, exact) < 0.01
    assert error(plain, exact) > 20 * error(ours, exact)
    for came, wanted in zip(ours, exact, strict=True):
        assert torch.allclose(came.double(), wanted, atol=0.02)


def test_it_serves_two_point_and_one_sided_steps_alone() -> None:
    assert half.applies([EPS, -EPS])
    assert half.applies([None, EPS, EPS])
    assert not half.applies([EPS])
    assert not half.applies([None])
    assert not half.applies([EPS, EPS])
    assert not half.applies([EPS, EPS, EPS])


def processor_rounds() -> bool:
    """Whether oneDNN multiplies in bfloat16 here; on a processor that has no such products it keeps to float32."""
    a = torch.linspace(0.1, 1, 256).view(16, 16)
    with half.rounded_products():
        return float((a @ a - a.double() @ a.double()).abs().max()) > 1e-4


@pytest.mark.parametrize("method", [MeZO, FZOO])
@pytest.mark.parametrize("noise", ["rademacher", "gaussian", "low-rank"])
def test_the_differences_of_a_steps_losses_are_those_of_float32(method: Any, noise: str) -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=128)
    exact = method(model, lr=1e-12, noise=noise)
    rounded = method(model, lr=1e-12, noise=noise, compute_dtype=torch.bfloat16)
    errors = []
    for _ in range(20):
        for opt in (exact, rounded):
            opt.step(closure_of(model))
        wanted, came = ([x - opt.last.losses[0] for x in opt.last.losses[1:]] for opt in (exact, rounded))
        errors += [abs(a - b) / abs(b) for a, b in zip(came, wanted, strict=True)]
    assert median(errors) < 0.05
    assert not processor_rounds() or median(errors) > 0


def test_a_closure_without_branches_is_served_in_float32() -> None:
    model = tiny_llama()
    stacked = closure_of(model)

    def closure() -> Tensor:
        return stacked()

    losses = []
    for dtype in (None, torch.bfloat16):
        opt = MeZO(model, lr=1e-12, compute_dtype=dtype)
        opt.step(closure)
        assert opt.last is not None
        losses.append(opt.last.losses)
    assert losses[0] == losses[1]


def test_other_compute_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"compute_dtype must be None or torch\.bfloat16, got torch\.float16"):
        MeZO(tiny_llama(), compute_dtype=torch.float16)
