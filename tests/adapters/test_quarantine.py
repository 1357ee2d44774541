"""Quarantine: an adapter with which the output overflows again and again is served to nobody; its neighbours are."""

import pytest

from server.adapters.quarantine import MAX_OVERFLOWS, WINDOW_S
from server.adapters.registry import Lease
from server.ground.errors import AdapterNotFound, AdapterQuarantined
from tests.adapters.test_registry import Build, House, build

__all__ = ["build"]  # the fixture


def fail(house: House, lease: Lease | None, times: int = MAX_OVERFLOWS) -> None:
    assert lease is not None
    with lease:
        for _ in range(times):
            lease.blame()


def test_it_takes_several_failures_and_then_requests_are_refused_by_name(build: Build) -> None:
    house = build({"a": 1, "b": 2})
    fail(house, house.registry.lease("a"), MAX_OVERFLOWS - 1)
    fail(house, house.registry.lease("a"), 1)
    with pytest.raises(AdapterQuarantined, match=r"The adapter a@[0-9a-f]{12} is quarantined.*adapters/a/lift"):
        house.registry.lease("a")
    house.registry.lease("b").release()
    stats = house.registry.stats()
    assert (stats.num_quarantined, stats.overflows_total, stats.num_leases) == (1, MAX_OVERFLOWS, 0)
    assert house.registry.describe("a").is_quarantined
    assert house.registry.check_integrity() == ()


def test_failures_long_past_do_not_count(build: Build) -> None:
    house = build({"a": 1})
    for _ in range(MAX_OVERFLOWS + 1):
        fail(house, house.registry.lease("a"), 1)
        house.now_s += WINDOW_S
    assert not house.registry.describe("a").is_quarantined


def test_other_content_of_the_name_is_served_and_the_old_one_stays_refused(build: Build) -> None:
    house = build({"a": 1})
    old = house.registry.describe("a").digest
    fail(house, house.registry.lease("a"))
    house.upload("a", 5, replace=True)
    house.registry.lease("a").release()
    with pytest.raises(AdapterQuarantined):
        house.registry.lease(f"a@{old}")


def test_a_mix_with_it_is_refused_and_an_operator_lets_both_back(build: Build) -> None:
    house = build({"a": 1, "b": 2})
    mix = [("a", 0.5), ("b", 0.5)]
    fail(house, house.registry.lease_mix(mix))
    with pytest.raises(AdapterQuarantined, match="smaller weights"):
        house.registry.lease_mix(mix)
    house.registry.lease("a").release()  # its portions may be sound
    fail(house, house.registry.lease("a"))
    with pytest.raises(AdapterQuarantined, match="The adapter a@"):
        house.registry.lease_mix([("a", 0.25), ("b", 1.0)])
    assert not house.registry.lift_quarantine("a").is_quarantined
    for lease in (house.registry.lease("a"), house.registry.lease_mix(mix)):
        assert lease is not None
        lease.release()
    assert house.registry.stats().num_quarantined == 0
    with pytest.raises(AdapterNotFound):
        house.registry.lift_quarantine("nobody")
