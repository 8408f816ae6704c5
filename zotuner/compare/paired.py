"""The runs of a method against the baseline's of the same seeds: what they have in common, and who is ahead."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from zotuner.compare.spread import Spread, or_nan, spread
from zotuner.compare.state import Status
from zotuner.metrics import standard_error

PARTS = 10  # that a run's steps are cut into, where their losses are shown over the run
DRAWS = ("train_size", "dev_size", "eval_size", "k_shot", "data_dir")  # options that decide which examples a seed draws
SEES = ("batch_size", "max_length", "chat")  # and what is seen of them in a step

Runs = Mapping[int, Status]  # finished ones of one method on one task, by seed


@dataclass(frozen=True)
class Ahead:
    """Whether the means over common seeds are better than the baseline's; None: not known, or not of the same kind."""

    dev: bool | None
    test: bool | None
    metric: bool | None


def incomparable(mine: Runs, base: Runs, baseline: str) -> str:
    """Why their losses are not compared, in the words of a remark; empty if they are."""
    if not mine or not base:
        return ""
    different = _different(mine, base, DRAWS)
    if different:
        return f"draws other examples than {baseline}, by its {' and '.join(different)}"
    if _different(mine, base, ("objective",)):
        return f"has another objective than {baseline}, so that their losses are of two kinds"
    return ""


def _different(mine: Runs, base: Runs, keys: Sequence[str]) -> list[str]:
    """Those options that the runs of both have otherwise."""
    ours, theirs = (next(iter(runs.values())).planned.config for runs in (mine, base))
    return [key for key in keys if getattr(ours, key) != getattr(theirs, key)]


def ahead(mine: Runs, base: Runs) -> Ahead | None:
    """By the seeds that both have, each of which draws its own examples; None: there is none, or it draws others."""
    seeds = sorted(set(mine) & set(base))
    if not seeds or _different(mine, base, DRAWS):
        return None

    def lower(of: Callable[[Status], float | None]) -> bool | None:
        ours, theirs = (spread([x for seed in seeds if (x := of(runs[seed])) is not None]) for runs in (mine, base))
        if ours is None or theirs is None or min(ours.count, theirs.count) < len(seeds):
            return None
        return ours.mean < theirs.mean

    same = not _different(mine, base, ("objective",))
    name = next((name for name in mine[seeds[0]].summary["final"] if name != "loss"), None)
    return Ahead(
        lower(lambda status: status.best) if same else None,
        lower(lambda status: or_nan(status.summary["final"]["loss"])) if same else None,
        None if name is None else lower(lambda status: -or_nan(status.summary["final"].get(name))),
    )


def gap(mine: Runs, base: Runs) -> Spread | None:
    """The loss on test minus the baseline's, example by example, of the seeds that both have."""
    differences = _differences(mine, base, _of_examples)
    return spread([fmean(each) for each in differences], [standard_error(each) for each in differences])


def training(mine: Runs, base: Runs) -> tuple[Spread | None, tuple[Spread, ...]]:
    """The loss in training minus the baseline's, step by step, likewise.

    Returns:
        The mean over the run, whose error is that of the mean over its parts, and the parts; none of these where there
        are fewer steps than parts, nothing where steps saw something else.
    """
    if not base or _different(mine, base, SEES):
        return None, ()
    differences = _differences(mine, base, _of_steps)
    cut = [_cut(each) for each in differences]
    errors = [standard_error([fmean(part) for part in parts]) for parts in cut]
    whole = spread([fmean(each) for each in differences], errors)
    if min(map(len, cut), default=0) < PARTS:
        return whole, ()
    found = [
        spread([fmean(part) for part in same], [standard_error(part) for part in same])
        for same in zip(*cut, strict=True)
    ]
    return whole, tuple(part for part in found if part)


def _differences(mine: Runs, base: Runs, of: Callable[[Status, Status], list[float]]) -> list[list[float]]:
    """Of each seed that has any: the same seed draws the same test examples, and the same batches."""
    found = [of(mine[seed], base[seed]) for seed in sorted(set(mine) & set(base))]
    return [each for each in found if each]


def _cut(values: Sequence[float]) -> list[Sequence[float]]:
    """In PARTS parts, or one for each value where there are fewer."""
    parts = min(PARTS, len(values))
    return [values[len(values) * k // parts : len(values) * (k + 1) // parts] for k in range(parts)]


def _of_examples(mine: Status, base: Status) -> list[float]:
    ours, theirs = mine.test_losses, base.test_losses
    return [own - other for own, other in zip(ours, theirs, strict=True)] if len(ours) == len(theirs) else []


def _of_steps(mine: Status, base: Status) -> list[float]:
    """Nothing where steps evaluated their batch another number of times; those that failed are left out."""
    ours, theirs = mine.step_losses, base.step_losses
    if [*map(len, ours)] != [*map(len, theirs)]:
        return []
    differences = [fmean(own) - fmean(other) for own, other in zip(ours, theirs, strict=True)]
    return [each for each in differences if math.isfinite(each)]
