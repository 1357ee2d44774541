"""Adapters in an object store: what several servers on one bucket see of each other, and what a crash leaves."""

import dataclasses
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from obstore.store import MemoryStore

from server.adapters import elsewhere
from server.adapters.elsewhere import LOOK_MEMORY_S
from server.adapters.sources import LocalFolder
from server.adapters.store import object_store
from server.adapters.store.bucket import Bucket
from server.adapters.store.folder_store import Record
from server.adapters.store.object_garbage import collect_garbage
from server.adapters.store.object_index import ObjectIndex, ObjectVersion
from server.adapters.store.object_store import ObjectStore
from server.adapters.store.version_cache import VersionCache
from server.ground.errors import (
    AdapterNotFound,
    AdapterRejected,
    BadRequest,
    Conflict,
    GraftError,
    Overloaded,
    StoreUnreachable,
)
from tests.adapters.folders import incoming_from, write_folder
from tests.adapters.replicas import Crash, Replica, Wire, files_of, objects, outage
from tests.adapters.test_registry import PATIENCE_S

Build = Callable[..., Replica]
RECORD = Record(created=1_700_000_000)


@pytest.fixture
def bucket() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def build(bucket: MemoryStore, tmp_path: Path) -> Iterator[Build]:
    """Makes replicas on one bucket, each with a cache of its own."""
    made: list[Replica] = []

    def build(name: str = "a", **options: Any) -> Replica:
        made.append(Replica(bucket, tmp_path / name, **options))
        return made[-1]

    yield build
    for replica in made:
        replica.close()


def adopted(store: ObjectStore, root: Path, name: str, seed: int, *, replace: bool = False) -> str:
    """Puts an adapter without a registry; its digest."""
    with incoming_from(store, write_folder(root / f"made-{seed}", seed)) as incoming:
        return store.put(incoming, name, RECORD, replace=replace)[0].digest


def plain_store(client: Any, root: Path) -> ObjectStore:
    return ObjectStore(Bucket(client, "memory://"), VersionCache(root / "cache", 1 << 30))


# What one server does is seen by the others


def test_an_upload_answers_on_another_server_at_once(build: Build) -> None:
    first, second = build("a"), build("b")
    digest = first.upload("legal", 1).digest
    second.now_s += LOOK_MEMORY_S
    assert second.generate("legal") == digest
    assert second.names() == ["legal"]


def test_a_replacement_is_seen_after_the_refresh_and_running_requests_keep_theirs(build: Build) -> None:
    first, second = build("a"), build("b")
    old = first.upload("legal", 1).digest
    second.registry.refresh()
    with second.request("legal") as running:
        new = first.upload("legal", 2, replace=True).digest
        assert second.registry.describe("legal").digest == old
        second.registry.refresh()
        assert running.version.digest == old
        assert second.registry.describe("legal").versions == (old, new)
    assert second.generate("legal") == new
    assert second.generate(f"legal@{old[:8]}") == old


def test_a_rollback_is_seen_and_can_be_undone_from_anywhere(build: Build) -> None:
    first, second = build("a"), build("b")
    old, new = first.upload("legal", 1).digest, first.upload("legal", 2, replace=True).digest
    info, before = second.registry.roll_back("legal")
    assert (info.digest, before.digest) == (old, new)
    first.registry.refresh()
    assert first.generate("legal") == old
    first.registry.roll_back("legal", new[:12])
    second.registry.refresh()
    assert second.registry.describe("legal").versions == (old, new)


def test_a_deletion_elsewhere_is_a_404_after_the_refresh_and_ends_no_running_request(
    build: Build, bucket: MemoryStore
) -> None:
    first, second = build("a"), build("b")
    digest = first.upload("legal", 1).digest
    second.registry.refresh()
    with second.request("legal") as running:
        second.registry.verify("legal")
        first.registry.delete("legal")
        second.registry.refresh()
        with pytest.raises(AdapterNotFound):
            second.registry.lease("legal")
        assert second.registry.admit(running.version) is not None, "it is on the host, and goes from there"
        second.registry.retire(running.version)
        assert running.version.digest == digest
    second.registry.close()  # it waits for the removal
    assert second.registry.stats().num_on_host == 0
    assert objects(bucket) == ["names/legal.json"], "a deleted name keeps an empty index"
    assert bucket.head("names/legal.json")["size"] == 0


