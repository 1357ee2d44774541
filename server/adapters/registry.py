"""The registry: every verb on adapters, in one place. With the parts below, the only files that know all tiers.

Owns the wiring of its parts and what is told of them. Knows nothing about HTTP, batches, methods or how a tier keeps
its bytes.

    books      the catalog and the locks              loader      store -> host
    lease      requests' holds on versions            residency   host -> device, eviction, the end of contents
    versions   register, roll back, prune, delete     in_place    folders that are read where they lie
    holdings   what an owner has, and may have
    custody    load, unload, pin and unpin by hand    elsewhere   what other servers change in a shared store
    naming     failures in the words of who asks
    eviction   who leaves a tier first                workers     the threads
    quarantine contents that fail again and again
"""

import logging
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from server.adapters.adapter_info import AdapterInfo, Loaded, Provenance, Registered, RegistryStats
from server.adapters.asker import current_asker
from server.adapters.audit import noted
from server.adapters.books import Books
from server.adapters.catalog import AdapterVersion, Copy, Portion
from server.adapters.custody import Custody, Unloaded
from server.adapters.elsewhere import Elsewhere
from server.adapters.holdings import Coming
from server.adapters.host import HostTier
from server.adapters.in_place import InPlace
from server.adapters.lease import Lease, Leases
from server.adapters.loader import FAILURE_MEMORY_S, Load, Loader, ObserveLoad
from server.adapters.on_tiers import on_tiers
from server.adapters.positions import Reach
from server.adapters.quarantine import Quarantine
from server.adapters.residency import Residency
from server.adapters.room import Device
from server.adapters.served_base import ServedBase
from server.adapters.sources import Source
from server.adapters.store.adapter_store import AdapterStore
from server.adapters.store.folder_store import Incoming
from server.adapters.tally import tally_of
from server.adapters.versions import Versions, claim_of
from server.adapters.workers import Workers
from server.ground.adapter_series import AdapterState
from server.ground.errors import GraftError, StorageFull

__all__ = [
    "FAILURE_MEMORY_S", "MAX_WAIT_S", "NUM_COPIERS", "AdapterInfo", "Device", "Lease", "Loaded", "Portion",
    "Registered", "Registry",
    "RegistryStats", "Unloaded", "claim_of",
]  # fmt: skip

