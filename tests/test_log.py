"""`zotuner log`: what it shows of a run that is finished, going on or killed, in words and as a figure."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from zotuner.block_types import alike, block_types
from zotuner.cli import main
from zotuner.errors import ZotunerError
from zotuner.files import OWNER, locked
from zotuner.log.figure import draw, running_mean
from zotuner.log.run import SILENCE, read_run
from zotuner.log.tables import spans
from zotuner.metrics import read_rows

COEFFICIENTS = {"mezo": 1, "zo-finetuner": 1, "fzoo": 8, "adam": 0}  # of a step; all that a log tells methods by
METHODS = tuple(COEFFICIENTS)
PER_LAYER = (
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)
SKIPPED, CLIPPED = (3, 4), (7,)  # steps, counted from 0

Rows = Sequence[dict[str, Any]]


def llama_blocks(layers: int) -> list[str]:
    """The names of a Llama's blocks, in the model's order."""
    inner = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in PER_LAYER]
    return ["model.embed_tokens.weight", *inner, "model.norm.weight"]


def write_run(folder: Path, config: dict[str, Any], finished: bool = True, **files: Rows) -> Path:
    """A run's directory; `files` are those of JSON lines, without their ending."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": "acme/llama", "max_skipped": 10, **config}))
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (folder / "summary.json").write_text("{}")
    return folder


def finetune_rows(method: str, steps: int) -> list[dict[str, Any]]:
    """Losses that fall from 1 towards 0.5, two skipped steps, a clipped one; coefficients of -2 and 2."""
    count = COEFFICIENTS[method]
    rows: list[dict[str, Any]] = []
    for step in range(steps):
        skipped = step in SKIPPED
        row = {
            "step": step,
            "forwards": (step + 1) * (count + 1 if count != 1 else 2),
            "tokens": (step + 1) * 100,
            "seconds": (step + 1) * 0.25,
            "loss": None if skipped else 0.5 + 0.5 * math.exp(-step / steps),
            "lr": 4e-5 * (1 - step / steps),
            "coefficients": [None if skipped else (-2.0) ** (1 + k % 2) / (1 + k % 2) for k in range(count)],
        }
        rows.append(row | ({"skipped": True} if skipped else {}) | ({"clipped": True} if step in CLIPPED else {}))
    return rows


def scales_rows(blocks: Sequence[str], steps: Sequence[int]) -> list[dict[str, Any]]:
    """Block i has scale 2^(i % 3 - 1), and from the second recorded step on twice that."""
    first: dict[str, Any] = {"blocks": list(blocks)}
    values = [2.0 ** (i % 3 - 1) for i in range(len(blocks))]
    return [first, *({"step": s, "scales": [v * (1 + (s > steps[0])) for v in values]} for s in steps)]


def finetune_run(folder: Path, method: str = "mezo", steps: int = 40, **options: Any) -> Path:
    """A fine-tuning of 40 steps with 5 evaluations, of which the one at step 16 is the best."""
    config = {"task": "demo", "method": method, "lr": 4e-5, "lr_schedule": "linear", "steps": 40}
    losses = {0: 0.95, 8: 0.8, 16: 0.61, 24: 0.7, 32: 0.65, 40: 0.66}
    evals = [
        {"step": s, "forwards": 2 * s, "seconds": 0.25 * s, "loss": x, "accuracy": 1 - x / 2}
        for s, x in losses.items()
        if s <= steps
    ]
    files: dict[str, Rows] = {"metrics": finetune_rows(method, steps), "evals": evals}
    if method == "zo-finetuner":
        files["scales"] = scales_rows(llama_blocks(2), range(0, steps, 4))
    return write_run(folder, config, **(files | options))


