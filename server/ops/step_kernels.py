"""A step's edits, applied by kernels that read rank rows where they lie; which kernels is a choice made before.

Owns what is computed once for several sites, and the interface that every implementation has. Knows nothing about how
they compute, nor about adapters or models.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from server.ops.runs import DecodeLists, TokenRuns
from server.ops.sheets import GroupTable, Joint, Sheets, StepTables


class Kernels(Protocol):
    """The modules `server.ops.kernels` and `server.ops.native`; the first says what each function means."""

    def shrink(self, x: torch.Tensor, group: GroupTable, table: Sheets, tokens: TokenRuns) -> torch.Tensor:
        """What an `expand` of the same kernels takes; its shape is theirs."""

    def embed_low_rank(self, ids: torch.Tensor, group: GroupTable, table: Sheets, tokens: TokenRuns) -> torch.Tensor:
        """`shrink` for an embedding: ids (tokens,)."""

    def expand(
        self, y: torch.Tensor, h: torch.Tensor | None, group: GroupTable, table: Sheets, tokens: TokenRuns, *,
        member: int | None = None, gain: float = 1.0,
    ) -> None:  # fmt: skip
        """In place; `h` is None where no adapter of the step has rank rows in the group."""

    def scale(
        self, x: torch.Tensor, group: GroupTable, table: Sheets, tokens: TokenRuns, *, member: int
    ) -> torch.Tensor:
        """A tensor of its own."""

    def joint(
        self, group: GroupTable, table: Sheets, tokens: TokenRuns, *, has_rows: bool, scales: bool = False
    ) -> Joint | None:
        """What does shrink and expand of all members at once, called with y and x; None where they are called apart."""

    def store_kv(
        self, keys: torch.Tensor, values: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor,
        blocks: torch.Tensor, offsets: torch.Tensor,
    ) -> None:  # fmt: skip
        """Writes keys and values to the cache."""

    def decode_attention(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, batch: DecodeLists, *,
        scaling: float, window: int | None = None, softcap: float | None = None, sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """One query per sequence."""


class StepKernels:
    """One step's edits, for the base's sites as they are called; what depends on an input alone is computed once."""

    def __init__(self, step: StepTables, kernels: Kernels) -> None:
        self._step = step
        self._kernels = kernels
        self._hidden: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def edits(self, site: int) -> bool:
        """Whether any token's adapter does anything at this site."""
        return bool(self._step.edited >> site & 1)

    def scales_input(self, site: int) -> bool:
        """Whether any token's adapter has an in_scale at this site."""
        return bool(self._step.scaled >> site & 1)

    def is_joint(self, group: int) -> bool:
        """Whether the members of a group are edited, and all from one input: they may be finished at once."""
        sites = self._step.group(group).sites
        return bool(self._step.edited & sites) and not self._step.scaled & sites

    def scale(self, x: torch.Tensor, group: int, member: int, *, is_head: bool = False) -> torch.Tensor:
        """What the base of this member reads: x (tokens, d_in) -> a tensor of its own."""
        table = self._step.group(group)
        return self._kernels.scale(x, table, self._step.sheets, self._tokens(is_head), member=member)

    def finish(
        self, y: torch.Tensor, x: torch.Tensor, group: int, member: int | None, *,
        is_head: bool = False, gain: float = 1.0,
    ) -> None:  # fmt: skip
        """What follows the base's product, in place: y (tokens, d_out) of a member, or of all side by side (None).

        x as the group's members were given it: (..., d_in), or an embedding's ids (..., tokens).
        """
        table, tokens = self._step.group(group), self._tokens(is_head)
        if member is None and not is_head and (apply := self._joint(group)) is not None:
            apply(y, x.reshape(-1, table.d_in))
            return
        h = self._dots(x, group, table, tokens)
        self._kernels.expand(y, h, table, self._step.sheets, tokens, member=member, gain=gain)

    def _tokens(self, is_head: bool) -> TokenRuns:
        if not is_head:
            return self._step.tokens
        assert self._step.kept is not None, "the head is not edited"
        return self._step.kept

    def joints(self, groups: Sequence[int]) -> list[Joint | None] | None:
        """What finishes each of these groups in one call, None for one that nobody edits; None where one takes more."""
        found: list[Joint | None] = []
        for group in groups:
            table = self._step.group(group)
            joint = self._joint(group) if self._step.edited & table.sites else None
            is_apart = joint is None and self._step.edited & table.sites
            if is_apart or (self._step.scaled & table.sites and len(table.widths) > 1):
                return None
            found.append(joint)
        return found

    def _joint(self, group: int) -> Joint | None:
        step = self._step
        if group not in step.joints:
            table = step.group(group)
            has_rows, scales = bool(step.with_rows & table.sites), bool(step.scaled & table.sites)
            step.joints[group] = self._kernels.joint(table, step.sheets, step.tokens, has_rows=has_rows, scales=scales)
        return step.joints[group]

    def _dots(self, x: torch.Tensor, group: int, table: GroupTable, tokens: TokenRuns) -> torch.Tensor | None:
        known = self._hidden.get(group)
        if known is None or known[0] is not x:
            known = self._hidden[group] = (x, self._make_dots(x, table, tokens))
        return known[1]

    def _make_dots(self, x: torch.Tensor, table: GroupTable, tokens: TokenRuns) -> torch.Tensor | None:
        if not self._step.with_rows & table.sites:
            return None  # no adapter of the step has rows here: nobody reads it
        if table.is_embedding:
            return self._kernels.embed_low_rank(x.reshape(-1), table, self._step.sheets, tokens)
        return self._kernels.shrink(x.reshape(-1, table.d_in), table, self._step.sheets, tokens)
