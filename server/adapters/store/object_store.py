"""The store tier in an object store: adapters that several servers share, without locks.

Owns the layout of the objects, the order in which they are written and removed, and what a crash may leave. Knows
nothing about tensors, methods or who uses an adapter; no torch.

    names/<name>.json                          the name's index (`object_index`): its versions, the current one last
    versions/<name>/<digest>/<upload>/<file>   the files of one version, as one upload brought them; written once
    probe/<random>                             there for a moment while a server starts

A change is one conditional write of an index: create where there was none, else a swap of the one that was read. So of
two servers that change a name at once one wins, and the other looks again and goes on from there. Whether who asks may
change it is decided by the owner in the index that was read, so that no other server can come in between. No two
uploads share an object, so nothing that an index lists is ever overwritten, and removing what one upload brought takes
nothing from another. Files are written before the index that lists them and removed after the one that no longer does;
what a crash leaves in between is garbage, which `object_garbage` removes when it is old. A deleted name keeps an empty
index: removing an object has no condition, and could take away an index that another server has just written.
"""

import dataclasses
import itertools
import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from server.adapters.asker import current_asker
from server.adapters.naming import label
from server.adapters.store.bucket import Bucket, Mark, Missing, Occupied
from server.adapters.store.folder_store import (
    Incoming,
    Record,
    StoredName,
    StoredVersion,
    check_name,
    is_valid_name,
    taken,
)
from server.adapters.store.object_index import BrokenIndex, ObjectIndex, ObjectVersion, index_from
from server.adapters.store.version_cache import VersionCache
from server.ground.errors import AdapterNotFound, AdapterRejected, Conflict, GraftError, Overloaded, StoreUnreachable

NAMES, VERSIONS = "names/", "versions/"
MAX_UPLOAD_S = 6 * 3600.0  # from an upload's first object to its index; far below the age at which garbage is removed
_MAX_TRIES = 20  # of one change; each loses to a change of the same name that has succeeded
_RETRY_S = 0.05  # at most, before the second try; then ever longer
_NUM_READERS = 16  # of indexes at once

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Known:
    """The index of a name as it was last seen, and the name as others see it."""

    tag: str
    index: ObjectIndex
    stored: StoredName | None  # None for a name that was deleted


@dataclass(slots=True)
class _Upload:
    """Files on their way: the objects are there, and no index lists them yet."""

    key: str  # 32 hex digits
    begun_s: float
    is_decided: bool = False  # whether an index may list them: then they are not this upload's to remove


class _Discarded:
    """A version that no index lists any more; its objects stay until removed."""

    def __init__(self, store: "ObjectStore", name: str, version: ObjectVersion) -> None:
        self.digest = version.digest
        self.folder = store.folder(version.digest)
        self._remove: Callable[[], None] | None = lambda: store.forget(name, version)

    def remove(self) -> None:
        remove, self._remove = self._remove, None
        if remove is not None:
            remove()


