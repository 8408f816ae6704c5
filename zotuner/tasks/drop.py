"""DROP: a question about a paragraph that takes counting, sorting or arithmetic.

{"section_id": "drop_dev_84a3eeb1", "query_id": "0c24f51fb520198a7bfcca3f20dc915c",
 "passage": "According to the market research firm SuperData, as of May 2015, the global games market [...]",
 "question": "How many billions of dollars of the global games market is not accounted for in North America?",
 "answers_spans": {"spans": ["50.6", "49.7"], "types": ["number", "number"]}}
"""

from zotuner.errors import ZotunerError
from zotuner.tasks.base import Row, Task, texts
from zotuner.tasks.generated import Best, drop_em, drop_f1
from zotuner.tasks.scores import Example, Mean


class Drop(Task):
    """Discrete Reasoning over Paragraphs (Dua et al. 2019), prompt of MeZO's appendix (arXiv:2305.17333).

    The spans of a row count as answers of which each is right: its format does not tell them from the parts of one.
    """

    name = "drop"
    hub = ("ucinlp/drop", "default")
    fields = {"passage": str, "question": str, "answers_spans": dict}
    loss = "language-modelling"
    metrics = {"f1": Mean(Best(drop_f1)), "em": Mean(Best(drop_em))}
    generates = True

    def example(self, row: Row) -> Example:
        """`Passage: ...`, `Question: ...`, `Answer:`, a line each; trains on the first right answer."""
        answers = row["answers_spans"]["spans"]
        prompt = f"Passage: {row['passage']}\nQuestion: {row['question'].strip()}\nAnswer:"
        return Example(prompt, (f" {' '.join(answers[0].split())}\n",), 0, tuple(dict.fromkeys(answers)))

    def _check(self, row: Row, where: str) -> None:
        super()._check(row, where)
        found = row["answers_spans"]
        if not texts(found.get("spans")) or not found["spans"]:
            raise ZotunerError(f"{where}: field 'answers_spans' must have one text or more in 'spans', got {found!r}")
