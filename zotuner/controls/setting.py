"""What the commands work with, loaded and checked before anything is written."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from zotuner.adapters import adapter_of
from zotuner.blocks import Block, find_blocks
from zotuner.errors import ZotunerError
from zotuner.models import kind_of, known_as, load_model, weights_sha256
from zotuner.objective import Objective, objective_for
from zotuner.tasks import Example, batches, get_task

TRAIN_SIZE = 1000  # examples drawn by the seed, as for a fine-tuning run


@dataclass(frozen=True)
class Setting:
    """A model on a task.

    Attributes:
        model: At its own weights, or with a saved adapter.
        objective: The task's loss.
        train: Its training examples.
        blocks: Of the model.
        about: Fields of the `TunerInfo` of a tuner that is made here.
    """

    model: Any
    objective: Objective
    train: tuple[Example, ...]
    blocks: tuple[Block, ...]
    about: dict[str, Any]

    def batches(self, batch_size: int, seed: int) -> Iterator[Any]:
        """Training batches without end, in the order of a fine-tuning run."""
        return (self.objective.training_batch(examples) for examples in batches(self.train, batch_size, seed))

    def disjoint(self, batch_size: int, seed: int, count: int) -> Iterator[Any]:
        """So many whole batches that share no example.

        Raises:
            ZotunerError: There are not enough examples.
        """
        if count * batch_size > len(self.train):
            raise ZotunerError(
                f"--batches {count} of --batch-size {batch_size}: expected at most the {len(self.train)} training "
                f"examples of task {self.objective.task.name}, since no two batches may share one"
            )
        return islice(self.batches(batch_size, seed), count)


def load(model: str, task: str, data_dir: Path | None, seed: int, dtype: str = "float32") -> Setting:
    """Loads a model and a task.

    Raises:
        ZotunerError: An unknown task or model, or bad data.
    """
    made = get_task(task, data_dir)
    loaded, tokenizer = load_model(model, dtype=dtype)
    splits = made.splits(train_size=TRAIN_SIZE, seed=seed, kind=kind_of(loaded))
    return Setting(
        loaded,
        objective_for(made, loaded, tokenizer),
        splits.train,
        find_blocks(loaded),
        about_model(model, loaded) | {"tasks": (made.name,)},
    )


def about_model(name: str, model: Any) -> dict[str, Any]:
    """What a tuner records of its base model, and of the adapter that it has."""
    return {
        "base_model": known_as(name),
        "base_weights_sha256": weights_sha256(model),
        "adapter": adapter_of(model),
    }
