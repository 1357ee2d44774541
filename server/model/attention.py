"""Paged attention behind transformers' attention interface.

Owns the KV cache tensors and the function that stock models call instead of their own attention. Knows nothing about
sequences or adapters; what a step attends to is in the context.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from server.ground.errors import StartupRefused
from server.model.architectures import SERVED
from server.model.context import BatchOps, Scope, StepContext
from server.ops import Kernels, decode_attention, native, prefill_attention, store_kv
from server.ops.prefill import AttentionLayer
from server.ops.site_ops import OpSite

IMPLEMENTATION = "graft"


class KVCache:
    """Keys and values of every layer, in blocks of `block_size` tokens.

    Per layer keys and values, each (num_blocks, kv_heads, block_size, head_dim).
    """

    def __init__(
        self,
        shapes: list[tuple[int, int]],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`shapes`: (kv_heads, head_dim) of each layer."""
        self.block_size = block_size
        self.num_blocks = num_blocks
        # Zeros, not empty: decode gives weight 0 to what lies past a sequence's end, and it must be a number.
        both = [torch.zeros(2, num_blocks, h, block_size, d, dtype=dtype, device=device) for h, d in shapes]
        self.keys = [tensor[0] for tensor in both]
        self.values = [tensor[1] for tensor in both]
        self._rows = [tensor.view(-1, tensor.shape[-1]) for tensor in both]

    def store(self, layer: int, keys_values: torch.Tensor, rows: torch.Tensor) -> None:
        """Writes keys and values side by side, (tokens, 2 * kv_heads, head_dim), to what `rows_of` gave."""
        self._rows[layer].index_put_((rows,), keys_values)

    def rows_of(self, kv_heads: int, blocks: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Where the keys of each token and then its values lie, in any layer of so many heads: (tokens, 2 * kv_heads).

        blocks, offsets (tokens,).
        """
        heads = torch.arange(kv_heads, device=blocks.device)
        keys = (blocks[:, None] * kv_heads + heads) * self.block_size + offsets[:, None]
        return torch.cat((keys, keys + self.num_blocks * kv_heads * self.block_size), dim=1)

    @property
    def dtype(self) -> torch.dtype:
        return self.keys[0].dtype

    @staticmethod
    def block_bytes(shapes: list[tuple[int, int]], block_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block takes over all layers."""
        return sum(2 * h * d for h, d in shapes) * block_size * dtype.itemsize

    @torch.inference_mode()
    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copies the first tokens of a block to the start of another, in every layer."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :num_tokens] = tensor[source, :, :num_tokens]

    @property
    def total_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))


