"""Leases: a request's hold on a version or on a mix of several, and what is let go with the last one.

Owns the count of holds, and how long a mix is kept. Knows nothing about where an adapter's bytes are.
"""

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from server.adapters.asker import current_asker
from server.adapters.books import Books
from server.adapters.catalog import AdapterVersion, Content, Copy, Portion
from server.adapters.loader import Loader
from server.adapters.naming import told
from server.adapters.quarantine import Quarantine
from server.adapters.residency import Residency
from server.adapters.workers import Workers
from server.ground.errors import BadRequest, GraftError


class Lease:
    """A hold on one version, from a request's acceptance to its end: until then it can be neither changed nor lost.

    A lease on a mix holds the versions of all its portions. To the engine it has one version, too: the digest is the
    mix's own, the name says what is in it.
    """

    def __init__(
        self,
        content: Content,
        portions: Sequence[Portion],
        copies: Sequence[Copy],
        end: Callable[["Lease"], None],
        blame: Callable[[Content, AdapterVersion], None],
    ) -> None:
        self.portions = tuple(portions)  # in the order in which they were asked for
        self.version = _version(content, self.portions)
        self.content = content  # the registry's, like `copies`
        self.copies = tuple(copies)  # one for each portion; none once released
        self._end = end
        self._blame = blame

    @property
    def has_doubts(self) -> bool:
        """Whether an adapter of it seems to be of another base."""
        return any(portion.has_doubts for portion in self.portions)

    @property
    def copy(self) -> Copy | None:
        """That of the only portion, or the first; None once released."""
        return self.copies[0] if self.copies else None

    def blame(self) -> None:
        """Says that the model's output overflowed with it in a step. Never blocks, from any thread."""
        self._blame(self.content, self.version)

    def told(self, error: GraftError) -> GraftError:
        """An error of its content, in the names under which this lease holds that: others may hold it, too."""
        return told(error, [portion.version for portion in self.portions])

    def release(self) -> None:
        """Ends the hold; does nothing the second time. Never blocks, from any thread."""
        self._end(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class Leases:
    """All leases of a registry."""

    def __init__(
        self, books: Books, workers: Workers, loader: Loader, residency: Residency, quarantine: Quarantine
    ) -> None:
        self._books = books
        self._workers = workers
        self._loader = loader
        self._residency = residency
        self._quarantine = quarantine
        self.lookups_total = {"store": 0, "host": 0, "device": 0}

    def lease(self, spec: str) -> Lease:
        """`Registry.lease`."""
        return self.hold(spec, is_use=True)

    def lease_mix(self, parts: Sequence[tuple[str, float]]) -> Lease | None:
        """`Registry.lease_mix`."""
        with self._books.lock:
            self._workers.check_open()
            found = [(spec, self._books.catalog.find(spec), weight) for spec, weight in parts]
            unknown = [spec for spec, copy, _ in found if copy is None]
            used = [(copy, weight) for _, copy, weight in found if copy is not None and weight]
            lease = None if unknown else self._hold(used, is_use=True)
            over = self._books.catalog.forget_idle_mixes()
        if unknown:
            raise self._books.unknown(unknown[0])
        for mix in over:
            self._workers.later(self._residency.purge, mix)
        return lease

    def hold(self, spec: str, *, is_use: bool = False, starts_load: bool = True) -> Lease:
        """A lease; one for the registry's own verbs is no use of the adapter and is not counted."""
        with self._books.lock:
            self._workers.check_open()
            copy = self._books.catalog.find(spec)
            lease = None if copy is None else self._hold([(copy, 1.0)], is_use=is_use, starts_load=starts_load)
        if lease is None:
            raise self._books.unknown(spec)
        return lease

    def forget_mixes(self, spec: str) -> None:
        """Frees the mixes with the version that `spec` means: those in use when their last lease ends. Blocks.

        Raises Forbidden for an adapter that is the operator's alone to change.
        """
        with self._books.lock:
            copy = self._books.catalog.find(spec)
            if copy is not None:
                current_asker().check_owns(copy.version.name, copy.owner)
            over = [] if copy is None else self._forget_mixes(copy.content)
        for mix in over:
            self._residency.purge(mix)

    def dispose(self, copy: Copy) -> None:
        """Removes what is left of a copy that was let go. Blocks."""
        if copy.discarded is not None:
            copy.discarded.remove()
        with self._books.lock:
            over = [] if copy.content.copies else self._forget_mixes(copy.content)
        for content in (*over, copy.content):
            self._residency.purge(content)

    def _forget_mixes(self, content: Content) -> list[Content]:
        catalog = self._books.catalog
        return catalog.forget_mixes(catalog.mixes_of(content.digest))

    def _hold(self, used: Sequence[tuple[Copy, float]], *, is_use: bool, starts_load: bool = True) -> Lease | None:
        """Under the lock: a lease on the weighted sum of these copies; None where there are none, which is the base."""
        if not used:
            return None
        for copy, _ in used:
            self._books.check_base(copy.doubts)
        if is_use:
            self._quarantine.check(copy for copy, _ in used)
        portions = [Portion(copy.version, weight, bool(copy.doubts)) for copy, weight in used]
        content = self._content(used, portions)
        self._quarantine.check_mix(content, _version(content, portions))
        if is_use:
            self.lookups_total[self._residency.tier_of(content)] += 1
        if starts_load:
            self._loader.start_if_cold(content, [portion.version for portion in portions])
        content.num_mix_leases += bool(content.portions)
        for copy, _ in used:
            copy.num_leases += 1
            if is_use:
                copy.num_requests += 1
                copy.last_used = int(time.time())
        return Lease(content, portions, [copy for copy, _ in used], self._end, self._quarantine.note)

    def _content(self, used: Sequence[tuple[Copy, float]], portions: Sequence[Portion]) -> Content:
        """That of the only copy where it is used as it is, else that of the mix."""
        if len(used) == 1 and used[0][1] == 1:
            return used[0][0].content
        _check_distinct(portions)
        return self._books.catalog.mix(portions)

    def _end(self, lease: Lease) -> None:
        content, catalog = lease.content, self._books.catalog
        with self._books.lock:
            copies, lease.copies = lease.copies, ()
            if not copies:
                return
            content.num_mix_leases -= bool(content.portions)
            for copy in copies:
                copy.num_leases -= 1
            over = [copy for copy in copies if catalog.let_go_if_over(copy)]
            is_mix_over = bool(content.portions) and content.is_over
        for copy in over:
            self._workers.later(self.dispose, copy)
        if is_mix_over:
            self._workers.later(self._residency.purge, content)


def _version(content: Content, portions: Sequence[Portion]) -> AdapterVersion:
    if not content.portions:
        return portions[0].version
    name = "+".join(f"{portion.weight:g}*{portion.version.name}" for portion in portions)
    return AdapterVersion(name, content.digest)


def _check_distinct(portions: Sequence[Portion]) -> None:
    """Raises BadRequest for a content that comes twice: what that means depends on the method."""
    first: dict[str, AdapterVersion] = {}
    for version in (portion.version for portion in portions):
        if version.digest in first:
            raise BadRequest(
                f"'adapter' has one content twice, as {first[version.digest]} and as {version}: name it once, with the "
                "sum of the weights.",
                param="adapter",
            )
        first[version.digest] = version
