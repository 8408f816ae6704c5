"""Masked models: the log-probability of each candidate's word where the prompt is masked.

examples  ->  prompt <mask> suffix  ->  one row each  ->  one forward  ->  scores (examples, candidates)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from zotuner.batch import Ids
from zotuner.errors import ZotunerError
from zotuner.tasks import Example


@dataclass(frozen=True, eq=False)
class MaskedBatch:
    """One row an example, padded on the right."""

    input_ids: Tensor  # (examples, length) int64
    attention_mask: Tensor  # (examples, length) int64: 1 for a token, 0 for padding
    places: Tensor  # (examples,) the column of the mask
    words: Tensor  # (examples, most candidates) int64; -1 where an example has fewer
    labels: Tensor  # (examples,) the right candidate

    @property
    def tokens(self) -> int:
        """Tokens that a forward computes, padding left out."""
        return int(self.attention_mask.sum())


class MaskedScorer:
    """Scores of candidates under a masked model (verbaliser words, arXiv:2012.15723, section 4.1).

    Args:
        tokenizer: A fast one, of transformers, with a mask token.
        max_length: Tokens of a row; a longer one loses the prompt's beginning, then the suffix's end.
    """

    def __init__(self, tokenizer: Any, max_length: int = 512) -> None:
        if tokenizer.mask_token is None:
            raise ZotunerError("expected the tokenizer of a masked model, but it has no mask token")
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._row = lru_cache(maxsize=None)(self._row_once)
        self._word = lru_cache(maxsize=None)(self._word_once)

    def _row_once(self, prompt: str, suffix: str, spaced: bool) -> tuple[Ids, int]:
        """The tokens of a row, and the place of the mask among them."""
        mask = self._tokenizer.mask_token
        encoded = self._tokenizer(f"{prompt}{' ' if spaced else ''}{mask}{suffix}", return_special_tokens_mask=True)
        ids, special = tuple(encoded["input_ids"]), encoded["special_tokens_mask"]
        places = [i for i, token in enumerate(ids) if token == self._tokenizer.mask_token_id]
        if len(places) != 1:
            raise ZotunerError(f"expected one {mask} in a prompt, got {len(places)} in {prompt!r} + {suffix!r}")
        place = places[0]
        lead = next(i for i, is_special in enumerate(special) if not is_special or i == place)
        tail = next(i for i, is_special in enumerate(reversed(special)) if not is_special or len(ids) - 1 - i == place)
        excess = max(0, len(ids) - self._max_length)
        left = min(excess, place - lead)
        body = ids[lead + left : len(ids) - tail]
        return ids[:lead] + body[: len(body) - (excess - left)] + ids[len(ids) - tail :], place - left

    def _word_once(self, candidate: str) -> int:
        """The token of a word, as within a sentence, wherever the mask stands (as arXiv:2012.15723's code has it)."""
        ids = self._tokenizer(" " + candidate.strip(), add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == self._tokenizer.unk_token_id:
            tokens = self._tokenizer.convert_ids_to_tokens(ids)
            raise ZotunerError(
                f"a masked model fills in one token it knows, but {candidate!r} is {tokens}; use another word"
            )
        return int(ids[0])

    def _rows(self, examples: Sequence[Example]) -> list[tuple[Ids, int]]:
        return [self._row(e.prompt, e.suffix, e.candidates[0].startswith(" ")) for e in examples]

    def length(self, example: Example, *, right_only: bool = False) -> int:
        """Tokens of an example's row."""
        return len(self._rows([example])[0][0])

    def batch(self, examples: Sequence[Example], *, right_only: bool = False, prefix: None = None) -> MaskedBatch:
        """Tokenises and pads; all candidates of an example are in its one row, wanted or not."""
        rows = self._rows(examples)
        words = [[self._word(text) for text in example.candidates] for example in examples]
        pad = self._tokenizer.pad_token_id or 0
        return MaskedBatch(
            input_ids=_right_padded([ids for ids, _ in rows], pad),
            attention_mask=_right_padded([[1] * len(ids) for ids, _ in rows], 0),
            places=torch.tensor([place for _, place in rows]),
            words=_right_padded(words, -1),
            labels=torch.tensor([example.label for example in examples]),
        )

    def prefix(self, model: Any, examples: Sequence[Example]) -> None:
        """None: what a masked model makes of a token hangs on those behind it."""

    def scores(self, model: Any, batch: MaskedBatch, branches: int = 1, prefix: None = None) -> list[Tensor]:
        """Log-probability of each candidate's word at the mask.

        Args:
            model: A masked language model.
            batch: Of `batch`.
            branches: Evaluates the batch so many times in one forward, repeated along dim 0.
            prefix: None.

        Returns:
            Of each branch (examples, most candidates) float32; -inf where an example has fewer candidates.
        """
        device = model.device
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        inputs = {name: torch.cat([x] * branches).to(device) for name, x in inputs.items()}
        rows, words = torch.arange(len(batch.places), device=device), batch.words.to(device)
        tables = []
        for logits in model(**inputs).logits.chunk(branches):  # (examples, length, vocabulary)
            log_probs = torch.log_softmax(logits[rows, batch.places.to(device)].float(), dim=-1)
            tables.append(log_probs.gather(1, words.clamp_min(0)).masked_fill(words < 0, -torch.inf))
        return tables

    def tokens(self, model: Any, batch: MaskedBatch) -> int:
        """Tokens that a forward computes, padding left out."""
        return batch.tokens


def _right_padded(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """(rows, longest) int64."""
    width = max(map(len, rows))
    return torch.tensor([list(row) + [pad] * (width - len(row)) for row in rows])
