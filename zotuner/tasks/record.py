r"""ReCoRD: which entity of a news text does a sentence about it leave out?

{"passage": "By Hamish Mackay Goals from Diego Costa and Kurt Zouma ensured Chelsea came back [...]\n@highlight\n[...]",
 "query": "[...] the best thing was that @placeholder made it difficult.",
 "entities": ["Blues", "Branislav Ivanovic", "Chelsea", "Olimpija Ljubljana"], "entity_spans": {"text": [], [...]},
 "answers": ["Olimpija Ljubljana"], "idx": {"passage": 3088, "query": 4756}}
"""

from dataclasses import dataclass

from zotuner.errors import ZotunerError
from zotuner.tasks.base import Row, Task, texts
from zotuner.tasks.generated import Similarity, squad_em, squad_f1
from zotuner.tasks.scores import Example, Mean

GAP = "@placeholder"


@dataclass(frozen=True)
class Cloze(Example):
    """A sentence with each of the `entities` in its gap; a candidate is the whole sentence."""

    entities: tuple[str, ...] = ()


@dataclass(frozen=True)
class OfEntities:
    """The score that compares the entity in the gap, not the sentence, with those that are right there."""

    similarity: Similarity

    def __call__(self, answer: str, example: Example) -> float:
        """From 0 to 1; the answer is a candidate."""
        assert isinstance(example, Cloze)
        entity = dict(zip(example.candidates, example.entities, strict=True))
        return max(self.similarity(entity[answer], entity[right]) for right in example.right)


class Record(Task):
    """Reading Comprehension with Commonsense Reasoning (Zhang et al. 2018), prompt of MeZO's appendix.

    The candidates are the sentence with each entity (arXiv:2305.17333, as in arXiv:2005.14165). A row that has none of
    its right answers among its entities is dropped.
    """

    name = "record"
    hub = ("aps/super_glue", "record")
    fields = {"passage": str, "query": str, "entities": list, "answers": list}
    loss = "language-modelling"
    metrics = {"f1": Mean(OfEntities(squad_f1)), "em": Mean(OfEntities(squad_em))}

    def example(self, row: Row) -> Example:
        """`passage`, then `query` with an entity in its gap; "@highlight", a line of its own, becomes a dash."""
        entities = tuple(dict.fromkeys(row["entities"]))
        candidates = tuple(row["query"].replace(GAP, entity) for entity in entities)
        right = [entities.index(answer) for answer in row["answers"] if answer in entities]
        passage = row["passage"].replace("@highlight\n", "- ")
        return Cloze(f"{passage}\n", candidates, right[0], tuple(candidates[i] for i in right), entities=entities)

    def label(self, row: Row) -> int:
        """There is none.

        Raises:
            ZotunerError: Always.
        """
        raise ZotunerError("task record has no classes to take so many examples of: use --train-size")

    def labelled(self, row: Row) -> bool:
        """Whether a right answer is among the entities."""
        return any(answer in row["entities"] for answer in row["answers"])

    def _check(self, row: Row, where: str) -> None:
        super()._check(row, where)
        for field in ("entities", "answers"):
            if not texts(row[field]):
                raise ZotunerError(f"{where}: field {field!r} must be a list of texts, got {row[field]!r}")
        if GAP not in row["query"]:
            raise ZotunerError(f"{where}: field 'query' must have a gap, {GAP}, got {row['query']!r}")
