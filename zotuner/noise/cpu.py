"""The CPU backend: noise generated tile by tile in cache and used at once, by numba kernels on all cores.

    words (4 a call)  ->  tile of 512 z  ->  dst = src + sum_k alpha_k z_k   |   sum of g z   |   z itself

No kernel may be compiled with fastmath: the promise "equal to `sample` followed by float32 arithmetic, bit for
bit" holds because LLVM neither contracts nor reorders what is written here.
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from zotuner.noise.philox import CALLS, KINDS, MULTIPLIERS, ROUNDS, TILE, WEYL, Address

GRAIN = 128 * TILE  # elements; the unit of work a thread takes, and the size below which one thread does all
LANES = CALLS["gaussian"]
RADEMACHER = KINDS.index("rademacher")
SIGN_CALLS = CALLS["rademacher"]

U32, U64, F32 = np.uint32, np.uint64, np.float32
M0, M1 = U64(MULTIPLIERS[0]), U64(MULTIPLIERS[1])
W0, W1 = U32(WEYL[0]), U32(WEYL[1])
SHIFT32 = U64(32)

SQRT_HALF, LN2 = F32(math.sqrt(0.5)), F32(math.log(2.0))
TWO_M32, TWO_M33 = F32(2.0**-32), F32(2.0**-33)
ANGLE = F32(math.pi * 2.0**-31)
# Taylor coefficients: enough of them for float32 on |t| <= pi/4, and for 2 artanh(s) on |s| <= 0.172
S3, S5, S7, S9 = (F32(c) for c in (-1 / 6, 1 / 120, -1 / 5040, 1 / 362880))
C2, C4, C6, C8 = (F32(c) for c in (-1 / 2, 1 / 24, -1 / 720, 1 / 40320))
L3, L5, L7, L9 = (F32(c) for c in (2 / 3, 2 / 5, 2 / 7, 2 / 9))

# numpy's error model: a division that may raise would keep a loop from being vectorised
OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}
jit = njit(**OPTIONS)
inline = njit(inline="always", error_model="numpy")


@inline
def _philox(call, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """One call: `zotuner.noise.philox.philox4x32` on scalars."""
    c0, c1 = U32(call & U64(0xFFFFFFFF)), U32(U32(call >> SHIFT32) | c1)
    for _ in range(ROUNDS):
        p0, p1 = U64(c0) * M0, U64(c2) * M1
        c0, c1, c2, c3 = U32(U32(p1 >> SHIFT32) ^ c1 ^ k0), U32(p1), U32(U32(p0 >> SHIFT32) ^ c3 ^ k1), U32(p0)
        k0, k1 = U32(k0 + W0), U32(k1 + W1)
    return c0, c1, c2, c3


@inline
def _radius(word):  # type: ignore[no-untyped-def]
    """sqrt(-2 ln u) for u = (word + 1/2) 2^-32, in float32."""
    u = F32(word) * TWO_M32 + TWO_M33
    bits = np.int32(np.float32(u).view(np.int32))
    exponent = (bits >> np.int32(23)) - np.int32(127)
    m = np.int32((bits & np.int32(0x007FFFFF)) | np.int32(0x3F000000)).view(np.float32)  # in [1/2, 1)
    exponent = exponent + np.int32(1)
    low = m < SQRT_HALF
    m = m + m if low else m  # now in [sqrt(1/2), sqrt(2))
    exponent = exponent - np.int32(1) if low else exponent
    s = (m - F32(1.0)) / (m + F32(1.0))
    q = s * s
    log_m = s * (F32(2.0) + q * (L3 + q * (L5 + q * (L7 + q * L9))))
    return np.sqrt(F32(-2.0) * (F32(exponent) * LN2 + log_m))


@inline
def _cos_sin(word):  # type: ignore[no-untyped-def]
    """cos and sin of 2 pi (word - 2^29) 2^-32, in float32: the two top bits are the quadrant."""
    quadrant = word >> U32(30)
    t = F32(np.int32(word & U32(0x3FFFFFFF)) - np.int32(0x20000000)) * ANGLE  # in [-pi/4, pi/4)
    q = t * t
    sin = t + t * (q * (S3 + q * (S5 + q * (S7 + q * S9))))
    cos = F32(1.0) + q * (C2 + q * (C4 + q * (C6 + q * C8)))
    swap = (quadrant & U32(1)) == U32(1)
    a = sin if swap else cos
    b = cos if swap else sin
    a = -a if quadrant == U32(1) or quadrant == U32(2) else a
    b = -b if quadrant >= U32(2) else b
    return a, b


@jit
def _fill(z, kind, tile, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Writes the 512 elements of one tile to z."""
    if kind == RADEMACHER:
        for i in range(SIGN_CALLS):
            drawn = _philox(U64(tile * SIGN_CALLS + i), c1, c2, c3, k0, k1)
            for w in range(4):
                word, base = drawn[w], i * 128 + w * 32
                for b in range(32):
                    sign = U32(((word >> U32(b)) & U32(1)) ^ U32(1)) << U32(31)
                    z[base + b] = U32(U32(0x3F800000) | U32(sign)).view(np.float32)
    else:
        for i in range(LANES):
            x0, x1, x2, x3 = _philox(U64(tile * LANES + i), c1, c2, c3, k0, k1)
            r, (a, b) = _radius(x0), _cos_sin(x1)
            z[i], z[LANES + i] = r * a, r * b
            r, (a, b) = _radius(x2), _cos_sin(x3)
            z[2 * LANES + i], z[3 * LANES + i] = r * a, r * b


