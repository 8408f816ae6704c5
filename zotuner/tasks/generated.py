"""Scores of answers in free text, as published for SQuAD (ReCoRD has the same), DROP and GSM8K."""

import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from zotuner.tasks.scores import Example

Similarity = Callable[[str, str], float]  # (answer, right answer) -> 0 to 1

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
MARKED = re.compile(r"#### *([-$\d.,]+)")
SAID = re.compile(r"The answer is:([^\n]*)")
NUMBER = re.compile(r"-?\d*\.?\d+")


@dataclass(frozen=True)
class Best:
    """The score that is the similarity to the most similar of the right answers."""

    similarity: Similarity

    def __call__(self, answer: str, example: Example) -> float:
        """From 0 to 1."""
        return max(self.similarity(answer, right) for right in example.right)


def squad_em(answer: str, right: str) -> float:
    """1 for the same words, else 0 (SQuAD v1.1, arXiv:1606.05250, section 6.1)."""
    return float(_squad_words(answer) == _squad_words(right))


def squad_f1(answer: str, right: str) -> float:
    """F1 of the words that both have, each as often as it occurs; 0 where they share none, even if both are empty."""
    given, true = Counter(_squad_words(answer)), Counter(_squad_words(right))
    return 2 * (given & true).total() / max(1, given.total() + true.total())


def _squad_words(text: str) -> list[str]:
    """Lower case, without punctuation and articles."""
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


def drop_em(answer: str, right: str) -> float:
    """1 for the same words, else 0 (DROP, arXiv:1903.00161, section 5)."""
    return float(_drop_words(answer) == _drop_words(right))


def drop_f1(answer: str, right: str) -> float:
    """F1 of the sets of words, rounded to two places as published; 0 unless a number of the right answer is met."""
    given, true = set(_drop_words(answer)), set(_drop_words(right))
    numbers = {word for word in true if _is_number(word)}
    if numbers and not numbers & given:
        return 0.0
    return round(2 * len(given & true) / (len(given) + len(true)), 2) if given or true else 1.0


def _drop_words(text: str) -> list[str]:
    """Words between spaces and hyphens, in lower case, without punctuation and articles; numbers as floats."""
    return " ".join(_drop_word(word) for word in re.split(" |-", text)).split()


def _drop_word(word: str) -> str:
    word = word.lower()
    if not _is_number(word):
        word = word.translate(NO_PUNCTUATION)  # 1,000 becomes a number by it; the point of 3.5 stays
    return str(float(word)) if _is_number(word) else ARTICLES.sub(" ", word)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def final_answer(text: str) -> str | None:
    """The number behind the first `####` (GSM8K, arXiv:2110.14168), else the rest of the line behind the first
    "The answer is:" (MetaMathQA, arXiv:2309.12284), where MATH's answers may be formulas; None without either.

    A text without a marker has no answer, whatever numbers it holds. Equal numbers give equal texts:

    >>> final_answer("She pays 2 * $500.\\n#### $1,000.00")
    '1000'
    """
    found = MARKED.search(text) or SAID.search(text)
    if found is None:
        return None
    plain = found[1].replace(",", "").replace("$", "").strip().rstrip(".")
    return str(Fraction(plain)) if NUMBER.fullmatch(plain) else plain or None


def gsm8k_em(answer: str, example: Example) -> float:
    """1 if the final answer is right, else 0."""
    return float(final_answer(answer) in example.right)
