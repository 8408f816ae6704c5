"""Signals that a run heeds when it next can: SIGINT and SIGTERM end it, SIGUSR1 asks for a snapshot."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from zotuner.errors import Interrupted

STOP = ("SIGINT", "SIGTERM")
SNAPSHOT = "SIGUSR1"


class Requests:
    """What signals have asked for since the block began. A second SIGINT interrupts at once, as Python does.

    Outside the main thread, where Python takes no signals, nothing is ever asked for.
    """

    def __init__(self) -> None:
        self.stop: int | None = None
        self._snapshot = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for name in STOP:
                self._heed(name, self._on_stop)
            self._heed(SNAPSHOT, self._on_snapshot)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def snapshot_wanted(self) -> bool:
        """Whether a snapshot was asked for since this was last asked."""
        wanted, self._snapshot = self._snapshot, False
        return wanted

    def check(self, state: str, resume: str) -> None:
        """Raises `Interrupted`, if the run is to end: `state` says how far it is, `resume` which command goes on."""
        if self.stop is not None:
            name = signal.Signals(self.stop).name
            raise Interrupted(f"stopped by {name} {state}; to go on: {resume}", self.stop)

    def _heed(self, name: str, handler: Callable[[int, FrameType | None], None]) -> None:
        number = getattr(signal, name, None)  # Windows has no SIGUSR1
        if number is not None:
            self._before[number] = signal.signal(number, handler)

    def _on_stop(self, number: int, _: FrameType | None) -> None:
        self.stop = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _on_snapshot(self, *_: object) -> None:
        self._snapshot = True
