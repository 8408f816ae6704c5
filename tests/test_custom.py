"""Tasks of a user's own: what a YAML file or a Python class makes of tables, end to end, and each mistake in one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from test_cli import argv_of, assert_one_error_line, call, quick, quick_meta, summary_of
from test_tasks import write_rows

import zotuner
from zotuner.cli.parser import EXIT_SIGNAL
from zotuner.errors import ZotunerError
from zotuner.tasks import TASKS, Example, Task, get_task
from zotuner.tasks.base import Splits
from zotuner.tasks.metrics import METRICS
from zotuner.tasks.scores import macro_f1
from zotuner.tasks.tables import read_table
from zotuner.tuner import Tuner

OWN = Path(__file__).parent / "own"
ADDING = Path(__file__).parents[1] / "docs" / "adding.md"
REVIEWS: dict[str, Any] = yaml.safe_load((OWN / "reviews.yaml").read_text())
ROWS = [{"text": f"Dish {i}.", "verdict": ("bad", "good")[i % 2]} for i in range(12)]
FREE = {"train": "t.jsonl", "prompt": "Country: {country}\nCapital:", "answer": " {capital}"}
CLASS = """
import zotuner

class Own(zotuner.Task):
    name = "own"
    sources = {"train": "t.jsonl"}
    test_split = "train"
    fields = {"text": str}
    loss = "classification"

    def example(self, row):
        return zotuner.Example(row["text"], (" a", " b"), 0)
"""


def described(folder: Path, rows: list[dict[str, Any]] | None = None, /, **keys: Any) -> Path:
    """A YAML file beside `t.jsonl`; keys that are None are left out."""
    if rows is not None:
        (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "own.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))
    return file


def reviews(folder: Path, rows: list[dict[str, Any]] | None = None, /, **keys: Any) -> Path:
    """The shipped reviews, with some keys replaced and rows of JSON."""
    return described(folder, ROWS if rows is None else rows, **{**REVIEWS, "train": "t.jsonl", **keys})


def split(file: Path | str, **options: Any) -> Splits:
    """The examples of a small run."""
    return get_task(file).splits(**{"train_size": 100, **options})


def complaint(file: Path | str) -> str:
    """The one line that a task or its data is refused with."""
    with pytest.raises(ZotunerError) as caught:
        split(file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------------------------------- end to end


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The shipped tasks, in a folder that a test may change; `parquet.yaml` has its rows in Parquet."""
    folder = shutil.copytree(OWN, tmp_path / "own")
    pq.write_table(pa.Table.from_pylist(read_table(OWN / "reviews.csv")), folder / "reviews.parquet")
    (folder / "parquet.yaml").write_text(yaml.safe_dump(REVIEWS | {"train": "reviews.parquet"}))
    return folder


