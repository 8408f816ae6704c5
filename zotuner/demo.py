"""The demo: a small language model tuned on an embedded task by MeZO, FZOO and the shipped tuner, at equal forwards.

Each run is a process of its own, so that its peak memory is its own.
"""

import math
import subprocess
import sys
from pathlib import Path

from zotuner.config import FinetuneConfig, forwards_per_step
from zotuner.errors import ZotunerError
from zotuner.files import is_run, is_vacant
from zotuner.progress import stdout
from zotuner.report import plot, table
from zotuner.tuner import Tuner

MODEL, TASK = "smollm2-135m-instruct", "demo-sentiment"
PICTURE = "loss.png"
NUM_PERTURBATIONS = 8  # of FZOO
# Each method's best of the grid on SST-2 (docs/results.md)
RUNS = {"mezo": 4e-5, "fzoo": 4e-3, "zo-finetuner": 4e-5}


LEAST = math.lcm(2, NUM_PERTURBATIONS + 1)  # forwards that make whole steps of every method


def _is_ours(path: Path) -> bool:
    """Whether something is what a demo made: its picture, or a folder with a run."""
    return path.name == PICTURE if path.is_file() else is_run(path) and _is_demo_run(path)


def _is_demo_run(folder: Path) -> bool:
    config = FinetuneConfig.read(folder / "config.yaml", {})
    return (config.model, config.task, config.method) == (MODEL, TASK, folder.name) and folder.name in RUNS


def demo(out: Path, tuner: str, forwards: int) -> None:
    """Runs the three methods, prints one table and writes `out/loss.png`.

    Args:
        out: Folder for the runs; those of an earlier demo are replaced.
        tuner: Name, folder or Hub id of the tuner for the demo model.
        forwards: Forward passes a method, at most: as many as all can spend in full.

    Raises:
        ZotunerError: A run failed, the tuner is missing, the folder holds something else, or too few forwards.
    """
    tasks = Tuner.from_pretrained(tuner).info.tasks
    if not is_vacant(out, "runs") and not all(_is_ours(path) for path in out.iterdir()):
        raise ZotunerError(f"{out}: expected a new folder or an earlier demo's; choose another --out")
    if forwards < LEAST:
        raise ZotunerError(f"--forwards: expected at least {LEAST}, which make whole steps of each, got {forwards}")
    forwards -= forwards % LEAST
    out.mkdir(parents=True, exist_ok=True)
    runs = []
    for method, lr in RUNS.items():
        runs.append(out / method)
        options: dict[str, object] = {"model": MODEL, "task": TASK, "method": method, "lr": lr, "out": out / method}
        options |= {"noise": "rademacher"} | ({"num_perturbations": NUM_PERTURBATIONS} if method == "fzoo" else {})
        options |= {"tuner": tuner} if method == "zo-finetuner" else {}
        options["steps"] = forwards // forwards_per_step(FinetuneConfig.read(None, options))
        command = [sys.executable, "-m", "zotuner", "finetune", "--overwrite"]
        for name, value in options.items():
            command += ["--" + name.replace("_", "-"), str(value)]
        code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
        if code:
            raise ZotunerError(f"the run of {method} ended with exit code {code}; its message is above")
    plot(runs, out / PICTURE)
    console = stdout()
    console.print(table(runs, title=f"{MODEL} on {TASK}, {forwards} forward passes each"))
    if TASK in tasks:
        console.print(f"the tuner was meta-trained on {', '.join(tasks)}", highlight=False)
    console.print(f"loss curves: {out / PICTURE}", highlight=False)
