"""Adapters moved by hand: an unload that frees what it says, a pin that holds, and nothing left of what is refused."""

import random
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import pytest

from server.adapters.method import Lowered
from server.adapters.registry import Lease, Unloaded
from server.adapters.residency import Freed
from server.ground.errors import AdapterNotFound, AdapterRejected, Conflict, Overloaded
from tests.adapters.folders import load_folder
from tests.adapters.test_registry import (
    PATIENCE_S,
    ROW_BYTES,
    Build,
    House,
    assert_nothing_left,
    build,
    is_content,
    is_content_on,
)

__all__ = ["build"]  # the fixture
BYTES = 4 * ROW_BYTES  # of an adapter of rank 2: two rows down, two up


def until(is_true: Callable[[], bool]) -> None:
    waited = threading.Event()
    for _ in range(PATIENCE_S * 200):
        if is_true():
            return
        waited.wait(0.005)
    raise AssertionError("it did not happen")


def unloading(house: House, pool: ThreadPoolExecutor, name: str) -> "Future[Unloaded]":
    """An unload that has begun and waits for what runs."""
    content = house.registry._books.catalog.entries[name].current.content
    before = content.num_unloads
    future = pool.submit(house.registry.unload, name)
    until(lambda: content.num_unloads > before)
    return future


def use(house: House, lease: Lease) -> None:
    house.admit(lease)
    house.registry.retire(lease.version)


# Load


def test_a_load_brings_it_to_host_and_device_and_tells_the_bytes(build: Build) -> None:
    house = build({"a": 1})
    loaded = house.registry.load("a")
    assert loaded.info.tiers == ("store", "host", "device")
    assert (loaded.info.host_bytes, loaded.info.device_bytes) == (BYTES, BYTES)
    assert loaded.duration_s >= 0
    assert (house.host.used_bytes, house.device.used_bytes) == (BYTES, BYTES)
    assert (loaded.info.num_requests, loaded.info.last_used) == (0, None), "nobody has used it"
    house.registry.load("a")
    assert len(house.loaded) == 1
    with house.registry.lease("a") as lease:
        assert house.registry.admit(lease.version) == 1
        house.registry.retire(lease.version)


def test_idle_adapters_make_room_for_a_load_and_running_ones_do_not(build: Build) -> None:
    house = build({"a": 1, "b": 2}, num_device_rows=4)
    with house.registry.lease("a") as running:
        house.admit(running)
        assert house.registry.load("b").info.tiers == ("store", "host")
        house.registry.retire(running.version)
        assert house.registry.load("b").info.tiers == ("store", "host", "device")
        assert house.registry.describe("a").tiers == ("store", "host")


def test_a_load_that_fails_names_the_cause(build: Build) -> None:
    house = build({"a": 1}, num_device_rows=3)
    with pytest.raises(AdapterRejected, match="--adapter-memory"):
        house.registry.load("a")
    with pytest.raises(AdapterNotFound):
        house.registry.load("b")
    assert house.host.used_bytes == house.device.used_bytes == 0
    assert house.registry.stats().num_leases == 0


# Unload


def test_an_unload_frees_the_bytes_it_tells_and_the_next_request_loads_again(build: Build) -> None:
    house = build({"a": 1, "b": 2})
    house.registry.load("b")
    house.registry.load("a")
    unloaded = house.registry.unload("a")
    assert (unloaded.freed.host_bytes, unloaded.freed.device_bytes) == (BYTES, BYTES)
    assert (house.host.used_bytes, house.device.used_bytes) == (BYTES, BYTES), "b's"
    assert unloaded.version.digest not in house.device.slots
    info = house.registry.describe("a")
    assert (info.tiers, info.host_bytes, info.device_bytes) == (("store",), 0, 0)
    assert house.registry.stats().unloads_total == 1
    with house.registry.lease("a") as lease:
        assert is_content_on(house, lease, 1)
    assert len(house.loaded) == 3
    assert house.registry.check_integrity() == ()


def test_unloading_what_is_cold_frees_nothing_and_says_so(build: Build) -> None:
    house = build({"a": 1})
    freed = house.registry.unload("a").freed
    assert (freed.host_bytes, freed.device_bytes) == (0, 0)
    with pytest.raises(AdapterNotFound, match="no adapter 'b'"):
        house.registry.unload("b")


def test_an_unload_waits_for_what_runs_and_holds_back_what_comes(build: Build) -> None:
    house = build({"a": 1})
    with house.registry.lease("a") as running, house.registry.lease("a") as later, ThreadPoolExecutor(1) as pool:
        house.admit(running)
        future = unloading(house, pool, "a")
        assert house.registry.admit(later.version) is None, "else a steady stream would never let it end"
        assert house.device.slots, "a sequence runs on it"
        house.registry.retire(running.version)
        assert future.result(PATIENCE_S).freed.device_bytes == BYTES
        assert is_content_on(house, later, 1)
    assert house.registry.check_integrity() == ()


