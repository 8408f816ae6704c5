"""From examples to a loss: what a step makes smaller.

examples  ->  scores of the candidates  ->  cross-entropy over candidates | -score of the right one
examples  ->  answers: the best candidate, or generated text  ->  -reward, which needs no gradient
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from zotuner.adapters import virtual_tokens
from zotuner.config import OBJECTIVES
from zotuner.errors import ZotunerError
from zotuner.models import kind_of, max_positions
from zotuner.scoring import CausalScorer, Generator, MaskedScorer, Prefix
from zotuner.tasks import Example, Kind, Mean, Score, Task
from zotuner.tasks.from_python import load_score

LEAST_PROMPT = 16  # tokens of a prompt that is answered freely


class Sized(Protocol):
    """A batch of examples."""

    @property
    def labels(self) -> Tensor: ...


@dataclass(frozen=True)
class Assessed:
    """What a model makes of some examples.

    Attributes:
        losses: (examples,) float32.
        answers: One an example; None where nobody asked for them.
    """

    losses: Tensor
    answers: list[str] | None


class Objective:
    """The loss of one task under one tokenizer: cross-entropy over candidates, or language modelling of the right one.

    Args:
        task: Gives the kind of loss, and how answers are generated.
        tokenizer: A fast one, of transformers.
        max_length: Tokens of a row; a longer prompt loses its beginning.
        static: Pad to one of a few lengths, for compiled code, which serves one shape each.
        kind: Of the model; a masked one always classifies.
        special_tokens: Whether the tokenizer adds its special tokens; not where prompts have them already.

    Attributes:
        task: As given.
        classifies: Whether the loss is a cross-entropy over the candidates.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Any,
        max_length: int = 1024,
        *,
        static: bool = False,
        kind: Kind = "causal",
        special_tokens: bool = True,
    ) -> None:
        self.task = task
        self.classifies = kind == "masked" or task.loss == "classification"
        self._generator: Generator | None = None
        self._scorer: Any  # of one face: CausalScorer or MaskedScorer
        if kind == "masked":
            self._scorer = MaskedScorer(tokenizer, max_length)
        else:
            self._scorer = CausalScorer(tokenizer, max_length, static=static, special_tokens=special_tokens)
            if task.generates:
                options = {"max_length": max_length, "max_new_tokens": task.max_new_tokens, "stop": task.stop}
                self._generator = Generator(tokenizer, self._scorer, **options)  # type: ignore[arg-type]

    @property
    def generates(self) -> bool:
        """Whether a step's losses take generated text."""
        return False

    def length(self, example: Example, *, right_only: bool = False) -> int:
        """Tokens of an example's longest row; arguments as of `batch`."""
        length: int = self._scorer.length(example, right_only=right_only)
        return length

    def batch(self, examples: Sequence[Example], *, right_only: bool = False) -> Any:
        """Tokenises and pads.

        Args:
            examples: At least one.
            right_only: Leave the wrong candidates out: all that language modelling needs to train.
        """
        return self._scorer.batch(examples, right_only=right_only)

    @property
    def _trains_on_right_only(self) -> bool:
        return not self.classifies

    def training_batch(self, examples: Sequence[Example]) -> Any:
        """A batch with what the loss needs, and no more."""
        return self.batch(examples, right_only=self._trains_on_right_only)

    def training_batches(self, examples: Sequence[Example], micro_batch_size: int | None = None) -> list[Any]:
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

    def scores(self, model: Any, batch: Any) -> Tensor:
        """(examples, most candidates) float32: how likely each candidate is; -inf where there is none."""
        scores: Tensor = self._scorer.scores(model, batch)[0]
        return scores

    def losses(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The loss of each example, (examples,) float32, from `scores`."""
        if self.classifies:
            return torch.nn.functional.cross_entropy(scores, labels.to(scores.device), reduction="none")
        return -scores.gather(1, labels.to(scores.device)[:, None])[:, 0]

    def loss(self, model: Any, batch: Any, branches: int = 1) -> Tensor:
        """The mean loss of a batch's examples.

        Args:
            model: Of the objective's kind.
            batch: Of `training_batch` or `batch`.
            branches: Evaluates the batch so many times in one forward, repeated along dim 0, a branch after the other,
                for a model that computes each branch with weights of its own.

        Returns:
            float32, 0-d for one branch, otherwise (branches,).
        """
        tables = self._scorer.scores(model, batch, branches)
        means = torch.stack([self.losses(table, batch.labels).mean() for table in tables])
        return means if branches > 1 else means[0]

    def centred_loss(self, model: Any, batch: Any) -> Tensor:
        """The mean loss of a batch, 0-d, with each candidate's scores less their mean over the batch.

        While some candidates are likelier than others whatever the text, that difference is nearly all there is in a
        gradient of the plain loss; a few dozen steps settle it. Here it is gone. Of one example nothing is left.

        Args:
            model: Of the objective's kind.
            batch: Of `training_batch`, with all candidates: the objective `classifies`.
        """
        scores = self.scores(model, batch)
        present = scores.isfinite()
        means = scores.where(present, 0.0).sum(dim=0) / present.sum(dim=0).clamp_min(1)
        return self.losses(scores - means, batch.labels).mean()

    def mean_loss(self, model: Any, batches: Sequence[Any], branches: int = 1) -> Tensor:
        """The mean loss of the examples of several batches, which need not be of one size; otherwise as `loss`."""
        weighted = zip(batches, shares(batches), strict=True)
        return torch.stack([share * self.loss(model, batch, branches) for batch, share in weighted]).sum(dim=0)

    def tokens(self, model: Any, batches: Sequence[Any]) -> int:
        """Tokens that a forward over each batch computes, padding and generated ones left out."""
        return sum(self._scorer.tokens(model, batch) for batch in batches)

    def prefix(self, model: Any, examples: Sequence[Example]) -> Prefix | None:
        """What all examples begin with, computed once while the weights stay; None where that is not worth it."""
        prefix: Prefix | None = self._scorer.prefix(model, examples)
        if prefix is not None and not self._scorer.goes_on(model, examples[:2], prefix):
            return None
        return prefix

    def assess(
        self, model: Any, examples: Sequence[Example], prefix: Prefix | None = None, *, answers: bool = True
    ) -> Assessed:
        """The loss of each example, and the model's answer to it.

        Args:
            model: Of the objective's kind.
            examples: At least one.
            prefix: Of `prefix`.
            answers: Leave the answers out, where they have to be generated, if not set.
        """
        batch = self._scorer.batch(examples, prefix=prefix)
        scores = self._scorer.scores(model, batch, prefix=prefix)[0]
        losses = self.losses(scores, batch.labels)
        if self._generator is None:
            return Assessed(losses, _best(scores, examples))
        return Assessed(losses, self._generated(model, examples, prefix) if answers else None)

    def _generated(self, model: Any, examples: Sequence[Example], prefix: Prefix | None) -> list[str]:
        assert self._generator is not None
        prompts = self._generator.prompts([example.prompt for example in examples])
        return self._generator.answers(model, prompts, prefix=prefix)[0]


@dataclass(frozen=True, eq=False)
class _Posed:
    """Examples whose answers are rewarded, and what the model reads to answer them."""

    examples: Sequence[Example]
    batch: Any

    @property
    def labels(self) -> Tensor:
        return torch.tensor([example.label for example in self.examples])


class Reward(Objective):
    """An objective without a gradient: minus the mean reward of the model's answers.

    Args:
        task: Whose examples are answered: by the best candidate, or by generated text.
        tokenizer: As of `Objective`.
        score: The reward of one answer.
        **options: As of `Objective`.
    """

    def __init__(self, task: Task, tokenizer: Any, score: Score, **options: Any) -> None:
        super().__init__(task, tokenizer, **options)
        self._score = score

    @property
    def generates(self) -> bool:
        """Whether a step's losses take generated text."""
        return self._generator is not None

    @property
    def _trains_on_right_only(self) -> bool:
        return False

    def training_batch(self, examples: Sequence[Example]) -> Any:
        """A batch with what answering takes."""
        if self._generator is None:
            return _Posed(examples, self.batch(examples))
        return _Posed(examples, self._generator.prompts([example.prompt for example in examples]))

    def loss(self, model: Any, batch: _Posed, branches: int = 1) -> Tensor:
        """As of `Objective`; it has no gradient."""
        if self._generator is not None:
            answers = self._generator.answers(model, batch.batch, branches)
        else:
            answers = [_best(table, batch.examples) for table in self._scorer.scores(model, batch.batch, branches)]
        means = torch.stack([self._losses(given, batch.examples).mean() for given in answers])
        return means if branches > 1 else means[0]

    def tokens(self, model: Any, batches: Sequence[_Posed]) -> int:
        """Tokens that a forward over each batch computes, padding and generated ones left out."""
        if self._generator is not None:
            return sum(batch.batch.tokens for batch in batches)
        return super().tokens(model, [batch.batch for batch in batches])

    def assess(
        self, model: Any, examples: Sequence[Example], prefix: Prefix | None = None, *, answers: bool = True
    ) -> Assessed:
        """As of `Objective`; the answers are always there."""
        if self._generator is not None:
            found = self._generated(model, examples, prefix)
        else:
            found = _best(
                self._scorer.scores(model, self._scorer.batch(examples, prefix=prefix), prefix=prefix)[0], examples
            )
        return Assessed(self._losses(found, examples), found)

    def _losses(self, answers: Sequence[str], examples: Sequence[Example]) -> Tensor:
        return -torch.tensor([float(self._score(*pair)) for pair in zip(answers, examples, strict=True)])


def objective_for(
    task: Task, model: Any, tokenizer: Any, *, reward: str | None = None, max_length: int = 1024, **options: Any
) -> Objective:
    """The task's own objective for a model, or one that maximises a reward.

    Args:
        task: Any.
        model: Says of which kind it is, and how many tokens it reads at most.
        tokenizer: The model's.
        reward: None, one of `zotuner.config.OBJECTIVES`, or FILE.py:FUNCTION.
        max_length: Tokens of a row, if the model reads so many.
        **options: As of `Objective`.

    Raises:
        ZotunerError: The task has no such metric, or it is none of single answers; or there is no such function; or
            virtual tokens, or answers, take all that the model reads.
    """
    options["kind"] = kind_of(model)
    limit, virtual = max_positions(model, tokenizer), virtual_tokens(model)
    if limit is not None and limit - virtual < 2:
        raise ZotunerError(f"--adapter-tokens {virtual} leaves no room in the {limit} tokens that the model reads")
    options["max_length"] = max_length if limit is None else min(max_length, limit - virtual)
    if task.generates and options["max_length"] - task.max_new_tokens < LEAST_PROMPT:
        raise ZotunerError(
            f"task {task.name}: answers of up to {task.max_new_tokens} tokens leave less than {LEAST_PROMPT} of "
            f"{options['max_length']} for the prompt; raise --max-length, if the model reads more"
        )
    if reward is None:
        return Objective(task, tokenizer, **options)
    return Reward(task, tokenizer, _score(task, reward), **options)


def _score(task: Task, reward: str) -> Score:
    """What an answer is worth."""
    if reward not in OBJECTIVES:
        file, _, function = reward.rpartition(":")
        return load_score(Path(file), function)
    metric = task.metrics.get(OBJECTIVES[reward])
    if not isinstance(metric, Mean):
        known = [name for name, key in OBJECTIVES.items() if isinstance(task.metrics.get(key), Mean)]
        raise ZotunerError(f"--objective {reward}: task {task.name} has {', '.join(known) or 'none of them'}")
    return metric.score


def shares(batches: Sequence[Sized]) -> list[float]:
    """The weight of each batch's mean in the mean of all examples."""
    total = sum(len(batch.labels) for batch in batches)
    return [len(batch.labels) / total for batch in batches]


def _best(scores: Tensor, examples: Sequence[Example]) -> list[str]:
    """The candidate with the highest score, of each example."""
    return [e.candidates[i] for e, i in zip(examples, scores.argmax(dim=1).tolist(), strict=True)]
