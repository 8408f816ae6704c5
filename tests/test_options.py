"""What `finetune` does with --objective, --shots, --chat and tasks whose answers are generated, through the CLI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_cli import argv_of, call, quick
from test_objective import with_special_tokens

from zotuner.config import FinetuneConfig
from zotuner.finetune import prepare
from zotuner.objective import Objective
from zotuner.tasks import Example, get_task

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def summary_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "summary.json").read_text()))


def evals_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]


def capitals(folder: Path) -> Path:
    """A task of generated answers."""
    rows = [{"place": f"region {i}", "capital": "the harbour" if i % 2 else "snow"} for i in range(24)]
    (folder / "capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = {
        "train": "capitals.jsonl",
        "prompt": "The capital of {place} is",
        "answer": " {capital}",
        "max_new_tokens": 4,
    }
    (folder / "capitals.yaml").write_text(yaml.safe_dump(text))
    return folder / "capitals.yaml"


def test_a_task_of_generated_answers_is_tuned_and_judged_by_f1_and_em(model_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call("finetune", *argv_of(quick(model_dir, run, task=capitals(tmp_path), method="fzoo", lr=1e-2))) == 0
    summary = summary_of(run)
    assert list(summary["final"]) == list(summary["zero_shot"]) == ["loss", "f1", "em"]
    assert summary["task"] == "capitals"
    assert all(row.keys() == {"step", "forwards", "tokens", "seconds", "loss", "loss_error"} for row in evals_of(run))


def test_the_report_names_each_runs_metric(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("finetune", *argv_of(quick(model_dir, tmp_path / "a", task=capitals(tmp_path), method="none"))) == 0
    assert call("finetune", *argv_of(quick(model_dir, tmp_path / "b", method="none"))) == 0
    capsys.readouterr()
    assert call("report", tmp_path / "a", tmp_path / "b") == 0
    shown = capsys.readouterr().out
    assert " metric" in shown.splitlines()[0] + shown.splitlines()[1]
    assert " f1" in shown
    assert " accuracy" in shown
    assert call("report", tmp_path / "b") == 0
    assert " accuracy" in capsys.readouterr().out.split("zero-shot")[0]


def test_the_evaluation_before_the_first_step_can_be_left_out(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, options in {"with": {}, "without": {"no_zero_shot": True}}.items():
        assert call("finetune", *argv_of(quick(model_dir, tmp_path / name, **options))) == 0
    first, second = (summary_of(tmp_path / name) for name in ("with", "without"))
    assert first["zero_shot"] is not None
    assert second["zero_shot"] is None
    assert second["final"] == first["final"]
    capsys.readouterr()
    assert call("report", tmp_path / "without", tmp_path / "with") == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert rows[-3:] == ["without", "zero-shot", "with"]
    none = quick(model_dir, tmp_path / "none", method="none", no_zero_shot=True)
    assert call("finetune", *argv_of(none)) == 0
    assert summary_of(tmp_path / "none")["final"] == summary_of(tmp_path / "none")["zero_shot"] is not None


def test_accuracy_itself_is_maximised_and_the_losses_are_multiples(model_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = {"objective": "accuracy", "method": "fzoo", "eps": 0.1, "batch_size": 8}
    assert call("finetune", *argv_of(quick(model_dir, run, **options))) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(-1 <= row["loss"] <= 0 and row["loss"] * 8 == round(row["loss"] * 8) for row in rows)
    for row in evals_of(run):
        assert row["loss"] == pytest.approx(-row["accuracy"])
    assert summary_of(run)["objective"] == "accuracy"


def test_a_function_of_the_users_is_maximised(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def length(answer, example):\n    return len(answer) + len(example.answers)\n")
    run = tmp_path / "run"
    options = {"objective": f"{tmp_path}/mine.py:length", "task": capitals(tmp_path), "eps": 0.1, "engine": "in-place"}
    assert call("finetune", *argv_of(quick(model_dir, run, **options))) == 0
    assert all(row["loss"] <= -1 for row in evals_of(run))


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        ("f1", "--objective f1: task demo-sentiment has accuracy"),
        ("missing.py:reward", "missing.py"),
        ("here.py:other", "expected a function 'other', found none"),
        ("here.py:fails", "here.py, line 2: ZeroDivisionError"),
    ],
)
def test_a_mistake_in_an_objective_is_one_line(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: str, says: str
) -> None:
    (tmp_path / "here.py").write_text("def fails(answer, example):\n    return 1 / 0\n")
    stated = f"{tmp_path}/{objective}" if ".py" in objective else objective
    assert call("finetune", *argv_of(quick(model_dir, tmp_path / "run", objective=stated))) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error


def config_of(model: Path, out: Path, **options: Any) -> FinetuneConfig:
    stated = {"model": model, "out": out, "task": "demo-sentiment", "method": "none", "train_size": 8, "dev_size": 4}
    return FinetuneConfig.read(None, {**{k: str(v) for k, v in stated.items()}, **options})


def test_shots_stand_before_every_prompt_and_are_no_test_examples(model_dir: Path, tmp_path: Path) -> None:
    plain = prepare(config_of(model_dir, tmp_path / "run"))
    shown = prepare(config_of(model_dir, tmp_path / "run", shots=2))
    demonstrations = "".join(e.prompt + e.candidates[e.label] + "\n\n" for e in plain.splits.train[:2])
    assert [e.prompt for e in shown.splits.test] == [demonstrations + e.prompt for e in plain.splits.test]
    assert not {e.prompt for e in plain.splits.train[:2]} & {e.prompt for e in plain.splits.test}


def test_shots_change_what_is_evaluated(model_dir: Path, tmp_path: Path) -> None:
    came = []
    for shots in (0, 3):
        run = tmp_path / f"run{shots}"
        assert call("finetune", *argv_of(quick(model_dir, run, method="none", shots=shots))) == 0
        came.append(summary_of(run)["zero_shot"]["loss"])
    assert came[0] != came[1]


def test_shots_are_for_method_none(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("finetune", *argv_of(quick(model_dir, tmp_path / "run", shots=2))) == 2
    assert "--shots is for method none" in capsys.readouterr().err
    assert call("finetune", *argv_of(quick(model_dir, tmp_path / "run", method="none", shots=9))) == 2
    assert "--shots: expected at most the 8 training examples, got 9" in capsys.readouterr().err


@pytest.fixture(scope="module")
def chat_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The tiny model with a tokenizer that has a chat template and puts <s> before every text."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("chat") / "model"
    AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(folder)
    speaks = with_special_tokens(tokenizer, "<s> $A")
    speaks.chat_template = TEMPLATE
    speaks.save_pretrained(folder)
    return folder


def test_chat_puts_prompts_in_turns_without_a_second_token_of_beginning(chat_dir: Path, tmp_path: Path) -> None:
    setup = prepare(config_of(chat_dir, tmp_path / "run", chat=True))
    example = setup.splits.test[0]
    assert example.prompt.startswith("<s>user\n")
    assert example.prompt.endswith("\n<s>assistant\n")
    assert example.candidates == ("terrible", "great")
    ids = setup.objective.batch([example]).input_ids[0].tolist()
    assert ids[0] == setup.tokenizer.bos_token_id
    assert ids[1] != setup.tokenizer.bos_token_id


def test_a_chat_run_is_tuned(chat_dir: Path, tmp_path: Path) -> None:
    assert call("finetune", *argv_of(quick(chat_dir, tmp_path / "run", chat=True, lr=1e-2))) == 0
    assert summary_of(tmp_path / "run")["final"]["loss"] > 0


def test_a_long_prompt_loses_its_beginning_but_not_the_special_token(tokenizer: Any) -> None:
    speaks = with_special_tokens(tokenizer, "<s> $A")
    example = Example("The parade was cancelled and everybody walked home in the rain so", (" it rained.",), 0)
    ids = speaks(example.prompt + example.candidates[0])["input_ids"]
    batch = Objective(get_task("demo-copa"), speaks, max_length=8).batch([example])
    assert batch.input_ids[0].tolist() == [ids[0], *ids[:-1][-7:]]
    assert int(batch.counts[0]) <= 7


@pytest.mark.slow
def test_the_real_model_gains_from_shots_shared_once(tmp_path: Path) -> None:
    """The scores behind a prefix computed once are those computed with it, on SmolLM2."""
    setup = prepare(config_of(Path("smollm2-135m-instruct"), tmp_path / "run", shots=4, eval_size=6))
    examples = list(setup.splits.test)
    with torch.no_grad():
        prefix = setup.objective.prefix(setup.model, examples)
        assert prefix is not None
        plain, behind = (setup.objective.assess(setup.model, examples, given) for given in (None, prefix))
    torch.testing.assert_close(plain.losses, behind.losses, atol=1e-4, rtol=0)