class ObjectStore:
    """Adapters below one prefix of a bucket. Safe for many threads, processes and machines."""

    root = None
    is_shared = True

    def __init__(self, bucket: Bucket, cache: VersionCache) -> None:
        """`cache` is where versions lie on this machine while they are read. Asks the bucket for nothing."""
        self.bucket = bucket
        self._cache = cache
        self._is_closed = threading.Event()
        self._scanning = threading.Lock()
        self._lock = threading.Lock()
        self._known: dict[str, _Known] = {}
        self._broken: dict[str, tuple[str, str]] = {}  # by name, the index's tag and what is wrong with it
        self._discarded: dict[str, list[tuple[str, ObjectVersion]]] = {}  # by digest
        self._uploads: dict[Incoming, _Upload] = {}

    @property
    def location(self) -> str:
        return self.bucket.url

    def folder(self, digest: str) -> Path:
        """Where the files of a version are during `reading`."""
        return self._cache.folder(digest)

    def close(self) -> None:
        self._is_closed.set()

    # Reading

    def scan(self) -> tuple[StoredName, ...]:
        """Every name that is whole, by name: one request for each thousand names, and one for each changed index."""
        with self._scanning:
            listed = {
                name: entry.tag for entry in self.bucket.list(NAMES) if (name := _name_in(entry.path)) is not None
            }
            with self._lock:
                seen = {name: known.tag for name, known in self._known.items()}
                seen |= {name: tag for name, (tag, _) in self._broken.items()}
            self._look_at({name: tag for name, tag in listed.items() if tag != seen.get(name)})
            with self._lock:
                for name in seen.keys() - listed.keys():  # removed by hand
                    self._known.pop(name, None)
                    self._broken.pop(name, None)
                known = [self._known[name] for name in sorted(self._known)]
        return tuple(entry.stored for entry in known if entry.stored is not None)

    def broken(self) -> dict[str, tuple[str, str]]:
        """Of the names that the last scan has left out, the index and what is wrong with it."""
        with self._lock:
            reasons = {name: reason for name, (_, reason) in self._broken.items()}
        return {
            name: (f"{self.location}/{_index_path(name)}", f"The index of {name!r} is broken: {reason}.")
            for name, reason in reasons.items()
        }

    def versions(self, name: str) -> tuple[StoredVersion, ...]:
        """The versions of a name, the current one last, as they are now. Raises AdapterNotFound."""
        index = self._index(name)[0] if is_valid_name(name) else ObjectIndex()
        _require(index, name)
        return self._stored_versions(name, index)

    def reading(self, folder: Path) -> AbstractContextManager[None]:
        """See `AdapterStore`. Fetches what is not on this machine."""
        digest = self._cache.digest_of(folder)
        return nullcontext() if digest is None else self._cache.reading(digest, self._fetch)

    # Writing

    def incoming(self, *, max_bytes: int | None = None) -> Incoming:
        return self._cache.incoming(max_bytes=max_bytes)

    @contextmanager
    def staged(self, incoming: Incoming, name: str, *, replace: bool) -> Iterator[None]:
        """Around `put`: writes the files' objects, and removes them again if no index came to list them."""
        check_name(name)
        digest = incoming.digest()
        _check_free(self._index(name)[0], name, digest, replace)  # before anything is sent
        upload = _Upload(secrets.token_hex(16), time.monotonic())
        try:
            for filename in incoming.files:
                self.bucket.upload(_path(name, digest, upload.key, filename), incoming.folder / filename)
            with self._lock:
                self._uploads[incoming] = upload
            yield
        finally:
            with self._lock:
                self._uploads.pop(incoming, None)
            if not upload.is_decided:
                self._remove([_path(name, digest, upload.key, filename) for filename in incoming.files])

    def put(self, incoming: Incoming, name: str, record: Record, *, replace: bool) -> tuple[StoredVersion, bool]:
        """See `AdapterStore`. Content that is there already is listed with the files that have come now."""
        with self._lock:
            upload = self._uploads.get(incoming)
        if upload is None:
            with self.staged(incoming, name, replace=replace):
                return self.put(incoming, name, record, replace=replace)
        if time.monotonic() - upload.begun_s > MAX_UPLOAD_S:
            raise StoreUnreachable(
                f"The upload to {self.location} took more than {MAX_UPLOAD_S / 3600:g} hours: try again."
            )
        record = dataclasses.replace(record, content_bytes=incoming.num_bytes)
        version = ObjectVersion(incoming.digest(), upload.key, dict(incoming.files), record)
        before, after = self._change(name, lambda index: _listing(index, name, version, replace), upload)
        current, old = before.current, before.find(version.digest)
        is_written_before = old is not None and old.upload == version.upload
        created = is_written_before or current is None or current.digest != version.digest
        if old is not None and not is_written_before:
            self._remove(_paths(name, old))
        with suppress(OSError):  # then it is fetched when it is read
            self._cache.adopt(version.digest, incoming)
        incoming.discard()
        return self._stored(name, _find(after, name, version.digest)), created

    def make_current(self, name: str, digest: str) -> None:
        self._change(name, lambda index: _promoted(index, name, digest))

    def discard(self, name: str) -> tuple[_Discarded, ...]:
        before, _ = self._change(name, lambda index: _emptied(index, name))
        return tuple(self._discard(name, version) for version in before.versions)

    def discard_version(self, name: str, digest: str) -> _Discarded:
        before, _ = self._change(name, lambda index: _without(index, name, digest))
        return self._discard(name, _find(before, name, digest))

    def delete(self, name: str) -> None:
        for version in self.discard(name):
            version.remove()

    def forget(self, name: str, version: ObjectVersion) -> None:
        """Removes the objects of a version that no index lists any more."""
        with self._lock:
            places = self._discarded.get(version.digest, [])
            self._discarded[version.digest] = [place for place in places if place != (name, version)]
            if not self._discarded[version.digest]:
                del self._discarded[version.digest]
        self._remove(_paths(name, version))

    def uploads_in_use(self, name: str) -> set[str]:
        """The uploads whose objects an index lists now, or that are still read here. Raises BrokenIndex."""
        index, _ = self._read(name)
        with self._lock:
            discarded = [place for places in self._discarded.values() for place in places]
        listed = {version.upload for version in index.versions}
        return listed | {version.upload for owner, version in discarded if owner == name}

    # A change of an index

    def _change(
        self, name: str, alter: Callable[[ObjectIndex], ObjectIndex], upload: _Upload | None = None
    ) -> tuple[ObjectIndex, ObjectIndex]:
        """The index before a change and after it. Raises what `alter` raises, and Conflict if others never let up."""
        for attempt in itertools.count():
            before, mark = self._index(name)
            if upload is not None:
                upload.is_decided = any(version.upload == upload.key for version in before.versions)
                if upload.is_decided:
                    return before, before  # it was written, and the answer lost
            after = alter(before)
            if after == before:
                return before, after
            if attempt == _MAX_TRIES:
                break
            if upload is not None:
                upload.is_decided = True  # from here on, until an index is read that does not list it
            with suppress(Occupied):
                self._write(name, after, mark)
                return before, after
            time.sleep(random.uniform(0, _RETRY_S * (attempt + 1)))
        raise Conflict(f"The adapter {name!r} is being changed by other servers all the time: try again.", param="name")

    def _write(self, name: str, index: ObjectIndex, mark: Mark | None) -> None:
        path, content = _index_path(name), index.to_bytes()
        if mark is None:
            self.bucket.create(path, content)
        else:
            self.bucket.swap(path, content, mark)
        self._forget_tag(name)

    def _index(self, name: str) -> tuple[ObjectIndex, Mark | None]:
        """The index of a name as it is now, empty where there is none. Raises Conflict for one that cannot be read."""
        try:
            return self._read(name)
        except BrokenIndex as broken:
            raise Conflict(
                f"The index of {name!r} in {self.location} is no index of this store ({broken}): remove the object "
                f"{_index_path(name)}, or choose another name.",
                param="name",
            ) from broken

    def _read(self, name: str) -> tuple[ObjectIndex, Mark | None]:
        try:
            content, mark = self.bucket.read(_index_path(name))
        except Missing:
            return ObjectIndex(), None
        return index_from(content), mark

    # What is known of the bucket

    def _look_at(self, tags: dict[str, str]) -> None:
        if tags:
            with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="adapter-index") as readers:
                list(readers.map(self._look, tags.keys(), tags.values()))

    def _look(self, name: str, tag: str) -> None:
        """Reads an index that a listing shows to have changed. One that is broken is left out, and logged once."""
        try:
            index, _ = self._read(name)
        except BrokenIndex as broken:
            _log.warning("The adapter %s of %s is left out: %s", name, self.location, broken)
            with self._lock:
                self._known.pop(name, None)
                self._broken[name] = tag, str(broken)
            return
        versions = self._stored_versions(name, index)
        stored = StoredName(name, versions[-1].digest, versions) if versions else None
        with self._lock:
            self._broken.pop(name, None)
            self._known[name] = _Known(tag, index, stored)

    def _forget_tag(self, name: str) -> None:
        """After a change made here: the next look reads the index anew."""
        with self._lock:
            known = self._known.get(name)
            if known is not None:
                self._known[name] = dataclasses.replace(known, tag="")

    def _stored_versions(self, name: str, index: ObjectIndex) -> tuple[StoredVersion, ...]:
        return tuple(self._stored(name, version) for version in index.versions)

    def _stored(self, name: str, version: ObjectVersion) -> StoredVersion:
        return StoredVersion(name, version.digest, self.folder(version.digest), version.record)

    def _discard(self, name: str, version: ObjectVersion) -> _Discarded:
        with self._lock:
            self._discarded.setdefault(version.digest, []).append((name, version))
        return _Discarded(self, name, version)

    def _remove(self, paths: list[str]) -> None:
        """Removes objects that nothing lists; what stays is garbage."""
        try:
            self.bucket.remove(paths)
        except StoreUnreachable as error:
            _log.warning("Objects of %s are left to a later clearing: %s", self.location, error.message)

    # Downloads

    def _fetch(self, digest: str) -> Incoming:
        """The files of a version, from whichever name has it whole."""
        failure: GraftError = AdapterNotFound("The adapter was deleted before it was loaded.", param="adapter")
        tried: set[str] = set()
        for name, version in itertools.chain(self._places(digest), self._places_now(digest)):
            if version.upload in tried:
                continue
            tried.add(version.upload)
            try:
                return self._download(name, version)
            except AdapterRejected as damaged:
                failure = damaged
        raise failure

    def _places(self, digest: str) -> list[tuple[str, ObjectVersion]]:
        with self._lock:
            known = [(name, known.index.find(digest)) for name, known in self._known.items()]
            return [(name, version) for name, version in known if version] + self._discarded.get(digest, [])

    def _places_now(self, digest: str) -> Iterator[tuple[str, ObjectVersion]]:
        """Looked up when those known have failed: another server may have brought the files anew."""
        self.scan()
        yield from self._places(digest)

    def _download(self, name: str, version: ObjectVersion) -> Incoming:
        """Raises AdapterRejected, with the file's name, where one is missing or is not what was stored."""
        incoming = self._cache.incoming(max_bytes=version.content_bytes)
        try:
            incoming.expect(version.content_bytes)
            for filename, expected in version.files.items():
                path = _path(name, version.digest, version.upload, filename)
                try:
                    is_whole = self.bucket.size(path) == expected.num_bytes
                    if is_whole:
                        with incoming.open_file(filename) as file:
                            for piece in self.bucket.pieces(path, expected.num_bytes):
                                self._check_open()
                                file.write(piece)
                except Missing:
                    raise self._damaged(version.digest, path, "is missing") from None
                if not is_whole or incoming.files[filename] != expected:
                    raise self._damaged(version.digest, path, "is not what was stored")
        except BaseException:
            incoming.discard()
            raise
        return incoming

    def _check_open(self) -> None:
        if self._is_closed.is_set():
            raise Overloaded("The server is shutting down.")

    def _damaged(self, digest: str, path: str, what: str) -> AdapterRejected:
        """What is told of it; the object, whose path has a name that may be another owner's, is for the log."""
        _log.warning("The object %s/%s %s.", self.location, path, what)
        filename = path.rpartition("/")[2]
        return AdapterRejected(
            f"The {filename} of {label(digest)} in the store {what}: delete the adapter, and upload it again.",
            param="adapter",
        )


