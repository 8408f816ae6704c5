r"""MetaMathQA: GSM8K's and MATH's problems, reworded and answered by a language model.

{"type": "MATH_AnsAug", "query": "Gracie and Joe are choosing numbers on the complex plane. [...]",
 "original_question": "[...]", "response": "The distance between two points [...]\nThe answer is: \\sqrt{5}"}
"""

from zotuner.tasks.base import Row
from zotuner.tasks.generated import final_answer
from zotuner.tasks.gsm8k import Gsm8k, Worked, worked
from zotuner.tasks.scores import Example


class MetaMathQA(Worked):
    """GSM8K's and MATH's problems, reworded (Yu et al. 2023, arXiv:2309.12284); test rows and prompt are GSM8K's.

    A training row that states no final answer is dropped.
    """

    name = "metamathqa"
    hub = ("meta-math/MetaMathQA", "default")
    fields = {"query": str, "response": str}

    def example(self, row: Row) -> Example:
        """As `gsm8k.worked`."""
        return worked(row["query"], row["response"])

    def rows(self, split: str) -> list[Row]:
        """As every task's; the test split is GSM8K's, in this task's fields."""
        if split != self.test_split:
            return super().rows(split)
        rows = Gsm8k(self.data_dir).rows(split)
        return [{"query": row["question"], "response": row["answer"]} for row in rows]

    def labelled(self, row: Row) -> bool:
        """Whether the response states a final answer."""
        return final_answer(row["response"]) is not None
