"""The three passes of a measurement: time, where it goes, and memory; and how far weights drift.

rounds of (forward, row, forward, row, ..., forward)  ->  seconds, and the forwards on both sides of each step
one step of each row under the profiler               ->  the share of each part
each row built anew, two steps                        ->  peak memory against that of a forward just before
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from zotuner.bench.machine import freed_at_once, peak_while
from zotuner.bench.rows import Row, Step
from zotuner.bench.workload import Workload
from zotuner.errors import ZotunerError

LR = 1e-12  # the weights may drift by nothing that matters while we measure
PARTS = ("noise", "update", "statistics", "pertnn")  # the engine marks them as "zotuner::noise" and so on
WHOLE = "zotuner::whole"


@dataclass
class Times:
    """Seconds of a row, one a round.

    Attributes:
        steps: Of a step.
        forwards: Of a forward alone: the mean of the one just before the step and the one just after.
    """

    steps: list[float] = field(default_factory=list)
    forwards: list[float] = field(default_factory=list)


def time_rounds(steps: dict[str, Step], forward: Step, rounds: int, advance: Callable[[], None]) -> dict[str, Times]:
    """Times each step once a round, with a forward alone between any two.

    Every other round goes backwards, so that a machine that gets slower favours nobody; one round before them, for
    warming up, does not count.
    """
    times = {name: Times() for name in steps}
    for number in range(rounds + 1):
        order = list(steps) if number % 2 else list(reversed(steps))
        before = seconds_of(forward)
        for name in order:
            took = seconds_of(steps[name])
            after = seconds_of(forward)
            if number:
                times[name].steps.append(took)
                times[name].forwards.append((before + after) / 2)
            before = after
            advance()
    return times


def seconds_of(run: Step) -> float:
    """How long a step takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def shares(step: Step) -> dict[str, float]:
    """What part of a step's time goes where; they add up to 1, and what no part marks is the forward's.

    A part within a part counts as the outer one: noise that an update draws is update.
    """
    with profile(activities=[ProfilerActivity.CPU]) as record, record_function(WHOLE):
        step()
    whole = next(event for event in record.events() or () if event.name == WHOLE)
    spent = dict.fromkeys(PARTS, 0.0)
    for part, seconds in _outermost(whole):
        spent[part] += seconds / whole.cpu_time_total
    return {"forward": 1 - sum(spent.values()), **spent}


def _outermost(event: Any) -> Iterator[tuple[str, float]]:
    """(part, time) of each marked range within an event that lies in no other marked one."""
    for child in event.cpu_children:
        part = child.name.removeprefix("zotuner::")
        if part in PARTS and part != child.name:
            yield part, child.cpu_time_total
        else:
            yield from _outermost(child)


def memory(rows: Sequence[Row], work: Workload, advance: Callable[[], None]) -> dict[str, tuple[int, int] | None]:
    """Bytes held at most (by a row, by a forward alone just before it), for each row; None where it cannot be told.

    A row is built anew for it and goes afterwards, so that no row's buffers and states count for the next.
    """
    forward = torch.no_grad()(work.loss)
    found: dict[str, tuple[int, int] | None] = {}
    with freed_at_once():
        for row in rows:
            alone, most = peak_while(forward), peak_while(partial(_two_steps, row, work))
            found[row.name] = None if alone is None or most is None else (most, alone)
            advance()
    return found


def _two_steps(row: Row, work: Workload) -> None:
    """The second finds what the first made: an optimizer's state beside new gradients."""
    step = row.make(work, LR)
    step()
    step()


@torch.no_grad()
def drift(row: Row, work: Workload, steps: int) -> dict[str, float]:
    """The change of the weights (rms, and largest) by so many steps with lr = 0; the weights are then put back."""
    params = [p for p in work.model.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in params]
    step = row.make(work, 0.0)
    for _ in range(steps):
        step()
    squares, largest = 0.0, 0.0
    for param, before in zip(params, kept, strict=True):
        change = param.double() - before.double()
        squares += float(change.square().sum())
        largest = max(largest, float(change.abs().max()))
        param.copy_(before)
    return {"rms": (squares / sum(p.numel() for p in params)) ** 0.5, "max": largest}


def check_finite(model: torch.nn.Module) -> None:
    """Raises `ZotunerError` where a weight is no number any more: what was measured was then not the work."""
    for name, param in model.named_parameters():
        if not bool(param.isfinite().all()):
            raise ZotunerError(f"{name} is not finite after measuring; choose another --dtype or leave out methods")
