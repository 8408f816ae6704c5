"""The objective against the obvious computation: one candidate at a time, full logits, no padding."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import stdev
from typing import Any, ClassVar, Literal

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zotuner.batch import Batch
from zotuner.errors import ZotunerError
from zotuner.evaluate import evaluate
from zotuner.objective import Objective, shares
from zotuner.tasks import Example, Task

LOSSES = ("classification", "language-modelling")
TOLERANCE = 1e-5

Kind = Literal["classification", "language-modelling"]

MANY = (  # candidates of several tokens, of unequal lengths, after prompts of unequal lengths
    Example("The lamp went out because", (" somebody had turned off the power.", " it rained."), 0),
    Example("So", (" they left the harbour before the ferry arrived", " no"), 1),
    Example("The parade was cancelled and everybody walked home in the rain so", (" wet.", " naïve 🌧 plans"), 1),
)
ONE = (  # candidates of one token each
    Example("The soup was cold It was", (" the", " and"), 0),
    Example("A joy from the first page to the last It was", (" the", " and"), 1),
    Example("Fine It was", (" the", " and"), 1),
)
RAGGED = (
    Example("The lamp went out because", (" the", " and", " it rained."), 2),
    Example("So they went home and", (" the",), 0),
    Example("It was", (" somebody else", " the"), 1),
)
SETS = {"many tokens": MANY, "one token": ONE, "ragged": RAGGED, "mixed": MANY + ONE + RAGGED}


class _Ready(Task):
    """A task whose examples come ready."""

    name = "ready"
    hub = None
    fields: ClassVar[dict[str, type]] = {}

    def example(self, row: dict[str, Any]) -> Example:
        return Example(**row)


class _Choose(_Ready):
    loss = "classification"


class _Continue(_Ready):
    loss = "language-modelling"


def task_of(loss: Kind) -> Task:
    """A task of a kind of loss."""
    return _Choose() if loss == "classification" else _Continue()


def with_special_tokens(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """The same tokenizer, which puts <s> where the template says."""
    from tokenizers import Tokenizer, processors

    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="<s>")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Two kinds of positions: rotary ones forgive an offset, learned ones do not."""
    size = {"vocab_size": len(tokenizer), "initializer_range": 0.5}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if request.param == "llama":
            heads = {"num_hidden_layers": 2, "num_attention_heads": 2}
            config = LlamaConfig(hidden_size=16, intermediate_size=32, **heads, **size)
            return LlamaForCausalLM(config).eval()
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=128, **size)).eval()


@pytest.fixture(scope="module", params=["$A", "<s> $A"], ids=["plain", "bos"])
def any_tokenizer(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """With and without a token before the text."""
    return with_special_tokens(tokenizer, request.param)


@torch.no_grad()
def slow_score(model: Any, tokenizer: Any, prompt: str, candidate: str, max_length: int = 1024) -> float:
    """The mean log-probability of a candidate's tokens, the obvious way."""
    ids = tokenizer(prompt + candidate)["input_ids"]
    count = len(ids) - len(tokenizer(prompt)["input_ids"])
    assert tokenizer(prompt)["input_ids"] == ids[:-count], "the candidate must begin where the prompt's tokens end"
    ids = ids[-max_length - 1 :]
    log_probs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], dim=-1)
    total = sum(float(log_probs[at - 1, ids[at]]) for at in range(len(ids) - count, len(ids)))
    return total / count


def slow_scores(model: Any, tokenizer: Any, example: Example, max_length: int = 1024) -> list[float]:
    """Of each candidate."""
    return [slow_score(model, tokenizer, example.prompt, text, max_length) for text in example.candidates]


def slow_loss(model: Any, tokenizer: Any, example: Example, loss: Kind) -> float:
    """One example's loss."""
    scores = slow_scores(model, tokenizer, example)
    if loss == "language-modelling":
        return -scores[example.label]
    return float(torch.logsumexp(torch.tensor(scores), dim=0)) - scores[example.label]


