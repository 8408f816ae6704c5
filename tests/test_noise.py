"""Noise: the published vectors, an independent twin in plain integers, statistics, and the fused forms."""

import functools
import hashlib
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zotuner import noise
from zotuner.noise import cpu, philox

AT = {"seed": 11, "step": 5, "block": 3, "branch": 2}
MASK = 0xFFFFFFFF
TILE, GRAIN = philox.TILE, cpu.GRAIN
LONG = 4 * GRAIN  # elements: several grains of the parallel kernels
N = 1 << 20  # elements a statistic is taken over
SIGMAS = 5.0  # of a statistic's standard error

KNOWN_ANSWERS = [  # Random123, kat_vectors, philox4x32 10: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_twin(counter: Sequence[int], key: Sequence[int]) -> tuple[int, ...]:
    """Philox4x32-10 as the paper writes it, in Python's integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ k, q & MASK, (p >> 32) ^ d ^ m, p & MASK
        k, m = (k + 0x9E3779B9) & MASK, (m + 0xBB67AE85) & MASK
    return a, b, c, d


def element_twin(kind: str, element: int, *, seed: int, step: int, block: int, branch: int) -> float:
    """One element of z by the documented layout of the counter, without tensors."""
    if kind == "rademacher":
        number, (call, place) = 1, divmod(element, 128)
    else:
        tile, inside = divmod(element, 512)
        number, (place, lane) = 0, divmod(inside, 128)
        call = 128 * tile + lane
    counter = (call & MASK, call >> 32 | branch << 8, step, block | number << 24)
    words = philox_twin(counter, (seed & MASK, seed >> 32))
    if kind == "rademacher":
        return 2.0 * (words[place // 32] >> place % 32 & 1) - 1.0
    radius, angle = words[:2] if place < 2 else words[2:]
    u = float(np.float32(radius) * np.float32(2.0**-32) + np.float32(2.0**-33))
    phi = 2 * math.pi * (angle - 2**29) / 2**32
    return math.sqrt(-2 * math.log(u)) * (math.cos, math.sin)[place % 2](phi)


def sample(kind: str, start: int, stop: int, **changed: int) -> Tensor:
    """`noise.sample` at `AT` but for what is given."""
    return noise.sample(kind, start=start, stop=stop, **{**AT, **changed})


def reference(kind: str, start: int, stop: int, **changed: int) -> Tensor:
    """The same from the torch backend."""
    return philox.sample(kind, philox.address(kind, **{**AT, **changed}), start, stop)


@functools.cache
def long_sample(kind: str) -> Tensor:
    return sample(kind, 0, LONG)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit, so that 0 differs from -0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.contiguous().view(words), b.contiguous().view(words))


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, in float64; its standard error for independent elements is 1 / sqrt(n)."""
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads; the old one comes back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# The generator


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_the_torch_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    found = philox.philox4x32([torch.tensor([word]) for word in counter], key)
    assert tuple(int(word) for word in found) == words
    assert philox_twin(counter, key) == words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_the_numba_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    found = cpu._philox(np.uint64(counter[0]), *(np.uint32(word) for word in (*counter[1:], *key)))
    assert tuple(int(word) for word in found) == words


def test_a_call_takes_each_of_the_counters_words_on_its_own() -> None:
    columns = torch.tensor([counter for counter, _, _ in KNOWN_ANSWERS]).T
    found = torch.stack(philox.philox4x32(list(columns), (1, 2)), dim=1)
    assert found.tolist() == [list(philox_twin(counter, (1, 2))) for counter, _, _ in KNOWN_ANSWERS]


@given(
    kind=st.sampled_from(noise.KINDS),
    element=st.integers(0, philox.MAX_ELEMENTS - 1),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**32 - 1),
    block=st.integers(0, 2**24 - 1),
    branch=st.integers(0, 2**24 - 1),
)
@settings(deadline=None, max_examples=100)
def test_every_element_is_the_documented_function_of_its_coordinates(kind: str, element: int, **at: int) -> None:
    z = float(noise.sample(kind, start=element, stop=element + 1, **at))
    assert z == pytest.approx(element_twin(kind, element, **at), abs=0 if kind == "rademacher" else 1e-5)


def test_coordinates_may_be_numpy_integers() -> None:
    as_numpy = {name: np.int64(value) for name, value in AT.items()}
    for kind in noise.KINDS:
        assert same_bits(noise.sample(kind, start=np.int64(5), stop=np.int64(900), **as_numpy), sample(kind, 5, 900))


