"""Residency on the real tiers: scans, turns and copies beside the steps, with a scheduler where turns are concerned."""

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from server.adapters import residency
from server.adapters.method import Lowered
from server.adapters.registry import NUM_COPIERS, Lease
from server.engine.blocks import BlockPool
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.sequence import SamplingParams, Sequence, SequenceStatus
from server.ground.errors import AdapterRejected, Conflict, Overloaded
from tests.adapters.folders import load_folder
from tests.adapters.test_custody import BYTES
from tests.adapters.test_registry import Build, House, build
from tests.api.conftest import eventually

__all__ = ["build"]
NUM_SCANNED = 12


def use(house: House, name: str) -> None:
    with house.registry.lease(name) as lease:
        house.admit(lease)
        house.registry.retire(lease.version)


def tiers(house: House, name: str) -> tuple[str, ...]:
    return house.registry.describe(name).tiers


@pytest.mark.parametrize("num_host_rows", [100, 12], ids=["a large host", "a host for three"])
def test_a_scan_of_cold_adapters_empties_neither_device_nor_host_of_popular_ones(
    build: Build, num_host_rows: int
) -> None:
    scanned = {f"scanned-{seed}": seed for seed in range(10, 10 + NUM_SCANNED)}
    house = build({"a": 1, "b": 2, **scanned}, num_device_rows=12, num_host_rows=num_host_rows)
    for name in "abab":
        use(house, name)
    for name in scanned:
        use(house, name)
    assert tiers(house, "a") == tiers(house, "b") == ("store", "host", "device")
    assert house.registry.stats().device_evictions_total == NUM_SCANNED - 1
    assert len(house.loaded) == 2 + NUM_SCANNED
    assert house.registry.check_integrity() == ()


def test_what_must_come_from_the_store_again_stays_on_the_device(build: Build) -> None:
    houses: list[House] = []

    def slow(folder: Path) -> Lowered:
        houses[0].now_s += 2.0
        return load_folder(folder)

    house = build({"a": 1, "b": 2, "c": 3}, num_device_rows=8, load=slow)
    houses.append(house)
    for name in "abab":
        use(house, name)
    house.host.drop(house.registry.describe("a").digest)  # used longest ago, and now the dearest
    use(house, "c")
    assert "device" in tiers(house, "a")
    assert "device" not in tiers(house, "b")


def test_what_a_request_waits_for_is_evicted_from_the_host_last(build: Build) -> None:
    house = build({"a": 1, "b": 2, "c": 3, "d": 4}, num_device_rows=4, num_host_rows=12)
    for name in "aabb":
        use(house, name)
    house.registry.verify("c")
    with house.registry.lease("c"):
        house.registry.verify("d")
        assert "host" in tiers(house, "c"), "used by nobody yet, but wanted"
        assert "host" not in tiers(house, "a")