def shared_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("examples", SETS.values(), ids=SETS)
@torch.no_grad()
def test_scores_are_those_of_the_obvious_computation(
    model: Any, any_tokenizer: Any, examples: tuple[Example, ...]
) -> None:
    objective = Objective(task_of("classification"), any_tokenizer)
    table = objective.scores(model, objective.batch(examples))
    assert table.dtype == torch.float32
    assert table.shape == (len(examples), max(len(example.candidates) for example in examples))
    for row, example in zip(table.tolist(), examples, strict=True):
        count = len(example.candidates)
        assert row[:count] == pytest.approx(slow_scores(model, any_tokenizer, example), abs=TOLERANCE)
        assert row[count:] == [-torch.inf] * (len(row) - count)


def test_scores_do_not_depend_on_what_else_is_in_the_batch(model: Any, tokenizer: Any) -> None:
    objective = Objective(task_of("classification"), tokenizer)
    with torch.no_grad():
        together = objective.scores(model, objective.batch(MANY + ONE))
        alone = [objective.scores(model, objective.batch([example])) for example in MANY + ONE]
    torch.testing.assert_close(together, torch.cat(alone), atol=TOLERANCE, rtol=0)


def beginnings(batch: Any) -> int:
    """Paths that begin in a batch: in a row of several examples, one for each."""
    return int(((batch.position_ids == 0) & (batch.attention_mask == 1)).sum())


def test_candidates_of_one_token_share_their_prompts_row(tokenizer: Any) -> None:
    assert all(len(tokenizer.tokenize(text)) == 1 for example in ONE for text in example.candidates)
    batch = Objective(task_of("classification"), tokenizer).batch(ONE)
    assert beginnings(batch) == len(ONE)
    assert batch.predictors[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.tokens == sum(len(tokenizer(example.prompt)["input_ids"]) for example in ONE)


def test_candidates_of_several_tokens_share_a_row_and_equal_ones_are_computed_once(tokenizer: Any) -> None:
    objective = Objective(task_of("classification"), tokenizer)
    for batch in (objective.batch(MANY), objective.batch(MANY + MANY)):
        assert beginnings(batch) == len(MANY)
        assert batch.plain is not None
        assert batch.plain.input_ids.shape[0] == 2 * len(MANY) - 1  # " no" is one token: the other's row predicts it


def test_language_modelling_trains_on_the_right_candidates_alone(tokenizer: Any) -> None:
    batch = Objective(task_of("language-modelling"), tokenizer).training_batch(MANY)
    assert beginnings(batch) == len(MANY)
    assert batch.cell[0].tolist() == [0, 1, 2]
    texts = [example.prompt + example.candidates[example.label] for example in MANY]
    plain = batch.plain or batch
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(plain.input_ids, plain.attention_mask, strict=True)]
    assert rows == [tokenizer(text)["input_ids"][:-1] for text in texts]


def test_classification_trains_on_all_candidates(tokenizer: Any) -> None:
    batch = Objective(task_of("classification"), tokenizer).training_batch(MANY)
    assert batch.cell[0].tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.cell[1].tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("examples", SETS.values(), ids=SETS)
@torch.no_grad()
def test_the_loss_of_a_batch_is_the_mean_of_its_examples_losses(
    model: Any, tokenizer: Any, examples: tuple[Example, ...], loss: Kind
) -> None:
    objective = Objective(task_of(loss), tokenizer)
    came = objective.loss(model, objective.training_batch(examples))
    assert came.shape == ()
    assert came.dtype == torch.float32
    alone = [float(objective.loss(model, objective.training_batch([example]))) for example in examples]
    assert float(came) == pytest.approx(mean(alone), abs=TOLERANCE)
    slow = [slow_loss(model, tokenizer, example, loss) for example in examples]
    assert float(came) == pytest.approx(mean(slow), abs=TOLERANCE)


@torch.no_grad()
def test_leaving_the_wrong_candidates_out_gives_the_same_language_modelling_loss(model: Any, tokenizer: Any) -> None:
    objective = Objective(task_of("language-modelling"), tokenizer)
    examples = MANY + RAGGED
    full, right = objective.batch(examples), objective.batch(examples, right_only=True)
    assert right.tokens < full.tokens
    assert float(objective.loss(model, right)) == pytest.approx(float(objective.loss(model, full)), abs=TOLERANCE)