# Two backends, one function


@pytest.mark.parametrize(("start", "stop"), [(0, LONG), (1, 2), (511, 513), (GRAIN - 1, GRAIN + 1), (777, 200_001)])
def test_rademacher_is_bit_identical_on_both_backends(start: int, stop: int) -> None:
    assert same_bits(sample("rademacher", start, stop), reference("rademacher", start, stop))


@pytest.mark.parametrize(("start", "stop"), [(0, LONG), (1, 2), (511, 513), (GRAIN - 1, GRAIN + 1), (777, 200_001)])
def test_gaussian_is_within_1e_5_on_both_backends(start: int, stop: int) -> None:
    assert float((sample("gaussian", start, stop) - reference("gaussian", start, stop)).abs().max()) < 1e-5


def test_rademacher_is_plus_or_minus_one() -> None:
    assert set(long_sample("rademacher").tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("kind", noise.KINDS)
def test_an_empty_range_gives_an_empty_tensor(kind: str) -> None:
    for at in (0, 700, philox.MAX_ELEMENTS):
        z = sample(kind, at, at)
        assert (z.shape, z.dtype) == ((0,), torch.float32)


FAR = [
    {"seed": 5},
    {"seed": 2**32 + 5},
    {"seed": 5 * 2**32 + 5},
    {"seed": 2**64 - 1},
    {"step": 2**32 - 1},
    {"step": 2**31},
    {"branch": 2**24 - 1},
    {"branch": 2**23},
    {"block": 2**24 - 1},
    {"block": 2**23},
]


@pytest.mark.parametrize("kind", noise.KINDS)
def test_far_addresses_differ_and_agree_on_both_backends(kind: str) -> None:
    starts = (0, 2**32 - 300, 2**32, 2**39 - 300, 2**40 - 300, 2**40, philox.MAX_ELEMENTS - 700)
    places: list[tuple[int, dict[str, int]]] = [(start, {}) for start in starts] + [(0, far) for far in FAR]
    places.append((philox.MAX_ELEMENTS - 700, {name: limit - 1 for name, limit in philox.LIMITS.items()}))
    seen = set()
    for start, far in places:
        z, other = (f(kind, start, start + 700, **far) for f in (sample, reference))
        assert float((z - other).abs().max()) <= (0 if kind == "rademacher" else 1e-5), (start, far)
        seen.add(z.numpy().tobytes())
    assert len(seen) == len(places)


# A pure function


@given(data=st.data(), kind=st.sampled_from(noise.KINDS))
@settings(deadline=None, max_examples=60)
def test_any_range_is_the_slice_of_a_longer_one(data: st.DataObject, kind: str) -> None:
    near = st.builds(
        lambda edge, off: min(max(edge + off, 0), LONG),
        st.sampled_from([0, TILE, 3 * TILE, GRAIN, 2 * GRAIN, LONG]),
        st.integers(-3, 3),
    )
    bound = st.one_of(st.integers(0, LONG), near)
    start, stop = sorted((data.draw(bound), data.draw(bound)))
    assert same_bits(sample(kind, start, stop), long_sample(kind)[start:stop])


@given(start=st.integers(0, 5000), length=st.integers(0, 3000), kind=st.sampled_from(noise.KINDS))
@settings(deadline=None, max_examples=30)
def test_the_reference_addresses_by_element_too(start: int, length: int, kind: str) -> None:
    assert same_bits(reference(kind, start, start + length), reference(kind, 0, 8000)[start : start + length])


@pytest.mark.parametrize("kind", noise.KINDS)
def test_the_order_of_calls_does_not_matter(kind: str) -> None:
    places = [(start, start + 1000, {"step": step}) for start in (0, 300, GRAIN) for step in (0, 1)]
    forth = [sample(kind, start, stop, **at) for start, stop, at in places]
    back = [sample(kind, start, stop, **at) for start, stop, at in reversed(places)]
    assert all(same_bits(a, b) for a, b in zip(forth, reversed(back), strict=True))


@pytest.mark.parametrize("kind", noise.KINDS)
def test_the_number_of_threads_does_not_matter(kind: str, torch_threads: Callable[[int], None]) -> None:
    src, found = torch.linspace(-1, 1, LONG), []
    for threads in (1, 2):
        torch_threads(threads)
        added = noise.add(src, [0.1, 0.2], out=torch.empty_like(src), kind=kind, **AT)
        found.append((sample(kind, 100, LONG), added, noise.dot(src, kind=kind, **AT)))
    (z1, added1, dot1), (z2, added2, dot2) = found
    assert same_bits(z1, z2)
    assert same_bits(added1, added2)
    assert dot1 == dot2


IN_ANOTHER_PROCESS = """
import hashlib, json, sys
from zotuner import noise
at = json.loads(sys.argv[1])
noise.sample("gaussian", seed=99, step=0, block=0, start=0, stop=10)
digests = {k: hashlib.sha256(noise.sample(k, start=77, stop=150_077, **at).numpy()).hexdigest() for k in noise.KINDS}
print(json.dumps(digests))
"""


def test_another_process_gives_the_same_bytes() -> None:
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, json.dumps(AT)]
    environment = os.environ | {"NUMBA_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ours = {kind: hashlib.sha256(sample(kind, 77, 150_077).numpy()).hexdigest() for kind in noise.KINDS}
    assert json.loads(done.stdout) == ours


def test_the_global_random_state_is_neither_set_nor_read() -> None:
    def draw() -> list[Tensor]:
        drawn = [sample(kind, 0, 2000) for kind in noise.KINDS]
        for kind in noise.KINDS:
            for dtype in (torch.float32, torch.bfloat16):
                drawn.append(noise.add(torch.ones(500, dtype=dtype), 0.5, out=torch.empty(500), kind=kind, **AT))
            drawn.append(torch.tensor(noise.dot(torch.ones(500), kind=kind, **AT)))
            drawn.append(reference(kind, 0, 2000))
        return drawn

    torch_before, numpy_before, python_before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    first = draw()
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert str(np.random.get_state()) == str(numpy_before)
    assert random.getstate() == python_before
    try:
        torch.manual_seed(123)
        np.random.seed(123)
        random.seed(123)
        second = draw()
    finally:
        torch.set_rng_state(torch_before)
        np.random.set_state(numpy_before)
        random.setstate(python_before)
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


# Statistics; the addresses are fixed, so these either hold or do not


def test_gaussian_moments_are_the_normal_ones() -> None:
    z = sample("gaussian", 0, N).double()
    errors = {1: math.sqrt(1 / N), 2: math.sqrt(2 / N), 3: math.sqrt(15 / N), 4: math.sqrt(96 / N)}  # sd of mean z^k
    for power, error in errors.items():
        expected = {1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0}[power]
        assert abs(float((z**power).mean()) - expected) < SIGMAS * error, power


def test_gaussian_follows_the_normal_distribution_function() -> None:
    n = 100_000
    z = np.sort(sample("gaussian", 0, n).double().numpy())
    cdf = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in z])
    ranks = np.arange(n + 1) / n
    distance = max(np.abs(cdf - ranks[1:]).max(), np.abs(cdf - ranks[:-1]).max())
    assert distance < 2.0 / math.sqrt(n)  # Kolmogorov and Smirnov: exceeded once in 1,500 draws


