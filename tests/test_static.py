"""Static scales: as an artefact, by hand, from gradients and curvatures by backpropagation; and untrained tuners."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import STEPS
from safetensors.torch import load_file, save_file
from test_cli import argv_of, assert_one_error_line, call, quick, summary_of
from test_meta import Net, loss_of
from tiny import tiny_llama
from torch import Tensor, nn

import zotuner
from zotuner.block_types import block_types
from zotuner.blocks import find_blocks
from zotuner.card import CARD
from zotuner.controls.fresh import by_hand, of_types
from zotuner.controls.measure import statistics_of
from zotuner.controls.scales import FLOOR, Estimate, Statistics, scales_of
from zotuner.errors import ZotunerError
from zotuner.models import load_model, weights_sha256
from zotuner.optim import ZOFineTuner
from zotuner.pertnn import StaticBank
from zotuner.tuner import DESCRIPTION, WEIGHTS, Tuner
from zotuner.tuner_out import ROWS

N = 21  # blocks of `tiny_llama()`


def sigma(seed: int = 0) -> Tensor:
    return torch.rand(N, generator=torch.Generator().manual_seed(seed)) + 0.5


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Tuner.static(tiny_llama(), sigma()).save_pretrained(tmp_path / "static")
    return tmp_path / "static"


# The artefact


def test_a_static_tuner_gives_its_scales_whatever_it_is_told() -> None:
    tuner = Tuner.static(tiny_llama(), sigma())
    assert torch.equal(tuner.scales(random(N, 5)), sigma())
    assert torch.equal(tuner.scales(torch.full((N, 5), float("nan"))), sigma())
    assert torch.equal(tuner.scales(random(2, 5), torch.tensor([7, 3])), sigma()[[7, 3]])


def test_a_saved_static_tuner_comes_back(folder: Path) -> None:
    loaded, made = Tuner.from_pretrained(folder), Tuner.static(tiny_llama(), sigma())
    assert (loaded.info, loaded.sha256()) == (made.info, made.sha256())
    assert torch.equal(loaded.scales(random(N, 5)), sigma())
    assert set(load_file(folder / WEIGHTS)) == {"sigma"}
    assert Tuner.static(tiny_llama(), sigma(1)).sha256() != made.sha256()


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "key sigma"),
        ({"sigma": torch.ones(N - 1)}, "key sigma"),
        ({"sigma": torch.ones(N, dtype=torch.int64)}, "key sigma"),
        ({"sigma": -torch.ones(N)}, "not negative"),
        ({"sigma": torch.zeros(N)}, "not all 0"),
        ({"sigma": torch.full((N,), torch.inf)}, "finite"),
    ],
)
def test_static_scales_that_cannot_be_used_are_refused(folder: Path, tensors: dict[str, Tensor], says: str) -> None:
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ZotunerError, match=says) as caught:
        Tuner.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_as_many_scales_as_blocks_are_asked_for() -> None:
    with pytest.raises(ValueError, match=f"each of {N} blocks"):
        Tuner.static(tiny_llama(), torch.ones(N + 1))


def test_static_scales_of_layers_serve_the_model_they_are_for() -> None:
    model = tiny_llama()
    blocks = find_blocks(model, "layer")
    tuner = Tuner.static(model, torch.linspace(0.5, 2, len(blocks)), granularity="layer")
    opt = zotuner.ZOFineTuner(model, tuner)
    assert [block.name for block in opt.blocks] == [block.name for block in blocks]


def test_static_scales_can_be_trained() -> None:
    bank = StaticBank(sigma())
    bank(random(N, 5))[3].backward()
    assert bank.sigma.grad is not None
    assert bank.sigma.grad.nonzero().tolist() == [[3]]


def tuned(make: Any) -> list[Tensor]:
    """The weights of a network after three steps."""
    model = Net().float()
    opt = make(model)
    for _ in range(3):
        opt.step(lambda: loss_of(model))
    return [p.detach() for p in model.parameters()]


def test_equal_static_scales_are_mezo_bit_for_bit() -> None:
    plain = tuned(lambda m: zotuner.MeZO(m, lr=0.1))
    equal = tuned(lambda m: zotuner.ZOFineTuner(m, Tuner.static(m, torch.full((len(find_blocks(m)),), 2.0)), lr=0.1))
    assert all(torch.equal(a, b) for a, b in zip(plain, equal, strict=True))


def test_equal_static_scales_with_fzoos_estimator_are_fzoo_bit_for_bit() -> None:
    def scaled(model: nn.Module) -> Any:
        tuner = Tuner.static(model, torch.full((len(find_blocks(model)),), 0.5))
        return zotuner.ZOFineTuner(model, tuner, lr=0.1, noise="rademacher", estimator=zotuner.OneSided(3))

    plain, equal = tuned(lambda m: zotuner.FZOO(m, lr=0.1, num_perturbations=3)), tuned(scaled)
    assert all(torch.equal(a, b) for a, b in zip(plain, equal, strict=True))


def test_a_block_of_scale_0_stays() -> None:
    def make(model: nn.Module) -> Any:
        return zotuner.ZOFineTuner(model, Tuner.static(model, torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])), lr=0.1)

    before, after = [p.detach() for p in Net().float().parameters()], tuned(make)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, False, False, False]


# Runs


@pytest.mark.parametrize("estimator", ["two-point", "one-sided"])
def test_a_run_with_a_static_tuner_can_be_replayed(model_dir: Path, tmp_path: Path, estimator: str) -> None:
    words = ["--by-type", "mlp.up_proj.weight=2", "model.embed_tokens.weight=0.5"]
    assert call("tuner", "static", "--model", model_dir, "--out", tmp_path / "t", *words) == 0
    options = {"tuner": tmp_path / "t", "estimator": estimator, "num_perturbations": 3, "lr": 1e-2}
    run = tmp_path / "run"
    assert call("finetune", *argv_of(quick(model_dir, run, method="zo-finetuner", steps=STEPS, **options))) == 0
    summary = summary_of(run)
    assert summary["forwards"] == STEPS * {"two-point": 2, "one-sided": 4}[estimator]
    scales = [json.loads(line) for line in (run / "scales.jsonl").read_text().splitlines()]
    assert scales[1]["scales"] == scales[-1]["scales"]
    assert len(set(scales[1]["scales"])) == 3
    assert call("replay", run, "--out", tmp_path / "model") == 0
    assert weights_sha256(load_model(tmp_path / "model")[0]) == summary["weights_sha256"]


# Untrained, and by hand


def test_init_writes_a_fresh_tuner_whose_card_says_so(model_dir: Path, tmp_path: Path) -> None:
    assert call("tuner", "init", "--model", model_dir, "--out", tmp_path / "t", "--seed", 3) == 0
    tuner, x = Tuner.from_pretrained(tmp_path / "t"), random(20, 5)
    model = load_model(model_dir)[0]
    assert torch.equal(tuner.scales(x), Tuner.for_model(model, "abs", 3).scales(x))
    assert not torch.equal(tuner.scales(x), Tuner.for_model(model, "abs", 4).scales(x))
    card = " ".join((tmp_path / "t" / CARD).read_text().split())
    assert "20 PertNNs (abs" in card
    assert "untrained, with the random weights of seed 3: a control" in card
    assert "trained on" not in card
    assert "Learned" not in card.partition("Method:")[0]
    assert tuner.info.base_weights_sha256 == weights_sha256(model)


def test_init_of_exp_is_mezo(model_dir: Path, tmp_path: Path) -> None:
    assert call("tuner", "init", "--model", model_dir, "--out", tmp_path / "t", "--architecture", "exp") == 0
    assert torch.equal(Tuner.from_pretrained(tmp_path / "t").scales(random(20, 5)), torch.ones(20))


def test_a_tuner_is_replaced_only_on_demand(model_dir: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["tuner", "init", "--model", model_dir, "--out", tmp_path / "t"]
    assert call(*words) == 0
    before = (tmp_path / "t" / WEIGHTS).read_bytes()
    assert call(*words, "--seed", 1) == 2
    assert "--overwrite" in assert_one_error_line(capsys.readouterr().err)
    assert (tmp_path / "t" / WEIGHTS).read_bytes() == before
    assert call(*words, "--seed", 1, "--overwrite") == 0
    assert (tmp_path / "t" / WEIGHTS).read_bytes() != before


def test_a_scale_by_hand_is_that_of_all_blocks_of_its_type() -> None:
    blocks = find_blocks(tiny_llama())
    found = of_types(blocks, {"self_attn.q_proj.weight": 3.0, "model.norm.weight": 0.0})
    for block, value in zip(blocks, found.tolist(), strict=True):
        assert value == (3.0 if "q_proj" in block.name else 0.0 if block.name == "model.norm.weight" else 1.0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mlp.up_proj.wieght=2"], "did you mean 'mlp.up_proj.weight'?"),
        (["mlp.up_proj.weight=-1"], "not negative"),
        (["mlp.up_proj.weight=nan"], "finite"),
        (["mlp.up_proj.weight=1e39"], "at most 1e+06, got 1e+39"),
        (["mlp.up_proj.weight=2", "mlp.up_proj.weight=3"], "mlp.up_proj.weight stands twice"),
        (["mlp.up_proj.weight"], "expected NAME=SIGMA"),
    ],
)
def test_a_mistake_in_a_scale_by_hand_is_one_line(
    model_dir: Path, tmp_path: Path, capsys: Any, words: list[str], says: str
) -> None:
    assert call("tuner", "static", "--model", model_dir, "--out", tmp_path / "t", "--by-type", *words) == 2
    assert says in assert_one_error_line(capsys.readouterr().err)
    assert not (tmp_path / "t").exists()


def test_a_tuner_without_any_scale_is_refused(model_dir: Path, tmp_path: Path, capsys: Any) -> None:
    blocks = find_blocks(load_model(model_dir)[0])
    types = [f"{name}=0" for name in block_types([block.name for block in blocks])]
    words = ["tuner", "static", "--model", model_dir, "--out", tmp_path / "t"]
    assert call(*words, "--layers", "0-1", "--by-type", *types) == 2
    assert "other than 0 for at least one block" in assert_one_error_line(capsys.readouterr().err)
    assert call(*words) == 2
    assert "expected --by-type or --layers" in assert_one_error_line(capsys.readouterr().err)
    assert not (tmp_path / "t").exists()


def test_layers_alone_are_tuned_and_the_rest_stays_as_it_is(model_dir: Path, tmp_path: Path) -> None:
    words = ["tuner", "static", "--model", model_dir, "--layers", "1", "--by-type", "mlp.up_proj.weight=2"]
    assert call(*words, "--out", tmp_path / "t") == 0
    tuner = Tuner.from_pretrained(tmp_path / "t")
    for name, sigma in zip(tuner.block_names, tuner.scales(random(20, 5)).tolist(), strict=True):
        assert sigma == (0.0 if "layers.1." not in name else 2.0 if "up_proj" in name else 1.0)
    model = load_model(model_dir)[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(24).view(2, 12)
    ZOFineTuner(model, tuner, lr=1e-2).step(lambda: model(input_ids=ids, labels=ids).loss)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("layers.1." in name for name in changed)


def test_spans_of_layers_and_scales_may_be_stated_one_flag_each(model_dir: Path, tmp_path: Path) -> None:
    words = ["tuner", "static", "--model", model_dir, "--out", tmp_path / "t", "--layers", "0", "--layers", "1"]
    assert call(*words, "--by-type", "mlp.up_proj.weight=2", "--by-type", "mlp.down_proj.weight=3") == 0
    tuner = Tuner.from_pretrained(tmp_path / "t")
    for name, sigma in zip(tuner.block_names, tuner.scales(random(21, 5)).tolist(), strict=True):
        wanted = {"up_proj": 2.0, "down_proj": 3.0}.get(name.split(".")[-2], 1.0) if "layers." in name else 0.0
        assert sigma == wanted, name


@pytest.mark.parametrize(
    ("span", "says"),
    [
        ("0-9", "--layers 0-9: expected two of the layers 0 to 1"),
        *(("1-0", "the lower one first"), ("a", "FIRST-LAST"), ("1-", "FIRST-LAST")),
    ],
)
def test_a_wrong_span_of_layers_is_one_line(model_dir: Path, tmp_path: Path, capsys: Any, span: str, says: str) -> None:
    assert call("tuner", "static", "--model", model_dir, "--out", tmp_path / "t", "--layers", span) == 2
    assert says in assert_one_error_line(capsys.readouterr().err)


# From statistics to scales


def statistics(gradient: Any, curvature: Any) -> Statistics:
    return Statistics(Estimate(np.array(gradient, float)), Estimate(np.array(curvature, float)), {})


def test_scales_are_the_power_of_the_ratio_at_the_budget_of_mezo() -> None:
    blocks = find_blocks(Net())
    numels = np.array([block.numel for block in blocks], float)
    g, c = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([5.0, 1.0, 2.0, 8.0, 1.0])
    for statistic, ratio in (("gradient-curvature", g / c), ("gradient", g / numels)):
        found = scales_of(statistics(g, c), blocks, statistic, 0.5).numpy()  # type: ignore[arg-type]
        assert (found**2 * numels).sum() == pytest.approx(numels.sum())
        assert found / found[0] == pytest.approx((ratio / ratio[0]) ** 0.25)


def test_a_power_that_leaves_one_block_alone_is_no_overflow() -> None:
    blocks = find_blocks(Net())
    found = scales_of(statistics([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5), blocks, "gradient-curvature", 1e6)
    assert [x > 0 for x in found.tolist()] == [False] * 4 + [True]


def test_an_estimate_below_its_error_is_raised_to_a_part_of_its_types_median() -> None:
    blocks = find_blocks(tiny_llama(num_hidden_layers=3))
    names = [block.name for block in blocks]
    numels = np.array([block.numel for block in blocks], float)
    types, curvature = block_types(names), numels.copy()
    q, norm = types["self_attn.q_proj.weight"], types["model.norm.weight"]
    curvature[q] = numels[q] * [-7.0, 4.0, 2.0]
    curvature[norm] *= -1
    sigma = scales_of(statistics(numels, curvature), blocks, "gradient-curvature", 2.0).numpy()
    relative = sigma / sigma[types["self_attn.k_proj.weight"][0]]
    assert relative[q] == pytest.approx([1 / (FLOOR * 2), 1 / 4, 1 / 2])
    assert relative[norm] == pytest.approx([1 / FLOOR])  # of all blocks' median, which is 1
    unsure = Statistics(Estimate(numels), Estimate(curvature, 50 * numels), {})
    sigma = scales_of(unsure, blocks, "gradient-curvature", 2.0).numpy()
    assert sigma / sigma[0] == pytest.approx(np.ones(len(blocks)))  # all are below a tenth of their error


def test_statistics_without_a_positive_estimate_are_refused() -> None:
    blocks = find_blocks(Net())
    with pytest.raises(ZotunerError, match="no curvature could be told from its error"):
        scales_of(statistics(np.ones(5), -np.ones(5)), blocks, "gradient-curvature", 0.5)
    with pytest.raises(ZotunerError, match="no gradient"):
        scales_of(statistics(-np.ones(5), np.ones(5)), blocks, "gradient", 0.5)


# Measured by backpropagation


def batch_losses(model: Net, count: int) -> list[Any]:
    """Losses of batches that differ."""
    random = torch.Generator().manual_seed(3)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    pairs = [torch.randint(9, (2, 4), generator=random) for _ in range(count)]
    return [lambda x=x, y=y: loss(x, y) for x, y in pairs]


def test_gradient_energy_is_the_mean_product_of_different_batches() -> None:
    model = Net()
    losses, params = batch_losses(model, 4), list(model.parameters())
    found = statistics_of(find_blocks(model), losses, eps=1e-3, seed=0, curvature=False)
    gradients = [torch.autograd.grad(loss(), params) for loss in losses]
    for i in range(len(params)):
        pairs = [float((a[i] * b[i]).sum()) for a in gradients for b in gradients if a is not b]
        assert found.gradient.values[i] == pytest.approx(np.mean(pairs), rel=1e-4, abs=1e-7)
        own = np.mean([float((g[i] ** 2).sum()) for g in gradients])
        assert found.further["gradient_with_noise"][i] == pytest.approx(own, rel=1e-4)
    assert found.curvature is None


def traces_of(model: Net) -> list[float]:
    """tr H_ii of each parameter, exactly."""
    params = list(model.parameters())
    gradients = torch.autograd.grad(loss_of(model), params, create_graph=True)
    out = []
    for gradient, param in zip(gradients, params, strict=True):
        flat = gradient.reshape(-1)
        rows = [torch.autograd.grad(flat[k], param, retain_graph=True)[0].reshape(-1)[k] for k in range(len(flat))]
        out.append(float(torch.stack(rows).sum()))
    return out


def test_curvature_is_the_trace_of_each_blocks_hessian_within_its_error() -> None:
    model = Net()
    before = [p.detach().clone() for p in model.parameters()]
    found = statistics_of(find_blocks(model), [lambda: loss_of(model)] * 300, eps=1e-3, seed=1, curvature=True)
    assert found.curvature is not None
    exact, error = np.array(traces_of(model)), found.curvature.error
    assert (np.abs(found.curvature.values - exact) < 4 * error + 1e-4).all()
    assert (3 * error[:2] < np.abs(exact[:2])).all()
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old, rtol=0, atol=1e-12)
        assert p.grad is None


def test_of_one_batch_the_signal_cannot_be_told() -> None:
    model = Net()
    with pytest.raises(ValueError, match="at least 2"):
        statistics_of(find_blocks(model), batch_losses(model, 1), eps=1e-3, seed=0, curvature=False)


def test_a_loss_that_is_not_finite_names_its_batch() -> None:
    model = Net()
    bad = [*batch_losses(model, 1), lambda: loss_of(model) * float("nan")]
    with pytest.raises(ZotunerError, match="batch 1: expected a finite loss"):
        statistics_of(find_blocks(model), bad, eps=1e-3, seed=0, curvature=False)


@pytest.mark.parametrize("statistic", ["gradient-curvature", "gradient"])
def test_measure_writes_a_tuner_a_table_and_a_card(
    model_dir: Path, tmp_path: Path, capsys: Any, statistic: str
) -> None:
    out = tmp_path / "t"
    words = ["--task", "demo-copa", "--batches", 3, "--batch-size", 2, "--statistic", statistic]
    assert call("tuner", "measure", "--model", model_dir, "--out", out, *words) == 0
    assert "mlp.up_proj.weight" in capsys.readouterr().out
    tuner, table = Tuner.from_pretrained(out), json.loads((out / "measured.json").read_text())
    assert tuner.info.tasks == ("demo-copa",)
    assert [row["name"] for row in table["blocks"]] == list(tuner.block_names)
    assert [row["sigma"] for row in table["blocks"]] == tuner.scales(random(20, 5)).tolist()
    assert ("curvature" in table["blocks"][0]) == (statistic == "gradient-curvature")
    assert (table["statistic"], table["batches"]) == (statistic, 3)
    assert len({row["sigma"] for row in table["blocks"]}) > 10
    card = " ".join((out / CARD).read_text().split())
    assert "measured on demo-copa by backpropagation on 3 batches: a control" in card
    assert "20 fixed numbers (static" in card
    assert json.loads((out / DESCRIPTION).read_text())["architecture"] == "static"


def test_measuring_a_saved_adapter_makes_a_tuner_for_it(model_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = quick(model_dir, run, adapter="lora", adapter_rank=2, method="adam", lr=1e-2, save_model=True)
    assert call("finetune", *argv_of(options)) == 0
    words = ["--task", "demo-copa", "--batches", 2, "--batch-size", 2, "--statistic", "gradient"]
    assert call("tuner", "measure", "--model", run / "model", "--out", tmp_path / "t", *words) == 0
    tuner = Tuner.from_pretrained(tmp_path / "t")
    assert tuner.info.adapter is not None
    assert tuner.info.adapter.rank == 2
    assert all("lora" in name for name in tuner.block_names)


@pytest.mark.parametrize("words", [("tuner", "init"), ("tuner", "static"), ("tuner", "measure"), ("calibrate",)])
def test_help_says_what_a_control_takes(words: tuple[str, ...], capsys: Any) -> None:
    assert call(*words, "--help") == 0
    shown = capsys.readouterr().out
    assert "--model" in shown
    assert "--out" in shown


def test_another_tuner_in_its_place_leaves_no_table_behind(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "t"
    words = ["--task", "demo-copa", "--batches", 2, "--batch-size", 2, "--statistic", "gradient"]
    assert call("tuner", "measure", "--model", model_dir, "--out", out, *words) == 0
    assert call("tuner", "init", "--model", model_dir, "--out", out, "--overwrite") == 0
    assert sorted(path.name for path in out.iterdir()) == sorted([WEIGHTS, DESCRIPTION, CARD])


def test_a_tuner_that_came_while_another_was_made_is_kept(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Two processes with the same --out: the second is told of the first."""

    def meanwhile(*options: Any) -> Tuner:
        assert call("tuner", "init", "--model", model_dir, "--out", tmp_path / "t") == 2
        return by_hand(*options)

    monkeypatch.setattr("zotuner.controls.commands.by_hand", meanwhile)
    assert call("tuner", "static", "--model", model_dir, "--out", tmp_path / "t", "--layers", "0") == 0
    assert f"process {os.getpid()} is writing to it" in capsys.readouterr().err


def test_a_calibration_is_not_replaced_by_another_tuner(model_dir: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["--model", model_dir, "--out", tmp_path / "t"]
    assert call("tuner", "init", *words) == 0
    (tmp_path / "t" / ROWS).write_text("dear")
    assert call("tuner", "init", *words, "--overwrite") == 2
    assert f"holds a calibration ({ROWS}), which would be lost" in capsys.readouterr().err


def test_batches_that_would_share_examples_are_refused(model_dir: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["--task", "demo-copa", "--batches", 99, "--batch-size", 16]
    assert call("tuner", "measure", "--model", model_dir, "--out", tmp_path / "t", *words) == 2
    assert "no two batches may share one" in assert_one_error_line(capsys.readouterr().err)
    assert not (tmp_path / "t").exists()
