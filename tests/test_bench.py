"""The bench: what it reports, that it measures what it says, and that the official-style steps are the papers'."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from zotuner.bench import measure, rows, show
from zotuner.bench.machine import peak_while
from zotuner.bench.measure import Times, check_finite, shares, time_rounds
from zotuner.bench.rows import ROWS, Row, choose, official_code
from zotuner.bench.summary import summarize
from zotuner.bench.workload import SIZES, Workload, load
from zotuner.cli import main
from zotuner.errors import ZotunerError

COLUMNS = {
    *("seconds", "forwards", "per_own_forwards", "per_official_step", "official_step_per_step", "per_base_step"),
    *("tokens_per_second", "peak_bytes", "forward_peak_bytes", "peak_per_forward", "shares", "rounds"),
}
LINUX = sys.platform.startswith("linux")


class Bowl(nn.Module):
    """A parabola in two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        self.b = nn.Parameter(torch.tensor([0.5, -2.0]))

    def loss(self) -> Tensor:
        return 2 * self.a.square().sum() + (self.b - 1).square().sum()

    def at(self, a: Tensor, b: Tensor) -> float:
        """The loss elsewhere."""
        return float(2 * a.square().sum() + (b - 1).square().sum())


@pytest.fixture
def bowl() -> Bowl:
    return Bowl()


@pytest.fixture
def work(model_dir: Path) -> Workload:
    return Workload(load(str(model_dir), "float32"), batch_size=2, length=6, logits="all")


