"""zotuner: learned zeroth-order fine-tuning of language models, with forward passes only.

The names below are imported when they are first used, so that `import zotuner` costs nothing.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zotuner.errors import ZotunerError
    from zotuner.models import load_model
    from zotuner.optim import (
        FZOO,
        LOZO,
        MEAZO,
        HiZOO,
        MeZO,
        MeZOAdam,
        OneSided,
        StepInfo,
        ThreePoint,
        TwoPoint,
        ZOAdaMU,
        ZOFineTuner,
        ZOSGDMomentum,
        ZOSign,
    )
    from zotuner.tasks import Example, Task, get_task
    from zotuner.tuner import Tuner

try:
    __version__ = version("zotuner")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0.0.0"

__all__ = [
    "FZOO",
    "LOZO",
    "MEAZO",
    "Example",
    "HiZOO",
    "MeZO",
    "MeZOAdam",
    "OneSided",
    "StepInfo",
    "Task",
    "ThreePoint",
    "Tuner",
    "TwoPoint",
    "ZOAdaMU",
    "ZOFineTuner",
    "ZOSGDMomentum",
    "ZOSign",
    "ZotunerError",
    "get_task",
    "load_model",
]

_HOMES = dict.fromkeys(__all__, "optim") | {
    "ZotunerError": "errors",
    "load_model": "models",
    **dict.fromkeys(["Example", "Task", "get_task"], "tasks"),
    "Tuner": "tuner",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"zotuner.{_HOMES[name]}"), name)
    try:
        return import_module(f"zotuner.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"zotuner.{name}":
            raise
        raise AttributeError(f"module 'zotuner' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
