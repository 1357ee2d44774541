"""Book-keeping of the paged KV cache: which blocks are free and how many holders each other block has.

Owns block numbers and reference counts. Knows nothing about tensors, sequences or what a block contains.
"""

from collections import Counter
from collections.abc import Iterable
from heapq import heapify, heappop, heappush


class NoBlocks(Exception):
    """Fewer blocks are free than were asked for; nothing was taken."""

    def __init__(self, *, num_needed: int, num_free: int) -> None:
        self.num_needed = num_needed
        self.num_free = num_free
        super().__init__(f"{num_needed} blocks of the KV cache are needed and {num_free} are free")


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, numbered from 0; `num_free + num_used == num_blocks` always.

    The lowest-numbered free blocks go out first: a sequence then tends to get consecutive blocks, which attention on a
    CPU reads without a gather. Not thread-safe: it belongs to the engine's loop.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a KV cache needs blocks and tokens in them, not {num_blocks} blocks of {block_size}")
        self._block_size = block_size
        self._num_holders = [0] * num_blocks
        self._free = list(range(num_blocks))
        heapify(self._free)
        self._num_used = 0

    @property
    def num_blocks(self) -> int:
        return len(self._num_holders)

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self._block_size

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self._num_used

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self._block_size)

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """The `count` lowest free blocks, ascending, each with one holder. Raises NoBlocks, with nothing taken."""
        if count < 0:
            raise ValueError(f"count is {count}; it cannot be negative")
        if not self.can_allocate(count):
            raise NoBlocks(num_needed=count, num_free=len(self._free))
        blocks = [heappop(self._free) for _ in range(count)]
        for block in blocks:
            self._num_holders[block] = 1
        self._num_used += count
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each of `blocks`. Raises ValueError, with nothing changed, for a block not in use."""
        counts = Counter(blocks)
        for block in counts:
            self._require_holders(block, 1)
        for block, times in counts.items():
            self._num_holders[block] += times

    def free(self, blocks: Iterable[int]) -> None:
        """One holder fewer for each of `blocks`; a block without holders is free again.

        Raises ValueError, with nothing changed, for a block freed more often than it is held.
        """
        counts = Counter(blocks)
        for block, times in counts.items():
            self._require_holders(block, times)
        for block, times in counts.items():
            self._num_holders[block] -= times
            if not self._num_holders[block]:
                heappush(self._free, block)
                self._num_used -= 1

    def _require_holders(self, block: int, times: int) -> None:
        num_holders = self._num_holders[block] if 0 <= block < self.num_blocks else 0
        if num_holders < times:
            raise ValueError(f"block {block} has {num_holders} holders and {times} are needed: freed twice?")