def row_of(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the JSON and the PNG of one run of all rows."""
    folder = tmp_path_factory.mktemp("bench")
    files = ["--out", str(folder / "bench.json"), "--plot", str(folder / "bench.png")]
    assert (
        main(["bench", "--model", str(model_dir), "--batch-size", "2", "--length", "6", "--rounds", "2", *files]) == 0
    )
    return folder


@pytest.fixture(scope="module")
def result(measured: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((measured / "bench.json").read_text())
    return document


def test_the_json_has_every_row_and_every_column(result: dict[str, Any]) -> None:
    assert list(result["entries"]) == [row.name for row in ROWS]
    assert all(set(row) == COLUMNS for row in result["entries"].values())


def test_every_zeroth_order_row_has_the_figures_that_the_others_lack(result: dict[str, Any]) -> None:
    for row in ROWS:
        figures = result["entries"][row.name]
        assert figures["seconds"] > 0
        assert figures["per_own_forwards"] > 0
        assert (figures["per_official_step"] is not None) == (row.official is not None)
        assert (figures["official_step_per_step"] is not None) == (row.official is not None)
        assert (figures["per_base_step"] is not None) == (row.base is not None)
        assert (figures["shares"] is not None) == row.walks
        assert len(figures["rounds"]["seconds"]) == len(figures["rounds"]["forward_seconds"]) == 2


def test_the_tokens_of_a_second_are_those_of_all_forwards(result: dict[str, Any]) -> None:
    for figures in result["entries"].values():
        expected = 2 * 6 * figures["forwards"] / figures["seconds"]
        assert figures["tokens_per_second"] == pytest.approx(expected)


def test_the_shares_of_a_step_add_up_to_one(result: dict[str, Any]) -> None:
    for name, figures in result["entries"].items():
        if figures["shares"] is not None:
            assert set(figures["shares"]) == {"forward", *measure.PARTS}, name
            assert sum(figures["shares"].values()) == pytest.approx(1)
            assert 0 < figures["shares"]["forward"] <= 1


@pytest.mark.parametrize("name", ["official mezo", "official fzoo"])
def test_official_style_steps_spend_time_on_noise_and_update(result: dict[str, Any], name: str) -> None:
    assert result["entries"][name]["shares"]["noise"] > 0
    assert result["entries"][name]["shares"]["update"] > 0


def test_our_steps_mark_what_the_tuner_adds(result: dict[str, Any]) -> None:
    tuned, plain = (result["entries"][f"{name} gaussian"]["shares"] for name in ("zo-finetuner", "mezo"))
    assert tuned["statistics"] > 0
    assert tuned["pertnn"] > 0
    assert plain["statistics"] == plain["pertnn"] == 0
    assert plain["noise"] > 0
    assert plain["update"] > 0


@pytest.mark.skipif(not LINUX, reason="only Linux can begin a peak anew")
def test_memory_is_that_of_the_process(result: dict[str, Any]) -> None:
    for figures in result["entries"].values():
        assert figures["peak_bytes"] > 50e6
        assert figures["peak_per_forward"] == figures["peak_bytes"] / figures["forward_peak_bytes"]


def test_the_json_says_what_was_measured_and_where(result: dict[str, Any], model_dir: Path) -> None:
    about = {key: result[key] for key in ("model", "batch_size", "length", "logits", "dtype", "rounds")}
    assert about == {
        "model": str(model_dir),
        "batch_size": 2,
        "length": 6,
        "logits": "all",
        "dtype": "float32",
        "rounds": 2,
    }
    assert result["parameters"] == sum(p.numel() for p in load(str(model_dir), "float32").parameters())
    assert result["machine"]["threads"] == torch.get_num_threads()
    assert {"cpu", "cores", "memory_bytes", "versions"} <= set(result["machine"])


def test_the_plot_appears(measured: Path) -> None:
    assert (measured / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_chosen_methods_come_with_the_forward_alone(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    options = ["--rounds", "1", "--length", "4", "--dtype", "bfloat16", "--logits", "last", "--out", str(out)]
    assert main(["bench", "--model", str(model_dir), *options, "--methods", "adamw", "zo-finetuner gaussian"]) == 0
    result = json.loads(out.read_text())
    assert list(result["entries"]) == ["forward", "zo-finetuner gaussian", "adamw"]
    assert result["entries"]["zo-finetuner gaussian"]["per_base_step"] is None
    assert (result["dtype"], result["logits"]) == ("bfloat16", "last")
    shown = capsys.readouterr().out
    assert "adamw" in shown
    assert "pertnn" in shown


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--methods", "mezo gausian"], "unknown method 'mezo gausian'; did you mean 'mezo gaussian'?"),
        (["--out", "nowhere/bench.json"], "nowhere/bench.json: there is no folder nowhere to write to"),
        (["--pertnn", "2", "--plot", "a.png"], "--plot draws the times of the methods' steps, which --pertnn does not"),
        (["--drift", "2", "--plot", "a.png"], "--plot draws the times of the methods' steps, which --drift does not"),
        (["--task", "sst2", "--methods", "mezo gaussian"], "--methods chooses among the methods' steps, which --task"),
        (["--pertnn", "2", "--out", "."], ".: expected a file to write to, found a folder"),
        (["--plot", "nowhere/bench.png"], "nowhere/bench.png: there is no folder nowhere to write to"),
        (["--plot", "bench.pdf"], "--plot: expected a name that ends in .png, got bench.pdf"),
    ],
)
def test_bad_options_are_one_line_before_any_work(
    options: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--model", "no-such-model", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"zotuner: error: {says}")


def test_a_random_model_of_unknown_size_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--model", "random:11b"]) == 2
    assert "unknown random model 'random:11b'; did you mean 'random:1.1b'?" in capsys.readouterr().err


def test_measuring_leaves_the_global_generator_alone(model_dir: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    options = ["--rounds", "1", "--length", "4", "--methods", "official mezo"]
    assert main(["bench", "--model", str(model_dir), *options]) == 0
    assert torch.equal(torch.get_rng_state(), before)


# --- drift -------------------------------------------------------------------------------------------------------


def test_drift_is_nothing_where_weights_are_not_touched(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "drift.json"
    chosen = ["mezo rademacher", "zo-finetuner gaussian", "official mezo", "fzoo rademacher", "adamw"]
    options = ["--dtype", "bfloat16", "--drift", "5", "--out", str(out)]
    assert main(["bench", "--model", str(model_dir), *options, "--methods", *chosen]) == 0
    result = json.loads(out.read_text())
    assert (result["batch_size"], result["length"], result["drift_steps"]) == (1, 4, 5)
    assert list(result["entries"]) == chosen[:-1]
    official = result["entries"].pop("official mezo")
    assert 0 < official["rms"] < official["max"]
    assert all(row == {"rms": 0, "max": 0} for row in result["entries"].values())


def test_drift_puts_the_weights_back(work: Workload) -> None:
    before = [p.detach().clone() for p in work.model.parameters()]
    assert measure.drift(row_of("official mezo"), work, 2)["rms"] > 0
    assert all(torch.equal(p, b) for p, b in zip(work.model.parameters(), before, strict=True))


def test_weights_that_are_no_numbers_any_more_are_said(bowl: Bowl) -> None:
    check_finite(bowl)
    bowl.b.data[0] = float("nan")
    with pytest.raises(ZotunerError, match=r"^b is not finite after measuring"):
        check_finite(bowl)


# --- the passes --------------------------------------------------------------------------------------------------


def test_every_step_is_timed_between_two_forwards_and_every_other_round_backwards() -> None:
    calls: list[str] = []

    def run(name: str) -> Callable[[], None]:
        return lambda: calls.append(name)

    times = time_rounds({"a": run("a"), "b": run("b")}, run("-"), 2, lambda: None)
    assert "".join(calls) == "-b-a-" + "-a-b-" + "-b-a-"
    assert all(len(t.steps) == len(t.forwards) == 2 for t in times.values())


def test_a_part_within_a_part_counts_as_the_outer_one() -> None:
    def work() -> Tensor:
        return torch.ones(300, 300) @ torch.ones(300, 300)

    def step() -> None:
        work()
        with record_function("something else"), record_function("zotuner::update"), record_function("zotuner::noise"):
            work()

    found = shares(step)
    assert found["update"] > 0
    assert found["noise"] == 0
    assert sum(found.values()) == pytest.approx(1)


def test_ratios_are_medians_of_the_rounds_own() -> None:
    chosen = [row_of(name) for name in ("mezo gaussian", "zo-finetuner gaussian", "official mezo")]
    times = {
        "mezo gaussian": Times([3.0, 6.0, 100.0], [1.0, 2.0, 50.0]),
        "zo-finetuner gaussian": Times([3.6, 6.6, 100.0], [1.0, 2.0, 50.0]),
        "official mezo": Times([9.0, 12.0, 400.0], [1.0, 2.0, 50.0]),
    }
    found = summarize(chosen, 10, times, {}, dict.fromkeys(times))
    assert found["mezo gaussian"]["per_own_forwards"] == 1.5
    assert found["mezo gaussian"]["official_step_per_step"] == 3.0
    assert found["mezo gaussian"]["per_official_step"] == pytest.approx(1 / 3)
    assert found["zo-finetuner gaussian"]["per_base_step"] == pytest.approx(1.1)
    assert found["zo-finetuner gaussian"]["seconds"] == 6.6
    assert found["official mezo"]["per_official_step"] is None
    assert found["official mezo"]["tokens_per_second"] == pytest.approx(20 / 12)


@pytest.mark.skipif(not LINUX, reason="only Linux can begin a peak anew")
def test_a_peak_begins_anew() -> None:
    before = peak_while(lambda: None)
    high = peak_while(lambda: torch.ones(50_000_000))  # 200 MB
    after = peak_while(lambda: None)
    assert before is not None
    assert high is not None
    assert after is not None
    assert high - before > 190e6
    assert high - after > 150e6


def test_where_a_peak_cannot_begin_anew_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zotuner.bench.machine.CLEAR_REFS", tmp_path / "none" / "clear_refs")
    ran: list[int] = []
    assert peak_while(lambda: ran.append(1)) is None
    assert ran == []


def test_a_plot_without_parts_and_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    show.plot({"adamw": {"shares": None}}, "nothing to show", tmp_path / "empty.png")
    assert (tmp_path / "empty.png").exists()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ZotunerError, match=re.escape(f"{tmp_path / 'folder.png'}: cannot be written")):
        show.plot({}, "no place", tmp_path / "folder.png")


# --- what is measured on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("logits", ["all", "last"])
def test_the_loss_is_that_of_the_next_tokens(work: Workload, logits: str) -> None:
    ids = torch.randint(400, (2, 7), generator=torch.Generator().manual_seed(0))
    other = Workload(work.model, batch_size=2, length=6, logits=logits)
    with torch.no_grad():
        chosen = work.model(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        expected = -(chosen if logits == "all" else chosen[:, -1]).mean()
        assert float(other.loss()) == pytest.approx(float(expected), rel=1e-5)


def test_a_stacked_forward_gives_each_branch_its_loss(work: Workload) -> None:
    with torch.no_grad():
        alone, stacked = work.loss(), work.loss(branches=3)
    assert alone.shape == ()
    assert stacked.tolist() == pytest.approx([float(alone)] * 3, rel=1e-6)


def test_last_logits_alone_are_asked_for(work: Workload) -> None:
    seen: list[dict[str, Any]] = []
    hook = work.model.register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    with torch.no_grad():
        Workload(work.model, batch_size=2, length=6, logits="last").loss()
    hook.remove()
    assert [call["logits_to_keep"] for call in seen] == [1]


@pytest.mark.parametrize(("size", "billions"), [("0.5b", 0.5), ("1.1b", 1.1)])
def test_random_models_have_about_the_size_they_say(size: str, billions: float) -> None:
    with torch.device("meta"):
        model = load(f"random:{size}", "bfloat16")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=0.02)
    assert model.dtype == torch.bfloat16
    assert not model.training


def test_a_random_model_is_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setitem(SIZES, "tiny", {**tiny, "num_key_value_heads": 1})
    one, other = (load("random:tiny", "auto") for _ in range(2))
    assert one.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# --- official-style steps ----------------------------------------------------------------------------------------


def official(name: str, bowl: Bowl, **options: Any) -> Any:
    return getattr(official_code(), name)(bowl, **options)


def seeds(count: int) -> list[int]:
    """The seeds that a new official-style optimizer draws."""
    random = np.random.default_rng(0)
    return [int(random.integers(1_000_000_000)) for _ in range(count)]


def test_an_official_mezo_step_is_that_of_the_papers_algorithm(bowl: Bowl) -> None:
    a, b = bowl.a.detach().clone(), bowl.b.detach().clone()
    lr, eps = 0.01, 1e-2
    official("OfficialMeZO", bowl, lr=lr, eps=eps).step(bowl.loss)
    torch.manual_seed(seeds(1)[0])
    z = [torch.normal(0.0, 1.0, p.shape) for p in (a, b)]
    plus = bowl.at(a + eps * z[0], b + eps * z[1])
    minus = bowl.at(a - eps * z[0], b - eps * z[1])
    c = (plus - minus) / (2 * eps)
    assert abs(c) > 0.1
    torch.testing.assert_close(bowl.a.detach(), a - lr * c * z[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(bowl.b.detach(), b - lr * c * z[1], rtol=0, atol=1e-5)


def test_an_official_fzoo_step_is_that_of_the_papers_algorithm(bowl: Bowl) -> None:
    a, b = bowl.a.detach().clone(), bowl.b.detach().clone()
    lr, eps, count = 0.01, 1e-2, 4
    assert official("OfficialFZOO", bowl, lr=lr, eps=eps, num_perturbations=count).step(bowl.loss) == bowl.at(a, b)
    signs = []
    for seed in seeds(count):
        torch.manual_seed(seed)
        signs.append([(torch.randint(0, 2, p.shape) * 2 - 1).float() for p in (a, b)])
    losses = [bowl.at(a + eps * u, b + eps * v) for u, v in signs]
    mean = sum(losses) / count
    s = (sum((loss - mean) ** 2 for loss in losses) / (count - 1)) ** 0.5
    c = [(loss - bowl.at(a, b)) / (count * s) for loss in losses]
    step_a = sum(ci * u for ci, (u, _) in zip(c, signs, strict=True))
    step_b = sum(ci * v for ci, (_, v) in zip(c, signs, strict=True))
    torch.testing.assert_close(bowl.a.detach(), a - lr * step_a, rtol=0, atol=1e-5)
    torch.testing.assert_close(bowl.b.detach(), b - lr * step_b, rtol=0, atol=1e-5)


def test_official_fzoo_makes_no_step_where_all_losses_are_equal(bowl: Bowl) -> None:
    before = bowl.a.detach().clone()
    official("OfficialFZOO", bowl, lr=1.0).step(lambda: torch.tensor(2.0))
    torch.testing.assert_close(bowl.a.detach(), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "forwards"), [("OfficialMeZO", 2), ("OfficialFZOO", 9)])
def test_official_steps_take_the_forwards_that_their_rows_say(bowl: Bowl, name: str, forwards: int) -> None:
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        return bowl.loss()

    official(name, bowl, lr=0.0).step(closure)
    assert len(calls) == forwards == row_of({"OfficialMeZO": "official mezo"}.get(name, "official fzoo")).forwards


def test_without_the_repository_official_rows_are_left_out_and_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "OFFICIAL", tmp_path / "official.py")
    official_code.cache_clear()
    said: list[str] = []
    try:
        left = [row.name for row in choose(None, said.append)]
    finally:
        official_code.cache_clear()
    assert left == [row.name for row in ROWS if not row.name.startswith("official")]
    assert len(said) == 1
    assert said[0].startswith("left out: official mezo, official fzoo")


def test_on_a_task_the_ways_to_one_step_see_the_same_losses(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "task.json"
    flags = ["--task", "demo-sentiment", "--batch-size", "4", "--rounds", "2", "--out", str(out)]
    assert main(["bench", "--model", str(model_dir), *flags]) == 0
    entries = json.loads(out.read_text())["entries"]
    assert list(entries) == ["candidates share rows", "a sequence a candidate", "products in bfloat16"]
    shared, separate, half = (row["rounds"]["differences"] for row in entries.values())
    assert separate == pytest.approx(shared, rel=1e-2, abs=1e-6)
    assert half == pytest.approx(shared, rel=0.2, abs=1e-5)
    assert entries["candidates share rows"]["per_shared"] == 1
    assert 0 < entries["products in bfloat16"]["difference_error"] < 0.2


def test_an_unknown_task_is_one_line(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--model", str(model_dir), "--task", "sst22"]) == 2
    assert "unknown task 'sst22'; did you mean 'sst2'?" in capsys.readouterr().err


def test_the_cost_of_pertnns_needs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pertnn.json"
    assert main(["bench", "--pertnn", "30", "--rounds", "3", "--model", "no-such-model", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert (result["blocks"], result["rounds"], set(result["entries"])) == (30, 3, {"abs", "exp"})
    assert all(0 < row["min"] <= row["median"] <= row["max"] for row in result["entries"].values())
    assert "30 PertNNs, ms a call" in capsys.readouterr().out
