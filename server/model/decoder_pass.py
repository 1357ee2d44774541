"""A pass through a decoder of Llama's kind, from ids to logits: its modules in their order, and nothing else.

Owns which models are of that kind. What transformers does around the modules - masks that paged attention does not
read, options that serving never sets, records of what passes - takes as long as a tenth of a small model's step. Knows
nothing about adapters, nor about what the modules compute.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2

from server.model.compact import Replaced, code_of
from server.model.context import Scope

_MODEL = code_of(modeling_llama.LlamaForCausalLM.forward)
# They differ in the masks that they make. Those of many other models are the same as one of them.
_DECODERS = {
    code_of(decoder.forward)
    for decoder in (modeling_llama.LlamaModel, modeling_mistral.MistralModel, modeling_qwen2.Qwen2Model)
} - {None}


class DecoderPasses(Replaced):
    """The model itself where it is of this kind, by its code and its decoder's; none elsewhere.

    A call that is no packed pass takes the model's own forward.
    """

    def __init__(self, model: nn.Module, scope: Scope) -> None:
        self._scope = scope
        super().__init__([model] if _is_of_kind(model) else [])

    def _forward_of(self, module: Any) -> Callable[..., Any]:
        stock, decoder = module.forward, module.model
        layers = tuple(decoder.layers[: decoder.config.num_hidden_layers])

        def forward(
            *,
            input_ids: torch.Tensor,
            position_ids: torch.Tensor | None = None,
            logits_to_keep: int | torch.Tensor = 0,
            **options: Any,
        ) -> Any:
            if self._scope.current is None or not isinstance(logits_to_keep, torch.Tensor):
                return stock(input_ids=input_ids, position_ids=position_ids, logits_to_keep=logits_to_keep, **options)
            x = decoder.embed_tokens(input_ids)
            angles = decoder.rotary_emb(x, position_ids)
            for layer in layers:
                x = layer.forward(x, position_embeddings=angles, position_ids=position_ids)
            x = decoder.norm(x)
            # Rows are kept in their order and once each: as many as there are is all of them.
            kept = x if len(logits_to_keep) == x.shape[1] else x[:, logits_to_keep]
            return CausalLMOutputWithPast(logits=module.lm_head(kept))

        return forward


def _is_of_kind(model: Any) -> bool:
    if _MODEL is None or code_of(type(model).forward) != _MODEL:
        return False
    return code_of(type(model.model).forward) in _DECODERS
