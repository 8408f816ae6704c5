"""Snapshots: all that a run needs to go on from a step, in a folder that is whole or not there.

OUT/snapshots/step-00000200/   weights.safetensors  optimizer.safetensors  state.json
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zotuner.errors import ZotunerError
from zotuner.files import built_aside
from zotuner.metrics import jsonable
from zotuner.models import check_weights, keep_weights, restore_weights

FOLDER = "snapshots"
KEPT = 2  # the last ones
WEIGHTS, TENSORS, STATE = "weights.safetensors", "tensors.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Snapshot:
    """One that was taken."""

    path: Path
    step: int
    state: dict[str, Any]

    def restore(self, model: nn.Module) -> dict[str, Tensor]:
        """Gives the model its weights back; returns the other tensors.

        Raises:
            ZotunerError: The snapshot is damaged, or of another model.
        """
        check_weights(model, self.path / WEIGHTS)
        restore_weights(model, self.path / WEIGHTS)
        try:
            return load_file(self.path / TENSORS)
        except (OSError, SafetensorError) as error:
            raise ZotunerError(f"{self.path / TENSORS}: expected a whole safetensors file: {error}") from None


def take(run: Path, step: int, model: nn.Module, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Takes a snapshot, then drops all but the last two.

    Args:
        run: The run's folder.
        step: Steps that were taken.
        model: Its trainable weights are kept.
        tensors: Others to keep.
        state: JSON's types only.
    """
    with built_aside(run / FOLDER / f"step-{step:08d}") as aside:
        keep_weights(model, aside / WEIGHTS)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside / TENSORS)
        (aside / STATE).write_text(json.dumps(jsonable(state)), encoding="utf-8")
    for _, path in _found(run)[:-KEPT]:
        shutil.rmtree(path)


def latest(run: Path, usable: Callable[[int], bool] = lambda _: True) -> Snapshot | None:
    """The last snapshot, of those whose step is usable; None where there is none.

    Raises:
        ZotunerError: Its state is damaged.
    """
    found = [(step, path) for step, path in _found(run) if usable(step)]
    if not found:
        return None
    step, path = found[-1]
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ZotunerError(f"{path / STATE}: damaged: {error}; remove {path} to go on from the one before") from None
    return Snapshot(path, step, state)


def drop_all(run: Path) -> None:
    """A finished run needs none."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def drop_unfinished(run: Path) -> None:
    """What a killed process was still writing."""
    for path in (run / FOLDER).glob(".step-*"):
        shutil.rmtree(path)


def _found(run: Path) -> list[tuple[int, Path]]:
    folder = run / FOLDER
    named = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(match[1]), path) for match, path in named if match)


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str = "") -> dict[str, Tensor]:
    """An optimizer's tensors, by the number of the parameter and their name."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}{i}.{name}": value for i, held in state.items() for name, value in held.items()}


def optimizer_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """An optimizer's options and numbers, without what depends on the parameters."""
    return [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.state_dict()["param_groups"]
    ]


def restore_optimizer(
    optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], tensors: dict[str, Tensor], prefix: str = ""
) -> None:
    """Gives an optimizer back what `optimizer_groups` and `optimizer_tensors` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            number, name = key.removeprefix(prefix).split(".", 1)
            state.setdefault(int(number), {})[name] = value
    own = optimizer.state_dict()["param_groups"]
    merged = [{**mine, **taken} for mine, taken in zip(own, groups, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": merged})


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
