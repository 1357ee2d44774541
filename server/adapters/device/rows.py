"""Which elements of the device's adapter buffer belong to which rank rows.

Owns the row arithmetic and its accounting. Knows nothing about tensors, devices, adapters or who holds a row.

One buffer of `num_elements` is cut into slabs of equal size. A slab serves rows of one stride at a time; a stride too
wide for one slab takes an extent of consecutive slabs. Row n of stride s is always the elements [n*s, (n+1)*s) of the
WHOLE buffer, so one view per stride, `buffer[: N // s * s].view(N // s, s)`, reaches every row of that stride.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

ROW_ALIGNMENT = 8  # elements: 16 bytes in a 16-bit type, the widest load of a GPU thread
_UNBOUNDED_SLABS = 1 << 48  # more than any memory has
_LAID_WIDTHS = (64, 256, 1024, 4096, 16384)  # few, for each of them in use takes a slab
_MIN_LAID_ROWS = 8  # of a width beyond the least: the last row then leaves at most an eighth unused
MAX_PROBES = 128  # free runs searched for one that fits: a badly fragmented slab must not slow an allocation down

Span = tuple[int, int]  # half-open: [first, stop)


def stride(width: int) -> int:
    """Elements from one row of `width` elements to the next: `width` rounded up to a multiple of ROW_ALIGNMENT."""
    if width < 1:
        raise ValueError(f"width is {width}; a row has at least 1 element")
    return -(-width // ROW_ALIGNMENT) * ROW_ALIGNMENT


def laid_out(num_elements: int, slab_elements: int) -> tuple[int, int]:
    """(rows, width) in which to lay out something that has no rows of its own, one row after the other.

    The rows are few, for each is a number in Python, however narrow its last dimension is: at most 32, or one for each
    16,384 elements (each half a slab, if that is less). The width is a stride as well, so that consecutive rows have no
    gaps between them.
    """
    fitting = [w for w in _LAID_WIDTHS if _MIN_LAID_ROWS * w <= num_elements and 2 * w <= slab_elements]
    width = max(fitting, default=_LAID_WIDTHS[0])
    return -(-num_elements // width), width


class NoRoom(Exception):
    """The buffer cannot hold the rows now; nothing was taken.

    `needed_elements` counts the rows asked for with their padding. `free_elements` may be larger: free rows of another
    stride, and slabs that are not next to each other, do not help.
    """

    def __init__(self, *, num_rows: int, row_stride: int, free_elements: int) -> None:
        self.needed_elements = num_rows * row_stride
        self.free_elements = free_elements
        super().__init__(
            f"{num_rows} rows of {row_stride} elements need {self.needed_elements} elements; the adapter buffer has "
            f"{free_elements} free, not enough of them usable at this width: unload adapters or enlarge the buffer"
        )


class _Runs:
    """A set of whole numbers, kept as ascending half-open runs that neither overlap nor touch."""

    __slots__ = ("_num", "_starts", "_stops")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def __iter__(self) -> Iterator[Span]:
        return zip(self._starts, self._stops, strict=True)

    def copy(self) -> "_Runs":
        twin = _Runs()
        twin._starts, twin._stops = self._starts.copy(), self._stops.copy()
        twin._num = self._num
        return twin

    def overlaps(self, start: int, stop: int) -> bool:
        """Whether any number of [start, stop) is in the set."""
        after = bisect_right(self._starts, start)
        if after and self._stops[after - 1] > start:
            return True
        return after < len(self._starts) and self._starts[after] < stop

    def add(self, start: int, stop: int) -> None:
        """Adds [start, stop), none of which is in the set, and joins it with the runs that it touches."""
        self._num += stop - start
        at = bisect_left(self._starts, start)
        if at < len(self._starts) and self._starts[at] == stop:
            stop = self._stops[at]
            del self._starts[at], self._stops[at]
        if at and self._stops[at - 1] == start:
            start = self._starts[at - 1]
            self._stops[at - 1] = stop
        else:
            self._starts.insert(at, start)
            self._stops.insert(at, stop)

    def remove(self, start: int, stop: int) -> None:
        """Removes [start, stop), which lies within one run."""
        self._num -= stop - start
        at = bisect_right(self._starts, start) - 1
        run_stop = self._stops[at]
        if self._starts[at] < start:
            self._stops[at] = start
            if stop < run_stop:
                self._starts.insert(at + 1, stop)
                self._stops.insert(at + 1, run_stop)
        elif stop < run_stop:
            self._starts[at] = stop
        else:
            del self._starts[at], self._stops[at]

    def take(self, count: int) -> list[Span]:
        """Removes `count` numbers, at most len(self): in one piece if one of the lowest runs has them."""
        start = self._first_fit(count) if count else None
        if start is None:
            return self.take_lowest(count)
        self.remove(start, start + count)
        return [(start, start + count)]

    def take_lowest(self, count: int) -> list[Span]:
        """Removes the `count` lowest numbers, at most len(self)."""
        num_whole, num_left = 0, count
        while num_left and self._stops[num_whole] - self._starts[num_whole] <= num_left:
            num_left -= self._stops[num_whole] - self._starts[num_whole]
            num_whole += 1
        pieces = list(zip(self._starts[:num_whole], self._stops[:num_whole], strict=True))
        del self._starts[:num_whole], self._stops[:num_whole]
        if num_left:
            start = self._starts[0]
            self._starts[0] = start + num_left
            pieces.append((start, start + num_left))
        self._num -= count
        return pieces

    def _first_fit(self, count: int) -> int | None:
        for start, stop in islice(self, MAX_PROBES):
            if stop - start >= count:
                return start
        return None


@dataclass(slots=True)
class _Extent:
    """Consecutive slabs that serve one stride, and the rows that lie wholly inside them."""

    first_slab: int
    stop_slab: int
    first_row: int
    stop_row: int
    num_used: int = 0

    @property
    def num_slabs(self) -> int:
        return self.stop_slab - self.first_slab

    @property
    def num_rows(self) -> int:
        return self.stop_row - self.first_row


class _StrideRows:
    """All extents of one stride, in ascending order, and their free rows."""

    __slots__ = ("extents", "first_rows", "free")

    def __init__(self) -> None:
        self.free = _Runs()
        self.extents: list[_Extent] = []
        self.first_rows: list[int] = []  # of each extent, for bisect

    def insert(self, extent: _Extent) -> None:
        at = bisect_left(self.first_rows, extent.first_row)
        self.first_rows.insert(at, extent.first_row)
        self.extents.insert(at, extent)
        self.free.add(extent.first_row, extent.stop_row)

    def remove(self, extent: _Extent) -> None:
        at = bisect_left(self.first_rows, extent.first_row)
        del self.first_rows[at], self.extents[at]
        self.free.remove(extent.first_row, extent.stop_row)

    def split(self, start: int, stop: int) -> Iterator[tuple[_Extent, Span]]:
        """The part of [start, stop) in each extent that it meets; rows in no extent are left out."""
        at = max(bisect_right(self.first_rows, start) - 1, 0)
        while at < len(self.extents) and self.extents[at].first_row < stop:
            extent = self.extents[at]
            part = max(start, extent.first_row), min(stop, extent.stop_row)
            if part[0] < part[1]:
                yield extent, part
            at += 1

    def is_used(self, start: int, stop: int) -> bool:
        """Whether every row of [start, stop) is a row of this stride and not free."""
        num_known = sum(part[1] - part[0] for _, part in self.split(start, stop))
        return num_known == stop - start and not self.free.overlaps(start, stop)


class RowAllocator:
    """Cuts a buffer of `num_elements` into slabs of `slab_elements` and hands out row numbers.

    At all times `used_elements + free_elements + waste_elements == num_elements`. Waste is what no row can use at
    present: the edges of the slabs in use, where a row would cross into a slab of another stride, and the end of the
    buffer that does not make a whole slab. Not thread-safe: its owner holds a lock.
    """

    def __init__(self, num_elements: int, slab_elements: int) -> None:
        if num_elements < 0 or slab_elements < 1:
            raise ValueError(f"a buffer of {num_elements} elements cannot be cut into slabs of {slab_elements}")
        self._num_elements = num_elements
        self._slab_elements = slab_elements
        self._free_slabs = _Runs()
        num_slabs = num_elements // slab_elements
        if num_slabs:
            self._free_slabs.add(0, num_slabs)
        self._by_stride: dict[int, _StrideRows] = {}
        self._num_used_rows = 0
        self._used_elements = 0
        self._waste_elements = num_elements - num_slabs * slab_elements

    @property
    def num_elements(self) -> int:
        return self._num_elements

    @property
    def num_used_rows(self) -> int:
        return self._num_used_rows

    @property
    def used_elements(self) -> int:
        """Elements of rows in use, padding to the stride included."""
        return self._used_elements

    @property
    def free_elements(self) -> int:
        """Elements of free slabs and of the free rows in slabs already in use."""
        in_slabs = len(self._free_slabs) * self._slab_elements
        return in_slabs + sum(len(rows.free) * row_stride for row_stride, rows in self._by_stride.items())

    @property
    def waste_elements(self) -> int:
        return self._waste_elements

    def allocate(self, width: int, count: int) -> list[int]:
        """`count` row numbers for rows of `width` elements, ascending, and consecutive where one of the lowest free
        runs has them all.

        Slabs already in use for this stride are filled before another one is opened. Raises NoRoom, with nothing
        taken, when the rows do not fit.
        """
        row_stride = stride(width)
        rows = self._by_stride.get(row_stride, _StrideRows())
        num_missing = _checked(count) - len(rows.free)
        if num_missing <= 0:
            pieces = rows.free.take(count)
        else:
            extents = self._plan(self._free_slabs, row_stride, num_missing)
            if extents is None:
                raise NoRoom(num_rows=count, row_stride=row_stride, free_elements=self.free_elements)
            self._by_stride[row_stride] = rows
            pieces = rows.free.take_lowest(len(rows.free))
            for extent in extents:
                self._open(row_stride, rows, extent)
            # Lowest first, not first fit: each planned extent then gets a row, and none stays open and empty.
            pieces = sorted(pieces + rows.free.take_lowest(num_missing))
        self._count(row_stride, rows, pieces, 1)
        return [row for piece in pieces for row in range(*piece)]

    def free(self, width: int, rows: Iterable[int]) -> None:
        """Returns rows that `allocate` gave for this width, in any order; a slab left without rows becomes free.

        Raises ValueError, with nothing freed, when a row is not in use at this width or is named twice.
        """
        row_stride = stride(width)
        pieces = _runs_of(rows)
        of_stride = self._by_stride.get(row_stride, _StrideRows())
        for start, stop in pieces:
            if not of_stride.is_used(start, stop):
                raise ValueError(f"rows {start}..{stop - 1} of stride {row_stride} are not all in use: freed twice?")
        self._count(row_stride, of_stride, pieces, -1)
        for piece in pieces:
            of_stride.free.add(*piece)
        for piece in pieces:
            for extent in [extent for extent, _ in of_stride.split(*piece) if not extent.num_used]:
                self._close(row_stride, of_stride, extent)

    def can_allocate(self, requests: Iterable[tuple[int, int]]) -> bool:
        """Whether `allocate(width, count)` for each of `requests`, in this order, would all succeed."""
        num_free = {row_stride: len(rows.free) for row_stride, rows in self._by_stride.items()}
        return self._stop_slab(requests, self._free_slabs.copy(), num_free) is not None

    def elements_alone(self, requests: Iterable[tuple[int, int]]) -> int:
        """Elements of the smallest buffer, cut into slabs as this one, in which `allocate(width, count)` for each of
        `requests`, in this order, would all succeed if it held nothing else: at least the rows', and what is lost at
        the edges of slabs.
        """
        free_slabs = _Runs()
        free_slabs.add(0, _UNBOUNDED_SLABS)
        stop_slab = self._stop_slab(requests, free_slabs, {})
        assert stop_slab is not None
        return stop_slab * self._slab_elements

    def _stop_slab(
        self, requests: Iterable[tuple[int, int]], free_slabs: _Runs, num_free: dict[int, int]
    ) -> int | None:
        """Plays allocations through on copies of the books: behind the last slab that they open; None if too few."""
        stop_slab = 0
        for width, count in requests:
            row_stride = stride(width)
            num_left = num_free.get(row_stride, 0) - _checked(count)
            if num_left < 0:
                extents = self._plan(free_slabs, row_stride, -num_left)
                if extents is None:
                    return None
                for extent in extents:
                    free_slabs.remove(extent.first_slab, extent.stop_slab)
                    num_left += extent.num_rows
                    stop_slab = max(stop_slab, extent.stop_slab)
            num_free[row_stride] = num_left
        return stop_slab

    def _plan(self, free_slabs: _Runs, row_stride: int, count: int) -> list[_Extent] | None:
        """Extents of free slabs, ascending and each of them needed, with `count` rows together; None if too few."""
        if 2 * row_stride <= self._slab_elements:
            # At least one whole row lies in any slab, so single slabs do: they return to the buffer the soonest.
            candidates = (self._extent(row_stride, slab, slab + 1) for run in free_slabs for slab in range(*run))
        else:
            candidates = (self._extent(row_stride, *run) for run in free_slabs)
        chosen: list[_Extent] = []
        for extent in candidates:
            if count <= 0:
                break
            if extent.num_rows:
                chosen.append(self._shrunk(row_stride, extent, count))
                count -= extent.num_rows
        return chosen if count <= 0 else None

    def _extent(self, row_stride: int, first_slab: int, stop_slab: int) -> _Extent:
        first_row = -(-first_slab * self._slab_elements // row_stride)
        stop_row = stop_slab * self._slab_elements // row_stride
        return _Extent(first_slab, stop_slab, first_row, max(first_row, stop_row))

    def _shrunk(self, row_stride: int, extent: _Extent, count: int) -> _Extent:
        """The extent without the slabs at its ends that its first `count` rows do not touch."""
        stop_row = min(extent.first_row + count, extent.stop_row)
        first_slab = extent.first_row * row_stride // self._slab_elements
        return self._extent(row_stride, first_slab, -(-stop_row * row_stride // self._slab_elements))

    def _open(self, row_stride: int, rows: _StrideRows, extent: _Extent) -> None:
        self._free_slabs.remove(extent.first_slab, extent.stop_slab)
        rows.insert(extent)
        self._waste_elements += extent.num_slabs * self._slab_elements - extent.num_rows * row_stride

    def _close(self, row_stride: int, rows: _StrideRows, extent: _Extent) -> None:
        rows.remove(extent)
        self._free_slabs.add(extent.first_slab, extent.stop_slab)
        self._waste_elements -= extent.num_slabs * self._slab_elements - extent.num_rows * row_stride

    def _count(self, row_stride: int, rows: _StrideRows, pieces: list[Span], sign: int) -> None:
        """Books the rows of `pieces` as used (sign 1) or no longer used (sign -1)."""
        for piece in pieces:
            for extent, (start, stop) in rows.split(*piece):
                num_rows = sign * (stop - start)
                extent.num_used += num_rows
                self._num_used_rows += num_rows
                self._used_elements += num_rows * row_stride


def _checked(count: int) -> int:
    if count < 0:
        raise ValueError(f"count is {count}; it cannot be negative")
    return count


def _runs_of(rows: Iterable[int]) -> list[Span]:
    """The ascending runs of consecutive numbers in `rows`. Raises ValueError when one is there twice."""
    runs: list[Span] = []
    start = stop = None
    for row in sorted(rows):
        if start is None or stop is None:
            start = row
        elif row == stop - 1:
            raise ValueError(f"row {row} is named twice in one call")
        elif row != stop:
            runs.append((start, stop))
            start = row
        stop = row + 1
    if start is not None and stop is not None:
        runs.append((start, stop))
    return runs
