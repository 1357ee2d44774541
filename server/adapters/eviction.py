"""Which adapter leaves a tier first: what a byte of its place is worth, from its uses and from what a reload costs.

Owns the arithmetic, and the finding of the least among thousands; each tier owns its uses. Knows nothing about bytes,
locks or who may not leave at all; no torch.

An adapter's rate of use is estimated by its uses, each counted half after every HALF_LIFE later uses of any adapter:
between counting uses (1 / 0) and looking at the last one only (1 / infinity), as LRFU does (Lee et al., "LRFU: a
spectrum of policies", IEEE Transactions on Computers 50(12), 2001). The rate times the seconds of a reload, over the
bytes, is what is lost by evicting it, per byte won (Cao and Irani, "Cost-aware WWW proxy caching algorithms", USENIX
1997). All rates fade alike, so the order changes by uses only, and is kept as a logarithm that no time can underflow.

What was used only once goes before all that was used more often: a scan over many adapters, each used once, takes the
place of one-time guests and of nobody else.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

HALF_LIFE = 512  # uses; on Zipf's law, scans and shifts of popularity better than 32, 128 and 2048, or near the best
_MIN_REBUILT = 64  # entries of a heap; one that small is not made anew
_LEAST_COST_S = 1e-3  # what no reload is cheaper than: finding room, a step's wait

_M = TypeVar("_M", bound=Hashable)


class Worth(NamedTuple):
    """What evicting an adapter loses. The least goes first."""

    is_reused: bool
    log_rate: float  # log2 of seconds per byte, as of the first use of all


@dataclass(slots=True)
class Uses:
    """How often, and how lately, one adapter was used; moments are numbers of uses of any adapter."""

    num: int = 0
    faded: float = 0.0  # their number as of `last`, each halved for every HALF_LIFE uses since
    last: int = 0

    def add(self, now: int) -> None:
        """One more use. `now` never falls."""
        self.num += 1
        self.faded = 1.0 + self.faded * 2.0 ** ((self.last - now) / HALF_LIFE)
        self.last = now

    def worth(self, reload_s: float, num_bytes: int) -> Worth:
        """Of its place, if bringing it back takes `reload_s` and its place is `num_bytes`."""
        cost = max(reload_s, _LEAST_COST_S) * max(self.faded, 1.0) / max(num_bytes, 1)
        return Worth(self.num > 1, self.last / HALF_LIFE + math.log2(cost))


class EvictionOrder(Generic[_M]):
    """The members of a tier, and who of them leaves first. Its owner's lock guards it.

    A use only ever adds to what a place is worth. So what a member was worth when it was last looked at is a floor, and
    a heap of floors finds the least by looking at those alone that have the lowest ones: some members, not thousands.
    """

    def __init__(self) -> None:
        # A member's floor: whether it is known, what it is, and when the member was last touched. Entries of members
        # that have gone or were touched since stay in the heap until they come to its top.
        self._floors: list[tuple[bool, Any, int, _M]] = []
        self._touched: dict[_M, int] = {}
        self._moments = itertools.count()

    @property
    def members(self) -> frozenset[_M]:
        return frozenset(self._touched)

    def add(self, member: _M) -> None:
        """A member that was not here, or whose worth may have fallen."""
        self.touch(member)
        if len(self._floors) >= max(2 * len(self._touched), _MIN_REBUILT):
            self._floors = [(False, None, touched, other) for other, touched in self._touched.items()]
            heapq.heapify(self._floors)
        else:
            heapq.heappush(self._floors, (False, None, self._touched[member], member))

    def touch(self, member: _M) -> None:
        """Among those worth the same, the one touched least recently goes first."""
        self._touched[member] = next(self._moments)

    def discard(self, member: _M) -> None:
        self._touched.pop(member, None)

    def least(self, worth: Callable[[_M], tuple[bool, Any] | None]) -> _M | None:
        """The member that goes first; it stays until it is discarded. None where none may go.

        `worth`: whether the member is asked for, which those that are not go before, and what its place is worth; None
        if it may not go now.
        """
        looked_at, asked = [], []
        try:
            while self._floors:
                floor = heapq.heappop(self._floors)
                member = floor[-1]
                touched = self._touched.get(member)
                if touched is None:
                    continue  # it has gone
                looked_at.append(floor)  # goes back as it was, unless it is worth more now
                found = worth(member)
                if found is None:
                    continue
                is_asked, rate = found
                if is_asked:  # which says nothing about what it is worth when nobody asks
                    asked.append((rate, touched, member))
                    continue
                looked_at[-1] = now = (True, rate, touched, member)
                if now <= floor:
                    return member
                heapq.heappush(self._floors, looked_at.pop())
        finally:
            for floor in looked_at:
                heapq.heappush(self._floors, floor)
        return min(asked, key=lambda one: one[:2])[-1] if asked else None
