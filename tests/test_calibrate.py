"""Calibration: by forward passes alone it finds what autograd says, and goes on where it was killed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from runs import STEPS
from test_cli import argv_of, assert_one_error_line, call, quick, summary_of
from test_meta import Net, X, Y, loss_of
from test_static import traces_of
from torch import Tensor, nn

from zotuner.blocks import find_blocks
from zotuner.card import CARD
from zotuner.controls.calibrate import AT_ONCE, ROWS, calibrate
from zotuner.controls.groups import grouping, solve
from zotuner.controls.scales import Statistics
from zotuner.controls.setting import Setting
from zotuner.errors import Interrupted, ZotunerError
from zotuner.metrics import read_rows
from zotuner.models import load_model
from zotuner.perturb import Perturber
from zotuner.progress import Display
from zotuner.signals import Requests
from zotuner.tasks import Example
from zotuner.tuner import WEIGHTS, Tuner

EXAMPLES = (Example("a", ("b", "c"), 0),)


def setting_of(model: nn.Module, loss: Any) -> Setting:
    """A model and a loss of its own, in place of a task; `loss(model, branches)`."""
    objective = SimpleNamespace(
        task=SimpleNamespace(name="own"),
        training_batch=lambda examples: None,
        loss=lambda model, batch, branches=1: loss(model, branches),
    )
    return Setting(model, objective, EXAMPLES, find_blocks(model), {"base_weights_sha256": "-"})  # type: ignore[arg-type]


def net_loss(model: nn.Module, branches: int) -> Tensor:
    logits = model(X.repeat(branches)).view(branches, len(X), -1)
    losses = torch.stack([nn.functional.cross_entropy(each, Y) for each in logits])
    return losses if branches > 1 else losses[0]


def run(setting: Setting, out: Path, requests: Any = None, **options: Any) -> tuple[Tuner, Statistics]:
    base: dict[str, Any] = {"groups": "types", "statistic": "gradient-curvature", "power": 0.5, "eps": 1e-3}
    given = base | {"batch_size": 1, "seed": 0} | options
    return calibrate(setting, out, Display(Console(quiet=True)), requests or Requests(), **given)


# Against autograd


def test_single_blocks_have_their_gradient_and_trace_within_the_error_that_is_stated(tmp_path: Path) -> None:
    model = Net()
    before = [p.detach().clone() for p in model.parameters()]
    _, found = run(setting_of(model, net_loss), tmp_path, groups="block", forwards=150 * 11)
    gradients = torch.autograd.grad(loss_of(model), list(model.parameters()))
    assert found.curvature is not None
    for estimate, exact in (
        (found.gradient, [float((g**2).sum()) for g in gradients]),
        (found.curvature, traces_of(model)),
    ):
        values, error = estimate.values, estimate.error
        assert error is not None
        positive = np.maximum(exact, 0)  # no estimate is negative
        assert (np.abs(values - positive) < 4 * error + 1e-4).all()
        assert (2 * error[:2] < np.abs(exact[:2])).all()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_the_stated_errors_are_those_of_the_formula(tmp_path: Path) -> None:
    """Var c^2 = 2 (|g|^4 - sum g_a^4) and Var q = 2 (|H|^2 - sum H_aa^2), for signs."""
    model = Quadratic()
    _, found = run(setting_of(model, quadratic_loss), tmp_path, groups="block", forwards=400 * 5, eps=1e-2)
    g = [p.detach() * a for p, a in zip(model.parameters(), model.curvatures, strict=True)]
    for i, each in enumerate(g):
        variance = 2 * float((each**2).sum() ** 2 - (each**4).sum())
        assert found.gradient.error[i] == pytest.approx((variance / 400) ** 0.5, rel=0.2)
    assert found.curvature.error == pytest.approx([0, 0], abs=1e-6)  # a diagonal Hessian: q is its trace


def test_random_groups_tell_single_blocks(tmp_path: Path) -> None:
    model = Quadratic(8)
    _, found = run(setting_of(model, quadratic_loss), tmp_path, groups="3", forwards=250 * 7, eps=1e-2)
    exact = np.array(model.gradients)
    assert found.curvature.values == pytest.approx([16 * a for a in model.curvatures], rel=1e-4)
    assert np.abs(found.gradient.values - exact).max() < 0.25 * exact.max()
    assert (np.abs(found.gradient.values - exact) < 4 * found.gradient.error).all()
    assert np.corrcoef(found.gradient.values, exact)[0, 1] > 0.95


class Quadratic(nn.Module):
    """sum_i a_i |w_i|^2 / 2, in blocks of 16 elements: G_i = a_i^2 |w_i|^2 and C_i = 16 a_i."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.curvatures = [1.0, 20.0, 4.0, 0.5, 8.0, 2.0, 1.0, 5.0][:blocks]
        for i in range(blocks):  # each of a type of its own
            layer = nn.Linear(16, 1, bias=False).double()
            layer.weight.data = torch.randn(1, 16, generator=random, dtype=torch.float64)
            self.add_module(f"w{i}", layer)

    def forward(self, x: Tensor) -> Tensor:  # (rows, 16) -> (rows,)
        outs = [layer(x)[:, 0] for layer in self.children()]
        return sum(a * out**2 / 2 for a, out in zip(self.curvatures, outs, strict=True))  # type: ignore[return-value]

    @property
    def gradients(self) -> list[float]:
        """G_i."""
        return [float(((p.detach() * a) ** 2).sum()) for p, a in zip(self.parameters(), self.curvatures, strict=True)]


