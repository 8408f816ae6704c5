"""Which parameters a closure reads from outside the forward of the module that owns them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

READS = (Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__int__, Tensor.__bool__)  # values as Python's


class Watch(TorchFunctionMode):
    """Notes, while it is on, which parameters operations use that yield tensors, or their values as Python's.

    A perturbed forward lets its module hold other tensors in their place: what is still seen was read elsewhere.

    Args:
        params: To look out for.

    Attributes:
        seen: Those that were used.
        widest: Bytes of the largest tensor that `measure` was shown.
    """

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self._ids = {id(p): p for p in params}
        self._depth = 0
        self.seen: dict[nn.Parameter, None] = {}
        self.widest = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._depth == 0 and (func in READS or any(isinstance(x, Tensor) for x in tree_leaves(result))):
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self._ids:
                    self.seen[self._ids[id(leaf)]] = None
        return result

    @contextmanager
    def closed(self) -> Iterator[None]:
        """What happens inside is our own reading of the weights."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def measure(self, output: Any) -> None:
        """Notes how large an output is."""
        sizes = [x.numel() * x.element_size() for x in tree_leaves(output) if isinstance(x, Tensor)]
        self.widest = max(self.widest, *sizes, 0)
