"""The block pool: free and used blocks always make the whole, and a block is free exactly when nobody holds it."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from server.engine.blocks import BlockPool, NoBlocks


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (16, 0)])
def test_a_pool_without_room_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="needs blocks"):
        BlockPool(num_blocks, block_size)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_blocks_for_tokens_are_rounded_up(num_tokens: int, num_blocks: int) -> None:
    assert BlockPool(4, 16).num_blocks_for(num_tokens) == num_blocks


def test_the_lowest_blocks_go_out_first() -> None:
    pool = BlockPool(8, 16)
    assert pool.allocate(5) == [0, 1, 2, 3, 4]
    pool.free([3, 1])
    assert pool.allocate(3) == [1, 3, 5]
    assert (pool.num_used, pool.num_free) == (6, 2)


def test_no_blocks_takes_nothing_and_says_both_numbers() -> None:
    pool = BlockPool(4, 16)
    pool.allocate(1)
    assert pool.can_allocate(3)
    assert not pool.can_allocate(4)
    with pytest.raises(NoBlocks, match="4 blocks of the KV cache are needed and 3 are free") as refused:
        pool.allocate(4)
    assert (refused.value.num_needed, refused.value.num_free) == (4, 3)
    assert pool.num_free == 3


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="count is -1"):
        BlockPool(4, 16).allocate(-1)


def test_a_shared_block_is_free_when_its_last_holder_frees_it() -> None:
    pool = BlockPool(4, 16)
    blocks = pool.allocate(2)
    pool.share(blocks[:1])
    pool.free(blocks)
    assert (pool.num_used, pool.num_free) == (1, 3)
    pool.free(blocks[:1])
    assert (pool.num_used, pool.num_free) == (0, 4)


@pytest.mark.parametrize("blocks", [[0, 2], [0, 0], [-1], [4]], ids=["free", "twice", "negative", "past the end"])
def test_freeing_more_than_is_held_is_refused_and_frees_nothing(blocks: list[int]) -> None:
    pool = BlockPool(4, 16)
    pool.allocate(2)
    with pytest.raises(ValueError, match="freed twice"):
        pool.free(blocks)
    assert pool.num_used == 2


@pytest.mark.parametrize("blocks", [[0, 2], [-1], [4]])
def test_sharing_a_block_that_is_not_in_use_is_refused_and_shares_nothing(blocks: list[int]) -> None:
    pool = BlockPool(4, 16)
    pool.allocate(2)
    with pytest.raises(ValueError, match="has 0 holders"):
        pool.share(blocks)
    pool.free([0, 1])
    assert pool.num_free == 4


class Holding(RuleBasedStateMachine):
    """Random holders, checked against a plain count of them."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, 4)
        self.holders: Counter[int] = Counter()

    @rule(count=st.integers(0, 6))
    def allocate(self, count: int) -> None:
        unheld = [block for block in range(self.pool.num_blocks) if not self.holders[block]]
        if self.pool.can_allocate(count):
            blocks = self.pool.allocate(count)
            assert blocks == unheld[:count]
            self.holders.update(blocks)
        else:
            assert len(unheld) < count
            with pytest.raises(NoBlocks):
                self.pool.allocate(count)

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        held = sorted(+self.holders)
        if held:
            blocks = data.draw(st.lists(st.sampled_from(held), max_size=4))
            self.pool.share(blocks)
            self.holders.update(blocks)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        holds = sorted(self.holders.elements())
        if holds:
            indices = data.draw(st.lists(st.integers(0, len(holds) - 1), unique=True))
            blocks = [holds[index] for index in indices]
            self.pool.free(blocks)
            self.holders.subtract(blocks)

    @invariant()
    def free_and_used_make_the_whole(self) -> None:
        assert self.pool.num_free + self.pool.num_used == self.pool.num_blocks
        assert self.pool.num_used == len(+self.holders)


TestHolding = Holding.TestCase
TestHolding.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)
