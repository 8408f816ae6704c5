"""Whether a tuner can be told from fresh nets: its weights, and the spread of its scales.

Fresh weights are uniform within +-bound, bound = fan_in^-0.5 (`nn.Linear`'s default); the last layer of "exp" is 0. Of
N of them, the mean strays from 0 by bound / sqrt(3 N), and the standard deviation from bound / sqrt(3) by the part
sqrt(0.2 / N): a uniform distribution has kurtosis 9/5.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from zotuner.block_types import alike
from zotuner.inspection.sigma import sigmas
from zotuner.pertnn import FEATURES, HIDDEN, PertNNBank
from zotuner.tuner import Tuner

FAN_IN = {"w1": len(FEATURES), "b1": len(FEATURES), "w2": HIDDEN, "b2": HIDDEN}
SEEDS = 5  # of fresh nets to compare with
TOLD_APART = 4.0  # sampling errors, beyond which hardly any fresh tensor lies
ROUNDING = 1e-3  # of the bound: what storing weights in half precision may add


@dataclass(frozen=True)
class Weights:
    """One tensor of the nets, of all of them together.

    Attributes:
        name: In `tuner.safetensors`.
        count: Numbers in it.
        mean: Of them.
        std: Of them.
        fresh_std: What it begins with.
        mean_errors: How many sampling errors the mean is from that of fresh ones; NaN where those are all 0.
        std_errors: Likewise of the standard deviation.
        beyond: Share of the numbers that no fresh tensor can have.
        moved: |w - w_0| / |w|, w_0 drawn by the seed that the tuner records; None: it records none.
    """

    name: str
    count: int
    mean: float
    std: float
    fresh_std: float
    mean_errors: float
    std_errors: float
    beyond: float
    moved: float | None

    @property
    def like_fresh(self) -> bool:
        """Whether nothing here tells it from a fresh tensor."""
        errors = [abs(x) for x in (self.mean_errors, self.std_errors) if not math.isnan(x)]
        return self.beyond == 0 and all(x < TOLD_APART for x in errors)


def tensors(tuner: Tuner) -> list[Weights]:
    """Each of the nets' tensors against fresh ones; a net that several blocks learned together counts once."""
    seed = tuner.info.config.get("seed")
    fresh = (
        PertNNBank(len(tuner.info.blocks), tuner.info.architecture, seed=seed)
        if type(seed) is int and 0 <= seed < 1 << 63
        else None
    )
    began = {} if fresh is None else dict(fresh.named_parameters())
    learned, _ = _shared(tuner)
    found = []
    for name, whole in tuner.bank.named_parameters():
        w = whole.detach()[learned].double()
        count = w.numel()
        bound = 0.0 if tuner.info.architecture == "exp" and name in ("w2", "b2") else FAN_IN[name] ** -0.5
        mean, std, fresh_std = float(w.mean()), float(w.std(correction=0)), bound / math.sqrt(3)
        moved = float((w - began[name].detach()[learned]).norm() / w.norm().clamp_min(1e-30)) if began else None
        found.append(
            Weights(
                name=name,
                count=count,
                mean=mean,
                std=std,
                fresh_std=fresh_std,
                mean_errors=mean / fresh_std * math.sqrt(count) if bound else math.nan,
                std_errors=(std / fresh_std - 1) / math.sqrt(0.2 / count) if bound else math.nan,
                beyond=float((w.abs() > bound * (1 + ROUNDING)).double().mean()),
                moved=moved,
            )
        )
    return found


def _shared(tuner: Tuner) -> tuple[list[int], list[int]]:
    """The block that each net was made for, and the net of each block."""
    bands = tuner.info.config.get("bands")
    return alike(tuner.block_names, bands if type(bands) is int and bands > 0 else None)


def spread_of_fresh(tuner: Tuner, model: Any = None) -> str:
    """What `Sigmas.spread` is of fresh nets for the same blocks, over a few seeds."""
    firsts, of_block = _shared(tuner)

    def fresh(seed: int) -> Tuner:
        bank = PertNNBank(len(tuner.info.blocks), tuner.info.architecture, seed=seed)
        return Tuner(tuner.info, bank.chosen(firsts).chosen(of_block))

    spreads = torch.tensor([sigmas(fresh(seed), model).spread for seed in range(SEEDS)])
    return f"of fresh nets, {SEEDS} seeds: {spreads.mean():.4f} +- {spreads.std():.4f}"
