"""The device tier's tables for kernels that read rank rows where they lie: a sheet for each slot, and a step's view.

Owns the sheets' places, and which slots have the same rows everywhere (their class). A sheet changes when its slot is
admitted or released, never per step. Knows nothing about where rows come from or what reads them.
"""

import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch

from server.adapters.device.rows import stride
from server.adapters.device.step_edits import Slot, SlotEdit
from server.model.site import SiteKind
from server.model.site_table import SiteTable
from server.ops.runs import TokenRuns
from server.ops.sending import send
from server.ops.sheets import (
    IN_SCALE,
    OUT_SCALE,
    OUT_SHIFT,
    UP_SCALE,
    GroupTable,
    Sheets,
    SiteRows,
    StepTables,
    make_sheet,
)

_VECTORS = {"in_scale": IN_SCALE, "up_scale": UP_SCALE, "out_scale": OUT_SCALE, "out_shift": OUT_SHIFT}
_FIRST_NUM_SLOTS = 64
# Ranks are rounded up to this where they set the width of a tensor, so that its rows are aligned and few shapes occur.
_RANK_STEP = 16

# The tensors that the rows of each site come from. Empty for adapters of vectors alone: these share a class.
_Key = tuple[tuple[int, tuple[bytes, ...]], ...]


@dataclass(frozen=True, slots=True)
class _Entry:
    """What is kept of a slot: its sheet, and bit sets over the indices of sites."""

    sheet: torch.Tensor  # on the device; kept alive for its address
    keys: tuple[_Key, _Key]  # of `down` and of `up`
    edited: int
    scaled: int  # sites with an in_scale
    with_rows: int


@dataclass(slots=True)
class _Class:
    """Slots with the same rows everywhere."""

    number: int
    num_slots: int = 0


