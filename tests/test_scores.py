"""Metrics, against values worked out by hand from the published definitions."""

from __future__ import annotations

import pytest
from task_rows import ROWS

from zotuner.tasks import TASKS, Example, get_task
from zotuner.tasks.generated import Best, drop_em, drop_f1, final_answer, squad_em, squad_f1
from zotuner.tasks.scores import Mean, macro_f1, positive_f1, right

YES_NO_MAYBE = ("Yes", "No", "Maybe")


def answered(candidates: tuple[str, ...], *pairs: tuple[str, str]) -> tuple[list[str], list[Example]]:
    """Answers, and the examples they are to, from pairs (answer, right answer)."""
    return [given for given, _ in pairs], [Example("", candidates, candidates.index(true)) for _, true in pairs]


def test_accuracy_is_the_share_of_right_answers() -> None:
    pairs = (("Yes", "Yes"), ("No", "Yes"), ("No", "No"), ("Maybe", "No"))
    assert Mean(right)(*answered(YES_NO_MAYBE, *pairs)) == 0.5


def test_any_of_several_answers_is_right() -> None:
    example = Example("", ("a", "b", "c"), 0, answers=("a", "c"))
    assert [right(answer, example) for answer in "abc"] == [1, 0, 1]


def test_macro_f1_is_the_mean_over_classes() -> None:
    """Yes: 2 of 3 given, 2 of 2 true -> 0.8; No: 0 given, 1 true -> 0; Maybe: 1 of 1, 1 of 1 -> 1."""
    pairs = (("Yes", "Yes"), ("Yes", "Yes"), ("Yes", "No"), ("Maybe", "Maybe"))
    assert macro_f1(*answered(YES_NO_MAYBE, *pairs)) == pytest.approx((0.8 + 0 + 1) / 3)


def test_macro_f1_leaves_out_a_class_that_does_not_occur() -> None:
    assert macro_f1(*answered(YES_NO_MAYBE, ("Yes", "Yes"), ("No", "No"))) == 1


def test_positive_f1_counts_the_second_candidate_alone() -> None:
    """Yes: given 3 times, 2 of them right, of 4 -> 2 * 2 / (3 + 4)."""
    pairs = (("Yes", "Yes"), ("Yes", "Yes"), ("Yes", "No"), ("No", "Yes"), ("No", "Yes"), ("No", "No"))
    assert positive_f1(*answered(("No", "Yes"), *pairs)) == pytest.approx(4 / 7)
    assert positive_f1(*answered(("No", "Yes"), ("No", "No"), ("No", "Yes"))) == 0


@pytest.mark.parametrize(
    ("answer", "right_answer", "f1", "em"),
    [
        ("Pop Idol", "Pop Idol", 1, 1),
        (" the pop  idol.", "Pop Idol", 1, 1),  # case, article, punctuation, white space
        ("Idol", "Pop Idol", 2 / 3, 0),  # precision 1, recall 1/2
        ("Pop Idol of Britain", "Pop Idol", 2 / 3, 0),  # precision 1/2, recall 1
        ("no no no", "no no", 0.8, 0),  # words count as often as they occur: 2 of 3, 2 of 2
        ("", "Pop Idol", 0, 0),
        ("The", "Pop Idol", 0, 0),  # articles only: no words
        ("the", "a", 0, 1),  # no words on either side: the same text, but none in common (as v1.1 has it)
        ("1,000", "1000", 1, 1),
        ("1000.0", "1000", 0, 0),  # 10000: numbers are text here
        ("well-known", "well known", 0, 0),  # wellknown: the hyphen goes, and joins
        ("theatre", "atre", 0, 0),  # articles are whole words
        ("U.S.A", "usa", 1, 1),
    ],
)
def test_squad_scores(answer: str, right_answer: str, f1: float, em: float) -> None:
    assert squad_f1(answer, right_answer) == pytest.approx(f1)
    assert squad_em(answer, right_answer) == em


