"""Derivative checkpoints of the packaged model, on which a tuner is to serve unchanged.

    python benchmarks/derivatives.py DATA_DIR OUT [--steps 150]

makes OUT/adam (all weights tuned by Adam on SNLI), OUT/lora (a LoRA tuned by Adam on it, merged) and OUT/bfloat16
(the model's weights in another type). Each is a folder for --model; those that are there are kept.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from peft import PeftModel

import zotuner

MODEL = "smollm2-135m-instruct"
SNLI = {  # for causal models, in the words of CB
    "prompt": 'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
    "candidates": ["Yes", "Maybe", "No"],
    "label": "label",
}


def tune(task: Path, steps: int, out: Path, *options: str) -> Path:
    """Runs Adam as anybody would; returns the folder of what it saved."""
    settings = {
        **{"model": MODEL, "task": task, "method": "adam", "out": out, "steps": steps},
        **{"batch-size": 8, "dev-size": 200, "eval-size": 200},
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "zotuner", "finetune", "--save-model", "--overwrite", *flags, *options]
    subprocess.run(command, check=True)
    return out / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    task = given.out / "snli-causal.yaml"
    task.write_text(yaml.safe_dump(SNLI | {"train": str((given.data / "snli" / "train.jsonl").resolve())}))
    base, tokenizer = zotuner.load_model(MODEL)
    if not (given.out / "adam").exists():
        tune(task, given.steps, given.out / "runs" / "adam").rename(given.out / "adam")
    if not (given.out / "lora").exists():
        adapter = tune(task, given.steps, given.out / "runs" / "lora", "--adapter=lora", "--lr=3e-4")
        merged = PeftModel.from_pretrained(zotuner.load_model(MODEL)[0], str(adapter)).merge_and_unload()
        merged.save_pretrained(given.out / "lora")
        tokenizer.save_pretrained(given.out / "lora")
    if not (given.out / "bfloat16").exists():
        base.to(torch.bfloat16).save_pretrained(given.out / "bfloat16")
        tokenizer.save_pretrained(given.out / "bfloat16")


if __name__ == "__main__":
    main()
