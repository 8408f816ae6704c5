"""Stochastic rounding: to one of the two neighbours, without bias, as a function of the coordinates alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zotuner import noise
from zotuner.noise import cpu, philox

AT = {"seed": 11, "step": 5, "block": 3}
SMALLEST = 2.0**-24  # float16's spacing below 2^-14
STEPS, SIGMAS = 3000, 5.0

halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def rounded(values: Tensor, dtype: torch.dtype, start: int = 0, **changed: int) -> Tensor:
    """What `round_to_` makes of a copy."""
    return noise.round_to_(values.clone(), dtype, start=start, **{**AT, **changed})


def same_bits(a: Tensor, b: Tensor) -> bool:
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(words), b.contiguous().view(words))


def every(dtype: torch.dtype) -> Tensor:
    """Every value of a type of 16 bits, as float32: zeros, subnormal numbers, infinities and NaN among them."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()


def patterns(n: int = 1 << 16) -> Tensor:
    """float32 of any bits: every exponent, both signs."""
    return torch.randint(-(2**31), 2**31, (n,), generator=torch.Generator().manual_seed(3)).int().view(torch.float32)


def between(dtype: torch.dtype) -> Tensor:
    """Finite values of both signs in the range of a type, few of them its own; float16's subnormal range too."""
    draw = torch.Generator().manual_seed(4)
    low = -26 if dtype == torch.float16 else -120
    exponents = torch.randint(low, 15, (4000,), generator=draw)
    values = torch.ldexp(1 + torch.rand(4000, generator=draw), exponents)
    return torch.cat([values, -values, torch.arange(-64, 65) * SMALLEST / 8])


