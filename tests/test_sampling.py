"""The draw of a run's examples and batches: sizes, seeds, so many of each class."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from task_rows import ROWS, Row, reviews, sst2_dir, write_rows

from zotuner.errors import ZotunerError
from zotuner.tasks import TASKS, Example, batches, get_task

SPLITS = ("train", "validation", "test")


def numbered(name: str, count: int, tag: str = "") -> list[Row]:
    """Rows of a task that can be told apart, each class in turn."""
    task = TASKS[name]
    (text, *_) = [field for field, kind in task.fields.items() if kind is str]
    label = [task.label_field] if task.label_field in task.fields else []
    return [ROWS[name] | {text: f"{tag} {i}"} | dict.fromkeys(label, i % task.labels) for i in range(count)]


@pytest.mark.parametrize("name", ["demo-copa", "demo-sentiment"])
def test_the_same_seed_draws_the_same_examples_and_another_seed_others(name: str) -> None:
    def draw(seed: int) -> Any:
        return get_task(name).splits(train_size=20, dev_size=10, eval_size=10, seed=seed)

    assert draw(1) == draw(1)
    one, other = draw(1), draw(2)
    assert one.train != other.train
    assert one.dev != other.dev
    assert one.test != other.test


def test_dev_drawn_from_train_is_disjoint_from_it(tmp_path: Path) -> None:
    splits = get_task("sst2", sst2_dir(tmp_path)).splits(train_size=30, dev_size=10, seed=3)
    prompts = [{example.prompt for example in part} for part in (splits.train, splits.dev)]
    assert [len(part) for part in prompts] == [30, 10]
    assert not prompts[0] & prompts[1]


def test_development_examples_do_not_depend_on_the_number_of_training_examples(tmp_path: Path) -> None:
    task = get_task("sst2", sst2_dir(tmp_path))
    few, many = (task.splits(train_size=size, dev_size=5, eval_size=7, seed=1) for size in (4, 30))
    assert few.train == many.train[:4]
    assert (few.dev, few.test) == (many.dev, many.test)


@pytest.mark.parametrize(
    ("train_size", "dev_size", "expected"),
    [
        (1000, None, (30, 10)),  # a quarter of 40 rows, though 500 are wanted
        (1000, 4, (36, 4)),
        (5, 400, (5, 10)),
        (1, 1, (1, 1)),
    ],
)
def test_sizes_are_clipped_to_what_there_is(
    tmp_path: Path, train_size: int, dev_size: int | None, expected: tuple[int, int]
) -> None:
    splits = get_task("sst2", sst2_dir(tmp_path)).splits(train_size=train_size, dev_size=dev_size, eval_size=1000)
    assert (len(splits.train), len(splits.dev)) == expected
    assert len(splits.test) == 12


def test_evaluation_examples_come_from_the_validation_split(tmp_path: Path) -> None:
    """The official test sets have no labels."""
    splits = get_task("sst2", sst2_dir(tmp_path)).splits(train_size=10, eval_size=5)
    assert len(splits.test) == 5
    assert all(example.prompt.startswith("validation ") for example in splits.test)
    assert all(example.prompt.startswith("train ") for example in splits.train + splits.dev)


def test_two_training_rows_are_enough_and_one_is_not(tmp_path: Path) -> None:
    splits = get_task("sst2", sst2_dir(tmp_path, train=2)).splits(train_size=10)
    assert (len(splits.train), len(splits.dev)) == (1, 1)
    with pytest.raises(ZotunerError, match="at least 2 training rows"):
        get_task("sst2", sst2_dir(tmp_path, train=1)).splits(train_size=10)


def test_published_development_sizes() -> None:
    assert {name for name in ROWS if TASKS[name].dev_size == 100} == {"cb", "copa"}
    assert {name for name in ROWS if TASKS[name].dev_size == 500} == set(ROWS) - {"cb", "copa"}


def test_embedded_dev_and_test_come_from_their_own_splits() -> None:
    task = get_task("demo-sentiment")
    splits = task.splits(train_size=1000, dev_size=1000, eval_size=1000)
    of = {split: Counter(map(task.example, task.rows(split))) for split in SPLITS}
    assert Counter(splits.train) == of["train"]
    assert Counter(splits.dev) == of["validation"]
    assert Counter(splits.test) == of["test"]


@pytest.mark.parametrize("name", ROWS)
def test_every_task_draws_the_sizes_that_were_asked_for(tmp_path: Path, name: str) -> None:
    task = get_task(name, tmp_path)
    test_of = "gsm8k" if name == "metamathqa" else name  # it has no test rows of its own
    write_rows(tmp_path, name, train=numbered(name, 30, "train"))
    write_rows(tmp_path, test_of, **{task.test_split: numbered(test_of, 8, "other")})
    for kind in task.kinds():
        splits = task.splits(train_size=9, dev_size=6, eval_size=5, kind=kind)
        assert [len(part) for part in (splits.train, splits.dev, splits.test)] == [9, 6, 5]
        assert len({*splits.train, *splits.dev, *splits.test}) == 20


def test_test_examples_come_from_the_published_split() -> None:
    splits = {name: task.test_split for name, task in TASKS.items() if task.test_split != "validation"}
    assert splits == {
        "mnli": "validation_matched",
        **dict.fromkeys(("sst5", "trec", "gsm8k", "metamathqa", "demo-copa", "demo-sentiment"), "test"),
    }


def test_metamathqa_is_tested_on_gsm8k(tmp_path: Path) -> None:
    write_rows(tmp_path, "metamathqa", train=numbered("metamathqa", 8))
    write_rows(tmp_path, "gsm8k", test=numbered("gsm8k", 3, "other"))
    splits = get_task("metamathqa", tmp_path).splits(train_size=4, dev_size=2)
    assert {example.answers for example in splits.train + splits.dev} == {("\\sqrt{3}",)}
    assert Counter(splits.test) == Counter(map(get_task("gsm8k").example, numbered("gsm8k", 3, "other")))


def k_shot(task: str, data: Path, k: int, seed: int = 0) -> Any:
    """The splits of a masked model, or of a causal one where the task has no prompt for those."""
    return get_task(task, data).splits(train_size=1, k_shot=k, eval_size=4, seed=seed, kind=TASKS[task].kinds()[-1])


@pytest.mark.parametrize("name", [name for name in ROWS if TASKS[name].label_field in TASKS[name].fields])
def test_k_examples_of_each_class_are_drawn_for_train_and_as_many_others_for_dev(tmp_path: Path, name: str) -> None:
    task = TASKS[name]
    write_rows(tmp_path, name, train=numbered(name, 12 * task.labels), **{task.test_split: numbered(name, 6, "other")})
    splits = k_shot(name, tmp_path, 4)
    for part in (splits.train, splits.dev):
        assert Counter(example.label for example in part) == dict.fromkeys(range(task.labels), 4)
    assert len({*splits.train, *splits.dev}) == 8 * task.labels
    assert len(splits.test) == 4


def test_k_examples_of_each_class_are_a_function_of_the_seed(tmp_path: Path) -> None:
    data = sst2_dir(tmp_path)
    one, again, other = (k_shot("sst2", data, 5, seed) for seed in (1, 1, 2))
    assert one == again
    assert (one.train, one.dev) != (other.train, other.dev)


def test_too_few_rows_of_a_class_are_named(tmp_path: Path) -> None:
    rows = [row for row in reviews(40) if row["label"] or row["idx"] < 14]  # 7 of class 0, 20 of class 1
    write_rows(tmp_path, "sst2", train=rows, validation=reviews(4))
    assert len(k_shot("sst2", tmp_path, 3).train) == 6
    with pytest.raises(ZotunerError, match=r"^task sst2: expected 8 training rows of class 0, .*found 7; take a small"):
        k_shot("sst2", tmp_path, 4)


@pytest.mark.parametrize("name", ["squad", "drop", "gsm8k", "record"])
def test_a_task_without_classes_has_no_examples_of_each(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path, name, train=numbered(name, 20))
    with pytest.raises(ZotunerError, match=f"^task {name} has no classes to take .* examples of: use --train-size$"):
        k_shot(name, tmp_path, 2)


EXAMPLES = [Example(f"prompt {i}", (" a", " b"), 0) for i in range(10)]


@pytest.mark.parametrize(("batch_size", "sizes"), [(3, [3, 3, 3, 1]), (5, [5, 5]), (10, [10]), (64, [10])])
def test_each_epoch_covers_every_example_exactly_once(batch_size: int, sizes: list[int]) -> None:
    stream = batches(EXAMPLES, batch_size, seed=4)
    epochs = [[next(stream) for _ in sizes] for _ in range(3)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == sizes
        assert Counter(itertools.chain.from_iterable(epoch)) == Counter(EXAMPLES)


def test_epochs_have_different_orders() -> None:
    first, second = itertools.islice(batches(EXAMPLES, 10, seed=4), 2)
    assert first != second


def test_batches_are_a_function_of_the_seed() -> None:
    def draw(seed: int) -> list[list[Example]]:
        return list(itertools.islice(batches(EXAMPLES, 3, seed), 9))

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
