"""Book-keeping of the paged KV cache: which blocks are free, who holds the others, and which known content lies where.

Owns block numbers, reference counts and the keys under which full blocks are found again. Knows nothing about tensors
or sequences. A key stands for everything that decides the content of a block: see `block_key`.

What a block begins with may be known, too, of a block whose rest is somebody's own: that is copied, never shared.

A block is in one of three states: *in use* (it has holders); *kept* (free, but its content can still be found, until
the block is needed for something else); *empty* (free, and nothing is known of its content).
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import groupby

_LENGTH_BYTES = 8


def root_key(cache_salt: str | None) -> bytes:
    """The parent of a sequence's first block: sequences of different salts (None is one of them) share nothing."""
    content = b"" if cache_salt is None else b"salt" + cache_salt.encode()
    return hashlib.sha256(content).digest()


def block_key(parent: bytes, token_ids: Sequence[int], edit_identities: Sequence[str]) -> bytes:
    """The key of a full block: SHA-256 over its parent's key, its tokens and what edits each of them (law 4).

    `parent` is the key of the block before it, `root_key` for the first; so a key stands for all that came before,
    too. `edit_identities` has one item per token: "" for the bare base, else what tells its edits from all others.
    """
    digest = hashlib.sha256(parent)
    start = 0
    for identity, run in groupby(edit_identities):
        stop = start + sum(1 for _ in run)
        for part in (identity.encode(), array("q", token_ids[start:stop]).tobytes()):
            digest.update(len(part).to_bytes(_LENGTH_BYTES, "little"))  # so that no two inputs spell the same bytes
            digest.update(part)
        start = stop
    return digest.digest()


class NoBlocks(Exception):
    """Fewer blocks are free than were asked for; nothing was taken."""

    def __init__(self, *, num_needed: int, num_free: int) -> None:
        self.num_needed = num_needed
        self.num_free = num_free
        super().__init__(f"{num_needed} blocks of the KV cache are needed and {num_free} are free")


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, numbered from 0; `num_free + num_used == num_blocks` always.

    Empty blocks go out first, the lowest-numbered first: a sequence then tends to get consecutive blocks, which
    attention on a CPU reads without a gather. Then kept ones do, the longest unused first. Not thread-safe: it belongs
    to the engine's loop.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a KV cache needs blocks and tokens in them, not {num_blocks} blocks of {block_size}")
        self._block_size = block_size
        self._num_holders = [0] * num_blocks
        self._empty = list(range(num_blocks))
        heapify(self._empty)
        self._kept: OrderedDict[int, None] = OrderedDict()  # the longest unused first
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._start_key_of: dict[int, bytes] = {}
        self._start_of: dict[bytes, int] = {}

    @property
    def num_blocks(self) -> int:
        return len(self._num_holders)

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self._block_size

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._kept)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_kept(self) -> int:
        """Free blocks whose content can still be found."""
        return len(self._kept)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self._block_size)

    def can_allocate(self, count: int) -> bool:
        return count <= self.num_free

    def allocate(self, count: int) -> list[int]:
        """`count` free blocks, ascending, each with one holder; what was kept in them is forgotten.

        Raises NoBlocks, with nothing taken.
        """
        if count < 0:
            raise ValueError(f"count is {count}; it cannot be negative")
        if not self.can_allocate(count):
            raise NoBlocks(num_needed=count, num_free=self.num_free)
        blocks = [heappop(self._empty) for _ in range(min(count, len(self._empty)))]
        while len(blocks) < count:
            block, _ = self._kept.popitem(last=False)
            self._forget_content(block)
            blocks.append(block)
        for block in blocks:
            self._num_holders[block] = 1
            self._forget_start(block)
        return sorted(blocks)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks that hold what `keys` stand for, up to the first key that none is known for. Changes nothing."""
        blocks: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def key_of(self, block: int) -> bytes | None:
        """Under which key a block is found; None for one that is not."""
        return self._key_of.get(block)

    def remember(self, block: int, key: bytes) -> None:
        """Has a block in use be found under `key` from now on; whoever holds it must never write to it again.

        No change where another block is found under the key, or this one under any. Raises ValueError for a block that
        is not in use.
        """
        self._require_holders(block, 1)
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def remember_start(self, block: int, key: bytes) -> None:
        """Has a block in use be found by what its first tokens are, until the block is allocated anew.

        Its holder may go on to write behind them. No change where another block is found so, or this one by others.
        """
        self._require_holders(block, 1)
        if key not in self._start_of and block not in self._start_key_of:
            self._start_of[key] = block
            self._start_key_of[block] = key

    def find_start(self, key: bytes) -> int | None:
        """A block that begins with what `key` stands for, to be copied before anything is written to any block."""
        return self._start_of.get(key)

    def _forget_start(self, block: int) -> None:
        key = self._start_key_of.pop(block, None)
        if key is not None:
            del self._start_of[key]

    def forget(self, blocks: Iterable[int]) -> None:
        """Has none of `blocks` be found again; holders keep them. No change for one that is not found anyway."""
        for block in blocks:
            self._forget_start(block)
            self._forget_content(block)
            if block in self._kept:
                del self._kept[block]
                heappush(self._empty, block)

    def _forget_content(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each of `blocks`, which are in use or kept; a kept one is then in use.

        Raises ValueError, with nothing changed, for an empty block.
        """
        counts = Counter(blocks)
        for block in counts:
            if block not in self._kept:
                self._require_holders(block, 1)
        for block, times in counts.items():
            self._kept.pop(block, None)
            self._num_holders[block] += times

    def free(self, blocks: Iterable[int]) -> None:
        """One holder fewer for each of `blocks`; a block without holders is free again, and kept if it can be found.

        Of blocks freed together the last are the first to go: without those before them they are of no use. Raises
        ValueError, with nothing changed, for a block freed more often than it is held.
        """
        counts = Counter(blocks)
        for block, times in counts.items():
            self._require_holders(block, times)
        for block, times in reversed(counts.items()):
            self._num_holders[block] -= times
            if self._num_holders[block]:
                continue
            if block in self._key_of or block in self._start_key_of:
                self._kept[block] = None
            else:
                heappush(self._empty, block)

    def check_integrity(self) -> None:
        """Asserts what holds between any two calls; for tests and for storms."""
        free = {*self._empty, *self._kept}
        assert len(free) == len(self._empty) + len(self._kept)
        assert free == {block for block, num in enumerate(self._num_holders) if not num}
        assert self._kept.keys() == free & (self._key_of.keys() | self._start_key_of.keys())
        assert {key: block for block, key in self._key_of.items()} == self._block_of
        assert {key: block for block, key in self._start_key_of.items()} == self._start_of

    def _require_holders(self, block: int, times: int) -> None:
        num_holders = self._num_holders[block] if 0 <= block < self.num_blocks else 0
        if num_holders < times:
            raise ValueError(f"block {block} has {num_holders} holders and {times} are needed: freed twice?")