def neighbours(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The type's largest magnitude that is not above a value's, and the next one, in float64."""
    size = values.double().abs()
    nearest = values.abs().to(dtype)
    low = nearest.view(torch.int16) - (nearest.double() > size).short()
    return low.view(dtype).double(), (low + 1).view(dtype).double()


@halves
@pytest.mark.parametrize("start", [0, 1000, cpu.GRAIN - 3])
def test_the_kernel_agrees_with_the_torch_reference_on_every_bit(dtype: torch.dtype, start: int) -> None:
    values = torch.cat([patterns(), every(torch.float16), every(torch.bfloat16), between(dtype)])
    expected = values.clone()
    philox.round_(expected, philox.DROPPED[dtype], philox.rounding_address(**AT), start)
    assert values.numel() > cpu.GRAIN
    assert same_bits(rounded(values, dtype, start), expected)


@halves
def test_values_that_the_type_has_stay(dtype: torch.dtype) -> None:
    values = every(dtype)
    for step in range(20):
        assert same_bits(rounded(values, dtype, step=step), values)
    src = values[torch.isfinite(values)].to(dtype)
    noise.add(src, 0.0, out=(out := src.clone()), kind="gaussian", rounding="stochastic", **AT)
    assert torch.equal(out, src)


@halves
def test_the_result_is_one_of_the_two_neighbours_and_unbiased(dtype: torch.dtype) -> None:
    values = between(dtype)
    low, high = neighbours(values, dtype)
    up = torch.zeros(len(values))
    for step in range(STEPS):
        found = rounded(values, dtype, step=step)
        assert torch.equal(found.to(dtype).float(), found)
        size = found.double().abs()
        assert bool(((size == low) | (size == high)).all())
        assert bool((found.signbit() == values.signbit()).all())
        up += size == high
    share = (values.double().abs() - low) / (high - low)
    error = up.double() / STEPS - share
    spread = (share * (1 - share) / STEPS).sqrt()
    assert bool((error.abs() <= SIGMAS * spread + 2 / STEPS).all())
    for side in (values > 0, values < 0):
        assert abs(float(error[side].sum())) < SIGMAS * float(spread[side].square().sum().sqrt())


@halves
def test_what_lies_beyond_the_range_becomes_infinite_or_the_largest(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    values = torch.tensor([largest, -largest, float("inf"), -float("inf")])
    assert torch.equal(rounded(values, dtype).to(dtype).float(), values)
    beyond = torch.full((4000,), largest * (1 + torch.finfo(dtype).eps / 8))
    found = rounded(beyond, dtype).to(dtype).float()
    assert set(found.tolist()) == {largest, float("inf")}
    assert float(found.isinf().float().mean()) == pytest.approx(0.25, abs=0.05)
    assert bool(rounded(torch.tensor([float("nan")]), dtype).isnan().all())


@halves
def test_the_word_depends_on_seed_step_block_and_element_alone(dtype: torch.dtype) -> None:
    values = torch.full((3000,), 1 + torch.finfo(dtype).eps / 2)
    whole = rounded(values, dtype, start=700)
    for cut in (1, 512, 1733):
        parts = [rounded(values[:cut], dtype, start=700), rounded(values[cut:], dtype, start=700 + cut)]
        assert same_bits(torch.cat(parts), whole)
    for changed in ({"seed": 12}, {"seed": AT["seed"] + 2**32}, {"step": 6}, {"block": 4}, {"start": 701}):
        other = rounded(values, dtype, **{"start": 700, **changed})
        assert float((other == whole).float().mean()) == pytest.approx(0.5, abs=0.05)


@halves
def test_an_update_is_rounded_alike_whatever_the_noise_and_the_chunks(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = torch.full((60, 50), 1 + torch.finfo(dtype).eps / 2)
    expected = rounded(src.view(-1), dtype, start=9).view(60, 50).to(dtype)

    def added(kind: str, branch: int) -> Tensor:
        out = torch.empty(60, 50, dtype=dtype)
        return noise.add(src, 0.0, out=out, kind=kind, branch=branch, start=9, rounding="stochastic", **AT)

    assert same_bits(added("gaussian", 0), expected)
    assert same_bits(added("rademacher", 3), expected)
    monkeypatch.setattr(noise, "CHUNK", 130)
    assert same_bits(added("rademacher", 3), expected)


@halves
@pytest.mark.parametrize("kind", noise.KINDS)
def test_strided_views_are_rounded_like_contiguous_tensors(dtype: torch.dtype, kind: str) -> None:
    def values(*shape: int) -> Tensor:
        return (torch.linspace(-1, 1, torch.Size(shape).numel()) ** 3).view(shape).to(dtype)

    views: dict[str, Callable[[Tensor], Tensor]] = {
        "columns": lambda whole: whole[:, 32:64],
        "transposed": lambda whole: whole.T,
        "every other": lambda whole: whole.view(-1)[::2],
    }
    for cut in views.values():
        whole, kept = values(40, 96), values(40, 96)
        how: dict[str, Any] = {"kind": kind, "start": 77, "rounding": "stochastic", **AT}
        apart = noise.add_(cut(kept).contiguous(), [1e-4, 2e-4], **how)
        exact = torch.empty(apart.shape)
        noise.add(cut(kept).float(), [1e-4, 2e-4], out=exact, kind=kind, start=77, **AT)
        assert same_bits(apart, rounded(exact.view(-1), dtype, start=77).view(exact.shape).to(dtype))
        noise.add_(cut(whole), [1e-4, 2e-4], **how)
        assert same_bits(cut(whole), apart)
        cut(whole).copy_(cut(kept))
        assert same_bits(whole, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_types_are_not_rounded(dtype: torch.dtype) -> None:
    src = torch.linspace(-1, 1, 3000, dtype=torch.float64).to(dtype)
    for values in (src, src.view(60, 50).T):
        nearest, found = torch.empty_like(values), torch.empty_like(values)
        noise.add(values, [0.1, 0.2], out=nearest, kind="gaussian", **AT)
        noise.add(values, [0.1, 0.2], out=found, kind="gaussian", rounding="stochastic", **AT)
        assert same_bits(found, nearest)
    single = src.float()
    assert same_bits(rounded(single, dtype), single)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unknown_rounding_is_refused(dtype: torch.dtype) -> None:
    tensor = torch.ones(10, dtype=dtype)
    with pytest.raises(ValueError, match="'nearest' or 'stochastic', got 'up'"):
        noise.add_(tensor, 0.5, kind="gaussian", rounding="up", **AT)
    assert torch.equal(tensor, torch.ones(10, dtype=dtype))


def test_the_number_of_threads_does_not_matter() -> None:
    values, before, found = patterns(3 * cpu.GRAIN), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(rounded(values, torch.bfloat16, start=5))
    finally:
        torch.set_num_threads(before)
    assert same_bits(*found)


@pytest.mark.parametrize("kind", noise.KINDS)
def test_an_update_far_below_the_spacing_arrives_in_the_mean(kind: str) -> None:
    nearest, weights = (torch.full((1024,), 0.02, dtype=torch.bfloat16) for _ in range(2))
    start, arrived, size = nearest.clone(), 0.0, 0.0
    for step in range(2000):
        at: dict[str, Any] = {"kind": kind, "seed": 1, "step": step, "block": 0}
        before = weights.double()
        noise.add_(weights, 2e-6, rounding="stochastic", **at)
        noise.add_(nearest, 2e-6, **at)
        z = noise.sample(start=0, stop=1024, **at).double()
        arrived += float(z @ (weights.double() - before))
        size += float(z @ z)
    assert arrived / size == pytest.approx(2e-6, rel=0.05)
    assert torch.equal(nearest, start)
