"""Adapters: the right losses on every architecture by every engine, runs that replay, folders that peft loads."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftModelForCausalLM
from test_cli import argv_of, assert_one_error_line, call, quick, quick_meta, summary_of
from test_perturb import moved
from tiny import seeded, tiny_gpt2, tiny_llama, tiny_opt, tiny_phi3, tiny_roberta
from torch import nn
from transformers import PreTrainedTokenizerFast

from zotuner.adapters import adapted, adapter_of, check_tuner, load_adapter, virtual_tokens
from zotuner.blocks import find_blocks, named_weights
from zotuner.config import FinetuneConfig
from zotuner.errors import ZotunerError
from zotuner.evaluate import evaluate
from zotuner.models import load_model, save_model, weights_sha256
from zotuner.objective import Objective
from zotuner.optim import FZOO, MeZO, ZOFineTuner, ZOOptimizer
from zotuner.optim.zo_finetuner import Learned
from zotuner.perturb import Draw
from zotuner.quantized import QuantizedLinear, quantize_
from zotuner.steppers import FirstOrderStepper
from zotuner.tasks import Example, get_task
from zotuner.training import Training
from zotuner.tuner import Tuner

# peft reads a property of transformers' models that is about to be renamed, and asked without our help it says so
peft_warns = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
KINDS = ("lora", "prefix", "prompt", "ia3")
MAKES: dict[str, Callable[..., Any]] = {"llama": tiny_llama, "gpt2": tiny_gpt2, "opt": tiny_opt}
TENSORS = {"lora": 8, "prefix": 1, "prompt": 1, "ia3": 6}  # of the tiny Llama
EXAMPLES = (  # of unequal lengths: all but one row are padded, and candidates of two tokens or more share rows
    Example("The parade was cancelled because", (" the rain would not stop.", " they left early."), 0),
    Example("So", (" no", " they left the harbour before the ferry"), 1),
    Example("It was", (" the", " and"), 1),
)


def config_of(kind: str, **options: Any) -> FinetuneConfig:
    return FinetuneConfig.read(
        None, {"model": "m", "task": "t", "method": "none", "out": "o", "adapter": kind, **options}
    )


def fresh(make: Callable[..., Any], kind: str, seed: int = 0, layers: int = 2, **options: Any) -> Any:
    """A tiny model with an adapter as a run begins with."""
    depth = {} if layers == 2 else {"num_hidden_layers": layers}
    return adapted(make(vocab_size=400, initializer_range=0.2, **depth), config_of(kind, seed=seed, **options), "base")


def lively(make: Callable[..., Any], kind: str, **options: Any) -> Any:
    """One whose loss answers to each of the adapter's tensors."""
    model = fresh(make, kind, **options)
    with torch.no_grad():
        seeded(lambda: [p.add_(0.2 * torch.randn_like(p)) for p in model.parameters() if p.requires_grad])
    return model


