"""Examples, and how answers to them are scored: a metric tells how good the answers to some examples are."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A prompt, the texts that may follow it, and which of them is right.

    Attributes:
        prompt: What stands before the candidate.
        candidates: Texts that may follow; of a task that generates, the one to train on.
        label: Which of them is right; training goes by it.
        answers: All answers that are right, where there are several or where they are generated.
        suffix: What stands behind the candidate, for a masked model.
    """

    prompt: str
    candidates: tuple[str, ...]
    label: int
    answers: tuple[str, ...] = ()
    suffix: str = ""

    @property
    def right(self) -> tuple[str, ...]:
        """All answers that count as right."""
        return self.answers or (self.candidates[self.label],)


Score = Callable[[str, Example], float]  # (answer, example) -> how good the answer is; higher is better
Metric = Callable[[Sequence[str], Sequence[Example]], float]  # (answers, examples) -> how good they are as a whole


@dataclass(frozen=True)
class Mean:
    """The metric that is the mean of a score over all examples."""

    score: Score

    def __call__(self, answers: Sequence[str], examples: Sequence[Example]) -> float:
        """The mean; needs at least one example."""
        return statistics.fmean(self.score(*pair) for pair in zip(answers, examples, strict=True))


def right(answer: str, example: Example) -> float:
    """1 for a right answer, else 0."""
    return float(answer in example.right)


def macro_f1(answers: Sequence[str], examples: Sequence[Example]) -> float:
    """The mean over the candidates of their F1, those that occur neither as answer nor as label left out."""
    given = [example.candidates.index(answer) for answer, example in zip(answers, examples, strict=True)]
    true = [example.label for example in examples]
    return statistics.fmean(_f1(given, true, label) for label in sorted({*given, *true}))


def positive_f1(answers: Sequence[str], examples: Sequence[Example]) -> float:
    """F1 of the second candidate, such as "Yes"."""
    given = [example.candidates.index(answer) for answer, example in zip(answers, examples, strict=True)]
    return _f1(given, [example.label for example in examples], 1)


def _f1(given: Sequence[int], true: Sequence[int], label: int) -> float:
    hits = sum(g == t == label for g, t in zip(given, true, strict=True))
    wrong = sum((g == label) != (t == label) for g, t in zip(given, true, strict=True))
    return 2 * hits / (2 * hits + wrong) if hits else 0.0
