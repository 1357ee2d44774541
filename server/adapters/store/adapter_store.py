"""What the registry, the commands and HTTP need of an adapter store, wherever it keeps its bytes.

Owns the interface of the store tier: `store.Store` is a folder, `object_store.ObjectStore` an object store that several
servers share. Knows nothing about either.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from server.adapters.store.folder_store import Incoming, Record, StoredName, StoredVersion


class Discarded(Protocol):
    """A version that no name means any more, readable in `folder` until removed."""

    @property
    def digest(self) -> str: ...

    @property
    def folder(self) -> Path: ...

    def remove(self) -> None:
        """Removes the files, or leaves them to a later clearing; does nothing the second time. Never raises."""


class AdapterStore(Protocol):
    """Names, their versions, and the files of each. Safe for many threads and processes; calls block.

    What changes a name looks, in the same step, whose it is in the store: another process may have changed that. For
    who may not change it, it raises what the catalog raises: Conflict for a name that is another owner's, and where an
    adapter is to be changed AdapterNotFound, or Forbidden for the operator's.
    """

    @property
    def root(self) -> Path | None:
        """The folder that servers mark while they run on it; None where they notice what others change."""

    @property
    def location(self) -> str:
        """What stands after --store."""

    @property
    def is_shared(self) -> bool:
        """Whether other servers change it while this one runs, so that it has to be looked at again."""

    def close(self) -> None:
        """Breaks off what brings files here; nothing is to be read any more."""

    def scan(self) -> tuple[StoredName, ...]:
        """Every name that is whole, sorted by name. A broken entry is left out, and logged with what is wrong."""

    def versions(self, name: str) -> tuple[StoredVersion, ...]:
        """The versions of a name, the current one last. Raises AdapterNotFound."""

    def reading(self, folder: Path) -> AbstractContextManager[None]:
        """Around the reading of a version's `folder`: its files are there, and are those of the version, until the end.

        Does nothing for a folder that is not the store's. Raises AdapterNotFound for a version that is gone,
        AdapterRejected for one whose files are not what was stored, StoreUnreachable and StorageFull.
        """

    def incoming(self, *, max_bytes: int | None = None) -> Incoming:
        """A place for one upload of at most `max_bytes` (no limit if None); leave it as a context manager."""

    def staged(self, incoming: Incoming, name: str, *, replace: bool) -> AbstractContextManager[None]:
        """Around `put`, without locks: does what takes long, and undoes it at the end if nothing was put.

        Raises what `put` raises, where that can be known already.
        """

    def put(self, incoming: Incoming, name: str, record: Record, *, replace: bool) -> tuple[StoredVersion, bool]:
        """Makes the upload the current version of `name`; whether that changed what the name means comes with it.

        It belongs to whoever has the name, else to who asks. Raises Conflict if the name exists with other content and
        not `replace`. The upload is used up if this returns.
        """

    def make_current(self, name: str, digest: str) -> None:
        """Makes a version that the name has already the one that it means. Raises AdapterNotFound."""

    def discard(self, name: str) -> tuple[Discarded, ...]:
        """Takes a name and its versions out of the store at once. Raises AdapterNotFound."""

    def discard_version(self, name: str, digest: str) -> Discarded:
        """Takes one version out at once. Raises AdapterNotFound, and Conflict for the current one."""

    def delete(self, name: str) -> None:
        """Removes a name with all its versions. Raises AdapterNotFound."""