@pytest.mark.parametrize(
    ("answer", "right_answer", "f1", "em"),
    [
        ("Pakistanis and Filipinos", "Pakistanis and Filipinos", 1, 1),
        ("the Filipinos.", "Filipinos", 1, 1),
        ("Filipinos", "Pakistanis and Filipinos", 0.5, 0),  # 1 of 1, 1 of 3
        ("1,000", "1000.0", 1, 1),
        ("3.5", "3.50", 1, 1),
        ("35", "3.5", 0, 0),  # the point of a number is no punctuation
        ("$5", "5", 1, 1),
        ("5%", "5 %", 1, 1),
        ("7 yards", "7", 0.67, 0),  # 1 of 2, 1 of 1: 2/3, rounded as published
        ("8 yards", "7 yards", 0, 0),  # the number is wrong: the unit does not count
        ("yards", "7 yards", 0, 0),
        ("7 and 8 yards", "7 yards", 0.67, 0),  # one number met is enough: 2 of 4, 2 of 2
        ("touch-down", "touch down", 1, 1),  # hyphens part words
        ("26-yard", "26", 0.67, 0),
        ("-5", "5", 1, 1),
        ("no no no", "no no", 1, 0),  # words are a set for F1, not for the exact match
        ("", "7", 0, 0),
        ("", "Filipinos", 0, 0),
        ("The", "Filipinos", 0, 0),
        ("the", "a", 1, 1),  # no words on either side: the same
    ],
)
def test_drop_scores(answer: str, right_answer: str, f1: float, em: float) -> None:
    assert drop_f1(answer, right_answer) == pytest.approx(f1)
    assert drop_em(answer, right_answer) == em


def test_the_best_of_several_right_answers_counts() -> None:
    example = Example("", (" war\n",), 0, answers=("war", "a long war", "peace"))
    assert Best(squad_f1)("long war", example) == 1
    assert Best(squad_f1)("war machine", example) == pytest.approx(2 / 3)
    assert Best(squad_em)("the peace", example) == 1
    assert Best(squad_em)("war peace", example) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("48 + 24 = 72 clips.\n#### 72", "72"),
        ("#### $1,000.00 each", "1000"),
        ("####18.", "18"),
        ("#### -3", "-3"),
        ("#### $-3", "-3"),
        ("#### .50", "1/2"),
        ("#### 5\n#### 6", "5"),  # the first marker
        ("The answer is: 4\n#### 5", "5"),  # the marker of GSM8K before that of MetaMathQA
        ("So 7 it is. The answer is: 7.0", "7"),
        ("The answer is: 1,234,567.\nSo", "1234567"),
        ("The answer is: \\frac{1}{2}", "\\frac{1}{2}"),  # MATH's answers are formulas
        ("The answer is: $2x + 1$.", "2x + 1"),
        ("The answer is: 1e999999999", "1e999999999"),  # not a number to work out
        ("The answer is 7", None),
        ("It is 72.", None),  # no marker, no answer
        ("#### none", None),
        ("#### ...", None),
        ("The answer is:", None),
        ("", None),
    ],
)
def test_final_answers(text: str, expected: str | None) -> None:
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("answer", "em"),
    [(" 24 in May, so 72.\n#### 72", 1), (" The answer is: 72.0", 1), (" #### 24", 0), (" 72", 0), ("", 0)],
)
def test_a_worked_answer_is_right_by_its_final_number(answer: str, em: float) -> None:
    assert TASKS["gsm8k"].metrics["em"]([answer], [get_task("gsm8k").example(ROWS["gsm8k"])]) == em


def test_record_compares_the_entity_and_not_the_sentence() -> None:
    """Right: Finch, Ada Finch. Port Ellis shares no word with them, though the sentence shares all but one."""
    example = get_task("record").example(ROWS["record"])
    f1, em = TASKS["record"].metrics["f1"], TASKS["record"].metrics["em"]
    assert [f1([candidate], [example]) for candidate in example.candidates] == [1, 1, 0]
    assert [em([candidate], [example]) for candidate in example.candidates] == [1, 1, 0]
    alone = get_task("record").example(ROWS["record"] | {"answers": ["Finch"]})
    assert f1([alone.candidates[0]], [alone]) == pytest.approx(2 / 3)
    assert em([alone.candidates[0]], [alone]) == 0


def test_metrics_are_the_published_ones() -> None:
    metrics = {name: list(task.metrics) for name, task in TASKS.items() if list(task.metrics) != ["accuracy"]}
    assert metrics == {
        "cb": ["accuracy", "macro_f1"],
        "multirc": ["accuracy", "f1"],
        "record": ["f1", "em"],
        "squad": ["f1", "em"],
        "drop": ["f1", "em"],
        "gsm8k": ["em"],
        "metamathqa": ["em"],
    }


@pytest.mark.parametrize("name", [name for name in ROWS if "causal" in TASKS[name].kinds()])
def test_every_metric_gives_the_right_answer_full_marks(name: str) -> None:
    task = get_task(name)
    example = task.example(ROWS[name] | ({"label": 1} if name == "multirc" else {}))
    answer = example.candidates[example.label].split(task.stop)[0] if task.generates else example.right[0]
    assert {metric: score([answer], [example]) for metric, score in task.metrics.items()} == dict.fromkeys(
        task.metrics, 1.0
    )
