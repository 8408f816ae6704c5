"""Progress of long work: live bars on a terminal, plain lines elsewhere."""

import os
import resource
import sys
import time
from typing import Self

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PIPE_WIDTH = 160
PLAIN_EVERY = 10.0  # seconds between lines where output is no terminal


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def stdout() -> Console:
    """Where results go; a pipe has no width of its own, and a table must not be cut in it."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=PIPE_WIDTH)


class Bar:
    """One piece of work of known length."""

    def __init__(self, display: "Display", title: str, total: int, done: int) -> None:
        self._display = display
        self._title, self._total = title, total
        self._done = self._before = done
        self._started = self._printed = time.monotonic()
        self._task = display.live.add_task(title, total=total, completed=done, status="") if display.live else None

    def advance(self, count: int = 1, status: str = "") -> None:
        """Notes that `count` more units are done."""
        self._done += count
        rate = (self._done - self._before) / max(1e-9, time.monotonic() - self._started)
        memory = psutil.Process().memory_info().rss / 2**30
        text = f"{status}  {rate:.2f}/s  {memory:.2f} GiB".strip()
        if self._display.live and self._task is not None:
            self._display.live.update(self._task, advance=count, status=text)
            return
        now = time.monotonic()
        if now - self._printed >= PLAIN_EVERY:
            self._printed = now
            left = (self._total - self._done) / rate
            self._display.say(f"{self._title} {self._done}/{self._total}  {text}  {left:.0f} s left")

    def close(self) -> None:
        """Takes the bar off the display."""
        if self._display.live and self._task is not None:
            self._display.live.remove_task(self._task)


class Display:
    """Where a program says what it does: on standard error, so that results can be piped.

    Args:
        console: rich's; by default one on standard error.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.live: Progress | None = None
        if self.console.is_terminal:
            self.live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self.console,
            )

    def say(self, text: str) -> None:
        """Prints one line above the bars."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def bar(self, title: str, total: int, done: int = 0) -> Bar:
        """Starts a bar; `done` units were done before."""
        return Bar(self, title, total, done)

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()
