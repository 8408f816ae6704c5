"""The one step all zeroth-order methods share; a method is a choice of estimator, scale, update and noise.

scale  ->  sigma~ (n,)  ->  estimator asks for losses at theta + eps sigma~ z  ->  coefficients  ->  update: one sweep
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zotuner.blocks import Block, find_blocks
from zotuner.errors import unknown
from zotuner.noise import KINDS
from zotuner.optim.clip import clipped
from zotuner.optim.estimators import OneSided, ThreePoint, TwoPoint
from zotuner.optim.updates import Estimate, Plain, Update
from zotuner.perturb import Closure, Direction, Draw, Held, Perturbation, Perturber

Estimator = TwoPoint | OneSided | ThreePoint
LOW_RANK = "low-rank"


@dataclass(frozen=True)
class StepInfo:
    """What one step did.

    Attributes:
        step: Its number, from 0; noise was drawn with it.
        losses: Two-point: (loss_plus, loss_minus). One-sided: (l_0, l_1, ..., l_N). Three-point: (l_0, plus, minus).
        coefficients: Of each perturbation: the gradient's estimate is sum_k coefficients[k] u_k.
        forwards: Losses that the step took. (The first step may call the closure once more: to find out which
            parameters are read outside their modules, or whether losses evaluated together are those evaluated alone.)
        scales: The normalised sigma~ (n,) float64, or None where every block has scale 1.
        skipped: A loss was not finite: no update was made.
        clipped: The coefficients are smaller than the losses say, see `zotuner.optim.clip`.
    """

    step: int
    losses: tuple[float, ...]
    coefficients: tuple[float, ...]
    forwards: int
    scales: Tensor | None
    skipped: bool
    clipped: bool = False


class Scale(Protocol):
    """Says how large the perturbation is in each block."""

    def scales(self, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(raw sigma, normalised sigma~), both (n,); `state` is the parameter group."""
        ...

    def moved(self, moments: list[tuple[float, float]]) -> None:
        """Told, right after an update, the mean and the variance of each block."""
        ...


