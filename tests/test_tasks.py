"""Tasks: prompts as published, the embedded sets, the draw of a run's examples, and where rows come from."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer, hub_env

from zotuner.errors import ZotunerError
from zotuner.tasks import TASKS, Example, Task, batches, get_task
from zotuner.tasks.base import EmbeddedTask

Rows = list[dict[str, Any]]
SPLITS = ("train", "validation", "test")
DEMO_SIZES = {"demo-copa": (96, 32, 40), "demo-sentiment": (200, 60, 100)}

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

# A prompt that changes must raise prompt_version, and then its golden: results by different prompts do not compare.
GOLDEN: list[tuple[str, int, dict[str, Any], Example]] = [
    (
        "copa",
        1,
        CAUSE,
        Example(
            "My body cast a shadow over the grass because", (" the sun was rising.", " the grass was cut."), label=0
        ),
    ),
    (
        "copa",
        1,
        EFFECT,
        Example(
            "The man turned on the faucet so",
            (" the toilet filled with water.", " water flowed from the spout."),
            label=1,
        ),
    ),
    (
        "sst2",
        1,
        REVIEW,
        Example("hide new secretions from the parental units It was", (" terrible", " great"), label=0),
    ),
]
# (name, prompt_version) -> SHA-256 of all examples of an embedded set
GOLDEN_SETS: dict[tuple[str, int], str] = {
    ("demo-copa", 1): "577cb4520b72b9d2946095b7c0cf4e33456c4e234797cc29287034b49f6ec1e9",
    ("demo-sentiment", 1): "effc3e33b664ef5a501e7799bf3a4ff53b3d3828d325e8910e3b8626fe4e58a3",
}

FROM_HUB = """
import json
from dataclasses import asdict
from zotuner.errors import ZotunerError
from zotuner.tasks import get_task
from zotuner.tasks.copa import Copa

class Missing(Copa):
    hub = ("acme/none", "copa")

sizes = dict(train_size=3, dev_size=1, eval_size=2, seed=5)
found = {name: asdict(get_task(name).splits(**sizes)) for name in ("copa", "sst2")}
try:
    Missing().rows("train")
except ZotunerError as error:
    found["missing"] = str(error)
print(json.dumps(found))
"""
OFFLINE = """
import json
from zotuner.errors import ZotunerError
from zotuner.tasks import get_task
try:
    get_task("sst2").rows("train")
except ZotunerError as error:
    print(json.dumps(str(error)))
"""


def write_rows(data_dir: Path, task: str, **splits: Rows) -> Path:
    """Writes `data_dir/task/split.jsonl` for every split given; returns `data_dir`."""
    (data_dir / task).mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data_dir / task / f"{split}.jsonl").write_text(text, encoding="utf-8")
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


def rendered(task: Task) -> str:
    """SHA-256 of all examples of all splits."""
    fields = ("prompt", "candidates", "label")
    read = [[asdict(task.example(row)) for row in task.rows(split)] for split in SPLITS]
    examples = [[{field: example[field] for field in fields} for example in split] for split in read]
    return hashlib.sha256(json.dumps(examples, sort_keys=True).encode()).hexdigest()


def run_script(code: str, env: dict[str, str]) -> Any:
    """The JSON that a script prints last."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("name", "version", "row", "expected"), GOLDEN, ids=["cause", "effect", "sst2"])
def test_a_row_becomes_the_published_prompt(name: str, version: int, row: dict[str, Any], expected: Example) -> None:
    task = get_task(name)
    assert task.example(row) == expected
    assert task.prompt_version == version


def test_every_task_has_a_golden_prompt() -> None:
    by_hand = {name for name, *_ in GOLDEN}
    embedded = {name for name, _ in GOLDEN_SETS}
    assert by_hand | embedded == set(TASKS)


