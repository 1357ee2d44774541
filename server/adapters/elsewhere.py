"""What other servers change in a store that they share: brought into the catalog, now and then and when it is wanted.

Owns when the store is looked at. Knows nothing about what is in it, or how the catalog takes it up.
"""

import threading
from collections.abc import Callable

from server.adapters.books import Books
from server.adapters.lease import Leases
from server.adapters.store.adapter_store import AdapterStore
from server.adapters.store.folder_store import is_valid_name
from server.adapters.versions import Versions
from server.ground.errors import AdapterNotFound, BadRequest, StoreUnreachable

LOOK_MEMORY_S = 1.0  # a look for a name that is unknown here answers for all that are asked for within this time
_MAX_WAIT_S = 2.0  # for another's look, which may be waiting for a service that does not answer
_MAX_TRIES = 3  # of a look that changes made here keep overtaking; the next one is soon enough


class Elsewhere:
    """The looks at a shared store; of a store that no other server changes there are none. Safe for many threads."""

    def __init__(
        self, books: Books, store: AdapterStore, versions: Versions, leases: Leases, clock: Callable[[], float]
    ) -> None:
        self._books = books
        self._store = store
        self._versions = versions
        self._leases = leases
        self._clock = clock
        self._looking = threading.Lock()
        self._looked_at_s = clock()
        self._failure: StoreUnreachable | None = None  # of the last look

    def refresh(self) -> None:
        """Looks at the store now. Raises StoreUnreachable; then the catalog stays as it is."""
        if not self._store.is_shared:
            return
        asked_s = self._clock()
        with self._looking:
            if self._looked_at_s <= asked_s:
                self._look()
            elif self._failure is not None:  # of a look that began meanwhile, and is as good
                raise StoreUnreachable(self._failure.message)

    def look_for(self, spec: str) -> None:
        """Looks once for an adapter that is unknown here: it may have come to another server a moment ago.

        However many names are asked for, the store is looked at once in LOOK_MEMORY_S. Raises StoreUnreachable where
        that fails, or takes long: whether there is such an adapter is not known then.
        """
        if not self.may_have(spec):
            return
        if not self._looking.acquire(timeout=_MAX_WAIT_S):
            raise StoreUnreachable(f"The adapter store {self._store.location} takes long to answer: ask again.")
        try:
            if self._clock() - self._looked_at_s >= LOOK_MEMORY_S:
                self._look()
            elif self._failure is not None:
                raise StoreUnreachable(self._failure.message)
        finally:
            self._looking.release()

    def may_have(self, spec: str) -> bool:
        """Whether an adapter that is unknown here may have come to another server. Never blocks."""
        return self._store.is_shared and is_valid_name(spec.partition("@")[0]) and not self._is_known(spec)

    def _is_known(self, spec: str) -> bool:
        try:
            with self._books.lock:
                return self._books.catalog.find(spec) is not None
        except AdapterNotFound:  # the name is known, and the version is not
            return False
        except BadRequest:  # whoever leases it hears what is wrong
            return True

    def _look(self) -> None:
        """Under `looking`."""
        begun_s = self._clock()
        try:
            self._take_up()
            self._failure = None
        except StoreUnreachable as failure:
            self._failure, begun_s = failure, self._clock()  # a failure may take longer than it is remembered
            raise
        finally:
            self._looked_at_s = begun_s

    def _take_up(self) -> None:
        for _ in range(_MAX_TRIES):
            with self._books.changes:
                num_changes = self._versions.num_changes
            names = self._store.scan()  # not under `changes`: it may wait for a network
            with self._books.changes:
                # What was seen before a change that was made here since would undo it in the catalog.
                is_new = num_changes == self._versions.num_changes
                over = self._versions.follow(names) if is_new else []
            for copy in over:
                self._leases.dispose(copy)
            if is_new:
                return
