"""From examples to a loss: the mean log-probability of each candidate's tokens, and what is made of it.

examples  ->  tokens  ->  rows that hold what candidates share once  ->  one forward, logits at the end alone
          ->  scores (examples, candidates)  ->  cross-entropy over candidates | -score of the right one
"""

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from zotuner.batch import Batch, Candidate, Ids, arrange, collate
from zotuner.errors import ZotunerError
from zotuner.models import accepts
from zotuner.tasks import Example, Task

WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")  # names that configurations give a short attention


class Objective:
    """The loss and the scores of one task under one tokenizer.

    Rows that hold several candidates need a model that honours a mask of 4 dimensions and positions of our own. The
    first such batch is scored both ways, once a model; where the scores differ, candidates get rows of their own.

    Args:
        task: Gives the kind of loss.
        tokenizer: A fast one, of transformers.
        max_length: Tokens of a row; a longer prompt loses its beginning.
        static: Pad to one of a few lengths, for compiled code, which serves one shape each.
    """

    def __init__(self, task: Task, tokenizer: Any, max_length: int = 1024, *, static: bool = False) -> None:
        self.task = task
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._static = static
        self._encode = lru_cache(maxsize=None)(self._encode_once)
        self._packs: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()

    def _encode_once(self, prompt: str, candidate: str) -> tuple[Ids, Ids]:
        """(path, target): the tokens a forward reads, and those it must predict: all that end in the candidate."""
        encoded = self._tokenizer(prompt + candidate, return_offsets_mapping=True)
        inside = [i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt)]
        if not inside or inside[0] == 0:
            raise ZotunerError(
                f"expected a prompt and a candidate of a token or more, got {prompt!r} and {candidate!r}"
            )
        first, last = inside[0], inside[-1]  # a token that the tokenizer appends has no place in the text
        ids = tuple(encoded["input_ids"][: last + 1])
        return ids[:-1][-self._max_length :], ids[first:][-self._max_length :]

    def _candidates(self, examples: Sequence[Example], right_only: bool) -> list[Candidate]:
        return [
            Candidate(*self._encode(example.prompt, text), e, 0 if right_only else c)
            for e, example in enumerate(examples)
            for c, text in enumerate(example.candidates)
            if not right_only or c == example.label
        ]

    def length(self, example: Example, *, right_only: bool = False) -> int:
        """Tokens of an example's longest row; arguments as of `batch`."""
        paths = [candidate.path for candidate in self._candidates([example], right_only)]
        return max(len(row.ids) for row in arrange(paths, self._max_length).values())

    def batch(self, examples: Sequence[Example], *, right_only: bool = False) -> Batch:
        """Tokenises and pads.

        Args:
            examples: At least one.
            right_only: Leave the wrong candidates out: all that language modelling needs to train.
        """
        candidates = self._candidates(examples, right_only)
        labels = [0 if right_only else example.label for example in examples]
        pad = self._tokenizer.pad_token_id or 0
        return collate(candidates, labels, max_length=self._max_length, pad=pad, static=self._static)

    @property
    def _trains_on_right_only(self) -> bool:
        return self.task.loss == "language-modelling"

    def training_batch(self, examples: Sequence[Example]) -> Batch:
        """A batch with what the loss needs, and no more."""
        return self.batch(examples, right_only=self._trains_on_right_only)

    def training_batches(self, examples: Sequence[Example], micro_batch_size: int | None = None) -> list[Batch]:
        """The examples in micro-batches: sorted by length, so that each is padded to its own longest.

        Args:
            examples: At least one.
            micro_batch_size: Examples a forward at most; None: all of them.
        """
        if micro_batch_size is None or micro_batch_size >= len(examples):
            return [self.training_batch(examples)]
        ordered = sorted(examples, key=lambda e: self.length(e, right_only=self._trains_on_right_only))
        starts = range(0, len(ordered), micro_batch_size)
        return [self.training_batch(ordered[start : start + micro_batch_size]) for start in starts]

    def scores(self, model: Any, batch: Batch) -> Tensor:
        """Mean log-probability of each candidate's tokens.

        Returns:
            (examples, most candidates) float32; -inf where an example has fewer candidates.
        """
        return _scores(model, self._readable(model, batch, 1), 1)[0]

    def losses(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The loss of each example, (examples,) float32, from `scores`."""
        if self.task.loss == "classification":
            return torch.nn.functional.cross_entropy(scores, labels.to(scores.device), reduction="none")
        return -scores.gather(1, labels.to(scores.device)[:, None])[:, 0]

    def loss(self, model: Any, batch: Batch, branches: int = 1) -> Tensor:
        """The mean loss of a batch's examples.

        Args:
            model: A causal language model.
            batch: Of `training_batch` or `batch`.
            branches: Evaluates the batch so many times in one forward, repeated along dim 0, a branch after the other,
                for a model that computes each branch with weights of its own.

        Returns:
            float32, 0-d for one branch, otherwise (branches,).
        """
        tables = _scores(model, self._readable(model, batch, branches), branches)
        means = torch.stack([self.losses(table, batch.labels).mean() for table in tables])
        return means if branches > 1 else means[0]

    def mean_loss(self, model: Any, batches: Sequence[Batch], branches: int = 1) -> Tensor:
        """The mean loss of the examples of several batches, which need not be of one size; otherwise as `loss`."""
        weighted = zip(batches, shares(batches), strict=True)
        return torch.stack([share * self.loss(model, batch, branches) for batch, share in weighted]).sum(dim=0)

    def tokens(self, model: Any, batches: Sequence[Batch]) -> int:
        """Tokens that a forward over each batch computes, padding left out, as the model was last seen to read them."""
        return sum(self._readable(model, batch, 1).tokens for batch in batches)

    def _readable(self, model: Any, batch: Batch, branches: int) -> Batch:
        """The batch itself, or its candidates in rows of their own if the model does not read it right."""
        if batch.plain is None:
            return batch
        if not accepts(model)("position_ids") or batch.input_ids.shape[1] > _window(model):
            return batch.plain
        if model not in self._packs:
            self._packs[model] = _agree(model, batch, branches)
        return batch if self._packs[model] else batch.plain


def shares(batches: Sequence[Batch]) -> list[float]:
    """The weight of each batch's mean in the mean of all examples."""
    total = sum(len(batch.labels) for batch in batches)
    return [len(batch.labels) / total for batch in batches]


def _scores(model: Any, batch: Batch, branches: int) -> list[Tensor]:
    """The scores of each branch; what is as large as the vocabulary is made for one branch at a time."""
    rows, columns, predictors, targets, counts, example, number = (
        x.to(model.device) for x in (*batch.places, batch.predictors, batch.targets, batch.counts, *batch.cell)
    )
    longest = targets.shape[1]
    scored = torch.arange(longest, device=model.device) >= longest - counts[:, None]
    tables = []
    for logits in _logits(model, batch, branches).chunk(branches):  # (rows, last, vocabulary)
        log_probs = torch.log_softmax(logits[rows, columns].float(), dim=-1)  # (places, vocabulary)
        sums = (log_probs[predictors, targets] * scored).sum(dim=1)
        table = sums.new_full((len(batch.labels), int(batch.cell[1].max()) + 1), -torch.inf)
        tables.append(table.index_put((example, number), sums / counts))
    return tables


def _logits(model: Any, batch: Batch, branches: int) -> Tensor:
    """Logits, (branches * rows, columns, vocabulary); of the last columns alone where the model can."""
    has = accepts(model)
    mask = batch.attention_mask if batch.plain is None else _additive(batch.visible(), _dtype(model))
    inputs = {"input_ids": batch.input_ids, "attention_mask": mask}
    if has("position_ids"):
        inputs["position_ids"] = batch.position_ids
    inputs = {name: torch.cat([x] * branches).to(model.device) for name, x in inputs.items()}
    options: dict[str, Any] = {"use_cache": False} if has("use_cache") else {}
    if has("logits_to_keep"):
        options["logits_to_keep"] = batch.last
    logits: Tensor = model(**inputs, **options).logits
    return logits


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, 1, length, length): what attention adds to its logits; every implementation of attention knows this."""
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[:, None]


def _dtype(model: Any) -> torch.dtype:
    dtype: torch.dtype = next(param.dtype for param in model.parameters() if param.is_floating_point())
    return dtype


def _window(model: Any) -> float:
    """Over how many tokens the model's attention reaches at least; a mask of our own would undo such a limit."""
    config = getattr(model, "config", None)
    stated = [getattr(config, name, None) for name in WINDOWS]
    return min((window for window in stated if isinstance(window, int)), default=torch.inf)


@torch.no_grad()
def _agree(model: Any, batch: Batch, branches: int) -> bool:
    """Whether a packed batch has the scores of the plain one, to rounding; warns where it has not."""
    assert batch.plain is not None
    plain = torch.stack(_scores(model, batch.plain, branches))
    try:
        packed = torch.stack(_scores(model, batch, branches))
    except Exception as error:  # each architecture refuses a mask of 4 dimensions in its own way
        reason = f"{type(error).__name__}: " + str(error).strip().split("\n")[0]
    else:
        differ = float((packed - plain)[plain != -torch.inf].square().mean().sqrt())
        if differ <= torch.finfo(_dtype(model)).eps ** 0.5:  # bfloat16: rounding gives 0.02, a mask unheeded 0.3
            return True
        reason = f"scores differ by {differ:.2g}"
    warnings.warn(
        f"{type(model).__name__} cannot read several candidates in one row ({reason}): each gets a row of its own, "
        "as right, but slower",
        stacklevel=4,
    )
    return False
