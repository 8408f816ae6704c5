"""What all examples begin with, such as demonstrations, computed once and gone on from.

common tokens  ->  one forward  ->  keys and values, repeated for each batch of what follows
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zotuner.adapters import virtual_tokens
from zotuner.batch import Candidate, Ids, common
from zotuner.models import accepts

WORTH = 16  # tokens from which on a prefix is computed by itself


@dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens and a model's cache of them, for one row."""

    ids: Ids
    cache: Any

    def repeated(self, rows: int) -> Any:
        """The cache for so many rows; a forward may write to it."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return cache


@torch.no_grad()
def computed(model: Any, candidates: Sequence[Candidate], within: float) -> Prefix | None:
    """The prefix of all candidates' paths; None where it is short, or where the model keeps no keys and values.

    Args:
        model: A causal language model.
        candidates: Of two examples or more.
        within: Tokens that the model's attention reaches.
    """
    if not accepts(model)("past_key_values") or virtual_tokens(model) or len({one.example for one in candidates}) < 2:
        return None
    # each path keeps the tokens that predict its target, at least one
    most = min(len(one.path) - len(one.target) for one in candidates)
    ids = candidates[0].path[: min(most, common([one.path for one in candidates]))]
    if len(ids) < WORTH or max(len(one.path) for one in candidates) > within:
        return None
    cache = model(input_ids=torch.tensor([ids], device=model.device), use_cache=True).past_key_values
    return Prefix(ids, cache) if hasattr(cache, "batch_repeat_interleave") else None
