"""How L(theta + eps u) is evaluated, for one perturbation or for several in one forward.

draw        z over all blocks, and the sweep theta += sum_k alpha_k z_k
slot        a parameter as one module holds it
evaluation  one forward at k points
streamed    each module's forward on W + eps u, built in a scratch buffer for that call alone
lanes       forwards side by side, each with its share of the cores
engine      `Perturber`: which losses are evaluated how
"""

from zotuner.perturb.draw import Draw, shift
from zotuner.perturb.engine import ENGINES, Closure, Perturber
from zotuner.perturb.lanes import spread
from zotuner.perturb.slot import Perturbation

__all__ = ["ENGINES", "Closure", "Draw", "Perturbation", "Perturber", "shift", "spread"]
