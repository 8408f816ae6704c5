"""Meta-training: the PertNNs learn at each point of a first-order trajectory.

    point  ->  features -> sigma~  ->  what a meta-loss says of them  ->  its gradient by sigma~
           ->  through the normalisation into the PertNNs (Adam)

Source: ZO Fine-tuner, arXiv:2510.00419. The meta-losses are `zotuner.sampled`, the paper's, and `zotuner.expected`;
neither needs a graph over the parameters or a copy of the model.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zotuner.block_types import alike, block_types
from zotuner.blocks import find_blocks
from zotuner.config import MetaTrainConfig
from zotuner.errors import ZotunerError
from zotuner.expected import Expected
from zotuner.optim.zo_finetuner import features_of
from zotuner.pertnn import PertNNBank, normalize
from zotuner.sampled import Sampled
from zotuner.snapshot import optimizer_groups, optimizer_tensors, restore_optimizer, under
from zotuner.tuner import Tuner
from zotuner.visit import MetaLoss, Visit


@dataclass(frozen=True)
class _Told:
    """What the nets are told of the last point of a task.

    Attributes:
        losses: Of it; 0 at the first.
        sigma: (n,) raw scales there; 1 at the first.
        start: The loss at the task's first point since the model began anew; None: this is the first.
    """

    losses: tuple[float, float]
    sigma: Tensor
    start: float | None


class MetaTrainer:
    """Updates a tuner's PertNNs, point by point.

    Args:
        model: At the trajectory's weights whenever `update` is called.
        tuner: Whose nets are trained.
        config: Which meta-loss and its options, outer learning rate, normalisation, which blocks share a net.
    """

    def __init__(self, model: nn.Module, tuner: Tuner, config: MetaTrainConfig) -> None:
        self.blocks = find_blocks(model, tuner.granularity)
        names = [block.name for block in self.blocks]
        firsts, of_block = alike(names, config.bands)
        self._of_block = torch.tensor(of_block)  # (n,) which net each block has
        assert isinstance(tuner.bank, PertNNBank)
        self._bank = tuner.bank.chosen(firsts)
        self._tuner, self._normalized = tuner, config.normalized
        self._numels = tuner.numels_for(model, self.blocks)
        self._meta_loss: MetaLoss
        if config.meta_loss == "expected":
            self._meta_loss = Expected(self.blocks, config)
        else:
            self._meta_loss = Sampled(model, self.blocks, config)
        self._outer_lr, self._fresh = config.outer_lr, self.nets()
        self._outer = torch.optim.Adam(self._bank.parameters(), lr=config.outer_lr)
        self._told: dict[str, _Told] = {}  # of each task
        self._types = block_types(names)
        self._deliver()

    def update(self, visit: Visit) -> dict[str, Any]:
        """What a point says, and an outer step if it is to be learned at once. Where a round begins, inputs do, too.

        Returns:
            What a row of metrics holds.
        """
        task = visit.point.task
        if visit.point.begins:
            self._told.clear()
        inputs = self._inputs(task)
        with torch.no_grad():
            raw = self._bank(inputs, self._of_block)
        scales = self._normalize(raw)
        found = self._meta_loss.visit(visit, inputs, scales)
        if not self._meta_loss.anew:
            self._learn(visit.point.number + 1)
        if found.losses is not None:
            start = self._of(task).start
            self._told[task] = _Told(found.losses, raw, sum(found.losses) / 2 if start is None else start)
        return found.row | self._spread(scales)

    def end_round(self, number: int) -> None:
        """To be called after so many points, before the model begins anew and at the end."""
        if self._meta_loss.anew:
            self.take_nets(self._fresh)
            self._outer = torch.optim.Adam(self._bank.parameters(), lr=self._outer_lr)
            self._learn(number)

    def _learn(self, number: int) -> None:
        for objective in self._meta_loss.objectives(number, self._scales):
            self._outer.zero_grad()
            objective.backward()
            self._outer.step()
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self._bank.parameters()):
            raise ZotunerError(
                f"step {number}: the PertNNs' weights are no longer finite; start another run with a smaller "
                f"--outer-lr than {self._outer_lr:g}"
            )
        self._deliver()

    def _spread(self, scales: Tensor) -> dict[str, Any]:
        """How sigma~ differs between blocks."""
        logs = torch.log(scales.clamp_min(1e-12))
        types = {label: math.exp(float(logs[members].mean())) for label, members in self._types.items()}
        return {
            "sigma_min": float(scales.min()),
            "sigma_max": float(scales.max()),
            "sigma_log_std": float(logs.std()) if len(logs) > 1 else 0.0,
            "sigma_types": types,
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the next outer step stands on: the nets and Adam's moments, what the nets are told, the meta-loss's."""
        tensors, numbers = self._meta_loss.state()
        nets = {f"nets.{name}": tensor for name, tensor in self.nets().items()}
        told = {f"told.{task}": told.sigma for task, told in self._told.items()}
        asked = {f"meta_loss.{name}": tensor for name, tensor in tensors.items()}
        return {**nets, **optimizer_tensors(self._outer, "outer."), **told, **asked}, {
            "outer": optimizer_groups(self._outer),
            "told": {task: [*told.losses, told.start] for task, told in self._told.items()},
            "meta_loss": numbers,
        }

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Takes back what `state` gave."""
        self.take_nets(under("nets.", tensors))
        restore_optimizer(self._outer, state["outer"], tensors, "outer.")
        sigmas = under("told.", tensors)
        self._told = {
            task: _Told((plus, minus), sigmas[task], start) for task, (plus, minus, start) in state["told"].items()
        }
        self._meta_loss.restore(under("meta_loss.", tensors), state["meta_loss"])

    def save_points(self, path: Path) -> None:
        """Writes what the points said, if the meta-loss keeps that."""
        if isinstance(self._meta_loss, Expected):
            self._meta_loss.save(path)

    def nets(self) -> dict[str, Tensor]:
        """A copy of the nets that are learned, as they are."""
        return {name: tensor.clone() for name, tensor in self._bank.state_dict().items()}

    def take_nets(self, nets: dict[str, Tensor]) -> None:
        """Takes back what `nets` gave."""
        self._bank.load_state_dict(nets)
        self._deliver()

    def _deliver(self) -> None:
        """Gives each of the tuner's blocks the net that it shares."""
        self._tuner.bank.load_state_dict({name: t[self._of_block] for name, t in self._bank.state_dict().items()})

    def scales(self, task: str) -> Tensor:
        """(n,) sigma~ at the next point of a task, with its graph into the PertNNs."""
        return self._scales(self._inputs(task))

    def _inputs(self, task: str) -> Tensor:
        """(n, 5): what the nets see at the next point of a task."""
        told = self._of(task)
        return self._tuner.spec(features_of(self.blocks, told.losses, told.sigma.tolist()), told.start)

    def _scales(self, inputs: Tensor) -> Tensor:
        """(..., n) sigma~ of what the nets see (..., n, 5), with the graph into them."""
        return self._normalize(self._bank(inputs, self._of_block))

    def _normalize(self, raw: Tensor) -> Tensor:
        return normalize(raw, self._numels) if self._normalized else raw.double()

    def _of(self, task: str) -> _Told:
        return self._told.get(task, _Told((0.0, 0.0), torch.ones(len(self.blocks)), None))
