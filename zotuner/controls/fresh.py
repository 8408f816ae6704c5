"""Controls that know nothing of a task: PertNNs at their random start, and a scale by hand for each type of block."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from zotuner.block_types import block_types
from zotuner.blocks import Block, find_blocks
from zotuner.card import MADE
from zotuner.controls.setting import about_model
from zotuner.errors import ZotunerError, unknown
from zotuner.models import load_model
from zotuner.tuner import Tuner


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


def by_hand(model: str, chosen: Mapping[str, float]) -> Tuner:
    """A scale for each type of block, as `block_types` names them; 1 for types that are not named.

    Raises:
        ZotunerError: The model has no such type, or a scale is negative or not finite.
    """
    loaded, _ = load_model(model)
    sigma = of_types(find_blocks(loaded), chosen)
    config = {MADE: "set by hand for types of blocks: a control", **chosen}
    return Tuner.static(loaded, sigma, config=config, **about_model(model, loaded))


def of_types(blocks: Sequence[Block], chosen: Mapping[str, float]) -> Tensor:
    """(n,) the scale of each block's type."""
    types = block_types([block.name for block in blocks])
    sigma = torch.ones(len(blocks))
    for name, value in chosen.items():
        if name not in types:
            raise ZotunerError(f"--by-type: {unknown('type of block', name, types)}")
        if not math.isfinite(value) or value < 0:
            raise ZotunerError(f"--by-type {name}: expected a finite scale that is not negative, got {value}")
        sigma[types[name]] = value
    if not sigma.any():
        raise ZotunerError("--by-type: expected a scale other than 0 for at least one type")
    return sigma
