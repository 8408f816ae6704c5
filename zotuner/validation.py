"""What a tuner is worth while it is trained: the loss that a short zeroth-order run reaches.

starting weights, task  ->  a run at each of a few learning rates  ->  loss on held-back examples / that at the start
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from zotuner.config import MetaTrainConfig
from zotuner.evaluate import evaluate
from zotuner.objective import Objective
from zotuner.optim import ZOFineTuner
from zotuner.progress import Bar, Display
from zotuner.tasks import Example, Splits, batches
from zotuner.tuner import Tuner

FACTORS = (0.5, 1.0, 2.0)  # of inner_lr: the learning rates of the runs
MOST = 200  # held-back examples of a task


class Validation:
    """Runs a tuner from the model's starting weights, to which it brings the model back.

    Args:
        model: At the starting weights.
        tuner: Whose nets are trained.
        config: Of the meta-training.
        objectives: Of each task.
        splits: Of each task: batches from train, losses on dev.
        to_start: Brings the model to its starting weights.
    """

    def __init__(
        self,
        model: nn.Module,
        tuner: Tuner,
        config: MetaTrainConfig,
        objectives: Mapping[str, Objective],
        splits: Mapping[str, Splits],
        to_start: Callable[[], None],
    ) -> None:
        self._model, self._tuner, self._config, self._to_start = model, tuner, config, to_start
        self._tasks = {name: (objectives[name], splits[name].train, splits[name].dev[:MOST]) for name in splits}
        self._start: dict[str, float] = {}

    @torch.no_grad()
    def __call__(self, display: Display, heed: Callable[[], None] = lambda: None) -> float:
        """Mean over tasks of (the loss of the best of the runs) / (the loss at the start); NaN if none is finite.

        Args:
            display: Where progress goes.
            heed: Called before each step; may raise.
        """
        bar = display.bar("validate", len(self._tasks) * len(FACTORS) * self._config.validate_steps)
        shares = []
        for name, (objective, train, dev) in self._tasks.items():
            if name not in self._start:
                self._start[name] = self._loss(objective, dev)
            reached = []
            for factor in FACTORS:
                self._run(objective, train, self._config.inner_lr * factor, bar, heed)
                reached.append(self._loss(objective, dev))
                self._to_start()
            finite = [loss for loss in reached if loss < float("inf")]
            shares.append(min(finite, default=float("nan")) / self._start[name])
        bar.close()
        return sum(shares) / len(shares)

    def _loss(self, objective: Objective, examples: Sequence[Example]) -> float:
        return evaluate(self._model, objective, examples, answers=False).figures["loss"]

    def _run(
        self, objective: Objective, train: Sequence[Example], lr: float, bar: Bar, heed: Callable[[], None]
    ) -> None:
        config = self._config
        opt = ZOFineTuner(self._model, self._tuner, lr, eps=config.eps, noise=config.noise, seed=config.seed)
        order = batches(train, config.batch_size, config.seed)
        for _, examples in zip(range(config.validate_steps), order, strict=False):
            heed()
            opt.step(partial(objective.loss, self._model, objective.training_batch(examples)))
            bar.advance()
