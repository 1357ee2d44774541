"""Versions brought to this machine: a folder of files, by digest, bounded in bytes.

Owns what is on the disk, that it is what its digest says, and what goes when room is needed: what was read longest ago,
never what is being read. Knows nothing about names or where versions come from; no torch.

    <root>/versions/<digest>/    the files of one version
    <root>/work/                 a store folder of which only the place for uploads and downloads is used

Versions are known by their content alone, so several servers may share a cache, whatever stores they are on. A reader
holds a lock of the operating system on the version's folder; who evicts takes it alone. What a crash left is found out,
because a version is held to its digest when a process first reads it.
"""

import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from server.adapters.store.folder_store import Incoming, Store, folder_digest, folder_signature, try_lock
from server.adapters.store.quota import StoreLimits
from server.ground.errors import AdapterRejected, StartupRefused

_MAX_FETCHES = 3  # in a row of one version: others may take it away before it is read

_Signature = tuple[tuple[str, int, int, int], ...]  # per file: name, inode, bytes, mtime_ns

Fetch = Callable[[str], Incoming]  # brings the files of a version; whoever calls it discards what comes


class VersionCache:
    """The cache folder. Safe for many threads and processes."""

    def __init__(self, root: Path, max_bytes: int, *, reserve_bytes: int = 0) -> None:
        """Keeps `reserve_bytes` of the disk free. Raises StartupRefused where the folder cannot be made."""
        self._versions = root / "versions"
        try:
            self._versions.mkdir(parents=True, exist_ok=True)
            self._work = Store(root / "work", create=True, limits=StoreLimits(reserve_bytes=reserve_bytes))
        except (OSError, StartupRefused) as error:
            raise StartupRefused(
                f"--store-cache {root} cannot be made or read ({error}): name another folder."
            ) from error
        self._versions = self._versions.resolve()
        self._max_bytes = max_bytes
        self._reserve_bytes = reserve_bytes
        self._lock = threading.Lock()
        self._sound: dict[str, _Signature] = {}  # by digest, the files that were held to it

    def folder(self, digest: str) -> Path:
        """Where the files of a version are while they are read."""
        return self._versions / digest

    def digest_of(self, folder: Path) -> str | None:
        """The version that a folder is of; None for a folder elsewhere."""
        return folder.name if folder.parent == self._versions else None

    def incoming(self, *, max_bytes: int | None) -> Incoming:
        """A place for files that arrive; room is made for them."""
        self._make_room(max_bytes or 0)
        return self._work.incoming(max_bytes=max_bytes)

    @contextmanager
    def reading(self, digest: str, fetch: Fetch) -> Iterator[None]:
        """Around the reading of a version's files, fetched if they are not here. Raises what `fetch` raises."""
        held = self._hold(digest)
        for _ in range(_MAX_FETCHES):
            if held is not None:
                break
            with fetch(digest) as incoming:
                self.adopt(digest, incoming)
            held = self._hold(digest)
        if held is None:
            raise AdapterRejected(
                f"The files in {self.folder(digest)} are not those of the version, and cannot be replaced: remove the "
                f"folder.",
                param="adapter",
            )
        try:
            yield
        finally:
            os.close(held)

    def adopt(self, digest: str, incoming: Incoming) -> None:
        """Makes complete files, whose digest this is, a version that is here; uses them up. Raises OSError."""
        folder = self.folder(digest)
        try:
            os.rename(incoming.folder, folder)
        except OSError:
            if not folder.is_dir():  # else another process has just brought it
                raise
        else:
            with self._lock:
                self._sound[digest] = folder_signature(folder)
        incoming.discard()
        self._make_room(0, besides=digest)

    def _hold(self, digest: str) -> int | None:
        """A shared lock on a version that is here and sound; None if there is none."""
        descriptor = self._shared(self.folder(digest))
        if descriptor is None:
            return None
        if self._is_sound(digest):
            os.utime(descriptor)  # its last use
            return descriptor
        os.close(descriptor)
        self._evict(self.folder(digest))
        return None

    @staticmethod
    def _shared(folder: Path) -> int | None:
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        with suppress(FileNotFoundError):
            if os.stat(folder).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)  # it was evicted before the lock was had
        return None

    def _is_sound(self, digest: str) -> bool:
        """Whether the files are those of the version; read once, unless they change."""
        signature = folder_signature(self.folder(digest))
        with self._lock:
            if self._sound.get(digest) == signature:
                return True
        try:
            is_sound = folder_digest(self.folder(digest)).digest == digest
        except (AdapterRejected, OSError):
            is_sound = False
        if is_sound:
            with self._lock:
                self._sound[digest] = signature
        return is_sound

    def _make_room(self, num_bytes: int, *, besides: str | None = None) -> None:
        """Evicts until the cache and the disk have room for some bytes more, or nothing is left to evict."""
        sizes = {folder: sum(size for _, _, size, _ in folder_signature(folder)) for folder in self._by_last_use()}
        total = sum(sizes.values())
        for folder, size in sizes.items():
            free = shutil.disk_usage(self._versions).free
            if total <= self._max_bytes and free >= self._reserve_bytes + num_bytes:
                return
            if folder.name != besides and self._evict(folder):
                total -= size

    def _by_last_use(self) -> list[Path]:
        used = {}
        for folder in self._versions.iterdir():
            with suppress(FileNotFoundError):
                used[folder] = folder.stat().st_mtime_ns
        return sorted(used, key=used.__getitem__)

    def _evict(self, folder: Path) -> bool:
        """Removes a version that nobody reads; whether it is gone."""
        try:
            lock = try_lock(folder)
        except FileNotFoundError:  # another process was faster
            return True
        if lock is None:
            return False
        # What a crash leaves of it is no version any more, which the next reader finds out.
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
        return True
