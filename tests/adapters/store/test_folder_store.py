"""The disk tier: versions, whole steps, and what survives junk, limits and crashes."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from server.adapters.store.folder_store import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Incoming,
    Record,
    Store,
    StoredVersion,
    folder_digest,
)
from server.ground.errors import (
    AdapterNotFound,
    AdapterRejected,
    BadRequest,
    Conflict,
    GraftError,
    StartupRefused,
    TooLarge,
)

CONFIG = b'{"peft_type": "LORA", "base_model_name_or_path": "tiny-base"}'
RECORD = Record(created=1_700_000_000, method="lora", rank=8, num_parameters=64, num_sites=2, warnings=("careful",))
ROOT = Path(__file__).parents[3]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", create=True)


def upload(store: Store, weights: bytes, **more: bytes) -> Incoming:
    incoming = store.incoming()
    files = {CONFIG_FILE: CONFIG, WEIGHTS_FILE: weights, **{f"{name}.json": data for name, data in more.items()}}
    for name, data in files.items():
        with incoming.open_file(name) as file:
            file.write(data)
    return incoming


def put(store: Store, name: str, weights: bytes, *, replace: bool = False) -> tuple[StoredVersion, bool]:
    with upload(store, weights) as incoming:
        return store.put(incoming, name, RECORD, replace=replace)


def leftovers(store: Store) -> list[str]:
    folder = store.root / ".incoming"
    return os.listdir(folder) if folder.exists() else []


# Versions


def test_a_version_is_the_documented_digest_of_names_lengths_and_bytes(store: Store) -> None:
    stored, _ = put(store, "legal", b"weights")
    framed = b"".join(
        len(name).to_bytes(8, "big") + name.encode() + len(data).to_bytes(8, "big") + hashlib.sha256(data).digest()
        for name, data in ((CONFIG_FILE, CONFIG), (WEIGHTS_FILE, b"weights"))
    )
    assert stored.digest == hashlib.sha256(framed).hexdigest()


def test_a_version_is_the_same_in_whatever_order_and_pieces_the_files_arrive(store: Store) -> None:
    with store.incoming() as incoming:
        with incoming.open_file(WEIGHTS_FILE) as file:
            for byte in b"weights":
                file.write(bytes([byte]))
        with incoming.open_file(CONFIG_FILE) as file:
            file.write(CONFIG)
        digest = incoming.digest()
    assert digest == put(store, "legal", b"weights")[0].digest


def test_a_folder_has_the_digest_that_it_gets_in_the_store(store: Store) -> None:
    stored, _ = put(store, "legal", b"weights")
    found = folder_digest(stored.folder)
    assert found.digest == stored.digest, "record.json must not count"
    assert found.content_bytes == len(CONFIG) + len(b"weights") == stored.record.content_bytes


def test_a_manifest_counts(store: Store) -> None:
    with upload(store, b"weights") as plain, upload(store, b"weights", manifest=b"{}") as with_manifest:
        assert plain.digest() != with_manifest.digest()


def test_the_record_comes_back(store: Store) -> None:
    put(store, "legal", b"weights")
    [version] = Store(store.root, create=False).versions("legal")
    assert version.record == Record(
        created=1_700_000_000,
        method="lora",
        rank=8,
        num_parameters=64,
        num_sites=2,
        warnings=("careful",),
        content_bytes=len(CONFIG) + 7,
    )


# Putting


def put_record(store: Store, name: str, weights: bytes, **base: str | None) -> StoredVersion:
    with upload(store, weights) as incoming:
        return store.put(incoming, name, dataclasses.replace(RECORD, **base), replace=True)[0]  # type: ignore[arg-type]


def test_what_is_said_of_the_base_is_recorded_beside_the_version_and_may_change(store: Store) -> None:
    first = put_record(store, "legal", b"one", checked_name="tiny", checked_fingerprint="a" * 64)
    assert (first.record.base_fingerprint, first.record.checked_fingerprint) == (None, "a" * 64)
    again = put_record(store, "legal", b"one", base_fingerprint="b" * 64, checked_name="tuned")
    assert again.digest == first.digest
    record = Store(store.root, create=False).versions("legal")[-1].record
    assert record == again.record
    assert (record.base_fingerprint, record.checked_name, record.checked_fingerprint) == ("b" * 64, "tuned", None)
    assert dataclasses.replace(record, **_base_of(first.record)) == first.record, "nothing else has changed"
    silent = put_record(store, "legal", b"one")
    assert silent.record == record, "who says nothing takes nothing back"


def _base_of(record: Record) -> dict[str, str | None]:
    return {
        "base_fingerprint": record.base_fingerprint,
        "checked_name": record.checked_name,
        "checked_fingerprint": record.checked_fingerprint,
    }


def test_coming_back_to_a_version_renews_what_its_record_says_of_the_base(store: Store) -> None:
    put_record(store, "legal", b"one", checked_name="tiny")
    put_record(store, "legal", b"two", checked_name="tiny")
    assert put_record(store, "legal", b"one", checked_name="tuned").record.checked_name == "tuned"
    assert [version.record.checked_name for version in store.versions("legal")] == ["tiny", "tuned"]
    assert leftovers(store) == []


def test_a_manifest_may_say_what_base_the_adapter_is_for(store: Store, tmp_path: Path) -> None:
    manifests = {"said": b'{"base_fingerprint": "abc"}', "not": b'{"x": 1}', "odd": b"[", "none": None}
    for name, manifest in manifests.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / CONFIG_FILE).write_bytes(CONFIG)
        (folder / WEIGHTS_FILE).write_bytes(b"weights")
        if manifest is not None:
            (folder / "manifest.json").write_bytes(manifest)
        stored, _ = store.add_folder(folder, name)
        assert stored.record.base_fingerprint == ("abc" if name == "said" else None)


def test_the_same_content_again_changes_nothing(store: Store) -> None:
    first, was_new = put(store, "legal", b"one")
    second, is_new = put(store, "legal", b"one")
    assert (was_new, is_new) == (True, False)
    assert first == second
    assert leftovers(store) == []


def test_other_content_needs_replace(store: Store) -> None:
    first, _ = put(store, "legal", b"one")
    with pytest.raises(Conflict, match=r"'legal' exists with other content .* replace=true"):
        put(store, "legal", b"two")
    assert store.current("legal") == first.digest
    second, created = put(store, "legal", b"two", replace=True)
    assert created
    assert store.current("legal") == second.digest
    assert [version.digest for version in store.versions("legal")] == [first.digest, second.digest]
    assert leftovers(store) == []


def test_an_upload_that_met_a_conflict_can_be_put_again(store: Store) -> None:
    put(store, "legal", b"one")
    with upload(store, b"two") as incoming:
        with pytest.raises(Conflict):
            store.put(incoming, "legal", RECORD, replace=False)
        assert store.put(incoming, "legal", RECORD, replace=True)[1]


def test_replacing_with_an_older_version_makes_it_current_again(store: Store) -> None:
    first, _ = put(store, "legal", b"one")
    second, _ = put(store, "legal", b"two", replace=True)
    _, created = put(store, "legal", b"one", replace=True)
    assert created
    assert store.current("legal") == first.digest
    assert [version.digest for version in store.versions("legal")] == [second.digest, first.digest]


@pytest.mark.parametrize("name", ["", "Legal", ".hidden", "-x", "a/b", "a\\b", "..", "a\n", "é", "a" * 64, "a@b"])
def test_names_that_could_escape_or_confuse_are_refused(store: Store, name: str) -> None:
    with pytest.raises(BadRequest, match="cannot name an adapter"):
        put(store, name, b"one")
    with pytest.raises(AdapterNotFound):
        store.delete(name)


@pytest.mark.parametrize("filename", ["../evil", "/etc/passwd", "adapter_model.bin", "record.json", "current.json", ""])
def test_only_an_adapters_own_files_can_be_written(store: Store, filename: str) -> None:
    with store.incoming() as incoming, pytest.raises(BadRequest, match="is no file of an adapter"):
        incoming.open_file(filename)


def test_a_file_sent_twice_is_refused(store: Store) -> None:
    with upload(store, b"one") as incoming, pytest.raises(BadRequest, match="sent twice"):
        incoming.open_file(CONFIG_FILE)


@pytest.mark.parametrize("missing", [CONFIG_FILE, WEIGHTS_FILE])
def test_an_upload_without_a_file_has_no_version(store: Store, missing: str) -> None:
    with store.incoming() as incoming:
        [present] = {CONFIG_FILE, WEIGHTS_FILE} - {missing}
        incoming.open_file(present).close()
        with pytest.raises(BadRequest, match=missing):
            store.put(incoming, "legal", RECORD, replace=False)


def test_a_file_whose_writing_failed_does_not_count_as_sent(store: Store) -> None:
    with store.incoming() as incoming:
        incoming.open_file(CONFIG_FILE).close()
        with suppress(ConnectionError), incoming.open_file(WEIGHTS_FILE) as file:
            file.write(b"half")
            raise ConnectionError
        with pytest.raises(BadRequest, match=WEIGHTS_FILE):
            incoming.digest()


def test_the_limit_holds_over_all_files_together(store: Store) -> None:
    with store.incoming(max_bytes=10) as incoming:
        with incoming.open_file(CONFIG_FILE) as file:
            file.write(b"12345")
        with incoming.open_file(WEIGHTS_FILE) as file:
            file.write(b"67890")
            with pytest.raises(TooLarge, match=r"10 bytes.*--max-upload-bytes"):
                file.write(b"x")
    assert leftovers(store) == []


def test_a_disk_that_refuses_is_told_in_a_sentence(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with upload(store, b"one") as incoming:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(GraftError, match=r"No space left on device.*--store"):
            store.put(incoming, "legal", RECORD, replace=False)
    monkeypatch.undo()
    assert store.names() == ()
    assert leftovers(store) == []


def test_a_local_folder_is_imported(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / CONFIG_FILE).write_bytes(CONFIG)
    (folder / "README.md").write_text("not part of it", encoding="utf-8")
    with pytest.raises(AdapterRejected, match=rf"no {WEIGHTS_FILE}"):
        store.add_folder(folder, "mine")
    (folder / WEIGHTS_FILE).write_bytes(b"weights")
    stored, created = store.add_folder(folder, "mine")
    assert created
    assert stored.record.base_model == "tiny-base"
    assert stored.digest == folder_digest(folder).digest
    assert sorted(os.listdir(stored.folder)) == [CONFIG_FILE, WEIGHTS_FILE, "record.json"]


# Deleting


def test_deleting_a_name_leaves_nothing(store: Store) -> None:
    put(store, "legal", b"one")
    put(store, "legal", b"two", replace=True)
    put(store, "terse", b"one")
    store.delete("legal")
    assert store.names() == ("terse",)
    assert sorted(os.listdir(store.root)) == [".incoming", "terse"]
    assert leftovers(store) == []
    with pytest.raises(AdapterNotFound, match="'legal'"):
        store.delete("legal")


def test_a_version_that_is_there_is_made_current_by_one_rename(store: Store) -> None:
    first, second = (put(store, "legal", weights, replace=True)[0].digest for weights in (b"1", b"2"))
    store.make_current("legal", first)
    store.make_current("legal", first)
    again = Store(store.root, create=False)
    assert again.current("legal") == first
    assert [version.digest for version in again.versions("legal")] == [second, first]
    assert leftovers(store) == []
    for name, digest in (("legal", "0" * 64), ("other", first)):
        with pytest.raises(AdapterNotFound):
            store.make_current(name, digest)
    assert leftovers(store) == []


def test_one_version_is_deleted_but_never_the_current_one(store: Store) -> None:
    first, _ = put(store, "legal", b"one")
    second, _ = put(store, "legal", b"two", replace=True)
    with pytest.raises(Conflict, match="is the current version"):
        store.delete_version("legal", second.digest)
    store.delete_version("legal", first.digest)
    assert [version.digest for version in store.versions("legal")] == [second.digest]
    assert not first.folder.exists()
    assert leftovers(store) == []
    with pytest.raises(AdapterNotFound):
        store.delete_version("legal", first.digest)


def test_one_version_is_discarded_and_readable_until_removed(store: Store) -> None:
    first, _ = put(store, "legal", b"one")
    second, _ = put(store, "legal", b"two", replace=True)
    with pytest.raises(Conflict, match="is the current version"):
        store.discard_version("legal", second.digest)
    discarded = store.discard_version("legal", first.digest)
    assert [version.digest for version in store.versions("legal")] == [second.digest]
    assert (discarded.digest, (discarded.folder / WEIGHTS_FILE).read_bytes()) == (first.digest, b"one")
    discarded.remove()
    assert leftovers(store) == []


def test_what_is_discarded_is_gone_by_name_and_readable_until_removed(store: Store) -> None:
    put(store, "legal", b"one")
    put(store, "legal", b"two", replace=True)
    one, two = store.discard("legal")
    assert store.names() == ()
    put(store, "legal", b"three")  # the name is free again
    one.remove()
    one.remove()
    assert not one.folder.exists()
    assert (two.folder / WEIGHTS_FILE).read_bytes() == b"two"
    two.remove()
    assert leftovers(store) == []


# Opening


def test_a_missing_root_is_created_only_when_asked(tmp_path: Path) -> None:
    with pytest.raises(StartupRefused, match="--store"):
        Store(tmp_path / "none", create=False)
    assert Store(tmp_path / "deep" / "store", create=True).names() == ()
    (tmp_path / "file").touch()
    with pytest.raises(StartupRefused, match="not a folder"):
        Store(tmp_path / "file", create=True)


def test_opening_clears_what_nobody_works_on_and_nothing_else(store: Store) -> None:
    with upload(store, b"one") as incoming:
        (store.root / ".incoming" / "abandoned" / "version").mkdir(parents=True)
        (store.root / ".incoming" / "stray").touch()
        other = Store(store.root, create=False)
        assert leftovers(store) == [incoming.folder.parent.name]
        stored, _ = other.put(incoming, "legal", RECORD, replace=False)
    assert (stored.folder / WEIGHTS_FILE).read_bytes() == b"one"


def test_a_version_that_its_index_does_not_list_is_cleared(store: Store) -> None:
    stored, _ = put(store, "legal", b"one")
    stray = stored.folder.with_name("0" * 64)
    stray.mkdir()
    Store(store.root, create=False)
    assert not stray.exists()
    assert stored.folder.exists()


def test_junk_costs_a_warning_each_and_never_the_rest(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("good", "no-index", "bad-index", "bad-digest", "no-files", "linked-file"):
        put(store, name, name.encode())
    (store.root / "no-index" / "current.json").unlink()
    (store.root / "bad-index" / "current.json").write_text("{", encoding="utf-8")
    (store.root / "bad-digest" / "current.json").write_bytes(b'{"current": "../x", "versions": ["../x"]}')
    (store.folder("no-files", store.current("no-files")) / WEIGHTS_FILE).unlink()
    linked = store.folder("linked-file", store.current("linked-file")) / WEIGHTS_FILE
    linked.unlink()
    linked.symlink_to("/etc/hostname")
    (store.root / "link").symlink_to(store.root / "good")
    (store.root / "Not A Name").mkdir()
    (store.root / "README.md").touch()

    reopened = Store(store.root, create=False)
    assert reopened.names() == ("good",)
    broken = {"no-index", "bad-index", "bad-digest", "no-files", "linked-file", "link", "Not A Name"}
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == len(broken)
    assert all(any(f"/{name} is left out" in message for message in warned) for name in broken)
    assert (store.root / "no-index").is_dir(), "without an index nothing is thrown away"


def test_an_old_version_that_lost_its_files_costs_only_itself(store: Store) -> None:
    first, _ = put(store, "legal", b"one")
    second, _ = put(store, "legal", b"two", replace=True)
    (first.folder / WEIGHTS_FILE).unlink()
    assert [version.digest for version in store.versions("legal")] == [second.digest]
    with pytest.raises(AdapterNotFound):
        store.folder("legal", first.digest)


def test_a_broken_current_version_is_mended_by_uploading_it_again(store: Store) -> None:
    stored, _ = put(store, "legal", b"one")
    (stored.folder / WEIGHTS_FILE).unlink()
    again, created = put(store, "legal", b"one")
    assert created
    assert (again.folder / WEIGHTS_FILE).read_bytes() == b"one"
    assert leftovers(store) == []


def test_a_folder_in_the_way_is_named_and_left_alone(store: Store) -> None:
    (store.root / "legal").mkdir()
    (store.root / "legal" / "precious").touch()
    with pytest.raises(Conflict, match="is in the way"):
        put(store, "legal", b"one", replace=True)
    assert (store.root / "legal" / "precious").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"created": "x"}', '{"created": 1, "warnings": 3}'])
def test_a_broken_record_costs_what_it_said_and_not_the_adapter(store: Store, content: str) -> None:
    stored, _ = put(store, "legal", b"one")
    (stored.folder / "record.json").write_text(content, encoding="utf-8")
    [version] = store.versions("legal")
    assert version.record.method is None
    assert version.record.base_model == "tiny-base"
    assert version.record.content_bytes == len(CONFIG) + 3


# Crashes

# Runs one change in a process that dies before its k-th change of the file system, or before the k-th byte of a file
# reaches it, for every k, and prints what the store is after each death. Dying is os._exit in an audit hook and in the
# file object beneath the buffer, so no step of the store has to be known here.
_CRASHES = """
import io, json, os, shutil, sys, tarfile
from pathlib import Path
from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from server.adapters.store.folder_store import Record, Store
from server.api.archive import ArchiveReader

