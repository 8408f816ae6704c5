"""The expected gain of a zeroth-order step: a meta-loss without the noise of a single draw.

    batch of b examples: g_i                       ->  energy T_i = |g_i|^2
    centred loss: h_i; its mean over earlier ones  ->  signal S_i = <h_i, mean>
    Fisher: |gradient of an example|^2             ->  curvature C_i = b T_i - (b - 1) S_i, at least T_i
    sigma~, S, T, C of the points so far           ->  log gain, and its gradient by each sigma~_i

Averaged over z, to second order, a step with u = (sigma~_i z_i)_i, its coefficient from one batch, changes the loss of
the task by -lr A + lr^2 / 2 T B, with A = sum sigma~_i^2 S_i, T = sum sigma~_i^2 T_i, B = sum sigma~_i^2 C_i. At the
best lr it gains A^2 / (2 T B). Points have batches of their own, so that S is free of sampling noise in the mean, and
holds what lasts along the trajectory. Source: docs/method.md, "Meta-training".
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from zotuner import noise
from zotuner.blocks import Block, Piece, pieces_of
from zotuner.config import MetaTrainConfig
from zotuner.files import write_atomically
from zotuner.gradients import each_gradient
from zotuner.snapshot import under
from zotuner.visit import Found, Loss, ScalesOf, Visit

MEMORY = 0.95  # of the running mean of gradients: it goes back some 20 points
TOGETHER = 8  # points an outer step


@dataclass(frozen=True)
class Profile:
    """What a point says of each block.

    Attributes:
        loss: Of the batch at the point.
        signal: (n,) float64: S_i, whose mean is |E h_i|^2; None where no earlier point is known.
        energy: (n,) float64: T_i.
        examples: In the batch, b.
    """

    loss: float
    signal: Tensor | None
    energy: Tensor
    examples: int

    @property
    def finite(self) -> bool:
        """Whether all of it can be used."""
        return bool(torch.isfinite(self.energy if self.signal is None else self.energy + self.signal).all())

    @property
    def curvature(self) -> Tensor:
        """(n,) float64: C_i, the mean squared gradient of an example, which of a cross-entropy is about tr H_ii.

        It is at least that of the examples' mean gradient, T_i; where gradients become smaller on the way, S_i exceeds
        T_i and would say otherwise.
        """
        assert self.signal is not None, "the first point of a round has no signal"
        return torch.maximum(self.examples * self.energy - (self.examples - 1) * self.signal, self.energy)


@dataclass
class Remembered:
    """The running mean of a task's gradients over the points of a round: one copy of the weights' size.

    Attributes:
        means: Of each piece, not yet divided by the weight.
        weight: Sum of the weights of the points in the means, up to 1.
    """

    means: dict[Piece, Tensor] = field(default_factory=dict)
    weight: float = 0.0
    _met: set[Piece] = field(default_factory=set)  # at the present point

    def meet(self, piece: Piece, gradient: Tensor) -> float:
        """The product of a point's gradient with the mean over earlier points, 0 at the first, and takes it in."""
        self._met.add(piece)
        if piece not in self.means:
            self.means[piece] = gradient * (1 - MEMORY)
            return 0.0
        mean = self.means[piece]
        product = float(torch.dot(mean.flatten(), gradient.flatten())) / self.weight
        mean.mul_(MEMORY).add_(gradient, alpha=1 - MEMORY)
        return product

    def pass_on(self) -> None:
        """The point is over: pieces that were not met, such as experts that no token went to, had no gradient."""
        for piece in self.means.keys() - self._met:
            self.means[piece].mul_(MEMORY)
        self._met.clear()
        self.weight = MEMORY * self.weight + 1 - MEMORY