@pytest.mark.parametrize("name", sorted(DEMO_SIZES))
def test_embedded_examples_change_only_with_the_prompt_version(name: str) -> None:
    task = get_task(name)
    assert GOLDEN_SETS.get((name, task.prompt_version)) == rendered(task), "raise prompt_version and add its golden"


def test_a_premise_keeps_all_but_its_last_full_stop() -> None:
    copa = get_task("copa")
    assert copa.example(CAUSE | {"premise": "Was it Dr. No?"}).prompt == "Was it Dr. No? because"
    assert copa.example(CAUSE | {"premise": "It was Dr. No.."}).prompt == "It was Dr. No. because"


def test_prompts_end_and_candidates_begin_where_a_tokenizer_splits() -> None:
    """A candidate carries the space before it: prompt + candidate is the text, and the prompt ends in no space."""
    for task in (get_task("demo-copa"), get_task("demo-sentiment")):
        for example in map(task.example, task.rows("train")):
            assert not example.prompt.endswith(" ")
            assert all(text[0] == " " and text[1] != " " for text in example.candidates)


@pytest.mark.parametrize(("demo", "published"), [("demo-copa", "copa"), ("demo-sentiment", "sst2")])
def test_a_demo_task_has_the_prompt_and_loss_of_the_published_one(demo: str, published: str) -> None:
    row = get_task(demo).rows("train")[0]
    assert get_task(demo).example(row) == get_task(published).example(row)
    assert TASKS[demo].loss == TASKS[published].loss


def test_losses_are_the_published_ones() -> None:
    assert {name: TASKS[name].loss for name in ("copa", "sst2")} == {
        "copa": "language-modelling",
        "sst2": "classification",
    }


@pytest.mark.parametrize("name", sorted(DEMO_SIZES))
def test_embedded_sets_have_the_documented_sizes(name: str) -> None:
    sizes = tuple(len(get_task(name).rows(split)) for split in SPLITS)
    assert sizes == DEMO_SIZES[name]
    assert str(sum(sizes)) in (TASKS[name].__doc__ or "")


@pytest.mark.parametrize("split", SPLITS)
def test_embedded_labels_are_balanced_within_each_question(split: str) -> None:
    stories_ = Counter((row["question"], row["label"]) for row in get_task("demo-copa").rows(split))
    opinions = Counter(row["label"] for row in get_task("demo-sentiment").rows(split))
    assert set(stories_) == set(itertools.product(("cause", "effect"), (0, 1)))
    assert len(set(stories_.values())) == 1
    assert set(opinions) == {0, 1}
    assert opinions[0] == opinions[1]


@pytest.mark.parametrize("name", sorted(DEMO_SIZES))
def test_embedded_idx_are_unique_over_all_splits(name: str) -> None:
    numbers = [row["idx"] for split in SPLITS for row in get_task(name).rows(split)]
    assert sorted(numbers) == list(range(sum(DEMO_SIZES[name])))


@pytest.mark.parametrize(("name", "keys"), [("demo-copa", ("premise",)), ("demo-sentiment", ("sentence",))])
def test_embedded_splits_share_no_text(name: str, keys: tuple[str, ...]) -> None:
    seen: Counter[str] = Counter()
    for split in SPLITS:
        seen.update(row[key].casefold().strip(" .") for row in get_task(name).rows(split) for key in keys)
    assert [text for text, count in seen.items() if count > 1] == []


def test_embedded_copa_choices_differ_within_an_item_and_between_splits() -> None:
    copa = get_task("demo-copa")
    by_split = [{row[key] for row in copa.rows(split) for key in ("choice1", "choice2")} for split in SPLITS]
    assert all(row["choice1"] != row["choice2"] for split in SPLITS for row in copa.rows(split))
    assert all(not a & b for a, b in itertools.combinations(by_split, 2))


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
    assert (TASKS["sst2"].dev_size, TASKS["copa"].dev_size) == (500, 100)


