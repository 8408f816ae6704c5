"""BoolQ: a question of yes or no about a passage.

{"question": "calcium carbide cac2 is the raw material for the production of acetylene",
 "passage": "Calcium carbide is a chemical compound with the chemical formula of CaC. Its main use industrially is in
 the production of acetylene and calcium cyanamide.", "idx": 13, "label": 1}
"""

from zotuner.tasks.base import Row, Task
from zotuner.tasks.scores import Example


class BoolQ(Task):
    """Boolean Questions to a search engine (Clark et al. 2019), prompt of MeZO's appendix (arXiv:2305.17333)."""

    name = "boolq"
    hub = ("aps/super_glue", "boolq")
    fields = {"question": str, "passage": str, "label": int}
    loss = "classification"

    def example(self, row: Row) -> Example:
        """`passage Question?`, `No|Yes`, a line each: the question with a capital letter and one question mark."""
        question = row["question"][:1].upper() + row["question"][1:].removesuffix("?")
        return Example(f"{row['passage']} {question}?\n", ("No", "Yes"), row["label"])