def test_gaussian_has_the_normal_tails_on_both_sides() -> None:
    z = sample("gaussian", 0, 4 * N)
    for bound in (3.0, 4.0):
        share = 0.5 * math.erfc(bound / math.sqrt(2))
        expected = 4 * N * share
        for side in (z, -z):
            assert abs(int((side > bound).sum()) - expected) < SIGMAS * math.sqrt(expected), bound
    assert 4.5 < float(z.abs().max()) < math.sqrt(2 * 33 * math.log(2)) + 1e-4  # the smallest u is 2^-33


def test_each_of_a_calls_128_signs_is_balanced() -> None:
    calls = N // 128
    means = sample("rademacher", 0, N).view(calls, 128).mean(dim=0)
    assert float(means.abs().max()) < SIGMAS / math.sqrt(calls)
    assert float(means.abs().max()) > 0


def test_each_output_of_a_gaussian_call_is_standard_normal() -> None:
    outputs = sample("gaussian", 0, N).view(-1, 4, 128).transpose(0, 1).reshape(4, -1).double()
    n = outputs.shape[1]
    assert float(outputs.mean(dim=1).abs().max()) < SIGMAS / math.sqrt(n)
    assert float((outputs.var(dim=1) - 1).abs().max()) < SIGMAS * math.sqrt(2 / n)


