"""Evaluating L(theta + eps u): the right value, and no trace of it afterwards."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama
from torch import Tensor, nn

from zotuner import noise
from zotuner.blocks import find_blocks
from zotuner.perturb import Draw, Perturbation, Perturber, shift, slot

DRAW = Draw("rademacher", seed=3, step=7)
IDS = torch.arange(24).view(2, 12) % 13


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def moved(model: nn.Module, draw: Draw, alphas: list[float]) -> nn.Module:
    """A copy whose weights are theta + alpha z, by `noise.sample` alone."""
    twin = copy.deepcopy(model)
    for number, block in enumerate(find_blocks(twin)):
        z = noise.sample(
            draw.kind, seed=draw.seed, step=draw.step, block=number, branch=draw.branch, start=0, stop=block.numel
        )
        start = 0
        for tensor in block.params:
            tensor.add_(alphas[number] * z[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()
    return twin


def lm_loss(model: Any) -> Callable[[], Tensor]:
    return lambda: model(input_ids=IDS, labels=IDS).loss


@pytest.fixture(params=["llama", "llama tied", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    if request.param == "gpt2":
        return tiny_gpt2().eval()
    return tiny_llama(tie_word_embeddings=request.param.endswith("tied")).eval()


@pytest.mark.parametrize("kind", noise.KINDS)
@torch.no_grad()
def test_the_loss_is_that_of_moved_weights(model: Any, kind: str) -> None:
    draw = Draw(kind, seed=3, step=7, branch=2)
    blocks = find_blocks(model)
    alphas = [0.01 * (1 + i % 3) for i in range(len(blocks))]
    expected = float(lm_loss(moved(model, draw, alphas))())
    assert Perturber(model, blocks).loss(lm_loss(model), draw, alphas) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("branches", [1, 2])
@torch.no_grad()
def test_blocks_of_scale_0_cost_no_noise_and_change_nothing(
    model: Any, branches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = find_blocks(model)
    alphas = [0.01 if "1" in block.name else 0.0 for block in blocks]
    perturber = Perturber(model, blocks, branch_batch=branches)
    points = [Perturbation(DRAW, alphas), Perturbation(DRAW, [-alpha for alpha in alphas])]
    expected = [float(lm_loss(moved(model, DRAW, list(point.alphas)))()) for point in points]

    def stacked(branches: int = 1) -> Tensor:
        logits = model(input_ids=IDS.repeat(branches, 1)).logits[:, :-1]
        labels = IDS.repeat(branches, 1)[:, 1:]
        each = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        losses = each.view(branches, -1).mean(dim=1)
        return losses[0] if branches == 1 else losses

    assert perturber.losses(stacked, points) == pytest.approx(expected, rel=1e-5)
    drawn: set[int] = set()
    original = noise.add

    def add(*args: Any, **kwargs: Any) -> Tensor:
        drawn.add(kwargs["block"])
        return original(*args, **kwargs)

    monkeypatch.setattr(noise, "add", add)
    before = bits(model)
    assert perturber.losses(stacked, points) == pytest.approx(expected, rel=1e-5)
    assert drawn == {number for number, alpha in enumerate(alphas) if alpha}
    drawn.clear()
    perturber.update(DRAW, [[alpha] for alpha in alphas])
    assert drawn == {number for number, alpha in enumerate(alphas) if alpha}
    moving = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moving
    assert all("1" in name for name in moving)


@torch.no_grad()
def test_chunked_rows_give_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(tie_word_embeddings=True).eval()
    blocks = find_blocks(model)
    alphas = [0.01] * len(blocks)
    whole = Perturber(model, blocks).loss(lm_loss(model), DRAW, alphas)
    monkeypatch.setattr(slot, "CHUNK", 100)  # the head and every linear layer go by chunks of a few rows
    assert Perturber(model, blocks).loss(lm_loss(model), DRAW, alphas) == pytest.approx(whole, rel=1e-6)


@torch.no_grad()
def test_an_embedding_draws_noise_for_the_rows_of_the_batch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    table = nn.Embedding(1000, 4)
    drawn: list[list[int]] = []
    original = noise.add_rows

    def counting(src: Tensor, rows: Tensor, alpha: float, **at: Any) -> Tensor:
        drawn.append(rows.tolist())
        return original(src, rows, alpha, **at)

    monkeypatch.setattr(noise, "add_rows", counting)
    ids = torch.tensor([[5, 999, 5]])
    Perturber(table, find_blocks(table)).loss(lambda: table(ids).sum(), DRAW, [0.1])
    assert drawn == [[5, 999]]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_thousand_evaluations_leave_no_bit_changed(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 1)).to(dtype)
    x = torch.ones(2, 6, dtype=dtype)
    before, perturber = bits(model), Perturber(model, blocks := find_blocks(model))
    for step in range(1000):
        perturber.loss(lambda: model(x).sum(), Draw("gaussian", 0, step), [1e-3] * len(blocks))
    assert unchanged(model, before)


@torch.no_grad()
def test_a_closure_that_raises_leaves_weights_and_modules_as_they_were(model: Any) -> None:
    before, blocks = bits(model), find_blocks(model)
    perturber = Perturber(model, blocks)
    inner = model.get_submodule(
        next(name for name, m in model.named_modules() if isinstance(m, nn.LayerNorm) or "norm" in name)
    )

    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = inner.register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        perturber.loss(lm_loss(model), DRAW, [0.1] * len(blocks))
    handle.remove()
    assert unchanged(model, before)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(isinstance(p, nn.Parameter) for m in model.modules() for p in m._parameters.values() if p is not None)


class Penalised(nn.Module):
    """Reads a child's weight from outside that child's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.free = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).sum() + (self.inner.weight**2).sum()


