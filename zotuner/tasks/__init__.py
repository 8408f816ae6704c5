"""Tasks: one small file each; `get_task(name)` finds them, and those of a user's own."""

from pathlib import Path

from zotuner.errors import ZotunerError, unknown
from zotuner.tasks.base import Kind, Splits, Task, batches, digest
from zotuner.tasks.boolq import BoolQ
from zotuner.tasks.cb import Cb
from zotuner.tasks.copa import Copa, DemoCopa
from zotuner.tasks.drop import Drop
from zotuner.tasks.from_python import class_of
from zotuner.tasks.from_yaml import described_task
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

FILES = {".yaml": described_task, ".yml": described_task, ".py": class_of}  # how a task of a user's own is read
TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        *(Sst2, Rte, Cb, BoolQ, Wsc, Wic, MultiRC, Copa, Record, Squad, Drop),  # the order of MeZO's tables
        *(Sst5, Trec, Mnli, Snli),  # masked models alone
        *(Gsm8k, MetaMathQA, DemoCopa, DemoSentiment),
    )
}


def get_task(name: str, data_dir: str | Path | None = None) -> Task:
    """A task by its name, or by the file that describes it.

    Args:
        name: One of `TASKS`, a .yaml file, or a .py file with one subclass of `Task`.
        data_dir: Reads `data_dir/<name>/<split>.jsonl` in place of the Hub, or of the task's own files; of a task whose
            rows are in the package, where that folder exists.

    Raises:
        ZotunerError: An unknown name; suggests the nearest one. A file that describes no task.
    """
    file = Path(name)
    if file.suffix in FILES:
        return _own_task(file)(data_dir)
    if name not in TASKS:
        raise ZotunerError(f"{unknown('task', name, TASKS)}; or a file: TASK.yaml, TASK.py")
    return TASKS[name](data_dir)


def _own_task(file: Path) -> type[Task]:
    if not file.is_file():
        raise ZotunerError(f"{file}: no such task file in {Path.cwd()}")
    task = FILES[file.suffix](file)
    if task.name in TASKS:
        raise ZotunerError(f"{file}: name {task.name!r} is that of a task of the package; choose another")
    return task