def meta_run(folder: Path, steps: int = 30, **options: Any) -> Path:
    """A meta-training whose gain is 0.001 times the step; it begins anew every 10 points."""
    rows = [
        {
            "step": step,
            "position": step % 10,
            "task": ("copa", "sst2")[step % 2],
            "seconds": 2.0 * (step + 1),
            "loss": 2.0,
            "meta_loss": None if step == 5 else 2.0 - 0.001 * step,
            "coefficients": [None if step == 5 else 4.0],
            "sigma_min": 0.9 - step / 100,
            "sigma_max": 1.1 + step / 100,
            "sigma_log_std": step / 100,
            "skipped": step == 5,
        }
        for step in range(steps)
    ]
    config = {"tasks": ["copa", "sst2"], "inner_lr": 4e-5, "steps": 30}
    return write_run(folder, config, metrics=options.pop("metrics", rows), **options)


def call(*argv: str | Path) -> int:
    """The exit code of the command line, however it ends."""
    try:
        return main([str(word) for word in argv])
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 1


def shown(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """What `zotuner log` prints."""
    assert call("log", *argv) == 0
    came = capsys.readouterr()
    assert came.err == ""
    return came.out


def cells(text: str, heading: str = "steps") -> list[dict[str, str]]:
    """The table whose first column has that heading: a mapping from heading to cell for each row."""
    lines = text.splitlines()
    (top,) = [i for i, line in enumerate(lines) if line.split("  ")[0].strip() == heading]
    names = [(m.start(), m.end(), m[0]) for m in re.finditer(r"\S+(?: \S+)*", lines[top])]
    rows = []
    for line in lines[top + 2 :]:
        if not line.strip():
            break
        found = {}
        for m in re.finditer(r"\S+(?: [@\w]\S*)*", line):
            found[min(names, key=lambda n: min(abs(n[0] - m.start()), abs(n[1] - m.end())))[2]] = m[0]
        rows.append(found)
    return rows


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


# ---------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_every_method_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    text = shown(capsys, finetune_run(tmp_path / "run", method))
    assert text.startswith(f"demo, acme/llama, {method}, lr 4e-05 (linear), 40 of 40 steps, finished\n")
    rows = cells(text)
    assert [row["steps"] for row in rows] == ["start", *(f"{2 * i + 1}-{2 * i + 2}" for i in range(20))]
    assert ("coef rms" in rows[1]) is (method != "adam")
    assert ("sigma~" in text) is (method == "zo-finetuner")


def test_a_span_has_the_means_counts_and_totals_of_its_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finetune_run(tmp_path / "run", "fzoo")
    rows = cells(shown(capsys, run, "--rows", "4"))
    metrics = read_rows(run / "metrics.jsonl")
    assert [row["steps"] for row in rows] == ["start", "1-10", "11-20", "21-30", "31-40"]
    for number, row in enumerate(rows[1:]):
        part = metrics[10 * number : 10 * number + 10]
        losses = [m["loss"] for m in part if m["loss"] is not None]
        assert row["loss"] == f"{sum(losses) / len(losses):.4f}"
        assert row["forwards"] == str(90 * (number + 1))
        assert row["lr"] == f"{part[-1]['lr']:.3g}"
        assert (row["coef rms"], row["s/step"]) == ("2", "0.25")
    assert [row.get("skipped") for row in rows[1:]] == ["2", None, None, None]
    assert [row.get("clipped") for row in rows[1:]] == ["1", None, None, None]


def test_an_evaluation_stands_at_its_span_and_the_best_is_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finetune_run(tmp_path / "run")
    rows = cells(shown(capsys, run, "--rows", "10"))
    dev = {row["steps"]: (row["dev @step"], row["accuracy"]) for row in rows if "dev @step" in row}
    assert dev == {
        "start": ("0.9500 @0", "0.525"),
        "5-8": ("0.8000 @8", "0.600"),
        "13-16": ("0.6100 @16*", "0.695"),
        "21-24": ("0.7000 @24", "0.650"),
        "29-32": ("0.6500 @32", "0.675"),
        "37-40": ("0.6600 @40", "0.670"),
    }
    best_of = {row["steps"]: row.get("dev @step") for row in cells(shown(capsys, run, "--rows", "2"))}
    assert best_of == {"start": "0.9500 @0", "1-20": "0.6100 @16*", "21-40": "0.6500 @32"}


def test_an_evaluation_after_the_first_step_is_not_the_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evals = [{"step": step, "loss": 0.9 - step / 10, "accuracy": 0.5} for step in (0, 1)]
    rows = cells(shown(capsys, finetune_run(tmp_path / "run", evals=evals), "--rows", "40"))
    assert [row.get("dev @step") for row in rows[:3]] == ["0.9000 @0", "0.8000 @1*", None]


def test_the_start_is_never_the_best_and_a_loss_that_is_not_finite_neither(tmp_path: Path) -> None:
    evals = [{"step": step, "loss": loss, "accuracy": 0.5} for step, loss in ((0, 0.1), (20, None), (40, 0.7))]
    best = read_run(finetune_run(tmp_path / "run", evals=evals)).best
    assert best is not None
    assert best.step == 40


@pytest.mark.parametrize("rows", [1, 3, 7, 20, 1000])
@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 1000])
def test_spans_cover_every_step_once_and_are_of_almost_one_length(count: int, rows: int) -> None:
    found = spans(count, rows)
    assert [i for cut in found for i in range(count)[cut]] == list(range(count))
    lengths = {cut.stop - cut.start for cut in found}
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1
    assert len(found) == min(rows, count)


