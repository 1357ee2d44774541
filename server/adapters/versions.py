"""The versions in the store: registering, rolling back, pruning and deleting them, each with the catalog's note of it.

Owns the step from an upload to what a name means. Knows nothing about the device, or how files are kept.
"""

import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

from server.adapters.adapter_info import Provenance
from server.adapters.asker import current_asker
from server.adapters.books import Books
from server.adapters.catalog import AdapterVersion, Copy, Facts, Sizes
from server.adapters.format.manifest import check_manifest
from server.adapters.holdings import Coming, check_room
from server.adapters.host_adapter import HostAdapter
from server.adapters.lease import Leases
from server.adapters.loader import Loader, log_doubts
from server.adapters.served_base import BaseClaim, agreed_fingerprint
from server.adapters.store.adapter_store import AdapterStore, Discarded
from server.adapters.store.folder_store import (
    Incoming,
    Record,
    StoredName,
    StoredVersion,
    base_fingerprint_of,
    base_model_of,
    check_name,
)
from server.adapters.workers import Workers
from server.ground.errors import AdapterNotFound, Conflict, GraftError

_log = logging.getLogger(__name__)


class Change(NamedTuple):
    """What an upload came to."""

    copy: Copy  # that the name means now
    is_new: bool  # whether it meant another content before, or none
    replaced: str | None = None  # the digest of that other


