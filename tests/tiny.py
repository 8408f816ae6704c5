"""Tiny models of real architectures, with random weights, built offline in milliseconds."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    """What `make` returns when the global random state starts from a seed; the state itself is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def tiny_llama(seed: int = 0, **overrides: Any) -> nn.Module:
    """A Llama of 2 layers, 4 heads over 2 key-value heads, hidden size 16; untied unless told otherwise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = LlamaConfig(**{**SIZES, **heads, "bos_token_id": 1, "eos_token_id": 2, **overrides})
    return seeded(lambda: LlamaForCausalLM(config).eval(), seed)


def tiny_gpt2(seed: int = 0, **overrides: Any) -> nn.Module:
    """A GPT-2 of 2 layers, 4 heads, hidden size 16: `c_attn` is a Conv1D, the output embedding is tied."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 64}
    config = GPT2Config(**{**sizes, "bos_token_id": 1, "eos_token_id": 2, **overrides})
    return seeded(lambda: GPT2LMHeadModel(config).eval(), seed)


def tiny_phi3(seed: int = 0, **overrides: Any) -> nn.Module:
    """A Phi-3 of 2 layers, hidden size 16: `qkv_proj` stacks 4 heads of q over 2 of k and 2 of v."""
    from transformers import Phi3Config, Phi3ForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = Phi3Config(**{**SIZES, **heads, **special, **overrides})
    return seeded(lambda: Phi3ForCausalLM(config).eval(), seed)


def tiny_neox(seed: int = 0, **overrides: Any) -> nn.Module:
    """A GPT-NeoX of 2 layers, hidden size 16: the heads of `query_key_value` interleave q, k and v."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    more = {"num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}
    config = GPTNeoXConfig(**{**SIZES, **more, **overrides})
    return seeded(lambda: GPTNeoXForCausalLM(config).eval(), seed)
