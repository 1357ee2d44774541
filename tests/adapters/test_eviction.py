"""What a place is worth: what is used often, lately and dear to reload stays, and a scan takes nothing from it."""

import random
from collections import OrderedDict
from collections.abc import Iterable

import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from hypothesis.strategies import booleans, integers

from server.adapters.eviction import HALF_LIFE, EvictionOrder, Uses
from server.ground.errors import AdapterRejected
from tests.adapters.test_host import host_for, pair

SCANNED = 10_000  # numbers from here on are of adapters that are asked for once


def used(*moments: int) -> Uses:
    uses = Uses()
    for moment in moments:
        uses.add(moment)
    return uses


def test_among_equals_the_last_used_is_worth_most() -> None:
    assert used(1).worth(1.0, 100) < used(2).worth(1.0, 100)
    assert used(1, 4).worth(1.0, 100) < used(2, 5).worth(1.0, 100)


def test_what_was_used_once_goes_before_what_was_used_more_often_however_long_ago() -> None:
    assert used(10**9).worth(100.0, 1) < used(1, 2).worth(1e-9, 10**12)


def test_a_use_counts_half_after_a_half_life() -> None:
    assert used(0, HALF_LIFE).faded == pytest.approx(1.5)
    often, lately = used(*[0] * 4), used(*[HALF_LIFE] * 2)
    assert often.worth(1.0, 100) == lately.worth(1.0, 100)


def test_it_is_worth_more_the_dearer_its_reload_and_the_fewer_its_bytes() -> None:
    assert used(1, 2).worth(1.0, 100) < used(1, 2).worth(2.0, 100)
    assert used(1, 2).worth(1.0, 100) > used(1, 2).worth(1.0, 200)
    assert used(1, 2).worth(0.0, 0) > used(1, 2).worth(0.0, 1 << 30), "nothing is free, and nothing has no size"


def test_billions_of_uses_neither_overflow_nor_underflow() -> None:
    old, new = used(1, 2), used(10**12, 10**12 + 1)
    old.add(10**12)
    assert old.faded == pytest.approx(1.0)
    assert old.worth(1.0, 100) < new.worth(1.0, 100)


# Against plain LRU, on traces of adapters of one size


def zipf(num_uses: int, seed: int, first: int = 0) -> list[int]:
    ranks = range(1, 201)
    return [first + n for n in random.Random(seed).choices(range(200), [1 / rank for rank in ranks], k=num_uses)]


def mixed(popular: list[int], num_scanned: int, seed: int) -> list[int]:
    """Popular uses in their order, with a scan spread over them."""
    dice, scan = random.Random(seed), iter(range(SCANNED, SCANNED + num_scanned))
    share = num_scanned / len(popular)
    return [n for one in popular for n in (one, *(next(scan, one) for _ in range(int(share + dice.random()))))]


def hit_ratio(trace: Iterable[int], num_places: int) -> float:
    """Of the uses that are no scan's, as `Uses` decides."""
    places: set[int] = set()
    uses: dict[int, Uses] = {}
    hits = asked = 0
    for now, adapter in enumerate(trace):
        of_adapter = uses.setdefault(adapter, Uses())
        of_adapter.add(now)
        asked += adapter < SCANNED
        hits += adapter in places and adapter < SCANNED
        if adapter not in places and len(places) == num_places:
            places.remove(min(places, key=lambda other: uses[other].worth(1.0, 1)))
        places.add(adapter)
    return hits / asked


def lru_hit_ratio(trace: Iterable[int], num_places: int) -> float:
    places: OrderedDict[int, None] = OrderedDict()
    hits = asked = 0
    for adapter in trace:
        asked += adapter < SCANNED
        hits += adapter in places and adapter < SCANNED
        places[adapter] = None
        places.move_to_end(adapter)
        if len(places) > num_places:
            places.popitem(last=False)
    return hits / asked


@pytest.mark.parametrize("num_places", [8, 25])
def test_it_hits_more_often_than_lru_under_zipfs_law_a_scan_and_a_shift(num_places: int) -> None:
    popular = zipf(2000, seed=1)
    for trace, least_gain in (
        (popular, 1.1),
        (mixed(popular, 2000, seed=1), 1.3),
        (popular[:1000] + list(range(SCANNED, SCANNED + 2000)) + popular[1000:], 1.05),
        (popular[:1000] + zipf(1000, seed=2, first=1000), 1.0),
    ):
        assert hit_ratio(trace, num_places) > least_gain * lru_hit_ratio(trace, num_places)


# The order of a tier's members


