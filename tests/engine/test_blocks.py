"""The block pool: free and used blocks always make the whole, and a block is free exactly when nobody holds it."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from server.engine.blocks import BlockPool, NoBlocks, block_key, root_key


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


# What decides a key

BASE = ["", "", "", ""]


def test_a_key_is_the_same_for_the_same_content() -> None:
    assert root_key("tenant") == root_key("tenant")
    assert block_key(root_key(None), [1, 2, 3, 4], BASE) == block_key(root_key(None), (1, 2, 3, 4), tuple(BASE))


@pytest.mark.parametrize(
    ("parent", "token_ids", "edits"),
    [
        (root_key(None), [1, 2, 4, 3], BASE),
        (root_key(None), [1, 2, 3], BASE[:3]),
        (root_key(None), [1, 2, 3, 4], ["a"] * 4),
        (root_key(None), [1, 2, 3, 4], ["", "", "", "a"]),
        (root_key(None), [1, 2, 3, 4], ["", "", "a", ""]),
        (root_key(""), [1, 2, 3, 4], BASE),
        (root_key("tenant"), [1, 2, 3, 4], BASE),
        (block_key(root_key(None), [1, 2, 3, 4], BASE), [1, 2, 3, 4], BASE),
    ],
    ids=[
        "order",
        "fewer",
        "adapter",
        "last by an adapter",
        "third by an adapter",
        "empty salt",
        "salt",
        "second block",
    ],
)
def test_whatever_changes_keys_and_values_changes_the_key(
    parent: bytes, token_ids: list[int], edits: list[str]
) -> None:
    assert block_key(parent, token_ids, edits) != block_key(root_key(None), [1, 2, 3, 4], BASE)


def test_identities_and_tokens_cannot_be_taken_for_one_another() -> None:
    """The bytes of an identity that ends like a token do not run into the tokens."""
    parent = root_key(None)
    token = 97  # "a", followed by zeros
    assert block_key(parent, [token, 1], ["", ""]) != block_key(parent, [1], ["a" + 7 * "\0"])


# Known content


def kept_pool(num_blocks: int = 4) -> tuple[BlockPool, list[bytes]]:
    """A pool whose blocks were filled, remembered in order, and freed together."""
    pool = BlockPool(num_blocks, 16)
    keys = [bytes([number]) for number in range(num_blocks)]
    blocks = pool.allocate(num_blocks)
    for block, key in zip(blocks, keys, strict=True):
        pool.remember(block, key)
    pool.free(blocks)
    pool.check_integrity()
    return pool, keys


def test_freed_blocks_are_found_until_they_are_needed() -> None:
    pool, keys = kept_pool()
    assert (pool.num_free, pool.num_kept, pool.num_used) == (4, 4, 0)
    assert pool.find(keys) == [0, 1, 2, 3]
    pool.allocate(4)
    assert (pool.find(keys), pool.num_kept) == ([], 0)


def test_finding_stops_at_the_first_gap() -> None:
    pool, keys = kept_pool()
    assert pool.find([*keys[:2], b"unknown", keys[2]]) == [0, 1]


def test_of_blocks_freed_together_the_last_go_first() -> None:
    pool, keys = kept_pool()
    assert pool.allocate(2) == [2, 3]
    assert pool.find(keys) == [0, 1]


def test_empty_blocks_go_out_before_kept_ones_and_the_longest_unused_of_these_first() -> None:
    pool, keys = kept_pool(4)
    pool.share([0])  # used again, and so the last to go
    pool.free([0])
    pool.forget([1])
    assert [pool.allocate(1)[0] for _ in range(4)] == [1, 3, 2, 0]


def test_a_kept_block_can_be_shared_and_is_then_in_use() -> None:
    pool, keys = kept_pool()
    pool.share([1, 1])
    assert (pool.num_used, pool.num_kept) == (1, 3)
    assert pool.allocate(3) == [0, 2, 3]
    assert not pool.can_allocate(1)
    pool.free([1, 1])
    assert pool.find([keys[1]]) == [1]


def test_the_first_block_of_a_content_is_the_one_that_is_found() -> None:
    pool = BlockPool(2, 16)
    first, second = pool.allocate(2)
    pool.remember(first, b"key")
    pool.remember(second, b"key")
    pool.remember(first, b"other")
    assert (pool.find([b"key"]), pool.key_of(second), pool.find([b"other"])) == ([first], None, [])
    pool.free([first, second])
    assert (pool.num_kept, pool.num_free) == (1, 2)


def test_what_is_forgotten_is_not_found_and_stays_with_its_holders() -> None:
    pool = BlockPool(2, 16)
    (block,) = pool.allocate(1)
    pool.remember(block, b"key")
    pool.forget([block, 1])
    assert (pool.find([b"key"]), pool.num_used) == ([], 1)
    pool.free([block])
    assert (pool.num_kept, pool.num_free) == (0, 2)


def test_only_a_block_in_use_can_be_remembered() -> None:
    pool = BlockPool(2, 16)
    with pytest.raises(ValueError, match="has 0 holders"):
        pool.remember(1, b"key")
    assert pool.find([b"key"]) == []


class Holding(RuleBasedStateMachine):
    """Random holders and keys, checked against a plain count of the ones and a plain table of the others."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, 4)
        self.holders: Counter[int] = Counter()
        self.known: dict[bytes, int] = {}
        self.kept: list[int] = []  # the longest unused first

    @rule(count=st.integers(0, 6))
    def allocate(self, count: int) -> None:
        unheld = [block for block in range(self.pool.num_blocks) if not self.holders[block]]
        empty = [block for block in unheld if block not in self.kept]
        if self.pool.can_allocate(count):
            blocks = self.pool.allocate(count)
            assert blocks == sorted((empty + self.kept)[:count])
            self.holders.update(blocks)
            self.kept = [block for block in self.kept if block not in blocks]
            self.known = {key: block for key, block in self.known.items() if block not in blocks}
        else:
            assert len(unheld) < count
            with pytest.raises(NoBlocks):
                self.pool.allocate(count)

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        shareable = sorted({*+self.holders, *self.kept})
        if shareable:
            blocks = data.draw(st.lists(st.sampled_from(shareable), max_size=4))
            self.pool.share(blocks)
            self.holders.update(blocks)
            self.kept = [block for block in self.kept if block not in blocks]

    @rule(data=st.data(), key=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def remember(self, data: st.DataObject, key: bytes) -> None:
        if +self.holders:
            block = data.draw(st.sampled_from(sorted(+self.holders)))
            self.pool.remember(block, key)
            if key not in self.known and block not in self.known.values():
                self.known[key] = block

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.integers(0, self.pool.num_blocks - 1), max_size=3))
        self.pool.forget(blocks)
        self.kept = [block for block in self.kept if block not in blocks]
        self.known = {key: block for key, block in self.known.items() if block not in blocks}

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        holds = sorted(self.holders.elements())
        if holds:
            indices = data.draw(st.lists(st.integers(0, len(holds) - 1), unique=True))
            blocks = [holds[index] for index in indices]
            self.pool.free(blocks)
            self.holders.subtract(blocks)
            gone = [block for block in dict.fromkeys(blocks) if not self.holders[block]]
            self.kept += [block for block in reversed(gone) if block in self.known.values()]

    @invariant()
    def free_and_used_make_the_whole(self) -> None:
        assert self.pool.num_free + self.pool.num_used == self.pool.num_blocks
        assert self.pool.num_used == len(+self.holders)
        assert self.pool.num_kept == len(self.kept)
        self.pool.check_integrity()

    @invariant()
    def what_is_known_is_found(self) -> None:
        for key in (b"a", b"b", b"c", b"d"):
            assert self.pool.find([key]) == ([self.known[key]] if key in self.known else [])


TestHolding = Holding.TestCase
TestHolding.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)
