"""How L(theta + eps u) is evaluated without touching theta.

    closure  ->  each module's forward runs on W + eps u, built in a scratch buffer for that call alone  ->  loss

Nothing is undone afterwards, because nothing was changed: no drift in any dtype, and a closure that raises leaves the
weights as they were. A large linear layer is computed by row chunks and an embedding by the rows that a batch
touches, so the scratch stays small. A parameter that the closure reads from outside its module's forward (a module
that reads another's weight, a penalty on the weights) cannot be served so: it is perturbed in place and
restored from a copy; so are all parameters of a model that torch.compile made. Which parameters those are is watched
while the first perturbed loss is evaluated: a closure that reads others later on is not served.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from zotuner import noise
from zotuner.blocks import Block, Piece, pieces_of

CHUNK = 1 << 20  # elements of scratch that one linear layer or embedding takes at a time

Closure = Callable[[], Tensor | float]


@dataclass(frozen=True)
class Draw:
    """One noise vector z over all blocks: what `zotuner.noise` needs beside the block and the element."""

    kind: str
    seed: int
    step: int
    branch: int = 0

    def at(self, block: int, start: int) -> dict[str, Any]:
        """The keyword arguments of `noise.add` and `noise.dot`."""
        return {**self.__dict__, "block": block, "start": start}


def shift(blocks: Sequence[Block], draw: Draw, alphas: Sequence[Sequence[float]]) -> None:
    """theta_i += sum_k alphas[i][k] z_i of branch `draw.branch + k`, in place, one sweep over the weights."""
    for number, piece in pieces_of(blocks):
        noise.add_(piece.view, alphas[number], **draw.at(number, piece.start))


@dataclass(frozen=True, eq=False)
class _Slot:
    """A parameter as one module holds it."""

    module: nn.Module
    name: str
    param: nn.Parameter
    pieces: tuple[tuple[int, Piece], ...]


class Perturber:
    """Evaluates losses at theta + alpha_i z_i.

    Args:
        model: The module that the closures run.
        blocks: Its blocks; noise's `block` is the position here.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        self._pieces: dict[nn.Parameter, tuple[tuple[int, Piece], ...]] = {}
        for number, piece in pieces_of(blocks):
            self._pieces[piece.param] = (*self._pieces.get(piece.param, ()), (number, piece))
        self._slots = [
            _Slot(module, name, param, self._pieces[param])
            for module in model.modules()
            for name, param in module._parameters.items()
            if param is not None and param in self._pieces
        ]
        self._pool: list[Tensor] = []
        # Compiled code neither looks at a replaced forward nor lets itself be watched
        compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())
        self._in_place: set[nn.Parameter] = set(self._pieces) if compiled else set()
        self._watched = compiled

    def loss(
        self,
        closure: Closure,
        draw: Draw | None = None,
        alphas: Sequence[float] = (),  # (n,) the factor of z in each block
    ) -> float:
        """L(theta + alpha z), or L(theta) without a draw. The weights are the same after as before, bit for bit."""
        if draw is None:
            return _value(closure())
        if self._watched:
            with self._perturbed(draw, alphas):
                return _value(closure())
        with _Watch(self._pieces) as watch, self._perturbed(draw, alphas, watch):
            value = _value(closure())
        self._watched = True
        if not watch.seen:
            return value
        self._in_place = set(watch.seen)
        warnings.warn(
            f"{len(watch.seen)} parameters are read outside their module's forward: they are perturbed in place, "
            f"with a copy of {sum(p.numel() for p in watch.seen):,} elements kept for the time of a forward",
            stacklevel=4,
        )
        return self.loss(closure, draw, alphas)

    @contextmanager
    def _perturbed(self, draw: Draw, alphas: Sequence[float], watch: "_Watch | None" = None) -> Iterator[None]:
        """Lets every module's forward run on perturbed parameters."""
        with ExitStack() as stack:
            for param in self._in_place:
                stack.callback(param.data.copy_, param.detach().clone())
                self._build(param, self._pieces[param], draw, alphas, out=param.detach())
            by_module: dict[nn.Module, list[_Slot]] = {}
            for slot in self._slots:
                if slot.param not in self._in_place:
                    by_module.setdefault(slot.module, []).append(slot)
            for module, slots in by_module.items():
                stack.enter_context(_replaced_forward(module, self._forward(module, slots, draw, alphas, watch)))
            yield

    def _forward(
        self, module: nn.Module, slots: list[_Slot], draw: Draw, alphas: Sequence[float], watch: "_Watch | None"
    ) -> Callable[..., Any]:
        """The module's forward on perturbed parameters."""
        original = module.forward
        weight = next((slot for slot in slots if slot.name == "weight"), None)
        special: Callable[..., Tensor] | None = None
        if weight is not None and len(weight.pieces) == 1 and "forward" not in module.__dict__:
            if type(module) is nn.Embedding and module.max_norm is None:
                special = self._embedding
            elif type(module) is nn.Linear and weight.param.numel() > CHUNK:
                special = self._linear

        def forward(*args: Any, **kwargs: Any) -> Any:
            taken: list[Tensor] = []
            swapped: dict[str, nn.Parameter] = {}
            try:
                with _unwatched(watch):
                    for slot in slots:
                        if special is None or slot is not weight:
                            taken.append(self._take(slot.param.numel(), slot.param))
                            perturbed = taken[-1][: slot.param.numel()].view(slot.param.shape)
                            self._build(slot.param, slot.pieces, draw, alphas, out=perturbed)
                            swapped[slot.name] = slot.param
                            module._parameters[slot.name] = perturbed  # type: ignore[assignment]
                    if special is not None:
                        return special(module, weight, draw, alphas, *args, **kwargs)
                return tree_map(lambda out: _own(out, taken), original(*args, **kwargs))
            finally:
                module._parameters.update(swapped)
                self._pool += taken

        return forward

    def _build(
        self,
        param: Tensor,
        pieces: Sequence[tuple[int, Piece]],
        draw: Draw,
        alphas: Sequence[float],
        out: Tensor,
    ) -> None:
        """out = param + alpha z, piece by piece."""
        for number, piece in pieces:
            noise.add(piece.of(param), alphas[number], out=piece.of(out), **draw.at(number, piece.start))

    def _rows(self, slot: _Slot, first: int, last: int, draw: Draw, alphas: Sequence[float], out: Tensor) -> None:
        """out = rows [first, last) of a weight that is one piece, perturbed."""
        ((number, piece),) = slot.pieces
        start = piece.start + first * slot.param.shape[1]
        noise.add(slot.param[first:last], alphas[number], out=out, **draw.at(number, start))

    def _linear(self, module: Any, slot: _Slot, draw: Draw, alphas: Sequence[float], input: Tensor) -> Tensor:
        """x W^T + b by chunks of W's rows."""
        rows, width = slot.param.shape
        step = max(1, CHUNK // width)
        scratch = self._take(step * width, slot.param)
        out = []
        for first in range(0, rows, step):
            last = min(first + step, rows)
            chunk = scratch[: (last - first) * width].view(last - first, width)
            self._rows(slot, first, last, draw, alphas, chunk)
            bias = module.bias[first:last] if module.bias is not None else None
            out.append(F.linear(input, chunk, bias))
        self._pool.append(scratch)
        return torch.cat(out, dim=-1)

    def _embedding(self, module: Any, slot: _Slot, draw: Draw, alphas: Sequence[float], input: Tensor) -> Tensor:
        """Looks up a table of the rows that the input names, perturbed."""
        rows, positions = torch.unique(input, return_inverse=True)
        table = slot.param.new_empty(len(rows), slot.param.shape[1])
        for i, row in enumerate(rows.tolist()):
            self._rows(slot, row, row + 1, draw, alphas, table[i : i + 1])
        return F.embedding(positions, table)

    def _take(self, numel: int, like: Tensor) -> Tensor:
        """A flat scratch buffer of at least `numel` elements; the caller gives it back to the pool."""
        for i, buffer in enumerate(self._pool):
            if buffer.numel() >= numel and buffer.dtype == like.dtype and buffer.device == like.device:
                return self._pool.pop(i)
        return torch.empty(max(numel, CHUNK), dtype=like.dtype, device=like.device)


class _Watch(TorchFunctionMode):
    """Notes which parameters are used by an operation that yields tensors, while `depth` is 0."""

    def __init__(self, params: dict[nn.Parameter, Any]) -> None:
        super().__init__()
        self._ids = {id(p): p for p in params}
        self.seen: dict[nn.Parameter, None] = {}
        self.depth = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.depth == 0 and any(isinstance(x, Tensor) for x in tree_leaves(result)):
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self._ids:
                    self.seen[self._ids[id(leaf)]] = None
        return result


def _own(out: Any, buffers: Sequence[Tensor]) -> Any:
    """A copy of an output that is a view of a scratch buffer, such as `return self.latents[:n]`; others as they are."""
    if isinstance(out, Tensor) and any(
        out.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for b in buffers
    ):
        return out.clone()
    return out


@contextmanager
def _unwatched(watch: _Watch | None) -> Iterator[None]:
    """What happens inside is our own reading of the weights."""
    if watch is None:
        yield
        return
    watch.depth += 1
    try:
        yield
    finally:
        watch.depth -= 1


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Sets `module.forward` for a while; what an instance had set itself comes back."""
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.forward = own  # type: ignore[method-assign]


def _value(loss: Tensor | float) -> float:
    """A closure's result as a float."""
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return float(loss.detach())
    if isinstance(loss, int | float):
        return float(loss)
    came = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
    raise ValueError(f"the closure must return the loss, a tensor with one element or a float; it returned {came}")
