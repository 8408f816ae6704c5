"""Generated answers, prefixes computed once, and rewards of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from tiny import tiny_llama, tiny_mamba, tiny_opt
from torch import Tensor

from zotuner.adapters import adapted
from zotuner.config import FinetuneConfig
from zotuner.errors import ZotunerError
from zotuner.evaluate import evaluate
from zotuner.objective import Objective, Reward, objective_for
from zotuner.optim import FZOO, MeZO
from zotuner.scoring import CausalScorer, Generator
from zotuner.tasks import Example, Mean, Task
from zotuner.tasks.scores import macro_f1, right

VOCABULARY = 400
DEMONSTRATIONS = "The lamp went out because somebody had turned off the power.\n\nIt rained so they stayed at home.\n\n"
TEXTS = ("The soup was cold", "So they left the harbour before the ferry arrived", "It was")


def llama(**overrides: Any) -> Any:
    return tiny_llama(vocab_size=VOCABULARY, initializer_range=0.5, max_position_embeddings=256, **overrides)


class Free(Task):
    """Examples whose answers are generated."""

    name = "free"
    hub = None
    fields: ClassVar[dict[str, type]] = {}
    loss = "language-modelling"
    generates = True
    max_new_tokens = 6
    stop = " the"
    metrics: ClassVar[dict[str, Any]] = {"em": Mean(right)}


class Closed(Task):
    """Examples whose answers are candidates."""

    name = "closed"
    hub = None
    fields: ClassVar[dict[str, type]] = {}
    loss = "classification"
    metrics: ClassVar[dict[str, Any]] = {"accuracy": Mean(right), "macro_f1": macro_f1}


def generator(tokenizer: Any, **options: Any) -> Generator:
    options = {"max_length": 128, "max_new_tokens": 6, "stop": "\n", **options}
    return Generator(tokenizer, CausalScorer(tokenizer, 128), **options)


@torch.no_grad()
def slow_answer(model: Any, tokenizer: Any, prompt: str, count: int, stop: str) -> str:
    """One prompt, one token at a time, no cache."""
    ids = tokenizer(prompt)["input_ids"]
    length = len(ids)
    while len(ids) < length + count:
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    text: str = tokenizer.decode(ids[length:], skip_special_tokens=True)
    return text.split(stop, maxsplit=1)[0].strip()


@pytest.mark.parametrize("make", [llama, lambda: tiny_opt(vocab_size=VOCABULARY, init_std=0.5)], ids=["llama", "opt"])
def test_a_batch_is_answered_as_each_prompt_alone(tokenizer: Any, make: Any) -> None:
    model = make()
    found = generator(tokenizer).answers(model, generator(tokenizer).prompts(TEXTS))[0]
    assert found == [slow_answer(model, tokenizer, text, 6, "\n") for text in TEXTS]
    assert any(found)


def test_an_answer_ends_before_the_stop_text(tokenizer: Any) -> None:
    model = llama()
    whole = slow_answer(model, tokenizer, TEXTS[0], 6, "\n")
    stop = whole[len(whole) // 2 :]
    makes = generator(tokenizer, stop=stop)
    assert makes.answers(model, makes.prompts(TEXTS[:1]))[0] == [whole[: len(whole) // 2].strip()]


def test_a_long_prompt_leaves_room_for_its_answer(tokenizer: Any) -> None:
    makes = generator(tokenizer, max_length=16)
    ids = tokenizer(TEXTS[1])["input_ids"]
    assert len(ids) > 10
    assert makes.prompts([TEXTS[1]]).input_ids[0].tolist() == ids[-10:]


@pytest.mark.parametrize("own", [{"repetition_penalty": 1.5}, {"num_beams": 3}, {"no_repeat_ngram_size": 1}])
def test_what_a_model_says_of_its_generation_does_not_make_it_less_greedy(tokenizer: Any, own: dict[str, Any]) -> None:
    model, makes = llama(), generator(tokenizer, max_new_tokens=12)
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    assert makes.answers(model, makes.prompts(TEXTS))[0] == [slow_answer(model, tokenizer, t, 12, "\n") for t in TEXTS]


def test_answers_that_leave_no_room_for_their_prompts_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ZotunerError, match=r"answers of up to 6 tokens leave less than 16 of 21 for the prompt"):
        objective_for(Free(), llama(), tokenizer, max_length=21)
    objective_for(Free(), llama(), tokenizer, max_length=22)


def test_each_branch_is_answered_by_its_own_weights(tokenizer: Any) -> None:
    """Noise as large as the weights: the branches' answers differ, and stacked ones are those given alone."""
    makes, given = generator(tokenizer), []
    for stacked in (True, False):
        model = llama()
        prompts, seen = makes.prompts(TEXTS), []

        def closure(branches: int = 1, model: Any = model, prompts: Any = prompts, seen: list[Any] = seen) -> Tensor:
            answers = makes.answers(model, prompts, branches)
            seen += answers
            lengths = torch.tensor([float(sum(map(len, found))) for found in answers])
            return lengths if branches > 1 else lengths[0]

        opt = FZOO(model, lr=0.0, eps=0.5, num_perturbations=3, branch_batch=4 if stacked else 1, branch_threads=1)
        opt.step(closure)
        assert opt.last is not None
        given.append(opt.last.losses)
    assert given[0] == given[1]
    assert len(set(given[0])) > 2


