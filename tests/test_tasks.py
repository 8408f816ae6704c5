"""Tasks: where rows come from, and what is checked of them; the embedded sets."""

from __future__ import annotations

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
from task_rows import CAUSE, EFFECT, REVIEW, ROWS, Row, reviews, sst2_dir, stories, without, write_rows

from zotuner.errors import ZotunerError
from zotuner.tasks import TASKS, Example, get_task
from zotuner.tasks.base import EmbeddedTask

SPLITS = ("train", "validation", "test")
DEMO_SIZES = {"demo-copa": (96, 32, 40), "demo-sentiment": (200, 60, 100)}

FROM_HUB = """
import json
from dataclasses import asdict
from zotuner.errors import ZotunerError
from zotuner.tasks import get_task
from zotuner.tasks.copa import Copa

class Missing(Copa):
    hub = ("acme/none", "copa")

sizes = dict(train_size=3, dev_size=1, eval_size=2, seed=5)
found = {name: asdict(get_task(name).splits(**sizes)) for name in ("copa", "sst2", "squad")}
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


def run_script(code: str, env: dict[str, str]) -> Any:
    """The JSON that a script prints last."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


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


def test_a_data_directory_is_read_line_by_line(tmp_path: Path) -> None:
    write_rows(tmp_path, "copa", train=[CAUSE])
    odd = EFFECT | {"premise": "Café\u2028closed."}
    lines = f"{json.dumps(CAUSE)}\r\n\n{json.dumps(odd, ensure_ascii=False)}"
    (tmp_path / "copa" / "train.jsonl").write_text(lines, encoding="utf-8")
    assert get_task("copa", tmp_path).rows("train") == [CAUSE, odd]


def test_a_data_directory_may_hold_rows_for_a_task_of_the_package(tmp_path: Path) -> None:
    own = get_task("demo-sentiment").rows("train")[:3]
    assert len(get_task("demo-sentiment", write_rows(tmp_path, "sst2", train=[REVIEW])).rows("train")) > 3
    assert get_task("demo-sentiment", write_rows(tmp_path, "demo-sentiment", train=own)).rows("train") == own


def test_fields_that_a_task_does_not_need_are_ignored(tmp_path: Path) -> None:
    rows = [{"sentence": "fine", "label": 1}, {"sentence": "fine", "label": 0, "idx": None, "extra": [1]}]
    assert get_task("sst2", write_rows(tmp_path, "sst2", train=rows)).rows("train") == rows


LABELLED = [name for name in ROWS if TASKS[name].label_field in TASKS[name].fields]
SQUAD, DROP, RECORD = ROWS["squad"], ROWS["drop"], ROWS["record"]


