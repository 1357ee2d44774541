"""The registry: names, versions, leases, promotion and eviction. The only file that knows all tiers.

Owns who holds what, and moves adapters between store, host and device. Knows nothing about HTTP, batches, methods or
how a tier keeps its bytes.

Four locks, always taken in this order; only the first is held while an adapter's files are read:

    scanning  one look at the folders that are read in place
    changes   one change of the store or of the sources, with the catalog's note of it
    placing   one call of the device tier; where a slot is gained or lost
    lock      the catalog, leases and residencies; held for a few lines at a time
"""

import difflib
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy as fresh
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, Protocol, Self, TypeVar

from server.adapters.catalog import AdapterVersion, Catalog, Content, Copy, Facts
from server.adapters.host import HostTier
from server.adapters.host_adapter import HostAdapter
from server.adapters.method import Lowered
from server.adapters.rows import NoRoom
from server.adapters.sources import Found, LocalFolder, Source
from server.adapters.store import (
    Discarded,
    Incoming,
    Record,
    Store,
    StoredVersion,
    base_model_of,
    check_name,
    is_valid_name,
)
from server.ground.errors import (
    AdapterNotFound,
    AdapterRejected,
    Conflict,
    GenerationFailed,
    GraftError,
    Overloaded,
    StartupRefused,
)

FAILURE_MEMORY_S = 5.0  # a failed load is not tried again before this
_MAX_SUGGESTED_FROM = 1000  # names; comparing a misspelt one with more would take long

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")
_T = TypeVar("_T")