def test_embedded_dev_and_test_come_from_their_own_splits() -> None:
    task = get_task("demo-sentiment")
    splits = task.splits(train_size=1000, dev_size=1000, eval_size=1000)
    of = {split: Counter(map(task.example, task.rows(split))) for split in SPLITS}
    assert Counter(splits.train) == of["train"]
    assert Counter(splits.dev) == of["validation"]
    assert Counter(splits.test) == of["test"]


def test_a_data_directory_is_read_line_by_line(tmp_path: Path) -> None:
    write_rows(tmp_path, "copa", train=[CAUSE])
    odd = EFFECT | {"premise": "Café\u2028closed."}
    lines = f"{json.dumps(CAUSE)}\r\n\n{json.dumps(odd, ensure_ascii=False)}"
    (tmp_path / "copa" / "train.jsonl").write_text(lines, encoding="utf-8")
    assert get_task("copa", tmp_path).rows("train") == [CAUSE, odd]


def test_fields_that_a_task_does_not_need_are_ignored(tmp_path: Path) -> None:
    rows = [{"sentence": "fine", "label": 1}, {"sentence": "fine", "label": 0, "idx": None, "extra": [1]}]
    assert get_task("sst2", write_rows(tmp_path, "sst2", train=rows)).rows("train") == rows


def without(row: dict[str, Any], field: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != field}


@pytest.mark.parametrize(
    ("task", "row", "says"),
    [
        ("sst2", without(REVIEW, "sentence"), "row 3: field 'sentence' is missing; task sst2 needs"),
        ("sst2", without(REVIEW, "label"), "row 3: field 'label' is missing"),
        ("copa", without(CAUSE, "choice2"), "row 3: field 'choice2' is missing"),
        ("sst2", REVIEW | {"sentence": 7}, "row 3: field 'sentence' must be a str, got 7"),
        ("sst2", REVIEW | {"sentence": None}, "row 3: field 'sentence' must be a str, got None"),
        ("sst2", REVIEW | {"label": "1"}, "row 3: field 'label' must be a int, got '1'"),
        ("sst2", REVIEW | {"label": 1.0}, "row 3: field 'label' must be a int, got 1.0"),
        ("sst2", REVIEW | {"label": True}, "row 3: field 'label' must be a int, got True"),
        ("sst2", REVIEW | {"label": 2}, "row 3: field 'label' must be 0 to 1, got 2"),
        ("sst2", REVIEW | {"label": -1}, "row 3: field 'label' must be 0 to 1, got -1"),
        ("copa", CAUSE | {"label": 2}, "row 3: field 'label' must be 0 to 1, got 2"),
    ],
)
def test_a_bad_row_is_named_with_its_file_number_and_field(
    tmp_path: Path, task: str, row: dict[str, Any], says: str
) -> None:
    good = REVIEW if task == "sst2" else CAUSE
    write_rows(tmp_path, task, train=[good, good, row])
    with pytest.raises(ZotunerError) as caught:
        get_task(task, tmp_path).rows("train")
    assert f"{tmp_path / task / 'train.jsonl'}, {says}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("question", ["Cause", "reason", ""])
def test_a_question_that_copa_does_not_have_is_refused(tmp_path: Path, question: str) -> None:
    write_rows(tmp_path, "copa", train=[CAUSE, CAUSE | {"question": question}])
    with pytest.raises(ZotunerError, match=r"row 2: .*question.*cause.*effect"):
        get_task("copa", tmp_path).rows("train")