def test_the_two_kinds_of_loss_differ_on_the_same_scores(tokenizer: Any) -> None:
    scores = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]])
    labels = torch.tensor([0, 1])
    choose = Objective(task_of("classification"), tokenizer).losses(scores, labels)
    follow = Objective(task_of("language-modelling"), tokenizer).losses(scores, labels)
    assert choose.tolist() == pytest.approx([0.313262, 2.578889], abs=1e-5)
    assert follow.tolist() == [1.0, 3.0]


def test_the_loss_has_the_gradient_of_the_obvious_one(tokenizer: Any, model: Any) -> None:
    objective = Objective(task_of("language-modelling"), tokenizer)
    example = MANY[0]
    objective.loss(model, objective.training_batch([example])).backward()
    came = [param.grad.clone() for param in model.parameters()]
    model.zero_grad()
    ids = tokenizer(example.prompt + example.candidates[example.label])["input_ids"]
    labels = [-100] * len(tokenizer(example.prompt)["input_ids"])
    labels += ids[len(labels) :]
    model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
    for got, param in zip(came, model.parameters(), strict=True):
        torch.testing.assert_close(got, param.grad, atol=1e-5, rtol=1e-4)
    model.zero_grad()


@torch.no_grad()
def test_a_centred_loss_does_not_see_what_its_examples_share(model: Any, tokenizer: Any) -> None:
    objective = Objective(task_of("classification"), tokenizer)
    batch = objective.training_batch(RAGGED)
    scores = objective.scores(model, batch)
    known = [[x for x in column if math.isfinite(x)] for column in scores.T.tolist()]
    means = torch.tensor([mean(column) for column in known])
    came = float(objective.centred_loss(model, batch))
    assert came == pytest.approx(float(objective.losses(scores - means, batch.labels).mean()), abs=TOLERANCE)
    shifted = [scores + torch.tensor([3.0, -2.0, 1.0])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective._scorer, "scores", lambda *_: shifted)
        assert float(objective.loss(model, batch)) != pytest.approx(came, abs=0.1)
        assert float(objective.centred_loss(model, batch)) == pytest.approx(came, abs=TOLERANCE)


@torch.no_grad()
def test_an_absent_candidate_is_never_chosen_and_adds_nothing_to_the_loss(model: Any, tokenizer: Any) -> None:
    objective = Objective(task_of("classification"), tokenizer)
    batch = objective.batch(RAGGED)
    scores = objective.scores(model, batch)
    assert torch.isinf(scores).tolist() == [[False, False, False], [False, True, True], [False, False, True]]
    losses = objective.losses(scores, batch.labels)
    assert bool(torch.isfinite(losses).all())
    assert float(losses[1]) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("max_length", [6, 8, 13])
def test_a_long_row_keeps_its_end(tokenizer: Any, model: Any, max_length: int) -> None:
    example = Example("The parade was cancelled and everybody walked home in the rain so", (" it rained.", " the"), 0)
    objective = Objective(task_of("classification"), tokenizer, max_length=max_length)
    batch = objective.batch([example])
    assert batch.input_ids.shape[1] == max_length
    ids = tokenizer(example.prompt + example.candidates[0])["input_ids"]
    assert batch.input_ids[0].tolist() == ids[:-1][-max_length:]
    with torch.no_grad():
        scores = objective.scores(model, batch)
    assert scores[0].tolist() == pytest.approx(slow_scores(model, tokenizer, example, max_length), abs=TOLERANCE)


def test_a_row_of_just_max_length_loses_nothing(tokenizer: Any) -> None:
    example = ONE[1]
    length = len(tokenizer(example.prompt)["input_ids"])
    for max_length, kept in ((length, length), (length - 1, length - 1), (length + 1, length)):
        batch = Objective(task_of("classification"), tokenizer, max_length=max_length).batch([example])
        assert batch.tokens == kept


