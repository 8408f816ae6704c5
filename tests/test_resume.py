"""Nothing is lost: runs that real signals kill at any moment go on, and end with the bits of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import STEPS, ZEROTH_ORDER, options_of
from test_cli import argv_of, assert_one_error_line, call, quick, quick_meta

from zotuner import training
from zotuner.ledger import read_ledger
from zotuner.metrics import read_rows
from zotuner.models import load_model


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what no two runs share."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def assert_the_same_run(one: Path, other: Path) -> None:
    """All but seconds and memory: summaries, metrics, evaluations, scales, and every byte of the ledger."""
    first, second = (json.loads((out / "summary.json").read_text()) for out in (one, other))
    for name in ("seconds", "peak_rss_bytes"):
        first.pop(name), second.pop(name)
    assert second == first
    assert {path.name for path in other.iterdir()} == {path.name for path in one.iterdir()}
    for name in ("metrics.jsonl", "evals.jsonl", "predictions.jsonl", "scales.jsonl", "ledger.bin"):
        if not (one / name).exists():
            continue
        if name == "ledger.bin":
            assert read_ledger(other / name)[1] == read_ledger(one / name)[1]
        else:
            assert timeless(read_rows(other / name)) == timeless(read_rows(one / name)), name


# What a process does before it kills itself: at the n-th time that it comes to a place.
KILLED = """
import os, signal, sys
import zotuner.{module} as module
from zotuner.cli import main
owner, name, left = {owner}, {name!r}, [{count}]
original = getattr(owner, name)
def killing(*args, **kwargs):
    left[0] -= 1
    if left[0] == 0 and {before}:
        os.kill(os.getpid(), signal.{signal})
    result = original(*args, **kwargs)
    if left[0] == 0 and not {before}:
        os.kill(os.getpid(), signal.{signal})
    return result
