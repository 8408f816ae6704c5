"""Blocks: which parameters share a noise vector, under which names, and what is known of their values."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import seeded, tiny_gpt2, tiny_llama, tiny_neox, tiny_phi3
from torch import Tensor, nn

from zotuner.blocks import Block, Piece, base_name, find_blocks, moments, pieces_of

LAYER = (
    *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
    *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)
LLAMA = (
    "model.embed_tokens.weight",
    *(f"model.layers.{layer}.{name}" for layer in (0, 1) for name in LAYER),
    "model.norm.weight",
    "lm_head.weight",
)
LLAMA_LAYERS = (
    "model.embed_tokens.weight",
    "model.layers.0",
    "model.layers.1",
    "model.norm.weight",
    "lm_head.weight",
)

# peft reads a property of transformers' models that is about to be renamed
peft_warns = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def names(model: nn.Module, granularity: str = "block") -> tuple[str, ...]:
    return tuple(block.name for block in find_blocks(model, granularity))


def by_name(model: nn.Module, granularity: str = "block") -> dict[str, Block]:
    return {block.name: block for block in find_blocks(model, granularity)}


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def block_of(*tensors: Tensor) -> Block:
    """A block of whole parameters."""
    pieces, start = [], 0
    for tensor in tensors:
        pieces.append(Piece(nn.Parameter(tensor), (), start))
        start += tensor.numel()
    return Block("made", tuple(pieces), start)


class Module(nn.Module):
    """Stands for a wrapper that keeps what it wraps under a name, as DDP does."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.module = wrapped


# Which parameters


def test_every_parameter_of_a_llama_is_a_block_in_the_models_order() -> None:
    model = tiny_llama()
    assert names(model) == LLAMA
    assert tuple(name for name, _ in model.named_parameters()) == LLAMA
    for block, param in zip(find_blocks(model), model.parameters(), strict=True):
        assert block.numel == param.numel()
        assert block.params[0].data_ptr() == param.data_ptr()
        assert block.params[0].shape == param.shape


def test_a_tied_parameter_comes_once() -> None:
    tied = tiny_llama(tie_word_embeddings=True)
    assert names(tied) == LLAMA[:-1]
    assert sum(block.numel for block in find_blocks(tied)) == trainable(tied) == trainable(tiny_llama()) - 64 * 16


def test_a_parameter_tied_by_hand_comes_once() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    assert names(nn.Sequential(first, second)) == ("0.weight", "0.bias", "1.bias")


def test_frozen_parameters_are_left_out() -> None:
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    assert names(model) == tuple(n for n in LLAMA[1:] if not n.startswith("model.layers.0."))
    assert names(model, "layer") == LLAMA_LAYERS[2:]


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter: set requires_grad"):
        find_blocks(tiny_llama().requires_grad_(False))
    with pytest.raises(ValueError, match="no trainable parameter"):
        find_blocks(nn.Tanh(), "layer")


def test_an_unknown_granularity_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown granularity 'layers'; did you mean 'layer'. Known: block, layer"):
        find_blocks(tiny_llama(), "layers")


def test_a_scalar_parameter_is_a_block_of_one_element() -> None:
    model = nn.Module()
    model.temperature = nn.Parameter(torch.tensor(2.0))
    (block,) = find_blocks(model)
    assert (block.name, block.numel, block.params[0].shape) == ("temperature", 1, ())


# Layers


def test_granularity_layer_groups_a_layer_of_the_model() -> None:
    model = tiny_llama()
    blocks = by_name(model, "layer")
    assert tuple(blocks) == LLAMA_LAYERS
    for number in (0, 1):
        block, params = blocks[f"model.layers.{number}"], list(model.model.layers[number].parameters())
        assert [t.data_ptr() for t in block.params] == [p.data_ptr() for p in params]
        assert block.numel == sum(p.numel() for p in params)
        starts = [0, *torch.tensor([p.numel() for p in params]).cumsum(0).tolist()]
        assert [piece.start for piece in block.pieces] == starts[:-1]


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_phi3, tiny_neox])
def test_blocks_partition_the_trainable_elements(build: Callable[[], nn.Module], granularity: str) -> None:
    model = build()
    blocks = find_blocks(model, granularity)
    assert sum(block.numel for block in blocks) == trainable(model)
    assert len({block.name for block in blocks}) == len(blocks)
    for block in blocks:
        assert block.numel == sum(t.numel() for t in block.params)
        for tensor in block.params:
            tensor.add_(1000.0)
    assert all(((p > 900) & (p < 1100)).all() for p in model.parameters())  # each element was met once


