"""Adapters, by peft: a few trainable tensors in or before a model whose own weights are frozen.

    base model  ->  lora | ia3 in its layers, prefix | prompt before its tokens  ->  the model that is tuned
    OUT/model: adapter_config.json, adapter_model.safetensors  ->  base model + adapter

A fresh adapter is a function of the model and the seed, so that a ledger rebuilds it.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from zotuner.config import ADAPTER_DEFAULTS, Config
from zotuner.errors import ZotunerError, first_line
from zotuner.tuner import AdapterInfo, Tuner

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = {"PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}  # where peft's name is not ours in capitals
# What peft tells of its own doings: it reads a property that transformers renames, and finds out itself which layers
# keep their weights transposed.
CHATTER = ("`is_gradient_checkpointing` is deprecated", "fan_in_fan_out is set to")


def adapted(model: Any, config: Config, base: str | Path) -> Any:
    """The model with the fresh adapter that a configuration asks for, its own weights frozen; or the model itself.

    Args:
        model: Of transformers; it is changed in place.
        config: Says which adapter; its initial values follow from the seed. The global random state is left alone.
        base: What `load_model` was given: what a saved adapter names as its base.

    Raises:
        ZotunerError: The model has an adapter, or none of the layers to adapt, or is of a kind that cannot have it.
    """
    if config.adapter == "none":
        return model
    _check_possible(model, config, base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            wrapped = _wrapped(model, _peft_config(config, model))
        except ValueError as error:
            raise ZotunerError(f"--adapter {config.adapter}: {_refusal(config, model, error)}") from None
    name = str(base)
    wrapped.active_peft_config.base_model_name_or_path = str(Path(name).resolve()) if Path(name).exists() else name
    return wrapped


def load_adapter(model: Any, folder: Path) -> Any:
    """A model with the adapter that a folder holds, which can be tuned further.

    Raises:
        ZotunerError: The folder's files are damaged, or the adapter is of another model.
    """
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict

    try:
        config = PeftConfig.from_pretrained(str(folder))
        weights = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ZotunerError(f"{folder}: cannot be read as an adapter: {first_line(error)}") from None
    config.inference_mode = False
    if config.is_prompt_learning:  # sizes are the model's own, so that those of another model are found out
        config.num_layers = config.token_dim = config.num_attention_heads = None
    try:
        with torch.random.fork_rng(devices=[]):
            wrapped = _wrapped(model, config)
        expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        for name, tensor in expected.items():
            if name not in weights or weights[name].shape != tensor.shape:
                raise ValueError(f"{ADAPTER_WEIGHTS}: key {name}: expected {tuple(tensor.shape)}")
        set_peft_model_state_dict(wrapped, weights)
    except (ValueError, RuntimeError) as error:
        raise ZotunerError(f"{folder}: this adapter does not fit {type(model).__name__}: {first_line(error)}") from None
    return wrapped


def base_of(folder: Path) -> str:
    """What the adapter in a folder names as its base model.

    Raises:
        ZotunerError: It names none.
    """
    path = folder / ADAPTER_CONFIG
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        named = None
    if not isinstance(named, str) or not named:
        raise ZotunerError(f"{path}: expected base_model_name_or_path: the name or folder of the adapter's base model")
    return named


def adapter_of(model: Any) -> AdapterInfo | None:
    """Which adapter a model has; None for a plain model."""
    if not hasattr(model, "get_base_model"):
        return None
    config = model.active_peft_config
    kind = KINDS.get(config.peft_type.value, config.peft_type.value.lower())
    targets = getattr(config, "target_modules", None) or ()
    return AdapterInfo(
        kind=kind,
        rank=getattr(config, "r", None),
        alpha=getattr(config, "lora_alpha", None),
        targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        tokens=getattr(config, "num_virtual_tokens", None),
    )


def virtual_tokens(model: Any) -> int:
    """How many tokens stand before those of a text."""
    adapter = adapter_of(model)
    return 0 if adapter is None or adapter.tokens is None else adapter.tokens


def check_tuner(tuner: Tuner, model: Any) -> None:
    """Raises `ZotunerError` if a tuner was made for another adapter than the model has."""
    made_for, has = tuner.info.adapter, adapter_of(model)
    if made_for is not None and made_for != has:
        raise ZotunerError(
            f"the tuner was made for {tuner.info.made_for} and does not fit this model, which has "
            f"{'none' if has is None else has}; use the adapter that the tuner was made with, or meta-train another"
        )


def _check_possible(model: Any, config: Config, base: str | Path) -> None:
    """Raises `ZotunerError` for what can be told before peft is asked."""
    if adapter_of(model) is not None:
        raise ZotunerError(f"--adapter: {base} has an adapter of its own; leave --adapter out to tune that one")
    if config.adapter in ("prefix", "prompt") and not model.can_generate():
        raise ZotunerError(
            f"--adapter {config.adapter}: expected a causal language model, got {type(model).__name__}; use lora or ia3"
        )
    for target in config.adapter_targets:
        if not any(f".{name}".endswith(f".{target}") for name, _ in model.named_modules()):
            raise ZotunerError(f"--adapter-targets: {base} has no layer {target!r}; {_layers(model)}")


def _peft_config(config: Config, model: Any) -> Any:
    """peft's configuration of a fresh adapter; no dropout: both losses of a step must see the same network."""
    from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING

    options: dict[str, Any] = {"task_type": "CAUSAL_LM" if model.can_generate() else None}
    targets = list(config.adapter_targets) or None
    if config.adapter == "lora":
        options |= {"r": config.adapter_rank, "lora_alpha": config.adapter_alpha, "lora_dropout": 0.0}
        return LoraConfig(**options, target_modules=targets)
    if config.adapter == "ia3":
        inner = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model.config.model_type, ())
        scaled = None if targets is None else [target for target in targets if target in inner]
        return IA3Config(**options, target_modules=targets, feedforward_modules=scaled)
    options["num_virtual_tokens"] = config.adapter_tokens
    if config.adapter == "prefix":
        return PrefixTuningConfig(**options)
    return PromptTuningConfig(**options, prompt_tuning_init="SAMPLE_VOCAB")  # words, where N(0, 1) would drown them


