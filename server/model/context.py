"""What one forward pass needs beyond its input ids: the adapters of its tokens and the blocks of its sequences.

Owns the scope in which that is visible to sites and attention; it is entered by the runner and never nested.
Knows nothing about scheduling or where adapters come from.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from server.ops import DecodeBatch, GroupEdits, Joint, PrefillSpan, StackHidden, TokenLayout
from server.ops.native import DecodeStep
from server.ops.prefill import PrefillPlan
from server.ops.runs import DecodeLists
from server.ops.site_ops import PlacedOp


class BatchEdits(Protocol):
    """The edits of a step's adapters, by site group."""

    def group(self, index: int) -> GroupEdits | None:
        """The edits at site group `index`; None when no adapter of the step touches it."""

    def embedding_rows(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For an embedding's group: the row store as (all rows, vocabulary), and this step's row numbers (rows,)."""


class BatchOps(Protocol):
    """What the adapters of a step do beside the normal form."""

    def at(self, site: int, *, is_head: bool) -> Sequence[PlacedOp]:
        """In the order in which they come; none at most sites. At the head, for the rows that it computes."""


class SiteKernels(Protocol):
    """The edits of a step's adapters, applied by kernels that read rank rows where they lie."""

    def edits(self, site: int) -> bool:
        """Whether any token's adapter does anything at this site."""

    def scales_input(self, site: int) -> bool:
        """Whether any token's adapter has an in_scale at this site."""

    def is_joint(self, group: int) -> bool:
        """Whether the members of a group are edited, and all from one input: they may be finished at once."""

    def joints(self, groups: Sequence[int]) -> Sequence[Joint | None] | None:
        """What finishes each of these groups in one call, None for one that nobody edits; None where one takes more."""

    def scale(self, x: torch.Tensor, group: int, member: int, *, is_head: bool = False) -> torch.Tensor:
        """What the base of this member reads: x (tokens, d_in) -> a tensor of its own."""

    def finish(
        self, y: torch.Tensor, x: torch.Tensor, group: int, member: int | None, *,
        is_head: bool = False, gain: float = 1.0,
    ) -> None:  # fmt: skip
        """What follows the base's product, in place: y (tokens, d_out) of a member, or of all side by side (None).

        x as the site was given it. `gain` multiplies the low-rank part.
        """


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where a step's tokens are cached and what they attend to. The decoding sequences' tokens come first."""

    blocks: torch.Tensor  # (tokens,) block of each token
    offsets: torch.Tensor  # (tokens,) its place in the block
    decode: DecodeBatch | None
    num_decodes: int
    prefills: tuple[PrefillSpan, ...]
    lists: DecodeLists | None = None  # `decode` as kernels want it, one or the other
    plan: PrefillPlan | None = None  # `prefills` as a library wants them, one or the other

    @property
    def has_prefills(self) -> bool:
        return bool(self.prefills) or self.plan is not None


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
    kernels: SiteKernels | None = None  # instead of `edits`
    ops: BatchOps | None = None  # None when no token's adapter has any
    rope_lengths: torch.Tensor | None = None  # (tokens,) see `rope.RopeRule`; None: the base does not ask
    # Per site group: the input, and what was computed from it for all members.
    shrunk: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    stack_shrunk: dict[int, tuple[torch.Tensor, StackHidden]] = field(default_factory=dict)
    fused: dict[int, FusedOutput] = field(default_factory=dict)
    kv_rows: dict[int, torch.Tensor] = field(default_factory=dict)  # by kv heads: where the step's tokens are cached
    # What layers share where each is one native call, by the id of the angles that the model gives them.
    decode_steps: dict[int, DecodeStep] = field(default_factory=dict)


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