def test_a_candidate_longer_than_max_length_is_scored_on_its_end(tokenizer: Any, model: Any) -> None:
    example = Example("It was", (" somebody had turned off the power.", " it"), 0)
    assert len(tokenizer.tokenize(example.candidates[0])) > 4
    objective = Objective(task_of("classification"), tokenizer, max_length=4)
    with torch.no_grad():
        scores = objective.scores(model, objective.batch([example]))
    assert bool(torch.isfinite(scores).all())
    short = slow_score(model, tokenizer, example.prompt, example.candidates[1], max_length=4)
    assert float(scores[0, 1]) == pytest.approx(short, abs=TOLERANCE)
    ids = tokenizer(example.prompt + example.candidates[0])["input_ids"][-5:]
    with torch.no_grad():
        log_probs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], dim=-1)
    end = mean([float(log_probs[at - 1, ids[at]]) for at in range(1, 5)])
    assert float(scores[0, 0]) == pytest.approx(end, abs=TOLERANCE)


def test_a_token_that_the_tokenizer_appends_is_no_part_of_the_candidate(tokenizer: Any, model: Any) -> None:
    ending = with_special_tokens(tokenizer, "$A <s>")
    objective = Objective(task_of("classification"), ending)
    with torch.no_grad():
        scores = objective.scores(model, objective.batch(MANY))
    for row, example in zip(scores.tolist(), MANY, strict=True):
        assert row == pytest.approx(slow_scores(model, tokenizer, example), abs=TOLERANCE)


def test_a_tokenizer_without_a_padding_token_serves(tokenizer: Any, model: Any) -> None:
    """Padding is masked, so any token will do."""
    unpadded = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert unpadded.pad_token_id is None
    scores = []
    with torch.no_grad():
        for each in (tokenizer, unpadded):
            objective = Objective(task_of("classification"), each)
            scores.append(objective.scores(model, objective.batch(MANY)))
    torch.testing.assert_close(*scores, atol=TOLERANCE, rtol=0)


def test_tokens_counts_what_a_forward_computes_without_padding(tokenizer: Any) -> None:
    objective = Objective(task_of("classification"), tokenizer)
    paths = [[tokenizer(e.prompt + text)["input_ids"][:-1] for text in e.candidates] for e in MANY]
    several = sum(len(path) for both in paths for path in both)
    common = sum(shared_tokens(*both) for both in paths)
    within = sum(min(map(len, both)) for both in paths if shared_tokens(*both) == min(map(len, both)))
    shared = sum(len(tokenizer(e.prompt)["input_ids"]) for e in ONE)
    batch = objective.batch(MANY)
    assert batch.plain is not None
    assert batch.plain.tokens == several - within
    assert batch.tokens == several - common
    assert objective.batch(ONE).tokens == shared
    assert objective.batch(MANY + ONE).tokens == several - common + shared


def test_padding_stands_on_the_left_and_is_masked(tokenizer: Any) -> None:
    batch = Objective(task_of("classification"), tokenizer).batch(MANY)
    assert batch.attention_mask.diff(dim=1).min() >= 0
    assert bool((batch.input_ids[batch.attention_mask == 0] == tokenizer.pad_token_id).all())
    assert bool(batch.attention_mask[:, -1].all())


class _Spy(torch.nn.Module):
    """Notes what a model is called with."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner, self.device, self.calls = model, model.device, []

    def forward(  # named as the inner model's, so that it is offered the same
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: Any = 0,
    ) -> Any:
        options = {"position_ids": position_ids, "use_cache": use_cache, "logits_to_keep": logits_to_keep}
        self.calls.append({"input_ids": input_ids, "attention_mask": attention_mask, **options})
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, **options)


class _Bare(torch.nn.Module):
    """A model that knows no more than ids and a mask."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner, self.device = model, model.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        positions = (attention_mask.cumsum(dim=1) - 1).clamp_min(0)
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions)


@torch.no_grad()
def test_the_head_runs_on_no_more_positions_than_predict(model: Any, tokenizer: Any) -> None:
    objective = Objective(task_of("classification"), tokenizer)
    spy = _Spy(model)
    objective.scores(spy, objective.batch(ONE))
    packed = spy.calls[-1]
    assert packed["input_ids"].shape[0] == 1
    assert len(packed["logits_to_keep"]) == len(ONE)
    spy.calls.clear()
    objective.scores(spy, objective.batch(ONE[:1]))
    assert len(spy.calls) == 1
    assert spy.calls[0]["logits_to_keep"] == 1
    assert spy.calls[0]["use_cache"] is False
    assert spy.calls[0]["position_ids"].min() == 0


