"""From runs to the figures of the table: which lr, what it gave, how soon it was as good as the baseline.

statuses  ->  a Row for each task and method  ->  a Standing for each method over the tasks

What a run delivers is its best evaluation on dev; that loss chooses the lr, and is what others have to reach.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from zotuner.compare.paired import Ahead, ahead, gap, incomparable, training
from zotuner.compare.spec import Budget, Comparison, Unit
from zotuner.compare.spread import Spread, or_nan, spread
from zotuner.compare.state import Point, Status
from zotuner.metrics import standard_error

Edge = Literal["", "lowest", "highest", "only"]
SHARES = ("accuracy", "em")  # metrics that are a share of the examples


@dataclass(frozen=True)
class Tried:
    """What one lr of a grid gave on dev: over its finished seeds, and how many seeds failed."""

    lr: float | None
    dev: Spread | None
    failed: int


@dataclass(frozen=True)
class Reach:
    """The share of the budget to a dev loss of the baseline; `at_least`: a seed never came there, and counts as 1."""

    share: float
    at_least: bool


@dataclass(frozen=True)
class Row:
    """One method on one task, at its chosen lr.

    Attributes:
        edge: Where in its grid that lies, if not inside.
        tried: The whole grid, in order.
        seeds: That are done at the chosen lr.
        dev, test: Losses.
        gap: The loss on test minus the baseline's, example by example, of the seeds that both have; its `error` is that
            of a mean of differences. None for the baseline, and where nothing can be compared.
        training: The mean loss of the steps' batches minus the baseline's, step by step, likewise; its `error` is that
            of the mean over PARTS parts of the run, since steps that follow one another differ alike.
        training_parts: The same of these parts, in order; empty where there are fewer steps than parts.
        ahead: Whether it is ahead of the baseline over the seeds that both have.
        incomparable: Why losses are not compared with the baseline's; empty where they are.
        metrics: On the test examples; the first one is the task's main one.
        reach: To its best loss; None where it never improved, and where nothing can be compared.
        reach_end: To its last one, likewise.
        speedup: The baseline's own shares over this method's; `reach.at_least` makes it an upper bound.
        peak_bytes: Most memory of a run; None before one is done.
        seconds: Of the steps of a run.
        curves: Evaluations on dev of each seed.
    """

    task: str
    method: str
    lr: float | None = None
    edge: Edge = ""
    tried: tuple[Tried, ...] = ()
    seeds: tuple[int, ...] = ()
    dev: Spread | None = None
    test: Spread | None = None
    gap: Spread | None = None
    training: Spread | None = None
    training_parts: tuple[Spread, ...] = ()
    ahead: Ahead | None = None
    incomparable: str = ""
    metrics: Mapping[str, Spread] = field(default_factory=dict)
    reach: Reach | None = None
    reach_end: Reach | None = None
    speedup: float | None = None
    peak_bytes: int | None = None
    seconds: float | None = None
    curves: Mapping[int, tuple[Point, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Wins:
    """On how many tasks a mean is better than the baseline's, of how many where both have it."""

    won: int
    of: int


@dataclass(frozen=True)
class Standing:
    """One method against the baseline, over the tasks.

    Attributes:
        dev: By the loss on dev.
        training: By the loss in training.
        test, metric: By the loss and the main metric on test.
        speedup: Geometric mean; None where there is none.
        speedup_tasks: Of so many tasks.
        at_most: Whether it is an upper bound, since some run never reached the baseline's loss.
        end: The share of the budget to the baseline's last loss, geometric mean; None where there is none.
        end_tasks: Of so many tasks.
        end_at_least: Whether it is a lower bound, likewise.
    """

    method: str
    dev: Wins
    training: Wins
    test: Wins
    metric: Wins
    speedup: float | None
    speedup_tasks: int
    at_most: bool
    end: float | None
    end_tasks: int
    end_at_least: bool


