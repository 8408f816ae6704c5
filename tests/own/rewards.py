"""An objective of one's own."""


def brief(answer, example):
    """A right answer is worth the more, the fewer words it has."""
    return float(answer.strip() in example.right) / max(1, len(answer.split()))
