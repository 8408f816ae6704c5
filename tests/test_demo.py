"""The demo and the bench, on a tiny model."""

import json
from pathlib import Path

import pytest

from zotuner import demo
from zotuner.cli import main
from zotuner.models import load_model
from zotuner.report import read_summary
from zotuner.tuner import Tuner


@pytest.fixture
def tuner(model_dir: Path, tmp_path: Path) -> Path:
    made = Tuner.for_model(load_model(model_dir)[0], "abs", tasks=("copa", "demo-sentiment"))
    made.save_pretrained(tmp_path / "tuner")
    return tmp_path / "tuner"


def test_the_demo_spends_the_same_forwards_on_every_method(
    model_dir: Path, tuner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "MODEL", str(model_dir))
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--tuner", str(tuner), "--forwards", "18"]) == 0
    assert {method: read_summary(out / method)["forwards"] for method in demo.RUNS} == dict.fromkeys(demo.RUNS, 18)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(method in printed for method in (*demo.RUNS, "zero-shot"))
    assert "the tuner was meta-trained on copa, demo-sentiment" in printed, "the demo's task is one of them"


def test_the_demo_keeps_away_from_folders_that_are_not_its_own(
    tuner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine" / "photos").mkdir(parents=True)
    assert main(["demo", "--out", str(tmp_path / "mine"), "--tuner", str(tuner)]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["photos"]


def test_the_demo_replaces_no_run_of_somebody_else(
    model_dir: Path, tuner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine" / "mezo"
    words = ["--model", str(model_dir), "--task", "demo-copa", "--method", "mezo", "--out", str(out), "--steps", "0"]
    assert main(["finetune", *words, "--eval-size", "2", "--no-zero-shot"]) == 0
    before = (out / "config.yaml").read_bytes()
    assert main(["demo", "--out", str(out.parent), "--tuner", str(tuner)]) == 2
    assert "expected a new folder or an earlier demo's" in capsys.readouterr().err
    assert (out / "config.yaml").read_bytes() == before
    for folder, name in ((out, "config.yaml"), (tmp_path / "pictures", "loss.png")):
        folder.mkdir(exist_ok=True)
        (folder / name).touch()
        (folder / "thesis.tex").touch()
        assert main(["demo", "--out", str(folder), "--tuner", str(tuner)]) == 2
        assert "expected a new folder or an earlier demo's" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file" / "x"), "--tuner", str(tuner)]) == 2
    assert "is a file; choose another --out" in capsys.readouterr().err


def test_forwards_that_no_step_of_fzoo_fits_in_are_refused(
    tuner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo"), "--tuner", str(tuner), "--forwards", "17"]) == 2
    assert "--forwards: expected at least 18, which make whole steps of each, got 17" in capsys.readouterr().err


def test_the_demo_says_where_a_tuner_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo"), "--tuner", str(tmp_path / "none")]) == 2
    assert "none: no such tuner" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_the_bench_reports_every_method(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    assert main(["bench", "--model", str(model_dir), "--length", "8", "--rounds", "2", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["rounds"] == 2
    entries = result["entries"]
    assert entries["fzoo rademacher"]["forwards"] == 9
    assert set(entries) >= {"forward", "mezo gaussian", "zo-finetuner rademacher"}
    assert all(row["seconds"] > 0 and row["per_own_forwards"] > 0 for row in entries.values())
    assert "per_base_step" in entries["zo-finetuner gaussian"]
