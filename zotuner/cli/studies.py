"""Commands over many runs, and what they are made of: compare, bench, tasks."""

import argparse
import os
from pathlib import Path
from typing import get_args

from zotuner.cli.parser import EXIT_SOME_FAILED, Add, add_data_dir, count, quiet, stated
from zotuner.config import DTYPE


def add_commands(add: Add) -> None:
    """compare, bench, tasks."""
    _add_compare_options(add("compare", _compare, "compare methods over tasks, learning rates and seeds, and report"))
    _add_bench_options(add("bench", _bench, "measure what a step of each method costs"))
    tasks = add("tasks", _tasks, "list the tasks, or show one")
    tasks.add_argument("task", nargs="?", metavar="TASK", help="name, or file of a task of your own")
    tasks.add_argument("--show", type=count, default=3, metavar="N", help="examples of it to show (%(default)s)")
    add_data_dir(tasks)
    tasks.add_argument("--model", metavar="MODEL", help="count the tokens of the examples as this model reads them")


def _add_compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="YAML: tasks, methods, seeds, budget (docs/compare.md)")
    out = "folder for runs and results; an earlier one is gone on with (required)"
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help=out)
    parser.add_argument("--jobs", type=count, default=1, metavar="N", help="runs at once, sharing cores (%(default)s)")
    add_data_dir(parser)
    only = parser.add_mutually_exclusive_group()
    text = "show the runs, what is done and what remains; make none"
    only.add_argument("--list", "--dry-run", dest="only", action="store_const", const="list", help=text)
    text = "write the results of what is done; make no run"
    only.add_argument("--report-only", dest="only", action="store_const", const="report", help=text)


def _compare(arguments: argparse.Namespace) -> int:
    from zotuner.compare import compare
    from zotuner.progress import Display

    return 0 if compare(display=Display(), **stated(arguments)) else EXIT_SOME_FAILED


def _add_bench_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2-135m-instruct", help="also random:0.5b, random:1.1b (%(default)s)")
    parser.add_argument("--batch-size", type=count, default=16, help="sequences (%(default)s)")
    parser.add_argument("--length", type=count, default=40, help="tokens a sequence (%(default)s)")
    parser.add_argument("--logits", choices=["all", "last"], default="all", help="positions of the loss (%(default)s)")
    parser.add_argument("--dtype", choices=get_args(DTYPE), default="float32", help="of the weights (%(default)s)")
    parser.add_argument("--rounds", type=count, default=7, help="measurements of each (%(default)s)")
    parser.add_argument(
        "--methods", nargs="+", action="extend", metavar="NAME", help="rows, such as 'mezo gaussian' (all)"
    )
    drift = "measure instead how far so many steps with lr = 0 move the weights"
    parser.add_argument("--drift", type=count, dest="drift_steps", metavar="STEPS", help=drift)
    pertnn = "measure instead one evaluation of N PertNNs; OPT-30B has 772 blocks"
    parser.add_argument("--pertnn", type=count, dest="pertnn_blocks", metavar="N", help=pertnn)
    parser.add_argument(
        "--task", help="measure instead a MeZO step on real examples, such as sst2, and what saves time"
    )
    add_data_dir(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--plot", type=Path, dest="plot_to", metavar="FILE", help="write them as PNG")


def _bench(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would say on each use that it starts and stops
    quiet()
    from zotuner.bench import bench
    from zotuner.progress import Display

    bench(display=Display(), **stated(arguments))


def _tasks(arguments: argparse.Namespace) -> None:
    if arguments.task is not None:
        return _preview(arguments)
    from rich.table import Table

    from zotuner.progress import stdout
    from zotuner.tasks import TASKS

    table = Table("task", "models", "loss", "metrics", "from", "what it is")
    for name, task in TASKS.items():
        what = (task.__doc__ or "").split("\n")[0].partition(" (")[0]  # without the source
        where = " ".join(task.hub) if task.hub else "the package"
        table.add_row(name, " ".join(task.kinds()), task.loss, " ".join(task.metrics), where, what)
    stdout().print(table)


def _preview(arguments: argparse.Namespace) -> None:
    quiet()
    from zotuner.preview import preview

    for line in preview(arguments.task, arguments.show, data_dir=arguments.data_dir, model=arguments.model):
        print(line)
