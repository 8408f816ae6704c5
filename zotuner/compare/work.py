"""Makes the runs of a comparison, one after another or several at once, until all are done or a signal comes."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from zotuner.compare.children import Children
from zotuner.compare.plan import Planned
from zotuner.compare.spec import Unit
from zotuner.compare.state import Status, log_of, read_status
from zotuner.progress import Display
from zotuner.report import number
from zotuner.signals import Requests

POLL = 0.2  # seconds between two looks at what runs


def work(planned: Sequence[Planned], unit: Unit, jobs: int, display: Display, refresh: Callable[[], None]) -> None:
    """Begins or goes on with every run that is not done, in their order.

    Args:
        planned: All runs.
        unit: Of the budget.
        jobs: Processes at once.
        display: Where progress goes.
        refresh: Called when a run has ended.

    Raises:
        Interrupted: SIGINT or SIGTERM came; it was passed on, and the runs that were going on can be resumed.
    """
    queue = deque(run for run in planned if read_status(run, unit).state != "done")
    told = changed = False
    with display, Requests() as requests, Children(jobs) as children, Bar(display, planned, unit) as bar:
        while queue or children.running:
            if requests.stop is not None and not told:
                children.stop(requests.stop)
                queue.clear()
                told = True
            while queue and len(children.running) < jobs:
                children.start(queue.popleft())
            if changed:  # the next run has begun: it need not wait for this
                refresh()
            changed = False
            for child in children.ended():
                status = read_status(child.planned, unit)
                if child.adopted and status.state != "done" and not told:
                    queue.appendleft(child.planned)
                    continue
                display.say(bar.ended(status))
                changed = True
            bar.update([child.planned for child in children.running])
            time.sleep(POLL)
        if told:
            refresh()
        requests.check(f"after {bar.done} of {len(planned)} runs", "the same command again")


class Bar:
    """How much of the whole budget is spent, on a terminal; elsewhere the line of each run must do."""

    def __init__(self, display: Display, planned: Sequence[Planned], unit: Unit) -> None:
        self._live, self._unit, self._runs = display.live, unit, len(planned)
        statuses = [read_status(run, unit) for run in planned]
        self._spent = {status.planned.folder: status.share * status.planned.cost for status in statuses}
        self.done = sum(status.state == "done" for status in statuses)
        total = sum(run.cost for run in planned)
        if self._live is not None:
            self._task = self._live.add_task(unit, total=round(total), completed=round(self._sum()), status="")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._live is not None:
            self._live.remove_task(self._task)

    def ended(self, status: Status) -> str:
        """Counts a run that has ended; returns its line."""
        self._note(status)
        if status.state != "done":
            return f"{status.planned}: {status.note.message or status.state}; see {log_of(status.planned)}"
        self.done += 1
        figures = ", ".join(f"{name} {number(value, '.4f')}" for name, value in status.summary["final"].items())
        dev = "" if status.best is None else f"dev loss {status.best:.4f}, "
        return f"[{self.done}/{self._runs}] {status.planned}: {dev}test {figures}; {status.note.wall_seconds:.0f} s"

    def update(self, running: Sequence[Planned]) -> None:
        """Looks how far the runs are."""
        if self._live is None:
            return
        for run in running:
            self._note(read_status(run, self._unit))
        now = ", ".join(f"{run.task} {run.method}" for run in running)
        self._live.update(self._task, completed=round(self._sum()), status=f"{self.done}/{self._runs} runs: {now}")

    def _note(self, status: Status) -> None:
        self._spent[status.planned.folder] = status.share * status.planned.cost

    def _sum(self) -> float:
        return sum(self._spent.values())