def test_older_rows_that_do_not_say_that_they_were_skipped_are_counted_by_their_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = [{k: v for k, v in row.items() if k != "skipped"} for row in finetune_rows("mezo", 40)]
    (_, row) = cells(shown(capsys, finetune_run(tmp_path / "run", metrics=metrics), "--rows", "1"))
    assert row["skipped"] == str(len(SKIPPED))


def test_rows_of_older_meta_trainings_that_count_what_was_skipped_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = meta_run(tmp_path / "run")
    rows = [row | {"skipped": int(row["skipped"])} for row in read_rows(run / "metrics.jsonl")]
    row = cells(shown(capsys, meta_run(tmp_path / "older", metrics=rows), "--rows", "1"))[-1]
    assert row["skipped"] == "1"


def test_a_span_without_a_finite_loss_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = cells(shown(capsys, finetune_run(tmp_path / "run"), "--rows", "40"))
    assert (rows[4]["steps"], rows[4]["loss"], rows[4]["coef rms"]) == ("4", "-", "-")


def test_a_meta_training_shows_its_gain_and_the_spread_of_its_scales(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, meta_run(tmp_path / "run"), "--rows", "3")
    assert text.startswith("meta-training on copa sst2, acme/llama, inner lr 4e-05, 30 of 30 steps, finished\n")
    rows = cells(text)
    gains = [(sum(range(10)) - 5) / 9, 14.5, 24.5]
    for number, (row, gain) in enumerate(zip(rows, gains, strict=True)):
        low, high = 10 * number, 10 * number + 9
        assert row["steps"] == f"{low + 1}-{high + 1}"
        assert (row["loss"], row["meta-loss"]) == ("2.0000", f"{2 - gain / 1000:.4f}")
        assert row["gain"] == f"+{gain / 1000:.5f}"
        assert (row["sigma~ min"], row["max"]) == (f"{0.9 - high / 100:.3f}", f"{1.1 + high / 100:.3f}")
        assert row["std of log"] == f"{(low + high) / 200:.3f}"
        assert row["s/step"] == "2"
    assert [row.get("skipped") for row in rows] == ["1", None, None]
    assert {row["coef rms"] for row in rows} == {"4"}


# ---------------------------------------------------------------------------------------------------------- scales