@torch.no_grad()
def test_a_model_that_takes_only_ids_and_mask_gives_the_same_scores(model: Any, tokenizer: Any) -> None:
    objective = Objective(task_of("classification"), tokenizer)
    batch = objective.batch(MANY + ONE)
    bare, full = objective.scores(_Bare(model), batch), objective.scores(model, batch)
    torch.testing.assert_close(bare, full, atol=TOLERANCE, rtol=0)


# -------------------------------------------------------------------------------------------- several in one row


class _Unfit(torch.nn.Module):
    """A model that takes a mask of 4 dimensions and positions, and does not do as they say."""

    def __init__(self, tokenizer: Any, fault: str) -> None:
        super().__init__()
        self.inner = tiny_llama(vocab_size=len(tokenizer), initializer_range=0.5)
        self.device, self.fault = self.inner.device, fault

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Any:
        if attention_mask.ndim == 4 and self.fault == "refuses":
            raise ValueError("expected a mask of 2 dimensions\nor none")
        if attention_mask.ndim == 4 and self.fault == "deaf to masks":
            attention_mask = attention_mask.diagonal(dim1=2, dim2=3)[:, 0] == 0
        if self.fault == "deaf to positions":
            position_ids = None
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)


@torch.no_grad()
def test_a_packed_batch_has_the_scores_of_the_plain_one(model: Any, tokenizer: Any) -> None:
    objective = Objective(task_of("classification"), tokenizer)
    batch, spy = objective.batch(MANY + ONE + RAGGED), _Spy(model)
    assert batch.plain is not None
    objective.scores(spy, batch)
    spy.calls.clear()
    packed, plain = objective.scores(spy, batch), objective.scores(spy, batch.plain)
    torch.testing.assert_close(packed, plain, atol=TOLERANCE, rtol=0)
    assert [call["attention_mask"].ndim for call in spy.calls] == [4, 2]
    assert spy.calls[0]["input_ids"].numel() < spy.calls[1]["input_ids"].numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_rounding_of_half_precision_is_no_difference(tokenizer: Any, dtype: torch.dtype) -> None:
    spy = _Spy(tiny_llama(vocab_size=len(tokenizer), initializer_range=0.3).to(dtype))
    objective = Objective(task_of("classification"), tokenizer)
    objective.scores(spy, objective.batch(MANY))
    assert spy.calls[-1]["attention_mask"].dtype == dtype


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_each_implementation_of_attention_reads_packed_rows(tokenizer: Any, attention: str) -> None:
    spy = _Spy(tiny_llama(vocab_size=len(tokenizer), initializer_range=0.5, attn_implementation=attention))
    objective = Objective(task_of("classification"), tokenizer)
    objective.scores(spy, objective.batch(MANY))
    assert [call["attention_mask"].ndim for call in spy.calls] == [2, 4, 4]


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("fault", ["refuses", "deaf to masks", "deaf to positions"])
@torch.no_grad()
def test_a_model_that_cannot_read_packed_rows_gets_plain_ones_and_one_warning(
    tokenizer: Any, fault: str, branches: int
) -> None:
    objective, unfit = Objective(task_of("classification"), tokenizer), _Unfit(tokenizer, fault)
    batch = objective.batch(MANY)
    assert batch.plain is not None
    with pytest.warns(UserWarning, match="_Unfit cannot read several candidates or examples in one row") as caught:
        loss = objective.loss(unfit, batch, branches)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert torch.equal(loss, objective.loss(unfit, batch.plain, branches))
    assert torch.equal(objective.scores(unfit, batch), objective.scores(unfit, batch.plain))
    assert objective.tokens(unfit, [batch]) == batch.plain.tokens