def quadratic_loss(model: nn.Module, branches: int) -> Tensor:
    losses = model(torch.eye(16, dtype=torch.float64).repeat(branches, 1)).view(branches, 16).sum(dim=1)
    return losses if branches > 1 else losses[0]


def gain(sigma: Tensor, gradient: list[float], curvatures: list[float]) -> float:
    """How much a step at its best lr lowers the loss: A^2 / (2 (A B + 2 gSHSg)), see docs/method.md."""
    s = sigma.double() ** 2
    g, a = torch.tensor(gradient).double(), torch.tensor(curvatures).double()
    first, second = (s * g).sum(), (s * 16 * a).sum()
    return float(first**2 / (2 * (first * second + 2 * (s**2 * a * g).sum())))


def test_a_quadratic_is_given_its_best_scales(tmp_path: Path) -> None:
    model = Quadratic()
    exact = torch.tensor([g / (16 * a) for g, a in zip(model.gradients, model.curvatures, strict=True)]).sqrt()
    for power in (0.5, 1.0):
        out = tmp_path / str(power)
        out.mkdir()
        tuner, _ = run(setting_of(model, quadratic_loss), out, forwards=300 * 5, eps=1e-2, power=power)
        sigma = tuner.scales(torch.zeros(2, 5))
        assert float(sigma[1] / sigma[0]) == pytest.approx(float(exact[1] / exact[0]) ** power, rel=0.1)
        assert float((16 * sigma**2).sum()) == pytest.approx(32)
    isotropic, best = (gain(s, model.gradients, model.curvatures) for s in (torch.ones(2), exact))
    assert isotropic < gain(sigma, model.gradients, model.curvatures) == pytest.approx(best, rel=0.02)


# Groups


def test_groups_of_types_share_a_scale(model_dir: Path, tmp_path: Path) -> None:
    blocks = find_blocks(load_model(model_dir)[0])
    found = grouping(blocks, "types", 0)
    for unknown in found.unknowns:
        assert len({blocks[i].name.rpartition("layers.")[2].lstrip("0123456789.") for i in unknown}) == 1
    assert sorted(i for unknown in found.unknowns for i in unknown) == list(range(len(blocks)))


def test_random_groups_deal_every_block_once_a_round_and_differ_from_round_to_round() -> None:
    found = grouping(find_blocks(Net()), "2", 5)
    rounds = [found.members(number) for number in range(20)]
    for members in rounds:
        assert members.shape == (2, 5)
        assert (members.sum(axis=0) == 1).all()
        assert set(members.sum(axis=1)) == {2, 3}
    assert len({members.tobytes() for members in rounds}) > 5
    again = grouping(find_blocks(Net()), "2", 5)
    assert all((again.members(n) == members).all() for n, members in enumerate(rounds))


@pytest.mark.parametrize("groups", ["1", "6", "0", "-2", "all", "2.5", ""])
def test_groups_that_cannot_be_are_refused(groups: str) -> None:
    with pytest.raises(ZotunerError, match="expected types, block or a number from 2 to 5"):
        grouping(find_blocks(Net()), groups, 0)


