"""What the adapters of a step do beside the normal form, stacked by site, and the tokens that each of it is for.

Owns the lanes of every op's stack. Knows nothing about what an op means, what is resident or why.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from server.adapters.device.step_edits import RowStore, Slot, StoredTensor
from server.ops import runs_of
from server.ops.site_ops import SITE_OPS, OpSite, OpTokens, PlacedOp

_MAX_SLOTS_PER_USED, _NUM_SLOTS_FREE = 2, 4


class OpEdits:
    """The ops of some slots; the stacks of a site are made when it is first asked for, and kept."""

    def __init__(self, store: RowStore, sites: Mapping[int, OpSite], slots: Sequence[Slot]) -> None:
        """`sites` by index; `slots` are those that have ops, one or more."""
        self._store = store
        self._sites = sites
        self._slots = tuple(slots)
        self._at: dict[int, tuple[tuple[str, tuple[int, ...], Any], ...]] = {}

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(slot.number for slot in self._slots)

    def serves(self, numbers: Collection[int]) -> bool:
        """Whether the stacks have these slots, and not too many others: making them anew costs copies of all."""
        has_all = {*numbers} <= {*self.numbers}
        return has_all and len(self._slots) <= _MAX_SLOTS_PER_USED * len(numbers) + _NUM_SLOTS_FREE

    def at(self, site: int) -> tuple[tuple[str, tuple[int, ...], Any], ...]:
        """(op, the slots that have it here in the order of its lanes, its stack), in the order of the closed list."""
        if site not in self._at:
            self._at[site] = tuple(self._made(site))
        return self._at[site]

    @torch.inference_mode()
    def _made(self, site: int) -> Iterable[tuple[str, tuple[int, ...], Any]]:
        edits = [(slot, slot.edits[site].ops) for slot in self._slots if site in slot.edits]
        for name, op in SITE_OPS.items():
            having = [(slot, ops[name]) for slot, ops in edits if name in ops]
            if having:
                tensors = [{field: self._read(slot, t) for field, t in own.items()} for slot, own in having]
                yield name, tuple(slot.number for slot, _ in having), op.stack(tensors, self._sites[site])

    def _read(self, slot: Slot, stored: StoredTensor) -> torch.Tensor:
        if stored.tensor is not None:
            return stored.tensor
        rows = slot.rows[stored.content_hash]
        numbers = torch.tensor(rows.numbers, dtype=torch.int64).to(self._store.device)
        found = self._store.row_view(rows.width).index_select(0, numbers)
        return found.view(torch.float32).view(stored.shape)


class StepOps:
    """The ops of one step (satisfies `BatchOps`)."""

    def __init__(
        self,
        edits: OpEdits,
        slots: Sequence[int],
        kept: Sequence[int],
        num_mixed: int,
        ids: torch.Tensor,
        keep: torch.Tensor,
    ) -> None:
        """The slot of each token, of which the first `num_mixed` may change slot from one to the next, and `ids`
        (tokens,); the slot of each row that the head computes, and `keep` (rows,), their places among the tokens."""
        self._edits = edits
        self._sides = ((slots, num_mixed, ids), (kept, len(kept), keep))
        self._ids = ids
        self._tokens: dict[tuple[bool, tuple[int, ...]], OpTokens] = {}
        self._kept: dict[str, torch.Tensor] = {}

    def at(self, site: int, *, is_head: bool) -> Sequence[PlacedOp]:
        return [
            PlacedOp(SITE_OPS[name], stacked, self._tokens_of(members, is_head))
            for name, members, stacked in self._edits.at(site)
        ]

    def _tokens_of(self, members: tuple[int, ...], is_head: bool) -> OpTokens:
        key = is_head, members
        if key not in self._tokens:
            slots, num_mixed, ids = self._sides[is_head]
            lane_of = {slot: lane for lane, slot in enumerate(members, start=1)}
            lanes = [lane_of.get(slot, 0) for slot in slots]
            device = ids.device
            self._tokens[key] = OpTokens(
                lanes=torch.tensor(lanes, dtype=torch.int64).to(device),
                num_mixed=num_mixed,
                runs=runs_of(lanes, num_mixed),
                ids=self._ids[ids] if is_head else ids,
                kept=self._kept,
                mixed_lanes=tuple(lanes[:num_mixed]),
            )
        return self._tokens[key]
