"""Methods side by side at an equal budget: tasks x methods x learning rates x seeds, each run a process of its own.

YAML  ->  Comparison (`spec`)  ->  runs (`plan`)  ->  processes (`work`, `children`)  ->  run directories (`state`)
      ->  figures  ->  results.json, table.txt, report.html, curves.png, training.png, lr.png (`results`)
"""

from pathlib import Path
from typing import Literal

from zotuner.compare.plan import RUNS, Planned, expand
from zotuner.compare.results import PAGE, collect, tables_of, write
from zotuner.compare.spec import Comparison
from zotuner.compare.state import check_same
from zotuner.compare.tables import plan_table
from zotuner.compare.work import work
from zotuner.errors import ZotunerError
from zotuner.files import is_vacant, locked
from zotuner.progress import Display, stdout

Only = Literal["list", "report"]


def compare(
    file: Path, out: Path, *, jobs: int = 1, data_dir: Path | None = None, only: Only | None = None, display: Display
) -> bool:
    """Makes the runs that a file describes, and shows what they gave.

    Args:
        file: YAML; see `docs/compare.md`.
        out: Folder for the runs and the results; that of an earlier call is gone on with.
        jobs: Processes at once, each with its share of the cores.
        data_dir: Passed on to the runs.
        only: "list": show what is done and what remains; "report": write the results of what is done. No run is made.
        display: Where progress goes.

    Returns:
        Whether every run is done, or none was to be made.

    Raises:
        ZotunerError: The file is wrong, or `out` holds something else, such as runs with other options.
        Interrupted: A signal ended it; the same call goes on.
    """
    spec = Comparison.read(file)
    planned = expand(spec, file, out, data_dir)
    if not is_vacant(out, "comparison") and not (out / RUNS).is_dir():
        raise ZotunerError(f"{out}: expected a new folder or an earlier comparison's; choose another --out")
    for run in planned:
        check_same(run, file)
    console = stdout()
    if only == "list":
        console.print(plan_table(spec, collect(spec, planned).statuses, jobs))
        return True
    if only is None:
        with locked(out):
            (out / RUNS).mkdir(exist_ok=True)
            work(planned, spec.budget.unit, jobs, display, lambda: write(collect(spec, planned), out, jobs))
    elif not out.is_dir():
        raise ZotunerError(f"{out}: no such comparison")
    return _conclude(spec, planned, out, jobs) or only is not None


def _conclude(spec: Comparison, planned: list[Planned], out: Path, jobs: int) -> bool:
    """Writes and shows everything; returns whether every run is done."""
    results = collect(spec, planned)
    write(results, out, jobs)
    console = stdout()
    console.print(tables_of(results), highlight=False, markup=False)
    console.print(f"report: {out / PAGE}", highlight=False, soft_wrap=True)
    return all(status.state == "done" for status in results.statuses)