def test_least_squares_finds_values_that_are_not_negative() -> None:
    random = np.random.default_rng(0)
    rows, x = random.random((60, 12)) < 0.3, random.random(12)
    assert solve(rows, rows @ x).values == pytest.approx(x, abs=1e-6)
    x[3] = -2.0
    found = solve(rows, rows @ x).values
    assert found.min() == found[3] == 0
    residual = rows.T @ (rows @ found - rows @ x)
    assert np.abs(residual[found > 0]).max() < 1e-4  # no other value can be better
    assert residual[3] > 0
    assert solve(np.zeros((3, 2), bool), np.ones(3)).values.tolist() == [0, 0]


def test_the_error_of_a_value_that_is_measured_alone_is_that_of_a_mean() -> None:
    values = np.random.default_rng(0).random(30) + 1
    found = solve(np.ones((30, 1), bool), values)
    assert found.values == pytest.approx([values.mean()])
    assert found.error == pytest.approx([values.std(ddof=1) / 30**0.5])
    assert solve(np.eye(2, dtype=bool), np.ones(2)).error is None


# Killed and resumed


class Stopping(Requests):
    """Asks for the end after so many measurements."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._left = after

    def check(self, state: str, resume: str) -> None:
        self._left -= 1
        if self._left == 0:
            self.stop = signal.SIGTERM
        super().check(state, resume)


def test_a_calibration_that_is_stopped_goes_on_without_measuring_anything_twice(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    for out in (whole, part):
        out.mkdir()
    options = {"groups": "block", "forwards": 6 * 11}
    expected, _ = run(setting_of(Net(), net_loss), whole, **options)
    with pytest.raises(Interrupted, match=r"after 4 of 6 measurements; to go on: the same command"):
        run(setting_of(Net(), net_loss), part, Stopping(4), **options)
    asked = []

    def counted(model: nn.Module, branches: int) -> Tensor:
        asked.append(branches)
        return net_loss(model, branches)

    came, _ = run(setting_of(Net(), counted), part, **options)
    assert (part / ROWS).read_bytes() == (whole / ROWS).read_bytes()
    assert came.sha256() == expected.sha256()
    assert 2 * 11 <= sum(asked) <= 2 * 11 + 4  # and the engine's look at the model


def calibrated(model: Path, out: Path, *words: Any) -> int:
    argv = ["--model", model, "--task", "demo-copa", "--out", out, "--batch-size", 2]
    return call("calibrate", *argv, *(words if "--forwards" in words else ("--forwards", 70, *words)))


@pytest.fixture(scope="module")
def finished(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration of three rounds over eleven types of blocks."""
    out = tmp_path_factory.mktemp("calibrated") / "t"
    assert calibrated(model_dir, out) == 0
    return out


