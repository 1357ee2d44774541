"""Mixes in the registry: one adapter to the tiers, held with all that it is made of, and gone when that is."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.adapters import catalog
from server.adapters.format.content import CONFIG_FILE
from server.adapters.method import Edit, Lowered
from server.adapters.registry import FAILURE_MEMORY_S, Lease
from server.adapters.sources import FolderSource
from server.ground.errors import AdapterDamaged, AdapterNotFound, AdapterRejected, BadRequest
from tests.adapters.folders import WIDTH, load_folder, tensors_from, write_folder
from tests.adapters.test_registry import PATIENCE_S, ROW_BYTES, Build, House, build

__all__ = ["build"]

HALVES = (("a", 0.5), ("b", 0.5))


def lease(house: House, *parts: tuple[str, float]) -> Lease:
    made = house.registry.lease_mix(parts)
    assert made is not None
    return made


def counts(house: House) -> tuple[int, int]:
    stats = house.registry.stats()
    return stats.num_leases, stats.num_residencies


def settle(house: House) -> None:
    """Waits for what the two workers were given: when both have come here, they have done all before."""
    for _ in range(2):  # what they were given may give them more
        meeting = threading.Barrier(3)
        with house.registry._books.lock:
            for _ in range(2):
                house.registry._workers.submit(meeting.wait)
        meeting.wait(PATIENCE_S)


def digests(house: House) -> set[str]:
    return set(house.registry._books.catalog.contents)


# What a mix is


def test_equal_mixes_are_one_adapter_in_any_order(build: Build) -> None:
    house = build({"a": 1, "b": 2})
    one, other = lease(house, ("a", 0.7), ("b", 0.3)), lease(house, ("b", 0.3), ("a", 0.7))
    assert one.version.digest == other.version.digest
    assert house.admit(one) == house.admit(other) == 1
    assert house.registry.stats().loads_total == 1
    assert [portion.version.name for portion in other.portions] == ["b", "a"], "told as it was asked for"
    for differing in ([("a", 0.7), ("b", 0.30000000000000004)], [("a", 0.7)], [("a", 0.3), ("b", 0.7)]):
        with lease(house, *differing) as different:
            assert different.version.digest != one.version.digest


def test_the_rows_of_a_mix_are_those_of_its_parts_under_one_another(build: Build) -> None:
    house = build({"a": 1, "b": 2})
    with lease(house, ("b", -0.25), ("a", 2.0)) as mixed:
        house.admit(mixed)
        edit = house.device.adapters[mixed.version.digest].edits["layers.0.q_proj"]
        assert edit.mid_scale is not None
        rows = torch.cat([t.tensor for t in edit.up])
        delta = (rows * edit.mid_scale.tensor[:, None]).T @ torch.cat([t.tensor for t in edit.down])
        parts = {1: 2.0, 2: -0.25}
        deltas = [w * (tensors_from(seed)["up"].T @ tensors_from(seed)["down"]) for seed, w in parts.items()]
        torch.testing.assert_close(delta, deltas[0] + deltas[1])
        house.registry.retire(mixed.version)


@pytest.mark.parametrize("parts", [[("a", 0.0)], [("a", 0.0), ("b", -0.0)]])
def test_a_weight_of_nothing_is_the_base(build: Build, parts: Sequence[tuple[str, float]]) -> None:
    house = build({"a": 1, "b": 2})
    assert house.registry.lease_mix(parts) is None
    assert counts(house) == (0, 0)
    assert house.loaded == []


def test_a_part_of_weight_nothing_is_left_out_but_must_exist(build: Build) -> None:
    house = build({"a": 1, "b": 2})
    with lease(house, ("a", 1.0), ("b", 0.0)) as held, house.registry.lease("a") as plain:
        assert held.version == plain.version, "one whole adapter is no mix"
    with pytest.raises(AdapterNotFound, match="'c'"):
        house.registry.lease_mix([("a", 0.5), ("c", 0.0)])
    assert counts(house) == (0, 0)


def test_one_content_twice_is_refused_under_any_name(build: Build) -> None:
    house = build({"a": 1, "b": 2, "twin": 1})
    for again in ("a", "twin", f"a@{house.registry.describe('a').digest}"):
        with pytest.raises(BadRequest, match="one content twice") as refused:
            house.registry.lease_mix([("a", 0.5), ("b", 1.0), (again, 0.5)])
        assert refused.value.param == "adapter"
    assert counts(house) == (0, 0)
    assert house.registry._books.catalog.mixes == {}


def test_two_versions_of_a_name_can_be_mixed(build: Build) -> None:
    house = build()
    old = house.upload("a", 1)
    house.upload("a", 2, replace=True)
    with lease(house, ("a", 0.5), (f"a@{old.digest[:12]}", 0.5)) as mixed:
        assert house.admit(mixed)
        house.registry.retire(mixed.version)


# Its life


def test_a_mix_holds_its_parts_for_as_long_as_it_runs(build: Build) -> None:
    house = build({"a": 1, "b": 2})
    mixed = lease(house, *HALVES)
    assert [house.registry.describe(name).num_leases for name in "ab"] == [1, 1]
    house.registry.delete("a")
    with pytest.raises(AdapterNotFound):
        house.registry.lease_mix(HALVES)
    slot = house.admit(mixed)
    assert mixed.version.digest in house.device.adapters, "loaded from where the deletion has moved it"
    assert slot == 1
    house.registry.retire(mixed.version)
    folders = [copy.folder for copy in mixed.copies]
    mixed.release()
    mixed.release()
    settle(house)
    assert counts(house) == (0, 0)
    assert house.device.slots == {}
    assert mixed.version.digest not in digests(house), "what it was made of is gone"
    assert [folder.exists() for folder in folders] == [False, True]
    assert house.registry.check_integrity() == ()


def test_a_replaced_part_is_the_old_one_for_those_who_run_and_the_new_one_for_those_who_come(build: Build) -> None:
    house = build({"b": 2})
    house.upload("a", 1)
    old = lease(house, *HALVES)
    house.upload("a", 3, replace=True)
    new = lease(house, *HALVES)
    assert old.version.digest != new.version.digest
    assert house.admit(old) != house.admit(new)
    for held in (old, new):
        house.registry.retire(held.version)
        held.release()


def test_a_mix_stays_where_it_is_for_the_next_request(build: Build) -> None:
    house = build({"a": 1, "b": 2})
    for _ in range(3):
        with lease(house, *HALVES) as mixed:
            assert house.admit(mixed) == 1
            house.registry.retire(mixed.version)
    assert house.registry.stats().loads_total == 1
    assert [info.name for info in house.registry.list()] == ["a", "b"], "it has no name"
    assert house.registry.check_integrity() == ()


def test_a_mix_makes_room_like_any_other_adapter(build: Build) -> None:
    """It takes four rows and eight numbers here, where the device shares nothing: two fit, three do not."""
    house = build({"a": 1, "b": 2}, num_device_rows=21)
    seen = []
    for weight in (0.1, 0.2, 0.3, 0.1):
        with lease(house, ("a", weight), ("b", 1.0)) as mixed:
            house.admit(mixed)
            seen.append(mixed.version.digest)
            house.registry.retire(mixed.version)
    assert house.registry.stats().device_evictions_total == 2
    assert house.registry.stats().num_resident == 2
    assert seen[0] == seen[3]


def test_a_mix_that_runs_is_not_evicted_and_one_that_is_leased_comes_back(build: Build) -> None:
    house = build({"a": 1, "b": 2}, num_device_rows=9, num_host_rows=10)
    with lease(house, *HALVES) as running, lease(house, ("a", 0.9), ("b", 0.1)) as waiting:
        house.admit(running)
        assert house.registry.admit(waiting.version) is None
        house.registry.retire(running.version)
        assert house.admit(waiting)
        house.registry.retire(waiting.version)
        assert house.admit(running)
        house.registry.retire(running.version)


def test_no_more_mixes_are_kept_than_the_limit(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "MAX_CACHED_MIXES", 3)
    house = build({"a": 1, "b": 2})
    used = lease(house, *HALVES)
    for number in range(8):
        lease(house, ("a", 1.0 + number), ("b", 1.0)).release()
    settle(house)
    kept = house.registry._books.catalog.mixes
    assert len(kept) == 3
    assert used.version.digest in kept
    assert digests(house) == {*kept, *(house.registry.describe(name).digest for name in "ab")}
    assert house.registry.check_integrity() == ()
    assert house.host.num_adapters <= len(kept)
    used.release()


def test_a_forgotten_mix_serves_on_and_may_be_asked_for_again(build: Build) -> None:
    house = build({"a": 1, "b": 2})
    first = lease(house, *HALVES)
    slot = house.admit(first)
    house.registry.unload("a")
    assert first.version.digest not in house.registry._books.catalog.mixes
    second = lease(house, *HALVES)
    house.registry.retire(first.version)
    first.release()
    settle(house)
    assert house.registry.admit(second.version) == slot
    house.registry.retire(second.version)
    second.release()
    assert house.registry.check_integrity() == ()


def test_unloading_a_part_frees_the_mixes_that_nobody_uses(build: Build) -> None:
    house = build({"a": 1, "b": 2, "c": 3})
    for parts in (HALVES, (("b", 0.5), ("c", 0.5))):
        with lease(house, *parts) as mixed:
            house.admit(mixed)
            house.registry.retire(mixed.version)
    assert house.registry.stats().num_resident == 2
    house.registry.unload("a")
    assert house.registry.stats().num_resident == 1
    house.registry.unload("b")
    assert house.registry.stats().num_resident == house.host.num_adapters == 0
    assert house.host.used_bytes == 0


def test_a_mix_neither_counts_nor_hinders_when_a_part_is_pinned(build: Build) -> None:
    """Four rows for a pinned part and one like it, but not for the mix of eight parts that was once asked for."""
    adapters = {name: seed for seed, name in enumerate("abcd")}
    house = build(adapters, num_device_rows=9, num_host_rows=9)
    with lease(house, ("a", 1.0), ("b", 1.0)) as mixed:
        house.admit(mixed)
        house.registry.retire(mixed.version)
    assert house.registry.pin("a").is_pinned


# Loading


def test_many_leases_of_a_cold_mix_load_it_once_and_the_engine_does_not_wait(build: Build) -> None:
    gate = threading.Event()

    def slow(folder: Path) -> Lowered:
        gate.wait()
        return load_folder(folder)

    house = build({"a": 1, "b": 2}, load=slow)
    leases = [lease(house, *HALVES) for _ in range(16)]
    assert house.registry.admit(leases[0].version) is None
    gate.set()
    assert {house.admit(held) for held in leases} == {1}
    assert len(house.loaded) == 2


def test_a_sum_that_cannot_be_is_the_askers_fault_and_no_warning(
    build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    def scales(folder: Path) -> Lowered:
        lowered = load_folder(folder)
        field = "in_scale" if folder.parent.name == "a" else "out_scale"
        return replace(lowered, edits={"layers.0.q_proj": Edit(**{field: torch.ones(WIDTH)})})

    house = build({"a": 1, "b": 2}, load=scales)
    with lease(house, *HALVES) as mixed, pytest.raises(BadRequest, match=r"a@.* scales the input .* b@.* its output"):
        house.admit(mixed)
    with pytest.raises(BadRequest, match="layers.0.q_proj"):
        house.registry.lease_mix(HALVES)
    assert caplog.messages == []
    assert counts(house) == (0, 0)


def test_a_broken_part_fails_the_mix_by_name_and_nothing_else(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    house = build({"a": 1, "bad": 2})
    (house.store.folder("bad", house.store.current("bad")) / CONFIG_FILE).write_text('{"peft_type": "OTHER"}')
    with lease(house, ("a", 0.5), ("bad", 0.5)) as mixed, house.registry.lease("a") as good:
        house.admit(good)
        with pytest.raises(AdapterDamaged, match=r"bad@[0-9a-f]{12} in the store are damaged"):
            house.admit(mixed)
        with pytest.raises(AdapterDamaged):
            house.registry.lease_mix([("bad", 0.5), ("a", 0.5)])
        house.registry.retire(good.version)
    assert any("a@" in text and "bad@" in text for text in caplog.messages)
    assert counts(house) == (0, 0)
    house.now_s += 2 * FAILURE_MEMORY_S
    lease(house, ("a", 0.5), ("bad", 0.5)).release()
    settle(house)
    assert house.registry.check_integrity() == ()


def test_a_mix_that_never_fits_is_refused_with_the_sizes(build: Build) -> None:
    house = build({"a": 1, "b": 2}, num_device_rows=3)
    with lease(house, *HALVES) as mixed, pytest.raises(AdapterRejected, match="--adapter-memory"):
        house.admit(mixed)
    assert house.host.num_adapters == 0


def test_a_mix_outlives_files_that_change_in_place(build: Build, tmp_path: Path) -> None:
    write_folder(tmp_path / "place" / "a", 1)
    house = build({"b": 2}, sources=(FolderSource(tmp_path / "place"),), num_host_rows=12)
    with lease(house, *HALVES) as mixed:
        house.admit(mixed)
        write_folder(tmp_path / "place" / "a", 3)
        house.registry.rescan()
        house.registry.retire(mixed.version)
        with house.registry.lease("b") as other:  # presses for room on the host
            house.admit(other)
            house.registry.retire(other.version)
        assert house.host.holds(mixed.version.digest), "it cannot be made again"
    settle(house)
    assert mixed.version.digest not in digests(house)
    assert not house.host.holds(mixed.version.digest)


def test_a_mix_of_nothing_but_one_part_has_its_weight(build: Build) -> None:
    house = build({"a": 1})
    with lease(house, ("a", 0.25)) as weighed, house.registry.lease("a") as plain:
        assert weighed.version.digest != plain.version.digest
        assert (weighed.version.name, weighed.portions[0].weight) == ("0.25*a", 0.25)
        assert {house.admit(weighed), house.admit(plain)} == {1, 2}
        for held in (weighed, plain):
            house.registry.retire(held.version)
    assert house.host.used_bytes == 4 * ROW_BYTES + 2 * 4, "the rows once, and a weight for each of two"
    assert WIDTH == 8


def test_mixes_come_and_go_from_many_threads(build: Build) -> None:
    house = build({name: seed for seed, name in enumerate("abcd")}, num_device_rows=30, num_host_rows=60)

    def work(number: int) -> None:
        for turn in range(25):
            one, other = "abcd"[(number + turn) % 4], "abcd"[(number + turn + 1 + turn % 3) % 4]
            with lease(house, (one, 0.5 + turn % 3), (other, 1.0)):
                if turn % 10 == number:
                    house.registry.unload(one)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    settle(house)
    assert counts(house) == (0, 0)
    assert house.registry.check_integrity() == ()
