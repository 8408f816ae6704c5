"""Blocks: the groups of parameters that share one noise vector, one scale and one PertNN.

    model  ->  trainable parameters, tied ones once  ->  fused QKV cut in three  ->  blocks, in the model's order

A block is a parameter tensor; at granularity "layer" it is all the tensors of one layer of the model.
"""

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zotuner import noise
from zotuner.errors import unknown

GRANULARITIES = ("block", "layer")

# Modules whose weight stacks q, k and v one after the other along the output. (Where heads interleave the three,
# as under the name `query_key_value`, no cut by rows exists, and the matrix stays one block.)
FUSED_QKV = ("c_attn", "qkv_proj", "Wqkv")

# What wrappers put into names: peft in front and within, torch.compile, DataParallel, FSDP, activation checkpoints.
WRAPPERS = re.compile(
    r"^(?:(?:base_model\.model|module)\.)+"
    r"|(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
    r"|(?<=\.)(?:base_layer|modules_to_save\.default)\."
)

# What peft adds to a layer, behind the layer's name.
ADDED = re.compile(r"\.(?:lora_[AB]|lora_embedding_[AB]|ia3_l)(?:\..*)?$")


class StoredMatrix(nn.Module):
    """A matrix that a module keeps, as a child, in another form than a parameter of floats.

    It counts as one of its module's weights, before the module's parameters; `zotuner.quantized` has the one there is.

    Args:
        shape: (rows, width).
        requires_grad: Whether it is tuned, as for a parameter.
    """

    dtype = torch.float32  # that it is read in
    ndim = 2

    def __init__(self, shape: torch.Size, requires_grad: bool) -> None:
        super().__init__()
        self.shape, self.requires_grad = shape, requires_grad

    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """What it takes in memory."""

    @abstractmethod
    def piece(self, index: tuple[slice, ...], start: int) -> "Piece":
        """The part `index` of it as a piece of a block that begins at element `start` there."""


Weight = nn.Parameter | StoredMatrix


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of one parameter that belongs to a block.

    Attributes:
        param: The parameter.
        index: Which part of it: `param[index]`; `()` is all of it.
        start: The number of its first element in the block.
    """

    param: nn.Parameter
    index: tuple[slice, ...]
    start: int

    def of(self, tensor: Tensor) -> Tensor:
        """The same part of a tensor that is shaped like the parameter: a view."""
        return tensor[self.index] if self.index else tensor

    @property
    def view(self) -> Tensor:
        """The part itself, without its autograd history."""
        return self.of(self.param.detach())

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.view.numel()

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What a torch optimizer is told of."""
        return (self.param,)

    def parts(self) -> Iterator[Tensor]:
        """The elements, for reading, in as many tensors as memory asks for."""
        yield self.view

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The tensors that hold the elements, and whatever else their owner holds."""
        return (self.param,)

    def sums(self) -> tuple[float, float]:
        """The sum of the elements, and that of their squares."""
        total = square = 0.0
        for tensor in self.parts():
            some, squares = noise.sums(tensor)
            total += some
            square += squares
        return total, square

    def move(self, draw: Any, alphas: Sequence[float], block: int, rounding: str) -> None:
        """Adds sum_k alphas[k] z_k of a `zotuner.perturb.Draw`, in place; see its `add`."""
        draw.add(self.view, alphas, out=self.view, block=block, start=self.start, rounding=rounding)


@dataclass(frozen=True, eq=False)
class Block:
    """Parameters that share a noise vector and a scale.

    Attributes:
        name: The parameter's name in the base model (with `[q]`, `[k]`, `[v]` behind it for a part of a fused
            matrix), or the layer's.
        pieces: Its parts; the block's elements are theirs, one after the other, each in C order.
        numel: Number of elements.
    """

    name: str
    pieces: tuple[Piece, ...]
    numel: int

    @property
    def params(self) -> tuple[Tensor, ...]:
        """The block's tensors: views into the model's parameters; of quantised ones, copies in float32."""
        return tuple(piece.view for piece in self.pieces)


def base_name(name: str) -> str:
    """A parameter's name in the base model, whatever wraps it.

    >>> base_name("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")
    'model.layers.0.self_attn.q_proj.weight'
    """
    while (inner := WRAPPERS.sub("", name)) != name:
        name = inner
    return name


def weights_of(module: nn.Module) -> dict[str, Weight]:
    """A module's own weights: stored matrices, then parameters."""
    stored: dict[str, Weight] = {name: m for name, m in module._modules.items() if isinstance(m, StoredMatrix)}
    return stored | {name: p for name, p in module._parameters.items() if p is not None}