def put_archive(store, weights):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, data in ((CONFIG_FILE, b"{}"), (WEIGHTS_FILE, weights)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with store.incoming() as incoming:
        with ArchiveReader(incoming, 1 << 20) as reader:
            reader.write(packed.getvalue())
            reader.finish()
        store.put(incoming, "legal", Record(created=1), replace=True)

def put(store, weights, replace=False):
    with store.incoming() as incoming:
        for name, data in ((CONFIG_FILE, b"{}"), (WEIGHTS_FILE, weights)):
            with incoming.open_file(name) as file:
                file.write(data)
        store.put(incoming, "legal", Record(created=1), replace=replace)

CHANGES = {
    "first": (lambda s: None, lambda s: put(s, b"one")),
    "replace": (lambda s: put(s, b"one"), lambda s: put(s, b"two", replace=True)),
    "back": (lambda s: (put(s, b"one"), put(s, b"two", replace=True)), lambda s: put(s, b"one", replace=True)),
    "archive": (lambda s: put(s, b"one"), lambda s: put_archive(s, b"two")),
    "roll_back": (
        lambda s: (put(s, b"one"), put(s, b"two", replace=True)),
        lambda s: s.make_current("legal", s.versions("legal")[0].digest),
    ),
    "delete": (lambda s: (put(s, b"one"), put(s, b"two", replace=True)), lambda s: s.delete("legal")),
    "delete_version": (
        lambda s: (put(s, b"one"), put(s, b"two", replace=True)),
        lambda s: s.delete_version("legal", s.versions("legal")[0].digest),
    ),
}

def state(root):
    store = Store(root, create=False)
    files = lambda v: (v.folder / WEIGHTS_FILE).read_bytes().decode()
    names = {n.name: [files(v) for v in n.versions] for n in store.scan()}
    incoming = root / ".incoming"
    disk = sorted(os.listdir(root / "legal")) if (root / "legal").exists() else []
    return {
        "names": names,
        "leftovers": os.listdir(incoming) if incoming.exists() else [],
        "num_on_disk": len([entry for entry in disk if entry != "current.json"]),
    }

def die_before_change(k):
    count = 0
    def hook(event, arguments):
        nonlocal count
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            count += 1
            if count == k:
                os._exit(9)
    sys.addaudithook(hook)

def die_before_byte(k):
    left = k

    class Dying(io.FileIO):
        def write(self, data):
            nonlocal left
            data = bytes(data)
            super().write(data[:left])
            if len(data) > left:
                os._exit(9)
            left -= len(data)
            return len(data)

    def opened(path, mode="r", *arguments, open=io.open):
        if mode in ("wb", "xb"):
            return io.BufferedWriter(Dying(path, mode[0]))
        return open(path, mode, *arguments)

    io.open = opened

root, kind, unit = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
before, change = CHANGES[kind]
die = die_before_change if unit == "changes" else die_before_byte
os.fsync = lambda descriptor: None  # nobody cuts the power here
k = 0 if unit == "changes" else -1
while True:
    k += 1 if unit == "changes" or k < 8 else 9
    shutil.rmtree(root, ignore_errors=True)
    before(Store(root, create=True))
    child = os.fork()
    if child == 0:
        store = Store(root, create=False)
        die(k)
        change(store)
        os._exit(0)
    died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps({"died": died, **state(root)}))
    if died != 9:
        break
