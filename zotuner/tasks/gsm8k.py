r"""GSM8K: word problems of primary school, with worked answers.

{"question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. [...]",
 "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips [...]\n#### 72"}
"""

import re

from zotuner.errors import ZotunerError
from zotuner.tasks.base import Row, Task
from zotuner.tasks.generated import final_answer, gsm8k_em
from zotuner.tasks.scores import Example, Mean

STOP = "\n\n"


def worked(question: str, answer: str) -> Example:
    """`Question: ...`, `Answer:`, a line each, then the worked answer, which an empty line ends: it has none within."""
    final = final_answer(answer)
    assert final is not None
    text = re.sub(r"\n\s*\n", "\n", answer.strip())
    return Example(f"Question: {question.strip()}\nAnswer:", (f" {text}{STOP}",), label=0, answers=(final,))


class Worked(Task):
    """A task of `worked` problems, judged by their final answer."""

    loss = "language-modelling"
    metrics = {"em": Mean(gsm8k_em)}
    generates = True
    max_new_tokens = 256
    stop = STOP
    test_split = "test"


class Gsm8k(Worked):
    """Grade School Math (Cobbe et al. 2021), the prompt of SQuAD without its paragraph."""

    name = "gsm8k"
    hub = ("openai/gsm8k", "main")
    fields = {"question": str, "answer": str}

    def example(self, row: Row) -> Example:
        """As `worked`."""
        return worked(row["question"], row["answer"])

    def _check(self, row: Row, where: str) -> None:
        super()._check(row, where)
        if "####" not in row["answer"] or final_answer(row["answer"]) is None:
            raise ZotunerError(f"{where}: field 'answer' must end in '#### ' and a number, got {row['answer'][-60:]!r}")