@pytest.fixture(scope="module")
def objective(tokenizer: PreTrainedTokenizerFast) -> Objective:
    return Objective(get_task("demo-sentiment"), tokenizer)


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A finished run of each kind, with its model saved."""
    out = tmp_path_factory.mktemp("adapted") / request.param
    flags = quick(model_dir, out, adapter=request.param, lr=1e-2, eval_every=1, save_model=True)
    assert call("finetune", *argv_of(flags)) == 0
    return request.param, out


# --- what an adapter is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_follows_from_the_seed_and_leaves_the_random_state_alone(kind: str) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = fresh(tiny_llama, kind, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert weights_sha256(fresh(tiny_llama, kind, seed=3)) == weights_sha256(one)
    same = weights_sha256(fresh(tiny_llama, kind, seed=4)) == weights_sha256(one)
    assert same == (kind == "ia3")  # which begins at 1


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapters_tensors_are_blocks_under_names_of_the_base_model(kind: str) -> None:
    blocks = find_blocks(fresh(tiny_llama, kind))
    assert len(blocks) == TENSORS[kind]
    name = {
        "lora": "model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "prefix": "prompt_encoder.default.embedding.weight",
        "prompt": "prompt_encoder.default.embedding.weight",
        "ia3": "model.layers.0.self_attn.k_proj.ia3_l.default",
    }[kind]
    assert blocks[0].name == name


def test_options_say_the_shape_of_an_adapter() -> None:
    lora = fresh(tiny_llama, "lora", adapter_rank=2, adapter_alpha=6, adapter_targets=("o_proj",))
    assert [block.numel for block in find_blocks(lora)] == [32, 32] * 2
    layer = lora.get_submodule("base_model.model.model.layers.0.self_attn.o_proj")
    assert layer.scaling == {"default": 3.0}
    assert isinstance(layer.lora_dropout["default"], nn.Identity)
    assert str(adapter_of(lora)) == "lora (rank 2, alpha 6, on o_proj)"
    prefix = fresh(tiny_llama, "prefix", adapter_tokens=3)
    assert [block.numel for block in find_blocks(prefix)] == [3 * 2 * 2 * 8]  # tokens, layers, keys and values, width
    assert (virtual_tokens(prefix), virtual_tokens(lora)) == (3, 0)
    assert adapter_of(tiny_llama()) is None


def test_a_fresh_lora_or_ia3_changes_nothing_and_a_fresh_prompt_is_words() -> None:
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        base = tiny_llama(vocab_size=400, initializer_range=0.2)(input_ids=ids).logits
        for kind in ("lora", "ia3"):
            assert torch.equal(fresh(tiny_llama, kind)(input_ids=ids).logits, base)
    model = fresh(tiny_llama, "prompt")
    table, words = model.prompt_encoder["default"].embedding.weight, model.word_embeddings.weight
    assert torch.cdist(table, words).min(dim=1).values.max() < 1e-3


def test_a_model_in_half_precision_has_an_adapter_in_float32() -> None:
    for kind in KINDS:
        model = adapted(tiny_llama().bfloat16(), config_of(kind), "base")
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@peft_warns
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_masked_models_have_adapters_in_their_layers(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    model = lively(tiny_roberta, kind)
    ids = torch.arange(3, 9)[None]
    save_model(model, tokenizer, tmp_path / "model", "base")
    loaded = PeftModel.from_pretrained(tiny_roberta(vocab_size=400, initializer_range=0.2), tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


# --- losses ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_has_the_scores_of_unpadded_rows_by_pefts_own_forward(
    objective: Objective, kind: str, name: str
) -> None:
    model = lively(MAKES[name], kind)
    batch = objective.batch(EXAMPLES)
    assert batch.plain is not None  # rows hold several candidates and examples; no warning says that they could not
    assert (batch.plain.attention_mask == 0).any()
    came = objective.scores(model, batch)
    for e, example in enumerate(EXAMPLES):
        for c, text in enumerate(example.candidates):
            path, target = objective._scorer._encode(example.prompt, text)
            ids = torch.tensor([path])
            logits = PeftModelForCausalLM.forward(model, input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            log_probs = torch.log_softmax(logits[0, -len(target) :], dim=-1)
            expected = log_probs[range(len(target)), list(target)].mean()
            torch.testing.assert_close(came[e, c], expected, atol=2e-6, rtol=1e-5)
    for example in EXAMPLES:  # and so has each example by itself
        alone = objective.scores(model, objective.batch([example]))
        torch.testing.assert_close(came[EXAMPLES.index(example)][None], alone, atol=2e-6, rtol=1e-5)


def optimizers(model: Any, **options: Any) -> Iterator[tuple[ZOOptimizer, list[float]]]:
    """Every method, and the factor of z in each of its losses."""
    shared: dict[str, Any] = {"lr": 0.0, "eps": 0.1, "seed": 9, **options}
    yield MeZO(model, noise="gaussian", **shared), [0.1, -0.1]
    yield MeZO(model, noise="rademacher", **shared), [0.1, -0.1]
    yield FZOO(model, num_perturbations=3, **shared), [0.0, 0.1, 0.1, 0.1]
    yield ZOFineTuner(model, Tuner.for_model(model, "abs", seed=2), noise="gaussian", **shared), [0.1, -0.1]


WAYS: dict[str, dict[str, Any]] = {
    "one by one": {"branch_batch": 1, "branch_threads": 1},
    "in one forward": {"branch_batch": 4, "branch_threads": 1},
    "in threads": {"branch_batch": 1, "branch_threads": 2},
    "in place": {"engine": "in-place"},
}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_at_perturbed_weights_are_those_of_weights_moved_by_hand(
    objective: Objective, kind: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    model = lively(tiny_llama, kind)
    before = weights_sha256(model)
    batches, asked = objective.training_batches(EXAMPLES, 2), []

    def closure(branches: int = 1) -> torch.Tensor:
        asked.append(branches)
        return objective.mean_loss(model, batches, branches)

    for opt, factors in optimizers(model, **WAYS[way]):
        opt.step(closure)
        assert opt.last is not None
        sigma = [1.0] * len(opt.blocks) if opt.last.scales is None else opt.last.scales.tolist()
        group = opt.param_groups[0]
        for number, (factor, loss) in enumerate(zip(factors, opt.last.losses, strict=True)):
            draw = Draw(group["noise"], 9, 0, number if len(factors) > 2 else 0)
            twin = moved(model, draw, [factor * s for s in sigma])
            assert loss == pytest.approx(float(objective.mean_loss(twin, batches)), abs=2e-6)
        assert max(opt.last.losses) - min(opt.last.losses) > 1e-4
        assert opt._perturber._branch_threads == WAYS[way].get("branch_threads", "auto")  # and no fall back
    assert way == "in place" or weights_sha256(model) == before
    assert (max(asked) > 1) == (way == "in one forward")


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_what_further_forwards_take_is_compared_with_the_whole_model(objective: Objective, kind: str) -> None:
    model, asked = lively(tiny_llama, kind, layers=40), []
    batch = objective.training_batch(EXAMPLES[2:])

    def closure(branches: int = 1) -> torch.Tensor:
        asked.append(branches)
        return objective.loss(model, batch, branches)

    opt = FZOO(model, lr=0.0, num_perturbations=3, branch_threads=1)
    opt.step(closure)
    assert max(asked) == 4  # the frozen weights are large beside the activations, the adapter's tensors are not
    predicting = batch.input_ids.shape[0] * len(batch.columns)
    assert opt._perturber._widest >= predicting * 400 * 4  # of a layer that stays as it is


# --- runs -----------------------------------------------------------------------------------------------------------


@peft_warns
@torch.no_grad()
def test_peft_loads_what_a_run_saves_and_has_the_same_loss(run: tuple[str, Path], model_dir: Path) -> None:
    kind, out = run
    saved = json.loads((out / "model" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(model_dir)
    assert saved["task_type"] == "CAUSAL_LM"
    files = {path.name for path in (out / "model").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    ours, tokenizer = load_model(out / "model")
    assert weights_sha256(ours) == summary_of(out)["weights_sha256"]
    assert weights_sha256(ours) != weights_sha256(fresh_on(model_dir, kind))
    theirs = PeftModel.from_pretrained(load_model(model_dir)[0], out / "model")
    ids = tokenizer("The parade was cancelled because", return_tensors="pt")["input_ids"]
    first, second = (m(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for m in (ours, theirs))
    assert torch.equal(first, second)
    assert type(tokenizer).from_pretrained(out / "model").get_vocab() == tokenizer.get_vocab()


def fresh_on(folder: Path, kind: str) -> Any:
    return adapted(load_model(folder)[0], config_of(kind), folder)


def test_a_saved_adapter_is_evaluated_and_tuned_on_like_a_model(run: tuple[str, Path], tmp_path: Path) -> None:
    kind, out = run
    flags = quick(out / "model", tmp_path / "again", method="none")
    assert call("finetune", *argv_of(flags)) == 0
    assert summary_of(tmp_path / "again")["zero_shot"] == summary_of(out)["final"]
    flags = quick(out / "model", tmp_path / "more", lr=1e-2, save_model=True)
    assert call("finetune", *argv_of(flags)) == 0
    base = json.loads((tmp_path / "more" / "model" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == json.loads((out / "model" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert adapter_of(load_model(tmp_path / "more" / "model")[0]).kind == kind


def test_a_fresh_adapter_is_evaluated_by_method_none(model_dir: Path, tmp_path: Path) -> None:
    assert call("finetune", *argv_of(quick(model_dir, tmp_path / "lora", method="none", adapter="lora"))) == 0
    assert call("finetune", *argv_of(quick(model_dir, tmp_path / "base", method="none"))) == 0
    assert summary_of(tmp_path / "lora")["zero_shot"] == summary_of(tmp_path / "base")["zero_shot"]


def test_a_run_is_rebuilt_from_its_ledger_to_the_byte(
    run: tuple[str, Path], model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = run
    assert call("replay", out, "--out", tmp_path / "replayed") == 0
    assert "as the run recorded" in capsys.readouterr().out
    assert call("export", out, "--out", tmp_path / "run.zoledger") == 0
    assert call("apply", tmp_path / "run.zoledger", "--model", model_dir, "--out", tmp_path / "applied") == 0
    for folder in ("replayed", "applied"):
        came = (tmp_path / folder / "adapter_model.safetensors").read_bytes()
        assert came == (out / "model" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_base_in_half_precision_is_rebuilt_too(
    kind: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"adapter": kind, "dtype": "bfloat16", "method": "fzoo", "num_perturbations": 3, "eval_every": 1}
    assert call("finetune", *argv_of(quick(model_dir, tmp_path / "run", **flags))) == 0
    assert call("replay", tmp_path / "run", "--out", tmp_path / "model") == 0
    assert "as the run recorded" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"adapter": "prefix"}, {"adapter": "lora", "quantize": 8}], ids=str)
def test_a_run_that_was_broken_off_goes_on_to_the_same_bits(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    flags = {"lr": 1e-2, "eval_every": 1, "steps": 5, "save_every": 2, "save_model": True, **options}
    assert call("finetune", *argv_of(quick(model_dir, tmp_path / "whole", **flags))) == 0
    step = Training._step
    with monkeypatch.context() as patch:

        def broken(self: Training, batches: Any) -> Any:
            if self.totals.steps == 3:
                raise RuntimeError("broken off")
            return step(self, batches)

        patch.setattr(Training, "_step", broken)
        with pytest.raises(RuntimeError, match="broken off"):
            call("finetune", *argv_of(quick(model_dir, tmp_path / "out", **flags)))
    assert call("finetune", "--resume", tmp_path / "out") == 0
    one, other = summary_of(tmp_path / "whole"), summary_of(tmp_path / "out")
    assert (one["weights_sha256"], one["final"], one["dev"]) == (other["weights_sha256"], other["final"], other["dev"])
    name = Path("model") / "adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_another_seed_of_the_adapter_is_no_base_for_a_ledger(
    run: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, out = run
    shutil.copytree(out, tmp_path / "run")
    from zotuner.ledger import read_ledger, write_ledger

    header, records = read_ledger(out / "ledger.bin")
    write_ledger(tmp_path / "run" / "ledger.bin", header | {"config": header["config"] | {"seed": 7}}, records)
    code = call("replay", tmp_path / "run", "--out", tmp_path / "model")
    assert code == 2
    said = assert_one_error_line(capsys.readouterr().err)
    assert ("is for the model with SHA-256" in said) == (kind != "ia3")  # whose start has no seed: the steps tell


# --- a quantised base -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_frozen_base_is_quantised_and_the_adapter_is_not(kind: str) -> None:
    model = quantize_(lively(tiny_llama, kind), 8, frozen_only=True)
    stored = [name for name, weight in named_weights(model) if not isinstance(weight, nn.Parameter)]
    assert len(stored) == 15  # 7 matrices in each of 2 layers, and the head
    assert len(find_blocks(model)) == TENSORS[kind]
    assert not any(weight.requires_grad for _, weight in named_weights(model) if not isinstance(weight, nn.Parameter))
    if kind == "lora":
        layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        assert isinstance(layer.base_layer, QuantizedLinear)
        assert type(layer.lora_A["default"]) is nn.Linear


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_on_a_quantised_base_is_tuned_saved_and_replayed(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: int
) -> None:
    out = tmp_path / "run"
    flags = quick(model_dir, out, adapter="lora", quantize=bits, lr=1e-2, eval_every=1, save_model=True)
    assert call("finetune", *argv_of(flags)) == 0
    model = quantize_(load_model(out / "model")[0], bits, frozen_only=True)
    assert weights_sha256(model) == summary_of(out)["weights_sha256"]
    assert call("replay", out, "--out", tmp_path / "again") == 0
    assert "as the run recorded" in capsys.readouterr().out
    came = (tmp_path / "again" / "adapter_model.safetensors").read_bytes()
    assert came == (out / "model" / "adapter_model.safetensors").read_bytes()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_losses_on_a_quantised_base_are_those_of_weights_moved_by_hand(objective: Objective, kind: str) -> None:
    model = quantize_(lively(tiny_llama, kind), 8, frozen_only=True)
    batch = objective.training_batch(EXAMPLES)
    opt = MeZO(model, lr=0.0, eps=0.1, seed=9)
    opt.step(lambda branches=1: objective.loss(model, batch, branches))
    assert opt.last is not None
    for sign, loss in zip((1, -1), opt.last.losses, strict=True):
        twin = moved(model, Draw("gaussian", 9, 0), [sign * 0.1] * TENSORS[kind])
        assert loss == pytest.approx(float(objective.loss(twin, batch)), abs=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [None, 8])
def test_adam_tunes_an_adapter_also_on_integers(objective: Objective, kind: str, bits: int | None) -> None:
    model = fresh(tiny_llama, kind)
    if bits is not None:
        quantize_(model, bits, frozen_only=True)
    config = config_of(kind, method="adam", lr=2e-2, quantize=bits)
    stepper, batches = FirstOrderStepper(config, model), objective.training_batches(EXAMPLES)
    losses = [stepper(objective, batches).loss for _ in range(8)]
    assert losses[-1] < losses[0] - 0.01


# --- tuners ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora_tuner(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuner that was meta-trained for a LoRA."""
    out = tmp_path_factory.mktemp("tuner") / "lora"
    flags = quick_meta(model_dir, out, adapter="lora", adapter_rank=2)
    assert call("meta-train", *argv_of(flags)) == 0
    return out


