"""From runs to the figures of the table: which lr, what it gave, how soon it was as good as the baseline.

statuses  ->  a Row for each task and method  ->  a Standing for each method over the tasks

What a run delivers is its best evaluation on dev; that loss chooses the lr, and is what others have to reach.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Literal

from zotuner.compare.spec import Budget, Comparison, Unit
from zotuner.compare.state import Point, Status
from zotuner.metrics import standard_error

Edge = Literal["", "lowest", "highest", "only"]
PARTS = 10  # that a run's steps are cut into, where their losses are shown over the run
DRAWS = ("train_size", "dev_size", "eval_size", "k_shot", "data_dir")  # options that decide which examples a seed draws
SEES = ("batch_size", "max_length", "chat")  # and what is seen of them in a step
SHARES = ("accuracy", "em")  # metrics that are a share of the examples


@dataclass(frozen=True)
class Spread:
    """Values over seeds: their mean, their standard deviation (n - 1; None for one seed), how many.

    `error`: standard error of one run's value over its n examples, of a share p sqrt(p (1 - p) / n); None: not known.
    """

    mean: float
    std: float | None
    count: int
    error: float | None = None


@dataclass(frozen=True)
class Tried:
    """What one lr of a grid gave on dev: over its finished seeds, and how many seeds failed."""

    lr: float | None
    dev: Spread | None
    failed: int


@dataclass(frozen=True)
class Reach:
    """Shares of the budget to the baseline's loss on dev; `at_least`: a seed never came there, and counts as 1."""

    share: float
    at_least: bool


@dataclass(frozen=True)
class Ahead:
    """Whether the means over common seeds are better than the baseline's; None: not known, or not of the same kind."""

    dev: bool | None
    test: bool | None
    metric: bool | None


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
        reach: None for the baseline's own runs that never improved, and where nothing can be compared.
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
    """

    method: str
    dev: Wins
    training: Wins
    test: Wins
    metric: Wins
    speedup: float | None
    speedup_tasks: int
    at_most: bool


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
    """The lr with the lowest mean loss on dev, over those seeds that every lr with an outcome has; any failure: inf."""
    known: dict[float | None, dict[int, float]] = {}
    for status in cell:
        if status.state in ("done", "failed"):
            loss = status.best if status.state == "done" else math.inf
            known.setdefault(status.planned.lr, {})[status.planned.seed] = _or_inf(loss)
    done = {status.planned.lr for status in cell if status.state == "done"}
    failed = {status.planned.lr for status in cell if status.state == "failed"}
    shared = set.intersection(*(set(losses) for losses in known.values())) if known else set()
    means = {
        lr: math.inf if lr in failed else fmean([x for seed, x in losses.items() if not shared or seed in shared])
        for lr, losses in known.items()
        if lr in done
    }
    return min(means, key=lambda lr: (means[lr], lr or 0.0), default=None)


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
    incomparable = _incomparable(mine, base, spec.baseline)
    comparable = {} if incomparable else base
    reach, speedup = _reach(mine, comparable, spec.budget_of(task))
    other = comparable if method != spec.baseline else {}
    steps = [] if not other or _different(mine, other, SEES) else _differences(mine, other, _of_steps)
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
            [_or_nan(summary["final"]["loss"]) for summary in summaries],
            [standard_error(status.test_losses) for status in mine.values()],
        ),
        _mean(_differences(mine, other, _of_examples)),
        spread([fmean(each) for each in steps], [_error_of_parts(each) for each in steps]),
        _parts(steps),
        _ahead(mine, base) if method != spec.baseline else None,
        incomparable,
        {name: _metric(name, [_or_nan(s["final"][name]) for s in summaries], examples) for name in names},
        reach,
        speedup,
        max(summary["peak_rss_bytes"] for summary in summaries),
        fmean(summary["seconds"] for summary in summaries),
        {seed: mine[seed].curve for seed in sorted(mine)},
    )


def _incomparable(mine: Mapping[int, Status], base: Mapping[int, Status], baseline: str) -> str:
    """Why their losses are not compared, in the words of a remark; empty if they are."""
    if not mine or not base:
        return ""
    different = _different(mine, base, DRAWS)
    if different:
        return f"draws other examples than {baseline}, by its {' and '.join(different)}"
    if _different(mine, base, ("objective",)):
        return f"has another objective than {baseline}, so that their losses are of two kinds"
    return ""


def _different(mine: Mapping[int, Status], base: Mapping[int, Status], keys: Sequence[str]) -> list[str]:
    """Those options that the runs of both have otherwise."""
    ours, theirs = (next(iter(runs.values())).planned.config for runs in (mine, base))
    return [key for key in keys if getattr(ours, key) != getattr(theirs, key)]


def _ahead(mine: Mapping[int, Status], base: Mapping[int, Status]) -> Ahead | None:
    """By the seeds that both have, each of which draws its own examples; None: there is none, or it draws others."""
    seeds = sorted(set(mine) & set(base))
    if not seeds or _different(mine, base, DRAWS):
        return None

    def lower(of: Callable[[Status], float | None]) -> bool | None:
        ours, theirs = ([of(runs[seed]) for seed in seeds] for runs in (mine, base))
        known = [x for x in ours if x is not None], [x for x in theirs if x is not None]
        if min(map(len, known)) < len(seeds):
            return None
        return _mean_of(known[0]) < _mean_of(known[1])

    same = not _different(mine, base, ("objective",))
    name = next((name for name in mine[seeds[0]].summary["final"] if name != "loss"), None)
    return Ahead(
        lower(lambda status: status.best) if same else None,
        lower(lambda status: _or_nan(status.summary["final"]["loss"])) if same else None,
        None if name is None else lower(lambda status: -_or_nan(status.summary["final"].get(name))),
    )


def _mean_of(values: Sequence[float]) -> float:
    return fmean(values) if all(map(math.isfinite, values)) else math.nan


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _differences(
    mine: Mapping[int, Status], base: Mapping[int, Status], of: Callable[[Status, Status], list[float]]
) -> list[list[float]]:
    """Of each seed that has any: the same seed draws the same test examples, and the same batches."""
    found = [of(mine[seed], base[seed]) for seed in sorted(set(mine) & set(base))]
    return [each for each in found if each]


def _mean(differences: Sequence[Sequence[float]]) -> Spread | None:
    return spread([fmean(each) for each in differences], [standard_error(each) for each in differences])


def _parts(differences: Sequence[Sequence[float]]) -> tuple[Spread, ...]:
    if min(map(len, differences), default=0) < PARTS:
        return ()
    cut = zip(*map(_cut, differences), strict=True)
    return tuple(part for part in map(_mean, cut) if part)


def _cut(values: Sequence[float]) -> list[Sequence[float]]:
    """In PARTS parts, or one for each value where there are fewer."""
    parts = min(PARTS, len(values))
    return [values[len(values) * k // parts : len(values) * (k + 1) // parts] for k in range(parts)]


def _error_of_parts(values: Sequence[float]) -> float:
    return standard_error([fmean(part) for part in _cut(values)])


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


def spread(values: Sequence[float], errors: Sequence[float] = ()) -> Spread | None:
    """Mean and standard deviation, and the mean of the runs' own errors where all are known; None for no value."""
    if not values:
        return None
    finite = all(map(math.isfinite, values))
    std = (stdev(values) if finite else math.nan) if len(values) > 1 else None
    error = fmean(errors) if errors and all(map(math.isfinite, errors)) else None
    return Spread(fmean(values) if finite else math.nan, std, len(values), error)


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


