"""Leases: a request's hold on a version, and what is let go with the last one.

Owns the count of holds. Knows nothing about where an adapter's bytes are.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from server.adapters.books import Books
from server.adapters.catalog import Copy
from server.adapters.loader import Loader
from server.adapters.residency import Residency
from server.adapters.workers import Workers


class Lease:
    """A hold on one version, from a request's acceptance to its end: until then it can be neither changed nor lost."""

    def __init__(self, copy: Copy, end: Callable[["Lease"], None]) -> None:
        self.version = copy.version
        self.has_doubts = bool(copy.doubts)  # the adapter seems to be of another base
        self.copy: Copy | None = copy  # the registry's; None once released
        self._end = end

    def release(self) -> None:
        """Ends the hold; does nothing the second time. Never blocks, from any thread."""
        self._end(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class Leases:
    """All leases of a registry."""

    def __init__(self, books: Books, workers: Workers, loader: Loader, residency: Residency) -> None:
        self._books = books
        self._workers = workers
        self._loader = loader
        self._residency = residency

    def lease(self, spec: str) -> Lease:
        """`Registry.lease`."""
        return self.hold(spec, is_use=True)

    def hold(self, spec: str, *, is_use: bool = False) -> Lease:
        """A lease; one for the registry's own verbs is no use of the adapter and is not counted."""
        with self._books.lock:
            self._workers.check_open()
            copy = self._books.catalog.find(spec)
            if copy is not None:
                self._books.check_base(copy.doubts)
                self._loader.start_if_cold(copy.content)
                copy.num_leases += 1
                if is_use:
                    copy.num_requests += 1
                    copy.last_used = int(time.time())
        if copy is None:
            raise self._books.unknown(spec)
        return Lease(copy, self._end)

    def dispose(self, copy: Copy) -> None:
        """Removes what is left of a copy that was let go. Blocks."""
        if copy.discarded is not None:
            copy.discarded.remove()
        self._residency.purge(copy.content)

    def _end(self, lease: Lease) -> None:
        with self._books.lock:
            copy, lease.copy = lease.copy, None
            if copy is None:
                return
            copy.num_leases -= 1
            is_over = self._books.catalog.let_go_if_over(copy)
        if is_over:
            self._workers.later(self.dispose, copy)
