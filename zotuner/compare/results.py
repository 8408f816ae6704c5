"""All that a comparison has found so far, as a machine reads it, as text, and as a page."""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.console import Console, Group

from zotuner.compare.charts import COLORS, PANELS, overview, task_chart
from zotuner.compare.figures import Row, Standing, rows_of, standings_of
from zotuner.compare.plan import Planned
from zotuner.compare.spec import Comparison, TaskEntry
from zotuner.compare.state import Status, read_status
from zotuner.compare.tables import (
    STANDING_HEADINGS,
    cells,
    duration,
    headings,
    remarks_on,
    result_tables,
    seconds_left,
    standing_cells,
)
from zotuner.files import write_atomically
from zotuner.metrics import write_json
from zotuner.progress import PIPE_WIDTH

RESULTS, TABLE, PAGE = "results.json", "table.txt", "report.html"


@dataclass(frozen=True)
class Results:
    """What the runs say."""

    spec: Comparison
    statuses: list[Status]
    rows: list[Row]
    standings: list[Standing]
    remarks: list[str]


def collect(spec: Comparison, planned: Sequence[Planned]) -> Results:
    """Reads all runs.

    Raises:
        ZotunerError: A damaged file; names it.
    """
    statuses = [read_status(run, spec.budget.unit) for run in planned]
    rows = rows_of(spec, statuses)
    return Results(spec, statuses, rows, standings_of(spec, rows), remarks_on(spec, rows, statuses))


def write(results: Results, out: Path, jobs: int) -> None:
    """Writes tables, page and pictures into a comparison's folder, each file whole or not at all."""
    write_json(out / RESULTS, _document(results))
    buffer = io.StringIO()
    Console(file=buffer, width=PIPE_WIDTH).print(tables_of(results), highlight=False, markup=False)
    write_atomically(out / TABLE, "".join(line.rstrip() + "\n" for line in buffer.getvalue().splitlines()))
    write_atomically(out / PAGE, page(results, jobs))
    tasks = {task.task: _rows_of(results, task) for task in results.spec.tasks}
    for name in PANELS:
        picture = overview(tasks, _colors(results.spec), results.spec.budget.unit, name)
        if picture is not None:
            write_atomically(out / f"{name}.png", picture)


def tables_of(results: Results) -> Group:
    """All tables, for a console."""
    return result_tables(results.spec, results.rows, results.standings, results.remarks)


def page(results: Results, jobs: int) -> str:
    """One HTML file that needs no other."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    spec = results.spec
    environment = Environment(
        loader=PackageLoader("zotuner.compare", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    colors, tasks = _colors(spec), []
    for task in spec.tasks:
        rows = _rows_of(results, task)
        names = headings(spec, rows)
        tasks.append(
            {
                "name": task.task,
                "headings": names,
                "rows": [(row.edge, cells(spec, row, len(names))) for row in rows],
                "chart": task_chart(rows, colors, spec.budget.unit),
            }
        )
    seconds = seconds_left(results.statuses, results.statuses)
    return environment.get_template("report.html.j2").render(
        spec=spec,
        options=_options(spec),
        tasks=tasks,
        colors=colors,
        standing_headings=STANDING_HEADINGS,
        standings=[standing_cells(standing) for standing in results.standings],
        remarks=results.remarks,
        counts=_counts(results.statuses),
        runs=len(results.statuses),
        time_left=None if seconds is None else duration(seconds / jobs),
        versions=_versions(results.statuses),
        statuses=results.statuses,
    )


def _rows_of(results: Results, task: TaskEntry) -> list[Row]:
    return [row for row in results.rows if row.task == task.task]


def _colors(spec: Comparison) -> dict[str, str]:
    """One of its own for each of up to 29 methods."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    further = [to_hex(colormaps["tab20b"](place)) for place in range(20)]
    return dict(zip(spec.methods, cycle([*COLORS, *further]), strict=False))


def _document(results: Results) -> dict[str, Any]:
    return {
        "comparison": results.spec.model_dump(mode="json"),
        "progress": _counts(results.statuses),
        "versions": _versions(results.statuses),
        "runs": [_run(status) for status in results.statuses],
        "rows": [asdict(row) for row in results.rows],
        "standings": [asdict(standing) for standing in results.standings],
        "remarks": results.remarks,
    }


def _run(status: Status) -> dict[str, Any]:
    planned = status.planned
    own = {"task": planned.task, "method": planned.method, "lr": planned.lr, "seed": planned.seed}
    kept = ("steps", "forwards", "tokens", "seconds", "peak_rss_bytes", "zero_shot", "final", "dev", "weights_sha256")
    return {
        **own,
        "state": status.state,
        "share": status.share,
        **asdict(status.note),
        **{name: status.summary.get(name) for name in kept},
        "curve": [asdict(point) for point in status.curve],
    }


def _counts(statuses: Sequence[Status]) -> dict[str, int]:
    states = ("done", "running", "failed", "stopped", "to do")
    return {state: sum(status.state == state for status in statuses) for state in states}


def _versions(statuses: Sequence[Status]) -> dict[str, str]:
    """Of the software that made the runs; several, if they differ."""
    found: dict[str, dict[str, None]] = {}
    for status in statuses:
        for name, value in status.summary.get("versions", {}).items():
            found.setdefault(name, {})[str(value)] = None
        for value in status.note.commits:
            found.setdefault("commit", {})[value] = None
    return {name: ", ".join(values) for name, values in found.items()}


def _options(spec: Comparison) -> list[tuple[str, str]]:
    """What the file states, a line a place."""
    lines = [("model", spec.model), ("budget of a run", spec.budgets), ("seeds", ", ".join(map(str, spec.seeds)))]
    lines += [("baseline", spec.baseline), ("all runs", _stated(spec.defaults))]
    lines += [
        (f"task {task.task}", _stated(task.options | _own(task))) for task in spec.tasks if task.options or _own(task)
    ]
    for name, method in spec.methods.items():
        own = {} if method.method is None else {"method": method.method}
        grid = {"lr": " ".join(f"{lr:g}" for lr in sorted(method.lr))} if method.lr else {}
        lines.append((f"method {name}", _stated(own | grid | method.options)))
    return lines


def _own(task: TaskEntry) -> dict[str, Any]:
    budget = {} if task.budget is None else {"budget": f"{task.budget:g}"}
    return budget | ({} if task.lr_factor == 1 else {"lr_factor": f"{task.lr_factor:g}"})


def _stated(options: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items()) or "defaults"
