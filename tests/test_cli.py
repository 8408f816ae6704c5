"""The command line from end to end, in this process, on a tiny model: run directories, bad input, help, reports."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

import zotuner
from zotuner.blocks import find_blocks
from zotuner.cli import main
from zotuner.config import DEFAULT_LR, FinetuneConfig, MetaTrainConfig
from zotuner.evaluate import Evaluation
from zotuner.ledger import read_ledger
from zotuner.metrics import read_rows
from zotuner.models import load_model, weights_sha256
from zotuner.tasks import TASKS
from zotuner.tuner import Tuner

ROOT = Path(__file__).parents[1]
METHODS = ("mezo", "fzoo", "zo-finetuner", "adam", "none")
ZEROTH_ORDER = ("mezo", "fzoo", "zo-finetuner")
STEPS = 3
TOO_LARGE = 5e37  # a learning rate that overflows the weights at the first step
FORWARDS = {"mezo": 6, "zo-finetuner": 6, "fzoo": 9, "adam": 3, "none": 0}  # of 3 steps; fzoo with 2 perturbations
COMMANDS = ("finetune", "meta-train", "replay", "export", "apply", "report", "log", "compare", "demo", "tasks", "tuner")

METRICS_KEYS = {"step", "forwards", "tokens", "seconds", "loss", "lr", "coefficients"}
SUMMARY_KEYS = {
    *("model", "task", "method", "steps", "forwards", "tokens", "seconds", "peak_rss_bytes", "zero_shot", "final"),
    *("weights_sha256", "seed", "versions"),
}

Options = dict[str, Any]  # flag -> value; None leaves the flag out, True gives it no value


def call(*argv: str | Path) -> int:
    """The exit code of the command line, however it ends."""
    try:
        return main([str(word) for word in argv])
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 1


def argv_of(options: Options) -> list[str]:
    """Flags as words."""
    words: list[str] = []
    for flag, value in options.items():
        if value is not None:
            words += [flag] if value is True else [flag, str(value)]
    return words


def quick(model: Path, out: Path, /, **options: Any) -> Options:
    """The options of a fine-tuning of a second, with some replaced."""
    base = {
        "--model": model,
        "--task": "demo-sentiment",
        "--method": "mezo",
        "--out": out,
        "--steps": STEPS,
        "--batch-size": 2,
        "--train-size": 8,
        "--dev-size": 4,
        "--eval-size": 8,
    }
    return base | {"--" + name.replace("_", "-"): value for name, value in options.items()}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file at or below a path."""
    files = [folder] if folder.is_file() else [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in files}


def summary_of(out: Path) -> dict[str, Any]:
    """A run's summary."""
    return json.loads((out / "summary.json").read_text())


def assert_one_error_line(stderr: str) -> str:
    """Checks that a refusal is one line of ours, and returns it."""
    lines = [line for line in stderr.splitlines() if "error:" in line]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("zotuner")
    assert "Traceback" not in stderr
    return lines[0]


