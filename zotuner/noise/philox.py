"""Philox4x32-10 and the addressing of noise, in plain torch: the reference every backend is tested against.

    (kind, seed, step, branch, block, element)  ->  (counter, key)  ->  4 words of 32 bits  ->  z

Source: J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011; the multipliers and Weyl constants below are the paper's.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MASK = 0xFFFFFFFF

KINDS = ("gaussian", "rademacher")  # a kind's position is its number in the counter; 2 is stochastic rounding's
TILE = 512  # elements; the smallest range that is generated whole
CALLS = {"gaussian": 128, "rademacher": 4}  # Philox calls a tile: 4 normals or 128 signs come from one call

# The counter holds, from its low end: the call (40 bits), branch (24), step (32), block (24), kind (8).
LIMITS = {"seed": 1 << 64, "step": 1 << 32, "branch": 1 << 24, "block": 1 << 24}
MAX_ELEMENTS = 1 << 42


@dataclass(frozen=True)
class Address:
    """Everything of the counter and the key but the call: four words of 32 bits.

    Attributes:
        c1: The branch, above the call's high bits.
        c2: The step.
        c3: The kind, above the block.
        key: The seed's low and high word.
    """

    c1: int
    c2: int
    c3: int
    key: tuple[int, int]


def address(kind: str, *, seed: int, step: int, block: int, branch: int) -> Address:
    """Checks the coordinates of a noise vector and packs them.

    Raises:
        ValueError: An unknown kind, or a coordinate outside the range that `LIMITS` gives.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of noise {kind!r}; known: {', '.join(KINDS)}")
    return _packed(KINDS.index(kind), seed=seed, step=step, block=block, branch=branch)


def rounding_address(*, seed: int, step: int, block: int) -> Address:
    """Of the words that round a block's elements stochastically in a step."""
    return _packed(len(KINDS), seed=seed, step=step, block=block, branch=0)


def _packed(number: int, **given: int) -> Address:
    for name, value in given.items():
        if not 0 <= value < LIMITS[name]:
            raise ValueError(f"{name} must be at least 0 and below {LIMITS[name]}, got {value}")
    seed, low = given["seed"], given["block"] | number << 24
    return Address(given["branch"] << 8, given["step"], low, (seed & MASK, seed >> 32))


def check_range(start: int, stop: int) -> None:
    """Raises `ValueError` unless 0 <= start <= stop <= `MAX_ELEMENTS`."""
    if not 0 <= start <= stop <= MAX_ELEMENTS:
        raise ValueError(f"elements must satisfy 0 <= start <= stop <= {MAX_ELEMENTS}, got {start} and {stop}")


def philox4x32(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Ten rounds of Philox4x32.

    Args:
        counter: Four int64 tensors of one shape, each holding words in [0, 2^32).
        key: Two words.

    Returns:
        Four int64 tensors of that shape: the random words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # wraps mod 2^64: the words below are right all the same
        c0, c1, c2, c3 = (p1 >> 32) & MASK ^ c1 ^ k0, p1 & MASK, (p0 >> 32) & MASK ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return [c0, c1, c2, c3]


def words(at: Address, first: int, calls: int, device: torch.device | str) -> list[Tensor]:
    """The random words of `calls` calls from number `first` on: four int64 tensors of shape (calls,)."""
    call = torch.arange(first, first + calls, dtype=torch.int64, device=device)
    fixed = [torch.full_like(call, word) for word in (at.c2, at.c3)]
    return philox4x32([call & MASK, (call >> 32) | at.c1, *fixed], at.key)


def signs(at: Address, first: int, calls: int, device: torch.device | str) -> Tensor:
    """Rademacher tiles: bit b of word w of call c is element 128 c + 32 w + b; 1 means +1. (calls * 128,) float32."""
    word = torch.stack(words(at, first, calls, device), dim=1)  # (calls, 4)
    bits = (word[:, :, None] >> torch.arange(32, device=device)) & 1
    return (2 * bits - 1).to(torch.float32).reshape(-1)


def normals(at: Address, first: int, calls: int, device: torch.device | str) -> Tensor:
    """Gaussian tiles by Box and Muller: u = (x0 + 1/2) 2^-32, phi = 2 pi (x1 - 2^29) 2^-32, in float64.

    Output j of call i of a tile is its element 128 j + i, so that vector units write runs. (calls * 4,) float32.
    """
    x0, x1, x2, x3 = words(at, first, calls, device)
    out = []
    for radius, angle in ((x0, x1), (x2, x3)):
        # u is rounded to float32 as the other backends round it: from there on all compute the same function
        u = radius.to(torch.float32) * 2.0**-32 + 2.0**-33
        r = torch.sqrt(-2.0 * torch.log(u.double()))
        phi = (angle - 2**29).double() * (2.0 * math.pi / 2**32)
        out += [r * torch.cos(phi), r * torch.sin(phi)]
    per_tile = [x.view(-1, CALLS["gaussian"]) for x in out]
    return torch.stack(per_tile, dim=1).to(torch.float32).reshape(-1)


def sample(kind: str, at: Address, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """Elements [start, stop) of the vector at an address, as (stop - start,) float32 on `device`."""
    first, last = start // TILE, -(-stop // TILE)
    tiles = {"gaussian": normals, "rademacher": signs}[kind]
    z = tiles(at, first * CALLS[kind], (last - first) * CALLS[kind], device)
    return z[start - first * TILE : stop - first * TILE]


DROPPED = {torch.bfloat16: 16, torch.float16: 13}  # low bits of a float32 that the smaller type has no place for
WHOLE = 0  # in the place of such a number: round to integers


def round_(values: Tensor, drop: int, at: Address, start: int) -> None:
    """Rounds float32 values stochastically to ones that a type of `drop` bits less can hold, in place.

    The low bits of the value's pattern plus a random number of as many bits: the carry rounds away from zero with a
    probability equal to the part that is dropped, so that the mean is the value itself. With a `drop` of `WHOLE`,
    to one of the two integers around the value, likewise.
    """
    first, last = start // TILE, -(-(start + values.numel()) // TILE)
    calls = CALLS["gaussian"]
    drawn = torch.stack([w.view(-1, calls) for w in words(at, first * calls, (last - first) * calls, values.device)], 1)
    drawn = drawn.reshape(-1)[start - first * TILE :][: values.numel()].view(values.shape)
    if drop == WHOLE:
        values.copy_(torch.floor(values.double() + drawn.double() * 2.0**-32))
        return
    bits = values.view(torch.int32).long() & MASK
    up = (bits + (drawn >> (32 - drop))) >> drop << drop
    rounded = (up - ((up >> 31) << 32)).to(torch.int32).view(torch.float32)
    if drop == DROPPED[torch.float16]:  # its subnormal numbers lie 2^-24 apart
        size = values.double().abs()
        whole = torch.floor(size * 2.0**24 + drawn.double() * 2.0**-32) * 2.0**-24
        rounded = torch.where(size < 2.0**-14, torch.copysign(whole, values.double()).float(), rounded)
    values.copy_(torch.where(torch.isfinite(values), rounded, values))