def test_the_outermost_layer_holds_what_lists_inside_it_hold() -> None:
    inner = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    model = nn.ModuleDict({"layers": nn.ModuleList([inner]), "head": nn.Linear(2, 2)})
    assert names(model, "layer") == ("layers.0", "head.weight", "head.bias")


def test_a_model_that_is_itself_a_list_has_numbered_layers() -> None:
    assert names(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "layer") == ("0", "1")


def test_pieces_come_with_their_blocks_number() -> None:
    blocks = find_blocks(tiny_llama(), "layer")
    pairs = list(pieces_of(blocks))
    assert [number for number, _ in pairs] == [0] + [1] * 9 + [2] * 9 + [3, 4]
    assert [piece for _, piece in pairs] == [piece for block in blocks for piece in block.pieces]


# Fused QKV


def test_a_conv1d_is_cut_by_its_columns() -> None:
    model = tiny_gpt2()
    blocks, attention = by_name(model), model.transformer.h[1].attn.c_attn
    assert attention.weight.shape == (16, 48)
    for number, part in enumerate("qkv"):
        columns = slice(16 * number, 16 * number + 16)
        weight = blocks[f"transformer.h.1.attn.c_attn.weight[{part}]"]
        bias = blocks[f"transformer.h.1.attn.c_attn.bias[{part}]"]
        assert (weight.numel, bias.numel) == (256, 16)
        assert torch.equal(weight.params[0], attention.weight[:, columns])
        assert torch.equal(bias.params[0], attention.bias[columns])
        assert weight.pieces[0].start == 0  # each part is a block: its noise begins at element 0
    assert "transformer.h.1.attn.c_attn.weight" not in blocks
    assert "transformer.h.1.attn.c_proj.weight" in blocks


def test_grouped_heads_are_cut_at_their_sizes() -> None:
    model = tiny_phi3()
    blocks, fused = by_name(model), model.model.layers[0].self_attn.qkv_proj.weight
    assert fused.shape == (32, 16)
    for part, (low, high) in {"q": (0, 16), "k": (16, 24), "v": (24, 32)}.items():
        block = blocks[f"model.layers.0.self_attn.qkv_proj.weight[{part}]"]
        assert block.numel == 16 * (high - low)
        assert torch.equal(block.params[0], fused[low:high])


def test_the_parts_follow_one_another_in_the_models_order() -> None:
    prefix = "transformer.h.0.attn.c_attn"
    expected = [f"{prefix}.{kind}[{part}]" for kind in ("weight", "bias") for part in "qkv"]
    found = names(tiny_gpt2())
    low = found.index(expected[0])
    assert list(found[low : low + 6]) == expected


@pytest.mark.parametrize(
    ("build", "path"),
    [(tiny_gpt2, "transformer.h.0.attn.c_attn.weight"), (tiny_phi3, "model.layers.0.self_attn.qkv_proj.weight")],
)
def test_what_is_written_to_a_part_reaches_the_parameter(build: Callable[[], Any], path: str) -> None:
    model = build()
    fused, before = model.get_parameter(path), model.get_parameter(path).detach().clone()
    blocks = by_name(model)
    blocks[f"{path}[k]"].params[0].fill_(7.0)
    changed = fused.detach() != before
    assert int(changed.sum()) == blocks[f"{path}[k]"].numel
    assert (fused.detach()[changed] == 7.0).all()
    for part in "qv":
        piece = blocks[f"{path}[{part}]"].pieces[0]
        assert torch.equal(piece.view, piece.of(before))


def test_a_part_cuts_a_gradient_as_it_cuts_the_parameter() -> None:
    model = tiny_phi3()
    model(input_ids=torch.tensor([[3, 4, 5]])).logits.square().sum().backward()
    fused = model.model.layers[0].self_attn.qkv_proj.weight
    parts = [by_name(model)[f"model.layers.0.self_attn.qkv_proj.weight[{p}]"].pieces[0].of(fused.grad) for p in "qkv"]
    assert torch.equal(torch.cat(parts), fused.grad)


def test_query_key_value_stays_one_block() -> None:
    found = names(tiny_neox())
    assert "gpt_neox.layers.0.attention.query_key_value.weight" in found
    assert not any("[" in name for name in found)


def test_granularity_layer_cuts_nothing() -> None:
    assert names(tiny_phi3(), "layer") == LLAMA_LAYERS
    assert not any(piece.index for _, piece in pieces_of(find_blocks(tiny_gpt2(), "layer")))