@pytest.mark.parametrize(
    "line", ['{"sentence": "cut of', "[1, 2]", '"text"', "not json", "{'sentence': 'single quotes', 'label': 0}"]
)
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    write_rows(tmp_path, "sst2", train=[REVIEW])
    file = tmp_path / "sst2" / "train.jsonl"
    file.write_text(f"{json.dumps(REVIEW)}\n\n{line}\n{json.dumps(REVIEW)}\n", encoding="utf-8")
    with pytest.raises(ZotunerError) as caught:
        get_task("sst2", tmp_path).rows("train")
    assert str(caught.value).startswith(f"{file}, line 3: expected one JSON object")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path, "sst2", train=[])
    file = tmp_path / "sst2" / "train.jsonl"
    file.write_bytes('{"sentence": "café", "label": 1}\n'.encode("latin-1"))
    with pytest.raises(ZotunerError, match="UTF-8") as caught:
        get_task("sst2", tmp_path).rows("train")
    assert str(caught.value).startswith(str(file))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ZotunerError) as caught:
        get_task("sst2", tmp_path).rows("train")
    assert str(caught.value) == f"{tmp_path / 'sst2' / 'train.jsonl'}: no such file"


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_split_is_refused(tmp_path: Path, text: str) -> None:
    sst2_dir(tmp_path)
    file = tmp_path / "sst2" / "validation.jsonl"
    file.write_text(text)
    with pytest.raises(ZotunerError) as caught:
        get_task("sst2", tmp_path).splits(train_size=5)
    assert str(caught.value) == f"{file}: expected examples of task sst2, found none"


@pytest.mark.parametrize(("name", "near"), [("cop", "copa"), ("sst-2", "sst2"), ("demo_copa", "demo-copa")])
def test_an_unknown_task_suggests_the_nearest_and_lists_all(name: str, near: str) -> None:
    with pytest.raises(ZotunerError, match=f"did you mean '{near}'") as caught:
        get_task(name)
    assert all(known in str(caught.value) for known in TASKS)


def test_a_task_without_embedded_data_names_the_split_that_is_missing() -> None:
    class Nothing(EmbeddedTask):
        name = "nothing"
        fields: ClassVar[dict[str, type]] = {"label": int}
        loss = "classification"

        def example(self, row: dict[str, Any]) -> Example:
            return Example("", ("", ""), row["label"])

    with pytest.raises(ZotunerError, match=r"train\.jsonl: no such file"):
        Nothing().rows("train")


def test_the_hub_gives_what_a_data_directory_gives(tmp_path: Path) -> None:
    data = {"copa": {"train": stories(8), "validation": stories(4, "other")}}
    data["sst2"] = {"train": reviews(8), "validation": reviews(4, "other")}
    with HubServer(tmp_path / "hub") as server:
        glue = server.root / "datasets/nyu-mll/glue"
        copa = server.root / "datasets/aps/super_glue"
        for folder, config, ending in ((glue, "sst2", "jsonl"), (copa, "copa", "parquet")):
            (folder / config).mkdir(parents=True)
            files = [{"split": split, "path": f"{config}/{split}.{ending}"} for split in ("train", "validation")]
            front = json.dumps({"configs": [{"config_name": config, "data_files": files}]})
            (folder / "README.md").write_text(f"---\n{front}\n---\n")
        for split in ("train", "validation"):
            text = "".join(json.dumps(row) + "\n" for row in data["sst2"][split])
            (glue / "sst2" / f"{split}.jsonl").write_text(text)
            pq.write_table(pa.Table.from_pylist(data["copa"][split]), copa / "copa" / f"{split}.parquet")
        found = run_script(FROM_HUB, hub_env(server, tmp_path / "home"))
    for name, splits in data.items():
        task = get_task(name, write_rows(tmp_path / "data", name, **splits))
        expected = task.splits(train_size=3, dev_size=1, eval_size=2, seed=5)
        assert found[name] == json.loads(json.dumps(asdict(expected)))
    assert found["missing"].startswith("task copa: cannot be had from the Hub (acme/none: ")
    assert "\n" not in found["missing"]


def test_a_hub_that_cannot_be_reached_is_one_clear_error(tmp_path: Path) -> None:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    message = run_script(OFFLINE, env)
    assert message.startswith("task sst2: cannot be had from the Hub (nyu-mll/glue: ")
    assert message.endswith("go online, or pass --data-dir D with D/sst2/train.jsonl")
    assert "\n" not in message


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
