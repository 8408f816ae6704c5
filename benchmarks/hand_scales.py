"""Block scales by hand against sigma = 1 on one task: docs/results.md, 2026-11-26.

    python benchmarks/hand_scales.py DATA_DIR OUT.jsonl TASK:SCALE:LR [...] [--steps 300] [--schedule linear]

A line of JSON a run: dev losses at the start, in the middle and at the end. SCALE is a key of SCALES.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import zotuner
from zotuner.blocks import find_blocks
from zotuner.evaluate import evaluate
from zotuner.objective import objective_for
from zotuner.tasks import batches, get_task

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
LATE = {"v_proj": 0.4, "o_proj": 0.4, "input_layernorm": 0.4, "post_attention_layernorm": 0.6, "norm": 0.5}

# (type of block, its layer or -1, rms of its weights) -> sigma; the normalisation takes a common factor out
SCALES: dict[str, Callable[[str, int, float], float]] = {
    "mezo": lambda kind, layer, rms: 1.0,
    "no-embedding": lambda kind, layer, rms: 0.05 if kind == "embed_tokens" else 1.0,
    "attention": lambda kind, layer, rms: 1.0 if kind in ATTENTION else 0.05,
    "top": lambda kind, layer, rms: (
        1.0 if kind == "embed_tokens" or layer >= 25 or (kind == "down_proj" and layer == 11) else 0.1
    ),
    "late": lambda kind, layer, rms: (
        LATE.get(kind, 1.5 if kind in ("down_proj", "embed_tokens") else 1.0) * (1.7 if layer >= 20 else 1.0)
    ),
    "rms": lambda kind, layer, rms: rms,
}
BATCH, DEV, SEED = 8, 192, 0


def place(name: str) -> tuple[str, int]:
    """The type of a Llama block and its layer."""
    parts = name.split(".")
    return parts[-2], int(parts[2]) if parts[1] == "layers" else -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+", metavar="TASK:SCALE:LR")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--schedule", choices=["linear", "constant"], default="linear")
    given = parser.parse_args()
    model, tokenizer = zotuner.load_model("smollm2-135m-instruct")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for run in given.runs:
        name, scale, lr = run.split(":")
        model.load_state_dict(start)
        task = get_task(name, given.data)
        splits = task.splits(train_size=1000, dev_size=DEV, eval_size=10, seed=SEED, kind="causal")
        objective = objective_for(task, model, tokenizer)
        blocks = find_blocks(model)
        rms = [float(block.pieces[0].param.detach().square().mean().sqrt()) for block in blocks]
        sigma = [SCALES[scale](*place(block.name), size) for block, size in zip(blocks, rms, strict=True)]
        tuner = zotuner.Tuner.static(model, torch.tensor(sigma))
        opt = zotuner.ZOFineTuner(model, tuner, lr=float(lr), noise="rademacher", seed=SEED)
        dev = []
        for step, examples in zip(range(given.steps + 1), batches(splits.train, BATCH, SEED), strict=False):
            if step % (given.steps // 2) == 0:
                dev.append(round(evaluate(model, objective, splits.dev, answers=False).figures["loss"], 4))
            if given.schedule == "linear":
                opt.param_groups[0]["lr"] = float(lr) * (1 - step / given.steps)
            batch = objective.training_batch(examples)
            if step < given.steps:
                opt.step(partial(objective.loss, model, batch))
        row = {
            "task": name,
            "scale": scale,
            "lr": float(lr),
            "schedule": given.schedule,
            "steps": given.steps,
            "dev": dev,
        }
        print(json.dumps(row), flush=True)
        with given.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
