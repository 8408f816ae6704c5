"""What is measured on: a model, random tokens of one shape, and the loss that every side of a measurement evaluates."""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zotuner.errors import ZotunerError, unknown
from zotuner.models import accepts, load_model
from zotuner.tuner import Tuner

PREFIX = "random:"
# TinyLlama-1.1B's proportions (arXiv:2401.02385), and the same at three quarters of the width and the depth
SIZES: dict[str, dict[str, Any]] = {
    "0.5b": {
        "hidden_size": 1536,
        "intermediate_size": 4224,
        "num_hidden_layers": 16,
        "num_attention_heads": 24,
        "num_key_value_heads": 3,
    },
    "1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}


class Workload:
    """Random tokens, and a model's loss on them.

    Args:
        model: A causal language model.
        batch_size: Sequences.
        length: Tokens a sequence.
        logits: "all": the mean loss of all positions; "last": of the last one, whose logits alone are computed where
            the model's forward can do so.
    """

    def __init__(self, model: Any, *, batch_size: int, length: int, logits: str) -> None:
        self.model = model
        self.tokens = batch_size * length
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (batch_size, length + 1), generator=random)
        self._keep = 0 if logits == "all" else 1  # positions from the end; 0: all, as transformers has it
        self._inputs = ids[:, :-1].contiguous()  # (batch, length)
        self._targets = ids[:, 1:][:, -self._keep :].contiguous()  # (batch, length or 1)
        self._options: dict[str, Any] = {"use_cache": False}
        if self._keep and accepts(model)("logits_to_keep"):
            self._options["logits_to_keep"] = self._keep

    def loss(self, branches: int = 1) -> Tensor:
        """The loss, 0-d; with several branches (branches,), of the batch repeated so often along dim 0."""
        logits = self.model(input_ids=self._inputs.repeat(branches, 1), **self._options).logits[:, -self._keep :]
        parts = [
            F.cross_entropy(part.flatten(0, 1).float(), self._targets.flatten()) for part in logits.chunk(branches)
        ]
        return parts[0] if branches == 1 else torch.stack(parts)

    @property
    def parameters(self) -> int:
        """Elements of the weights."""
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def tuner(self) -> Tuner:
        """A fresh tuner of the model's blocks: what it costs does not depend on what it learned."""
        return Tuner.for_model(self.model)


def load(name: str, dtype: str) -> Any:
    """A model by any name that `--model` takes, or "random:SIZE": a Llama of random weights, without a download."""
    if not name.startswith(PREFIX):
        return load_model(name, dtype=dtype)[0]
    size = name.removeprefix(PREFIX)
    if size not in SIZES:
        raise ZotunerError(unknown("random model", name, [PREFIX + known for known in SIZES]))
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=False, **SIZES[size])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        return AutoModelForCausalLM.from_config(config, dtype=kind).eval()
