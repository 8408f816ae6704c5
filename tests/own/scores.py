"""A score of a task's own."""

from zotuner import Example


def first_letter(answer: str, example: Example) -> float:
    """1 for an answer with the right first letter."""
    return float(any(answer[:1] == text[:1] for text in example.right))