def _refusal(config: Config, model: Any, error: Exception) -> str:
    """Why peft did not make an adapter."""
    kind = type(model).__name__
    if "adapter_targets" in ADAPTER_DEFAULTS[config.adapter] and not config.adapter_targets:
        return f"peft knows no layers of {kind} to adapt; pass --adapter-targets: {_layers(model)}"
    return f"peft cannot place it in {kind}: {first_line(error)}"


def _wrapped(model: Any, config: Any) -> Any:
    """peft's model, in evaluation mode; the base is frozen."""
    from peft import PeftModel, PeftModelForCausalLM

    kind = PeftModelForCausalLM if config.task_type == "CAUSAL_LM" else PeftModel
    if config.is_prompt_learning:
        if config.peft_type.value not in KINDS:
            raise ValueError(f"virtual tokens of the kind {config.peft_type.value} are not known here")
        from zotuner.virtual import VirtualTokensModel

        kind = VirtualTokensModel
    model.requires_grad_(False)
    with _quiet():
        return kind(model, config).eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that are none of the user's business."""
    with warnings.catch_warnings():
        for message in CHATTER:
            warnings.filterwarnings("ignore", message=message)
        yield


def _layers(model: nn.Module) -> str:
    """The names of linear layers, as one may pass them."""
    kinds = (nn.Linear, "Conv1D")  # of transformers' GPT-2
    named = [
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, kinds[0]) or type(module).__name__ == kinds[1]
    ]
    return "its linear layers are named " + ", ".join(dict.fromkeys(named))