class Member:
    """Of an order: what its place is worth never falls, whether it is asked for or may go changes at will."""

    def __init__(self) -> None:
        self.rate, self.is_asked, self.is_kept = 0, False, False

    def worth(self) -> tuple[bool, int] | None:
        return None if self.is_kept else (self.is_asked, self.rate)


class OrderBeside(RuleBasedStateMachine):
    """An order, and the members in the order in which they were last touched, of which the least is looked for."""

    def __init__(self) -> None:
        super().__init__()
        self.order: EvictionOrder[int] = EvictionOrder()
        self.members: dict[int, Member] = {}

    def known(self, number: int) -> int | None:
        """One of the members, if there is one."""
        return list(self.members)[number % len(self.members)] if self.members else None

    @rule(number=integers(0, 300))
    def add(self, number: int) -> None:
        self.order.add(number)
        self.members.pop(number, None)
        self.members[number] = Member()

    @rule(number=integers(0, 300), gain=integers(0, 3))
    def use(self, number: int, gain: int) -> None:
        if (known := self.known(number)) is not None:
            self.order.touch(known)
            self.members[known] = member = self.members.pop(known)
            member.rate += gain

    @rule(number=integers(0, 300), is_asked=booleans(), is_kept=booleans())
    def change(self, number: int, is_asked: bool, is_kept: bool) -> None:
        if (known := self.known(number)) is not None:
            member = self.members[known]
            member.is_asked, member.is_kept = is_asked, is_kept

    @rule(number=integers(0, 300))
    def discard(self, number: int) -> None:
        self.order.discard(number)
        self.members.pop(number, None)

    @rule()
    def evict(self) -> None:
        expected = min(
            (number for number, member in self.members.items() if not member.is_kept),
            key=lambda number: (self.members[number].is_asked, self.members[number].rate),
            default=None,
        )
        least = self.order.least(lambda number: self.members[number].worth())
        assert least == expected
        if least is not None:
            self.order.discard(least)
            del self.members[least]

    @invariant()
    def holds_the_same(self) -> None:
        assert self.order.members == set(self.members)


TestOrderBeside = OrderBeside.TestCase


def test_finding_the_least_looks_at_few_of_thousands() -> None:
    order, rates, looked_at = EvictionOrder[int](), dict.fromkeys(range(5000), 0), 0

    def worth(number: int) -> tuple[bool, int]:
        nonlocal looked_at
        looked_at += 1
        return False, rates[number]

    for number in rates:
        order.add(number)
    for moment in range(20_000):  # each a use, an eviction and a newcomer
        used = random.Random(moment).choice(list(order.members)) if moment % 1000 == 0 else moment % 5000
        if used in rates:
            rates[used] = moment
            order.touch(used)
        least = order.least(worth)
        assert least is not None
        order.discard(least)
        rates[least] = moment
        order.add(least)
    assert looked_at < 5 * 20_000


def test_who_comes_and_goes_leaves_nothing_in_an_order() -> None:
    order = EvictionOrder[int]()
    for number in range(100_000):
        order.add(number)
        order.discard(number)
    assert order.members == set()
    assert len(order._floors) < 1000


def test_an_order_survives_a_worth_that_cannot_be_told() -> None:
    order = EvictionOrder[int]()
    order.add(1)

    def unknown(number: int) -> tuple[bool, int]:
        raise RuntimeError("nobody knows")

    with pytest.raises(RuntimeError, match="nobody knows"):
        order.least(unknown)
    assert order.least(lambda number: (False, 0)) == 1


# The host tier asks for the worth that it was told


def test_the_host_evicts_the_least_valuable_and_asks_at_that_moment() -> None:
    host, worth = host_for(num_rows=8), {"a": 1, "b": 2, "c": 0}
    for seed, digest in enumerate("ab"):
        host.put(digest, pair(seed), lambda digest=digest: (False, worth[digest]))
    worth["a"] = 3
    host.put("c", pair(7), lambda: (False, worth["c"]))
    assert [digest for digest in "abc" if host.holds(digest)] == ["a", "c"], "the newcomer is never its own victim"
    host.put("b", pair(1), lambda: (False, worth["b"]))
    assert [digest for digest in "abc" if host.holds(digest)] == ["a", "b"]
    assert host.check_integrity() == ()


def test_a_put_that_fails_has_evicted_only_what_it_had_to_try() -> None:
    host = host_for(num_rows=8)
    host.put("a", pair(1), lambda: (False, 1))
    host.put("b", pair(2), lambda: (False, 2))
    host.keep("b")
    host.keep("a")
    with pytest.raises(AdapterRejected, match="--host-memory"):
        host.put("c", pair(3))
    assert (host.holds("a"), host.holds("b"), host.holds("c")) == (True, True, False)
    assert host.check_integrity() == ()