class PagedAttention:
    """The attention of one base: what its layers call, with the scope and the cache that they need."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self.cache: KVCache | None = None
        self.kernels: Kernels | None = None  # where there are some
        self.sites: Mapping[int, OpSite] = {}  # where keys and values are edited, by layer
        self.observer: Callable[[int, int, int], None] | None = None  # (layer, kv_heads, head_dim)
        self.layers: set[AttentionLayer] = set()  # each kind once, seen while there is an observer
        self._options: dict[int, dict[str, Any]] = {}  # by layer: scaling, window and softcap, as it has asked for them

    def forward(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """query (1, heads, tokens, width), key and value (1, kv_heads, tokens, width) -> (1, tokens, heads, width)."""
        context = self._scope.current
        assert context is not None, "attention outside of a step"
        layer: int = module.layer_idx  # type: ignore[assignment]
        options = self._options[layer] = {"scaling": scaling, "window": window, "softcap": softcap}
        if self.observer is not None:
            _refuse_unlike(module, key, value)
            self.observer(layer, key.shape[1], key.shape[3])
            self.layers.add(AttentionLayer(query.shape[1], key.shape[1], key.shape[3], scaling, window, softcap))
            return query.transpose(1, 2)
        assert self.cache is not None, "attention without a cache"
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # (tokens, heads, head_dim)
        if context.ops is not None and self.sites:
            k, v = self._with_ops(k, v, self.sites[layer], context.ops)
        batch = context.attention
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        store = store_kv if self.kernels is None else self.kernels.store_kv
        store(k, v, keys, values, batch.blocks, batch.offsets)
        return self._attend(q, k, v, keys, values, context, options)[None]

    def decode(self, layer: int, query: torch.Tensor, keys_values: torch.Tensor, context: StepContext) -> torch.Tensor:
        """What `forward` gives in a step of decodes alone, without ops: query (tokens, heads, width), keys and then
        values (tokens, 2 * kv_heads, width), in the dtype of the cache -> (tokens, heads, width).

        The values are made finite in place. The layer must have called `forward` before, which says how it attends.
        """
        assert self.cache is not None
        assert context.attention.decode is not None
        batch, kv_heads = context.attention, keys_values.shape[1] // 2
        rows = context.kv_rows.get(kv_heads)
        if rows is None:
            rows = context.kv_rows[kv_heads] = self.cache.rows_of(kv_heads, batch.blocks, batch.offsets)
        keys_values[:, kv_heads:].nan_to_num_()
        self.cache.store(layer, keys_values, rows)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        return decode_attention(query, keys, values, context.attention.decode, **self._options[layer])

    def decode_natively(
        self,
        layer: int,
        projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        turns: tuple[torch.Tensor, torch.Tensor],
        context: StepContext,
    ) -> torch.Tensor:
        """As `decode`, by native kernels and before the rotation: `projected` queries, keys and values, each
        (tokens, heads * width); `turns` as `native.rotary_decode` wants them -> (tokens, heads * width)."""
        assert self.cache is not None
        batch = context.attention
        assert batch.lists is not None
        query, keys, values = projected
        caches, places = (self.cache.keys[layer], self.cache.values[layer]), (batch.blocks, batch.offsets)
        options = self._options[layer]
        return native.rotary_decode(query, keys, values, turns, caches, places, batch.lists, **options)

    def options_of(self, layer: int) -> Mapping[str, Any] | None:
        """Scaling, window and softcap of a layer that has attended; None before."""
        return self._options.get(layer)

    def _with_ops(
        self, k: torch.Tensor, v: torch.Tensor, site: OpSite, ops: BatchOps
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (tokens, kv_heads, head_dim) with what adapters put in their place."""
        placed_ops = ops.at(site.index, is_head=False)
        if not placed_ops:
            return k, v
        both = torch.cat([k.flatten(1), v.flatten(1)], dim=1)
        for placed in placed_ops:
            both = placed.op.before(both, placed.stacked, placed.tokens, site)
        keys, values = both.chunk(2, dim=1)
        return keys.view(k.shape), values.view(v.shape)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        context: StepContext,
        options: dict[str, Any],
    ) -> torch.Tensor:
        batch = context.attention
        parts = []
        if batch.decode is not None:
            parts.append(decode_attention(q[: batch.num_decodes], keys, values, batch.decode, **options))
        if batch.lists is not None:
            assert self.kernels is not None
            parts.append(self.kernels.decode_attention(q[: batch.num_decodes], keys, values, batch.lists, **options))
        for span in batch.prefills:
            at = slice(span.start, span.end)
            parts.append(prefill_attention(q[at], k[at], v[at], keys, values, span, **options))
        if batch.plan is not None:
            parts.append(batch.plan.attend(q[batch.num_decodes :], keys, values, **options))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _refuse_unlike(module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
    if getattr(module, "is_causal", True) is False:
        raise StartupRefused(
            f"{type(module).__name__} looks ahead (it is not causal), so its past cannot be cached; {SERVED}"
        )
    if key.shape != value.shape:
        raise StartupRefused(
            f"{type(module).__name__} has keys of width {key.shape[3]} and values of width {value.shape[3]}, which the "
            f"KV cache of this version does not hold; {SERVED}"
        )


def _interface(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' models call. The base's PagedAttention hangs on every attention module (`attach`)."""
    if s_aux is not None:
        raise StartupRefused(
            f"{type(module).__name__} has attention sinks, which this version does not compute; {SERVED}"
        )
    attention: PagedAttention = module.graft_attention  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attention.forward(module, query, key, value, scaling=scale, window=sliding_window, softcap=softcap)
    return out, None


AttentionInterface.register(IMPLEMENTATION, _interface)


def attach(model: nn.Module, attention: PagedAttention) -> int:
    """Makes the attention modules of a model use `attention`; returns how many there are."""
    modules = [m for m in model.modules() if is_attention(m)]
    for module in modules:
        # Past nn.Module's registration: the attention object is not a child of the model.
        object.__setattr__(module, "graft_attention", attention)
    return len(modules)


def is_attention(module: nn.Module) -> bool:
    """Whether a module is the attention of a layer."""
    return hasattr(module, "layer_idx") and "Attention" in type(module).__name__
