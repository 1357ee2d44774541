"""The device tier: the adapters whose rank rows lie in the device's one flat buffer.

Owns the buffer, the slots, the sharing of equal tensors, and the step edits kept for the next step. Knows nothing
about names, versions, leases or who decides what is resident; and nothing of methods: a slot is rows and vectors.
"""

import threading
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice

import torch
import torch.nn.functional as F

from server.adapters.device.op_edits import OpEdits, StepOps
from server.adapters.device.rows import NoRoom, RowAllocator, laid_out, stride
from server.adapters.device.slot_tables import SlotTables
from server.adapters.device.step_edits import VECTORS, Rows, Slot, SlotEdit, StepEdits, StoredTensor
from server.adapters.device.transfers import Transfers
from server.adapters.host_adapter import HostAdapter, HostEdit, HostTensor
from server.adapters.positions import Reach
from server.model.site import SiteKind
from server.model.site_table import SiteGroup, SiteTable
from server.ops.runs import TokenRuns
from server.ops.sending import pinned, send
from server.ops.sheets import StepTables
from server.ops.site_ops import SITE_OPS

_AWAITED_BYTES = 4 << 20
_COPIED_SHARE = 8  # copies of ops' tensors that are kept from step to step: at most one part in so many of the buffer


@dataclass(frozen=True, slots=True)
class _Laid:
    """A tensor of the host, and how it lies in the buffer."""

    key: bytes  # equal for what is equal and lies alike
    tensor: torch.Tensor
    num_rows: int
    width: int  # elements of the buffer's dtype

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """(rows, width) of the buffer's dtype: the tensor's numbers, or the bits of what is kept in another dtype."""
        flat = self.tensor.view(-1)
        bits = flat if flat.dtype == dtype else flat.view(dtype)
        num_missing = self.num_rows * self.width - bits.numel()
        return (F.pad(bits, (0, num_missing)) if num_missing else bits).view(self.num_rows, self.width)


@dataclass(frozen=True, slots=True)
class _Placement:
    """An adapter on its way to the device."""

    adapter: HostAdapter
    hashes: tuple[bytes, ...]  # one per use
    own: Mapping[bytes, Rows]  # allocated for it; the rest of its rows others had brought
    laid: Mapping[bytes, _Laid]  # what is to lie in them


