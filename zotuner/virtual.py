"""Virtual tokens in front of every row: prefix and prompt tuning, with padding, positions and masks as they must be.

    prefix    keys and values of each layer, which every token sees  ->  cache  ->  the base model on the tokens
    prompt    embeddings  ->  [prompt, padding, tokens]  ->  the base model

peft ignores positions for prompt tuning, so that a row's loss would depend on its padding, and knows no mask of four
dimensions, which rows that hold several candidates need. What is saved and loaded is peft's own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModelForCausalLM, PeftType
from torch import Tensor


class VirtualTokensModel(PeftModelForCausalLM):
    """peft's model with virtual tokens, whose rows do not depend on their padding.

    Virtual tokens have the positions 0 to n - 1, and a row's first token n, whatever padding is between them. Each row
    of a batch looks the virtual tokens up, so that rows can meet different ones.
    """

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,  # (rows, length)
        attention_mask: Tensor | None = None,  # (rows, length), or (rows, 1, length, length) to add to the logits
        position_ids: Tensor | None = None,  # (rows, length)
        **options: Any,  # of the base model's forward
    ) -> Any:
        """What the base model's forward returns; with a prompt, its logits have n columns more, in front."""
        rows, count = len(input_ids), self.active_peft_config.num_virtual_tokens
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompt = self.active_peft_config.peft_type == PeftType.PROMPT_TUNING
        inputs: dict[str, Any] = {"attention_mask": _widened(mask, count, prompt)}
        if position_ids is not None:
            inputs["position_ids"] = position_ids + count
        if not prompt:
            cache = self.get_prompt(rows)
            return self.base_model(input_ids=input_ids, past_key_values=cache, **inputs, **options)
        if position_ids is not None:
            numbers = torch.arange(count, device=input_ids.device).expand(rows, -1)
            inputs["position_ids"] = torch.cat([numbers, inputs["position_ids"]], dim=1)
        if options.get("labels") is not None:
            options["labels"] = F.pad(options["labels"], (count, 0), value=-100)
        return self.base_model(inputs_embeds=self._prompted(input_ids), **inputs, **options)

    def _prompted(self, input_ids: Tensor) -> Tensor:
        """(rows, n + length, width): the embeddings of the prompt and of the tokens."""
        numbers = self.prompt_tokens[self.active_adapter].to(input_ids.device).expand(len(input_ids), -1)
        embedded = self.word_embeddings(input_ids)  # type: ignore[misc]
        virtual = self.prompt_encoder[self.active_adapter](numbers).to(embedded.dtype)
        return torch.cat([virtual, embedded], dim=1)

    def generate(self, input_ids: Tensor, *, attention_mask: Tensor, **options: Any) -> Any:
        """Tokens (rows, length + new): the given ones and those generated behind them.

        peft's own would leave the positions behind a prompt to count padding as well.
        """
        if self.active_peft_config.peft_type != PeftType.PROMPT_TUNING:
            return super().generate(input_ids=input_ids, attention_mask=attention_mask, **options)
        mask = _widened(attention_mask, self.active_peft_config.num_virtual_tokens, True)
        new = self.base_model.generate(inputs_embeds=self._prompted(input_ids), attention_mask=mask, **options)  # type: ignore[operator]
        return torch.cat([input_ids, new], dim=1)


def _widened(mask: Tensor, count: int, rows_too: bool) -> Tensor:
    """A mask with `count` columns in front that all see and, for a prompt, with as many rows, each of which sees those
    before it."""
    if mask.ndim == 2:
        return F.pad(mask, (count, 0), value=1)
    if not rows_too:
        return F.pad(mask, (count, 0))
    wide = F.pad(mask, (count, 0, count, 0))
    wide[..., :count, :] = torch.full_like(wide[0, 0, :count], torch.finfo(mask.dtype).min).triu(1)
    return wide