setattr(owner, name, killing)
sys.exit(main(sys.argv[1:]))
"""
# (module, owner, function, how often, before it runs or after): around all that a run writes, and in a step
PLACES = {
    "in the first evaluation": ("finetune", "module", "evaluate", 1, True),
    "in the first on dev": ("finetune", "module", "evaluate", 2, False),
    "in a step": ("steppers", "module.Objective", "mean_loss", 5, True),
    "before the ledger": ("training", "module.Ledger", "write", 3, True),
    "between ledger and metrics": ("training", "module.Ledger", "write", 7, False),
    "after a row of metrics": ("training", "module.MetricsLog", "write", 9, False),
    "before the best weights": ("training", "module", "keep_weights", 2, True),
    "between best weights and row": ("training", "module", "keep_weights", 2, False),
    "before a snapshot": ("training", "module", "take", 2, True),
    "within a snapshot": ("snapshot", "module", "save_file", 2, True),
    "after a snapshot": ("training", "module", "take", 1, False),
    "before the last weights": ("finetune", "module", "restore_weights", 1, True),
    "before the summary": ("finetune", "module", "write_json", 2, True),
    "after the summary": ("finetune", "module", "_tidy", 1, True),
}


def killed(place: tuple[str, str, str, int, bool], argv: list[str], by: str = "SIGKILL") -> subprocess.CompletedProcess:
    """A process that comes to an end at a place."""
    module, owner, name, count, before = place
    code = KILLED.format(module=module, owner=owner, name=name, count=count, before=before, signal=by)
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_run_killed_anywhere_ends_with_the_same_bits(
    whole: Callable[[str], Path], model_dir: Path, tuner_dir: Path, tmp_path: Path, place: Any
) -> None:
    out = tmp_path / "out"
    argv = argv_of(quick(model_dir, out, **options_of("zo-finetuner", tuner_dir)))
    assert killed(place, ["finetune", *argv]).returncode == -signal.SIGKILL
    assert call("finetune", "--resume", out) == 0
    assert_the_same_run(whole("zo-finetuner"), out)


@pytest.mark.parametrize("method", [*ZEROTH_ORDER, "adam"])
def test_every_kind_of_run_goes_on_twice_and_ends_with_the_same_bits(
    whole: Callable[[str], Path], model_dir: Path, tuner_dir: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "out"
    argv = argv_of(quick(model_dir, out, **options_of(method, tuner_dir)))
    step = ("training", "module.Training", "_step", 7, True)
    assert killed(step, ["finetune", *argv]).returncode == -signal.SIGKILL
    assert killed((*step[:3], 3, True), ["finetune", "--resume", str(out)]).returncode < 0
    assert call("finetune", "--resume", out) == 0
    assert_the_same_run(whole(method), out)


@pytest.mark.parametrize(("method", "name", "code"), [("mezo", "SIGTERM", 143), ("adam", "SIGINT", 130)])
def test_a_signal_ends_a_run_at_the_next_step_and_says_how_to_go_on(
    whole: Callable[[str], Path], model_dir: Path, tuner_dir: Path, tmp_path: Path, name: str, code: int, method: str
) -> None:
    out = tmp_path / "out"
    argv = argv_of(quick(model_dir, out, **options_of(method, tuner_dir)))
    done = killed(("training", "module.Training", "_step", 7, True), ["finetune", *argv], by=name)
    assert done.returncode == code
    assert f"stopped by {name} after step 7 of {STEPS}; to go on: zotuner finetune --resume {out}" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(read_rows(out / "metrics.jsonl")) == 7
    assert (out / "snapshots" / "step-00000007").is_dir()
    assert call("finetune", "--resume", out) == 0
    assert_the_same_run(whole(method), out)


def test_a_signal_ends_an_evaluation_too(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = killed(("finetune", "module", "evaluate", 1, True), ["finetune", *argv_of(quick(model_dir, out))], "SIGTERM")
    assert done.returncode == 143
    assert "before the first step" in done.stderr


@pytest.mark.parametrize("place", [3, 5], ids=["within the run", "the last one"])
def test_an_evaluation_that_a_signal_ended_is_made_when_the_run_goes_on(
    whole: Callable[[str], Path], model_dir: Path, tuner_dir: Path, tmp_path: Path, place: int
) -> None:
    out = tmp_path / "out"
    argv = argv_of(quick(model_dir, out, **options_of("mezo", tuner_dir)))
    done = killed(("finetune", "module", "evaluate", place, True), ["finetune", *argv], by="SIGTERM")
    assert done.returncode == 143
    assert call("finetune", "--resume", out) == 0
    assert_the_same_run(whole("mezo"), out)


class Killed(BaseException):
    """In place of a signal, where the process of the tests is to go on."""


def test_a_run_that_ends_sooner_when_it_goes_on_delivers_the_best_weights_of_the_steps_it_took(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First-order steps are taken again from the snapshot after 5; by then the best evaluation was that after 8."""
    seconds, dev = {"a step": 1.0}, {4: 0.5, 8: 0.1}
    evaluate, after = training._Dev._evaluate, training.Training._after_step

    def evaluated(self: Any, step: int) -> Any:
        found = evaluate(self, step)
        return replace(found, figures={**found.figures, "loss": dev.get(step, 1.0)})

    def dies(self: Any) -> None:
        after(self)
        if self.totals.steps == 9:
            raise Killed

    def clock() -> Iterator[float]:
        now = 0.0
        while True:
            yield now
            now += seconds["a step"]

    monkeypatch.setattr(training._Dev, "_evaluate", evaluated)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=clock().__next__))
    options = {**options_of("adam", tmp_path), "max_seconds": 50}
    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_after_step", dies)
        with pytest.raises(Killed):
            call("finetune", *argv_of(quick(model_dir, tmp_path / "out", **options)))
    seconds["a step"] = 100.0
    assert call("finetune", "--resume", tmp_path / "out") == 0
    seconds["a step"] = 1.0
    assert call("finetune", *argv_of(quick(model_dir, tmp_path / "four", **{**options, "steps": 4}))) == 0
    ended, four = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("out", "four"))
    assert (ended["steps"], ended["dev"]["best"]["step"]) == (6, 4)
    assert ended["weights_sha256"] == four["weights_sha256"]
    assert not list((tmp_path / "out").glob("best*"))


def test_a_budget_of_tokens_ends_a_run_after_the_step_that_reaches_it(
    whole: Callable[[str], Path], model_dir: Path, tuner_dir: Path, tmp_path: Path
) -> None:
    out, steps = tmp_path / "out", 6
    rows = read_rows(whole("mezo") / "metrics.jsonl")
    argv = argv_of(quick(model_dir, out, **options_of("mezo", tuner_dir), max_tokens=rows[steps - 1]["tokens"] - 1))
    assert killed(("training", "module.Ledger", "write", 4, False), ["finetune", *argv]).returncode < 0
    assert call("finetune", "--resume", out) == 0
    assert timeless(read_rows(out / "metrics.jsonl")) == timeless(rows[:steps])
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["dev"]["last"]["loss"]) == (steps, read_rows(out / "evals.jsonl")[-1]["loss"])
    assert [row["step"] for row in read_rows(out / "evals.jsonl")] == [0, 4, steps]


