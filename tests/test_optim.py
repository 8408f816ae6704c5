"""One contract for every method; each method's formula; the theory they rest on."""

import copy
import math
import pickle
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor, nn

import zotuner
from zotuner import noise
from zotuner.blocks import find_blocks, moments
from zotuner.optim import (
    FZOO,
    LOZO,
    MEAZO,
    HiZOO,
    MeZO,
    MeZOAdam,
    OneSided,
    ZOAdaMU,
    ZOFineTuner,
    ZOOptimizer,
    ZOSGDMomentum,
    ZOSign,
)
from zotuner.optim.updates import Momentum
from zotuner.optim.zo_finetuner import Learned
from zotuner.pertnn import normalize
from zotuner.perturb import ENGINES, Draw, Perturber
from zotuner.quantized import quantize_
from zotuner.tuner import Tuner

IDS = torch.arange(24).view(2, 12) % 13
LR, EPS, SEED = 1e-2, 1e-3, 11

Make = Callable[[nn.Module], ZOOptimizer]


def tuner_of(model: nn.Module) -> Tuner:
    """Random PertNNs whose scales differ from block to block."""
    return Tuner.for_model(model, "abs", seed=5)


OWN = Path(__file__).parent / "own" / "signed.py"  # of docs/adding.md

METHODS: dict[str, Make] = {
    "mezo": lambda m: MeZO(m, lr=LR, eps=EPS, seed=SEED),
    "mezo rademacher": lambda m: MeZO(m, lr=LR, eps=EPS, noise="rademacher", seed=SEED),
    "fzoo": lambda m: FZOO(m, lr=LR, eps=EPS, num_perturbations=4, seed=SEED),
    "zo-finetuner": lambda m: ZOFineTuner(m, tuner_of(m), lr=LR, eps=EPS, seed=SEED),
    "zo-finetuner exp": lambda m: ZOFineTuner(m, Tuner.for_model(m, "exp"), lr=LR, eps=EPS, seed=SEED),
    "zo-finetuner one-sided": lambda m: ZOFineTuner(
        m, tuner_of(m), lr=LR, eps=EPS, noise="rademacher", seed=SEED, estimator=OneSided(4)
    ),
    "zo-finetuner layers": lambda m: ZOFineTuner(
        m, Tuner.for_model(m, "abs", granularity="layer"), lr=LR, eps=EPS, seed=SEED
    ),
    "lozo": lambda m: LOZO(m, lr=LR, eps=EPS, seed=SEED, resample_every=2),
}
PLAIN = tuple(METHODS)  # theta moves by -lr sum_k c_k u_k; tests/test_baselines.py has the equations of the others
METHODS |= {
    "zo-sgd-momentum": lambda m: ZOSGDMomentum(m, lr=LR / 10, eps=EPS, seed=SEED),
    "zo-sgd-momentum layers": lambda m: ZOSGDMomentum(m, lr=LR / 10, eps=EPS, seed=SEED, granularity="layer"),
    "zo-sgd-momentum low-rank": lambda m: ZOSGDMomentum(m, lr=LR / 10, eps=EPS, seed=SEED, noise="low-rank", rank=2),
    "zo-sign": lambda m: ZOSign(m, lr=LR, eps=EPS, seed=SEED),
    "zo-sign one-sided": lambda m: ZOSign(m, lr=LR, eps=EPS, noise="rademacher", seed=SEED, estimator=OneSided(4)),
    "mezo-adam": lambda m: MeZOAdam(m, lr=LR, eps=EPS, seed=SEED),
    "meazo": lambda m: MEAZO(m, lr=LR, eps=EPS, seed=SEED),
    "zo-adamu": lambda m: ZOAdaMU(m, lr=LR, eps=EPS, seed=SEED, total_steps=10),
    "hizoo": lambda m: HiZOO(m, lr=LR, eps=EPS, seed=SEED, smooth=1e-2),
    "zo-finetuner momentum": lambda m: ZOFineTuner(
        m, tuner_of(m), lr=LR / 10, eps=EPS, seed=SEED, update=Momentum(0.9)
    ),
    "one's own": lambda m: runpy.run_path(str(OWN))["SignedMeZO"](m, lr=LR, eps=EPS, seed=SEED),
}


