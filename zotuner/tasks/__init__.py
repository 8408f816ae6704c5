"""Tasks: one small file each; `get_task(name)` finds them."""

from pathlib import Path

from zotuner.errors import ZotunerError, unknown
from zotuner.tasks.base import Kind, Splits, Task, batches, digest
from zotuner.tasks.boolq import BoolQ
from zotuner.tasks.cb import Cb
from zotuner.tasks.copa import Copa, DemoCopa
from zotuner.tasks.drop import Drop
from zotuner.tasks.gsm8k import Gsm8k
from zotuner.tasks.metamathqa import MetaMathQA
from zotuner.tasks.mnli import Mnli
from zotuner.tasks.multirc import MultiRC
from zotuner.tasks.record import Record
from zotuner.tasks.rte import Rte
from zotuner.tasks.scores import Example, Mean, Metric, Score
from zotuner.tasks.snli import Snli
from zotuner.tasks.squad import Squad
from zotuner.tasks.sst2 import DemoSentiment, Sst2
from zotuner.tasks.sst5 import Sst5
from zotuner.tasks.trec import Trec
from zotuner.tasks.wic import Wic
from zotuner.tasks.wsc import Wsc

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

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        *(Sst2, Rte, Cb, BoolQ, Wsc, Wic, MultiRC, Copa, Record, Squad, Drop),  # the order of MeZO's tables
        *(Sst5, Trec, Mnli, Snli),  # masked models alone
        *(Gsm8k, MetaMathQA, DemoCopa, DemoSentiment),
    )
}


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