"""


@pytest.mark.parametrize(
    ("change", "unit", "old", "new"),
    [
        ("first", "changes", {}, {"legal": ["one"]}),
        ("first", "bytes", {}, {"legal": ["one"]}),
        ("replace", "changes", {"legal": ["one"]}, {"legal": ["one", "two"]}),
        ("back", "changes", {"legal": ["one", "two"]}, {"legal": ["two", "one"]}),
        ("archive", "changes", {"legal": ["one"]}, {"legal": ["one", "two"]}),
        ("archive", "bytes", {"legal": ["one"]}, {"legal": ["one", "two"]}),
        ("roll_back", "changes", {"legal": ["one", "two"]}, {"legal": ["two", "one"]}),
        ("roll_back", "bytes", {"legal": ["one", "two"]}, {"legal": ["two", "one"]}),
        ("delete", "changes", {"legal": ["one", "two"]}, {}),
        ("delete_version", "changes", {"legal": ["one", "two"]}, {"legal": ["two"]}),
    ],
)
def test_a_crash_at_any_step_leaves_the_old_state_or_the_new_one(
    tmp_path: Path, change: str, unit: str, old: dict[str, list[str]], new: dict[str, list[str]]
) -> None:
    command = [sys.executable, "-c", _CRASHES, str(tmp_path / "store"), change, unit]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    states = [json.loads(line) for line in done.stdout.splitlines()]

    assert states[-1]["died"] == 0, "the last run is not interrupted"
    assert states[-1]["names"] == new
    assert states[0]["names"] == old, "the first change of the file system decides nothing yet"
    assert len(states) > 5
    seen = [state["names"] for state in states]
    assert all(names in (old, new) for names in seen)
    assert seen == [old] * seen.count(old) + [new] * seen.count(new), "once decided, it stays"
    assert all(state["leftovers"] == [] for state in states)
    assert all(state["num_on_disk"] == len(state["names"].get("legal", [])) for state in states)
