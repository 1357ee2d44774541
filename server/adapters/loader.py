"""Store -> host: one load at a time per content, in the workers' threads, and what it taught.

Owns reading an adapter wherever a deletion may have moved it, the memory of a failure, and what may not be evicted
because it cannot be read again. Knows nothing about slots or who asks.
"""

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

from server.adapters.books import Books
from server.adapters.catalog import Content, Copy, Facts, Portion, Sizes
from server.adapters.eviction import Worth
from server.adapters.host import HostTier
from server.adapters.host_adapter import HostAdapter
from server.adapters.merging.mixing import Mixed, Part, mix
from server.adapters.method import Lowered
from server.adapters.naming import Named, label, told
from server.adapters.room import Device, measure
from server.adapters.store.folder_store import unreadable
from server.adapters.workers import Workers
from server.ground.errors import (
    AdapterDamaged,
    AdapterNotFound,
    AdapterRejected,
    BadRequest,
    GenerationFailed,
    GraftError,
    Overloaded,
)

FAILURE_MEMORY_S = 5.0  # a failed load is not tried again before this
ASSUMED_LOAD_S = 0.1  # of an adapter that was never loaded from the store, but came as an upload
_NEWEST = True, Worth(True, math.inf)  # of what nobody can know yet, since it has just come

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


ObserveLoad = Callable[[str, float], None]  # told of a move that succeeded: "store_to_host" ..., and its seconds


class Load(Protocol):
    """Reads and lowers an adapter folder, for a weight in a mix where one is given; may run in any thread."""

    def __call__(self, folder: Path, weight: float = ..., /) -> Lowered: ...