@pytest.fixture(params=METHODS)
def make(request: pytest.FixtureRequest) -> Make:
    return METHODS[request.param]


def closure_of(model: Any) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        return model(input_ids=IDS, labels=IDS).loss.detach()

    return closure


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def z_of(opt: ZOOptimizer, block: int, step: int, branch: int = 0) -> Tensor:
    group = opt.param_groups[0]
    kind = group["noise"]
    if kind == "low-rank":
        draw = Draw(group["factors"], SEED, step, branch, group["rank"], group["resample_every"])
        z = [torch.zeros_like(piece.view) for piece in opt.blocks[block].pieces]
        for out, piece in zip(z, opt.blocks[block].pieces, strict=True):
            draw.add(out, [1.0], out=out, block=block, start=piece.start)
        return torch.cat([out.reshape(-1) for out in z])
    return noise.sample(kind, seed=SEED, step=step, block=block, branch=branch, start=0, stop=opt.blocks[block].numel)


def buffers(state: dict[str, Any]) -> list[Tensor]:
    """Elementwise state in a state_dict."""
    return [tensor for held in state["state"].values() for tensor in held.values()]


def at_engine(opt: ZOOptimizer, engine: str) -> ZOOptimizer:
    """The optimizer, whose losses are evaluated by an engine."""
    opt._perturber = Perturber(opt._perturber._model, opt.blocks, engine=engine)
    return opt


def flat(block: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in block.params])


# The contract


@pytest.mark.parametrize("name", PLAIN)
def test_a_step_equals_the_formula_computed_outside(name: str) -> None:
    model = tiny_llama().eval()
    opt = METHODS[name](model)
    closure = closure_of(model)
    for step in range(3):
        before = [flat(block) for block in opt.blocks]
        opt.step(closure)
        info = opt.last
        assert info is not None
        assert info.step == step
        sigma = [1.0] * len(opt.blocks) if info.scales is None else info.scales.tolist()
        if len(info.losses) == 2:
            expected_c = [(info.losses[0] - info.losses[1]) / (2 * EPS)]
        else:
            base, rest = info.losses[0], torch.tensor(info.losses[1:], dtype=torch.float64)
            expected_c = ((rest - base) / (len(rest) * rest.std(correction=1))).tolist()
        assert info.coefficients == pytest.approx(expected_c, rel=1e-12)
        for i, block in enumerate(opt.blocks):
            first = 0 if len(info.losses) == 2 else 1
            move = sum(c * sigma[i] * z_of(opt, i, step, b) for b, c in enumerate(expected_c, start=first))
            torch.testing.assert_close(flat(block), before[i] - LR * move, rtol=0, atol=1e-6)


def test_the_losses_are_those_at_the_perturbed_weights(make: Make) -> None:
    model = tiny_llama().eval()
    opt = make(model)
    start = [flat(block) for block in opt.blocks]
    opt.step(closure_of(model))
    info = opt.last
    assert info is not None
    sigma = [1.0] * len(opt.blocks) if info.scales is None else info.scales.tolist()
    signs = {
        2: [(0, EPS), (0, -EPS)],
        3: [(0, 0.0), (0, EPS), (0, -EPS)],
        5: [(0, 0.0), *((b, EPS) for b in range(1, 5))],
    }[len(info.losses)]
    twin = tiny_llama().eval()
    for loss, (branch, factor) in zip(info.losses, signs, strict=True):
        for i, block in enumerate(find_blocks(twin, "layer" if len(start) < 10 else "block")):
            at = 0
            moved = start[i] + factor * sigma[i] * z_of(opt, i, 0, branch)
            for tensor in block.params:
                tensor.copy_(moved[at : at + tensor.numel()].view(tensor.shape))
                at += tensor.numel()
        assert loss == pytest.approx(float(closure_of(twin)()), abs=2e-6)


