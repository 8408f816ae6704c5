"""COPA: which of two sentences is the cause, or the effect, of a third.

{"premise": "My body cast a shadow over the grass.", "choice1": "The sun was rising.", "choice2": "The grass was cut.",
 "question": "cause", "idx": 0, "label": 0}
"""

from zotuner.tasks.base import EmbeddedTask, Example, Row, Task

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
        connective = CONNECTIVES.get(row["question"], CONNECTIVES["effect"])
        choices = tuple(" " + row[key][:1].lower() + row[key][1:] for key in ("choice1", "choice2"))
        return Example(row["premise"].rstrip().removesuffix(".") + connective, choices, row["label"])


class DemoCopa(EmbeddedTask, Copa):  # type: ignore[misc]
    """168 embedded items in COPA's format, written for this package."""

    name = "demo-copa"
