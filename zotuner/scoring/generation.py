"""Text generated behind prompts: greedy, with a cache of keys and values, in batches.

prompts  ->  rows padded on the left  ->  tokens, one after the other, until the stop text  ->  texts
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zotuner.batch import left_padded
from zotuner.scoring.causal import CausalScorer
from zotuner.scoring.prefix import Prefix

GREEDY = {  # stated one by one, since what is not comes from the model's own generation config
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
}


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts as tokens, padded on the left."""

    input_ids: Tensor  # (prompts, length) int64
    attention_mask: Tensor  # (prompts, length) int64: 1 for a token, 0 for padding

    @property
    def tokens(self) -> int:
        """Tokens of the prompts, padding left out."""
        return int(self.attention_mask.sum())


class Generator:
    """Generates answers.

    Args:
        tokenizer: Of transformers.
        scorer: Whose way to read prompts is taken.
        max_length: Tokens that prompt and answer have together; a longer prompt loses its beginning.
        max_new_tokens: Tokens of an answer.
        stop: Text at which an answer ends; not part of it.
    """

    def __init__(
        self, tokenizer: Any, scorer: CausalScorer, *, max_length: int, max_new_tokens: int, stop: str
    ) -> None:
        self._tokenizer, self._scorer = tokenizer, scorer
        self._most = max(1, max_length - max_new_tokens)
        self._max_new_tokens, self._stop = max_new_tokens, stop

    def prompts(self, texts: Sequence[str]) -> Prompts:
        """Tokenises and pads."""
        rows = [self._scorer.prompt(text, self._most) for text in texts]
        pad = self._tokenizer.pad_token_id or 0
        return Prompts(
            left_padded(rows, pad),
            left_padded([[1] * len(row) for row in rows], 0),
        )

    @torch.no_grad()
    def answers(self, model: Any, prompts: Prompts, branches: int = 1, prefix: Prefix | None = None) -> list[list[str]]:
        """The answers to the prompts, for each branch: the prompts are repeated so many times along dim 0.

        Args:
            model: A causal language model.
            prompts: Of `prompts`.
            branches: As of a scorer.
            prefix: What all prompts begin with, which is not computed again.
        """
        from transformers import GenerationConfig

        ids, mask = (torch.cat([x] * branches).to(model.device) for x in (prompts.input_ids, prompts.attention_mask))
        options: dict[str, Any] = {}
        if prefix is not None and _begin_with(ids, mask, prefix):  # it moves to the front, the padding behind it
            ids, mask = (_moved(x, mask, len(prefix.ids)) for x in (ids, mask))
            options["past_key_values"] = prefix.repeated(len(ids))
        config = GenerationConfig(
            **GREEDY,
            max_new_tokens=self._max_new_tokens,
            stop_strings=[self._stop],
            eos_token_id=self._eos(model),
            pad_token_id=self._tokenizer.pad_token_id or 0,
        )
        out = model.generate(ids, attention_mask=mask, generation_config=config, tokenizer=self._tokenizer, **options)
        texts = self._tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        found = [text.split(self._stop)[0].strip() for text in texts]
        size = len(found) // branches
        return [found[start : start + size] for start in range(0, len(found), size)]

    def _eos(self, model: Any) -> Any:
        stated = model.generation_config.eos_token_id
        return self._tokenizer.eos_token_id if stated is None else stated


def _begin_with(rows: Tensor, mask: Tensor, prefix: Prefix) -> bool:
    """Whether all rows do, padding left out; one that lost its beginning does not."""
    return all(
        tuple(row[visible.bool()][: len(prefix.ids)].tolist()) == prefix.ids
        for row, visible in zip(rows, mask, strict=True)
    )


def _moved(rows: Tensor, mask: Tensor, count: int) -> Tensor:
    """The first `count` tokens of each row put before its padding."""
    out = rows.clone()
    for row, visible, new in zip(rows, mask, out, strict=True):
        padding = int((visible == 0).sum())
        new[:count], new[count : count + padding] = row[padding : padding + count], row[:padding]
    return out
