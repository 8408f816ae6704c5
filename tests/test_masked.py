"""Masked models: scores against the obvious computation, one row at a time, and a run of fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_cli import argv_of, call, quick
from tiny import seeded
from transformers import PreTrainedTokenizerFast

from zotuner.errors import ZotunerError
from zotuner.models import kind_of, load_model, max_positions
from zotuner.objective import Objective
from zotuner.optim import FZOO, MeZO
from zotuner.scoring import MaskedScorer
from zotuner.tasks import Example, get_task

EXAMPLES = (
    Example("A joy from the first page to the last It was", (" the", " and"), 1, suffix="."),
    Example("Fine It was", (" and", " the"), 0, suffix="."),
    Example("The soup was cold ?", (" it", " the", " and"), 2, suffix=" , nobody ate it and they went home"),
)


WORDS = [
    *("terrible", "bad", "okay", "good", "great", "Yes", "Maybe", "No"),
    *("Expression", "Entity", "Description", "Human", "Location", "Number"),
]


def with_mask(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer with the tasks' words and <mask>, which takes the space before it, between <s> and <s>."""
    from tokenizers import AddedToken, Tokenizer, processors

    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.add_tokens([AddedToken(f" {word}", normalized=False) for word in WORDS])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<s>",
        cls_token="<s>",
        sep_token="<s>",
        mask_token=AddedToken("<mask>", lstrip=True),
    )


@pytest.fixture(scope="module")
def masking(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return with_mask(tokenizer)


def roberta(vocabulary: int) -> Any:
    from transformers import RobertaConfig, RobertaForMaskedLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = RobertaConfig(
        **sizes, vocab_size=vocabulary, max_position_embeddings=66, initializer_range=0.3, pad_token_id=0
    )
    return seeded(lambda: RobertaForMaskedLM(config).eval())


def bert(vocabulary: int) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**sizes, vocab_size=vocabulary, max_position_embeddings=64, initializer_range=0.3)
    return seeded(lambda: BertForMaskedLM(config).eval())


@pytest.fixture(scope="module", params=[roberta, bert], ids=["roberta", "bert"])
def model(request: pytest.FixtureRequest, masking: PreTrainedTokenizerFast) -> Any:
    return request.param(len(masking))


@torch.no_grad()
def slow_scores(model: Any, tokenizer: Any, example: Example) -> list[float]:
    """Of each candidate: one row, no padding."""
    ids = tokenizer(f"{example.prompt} <mask>{example.suffix}")["input_ids"]
    place = ids.index(tokenizer.mask_token_id)
    log_probs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, place], dim=-1)
    words = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in example.candidates]
    assert all(len(word) == 1 for word in words)
    return [float(log_probs[word[0]]) for word in words]


def test_scores_are_those_of_the_obvious_computation(model: Any, masking: Any) -> None:
    objective = Objective(get_task("sst2"), masking, 64, kind="masked")
    with torch.no_grad():
        scores = objective.scores(model, objective.batch(EXAMPLES))
    for row, example in zip(scores.tolist(), EXAMPLES, strict=True):
        count = len(example.candidates)
        assert row[:count] == pytest.approx(slow_scores(model, masking, example), abs=1e-5)
        assert all(score == float("-inf") for score in row[count:])


def test_the_loss_of_a_batch_is_the_mean_of_its_examples_losses(model: Any, masking: Any) -> None:
    objective = Objective(get_task("sst2"), masking, 64, kind="masked")
    losses = [
        float(torch.logsumexp(torch.tensor(scores), 0)) - scores[example.label]
        for example in EXAMPLES
        for scores in [slow_scores(model, masking, example)]
    ]
    with torch.no_grad():
        assert float(objective.loss(model, objective.training_batch(EXAMPLES))) == pytest.approx(
            sum(losses) / len(losses), abs=1e-5
        )


