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


def tiny_opt(seed: int = 0, **overrides: Any) -> nn.Module:
    """An OPT of 2 layers, 4 heads, hidden size 16: biases, learned positions, a tied output embedding."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "vocab_size": 64, "num_attention_heads": 4}
    more = {"word_embed_proj_dim": 16, "max_position_embeddings": 128}
    config = OPTConfig(**{**sizes, **more, **overrides})
    return seeded(lambda: OPTForCausalLM(config).eval(), seed)


def tiny_qwen2(seed: int = 0, **overrides: Any) -> nn.Module:
    """A Qwen2 of 2 layers, 4 heads over 2 key-value heads, hidden size 16: q, k and v have biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = Qwen2Config(**{**SIZES, **heads, **overrides})
    return seeded(lambda: Qwen2ForCausalLM(config).eval(), seed)


def tiny_phi(seed: int = 0, **overrides: Any) -> nn.Module:
    """A Phi of 2 layers, 4 heads, hidden size 16: attention and feed-forward side by side, a head with a bias."""
    from transformers import PhiConfig, PhiForCausalLM

    more = {"num_attention_heads": 4, "max_position_embeddings": 128}
    config = PhiConfig(**{**SIZES, **more, "bos_token_id": 1, "eos_token_id": 2, **overrides})
    return seeded(lambda: PhiForCausalLM(config).eval(), seed)


def tiny_roberta(seed: int = 0, **overrides: Any) -> nn.Module:
    """A masked RoBERTa of 2 layers, 4 heads, hidden size 16: its head's decoder and bias are tied."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    more = {"num_attention_heads": 4, "max_position_embeddings": 128}
    config = RobertaConfig(**{**SIZES, **more, **overrides})
    return seeded(lambda: RobertaForMaskedLM(config).eval(), seed)


def tiny_mixtral(seed: int = 0, **overrides: Any) -> nn.Module:
    """A Mixtral of 2 layers, hidden size 16: the weights of 4 experts are stacked in one tensor."""
    from transformers import MixtralConfig, MixtralForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = MixtralConfig(**{**SIZES, **heads, **experts, **overrides})
    return seeded(lambda: MixtralForCausalLM(config).eval(), seed)


def tiny_mamba(seed: int = 0, **overrides: Any) -> nn.Module:
    """A Mamba of 2 layers, hidden size 16: the mixer reads the weights of its convolution and of `dt_proj` itself."""
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 64, "time_step_rank": 4}
    config = MambaConfig(**{**sizes, **overrides})
    return seeded(lambda: MambaForCausalLM(config).eval(), seed)


def tiny_qwen3(seed: int = 0, **overrides: Any) -> nn.Module:
    """A Qwen3 of 2 layers, 4 heads over 2 key-value heads, hidden size 16: queries and keys are normalised."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 128}
    config = Qwen3Config(**{**SIZES, **heads, **overrides})
    return seeded(lambda: Qwen3ForCausalLM(config).eval(), seed)


def tiny_bert(seed: int = 0, **overrides: Any) -> nn.Module:
    """A masked BERT of 2 layers, 4 heads, hidden size 16."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(**{**SIZES, "num_attention_heads": 4, "max_position_embeddings": 128, **overrides})
    return seeded(lambda: BertForMaskedLM(config).eval(), seed)
