"""The host tier: what is cast, what is shared, what is evicted, and that its books balance."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.adapters.host import HostTier
from server.adapters.method import Edit, Lowered
from server.ground.errors import AdapterRejected

ROW_BYTES = 8 * 4  # one float32 row of width 8


def lowered(edits: Mapping[str, Edit]) -> Lowered:
    return Lowered("lora", rank=2, num_parameters=32, edits=edits, warnings=("careful",))


def rows(seed: int, num_rows: int = 2) -> torch.Tensor:
    return torch.randn(num_rows, 8, generator=torch.Generator().manual_seed(seed))


def pair(seed: int) -> Lowered:
    """An adapter of 4 rows that shares nothing with another seed's."""
    return lowered({"q": Edit(down=rows(2 * seed), up=rows(2 * seed + 1))})


def host_for(num_rows: int, dtype: torch.dtype = torch.float32) -> HostTier:
    return HostTier(num_rows * ROW_BYTES, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_field_is_cast_to_the_serving_dtype_and_keeps_its_shape(dtype: torch.dtype) -> None:
    edit = Edit(
        down=rows(1),
        up=rows(2),
        mid_scale=torch.ones(2),
        mid_shift=torch.zeros(2),
        in_scale=rows(3)[0],
        up_scale=rows(4)[0],
        out_scale=rows(5)[0],
        out_shift=rows(6)[0],
    )
    adapter = host_for(100, dtype).put("a", lowered({"q": edit}))
    assert (adapter.method, adapter.rank, adapter.num_parameters, adapter.warnings) == ("lora", 2, 32, ("careful",))
    kept = adapter.edits["q"].tensors()
    assert kept.keys() == edit.tensors().keys()
    assert adapter.edits["q"].rank == 2
    for name, source in edit.tensors().items():
        # Rank rows are cast; vectors stay as exact as they came.
        assert torch.equal(kept[name][0].tensor, source.to(dtype if source.dim() == 2 else torch.float32))
        assert kept[name][0].tensor.is_contiguous()


def test_absent_fields_stay_absent_and_a_site_may_have_rank_0() -> None:
    adapter = host_for(100).put("a", lowered({"k": Edit(out_scale=torch.ones(8))}))
    assert adapter.edits["k"].rank == 0
    assert list(adapter.edits["k"].tensors()) == ["out_scale"]


def test_a_kept_tensor_is_a_copy_that_no_larger_storage_stands_behind() -> None:
    table = rows(1, num_rows=64)
    adapter = host_for(100).put("a", lowered({"q": Edit(down=table[:2], up=table[:, :2].T)}))
    for tensor in adapter.tensors():
        assert tensor.tensor.untyped_storage().nbytes() == tensor.tensor.nbytes
    table.zero_()
    assert adapter.edits["q"].tensors()["down"][0].tensor.abs().min() > 0


def test_equal_tensors_are_stored_once_within_and_across_adapters() -> None:
    host = host_for(100)
    shared, own = rows(1), rows(2)
    first = host.put("a", lowered({"q": Edit(down=shared, up=own), "k": Edit(down=shared.clone(), up=own)}))
    assert first.tensor_bytes == host.used_bytes == 4 * ROW_BYTES
    second = host.put("b", lowered({"q": Edit(down=shared.clone(), up=rows(3))}))
    assert host.used_bytes == 6 * ROW_BYTES
    assert second.edits["q"].down[0] is first.edits["k"].down[0]
    assert host.drop("a") == 2 * ROW_BYTES, "the other half is b's, too"
    assert host.used_bytes == 4 * ROW_BYTES
    assert host.drop("b") == 4 * ROW_BYTES
    assert host.drop("b") == 0
    assert host.used_bytes == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(2, 8), torch.zeros(4, 4)),
        (torch.zeros(16), torch.zeros(1, 16)),
        (torch.zeros(2, 8), -torch.zeros(2, 8)),
        (torch.zeros(2, 8), torch.zeros(2, 7)),
    ],
)
def test_what_differs_in_shape_or_bytes_is_not_shared(one: torch.Tensor, other: torch.Tensor) -> None:
    adapter = host_for(100).put("a", lowered({"q": Edit(down=one, up=other)}))
    down, up = adapter.tensors()
    assert down.content_hash != up.content_hash


def test_views_of_one_table_are_told_apart() -> None:
    """As VeRA's projections are: the first columns of one table, of another width at each site."""
    table = rows(1, num_rows=4)
    edits = {"q": Edit(down=table[:, :4]), "k": Edit(down=table[:, 4:]), "v": Edit(down=table.T), "o": Edit(down=table)}
    adapter = host_for(100).put("a", lowered(edits))
    for path, edit in edits.items():
        (down,) = adapter.edits[path].down
        assert torch.equal(down.tensor, edit.tensors()["down"])


