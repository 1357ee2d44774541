"""Names, versions and the copies of content behind them: the registry's books.

Owns which version a name or `name@version-prefix` means, and the counts on each. Not safe for threads by itself: the
registry holds its lock around every call. Knows nothing about tiers, loading or eviction; no torch.
"""

import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from server.adapters.adapter_info import Provenance
from server.adapters.asker import current_asker
from server.adapters.eviction import Uses, Worth
from server.adapters.name_index import NameIndex
from server.adapters.name_patterns import nearest
from server.adapters.sources import Found
from server.adapters.store.adapter_store import Discarded
from server.ground.errors import AdapterNotFound, BadRequest, Conflict, GraftError

MAX_CACHED_MIXES = 256  # beyond those in use; once the tiers have evicted one, it is little more than its note here
_MIN_PREFIX = 6
_PREFIX = re.compile(rf"[0-9a-f]{{{_MIN_PREFIX},64}}")


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """The identity of an adapter: its name, and the digest of its content."""

    name: str
    digest: str  # 64 hex digits

    @property
    def short(self) -> str:
        """The version as people read it: the first 12 digits."""
        return self.digest[:12]

    def __str__(self) -> str:
        return f"{self.name}@{self.short}"


@dataclass(frozen=True, slots=True)
class Facts:
    """What lowering a content taught about it."""

    method: str
    rank: int
    num_parameters: int
    num_sites: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What an adapter takes: bytes on the tiers above the disk, each tensor counted in full even where others share it,
    and tokens of each sequence's context."""

    host_bytes: int
    device_bytes: int  # its rows
    needed_bytes: int  # on an empty device, the edges of slabs counted
    num_virtual_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Portion:
    """One adapter of a mix, and how much of it."""

    version: AdapterVersion
    weight: float  # finite, not zero
    has_doubts: bool = False  # the adapter seems to be of another base


@dataclass(slots=True, eq=False)
class Content:
    """One digest, whatever names mean it: the tiers above the disk know adapters by this alone.

    A mix is a content of its own. It has no copies: it is made of those of its portions, leased by whoever leases it.
    """

    digest: str
    copies: list["Copy"] = field(default_factory=list)
    portions: tuple[Portion, ...] = ()  # of a mix
    num_mix_leases: int = 0  # on the mix as such
    is_forgotten: bool = False  # whether the mix leaves all tiers with its last lease
    facts: Facts | None = None
    sizes: Sizes | None = None  # None until it was loaded once
    is_loading: bool = False
    failure: GraftError | None = None  # of the last load
    failed_at_s: float = 0.0
    slot: int | None = None  # on the device
    num_residencies: int = 0
    num_unloads: int = 0  # that wait for its residencies to end; no new one begins meanwhile
    is_promoting: bool = False  # a thread of its own is to put it on the device
    is_copying: bool = False  # it is on its way there, beside the steps
    copy_failure: GraftError | None = None  # of the last copy there; for one of those who wait for it
    must_reserve_inline: bool = False  # that has failed: who asks next is to know at once whether there is room
    refused_at: int | None = None  # the number of easings when it last found no room on the device
    load_s: float | None = None  # the shortest load from the store
    uses: Uses = field(default_factory=Uses)
    overflows_s: list[float] = field(default_factory=list)  # of late: when the output with it was no numbers
    is_quarantined: bool = False  # after several of these: served to nobody

    @property
    def num_leases(self) -> int:
        return self.num_mix_leases + sum(copy.num_leases for copy in self.copies)

    @property
    def is_over(self) -> bool:
        """Whether nobody can ask for it any more and nobody leases it: once nothing runs on it, it is to be purged."""
        return not self.copies and (not self.portions or (self.is_forgotten and self.num_mix_leases == 0))

    def worth(self, reload_s: float, num_bytes: int) -> tuple[bool, Worth]:
        """Of a place on a tier: what a request has asked for comes before all else."""
        return self.num_leases > 0, self.uses.worth(reload_s, num_bytes)

    @property
    def is_pinned(self) -> bool:
        return any(copy.is_pinned for copy in self.copies)


@dataclass(slots=True, eq=False)
class Copy:
    """One version on disk, in the store or read in place. It outlives its name for as long as it is leased."""

    version: AdapterVersion
    content: Content
    folder: Path
    created: int  # Unix time
    content_bytes: int
    base_model: str | None
    base_fingerprint: str | None = None  # of the base that it was made for or, where nobody said, validated against
    doubts: tuple[str, ...] = ()  # whether that is the base that is served
    provenance: Provenance | None = None  # of one that was fetched
    owner: str | None = None  # None: the operator
    found: Found | None = None  # where it is read in place
    discarded: Discarded | None = None  # where it was deleted from the store
    num_leases: int = 0
    is_listed: bool = True  # whether a request can still ask for it
    is_pinned: bool = False  # whether it may leave neither host nor device
    num_requests: int = 0  # leases since the start
    last_used: int | None = None  # Unix time of the last one

    @property
    def is_outdated(self) -> bool:
        """Whether its files have changed or gone by another's hand, so that they cannot be read again."""
        return self.discarded is None and not self.is_listed


