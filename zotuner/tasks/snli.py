"""SNLI: does a hypothesis follow from the caption of a photograph, contradict it, or neither?

{"premise": "Two people lower themselves into a cave with long ropes.", "hypothesis": "Two people leave a cave",
 "label": 2}
"""

from zotuner.tasks.base import Row
from zotuner.tasks.mnli import Mnli


class Snli(Mnli):
    """Stanford Natural Language Inference (Bowman et al. 2015), prompt of MeZO's appendix (arXiv:2305.17333)."""

    name = "snli"
    hub = ("stanfordnlp/snli", "plain_text")
    test_split = "validation"

    def labelled(self, row: Row) -> bool:
        """False for the pairs on which the annotators did not agree: label -1."""
        return bool(row["label"] != -1)
