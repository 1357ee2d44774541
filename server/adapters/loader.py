"""Store -> host: one load at a time per content, in the workers' threads, and what it taught.

Owns reading an adapter wherever a deletion may have moved it, the memory of a failure, and what may not be evicted
because it cannot be read again. Knows nothing about slots or who asks.
"""

import logging
import math
from collections.abc import Callable
from copy import copy as fresh
from pathlib import Path

from server.adapters.books import Books
from server.adapters.catalog import Content, Copy, Facts, Sizes
from server.adapters.host import HostTier
from server.adapters.host_adapter import HostAdapter
from server.adapters.method import Lowered
from server.adapters.room import Device, measure
from server.adapters.workers import Workers
from server.ground.errors import AdapterNotFound, AdapterRejected, GenerationFailed, GraftError, Overloaded

FAILURE_MEMORY_S = 5.0  # a failed load is not tried again before this

_log = logging.getLogger(__name__)


class Loader:
    """Brings contents to the host. Safe for many threads."""

    def __init__(
        self,
        books: Books,
        workers: Workers,
        host: HostTier,
        device: Device,
        load: Callable[[Path], Lowered],
        clock: Callable[[], float],
    ) -> None:
        """`load` reads and lowers a folder; `device` says what can never fit; `clock` gives seconds."""
        self._books = books
        self._workers = workers
        self._host = host
        self._device = device
        self._load = load
        self._clock = clock
        self.loads_total = self.load_failures_total = 0

    def start_if_cold(self, content: Content, *, is_for_host: bool = False) -> None:
        """Under the lock. What is on the device is not cold, unless it is wanted on the host.

        Raises the last load's failure while it is fresh.
        """
        is_ready = content.slot is not None and not is_for_host
        if content.is_loading or is_ready or self._host.holds(content.digest):
            return
        if content.failure is not None and self._clock() - content.failed_at_s < FAILURE_MEMORY_S:
            raise fresh(content.failure)  # a raised error collects a traceback: each requester has its own
        self._workers.submit(self._bring_to_host, content)
        content.is_loading = True
        content.failure = None

    def await_end(self, content: Content) -> None:
        """Under the lock, which it gives away while it waits. Raises what the load raised."""
        self._books.eased.wait_for(lambda: not content.is_loading)
        if content.failure is not None:
            raise fresh(content.failure)

    def lower(self, folder: Path) -> Lowered:
        """Reads and lowers a folder. Raises AdapterRejected where the disk fails, and what `load` raises."""
        try:
            return self._load(folder)
        except OSError as error:
            _log.warning("The adapter in %s cannot be read: %s", folder, error)
            raise AdapterRejected(
                f"The adapter's files cannot be read ({error.strerror or error}): check the server's disk, or upload "
                f"the adapter again.",
                param="adapter",
            ) from error

    def put(self, digest: str, lowered: Lowered) -> tuple[HostAdapter, Sizes]:
        """Keeps a lowered adapter on the host. Raises AdapterRejected if host or device is too small for it."""
        adapter = self._host.put(digest, lowered)
        return adapter, measure(self._device, adapter)

    def drop_if_orphan(self, digest: str) -> None:
        """Under the lock: a load may end after the last that wanted it has gone."""
        if digest not in self._books.catalog.contents:
            self._host.drop(digest)

    def settle(self, content: Content) -> None:
        """Under the lock, after a change of its copies: what is pinned or cannot be read again stays on the host."""
        if content.is_pinned or (content.copies and all(copy.is_outdated for copy in content.copies)):
            self._host.keep(content.digest)
        else:
            self._host.unkeep(content.digest)

    def _bring_to_host(self, content: Content) -> None:
        failure: GraftError | None = GenerationFailed("The adapter could not be loaded: the server's log says why.")
        try:
            self._learn(content, *self.put(content.digest, self._read(content)))
            failure = None
        except GraftError as error:
            self._host.drop(content.digest)  # there if the device alone is too small for it
            failure = error
        finally:
            self._end(content, failure)

    def _read(self, content: Content) -> Lowered:
        """Lowers one of the content's copies, wherever a deletion may have moved it meanwhile."""
        while True:
            with self._books.lock:
                self._workers.check_open()  # a server that stops does not finish its queue of loads
                # The last resort is a folder that has changed since: what is read there is refused below.
                copy = min(content.copies, key=lambda copy: copy.is_outdated, default=None)
                folder = copy.folder if copy is not None else None
            if copy is None or folder is None:
                raise AdapterNotFound("The adapter was deleted before it was loaded.", param="adapter")
            try:
                lowered = self.lower(folder)
            except GraftError:
                with self._books.changes, self._books.lock:  # a deletion is now either noted or not begun
                    if copy.folder == folder and copy in content.copies:
                        raise
                continue
            if copy.found is not None and not copy.found.is_intact():
                raise Overloaded(
                    f"The files of {copy.version} changed while they were read: ask again.",
                    retry_after_s=math.ceil(FAILURE_MEMORY_S),
                )
            return lowered

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
            versions = sorted(str(copy.version) for copy in content.copies) or [content.digest[:12]]
        _log.warning("The adapter %s could not be loaded: %s", ", ".join(versions), failure.message)


def log_doubts(copy: Copy) -> None:
    for doubt in copy.doubts:
        _log.warning("The adapter %s: %s", copy.version, doubt)
