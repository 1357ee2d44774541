"""FlashInfer's prefill over a paged cache: its wrappers, one for each kind of layer, planned once in a step.

Owns the wrappers and when they may be planned again. Knows nothing about when FlashInfer may be used (`choice.py`).
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from server.ops.prefill.chunks import AttentionLayer, Chunks
from server.ops.sending import send

MODULE = "flashinfer"
# What FlashInfer recommends; it holds parts of long sequences, and layers take turns at it.
WORKSPACE_BYTES = 128 << 20
# Of each wrapper, beside the workspace: its numbers and the lengths of up to 32,768 sequences, as FlashInfer has it.
WRAPPER_BYTES = (8 << 20) + 4 * 32768


class _Wrapper:
    """One kind of layer: a wrapper, what it is planned for, and when its numbers may be written over.

    A plan is written to page-locked memory and copied from there when the device's line comes to it, perhaps after
    this thread has gone on to the step after. So the next plan waits for that copy, which comes early in its step.
    """

    def __init__(self, wrapper: Any, device: torch.device) -> None:
        self.wrapper = wrapper
        self._planned: FlashInferPlan | None = None
        self._copied: Any = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def plan(self, step: "FlashInferPlan", layer: AttentionLayer, dtype: torch.dtype) -> None:
        if self._planned is step:
            return
        if self._copied is not None:
            self._copied.synchronize()
        self._planned = None  # a plan that fails half way is of no use to anybody
        self.wrapper.plan(
            step.starts,
            step.firsts,
            step.blocks,
            step.last_sizes,
            layer.num_heads,
            layer.kv_heads,
            layer.width,
            step.block_size,
            causal=True,
            sm_scale=layer.scaling,
            window_left=-1 if layer.window is None else layer.window - 1,  # the tokens before a token's own
            logits_soft_cap=layer.softcap,
            q_data_type=dtype,
            kv_data_type=dtype,
        )
        if self._copied is not None:
            self._copied.record()
        self._planned = step


class FlashInfer:
    """`make_wrapper` is `flashinfer.BatchPrefillWithPagedKVCacheWrapper`, or what has its methods."""

    name = "flashinfer"

    def __init__(self, make_wrapper: Callable[[torch.Tensor, str], Any], device: torch.device) -> None:
        self._make_wrapper = make_wrapper
        self._device = device
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrappers: dict[AttentionLayer, _Wrapper] = {}

    @classmethod
    def load(cls, device: torch.device) -> "FlashInfer":
        return cls(importlib.import_module(MODULE).BatchPrefillWithPagedKVCacheWrapper, device)

    def plan(self, chunks: Chunks, block_size: int, device: torch.device) -> "FlashInferPlan":
        def numbers(found: list[int]) -> torch.Tensor:
            made = torch.tensor(found, dtype=torch.int32)
            return made.pin_memory() if device.type == "cuda" else made

        blocks = torch.tensor([block for own in chunks.blocks for block in own], dtype=torch.int32)
        return FlashInferPlan(
            self,
            block_size,
            starts=numbers([*chunks.starts]),
            firsts=numbers([*accumulate(map(len, chunks.blocks), initial=0)]),
            blocks=send(blocks, device),
            last_sizes=numbers([(length - 1) % block_size + 1 for length in chunks.lengths]),
        )

    def wrapper(self, layer: AttentionLayer) -> _Wrapper:
        """That of all layers of a kind."""
        found = self._wrappers.get(layer)
        if found is None:
            # HND: heads before the tokens of a page, as the cache lies.
            found = self._wrappers[layer] = _Wrapper(self._make_wrapper(self._workspace, "HND"), self._device)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class FlashInferPlan:
    """A step's numbers, int32: FlashInfer plans on the CPU, so all but the blocks stay there."""

    library: FlashInfer
    block_size: int
    starts: torch.Tensor  # (chunks + 1,) of the chunks' tokens
    firsts: torch.Tensor  # (chunks + 1,) where each sequence's blocks begin in `blocks`
    blocks: torch.Tensor  # on the device
    last_sizes: torch.Tensor  # (chunks,) tokens in each sequence's last block

    def attend(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        *,
        scaling: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """See `PrefillPlan.attend`."""
        layer = AttentionLayer(query.shape[1], key_cache.shape[1], query.shape[2], scaling, window, softcap)
        own, dtype = self.library.wrapper(layer), key_cache.dtype
        own.plan(self, layer, dtype)
        out: torch.Tensor = own.wrapper.run(query.to(dtype).contiguous(), (key_cache, value_cache))
        return out.to(query.dtype)
