"""WiC: has a word the same meaning in two sentences?

{"word": "place", "sentence1": "Do you want to come over to my place later?",
 "sentence2": "A political system with no place for the less prominent groups.",
 "start1": 31, "start2": 27, "end1": 36, "end2": 32, "idx": 0, "label": 0}
"""

from zotuner.tasks.base import Row, Task
from zotuner.tasks.scores import Example


class Wic(Task):
    """Words in Context (Pilehvar and Camacho-Collados 2019), prompt of MeZO's appendix (arXiv:2305.17333)."""

    name = "wic"
    hub = ("aps/super_glue", "wic")
    fields = {"word": str, "sentence1": str, "sentence2": str, "label": int}
    loss = "classification"

    def example(self, row: Row) -> Example:
        """`Does the word "word" have the same meaning in these two sentences? Yes, No?`, both sentences, `No|Yes`."""
        question = f'Does the word "{row["word"]}" have the same meaning in these two sentences? Yes, No?'
        return Example(f"{question}\n{row['sentence1']}\n{row['sentence2']}\n", ("No", "Yes"), row["label"])