def test_a_deleted_name_can_be_used_again(build: Build) -> None:
    first, second = build("a"), build("b")
    first.upload("legal", 1)
    second.registry.delete("legal")
    digest = second.upload("legal", 2).digest
    first.registry.refresh()
    assert first.registry.describe("legal").versions == (digest,)


def test_pruned_versions_go_from_the_bucket_and_from_the_others_lists(build: Build, bucket: MemoryStore) -> None:
    first, second = build("a", max_versions=2), build("b")
    digests = [first.upload("legal", seed, replace=True).digest for seed in range(3)]
    second.registry.refresh()
    assert second.registry.describe("legal").versions == tuple(digests[1:])
    assert {path.split("/")[2] for path in files_of(bucket, "legal")} == set(digests[1:])


def test_the_record_travels_with_the_index(build: Build) -> None:
    first, second = build("a"), build("b")
    told = first.upload("legal", 1)
    second.registry.refresh()
    info = second.registry.describe("legal")
    assert (info.method, info.rank, info.num_parameters) == (told.method, told.rank, told.num_parameters) != (None,) * 3
    assert (info.content_bytes, info.created, info.base_model) == (told.content_bytes, told.created, "tiny-base")
    assert second.loaded == [], "nothing was read for that"


def test_an_upload_of_what_another_server_has_already_says_so(build: Build, bucket: MemoryStore) -> None:
    first, second = build("a"), build("b")
    first.upload("legal", 1)
    before = objects(bucket)
    with incoming_from(second.store, write_folder(second.root / "made-1", 1)) as incoming:
        assert not second.registry.register(incoming, "legal", replace=False).is_new
    with pytest.raises(Conflict, match="exists with other content"):
        second.upload("legal", 2)
    assert objects(bucket) == before


def test_a_folder_served_in_place_keeps_its_name_from_the_bucket(
    build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = build("a"), build("b")
    source = LocalFolder("mine", write_folder(tmp_path / "mine", 1))
    second.registry._in_place._sources = (source,)
    second.registry.rescan()
    first.upload("mine", 2)
    for _ in range(2):
        second.registry.refresh()
        assert second.registry.describe("mine").source != "store"
    assert sum("a folder is served under its name" in message for message in caplog.messages) == 1


# Looking


def test_names_that_nobody_knows_do_not_hammer_the_bucket(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elsewhere, "_MAX_WAIT_S", PATIENCE_S)
    first, second = build("a"), build("b")
    second.now_s += LOOK_MEMORY_S
    second.wire.calls.clear()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(second.registry.look_for, [f"nobody-{number}" for number in range(50)]))
    for malformed in ("../../etc", "NAMES", "x" * 200, "legal@zz", ""):
        second.registry.look_for(malformed)
    assert second.wire.calls == ["list names/"]
    first.upload("late", 1)
    with pytest.raises(AdapterNotFound):
        second.request("late")
    second.now_s += LOOK_MEMORY_S
    assert second.generate("late")


def test_two_hundred_names_are_listed_with_one_request_and_read_only_where_they_changed(
    build: Build, bucket: MemoryStore, tmp_path: Path
) -> None:
    first = build("a")
    first.upload("adapter-000", 1)
    index = bytes(bucket.get("names/adapter-000.json").bytes())
    for number in range(1, 200):
        bucket.put(f"names/adapter-{number:03}.json", index)
    second = build("b")
    assert len(second.names()) == 200
    assert len([call for call in second.wire.calls if call.startswith("list")]) == 1
    assert len(second.wire.calls) == 201
    second.wire.calls.clear()
    second.registry.refresh()
    assert second.wire.calls == ["list names/"]
    second.registry.delete("adapter-007")
    second.wire.calls.clear()
    second.registry.refresh()
    assert second.wire.calls == ["list names/", "get names/adapter-007.json"]
    assert len(second.names()) == 199


