"""The processes of a comparison: each run is one of its own, so that its peak memory is, too.

They are in process groups of their own, so that a Ctrl-C in the terminal reaches them once, through `Children.stop`.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

import zotuner
from zotuner.compare.plan import Planned
from zotuner.compare.state import Note, log_of, read_note, write_note
from zotuner.files import writer

LAST_WORDS = 400  # characters of a message


class Child:
    """One run's process: a new one, or one that an earlier comparison left when it was killed.

    Args:
        planned: The run.
        threads: Of the new process (OMP_NUM_THREADS); None: as this one's.
        commit: Of the source, if known.
    """

    def __init__(self, planned: Planned, threads: int | None, commit: str | None) -> None:
        self.planned, self._started = planned, time.monotonic()
        self._adopted = writer(planned.folder)
        self._before = read_note(planned)
        if self._adopted is not None:
            return
        commits = tuple(dict.fromkeys([*self._before.commits, *([commit] if commit else [])]))
        self._before = Note(self._before.wall_seconds, commits=commits)
        write_note(planned, self._before)
        command = [sys.executable, "-m", "zotuner", "finetune", *_arguments(planned)]
        environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
        with log_of(planned).open("a", encoding="utf-8") as log:
            log.write(f"$ zotuner {' '.join(command[3:])}\n")
            log.flush()
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
            )

    @property
    def adopted(self) -> bool:
        """Whether an earlier comparison began it: nobody knows how it ends but by what it leaves."""
        return self._adopted is not None

    def ended(self) -> bool:
        """Whether it has; the note of a new process is written then."""
        if self._adopted is not None:
            return writer(self.planned.folder) != self._adopted
        code = self._process.poll()
        if code is None:
            return False
        wall = self._before.wall_seconds + time.monotonic() - self._started
        message = "" if code == 0 else last_words(log_of(self.planned), code)
        write_note(self.planned, Note(round(wall, 3), code, message, self._before.commits))
        return True

    def signal(self, number: int) -> None:
        """Passes a signal on."""
        if self._adopted is None:
            self._process.send_signal(number)
            return
        with suppress(psutil.NoSuchProcess):
            psutil.Process(self._adopted).send_signal(number)


class Children:
    """The processes that run now; those that are left when the block ends are stopped, so that they can go on later."""

    def __init__(self, jobs: int) -> None:
        self._threads = None if jobs == 1 else max(1, _cores() // jobs)
        self._commit = commit()
        self.running: list[Child] = []

    def __enter__(self) -> "Children":
        return self

    def start(self, planned: Planned) -> None:
        """Begins a run, or goes on with it."""
        self.running.append(Child(planned, self._threads, self._commit))

    def ended(self) -> Iterator[Child]:
        """Those that have ended since this was last asked."""
        for child in [child for child in self.running if child.ended()]:
            self.running.remove(child)
            yield child

    def stop(self, number: int) -> None:
        """Sends a signal to each: they end after the step that they are in."""
        for child in self.running:
            child.signal(number)

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGINT)  # to one that was told before, it is a second one, which ends it at once
        while self.running:
            list(self.ended())
            time.sleep(0.05)


def commit() -> str | None:
    """The commit of a checkout that this runs from; None for an installed package."""
    root = Path(zotuner.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _arguments(planned: Planned) -> list[str]:
    """The words behind `zotuner finetune`: the options that are stated, or the run to go on with."""
    config = planned.config
    if (config.out / "config.yaml").exists():
        return [f"--resume={config.out}"]
    words = []
    for name in type(config).model_fields:
        value, flag = getattr(config, name), "--" + name.replace("_", "-")
        if name not in config.model_fields_set or value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, tuple):
            words += [flag, *map(str, value)]
        else:
            words.append(f"{flag}={value}")
    return words


def _cores() -> int:
    """That this process may use."""
    stated = os.environ.get("OMP_NUM_THREADS", "")
    if stated.isdigit():
        return int(stated)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def last_words(log: Path, code: int) -> str:
    """Why a process failed, in a line."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("zotuner: ").removeprefix("error: ")[:LAST_WORDS]
