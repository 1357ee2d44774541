"""Adapters moved by hand: load, unload, pin and unpin, for those who know better than the least recently used.

Owns the waits of these verbs, and how much may be pinned. Knows nothing about HTTP, files or slots.
"""

import time
from dataclasses import dataclass

from server.adapters.asker import current_asker
from server.adapters.books import Books
from server.adapters.catalog import AdapterVersion, Content, Copy
from server.adapters.host import HostTier
from server.adapters.lease import Leases
from server.adapters.loader import Loader
from server.adapters.residency import Freed, Residency
from server.adapters.room import Device
from server.adapters.workers import Workers
from server.ground.errors import Conflict, Overloaded


@dataclass(frozen=True, slots=True)
class Unloaded:
    """The end of an unload: which version left host and device, what that freed, and how long the drain took."""

    version: AdapterVersion
    freed: Freed
    duration_s: float


class Custody:
    """The verbs on where a version's bytes are. All block: for worker threads."""

    def __init__(
        self,
        books: Books,
        workers: Workers,
        host: HostTier,
        device: Device,
        loader: Loader,
        residency: Residency,
        leases: Leases,
    ) -> None:
        self._books = books
        self._workers = workers
        self._host = host
        self._device = device
        self._loader = loader
        self._residency = residency
        self._leases = leases
        self.unloads_total = 0

    def load(self, spec: str) -> Copy:
        """`Registry.load`."""
        with self._leases.hold(spec) as lease:
            copy = lease.copy
            assert copy is not None
            with self._books.eased:
                self._loader.await_end(copy)
            self._residency.bring(copy.content)
            return copy

    def unload(self, spec: str, max_wait_s: float) -> Unloaded:
        """`Registry.unload`."""
        begun_s = time.monotonic()
        copy, is_others_too = self._begin_unload(spec)
        freed = Freed(0, 0)
        try:
            if not is_others_too:
                self._await_idle(copy, max_wait_s)
                freed = self._residency.free(copy.content)
        finally:
            with self._books.lock:
                copy.content.num_unloads -= not is_others_too
                self._books.ease()
        return Unloaded(copy.version, freed, time.monotonic() - begun_s)

    def pin(self, spec: str, max_wait_s: float) -> Copy:
        """`Registry.pin`."""
        with self._leases.hold(spec) as lease:
            copy = lease.copy
            assert copy is not None
            was_pinned = self._mark_pinned(copy)
            is_done = False
            try:
                self._residency.bring_within(copy.content, max_wait_s)
                is_done = True
            finally:
                if not is_done:
                    self._mark(copy, is_pinned=was_pinned)
            return copy

    def unpin(self, spec: str) -> Copy:
        """`Registry.unpin`."""
        with self._books.lock:
            copy = self._books.catalog.find(spec)
        if copy is None:
            raise self._books.unknown(spec)
        self._mark(copy, is_pinned=False)
        return copy

    # Unload

    def _begin_unload(self, spec: str) -> tuple[Copy, bool]:
        """The version, of which no residency begins until the unload has ended; whether others own its content, too.

        Such a content stays where it is: nobody is to unload what another uses.
        """
        asker, is_others_too = current_asker(), False
        with self._books.lock:
            self._workers.check_open()
            copy = self._books.catalog.find(spec)
            if copy is not None:
                asker.check_owns(copy.version.name, copy.owner)
                is_others_too = not all(asker.owns(other.owner) for other in copy.content.copies)
                if not is_others_too:
                    self._check_unpinned(copy.content)
                copy.content.num_unloads += not is_others_too
        if copy is None:
            raise self._books.unknown(spec)
        return copy, is_others_too

    def _check_unpinned(self, content: Content) -> None:
        pinned = [str(copy.version) for copy in content.copies if copy.is_pinned]
        if pinned:
            raise Conflict(
                f"{' and '.join(pinned)} is pinned and stays where it is: POST /v1/adapters/{pinned[0]}/unpin first.",
                param="adapter",
            )

    def _await_idle(self, copy: Copy, max_wait_s: float) -> None:
        content = copy.content

        def is_idle() -> bool:
            return not (content.is_loading or content.is_copying or content.num_residencies)

        with self._books.eased:
            self._books.eased.wait_for(lambda: self._workers.is_closed or is_idle(), max_wait_s)
            self._workers.check_open()
            if not is_idle():
                raise Conflict(
                    f"{content.num_residencies} sequences still ran on {copy.version} after {max_wait_s:g} s, and "
                    f"nothing was freed: ask again, or wait longer with ?max_wait_s=.",
                    param="adapter",
                )
            self.unloads_total += 1

    # Pin

    def _mark(self, copy: Copy, *, is_pinned: bool) -> None:
        with self._books.lock:
            copy.is_pinned = is_pinned and copy.is_listed
            self._loader.settle(copy.content)
            self._books.ease()

    def _mark_pinned(self, copy: Copy) -> bool:
        """Brings a version to the host and keeps it there; whether it was pinned before. Raises Conflict."""
        content = copy.content
        with self._books.eased:
            is_kept = False
            while not is_kept:  # it may be evicted as soon as it is there
                self._loader.start_if_cold(content, (copy.version,), is_for_host=True)
                self._loader.await_end(copy)
                self._check_can_pin(copy)
                is_kept = self._host.keep(content.digest)
            was_pinned, copy.is_pinned = copy.is_pinned, copy.is_listed
            self._loader.settle(content)
            return was_pinned

    def _check_can_pin(self, copy: Copy) -> None:
        """Under the lock: what stays unpinned must have room for one adapter, the largest that is known."""
        if copy.content.num_unloads:
            raise Overloaded(f"{copy.version} is being unloaded: ask again when that has ended.")
        contents = [content for content in self._books.catalog.contents.values() if not content.portions]
        sizes = [content.sizes for content in contents if content.sizes is not None]
        pinned = [c.sizes for c in contents if c.sizes is not None and (c.is_pinned or c is copy.content)]
        _check_leaves_room(
            copy.version, sum(s.needed_bytes for s in pinned), max(s.needed_bytes for s in sizes),
            self._device.capacity_bytes, "device", "--adapter-memory",
        )  # fmt: skip
        _check_leaves_room(
            copy.version, sum(s.host_bytes for s in pinned), max(s.host_bytes for s in sizes),
            self._host.max_bytes, "host", "--host-memory",
        )  # fmt: skip


def _check_leaves_room(
    version: AdapterVersion, pinned_bytes: int, largest_bytes: int, max_bytes: int, tier: str, flag: str
) -> None:
    if pinned_bytes + largest_bytes > max_bytes:
        raise Conflict(
            f"With {version}, pinned adapters would take {pinned_bytes} of the {max_bytes} bytes that adapters may use "
            f"on the {tier}, and the largest adapter needs {largest_bytes}: unpin another, or start the server with a "
            f"larger {flag}.",
            param="adapter",
        )
