"""The edits of a step's adapters side by side, made from the rank rows of their slots.

Owns the batch-local numbering and the forms that the ops want (`GroupEdits`): rows under one another, and a matrix per
adapter where that pays. Knows nothing about what is resident or why, nor about methods: a slot is rows and vectors.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Protocol

import torch

from server.model.site import SiteKind
from server.model.sites import SiteGroup
from server.ops import GroupEdits, SiteEdits, Stack

VECTORS = ("in_scale", "up_scale", "out_scale", "out_shift")
_IDENTITY = {"in_scale": 1.0, "up_scale": 1.0, "out_scale": 1.0, "out_shift": 0.0}
_MAX_STACK_GROWTH = 2


@dataclass(slots=True)
class Rows:
    """A tensor stored once in the buffer, for all slots that have an equal one."""

    width: int
    numbers: torch.Tensor  # (rows,) int64 on the device
    num_users: int = 0


@dataclass(frozen=True, slots=True)
class SlotEdit:
    """One slot's edit at one site: content hashes name shared rows; rank-wide vectors are kept beside the buffer."""

    down: bytes | None
    up: bytes | None
    rank: int
    vectors: Mapping[str, bytes]
    mid_scale: torch.Tensor | None
    mid_shift: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Slot:
    """A numbered row of the adapter table: the edits of one resident adapter by site index."""

    number: int
    digest: str
    edits: Mapping[int, SlotEdit]
    rows: Mapping[bytes, Rows]
    hashes: tuple[bytes, ...]  # one per use, so that releasing undoes exactly what admitting did


class RowStore(Protocol):
    """Where the rows lie: the device tier."""

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def row_view(self, width: int) -> torch.Tensor:
        """The whole store as rows of `width` elements: (all rows, width)."""

    def group(self, index: int) -> SiteGroup: ...


