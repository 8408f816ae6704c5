"""How L(theta + eps u) is evaluated, for one perturbation or for several in one forward.

draw        z over all blocks
field       a vector over all blocks that is made of noise and elementwise state; the sweep theta += sum_k alpha_k u_k
slot        a parameter as one module holds it
evaluation  one forward at k points
streamed    each module's forward on W + eps u, built in a scratch buffer for that call alone
still       what stays at theta in all of them, and runs once
lanes       forwards side by side, each with its share of the cores
walker      theta taken from point to point in place
closure     what is asked for losses, and the check of its answer
engine      `Perturber`: which losses are evaluated how
"""

from zotuner.perturb.closure import Closure
from zotuner.perturb.draw import Draw
from zotuner.perturb.engine import ENGINES, Perturber
from zotuner.perturb.field import Chunk, Direction, Field, Held, Move, shift, shifted
from zotuner.perturb.lanes import spread
from zotuner.perturb.slot import Perturbation

__all__ = [
    "ENGINES",
    "Chunk",
    "Closure",
    "Direction",
    "Draw",
    "Field",
    "Held",
    "Move",
    "Perturbation",
    "Perturber",
    "shift",
    "shifted",
    "spread",
]