def test_a_tuner_is_meta_trained_for_an_adapter_and_says_so(lora_tuner: Path, model_dir: Path) -> None:
    tuner = Tuner.from_pretrained(lora_tuner)
    assert str(tuner.info.adapter) == "lora (rank 2, alpha 16, on q_proj v_proj)"
    assert len(tuner.block_names) == 8
    assert all(".lora_" in name for name in tuner.block_names)
    assert tuner.info.base_weights_sha256 == weights_sha256(load_model(model_dir)[0])
    assert "base model's adapter lora (rank 2, alpha 16, on q_proj v_proj)" in (lora_tuner / "README.md").read_text()
    assert float(tuner.bank.w2.detach().abs().max()) > 0  # the nets were trained


def test_a_tuner_for_an_adapter_tunes_that_adapter(lora_tuner: Path, model_dir: Path, tmp_path: Path) -> None:
    flags = quick(
        model_dir, tmp_path / "run", method="zo-finetuner", tuner=lora_tuner, adapter="lora", adapter_rank=2, lr=1e-2,
        eval_every=1,
    )  # fmt: skip
    assert call("finetune", *argv_of(flags)) == 0
    assert call("replay", tmp_path / "run", "--out", tmp_path / "model") == 0
    assert weights_sha256(load_model(tmp_path / "model")[0]) == summary_of(tmp_path / "run")["weights_sha256"]


