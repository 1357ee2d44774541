"""All fetches of a server: which run, which wait, how far they are, how they ended.

Owns their threads, their order, single flight and what is remembered of failures. Knows nothing about HTTP or kinds of
places.

Every fetch has a thread of its own, because a source may keep it waiting: neither a request nor another fetch waits
with it. One that is cancelled is over for everybody at once; its thread ends when its source next answers or times out,
and counts against MAX_THREADS until then.
"""

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from typing import Literal, Protocol

from server.adapters.adapter_info import Provenance, Registered
from server.adapters.asker import current_asker
from server.adapters.audit import note
from server.adapters.registry import Registry
from server.adapters.remote.address import Address, AllowList
from server.adapters.remote.places import Place, as_refusal, open_place
from server.adapters.remote.transfer import Meter, announced_bytes, transfer
from server.adapters.store.folder_store import Incoming, check_name
from server.ground.errors import AdapterNotFound, AdapterOnItsWay, Conflict, GraftError, Overloaded

MAX_RUNNING = 4
MAX_THREADS = 16  # those of cancelled fetches counted
MAX_WAITING = 256
MAX_WAITING_OF_OWNER = 32  # but the operator
MAX_FAILURES = 64  # that are remembered, the latest
FAILURE_MEMORY_S = 3600.0
_CLOSING_S = 1.0  # for threads to end; one that still waits for its source does not hold up the end of the process
_RETRY_S = (1, 30)  # bounds of what a request for an adapter on its way is told to wait

_log = logging.getLogger(__name__)

Status = Literal["queued", "fetching", "validating", "failed"]


@dataclass(frozen=True, slots=True)
class Order:
    """What a fetch is for. Equal orders are one fetch."""

    name: str
    address: Address
    replace: bool = False
    base_fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class FetchInfo:
    """What there is to tell of a fetch that has not succeeded yet."""

    name: str
    source: str
    revision: str | None  # None until the source was asked, and where it names none
    status: Status
    bytes_done: int
    bytes_total: int | None  # None until the source has announced them
    failure: GraftError | None

    @property
    def progress(self) -> float | None:
        """0 to 1; None where the total is not known."""
        return None if self.bytes_total is None else min(self.bytes_done / max(self.bytes_total, 1), 1.0)


class Counts(Protocol):
    """Who is told of ends and bytes."""

    def count_fetch(self, outcome: str) -> None: ...
    def count_fetched_bytes(self, num_bytes: int) -> None: ...