def test_blocks_that_differ_in_numbers_alone_are_of_one_type_ordered_by_layer() -> None:
    names = ["model.embed.weight", *(f"model.layers.{i}.{n}" for i in (10, 2) for n in ("q.weight", "k.weight"))]
    assert block_types(names) == {"model.embed.weight": [0], "q.weight": [3, 1], "k.weight": [4, 2]}


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["enc.h.0.w", "dec.h.0.w"], ["enc.h.*.w", "dec.h.*.w"]),
        (["h.0.experts.0.w", "h.0.experts.1.w", "h.1.experts.0.w"], ["experts.*.w"]),
        (["model.layers.0", "model.layers.1", "model.norm"], ["model.layers.*", "model.norm"]),
        (["h.0.c_attn.weight[q]", "h.0.c_attn.weight[k]"], ["c_attn.weight[q]", "c_attn.weight[k]"]),
        (["w", "h.0.w"], ["w", "h.*.w"]),
    ],
)
def test_a_type_is_named_by_what_follows_the_layer_where_that_is_its_own(names: list[str], labels: list[str]) -> None:
    found = block_types(names)
    assert list(found) == labels
    assert sorted(i for members in found.values() for i in members) == list(range(len(names)))


@pytest.mark.parametrize(
    ("bands", "firsts"),
    [(None, [0, 1, 2, 3, 4, 5, 6]), (1, [0, 2, 2, 2, 2, 2, 6]), (2, [0, 3, 2, 3, 2, 2, 6]), (9, [0, 1, 2, 3, 4, 5, 6])],
)
def test_blocks_are_alike_by_type_and_part_of_the_depth(bands: int | None, firsts: list[int]) -> None:
    names = ["emb", *(f"h.{i}.q" for i in (4, 0, 3, 1, 2)), "norm"]
    groups, of_block = alike(names, bands)
    assert groups == sorted(groups)
    assert [groups[group] for group in of_block] == firsts


def test_scales_are_shown_by_type_at_the_first_and_the_last_recorded_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["emb", "h.0.c_attn.weight[q]", "h.1.c_attn.weight[q]"]
    scales = [{"blocks": names}, {"step": 0, "scales": [1, 0.5, 4.5]}, {"step": 36, "scales": [None, 0.0, 3.0]}]
    text = shown(capsys, finetune_run(tmp_path / "run", "zo-finetuner", scales=scales))
    lines = [line.split() for line in text.splitlines()]
    assert ["type", "of", "block", "blocks", "mean", "@1", "min", "max", "mean", "@37", "min", "max"] in lines
    assert ["emb", "1", "1.000", "1.000", "1.000", "-", "-", "-"] in lines
    assert ["c_attn.weight[q]", "2", "1.500", "0.500", "4.500", "3.000", "0.000", "3.000"] in lines


def test_a_narrow_terminal_breaks_the_labels_of_scales_and_not_their_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    text = shown(capsys, finetune_run(tmp_path / "run", "zo-finetuner"), "--rows", "2")
    assert "…" not in text.split("type of block")[1]
    assert max(map(len, text.splitlines()[1:])) <= 70


# ------------------------------------------------------------------------------------- runs that have not finished


def age(run: Path, seconds: float) -> None:
    """Makes all files of a run so old."""
    for path in run.iterdir():
        os.utime(path, (time.time() - seconds,) * 2)


HERE, ELSEWHERE = socket.gethostname(), "another-machine"
DEAD = 2**22 + 1  # above what Linux gives to a process


@pytest.mark.parametrize(
    ("owner", "silence", "state"),
    [
        (f"{os.getpid()} {HERE}", 7200, "going on: last row 2 h ago"),
        (f"{DEAD} {HERE}", 30, "stopped: last row 30 s ago"),
        (None, 30, "stopped: last row 30 s ago"),
        (f"1 {ELSEWHERE}", 30, "going on, it seems: last row 30 s ago"),
        (f"1 {ELSEWHERE}", 7200, "stopped, it seems: last row 2 h ago"),
        ("half", 7200, "stopped, it seems: last row 2 h ago"),
    ],
    ids=["writer", "dead writer", "no writer", "elsewhere", "elsewhere, silent", "torn"],
)
def test_a_run_without_a_summary_goes_on_or_has_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], owner: str | None, silence: float, state: str
) -> None:
    run = finetune_run(tmp_path / "run", "zo-finetuner", steps=20, finished=False)
    if owner is not None:
        (run / OWNER).write_text(owner + "\n")
    age(run, silence)
    text = re.sub(r"\b3[0-9] s ago", "30 s ago", shown(capsys, run))
    assert text.startswith(f"demo, acme/llama, zo-finetuner, lr 4e-05 (linear), 20 of 40 steps, {state}\n")


