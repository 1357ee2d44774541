"""What the adapters of a step do beside the normal form, stacked by site, and the tokens that each of it is for.

Owns the lanes of every op's stack. Knows nothing about what an op means, what is resident or why.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from server.adapters.device.step_edits import RowStore, Slot, StoredTensor
from server.ops import runs_of
from server.ops.sending import send
from server.ops.site_ops import SITE_OPS, OpSite, OpTokens, PlacedOp, tensors_in

_MAX_SLOTS_PER_USED, _NUM_SLOTS_FREE = 2, 4
# (op, the slots that have it at a site in the order of its lanes, its stack), in the order of the closed list.
_Stacks = tuple[tuple[str, tuple[int, ...], Any], ...]


class OpEdits:
    """The ops of some slots; the stacks of a site are made when it is first asked for, and kept.

    What lies in consecutive rows is read where it is. What had to be copied is kept up to a limit; the stacks of a site
    that are beyond it are made for one step, and again for the next.
    """

    def __init__(
        self, store: RowStore, sites: Mapping[int, OpSite], slots: Sequence[Slot], max_copied_bytes: int
    ) -> None:
        """`sites` by index; `slots` are those that have ops, one or more."""
        self._store = store
        self._sites = sites
        self._slots = tuple(slots)
        self._max_copied_bytes = max_copied_bytes
        self._gone: set[int] = set()
        self._at: dict[int, _Stacks] = {}
        self.copied_bytes = 0  # of what is kept

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(slot.number for slot in self._slots)

    def serves(self, numbers: Collection[int]) -> bool:
        """Whether the stacks have these slots, and not too many others: making them anew costs copies of all."""
        has_all = {*numbers} <= {*self.numbers}
        return has_all and len(self._slots) <= _MAX_SLOTS_PER_USED * len(numbers) + _NUM_SLOTS_FREE

    def forget(self, number: int) -> None:
        """Leaves a slot, which no token uses any more, out of what is still to be made: others may write its rows."""
        self._gone.add(number)

    def at(self, site: int) -> _Stacks:
        known = self._at.get(site)
        if known is None:
            known = tuple(self._made(site))
            num_bytes = self._num_copied(known)
            if self.copied_bytes + num_bytes <= self._max_copied_bytes:
                self._at[site] = known
                self.copied_bytes += num_bytes
        return known

    @torch.inference_mode()
    def _made(self, site: int) -> Iterable[tuple[str, tuple[int, ...], Any]]:
        slots = [slot for slot in self._slots if slot.number not in self._gone]
        edits = [(slot, slot.edits[site].ops) for slot in slots if site in slot.edits]
        for name, op in SITE_OPS.items():
            having = [(slot, ops[name]) for slot, ops in edits if name in ops]
            if having:
                tensors = [{field: self._read(slot, t) for field, t in own.items()} for slot, own in having]
                yield name, tuple(slot.number for slot, _ in having), op.stack(tensors, self._sites[site])

    def _read(self, slot: Slot, stored: StoredTensor) -> torch.Tensor:
        """A view of the store where the rows follow one another, as they mostly do; else a copy. On the CPU, where its
        op looks at it: reading it here would wait for the device."""
        if stored.on_cpu is not None:
            return stored.on_cpu
        rows = slot.rows[stored.key]
        view, at = self._store.row_view(rows.width), rows.numbers
        if at and at[-1] - at[0] == len(at) - 1:
            found = view[at[0] : at[-1] + 1]
        else:
            found = view.index_select(0, send(torch.tensor(at, dtype=torch.int64), self._store.device))
        num_elements = math.prod(stored.shape) * torch.float32.itemsize // self._store.dtype.itemsize
        return found.view(-1)[:num_elements].view(torch.float32).view(stored.shape)

    def _num_copied(self, stacks: _Stacks) -> int:
        """Bytes of all that is no view of the store, in whole allocations."""
        copies = [t for *_, stacked in stacks for t in tensors_in(stacked) if not self._store.holds(t)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in copies}.values())


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
            self._tokens[key] = OpTokens(
                lanes=send(torch.tensor(lanes, dtype=torch.int64), ids.device),
                num_mixed=num_mixed,
                runs=runs_of(lanes, num_mixed),
                ids=self._ids[ids] if is_head else ids,
                kept=self._kept,
                mixed_lanes=tuple(lanes[:num_mixed]),
            )
        return self._tokens[key]
