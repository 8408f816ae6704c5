"""SST-5: how positive is a sentence of a film review, from 0 to 4?

{"text": "a stirring , funny and finally transporting re-imagining of beauty and the beast and 1930s horror films",
 "label": 4, "label_text": "very positive"}
"""

from zotuner.tasks.base import Row, Task
from zotuner.tasks.scores import Example

WORDS = (" terrible", " bad", " okay", " good", " great")


class Sst5(Task):
    """Stanford Sentiment Treebank, five classes (Socher et al. 2013), prompt of MeZO's appendix (arXiv:2305.17333)."""

    name = "sst5"
    hub = ("SetFit/sst5", "default")
    fields = {"text": str, "label": int}
    labels = 5
    loss = "classification"
    test_split = "test"

    def masked(self, row: Row) -> Example:
        """`text It was <mask>.`: terrible|bad|okay|good|great."""
        return Example(f"{row['text'].strip()} It was", WORDS, row["label"], suffix=".")