def test_empty_tensors_are_kept_with_their_shapes() -> None:
    adapter = host_for(100).put("a", lowered({"q": Edit(down=torch.zeros(0, 8), up=torch.zeros(0, 4))}))
    assert [tuple(tensor.tensor.shape) for tensor in adapter.tensors()] == [(0, 8), (0, 4)]


def test_a_value_beyond_float16_is_refused_by_site_and_field() -> None:
    host = host_for(100, torch.float16)
    with pytest.raises(AdapterRejected, match=r"up at layers\.0\.q reaches 70000, .*float16.*--dtype"):
        host.put("a", lowered({"layers.0.q": Edit(down=rows(1), up=torch.full((2, 8), -70000.0))}))
    assert host.used_bytes == host.num_adapters == 0


def test_values_that_are_not_finite_are_refused_by_site_and_field() -> None:
    with pytest.raises(AdapterRejected, match=r"down at layers\.0\.q holds NaN"):
        host_for(100).put("a", lowered({"layers.0.q": Edit(down=torch.tensor([[1.0, torch.nan]]))}))


def test_the_least_recently_used_goes_first() -> None:
    host = host_for(num_rows=8)
    host.put("a", pair(1))
    host.put("b", pair(2))
    assert host.get("a") is not None
    host.put("c", pair(3))
    assert [digest for digest in "abc" if host.holds(digest)] == ["a", "c"]
    assert host.num_evictions == 1


def test_asking_whether_it_is_there_is_no_use() -> None:
    host = host_for(num_rows=8)
    host.put("a", pair(1))
    host.put("b", pair(2))
    assert host.holds("a")
    host.put("c", pair(3))
    assert not host.holds("a")


def test_an_evicted_adapter_stays_whole_for_its_holder() -> None:
    host = host_for(num_rows=4)
    first = host.put("a", pair(1))
    host.put("b", pair(2))
    assert host.get("a") is None
    assert [torch.equal(t.tensor, s) for t, s in zip(first.tensors(), (rows(2), rows(3)), strict=True)] == [True, True]


def test_what_is_larger_than_the_budget_is_refused_and_evicts_nobody() -> None:
    host = host_for(num_rows=5)
    host.put("a", pair(1))
    with pytest.raises(AdapterRejected, match=r"needs 192 bytes.*160.*--host-memory"):
        host.put("b", lowered({"q": Edit(down=rows(7, num_rows=6))}))
    assert host.holds("a")


def test_what_is_kept_is_not_evicted_until_it_is_unkept() -> None:
    host = host_for(num_rows=4)
    host.put("a", pair(1))
    host.keep("a")
    with pytest.raises(AdapterRejected, match="--host-memory"):
        host.put("b", pair(2))
    assert host.holds("a")
    assert host.check_integrity() == ()
    host.unkeep("a")
    host.put("b", pair(2))
    assert not host.holds("a")


def test_only_what_is_there_can_be_kept() -> None:
    host = host_for(4)
    assert not host.keep("a")
    host.put("a", pair(1))
    assert host.keep("a")
    with pytest.raises(AdapterRejected, match="of which 1 that are pinned or still in use may not be evicted"):
        host.put("b", pair(2))
    assert host.check_integrity() == ()


def test_the_same_adapter_again_is_the_one_that_is_there() -> None:
    host = host_for(100)
    assert host.put("a", pair(1)) is host.put("a", pair(1))
    assert host.num_adapters == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["put", "get", "drop", "keep"]), st.integers(0, 5)), max_size=30))
def test_the_books_balance_after_any_history(history: list[tuple[str, int]]) -> None:
    """Adapters n and n + 1 share a tensor."""
    host = host_for(num_rows=8)
    for verb, n in history:
        digest = str(n)
        if verb == "put":
            with suppress(AdapterRejected):  # when all the others are kept
                host.put(digest, lowered({"q": Edit(down=rows(n), up=rows(n + 1))}))
        else:
            getattr(host, verb)(digest)
        assert host.check_integrity() == ()
        assert host.used_bytes <= host.max_bytes
    for n in range(6):
        host.drop(str(n))
    assert host.used_bytes == 0


def test_many_threads_put_and_drop_at_once() -> None:
    host = host_for(num_rows=8)

    def work(n: int) -> None:
        host.put(str(n % 5), pair(n % 5))
        if n % 3 == 0:
            host.drop(str((n + 1) % 5))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(200)))
    assert host.check_integrity() == ()
    assert host.used_bytes <= host.max_bytes
