"""Prompts and losses as published, written out for a row of every task; the embedded sets as a whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from task_rows import CAUSE, EFFECT, ROWS, Row, write_rows

from zotuner.errors import ZotunerError
from zotuner.tasks import TASKS, Example, Task, get_task
from zotuner.tasks.record import Cloze

SPLITS = ("train", "validation", "test")
PROMPT_VERSION = 1
CB, WSC, BOOLQ, SQUAD = ROWS["cb"], ROWS["wsc"], ROWS["boolq"], ROWS["squad"]

# A prompt that changes must raise prompt_version, and then its golden: results by different prompts do not compare.
CAUSAL: dict[str, Example] = {
    "sst2": Example("hide new secretions from the parental units It was", (" terrible", " great"), label=0),
    "rte": Example(
        "No Weapons of Mass Destruction Found in Iraq Yet.\n"
        'Does this mean that "Weapons of Mass Destruction Found in Iraq." is true? Yes or No?\n',
        ("Yes", "No"),
        label=1,
    ),
    "cb": Example(
        "Suppose It was a complex language. Not written down but handed down. One might say it was peeled down. "
        'Can we infer that "the language was peeled down"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
        label=0,
    ),
    "boolq": Example(
        "Calcium carbide is a chemical compound with the chemical formula of CaC. Its main use industrially is in the "
        "production of acetylene and calcium cyanamide. "
        "Calcium carbide cac2 is the raw material for the production of acetylene?\n",
        ("No", "Yes"),
        label=1,
    ),
    "wsc": Example(
        "Mark told Pete many lies about himself, which Pete included in his book. He should have been more skeptical.\n"
        'In the previous sentence, does the pronoun "He" refer to Mark? Yes or No?\n',
        ("No", "Yes"),
        label=0,
    ),
    "wic": Example(
        'Does the word "place" have the same meaning in these two sentences? Yes, No?\n'
        "Do you want to come over to my place later?\n"
        "A political system with no place for the less prominent groups.\n",
        ("No", "Yes"),
        label=0,
    ),
    "multirc": Example(
        "The ferry left at noon. Two cars and a dog were on board.\n"
        "Question: What was on the ferry?\n"
        'I found this answer "A dog". Is that correct? Yes or No?\n',
        ("No", "Yes"),
        label=1,
    ),
    "copa": Example(
        "My body cast a shadow over the grass because", (" the sun was rising.", " the grass was cut."), label=0
    ),
    "record": Cloze(
        "The mayor of Port Ellis met Ada Finch.\n- Ada Finch will build the bridge\n- Port Ellis pays for it\n",
        (
            "The town trusts Ada Finch with the work.",
            "The town trusts Finch with the work.",
            "The town trusts Port Ellis with the work.",
        ),
        label=1,
        answers=("The town trusts Finch with the work.", "The town trusts Ada Finch with the work."),
        entities=("Ada Finch", "Finch", "Port Ellis"),
    ),
    "squad": Example(
        "Title: Nikola_Tesla\n"
        "Context: However, his religious views remain uncertain due to other statements that he made. For example, in "
        'his article, "A Machine to End War", published in 1937, Tesla stated:\n'
        "Question: What article was published in 1937?\n"
        "Answer:",
        (' "A Machine to End War"\n',),
        label=0,
        answers=('"A Machine to End War"', "A Machine to End War"),
    ),
    "drop": Example(
        "Passage: Non-nationals make up more than half of the population of Bahrain.\n"
        "Question: What two nationalities had the same number of people living in Bahrain between 2005-2009?\n"
        "Answer:",
        (" Pakistanis and Filipinos\n",),
        label=0,
        answers=("Pakistanis and Filipinos", "Pakistani and Filipino"),
    ),
    "gsm8k": Example(
        "Question: Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How "
        "many clips did Natalia sell altogether in April and May?\n"
        "Answer:",
        (
            " Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
            "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72\n\n",
        ),
        label=0,
        answers=("72",),
    ),
    "metamathqa": Example(
        "Question: What is the side of a square of area 3?\nAnswer:",
        (" The side squared is 3.\nSo it is the root of 3.\nThe answer is: \\sqrt{3}\n\n",),
        label=0,
        answers=("\\sqrt{3}",),
    ),
}
MASKED: dict[str, Example] = {
    "sst2": Example("hide new secretions from the parental units It was", (" terrible", " great"), label=0, suffix="."),
    "rte": Example(
        "No Weapons of Mass Destruction Found in Iraq Yet. ?",
        (" Yes", " No"),
        label=1,
        suffix=" , Weapons of Mass Destruction Found in Iraq.",
    ),
    "sst5": Example(
        "a stirring , funny and finally transporting re-imagining of beauty and the beast and 1930s horror films "
        "It was",
        (" terrible", " bad", " okay", " good", " great"),
        label=4,
        suffix=".",
    ),
    "trec": Example(
        "",
        ("Expression", "Entity", "Description", "Human", "Location", "Number"),
        label=2,
        suffix=": How did serfdom develop in and then leave Russia ?",
    ),
    "mnli": Example(
        "yeah or working in the system ?",
        (" Yes", " Maybe", " No"),
        label=0,
        suffix=" , Working as a part of the system.",
    ),
    "snli": Example(
        "Two people lower themselves into a cave with long ropes. ?",
        (" Yes", " Maybe", " No"),
        label=2,
        suffix=" , Two people leave a cave",
    ),
}
# (name, prompt_version) -> SHA-256 of all examples of an embedded set
GOLDEN_SETS: dict[tuple[str, int], str] = {
    ("demo-copa", 1): "577cb4520b72b9d2946095b7c0cf4e33456c4e234797cc29287034b49f6ec1e9",
    ("demo-sentiment", 1): "effc3e33b664ef5a501e7799bf3a4ff53b3d3828d325e8910e3b8626fe4e58a3",
}


def rendered(task: Task) -> str:
    """SHA-256 of all examples of all splits."""
    fields = ("prompt", "candidates", "label")
    read = [[asdict(task.example(row)) for row in task.rows(split)] for split in SPLITS]
    examples = [[{field: example[field] for field in fields} for example in split] for split in read]
    return hashlib.sha256(json.dumps(examples, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize("name", CAUSAL)
def test_a_row_becomes_the_published_prompt(tmp_path: Path, name: str) -> None:
    task = get_task(name, write_rows(tmp_path, name, train=[ROWS[name]]))
    assert [task.example(row) for row in task.rows("train")] == [CAUSAL[name]]
    assert task.prompt_version == PROMPT_VERSION


@pytest.mark.parametrize("name", MASKED)
def test_a_row_becomes_the_published_prompt_of_a_masked_model(tmp_path: Path, name: str) -> None:
    task = get_task(name, write_rows(tmp_path, name, train=[ROWS[name]]))
    assert [task.masked(row) for row in task.rows("train")] == [MASKED[name]]
    assert task.prompt_version == PROMPT_VERSION


def test_every_task_has_a_golden_prompt_for_each_kind_of_model() -> None:
    embedded = {name for name, _ in GOLDEN_SETS}
    assert {name for name, task in TASKS.items() if "causal" in task.kinds()} == embedded | set(CAUSAL)
    assert {name for name, task in TASKS.items() if "masked" in task.kinds()} - embedded == set(MASKED)


def test_every_task_is_documented_with_its_place_on_the_hub() -> None:
    text = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text()
    assert [name for name in TASKS if f"| {name} |" not in text and f"`{name}`" not in text] == []
    assert [name for name, task in TASKS.items() if task.hub and task.hub[0] not in text] == []


@pytest.mark.parametrize("name", sorted(set(ROWS) - set(MASKED)))
def test_a_task_without_a_masked_prompt_says_so(name: str) -> None:
    with pytest.raises(ZotunerError, match=f"^task {name} has a prompt for causal models alone$"):
        get_task(name).masked(ROWS[name])


@pytest.mark.parametrize("name", sorted(set(ROWS) - set(CAUSAL)))
def test_a_task_without_a_causal_prompt_says_so(name: str) -> None:
    with pytest.raises(ZotunerError, match=f"^task {name} has a prompt for masked models alone"):
        get_task(name).example(ROWS[name])


@pytest.mark.parametrize("name", [name for name, _ in GOLDEN_SETS])
def test_embedded_examples_change_only_with_the_prompt_version(name: str) -> None:
    task = get_task(name)
    assert GOLDEN_SETS.get((name, task.prompt_version)) == rendered(task), "raise prompt_version and add its golden"


def test_losses_are_the_published_ones() -> None:
    modelled = {name for name, task in TASKS.items() if task.loss == "language-modelling"}
    assert modelled == {"copa", "demo-copa", "record", "squad", "drop", "gsm8k", "metamathqa"}


def test_answers_are_generated_where_there_are_no_candidates_to_choose_from() -> None:
    generating = {name: (task.max_new_tokens, task.stop) for name, task in TASKS.items() if task.generates}
    maths = dict.fromkeys(("gsm8k", "metamathqa"), (256, "\n\n"))
    assert generating == maths | dict.fromkeys(("squad", "drop"), (50, "\n"))


@pytest.mark.parametrize("name", ["squad", "drop", "gsm8k", "metamathqa"])
def test_a_generated_text_ends_at_the_first_stop(name: str) -> None:
    task = get_task(name)
    (text,) = task.example(ROWS[name]).candidates
    assert text.index(task.stop) == len(text) - len(task.stop)
    assert text[0] == " "
    assert text[1] != " "


def test_copa_asks_for_an_effect_too() -> None:
    choices = (" the toilet filled with water.", " water flowed from the spout.")
    assert get_task("copa").example(EFFECT) == Example("The man turned on the faucet so", choices, label=1)


def test_a_premise_keeps_all_but_its_last_full_stop() -> None:
    copa = get_task("copa")
    assert copa.example(CAUSE | {"premise": "Was it Dr. No?"}).prompt == "Was it Dr. No? because"
    assert copa.example(CAUSE | {"premise": "It was Dr. No.."}).prompt == "It was Dr. No. because"


def test_prompts_end_and_candidates_begin_where_a_tokenizer_splits() -> None:
    """A candidate carries the space before it, if any: prompt + candidate is the text."""
    for name in CAUSAL:
        example = get_task(name).example(ROWS[name])
        assert not example.prompt.endswith(" ")
        assert all((text[0] == " ") != example.prompt.endswith("\n") for text in example.candidates)
        assert all(text[:2] != "  " for text in example.candidates)


@pytest.mark.parametrize(("demo", "published"), [("demo-copa", "copa"), ("demo-sentiment", "sst2")])
def test_a_demo_task_has_the_prompt_and_loss_of_the_published_one(demo: str, published: str) -> None:
    row = get_task(demo).rows("train")[0]
    assert get_task(demo).example(row) == get_task(published).example(row)
    assert TASKS[demo].loss == TASKS[published].loss


@pytest.mark.parametrize(("name", "row", "answers"), [(n, ROWS[n], len(MASKED[n].candidates)) for n in MASKED])
def test_each_class_has_a_word_for_the_mask(name: str, row: Row, answers: int) -> None:
    task = get_task(name)
    examples = [task.masked(row | {task.label_field: label}) for label in range(task.labels)]
    assert [example.label for example in examples] == list(range(answers))
    assert len({example.right for example in examples}) == answers


def test_a_question_of_boolq_has_one_question_mark_and_a_capital() -> None:
    prompts = {
        get_task("boolq").example(BOOLQ | {"question": q}).prompt for q in ("is it so", "is it so?", "Is it so?")
    }
    assert prompts == {f"{BOOLQ['passage']} Is it so?\n"}


def test_a_question_of_squad_is_stripped_and_an_answer_takes_one_line() -> None:
    row = SQUAD | {"question": " What is it? ", "answers": {"text": ["a\nmachine ", "war"], "answer_start": [0, 1]}}
    example = get_task("squad").example(row)
    assert "\nQuestion: What is it?\nAnswer:" in example.prompt
    assert example.candidates == (" a machine\n",)


def test_blank_lines_within_a_worked_answer_are_closed() -> None:
    row = ROWS["gsm8k"] | {"answer": "One.\n\n\nTwo.\n \n#### 1,200\n"}
    example = get_task("gsm8k").example(row)
    assert example.candidates == (" One.\nTwo.\n#### 1,200\n\n",)
    assert example.answers == ("1200",)


def test_a_gap_may_occur_twice_in_a_query() -> None:
    row = ROWS["record"] | {"query": "@placeholder is @placeholder."}
    assert get_task("record").example(row).candidates == (
        "Ada Finch is Ada Finch.",
        "Finch is Finch.",
        "Port Ellis is Port Ellis.",
    )
