"""The room of a store: what is stored and what is promised stay within the quota and off the reserve."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from server.adapters.store.folder_store import Incoming, Record, Store
from server.adapters.store.quota import StoreLimits, content_bytes
from server.ground.errors import StorageFull

ROOT = Path(__file__).parents[3]
QUOTA = StoreLimits(quota_bytes=1000)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", create=True, limits=QUOTA)


def write(incoming: Incoming, filename: str, num_bytes: int, fill: bytes = b"x") -> None:
    with incoming.open_file(filename) as file:
        file.write(fill * num_bytes)


def put(store: Store, name: str, num_bytes: int, fill: bytes = b"x", *, replace: bool = False) -> None:
    """An adapter of so many bytes; a tenth of them is its config."""
    with store.incoming() as incoming:
        write(incoming, CONFIG_FILE, num_bytes // 10, fill)
        write(incoming, WEIGHTS_FILE, num_bytes - num_bytes // 10, fill)
        store.put(incoming, name, Record(created=1), replace=replace)


def test_the_last_byte_fits_and_the_next_does_not(store: Store) -> None:
    put(store, "a", 600)
    with pytest.raises(
        StorageFull, match=r"1000 bytes \(--store-quota\), 600 are taken.* needs 401: delete"
    ) as refused:
        put(store, "b", 401)
    assert (refused.value.status, refused.value.code) == (507, "quota_exceeded")
    put(store, "b", 400)
    assert content_bytes(store.root) == 1000
    store.delete("a")
    put(store, "c", 600)


def test_all_versions_count_until_they_are_pruned(store: Store) -> None:
    put(store, "a", 500)
    put(store, "a", 500, b"y", replace=True)
    with pytest.raises(StorageFull):
        put(store, "a", 500, b"z", replace=True)
    store.delete_version("a", store.versions("a")[0].digest)
    put(store, "a", 500, b"z", replace=True)


def test_what_will_follow_is_refused_before_it_comes(store: Store) -> None:
    with store.incoming() as incoming:
        with pytest.raises(StorageFull):
            incoming.expect(1001)
        incoming.expect(1000)


def test_uploads_in_progress_count(store: Store) -> None:
    with store.incoming() as one, store.incoming() as other:
        one.expect(600)
        with pytest.raises(StorageFull, match="600 are taken or promised"):
            other.expect(401)
        other.expect(400)
        one.discard()
        other.expect(1000)


def test_two_of_unknown_length_cannot_pass_it_together(store: Store) -> None:
    """They grow by turns; what the one has been given the other does not get."""
    with store.incoming() as one, store.incoming() as other:
        with one.open_file(WEIGHTS_FILE) as first, other.open_file(WEIGHTS_FILE) as second:
            num_bytes = 0
            with suppress(StorageFull):
                for file in (first, second) * 100:
                    file.write(b"x" * 10)
                    num_bytes += 10
        assert 0 < num_bytes <= 1000
    put(store, "a", 1000)


def test_another_process_is_noticed_at_the_latest_when_the_upload_is_put(store: Store) -> None:
    elsewhere = Store(store.root, create=False, limits=QUOTA)
    with store.incoming() as incoming:
        write(incoming, CONFIG_FILE, 100)
        write(incoming, WEIGHTS_FILE, 500)
        put(elsewhere, "b", 600)
        with pytest.raises(StorageFull):
            store.put(incoming, "a", Record(created=1), replace=False)
    assert store.names() == ("b",)


def test_a_folder_is_refused_before_it_is_copied(store: Store, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / CONFIG_FILE).write_bytes(b"{}")
    (tmp_path / "in" / WEIGHTS_FILE).write_bytes(bytes(999))
    with pytest.raises(StorageFull, match="needs 1001"):
        store.add_folder(tmp_path / "in", "a")
    assert list((store.root / ".incoming").iterdir()) == []


def test_the_reserve_of_the_disk_is_not_touched(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", create=True, limits=StoreLimits(reserve_bytes=1 << 60))
    with pytest.raises(StorageFull, match=rf"{1 << 60} of them stay free \(--store-reserve\)") as refused:
        put(store, "a", 100)
    assert refused.value.code == "disk_full"
    roomy = Store(tmp_path / "store", create=True, limits=StoreLimits(reserve_bytes=1))
    put(roomy, "a", 100)


# A disk that is full

# Uploads under a limit on the size of a file, which the system enforces as it does a full disk, for every limit; prints
# what the store is after each. The index of many versions is larger than any record, so that it fails alone, too.
_FULL = """
import json, os, resource, sys
from pathlib import Path
from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from server.adapters.store.folder_store import Record, Store
from server.ground.errors import StorageFull

def put(store, weights, name="legal"):
    with store.incoming() as incoming:
        for filename, data in ((CONFIG_FILE, b"{}"), (WEIGHTS_FILE, weights)):
            with incoming.open_file(filename) as file:
                file.write(data)
        store.put(incoming, name, Record(created=1), replace=True)

os.fsync = lambda descriptor: None
store = Store(Path(sys.argv[1]), create=True)
for number in range(12):
    put(store, b"%d" % number)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
limit = 0
while True:
    error = ""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        put(store, b"new")
    except StorageFull as full:
        error = full.message
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    folders = [entry for entry in os.listdir(store.root / "legal") if entry != "current.json"]
    print(json.dumps({
        "error": error, "num_versions": len(store.versions("legal")), "num_folders": len(folders),
        "leftovers": os.listdir(store.root / ".incoming"),
    }))
    if not error:
        break
    limit += 11
"""


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _FULL, str(tmp_path / "store")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *failed, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(failed) > 50
    assert all("cannot be written" in state["error"] and "free some space" in state["error"] for state in failed)
    assert all((state["num_versions"], state["num_folders"], state["leftovers"]) == (12, 12, []) for state in failed)
    assert (last["num_versions"], last["num_folders"], last["leftovers"]) == (13, 13, [])
