"""The engines on real architectures: every way to evaluate a loss gives the same one, and leaves no trace."""

import copy
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_perturb import bits, moved, unchanged
from tiny import (
    seeded,
    tiny_gpt2,
    tiny_llama,
    tiny_mamba,
    tiny_mixtral,
    tiny_opt,
    tiny_phi,
    tiny_phi3,
    tiny_qwen2,
    tiny_roberta,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zotuner.blocks import find_blocks
from zotuner.optim import FZOO, LOZO, HiZOO, MeZO, ZOFineTuner, ZOOptimizer, ZOSGDMomentum
from zotuner.perturb import ENGINES, Draw, Perturbation, Perturber, engine, slot
from zotuner.tuner import Tuner

MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "llama tied": lambda: tiny_llama(tie_word_embeddings=True),
    "opt": tiny_opt,
    "gpt2": tiny_gpt2,
    "qwen2": tiny_qwen2,
    "phi": tiny_phi,
    "phi3": tiny_phi3,
    "roberta": tiny_roberta,
    "mixtral": tiny_mixtral,
    "mamba": tiny_mamba,
}
READ_OUTSIDE = {"mamba": 8}  # its mixer reads weight and bias of `conv1d` and of `dt_proj`, in 2 layers
IDS = torch.arange(36).view(3, 12) * 7 % 60 + 3

Point = Perturbation | None


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    """Of an architecture."""
    return request.param


def lively(name: str) -> Any:
    """A model whose loss answers to every weight."""
    model = MODELS[name]()
    with torch.no_grad():
        seeded(lambda: [p.add_(0.15 * torch.randn_like(p)) for p in model.parameters()])
    return model