def profile(
    blocks: Sequence[Block], loss: Loss, centred: Loss | None, remembered: Remembered, *, examples: int
) -> Profile:
    """Measures a point.

    Args:
        blocks: Whose parameters are floating-point.
        loss: Of the batch that gives a step its coefficient.
        centred: Of the same batch, see `Objective.centred_loss`; None: the loss itself.
        remembered: Of the earlier points of the task; takes this one in.
        examples: In the batch.
    """
    signal, energy = torch.zeros(2, len(blocks), dtype=torch.float64)

    def first(number: int, piece: Piece, gradient: Tensor) -> None:
        energy[number] += noise.sums(gradient)[1]
        if centred is None:
            lasting(number, piece, gradient)

    def lasting(number: int, piece: Piece, gradient: Tensor) -> None:
        signal[number] += remembered.meet(piece, gradient)

    with torch.enable_grad():
        with each_gradient(blocks, first):
            value = loss()
            value.backward()
        if centred is not None:
            with each_gradient(blocks, lasting):
                centred().backward()
    known = signal if remembered.weight else None
    remembered.pass_on()
    return Profile(float(value.detach()), known, energy, examples)


@dataclass
class Profiles:
    """Means of what points of one task and phase say, each relative to its own energy.

    Attributes:
        sums: (3, n) float64: signal, energy and curvature, added up; None before the first point.
        count: Of points.
    """

    sums: Tensor | None = None
    count: int = 0

    def add(self, point: Profile) -> Tensor:
        """Takes in a point whose signal is known; returns its own (3, n) float64."""
        assert point.signal is not None, "the first point of a round has no signal"
        own = torch.stack([point.signal, point.energy, point.curvature]) / point.energy.sum()
        self.sums = own if self.sums is None else self.sums + own
        self.count += 1
        return own

    @property
    def means(self) -> Tensor:
        """(3, n) float64."""
        assert self.sums is not None, "no point was added"
        return self.sums / self.count


def gain(means: Tensor, scales: Tensor) -> float:
    """A^2 / (2 T B) with means (3, n), in the loss's unit; NaN where that has no sense."""
    a, t, b = (means @ scales.detach().double() ** 2).tolist()
    return a * a / (2 * t * b) if a > 0 and t > 0 and b > 0 else float("nan")


def minus_log_gain(
    own: Tensor,  # (m, 3, n) of m points
    means: Tensor,  # (m, 3, n) of their tasks and phases
    scales: Tensor,  # (m, n) sigma~, with its graph
) -> Tensor | None:
    """A number whose gradient is that of the mean of log T + log B - 2 log A over the points.

    With a point's own numbers above and means below, it is free of bias where points are many. None where no point's
    means of A and B are positive, so that nothing can be said.
    """
    squares = scales.double().square()[..., None]
    above, below = (own @ squares)[..., 0], (means @ squares.detach())[..., 0]
    usable = (below > 0).all(dim=1)
    if not bool(usable.any()):
        return None
    signs = torch.tensor([-2.0, 1.0, 1.0], dtype=torch.float64)
    return ((above[usable] / below[usable]) @ signs).mean()


class _Visited(NamedTuple):
    """A point whose signal is known.

    Attributes:
        inputs: (n, 5) what the nets saw.
        own: (3, n) of `Profiles.add`.
        phase: Which profiles it belongs to.
    """

    inputs: Tensor
    own: Tensor
    phase: str


