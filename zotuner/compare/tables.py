"""The figures as text: cells that the terminal and the page share, remarks, and what remains to be done."""

from collections.abc import Sequence
from statistics import fmean

from rich.console import Group
from rich.table import Table
from rich.text import Text

from zotuner.compare.figures import Edge, Reach, Row, Standing
from zotuner.compare.spec import Comparison
from zotuner.compare.spread import Spread
from zotuner.compare.state import Status
from zotuner.config import FIRST_ORDER
from zotuner.report import new_table

EDGES: dict[Edge, str] = {"": "", "lowest": " (edge)", "highest": " (edge)", "only": " (only)"}


def headings(spec: Comparison, rows: Sequence[Row]) -> list[str]:
    """Of a task's table; its metrics are those of any row that has them."""
    metrics = next((list(row.metrics) for row in rows if row.metrics), [])
    base = spec.baseline
    losses = ["dev loss", "test loss", f"- {base}'s", f"training - {base}'s"]
    return ["method", "lr", "seeds", *losses, *metrics, f"to {base}'s", "its end", "GiB", "sec"]


def cells(spec: Comparison, row: Row, columns: int) -> list[str]:
    """One row of a task's table, under `headings`."""
    if row.dev is None and row.test is None:
        return [row.method, *[""] * (columns - 1)]
    gib = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}"
    return [
        row.method,
        "" if row.lr is None else f"{row.lr:g}{EDGES[row.edge]}",
        f"{len(row.seeds)}/{len(spec.seeds)}",
        spread_text(row.dev, 4),
        spread_text(row.test, 4),
        spread_text(row.gap, 4),
        spread_text(row.training, 4),
        *(spread_text(value, 3) for value in row.metrics.values()),
        reach_text(row.reach),
        reach_text(row.reach_end),
        gib,
        "" if row.seconds is None else f"{row.seconds:.0f}",
    ]


def spread_text(value: Spread | None, digits: int) -> str:
    """`mean ± std (standard error over examples)`, as far as there is any."""
    if value is None:
        return ""
    std = "" if value.std is None else f" ± {value.std:.{digits}f}"
    error = "" if value.error is None else f" ({value.error:.{digits}f})"
    return f"{value.mean:.{digits}f}{std}{error}"


def reach_text(reach: Reach | None) -> str:
    """Share of the budget, `>1` for never."""
    if reach is None:
        return ""
    return f">{reach.share:.3g}" if reach.at_least else f"{reach.share:.2f}"


def speedup_text(standing: Standing) -> str:
    """Geometric mean over the tasks; `<` where some run never reached the baseline's loss."""
    return "" if standing.speedup is None else f"{'<' if standing.at_most else ''}{standing.speedup:.2f}x"


STANDING_HEADINGS = [
    "method",
    *(f"wins, {of}" for of in ("dev loss", "training", "test loss", "metric")),
    "speed-up",
    "of tasks",
    "to its end",
    "of tasks",
]


def standing_cells(standing: Standing) -> list[str]:
    """One row of the summary, under `STANDING_HEADINGS`."""
    counts = (standing.dev, standing.training, standing.test, standing.metric)
    wins = [f"{count.won}/{count.of}" if count.of else "" for count in counts]
    end = "" if standing.end is None else f"{'>' if standing.end_at_least else ''}{standing.end:.2f}"
    of = [str(count or "") for count in (standing.speedup_tasks, standing.end_tasks)]
    return [standing.method, *wins, speedup_text(standing), of[0], end, of[1]]


def result_tables(
    spec: Comparison, rows: Sequence[Row], standings: Sequence[Standing], remarks: Sequence[str]
) -> Group:
    """All tables, with what is to be kept in mind below them."""
    parts: list[Table | Text] = []
    for task in spec.tasks:
        mine = [row for row in rows if row.task == task.task]
        names = headings(spec, mine)
        table = new_table(f"{task.task}: {spec.budget_of(task.task)} a run", *names)
        for row in mine:
            table.add_row(*cells(spec, row, len(names)))
        parts.append(table)
    if standings:
        table = new_table(f"against {spec.baseline}", *STANDING_HEADINGS)
        for standing in standings:
            table.add_row(*standing_cells(standing))
        parts.append(table)
    return Group(*parts, *map(Text, remarks))


def remarks_on(spec: Comparison, rows: Sequence[Row], statuses: Sequence[Status]) -> list[str]:
    """What a reader of the table must know, warnings first."""
    found = [
        f"warning: {row.task}: the lr of {row.method}, {row.lr:g}, is the {row.edge} of its grid, which is too narrow"
        for row in rows
        if row.edge in ("lowest", "highest")
    ]
    found += [
        f"warning: {row.task}: {row.method} has one lr, {row.lr:g}: nothing was chosen"
        for row in rows
        if row.edge == "only"
    ]
    found += [f"failed: {s.planned}: {s.note.message}" for s in statuses if s.state == "failed"]
    remaining = sum(status.state != "done" for status in statuses)
    if remaining:
        found.append(f"{remaining} of {len(statuses)} runs are not done: figures may change, and so may the chosen lr")
    found += [f"{row.task}: {row.method} {row.incomparable}: not compared" for row in rows if row.incomparable]
    methods = {status.planned.config.method for status in statuses}
    found += [
        f"a step of {method} counts as one forward; its backward, about two more, is not counted"
        for method in FIRST_ORDER
        if method in methods
    ]
    return found


def plan_table(spec: Comparison, statuses: Sequence[Status], jobs: int) -> Table:
    """What is done and what remains, a row for each task and method, with the time that it will take."""
    table = new_table(
        f"{len(statuses)} runs of {spec.budgets}",
        *("task, method", "lrs", "runs", "done", "running", "failed", f"{spec.budget.unit} left", "time left"),
    )
    groups = [
        (f"{task.task}, {method}", [s for s in statuses if (s.planned.task, s.planned.method) == (task.task, method)])
        for task in spec.tasks
        for method in spec.methods
    ]
    for name, group in [*groups, ("all", list(statuses))]:
        lrs = len({status.planned.lr for status in group}) if name != "all" else ""
        count = [sum(s.state == state for s in group) for state in ("done", "running", "failed")]
        left = sum((1 - s.share) * s.planned.cost for s in group)
        seconds = seconds_left(group, statuses)
        time = "?" if seconds is None else duration(seconds / jobs)
        table.add_row(name, str(lrs), str(len(group)), *map(str, count), f"{left:.0f}", time)
    return table


def seconds_left(group: Sequence[Status], statuses: Sequence[Status]) -> float | None:
    """Wall-clock time of what is not done in a group, one run after another; None before anything is done.

    A run takes as long as those did that are done and share its task and method, else its method, else any.
    """
    total = 0.0
    for status in group:
        if status.state == "done":
            continue
        same = [_times(statuses, task=True, method=True, like=status), _times(statuses, method=True, like=status)]
        times = next((found for found in [*same, _times(statuses, like=status)] if found), None)
        if times is None:
            return None
        total += (1 - status.share) * fmean(times)
    return total


def _times(statuses: Sequence[Status], *, like: Status, task: bool = False, method: bool = False) -> list[float]:
    return [
        s.note.wall_seconds
        for s in statuses
        if s.state == "done"
        and s.note.wall_seconds  # unknown, if the comparison that began it was killed
        and (not task or s.planned.task == like.planned.task)
        and (not method or s.planned.method == like.planned.method)
    ]


def duration(seconds: float) -> str:
    """A time in hours and minutes, or in seconds.

    >>> duration(7384), duration(12.3)
    ('2 h 03 min', '12 s')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
