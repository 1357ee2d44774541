"""The adapters that are read in place: what the folders hold, as the catalog's names.

Owns the look at the folders and whose name it is where two claim one. Knows nothing about how a folder is searched.
"""

import logging
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from server.adapters.books import Books
from server.adapters.catalog import AdapterVersion, Copy
from server.adapters.lease import Leases
from server.adapters.loader import Loader
from server.adapters.served_base import BaseClaim
from server.adapters.sources import Found, LocalFolder, Source
from server.ground.errors import StartupRefused

_log = logging.getLogger(__name__)


class InPlace:
    """The catalog's side of the sources."""

    def __init__(self, books: Books, sources: Sequence[Source], loader: Loader, leases: Leases) -> None:
        self._books = books
        self._sources = tuple(sources)
        self._loader = loader
        self._leases = leases
        self._scanning = threading.Lock()
        self._warned: set[tuple[str, Path]] = set()

    def refuse_taken_names(self, store: str) -> None:
        """Raises StartupRefused if a folder is given a name that the store has."""
        for source in self._sources:
            if isinstance(source, LocalFolder) and source.name in self._books.catalog.entries:
                raise StartupRefused(
                    f"--adapter {source.name}=...: the store {store} has an adapter of this name. Choose another."
                )

    def rescan(self) -> None:
        """`Registry.rescan`."""
        with self._scanning:
            folders = [folder for source in self._sources for folder in source.scan()]
            with self._books.changes, self._books.lock:
                found = self._by_free_name(folders)
                over = [copy for name in self._outdated(found) for copy in self._unlist(name)]
                for name, folder in found.items():
                    self._list(name, folder)
        for copy in over:
            self._leases.dispose(copy)

    def _by_free_name(self, folders: Iterable[Found]) -> dict[str, Found]:
        """The folders that serve, by name: what the store or an earlier source has is left out."""
        found: dict[str, Found] = {}
        for folder in folders:
            entry = self._books.catalog.entries.get(folder.name)
            if folder.name in found or (entry is not None and entry.current.found is None):
                self._warn_taken(folder)
            else:
                found[folder.name] = folder
        return found

    def _warn_taken(self, folder: Found) -> None:
        if (folder.name, folder.folder) not in self._warned:
            self._warned.add((folder.name, folder.folder))
            _log.warning("The adapter folder %s is left out: the name %s is taken.", folder.folder, folder.name)

    def _outdated(self, found: dict[str, Found]) -> list[str]:
        """Names read in place whose folder is gone or has other content now."""
        entries = self._books.catalog.entries
        in_place = [(name, entry.current.version.digest) for name, entry in entries.items() if entry.current.found]
        return [name for name, digest in in_place if name not in found or found[name].digest != digest]

    def _unlist(self, name: str) -> list[Copy]:
        copies = self._books.catalog.remove(name)
        for copy in copies:
            self._loader.settle(copy.content)  # for those who lease it: perhaps it cannot be read again
        return [copy for copy in copies if self._books.catalog.let_go_if_over(copy)]

    def _list(self, name: str, folder: Found) -> None:
        entry = self._books.catalog.entries.get(name)
        if entry is not None:  # the same content, perhaps elsewhere or with new dates
            entry.current.found, entry.current.folder = folder, folder.folder
            return
        copy = Copy(
            version=AdapterVersion(name, folder.digest),
            content=self._books.catalog.content(folder.digest),
            folder=folder.folder,
            created=folder.created,
            content_bytes=folder.content_bytes,
            base_model=folder.base_model,
            base_fingerprint=folder.base_fingerprint,
            doubts=self._books.base.doubts(BaseClaim(folder.base_model, folder.base_fingerprint)),
            found=folder,
        )
        self._books.catalog.add(copy)
        self._loader.settle(copy.content)
