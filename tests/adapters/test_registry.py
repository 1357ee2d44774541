"""The registry: versions that stay put under their leases, one load for many, and nothing left behind."""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from server.adapters.device.rows import NoRoom
from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from server.adapters.host import HostTier
from server.adapters.host_adapter import HostAdapter
from server.adapters.method import Lowered
from server.adapters.registry import FAILURE_MEMORY_S, AdapterInfo, Lease, Registry
from server.adapters.sources import FolderSource, LocalFolder, Source
from server.adapters.store.folder_store import Store
from server.ground.errors import (
    AdapterDamaged,
    AdapterNotFound,
    AdapterRejected,
    BadRequest,
    Conflict,
    GraftError,
    Overloaded,
    StartupRefused,
)
from tests.adapters.folders import WIDTH, incoming_from, load_folder, tensors_from, write_folder

ROW_BYTES = WIDTH * 4
PATIENCE_S = 120  # for a registry that hangs, not for a machine that is slow


class Table:
    """A device of `num_rows` rows: what is resident, by slot. Checks that its calls never overlap, but for copies."""

    def __init__(self, num_rows: int) -> None:
        self.capacity_bytes = num_rows * ROW_BYTES
        self.slots: dict[str, int] = {}
        self.adapters: dict[str, HostAdapter] = {}
        self.coming: dict[str, HostAdapter] = {}
        self._busy = threading.Lock()

    @property
    def used_bytes(self) -> int:
        return sum(map(self.resident_bytes, (*self.adapters.values(), *self.coming.values())))

    @property
    def copied_bytes(self) -> int:
        return 0

    def resident_bytes(self, adapter: HostAdapter) -> int:
        return adapter.tensor_bytes

    def needed_bytes(self, adapter: HostAdapter) -> int:
        return self.resident_bytes(adapter)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        assert self._busy.acquire(blocking=False), "two calls of the device at once"
        try:
            yield
        finally:
            self._busy.release()

    def reserve(self, digest: str, adapter: HostAdapter) -> None:
        with self._alone():
            assert digest not in {*self.slots, *self.coming}
            needed, free = self.resident_bytes(adapter), self.capacity_bytes - self.used_bytes
            if needed > free:
                raise NoRoom(num_rows=needed // ROW_BYTES, row_stride=WIDTH, free_elements=free // 4)
            self.coming[digest] = adapter

    def copy(self, digest: str) -> None:
        assert digest in self.coming

    def place(self, digest: str) -> int:
        with self._alone():
            slot = next(n for n in range(1, len(self.slots) + 2) if n not in self.slots.values())
            self.slots[digest], self.adapters[digest] = slot, self.coming.pop(digest)
            return slot

    def abandon(self, digest: str) -> None:
        with self._alone():
            del self.coming[digest]

    def reach(self, slot: int) -> None:
        assert slot in self.slots.values()

    def release(self, digest: str) -> int:
        with self._alone():
            del self.slots[digest]
            return self.resident_bytes(self.adapters.pop(digest))


@dataclass
class House:
    """A registry on real tiers, with a hand on its clock and on its loads."""

    root: Path
    num_device_rows: int = 100
    num_host_rows: int = 100
    sources: tuple[Source, ...] = ()
    load: Callable[[Path], Lowered] = load_folder
    max_versions: int | None = None
    now_s: float = 0.0
    loaded: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = Store(self.root / "store", create=True)
        self.host = HostTier(self.num_host_rows * ROW_BYTES, torch.float32)
        self.device = Table(self.num_device_rows)
        self.registry = Registry(
            self.store, self.sources, self.host, self.device, self._load,
            max_versions=self.max_versions, clock=lambda: self.now_s,
        )  # fmt: skip

    def _load(self, folder: Path, weight: float = 1.0) -> Lowered:
        self.loaded.append(folder)
        return replace(self.load(folder), weight=weight)

    def store_adapter(self, name: str, seed: int, *, rank: int = 2) -> None:
        """Puts an adapter on disk before the registry opens, or behind its back."""
        self.store.add_folder(write_folder(self.root / f"made-{seed}-{rank}", seed, rank=rank), name)

    def upload(self, name: str, seed: int, *, rank: int = 2, replace: bool = False) -> AdapterInfo:
        folder = write_folder(self.root / f"made-{seed}-{rank}", seed, rank=rank)
        with incoming_from(self.store, folder) as incoming:
            return self.registry.register(incoming, name, replace=replace).info

    def admit(self, lease: Lease) -> int:
        """Asks step after step, as the engine does, until the adapter is on the device."""
        deadline = time.monotonic() + PATIENCE_S
        try:
            while (slot := self.registry.admit(lease.version)) is None:
                assert time.monotonic() < deadline, f"{lease.version} is never admitted"
                time.sleep(0.001)
        except GraftError as error:
            raise lease.told(error) from error
        return slot

    def reopened(self, **changes: object) -> "House":
        """The same store under a new registry: a restart."""
        self.registry.close()
        options = {"num_device_rows": self.num_device_rows, "num_host_rows": self.num_host_rows, "load": self.load}
        return House(self.root, **{**options, **changes})  # type: ignore[arg-type]


Build = Callable[..., House]


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    """Houses on one root; `adapters` names the seeds that lie in the store when the registry opens."""
    with ExitStack() as closing:

        def make(adapters: dict[str, int] | None = None, **options: object) -> House:
            store = Store(tmp_path / "store", create=True)
            for name, seed in (adapters or {}).items():
                store.add_folder(write_folder(tmp_path / f"made-{seed}-2", seed), name)
            house = House(tmp_path, **options)  # type: ignore[arg-type]
            closing.callback(house.registry.close)
            return house

        yield make


def is_content(adapter: HostAdapter, seed: int) -> bool:
    """Whether an adapter is the one that was made from `seed`."""
    found = adapter.edits["layers.0.q_proj"].tensors()
    return all(torch.equal(found[name][0].tensor, tensor) for name, tensor in tensors_from(seed).items())


# Leases and what a name means


def test_a_name_means_its_current_version_and_a_prefix_an_older_one(build: Build) -> None:
    house = build()
    first = house.upload("legal", 1)
    second = house.upload("legal", 2, replace=True)
    assert second.versions == (first.digest, second.digest)
    for spec, digest in {
        "legal": second.digest,
        f"legal@{second.digest[:6]}": second.digest,
        f"legal@{first.digest[:12]}": first.digest,
        f"legal@{first.digest}": first.digest,
    }.items():
        with house.registry.lease(spec) as lease:
            assert (lease.version.name, lease.version.digest) == ("legal", digest)
            assert lease.version.short == digest[:12]


@pytest.mark.parametrize("prefix", ["", "abcde", "ABCDEF", "not-hex", "0" * 65])
def test_a_prefix_that_is_none_is_a_bad_request(build: Build, prefix: str) -> None:
    house = build({"legal": 1})
    with pytest.raises(BadRequest, match="6 to 64 hex digits"):
        house.registry.lease(f"legal@{prefix}")


def test_an_unknown_version_is_answered_with_those_that_there_are(build: Build) -> None:
    house = build({"legal": 1})
    with pytest.raises(AdapterNotFound, match=f"no version 000000; it has {house.store.current('legal')[:12]}"):
        house.registry.lease("legal@000000")


def test_an_ambiguous_prefix_asks_for_more_digits(build: Build) -> None:
    house = build()
    for digest in ("abcdef" + "0" * 58, "abcdef" + "1" * 58):
        _put_under_digest(house.store, "legal", digest)
    house = house.reopened()
    with pytest.raises(BadRequest, match=r"give more digits"):
        house.registry.lease("legal@abcdef")
    house.registry.lease("legal@abcdef1").release()
    house.registry.close()


def test_an_unknown_name_is_answered_with_close_ones(build: Build) -> None:
    house = build({"legal-dora": 1, "terse": 2})
    with pytest.raises(AdapterNotFound, match="Did you mean legal-dora") as caught:
        house.registry.lease("legal-dola")
    assert caught.value.param == "adapter"
    for name in ("zzzz", "", "@", "x" * 100_000, "../legal-dora"):
        with pytest.raises(AdapterNotFound, match="GET /v1/adapters"):
            house.registry.lease(name)


def test_a_lease_ends_once_however_often_it_is_released(build: Build) -> None:
    house = build({"legal": 1})
    one, other = house.registry.lease("legal"), house.registry.lease("legal")
    one.release()
    one.release()
    assert house.registry.stats().num_leases == 1
    with other:
        pass
    assert house.registry.stats().num_leases == 0


# Loading


def test_many_leases_of_a_cold_adapter_load_it_once(build: Build) -> None:
    gate = threading.Event()

    def slow(folder: Path) -> Lowered:
        gate.wait()
        return load_folder(folder)

    house = build({"legal": 1}, load=slow)
    with ThreadPoolExecutor(8) as pool:
        leases = list(pool.map(lambda _: house.registry.lease("legal"), range(32)))
    assert house.registry.admit(leases[0].version) is None, "the engine does not wait for the load"
    assert house.registry.stats().num_loading == 1
    gate.set()
    assert {house.admit(lease) for lease in leases} == {1}
    assert len(house.loaded) == 1
    assert house.registry.stats().num_residencies == 32


def test_a_failing_load_fails_its_requesters_and_nothing_else(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    house = build({"bad": 1, "good": 2})
    (house.store.folder("bad", house.store.current("bad")) / CONFIG_FILE).write_text('{"peft_type": "OTHER"}')
    bad, good = house.registry.lease("bad"), house.registry.lease("good")
    assert house.admit(good)
    errors = []
    for _ in range(2):
        with pytest.raises(AdapterDamaged, match="are damaged") as caught:
            house.admit(bad)
        errors.append(caught.value)
    assert errors[0] is not errors[1], "each requester has an error of its own"
    [logged] = [text for text in caplog.messages if "could not be loaded" in text]
    assert str(bad.version) in logged
    assert "are damaged" in logged
    with pytest.raises(AdapterDamaged):
        house.registry.lease("bad")
    assert house.registry.stats().load_failures_total == 1
    assert house.registry.check_integrity() == ()


def test_a_failure_is_forgotten_after_a_while(build: Build) -> None:
    house = build({"legal": 1})
    weights = house.store.folder("legal", house.store.current("legal")) / WEIGHTS_FILE
    weights.rename(weights.with_suffix(".away"))
    with pytest.raises(AdapterDamaged, match=r"legal@[0-9a-f]{12} in the store are damaged"):
        house.registry.verify("legal")
    weights.with_suffix(".away").rename(weights)
    house.now_s += FAILURE_MEMORY_S / 2
    with pytest.raises(AdapterDamaged):
        house.registry.lease("legal")
    assert house.registry.stats().load_failures_total == 1
    house.now_s += FAILURE_MEMORY_S
    with house.registry.lease("legal") as lease:
        assert house.admit(lease) == 1


def test_a_defect_in_a_load_fails_the_request_and_is_logged(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    def defective(_: Path) -> Lowered:
        raise ZeroDivisionError("a defect")

    house = build({"legal": 1}, load=defective)
    with pytest.raises(GraftError, match="log says why"):
        house.registry.verify("legal")
    house.registry.close()
    assert "a defect" in caplog.text


def test_verifying_loads_and_tells_what_was_found(build: Build) -> None:
    house = build({"legal": 1})
    assert house.registry.describe("legal").method is None, "nobody has lowered it yet"
    info = house.registry.verify("legal")
    assert (info.method, info.rank, info.num_parameters, info.num_sites) == ("lora", 2, 4 * WIDTH, 1)
    assert info.tiers == ("store", "host")
    assert (info.base_model, info.source, info.num_leases) == ("tiny-base", "store", 1)
    assert info == house.registry.verify("legal")
    assert house.registry.list()[0].num_leases == 0
    assert len(house.loaded) == 1


def test_what_the_host_evicted_meanwhile_is_loaded_again(build: Build) -> None:
    house = build({"a": 1, "b": 2}, num_host_rows=4)
    house.registry.verify("a")
    with house.registry.lease("a") as waiting:
        house.registry.verify("b")
        assert not house.host.holds(waiting.version.digest)
        assert house.admit(waiting) == 1
    assert len(house.loaded) == 3


# Residency


def test_the_least_recently_used_idle_adapter_makes_room(build: Build) -> None:
    house = build({"a": 1, "b": 2, "c": 3}, num_device_rows=8)
    with ExitStack() as stack:
        a, b, c = (stack.enter_context(house.registry.lease(name)) for name in "abc")
        house.admit(a)
        house.admit(b)
        house.registry.verify("c")
        assert house.registry.admit(c.version) is None, "everything resident is held"
        house.registry.retire(b.version)
        house.registry.retire(a.version)
        house.admit(c)
        assert set(house.device.slots) == {a.version.digest, c.version.digest}
        assert house.registry.stats().device_evictions_total == 1
        house.registry.retire(c.version)


def test_an_adapter_that_a_request_waits_for_is_evicted_last(build: Build) -> None:
    house = build({"a": 1, "b": 2, "c": 3}, num_device_rows=8)
    with house.registry.lease("a") as a, house.registry.lease("c") as c:
        with house.registry.lease("b") as b:
            house.admit(a)
            house.admit(b)
            house.registry.retire(a.version)
            house.registry.retire(b.version)
        house.admit(c)
        assert set(house.device.slots) == {a.version.digest, c.version.digest}
        house.registry.retire(c.version)


def test_a_retired_adapter_stays_resident_and_needs_no_host_copy(build: Build) -> None:
    house = build({"a": 1})
    for _ in range(3):
        with house.registry.lease("a") as lease:
            assert house.admit(lease) == 1
            house.registry.retire(lease.version)
        house.host.drop(lease.version.digest)
    assert len(house.loaded) == 1
    assert house.registry.describe("a").tiers == ("store", "device")


def test_two_names_of_one_content_share_its_slot_and_its_load(build: Build) -> None:
    house = build({"a": 1, "b": 1})
    with house.registry.lease("a") as a, house.registry.lease("b") as b:
        assert house.admit(a) == house.admit(b) == 1
        house.registry.delete("a")
        house.registry.retire(a.version)
        house.registry.retire(b.version)
    house.registry.close()
    assert house.device.slots, "b still means it"
    assert len(house.loaded) == 1


def test_an_adapter_larger_than_the_device_is_refused_with_both_sizes(build: Build) -> None:
    house = build({"small": 1}, num_device_rows=4)
    house.store_adapter("large", 2, rank=3)
    house = house.reopened()
    with house.registry.lease("small") as small, house.registry.lease("large") as large:
        house.admit(small)
        house.registry.retire(small.version)
        with pytest.raises(AdapterRejected, match=r"192 bytes.*128.*--adapter-memory"):
            house.admit(large)
        assert set(house.device.slots) == {small.version.digest}, "nobody made room in vain"
    house.registry.close()


def test_retiring_what_was_not_admitted_is_a_defect(build: Build) -> None:
    house = build({"a": 1})
    with house.registry.lease("a") as lease, pytest.raises(RuntimeError, match="more often than admitted"):
        house.registry.retire(lease.version)


# Registering


def test_an_upload_serves_the_next_request_and_survives_a_restart(build: Build) -> None:
    house = build()
    info = house.upload("legal", 1)
    assert (info.method, info.rank, info.num_parameters, info.num_sites) == ("lora", 2, 4 * WIDTH, 1)
    assert info.tiers == ("store", "host")
    with house.registry.lease("legal") as lease:
        assert house.registry.admit(lease.version) == 1, "already on the host"
        house.registry.retire(lease.version)
    after = house.reopened()
    kept = after.registry.describe("legal")
    assert (kept.digest, kept.method, kept.num_sites, kept.created) == (info.digest, "lora", 1, info.created)
    with after.registry.lease("legal") as lease:
        assert is_content_on(after, lease, 1)
    after.registry.close()


def test_the_same_upload_again_is_not_new_and_is_not_loaded_again(build: Build) -> None:
    house = build()
    folder = write_folder(house.root / "made", 1)
    for is_new in (True, False):
        with incoming_from(house.store, folder) as incoming:
            assert house.registry.register(incoming, "legal", replace=False).is_new is is_new
    assert len(house.loaded) == 1


def test_other_content_is_a_conflict_before_it_is_loaded(build: Build) -> None:
    house = build()
    house.upload("legal", 1)
    with pytest.raises(Conflict, match="replace=true"):
        house.upload("legal", 2)
    assert len(house.loaded) == 1


def test_an_invalid_upload_leaves_nothing_anywhere(build: Build) -> None:
    house = build(num_device_rows=4)
    bad = write_folder(house.root / "bad", 1)
    (bad / CONFIG_FILE).write_text('{"peft_type": "OTHER"}')
    with incoming_from(house.store, bad) as incoming, pytest.raises(AdapterRejected, match="OTHER"):
        house.registry.register(incoming, "legal", replace=False)
    with pytest.raises(AdapterRejected, match="--adapter-memory"):
        house.upload("legal", 2, rank=3)
    with pytest.raises(AdapterRejected, match="--host-memory"):
        house.upload("legal", 2, rank=60)
    assert house.registry.list() == ()
    assert house.store.names() == ()
    assert house.host.used_bytes == 0
    assert os.listdir(house.store.root / ".incoming") == []


def test_replacing_leaves_running_requests_on_their_version(build: Build) -> None:
    house = build()
    house.upload("legal", 1)
    with house.registry.lease("legal") as old:
        house.upload("legal", 2, replace=True)
        with house.registry.lease("legal") as new:
            assert is_content_on(house, old, 1)
            assert is_content_on(house, new, 2)


def test_uploading_an_older_version_makes_it_current_again(build: Build) -> None:
    house = build()
    first = house.upload("legal", 1)
    second = house.upload("legal", 2, replace=True)
    house.upload("legal", 1, replace=True)
    info = house.registry.describe("legal")
    assert (info.digest, info.versions) == (first.digest, (second.digest, first.digest))
    assert house.store.current("legal") == first.digest


# Deleting


def test_a_deleted_adapter_is_gone_everywhere_at_once_if_nobody_uses_it(build: Build) -> None:
    house = build()
    house.upload("legal", 1)
    house.upload("legal", 2, replace=True)
    with house.registry.lease("legal") as lease:
        house.admit(lease)
        house.registry.retire(lease.version)
    house.registry.delete("legal")
    with pytest.raises(AdapterNotFound):
        house.registry.lease("legal")
    with pytest.raises(AdapterNotFound):
        house.registry.delete("legal")
    assert_nothing_left(house)


def test_a_running_request_finishes_on_a_deleted_adapter_wherever_it_must_be_read_from(build: Build) -> None:
    house = build()
    house.upload("legal", 1)
    lease = house.registry.lease("legal")
    house.registry.delete("legal")
    with pytest.raises(AdapterNotFound):
        house.registry.lease("legal")
    house.host.drop(lease.version.digest)
    assert is_content_on(house, lease, 1), "loaded from where the deletion moved it"
    lease.release()
    house.registry.close()
    assert_nothing_left(house)


def test_a_name_deleted_while_leased_can_be_uploaded_again(build: Build) -> None:
    house = build()
    house.upload("legal", 1)
    with house.registry.lease("legal") as old:
        house.registry.delete("legal")
        house.upload("legal", 1)
        with house.registry.lease("legal") as new:
            assert old.version == new.version
            assert house.admit(old) == house.admit(new)
            house.registry.retire(old.version)
            house.registry.retire(new.version)
    house.registry.close()
    assert house.store.names() == ("legal",)
    assert house.registry.describe("legal").tiers == ("store", "host", "device")


def test_a_lease_that_ends_before_its_residency_leaves_nothing_either(build: Build) -> None:
    house = build()
    house.upload("legal", 1)
    lease = house.registry.lease("legal")
    house.admit(lease)
    house.registry.delete("legal")
    house.registry.close()  # from here on what is over is removed at once
    lease.release()
    assert lease.version.digest in house.device.slots, "a sequence is running on it"
    house.registry.retire(lease.version)
    assert_nothing_left(house)


def test_a_stop_between_deletion_and_the_last_lease_does_not_bring_it_back(build: Build) -> None:
    house = build()
    house.upload("legal", 1)
    lease = house.registry.lease("legal")
    house.registry.delete("legal")
    house.registry.close()  # with the lease still held
    assert Store(house.store.root, create=False).names() == ()
    lease.release()
    assert os.listdir(house.store.root) == [".incoming"]
    assert os.listdir(house.store.root / ".incoming") == []


def test_a_deletion_during_the_load_moves_the_files_but_not_the_ground(build: Build) -> None:
    begun, deleted = threading.Event(), threading.Event()

    def interrupted(folder: Path) -> Lowered:
        begun.set()
        deleted.wait()
        return load_folder(folder)

    house = build({"legal": 1}, load=interrupted)
    with house.registry.lease("legal") as lease:
        begun.wait()
        house.registry.delete("legal")
        deleted.set()
        assert is_content_on(house, lease, 1)
    assert len(house.loaded) == 2
    house.registry.close()
    assert_nothing_left(house)


def test_a_load_that_ends_after_everyone_has_gone_leaves_nothing(build: Build) -> None:
    begun, deleted = threading.Event(), threading.Event()

    def late(folder: Path) -> Lowered:
        lowered = load_folder(folder)
        begun.set()
        deleted.wait()
        return lowered

    house = build({"legal": 1}, load=late)
    house.registry.lease("legal").release()
    begun.wait()
    house.registry.delete("legal")
    deleted.set()
    house.registry.close()
    assert_nothing_left(house)


# Adapters read in place


def test_folders_serve_in_place_and_cannot_be_changed_over_http(build: Build, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mine", 1)
    house = build(sources=(LocalFolder("legal", folder),))
    info = house.registry.verify("legal")
    assert (info.source, info.method, info.base_model) == (str(folder), "lora", "tiny-base")
    with pytest.raises(Conflict, match="read in place"):
        house.registry.delete("legal")
    with pytest.raises(Conflict, match="read in place"):
        house.upload("legal", 2, replace=True)
    assert house.store.names() == ()


def test_a_named_folder_may_not_take_a_name_of_the_store(build: Build, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mine", 1)
    with pytest.raises(StartupRefused, match="--adapter legal"):
        build({"legal": 2}, sources=(LocalFolder("legal", folder),))


def test_of_two_that_claim_a_name_the_store_has_it_and_a_warning_tells(
    build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path / "all" / "legal", 1)
    house = build({"legal": 2}, sources=(FolderSource(tmp_path / "all"),))
    house.registry.rescan()
    assert [info.source for info in house.registry.list()] == ["store"]
    assert caplog.text.count("the name legal is taken") == 1
    house.registry.delete("legal")
    house.registry.rescan()
    assert [info.source for info in house.registry.list()] == [str(tmp_path / "all" / "legal")]


def test_a_rescan_finds_what_is_new_changed_and_gone(build: Build, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "all" / "a", 1)
    house = build(sources=(FolderSource(tmp_path / "all"),))
    first = house.registry.describe("a").digest
    write_folder(folder, 2)
    write_folder(tmp_path / "all" / "b", 3)
    house.registry.rescan()
    assert [info.name for info in house.registry.list()] == ["a", "b"]
    assert house.registry.describe("a").versions != (first,)
    (folder / CONFIG_FILE).unlink()
    house.registry.rescan()
    assert [info.name for info in house.registry.list()] == ["b"]
    assert house.registry.check_integrity() == ()


def test_running_requests_keep_a_version_whose_folder_has_changed(build: Build, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "all" / "a", 1)
    house = build({"other": 3}, sources=(FolderSource(tmp_path / "all"),), num_host_rows=8)
    with house.registry.lease("a") as old:
        house.registry.verify("a")
        write_folder(folder, 2)
        house.registry.rescan()
        with house.registry.lease("a") as new:
            house.registry.verify("a")
            house.registry.verify("other")  # one of the two has to leave the host: the one that can be read again
            assert is_content_on(house, old, 1)
            assert is_content_on(house, new, 2)
    house.registry.close()
    assert not house.host.holds(old.version.digest)
    assert old.version.digest not in house.device.slots


def test_content_that_can_be_read_again_may_leave_the_host_again(build: Build, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "all" / "a", 1)
    house = build({"other": 3}, sources=(FolderSource(tmp_path / "all"),), num_host_rows=4)
    with house.registry.lease("a") as old:
        house.registry.verify("a")
        (folder / CONFIG_FILE).unlink()
        house.registry.rescan()
        with pytest.raises(AdapterRejected, match="--host-memory"):
            house.registry.verify("other")
        write_folder(folder, 1)
        house.registry.rescan()
        house.now_s += FAILURE_MEMORY_S
        house.registry.verify("other")
        assert is_content_on(house, old, 1)


def test_files_that_changed_before_they_were_read_fail_the_request_rather_than_answer_wrongly(
    build: Build, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "all" / "a", 1)
    house = build(sources=(FolderSource(tmp_path / "all"),))
    write_folder(folder, 2)
    with pytest.raises(Overloaded, match="changed while they were read"):
        house.registry.verify("a")
    house.registry.rescan()
    with house.registry.lease("a") as lease:
        assert is_content_on(house, lease, 2)


# The end


def test_a_closed_registry_takes_no_requests(build: Build) -> None:
    house = build({"a": 1})
    house.registry.close()
    house.registry.close()
    with pytest.raises(Overloaded, match="shutting down"):
        house.registry.lease("a")
    with pytest.raises(Overloaded):
        house.upload("b", 2)


# Storms


def is_content_on(house: House, lease: Lease, seed: int) -> bool:
    """Whether the device holds, for the lease's version, what was trained from `seed`."""
    house.admit(lease)
    try:
        return is_content(house.device.adapters[lease.version.digest], seed)
    finally:
        house.registry.retire(lease.version)


def assert_nothing_left(house: House) -> None:
    stats = house.registry.stats()
    assert (stats.num_adapters, stats.num_leases, stats.num_residencies, stats.num_resident) == (0, 0, 0, 0)
    assert house.registry.check_integrity() == ()
    assert house.device.slots == {}
    assert house.device.used_bytes == house.host.used_bytes == 0
    assert os.listdir(house.store.root) in ([], [".incoming"])
    assert not list((house.store.root / ".incoming").glob("*"))


def _put_under_digest(store: Store, name: str, digest: str) -> None:
    """A version whose digest nobody could compute: to have two that begin alike."""
    folder = write_folder(store.root / name / digest, 1)
    (folder / "record.json").write_text('{"created": 1}', encoding="utf-8")
    versions = [f'"{path.name}"' for path in sorted((store.root / name).iterdir()) if path.is_dir()]
    index = f'{{"current": "{digest}", "versions": [{", ".join(versions)}]}}'
    (store.root / name / "current.json").write_text(index, encoding="utf-8")


def test_after_a_storm_of_threads_every_version_was_itself_and_nothing_is_left(build: Build) -> None:
    """Uploads, replacements, deletions, requests, and an engine's admissions, on tiers far too small for all."""
    house = build(num_device_rows=12, num_host_rows=16)
    names, seeds = ("a", "b", "c"), range(6)
    digest_seed = {house.upload("probe", seed, replace=True).digest: seed for seed in seeds}
    house.registry.delete("probe")
    engine = threading.Lock()  # admissions come from one thread at a time

    def request(draw: random.Random) -> None:
        try:
            lease = house.registry.lease(draw.choice(names))
        except AdapterNotFound:
            return
        with lease:
            deadline = time.monotonic() + PATIENCE_S
            while time.monotonic() < deadline:
                with engine:
                    if house.registry.admit(lease.version) is not None:
                        adapter = house.device.adapters[lease.version.digest]
                        assert is_content(adapter, digest_seed[lease.version.digest])
                        house.registry.retire(lease.version)
                        return
                time.sleep(0.0005)
            raise AssertionError("never admitted")

    def administer(draw: random.Random) -> None:
        name = draw.choice(names)
        try:
            if draw.random() < 0.3:
                house.registry.delete(name)
            else:
                folder = house.root / f"made-{draw.choice(seeds)}-2"
                with incoming_from(house.store, folder) as incoming:
                    house.registry.register(incoming, name, replace=draw.random() < 0.8)
        except (AdapterNotFound, Conflict):
            pass

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(25):
            (administer if draw.random() < 0.3 else request)(draw)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert house.registry.check_integrity() == ()
    assert set(house.store.names()) == {info.name for info in house.registry.list()}
    for name in house.store.names():
        assert house.store.current(name) == house.registry.describe(name).digest
        house.registry.delete(name)
    house.registry.close()
    assert_nothing_left(house)


class Histories(RuleBasedStateMachine):
    """Any order of the registry's verbs, against what each lease was promised."""

    leases = Bundle("leases")
    residents = Bundle("residents")

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.house = House(Path(self.stack.enter_context(TemporaryDirectory())), num_device_rows=8, num_host_rows=8)
        self.meaning: dict[str, int] = {}
        self.leased: set[Lease] = set()
        self.admitted: set[Lease] = set()

    @rule(name=st.sampled_from("ab"), seed=st.integers(0, 2), replace=st.booleans())
    def upload(self, name: str, seed: int, replace: bool) -> None:
        if self.meaning.get(name, seed) != seed and not replace:
            with pytest.raises(Conflict):
                self.house.upload(name, seed)
        else:
            self.house.upload(name, seed, replace=replace)
            self.meaning[name] = seed

    @rule(name=st.sampled_from("ab"))
    def delete(self, name: str) -> None:
        if name not in self.meaning:
            with pytest.raises(AdapterNotFound):
                self.house.registry.delete(name)
        else:
            self.house.registry.delete(name)
            del self.meaning[name]

    @rule(target=leases, name=st.sampled_from("ab"))
    def lease(self, name: str) -> object:
        if name not in self.meaning:
            with pytest.raises(AdapterNotFound):
                self.house.registry.lease(name)
            return multiple()
        lease = self.house.registry.lease(name)
        self.leased.add(lease)
        return lease, self.meaning[name]

    @rule(target=residents, held=consumes(leases))
    def admit(self, held: tuple[Lease, int]) -> object:
        """With at most two residents, each of half the device, there is always room."""
        lease, seed = held
        if len(self.admitted) == 2:
            self.abort(held)
            return multiple()
        slot = self.house.admit(lease)
        adapter = self.house.device.adapters[lease.version.digest]
        assert self.house.device.slots[lease.version.digest] == slot
        assert is_content(adapter, seed)
        self.admitted.add(lease)
        return held

    @rule(held=consumes(residents))
    def finish(self, held: tuple[Lease, int]) -> None:
        self.house.registry.retire(held[0].version)
        self.admitted.remove(held[0])
        self.abort(held)

    @rule(held=consumes(leases))
    def abort(self, held: tuple[Lease, int]) -> None:
        held[0].release()
        self.leased.remove(held[0])

    @invariant()
    def the_books_balance(self) -> None:
        stats = self.house.registry.stats()
        assert (stats.num_leases, stats.num_residencies) == (len(self.leased), len(self.admitted))
        assert {info.name for info in self.house.registry.list()} == self.meaning.keys()
        assert self.house.registry.check_integrity() == ()

    def teardown(self) -> None:
        for lease in self.admitted:
            self.house.registry.retire(lease.version)
        for lease in self.leased:
            lease.release()
        for name in self.meaning:
            self.house.registry.delete(name)
        self.house.registry.close()
        assert_nothing_left(self.house)
        self.stack.close()


Histories.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestHistories = Histories.TestCase
