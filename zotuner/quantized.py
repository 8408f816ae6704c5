"""Linear layers whose weights are integers: int8, or 4 bits in groups, tuned as they are.

    codes (integers) x scales  ->  a chunk of rows in float32  ->  + alpha z  ->  multiplied, and forgotten
    codes + round_stochastically(lr c z / scale)  ->  codes

The scales stay as they were fitted, and no more than one chunk of a weight exists in float32 at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zotuner import noise
from zotuner.blocks import Piece, StoredMatrix, chunk_rows, row_spans

BITS = (4, 8)
GROUP = 64  # columns that share a scale at 4 bits; at 8 bits a row does
CHUNK = 1 << 20  # elements that are dequantised at a time

Round = Callable[[Tensor], Tensor]
Perturb = Callable[[Tensor, int], None]  # (rows in float32, the number of the first): changes them in place


class QuantizedMatrix(StoredMatrix):
    """A matrix W = scale x code, the codes integers in [-limit, limit], limit = 2^(bits - 1) - 1.

    Args:
        weight: (rows, width), floating; `requires_grad` is taken over.
        bits: 8: one scale a row; 4: two codes a byte, a scale for every 64 columns (the last group may be shorter).

    Attributes:
        codes: (rows, width) int8, or (rows, ceil(width / 2)) uint8: code + 8 of column j in the low half of byte j,
            of column ceil(width / 2) + j in its high half.
        scales: (rows, groups) float32. A group of zeros has scale 0, and stays zero.

    Raises:
        ValueError: Other bits, or weights that are not finite.
    """

    codes: Tensor
    scales: Tensor
    shape: torch.Size

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__(weight.shape, weight.requires_grad)
        if bits not in BITS:
            raise ValueError(f"bits must be 4 or 8, got {bits!r}")
        rows, width = weight.shape
        self.bits, self.limit = bits, 2 ** (bits - 1) - 1
        self.group = max(1, width) if bits == 8 else GROUP
        empty = partial(torch.empty, device=weight.device)
        columns, dtype = (width, torch.int8) if bits == 8 else (-(-width // 2), torch.uint8)
        self.register_buffer("codes", empty(rows, columns, dtype=dtype))
        self.register_buffer("scales", empty(rows, -(-width // self.group)))
        for first, last in row_spans(weight.shape, CHUNK):
            values = weight.detach()[first:last].float()
            self.scales[first:last] = self._fitted(values)
            self.assign_rows(first, values)

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def piece(self, index: tuple[slice, ...], start: int) -> "QuantizedPiece":
        """The part `index` as a piece of a block that begins at element `start` there."""
        return QuantizedPiece(self, index, start)  # type: ignore[arg-type]

    def rows(self, first: int, last: int, out: Tensor | None = None) -> Tensor:
        """Rows [first, last) in float32, (last - first, width), in `out` if that is given."""
        if out is None:
            out = torch.empty(last - first, self.shape[1], device=self.device)
        self._unpack(first, last, out)
        return self._scale(out, self.scales[first:last])

    def assign_rows(self, first: int, values: Tensor) -> None:
        """Rows from `first` on take the values of the grid that are nearest to `values`, (n, width) float32."""
        steps = self._scale(values.clone(), self._inverse(first, first + len(values)))
        self._pack(first, steps.round_())

    def move_rows(self, first: int, delta: Tensor, rounded: Round) -> None:
        """Adds `delta` (n, width), which is used up, to rows from `first` on, as far as the grid goes.

        Args:
            first: Row.
            delta: float32.
            rounded: Rounds a float32 tensor to integers in place. What is rounded is the change in steps of the grid,
                so that none is lost beside the code it adds to, and a change of 0 is none.
        """
        last = first + len(delta)
        steps = rounded(self._scale(delta, self._inverse(first, last)))
        self._pack(first, steps.add_(self._unpack(first, last, torch.empty_like(steps))))

    def _fitted(self, values: Tensor) -> Tensor:
        """(n, groups): the largest magnitude of each group becomes the largest code."""
        rows, width = values.shape
        padded = F.pad(values, (0, -width % self.group)).view(rows, -1, self.group)
        scales = padded.abs().amax(dim=2) / self.limit
        if not bool(torch.isfinite(scales).all()):
            raise ValueError("a weight that is not finite cannot be quantised")
        return torch.where(scales >= 1e-30, scales, 0.0)  # the inverse of a smaller one would overflow

    def _inverse(self, first: int, last: int) -> Tensor:
        scales = self.scales[first:last]
        return torch.where(scales > 0, 1 / scales, 0.0)

    def _scale(self, values: Tensor, factors: Tensor) -> Tensor:
        """values *= the factor of each group; contiguous (n, width) and (n, groups)."""
        whole = values.shape[1] // self.group
        columns = whole * self.group
        values[:, :columns].unflatten(1, (whole, self.group)).mul_(factors[:, :whole, None])
        if columns < values.shape[1]:
            values[:, columns:].mul_(factors[:, whole:])
        return values

    def _unpack(self, first: int, last: int, out: Tensor) -> Tensor:
        """out = the codes of rows [first, last), as float32."""
        codes, width = self.codes[first:last], self.shape[1]
        if self.bits == 8:
            return out.copy_(codes)
        half = codes.shape[1]
        out[:, :half] = codes & 15
        out[:, half:] = (codes >> 4)[:, : width - half]
        return out.sub_(8)

    def _pack(self, first: int, codes: Tensor) -> None:
        """Rows from `first` on take codes, (n, width) whole numbers in float32, cut off at the limits."""
        codes.clamp_(-self.limit, self.limit)
        to = self.codes[first : first + len(codes)]
        if self.bits == 8:
            to.copy_(codes)
            return
        half = to.shape[1]
        low, high = codes.add_(8).to(torch.uint8).tensor_split([half], dim=1)
        to.copy_(low | F.pad(high, (0, half - high.shape[1]), value=8) << 4)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"{self.shape[0]} x {self.shape[1]}, bits={self.bits}"


@dataclass(frozen=True, eq=False)
class QuantizedPiece(Piece):
    """A part of a quantised matrix, whole rows, that belongs to a block."""

    param: QuantizedMatrix  # type: ignore[assignment]

    @property
    def bounds(self) -> tuple[int, int]:
        """(first row, one past the last)."""
        first, last, _ = (self.index[0] if self.index else slice(None)).indices(self.param.shape[0])
        return first, last

    @property
    def numel(self) -> int:
        """Number of elements."""
        first, last = self.bounds
        return (last - first) * self.param.shape[1]

    @property
    def view(self) -> Tensor:
        """The part dequantised: a copy, all of it."""
        return self.param.rows(*self.bounds)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """None: integers are no parameters."""
        return ()

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """Codes and scales."""
        return tuple(self.param.buffers())

    def parts(self) -> Iterator[Tensor]:
        """The part, dequantised a chunk of rows at a time, each of which is valid until the next comes."""
        low, high = self.bounds
        buffer = chunk_for(self.param)
        for first, last in row_spans((high - low, self.param.shape[1]), CHUNK):
            yield self.param.rows(low + first, low + last, buffer[: last - first])

    def perturb(self, rows: Tensor, first: int, draw: Any, alpha: float, block: int) -> None:
        """Adds alpha z, in place, to those of the matrix's rows from `first` on that belong to the piece."""
        low, high = self.bounds
        begin, end = max(low, first), min(high, first + len(rows))
        if begin < end:
            mine = rows[begin - first : end - first]
            draw.add(mine, [alpha], out=mine, block=block, start=self.start, rows=(begin - low, high - low))

    def move(self, draw: Any, alphas: Sequence[float], block: int, rounding: str) -> None:
        """Adds sum_k alphas[k] z_k, rounded stochastically to the grid, whatever `rounding` says of other weights."""
        low, high = self.bounds
        buffer, width = chunk_for(self.param), self.param.shape[1]
        for first, last in row_spans((high - low, width), CHUNK):
            delta = buffer[: last - first].zero_()
            draw.add(delta, alphas, out=delta, block=block, start=self.start, rows=(first, high - low))
            at = {"seed": draw.seed, "step": draw.step, "block": block, "start": self.start + first * width}
            self.param.move_rows(low + first, delta, partial(noise.round_to_integers_, **at))


