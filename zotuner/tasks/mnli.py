"""MNLI: does a hypothesis follow from a premise, contradict it, or neither?

{"premise": "yeah or working in the system", "hypothesis": "Working as a part of the system.", "label": 0, "idx": 1}
"""

from zotuner.tasks.base import Row, Task
from zotuner.tasks.scores import Example


class Mnli(Task):
    """Multi-Genre Natural Language Inference (Williams et al. 2018), prompt of MeZO's appendix (arXiv:2305.17333)."""

    name = "mnli"
    hub = ("nyu-mll/glue", "mnli")
    fields = {"premise": str, "hypothesis": str, "label": int}
    labels = 3
    loss = "classification"
    test_split = "validation_matched"

    def masked(self, row: Row) -> Example:
        """`premise ? <mask> , hypothesis`: Yes|Maybe|No."""
        premise, hypothesis = row["premise"].strip(), row["hypothesis"].strip()
        return Example(f"{premise} ?", (" Yes", " Maybe", " No"), row["label"], suffix=f" , {hypothesis}")
