"""How much a store may hold: a quota on its content, and disk that stays free for others.

Owns the two limits, and what uploads in progress have been promised of them. Knows nothing about names, versions or
what is in a file; no torch.

An upload claims its bytes before they are written, so that two at once cannot pass a limit together. What is stored is
measured on the disk, because other processes may share the store; their uploads in progress are seen when they are put.
"""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from server.adapters.format.content import CONTENT_FILES
from server.ground.errors import StorageFull

_STEP_BYTES = 1 << 20  # claimed at once where an upload's length is not known


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """What an upload may leave behind; the default is no limit."""

    quota_bytes: int | None = None  # of the content of all versions
    reserve_bytes: int = 0  # of the disk, which stay free


class Claim:
    """The room of one upload. Not for use by two threads at once."""

    def __init__(self, room: "StoreRoom") -> None:
        self._room = room
        self.claimed_bytes = 0
        self.written_bytes = 0

    def write(self, num_bytes: int) -> None:
        """Notes bytes about to be written. Raises StorageFull where there is no room for them."""
        total = self.written_bytes + num_bytes
        if total > self.claimed_bytes:
            self._room.grow(self, total, total + total // 4 + _STEP_BYTES)
        self.written_bytes = total

    def expect(self, num_bytes: int) -> None:
        """Claims room for bytes that will follow. Raises StorageFull where there is none."""
        total = self.written_bytes + num_bytes
        if total > self.claimed_bytes:
            self._room.grow(self, total, total)

    def end(self) -> None:
        """Gives back what was claimed; does nothing the second time."""
        self._room.forget(self)


class StoreRoom:
    """The room of one store folder. Safe for many threads."""

    def __init__(self, root: Path, limits: StoreLimits) -> None:
        self.limits = limits
        self._root = root
        self._lock = threading.Lock()
        self._claims: set[Claim] = set()

    def claim(self) -> Claim:
        """A claim of nothing yet; end it."""
        return Claim(self)

    def grow(self, claim: Claim, least_bytes: int, most_bytes: int) -> None:
        """Raises a claim to `most_bytes` or what there is, at least to `least_bytes`; else raises StorageFull."""
        if self.limits == StoreLimits():
            claim.claimed_bytes = most_bytes
            return
        with self._lock:
            claim.claimed_bytes = min(most_bytes, self._available(claim, least_bytes))
            self._claims.add(claim)

    def forget(self, claim: Claim) -> None:
        with self._lock:
            self._claims.discard(claim)

    @contextmanager
    def settling(self, claim: Claim) -> Iterator[None]:
        """Around the step by which an upload becomes stored content: from then on it counts as that.

        Raises StorageFull where another process has filled the store meanwhile.
        """
        with self._lock:
            self._available(claim, claim.written_bytes)
            yield
            self._claims.discard(claim)

    def _available(self, claim: Claim, needed_bytes: int) -> int:
        """The bytes that a claim may have, all in all. Under the lock. Raises StorageFull below `needed_bytes`."""
        others = [other for other in self._claims if other is not claim]
        available = 1 << 62
        if self.limits.quota_bytes is not None:
            taken = content_bytes(self._root) + sum(other.claimed_bytes for other in others)
            available = self.limits.quota_bytes - taken
            if available < needed_bytes:
                raise _over_quota(self.limits.quota_bytes, taken, needed_bytes)
        if self.limits.reserve_bytes:
            promised = sum(max(other.claimed_bytes - other.written_bytes, 0) for other in others)
            free = shutil.disk_usage(self._root).free - promised
            on_disk = free - self.limits.reserve_bytes + claim.written_bytes
            if on_disk < needed_bytes:
                raise _no_disk(free, self.limits.reserve_bytes, needed_bytes - claim.written_bytes)
            available = min(available, on_disk)
        return available


def content_bytes(root: Path) -> int:
    """The bytes of the adapters' own files in a store, all versions; what changes meanwhile may be missed."""
    total = 0
    for name in _folders(root):
        for version in _folders(name):
            for filename in CONTENT_FILES:
                with suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(version, filename)).st_size
    return total


def _folders(parent: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    with suppress(FileNotFoundError), os.scandir(parent) as entries:
        return [e for e in entries if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)]
    return []


def _over_quota(quota_bytes: int, used_bytes: int, needed_bytes: int) -> StorageFull:
    return StorageFull(
        f"The store may hold {quota_bytes} bytes (--store-quota), {used_bytes} are taken or promised to other uploads, "
        f"and this one needs {needed_bytes}: delete adapters, keep fewer versions (--keep-versions), or start the "
        f"server with a larger --store-quota.",
        code="quota_exceeded",
    )


def _no_disk(free_bytes: int, reserve_bytes: int, needed_bytes: int) -> StorageFull:
    return StorageFull(
        f"The store's disk has {free_bytes} free bytes, {reserve_bytes} of them stay free (--store-reserve), and this "
        f"upload needs {needed_bytes}: free some space, delete adapters, or start the server with a smaller "
        f"--store-reserve.",
        code="disk_full",
    )
