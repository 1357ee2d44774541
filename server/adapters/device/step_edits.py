"""The edits of a step's adapters side by side, made from the rank rows of their slots.

Owns the batch-local numbering (a lane per slot) and the two forms that the ops want (`GroupEdits`): a matrix per
adapter or, where ranks differ much, all rows under one another. Knows nothing about what is resident or why, nor about
methods: a slot is rows and vectors.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Protocol

import torch

from server.model.site import SiteKind
from server.model.site_table import SiteGroup
from server.ops import GroupEdits, SiteEdits, Stack
from server.ops.sending import send

VECTORS = ("in_scale", "up_scale", "out_scale", "out_shift")
_IDENTITY = {"in_scale": 1.0, "up_scale": 1.0, "out_scale": 1.0, "out_shift": 0.0}
_MAX_STACK_GROWTH = 2
_MAX_LANES_PER_SLOT = 2


@dataclass(slots=True)
class Rows:
    """A tensor stored once in the buffer, for all slots that have an equal one."""

    width: int
    numbers: tuple[int, ...]  # of its rows; on the host, where they are looked at far more often than on the device
    num_users: int = 0


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of an op: its float32 bits fill the rows of this key one after the other, but for the last one's end."""

    key: bytes
    shape: tuple[int, ...]
    on_cpu: torch.Tensor | None = field(default=None, compare=False)  # the same, if its op looks at its numbers


