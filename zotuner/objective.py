"""From examples to a loss: the mean log-probability of each candidate's tokens, and what is made of it.

examples  ->  rows of tokens, equal ones once  ->  one forward, logits where a candidate is predicted alone
          ->  scores (examples, candidates)  ->  cross-entropy over candidates | -score of the right one
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from zotuner.models import accepts
from zotuner.tasks.base import Example, Task


@dataclass(frozen=True)
class Batch:
    """Rows padded on the left, so that what predicts a candidate stands at the end.

    A row is prompt + candidate without its last token (nothing is predicted from that one); candidates of one token
    share their prompt's row.
    """

    input_ids: Tensor  # (rows, length) int64
    attention_mask: Tensor  # (rows, length) int64
    row: Tensor  # (candidates,) which row predicts each candidate
    targets: Tensor  # (candidates, longest) int64, padded on the left
    counts: Tensor  # (candidates,) tokens of each candidate
    cell: tuple[Tensor, Tensor]  # (candidates,) twice: example, and candidate within it
    labels: Tensor  # (examples,) the right candidate

    @property
    def tokens(self) -> int:
        """Tokens that a forward computes, padding left out."""
        return int(self.attention_mask.sum())


class Objective:
    """The loss and the scores of one task under one tokenizer.

    Args:
        task: Gives the kind of loss.
        tokenizer: A fast one, of transformers.
        max_length: Tokens; a longer row loses its beginning.
    """

    def __init__(self, task: Task, tokenizer: Any, max_length: int = 1024) -> None:
        self.task = task
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._encode = lru_cache(maxsize=None)(self._encode_once)

    def _encode_once(self, prompt: str, candidate: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(row, target): the tokens a forward reads, and those it must predict: all that end in the candidate."""
        encoded = self._tokenizer(prompt + candidate, return_offsets_mapping=True)
        inside = [i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt)]
        first, last = inside[0], inside[-1]  # a token that the tokenizer appends has no place in the text
        ids = tuple(encoded["input_ids"][: last + 1])
        return ids[:-1][-self._max_length :], ids[first:][-self._max_length :]

    def batch(self, examples: Sequence[Example], *, right_only: bool = False) -> Batch:
        """Tokenises and pads.

        Args:
            examples: At least one.
            right_only: Leave the wrong candidates out: all that language modelling needs to train.
        """
        rows: dict[tuple[int, ...], int] = {}
        entries: list[tuple[int, tuple[int, ...], int, int]] = []
        for e, example in enumerate(examples):
            for c, candidate in enumerate(example.candidates):
                if not right_only or c == example.label:
                    ids, target = self._encode(example.prompt, candidate)
                    entries.append((rows.setdefault(ids, len(rows)), target, e, 0 if right_only else c))
        row, targets, e_index, c_index = zip(*entries, strict=True)
        input_ids, mask = _left_padded(list(rows), self._tokenizer.pad_token_id or 0)
        return Batch(
            input_ids=input_ids,
            attention_mask=mask,
            row=torch.tensor(row),
            targets=_left_padded(targets, 0)[0],
            counts=torch.tensor([len(target) for target in targets]),
            cell=(torch.tensor(e_index), torch.tensor(c_index)),
            labels=torch.tensor([0 if right_only else example.label for example in examples]),
        )

    def training_batch(self, examples: Sequence[Example]) -> Batch:
        """A batch with what the loss needs, and no more."""
        return self.batch(examples, right_only=self.task.loss == "language-modelling")

    def scores(self, model: Any, batch: Batch) -> Tensor:
        """Mean log-probability of each candidate's tokens.

        Returns:
            (examples, most candidates) float32; -inf where an example has fewer candidates.
        """
        longest = batch.targets.shape[1]
        logits = _logits(model, batch, longest)[batch.row.to(model.device)]  # (candidates, longest, vocabulary)
        picked = torch.log_softmax(logits.float(), dim=-1).gather(-1, batch.targets.to(logits.device)[..., None])
        position = torch.arange(longest) >= longest - batch.counts[:, None]
        sums = (picked[..., 0] * position.to(logits.device)).sum(dim=1)
        table = sums.new_full((len(batch.labels), int(batch.cell[1].max()) + 1), -torch.inf)
        return table.index_put(tuple(i.to(sums.device) for i in batch.cell), sums / batch.counts.to(sums.device))

    def losses(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The loss of each example, (examples,) float32, from `scores`."""
        if self.task.loss == "classification":
            return torch.nn.functional.cross_entropy(scores, labels.to(scores.device), reduction="none")
        return -scores.gather(1, labels.to(scores.device)[:, None])[:, 0]

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The mean loss of a batch's examples: a 0-d float32 tensor."""
        return self.losses(self.scores(model, batch), batch.labels).mean()


def _left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(rows, longest) ids and mask."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        if row:
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
    return ids, mask


def _logits(model: Any, batch: Batch, last: int) -> Tensor:
    """Logits of the last positions, (rows, last, vocabulary); the head is run on no others where the model can."""
    has = accepts(model)
    mask = batch.attention_mask.to(model.device)
    options: dict[str, Any] = {"use_cache": False} if has("use_cache") else {}
    if has("position_ids"):
        options["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
    if has("logits_to_keep"):
        options["logits_to_keep"] = last
    out = model(input_ids=batch.input_ids.to(model.device), attention_mask=mask, **options)
    logits: Tensor = out.logits[:, -last:]
    return logits
