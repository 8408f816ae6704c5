"""Steps of fine-tuning: micro-batches make the step of the whole batch, for every kind of method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from transformers import PreTrainedTokenizerFast

from zotuner.config import FIRST_ORDER, METHODS, ZEROTH_ORDER, FinetuneConfig, forwards_per_step
from zotuner.objective import Objective
from zotuner.optim.updates import Adam
from zotuner.steppers import OPTIMIZERS, FirstOrderStepper, Taken, stepper_for
from zotuner.tasks import Example, get_task
from zotuner.tuner import Tuner

TUNED = tuple(method for method in METHODS if method != "none")
LINEAR = ("mezo", "fzoo", "zo-finetuner", "lozo", "meazo", "adam", "sgd")  # what the step answers to smoothly
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


def config_of(method: str, **flags: Any) -> FinetuneConfig:
    """Of a run that is not made."""
    tuner = {"tuner": "t"} if method == "zo-finetuner" else {}
    shared = {"model": "m", "task": "t", "method": method, "out": Path("o"), "lr": 1e-3, "num_perturbations": 3}
    return FinetuneConfig.read(None, shared | tuner | flags)


def stepped(objective: Objective, method: str, micro_batch_size: int | None, steps: int = 2) -> tuple[Any, Taken]:
    """A model after some steps, and what the last gave."""
    model = tiny_llama(vocab_size=400, initializer_range=0.2)
    config = config_of(method)
    stepper = stepper_for(config, model, Tuner.for_model(model, "exp", seed=1) if config.tuner else None)
    assert stepper is not None
    for _ in range(steps):
        taken = stepper(objective, objective.training_batches(EXAMPLES, micro_batch_size))
    return model, taken


@torch.no_grad()
def distance(one: Any, other: Any) -> float:
    """Between the weights of two models, Euclidean."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5


def test_every_method_is_zeroth_order_or_first_order_or_none() -> None:
    assert (*ZEROTH_ORDER, *FIRST_ORDER, "none") == METHODS
    assert set(OPTIMIZERS) == set(ZEROTH_ORDER)


@pytest.mark.parametrize("method", TUNED)
def test_a_step_costs_the_forwards_that_a_configuration_says(method: str, tokenizer: PreTrainedTokenizerFast) -> None:
    objective, said = Objective(get_task("demo-sentiment"), tokenizer), forwards_per_step(config_of(method))
    assert stepped(objective, method, None, steps=1)[1].forwards == said
    assert said == {"fzoo": 4, "hizoo": 3, "adam": 1, "sgd": 1}.get(method, 2)
    assert forwards_per_step(config_of("none")) == 0


def test_options_reach_the_methods_that_they_are_for() -> None:
    model = tiny_llama(vocab_size=400)

    def made(method: str, **flags: Any) -> Any:
        stepper = stepper_for(config_of(method, **flags), model, None)
        assert stepper is not None
        return stepper.optimizer

    assert made("zo-sgd-momentum", momentum=0.5)._update.beta == 0.5
    assert made("mezo-adam", momentum=0.5, beta2=0.7)._update == Adam(0.5, 0.7)
    assert made("meazo", beta2=0.7)._update.beta2 == 0.7
    assert made("hizoo", smooth=0.1)._update.smooth == 0.1
    assert made("zo-adamu", steps=77)._update.total_steps == 77
    lozo = made("lozo", resample_every=3).param_groups[0]
    assert (lozo["resample_every"], lozo["rank"], lozo["factors"]) == (3, 2, "gaussian")
    assert made("sgd").param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("method", LINEAR)
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
    taken = FirstOrderStepper(config, model)(objective, batches)
    assert taken.skipped
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