@dataclass(frozen=True, slots=True)
class SlotEdit:
    """One slot's edit at one site: content hashes name shared rows; rank-wide vectors are kept on the host.

    The rows of a mix are those of its parts under one another, each where it lies for others, too.
    """

    down: tuple[bytes, ...]  # empty without rows
    up: tuple[bytes, ...]
    rank: int  # of all together
    vectors: Mapping[str, bytes]
    mid_scale: torch.Tensor | None
    mid_shift: torch.Tensor | None
    ops: Mapping[str, Mapping[str, StoredTensor]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Slot:
    """A numbered row of the adapter table: the edits of one part of a resident adapter by site index."""

    number: int
    digest: str
    edits: Mapping[int, SlotEdit]
    rows: Mapping[bytes, Rows]
    hashes: tuple[bytes, ...]  # one per use, so that releasing undoes exactly what admitting did; the first part's
    has_ops: bool = False


class RowStore(Protocol):
    """Where the rows lie: the device tier."""

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def row_view(self, width: int) -> torch.Tensor:
        """The whole store as rows of `width` elements: (all rows, width)."""

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a view of the store, and no copy."""

    def group(self, index: int) -> SiteGroup: ...


class StepEdits:
    """The edits of some slots side by side, by site group; made when a group is first asked for.

    Each slot has a lane, numbered from 1. Lanes are given on to other slots (`seat`), which where each adapter has its
    own matrix costs the copies of the newcomer alone. What is in a lane that no token of a step uses reaches nobody.
    """

    def __init__(self, store: RowStore, slots: Sequence[Slot]) -> None:
        self._store = store
        self._lanes: list[Slot | None] = list(slots)
        self._lane_of = {slot.number: lane for lane, slot in enumerate(slots, start=1)}
        self._rows = self._used_rows()
        self._groups: dict[int, GroupEdits | None] = {}
        self._embedding_rows: dict[int, torch.Tensor] = {}
        self._foreign: dict[tuple[tuple[int, ...], ...], torch.Tensor] = {}

    @property
    def num_lanes(self) -> int:
        return len(self._lanes)

    def local(self, slot: int) -> int:
        """The batch-local number of a slot; 0 is the base in both."""
        return self._lane_of[slot] if slot else 0

    def seat(self, slots: Sequence[Slot]) -> bool:
        """Gives every one of these slots a lane, from among those of the others; False if there are not enough lanes,
        or so many that most would be computed for nothing. Then nothing has changed."""
        wanted = {slot.number for slot in slots}
        if len(self._lanes) > _MAX_LANES_PER_SLOT * len(wanted):
            return False
        newcomers = [slot for slot in slots if slot.number not in self._lane_of]
        # Empty ones first: who has left the step but not the device may come back.
        free = [lane for lane, slot in enumerate(self._lanes, start=1) if slot is None]
        free += [lane for number, lane in self._lane_of.items() if number not in wanted]
        if len(newcomers) > len(free):
            return False
        self._give(dict(zip(free, newcomers, strict=False)))
        return True

    def vacate(self, slot: int) -> None:
        """Takes the lane of a slot that has left the device, if it has one."""
        lane = self._lane_of.pop(slot, None)
        if lane is not None:
            self._lanes[lane - 1] = None

    @torch.inference_mode()  # in which the forward pass has made what is written to
    def _give(self, lanes: Mapping[int, Slot]) -> None:
        """All at once: what a group costs, whoever comes, is then paid once."""
        if not lanes:
            return
        for lane, slot in lanes.items():
            leaving = self._lanes[lane - 1]
            if leaving is not None:
                del self._lane_of[leaving.number]
            self._lanes[lane - 1] = slot
            self._lane_of[slot.number] = lane
        self._rows = self._used_rows()
        self._foreign.clear()
        self._groups = {
            index: rewritten
            for index, edits in self._groups.items()
            if (rewritten := self._rewritten(self._store.group(index), edits, lanes)) is not None
        }

    def _used_rows(self) -> dict[bytes, Rows]:
        # Kept, not looked up: a slot that this step does not use may be released while its groups are made.
        return {content_hash: rows for slot in self._lanes if slot for content_hash, rows in slot.rows.items()}

    def _rewritten(self, group: SiteGroup, edits: GroupEdits | None, lanes: Mapping[int, Slot]) -> GroupEdits | None:
        """A group that has been made, with slots' edits written into their lanes; None where its form does not allow
        that, and where it has none and needs none."""
        if edits is None or edits.stack is None:
            return None
        for slot in lanes.values():
            if not _has_room(edits.stack, [slot.edits.get(site.index) for site in group.sites]):
                return None
        members = self._members(group)
        if not _is_stackable(members, edits.stack.rank):
            return None
        self._write_stack(group, edits.stack, members, [lane - 1 for lane in lanes])
        of_sites = list(zip(edits.members, members, strict=True))
        return replace(edits, members=tuple(self._with_vectors(known, of_lane, lanes) for known, of_lane in of_sites))

    def _with_vectors(
        self, edits: SiteEdits | None, of_lane: Sequence[SlotEdit | None], lanes: Collection[int]
    ) -> SiteEdits | None:
        """A site's stacked vectors with those of these lanes; without the fields that no slot has any more."""
        if edits is None and not any(of_lane[lane - 1] for lane in lanes):
            return None
        edits = edits or SiteEdits()
        vectors: dict[str, Any] = {
            name: self._with_vector(name, getattr(edits, name), of_lane, lanes) for name in VECTORS
        }
        return replace(edits, **vectors)

    def _with_vector(
        self, name: str, stacked: torch.Tensor | None, of_lane: Sequence[SlotEdit | None], lanes: Collection[int]
    ) -> torch.Tensor | None:
        if not any(edit and name in edit.vectors for edit in of_lane):
            return None
        for lane in lanes:
            own = of_lane[lane - 1]
            if own is not None and name in own.vectors:
                vector = self._vector(own.vectors[name])
                if stacked is None:
                    stacked = vector.new_full((len(of_lane) + 1, len(vector)), _IDENTITY[name])
                stacked[lane] = vector
            elif stacked is not None:
                stacked[lane] = _IDENTITY[name]
        return stacked

    def group(self, index: int) -> GroupEdits | None:
        if index not in self._groups:
            self._groups[index] = self._make_group(self._store.group(index))
        return self._groups[index]

    def embedding_rows(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        site = self._store.group(index).sites[0]
        return self._store.row_view(site.d_in), self._embedding_rows[index]

    def _members(self, group: SiteGroup) -> list[list[SlotEdit | None]]:
        return [[slot.edits.get(site.index) if slot else None for slot in self._lanes] for site in group.sites]

    def _make_group(self, group: SiteGroup) -> GroupEdits | None:
        members = self._members(group)
        if not any(edit for edits in members for edit in edits):
            return None
        parts = [_Pairs.of(edits) for edits in members]
        edits = GroupEdits(tuple(self._site_edits(*pair) for pair in zip(members, parts, strict=True)))
        if not any(part.num_rows for part in parts):
            return edits
        is_embedding = group.sites[0].kind is SiteKind.EMBEDDING
        if not is_embedding and _is_stackable(members, max(part.max_rank for part in parts)):
            return replace(edits, stack=self._stack(group, members, parts))
        return self._dense_group(group, edits, members, parts)

    def _dense_group(
        self,
        group: SiteGroup,
        edits: GroupEdits,
        members: Sequence[Sequence[SlotEdit | None]],
        parts: Sequence["_Pairs"],
    ) -> GroupEdits:
        """The same edits with the rank rows of all adapters under one another."""
        offsets = [0]
        for part in parts:
            offsets.append(offsets[-1] + part.num_rows)
        numbers = self._numbers(h for part in parts for h in part.downs)
        down = None
        if group.sites[0].kind is SiteKind.EMBEDDING:
            self._embedding_rows[group.index] = numbers
        else:
            down = self._store.row_view(group.sites[0].d_in).index_select(0, numbers)
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
        rows = self._numbers(pairs.ups)
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
        owners = tuple(place for place, i in enumerate(have_rows) for _ in range(num_pieces[i]))
        is_one_to_one = owners == tuple(range(len(owners)))
        num, num_rows, device = len(self._lanes), len(have_rows) * rank, self._store.device
        dtype = torch.float32 if device.type == "cpu" else self._store.dtype
        edits = [edit for i in have_rows for edit in members[i] if edit]
        has_mid_scale = any(edit.mid_scale is not None for edit in edits)
        has_mid_shift = any(edit.mid_shift is not None for edit in edits)
        stack = Stack(
            rank=rank,
            down=torch.empty(num, num_rows, group.sites[0].d_in, dtype=dtype, device=device),
            up=torch.empty(num, ends[-1], rank, width, dtype=dtype, device=device),
            spans=tuple((end - num, end) for end, num in zip(ends, num_pieces, strict=True)),
            owners=owners,
            owner_index=None if is_one_to_one else send(torch.tensor(owners), device),
            mid_scale=torch.empty(num, 1, num_rows, device=device) if has_mid_scale else None,
            mid_shift=torch.empty(num, 1, num_rows, device=device) if has_mid_shift else None,
        )
        self._write_stack(group, stack, members, range(num))
        return stack

    def _write_stack(
        self, group: SiteGroup, stack: Stack, members: Sequence[Sequence[SlotEdit | None]], lanes: Sequence[int]
    ) -> None:
        """Copies the rank rows of the slots in these lanes (counted from 0) into their matrices."""
        have_rows = [i for i, (first, last) in enumerate(stack.spans) if last > first]
        of_lane = [[members[i][lane] for i in have_rows] for lane in lanes]
        downs = [edit.down if edit else () for edits in of_lane for edit in edits]
        matrices = self._matrices(downs, stack.rank, group.sites[0].d_in)
        for lane, matrix in zip(lanes, matrices.view(len(lanes), *stack.down.shape[1:]), strict=True):
            stack.down[lane] = matrix  # one by one: an index for all would want one dtype, and so a copy more
        for place, i in enumerate(have_rows):
            ups = [edit.up if (edit := edits[place]) else () for edits in of_lane]
            matrices = self._matrices(ups, stack.rank, group.sites[i].d_out)
            pieces = matrices.view(len(lanes), stack.rank, -1, stack.up.shape[3]).transpose(1, 2)
            for lane, of_member in zip(lanes, pieces, strict=True):
                stack.up[lane, slice(*stack.spans[i])] = of_member
        _write_middles(stack, of_lane, lanes)

    def _numbers(self, hashes: Iterable[bytes]) -> torch.Tensor:
        """The row numbers of these tensors, one after the other, on the device: (rows,) int64."""
        numbers = [number for content_hash in hashes for number in self._rows[content_hash].numbers]
        return send(torch.tensor(numbers, dtype=torch.int64), self._store.device)

    def _matrices(self, stacks: Sequence[tuple[bytes, ...]], rank: int, width: int) -> torch.Tensor:
        """(len(stacks), rank, width): tensors of one width from the store, padded with rows of zeros."""
        lists = [[number for h in hashes for number in self._rows[h].numbers] for hashes in stacks]
        padded = torch.tensor([[*numbers, *[0] * (rank - len(numbers))] for numbers in lists])
        rows = self._store.row_view(width).index_select(0, send(padded.view(-1), self._store.device))
        if any(len(numbers) < rank for numbers in lists):
            is_padding = torch.arange(rank)[None, :] >= torch.tensor([[len(numbers)] for numbers in lists])
            rows.masked_fill_(send(is_padding.view(-1, 1), self._store.device), 0)
        return rows.view(len(stacks), rank, width)

    def _stacked_vectors(self, name: str, edits: Sequence[SlotEdit | None]) -> torch.Tensor | None:
        """(S, site width) float32 vectors of one field, identity where an adapter has none; None when none has."""
        vectors = [self._vector(edit.vectors[name]) if edit and name in edit.vectors else None for edit in edits]
        width = next((len(vector) for vector in vectors if vector is not None), None)
        if width is None:
            return None
        shape = (len(edits) + 1, width)
        stacked = torch.full(shape, _IDENTITY[name], dtype=torch.float32, device=self._store.device)
        for lane, vector in enumerate(vectors, start=1):
            if vector is not None:
                stacked[lane] = vector
        return stacked

    def _vector(self, content_hash: bytes) -> torch.Tensor:
        """A vector's float32 numbers, whose bits are a row of the store."""
        rows = self._rows[content_hash]
        return self._store.row_view(rows.width)[rows.numbers[0]].view(torch.float32)

    def _owned(self, parts: Sequence["_Pairs"], offsets: Sequence[int]) -> list[list[tuple[int, int]]]:
        """For each batch-local number, the spans of the group's rows that are its own."""
        owned: list[list[tuple[int, int]]] = [[]]
        for local in range(len(self._lanes)):
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
            known = self._foreign[key] = send(known, self._store.device)
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
        out = torch.full((len(self._lanes) + 1, offsets[-1]), identity)
        for edits, part, offset in zip(members, parts, offsets, strict=False):
            for local, (edit, span) in enumerate(zip(edits, part.spans, strict=True), start=1):
                vector = getattr(edit, name) if edit else None
                if vector is not None:
                    out[local, offset + span[0] : offset + span[1]] = vector
        return send(out, self._store.device)


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
        seen: dict[tuple[tuple[bytes, ...], tuple[bytes, ...]], tuple[int, int]] = {}
        for edit in edits:
            if edit is None or not edit.down or not edit.up:
                pairs.spans.append((0, 0))
                continue
            key = (edit.down, edit.up)
            if key not in seen:
                seen[key] = (pairs.num_rows, pairs.num_rows + edit.rank)
                pairs.downs.extend(edit.down)
                pairs.ups.extend(edit.up)
                pairs.num_rows += edit.rank
            pairs.spans.append(seen[key])
        return pairs


def _is_stackable(members: Sequence[Sequence[SlotEdit | None]], rank: int) -> bool:
    """Whether a matrix of this rank per adapter is not much more than the distinct rows themselves."""
    distinct = [{(edit.down, edit.up): edit.rank for edit in edits if edit} for edits in members]
    num_rows = [num for ranks in distinct if (num := sum(ranks.values()))]
    return len(members[0]) * rank * len(num_rows) <= _MAX_STACK_GROWTH * sum(num_rows)


def _write_middles(stack: Stack, of_lane: Sequence[Sequence[SlotEdit | None]], lanes: Sequence[int]) -> None:
    """Writes what scales and shifts the hidden activations of these lanes; `of_lane` has members with rows only."""
    for name, stacked in (("mid_scale", stack.mid_scale), ("mid_shift", stack.mid_shift)):
        if stacked is None:
            continue
        values = torch.full((len(lanes), *stacked.shape[1:]), 1.0 if name == "mid_scale" else 0.0)
        for own, edits in zip(values, of_lane, strict=True):
            for place, edit in enumerate(edits):
                vector = getattr(edit, name) if edit is not None else None
                if vector is not None:
                    own[0, place * stack.rank : place * stack.rank + len(vector)] = vector
        for lane, own in zip(lanes, send(values, stacked.device), strict=True):
            stacked[lane] = own


def _has_room(stack: Stack, of_slot: Sequence[SlotEdit | None]) -> bool:
    """Whether the matrices of a group have a place for all the rows that a slot has there."""
    for (first, last), edit in zip(stack.spans, of_slot, strict=True):
        if edit is None or edit.rank == 0:
            continue
        if first == last or edit.rank > stack.rank:
            return False
        if (edit.mid_scale is not None and stack.mid_scale is None) or (
            edit.mid_shift is not None and stack.mid_shift is None
        ):
            return False
    return True


def _as_columns(spans: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor | slice | None:
    if not spans:
        return None
    if len(spans) == 1:
        return slice(*spans[0])
    return send(torch.cat([torch.arange(a, b) for a, b in spans]), device)
