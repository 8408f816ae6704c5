"""The CPU backend: noise generated tile by tile in cache and used at once, by numba kernels on all cores.

    words (4 a call, 128 calls at once)  ->  tile of 512 z  ->  dst = src + sum_k alpha_k z_k   |   sum of g z   |   z
    words  ->  signs  ->  dst = src + sum_k (+-alpha_k), where a whole tile of Rademacher noise is wanted

No kernel may be compiled with fastmath: the promise "equal to `sample` followed by float32 arithmetic, bit for
bit" holds because LLVM neither contracts nor reorders what is written here.
"""

import math
from threading import Lock
from types import FunctionType
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from zotuner.noise.philox import CALLS, KINDS, MULTIPLIERS, ROUNDS, TILE, WEYL, WHOLE, Address

GRAIN = 128 * TILE  # elements; the unit of work a thread takes, and the size below which one thread does all
SUMS = 128  # running sums side by side, so that vector units have work
LANES = 128  # calls that are made at once, so that vector units have work
RADEMACHER = KINDS.index("rademacher")
SIGN_CALLS = CALLS["rademacher"]
TILES = (LANES // CALLS["gaussian"], LANES // SIGN_CALLS)  # tiles that so many calls make, by kind

U32, U64, F32 = np.uint32, np.uint64, np.float32
M0, M1 = U64(MULTIPLIERS[0]), U64(MULTIPLIERS[1])
W0, W1 = U64(WEYL[0]), U64(WEYL[1])
MASK32, SHIFT32 = U64(0xFFFFFFFF), U64(32)

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
    """One call: `zotuner.noise.philox.philox4x32` on scalars, each word in a lane of 64 bits, which saves packing."""
    c0, c1, c2, c3 = call & MASK32, (call >> SHIFT32) | U64(c1), U64(c2), U64(c3)
    k0, k1 = U64(k0), U64(k1)
    for _ in range(ROUNDS):
        p0, p1 = c0 * M0, c2 * M1
        c0, c1, c2, c3 = (p1 >> SHIFT32) ^ c1 ^ k0, p1 & MASK32, (p0 >> SHIFT32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + W0) & MASK32, (k1 + W1) & MASK32
    return U32(c0), U32(c1), U32(c2), U32(c3)


@jit
def _words(words, strip, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """words[w, i] = word w of call i of a strip of 128 calls."""
    first = U64(strip) * U64(LANES)
    for i in range(LANES):
        words[0, i], words[1, i], words[2, i], words[3, i] = _philox(first + U64(i), c1, c2, c3, k0, k1)


@inline
def _radius(word):  # type: ignore[no-untyped-def]
    """sqrt(-2 ln u) for u = (word + 1/2) 2^-32, in float32."""
    u = F32(word) * TWO_M32 + TWO_M33
    bits = np.int32(np.float32(u).view(np.int32))
    exponent = np.int32((bits >> np.int32(23)) - np.int32(126))
    m = np.int32((bits & np.int32(0x007FFFFF)) | np.int32(0x3F000000)).view(np.float32)  # in [1/2, 1)
    low = m < SQRT_HALF
    m = m + m if low else m  # now in [sqrt(1/2), sqrt(2))
    exponent = np.int32(exponent - np.int32(1)) if low else exponent
    s = (m - F32(1.0)) / (m + F32(1.0))
    q = s * s
    log_m = s * (F32(2.0) + q * (L3 + q * (L5 + q * (L7 + q * L9))))
    return np.sqrt(F32(-2.0) * (F32(exponent) * LN2 + log_m))


@inline
def _cos_sin(word):  # type: ignore[no-untyped-def]
    """cos and sin of 2 pi (word - 2^29) 2^-32, in float32: the two top bits are the quadrant."""
    quadrant = word >> U32(30)
    t = F32(np.int32(np.int32(word & U32(0x3FFFFFFF)) - np.int32(0x20000000))) * ANGLE  # in [-pi/4, pi/4)
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
def _tile(z, kind, words, place):  # type: ignore[no-untyped-def]
    """Writes the 512 elements of the tile at a place within the words' strip to z."""
    if kind == RADEMACHER:
        for i in range(SIGN_CALLS):
            for w in range(4):
                word, part = ~words[w, place * SIGN_CALLS + i], z[i * 128 + w * 32 : i * 128 + w * 32 + 32]
                for b in range(32):
                    sign = U32(U32(word << U32(31 - b)) & U32(0x80000000))
                    part[b] = U32(sign | U32(0x3F800000)).view(np.float32)
    else:
        for j in range(2):
            first, second = z[2 * j * LANES : (2 * j + 1) * LANES], z[(2 * j + 1) * LANES : (2 * j + 2) * LANES]
            for i in range(LANES):
                r, (a, b) = _radius(words[2 * j, i]), _cos_sin(words[2 * j + 1, i])
                first[i], second[i] = r * a, r * b


@jit
def _signs(total, alphas, words, place):  # type: ignore[no-untyped-def]
    """total = sum_k (+-alphas[k]) over a tile; `words` has a strip a branch, alphas come as their bits."""
    for i in range(SIGN_CALLS):
        for w in range(4):
            part = total[i * 128 + w * 32 : i * 128 + w * 32 + 32]
            for k in range(alphas.size):
                word, alpha = ~words[k, w, place * SIGN_CALLS + i], alphas[k]
                if k == 0:
                    for b in range(32):
                        sign = U32(U32(word << U32(31 - b)) & U32(0x80000000))
                        part[b] = U32(sign ^ alpha).view(np.float32)
                else:
                    for b in range(32):
                        sign = U32(U32(word << U32(31 - b)) & U32(0x80000000))
                        part[b] += U32(sign ^ alpha).view(np.float32)


@jit
def _normals(total, alphas, words, place, z):  # type: ignore[no-untyped-def]
    """total = sum_k alphas[k] z_k over a tile."""
    for k in range(alphas.size):
        _tile(z, 0, words[k], place)
        alpha = alphas[k]
        if k == 0:
            for i in range(TILE):
                total[i] = alpha * z[i]
        else:
            for i in range(TILE):
                total[i] += alpha * z[i]


@jit
def _add_strip(dst, src, alpha, words):  # type: ignore[no-untyped-def]
    """dst = src +- alpha over all tiles of a strip; alpha comes as its bits."""
    for i in range(LANES):
        for w in range(4):
            low = i * 128 + w * 32
            to, of, word = dst[low : low + 32], src[low : low + 32], ~words[w, i]
            for b in range(32):
                sign = U32(U32(word << U32(31 - b)) & U32(0x80000000))
                to[b] = of[b] + U32(sign ^ alpha).view(np.float32)


@jit
def _add_range(dst, src, alphas, start, kind, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """dst = src + (alphas[0] z of branch 0 + alphas[1] z of branch 1 + ...), the sum from left to right."""
    stop, tiles = start + dst.size, TILES[kind]
    words = np.empty((alphas.size, 4, LANES), np.uint32)
    z, total, bits = np.empty(TILE, np.float32), np.empty(TILE, np.float32), alphas.view(np.uint32)
    for strip in range(start // (tiles * TILE), -(-stop // (tiles * TILE))):
        for k in range(alphas.size):
            _words(words[k], strip, U32(c1 + U32(k << 8)), c2, c3, k0, k1)
        whole = strip * tiles * TILE - start  # in dst
        if kind == RADEMACHER and alphas.size == 1 and whole >= 0 and whole + tiles * TILE <= dst.size:
            _add_strip(dst[whole : whole + tiles * TILE], src[whole : whole + tiles * TILE], bits[0], words[0])
            continue
        for place in range(tiles):
            first = (strip * tiles + place) * TILE
            low, high = max(start, first), min(stop, first + TILE)
            if low < high:
                if kind == RADEMACHER:
                    _signs(total, bits, words, place)
                else:
                    _normals(total, alphas, words, place, z)
                # slices, so that the loop's index is seen not to be negative, and the loop is vectorised
                to, of = dst[low - start : high - start], src[low - start : high - start]
                sums = total[low - first : high - first]
                # by way of `sums`: dst may be src, and one loop over both would then not be vectorised
                for i in range(high - low):
                    sums[i] = of[i] + sums[i]
                for i in range(high - low):
                    to[i] = sums[i]


@jit
def _sample_range(out, start, kind, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """out = z[start : start + len(out)]."""
    stop, tiles = start + out.size, TILES[kind]
    words, z = np.empty((4, LANES), np.uint32), np.empty(TILE, np.float32)
    for strip in range(start // (tiles * TILE), -(-stop // (tiles * TILE))):
        _words(words, strip, c1, c2, c3, k0, k1)
        for place in range(tiles):
            first = (strip * tiles + place) * TILE
            low, high = max(start, first), min(stop, first + TILE)
            if low < high:
                _tile(z, kind, words, place)
                out[low - start : high - start] = z[low - first : high - first]


@jit
def _dot_range(g, start, kind, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """The sum of g z, float32 products added in float64."""
    stop, tiles, total = start + g.size, TILES[kind], 0.0
    words, z = np.empty((4, LANES), np.uint32), np.empty(TILE, np.float32)
    for strip in range(start // (tiles * TILE), -(-stop // (tiles * TILE))):
        _words(words, strip, c1, c2, c3, k0, k1)
        for place in range(tiles):
            first = (strip * tiles + place) * TILE
            low, high = max(start, first), min(stop, first + TILE)
            if low < high:
                _tile(z, kind, words, place)
                values, noise = g[low - start : high - start], z[low - first : high - first]
                for i in range(high - low):
                    total += np.float64(values[i] * noise[i])
    return total


def _sample(out, start, kind, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    stop, first = start + out.size, start // GRAIN
    for grain in prange(-(-stop // GRAIN) - first):
        low, high = max(start, (first + grain) * GRAIN), min(stop, (first + grain + 1) * GRAIN)
        _sample_range(out[low - start : high - start], low, kind, c1, c2, c3, k0, k1)


def _add(dst, src, alphas, start, kind, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    stop, first = start + dst.size, start // GRAIN
    for grain in prange(-(-stop // GRAIN) - first):
        low, high = max(start, (first + grain) * GRAIN), min(stop, (first + grain + 1) * GRAIN)
        _add_range(
            dst[low - start : high - start], src[low - start : high - start], alphas, low, kind, c1, c2, c3, k0, k1
        )


def _add_rows(dst, src, rows, alphas, start, kind, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """dst[i] = src[rows[i]] + ..., with the noise of that row."""
    for i in prange(rows.size):
        _add_range(dst[i], src[rows[i]], alphas, start + rows[i] * dst.shape[1], kind, c1, c2, c3, k0, k1)


def _dot(partial, g, start, kind, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """partial[j] = the sum of g z over the j-th grain."""
    stop, first = start + g.size, start // GRAIN
    for grain in prange(-(-stop // GRAIN) - first):
        low, high = max(start, (first + grain) * GRAIN), min(stop, (first + grain + 1) * GRAIN)
        partial[grain] = _dot_range(g[low - start : high - start], low, kind, c1, c2, c3, k0, k1)


@jit
def _sums_range(x):  # type: ignore[no-untyped-def]
    """(sum of x, sum of x^2) in float64: `SUMS` running sums, element i goes to number i mod `SUMS`."""
    sums, squares, whole = np.zeros(SUMS), np.zeros(SUMS), x.size // SUMS * SUMS
    for i in range(0, whole, SUMS):
        part = x[i : i + SUMS]
        for j in range(SUMS):
            value = np.float64(part[j])
            sums[j] += value
            squares[j] += value * value
    total = square = 0.0
    for j in range(SUMS):
        total += sums[j]
        square += squares[j]
    for i in range(whole, x.size):
        value = np.float64(x[i])
        total += value
        square += value * value
    return total, square


def _sums(partial, x):  # type: ignore[no-untyped-def]
    """partial[j] = the sums over the j-th grain."""
    for grain in prange(-(-x.size // GRAIN)):
        partial[grain, 0], partial[grain, 1] = _sums_range(x[grain * GRAIN : (grain + 1) * GRAIN])


def _round(values, drop, start, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Rounds float32 to one of the two neighbours that the smaller type has, up with the probability that is unbiased.

    Element j takes the word that a Gaussian tile's element j is made of. `drop` is 16 for bfloat16, 13 for float16,
    `WHOLE` for integers.
    """
    stop, first = start + values.size, start // GRAIN
    for grain in prange(-(-stop // GRAIN) - first):
        words = np.empty((4, LANES), np.uint32)
        for strip in range((first + grain) * GRAIN // TILE, (first + grain + 1) * GRAIN // TILE):
            low, high = max(start, strip * TILE), min(stop, (strip + 1) * TILE)
            if low < high:
                _words(words, strip, c1, c2, c3, k0, k1)
                drawn, part = (
                    words.reshape(-1)[low - strip * TILE : high - strip * TILE],
                    values[low - start : high - start],
                )
                if drop == WHOLE:
                    for i in range(high - low):
                        part[i] = F32(np.floor(np.float64(part[i]) + np.float64(drawn[i]) * 2.0**-32))
                    continue
                for i in range(high - low):
                    bits = U32(F32(part[i]).view(np.uint32))
                    up = U32(bits + (drawn[i] >> U32(32 - drop)))
                    rounded = U32(U32(up >> U32(drop)) << U32(drop)).view(np.float32)
                    size = np.float64(abs(part[i]))
                    if drop == 13 and size < 2.0**-14:  # float16's subnormal numbers lie 2^-24 apart
                        whole = F32(np.floor(size * 2.0**24 + np.float64(drawn[i]) * 2.0**-32) * 2.0**-24)
                        rounded = -whole if bits >> U32(31) else whole  # -0 stays -0
                    part[i] = rounded if np.isfinite(part[i]) else part[i]


def _pair(kernel: Any) -> tuple[Any, Any]:
    """A kernel for one thread, and the same one for all of them.

    The second goes by a name of its own: numba's cache on disk tells functions apart by their names, not by whether
    they were compiled to run in parallel.
    """
    twin = FunctionType(kernel.__code__, kernel.__globals__, kernel.__name__ + "_parallel")
    twin.__qualname__ = twin.__name__
    return jit(kernel), njit(parallel=True, **OPTIONS)(twin)


_SAMPLE, _ADD, _ADD_ROWS, _DOT, _SUMS, _ROUND = (
    _pair(kernel) for kernel in (_sample, _add, _add_rows, _dot, _sums, _round)
)


_ALL_THREADS = Lock()  # one parallel kernel at a time: not every pool of threads that numba may use can take two


def _run(pair: tuple[Any, Any], size: int, *args: object) -> None:
    """Runs a kernel on as many threads as torch uses; a small range is not worth more than one."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    if size <= GRAIN or threads == 1 or not _ALL_THREADS.acquire(blocking=False):
        pair[0](*args)
        return
    try:
        numba.set_num_threads(threads)
        pair[1](*args)
    finally:
        _ALL_THREADS.release()


def _unpack(kind: str, at: Address) -> tuple[Any, ...]:
    return KINDS.index(kind), *_coordinates(at)


def _coordinates(at: Address) -> tuple[Any, ...]:
    return U32(at.c1), U32(at.c2), U32(at.c3), U32(at.key[0]), U32(at.key[1])


def sample(kind: str, at: Address, start: int, stop: int) -> Tensor:
    """As `zotuner.noise.philox.sample`, on the CPU."""
    out = torch.empty(stop - start, dtype=torch.float32)
    _run(_SAMPLE, stop - start, out.numpy(), start, *_unpack(kind, at))
    return out


def add(dst: Tensor, src: Tensor, alphas: np.ndarray, kind: str, at: Address, start: int) -> None:
    """dst = src + sum_k alphas[k] z_k over contiguous float32 CPU tensors of one size; dst may be src."""
    flat = dst.numpy().reshape(-1), src.numpy().reshape(-1)
    _run(_ADD, dst.numel(), *flat, alphas, start, *_unpack(kind, at))


def add_rows(dst: Tensor, src: Tensor, rows: Tensor, alpha: float, kind: str, at: Address, start: int) -> None:
    """dst[i] = src[rows[i]] + alpha z of that row: (m, width), (n, width) and (m,) int64, contiguous on the CPU."""
    arrays = dst.numpy(), src.numpy(), rows.numpy(), np.asarray([alpha], np.float32)
    _run(_ADD_ROWS, dst.numel(), *arrays, start, *_unpack(kind, at))


def round_(values: Tensor, drop: int, at: Address, start: int) -> None:
    """As `zotuner.noise.philox.round_`, on the CPU: contiguous float32."""
    _run(_ROUND, values.numel(), values.view(-1).numpy(), drop, start, *_coordinates(at))


def dot(g: Tensor, kind: str, at: Address, start: int) -> float:
    """The sum of g z over a contiguous float32 CPU tensor."""
    partial = np.zeros(g.numel() // GRAIN + 2)
    _run(_DOT, g.numel(), partial, g.view(-1).numpy(), start, *_unpack(kind, at))
    return float(partial.sum())


def sums(x: Tensor) -> tuple[float, float]:
    """The sum of x and that of x^2 over a contiguous float32 CPU tensor, the same bits whatever the threads."""
    partial = np.zeros((-(-x.numel() // GRAIN), 2))
    _run(_SUMS, x.numel(), partial, x.numpy().reshape(-1))
    return float(partial[:, 0].sum()), float(partial[:, 1].sum())
