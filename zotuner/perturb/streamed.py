"""Modules that run on perturbed weights: W + alpha z is built in scratch, used, and forgotten.

    inputs of k branches, one after the other in dim 0  ->  branch j meets W + alpha_j z_j  ->  outputs likewise

Each weight is visited once, its k perturbations made while it is in cache. A linear layer works by chunks of its rows,
an embedding by the rows that the batch names; low-rank noise is applied to the activations and never built. Nothing is
written to the modules, so that threads may run the model at several points at once.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from zotuner.perturb import half
from zotuner.perturb.draw import Draw
from zotuner.perturb.evaluation import CannotStackError, Current, Evaluation, was_cut
from zotuner.perturb.slot import CONTAINERS, Perturbation, Scratch, Slot, build, marked

ABSENT = object()


def forward_of(module: nn.Module, slots: Sequence[Slot], current: Current) -> Callable[..., Any]:
    """The module's forward at the points of the evaluation that the calling thread is in."""
    original = module.forward
    by_name = {slot.name: slot for slot in slots if slot.container is None}
    weight, bias = by_name.get("weight"), by_name.get("bias")
    if weight is not None and (len(weight.pieces) > 1 or has_own_forward(module)):
        weight = None
    table = weight if type(module) is nn.Embedding and module.max_norm is None else None
    linear = weight if weight is not None and weight.linear else None
    twinned = not has_own_forward(module)

    @wraps(original)  # generate reads the arguments' names
    def forward(*args: Any, **kwargs: Any) -> Any:
        evaluation = current.evaluation
        if evaluation is None:
            return original(*args, **kwargs)
        if table is not None or (linear is not None and _by_rows(evaluation, args, kwargs)):
            with evaluation.own():
                if linear is not None:
                    return _linear(module, linear, bias, evaluation, *args)
                return _embedding(table, evaluation, *args, **kwargs)
        if not twinned:
            return _each(slots, evaluation, module, original, args, kwargs)
        with _twin(module) as twin:
            return _each(slots, evaluation, twin, partial(type(module).forward, twin), args, kwargs)

    return forward


def forward_once(module: nn.Module, current: Current) -> Callable[..., Any]:
    """The forward of a module all of whose parameters, and those of its children, stay at theta in all branches."""
    original = module.forward

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        evaluation = current.evaluation
        return original(*args, **kwargs) if evaluation is None else evaluation.once(original, args, kwargs)

    return forward


def has_own_forward(module: nn.Module) -> bool:
    """Whether an instance was given a forward of its own, which knows this one object and none that stands for it."""
    return "forward" in module.__dict__


@contextmanager
def _twin(module: nn.Module) -> Iterator[nn.Module]:
    """Another object with the module's state, to hold other parameters; what its forward sets is the module's, too."""
    twin = type(module).__new__(type(module))
    before = {**module.__dict__, **_own_parameters(module)}
    del before["forward"]
    twin.__dict__.update(before)
    yield twin
    for name, value in twin.__dict__.items():
        if before.get(name, ABSENT) is not value:
            module.__dict__[name] = value


def _own_parameters(module: nn.Module) -> dict[str, Any]:
    """What a twin has for itself: names for its parameters, and containers with names for theirs."""
    children = dict(module._modules)
    for name, child in children.items():
        if isinstance(child, CONTAINERS):
            children[name] = own = type(child).__new__(type(child))
            own.__dict__.update({**child.__dict__, "_parameters": dict(child._parameters)})
    return {"_parameters": dict(module._parameters), "_modules": children}


