"""The model card of a tuner: a function of what `tuner.json` says."""

import re
from typing import Any

import yaml

HUB_ID = r"\w[\w.-]*/[\w.-]+"
TEMPLATE = """---
{front}---

# Tuner for {base_model}

Learned perturbation scales for zeroth-order fine-tuning: {count} PertNNs ({architecture}, granularity
{granularity}, Frobenius normalisation {normalized}), one a block of the base model{adapter}, {origin}.
Use it on the base model, on its fine-tunes and merges, and on any task, with forward passes only.

```python
import zotuner

tuner = zotuner.Tuner.from_pretrained("this folder or its Hub id")
opt = zotuner.ZOFineTuner(model, tuner, lr=1e-6)
loss = opt.step(closure)
```

Method: "Learning a Zeroth-Order Optimizer for Fine-Tuning LLMs", arXiv:2510.00419.

## How it was made

| option | value |
| --- | --- |
{config}

Base model's weights (SHA-256): `{base_weights_sha256}`. Made with {versions}.

## What it did

{notes}
"""


def card(info: dict[str, Any]) -> str:
    """Markdown with the metadata that the Hub reads.

    Args:
        info: `TunerInfo` as a dictionary.
    """
    front = {
        "license": info["license"],
        "library_name": "zotuner",
        "tags": ["zotuner", "zeroth-order", "pertnn"],
        **({"base_model": info["base_model"]} if re.fullmatch(HUB_ID, info["base_model"]) else {}),
    }
    return TEMPLATE.format(
        front=yaml.safe_dump(front, sort_keys=False),
        base_model=info["base_model"] or "a model",
        count=len(info["blocks"]),
        architecture=info["architecture"],
        granularity=info["granularity"],
        normalized=_normalized(info),
        adapter="" if info["adapter"] is None else f"'s adapter {adapter_line(info['adapter'])}",
        origin=_origin(info),
        config="\n".join(f"| {key} | {_cell(value)} |" for key, value in info["config"].items()) or "| - | - |",
        base_weights_sha256=info["base_weights_sha256"] or "not recorded",
        versions=", ".join(f"{name} {number}" for name, number in info["versions"].items()),
        notes=info["notes"] or "Not compared with anything yet.",
    )


def adapter_line(adapter: dict[str, Any]) -> str:
    """An adapter in a few words, such as "lora (rank 8, alpha 16, on q_proj v_proj)"."""
    about = [f"{name} {adapter[name]:g}" for name in ("rank", "alpha", "tokens") if adapter[name] is not None]
    about += [f"on {' '.join(adapter['targets'])}"] if adapter["targets"] else []
    return f"{adapter['kind']} ({', '.join(about)})" if about else str(adapter["kind"])


def _normalized(info: dict[str, Any]) -> str:
    rows = info["embedding_rows"]
    return ("on" if rows is None else f"on with {rows} rows an embedding table") if info["normalized"] else "off"


def _origin(info: dict[str, Any]) -> str:
    imported = info["config"].get("imported_from")
    return f"imported from {imported}" if imported else f"meta-trained on {', '.join(info['tasks']) or 'no task yet'}"


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", r"\|")