def _index_path(name: str) -> str:
    return f"{NAMES}{name}.json"


def _name_in(path: str) -> str | None:
    """The name whose index this is; None for what is none."""
    name = path.removeprefix(NAMES).removesuffix(".json")
    return name if is_valid_name(name) and path == _index_path(name) else None


def _path(name: str, digest: str, upload: str, filename: str) -> str:
    return f"{VERSIONS}{name}/{digest}/{upload}/{filename}"


def _paths(name: str, version: ObjectVersion) -> list[str]:
    return [_path(name, version.digest, version.upload, filename) for filename in version.files]


# The changes of an index


def _listing(index: ObjectIndex, name: str, version: ObjectVersion, replace: bool) -> ObjectIndex:
    owner = _check_free(index, name, version.digest, replace)
    known, record = index.find(version.digest), version.record
    if known is not None:
        record = known.record.with_base_of(record)
    return index.with_current(dataclasses.replace(version, record=dataclasses.replace(record, owner=owner)))


def _check_free(index: ObjectIndex, name: str, digest: str, replace: bool) -> str | None:
    """Whose a new version is. Raises Conflict where the name is another owner's, or means other content and that is not
    to be replaced."""
    current = index.current
    owner = current_asker().owner_for(
        name, current.record.owner if current is not None else None, exists=current is not None
    )
    if current is not None and current.digest != digest and not replace:
        raise taken(name, current.digest)
    return owner


