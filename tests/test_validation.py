"""Meta-training with a look at what the tuner is worth: the best is kept, the weights are left as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import argv_of, assert_one_error_line, call, quick_meta

from zotuner.config import MetaTrainConfig
from zotuner.evaluate import evaluate
from zotuner.metrics import read_json, read_rows
from zotuner.models import load_model, weights_sha256
from zotuner.objective import objective_for
from zotuner.progress import Display
from zotuner.tasks import get_task
from zotuner.tuner import Tuner
from zotuner.validation import Validation

OPTIONS = {"steps": 4, "reset_every": 2, "batch_size": 2}


@pytest.mark.parametrize("meta_loss", ["sampled", "expected"])
def test_the_tuner_with_the_lowest_loss_is_kept(
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    meta_loss: str,
) -> None:
    options = {**OPTIONS, "meta_loss": meta_loss, **({"second_batch": True} if meta_loss == "sampled" else {})}
    assert call("meta-train", *argv_of(quick_meta(model_dir, tmp_path / "two", **options | {"steps": 2}))) == 0
    shares = iter([0.9, 0.7, float("nan")])  # after 0, 2 and 4 outer steps
    monkeypatch.setattr(Validation, "__call__", lambda *_: next(shares))
    out = tmp_path / "out"
    assert call("meta-train", *argv_of(quick_meta(model_dir, out, **options, validate_steps=3))) == 0
    kept, two = Tuner.from_pretrained(out), Tuner.from_pretrained(tmp_path / "two")
    for name, tensor in two.bank.state_dict().items():
        assert torch.equal(kept.bank.state_dict()[name], tensor)
    summary = read_json(out / "summary.json")
    assert summary["kept"] == 2
    assert summary["validation"] == [[0, 0.9], [2, 0.7], [4, None]]
    assert summary["tuner_sha256"] == kept.sha256()
    for row in read_rows(out / "metrics.jsonl"):
        assert row["sigma_min"] <= min(row["sigma_types"].values()) <= max(row["sigma_types"].values())
        assert ("gain" in row) == (meta_loss == "expected")
    capsys.readouterr()
    assert call("log", out) == 0
    assert ("x sigma = 1" in capsys.readouterr().out) == (meta_loss == "expected")


def test_a_validation_leaves_the_weights_and_divides_the_loss_reached_by_that_at_the_start(
    model_dir: Path, tmp_path: Path
) -> None:
    model, tokenizer = load_model(str(model_dir))
    task = get_task("demo-copa")
    splits, objective = task.splits(train_size=40), objective_for(task, model, tokenizer)
    settings: Any = {"model": "m", "out": tmp_path, "validate_steps": 2, "inner_lr": 1e-3}
    before = weights_sha256(model)
    tuner = Tuner.for_model(model, "exp")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = Validation(
        model,
        tuner,
        MetaTrainConfig(**settings),
        {task.name: objective},
        {task.name: splits},
        lambda: model.load_state_dict(start),
    )
    share = made(Display())
    assert share == made(Display())
    assert weights_sha256(model) == before
    assert not list(tmp_path.iterdir())
    assert 0.5 < share < 1.5
    assert made._start == {task.name: evaluate(model, objective, splits.dev, answers=False).figures["loss"]}


def test_a_task_without_a_second_batch_is_refused(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = quick_meta(model_dir, tmp_path / "out", second_batch=True, batch_size=40, train_size=40)
    assert call("meta-train", *argv_of(options)) == 2
    said = assert_one_error_line(capsys.readouterr().err)
    assert said.endswith("expected more than --batch-size 40 training examples of task demo-copa, got 40")
    assert not (tmp_path / "out").exists()
