"""Clipping: wild coefficients are scaled down to so many running standard deviations, others left as they are."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from zotuner.optim import FZOO, MeZO
from zotuner.optim.clip import DECAY, WARM_UP, clipped


def after(coefficients: list[float], limit: float = 3.0) -> tuple[list[float], dict[str, Any]]:
    """What clipping makes of a run of single coefficients."""
    state: dict[str, Any] = {}
    return [clipped((c,), limit, state)[0] for c in coefficients], state


def test_usual_coefficients_are_left_as_they_are() -> None:
    usual = [math.sin(i) for i in range(1, 101)]
    came, state = after(usual)
    assert came == usual
    assert state["clip_count"] == 100
    assert state["clip_square"] / (1 - DECAY**100) == pytest.approx(0.5, rel=0.05)


def test_a_wild_one_is_cut_to_the_limit_and_does_not_raise_it() -> None:
    came, _ = after([1.0, -1.0] * 20 + [1e6, 1.0, -1e6])
    assert came[:40] == [1.0, -1.0] * 20
    assert came[40] == pytest.approx(3.0)
    assert came[41] == 1.0
    assert came[42] == pytest.approx(-3.3, rel=0.02)  # it raised the running variance by 9 hundredths of its weight


def test_nothing_is_clipped_before_a_deviation_is_known() -> None:
    came, _ = after([1.0] * (WARM_UP - 1) + [50.0])
    assert came[-1] == 50.0
    assert after([1.0] * WARM_UP + [50.0])[0][-1] == pytest.approx(3.0)


def test_steps_without_a_difference_do_not_stop_a_run() -> None:
    """As it often begins where accuracy is the objective: most perturbations change no answer."""
    came, state = after([0.0] * 15 + [25.0, 0.0] * 20)
    assert came == [0.0] * 15 + [25.0, 0.0] * 20
    assert state["clip_count"] == 20


def test_coefficients_of_one_step_keep_their_direction() -> None:
    state: dict[str, Any] = {}
    for _ in range(WARM_UP):
        clipped((1.0, -1.0), 2.0, state)
    a, b = clipped((30.0, -40.0), 2.0, state)
    assert a / b == pytest.approx(-0.75)
    assert math.sqrt((a * a + b * b) / 2) == pytest.approx(2.0)


@pytest.mark.parametrize("method", [MeZO, FZOO])
def test_an_optimizer_clips_what_it_moves_by_and_says_so(method: Any) -> None:
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.5)
    losses, scale = torch.ones(3, 4), [1.0]
    opt = method(model, lr=1e-4, clip=2.0)
    said = []
    for step in range(WARM_UP + 2):
        scale[0] = 1e4 if step == WARM_UP and method is MeZO else 1.0
        before = model.weight.detach().clone()
        opt.step(lambda: scale[0] * model(losses).square().mean())
        said.append(opt.last.clipped)
    assert said[:WARM_UP] == [False] * WARM_UP
    assert said[WARM_UP] == (method is MeZO)
    assert not torch.equal(model.weight, before)
    again = method(nn.Linear(4, 1, bias=False), lr=1e-4, clip=2.0)
    again.load_state_dict(opt.state_dict())
    assert again.param_groups[0]["clip_count"] == WARM_UP + 2


def test_a_limit_must_be_positive() -> None:
    for limit in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="clip must be a positive number"):
            MeZO(nn.Linear(2, 2), clip=limit)
