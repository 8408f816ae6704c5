"""Tasks: one small file each; `get_task(name)` finds them."""

from pathlib import Path

from zotuner.errors import ZotunerError, unknown
from zotuner.tasks.base import Kind, Splits, Task, batches, digest
from zotuner.tasks.copa import Copa, DemoCopa
from zotuner.tasks.scores import Example, Mean, Metric, Score
from zotuner.tasks.sst2 import DemoSentiment, Sst2

__all__ = [
    "TASKS",
    "Example",
    "Kind",
    "Mean",
    "Metric",
    "Score",
    "Splits",
    "Task",
    "batches",
    "digest",
    "get_task",
]

TASKS: dict[str, type[Task]] = {task.name: task for task in (Copa, Sst2, DemoCopa, DemoSentiment)}


def get_task(name: str, data_dir: str | Path | None = None) -> Task:
    """A task by its name.

    Args:
        name: One of `TASKS`.
        data_dir: Reads `data_dir/<name>/<split>.jsonl` in place of the Hub.

    Raises:
        ZotunerError: An unknown name; suggests the nearest one.
    """
    if name not in TASKS:
        raise ZotunerError(unknown("task", name, TASKS))
    return TASKS[name](data_dir)
