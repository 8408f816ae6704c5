"""TREC: what kind of answer does a question ask for?

{"text": "How did serfdom develop in and then leave Russia ?", "coarse_label": 2, "fine_label": 26}
"""

from zotuner.tasks.base import Row, Task
from zotuner.tasks.scores import Example

WORDS = ("Expression", "Entity", "Description", "Human", "Location", "Number")  # the Hub: ABBR ENTY DESC HUM LOC NUM


class Trec(Task):
    """Question classification (Voorhees and Tice 2000), prompt of MeZO's appendix (arXiv:2305.17333)."""

    name = "trec"
    hub = ("CogComp/trec", "default")
    fields = {"text": str, "coarse_label": int}
    label_field = "coarse_label"
    labels = 6
    loss = "classification"
    test_split = "test"

    def masked(self, row: Row) -> Example:
        """`<mask>: text`: Expression|Entity|Description|Human|Location|Number."""
        return Example("", WORDS, row["coarse_label"], suffix=f": {row['text'].strip()}")
