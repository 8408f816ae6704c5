"""What is compared: the YAML file of `zotuner compare`, checked.

model, budget, tasks, methods (each with its grid of learning rates), seeds, baseline, defaults  ->  Comparison
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from zotuner.config import FinetuneConfig, read_yaml
from zotuner.errors import ZotunerError, unknown

Unit = Literal["forwards", "tokens", "seconds"]
Options = dict[str, Any]  # of `zotuner finetune`, as YAML gives them

PLACES = {  # options of a run that are not stated as such: what states them
    "model": "model",
    "out": "--out",
    "overwrite": "--out",
    "task": "tasks",
    "method": "methods",
    "lr": "methods",
    "seed": "seeds",
    "steps": "budget",
    "max_tokens": "budget",
    "max_seconds": "budget",
}
EVALUATIONS = "evaluations"  # on dev, spread evenly over a budget of forwards: stands for eval_every
OF_A_TASK = ("task", "budget", "lr_factor")  # what an entry of a task states beside options
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")  # becomes the name of a folder


def _options(value: Any, *more: str) -> Any:
    """Options of a run, and those in `more`; refuses names that are none, and what is stated elsewhere."""
    if not isinstance(value, dict):
        raise PydanticCustomError("options", "Expected a mapping from option to value")
    known = [name for name in FinetuneConfig.model_fields if name not in PLACES] + list(more)
    for key in value:
        if key in PLACES and key not in more:
            raise ValueError(f"option {key!r} follows from {PLACES[key]}; leave it out here")
        if key not in known:
            raise ValueError(unknown("option", str(key), known))
    count = value.get(EVALUATIONS, 1)
    if type(count) is not int or count < 1:
        raise ValueError(f"{EVALUATIONS}: expected a whole number of at least 1, got {count!r}")
    return value


def _task(value: Any) -> Any:
    """`sst2` is short for `{task: sst2}`; a file has its name without the folders."""
    mapping = {"task": value} if isinstance(value, str) else _options(value, *OF_A_TASK, EVALUATIONS)
    own = {"task": None} | {key: mapping[key] for key in OF_A_TASK if key in mapping}
    source = own["task"]
    named = own | ({"task": Path(source).name} if isinstance(source, str) else {})
    return {"options": {key: item for key, item in mapping.items() if key not in own}, "source": source, **named}


def _method(value: Any) -> Any:
    mapping = {} if value is None else _options(value, "method", "lr")
    lr = mapping.get("lr", ())
    return {
        "method": mapping.get("method"),
        "lr": lr if isinstance(lr, list | tuple) else (lr,),
        "options": {key: item for key, item in mapping.items() if key not in ("method", "lr")},
    }


def _defaults(value: Any) -> Any:
    return {} if value is None else _options(value, EVALUATIONS)


def _is_name(value: str) -> str:
    if not NAME.fullmatch(value):
        raise ValueError(f"expected a name of letters, digits and . _ + -, got {value!r}")
    return value


def _differ(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"expected values that differ, got {', '.join(map(str, values))}")
    return values


Name = Annotated[str, AfterValidator(_is_name)]
LearningRate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Budget(_Frozen):
    """What each run may spend: exactly one of the three."""

    forwards: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1)
    seconds: float | None = Field(None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        stated = [f"{name}: {value:g}" for name, value in self if value is not None]
        if len(stated) != 1:
            raise ValueError(f"expected one of forwards, tokens, seconds, got {', '.join(stated) or 'none'}")
        return self

    @property
    def unit(self) -> Unit:
        """What is counted."""
        return "forwards" if self.forwards else "tokens" if self.tokens else "seconds"

    @property
    def amount(self) -> float:
        """How much of it."""
        return float(getattr(self, self.unit))

    def of(self, amount: float) -> "Budget":
        """Another amount of the same unit."""
        return self.model_copy(update={self.unit: amount if self.unit == "seconds" else int(amount)})

    def __str__(self) -> str:
        return f"{self.amount:,.10g} {self.unit}"


class TaskEntry(_Frozen):
    """A task, options for it, what its runs may spend, where that is not what others may, and a factor of their lr.

    `source` is what `--task` is told: the name, or the path of a file.
    """

    task: Name
    source: str
    options: Options
    budget: float | None = Field(None, gt=0, allow_inf_nan=False)
    lr_factor: float = Field(1.0, gt=0, allow_inf_nan=False)


class MethodEntry(_Frozen):
    """A row of the table: a method of finetune (None: the row has its name), learning rates to choose from, options."""

    method: str | None
    lr: Annotated[tuple[LearningRate, ...], AfterValidator(_differ)]
    options: Options


class Comparison(_Frozen):
    """Tasks x methods x learning rates x seeds, each run at the same budget.

    Options of a run: those of finetune  <  `defaults`  <  of the task  <  of the method.
    """

    model: str
    budget: Budget
    tasks: tuple[Annotated[TaskEntry, BeforeValidator(_task)], ...] = Field(min_length=1)
    methods: dict[Name, Annotated[MethodEntry, BeforeValidator(_method)]] = Field(min_length=1)
    seeds: Annotated[tuple[Seed, ...], AfterValidator(_differ)] = Field((0,), min_length=1)
    baseline: str = ""
    defaults: Annotated[Options, BeforeValidator(_defaults)] = {}

    @model_validator(mode="before")
    @classmethod
    def _first_method_is_the_baseline(cls, value: Any) -> Any:
        methods = value.get("methods") if isinstance(value, dict) else None
        if isinstance(methods, dict) and methods and value.get("baseline") is None:
            return {**value, "baseline": str(next(iter(methods)))}
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.baseline not in self.methods:
            raise ValueError(f"baseline: {unknown('method', self.baseline, self.methods)}")
        for entry in self.tasks:
            if entry.budget is not None and self.budget.unit != "seconds" and entry.budget != int(entry.budget):
                raise ValueError(f"tasks.{entry.task}.budget: expected whole {self.budget.unit}, got {entry.budget:g}")
        names = [entry.task for entry in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks: expected each task once, got {', '.join(names)}")
        return self

    def budget_of(self, task: str) -> Budget:
        """What each run on a task may spend."""
        own = next(entry.budget for entry in self.tasks if entry.task == task)
        return self.budget if own is None else self.budget.of(own)

    @property
    def budgets(self) -> str:
        """What a run may spend: `600 forwards`, or `200 to 600 forwards` where tasks differ."""
        found = [self.budget_of(entry.task) for entry in self.tasks]
        low, high = (choose(found, key=lambda budget: budget.amount) for choose in (min, max))
        return str(high) if low == high else f"{low.amount:,.10g} to {high}"

    @classmethod
    def read(cls, file: Path) -> Self:
        """A file's comparison.

        Raises:
            ZotunerError: No YAML, an unknown key, a value of the wrong type or out of bounds; one line with the key.
        """
        try:
            return cls.model_validate(read_yaml(file))
        except ValidationError as error:
            raise ZotunerError(f"{file}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """The first complaint, in one line: the key, what was expected, what came."""
    first = error.errors()[0]
    *above, key = [str(part) for part in first["loc"]] or [""]
    where = ".".join([*above, key])
    if first["type"] == "extra_forbidden":
        complaint = unknown("key", key, (Budget if above else Comparison).model_fields)
        return ": ".join([*above, complaint])
    if first["type"] == "missing":
        return f"{where} is required"
    text = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}: {text}" if where else text
    return f"{where}: {text[:1].lower()}{text[1:]}, got {first['input']!r}"