@pytest.mark.parametrize("file", ["reviews.yaml", "answers.yaml", "parquet.yaml", "reviews.py"])
def test_a_task_of_ones_own_is_tuned_from_any_folder(
    own: Path, model_dir: Path, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own.parent)
    out = tmp_path / "run"
    assert call("finetune", *argv_of(quick(model_dir, out, task=f"own/{file}"))) == 0
    summary = summary_of(out)
    count = len(get_task(own / file).rows("train"))
    assert summary["examples"] == {"train": min(8, count // 2), "dev": min(4, count // 4), "test": count // 4}
    assert summary["final"]["loss"] > 0
    assert yaml.safe_load((out / "config.yaml").read_text())["task"] == f"own/{file}"


def test_parquet_gives_the_examples_of_the_csv(own: Path) -> None:
    assert split(own / "parquet.yaml") == split(own / "reviews.yaml")


def test_tasks_of_ones_own_are_meta_trained_under_their_names(own: Path, model_dir: Path, tmp_path: Path) -> None:
    """No path of the machine goes into a tuner, which is shared."""
    out = tmp_path / "run"
    options = argv_of(quick_meta(model_dir, out, tasks=own / "reviews.yaml"))
    options.insert(options.index("--tasks") + 2, str(own / "reviews.py"))
    assert call("meta-train", *options) == 0
    names = ("reviews", "reviews-in-python")
    assert Tuner.from_pretrained(out).info.tasks == names
    assert Tuner.from_pretrained(out).info.config["tasks"] == list(names)
    assert str(tmp_path) not in (out / "README.md").read_text()


def test_two_files_of_one_name_are_not_meta_trained_as_one(
    own: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own / "other.yaml").write_text((own / "reviews.yaml").read_text() + "name: reviews\n")
    options = argv_of(quick_meta(model_dir, tmp_path / "run", tasks=own / "reviews.yaml"))
    options.insert(options.index("--tasks") + 2, str(own / "other.yaml"))
    assert call("meta-train", *options) == 2
    assert "tasks of different names" in assert_one_error_line(capsys.readouterr().err)


def test_an_exported_ledger_names_the_task_without_its_folder(own: Path, model_dir: Path, tmp_path: Path) -> None:
    from zotuner.replay import read_recorded

    assert call("finetune", *argv_of(quick(model_dir, tmp_path / "run", task=own / "reviews.yaml"))) == 0
    assert call("export", tmp_path / "run", "--out", tmp_path / "r.zoledger") == 0
    assert read_recorded(tmp_path / "r.zoledger").config.task == "reviews.yaml"
    assert str(own).encode() not in (tmp_path / "r.zoledger").read_bytes()
    words = argv_of(quick(model_dir, tmp_path / "rewarded", objective=f"{OWN / 'rewards.py'}:brief"))
    assert call("finetune", *words) == 0
    assert call("export", tmp_path / "rewarded", "--out", tmp_path / "w.zoledger") == 0
    assert read_recorded(tmp_path / "w.zoledger").config.objective == "rewards.py:brief"
    assert str(OWN).encode() not in (tmp_path / "w.zoledger").read_bytes()


@pytest.fixture
def begun(own: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run from inside the folder of its task, by a relative path, that a signal ended after a step."""
    from zotuner import finetune

    original, calls = finetune.evaluate, 0

    def evaluate(*words: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # zero-shot, dev at 0, dev after step 1
            signal.raise_signal(signal.SIGTERM)
        return original(*words, **options)

    monkeypatch.chdir(own)
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "evaluate", evaluate)
        options = quick(model_dir, out, task="reviews.yaml", eval_every=1)
        assert call("finetune", *argv_of(options)) == EXIT_SIGNAL + signal.SIGTERM
    return out


def test_a_run_goes_on_with_its_task(begun: Path) -> None:
    assert call("finetune", "--resume", begun) == 0
    assert summary_of(begun)["steps"] == 3


@pytest.mark.parametrize("change", ["prompt", "table"])
def test_a_run_does_not_go_on_with_a_task_that_has_changed(
    begun: Path, own: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file, old, new = {"prompt": ("reviews.yaml", "The food", "Food"), "table": ("reviews.csv", "A ", "One ")}[change]
    (own / file).write_text((own / file).read_text().replace(old, new))
    capsys.readouterr()
    assert call("finetune", "--resume", begun) == 2
    assert "this run was begun with the examples (SHA-256)" in assert_one_error_line(capsys.readouterr().err)


def test_a_run_that_goes_on_elsewhere_says_where_it_looked_for_its_task(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert call("finetune", "--resume", begun) == 2
    line = assert_one_error_line(capsys.readouterr().err)
    assert line.endswith(f"reviews.yaml: no such task file in {tmp_path}")


# --------------------------------------------------------------------------------------------------- examples


def test_a_row_becomes_what_the_yaml_says(tmp_path: Path) -> None:
    rows = [
        {"n": 3, "x": 0.5, "yes": True, "a b": "{odd}", "k": "B"},
        {"n": -1, "x": 2.0, "yes": False, "a b": "", "k": "A"},
    ]
    keys = {"prompt": "{{{n}}} {x} {yes} {a b}:", "candidates": [" {n}", " {x}"], "label": "k", "labels": ["A", "B"]}
    task = get_task(described(tmp_path, rows, train="t.jsonl", **keys))
    assert [task.example(row) for row in task.rows("train")] == [
        Example("{3} 0.5 true {odd}:", (" 3", " 0.5"), 1),
        Example("{-1} 2.0 false :", (" -1", " 2.0"), 0),
    ]


def test_a_masked_model_reads_the_suffix_too(tmp_path: Path) -> None:
    file = reviews(tmp_path, suffix=" {verdict}.")
    causal, masked = split(file).train[0], split(file, kind="masked").train[0]
    assert masked == replace(causal, suffix=f" {('bad', 'good')[causal.label]}.")


def test_of_a_list_of_answers_the_first_is_trained_on_and_all_are_right(tmp_path: Path) -> None:
    rows = [{"country": "Bolivia", "capital": ["Sucre", "La Paz"]}, {"country": "Japan", "capital": "Tokyo"}]
    task = get_task(described(tmp_path, rows, **FREE))
    assert (task.generates, task.loss, task.stop, task.max_new_tokens) == (True, "language-modelling", "\n", 50)
    assert [task.example(row) for row in task.rows("train")] == [
        Example("Country: Bolivia\nCapital:", (" Sucre\n",), 0, ("Sucre", "La Paz")),
        Example("Country: Japan\nCapital:", (" Tokyo\n",), 0, ("Tokyo",)),
    ]


def test_metrics_are_those_of_the_package_or_a_function_of_a_file_beside() -> None:
    assert get_task(OWN / "reviews.yaml").metrics == {"accuracy": METRICS["accuracy"], "macro_f1": macro_f1}
    own = get_task(OWN / "capitals.yaml").metrics["first_letter"]
    example = Example("", (" Sucre\n",), 0, ("Sucre", "La Paz"))
    assert own(["Lima", "Quito"], [example, example]) == 0.5


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_format_gives_the_same_examples(tmp_path: Path, ending: str) -> None:
    rows = [{"text": f'Dish "{i}", very\ngood: café', "verdict": i % 2} for i in range(8)]
    keys = {"prompt": "{text} It was", "candidates": [" bad", " good"], "label": "verdict"}
    expected = split(described(tmp_path, rows, train="t.jsonl", **keys))
    if ending in ("csv", "tsv"):
        mark = {"csv": ",", "tsv": "\t"}[ending]
        quoted = ['"' + row["text"].replace('"', '""') + '"' for row in rows]
        lines = [
            f"text{mark}verdict",
            *(f"{text}{mark}{row['verdict']}" for text, row in zip(quoted, rows, strict=True)),
        ]
        (tmp_path / f"t.{ending}").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    elif ending == "json":
        (tmp_path / "t.json").write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    elif ending == "jsonl":
        text = (tmp_path / "t.jsonl").read_text()
        (tmp_path / "t.jsonl").write_text(text, encoding="utf-8-sig")
    elif ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert split(described(tmp_path, train=f"t.{ending}", **keys)) == expected


def test_a_cell_may_be_as_long_as_a_book(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"text\n{'long ' * 200_000}\n")
    assert len(read_table(tmp_path / "t.csv")[0]["text"]) == 1_000_000


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        (("train",), {"train": (6, "train"), "dev": (3, "train"), "test": (3, "train")}),
        (("train", "validation"), {"train": (9, "train"), "dev": (3, "train"), "test": (12, "validation")}),
        (("train", "test"), {"train": (9, "train"), "dev": (3, "train"), "test": (12, "test")}),
        (
            ("train", "validation", "test"),
            {"train": (12, "train"), "dev": (12, "validation"), "test": (12, "test")},
        ),
    ],
    ids=" ".join,
)
def test_dev_and_test_come_from_where_the_document_says(
    tmp_path: Path, given: tuple[str, ...], sizes: dict[str, tuple[int, str]]
) -> None:
    for name in given:
        rows = [{"text": f"{name} {i}", "verdict": ("bad", "good")[i % 2]} for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = described(tmp_path, **REVIEWS | {name: f"{name}.jsonl" for name in given})
    found = split(file)
    prompts = [example.prompt for part in sizes for example in getattr(found, part)]
    assert len(set(prompts)) == len(prompts), "a row serves two ends"
    for part, (count, source) in sizes.items():
        assert len(getattr(found, part)) == count
        assert {example.prompt.split()[0] for example in getattr(found, part)} == {source}
    assert split(file, seed=1) != found


def test_a_data_directory_wins_over_the_files_of_the_yaml(tmp_path: Path) -> None:
    rows = [{"text": f"Elsewhere {i}", "verdict": "good"} for i in range(8)]
    write_rows(tmp_path / "data", "own", train=rows)
    task = get_task(reviews(tmp_path), tmp_path / "data")
    assert all(example.prompt.startswith("Elsewhere ") for example in task.splits(train_size=9).train)


def test_the_hub_is_asked_for_the_splits_that_the_yaml_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(*words: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((*words, split))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    keys = {key: value for key, value in REVIEWS.items() if key != "train"}
    split(described(tmp_path, hub="acme/films", test="test[:5]", **keys))
    split(described(tmp_path, hub="acme/films", config="short", train="all", **keys))
    assert asked == [
        ("acme/films", None, "train"),
        ("acme/films", None, "test[:5]"),
        ("acme/films", "short", "all"),
    ]


def test_k_examples_of_each_class_are_counted_by_the_label_of_the_yaml(tmp_path: Path) -> None:
    found = split(reviews(tmp_path), k_shot=2)
    assert sorted(example.label for example in found.train) == [0, 0, 1, 1]


# --------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"promt": "x"}, "unknown key 'promt'; did you mean 'prompt'?"),
        ({"prompt": None}, "prompt is required"),
        ({"train": None}, "train is required: a file beside this one"),
        ({"candidates": None}, "expected either candidates and label, or answer"),
        ({"answer": "{text}"}, "expected either candidates and label, or answer"),
        ({"label": None}, "label is required"),
        ({"candidates": [" one"]}, "candidates: tuple should have at least 2 items"),
        ({"candidates": [" one", " one"]}, "candidates: expected different texts"),
        ({"candidates": "terrible"}, "candidates: input should be a valid tuple, got 'terrible'"),
        ({"candidates": [1, 2]}, "candidates: input should be a valid string, got 1; put it in quotes"),
        ({"candidates": [False, True]}, "candidates: put yes, no, on, off, true and false in quotes"),
        ({"labels": [False, True]}, "labels: put yes, no, on, off, true and false in quotes"),
        ({"labels": ["bad"]}, "labels: expected 2 different values, one a candidate"),
        ({"labels": ["bad", "bad"]}, "labels: expected 2 different values, one a candidate"),
        ({"prompt": "{text"}, "prompt: expected fields in braces, {{ and }} for braces"),
        ({"prompt": "{}"}, "prompt: expected the name of a field"),
        ({"prompt": "{text:>9}"}, "prompt: expected the name of a field"),
        ({"suffix": "}"}, "suffix: expected fields in braces"),
        ({"metric": "f2"}, "metric: unknown metric 'f2'; "),
        ({"metric": []}, "metric: tuple should have at least 1 item"),
        ({"loss": "nll"}, "loss: input should be 'classification' or 'language-modelling', got 'nll'"),
        ({"max_new_tokens": 0}, "max_new_tokens: input should be greater than or equal to 1, got 0"),
        ({"name": "my task/1"}, "name: string should match pattern"),
        ({"name": "sst2"}, "name 'sst2' is that of a task of the package"),
        ({"config": "short"}, "config goes with hub"),
        ({"test": "t.jsonl"}, "train, validation and test: expected different ones"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_mistake_in_a_yaml_is_one_line_with_file_and_key(tmp_path: Path, keys: dict[str, Any], says: str) -> None:
    file = reviews(tmp_path, **keys)
    assert complaint(file).startswith(f"{file}: {says}")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"label": "country"}, "label, labels, suffix and loss: classification go with candidates"),
        ({"loss": "classification"}, "label, labels, suffix and loss: classification go with candidates"),
        ({"metric": "macro_f1"}, "metric: macro_f1 needs candidates, not a generated answer"),
        ({"stop": ""}, "stop: string should have at least 1 character"),
    ],
    ids=["label", "loss", "metric", "stop"],
)
def test_what_does_not_go_with_a_generated_answer_is_refused(tmp_path: Path, keys: dict[str, Any], says: str) -> None:
    file = described(tmp_path, [], **FREE | keys)
    assert complaint(file).startswith(f"{file}: {says}")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"prompt": "{txt}"}, "prompt: unknown field 'txt'; did you mean 'text'? Known: text, verdict"),
        ({"candidates": ["{a}", "b"]}, "candidates: unknown field 'a'; known: text, verdict"),
        ({"suffix": "{b}"}, "suffix: unknown field 'b'; known: text, verdict"),
        ({"label": "Verdict"}, "label: unknown field 'Verdict'; did you mean 'verdict'? Known: text, verdict"),
    ],
    ids=["prompt", "candidates", "suffix", "label"],
)
def test_a_field_that_the_table_lacks_is_named_with_those_it_has(
    tmp_path: Path, keys: dict[str, Any], says: str
) -> None:
    file = reviews(tmp_path, **keys)
    assert complaint(file) == f"{file}: {says} ({tmp_path / 't.jsonl'}, row 1)"


@pytest.mark.parametrize(
    ("keys", "row", "says"),
    [
        ({}, {"text": None}, "field 'text' is empty; own.yaml needs it for its prompt"),
        ({}, {"text": ["a"]}, "field 'text': expected text or a number, got \"['a']\""),
        ({}, {"verdict": None}, "field 'verdict' is empty; own.yaml needs it for its label"),
        ({}, {"verdict": "godo"}, "field 'verdict': unknown label 'godo'; did you mean 'good'? Known: bad, good"),
        ({"labels": None}, {"verdict": 2}, "field 'verdict': unknown label '2'; known: 0, 1; labels in the YAML"),
        ({"labels": None}, {"verdict": -1}, "field 'verdict': unknown label '-1'"),
        ({"labels": None}, {"verdict": "good"}, "field 'verdict': unknown label 'good'; known: 0, 1; labels in the"),
        ({"candidates": ["{text}", " x"]}, {"text": " "}, "expected text for each answer, got [' ', ' x']"),
    ],
    ids=["no text", "a list", "no label", "a label's typo", "a large label", "a small label", "a word", "blank"],
)
def test_a_row_that_does_not_fit_is_named_with_its_number(
    tmp_path: Path, keys: dict[str, Any], row: dict[str, Any], says: str
) -> None:
    good = {"text": "Dish.", "verdict": 0 if "labels" in keys else "good"}
    file = reviews(tmp_path, [good, good, good | row], **keys)
    assert complaint(file).startswith(f"{tmp_path / 't.jsonl'}, row 3: {says}")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ([], "field 'capital' is empty"),
        (["Sucre", None], "field 'capital' is empty"),
        ("", "expected text for each answer"),
        ("two\nlines", "' two\\nlines' holds '\\n', at which an answer ends; set another stop"),
    ],
    ids=["an empty list", "null in a list", "empty", "two lines"],
)
def test_an_answer_that_nothing_could_give_is_refused(tmp_path: Path, answer: Any, says: str) -> None:
    file = described(tmp_path, [{"country": "Bolivia", "capital": answer}], **FREE)
    assert complaint(file).startswith(f"{tmp_path / 't.jsonl'}, row 1: {says}")


def test_an_answer_of_two_lists_is_refused(tmp_path: Path) -> None:
    row = {"country": ["Bolivia", "Peru"], "capital": ["Sucre", "Lima"]}
    file = described(tmp_path, [row], **FREE | {"prompt": "Capital?", "answer": "{country}: {capital}"})
    assert "row 1: expected one field of the answer to be a list, got country, capital" in complaint(file)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.csv", b"", ": expected examples of task own, found none"),
        ("t.csv", b"text,verdict\n", ": expected examples of task own, found none"),
        ("t.csv", b"text,verdict\na,good\nb,c,good\n", ", row 2: expected 2 cells, got 3; put text that holds ','"),
        ("t.csv", b"text,verdict\na\n", ", row 1: expected 2 cells, got 1"),
        ("t.csv", b"text,verdict\n,good\n", ", row 1: field 'text' is empty"),
        ("t.csv", b"text,text\na,b\n", ": expected columns of different names, 'text' comes more than once"),
        ("t.csv", b'text,verdict\n"a,good\n', ", line 2: unexpected end of data; quote text"),
        ("t.csv", b'text,verdict\n"a" b,good\n', ", line 2: ',' expected after '\"'; quote text"),
        ("t.csv", "text,verdict\ncafé,good\n".encode("latin-1"), ": expected UTF-8 text"),
        ("t.tsv", b"text,verdict\na,good\n", "own.yaml: prompt: unknown field 'text'"),
        ("t.json", b'{"text": "a"}', ": expected a list of objects, got dict"),
        ("t.json", b'[{"text": "a"}, 3]', ", row 2: expected an object, got '3'"),
        ("t.json", b"[", ": expected JSON"),
        ("t.jsonl", b"[]\n", ", line 1: expected one JSON object"),
        ("t.parquet", b"text,verdict\n", ": expected Parquet: "),
        ("t.parquet", b"", ": expected Parquet: "),
        ("t.xlsx", b"", ": expected a file that ends in .csv, .tsv, .jsonl, .json, .parquet"),
        ("t.csv", None, ": no such file"),
    ],
)
def test_a_broken_table_is_one_line_that_names_it(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    file = reviews(tmp_path, train=name)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    start = str(tmp_path / "own.yaml") if says.startswith("own.yaml") else str(tmp_path / name)
    assert complaint(file).startswith(start + says.removeprefix("own.yaml"))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("class Own(zotuner.Task):", "class Own:", ": expected one class that inherits from zotuner.Task, found none"),
        (
            "import zotuner\n",
            "import zotuner\nfrom zotuner.tasks.sst2 import Sst2\nclass B(Sst2): name = 'b'",
            "found B, Own",
        ),
        (
            "import zotuner\n",
            "import zotuner\nimport nowhere\n",
            ", line 3: ModuleNotFoundError: No module named 'nowhere'",
        ),
        ("loss =", "loss =)", ", line 9: SyntaxError: unmatched ')'"),
        ('    name = "own"\n', "", ": class Own lacks 'name'; a task needs name, fields, loss"),
        ('    loss = "classification"\n', "", ": class Own lacks 'loss'"),
        ('"classification"', '"clasification"', "unknown loss 'clasification'; did you mean 'classification'?"),
        ("def example", "def exmaple", ": class Own has no method example(row)"),
        ("zotuner.Example(", "(", ": expected example to return a zotuner.Example"),
        ("0)", "2)", ": expected example to return a zotuner.Example"),
        ('(" a", " b")', '" a"', ": expected example to return a zotuner.Example"),
        ('row["text"]', 'row["txt"]', ", line 12: KeyError: 'txt'"),
        ('    sources = {"train": "t.jsonl"}\n', "", "task own has no 'train' rows: name their table in sources"),
        ('"own"', '"copa"', ": name 'copa' is that of a task of the package"),
        ('{"text": str}', '["text"]', ": class Own: fields: expected dict, got ['text']"),
        ('{"text": str}', '{"text": "str"}', "fields: expected a type for 'text', such as str, got 'str'"),
        ('"own"', '"own"; dev_size = "a"', ": class Own: dev_size: expected int, got 'a'"),
        ('"own"', '"own"; metrics = {"x": 1.0}', ": class Own: metrics: expected a function for 'x', got 1.0"),
        ('"own"', '"own"; metrics = {"step": len}', "metrics: a metric cannot be called 'step'"),
        ('"own"', '"own"; metrics = {1: len}', "metrics: expected text for a metric's name, got 1"),
        ('"own"', '"own"; generates = True; stop = ""', ": class Own: expected a text in stop and a positive"),
        ('"own"', '"own"; generates = True; max_new_tokens = 0', "whose answers are generated, got '\\n' and 0"),
        ('"own"', '"own"; __init__ = lambda self, data_dir: 1 / 0', ", line 5: ZeroDivisionError: division by zero"),
        ('"own"', '"own"; labelled = lambda self, row: 1 / 0', ", line 5: ZeroDivisionError: division by zero"),
        ("0)", "True)", ": expected example to return a zotuner.Example"),
        ('(" a", " b")', "(1, 2)", ": expected example to return a zotuner.Example"),
        ('row["text"]', "None", ": expected example to return a zotuner.Example"),
    ],
)
def test_a_mistake_in_a_python_file_is_one_line(
    tmp_path: Path, old: str, new: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jsonl").write_text('{"text": "x"}\n' * 4)
    assert CLASS.count(old) == 1
    file = Path("own.py")
    file.write_text(CLASS.replace(old, new))
    line = complaint(file)
    assert says in line
    assert line.startswith(("own.py", "task own"))


def test_the_class_of_the_mistakes_is_without_one(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "x"}\n' * 4)
    (tmp_path / "own.py").write_text(CLASS)
    assert split(tmp_path / "own.py").train == (Example("x", (" a", " b"), 0),) * 2


def test_text_of_a_csv_becomes_the_number_that_a_class_asks_for(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label,score\n7,1,0.5\n")
    code = CLASS.replace("t.jsonl", "t.csv").replace('{"text": str}', '{"text": str, "label": int, "score": float}')
    (tmp_path / "own.py").write_text(code)
    assert get_task(tmp_path / "own.py").rows("train") == [{"text": "7", "label": 1, "score": 0.5}]
    (tmp_path / "t.csv").write_text("text,label,score\n7,one,0.5\n")
    assert complaint(tmp_path / "own.py").endswith("row 1: field 'label' must be a int, got 'one'")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def other(answer, example): return 1.0", ": expected a function 'score', found none"),
        ("def score(answer, example): return 'much'", "ValueError: could not convert string to float: 'much'"),
        ("def score(answer, example): return 1 / 0", "line 1: ZeroDivisionError: division by zero"),
    ],
)
def test_a_mistake_in_a_score_is_one_line(tmp_path: Path, code: str, says: str) -> None:
    (tmp_path / "s.py").write_text(code)
    with pytest.raises(ZotunerError, match=re.escape(says)) as caught:
        get_task(reviews(tmp_path, metric="s.py:score")).metrics["score"](["x"], [Example("", ("x",), 0)])
    assert str(caught.value).startswith(str(tmp_path / "s.py"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        (["s.py:loss"], "metric: a metric cannot be called 'loss'"),
        (["accuracy", "s.py:forwards"], "metric: a metric cannot be called 'forwards'"),
        (["s.py:score", "other.py:score"], "metric: expected metrics of different names, got 'score' twice"),
    ],
)
def test_a_metric_takes_the_name_of_nothing_else(tmp_path: Path, metrics: list[str], says: str) -> None:
    for name in ("s.py", "other.py"):
        (tmp_path / name).write_text("def score(answer, example): return 1.0\nloss = forwards = score\n")
    assert says in complaint(reviews(tmp_path, metric=metrics))


def test_a_metric_of_a_python_task_judges_all_answers_and_blames_the_file(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "x"}\n' * 4)
    code = CLASS.replace(
        '"own"',
        '"own"; metrics = {"share": lambda a, e: sum(x == "y" for x in a) / len(e), "bad": abs, "nothing": print}',
    )
    (tmp_path / "own.py").write_text(code)
    metrics = get_task(tmp_path / "own.py").metrics
    examples = [Example("", ("x", "y"), 0)] * 2
    assert metrics["share"](["y", "x"], examples) == 0.5
    with pytest.raises(ZotunerError, match=r"own\.py, line \?: TypeError: abs\(\) takes"):
        metrics["bad"](["y", "x"], examples)
    with pytest.raises(ZotunerError, match=r"own\.py, line \?: TypeError: float\(\) argument must be"):
        metrics["nothing"](["y", "x"], examples)


def test_a_task_file_that_is_not_there_is_one_line_of_the_command_line(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("finetune", *argv_of(quick(model_dir, tmp_path / "run", task="nowhere.yaml"))) == 2
    assert f"nowhere.yaml: no such task file in {os.getcwd()}" in assert_one_error_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------- shown, documented


def test_a_task_is_shown_as_a_model_reads_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("tasks", OWN / "reviews.yaml", "--show", 100) == 0
    shown = capsys.readouterr().out
    examples = split(OWN / "reviews.yaml").train
    assert shown.count("\n  * ") == shown.count("\n  - ") == len(examples) == 8
    for example in examples:
        assert f"\n  * {example.candidates[example.label]!r}\n" in shown
        assert all(f"    {line!r}\n" in shown for line in example.prompt.splitlines(keepends=True))
    assert "  test       4 of train\n" in shown


def test_text_of_a_shown_example_is_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"[red]a[/] [b \x1b[31m {i}", "verdict": "good"} for i in range(4)]
    assert call("tasks", reviews(tmp_path, rows), "--show", 1) == 0
    shown = capsys.readouterr().out
    assert r"[red]a[/] [b \x1b[31m" in shown
    assert "\x1b" not in shown


def test_a_shown_task_of_free_text_says_all_right_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"country": "Bolivia", "capital": ["Sucre", "La Paz"]}] * 4
    assert call("tasks", described(tmp_path, rows, **FREE), "--show", 1) == 0
    assert "  * ' Sucre\\n'\n  right: 'Sucre', 'La Paz'\n" in capsys.readouterr().out


def test_a_task_of_the_package_is_shown_with_its_tokens(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("tasks", "demo-sentiment", "--show", 2, "--model", model_dir) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("task demo-sentiment: classification, metrics: accuracy\n")
    assert len(re.findall(r"^train \d, a row of \d+ tokens$", shown, re.M)) == 2
    assert len(re.findall(r"^  [*-] ' \w+'  \(\d tokens\)$", shown, re.M)) == 4


def test_a_task_for_masked_models_alone_is_shown_as_they_read_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "x"}\n' * 4)
    code = CLASS.replace("def example", "def masked").replace("0)", '0, suffix=": x")')
    (tmp_path / "own.py").write_text(code)
    assert call("tasks", tmp_path / "own.py", "--show", 1) == 0
    assert capsys.readouterr().out.endswith("    'x'\n  * ' a'\n  - ' b'\n    ': x'\n")
    assert complaint(tmp_path / "own.py") == "task own has a prompt for masked models alone (such as RoBERTa)"


@pytest.mark.parametrize(
    "words",
    [
        ["cop"],
        ["copa", "--data-dir", "nowhere"],
        ["demo-copa", "--model", "nowhere"],
        ["demo-copa", "--model", "broken"],
    ],
)
def test_what_cannot_be_shown_is_one_line(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken").mkdir()
    Path("broken/config.json").write_text('{"model_type": "nothing-like-it"}')
    assert call("tasks", *words) == 2
    assert_one_error_line(capsys.readouterr().err)


@pytest.mark.parametrize("file", ["reviews.yaml", "reviews.py", "signed.py", "rewards.py", "gru.py"])
def test_the_document_shows_the_very_files_that_are_tested(file: str) -> None:
    blocks = re.findall(r"```(?:yaml|python)\n(.*?)   ```", ADDING.read_text(), re.S)
    shown = [re.sub(r"^   ", "", block, flags=re.M) for block in blocks]
    written = (OWN / file).read_text()
    assert any(written.endswith(block) for block in shown)


def test_a_reward_of_ones_own_is_maximised(model_dir: Path, tmp_path: Path) -> None:
    options = {"task": OWN / "reviews.yaml", "objective": f"{OWN}/rewards.py:brief", "method": "fzoo", "eps": 0.1}
    assert call("finetune", *argv_of(quick(model_dir, tmp_path / "run", **options))) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert -1 <= summary["final"]["loss"] <= 0


def test_an_architecture_of_ones_own_is_tuned(tokenizer: Any, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("own_gru", OWN / "gru.py")
    assert spec is not None
    assert spec.loader is not None
    gru = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gru)
    folder = tmp_path / "gru"
    gru.GRUForCausalLM(gru.GRUConfig(vocab_size=len(tokenizer), initializer_range=0.3)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert call("finetune", *argv_of(quick(folder, tmp_path / "run", task=OWN / "reviews.yaml", lr=1e-2))) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["final"]["loss"] != summary["zero_shot"]["loss"]


def test_the_document_names_every_key() -> None:
    from zotuner.tasks.from_yaml import Description

    table = ADDING.read_text().split("| key |")[1].split("\n\n")[0]
    assert [key for key in Description.model_fields if f"`{key}`" not in table] == []
    assert [name for name in METRICS if f"`{name}`" not in table] == []


def test_the_names_for_tasks_of_ones_own_are_public() -> None:
    assert zotuner.Task is Task
    assert zotuner.Example is Example
    assert all(issubclass(task, zotuner.Task) for task in TASKS.values())
