"""What several test files share: a tokenizer trained on the embedded texts, and tiny models that speak it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hub_server import HubServer
    from transformers import PreTrainedTokenizerFast

# Waiting threads that spin make tiny models a hundred times slower when other programs keep the cores busy. OpenMP
# reads this when torch is imported; subprocesses inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Workers of a parallel run are given a terminal's width, at which tables are cut; tests that are about one state it.
os.environ.pop("COLUMNS", None)

DATA = Path(__file__).parents[1] / "zotuner" / "tasks" / "data"
VOCABULARY = 400  # 256 bytes, two special tokens, the rest merges


def embedded_texts() -> Iterator[str]:
    """Every text of the embedded training sets."""
    for path in sorted(DATA.glob("*/train.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            yield from (value for value in json.loads(line).values() if isinstance(value, str))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens: common words are one token, others several; it adds no special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(embedded_texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="<s>")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a random Llama (hidden 16, 2 layers, tied embedding) and its tokenizer, as transformers saves."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tuner_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh tuner of the tiny model, whose scales differ from block to block."""
    from zotuner.models import load_model
    from zotuner.tuner import Tuner

    folder = tmp_path_factory.mktemp("tuner")
    Tuner.for_model(load_model(model_dir)[0], "abs", seed=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def whole(model_dir: Path, tuner_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of a kind (see `runs`) that nothing disturbed, made once."""
    from runs import options_of
    from test_cli import argv_of, call, quick

    folder = tmp_path_factory.mktemp("whole")

    def run(kind: str) -> Path:
        out = folder / kind
        if not out.exists():
            assert call("finetune", *argv_of(quick(model_dir, out, **options_of(kind, tuner_dir)))) == 0
        return out

    return run


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running server, with this process's client pointed at it."""
    from hub_server import HubServer
    from huggingface_hub import constants

    with HubServer(tmp_path / "hub") as server:
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses.json"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server
