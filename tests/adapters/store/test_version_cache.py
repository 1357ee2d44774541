"""The versions on this machine: bounded, held to their digests, and never taken from under a reader."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from server.adapters.store.folder_store import Incoming
from server.adapters.store.version_cache import VersionCache
from server.ground.errors import AdapterNotFound, AdapterRejected, StartupRefused, StorageFull
from tests.adapters.replicas import Replica

CONFIG = b'{"peft_type": "LORA"}'

# Holds a version as a reader does, says so, and waits to be killed.
_READER = """
import sys
from pathlib import Path
from server.adapters.store.version_cache import VersionCache
cache = VersionCache(Path(sys.argv[1]), 1)
with cache.reading(sys.argv[2], None):
    print("reading", flush=True)
    sys.stdin.read()
"""


class Elsewhere:
    """Where versions come from: counts what is fetched."""

    def __init__(self, cache: VersionCache) -> None:
        self._cache = cache
        self._weights: dict[str, bytes] = {}
        self.fetched: list[str] = []

    def version(self, weights: bytes) -> str:
        with self._incoming(weights) as incoming:
            self._weights[incoming.digest()] = weights
            return incoming.digest()

    def fetch(self, digest: str) -> Incoming:
        self.fetched.append(digest)
        return self._incoming(self._weights[digest])

    def _incoming(self, weights: bytes) -> Incoming:
        incoming = self._cache.incoming(max_bytes=None)
        for name, content in ((CONFIG_FILE, CONFIG), (WEIGHTS_FILE, weights)):
            with incoming.open_file(name) as file:
                file.write(content)
        return incoming


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[VersionCache, Elsewhere]]:
    def make(max_bytes: int = 1 << 20, **options: int) -> tuple[VersionCache, Elsewhere]:
        cache = VersionCache(tmp_path / "cache", max_bytes, **options)
        return cache, Elsewhere(cache)

    return make


def held(cache: VersionCache) -> set[str]:
    return {folder.name for folder in cache.folder("x").parent.iterdir()}


Make = Callable[..., tuple[VersionCache, Elsewhere]]


def test_a_version_is_fetched_once_and_is_there_while_it_is_read(make: Make) -> None:
    cache, elsewhere = make()
    digest = elsewhere.version(b"weights")
    for _ in range(2):
        with cache.reading(digest, elsewhere.fetch):
            assert (cache.folder(digest) / WEIGHTS_FILE).read_bytes() == b"weights"
    assert elsewhere.fetched == [digest]
    assert cache.digest_of(cache.folder(digest)) == digest
    assert cache.digest_of(Path("/elsewhere") / digest) is None


def test_what_was_read_longest_ago_goes_first(make: Make) -> None:
    cache, elsewhere = make(300)
    digests = [elsewhere.version(bytes([number]) * 100) for number in range(3)]
    for turn, digest in enumerate([digests[0], digests[1], digests[0], digests[2]]):
        with cache.reading(digest, elsewhere.fetch):
            os.utime(cache.folder(digest), ns=(turn, turn))
    assert held(cache) == {digests[0], digests[2]}


def test_what_is_read_stays_however_little_room_there_is(make: Make) -> None:
    cache, elsewhere = make(1)
    digests = [elsewhere.version(bytes([number])) for number in range(3)]
    with ExitStack() as reading:
        for digest in digests:
            reading.enter_context(cache.reading(digest, elsewhere.fetch))
        assert all((cache.folder(digest) / WEIGHTS_FILE).is_file() for digest in digests)
    with cache.reading(elsewhere.version(b"one more"), elsewhere.fetch):
        assert len(held(cache)) == 1


def test_a_reader_in_another_process_counts_and_its_crash_ends_that(make: Make, tmp_path: Path) -> None:
    cache, elsewhere = make(1)
    digest, other = elsewhere.version(b"first"), elsewhere.version(b"second")
    with cache.reading(digest, elsewhere.fetch):
        pass
    command = [sys.executable, "-c", _READER, str(tmp_path / "cache"), digest]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        with cache.reading(other, elsewhere.fetch):
            assert held(cache) == {digest, other}
        process.kill()
        process.wait()
    with cache.reading(elsewhere.version(b"third"), elsewhere.fetch):
        assert digest not in held(cache)


def test_a_restart_finds_what_is_there_and_holds_it_to_its_digest(make: Make) -> None:
    cache, elsewhere = make()
    whole, damaged, cut = (elsewhere.version(text) for text in (b"whole", b"damaged", b"cut"))
    for digest in (whole, damaged, cut):
        with cache.reading(digest, elsewhere.fetch):
            pass
    (cache.folder(damaged) / WEIGHTS_FILE).write_bytes(b"damagee")
    (cache.folder(cut) / CONFIG_FILE).unlink()
    cache = make()[0]
    elsewhere.fetched.clear()
    for digest, content in ((whole, b"whole"), (damaged, b"damaged"), (cut, b"cut")):
        with cache.reading(digest, elsewhere.fetch):
            assert (cache.folder(digest) / WEIGHTS_FILE).read_bytes() == content
    assert elsewhere.fetched == [damaged, cut]


def test_files_that_change_while_a_server_runs_are_noticed(make: Make) -> None:
    cache, elsewhere = make()
    digest = elsewhere.version(b"weights")
    with cache.reading(digest, elsewhere.fetch):
        pass
    for spoil in (
        lambda: (cache.folder(digest) / WEIGHTS_FILE).unlink(),  # as an eviction leaves it that was broken off
        lambda: (cache.folder(digest) / WEIGHTS_FILE).write_bytes(b"rubbish"),
    ):
        spoil()
        with cache.reading(digest, elsewhere.fetch):
            assert (cache.folder(digest) / WEIGHTS_FILE).read_bytes() == b"weights"


def test_damaged_files_that_another_reads_are_not_served(make: Make) -> None:
    cache, elsewhere = make()
    digest = elsewhere.version(b"weights")
    with cache.reading(digest, elsewhere.fetch):
        (cache.folder(digest) / WEIGHTS_FILE).write_bytes(b"rubbish")
        with pytest.raises(AdapterRejected, match="cannot be replaced"), cache.reading(digest, elsewhere.fetch):
            pass
    with cache.reading(digest, elsewhere.fetch):
        assert (cache.folder(digest) / WEIGHTS_FILE).read_bytes() == b"weights"


def test_several_may_want_one_version_at_once(make: Make) -> None:
    cache, elsewhere = make()
    digest = elsewhere.version(b"weights")
    barrier, seen = threading.Barrier(4), []

    def fetch(digest: str) -> Incoming:
        incoming = elsewhere.fetch(digest)
        barrier.wait(120)  # all have fetched before any has brought it
        return incoming

    def read() -> None:
        with cache.reading(digest, fetch):
            seen.append((cache.folder(digest) / WEIGHTS_FILE).read_bytes())

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [b"weights"] * 4


def test_a_fetch_that_fails_leaves_nothing(make: Make, tmp_path: Path) -> None:
    cache, _ = make()

    def fetch(digest: str) -> Incoming:
        raise AdapterNotFound("it is gone")

    with pytest.raises(AdapterNotFound), cache.reading("0" * 64, fetch):
        pass
    assert held(cache) == set()
    assert list((tmp_path / "cache" / "work").glob(".incoming/*")) == []


def test_a_full_disk_takes_cached_versions_before_it_refuses(make: Make) -> None:
    cache, elsewhere = make()
    with cache.reading(elsewhere.version(b"old"), elsewhere.fetch):
        pass
    cache, elsewhere = make(reserve_bytes=1 << 60)
    with pytest.raises(StorageFull):
        elsewhere.version(b"new")
    assert held(cache) == set()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StartupRefused, match=r"--store-cache .*/file/cache cannot be made"):
        VersionCache(tmp_path / "file" / "cache", 1)


def test_a_server_that_starts_again_downloads_nothing(tmp_path: Path) -> None:
    bucket = MemoryStore()
    first = Replica(bucket, tmp_path / "a")
    digest = first.upload("legal", 1).digest
    first.close()
    again = Replica(bucket, tmp_path / "a")
    assert again.generate("legal") == digest
    assert again.downloads() == []
    again.close()