@torch.no_grad()
def test_a_parameter_read_from_outside_is_perturbed_in_place_and_said_so_once() -> None:
    model, x = Penalised(), torch.ones(2, 4)
    blocks, before = find_blocks(model), bits(model)
    perturber = Perturber(model, blocks)

    def closure() -> Tensor:
        return model(x) + model.free.prod()

    alphas = [0.1] * len(blocks)
    twin = moved(model, DRAW, alphas)
    with pytest.warns(UserWarning, match="2 parameters are read outside"):
        came = perturber.loss(closure, DRAW, alphas)
    assert came == pytest.approx(float(twin(x) + twin.free.prod()), rel=1e-6)
    assert unchanged(model, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert perturber.loss(closure, DRAW, alphas) == came


@pytest.mark.parametrize("read", [lambda p: p.item() ** 2, lambda p: float(p) * 3, lambda p: p.tolist()])
@torch.no_grad()
def test_a_value_read_as_a_number_of_pythons_is_read_from_outside(read: Any) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 4)
    model.gain = nn.Parameter(torch.tensor(2.0))
    blocks = find_blocks(model)
    alphas = [0.1] * len(blocks)
    twin = moved(model, DRAW, alphas)
    with pytest.warns(UserWarning, match="1 parameters are read outside"):
        came = Perturber(model, blocks).loss(lambda: model(x).sum() + read(model.gain), DRAW, alphas)
    assert came == pytest.approx(float(twin(x).sum() + read(twin.gain)), rel=1e-6)


@torch.no_grad()
def test_a_first_closure_that_raises_does_not_end_the_watch() -> None:
    model = Penalised()
    blocks = find_blocks(model)
    perturber = Perturber(model, blocks)

    def fails() -> Tensor:
        raise RuntimeError("busy")

    with pytest.raises(RuntimeError, match="busy"):
        perturber.loss(fails, DRAW, [0.1] * len(blocks))
    with pytest.warns(UserWarning, match="read outside"):
        perturber.loss(lambda: model(torch.ones(2, 4)), DRAW, [0.1] * len(blocks))