def closed_examples(texts: Sequence[str] = TEXTS) -> list[Example]:
    return [Example(DEMONSTRATIONS + text, (" it rained.", " the", " and"), i % 3) for i, text in enumerate(texts)]


def free_examples() -> list[Example]:
    return [Example(DEMONSTRATIONS + text, (" it rained.",), 0, answers=("it rained.",)) for text in TEXTS]


@pytest.mark.parametrize("examples", [closed_examples(), closed_examples(TEXTS[:2])], ids=["three", "two"])
def test_a_prefix_computed_once_changes_no_score(tokenizer: Any, examples: list[Example]) -> None:
    model, objective = llama(), Objective(Closed(), tokenizer)
    with torch.no_grad():
        prefix = objective.prefix(model, examples)
        assert prefix is not None
        assert len(prefix.ids) >= len(tokenizer(DEMONSTRATIONS)["input_ids"]) - 1
        plain, behind = (objective.assess(model, examples, given) for given in (None, prefix))
    torch.testing.assert_close(plain.losses, behind.losses, atol=1e-5, rtol=0)
    assert plain.answers == behind.answers


def test_a_prefix_changes_no_generated_answer(tokenizer: Any) -> None:
    model, objective = llama(), Objective(Free(), tokenizer)
    examples = free_examples()
    with torch.no_grad():
        prefix = objective.prefix(model, examples)
        assert prefix is not None
        plain, behind = (objective.assess(model, examples, given) for given in (None, prefix))
    assert plain.answers == behind.answers
    assert any(plain.answers or [])


def test_evaluation_computes_a_common_prefix_once(tokenizer: Any) -> None:
    model, objective, seen = llama(), Objective(Closed(), tokenizer), []
    model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs["input_ids"].numel()), with_kwargs=True)
    examples = closed_examples(TEXTS * 4)
    evaluate(model, objective, examples, 4)  # finds out that the model can
    seen.clear()
    evaluate(model, objective, examples, 4)
    each = len(tokenizer(DEMONSTRATIONS)["input_ids"])
    assert sum(seen) < len(examples) * each / 2  # the packed rows alone would compute the prefix 12 times


def test_a_model_without_keys_and_values_computes_the_prefix_with_every_example(tokenizer: Any) -> None:
    model = tiny_mamba(vocab_size=VOCABULARY)
    assert Objective(Closed(), tokenizer).prefix(model, closed_examples()) is None


def test_a_reward_of_candidates_is_the_negative_share_of_right_ones(tokenizer: Any) -> None:
    model, examples = llama(), closed_examples()
    objective = objective_for(Closed(), model, tokenizer, reward="accuracy")
    came = evaluate(model, Objective(Closed(), tokenizer), examples).figures
    with torch.no_grad():
        batches = objective.training_batches(examples, 2)
        assert float(objective.mean_loss(model, batches)) == pytest.approx(-came["accuracy"])
    rewarded = evaluate(model, objective, examples).figures
    assert rewarded["loss"] == pytest.approx(-came["accuracy"])
    assert rewarded["accuracy"] == came["accuracy"]


def test_a_reward_of_generated_text_sees_the_answer_and_the_example(tokenizer: Any) -> None:
    model, seen = llama(), []

    def reward(answer: str, example: Example) -> float:
        seen.append((answer, example))
        return len(answer)

    objective, examples = Reward(Free(), tokenizer, reward), free_examples()
    assert objective.generates
    batch = objective.training_batch(examples)
    value = float(objective.loss(model, batch))
    answers = [slow_answer(model, tokenizer, example.prompt, 6, " the") for example in examples]
    assert seen == list(zip(answers, examples, strict=True))
    assert value == pytest.approx(-sum(map(len, answers)) / len(answers))