def test_scales_are_kept_ever_more_rarely_where_the_steps_are_not_known(
    whole: Callable[[str], Path], model_dir: Path, tuner_dir: Path, tmp_path: Path
) -> None:
    out, rows = tmp_path / "out", read_rows(whole("zo-finetuner") / "metrics.jsonl")
    budget = {"steps": 1_000_000, "eval_every": 1_000_000, "max_tokens": 72 * rows[-1]["tokens"] // len(rows)}
    argv = argv_of(quick(model_dir, out, **options_of("zo-finetuner", tuner_dir) | budget))
    assert killed(("training", "module.Ledger", "write", 40, False), ["finetune", *argv]).returncode < 0
    assert call("finetune", "--resume", out) == 0
    names, *scales = read_rows(out / "scales.jsonl")
    steps = len(read_rows(out / "metrics.jsonl"))
    assert steps > 66
    assert "blocks" in names
    assert [row["step"] for row in scales] == [*range(64), *range(64, steps, 2)]


def test_a_run_whose_seconds_are_used_up_takes_no_step_when_it_goes_on(model_dir: Path, tmp_path: Path) -> None:
    out, limit = tmp_path / "out", 0.03
    argv = argv_of(quick(model_dir, out, steps=10_000, eval_every=10_000, max_seconds=limit))
    assert killed(("finetune", "module", "restore_weights", 1, True), ["finetune", *argv]).returncode < 0
    seconds = [row["seconds"] for row in read_rows(out / "metrics.jsonl")]
    assert seconds[-1] >= limit
    assert all(before < limit for before in seconds[:-1])
    assert call("finetune", "--resume", out) == 0
    assert [row["seconds"] for row in read_rows(out / "metrics.jsonl")] == seconds


@contextmanager
def going_on(argv: list[str], out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run in a process of its own that has taken three steps, and is killed in the end."""
    run = subprocess.Popen([sys.executable, "-m", "zotuner", "finetune", *argv], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: steps_of(out) >= 3)
        yield run
        assert run.poll() is None
    finally:
        os.kill(run.pid, signal.SIGKILL)
        run.wait()


def steps_of(out: Path) -> int:
    """How many steps the ledger of a run has."""
    return len(read_ledger(out / "ledger.bin")[1]) if (out / "ledger.bin").exists() else 0


def wait_for(what: Callable[[], bool]) -> None:
    """Returns when it is so."""
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal here")
def test_sigusr1_asks_for_a_snapshot_and_the_run_goes_on(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = argv_of(quick(model_dir, out, steps=100_000, eval_every=100_000, save_every=100_000))
    with going_on(argv, out) as run:
        assert not (out / "snapshots").exists()
        os.kill(run.pid, signal.SIGUSR1)
        wait_for(lambda: bool(list(out.glob("snapshots/step-*"))))
        taken = steps_of(out)
        wait_for(lambda: steps_of(out) > taken)
    (snapshot,) = out.glob("snapshots/step-*")
    assert json.loads((snapshot / "state.json").read_text())["totals"]["steps"] >= 3


def test_the_last_two_snapshots_are_kept_until_the_run_ends(model_dir: Path, tuner_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = options_of("mezo", tuner_dir) | {"save_every": 2}
    step = ("training", "module.Training", "_step", 10, True)
    killed(step, ["finetune", *argv_of(quick(model_dir, out, **options))])
    assert sorted(path.name for path in (out / "snapshots").iterdir()) == ["step-00000006", "step-00000008"]
    assert call("finetune", "--resume", out) == 0
    assert not (out / "snapshots").exists()


def test_a_finished_run_is_left_as_it_is(whole: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = whole("mezo")
    before = (out / "summary.json").read_bytes()
    assert call("finetune", "--resume", out) == 0
    assert "this run is finished" in capsys.readouterr().err
    assert (out / "summary.json").read_bytes() == before


@pytest.fixture
def stopped(model_dir: Path, tmp_path: Path) -> Path:
    """A run that was killed at its third step."""
    out = tmp_path / "stopped"
    step = ("training", "module.Training", "_step", 3, True)
    killed(step, ["finetune", *argv_of(quick(model_dir, out))])
    assert not (out / "summary.json").exists()
    return out


def test_resume_takes_no_other_options(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("finetune", "--resume", stopped, "--lr", "1", "--batch-size", "3") == 2
    assert "leave out --lr, --batch-size" in assert_one_error_line(capsys.readouterr().err)


def test_there_must_be_a_run_to_go_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("finetune", "--resume", tmp_path / "none") == 2
    assert "expected a run to go on with" in assert_one_error_line(capsys.readouterr().err)


def test_a_run_does_not_go_on_from_other_weights(
    stopped: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load_model(model_dir)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    config = (stopped / "config.yaml").read_text().replace(str(model_dir), str(tmp_path / "other"))
    (stopped / "config.yaml").write_text(config)
    assert call("finetune", "--resume", stopped) == 2
    assert "begun with the model's weights (SHA-256)" in assert_one_error_line(capsys.readouterr().err)


def test_damage_in_the_midst_of_a_ledger_is_told_with_its_offset(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray((stopped / "ledger.bin").read_bytes())
    data[-40] ^= 1
    (stopped / "ledger.bin").write_bytes(data)
    assert call("finetune", "--resume", stopped) == 2
    assert f"damaged at offset {len(data) - 48}" in assert_one_error_line(capsys.readouterr().err)


def test_a_run_has_one_writer_and_a_dead_ones_claim_is_taken_over(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = argv_of(quick(model_dir, out, steps=100_000, eval_every=100_000))
    with going_on(argv, out) as first:
        for words in (["--resume", str(out)], [*argv, "--overwrite"]):
            assert call("finetune", *words) == 2
            assert f"process {first.pid} is writing to it" in assert_one_error_line(capsys.readouterr().err)
    assert (out / ".lock").exists()  # left by the dead
    assert call("finetune", *argv_of(quick(model_dir, out)), "--overwrite") == 0


META = {
    "in an outer step": ("meta", "module.MetaTrainer", "update", 5, True),
    "after an outer step": ("meta", "module.MetaTrainer", "update", 6, False),
    "in a first-order step": ("trajectory", "module.Walk", "_step", 4, True),
    "before a snapshot": ("meta_train", "module", "take", 2, True),
    "after a snapshot": ("meta_train", "module", "take", 2, False),
    "before any snapshot": ("meta", "module.MetaTrainer", "update", 2, True),
    "before the tuner": ("meta_train", "module.Tuner", "save_pretrained", 1, True),
}
META_OPTIONS = {"steps": 8, "reset_every": 3, "meta_loss": "expected", "bands": 2, "settle": 1}


@pytest.fixture(scope="module")
def meta_whole(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A meta-training that nothing disturbed."""
    out = tmp_path_factory.mktemp("meta") / "whole"
    assert call("meta-train", *argv_of(quick_meta(model_dir, out, **META_OPTIONS))) == 0
    return out


def assert_the_same_tuner(one: Path, other: Path) -> None:
    assert (other / "tuner.safetensors").read_bytes() == (one / "tuner.safetensors").read_bytes()
    for name in ("tuner.json", "points.safetensors"):
        assert (other / name).read_bytes() == (one / name).read_bytes()
    for name in ("metrics.jsonl", "trajectory/points.jsonl"):
        assert timeless(read_rows(other / name)) == timeless(read_rows(one / name))
    assert sorted(path.name for path in other.rglob("*")) == sorted(path.name for path in one.rglob("*"))


@pytest.mark.parametrize(
    ("place", "every"),
    [*((name, 2) for name in META), ("in an outer step", None), ("before the tuner", None)],
)
def test_a_meta_training_killed_anywhere_ends_with_the_same_tuner(
    meta_whole: Path, model_dir: Path, tmp_path: Path, place: str, every: int | None
) -> None:
    out = tmp_path / "out"
    argv = argv_of(quick_meta(model_dir, out, **META_OPTIONS, save_every=every))
    assert killed(META[place], ["meta-train", *argv]).returncode == -signal.SIGKILL
    assert call("meta-train", "--resume", out) == 0
    assert_the_same_tuner(meta_whole, out)


def test_the_nets_learn_at_the_end_of_each_round(meta_whole: Path) -> None:
    spread = [row["sigma_log_std"] for row in read_rows(meta_whole / "metrics.jsonl")]
    assert [x > 0 for x in spread] == [False] * 3 + [True] * 5


def test_a_meta_training_by_the_papers_meta_loss_goes_on_with_the_same_bits(model_dir: Path, tmp_path: Path) -> None:
    """Its nets learn at each point, so that Adam's moments count."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = {**META_OPTIONS, "meta_loss": "sampled", "save_every": 2}
    assert call("meta-train", *argv_of(quick_meta(model_dir, whole, **options))) == 0
    killing = killed(META["in an outer step"], ["meta-train", *argv_of(quick_meta(model_dir, out, **options))])
    assert killing.returncode == -signal.SIGKILL
    assert call("meta-train", "--resume", out) == 0
    for name in ("tuner.safetensors", "tuner.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert timeless(read_rows(out / "metrics.jsonl")) == timeless(read_rows(whole / "metrics.jsonl"))


def test_a_signal_ends_a_meta_training_at_the_next_step(meta_whole: Path, model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = argv_of(quick_meta(model_dir, out, **META_OPTIONS))
    done = killed(("meta", "module.MetaTrainer", "update", 5, True), ["meta-train", *argv], by="SIGTERM")
    assert done.returncode == 143
    assert f"after step 5 of 8; to go on: zotuner meta-train --resume {out}" in done.stderr
    assert len(read_rows(out / "metrics.jsonl")) == 5
    assert call("meta-train", "--resume", out) == 0
    assert_the_same_tuner(meta_whole, out)
