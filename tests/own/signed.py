"""A method of one's own: of the projected gradient only the sign counts, so every step has one size."""

import math
from dataclasses import replace

from zotuner.optim import TwoPoint, ZOOptimizer
from zotuner.optim.updates import Plain


class SignedStep(Plain):
    """theta <- theta - lr sign(c) z."""

    def __call__(self, estimate):
        signs = tuple(math.copysign(1.0, c) if c else 0.0 for c in estimate.coefficients)
        return super().__call__(replace(estimate, coefficients=signs))


class SignedMeZO(ZOOptimizer):
    def __init__(self, model, lr=1e-3, eps=1e-3, noise="gaussian", seed=0, **options):
        parts = {"estimator": TwoPoint(), "update": SignedStep()}
        super().__init__(model, lr=lr, eps=eps, noise=noise, seed=seed, **parts, **options)
