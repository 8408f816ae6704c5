"""From a comparison to its runs: what each is told to do, where it lies, and which comes first."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from zotuner.compare.spec import EVALUATIONS, Comparison, Options, TaskEntry
from zotuner.config import METHODS, FinetuneConfig, forwards_per_step
from zotuner.errors import ZotunerError, unknown
from zotuner.tasks import get_task

RUNS = "runs"  # in the folder of a comparison
MOST_STEPS = 1_000_000  # where tokens or seconds end a run


@dataclass(frozen=True)
class Planned:
    """One run of a comparison.

    Attributes:
        task: Its task.
        method: The name of its row in the table.
        lr: Its learning rate; None for a method without one.
        seed: Its seed.
        config: All its options; `config.out` is its folder.
        cost: What it takes of the budget's unit; 0 for a run that only evaluates.
    """

    task: str
    method: str
    lr: float | None
    seed: int
    config: FinetuneConfig
    cost: float

    @property
    def folder(self) -> Path:
        """Its run directory."""
        return self.config.out

    def __str__(self) -> str:
        lr = "" if self.lr is None else f", lr {self.lr:g}"
        return f"{self.task}, {self.method}{lr}, seed {self.seed}"


def expand(spec: Comparison, file: Path, out: Path, data_dir: Path | None = None) -> list[Planned]:
    """All runs, in the order in which they are begun.

    Seeds are outermost, then the places in the grids, from the middle outwards, then tasks, then methods: after the
    first few runs the table has a cell for each task and method, after the first seed each grid is whole.

    Args:
        spec: What is compared.
        file: Where it was read, for messages.
        out: The comparison's folder.
        data_dir: Read in place of the Hub, where the file does not say otherwise.

    Raises:
        ZotunerError: A run's options are wrong, or its budget does not hold a step; names the file and the key.
    """
    grids = {name: _from_the_middle(entry.lr) or [None] for name, entry in spec.methods.items()}
    planner = _Planner(spec, file, out, data_dir)
    return [
        planner.run(task, name, grids[name][place], seed)
        for seed in spec.seeds
        for place in range(max(map(len, grids.values())))
        for task in spec.tasks
        for name in spec.methods
        if place < len(grids[name])
    ]


def _from_the_middle(grid: Sequence[float]) -> list[float | None]:
    """A grid from its middle outwards.

    >>> _from_the_middle([4.0, 1.0, 2.0])
    [2.0, 1.0, 4.0]
    """
    ordered, middle = sorted(grid), (len(grid) - 1) / 2
    return [ordered[place] for place in sorted(range(len(grid)), key=lambda place: (abs(place - middle), place))]


def _times(lr: float | None, factor: float) -> float | None:
    """A learning rate of the grid on a task, without the digits that a product of decimals has too many.

    >>> _times(3e-5, 0.1)
    3e-06
    """
    return lr if lr is None or factor == 1 else float(f"{lr * factor:.6g}")


class _Planner:
    """Makes the runs of one comparison; the arguments are those of `expand`."""

    def __init__(self, spec: Comparison, file: Path, out: Path, data_dir: Path | None) -> None:
        self._spec, self._file, self._out = spec, file, out
        self._data: Options = {} if data_dir is None else {"data_dir": data_dir}

    def run(self, task: TaskEntry, name: str, lr: float | None, seed: int) -> Planned:
        """One run. Without a stated lr it has its method's default."""
        method = self._spec.methods[name]
        options = self._data | self._spec.defaults | task.options | method.options
        evaluations = options.pop(EVALUATIONS, None)
        options |= {"model": self._spec.model, "task": task.source, "method": method.method or name, "seed": seed}
        options |= {"out": self._out} | ({} if lr is None else {"lr": lr})
        self._check_names(task, name, options["method"], lr)
        draft, budget = self._config(options, task, name), self._spec.budget_of(task.task)
        lr = None if draft.method == "none" else _times(draft.lr, task.lr_factor)
        options |= {"lr": lr}
        folder = self._out / RUNS / task.task / name / f"lr-{'none' if lr is None else repr(lr)}" / f"seed-{seed}"
        config = self._config(options | self._limits(draft, evaluations, name, task) | {"out": folder}, task, name)
        per_step = forwards_per_step(config)
        cost = float(config.steps * per_step) if budget.unit == "forwards" or not per_step else budget.amount
        return Planned(task.task, name, lr, seed, config, cost)

    def _check_names(self, task: TaskEntry, name: str, method: str, lr: float | None) -> None:
        if method not in METHODS:
            raise self._error(f"methods.{name}", unknown("method", method, METHODS))
        if method == "none" and lr is not None:
            raise self._error(f"methods.{name}.lr", "method none has no learning rate; leave it out")
        try:
            get_task(task.source)
        except ZotunerError as error:
            raise self._error("tasks", str(error)) from None

    def _limits(self, draft: FinetuneConfig, evaluations: int | None, name: str, task: TaskEntry) -> Options:
        """What ends a run, and the steps between its evaluations."""
        budget, per_step = self._spec.budget_of(task.task), forwards_per_step(draft)
        if per_step == 0:
            return {"steps": 0}
        states_steps = "eval_every" in draft.model_fields_set
        if states_steps and evaluations is not None:
            raise self._error(f"methods.{name}", "expected evaluations or eval_every, got both")
        if budget.unit == "forwards":
            steps = int(budget.amount) // per_step
            if steps == 0:
                where = "budget" if task.budget is None else f"tasks.{task.task}.budget"
                raise self._error(where, f"{budget} do not hold one step of {name}, which takes {per_step}")
            return {"steps": steps, **({} if evaluations is None else {"eval_every": -(-steps // evaluations)})}
        if not states_steps:
            text = f"needs eval_every, and no evaluations: how many steps {budget} hold is not known before"
            raise self._error(f"methods.{name}", text)
        if draft.lr_schedule != "constant":
            raise self._error(f"methods.{name}", f"lr_schedule {draft.lr_schedule} needs a budget of forwards")
        return {"steps": MOST_STEPS, f"max_{budget.unit}": getattr(budget, budget.unit)}

    def _config(self, options: Options, task: TaskEntry, name: str) -> FinetuneConfig:
        """The options, checked; a complaint names where the option is stated."""
        try:
            return FinetuneConfig.model_validate(options)
        except ValidationError as error:
            first = error.errors()[0]
        text = str(first["msg"]).removeprefix("Value error, ")
        if not first["loc"]:
            raise self._error(f"methods.{name}", text)
        key = str(first["loc"][0])
        places = {
            f"methods.{name}": {"lr": None, **self._spec.methods[name].options},
            f"tasks.{task.task}": task.options,
            "defaults": self._spec.defaults,
        }
        where = next((f"{place}.{key}" for place, stated in places.items() if key in stated), key)
        raise self._error(where, f"{text[:1].lower()}{text[1:]}, got {first['input']!r}")

    def _error(self, where: str, text: str) -> ZotunerError:
        return ZotunerError(f"{self._file}: {where}: {text}")