def named_weights(model: nn.Module) -> Iterator[tuple[str, Weight]]:
    """All weights, each once, in the order of `named_parameters`, which knows no stored matrices."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, weight in weights_of(module).items():
            if id(weight) not in seen:
                seen.add(id(weight))
                yield f"{prefix}.{name}".lstrip("."), weight


def weight_tensors(model: nn.Module, *, trainable: bool = False) -> dict[str, Tensor]:
    """What the weights consist of: parameters, and the codes and scales of quantised ones, by name.

    Args:
        model: Any module.
        trainable: Leave out what is frozen.
    """
    found: dict[str, Tensor] = {}
    for name, weight in named_weights(model):
        if weight.requires_grad or not trainable:
            own = {name: weight} if isinstance(weight, nn.Parameter) else dict(weight.named_buffers(name))
            found |= {key: tensor.detach() for key, tensor in own.items()}
    return found


def find_blocks(model: nn.Module, granularity: str = "block") -> tuple[Block, ...]:
    """The blocks of a model, in the order of its parameters; frozen and empty ones are left out, tied ones come once.

    Args:
        model: Any module.
        granularity: "block" (a parameter tensor each) or "layer" (a numbered child of a `ModuleList` each; what
            lies in none of them is a block by itself).

    Raises:
        ValueError: An unknown granularity, or a model in which nothing is trainable.
    """
    blocks = _blocks(model, granularity, lambda _, weight: weight.requires_grad and weight.numel() > 0)
    if not blocks:
        raise ValueError("the model has no trainable parameter: set requires_grad where it should be tuned")
    return blocks


def hosts_of(model: nn.Module, blocks: Sequence[Block], granularity: str) -> tuple[Block, ...]:
    """The part of the base model that each block belongs to, as `find_blocks` would have it there.

    That is the block itself, but of what peft adds to a layer (LoRA, IA3) the layer's own weight, of the same name
    without what peft puts behind it; at granularity "layer" all the weights that were there before.

    Args:
        model: That the blocks are of.
        blocks: Of `find_blocks`, with that granularity.
        granularity: "block" or "layer".
    """
    if not any(weight.requires_grad and ADDED.search(name) for name, weight in named_weights(model)):
        return tuple(blocks)
    there = {block.name: block for block in _blocks(model, granularity, lambda name, _: not ADDED.search(name))}
    return tuple(there.get(ADDED.sub(".weight", block.name), block) for block in blocks)


def _blocks(model: nn.Module, granularity: str, wanted: Callable[[str, Weight], bool]) -> tuple[Block, ...]:
    """Of those weights that are wanted."""
    if granularity not in GRANULARITIES:
        raise ValueError(unknown("granularity", granularity, GRANULARITIES))
    layers = _layer_names(model) if granularity == "layer" else {}
    groups: dict[str, list[tuple[Weight, tuple[slice, ...]]]] = {}
    for name, param in named_weights(model):
        if not wanted(name, param):
            continue
        cuts = {"": ()} if granularity == "layer" else _cuts(model, name, param)
        for suffix, index in cuts.items():
            groups.setdefault(layers.get(name, base_name(name)) + suffix, []).append((param, index))
    return tuple(_block(name, parts) for name, parts in groups.items())


def _block(name: str, parts: list[tuple[Weight, tuple[slice, ...]]]) -> Block:
    pieces: list[Piece] = []
    numel = 0
    for param, index in parts:
        pieces.append(Piece(param, index, numel) if isinstance(param, nn.Parameter) else param.piece(index, numel))
        numel += pieces[-1].numel
    return Block(name, tuple(pieces), numel)


def _layer_names(model: nn.Module) -> dict[str, str]:
    """From a parameter's full name to its layer's: the outermost element of a ModuleList that holds it."""
    found: dict[str, str] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            for child, layer in module.named_children():
                for name, _ in named_weights(layer):
                    found.setdefault(f"{prefix}.{child}.{name}".lstrip("."), base_name(f"{prefix}.{child}".lstrip(".")))
    return found


def _cuts(model: nn.Module, name: str, param: Weight) -> dict[str, tuple[slice, ...]]:
    """How a parameter is cut: from the suffix of the block's name to the index of the part."""
    owner_name, _, kind = name.rpartition(".")
    parts = [part for part in owner_name.split(".") if part != "base_layer"]
    if not parts or parts[-1] not in FUSED_QKV or kind not in ("weight", "bias"):
        return {"": ()}
    owner = model.get_submodule(owner_name)
    axis = 1 if param.ndim == 2 and hasattr(owner, "nf") else 0  # transformers' Conv1D keeps (in, out)
    sizes = _qkv_sizes(_config(model), parts[-1])
    if sizes is None or sum(sizes) != param.shape[axis]:
        return {"": ()}
    cuts, low = {}, 0
    for part, size in zip("qkv", sizes, strict=True):
        cuts[f"[{part}]"] = (slice(None),) * axis + (slice(low, low + size),)
        low += size
    return cuts


def _config(model: nn.Module) -> Any:
    """The model's configuration, also behind a wrapper that does not pass it on."""
    return next((m.config for m in model.modules() if hasattr(m, "config")), None)


def _qkv_sizes(config: Any, kind: str) -> tuple[int, int, int] | None:
    """Output sizes of q, k and v by the config's own fields; None where it has them not, or where heads interleave."""
    if not getattr(config, "multi_query", True):  # GPT-BigCode's c_attn
        return None
    if kind == "qkv_proj" and not hasattr(config, "num_key_value_heads"):  # CodeGen's: q, v, k in four groups
        return None
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return None
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads * head_dim, kv_heads * head_dim, kv_heads * head_dim


def moments(block: Block) -> tuple[float, float]:
    """Mean and unbiased variance over a block's elements; one element has variance 0."""
    return moments_from(block, [piece.sums() for piece in block.pieces])


def moments_from(block: Block, sums: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """`moments`, from the sums of each piece."""
    total, square = (sum(column) for column in zip(*sums, strict=True))
    mean = total / block.numel
    spread = max(0.0, square - block.numel * mean**2)
    return mean, spread / (block.numel - 1) if block.numel > 1 else 0.0


def pieces_of(blocks: Sequence[Block]) -> Iterator[tuple[int, Piece]]:
    """Every piece with its block's number."""
    for number, block in enumerate(blocks):
        for piece in block.pieces:
            yield number, piece


def chunk_rows(shape: Sequence[int], chunk: int) -> int:
    """How many of a matrix's rows are worked on at a time, so that they have at most `chunk` elements; at least one."""
    rows, width = shape
    return max(1, min(rows, chunk // max(1, width)))


def row_spans(shape: Sequence[int], chunk: int) -> list[tuple[int, int]]:
    """(first, one past the last) of each chunk of a matrix's rows; none where there are no rows."""
    step = chunk_rows(shape, chunk)
    return [(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]