def rows_of(spec: Comparison, statuses: Sequence[Status]) -> list[Row]:
    """A row for each task and method, in the order of the file."""
    rows = []
    for task in spec.tasks:
        cells = {
            method: [s for s in statuses if (s.planned.task, s.planned.method) == (task.task, method)]
            for method in spec.methods
        }
        chosen = {method: _choose(cell) for method, cell in cells.items()}
        base = _at(cells[spec.baseline], chosen[spec.baseline])
        rows += [_row(task.task, method, cell, chosen[method], base, spec) for method, cell in cells.items()]
    return rows


def standings_of(spec: Comparison, rows: Sequence[Row]) -> list[Standing]:
    """All methods but the baseline."""
    by = {(row.task, row.method): row for row in rows}
    return [_standing(method, spec, by) for method in spec.methods if method != spec.baseline]


def first_reach(curve: Sequence[Point], target: float, unit: Unit) -> float | None:
    """What it had cost when a curve first came down to a loss; linear between evaluations. None: it never did."""
    for number, point in enumerate(curve):
        if not point.loss <= target:
            continue
        at, before = float(getattr(point, unit)), curve[number - 1]
        if number == 0 or not math.isfinite(before.loss):
            return at
        start = float(getattr(before, unit))
        return start + (at - start) * (before.loss - target) / (before.loss - point.loss)
    return None


def _choose(cell: Sequence[Status]) -> float | None:
    """The lr with the lowest mean loss on dev.

    While some runs are missing, two learning rates are compared on the seeds that both have, and one that no other
    beats is chosen; where there is none, or several, by the seeds that all have. Any failure counts as inf.
    """
    known: dict[float | None, dict[int, float]] = {}
    for status in cell:
        if status.state in ("done", "failed"):
            loss = status.best if status.state == "done" else math.inf
            known.setdefault(status.planned.lr, {})[status.planned.seed] = _or_inf(loss)
    done = {status.planned.lr for status in cell if status.state == "done"}
    failed = {status.planned.lr for status in cell if status.state == "failed"}

    def mean(lr: float | None, seeds: set[int]) -> float:
        return math.inf if lr in failed else fmean([x for seed, x in known[lr].items() if not seeds or seed in seeds])

    def beaten(lr: float | None) -> bool:
        both = {other: set(known[lr]) & set(known[other]) for other in known if other != lr}
        return any(mean(other, seeds) < mean(lr, seeds) for other, seeds in both.items() if seeds)

    shared = set.intersection(*(set(losses) for losses in known.values())) if known else set()
    unbeaten = [lr for lr in done if not beaten(lr)]
    return min(unbeaten or done, key=lambda lr: (mean(lr, shared), lr or 0.0), default=None)


def _or_inf(loss: float | None) -> float:
    return math.inf if loss is None or not math.isfinite(loss) else loss


def _at(cell: Sequence[Status], lr: float | None) -> dict[int, Status]:
    """The finished runs of an lr, by seed."""
    return {s.planned.seed: s for s in cell if s.planned.lr == lr and s.state == "done"}