@pytest.mark.parametrize(
    ("task", "row", "says"),
    [
        ("sst2", REVIEW | {"sentence": 7}, "'sentence' must be a str, got 7"),
        ("sst2", REVIEW | {"sentence": None}, "'sentence' must be a str, got None"),
        ("sst2", REVIEW | {"label": "1"}, "'label' must be a int, got '1'"),
        ("sst2", REVIEW | {"label": 1.0}, "'label' must be a int, got 1.0"),
        ("sst2", REVIEW | {"label": True}, "'label' must be a int, got True"),
        ("sst2", REVIEW | {"label": -1}, "'label' must be 0 to 1, got -1"),
        ("mnli", ROWS["mnli"] | {"label": -1}, "'label' must be 0 to 2, got -1"),
        ("snli", ROWS["snli"] | {"label": -2}, "'label' must be 0 to 2, got -2"),
        ("squad", SQUAD | {"answers": ["war"]}, "'answers' must be a dict, got ['war']"),
        (
            "squad",
            SQUAD | {"answers": {"text": []}},
            "'answers' must have one text or more in 'text', got {'text': []}",
        ),
        ("squad", SQUAD | {"answers": {"text": "war"}}, "'answers' must have one text or more in 'text', got"),
        ("drop", DROP | {"answers_spans": {}}, "'answers_spans' must have one text or more in 'spans', got {}"),
        ("drop", DROP | {"answers_spans": {"spans": [7]}}, "'answers_spans' must have one text or more in 'spans'"),
        ("record", RECORD | {"entities": [1]}, "'entities' must be a list of texts, got [1]"),
        ("record", RECORD | {"answers": [None]}, "'answers' must be a list of texts, got [None]"),
        ("record", RECORD | {"query": "Who?"}, "'query' must have a gap, @placeholder, got 'Who?'"),
        (
            "gsm8k",
            ROWS["gsm8k"] | {"answer": "It is 72."},
            "'answer' must end in '#### ' and a number, got 'It is 72.'",
        ),
        ("gsm8k", ROWS["gsm8k"] | {"answer": "So\n#### x"}, "'answer' must end in '#### ' and a number, got"),
        *((name, without(ROWS[name], field), f"{field!r} is missing") for name in ROWS for field in TASKS[name].fields),
        *((name, ROWS[name] | {field: 1.5}, f"{field!r} must be a ") for name in ROWS for field in TASKS[name].fields),
        *((name, ROWS[name] | {TASKS[name].label_field: TASKS[name].labels}, "must be 0 to ") for name in LABELLED),
    ],
)
def test_a_bad_row_is_named_with_its_file_number_and_field(tmp_path: Path, task: str, row: Row, says: str) -> None:
    write_rows(tmp_path, task, train=[ROWS[task], ROWS[task], row])
    with pytest.raises(ZotunerError) as caught:
        get_task(task, tmp_path).rows("train")
    assert str(caught.value).startswith(f"{tmp_path / task / 'train.jsonl'}, row 3: field ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("snli", ROWS["snli"] | {"label": -1}),
        ("record", RECORD | {"answers": []}),
        ("record", RECORD | {"answers": ["Nobody"]}),
        ("metamathqa", ROWS["metamathqa"] | {"response": "It is 72."}),
    ],
)
def test_rows_that_the_published_set_leaves_unlabelled_are_dropped(tmp_path: Path, task: str, row: Row) -> None:
    kept = ROWS[task] | {"more": "kept"}
    write_rows(tmp_path, task, train=[row, kept, row], validation=[row])
    assert get_task(task, tmp_path).rows("train") == [kept]
    with pytest.raises(ZotunerError, match=rf"validation.jsonl: expected examples of task {task}, found none"):
        get_task(task, tmp_path).rows("validation")


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


def place(root: Path, task: str, ending: str, splits: dict[str, list[Row]], features: list[Row] | None = None) -> None:
    """Puts a data set on a Hub, under its task's name there, with the card that says where each split is."""
    repository, config = TASKS[task].hub or ("", "")
    folder = root / "datasets" / repository
    (folder / config).mkdir(parents=True)
    files = [{"split": split, "path": f"{config}/{split}.{ending}"} for split in splits]
    card: Row = {"configs": [{"config_name": config, "data_files": files}]}
    if features is not None:
        card["dataset_info"] = [{"config_name": config, "features": features}]
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    for split, rows in splits.items():
        file = folder / config / f"{split}.{ending}"
        if ending == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), file)
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_hub_gives_what_a_data_directory_gives(tmp_path: Path) -> None:
    data = {"copa": {"train": stories(8), "validation": stories(4, "other")}}
    data["sst2"] = {"train": reviews(8), "validation": reviews(4, "other")}
    data["squad"] = {"train": [SQUAD | {"id": str(i), "title": f"No {i}"} for i in range(8)], "validation": [SQUAD] * 4}
    texts = [{"name": name, "dtype": "string"} for name in ("id", "title", "context", "question")]
    spans = [{"name": "text", "dtype": "string"}, {"name": "answer_start", "dtype": "int64"}]
    with HubServer(tmp_path / "hub") as server:
        place(server.root, "copa", "parquet", data["copa"])
        place(server.root, "sst2", "jsonl", data["sst2"])
        place(server.root, "squad", "parquet", data["squad"], [*texts, {"name": "answers", "sequence": spans}])
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
