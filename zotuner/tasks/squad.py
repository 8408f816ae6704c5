"""SQuAD: a question about a paragraph, answered by a span of it.

{"id": "56d21eb1e7d4791d0090266a", "title": "American_Idol", "context": "American Idol is an American [...]",
 "question": "What British show is American Idols format based on?",
 "answers": {"text": ["Pop Idol"], "answer_start": [270]}}
"""

from zotuner.errors import ZotunerError
from zotuner.tasks.base import Row, Task, texts
from zotuner.tasks.generated import Best, squad_em, squad_f1
from zotuner.tasks.scores import Example, Mean


class Squad(Task):
    """Stanford Question Answering, v1.1 (Rajpurkar et al. 2016), prompt of MeZO's appendix (arXiv:2305.17333)."""

    name = "squad"
    hub = ("rajpurkar/squad", "plain_text")
    fields = {"title": str, "context": str, "question": str, "answers": dict}
    loss = "language-modelling"
    metrics = {"f1": Mean(Best(squad_f1)), "em": Mean(Best(squad_em))}
    generates = True

    def example(self, row: Row) -> Example:
        """`Title: ...`, `Context: ...`, `Question: ...`, `Answer:`, a line each; trains on the first right answer."""
        answers = row["answers"]["text"]
        prompt = f"Title: {row['title']}\nContext: {row['context']}\nQuestion: {row['question'].strip()}\nAnswer:"
        return Example(prompt, (f" {' '.join(answers[0].split())}\n",), 0, tuple(dict.fromkeys(answers)))

    def _check(self, row: Row, where: str) -> None:
        super()._check(row, where)
        found = row["answers"]
        if not texts(found.get("text")) or not found["text"]:
            raise ZotunerError(f"{where}: field 'answers' must have one text or more in 'text', got {found!r}")
