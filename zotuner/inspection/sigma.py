"""A tuner's scales at features that one chooses: those of a first step, and the same at other losses."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from zotuner.block_types import block_types, layer_of
from zotuner.blocks import find_blocks
from zotuner.errors import ZotunerError
from zotuner.log.scales import geometric_mean
from zotuner.optim.zo_finetuner import features_of
from zotuner.pertnn import FEATURES, FeatureSpec, normalize
from zotuner.tuner import Tuner

LOSSES = (0.5, 2.0, 4.0)  # what both losses of a two-point step may be: near the end, at the start, far off
START = LOSSES[1]  # what nets that see losses relative to the first one are told that it was
MEAN, VAR = FEATURES.index("mean"), FEATURES.index("var")

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Sigmas:
    """A scale for every block.

    Attributes:
        blocks: (n,) names, in the model's order.
        first: (n,) at the first step: losses 0, sigma_prev 1.
        at: (len(LOSSES), n) the same with both losses at each of `LOSSES`.
        name: "sigma~", or "sigma" of a tuner that is used without normalisation.
        told: In words, which features these are of.
    """

    blocks: tuple[str, ...]
    first: Array
    at: Array
    name: str
    told: str

    @property
    def spread(self) -> float:
        """Standard deviation over blocks of the logarithm at the first step; of those that have any noise."""
        return float(np.log(self.first[self.first > 0]).std())

    @property
    def silent(self) -> int:
        """How many blocks have no noise there."""
        return int((self.first == 0).sum())

    def by_layer(self) -> dict[str, Array]:
        """From a type of block to (layers,) geometric means at the first step; NaN in a layer without; types without
        layers have (1,)."""
        found = [layer_of(name) for name in self.blocks]
        layers = [-1 if layer is None else layer for layer in found]
        depth = max(layers) + 1
        rows = {}
        for label, members in block_types(self.blocks).items():
            row = np.full(depth if layers[members[0]] >= 0 else 1, np.nan)
            for place in range(len(row)):
                mine = [m for m in members if max(layers[m], 0) == place]
                if mine:
                    row[place] = geometric_mean(self.first[mine])
            rows[label] = row
        return rows


@dataclass(frozen=True)
class Comparison:
    """Two tuners on the blocks that both know.

    Attributes:
        blocks: (n,) their names.
        ours: (n,) scales of the first tuner at the first step.
        theirs: (n,) of the second.
        correlation: Of the logarithms; None where one of the two has the same scale everywhere.
        left_out: How many blocks one of them alone knows.
        silent: How many common blocks have no noise under one of them; they are left out, too.
    """

    blocks: tuple[str, ...]
    ours: Array
    theirs: Array
    correlation: float | None
    left_out: int
    silent: int = 0

    @property
    def log_ratio(self) -> Array:
        """(n,) log of ours over theirs."""
        return np.log(self.ours / self.theirs)

    @property
    def summary(self) -> str:
        """In a line."""
        alike = "not defined: one of the two has the same scale in every block"
        shown = alike if self.correlation is None else f"{self.correlation:.4f}"
        apart = f", {self.left_out} blocks that one alone knows left out" if self.left_out else ""
        apart += f", {self.silent} that one gives no noise left out" if self.silent else ""
        return f"correlation of log sigma over {len(self.blocks)} common blocks{apart}: {shown}"


def sigmas(tuner: Tuner, model: Any = None) -> Sigmas:
    """The scales at a first step.

    Args:
        tuner: Whose.
        model: Its blocks' means and variances are what the nets are told; None: for every block, the mean and the
            variance that the nets' inputs are centred at.

    Raises:
        ZotunerError: The tuner does not fit the model.
    """
    info = tuner.info
    nets = None
    if model is None:
        names, numels = tuner.block_names, torch.tensor([block.numel for block in info.blocks])
        row = [0.0, 0.0, 1.0, *_centre(tuner.spec)]
        features = torch.tensor([row] * len(names))
    else:
        blocks = find_blocks(model, tuner.granularity)
        hosts = tuner.hosts_for(model, blocks)
        nets, numels = tuner.nets_for(hosts), tuner.numels_for(model, blocks)
        names, features = tuple(b.name for b in blocks), features_of(hosts, (0.0, 0.0), [1.0] * len(blocks))

    def scaled(loss: float, start: float | None) -> Array:
        told = features.clone()
        told[:, :2] = loss
        raw = tuner.scales(told, nets, start)
        result: Array = (normalize(raw, numels) if info.normalized else raw.double()).numpy()
        return result

    whose = "the model's own mean and variance of each block" if model is not None else _centred_at(tuner.spec)
    told = f"at a first step (losses 0, sigma_prev 1), told {whose}"
    if "relative" in tuner.spec.transform:
        told += f"; at other losses, of a run that began at {START:g}"
    if model is None and info.embedding_rows is not None:
        told += "; embedding tables count whole, which they do not in a run (--model M: as there)"
    at = np.stack([scaled(loss, START) for loss in LOSSES])
    return Sigmas(names, scaled(0.0, None), at, "sigma~" if info.normalized else "sigma", told)


def _centre(spec: FeatureSpec) -> tuple[float, float]:
    """The mean and the variance that the nets see as 0."""
    mean, var = (float(np.exp(spec.shift[i])) if spec.transform[i] == "log" else spec.shift[i] for i in (MEAN, VAR))
    return mean, var


def _centred_at(spec: FeatureSpec) -> str:
    mean, var = _centre(spec)
    return f"mean {mean:.3g} and variance {var:.3g} for every block (--model M: its own)"


def compare(ours: Sigmas, theirs: Sigmas) -> Comparison:
    """Two tuners, side by side.

    Raises:
        ZotunerError: They have no block in common, or none that both give any noise.
    """
    places = {name: i for i, name in enumerate(theirs.blocks)}
    common = [(i, places[name]) for i, name in enumerate(ours.blocks) if name in places]
    if not common:
        raise ZotunerError(f"the tuners have no block in common: {ours.blocks[0]}, ... and {theirs.blocks[0]}, ...")
    heard = [(i, j) for i, j in common if ours.first[i] > 0 and theirs.first[j] > 0]
    if not heard:
        raise ZotunerError("the tuners have no block in common that both give any noise")
    mine, other = (list(side) for side in zip(*heard, strict=True))
    a, b = ours.first[mine], theirs.first[other]
    constant = min(np.log(a).std(), np.log(b).std()) < 1e-6  # what float32 leaves of scales that are all 1
    correlation = None if constant else float(np.corrcoef(np.log(a), np.log(b))[0, 1])
    left_out = len(ours.blocks) + len(theirs.blocks) - 2 * len(common)
    blocks = tuple(ours.blocks[i] for i in mine)
    return Comparison(blocks, a, b, correlation, left_out, len(common) - len(heard))