def test_a_fused_matrix_whose_sizes_the_config_does_not_explain_stays_one_block() -> None:
    model = nn.ModuleDict({"attention": nn.ModuleDict({"qkv_proj": nn.Linear(8, 24)})})
    whole = ("attention.qkv_proj.weight", "attention.qkv_proj.bias")
    assert names(model) == whole
    model.config = SimpleNamespace(num_attention_heads=2, hidden_size=8, num_key_value_heads=1)
    assert names(model) == whole
    model.config.num_key_value_heads = 2
    assert len(names(model)) == 6


def bigcode(multi_query: bool) -> nn.Module:
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 32, "vocab_size": 64}
    special = {"bos_token_id": 1, "eos_token_id": 2}
    config = GPTBigCodeConfig(**sizes, **special, multi_query=multi_query, attn_implementation="eager")
    return seeded(lambda: GPTBigCodeForCausalLM(config).eval())


def codegen() -> nn.Module:
    from transformers import CodeGenConfig, CodeGenForCausalLM

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "n_positions": 32, "vocab_size": 64}
    config = CodeGenConfig(**sizes, bos_token_id=1, eos_token_id=2)
    return seeded(lambda: CodeGenForCausalLM(config).eval())


def mpt() -> nn.Module:
    from transformers import MptConfig, MptForCausalLM

    config = MptConfig(d_model=16, n_heads=4, n_layers=1, max_seq_len=32, vocab_size=64, expansion_ratio=2)
    return seeded(lambda: MptForCausalLM(config).eval())


FUSED: dict[str, tuple[Callable[[], Any], bool]] = {  # whether q, k and v follow one another, so that a cut exists
    "gpt2": (tiny_gpt2, True),
    "phi3": (tiny_phi3, True),
    "mpt": (mpt, True),
    "bigcode, multi-query": (lambda: bigcode(True), True),
    "bigcode, multi-head": (lambda: bigcode(False), False),
    "codegen": (codegen, False),
    "neox": (tiny_neox, False),
}


@pytest.mark.parametrize("family", FUSED)
def test_a_cut_separates_what_attention_reads_as_v_from_q_and_k(family: str) -> None:
    """With one token the softmax is 1: the loss depends on v and on neither q nor k."""
    build, has_cut = FUSED[family]
    model = build()
    model(input_ids=torch.tensor([[3]])).logits.square().sum().backward()
    parts = {block.name: block.pieces[0] for block in find_blocks(model) if block.name.endswith("]")}
    assert bool(parts) == has_cut
    for name, piece in parts.items():
        size = float(piece.of(piece.param.grad).abs().max()) / float(piece.param.grad.abs().max())
        assert size > 0.1 if name.endswith("[v]") else size < 1e-5, name


# Wrappers


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("model.norm.weight", "model.norm.weight"),
        ("base_model.model.model.norm.weight", "model.norm.weight"),
        ("_orig_mod.model.norm.weight", "model.norm.weight"),
        ("module.model.norm.weight", "model.norm.weight"),
        ("module._orig_mod.base_model.model.model.norm.weight", "model.norm.weight"),
        ("_orig_mod.module.model.norm.weight", "model.norm.weight"),
        ("model.layers.0._orig_mod.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "model.layers.0.q_proj.weight"),
        ("encoder.module.weight", "encoder.module.weight"),
        ("my_module.weight", "my_module.weight"),
        ("base_model.encoder.weight", "base_model.encoder.weight"),
    ],
)
def test_a_wrapped_name_is_matched_to_the_base_models(name: str, base: str) -> None:
    assert base_name(name) == base


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_phi3])
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, Module, lambda m: Module(torch.compile(m))])
def test_a_wrapped_model_has_the_blocks_of_the_bare_one(
    wrap: Callable[[nn.Module], nn.Module], build: Callable[[], nn.Module], granularity: str
) -> None:
    model = build()
    bare, wrapped = find_blocks(model, granularity), find_blocks(wrap(model), granularity)
    assert [(b.name, b.numel) for b in wrapped] == [(b.name, b.numel) for b in bare]
    for a, b in zip(bare, wrapped, strict=True):
        assert [t.data_ptr() for t in a.params] == [t.data_ptr() for t in b.params]


def test_a_model_with_a_compiled_layer_keeps_its_names() -> None:
    model = tiny_llama()
    model.model.layers[1] = torch.compile(model.model.layers[1])
    assert names(model) == LLAMA
    assert names(model, "layer") == LLAMA_LAYERS


def lora(model: nn.Module, **options: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, task_type="CAUSAL_LM", **options)
    return seeded(lambda: get_peft_model(model, config))