def test_a_broken_index_costs_its_own_name_alone(
    build: Build, bucket: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    first = build("a")
    first.upload("legal", 1)
    whole = json.loads(bytes(bucket.get("names/legal.json").bytes()))
    whole["versions"][0]["files"]["../../escape"] = whole["versions"][0]["files"].pop("adapter_config.json")
    contents = {
        "binary": b"\xff\xfe\x00",
        "cut": b'{"format": 1, "versions": [{"digest"',
        "deep": b"[" * 100_000,
        "empty-list": b'{"format": 1, "versions": []}',
        "later": b'{"format": 2, "versions": []}',
        "list": b"[]",
        "path": json.dumps(whole).encode(),
    }
    for name, content in contents.items():
        bucket.put(f"names/{name}.json", content)
    bucket.put("names/Not A Name.json", b"{}")
    bucket.put("names/notes.txt", b"mine")
    second = build("b")
    second.registry.refresh()
    assert second.names() == ["legal"]
    assert sorted(second.store.broken()) == sorted(contents)
    assert sum("is left out" in message for message in caplog.messages) == len(contents), "each is told once"
    with pytest.raises(Conflict, match=r"remove the object names/cut\.json"):
        second.upload("cut", 1)
    assert [path for path in objects(bucket) if path.startswith("versions/cut")] == []
    bucket.put("names/cut.json", b"")
    assert second.upload("cut", 1).name == "cut"


def test_a_look_that_began_after_one_was_asked_for_will_do(build: Build) -> None:
    replica = build("a")
    looks, asked, ticks = replica.registry._elsewhere, threading.Event(), itertools.count(1)

    def clock() -> float:
        if threading.current_thread() is other:
            asked.set()
        return float(next(ticks))

    looks._clock = clock
    other = threading.Thread(target=replica.registry.refresh)
    with looks._looking:
        other.start()
        assert asked.wait(PATIENCE_S)
        looks._look()
    other.join()
    assert replica.wire.calls == ["list names/"] * 2, "at the start, and once for both"


def test_who_waits_for_a_look_at_a_service_that_is_silent_is_not_kept(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elsewhere, "_MAX_WAIT_S", 0.001)
    replica = build("a")
    with replica.registry._elsewhere._looking, pytest.raises(StoreUnreachable, match="takes long to answer"):
        replica.registry.look_for("legal")


# Several writers


def test_of_many_that_upload_one_new_name_one_wins_and_the_others_hear_of_it(
    bucket: MemoryStore, tmp_path: Path
) -> None:
    stores = [plain_store(bucket, tmp_path / str(number)) for number in range(6)]

    def put(number: int) -> str | None:
        try:
            return adopted(stores[number], tmp_path / str(number), "legal", number)
        except Conflict:
            return None

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(put, range(6)))
    (winner,) = [digest for digest in results if digest is not None]
    assert [version.digest for version in stores[0].versions("legal")] == [winner]
    assert len(files_of(bucket, "legal")) == 2, "what lost was removed"