@torch.no_grad()
def test_scores_that_are_not_finite_do_not_tell_what_a_model_can_read(tokenizer: Any) -> None:
    """It is asked again with the next batch, and no warning says that it could not."""
    inner = tiny_llama(vocab_size=len(tokenizer))
    spy, objective = _Spy(inner), Objective(task_of("classification"), tokenizer)
    batch = objective.batch(MANY)
    weight = inner.model.embed_tokens.weight
    kept = weight[batch.input_ids[0, -1]].clone()
    weight[batch.input_ids[0, -1]] = torch.nan
    objective.scores(spy, batch)
    assert [call["attention_mask"].ndim for call in spy.calls] == [2, 2]
    weight[batch.input_ids[0, -1]] = kept
    objective.scores(spy, batch)
    assert spy.calls[-1]["attention_mask"].ndim == 4


@torch.no_grad()
def test_one_model_that_cannot_does_not_keep_another_from_it(tokenizer: Any, model: Any) -> None:
    objective = Objective(task_of("classification"), tokenizer)
    batch = objective.batch(MANY)
    with pytest.warns(UserWarning, match="cannot read"):
        objective.scores(_Unfit(tokenizer, "refuses"), batch)
    objective.scores(model, batch)
    assert objective.tokens(model, [batch]) == batch.tokens


@pytest.mark.parametrize("name", ["sliding_window", "window_size", "attention_chunk_size"])
@torch.no_grad()
def test_rows_longer_than_the_models_attention_are_plain(tokenizer: Any, name: str) -> None:
    """A mask of 4 dimensions would stand in place of the window, which no path must be longer than."""
    inner = tiny_llama(vocab_size=len(tokenizer))
    spy = _Spy(inner)
    spy.config = inner.config
    objective = Objective(task_of("classification"), tokenizer)
    batch = objective.batch(MANY)
    assert batch.path_length < batch.input_ids.shape[1]
    for window, dimensions in ((batch.path_length - 1, 2), (batch.path_length, 4)):
        setattr(inner.config, name, window)
        objective.scores(spy, batch)
        assert spy.calls[-1]["attention_mask"].ndim == dimensions


@torch.no_grad()
def test_tokens_that_merge_over_the_boundary_are_predicted_from_where_they_begin(model: Any, tokenizer: Any) -> None:
    example = Example("So they left the harbour because of th", ("e rain", "ere was no light"), 0)
    prompt = tokenizer(example.prompt)["input_ids"]
    texts = [example.prompt + text for text in example.candidates]
    paths = [tokenizer(text)["input_ids"] for text in texts]
    assert all(path[: len(prompt)] != prompt for path in paths)
    batch = Objective(task_of("classification"), tokenizer).batch([example])
    assert batch.plain is not None
    assert batch.tokens == sum(len(path) - 1 for path in paths) - shared_tokens(*paths)
    scores = Objective(task_of("classification"), tokenizer).scores(model, batch)[0].tolist()
    for came, text, ids in zip(scores, texts, paths, strict=True):
        ends = [end for _, end in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]
        first = next(i for i, end in enumerate(ends) if end > len(example.prompt))
        log_probs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], dim=-1)
        expected = mean([float(log_probs[at - 1, ids[at]]) for at in range(first, len(ids))])
        assert came == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("max_length", [8, 12, 20, 26, 30, 40])
