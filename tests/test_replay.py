"""Models rebuilt from ledgers: the same bits as the run's, without data; other bases, tuners and versions refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import STATEFUL, ZEROTH_ORDER
from test_cli import assert_one_error_line, call

from zotuner import noise
from zotuner.ledger import Ledger, read_ledger, write_ledger
from zotuner.models import known_as, load_model, weights_sha256
from zotuner.tuner import Tuner

Run = Callable[[str], Path]


@pytest.fixture(autouse=True)
def no_data(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rebuilding reads no examples and evaluates nothing."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a replay asked for data or a loss")

    monkeypatch.setattr("zotuner.objective.Objective.mean_loss", refused)
    monkeypatch.setattr("zotuner.tasks.base.Task.rows", refused)


@pytest.fixture(scope="module")
def finished(whole: Run) -> Run:
    """A run of a kind; made before data are refused."""
    for method in (*ZEROTH_ORDER, *STATEFUL, "adam"):
        whole(method)
    return whole


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def sha256_of(model: Path, dtype: str = "float32") -> str:
    return weights_sha256(load_model(model, dtype=dtype)[0])


@pytest.mark.parametrize("method", [*ZEROTH_ORDER, *STATEFUL])
def test_a_replay_has_the_bits_of_the_run(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    assert call("replay", finished(method), "--out", tmp_path / "model") == 0
    said = capsys.readouterr().out
    best = summary_of(finished(method))["dev"]["best"]["step"]
    assert f"the model after {best} steps" in said
    assert "as the run recorded" in said
    dtype = "bfloat16" if method in ("half", "mezo-adam") else "float32"
    assert sha256_of(tmp_path / "model", dtype) == summary_of(finished(method))["weights_sha256"]


@pytest.mark.parametrize("method", ZEROTH_ORDER)
def test_a_shared_file_makes_the_model_from_its_base(
    finished: Run, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    file, run = tmp_path / "run.zoledger", finished(method)
    assert call("export", run, "--out", file) == 0
    assert f"for {model_dir.name}" in capsys.readouterr().out
    assert file.stat().st_size < 5000
    assert str(model_dir) not in file.read_bytes().decode("latin-1")  # nothing of the machine that made it
    tuner = ["--tuner", str(json.loads(json.dumps(read_ledger(run / "ledger.bin")[0]))["tuner"])]
    words = tuner if method in ("zo-finetuner", "one-sided") else []
    assert call("apply", file, "--model", model_dir, "--out", tmp_path / "model", *words) == 0
    dtype = "bfloat16" if method == "half" else "float32"
    assert sha256_of(tmp_path / "model", dtype) == summary_of(run)["weights_sha256"]


def test_a_file_to_share_names_no_folder_that_is_gone(finished: Run, model_dir: Path, tmp_path: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "run.zoledger"
    shutil.copytree(finished("zo-finetuner"), run)
    header, _ = read_ledger(run / "ledger.bin")
    gone = {"model": "/home/me/secret/model", "tuner": "/home/me/secret/tuner"}
    header["config"] |= gone
    write_ledger(run / "ledger.bin", header | gone, read_ledger(run / "ledger.bin")[1])
    assert call("export", run, "--out", file) == 0
    assert b"secret" not in file.read_bytes()


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("acme/tuner@refs/pr/1", "acme/tuner@refs/pr/1"),
        ("/home/me/tuner", "tuner"),
        ("../tuner", "tuner"),
        ("runs/one/model", "model"),
    ],
)
def test_of_a_path_the_last_part_is_told(name: str, known: str) -> None:
    assert known_as(name) == known


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert known_as(".") == tmp_path.name


def test_a_replay_stops_at_any_step(finished: Run, model_dir: Path, tmp_path: Path, capsys: Any) -> None:
    run, seen = finished("mezo"), set()
    for step in (1, 5, 12):
        out = tmp_path / str(step)
        assert call("replay", run, "--out", out, "--step", step) == 0
        seen.add(sha256_of(out))
    assert len(seen) == 3
    assert sha256_of(model_dir) not in seen
    assert "no record to compare with" in capsys.readouterr().out
    assert call("replay", run, "--out", tmp_path / "13", "--step", 13) == 2
    assert "has 12 steps, got --step 13" in assert_one_error_line(capsys.readouterr().err)


def test_a_run_that_was_killed_can_be_replayed_but_not_shared(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "killed"
    shutil.copytree(finished("mezo"), run)
    (run / "summary.json").unlink()
    with (run / "ledger.bin").open("r+b") as file:
        file.truncate((run / "ledger.bin").stat().st_size - 30)  # a record and a part of one
    assert call("replay", run, "--out", tmp_path / "model") == 0
    assert "after 10 steps" in capsys.readouterr().out
    assert call("export", run, "--out", tmp_path / "x.zoledger") == 2
    assert "expected a finished run" in assert_one_error_line(capsys.readouterr().err)
    assert not (tmp_path / "x.zoledger").exists()


@pytest.fixture
def other_base(model_dir: Path, tmp_path: Path) -> Path:
    """A model that differs from the base in one weight."""
    model, tokenizer = load_model(model_dir)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_another_base_is_refused(
    finished: Run, other_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.zoledger"
    assert call("export", finished("mezo"), "--out", file) == 0
    assert call("apply", file, "--model", other_base, "--out", tmp_path / "model") == 2
    line = assert_one_error_line(capsys.readouterr().err)
    assert sha256_of(other_base) in line
    assert "give the very model that the run began with" in line
    assert not (tmp_path / "model").exists()


def test_another_tuner_is_refused(
    finished: Run, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Tuner.for_model(load_model(model_dir)[0], "abs", seed=2).save_pretrained(tmp_path / "tuner")
    words = ["--out", tmp_path / "model", "--tuner", tmp_path / "tuner"]
    assert call("replay", finished("zo-finetuner"), *words) == 2
    assert "give the very tuner" in assert_one_error_line(capsys.readouterr().err)


def altered(run: Path, out: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A ledger whose header was changed, with the right checksum."""
    header, records = read_ledger(run / "ledger.bin")
    change(header)
    write_ledger(out, header, records)
    return out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h: h.update(noise_version=noise.VERSION + 1), "version 2 of the noise, this is 1"),
        (lambda h: h.pop("weights_sha256"), "header: weights_sha256: Field required"),
        (lambda h: h["config"].update(lr="much"), "header: lr: "),
        (lambda h: h["config"].update(rank=10**9), "header: rank: "),
        (lambda h: h["config"].update(method="adam", engine="streamed"), "expected a zeroth-order method"),
        (lambda h: h.update(losses=3), "damaged at offset"),
        (lambda h: h.update(losses=10**9), "losses: expected 1 to 65536"),
        (lambda h: h.update(final={"step": -1, "weights_sha256": "x"}), "header: final.step"),
        (lambda h: h.update(final={"step": 99, "weights_sha256": "x"}), "has 12 steps"),
        (lambda h: h.update(final={"step": 12, "weights_sha256": "x"}), "the run recorded x"),
    ],
)
def test_a_header_from_a_stranger_is_checked(
    finished: Run, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, says: str
) -> None:
    run, file = finished("mezo"), tmp_path / "odd.zoledger"
    if "losses" in says or says.startswith("damaged"):
        data, (header, _) = (run / "ledger.bin").read_bytes(), read_ledger(run / "ledger.bin")
        length = int.from_bytes(data[8:12], "little")
        change(header)
        with Ledger(file, {**header, "losses": 2}):
            pass
        body = file.read_bytes()
        again = json.dumps({"format_version": 1, **header}).encode()
        import zlib

        head = b"ZOLEDGER" + len(again).to_bytes(4, "little") + again + zlib.crc32(again).to_bytes(4, "little")
        assert body.startswith(b"ZOLEDGER")
        file.write_bytes(head + data[16 + length :])
    else:
        altered(run, file, change)
    assert call("apply", file, "--model", model_dir, "--out", tmp_path / "model") == 2
    assert says in assert_one_error_line(capsys.readouterr().err)
    assert not (tmp_path / "model").exists()


def test_a_run_of_adam_has_no_ledger(finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("replay", finished("adam"), "--out", tmp_path / "model") == 2
    assert "expected a run of a zeroth-order method" in assert_one_error_line(capsys.readouterr().err)


def test_a_folder_that_holds_something_is_not_overwritten(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("x")
    assert call("replay", finished("mezo"), "--out", tmp_path) == 2
    assert "expected an empty folder" in assert_one_error_line(capsys.readouterr().err)
    assert (tmp_path / "mine").read_text() == "x"