def _promoted(index: ObjectIndex, name: str, digest: str) -> ObjectIndex:
    _check_may_change(index, name)
    return index.with_current(_find(index, name, digest))


def _emptied(index: ObjectIndex, name: str) -> ObjectIndex:
    _check_may_change(index, name)
    return ObjectIndex()


def _without(index: ObjectIndex, name: str, digest: str) -> ObjectIndex:
    _check_may_change(index, name)
    if _find(index, name, digest) == index.current:
        raise Conflict(
            f"{digest[:12]} is the current version of {name!r}: delete the name, or replace it first.", param="adapter"
        )
    return index.without(digest)


def _find(index: ObjectIndex, name: str, digest: str) -> ObjectVersion:
    _require(index, name)
    version = index.find(digest)
    if version is None:
        raise AdapterNotFound(f"The adapter {name!r} has no version {digest[:12]!r} in the store.", param="adapter")
    return version


def _check_may_change(index: ObjectIndex, name: str) -> None:
    """Raises what is raised for a name that there is not where it is another owner's now."""
    current_asker().check_may_change(name, _require(index, name).record.owner)


def _require(index: ObjectIndex, name: str) -> ObjectVersion:
    if index.current is None:
        raise AdapterNotFound(f"The store has no adapter {name!r}.", param="adapter")
    return index.current