@pytest.mark.parametrize(
    ("example", "text"),
    [
        (Example("one two three four five six It was", (" the",), 0, suffix="."), " five six It was<mask>."),
        (Example("", ("the",), 0, suffix=": one two three four five six"), "<mask>: one two three"),
    ],
    ids=["mask at the end", "mask at the beginning"],
)
def test_a_long_row_keeps_its_mask_and_its_special_tokens(masking: Any, example: Example, text: str) -> None:
    length = 2 + len(masking(text, add_special_tokens=False)["input_ids"])
    batch = MaskedScorer(masking, length).batch([example])
    ids = batch.input_ids[0].tolist()
    assert len(ids) == length
    assert ids[0] == ids[-1] == masking.bos_token_id
    assert ids[int(batch.places[0])] == masking.mask_token_id
    assert masking.decode(ids[1:-1]).replace(" <mask>", "<mask>") == text


def test_a_candidate_of_several_tokens_is_an_error(masking: Any) -> None:
    example = Example("It was", (" the", " somebody"), 0)
    with pytest.raises(ZotunerError, match=r"one token it knows, but ' somebody' is"):
        MaskedScorer(masking).batch([example])


def test_a_prompt_that_holds_a_mask_is_an_error(masking: Any) -> None:
    with pytest.raises(ZotunerError, match="expected one <mask> in a prompt, got 2"):
        MaskedScorer(masking).batch([Example("a <mask> b", (" the",), 0)])


def test_a_tokenizer_without_a_mask_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(ZotunerError, match="no mask token"):
        MaskedScorer(tokenizer)


def test_roberta_reads_fewer_tokens_than_its_table_has_rows(masking: Any) -> None:
    assert max_positions(roberta(len(masking)), masking) == 65
    assert max_positions(bert(len(masking)), masking) == 64


@pytest.mark.parametrize("make", [lambda m: MeZO(m, lr=1e-3), lambda m: FZOO(m, lr=1e-3, num_perturbations=3)])
def test_stacked_branches_have_the_losses_that_they_have_alone(
    model: Any, masking: Any, make: Callable[[Any], MeZO | FZOO]
) -> None:
    objective = Objective(get_task("sst2"), masking, 64, kind="masked")
    batch = objective.training_batch(EXAMPLES)
    found = []
    for stacked in (True, False):
        fresh = type(model)(model.config).eval()
        fresh.load_state_dict(model.state_dict())
        opt = make(fresh)
        with torch.no_grad():
            opt.step(
                (lambda branches=1, m=fresh: objective.loss(m, batch, branches))
                if stacked
                else (lambda m=fresh: objective.loss(m, batch))
            )
        assert opt.last is not None
        found.append(opt.last.losses)
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.fixture(scope="module")
def masked_dir(masking: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masked") / "roberta"
    roberta(len(masking)).save_pretrained(folder)
    masking.save_pretrained(folder)
    return folder


def test_a_masked_model_is_fine_tuned_on_sixteen_examples_of_each_class(masked_dir: Path, tmp_path: Path) -> None:
    options = dict.fromkeys(("train_size", "dev_size"))
    assert call("finetune", *argv_of(quick(masked_dir, tmp_path / "run", lr=1e-2, **options))) == 0
    assert kind_of(load_model(masked_dir)[0]) == "masked"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["examples"] == {"train": 32, "dev": 32, "test": 8}
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["k_shot"] == 16
    assert summary["final"].keys() == {"loss", "accuracy"}
    assert summary["final"]["loss"] != summary["zero_shot"]["loss"]


def test_stated_sizes_count_for_a_masked_model_too(masked_dir: Path, tmp_path: Path) -> None:
    assert call("finetune", *argv_of(quick(masked_dir, tmp_path / "run", method="fzoo"))) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["examples"] == {"train": 8, "dev": 4, "test": 8}


def test_an_option_without_effect_is_said(masked_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"train_size": None, "dev_size": 9, "momentum": 0.5, "steps": 1}
    assert call("finetune", *argv_of(quick(masked_dir, tmp_path / "run", **options))) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "has no effect" in line]
    assert told == ["--momentum has no effect on method mezo", "--dev-size has no effect with --k-shot"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["examples"]["dev"] == 32


def test_a_task_for_causal_models_alone_says_so(
    masked_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("finetune", *argv_of(quick(masked_dir, tmp_path / "run", task="demo-copa"))) == 2
    assert "task demo-copa has a prompt for causal models alone" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