def test_an_unload_waits_for_a_load_that_is_under_way(build: Build) -> None:
    gate = threading.Event()

    def slow(folder: object) -> Lowered:
        gate.wait()
        return load_folder(folder)  # type: ignore[arg-type]

    house = build({"a": 1}, load=slow)
    with house.registry.lease("a"), ThreadPoolExecutor(1) as pool:
        future = unloading(house, pool, "a")
        gate.set()
        assert future.result(PATIENCE_S).freed.host_bytes == BYTES
    assert house.host.used_bytes == 0


def test_an_unload_that_waits_too_long_changes_nothing(build: Build) -> None:
    house = build({"a": 1})
    with house.registry.lease("a") as running, house.registry.lease("a") as other:
        house.admit(running)
        with pytest.raises(Conflict, match=r"1 sequences still ran on a@.* after 0 s.*max_wait_s"):
            house.registry.unload("a", 0)
        use(house, other)
        house.registry.retire(running.version)
    assert len(house.loaded) == 1
    assert house.registry.stats().unloads_total == 0


def test_an_unload_ends_with_the_server(build: Build) -> None:
    house = build({"a": 1})
    with house.registry.lease("a") as running, ThreadPoolExecutor(1) as pool:
        house.admit(running)
        future = unloading(house, pool, "a")
        house.registry.close()
        with pytest.raises(Overloaded, match="shutting down"):
            future.result(PATIENCE_S)
        house.registry.retire(running.version)