class StepEdits:
    """The edits of a fixed set of slots side by side, by site group; made when a group is first asked for."""

    def __init__(self, store: RowStore, slots: Sequence[Slot]) -> None:
        self.numbers = {slot.number: local for local, slot in enumerate(slots, start=1)}
        self._store = store
        self._slots = slots
        # Kept, not looked up: a slot that this step only masks may be released while its groups are made.
        self._rows = {content_hash: rows for slot in slots for content_hash, rows in slot.rows.items()}
        self._groups: dict[int, GroupEdits | None] = {}
        self._embedding_rows: dict[int, torch.Tensor] = {}
        self._foreign: dict[tuple[tuple[int, ...], ...], torch.Tensor] = {}

    def local(self, slot: int) -> int:
        """The batch-local number of a slot; 0 is the base in both."""
        return self.numbers[slot] if slot else 0

    def group(self, index: int) -> GroupEdits | None:
        if index not in self._groups:
            self._groups[index] = self._make_group(self._store.group(index))
        return self._groups[index]

    def dense(self, index: int) -> GroupEdits:
        known = self.group(index)
        assert known is not None, "no adapter of the step touches this group"
        if known.down is None and known.stack is not None:
            # Made when first asked for: a group of matrices seldom needs its rows under one another as well.
            known = self._dense_group(self._store.group(index), known)
            self._groups[index] = known
        return known

    def embedding_rows(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        site = self._store.group(index).sites[0]
        return self._store.row_view(site.d_in), self._embedding_rows[index]

    def _members(self, group: SiteGroup) -> list[list[SlotEdit | None]]:
        return [[slot.edits.get(site.index) for slot in self._slots] for site in group.sites]

    def _make_group(self, group: SiteGroup) -> GroupEdits | None:
        members = self._members(group)
        if not any(edit for edits in members for edit in edits):
            return None
        parts = [_Pairs.of(edits) for edits in members]
        edits = GroupEdits(tuple(self._site_edits(*pair) for pair in zip(members, parts, strict=True)))
        if not any(part.num_rows for part in parts):
            return edits
        is_embedding = group.sites[0].kind is SiteKind.EMBEDDING
        if not is_embedding and _is_stackable(parts, len(self._slots)):
            return replace(edits, stack=self._stack(group, members, parts))
        return self._dense_group(group, edits)

    def _dense_group(self, group: SiteGroup, edits: GroupEdits) -> GroupEdits:
        """The same edits with the rank rows of all adapters under one another."""
        members = self._members(group)
        parts = [_Pairs.of(edits) for edits in members]
        offsets = [0]
        for part in parts:
            offsets.append(offsets[-1] + part.num_rows)
        numbers = [self._rows[h].numbers for part in parts for h in part.downs]
        down = None
        if group.sites[0].kind is SiteKind.EMBEDDING:
            self._embedding_rows[group.index] = torch.cat(numbers)
        else:
            down = self._store.row_view(group.sites[0].d_in).index_select(0, torch.cat(numbers))
        owned = self._owned(parts, offsets)
        return replace(
            edits,
            members=tuple(self._with_rows(*pair) for pair in zip(edits.members, parts, strict=True)),
            down=down,
            foreign=self._foreign_mask(owned, offsets[-1]),
            mid_scale=self._mid("mid_scale", members, parts, offsets, 1.0),
            mid_shift=self._mid("mid_shift", members, parts, offsets, 0.0),
            offsets=tuple(offsets),
            columns=tuple(_as_columns(own, self._store.device) for own in owned),
        )

    def _with_rows(self, edits: SiteEdits | None, pairs: "_Pairs") -> SiteEdits | None:
        if edits is None or not pairs.num_rows:
            return edits
        rows = torch.cat([self._rows[h].numbers for h in pairs.ups])
        up = self._store.row_view(self._rows[pairs.ups[0]].width).index_select(0, rows)
        # Rows that were admitted are finite. Those that a masked adapter has given away meanwhile may hold the bits of
        # somebody's vectors, and 0 times NaN would reach its neighbours.
        up.nan_to_num_(0.0, 0.0, 0.0)
        return replace(edits, up=up, columns=(None, *(slice(a, b) if b > a else None for a, b in pairs.spans)))

    def _site_edits(self, edits: Sequence[SlotEdit | None], pairs: "_Pairs") -> SiteEdits | None:
        """The vectors of a site, without its rows."""
        if not any(edits):
            return None
        in_scale, up_scale, out_scale, out_shift = (self._stacked_vectors(name, edits) for name in VECTORS)
        return SiteEdits(pairs.num_rows > 0, None, (), in_scale, up_scale, out_scale, out_shift)

    def _stack(
        self, group: SiteGroup, members: Sequence[Sequence[SlotEdit | None]], parts: Sequence["_Pairs"]
    ) -> Stack:
        """The rank rows of a group by adapter. In float32 on a CPU, where small 16-bit products are slower."""
        rank = max(part.max_rank for part in parts)
        have_rows = [i for i, part in enumerate(parts) if part.num_rows]
        width = math.gcd(*(group.sites[i].d_out for i in have_rows))
        num_pieces = [site.d_out // width if i in have_rows else 0 for i, site in enumerate(group.sites)]
        ends = list(accumulate(num_pieces))
        spans = tuple((end - num, end) for end, num in zip(ends, num_pieces, strict=True))
        num_slots = len(self._slots)
        with_rows = [members[i] for i in have_rows]
        downs = [edit.down if edit else None for of_slot in zip(*with_rows, strict=True) for edit in of_slot]
        dtype = torch.float32 if self._store.device.type == "cpu" else self._store.dtype
        up = torch.empty(num_slots, ends[-1], rank, width, dtype=dtype, device=self._store.device)
        for i in have_rows:
            matrices = self._matrices([edit.up if edit else None for edit in members[i]], rank)
            first, last = spans[i]
            up[:, first:last] = matrices.view(num_slots, rank, last - first, width).transpose(1, 2)
        owners = tuple(place for place, i in enumerate(have_rows) for _ in range(num_pieces[i]))
        is_one_to_one = owners == tuple(range(len(owners)))
        return Stack(
            rank=rank,
            down=self._matrices(downs, rank).to(dtype).view(num_slots, -1, group.sites[0].d_in),
            up=up,
            spans=spans,
            owners=owners,
            owner_index=None if is_one_to_one else torch.tensor(owners, device=self._store.device),
            mid_scale=self._stacked_mid("mid_scale", with_rows, rank, 1.0),
            mid_shift=self._stacked_mid("mid_shift", with_rows, rank, 0.0),
        )

    def _matrices(self, hashes: Sequence[bytes | None], rank: int) -> torch.Tensor:
        """(len(hashes), rank, width): tensors of one width from the store, padded with rows of zeros."""
        lists = [self._rows[h].numbers.tolist() if h is not None else [] for h in hashes]
        padded = torch.tensor([[*numbers, *[0] * (rank - len(numbers))] for numbers in lists])
        width = next(self._rows[h].width for h in hashes if h is not None)
        rows = self._store.row_view(width).index_select(0, padded.view(-1).to(self._store.device))
        if any(len(numbers) < rank for numbers in lists):
            is_padding = torch.arange(rank)[None, :] >= torch.tensor([[len(numbers)] for numbers in lists])
            rows.masked_fill_(is_padding.view(-1, 1).to(rows.device), 0)
        return rows.view(len(hashes), rank, width)

    def _stacked_mid(
        self, name: str, members: Sequence[Sequence[SlotEdit | None]], rank: int, identity: float
    ) -> torch.Tensor | None:
        """(adapters, 1, members * rank) float32 of mid_scale or mid_shift; None when no adapter has it."""
        vectors = {
            (local, place): getattr(edit, name)
            for place, edits in enumerate(members)
            for local, edit in enumerate(edits)
            if edit is not None and getattr(edit, name) is not None
        }
        if not vectors:
            return None
        out = torch.full((len(self._slots), len(members), rank), identity, device=self._store.device)
        for (local, place), vector in vectors.items():
            out[local, place, : len(vector)] = vector
        return out.view(len(self._slots), 1, -1)

    def _stacked_vectors(self, name: str, edits: Sequence[SlotEdit | None]) -> torch.Tensor | None:
        """(S, site width) float32 vectors of one field, identity where an adapter has none; None when none has."""
        hashes = [edit.vectors.get(name) if edit else None for edit in edits]
        known = [h for h in hashes if h is not None]
        if not known:
            return None
        view = self._store.row_view(self._rows[known[0]].width)
        vectors = {h: view[self._rows[h].numbers[0]].view(torch.float32) for h in known}
        shape = (len(edits) + 1, len(vectors[known[0]]))
        stacked = torch.full(shape, _IDENTITY[name], dtype=torch.float32, device=view.device)
        for local, content_hash in enumerate(hashes, start=1):
            if content_hash is not None:
                stacked[local] = vectors[content_hash]
        return stacked

    def _owned(self, parts: Sequence["_Pairs"], offsets: Sequence[int]) -> list[list[tuple[int, int]]]:
        """For each batch-local number, the spans of the group's rows that are its own."""
        owned: list[list[tuple[int, int]]] = [[]]
        for local in range(len(self._slots)):
            spans = [(offset + part.spans[local][0], offset + part.spans[local][1])
                     for part, offset in zip(parts, offsets, strict=False)]  # fmt: skip
            owned.append([span for span in spans if span[1] > span[0]])
        return owned

    def _foreign_mask(self, owned: Sequence[Sequence[tuple[int, int]]], num_rows: int) -> torch.Tensor:
        """(S, rows) bool. One tensor for all groups alike, so that a step gathers it once."""
        key = ((num_rows,), *(tuple(n for span in own for n in span) for own in owned))
        known = self._foreign.get(key)
        if known is None:
            known = torch.ones(len(owned), num_rows, dtype=torch.bool)
            for local, own in enumerate(owned):
                for start, end in own:
                    known[local, start:end] = False
            known = known.to(self._store.device)
            self._foreign[key] = known
        return known

    def _mid(
        self,
        name: str,
        members: Sequence[Sequence[SlotEdit | None]],
        parts: Sequence["_Pairs"],
        offsets: Sequence[int],
        identity: float,
    ) -> torch.Tensor | None:
        """(S, rows) of mid_scale or mid_shift; None when no adapter of the step has it."""
        if not any(edit and getattr(edit, name) is not None for edits in members for edit in edits):
            return None
        out = torch.full((len(self._slots) + 1, offsets[-1]), identity)
        for edits, part, offset in zip(members, parts, offsets, strict=False):
            for local, (edit, span) in enumerate(zip(edits, part.spans, strict=True), start=1):
                vector = getattr(edit, name) if edit else None
                if vector is not None:
                    out[local, offset + span[0] : offset + span[1]] = vector.to(out)
        return out.to(self._store.device)


@dataclass(slots=True)
class _Pairs:
    """The distinct (down, up) pairs of a site's edits: adapters that share both tensors share one span of rows."""

    downs: list[bytes] = field(default_factory=list)
    ups: list[bytes] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)  # of each slot; empty where it has no rows here
    num_rows: int = 0

    @property
    def max_rank(self) -> int:
        return max(end - start for start, end in self.spans)

    @classmethod
    def of(cls, edits: Sequence[SlotEdit | None]) -> "_Pairs":
        pairs = cls()
        seen: dict[tuple[bytes, bytes], tuple[int, int]] = {}
        for edit in edits:
            if edit is None or edit.down is None or edit.up is None:
                pairs.spans.append((0, 0))
                continue
            key = (edit.down, edit.up)
            if key not in seen:
                seen[key] = (pairs.num_rows, pairs.num_rows + edit.rank)
                pairs.downs.append(edit.down)
                pairs.ups.append(edit.up)
                pairs.num_rows += edit.rank
            pairs.spans.append(seen[key])
        return pairs


def _is_stackable(parts: Sequence[_Pairs], num_slots: int) -> bool:
    """Whether a matrix per adapter, padded to the highest rank, is not much more than the rows themselves."""
    rank = max(part.max_rank for part in parts)
    num_rows = [part.num_rows for part in parts if part.num_rows]
    return num_slots * rank * len(num_rows) <= _MAX_STACK_GROWTH * sum(num_rows)


def _as_columns(spans: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor | slice | None:
    if not spans:
        return None
    if len(spans) == 1:
        return slice(*spans[0])
    return torch.cat([torch.arange(a, b) for a, b in spans]).to(device)
