"""The object store itself: conditions, time limits and refusals, on memory and on an S3."""

import itertools
import os
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from obstore.store import LocalStore, MemoryStore

from server.adapters.format.content import WEIGHTS_FILE
from server.adapters.store import bucket as bucket_module
from server.adapters.store.bucket import Bucket, Missing, Occupied
from server.ground.errors import StartupRefused, StoreUnreachable
from tests.adapters.replicas import Replica
from tests.adapters.s3 import S3, s3_service, use

_numbers = itertools.count()


@pytest.fixture(scope="module")
def service() -> Iterator[S3]:
    with s3_service() as service:
        yield service


@pytest.fixture
def s3(service: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """An S3 that the environment leads to, its whims reset."""
    use(service, monkeypatch)
    yield service
    service.fail_next, service.denies, service.forgets_conditions = 0, False, False


@pytest.fixture
def url(s3: S3) -> str:
    """A new bucket's, with a prefix."""
    return f"s3://{s3.make_bucket(f'adapters-{next(_numbers)}')}/of/this team"


@pytest.fixture(params=["memory", "s3"])
def bucket(request: pytest.FixtureRequest) -> Bucket:
    return Bucket.open("memory://" if request.param == "memory" else request.getfixturevalue("url"))


def test_a_write_is_on_condition(bucket: Bucket) -> None:
    bucket.check()
    mark = bucket.create("names/a.json", b"1")
    with pytest.raises(Occupied):
        bucket.create("names/a.json", b"2")
    content, seen = bucket.read("names/a.json")
    assert content == b"1"
    bucket.swap("names/a.json", b"3", seen)
    for stale in (mark, seen):
        with pytest.raises(Occupied):
            bucket.swap("names/a.json", b"4", stale)
    bucket.remove(["names/a.json"])
    with pytest.raises(Occupied):
        bucket.swap("names/a.json", b"5", seen)


def test_what_is_listed_is_what_is_there_and_its_tag_tells_of_a_change(bucket: Bucket) -> None:
    assert list(bucket.list("names/")) == []
    bucket.create("names/a.json", b"1")
    bucket.create("namesake/b.json", b"1")
    (before,) = bucket.list("names/")
    bucket.swap("names/a.json", b"2", bucket.read("names/a.json")[1])
    (after,) = bucket.list("names/")
    assert before.path == after.path == "names/a.json"
    assert before.tag != after.tag


def test_what_is_not_there_is_missing_and_removed_already(bucket: Bucket) -> None:
    for ask in (lambda: bucket.read("none"), lambda: bucket.size("none"), lambda: list(bucket.pieces("none", 1))):
        with pytest.raises(Missing):
            ask()
    bucket.create("there", b"1")
    bucket.remove(["none", "there", "neither"])
    bucket.remove(["none"])
    bucket.remove([])
    assert list(bucket.list("")) == []


def test_a_large_file_goes_in_parts_and_comes_in_pieces(bucket: Bucket, tmp_path: Path) -> None:
    content = os.urandom(bucket_module._PART_BYTES + 1000)
    (tmp_path / "file").write_bytes(content)
    bucket.upload("large", tmp_path / "file")
    assert bucket.size("large") == len(content)
    pieces = list(bucket.pieces("large", len(content)))
    assert b"".join(pieces) == content
    assert [len(piece) for piece in pieces] == [bucket_module._PIECE_BYTES, 1000]


def test_a_busy_service_is_asked_again(s3: S3, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bucket_module._RETRIES, "retry_timeout", timedelta(seconds=120))
    bucket = Bucket.open(url)
    s3.fail_next = 2
    mark = bucket.create("names/a.json", b"1")
    s3.fail_next = 1
    bucket.swap("names/a.json", b"2", mark)
    s3.fail_next = 1
    assert bucket.read("names/a.json")[0] == b"2"
    assert s3.fail_next == 0


def test_one_that_stays_busy_is_given_up_with_a_sentence(s3: S3, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bucket_module._RETRIES, "max_retries", 1)
    s3.fail_next = 1000
    with pytest.raises(StartupRefused, match="does not answer as it should.*503"):
        Bucket.open(url).check()


def test_a_service_that_forgets_conditions_is_refused(s3: S3, url: str) -> None:
    s3.forgets_conditions = True
    with pytest.raises(StartupRefused, match="does not hold the conditions of a write"):
        Bucket.open(url).check()
    assert list(Bucket.open(url).list("")) == []


def test_one_that_knows_no_conditions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupRefused, match="does not hold the conditions of a write"):
        Bucket(LocalStore(tmp_path), "file:///somewhere").check()


def test_a_bucket_that_is_not_there_is_refused(s3: S3) -> None:
    with pytest.raises(StartupRefused, match="has no such bucket: create it, or correct --store"):
        Bucket.open("s3://nowhere/prefix").check()
    with pytest.raises(StoreUnreachable, match="has no such bucket"):
        list(Bucket.open("s3://nowhere/prefix").list(""))


def test_access_that_is_denied_is_refused(s3: S3, url: str) -> None:
    s3.denies = True
    with pytest.raises(StartupRefused, match="denies access: give the server credentials"):
        Bucket.open(url).check()
    with pytest.raises(StoreUnreachable, match="denies access"):
        list(Bucket.open(url).list(""))


def test_an_address_where_nobody_listens_is_refused(monkeypatch: pytest.MonkeyPatch, s3: S3, url: str) -> None:
    monkeypatch.setitem(bucket_module._RETRIES, "max_retries", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(StartupRefused, match="does not answer as it should"):
            Bucket.open(url).check()


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("ftp://host/x", "ftp:// cannot keep a store"),
        ("file:///srv/store", "file:// cannot keep a store. Use a folder"),
        ("https://host/x", "https:// cannot keep a store"),
        ("s3://", "write it as s3://bucket/prefix"),
        ("s3:///prefix", "write it as s3://bucket/prefix"),
        ("s3://bucket/x?versionId=1", "write it as s3://bucket/prefix"),
        ("s3://bucket/x#y", "write it as s3://bucket/prefix"),
        ("s3://[bucket/x", "is no URL"),
    ],
)
def test_what_cannot_be_a_store_is_refused(url: str, sentence: str) -> None:
    with pytest.raises(StartupRefused) as refused:
        Bucket.open(url)
    assert sentence in refused.value.message


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(StartupRefused) as refused:
        Bucket.open("s3://AKIA:hushhush@bucket/x")
    assert "hush" not in refused.value.message


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "obstore"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(StartupRefused, match=r"needs the package obstore: pip install 'graftserve\[objects\]'"):
        Bucket.open("s3://bucket/x")


def test_two_servers_on_an_s3(url: str, tmp_path: Path) -> None:
    first, second = (Replica(Bucket.open(url)._client, tmp_path / name) for name in "ab")
    old = first.upload("legal", 1).digest
    second.now_s += 60
    assert second.generate("legal") == old
    assert (second.store.folder(old) / WEIGHTS_FILE).is_file()
    new = second.upload("legal", 2, replace=True).digest
    first.registry.refresh()
    assert first.generate("legal") == new
    first.registry.roll_back("legal")
    second.registry.refresh()
    assert second.registry.describe("legal").versions == (new, old)
    first.registry.delete("legal")
    second.registry.refresh()
    assert second.names() == []
    for replica in (first, second):
        replica.close()


def test_memory_is_each_servers_own() -> None:
    Bucket.open("memory://").create("a", b"1")
    assert list(Bucket.open("memory:///anything").list("")) == []
    assert list(Bucket(MemoryStore(), "memory://").list("")) == []
