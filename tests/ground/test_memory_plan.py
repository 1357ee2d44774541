"""The memory plan: parts never exceed the budget, the cache takes what it may, and a refusal's advice comes out."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.ground.errors import StartupRefused
from server.ground.memory_plan import MemoryNeeds, MemoryPlan, plan

MIB = 1 << 20
SIZES = st.integers(0, 400 * MIB)
NEEDS = st.builds(
    MemoryNeeds,
    base_bytes=SIZES,
    graph_bytes=SIZES,
    adapter_bytes=SIZES,
    workspace_bytes=SIZES,
    block_bytes=st.integers(1, 8 * MIB),
    block_tokens=st.sampled_from([8, 64, 128]),
    max_blocks=st.integers(1, 500),
    kv_bytes=st.none() | st.integers(1, 1000 * MIB),
)
FREE = st.integers(0, 4000 * MIB)
SHARES = st.floats(0.01, 1)
PARTS = st.sampled_from([0.25, 1.0])


def planned(needs: MemoryNeeds, free: int, share: float, part: float) -> MemoryPlan | str:
    try:
        return plan(needs, free, share, part)
    except StartupRefused as error:
        return error.message


@given(NEEDS, FREE, SHARES, PARTS)
def test_the_parts_stay_within_the_share(needs: MemoryNeeds, free: int, share: float, part: float) -> None:
    found = planned(needs, free, share, part)
    if isinstance(found, MemoryPlan):
        assert 1 <= found.num_blocks <= needs.max_blocks
        assert found.total_bytes <= found.budget_bytes <= free
        assert sum(size for name, size, _ in found.rows() if name != "free before") == found.budget_bytes
        if needs.kv_bytes is not None:
            assert found.kv_bytes <= needs.kv_bytes


@given(NEEDS, FREE, SHARES, PARTS)
def test_the_cache_takes_all_that_it_may(needs: MemoryNeeds, free: int, share: float, part: float) -> None:
    found = planned(needs, free, share, part)
    if isinstance(found, MemoryPlan) and found.num_blocks < needs.max_blocks:
        allowed = part * (found.budget_bytes - needs.fixed_bytes) if needs.kv_bytes is None else needs.kv_bytes
        assert found.kv_bytes + needs.block_bytes > allowed


@given(NEEDS, FREE, SHARES, PARTS)
def test_a_refusal_says_what_to_turn_and_turned_so_it_fits(
    needs: MemoryNeeds, free: int, share: float, part: float
) -> None:
    message = planned(needs, free, share, part)
    if not isinstance(message, str):
        return
    assert re.search(r"--(memory-share|kv-memory|adapter-memory|quantize)", message)
    raised = re.search(r"raise --memory-share to ([\d.]+)", message)
    if raised:
        assert not isinstance(planned(needs, free, float(raised[1]), part), str)
    lowered = re.search(r"lower --(kv|adapter)-memory to at most (\d+)(MiB)?", message)
    if lowered:
        limit = int(lowered[2]) * (MIB if lowered[3] else 1)
        field = "kv_bytes" if lowered[1] == "kv" else "adapter_bytes"
        again = planned(replace(needs, **{field: limit}), free, share, part)
        # The advice is about one thing at a time: a cache that was given a size may not fit now that the rest does.
        assert isinstance(again, MemoryPlan) or "--kv-memory asks for" in again


SMALL = MemoryNeeds(
    base_bytes=5000 * MIB, graph_bytes=0, adapter_bytes=512 * MIB, workspace_bytes=100 * MIB, block_bytes=16 * MIB,
    block_tokens=128, max_blocks=1000,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "free_mib", "sentence"),
    [
        ({}, 6100, "lower --adapter-memory to at most 374MiB, or raise --memory-share to 0.923"),
        (
            {},
            5650,
            "lower --adapter-memory, and --max-batch-tokens or --max-sequences, or raise --memory-share to 0.997",
        ),
        ({}, 4000, "take a smaller base, or --quantize nf4, or free memory"),
        ({"kv_bytes": 3000 * MIB}, 8000, "lower --kv-memory to at most 1588MiB, or free memory"),
        ({"kv_bytes": 1 * MIB}, 8000, "one block of 128 tokens takes 16777216: raise --kv-memory"),
    ],
)
def test_the_sentence_names_the_dial_and_how_far(changed: dict[str, int], free_mib: int, sentence: str) -> None:
    found = planned(replace(SMALL, **changed), free_mib * MIB, 0.9, 1.0)
    assert isinstance(found, str)
    assert sentence in found


def test_the_table_names_each_part_its_size_and_its_dial() -> None:
    table = plan(SMALL, 10_000 * MIB, 0.9, 0.25).table()
    assert "  base           5,000.0 MiB  MODEL, --quantize" in table
    assert "  KV cache         832.0 MiB  --kv-memory: 52 blocks, 6,656 tokens" in table
    assert "  left           2,556.0 MiB  of --memory-share 0.9" in table
