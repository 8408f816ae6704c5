"""Every task from its rows to a summary, under a model of each kind that it has a prompt for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from task_rows import write_every_task
from test_cli import argv_of, call, quick
from test_masked import roberta, with_mask

from zotuner.tasks import TASKS

KINDS = [(name, kind) for name, task in TASKS.items() for kind in task.kinds()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_every_task(tmp_path_factory.mktemp("data"), train=24, test=6)


@pytest.fixture(scope="module")
def models(model_dir: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind."""
    folder, speaks = tmp_path_factory.mktemp("kinds") / "roberta", with_mask(tokenizer)
    roberta(len(speaks)).save_pretrained(folder)
    speaks.save_pretrained(folder)
    return {"causal": model_dir, "masked": folder}


@pytest.mark.filterwarnings("ignore:.*cannot read several candidates")  # of a random model
@pytest.mark.parametrize(("name", "kind"), KINDS, ids=[f"{name} {kind}" for name, kind in KINDS])
def test_a_task_is_tuned_on_and_judged(
    name: str, kind: str, models: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TASKS[name], "max_new_tokens", 12)  # a row has 60 tokens here, prompt and answer together
    options = {"task": name, "data_dir": data, "steps": 2, "lr": 1e-2, "eval_size": 6, "max_length": 60}
    assert call("finetune", *argv_of(quick(models[kind], tmp_path / "run", **options))) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["final"]) == ["loss", *TASKS[name].metrics]
    assert all(0 <= summary["final"][metric] <= 1 for metric in TASKS[name].metrics)
    assert summary["final"]["loss"] != summary["zero_shot"]["loss"]
    assert summary["skipped"] == 0