def _row(
    task: str, method: str, cell: Sequence[Status], lr: float | None, base: Mapping[int, Status], spec: Comparison
) -> Row:
    grid = sorted({s.planned.lr for s in cell}, key=lambda value: value or 0.0)
    tried = tuple(
        Tried(
            value,
            spread([s.best for s in _at(cell, value).values() if s.best is not None]),
            sum(s.state == "failed" and s.planned.lr == value for s in cell),
        )
        for value in grid
    )
    mine = _at(cell, lr)
    if not mine:
        return Row(task, method, tried=tried)
    summaries = [status.summary for status in mine.values()]
    names = [name for name in summaries[0]["final"] if name != "loss"]
    examples = min(summary["examples"]["test"] for summary in summaries)
    why_not = incomparable(mine, base, spec.baseline)
    comparable = {} if why_not else base
    budget = spec.budget_of(task)
    reach, own = _reach(mine, comparable, budget, lambda status: status.best)
    reach_end, _ = _reach(mine, comparable, budget, lambda status: status.curve[-1].loss if status.curve else None)
    other = comparable if method != spec.baseline else {}
    whole, parts = training(mine, other)
    return Row(
        task,
        method,
        lr,
        _edge(lr, tried),
        tried,
        tuple(sorted(mine)),
        spread(
            [status.best for status in mine.values() if status.best is not None],
            [status.best_error for status in mine.values()],
        ),
        spread(
            [or_nan(summary["final"]["loss"]) for summary in summaries],
            [standard_error(status.test_losses) for status in mine.values()],
        ),
        gap(mine, other),
        whole,
        parts,
        ahead(mine, base) if method != spec.baseline else None,
        why_not,
        {name: _metric(name, [or_nan(s["final"][name]) for s in summaries], examples) for name in names},
        reach,
        reach_end,
        own.share / reach.share if own and reach and reach.share else None,
        max(summary["peak_rss_bytes"] for summary in summaries),
        fmean(summary["seconds"] for summary in summaries),
        {seed: mine[seed].curve for seed in sorted(mine)},
    )


def _metric(name: str, values: Sequence[float], examples: int) -> Spread:
    found = spread(values)
    assert found is not None
    share = name in SHARES and 0 <= found.mean <= 1  # a metric of one's own may have such a name, too
    error = math.sqrt(found.mean * (1 - found.mean) / examples) if share else None
    return Spread(found.mean, found.std, found.count, error)


def _edge(lr: float | None, tried: Sequence[Tried]) -> Edge:
    """Where in its grid an lr lies; nothing is said before each lr has an outcome."""
    if lr is None or not all(other.dev or other.failed for other in tried):
        return ""
    if len(tried) == 1:
        return "only"
    return "lowest" if lr == tried[0].lr else "highest" if lr == tried[-1].lr else ""


def _reach(
    mine: Mapping[int, Status], base: Mapping[int, Status], budget: Budget, target_of: Callable[[Status], float | None]
) -> tuple[Reach | None, Reach | None]:
    """How soon both came to a loss of the baseline.

    Seed by seed, since a seed draws its own dev examples; seeds where the baseline did not improve are left out.
    """
    ours, theirs = [], []
    for seed in sorted(set(mine) & set(base)):
        target, curve = target_of(base[seed]), base[seed].curve
        if target is None or mine[seed].best is None or not curve or not mine[seed].curve:
            continue
        if not target < curve[0].loss:
            continue
        ours.append(first_reach(mine[seed].curve, target, budget.unit))
        theirs.append(first_reach(curve, target, budget.unit) or budget.amount)
    return _share(ours, budget), _share(theirs, budget)


def _share(costs: Sequence[float | None], budget: Budget) -> Reach | None:
    if not costs:
        return None
    return Reach(fmean([budget.amount if cost is None else cost for cost in costs]) / budget.amount, None in costs)


def _standing(method: str, spec: Comparison, by: Mapping[tuple[str, str], Row]) -> Standing:
    rows = [by[task.task, method] for task in spec.tasks]
    outcomes = [row.ahead for row in rows if row.ahead]
    factors = [(row.speedup, row.reach) for row in rows if row.speedup and row.reach]
    logs = [math.log(factor) for factor, _ in factors]
    ends = [row.reach_end for row in rows if row.reach_end and row.reach_end.share]
    return Standing(
        method,
        _wins(each.dev for each in outcomes),
        _wins(row.training.mean < 0 if row.training else None for row in rows),
        _wins(each.test for each in outcomes),
        _wins(each.metric for each in outcomes),
        math.exp(fmean(logs)) if logs else None,
        len(logs),
        any(reach.at_least for _, reach in factors),
        math.exp(fmean([math.log(end.share) for end in ends])) if ends else None,
        len(ends),
        any(end.at_least for end in ends),
    )


def _wins(outcomes: Iterable[bool | None]) -> Wins:
    known = [outcome for outcome in outcomes if outcome is not None]
    return Wins(sum(known), len(known))
