"""Controls that know nothing of a task: PertNNs at their random start, and a scale by hand for each type of block."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from zotuner.block_types import block_types, layer_of
from zotuner.blocks import Block, find_blocks
from zotuner.card import MADE
from zotuner.controls.setting import about_model
from zotuner.errors import ZotunerError, unknown
from zotuner.models import load_model
from zotuner.tuner import Tuner

LARGEST = 1e6  # scale by hand; only ratios of scales count


def untrained(model: str, architecture: Literal["abs", "exp"], seed: int) -> Tuner:
    """PertNNs as meta-training would begin with them.

    Args:
        model: Name, folder or Hub id.
        architecture: "abs" (random scales) or "exp" (1 everywhere, which is MeZO).
        seed: Of the nets' weights.
    """
    loaded, _ = load_model(model)
    made = f"untrained, with the random weights of seed {seed}: a control"
    config = {MADE: made, "architecture": architecture, "seed": seed}
    return Tuner.for_model(loaded, architecture, seed, config=config, **about_model(model, loaded))


def by_hand(model: str, chosen: Mapping[str, float], layers: Sequence[tuple[int, int]] = ()) -> Tuner:
    """A scale for each type of block, as `block_types` names them; 1 for types that are not named.

    Args:
        model: Name, folder or Hub id.
        chosen: From a type to its scale.
        layers: (first, last) of each span of layers that is tuned, all other blocks having scale 0; none: all are.

    Raises:
        ZotunerError: The model has no such type or layer, or a scale is negative or not finite.
    """
    loaded, _ = load_model(model)
    blocks = find_blocks(loaded)
    sigma = of_types(blocks, chosen) * within(blocks, layers)
    if not sigma.any():
        raise ZotunerError("--by-type, --layers: expected a scale other than 0 for at least one block")
    spans = {"layers": [f"{first}-{last}" for first, last in layers]} if layers else {}
    config = {MADE: "set by hand: a control", **spans, **chosen}
    return Tuner.static(loaded, sigma, config=config, **about_model(model, loaded))


def within(blocks: Sequence[Block], layers: Sequence[tuple[int, int]]) -> Tensor:
    """(n,) 1 for blocks of these spans of layers, 0 for others; 1 for all, where there are none."""
    numbers = [layer_of(block.name) for block in blocks]
    depth = max((number for number in numbers if number is not None), default=-1)
    for first, last in layers:
        if not first <= last <= depth:
            raise ZotunerError(f"--layers {first}-{last}: expected two of the layers 0 to {depth}, the lower one first")
    inside = [not layers or (n is not None and any(a <= n <= b for a, b in layers)) for n in numbers]
    return torch.tensor(inside).float()


def of_types(blocks: Sequence[Block], chosen: Mapping[str, float]) -> Tensor:
    """(n,) the scale of each block's type."""
    types = block_types([block.name for block in blocks])
    sigma = torch.ones(len(blocks))
    for name, value in chosen.items():
        if name not in types:
            raise ZotunerError(f"--by-type: {unknown('type of block', name, types)}")
        if not 0 <= value <= LARGEST:
            raise ZotunerError(
                f"--by-type {name}: expected a finite scale that is not negative, at most {LARGEST:g}, got {value:g}"
            )
        sigma[types[name]] = value
    return sigma