NUM_COPIERS = 2  # adapters on their way to the device at once: a small one does not wait for a large one
MAX_WAIT_S = 300.0  # for running sequences, where nobody says
_MAX_NAMED = 20  # in one line of the log

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Registry:
    """All adapters of a server. Safe for many threads."""

    def __init__(
        self,
        store: AdapterStore,
        sources: Sequence[Source],
        host: HostTier,
        device: Device,
        load: Load,
        num_loaders: int = 2,
        *,
        base: ServedBase | None = None,
        max_versions: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        observe: ObserveLoad = lambda transition, duration_s: None,
    ) -> None:
        """`load` reads and lowers an adapter folder, in any thread; its GraftErrors are shown to users.

        `base` is what adapters are compared with; without it none is taken for another base's. Of a name that is
        replaced the last `max_versions` versions are kept, the current one counted; all if None. `observe` is told of
        each adapter that was brought to host or device.

        Raises StartupRefused if a folder is given a name that the store has.
        """
        self._host = host
        self._device = device
        self._load = load
        self._books = books = Books(base or ServedBase())
        self._workers = workers = Workers(books.lock, num_loaders)
        # Looked up at each load, so that who watches the loads (a test) can stand in between.
        self._loader = loader = Loader(
            books, workers, host, device, lambda *asked: self._load(*asked), clock, store.reading, observe
        )
        self._copiers = copiers = Workers(books.lock, NUM_COPIERS)
        self._residency = Residency(books, workers, copiers, loader, host, device, observe)
        self._quarantine = Quarantine(books, clock)
        self._leases = Leases(books, workers, loader, self._residency, self._quarantine)
        self._custody = Custody(books, workers, host, device, loader, self._residency, self._leases)
        self._versions = Versions(books, workers, store, loader, self._leases, max_versions)
        self._elsewhere = Elsewhere(books, store, self._versions, self._leases, clock)
        self.max_versions = max_versions
        self._in_place = InPlace(books, sources, loader, self._leases)
        self._in_place.refuse_taken_names(store.location)
        self.rescan()
        self._tell_refused()

    # Requests: leases

    def lease(self, spec: str) -> Lease:
        """A hold on the version that `name` or `name@version-prefix` means; starts to load it if it is cold.

        Raises AdapterNotFound, BadRequest for a prefix that is no prefix or is ambiguous, AdapterRejected for an
        adapter of another base where the server is strict, and what its load raised if that failed within the last
        FAILURE_MEMORY_S. Never blocks.
        """
        return self._prefetched(self._leases.lease(spec))

    def lease_mix(self, parts: Sequence[tuple[str, float]]) -> Lease | None:
        """As `lease`, on the sum of several adapters' changes of the base's outputs, each times its (finite) weight.

        A part of weight 0 is left out, and has to exist; None is the bare base, if nothing is left. Equal mixes are one
        adapter to the tiers, which keep it beyond its last request as they keep others; it has no name.

        Raises what `lease` raises, for any of them, and BadRequest for a content that comes twice. A sum that cannot be
        is refused when it is loaded: by `admit`, and by the next lease.
        """
        lease = self._leases.lease_mix(parts)
        return None if lease is None else self._prefetched(lease)

    def _prefetched(self, lease: Lease) -> Lease:
        self._residency.prefetch(lease.version)
        return lease

    def hold(self, spec: str) -> Lease:
        """A lease for who reads the version's files: it brings them to no tier and counts as no use of the adapter."""
        return self._leases.hold(spec, starts_load=False)

    def read(self, lease: Lease, read: Callable[[Path], _T]) -> _T:
        """What `read` makes of the folder of a leased version; called again if a deletion moves the folder meanwhile.

        `read` raises a GraftError where the folder cannot be read. Raises that, and Overloaded where a folder that is
        read in place changed meanwhile. Blocks: for a worker thread.
        """
        try:
            return self._loader.read(lease.content, read)
        except GraftError as error:
            raise lease.told(error) from error

    # The engine: residency

    def admit(self, version: AdapterVersion) -> int | None:
        """Its slot, and one residency hold on it, if it is on the device or can be put there at once.

        None while it is being loaded or unloaded, or while everything that would have to make room is held: ask again
        next step. Raises the load's GraftError if that failed, AdapterRejected if it is larger than the device's whole
        budget, Conflict if nothing but pinned adapters is in its way; `Lease.told` names the adapters in these.
        For the engine's thread alone, with a lease held; waits for no disk.
        """
        return self._residency.admit(version)

    def retire(self, version: AdapterVersion) -> None:
        """Ends one residency hold. The adapter stays on the device until its room is needed."""
        self._residency.retire(version)

    def reach(self, slot: int) -> Reach | None:
        """What the adapter in a slot that is held does to a sequence's positions; None: one part, everywhere."""
        return self._device.reach(slot)

    def num_virtual_tokens(self, version: AdapterVersion) -> int | None:
        """How many tokens the adapter puts before every prompt; None until it has been loaded once."""
        return self._residency.num_virtual_tokens(version)

    def lacks_room(self, version: AdapterVersion) -> bool:
        """Whether `admit` gave None because adapters that are held leave it no room: it is on the host."""
        return self._residency.lacks_room(version)

    def least_valuable(self, versions: Iterable[AdapterVersion]) -> AdapterVersion | None:
        """Of these, all held, the one whose place on the device is worth least; None if all are pinned."""
        return self._residency.least_valuable(versions)

    # Administration

    def register(
        self,
        incoming: Incoming,
        name: str,
        *,
        replace: bool,
        base_fingerprint: str | None = None,
        provenance: Provenance | None = None,
    ) -> Registered:
        """Validates an upload by loading it, stores it under `name`, and keeps it on the host.

        `base_fingerprint` is that of the base which the adapter was made for, if its maker knows it. Content that is
        current already is validated again only if its record says another thing about the base.

        It belongs to whoever has the name, else to who asks.

        Raises what the load raises, AdapterRejected if it can fit neither host nor device, or is of another base and
        the server is strict, Conflict if the name exists with other content and not `replace`, is read in place or is
        another owner's, and StorageFull above the owner's limits.
        Blocks: for a worker thread.
        """
        with noted("register", name, source=provenance and provenance.source) as facts:
            self._elsewhere.refresh()
            change = self._versions.register(
                incoming, name, replace=replace, base_fingerprint=base_fingerprint, provenance=provenance
            )
            told = {"version": change.copy.version.digest, "is_new": change.is_new, "replaced": change.replaced}
            facts |= told
        with self._books.lock:
            return Registered(self._info(change.copy), change.is_new, change.replaced)

    def check_may_claim(self, name: str) -> None:
        """Raises the Conflict of `register` for a name that who asks may not give."""
        with self._books.lock:
            self._books.catalog.owner_for(name)

    def check_room(self, num_bytes: int, name: str | None = None) -> None:
        """Raises the StorageFull of `register` for who has no room for an upload, before its bytes come.

        It has at least `num_bytes`; `name` is None where that is not known yet. What may still turn out to be content
        that is there already is let through. Blocks: for a worker thread. Raises StoreUnreachable.
        """
        try:
            self._versions.check_room(Coming(num_bytes, name))
        except StorageFull:
            self._elsewhere.refresh()  # other servers may have made room
            self._versions.check_room(Coming(num_bytes, name))

    def roll_back(self, name: str, prefix: str | None = None) -> tuple[AdapterInfo, AdapterVersion]:
        """Makes an earlier version the one that `name` means, and tells the version that it meant before.

        Without the prefix of a version it is the one that was current before this one, so that a second call goes
        forward again. It is loaded first, and it is the current one after a restart too. Running requests keep their
        version.

        Raises what `verify` raises, and Conflict for an adapter that is read in place or has one version only.
        """
        with noted("roll back", name) as facts:
            self._elsewhere.refresh()
            copy, before = self._versions.roll_back(name, prefix)
            facts |= {"version": copy.version.digest, "previous_version": before.digest}
        with self._books.lock:
            return self._info(copy), before

    def versions(self, name: str) -> tuple[AdapterInfo, ...]:
        """The versions of a name that are kept, the last that became current first. Raises AdapterNotFound."""
        self._elsewhere.look_for(name)
        with self._books.lock:
            entry = self._books.catalog.seen_entry(name)
            infos = tuple(self._info(copy) for copy in entry.copies.values()) if entry is not None else ()
        if entry is None:
            raise self._books.unknown(name)
        return infos[::-1]

    def delete(self, name: str) -> None:
        """Takes a name out at once; each of its versions is removed everywhere when its last lease ends.

        Raises AdapterNotFound, and Conflict for an adapter that is read in place. Blocks: for a worker thread.
        """
        with noted("delete", name) as facts:
            self._elsewhere.refresh()
            facts["versions"] = list(self._versions.delete(name))

    def refresh(self) -> None:
        """Looks for what other servers have changed in a store that they share. Blocks. Raises StoreUnreachable."""
        self._elsewhere.refresh()

    def may_be_elsewhere(self, spec: str) -> bool:
        """Whether `look_for` would look. Never blocks."""
        return self._elsewhere.may_have(spec)

    def look_for(self, spec: str) -> None:
        """Looks in a shared store for an adapter that is unknown here, at most once a second for all of them.

        Call it before `lease`, which does not. Raises StoreUnreachable. Blocks: for a worker thread.
        """
        self._elsewhere.look_for(spec)

    def rescan(self) -> None:
        """Looks again at the folders that are read in place, for what is new, changed or gone. Blocks."""
        self._in_place.rescan()

    def verify(self, spec: str) -> AdapterInfo:
        """Loads an adapter if it is cold and waits for that. Raises what `lease` raises, and what the load raises."""
        self._elsewhere.look_for(spec)
        with self._leases.hold(spec) as lease, self._books.eased:
            copy = lease.copy
            assert copy is not None
            self._loader.await_end(copy)
            return self._info(copy)

    # By hand

    def load(self, spec: str) -> Loaded:
        """Brings a version to the host and, if idle adapters can make room, to the device. Waits for the disk.

        Raises what `lease` raises, what the load raises, and Conflict where pinned adapters fill the device.
        """
        begun_s = time.monotonic()
        with noted("load", spec) as facts:
            self._elsewhere.look_for(spec)
            copy = self._custody.load(spec)
            facts["version"] = copy.version.digest
        with self._books.lock:
            return Loaded(self._info(copy), time.monotonic() - begun_s)

    def unload(self, spec: str, max_wait_s: float = MAX_WAIT_S) -> Unloaded:
        """Lets the sequences that run on a version finish, and frees what it takes on device and host.

        The adapter stays: a request that comes next loads it again, and one that comes meanwhile waits for the end of
        the unload. Mixes with it that no request uses are freed, too; those in use when their last request ends, and
        the rows that they share with it stay until then.

        Raises AdapterNotFound, BadRequest, and Conflict for a pinned version and for one on which sequences still run
        after `max_wait_s`; then no adapter has been freed.
        """
        with noted("unload", spec):
            self._leases.forget_mixes(spec)
            return self._custody.unload(spec, max_wait_s)

    def pin(self, spec: str, max_wait_s: float = MAX_WAIT_S) -> AdapterInfo:
        """Brings a version to host and device, where it stays until it is unpinned or its name is deleted.

        It does not outlive the process. Raises what `load` raises, Conflict with the numbers if the largest adapter
        known would find no room beside what is pinned, and Overloaded if running sequences leave it no room within
        `max_wait_s`; then nothing is pinned.
        """
        with noted("pin", spec) as facts:
            self._elsewhere.look_for(spec)
            copy = self._custody.pin(spec, max_wait_s)
            facts["version"] = copy.version.digest
        with self._books.lock:
            return self._info(copy)

    def unpin(self, spec: str) -> AdapterInfo:
        """Ends a pin, if there is one; the version stays where it is until its room is needed."""
        with noted("unpin", spec) as facts:
            copy = self._custody.unpin(spec)
            facts["version"] = copy.version.digest
        with self._books.lock:
            return self._info(copy)

    def lift_quarantine(self, spec: str) -> AdapterInfo:
        """Serves a version again with which the output has overflowed too often, and the mixes with it.

        Does nothing to one that is not quarantined. Raises AdapterNotFound and BadRequest.
        """
        with noted("lift quarantine", spec) as facts:
            copy = self._quarantine.lift(spec)
            facts["version"] = copy.version.digest
        with self._books.lock:
            return self._info(copy)

    def expect(self, find: Callable[[str], GraftError | None]) -> None:
        """`find` tells what to raise for the name of an adapter that is not there, if it knows more than that."""
        self._books.find_arriving = find

    def close(self) -> None:
        """Refuses new leases, and waits for the loads and removals that were begun."""
        with self._books.lock:
            self._workers.refuse()
            self._copiers.refuse()
            self._books.ease()
        self._workers.join()
        self._copiers.join()

    # Looking

    def names(self) -> tuple[str, ...]:
        """The names of all adapters that who asks may know of, sorted."""
        patterns = current_asker().patterns
        with self._books.lock:
            lists = self._books.catalog.open_names()
        return tuple(sorted(name for names in lists for name in patterns.within(names)))

    def names_near(self, name: str, most: int) -> tuple[str, ...]:
        """Some of `names`, sorted: at most `most`, those that would be beside `name`. Costs little however many there
        are, for which those are left out that only patterns with a wildcard before their end have."""
        with self._books.lock:
            return tuple(self._books.catalog.names_near(name, most))

    def list(self, after: str = "", limit: int | None = None) -> tuple[AdapterInfo, ...]:
        """Every adapter in its current version, by name. Each is true by itself: changes may fall in between.

        With `after` those whose names come after that one, whether it is there or not; of these the first `limit`.
        """
        names = self.names()
        begin = bisect_right(names, after)
        chosen = names[begin:] if limit is None else names[begin : begin + limit]
        return tuple(info for name in chosen if (info := self._info_of(name)) is not None)

    def describe(self, spec: str) -> AdapterInfo:
        """What there is to know of `name` or `name@version-prefix`. Raises AdapterNotFound and BadRequest."""
        self._elsewhere.look_for(spec)
        info = self._info_of(spec)
        if info is None:
            raise self._books.unknown(spec)
        return info

    def stats(self) -> RegistryStats:
        """The registry in numbers."""
        with self._books.lock:  # which the engine may wait for: thousands of adapters are counted after it
            entries = self._books.catalog.entries
            num_adapters, contents = len(entries), tuple(self._books.catalog.contents.values())
            copies = [copy for entry in entries.values() for copy in entry.copies.values()]
        tally = tally_of(contents)
        return RegistryStats(
            num_adapters=num_adapters,
            num_versions=len(copies),
            num_leases=tally.num_leases,
            num_residencies=tally.num_residencies,
            num_resident=self._residency.num_resident,
            num_on_host=self._host.num_adapters,
            num_loading=tally.num_loading,
            num_pinned=tally.num_pinned,
            num_quarantined=tally.num_quarantined,
            device_used_bytes=self._device.used_bytes,
            device_capacity_bytes=self._device.capacity_bytes,
            device_copied_bytes=self._device.copied_bytes,
            store_bytes=sum(copy.content_bytes for copy in copies if copy.found is None),
            host_used_bytes=self._host.used_bytes,
            host_max_bytes=self._host.max_bytes,
            loads_total=self._loader.loads_total,
            load_failures_total=self._loader.load_failures_total,
            promotions_total=self._residency.promotions_total,
            overflows_total=self._quarantine.overflows_total,
            unloads_total=self._custody.unloads_total,
            device_evictions_total=self._residency.evictions_total,
            host_evictions_total=self._host.num_evictions,
            lookups_total=dict(self._leases.lookups_total),
            mean_device_bytes=tally.mean_device_bytes,
        )

    def on_tiers(self) -> tuple[AdapterState, ...]:
        """The adapters that host or device has, each name once. Its cost is theirs, however many the store has."""
        return on_tiers(self._books, self._host, self._residency)

    def known(self, names: Iterable[str]) -> frozenset[str]:
        """Those of the names that an adapter has now. Never blocks."""
        return frozenset(name for name in names if name in self._books.catalog.entries)

    def check_integrity(self) -> tuple[str, ...]:
        """What does not add up in the books, as sentences; empty unless there is a defect. For tests and idle times."""
        with self._books.lock:
            checks = {**self._residency.integrity_checks(), **self._books.catalog.integrity_checks()}
            return tuple(fault for fault, is_sound in checks.items() if not is_sound) + self._host.check_integrity()

    def _info_of(self, spec: str) -> AdapterInfo | None:
        with self._books.lock:
            copy = self._books.catalog.find(spec)
            return self._info(copy) if copy is not None else None

    def _info(self, copy: Copy) -> AdapterInfo:
        content, facts = copy.content, copy.content.facts
        entry = self._books.catalog.entries.get(copy.version.name)
        tiers = {"store": True, "host": self._host.holds(content.digest), "device": content.slot is not None}
        sizes = content.sizes
        return AdapterInfo(
            name=copy.version.name,
            digest=copy.version.digest,
            versions=tuple(entry.copies) if entry is not None else (copy.version.digest,),
            method=facts.method if facts else None,
            rank=facts.rank if facts else None,
            num_parameters=facts.num_parameters if facts else None,
            num_sites=facts.num_sites if facts else None,
            content_bytes=copy.content_bytes,
            host_bytes=sizes.host_bytes if sizes is not None and tiers["host"] else 0,
            device_bytes=sizes.device_bytes if sizes is not None and tiers["device"] else 0,
            tiers=tuple(tier for tier, is_there in tiers.items() if is_there),
            num_leases=copy.num_leases,
            # Of a content that another owner has too, those of other owners are not told.
            num_residencies=min(content.num_residencies, copy.num_leases),
            num_requests=copy.num_requests,
            last_used=copy.last_used,
            is_pinned=copy.is_pinned,
            created=copy.created,
            base_model=copy.base_model,
            base_fingerprint=copy.base_fingerprint,
            warnings=(facts.warnings if facts else ()) + copy.doubts,
            is_quarantined=content.is_quarantined,
            is_refused=bool(copy.doubts) and self._books.base.is_strict,
            source="store" if copy.found is None else str(copy.found.folder),
            provenance=copy.provenance,
            owner=copy.owner,
            folder=copy.folder,
        )

    def _tell_refused(self) -> None:
        refused = [name for name, entry in self._books.catalog.entries.items() if entry.current.doubts]
        if refused and self._books.base.is_strict:
            named = ", ".join(sorted(refused)[:_MAX_NAMED])
            _log.warning("--strict-base refuses adapters of another base, %d in all: %s", len(refused), named)