@torch.no_grad()
def test_a_compiled_model_is_perturbed_too() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    model: Any = torch.compile(plain, backend="eager")
    blocks, x = find_blocks(model), torch.ones(3, 4)
    model(x)  # compiled before the perturbation comes
    before, alphas = bits(plain), [0.1] * len(blocks)
    expected = float(moved(plain, DRAW, alphas)(x).sum())
    assert Perturber(model, blocks).loss(lambda: model(x).sum(), DRAW, alphas) == pytest.approx(expected, rel=1e-6)
    for name, p in plain.named_parameters():  # it walked, and came home to within rounding
        assert torch.allclose(p, before[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "compiled", [lambda m: torch.compile(m, backend="eager"), lambda m: m.compile(backend="eager")]
)
@torch.no_grad()
def test_a_model_compiled_after_its_optimizer_was_made_is_perturbed_too(compiled: Any) -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    blocks, x = find_blocks(plain), torch.ones(3, 4)
    perturber, alphas = Perturber(plain, blocks), [0.1] * len(blocks)
    expected = float(moved(plain, DRAW, alphas)(x).sum())
    model = compiled(plain) or plain
    model(x)
    assert perturber.loss(lambda: model(x).sum(), DRAW, alphas) == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def test_a_forward_that_an_instance_brings_along_is_run_and_kept() -> None:
    table = nn.Embedding(5, 2)
    original = table.forward
    table.forward = doubled = lambda ids: 2 * original(ids)  # type: ignore[method-assign]
    blocks, ids = find_blocks(table), torch.tensor([1, 3])
    alone = nn.Embedding(5, 2)
    alone.load_state_dict(table.state_dict())
    expected = 2 * float(moved(alone, DRAW, [0.1])(ids).sum())
    assert Perturber(table, blocks).loss(lambda: table(ids).sum(), DRAW, [0.1]) == pytest.approx(expected, rel=1e-6)
    assert table.forward is doubled


class Latents(nn.Module):
    """Returns a view of its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))

    def forward(self, n: int) -> Tensor:
        return self.latents.expand(n, -1, -1)


class Reader(nn.Module):
    """Uses a child's view after another child has run."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = Latents()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents(2)
        return (self.layer(x)[:, None] * latents).sum()


@torch.no_grad()
def test_a_view_of_a_parameter_outlives_its_modules_forward() -> None:
    model, x = Reader(), torch.ones(2, 4)
    blocks = find_blocks(model)
    alphas = [0.1] * len(blocks)
    expected = float(moved(model, DRAW, alphas)(x))
    assert Perturber(model, blocks).loss(lambda: model(x), DRAW, alphas) == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def test_reading_a_weights_shape_or_dtype_is_no_reading_from_outside() -> None:
    layer = nn.Linear(3, 2)

    def closure() -> Tensor:
        return layer(torch.ones(1, layer.weight.shape[1], dtype=layer.weight.dtype, device=layer.weight.device)).sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Perturber(layer, find_blocks(layer)).loss(closure, DRAW, [0.1, 0.1])


@pytest.mark.parametrize("build", [lambda: nn.LSTM(3, 5, batch_first=True), lambda: nn.MultiheadAttention(4, 2)])
@torch.no_grad()
def test_modules_that_keep_weights_their_own_way_are_served(build: Callable[[], nn.Module]) -> None:
    model: Any = build().eval()
    width = 3 if isinstance(model, nn.LSTM) else 4
    x = torch.linspace(-1, 1, 2 * 6 * width).view(2, 6, width)

    def closure(module: Any) -> Tensor:
        out = module(x)[0] if isinstance(module, nn.LSTM) else module(x, x, x)[0]
        return out.square().sum()

    blocks, before = find_blocks(model), bits(model)
    alphas = [0.05] * len(blocks)
    expected = float(closure(moved(model, DRAW, alphas)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        came = Perturber(model, blocks).loss(lambda: closure(model), DRAW, alphas)
    assert came == pytest.approx(expected, rel=1e-5)
    assert came != pytest.approx(float(closure(model)), rel=1e-5)
    assert unchanged(model, before)


@torch.no_grad()
def test_a_closure_must_return_one_number() -> None:
    layer = nn.Linear(3, 2)
    perturber = Perturber(layer, find_blocks(layer))
    with pytest.raises(ValueError, match=r"tensor of shape \(2,\)"):
        perturber.loss(lambda: layer(torch.ones(3)))
    with pytest.raises(ValueError, match="None"):
        perturber.loss(lambda: None)  # type: ignore[arg-type, return-value]


def test_shift_moves_by_the_sum_over_branches() -> None:
    model = tiny_llama().eval()
    blocks = find_blocks(model)
    expected = bits(model)
    shift(blocks, DRAW, [[0.5, -0.25]] * len(blocks))
    for number, (name, p) in enumerate(model.named_parameters()):
        z = [
            noise.sample("rademacher", seed=3, step=7, block=number, branch=b, start=0, stop=p.numel()).view(p.shape)
            for b in (0, 1)
        ]
        assert torch.equal(p.detach(), expected[name] + (0.5 * z[0] - 0.25 * z[1]))


class Contained(nn.Module):
    """Reads the parameters that it keeps in containers, which have no forward of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.scales = nn.ParameterDict({"weight": torch.linspace(0.5, 2, 4)})
        self.shifts = nn.ParameterList([torch.linspace(-1, 1, 4), torch.ones(4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scales["weight"] + self.shifts[0] + self.shifts[1].square()


@pytest.mark.parametrize("branch_batch", [1, 2])
@pytest.mark.parametrize("branch_threads", [1, 2])
@torch.no_grad()
def test_parameters_in_a_container_are_perturbed_in_the_module_that_has_it(
    branch_batch: int, branch_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    torch.manual_seed(0)
    model = nn.Sequential(Contained(), nn.Tanh(), Contained())
    before, blocks, x = bits(model), find_blocks(model), torch.linspace(-1, 1, 12).view(3, 4)

    def closure(branches: int = 1, of: nn.Module = model) -> Tensor:
        means = of(x.repeat(branches, 1)).square().view(branches, -1).mean(dim=1)
        return means if branches > 1 else means[0]

    points = [Perturbation(DRAW.branched(k), [0.1] * len(blocks)) for k in range(4)]
    expected = [float(closure(of=moved(model, p.draw, list(p.alphas)))) for p in points]
    perturber = Perturber(model, blocks, branch_batch=branch_batch, branch_threads=branch_threads)
    assert perturber.losses(closure, points) == pytest.approx(expected, rel=1e-5)
    assert unchanged(model, before)
    assert not perturber._copied