def test_what_a_step_returns_and_reports(make: Make) -> None:
    model = tiny_llama().eval()
    opt = make(model)
    calls = 0
    plain = closure_of(model)

    def counted() -> Tensor:
        nonlocal calls
        calls += 1
        return plain()

    loss = opt.step(counted)
    info = opt.last
    assert info is not None
    assert calls == info.forwards == len(info.losses) == opt.losses_per_step
    assert loss == (sum(info.losses) / 2 if len(info.losses) == 2 else info.losses[0])
    assert isinstance(loss, float)
    assert info.scales is None or info.scales.shape == (len(opt.blocks),)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(make: Make) -> None:
    runs = []
    for seed in (SEED, SEED, SEED + 1):
        model = tiny_llama().eval()
        opt = make(model)
        opt.param_groups[0]["seed"] = seed
        for _ in range(3):
            opt.step(closure_of(model))
        runs.append(weights(model))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_state_dict_continues_to_the_same_bits(make: Make) -> None:
    model = tiny_llama().eval()
    opt = make(model)
    for _ in range(2):
        opt.step(closure_of(model))
    middle, state = copy.deepcopy(model), copy.deepcopy(opt.state_dict())
    for _ in range(2):
        opt.step(closure_of(model))
    resumed = make(middle)
    resumed.load_state_dict(state)
    for _ in range(2):
        resumed.step(closure_of(middle))
    assert same(weights(model), weights(middle))
    assert same(buffers(opt.state_dict()), buffers(resumed.state_dict()))
    assert resumed.last is not None
    assert resumed.last.step == 3


@pytest.mark.parametrize("engine", ENGINES)
def test_a_replay_from_the_losses_alone_gives_the_same_bits(make: Make, engine: str) -> None:
    model = tiny_llama().eval()
    opt, losses = at_engine(make(model), engine), []
    for _ in range(4):
        opt.step(closure_of(model))
        assert opt.last is not None
        losses.append(opt.last.losses)
    twin = tiny_llama().eval()
    replayed = at_engine(make(twin), engine)
    for each in losses:
        replayed.replay(each)
    assert same(weights(model), weights(twin))
    assert same(buffers(opt.state_dict()), buffers(replayed.state_dict()))
    with pytest.raises(ValueError, match=f"has {len(each)} losses, got 1"):
        replayed.replay([0.5])