def test_a_run_of_slow_steps_elsewhere_is_given_ten_of_them_before_it_seems_to_have_stopped(tmp_path: Path) -> None:
    metrics = [row | {"seconds": row["seconds"] * SILENCE} for row in finetune_rows("mezo", 20)]  # a quarter each
    run = finetune_run(tmp_path / "run", steps=20, finished=False, metrics=metrics)
    (run / OWNER).write_text(f"1 {ELSEWHERE}\n")
    age(run, 2 * SILENCE)
    assert read_run(run).state.startswith("going on, it seems")
    age(run, 3 * SILENCE)
    assert read_run(run).state.startswith("stopped, it seems")


def test_a_run_that_holds_its_folder_is_seen_to_go_on(tmp_path: Path) -> None:
    run = finetune_run(tmp_path / "run", steps=20, finished=False)
    with locked(run):
        assert read_run(run).state.startswith("going on: ")
    assert read_run(run).state.startswith("stopped: ")


def test_a_run_that_skipped_too_often_has_stopped(tmp_path: Path) -> None:
    metrics = finetune_rows("mezo", 14)
    for row in metrics[4:]:
        row["loss"] = None
    run = finetune_run(tmp_path / "run", finished=False, metrics=metrics)
    assert read_run(run).state == "stopped: no finite loss 10 steps in a row"
    meta = meta_run(tmp_path / "meta", finished=False)
    assert read_run(meta).state.startswith("stopped: last row"), "one step was skipped"


@pytest.mark.parametrize("name", ["metrics", "evals", "scales"])
def test_a_torn_last_line_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    run = finetune_run(tmp_path / "run", "zo-finetuner", steps=20, finished=False)
    before = shown(capsys, run)
    with (run / f"{name}.jsonl").open("a") as file:
        file.write('{"step": 20, "forw')
    assert cells(shown(capsys, run)) == cells(before)


def test_a_last_line_that_only_lacks_its_newline_is_kept(tmp_path: Path) -> None:
    run = finetune_run(tmp_path / "run")
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    assert len(read_run(run).steps) == 40


def test_only_the_last_line_may_be_torn_and_only_where_that_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    assert read_rows(path, torn_end=True) == [{"a": 1}]
    with pytest.raises(ZotunerError, match="line 2"):
        read_rows(path)
    path.write_text('{"a": 1}\n{"a": \n')  # the newline came: the line was written whole, and is damaged
    with pytest.raises(ZotunerError, match="line 2"):
        read_rows(path, torn_end=True)


@pytest.mark.parametrize("kept", [0, 1])
def test_scales_without_a_step_are_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: int) -> None:
    run = finetune_run(tmp_path / "run", "zo-finetuner", scales=scales_rows(["w"], [0])[:kept], finished=False)
    assert "sigma~" not in shown(capsys, run)
    assert panels(run) == ["loss", "coefficients", "lr"]


# ---------------------------------------------------------------------------------------------------------- errors


def edit(run: Path, name: str, row: int, **changes: Any) -> None:
    """Changes keys of one row, counted from 1; `...` takes a key out."""
    path = run / name
    rows = read_rows(path)
    rows[row - 1] = {k: v for k, v in (rows[row - 1] | changes).items() if v is not ...}
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


