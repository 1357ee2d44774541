"""The row allocator: rows never overlap, elements are accounted for, and an emptied buffer is as good as new."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from server.adapters.device.rows import ROW_ALIGNMENT, NoRoom, RowAllocator, laid_out, stride


def accounted(allocator: RowAllocator) -> int:
    return allocator.used_elements + allocator.free_elements + allocator.waste_elements


@pytest.mark.parametrize(("width", "expected"), [(1, 8), (8, 8), (9, 16), (4096, 4096), (11007, 11008)])
def test_a_stride_is_the_width_rounded_up_to_the_alignment(width: int, expected: int) -> None:
    assert stride(width) == expected
    assert expected % ROW_ALIGNMENT == 0


@pytest.mark.parametrize("width", [0, -8])
def test_a_row_without_elements_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"width is {width}"):
        stride(width)


@pytest.mark.parametrize(("num_elements", "slab_elements"), [(-1, 8), (64, 0)])
def test_a_buffer_that_cannot_be_cut_is_refused(num_elements: int, slab_elements: int) -> None:
    with pytest.raises(ValueError, match="cannot be cut"):
        RowAllocator(num_elements, slab_elements)


def test_a_new_allocator_is_free_but_for_the_end_that_makes_no_slab() -> None:
    allocator = RowAllocator(num_elements=1000, slab_elements=128)
    assert allocator.num_elements == 1000
    assert allocator.free_elements == 7 * 128
    assert allocator.waste_elements == 1000 - 7 * 128
    assert allocator.used_elements == allocator.num_used_rows == 0


def test_rows_come_ascending_and_consecutive() -> None:
    allocator = RowAllocator(1024, 256)
    assert allocator.allocate(16, 20) == list(range(20))
    assert allocator.num_used_rows == 20
    assert allocator.used_elements == 20 * 16


def test_padding_to_the_stride_counts_as_used() -> None:
    allocator = RowAllocator(1024, 256)
    allocator.allocate(9, 3)
    assert allocator.used_elements == 3 * 16


def test_nothing_is_taken_for_no_rows() -> None:
    allocator = RowAllocator(1024, 256)
    assert allocator.allocate(16, 0) == []
    assert allocator.free_elements == 1024


def test_a_row_of_one_stride_starts_past_the_edge_that_another_stride_owns() -> None:
    allocator = RowAllocator(num_elements=200, slab_elements=100)
    assert allocator.allocate(8, 1) == [0]
    # Rows of 24 in the elements 100..199: row 4 (96..119) crosses the edge, rows 5, 6, 7 (120..191) lie inside.
    assert allocator.allocate(24, 3) == [5, 6, 7]
    assert allocator.waste_elements == (100 - 12 * 8) + (100 - 3 * 24)
    with pytest.raises(NoRoom):
        allocator.allocate(24, 1)


def test_a_slab_in_use_is_filled_before_another_is_opened() -> None:
    allocator = RowAllocator(512, 128)
    allocator.allocate(16, 5)
    assert allocator.allocate(32, 1) == [4]
    # Three rows are left in slab 0; the other two come from slab 2.
    assert allocator.allocate(16, 5) == [5, 6, 7, 16, 17]


def test_a_hole_that_fits_in_one_piece_is_preferred_to_lower_scattered_rows() -> None:
    allocator = RowAllocator(1024, 1024)
    allocator.allocate(8, 128)
    allocator.free(8, [3, 5, 20, 21, 22, 23])
    assert allocator.allocate(8, 3) == [20, 21, 22]
    assert allocator.allocate(8, 3) == [3, 5, 23]


def test_a_row_wider_than_a_slab_gets_consecutive_slabs() -> None:
    allocator = RowAllocator(num_elements=1000, slab_elements=100)
    assert allocator.allocate(8, 1) == [0]
    # Row 0 of stride 248 would begin in slab 0, which stride 8 owns; row 1 is the elements 248..495.
    assert allocator.allocate(248, 1) == [1]
    assert allocator.free_elements == (12 - 1) * 8 + (10 - 1 - 3) * 100 + 0
    allocator.free(248, [1])
    assert allocator.free_elements == (12 - 1) * 8 + 900


def test_several_wide_rows_share_an_extent_without_loss_between_them() -> None:
    allocator = RowAllocator(num_elements=1000, slab_elements=100)
    assert allocator.allocate(248, 4) == [0, 1, 2, 3]
    assert allocator.waste_elements == 1000 - 4 * 248


@pytest.mark.parametrize(("width", "slab_elements", "expected"), [(136, 40, 1), (96, 100, 4)], ids=["wider", "as wide"])
def test_a_hole_of_slabs_in_which_no_row_lies_is_passed_over(width: int, slab_elements: int, expected: int) -> None:
    allocator = RowAllocator(num_elements=10 * slab_elements, slab_elements=slab_elements)
    rows = allocator.allocate(8, 3 * (slab_elements // 8))
    hole = [row for row in rows if slab_elements <= row * 8 < 2 * slab_elements]
    allocator.free(8, hole)
    assert allocator.allocate(width, 1) == [expected]
    allocator.free(width, [expected])
    allocator.free(8, [row for row in rows if row not in hole])
    assert allocator.free_elements == allocator.num_elements


def test_no_slab_is_opened_without_a_row_in_use() -> None:
    allocator = RowAllocator(num_elements=8 * 17, slab_elements=17)
    assert allocator.allocate(16, 6) == [0, 1, 2, 3, 4, 5]  # slabs 0 to 5
    # Slab 6 holds row 13 alone, slab 7 both 15 and 16: these two would leave slab 6 taken for nothing.
    rows = allocator.allocate(8, 2)
    assert rows == [13, 15]
    allocator.free(8, rows)
    assert allocator.free_elements == 2 * 17


def test_no_room_takes_nothing_and_says_what_is_needed_and_free() -> None:
    allocator = RowAllocator(512, 128)
    allocator.allocate(16, 3)
    with pytest.raises(NoRoom, match="30 rows of 16 elements need 480 elements") as refused:
        allocator.allocate(16, 30)
    assert refused.value.needed_elements == 480
    assert refused.value.free_elements == 512 - 3 * 16 == allocator.free_elements
    assert allocator.allocate(16, 29) == list(range(3, 32))


def test_free_elements_of_another_stride_do_not_help() -> None:
    allocator = RowAllocator(256, 256)
    allocator.allocate(8, 1)
    assert allocator.free_elements == 248
    with pytest.raises(NoRoom):
        allocator.allocate(16, 1)


def test_an_emptied_slab_serves_another_width() -> None:
    allocator = RowAllocator(256, 256)
    rows = allocator.allocate(8, 32)
    allocator.free(8, reversed(rows))
    assert allocator.allocate(64, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("width", "rows"),
    [(8, [2]), (8, [-1]), (8, [10_000]), (16, [0]), (8, [0, 0]), (8, [0, 1, 2])],
    ids=["free row", "negative", "past the end", "other width", "twice in one call", "one of them free"],
)
def test_freeing_what_is_not_in_use_is_refused_and_frees_nothing(width: int, rows: list[int]) -> None:
    allocator = RowAllocator(256, 128)
    allocator.allocate(8, 2)
    with pytest.raises(ValueError, match=r"freed twice|named twice"):
        allocator.free(width, rows)
    assert allocator.num_used_rows == 2
    assert allocator.allocate(8, 1) == [2]


def test_a_double_free_is_refused() -> None:
    allocator = RowAllocator(256, 128)
    rows = allocator.allocate(8, 4)
    allocator.free(8, rows[:2])
    with pytest.raises(ValueError, match="freed twice"):
        allocator.free(8, rows[:1])


@pytest.mark.parametrize(
    "call", [lambda rows: rows.allocate(8, -1), lambda rows: rows.can_allocate([(8, -1)])], ids=["allocate", "can"]
)
def test_a_negative_count_is_refused(call: Callable[[RowAllocator], object]) -> None:
    with pytest.raises(ValueError, match="count is -1"):
        call(RowAllocator(256, 128))


def test_can_allocate_sees_the_requests_together() -> None:
    allocator = RowAllocator(256, 128)
    assert allocator.can_allocate([(8, 16)])
    assert allocator.can_allocate([(8, 16), (16, 8)])
    assert allocator.can_allocate([(8, 10), (16, 8), (8, 6)])
    assert not allocator.can_allocate([(8, 17), (16, 1)])
    assert allocator.can_allocate([])
    assert allocator.free_elements == 256


widths = st.integers(1, 140)  # against slabs of 40..100 elements: several to a slab, about one, wider than one
requests = st.lists(st.tuples(widths, st.integers(0, 12)), max_size=6)


@given(st.integers(0, 1200), st.integers(1, 100), requests, requests)
def test_can_allocate_is_exact(
    num_elements: int, slab: int, before: list[tuple[int, int]], needs: list[tuple[int, int]]
) -> None:
    allocator = RowAllocator(num_elements, slab)
    for width, count in before:
        if allocator.can_allocate([(width, count)]):
            rows = allocator.allocate(width, count)
            allocator.free(width, rows[1::2])
    promised = allocator.can_allocate(needs)
    try:
        for width, count in needs:
            allocator.allocate(width, count)
    except NoRoom:
        assert not promised
    else:
        assert promised


@given(st.integers(0, 1200), st.integers(1, 100), st.integers(1, 300))
def test_an_empty_buffer_gives_at_least_what_single_slabs_hold(num_elements: int, slab: int, width: int) -> None:
    """Narrow rows: all that lie inside one slab. Wide rows: all that lie inside the slabs taken together."""
    allocator = RowAllocator(num_elements, slab)
    num_slabs, row_stride = num_elements // slab, stride(width)
    if 2 * row_stride <= slab:
        count = sum((i + 1) * slab // row_stride - -(-i * slab // row_stride) for i in range(num_slabs))
    else:
        count = num_slabs * slab // row_stride
    assert len(allocator.allocate(width, count)) == count
    assert not allocator.can_allocate([(width, 1)])


class Allocation(RuleBasedStateMachine):
    """Random traffic, checked against the plain list of elements that each row stands for."""

    @initialize(num_elements=st.integers(0, 1500), slab_elements=st.integers(40, 100))
    def start(self, num_elements: int, slab_elements: int) -> None:
        self.sizes = (num_elements, slab_elements)
        self.allocator = RowAllocator(num_elements, slab_elements)
        self.live: set[tuple[int, int]] = set()  # (width, row)
        self.owner: dict[int, tuple[int, int]] = {}  # element -> (stride, row)

    def elements(self, width: int, row: int) -> range:
        return range(row * stride(width), (row + 1) * stride(width))

    @rule(width=widths, count=st.integers(0, 40))
    def allocate(self, width: int, count: int) -> None:
        before = self.allocator.free_elements, self.allocator.used_elements
        fits = self.allocator.can_allocate([(width, count)])
        try:
            rows = self.allocator.allocate(width, count)
        except NoRoom:
            assert not fits
            assert (self.allocator.free_elements, self.allocator.used_elements) == before
            return
        assert fits
        assert len(rows) == count
        assert rows == sorted(rows)
        for row in rows:
            assert (row + 1) * stride(width) <= self.sizes[0]
            for element in self.elements(width, row):
                assert element not in self.owner
                self.owner[element] = (stride(width), row)
            self.live.add((width, row))

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if not self.live:
            return
        width = data.draw(st.sampled_from(sorted({width for width, _ in self.live})))
        candidates = sorted(row for of, row in self.live if of == width)
        self.give_back(width, data.draw(st.lists(st.sampled_from(candidates), unique=True)))

    @rule(width=widths, row=st.integers(-1, 200))
    def free_what_is_not_in_use(self, width: int, row: int) -> None:
        if (stride(width), row) in self.owner.values():
            return
        with pytest.raises(ValueError, match="freed twice"):
            self.allocator.free(width, [row])

    def give_back(self, width: int, rows: list[int]) -> None:
        self.allocator.free(width, rows)
        for row in rows:
            self.live.remove((width, row))
            for element in self.elements(width, row):
                del self.owner[element]

    @invariant()
    def every_element_is_used_free_or_waste(self) -> None:
        assert accounted(self.allocator) == self.sizes[0]
        assert self.allocator.used_elements == len(self.owner)
        assert self.allocator.num_used_rows == len(self.live)
        assert min(self.allocator.free_elements, self.allocator.waste_elements) >= 0

    def teardown(self) -> None:
        for width in {width for width, _ in self.live}:
            self.give_back(width, [row for of, row in self.live if of == width])
        pristine = RowAllocator(*self.sizes)
        for name in ("used_elements", "free_elements", "waste_elements", "num_used_rows"):
            assert getattr(self.allocator, name) == getattr(pristine, name)
        for width in (16, 60, 130):
            for count in (2, 1):
                if pristine.can_allocate([(width, count)]):
                    assert self.allocator.allocate(width, count) == pristine.allocate(width, count)


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 24))
def test_what_is_laid_out_has_few_rows_and_little_beside_it(num_elements: int, slab_elements: int) -> None:
    num_rows, width = laid_out(num_elements, slab_elements)
    assert stride(width) == width, "consecutive rows have no gaps"
    assert 0 <= num_rows * width - num_elements < max(width, 1)
    assert num_rows * width - num_elements < max(64, num_elements / 8)
    if slab_elements >= 2 * 16384:
        assert num_rows <= max(32, -(-num_elements // 16384))


TestAllocation = Allocation.TestCase
TestAllocation.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
