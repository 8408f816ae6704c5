"""Kinds of fine-tuning runs that are killed, resumed and replayed."""

from pathlib import Path
from typing import Any

STEPS = 12
ZEROTH_ORDER = ("mezo", "fzoo", "zo-finetuner", "one-sided", "in-place", "clipped", "half")
STATEFUL = ("mezo-adam", "zo-adamu", "hizoo", "meazo", "lozo")  # what they keep follows from the losses, too


def options_of(method: str, tuner: Path) -> dict[str, Any]:
    """The flags of a run of a dozen steps, three of its evaluations on dev."""
    extra: dict[str, dict[str, Any]] = {
        "fzoo": {"num_perturbations": 2, "lr": 1e-2},
        "zo-finetuner": {"tuner": tuner, "lr_schedule": "linear", "lr": 1e-2},
        "one-sided": {"method": "zo-finetuner", "tuner": tuner, "estimator": "one-sided", "num_perturbations": 2},
        "adam": {"lr": 1e-3},
        "in-place": {"method": "mezo", "engine": "in-place", "noise": "rademacher", "lr": 1e-2},
        "clipped": {"method": "mezo", "clip": 0.5, "lr": 1e-2},
        "mezo-adam": {"dtype": "bfloat16"},
        "lozo": {"resample_every": 5},
        "half": {"method": "mezo", "dtype": "bfloat16", "lr": 1e-2},
    }
    return {"method": method, "steps": STEPS, "eval_every": 4, "save_every": 5, "lr": 1e-2, **extra.get(method, {})}
