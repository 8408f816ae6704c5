"""How L(theta + eps u) is evaluated, for one perturbation or for several in one forward.

draw        z over all blocks
field       a vector over all blocks that is made of noise and elementwise state; the sweep theta += sum_k alpha_k u_k
slot        a parameter as one module holds it
evaluation  one forward at k points
streamed    each module's forward on W + eps u, built in a scratch buffer for that call alone
lanes       forwards side by side, each with its share of the cores
engine      `Perturber`: which losses are evaluated how
"""

from zotuner.perturb.draw import Draw
from zotuner.perturb.engine import ENGINES, Closure, Perturber
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