class Expected:
    """The meta-loss: that after a step at its best lr, averaged over noise.

    Args:
        blocks: Of the model.
        config: When a round has settled, outer steps a point, the seed.
    """

    anew = True

    def __init__(self, blocks: Sequence[Block], config: MetaTrainConfig) -> None:
        self._blocks, self._config = blocks, config
        self._pieces = list(pieces_of(blocks))
        self._profiles: dict[str, Profiles] = {}  # of each task, before and after it has settled
        self._visited: list[_Visited] = []
        self._remembered: dict[str, Remembered] = {}  # of each task and phase that a round is in

    def visit(self, visit: Visit, inputs: Tensor, scales: Tensor) -> Found:
        """Measures signal, energy and curvature; the losses that the nets are told are that of the point."""
        at, settled = visit.point, visit.point.position >= self._config.settle
        phase = f"{at.task} {'settled' if settled else 'settling'}"
        if at.begins:
            self._remembered.clear()
        elif settled:
            self._remembered.pop(f"{at.task} settling", None)
        remembered = self._remembered.setdefault(phase, Remembered())
        centred = visit.centred if settled else None
        point = profile(self._blocks, visit.loss, centred, remembered, examples=len(at.examples))
        row: dict[str, Any] = {"loss": point.loss, "meta_loss": math.nan, "coefficients": [], "gain": math.nan}
        if not point.finite:
            del self._remembered[phase]  # it met a gradient that is not
            return Found(row | {"skipped": True}, None)
        row["skipped"] = False
        if point.signal is not None:
            profiles = self._profiles.setdefault(phase, Profiles())
            self._visited.append(_Visited(inputs, profiles.add(point), phase))
            reached = gain(profiles.means, scales)
            row |= {
                "meta_loss": point.loss - reached,
                "gain": reached / gain(profiles.means, torch.ones_like(scales)),
            }
        return Found(row, (point.loss, point.loss))

    def objectives(self, number: int, scales_of: ScalesOf) -> Iterator[Tensor]:
        """`outer_steps` for each point, each of some points drawn from all so far."""
        if not self._visited:
            return
        random = np.random.default_rng((self._config.seed, number, 3))
        of_phase = {phase: profiles.means for phase, profiles in self._profiles.items()}
        for _ in range(self._config.outer_steps * len(self._visited)):
            chosen = [self._visited[i] for i in random.integers(len(self._visited), size=TOGETHER)]
            own, means = torch.stack([x.own for x in chosen]), torch.stack([of_phase[x.phase] for x in chosen])
            objective = minus_log_gain(own, means, scales_of(torch.stack([x.inputs for x in chosen])))
            if objective is not None:
                yield objective

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All points so far, their means, and the running means of gradients."""
        tensors = {f"profiles.{phase}": p.sums for phase, p in self._profiles.items() if p.sums is not None}
        if self._visited:
            tensors["visited.inputs"] = torch.stack([x.inputs for x in self._visited])
            tensors["visited.own"] = torch.stack([x.own for x in self._visited])
        for phase, remembered in self._remembered.items():
            known = [(k, piece) for k, (_, piece) in enumerate(self._pieces) if piece in remembered.means]
            tensors |= {f"remembered.{phase}.{k}": remembered.means[piece] for k, piece in known}
        return tensors, {
            "profiles": {phase: p.count for phase, p in self._profiles.items()},
            "visited": [x.phase for x in self._visited],
            "remembered": {phase: r.weight for phase, r in self._remembered.items()},
        }

    def save(self, path: Path) -> None:
        """Writes what the points said: other nets can be learned from it without the model (`benchmarks/points.py`).

        `inputs` (m, n, 5) and `own` (m, 3, n) of m points, and in the header `phases`, a list of m names in JSON.
        """
        tensors = {name: tensor for name, tensor in self.state()[0].items() if name.startswith("visited.")}
        phases = json.dumps([x.phase for x in self._visited])
        write_atomically(path, save(under("visited.", tensors), metadata={"phases": phases}))

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Takes back what `state` gave."""
        sums, visited = under("profiles.", tensors), under("visited.", tensors)
        self._profiles = {phase: Profiles(sums[phase], count) for phase, count in state["profiles"].items()}
        self._visited = [
            _Visited(visited["inputs"][k], visited["own"][k], phase) for k, phase in enumerate(state["visited"])
        ]
        for phase, weight in state["remembered"].items():
            kept = under(f"remembered.{phase}.", tensors)
            # clones lie where torch aligns memory, on which a product's last bits depend; a file's tensors need not
            means = {piece: kept[str(k)].clone() for k, (_, piece) in enumerate(self._pieces) if str(k) in kept}
            self._remembered[phase] = Remembered(means, weight)
