"""What the PertNNs of a model cost a step, by their number alone: no model is needed."""

import time
from statistics import median
from typing import Any

import torch

from zotuner.pertnn import ARCHITECTURES, FEATURES, FeatureSpec, PertNNBank, normalize

CALLS = 20  # a measurement


def time_pertnn(blocks: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of one evaluation of so many nets, with what goes before and after it in a step.

    features (n, 5)  ->  transform  ->  nets  ->  sigma~

    Args:
        blocks: n.
        rounds: Measurements; each is the mean of `CALLS` evaluations, after one that does not count.
    """
    entries = {}
    random = torch.Generator().manual_seed(0)
    features, nets = torch.rand(blocks, len(FEATURES), generator=random), torch.arange(blocks)
    numels = torch.full((blocks,), 1 << 20)
    for architecture in ARCHITECTURES:
        bank = PertNNBank(blocks, architecture)
        spec = (
            FeatureSpec.standardized(*torch.rand(2, blocks, generator=random))
            if architecture == "exp"
            else FeatureSpec()
        )
        times = []
        with torch.no_grad():
            for _ in range(rounds + 1):
                began = time.perf_counter()
                for _ in range(CALLS):
                    normalize(bank(spec(features), nets), numels)
                times.append(1000 * (time.perf_counter() - began) / CALLS)
        entries[architecture] = {"median": median(times[1:]), "min": min(times[1:]), "max": max(times[1:])}
    return entries