def closure_of(model: Any, batches: Sequence[Tensor] = (IDS,), asked: list[int] | None = None) -> Callable[..., Tensor]:
    """The loss over some batches, weighted by their rows; notes in `asked` how many branches a call has."""

    def closure(branches: int = 1) -> Tensor:
        if asked is not None:
            asked.append(branches)
        total = torch.zeros(branches)
        for ids in (batch.repeat(branches, 1) for batch in batches):
            losses = F.cross_entropy(model(input_ids=ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
            total += losses.mean(dim=1).view(branches, -1).sum(dim=1)
        total /= sum(len(batch) for batch in batches)
        return total if branches > 1 else total[0]

    return closure


def alphas_of(model: nn.Module) -> list[float]:
    return [0.02 * (1 + i % 3) for i in range(len(find_blocks(model)))]


def points_of(model: nn.Module, kind: str = "rademacher") -> dict[str, list[Point]]:
    """Those of FZOO and of MeZO."""
    draw, alphas = Draw(kind, seed=3, step=7), alphas_of(model)
    return {
        "one-sided": [None, *(Perturbation(draw.branched(i), alphas) for i in (1, 2, 3))],
        "two-point": [Perturbation(draw, alphas), Perturbation(draw, [-a for a in alphas])],
    }


def expected_of(model: nn.Module, points: Sequence[Point], batches: Sequence[Tensor] = (IDS,)) -> list[float]:
    """Losses of copies whose weights `noise.sample` alone has moved."""
    twins = [model if p is None else moved(model, p.draw, list(p.alphas)) for p in points]
    losses = [float(closure_of(twin, batches)()) for twin in twins]
    gap = min(abs(a - b) for a, b in itertools.combinations(losses, 2))
    assert gap > 1e-4, "points that cannot be told apart test nothing"
    return losses


def losses_of(
    perturber: Perturber, closure: Callable[..., Any], points: Sequence[Point]
) -> tuple[list[float], list[str]]:
    """The losses, and the warnings on the way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = perturber.losses(closure, points)
        perturber.settle()
    return losses, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@torch.no_grad()
def test_losses_are_those_of_moved_weights_and_leave_none_moved(name: str, kind: str, engine: str) -> None:
    model = lively(name)
    before = bits(model)
    for points in points_of(model, kind).values():
        perturber = Perturber(model, find_blocks(model), engine=engine, branch_batch=1)
        losses, _ = losses_of(perturber, closure_of(model), points)
        for p, kept in zip(model.parameters(), before.values(), strict=True):
            torch.testing.assert_close(p.detach(), kept, rtol=0, atol=0 if engine == "streamed" else 1e-6)
        model.load_state_dict(before, strict=False)
        assert losses == pytest.approx(expected_of(model, points), rel=1e-6 if engine == "streamed" else 1e-5)


@pytest.mark.parametrize("size", [2, 3, 4])
@torch.no_grad()
def test_stacked_losses_are_the_single_ones(name: str, size: int) -> None:
    model = lively(name)
    before = bits(model)
    for points in points_of(model).values():
        perturber = Perturber(model, find_blocks(model), branch_batch=size, branch_threads=1)
        losses, said = losses_of(perturber, closure_of(model, asked=(asked := [])), points)
        assert losses == pytest.approx(expected_of(model, points), rel=1e-6)
        assert unchanged(model, before)
        if name in READ_OUTSIDE:
            assert set(asked) == {1}
            assert len(said) == 1
            assert "no two perturbations share" in said[0]
        else:
            assert max(asked) == {(2, 4): 2, (3, 4): 2, (4, 4): 4}.get((size, len(points)), 2)  # 4 by 3s are 2 and 2
            assert not said


PARTS: dict[str, Callable[[str], bool]] = {
    "last layer": lambda block: ".1." in block,
    "first layer": lambda block: ".0." in block,
    "norms": lambda block: "norm" in block.lower() or "ln_" in block,
    "embedding": lambda block: "embed" in block or "wte" in block,
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_a_part_of_the_blocks_alone_is_perturbed_right(name: str, part: str, size: int) -> None:
    model = lively(name)
    blocks, draw = find_blocks(model), Draw("rademacher", seed=3, step=7)
    alphas = [0.1 if PARTS[part](block.name) else 0.0 for block in blocks]
    assert 0 < sum(map(bool, alphas)) < len(alphas)
    points: list[Point] = [None, *(Perturbation(draw.branched(i), alphas) for i in (1, 2, 3))]
    expected, before = expected_of(model, points), bits(model)
    perturber = Perturber(model, blocks, branch_batch=size)
    for _ in range(2):  # the first also finds out about the model
        losses, _ = losses_of(perturber, closure_of(model), points)
        assert losses == pytest.approx(expected, rel=1e-5)
        assert unchanged(model, before)


@pytest.mark.parametrize("how", ["scale 0", "frozen"])
@torch.no_grad()
def test_layers_before_the_first_perturbed_one_run_once_for_all_branches(how: str) -> None:
    model, rows = tiny_llama(use_cache=False), dict[str, list[int]]()
    if how == "frozen":
        model.requires_grad_(False).model.layers[1].requires_grad_(True)
    blocks = find_blocks(model)
    alphas = [0.02 if ".1." in block.name else 0.0 for block in blocks]
    points = [Perturbation(Draw("rademacher", seed=3, step=7), [sign * a for a in alphas]) for sign in (1, -1)]
    perturber = Perturber(model, blocks, branch_batch=2)
    perturber.losses(closure_of(model), points)
    for layer, place in itertools.product((0, 1), ("self_attn", "mlp.down_proj")):
        seen = rows.setdefault(f"{layer} {place}", [])
        module = model.get_submodule(f"model.layers.{layer}.{place}")
        module.register_forward_hook(lambda _, __, out, seen=seen: seen.append(len(tree_leaves(out)[0])))
    perturber.losses(closure_of(model), points)
    assert rows == {"0 self_attn": [3], "0 mlp.down_proj": [3], "1 self_attn": [6], "1 mlp.down_proj": [6]}


@torch.no_grad()
def test_who_reads_parameters_outside_of_their_modules_is_told_so_once(name: str) -> None:
    model = lively(name)
    points, perturber = points_of(model)["one-sided"], Perturber(model, find_blocks(model))
    said = [losses_of(perturber, closure_of(model), points)[1] for _ in range(3)]
    count = READ_OUTSIDE.get(name)
    assert [len(each) for each in said] == [1 if count else 0, 0, 0]
    assert not count or said[0][0].startswith(f"{count} parameters are read outside")


@pytest.mark.parametrize("engine", ENGINES)
@torch.no_grad()
def test_small_chunks_give_the_same_losses(name: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "CHUNK", 100)
    model = lively(name)
    points = points_of(model)["one-sided"]
    expected = expected_of(model, points)
    for size in (1, 2):
        losses, _ = losses_of(
            Perturber(model, find_blocks(model), engine=engine, branch_batch=size), closure_of(model), points
        )
        assert losses == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_micro_batches_of_different_sizes_are_stacked_right(name: str) -> None:
    model, batches = lively(name), (IDS[:2], IDS[2:, :7], IDS.repeat(2, 1)[:5, :9])
    for points in points_of(model).values():
        perturber = Perturber(model, find_blocks(model), branch_batch=4)
        losses, said = losses_of(perturber, closure_of(model, batches, asked := []), points)
        assert losses == pytest.approx(expected_of(model, points, batches), rel=1e-6)
        assert name in READ_OUTSIDE or (max(asked) == len(points) and not said)


METHODS: dict[str, Callable[..., ZOOptimizer]] = {
    "mezo": lambda m, **how: MeZO(m, lr=1e-3, eps=1e-2, seed=5, **how),
    "fzoo": lambda m, **how: FZOO(m, lr=1e-3, eps=1e-2, num_perturbations=3, seed=5, **how),
    "zo-finetuner": lambda m, **how: ZOFineTuner(m, Tuner.for_model(m, "abs"), lr=1e-3, eps=1e-2, seed=5, **how),
    "zo-sgd-momentum": lambda m, **how: ZOSGDMomentum(m, lr=1e-3, eps=1e-2, seed=5, **how),
    "hizoo": lambda m, **how: HiZOO(m, lr=1e-3, eps=1e-2, seed=5, smooth=1e-3, **how),
    "lozo": lambda m, **how: LOZO(m, lr=1e-3, eps=1e-2, seed=5, **how),
}


@pytest.mark.filterwarnings("ignore:.*read outside")
@pytest.mark.parametrize("method", METHODS)
def test_every_engine_makes_the_same_step(name: str, method: str) -> None:
    model, found = lively(name), []
    for how in ("streamed", 1), ("streamed", 2), ("streamed", "auto"), ("in-place", 1), ("in-place", 2):
        twin = copy.deepcopy(model)
        METHODS[method](twin, engine=how[0], branch_batch=how[1]).step(closure_of(twin))
        found.append(torch.cat([p.detach().reshape(-1) for p in twin.parameters()]))
    assert float((found[0] - torch.cat([p.detach().reshape(-1) for p in model.parameters()])).abs().max()) > 1e-4
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-6)


class StopHereError(Exception):
    """Raised by a test in the middle of a forward."""


@pytest.mark.filterwarnings("ignore:.*read outside")
@pytest.mark.parametrize("how", [("streamed", 1), ("streamed", 2), ("in-place", 1)], ids=str)
def test_a_closure_that_raises_in_the_middle_leaves_the_model_as_it_was(name: str, how: tuple[str, int]) -> None:
    model = lively(name)
    opt = METHODS["fzoo"](model, engine=how[0], branch_batch=how[1])
    before, held = bits(model), dict(model.named_parameters())
    calls, where = 0, next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear))

    def stop(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise StopHereError

    handle = where.register_forward_hook(stop)
    with pytest.raises(StopHereError):
        opt.step(closure_of(model))
    handle.remove()
    assert dict(model.named_parameters()).keys() == held.keys()
    assert all(p is held[key] for key, p in model.named_parameters())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not model._forward_pre_hooks
    for key, p in held.items():
        torch.testing.assert_close(p.detach(), before[key], rtol=0, atol=0 if how[0] == "streamed" else 1e-6)


@pytest.mark.parametrize("noise", ["gaussian", "low-rank"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_null_steps_leave_every_bit_of_half_precision(dtype: torch.dtype, engine: str, noise: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 1)))
    model.to(dtype)
    before, opt = bits(model), MeZO(model, lr=0.0, eps=1e-2, noise=noise, engine=engine)
    closure = lambda: model(IDS % 20).float().square().mean()  # noqa: E731
    for _ in range(300):
        opt.step(closure)
    assert opt.last is not None
    assert opt.last.coefficients[0] != 0
    assert unchanged(model, before)


@pytest.mark.parametrize("noise", ["rademacher", "low-rank"])
@pytest.mark.parametrize("engine", ENGINES)
def test_updates_far_below_a_spacing_of_half_precision_happen_in_the_mean(engine: str, noise: str) -> None:
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    nn.init.constant_(model.weight, 1.5)  # where values lie 2^-7 apart
    size, losses = 2.0**-10, iter((2.0**-9, 0.0))
    opt = MeZO(model, lr=0.5, eps=0.5, noise=noise, engine=engine, seed=5)
    opt.step(lambda: next(losses))
    assert opt.last is not None
    (c,) = opt.last.coefficients
    assert abs(c) == 2 * size
    z = torch.zeros(64, 64)
    Draw("rademacher", 5, 0, rank=1 if noise == "low-rank" else 0).add(z, [1.0], out=z, block=0, start=0)
    came = -c / abs(c) * z * (model.weight.detach().float() - 1.5)
    assert set(came.unique().tolist()) == {0.0, 2.0**-7}
    assert float(came.mean()) == pytest.approx(size, abs=5 * 2.0**-7 * (7 / 64 / 64**2) ** 0.5)


@torch.no_grad()
def test_auto_stacks_as_many_as_the_weights_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively("llama")
    points = points_of(model)["one-sided"]
    for share, stacked in ((0.0, {1}), (1e9, {1, 4})):  # the first loss is single: it is watched
        monkeypatch.setattr(engine, "TOGETHER_SHARE", share)
        perturber = Perturber(model, find_blocks(model), branch_threads=1)
        losses, said = losses_of(perturber, closure_of(model, asked=(asked := [])), points)
        assert set(asked) == stacked
        assert losses == pytest.approx(expected_of(model, points), rel=1e-6)
        assert not said
