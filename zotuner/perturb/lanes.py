"""Forwards that run at the same time, each in a thread of its own with its share of the processor's cores.

Two forwards of a small model side by side, a core each, take less time than one after the other on both cores: no core
waits for another at the end of each of a thousand operations, and W + alpha z stays in the cache of the core that made
it.
"""

import heapq
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")

LANE = 1 << 20  # elements that are worth a thread


def arrange(count: int, lanes: int, size: int) -> list[list[int]]:
    """How `count` points are evaluated: one round after the other, each the sizes of its forwards, side by side.

    All lanes of a round carry the same, so that none waits. What is left over comes first, on all cores: of a one-sided
    step that is theta itself, which takes no noise.

    Args:
        count: Points.
        lanes: Forwards at a time, at most.
        size: Points a forward, at most.
    """
    lanes = min(lanes, count)
    share = count // lanes  # of each lane
    rounds = -(-share // size)
    sizes = [share * (i + 1) // rounds - share * i // rounds for i in range(rounds)]
    left = count - share * lanes
    return ([[1] * left] if left else []) + [[each] * lanes for each in sizes]


def side_by_side(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Runs tasks at the same time, the first in the calling thread; an error of one is raised when all have ended."""
    if len(tasks) == 1:
        return [tasks[0]()]
    cores = torch.get_num_threads()
    share, inference, grad = max(1, cores // len(tasks)), torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def run(task: Callable[[], T]) -> T:
        torch.set_num_threads(share)  # of the operations that this thread starts
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):  # torch keeps both a thread
            return task()

    try:
        with ThreadPoolExecutor(len(tasks) - 1) as pool:
            others = [pool.submit(copy_context().run, run, task) for task in tasks[1:]]
            first = run(tasks[0])
            return [first, *(other.result() for other in others)]
    finally:
        torch.set_num_threads(cores)


def spread(work: Callable[[S], T], items: Sequence[S], sizes: Sequence[int], cores: int | None = None) -> list[T]:
    """What `work` gives for each item, in their order; each core takes items of its own, if there is enough to do.

    Args:
        work: Done by one thread.
        items: In any number.
        sizes: Elements of each item.
        cores: Threads at most; None: as many as torch has.
    """
    lanes = min(torch.get_num_threads() if cores is None else cores, sum(sizes) // LANE)
    shares = deal(range(len(items)), sizes, lanes)
    done = side_by_side([partial(_work, work, items, share) for share in shares])
    found = dict(pair for pairs in done for pair in pairs)
    return [found[number] for number in range(len(items))]


def _work(work: Callable[[S], T], items: Sequence[S], numbers: Sequence[int]) -> list[tuple[int, T]]:
    return [(number, work(items[number])) for number in numbers]


def deal(items: Sequence[T], sizes: Sequence[int], lanes: int) -> list[list[T]]:
    """Deals items to lanes, at most so many, that all carry about the same: the largest items first."""
    lanes = max(1, min(lanes, sum(sizes) // max(1, max(sizes, default=1))))
    shares: list[list[T]] = [[] for _ in range(lanes)]
    load = [(0, lane) for lane in range(lanes)]
    for size, item in sorted(zip(sizes, items, strict=True), key=lambda pair: -pair[0]):
        carried, lane = heapq.heappop(load)
        shares[lane].append(item)
        heapq.heappush(load, (carried + size, lane))
    return shares


def can_run_side_by_side() -> bool:
    """Whether the calling thread's surroundings reach other threads: autocast and function modes do not."""
    return not (
        torch.is_autocast_enabled("cpu") or torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()
    )