class DeviceTier:
    """The resident adapters of one base.

    `reserve`, `place`, `abandon`, `admit` and `release` may be called from any thread, one at a time; `copy` from any
    number of threads, and `before_step` and `batch` from the engine's only, meanwhile.
    """

    def __init__(
        self, sites: SiteTable, max_bytes: int, dtype: torch.dtype, device: torch.device, *, has_tables: bool = False
    ) -> None:
        """With `has_tables`, `tables` says what kernels need that read rows where they lie; `batch` copies them."""
        self.device = device
        self.dtype = dtype
        self._sites = sites
        num_elements = max_bytes // dtype.itemsize
        self._buffer = torch.zeros(num_elements, dtype=dtype, device=device)
        self._slab_elements = _slab_elements(num_elements, sites)
        self._allocator = RowAllocator(num_elements, self._slab_elements)
        self._shared: dict[bytes, Rows] = {}
        self._num_row_uses = self._num_shared_rows = 0
        self._slots: dict[int, Slot] = {}
        self._slot_of: dict[str, int] = {}
        self._placements: dict[str, _Placement] = {}
        self._step_edits: StepEdits | None = None
        self.max_copied_bytes = max_bytes // _COPIED_SHARE
        self._op_edits: OpEdits | None = None
        self._reaches: dict[int, Reach] = {}  # of the slots of first parts; of those that have more than that part
        self._tables = SlotTables(sites, self._buffer) if has_tables else None
        self._lock = threading.RLock()
        self._transfers = Transfers.to(device)  # after the buffer has been filled with zeros

    @property
    def capacity_bytes(self) -> int:
        return self._allocator.num_elements * self.dtype.itemsize

    @property
    def used_bytes(self) -> int:
        return self._allocator.used_elements * self.dtype.itemsize

    @property
    def free_bytes(self) -> int:
        return self._allocator.free_elements * self.dtype.itemsize

    @property
    def waste_bytes(self) -> int:
        return self._allocator.waste_elements * self.dtype.itemsize

    @property
    def copied_bytes(self) -> int:
        """Bytes of copies of ops' tensors, beside the buffer, that are kept for the next step."""
        edits = self._op_edits
        return 0 if edits is None else edits.copied_bytes

    @property
    def num_used_rows(self) -> int:
        """Rows in use, of any width: each is a number that is kept on the host."""
        return self._allocator.num_used_rows

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    @property
    def num_rows(self) -> int:
        """Rank rows in use, vectors as wide as a site counted."""
        return self._allocator.num_used_rows

    @property
    def num_shared_rows(self) -> int:
        """Those of them that are used in more than one place, by one adapter or by several."""
        return self._num_shared_rows

    @property
    def num_row_uses(self) -> int:
        """The rows that there would be if every place had its own."""
        return self._num_row_uses

    def resident_bytes(self, adapter: HostAdapter) -> int:
        """Bytes that the adapter's rows take when it shares none with other adapters."""
        return sum(stride(width) * num for width, num in self._requests(adapter)) * self.dtype.itemsize

    def needed_bytes(self, adapter: HostAdapter) -> int:
        """Bytes of the smallest device, cut into slabs as this one, that holds the adapter and nothing else.

        More than its rows: what is lost at the edges of slabs counts. It fits when everything else has made room if,
        and only if, this is at most `capacity_bytes`.
        """
        return self._allocator.elements_alone(self._requests(adapter)) * self.dtype.itemsize

    def _requests(self, adapter: HostAdapter) -> list[tuple[int, int]]:
        """(width, rows) of the adapter's distinct tensors, as they are allocated."""
        distinct = {laid.key: laid for laid in self._laid(adapter)}
        return list(_num_rows(distinct.values()).items())

    def admit(self, digest: str, adapter: HostAdapter) -> int:
        """Copies the adapter's rows to the device and returns its slot number; the number it has, if it is there.

        Raises NoRoom, with nothing changed, when the rows do not fit beside what is resident.
        """
        known = self._slot_of.get(digest)
        if known is not None:
            return known
        self.reserve(digest, adapter)
        self.copy(digest)
        return self.place(digest)

    def reserve(self, digest: str, adapter: HostAdapter) -> None:
        """Allocates rows for what of the adapter is not here yet, and holds on to what is.

        Raises NoRoom, with nothing changed. What was reserved is copied and placed, or abandoned.
        """
        uses = list(self._laid(adapter))
        missing = {laid.key: laid for laid in uses if laid.key not in self._shared}
        own = self._allocate(missing)
        hashes = tuple(laid.key for laid in uses)
        for content_hash in hashes:
            rows = own[content_hash] if content_hash in own else self._shared[content_hash]
            self._note_uses(rows, 1)
        self._placements[digest] = _Placement(adapter, hashes, own, missing)

    def copy(self, digest: str) -> None:
        """Fills the rows that were reserved, from any thread and beside anything else: nobody reads them yet."""
        placement = self._placements[digest]
        arrival = self._transfers.start(lambda: self._fill(placement))
        # What a step would feel is waited for by this thread; the rest by the next step, on the device.
        if sum(one.num_rows * one.width for one in placement.laid.values()) * self.dtype.itemsize > _AWAITED_BYTES:
            arrival.wait_here()
        else:
            self._transfers.hold_steps(arrival)

    def _fill(self, placement: _Placement) -> None:
        views = {width: self.row_view(width) for width in {rows.width for rows in placement.own.values()}}
        for content_hash, rows in placement.own.items():
            matrix, view, at = placement.laid[content_hash].matrix(self.dtype), views[rows.width], rows.numbers
            # A slice where it can be one: an index costs several times the copy of a small tensor.
            if at and at[-1] - at[0] == len(at) - 1:
                view[at[0] : at[-1] + 1].copy_(pinned(matrix, self.device), non_blocking=True)
            else:
                view[send(torch.tensor(at, dtype=torch.int64), self.device)] = send(matrix, self.device)

    def place(self, digest: str) -> int:
        """Gives a slot to what was copied, and returns its number. If that fails, it is still to be abandoned."""
        placement = self._placements[digest]
        twice: list[Rows] = []
        with self._lock:
            slots = self._make_slots(digest, placement)
            for slot in slots:
                if self._tables is not None:
                    self._tables.put(slot)
            del self._placements[digest]  # from here on nothing can fail
            for content_hash, rows in placement.own.items():
                known = self._shared.setdefault(content_hash, rows)
                if known is not rows:  # another adapter has brought it meanwhile
                    self._note_uses(known, rows.num_users)
                    self._note_uses(rows, -rows.num_users)
                    twice.append(rows)
            self._slots.update({slot.number: slot for slot in slots})
            first = self._slot_of[digest] = slots[0].number
            self._note_reach(placement.adapter, [slot.number for slot in slots])
        self._free(twice)
        return first

    def reach(self, slot: int) -> Reach | None:
        """What the adapter of this slot does to a sequence's positions; None: one part, everywhere."""
        return self._reaches.get(slot)

    def abandon(self, digest: str) -> None:
        """Gives back what was reserved, copied or not."""
        placement = self._placements.pop(digest)
        for rows in placement.own.values():
            self._note_uses(rows, -rows.num_users)
        self._free(placement.own.values())
        self._let_go(content_hash for content_hash in placement.hashes if content_hash not in placement.own)

    def release(self, digest: str) -> int:
        """Frees the adapter's slot and the rows that nobody else uses; returns the bytes freed."""
        with self._lock:
            first = self._slot_of.pop(digest)
            reach = self._reaches.pop(first, None)
            before = self._allocator.used_elements
            for number in (first,) if reach is None else reach.slots:
                self._vacate(self._slots.pop(number))
            return (before - self._allocator.used_elements) * self.dtype.itemsize

    def before_step(self) -> None:
        """To be called by the engine's thread before it queues a step, however that reads the rows."""
        self._transfers.before_step()

    def batch(self, slots: Collection[int]) -> StepEdits:
        """The edits of a step whose tokens use these slots (not empty, no zeros); valid until the next call.

        They are those of the last step, in which who comes takes the lane of one who went: making them anew costs
        copies of all their rows.
        """
        with self._lock:
            wanted = [self._slots[number] for number in sorted(slots)]
            # Kept only once all has gone well: lanes that were half written would serve their former owners' rows.
            edits, self._step_edits = self._step_edits, None
            if edits is None or not edits.seat(wanted):
                edits = None  # first, so that there are never two
                edits = StepEdits(self, wanted)
            self._step_edits = edits
            return edits

    def ops(
        self, slots: Sequence[int], kept: Sequence[int], num_mixed: int, ids: torch.Tensor, keep: torch.Tensor
    ) -> StepOps | None:
        """What the adapters of a step do beside the normal form, with the arguments of `StepOps`; None for nothing."""
        with self._lock:
            numbers = tuple(number for number in sorted({*slots} - {0}) if self._slots[number].has_ops)
            if not numbers:
                self._op_edits = None
                return None
            if self._op_edits is None or not self._op_edits.serves(numbers):
                self._op_edits = None  # first, so that there are never two
                having = [self._slots[number] for number in numbers]
                self._op_edits = OpEdits(self, self._sites.by_index, having, self.max_copied_bytes)
            return StepOps(self._op_edits, slots, kept, num_mixed, ids, keep)

    def rest(self) -> None:
        """Lets go of the copies of ops' tensors, which are made anew when a step needs them."""
        with self._lock:
            self._op_edits = None

    def tables(self, slots: Sequence[int], kept: Sequence[int]) -> StepTables | None:
        """What kernels need for a step: the slot of each token, and of each row that the head computes, 0 for the base.

        None when the step is the bare base's alone.
        """
        with self._lock:
            return self._known_tables.step(slots, kept)

    def has_ops(self, slots: Iterable[int]) -> bool:
        """Whether an adapter in one of these slots, 0 for the base, does anything beside the normal form."""
        with self._lock:
            return any(self._slots[number].has_ops for number in slots if number)

    def static_runs(self, slots: Sequence[int]) -> list[int]:
        """`SlotTables.static_runs`."""
        with self._lock:
            return self._known_tables.static_runs(slots)

    def static_tables(self, tokens: TokenRuns) -> StepTables:
        """`SlotTables.static_step`."""
        with self._lock:
            return self._known_tables.static_step(tokens)

    def static_shape(self) -> Hashable:
        """`SlotTables.static_shape`."""
        with self._lock:
            return self._known_tables.static_shape

    @property
    def _known_tables(self) -> SlotTables:
        assert self._tables is not None, "this tier was made without tables"
        return self._tables

    def group(self, index: int) -> SiteGroup:
        return self._sites.groups[index]

    def row_view(self, width: int) -> torch.Tensor:
        """The whole buffer as rows of `width` elements: (all rows, width)."""
        step = stride(width)
        num = self._buffer.numel() // step
        return self._buffer[: num * step].view(num, step)[:, :width]

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a view of the buffer, and no copy."""
        return tensor.untyped_storage().data_ptr() == self._buffer.untyped_storage().data_ptr()

    def _laid(self, adapter: HostAdapter) -> Iterator[_Laid]:
        """The adapter's tensors that live in the buffer: rank rows, vectors as wide as a site, all of ops."""
        for edit in adapter.all_edits():
            for name, tensors in edit.tensors().items():
                if name not in ("mid_scale", "mid_shift"):
                    yield from map(self._as_rows, tensors)
            for op in edit.ops.values():
                yield from map(self._as_wide_rows, op.values())

    def _as_rows(self, stored: HostTensor) -> _Laid:
        """Rank rows as they are, and a vector as one row of its float32 bits."""
        width = self._num_elements(stored.tensor) if stored.tensor.dim() == 1 else stored.tensor.shape[-1]
        return _Laid(stored.content_hash, stored.tensor, self._num_elements(stored.tensor) // width, width)

    def _as_wide_rows(self, stored: HostTensor) -> _Laid:
        """An op's tensor, in its float32 bits."""
        num_rows, width = laid_out(self._num_elements(stored.tensor), self._slab_elements)
        return _Laid(_op_key(stored), stored.tensor, num_rows, width)

    def _num_elements(self, tensor: torch.Tensor) -> int:
        return tensor.nbytes // self.dtype.itemsize

    def _allocate(self, laid: Mapping[bytes, _Laid]) -> dict[bytes, Rows]:
        """Rows for all of these or, raising NoRoom, for none."""
        allocated: dict[int, list[int]] = {}
        try:
            for width, num_rows in _num_rows(laid.values()).items():
                allocated[width] = self._allocator.allocate(width, num_rows)
        except NoRoom:
            for width, numbers in allocated.items():
                self._allocator.free(width, numbers)
            raise
        left = {width: iter(numbers) for width, numbers in allocated.items()}
        return {key: Rows(one.width, tuple(islice(left[one.width], one.num_rows))) for key, one in laid.items()}

    def _let_go(self, hashes: Iterable[bytes]) -> None:
        """Ends one use of each of these; rows without users are free."""
        unused = []
        for content_hash in hashes:
            rows = self._shared[content_hash]
            self._note_uses(rows, -1)
            if rows.num_users == 0:
                unused.append(self._shared.pop(content_hash))
        self._free(unused)

    def _note_uses(self, rows: Rows, change: int) -> None:
        num_rows, before = len(rows.numbers), rows.num_users
        rows.num_users += change
        self._num_row_uses += change * num_rows
        self._num_shared_rows += ((rows.num_users > 1) - (before > 1)) * num_rows

    def _free(self, unused: Iterable[Rows]) -> None:
        freed: dict[int, list[int]] = {}
        for rows in unused:
            freed.setdefault(rows.width, []).extend(rows.numbers)
        self._transfers.rows_freed()  # before anybody can be given them
        for width, numbers in freed.items():
            self._allocator.free(width, numbers)

    def _make_slots(self, digest: str, placement: _Placement) -> list[Slot]:
        """One for each part; the first one answers for the rows of all."""
        rows = {h: self._shared[h] if h in self._shared else placement.own[h] for h in placement.hashes}
        free = (number for number in count(1) if number not in self._slots)
        slots: list[Slot] = []
        for part in placement.adapter.parts:
            edits = {self._sites.by_path[path].index: self._slot_edit(edit) for path, edit in part.items()}
            has_ops = any(edit.ops for edit in edits.values())
            slots.append(Slot(next(free), digest, edits, rows, () if slots else placement.hashes, has_ops))
        return slots

    def _note_reach(self, adapter: HostAdapter, slots: Sequence[int]) -> None:
        if adapter.positions is not None or adapter.num_virtual_tokens:
            self._reaches[slots[0]] = Reach(tuple(slots), adapter.positions, adapter.num_virtual_tokens)

    def _vacate(self, slot: Slot) -> None:
        """Lets go of what a slot that has left the table held."""
        self._let_go(slot.hashes)
        if self._step_edits is not None:
            self._step_edits.vacate(slot.number)
        if self._op_edits is not None and slot.number in self._op_edits.numbers:
            self._op_edits.forget(slot.number)  # for the step that is under way
            self._op_edits = None
        if self._tables is not None:
            self._tables.drop(slot.number)

    def _slot_edit(self, edit: HostEdit) -> SlotEdit:
        vectors = {name: getattr(edit, name) for name in VECTORS}
        return SlotEdit(
            down=tuple(rows.content_hash for rows in edit.down),
            up=tuple(rows.content_hash for rows in edit.up),
            rank=edit.rank,
            vectors={name: vector.content_hash for name, vector in vectors.items() if vector is not None},
            mid_scale=edit.mid_scale.tensor if edit.mid_scale else None,
            mid_shift=edit.mid_shift.tensor if edit.mid_shift else None,
            ops={op: {name: _stored(op, name, t) for name, t in own.items()} for op, own in edit.ops.items()},
        )


def _stored(op: str, name: str, tensor: HostTensor) -> StoredTensor:
    on_cpu = tensor.tensor if name in SITE_OPS[op].looked_at else None
    return StoredTensor(_op_key(tensor), tuple(tensor.tensor.shape), on_cpu)


def _op_key(stored: HostTensor) -> bytes:
    """Of a tensor in wide rows, which one that is a vector or rank rows elsewhere has not."""
    return b"op" + stored.content_hash


def _num_rows(laid: Iterable[_Laid]) -> dict[int, int]:
    """Rows by width: those of one width are allocated together, which takes a tenth of the time."""
    num_rows: dict[int, int] = {}
    for one in laid:
        num_rows[one.width] = num_rows.get(one.width, 0) + one.num_rows
    return num_rows


def _slab_elements(num_elements: int, sites: SiteTable) -> int:
    """Slabs hold at least 16 of the widest rows, so that little is lost at their edges, but there are at least 64."""
    widest = max((max(s.d_in, s.d_out) for s in sites.sites if s.kind is SiteKind.LINEAR), default=1)
    return max(1, min(max(1 << 16, 16 * widest), num_elements // 64))