@pytest.mark.parametrize("kind", noise.KINDS)
@pytest.mark.parametrize("lag", [1, 2, 32, 128, 256, 384, TILE, GRAIN])
def test_elements_of_one_vector_are_uncorrelated(kind: str, lag: int) -> None:
    z = sample(kind, 0, N + lag)
    assert abs(correlation(z[:N], z[lag:])) < SIGMAS / math.sqrt(N)
    if kind == "gaussian":  # nor do they share a radius
        assert abs(correlation(z[:N] ** 2, z[lag:] ** 2)) < SIGMAS / math.sqrt(N)


NEIGHBOURS = [
    {"block": AT["block"] + 1},
    {"block": AT["block"] + 256},
    {"step": AT["step"] + 1},
    {"branch": AT["branch"] + 1},
    {"branch": 0},
    {"seed": AT["seed"] + 1},
    {"seed": AT["seed"] + 2**32},
    {"step": AT["branch"], "branch": AT["step"]},
    {"step": AT["block"], "block": AT["step"]},
    {"step": AT["seed"], "seed": AT["step"]},
]


@pytest.mark.parametrize("kind", noise.KINDS)
@pytest.mark.parametrize("other", NEIGHBOURS, ids=str)
def test_vectors_at_different_coordinates_are_uncorrelated(kind: str, other: dict[str, int]) -> None:
    n = N // 4
    assert abs(correlation(sample(kind, 0, n), sample(kind, 0, n, **other))) < SIGMAS / math.sqrt(n)


def test_the_two_kinds_are_uncorrelated() -> None:
    assert abs(correlation(sample("gaussian", 0, N), sample("rademacher", 0, N))) < SIGMAS / math.sqrt(N)


# Fused forms