class Versions:
    """The catalog's side of the store. What blocks here is for worker threads."""

    def __init__(
        self,
        books: Books,
        workers: Workers,
        store: AdapterStore,
        loader: Loader,
        leases: Leases,
        max_versions: int | None,
    ) -> None:
        """Lists what the store has. Of a replaced name the last `max_versions` are kept; all if None."""
        self._books = books
        self._workers = workers
        self._store = store
        self._loader = loader
        self._leases = leases
        self._max_versions = max_versions
        self._followed: dict[str, StoredName] = {}
        self._warned: set[StoredName] = set()
        self.num_changes = 0  # of the store, made here; under `changes`
        self.follow(store.scan())

    def follow(self, names: Sequence[StoredName]) -> list[Copy]:
        """Under `changes`: has the catalog say what the store says; those returned are to be disposed.

        Versions that are gone stay for those who lease them, on the host, since they cannot be read again.
        """
        with self._books.lock:
            catalog, stored = self._books.catalog, {entry.name: entry for entry in names}
            mine = [name for name, entry in catalog.entries.items() if entry.current.found is None]
            gone = [copy for name in mine if name not in stored for copy in catalog.remove(name)]
            followed = {}
            for name, entry in stored.items():
                if name in catalog.entries and catalog.entries[name].current.found is not None:
                    self._warn_taken(entry)
                    continue
                followed[name] = entry
                if self._followed.get(name) is not entry:
                    gone += self._relist(entry)
            self._followed = followed
            return self._let_go(gone)

    def _let_go(self, gone: Sequence[Copy]) -> list[Copy]:
        """Under the lock, of copies that were taken out: those that nobody leases, to be disposed."""
        for copy in gone:
            self._loader.settle(copy.content)
        return [copy for copy in gone if self._books.catalog.let_go_if_over(copy)]

    def _relist(self, stored: StoredName) -> list[Copy]:
        """Lists a name as it is in the store; the copies that it has no longer."""
        catalog, kept = self._books.catalog, {version.digest: version for version in stored.versions}
        gone = self._take_out_anothers(kept[stored.current])
        for version in stored.versions:
            self._list(version)
        catalog.make_current(catalog.entries[stored.name].copies[stored.current])
        older = [copy for digest, copy in catalog.entries[stored.name].copies.items() if digest not in kept]
        for copy in older:
            catalog.remove_version(copy)
        return gone + older

    def _take_out_anothers(self, current: StoredVersion) -> list[Copy]:
        """Takes a name out that has another owner now; its copies. What was deleted and what came then share none."""
        catalog = self._books.catalog
        entry = catalog.entries.get(current.name)
        is_anothers = entry is not None and entry.current.owner != current.record.owner
        return list(catalog.remove(current.name)) if is_anothers else []

    def _warn_taken(self, stored: StoredName) -> None:
        if stored not in self._warned:
            self._warned.add(stored)
            _log.warning("The adapter %s of the store is left out: a folder is served under its name.", stored.name)

    def register(
        self,
        incoming: Incoming,
        name: str,
        *,
        replace: bool,
        base_fingerprint: str | None,
        provenance: Provenance | None,
    ) -> Change:
        """`Registry.register`."""
        check_name(name)
        with self._books.lock:
            self._books.catalog.owner_for(name)  # before anything is told of what the name means
        digest = incoming.digest()
        check_manifest(incoming.folder)
        stated = agreed_fingerprint(base_fingerprint, base_fingerprint_of(incoming.folder))
        claim = BaseClaim(base_model_of(incoming.folder), stated)
        self._books.check_base(self._books.base.doubts(claim))
        with self._books.lock:
            if self._is_current(name, digest, replace=replace) and not self._is_news(name, claim):
                return Change(self._books.catalog.entries[name].current, is_new=False)
            self._check_room(Coming(incoming.num_bytes, name, digest))
            lowering = self._workers.submit(self._loader.lower, incoming.folder)  # so that uploads are bounded too
        try:
            adapter, sizes = self._loader.put(digest, lowering.result())
            with self._store.staged(incoming, name, replace=replace):
                return self._commit(incoming, name, self._record(adapter, claim, provenance), sizes, replace)
        finally:
            with self._books.lock:
                self._loader.drop_if_orphan(digest)

    def roll_back(self, name: str, prefix: str | None) -> tuple[Copy, AdapterVersion]:
        """`Registry.roll_back`; the copy that the name means now, and the version that it meant before."""
        with self._leases.hold(self._earlier(name, prefix)) as lease:
            copy = lease.copy
            assert copy is not None
            with self._books.eased:
                self._loader.await_end(copy)  # what cannot be served does not become current
            with self._books.changes:
                with self._books.lock:
                    if not copy.is_listed:
                        raise AdapterNotFound(f"{copy.version} was deleted meanwhile.", param="adapter")
                    before = self._books.catalog.entries[name].current.version
                self.num_changes += 1
                self._store.make_current(name, copy.version.digest)
                with self._books.lock:
                    self._books.catalog.make_current(copy)
            return copy, before

    def _earlier(self, name: str, prefix: str | None) -> str:
        """The version to go back to, as `name@version`."""
        with self._books.lock:
            entry = self._books.catalog.seen_entry(name)
            if entry is not None:
                current_asker().check_owns(name, entry.current.owner)
                self._books.catalog.check_not_in_place(name)
                if prefix is not None:
                    return f"{name}@{prefix}"
                digests = list(entry.copies)
        if entry is None:
            raise self._books.unknown(name)
        if len(digests) < 2:
            raise Conflict(
                f"The adapter {name!r} has no earlier version to go back to: its one version is {digests[0][:12]}.",
                param="adapter",
            )
        return f"{name}@{digests[-2]}"

    def delete(self, name: str) -> tuple[str, ...]:
        """`Registry.delete`; the digests of the versions that the name had."""
        with self._books.changes:
            self._check_is_stored(name)
            self.num_changes += 1
            discarded = self._discard(name)
            with self._books.lock:
                over = []
                removed = self._books.catalog.remove(name)
                for copy in removed:
                    copy.discarded = discarded.pop(copy.version.digest, None)
                    copy.folder = copy.discarded.folder if copy.discarded is not None else copy.folder
                    self._loader.settle(copy.content)
                    if self._books.catalog.let_go_if_over(copy):
                        over.append(copy)
        for copy in over:
            self._leases.dispose(copy)
        for unknown in discarded.values():  # put there by another process
            unknown.remove()
        return tuple(copy.version.digest for copy in removed)

    def check_room(self, coming: Coming) -> None:
        """`Registry.check_room`, as far as this server has looked."""
        with self._books.lock:
            self._check_room(coming)

    def _check_room(self, coming: Coming) -> None:
        check_room(self._books.catalog, coming, self._max_versions)

    def _commit(self, incoming: Incoming, name: str, record: Record, sizes: Sizes, replace: bool) -> Change:
        with self._books.changes:
            with self._books.lock:
                self._books.catalog.owner_for(name)
                self._books.catalog.check_not_in_place(name)
                self._check_room(Coming(incoming.num_bytes, name, incoming.digest()))
                before = self._books.catalog.entries.get(name)
                replaced = before.current.version.digest if before is not None else None
            self.num_changes += 1
            stored, created = self._store.put(incoming, name, record, replace=replace)
            with self._books.lock:
                over = self._let_go(self._take_out_anothers(stored))
                copy = self._list(stored)
                copy.content.sizes = sizes
            over += self._prune(name)
        for old in over:
            self._leases.dispose(old)
        log_doubts(copy)
        return Change(copy, created, replaced if created else None)

    def _record(self, adapter: HostAdapter, claim: BaseClaim, provenance: Provenance | None) -> Record:
        return Record(
            created=int(time.time()),
            method=adapter.method,
            rank=adapter.rank,
            num_parameters=adapter.num_parameters,
            num_sites=len(adapter.edits),
            base_model=claim.name,
            base_fingerprint=claim.fingerprint,
            checked_name=next(iter(self._books.base.names), None),
            checked_fingerprint=self._books.base.fingerprint,
            warnings=adapter.warnings,
            source=provenance.source if provenance is not None else None,
            source_revision=provenance.revision if provenance is not None else None,
        )

    def _prune(self, name: str) -> list[Copy]:
        """Under `changes`: takes the versions out that are older than those to keep; those returned are to be disposed.

        A leased one stays until a later replacement finds it idle: who leases it may ask for it again by its version.
        So does a pinned one, until it is unpinned.
        """
        with self._books.lock:
            older = self._books.catalog.to_prune(name, self._max_versions)
        pruned = []
        for copy in older:
            try:
                discarded = self._store.discard_version(name, copy.version.digest)
            except GraftError as error:  # the upload is done: what cannot be removed now is tried again with the next
                _log.warning("The old version %s is not removed: %s", copy.version, error.message)
                continue
            with self._books.lock:  # a lease may have begun meanwhile: then it ends as one on a deleted name does
                self._books.catalog.remove_version(copy)
                copy.discarded, copy.folder = discarded, discarded.folder
                self._loader.settle(copy.content)
                if self._books.catalog.let_go_if_over(copy):
                    pruned.append(copy)
        return pruned

    def _is_news(self, name: str, claim: BaseClaim) -> bool:
        """Whether this upload says another thing about the base than the record, or mends files that do not load."""
        copy = self._books.catalog.entries[name].current
        said = claim.fingerprint or copy.base_fingerprint
        return said != copy.base_fingerprint or bool(copy.doubts) or copy.content.failure is not None

    def _is_current(self, name: str, digest: str, *, replace: bool) -> bool:
        """Whether the name means this content now. Raises the Conflict that committing would raise, before the work."""
        self._workers.check_open()
        self._books.catalog.owner_for(name)  # again: a look at a shared store may have come in between
        self._books.catalog.check_not_in_place(name)
        entry = self._books.catalog.entries.get(name)
        if entry is None or entry.current.version.digest == digest:
            return entry is not None
        if not replace:
            raise Conflict(
                f"The adapter {name!r} exists with other content (version {entry.current.version.short}): choose "
                f"another name, or send replace=true to make this its new version.",
                param="name",
            )
        return False

    def _check_is_stored(self, name: str) -> None:
        with self._books.lock:
            entry = self._books.catalog.seen_entry(name)
            if entry is not None:
                current_asker().check_owns(name, entry.current.owner)
                self._books.catalog.check_not_in_place(name)
        if entry is None:
            raise AdapterNotFound(f"There is no adapter {name[:80]!r}.", param="adapter")

    def _discard(self, name: str) -> dict[str, Discarded]:
        try:
            return {version.digest: version for version in self._store.discard(name)}
        except AdapterNotFound:  # its folder is gone already; what is left of it is our note
            return {}

    def _list(self, stored: StoredVersion) -> Copy:
        """The copy of a stored version, made the current one of its name."""
        record, catalog = stored.record, self._books.catalog
        base_fingerprint = record.base_fingerprint or record.checked_fingerprint
        doubts = self._books.base.doubts(claim_of(record))
        entry = catalog.entries.get(stored.name)
        if entry is not None and stored.digest in entry.copies:
            known = entry.copies[stored.digest]
            known.base_fingerprint, known.doubts = base_fingerprint, doubts
            catalog.make_current(known)
            return known
        content = catalog.content(stored.digest)
        content.facts = content.facts or _recorded_facts(record)
        copy = Copy(
            version=AdapterVersion(stored.name, stored.digest),
            content=content,
            folder=stored.folder,
            created=record.created,
            content_bytes=record.content_bytes,
            base_model=record.base_model,
            base_fingerprint=base_fingerprint,
            doubts=doubts,
            provenance=Provenance(record.source, record.source_revision) if record.source is not None else None,
            owner=record.owner,
        )
        catalog.add(copy)
        self._loader.settle(content)
        return copy


def claim_of(record: Record) -> BaseClaim:
    """What a stored version says about its base."""
    return BaseClaim(record.base_model, record.base_fingerprint, record.checked_name, record.checked_fingerprint)


def _recorded_facts(record: Record) -> Facts | None:
    if record.method is None or record.rank is None or record.num_parameters is None or record.num_sites is None:
        return None
    return Facts(record.method, record.rank, record.num_parameters, record.num_sites, record.warnings)
