"""Zeroth-order optimizers: one file a method, all over `zotuner.optim.base`."""

from zotuner.optim.base import StepInfo, ZOOptimizer
from zotuner.optim.estimators import OneSided, ThreePoint, TwoPoint
from zotuner.optim.fzoo import FZOO
from zotuner.optim.hizoo import HiZOO
from zotuner.optim.lozo import LOZO
from zotuner.optim.meazo import MEAZO
from zotuner.optim.mezo import MeZO
from zotuner.optim.mezo_adam import MeZOAdam
from zotuner.optim.zo_adamu import ZOAdaMU
from zotuner.optim.zo_finetuner import ZOFineTuner
from zotuner.optim.zo_sgd_momentum import ZOSGDMomentum
from zotuner.optim.zo_sign import ZOSign

__all__ = [
    "FZOO",
    "LOZO",
    "MEAZO",
    "HiZOO",
    "MeZO",
    "MeZOAdam",
    "OneSided",
    "StepInfo",
    "ThreePoint",
    "TwoPoint",
    "ZOAdaMU",
    "ZOFineTuner",
    "ZOOptimizer",
    "ZOSGDMomentum",
    "ZOSign",
]