def ramp(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of many magnitudes and both signs."""
    n = math.prod(shape)
    return (torch.linspace(-1, 1, n, dtype=torch.float64) ** 3).reshape(shape).to(dtype)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "vector": lambda: ramp(1000),
    "several grains": lambda: ramp(3, 50_000),
    "columns": lambda: ramp(40, 96)[:, 32:64],
    "transposed": lambda: ramp(33, 70).T,
    "every other": lambda: ramp(2001)[::2],
    "three dimensions": lambda: ramp(4, 5, 77),
    "bfloat16": lambda: ramp(60, 100, dtype=torch.bfloat16),
    "bfloat16 columns": lambda: ramp(60, 100, dtype=torch.bfloat16)[:, 7:50],
    "float16": lambda: ramp(60, 100, dtype=torch.float16),
    "float64": lambda: ramp(60, 100, dtype=torch.float64),
    "one element": lambda: ramp(3)[2:],
    "no dimension": lambda: torch.tensor(0.75),
    "no dimension, bfloat16": lambda: torch.tensor(0.75, dtype=torch.bfloat16),
    "empty": lambda: ramp(0),
    "rows of nothing": lambda: ramp(4, 0, dtype=torch.bfloat16),
}
ALPHAS: list[float | list[float]] = [1e-3, -2.0, 0.0, [0.1], [1e-3, -0.7, 0.3]]


def add_twin(src: Tensor, alpha: float | list[float], kind: str, start: int, dtype: torch.dtype) -> Tensor:
    """`sample`, then numpy's arithmetic in float32 (float64 for float64), then one rounding."""
    work = np.float64 if src.dtype == torch.float64 else np.float32
    alphas = alpha if isinstance(alpha, list) else [alpha]
    total = np.zeros(src.numel(), work)
    for k, a in enumerate(alphas):
        z = sample(kind, start, start + src.numel(), branch=AT["branch"] + k).numpy().astype(work)
        total = work(a) * z if k == 0 else total + work(a) * z
    values = src.double().numpy().astype(work).reshape(-1)
    return torch.from_numpy(values + total).reshape(src.shape).to(dtype)


@pytest.mark.parametrize("kind", noise.KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_add_equals_sample_and_float32_arithmetic_bit_for_bit(layout: str, kind: str) -> None:
    src = LAYOUTS[layout]()
    for alpha in ALPHAS:
        for start in (0, 1000, GRAIN - 3):
            expected = add_twin(src, alpha, kind, start, src.dtype)
            kept = src.clone()
            out = torch.full_like(src, torch.nan)
            assert noise.add(src, alpha, out=out, kind=kind, start=start, **AT) is out
            assert same_bits(out, expected)
            assert same_bits(src, kept)
            inplace = LAYOUTS[layout]()
            assert noise.add_(inplace, alpha, kind=kind, start=start, **AT) is inplace
            assert same_bits(inplace, expected)


@pytest.mark.parametrize("kind", noise.KINDS)
def test_add_leaves_the_rest_of_a_larger_tensor_alone(kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        whole = ramp(40, 96, dtype=dtype)
        expected = whole.clone()
        expected[:, 32:64] = add_twin(whole[:, 32:64], 0.5, kind, 0, dtype)
        noise.add_(whole[:, 32:64], 0.5, kind=kind, **AT)
        assert same_bits(whole, expected)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_add_rounds_once_to_the_dtype_of_out(source: torch.dtype, target: torch.dtype) -> None:
    src, out = ramp(30, 40, dtype=source), torch.empty(30, 40, dtype=target)
    noise.add(src, [0.3, 0.1], out=out, kind="gaussian", **AT)
    assert same_bits(out, add_twin(src, [0.3, 0.1], "gaussian", 0, target))


@pytest.mark.parametrize("shape", [(1029, 1024), (noise.CHUNK + 5,), (1, noise.CHUNK + 5)], ids=str)
def test_more_than_a_chunk_of_bfloat16_is_added_whole(shape: tuple[int, ...]) -> None:
    src = ramp(*shape, dtype=torch.bfloat16)
    assert src.numel() > noise.CHUNK
    expected = add_twin(src, 0.01, "rademacher", 9, torch.bfloat16)
    assert same_bits(noise.add_(src, 0.01, kind="rademacher", start=9, **AT), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_alpha_adds_nothing(dtype: torch.dtype) -> None:
    src = ramp(1000, dtype=dtype)
    out = torch.full_like(src, torch.nan)
    noise.add(src, [], out=out, kind="rademacher", **AT)
    assert same_bits(out, src)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_takes_parameters_that_require_grad(dtype: torch.dtype) -> None:
    param = torch.nn.Parameter(ramp(30, 40, dtype=dtype))
    expected = add_twin(param.detach(), 0.5, "gaussian", 0, dtype)
    noise.add_(param, 0.5, kind="gaussian", **AT)
    assert same_bits(param.detach(), expected)
    assert param.grad_fn is None
    assert isinstance(noise.dot(param, kind="gaussian", **AT), float)


ROWS = [5, 0, 5, 39, 2, 2, 38]  # repeated and unsorted


@pytest.mark.parametrize("kind", noise.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width", [1, 33, 700])
def test_add_rows_equals_rows_of_the_whole_bit_for_bit(width: int, dtype: torch.dtype, kind: str) -> None:
    wide = ramp(40, width + 3, dtype=dtype)
    for src in (wide[:, :width].contiguous(), wide[:, 3:]):
        for start in (0, 1000, GRAIN - 3):
            whole = noise.add(src, 0.3, out=torch.empty_like(src), kind=kind, start=start, **AT)
            for rows in (torch.tensor(ROWS), torch.arange(40)[::3], torch.tensor([], dtype=torch.int64)):
                found = noise.add_rows(src, rows, 0.3, kind=kind, start=start, **AT)
                assert same_bits(found, whole[rows])
    assert same_bits(wide, ramp(40, width + 3, dtype=dtype))


@pytest.mark.parametrize("kind", noise.KINDS)
def test_add_rows_is_the_same_on_all_threads(kind: str, torch_threads: Callable[[int], None]) -> None:
    src, rows, found = ramp(600, 500), torch.arange(600).flip(0), []
    assert src.numel() > GRAIN
    for threads in (1, 2):
        torch_threads(threads)
        found.append(noise.add_rows(src, rows, 0.3, kind=kind, **AT))
    assert same_bits(*found)
    assert same_bits(found[0], noise.add(src, 0.3, out=torch.empty_like(src), kind=kind, **AT).flip(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [-1, 40])
def test_a_row_that_is_not_there_is_refused(wrong: int, dtype: torch.dtype) -> None:
    with pytest.raises(IndexError, match=r"rows must lie in \[0, 40\), got"):
        noise.add_rows(ramp(40, 8, dtype=dtype), torch.tensor([3, wrong]), 0.3, kind="rademacher", **AT)


@pytest.mark.parametrize("kind", noise.KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dot_is_the_float64_sum_of_float32_products(layout: str, kind: str) -> None:
    g = LAYOUTS[layout]()
    work = torch.promote_types(g.dtype, torch.float32)
    for start in (0, GRAIN - 3):
        z = sample(kind, start, start + g.numel()).to(work)
        expected = math.fsum((g.to(work).reshape(-1) * z).double().tolist())
        assert noise.dot(g, kind=kind, start=start, **AT) == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dot_over_more_than_a_chunk_is_whole(dtype: torch.dtype) -> None:
    g = ramp(1029, 1024, dtype=dtype)
    expected = math.fsum((g.float().reshape(-1) * sample("gaussian", 9, 9 + g.numel())).tolist())
    assert noise.dot(g, kind="gaussian", start=9, **AT) == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.parametrize("kind", noise.KINDS)
def test_fused_forms_agree_with_sample_at_the_far_end(kind: str) -> None:
    at = {name: limit - 1 for name, limit in philox.LIMITS.items()}
    start, src = philox.MAX_ELEMENTS - 1000, ramp(1000)
    z = noise.sample(kind, start=start, stop=philox.MAX_ELEMENTS, **at)
    for dtype in (torch.float32, torch.float64):
        zeros = torch.zeros(1000, dtype=dtype)
        assert same_bits(noise.add_(zeros, 1.0, kind=kind, start=start, **at), z.to(dtype))
    expected = math.fsum((src * z).double().tolist())
    assert noise.dot(src, kind=kind, start=start, **at) == pytest.approx(expected, rel=1e-9)


# Errors


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"kind": "normal"}, "unknown kind of noise 'normal'.*gaussian, rademacher"),
        ({"seed": -1}, r"seed must be at least 0 and below 18446744073709551616, got -1"),
        ({"seed": 2**64}, "seed must be .* got 18446744073709551616"),
        ({"step": -1}, "step must be at least 0 and below 4294967296, got -1"),
        ({"step": 2**32}, "step must be .* got 4294967296"),
        ({"branch": -1}, "branch must be at least 0 and below 16777216, got -1"),
        ({"branch": 2**24}, "branch must be .* got 16777216"),
        ({"block": -1}, "block must be at least 0 and below 16777216, got -1"),
        ({"block": 2**24}, "block must be .* got 16777216"),
        ({"start": -1}, "0 <= start <= stop <= 4398046511104, got -1"),
        ({"start": philox.MAX_ELEMENTS}, "0 <= start <= stop <= 4398046511104, got 4398046511104 and 4398046511"),
    ],
    ids=str,
)
def test_a_coordinate_out_of_range_is_named(wrong: dict[str, Any], match: str) -> None:
    at = {"kind": "gaussian", "start": 0, **AT, **wrong}
    with pytest.raises(ValueError, match=match):
        noise.sample(at["kind"], stop=at["start"] + 10, **{k: v for k, v in at.items() if k != "kind"})
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.ones(10, dtype=dtype)
        with pytest.raises(ValueError, match=match):
            noise.add_(tensor, 0.5, **at)
        with pytest.raises(ValueError, match=match):
            noise.dot(tensor, **at)
        assert torch.equal(tensor, torch.ones(10, dtype=dtype))


def test_a_range_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"start <= stop .* got 5 and 4"):
        sample("gaussian", 5, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_branches_than_there_are_numbers_are_refused(dtype: torch.dtype) -> None:
    tensor = torch.ones(10, dtype=dtype)
    with pytest.raises(ValueError, match="branch"):
        noise.add_(tensor, [0.5, 0.5], kind="rademacher", **{**AT, "branch": 2**24 - 1})
    assert torch.equal(tensor, torch.ones(10, dtype=dtype))


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"src's shape \(2, 3\), got \(3, 2\)"):
        noise.add(torch.ones(2, 3), 0.5, out=torch.ones(3, 2), kind="gaussian", **AT)


@pytest.mark.parametrize("pair", [cpu._SAMPLE, cpu._ADD, cpu._ADD_ROWS, cpu._DOT, cpu._ROUND])
def test_the_cache_on_disk_does_not_take_a_kernel_for_all_threads_for_that_of_one(pair: tuple[Any, Any]) -> None:
    one, all_threads = pair
    assert all_threads.targetoptions["parallel"]
    assert not one.targetoptions.get("parallel")
    assert one._cache._cache_file._index_name != all_threads._cache._cache_file._index_name


@pytest.mark.parametrize("size", [1, 127, 128, 1000, 70_000, 300_001])
def test_sums_are_those_of_float64_and_the_same_bits_on_any_number_of_threads(size: int) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 0.02 + 0.01
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(noise.sums(x))
    torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
    assert found[0] == pytest.approx((float(x.double().sum()), float(x.double().square().sum())), rel=1e-12)
