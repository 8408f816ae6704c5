"""`Perturber`: losses at theta + eps u, by one of two engines.

    streamed    theta is never written: each module's forward runs on W + eps u in scratch (`zotuner.perturb.streamed`)
    in place    theta walks: to theta + eps u, on to the next point, and home, by the same noise drawn again

With the streamed engine nothing is undone afterwards, because nothing was changed: no drift in any dtype, and a closure
that raises leaves the weights as they were. A parameter that the closure reads from outside its module's forward (a
module that reads another's weight, a penalty on the weights) cannot be served so: it is perturbed in place for the
time of a forward, and restored from a copy. Which parameters those are is watched while the first perturbed loss is
evaluated: a closure that reads others later on is not served.

The in-place engine takes no memory, works for compiled models, and comes home to within rounding (float32; measured in
docs/performance.md). Half-precision weights would drift by much more (12 % of a weight in 1,000 steps of bfloat16), so
they are restored from copies.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from zotuner.blocks import Block, Piece, Weight, named_weights, pieces_of
from zotuner.errors import unknown
from zotuner.perturb.closure import Closure, takes_branches, value_of, values_of
from zotuner.perturb.evaluation import CannotStackError, Current, Evaluation
from zotuner.perturb.field import Direction, shift, shift_and_measure
from zotuner.perturb.lanes import arrange, can_run_side_by_side, side_by_side
from zotuner.perturb.slot import Perturbation, Scratch, Slot, build, marked
from zotuner.perturb.still import share_before, still_modules
from zotuner.perturb.stored import slots_of
from zotuner.perturb.streamed import forward_of, forward_once, has_own_forward, replaced_forwards
from zotuner.perturb.walker import Walker
from zotuner.perturb.watch import Watch

ENGINES = ("streamed", "in-place")
TOGETHER_SHARE = 1 / 4  # of the weights' bytes: what "auto" lets the activations of further points take
SIDE_BY_SIDE = 0.2  # share of a step that must be the same for all points before they rather share a forward
LIVE = 2  # outputs as wide as the widest that a branch is taken to hold at once
AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-4}  # between stacked and single losses; others: 5e-2


class Perturber:
    """Evaluates losses at theta + alpha_i z_i.

    Args:
        model: The module that the closures run.
        blocks: Its blocks; noise's `block` is the position here.
        engine: "streamed" or "in-place"; a model that torch.compile made before is always served in place, since
            compiled code looks at no replaced forward; of one made later, such forwards run uncompiled.
        branch_batch: How many points share one forward, if the closure has a parameter `branches`: a number, or
            "auto": as many as keep the activations small beside the weights.
        branch_threads: How many such forwards run at the same time, on the CPU, each in a thread of its own: a number,
            or "auto": as many as there are cores, and as keep the activations small beside the weights; one where
            much of a forward is the same for all points, which then share it.
        compute_dtype: torch.bfloat16 multiplies float32 matrices in bfloat16 (`zotuner.perturb.half`), which takes all
            points of a step in one forward (unless `branch_batch` is 1), and so a closure with `branches`;
            None: as the weights are.

    Raises:
        ValueError: An unknown engine, or a number below 1; or integer weights for the in-place engine.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        *,
        engine: str = "streamed",
        branch_batch: int | str = "auto",
        branch_threads: int | str = "auto",
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        if engine not in ENGINES:
            raise ValueError(unknown("engine", engine, ENGINES))
        for name, value in (("branch_batch", branch_batch), ("branch_threads", branch_threads)):
            if value != "auto" and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} must be 'auto' or a number of at least 1, got {value!r}")
        self._model = model
        if compute_dtype not in (None, torch.bfloat16):
            raise ValueError(f"compute_dtype must be None or torch.bfloat16, got {compute_dtype}")
        self._blocks = blocks
        self._half = compute_dtype is not None
        self._pieces: dict[Weight, tuple[tuple[int, Piece], ...]] = {}
        for number, piece in pieces_of(blocks):
            self._pieces[piece.param] = (*self._pieces.get(piece.param, ()), (number, piece))
        self._slots = slots_of(model, self._pieces)
        self._weights = [weight for _, weight in named_weights(model)]  # frozen ones too
        self._params = [weight for weight in self._pieces if isinstance(weight, nn.Parameter)]
        compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())
        in_place = compiled or engine == "in-place"
        if in_place and len(self._params) < len(self._pieces):
            raise ValueError(
                "the in-place engine writes theta + eps u, which integer weights cannot hold; use the streamed engine"
                + (", without torch.compile" if compiled else "")
            )
        small = any(param.dtype.itemsize < 4 for param in self._pieces)
        self._walker = Walker(blocks) if in_place and not small else None
        self._copied: set[nn.Parameter] = set(self._params) if in_place else set()
        self._watched = in_place
        self._current = Current()
        self._scratches: defaultdict[int, Scratch] = defaultdict(Scratch)  # of each lane
        self._branch_batch = branch_batch
        self._branch_threads = branch_threads
        self._checked = False  # that points evaluated together give what they give alone
        self._widest = 0  # bytes of the largest output of a module, for one branch

    def loss(
        self,
        closure: Closure,
        draw: Direction | None = None,
        alphas: Sequence[float] = (),  # (n,) the factor of z in each block
    ) -> float:
        """L(theta + alpha z), or L(theta) without a draw. The weights are the same after as before."""
        try:
            return self.losses(closure, [None if draw is None else Perturbation(draw, alphas)])[0]
        finally:
            self.settle()

    def losses(self, closure: Closure, points: Sequence[Perturbation | None]) -> list[float]:
        """L at each point; None is theta itself. `settle` or `update` must follow: a walk ends at its last point."""
        if self._walker is not None:
            return [self._walker.loss(closure, point) for point in points]
        last = self.learn_model(closure, points)
        still = still_modules(self._model, self._slots, points)
        plan = self._plan(closure, len(points), still)
        with self._replaced(still):
            if all(group == [1] for group in plan):
                first = points if last is None else points[:-1]
                return [self._forward(closure, [point])[0] for point in first] + ([] if last is None else [last])
            try:
                losses = self._together(closure, points, plan)
            except (CannotStackError, RuntimeError) as error:
                if self._checked and isinstance(error, RuntimeError):
                    raise  # nothing that evaluating together is to blame for
                return self._one_by_one(closure, points, str(error))
            if not self._checked:
                last = self._forward(closure, points[-1:])[0] if last is None else last
                if not self._agree(losses[-1], last):
                    return self._one_by_one(closure, points, f"the same loss came out as {losses[-1]} and as {last}")
                self._checked = math.isfinite(last)
            return losses

    def learn_model(self, closure: Closure, points: Sequence[Perturbation | None]) -> float | None:
        """Watches the model evaluate the last point, once; returns the loss, if it was watched now and is right."""
        return None if self._watched else self._watch(closure, points[-1])

    def visit(self, points: Sequence[Perturbation | None]) -> None:
        """Takes the weights where `losses` would leave them, without evaluating anything."""
        if self._walker is not None:
            for point in points:
                self._walker.move(point)

    def settle(self) -> None:
        """Takes the weights home, if they walked."""
        if self._walker is not None:
            self._walker.move(None)

    def update(
        self, draw: Direction, alphas: Sequence[Sequence[float]], *, measure: bool = False
    ) -> list[tuple[float, float]]:
        """theta_i += sum_k alphas[i][k] z_i of branch `draw.branch + k`, one sweep, which also ends a walk.

        Half-precision weights are rounded stochastically, so that small updates happen in the mean.

        Args:
            draw: z.
            alphas: Of each block and branch.
            measure: Take the moments of the blocks in the same sweep.

        Returns:
            (mean, variance) of each block after the update, as `zotuner.blocks.moments` has them; empty unless asked.
        """
        with marked("update"):
            if self._walker is not None:
                draw, alphas = self._walker.home_and(draw, alphas)
            if measure:
                return shift_and_measure(self._blocks, draw, alphas, "stochastic")
            shift(self._blocks, draw, alphas, "stochastic")
            return []

    def _watch(self, closure: Closure, point: Perturbation | None) -> float | None:
        """Finds, by one perturbed loss, what is read outside its module, and how wide activations are.

        Returns:
            The loss, where it is right: no parameter was read outside.
        """
        if point is None:
            return None
        before = _attributes(self._model)
        with Watch(self._params) as watch, self._replaced(), _measured(self._model, watch):
            value = self._forward(closure, [point], watch=watch)[0]
        self._watched, self._widest = True, watch.widest
        if _changed(before, _attributes(self._model)):  # by a forward: threads would meet in it
            self._branch_threads = 1
        if not watch.seen:
            return value
        self._copied = set(watch.seen)
        self._branch_batch = self._branch_threads = 1
        warnings.warn(
            f"{len(watch.seen)} parameters are read outside their module's forward: they are perturbed in place, "
            f"with a copy of {sum(p.numel() for p in watch.seen):,} elements kept for the time of a forward, "
            "which no two perturbations share",
            stacklevel=5,
        )
        return None

    def _one_by_one(self, closure: Closure, points: Sequence[Perturbation | None], why: str) -> list[float]:
        """The losses one after the other, now and, if the closure gives them, from now on."""
        losses = [self._forward(closure, [point])[0] for point in points]
        self._branch_batch = self._branch_threads = 1
        warnings.warn(f"perturbations cannot share a forward of this model: {why}; each gets its own", stacklevel=4)
        return losses

    def _agree(self, stacked: float, single: float) -> bool:
        """Whether two ways to one loss differ by rounding alone."""
        if not math.isfinite(single):
            return True
        smallest = min(self._weights, key=lambda weight: weight.dtype.itemsize).dtype
        within = 5e-2 if self._half else AGREEMENT.get(smallest, 5e-2)
        return abs(stacked - single) <= within * (1 + abs(single))

    def _plan(self, closure: Closure, count: int, still: Sequence[nn.Module]) -> list[list[int]]:
        """How many of `count` points each forward takes, and which forwards run side by side; see `lanes.arrange`.

        Args:
            closure: Whose losses are wanted.
            count: Of points.
            still: Modules in which nothing is perturbed; those before all others run once where points share a forward.
        """
        if count == 1 or not takes_branches(closure):
            return arrange(count, 1, 1)
        if self._half:
            return arrange(count, 1, 1 if self._branch_batch == 1 else count)
        weights = sum(weight.nbytes for weight in self._weights)
        fit = 1 + int(weights * TOGETHER_SHARE / (LIVE * max(1, self._widest)))
        size = self._branch_batch if isinstance(self._branch_batch, int) else fit
        lanes = self._branch_threads if isinstance(self._branch_threads, int) else fit
        lanes = min(lanes, torch.get_num_threads()) if self._can_share_cores() else 1
        if lanes > 1 and self._branch_threads == "auto" and fit >= count:
            spared = share_before(self._model, still) * (count - 1) / count
            lanes = 1 if spared > SIDE_BY_SIDE else lanes
        if self._branch_batch == "auto":
            size = max(1, fit // lanes)
        return arrange(count, lanes, size)

    def _can_share_cores(self) -> bool:
        """Whether forwards may run side by side."""
        return (
            can_run_side_by_side()
            and all(param.device.type == "cpu" for param in self._pieces)
            and not any(has_own_forward(slot.module) for slot in self._slots)
        )

    def _together(
        self, closure: Closure, points: Sequence[Perturbation | None], plan: Sequence[Sequence[int]]
    ) -> list[float]:
        """The losses as a plan has it."""
        losses: list[float] = []
        left = iter(points)
        for sizes in plan:
            groups = [list(islice(left, size)) for size in sizes]
            tasks = [partial(self._forward, closure, group, lane) for lane, group in enumerate(groups)]
            losses += [loss for found in side_by_side(tasks) for loss in found]
        return losses

    def _forward(
        self, closure: Closure, group: Sequence[Perturbation | None], lane: int = 0, watch: Watch | None = None
    ) -> list[float]:
        """The losses of one forward."""
        if group == [None]:
            return [value_of(closure())]
        evaluation = Evaluation(group, self._scratches[lane], watch, self._half)
        with self._current.at(evaluation), self._moved_copies(group[0]):
            return [value_of(closure())] if len(group) == 1 else values_of(closure(branches=len(group)), len(group))

    @contextmanager
    def _moved_copies(self, point: Perturbation | None) -> Iterator[None]:
        """What is read outside its module is at a point for a while, in place."""
        with ExitStack() as stack:
            for param in self._copied:
                stack.callback(param.data.copy_, param.detach().clone())
                assert point is not None
                build(Slot(nn.Module(), "", param, self._pieces[param]), point, out=param.detach())  # type: ignore[arg-type]
            yield

    @contextmanager
    def _replaced(self, still: Sequence[nn.Module] = ()) -> Iterator[None]:
        """Lets every module's forward run where the calling thread's evaluation is; in `still` nothing is perturbed."""
        by_module: dict[nn.Module, list[Slot]] = {}
        for slot in self._slots:
            if slot.param not in self._copied:
                by_module.setdefault(slot.module, []).append(slot)
        once = {module for module in still if module not in by_module}
        if not self._half:  # products in bfloat16 are our own
            once |= by_module.keys() & {child for module in still for child in module.modules()}
        moving = [(module, slots) for module, slots in by_module.items() if module not in once]
        forwards = [(module, forward_of(module, slots, self._current)) for module, slots in moving]
        forwards += [(module, forward_once(module, self._current)) for module in once]
        # a peft wrapper generates by its base model's forward, not by its own
        entries = {self._model, getattr(self._model, "get_base_model", lambda: self._model)()}
        hooks = [entry.register_forward_pre_hook(self._next_batch) for entry in entries]
        hooks += [entry.register_forward_hook(self._next_batch) for entry in entries]
        try:
            with replaced_forwards(forwards):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _next_batch(self, *_: object) -> None:
        """Around a forward of the model; a closure may run it on several batches, which differ in size."""
        if self._current.evaluation is not None:
            self._current.evaluation.rows = None


@contextmanager
def _measured(model: nn.Module, watch: Watch) -> Iterator[None]:
    """Lets a watch see what every module puts out, perturbed or not."""
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_hook(lambda _, __, output: watch.measure(output)).remove)
        yield


Attributes = dict[nn.Module, dict[str, tuple[object, int]]]


def _attributes(model: nn.Module) -> Attributes:
    """What each module holds by name, parameters and children aside, and buffers too, and how often it was written."""
    return {
        module: {name: (value, _writes(value)) for name, value in {**vars(module), **module._buffers}.items()}
        for module in model.modules()
    }


def _writes(value: object) -> int:
    """How often a tensor was written to in place, as torch counts it."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _changed(before: Attributes, after: Attributes) -> bool:
    """Whether a module holds something else than before, or something that was written to."""
    nothing = (before, 0)
    return any(
        (old := held.get(name, nothing))[0] is not value or old[1] != writes
        for module, held in before.items()
        for name, (value, writes) in after[module].items()
    )
