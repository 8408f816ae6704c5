"""A task, or a score, of a Python file that is not part of the package."""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import isclass
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, get_args

from zotuner.errors import ZotunerError, unknown
from zotuner.tasks.base import Loss, Row, Task, check_metrics
from zotuner.tasks.scores import Example, Mean, Score

REQUIRED = ("name", "fields", "loss")  # of a class; and `example` or `masked`
ATTRIBUTES = {
    **dict.fromkeys(("name", "label_field", "stop", "dev_split", "test_split"), str),
    **dict.fromkeys(("fields", "sources", "metrics"), dict),
    **dict.fromkeys(("labels", "dev_size", "max_new_tokens"), int),
    "generates": bool,
}
METHODS = ("__init__", "example", "masked", "label", "labelled", "rows")


def class_of(file: Path) -> type[Task]:
    """The one subclass of `Task` that a Python file defines.

    What its methods raise is then one line as well, with the place in the file.

    Raises:
        ZotunerError: A file that cannot be run, no such class or several, or one that lacks something.
    """
    module = _run(file)
    classes = [kind for kind in dict.fromkeys(filter(isclass, vars(module).values())) if issubclass(kind, Task)]
    found = [kind for kind in classes if kind.__module__ == module.__name__]  # others are imported
    if len(found) != 1:
        names = ", ".join(kind.__name__ for kind in found) or "none"
        raise ZotunerError(f"{file}: expected one class that inherits from zotuner.Task, found {names}")
    task = found[0]
    missing = [name for name in REQUIRED if not hasattr(task, name)]
    if missing:
        raise ZotunerError(f"{file}: class {task.__name__} lacks {missing[0]!r}; a task needs {', '.join(REQUIRED)}")
    if task.example is Task.example and task.masked is Task.masked:
        raise ZotunerError(f"{file}: class {task.__name__} has no method example(row) that returns a zotuner.Example")
    if task.loss not in get_args(Loss):
        raise ZotunerError(f"{file}: class {task.__name__}: {unknown('loss', str(task.loss), get_args(Loss))}")
    _check_attributes(f"{file}: class {task.__name__}", task)
    blaming = _blaming(file)
    task.metrics = {
        name: Mean(blaming(_number(metric.score))) if isinstance(metric, Mean) else blaming(_number(metric))
        for name, metric in task.metrics.items()
    }
    for name in METHODS:
        if name in vars(task):
            setattr(task, name, _blaming(file)(vars(task)[name]))
    for name in ("example", "masked"):
        if getattr(task, name) is not getattr(Task, name):
            setattr(task, name, _checked(file, getattr(task, name)))
    task.folder = file.parent
    return task


def _check_attributes(where: str, task: type[Task]) -> None:
    """Raises a ZotunerError where an attribute is of another type than `Task` says."""
    for name, kind in ATTRIBUTES.items():
        if not isinstance(value := getattr(task, name), kind):
            raise ZotunerError(f"{where}: {name}: expected {kind.__name__}, got {value!r}")
    for name, field in task.fields.items():
        if not isinstance(field, type | UnionType):
            raise ZotunerError(f"{where}: fields: expected a type for {name!r}, such as str, got {field!r}")
    for name, metric in task.metrics.items():
        if not isinstance(name, str):
            raise ZotunerError(f"{where}: metrics: expected text for a metric's name, got {name!r}")
        if not callable(metric):
            raise ZotunerError(f"{where}: metrics: expected a function for {name!r}, got {metric!r}")
    if task.generates and not (task.stop and task.max_new_tokens >= 1):
        raise ZotunerError(
            f"{where}: expected a text in stop and a positive max_new_tokens of a task whose answers are generated, "
            f"got {task.stop!r} and {task.max_new_tokens}"
        )
    check_metrics(f"{where}: metrics", list(task.metrics))


def load_score(file: Path, name: str) -> Score:
    """A function (answer, example) -> float of a Python file; what it raises is one line, with the place in the file.

    Raises:
        ZotunerError: A file that cannot be run, or has no such function.
    """
    function = getattr(_run(file), name, None)
    if not callable(function):
        raise ZotunerError(f"{file}: expected a function {name!r}, found none")

    return _blaming(file)(_number(function))


def _number(function: Callable[..., Any]) -> Callable[..., float]:
    """The same function, which raises unless it returns a number."""

    def judged(*args: Any) -> float:
        return float(function(*args))

    return judged


def _checked(file: Path, method: Callable[[Task, Row], Example]) -> Callable[[Task, Row], Example]:
    """The same method, which says so if it returns something else than an example."""

    def written(task: Task, row: Row) -> Example:
        made = method(task, row)
        good = (
            isinstance(made, Example)
            and isinstance(made.candidates, tuple)
            and all(isinstance(text, str) for text in (made.prompt, *made.candidates, made.suffix))
            and type(made.label) is int
            and made.label in range(len(made.candidates))
        )
        if not good:
            raise ZotunerError(
                f"{file}: expected {method.__name__} to return a zotuner.Example of a prompt, a tuple of candidates "
                f"and the number of the right one, got {made!r}"
            )
        return made

    return written


def _run(file: Path) -> ModuleType:
    """Runs a file as a module of a private name."""
    if not file.is_file():
        raise ZotunerError(f"{file}: no such file")
    name = f"_zotuner_{file.stem}_{hashlib.sha256(str(file.absolute()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file.absolute())
    if spec is None or spec.loader is None:
        raise ZotunerError(f"{file}: expected a Python file that ends in .py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look for it there
    with _blaming(file):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _blaming(file: Path) -> Iterator[None]:
    """Turns what goes wrong in a user's file into one line that names the place in it."""
    try:
        yield
    except ZotunerError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file.absolute())]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else "?"
        reason = " ".join(str(error).split())
        raise ZotunerError(f"{file}, line {line}: {type(error).__name__}: {reason}") from error