def test_the_state_survives_torch_save(make: Make, tmp_path: Any) -> None:
    model = tiny_llama().eval()
    opt = make(model)
    opt.step(closure_of(model))
    torch.save(opt.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["param_groups"][0]["step"] == 1
    make(tiny_llama()).load_state_dict(loaded)


def test_learning_rate_schedulers_act(make: Make) -> None:
    model = tiny_llama().eval()
    opt = make(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(opt, start_factor=1.0, end_factor=0.0, total_iters=2)
    for _ in range(2):
        opt.step(closure_of(model))
        scheduler.step()
    assert opt.param_groups[0]["lr"] == 0.0
    before = weights(model)
    opt.step(closure_of(model))
    assert same(before, weights(model))


def test_a_closure_that_raises_leaves_everything_as_it_was(make: Make) -> None:
    model = tiny_llama().eval()
    opt = make(model)
    opt.step(closure_of(model))
    before, state = weights(model), copy.deepcopy(opt.state_dict())
    calls = 0

    def fails_late() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return closure_of(model)()

    with pytest.raises(KeyboardInterrupt):
        opt.step(fails_late)
    assert same(before, weights(model))
    assert str(opt.state_dict()["param_groups"]) == str(state["param_groups"])
    assert same(buffers(opt.state_dict()), buffers(state))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_skips_the_step(make: Make, bad: float) -> None:
    model = tiny_llama().eval()
    opt = make(model)
    opt.step(closure_of(model))
    before, held = weights(model), [tensor.clone() for tensor in buffers(opt.state_dict())]
    kept = {k: v for k, v in opt.param_groups[0].items() if k not in ("params", "step")}
    values = iter([1.0, bad, *[1.0] * 8])
    opt.step(lambda: next(values))
    assert opt.last is not None
    assert opt.last.skipped
    assert same(before, weights(model))
    assert same(held, buffers(opt.state_dict()))
    assert {k: v for k, v in opt.param_groups[0].items() if k not in ("params", "step")} == kept
    opt.step(closure_of(model))
    assert not opt.last.skipped
    assert not same(before, weights(model))


def test_frozen_parameters_stay(make: Make) -> None:
    model = tiny_llama().eval()
    frozen = model.model.layers[0].self_attn.q_proj.weight
    tuner_knows_all = copy.deepcopy(model)
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    del tuner_knows_all
    opt = make(model)
    opt.step(closure_of(model))
    assert torch.equal(frozen, before)
    assert "model.layers.0.self_attn.q_proj.weight" not in [block.name for block in opt.blocks]


def test_parameters_come_with_the_model_alone(make: Make) -> None:
    model = tiny_llama()
    model.lm_head.requires_grad_(False)
    opt = make(model)
    with pytest.raises(ValueError, match="set requires_grad of those to tune, then make the optimizer"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_without_the_model_is_refused(copied: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"MeZO is of one model in memory: copy or save its state_dict\(\) instead"):
        copied(MeZO(tiny_llama()))


def test_empty_parameters_are_no_blocks() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    model.none = nn.Parameter(torch.empty(0, 4))
    opt = ZOFineTuner(model, Tuner.for_model(model), lr=LR, eps=EPS)
    opt.step(lambda: model(torch.ones(1, 3)).sum() + model.none.sum())
    assert [block.name for block in opt.blocks] == ["0.weight", "0.bias"]


def test_no_gradient_is_made_and_the_global_random_state_stays(make: Make) -> None:
    model = tiny_llama().eval()
    opt = make(model)
    state = torch.get_rng_state()
    opt.step(closure_of(model))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_a_method_lowers_the_loss(make: Make) -> None:
    model = tiny_llama().eval()
    opt = make(model)
    opt.param_groups[0]["lr"] /= 4
    first = float(closure_of(model)())
    for _ in range(60):
        opt.step(closure_of(model))
    assert float(closure_of(model)()) < first


@pytest.mark.parametrize(
    "bad", [{"lr": -1.0}, {"lr": math.nan}, {"eps": 0.0}, {"eps": -1e-3}, {"seed": -1}, {"noise": "uniform"}]
)
@pytest.mark.parametrize("kind", [MeZO, FZOO])
def test_bad_arguments_are_refused_by_name(kind: type[ZOOptimizer], bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        kind(nn.Linear(2, 2), **bad)  # type: ignore[arg-type]


def test_fzoo_needs_two_perturbations_at_least() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        FZOO(nn.Linear(2, 2), num_perturbations=1)


# Methods among each other


def test_sigma_one_is_mezo_bit_for_bit() -> None:
    a, b = tiny_llama().eval(), tiny_llama().eval()
    fresh = Tuner.for_model(b, "exp")  # starts at sigma = 1 and is not trained
    one, two = MeZO(a, lr=LR, eps=EPS, seed=SEED), ZOFineTuner(b, fresh, lr=LR, eps=EPS, seed=SEED)
    for _ in range(5):
        assert one.step(closure_of(a)) == two.step(closure_of(b))
    assert same(weights(a), weights(b))
    assert two.last is not None
    assert torch.equal(two.last.scales, torch.ones(len(two.blocks), dtype=torch.float64))


def told(tuner: Tuner) -> list[Tensor]:
    """What a tuner is told from now on, (n, 5) a step."""
    seen: list[Tensor] = []
    original = tuner.scales
    tuner.scales = lambda features, *more: (seen.append(features.clone()), original(features, *more))[1]  # type: ignore[method-assign]
    return seen


def test_the_tuner_is_told_the_step_before() -> None:
    model = tiny_llama().eval()
    tuner = tuner_of(model)
    seen = told(tuner)
    opt = ZOFineTuner(model, tuner, lr=LR, eps=EPS, seed=SEED)
    opt.step(closure_of(model))
    first = opt.last
    statistics = [moments(block) for block in opt.blocks]
    opt.step(closure_of(model))
    assert first is not None
    assert torch.equal(seen[0][:, :3], torch.tensor([0.0, 0.0, 1.0]).expand(len(opt.blocks), 3))
    assert torch.equal(seen[1][:, :2], torch.tensor(first.losses).expand(len(opt.blocks), 2))
    assert torch.equal(seen[1][:, 2], tuner.scales(seen[0]))  # raw, not normalised
    torch.testing.assert_close(seen[1][:, 3:], torch.tensor(statistics))


def test_nets_that_see_relative_losses_are_told_the_first_loss_also_after_a_restart() -> None:
    model = tiny_llama().eval()
    tuner = Tuner.for_model(model, "exp")
    with torch.no_grad():
        tuner.bank.w2.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    opt = ZOFineTuner(model, tuner, lr=LR, eps=EPS, seed=SEED)
    opt.step(closure_of(model))
    assert opt.last is not None
    first = sum(opt.last.losses) / 2
    assert opt.param_groups[0]["loss_start"] == first
    again = copy.deepcopy(model)
    twin = ZOFineTuner(again, tuner, lr=LR, eps=EPS, seed=SEED)
    twin.load_state_dict(opt.state_dict())
    for some, its in ((opt, model), (twin, again)):
        some.step(closure_of(its))
        some.step(closure_of(its))
    assert twin.last is not None
    assert opt.last.scales is not None
    assert torch.equal(opt.last.scales, twin.last.scales)
    raw, _ = Learned(tuner, model, opt.blocks).scales({**opt.param_groups[0], "loss_start": first})
    other, _ = Learned(tuner, model, opt.blocks).scales({**opt.param_groups[0], "loss_start": 2 * first})
    assert opt.param_groups[0]["loss_start"] == first
    assert not torch.allclose(raw, other)


@pytest.mark.parametrize("how", ["streamed", "in-place", "bfloat16", "layer", "one-sided", "8 bits"])
def test_an_update_takes_the_moments_that_the_next_step_is_told(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama().eval()
    model = model.bfloat16() if how == "bfloat16" else quantize_(model, 8) if how == "8 bits" else model
    tuner = Tuner.for_model(model, "abs", seed=5, granularity="layer" if how == "layer" else "block")
    seen = told(tuner)
    estimator, engine = (OneSided(3) if how == "one-sided" else None), ("in-place" if how == "in-place" else "streamed")
    opt = ZOFineTuner(model, tuner, lr=LR, eps=EPS, seed=SEED, estimator=estimator, engine=engine)
    opt.step(closure_of(model))
    expected = torch.tensor([moments(block) for block in opt.blocks])
    with monkeypatch.context() as patch:
        patch.setattr("zotuner.optim.zo_finetuner.moments", None)  # no second pass over the weights
        opt.step(closure_of(model))
    assert torch.equal(seen[1][:, 3:], expected)


def write_by_torch(model: nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters()).add_(1.0)


def write_by_loading(model: nn.Module) -> None:
    model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()})


def write_by_another_optimizer(model: nn.Module) -> None:
    MeZO(model, lr=100.0, eps=EPS, seed=SEED + 1).step(closure_of(model))


@pytest.mark.parametrize("write", [write_by_torch, write_by_loading, write_by_another_optimizer])
def test_moments_of_an_update_are_forgotten_when_somebody_else_writes(write: Callable[[nn.Module], None]) -> None:
    model = tiny_llama().eval()
    tuner = tuner_of(model)
    seen = told(tuner)
    opt = ZOFineTuner(model, tuner, lr=LR, eps=EPS, seed=SEED)
    opt.step(closure_of(model))
    before = torch.tensor([moments(block) for block in opt.blocks])
    write(model)
    after = torch.tensor([moments(block) for block in opt.blocks])
    opt.step(closure_of(model))
    assert torch.equal(seen[1][:, 3:], after)
    assert not torch.equal(before, after)


def test_scales_keep_the_frobenius_budget() -> None:
    model = tiny_llama().eval()
    opt = ZOFineTuner(model, tuner_of(model), lr=LR, eps=EPS, seed=SEED)
    opt.step(closure_of(model))
    numels = torch.tensor([block.numel for block in opt.blocks], dtype=torch.float64)
    assert opt.last is not None
    assert opt.last.scales is not None
    assert float((numels * opt.last.scales**2).sum()) == pytest.approx(float(numels.sum()), rel=1e-12)
    assert opt.last.scales.std() > 0.01


def test_a_tuner_trained_without_the_budget_is_used_without_it() -> None:
    model = tiny_llama().eval()
    tuner = Tuner.for_model(model, "abs", seed=5, normalized=False)
    opt = ZOFineTuner(model, tuner, lr=LR, eps=EPS, seed=SEED)
    opt.step(closure_of(model))
    features = torch.tensor([(0.0, 0.0, 1.0, *moments(block)) for block in find_blocks(tiny_llama())])
    assert opt.last is not None
    torch.testing.assert_close(opt.last.scales, tuner.scales(features).double())


def test_equal_losses_give_fzoo_no_step() -> None:
    model = tiny_llama().eval()
    before = weights(model)
    opt = FZOO(model, lr=LR, num_perturbations=4)
    assert opt.step(lambda: 2.5) == 2.5
    assert opt.last is not None
    assert opt.last.coefficients == (0.0,) * 4
    assert not opt.last.skipped
    assert same(before, weights(model))


def test_the_public_names_are_the_contracts() -> None:
    model = tiny_llama()
    opt = zotuner.MeZO(model, lr=1e-6, eps=1e-3, noise="gaussian", seed=0)
    assert opt.blocks[0].name == "model.embed_tokens.weight"
    assert opt.blocks[0].numel == opt.blocks[0].params[0].numel()
    assert zotuner.FZOO(model, lr=1e-4, eps=1e-3, num_perturbations=8, seed=0).param_groups[0]["noise"] == "rademacher"


# The theory


class Bowl(nn.Module):
    """A smooth function of 60 numbers in two blocks, with a gradient known by autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.linspace(-1, 1, 40))
        self.b = nn.Parameter(torch.linspace(0.5, 1.5, 20))

    def forward(self) -> Tensor:
        return torch.sin(self.a).sum() * 0.3 + (self.b**3).sum() * 0.1 + (self.a[:20] * self.b).sum() * 0.2


def gradient(model: Bowl) -> Tensor:
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(model(), [model.a, model.b])])


@pytest.mark.filterwarnings("ignore:.*read outside")
def test_fzoos_s_squared_is_eps_squared_times_the_gradients_norm() -> None:
    model = Bowl()
    eps, squares = 1e-3, []
    opt = FZOO(model, lr=0.0, eps=eps, num_perturbations=8, seed=1)
    model.double()
    for _ in range(600):
        opt.step(model)
        assert opt.last is not None
        squares.append(torch.tensor(opt.last.losses[1:], dtype=torch.float64).var(correction=1))
    expected = eps**2 * float(gradient(model).square().sum())
    assert float(torch.stack(squares).mean()) == pytest.approx(expected, rel=0.1)


@pytest.mark.filterwarnings("ignore:.*read outside")
@pytest.mark.parametrize("kind", noise.KINDS)
def test_mezos_c_z_is_the_gradient_in_the_mean(kind: str) -> None:
    model, draws = Bowl().double(), 4000
    opt = MeZO(model, lr=0.0, eps=1e-3, noise=kind, seed=SEED)
    estimates = torch.empty(draws, 60, dtype=torch.float64)
    for t in range(draws):
        opt.step(model)
        assert opt.last is not None
        z = torch.cat([z_of(opt, i, t) for i in range(2)]).double()
        estimates[t] = opt.last.coefficients[0] * z
    error = estimates.mean(dim=0) - gradient(model)
    standard_error = estimates.std(dim=0) / math.sqrt(draws)
    assert float((error / standard_error).abs().max()) < 4.5
    assert float((error / standard_error).square().mean()) < 1.6


def test_normalize_leaves_scales_of_one_exactly() -> None:
    assert torch.equal(normalize(torch.ones(3), torch.tensor([7, 11, 13])), torch.ones(3, dtype=torch.float64))
