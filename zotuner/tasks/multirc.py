"""MultiRC: is an answer to a question about a paragraph right? A question may have several right ones.

{"paragraph": "While this process moved along, diplomacy continued its rounds. [...]",
 "question": "What did the high-level effort to persuade Pakistan include?", "answer": "Children, Gerd, or Dorian Popa",
 "idx": {"paragraph": 0, "question": 0, "answer": 0}, "label": 0}
"""

from zotuner.tasks.base import Row, Task
from zotuner.tasks.scores import Example, Mean, positive_f1, right


class MultiRC(Task):
    """Multi-Sentence Reading Comprehension (Khashabi et al. 2018), prompt of MeZO's appendix (arXiv:2305.17333)."""

    name = "multirc"
    hub = ("aps/super_glue", "multirc")
    fields = {"paragraph": str, "question": str, "answer": str, "label": int}
    loss = "classification"
    metrics = {"accuracy": Mean(right), "f1": positive_f1}  # f1: SuperGLUE's F1a

    def example(self, row: Row) -> Example:
        """`paragraph`, `Question: ...`, `I found this answer "...". Is that correct? Yes or No?`, `No|Yes`."""
        found = f'I found this answer "{row["answer"]}". Is that correct? Yes or No?'
        return Example(f"{row['paragraph']}\nQuestion: {row['question']}\n{found}\n", ("No", "Yes"), row["label"])
