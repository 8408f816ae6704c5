"""Noise of low rank: z = A B^T / sqrt(r), the same for whoever perturbs and whoever updates."""

import copy
import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import seeded, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_phi3
from torch import Tensor, nn

from zotuner import noise
from zotuner.blocks import find_blocks, pieces_of
from zotuner.optim import FZOO, MeZO
from zotuner.perturb import ENGINES, Draw, Perturbation, Perturber, shift, slot

DRAWS, SIGMAS = 4000, 5.0  # of a statistic, and how many of its standard errors are allowed
IDS = torch.arange(36).view(3, 12) * 7 % 60 + 3

kinds = pytest.mark.parametrize("kind", noise.KINDS)


def z_of(draw: Draw, shape: torch.Size, block: int, start: int) -> Tensor:
    """z in a piece of a block, of full size."""
    if len(shape) < 2:
        stop, at = start + shape.numel(), {"seed": draw.seed, "step": draw.step, "branch": draw.branch}
        return noise.sample(draw.kind, block=block, start=start, stop=stop, **at).view(shape)
    a, b = draw.factors(shape, block, start)
    assert a.shape == (shape.numel() // shape[-1], draw.rank)
    assert b.shape == (shape[-1], draw.rank)
    return sum(torch.outer(a[:, k], b[:, k]) for k in range(draw.rank)).view(shape) / draw.rank**0.5


def moved(model: Any, draws: list[Draw], alphas: list[float], granularity: str = "block") -> Any:
    """A copy whose weights are theta + sum_k alphas[k] z_k."""
    twin = copy.deepcopy(model)
    for number, piece in pieces_of(find_blocks(twin, granularity)):
        shape = piece.view.shape
        piece.view.add_(sum(a * z_of(draw, shape, number, piece.start) for draw, a in zip(draws, alphas, strict=True)))
    return twin


@kinds
@pytest.mark.parametrize("rank", [1, 3])
def test_elements_have_mean_0_variance_1_and_no_correlation(kind: str, rank: int) -> None:
    shape = torch.Size((3, 4))
    z = torch.stack([z_of(Draw(kind, 1, t, rank=rank), shape, 0, 0).reshape(-1) for t in range(DRAWS)]).double()
    assert float(z.mean(dim=0).abs().max()) < SIGMAS / DRAWS**0.5
    products = z[:, :, None] * z[:, None, :]  # (draws, 12, 12)
    error = (products.mean(dim=0) - torch.eye(12)).abs()
    assert bool((error <= SIGMAS * products.std(dim=0) / DRAWS**0.5 + 1e-6).all())
    assert float(products.std(dim=0).max()) < 4  # of z^2, Gaussian factors of rank 1: sqrt(8)


@kinds
def test_z_has_the_rank_that_is_asked_for(kind: str) -> None:
    for rank in (1, 2, 5):
        z = z_of(Draw(kind, 1, 2, rank=rank), torch.Size((40, 30)), 0, 0)
        assert int(torch.linalg.matrix_rank(z)) == rank


class Experts(nn.Module):
    """Two matrices stacked in one parameter; every row goes through both."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->bo", x, self.weight)


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(5, 6)


X = torch.linspace(-1, 1, 24).view(4, 6) ** 3
MODULES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(6, 5), X),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), X),
    "embedding": (lambda: nn.Embedding(9, 5), torch.tensor([[8, 1], [1, 3], [0, 0], [2, 8]])),
    "conv1d": (conv1d, X),
    "experts": (Experts, X),
}


@kinds
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("module", MODULES)
@torch.no_grad()
def test_a_modules_loss_is_that_of_weights_moved_by_z(module: str, rank: int, kind: str) -> None:
    make, x = MODULES[module]
    model: Any = seeded(make)
    draw, alphas = Draw(kind, 3, 7, 2, rank), [0.3] * len(find_blocks(model))

    def closure(branches: int = 1, of: Any = model) -> Tensor:
        means = of(torch.cat([x] * branches)).square().reshape(branches, -1).mean(dim=1)
        return means if branches > 1 else means[0]

    points = [None, *(Perturbation(draw.branched(i), alphas) for i in range(3))]
    expected = [float(closure(of=model if p is None else moved(model, [p.draw], [0.3]))) for p in points]
    assert min(abs(a - b) for a, b in itertools.combinations(expected, 2)) > 1e-4
    for how, size in (("streamed", 1), ("streamed", 4), ("in-place", 1)):
        perturber = Perturber(model, find_blocks(model), engine=how, branch_batch=size)
        assert perturber.losses(closure, points) == pytest.approx(expected, rel=1e-5)
        perturber.settle()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_phi3, tiny_mixtral])
@pytest.mark.parametrize("granularity", ["block", "layer"])
@torch.no_grad()
def test_a_models_loss_is_that_of_weights_moved_by_z(
    make: Any, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot, "CHUNK", 100)
    model = make()
    draw, blocks = Draw("rademacher", 3, 7, 2, rank=2), find_blocks(model, granularity)

    def closure(of: Any = model) -> Tensor:
        return of(input_ids=IDS, labels=IDS).loss

    expected = float(closure(moved(model, [draw], [0.05], granularity)))
    assert abs(expected - float(closure())) > 1e-3
    assert Perturber(model, blocks).loss(closure, draw, [0.05] * len(blocks)) == pytest.approx(expected, rel=1e-5)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_the_update_is_the_sum_over_branches(kind: str, dtype: torch.dtype) -> None:
    for make in (tiny_phi3, tiny_mixtral):
        model = make().to(dtype)
        draw, coefficients = Draw(kind, 3, 7, 1, rank=2), [0.5, -0.25, 0.125]
        expected = moved(model, [draw.branched(1 + k) for k in range(3)], coefficients)
        shift(blocks := find_blocks(model), draw, [coefficients] * len(blocks))
        for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_factors_are_a_function_of_seed_step_branch_and_block_alone() -> None:
    def both(seed: int = 1, step: int = 2, branch: int = 3, block: int = 4, start: int = 5, rank: int = 2) -> Tensor:
        return torch.cat(Draw("gaussian", seed, step, branch, rank).factors((6, 8), block, start))

    first = both()
    others = [both(**{key: 9}) for key in ("seed", "step", "branch", "block", "start")]
    assert torch.equal(both(), first)
    assert len({tuple(factors.reshape(-1).tolist()) for factors in (first, *others)}) == 6


def small_layer() -> nn.Module:
    """One whose vector lies where the factors of its second matrix would, were they numbered as plain noise is."""
    square = {"in_features": 4, "out_features": 4, "bias": False}
    return nn.ModuleList([nn.Sequential(nn.Linear(**square), nn.Linear(**square), nn.LayerNorm(16))])


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("make", [tiny_phi3, tiny_gpt2, small_layer])
@pytest.mark.parametrize("rank", [1, 40])
@torch.no_grad()
def test_no_two_pieces_of_a_block_share_an_element_of_noise(
    make: Any, granularity: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[int, list[tuple[int, int]]] = defaultdict(list)
    sample, add = noise.sample, noise.add

    def noting_sample(kind: str, **at: Any) -> Tensor:
        drawn[at["block"]].append((at["start"], at["stop"]))
        return sample(kind, **at)

    def noting_add(src: Tensor, alpha: Any, **at: Any) -> Tensor:
        drawn[at["block"]].append((at["start"], at["start"] + src.numel()))
        return add(src, alpha, **at)

    monkeypatch.setattr(noise, "sample", noting_sample)
    monkeypatch.setattr(noise, "add", noting_add)
    blocks = find_blocks(make(), granularity)
    shift(blocks, Draw("rademacher", 3, 7, rank=rank), [[0.1]] * len(blocks))
    assert sum(len(ranges) for ranges in drawn.values()) == sum(len(block.pieces) for block in blocks)
    for ranges in drawn.values():
        for (_, stop), (start, _) in itertools.pairwise(sorted(ranges)):
            assert stop <= start


def test_q_k_and_v_of_a_fused_matrix_have_factors_of_their_own() -> None:
    blocks = find_blocks(tiny_phi3())
    draw = Draw("gaussian", 3, 7, rank=1)
    fused = {block.name[-3:]: number for number, block in enumerate(blocks) if "0.self_attn.qkv_proj" in block.name}
    assert fused.keys() == {"[q]", "[k]", "[v]"}
    columns = [draw.factors(blocks[i].params[0].shape, i, 0)[1].reshape(-1) for i in fused.values()]
    for one, other in itertools.combinations(columns, 2):
        assert bool((one != other).all())


@torch.no_grad()
def test_vectors_take_plain_noise() -> None:
    layer = nn.Linear(6, 40)
    before = layer.bias.detach().clone()
    shift(find_blocks(layer), Draw("gaussian", 3, 7, 2, rank=2), [[0.5]] * 2)
    plain = noise.sample("gaussian", seed=3, step=7, branch=2, block=1, start=0, stop=40)
    assert torch.equal(layer.bias.detach(), before + 0.5 * plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_rounded_stochastically_to_a_neighbour(dtype: torch.dtype) -> None:
    weight = torch.full((64, 64), 0.02, dtype=dtype)
    layouts = weight, weight.t(), torch.full((64, 192), 0.02, dtype=dtype)[:, 64:128], weight.view(4, 16, 64)
    for src in layouts:
        draw, spacing = Draw("rademacher", 3, 7, rank=1), torch.finfo(dtype).eps * 2**-6  # 0.02 lies in [2^-6, 2^-5)
        nearest, out = torch.empty_like(src), torch.empty_like(src)
        draw.add(src, [spacing / 4], out=nearest, block=0, start=0)
        assert torch.equal(nearest, src)
        draw.add(src, [spacing / 4], out=out, block=0, start=0, rounding="stochastic")
        z, steps = z_of(draw, src.shape, 0, 0), (out.float() - src.float()) / spacing
        assert bool(((steps == 0) | (steps == z.sign())).all())
        assert float((steps * z).mean()) == pytest.approx(0.25, abs=SIGMAS * (0.25 * 0.75 / 64**2) ** 0.5)


@pytest.mark.parametrize("engine", ENGINES)
def test_null_steps_leave_every_bit_of_double_precision(engine: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)).double()
    with torch.no_grad():
        seeded(lambda: [p.copy_(torch.randn_like(p)) for p in model.parameters()])
    before = [p.detach().clone() for p in model.parameters()]
    opt = MeZO(model, lr=0.0, noise="low-rank", engine=engine)
    for _ in range(10):
        opt.step(lambda: model(torch.ones(2, 4, dtype=torch.float64)).square().sum())
    atol = 0 if engine == "streamed" else 1e-14  # the walk comes home to within rounding
    for p, kept in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), kept, rtol=0, atol=atol)


@kinds
@pytest.mark.parametrize("method", [MeZO, FZOO])
def test_a_step_is_the_formula_with_low_rank_z(method: Any, kind: str) -> None:
    model = tiny_llama()
    opt = method(model, lr=1e-2, eps=1e-2, noise="low-rank", rank=3, factors=kind, seed=9)
    before = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(lambda: model(input_ids=IDS, labels=IDS).loss)
    first, c = (0, 1)[method is FZOO], opt.last.coefficients
    with torch.no_grad():
        draws = [Draw(kind, 9, 0, first + k, 3) for k in range(len(c))]
        expected = moved(before, draws, [-1e-2 * x for x in c])
        plus = moved(before, draws[:1], [1e-2])
        assert opt.last.losses[first] == pytest.approx(float(plus(input_ids=IDS, labels=IDS).loss), rel=1e-6)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    state = opt.state_dict()["param_groups"][0]
    assert (state["rank"], state["factors"]) == (3, kind)