def test_replacements_at_once_lose_no_version(bucket: MemoryStore, tmp_path: Path) -> None:
    stores = [plain_store(bucket, tmp_path / str(number)) for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        digests = list(pool.map(lambda n: adopted(stores[n], tmp_path / str(n), "legal", n, replace=True), range(6)))
    listed = [version.digest for version in stores[0].versions("legal")]
    assert sorted(listed) == sorted(digests)
    assert len(files_of(bucket, "legal")) == 12


def test_a_change_in_between_is_not_undone(bucket: MemoryStore, tmp_path: Path) -> None:
    """Server A has read the index; before it writes, B deletes the name. A's version is listed alone, B's stay gone."""
    first, second = plain_store(Wire(bucket), tmp_path / "a"), plain_store(bucket, tmp_path / "b")
    adopted(second, tmp_path, "legal", 1)
    wire = first.bucket._client

    def intrude(verb: str, path: str) -> None:
        if verb == "put" and path == "names/legal.json":
            wire.before = lambda *_: None
            second.delete("legal")

    wire.before = intrude
    digest = adopted(first, tmp_path, "legal", 2, replace=True)
    assert [version.digest for version in second.versions("legal")] == [digest]


def test_a_name_that_others_change_all_the_time_is_given_up_with_a_sentence(
    bucket: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_RETRY_S", 0.0)
    store = plain_store(Wire(bucket), tmp_path)
    adopted(store, tmp_path, "legal", 1)
    index = bytes(bucket.get("names/legal.json").bytes())
    count = iter(range(1000))

    def intrude(verb: str, path: str) -> None:
        if verb == "put" and path == "names/legal.json":
            bucket.put(path, index + b" " * next(count))

    store.bucket._client.before = intrude
    with pytest.raises(Conflict, match="by other servers all the time"):
        adopted(store, tmp_path, "legal", 2, replace=True)
    assert len(files_of(bucket, "legal")) == 2


def test_a_look_that_a_change_made_here_has_overtaken_does_not_undo_it(build: Build) -> None:
    first = build("a")
    first.upload("legal", 1)
    listed, go_on = threading.Event(), threading.Event()

    real_scan = first.store.scan

    def scan() -> Any:
        seen = real_scan()
        if threading.current_thread() is looker and not listed.is_set():
            listed.set()
            assert go_on.wait(120)
        return seen

    looker = threading.Thread(target=first.registry.refresh)
    first.store.scan = scan  # type: ignore[method-assign]
    looker.start()
    assert listed.wait(120)
    # Not by the registry's verb, which would wait for the look before it begins.
    first.registry._versions.delete("legal")
    go_on.set()
    looker.join()
    assert first.names() == []


# Damage


def test_a_damaged_object_is_refused_by_its_name_and_others_answer(
    build: Build, bucket: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    first = build("a")
    first.upload("legal", 1)
    first.upload("other", 2)
    path = next(path for path in files_of(bucket, "legal") if path.endswith("safetensors"))
    content = bytes(bucket.get(path).bytes())
    second = build("b")
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[:-1], content + b"x", b""):
        bucket.put(path, damaged)
        second.now_s += 60
        with pytest.raises(AdapterRejected, match=r"safetensors of legal@[0-9a-f]{12} in the store is not what was"):
            second.generate("legal")
        assert re.search(rf"The object memory:/*{path} is not what was stored", caplog.text)
        assert second.generate("other")
    bucket.delete(path)
    second.now_s += 60
    with pytest.raises(AdapterRejected, match="is missing"):
        second.generate("legal")
    assert second.registry.describe("legal").tiers == ("store",)


def test_an_upload_of_the_same_content_mends_what_is_damaged(build: Build, bucket: MemoryStore) -> None:
    first = build("a")
    digest = first.upload("legal", 1).digest
    damaged = files_of(bucket, "legal")
    bucket.put(damaged[1], b"rubbish")
    second = build("b")
    with pytest.raises(AdapterRejected):
        second.generate("legal")
    assert second.upload("legal", 1).digest == digest
    assert set(files_of(bucket, "legal")).isdisjoint(damaged), "it has objects of its own, and the old ones are gone"
    third = build("c")
    assert third.generate("legal") == digest


def test_files_that_another_server_has_brought_anew_are_found(build: Build, bucket: MemoryStore) -> None:
    first, second = build("a"), build("b")
    digest = first.upload("legal", 1).digest
    second.registry.refresh()
    first.registry.delete("legal")
    first.upload("legal", 1)
    assert second.generate("legal") == digest, "its index is old, and the objects in it are gone"


def test_content_under_two_names_is_downloaded_once_and_from_whichever_is_whole(
    build: Build, bucket: MemoryStore
) -> None:
    first = build("a")
    first.upload("one", 1)
    first.upload("two", 1)
    bucket.delete(files_of(bucket, "one")[1])
    second = build("b")
    assert second.generate("one") == second.generate("two")
    assert len({call.split("/")[3] for call in second.downloads()}) == 1


# The service


def test_an_outage_fails_the_load_of_what_is_not_here_and_nothing_else(build: Build) -> None:
    first, second = build("a"), build("b")
    first.upload("cold", 1)
    first.upload("warm", 2)
    second.registry.refresh()
    second.generate("warm")
    second.wire.fail_at, second.wire.error = 0, outage()
    with pytest.raises(StoreUnreachable, match="does not answer as it should") as refused:
        second.generate("cold")
    assert (refused.value.status, refused.value.retry_after_s) == (503, 5)
    assert "Debug source" not in refused.value.message
    assert second.generate("warm")
    with pytest.raises(StoreUnreachable):
        second.registry.refresh()
    assert second.names() == ["cold", "warm"], "what was known stays known"
    second.now_s += LOOK_MEMORY_S
    for _ in range(2):
        with pytest.raises(StoreUnreachable):
            second.request("nobody")
    for change in (
        lambda: second.upload("new", 3),
        lambda: second.registry.delete("warm"),
        lambda: second.registry.roll_back("warm"),
    ):
        with pytest.raises(StoreUnreachable):
            change()
    second.wire.fail_at = None
    second.now_s += 60
    assert second.generate("cold")


def test_denied_access_says_what_is_needed(build: Build) -> None:
    replica = build("a")
    replica.wire.fail_at, replica.wire.error = 0, PermissionError("403 Forbidden <AWSAccessKeyId>AKIA</AWSAccessKeyId>")
    with pytest.raises(StoreUnreachable, match="denies access: give the server credentials") as refused:
        replica.registry.refresh()
    assert "AKIA" not in refused.value.message


@pytest.mark.parametrize("does_it", [False, True])
def test_an_upload_whose_last_answer_is_lost_has_happened_or_is_garbage(
    does_it: bool, bucket: MemoryStore, tmp_path: Path
) -> None:
    wire = Wire(bucket)
    store = plain_store(wire, tmp_path)
    with incoming_from(store, write_folder(tmp_path / "made", 1)) as incoming:
        wire.fail_at, wire.does_it, wire.error = 4, does_it, outage()
        with pytest.raises(StoreUnreachable):
            store.put(incoming, "legal", RECORD, replace=False)
    assert [call.split("/")[0] for call in wire.calls] == ["get names", "put versions", "put versions"] + [
        "get names", "put names",
    ], "the files stay: perhaps they are listed"  # fmt: skip
    wire.fail_at = None
    assert [stored.name for stored in store.scan()] == ["legal"] * does_it
    collect_garbage(store, 0)
    assert len(files_of(bucket, "legal")) == 2 * does_it
    assert adopted(store, tmp_path, "legal", 1) == store.versions("legal")[-1].digest


def test_a_lost_answer_that_is_asked_for_again_counts_as_a_new_version(bucket: MemoryStore, tmp_path: Path) -> None:
    """The client library asks again by itself, and then the service says that the object is there already."""
    wire = Wire(bucket)
    store = plain_store(wire, tmp_path)

    def write_first(verb: str, path: str) -> None:
        if verb == "put" and path.startswith("names/") and "names/legal.json" not in objects(bucket):
            files = [path for path in objects(bucket) if path.startswith("versions/")]
            assert len(files) == 2
            version = ObjectVersion(incoming.digest(), files[0].split("/")[3], dict(incoming.files), record)
            bucket.put(path, ObjectIndex((version,)).to_bytes())

    with incoming_from(store, write_folder(tmp_path / "made", 1)) as incoming:
        record = dataclasses.replace(RECORD, content_bytes=incoming.num_bytes)
        wire.before = write_first
        stored, created = store.put(incoming, "legal", RECORD, replace=False)
    assert created
    assert len(files_of(bucket, "legal")) == 2
    assert stored.digest == store.versions("legal")[-1].digest


def test_a_write_of_which_nobody_knows_keeps_its_files(bucket: MemoryStore, tmp_path: Path) -> None:
    """The index was written, the answer lost, asked for again, refused, and then the service is gone."""
    wire = Wire(bucket)
    store = plain_store(wire, tmp_path)
    put = wire._client.put

    def write_first(verb: str, path: str) -> None:
        if verb == "put" and path.startswith("names/"):
            wire.before, wire.fail_at, wire.error = (lambda *_: None), len(wire.calls), outage()
            put(path, b"of another server, as far as the service knows", mode="create")

    wire.before = write_first
    with incoming_from(store, write_folder(tmp_path / "made", 1)) as incoming, pytest.raises(StoreUnreachable):
        store.put(incoming, "legal", RECORD, replace=False)
    assert len(files_of(bucket, "legal")) == 2


# Crashes


def change_upload(store: ObjectStore, root: Path) -> None:
    adopted(store, root, "new", 7)


def change_replace(store: ObjectStore, root: Path) -> None:
    adopted(store, root, "legal", 8, replace=True)


def change_same(store: ObjectStore, root: Path) -> None:
    adopted(store, root, "legal", 2, replace=True)


def change_back(store: ObjectStore, root: Path) -> None:
    store.make_current("legal", store.versions("legal")[0].digest)


def change_delete(store: ObjectStore, root: Path) -> None:
    store.delete("legal")


def change_prune(store: ObjectStore, root: Path) -> None:
    store.discard_version("legal", store.versions("legal")[0].digest).remove()


CHANGES = [change_upload, change_replace, change_same, change_back, change_delete, change_prune]


def state(client: Any, root: Path) -> dict[str, tuple[str, ...]]:
    """What a server that starts now would serve, each version read to its last byte."""
    store = plain_store(client, root)
    found = {}
    for stored in store.scan():
        for version in stored.versions:
            with store.reading(version.folder):
                assert version.folder.is_dir()
        found[stored.name] = tuple(version.digest for version in stored.versions)
    return found


@pytest.mark.parametrize("does_it", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_crash_at_any_request_leaves_the_old_or_the_new_state(
    change: Callable[[ObjectStore, Path], None], does_it: bool, tmp_path: Path
) -> None:
    def fresh() -> MemoryStore:
        client = MemoryStore()
        store = plain_store(client, tmp_path / "first")
        adopted(store, tmp_path, "legal", 1)
        adopted(store, tmp_path, "legal", 2, replace=True)
        return client

    client = fresh()
    old = state(client, tmp_path / "old")
    change(plain_store(client, tmp_path / "whole"), tmp_path)
    new = state(client, tmp_path / "new")
    for fail_at in range(100):
        client = fresh()
        wire = Wire(client)
        wire.fail_at, wire.does_it = fail_at, does_it
        try:
            change(plain_store(wire, tmp_path / f"crash-{fail_at}"), tmp_path)
        except Crash:
            pass
        else:
            break
        found = state(client, tmp_path / f"read-{fail_at}")
        assert found in (old, new)
        collect_garbage(plain_store(client, tmp_path / f"sweep-{fail_at}"), 0)
        assert state(client, tmp_path / f"read-again-{fail_at}") == found
        listed = {f"versions/{name}/{digest}" for name, digests in found.items() for digest in digests}
        lying = {path.rsplit("/", 2)[0] for path in objects(client) if path.startswith("versions/")}
        assert lying == listed, "no garbage is left"
    assert fail_at > 1


# Garbage


def test_garbage_is_what_is_old_and_unlisted(build: Build, bucket: MemoryStore) -> None:
    first = build("a")
    first.upload("legal", 1)
    kept = objects(bucket)
    left = f"versions/legal/{'0' * 64}/{'1' * 32}/adapter_config.json"
    nameless = f"versions/gone/{'0' * 64}/{'1' * 32}/adapter_config.json"
    probe = "probe/of-a-server-that-died-as-it-started"
    for path in (left, nameless, probe, "versions/README.md", "elsewhere/file"):
        bucket.put(path, b"x")
    assert collect_garbage(first.store) == 0, "it may be an upload under way"
    assert collect_garbage(first.store, 0) == 3
    assert objects(bucket) == sorted([*kept, "versions/README.md", "elsewhere/file"])


def test_an_upload_that_is_committed_while_garbage_is_looked_for_stays(build: Build, bucket: MemoryStore) -> None:
    first, second = build("a"), build("b")

    def commit(verb: str, path: str) -> None:
        if verb == "list" and path == "probe/":  # behind the listing of objects, before that of indexes
            second.store.put(incoming, "legal", RECORD, replace=False)

    with (
        incoming_from(second.store, write_folder(second.root / "made-1", 1)) as incoming,
        second.store.staged(incoming, "legal", replace=False),
    ):
        first.wire.before = commit
        assert collect_garbage(first.store, 0) == 0
    first.registry.refresh()
    assert first.generate("legal")


def test_objects_that_are_still_read_here_are_no_garbage(build: Build, bucket: MemoryStore) -> None:
    first = build("a")
    first.upload("legal", 1)
    with first.request("legal"):
        first.registry.delete("legal")
        assert collect_garbage(first.store, 0) == 0
        assert len(files_of(bucket, "legal")) == 2
    first.registry.close()  # it waits for the removal
    assert files_of(bucket, "legal") == []


def test_a_broken_index_protects_everything_under_its_name(build: Build, bucket: MemoryStore) -> None:
    first = build("a")
    first.upload("legal", 1)
    bucket.put("names/legal.json", b"{")
    assert collect_garbage(first.store, 0) == 0
    assert len(files_of(bucket, "legal")) == 2


# What a folder refuses is refused here


def test_the_same_refusals_as_of_a_folder(build: Build) -> None:
    replica = build("a")
    digest = replica.upload("legal", 1).digest
    with pytest.raises(BadRequest, match="cannot name an adapter"):
        adopted(replica.store, replica.root, "../up", 2)
    with pytest.raises(Conflict, match="is the current version"):
        replica.store.discard_version("legal", digest)
    for ask in (
        lambda: replica.store.versions("nobody"),
        lambda: replica.store.versions("No Name"),
        lambda: replica.store.delete("nobody"),
        lambda: replica.store.make_current("legal", "0" * 64),
        lambda: replica.store.discard_version("legal", "0" * 64),
    ):
        with pytest.raises(AdapterNotFound):
            ask()


def test_an_upload_that_is_refused_leaves_no_object(build: Build, bucket: MemoryStore) -> None:
    replica = build("a")
    replica.upload("legal", 1)
    before = objects(bucket)
    folder = write_folder(replica.root / "bad", 5)
    (folder / "adapter_config.json").write_text('{"peft_type": "OTHER"}')
    with incoming_from(replica.store, folder) as incoming, pytest.raises(GraftError):
        replica.registry.register(incoming, "bad", replace=False)
    with incoming_from(replica.store, write_folder(replica.root / "made-2", 2)) as incoming, pytest.raises(Conflict):
        replica.store.put(incoming, "legal", RECORD, replace=False)
    assert objects(bucket) == before


def test_a_server_that_stops_does_not_finish_its_downloads(build: Build) -> None:
    first, second = build("a"), build("b")
    first.upload("legal", 1)
    second.registry.refresh()
    second.wire.before = lambda verb, path: second.store.close() if verb == "get_range" else None
    with pytest.raises(Overloaded, match="shutting down"):
        second.generate("legal")
    assert len(second.downloads()) == 1