class Device(Protocol):
    """The device tier, as the registry needs it.

    Calls never overlap. `admit` comes from the engine's thread; `release` comes from any thread, and only for an
    adapter that no running sequence uses.
    """

    @property
    def capacity_bytes(self) -> int:
        """Bytes that adapters may use in all."""

    @property
    def used_bytes(self) -> int:
        """Bytes that adapters use now."""

    def admit(self, digest: str, adapter: HostAdapter) -> int:
        """Puts an adapter on the device; returns its slot. Raises NoRoom, and then nothing has changed."""

    def release(self, digest: str) -> int:
        """Takes it off again and frees its slot; returns the bytes that became free."""

    def resident_bytes(self, adapter: HostAdapter) -> int:
        """The bytes that it needs on an empty device."""


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What users are told about an adapter version. What only lowering can tell is None until it was lowered once."""

    name: str
    digest: str  # the version
    versions: tuple[str, ...]  # digests of all versions of the name, the current one last
    method: str | None
    rank: int | None
    num_parameters: int | None
    num_sites: int | None
    content_bytes: int
    tiers: tuple[str, ...]  # where it is now: of "store", "host", "device"
    num_leases: int
    num_residencies: int
    created: int  # Unix time
    base_model: str | None
    warnings: tuple[str, ...]
    source: str  # "store", or the folder that it is read from in place


@dataclass(frozen=True, slots=True)
class Registered:
    """The end of an upload: what the name means now, and whether that is new."""

    info: AdapterInfo
    is_new: bool


@dataclass(frozen=True, slots=True)
class RegistryStats:
    """The registry in numbers; the totals count from the start."""

    num_adapters: int
    num_versions: int
    num_leases: int
    num_residencies: int
    num_resident: int
    num_on_host: int
    num_loading: int
    device_used_bytes: int
    device_capacity_bytes: int
    host_used_bytes: int
    host_max_bytes: int
    loads_total: int
    load_failures_total: int
    promotions_total: int
    device_evictions_total: int
    host_evictions_total: int


class Lease:
    """A hold on one version, from a request's acceptance to its end: until then it can be neither changed nor lost."""

    def __init__(self, copy: Copy, end: Callable[["Lease"], None]) -> None:
        self.version = copy.version
        self.copy: Copy | None = copy  # the registry's; None once released
        self._end = end

    def release(self) -> None:
        """Ends the hold; does nothing the second time. Never blocks, from any thread."""
        self._end(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class Registry:
    """All adapters of a server. Safe for many threads."""

    def __init__(
        self,
        store: Store,
        sources: Sequence[Source],
        host: HostTier,
        device: Device,
        load: Callable[[Path], Lowered],
        num_loaders: int = 2,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`load` reads and lowers an adapter folder, in any thread; its GraftErrors are shown to users.

        Raises StartupRefused if a folder is given a name that the store has.
        """
        self._store = store
        self._sources = tuple(sources)
        self._host = host
        self._device = device
        self._load = load
        self._clock = clock
        self._pool = ThreadPoolExecutor(num_loaders, thread_name_prefix="adapter-loader")
        self._scanning = threading.Lock()
        self._changes = threading.Lock()
        self._placing = threading.Lock()
        self._lock = threading.Lock()
        self._load_ended = threading.Condition(self._lock)
        self._catalog = Catalog()
        self._resident: dict[str, Content] = {}
        self._uses = itertools.count(1)
        self._warned: set[tuple[str, Path]] = set()
        self._is_closed = False
        self._loads_total = self._load_failures_total = self._promotions_total = self._device_evictions_total = 0
        for stored in store.scan():
            for version in stored.versions:
                self._list_stored(version)
            self._catalog.make_current(self._catalog.entries[stored.name].copies[stored.current])
        self._refuse_taken_names()
        self.rescan()

    # Requests: leases

    def lease(self, spec: str) -> Lease:
        """A hold on the version that `name` or `name@version-prefix` means; starts to load it if it is cold.

        Raises AdapterNotFound, BadRequest for a prefix that is no prefix or is ambiguous, and what its load raised if
        that failed within the last FAILURE_MEMORY_S. Never blocks.
        """
        with self._lock:
            self._check_open()
            copy = self._catalog.find(spec)
            if copy is not None:
                self._start_load_if_cold(copy.content)
                copy.num_leases += 1
        if copy is None:
            raise self._unknown(spec)
        return Lease(copy, self._end_lease)

    def _end_lease(self, lease: Lease) -> None:
        with self._lock:
            copy, lease.copy = lease.copy, None
            if copy is None:
                return
            copy.num_leases -= 1
            is_over = self._let_go_if_over(copy)
        if is_over:
            self._later(self._dispose, copy)

    # The engine: residency

    def admit(self, version: AdapterVersion) -> int | None:
        """Its slot, and one residency hold on it, if it is on the device or can be put there at once.

        None while it is being loaded, or while everything that would have to make room is held: ask again next step.
        Raises the load's GraftError if that failed, AdapterRejected if it is larger than the device's whole budget.
        For the engine's thread alone, with a lease held; waits for no disk.
        """
        with self._lock:
            content = self._held_content(version)
            if content.slot is not None:
                return self._hold(content)
        with self._placing:
            with self._lock:
                adapter = self._on_host(content)
            slot = self._place(content.digest, adapter) if adapter is not None else None
            if slot is None:
                return None
            with self._lock:
                content.slot = slot
                self._resident[content.digest] = content
                self._promotions_total += 1
                return self._hold(content)

    def retire(self, version: AdapterVersion) -> None:
        """Ends one residency hold. The adapter stays on the device until its room is needed."""
        with self._lock:
            content = self._held_content(version)
            if content.num_residencies == 0:
                raise RuntimeError(f"{version} was retired more often than admitted")
            content.num_residencies -= 1
            content.last_use = next(self._uses)
            is_over = not content.copies and content.num_residencies == 0
        if is_over:
            self._later(self._purge, content)

    def _held_content(self, version: AdapterVersion) -> Content:
        content = self._catalog.contents.get(version.digest)
        if content is None:
            raise RuntimeError(f"{version} is used without a lease")
        return content

    def _hold(self, content: Content) -> int | None:
        content.num_residencies += 1
        content.last_use = next(self._uses)
        return content.slot

    def _on_host(self, content: Content) -> HostAdapter | None:
        adapter = self._host.get(content.digest)
        if adapter is None:
            self._start_load_if_cold(content)
        return adapter

    def _place(self, digest: str, adapter: HostAdapter) -> int | None:
        """Puts an adapter on the device, evicting idle ones one by one; None if that does not make room."""
        while True:
            try:
                return self._device.admit(digest, adapter)
            except NoRoom:
                self._check_can_fit(adapter)
                if not self._evict_one():
                    if not self._resident:
                        raise self._never_fits(adapter) from None
                    return None

    def _evict_one(self) -> bool:
        """Takes the least recently used adapter off the device that nothing holds, unleased ones first."""
        with self._lock:
            idle = [content for content in self._resident.values() if content.num_residencies == 0]
            if not idle:
                return False
            victim = min(idle, key=lambda content: (content.num_leases > 0, content.last_use))
            self._unplace(victim)
            self._device_evictions_total += 1
        self._device.release(victim.digest)
        return True

    def _unplace(self, content: Content) -> None:
        content.slot = None
        del self._resident[content.digest]

    def _check_can_fit(self, adapter: HostAdapter) -> None:
        if self._device.resident_bytes(adapter) > self._device.capacity_bytes:
            raise self._never_fits(adapter)

    def _never_fits(self, adapter: HostAdapter) -> AdapterRejected:
        return AdapterRejected(
            f"The adapter needs {self._device.resident_bytes(adapter)} bytes on the device, and adapters may use "
            f"{self._device.capacity_bytes} in all: start the server with a larger --adapter-memory.",
            param="adapter",
        )

    # Loading: store -> host, one load at a time per content

    def _start_load_if_cold(self, content: Content) -> None:
        """Under the lock. Raises the last load's failure while it is fresh."""
        if content.is_loading or content.slot is not None or self._host.holds(content.digest):
            return
        if content.failure is not None and self._clock() - content.failed_at_s < FAILURE_MEMORY_S:
            raise fresh(content.failure)  # a raised error collects a traceback: each requester has its own
        self._submit(self._bring_to_host, content)
        content.is_loading = True
        content.failure = None

    def _bring_to_host(self, content: Content) -> None:
        failure: GraftError | None = GenerationFailed("The adapter could not be loaded: the server's log says why.")
        try:
            adapter = self._host.put(content.digest, self._read(content))
            self._learn(content, adapter)
            failure = None
        except GraftError as error:
            failure = error
        finally:
            self._end_load(content, failure)

    def _read(self, content: Content) -> Lowered:
        """Lowers one of the content's copies, wherever a deletion may have moved it meanwhile."""
        while True:
            with self._lock:
                self._check_open()  # a server that stops does not finish its queue of loads
                # The last resort is a folder that has changed since: what is read there is refused below.
                copy = min(content.copies, key=lambda copy: copy.is_outdated, default=None)
                folder = copy.folder if copy is not None else None
            if copy is None or folder is None:
                raise AdapterNotFound("The adapter was deleted before it was loaded.", param="adapter")
            try:
                lowered = self._lower(folder)
            except GraftError:
                with self._changes, self._lock:  # a deletion is now either noted or not begun
                    if copy.folder == folder and copy in content.copies:
                        raise
                continue
            if copy.found is not None and not copy.found.is_intact():
                raise Overloaded(
                    f"The files of {copy.version} changed while they were read: ask again.",
                    retry_after_s=math.ceil(FAILURE_MEMORY_S),
                )
            return lowered

    def _lower(self, folder: Path) -> Lowered:
        try:
            return self._load(folder)
        except OSError as error:
            _log.warning("The adapter in %s cannot be read: %s", folder, error)
            raise AdapterRejected(
                f"The adapter's files cannot be read ({error.strerror or error}): check the server's disk, or upload "
                f"the adapter again.",
                param="adapter",
            ) from error

    def _learn(self, content: Content, adapter: HostAdapter) -> None:
        facts = Facts(adapter.method, adapter.rank, adapter.num_parameters, len(adapter.edits), adapter.warnings)
        with self._lock:
            content.facts = facts

    def _end_load(self, content: Content, failure: GraftError | None) -> None:
        if failure is not None:
            self._log_failure(content, failure)  # before anybody can meet it
        with self._load_ended:
            content.is_loading = False
            content.failure = failure
            content.failed_at_s = self._clock()
            self._loads_total += failure is None
            self._load_failures_total += failure is not None
            self._drop_if_orphan(content.digest)
            self._load_ended.notify_all()

    def _log_failure(self, content: Content, failure: GraftError) -> None:
        with self._lock:
            versions = sorted(str(copy.version) for copy in content.copies) or [content.digest[:12]]
        _log.warning("The adapter %s could not be loaded: %s", ", ".join(versions), failure.message)

    def _drop_if_orphan(self, digest: str) -> None:
        """Under the lock: a load may end after the last that wanted it has gone."""
        if digest not in self._catalog.contents:
            self._host.drop(digest)

    # Administration: register, delete, rescan

    def register(self, incoming: Incoming, name: str, *, replace: bool) -> Registered:
        """Validates an upload by loading it, stores it under `name`, and keeps it on the host.

        Raises what the load raises, AdapterRejected if it can fit neither host nor device, Conflict if the name exists
        with other content and not `replace`, or is read in place. Blocks: for a worker thread.
        """
        check_name(name)
        digest = incoming.digest()
        with self._lock:
            if self._is_current(name, digest, replace=replace):
                return Registered(self._info(self._catalog.entries[name].current), is_new=False)
            lowering = self._submit(self._lower, incoming.folder)  # in the pool, so that uploads are bounded too
        try:
            adapter = self._host.put(digest, lowering.result())
            self._check_can_fit(adapter)
            return self._commit(incoming, name, adapter, replace)
        finally:
            with self._lock:
                self._drop_if_orphan(digest)

    def delete(self, name: str) -> None:
        """Takes a name out at once; each of its versions is removed everywhere when its last lease ends.

        Raises AdapterNotFound, and Conflict for an adapter that is read in place. Blocks: for a worker thread.
        """
        with self._changes:
            with self._lock:
                self._check_is_stored(name)
            discarded = self._discard(name)
            with self._lock:
                over = []
                for copy in self._catalog.remove(name):
                    copy.discarded = discarded.pop(copy.version.digest, None)
                    copy.folder = copy.discarded.folder if copy.discarded is not None else copy.folder
                    if self._let_go_if_over(copy):
                        over.append(copy)
        for copy in over:
            self._dispose(copy)
        for unknown in discarded.values():  # put there by another process
            unknown.remove()

    def rescan(self) -> None:
        """Looks again at the folders that are read in place, for what is new, changed or gone. Blocks."""
        with self._scanning:
            folders = [folder for source in self._sources for folder in source.scan()]
            with self._changes, self._lock:
                found = self._by_free_name(folders)
                over = [copy for name in self._outdated(found) for copy in self._unlist_in_place(name)]
                for name, folder in found.items():
                    self._list_found(name, folder)
        for copy in over:
            self._dispose(copy)

    def verify(self, spec: str) -> AdapterInfo:
        """Loads an adapter if it is cold and waits for that. Raises what `lease` raises, and what the load raises."""
        with self.lease(spec) as lease, self._load_ended:
            copy = lease.copy
            assert copy is not None
            self._load_ended.wait_for(lambda: not copy.content.is_loading)
            if copy.content.failure is not None:
                raise fresh(copy.content.failure)
            return self._info(copy)

    def close(self) -> None:
        """Refuses new leases, and waits for the loads and removals that were begun."""
        with self._lock:
            self._is_closed = True
        self._pool.shutdown(wait=True)

    def _commit(self, incoming: Incoming, name: str, adapter: HostAdapter, replace: bool) -> Registered:
        record = Record(
            created=int(time.time()),
            method=adapter.method,
            rank=adapter.rank,
            num_parameters=adapter.num_parameters,
            num_sites=len(adapter.edits),
            base_model=base_model_of(incoming.folder),
            warnings=adapter.warnings,
        )
        with self._changes:
            with self._lock:
                self._check_not_in_place(name)
            stored, created = self._store.put(incoming, name, record, replace=replace)
            with self._lock:
                copy = self._list_stored(stored)
                return Registered(self._info(copy), is_new=created)

    def _is_current(self, name: str, digest: str, *, replace: bool) -> bool:
        """Whether the name means this content now. Raises the Conflict that committing would raise, before the work."""
        self._check_open()
        self._check_not_in_place(name)
        entry = self._catalog.entries.get(name)
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
        if name not in self._catalog.entries:
            raise AdapterNotFound(f"There is no adapter {name[:80]!r}.", param="adapter")
        self._check_not_in_place(name)

    def _check_not_in_place(self, name: str) -> None:
        entry = self._catalog.entries.get(name)
        if entry is not None and entry.current.found is not None:
            raise Conflict(
                f"The adapter {name!r} is read in place from a folder of the server's machine: change it there, or "
                f"choose another name.",
                param="name",
            )

    def _discard(self, name: str) -> dict[str, Discarded]:
        try:
            return {version.digest: version for version in self._store.discard(name)}
        except AdapterNotFound:  # its folder is gone already; what is left of it is our note
            return {}

    # Sources

    def _refuse_taken_names(self) -> None:
        for source in self._sources:
            if isinstance(source, LocalFolder) and source.name in self._catalog.entries:
                raise StartupRefused(
                    f"--adapter {source.name}=...: the store {self._store.root} has an adapter of this name. Choose "
                    f"another."
                )

    def _by_free_name(self, folders: Iterable[Found]) -> dict[str, Found]:
        """The folders that serve, by name: what the store or an earlier source has is left out."""
        found: dict[str, Found] = {}
        for folder in folders:
            entry = self._catalog.entries.get(folder.name)
            if folder.name in found or (entry is not None and entry.current.found is None):
                self._warn_taken(folder)
            else:
                found[folder.name] = folder
        return found

    def _warn_taken(self, folder: Found) -> None:
        if (folder.name, folder.folder) not in self._warned:
            self._warned.add((folder.name, folder.folder))
            _log.warning("The adapter folder %s is left out: the name %s is taken.", folder.folder, folder.name)

    def _outdated(self, found: dict[str, Found]) -> list[str]:
        """Names read in place whose folder is gone or has other content now."""
        in_place = [(name, e.current.version.digest) for name, e in self._catalog.entries.items() if e.current.found]
        return [name for name, digest in in_place if name not in found or found[name].digest != digest]

    def _unlist_in_place(self, name: str) -> list[Copy]:
        copies = self._catalog.remove(name)
        for copy in copies:
            if all(other.is_outdated for other in copy.content.copies):
                self._host.keep(copy.version.digest)  # for those who lease it: it cannot be read again
        return [copy for copy in copies if self._let_go_if_over(copy)]

    def _list_found(self, name: str, folder: Found) -> None:
        entry = self._catalog.entries.get(name)
        if entry is not None:  # the same content, perhaps elsewhere or with new dates
            entry.current.found, entry.current.folder = folder, folder.folder
            return
        copy = Copy(
            version=AdapterVersion(name, folder.digest),
            content=self._catalog.content(folder.digest),
            folder=folder.folder,
            created=folder.created,
            content_bytes=folder.content_bytes,
            base_model=folder.base_model,
            found=folder,
        )
        self._list(copy)

    def _list_stored(self, stored: StoredVersion) -> Copy:
        """The copy of a stored version, made the current one of its name."""
        entry = self._catalog.entries.get(stored.name)
        if entry is not None and stored.digest in entry.copies:
            self._catalog.make_current(entry.copies[stored.digest])
            return entry.copies[stored.digest]
        content = self._catalog.content(stored.digest)
        content.facts = content.facts or _recorded_facts(stored.record)
        copy = Copy(
            version=AdapterVersion(stored.name, stored.digest),
            content=content,
            folder=stored.folder,
            created=stored.record.created,
            content_bytes=stored.record.content_bytes,
            base_model=stored.record.base_model,
        )
        self._list(copy)
        return copy

    def _list(self, copy: Copy) -> None:
        self._catalog.add(copy)
        self._host.unkeep(copy.version.digest)  # it can be read again, if it could not

    # Ends

    def _let_go_if_over(self, copy: Copy) -> bool:
        """Under the lock: whether nobody can ask for the copy any more and nobody leases it, and so it is to go."""
        is_over = not copy.is_listed and copy.num_leases == 0
        if is_over:
            copy.content.copies.remove(copy)
        return is_over

    def _dispose(self, copy: Copy) -> None:
        if copy.discarded is not None:
            copy.discarded.remove()
        self._purge(copy.content)

    def _purge(self, content: Content) -> None:
        """Frees a content on host and device if no copy of it is left."""
        with self._placing:
            with self._lock:
                if (
                    content.copies
                    or content.num_residencies
                    or self._catalog.contents.get(content.digest) is not content
                ):
                    return
                del self._catalog.contents[content.digest]
                self._host.drop(content.digest)
                was_resident = content.slot is not None
                if was_resident:
                    self._unplace(content)
            if was_resident:
                self._device.release(content.digest)

    # The pool

    def _check_open(self) -> None:
        if self._is_closed:
            raise Overloaded("The server is shutting down.")

    def _submit(self, task: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> "Future[_T]":
        """Under the lock, so that nothing is submitted once the pool is closed."""
        self._check_open()
        future = self._pool.submit(task, *arguments, **named)
        future.add_done_callback(_log_defect)
        return future

    def _later(self, task: Callable[[_T], None], argument: _T) -> None:
        """Runs a task that blocks, away from the caller's thread while there is another."""
        with self._lock:
            if not self._is_closed:
                self._submit(task, argument)
                return
        task(argument)

    # Looking

    def list(self) -> tuple[AdapterInfo, ...]:
        """Every adapter in its current version, by name. Each is true by itself: changes may fall in between."""
        with self._lock:
            names = sorted(self._catalog.entries)
        return tuple(info for name in names if (info := self._info_of(name)) is not None)

    def describe(self, spec: str) -> AdapterInfo:
        """What there is to know of `name` or `name@version-prefix`. Raises AdapterNotFound and BadRequest."""
        info = self._info_of(spec)
        if info is None:
            raise self._unknown(spec)
        return info

    def stats(self) -> RegistryStats:
        """The registry in numbers."""
        with self._lock:
            contents = self._catalog.contents.values()
            return RegistryStats(
                num_adapters=len(self._catalog.entries),
                num_versions=sum(len(entry.copies) for entry in self._catalog.entries.values()),
                num_leases=sum(content.num_leases for content in contents),
                num_residencies=sum(content.num_residencies for content in contents),
                num_resident=len(self._resident),
                num_on_host=self._host.num_adapters,
                num_loading=sum(content.is_loading for content in contents),
                device_used_bytes=self._device.used_bytes,
                device_capacity_bytes=self._device.capacity_bytes,
                host_used_bytes=self._host.used_bytes,
                host_max_bytes=self._host.max_bytes,
                loads_total=self._loads_total,
                load_failures_total=self._load_failures_total,
                promotions_total=self._promotions_total,
                device_evictions_total=self._device_evictions_total,
                host_evictions_total=self._host.num_evictions,
            )

    def check_integrity(self) -> tuple[str, ...]:
        """What does not add up in the books, as sentences; empty unless there is a defect. For tests and idle times."""
        with self._lock:
            resident = {digest: c for digest, c in self._catalog.contents.items() if c.slot is not None}
            slots = {content.slot for content in resident.values()}
            checks = {
                "the adapters with a slot are not those that count as resident": resident == self._resident,
                "two adapters have one slot": len(slots) == len(resident),
                **self._catalog.integrity_checks(),
            }
            return tuple(fault for fault, is_sound in checks.items() if not is_sound) + self._host.check_integrity()

    def _info_of(self, spec: str) -> AdapterInfo | None:
        with self._lock:
            copy = self._catalog.find(spec)
            return self._info(copy) if copy is not None else None

    def _info(self, copy: Copy) -> AdapterInfo:
        content, facts = copy.content, copy.content.facts
        entry = self._catalog.entries.get(copy.version.name)
        tiers = {"store": True, "host": self._host.holds(content.digest), "device": content.slot is not None}
        return AdapterInfo(
            name=copy.version.name,
            digest=copy.version.digest,
            versions=tuple(entry.copies) if entry is not None else (copy.version.digest,),
            method=facts.method if facts else None,
            rank=facts.rank if facts else None,
            num_parameters=facts.num_parameters if facts else None,
            num_sites=facts.num_sites if facts else None,
            content_bytes=copy.content_bytes,
            tiers=tuple(tier for tier, is_there in tiers.items() if is_there),
            num_leases=copy.num_leases,
            num_residencies=content.num_residencies,
            created=copy.created,
            base_model=copy.base_model,
            warnings=facts.warnings if facts else (),
            source="store" if copy.found is None else str(copy.found.folder),
        )

    def _unknown(self, spec: str) -> AdapterNotFound:
        """Outside the lock: comparing names takes a while."""
        name = spec.partition("@")[0]
        with self._lock:
            names = list(self._catalog.entries)
        if len(names) > _MAX_SUGGESTED_FROM:
            names = [known for known in names if known[:2] == name[:2]][:_MAX_SUGGESTED_FROM]
        close = difflib.get_close_matches(name, names) if is_valid_name(name) else []
        hint = f"Did you mean {' or '.join(close)}?" if close else "GET /v1/adapters lists those that there are."
        return AdapterNotFound(f"There is no adapter {name[:80]!r}. {hint}", param="adapter")


def _recorded_facts(record: Record) -> Facts | None:
    if record.method is None or record.rank is None or record.num_parameters is None or record.num_sites is None:
        return None
    return Facts(record.method, record.rank, record.num_parameters, record.num_sites, record.warnings)


def _log_defect(future: "Future[_T]") -> None:
    """What a task raised that is no answer to a user would be lost with its future."""
    error = future.exception()
    if error is not None and not isinstance(error, GraftError):
        _log.error("A task on adapters failed.", exc_info=error)
