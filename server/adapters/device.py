"""The device tier: the adapters whose rank rows lie in the device's one flat buffer.

Owns the buffer, the slots, the sharing of equal tensors, and the few step edits kept for the next steps. Knows nothing
about names, versions, leases or who decides what is resident; and nothing of methods: a slot is rows and vectors.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch

from server.adapters.host_adapter import HostAdapter, HostEdit, HostTensor
from server.adapters.rows import NoRoom, RowAllocator, stride
from server.adapters.step_edits import VECTORS, Rows, Slot, SlotEdit, StepEdits
from server.model.site import SiteKind
from server.model.sites import SiteGroup, SiteTable

_NUM_KEPT_BATCHES = 8


class DeviceTier:
    """The resident adapters of one base.

    `admit` and `release` may be called from any thread; `batch` from the engine's thread only.
    """

    def __init__(self, sites: SiteTable, max_bytes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        self.dtype = dtype
        self._sites = sites
        num_elements = max_bytes // dtype.itemsize
        self._buffer = torch.zeros(num_elements, dtype=dtype, device=device)
        self._allocator = RowAllocator(num_elements, _slab_elements(num_elements, sites))
        self._shared: dict[bytes, Rows] = {}
        self._slots: dict[int, Slot] = {}
        self._slot_of: dict[str, int] = {}
        self._batches: OrderedDict[tuple[int, ...], StepEdits] = OrderedDict()
        self._lock = threading.RLock()

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
    def num_slots(self) -> int:
        return len(self._slots)

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
        """(width, rows) of the adapter's distinct tensors, in the order in which they are stored."""
        distinct = {t.content_hash: self._as_rows(t.tensor) for _, t in _buffered(adapter)}
        return [(rows.shape[1], rows.shape[0]) for rows in distinct.values()]

    def admit(self, digest: str, adapter: HostAdapter) -> int:
        """Copies the adapter's rows to the device and returns its slot number; the number it has, if it is there.

        Raises NoRoom, with nothing changed, when the rows do not fit beside what is resident.
        """
        with self._lock:
            known = self._slot_of.get(digest)
            if known is not None:
                return known
            new = {t.content_hash: t.tensor for _, t in _buffered(adapter) if t.content_hash not in self._shared}
            self._store(new)
            slot = self._make_slot(digest, adapter)
            for content_hash in slot.hashes:
                self._shared[content_hash].num_users += 1
            self._slots[slot.number] = slot
            self._slot_of[digest] = slot.number
            return slot.number

    def release(self, digest: str) -> int:
        """Frees the adapter's slot and the rows that nobody else uses; returns the bytes freed."""
        with self._lock:
            slot = self._slots.pop(self._slot_of.pop(digest))
            before = self._allocator.used_elements
            for content_hash in slot.hashes:
                rows = self._shared[content_hash]
                rows.num_users -= 1
                if rows.num_users == 0:
                    del self._shared[content_hash]
                    self._allocator.free(rows.width, rows.numbers.tolist())
            for key in [key for key in self._batches if slot.number in key]:
                del self._batches[key]
            return (before - self._allocator.used_elements) * self.dtype.itemsize

    def batch(self, slots: Sequence[int]) -> StepEdits:
        """The edits of a step whose tokens use these slots (no zeros, in any order); remembered for the next steps.

        A remembered batch that holds these slots among a few others serves as well: their rows are masked, and making
        a batch anew costs copies of all its rows.
        """
        wanted = frozenset(slots)
        with self._lock:
            for key, known in self._batches.items():
                if wanted <= known.numbers.keys() and len(key) <= 2 * len(wanted):
                    self._batches.move_to_end(key)
                    return known
            key = tuple(sorted(wanted))
            made = StepEdits(self, [self._slots[number] for number in key])
            self._batches[key] = made
            if len(self._batches) > _NUM_KEPT_BATCHES:
                self._batches.popitem(last=False)
            return made

    def group(self, index: int) -> SiteGroup:
        return self._sites.groups[index]

    def row_view(self, width: int) -> torch.Tensor:
        """The whole buffer as rows of `width` elements: (all rows, width)."""
        step = stride(width)
        num = self._buffer.numel() // step
        return self._buffer[: num * step].view(num, step)[:, :width]

    def _as_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """(rows, width) of the buffer's dtype. A vector is one row that holds its float32 bits, whatever that dtype."""
        return tensor if tensor.dim() == 2 else tensor.view(self.dtype)[None]

    def _store(self, tensors: Mapping[bytes, torch.Tensor]) -> None:
        """Allocates rows for tensors that are not in the buffer, all or none, and copies them."""
        matrices = {content_hash: self._as_rows(tensor) for content_hash, tensor in tensors.items()}
        done: dict[bytes, Rows] = {}
        try:
            for content_hash, matrix in matrices.items():
                num_rows, width = matrix.shape
                allocated = self._allocator.allocate(width, num_rows)
                numbers = torch.tensor(allocated, dtype=torch.int64, device=self.device)
                done[content_hash] = Rows(width, numbers)
        except NoRoom:
            for rows in done.values():
                self._allocator.free(rows.width, rows.numbers.tolist())
            raise
        for content_hash, rows in done.items():
            matrix = matrices[content_hash].to(self.device, non_blocking=True)
            self.row_view(rows.width)[rows.numbers] = matrix
        self._shared.update(done)

    def _make_slot(self, digest: str, adapter: HostAdapter) -> Slot:
        number = next(n for n in range(1, len(self._slots) + 2) if n not in self._slots)
        edits = {self._sites.by_path[path].index: self._slot_edit(edit) for path, edit in adapter.edits.items()}
        hashes = tuple(tensor.content_hash for _, tensor in _buffered(adapter))
        return Slot(number, digest, edits, {h: self._shared[h] for h in hashes}, hashes)

    def _slot_edit(self, edit: HostEdit) -> SlotEdit:
        tensors = edit.tensors()
        return SlotEdit(
            down=edit.down.content_hash if edit.down else None,
            up=edit.up.content_hash if edit.up else None,
            rank=edit.rank,
            vectors={name: tensors[name].content_hash for name in VECTORS if name in tensors},
            mid_scale=edit.mid_scale.tensor.to(self.device) if edit.mid_scale else None,
            mid_shift=edit.mid_shift.tensor.to(self.device) if edit.mid_shift else None,
        )


def _buffered(adapter: HostAdapter) -> list[tuple[str, HostTensor]]:
    """The adapter's tensors that live in the buffer: rank rows, and vectors as wide as a site."""
    named = [pair for edit in adapter.edits.values() for pair in edit.tensors().items()]
    return [(name, tensor) for name, tensor in named if name not in ("mid_scale", "mid_shift")]


def _slab_elements(num_elements: int, sites: SiteTable) -> int:
    """Slabs hold at least 16 of the widest rows, so that little is lost at their edges, but there are at least 64."""
    widest = max((max(s.d_in, s.d_out) for s in sites.sites if s.kind is SiteKind.LINEAR), default=1)
    return max(1, min(max(1 << 16, 16 * widest), num_elements // 64))
