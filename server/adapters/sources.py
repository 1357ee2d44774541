"""Adapters that are read in place: folders that the operator names, and folders full of them.

Owns which folders are adapters, under which names, and noticing that their files changed. Knows nothing about tensors,
the store's layout or who uses an adapter; no torch.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from server.adapters.format.content import CONFIG_FILE
from server.adapters.store.folder_store import (
    FolderDigest,
    base_fingerprint_of,
    base_model_of,
    content_files,
    folder_digest,
    is_valid_name,
)
from server.ground.errors import AdapterRejected, StartupRefused

_log = logging.getLogger(__name__)

Signature = tuple[tuple[str, int, int, int, int], ...]  # per content file: name, inode, bytes, mtime_ns, ctime_ns


@dataclass(frozen=True, slots=True)
class Found:
    """A folder that is an adapter: the name it serves under, and its version (computed as the store's)."""

    name: str
    folder: Path
    digest: str
    content_bytes: int
    base_model: str | None
    created: int  # Unix time of the config's last change
    signature: Signature
    base_fingerprint: str | None = None  # of the base that its manifest says it was made for

    def is_intact(self) -> bool:
        """Whether the folder still holds the files that the digest was taken from. Reads no content."""
        try:
            return _signature(self.folder) == self.signature
        except (AdapterRejected, OSError):
            return False


class Source(Protocol):
    """A place where adapters lie."""

    def scan(self) -> tuple[Found, ...]:
        """The adapters that are there now, by name. Hashes what is new or changed since the last scan: may be slow.

        Never raises for a broken folder: it is left out, and logged once. Not for use by two threads at once.
        """


class LocalFolder:
    """One folder under a name that the operator chose: `--adapter NAME=PATH`."""

    def __init__(self, name: str, folder: Path) -> None:
        """Raises StartupRefused for a name that cannot be one, or a folder that is no adapter."""
        if not is_valid_name(name):
            raise StartupRefused(
                f"--adapter {name}={folder}: {name!r} cannot name an adapter. Use 1 to 63 of a-z, 0-9, '.', '_' and "
                f"'-', beginning with a letter or a digit."
            )
        try:
            content_files(folder)
        except AdapterRejected as missing:
            raise StartupRefused(f"--adapter {name}={folder}: {missing.message}") from missing
        self.name = name
        self._folder = _Folder(folder)

    @classmethod
    def parse(cls, argument: str) -> Self:
        """From `NAME=PATH`. Raises StartupRefused."""
        name, equals, path = argument.partition("=")
        if not (equals and path):
            raise StartupRefused(f"--adapter {argument}: write it as NAME=PATH, PATH being the adapter's folder.")
        return cls(name, Path(path).expanduser())

    def scan(self) -> tuple[Found, ...]:
        found = self._folder.find(self.name)
        return () if found is None else (found,)


class FolderSource:
    """A folder whose sub-folders with an adapter_config.json are adapters: `--adapters DIR`.

    A sub-folder serves under its own name. Where that cannot name an adapter, it is lower-cased and what is not
    allowed becomes "-"; of two that would share a name the one that is so called, or else the first, has it.
    """

    def __init__(self, root: Path) -> None:
        """Raises StartupRefused if `root` is not a folder."""
        if not root.is_dir():
            raise StartupRefused(f"--adapters {root}: it is not a folder. Create it, or name another.")
        self.root = root
        self._folders: dict[Path, _Folder] = {}
        self._warned: set[tuple[Path, str]] = set()
        self._found: tuple[Found, ...] = ()
        self._is_listed = True

    def scan(self) -> tuple[Found, ...]:
        """As any source's; while the folder itself cannot be listed, what was found last."""
        entries = self._entries()
        if entries is not None:
            self._found = self._find_in(entries)
        return self._found

    def _find_in(self, entries: list[Path]) -> tuple[Found, ...]:
        candidates = sorted(filter(self._has_config, entries), key=lambda path: not is_valid_name(path.name))
        self._folders = {path: self._folders.get(path) or _Folder(path) for path in candidates}
        taken: dict[str, Found] = {}
        for path in candidates:
            name = self._name_for(path)
            if name is None:
                continue
            if name in taken:
                self._warn(path, f"it would serve as {name!r}, as {taken[name].folder} does: rename one of the two")
            elif (found := self._folders[path].find(name)) is not None:
                taken[name] = found
        return tuple(taken.values())

    def _entries(self) -> list[Path] | None:
        """What lies in the folder, by name; None, and one warning, while it cannot be listed."""
        try:
            entries = sorted(self.root.iterdir())
        except OSError as error:
            if self._is_listed:
                _log.warning("The adapters folder %s cannot be read, what it had is kept: %s", self.root, error)
            self._is_listed = False
            return None
        self._is_listed = True
        return entries

    def _has_config(self, path: Path) -> bool:
        try:
            return (path / CONFIG_FILE).is_file()
        except OSError as error:
            self._warn(path, f"it is left out, it cannot be read: {error.strerror or error}")
            return False

    def _name_for(self, path: Path) -> str | None:
        if is_valid_name(path.name):
            return path.name
        slug = re.sub(r"[^a-z0-9._-]+", "-", path.name.lower()).strip("._-")[:63]
        if not is_valid_name(slug):
            self._warn(path, "its name cannot name an adapter: rename it")
            return None
        self._warn(path, f"its name cannot name an adapter; it serves as {slug!r}")
        return slug

    def _warn(self, path: Path, what: str) -> None:
        if (path, what) not in self._warned:
            self._warned.add((path, what))
            _log.warning("The adapter folder %s: %s", path, what)


class _Folder:
    """One folder, with the digest of its files as last seen."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[Signature, FolderDigest] | None = None
        self._complaint = ""

    def find(self, name: str) -> Found | None:
        """The adapter in the folder; None, and a warning, if there is none or it changes under the reading."""
        try:
            signature = _signature(self._path)
            digest = self._digest(signature)
            created = int((self._path / CONFIG_FILE).stat().st_mtime)
            is_stable = _signature(self._path) == signature
        except (AdapterRejected, OSError) as error:
            self._complain(str(error))
            return None
        if not is_stable:
            self._complain("its files are being written; it is left out until they are still")
            return None
        self._seen, self._complaint = (signature, digest), ""
        return Found(
            name=name,
            folder=self._path,
            digest=digest.digest,
            content_bytes=digest.content_bytes,
            base_model=base_model_of(self._path),
            created=created,
            signature=signature,
            base_fingerprint=base_fingerprint_of(self._path),
        )

    def _digest(self, signature: Signature) -> FolderDigest:
        if self._seen is not None and self._seen[0] == signature:
            return self._seen[1]
        return folder_digest(self._path)

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            self._complaint = complaint
            _log.warning("The adapter folder %s is left out: %s", self._path, complaint)


def _signature(folder: Path) -> Signature:
    """What changes when the files do, without reading them. Follows links: a hub cache is made of them."""
    stats = ((path.name, path.stat()) for path in content_files(folder))
    return tuple((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats)
