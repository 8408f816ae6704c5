"""The machine: what it is, and how much of its memory this process holds at most."""

import ctypes
import gc
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from zotuner.tuner import versions

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RESET_PEAK = "5"  # what clear_refs takes for it, proc_pid_clear_refs(5)
M_MMAP_THRESHOLD = -3  # of mallopt(3): tensors from so many bytes on have pages of their own


def describe() -> dict[str, Any]:
    """What the figures depend on beside the model."""
    libraries = {name: version(name) for name in ("transformers", "numba", "numpy")}
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "platform": platform.platform(),
        "versions": versions() | libraries,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_while(run: Callable[[], object]) -> int | None:
    """Bytes that this process holds at most while `run` runs, its libraries and the model included.

    Linux alone can begin a peak anew; elsewhere nothing is run, and nothing returned.
    """
    gc.collect()
    _glibc("malloc_trim", 0)
    try:
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")
    except OSError:
        return None
    run()
    return _peak()


def _peak() -> int:
    """VmHWM, the high-water mark of the resident set."""
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no VmHWM")


@contextmanager
def freed_at_once() -> Iterator[None]:
    """While it lasts, large tensors that are freed go back to the system at once.

    Otherwise glibc keeps them for later, the more so the more a process has allocated before: a peak would then depend
    on what was measured first. It costs time, so nothing is timed under it.
    """
    _glibc("mallopt", M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        _glibc("mallopt", M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc goes to by itself


def _glibc(name: str, *arguments: int) -> None:
    """Calls a function that only glibc has; elsewhere nothing happens."""
    try:
        getattr(ctypes.CDLL(None), name)(*arguments)
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no CDLL(None)
        return
