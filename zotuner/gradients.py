"""What a backward says of each block, without a gradient of the whole model ever being held.

backward  ->  a parameter's gradient  ->  what is wanted of it, block by block  ->  freed
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from zotuner import noise
from zotuner.blocks import Block, Piece, pieces_of
from zotuner.perturb import Draw

Use = Callable[[int, Piece, Tensor], None]  # (block's number, piece of it, the piece's gradient)


@contextmanager
def each_gradient(blocks: Sequence[Block], use: Use) -> Iterator[None]:
    """While it lasts, a backward hands over the gradient of each piece of the blocks, and frees it at once."""
    pieces: dict[nn.Parameter, list[tuple[int, Piece]]] = {}
    for number, piece in pieces_of(blocks):
        pieces.setdefault(piece.param, []).append((number, piece))

    def consume(param: Tensor) -> None:
        assert param.grad is not None
        for number, piece in pieces[param]:  # type: ignore[index]
            use(number, piece, piece.of(param.grad))
        param.grad = None

    handles = [param.register_post_accumulate_grad_hook(consume) for param in pieces]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def block_dots(blocks: Sequence[Block], draw: Draw, dots: Tensor) -> Iterator[None]:
    """While it lasts, a backward adds <grad_i, z_i> to `dots` (n,)."""

    def add(number: int, piece: Piece, gradient: Tensor) -> None:
        dots[number] += noise.dot(gradient, **draw.at(number, piece.start))

    with each_gradient(blocks, add):
        yield