class QuantizedLinear(nn.Module):
    """y = x W^T + b with a quantised W, which gets no gradient; x and b do.

    Args:
        linear: The layer whose place it takes; its bias is kept as it is.
        weight: Its weight, quantised.

    Example:
        >>> layer = nn.Linear(64, 32)
        >>> layer = QuantizedLinear(layer, QuantizedMatrix(layer.weight, bits=4))
    """

    def __init__(self, linear: nn.Linear, weight: QuantizedMatrix) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = weight
        self.bias: nn.Parameter | None
        self.register_parameter("bias", linear.bias)
        self.perturb: Perturb | None = None  # what a chunk of rows goes through before it is used
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), of the input's dtype."""
        out: Tensor = _Product.apply(input.reshape(-1, self.in_features), self.weight, self.perturb)
        out = out.view(*input.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


class _Product(torch.autograd.Function):
    """x W^T for x (m, width), by chunks of W's rows; the backward dequantises them once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedMatrix, perturb: Perturb | None) -> Tensor:
        ctx.weight, ctx.perturb = weight, perturb
        out = x.new_empty(len(x), weight.shape[0])
        for first, rows in _chunks(weight, perturb):
            torch.mm(x, rows.to(x.dtype).t(), out=out[:, first : first + len(rows)])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        out = grad.new_zeros(len(grad), ctx.weight.shape[1])
        for first, rows in _chunks(ctx.weight, ctx.perturb):
            out.addmm_(grad[:, first : first + len(rows)], rows.to(grad.dtype))
        return out, None, None


def quantize_(model: nn.Module, bits: int = 8, *, frozen_only: bool = False) -> nn.Module:
    """Lets `QuantizedLinear` take the place of every `nn.Linear`, one after the other, in place.

    Left as they are: subclasses of `nn.Linear`, and layers whose weight another kind of module holds too, as an
    embedding does that the output layer is tied to. Layers that share a weight go on sharing it. What was frozen stays
    frozen: set `requires_grad` before, or on each layer's `weight` afterwards.

    Args:
        model: Any module, on its device; weights of any floating dtype.
        bits: 8 or 4.
        frozen_only: Leave trainable layers as they are, such as those of an adapter on a frozen model.

    Returns:
        The model (for a lone `nn.Linear`: the layer that replaces it).

    Raises:
        ValueError: Other bits, or weights that are not finite.

    Example:
        >>> model, tokenizer = zotuner.load_model("smollm2-135m-instruct")
        >>> opt = zotuner.MeZO(quantize_(model, bits=8), lr=1e-6)
    """
    if bits not in BITS:
        raise ValueError(f"bits must be 4 or 8, got {bits!r}")
    modules = list(model.modules())
    kept = {id(p) for module in modules if type(module) is not nn.Linear for p in module._parameters.values()}
    matrices: dict[int, QuantizedMatrix] = {}
    layers: dict[nn.Module, nn.Module] = {}

    def replaced(child: nn.Module) -> nn.Module:
        if type(child) is not nn.Linear or id(weight := child.weight) in kept:
            return child
        if frozen_only and weight.requires_grad:
            return child
        if id(weight) not in matrices:
            matrices[id(weight)] = QuantizedMatrix(weight, bits)
        return layers.setdefault(child, QuantizedLinear(child, matrices[id(weight)]))

    for parent in modules:
        for name, child in parent._modules.items():
            if child is not None:
                parent._modules[name] = replaced(child)
    return replaced(model)


def chunk_for(weight: QuantizedMatrix) -> Tensor:
    """Memory for one chunk of rows, float32."""
    return torch.empty(chunk_rows(weight.shape, CHUNK), weight.shape[1], device=weight.device)


def _chunks(weight: QuantizedMatrix, perturb: Perturb | None) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows dequantised and perturbed), in memory that is used again."""
    buffer = chunk_for(weight)
    for first, last in row_spans(weight.shape, CHUNK):
        rows = weight.rows(first, last, buffer[: last - first])
        if perturb is not None:
            perturb(rows, first)
        yield first, rows
