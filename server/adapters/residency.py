"""Host -> device: who is on the device, who makes room, and the end of what nobody can ask for any more.

Owns slots and residency holds. Knows nothing about names, files or requests.
"""

import itertools
import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from server.adapters.books import Books
from server.adapters.catalog import AdapterVersion, Content
from server.adapters.device.rows import NoRoom
from server.adapters.eviction import EvictionOrder, Worth
from server.adapters.host import HostTier
from server.adapters.host_adapter import HostAdapter
from server.adapters.loader import Loader, ObserveLoad, reload_s
from server.adapters.room import Device, never_fits, pinned_full
from server.adapters.workers import Workers
from server.ground.errors import Overloaded
from server.model.exhaustion import free_device_memory, is_out_of_memory

COPIED_INLINE_BYTES = 4 << 20  # an adapter up to this is put on the device between two steps, in some milliseconds
_COPIED_BYTES_PER_S = 2e9  # from host to device, about: what a reload costs of an adapter that is on the host

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Freed:
    """The bytes by which two tiers shrank."""

    host_bytes: int
    device_bytes: int


class Residency:
    """The contents on the device."""

    def __init__(
        self,
        books: Books,
        workers: Workers,
        copiers: Workers,
        loader: Loader,
        host: HostTier,
        device: Device,
        observe: ObserveLoad,
    ) -> None:
        """`copiers` put on the device what would hold up a step, or is not asked for yet."""
        self._books = books
        self._workers = workers
        self._copiers = copiers
        self._loader = loader
        self._host = host
        self._device = device
        self._observe = observe
        self._placing = threading.RLock()
        self._resident: dict[str, Content] = {}
        self._order: EvictionOrder[str] = EvictionOrder()  # of all these
        self._num_copying = 0
        self._uses = itertools.count(1)
        self.promotions_total = self.evictions_total = 0

    @property
    def num_resident(self) -> int:
        return len(self._resident)

    def residents(self) -> tuple[Content, ...]:
        """Under the lock: what is on the device."""
        return tuple(self._resident.values())

    def tier_of(self, content: Content) -> str:
        """Under the lock: the best tier that has it, "store", "host" or "device"."""
        if content.slot is not None:
            return "device"
        return "host" if self._host.holds(content.digest) else "store"

    def admit(self, version: AdapterVersion) -> int | None:
        """`Registry.admit`."""
        with self._books.lock:
            content = self._held_content(version)
            if content.slot is not None and content.num_unloads == 0:
                return self._hold(content)
            adapter = self._placeable(content)
        if adapter is None or not self._placing.acquire(blocking=False):
            return None  # another thread is changing what is there; a step does not wait for it
        try:
            if not self._bring_inline(content, adapter):
                return None
            with self._books.lock:  # an unload that began meanwhile sees that nothing runs
                return self._hold(content) if content.num_unloads == 0 else None
        finally:
            self._placing.release()

    def _bring_inline(self, content: Content, adapter: HostAdapter) -> bool:
        """Under `placing`: puts an adapter on the device between two steps. Whether it is there."""
        with self._books.lock:  # which another thread may have begun, or done, since it was looked at
            is_there, is_on_its_way = content.slot is not None, content.is_copying
        if is_there or is_on_its_way or not self._reserve(content, adapter):
            return is_there
        if _is_large(content) and self._hand_to_copier(content):
            return False
        return self._copy(content)

    def _hand_to_copier(self, content: Content) -> bool:
        """What has its room is copied beside the steps. False at the end of the server."""
        with self._books.lock:
            if self._copiers.is_closed:
                return False
            self._copiers.submit(self._finish_copy_for_steps, content)
            self._begin_copying(content)
            return True

    def _placeable(self, content: Content) -> HostAdapter | None:
        """Under the lock: what can be tried to be put on the device between two steps. Else None, and it is seen to."""
        if content.num_unloads == 0 and content.refused_at == self._books.num_easings:
            return None  # nothing has changed that could make room
        content.refused_at = None
        failure, content.copy_failure = content.copy_failure, None
        if failure is not None:
            raise failure
        if content.num_unloads or content.is_promoting or content.is_copying or content.is_loading:
            return None  # a load's end tells what the adapter takes; what is on the host before is not yet known
        adapter = self._on_host(content)
        if adapter is not None and _is_large(content) and not content.must_reserve_inline:
            self._promote(content, is_early=False)
            return None
        return adapter

    def prefetch(self, version: AdapterVersion) -> None:
        """Begins to put on the device what a request will need and no step would wait for.

        Takes no room from what another request has asked for, nor from what is worth more.
        """
        with self._books.lock:
            content = self._held_content(version)
            content.copy_failure = None  # one that nobody has waited for
            is_away = content.slot is None and not content.is_promoting and self._host.holds(content.digest)
            if is_away and _is_large(content) and not self._copiers.is_closed:
                self._promote(content, is_early=True)

    def _promote(self, content: Content, *, is_early: bool) -> None:
        """Under the lock."""
        self._copiers.submit(self._bring_beside_steps, content, is_early=is_early)
        content.is_promoting = True

    def _bring_beside_steps(self, content: Content, *, is_early: bool) -> None:
        is_there, failure = False, None
        try:
            is_there = self.bring(content, is_early=is_early)
        except Overloaded as error:
            failure = None if is_early else error
        finally:
            with self._books.lock:
                content.is_promoting = False
                content.must_reserve_inline = not is_there and not is_early
                content.copy_failure = failure

    def lacks_room(self, version: AdapterVersion) -> bool:
        """`Registry.lacks_room`."""
        with self._books.lock:
            return self._held_content(version).refused_at is not None

    def num_virtual_tokens(self, version: AdapterVersion) -> int | None:
        """`Registry.num_virtual_tokens`."""
        with self._books.lock:
            sizes = self._held_content(version).sizes
            return None if sizes is None else sizes.num_virtual_tokens

    def least_valuable(self, versions: Iterable[AdapterVersion]) -> AdapterVersion | None:
        """`Registry.least_valuable`."""
        with self._books.lock:
            contents = {version: self._held_content(version) for version in versions}
            may_leave = [version for version, content in contents.items() if not content.is_pinned]
            return min(may_leave, key=lambda version: self._worth(contents[version]), default=None)

    def bring(self, content: Content, *, is_early: bool = False) -> bool:
        """Puts on the device, with no hold on it, what is on the host. Whether it is there then.

        Idle adapters make room, as for an admission; if it is early, only what no request waits for and is worth less.
        Steps, admissions and other copies go on beside the copy. Raises Conflict where only pinned ones are in the way.
        """
        if not self._begin_copy(content, is_early=is_early):
            return content.slot is not None
        return self._finish_copy(content)

    def _begin_copying(self, content: Content) -> None:
        """Under the lock."""
        content.is_copying = True
        self._num_copying += 1

    def _finish_copy(self, content: Content) -> bool:
        """Copies, beside the steps, into the room that was taken. Whether the content has a slot then."""
        try:
            return self._copy(content)
        finally:
            with self._books.lock:
                content.is_copying = False
                self._num_copying -= 1
                self._books.ease()
            self.purge(content)  # what was deleted meanwhile

    def _finish_copy_for_steps(self, content: Content) -> None:
        """As `_finish_copy`; who waits for it asks again at the next step, and is then told of a failure."""
        try:
            self._finish_copy(content)
        except Overloaded as error:
            with self._books.lock:
                content.copy_failure = error

    def _copy(self, content: Content) -> bool:
        """Copies, and ends the placement, whether that went well or not. Raises Overloaded where the device fails."""
        begun_s = time.perf_counter()
        is_copied = False
        try:
            self._fill(content)
            is_copied = True
        finally:
            is_there = self._end_placement(content, is_copied=is_copied)
        if is_there:
            self._observe("host_to_device", time.perf_counter() - begun_s)
        return is_there

    def _fill(self, content: Content) -> None:
        """Copies; where that runs out of memory, once more with what can be given back, an idle adapter's too."""
        if self._is_filled(content):
            return
        free_device_memory()
        with self._placing:
            self._evict_one()
        if not self._is_filled(content):
            raise Overloaded("There was no memory to put the adapter on the device: ask again when less is running.")

    def _is_filled(self, content: Content) -> bool:
        """Copies; False where there was no memory. Raises Overloaded for what else a device may say."""
        try:
            self._device.copy(content.digest)
        except (RuntimeError, MemoryError) as error:
            _log.warning("An adapter could not be put on the device: %s", error)
            if not is_out_of_memory(error):
                raise Overloaded(f"The adapter could not be put on the device: {error}") from error
            return False
        return True

    def _begin_copy(self, content: Content, *, is_early: bool) -> bool:
        """Takes the room for what is on the host, once another thread's copy of it has ended. Whether there is
        something to copy."""
        while True:
            with self._books.eased:
                self._books.eased.wait_for(lambda: not content.is_copying)
            with self._placing:
                with self._books.lock:
                    if content.is_copying:
                        continue
                    is_free = content.num_unloads == 0 and self._books.catalog.contents.get(content.digest) is content
                    is_away = is_free and content.slot is None
                    adapter = self._host.get(content.digest) if is_away else None
                if adapter is None or not self._reserve(content, adapter, is_early=is_early):
                    return False
                with self._books.lock:
                    self._begin_copying(content)
                return True

    def _end_placement(self, content: Content, *, is_copied: bool) -> bool:
        """Gives a slot to what was copied, unless nobody wants it any more. Whether it has one."""
        with self._placing:
            with self._books.lock:
                is_known = self._books.catalog.contents.get(content.digest) is content
                is_wanted = is_copied and is_known and content.num_unloads == 0
            if not is_wanted:
                self._device.abandon(content.digest)
                return False
            try:
                slot = self._device.place(content.digest)
            except BaseException as error:
                self._device.abandon(content.digest)
                if isinstance(error, RuntimeError | MemoryError):  # the device's: its memory is full, or it is lost
                    raise Overloaded(f"The adapter could not be put on the device: {error}") from error
                raise
            with self._books.lock:
                self._note_slot(content, slot)
            return True

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
            content.uses.last = next(self._uses)  # while it ran, it did not fade
            self._books.ease()
            is_over = content.is_over and content.num_residencies == 0
        if is_over:
            self._workers.later(self.purge, content)

    def purge(self, content: Content) -> None:
        """Frees a content on host and device if it is over."""
        with self._placing:
            with self._books.lock:
                catalog = self._books.catalog
                is_wanted = not content.is_over or content.num_residencies > 0 or content.is_copying
                if is_wanted or catalog.contents.get(content.digest) is not content:
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
            "the adapters that may make room are not those on the device": self._order.members == set(self._resident),
            "two adapters have one slot": len({content.slot for content in resident.values()}) == len(resident),
        }

    def _held_content(self, version: AdapterVersion) -> Content:
        content = self._books.catalog.contents.get(version.digest)
        if content is None:
            raise RuntimeError(f"{version} is used without a lease")
        return content

    def _hold(self, content: Content) -> int | None:
        content.num_residencies += 1
        content.uses.add(next(self._uses))
        return content.slot

    def _on_host(self, content: Content) -> HostAdapter | None:
        adapter = self._host.get(content.digest)
        if adapter is None:
            self._loader.start_if_cold(content)
        return adapter

    def _reserve(self, content: Content, adapter: HostAdapter, *, is_early: bool = False) -> bool:
        """Under `placing`: takes room on the device, evicting idle adapters one by one. Whether there was enough.

        Raises AdapterRejected or Conflict where waiting would not make room either.
        """
        with self._books.lock:
            num_seen = self._books.num_easings  # before, so that what eases meanwhile is a reason to try again
        while True:
            try:
                self._device.reserve(content.digest, adapter)
                return True
            except NoRoom:
                if self._evict_one(below=content if is_early else None):
                    continue
                if not is_early:
                    self._check_room_can_come(adapter)
                with self._books.lock:
                    content.refused_at = None if is_early else num_seen
                return False

    def _check_room_can_come(self, adapter: HostAdapter) -> None:
        with self._books.lock:
            if self._num_copying:
                return  # and may leave again
            residents = tuple(self._resident.values())
            are_pinned = all(content.is_pinned for content in residents)
        if not residents:
            raise never_fits(self._device, adapter)
        if are_pinned:
            raise pinned_full(self._device, adapter)

    def _evict_one(self, *, below: Content | None = None) -> bool:
        """Takes the least valuable adapter off the device that nothing holds, unleased ones first.

        With `below` only one that is unleased and worth less than that. Whether there was one.
        """
        with self._books.lock:
            least = self._order.least(self._worth_of_idle)
            if least is None:
                return False
            victim = self._resident[least]
            if below is not None and self._worth(victim) >= (False, self._worth(below)[1]):
                return False
            self._unplace(victim)
            self.evictions_total += 1
        self._device.release(victim.digest)
        return True

    def _worth_of_idle(self, digest: str) -> tuple[bool, Worth] | None:
        content = self._resident[digest]
        return None if content.num_residencies or content.is_pinned else self._worth(content)

    def _worth(self, content: Content) -> tuple[bool, Worth]:
        """Of its place on the device; dear where it would have to come from the store again. So it falls where that is
        no longer so, and the order learns of it when it comes to this content."""
        num_bytes = content.sizes.device_bytes if content.sizes is not None else 0
        load_s = 0.0 if self._host.holds(content.digest) else reload_s(content)
        return content.worth(load_s + num_bytes / _COPIED_BYTES_PER_S, num_bytes)

    def _note_slot(self, content: Content, slot: int) -> None:
        content.slot = slot
        content.must_reserve_inline = False
        content.uses.last = next(self._uses)  # brought by hand, it is as good as just used
        self._resident[content.digest] = content
        self._order.add(content.digest)
        self.promotions_total += 1

    def _unplace(self, content: Content) -> None:
        content.slot = None
        self._books.ease()  # who tries again now waits for `placing`, under which the rows are given back
        del self._resident[content.digest]
        self._order.discard(content.digest)


def _is_large(content: Content) -> bool:
    """Whether a step would feel its copy."""
    return content.sizes is not None and content.sizes.device_bytes > COPIED_INLINE_BYTES