DAMAGE: dict[str, tuple[str, int, dict[str, Any], str]] = {
    "a row without its loss": ("metrics.jsonl", 3, {"loss": ...}, "metrics.jsonl, row 3: loss: field required"),
    "a loss of text": ("metrics.jsonl", 3, {"loss": "low"}, "row 3: loss: input should be a valid number, got 'low'"),
    "a step that came before": ("metrics.jsonl", 5, {"step": 3}, "row 5: expected a step after 3, got 3"),
    "coefficients of one number": ("metrics.jsonl", 2, {"coefficients": 1.5}, "row 2: coefficients: "),
    "an evaluation without a step": ("evals.jsonl", 2, {"step": ...}, "evals.jsonl, row 2: step: field required"),
    "scales without names": ("scales.jsonl", 1, {"blocks": ...}, "scales.jsonl, row 1: blocks: field required"),
    "too few scales": ("scales.jsonl", 4, {"scales": [1.0]}, "scales.jsonl, row 4: expected 20 scales, got 1"),
    "a scale of text": ("scales.jsonl", 2, {"scales": ["1"] * 20}, "scales.jsonl, row 2: scales: "),
}


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """The one line of a refusal."""
    assert call("log", *argv) == 2
    came = capsys.readouterr()
    assert came.err.count("\n") == 1
    assert came.err.startswith("zotuner")
    return came.err


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_line_that_names_the_row(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    name, row, changes, message = DAMAGE[kind]
    run = finetune_run(tmp_path / "run", "zo-finetuner")
    edit(run, name, row, **changes)
    assert message in refused(capsys, run)


@pytest.mark.parametrize("name", ["metrics", "evals", "scales"])
def test_a_broken_line_in_the_middle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    run = finetune_run(tmp_path / "run", "zo-finetuner")
    path = run / f"{name}.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2][:9] + "\n", *lines[3:]]))
    assert f"{name}.jsonl, line 3: expected one JSON object" in refused(capsys, run)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"task": "demo", "method": "mezo", "steps": "many"}, "config.yaml: steps: input should be a valid integer"),
        ({"steps": 4}, "config.yaml: expected a task and a method"),
        ({"task": "demo", "method": "mezo"}, "config.yaml: steps: field required"),
    ],
)
def test_a_config_that_is_no_runs_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: dict[str, Any], message: str
) -> None:
    assert message in refused(capsys, write_run(tmp_path / "run", config, metrics=finetune_rows("mezo", 4)))


def test_what_is_no_run_or_has_no_step_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected a run's directory" in refused(capsys, tmp_path / "none")
    assert "expected a run's directory" in refused(capsys, tmp_path)
    run = finetune_run(tmp_path / "run", metrics=[])
    assert "metrics.jsonl: expected a row a step, found none" in refused(capsys, run)
    (run / "metrics.jsonl").write_text('{"step": 0, "los')
    assert "found none" in refused(capsys, run)
    assert "at least 1" in refused(capsys, run, "--rows", "0")


@pytest.mark.parametrize("name", ["none/plot.png", "plot.unknown"])
def test_a_figure_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert f"{name}: cannot be written: " in refused(capsys, finetune_run(tmp_path / "run"), "--plot", tmp_path / name)


# ---------------------------------------------------------------------------------------------------------- figure


def panels(run: Path) -> list[str]:
    """What the panels of a run's figure show, from top to bottom."""
    return [axes.get_ylabel() for axes in draw(read_run(run)).axes]


HEAT_MAP = ["type of block, each from first to last layer", "sigma~ (1: as MeZO)"]
PANELS = {
    "mezo": ["loss", "coefficients", "lr"],
    "fzoo": ["loss", "coefficients", "lr"],
    "adam": ["loss", "lr"],
    "zo-finetuner": ["loss", "coefficients", "lr", *HEAT_MAP],
}


@pytest.mark.parametrize("method", METHODS)
def test_a_figure_has_the_panels_that_there_is_data_for_and_one_axis_of_steps(tmp_path: Path, method: str) -> None:
    run = finetune_run(tmp_path / "run", method)
    assert panels(run) == PANELS[method]
    shared = [axes for axes in draw(read_run(run)).axes if not axes.get_ylabel().startswith("sigma~")]
    assert len({axes.get_xlim() for axes in shared}) == 1
    assert [axes.get_xlabel() for axes in shared] == [""] * (len(shared) - 1) + ["steps done"]