def _reach(mine: Mapping[int, Status], base: Mapping[int, Status], budget: Budget) -> tuple[Reach | None, float | None]:
    """Seed by seed, since a seed draws its own dev examples; seeds where the baseline did not improve are left out."""
    ours, theirs = [], []
    for seed in sorted(set(mine) & set(base)):
        target, curve = base[seed].best, base[seed].curve
        if target is None or mine[seed].best is None or not curve or not mine[seed].curve:
            continue
        if not target < curve[0].loss:
            continue
        ours.append(first_reach(mine[seed].curve, target, budget.unit))
        theirs.append(first_reach(curve, target, budget.unit) or budget.amount)
    if not ours:
        return None, None
    spent = fmean([budget.amount if cost is None else cost for cost in ours])
    speedup = fmean(theirs) / spent if spent else None
    return Reach(spent / budget.amount, None in ours), speedup


def _standing(method: str, spec: Comparison, by: Mapping[tuple[str, str], Row]) -> Standing:
    rows = [by[task.task, method] for task in spec.tasks]
    ahead = [row.ahead for row in rows if row.ahead]
    factors = [(row.speedup, row.reach) for row in rows if row.speedup and row.reach]
    logs = [math.log(factor) for factor, _ in factors]
    return Standing(
        method,
        _wins(each.dev for each in ahead),
        _wins(row.training.mean < 0 if row.training else None for row in rows),
        _wins(each.test for each in ahead),
        _wins(each.metric for each in ahead),
        math.exp(fmean(logs)) if logs else None,
        len(logs),
        any(reach.at_least for _, reach in factors),
    )


def _wins(outcomes: Iterable[bool | None]) -> Wins:
    known = [outcome for outcome in outcomes if outcome is not None]
    return Wins(sum(known), len(known))