class ZOOptimizer(torch.optim.Optimizer):
    """A zeroth-order optimizer over one model: `step(closure)` with a closure that only evaluates the loss.

    One parameter group; learning-rate schedulers and `state_dict` work as on any torch optimizer. The group
    holds numbers: `step`, `seed`, what a PertNN is told of the step before; `state[param]` what an update keeps for
    each element, in float32 whatever the parameter's dtype.

    Args:
        model: Its trainable parameters are tuned; set `requires_grad` to choose.
        lr: Learning rate, not negative.
        eps: Size of a perturbation an element, > 0.
        noise: "gaussian", "rademacher" or "low-rank".
        seed: Of the noise, in [0, 2^64).
        estimator: Which losses a step asks for.
        scale: Makes, from the blocks, what says how large the perturbation is in each; None: 1 everywhere.
        update: What is made of the estimate, see `zotuner.optim.updates`; None: theta <- theta - lr g.
        granularity: "block" or "layer", see `zotuner.blocks.find_blocks`.
        rank: r of low-rank noise, A B^T / sqrt(r) in each matrix.
        factors: Distribution of A and B: "gaussian" or "rademacher".
        resample_every: Steps for which B stays, while A is drawn in each.
        engine: "streamed" or "in-place", see `zotuner.perturb.engine`.
        branch_batch: How many losses of a step one forward evaluates, or "auto"; see there.
        branch_threads: How many such forwards run at the same time, or "auto"; see there.
        compute_dtype: torch.bfloat16 for matrix products in it over float32 weights; see there.
        clip: Scale coefficients down to so many of their running standard deviations; None: never.

    Raises:
        ValueError: An argument out of its range, no trainable parameter, or quantised weights for an update that
            keeps something for each element.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        eps: float,
        noise: str,
        seed: int,
        estimator: Estimator,
        scale: Callable[[Sequence[Block]], Scale] | None = None,
        update: Update | None = None,
        granularity: str = "block",
        rank: int = 1,
        factors: str = "rademacher",
        resample_every: int = 1,
        engine: str = "streamed",
        branch_batch: int | str = "auto",
        branch_threads: int | str = "auto",
        compute_dtype: torch.dtype | None = None,
        clip: float | None = None,
    ) -> None:
        if not (math.isfinite(lr) and lr >= 0):
            raise ValueError(f"lr must be a number that is not negative, got {lr}")
        if not (math.isfinite(eps) and eps > 0):
            raise ValueError(f"eps must be a positive number, got {eps}")
        if noise not in (*KINDS, LOW_RANK):
            raise ValueError(unknown("kind of noise", noise, (*KINDS, LOW_RANK)))
        if factors not in KINDS:
            raise ValueError(unknown("kind of factors", factors, KINDS))
        for name, value in (("rank", rank), ("resample_every", resample_every)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if clip is not None and not (math.isfinite(clip) and clip > 0):
            raise ValueError(f"clip must be a positive number of standard deviations, got {clip}")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed must be in [0, 2^64), got {seed}")
        self.blocks = find_blocks(model, granularity)
        params = list(dict.fromkeys(p for block in self.blocks for piece in block.pieces for p in piece.parameters))
        group = {"params": params, "step": 0, "seed": seed, "noise": noise}
        if noise == LOW_RANK:
            group |= {"rank": rank, "factors": factors, "resample_every": resample_every}
        super().__init__([group], {"lr": lr, "eps": eps})
        self.last: StepInfo | None = None
        self._estimator, self._clip = estimator, clip
        self._scale = None if scale is None else scale(self.blocks)
        self._update: Update = update or Plain()
        self._begin_state()
        self._perturber = Perturber(
            model,
            self.blocks,
            engine=engine,
            branch_batch=branch_batch,
            branch_threads=branch_threads,
            compute_dtype=compute_dtype,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The one group is made with the optimizer, of the model's blocks.

        Raises:
            ValueError: It is there already.
        """
        if self.param_groups:
            raise ValueError("parameters are the model's: set requires_grad of those to tune, then make the optimizer")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Refuses copies and pickles, which would be without the model.

        Raises:
            TypeError: Always.
        """
        raise TypeError(f"{type(self).__name__} is of one model in memory: copy or save its state_dict() instead")

    def _begin_state(self) -> None:
        """What the update keeps for each element, as it begins, where it is not there."""
        self._held = Held(self.blocks, self.state)
        if not self._update.buffers:
            return
        for block in self.blocks:
            for param in (piece.param for piece in block.pieces):
                if not isinstance(param, nn.Parameter):
                    raise ValueError(
                        f"{type(self).__name__} keeps numbers for each element, for which {block.name}, which is "
                        "quantised, has no place: leave the weights as they are, or use a method such as MeZO"
                    )
                held, dtype = self.state[param], torch.promote_types(param.dtype, torch.float32)
                for name in (name for name in self._update.buffers if name not in held):
                    held[name] = torch.full_like(param.detach(), self._update.buffers[name], dtype=dtype)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for any torch optimizer, but elementwise state keeps its dtype, which torch casts to the parameter's."""
        super().load_state_dict(state_dict)
        params = self.param_groups[0]["params"]
        for number, param in zip(state_dict["param_groups"][0]["params"], params, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[param][name] = value.to(param.device, copy=True)
        self._begin_state()

    @property
    def losses_per_step(self) -> int:
        """Losses, and so forwards, that a step takes."""
        return len(self._estimator.points(self.param_groups[0]["eps"]))

    @torch.no_grad()
    def step(self, closure: Closure) -> float:  # type: ignore[override]
        """One step.

        Args:
            closure: Evaluates the loss of one fixed batch and returns it, a 0-d tensor; it is called several times
                and must not call `backward`. One with a parameter `branches` may be asked for `branches=k`: it then
                runs the model on the batch repeated k times along dim 0 and returns the k losses, (k,); and it may be
                called from several threads at once.

        Returns:
            The mean of loss_plus and loss_minus (two-point) or l_0 (the others). Where a loss is not finite, the
            weights stay as they are, `last.skipped` is set, and what came is returned.
        """
        state = self._begin()
        losses = tuple(self._perturber.losses(closure, state.points))
        return self._end(state, losses)

    @torch.no_grad()
    def replay(self, losses: Sequence[float]) -> float:
        """One step whose losses are known from a record of it: no forward, and bit for bit the same weights after it.

        Args:
            losses: As `last.losses` gave them.

        Returns:
            What `step` returned.

        Raises:
            ValueError: Another number of losses than a step has.
        """
        state = self._begin()
        if len(losses) != len(state.points):
            raise ValueError(f"a step of this method has {len(state.points)} losses, got {len(losses)}")
        self._perturber.visit(state.points)
        self._opt_called = True  # where torch's schedulers look for a step before theirs
        return self._end(state, tuple(losses))

    @torch.no_grad()
    def learn_model(self, closure: Closure) -> None:
        """Finds out, by one loss, what the first step finds out about the model; changes nothing.

        How many losses of a step are evaluated together, and so their last bits, hangs on it.
        """
        self._perturber.learn_model(closure, self._begin().points)

    def _begin(self) -> "_Begun":
        """Where the losses of the next step are to be evaluated."""
        group = self.param_groups[0]
        found = None if self._scale is None else self._scale.scales(group)
        sigma = [1.0] * len(self.blocks) if found is None else found[1].tolist()
        kind = group["factors"] if group["noise"] == LOW_RANK else group["noise"]
        rank = group["rank"] if group["noise"] == LOW_RANK else 0
        kept = group.get("resample_every", 1)
        draw = Draw(kind, group["seed"], group["step"], self._estimator.first_branch, rank, kept)
        along = self._direction(draw)
        points = [
            Perturbation(along.branched(branch), [factor * s for s in sigma]) if factor else None
            for branch, factor in self._estimator.points(group["eps"])
        ]
        return _Begun(draw, sigma, found, points)

    def _direction(self, draw: Draw) -> Direction:
        """Along what theta is perturbed: the noise itself, unless a method makes something of it."""
        return draw

    def _end(self, begun: "_Begun", losses: tuple[float, ...]) -> float:
        """From the losses to the update, and to what the next step is told."""
        group, found = self.param_groups[0], begun.found
        raw = coefficients = self._estimator.coefficients(losses, group["eps"])
        skipped = not all(math.isfinite(x) for x in (*losses, *coefficients))
        if self._clip is not None and not skipped:
            coefficients = clipped(coefficients, self._clip, group)
        if not skipped:
            estimate = Estimate(begun.draw, begun.sigma, coefficients, losses, group, self._held)
            moments = self._perturber.update(*self._update(estimate), measure=self._scale is not None)
            if self._scale is not None:
                self._scale.moved(moments)
        else:
            self._perturber.settle()
        if found is not None and not skipped:
            group["sigma_prev"] = found[0].tolist()
            group["loss_prev"] = self._estimator.pair(losses)
            group.setdefault("loss_start", sum(group["loss_prev"]) / 2)
        group["step"] += 1
        scales = None if found is None else found[1]
        was_clipped = not skipped and coefficients != raw
        self.last = StepInfo(begun.draw.step, losses, coefficients, len(losses), scales, skipped, was_clipped)
        return self._estimator.reported(losses)


@dataclass(frozen=True)
class _Begun:
    """A step before its losses are known."""

    draw: Draw
    sigma: list[float]
    found: tuple[Tensor, Tensor] | None
    points: list[Perturbation | None]