@pytest.fixture(scope="module")
def runs(model_dir: Path, tuner_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run of each method, with its model saved."""
    folder = tmp_path_factory.mktemp("runs")
    extra: dict[str, Options] = {"fzoo": {"num_perturbations": 2}, "zo-finetuner": {"tuner": tuner_dir}}
    for method in METHODS:
        options = quick(model_dir, folder / method, method=method, save_model=True, **extra.get(method, {}))
        assert call("finetune", *argv_of(options)) == 0
    return {method: folder / method for method in METHODS}


@pytest.fixture(scope="module")
def meta_run(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A meta-training of three points whose weights are kept."""
    out = tmp_path_factory.mktemp("meta") / "run"
    assert call("meta-train", *argv_of(quick_meta(model_dir, out, snapshot_every=1))) == 0
    return out


def quick_meta(model: Path, out: Path, /, **options: Any) -> Options:
    """The options of a meta-training of a second, with some replaced."""
    base = {
        "--model": model,
        "--tasks": "demo-copa",
        "--out": out,
        "--steps": 3,
        "--reset-every": 2,
        "--batch-size": 2,
        "--fo-lr": 1e-3,
    }
    return base | {"--" + name.replace("_", "-"): value for name, value in options.items()}


# ------------------------------------------------------------------------------------------------- run directories


@pytest.mark.parametrize("method", METHODS)
def test_a_run_directory_holds_its_files_and_no_leftovers(runs: dict[str, Path], method: str) -> None:
    names = {path.name for path in runs[method].iterdir()}
    expected = {"config.yaml", "predictions.jsonl", "summary.json", "model"}
    if method != "none":
        expected |= {"metrics.jsonl", "evals.jsonl"}
    if method in ZEROTH_ORDER:
        expected |= {"ledger.bin"}
    if method == "zo-finetuner":
        expected |= {"scales.jsonl"}
    assert names - {"metrics.jsonl"} == expected - {"metrics.jsonl"}


@pytest.mark.parametrize("method", METHODS)
def test_predictions_are_those_of_the_final_model(runs: dict[str, Path], method: str) -> None:
    rows, summary = read_rows(runs[method] / "predictions.jsonl"), summary_of(runs[method])
    assert len(rows) == summary["examples"]["test"]
    assert all(isinstance(row["answer"], str) and row["answer"] for row in rows)
    assert sum(row["loss"] for row in rows) / len(rows) == pytest.approx(summary["final"]["loss"])


@pytest.mark.parametrize("method", METHODS)
def test_a_metrics_row_a_step_has_exactly_the_documented_keys(runs: dict[str, Path], method: str) -> None:
    """Also the run without a step has the file, for those who read it."""
    rows = read_rows(runs[method] / "metrics.jsonl")
    assert len(rows) == (0 if method == "none" else STEPS)
    assert all(set(row) == METRICS_KEYS for row in rows)
    assert [row["step"] for row in rows] == list(range(len(rows)))


@pytest.mark.parametrize("method", [method for method in METHODS if method != "none"])
def test_metrics_count_forwards_tokens_and_seconds_up(runs: dict[str, Path], method: str) -> None:
    rows, summary = read_rows(runs[method] / "metrics.jsonl"), summary_of(runs[method])
    for key in ("forwards", "tokens", "seconds"):
        values = [row[key] for row in rows]
        assert values == sorted(set(values))
        assert values[-1] == pytest.approx(summary[key], abs=1e-3)
    assert rows[-1]["forwards"] == FORWARDS[method]
    assert {row["lr"] for row in rows} == {DEFAULT_LR[method]}
    coefficients = {"mezo": 1, "zo-finetuner": 1, "fzoo": 2, "adam": 0}[method]
    assert {len(row["coefficients"]) for row in rows} == {coefficients}


@pytest.mark.parametrize("method", ["mezo", "adam"])
def test_micro_batches_leave_losses_forwards_and_tokens_as_they_are(
    model_dir: Path, tmp_path: Path, method: str
) -> None:
    rows = {}
    for size in (None, 1):
        options = quick(model_dir, tmp_path / str(size), method=method, batch_size=3, micro_batch_size=size)
        assert call("finetune", *argv_of(options)) == 0
        rows[size] = read_rows(tmp_path / str(size) / "metrics.jsonl")
    assert [row["loss"] for row in rows[1]] == pytest.approx([row["loss"] for row in rows[None]], abs=1e-4)
    for key in ("forwards", "tokens"):
        assert [row[key] for row in rows[1]] == [row[key] for row in rows[None]]


@pytest.mark.parametrize("method", METHODS)
def test_a_summary_has_the_documented_keys(runs: dict[str, Path], model_dir: Path, method: str) -> None:
    summary = summary_of(runs[method])
    assert set(summary) >= SUMMARY_KEYS
    assert (summary["model"], summary["task"], summary["method"]) == (str(model_dir), "demo-sentiment", method)
    assert summary["steps"] == (0 if method == "none" else STEPS)
    assert summary["forwards"] == FORWARDS[method]
    assert summary["seed"] == 0
    assert summary["peak_rss_bytes"] > 2**24
    assert summary["versions"]["zotuner"] == zotuner.__version__
    for part in ("zero_shot", "final"):
        assert set(summary[part]) == {"loss", "accuracy"}
        assert 0 <= summary[part]["accuracy"] <= 1


@pytest.mark.parametrize("method", METHODS)
def test_a_config_states_every_option_as_it_was_resolved(runs: dict[str, Path], method: str) -> None:
    config = yaml.safe_load((runs[method] / "config.yaml").read_text())
    assert set(config) == set(FinetuneConfig.model_fields)
    assert (config["method"], config["steps"], config["eval_every"]) == (method, STEPS, 1)
    assert config["noise"] == ("rademacher" if method == "fzoo" else "gaussian")


@pytest.mark.parametrize("method", ZEROTH_ORDER)
def test_a_ledger_holds_what_the_metrics_say(runs: dict[str, Path], method: str) -> None:
    header, records = read_ledger(runs[method] / "ledger.bin")
    rows = read_rows(runs[method] / "metrics.jsonl")
    assert (header["method"], header["seed"], header["eps"]) == (method, 0, 1e-3)
    assert header["weights_sha256"] == summary_of(runs["none"])["weights_sha256"], "the weights before the first step"
    assert [record.step for record in records] == [row["step"] for row in rows]
    assert [record.lr for record in records] == [row["lr"] for row in rows]
    for record, row in zip(records, rows, strict=True):
        assert len(record.losses) == (3 if method == "fzoo" else 2)
        loss = record.losses[0] if method == "fzoo" else sum(record.losses) / 2
        assert loss == pytest.approx(row["loss"], rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_model_loads_and_has_the_recorded_weights(runs: dict[str, Path], method: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = runs[method] / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert weights_sha256(model) == summary_of(runs[method])["weights_sha256"]
    assert AutoTokenizer.from_pretrained(folder)("It was great")["input_ids"]


@pytest.mark.parametrize("method", [method for method in METHODS if method != "none"])
def test_a_method_changes_the_weights(runs: dict[str, Path], method: str) -> None:
    before = summary_of(runs["none"])["weights_sha256"]
    assert summary_of(runs[method])["weights_sha256"] != before


def test_method_none_only_evaluates(runs: dict[str, Path], model_dir: Path) -> None:
    summary = summary_of(runs["none"])
    model, _ = load_model(model_dir)
    assert summary["weights_sha256"] == weights_sha256(model)
    assert summary["final"] == summary["zero_shot"]
    assert (summary["steps"], summary["tokens"], summary["forwards"]) == (0, 0, 0)


@pytest.mark.parametrize("method", ["mezo", "fzoo", "adam"])
def test_a_seed_gives_the_same_weights_again_and_another_seed_others(
    runs: dict[str, Path], model_dir: Path, tmp_path: Path, method: str
) -> None:
    extra = {"num_perturbations": 2} if method == "fzoo" else {}
    for seed in (0, 1):
        options = quick(model_dir, tmp_path / str(seed), method=method, seed=seed, **extra)
        assert call("finetune", *argv_of(options)) == 0
    first = summary_of(runs[method])["weights_sha256"]
    again, other = (summary_of(tmp_path / str(seed))["weights_sha256"] for seed in (0, 1))
    assert again == first
    assert other != first
    assert not (tmp_path / "0" / "model").exists()


def test_flags_win_over_the_config_file(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("method: mezo\nlr: 1e-7\nsteps: 50\nlr_schedule: linear\n")
    options = quick(model_dir, tmp_path / "out", method=None, steps=2, config=file)
    assert call("finetune", *argv_of(options)) == 0
    rows = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert [row["lr"] for row in rows] == pytest.approx([1e-7, 0.5e-7])


def test_overwrite_replaces_a_run(model_dir: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(runs["mezo"], out)
    assert call("finetune", *argv_of(quick(model_dir, out, method="none", overwrite=True))) == 0
    assert summary_of(out)["method"] == "none"
    assert not (out / "ledger.bin").exists()
    assert not (out / "model").exists()


def test_a_data_directory_serves_in_place_of_the_hub(model_dir: Path, inputs: Path, tmp_path: Path) -> None:
    options = quick(model_dir, tmp_path / "out", method="none", task="sst2", data_dir=inputs / "good")
    assert call("finetune", *argv_of(options)) == 0
    assert summary_of(tmp_path / "out")["task"] == "sst2"


def test_a_run_that_diverges_still_ends_with_its_report(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("finetune", *argv_of(quick(model_dir, tmp_path / "out", lr=TOO_LARGE))) == 0
    assert summary_of(tmp_path / "out")["final"]["loss"] is None
    assert "Traceback" not in capsys.readouterr().err
    assert call("report", tmp_path / "out") == 0


def test_losses_that_are_not_finite_stop_a_run_with_advice(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("finetune", *argv_of(quick(model_dir, tmp_path / "out", lr=TOO_LARGE, steps=9, max_skipped=2))) == 2
    line = assert_one_error_line(capsys.readouterr().err)
    assert re.search(r"step \d+: the loss was not finite 2 steps in a row; try a smaller --lr", line)


def test_results_go_to_stdout_and_progress_to_stderr(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("finetune", *argv_of(quick(model_dir, tmp_path / "out"))) == 0
    came = capsys.readouterr()
    assert "zero-shot" in came.out
    assert "loading" not in came.out
    assert f"loading {model_dir}" in came.err
    assert f"step {STEPS}: dev loss" in came.err


# ------------------------------------------------------------------------------------------------------- bad input


def sst2_rows(count: int) -> list[Any]:
    return [{"sentence": f"text {i}", "label": i % 2} for i in range(count)]


@pytest.fixture(scope="module")
def inputs(model_dir: Path, tuner_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good and bad data, configs, models and tuners."""
    root = tmp_path_factory.mktemp("inputs")
    lines = [json.dumps(row) for row in sst2_rows(8)]
    data: dict[str, tuple[list[str], list[str]]] = {
        "good": (lines, lines),
        "missing-field": ([*lines[:3], '{"sentence": "no label"}'], lines),
        "broken-line": ([*lines[:3], '{"sentence": "cut of'], lines),
        "empty": (lines, []),
        "bad-label": ([*lines[:3], '{"sentence": "a", "label": 5}'], lines),
    }
    for name, (train, validation) in data.items():
        (root / name / "sst2").mkdir(parents=True)
        (root / name / "sst2" / "train.jsonl").write_text("\n".join(train))
        (root / name / "sst2" / "validation.jsonl").write_text("\n".join(validation))
    configs = {
        "unknown-key": "learning_rat: 1",
        "wrong-type": "steps: many",
        "list": "- steps",
        "broken": "steps: [1",
    }
    for name, text in configs.items():
        (root / f"{name}.yaml").write_text(text + "\n")
    _bad_models(root, model_dir)
    _bad_tuners(root, tuner_dir)
    return root


def _bad_models(root: Path, model_dir: Path) -> None:
    from safetensors.torch import load_file, save_file

    (root / "no-config").mkdir()
    (root / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    for name in ("no-tokenizer", "truncated", "missing-tensor"):
        shutil.copytree(model_dir, root / name)
    for path in (root / "no-tokenizer").glob("tokenizer*"):
        path.unlink()
    weights = root / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    weights = root / "missing-tensor" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})


def _bad_tuners(root: Path, tuner_dir: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2)
    with torch.random.fork_rng():
        other = LlamaForCausalLM(config)
    Tuner.for_model(other, base_model="acme/other").save_pretrained(root / "other-tuner")
    for name, file in (("torn-tuner", "tuner.safetensors"), ("torn-description", "tuner.json")):
        shutil.copytree(tuner_dir, root / name)
        data = (root / name / file).read_bytes()
        (root / name / file).write_bytes(data[: len(data) // 2])
    (root / "no-tuner").mkdir()


ZO: Options = {"method": "zo-finetuner"}
BAD: dict[str, tuple[Options, str]] = {
    "unknown task": ({"task": "demo-sentimant"}, "unknown task 'demo-sentimant'; did you mean 'demo-sentiment'?"),
    "unknown method": ({"method": "mezoo"}, "unknown method 'mezoo'; did you mean 'mezo'?"),
    "unknown model": ({"model": "smollm2-135m"}, "did you mean 'smollm2-135m-instruct'?"),
    "a folder without a model": ({"model": "{inputs}/no-config"}, "it has no config.json"),
    "a model without a tokenizer": ({"model": "{inputs}/no-tokenizer"}, "no-tokenizer"),
    "a truncated model": ({"model": "{inputs}/truncated"}, "truncated"),
    "a model without one of its tensors": ({"model": "{inputs}/missing-tensor"}, "model.layers.1.mlp.up_proj.weight"),
    "no such GGUF file": ({"model": "{inputs}/none.gguf"}, "none.gguf: no such file"),
    "a broken GGUF file": ({"model": "{inputs}/broken.gguf"}, "broken.gguf: cannot be read as a GGUF"),
    "unknown key": ({"config": "{inputs}/unknown-key.yaml"}, "unknown-key.yaml: unknown key 'learning_rat'"),
    "wrong type in YAML": ({"config": "{inputs}/wrong-type.yaml", "steps": None}, "wrong-type.yaml: steps: "),
    "YAML without a mapping": ({"config": "{inputs}/list.yaml"}, "list.yaml: expected a mapping"),
    "broken YAML": ({"config": "{inputs}/broken.yaml"}, "broken.yaml: expected YAML"),
    "no such config": ({"config": "{inputs}/none.yaml"}, "none.yaml: no such config file"),
    "unknown flag": ({"lrr": "1"}, "unrecognized arguments: --lrr 1"),
    "a flag without its value": ({"lr": True}, "argument --lr: expected one argument"),
    "no task": ({"task": None}, "--task is required"),
    "wrong type": ({"steps": "many"}, "--steps: input should be a valid integer"),
    "unknown noise": ({"noise": "pink"}, "--noise: input should be 'gaussian', 'rademacher' or 'low-rank', got 'pink'"),
    "unknown dtype": ({"dtype": "float8"}, "--dtype: "),
    "lr of 0": ({"lr": "0"}, "--lr: input should be greater than 0"),
    "negative lr": ({"lr": "-0.1"}, "--lr: input should be greater than 0"),
    "negative lr with an exponent": ({"lr": "-1e-3"}, "--lr"),
    "eps of 0": ({"eps": "0"}, "--eps: input should be greater than 0"),
    "negative eps": ({"eps": "-1"}, "--eps: input should be greater than 0"),
    "no data directory": ({"task": "sst2", "data_dir": "{inputs}/none"}, "train.jsonl: no such file"),
    "missing field": ({"task": "sst2", "data_dir": "{inputs}/missing-field"}, "row 4: field 'label' is missing"),
    "broken line": ({"task": "sst2", "data_dir": "{inputs}/broken-line"}, "train.jsonl, line 4: expected one JSON"),
    "empty split": ({"task": "sst2", "data_dir": "{inputs}/empty"}, "validation.jsonl: expected examples of task sst2"),
    "label out of range": ({"task": "sst2", "data_dir": "{inputs}/bad-label"}, "row 4: field 'label' must be 0 to 1"),
    "no tuner": (ZO, "zo-finetuner needs --tuner"),
    "a tuner for mezo": ({"tuner": "{inputs}/other-tuner"}, "--tuner is for method zo-finetuner"),
    "another model's tuner": (ZO | {"tuner": "{inputs}/other-tuner"}, "model.embed_tokens.weight (6400 elements; the"),
    "a truncated tuner": (ZO | {"tuner": "{inputs}/torn-tuner"}, "tuner.safetensors: expected a whole safetensors"),
    "a truncated description": (ZO | {"tuner": "{inputs}/torn-description"}, "tuner.json: "),
    "a folder without a tuner": (ZO | {"tuner": "{inputs}/no-tuner"}, "tuner.json: missing"),
    "no such tuner": (ZO | {"tuner": "{inputs}/none"}, "no such tuner"),
}


@pytest.mark.parametrize(("changes", "says"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_exit_code_2_and_writes_nothing(
    model_dir: Path,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: Options,
    says: str,
) -> None:
    monkeypatch.setenv("ZOTUNER_CACHE", str(tmp_path / "cache"))
    stated = {name: value.format(inputs=inputs) if isinstance(value, str) else value for name, value in changes.items()}
    out = tmp_path / "out"
    assert call("finetune", *argv_of(quick(model_dir, out, **stated))) == 2
    line = assert_one_error_line(capsys.readouterr().err)
    assert says in line
    assert not out.exists()


def test_a_run_is_gone_on_with_by_the_program_that_began_it(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned, trained = tmp_path / "tuned", tmp_path / "trained"
    assert call("finetune", *argv_of(quick(model_dir, tuned, steps=0))) == 0
    assert call("meta-train", *argv_of(quick_meta(model_dir, trained, steps=1))) == 0
    for command, other, run in (("meta-train", "finetune", tuned), ("finetune", "meta-train", trained)):
        capsys.readouterr()
        assert call(command, "--resume", run) == 2
        assert f"zotuner {other} --resume goes on with it" in assert_one_error_line(capsys.readouterr().err)


def test_a_flag_of_several_values_may_stand_several_times(model_dir: Path, tmp_path: Path) -> None:
    words = [*argv_of(quick_meta(model_dir, tmp_path / "out", steps=1)), "--tasks", "demo-sentiment"]
    assert call("meta-train", *words) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["tasks"] == ["demo-copa", "demo-sentiment"]


def test_help_shows_that_a_number_may_stand_for_auto(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("finetune", "--help") == 0
    shown = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).split())
    assert "--branch-threads auto|N" in shown
    assert "--quantize 4|8" in shown
    assert "--noise gaussian|rademacher|low-rank" in shown


def _holds_a_run(out: Path) -> None:
    out.mkdir()
    (out / "config.yaml").write_text("steps: 1\n")
    (out / "metrics.jsonl").write_text("")


def _holds_foreign_files(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("mine")


def _is_a_file(out: Path) -> None:
    out.write_text("mine")


@pytest.mark.parametrize(
    ("make", "overwrite", "says"),
    [
        (_holds_a_run, False, "holds another run; choose another --out, or pass --overwrite"),
        (_holds_foreign_files, False, "expected an empty folder or a run, found other files"),
        (_holds_foreign_files, True, "expected an empty folder or a run, found other files"),
        (_is_a_file, False, "expected a folder for the run, found a file"),
        (_is_a_file, True, "expected a folder for the run, found a file"),
    ],
)
@pytest.mark.parametrize("command", ["finetune", "meta-train"])
def test_an_output_folder_that_is_taken_is_refused_and_kept(
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    make: Callable[[Path], None],
    overwrite: bool,
    says: str,
) -> None:
    out = tmp_path / "out"
    make(out)
    before = tree(out)
    options = quick(model_dir, out) if command == "finetune" else quick_meta(model_dir, out)
    assert call(command, *argv_of(options | {"--overwrite": overwrite or None})) == 2
    assert says in assert_one_error_line(capsys.readouterr().err)
    assert tree(out) == before
    assert before


def test_an_output_below_a_file_is_one_line(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert call("finetune", *argv_of(quick(model_dir, tmp_path / "file" / "out"))) == 2
    assert_one_error_line(capsys.readouterr().err)


BAD_META: dict[str, tuple[Options, str]] = {
    "unknown task": ({"tasks": "demo-cop"}, "unknown task 'demo-cop'; did you mean 'demo-copa'?"),
    "unknown model": ({"model": "smollm2-135m"}, "did you mean 'smollm2-135m-instruct'?"),
    "unknown architecture": ({"architecture": "relu"}, "--architecture: "),
    "inner lr of 0": ({"inner_lr": "0"}, "--inner-lr: input should be greater than 0"),
    "wrong type": ({"reset_every": "often"}, "--reset-every: input should be a valid integer"),
    "another program's flag": ({"method": "mezo"}, "unrecognized arguments: --method mezo"),
    "a second batch, and all points": (
        {"meta_loss": "expected", "second_batch": True},
        "--second-batch is for --meta-loss sampled",
    ),
    "no second batch": (
        {"second_batch": True, "batch_size": "40", "train_size": "40"},
        "expected more than --batch-size 40 training examples of task demo-copa, got 40",
    ),
    "a batch of one": ({"meta_loss": "expected", "batch_size": "1"}, "needs a --batch-size of at least 2, got 1"),
    "no trajectory": ({"trajectory": "{inputs}/none"}, "points.jsonl: no such file"),
    "a trajectory of other tasks": (
        {"trajectory": "{meta}/trajectory", "tasks": "demo-sentiment"},
        "of task demo-copa, are not",
    ),
    "a trajectory of another draw": ({"trajectory": "{meta}/trajectory", "seed": "1"}, "are not those drawn now"),
}


@pytest.mark.parametrize(("changes", "says"), BAD_META.values(), ids=BAD_META)
def test_bad_input_of_meta_training_is_one_line_and_writes_nothing(
    model_dir: Path,
    inputs: Path,
    meta_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: Options,
    says: str,
) -> None:
    out = tmp_path / "out"
    paths = {"inputs": inputs, "meta": meta_run}
    stated = {name: value.format(**paths) if isinstance(value, str) else value for name, value in changes.items()}
    capsys.readouterr()
    assert call("meta-train", *argv_of(quick_meta(model_dir, out, **stated))) == 2
    assert says in assert_one_error_line(capsys.readouterr().err)
    assert not out.exists()


@pytest.mark.parametrize("argv", [[], ["tune"], ["report"]], ids=["nothing", "unknown command", "report of nothing"])
def test_an_incomplete_command_is_one_line(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*argv) == 2
    assert "--help" in assert_one_error_line(capsys.readouterr().err)


def test_an_interrupt_is_told_and_has_its_own_exit_code(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("zotuner.finetune.finetune", interrupted)
    assert call("finetune", *argv_of(quick(model_dir, tmp_path / "out"))) == 130
    assert capsys.readouterr().err == "zotuner: interrupted\n"


# -------------------------------------------------------------------------------------------------- other commands


@pytest.mark.parametrize(("number", "says"), [(errno.ENOSPC, "No space left on device"), (errno.EACCES, "Permission")])
def test_what_the_machine_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, says: str
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr("zotuner.preview.preview", refused)
    assert call("tasks", "demo-copa") == 2
    assert f"some/file: {says}" in assert_one_error_line(capsys.readouterr().err)


def test_a_fault_of_ours_is_not_taken_for_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(*_: Any, **__: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "some/file")

    monkeypatch.setattr("zotuner.preview.preview", faulty)
    with pytest.raises(FileNotFoundError):
        call("tasks", "demo-copa")


def test_output_that_nobody_reads_to_its_end_is_no_error() -> None:
    command = f"{shlex.quote(sys.executable)} -m zotuner tasks demo-sentiment --show 200 | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "task demo-sentiment: classification, metrics: accuracy\n"
    assert done.stderr == ""


def test_report_shows_every_run_and_draws_their_curves(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert call("report", *runs.values(), "--plot", tmp_path / "curves.png") == 0
    text = capsys.readouterr().out
    for method, out in runs.items():
        row = re.search(rf"^.*\b{method} .*$", text.replace("zero-shot", ""), re.MULTILINE)
        assert row is not None, text
        assert f"{summary_of(out)['final']['loss']:.4f}" in row[0]
        assert f" {FORWARDS[method]} " in row[0]
    assert text.count("zero-shot") == 1
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_report_in_a_pipe_keeps_its_numbers_whole(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    command = [sys.executable, "-m", "zotuner", "report", str(runs["mezo"])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL)
    assert f"{summary_of(runs['mezo'])['final']['loss']:.4f}" in done.stdout
    assert "…" not in done.stdout


def test_a_plot_of_runs_without_a_step_is_drawn(runs: dict[str, Path], tmp_path: Path) -> None:
    assert call("report", runs["none"], "--plot", tmp_path / "curves.png") == 0
    assert (tmp_path / "curves.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        (None, None, "content: Input should be a valid dictionary"),
        ("final", None, "final: Input should be a valid dictionary"),
        ("lr", "much", "lr: Input should be a valid number"),
        ("dev", {"best": 3}, "dev.best: Input should be a valid dictionary"),
    ],
)
def test_a_summary_that_is_not_one_is_named_with_its_key(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str | None, value: Any, says: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(runs["mezo"], out)
    (out / "summary.json").write_text(json.dumps(None if key is None else summary_of(out) | {key: value}))
    assert call("report", out) == 2
    assert f"summary.json: expected that of a fine-tuning run: {says}" in assert_one_error_line(capsys.readouterr().err)


def test_runs_of_one_name_are_told_apart_and_names_are_no_markup(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    for name in ("a/mezo", "b/mezo", "mezo[b]"):
        shutil.copytree(runs["mezo"], tmp_path / name)
    assert call("report", "a/mezo", "b/mezo") == 0
    assert call("report", "mezo[b]") == 0
    monkeypatch.chdir("a/mezo")
    assert call("report", ".") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "mezo" in line]
    assert names == ["a/mezo", "b/mezo", "mezo[b]", "mezo"]


@pytest.mark.parametrize("kind", ["missing", "empty", "broken summary", "meta-training", "a plot in no folder"])
def test_a_report_of_what_is_no_finished_run_is_one_line(
    runs: dict[str, Path], meta_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    folder = tmp_path / "run"
    argv: list[str | Path] = [folder]
    if kind in ("empty", "broken summary"):
        folder.mkdir()
    if kind == "broken summary":
        (folder / "summary.json").write_text("{")
    if kind == "meta-training":
        argv = [meta_run]
    if kind == "a plot in no folder":
        argv = [runs["mezo"], "--plot", tmp_path / "none" / "curves.png"]
    capsys.readouterr()
    assert call("report", *argv) == 2
    assert_one_error_line(capsys.readouterr().err)


def test_a_log_shows_what_real_runs_wrote(
    runs: dict[str, Path], meta_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = {method: runs[method] for method in METHODS if method != "none"}
    for name, out in (steps | {"meta": meta_run}).items():
        capsys.readouterr()
        assert call("log", out, "--plot", tmp_path / f"{name}.png") == 0
        text = capsys.readouterr().out
        assert f", {STEPS} of {STEPS} steps, finished" in text
        rows = read_rows(out / "metrics.jsonl")
        assert all(f"{row['loss']:.4f}" in text for row in rows), "20 rows show each of so few steps"
        assert ("type of block" in text) is (name == "zo-finetuner")
        assert (tmp_path / f"{name}.png").stat().st_size > 0
    assert call("log", runs["none"]) == 2
    assert "the run has not taken a step" in assert_one_error_line(capsys.readouterr().err)


def test_tasks_lists_every_task(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert call("tasks") == 0
    text = capsys.readouterr().out
    for name, task in TASKS.items():
        (row,) = [line for line in text.splitlines() if line.split()[1:2] == [name]]
        cells = [cell.strip() for cell in row.split("│")[1:-1]]
        assert cells[:4] == [name, " ".join(task.kinds()), task.loss, " ".join(task.metrics)]


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out.strip() == f"zotuner {zotuner.__version__}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--help") == 0
    assert f"zotuner {command}" in capsys.readouterr().out
    assert call("--help") == 0
    assert command in capsys.readouterr().out


def help_of_options(command: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """From a flag to all that its help says, on one line."""
    assert call(command, "--help") == 0
    entries = re.split(r"\n  (?=-)", capsys.readouterr().out)[1:]
    return {re.findall(r"--[a-z0-9-]+", entry)[0]: " ".join(entry.split()) for entry in entries}


CONFIG_OF = {"finetune": FinetuneConfig, "meta-train": MetaTrainConfig}


@pytest.mark.parametrize("command", CONFIG_OF)
@pytest.mark.parametrize("width", ["60", "200"])
def test_help_names_every_option_with_its_default(
    command: str, width: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    found = help_of_options(command, capsys)
    assert "--config" in found
    for name, field in CONFIG_OF[command].model_fields.items():
        text = found["--" + name.replace("_", "-")]
        if field.is_required():
            assert "(required)" in text
        elif field.default == ():
            assert "default: " in text
        elif isinstance(field.default, tuple):
            assert f"({' '.join(field.default)})" in text
        elif field.default is not None and not isinstance(field.default, bool):
            assert f"({field.default})" in text


@pytest.mark.parametrize("command", CONFIG_OF)
def test_help_says_whether_a_switch_is_on_by_default(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    found = help_of_options(command, capsys)
    switches = {name: field for name, field in CONFIG_OF[command].model_fields.items() if field.annotation is bool}
    assert switches
    for name, field in switches.items():
        stated = re.search(r"\((?:default: )?(on|off|yes|no|true|false)\)", found["--" + name.replace("_", "-")], re.I)
        assert stated is not None, name
        assert (stated[1].lower() in ("on", "yes", "true")) is field.default


def test_help_of_lr_says_each_methods_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = help_of_options("finetune", capsys)["--lr"]
    assert all(f"'{method}': {DEFAULT_LR[method]}" in text for method in METHODS if method != "none")


@pytest.mark.parametrize(("script", "flag"), [("finetune.py", "--method"), ("meta_train.py", "--reset-every")])
def test_a_root_script_runs_from_anywhere(script: str, flag: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / script, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert flag in done.stdout


def test_a_root_script_has_the_exit_code_of_the_command_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "finetune.py", "--steps", "many"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert_one_error_line(done.stderr)


# -------------------------------------------------------------------------------------------------- meta-training


def test_a_meta_training_leaves_a_tuner_its_card_and_its_record(meta_run: Path, model_dir: Path) -> None:
    names = {path.name for path in meta_run.iterdir()}
    files = {"tuner.safetensors", "tuner.json", "README.md", "metrics.jsonl", "summary.json", "config.yaml"}
    assert names == files | {"trajectory"}
    summary = summary_of(meta_run)
    assert (summary["model"], summary["tasks"], summary["steps"], summary["seed"]) == (
        str(model_dir),
        ["demo-copa"],
        3,
        0,
    )
    assert (meta_run / "README.md").read_text().startswith("---\n")
    assert set(yaml.safe_load((meta_run / "config.yaml").read_text())) == set(MetaTrainConfig.model_fields)


def test_a_meta_training_by_the_expected_gain_keeps_what_its_points_said(model_dir: Path, tmp_path: Path) -> None:
    options = {"model": model_dir, "tasks": "demo-sentiment", "meta_loss": "expected", "steps": 6, "reset_every": 4}
    options |= {"batch_size": 2, "settle": 2, "train_size": 24, "bands": 1, "out": tmp_path / "run"}
    assert call("meta-train", *argv_of({f"--{key.replace('_', '-')}": value for key, value in options.items()})) == 0
    with safe_open(tmp_path / "run" / "points.safetensors", framework="pt") as file:
        phases = json.loads(file.metadata()["phases"])
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    assert phases == ["demo-sentiment settling", "demo-sentiment settled", "demo-sentiment settling"]
    blocks = len(Tuner.from_pretrained(tmp_path / "run").block_names)
    assert shapes == {"inputs": [3, blocks, 5], "own": [3, 3, blocks]}


@pytest.mark.parametrize("meta_loss", [{"meta_loss": "sampled", "second_batch": True}, {"meta_loss": "expected"}])
def test_a_meta_training_by_either_meta_loss_tells_its_spread_and_the_expected_one_its_gain(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], meta_loss: dict[str, Any]
) -> None:
    out, expected = tmp_path / "out", meta_loss["meta_loss"] == "expected"
    options = {"steps": 4, "reset_every": 2, "batch_size": 2, **meta_loss}
    assert call("meta-train", *argv_of(quick_meta(model_dir, out, **options))) == 0
    assert summary_of(out)["tuner_sha256"] == Tuner.from_pretrained(out).sha256()
    for row in read_rows(out / "metrics.jsonl"):
        assert row["sigma_min"] <= min(row["sigma_types"].values()) <= max(row["sigma_types"].values())
        assert ("gain" in row) == expected
        assert row["skipped"] is False
    capsys.readouterr()
    assert call("log", out) == 0
    assert ("x sigma = 1" in capsys.readouterr().out) == expected


def test_a_meta_trained_tuner_loads_and_knows_the_models_blocks(meta_run: Path, model_dir: Path) -> None:
    model, _ = load_model(model_dir)
    tuner = Tuner.from_pretrained(meta_run)
    assert tuner.block_names == tuple(block.name for block in find_blocks(model))
    assert tuner.info.base_weights_sha256 == weights_sha256(model)
    assert tuner.info.tasks == ("demo-copa",)
    fresh = Tuner.for_model(model, tuner.info.architecture, tuner.info.config["seed"])
    features = torch.ones(len(tuner.block_names), 5)
    assert not torch.equal(tuner.scales(features), fresh.scales(features)), "nothing was learned"


def test_a_meta_training_starts_anew_every_reset(meta_run: Path) -> None:
    rows = read_rows(meta_run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [row["position"] for row in rows] == [0, 1, 0]
    assert {row["task"] for row in rows} == {"demo-copa"}


def test_a_trajectory_keeps_weights_and_batches_and_returns_to_the_start(meta_run: Path, model_dir: Path) -> None:
    from safetensors.torch import load_file

    rows = read_rows(meta_run / "trajectory" / "points.jsonl")
    kept = [load_file(meta_run / "trajectory" / row["snapshot"]) for row in rows]
    model, _ = load_model(model_dir)
    start = {name: param.detach() for name, param in model.named_parameters()}
    distance = [max(float((weights[name] - start[name]).abs().max()) for name in start) for weights in kept]
    assert distance[0] == 0
    assert distance[1] > 1e-4
    assert distance[2] == 0
    assert {path.name for path in (meta_run / "trajectory").iterdir()} == {
        "points.jsonl",
        *(row["snapshot"] for row in rows),
    }


def test_a_recorded_trajectory_is_visited_again_with_the_same_losses(
    meta_run: Path, model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = quick_meta(model_dir, out, trajectory=meta_run / "trajectory", fo_lr=1e9)
    before = tree(meta_run)
    assert call("meta-train", *argv_of(options)) == 0
    assert tree(meta_run) == before
    walked, visited = read_rows(meta_run / "metrics.jsonl"), read_rows(out / "metrics.jsonl")
    for key in ("loss", "meta_loss", "sigma_min", "sigma_max", "position"):
        assert [row[key] for row in visited] == pytest.approx([row[key] for row in walked], rel=1e-4)
    assert not (out / "trajectory").exists()
    assert Tuner.from_pretrained(out).block_names == Tuner.from_pretrained(meta_run).block_names


def test_a_trajectory_without_kept_weights_cannot_be_visited(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("meta-train", *argv_of(quick_meta(model_dir, tmp_path / "walked", steps=1))) == 0
    capsys.readouterr()
    options = quick_meta(model_dir, tmp_path / "visited", trajectory=tmp_path / "walked" / "trajectory")
    assert call("meta-train", *argv_of(options)) == 2
    assert "record with --snapshot-every" in assert_one_error_line(capsys.readouterr().err)
    assert not (tmp_path / "visited").exists()


def test_overwriting_the_run_whose_trajectory_is_visited_is_refused(
    meta_run: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record would be deleted before it is read."""
    out = tmp_path / "run"
    shutil.copytree(meta_run, out)
    before = tree(out)
    capsys.readouterr()
    options = quick_meta(model_dir, out, trajectory=out / "trajectory", overwrite=True)
    assert call("meta-train", *argv_of(options)) == 2
    assert_one_error_line(capsys.readouterr().err)
    assert tree(out) == before


def test_a_tuner_from_meta_training_tunes(meta_run: Path, model_dir: Path, tmp_path: Path) -> None:
    options = quick(model_dir, tmp_path / "out", method="zo-finetuner", tuner=meta_run)
    assert call("finetune", *argv_of(options)) == 0
    assert summary_of(tmp_path / "out")["steps"] == STEPS


def test_a_diverged_evaluation_does_not_keep_its_place_as_the_best(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zotuner import finetune

    original, calls = finetune.evaluate, 0

    def evaluate(*args: Any, **kwargs: Any) -> Evaluation:
        nonlocal calls
        calls += 1
        nan = float("nan")
        return Evaluation({"loss": nan, "accuracy": 0.5}, (nan,), ("",)) if calls == 3 else original(*args, **kwargs)

    monkeypatch.setattr(finetune, "evaluate", evaluate)  # calls: zero-shot, dev at 0, dev after step 1, ...
    out = tmp_path / "run"
    options = ["--model", str(model_dir), "--task", "demo-sentiment", "--method", "mezo", "--steps", "2"]
    assert main(["finetune", *options, "--eval-every", "1", "--out", str(out)]) == 0
    assert json.loads((out / "summary.json").read_text())["dev"]["best"]["step"] == 2
