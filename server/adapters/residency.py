"""Host -> device: who is on the device, who makes room, and the end of what nobody can ask for any more.

Owns slots and residency holds. Knows nothing about names, files or requests.
"""

import itertools
import threading
import time
from dataclasses import dataclass

from server.adapters.books import Books
from server.adapters.catalog import AdapterVersion, Content
from server.adapters.host import HostTier
from server.adapters.host_adapter import HostAdapter
from server.adapters.loader import Loader
from server.adapters.room import Device, never_fits, pinned_full
from server.adapters.rows import NoRoom
from server.adapters.workers import Workers
from server.ground.errors import Overloaded


@dataclass(frozen=True, slots=True)
class Freed:
    """The bytes by which two tiers shrank."""

    host_bytes: int
    device_bytes: int


class Residency:
    """The contents on the device."""

    def __init__(self, books: Books, workers: Workers, loader: Loader, host: HostTier, device: Device) -> None:
        self._books = books
        self._workers = workers
        self._loader = loader
        self._host = host
        self._device = device
        self._placing = threading.Lock()
        self._resident: dict[str, Content] = {}
        self._uses = itertools.count(1)
        self.promotions_total = self.evictions_total = 0

    @property
    def num_resident(self) -> int:
        return len(self._resident)

    def admit(self, version: AdapterVersion) -> int | None:
        """`Registry.admit`."""
        with self._books.lock:
            content = self._held_content(version)
            if content.slot is not None and content.num_unloads == 0:
                return self._hold(content)
        with self._placing:
            with self._books.lock:
                adapter = self._on_host(content) if content.num_unloads == 0 else None
            if adapter is None or not self._bring(content, adapter):
                return None
            with self._books.lock:  # an unload that began meanwhile sees that nothing runs
                return self._hold(content) if content.num_unloads == 0 else None

    def bring(self, content: Content) -> bool:
        """Puts on the device, with no hold on it, what is on the host. Whether it is there then.

        Idle adapters make room, as for an admission. Raises Conflict where only pinned ones are in the way.
        """
        with self._placing:
            with self._books.lock:
                is_free = content.num_unloads == 0 and self._books.catalog.contents.get(content.digest) is content
                adapter = self._host.get(content.digest) if is_free else None
                if content.slot is not None:
                    return True
            return adapter is not None and self._bring(content, adapter)

    def bring_within(self, content: Content, max_wait_s: float) -> None:
        """As `bring`, waiting for others to make room. Raises Overloaded if they do not within the time."""
        deadline = time.monotonic() + max_wait_s
        while True:
            with self._books.lock:
                num_seen = self._books.num_easings
            if self.bring(content):
                return
            if not self._is_eased_within(num_seen, deadline - time.monotonic()):
                raise Overloaded(
                    f"Every adapter on the device was in use for {max_wait_s:g} s, and this one found no room: ask "
                    f"again when less is running."
                )

    def _is_eased_within(self, num_seen: int, wait_s: float) -> bool:
        """Whether there is a reason to look again. Raises Overloaded at the end of the server."""
        with self._books.eased:
            is_eased = self._books.eased.wait_for(lambda: self._books.num_easings != num_seen, wait_s)
            self._workers.check_open()
            return is_eased

    def free(self, content: Content) -> Freed:
        """Takes an idle content off device and host, under an unload that keeps it idle; the bytes that this freed."""
        with self._placing:
            with self._books.lock:
                if self._books.catalog.contents.get(content.digest) is not content:
                    return Freed(0, 0)  # deleted, and so freed, in between
                if content.num_residencies:
                    raise RuntimeError(f"{content.digest[:12]} is to be freed while sequences run on it")
                host_bytes = self._host.drop(content.digest)
                was_resident = content.slot is not None
                if was_resident:
                    self._unplace(content)
            return Freed(host_bytes, self._device.release(content.digest) if was_resident else 0)

    def retire(self, version: AdapterVersion) -> None:
        """`Registry.retire`."""
        with self._books.lock:
            content = self._held_content(version)
            if content.num_residencies == 0:
                raise RuntimeError(f"{version} was retired more often than admitted")
            content.num_residencies -= 1
            content.last_use = next(self._uses)
            self._books.ease()
            is_over = not content.copies and content.num_residencies == 0
        if is_over:
            self._workers.later(self.purge, content)

    def purge(self, content: Content) -> None:
        """Frees a content on host and device if no copy of it is left."""
        with self._placing:
            with self._books.lock:
                catalog = self._books.catalog
                if content.copies or content.num_residencies or catalog.contents.get(content.digest) is not content:
                    return
                del catalog.contents[content.digest]
                self._host.drop(content.digest)
                was_resident = content.slot is not None
                if was_resident:
                    self._unplace(content)
            if was_resident:
                self._device.release(content.digest)

    def integrity_checks(self) -> dict[str, bool]:
        """Under the lock: a sentence for each fault, and whether all is well."""
        contents = self._books.catalog.contents
        resident = {digest: content for digest, content in contents.items() if content.slot is not None}
        return {
            "the adapters with a slot are not those that count as resident": resident == self._resident,
            "two adapters have one slot": len({content.slot for content in resident.values()}) == len(resident),
        }

    def _held_content(self, version: AdapterVersion) -> Content:
        content = self._books.catalog.contents.get(version.digest)
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
            self._loader.start_if_cold(content)
        return adapter

    def _bring(self, content: Content, adapter: HostAdapter) -> bool:
        """Under `placing`, of what has no slot or has just been given one."""
        slot = self._place(content.digest, adapter) if content.slot is None else content.slot
        if slot is None:
            return False
        with self._books.lock:
            if content.slot is None:
                self._note_slot(content, slot)
        return True

    def _place(self, digest: str, adapter: HostAdapter) -> int | None:
        """Puts an adapter on the device, evicting idle ones one by one; None if that does not make room.

        Raises AdapterRejected or Conflict where waiting would not make room either.
        """
        while True:
            try:
                return self._device.admit(digest, adapter)
            except NoRoom:
                if not self._evict_one():
                    self._check_room_can_come(adapter)
                    return None

    def _check_room_can_come(self, adapter: HostAdapter) -> None:
        with self._books.lock:
            residents = tuple(self._resident.values())
            are_pinned = all(content.is_pinned for content in residents)
        if not residents:
            raise never_fits(self._device, adapter)
        if are_pinned:
            raise pinned_full(self._device, adapter)

    def _evict_one(self) -> bool:
        """Takes the least recently used adapter off the device that nothing holds, unleased ones first."""
        with self._books.lock:
            residents = self._resident.values()
            idle = [content for content in residents if content.num_residencies == 0 and not content.is_pinned]
            if not idle:
                return False
            victim = min(idle, key=lambda content: (content.num_leases > 0, content.last_use))
            self._unplace(victim)
            self.evictions_total += 1
        self._device.release(victim.digest)
        return True

    def _note_slot(self, content: Content, slot: int) -> None:
        content.slot = slot
        content.last_use = next(self._uses)
        self._resident[content.digest] = content
        self.promotions_total += 1

    def _unplace(self, content: Content) -> None:
        content.slot = None
        self._books.ease()  # who tries again now waits for `placing`, under which the rows are given back
        del self._resident[content.digest]