def _sample(out, start, kind, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """out = z[start : start + len(out)]."""
    stop = start + out.size
    first = start // GRAIN
    for grain in prange(-(-stop // GRAIN) - first):
        z = np.empty(TILE, np.float32)
        for tile in range((first + grain) * GRAIN // TILE, (first + grain + 1) * GRAIN // TILE):
            low, high = max(start, tile * TILE), min(stop, (tile + 1) * TILE)
            if low < high:
                _fill(z, kind, tile, c1, c2, c3, k0, k1)
                out[low - start : high - start] = z[low - tile * TILE : high - tile * TILE]


def _add(dst, src, alphas, start, kind, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """dst = src + (alphas[0] z of branch 0 + alphas[1] z of branch 1 + ...), the sum from left to right."""
    stop = start + dst.size
    first = start // GRAIN
    for grain in prange(-(-stop // GRAIN) - first):
        z = np.empty(TILE, np.float32)
        total = np.empty(TILE, np.float32)
        for tile in range((first + grain) * GRAIN // TILE, (first + grain + 1) * GRAIN // TILE):
            low, high = max(start, tile * TILE), min(stop, (tile + 1) * TILE)
            if low < high:
                for k in range(alphas.size):
                    _fill(z, kind, tile, U32(c1 + U32(k << 8)), c2, c3, k0, k1)
                    alpha = alphas[k]
                    if k == 0:
                        for i in range(TILE):
                            total[i] = alpha * z[i]
                    else:
                        for i in range(TILE):
                            total[i] += alpha * z[i]
                # slices, so that the loop's index is seen not to be negative, and the loop is vectorised
                to, of = dst[low - start : high - start], src[low - start : high - start]
                sums = total[low - tile * TILE : high - tile * TILE]
                for i in range(high - low):
                    to[i] = of[i] + sums[i]


def _dot(partial, g, start, kind, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """partial[j] = the sum of g z over the j-th grain, float32 products added in float64."""
    stop = start + g.size
    first = start // GRAIN
    for grain in prange(-(-stop // GRAIN) - first):
        z = np.empty(TILE, np.float32)
        total = 0.0
        for tile in range((first + grain) * GRAIN // TILE, (first + grain + 1) * GRAIN // TILE):
            low, high = max(start, tile * TILE), min(stop, (tile + 1) * TILE)
            if low < high:
                _fill(z, kind, tile, c1, c2, c3, k0, k1)
                values, noise = g[low - start : high - start], z[low - tile * TILE : high - tile * TILE]
                for i in range(high - low):
                    total += np.float64(values[i] * noise[i])
        partial[grain] = total


def _pair(kernel: Callable[..., None]) -> tuple[Any, Any]:
    """A kernel for one thread, and the same one for all of them."""
    return jit(kernel), njit(parallel=True, **OPTIONS)(kernel)


_SAMPLE, _ADD, _DOT = _pair(_sample), _pair(_add), _pair(_dot)


def _run(pair: tuple[Any, Any], size: int, *args: object) -> None:
    """Runs a kernel on as many threads as torch uses; a small range is not worth more than one."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    if size <= GRAIN or threads == 1:
        pair[0](*args)
        return
    numba.set_num_threads(threads)
    pair[1](*args)


def _unpack(kind: str, at: Address) -> tuple[Any, ...]:
    return KINDS.index(kind), U32(at.c1), U32(at.c2), U32(at.c3), U32(at.key[0]), U32(at.key[1])


def sample(kind: str, at: Address, start: int, stop: int) -> Tensor:
    """As `zotuner.noise.philox.sample`, on the CPU."""
    out = torch.empty(stop - start, dtype=torch.float32)
    _run(_SAMPLE, stop - start, out.numpy(), start, *_unpack(kind, at))
    return out


def add(dst: Tensor, src: Tensor, alphas: np.ndarray, kind: str, at: Address, start: int) -> None:
    """dst = src + sum_k alphas[k] z_k over contiguous float32 CPU tensors of one size; dst may be src."""
    flat = dst.view(-1).numpy(), src.view(-1).numpy()
    _run(_ADD, dst.numel(), *flat, alphas, start, *_unpack(kind, at))


def dot(g: Tensor, kind: str, at: Address, start: int) -> float:
    """The sum of g z over a contiguous float32 CPU tensor."""
    partial = np.zeros(g.numel() // GRAIN + 2)
    _run(_DOT, g.numel(), partial, g.view(-1).numpy(), start, *_unpack(kind, at))
    return float(partial.sum())