class Loader:
    """Brings contents to the host. Safe for many threads."""

    def __init__(
        self,
        books: Books,
        workers: Workers,
        host: HostTier,
        device: Device,
        load: Load,
        clock: Callable[[], float],
        reading: Callable[[Path], AbstractContextManager[None]],
        observe: ObserveLoad,
    ) -> None:
        """`load` reads and lowers a folder; `device` says what can never fit; `clock` gives seconds.

        Within `reading` a stored version's folder has its files.
        """
        self._books = books
        self._workers = workers
        self._host = host
        self._device = device
        self._load = load
        self._clock = clock
        self._reading = reading
        self._observe = observe
        self.loads_total = self.load_failures_total = 0

    def start_if_cold(self, content: Content, versions: Iterable[Named] = (), *, is_for_host: bool = False) -> None:
        """Under the lock. What is on the device is not cold, unless it is wanted on the host.

        Raises the last load's failure while it is fresh, told to who asks for these `versions`.
        """
        if content.is_loading:
            return
        is_ready = content.slot is not None and not is_for_host
        if is_ready or self._host.holds(content.digest):
            content.failure = None  # it may be that of a load for the host, which what is on the device does not need
            return
        if content.failure is not None and self._clock() - content.failed_at_s < FAILURE_MEMORY_S:
            raise told(content.failure, versions)
        self._workers.submit(self._bring_to_host, content)
        content.is_loading = True
        content.failure = None

    def await_end(self, copy: Copy) -> None:
        """Under the lock, which it gives away while it waits for the load of the copy's content. Raises its failure."""
        content = copy.content
        self._books.eased.wait_for(lambda: not content.is_loading)
        if content.failure is not None:
            raise told(content.failure, (copy.version,))

    def lower(self, folder: Path, weight: float = 1.0) -> Lowered:
        """Reads and lowers a folder. Raises StoreUnreachable where the disk fails, and what `load` raises."""
        try:
            return self._load(folder) if weight == 1 else self._load(folder, weight)
        except OSError as error:
            _log.warning("The adapter in %s cannot be read: %s", folder, error)
            raise unreadable(error) from error

    def put(self, digest: str, lowered: Lowered | Mixed) -> tuple[HostAdapter, Sizes]:
        """Keeps a lowered adapter on the host. Raises AdapterRejected if host or device is too small for it."""
        adapter = self._host.put(digest, lowered, lambda: self._worth(digest))
        return adapter, measure(self._device, adapter)

    def _worth(self, digest: str) -> tuple[bool, Worth]:
        """Of its place on the host. Reads without the lock, which the caller may have; it may err by a use."""
        content = self._books.catalog.contents.get(digest)
        if content is None or content.sizes is None:
            return _NEWEST
        return content.worth(reload_s(content), content.sizes.host_bytes)

    def drop_if_orphan(self, digest: str) -> None:
        """Under the lock: a load may end after the last that wanted it has gone."""
        if digest not in self._books.catalog.contents:
            self._host.drop(digest)

    def settle(self, content: Content) -> None:
        """Under the lock, after a change of its copies: what is pinned or cannot be read again stays on the host."""
        is_outdated = bool(content.copies) and all(copy.is_outdated for copy in content.copies)
        if content.is_pinned or is_outdated:
            self._host.keep(content.digest)
        else:
            self._host.unkeep(content.digest)
        for derived in self._books.catalog.mixes_of(content.digest) if is_outdated else ():
            self._host.keep(derived.digest)  # until it is purged, when this content is

    def _bring_to_host(self, content: Content) -> None:
        failure: GraftError | None = GenerationFailed("The adapter could not be loaded: the server's log says why.")
        begun_s = self._clock()
        try:
            lowered = self._mixed(content) if content.portions else self._read(content)
            self._learn(content, *self.put(content.digest, lowered))
            load_s = self._clock() - begun_s
            content.load_s = min(load_s, reload_s(content))  # the shortest: others wait for each other
            self._observe("store_to_host", load_s)
            failure = None
        except GraftError as error:
            self._host.drop(content.digest)  # there if the device alone is too small for it
            failure = error
        finally:
            self._end(content, failure)

    def _mixed(self, content: Content) -> Mixed:
        """Lowers each portion of a mix anew, in its weight; equal tensors of those on the host are shared there."""
        return mix([Part(label(portion.version.digest), self._portion(portion)) for portion in content.portions])

    def _portion(self, portion: Portion) -> Lowered:
        with self._books.lock:
            content = self._books.catalog.contents.get(portion.version.digest)
        if content is None:
            deleted = label(portion.version.digest)
            raise AdapterNotFound(f"{deleted} was deleted before it was loaded.", param="adapter")
        try:
            return self._read(content, portion.weight)
        except AdapterRejected as error:
            message = f"{label(portion.version.digest)}, weight {portion.weight:g}: {error.message}"
            raise AdapterRejected(message, param="adapter") from error

    def _read(self, content: Content, weight: float = 1.0) -> Lowered:
        return self.read(content, lambda folder: self.lower(folder, weight))

    def read(self, content: Content, read: Callable[[Path], _T]) -> _T:
        """What `read` makes of the folder of one of the content's copies, wherever a deletion may have moved it.

        Of a copy whose files are damaged another is read, if there is one: it may be another owner's who has it whole.
        `read` raises a GraftError where the folder cannot be read, and is called again if it has moved. What is raised
        here names the content by its `naming.label`: the copy may be another owner's.
        """
        failure: GraftError = AdapterNotFound("The adapter was deleted before it was loaded.", param="adapter")
        damaged: set[Path] = set()
        while True:
            with self._books.lock:
                self._workers.check_open()  # a server that stops does not finish its queue of loads
                # The last resort is a folder that has changed since: what is read there is refused below.
                copies = [copy for copy in content.copies if copy.folder not in damaged]
                copy = min(copies, key=lambda copy: copy.is_outdated, default=None)
                folder = copy.folder if copy is not None else None
            if copy is None or folder is None:
                raise failure
            try:
                with self._reading(folder):
                    made = read(folder)
            except GraftError as error:
                with self._books.changes, self._books.lock:  # a deletion is now either noted or not begun
                    has_stayed = copy.folder == folder and copy in content.copies
                if has_stayed and not isinstance(error, AdapterDamaged):
                    raise
                if has_stayed:
                    failure = error
                    damaged.add(folder)
                continue
            if copy.found is not None and not copy.found.is_intact():
                raise Overloaded(
                    f"The files of {label(content.digest)} changed while they were read: ask again.",
                    retry_after_s=math.ceil(FAILURE_MEMORY_S),
                )
            return made

    def _learn(self, content: Content, adapter: HostAdapter, sizes: Sizes) -> None:
        facts = Facts(adapter.method, adapter.rank, adapter.num_parameters, len(adapter.edits), adapter.warnings)
        with self._books.lock:
            content.facts, content.sizes = facts, sizes
            copies = tuple(content.copies)
        for copy in copies:
            log_doubts(copy)

    def _end(self, content: Content, failure: GraftError | None) -> None:
        if failure is not None:
            self._log_failure(content, failure)  # before anybody can meet it
        with self._books.lock:
            content.is_loading = False
            content.failure = failure
            content.failed_at_s = self._clock()
            self.loads_total += failure is None
            self.load_failures_total += failure is not None
            self.drop_if_orphan(content.digest)
            self._books.ease()

    def _log_failure(self, content: Content, failure: GraftError) -> None:
        with self._books.lock:
            named = [copy.version for copy in content.copies] + [portion.version for portion in content.portions]
            versions = sorted(map(str, named)) or [content.digest[:12]]
        # A sum that cannot be is nothing that the server's operator could mend.
        is_askers = isinstance(failure, BadRequest) and not isinstance(failure, AdapterRejected)
        level = logging.INFO if is_askers else logging.WARNING
        _log.log(level, "The adapter %s could not be loaded: %s", ", ".join(versions), failure.message)


def reload_s(content: Content) -> float:
    """Seconds that its load from the store takes, as far as is known."""
    return ASSUMED_LOAD_S if content.load_s is None else content.load_s


def log_doubts(copy: Copy) -> None:
    for doubt in copy.doubts:
        _log.warning("The adapter %s: %s", copy.version, doubt)