def test_an_unload_that_begins_while_it_is_put_on_the_device_frees_it_and_admits_nobody(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = build({"a": 1})
    house.registry.verify("a")
    futures: list[Future[Unloaded]] = []
    with house.registry.lease("a") as lease, ThreadPoolExecutor(1) as pool:
        copy = house.device.copy

        def interrupted(digest: str) -> None:
            futures.append(unloading(house, pool, "a"))
            copy(digest)

        with monkeypatch.context() as patched:
            patched.setattr(house.device, "copy", interrupted)
            assert house.registry.admit(lease.version) is None
        assert futures[0].result(PATIENCE_S).freed == Freed(BYTES, 0)  # it never came to be resident
        assert house.device.used_bytes == 0
        assert is_content_on(house, lease, 1)
    assert house.registry.check_integrity() == ()


def test_a_deletion_during_an_unload_leaves_nothing(build: Build) -> None:
    house = build({"a": 1})
    lease = house.registry.lease("a")
    house.admit(lease)
    with ThreadPoolExecutor(1) as pool:
        future = unloading(house, pool, "a")
        house.registry.delete("a")
        lease.release()
        house.registry.retire(lease.version)
        future.result(PATIENCE_S)
    house.registry.close()
    assert_nothing_left(house)


def test_tensors_that_another_adapter_uses_are_not_counted_as_freed(build: Build) -> None:
    house = build({"a": 1, "twin": 1})
    house.registry.load("a")
    assert house.registry.unload("twin").freed.host_bytes == BYTES, "one content under two names is one"
    assert house.registry.describe("a").tiers == ("store",)


# Pin


def test_what_is_pinned_stays_on_host_and_device_whatever_comes(build: Build) -> None:
    house = build({"a": 1, "b": 2, "c": 3}, num_device_rows=8, num_host_rows=8)
    info = house.registry.pin("a")
    assert (info.is_pinned, info.tiers) == (True, ("store", "host", "device"))
    for name in "bcbc":
        with house.registry.lease(name) as lease:
            use(house, lease)
    assert house.registry.describe("a").tiers == ("store", "host", "device")
    assert house.registry.stats().num_pinned == 1
    house.registry.unpin("a")
    for name in "bc":
        with house.registry.lease(name) as lease:
            use(house, lease)
    assert house.registry.describe("a").tiers == ("store",)
    assert house.registry.check_integrity() == ()


def test_a_pin_brings_back_a_host_copy_that_was_evicted(build: Build) -> None:
    house = build({"a": 1})
    digest = house.registry.load("a").info.digest
    house.host.drop(digest)
    assert house.registry.pin("a").tiers == ("store", "host", "device")


def test_pinned_adapters_leave_room_for_the_largest_of_the_others(build: Build) -> None:
    house = build({"a": 1, "b": 2}, num_device_rows=11, num_host_rows=100)
    house.registry.pin("a")
    with pytest.raises(Conflict, match=r"b@.* 256 of the 352 bytes .* device.* needs 128.*--adapter-memory") as caught:
        house.registry.pin("b")
    assert caught.value.param == "adapter"
    assert not house.registry.describe("b").is_pinned
    house.registry.unpin("a")
    house.registry.pin("b")


def test_the_host_too_keeps_room(build: Build) -> None:
    house = build({"a": 1}, num_host_rows=7)
    with pytest.raises(Conflict, match=r"128 of the 224 bytes .* host.*--host-memory"):
        house.registry.pin("a")
    assert house.registry.check_integrity() == ()


def test_a_pinned_adapter_is_not_unloaded_and_the_refusal_says_what_to_do(build: Build) -> None:
    house = build({"a": 1, "twin": 1})
    house.registry.pin("a")
    for name in ("a", "twin"):
        with pytest.raises(Conflict, match=r"POST /v1/adapters/a@[0-9a-f]{12}/unpin"):
            house.registry.unload(name)
    house.registry.unpin("a")
    assert house.registry.unload("a").freed.device_bytes == BYTES


def test_a_pin_waits_for_room_and_is_undone_where_none_comes(build: Build) -> None:
    house = build({"a": 1, "b": 2, "c": 3}, num_device_rows=8)
    with house.registry.lease("b") as b, house.registry.lease("c") as c, ThreadPoolExecutor(1) as pool:
        house.admit(b)
        house.admit(c)
        with pytest.raises(Overloaded, match="in use for 0 s"):
            house.registry.pin("a", 0)
        assert not house.registry.describe("a").is_pinned
        future = pool.submit(house.registry.pin, "a")
        house.registry.retire(c.version)
        assert future.result(PATIENCE_S).tiers == ("store", "host", "device")
        house.registry.retire(b.version)


def test_what_is_being_unloaded_cannot_be_pinned(build: Build) -> None:
    house = build({"a": 1})
    with house.registry.lease("a") as running, ThreadPoolExecutor(1) as pool:
        house.admit(running)
        future = unloading(house, pool, "a")
        with pytest.raises(Overloaded, match="being unloaded"):
            house.registry.pin("a")
        house.registry.retire(running.version)
        future.result(PATIENCE_S)
    assert house.registry.pin("a").is_pinned


def test_a_pin_is_on_a_version_and_ends_with_its_name(build: Build) -> None:
    house = build()
    first = house.upload("a", 1).digest
    house.registry.pin("a")
    assert not house.upload("a", 2, replace=True).is_pinned
    assert house.registry.describe(f"a@{first[:6]}").is_pinned
    house.registry.delete("a")
    house.registry.close()
    assert_nothing_left(house)


def test_an_adapter_that_only_pinned_ones_keep_out_is_refused_and_does_not_wait_for_ever(build: Build) -> None:
    house = build({"a": 1}, num_device_rows=8)
    house.store_adapter("large", 2, rank=4)
    house = house.reopened()
    house.registry.pin("a")
    with house.registry.lease("large") as lease, pytest.raises(Conflict, match=r"needs 256 .*leave 128 of 256.*unpin"):
        house.admit(lease)
    with pytest.raises(Conflict, match="unpin one"):
        house.registry.load("large")
    house.registry.unpin("a")
    assert house.registry.load("large").info.tiers == ("store", "host", "device")
    house.registry.close()


def test_unpinning_is_no_use_and_needs_no_pin(build: Build) -> None:
    house = build({"a": 1})
    assert not house.registry.unpin("a").is_pinned
    assert house.loaded == []
    with pytest.raises(AdapterNotFound):
        house.registry.unpin("b")


# Storms


def test_after_a_storm_of_verbs_every_answer_was_its_own_and_nothing_is_left(build: Build) -> None:
    """Requests and an engine's admissions against loads, unloads, pins and rollbacks, on tiers too small for all."""
    house = build(num_device_rows=12, num_host_rows=16)
    seeds = {}
    for name in "abc":
        for seed in (ord(name), ord(name) + 10):
            seeds[house.upload(name, seed, replace=True).digest] = seed
    engine = threading.Lock()  # admissions come from one thread at a time

    def request(draw: random.Random) -> None:
        with house.registry.lease(draw.choice("abc")) as lease:
            with engine:
                slot = house.admit(lease)
            adapter = house.device.adapters[lease.version.digest]
            assert house.device.slots[lease.version.digest] == slot
            assert is_content(adapter, seeds[lease.version.digest])
            house.registry.retire(lease.version)

    def administer(draw: random.Random) -> None:
        verb, name = draw.choice(("load", "unload", "pin", "unpin", "roll_back")), draw.choice("abc")
        with suppress(Conflict, Overloaded):
            getattr(house.registry, verb)(name)
        if verb == "pin":
            for info in house.registry.versions(name):
                house.registry.unpin(f"{name}@{info.digest}")

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(25):
            (administer if draw.random() < 0.5 else request)(draw)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    stats = house.registry.stats()
    assert (stats.num_leases, stats.num_residencies, stats.num_pinned) == (0, 0, 0)
    assert house.registry.check_integrity() == ()
    for name in "abc":
        house.registry.unload(name)
        house.registry.delete(name)
    house.registry.close()
    assert_nothing_left(house)