@pytest.mark.parametrize(
    ("options", "has"),
    [
        ({"adapter": "lora", "adapter_rank": 4}, "lora (rank 4, alpha 16, on q_proj v_proj)"),
        ({"adapter": "lora", "adapter_rank": 2, "adapter_alpha": 2}, "lora (rank 2, alpha 2, on q_proj v_proj)"),
        ({"adapter": "prefix"}, "prefix (tokens 5)"),
        ({}, "none"),
    ],
)
def test_a_tuner_for_another_adapter_is_refused_in_one_line(
    lora_tuner: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: Any, has: str
) -> None:
    flags = quick(model_dir, tmp_path / "run", method="zo-finetuner", tuner=lora_tuner, **options)
    assert call("finetune", *argv_of(flags)) == 2
    said = assert_one_error_line(capsys.readouterr().err)
    assert "with the adapter lora (rank 2, alpha 16, on q_proj v_proj) and does not fit this model" in said
    assert f"which has {has};" in said
    assert not (tmp_path / "run").exists()


def test_a_tuner_for_whole_models_does_not_fit_what_is_added_to_no_layer(
    tuner_dir: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = quick(model_dir, tmp_path / "run", method="zo-finetuner", tuner=tuner_dir, adapter="prefix")
    assert call("finetune", *argv_of(flags)) == 2
    assert "1 of 1 blocks differ" in assert_one_error_line(capsys.readouterr().err)


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_tuner_for_whole_models_tells_an_adapters_tensors_the_scales_of_what_they_adapt(
    kind: str, granularity: Any
) -> None:
    tuner = Tuner.for_model(tiny_llama(vocab_size=400, initializer_range=0.2), "abs", seed=3, granularity=granularity)
    plain = tiny_llama(vocab_size=400, initializer_range=0.2)
    told = {"loss_prev": (0.7, 0.8), "loss_start": 1.0}
    raw, _ = Learned(tuner, plain, find_blocks(plain, granularity)).scales(told)
    whole = dict(zip((block.name for block in find_blocks(plain, granularity)), raw.tolist(), strict=True))
    model = fresh(tiny_llama, kind)
    blocks = find_blocks(model, granularity)
    learned = Learned(tuner, model, blocks)
    found, scales = learned.scales(told)
    added = re.compile(r"\.(lora_[AB]\.default\.weight|ia3_l\.default)$")
    assert found.tolist() == [whole[added.sub(".weight", block.name)] for block in blocks]
    assert granularity == "layer" or all(added.search(block.name) for block in blocks)
    d = torch.tensor([block.numel for block in blocks], dtype=torch.float64)
    assert float((d * scales**2).sum()) == pytest.approx(float(d.sum()))
    with torch.no_grad():
        for param in blocks[0].params:
            param.add_(1.0)
    learned.moved([(9.0, 9.0)] * len(blocks))  # of the adapter's tensors, of which the nets are not told
    assert torch.equal(learned.scales(told)[0], found)


def test_a_tuner_for_whole_models_names_what_it_does_not_know_of_an_adapter() -> None:
    """A LoRA of a fused matrix belongs to q, k and v at once."""
    tuner = Tuner.for_model(tiny_phi3(vocab_size=400), "abs")
    model = fresh(tiny_phi3, "lora", adapter_targets=("qkv_proj",))
    with pytest.raises(ZotunerError, match=r"qkv_proj.lora_A.default.weight \("):
        ZOFineTuner(model, tuner)


@peft_warns
def test_a_run_tunes_a_lora_by_a_tuner_of_the_whole_model_and_replays(
    tuner_dir: Path, model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    flags = quick(model_dir, out, method="zo-finetuner", tuner=tuner_dir, adapter="lora", lr=1e-2)
    assert call("finetune", *argv_of(flags)) == 0
    assert call("replay", out, "--out", tmp_path / "again") == 0


def test_a_tuner_that_names_no_adapter_is_written_as_ever(tuner_dir: Path, tmp_path: Path) -> None:
    tuner = Tuner.from_pretrained(tuner_dir)
    assert "adapter" not in json.loads((tuner_dir / "tuner.json").read_text())
    tuner.save_pretrained(tmp_path)
    assert (tmp_path / "tuner.json").read_bytes() == (tuner_dir / "tuner.json").read_bytes()
    check_tuner(tuner, tiny_llama())  # nothing is said of adapters: names and sizes decide


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"adapter_rank": 4}, "--adapter-rank is for --adapter lora, not for none"),
        ({"adapter": "ia3", "adapter_alpha": 4}, "--adapter-alpha is for --adapter lora, not for ia3"),
        ({"adapter": "lora", "adapter_tokens": 4}, "--adapter-tokens is for --adapter prefix or prompt, not for lora"),
        ({"adapter": "prompt", "adapter_targets": "q_proj"}, "--adapter-targets is for --adapter lora or ia3"),
        ({"adapter": "prefix", "max_length": 6}, "--max-length 6 leaves no room beside --adapter-tokens 5"),
        ({"adapter": "dora"}, "--adapter: input should be 'none', 'lora', 'prefix', 'prompt' or 'ia3', got 'dora'"),
        ({"adapter": "lora", "adapter_rank": 0}, "--adapter-rank: input should be greater than or equal to 1, got '0'"),
        (
            {"adapter": "lora", "adapter_targets": "q_prj"},
            "has no layer 'q_prj'; its linear layers are named q_proj",
        ),
        ({"adapter": "ia3", "adapter_targets": "norm"}, "peft cannot place it in LlamaForCausalLM: Target module"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: dict[str, Any], said: str
) -> None:
    assert call("finetune", *argv_of(quick(model_dir, tmp_path / "run", **flags))) == 2
    assert said in assert_one_error_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_where_peft_knows_no_layers_the_error_names_those_one_can_pass(kind: str) -> None:
    names = "o_proj, qkv_proj, gate_up_proj, down_proj, lm_head"
    with pytest.raises(ZotunerError, match=f"pass --adapter-targets: its linear layers are named {names}"):
        adapted(tiny_phi3(), config_of(kind), "base")
    assert len(find_blocks(adapted(tiny_phi3(), config_of(kind, adapter_targets=("qkv_proj",)), "base"))) > 0