def test_steps_maximise_the_accuracy_itself(tokenizer: Any) -> None:
    model = llama()
    objective = objective_for(Closed(), model, tokenizer, reward="accuracy")
    texts = (*TEXTS * 2, "Fine", "The parade", "Snow")
    batch = objective.training_batch([Example(text, (" it rained.", " the", " and"), 2) for text in texts])
    opt = FZOO(model, lr=1e-2, eps=2e-2, num_perturbations=8, seed=1)
    values = [opt.step(lambda branches=1: objective.loss(model, batch, branches)) for _ in range(11)]
    assert values[-1] < values[0] - 0.3


def test_a_set_metric_is_no_reward(tokenizer: Any) -> None:
    with pytest.raises(ZotunerError, match="--objective f1: task closed has accuracy"):
        objective_for(Closed(), llama(), tokenizer, reward="f1")


def test_generated_answers_can_be_left_out_of_an_evaluation(tokenizer: Any) -> None:
    model, objective = llama(), Objective(Free(), tokenizer)
    assert evaluate(model, objective, free_examples(), answers=False).figures.keys() == {"loss"}
    assert evaluate(model, objective, free_examples()).figures.keys() == {"loss", "em"}


def test_a_reward_needs_a_method_without_gradients() -> None:
    with pytest.raises(ZotunerError, match="a reward has no gradient for adam"):
        FinetuneConfig.read(None, {"model": "m", "task": "t", "out": "o", "method": "adam", "objective": "accuracy"})


def test_an_unknown_objective_names_the_nearest() -> None:
    with pytest.raises(ZotunerError, match=r"accuracy.*or FILE\.py:FUNCTION"):
        FinetuneConfig.read(None, {"model": "m", "task": "t", "out": "o", "method": "mezo", "objective": "acuracy"})


def test_two_point_rewards_are_stepped_like_losses(tokenizer: Any) -> None:
    model = llama()
    objective = objective_for(Closed(), model, tokenizer, reward="accuracy")
    batch = objective.training_batch(closed_examples(TEXTS * 3))
    opt = MeZO(model, lr=1e-3, eps=0.3)
    opt.step(lambda branches=1: objective.loss(model, batch, branches))
    assert opt.last is not None
    assert all(-1 <= loss <= 0 and loss * 9 == pytest.approx(round(loss * 9)) for loss in opt.last.losses)


def adapted_llama(kind: str) -> Any:
    """A tiny Llama with an adapter that is not the identity."""
    config = FinetuneConfig.model_validate({"model": "m", "task": "t", "out": "o", "method": "mezo", "adapter": kind})
    model = adapted(llama(), config, "m")
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for param in model.parameters():
            if param.requires_grad:
                param.copy_(torch.randn_like(param) * 0.5)
    return model


@pytest.mark.parametrize("kind", ["lora", "ia3", "prefix", "prompt"])
def test_a_model_with_an_adapter_answers_a_batch_as_each_prompt_alone(tokenizer: Any, kind: str) -> None:
    model = adapted_llama(kind)
    found = generator(tokenizer).answers(model, generator(tokenizer).prompts(TEXTS))[0]
    assert found == [slow_answer(model, tokenizer, text, 6, "\n") for text in TEXTS]
    assert found != generator(tokenizer).answers(llama(), generator(tokenizer).prompts(TEXTS))[0]


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_branches_of_generating_micro_batches_have_the_losses_that_they_have_alone(tokenizer: Any, kind: str) -> None:
    objective = Reward(Free(), tokenizer, lambda answer, _: float(len(answer)))
    batches = objective.training_batches(free_examples(), 2)
    assert [len(batch.examples) for batch in batches] == [2, 1]
    given = []
    for together in (4, 1):
        model = adapted_llama(kind)
        opt = FZOO(model, lr=0.0, eps=1.0, num_perturbations=3, branch_batch=together, branch_threads=1)
        opt.step(lambda branches=1, model=model: objective.mean_loss(model, batches, branches))
        assert opt.last is not None
        given.append(opt.last.losses)
    assert given[0] == pytest.approx(given[1])
    assert len(set(given[0])) > 2
