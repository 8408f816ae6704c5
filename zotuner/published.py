"""Tuners in the format that the ZO Fine-tuner's authors published, made into ours.

    file.pth: dict from a parameter's name to Sequential(Linear(5, 64), Tanh, Linear(64, 1))  ->  `Tuner`

sigma = |net(mean, var, loss_plus, loss_minus, sigma_prev)|, and the normalisation is on (arXiv:2510.00419, whose code
saves the dict with `torch.save`). `zotuner.pth` reads such files without running anything that they say.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zotuner.blocks import Block, base_name, find_blocks
from zotuner.errors import ZotunerError
from zotuner.models import known_as, load_model, weights_sha256
from zotuner.pertnn import FEATURES, HIDDEN, FeatureSpec, PertNNBank
from zotuner.pickled import Limits, ModuleRecord, RefusedError, shown
from zotuner.pth import Saved, read_pth
from zotuner.tuner import MOST_ROWS, SHOWN, BlockInfo, FeatureInfo, Tuner, TunerInfo, versions
from zotuner.tuner_out import keep_tuner

INPUTS = ("mean", "var", "loss_plus", "loss_minus", "sigma_prev")  # in the order of a published net
KINDS = [("0", "Linear"), ("1", "Tanh"), ("2", "Linear")]  # the layers of one, by name
SHAPES = {
    ("0", "weight"): (HIDDEN, len(INPUTS)),
    ("0", "bias"): (HIDDEN,),
    ("2", "weight"): (1, HIDDEN),
    ("2", "bias"): (1,),
}
LAYERS = ("first", "second")
NUMBERS = sum(math.prod(shape) for shape in SHAPES.values())  # 449 a net

# A net takes 3.8 kB (zip, float32) and 530 opcodes in files of torch 2.13; other versions write somewhat more or less.
NET_BYTES, NET_OPCODES = 1 << 14, 2000
FILE_BYTES, FILE_OPCODES = 1 << 20, 10_000  # on top: the legacy container brings the source code of three classes
LONGEST_NAME = 500  # characters of a parameter's name


@dataclass(frozen=True)
class Spread:
    """How far a layer's weights, over all nets, are from those of fresh nets.

    Attributes:
        std: Their standard deviation.
        default: That of PyTorch's default initialisation, uniform in +-fan_in^-1/2.
    """

    std: float
    default: float

    def __str__(self) -> str:
        return f"std {self.std:.4f}, PyTorch's default {self.default:.4f} ({self.std / self.default - 1:+.1%})"


@dataclass(frozen=True)
class Imported:
    """What an import gives.

    Attributes:
        tuner: For the base model's blocks.
        dropped: Names in the file that stand for no block: parameters tied to one that has a net of its own.
        spreads: Of the first and the second layer.
    """

    tuner: Tuner
    dropped: tuple[str, ...]
    spreads: tuple[Spread, Spread]


def import_tuner(path: Path, base: str | Path, *, embedding_rows: int | None = None) -> Imported:
    """Reads a published tuner.

    Args:
        path: The file.
        base: The model that it was made for: anything `load_model` takes.
        embedding_rows: Rows of an embedding table that the normalisation counts; None: all. The published code counts
            15 x batch size.

    Raises:
        ZotunerError: No such file or model; the file is damaged, asks for anything but nets, or is for another model.
    """
    if not path.is_file():
        raise ZotunerError(f"{path}: no such file; expected a published tuner, such as model_finetuner.pth")
    if embedding_rows is not None and not 1 <= embedding_rows <= MOST_ROWS:
        raise ZotunerError(f"embedding rows: expected a number from 1 to {MOST_ROWS}, got {embedding_rows}")
    model, _ = load_model(base)
    blocks = find_blocks(model)
    saved = read_pth(path, limits(len(parameter_names(model))))
    try:
        bank, dropped = read_nets(saved, model, blocks)
    except RefusedError as refusal:
        raise ZotunerError(f"{path}: {refusal}") from None
    spreads = (_spread(bank.w1, fan_in=len(INPUTS)), _spread(bank.w2, fan_in=HIDDEN))
    info = TunerInfo(
        base_model=known_as(base),
        base_weights_sha256=weights_sha256(model),
        architecture="abs",
        embedding_rows=embedding_rows,
        blocks=tuple(BlockInfo(name=block.name, numel=block.numel) for block in blocks),
        features=FeatureInfo(**FeatureSpec().to_dict()),
        config={"imported_from": path.name, "sha256": saved.sha256},
        versions=versions(),
        license="unknown",
        notes=(
            "The file does not say what the nets were trained on. Not compared with anything yet. "
            f"Weights of the first layer: {spreads[0]}; of the second: {spreads[1]}."
        ),
    )
    return Imported(Tuner(info, bank), dropped, spreads)


def read_nets(saved: Saved, model: nn.Module, blocks: Sequence[Block]) -> tuple[PertNNBank, tuple[str, ...]]:
    """The nets of a model's blocks, in their order, with inputs in the order of `FEATURES`; and the names left over.

    Raises:
        RefusedError: A block has no net, a net no parameter, or a net is not as published ones are.
    """
    found = _by_name(saved.content)
    dropped = _check_names(found, [block.name for block in blocks], parameter_names(model))
    nets = [_net(saved, found[block.name], block.name) for block in blocks]
    w1, b1, w2, b2 = (torch.stack(tensors) for tensors in zip(*nets, strict=True))
    with torch.device("meta"):
        bank = PertNNBank(len(blocks), "abs")
    order = [INPUTS.index(name) for name in FEATURES]
    state = {"w1": w1[:, :, order].contiguous(), "b1": b1, "w2": w2[:, 0], "b2": b2[:, 0]}
    bank.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()}, assign=True)
    return bank, dropped


def parameter_names(model: nn.Module) -> set[str]:
    """All names of a model's parameters: a tied one has several."""
    return {base_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}


