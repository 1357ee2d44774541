"""What one forward pass needs beyond its input ids: the adapters of its tokens and the blocks of its sequences.

Owns the scope in which that is visible to sites and attention; it is entered by the runner and never nested.
Knows nothing about scheduling or where adapters come from.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from server.ops import DecodeBatch, GroupEdits, PrefillSpan, TokenLayout


class BatchEdits(Protocol):
    """The edits of a step's adapters, by site group."""

    def group(self, index: int) -> GroupEdits | None:
        """The edits at site group `index`; None when no adapter of the step touches it."""

    def dense(self, index: int) -> GroupEdits:
        """The same with the rank rows of all adapters under one another, which a group of matrices need not have."""

    def embedding_rows(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For an embedding's group: the row store as (all rows, vocabulary), and this step's row numbers (rows,)."""


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where a step's tokens are cached and what they attend to. The decoding sequences' tokens come first."""

    blocks: torch.Tensor  # (tokens,) block of each token
    offsets: torch.Tensor  # (tokens,) its place in the block
    decode: DecodeBatch | None
    num_decodes: int
    prefills: tuple[PrefillSpan, ...]


@dataclass(frozen=True, slots=True)
class FusedOutput:
    """What the members of a group computed at once."""

    input: torch.Tensor
    output: torch.Tensor  # (..., sum of all d_out)
    has_low_rank: bool  # whether the low-rank parts of all members are in it


@dataclass(slots=True)
class StepContext:
    """One forward pass. `edits` is None when every token is the bare base's."""

    attention: AttentionBatch
    layout: TokenLayout
    logits_layout: TokenLayout  # the same for the rows that the head computes
    edits: BatchEdits | None
    rope_lengths: torch.Tensor | None = None  # (tokens,) see `rope.RopeRule`; None: the base does not ask
    # Per site group: the input, and what was computed from it for all members.
    lanes: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    shrunk: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    fused: dict[int, FusedOutput] = field(default_factory=dict)


class Scope:
    """The context of the forward pass in progress; one per base, used by the engine's thread only."""

    def __init__(self) -> None:
        self._current: StepContext | None = None

    @property
    def current(self) -> StepContext | None:
        return self._current

    @contextmanager
    def enter(self, context: StepContext) -> Iterator[None]:
        assert self._current is None, "forward passes do not nest"
        self._current = context
        try:
            yield
        finally:
            self._current = None