def test_a_full_device_is_asked_again_only_when_something_has_changed(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = build({"a": 1, "b": 2}, num_device_rows=4)
    with house.registry.lease("a") as a, house.registry.lease("b") as b:
        house.admit(a)
        house.registry.verify("b")
        asked: list[str] = []
        reserve = house.device.reserve
        monkeypatch.setattr(
            house.device, "reserve", lambda digest, adapter: asked.append(digest) or reserve(digest, adapter)
        )
        for _ in range(50):
            assert house.registry.admit(b.version) is None
            assert house.registry.lacks_room(b.version)
        assert len(asked) == 1, "256 that wait must not cost 256 searches in every step"
        house.registry.retire(a.version)
        assert house.registry.admit(b.version) is not None
        assert not house.registry.lacks_room(b.version)
        house.registry.retire(b.version)


def test_what_is_loading_or_unloading_does_not_lack_room(build: Build) -> None:
    house = build({"a": 1, "b": 2}, num_device_rows=4)
    with house.registry.lease("a") as a:
        house.admit(a)
        with house.registry.lease("b") as b:
            house.registry.verify("b")
            assert house.registry.admit(b.version) is None
            assert house.registry.lacks_room(b.version)
            house.host.drop(b.version.digest)
            house.registry.retire(a.version)
            assert house.registry.admit(b.version) is None, "it has left the host meanwhile"
            assert not house.registry.lacks_room(b.version)
            house.admit(b)
            house.registry.retire(b.version)


def test_the_least_valuable_is_neither_pinned_nor_popular(build: Build) -> None:
    house = build({"a": 1, "b": 2, "c": 3}, num_device_rows=12)
    for name in "aabbc":
        use(house, name)
    leases = {name: house.registry.lease(name) for name in "abc"}
    versions = [lease.version for lease in leases.values()]
    assert house.registry.least_valuable(versions) == leases["c"].version
    house.registry.pin("c")
    assert house.registry.least_valuable(versions) == leases["a"].version
    house.registry.pin("a")
    assert house.registry.least_valuable([leases["a"].version, leases["c"].version]) is None
    assert house.registry.least_valuable([]) is None
    for lease in leases.values():
        lease.release()


# Turns, with a scheduler on the real tiers and a clock of the test's


class Turns:
    """A scheduler whose steps take a tenth of a second each, and produce token 1 for everybody."""

    def __init__(self, house: House, limit_s: float) -> None:
        self.house, self.now_s, self.num_added = house, 0.0, 0
        limits = SchedulerLimits(128, 256, 500, 1000, max_adapter_wait_s=limit_s)
        self.scheduler = Scheduler(limits, BlockPool(400, 16), house.registry, clock=lambda: self.now_s)
        self.leases: dict[Sequence, Lease] = {}

    def add(self, name: str, max_tokens: int) -> Sequence:
        lease = self.house.registry.lease(name)
        params = SamplingParams(max_tokens, ignore_eos=True)
        sequence = Sequence(f"s{self.num_added}", [1, 2, 3], params, lease.version, lease.version.digest)
        self.num_added += 1
        self.leases[sequence] = lease
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> None:
        batch = self.scheduler.schedule()
        assert not batch.failed
        for sequence in self.scheduler.commit(batch, {i.sequence.sequence_id: 1 for i in batch.sequences}):
            self.leases.pop(sequence).release()
        self.now_s += 0.1
        self.scheduler.check_integrity()

    def run_to_the_end(self) -> None:
        for _ in range(5000):
            if not self.leases:
                return
            self.step()
        raise AssertionError("something never ends")


def warm(house: House, names: Iterable[str]) -> None:
    for name in names:
        house.registry.verify(name)


def test_a_cold_adapter_beside_popular_ones_without_end_starts_within_the_guarantee(build: Build) -> None:
    house = build({"a": 1, "b": 2, "c": 3}, num_device_rows=8)
    warm(house, "abc")
    turns = Turns(house, limit_s=2.0)
    for _ in range(20):
        turns.add("a", 30)
        turns.add("b", 30)
        turns.step()
    cold, asked_s = turns.add("c", 5), turns.now_s
    while not cold.has_started:
        turns.add("a", 30)
        turns.step()
        assert turns.now_s - asked_s <= 2 * 2.0 + 0.5  # (1 + ceil(1 / 2)) limits, and steps
    turns.run_to_the_end()
    assert turns.scheduler.num_rotations >= 1
    stats = house.registry.stats()
    assert (stats.num_leases, stats.num_residencies) == (0, 0)
    assert house.registry.check_integrity() == ()


def test_more_adapters_than_fit_asked_for_in_a_cycle_all_get_their_turns(build: Build) -> None:
    names = "abcde"
    house = build({name: seed for seed, name in enumerate(names)}, num_device_rows=8)
    warm(house, names)
    turns = Turns(house, limit_s=0.5)
    asked = {turns.add(names[n % 5], 40): turns.now_s for n in range(10)}
    while turns.leases:
        turns.step()
        for sequence, asked_s in asked.items():
            is_new = not sequence.has_started and sequence.status is SequenceStatus.WAITING
            assert not is_new or turns.now_s - asked_s <= (1 + 3) * (0.5 + 0.3)  # five of which two fit: k <= 5
    assert turns.scheduler.num_rotations >= 3
    assert house.registry.check_integrity() == ()


# Copies beside the steps


def with_large(house: House) -> House:
    """The same house with the adapter "large" in its store, opened anew."""
    house.store_adapter("large", 2, rank=3)
    return house.reopened()


class GatedCopies:
    """The device's copies beside the steps wait until the test lets them through."""

    def __init__(self, house: House, monkeypatch: pytest.MonkeyPatch, num_awaited: int = 1) -> None:
        self.gate, self.begun = threading.Event(), threading.Event()
        self.threads: list[str] = []
        steps, copy = threading.current_thread(), house.device.copy

        def gated(digest: str) -> None:
            if threading.current_thread() is not steps:
                self.threads.append(threading.current_thread().name)
                if len(self.threads) == num_awaited:
                    self.begun.set()
                assert self.gate.wait(120)
            copy(digest)

        monkeypatch.setattr(house.device, "copy", gated)
        monkeypatch.setattr(residency, "COPIED_INLINE_BYTES", BYTES)  # rank 2 is small, rank 3 is large


def test_a_large_copy_runs_beside_the_steps_and_begins_with_the_request(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = with_large(build({"small": 1}))
    with house.registry.lease("small") as small:
        house.admit(small)
        house.registry.verify("large")
        copies = GatedCopies(house, monkeypatch)
        with house.registry.lease("large") as large, house.registry.lease("large") as other:
            assert copies.begun.wait(120), "no step has asked for it yet"
            for _ in range(3):
                assert house.registry.admit(large.version) is None
                assert house.registry.admit(small.version) is not None, "what is there waits for nobody"
                house.registry.retire(small.version)
            assert not house.registry.lacks_room(large.version)
            copies.gate.set()
            assert house.admit(large) == house.admit(other)
            assert len(copies.threads) == 1
            house.registry.retire(large.version)
            house.registry.retire(large.version)
        house.registry.retire(small.version)
    assert house.registry.check_integrity() == ()
    house.registry.close()


def test_a_small_adapter_is_admitted_beside_the_copy_of_a_large_one(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = with_large(build({"small": 1}))
    house.registry.verify("small")
    house.registry.verify("large")
    copies = GatedCopies(house, monkeypatch)
    with house.registry.lease("large") as large, house.registry.lease("small") as small:
        assert copies.begun.wait(120)
        assert house.registry.admit(small.version) is not None
        copies.gate.set()
        house.admit(large)
        house.registry.retire(small.version)
        house.registry.retire(large.version)
    house.registry.close()


def test_large_adapters_are_copied_several_at_a_time(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    house = build({})
    for name in "abc":
        house.store_adapter(name, ord(name), rank=3)
    house = house.reopened()
    warm(house, "abc")
    copies = GatedCopies(house, monkeypatch, num_awaited=NUM_COPIERS)
    with ExitStack() as held:
        leases = [held.enter_context(house.registry.lease(name)) for name in "abc"]
        assert copies.begun.wait(120)
        copies.gate.set()
        assert len({house.admit(lease) for lease in leases}) == 3
        for lease in leases:
            house.registry.retire(lease.version)
    assert house.registry.check_integrity() == ()
    house.registry.close()


def test_who_finds_the_device_full_of_copies_under_way_waits_for_their_end(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = with_large(build({"small": 1}, num_device_rows=6 + 4 - 1))
    warm(house, ["small", "large"])
    copies = GatedCopies(house, monkeypatch)
    with house.registry.lease("large") as large, house.registry.lease("small") as small:
        assert copies.begun.wait(120)
        assert house.registry.admit(small.version) is None
        assert house.registry.lacks_room(small.version), "nothing is resident yet, but it may fit later"
        copies.gate.set()
        house.admit(large)
        house.registry.retire(large.version)
        house.admit(small)
        house.registry.retire(small.version)
    assert house.registry.check_integrity() == ()
    house.registry.close()


def test_a_copy_by_hand_and_one_for_a_request_are_one(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    house = with_large(build({}))
    warm(house, ["large"])
    copies = GatedCopies(house, monkeypatch)
    with house.registry.lease("large") as large, ThreadPoolExecutor(2) as pool:
        assert copies.begun.wait(120)
        loads = [pool.submit(house.registry.load, "large") for _ in range(2)]
        copies.gate.set()
        for load in loads:
            load.result(120)
        house.admit(large)
        house.registry.retire(large.version)
    assert len(copies.threads) == 1
    house.registry.close()


def test_an_unload_during_a_copy_ends_it_and_frees_all(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    house = with_large(build({}))
    warm(house, ["large"])
    copies = GatedCopies(house, monkeypatch)
    with house.registry.lease("large"), ThreadPoolExecutor(1) as pool:
        assert copies.begun.wait(120)
        unloading = pool.submit(house.registry.unload, "large", 120.0)
        eventually(lambda: next(iter(house.registry._books.catalog.contents.values())).num_unloads > 0)
        copies.gate.set()
        assert unloading.result(120).freed.host_bytes > 0
    assert house.device.used_bytes == house.host.used_bytes == 0
    assert house.registry.check_integrity() == ()
    house.registry.close()


@pytest.mark.parametrize("part", ["copy", "place"])
def test_a_device_that_fails_beside_the_steps_leaves_nothing_behind_and_is_asked_again(
    build: Build, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    house = with_large(build({}))
    warm(house, ["large"])
    monkeypatch.setattr(residency, "COPIED_INLINE_BYTES", BYTES)
    with monkeypatch.context() as failing:
        failing.setattr(house.device, part, _out_of_memory)
        with pytest.raises(Overloaded, match="on the device"):
            house.registry.load("large")
    assert house.device.used_bytes == 0
    with house.registry.lease("large") as large:
        house.admit(large)
        house.registry.retire(large.version)
    assert house.registry.check_integrity() == ()
    house.registry.close()


def test_a_device_that_fails_in_a_step_fails_that_request_alone(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    house = build({"a": 1})
    warm(house, "a")
    with house.registry.lease("a") as lease:
        with monkeypatch.context() as failing:
            failing.setattr(house.device, "copy", _out_of_memory)
            with pytest.raises(Overloaded, match="no memory"):
                house.registry.admit(lease.version)
        assert house.device.used_bytes == 0
        house.admit(lease)
        house.registry.retire(lease.version)
    assert house.registry.check_integrity() == ()


def _out_of_memory(digest: str) -> int:
    raise RuntimeError(f"out of memory at {digest}")


def test_a_large_adapter_is_never_copied_by_the_thread_of_the_steps(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even when its first try found no room."""
    house = with_large(build({"small": 1}, num_device_rows=6 + 4 - 1))
    warm(house, ["small", "large"])
    copies = GatedCopies(house, monkeypatch)
    copies.gate.set()
    with house.registry.lease("small") as small:
        house.admit(small)
        with house.registry.lease("large") as large:
            eventually(lambda: house.registry.admit(large.version) is None and house.registry.lacks_room(large.version))
            house.registry.retire(small.version)
            house.admit(large)
            assert len(copies.threads) == 1
            house.registry.retire(large.version)
    house.registry.close()


def test_a_prefetch_takes_no_room_from_what_is_worth_more(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    house = with_large(build({"a": 1}, num_device_rows=6))
    use(house, "a")
    use(house, "a")
    house.registry.verify("large")
    monkeypatch.setattr(residency, "COPIED_INLINE_BYTES", BYTES)
    with house.registry.lease("large") as large:
        eventually(lambda: not house.registry._books.catalog.contents[large.version.digest].is_promoting)
        assert "device" in tiers(house, "a")
        house.admit(large)  # asked for by a step, it may
        assert "device" not in tiers(house, "a")
        house.registry.retire(large.version)
    house.registry.close()


def test_who_asks_for_a_large_adapter_that_cannot_be_placed_is_told_why(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = with_large(build({"a": 1}, num_device_rows=6 + 4 - 1))
    house.registry.pin("a")
    house.registry.verify("large")
    monkeypatch.setattr(residency, "COPIED_INLINE_BYTES", BYTES)
    with house.registry.lease("large") as large:
        with pytest.raises(Conflict, match="pinned"):
            house.admit(large)
        house.registry.unpin("a")
        house.admit(large)
        house.registry.retire(large.version)
    house.registry.close()


def test_a_server_that_closes_during_a_copy_waits_for_it(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    house = with_large(build({"a": 1}))
    house.registry.verify("large")
    copies = GatedCopies(house, monkeypatch)
    with house.registry.lease("large"):
        assert copies.begun.wait(120)
        closing = threading.Thread(target=house.registry.close)
        closing.start()
        copies.gate.set()
        closing.join(120)
        assert not closing.is_alive()
    assert house.registry.check_integrity() == ()


def test_a_deletion_during_a_copy_leaves_nothing(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    house = with_large(build({"a": 1}))
    house.registry.verify("large")
    copies = GatedCopies(house, monkeypatch)
    with house.registry.lease("large"):
        assert copies.begun.wait(120)
        house.registry.delete("large")
    copies.gate.set()
    house.registry.close()
    assert house.device.slots == {}
    assert house.host.used_bytes == 0
    assert house.registry.check_integrity() == ()


def test_a_folder_that_is_no_adapter_is_no_wait_for_room(build: Build, tmp_path: Path) -> None:
    house = build({"a": 1}, num_device_rows=3)
    with house.registry.lease("a") as lease, pytest.raises(AdapterRejected, match="--adapter-memory"):
        house.admit(lease)
    assert not any(tmp_path.glob("store/.incoming/*"))


def test_a_large_adapter_finds_room_beside_small_ones_without_end(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first try runs beside the steps; that something ends in every step must not put off the verdict for ever."""
    house = build({"a": 1, "b": 2}, num_device_rows=8)
    house.store_adapter("large", 3, rank=3)
    house = house.reopened()
    warm(house, "ab")
    house.registry.verify("large")
    monkeypatch.setattr(residency, "COPIED_INLINE_BYTES", BYTES)
    turns = Turns(house, limit_s=1.0)
    for _ in range(3):
        turns.add("a", 1)
        turns.add("b", 40)
        turns.step()
    large, asked_s = turns.add("large", 3), turns.now_s
    content = house.registry._books.catalog.contents[turns.leases[large].version.digest]
    while not large.has_started:
        turns.add("a", 1)
        turns.add("b", 1)
        turns.step()
        # The steps' time is the test's, the copy's is not.
        eventually(lambda: not (content.is_promoting or content.is_copying))
        assert turns.now_s - asked_s <= 2 * 1.0 + 0.5
    turns.run_to_the_end()
    assert house.registry.check_integrity() == ()
    house.registry.close()
