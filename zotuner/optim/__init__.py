"""Zeroth-order optimizers: one file a method, all over `zotuner.optim.base`."""

from zotuner.optim.base import StepInfo, ZOOptimizer
from zotuner.optim.estimators import OneSided, TwoPoint
from zotuner.optim.fzoo import FZOO
from zotuner.optim.mezo import MeZO
from zotuner.optim.zo_finetuner import ZOFineTuner

__all__ = ["FZOO", "MeZO", "OneSided", "StepInfo", "TwoPoint", "ZOFineTuner", "ZOOptimizer"]
