"""Inspections: scales by type and layer, fresh nets told from trained ones, two tuners compared, on the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from test_cli import assert_one_error_line, call
from tiny import tiny_llama, tiny_opt

from zotuner.block_types import alike
from zotuner.blocks import find_blocks
from zotuner.errors import ZotunerError
from zotuner.inspection.fresh import TOLD_APART, spread_of_fresh, tensors
from zotuner.inspection.sigma import LOSSES, START, Sigmas, compare, sigmas
from zotuner.inspection.tables import LABEL, MOST_CELLS, heat_map
from zotuner.models import load_model
from zotuner.optim.zo_finetuner import Learned
from zotuner.pertnn import ARCHITECTURES, PertNNBank
from zotuner.tuner import BlockInfo, Tuner

MANY = 200  # blocks


def fresh(architecture: str = "abs", seed: int = 0, n: int = MANY, **about: object) -> Tuner:
    """Fresh nets for so many blocks of a made-up model."""
    info = Tuner.for_model(tiny_llama(), architecture, **about).info
    blocks = tuple(BlockInfo(name=f"h.{i}.w", numel=10 + i) for i in range(n))
    return Tuner(info.model_copy(update={"blocks": blocks}), PertNNBank(n, architecture, seed=seed))


def trained(architecture: str = "exp", seed: int = 0) -> Tuner:
    """A tuner of the tiny Llama whose scales differ."""
    tuner = Tuner.for_model(tiny_llama(), architecture, seed=seed)
    with torch.no_grad():
        for number, param in enumerate(tuner.bank.parameters()):
            param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(seed + number)) / 8)
    return tuner


def shown(renderable: object, width: int = 80) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


# Scales


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_scales_at_a_models_statistics_are_those_of_its_first_step(architecture: str) -> None:
    model, tuner = tiny_llama(), trained(architecture)
    _, first = Learned(tuner, model, find_blocks(model)).scales({})
    np.testing.assert_allclose(sigmas(tuner, model).first, first.numpy())


def test_other_losses_are_what_the_second_step_would_be_told() -> None:
    model, tuner = tiny_llama(), trained()
    learned, found = Learned(tuner, model, find_blocks(model)), sigmas(tuner, model)
    for loss, at in zip(LOSSES, found.at, strict=True):
        np.testing.assert_allclose(at, learned.scales({"loss_prev": (loss, loss), "loss_start": START})[1].numpy())


def test_without_a_model_every_net_is_told_the_statistics_it_is_centred_at() -> None:
    tuner = trained()
    features = torch.tensor([[0.0, 0.0, 1.0, tuner.spec.shift[3], math.exp(tuner.spec.shift[4])]])
    assert tuner.spec(features).abs().max() < 1e-5
    raw = tuner.scales(features.expand(21, 5)).double()
    numels = torch.tensor([block.numel for block in tuner.info.blocks]).double()
    expected = raw * torch.sqrt(numels.sum() / (numels * raw**2).sum())
    np.testing.assert_allclose(sigmas(tuner).first, expected.numpy(), rtol=1e-6)
    assert f"mean {tuner.spec.shift[3]:.3g}" in sigmas(tuner).told


def test_at_which_first_loss_other_losses_are_is_told() -> None:
    assert "; at other losses, of a run that began at 2" in sigmas(trained("exp")).told
    assert "began" not in sigmas(trained("abs")).told


def test_embedding_rows_that_only_a_model_can_tell_are_pointed_out() -> None:
    tuner = trained("abs")
    tuner.info = tuner.info.model_copy(update={"embedding_rows": 3})
    assert "embedding tables count whole" in sigmas(tuner).told
    assert "embedding" not in sigmas(tuner, tiny_llama()).told


def test_a_tuner_without_normalisation_shows_sigma_as_it_is() -> None:
    found = sigmas(fresh(normalized=False))
    assert found.name == "sigma"
    assert abs((found.first**2).mean() - 1) > 0.1


def test_a_model_that_the_tuner_was_not_made_for_is_refused() -> None:
    with pytest.raises(ZotunerError, match="does not fit this model"):
        sigmas(trained(), tiny_opt())


def test_layers_are_told_by_their_number_and_several_blocks_in_one_are_averaged() -> None:
    names = ("emb", "h.0.q", "h.2.q", "h.1.q", "h.0.e.0.w", "h.0.e.1.w")
    found = Sigmas(names, np.array([3.0, 1.0, 2.0, 5.0, 2.0, 8.0]), np.ones((3, 6)), "sigma~", "")
    rows = {label: row.tolist() for label, row in found.by_layer().items()}
    assert rows["emb"] == pytest.approx([3.0])
    assert rows["q"] == pytest.approx([1.0, 5.0, 2.0])
    (experts,) = (row for label, row in rows.items() if label.startswith("e."))
    assert experts == pytest.approx([4.0, math.nan, math.nan], nan_ok=True)


# Fresh or trained


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("seed", range(5))
def test_fresh_nets_are_told_from_fresh_nets_by_nothing(architecture: str, seed: int) -> None:
    found = tensors(fresh(architecture, seed))
    assert [one.name for one in found if not one.like_fresh] == []


def test_sampling_errors_are_of_size_one() -> None:
    errors = [(one.mean_errors, one.std_errors) for seed in range(40) for one in tensors(fresh("abs", seed, n=20))[:3]]
    assert np.std(errors, axis=0) == pytest.approx([1.0, 1.0], rel=0.25)


@pytest.mark.parametrize(
    ("change", "told_by"),
    [
        (lambda bank: bank.w1.mul_(1.05), "std_errors"),
        (lambda bank: bank.w2.add_(0.01), "mean_errors"),
        (lambda bank: bank.b1[0, 0].fill_(0.5), "beyond"),
    ],
)
def test_nets_that_moved_are_told_by_what_moved(change: Callable[[PertNNBank], object], told_by: str) -> None:
    tuner = fresh()
    with torch.no_grad():
        change(tuner.bank)
    (changed,) = (one for one in tensors(tuner) if not one.like_fresh)
    assert abs(getattr(changed, told_by)) > (0 if told_by == "beyond" else TOLD_APART)


def test_weights_in_half_precision_are_not_taken_for_trained_ones() -> None:
    tuner = fresh()
    tuner.bank.half().float()  # in place
    assert all(one.like_fresh for one in tensors(tuner))


def test_the_way_from_the_start_is_measured_where_the_seed_is_recorded() -> None:
    still = tensors(fresh("abs", seed=4, config={"seed": 4}))
    assert [one.moved for one in still] == [0.0] * 4
    assert [one.moved for one in tensors(fresh("abs", seed=4))] == [None] * 4
    assert all((one.moved or 0) > 1 for one in tensors(fresh("abs", seed=5, config={"seed": 4})))


def test_the_spread_of_fresh_nets_is_that_of_several_seeds() -> None:
    spreads = np.array([sigmas(fresh("abs", seed)).spread for seed in range(5)])
    assert spread_of_fresh(fresh("abs", seed=9)).endswith(f"{spreads.mean():.4f} +- {spreads.std(ddof=1):.4f}")
    assert sigmas(fresh("exp")).spread < 1e-6


# Two tuners


def test_a_tuner_agrees_with_itself_and_not_with_another_seed() -> None:
    one, other = sigmas(fresh("abs", 1)), sigmas(fresh("abs", 2))
    assert compare(one, one).correlation == pytest.approx(1)
    assert not compare(one, one).log_ratio.any()
    assert abs(compare(one, other).correlation or 1) < 0.3


def test_only_common_blocks_are_compared_in_whatever_order() -> None:
    names = ("a", "b", "c")
    one = Sigmas(names, np.array([1.0, 2.0, 4.0]), np.ones((3, 3)), "sigma~", "")
    other = Sigmas(("d", "c", "a"), np.array([9.0, 2.0, 1.0]), np.ones((3, 3)), "sigma~", "")
    found = compare(one, other)
    assert found.blocks == ("a", "c")
    np.testing.assert_allclose(found.log_ratio, [0, math.log(2)])
    assert "over 2 common blocks, 2 blocks that one alone knows left out: 1.0000" in found.summary


def test_blocks_without_noise_are_left_out_and_counted() -> None:
    names = ("h.0.w", "h.1.w", "h.2.w", "h.3.w")
    one = Sigmas(names, np.array([0.0, 2.0, 4.0, 8.0]), np.ones((3, 4)), "sigma~", "")
    other = Sigmas(names, np.array([1.0, 2.0, 4.0, 0.0]), np.ones((3, 4)), "sigma~", "")
    assert one.spread == pytest.approx(np.log([2.0, 4.0, 8.0]).std())
    assert one.silent == 1
    found = compare(one, other)
    assert "over 2 common blocks, 2 that one gives no noise left out: 1.0000" in found.summary
    assert found.log_ratio.tolist() == [0.0, 0.0]
    assert one.by_layer()["w"].tolist() == pytest.approx([0.0, 2.0, 4.0, 8.0])
    title, row = shown(heat_map(one)).splitlines()[:2]
    assert "0 is 2.000, 9 is 8.000, a dot is none" in title
    assert row.split()[1] == ".059"
    with pytest.raises(ZotunerError, match="both give any noise"):
        compare(one, Sigmas(names[:1], np.ones(1), np.ones((3, 1)), "sigma~", ""))


def test_fresh_nets_share_what_the_tuners_do() -> None:
    several = np.array([sigmas(shared(seed)).spread for seed in range(5)])
    assert spread_of_fresh(shared(9)).endswith(f"{several.mean():.4f} +- {several.std(ddof=1):.4f}")


def shared(seed: int) -> Tuner:
    """A fresh tuner whose blocks of one type share a net."""
    tuner = fresh("abs", seed, config={"bands": 1})
    firsts, of_block = alike(tuner.block_names, 1)
    return Tuner(tuner.info, tuner.bank.chosen(firsts).chosen(of_block))


def test_a_scale_that_is_the_same_everywhere_has_no_correlation() -> None:
    assert "not defined" in compare(sigmas(fresh("exp")), sigmas(fresh("abs"))).summary


def test_tuners_without_a_common_block_are_refused() -> None:
    with pytest.raises(ZotunerError, match="no block in common"):
        compare(sigmas(fresh()), sigmas(trained()))


# On the terminal


def test_the_map_needs_no_colour_and_its_digits_follow_the_scales() -> None:
    names = tuple(f"layers.{i}.a_very_long_name_of_a_module.weight" for i in range(10))
    found = Sigmas(names, 2.0 ** np.arange(10), np.ones((3, 10)), "sigma~", "")
    first, row = shown(heat_map(found)).splitlines()[:2]
    assert first == "0 is 1.000, 9 is 512.000; a digit a layer, first to last"
    assert re.fullmatch(r"\.\.\S{28} 0123456789", row)


def test_more_layers_than_fit_share_digits() -> None:
    names = tuple(f"layers.{i}.w" for i in range(100))
    found = Sigmas(names, np.linspace(1, 2, 100), np.ones((3, 100)), "sigma~", "")
    lines = shown(heat_map(found)).splitlines()
    assert "3 layers a digit" in lines[0]
    assert len(lines[1].split()[1]) == 34
    assert max(map(len, lines)) <= LABEL + 1 + MOST_CELLS < 80


def test_scales_that_are_all_the_same_make_a_map_too() -> None:
    found = Sigmas(("h.0.w", "h.1.w"), np.ones(2), np.ones((3, 2)), "sigma~", "")
    assert len(shown(heat_map(found)).splitlines()[1].split()[1]) == 2


def test_the_command_shows_everything_in_80_columns(
    tmp_path: Path,
    model_dir: Path,
    tuner_dir: Path,
    whole: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = whole("zo-finetuner")
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "80")
    other = tmp_path / "other"
    Tuner.for_model(tiny_llama(hidden_size=16), "abs").save_pretrained(other)
    words = ["--against", tuner_dir, "--model", model_dir, "--run", run, "--plot", tmp_path / "a.png"]
    assert call("tuner", "inspect", tuner_dir, *words) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for part in (
        "the model's own mean",
        "like fresh",
        "of fresh nets, 5 seeds",
        "common blocks: 1.0000",
        "over the run",
    ):
        assert part in " ".join(printed.split()), part
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["no/such"], "no/such: no such tuner"),
        (["smollm2-135m-instruct", "--against", "no/such"], "no/such: no such tuner"),
        (["smollm2-135m-instruct", "--model", "no-such"], "unknown model 'no-such'"),
        (["smollm2-135m-instruct", "--run", "no/such"], "no/such: expected a run's directory"),
        (["smollm2-135m-instruct", "--plot", "no/such/a.png"], "no/such/a.png: cannot be written"),
    ],
)
def test_what_cannot_be_inspected_is_one_line(
    hub: object, capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    assert call("tuner", "inspect", *words) == 2
    assert part in assert_one_error_line(capsys.readouterr().err)


def test_a_run_without_a_tuner_is_refused(
    whole: Callable[[str], Path], tuner_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = whole("mezo")
    capsys.readouterr()
    assert call("tuner", "inspect", tuner_dir, "--run", run) == 2
    assert "expected a run of zo-finetuner" in assert_one_error_line(capsys.readouterr().err)


def test_static_scales_are_shown_and_not_compared_with_fresh_nets(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(model_dir)[0]
    count = len(find_blocks(model))
    sigma = torch.linspace(0.5, 2.0, count)
    Tuner.static(model, sigma, config={"made": "set by hand"}).save_pretrained(tmp_path / "static")
    assert call("tuner", "inspect", tmp_path / "static") == 0
    shown = capsys.readouterr().out
    assert f"{count} blocks (static, block)" in shown
    assert "set by hand" in shown
    assert "spread over blocks" in shown
    assert "fresh" not in shown
