"""Steps of every method that fine-tunes, with one face: taken on batches, or repeated from a record."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zotuner.batch import Batch
from zotuner.config import FIRST_ORDER, FinetuneConfig
from zotuner.ledger import Record
from zotuner.models import compute_dtype
from zotuner.objective import Objective, shares
from zotuner.optim import (
    FZOO,
    LOZO,
    MEAZO,
    HiZOO,
    MeZO,
    MeZOAdam,
    OneSided,
    ZOAdaMU,
    ZOFineTuner,
    ZOOptimizer,
    ZOSGDMomentum,
    ZOSign,
)
from zotuner.trajectory import first_order, step_if_finite
from zotuner.tuner import Tuner


@dataclass(frozen=True)
class Taken:
    """What one step cost and gave."""

    loss: float
    lr: float
    forwards: int
    coefficients: tuple[float, ...]
    losses: tuple[float, ...]
    skipped: bool
    clipped: bool = False
    scales: Tensor | None = None  # (n,) the normalised sigma~


# Of each zeroth-order method: its class, and from an argument's name to the option that it is.
SHARED = (
    *("lr", "eps", "noise", "seed", "rank", "factors", "resample_every"),
    *("engine", "branch_batch", "branch_threads", "clip"),
)
OPTIMIZERS: dict[str, tuple[type[ZOOptimizer], dict[str, str]]] = {
    "mezo": (MeZO, {}),
    "fzoo": (FZOO, {"num_perturbations": "num_perturbations"}),
    "zo-finetuner": (ZOFineTuner, {}),
    "zo-sgd-momentum": (ZOSGDMomentum, {"momentum": "momentum"}),
    "zo-sign": (ZOSign, {}),
    "mezo-adam": (MeZOAdam, {"momentum": "momentum", "beta2": "beta2"}),
    "meazo": (MEAZO, {"beta2": "beta2"}),
    "zo-adamu": (ZOAdaMU, {"total_steps": "steps"}),
    "hizoo": (HiZOO, {"smooth": "smooth"}),
    "lozo": (LOZO, {}),
}


def without_effect(config: FinetuneConfig) -> list[str]:
    """Those of the stated options that a configuration's method does not read, in the order of the options.

    Comparisons state options for all of their methods, so that this is no error.
    """
    own = {option for _, options in OPTIMIZERS.values() for option in options.values()} - {"steps"}
    idle = own - set(OPTIMIZERS[config.method][1].values()) if config.method in OPTIMIZERS else own
    if config.estimator == "one-sided":
        idle -= {"num_perturbations"}
    if config.method not in OPTIMIZERS:
        idle |= {*SHARED, "sync_every"} - {"lr", "seed"}
    elif config.noise != "low-rank":
        idle |= {"rank", "factors", "resample_every"}
    if config.k_shot is not None:
        idle |= {"train_size", "dev_size"}
    return [name for name in FinetuneConfig.model_fields if name in idle & config.model_fields_set]


def optimizer_for(config: FinetuneConfig, model: Any, tuner: Tuner | None) -> ZOOptimizer:
    """The optimizer of a configuration's zeroth-order method."""
    made, options = OPTIMIZERS[config.method]
    given = {name: getattr(config, option) for name, option in ({name: name for name in SHARED} | options).items()}
    if tuner is not None:
        given["tuner"] = tuner
    if config.estimator == "one-sided":
        given["estimator"] = OneSided(config.num_perturbations)
    given["compute_dtype"] = compute_dtype(model.device) if config.dtype == "auto" else None
    return made(model, **given)


class ZOStepper:
    """Steps of a zeroth-order method."""

    def __init__(self, config: FinetuneConfig, model: Any, tuner: Tuner | None) -> None:
        self.optimizer = optimizer_for(config, model, tuner)
        self._model = model

    @torch.no_grad()
    def __call__(self, objective: Objective, batches: Sequence[Batch]) -> Taken:
        """One step on the examples of all batches together."""

        def closure(branches: int = 1) -> Tensor:
            return objective.mean_loss(self._model, batches, branches)

        return self._taken(self.optimizer.step(closure))

    def replay(self, record: Record) -> Taken:
        """The step that was recorded, without a forward."""
        self.optimizer.param_groups[0]["lr"] = record.lr
        return self._taken(self.optimizer.replay(record.losses))

    def _taken(self, loss: float) -> Taken:
        info, lr = self.optimizer.last, float(self.optimizer.param_groups[0]["lr"])
        assert info is not None
        return Taken(loss, lr, info.forwards, info.coefficients, info.losses, info.skipped, info.clipped, info.scales)

    @torch.no_grad()
    def learn_model(self, objective: Objective, batches: Sequence[Batch]) -> None:
        """What the first step finds out about the model, by one loss of its batch: a run that is resumed asks again."""
        self.optimizer.learn_model(lambda: objective.mean_loss(self._model, batches))


class FirstOrderStepper:
    """Steps of Adam or SGD, the upper bound that backpropagation buys. Its backward counts as no forward."""

    def __init__(self, config: FinetuneConfig, model: Any) -> None:
        assert config.lr is not None
        self.optimizer = first_order("sgd" if config.method == "sgd" else "adam", model, config.lr)
        self._model = model

    def __call__(self, objective: Objective, batches: Sequence[Batch]) -> Taken:
        """One step on the examples of all batches together."""
        lr = float(self.optimizer.param_groups[0]["lr"])
        value = 0.0
        for batch, share in zip(batches, shares(batches), strict=True):
            loss = share * objective.loss(self._model, batch)
            value += float(loss.detach())
            loss.backward()
        return Taken(value, lr, 1, (), (value,), skipped=not step_if_finite(self.optimizer, value))


Stepper = ZOStepper | FirstOrderStepper


def stepper_for(config: FinetuneConfig, model: Any, tuner: Tuner | None) -> Stepper | None:
    """The steps of a configuration's method; None for "none"."""
    if config.method == "none":
        return None
    return FirstOrderStepper(config, model) if config.method in FIRST_ORDER else ZOStepper(config, model, tuner)