def limits(nets: int) -> Limits:
    """What a file of so many nets may take."""
    return Limits(FILE_BYTES + nets * NET_BYTES, FILE_OPCODES + nets * NET_OPCODES, nets * NUMBERS)


def write_tuner(imported: Imported, out: Path) -> list[str]:
    """Writes an imported tuner.

    Returns:
        Lines that sum it up.

    Raises:
        ZotunerError: The folder cannot be written.
    """
    written = keep_tuner(imported.tuner, out)
    info = imported.tuner.info
    rows = "all" if info.embedding_rows is None else info.embedding_rows
    return [
        written,
        f"rows of an embedding table that the normalisation counts: {rows}",
        *(f"weights of the {name} layer: {spread}" for name, spread in zip(LAYERS, imported.spreads, strict=True)),
        *(f"dropped: the net of {name}, which is tied to a parameter with a net" for name in imported.dropped),
    ]


def _by_name(content: object) -> dict[str, Any]:
    """From a parameter's name in the base model to what the file has for it."""
    if not isinstance(content, dict):
        raise RefusedError(f"expected a dict from parameter names to nets, got a {type(content).__name__}")
    found: dict[str, Any] = {}
    for name, net in content.items():
        own = base_name(name) if len(name) <= LONGEST_NAME else name
        if own in found:
            raise RefusedError(f"{shown(own)}: expected one net, got two")
        found[own] = net
    return found


def _check_names(found: dict[str, Any], blocks: list[str], parameters: set[str]) -> tuple[str, ...]:
    """Names that may be dropped, if every block has a net and every net a parameter."""
    missing = [name for name in blocks if name not in found]
    unknown = [shown(name) for name in sorted(found.keys() - parameters - set(blocks))]
    for what, names in (("no nets for blocks of the base model", missing), ("nets for unknown parameters", unknown)):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise RefusedError(
                f"it has {what}: {', '.join(names[:SHOWN])}{more} ({len(found)} nets, {len(blocks)} blocks); "
                "give the model that it was made for as --base"
            )
    own = set(blocks)
    return tuple(name for name in found if name not in own)


def _net(saved: Saved, record: object, block: str) -> list[Tensor]:
    """Weights and biases of one net, in the order of `SHAPES`."""
    layers = record.state.get("_modules") if isinstance(record, ModuleRecord) and record.kind == "Sequential" else None
    layers = layers if isinstance(layers, dict) else {}
    if [(name, layer.kind if isinstance(layer, ModuleRecord) else "") for name, layer in layers.items()] != KINDS:
        raise RefusedError(f"{block}: expected Sequential(Linear, Tanh, Linear), got another net")
    tensors = []
    for (layer, name), shape in SHAPES.items():
        parameters = layers[layer].state.get("_parameters")
        try:
            tensor = saved.tensor(parameters.get(name) if isinstance(parameters, dict) else None, shape)
        except RefusedError as refusal:
            raise RefusedError(f"{block}: {name} of layer {layer}: {refusal}") from None
        if not torch.isfinite(tensor).all():
            raise RefusedError(f"{block}: {name} of layer {layer}: expected finite numbers, got infinities or NaN")
        tensors.append(tensor)
    return tensors


def _spread(weights: Tensor, fan_in: int) -> Spread:
    return Spread(float(weights.detach().std()), (3 * fan_in) ** -0.5)
