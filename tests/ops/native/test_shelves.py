"""Shelves: dense copies side by side, which stay as long as somebody has them."""

import torch

from server.ops.native.shelves import Shelves


def test_a_copy_is_dense_and_its_own() -> None:
    given = torch.arange(24, dtype=torch.bfloat16).view(4, 6).T
    kept = Shelves().kept(given)
    assert torch.equal(kept, given)
    assert kept.is_contiguous()
    given.zero_()
    assert kept[5, 3] == 23


def test_copies_lie_side_by_side_from_lines_of_the_cache_on() -> None:
    shelves = Shelves()
    kept = [shelves.kept(torch.full((size,), size, dtype=torch.uint8)) for size in (3, 100, 64, 1)]
    first = kept[0].data_ptr()
    assert [one.data_ptr() - first for one in kept] == [0, 64, 192, 256]
    assert [one.unique().tolist() for one in kept] == [[3], [100], [64], [1]]


def test_what_is_too_large_has_a_shelf_of_its_own() -> None:
    shelves = Shelves()
    small, large = shelves.kept(torch.ones(8)), shelves.kept(torch.ones(17 << 20))
    assert large.untyped_storage().nbytes() == 4 * (17 << 20)
    assert small.untyped_storage().data_ptr() != large.untyped_storage().data_ptr()
    assert small.sum() == 8
