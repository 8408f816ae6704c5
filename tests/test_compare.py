"""`zotuner compare`: plans at equal budgets, real processes that are killed and go on, figures checked by hand."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from test_cli import assert_one_error_line, call

from zotuner.compare.charts import _draw_curves, mean_curve
from zotuner.compare.children import last_words
from zotuner.compare.figures import Wins, first_reach
from zotuner.compare.plan import Planned, expand
from zotuner.compare.results import Results, _colors, collect, page, tables_of, write
from zotuner.compare.spec import Comparison
from zotuner.compare.state import Note, Point, check_same, read_note, read_status, write_note
from zotuner.compare.tables import cells, duration, headings, plan_table, seconds_left, standing_cells
from zotuner.compare.work import Bar
from zotuner.config import DEFAULT_LR, FinetuneConfig
from zotuner.errors import ZotunerError
from zotuner.files import locked, writer
from zotuner.ledger import Record, read_ledger, write_ledger
from zotuner.metrics import read_rows
from zotuner.progress import Display

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "configs" / "compare").glob("*.yaml"))
SPEC: dict[str, Any] = {
    "model": "m",
    "budget": {"forwards": 100},
    "tasks": ["sst2", {"task": "copa", "max_length": 64}],
    "methods": {
        "mezo": {"lr": [1e-5, 2e-5, 4e-5]},
        "fzoo": {"lr": ["1e-3"], "num_perturbations": 8},
        "fzoo-4": {"method": "fzoo", "lr": 1e-3, "num_perturbations": "4"},
        "adam": {},
        "none": None,
    },
    "seeds": [0, 7],
    "defaults": {"noise": "rademacher", "evaluations": 5},
}


def yaml_file(folder: Path, **changes: Any) -> Path:
    """A comparison's file: `SPEC` with some of its keys replaced, or left out where they are None."""
    path = folder / "compare.yaml"
    content = {key: value for key, value in {**SPEC, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def planned(file: Path, out: Path) -> list[Planned]:
    """The runs of a file."""
    return expand(Comparison.read(file), file, out)


# ------------------------------------------------------------------------------------------------------------ the file


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sead": 1}, "unknown key 'sead'; did you mean 'seeds'?"),
        ({"model": None}, "model is required"),
        ({"budget": {"forward": 3}}, "budget: unknown key 'forward'; did you mean 'forwards'?"),
        (
            {"budget": {"forwards": 3, "tokens": 4}},
            "budget: expected one of forwards, tokens, seconds, got forwards: 3",
        ),
        ({"budget": {}}, "budget: expected one of forwards, tokens, seconds, got none"),
        ({"budget": {"forwards": 8}}, "budget: 8 forwards do not hold one step of fzoo, which takes 9"),
        ({"budget": {"forwards": 0}}, "budget.forwards: input should be greater than or equal to 1, got 0"),
        ({"tasks": ["sst22"]}, "tasks: unknown task 'sst22'; did you mean 'sst2'?"),
        ({"tasks": ["copa", "copa"]}, "tasks: expected each task once, got copa, copa"),
        (
            {"tasks": [{"task": "copa", "max_lenght": 3}]},
            "tasks.0: unknown option 'max_lenght'; did you mean 'max_length'?",
        ),
        (
            {"tasks": [{"task": "copa", "max_length": 1}]},
            "tasks.copa.max_length: input should be greater than or equal",
        ),
        ({"tasks": [{"max_length": 9}]}, "tasks.0.task: input should be a valid string, got None"),
        (
            {"tasks": [{"task": "copa", "budget": 0.5}]},
            "tasks.copa.budget: expected whole forwards, got 0.5",
        ),
        (
            {"tasks": [{"task": "copa", "budget": 8}]},
            "tasks.copa.budget: 8 forwards do not hold one step of fzoo, which takes 9",
        ),
        ({"methods": {"mezzo": {}}}, "methods.mezzo: unknown method 'mezzo'; did you mean 'mezo'?"),
        ({"methods": {"a/b": {"method": "mezo"}}}, "expected a name of letters, digits and . _ + -, got 'a/b'"),
        (
            {"methods": {"mezo": {"lr": [1e-3, "1e-3"]}}},
            "methods.mezo.lr: expected values that differ, got 0.001, 0.001",
        ),
        ({"methods": {"mezo": {"lr": "high"}}}, "methods.mezo.lr.0: input should be a valid number"),
        ({"methods": {"mezo": {"steps": 3}}}, "methods.mezo: option 'steps' follows from budget; leave it out here"),
        ({"methods": {"mezo": {"eps": -1}}}, "methods.mezo.eps: input should be greater than 0, got -1"),
        ({"methods": {"none": {"lr": 1}}}, "methods.none.lr: method none has no learning rate"),
        ({"methods": {"zo-finetuner": {}}}, "methods.zo-finetuner: method zo-finetuner needs --tuner"),
        ({"methods": {"mezo": {"eval_every": 3}}}, "methods.mezo: expected evaluations or eval_every, got both"),
        ({"defaults": {"evaluations": 0}}, "defaults: evaluations: expected a whole number of at least 1, got 0"),
        ({"defaults": {"dtype": "float8"}}, "defaults.dtype: input should be 'float32', "),
        ({"baseline": "mezzo"}, "baseline: unknown method 'mezzo'; did you mean 'mezo'?"),
        ({"seeds": [1, 1]}, "seeds: expected values that differ, got 1, 1"),
        ({"budget": {"seconds": 9}}, "methods.mezo: needs eval_every, and no evaluations"),
        (
            {"budget": {"tokens": 9}, "defaults": {"eval_every": 2, "lr_schedule": "linear"}},
            "methods.mezo: lr_schedule linear needs a budget of forwards",
        ),
    ],
)
def test_a_wrong_file_is_told_in_one_line_with_its_name_and_key(
    tmp_path: Path, changes: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = yaml_file(tmp_path, **changes)
    assert call("compare", file, "--out", tmp_path / "out") == 2
    line = assert_one_error_line(capsys.readouterr().err)
    assert f"{file}: " in line
    assert says in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", SHIPPED, ids=[file.name for file in SHIPPED])
def test_a_shipped_comparison_plans_runs_whose_options_read_back_the_same(file: Path, tmp_path: Path) -> None:
    runs = planned(file, tmp_path)
    assert runs
    for run in runs:
        (tmp_path / "config.yaml").write_text(run.config.to_yaml())
        assert FinetuneConfig.read(tmp_path / "config.yaml", {}) == run.config
        tuner = run.config.tuner  # one that is there, or one that the file says how to make
        assert tuner is None or (ROOT / tuner).is_dir() or f"--out {tuner}" in file.read_text()


def test_there_is_a_shipped_comparison() -> None:
    assert SHIPPED


# ------------------------------------------------------------------------------------------------------------ the plan


def test_every_run_has_the_same_budget_of_forwards_in_whole_steps(tmp_path: Path) -> None:
    runs = planned(yaml_file(tmp_path), tmp_path / "out")
    steps = {run.method: run.config.steps for run in runs}
    assert steps == {"mezo": 50, "fzoo": 11, "fzoo-4": 20, "adam": 100, "none": 0}
    assert {run.method: run.cost for run in runs} == {"mezo": 100, "fzoo": 99, "fzoo-4": 100, "adam": 100, "none": 0}
    assert {run.method: run.config.eval_every for run in runs if run.method != "none"} == {
        **{"mezo": 10, "fzoo": 3, "fzoo-4": 4, "adam": 20},
    }


def test_a_task_may_have_a_budget_of_its_own(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, tasks=["sst2", {"task": "copa", "budget": 40}], seeds=[0])
    runs = planned(file, tmp_path / "out")
    steps = {(run.task, run.method): run.config.steps for run in runs}
    assert (steps["sst2", "mezo"], steps["copa", "mezo"], steps["copa", "fzoo"]) == (50, 20, 4)
    assert {run.config.eval_every for run in runs if (run.task, run.method) == ("copa", "mezo")} == {4}
    spec = Comparison.read(file)
    assert (spec.budgets, str(spec.budget_of("copa"))) == ("40 to 100 forwards", "40 forwards")


def test_a_task_of_ones_own_may_lie_in_another_folder_and_goes_by_its_files_name(tmp_path: Path) -> None:
    source = str(Path(__file__).parent / "own" / "reviews.yaml")
    file = yaml_file(tmp_path, tasks=["sst2", {"task": source, "budget": 50}], methods={"mezo": {}})
    runs = [run for run in planned(file, tmp_path / "out") if run.task == "reviews.yaml"]
    assert {run.config.task for run in runs} == {source}
    assert {run.folder.relative_to(tmp_path / "out").parts[:2] for run in runs} == {("runs", "reviews.yaml")}
    with pytest.raises(ZotunerError, match="expected each task once"):
        Comparison.read(yaml_file(tmp_path, tasks=["a/reviews.yaml", "b/reviews.yaml"]))


def test_a_task_may_have_a_factor_for_all_learning_rates(tmp_path: Path) -> None:
    methods = {"mezo": {"lr": [1e-5, 3e-5]}, "fzoo": {}, "none": {}}
    tasks = [{"task": "copa", "lr_factor": 0.1}, "sst2"]
    runs = planned(yaml_file(tmp_path, tasks=tasks, methods=methods, seeds=[0]), tmp_path / "out")
    rates = {task: [run.lr for run in runs if run.task == task] for task in ("sst2", "copa")}
    assert set(rates["sst2"]) == {1e-5, 3e-5, DEFAULT_LR["fzoo"], None}
    assert set(rates["copa"]) == {1e-6, 3e-6, DEFAULT_LR["fzoo"] / 10, None}
    assert all(run.config.lr == run.lr for run in runs)
    assert {run.folder.parent.name for run in runs if run.task == "copa"} >= {"lr-1e-06", "lr-3e-06"}


def test_the_first_runs_fill_the_table_then_the_grids_then_the_seeds(tmp_path: Path) -> None:
    runs = planned(yaml_file(tmp_path), tmp_path / "out")
    assert [(run.task, run.method, run.lr) for run in runs[:5]] == [
        *[("sst2", "mezo", 2e-5), ("sst2", "fzoo", 1e-3), ("sst2", "fzoo-4", 1e-3)],
        *[("sst2", "adam", 1e-5), ("sst2", "none", None)],
    ]
    assert {run.task for run in runs[5:10]} == {"copa"}
    assert [(run.task, run.lr) for run in runs[10:14]] == [
        (task, lr) for lr in (1e-5, 4e-5) for task in ("sst2", "copa")
    ]
    assert [run.seed for run in runs] == [0] * 14 + [7] * 14
    assert len({run.folder for run in runs}) == len(runs)
    assert runs[0].folder == tmp_path / "out" / "runs" / "sst2" / "mezo" / "lr-2e-05" / "seed-0"


def test_options_of_a_method_win_over_those_of_its_task_and_these_over_the_defaults(tmp_path: Path) -> None:
    tasks = [{"task": "copa", "eps": 2e-3, "batch_size": 3}]
    file = yaml_file(tmp_path, tasks=tasks, methods={"mezo": {"eps": 3e-3}}, defaults={"batch_size": 2, "clip": 4})
    config = planned(file, tmp_path)[0].config
    assert (config.eps, config.batch_size, config.clip) == (3e-3, 3, 4.0)


@pytest.mark.parametrize(("unit", "amount"), [("tokens", 5000), ("seconds", 2.5)])
def test_a_budget_of_tokens_or_seconds_is_left_to_the_run(tmp_path: Path, unit: str, amount: float) -> None:
    file = yaml_file(tmp_path, budget={unit: amount}, defaults={"eval_every": 3}, methods={"mezo": None, "none": None})
    run, none, *_ = planned(file, tmp_path)
    assert getattr(run.config, f"max_{unit}") == amount
    assert run.config.steps >= 100_000
    assert (run.cost, none.cost, run.config.eval_every) == (amount, 0, 3)


# --------------------------------------------------------------------------------------------------- figures, by hand


def write_run(
    run: Planned, losses: Sequence[float | None], test: float = 0.5, accuracy: float = 0.6, **final: float
) -> None:
    """A finished run whose loss on dev was `losses`, evenly over 100 forwards, the starting weights first."""
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(run.config.to_yaml())
    each = 100 // max(1, len(losses) - 1)
    rows = [
        {"step": n * each // 2, "forwards": n * each, "tokens": n * 10, "seconds": n * 2.0, "loss": loss}
        for n, loss in enumerate(losses)
    ]
    (run.folder / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = [row for row in rows[1:] if row["loss"] is not None]
    best = min(known, key=lambda row: row["loss"], default=None)
    summary = {
        **{"model": "m", "task": run.task, "method": run.config.method, "steps": 50, "forwards": 100, "tokens": 10},
        **{
            "lr": run.config.lr,
            "seconds": 30.0 + run.seed,
            "peak_rss_bytes": (1 + run.seed) << 30,
            "examples": {"test": 96},
        },
        "zero_shot": {"loss": 0.9, "accuracy": 0.5},
        "final": {"loss": test, "accuracy": accuracy, **final},
        "dev": best and {"best": {"step": best["step"], "loss": best["loss"]}},
        "versions": {"torch": "9.9"},
    }
    (run.folder / "summary.json").write_text(json.dumps(summary))
    write_note(run, Note(100.0, 0, "", ("abc1234",)))


TWO = {"mezo": {"lr": [1e-5, 2e-5, 4e-5]}, "fzoo": {"lr": [1e-3, 2e-3, 4e-3]}}


@pytest.fixture
def compared(tmp_path: Path) -> tuple[Path, list[Planned]]:
    """One task, two methods, two seeds: mezo is best at 2e-5, fzoo at its largest lr."""
    file = yaml_file(tmp_path, tasks=["sst2"], methods=TWO, seeds=[0, 1])
    runs = planned(file, tmp_path / "out")
    level = {1e-5: 0.1, 2e-5: 0.0, 4e-5: 0.2, 1e-3: 0.2, 2e-3: 0.1, 4e-3: 0.0}
    for run in runs:
        up = level[run.lr or 0.0]
        if run.method == "mezo":
            curve = [1.0, 0.8 + up, 0.6 + up + 0.1 * run.seed]
            write_run(run, curve, test=0.50 + up, accuracy=0.60 + 0.1 * run.seed)
        else:
            curve = [1.0, 0.5 + up, 0.55 + up]
            write_run(run, curve, test=0.40 + up, accuracy=0.75)
    return file, runs


def results_of(compared: tuple[Path, list[Planned]]) -> Results:
    """What the runs say."""
    return collect(Comparison.read(compared[0]), compared[1])


def test_the_lr_has_the_lowest_mean_dev_loss_and_an_edge_is_marked(compared: Any) -> None:
    results = results_of(compared)
    mezo, fzoo = results.rows
    assert (mezo.lr, mezo.edge, fzoo.lr, fzoo.edge) == (2e-5, "", 4e-3, "highest")
    assert [tried.dev.mean for tried in mezo.tried] == pytest.approx([0.75, 0.65, 0.85])
    assert "warning: sst2: the lr of fzoo, 0.004, is the highest of its grid, which is too narrow" in results.remarks
    assert sum("warning" in remark for remark in results.remarks) == 1


def test_the_figures_of_the_table_are_those_computed_by_hand(compared: Any) -> None:
    results = results_of(compared)
    mezo, fzoo = results.rows
    assert (mezo.dev.mean, mezo.dev.std) == pytest.approx((0.65, 0.5 * 0.1 * 2**0.5))
    assert mezo.metrics["accuracy"].mean == pytest.approx(0.65)
    assert mezo.metrics["accuracy"].error == pytest.approx((0.65 * 0.35 / 96) ** 0.5)
    # mezo reaches its own loss at the end; fzoo falls from 1 to 0.5 over 50 forwards: 0.6 after 40, 0.7 after 30
    assert (mezo.reach.share, mezo.speedup) == pytest.approx((1.0, 1.0))
    assert (fzoo.reach.share, fzoo.reach.at_least, fzoo.speedup) == pytest.approx((0.35, False, 1 / 0.35))
    assert (fzoo.peak_bytes, fzoo.seconds) == (2 << 30, 30.5)
    spec = results.spec
    assert headings(spec, results.rows) == [
        *("method", "lr", "seeds", "dev loss", "test loss", "- mezo's", "training - mezo's"),
        *("accuracy", "to mezo's", "its end", "GiB", "sec"),
    ]
    assert cells(spec, fzoo, 12) == [
        *("fzoo", "0.004 (edge)", "2/2", "0.5000 ± 0.0000", "0.4000 ± 0.0000", "", ""),
        *("0.750 ± 0.000 (0.044)", "0.35", "0.35", "2.00", "30"),
    ]
    (standing,) = results.standings
    assert [standing.dev, standing.training, standing.test, standing.metric] == [
        *(Wins(1, 1), Wins(0, 0), Wins(1, 1), Wins(1, 1))
    ]
    assert (standing.speedup, standing.speedup_tasks, standing.at_most) == (pytest.approx(1 / 0.35), 1, False)
    assert standing_cells(standing) == ["fzoo", "1/1", "", "1/1", "1/1", "2.86x", "1", "0.35", "1"]


def test_losses_have_errors_and_are_compared_example_by_example(compared: Any) -> None:
    theirs = {0: [1.0, 2.0, 6.0], 1: [2.0, 2.0, 2.0]}
    ours = {0: [0.5, 1.5, 5.8], 1: [1.0, 2.0, 3.0]}
    for run in compared[1]:
        if run.lr in (2e-5, 4e-3):
            losses = (theirs if run.method == "mezo" else ours)[run.seed]
            (run.folder / "predictions.jsonl").write_text("".join(json.dumps({"loss": x}) + "\n" for x in losses))
            rows = read_rows(run.folder / "evals.jsonl")
            text = "".join(json.dumps({**row, "loss_error": row["step"] / 1000}) + "\n" for row in rows)
            (run.folder / "evals.jsonl").write_text(text)
    results = results_of(compared)
    mezo, fzoo = results.rows
    assert mezo.gap is None
    # differences 0: -0.5, -0.5, -0.2; 1: -1, 0, 1
    assert fzoo.gap.mean == pytest.approx((-0.4 + 0.0) / 2)
    assert fzoo.gap.error == pytest.approx((0.1 + 3**-0.5) / 2)
    assert mezo.test.error == pytest.approx(((7 / 3) ** 0.5 + 0.0) / 2)
    best = [point.step for status in results.statuses if status.planned.lr == 4e-3 for point in status.curve[1:2]]
    assert fzoo.dev.error == pytest.approx(best[0] / 1000)
    assert f"(0.{1000 * (0.1 + 3**-0.5) / 2 / 100:.0f}"[:4] in cells(results.spec, fzoo, 12)[5]


def write_losses(run: Planned, losses: Sequence[Sequence[float]]) -> None:
    """A ledger with these losses of each step."""
    records = [Record(step, 1e-5, tuple(each)) for step, each in enumerate(losses)]
    write_ledger(run.folder / "ledger.bin", {"losses": len(losses[0])}, records)


def test_training_losses_are_compared_step_by_step(tmp_path: Path) -> None:
    methods = {
        **{name: {"method": "mezo", "lr": 1e-5} for name in ("mezo", "better")},
        "other-batches": {"method": "mezo", "lr": 1e-5, "batch_size": 4},
        "other-dev": {"method": "mezo", "lr": 1e-5, "dev_size": 50},
        "more-losses": {"method": "fzoo", "lr": 1e-3, "num_perturbations": 2},
        "adam": {"lr": 1e-6},
    }
    file = yaml_file(tmp_path, tasks=["sst2"], methods=methods, seeds=[0, 1])
    losses = {
        "mezo": [[1.0, 2.0], [2.0, 3.0], [3.0, 4.0]],
        "better": [[1.0, 1.0], [float("nan"), 3.0], [3.0, 3.0]],
        "other-batches": [[0.0, 0.0]] * 3,
        "other-dev": [[0.0, 0.0]] * 3,
        "more-losses": [[0.0, 0.0, 0.0]] * 3,
    }
    for run in (runs := planned(file, tmp_path / "out")):
        write_run(run, [1.0, 0.5])
        if run.method in losses:
            write_losses(run, [[x + run.seed * (run.method == "better") for x in each] for each in losses[run.method]])
    results = results_of((file, runs))
    mezo, better, *others = results.rows
    assert [row.training for row in (mezo, *others)] == [None] * 5
    # differences 0: -0.5, -0.5; 1: 0.5, 0.5; a step that failed says nothing
    assert (better.training.mean, better.training.error) == pytest.approx((0.0, 0.0))
    assert better.training.std == pytest.approx(0.5 * 2**0.5)
    assert [standing.training for standing in results.standings] == [Wins(0, 1), *[Wins(0, 0)] * 4]
    assert better.training_parts == ()  # fewer steps than parts


def test_training_losses_are_compared_over_the_run_and_drawn(tmp_path: Path) -> None:
    methods = {name: {"method": "mezo", "lr": 1e-5} for name in ("mezo", "better")}
    file = yaml_file(tmp_path, tasks=["sst2"], methods=methods, seeds=[0, 1])
    for run in (runs := planned(file, tmp_path / "out")):
        write_run(run, [1.0, 0.5])
        down = (run.method == "better") * (1 + run.seed) / 100
        write_losses(run, [[2.0 - down * (step // 3)] for step in range(30)])
    results = results_of((file, runs))
    better = results.rows[1]
    assert [part.mean for part in better.training_parts] == pytest.approx([-0.015 * k for k in range(10)], abs=1e-6)
    assert better.training.mean == pytest.approx(-0.015 * 4.5, abs=1e-6)
    # steps of a part are alike: ten values, and no thirty, tell the mean
    assert better.training.error == pytest.approx(0.015 * stdev(range(10)) / 10**0.5, abs=1e-6)
    write(results, tmp_path, jobs=1)
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_methods_that_draw_other_examples_or_maximise_a_reward_are_not_compared_by_losses(tmp_path: Path) -> None:
    methods = {
        **{"mezo": {"lr": 1e-5}, "same": {"method": "mezo", "lr": 1e-5}},
        "few": {"method": "mezo", "lr": 1e-5, "k_shot": 4},
        "fewer-tests": {"method": "mezo", "lr": 1e-5, "eval_size": 60},
        "reward": {"method": "mezo", "lr": 1e-5, "objective": "accuracy"},
        "short": {"method": "mezo", "lr": 1e-5, "max_length": 32},
        "none": {},
    }
    file = yaml_file(tmp_path, tasks=["sst2"], methods=methods, seeds=[0])
    for run in (runs := planned(file, tmp_path / "out")):
        better = run.method != "mezo"
        write_run(
            run, [1.0] if run.method == "none" else [1.0, 0.8 - 0.2 * better], 0.5 - better * 0.1, 0.6 + better * 0.1
        )
        if run.method != "none":
            write_losses(run, [[0.9 - 0.3 * better] * 2] * 3)
        (run.folder / "predictions.jsonl").write_text('{"loss": 0.5}\n' * 3)
    results = results_of((file, runs))
    won, not_known = Wins(1, 1), Wins(0, 0)
    assert {s.method: (s.dev, s.training, s.test, s.metric, s.speedup_tasks) for s in results.standings} == {
        "same": (won, won, won, won, 1),
        "few": (not_known, not_known, not_known, not_known, 0),
        "fewer-tests": (not_known, not_known, not_known, not_known, 0),
        "reward": (not_known, not_known, not_known, won, 0),
        "short": (won, not_known, won, won, 1),
        "none": (not_known, not_known, won, won, 0),
    }
    assert [row.gap is None for row in results.rows] == [True, False, True, True, True, False, False]
    assert "sst2: few draws other examples than mezo, by its k_shot: not compared" in results.remarks
    kinds = "sst2: reward has another objective than mezo, so that their losses are of two kinds: not compared"
    assert kinds in results.remarks


def test_wins_are_judged_by_the_seeds_that_both_have(tmp_path: Path) -> None:
    methods = {"mezo": {"lr": 1e-5}, "fzoo": {"lr": 1e-3}}
    file = yaml_file(tmp_path, tasks=["sst2"], methods=methods, seeds=[0, 1])
    for run in (runs := planned(file, tmp_path / "out")):
        if run.method == "mezo":  # seed 1's examples are harder
            write_run(run, [1.0, 0.5 + 0.3 * run.seed], test=0.5 + 0.3 * run.seed, accuracy=0.7 - 0.2 * run.seed)
        elif run.seed == 0:
            write_run(run, [1.0, 0.6], test=0.6, accuracy=0.65)
    (standing,) = results_of((file, runs)).standings
    assert [standing.dev, standing.test, standing.metric] == [Wins(0, 1)] * 3


def test_a_metric_of_ones_own_may_be_called_accuracy_and_be_no_share(tmp_path: Path) -> None:
    run = planned(file := yaml_file(tmp_path, tasks=["sst2"], methods={"mezo": {"lr": 1e-5}}, seeds=[0]), tmp_path)[0]
    write_run(run, [1.0, 0.5], accuracy=75.0)
    assert results_of((file, [run])).rows[0].metrics["accuracy"].error is None


def test_backward_passes_that_are_not_counted_are_told_of_every_first_order_method(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, tasks=["sst2"], methods={"mezo": {}, "sgd": {}}, seeds=[0])
    assert any(
        "a step of sgd counts as one" in remark for remark in results_of((file, planned(file, tmp_path))).remarks
    )


def test_a_zero_shot_evaluation_may_be_left_out_of_a_comparison_that_was_begun_with_it(tmp_path: Path) -> None:
    run = planned(yaml_file(tmp_path), tmp_path / "out")[0]
    write_run(run, [1.0, 0.5])
    later = planned(yaml_file(tmp_path, defaults={**SPEC["defaults"], "zero_shot": False}), tmp_path / "out")[0]
    check_same(later, tmp_path / "compare.yaml")


def test_the_speed_up_is_a_geometric_mean_over_tasks_and_a_bound_where_a_run_never_came_there(tmp_path: Path) -> None:
    methods = {"mezo": {"lr": 1e-5}, "fzoo": {"lr": 1e-3}}
    runs = planned(file := yaml_file(tmp_path, tasks=["sst2", "copa"], methods=methods, seeds=[0]), tmp_path / "out")
    curves = {
        ("sst2", "mezo"): [1.0, 0.9, 0.8],
        ("sst2", "fzoo"): [1.0, 0.6, 0.6],  # 0.8 after 25
        ("copa", "mezo"): [1.0, 0.9, 0.5],
        ("copa", "fzoo"): [1.0, 0.9, 0.9],  # never 0.5
    }
    for run in runs:
        write_run(run, curves[run.task, run.method])
    results = collect(Comparison.read(file), runs)
    never = results.rows[3]
    assert (never.reach.share, never.reach.at_least) == (1.0, True)
    assert cells(results.spec, never, 12)[8] == ">1"
    (standing,) = results.standings
    assert (standing.speedup, standing.at_most) == (pytest.approx((4 * 1) ** 0.5), True)
    assert (standing.test, standing.metric) == (Wins(0, 2), Wins(0, 2))  # equal on test
    assert any("mezo has one lr, 1e-05: nothing was chosen" in remark for remark in results.remarks)


def test_the_baselines_last_loss_may_be_reached_sooner_than_its_best(tmp_path: Path) -> None:
    methods = {"mezo": {"lr": 1e-5}, "fzoo": {"lr": 1e-3}}
    tasks = ["sst2", "copa", "rte"]
    runs = planned(file := yaml_file(tmp_path, tasks=tasks, methods=methods, seeds=[0]), tmp_path / "out")
    curves = {
        ("sst2", "mezo"): [1.0, 0.6, 0.8],
        ("sst2", "fzoo"): [1.0, 0.6, 0.5],  # 0.8 after 25, 0.6 after 50
        ("copa", "mezo"): [1.0, 0.9, 0.5],
        ("copa", "fzoo"): [1.0, 0.9, 0.9],  # never
        ("rte", "mezo"): [1.0, 0.9, 1.1],  # its end is worse than its start
        ("rte", "fzoo"): [1.0, 0.8, 0.7],
    }
    for run in runs:
        write_run(run, curves[run.task, run.method])
    results = collect(Comparison.read(file), runs)
    ends, bests = (
        [x and x.share for x in of] for of in zip(*((r.reach_end, r.reach) for r in results.rows), strict=True)
    )
    assert ends == [*map(pytest.approx, (0.25, 0.25, 1.0, 1.0)), None, None]
    assert bests == pytest.approx([0.5, 0.5, 1.0, 1.0, 0.5, 0.25])
    (standing,) = results.standings
    assert (standing.end, standing.end_tasks, standing.end_at_least) == (pytest.approx(0.5), 2, True)
    assert standing_cells(standing)[-2:] == [">0.50", "2"]


def test_a_baseline_that_never_improved_is_no_measure(tmp_path: Path) -> None:
    runs = planned(file := yaml_file(tmp_path, tasks=["sst2"], methods=TWO, seeds=[0]), tmp_path / "out")
    for run in runs:
        write_run(run, [1.0, 1.2, 1.1] if run.method == "mezo" else [1.0, 0.5, 0.4])
    rows = collect(Comparison.read(file), runs).rows
    assert [(row.reach, row.speedup) for row in rows] == [(None, None)] * 2


def test_an_lr_that_failed_is_not_chosen_and_its_neighbour_is_no_edge(tmp_path: Path) -> None:
    runs = planned(file := yaml_file(tmp_path, tasks=["sst2"], methods=TWO, seeds=[0, 1]), tmp_path / "out")
    for run in runs:
        if run.method == "mezo" and run.lr == 4e-5 and run.seed == 1:
            write_note(Planned(run.task, run.method, run.lr, run.seed, run.config, run.cost), FAILED)
        elif run.method == "mezo":
            write_run(run, [1.0, {1e-5: 0.7, 2e-5: 0.6, 4e-5: 0.1}[run.lr or 0.0]])
    results = collect(Comparison.read(file), runs)
    assert (results.rows[0].lr, results.rows[0].edge) == (2e-5, "")
    assert [tried.failed for tried in results.rows[0].tried] == [0, 0, 1]
    assert "failed: sst2, mezo, lr 4e-05, seed 1: the loss was not finite" in results.remarks


def test_an_lr_that_failed_on_a_seed_that_others_have_not_run_is_not_chosen(tmp_path: Path) -> None:
    runs = planned(file := yaml_file(tmp_path, tasks=["sst2"], methods=TWO, seeds=[0, 1]), tmp_path / "out")
    for run in runs:
        if run.method == "mezo" and run.seed == 0:
            write_run(run, [1.0, {1e-5: 0.7, 2e-5: 0.6, 4e-5: 0.1}[run.lr or 0.0]])
        elif run.method == "mezo" and run.lr == 4e-5:
            write_note(run, FAILED)
    assert collect(Comparison.read(file), runs).rows[0].lr == 2e-5


@pytest.mark.parametrize("code", [None, 0, 130, 143, -signal.SIGTERM, -signal.SIGINT])
def test_a_run_that_was_asked_to_stop_has_not_failed(code: int | None) -> None:
    assert not Note(exit_code=code).failed


FAILED = Note(1.0, 2, "the loss was not finite")


def test_while_seeds_are_missing_learning_rates_are_compared_on_those_that_all_have(tmp_path: Path) -> None:
    runs = planned(file := yaml_file(tmp_path, tasks=["sst2"], methods=TWO, seeds=[0, 1]), tmp_path / "out")
    for run in runs:  # seed 1 is easier, and only the worse lr has it
        if run.method == "mezo" and (run.seed == 0 or run.lr == 1e-5):
            write_run(run, [1.0, {1e-5: 0.7, 2e-5: 0.6, 4e-5: 0.8}[run.lr or 0.0] - 0.5 * run.seed])
    row = collect(Comparison.read(file), runs).rows[0]
    assert (row.lr, row.seeds) == (2e-5, (0,))


def test_an_lr_is_not_chosen_for_the_one_seed_that_another_has_run(tmp_path: Path) -> None:
    """1e-5 has one seed, on which 4e-5 is a little better than 2e-5; over the three seeds of both it is not."""
    runs = planned(file := yaml_file(tmp_path, tasks=["sst2"], methods=TWO, seeds=[0, 1, 2]), tmp_path / "out")
    losses = {1e-5: [0.62], 2e-5: [0.60, 0.58, 0.55], 4e-5: [0.59, 0.60, 0.57]}
    for run in runs:
        if run.method == "mezo" and run.seed < len(losses[run.lr or 0.0]):
            write_run(run, [1.0, losses[run.lr or 0.0][run.seed]])
    row = collect(Comparison.read(file), runs).rows[0]
    assert (row.lr, row.seeds, row.edge) == (2e-5, (0, 1, 2), "")


def test_an_edge_is_marked_only_when_each_lr_of_the_grid_has_an_outcome(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, tasks=["sst2"], methods={"mezo": {"lr": [1e-5, 2e-5]}}, seeds=[0])
    first, second = planned(file, tmp_path / "out")
    write_run(first, [1.0, 0.7])
    assert collect(Comparison.read(file), [first, second]).rows[0].edge == ""
    write_run(second, [1.0, 0.8])
    assert collect(Comparison.read(file), [first, second]).rows[0].edge == "lowest"


def points(losses: Sequence[float | None]) -> list[Point]:
    """Evaluations ten forwards apart."""
    return [Point(n, 10 * n, 0, 0.0, float("nan") if loss is None else loss) for n, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1.0, 0.6, 0.2], 12.5),
        ([1.0, 0.5], 10.0),
        ([0.4, 0.3], 0.0),
        ([1.0, None, 0.2], 20.0),  # nothing is known between
        ([1.0, 0.9, None], None),
        ([], None),
    ],
)
def test_a_loss_is_reached_on_the_line_between_two_evaluations(losses: Any, expected: float | None) -> None:
    assert first_reach(points(losses), 0.5, "forwards") == (None if expected is None else pytest.approx(expected))


def test_a_mean_curve_goes_as_far_as_all_of_its_curves() -> None:
    x, mean, std = mean_curve([points([1.0, 0.8, 0.6]), points([1.0, 0.4])], "forwards")
    assert x.tolist() == [0, 10]
    assert mean.tolist() == pytest.approx([1.0, 0.6])
    assert std.tolist() == pytest.approx([0.0, 0.4 / 2**0.5])


# ---------------------------------------------------------------------------------------------------------- the report


def test_every_method_has_a_colour_of_its_own(tmp_path: Path) -> None:
    methods = {f"m{n}": {"method": "mezo", "lr": 1e-5} for n in range(20)}
    colors = _colors(Comparison.read(yaml_file(tmp_path, tasks=["sst2"], methods=methods)))
    assert list(colors) == list(methods)
    assert len(set(colors.values())) == 20


def test_the_page_needs_no_other_file_and_holds_the_figures(compared: Any) -> None:
    html = page(results_of(compared), jobs=1)
    assert "://" not in html
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)""", html)
    assert "url(" not in re.sub(r"url\(#\w+\)", "", html)
    for figure in ("0.6500 ± 0.0707", "0.750 ± 0.000 (0.044)", "0.004 (edge)", "2.86x", "abc1234", "9.9", "12 done"):
        assert figure in html, figure
    assert html.count("<svg") == 1
    assert "too narrow" in html


def test_names_in_the_page_are_text_whatever_they_hold(compared: Any) -> None:
    file, runs = compared
    write_note(runs[0], Note(1.0, 2, "<script>alert(1)</script>"))
    (runs[0].folder / "summary.json").unlink()
    html = page(results_of((file, runs)), jobs=1)
    assert html.count("<script>") == 1
    assert "&lt;script&gt;alert" in html


def test_the_results_are_written_as_json_text_page_and_pictures(compared: Any, tmp_path: Path) -> None:
    results = results_of(compared)
    write(results, tmp_path, jobs=1)
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["progress"] == {"done": 12, "running": 0, "failed": 0, "stopped": 0, "to do": 0}
    assert [row["lr"] for row in document["rows"]] == [2e-5, 4e-3]
    assert document["runs"][0]["curve"][1]["forwards"] == 50
    table = (tmp_path / "table.txt").read_text()
    assert "0.004 (edge)" in table
    assert "too narrow" in table
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert not (tmp_path / "training.png").exists()  # these runs have no ledger
    pictures = [(tmp_path / name).read_bytes() for name in ("curves.png", "lr.png")]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert pictures[0] != pictures[1]


def test_a_chosen_lr_that_lies_above_the_chart_leaves_room_for_the_chart(tmp_path: Path) -> None:
    """matplotlib warns where it does not, and warnings are errors here."""
    methods = {"mezo": {"lr": 1e-3}, "fzoo": {"lr": 1e-2}}
    file = yaml_file(tmp_path, tasks=["sst2"], methods=methods, seeds=[0])
    for run in (runs := planned(file, tmp_path / "out")):
        write_run(run, [0.7, 5.0] if run.method == "mezo" else [0.7, 0.65])
    write(results_of((file, runs)), tmp_path, jobs=1)
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")


def test_where_hardly_anything_falls_what_rises_a_little_stays_on_the_chart(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, tasks=["sst2"], methods={"mezo": {"lr": 1e-3}, "fzoo": {"lr": 1e-2}}, seeds=[0])
    for run in (runs := planned(file, tmp_path / "out")):
        write_run(run, [0.710, 0.718] if run.method == "mezo" else [0.710, 0.708])
    axes = Figure().subplots()
    _draw_curves(axes, results_of((file, runs)).rows, {"mezo": "r", "fzoo": "b"}, "forwards")
    assert axes.get_ylim()[1] > 0.718


def test_a_report_of_nothing_done_yet_is_made_too(tmp_path: Path) -> None:
    runs = planned(file := yaml_file(tmp_path), tmp_path / "out")
    results = collect(Comparison.read(file), runs)
    assert "28 of 28 runs are not done" in results.remarks[-2]
    write(results, tmp_path, jobs=1)
    assert "28 runs: 28 to do." in (tmp_path / "report.html").read_text()
    assert not list(tmp_path.glob("*.png"))  # there is nothing to see
    assert tables_of(results)


def test_what_remains_is_told_with_its_time(compared: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file, runs = compared
    for run in runs[:2]:
        (run.folder / "summary.json").unlink()
    (runs[0].folder / "metrics.jsonl").write_text('{"forwards": 75}\n{"forwa')
    spec = Comparison.read(file)
    statuses = [read_status(run, "forwards") for run in runs]
    assert (statuses[0].state, statuses[0].share) == ("stopped", 0.75)
    assert seconds_left(statuses, statuses) == pytest.approx(125.0)
    assert plan_table(spec, statuses, 1).row_count == 3
    assert call("compare", file, "--out", runs[0].folder.parents[4], "--list") == 0
    shown = capsys.readouterr().out
    assert "12 runs of 100 forwards" in shown
    assert duration(125.0) in shown


def test_a_terminal_sees_how_much_of_the_whole_budget_is_spent(compared: Any) -> None:
    runs = compared[1]
    (runs[0].folder / "summary.json").unlink()
    (runs[0].folder / "metrics.jsonl").write_text('{"forwards": 40}\n')
    display = Display(Console(force_terminal=True, file=io.StringIO()))
    with Bar(display, runs, "forwards") as bar:
        assert display.live is not None
        (task,) = display.live.tasks
        assert (task.completed, task.total) == (1134, 1194)  # six runs of 100, six of 99
        (runs[0].folder / "metrics.jsonl").write_text('{"forwards": 60}\n')
        bar.update(runs[:1])
        assert (task.completed, task.fields["status"]) == (1154, "11/12 runs: sst2 mezo")


# ------------------------------------------------------------------------------------------------------ real processes


def tiny(model: Path, folder: Path, **changes: Any) -> Path:
    """A comparison of the tiny model on an embedded task."""
    small = {"batch_size": 2, "train_size": 8, "dev_size": 4, "eval_size": 8, "evaluations": 3}
    base = {
        "model": str(model),
        "budget": {"forwards": 12},
        "tasks": ["demo-sentiment"],
        "methods": {"mezo": {"lr": [1e-3]}},
        "seeds": [0],
        "defaults": small,
    }
    return yaml_file(folder, **{**base, **changes})


def running(folder: Path, steps: int) -> Callable[[], bool]:
    """Whether a run has taken so many steps."""
    ledger = folder / "ledger.bin"
    return lambda: ledger.exists() and len(read_ledger(ledger)[1]) >= steps


def wait_for(what: Callable[[], bool]) -> None:
    """Returns when it is so."""
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_comparison_that_is_stopped_then_killed_goes_on_with_the_same_run(model_dir: Path, tmp_path: Path) -> None:
    out, forwards = tmp_path / "out", 1000
    file = tiny(model_dir, tmp_path, budget={"forwards": forwards})
    (run,) = planned(file, out)
    command = [sys.executable, "-m", "zotuner", "compare", str(file), "--out", str(out)]

    first = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_for(running(run.folder, 5))
    first.terminate()
    _, said = first.communicate(timeout=120)
    assert first.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after 0 of 1 runs; to go on: the same command again" in said
    assert (read_note(run).exit_code, writer(run.folder)) == (128 + signal.SIGTERM, None)
    assert read_status(run, "forwards").state == "stopped"
    assert list(run.folder.glob("snapshots/step-*"))

    second = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    taken = len(read_ledger(run.folder / "ledger.bin")[1])
    wait_for(running(run.folder, taken + 5))
    second.kill()
    second.wait()
    assert writer(run.folder) is not None  # the run goes on by itself

    assert call("compare", file, "--out", out) == 0
    assert read_status(run, "forwards").state == "done"
    assert len(read_rows(run.folder / "metrics.jsonl")) == forwards // 2
    assert run.folder.with_name("seed-0.log").read_text().count("$ zotuner") == 2  # the third found it running


def test_a_run_that_is_killed_is_noted_the_others_go_on_and_the_next_call_goes_on_with_it(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = {"mezo": {"lr": 1e-3}, "fzoo": {"lr": 1e-2, "num_perturbations": 3}}
    file, out = tiny(model_dir, tmp_path, budget={"forwards": 300}, methods=methods), tmp_path / "out"
    mezo, fzoo = planned(file, out)

    def kill() -> None:
        wait_for(running(mezo.folder, 5))
        pid = writer(mezo.folder)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert call("compare", file, "--out", out, "--jobs", "2") == 1
    killer.join()
    shown = capsys.readouterr()
    assert "failed: demo-sentiment, mezo, lr 0.001, seed 0: ended by SIGKILL" in shown.out
    assert "[1/2] demo-sentiment, fzoo" in shown.err
    states = {run["method"]: run["state"] for run in json.loads((out / "results.json").read_text())["runs"]}
    assert states == {"mezo": "failed", "fzoo": "done"}

    assert call("compare", file, "--out", out) == 0
    assert "--resume=" in mezo.folder.with_name("seed-0.log").read_text()
    assert [read_rows(run.folder / "metrics.jsonl")[-1]["forwards"] for run in (mezo, fzoo)] == [300, 300]
    assert not (out / ".lock").exists()

    tiny(model_dir, tmp_path, budget={"forwards": 300}, methods={"mezo": {"lr": 1e-3, "eps": 1e-2}})
    capsys.readouterr()
    assert call("compare", file, "--out", out) == 2
    line = assert_one_error_line(capsys.readouterr().err)
    assert f"{mezo.folder}: was begun with eps 0.001, but {file} says 0.01" in line


@pytest.mark.parametrize(
    ("said", "code", "message"),
    [
        ("loading m\nzotuner: error: t: no such tuner\n\n", 2, "t: no such tuner"),
        ("Traceback\n  File\nValueError: oh\n", 1, "ValueError: oh"),
        ("step 3\n", -9, "ended by SIGKILL"),
    ],
)
def test_why_a_run_failed_is_the_last_line_that_it_wrote(tmp_path: Path, said: str, code: int, message: str) -> None:
    (tmp_path / "log").write_text("$ zotuner finetune\n" + said)
    assert last_words(tmp_path / "log", code) == message


def test_another_folder_is_left_alone_and_one_comparison_writes_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo").touch()
    file = yaml_file(tmp_path)
    assert call("compare", file, "--out", tmp_path / "mine") == 2
    assert "expected a new folder or an earlier comparison's" in assert_one_error_line(capsys.readouterr().err)
    with locked(tmp_path / "out"):
        assert call("compare", file, "--out", tmp_path / "out") == 2
    assert f"process {os.getpid()} is writing to it" in assert_one_error_line(capsys.readouterr().err)
    assert call("compare", file, "--out", tmp_path / "none", "--report-only") == 2
    assert "none: no such comparison" in assert_one_error_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("key", "planned", "began", "same"),
    [
        ("tuner", "auto", "owner/tuner@0123", True),
        ("tuner", "owner/tuner", "owner/tuner@0123", True),
        ("tuner", "owner/tuner", "owner/other@0123", False),
        ("tuner", "owner/tuner@v1", "owner/tuner@0123", True),
        ("tuner", "owner/tuner@v1", "owner/other@0123", False),
        ("tuner", f"owner/tuner@{'a' * 40}", f"owner/tuner@{'b' * 40}", False),
        ("k_shot", None, 16, True),
        ("k_shot", 8, 16, False),
        ("data_dir", "there", "here", True),
        ("eps", 1e-3, 2e-3, False),
    ],
)
def test_what_a_run_settles_itself_and_where_things_lie_are_no_other_options(
    tmp_path: Path, key: str, planned: Any, began: Any, same: bool
) -> None:
    options = {"model": "m", "task": "copa", "method": "zo-finetuner", "tuner": "t", "out": tmp_path}
    run = Planned("copa", "tuned", 1e-3, 0, FinetuneConfig.model_validate({**options, key: planned}), 2.0)
    (tmp_path / "config.yaml").write_text(FinetuneConfig.model_validate({**options, key: began}).to_yaml())
    if same:
        check_same(run, Path("compare.yaml"))
        return
    with pytest.raises(ZotunerError, match=f"was begun with {key} "):
        check_same(run, Path("compare.yaml"))
