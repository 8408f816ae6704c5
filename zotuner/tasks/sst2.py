"""SST-2: is a phrase of a film review positive?

{"sentence": "hide new secretions from the parental units ", "label": 0, "idx": 0}
"""

from zotuner.tasks.base import EmbeddedTask, Row, Task
from zotuner.tasks.scores import Example


class Sst2(Task):
    """Stanford Sentiment Treebank, two classes (Socher et al. 2013), prompt of MeZO's appendix (arXiv:2305.17333)."""

    name = "sst2"
    hub = ("nyu-mll/glue", "sst2")
    fields = {"sentence": str, "label": int}
    loss = "classification"

    def example(self, row: Row) -> Example:
        """`sentence It was terrible|great`."""
        return Example(f"{row['sentence'].strip()} It was", (" terrible", " great"), row["label"])

    def masked(self, row: Row) -> Example:
        """`sentence It was <mask>.`"""
        return Example(f"{row['sentence'].strip()} It was", (" terrible", " great"), row["label"], suffix=".")


class DemoSentiment(EmbeddedTask, Sst2):  # type: ignore[misc]
    """360 embedded short opinions, written for this package."""

    name = "demo-sentiment"
