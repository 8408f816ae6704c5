"""Forwards side by side: the same losses as one after the other, whatever the architecture, and nothing left behind."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_engines import MODELS, READ_OUTSIDE, closure_of, expected_of, lively, losses_of, points_of
from test_perturb import bits, unchanged
from tiny import seeded, tiny_llama
from torch import Tensor, nn

from zotuner.blocks import find_blocks
from zotuner.optim import FZOO, MeZO
from zotuner.perturb import Draw, Perturbation, Perturber, engine
from zotuner.perturb.lanes import arrange, deal, side_by_side, spread


@pytest.fixture(autouse=True)
def four_cores() -> Any:
    """As many threads as the tests speak of, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def in_threads(closure: Callable[..., Tensor], met: set[int]) -> Callable[..., Tensor]:
    """The same closure; notes in `met` which threads call it."""

    def noting(branches: int = 1) -> Tensor:
        met.add(threading.get_ident())
        return closure(branches=branches)

    return noting


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("size", "lanes"), [(1, 2), (1, 4), (2, 2), ("auto", "auto")])
@torch.no_grad()
def test_losses_side_by_side_are_the_single_ones(name: str, size: Any, lanes: Any) -> None:
    model = lively(name)
    before = bits(model)
    for points in points_of(model).values():
        perturber = Perturber(model, find_blocks(model), branch_batch=size, branch_threads=lanes)
        losses, said = losses_of(perturber, in_threads(closure_of(model), met := set()), points)
        assert losses == pytest.approx(expected_of(model, points), rel=1e-6)
        assert unchanged(model, before)
        assert (len(met) == 1) == (name in READ_OUTSIDE or size == lanes == "auto")  # too small to spare any memory
        assert len(said) == (name in READ_OUTSIDE)


@pytest.mark.parametrize(
    ("moves", "threads"), [("", 2), (".1.", 2), (".3.", 1)], ids=["all", "from the second of four layers", "the last"]
)
@torch.no_grad()
def test_points_that_have_much_in_common_share_a_forward(
    moves: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "TOGETHER_SHARE", 100.0)  # tiny weights leave no room for activations otherwise
    model = tiny_llama(num_hidden_layers=4, use_cache=False)
    blocks = find_blocks(model)
    alphas = [0.02 if moves in block.name else 0.0 for block in blocks]
    points = [Perturbation(Draw("rademacher", 3, 7), [sign * a for a in alphas]) for sign in (1, -1)]
    perturber, asked = Perturber(model, blocks), list[int]()
    perturber.losses(closure_of(model), points)
    perturber.losses(in_threads(closure_of(model, asked=asked), met := set()), points)
    assert len(met) == threads
    assert asked == ([1, 1] if threads == 2 else [2])


@pytest.mark.parametrize("method", [MeZO, FZOO])
@pytest.mark.parametrize("noise", ["rademacher", "gaussian", "low-rank"])
def test_steps_side_by_side_lead_to_the_same_weights_to_rounding(method: Any, noise: str) -> None:
    ends = []
    for lanes in (1, 2):
        model = lively("llama")
        opt = method(model, lr=1e-4, noise=noise, branch_batch=1, branch_threads=lanes)
        for _ in range(3):
            opt.step(closure_of(model))
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*ends, atol=1e-5)
    assert not torch.equal(ends[0], torch.cat([p.detach().flatten() for p in lively("llama").parameters()]))


def test_steps_side_by_side_are_the_same_bits_each_time() -> None:
    ends = []
    for _ in range(3):
        model = lively("llama")
        opt = FZOO(model, lr=1e-2, branch_batch=1, branch_threads=4)
        for _ in range(5):
            opt.step(closure_of(model))
        ends.append(model)
    assert all(unchanged(model, bits(ends[0])) for model in ends)


class Remembers(nn.Module):
    """Keeps what it saw: threads would meet in it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = seeded(lambda: nn.Linear(4, 2)), None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.linear(x)
        time.sleep(0.01)
        return self.seen


class Writes(Remembers):
    """Keeps what it saw in a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(24, 2))

    def forward(self, x: Tensor) -> Tensor:
        rows = len(x)
        self.kept[:rows].copy_(self.linear(x))
        time.sleep(0.01)
        return self.kept[:rows].clone()


