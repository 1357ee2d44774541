"""What a library is told of a step's chunks and of a layer, and what it is to the layers that call it.

Owns these shapes. Knows nothing about any library.
"""

from dataclasses import dataclass
from typing import Protocol, TypedDict

import torch


class AttentionOptions(TypedDict):
    """See `AttentionLayer`."""

    scaling: float
    window: int | None
    softcap: float | None


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """How a layer attends: what a library must be able to do for it."""

    num_heads: int
    kv_heads: int
    width: int  # of a head
    scaling: float
    window: int | None = None  # tokens that a token sees, itself included
    softcap: float | None = None

    @property
    def options(self) -> AttentionOptions:
        """What its attention is called with."""
        return {"scaling": self.scaling, "window": self.window, "softcap": self.softcap}


@dataclass(frozen=True, slots=True)
class Chunks:
    """The chunks of a step in the order of their tokens. All of their keys and values are in the cache already."""

    starts: tuple[int, ...]  # (chunks + 1) where the tokens of each begin, 0 for the first, and the end of the last
    lengths: tuple[int, ...]  # cached tokens of each sequence, its chunk included, which comes last
    blocks: tuple[tuple[int, ...], ...]  # of each sequence, covering its length

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each chunk."""
        return tuple(end - start for start, end in zip(self.starts, self.starts[1:], strict=False))


class PrefillPlan(Protocol):
    """The chunks of one step, for every layer that asks."""

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
        """Causal attention of all chunks: query (tokens, heads, head_dim) -> the same shape and dtype.

        Both caches (blocks, kv_heads, block_size, head_dim).

        Semantics:
            for c in chunks, for i in range(sizes[c]):
                p = lengths[c] - sizes[c] + i;  seen = cached tokens of c in (p - window, p]
                q = query[starts[c] + i];  out = softmax(cap(scaling * q . keys[seen])) @ values[seen]
        """


class PrefillLibrary(Protocol):
    """One way to compute the attention of chunks, for the life of the process."""

    @property
    def name(self) -> str:
        """As it is called in --attention and in the log."""

    def plan(self, chunks: Chunks, block_size: int, device: torch.device) -> PrefillPlan:
        """What the layers of one step call, on the device of the cache, whose blocks have `block_size` tokens."""
