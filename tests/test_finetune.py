"""Steps of fine-tuning: micro-batches make the step of the whole batch, for every kind of method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from transformers import PreTrainedTokenizerFast

from zotuner.config import FinetuneConfig
from zotuner.objective import Objective
from zotuner.steppers import AdamStepper, Stepper, Taken, ZOStepper
from zotuner.tasks import Example, get_task
from zotuner.tuner import Tuner

METHODS = ("mezo", "fzoo", "zo-finetuner", "adam")
EXAMPLES = (  # of unequal lengths, so that micro-batches are padded otherwise than the whole batch
    Example("The lamp went out because", (" somebody had turned off the power.", " it rained."), 0),
    Example("So", (" they left the harbour before the ferry arrived", " no"), 1),
    Example("The parade was cancelled and everybody walked home in the rain so", (" wet.", " naïve plans"), 1),
    Example("It was", (" the", " and"), 0),
    Example("The soup was cold It was", (" the", " and"), 1),
)


@pytest.fixture(params=["demo-copa", "demo-sentiment"])
def objective(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Objective:
    """One of each kind of loss."""
    return Objective(get_task(request.param), tokenizer)


def stepped(objective: Objective, method: str, micro_batch_size: int | None, steps: int = 2) -> tuple[Any, Taken]:
    """A model after some steps, and what the last gave."""
    model = tiny_llama(vocab_size=400, initializer_range=0.2)
    tuner = {"tuner": "t"} if method == "zo-finetuner" else {}
    flags = {"model": "m", "task": "t", "method": method, "out": Path("o"), "lr": 1e-3, "num_perturbations": 3}
    config = FinetuneConfig.read(None, flags | tuner)
    stepper: Stepper
    if method == "adam":
        stepper = AdamStepper(config, model)
    else:
        stepper = ZOStepper(config, model, Tuner.for_model(model, "exp", seed=1) if tuner else None)
    for _ in range(steps):
        taken = stepper(objective, objective.training_batches(EXAMPLES, micro_batch_size))
    return model, taken


@torch.no_grad()
def distance(one: Any, other: Any) -> float:
    """Between the weights of two models, Euclidean."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_make_the_step_of_the_whole_batch(objective: Objective, method: str, size: int) -> None:
    whole, expected = stepped(objective, method, None)
    model, came = stepped(objective, method, size)
    assert came.losses == pytest.approx(expected.losses, abs=1e-5)
    assert came.forwards == expected.forwards
    start = tiny_llama(vocab_size=400, initializer_range=0.2)
    assert distance(whole, start) > 0
    assert distance(whole, model) < 0.01 * distance(whole, start)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_adams_gradient_over_micro_batches_is_that_of_the_whole_batch(objective: Objective, size: int) -> None:
    whole, _ = stepped(objective, "adam", None, steps=1)
    model, _ = stepped(objective, "adam", size, steps=1)
    for came, expected in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(came.grad, expected.grad, atol=1e-5, rtol=1e-4)


def test_adam_takes_no_step_where_one_micro_batch_has_no_finite_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    objective = Objective(get_task("demo-sentiment"), tokenizer)
    model = tiny_llama(vocab_size=400)
    config = FinetuneConfig.read(None, {"model": "m", "task": "t", "method": "adam", "out": "o"})
    batches = objective.training_batches(EXAMPLES, 2)
    rare = set(batches[0].input_ids.flatten().tolist()) - set(batches[1].input_ids.flatten().tolist())
    with torch.no_grad():
        model.model.embed_tokens.weight[rare.pop()] = torch.inf
    before = [param.clone() for param in model.parameters()]
    taken = AdamStepper(config, model)(objective, batches)
    assert taken.skipped
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
