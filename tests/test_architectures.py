"""Every architecture, by every method: no model is named in the package, and none needs to be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from test_masked import with_mask
from test_objective import with_special_tokens
from tiny import (
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mamba,
    tiny_mixtral,
    tiny_neox,
    tiny_opt,
    tiny_phi,
    tiny_phi3,
    tiny_qwen2,
    tiny_qwen3,
    tiny_roberta,
)

from zotuner.config import METHODS, FinetuneConfig
from zotuner.models import kind_of
from zotuner.objective import Objective
from zotuner.steppers import stepper_for
from zotuner.tasks import Example, get_task
from zotuner.tuner import Tuner

VOCABULARY = 415  # that of the masking tokenizer
SPREAD = 0.3  # standard deviation of the initial weights: losses must differ from example to example

CAUSAL: dict[str, Callable[[], Any]] = {
    "llama tied": lambda: tiny_llama(vocab_size=VOCABULARY, tie_word_embeddings=True, initializer_range=SPREAD),
    "llama untied": lambda: tiny_llama(vocab_size=VOCABULARY, initializer_range=SPREAD),
    "qwen2": lambda: tiny_qwen2(vocab_size=VOCABULARY, initializer_range=SPREAD),
    "qwen3": lambda: tiny_qwen3(vocab_size=VOCABULARY, initializer_range=SPREAD),
    "opt": lambda: tiny_opt(vocab_size=VOCABULARY, init_std=SPREAD),
    "phi": lambda: tiny_phi(vocab_size=VOCABULARY, initializer_range=SPREAD),
    "phi3, fused qkv": lambda: tiny_phi3(vocab_size=VOCABULARY, initializer_range=SPREAD),
    "gpt2, fused qkv": lambda: tiny_gpt2(vocab_size=VOCABULARY, initializer_range=SPREAD),
    "neox": lambda: tiny_neox(vocab_size=VOCABULARY, initializer_range=SPREAD),
    "mixtral, stacked experts": lambda: tiny_mixtral(vocab_size=VOCABULARY, initializer_range=SPREAD),
    "mamba": lambda: tiny_mamba(vocab_size=VOCABULARY, initializer_range=SPREAD),
}
MASKED: dict[str, Callable[[], Any]] = {
    "roberta": lambda: tiny_roberta(vocab_size=VOCABULARY, initializer_range=SPREAD, pad_token_id=0),
    "bert": lambda: tiny_bert(vocab_size=VOCABULARY, initializer_range=SPREAD),
}
ALL = CAUSAL | MASKED
TUNED = [method for method in METHODS if method != "none"]
CANDIDATES = (" terrible", " great")
TEXTS = ("A joy from the first page to the last", "Fine", "The soup was cold and nobody ate it", "So dull")
EXAMPLES = [Example(f"{text} It was", CANDIDATES, i % 2, suffix=".") for i, text in enumerate(TEXTS)]


def objective_of(
    model: Any, tokenizer: Any, template: str = "$A", side: Literal["left", "right"] = "right"
) -> Objective:
    """Of the demo task, with a tokenizer of the model's kind."""
    kind = kind_of(model)
    speaks = with_mask(tokenizer) if kind == "masked" else with_special_tokens(tokenizer, template)
    speaks.padding_side = side
    return Objective(get_task("demo-sentiment"), speaks, 100, kind=kind)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("template", "side"), [("$A", "right"), ("<s> $A", "left")], ids=["plain", "bos"])
@torch.no_grad()
def test_the_loss_of_a_batch_is_the_mean_of_its_examples_losses(
    tokenizer: Any, name: str, template: str, side: Literal["left", "right"]
) -> None:
    model = ALL[name]()
    objective = objective_of(model, tokenizer, template, side)
    alone = [float(objective.loss(model, objective.training_batch([example]))) for example in EXAMPLES]
    assert max(alone) - min(alone) > 1e-2
    together = float(objective.loss(model, objective.training_batch(EXAMPLES)))
    assert together == pytest.approx(sum(alone) / len(alone), abs=2e-5)


def config_of(method: str, **options: Any) -> FinetuneConfig:
    extra = {"tuner": "t"} if method == "zo-finetuner" else {}
    stated = {"model": "m", "task": "t", "out": Path("o"), "method": method, "num_perturbations": 3, "eps": 1e-2}
    return FinetuneConfig.model_validate({**stated, **extra, **options})


@pytest.mark.filterwarnings("ignore:.* parameters are read outside")  # Mamba's
@pytest.mark.parametrize("method", TUNED)
@pytest.mark.parametrize("name", ALL)
def test_every_method_tunes_every_architecture(tokenizer: Any, name: str, method: str) -> None:
    model = ALL[name]()
    objective = objective_of(model, tokenizer)
    stepper = stepper_for(config_of(method), model, Tuner.for_model(model, "exp") if "tuner" in method else None)
    assert stepper is not None
    before = [param.detach().clone() for param in model.parameters()]
    for start in (0, 2):
        taken = stepper(objective, objective.training_batches(EXAMPLES[start : start + 2]))
        assert not taken.skipped
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
    assert all(bool(param.isfinite().all()) for param in model.parameters())
