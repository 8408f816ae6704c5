"""The model card of a tuner: a function of what `tuner.json` says."""

import re
from typing import Any

import yaml

CARD = "README.md"  # the file
MADE = "made"  # of a tuner's config: how it came about, where that was not by meta-training
HUB_ID = r"\w[\w.-]*/[\w.-]+"
TAGS = ("zotuner", "pertnn")  # by which tuners are found on the Hub
# What models that come as a package were on the Hub. They are quantised there: their weights, dequantised, differ.
ORIGINALS = {"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
TEMPLATE = """---
{front}---

# Tuner for {base_model}

{scales} for zeroth-order fine-tuning: {count} {kind} ({architecture}, granularity
{granularity}, Frobenius normalisation {normalized}), one a block of the base model{adapter}, {origin}.
Use it on the base model, on its fine-tunes and merges, and on any task, with forward passes only.{weights}

```python
import zotuner

tuner = zotuner.Tuner.from_pretrained("this folder or its Hub id")
opt = zotuner.ZOFineTuner(model, tuner, lr=4e-5)  # the normalisation lets MeZO's best one carry over
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

DEQUANTISED = """

Here `{name}` is [{base}](https://huggingface.co/{base})
quantised to 4 bits and back. These weights differ from the Hub's, which are a derivative for this tuner."""


def hub_base(name: str) -> str | None:
    """The Hub id of a base model; None of one that is not on the Hub, or not known to be."""
    return ORIGINALS.get(name) or (name if re.fullmatch(HUB_ID, name) else None)


def model_card(base: str) -> str:
    """The card of a model that was fine-tuned here, which says where it comes from.

    Args:
        base: The Hub id of its base model.
    """
    front = yaml.safe_dump({"base_model": base, "tags": ["zotuner"]}, sort_keys=False)
    return f"---\n{front}---\n\nFine-tuned from {base} with zotuner.\n"


def card(info: dict[str, Any]) -> str:
    """Markdown with the metadata that the Hub reads.

    Args:
        info: `TunerInfo` as a dictionary.
    """
    base = hub_base(info["base_model"])
    front = {
        "license": info["license"],
        "library_name": "zotuner",
        "tags": [*TAGS, "zeroth-order"],
        **({"base_model": base} if base else {}),
        **({"model-index": _model_index(info)} if info["results"] else {}),
    }
    return TEMPLATE.format(
        front=yaml.safe_dump(front, sort_keys=False),
        base_model=info["base_model"] or "a model",
        weights=DEQUANTISED.format(name=info["base_model"], base=base) if info["base_model"] in ORIGINALS else "",
        scales="Perturbation scales" if MADE in info["config"] else "Learned perturbation scales",
        count=len(info["blocks"]),
        kind="fixed numbers" if info["architecture"] == "static" else "PertNNs",
        architecture=info["architecture"],
        granularity=info["granularity"],
        normalized=_normalized(info),
        adapter="" if info["adapter"] is None else f"'s adapter {adapter_line(info['adapter'])}",
        origin=origin_of(info),
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


def _model_index(info: dict[str, Any]) -> list[dict[str, Any]]:
    """The results in the Hub's form."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    results = [
        EvalResult(
            task_type=result["task"],
            dataset_type=result["dataset"],
            dataset_name=result["dataset"],
            metric_type=result["metric"],
            metric_name=f"{result['metric']} ({result['how']})" if result["how"] else None,
            metric_value=result["value"],
        )
        for result in info["results"]
    ]
    return eval_results_to_model_index(f"Tuner for {info['base_model'] or 'a model'}", results)


def _normalized(info: dict[str, Any]) -> str:
    rows = info["embedding_rows"]
    return ("on" if rows is None else f"on with {rows} rows an embedding table") if info["normalized"] else "off"


def origin_of(info: dict[str, Any]) -> str:
    """How a tuner came about, in a few words; `info` as of `card`."""
    if MADE in info["config"]:
        return str(info["config"][MADE])
    imported = info["config"].get("imported_from")
    return f"imported from {imported}" if imported else f"meta-trained on {', '.join(info['tasks']) or 'no task yet'}"


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", r"\|")
