"""COPA: which of two sentences is the cause, or the effect, of a third.

{"premise": "My body cast a shadow over the grass.", "choice1": "The sun was rising.", "choice2": "The grass was cut.",
 "question": "cause", "idx": 0, "label": 0}
"""

from zotuner.errors import ZotunerError
from zotuner.tasks.base import EmbeddedTask, Row, Task
from zotuner.tasks.scores import Example

CONNECTIVES = {"cause": " because", "effect": " so"}


class Copa(Task):
    """Choice of Plausible Alternatives (Roemmele et al. 2011), prompt of MeZO's appendix (arXiv:2305.17333)."""

    name = "copa"
    hub = ("aps/super_glue", "copa")
    fields = {"premise": str, "choice1": str, "choice2": str, "question": str, "label": int}
    loss = "language-modelling"
    dev_size = 100

    def example(self, row: Row) -> Example:
        """`premise so|because choice`: the premise without its full stop, the choice with a small first letter."""
        connective = CONNECTIVES[row["question"]]
        choices = tuple(" " + row[key][:1].lower() + row[key][1:] for key in ("choice1", "choice2"))
        return Example(row["premise"].rstrip().removesuffix(".") + connective, choices, row["label"])

    def _check(self, row: Row, where: str) -> None:
        super()._check(row, where)
        if row["question"] not in CONNECTIVES:
            raise ZotunerError(f"{where}: field 'question' must be one of {list(CONNECTIVES)}, got {row['question']!r}")


class DemoCopa(EmbeddedTask, Copa):  # type: ignore[misc]
    """168 embedded items in COPA's format, written for this package."""

    name = "demo-copa"
