"""What stays at theta in all points of a step: whole layers, frozen or of scale 0."""

from collections.abc import Iterator, Sequence

from torch import nn

from zotuner.blocks import weights_of
from zotuner.perturb.slot import CONTAINERS, Perturbation, Slot
from zotuner.perturb.streamed import has_own_forward

NO_FORWARD = (*CONTAINERS, nn.ModuleList, nn.ModuleDict)


def still_modules(model: nn.Module, slots: Sequence[Slot], points: Sequence[Perturbation | None]) -> list[nn.Module]:
    """The largest modules in which nothing is perturbed at any point; none where all points are theta itself."""
    alphas = [point.alphas for point in points if point is not None]
    if not alphas:
        return []
    moves = [any(column) for column in zip(*alphas, strict=True)]
    moving = {slot.module for slot in slots if any(moves[number] for number, _ in slot.pieces)}

    def largest(module: nn.Module) -> Iterator[nn.Module]:
        if not moving.isdisjoint(module.modules()):
            for child in module.children():
                yield from largest(child)
        elif (
            not isinstance(module, NO_FORWARD)
            and not has_own_forward(module)
            and next(module.parameters(), None) is not None
        ):
            yield module

    return list(dict.fromkeys(largest(model)))


def share_before(model: nn.Module, still: Sequence[nn.Module]) -> float:
    """What weights lie in these modules before any other that has some, as a share of all.

    Embedding tables, which are looked up, do not count. Modules are taken to run in the order in which they were
    registered.
    """
    inside = {child for module in still for child in module.modules()}
    before = total = 0
    for module in model.modules() if still else ():
        own = 0 if isinstance(module, nn.Embedding) else sum(w.numel() for w in weights_of(module).values())
        before += own if before == total and module in inside else 0
        total += own
    return before / max(1, total)
