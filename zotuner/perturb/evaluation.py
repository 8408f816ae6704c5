"""One forward of the model at k points: which rows of a module's input belong to which."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from zotuner.perturb.slot import Perturbation, Scratch
from zotuner.perturb.watch import Watch

PLAIN = (Tensor, bool, int, float, str, torch.dtype, torch.device)  # arguments that keep nothing of a call


class CannotStackError(Exception):
    """A module was met whose inputs do not tell which rows belong to which branch."""


@dataclass
class Evaluation:
    """One forward of the model at k points.

    Attributes:
        points: Where; None is theta itself.
        scratch: Buffers.
        watch: Is told what is our own reading of the weights.
        half: Multiply float32 matrices in bfloat16, where `zotuner.perturb.half` can.
        rows: Size of dim 0 of the stacked batch, known once the first module has run.
    """

    points: Sequence[Perturbation | None]
    scratch: Scratch
    watch: Watch | None = None
    half: bool = False
    rows: int | None = None

    def once(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a module at theta puts out: where all branches bring it the same, it runs on one's and serves all.

        So what lies before the first block that is perturbed costs a step one forward in place of k.
        """
        if len(self.points) == 1 or not all(x is None or isinstance(x, PLAIN) for x in tree_leaves((args, kwargs))):
            return run(*args, **kwargs)  # a cache, say, keeps what it sees
        parts = self.split((args, kwargs))
        first, *others = map(tree_leaves, parts)
        alike = all(a is b or torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
        if not alike or not was_cut((args, kwargs), parts):
            return run(*args, **kwargs)
        some, named = parts[0]
        with self.alone(0):
            out = run(*some, **named)
        return self.join([out] * len(parts), cut=True)

    def own(self) -> AbstractContextManager[None]:
        """Around our own reading of the weights."""
        return nullcontext() if self.watch is None else self.watch.closed()

    @contextmanager
    def alone(self, j: int) -> Iterator[Perturbation | None]:
        """The evaluation is that of one branch for a while: what runs within a module's forward of that branch."""
        points, rows = self.points, self.rows
        self.points, self.rows = [points[j]], None
        try:
            yield points[j]
        finally:
            self.points, self.rows = points, rows

    def split(self, args: Any) -> list[Any]:
        """The arguments of each branch: tensors that hold the stacked batch are cut, all others are shared."""
        k = len(self.points)
        if k == 1:
            return [args]
        leaves, spec = tree_flatten(args)
        cut = [self._parts(leaf, k) for leaf in leaves]
        return [tree_unflatten([parts[j] for parts in cut], spec) for j in range(k)]

    def join(self, outputs: list[Any], cut: bool) -> Any:
        """The outputs of the branches as the stacked batch has them; `cut`: the inputs held it."""
        if len(outputs) == 1:
            return outputs[0]
        flat = [tree_flatten(out) for out in outputs]
        leaves = [self._joined(parts, cut) for parts in zip(*(leaves for leaves, _ in flat), strict=True)]
        return tree_unflatten(leaves, flat[0][1])

    def holds(self, leaf: Any) -> bool:
        """Whether an argument holds the stacked batch, a branch after the other in dim 0."""
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] == 1:
            return False
        if self.rows is None:
            if leaf.shape[0] % len(self.points):
                raise CannotStackError(f"dim 0 of {tuple(leaf.shape)} does not hold {len(self.points)} branches")
            self.rows = leaf.shape[0]
        return leaf.shape[0] % self.rows == 0

    def _parts(self, leaf: Any, k: int) -> Sequence[Any]:
        return leaf.chunk(k) if self.holds(leaf) else [leaf] * k

    def _joined(self, parts: Sequence[Any], cut: bool) -> Any:
        """One output of all branches: cut ones are put together, shared ones are repeated over a branch's rows."""
        first = parts[0]
        if not isinstance(first, Tensor):
            return first
        k = len(parts)
        if self.rows is None or first.ndim == 0:
            raise CannotStackError("an output without the batch's dimension")
        batch, length = self.rows // k, first.shape[0]
        # what does not come from the batch, and has no dimension of 1 in its place, may not be for each row
        fits = length == 1 or length % batch == 0 if cut else length == 1 and first.ndim > 1
        if not fits:
            raise CannotStackError(f"an output of shape {tuple(first.shape)} for a batch of {batch}")
        return torch.cat([part.expand(batch, *part.shape[1:]) if len(part) == 1 else part for part in parts])


def was_cut(args: Any, parts: Sequence[Any]) -> bool:
    """Whether `Evaluation.split` found the stacked batch in arguments that it made these parts of."""
    return any(part is not leaf for part, leaf in zip(tree_leaves(parts[0]), tree_leaves(args), strict=True))


class Current(threading.local):
    """The evaluation that the calling thread is in; None: modules run on theta."""

    evaluation: Evaluation | None = None

    @contextmanager
    def at(self, evaluation: Evaluation) -> Iterator[None]:
        """The calling thread is in an evaluation for a while."""
        self.evaluation = evaluation
        try:
            yield
        finally:
            self.evaluation = None
