"""CB: does a clause follow from the text in which somebody says, doubts or asks it?

{"premise": "It was a complex language. Not written down but handed down. One might say it was peeled down.",
 "hypothesis": "the language was peeled down", "idx": 0, "label": 0}
"""

from zotuner.tasks.base import Row, Task
from zotuner.tasks.scores import Example, Mean, macro_f1, right


class Cb(Task):
    """CommitmentBank (de Marneffe et al. 2019), prompt of MeZO's appendix (arXiv:2305.17333)."""

    name = "cb"
    hub = ("aps/super_glue", "cb")
    fields = {"premise": str, "hypothesis": str, "label": int}
    labels = 3
    loss = "classification"
    metrics = {"accuracy": Mean(right), "macro_f1": macro_f1}
    dev_size = 100

    def example(self, row: Row) -> Example:
        """`Suppose premise Can we infer that "hypothesis"? Yes, No, or Maybe?`, `Yes|No|Maybe`, a line each."""
        question = f'Can we infer that "{row["hypothesis"]}"? Yes, No, or Maybe?'
        return Example(f"Suppose {row['premise']} {question}\n", ("Yes", "No", "Maybe"), row["label"])