def _by_rows(evaluation: Evaluation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a linear layer's input is the stacked batch, and a product into given memory is what is wanted."""
    if kwargs or len(args) != 1 or torch.is_grad_enabled() or torch.is_autocast_enabled(args[0].device.type):
        return False
    return len(evaluation.points) == 1 or evaluation.holds(args[0])


@contextmanager
def replaced_forwards(forwards: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Sets `module.forward` of each module for a while; what an instance had set itself comes back."""
    may_compile = "torch._dynamo" in sys.modules  # code compiled of the model is to call these, not to trace them
    with ExitStack() as stack:
        for module, forward in forwards:
            stack.callback(_restore_forward, module, module.__dict__.get("forward"))
            module.forward = torch.compiler.disable(forward) if may_compile else forward  # type: ignore[method-assign]
        yield


def _restore_forward(module: nn.Module, own: Callable[..., Any] | None) -> None:
    del module.__dict__["forward"]
    if own is not None:
        module.forward = own  # type: ignore[method-assign]


def _each(
    slots: Sequence[Slot],
    evaluation: Evaluation,
    holder: nn.Module,
    own: Callable[..., Any],
    args: Any,
    kwargs: dict[str, Any],
) -> Any:
    """A module's own forward, a branch at a time, while its holder has perturbed parameters."""
    outputs, parts = [], evaluation.split((args, kwargs))
    cut = was_cut((args, kwargs), parts)
    for j, (some, named) in enumerate(parts):
        with evaluation.alone(j) as point, _held(slots, holder, point, evaluation) as taken:
            outputs.append(tree_map(lambda out, taken=taken: _own(out, taken), own(*some, **named)))
    return evaluation.join(outputs, cut)


@contextmanager
def _held(
    slots: Sequence[Slot], holder: nn.Module, point: Perturbation | None, evaluation: Evaluation
) -> Iterator[list[Tensor]]:
    """Lets a holder have its parameters at a point; yields the scratch that they lie in."""
    taken: list[Tensor] = []
    try:
        if point is not None:
            with evaluation.own():
                for slot in slots:
                    taken += slot.hold(holder, point, evaluation.scratch)
        yield taken
    finally:
        for slot in slots:
            slot.release(holder)
        evaluation.scratch.give(taken)


def _own(out: Any, buffers: Sequence[Tensor]) -> Any:
    """A copy of an output that is a view of a scratch buffer, such as `return self.latents[:n]`; others as they are."""
    if isinstance(out, Tensor) and any(
        out.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for b in buffers
    ):
        return out.clone()
    return out


def _linear(module: Any, weight: Slot, bias: Slot | None, evaluation: Evaluation, input: Tensor) -> Tensor:
    """x W^T + b, branch by branch into one output."""
    rows, width = weight.param.shape
    stacked = input.reshape(-1, width)
    out = input.new_empty(len(stacked), rows)
    k = len(evaluation.points)
    inputs, outputs = ((stacked,), (out,)) if k == 1 else (stacked.chunk(k), out.chunk(k))
    calls = list(zip(evaluation.points, inputs, outputs, strict=True))
    low_rank = any(point is not None and point.draw.low_rank(weight.param) for point in evaluation.points)
    if evaluation.half and weight.param.dtype == torch.float32 and half.applies(_alphas(weight, calls)):
        _multiply_half(weight, calls, evaluation.scratch, low_rank)
    elif low_rank:
        weight.product(stacked, out, evaluation.scratch)
    else:
        _multiply(weight, calls, evaluation.scratch)
    if low_rank:
        _add_low_rank(weight, calls)
    if module.bias is not None:
        for point, _, y in calls:
            y.add_(module.bias if bias is None else _vector(bias, point))
    return out.view(*input.shape[:-1], rows)


Call = tuple[Perturbation | None, Tensor, Tensor]  # of one branch: where, x (m, width), y (m, rows), which is filled


def _multiply(weight: Slot, calls: Sequence[Call], scratch: Scratch) -> None:
    """y = x (W + alpha z)^T by chunks of W's rows; each is perturbed and used k times while it is in cache."""
    rows, width = weight.param.shape
    ((number, piece),) = weight.pieces
    for first, plain in weight.chunks(scratch):
        chunk, transposed = scratch.matrix(plain)
        for point, x, y in calls:
            if point is not None:
                with marked("noise"):
                    start = piece.start + first * width
                    point.draw.add(plain, [point.alphas[number]], out=chunk, block=number, start=start)
            by = plain.t() if point is None else transposed
            torch.mm(x, by.to(x.dtype), out=y if len(plain) == rows else y[:, first : first + len(plain)])


def _multiply_half(weight: Slot, calls: Sequence[Call], scratch: Scratch, low_rank: bool) -> None:
    """As `_multiply`, in bfloat16; noise of low rank is left to `_add_low_rank`."""
    width = weight.param.shape[1]
    ((number, piece),) = weight.pieces
    for first, plain in weight.chunks(scratch):
        z, _ = scratch.matrix(plain)
        noise = partial(_half_noise, calls, number, piece.start + first * width, z)
        inputs, outputs = [x for _, x, _ in calls], [y[:, first : first + len(plain)] for _, _, y in calls]
        half.multiply(plain, _alphas(weight, calls), inputs, outputs, None if low_rank else noise)


def _half_noise(calls: Sequence[Call], block: int, start: int, z: Tensor, j: int) -> Tensor:
    """z of a branch."""
    point = calls[j][0]
    assert point is not None
    with marked("noise"):
        point.draw.add(z.zero_(), [1.0], out=z, block=block, start=start)
        return z


def _alphas(weight: Slot, calls: Sequence[Call]) -> list[float | None]:
    """The factor of z in each branch; None at theta itself."""
    ((number, _),) = weight.pieces
    return [None if point is None else point.alphas[number] for point, _, _ in calls]


def _add_low_rank(weight: Slot, calls: Sequence[Call]) -> None:
    """y += alpha / sqrt(r) (x B) A^T: x (W + alpha A B^T / sqrt(r))^T without the product A B^T."""
    ((number, piece),) = weight.pieces
    for point, x, y in calls:
        if point is not None:
            assert isinstance(point.draw, Draw)  # no other says that it is of low rank
            with marked("noise"):
                a, b = (f.to(x) for f in point.draw.factors(weight.param.shape, number, piece.start))
            y.addmm_(x @ b, a.t(), alpha=point.alphas[number] * point.draw.rank**-0.5)


def _vector(slot: Slot, point: Perturbation | None) -> Tensor:
    """A small parameter at a point, in memory of its own."""
    if point is None:
        return slot.param.detach()
    out = torch.empty_like(slot.param)
    build(slot, point, out)
    return out


def _embedding(weight: Slot | None, evaluation: Evaluation, input: Tensor) -> Tensor:
    """Looks up tables of the rows that the input names, perturbed."""
    assert weight is not None
    ((number, piece),) = weight.pieces
    outputs, parts = [], evaluation.split(input)
    if len(parts) > 1 and input.ndim and input.shape[0] not in (1, evaluation.rows):  # positions, of one text
        raise CannotStackError(f"an embedding of {tuple(input.shape)} for {evaluation.rows} rows")
    for point, ids in zip(evaluation.points, parts, strict=True):
        if point is None:
            outputs.append(F.embedding(ids, weight.param.detach()))
            continue
        with marked("noise"):
            rows, positions = torch.unique(ids, return_inverse=True)
            table = point.draw.rows(weight.param, rows, point.alphas[number], block=number, start=piece.start)
        outputs.append(F.embedding(positions, table))
    whole: Tensor = evaluation.join(outputs, parts[0] is not input)
    return whole