@peft_warns
def test_adapters_are_blocks_and_the_frozen_base_is_not() -> None:
    wrapped = lora(tiny_llama(), target_modules=["q_proj", "v_proj"])
    assert names(wrapped) == tuple(
        f"model.layers.{layer}.self_attn.{p}_proj.lora_{matrix}.default.weight"
        for layer in (0, 1)
        for p in "qv"
        for matrix in "AB"
    )
    assert [block.numel for block in find_blocks(wrapped)] == [32, 32, 32, 16] * 2
    assert names(wrapped, "layer") == ("model.layers.0", "model.layers.1")


@peft_warns
def test_unfrozen_weights_under_an_adapter_have_the_base_models_names() -> None:
    wrapped = lora(tiny_llama(), target_modules=["q_proj", "v_proj"])
    for name, param in wrapped.named_parameters():
        param.requires_grad_("lora_" not in name)
    assert names(wrapped) == LLAMA


@peft_warns
def test_fused_weights_under_an_adapter_are_cut_as_in_the_base_model() -> None:
    expected = names(tiny_gpt2())
    wrapped = lora(tiny_gpt2(), target_modules=["c_attn"], fan_in_fan_out=True)
    for name, param in wrapped.named_parameters():
        param.requires_grad_("lora_" not in name)
    assert names(wrapped) == expected


def test_an_adapter_layer_by_itself_is_a_model_too() -> None:
    model = nn.ModuleDict({"base_layer": nn.Linear(2, 2), "lora": nn.Linear(2, 2)})
    assert len(find_blocks(model)) == 4


# Moments


def exact_moments(*tensors: Tensor) -> tuple[float, float]:
    x = torch.cat([t.double().reshape(-1) for t in tensors])
    return float(x.mean()), float(x.var())


def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)) * std + mean


@pytest.mark.parametrize(
    "tensor",
    [
        normal(300, 40, std=0.02),
        normal(1000, 1000, std=0.02),
        normal(500, mean=0.3, std=0.5),
        normal(500, mean=1.0, std=1e-2),
        normal(500, mean=1.0, std=1e-4),
        normal(200_000, mean=-1.0, std=1e-3),
        normal(500, mean=100.0, std=1e-3),
        normal(2, 2),
        torch.tensor([1.0, 1.0 + 2**-20]),
        normal(400, 30)[:, 7:20],
        normal(40, 30).T,
        normal(300, 40, std=0.02).bfloat16(),
        normal(300, 40, std=0.02).half(),
        normal(300, 40, mean=1.0, std=0.01).bfloat16()[:, ::2],
        normal(300, 40, std=0.02).double(),
    ],
    ids=lambda t: f"{t.dtype}{tuple(t.shape)}",
)
def test_moments_are_those_of_float64(tensor: Tensor) -> None:
    mean, var = moments(block_of(tensor))
    exact_mean, exact_var = exact_moments(tensor)
    scale = math.sqrt(exact_var + exact_mean**2)
    assert mean == pytest.approx(exact_mean, abs=2e-7 * scale)
    assert var == pytest.approx(exact_var, rel=1e-4)


def test_moments_of_several_pieces_are_those_of_all_their_elements() -> None:
    tensors = normal(30, 20, std=0.02), torch.ones(16), normal(5, mean=-3.0), torch.tensor(4.0)
    mean, var = moments(block_of(*tensors))
    exact_mean, exact_var = exact_moments(*tensors)
    assert mean == pytest.approx(exact_mean, rel=1e-5)
    assert var == pytest.approx(exact_var, rel=1e-5)


def test_moments_of_a_layer_are_those_of_its_parameters() -> None:
    model = tiny_llama()
    for block in find_blocks(model, "layer"):
        mean, var = moments(block)
        exact_mean, exact_var = exact_moments(*block.params)
        assert mean == pytest.approx(exact_mean, rel=1e-5, abs=1e-7)
        assert var == pytest.approx(exact_var, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("value", [1.0, 0.0, -0.1, 1e4])
@pytest.mark.parametrize("shape", [(576,), (7, 11)])
def test_a_constant_block_has_no_variance(value: float, shape: tuple[int, ...]) -> None:
    mean, var = moments(block_of(torch.full(shape, value)))
    assert mean == pytest.approx(value, rel=1e-6)
    assert 0 <= var <= 1e-14 * value**2


def test_one_element_has_variance_zero() -> None:
    for tensor in (torch.tensor(3.5), torch.tensor([3.5]), torch.tensor([[3.5]], dtype=torch.bfloat16)):
        assert moments(block_of(tensor)) == (3.5, 0.0)


def test_moments_leave_the_parameters_alone() -> None:
    model = tiny_gpt2()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for block in find_blocks(model):
        mean, var = moments(block)
        assert isinstance(mean, float)
        assert isinstance(var, float)
        assert var >= 0
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
