"""The rows of the bench: what can be measured, one line each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import zotuner
from zotuner.bench.workload import Workload
from zotuner.errors import ZotunerError, unknown
from zotuner.optim import FZOO, MeZO, ZOFineTuner, ZOOptimizer

N = 8  # perturbations of an FZOO step
OFFICIAL = Path(zotuner.__file__).parents[1] / "benchmarks" / "official.py"

Step = Callable[[], object]
Make = Callable[[Workload, float], Step]  # (workload, lr) -> what one step runs


@dataclass(frozen=True)
class Row:
    """One thing that is measured.

    Attributes:
        name: As `--methods` and the tables have it.
        forwards: Losses that a step takes; AdamW's one forward has a backward, too.
        make: Builds the step.
        official: The row of the same method in the manner of its authors' code.
        base: The row of the step that it is a variant of: without the tuner, in float32.
    """

    name: str
    forwards: int
    make: Make
    official: str | None = None
    base: str | None = None

    @property
    def walks(self) -> bool:
        """Whether it is a zeroth-order step, which perturbs weights."""
        return self.forwards > 1


def _forward(work: Workload, _: float) -> Step:
    return torch.no_grad()(work.loss)


def _ours(kind: Callable[..., ZOOptimizer], **options: Any) -> Make:
    return lambda work, lr: partial(kind(work.model, lr=lr, **options).step, work.loss)


def _tuned(noise: str) -> Make:
    return lambda work, lr: partial(ZOFineTuner(work.model, work.tuner, lr=lr, noise=noise).step, work.loss)


def _official(name: str) -> Make:
    return lambda work, lr: partial(getattr(official_code(), name)(work.model, lr=lr).step, work.loss)


def _adamw(work: Workload, lr: float) -> Step:
    # eps: torch's own 1e-8 is 0 in float16, and 0 / 0 no number
    optimizer = torch.optim.AdamW(work.model.parameters(), lr=lr, eps=1e-6)

    def step() -> None:
        work.loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


SINGLE = {"branch_batch": 1, "branch_threads": 1}  # one forward after the other
THREADS = {"branch_batch": 1, "branch_threads": 2}  # two at a time, whatever memory that takes
HALF = {"compute_dtype": torch.bfloat16}
EIGHT = partial(FZOO, num_perturbations=N)

# What is compared with one another stands together, for the machine changes its speed as time goes by; AdamW comes
# last, for it takes the most memory.
ROWS: tuple[Row, ...] = (
    Row("forward", 1, _forward),
    Row("mezo rademacher", 2, _ours(MeZO, noise="rademacher"), "official mezo"),
    Row("mezo rademacher single", 2, _ours(MeZO, noise="rademacher", **SINGLE), "official mezo", "mezo rademacher"),
    Row("mezo rademacher threads", 2, _ours(MeZO, noise="rademacher", **THREADS), "official mezo", "mezo rademacher"),
    Row("zo-finetuner rademacher", 2, _tuned("rademacher"), "official mezo", "mezo rademacher"),
    Row("mezo rademacher bf16", 2, _ours(MeZO, noise="rademacher", **HALF), "official mezo", "mezo rademacher"),
    Row("mezo gaussian", 2, _ours(MeZO, noise="gaussian"), "official mezo"),
    Row("zo-finetuner gaussian", 2, _tuned("gaussian"), "official mezo", "mezo gaussian"),
    Row("mezo low-rank", 2, _ours(MeZO, noise="low-rank"), "official mezo"),
    Row("mezo rademacher in-place", 2, _ours(MeZO, noise="rademacher", engine="in-place"), "official mezo"),
    Row("mezo gaussian in-place", 2, _ours(MeZO, noise="gaussian", engine="in-place"), "official mezo"),
    Row("mezo low-rank in-place", 2, _ours(MeZO, noise="low-rank", engine="in-place"), "official mezo"),
    Row("official mezo", 2, _official("OfficialMeZO")),
    Row("fzoo rademacher", N + 1, _ours(EIGHT, noise="rademacher"), "official fzoo"),
    Row("fzoo rademacher single", N + 1, _ours(EIGHT, **SINGLE), "official fzoo", "fzoo rademacher"),
    Row("fzoo rademacher threads", N + 1, _ours(EIGHT, **THREADS), "official fzoo", "fzoo rademacher"),
    Row("fzoo rademacher bf16", N + 1, _ours(EIGHT, **HALF), "official fzoo", "fzoo rademacher"),
    Row("fzoo low-rank", N + 1, _ours(EIGHT, noise="low-rank"), "official fzoo"),
    Row("fzoo rademacher in-place", N + 1, _ours(EIGHT, noise="rademacher", engine="in-place"), "official fzoo"),
    Row("fzoo low-rank in-place", N + 1, _ours(EIGHT, noise="low-rank", engine="in-place"), "official fzoo"),
    Row("official fzoo", N + 1, _official("OfficialFZOO")),
    Row("adamw", 1, _adamw),
)


@cache
def official_code() -> ModuleType | None:
    """The re-implementations beside the package, or None where the package was installed without them."""
    if not OFFICIAL.exists():
        return None
    loader = SourceFileLoader("zotuner_benchmarks_official", str(OFFICIAL))
    module = ModuleType(loader.name)
    loader.exec_module(module)
    return module


def choose(names: Sequence[str] | None, say: Callable[[str], None]) -> list[Row]:
    """The rows of these names, in the order of `ROWS`; None: all. The forward, to which all is related, is always in.

    Args:
        names: As the user gave them.
        say: Where a line goes that tells of rows left out.

    Raises:
        ZotunerError: A name that no row has.
    """
    known = [row.name for row in ROWS]
    for name in names or ():
        if name not in known:
            raise ZotunerError(unknown("method", name, known))
    rows = [row for row in ROWS if names is None or row.name in names or row.name == "forward"]
    if official_code() is not None:
        return rows
    left_out = [row.name for row in rows if row.name.startswith("official")]
    if left_out:
        say(f"left out: {', '.join(left_out)}: {OFFICIAL} is not there (it comes with the repository, not the package)")
    return [row for row in rows if row.name not in left_out]