class Fetch:
    """One fetch. `result` gets what its registration gave, or the GraftError that ended it."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.owner = current_asker().owner
        self.context = copy_context()  # its thread works in the name of who asked for it
        self.result: Future[Registered] = Future()
        self.result.set_running_or_notify_cancel()  # so that a client that leaves cannot cancel it for others
        self.status: Status = "queued"
        self.revision: str | None = None
        self.meter = Meter(self._check)

    def _check(self) -> None:
        if self.result.done():
            raise _Over

    def info(self) -> FetchInfo:
        failure = self.result.exception() if self.result.done() else None
        return FetchInfo(
            name=self.order.name,
            source=str(self.order.address),
            revision=self.revision,
            status="failed" if failure is not None else self.status,
            bytes_done=self.meter.bytes_done,
            bytes_total=self.meter.bytes_total,
            failure=failure if isinstance(failure, GraftError) else None,
        )


class _Over(Exception):
    """The fetch was cancelled: its thread has nothing left to do."""


class Fetches:
    """The fetches of one server. Safe for many threads; no call but `close` and `cancel` waits for a source."""

    def __init__(
        self,
        registry: Registry,
        allowed: AllowList,
        incoming: Callable[[], Incoming],
        counts: Counts,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`incoming` gives a place in the store for one upload."""
        self._registry = registry
        self._allowed = allowed
        self._incoming = incoming
        self._counts = counts
        self._clock = clock
        self._lock = threading.Lock()
        self._under_way: dict[str, Fetch] = {}  # by name; those that wait are also in
        self._waiting: deque[Fetch] = deque()
        self._num_running = 0
        self._threads: set[threading.Thread] = set()
        self._failures: OrderedDict[str, tuple[float, Fetch]] = OrderedDict()  # by name, with when
        self._is_closed = False
        registry.expect(self.find_arriving)

    # Verbs

    def begin(self, order: Order) -> Fetch:
        """Starts a fetch, or joins the one that is under way for an equal order.

        Raises BadRequest for a name that is none, Forbidden for a source that the operator does not allow, Conflict if
        another fetch for the name is under way or the name is another owner's, and Overloaded if too many wait.
        """
        check_name(order.name)
        self._registry.check_may_claim(order.name)
        asker = current_asker()
        self._allowed.check(order.address)
        with self._lock:
            if self._is_closed:
                raise _shutting_down()
            known = self._under_way.get(order.name)
            if known is not None:
                asker.check_may_claim(order.name, known.owner, exists=True)
                if known.order == order:
                    return known
                raise _under_way(known)
            if len(self._waiting) >= MAX_WAITING:
                raise Overloaded(f"{MAX_WAITING} fetches wait already: try again when some have ended.")
            if asker.owner is not None and self._num_waiting_of(asker.owner) >= MAX_WAITING_OF_OWNER:
                raise Overloaded(
                    f"{MAX_WAITING_OF_OWNER} fetches of this key's owner wait already: try again when some have ended."
                )
            fetch = Fetch(order)
            self._failures.pop(order.name, None)
            self._under_way[order.name] = fetch
            self._waiting.append(fetch)
            self._start_waiting()
        return fetch

    def cancel(self, name: str) -> bool:
        """Ends the fetch for a name, or forgets its failure; whether there was one that who asks may end.

        One whose files are there already is being registered, which cannot be stopped: this waits for its end, and is
        too late. Then there is an adapter, or a failure, which is forgotten.
        """
        with self._lock:
            fetch = self._known(name)
            asker = current_asker()
            if fetch is None or not (asker.sees(name, fetch.owner) and asker.owns(fetch.owner)):
                return False
            is_known = self._failures.pop(name, None) is not None
            if name not in self._under_way:
                return is_known
            if fetch.status != "validating":
                self._end(fetch, Conflict(f"The fetch of {name!r} was cancelled.", code="fetch_cancelled"), "cancelled")
                return True
        failure = fetch.result.exception()
        with self._lock:
            self._failures.pop(name, None)
        return failure is not None

    def stop(self) -> None:
        """Takes no more, and cancels those that can be."""
        with self._lock:
            self._is_closed = True
            for fetch in list(self._under_way.values()):
                if fetch.status != "validating":
                    self._end(fetch, _shutting_down(), "cancelled")

    def close(self) -> None:
        """Stops, waits for what is being registered, and a moment for the threads of the others."""
        self.stop()
        with self._lock:
            threads, validating = list(self._threads), [fetch.result for fetch in self._under_way.values()]
        wait(validating)
        deadline_s = time.monotonic() + _CLOSING_S
        for thread in threads:
            thread.join(max(deadline_s - time.monotonic(), 0))

    # Looking

    def info(self, name: str) -> FetchInfo | None:
        """The fetch for a name that is under way or has failed; None if there is none."""
        with self._lock:
            self._forget_old_failures()
            known = self._known(name)
            is_seen = known is not None and current_asker().sees(name, known.owner)
            return known.info() if known is not None and is_seen else None

    def list(self) -> tuple[FetchInfo, ...]:
        """Those under way, then the failures that are remembered, each in the order in which they came."""
        with self._lock:
            self._forget_old_failures()
            asker, fetches = current_asker(), (*self._under_way.values(), *(f for _, f in self._failures.values()))
            return tuple(fetch.info() for fetch in fetches if asker.sees(fetch.order.name, fetch.owner))

    def counts(self) -> tuple[int, int]:
        """How many run, and how many wait."""
        return self._num_running, len(self._waiting)

    def find_arriving(self, name: str) -> GraftError | None:
        """What to tell a request for an adapter that is not there, but was or is being fetched."""
        with self._lock:
            fetch = self._under_way.get(name)
        if fetch is not None and current_asker().sees(name, fetch.owner):
            return _on_its_way(fetch)
        failed = self.info(name)
        if failed is None or failed.failure is None:
            return None
        return AdapterNotFound(
            f"There is no adapter {name!r}: its fetch from {failed.source} failed. {failed.failure.message}",
            param="adapter",
        )

    def _known(self, name: str) -> Fetch | None:
        """Under the lock: the fetch for a name, under way or failed."""
        failed = self._failures.get(name)
        return self._under_way.get(name) or (failed[1] if failed is not None else None)

    def _num_waiting_of(self, owner: str) -> int:
        return sum(fetch.owner == owner for fetch in self._waiting)

    # The life of a fetch. `_start_waiting`, `_end` and `_forget_old_failures` run under the lock.

    def _start_waiting(self) -> None:
        while self._waiting and self._num_running < MAX_RUNNING and len(self._threads) < MAX_THREADS:
            fetch = self._waiting.popleft()
            fetch.status = "fetching"
            self._num_running += 1
            run = (self._run, fetch)
            thread = threading.Thread(target=fetch.context.run, args=run, name=f"fetch-{fetch.order.name}", daemon=True)
            self._threads.add(thread)
            thread.start()

    def _end(self, fetch: Fetch, ending: Registered | GraftError, outcome: str) -> None:
        """Once per fetch: its name is free, who waits is told, and the next one starts."""
        del self._under_way[fetch.order.name]
        if fetch.status == "queued":
            self._waiting.remove(fetch)
        else:
            self._num_running -= 1
        if isinstance(ending, Registered):
            fetch.result.set_result(ending)
        else:
            fetch.result.set_exception(ending)
        self._counts.count_fetch(outcome)
        self._start_waiting()

    def _run(self, fetch: Fetch) -> None:
        """The whole of a fetch, in its thread."""
        try:
            with suppress(_Over):
                self._finish(fetch, self._outcome(fetch))
        finally:
            self._counts.count_fetched_bytes(fetch.meter.bytes_done)
            with self._lock:
                self._threads.discard(threading.current_thread())
                self._start_waiting()

    def _outcome(self, fetch: Fetch) -> Registered | GraftError:
        try:
            return self._fetched(fetch)
        except _Over:
            raise
        except Exception as error:  # what a place's package raises is that fetch's end, and nobody may be left waiting
            refusal = as_refusal(error, fetch.order.address)
            note("fetch", adapter=fetch.order.name, source=str(fetch.order.address), result=refusal.code)
            _log.warning("The fetch of %r failed: %s", fetch.order.name, refusal.message)
            _log.debug("It failed here:", exc_info=error)
            return refusal

    def _fetched(self, fetch: Fetch) -> Registered:
        order = fetch.order
        with open_place(order.address, self._allowed) as place, self._incoming() as incoming:
            fetch.revision = place.revision
            known = self._same_revision(order, place)
            if known is not None:
                return known
            self._registry.check_room(announced_bytes(place), order.name)
            transfer(place, order.address, incoming, fetch.meter)
            with self._lock:
                if fetch.result.done():
                    raise _Over
                fetch.status = "validating"
            return self._registry.register(
                incoming,
                order.name,
                replace=order.replace,
                base_fingerprint=order.base_fingerprint,
                provenance=Provenance(str(order.address), place.revision),
            )

    def _same_revision(self, order: Order, place: Place) -> Registered | None:
        """The adapter that the name means, if it came from this very revision: then nothing has to be read again."""
        if place.revision is None or order.address.scheme != "hf" or order.base_fingerprint is not None:
            return None
        try:
            info = self._registry.describe(order.name)
        except GraftError:
            return None
        is_same = info.provenance == Provenance(str(order.address), place.revision)
        return Registered(info, is_new=False) if is_same else None

    def _finish(self, fetch: Fetch, ending: Registered | GraftError) -> None:
        with self._lock:
            if fetch.result.done():
                return
            self._end(fetch, ending, "done" if isinstance(ending, Registered) else "failed")
            if not isinstance(ending, Registered):
                self._failures[fetch.order.name] = (self._clock(), fetch)
                self._forget_old_failures()

    def _forget_old_failures(self) -> None:
        oldest_s = self._clock() - FAILURE_MEMORY_S
        while self._failures:
            name, (failed_s, _) = next(iter(self._failures.items()))
            if len(self._failures) <= MAX_FAILURES and failed_s >= oldest_s:
                return
            del self._failures[name]


def _on_its_way(fetch: Fetch) -> AdapterOnItsWay:
    info, remaining_s = fetch.info(), fetch.meter.remaining_s()
    shortest, longest = _RETRY_S
    retry_after_s = longest // 6 if remaining_s is None else min(max(math.ceil(remaining_s), shortest), longest)
    so_far = "" if info.progress is None else f", {info.progress:.0%} of {info.bytes_total} bytes"
    return AdapterOnItsWay(
        f"The adapter {info.name!r} is on its way ({info.status}{so_far}): ask again in {retry_after_s} s.",
        retry_after_s=retry_after_s,
    )


def _under_way(known: Fetch) -> Conflict:
    order = known.order
    return Conflict(
        f"The adapter {order.name!r} is being fetched already, from {order.address} with replace={order.replace} and "
        f"base_fingerprint={order.base_fingerprint}: wait for that, or cancel it (DELETE "
        f"/v1/adapters/{order.name}/fetch).",
        param="name",
    )


def _shutting_down() -> Overloaded:
    return Overloaded("The server is shutting down.")