@dataclass(slots=True, eq=False)
class Entry:
    """A name: the copy that it means, and all that it has, the current one last."""

    current: Copy
    copies: dict[str, Copy]  # by digest


class Catalog:
    """Every name with its versions, and every content that a name or a lease still needs."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self._index = NameIndex()
        self.contents: dict[str, Content] = {}
        self.unlisted: list[Copy] = []  # that no name has any more, and somebody leases
        self.mixes: OrderedDict[str, Content] = OrderedDict()  # kept for the next request, the last asked for last

    def find(self, spec: str) -> Copy | None:
        """The copy that `name` or `name@prefix` means, or None if the name is unknown to who asks.

        Raises BadRequest for a prefix that is none or is ambiguous, AdapterNotFound if no version begins with it.
        """
        name, at, prefix = spec.partition("@")
        entry = self.seen_entry(name)
        if entry is None or not at:
            return entry.current if entry is not None else None
        if not _PREFIX.fullmatch(prefix):
            raise BadRequest(
                f"{spec[:160]!r}: after '@' give the first {_MIN_PREFIX} to 64 hex digits of a version.",
                param="adapter",
            )
        matches = [copy for digest, copy in entry.copies.items() if digest.startswith(prefix)]
        if not matches:
            raise AdapterNotFound(
                f"The adapter {name!r} has no version {prefix}; it has {_listed(entry.copies)}.", param="adapter"
            )
        if len(matches) > 1:
            versions = " and ".join(copy.version.digest for copy in matches[:2])
            raise BadRequest(f"{spec!r} may mean {versions}: give more digits.", param="adapter")
        return matches[0]

    def seen_entry(self, name: str) -> Entry | None:
        """A name, if it is one for who asks."""
        entry = self.entries.get(name)
        is_seen = entry is not None and current_asker().sees(name, entry.current.owner)
        return entry if is_seen else None

    def open_names(self) -> list[tuple[str, ...]]:
        """The names that who asks may know of as far as owners go, in sorted lists. Its patterns are still to be asked:
        outside the lock, as that may take a while."""
        return [tuple(names) for names in self._index.open_to(current_asker().owner)]

    def names_near(self, name: str, most: int) -> Sequence[str]:
        """Some of the names that who asks may know of, sorted: at most `most`, those that would be beside `name`.

        Names that only patterns with a wildcard before their end have are left out.
        """
        asker = current_asker()
        found = [one for names in self._index.open_to(asker.owner) for one in asker.patterns.near(names, name, most)]
        return nearest(sorted(found), name, most)

    def owner_for(self, name: str) -> str | None:
        """Whose a new version of a name is: whoever has the name keeps it. Raises Conflict where who asks may not."""
        entry = self.entries.get(name)
        owner = entry.current.owner if entry is not None else None
        return current_asker().owner_for(name, owner, exists=entry is not None)

    def entries_of(self, owner: str | None) -> dict[str, Entry]:
        """What an owner's names stand for."""
        return {name: self.entries[name] for name in self._index.of(owner)}

    def to_prune(self, name: str, max_versions: int | None, *, num_new: int = 0) -> list[Copy]:
        """The versions of a name beyond the last `max_versions`, once `num_new` have come, that nobody holds."""
        copies = list(self.entries[name].copies.values())
        num_excess = 0 if max_versions is None else max(len(copies) + num_new - max_versions, 0)
        return [copy for copy in copies[:num_excess] if copy.num_leases == 0 and not copy.is_pinned]

    def add(self, copy: Copy) -> None:
        """Makes a copy the current one of its name."""
        copy.content.copies.append(copy)
        digest = copy.version.digest
        entry = self.entries.setdefault(copy.version.name, Entry(copy, {}))
        entry.copies[digest] = copy
        self._mean(entry, copy)

    def make_current(self, copy: Copy) -> None:
        """Makes a copy that its name has already the one that it means."""
        entry = self.entries[copy.version.name]
        entry.copies[copy.version.digest] = entry.copies.pop(copy.version.digest)
        self._mean(entry, copy)

    def _mean(self, entry: Entry, copy: Copy) -> None:
        """Has a name mean a copy, and belong to who owns that."""
        entry.current = copy
        self._index.put(copy.version.name, copy.owner)

    def is_current(self, copy: Copy) -> bool:
        """Whether its name means it now."""
        return copy.is_listed and self.entries[copy.version.name].current is copy

    def remove(self, name: str) -> tuple[Copy, ...]:
        """Takes a name out; its copies stay, unlisted, for those who lease them."""
        copies = tuple(self.entries.pop(name).copies.values())
        self._index.remove(name)
        for copy in copies:
            self._unlist(copy)
        return copies

    def remove_version(self, copy: Copy) -> None:
        """Takes one copy that is not its name's current one out; it stays, unlisted, for those who lease it."""
        del self.entries[copy.version.name].copies[copy.version.digest]
        self._unlist(copy)

    def _unlist(self, copy: Copy) -> None:
        copy.is_listed = copy.is_pinned = False
        self.unlisted.append(copy)

    def let_go_if_over(self, copy: Copy) -> bool:
        """Whether nobody can ask for the copy any more and nobody leases it: then it is out, and to be disposed of."""
        is_over = not copy.is_listed and copy.num_leases == 0
        if is_over:
            copy.content.copies.remove(copy)
            self.unlisted.remove(copy)
        return is_over

    def check_not_in_place(self, name: str) -> None:
        """Raises Conflict for an adapter whose files are the operator's and not the store's."""
        entry = self.entries.get(name)
        if entry is not None and entry.current.found is not None:
            raise Conflict(
                f"The adapter {name!r} is read in place from a folder of the server's machine: change it there, or "
                f"choose another name.",
                param="name",
            )

    def content(self, digest: str) -> Content:
        """The content of a digest, new where there is none."""
        return self.contents.setdefault(digest, Content(digest))

    def mix(self, portions: Sequence[Portion]) -> Content:
        """The content of a mix, new where there is none. Equal portions in any order are one mix."""
        ordered = tuple(sorted(portions, key=lambda portion: (portion.version.digest, portion.weight)))
        digest = _mix_digest(ordered)
        content = self.contents.setdefault(digest, Content(digest, portions=ordered))
        content.is_forgotten = False
        self.mixes[digest] = content
        self.mixes.move_to_end(digest)
        return content

    def mixes_of(self, digest: str) -> list[Content]:
        """The mixes that a content is a portion of."""
        return [mix for mix in self.mixes.values() if any(p.version.digest == digest for p in mix.portions)]

    def forget_mixes(self, mixes: Iterable[Content]) -> list[Content]:
        """Keeps mixes no longer than they are leased; those that are over now, to be purged."""
        over = []
        for mix in mixes:
            del self.mixes[mix.digest]
            mix.is_forgotten = True
            if mix.is_over:
                over.append(mix)
        return over

    def forget_idle_mixes(self) -> list[Content]:
        """Of the mixes that nobody leases, those to be purged so that MAX_CACHED_MIXES are kept, those in use first."""
        num_excess = len(self.mixes) - MAX_CACHED_MIXES
        if num_excess <= 0:
            return []
        return self.forget_mixes([mix for mix in self.mixes.values() if mix.num_mix_leases == 0][:num_excess])

    def integrity_checks(self) -> dict[str, bool]:
        """What must hold between calls: a sentence for the fault, and whether all is well."""
        contents = self.contents.values()
        copies = [copy for content in contents for copy in content.copies]
        listed = {id(copy) for entry in self.entries.values() for copy in entry.copies.values()}
        return {
            "a lease or a residency was ended twice": all(c.num_leases >= 0 for c in copies)
            and all(c.num_residencies >= 0 for c in contents),
            "a residency is held on an adapter that is not on the device": all(
                content.slot is not None for content in contents if content.num_residencies
            ),
            "the listed copies are not those that names have": {id(c) for c in copies if c.is_listed} == listed,
            "the copies that count as deleted are not those that stay": {id(c) for c in copies if not c.is_listed}
            == {id(copy) for copy in self.unlisted},
            "the index of names is not that of the entries": self._index.owners()
            == {name: entry.current.owner for name, entry in self.entries.items()},
            "a deleted copy is pinned": all(copy.is_listed or not copy.is_pinned for copy in copies),
            "a deleted copy stays that nobody leases": all(copy.is_listed or copy.num_leases for copy in copies),
            "the mixes that are kept are not those that are not forgotten": self.mixes
            == {content.digest: content for content in contents if content.portions and not content.is_forgotten},
            "a mix is leased without its portions": all(
                portion.version.digest in self.contents
                for content in contents
                for portion in content.portions
                if content.num_mix_leases
            ),
        }


def _mix_digest(portions: Sequence[Portion]) -> str:
    """SHA-256 over digests and weights; the first word keeps it apart from any adapter's own."""
    lines = [f"{portion.version.digest} {float(portion.weight).hex()}" for portion in portions]
    return hashlib.sha256("\n".join(["mix", *lines]).encode()).hexdigest()


def _listed(digests: Iterable[str]) -> str:
    shown = [digest[:12] for digest in digests][-8:]
    return ", ".join(reversed(shown))
