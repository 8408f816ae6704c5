"""WSC: does a pronoun refer to a noun of the text?

{"text": "Mark told Pete many lies about himself, which Pete included in his book. He should have been more skeptical.",
 "span1_index": 0, "span2_index": 13, "span1_text": "Mark", "span2_text": "He", "idx": 0, "label": 0}
"""

from zotuner.tasks.base import Row, Task
from zotuner.tasks.scores import Example


class Wsc(Task):
    """Winograd Schema Challenge (Levesque et al. 2012), prompt of MeZO's appendix (arXiv:2305.17333)."""

    name = "wsc"
    hub = ("aps/super_glue", "wsc.fixed")
    fields = {"text": str, "span1_text": str, "span2_text": str, "label": int}
    loss = "classification"

    def example(self, row: Row) -> Example:
        """`text`, `In the previous sentence, does the pronoun "span2" refer to span1? Yes or No?`, `No|Yes`."""
        pronoun, noun = row["span2_text"], row["span1_text"]
        question = f'In the previous sentence, does the pronoun "{pronoun}" refer to {noun}? Yes or No?'
        return Example(f"{row['text']}\n{question}\n", ("No", "Yes"), row["label"])
