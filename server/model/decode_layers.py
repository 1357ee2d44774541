"""Decoder layers of Llama's kind in a step that only decodes on native kernels: one call each, and no modules.

Owns which layers the call stands for, and in which steps. Knows nothing about adapters: what they edit is in the step's
kernels. A step of few tokens costs as much for the walk through modules as for their arithmetic.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn
from transformers.models.llama import modeling_llama

from server.model.attention import PagedAttention
from server.model.compact import DecodeAttentions, GatedMLPs, Replaced, code_of, native_norm
from server.model.context import Scope, StepContext
from server.model.fused import FusedNative
from server.model.site_table import SiteGroup
from server.ops import native

_LAYER = code_of(modeling_llama.LlamaDecoderLayer.forward)  # Mistral's, Qwen 2's and others' is the same


class DecodeLayers(Replaced):
    """The decoder layers of a base that are Llama's by their code, all their parts included, for steps of decodes.

    Any other step takes the layer's own forward, and so does one whose adapters scale what a linear reads, bring ops,
    or have so many tokens that a library multiplies.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[SiteGroup],
        norms: Collection[nn.Module],
        attentions: DecodeAttentions,
        mlps: GatedMLPs,
        attention: PagedAttention,
        scope: Scope,
    ) -> None:
        """`norms`, `attentions` and `mlps`: those that are computed natively."""
        self._scope = scope
        self._attentions = attentions
        self._attention = attention
        self._widest = 0
        self._groups = {tuple(site.module for site in group.sites): group for group in groups}  # by members
        self._native_parts = {*norms, *attentions.modules, *mlps.modules}
        self._groups_of = {module: groups for module in model.modules() if (groups := self._find_groups(module))}
        super().__init__(self._groups_of)

    def _find_groups(self, module: Any) -> list[SiteGroup]:
        """The groups of the linears of a layer that is of this kind, in their order; none of any other module."""
        if _LAYER is None or code_of(type(module).forward) != _LAYER:
            return []
        attention, mlp = module.self_attn, module.mlp
        if not {attention, mlp, module.input_layernorm, module.post_attention_layernorm} <= self._native_parts:
            return []
        if self._attention.options_of(attention.layer_idx) is None:
            return []
        linears = [
            (attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,),
        ]  # fmt: skip
        groups = [self._groups[members] for members in linears if members in self._groups]
        is_native = all(isinstance(group.sites[0].fused, FusedNative) for group in groups)
        return groups if is_native and len(groups) == len(linears) else []

    def _forward_of(self, module: Any) -> Callable[..., Any]:
        stock, groups, number = module.forward, self._groups_of[module], module.self_attn.layer_idx
        layer = self._native_layer(module, groups)
        self._widest = max(self._widest, layer.widest)
        numbers = [group.index for group in groups]

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            context, angles = self._scope.current, kwargs.get("position_embeddings")
            if context is None or angles is None or not self._can_serve(hidden_states, context, layer):
                return stock(hidden_states, *args, **kwargs)
            joints = [None] * len(numbers) if context.kernels is None else context.kernels.joints(numbers)
            if joints is None:
                return stock(hidden_states, *args, **kwargs)
            step, cache = self._step_of(context, angles), self._attention.cache
            assert cache is not None
            return layer(hidden_states[0], step, joints, cache.keys[number], cache.values[number])[None]

        return forward

    def _native_layer(self, module: Any, groups: Sequence[SiteGroup]) -> native.DecodeLayer:
        attention = module.self_attn
        width = attention.head_dim
        linears = [fused.linear for group in groups if isinstance(fused := group.sites[0].fused, FusedNative)]
        norms = [native_norm(norm) for norm in (module.input_layernorm, module.post_attention_layernorm)]
        heads = attention.q_proj.out_features // width, attention.k_proj.out_features // width, width
        options = self._attention.options_of(attention.layer_idx)
        assert options is not None
        return native.DecodeLayer(linears, norms, heads, **options)

    def _can_serve(self, x: torch.Tensor, context: StepContext, layer: native.DecodeLayer) -> bool:
        is_listed = context.attention.lists is not None and self._attentions.can_serve(context)
        return is_listed and x.dtype is torch.bfloat16 and x.shape[1] <= layer.max_tokens and x.is_contiguous()

    def _step_of(self, context: StepContext, angles: tuple[torch.Tensor, torch.Tensor]) -> native.DecodeStep:
        """The step's part of the call, which is the same for all layers that are given the same angles."""
        known = context.decode_steps.get(id(angles[0]))
        if known is not None:
            return known
        batch, cache = context.attention, self._attention.cache
        assert batch.lists is not None
        assert cache is not None
        places = batch.blocks, batch.offsets
        turns = self._attentions.turns(angles)
        step = native.DecodeStep(len(batch.offsets), turns, places, batch.lists, cache.keys[0], self._widest)
        context.decode_steps[id(angles[0])] = step
        return step
