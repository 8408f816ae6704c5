"""A recurrent language model, made known to transformers."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class GRUConfig(PreTrainedConfig):
    model_type = "gru"

    def __init__(self, vocab_size=400, hidden_size=32, **more):
        super().__init__(**more)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size


class GRUForCausalLM(PreTrainedModel):
    config_class = GRUConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.gru = nn.GRU(config.hidden_size, config.hidden_size, batch_first=True)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, attention_mask):
        """Tokens that are padding, on the left, leave the state at 0."""
        inputs = self.embedding(input_ids)
        states, hidden = [], inputs.new_zeros(1, len(input_ids), self.config.hidden_size)
        for at in range(input_ids.shape[1]):
            state, hidden = self.gru(inputs[:, at : at + 1], hidden)
            hidden = hidden * attention_mask[:, at, None]
            states.append(state)
        return CausalLMOutput(logits=self.head(torch.cat(states, dim=1)))


AutoConfig.register("gru", GRUConfig)
AutoModelForCausalLM.register(GRUConfig, GRUForCausalLM)
