"""The baselines: each against a slow, obvious twin; their state in snapshots and dtypes; fields in every engine."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engines import IDS, MODELS, closure_of, lively
from test_perturb import bits
from tiny import seeded, tiny_gpt2, tiny_llama, tiny_phi3
from torch import Tensor, nn

from zotuner import noise
from zotuner.blocks import find_blocks
from zotuner.optim import (
    LOZO,
    MEAZO,
    HiZOO,
    MeZO,
    MeZOAdam,
    OneSided,
    ZOAdaMU,
    ZOOptimizer,
    ZOSGDMomentum,
    ZOSign,
)
from zotuner.optim.hizoo import along
from zotuner.optim.zo_adamu import annealed
from zotuner.perturb import Chunk, Draw, Field, Held, Perturbation, Perturber, field, shift
from zotuner.perturb.draw import FACTORS
from zotuner.quantized import quantize_
from zotuner.snapshot import latest, optimizer_groups, optimizer_tensors, restore_optimizer, take

LR, EPS, SEED, STEPS = 1e-2, 1e-2, 7, 4
SMOOTH, TOTAL, RANK, KEEP = 0.05, 5, 2, 3

Make = Callable[..., ZOOptimizer]
SHARED: dict[str, Any] = {"lr": LR, "eps": EPS, "seed": SEED}
METHODS: dict[str, Make] = {
    "zo-sgd-momentum": lambda m, **how: ZOSGDMomentum(m, momentum=0.8, **SHARED | how),
    "zo-sign": lambda m, **how: ZOSign(m, **SHARED | how),
    "zo-sign one-sided": lambda m, **how: ZOSign(m, estimator=OneSided(3), **SHARED | how),
    "mezo-adam": lambda m, **how: MeZOAdam(m, momentum=0.8, beta2=0.95, **SHARED | how),
    "meazo": lambda m, **how: MEAZO(m, beta2=0.95, **SHARED | how),
    "zo-adamu": lambda m, **how: ZOAdaMU(m, total_steps=TOTAL, **SHARED | how),
    "hizoo": lambda m, **how: HiZOO(m, smooth=SMOOTH, **SHARED | how),
    "lozo": lambda m, **how: LOZO(m, rank=RANK, resample_every=KEEP, **SHARED | how),
}
BUFFERS = {"zo-sgd-momentum": 1, "mezo-adam": 2, "zo-adamu": 1, "hizoo": 1}  # numbers that are kept for each weight


class Flat:
    """A model as a function of one vector, all blocks one after the other."""

    def __init__(self, model: Any, granularity: str = "block") -> None:
        self.model = copy.deepcopy(model)
        self.blocks = find_blocks(self.model, granularity)
        self.theta = torch.cat([t.reshape(-1) for block in self.blocks for t in block.params])
        self._closure = closure_of(self.model)

    def loss(self, theta: Tensor) -> float:
        """At a vector."""
        tensors = [t for block in self.blocks for t in block.params]
        for tensor, part in zip(tensors, theta.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))
        return float(self._closure())

    def z(self, step: int, branch: int = 0) -> Tensor:
        """Gaussian noise."""
        at = {"seed": SEED, "step": step, "branch": branch, "start": 0}
        parts = [noise.sample("gaussian", block=i, stop=block.numel, **at) for i, block in enumerate(self.blocks)]
        return torch.cat(parts).to(self.theta)

    def projected(self, u: Tensor) -> float:
        """c of a two-point estimate along u."""
        return (self.loss(self.theta + EPS * u) - self.loss(self.theta - EPS * u)) / (2 * EPS)


def momentum_twin(f: Flat) -> Iterator[None]:
    m = torch.zeros_like(f.theta)
    for t in range(STEPS):
        m = 0.8 * m + f.projected(f.z(t)) * f.z(t)
        f.theta = f.theta - LR * m
        yield


def sign_twin(f: Flat) -> Iterator[None]:
    for t in range(STEPS):
        f.theta = f.theta - LR * torch.sign(f.projected(f.z(t)) * f.z(t))
        yield


def one_sided_sign_twin(f: Flat) -> Iterator[None]:
    for t in range(STEPS):
        us = [f.z(t, branch) for branch in (1, 2, 3)]
        g = sum((f.loss(f.theta + EPS * u) - f.loss(f.theta)) * u for u in us)
        f.theta = f.theta - LR * torch.sign(torch.as_tensor(g) / 3)
        yield


def adam_twin(f: Flat) -> Iterator[None]:
    parameter = nn.Parameter(f.theta.clone())
    adam = torch.optim.Adam([parameter], lr=LR, betas=(0.8, 0.95), eps=1e-8)
    for t in range(STEPS):
        parameter.grad = f.projected(f.z(t)) * f.z(t)
        adam.step()
        f.theta = parameter.detach().clone()
        yield


def meazo_twin(f: Flat) -> Iterator[None]:
    v = 0.0
    for t in range(STEPS):
        c = f.projected(f.z(t))
        v = 0.95 * v + 0.05 * c**2
        f.theta = f.theta - LR / (math.sqrt(v / (1 - 0.95 ** (t + 1))) + 1e-8) * c * f.z(t)
        yield


def adamu_twin(f: Flat) -> Iterator[None]:
    m = torch.zeros_like(f.theta)
    for t in range(STEPS):
        alpha, b1, b2 = (annealed(t, TOTAL, phi) for phi in (1.0, 0.1, 1.5))
        fresh, led = alpha**0.5 * f.z(t), m + (1 - alpha) ** 0.5 * f.z(t, branch=1)
        m = b1 * fresh + (1 - b1) * led
        v = b2 * fresh**2 + (1 - b2) * led**2
        f.theta = f.theta - LR * f.projected(m) * m / torch.sqrt(v + 1e-8)
        yield


def hizoo_twin(f: Flat) -> Iterator[None]:
    sigma = torch.ones_like(f.theta)
    for t in range(STEPS):
        u = sigma.sqrt() * f.z(t)
        base, plus, minus = f.loss(f.theta), f.loss(f.theta + EPS * u), f.loss(f.theta - EPS * u)
        estimated = (plus + minus - 2 * base) / (2 * EPS**2) * f.z(t) ** 2 / sigma
        sigma = 1 / ((1 - SMOOTH) / sigma + SMOOTH * estimated.abs())
        f.theta = f.theta - LR * (plus - minus) / (2 * EPS) * sigma.sqrt() * f.z(t)
        yield


def lozo_twin(f: Flat) -> Iterator[None]:
    def z(t: int) -> Tensor:
        parts = []
        for number, block in enumerate(f.blocks):
            start = 0
            for tensor in block.params:
                at = {"kind": "gaussian", "seed": SEED, "block": number}
                if tensor.ndim < 2:
                    parts.append(noise.sample(step=t, start=start, stop=start + tensor.numel(), **at))
                else:
                    n, base = tensor.shape[-1], FACTORS + 2 * RANK * start
                    middle = base + tensor.numel() // n * RANK
                    u = noise.sample(step=t, start=base, stop=middle, **at).view(-1, RANK)
                    v = noise.sample(step=t // KEEP * KEEP, start=middle, stop=middle + n * RANK, **at).view(n, RANK)
                    parts.append((u @ v.t()).reshape(-1) / RANK**0.5)
                start += tensor.numel()
        return torch.cat(parts).to(f.theta)

    for t in range(STEPS):
        f.theta = f.theta - LR * f.projected(z(t)) * z(t)
        yield


TWINS: dict[str, Callable[[Flat], Iterator[None]]] = {
    "zo-sgd-momentum": momentum_twin,
    "zo-sign": sign_twin,
    "zo-sign one-sided": one_sided_sign_twin,
    "mezo-adam": adam_twin,
    "meazo": meazo_twin,
    "zo-adamu": adamu_twin,
    "hizoo": hizoo_twin,
    "lozo": lozo_twin,
}
MODELS_HERE = {"llama tied": lambda: tiny_llama(tie_word_embeddings=True), "gpt2": tiny_gpt2, "phi3": tiny_phi3}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("name", MODELS_HERE)
@torch.no_grad()
def test_each_step_is_that_of_the_twin(method: str, name: str, granularity: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(field, "CHUNK", 100)
    model = MODELS_HERE[name]().double()
    opt, flat = METHODS[method](model, granularity=granularity), Flat(model, granularity)
    before = flat.theta
    for _ in TWINS[method](flat):
        opt.step(closure_of(model))
        theta = torch.cat([t.reshape(-1) for block in opt.blocks for t in block.params])
        torch.testing.assert_close(theta, flat.theta, rtol=0, atol=2e-7)
        assert float((theta - before).abs().mean()) > 1e-5
        before = theta


def test_the_three_phases_of_annealing() -> None:
    for phi in (1.0, 0.1, 1.5):
        came = [annealed(t, 1000, phi) for t in range(1000)]
        assert set(came[:51]) == {1.0}
        assert all(a > b for a, b in itertools.pairwise(came[50:750]))
        assert len(set(came[800:])) == 1
        assert came[-1] == pytest.approx((1 + math.cos(math.pi * 0.75 / (1 - 0.2 * phi))) / 2)


def test_no_momentum_is_mezo_and_no_smoothing_too() -> None:
    runs = []
    for make, own in ((MeZO, {}), (ZOSGDMomentum, {"momentum": 0.0}), (HiZOO, {"smooth": 0.0})):
        model = tiny_llama()
        opt = make(model, **SHARED, **own)
        for _ in range(3):
            opt.step(closure_of(model))
        runs.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(runs[2], runs[0], rtol=0, atol=1e-6)


def test_signs_of_rademacher_noise_are_that_noise() -> None:
    model = nn.Linear(8, 3)
    before, opt = bits(model), ZOSign(model, noise="rademacher", **SHARED)
    opt.step(lambda: model(torch.ones(8)).sum())
    assert opt.last is not None
    for number, (name, p) in enumerate(model.named_parameters()):
        z = noise.sample("rademacher", seed=SEED, step=0, block=number, start=0, stop=p.numel()).view(p.shape)
        expected = before[name] - LR * math.copysign(1, opt.last.coefficients[0]) * z
        assert torch.equal(p.detach(), expected)


def test_a_method_comes_down_in_a_bowl(method: str) -> None:
    x = torch.eye(6) * torch.linspace(0.5, 2, 6)
    model = seeded(lambda: nn.Linear(6, 2, bias=False))
    lr = {"zo-sgd-momentum": 1e-3, "lozo": 1e-2, "zo-adamu": 1e-2}.get(method, 5e-2)  # the best of a rough grid
    opt = METHODS[method](model, eps=1e-3, lr=lr)

    def loss() -> Tensor:
        return (model(x) - 1).square().sum()

    start = float(loss().detach())
    for _ in range(200):
        opt.step(loss)
    assert float(loss().detach()) < start / 4


# State


def test_what_is_kept_for_each_weight_is_no_more_than_the_method_needs(method: str) -> None:
    model = tiny_llama(tie_word_embeddings=True).to(torch.bfloat16)
    opt = METHODS[method](model)
    opt.step(closure_of(model))
    held = [tensor for state in opt.state.values() for tensor in state.values()]
    assert sum(tensor.numel() for tensor in held) == BUFFERS.get(method, 0) * sum(p.numel() for p in model.parameters())
    assert all(tensor.dtype == torch.float32 for tensor in held)
    assert all(state[name].shape == p.shape for p, state in opt.state.items() for name in state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["zo-sgd-momentum", "mezo-adam", "zo-adamu", "hizoo", "meazo"])
def test_a_run_goes_on_from_a_snapshot_with_the_same_bits(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_llama().to(dtype)
    opt = METHODS[method](model, lr=0.1)
    for _ in range(3):
        opt.step(closure_of(model))
    take(tmp_path, 3, model, optimizer_tensors(opt), {"groups": optimizer_groups(opt)})
    held = {key: tensor.clone() for key, tensor in optimizer_tensors(opt).items()}
    for _ in range(2):
        opt.step(closure_of(model))
    other = tiny_llama(seed=1).to(dtype)
    resumed, snapshot = METHODS[method](other), latest(tmp_path)
    assert snapshot is not None
    restore_optimizer(resumed, snapshot.state["groups"], snapshot.restore(other))
    restored = optimizer_tensors(resumed)
    assert restored.keys() == held.keys()
    assert all(restored[key].dtype == held[key].dtype and torch.equal(restored[key], held[key]) for key in held)
    if BUFFERS.get(method):
        assert any(not torch.equal(tensor, tensor.to(torch.bfloat16).float()) for tensor in held.values())
    for _ in range(2):
        resumed.step(closure_of(other))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    once, twice = optimizer_tensors(opt), optimizer_tensors(resumed)
    assert all(torch.equal(once[key], twice[key]) for key in once)


def test_a_state_without_what_a_method_keeps_lets_it_begin_anew() -> None:
    model = tiny_llama()
    opt = MeZOAdam(model)
    opt.load_state_dict(MeZO(model).state_dict())
    opt.step(closure_of(model))
    assert len(opt.state) == len(list(model.parameters()))


def test_loading_a_state_shares_no_memory_with_it() -> None:
    model = tiny_llama()
    opt = ZOSGDMomentum(model)
    state = opt.state_dict()
    other = ZOSGDMomentum(model)
    other.load_state_dict(state)
    other.step(closure_of(model))
    assert not any(tensor.any() for held in state["state"].values() for tensor in held.values())


@pytest.mark.parametrize("method", BUFFERS)
def test_quantised_weights_are_refused_in_a_line(method: str) -> None:
    model = quantize_(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"keeps numbers for each element, for which 0\.weight, which is") as no:
        METHODS[method](model)
    assert "\n" not in str(no.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: ZOSGDMomentum(m, momentum=1.0), "momentum must be"),
        (lambda m: MeZOAdam(m, beta2=-0.1), "beta2 must be"),
        (lambda m: MeZOAdam(m, momentum=2.0), "momentum must be"),
        (lambda m: MEAZO(m, beta2=1.0), "beta2 must be"),
        (lambda m: HiZOO(m, smooth=1.0), "smooth must be"),
        (lambda m: HiZOO(m, noise="rademacher"), "HiZOO's noise is 'gaussian'"),
        (lambda m: ZOAdaMU(m, noise="low-rank"), "ZOAdaMU's noise is 'gaussian'"),
        (lambda m: ZOAdaMU(m, total_steps=0), "total_steps must be"),
        (lambda m: LOZO(m, noise="gaussian"), "LOZO's noise is 'low-rank'"),
        (lambda m: LOZO(m, resample_every=0), "resample_every must be"),
    ],
)
def test_arguments_out_of_range_are_named(make: Callable[[nn.Module], ZOOptimizer], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make(nn.Linear(2, 2))


@pytest.mark.parametrize("method", ["mezo-adam", "zo-adamu", "hizoo"])
def test_a_sweep_has_the_same_bits_on_any_number_of_threads(method: str) -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            model = nn.Sequential(nn.Linear(1500, 700, bias=False), nn.Linear(700, 1501))
            for number, p in enumerate(model.parameters()):
                p.data.fill_(0.1 + number)
            opt = METHODS[method](model)
            for losses in ((0.7, 0.6, 0.9), (0.7, 0.8, 0.5)):
                opt.replay(losses[: opt.losses_per_step])
            found.append(list(bits(model).values()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


# Fields


def bent(model: nn.Module) -> tuple[Field, list[Tensor]]:
    """A direction that hangs on a state of its own for each element, and the state of each block, flat."""
    blocks = find_blocks(model)
    state = {p: {"hessian": seeded(lambda p=p: 0.5 + torch.rand_like(p), p.numel())} for p in model.parameters()}
    held = [torch.cat([piece.of(state[piece.param]["hessian"]).reshape(-1) for piece in b.pieces]) for b in blocks]
    return Field(Draw("gaussian", 3, 7), along, Held(blocks, state)), held


def bent_model(model: nn.Module, held: list[Tensor], branch: int, alpha: float) -> nn.Module:
    """A copy at theta + alpha z / sqrt(h)."""
    twin = copy.deepcopy(model)
    for number, (block, h) in enumerate(zip(find_blocks(twin), held, strict=True)):
        u = noise.sample("gaussian", seed=3, step=7, block=number, branch=branch, start=0, stop=block.numel) / h.sqrt()
        for tensor, part in zip(block.params, u.split([t.numel() for t in block.params]), strict=True):
            tensor.add_(alpha * part.view(tensor.shape))
    return twin


@pytest.mark.filterwarnings("ignore:.*read outside")
@pytest.mark.parametrize(
    "how", [("streamed", 1, 1), ("streamed", 4, 1), ("streamed", 2, 2), ("in-place", 1, 1)], ids=str
)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_losses_along_a_field_are_those_of_moved_weights_in_every_engine(
    name: str, how: tuple[str, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(field, "CHUNK", 100)
    model = lively(name)
    before, (direction, held) = bits(model), bent(model)
    alphas = [0.02] * len(held)
    points = [
        None,
        Perturbation(direction, alphas),
        Perturbation(direction, [-a for a in alphas]),
        Perturbation(direction.branched(1), alphas),
    ]
    twins = [bent_model(model, held, branch, alpha) for branch, alpha in ((0, 0.0), (0, 0.02), (0, -0.02), (1, 0.02))]
    expected = [float(closure_of(twin)()) for twin in twins]
    assert min(abs(a - b) for i, a in enumerate(expected) for b in expected[:i]) > 1e-4
    engine, batch, threads = how
    perturber = Perturber(model, find_blocks(model), engine=engine, branch_batch=batch, branch_threads=threads)
    losses = perturber.losses(closure_of(model), points)
    perturber.settle()
    assert losses == pytest.approx(expected, rel=1e-5)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[key], rtol=0, atol=0 if engine == "streamed" else 1e-6)


@pytest.mark.parametrize("engine", ["streamed", "in-place"])
@torch.no_grad()
def test_a_sweep_along_a_field_adds_its_branches(engine: str) -> None:
    model = lively("gpt2")
    direction, held = bent(model)
    expected = bent_model(bent_model(model, held, 0, 0.1), held, 1, -0.2)
    perturber = Perturber(model, blocks := find_blocks(model), engine=engine)
    if engine == "in-place":
        perturber.visit([Perturbation(direction, [0.5] * len(blocks))])
    perturber.update(direction, [[0.1, -0.2]] * len(blocks))
    for came, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(came, wanted, rtol=0, atol=2e-6)


def test_a_field_of_another_making_is_no_place_on_the_way_home() -> None:
    model = nn.Linear(3, 2)
    before, (direction, _) = bits(model), bent(model)
    perturber = Perturber(model, find_blocks(model), engine="in-place")
    perturber.visit([Perturbation(direction, [0.5, 0.5])])
    perturber.update(Field(direction.draw, lambda chunk: torch.ones_like(chunk.like), direction.held), [[1.0]] * 2)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[key] + 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_changes_far_below_a_spacing_happen_in_the_mean(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.full((300, 200), 1.5, dtype=dtype))
    module = nn.Module()
    module.weight = weight
    blocks = find_blocks(module)
    spacing = torch.finfo(dtype).eps

    def change(chunk: Chunk) -> Tensor:
        return torch.full_like(chunk.like, spacing / 8)

    with torch.no_grad():
        shift(blocks, Field(Draw("gaussian", 3, 7), change, Held(blocks, {})), [[1.0]], "stochastic")
    came = weight.detach().float() - 1.5
    assert set(came.unique().tolist()) == {0.0, spacing}
    assert float(came.mean()) == pytest.approx(spacing / 8, rel=0.05)


def test_scalars_and_empty_tensors_are_swept_too() -> None:
    module = nn.Module()
    module.one, module.none = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.empty(0, 3))
    opt = ZOSGDMomentum(module, lr=1.0, eps=1.0, momentum=0.5)
    opt.replay((3.0, 1.0))
    z = float(noise.sample("gaussian", seed=0, step=0, block=0, start=0, stop=1))
    assert float(module.one.detach()) == pytest.approx(2 - z)


def test_ids_are_looked_up_and_checked_along_a_field() -> None:
    table = nn.Embedding(10, 4)
    direction, _ = bent(table)
    with pytest.raises(IndexError):
        Perturber(table, find_blocks(table)).loss(lambda: table(IDS + 10).sum(), direction, [0.1])
