"""Causal models: the mean log-probability of each candidate's tokens behind its prompt.

examples  ->  tokens  ->  rows that hold what candidates share once  ->  one forward, logits at the end alone
          ->  scores (examples, candidates)
"""

import warnings
from collections.abc import Callable, MutableMapping, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from zotuner.batch import Batch, Candidate, Ids, arrange, collate
from zotuner.errors import ZotunerError, first_line
from zotuner.models import accepts
from zotuner.scoring.prefix import Prefix, computed
from zotuner.tasks import Example

WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")  # names that configurations give a short attention


class CausalScorer:
    """Scores of candidates under a causal model.

    Rows that hold several candidates or examples need a model that honours a mask of 4 dimensions and positions of our
    own; a prefix computed beforehand needs one that goes on from its cache. The first such batch is scored both ways,
    once a model; where the scores differ, the plain way is taken from then on.

    Args:
        tokenizer: A fast one, of transformers.
        max_length: Tokens of a row; a longer prompt loses its beginning, but not the special tokens before it.
        static: Pad to one of a few lengths, for compiled code, which serves one shape each.
        special_tokens: Whether the tokenizer adds its special tokens; not where the prompt has them already.
    """

    def __init__(
        self, tokenizer: Any, max_length: int = 1024, *, static: bool = False, special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._static = static
        self._options = {} if special_tokens else {"add_special_tokens": False}
        self._encode = lru_cache(maxsize=None)(self._encode_once)
        self._packs: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
        self._goes_on: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()

    def _encode_once(self, prompt: str, candidate: str) -> tuple[Ids, Ids]:
        """(path, target): the tokens a forward reads, and those it must predict: all that end in the candidate."""
        encoded = self._tokenizer(prompt + candidate, return_offsets_mapping=True, **self._options)
        ends = [end for _, end in encoded["offset_mapping"]]
        inside = [i for i, end in enumerate(ends) if end > len(prompt)]
        if not inside or inside[0] == 0:
            raise ZotunerError(
                f"expected a prompt and a candidate of a token or more, got {prompt!r} and {candidate!r}"
            )
        first, last = inside[0], inside[-1]  # a token that the tokenizer appends has no place in the text
        lead = next(i for i, end in enumerate(ends) if end > 0)
        ids = tuple(encoded["input_ids"][: last + 1])
        kept = max(1, self._max_length - lead)
        return ids[:lead] + ids[lead:-1][-kept:], ids[first:][-kept:]

    def prompt(self, text: str, most: int) -> Ids:
        """The tokens of a prompt that nothing follows yet, at most so many."""
        encoded = self._tokenizer(text, return_offsets_mapping=True, **self._options)
        ends = [end for _, end in encoded["offset_mapping"]]
        inside = [i for i, end in enumerate(ends) if end > 0]
        if not inside:
            raise ZotunerError(f"expected a prompt of a token or more, got {text!r}")
        ids = tuple(encoded["input_ids"][: inside[-1] + 1])
        return ids[: inside[0]] + ids[inside[0] :][-max(1, most - inside[0]) :]

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

    def batch(self, examples: Sequence[Example], *, right_only: bool = False, prefix: Prefix | None = None) -> Batch:
        """Tokenises and pads.

        Args:
            examples: At least one.
            right_only: Leave the wrong candidates out: all that language modelling needs to train.
            prefix: Leave out what it holds.
        """
        skip = 0 if prefix is None else len(prefix.ids)
        candidates = [one.behind(skip) for one in self._candidates(examples, right_only)]
        labels = [0 if right_only else example.label for example in examples]
        pad = self._tokenizer.pad_token_id or 0
        return collate(candidates, labels, max_length=self._max_length - skip, pad=pad, static=self._static)

    def prefix(self, model: Any, examples: Sequence[Example]) -> Prefix | None:
        """What all examples begin with, computed once, if that is much and the model can go on from it."""
        if not self._goes_on.get(model, True):
            return None
        candidates = self._candidates(examples, right_only=False)
        return computed(model, candidates, within=_window(model))

    def scores(self, model: Any, batch: Batch, branches: int = 1, prefix: Prefix | None = None) -> list[Tensor]:
        """Mean log-probability of each candidate's tokens.

        Args:
            model: A causal language model.
            batch: Of `batch`.
            branches: Evaluates the batch so many times in one forward, repeated along dim 0.
            prefix: That the batch was made without.

        Returns:
            Of each branch (examples, most candidates) float32; -inf where an example has fewer candidates.
        """
        return _scores(model, self._readable(model, batch, branches, prefix), branches, prefix)

    def tokens(self, model: Any, batch: Batch) -> int:
        """Tokens that a forward computes, padding left out, as the model was last seen to read them."""
        return self._readable(model, batch, 1, None).tokens

    def goes_on(self, model: Any, examples: Sequence[Example], prefix: Prefix) -> bool:
        """Whether some examples have the same scores behind a computed prefix as with it; asked once a model."""
        return _answered(
            self._goes_on,
            model,
            lambda: _same(
                model,
                self.scores(model, self.batch(examples))[0],
                lambda: self.scores(model, self.batch(examples, prefix=prefix), 1, prefix)[0],
                "go on from a prefix that was computed before: it is computed with every example",
            ),
        )

    def _readable(self, model: Any, batch: Batch, branches: int, prefix: Prefix | None) -> Batch:
        """The batch itself, or its candidates in rows of their own if the model does not read it right."""
        if batch.plain is None:
            return batch
        length = batch.path_length + (0 if prefix is None else len(prefix.ids))
        if not accepts(model)("position_ids") or length > _window(model):
            return batch.plain
        packs = _answered(self._packs, model, lambda: _agree(model, batch, branches, prefix))
        return batch if packs else batch.plain


def _scores(model: Any, batch: Batch, branches: int, prefix: Prefix | None) -> list[Tensor]:
    """The scores of each branch; what is as large as the vocabulary is made for one branch at a time."""
    columns = batch.places[1]
    if accepts(model)("logits_to_keep"):  # the logits are of these columns alone
        columns = torch.searchsorted(batch.columns, columns)
    rows, columns, predictors, targets, counts, example, number = (
        x.to(model.device)
        for x in (batch.places[0], columns, batch.predictors, batch.targets, batch.counts, *batch.cell)
    )
    longest = targets.shape[1]
    scored = torch.arange(longest, device=model.device) >= longest - counts[:, None]
    tables = []
    for logits in _logits(model, batch, branches, prefix).chunk(branches):  # (rows, kept columns, vocabulary)
        log_probs = torch.log_softmax(logits[rows, columns].float(), dim=-1)  # (places, vocabulary)
        sums = (log_probs[predictors, targets] * scored).sum(dim=1)
        table = sums.new_full((len(batch.labels), int(batch.cell[1].max()) + 1), -torch.inf)
        tables.append(table.index_put((example, number), sums / counts))
    return tables


def _logits(model: Any, batch: Batch, branches: int, prefix: Prefix | None) -> Tensor:
    """Logits, (branches * rows, columns, vocabulary); of the columns that predict alone where the model can."""
    has = accepts(model)
    before = 0 if prefix is None else len(prefix.ids)
    if batch.plain is None:
        mask = torch.nn.functional.pad(batch.attention_mask, (before, 0), value=1)
    else:
        visible = torch.nn.functional.pad(batch.visible(), (before, 0), value=True)
        mask = _additive(visible, _dtype(model))
    inputs = {"input_ids": batch.input_ids, "attention_mask": mask}
    if has("position_ids"):
        inputs["position_ids"] = batch.position_ids + before
    inputs = {name: torch.cat([x] * branches).to(model.device) for name, x in inputs.items()}
    options: dict[str, Any] = {"use_cache": False} if has("use_cache") else {}
    if prefix is not None:
        options = {"use_cache": True, "past_key_values": prefix.repeated(len(inputs["input_ids"]))}
    if has("logits_to_keep"):
        columns = batch.columns.to(model.device)
        together = -int(columns[0]) == len(columns)  # the last ones, which a number says without a copy
        options["logits_to_keep"] = len(columns) if together else columns
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


def _answered(answers: MutableMapping[Any, bool], model: Any, ask: Callable[[], bool | None]) -> bool:
    """What is known of a model, asked for where nothing is; None is no answer: not this time, and asked again."""
    if model not in answers:
        came = ask()
        if came is None:
            return False
        answers[model] = came
    return answers[model]


@torch.no_grad()
def _agree(model: Any, batch: Batch, branches: int, prefix: Prefix | None) -> bool | None:
    """Whether a packed batch has the scores of the plain one, to rounding; as `_same`."""
    assert batch.plain is not None
    return _same(
        model,
        torch.stack(_scores(model, batch.plain, branches, prefix)),
        lambda: torch.stack(_scores(model, batch, branches, prefix)),
        "read several candidates or examples in one row: each gets a row of its own",
    )


@torch.no_grad()
def _same(model: Any, plain: Tensor, other: Callable[[], Tensor], what: str) -> bool | None:
    """Whether another way to some scores gives the same, to rounding; warns where it does not.

    None: scores that are not finite tell nothing of it.
    """
    there = plain != -torch.inf  # elsewhere an example has fewer candidates
    if not bool(torch.isfinite(plain[there]).all()):
        return None
    try:
        differ = float((other() - plain)[there].square().mean().sqrt())
    except Exception as error:  # each architecture refuses a mask or a cache in its own way
        reason = f"{type(error).__name__}: {first_line(error)}"
    else:
        if differ <= torch.finfo(_dtype(model)).eps ** 0.5:  # bfloat16: rounding gives 0.02, a mask unheeded 0.3
            return True
        reason = f"scores differ by {differ:.2g}"
    warnings.warn(f"{type(model).__name__} cannot {what}, as right, but slower ({reason})", stacklevel=5)
    return False