@pytest.mark.parametrize("cut", ["between rows", "within a row", "within the first"])
def test_a_killed_calibration_ends_as_if_nothing_had_happened(
    model_dir: Path, finished: Path, tmp_path: Path, cut: str
) -> None:
    lines = (finished / ROWS).read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    left = {"between rows": lines[:3], "within a row": [*lines[:2], lines[2][:20]], "within the first": [lines[0][:9]]}
    out = tmp_path / "t"
    out.mkdir()
    (out / ROWS).write_bytes(b"".join(left[cut]))
    assert calibrated(model_dir, out) == 0
    for name in (ROWS, WEIGHTS, "measured.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()


def test_a_finished_calibration_is_solved_again_with_another_power(
    model_dir: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "t"
    out.mkdir()
    (out / ROWS).write_bytes((finished / ROWS).read_bytes())
    monkeypatch.setattr(Perturber, "losses", lambda *_: pytest.fail("a loss was evaluated"))
    assert calibrated(model_dir, out, "--power", 1) == 0
    twice, once = (Tuner.from_pretrained(folder).scales(torch.zeros(20, 5)) for folder in (out, finished))
    torch.testing.assert_close(twice / twice[0], (once / once[0]) ** 2, rtol=1e-4, atol=0)


def test_more_forwards_add_to_those_that_were_taken(model_dir: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "t"
    out.mkdir()
    (out / ROWS).write_bytes((finished / ROWS).read_bytes())
    assert calibrated(model_dir, out, "--forwards", 92) == 0
    assert (out / ROWS).read_bytes().startswith((finished / ROWS).read_bytes())
    assert len(read_rows(out / ROWS)) == 5


@pytest.mark.parametrize("words", [("--seed", 1), ("--groups", "block"), ("--eps", "1e-2"), ("--batch-size", 3)])
def test_measurements_of_something_else_are_not_used(
    model_dir: Path, finished: Path, capsys: Any, words: tuple[Any, ...]
) -> None:
    before = (finished / ROWS).read_bytes()
    assert calibrated(model_dir, finished, *words, "--forwards", 500) == 2
    error = assert_one_error_line(capsys.readouterr().err)
    assert f"was begun with {words[0][2:].replace('-', '_')}" in error
    assert (finished / ROWS).read_bytes() == before


def test_a_row_that_is_not_the_measurement_it_should_be_is_named(
    model_dir: Path, finished: Path, tmp_path: Path, capsys: Any
) -> None:
    first, _, *rest = (finished / ROWS).read_text().splitlines(keepends=True)
    (tmp_path / ROWS).write_text("".join([first, *rest]))
    assert calibrated(model_dir, tmp_path) == 2
    assert "expected 23 losses of round 0, got" in assert_one_error_line(capsys.readouterr().err)


@pytest.mark.parametrize("loss", ["x", None, [1]])
def test_a_loss_that_is_no_number_is_named(
    model_dir: Path, finished: Path, tmp_path: Path, capsys: Any, loss: object
) -> None:
    first, second, *rest = read_rows(finished / ROWS)
    second["losses"][3] = loss
    (tmp_path / ROWS).write_text("".join(json.dumps(row) + "\n" for row in (first, second, *rest)))
    assert calibrated(model_dir, tmp_path) == 2
    assert "expected 23 losses of round 0, got" in assert_one_error_line(capsys.readouterr().err)


# The command


def test_a_calibrated_tuner_says_what_it_took_and_is_used_like_any_other(
    model_dir: Path, finished: Path, tmp_path: Path
) -> None:
    tuner = Tuner.from_pretrained(finished)
    assert "calibrated on demo-copa by 69 forward passes: a control" in " ".join((finished / CARD).read_text().split())
    assert tuner.info.config["forwards"] == 69 == 3 * (1 + 2 * 11)
    table = json.loads((finished / "measured.json").read_text())["blocks"]
    assert all(row["gradient_se"] > 0 for row in table)
    assert len({row["sigma"] for row in table}) == 11
    run = tmp_path / "run"
    options = quick(model_dir, run, method="zo-finetuner", tuner=finished, steps=STEPS)
    assert call("finetune", *argv_of(options)) == 0
    assert summary_of(run)["forwards"] == 2 * STEPS


def test_no_backward_is_taken(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "backward", lambda *_, **__: pytest.fail("backpropagation"))
    assert calibrated(model_dir, tmp_path / "t", "--forwards", 42, "--groups", "block") == 0
    rows = read_rows(tmp_path / "t" / ROWS)
    assert [len(row["losses"]) for row in rows[1:]] == [1 + 2 * AT_ONCE, 1 + 2 * (20 - AT_ONCE)]


def test_half_precision_weights_are_calibrated_where_they_lie(model_dir: Path, tmp_path: Path) -> None:
    assert calibrated(model_dir, tmp_path / "t", "--dtype", "bfloat16", "--eps", "1e-2") == 0
    assert "sigma" in (tmp_path / "t" / "measured.json").read_text()


def test_too_few_forwards_are_refused_with_how_many_it_takes(model_dir: Path, tmp_path: Path, capsys: Any) -> None:
    assert calibrated(model_dir, tmp_path / "t", "--forwards", 20) == 2
    assert "expected at least 23 for 11 unknowns in rounds of 11 groups" in assert_one_error_line(
        capsys.readouterr().err
    )
    assert calibrated(model_dir, tmp_path / "t", "--forwards", 20, "--groups", 5) == 2
    assert "expected at least 44 for 20 unknowns in rounds of 5 groups" in assert_one_error_line(
        capsys.readouterr().err
    )
    assert not (tmp_path / "t").exists()


def test_a_folder_with_other_files_is_left_alone(model_dir: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert calibrated(model_dir, tmp_path) == 2
    assert "expected an empty folder or a calibration" in assert_one_error_line(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
