"""PyTorch's own `varlen_attn` with a block table, which is FlashAttention 2.

Owns how a step is told to it. Knows nothing about when it may be used (`choice.py`).

It wants int32 numbers and pages as (pages, tokens, kv_heads, head_dim), which the cache is when two of its dimensions
are swapped: strides are enough. Keys are never split among programs (`num_splits=1`): PyTorch 2.13 leaves the rows of
all sequences but the first unwritten where it splits those of a block table (pytorch/pytorch#194167).
"""

import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch

from server.ops.prefill.chunks import Chunks
from server.ops.sending import send

_MODULE = "torch.nn.attention.varlen"
_PARAMETERS = {"scale", "window_size", "enable_gqa", "seqused_k", "block_table", "num_splits"}


def varlen_lacks() -> str | None:
    """Why the installed PyTorch's function cannot be used; None if it can."""
    try:
        module = importlib.import_module(_MODULE)
    except ImportError:
        return f"PyTorch {torch.__version__} has no varlen_attn, and 2.12 has"
    if not inspect.signature(module.varlen_attn).parameters.keys() >= _PARAMETERS:
        return f"the varlen_attn of PyTorch {torch.__version__} has no block table, and that of 2.12 has"
    return None


class Varlen:
    """`attend` is the function of `torch.nn.attention.varlen`, or one with its signature."""

    name = "varlen"

    def __init__(self, attend: Callable[..., torch.Tensor]) -> None:
        self._attend = attend

    @classmethod
    def load(cls, device: torch.device) -> "Varlen":
        # It tells the log of every call at the level of this server's own messages.
        logging.getLogger(_MODULE).setLevel(logging.WARNING)
        return cls(importlib.import_module(_MODULE).varlen_attn)

    def plan(self, chunks: Chunks, block_size: int, device: torch.device) -> "VarlenPlan":
        num, width = len(chunks.lengths), max(map(len, chunks.blocks))
        ends = accumulate(chunks.lengths, initial=0)
        table = [block for own in chunks.blocks for block in (*own, *[0] * (width - len(own)))]
        numbers = torch.tensor([*chunks.starts, *ends, *chunks.lengths, *table], dtype=torch.int32)
        starts, ends_k, lengths, blocks = torch.split(send(numbers, device), [num + 1, num + 1, num, num * width])
        return VarlenPlan(
            self._attend, starts, ends_k, lengths, blocks.view(num, width), max(chunks.sizes), max(chunks.lengths)
        )


@dataclass(frozen=True, slots=True)
class VarlenPlan:
    """A step's numbers on the device, int32."""

    function: Callable[..., torch.Tensor]
    starts: torch.Tensor  # (chunks + 1,) of the chunks' tokens
    ends: torch.Tensor  # (chunks + 1,) sums of `lengths`
    lengths: torch.Tensor  # (chunks,)
    table: torch.Tensor  # (chunks, blocks of the longest), 0 past a sequence's last
    max_size: int
    max_length: int

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
        """See `PrefillPlan.attend`. There is no cap."""
        assert softcap is None, "varlen_attn has no cap on scores"
        out = self.function(
            query.to(key_cache.dtype),
            key_cache.transpose(1, 2),
            value_cache.transpose(1, 2),
            self.starts,
            self.ends,
            self.max_size,
            self.max_length,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),  # it counts the tokens before a token's own
            enable_gqa=query.shape[1] != key_cache.shape[1],
            seqused_k=self.lengths,
            block_table=self.table,
            num_splits=1,
        )
        return out.to(query.dtype)