@pytest.mark.parametrize("kind", [Remembers, Writes])
@torch.no_grad()
def test_a_model_that_keeps_what_it_saw_is_served_by_one_thread(kind: type[Remembers]) -> None:
    model = kind()
    perturber = Perturber(model, find_blocks(model), branch_batch=1, branch_threads=2)
    x = torch.linspace(-1, 1, 24).view(6, 4)

    def loss(branches: int = 1) -> Tensor:
        return model(torch.cat([x] * branches)).square().mean()

    perturber.losses(in_threads(loss, met := set()), points_of(model)["one-sided"])
    assert met == {threading.get_ident()}


class Counts(nn.Module):
    """A module of parameters that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.calls = nn.Parameter(torch.ones(4)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.gain * x


def test_what_a_forward_sets_on_its_module_stays() -> None:
    model = Counts()
    MeZO(model, lr=1e-3).step(lambda: model(torch.ones(2, 4)).square().mean())
    assert model.calls == 2


@torch.no_grad()
def test_the_callers_inference_mode_and_autocast_are_heeded() -> None:
    model = lively("llama")
    points = points_of(model)["one-sided"]
    perturber = Perturber(model, find_blocks(model), branch_batch=1, branch_threads=2)
    grads, closure = [], closure_of(model)

    def noting(branches: int = 1) -> Tensor:
        grads.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return closure(branches=branches)

    with torch.inference_mode():
        losses_of(perturber, noting, points)
    assert set(grads) == {(False, True)}
    with torch.autocast("cpu", torch.bfloat16):  # which other threads would not know
        losses_of(perturber, in_threads(closure, met := set()), points)
    assert met == {threading.get_ident()}


@torch.no_grad()
def test_an_error_in_a_lane_is_raised_and_leaves_nothing_behind() -> None:
    model = lively("llama")
    before, threads = bits(model), torch.get_num_threads()
    perturber = Perturber(model, find_blocks(model), branch_batch=1, branch_threads=2)
    points, closure = points_of(model)["one-sided"], closure_of(model)
    perturber.losses(closure, points)

    def failing(branches: int = 1) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            raise ArithmeticError("in a lane")
        return closure(branches=branches)

    with pytest.raises(ArithmeticError, match="in a lane"):
        perturber.losses(failing, points)
    assert unchanged(model, before)
    assert torch.get_num_threads() == threads
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert perturber.losses(closure, points) == pytest.approx(expected_of(model, points), rel=1e-6)


def test_tasks_share_the_cores_among_them() -> None:
    assert side_by_side([torch.get_num_threads] * 2) == [2, 2]
    assert side_by_side([torch.get_num_threads] * 3) == [1, 1, 1]
    assert side_by_side([torch.get_num_threads]) == [4]
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(
    ("count", "lanes", "size", "rounds"),
    [
        (2, 2, 1, [[1, 1]]),
        (9, 2, 1, [[1], [1, 1], [1, 1], [1, 1], [1, 1]]),
        (9, 2, 3, [[1], [2, 2], [2, 2]]),
        (9, 2, 9, [[1], [4, 4]]),
        (9, 1, 4, [[3], [3], [3]]),
        (9, 4, 1, [[1], [1, 1, 1, 1], [1, 1, 1, 1]]),
        (2, 8, 1, [[1, 1]]),
        (3, 1, 1, [[1], [1], [1]]),
    ],
)
def test_lanes_of_a_round_carry_the_same(count: int, lanes: int, size: int, rounds: list[list[int]]) -> None:
    assert arrange(count, lanes, size) == rounds


def test_blocks_are_dealt_so_that_no_lane_waits_long() -> None:
    assert deal("abcd", [5, 4, 3, 2], 2) == [["a", "d"], ["b", "c"]]
    assert deal("abc", [10, 1, 1], 4) == [["a", "b", "c"]]  # whoever takes the largest is the last in any case
    assert sorted(map(sorted, deal("abcdef", [1] * 6, 3))) == [["a", "d"], ["b", "e"], ["c", "f"]]
    assert deal("", [], 2) == [[]]


def test_what_is_spread_comes_back_in_order() -> None:
    sizes = [3 << 20, 1, 5 << 20, 2 << 20]
    threads: set[int] = set()

    def name(item: str) -> str:
        threads.add(threading.get_ident())
        return item.upper()

    assert spread(name, "abcd", sizes) == ["A", "B", "C", "D"]
    assert len(threads) == 2  # the largest has half of it all
    threads.clear()
    assert spread(name, "abcd", sizes, cores=1) == ["A", "B", "C", "D"]
    assert spread(name, "abcd", [1, 2, 3, 4]) == ["A", "B", "C", "D"]  # not worth a thread
    assert threads == {threading.get_ident()}
    assert spread(name, "", []) == []