class SlotTables:
    """The sheets of the slots of one device tier. Its owner's lock guards `put`, `drop` and `step`."""

    def __init__(self, sites: SiteTable, buffer: torch.Tensor) -> None:
        self._sites = sites
        self._buffer = buffer
        self._num_sites = sites.num_sites
        self._head = _bits(site.index for site in sites.sites if site.is_head)
        self._blank = send(make_sheet(self._num_sites, {}), buffer.device)
        self._addresses = torch.full((_FIRST_NUM_SLOTS,), self._blank.data_ptr(), device=buffer.device)
        self._classes = torch.zeros(2, _FIRST_NUM_SLOTS, dtype=torch.int64)  # on the CPU; 0 for no edits
        self._class_of: tuple[dict[_Key, _Class], dict[_Key, _Class]] = ({}, {})
        self._class_numbers = itertools.count(1)
        self._entries: dict[int, _Entry] = {}
        self._groups: dict[int, GroupTable] = {}
        # These only ever grow: a kernel, and a graph that holds it, is made for the largest there has been.
        self._max_rank = _RANK_STEP
        self._has_middle = False
        self._has_vectors = False
        self._edited = self._scaled = self._with_rows = 0
        # The last step's slots and tables: decodes go on with the same adapters in the same order.
        self._last: tuple[tuple[Sequence[int], Sequence[int]], StepTables | None] | None = None

    def put(self, slot: Slot) -> None:
        """Makes the sheet of a slot whose number no other slot has. The rows it names are in the buffer.

        What this sends takes its place in the line of the steps, on their stream: those before know nothing of the
        slot, and those that do come after it.
        """
        self._last = None
        rows = _site_rows(slot)
        entry = _Entry(
            sheet=send(make_sheet(self._num_sites, rows), self._buffer.device),
            keys=(_key(slot.edits, "down"), _key(slot.edits, "up")),
            edited=_bits(rows),
            scaled=_bits(site for site, own in rows.items() if IN_SCALE in own.vectors),
            with_rows=_bits(site for site, own in rows.items() if own.down),
        )
        while slot.number >= len(self._addresses):
            self._grow()
        self._entries[slot.number] = entry
        self._addresses[slot.number] = entry.sheet.data_ptr()
        for classes, known, key in zip(self._classes, self._class_of, entry.keys, strict=True):
            own = known.setdefault(key, _Class(next(self._class_numbers)))
            own.num_slots += 1
            classes[slot.number] = own.number
        ranks = [-(-len(site.down) // _RANK_STEP) * _RANK_STEP for site in rows.values()]
        self._max_rank = max(self._max_rank, *ranks, 0)  # a part of an adapter may edit nothing
        self._has_middle |= any(own.mid_scale is not None or own.mid_shift is not None for own in rows.values())
        self._has_vectors |= any(own.vectors.keys() - {IN_SCALE} for own in rows.values())
        self._edited |= entry.edited
        self._scaled |= entry.scaled
        self._with_rows |= entry.with_rows

    def drop(self, number: int) -> None:
        """Forgets a slot's sheet; its number then stands for the bare base."""
        self._last = None
        entry = self._entries.pop(number)
        self._addresses[number] = self._blank.data_ptr()
        self._classes[:, number] = 0
        for known, key in zip(self._class_of, entry.keys, strict=True):
            known[key].num_slots -= 1
            if known[key].num_slots == 0:
                del known[key]

    def step(self, slots: Sequence[int], kept: Sequence[int]) -> StepTables | None:
        """What kernels need for a step: the slot of each token, and of each row that the head computes, 0 for the base.

        None when the step is the bare base's alone.
        """
        if self._last is None or self._last[0] != (slots, kept):
            self._last = (slots, kept), self._make_step(slots, kept)
        return self._last[1]

    def _make_step(self, slots: Sequence[int], kept: Sequence[int]) -> StepTables | None:
        entries = [self._entries[number] for number in {*slots} - {0}]
        if not entries:
            return None
        edited = reduce(or_, (entry.edited for entry in entries))
        return StepTables(
            sheets=Sheets(self._buffer, self._addresses, self._max_rank, self._has_middle, self._has_vectors),
            group=self._group,
            tokens=self._runs(slots),
            kept=self._runs(kept) if edited & self._head else None,
            edited=edited,
            scaled=reduce(or_, (entry.scaled for entry in entries)),
            with_rows=reduce(or_, (entry.with_rows for entry in entries)),
        )

    def static_runs(self, slots: Sequence[int]) -> list[int]:
        """The numbers of `TokenRuns.of_static` for tokens with these slots."""
        numbers = TokenRuns.static_numbers(torch.tensor(slots, dtype=torch.int64), self._classes[0], self._classes[1])
        return numbers.tolist()

    def static_step(self, tokens: TokenRuns) -> StepTables:
        """What kernels need for a step of any slots: they look wherever a slot has had an edit since the start.

        For a step whose rows are all computed by the head. It holds as long as `static_shape` does.
        """
        return StepTables(
            sheets=Sheets(self._buffer, self._addresses, self._max_rank, self._has_middle, self._has_vectors),
            group=self._group,
            tokens=tokens,
            kept=tokens if self._edited & self._head else None,
            edited=self._edited,
            scaled=self._scaled,
            with_rows=self._with_rows,
        )

    @property
    def static_shape(self) -> Hashable:
        """What a static step depends on; it changes when a new adapter edits what none has edited before it."""
        flags = self._max_rank, self._has_middle, self._has_vectors
        return self._addresses.data_ptr(), *flags, self._edited, self._scaled, self._with_rows

    def _runs(self, slots: Sequence[int]) -> TokenRuns:
        numbers = torch.tensor(slots, dtype=torch.int64)
        return TokenRuns.of(numbers, self._classes[0], self._classes[1], self._buffer.device)

    def _grow(self) -> None:
        """Twice as many slots, in tensors of their own: a step under way keeps those that it was given."""
        blanks = torch.full_like(self._addresses, self._blank.data_ptr())
        self._addresses = torch.cat([self._addresses, blanks])
        self._classes = torch.cat([self._classes, torch.zeros_like(self._classes)], dim=1)

    def _group(self, index: int) -> GroupTable:
        known = self._groups.get(index)
        if known is None:
            known = self._groups[index] = self._make_group(index)
        return known

    def _make_group(self, index: int) -> GroupTable:
        sites = self._sites.groups[index].sites
        d_in, widths = sites[0].d_in, tuple(site.d_out for site in sites)
        members = [
            [site.index, site.d_out, sum(widths[:member]), stride(site.d_out), self._vector_stride(site.d_out)]
            for member, site in enumerate(sites)
        ]
        return GroupTable(
            sites=_bits(site.index for site in sites),
            is_embedding=sites[0].kind is SiteKind.EMBEDDING,
            d_in=d_in,
            widths=widths,
            down_stride=stride(d_in),
            in_stride=self._vector_stride(d_in),
            members=send(torch.tensor(members, dtype=torch.int32), self._buffer.device),
        )

    def _vector_stride(self, width: int) -> int:
        """float32 values from one vector to the next: a vector is a row that holds its bits, in the buffer's dtype."""
        per_float = 4 // self._buffer.element_size()
        return stride(width * per_float) // per_float


def _bits(sites: Iterable[int]) -> int:
    return reduce(or_, (1 << site for site in sites), 0)


def _key(edits: Mapping[int, SlotEdit], name: str) -> _Key:
    return tuple((site, getattr(edit, name)) for site, edit in sorted(edits.items()) if edit.rank)


def _site_rows(slot: Slot) -> dict[int, SiteRows]:
    """The slot's edits with row numbers in place of hashes."""

    def joined(hashes: Sequence[bytes]) -> tuple[int, ...]:
        return tuple(number for name in hashes for number in slot.rows[name].numbers)

    return {
        site: SiteRows(
            down=joined(edit.down),
            up=joined(edit.up),
            mid_scale=edit.mid_scale,
            mid_shift=edit.mid_shift,
            vectors={_VECTORS[name]: slot.rows[content_hash].numbers[0] for name, content_hash in edit.vectors.items()},
        )
        for site, edit in slot.edits.items()
    }
