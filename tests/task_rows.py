"""Rows of every task, real ones where they are public and short, and what writes them to a data directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zotuner.tasks import TASKS

Row = dict[str, Any]
Rows = list[Row]

CAUSE = {
    "premise": "My body cast a shadow over the grass.",
    "choice1": "The sun was rising.",
    "choice2": "The grass was cut.",
    "question": "cause",
    "idx": 0,
    "label": 0,
}
EFFECT = {
    "premise": "The man turned on the faucet. ",
    "choice1": "The toilet filled with water.",
    "choice2": "Water flowed from the spout.",
    "question": "effect",
    "idx": 4,
    "label": 1,
}
REVIEW = {"sentence": "hide new secretions from the parental units ", "label": 0, "idx": 0}
# One of each. Those of multirc, record and metamathqa are invented, in the Hub's schema; the others are real (the
# passage of drop is cut).
ROWS: dict[str, Row] = {
    "sst2": REVIEW,
    "rte": {
        "premise": "No Weapons of Mass Destruction Found in Iraq Yet.",
        "hypothesis": "Weapons of Mass Destruction Found in Iraq.",
        "idx": 0,
        "label": 1,
    },
    "cb": {
        "premise": "It was a complex language. Not written down but handed down. One might say it was peeled down.",
        "hypothesis": "the language was peeled down",
        "idx": 0,
        "label": 0,
    },
    "boolq": {
        "question": "calcium carbide cac2 is the raw material for the production of acetylene",
        "passage": "Calcium carbide is a chemical compound with the chemical formula of CaC. Its main use industrially "
        "is in the production of acetylene and calcium cyanamide.",
        "idx": 13,
        "label": 1,
    },
    "wsc": {
        "text": "Mark told Pete many lies about himself, which Pete included in his book. He should have been more "
        "skeptical.",
        "span1_index": 0,
        "span2_index": 13,
        "span1_text": "Mark",
        "span2_text": "He",
        "idx": 0,
        "label": 0,
    },
    "wic": {
        "word": "place",
        "sentence1": "Do you want to come over to my place later?",
        "sentence2": "A political system with no place for the less prominent groups.",
        "start1": 31,
        "start2": 27,
        "end1": 36,
        "end2": 32,
        "idx": 0,
        "label": 0,
    },
    "multirc": {
        "paragraph": "The ferry left at noon. Two cars and a dog were on board.",
        "question": "What was on the ferry?",
        "answer": "A dog",
        "idx": {"paragraph": 0, "question": 1, "answer": 2},
        "label": 1,
    },
    "copa": CAUSE,
    "record": {
        "passage": "The mayor of Port Ellis met Ada Finch.\n@highlight\nAda Finch will build the bridge\n"
        "@highlight\nPort Ellis pays for it",
        "query": "The town trusts @placeholder with the work.",
        "entities": ["Ada Finch", "Finch", "Port Ellis", "Finch"],
        "entity_spans": {"text": ["Port Ellis", "Ada Finch"], "start": [13, 28], "end": [23, 37]},
        "answers": ["Finch", "Ada Finch"],
        "idx": {"passage": 3, "query": 7},
    },
    "squad": {
        "id": "56e1254ae3433e1400422c66",
        "title": "Nikola_Tesla",
        "context": "However, his religious views remain uncertain due to other statements that he made. For example, "
        'in his article, "A Machine to End War", published in 1937, Tesla stated:',
        "question": "What article was published in 1937?",
        "answers": {"text": ['"A Machine to End War"', "A Machine to End War"], "answer_start": [113, 114]},
    },
    "drop": {
        "section_id": "drop_dev_a839856d",
        "query_id": "35065332279c404e71643ba7d3f8764f",
        "passage": "Non-nationals make up more than half of the population of Bahrain.",
        "question": "What two nationalities had the same number of people living in Bahrain between 2005-2009?",
        "answers_spans": {"spans": ["Pakistanis and Filipinos", "Pakistani and Filipino"], "types": ["span", "span"]},
    },
    "sst5": {
        "text": "a stirring , funny and finally transporting re-imagining of beauty and the beast and 1930s "
        "horror films",
        "label": 4,
        "label_text": "very positive",
    },
    "trec": {"text": "How did serfdom develop in and then leave Russia ?", "coarse_label": 2, "fine_label": 26},
    "mnli": {
        "premise": "yeah or working in the system",
        "hypothesis": "Working as a part of the system.",
        "label": 0,
        "idx": 1,
    },
    "snli": {
        "premise": "Two people lower themselves into a cave with long ropes.",
        "hypothesis": "Two people leave a cave",
        "label": 2,
    },
    "gsm8k": {
        "question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
        "How many clips did Natalia sell altogether in April and May?",
        "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips "
        "altogether in April and May.\n#### 72",
    },
    "metamathqa": {
        "type": "MATH_Rephrased",
        "query": "What is the side of a square of area 3?",
        "original_question": "A square has area 3. Find its side.",
        "response": "The side squared is 3.\n\nSo it is the root of 3.\nThe answer is: \\sqrt{3}",
    },
}


def write_rows(data_dir: Path, task: str, **splits: Rows) -> Path:
    """Writes `data_dir/task/split.jsonl` for every split given; returns `data_dir`."""
    (data_dir / task).mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data_dir / task / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return data_dir


def labelled_rows(task: str, count: int) -> Rows:
    """So many rows of a task: the one of `ROWS`, numbered, and with each label in turn if it has some."""
    kind = TASKS[task]
    rows = [ROWS[task] | {"idx": i} for i in range(count)]
    if kind.label_field in kind.fields:
        rows = [row | {kind.label_field: i % kind.labels} for i, row in enumerate(rows)]
    return rows


def write_every_task(data_dir: Path, train: int, test: int) -> Path:
    """A data directory with rows of every task that has none in the package."""
    for name in ROWS:
        test_split = "test" if name == "metamathqa" else TASKS[name].test_split
        splits = {"train": labelled_rows(name, train), test_split: labelled_rows(name, test)}
        write_rows(data_dir, name, **splits)
    return data_dir


def reviews(count: int, tag: str = "review") -> Rows:
    """Rows of SST-2 that can be told apart."""
    return [{"sentence": f"{tag} {i}", "label": i % 2, "idx": i} for i in range(count)]


def stories(count: int, tag: str = "story") -> Rows:
    """Rows of COPA that can be told apart, both kinds of question."""
    return [
        CAUSE | {"premise": f"Some {tag} {i}.", "question": ("cause", "effect")[i % 2], "label": i // 2 % 2, "idx": i}
        for i in range(count)
    ]


def sst2_dir(tmp_path: Path, train: int = 40, validation: int = 12) -> Path:
    """A data directory of SST-2."""
    return write_rows(tmp_path, "sst2", train=reviews(train, "train"), validation=reviews(validation, "validation"))


def without(row: Row, field: str) -> Row:
    """A row with one field less."""
    return {key: value for key, value in row.items() if key != field}
