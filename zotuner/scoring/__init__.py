"""From examples to scores of their candidates, and to generated text, under a causal or a masked model."""

from zotuner.scoring.causal import CausalScorer
from zotuner.scoring.generation import Generator, Prompts
from zotuner.scoring.masked import MaskedBatch, MaskedScorer
from zotuner.scoring.prefix import Prefix

__all__ = ["CausalScorer", "Generator", "MaskedBatch", "MaskedScorer", "Prefix", "Prompts"]
