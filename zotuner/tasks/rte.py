"""RTE: does a hypothesis follow from a premise?

{"premise": "No Weapons of Mass Destruction Found in Iraq Yet.",
 "hypothesis": "Weapons of Mass Destruction Found in Iraq.", "idx": 0, "label": 1}
"""

from zotuner.tasks.base import Row, Task
from zotuner.tasks.scores import Example


class Rte(Task):
    """Recognizing Textual Entailment (Dagan et al. 2005 and later), prompts of MeZO's appendix (arXiv:2305.17333)."""

    name = "rte"
    hub = ("aps/super_glue", "rte")
    fields = {"premise": str, "hypothesis": str, "label": int}
    loss = "classification"

    def example(self, row: Row) -> Example:
        """`premise`, `Does this mean that "hypothesis" is true? Yes or No?`, `Yes|No`, a line each."""
        question = f'Does this mean that "{row["hypothesis"]}" is true? Yes or No?'
        return Example(f"{row['premise']}\n{question}\n", ("Yes", "No"), row["label"])

    def masked(self, row: Row) -> Example:
        """`premise ? <mask> , hypothesis`: Yes|No."""
        premise, hypothesis = row["premise"].strip(), row["hypothesis"].strip()
        return Example(f"{premise} ?", (" Yes", " No"), row["label"], suffix=f" , {hypothesis}")
