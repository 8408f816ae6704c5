"""G and C of groups of blocks, by forward passes alone: for models that cannot be backpropagated anywhere.

    one group at a time: u = z in its blocks, 0 in all others  ->  L(theta), L(theta + eps u), L(theta - eps u)

    c = (L+ - L-) / (2 eps),           E[c^2] = sum_i G_i over the group's blocks
    q = (L+ + L- - 2 L0) / eps^2,      E[q] = sum_i C_i likewise

Losses are appended to OUT/measurements.jsonl, and all else follows from them: a calibration that was killed goes on,
and one that is finished can be solved again with another power, or be given more forwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zotuner import noise
from zotuner.blocks import Block
from zotuner.card import MADE
from zotuner.config import STATISTIC
from zotuner.controls.groups import Grouping, Member, grouping, solve
from zotuner.controls.scales import Estimate, Floats, Statistics, scales_of
from zotuner.controls.setting import Setting
from zotuner.errors import ZotunerError
from zotuner.metrics import MetricsLog, keep_rows
from zotuner.perturb import Draw, Perturbation, Perturber
from zotuner.progress import Display
from zotuner.signals import Requests
from zotuner.tasks import digest
from zotuner.tuner import Tuner
from zotuner.tuner_out import ROWS

AT_ONCE = 16  # groups whose losses are asked for together, with one L(theta)


@dataclass(frozen=True)
class Ask:
    """Some groups of a round: theta's loss and two for each group.

    Attributes:
        number: Of the round: of its noise and its batch.
        members: (groups, unknowns).
    """

    number: int
    members: Member

    @property
    def forwards(self) -> int:
        """Losses."""
        return 1 + 2 * len(self.members)


@dataclass(frozen=True)
class Plan:
    """What is measured, and with what.

    Attributes:
        groups: Which blocks are perturbed together.
        forwards: That may be taken.
        eps: Size of a perturbation.
        batch_size: Examples of a round.
        seed: Of the noise and the order of batches.
    """

    groups: Grouping
    forwards: int
    eps: float
    batch_size: int
    seed: int

    def of_round(self, number: int) -> list[Ask]:
        """The asks of one round."""
        members = self.groups.members(number)
        return [Ask(number, members[first : first + AT_ONCE]) for first in range(0, len(members), AT_ONCE)]

    def asks(self) -> list[Ask]:
        """Of as many whole rounds as the forwards allow.

        Raises:
            ZotunerError: They are too few to tell every unknown.
        """
        cost = sum(ask.forwards for ask in self.of_round(0))
        rounds, needed = self.forwards // cost, -(-len(self.groups.unknowns) // self.groups.count)
        if rounds < needed:
            raise ZotunerError(
                f"--forwards: expected at least {needed * cost} for {len(self.groups.unknowns)} unknowns in rounds of "
                f"{self.groups.count} groups, got {self.forwards}"
            )
        return [ask for number in range(rounds) for ask in self.of_round(number)]


def calibrate(
    setting: Setting,
    out: Path,
    display: Display,
    requests: Requests,
    *,
    groups: str,
    forwards: int,
    statistic: STATISTIC,
    power: float,
    eps: float,
    batch_size: int,
    seed: int,
) -> tuple[Tuner, Statistics]:
    """A static tuner from forward passes, and what it stands on.

    Args:
        setting: Model and task.
        out: Folder with the measurements, of which those that are there are taken.
        display: Where progress goes.
        requests: What signals ask for.
        groups: "types", "block" or a number: see `groups.grouping`.
        forwards: That may be taken, in whole rounds over all groups.
        statistic: sigma_i^2 ~ (G_i / C_i)^power, or (G_i / d_i)^power.
        power: See there.
        eps: Size of a perturbation.
        batch_size: Examples of a round.
        seed: Of the noise, random groups and the order of batches.

    Raises:
        ZotunerError: Too few forwards, a loss that is not finite, or measurements of something else in `out`.
        Interrupted: A signal ended it; the same command goes on.
    """
    plan = Plan(grouping(setting.blocks, groups, seed), forwards, eps, batch_size, seed)
    asks = plan.asks()
    options = {"groups": groups, "eps": eps, "batch_size": batch_size, "seed": seed}
    losses = _measure(setting, plan, asks, _Kept(out / ROWS, _begun(setting, options)), display, requests)
    found = estimates(plan, setting.blocks, asks, losses)
    taken = sum(ask.forwards for ask in asks)
    made = f"calibrated on {setting.objective.task.name} by {taken} forward passes: a control"
    config = {MADE: made, "statistic": statistic, "power": power, "forwards": taken, **options}
    sigma = scales_of(found, setting.blocks, statistic, power)
    return Tuner.static(setting.model, sigma, config=config, **setting.about), found


def _begun(setting: Setting, options: dict[str, Any]) -> dict[str, Any]:
    """What measurements must have in common to be used together."""
    return {
        **options,
        "weights_sha256": setting.about["base_weights_sha256"],
        "data": digest(setting.train),
        "noise_version": noise.VERSION,
    }


class _Kept:
    """The measurements in a file: what they were begun with, then a row an ask.

    Args:
        path: The file; it is made, or continued.
        begun: What its first row says.

    Raises:
        ZotunerError: The file was begun with something else.
    """

    def __init__(self, path: Path, begun: dict[str, Any]) -> None:
        self.path = path
        first, *self.rows = keep_rows(path, lambda _: True) or [{}]
        if not first:
            with MetricsLog(path) as log:
                log.write(**begun)
        for key, value in begun.items():
            if first and first.get(key) != value:
                raise ZotunerError(
                    f"{path}: was begun with {key} {first.get(key)}, got {value}; give it back what it began with, or "
                    "choose another --out"
                )

    def losses(self, ask: Ask, row: dict[str, Any]) -> Floats:
        """What a row holds of an ask."""
        found = row.get("losses")
        numbers = [x for x in found if isinstance(x, int | float)] if isinstance(found, list) else []
        if row.get("round") != ask.number or numbers != found or len(numbers) != ask.forwards:
            raise ZotunerError(
                f"{self.path}: expected {ask.forwards} losses of round {ask.number}, got {str(row)[:60]}; "
                "remove that line and all behind it"
            )
        return np.array(numbers, float)


def _measure(
    setting: Setting, plan: Plan, asks: list[Ask], kept: _Kept, display: Display, requests: Requests
) -> list[Floats]:
    """Of each ask: L(theta), then L+ and L- of each group; those that are kept are not evaluated again."""
    rows = [kept.losses(ask, row) for ask, row in zip(asks, kept.rows, strict=False)]
    perturber = Perturber(setting.model, setting.blocks)
    bar = display.bar("calibrate", len(asks), len(rows))
    batches = enumerate(setting.batches(plan.batch_size, plan.seed))
    number, batch = next(batches)
    with MetricsLog(kept.path) as log:
        for ask in asks[len(rows) :]:
            while number < ask.number:
                number, batch = next(batches)
            losses = _losses(setting, plan, perturber, ask, batch)
            log.write(round=ask.number, losses=losses)
            rows.append(np.array(losses))
            bar.advance(status=f"loss {losses[0]:.4f}")
            requests.check(f"after {len(rows)} of {len(asks)} measurements", "the same command")
    bar.close()
    return rows


@torch.no_grad()
def _losses(setting: Setting, plan: Plan, perturber: Perturber, ask: Ask, batch: Any) -> list[float]:
    def closure(branches: int = 1) -> Tensor:
        return setting.objective.loss(setting.model, batch, branches)

    draw = Draw("rademacher", plan.seed, ask.number)
    points: list[Perturbation | None] = [None]
    for group in ask.members:
        inside = set(plan.groups.blocks_of(group))
        for eps in (plan.eps, -plan.eps):
            points.append(Perturbation(draw, [eps if i in inside else 0.0 for i in range(len(setting.blocks))]))
    losses = perturber.losses(closure, points)
    perturber.settle()
    if not np.isfinite(losses).all():
        raise ZotunerError(f"round {ask.number}: expected finite losses; try a smaller --eps, or --dtype float32")
    return losses


def estimates(plan: Plan, blocks: Sequence[Block], asks: Sequence[Ask], losses: Sequence[Floats]) -> Statistics:
    """G_i and C_i of each block; where blocks share an unknown, each has the share of its elements."""
    members = np.concatenate([ask.members for ask in asks])
    plus, minus = (np.concatenate([found[first::2] for found in losses]) for first in (1, 2))
    base = np.concatenate([np.repeat(found[0], len(ask.members)) for ask, found in zip(asks, losses, strict=True)])
    gradient = solve(members, ((plus - minus) / (2 * plan.eps)) ** 2)
    curvature = solve(members, (plus + minus - 2 * base) / plan.eps**2)
    return Statistics(_shared(plan.groups, blocks, gradient), _shared(plan.groups, blocks, curvature), {})


def _shared(groups: Grouping, blocks: Sequence[Block], found: Estimate) -> Estimate:
    """From the unknowns to their blocks."""
    unknown, share = np.zeros(len(blocks), int), np.zeros(len(blocks))
    for number, members in enumerate(groups.unknowns):
        numels = np.array([blocks[i].numel for i in members], float)
        unknown[list(members)], share[list(members)] = number, numels / numels.sum()
    return Estimate(found.values[unknown] * share, None if found.error is None else found.error[unknown] * share)