@torch.no_grad()
def test_truncation_keeps_in_packed_rows_what_plain_ones_keep(model: Any, tokenizer: Any, max_length: int) -> None:
    objective = Objective(task_of("classification"), tokenizer, max_length=max_length)
    batch = objective.batch(MANY)
    assert batch.path_length <= max_length
    for row, example in zip(objective.scores(model, batch).tolist(), MANY[:2], strict=False):
        if max_length >= 26:  # otherwise a candidate is longer than its row
            assert row == pytest.approx(slow_scores(model, tokenizer, example, max_length), abs=TOLERANCE)
    torch.testing.assert_close(
        objective.scores(model, batch), objective.scores(model, batch.plain or batch), atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize(("prompt", "candidate"), [("", " the"), ("The", "")])
def test_a_candidate_without_tokens_or_with_none_before_it_is_an_error(
    tokenizer: Any, prompt: str, candidate: str
) -> None:
    with pytest.raises(ZotunerError, match="expected a prompt and a candidate of a token or more"):
        Objective(task_of("classification"), tokenizer).batch([Example(prompt, (candidate,), 0)])


# ------------------------------------------------------------------------------------- branches and micro-batches


class _Tempered(torch.nn.Module):
    """A model whose branches differ: branch i of `branches` divides its logits by i + 1."""

    def __init__(self, model: Any, branches: int) -> None:
        super().__init__()
        self.inner, self.device, self.branches = model, model.device, branches

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Any:
        out = self.inner(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        parts = out.logits.chunk(self.branches)
        out.logits = torch.cat([part / (i + 1) for i, part in enumerate(parts)])
        return out


@pytest.mark.parametrize("loss", LOSSES)
@torch.no_grad()
def test_each_branch_has_the_loss_that_it_has_alone(model: Any, tokenizer: Any, loss: Kind) -> None:
    objective = Objective(task_of(loss), tokenizer)
    batch = objective.training_batch(MANY + RAGGED)
    came = objective.loss(_Tempered(model, 3), batch, branches=3)
    assert came.dtype == torch.float32
    assert came.shape == (3,)
    assert len(set(came.tolist())) == 3
    assert float(came[0]) == pytest.approx(float(objective.loss(model, batch)), abs=TOLERANCE)
    assert objective.loss(model, batch, branches=2).tolist() == pytest.approx([float(came[0])] * 2, abs=TOLERANCE)


@torch.no_grad()
def test_branches_are_one_call_of_the_batch_repeated(model: Any, tokenizer: Any) -> None:
    objective, spy = Objective(task_of("classification"), tokenizer), _Spy(model)
    for batch in (objective.training_batch(MANY), objective.training_batch(ONE)):
        objective.loss(spy, batch)
        one = spy.calls[-1]
        count = len(spy.calls)
        objective.loss(spy, batch, branches=3)
        assert len(spy.calls) == count + 1
        for name in ("input_ids", "attention_mask", "position_ids"):
            assert torch.equal(spy.calls[-1][name], torch.cat([one[name]] * 3))


@pytest.mark.parametrize(("size", "sizes"), [(None, [9]), (9, [9]), (20, [9]), (4, [4, 4, 1]), (1, [1] * 9)])
def test_micro_batches_hold_every_example_once_and_are_padded_to_their_own_longest(
    tokenizer: Any, size: int | None, sizes: list[int]
) -> None:
    objective = Objective(task_of("classification"), tokenizer)
    batches = objective.training_batches(MANY + ONE + RAGGED, size)
    assert [len(batch.labels) for batch in batches] == sizes
    assert sum(shares(batches)) == pytest.approx(1.0)
    lengths = [batch.path_length for batch in batches]
    assert lengths == sorted(lengths)
    whole = objective.training_batch(MANY + ONE + RAGGED)
    assert Counter(x for batch in batches for x in batch.labels.tolist()) == Counter(whole.labels.tolist())
    assert all(bool((batch.segments[:, 0] == 0).any()) for batch in batches)
    padded, at_once = ([b.plain or b for b in some] for some in (batches, [whole]))
    assert len(batches) == 1 or sum(b.input_ids.numel() for b in padded) < at_once[0].input_ids.numel()


@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 4, 5])
@pytest.mark.parametrize("loss", LOSSES)
@torch.no_grad()
def test_micro_batches_have_the_mean_loss_of_the_whole_batch(
    model: Any, tokenizer: Any, loss: Kind, size: int, branches: int
) -> None:
    objective, examples = Objective(task_of(loss), tokenizer), MANY + ONE + RAGGED
    tempered = _Tempered(model, branches)
    whole = objective.loss(tempered, objective.training_batch(examples), branches)
    parts = objective.mean_loss(tempered, objective.training_batches(examples, size), branches)
    assert parts.shape == whole.shape
    torch.testing.assert_close(parts, whole, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_one_batch_has_its_own_mean_loss_bit_for_bit(model: Any, tokenizer: Any) -> None:
    objective = Objective(task_of("classification"), tokenizer)
    batches = objective.training_batches(MANY)
    assert torch.equal(objective.mean_loss(model, batches), objective.loss(model, batches[0]))


# ----------------------------------------------------------------------------------------------------- evaluation


def test_evaluations_of_a_run_tokenise_each_candidate_once(model: Any, tokenizer: Any) -> None:
    calls: list[str] = []

    class Counting:
        pad_token_id = tokenizer.pad_token_id

        def __call__(self, text: str, **options: Any) -> Any:
            calls.append(text)
            return tokenizer(text, **options)

    objective, examples = Objective(task_of("classification"), Counting()), MANY + ONE + RAGGED
    for _ in range(2):
        evaluate(model, objective, examples, 4)
        objective.training_batches(examples, 2)
    assert sorted(calls) == sorted({example.prompt + text for example in examples for text in example.candidates})


@torch.no_grad()
def test_evaluation_goes_by_tokens_not_by_characters(model: Any, tokenizer: Any) -> None:
    few = Example("somebody somebody somebody It was", (" the", " and"), 0)
    many = Example("🌧🌧🌧🌧🌧🌧 It was", (" the", " and"), 0)
    objective, spy = Objective(task_of("classification"), tokenizer), _Spy(model)
    assert len(few.prompt) > len(many.prompt)
    assert objective.length(few) < objective.length(many)
    evaluate(spy, objective, [many, few], 1)
    assert [call["input_ids"].shape[1] for call in spy.calls] == [objective.length(few), objective.length(many)]


@pytest.mark.parametrize("loss", LOSSES)
def test_evaluate_is_the_obvious_computation(model: Any, tokenizer: Any, loss: Kind) -> None:
    examples = MANY + ONE + RAGGED
    came = evaluate(model, Objective(task_of(loss), tokenizer), examples).figures
    scores = [slow_scores(model, tokenizer, example) for example in examples]
    right = [max(range(len(s)), key=s.__getitem__) == e.label for s, e in zip(scores, examples, strict=True)]
    assert set(came) == {"loss", "accuracy"}
    assert came["accuracy"] == pytest.approx(mean(right))
    slow = [slow_loss(model, tokenizer, example, loss) for example in examples]
    assert came["loss"] == pytest.approx(mean(slow), abs=TOLERANCE)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_evaluate_does_not_depend_on_the_batch_size(model: Any, tokenizer: Any, batch_size: int) -> None:
    examples = MANY + ONE + RAGGED
    objective = Objective(task_of("classification"), tokenizer)
    one = evaluate(model, objective, examples, batch_size).figures
    all_at_once = evaluate(model, objective, examples, 32).figures
    assert one["accuracy"] == all_at_once["accuracy"]
    assert one["loss"] == pytest.approx(all_at_once["loss"], abs=TOLERANCE)


def test_evaluation_has_the_loss_and_the_answer_of_each_example_in_the_order_given(model: Any, tokenizer: Any) -> None:
    examples = [*RAGGED, *MANY, *ONE]
    objective = Objective(task_of("classification"), tokenizer)
    came = evaluate(model, objective, examples, 2)
    alone = [evaluate(model, objective, [example]) for example in examples]
    assert came.losses == pytest.approx([one.figures["loss"] for one in alone], abs=TOLERANCE)
    assert came.answers == tuple(answer for one in alone for answer in one.answers)
    assert came.figures["loss"] == pytest.approx(mean(came.losses))
    assert came.loss_error == pytest.approx(stdev(came.losses) / len(examples) ** 0.5)
    assert math.isnan(alone[0].loss_error)


def test_evaluate_reports_every_example_once_and_builds_no_graph(model: Any, tokenizer: Any) -> None:
    done: list[int] = []
    examples = MANY + ONE
    evaluate(model, Objective(task_of("classification"), tokenizer), examples, 4, advance=done.append)
    assert done == [4, 2]
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("make", [lambda o: o.batch(MANY), lambda o: o.batch(ONE, right_only=True)], ids=["all", "one"])
def test_the_same_examples_give_the_same_batch_again(tokenizer: Any, make: Callable[[Objective], Batch]) -> None:
    objective = Objective(task_of("classification"), tokenizer)
    first, again = make(objective), make(objective)
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.targets, again.targets)
    assert torch.equal(first.labels, again.labels)