def test_virtual_tokens_that_take_all_that_a_model_reads_are_refused(
    model_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    options = {"adapter": "prompt", "adapter_tokens": 3000, "max_length": 4000}
    assert call("finetune", *argv_of(quick(model_dir, tmp_path / "run", **options))) == 2
    says = "--adapter-tokens 3000 leaves no room in the 256 tokens that the model reads"
    assert says in assert_one_error_line(capsys.readouterr().err)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_are_for_causal_models(kind: str) -> None:
    with pytest.raises(ZotunerError, match="expected a causal language model, got RobertaForMaskedLM; use lora or ia3"):
        adapted(tiny_roberta(), config_of(kind), "base")


def test_a_second_adapter_is_refused() -> None:
    with pytest.raises(ZotunerError, match="has an adapter of its own; leave --adapter out to tune that one"):
        adapted(fresh(tiny_llama, "lora"), config_of("prefix"), "base")


@pytest.mark.parametrize("damage", ["cut short", "no weights", "other shapes", "no JSON", "no base", "a cycle", "gone"])
def test_a_damaged_adapter_is_one_line(
    run: tuple[str, Path], model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    kind, out = run
    folder = tmp_path / "model"
    shutil.copytree(out / "model", folder)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    stated = json.loads(config.read_text())
    if damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "other shapes":
        other = {"lora": {"r": 3}, "ia3": {"feedforward_modules": ["v_proj"]}}.get(kind, {"num_virtual_tokens": 3})
        config.write_text(json.dumps(stated | other))
    elif damage == "no JSON":
        config.write_text("{")
    elif damage == "no base":
        config.write_text(json.dumps(stated | {"base_model_name_or_path": None}))
    elif damage == "a cycle":
        config.write_text(json.dumps(stated | {"base_model_name_or_path": str(folder)}))
    else:
        config.write_text(json.dumps(stated | {"base_model_name_or_path": str(tmp_path / "gone")}))
    assert call("finetune", *argv_of(quick(folder, tmp_path / "run"))) == 2
    assert str(folder) in assert_one_error_line(capsys.readouterr().err)


def test_an_adapter_of_another_model_does_not_load(run: tuple[str, Path]) -> None:
    with pytest.raises(ZotunerError, match="this adapter does not fit GPT2LMHeadModel"):
        load_adapter(tiny_gpt2(vocab_size=400, n_embd=32), run[1] / "model")


# --- the real model -------------------------------------------------------------------------------------------------


@peft_warns
@pytest.mark.slow
@torch.no_grad()
def test_a_lora_of_the_real_model_is_tuned_by_fzoo_and_peft_loads_it(tmp_path: Path) -> None:
    real, out = "smollm2-135m-instruct", tmp_path / "run"
    flags = {"--model": real, "--task": "demo-sentiment", "--method": "fzoo", "--out": out, "--adapter": "lora"}
    sizes = {"--steps": 2, "--batch-size": 4, "--num-perturbations": 2, "--dev-size": 4, "--eval-size": 4}
    assert call("finetune", *argv_of({**flags, **sizes, "--eval-every": 2, "--save-model": True})) == 0
    assert summary_of(out)["forwards"] == 6
    base, tokenizer = load_model(real)
    theirs = PeftModel.from_pretrained(base, out / "model")
    assert sum(tensor.numel() for name, tensor in theirs.named_parameters() if "lora_" in name) == 460_800
    task = get_task("demo-sentiment")
    test = task.splits(train_size=1000, eval_size=4).test
    assert evaluate(theirs, Objective(task, tokenizer), test).figures == summary_of(out)["final"]


def test_nothing_is_copied_that_need_not_be(objective: Objective) -> None:
    """IA3 keeps its vectors in a ParameterDict, which its layers read."""
    model = lively(tiny_llama, "ia3")
    before = copy.deepcopy(model.state_dict())
    opt, batch = MeZO(model, lr=0.0, branch_batch=2), objective.training_batch(EXAMPLES)
    opt.step(lambda branches=1: objective.loss(model, batch, branches))
    assert not opt._perturber._copied
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