def test_a_meta_trainings_figure_shows_losses_gain_and_spread_and_marks_resets(tmp_path: Path) -> None:
    run = meta_run(tmp_path / "run")
    assert panels(run) == ["loss", "gain of a step", "sigma~ of the blocks", "coefficients"]
    lines = draw(read_run(run)).axes[0].get_lines()
    assert [line.get_xdata()[0] for line in lines if len(line.get_xdata()) == 2] == [10, 20]
    assert {"loss on copa", "meta-loss on sst2"} <= {line.get_label() for line in lines}


def test_a_figure_shows_losses_of_the_same_weights_at_the_same_place(tmp_path: Path) -> None:
    axes = draw(read_run(finetune_run(tmp_path / "run"))).axes[0]
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    raw, dev = lines["training loss"], lines["dev loss"]
    assert raw.get_xdata()[0] == dev.get_xdata()[0] == 0
    assert list(dev.get_xdata()) == [0, 8, 16, 24, 32, 40]
    assert list(lines["skipped steps"].get_xdata()) == list(SKIPPED)
    assert list(lines["clipped steps"].get_xdata()) == list(CLIPPED)
    assert list(lines["best on dev: 0.6100 at step 16"].get_xdata()) == [16]


def test_a_heat_map_has_a_row_a_block_by_type_and_layer_centred_at_one(tmp_path: Path) -> None:
    run = finetune_run(tmp_path / "run", "zo-finetuner")
    axes, bar = draw(read_run(run)).axes[3:]
    (mesh,) = [child for child in axes.get_children() if hasattr(child, "get_coordinates")]
    values = mesh.get_array()
    assert values.shape == (20, 10)
    order = [0, *(1 + kind + 9 * layer for kind in range(9) for layer in range(2)), 19]
    assert np.allclose(values[:, 0], [i % 3 - 1 for i in order])
    assert np.allclose(values[:, 1:], values[:, :1] + 1)
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "model.embed_tokens.weight",
        *PER_LAYER,
        "model.norm.weight",
    ]
    assert axes.yaxis_inverted(), "the first layer on top"
    assert mesh.norm.vmin == -mesh.norm.vmax == -2
    assert "1" in [label.get_text() for label in bar.get_yticklabels()]


def test_columns_of_a_heat_map_stand_at_their_steps_however_uneven(tmp_path: Path) -> None:
    steps = [0, 1, 11, 39]
    run = finetune_run(tmp_path / "run", "zo-finetuner", scales=scales_rows(["w"], steps))
    axes = draw(read_run(run)).axes[3]
    (mesh,) = [child for child in axes.get_children() if hasattr(child, "get_coordinates")]
    edges = mesh.get_coordinates()[0, :, 0]
    assert all(a <= step < b for step, a, b in zip(steps, edges, edges[1:], strict=False))


def test_a_running_mean_leaves_out_what_is_no_number_and_keeps_gaps() -> None:
    values = np.array([1.0, math.nan, 3.0, math.nan, math.nan, math.nan, 8.0])
    assert running_mean(values, 3) == pytest.approx([1, 2, 3, 3, math.nan, 8, 8], nan_ok=True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [*METHODS, "meta", "one step", "none finite"])
def test_every_kind_of_run_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    out, run = tmp_path / "plot.png", tmp_path / "run"
    if kind == "meta":
        meta_run(run)
    elif kind == "one step":
        scales = scales_rows(llama_blocks(1), [0])
        finetune_run(run, "zo-finetuner", steps=1, finished=False, scales=scales)
    elif kind == "none finite":
        lost = {"loss": None, "coefficients": [None]}
        scales = [{"blocks": ["w"]}, {"step": 0, "scales": [None]}]
        finetune_run(run, metrics=[row | lost for row in finetune_rows("mezo", 8)], scales=scales, evals=[])
    else:
        finetune_run(run, kind)
    shown(capsys, run, "--plot", out)
    assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
